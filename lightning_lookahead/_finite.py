"""Fast weights that are infinite or no number, at a sync: whether there are any, and what is said of them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from lightning_lookahead._sharding import any_rank

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from lightning_lookahead._cycles import Moving


def all_finite(
    moving: Moving, nonfinite: str, name: Callable[[Tensor], str], *, shared_on: torch.device | None
) -> bool:
    """Whether all fast weights are finite; if not, warn, or raise if ``nonfinite`` says so.

    Args:
        moving: What the sync moves, nothing perhaps.
        nonfinite: What to do.
        name: What a parameter is called.
        shared_on: If the weights are spread over ranks, which all have to do the same: the device that they talk on.

    Raises:
        RuntimeError: With the name of the first parameter that is not.
    """
    bad = moving.not_finite()
    found = bool(bad)
    if shared_on is not None and nonfinite != "raise":  # also of a rank that has no piece of what was trained
        found = any_rank(found, shared_on)
    if not found:
        return True
    first = name(moving.fast[bad[0]]) if bad else "A parameter on another rank"
    what = f"{first} has a value that is not finite, and so have {max(len(bad) - 1, 0)} others"
    if nonfinite == "raise":
        message = (
            f"{what}: the slow weights are as they were after the last sync. Lower the learning rate or clip gradients,"
            " or go on with nonfinite='skip' or 'restore'."
        )
        raise RuntimeError(message)
    warnings.warn(f"Lookahead: {what}: nonfinite={nonfinite!r}, no sync.", stacklevel=4)
    return False
