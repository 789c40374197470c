"""What a run tells of its syncs: figures for the loggers, and whether the ranks still agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_lookahead._names import names_in
from lightning_lookahead._ranks import check_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_lookahead.slow_weights import SlowWeights


def figures(slow_weights: Sequence[SlowWeights], *, syncs: bool) -> dict[str, float]:
    """The figures of each optimizer, by log key: ``syncs`` and ``alpha`` if ``syncs``, ``distance`` if measured."""
    found: dict[str, float] = {}
    for index, slow in enumerate(slow_weights):
        own: dict[str, float] = {}
        if syncs:
            own["syncs"] = float(slow.syncs)
            varies = not isinstance(slow.settings.alpha, (int, float)) or len(slow.cycles) > 1
            if slow.last_alpha is not None and varies:
                own["alpha"] = slow.last_alpha
        if slow.last_distance is not None:
            own["distance"] = float(slow.last_distance)
        suffix = f"/{index}" if len(slow_weights) > 1 else ""
        found.update({f"lookahead/{name}{suffix}": value for name, value in own.items()})
    return found


class RankCheck:
    """Compares the weights of all ranks after each sync."""

    def __init__(self) -> None:
        self._checked: list[int] = []  # syncs after which it looked, for each optimizer

    def begin(self, slow_weights: Sequence[SlowWeights]) -> None:
        """Look at no sync that was done already."""
        self._checked = [slow.syncs for slow in slow_weights]

    def look(self, trainer: Trainer, pl_module: LightningModule, slow_weights: Sequence[SlowWeights]) -> None:
        """Compare those that have synced since the last look.

        Raises:
            RuntimeError: If a rank has drifted.
        """
        names = names_in(pl_module)
        for before, slow in zip(self._checked, slow_weights, strict=True):
            if slow.syncs != before and trainer.world_size > 1:
                check_ranks({names.get(p, ["(of another module)"])[0]: p for p in slow.values("fast")})
        self.begin(slow_weights)
