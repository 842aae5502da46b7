"""What tests of many files share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

# Sums depend on the number of threads, here and in the processes that tests start; and workers share the cores.
os.environ["OMP_NUM_THREADS"] = "1"

from tests.helpers.tiny import tiny_pipeline


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """once(name, make): a new folder that `make` fills, in the first of the test run's workers that asks for it."""

    def folder_of(name: str, make: Callable[[Path], None]) -> Path:
        base = tmp_path_factory.getbasetemp()
        of_all = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        made = of_all / f"{name}.made"
        with FileLock(of_all / f"{name}.lock"):
            if not made.exists():
                folder = tmp_path_factory.mktemp(name)
                make(folder)
                made.write_text(str(folder))
            return Path(made.read_text())

    return folder_of


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder of tiny networks, without text; no test changes it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline(with_text=False).save_pretrained(folder)
    return folder
