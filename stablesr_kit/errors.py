"""What a user of the toolkit may catch. Every message says what was given, what was expected, what to do."""


class StableSRKitError(Exception):
    """Base of every error the toolkit raises about what it was given."""


class ImageError(StableSRKitError, ValueError):
    """A picture that cannot be read or restored: not an image, truncated, empty, too large, not finite."""


class CheckpointError(StableSRKitError, ValueError):
    """A checkpoint that cannot be used: another family, missing or unexpected keys, wrong shapes."""


class UnsafeCheckpointError(CheckpointError):
    """A pickle that would run code when loaded."""


class ModelNotFoundError(StableSRKitError, LookupError):
    """A model name that is neither embedded, nor a folder, nor a repository that can be fetched."""


class OutputError(StableSRKitError, OSError):
    """A result that cannot be written: folder missing or read-only, disk full."""


class ConfigError(StableSRKitError, ValueError):
    """A setting that means nothing here: an unknown name, a value out of its range."""


class JobError(StableSRKitError, RuntimeError):
    """A job that cannot be continued: of another picture or other settings, in other hands, or unreadable."""


class DivergenceError(StableSRKitError, ArithmeticError):
    """A training whose loss is no longer a finite number."""


def reason_of(error: BaseException) -> str:
    """What an error says, on one line: the system's words, or its first line, or at least the name of its type."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# torch's allocators, the C++ library, and oneDNN, whose convolutions on the CPU say no more than that
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "bad_alloc",
    "could not create a primitive",
    "could not execute a primitive",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch.OutOfMemoryError of accelerators, MemoryError or RuntimeError of the CPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(report in text for report in _OUT_OF_MEMORY)
