"""Refine the faces of a photograph in place: a post-stage of StableSRPipeline, or of any other enlargement."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stablesr_kit.errors import ConfigError, ImageError
from stablesr_kit.faces.detectors import SURE, MTCNNDetector, detect_turned
from stablesr_kit.faces.face import Box, Face, FaceDetector, LandmarkSource, Only, select_faces
from stablesr_kit.faces.geometry import Matrix, align, crop, to_enlarged
from stablesr_kit.faces.identity import FaceEmbedder, identity_distance
from stablesr_kit.faces.paste import FaceParser, MaskShape, is_grey, match_grey, parsed_mask, paste_face
from stablesr_kit.spaces import image_to_levels, image_to_pixels, levels_to_image

Action = Literal["refined", "held back", "left alone", "too large"]

# Colour of drawn boxes, in image units: green.
_BOX_COLOUR = (-1.0, 1.0, -1.0)


class FaceRestorer(Protocol):
    """A network that restores aligned faces, such as CodeFormerPipeline."""

    @property
    def image_size(self) -> int:
        """Side of the faces it takes, in pixels."""

    @property
    def max_w(self) -> float:
        """The highest fidelity: 1, or 0 if the network has no other."""

    @property
    def max_enlargement(self) -> float:
        """Faces of the result up to this many times `image_size` are improved by the network."""

    def restore(self, image: Tensor, w: float) -> Tensor:
        """Restored faces (B, 3, S, S) of image (B, 3, S, S), both in [-1, 1]; w: 0 quality to 1 fidelity."""


class FaceUpsampler(Protocol):
    """A network that enlarges restored faces, for results that need them larger than the restorer makes them."""

    def __call__(self, image: Tensor) -> Tensor:
        """Enlarged image (B, 3, k S, k S) of image (B, 3, S, S), both in [-1, 1]."""


@dataclass(frozen=True, kw_only=True)
class FaceReport:
    """What became of one face."""

    box: Box
    """In pixels of the photo before it was enlarged."""
    score: float
    """Confidence of the detector; 1 for a face given by hand."""
    eye_distance: float
    """In pixels of the photo before it was enlarged."""
    detector: str
    """Name of the detector; "given" for a face given by hand."""
    turned: int
    """Degrees, counterclockwise, that the photo was turned by when the face was found: 0, 90, 180 or 270."""
    landmarks_from: LandmarkSource
    """Where the landmarks come from, see `Face`."""
    w: float | None
    """Fidelity the face was restored with; None if it was left alone."""
    identity_distance: float
    """Distance of the restored face, in the last attempt, from the input face; 0 is the same."""
    action: Action
    """"refined"; "held back": refined with w = 1, since with the given w it became another person; "left alone": with
    w = 1 too; "too large": left alone, since it would be enlarged too much."""


class FaceRefinement:
    """A post-stage: `pipeline(photo, post_stages=[FaceRefinement(codeformer, w=0.7)])`.

    Finds the faces in the LQ photo, aligns and restores them in batches, and blends them into the enlarged photo.
    Pixels outside the masks do not change. `reports` describes the last call, photo by photo.

    Args:
        restorer: CodeFormerPipeline, or any network with its `image_size`, `max_w`, `max_enlargement`
            and `restore`.
        w: 0 quality to 1 fidelity.
        detector: None is MTCNN, which comes with the package.
        parser: keeps background, clothes and hats out of the mask; None uses the mask's shape alone.
        only: the largest face, or the one nearest the centre; None is all of them.
        min_eye_distance: faces with a smaller distance of the eyes, in pixels of the LQ photo, are left out.
        max_identity_distance: above it a restored face counts as another person; None disables the check. The default
            is for the structural distance: 99 % of faithful restorations of faces down to 16 pixels are below 0.26,
            99 % of pairs of different people above 0.31.
        embedder: measures the identity distance by face recognition instead of structure.
        upsampler: enlarges restored faces that the result needs larger than the restorer makes them.
        max_enlargement: faces that would be enlarged more are left alone, unless there is an upsampler or they are
            given by hand; None is the restorer's own limit.
        mask: "oval" leaves hair and background alone; "square" is the published mask.
        draw_boxes: outline the restored squares.
        batch_size: faces per forward; each takes half a gigabyte at 512 px in float32.
    """

    def __init__(
        self,
        restorer: FaceRestorer,
        w: float = 0.5,
        *,
        detector: FaceDetector | None = None,
        parser: FaceParser | None = None,
        only: Only | None = None,
        min_eye_distance: float = 5.0,
        max_identity_distance: float | None = 0.3,
        embedder: FaceEmbedder | None = None,
        upsampler: FaceUpsampler | None = None,
        max_enlargement: float | None = None,
        mask: MaskShape = "oval",
        draw_boxes: bool = False,
        batch_size: int = 4,
    ) -> None:
        if not 0 <= w <= restorer.max_w:
            raise ConfigError(
                f"w={w:g} is given for faces, expected a number from 0 (quality) to {restorer.max_w:g} "
                "(the most fidelity of this network)"
            )
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} is given, expected at least one face")
        self.restorer = restorer
        self.w = w
        self.detector = detector or MTCNNDetector()
        self.parser = parser
        self.only = only
        self.min_eye_distance = min_eye_distance
        self.max_identity_distance = max_identity_distance
        self.embedder = embedder
        self.upsampler = upsampler
        limit = restorer.max_enlargement if max_enlargement is None else max_enlargement
        self.max_enlargement = limit if upsampler is None else math.inf
        self.mask = mask
        self.draw_boxes = draw_boxes
        self.batch_size = batch_size
        self.reports: list[list[FaceReport]] = []

    @torch.no_grad()
    def __call__(
        self, images: Tensor, lq_images: Tensor, faces: Sequence[Sequence[Face] | None] | None = None
    ) -> Tensor:
        """The images with their faces refined; the shape, dtype and device of `images`.

        images: (B, 3, H, W) in [-1, 1]. lq_images: (B, 3, h, w) in [-1, 1], of which they are enlargements.
        faces: for each picture those given by hand, which are all restored; None detects and selects them.

        Raises:
            ImageError: the numbers of images and faces differ, or the landmarks of a face are degenerate.
        """
        faces = [None] * len(images) if faces is None else faces
        if not len(images) == len(lq_images) == len(faces):
            raise ImageError(
                f"{len(images)} images, {len(lq_images)} LQ images and faces of {len(faces)} are given; "
                "give as many of each"
            )
        refined = images.detach().float().cpu().clone()
        self.reports = []
        for i, (lq, given) in enumerate(zip(lq_images, faces, strict=True)):
            # Numpy sees the tensor's own memory, in rows of pixels.
            picture = refined[i].permute(1, 2, 0).numpy()
            self.reports.append([report for report, _ in self.refine(picture, lq, given)])
        return refined.to(images.device, images.dtype)

    def find(self, pixels: NDArray[np.uint8]) -> list[Face]:
        """The faces of pixels (H, W, 3), RGB, that would be restored.

        If none has a high score, as in a scan that lies on its side, quarter turns are tried too, and the turn with the
        highest score counts.
        """
        height, width = pixels.shape[:2]
        faces = self.detector.detect(pixels)
        if all(face.score < SURE for face in faces):
            turns = [detect_turned(self.detector, pixels, quarters) for quarters in (1, 2, 3)]
            faces = max([faces, *turns], key=lambda found: max((face.score for face in found), default=0.0))
        return select_faces(faces, height, width, min_eye_distance=self.min_eye_distance, only=self.only)

    @torch.no_grad()
    def refine(
        self, picture: NDArray[np.float32], lq: Tensor, given: Sequence[Face] | None = None
    ) -> Iterator[tuple[FaceReport, "RestoredFace"]]:
        """Pastes the faces of one photo into a picture (H, W, 3) in [-1, 1], in place, and yields each with its report.

        lq: the photo (3, h, w) in [-1, 1], of which the picture is an enlargement. given: as in a call.

        Raises:
            ImageError: the landmarks of a face are degenerate; the faces before it have been pasted.
        """
        pixels = image_to_pixels(lq[None])[0]
        levels = image_to_levels(lq[None])[0]
        faces = self.find(pixels) if given is None else given
        scale = (picture.shape[0] / levels.shape[0], picture.shape[1] / levels.shape[1])
        for face in self.restore_crops(levels, faces):
            enlargement = np.sqrt(scale[0] * scale[1] / np.linalg.det(face.matrix[:, :2]))
            is_too_large = given is None and bool(enlargement > self.max_enlargement)
            if is_too_large:
                face = face._replace(w=None)
            if face.w is not None:
                self._paste(picture, face, scale, is_enlarged=bool(enlargement > 1))
            yield self._report(face, given is not None, is_too_large), face

    def restore_crops(self, picture: NDArray[np.float32], faces: Sequence[Face]) -> Iterator["RestoredFace"]:
        """Each face of a picture (H, W, 3) in 8-bit levels, aligned and restored."""
        grey = is_grey(picture)
        for first in range(0, len(faces), self.batch_size):
            group = faces[first : first + self.batch_size]
            matrices = [align(face.landmarks, self.restorer.image_size) for face in group]
            aligned = np.stack([crop(picture, matrix, self.restorer.image_size) for matrix in matrices])
            restored, strengths, distances = self._restore_checked(aligned, grey)
            for parts in zip(group, matrices, aligned, restored, strengths, distances, strict=True):
                yield RestoredFace(*parts)

    def _restore_checked(
        self, aligned: NDArray[np.float32], grey: bool
    ) -> tuple[NDArray[np.float32], list[float | None], NDArray[np.float64]]:
        """Restored faces (N, S, S, 3), the w of each (None: another person), and their identity distances (N,)."""
        restored = self._restore(aligned, self.w, grey)
        distances = identity_distance(aligned, restored, self.embedder)
        strengths: list[float | None] = [self.w] * len(aligned)
        if self.max_identity_distance is None:
            return restored, strengths, distances
        drifted = np.flatnonzero(~(distances <= self.max_identity_distance))  # also where it is no number
        if len(drifted) and self.w < self.restorer.max_w:
            restored[drifted] = self._restore(aligned[drifted], self.restorer.max_w, grey)
            distances[drifted] = identity_distance(aligned[drifted], restored[drifted], self.embedder)
        for i in drifted:
            strengths[i] = self.restorer.max_w if distances[i] <= self.max_identity_distance else None
        return restored, strengths, distances

    def _restore(self, aligned: NDArray[np.float32], w: float, grey: bool) -> NDArray[np.float32]:
        restored = image_to_levels(self.restorer.restore(levels_to_image(aligned), w=w).float().clamp(-1, 1))
        return np.stack([match_grey(*pair) for pair in zip(restored, aligned, strict=True)]) if grey else restored

    def _paste(
        self, picture: NDArray[np.float32], face: "RestoredFace", scale: tuple[float, float], is_enlarged: bool
    ) -> None:
        values = levels_to_image(face.restored[None])[0].permute(1, 2, 0).numpy()
        if self.upsampler is not None and is_enlarged:
            image = torch.from_numpy(values).permute(2, 0, 1)[None]
            values = self.upsampler(image)[0].float().cpu().permute(1, 2, 0).contiguous().numpy()
        parsed = parsed_mask(self.parser.parse(face.restored[None])[0]) if self.parser is not None else None
        paste_face(
            picture,
            values,
            to_enlarged(face.matrix, scale, len(values) / len(face.restored)),
            scale=(scale[0] * scale[1]) ** 0.5,
            shape=self.mask,
            parsed=parsed,
            box_colour=_BOX_COLOUR if self.draw_boxes else None,
        )

    def _report(self, restored: "RestoredFace", is_given: bool, is_too_large: bool) -> FaceReport:
        face, w = restored.face, restored.w
        action: Action = "left alone" if w is None else "refined" if w == self.w else "held back"
        return FaceReport(
            box=face.box,
            score=face.score,
            eye_distance=face.eye_distance,
            detector="given" if is_given else self.detector.name,
            turned=face.turned,
            landmarks_from=face.landmarks_from,
            w=w,
            identity_distance=float(restored.identity_distance),
            action="too large" if is_too_large else action,
        )


class RestoredFace(NamedTuple):
    """One face on its way through the refinement; pictures (S, S, 3) in 8-bit levels."""

    face: Face
    matrix: Matrix
    """From the photo to the aligned face."""
    aligned: NDArray[np.float32]
    restored: NDArray[np.float32]
    w: float | None
    """None: not pasted, since it became another person or is too large."""
    identity_distance: float
