"""`stablesr restore` of clips: what comes out, what is said, and what a kill leaves."""

import itertools
import json
import os
import signal
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

av = pytest.importorskip("av", reason="clips need PyAV, of the extra video")

from stablesr_kit.cli import main  # noqa: E402
from stablesr_kit.imaging.metadata import read_provenance  # noqa: E402
from stablesr_kit.video.clip import Clip  # noqa: E402
from tests.helpers.cli_runs import error_lines, stablesr, stablesr_in_two_processes  # noqa: E402
from tests.helpers.clips import UNEVEN, moving, packets_of, times_of, write_clip  # noqa: E402
from tests.helpers.file_limits import files_end_at  # noqa: E402
from tests.helpers.forks import FORKS  # noqa: E402

SIZE = (10, 14)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(
        tmp_path_factory.mktemp("clip") / "in.mkv",
        moving(6, *SIZE),
        UNEVEN[:6],
        audio_seconds=0.4,
        subtitles=[(0, 100, "one")],
        attachment=b"a font",
    )


def restore(clip: Path, output: Path, model: Path, *options: object) -> Any:
    return stablesr("restore", clip, "-o", output, "--model", model, "--scale", 2, "--chunk", 2, *options)


def test_a_clip_keeps_its_times_and_all_that_is_not_video(clip: Path, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "out.mkv"
    result = restore(clip, target, model, "--json")
    assert result.exit_code == 0, result.stderr
    assert times_of(target) == times_of(clip) == [Fraction(time, 1000) for time in UNEVEN[:6]]
    assert packets_of(target) == packets_of(clip)
    made = Clip(target)
    assert (made.height, made.width) == (20, 28)
    report = json.loads(result.stdout)
    assert report["frames"] == 6 and report["cuts"] == [] and report["result"] == str(target)
    assert [chunk["frames"] for chunk in report["chunks"]] == [2, 2, 2]
    assert all(chunk["warping_error"] > 0 for chunk in report["chunks"])
    assert report["copied_packets"]["2"] == 1 and report["is_grey"] is False
    (note,) = error_lines(result)
    assert "4 frames left" in note
    assert {path.name for path in target.parent.iterdir()} == {"out.mkv"}

    again = restore(clip, target, model, "--resume")
    assert again.exit_code == 0 and "1 already there" in again.stdout
    other = restore(clip, target, model, "--resume", "--steady", "none")
    assert other.exit_code == 2 and "was made with steady bands (now none)" in other.stderr


def test_png_files_have_the_times_beside_them(clip: Path, model: Path, tmp_path: Path) -> None:
    result = restore(clip, tmp_path / "frames", model, "--frames", 3, "--from", "0.05")
    assert result.exit_code == 0, result.stderr
    names = sorted(path.name for path in (tmp_path / "frames").iterdir())
    assert names == ["00000001.png", "00000002.png", "00000003.png", "timestamps.txt"]
    lines = (tmp_path / "frames" / "timestamps.txt").read_text().splitlines()
    assert lines == ["# timestamp format v2", "0.000000", "45.000000", "80.000000"]
    with Image.open(tmp_path / "frames" / names[0]) as image:
        assert image.size == (28, 20)
    made = read_provenance(tmp_path / "frames" / names[0])
    assert made is not None and made["steady"] == "bands"
    full = restore(clip, tmp_path / "frames", model)
    assert full.exit_code == 2 and "is not empty; give a new folder" in full.stderr
    assert (
        "1 already there"
        in restore(clip, tmp_path / "frames", model, "--frames", 3, "--from", "0.05", "--resume").stdout
    )


def test_a_folder_of_frames_becomes_a_clip_or_frames(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, pixels in enumerate(moving(3, *SIZE, is_grey=True)):
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number}.png")
    assert "give --fps" in restore(tmp_path / "in", tmp_path / "out.mp4", model).stderr
    assert restore(tmp_path / "in", tmp_path / "out.mp4", model, "--fps", 24).exit_code == 0
    assert times_of(tmp_path / "out.mp4") == [Fraction(number, 24) for number in range(3)]
    assert restore(tmp_path / "in", tmp_path / "out", model, "--fps", 24).exit_code == 0
    pixels = np.asarray(Image.open(tmp_path / "out" / "00000002.png"))
    assert pixels.ndim == 2  # a grey clip gives grey files


def test_what_a_file_cannot_hold_is_said_before_the_start(clip: Path, model: Path, tmp_path: Path) -> None:
    refused = restore(clip, tmp_path / "out.mp4", model)
    assert refused.exit_code == 1 and refused.stdout == "0 restored, 1 failed\n"
    assert "cannot hold subtitle stream 2 (srt), attachment stream 3 (none)" in error_lines(refused)[0]
    assert "give -o NAME.mkv, or --leave-out" in refused.stderr
    assert list(tmp_path.iterdir()) == []
    taken = restore(clip, tmp_path / "out.mp4", model, "--leave-out", "--frames", 2)
    assert taken.exit_code == 0 and ".mp4 cannot hold and leaves out: subtitle" in taken.stderr
    assert len(times_of(tmp_path / "out.mp4")) == 2


def test_odd_sides_become_even_and_one_frame_is_a_clip(model: Path, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mkv", moving(1, 9, 13), codec="ffv1")
    result = stablesr("restore", source, "-o", tmp_path / "out.mp4", "--model", model, "--scale", 1)
    assert result.exit_code == 0, result.stderr
    assert "its result is of 12x8 pixels: sides are even in yuv420p" in result.stderr
    assert (Clip(tmp_path / "out.mp4").height, Clip(tmp_path / "out.mp4").width) == (8, 12)


def test_a_damaged_frame_and_sound_longer_than_the_picture_are_told_and_kept(model: Path, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4", moving(6, 32, 48), audio_seconds=1.0, options={"bf": "0"})
    content = source.read_bytes()
    with av.open(str(source)) as container:
        packet = [bytes(packet) for packet in container.demux(video=0) if packet.size][3]
    at = content.index(packet)
    source.write_bytes(content[: at + 6] + b"\xff" * (len(packet) - 6) + content[at + len(packet) :])
    for choice, times, done in (
        ("repeat", [0, 1, 2, 3, 4, 5], "the one before is repeated"),
        ("drop", [0, 1, 2, 4, 5], "it is left out"),
    ):
        target = tmp_path / f"{choice}.mp4"
        result = stablesr("restore", source, "-o", target, "--model", model, "--scale", 1, "--on-damage", choice)
        assert result.exit_code == 0, result.stderr
        assert "the frame at 0.120 s cannot be decoded" in error_lines(result)[0] and done in error_lines(result)[0]
        assert times_of(target) == [Fraction(time, 25) for time in times]
        assert packets_of(target)["audio"] == packets_of(source)["audio"]
    stopped = stablesr("restore", source, "-o", tmp_path / "out.mp4", "--model", model, "--on-damage", "stop")
    assert stopped.exit_code == 1 and "get a whole copy, or choose --on-damage repeat" in error_lines(stopped)[0]


def test_usage_that_means_nothing_is_refused(clip: Path, model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "photo.png"
    Image.fromarray(moving(1)[0]).save(picture)
    for arguments, said in (
        ([clip, picture, "-o", tmp_path / "out"], "is a clip; give one clip alone"),
        ([clip, "-o", tmp_path / "out.mkv", "--compare"], "--compare is for pictures"),
        ([clip, "-o", tmp_path / "out.mkv", "--chunk", 0], "--chunk 0 is too small; give 1 or more"),
        ([clip, "-o", tmp_path / "out.mkv", "--from", "later"], "--from 'later' is no time; give seconds"),
        ([clip, "-o", tmp_path / "out.mkv", "--from", "0:02", "--to", "1.5"], "--to 1.5 is not after --from 0:02"),
        ([clip, "-o", tmp_path / "out.mkv", "--flow", "raft"], "--flow raft is no file; give dis"),
        ([clip, "-o", clip], "is the input and would be overwritten"),
        ([clip, "-o", picture], "names a picture; give a name with .mp4"),
    ):
        result = stablesr("restore", "--model", model, *arguments)
        assert result.exit_code == 2 and said in error_lines(result)[0], result.stderr
    for arguments, said in (
        ([tmp_path / "none.mp4", "-o", tmp_path / "out.mkv"], "no such file or folder"),
        ([clip, "-o", tmp_path / "out.avi"], "no clip of this ending is written; give .mp4"),
        ([clip, "-o", tmp_path / "out.mkv", "--codec", "h266"], "no encoder is called 'h266'"),
        ([clip, "-o", tmp_path / "out.mkv", "--from", "9"], "no frame is left of the clip"),
    ):
        result = stablesr("restore", "--model", model, *arguments)
        assert result.exit_code == 1 and said in error_lines(result)[0], result.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"photo.png", ".stablesr"}


def test_another_process_is_locked_out(clip: Path, model: Path, tmp_path: Path) -> None:
    target, first = tmp_path / "out.mkv", FORKS.Event()
    segment = tmp_path / ".stablesr" / "out.mkv.job" / "000001.nut"
    going_on = FORKS.Event()
    arguments = ["restore", clip, "--model", model, "--scale", 2, "--chunk", 2, "-o", target]
    process = FORKS.Process(target=_run, args=([*map(str, arguments)], segment, None, (first, going_on)))
    process.start()
    assert first.wait(120)  # it is in the middle of the clip
    for options in ([], ["--resume"], ["--steady", "none"]):
        second = restore(clip, target, model, *options)
        assert second.exit_code == 1, second.stderr
        assert error_lines(second)[-1].endswith("another process is restoring this picture; wait for it or stop it")
    assert not target.exists()
    going_on.set()
    process.join(120)
    assert process.exitcode == 0 and len(times_of(target)) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"out.mkv"}


def test_two_processes_share_the_tiles_of_a_clip(clip: Path, model: Path, tmp_path: Path) -> None:
    arguments = ["restore", clip, "--model", model, "--scale", 2, "--chunk", 2, "--tile", 16, "--resume", "-o"]
    shared = stablesr_in_two_processes(*arguments, tmp_path / "shared.mkv", folder=tmp_path)
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout.splitlines()[-1] == f"1 restored: {tmp_path / 'shared.mkv'}"
    assert shared.stderr.count("plan: tiles of") == 1
    assert stablesr(*arguments, tmp_path / "alone.mkv").exit_code == 0
    assert (tmp_path / "shared.mkv").read_bytes() == (tmp_path / "alone.mkv").read_bytes()
    for folder in ("again", "refused"):
        (tmp_path / folder).mkdir()
    again = stablesr_in_two_processes(*arguments, tmp_path / "shared.mkv", folder=tmp_path / "again")
    assert (again.returncode, again.stdout) == (0, "0 restored, 1 already there\n"), again.stderr
    refused = stablesr_in_two_processes(*arguments, tmp_path / "out.mp4", folder=tmp_path / "refused")
    assert (refused.returncode, refused.stdout) == (1, "0 restored, 1 failed\n")
    assert refused.stderr.count("error: ") == 1 and "cannot hold subtitle stream 2" in refused.stderr


def test_a_full_disk_loses_nothing(clip: Path, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.mkv"
    with files_end_at(4000):
        full = restore(clip, target, model)
    assert full.exit_code == 1 and "cannot be written" in error_lines(full)[-1]
    assert not target.exists()
    assert restore(clip, target, model, "--resume").exit_code == 0
    assert len(times_of(target)) == 6


def test_a_kill_anywhere_and_resume_give_the_same_bytes(clip: Path, model: Path, tmp_path: Path) -> None:
    job = tmp_path / ".stablesr" / "killed.mkv.job"
    options = ["--model", model, "--scale", 2, "--chunk", 2, "--steady", "all", "--resume", "-o"]

    def exit_status(output: Path, last: Path | None = None) -> int | None:
        arguments = [str(one) for one in ("restore", clip, *options, output)]
        process = FORKS.Process(target=_run, args=(arguments, last))
        process.start()
        process.join()
        return process.exitcode

    whole, killed = tmp_path / "whole.mkv", tmp_path / "killed.mkv"
    assert exit_status(whole) == 0
    for last in (job / "000000.nut", job / "000001.state", job / "000002.nut", killed):
        assert exit_status(killed, last) == -signal.SIGKILL
        assert not killed.exists()
    assert len((job / "clip.jsonl").read_bytes().splitlines()) == 3
    with (job / "clip.jsonl").open("ab") as file:  # a line that was cut off while it was written
        file.write(b'{"frames": 2')
    assert exit_status(killed) == 0
    assert killed.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.mkv", "killed.mkv"}


def test_a_clip_whose_tiles_became_smaller_goes_on_with_them_after_a_kill(
    clip: Path, model: Path, tmp_path: Path
) -> None:
    def exit_status(output: Path, last: Path | None = None, lacks_at: int | None = None) -> int | None:
        arguments = [str(one) for one in ("restore", clip, "--model", model, "--scale", 2, "--chunk", 2, "--resume")]
        process = FORKS.Process(target=_run, args=([*arguments, "-o", str(output)], last, lacks_at))
        process.start()
        process.join()
        return process.exitcode

    plain, whole, killed = (tmp_path / f"{name}.mkv" for name in ("plain", "whole", "killed"))
    assert exit_status(plain) == 0
    assert exit_status(whole, lacks_at=4) == 0  # of two steps a chunk: the second of the second chunk
    segment = tmp_path / ".stablesr" / "killed.mkv.job" / "000001.nut"
    assert exit_status(killed, segment, lacks_at=4) == -signal.SIGKILL
    assert not segment.exists() and (segment.parent / "plan.json").exists()
    assert exit_status(killed) == 0
    assert killed.read_bytes() == whole.read_bytes() != plain.read_bytes()


def _run(
    arguments: list[str], last: Path | None, lacks_at: int | None = None, waits: tuple[Any, Any] | None = None
) -> None:
    """The command in a process of its own, killed when it is about to give a file the name `last`.

    lacks_at: the number, from 1, of a call of the UNet for which memory does not suffice. waits: instead of the kill,
    set the first event and wait for the second.
    """
    calls = itertools.count(1)

    def lacking(module: torch.nn.Module, _args: Any) -> None:
        if isinstance(module, UNet2DConditionModel) and next(calls) == lacks_at:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    register_module_forward_pre_hook(lacking)

    def kill(event: str, details: tuple[Any, ...]) -> None:
        if event == "os.rename" and details[1] == str(last):
            if waits is None:
                os.kill(os.getpid(), signal.SIGKILL)
            waits[0].set()
            waits[1].wait()

    torch.set_num_threads(1)
    sys.addaudithook(kill)
    sys.argv[1:] = arguments
    main()
