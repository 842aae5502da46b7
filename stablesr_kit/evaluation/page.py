"""The report as one HTML page that needs nothing else: tables that sort, figures, and pictures side by side."""

import base64
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from stablesr_kit.evaluation import plots
from stablesr_kit.evaluation.methods import TRUTH
from stablesr_kit.evaluation.metrics import METRICS
from stablesr_kit.evaluation.report import Inquiry, crop_of
from stablesr_kit.evaluation.runner import AS_GIVEN, Evaluation, Task
from stablesr_kit.imaging.reading import read_picture

PICTURES_PER_SET, PICTURES_PER_STUDY = 12, 2
"""Shown in the page; all are in the folder beside it."""
SIDE_PX = 768
"""Larger pictures are shown by their middle."""


def as_page(report: Mapping[str, Any], evaluation: Evaluation, inquiry: Inquiry) -> str:
    """The page of a report, with the pictures of its folder in it."""
    template = (resources.files("stablesr_kit.evaluation") / "page.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": f"{report['protocol']}: {', '.join(one.name for one in inquiry.sets)}",
        "INTRODUCTION": _introduction(report),
        "SETS": "".join(_sets(report)),
        "STUDIES": "".join(_studies(report)),
        "PUBLISHED": _published(report),
        "REPEAT": _repeat(report),
        "DATA": json.dumps(_viewer(report, evaluation, inquiry), ensure_ascii=False).replace("</", "<\\/"),
    }
    for name, text in parts.items():
        template = template.replace(f"@@{name}@@", text)
    return template


def _text(value: object) -> str:
    return html.escape(str(value))


def _introduction(report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    channel = "luma (Y of BT.601)" if settings["channel"] == "y" else "RGB"
    facts = [
        f"{_text(settings['source'])}.",
        f"Scale {settings['scale']}; PSNR and SSIM of {channel}, {settings['border_px']} px of border left out; "
        f"{_text(crop_of(settings))}; seed {settings['seed']}.",
        f"Small numbers are intervals: {_text(settings['interval'])}.",
    ]
    notes = [("note", one) for one in report["notes"]]
    notes += [("absent", f"{METRICS[name].title} is not measured: it {why}") for name, why in report["absent"].items()]
    notes += [("failed", one) for one in report["problems"]]
    listed = "".join(f'<li class="{kind}">{_text(line)}</li>' for kind, line in notes)
    count = f"{len(report['problems'])} failed, " if report["problems"] else ""
    opened = " open" if report["problems"] else ""
    more = f"<details{opened}><summary>{count}{len(notes)} notes</summary><ul>{listed}</ul></details>" if notes else ""
    return "".join(f"<p>{fact}</p>" for fact in facts) + more


def _methods(report: Mapping[str, Any]) -> list[str]:
    return [one["name"] for one in report["methods"]]


def _sets(report: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys(row["set"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["set"] == name]
        yield f'<section id="set-{_text(name)}"><h2>{_text(name)}</h2>'
        yield _table(rows, _methods(report))
        yield _figure(plots.intervals(rows, _methods(report), f"intervals {name}"), "Means and intervals.")
        plane = plots.plane(rows, _methods(report), f"plane {name}")
        if plane is not None:
            yield _figure(plane, "Distortion against perception: up and to the right is better.", is_narrow=True)
        yield _differences([one for one in report["differences"] if one["set"] == name])
        yield "</section>"


def _figure(svg: str, caption: str, is_narrow: bool = False) -> str:
    kind = ' class="narrow"' if is_narrow else ""
    return (
        f'<figure{kind}><div class="scroll" tabindex="0">{svg}</div><figcaption>{_text(caption)}</figcaption></figure>'
    )


def _table(rows: Sequence[Mapping[str, Any]], methods: Sequence[str], axes: Sequence[str] = ()) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    heads = ["<th><button>method</button></th>", *(f"<th><button>{_text(axis)}</button></th>" for axis in axes)]
    for name in names:
        metric = METRICS[name]
        arrow = "↑" if metric.better == "higher" else "↓"
        heads.append(
            f'<th class="number" data-better="{metric.better}"><button>{_text(metric.title)} {arrow}</button></th>'
        )
    body = []
    for row in rows:
        swatch = plots.colour_of(row["method"], methods).replace("#010203", "currentColor")
        cells = [f'<th scope="row"><span class="swatch" style="background:{swatch}"></span>{_text(row["method"])}</th>']
        for axis in axes:
            value = row["at"].get(axis, "")
            cells.append(f'<td data-value="{_text(value)}">{_text(value)}</td>')
        cells += [_cell(name, row, rows) for name in names]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" tabindex="0"><table class="sortable"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(name: str, row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    metric, mean = METRICS[name], row["metrics"].get(name)
    if mean is None:
        return '<td class="number" data-value=""></td>'
    means = [one["metrics"][name] for one in rows if name in one["metrics"]]
    ranked = sorted(
        {one["metrics"][name]["mean"] for one in rows if name in one["metrics"] and one["method"] != TRUTH},
        reverse=metric.better == "higher",
    )
    place = ranked.index(mean["mean"]) if mean["mean"] in ranked and len(ranked) > 1 else -1
    kind = {0: " best", 1: " second"}.get(place, "")
    interval = ""
    if mean["low"] is not None:
        interval = f"<small>{mean['low']:.{metric.digits}f} – {mean['high']:.{metric.digits}f}</small>"
    fewer = f"<small>of {mean['n']}</small>" if mean["n"] < max(one["n"] for one in means) else ""
    value = f"{mean['mean']:.{metric.digits}f}"
    return (
        f'<td class="number{kind}" data-value="{mean["mean"]}" title="over {mean["n"]}">{value}{interval}{fewer}</td>'
    )


def _differences(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    body = []
    for row in rows:
        metric = METRICS[row["metric"]]
        interval, verdict = "", "one picture"
        if row["low"] is not None:
            interval = f"{row['low']:+.{metric.digits}f} – {row['high']:+.{metric.digits}f}"
            is_first = (row["mean"] > 0) == (metric.better == "higher")
            is_clear = row["low"] > 0 or row["high"] < 0
            verdict = (row["first"] if is_first else row["second"]) if is_clear else "not told apart"
        body.append(
            f"<tr><td>{_text(metric.title)}</td><td>{_text(row['first'])}</td><td>{_text(row['second'])}</td>"
            f'<td class="number" data-value="{row["mean"]}">{row["mean"]:+.{metric.digits}f}</td>'
            f"<td>{interval}</td><td>{row['n']}</td><td>{_text(verdict)}</td></tr>"
        )
    names = ("metric", "first", "second", "first − second", "interval", "pictures", "better")
    heads = "".join(f"<th><button>{name}</button></th>" for name in names)
    return (
        f"<details><summary>Paired differences between methods</summary>"
        f'<div class="scroll" tabindex="0"><table class="sortable"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></details>"
    )


def _studies(report: Mapping[str, Any]) -> Iterator[str]:
    for study, content in report["studies"].items():
        yield f'<section id="study-{_text(study)}"><h2>{_text(content["title"])}</h2><p>{_text(content["caption"])}</p>'
        for name in dict.fromkeys(row["set"] for row in content["rows"]):
            rows = [row for row in content["rows"] if row["set"] == name]
            taking = {row["method"] for row in rows}
            level = [
                row
                for row in report["rows"]
                if row["set"] == name
                and row["method"] not in (*taking, TRUTH)
                and study in ("w", "steps", "seeds", "losses")
            ]
            yield f"<h3>{_text(name)}</h3>"
            if study == "kernel-mismatch":
                yield _figure(plots.kernel_matrix(rows, _methods(report), f"{study} {name}"), content["caption"])
            else:
                yield _figure(
                    plots.lines(content, rows, level, _methods(report), f"{study} {name}"),
                    f"{content['title']} on {name}.",
                )
            table = _table(rows, _methods(report), content["axes"])
            yield f"<details><summary>Table of {_text(name)}</summary>{table}</details>"
        yield "</section>"


def _published(report: Mapping[str, Any]) -> str:
    if not report["published"]:
        return ""
    rows = [
        {
            "method": row["method"],
            "at": {"set": row["set"], "source": row["source"]},
            "metrics": {k: {"mean": v, "n": 1, "low": None, "high": None} for k, v in row["metrics"].items()},
        }
        for row in report["published"]
    ]
    tables = []
    for name in dict.fromkeys(row["at"]["set"] for row in rows):
        own = [row for row in rows if row["at"]["set"] == name]
        tables.append(f"<h3>{_text(name)}</h3>{_table(own, (), ('source',))}")
    return f'<section id="published"><h2>Published</h2>{"".join(tables)}</section>'


def _repeat(report: Mapping[str, Any]) -> str:
    methods = ""
    for one in report["methods"]:
        settings = ", ".join(f"{key}={value}" for key, value in one["settings"].items())
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in (one["what"], settings))
        methods += (
            f"<tr><th scope=row>{_text(one['name'])}</th>{cells}<td><code>{_text(one['identity'])}</code></td></tr>"
        )
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"<pre><code>{_text(report['command'])}</code></pre>"
        f'<div class="scroll" tabindex="0"><table><thead><tr><th>method</th><th>what</th><th>settings</th>'
        f"<th>identity</th></tr></thead><tbody>{methods}</tbody></table></div><p>{_text(versions)}</p>"
        f"<p>SHA-256 of every picture and result are in report.json.</p>"
    )


def _viewer(report: Mapping[str, Any], evaluation: Evaluation, inquiry: Inquiry) -> dict[str, Any]:
    """What the page shows side by side: groups of pictures, each with its views."""
    titles = {name: [METRICS[name].title, METRICS[name].digits] for name in evaluation.protocol_metrics}
    groups = [
        {"title": one.name, "pictures": list(_pictures(evaluation, one.name, inquiry, one.pairs[:PICTURES_PER_SET]))}
        for one in inquiry.sets
    ]
    for study, content in report["studies"].items():
        for one in inquiry.sets:
            pictures = list(_study_pictures(evaluation, inquiry, study, one.name, one.pairs[:PICTURES_PER_STUDY]))
            if study == "seeds":
                pictures = [_with_maps(picture, content["maps"], evaluation.folder, one.name) for picture in pictures]
            groups.append({"title": f"{content['title']}, {one.name}", "pictures": pictures})
    return {"metrics": titles, "groups": [group for group in groups if group["pictures"]]}


def _pictures(
    evaluation: Evaluation, set_name: str, inquiry: Inquiry, pairs: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    for pair in pairs:
        tasks = [Task(set_name, pair, method, {}, AS_GIVEN) for method in inquiry.methods]
        views = [view for task in tasks if (view := _view(evaluation, task, task.label)) is not None]
        if views:
            yield {"name": pair.name, "views": views}


def _study_pictures(
    evaluation: Evaluation, inquiry: Inquiry, study: str, set_name: str, pairs: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    (own,) = (one for one in inquiry.studies if one.name == study)
    points = own.points([one for one in inquiry.methods if one.name != TRUTH], inquiry.protocol)
    for pair in pairs:
        views = []
        for point in points:
            for task in evaluation.tasks(inquiry.sets, [point.method], point.settings, point.source):
                if (task.set, task.pair) == (set_name, pair):
                    title = f"{point.method.name} {' '.join(f'{k}={v}' for k, v in point.at.items())}"
                    view = _view(evaluation, task, title)
                    if view is not None:
                        views.append(view)
        if views:
            truths = [one for one in inquiry.methods if one.name == TRUTH and pair.hq is not None]
            seen = (_view(evaluation, Task(set_name, pair, one, {}, AS_GIVEN), TRUTH) for one in truths)
            yield {"name": pair.name, "views": [*views, *(view for view in seen if view is not None)]}


def _view(evaluation: Evaluation, task: Task, title: str) -> dict[str, Any] | None:
    record = evaluation.record_of(task)
    if record is None or record.error:
        return None
    path = evaluation.result_path(task.set, task.label, task.pair.name)
    return {"title": title, "metrics": record.metrics, "image": _data_uri(read_picture(path).rgb)}


def _with_maps(
    picture: dict[str, Any], maps: Sequence[Mapping[str, Any]], folder: Path, set_name: str
) -> dict[str, Any]:
    views = list(picture["views"])
    for one in maps:
        if (one["set"], one["picture"]) == (set_name, picture["name"]):
            for kind in ("deviation", "difference"):
                image = _data_uri(read_picture(folder / one[f"{kind}_map"]).rgb)
                title = f"{one['method']}, {kind} of the seeds, mean {one[kind]:.2f} levels"
                views.append({"title": title, "metrics": {}, "image": image})
    return {**picture, "views": views}


def _data_uri(image: Image.Image) -> str:
    width, height = (min(side, SIDE_PX) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    data = io.BytesIO()
    image.crop((left, top, left + width, top + height)).save(data, "WEBP", quality=90, method=4)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
