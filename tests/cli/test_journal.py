"""The journal: results known by content, torn lines left out, one process at a picture, every trouble in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stablesr_kit.cli.journal import Journal
from stablesr_kit.errors import JobError, OutputError
from stablesr_kit.storage import sha256

SETTINGS = {"w": 0.5, "steps": None, "model": "0f"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in.png").write_bytes(b"a picture")
    return tmp_path / "in.png"


@pytest.fixture
def results(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "out"
    folder.mkdir()
    paths = [folder / "in.png", folder / "in_compare.png"]
    for path in paths:
        path.write_bytes(b"the result " + path.name.encode())
    return paths


def test_finished_results_are_known_again_by_another_process(source: Path, results: list[Path]) -> None:
    folder = results[0].parent
    assert not Journal(folder, SETTINGS).is_finished(source, results)
    Journal(folder, SETTINGS).finish(source, results)
    assert Journal(folder, SETTINGS).is_finished(source, results)
    assert not Journal(folder, SETTINGS).is_finished(source, results[:1])


def test_a_changed_or_missing_result_or_source_is_unfinished(source: Path, results: list[Path]) -> None:
    journal = Journal(results[0].parent, SETTINGS)
    journal.finish(source, results)
    for path in (source, *results):
        content = path.read_bytes()
        path.write_bytes(content.swapcase())
        assert not Journal(results[0].parent, SETTINGS).is_finished(source, results)
        path.unlink()
        assert not Journal(results[0].parent, SETTINGS).is_finished(source, results)
        path.write_bytes(content)
    assert Journal(results[0].parent, SETTINGS).is_finished(source, results)


def test_other_settings_are_refused_by_name(source: Path, results: list[Path]) -> None:
    Journal(results[0].parent, SETTINGS).finish(source, results)
    with pytest.raises(
        JobError, match=r"in\.png: was made with w 0\.5 \(now 1\.0\), seed None \(now 3\); give the same"
    ):
        Journal(results[0].parent, {**SETTINGS, "w": 1.0, "seed": 3}).is_finished(source, results)


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_that_was_cut_off_costs_its_result_and_no_other(cut: int, source: Path, results: list[Path]) -> None:
    folder = results[0].parent
    journal = Journal(folder, SETTINGS)
    journal.finish(source, results[:1])
    journal.finish(source, results)
    journal.path.write_bytes(journal.path.read_bytes()[:-cut])
    again = Journal(folder, SETTINGS)
    assert again.is_finished(source, results[:1])
    assert again.is_finished(source, results) == (cut == 1)
    again.finish(source, results)
    assert Journal(folder, SETTINGS).is_finished(source, results)
    whole = [line for line in journal.path.read_text().splitlines() if line.endswith("}}")]
    assert all(json.loads(line) for line in whole)
    assert len(whole) == 2 + (cut == 1)


def test_one_process_at_a_time_is_at_a_picture(results: list[Path]) -> None:
    journal = Journal(results[0].parent, SETTINGS)
    program = (
        "import sys; from pathlib import Path; from stablesr_kit.cli.journal import Journal\n"
        "folder = Path(sys.argv[1])\n"
        "with Journal(folder, {}).in_progress(folder / 'in.png', folder / 'in.png'): print('mine', flush=True); input()"
    )
    command = [sys.executable, "-c", program, results[0].parent]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(JobError, match=r"in\.png: another process is restoring this picture; wait for it"):
            with journal.in_progress(results[1], results[0]):
                pass
        with journal.in_progress(results[1], results[1]):
            pass
        other.kill()
    with journal.in_progress(results[1], results[0]):
        pass
    assert list(journal.jobs_folder.iterdir()) == []


def test_locks_of_processes_that_are_gone_are_removed(source: Path, results: list[Path]) -> None:
    journal = Journal(results[0].parent, SETTINGS)
    with journal.in_progress(source, results[0]):
        stale = journal.jobs_folder / "gone.png.lock"
        stale.touch()
        Journal(results[0].parent, SETTINGS).remove_stale_locks()
        assert not stale.exists()
        assert (journal.jobs_folder / "in.png.lock").exists()


def test_what_a_killed_process_half_wrote_is_removed_and_its_state_kept(source: Path, results: list[Path]) -> None:
    journal = Journal(results[0].parent, SETTINGS)
    with pytest.raises(OutputError), journal.in_progress(source, results[0]) as state:
        (state / "latents").write_bytes(b"1")
        (state / ".0123.part").write_bytes(b"1")
        raise OutputError("disk full")
    with journal.in_progress(source, results[0], resume=True) as again:
        assert {path.name for path in again.iterdir()} == {"job.json", "latents"}


def test_the_state_is_kept_on_failure_and_deleted_on_success(source: Path, results: list[Path]) -> None:
    journal = Journal(results[0].parent, SETTINGS)
    with pytest.raises(OutputError), journal.in_progress(source, results[0]) as state:
        (state / "latents").write_bytes(b"1")
        raise OutputError("disk full")
    with pytest.raises(OutputError), journal.in_progress(source, results[0], resume=True) as again:
        assert (again / "latents").read_bytes() == b"1"
        raise OutputError("disk full")
    with journal.in_progress(source, results[0]) as fresh:
        assert not (fresh / "latents").exists()
    assert not state.exists()


def test_a_state_of_another_picture_or_other_settings_is_refused_and_kept(source: Path, results: list[Path]) -> None:
    folder = results[0].parent
    with pytest.raises(OutputError), Journal(folder, SETTINGS).in_progress(source, results[0]) as state:
        raise OutputError("disk full")
    with pytest.raises(JobError, match=r"in\.png: was made with w 0\.5 \(now 1\.0\); give the same settings"):
        with Journal(folder, {**SETTINGS, "w": 1.0}).in_progress(source, results[0], resume=True):
            pass
    source.write_bytes(b"another")
    with pytest.raises(JobError, match=r"in\.png: was made with picture [0-9a-f]+ \(now [0-9a-f]+\)"):
        with Journal(folder, SETTINGS).in_progress(source, results[0], resume=True):
            pass
    (state / "job.json").write_text("{")
    with pytest.raises(JobError, match=r"job\.json: cannot be read .*; start again without --resume"):
        with Journal(folder, SETTINGS).in_progress(source, results[0], resume=True):
            pass


def test_what_is_not_needed_goes_when_all_is_done_and_the_work_of_others_stays(
    source: Path, results: list[Path]
) -> None:
    journal = Journal(results[0].parent, SETTINGS)
    journal.finish(source, results)
    with journal.in_progress(source, results[0]):
        journal.close()
        assert journal.path.exists()
    journal.close()
    assert not journal.jobs_folder.exists()
    journal.close()


def test_results_in_sub_folders_and_with_long_names_have_states_of_their_own(source: Path, results: list[Path]) -> None:
    folder = results[0].parent
    (folder / "deep").mkdir()
    places = [folder / "in.png", folder / "deep" / "in.png", folder / ("n" * 251 + ".png")]
    journal = Journal(folder, SETTINGS)
    with journal.in_progress(source, places[0]) as one, journal.in_progress(source, places[1]) as two:
        with journal.in_progress(source, places[2]) as three:
            assert len({one, two, three}) == 3
            assert all(state.parent == journal.jobs_folder and len(state.name) < 255 for state in (one, two, three))


def test_a_folder_is_known_by_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "model" / "unet" / "weights").write_bytes(b"1")
    first = sha256(tmp_path / "model")
    assert sha256(tmp_path / "model") == first
    (tmp_path / "model" / "unet" / "weights").write_bytes(b"2")
    second = sha256(tmp_path / "model")
    (tmp_path / "model" / "unet").rename(tmp_path / "model" / "vae")
    assert len({first, second, sha256(tmp_path / "model")}) == 3


def test_what_cannot_be_read_or_written_is_one_line(source: Path, results: list[Path]) -> None:
    folder = results[0].parent
    (folder / ".stablesr").touch()
    with pytest.raises(OutputError, match=r"journal\.jsonl: cannot be written \(File exists\); the result is complete"):
        Journal(folder, SETTINGS).finish(source, results)
    with pytest.raises(OutputError, match=r"in\.png\.lock: cannot be written"):
        with Journal(folder, SETTINGS).in_progress(results[1], results[0]):
            pass
    (folder / ".stablesr").unlink()
    (folder / ".stablesr" / "journal.jsonl").mkdir(parents=True)
    with pytest.raises(JobError, match=r"journal\.jsonl: the journal cannot be read \(Is a directory\)"):
        Journal(folder, SETTINGS)
    (folder / ".stablesr" / "journal.jsonl").rmdir()
    (folder / ".stablesr" / "journal.jsonl").write_bytes(os.urandom(100) + b"\n[1, 2]\n{}\n")
    Journal(folder, SETTINGS).finish(source, results)
    assert Journal(folder, SETTINGS).is_finished(source, results)
