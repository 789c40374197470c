"""The figures of a run's syncs, for loggers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_lookahead.outer_loop.slow_weights import SlowWeights


def figures(slow_weights: Sequence[SlowWeights], *, syncs: bool) -> dict[str, float]:
    """The figures of each optimizer, by log key: ``syncs`` and ``alpha`` if ``syncs``, ``distance`` if measured."""
    found: dict[str, float] = {}
    for index, slow in enumerate(slow_weights):
        own: dict[str, float] = {}
        if syncs:
            own["syncs"] = float(slow.syncs)
            if slow.alpha.last is not None and (not isinstance(slow.settings.alpha, float) or len(slow.cycles) > 1):
                own["alpha"] = slow.alpha.last
        if slow.last_distance is not None:
            own["distance"] = float(slow.last_distance)
        suffix = f"/{index}" if len(slow_weights) > 1 else ""
        found.update({f"lookahead/{name}{suffix}": value for name, value in own.items()})
    return found
