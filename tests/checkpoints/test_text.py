"""The text tower of open_clip against open_clip itself, where that is installed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stablesr_kit.checkpoints.assembling import AssemblyOptions
from stablesr_kit.checkpoints.canonical import section
from stablesr_kit.checkpoints.detecting import Hints, detect
from stablesr_kit.checkpoints.networks import build_text_encoder, clip_tokenizer, embed_empty_prompt

open_clip = pytest.importorskip("open_clip", reason="open_clip_torch, the independent implementation, is not here")


@pytest.fixture(scope="module")
def tower() -> Any:
    """A random text tower of three layers, without picture tower, as in the official checkpoints."""
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=32,
        vision_cfg={"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3},
    )
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    del model.visual
    return model.eval()


@pytest.fixture(scope="module")
def ours(tower: Any) -> Any:
    state = {f"cond_stage_model.model.{name}": tensor for name, tensor in tower.state_dict().items()}
    checkpoint = section(Path("official.ckpt"), state | {"cond_stage_model.model.attn_mask": tower.attn_mask})
    config = detect(checkpoint, Hints(text_heads=2)).text
    assert config is not None
    return build_text_encoder(checkpoint, config, AssemblyOptions())


def penultimate(tower: Any, tokens: Tensor) -> Tensor:
    """What Stable Diffusion 2 reads: all layers but the last, then the final norm."""
    x = tower.token_embedding(tokens) + tower.positional_embedding
    x = x if tower.transformer.batch_first else x.transpose(0, 1)
    for block in tower.transformer.resblocks[:-1]:
        x = block(x, attn_mask=tower.attn_mask)
    return tower.ln_final(x if tower.transformer.batch_first else x.transpose(0, 1))


def test_prompts_are_embedded_as_open_clip_embeds_them(tower: Any, ours: Any) -> None:
    tokens = open_clip.tokenize(["a photograph of an old house", "3d, cartoon, (worst quality:2)", "x " * 200])
    with torch.no_grad():
        expected, embeds = penultimate(tower, tokens), ours(tokens)[0]
    assert (embeds - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a photograph of an old house",
        "3d, cartoon, anime, sketches, (worst quality:2), (low quality:2)",
        "Café   naïve 100% 'don't' it's 😀 日本語",
        "x " * 200,
    ],
)
def test_prompts_become_the_tokens_of_open_clip(prompt: str) -> None:
    tokenizer = clip_tokenizer(pads_with_zero=True, length=77)
    tokens = tokenizer([prompt], padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(tokens, open_clip.tokenize([prompt]))


def test_the_stored_empty_prompt_is_that_of_open_clip(tower: Any, ours: Any) -> None:
    with torch.no_grad():
        expected = penultimate(tower, open_clip.tokenize([""]))
    assert (embed_empty_prompt(ours) - expected).abs().max() <= 2e-5 * expected.abs().max()
