"""Shared by the commands that restore faces: the face network, and a line for each face."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from stablesr_kit.cli.jobs import Told
from stablesr_kit.cli.messages import loading, one_line, quieten_libraries, usage_error

if TYPE_CHECKING:
    import torch

    from stablesr_kit.pipelines.codeformer import CodeFormerPipeline, FaceTask
    from stablesr_kit.pipelines.face_refinement import FaceRefinement, FaceReport

# The face model in the package, and the folder of one that was converted together with a StableSR model.
EMBEDDED = "mini"
BESIDE = "faces"


def choose_face_model(model: str | None, beside: str | None = None) -> str:
    """The given model, or the one inside the StableSR model `beside`, or the one in the package."""
    if model is None and beside is not None and (Path(beside) / BESIDE).is_dir():
        return beside
    return model or EMBEDDED


def find_face_model(model: str) -> Path:
    """File or folder of a face model, which may be inside a StableSR model. Raises ModelNotFoundError."""
    from stablesr_kit.pipelines.loading import EMBEDDED_FACES, resolve_model

    if (Path(model) / BESIDE).is_dir():
        model = str(Path(model) / BESIDE)
    return Path(model) if Path(model).is_file() else resolve_model(model, embedded=EMBEDDED_FACES)


def load_face_model(model: str, device: "torch.device") -> "CodeFormerPipeline":
    """CodeFormer from an original checkpoint file, a pipeline folder, the package or the hub.

    Raises ModelNotFoundError, or CheckpointError if the model is damaged or of another kind.
    """
    quieten_libraries()

    from stablesr_kit.pipelines.codeformer import CodeFormerPipeline
    from stablesr_kit.pipelines.loading import only_variant

    with loading(model):
        path = find_face_model(model)
        if path.is_file():
            return CodeFormerPipeline.from_original(path).to(device)
        return CodeFormerPipeline.from_pretrained(path, use_safetensors=True, variant=only_variant(path)).to(device)


def told_of_faces(
    source: Path, stage: "FaceRefinement", reports: Sequence["FaceReport"], is_given: bool = False
) -> Told:
    """A line for each face of a photo, or one if it has none.

    is_given: the faces were given by hand.
    """
    name = one_line(source)
    lines = []
    if not reports:
        sought = f"with eyes more than {stage.min_eye_distance:g} pixels apart ({stage.detector.name})"
        lines.append(f"{name}: 0 faces {'given' if is_given else sought}; no face is restored")
    for number, report in enumerate(reports, 1):
        x1, y1, x2, y2 = (round(edge) for edge in report.box)
        action = f"{report.action}, left alone" if report.action == "too large" else report.action
        strength = "" if report.w is None else f" with w {report.w:g}"
        found = "given" if is_given else f"found by {report.detector}"
        found += f" with the photo turned by {report.turned} degrees" if report.turned else ""
        found += ", taken as upright" if report.landmarks_from == "template" else ""
        lines.append(
            f"{name}: face {number} of {len(reports)} at ({x1}, {y1}) to ({x2}, {y2}), {found}: "
            f"{action}{strength}, identity distance {report.identity_distance:.2f}"
        )
    return Told(lines, {"faces": [{**asdict(report), "box": list(report.box)} for report in reports]})


def told_of_aligned(
    source: Path, task: "FaceTask", w: float | None, given: Image.Image, restored: Image.Image, hole: Image.Image | None
) -> Told:
    """A line for a picture of one aligned face.

    given, restored: before and after, of the same proportions. hole: the mask, white where it was filled in; None is
    where `given` is pure white.
    """
    import numpy as np

    from stablesr_kit.faces.identity import identity_distance
    from stablesr_kit.pipelines.codeformer import TASK_DEFAULTS

    before = np.asarray(given, np.float32)
    (distance,) = identity_distance(before[None], np.asarray(restored.convert("RGB"), np.float32)[None])
    filled = float((before == 255).all(-1).mean() if hole is None else np.asarray(hole).mean() / 255)
    done = {"restore": "restored", "inpaint": f"{filled:.0%} filled in", "colorize": "coloured"}[task]
    used = TASK_DEFAULTS[task].w if w is None else w
    values: dict[str, Any] = {"task": task, "w": used}
    if task == "inpaint":  # another picture by intention
        return Told([f"{one_line(source)}: aligned face, {done} with w {used:g}"], {**values, "filled": filled})
    line = f"{one_line(source)}: aligned face, {done} with w {used:g}, identity distance {distance:.2f}"
    return Told([line], {**values, "identity_distance": float(distance)})


def check_face_w(w: float | None, option: str) -> None:
    """Refuse a fidelity outside 0 to 1."""
    if w is not None and not 0 <= w <= 1:
        usage_error(f"{option} {w} must be a number from 0 (quality) to 1 (fidelity); 0.5 is usual")
