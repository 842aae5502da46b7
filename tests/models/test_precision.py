"""Networks that half precision overflows are in float32 while they run, in whatever thread."""

import logging
from threading import Event, Thread

import pytest
import torch

from stablesr_kit.models.execution import in_float32
from tests.helpers.tiny import tiny_vae


def test_float16_becomes_float32_and_comes_back_to_the_bit_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    vae = tiny_vae().half()
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    with caplog.at_level(logging.WARNING), in_float32(vae):
        assert vae.dtype == torch.float32
        with in_float32(vae):
            assert vae.dtype == torch.float32
        assert vae.dtype == torch.float32
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    assert vae.dtype == torch.float16 and not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_stay(dtype: torch.dtype) -> None:
    vae = tiny_vae().to(dtype)
    with in_float32(vae, torch.nn.ModuleDict()):
        assert vae.dtype == dtype
    assert vae.dtype == dtype


def test_the_last_thread_to_leave_casts_back() -> None:
    vae = tiny_vae().half()
    entered, leave = Event(), Event()

    def other() -> None:
        with in_float32(vae):
            entered.set()
            leave.wait()

    thread = Thread(target=other)
    with in_float32(vae):
        thread.start()
        entered.wait()
    assert vae.dtype == torch.float32
    leave.set()
    thread.join()
    assert vae.dtype == torch.float16
