"""Fast weights that are infinite or no number, at a sync: whether there are any, and what is said of them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from lightning_lookahead._sharding import any_rank
from lightning_lookahead._tensors import not_finite

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def all_finite(weights: list[Tensor], nonfinite: str, name: Callable[[Tensor], str], *, sharded: bool) -> bool:
    """Whether all weights are finite; if not, warn, or raise if ``nonfinite`` says so.

    Raises:
        RuntimeError: With the name of the first parameter that is not.
    """
    bad = not_finite(weights)
    found = bool(bad)
    if sharded and weights and nonfinite != "raise":  # all ranks have to do the same
        found = any_rank(found, weights[0].device)
    if not found:
        return True
    first = name(weights[bad[0]]) if bad else "A parameter on another rank"
    what = f"{first} has a value that is not finite, and so have {max(len(bad) - 1, 0)} others"
    if nonfinite == "raise":
        message = (
            f"{what}: the slow weights are as they were after the last sync. Lower the learning rate or clip gradients,"
            " or go on with nonfinite='skip' or 'restore'."
        )
        raise RuntimeError(message)
    warnings.warn(f"Lookahead: {what}: nonfinite={nonfinite!r}, no sync.", stacklevel=4)
    return False
