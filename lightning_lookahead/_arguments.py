"""Checks of arguments that the outer loop and the theory share. Imports no torch: the theory needs none."""

from __future__ import annotations

import operator
from numbers import Real
from typing import TYPE_CHECKING, Literal, SupportsIndex

if TYPE_CHECKING:
    from collections.abc import Callable

PullbackMomentum = Literal["none", "pullback", "reset"]
"""What a sync does to the inner momentum: leave it alone, pull it back as it does the weights, or remove it."""


def check_integer(value: SupportsIndex, name: str, least: int, what: str = "it") -> int:
    """Return ``value`` as an int; raise unless it is an integer of at least ``least``.

    Args:
        value: What was given. NumPy's integers are integers, a bool is none.
        name: The argument's name.
        least: The least value that is allowed.
        what: What the error calls the argument.

    Raises:
        ValueError: If ``value`` is out of range.
    """
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        message = f"{name}={value!r} is out of range: {what} must be an integer of at least {least}."
        raise ValueError(message)
    return number


def check_real(value: float, name: str, allowed: Callable[[float], bool], what: str) -> float:
    """Return ``value`` as a float; raise unless it is a real number that is allowed.

    Args:
        value: What was given. A bool is no number.
        name: The argument's name.
        allowed: Whether a number is in the range.
        what: What the error says of the range.

    Raises:
        ValueError: If ``value`` is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not allowed(value):
        message = f"{name}={value!r} is out of range: {what}."
        raise ValueError(message)
    return float(value)


def check_k(k: SupportsIndex, name: str = "k") -> int:
    """Return ``k`` as an int; raise unless it is an integer of at least 1."""
    return check_integer(k, name, 1, "the inner steps between two syncs")


def check_alpha(alpha: float, name: str = "alpha") -> float:
    """Return ``alpha`` as a float; raise unless it is a number in (0, 1]."""
    return check_real(alpha, name, lambda a: 0 < a <= 1, "the slow weights step size must be a number in (0, 1]")


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of the choices."""
    if value not in choices:
        message = f"{argument}={value!r} is unknown: give {' or '.join(map(repr, choices))}."
        raise ValueError(message)
