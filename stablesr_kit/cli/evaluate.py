"""`stablesr evaluate`: methods side by side by a named protocol, as tables, plots and pictures."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stablesr_kit.cli.messages import failing_in_one_line, one_line, usage_error
from stablesr_kit.cli.processes import gathered, is_first, share_of
from stablesr_kit.errors import ConfigError, StableSRKitError

if TYPE_CHECKING:
    from stablesr_kit.evaluation.methods import Given, Method, Open, Restore, Settings
    from stablesr_kit.evaluation.protocols import Protocol
    from stablesr_kit.evaluation.resampling import Pixels
    from stablesr_kit.evaluation.runner import Evaluation, Task

WEIGHTS_VARIABLE = "STABLESR_WEIGHTS"


def evaluate(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder of sets, such as SET_HR beside SET_LRx4.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Folder of the report.")],
    protocol: Annotated[str, typer.Option(metavar="NAME", help="How to measure; a wrong name lists them.")],
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=WHAT[,key=value]",
            help="A model, a weight file, ncnn's .param, realesrgan-x4plus, nonblind, or a folder of results.",
            show_default="the model in the package",
        ),
    ] = None,
    study: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="w, steps, seeds, degradation, kernel-mismatch or losses.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Measured beside those of the protocol.")
    ] = None,
    weights: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help=f"Weights of metrics; also {WEIGHTS_VARIABLE}. Else libraries fetch them."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first pictures of each set alone.")] = None,
    crop: Annotated[
        int | None, typer.Option(metavar="PX", min=1, help="The middle of each picture alone; the report says so.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N|mps", help="Of this toolkit's models.")] = "auto",
) -> None:
    """Compare methods by a protocol, and write report.json, report.csv, report.md and index.html.

    The same command goes on where it was stopped. Pictures are spread over the processes of `accelerate launch -m
    stablesr_kit.cli evaluate ...`. Exit status: 0 all done; 1 some pictures failed, each with one line, and the report
    says over how many it averages; 2 wrong usage.
    """
    from stablesr_kit.cli.messages import quieten_libraries

    quieten_libraries()

    from stablesr_kit.evaluation.metrics import METRICS, MetricSettings, Weights
    from stablesr_kit.evaluation.page import as_page
    from stablesr_kit.evaluation.protocols import find_protocol, find_sets
    from stablesr_kit.evaluation.report import Inquiry, as_text, build, write
    from stablesr_kit.evaluation.runner import Evaluation, load_metrics
    from stablesr_kit.evaluation.studies import find_study

    folders = list(weights or []) + [Path(p) for p in os.environ.get(WEIGHTS_VARIABLE, "").split(os.pathsep) if p]
    for folder in folders:
        if not folder.is_dir():
            usage_error(f"--weights {folder} is no folder; give one that holds weights of metrics")
    unknown = [name for name in metric or [] if name not in METRICS]
    if unknown:
        usage_error(f"--metric {unknown[0]!r} is not known; give one of {', '.join(METRICS)}")
    try:
        chosen = find_protocol(protocol)
        sets = find_sets(data, chosen, limit)
        studies = [find_study(name) for name in dict.fromkeys(study or [])]
        if crop is not None and crop % chosen.scale:
            raise ConfigError(f"--crop {crop} must be a multiple of the scale {chosen.scale}")
        methods = _methods(method, chosen, device, any(pair.hq for one in sets for pair in one.pairs))
    except StableSRKitError as error:
        usage_error(str(error))

    loaded = load_metrics(
        dict.fromkeys((*chosen.metrics, *(metric or []))),
        MetricSettings(border_px=chosen.border_px, channel=chosen.channel, weights=Weights(tuple(folders))),
    )
    if is_first():
        for line in [line for one in sets for line in one.problems]:
            _tell(line)
        for name, reason in loaded.absent.items():
            typer.echo(f"note: {METRICS[name].title} is not measured: it {one_line(reason)}", err=True)
    with failing_in_one_line():
        evaluation = Evaluation(output, chosen, loaded, crop_px=crop, tell=_tell)
        tasks = evaluation.tasks(sets, methods)
        try:
            for one in studies:
                tasks += one.tasks(evaluation, sets, methods)
        except ConfigError as error:
            usage_error(str(error))
        try:
            _run(evaluation, share_of(_unique(tasks)))
        except KeyboardInterrupt:
            typer.echo("interrupted: what is done is kept; the same command goes on", err=True)
            raise typer.Exit(130) from None
        gathered(None)  # all have recorded all
        if not is_first():
            return
        evaluation.reload()
        inquiry = Inquiry(
            protocol=chosen,
            sets=sets,
            methods=methods,
            studies=studies,
            command=_command(data, protocol, method, study, metric, weights, limit, crop, device),
            limit=limit,
        )
        report = build(evaluation, inquiry)
        write(report, output, as_page(report, evaluation, inquiry))
    typer.echo(as_text(report))
    typer.echo(f"{output / 'index.html'}")
    if report["problems"]:
        raise typer.Exit(1)


def _run(evaluation: "Evaluation", tasks: "list[Task]") -> None:
    from tqdm import tqdm

    bar = tqdm(total=len(tasks), unit="picture", leave=False, disable=not sys.stderr.isatty())
    with bar:
        for record in evaluation.run(tasks):
            bar.set_postfix_str(record.label, refresh=False)
            bar.update()


def _unique(tasks: "list[Task]") -> "list[Task]":
    """Each task once, those of one method together: studies ask for some that the table has too."""
    first: dict[tuple[str, str, str], Task] = {}
    for task in tasks:
        first.setdefault((task.set, task.pair.name, task.label), task)
    order = {name: index for index, name in enumerate(dict.fromkeys(task.method.name for task in first.values()))}
    return sorted(first.values(), key=lambda task: order[task.method.name])


def _tell(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(f"error: {one_line(line)}", file=sys.stderr)


def _command(
    data: Path,
    protocol: str,
    method: list[str] | None,
    study: list[str] | None,
    metric: list[str] | None,
    weights: list[Path] | None,
    limit: int | None,
    crop: int | None,
    device: str,
) -> str:
    """The command without the folder of the report, which does not change it."""
    words = ["stablesr", "evaluate", str(data), "--protocol", protocol]
    for option, values in (("--method", method), ("--study", study), ("--metric", metric), ("--weights", weights)):
        words += [word for value in values or [] for word in (option, str(value))]
    for option, value in (("--limit", limit), ("--crop", crop)):
        words += [] if value is None else [option, str(value)]
    return shlex.join([*words, *(["--device", device] if device != "auto" else []), "-o", "OUT"])


def _methods(texts: list[str] | None, protocol: "Protocol", device: str, has_truth: bool) -> "list[Method]":
    """The baselines, what was given or else the model in the package, and the truths. Raises StableSRKitError."""
    from stablesr_kit.evaluation.methods import baselines, open_method, truth

    own = ["codeformer=mini", "nearest-code=mini,code_lookup=nearest,w=0"] if protocol.scale == 1 else ["mini=mini"]
    opener = _opener(protocol, device)
    methods = [*baselines(protocol.scale), *(open_method(text, opener) for text in texts or own)]
    methods += [truth()] if has_truth else []
    names = [one.name for one in methods]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two methods are called {name}; give each a name of its own")
    return methods


def _opener(protocol: "Protocol", device: str) -> "Open":
    """Opens this toolkit's pipelines: CodeFormer for protocols of aligned faces, else whatever enlarges."""
    from stablesr_kit.cli.restore import choose_device, choose_dtype
    from stablesr_kit.evaluation.methods import Method
    from stablesr_kit.storage import sha256

    chosen = choose_device(device)

    def open_faces(name: str, what: str) -> Method:
        from stablesr_kit.cli.face_stage import find_face_model, load_face_model

        path = find_face_model(what)

        def load() -> "Restore":
            import numpy as np
            from PIL import Image

            pipeline: Any = load_face_model(what, chosen)
            pipeline.set_progress_bar_config(disable=True)

            def restore(given: "Given", settings: "Settings") -> "Pixels":
                options: dict[str, Any] = {k: settings[k] for k in ("w", "code_lookup") if k in settings}
                restored = pipeline(Image.fromarray(given.lq), **options).images[0]
                return np.asarray(restored.resize((given.width, given.height), Image.Resampling.LANCZOS))

            return restore

        takes = frozenset({"w", "code_lookup"})
        identity = f"{sha256(path)} {chosen.type}"
        return Method(name=name, what=f"CodeFormer {what}", identity=identity, load=load, takes=takes)

    def open_enlarging(name: str, what: str) -> Method:
        from stablesr_kit.cli.restorer import find_model, load_pipeline

        folder = find_model(what)
        index = json.loads((folder / "model_index.json").read_text())
        kind = index.get("_class_name", "")
        takes = {"seed"}
        if kind == "StableSRPipeline":
            takes |= {"steps"} | ({"w"} if index.get("cfw", [None])[0] else set())

        def load() -> "Restore":
            import numpy as np
            import torch
            from PIL import Image

            pipeline: Any = load_pipeline(what, chosen, choose_dtype("auto", chosen))
            pipeline.set_progress_bar_config(disable=True)

            def restore(given: "Given", settings: "Settings") -> "Pixels":
                options: dict[str, Any] = {"w": settings.get("w", protocol.w)} if "w" in takes else {}
                if "steps" in settings:
                    options["num_inference_steps"] = int(settings["steps"])
                generator = torch.Generator().manual_seed(int(settings.get("seed", protocol.seed)))
                image = Image.fromarray(given.lq)
                return np.asarray(pipeline(image, scale=protocol.scale, generator=generator, **options).images[0])

            return restore

        identity = f"{sha256(folder)} {chosen.type}"
        return Method(name=name, what=f"{kind} {what}", identity=identity, load=load, takes=frozenset(takes))

    return open_faces if protocol.scale == 1 else open_enlarging
