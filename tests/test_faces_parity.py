"""Alignment and pasting against the reference outputs of the published script, where they are."""

from pathlib import Path

import pytest

from tests.parity_codeformer_faces import check_align, check_paste

WHOLE = Path(__file__).parents[2] / "shared" / "goldens" / "codeformer" / "open"


@pytest.mark.skipif(not WHOLE.is_dir(), reason="the references are not beside the checkout")
def test_alignment_and_pasting_equal_the_references() -> None:
    quantities = [*check_align(WHOLE), *check_paste(WHOLE)]
    assert len(quantities) > 40
    assert not [quantity for quantity in quantities if quantity[1] > quantity[2]]
