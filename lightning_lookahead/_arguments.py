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


def check_alpha(alpha: float, name: str = "alpha", *, momentum: float = 0.0, nesterov: bool = True) -> float:
    """Return ``alpha`` as a float; raise unless it is in (0, 1], or with outer momentum in (0, `largest_alpha`)."""
    if not momentum:
        return check_real(alpha, name, lambda a: 0 < a <= 1, "the slow weights step size must be a number in (0, 1]")
    most = largest_alpha(momentum, nesterov=nesterov)
    what = (
        f"with an outer momentum of {momentum}{' (Nesterov)' if nesterov else ''} the slow weights step size must be a"
        f" number in (0, {most:.4g}), as from there on the outer loop diverges"
    )
    return check_real(alpha, name, lambda a: 0 < a < most, what)


def largest_alpha(momentum: float, *, nesterov: bool) -> float:
    """The alpha from which outer steps with momentum diverge on a quadratic whose optimum each inner loop reaches.

    There s is the distance from phi to the optimum, and the outer loop is gradient descent with momentum on a curvature
    of 1: it converges below ``2 (1 + mu)``, with Nesterov's momentum below ``2 (1 + mu) / (1 + 2 mu)``.
    """
    return 2 * (1 + momentum) / (1 + 2 * momentum if nesterov else 1)


def check_momentum(momentum: float, name: str = "momentum") -> float:
    """Return ``momentum`` as a float; raise unless it is a number in [0, 1)."""
    return check_real(momentum, name, lambda mu: 0 <= mu < 1, "it must be a number in [0, 1)")


def check_bool(value: bool, name: str) -> bool:  # noqa: FBT001
    """Return ``value`` as a bool; raise unless it is one, Python's or NumPy's."""
    if type(value).__name__ not in {"bool", "bool_"}:
        message = f"{name}={value!r} is out of range: it must be True or False."
        raise ValueError(message)
    return bool(value)


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of the choices."""
    if value not in choices:
        message = f"{argument}={value!r} is unknown: give {' or '.join(map(repr, choices))}."
        raise ValueError(message)
