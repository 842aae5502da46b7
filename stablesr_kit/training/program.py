"""How a training program is started: options from the command line, errors as one line, an exit status."""

import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from stablesr_kit.errors import ConfigError, StableSRKitError
from stablesr_kit.training.config import Config, load_config


def launch(main: Callable[[Config], None], kind: type[Config]) -> None:
    """Run `main` with the options of the command line.

    What a user can cause ends the program with one line on stderr: exit status 2 for its options, 1 for the rest.
    """
    try:
        main(load_config(kind, sys.argv[1:]))
    except ConfigError as error:
        _end(error, 2)
    except StableSRKitError as error:
        _end(error, 1)


def _end(error: StableSRKitError, status: int) -> NoReturn:
    traceback.clear_frames(error.__traceback__)  # ends the loop that was running, and with it its progress bar
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    raise SystemExit(status)
