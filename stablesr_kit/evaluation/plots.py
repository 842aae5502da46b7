"""Figures of a report as SVG text that takes the colour of the page's text, light or dark."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

from stablesr_kit.evaluation.methods import TRUTH
from stablesr_kit.evaluation.metrics import METRICS

Draw = TypeVar("Draw", bound=Callable[..., Any])
Row = Mapping[str, Any]
"""A line of a report's table: set, method, metrics, and "at" in a study."""

COLOURS = ("#3b82c4", "#e08a1e", "#2fa37a", "#c8559b", "#8b6fd1", "#b3742f", "#5aa7d6", "#9aa51f", "#d0564a", "#6b7a89")
_INK = "#010203"  # stands for the page's colour of text until the figure is text itself
_SHOWN = ("psnr", "ssim", "lpips-alex", "lpips-vgg", "dists", "niqe", "clip-iqa", "musiq", "lq-psnr", "identity")
"""Metrics that figures show, in their order, at most six."""

_PX_PER_INCH = 112
"""How large a figure may be shown: three columns fill a page, and one is not blown up to it."""

_STYLE: Mapping[Any, Any] = {
    **{key: _INK for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")},
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans"],
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
}


def _styled(draw: Draw) -> Draw:
    """The function drawing in our style, whatever that of the program is."""

    @wraps(draw)
    def styled(*args: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context(dict(_STYLE)):
            return draw(*args)

    return cast(Draw, styled)


def colour_of(method: str, methods: Sequence[str]) -> str:
    """The colour of a method, the same in all figures of a report."""
    return COLOURS[methods.index(method) % len(COLOURS)] if method in methods else _INK


@_styled
def intervals(rows: Sequence[Row], methods: Sequence[str], name: str) -> str:
    """Each metric's mean and interval, a line per method."""
    metrics = list(dict.fromkeys(metric for row in rows for metric in row["metrics"]))
    columns = min(len(metrics), 4)
    lines = math.ceil(len(metrics) / columns)
    figure, axes = _figure(lines, columns, width=2.9, height=0.7 + 0.22 * len(rows))
    for axis, metric in zip(axes, metrics, strict=False):
        axis.set_title(_title(metric))
        shown = [row for row in rows if metric in row["metrics"]]
        for place, row in enumerate(reversed(rows)):
            mean = row["metrics"].get(metric)
            if mean is None:
                continue
            colour = colour_of(row["method"], methods)
            if mean["low"] is not None:
                axis.plot([mean["low"], mean["high"]], [place, place], color=colour, linewidth=2, alpha=0.55)
            axis.plot([mean["mean"]], [place], "o", color=colour, markersize=5)
        axis.set_yticks(range(len(rows)), [row["method"] for row in reversed(rows)])
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.grid(axis="x")
        if not shown:
            axis.set_visible(False)
    return _svg(figure, axes[len(metrics) :], name)


@_styled
def lines(
    content: Mapping[str, Any], rows: Sequence[Row], level: Sequence[Row], methods: Sequence[str], name: str
) -> str:
    """Each metric along the first axis of a study, a line per method; level: rows of those that do not take part."""
    axis_name = content["axes"][0]
    metrics = [metric for metric in _SHOWN if any(metric in row["metrics"] for row in rows)][:6]
    columns = min(len(metrics), 3)
    figure, axes = _figure(math.ceil(len(metrics) / columns), columns, width=3.6, height=2.5)
    values = list(dict.fromkeys(row["at"][axis_name] for row in rows))
    is_numeric = not any(isinstance(value, str) for value in values)
    places = {value: value if is_numeric else place for place, value in enumerate(values)}
    for axis, metric in zip(axes, metrics, strict=False):
        axis.set_title(_title(metric))
        for method in dict.fromkeys(row["method"] for row in rows):
            points = [
                (places[row["at"][axis_name]], row["metrics"][metric])
                for row in rows
                if row["method"] == method and metric in row["metrics"]
            ]
            colour = colour_of(method, methods)
            x, means = [point[0] for point in points], [point[1] for point in points]
            axis.plot(x, [mean["mean"] for mean in means], "o-", color=colour, markersize=4, label=method)
            if all(mean["low"] is not None for mean in means):
                low, high = ([mean[end] for mean in means] for end in ("low", "high"))
                if len(x) > 1:
                    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
                else:
                    axis.vlines(x, low, high, color=colour, linewidth=2, alpha=0.55)
        for row in level:
            if metric in row["metrics"]:
                colour = colour_of(row["method"], methods)
                mean = row["metrics"][metric]["mean"]
                axis.axhline(mean, color=colour, linestyle="--", linewidth=1, label=row["method"])
        axis.set_xlabel(axis_name)
        if axis_name == "steps":
            axis.set_xscale("log", base=2)
        if not is_numeric or len(values) < 7:
            axis.set_xticks(
                list(places.values()),
                [f"{v:g}" if is_numeric else v for v in values],
                rotation=0 if is_numeric else 25,
                ha="center" if is_numeric else "right",
            )
            axis.minorticks_off()
        axis.grid()
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 5))
    return _svg(figure, axes[len(metrics) :], name)


@_styled
def kernel_matrix(rows: Sequence[Row], methods: Sequence[str], name: str) -> str:
    """PSNR by the blur that was and the blur that is assumed, and of the methods that assume one of their own."""
    told = [row for row in rows if "sigma_sr" in row["at"]]
    blind = [row for row in rows if "sigma_sr" not in row["at"]]
    true = list(dict.fromkeys(row["at"]["sigma_lr"] for row in rows))
    assumed = list(dict.fromkeys(row["at"]["sigma_sr"] for row in told))
    psnr = {(row["at"]["sigma_lr"], row["at"]["sigma_sr"]): row["metrics"]["psnr"]["mean"] for row in told}
    figure, axes = _figure(1, 2, width=4.6, height=3.6)
    matrix = [[psnr.get((y, x), math.nan) for x in assumed] for y in true]
    image = axes[0].imshow(matrix, cmap="viridis", origin="lower")
    middle = sum(image.get_clim()) / 2
    for y, line in enumerate(matrix):
        for x, value in enumerate(line):
            axes[0].text(x, y, f"{value:.1f}", ha="center", va="center", color="white" if value < middle else "black")
    axes[0].set_xticks(range(len(assumed)), [f"{value:g}" for value in assumed])
    axes[0].set_yticks(range(len(true)), [f"{value:g}" for value in true])
    axes[0].set_xlabel("sigma_SR, assumed (px)")
    axes[0].set_ylabel("sigma_LR, that was (px)")
    axes[0].set_title("PSNR in dB, non-blind")
    known = [psnr.get((value, value), math.nan) for value in true]
    axes[1].plot(true, known, "-", color=_INK, linewidth=1.5, label="non-blind, kernel known")
    for method in dict.fromkeys(row["method"] for row in blind):
        points = [(row["at"]["sigma_lr"], row["metrics"]["psnr"]["mean"]) for row in blind if row["method"] == method]
        axes[1].plot(*zip(*points, strict=True), "o-", color=colour_of(method, methods), markersize=4, label=method)
    axes[1].set_xlabel("sigma_LR, that was (px)")
    axes[1].set_title("PSNR in dB, blind")
    axes[1].grid()
    axes[1].legend()
    return _svg(figure, [], name)


@_styled
def plane(rows: Sequence[Row], methods: Sequence[str], name: str) -> str | None:
    """Distortion against perception (Blau and Michaeli 2018): PSNR and LPIPS, or NIQE; None without both."""
    below = next(
        (m for m in ("lpips-alex", "lpips-vgg", "dists", "niqe") if any(m in r["metrics"] for r in rows)), None
    )
    shown = [row for row in rows if below and {"psnr", below} <= row["metrics"].keys() and row["method"] != TRUTH]
    if below is None or len(shown) < 2:
        return None
    figure, axes = _figure(1, 1, width=4.6, height=3.4)
    for row in shown:
        x, y = (row["metrics"][metric]["mean"] for metric in ("psnr", below))
        axes[0].plot([x], [y], "o", color=colour_of(row["method"], methods), markersize=8)
        axes[0].annotate(row["method"], (x, y), xytext=(7, 4), textcoords="offset points")
    axes[0].margins(0.25)
    axes[0].invert_yaxis()
    axes[0].set_xlabel(f"{_title('psnr')}: closer to the truth")
    axes[0].set_ylabel(f"{_title(below)}: looks better")
    axes[0].grid()
    return _svg(figure, [], name)


def _title(metric: str) -> str:
    return f"{METRICS[metric].title} {'↑' if METRICS[metric].better == 'higher' else '↓'}"


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure of axes, each of this size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _svg(figure: Any, unused: Sequence[Any], name: str) -> str:
    """The figure as text; the same figure gives the same bytes."""
    import matplotlib

    for axis in unused:
        axis.set_visible(False)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    width_px = round(_PX_PER_INCH * figure.get_figwidth())
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 style="--width: {width_px}px"', svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace(_INK, "currentColor")
