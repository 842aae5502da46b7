"""Network interpolation: what is saved lies between the network a run started from and the trained one."""

import pytest
import torch
from torch import nn

from stablesr_kit.errors import ConfigError
from stablesr_kit.training.run.networks import InterpolationOptions, interpolate
from tests.helpers.tiny import seeded


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_every_parameter_lies_at_the_share_between_both(share: float) -> None:
    trained, first = nn.Linear(3, 2), nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in (*trained.parameters(), *first.parameters()):
            parameter.normal_(generator=seeded(parameter.numel()))
        first.weight.add_(1)
    expected = {name: share * t + (1 - share) * first.state_dict()[name] for name, t in trained.state_dict().items()}
    interpolate(trained, first, InterpolationOptions(trained_share=share))
    torch.testing.assert_close(trained.state_dict(), expected)


def test_a_share_beyond_both_is_refused() -> None:
    with pytest.raises(ConfigError, match="from 0 to 1"):
        InterpolationOptions(trained_share=1.5)
