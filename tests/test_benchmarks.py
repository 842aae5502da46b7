"""What the benchmarks measure with, and the one that waits for a GPU, at tiny size on the CPU."""

import json
import math
import time
from pathlib import Path

import torch

from benchmarks.device import PARTS, SCALES, measured
from benchmarks.timing import compare

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
    assert found["weights_8"]["gib"] < found["weights_8"]["before_gib"] and 0 < found["weights_8"]["difference"] < 0.2
    assert found["compile"]["difference"] < 1e-5
    assert [one["peak_gib"] for one in found["memory"].values()] == [None, None]  # the CPU's allocator keeps no peak


def test_the_device_benchmark_says_what_there_was_no_time_for() -> None:
    found = measured(CPU, SCALES["tiny"], ("tiles",), budget_s=-1)
    assert "s of -1 were used" in found["left_out"]["tiles"]
    assert "tiles" not in found
