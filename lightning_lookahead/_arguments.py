"""What is said of k, alpha and one of some choices. Without torch: the theory has the same arguments."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Literal, SupportsIndex

PullbackMomentum = Literal["none", "pullback", "reset"]
"""What a sync does to the inner momentum: nothing, the way of the weights, or a fresh start."""


def check_k(k: SupportsIndex, name: str = "k") -> int:
    """Return ``k`` as an int; raise unless it is an integer of at least 1."""
    if isinstance(k, bool) or not hasattr(k, "__index__") or operator.index(k) < 1:
        message = f"{name}={k!r} is out of range: the inner steps between two syncs must be an integer of at least 1."
        raise ValueError(message)
    return operator.index(k)


def check_alpha(alpha: float, name: str = "alpha") -> float:
    """Return ``alpha`` as a float; raise unless it is a number in (0, 1]."""
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 < alpha <= 1:
        message = f"{name}={alpha!r} is out of range: the slow weights step size must be a number in (0, 1]."
        raise ValueError(message)
    return float(alpha)


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of the choices."""
    if value not in choices:
        message = f"{argument}={value!r} is unknown: give {' or '.join(map(repr, choices))}."
        raise ValueError(message)
