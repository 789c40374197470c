"""The minimum of a function of one number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Function = Callable[[NDArray[np.float64]], NDArray[np.float64]]

_CANDIDATES = 5
_ROUNDS, _FINE = 6, 17  # each round narrows the bracket by 8; an odd number keeps the middle among the points


def lowest(function: Function, low: float, high: float, points: int) -> float:
    """Where a function from ``low`` to ``high`` is lowest, as far as a grid can tell.

    The five lowest local minima among equally spaced points are refined between their neighbours: the order of the
    refined ones may differ.
    """
    grid = np.linspace(low, high, points)
    values = function(grid)
    padded = np.concatenate([[np.inf], values, [np.inf]])
    minima = np.flatnonzero((values <= padded[:-2]) & (values <= padded[2:]))
    found = [_refine(function, grid, best) for best in minima[values[minima].argsort()][:_CANDIDATES].tolist()]
    return found[int(function(np.array(found)).argmin())]


def _refine(function: Function, grid: NDArray[np.float64], best: int) -> float:
    for _ in range(_ROUNDS):
        grid = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, grid.size - 1)], _FINE)
        best = int(function(grid).argmin())
    return float(grid[best])
