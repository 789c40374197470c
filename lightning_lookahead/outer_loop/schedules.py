"""alpha and k: numbers, or functions of the number of syncs done."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from numbers import Real

from lightning_lookahead._arguments import check_integer, check_k, check_real

from .adaptive import AdaptiveAlpha

StepSize = float | Callable[[int], float] | AdaptiveAlpha
"""alpha, a function of the number of syncs done that gives it, or an estimate."""
CycleLength = int | Callable[[int], float]
"""k, or a function of the number of syncs done that gives it; the value is rounded."""


class Schedule(ABC):
    """A value for each sync, from ``start`` to ``end``: an ``alpha`` or a ``k`` that changes in training."""

    def __init__(self, start: float, end: float, syncs: int) -> None:
        self.start = check_real(start, "start", math.isfinite, "it must be a finite number")
        self.end = check_real(end, "end", math.isfinite, "it must be a finite number")
        self.syncs = check_integer(syncs, "syncs", 1, "the length of a schedule")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(start={self.start}, end={self.end}, syncs={self.syncs})"

    def __call__(self, sync: int) -> float:
        """The value for a sync, of the number of syncs before it."""
        done = self._done(min(sync / self.syncs, 1.0))
        return (1 - done) * self.start + done * self.end

    @abstractmethod
    def _done(self, part: float) -> float:
        """The part of the way, 0 to 1, that is done after this part of the syncs."""


class Linear(Schedule):
    """From one value to another in equal steps.

    Args:
        start: The value for the first sync.
        end: The value after ``syncs`` syncs, and from then on.
        syncs: Syncs from one to the other; at least 1.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> [Linear(start=0.5, end=1.0, syncs=2)(sync) for sync in (0, 1, 2, 9)]
        [0.5, 0.75, 1.0, 1.0]
    """

    def _done(self, part: float) -> float:
        return part


class Cosine(Schedule):
    """From one value to another along half a cosine: slowly at both ends.

    Args:
        start: The value for the first sync.
        end: The value after ``syncs`` syncs, and from then on.
        syncs: Syncs from one to the other; at least 1.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> [round(Cosine(start=1.0, end=0.5, syncs=4)(sync), 3) for sync in (0, 1, 2, 4, 9)]
        [1.0, 0.927, 0.75, 0.5, 0.5]
    """

    def _done(self, part: float) -> float:
        return (1 - math.cos(math.pi * part)) / 2


def check_step_size(alpha: StepSize, check: Callable[[float, str], float]) -> StepSize:
    """Return ``alpha``; raise unless ``check`` accepts it, or its value at the first sync."""
    if isinstance(alpha, AdaptiveAlpha):
        return alpha
    first = alpha_at(alpha, 0, check)
    return alpha if callable(alpha) else first


def check_cycle_length(k: CycleLength) -> CycleLength:
    """Return ``k``; raise unless it is an integer of at least 1 or a function that begins with one."""
    if callable(k):
        k_at(k, 0)
        return k
    return check_k(k)


def alpha_at(alpha: float | Callable[[int], float], sync: int, check: Callable[[float, str], float]) -> float:
    """The step size for a sync; ``check`` raises if it is out of range."""
    return check(alpha(sync), f"alpha at sync {sync}") if callable(alpha) else check(alpha, "alpha")


def k_at(k: CycleLength, sync: int) -> int:
    """The inner steps of the cycle before a sync; raises if a schedule gives a value out of range."""
    if not callable(k):
        return k  # unchecked: called in every step
    value = k(sync)
    is_number = isinstance(value, Real) and math.isfinite(value)
    return check_k(round(value) if is_number else value, f"k at sync {sync}")  # type: ignore[arg-type]


def describe(value: StepSize | CycleLength) -> float | str:
    """A number, or the name of a function: what a checkpoint says of it."""
    if isinstance(value, (Schedule, AdaptiveAlpha)):
        return repr(value)
    if not callable(value):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)
