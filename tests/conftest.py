"""What tests of many files share."""

from pathlib import Path

import pytest

from tests.helpers.tiny import tiny_pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder of tiny networks, without text; no test changes it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline(with_text=False).save_pretrained(folder)
    return folder
