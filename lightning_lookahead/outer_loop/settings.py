"""The options of one outer loop: each once, with its default and its check."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from lightning_lookahead._arguments import (
    PullbackMomentum,
    check_alpha,
    check_bool,
    check_choice,
    check_integer,
    check_momentum,
)

from .adaptive import AdaptiveAlpha
from .schedules import CycleLength, StepSize, check_cycle_length, check_step_size, describe

if TYPE_CHECKING:
    from collections.abc import Mapping

Nonfinite = Literal["raise", "skip", "restore", "ignore"]
Buffers = Literal["keep", "sync"]
SlowDtype = Literal["float32", "float64", "bfloat16", "float16"]

_NOT_SAVED = {"saved": False}  # a run may resume with another value and is the same run, bit for bit


@dataclass(frozen=True)
class Settings:
    """The options of one outer loop, as `SlowWeights` documents them. They cannot be changed.

    To add an option: a field with its check here, and its place in the signatures and docstrings of `SlowWeights` and
    `LookaheadCallback`. Checkpoints hold it from then on, and a run that resumes is compared with it.

    Raises:
        ValueError: If an option is out of range.
    """

    k: CycleLength = 5
    alpha: StepSize = 0.5
    start_step: int = 0
    pullback_momentum: PullbackMomentum = "none"
    nonfinite: Nonfinite = field(default="raise", metadata=_NOT_SAVED)
    slow_dtype: str | None = None
    slow_device: str | None = field(default=None, metadata=_NOT_SAVED)
    buffers: Buffers = "keep"
    outer_momentum: float = 0.0
    outer_nesterov: bool = True

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> Settings:
        """The options among the arguments of a function: each has the name of its field."""
        return cls(**{f.name: arguments[f.name] for f in fields(cls)})

    def __post_init__(self) -> None:
        checked = {
            "outer_momentum": check_momentum(self.outer_momentum, "outer_momentum"),
            "outer_nesterov": check_bool(self.outer_nesterov, "outer_nesterov"),
            "k": check_cycle_length(self.k),
            "alpha": check_step_size(self.alpha, self.check_alpha),
            "start_step": check_integer(self.start_step, "start_step", 0),
        }
        for name, value in checked.items():  # NumPy's numbers are Python's now: files hold them
            object.__setattr__(self, name, value)
        check_choice("pullback_momentum", self.pullback_momentum, get_args(PullbackMomentum))
        check_choice("nonfinite", self.nonfinite, get_args(Nonfinite))
        check_choice("buffers", self.buffers, get_args(Buffers))
        dtype_of(self.slow_dtype)
        device_of(self.slow_device)
        if self.outer_momentum:
            self._check_momentum()

    def _check_momentum(self) -> None:
        """Raise if an option does not work with outer momentum."""
        with_momentum = f"does not work with outer_momentum={self.outer_momentum}"
        if isinstance(self.alpha, AdaptiveAlpha):
            message = (
                f"alpha={self.alpha} {with_momentum}: it estimates the best point between phi and theta, and momentum"
                " ends elsewhere. Give a number or a schedule."
            )
            raise ValueError(message)  # noqa: TRY004 (it is the pair that is wrong)
        if self.pullback_momentum == "pullback":
            message = (
                f"pullback_momentum='pullback' {with_momentum}: it moves the inner momentum a part alpha of the way,"
                " and the weights go another distance. Give 'none' or 'reset'."
            )
            raise ValueError(message)

    @property
    def takes_theta(self) -> bool:
        """Whether a sync lets phi be theta."""
        return self.alpha == 1 and not self.outer_momentum

    def check_alpha(self, alpha: float, name: str = "alpha") -> float:
        """Return ``alpha`` as a float; raise unless it is in (0, 1], or with outer momentum in its range."""
        return check_alpha(alpha, name, momentum=self.outer_momentum, nesterov=self.outer_nesterov)

    def saved(self) -> dict[str, Any]:
        """The options that a checkpoint holds, as numbers and strings; without outer momentum nothing of it."""
        left_out = set() if self.outer_momentum else {"outer_momentum", "outer_nesterov"}
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("saved", True)}
        return {
            name: describe(value) if name in {"k", "alpha"} else value
            for name, value in named.items()
            if name not in left_out
        }


def warn_of_differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Warn once if a run resumes with settings that differ from the saved ones; unsaved ones are passed over."""
    before, now = ({"outer_momentum": 0.0, "share_gradients": True, **settings} for settings in (saved, own))
    changed = [
        f"{name} was {before[name]!r} and is {now[name]!r}" for name in now if before.get(name, now[name]) != now[name]
    ]
    if changed:
        message = f"The Lookahead checkpoint has other settings: {'; '.join(changed)}. This run's own are used."
        if now["outer_momentum"] and not before["outer_momentum"]:
            message += " The outer momentum starts at zero."
        warnings.warn(message, stacklevel=3)


def dtype_of(slow_dtype: str | None) -> torch.dtype | None:
    """The dtype of this name; raises if it is not allowed."""
    if slow_dtype is None:
        return None
    check_choice("slow_dtype", slow_dtype, get_args(SlowDtype))
    found: torch.dtype = getattr(torch, slow_dtype)
    return found


def device_of(slow_device: str | None) -> torch.device | None:
    """The device of this name; raises if there is no such device."""
    if slow_device is None:
        return None
    try:
        found = torch.device(slow_device)
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    if found.type == "meta":  # which holds no values
        message = f"slow_device={slow_device!r} is unknown: give 'cpu', or leave it out."
        raise ValueError(message)
    return found
