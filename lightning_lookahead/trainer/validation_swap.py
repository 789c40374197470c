"""Which weights a validation sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_lookahead.evaluation.recalibration import Recalibration

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_lookahead.outer_loop.saved_format import Weights

    from .apart import Apart
    from .outer_loops import OuterLoops


class ValidationSwap:
    """Swaps a set of weights in for a validation, with recalibrated BatchNorm statistics if ``recalibrate`` says so.

    Args:
        loops: The outer loops.
        weights: The set that validation sees.
        recalibrate: How many training batches the statistics are gathered from; ``True``: all; ``False``: none.

    Attributes:
        recalibration: BatchNorm statistics gathered with the weights that are swapped in.
        apart: The ranks, if they train apart: all see the first one's buffers.
    """

    def __init__(self, loops: OuterLoops, weights: Weights, recalibrate: bool | int) -> None:  # noqa: FBT001
        self._loops, self._weights, self._recalibrate = loops, weights, recalibrate
        self.recalibration = Recalibration()
        self.apart: Apart | None = None

    def start(self, trainer: Trainer) -> None:
        """Swap in, before every other callback's ``on_validation_start``."""
        self._loops.swap_to(self._weights)
        apart = self.apart if self.apart is not None and self.apart.active and self._loops.counting else None
        if apart is not None:
            apart.buffers.hold_firsts()
        if self._recalibrate and self._loops.counting and not trainer.sanity_checking:
            self.recalibration.start(trainer, self._recalibrate)
            if apart is not None:
                apart.buffers.take_firsts()

    def end(self) -> None:
        """Swap out, after every other callback's ``on_validation_end`` and the module's: first in, last out."""
        self.recalibration.stop()
        if self.apart is not None and self._loops.counting:  # after a fit the module keeps the first rank's
            self.apart.buffers.give_back()
        self._loops.swap_to("fast")
