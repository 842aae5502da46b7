"""Real components at tiny sizes with fixed weights: what the tests run."""

import string
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from stablesr_kit import ControllableFeatureWrapping, SpacedDDPMScheduler, StableSRAdapter, StableSRPipeline
from stablesr_kit.models.codeformer import CodeFormer

TINY_FACE_PX = 64
PROMPT_LENGTH = 12
TEXT_CHANNELS = 16

# Like SD 1.x: 8 heads on every level, projections by convolution. Like SD 2.x: heads of one width, linear projections.
SD1 = {"attention_head_dim": 8}
SD2 = {"attention_head_dim": (2, 4), "use_linear_projection": True}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit_noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def tiny_unet(**config: Any) -> UNet2DConditionModel:
    """Two levels; the latent must have an even size, 4 x 4 or more."""
    defaults = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_CHANNELS,
        **SD2,
    }
    return _built(UNet2DConditionModel, **{**defaults, **config})


def tiny_vae(levels: int = 3, **config: Any) -> AutoencoderKL:
    """A factor of 2 ** (levels - 1); every level has a width of its own."""
    defaults = {
        "block_out_channels": (8, 16, 24, 32)[:levels],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "scaling_factor": 0.5,
    }
    return _built(AutoencoderKL, **{**defaults, **config})


def tiny_adapter(unet: UNet2DConditionModel, **config: Any) -> StableSRAdapter:
    """Without zero initialisation (modulation "spade"), it changes what the UNet predicts."""
    levels = len(unet.config.block_out_channels)
    defaults = {
        "block_out_channels": (16,) * levels,
        "down_block_types": ("AttnDownBlock2D",) + ("DownBlock2D",) * (levels - 1),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "num_attention_heads": 2,
        "cond_channels": 16,
        "hidden_channels": 8,
        "prompt_length": PROMPT_LENGTH,
    }
    with torch.random.fork_rng():
        torch.manual_seed(2)
        adapter = StableSRAdapter.from_unet(unet, **{**defaults, **config}).eval()
        if adapter.empty_prompt_embeds is not None:
            adapter.empty_prompt_embeds.normal_()
    return adapter


def tiny_cfw(vae: AutoencoderKL, **config: Any) -> ControllableFeatureWrapping:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return ControllableFeatureWrapping.from_vae(vae, **{"num_rrdb": 1, "growth_channels": 4, **config}).eval()


def tiny_tokenizer() -> CLIPTokenizer:
    """Spells every word: a token per letter or digit."""
    signs = list(string.ascii_lowercase + string.digits)
    tokens = [*signs, *(sign + "</w>" for sign in signs), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=PROMPT_LENGTH)


def tiny_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return _built(
        CLIPTextModel,
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_CHANNELS,
            intermediate_size=32,
            num_attention_heads=2,
            num_hidden_layers=2,
            max_position_embeddings=PROMPT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
    )


def tiny_components(with_text: bool = True) -> dict[str, Any]:
    """All components of a pipeline; the picture's sides are padded to multiples of 8, at least 16."""
    unet, vae, tokenizer = tiny_unet(), tiny_vae(), tiny_tokenizer()
    return {
        "vae": vae,
        "unet": unet,
        "adapter": tiny_adapter(unet),
        "scheduler": SpacedDDPMScheduler(),
        "cfw": tiny_cfw(vae),
        "text_encoder": tiny_text_encoder(tokenizer) if with_text else None,
        "tokenizer": tokenizer if with_text else None,
    }


def tiny_pipeline(with_text: bool = True, **replaced: Any) -> StableSRPipeline:
    """A quiet pipeline of two steps that returns tensors of what its random weights make of a picture."""
    pipeline = StableSRPipeline(**{**tiny_components(with_text), "default_steps": 2, **replaced})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_codeformer(**config: Any) -> CodeFormer:
    """For faces of TINY_FACE_PX; what its random weights restore is nobody."""
    defaults = {
        "image_size": TINY_FACE_PX,
        "base_channels": 8,
        "channel_multipliers": (1, 2, 2),
        "layers_per_block": 1,
        "codebook_size": 16,
        "code_channels": 8,
        "norm_num_groups": 4,
        "dim": 16,
        "num_heads": 2,
        "num_layers": 1,
        "fuse_sizes": (32,),
    }
    return _built(CodeFormer, **{**defaults, **config})


def tiny_picture(height: int = 4, width: int = 4, seed: int = 0) -> Tensor:
    """Random colours (1, 3, height, width) in [0, 1]."""
    return torch.rand((1, 3, height, width), generator=seeded(seed))


def _built(kind: Any, *args: Any, **config: Any) -> Any:
    """An eval-mode module whose weights depend on its class and config only."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module: nn.Module = kind(*args, **config)
    return module.eval()
