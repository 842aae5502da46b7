"""CodeFormer at the published size beside an independent implementation of it."""

import pytest
import torch

from benchmarks.faces import both


def test_the_network_of_another_project_restores_the_same_face_at_full_size() -> None:
    pytest.importorskip("spandrel_extra_arches", reason="the other implementation is not installed")
    ours, theirs = both(seed=7)
    face = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(7)) * 2 - 1
    with torch.inference_mode():
        torch.testing.assert_close(ours(face, 0.5), theirs(face, 0.5), atol=2e-4, rtol=0)
