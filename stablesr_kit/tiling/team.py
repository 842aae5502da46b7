"""Several processes restore one picture: the first runs the call, the others predict tiles for it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather
from torch import Tensor

from stablesr_kit.errors import is_out_of_memory
from stablesr_kit.imaging.canvas import Region

DONE, LACKS_MEMORY, FAILED = range(3)


class OthersFailed(RuntimeError):
    """Another process failed; it reports its own error."""


@dataclass(frozen=True, kw_only=True)
class TileRequest:
    """What a step asks of all processes: predictions for regions, in batches, of canvases (B, C, h, w) on the CPU.

    arguments: the other arguments of `steered_prediction`, such as the timestep.
    """

    latents: Tensor
    lq_latents: Tensor
    prompt_embeds: Tensor
    image_embeds: list[Tensor]
    arguments: dict[str, Any]
    regions: Sequence[Region]
    batch_size: int


class Team:
    """The processes of `accelerate launch`, each with the same networks, at one picture.

    Each process predicts every n-th tile, and the first gets all predictions unchanged. On devices of one kind (on CPUs
    with the same number of threads) the result has the bits of a single process.

    Args:
        state: of accelerate; any backend.
    """

    def __init__(self, state: PartialState) -> None:
        self.state = state

    @property
    def is_lead(self) -> bool:
        """Whether this is the process that restores."""
        return self.state.is_main_process

    def tell(self, message: object) -> None:
        """Send a message from the first process to all others, which must `listen`; None ends their work."""
        broadcast_object_list([message])

    def listen(self) -> Any:
        """The next message of the first process."""
        return broadcast_object_list([None])[0]

    def share(self, tiles: int) -> range:
        """Indices of the tiles that this process predicts."""
        return range(self.state.process_index, tiles, self.state.num_processes)

    def exchange(self, shapes: Sequence[Sequence[int]], own: Iterable[tuple[int, Tensor]]) -> list[Tensor]:
        """Predictions of all tiles, float32 on the CPU, on every process.

        shapes: of all predictions. own: (index, prediction) of this process's share, computed here.

        Raises:
            MemoryError: a process lacks memory (or what the device of this one raises then).
            OthersFailed: another process failed (or the error of this one).
        """
        error: Exception | None = None
        flat = [torch.zeros(0)]
        try:
            flat += [prediction.to("cpu", torch.float32).flatten() for _, prediction in own]
        except Exception as caught:  # the others wait for this process and must learn of whatever happened
            error = caught
        status = DONE if error is None else LACKS_MEMORY if is_out_of_memory(error) else FAILED
        worst = int(gather(torch.tensor([status], device=self.state.device)).max())
        if error is not None and worst == status:
            raise error
        if worst == FAILED:
            raise OthersFailed("another process failed at its tiles; see what it says")
        if worst == LACKS_MEMORY:
            raise MemoryError("another process lacks memory")

        count = self.state.num_processes
        sizes = [math.prod(shape) for shape in shapes]
        longest = max(sum(sizes[rank::count]) for rank in range(count))
        padded = torch.zeros(longest)
        values = torch.cat(flat)
        padded[: len(values)] = values
        everyone = gather(padded.to(self.state.device)).cpu().view(count, longest)
        predictions: list[Tensor] = [torch.empty(0)] * len(shapes)
        for rank in range(count):
            parts = everyone[rank][: sum(sizes[rank::count])].split(sizes[rank::count])
            for index, part in zip(range(rank, len(shapes), count), parts, strict=True):
                predictions[index] = part.view(*shapes[index])
        return predictions
