"""What every degradation setting is checked for."""

from stablesr_kit.errors import ConfigError
from stablesr_kit.imaging.degradations.draws import Span


def check_probability(name: str, value: float) -> None:
    """Raise ConfigError unless the value lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}={value} is no probability; give a number from 0 to 1")


def check_span(name: str, span: Span, lowest: float, highest: float = float("inf")) -> None:
    """Raise ConfigError unless lowest <= span[0] <= span[1] <= highest."""
    if not lowest <= span[0] <= span[1] <= highest:
        raise ConfigError(f"{name}={span} must be (low, high) with {lowest} <= low <= high <= {highest}")


def check_odd_sizes(name: str, sizes: tuple[int, int]) -> None:
    """Raise ConfigError unless both sizes are odd, positive and in ascending order."""
    if sizes[0] % 2 == 0 or sizes[1] % 2 == 0 or not 1 <= sizes[0] <= sizes[1]:
        raise ConfigError(f"{name}={sizes} must be (smallest, largest), both odd, such as (7, 21)")
