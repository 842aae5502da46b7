"""Lack of memory, as the different devices report it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch.OutOfMemoryError of accelerators, MemoryError or RuntimeError of the CPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
