"""The small prior: an untrained UNet and adapter of the sizes of mini, and the scheduler they sample with."""

from diffusers import DDIMScheduler, UNet2DConditionModel

from stablesr_kit.models.time_aware_encoder import StableSRAdapter


def build_small_unet(block_out_channels: tuple[int, ...]) -> UNet2DConditionModel:
    """Untrained UNet of one residual block per level, with attention at the lowest one only."""
    levels = len(block_out_channels)
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=block_out_channels,
        layers_per_block=1,
        down_block_types=(*("DownBlock2D",) * (levels - 1), "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", *("UpBlock2D",) * (levels - 1)),
        norm_num_groups=16,
        cross_attention_dim=32,
        attention_head_dim=4,
        use_linear_projection=True,
    )


def build_small_adapter(unet: UNet2DConditionModel, block_out_channels: tuple[int, ...]) -> StableSRAdapter:
    """Untrained adapter for such a UNet, without attention; it leaves the UNet's output as it is at first."""
    return StableSRAdapter.from_unet(
        unet,
        block_out_channels=block_out_channels,
        down_block_types=("DownBlock2D",) * len(block_out_channels),
        layers_per_block=1,
        norm_num_groups=16,
        cond_channels=64,
        hidden_channels=64,
        modulation="sft",
        prompt_length=1,
    )


def build_small_scheduler(prediction_type: str = "v_prediction") -> DDIMScheduler:
    """Stable Diffusion's noise schedule, with the few steps spread evenly down from the last."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
    )
