"""What scripts and bug reports read: an object for each file, a doctor without names, the licences, completion."""

import getpass
import json
import platform
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stablesr_kit.cli.doctor import anonymous
from stablesr_kit.imaging.metadata import read_provenance
from tests.helpers.cli_runs import stablesr


def test_restore_prints_an_object_for_each_file_and_nothing_else(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    arguments = ("restore", tmp_path / "in", "-o", tmp_path / "out", "--model", model, "--steps", 1, "--json")
    result = stablesr(*arguments)
    assert result.exit_code == 1
    told = {Path(one["source"]).name: one for one in map(json.loads, result.stdout.splitlines())}
    assert told["good.png"]["status"] == "restored"
    assert Path(told["good.png"]["result"]).is_file()
    assert told["good.png"]["seconds"] > 0
    assert (told["broken.png"]["status"], told["broken.png"]["result"]) == ("failed", None)
    assert f"error: {told['broken.png']['error']}" in result.stderr
    again = [json.loads(line)["status"] for line in stablesr(*arguments, "--resume").stdout.splitlines()]
    assert sorted(again) == ["already there", "failed"]


def test_faces_prints_an_object_with_each_face(tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(tmp_path / "photo.png")
    (tmp_path / "given.json").write_text('{"photo.png": [{"box": [8, 8, 56, 56]}]}')
    options = ("--given", tmp_path / "given.json", "--background", "none", "--upscale", 1, "--json")
    result = stablesr("faces", tmp_path / "photo.png", "-o", tmp_path / "out.png", *options)
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    told = json.loads(line)
    assert told["status"] == "done"
    (face,) = told["faces"]
    assert (face["box"], face["detector"], face["landmarks_from"]) == ([8, 8, 56, 56], "given", "template")


def test_a_report_for_others_names_no_file_user_or_machine() -> None:
    result = stablesr("doctor", "--report")
    assert result.stdout.startswith("```text\n")
    assert re.search(r"^torch +\d", result.stdout, re.MULTILINE)
    assert not re.search(r"(^|\s)/\w", result.stdout)
    assert not re.search(rf"\b{re.escape(platform.node())}\b", result.stdout)
    assert result.stdout.endswith("```\n")


@pytest.mark.parametrize(
    "line",
    ["disk 5 GiB free in /home/{user}/my pictures", r"python 3.12 at C:\Users\{user}\python.exe", "{user} on {node}"],
)
def test_what_could_name_somebody_is_left_out(line: str) -> None:
    user, node = getpass.getuser(), platform.node()
    told = anonymous(line.format(user=user, node=node))
    assert user not in told
    assert node not in told
    assert "/" not in told
    assert "\\" not in told


def test_licences_name_the_weights_that_no_business_may_use() -> None:
    result = stablesr("licences")
    assert result.exit_code == 0
    for name in ("StableSR", "CodeFormer", "HYPIR-SD2", "InvSR"):
        assert re.search(rf"^\| {name}.*\| no, non-commercial \|$", result.stdout, re.MULTILINE), name


def test_shells_can_complete_the_commands() -> None:
    assert "--install-completion" in stablesr("--help").stdout


def test_a_preset_sets_what_is_not_given_and_says_so(model: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((12, 16, 3), 90, np.uint8)).save(tmp_path / "in.png")
    arguments = ("restore", tmp_path / "in.png", "-o", tmp_path / "out.png", "--model", model, "--steps", 1)
    result = stablesr(*arguments, "--preset", "screenshot", "--color-fix", "none")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines()[0] == "note: preset screenshot: --w 1 --color-fix none"
    made = read_provenance(tmp_path / "out.png")
    assert made is not None
    assert (made["w"], made["color_fix"]) == (1.0, "none")
    assert stablesr(*arguments, "--preset", "drawing").exit_code == 2
