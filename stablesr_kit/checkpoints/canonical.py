"""Bring a checkpoint to one form, however it was saved: sections with the official names."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import Tensor

from stablesr_kit.checkpoints.key_maps import IGNORED, PREFIXES, Section
from stablesr_kit.checkpoints.reading import RawCheckpoint
from stablesr_kit.errors import CheckpointError

logger = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "params_ema", "params", "params_d", "model_state_dict", "net_g_ema", "net_g")
"""Where training programs put the weights, in order of preference."""

PARTS = {"state_dict_unet": "unet.", "state_dict_vae": "vae."}
"""Where OSEDiff and PiSA-SR store the LoRAs of each network, and the prefix we give them."""

WRAPPED_MODULE = re.compile(r"^module\.|(?<![^.])_orig_mod\.")
"""What DistributedDataParallel and torch.compile add to names."""

NAMED = 12
"""How many names a message lists; a note on the error lists all."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The tensors of a file, section by section."""

    path: Path
    sections: Mapping[Section, dict[str, Tensor]]
    """Names as in the official checkpoints, without the prefix of their section. A section that is empty is absent."""
    notes: tuple[str, ...]
    """What was unwrapped or renamed to get here."""

    def full_names(self) -> dict[str, Tensor]:
        """Every tensor under its official name."""
        return {
            PREFIXES[section] + name: tensor for section, part in self.sections.items() for name, tensor in part.items()
        }


def canonicalize(raw: RawCheckpoint, *, use_ema: bool = False) -> Checkpoint:
    """The sections of a file.

    use_ema: take the moving averages (EMA) that some files hold beside the weights of the UNet and of SPADE.

    Raises `CheckpointError` if the file holds no tensor, or no averages though they are asked for.
    """
    notes = []
    content: Mapping[str, object] = raw.content
    if raw.placeholders:
        logger.info("left out: %s: not tensors, and nothing of them is run", _listed(list(raw.placeholders)))
    while (wrapper := _wrapper(content)) is not None:
        if beside := [str(key) for key in content if key != wrapper]:
            logger.info("left out: %s: beside the weights in %r", _listed(beside), wrapper)
        content = cast(Mapping[str, object], content[wrapper])
        notes.append(f"weights found under {wrapper!r}")
    parts = {prefix: part for key, prefix in PARTS.items() if isinstance(part := content.get(key), Mapping)}
    if parts:
        content = {f"{prefix}{name}": value for prefix, part in parts.items() for name, value in part.items()}
    tensors = {str(name): value.detach() for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{raw.path.name} holds no tensors by name; found {', '.join(map(str, content)) or 'nothing'}"
        )
    return section(raw.path, tensors, use_ema=use_ema, notes=tuple(notes))


def _wrapper(content: Mapping[str, object]) -> str | None:
    """The key of the weights: a known one, or that of the only mapping in a file without tensors beside it."""
    inner = [key for key, value in content.items() if isinstance(value, Mapping) and key not in PARTS]
    for key in WRAPPERS:
        if key in inner:
            return key
    is_alone = len(inner) == 1 and not any(isinstance(value, Tensor) for value in content.values())
    return inner[0] if is_alone and not any(key in PARTS for key in content) else None


def section(
    path: Path, tensors: Mapping[str, Tensor], *, use_ema: bool = False, notes: tuple[str, ...] = ()
) -> Checkpoint:
    """Tensors by name, sorted into sections."""
    tensors = {WRAPPED_MODULE.sub("", name): tensor for name, tensor in tensors.items()}
    is_noise_predictor = "encoder.time_embedding.linear_1.weight" in tensors
    if not is_noise_predictor and ("encoder.conv_in.weight" in tensors or "decoder.conv_in.weight" in tensors):
        tensors = {_full_vae_name(name): tensor for name, tensor in tensors.items()}
        notes = (*notes, "an autoencoder's names without prefix")
    if use_ema:
        tensors = _averages(path, tensors)
        notes = (*notes, "running averages taken")
    sections: dict[Section, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part = section_of(name)
        sections.setdefault(part, {})[name.removeprefix(PREFIXES[part])] = tensor
    return Checkpoint(path=path, sections=sections, notes=notes)


def section_of(name: str) -> Section:
    """The section a full official name belongs to."""
    if name.startswith(PREFIXES["unet"]):
        return "spade" if ".spade." in name else "unet"
    for part in ("encoder", "fusion", "vae", "text"):
        if name.startswith(PREFIXES[part]):
            return part
    return "other"


def left_over(names: Iterable[str], ignored: Iterable[str] = ()) -> list[str]:
    """The full names that may not be ignored; the others are logged, with the reason.

    ignored: regular expressions of names, beside `IGNORED`.
    """
    reasons = {**IGNORED, **dict.fromkeys(ignored, "ignored as asked")}
    unknown: list[str] = []
    known: dict[str, list[str]] = {}
    for name in names:
        reason = next((reason for pattern, reason in reasons.items() if re.fullmatch(pattern, name)), None)
        (unknown if reason is None else known.setdefault(reason, [])).append(name)
    for reason, passed_over in known.items():
        logger.info("left out: %s: %s", _listed(passed_over), reason)
    return unknown


def complain(problem: str, names: list[str]) -> None:
    """Raise a `CheckpointError` that lists the names, if there are any."""
    if not names:
        return
    error = CheckpointError(f"{problem}: {_listed(names)}")
    error.add_note("\n".join(names))
    raise error


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _full_vae_name(name: str) -> str:
    is_vae = name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    return PREFIXES["vae"] + name if is_vae else name


def _averages(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those of the UNet replaced by their moving averages (LDM stores these without dots)."""
    prefix = PREFIXES["unet"]
    averaged = {
        name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in tensors if name.startswith(prefix)
    }
    missing = [name for name, average in averaged.items() if average not in tensors]
    if missing or not averaged:
        raise CheckpointError(f"{path.name} holds no running averages of the UNet; leave use_ema out")
    used = set(averaged.values())
    return {name: tensors[averaged.get(name, name)] for name in tensors if name not in used}
