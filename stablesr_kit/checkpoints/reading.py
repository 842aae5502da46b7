"""Read a weight file without running anything that is in it.

safetensors cannot hold code. A torch pickle can, so it is read by torch's own restricted interpreter
(`weights_only=True`), which calls nothing but the functions that rebuild tensors. Training frameworks leave other
objects beside the weights (a Lightning file names the class of every callback): those names are bound to inert
placeholders, which accept anything and do nothing. No name from a file is ever imported.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import safe_open

from stablesr_kit.errors import CheckpointError, UnsafeCheckpointError

FileFormat = Literal["safetensors", "torch", "torch before 1.6"]

NOT_WEIGHTS: Mapping[bytes, str] = {
    b"version https://git-lfs": "a Git LFS pointer, not the weights; fetch them with `git lfs pull`",
    b"<": "a web page, not the file it offers; use the download link itself",
    b"{": "a JSON file; expected .safetensors, .ckpt, .pth or .pt",
    b"GGUF": "a GGUF file; give the .safetensors or .ckpt it was made from",
    b"\x1f\x8b": "a gzip archive; unpack it and give the weight file inside",
    b"7z\xbc\xaf": "a 7z archive; unpack it and give the weight file inside",
    b"Rar!": "a RAR archive; unpack it and give the weight file inside",
    b"\x89HDF": "an HDF5 file; Keras and TensorFlow weights are not supported",
}
"""First bytes of files that are often mistaken for weights: what they are and what to do."""

BOOKKEEPING: Mapping[str, str] = {
    "pytorch_lightning.": "callbacks and hyper-parameters of Lightning 1",
    "lightning.": "callbacks and hyper-parameters of Lightning 2",
    "lightning_fabric.": "hyper-parameters of Lightning Fabric",
    "omegaconf.": "the configuration of the training run",
    "numpy.": "step counts and scores kept as numpy scalars",
    "pathlib.": "folders of the training run",
    "typing.": "types named by a configuration",
    "collections.defaultdict": "state of callbacks and optimisers",
    **{f"builtins.{name}": "a type named by a configuration" for name in ("bool dict float int list str".split())},
}
"""Prefixes of object names that training runs leave beside the weights. They always become placeholders."""

HOSTILE = tuple(
    f"{module}."
    for module in "os posix nt sys subprocess shutil socket runpy importlib ctypes pty code webbrowser".split()
)
"""Prefixes of object names that no checkpoint needs: a file with one is refused even with tensors_only."""

DICT_CLASSES = frozenset(
    {
        "builtins.dict",
        "collections.defaultdict",
        "lightning.pytorch.utilities.parsing.AttributeDict",
        "pytorch_lightning.utilities.parsing.AttributeDict",
    }
)
"""Objects whose placeholder is an empty dict, because the pickle fills it afterwards."""

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


@dataclass(frozen=True, kw_only=True)
class RawCheckpoint:
    """What a file holds, as it was saved."""

    path: Path
    format: FileFormat
    content: Mapping[str, object]
    """Tensors and plain values by name; may be nested."""
    placeholders: tuple[str, ...]
    """Names of objects that are not tensors; inert placeholders replace them."""


class _Placeholder:
    """Stands for an object of the file: accepts any arguments and any state, and does nothing with them."""

    def __new__(cls, *_args: object) -> "_Placeholder":
        return object.__new__(cls)

    def __init__(self, *_args: object) -> None: ...

    def __setstate__(self, _state: object) -> None: ...


class _DictPlaceholder:
    def __new__(cls, *_args: object) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


def read_checkpoint(path: str | Path, *, tensors_only: bool = False) -> RawCheckpoint:
    """The content of a weight file, on the CPU, mapped from the disk where its format allows.

    A pickle that names objects of unknown classes is refused, unless `tensors_only`: then every such object becomes
    an inert placeholder. Either way nothing from the file is run.

    Raises `UnsafeCheckpointError` for a pickle that needs more than tensors, and `CheckpointError` for anything else
    that is not a readable weight file.
    """
    path = Path(path)
    try:
        file_format = _file_format(path)
        if file_format == "safetensors":
            return RawCheckpoint(path=path, format=file_format, content=_read_safetensors(path), placeholders=())
        placeholders = _placeholders(path, tensors_only) if file_format == "torch" else {}
        with torch.serialization.safe_globals(list(placeholders.values())):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=file_format == "torch")
    except CheckpointError:
        raise
    except UnpicklingError as error:
        raise UnsafeCheckpointError(
            f"{path.name} needs more than tensors ({_first_sentence(error)}) and was not loaded; "
            "ask for a .safetensors file, or for one that holds the state dict alone"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle is a wrong program: there is no telling how it fails
        raise CheckpointError(
            f"{path.name} is damaged or cut short ({_first_sentence(error)}); download it again"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path.name} holds a {type(content).__name__}; expected tensors by name (a state dict)")
    return RawCheckpoint(path=path, format=file_format, content=content, placeholders=tuple(sorted(placeholders)))


def _file_format(path: Path) -> FileFormat:
    """The format, by content; the extension does not matter."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; expected a weight file (.safetensors, .ckpt, .pth, .pt)")
    with path.open("rb") as file:
        head = file.read(512)
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path.name} is empty; download it again")
    if head.startswith(_ZIP):
        return _zip_format(path)
    if head.startswith(_OLD_TORCH):
        return "torch before 1.6"
    if head.startswith(_PICKLE):
        raise UnsafeCheckpointError(
            f"{path.name} is a pickle that torch.save did not write; expected .safetensors or a torch state dict"
        )
    if len(head) > 8 and head[8:9] == b"{" and head[5:8] == b"\0\0\0":
        return "safetensors"
    for start, meaning in NOT_WEIGHTS.items():
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(start):
            raise CheckpointError(f"{path.name} is {meaning}")
    raise CheckpointError(f"{path.name} is not a weight file; expected .safetensors, .ckpt, .pth or .pt")


def _zip_format(path: Path) -> FileFormat:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path.name} is damaged or cut short ({error}); download it again") from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise UnsafeCheckpointError(f"{path.name} is a TorchScript program; expected weights alone (a state dict)")
    if not any(name.endswith("data.pkl") for name in names):
        inside = ", ".join(names[:4])
        raise CheckpointError(f"{path.name} is a zip archive of {inside}; unpack it and give the weight file inside")
    return "torch"


def _read_safetensors(path: Path) -> dict[str, object]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _placeholders(path: Path, tensors_only: bool) -> dict[str, type]:
    """For each object in the pickle that is not part of a tensor: a class that does nothing.

    The names are read without interpreting the pickle.
    """
    names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    hostile = [name for name in names if name.startswith(HOSTILE)]
    if hostile:
        raise UnsafeCheckpointError(f"{path.name} calls {', '.join(hostile)}: it carries code; do not use this file")
    unknown = [name for name in names if not name.startswith(tuple(BOOKKEEPING))]
    if unknown and not tensors_only:
        raise UnsafeCheckpointError(
            f"{path.name} needs more than tensors ({', '.join(unknown)}) and was not loaded; read its tensors alone "
            "with tensors_only=True (--tensors-only), which runs nothing, or ask for a .safetensors file"
        )
    return {name: _placeholder(name) for name in names}


def _placeholder(name: str) -> type:
    module, _, qualname = name.rpartition(".")
    base = _DictPlaceholder if name in DICT_CLASSES else _Placeholder
    return type(qualname, (base,), {"__module__": module, "__qualname__": qualname})


def _first_sentence(error: Exception) -> str:
    """The cause, without torch's advice on how to load the file unsafely."""
    text = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]
    return text.split(". ")[0] or type(error).__name__
