"""Compare the toolkit with a folder of reference outputs, whatever its config and seed.

python -m tests.parity {codeformer|onestep|stablesr} DIR

Prints one line per quantity, `name max_abs_diff tolerance ok|FAIL`, then a line that counts them. Exits with 1
on a failure, on a file that is not understood, and on a folder with nothing to check; with 2 on wrong usage.
"""

import argparse
import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.parity.references import Quantity

SUITES = ("codeformer", "onestep", "stablesr")


def check_folder(suite: str, folder: Path) -> Iterator[Quantity]:
    """Every quantity of the folder. A suite takes what it checks, and not what the others do."""
    yield from importlib.import_module(f"tests.parity.{suite}").check_folder(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(format="note: %(message)s")
    counts = {"ok": 0, "FAIL": 0}
    for name, difference, tolerance in check_folder(arguments.suite, arguments.folder):
        verdict = "ok" if difference <= tolerance else "FAIL"
        counts[verdict] += 1
        print(name, f"{difference:.3g}", f"{tolerance:.3g}", verdict, flush=True)
    if not counts["ok"] + counts["FAIL"]:
        print(f"nothing to check in {arguments.folder}", file=sys.stderr)
        return 1
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main())
