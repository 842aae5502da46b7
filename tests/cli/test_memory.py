"""`--max-memory`, the plan that is told and kept, and what --resume does with it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from stablesr_kit import StableSRPipeline
from stablesr_kit.cli.restore import dtype_that_fits
from stablesr_kit.pipelines.loading import parameter_count
from stablesr_kit.tiling.memory import Plan, Planner
from tests.helpers.cli_runs import error_lines, stablesr
from tests.helpers.tiny import tiny_picture


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = (tiny_picture(32, 32)[0].permute(1, 2, 0) * 255).byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "in.png")
    return tmp_path / "in.png"


def test_a_tiled_picture_tells_its_plan_and_a_small_one_says_nothing(model: Path, photo: Path, tmp_path: Path) -> None:
    call = ("restore", photo, "-o", tmp_path / "out.png", "--model", model, "--steps", 1, "--dtype", "float32")
    assert error_lines(stablesr(*call)) == []
    tiled = stablesr(*call, "--tile", 64, "--max-memory", "5MB")
    assert tiled.exit_code == 0
    (line,) = error_lines(tiled)
    assert line.startswith("plan: tiles of 16 x 16 latents, 1 at once, autoencoder tiles of 64 px, at most ")
    refused = stablesr(*call, "--max-memory", "1MB")
    (line,) = error_lines(refused)
    assert refused.exit_code == 1
    assert line.startswith(f"error: {photo}: 1.0 MiB of memory are too little, expected at least ")


def test_a_stopped_picture_goes_on_with_its_plan_whatever_is_free_and_refuses_another_limit_or_tile(
    model: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def restore(name: str, *arguments: object) -> Any:
        options = ("--model", model, "--tile", 64, "--dtype", "float32")
        return stablesr("restore", photo, "-o", tmp_path / name, *options, *arguments)

    whole = restore("whole.png")
    plan = error_lines(whole)
    assert "autoencoder tiles of 256 px" in plan[0]
    with monkeypatch.context() as broken:
        broken.setattr(StableSRPipeline, "encode", _stopped)
        assert restore("out.png").exit_code == 1
    saved = tmp_path / ".stablesr" / "out.png.job" / "plan.json"
    assert str(Plan.load(saved)).partition(", about")[0] == plan[0].partition(", about")[0]
    monkeypatch.setattr(Planner, "_usable_bytes", lambda planner, _: planner.weights + 2 * 10**6)
    assert "autoencoder tiles of 64 px" in error_lines(restore("less.png"))[0]

    (line,) = error_lines(restore("out.png", "--resume", "--max-memory", "1GB"))
    assert line.endswith(
        "begun with no --max-memory (now --max-memory 1GB); give the same, or start this picture again without --resume"
    )
    (line,) = error_lines(restore("out.png", "--resume", "--tile", 48))
    assert "out.png: was made with tile_px 64 (now 48); give the same settings" in line
    assert restore("out.png", "--resume").exit_code == 0
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_weights_that_do_not_fit_are_loaded_in_half_precision_with_a_note(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu, weights = torch.device("cpu"), 4 * parameter_count(model)
    networks = StableSRPipeline.from_pretrained(model).components.values()
    capsys.readouterr()
    assert parameter_count(model) == sum(
        one.numel() for part in networks if isinstance(part, torch.nn.Module) for one in part.state_dict().values()
    )
    assert dtype_that_fits(torch.float32, model, cpu, 2 * weights) == torch.float32
    assert dtype_that_fits(torch.float16, model, cpu, 1) == torch.float16
    assert capsys.readouterr().err == ""
    assert dtype_that_fits(torch.float32, model, cpu, weights) == torch.bfloat16
    note = capsys.readouterr().err
    assert note.startswith("note: ")
    assert "; restoring in bfloat16, as --dtype bfloat16 does" in note
    assert note.count("\n") == 1


def _stopped(*_arguments: object, **_options: object) -> None:
    raise MemoryError
