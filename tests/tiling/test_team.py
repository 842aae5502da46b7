"""Two processes at one picture: the result is to the bit that of one, and what one meets the other learns."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import Tensor

from stablesr_kit import Job, Tiling
from stablesr_kit.tiling.team import Team
from tests.helpers.forks import FORKS, free_port, of_two_processes
from tests.helpers.tiny import seeded, tiny_picture, tiny_pipeline

PICTURE = tiny_picture(30, 41)
CASES: dict[str, dict[str, Any]] = {
    "jitter": {"tile_px": 48, "overlap_px": 16, "jitter": True, "guidance_scale": 3.0},
    "memory": {"tile_px": 96, "overlap_px": 24},
    "whole": {"tile_px": "none"},
    "failure": {"tile_px": 64, "overlap_px": 16},
}


def run(**options: Any) -> Tensor:
    pipeline = tiny_pipeline(with_text=False)
    latents: Tensor = pipeline(PICTURE, output_type="latent", **arguments(**options)).images
    return latents


def arguments(guidance_scale: float = 1.0, **tiles: Any) -> dict[str, Any]:
    """Of a call that tiles so."""
    tiling = Tiling(vae_tile_px=512, **tiles)
    return {"generator": seeded(0), "w": 0.0, "guidance_scale": guidance_scale, "tiling": tiling}


def test_two_processes_give_the_bits_of_one_and_share_their_troubles(tmp_path: Path) -> None:
    port = free_port()
    members = [FORKS.Process(target=_member, args=(rank, port, tmp_path)) for rank in range(2)]
    for member in members:
        member.start()
    for member in members:
        member.join(300)
    assert [member.exitcode for member in members] == [0, 0]
    found = torch.load(tmp_path / "found.pt")
    assert torch.equal(found["jitter"], run(**CASES["jitter"]))
    # the second process lacks memory for tiles of 24 latents
    assert torch.equal(found["memory"], run(tile_px=48, overlap_px=24))
    assert torch.equal(found["whole"], run(tile_px="none"))
    assert found["failure"] == "another process failed at its tiles; see what it says"
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert all(min(share["jitter"], share["memory"]) > 0 for share in shares)
    assert shares[1]["whole"] == 0


def _member(rank: int, port: int, folder: Path) -> None:
    os.environ |= of_two_processes(rank, port)
    team = Team(PartialState(cpu=True))
    torch.set_num_threads(1)  # accelerate has chosen a number; sums depend on it
    pipeline = tiny_pipeline(with_text=False)
    tiles = 0

    def counted(_unet: Any, inputs: tuple[Tensor, ...]) -> None:
        nonlocal tiles
        tiles += 1
        if not team.is_lead and inputs[0].shape[-1] == 24:
            raise MemoryError
        if not team.is_lead and inputs[0].shape[-1] == 16:
            raise ValueError("a broken device")

    pipeline.unet.register_forward_pre_hook(counted)
    found: dict[str, Any] = {}
    shares: dict[str, int] = {}
    for name, options in CASES.items():
        tiles = 0
        if not team.is_lead:
            if name == "failure":
                with pytest.raises(ValueError, match="a broken device"):
                    pipeline.assist(team)
            else:
                pipeline.assist(team)
        elif name == "failure":
            with pytest.raises(RuntimeError) as error:
                pipeline(PICTURE, job=Job(team=team), **arguments(**options))
            found[name] = str(error.value)
            team.tell(None)
        else:
            found[name] = pipeline(PICTURE, job=Job(team=team), output_type="latent", **arguments(**options)).images
            team.tell(None)
        shares[name] = tiles
    torch.save(shares, folder / f"{rank}.pt")
    if team.is_lead:
        torch.save(found, folder / "found.pt")
    team.state.destroy_process_group()
