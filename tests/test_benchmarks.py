"""What the benchmarks measure with, and the one that waits for a GPU, at tiny size on the CPU."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import quality
from benchmarks.device import PARTS, SCALES, measured
from benchmarks.timing import compare
from tests.helpers.evaluation_data import NIQE_STATISTICS, WEIGHTS, has_eval_open, has_weights

CPU = torch.device("cpu")


def test_a_comparison_knows_what_computes_and_what_waits() -> None:
    def computing() -> None:
        until = time.process_time() + 0.02
        while time.process_time() < until:
            pass

    ratios = compare(lambda: time.sleep(0.05), computing, repeats=1)
    assert ratios["stablesr_s"] >= 0.05
    assert ratios["cpu_ratio"] < 0.5


def test_the_device_benchmark_measures_every_part_and_keeps_what_it_has(tmp_path: Path) -> None:
    found = measured(CPU, SCALES["tiny"], budget_s=math.inf, out=tmp_path / "found.json")
    assert not found["left_out"]
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(found))
    assert set(found) == {*PARTS, "device", "torch", "took_s", "left_out"}
    assert max(found["parity"]["fp32"].values()) == 0 < found["parity"]["bf16"]["decoded"] < 0.1
    assert found["times"]["bf16"]["step"]["ratio"] > 1 < found["times"]["fp32"]["decode"]["ratio"]
    assert list(found["tiles"]) == ["1", "2", "4", "8", "16"]
    assert list(found["calls"]) == ["1", "2"] and found["one_step"]["call_s"] > 0
    for reduced in found["weights_8"].values():
        if "left_out" not in reduced:  # torchao may not be installed
            assert reduced["gib"] < reduced["before_gib"] and 0 < reduced["difference"] < 0.2
    assert "gib" in found["weights_8"]["float8"]
    assert found["compile"]["difference"] < 1e-5
    assert [one["peak_gib"] for one in found["memory"].values()] == [None, None]  # the CPU's allocator keeps no peak


def test_the_device_benchmark_says_what_there_was_no_time_for() -> None:
    found = measured(CPU, SCALES["tiny"], ("tiles",), budget_s=-1)
    assert "s of -1 were used" in found["left_out"]["tiles"]
    assert "tiles" not in found


@has_eval_open
@has_weights
def test_the_table_of_steps_is_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, side in (("Two_HR", 160), ("Two_LRx4", 40)):
        (tmp_path / name).mkdir()
        for i, value in enumerate((60, 180)):
            ramp = np.linspace(value - 50, value + 50, side, dtype=np.uint8)
            Image.fromarray(np.broadcast_to(ramp, (side, side))).save(tmp_path / name / f"{i}.png")
    (tmp_path / NIQE_STATISTICS.name).symlink_to(NIQE_STATISTICS)
    options = ["--w", "0.5", "--steps", "1", "2", "--crop", "32", "--weights", str(WEIGHTS.folders[0]), "--json"]
    monkeypatch.setattr("sys.argv", ["quality", "--data", str(tmp_path), *options])
    quality.main()
    results = json.loads(capsys.readouterr().out)["results"]
    one, two = (results["all"][f"w=0.5 steps={steps}"] for steps in (1, 2))
    assert {"grid", "psnr", "lpips", "dists", "seconds", "cpu_seconds"} <= set(one)
    assert one["psnr"] != two["psnr"] and results["Two"]["bicubic"]["lpips"] == results["all"]["bicubic"]["lpips"]
