"""`stablesr licences`: whose the weights are, and what for."""

from importlib import resources

import typer


def licences() -> None:
    """Print the licences of the code, of what is in the package, and of the weights that people bring.

    Each model that was converted has its own in its folder.
    """
    typer.echo((resources.files("stablesr_kit") / "assets" / "licences.md").read_text(encoding="utf-8").rstrip())
