"""The command line: parse, call, print. Heavy imports happen inside the commands, so that help is instant."""

import logging
import os
from typing import Annotated

import typer

from stablesr_kit.cli.convert import convert, inspect
from stablesr_kit.cli.degrade import degrade
from stablesr_kit.cli.doctor import doctor, licences
from stablesr_kit.cli.evaluate import evaluate
from stablesr_kit.cli.faces import faces
from stablesr_kit.cli.messages import Notes, quieten_imports
from stablesr_kit.cli.restore import restore
from stablesr_kit.cli.web import web
from stablesr_kit.version import __version__

app = typer.Typer(
    name="stablesr",
    help="Restore and enlarge real photographs with the prior of a frozen Stable Diffusion.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (restore, faces, convert, inspect, degrade, evaluate, web, doctor, licences):
    app.command()(command)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"stablesr-kit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""


def main() -> None:
    """The entry point of `stablesr`."""
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # broken pictures get our one line, not the decoder's log
    logging.getLogger("stablesr_kit").addHandler(Notes())
    quieten_imports()
    # Threads of torch that wait for others spin by default, which takes six times as long where cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
