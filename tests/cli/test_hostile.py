"""Files that mean harm or are broken cost one line each, in every command, and nothing else."""

from pathlib import Path

from benchmarks.hostile import judged


def test_hostile_files_cost_a_line_each_and_nothing_else(tmp_path: Path) -> None:
    report = judged(tmp_path, count=34, seed=1)
    assert report["is_good"], report
    for command in report["commands"].values():
        assert command["lines"] > 10
        assert command["results"] > 3
