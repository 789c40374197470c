"""Fast weights that are NaN or infinite at a sync: whether there are any, and what is said of them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from .sharding import any_rank
from .tensors import copy_

if TYPE_CHECKING:
    from .batch_norm import SlowStatistics
    from .momentum import Momentum
    from .parameters import Parameters
    from .settings import Nonfinite
    from .weight_pairs import Moving


def all_finite(moving: Moving, nonfinite: Nonfinite, parameters: Parameters) -> bool:
    """Whether all fast weights are finite; if not, warn, or raise if ``nonfinite`` says so.

    Args:
        moving: What the sync moves, nothing perhaps.
        nonfinite: What to do.
        parameters: What they are called, and whether they are spread over ranks, which all have to do the same.

    Raises:
        RuntimeError: With the name of the first parameter that is not.
    """
    bad = moving.not_finite()
    found = bool(bad)
    if parameters.sharded and nonfinite != "raise":  # also of a rank that has no piece of what was trained
        found = any_rank(found, parameters.device)
    if not found:
        return True
    first = parameters.describe(moving.fast[bad[0]]) if bad else "A parameter on another rank"
    what = f"{first} has a value that is not finite, and so have {max(len(bad) - 1, 0)} others"
    if nonfinite == "raise":
        message = (
            f"{what}: the slow weights are as they were after the last sync. Lower the learning rate or clip gradients,"
            " or go on with nonfinite='skip' or 'restore'."
        )
        raise RuntimeError(message)
    warnings.warn(f"Lookahead: {what}: nonfinite={nonfinite!r}, no sync.", stacklevel=4)
    return False


def restore(moving: Moving, momentum: Momentum, statistics: SlowStatistics) -> None:
    """Put everything back to where it was after the last sync, with the state of a new inner optimizer."""
    copy_(moving.fast, moving.slow)
    momentum.forget(moving.fast)  # what made the weights NaN or infinite is in there, too
    statistics.restore()
