"""Compare the toolkit with a folder of reference outputs, whatever its config and seed.

python -m tests.parity {codeformer|onestep|stablesr} DIR

Prints one line per quantity, `name max_abs_diff tolerance ok|FAIL`, then a line that counts them. Exits with 1
on a failure, on a file that is not understood, and on a folder with nothing to check; with 2 on wrong usage.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.parity import codeformer, onestep, stablesr

SUITES: dict[str, Callable[[Path], Iterator[tuple[str, float, float]]]] = {
    "codeformer": codeformer.check_folder,
    "onestep": onestep.check_folder,
    "stablesr": stablesr.check_folder,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=sorted(SUITES))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    counts = {"ok": 0, "FAIL": 0}
    for name, difference, tolerance in SUITES[arguments.suite](arguments.folder):
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
