"""Fast weights that are NaN or infinite at a sync: to find them, and to go back to the slow weights."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from .sharding import any_rank
from .tensors import copy_

if TYPE_CHECKING:
    from .batch_norm import SlowStatistics
    from .momentum import Momentum
    from .moving import Moving
    from .parameters import Parameters
    from .settings import Nonfinite
    from .weight_pairs import WeightPairs
    from .workers import Workers


def all_finite(moving: Moving, nonfinite: Nonfinite, parameters: Parameters, workers: Workers | None = None) -> bool:
    """Whether all fast weights are finite, or nobody asks; if not, warn, or raise if ``nonfinite`` says so.

    Args:
        moving: The weights that the sync moves; may be none.
        nonfinite: ``"raise"`` raises; ``"skip"`` and ``"restore"`` warn; ``"ignore"`` looks at nothing.
        parameters: Names for the message. If they are sharded, all ranks take part and get one answer.
        workers: Ranks that train apart: they get one answer, too.

    Raises:
        RuntimeError: With the name of the first parameter that is not finite.
    """
    if nonfinite == "ignore":
        return True
    bad = moving.not_finite()
    found = bool(bad)
    if parameters.sharded and nonfinite != "raise":  # a rank without a piece takes part, too
        found = any_rank(found, parameters.device)
    if workers is not None:
        found = workers.any(found)
    if not found:
        return True
    first = parameters.describe(moving.fast[bad[0]]) if bad else "A parameter on another rank"
    more = f", as have {len(bad) - 1} more" if len(bad) > 1 else ""
    what = f"{first} has a value that is NaN or infinite{more}"
    if nonfinite == "raise":
        message = (
            f"{what}: the slow weights are as they were after the last sync. Lower the learning rate or clip gradients,"
            " or go on with nonfinite='skip' or 'restore'."
        )
        raise RuntimeError(message)
    warnings.warn(f"Lookahead: {what}: nonfinite={nonfinite!r}, no sync.", stacklevel=4)
    return False


def restore(moving: Moving, pairs: WeightPairs, momentum: Momentum, statistics: SlowStatistics) -> None:
    """Put weights and statistics back to where the last sync left them; reset the inner and the outer momentum."""
    copy_(moving.fast, moving.slow)
    pairs.outer_momentum.forget(moving.fast)
    momentum.forget(moving.fast)  # its moments may be NaN or infinite, too
    statistics.restore()
