"""Which devices compute in bfloat16 by themselves."""

import torch


def has_bf16(device: torch.device) -> bool:
    """Whether the device has units for bfloat16.

    Others compute it through float32, several times slower than float32 itself.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":  # torch has no public name for either
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return False
