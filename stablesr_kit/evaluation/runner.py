"""Runs methods over pictures and measures what they make; whatever was done stays done.

Results are PNG files, records one line of JSON each in a journal beside them, written by any number of processes. A
result is reused where its method, its settings, its input and the file itself are as they were; a metric, where the
result is. What differs, is new or failed, is done again.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from stablesr_kit.errors import ImageError, OutputError, StableSRKitError, reason_of
from stablesr_kit.evaluation.methods import TRUTH, Given, Method, Restore, Settings, version_of
from stablesr_kit.evaluation.metrics import METRICS, Measure, MeasureSet, MetricSettings, Sample
from stablesr_kit.evaluation.protocols import Pair, PictureSet, Protocol
from stablesr_kit.evaluation.resampling import Pixels, reduce_blurred, resize_bicubic_matlab
from stablesr_kit.imaging.degradations import find_preset, make_pair
from stablesr_kit.imaging.reading import read_picture
from stablesr_kit.spaces import image_to_pixels, pixels_to_image
from stablesr_kit.storage import replacing_file, sha256
from stablesr_kit.version import __version__

METRIC_PACKAGES = ("torch", "scikit-image", "lpips", "piq", "torch-fidelity", "rapidocr-onnxruntime", "pyiqa")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the input of a task comes from: as given, or made of the truth."""

    preset: str | None = None
    """The truth degraded by this preset, and reduced by the protocol's scale."""
    blur_sigma: float | None = None
    """The truth blurred by a Gaussian of this deviation in px, and reduced by MATLAB's bicubic."""

    def describe(self) -> str:
        """A word for file names and keys; empty for the input as given."""
        return self.preset or ("" if self.blur_sigma is None else f"blur{self.blur_sigma:g}")


AS_GIVEN = Source()


class Task(NamedTuple):
    """One picture for one method with settings."""

    set: str
    pair: Pair
    method: Method
    settings: Settings
    source: Source

    @property
    def label(self) -> str:
        """The method with what was changed for this task."""
        changed = [
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in self.settings.items()
        ]
        return "@".join(filter(None, (self.method.name, ",".join(changed), self.source.describe())))


@dataclass
class Record:
    """What became of a task."""

    key: str
    set: str
    picture: str
    label: str
    metrics: dict[str, float | None] = field(default_factory=dict)
    """None where a metric has no finite value for this picture."""
    sha256: str = ""
    """Of the result."""
    measured_by: str = ""
    """`Loaded.identity` of the metrics."""
    seconds: float = 0.0
    error: str = ""
    of_picture: bool = False
    """Whether the error is the picture's: no method could restore it."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The metrics that can be computed here, and why the others cannot."""

    measures: Mapping[str, Measure]
    set_measures: Mapping[str, MeasureSet]
    absent: Mapping[str, str]
    identity: str
    """What their values depend on beside pictures: hashes of weights, versions of packages."""


def load_metrics(names: Iterable[str], settings: MetricSettings) -> Loaded:
    """Every metric that has its packages and weights; the others by name, with the reason in a line."""
    measures: dict[str, Measure] = {}
    set_measures: dict[str, MeasureSet] = {}
    absent: dict[str, str] = {}
    for name in names:
        metric = METRICS[name]
        try:
            if metric.load is not None:
                measures[name] = metric.load(settings)
            elif metric.load_set is not None:
                set_measures[name] = metric.load_set(settings)
        except ImportError as error:
            absent[name] = f"needs the package {error.name}; {metric.install}"
        except StableSRKitError as error:
            absent[name] = " ".join(str(error).split())
    identity = [*(version_of(name) for name in METRIC_PACKAGES), *settings.weights.hashes(), __version__]
    return Loaded(
        measures=measures,
        set_measures=set_measures,
        absent=absent,
        identity=hashlib.sha256("\n".join(identity).encode()).hexdigest(),
    )


class Evaluation:
    """Results and records of one output folder.

    crop_px: only the middle of each truth, so many px per side, and what it was made of; None: the protocol's pictures.
    tell: called with a line for each picture that fails.
    Raises OutputError where the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        protocol: Protocol,
        metrics: Loaded,
        *,
        crop_px: int | None = None,
        tell: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self.protocol = protocol
        self.metrics = metrics
        self.crop_px = crop_px
        self.tell = tell
        self.journal = folder / ".stablesr" / "evaluation.jsonl"
        try:
            self.journal.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made ({error.strerror}); choose another place") from error
        self.records = {(one.set, one.picture, one.label): one for one in self._read()}
        self._told: set[str] = set()
        self._hashes: dict[Path, str] = {}

    def reload(self) -> None:
        """Take in what other processes recorded."""
        self.records = {(one.set, one.picture, one.label): one for one in self._read()}

    def tasks(
        self,
        sets: Sequence[PictureSet],
        methods: Iterable[Method],
        settings: Settings | None = None,
        source: Source = AS_GIVEN,
    ) -> list[Task]:
        """One task per method and picture, method after method.

        settings: changed from those of the method; of them, each method takes those it knows. Pictures without a truth
        are left out where the input is made of it, or the truths themselves are measured.
        """
        return [
            Task(one.name, pair, method, {k: v for k, v in (settings or {}).items() if k in method.takes}, source)
            for method in methods
            for one in sets
            for pair in one.pairs
            if pair.hq is not None or (source == AS_GIVEN and method.name != TRUTH)
        ]

    def run(self, tasks: Iterable[Task]) -> Iterator[Record]:
        """Do every task, or find it done; a method is loaded when its first picture needs it, and then let go."""
        loaded: Restore | None = None
        current: Method | None = None
        for task in tasks:
            if task.method is not current:
                loaded, current = None, task.method
            record = self._key_of(task)
            done = self.records.get((record.set, record.picture, record.label))
            if done is not None and done.key == record.key and not done.error and self._is_there(task, done):
                record = done
                if done.measured_by != self.metrics.identity:
                    record.metrics = {}
                if done.metrics.keys() >= set(self._wanted(task)):
                    yield done
                    continue
            try:
                lq, truth = self.read_pair(task)
            except StableSRKitError as error:
                record.error, record.of_picture = reason_of(error), True
            else:
                try:
                    if not record.sha256:
                        if loaded is None:
                            loaded = _loaded(task.method)
                        self._restore(task, loaded, record, lq, truth)
                    self._measure(task, record, lq, truth)
                except OutputError:
                    raise
                # Networks of other projects meet pictures they cannot take with any of these.
                except (StableSRKitError, ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError) as error:
                    record.error = reason_of(error)
            self._finish(record)
            yield record

    @property
    def protocol_metrics(self) -> list[str]:
        """Names of all metrics that are measured here, in their order."""
        return [name for name in METRICS if name in self.metrics.measures or name in self.metrics.set_measures]

    def record_of(self, task: Task) -> Record | None:
        """What became of a task, if it was done as it is now."""
        record = self.records.get((task.set, task.pair.name, task.label))
        return record if record is not None and record.key == self._key_of(task).key else None

    def result_path(self, set_name: str, label: str, picture: str) -> Path:
        """Where a result is."""
        return self.folder / "pictures" / set_name / label / f"{picture}.png"

    def read_pair(self, task: Task) -> tuple[Pixels, Pixels | None]:
        """Input and truth of a task, of sizes that fit together. Raises ImageError."""
        scale = self.protocol.scale
        truth = None if task.pair.hq is None else np.asarray(read_picture(task.pair.hq).rgb)
        if task.source != AS_GIVEN:
            assert truth is not None  # tasks without truth are not made
            truth = _cropped(
                truth[: truth.shape[0] // scale * scale, : truth.shape[1] // scale * scale], self.crop_px, scale
            )
            return self._made_of(truth, task), truth
        lq = np.asarray(read_picture(task.pair.lq).rgb)
        height, width = lq.shape[0] * scale, lq.shape[1] * scale
        if truth is not None:
            excess = truth.shape[0] - height, truth.shape[1] - width
            if not all(0 <= one < scale for one in excess):
                raise ImageError(
                    f"{task.pair.hq}: {truth.shape[0]}x{truth.shape[1]} px (height x width) is not {scale} times its "
                    f"input {task.pair.lq.name} of {lq.shape[0]}x{lq.shape[1]}; expected {height}x{width}"
                )
            truth = _cropped(truth[:height, :width], self.crop_px, scale)
        if self.crop_px is not None:
            lq = _cropped(lq, max(self.crop_px // scale, 1), 1)
        return lq, truth

    def _made_of(self, truth: Pixels, task: Task) -> Pixels:
        scale = self.protocol.scale
        if task.source.blur_sigma is not None:
            return reduce_blurred(truth, scale, task.source.blur_sigma)
        assert task.source.preset is not None
        # What is drawn depends on the picture's name alone.
        drawn = int.from_bytes(hashlib.sha256(f"{self.protocol.seed} {task.pair.name}".encode()).digest()[:4])
        lq, _ = make_pair(pixels_to_image(truth), find_preset(task.source.preset), torch.Generator().manual_seed(drawn))
        small = truth.shape[0] // scale, truth.shape[1] // scale
        return resize_bicubic_matlab(image_to_pixels(lq)[0], *small)

    def _restore(self, task: Task, restore: Restore, record: Record, lq: Pixels, truth: Pixels | None) -> None:
        height, width = lq.shape[0] * self.protocol.scale, lq.shape[1] * self.protocol.scale
        start = perf_counter()
        result = restore(
            Given(lq, height, width, task.pair, task.set, truth), {**task.method.settings, **task.settings}
        )
        record.seconds = perf_counter() - start
        if result.shape != (height, width, 3):
            raise ImageError(
                f"the result has {result.shape[0]}x{result.shape[1]} px (height x width), expected {height}x{width}"
            )
        path = self.result_path(task.set, task.label, task.pair.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{path.parent}: cannot be made ({error.strerror}); choose another place") from error
        with replacing_file(path, is_synced=False) as part:
            Image.fromarray(result).save(part, "PNG")
        record.sha256 = sha256(path)

    def _measure(self, task: Task, record: Record, lq: Pixels, truth: Pixels | None) -> None:
        with Image.open(self.result_path(task.set, task.label, task.pair.name)) as image:
            sample = Sample(np.asarray(image.convert("RGB")), truth, lq)
        record.measured_by = self.metrics.identity
        for name in self._wanted(task):
            if name not in record.metrics:
                value = self.metrics.measures[name](sample)
                record.metrics[name] = float(value) if math.isfinite(value) else None

    def _wanted(self, task: Task) -> list[str]:
        """What is measured of a task's result."""
        has_truth = task.pair.hq is not None and task.method.name != TRUTH
        return [name for name in self.metrics.measures if has_truth or METRICS[name].against != "truth"]

    def _key_of(self, task: Task) -> Record:
        """A record without a result, whose key says all that the result depends on."""
        files = [file for file in (task.pair.lq if task.source == AS_GIVEN else None, task.pair.hq) if file]
        made_from = {
            "version": __version__,
            "method": [task.method.name, task.method.identity, dict(task.method.settings)],
            "settings": dict(task.settings),
            "source": task.source.describe(),
            "protocol": [getattr(self.protocol, name) for name in ("scale", "channel", "border_px", "w", "seed")],
            "crop_px": self.crop_px,
            "files": [self._hash_of(file) for file in files],
        }
        key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        return Record(key, task.set, task.pair.name, task.label)

    def _hash_of(self, file: Path) -> str:
        if file not in self._hashes:
            try:
                self._hashes[file] = sha256(file)
            except OSError:  # reading it says what is wrong
                return "unreadable"
        return self._hashes[file]

    def _is_there(self, task: Task, record: Record) -> bool:
        path = self.result_path(task.set, task.label, task.pair.name)
        return path.is_file() and sha256(path) == record.sha256

    def _finish(self, record: Record) -> None:
        if record.error:
            line = f"{record.set}/{record.picture}: {record.error}"
            if not record.of_picture:
                line = f"{record.set}/{record.picture}, {record.label}: {record.error}"
            if line not in self._told:
                self._told.add(line)
                self.tell(line)
        self.records[record.set, record.picture, record.label] = record
        try:
            with self.journal.open("ab+") as file:
                is_torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n"
                file.write(b"\n" * is_torn + json.dumps(vars(record)).encode() + b"\n")
        except OSError as error:
            raise OutputError(f"{self.journal}: cannot be written ({error.strerror}); free space there") from error

    def _read(self) -> Iterator[Record]:
        """The whole records of the journal; a line that was cut off while it was written is left out."""
        try:
            lines = self.journal.read_bytes().splitlines() if self.journal.exists() else []
        except OSError as error:
            raise OutputError(f"{self.journal}: cannot be read ({error.strerror}); change its permissions") from error
        for line in lines:
            try:
                content: dict[str, Any] = json.loads(line)
                yield Record(**content)
            except (ValueError, TypeError):
                continue


def _loaded(method: Method) -> Restore:
    """The method; one that cannot be loaded fails on every picture, and is not loaded again for each."""
    try:
        return method.load()
    # Libraries raise any of these for weights that are not theirs.
    except (StableSRKitError, ImportError, OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        reason = StableSRKitError(f"cannot be loaded: {reason_of(error)}")

        def fail(*_: object) -> Pixels:
            raise reason

        return fail


def _cropped(pixels: Pixels, crop_px: int | None, multiple: int) -> Pixels:
    """The middle of a picture, cropped at multiples of a scale."""
    if crop_px is None:
        return pixels
    top, left = (max(side - crop_px, 0) // 2 // multiple * multiple for side in pixels.shape[:2])
    return pixels[top : top + crop_px, left : left + crop_px]
