"""Which precision is chosen where it is left to the device."""

from pathlib import Path

import pytest
import torch

from stablesr_kit.models.execution import has_bf16
from stablesr_kit.training.run.config import PrecisionOptions

CPU = torch.device("cpu")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the system does not list what its processor can do")
def test_a_processor_has_bf16_where_the_system_lists_such_units() -> None:
    flags = {word for line in Path("/proc/cpuinfo").read_text().splitlines() for word in line.split()}
    assert has_bf16(CPU) == bool(flags & {"amx_tile", "avx512_bf16"})


def test_the_choice_of_a_program_counts_and_auto_is_that_of_the_device() -> None:
    assert PrecisionOptions().precision_on(CPU) == ("bf16" if has_bf16(CPU) else "no")
    for name, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        options = PrecisionOptions(mixed_precision=name)
        assert options.precision_on(CPU) == name
        with options.autocast(CPU):
            assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
