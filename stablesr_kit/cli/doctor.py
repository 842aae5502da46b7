"""`stablesr doctor` and `stablesr licences`: what this machine offers, what is broken, and whose the weights are."""

import getpass
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from stablesr_kit.cli.messages import one_line, quieten_libraries

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DISTRIBUTION = "stablesr-kit"


class Finding(NamedTuple):
    """One line of the report."""

    subject: str
    value: str
    is_problem: bool = False


def doctor(
    report: Annotated[
        bool, typer.Option("--report", help="For a bug report: without names of files, folders, users and machines.")
    ] = False,
) -> None:
    """Show what this machine offers and what is broken.

    Versions, devices, memory, disk, and whether the embedded models load. Exit status: 0 everything needed works; 1
    something is broken.
    """
    problems = 0
    lines = []
    for examine in (_python, _packages, _devices, _memory, _models):
        for finding in _findings(examine):
            problems += finding.is_problem
            mark = "PROBLEM " if finding.is_problem else ""
            line = f"{finding.subject:<14} {mark}{one_line(finding.value)}"
            lines.append(anonymous(line) if report else line)
            if not report:
                typer.echo(lines[-1])
    if report:
        typer.echo("\n".join(["```text", *lines, "```"]))
    if problems:
        typer.echo(f"{problems} problem{'s' if problems > 1 else ''} found", err=True)
        raise typer.Exit(1)
    if not report:
        typer.echo("all that is needed works")


_PATH = re.compile(r"""(?<![\w.:])(?:[A-Za-z]:)?[/\\][^\s'"(),;]+""")


def anonymous(line: str) -> str:
    """The line without paths, and without the names of the user and the machine."""
    line = _PATH.sub("PATH", line)
    for name in (getpass.getuser(), Path.home().name, platform.node()):
        if len(name) > 1:
            line = re.sub(rf"\b{re.escape(name)}\b", "NAME", line)
    return line


def _findings(examine: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings; an error while looking is a finding too."""
    try:
        yield from examine()
    except Exception as error:
        yield Finding(examine.__name__.strip("_"), f"{type(error).__name__}: {error}", is_problem=True)


def _python() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} at {sys.executable}")
    yield Finding("system", f"{platform.system()} {platform.release()} {platform.machine()}")


def _packages() -> Iterator[Finding]:
    """Installed versions of all direct dependencies, checked against the requirements."""
    from packaging.requirements import Requirement

    yield Finding(DISTRIBUTION, metadata.version(DISTRIBUTION))
    extras = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        is_core = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        is_wanted = is_core or any(
            requirement.marker and requirement.marker.evaluate({"extra": extra}) for extra in extras if extra != "dev"
        )
        if not is_wanted:
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing = "not installed" if is_core else "not installed (optional)"
            yield Finding(requirement.name, missing, is_problem=is_core)
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        wanted = "" if fits else f", but {requirement.specifier} is needed: `pip install '{requirement}'`"
        yield Finding(requirement.name, version + wanted, is_problem=is_core and not fits)


def _devices() -> Iterator[Finding]:
    import torch

    from stablesr_kit.models.execution import has_bf16

    own = "bfloat16" if has_bf16(torch.device("cpu")) else "no bfloat16 of its own: float32 is used"
    yield Finding("cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {own}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "bfloat16" if has_bf16(torch.device("cuda", index)) else "no bfloat16: float16 is used"
        yield Finding(f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, {bf16}")
    if torch.backends.mps.is_available():
        yield Finding("mps", "available")
    if torch.cuda.device_count() == 0:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding("cuda", f"no device ({built})")


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    yield Finding("memory", f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}")
    disk = shutil.disk_usage(Path.cwd())
    yield Finding("disk", f"{disk.free / 2**30:.1f} GiB free of {disk.total / 2**30:.1f} in {Path.cwd()}")


def _models() -> Iterator[Finding]:
    """Whether the models in the package load."""
    quieten_libraries()

    from stablesr_kit import CodeFormerPipeline, StableSRPipeline

    for kind, pipeline_class in (("model", StableSRPipeline), ("face model", CodeFormerPipeline)):
        began = time.perf_counter()
        pipeline = pipeline_class.from_pretrained("mini")
        yield Finding(kind, f"mini: {_described(pipeline)}, loaded in {time.perf_counter() - began:.1f} s")


def _described(pipeline: "DiffusionPipeline") -> str:
    parameters = sum(
        parameter.numel()
        for component in pipeline.components.values()
        if hasattr(component, "parameters")
        for parameter in component.parameters()
    )
    parts = ", ".join(sorted(key for key, component in pipeline.components.items() if component is not None))
    return f"{parameters / 1e6:.1f} M parameters ({parts})"


def licences() -> None:
    """Print the licences of the code, of what is in the package, and of the weights that people bring.

    Each model that was converted has its own in its folder.
    """
    typer.echo((resources.files("stablesr_kit") / "assets" / "licences.md").read_text(encoding="utf-8").rstrip())
