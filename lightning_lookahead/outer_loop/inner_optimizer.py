"""Which optimizers can be the inner optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim import Optimizer

if TYPE_CHECKING:
    from collections.abc import Iterator


def check_optimizer(optimizer: object) -> None:
    """Raise unless ``optimizer`` is a torch optimizer whose steps can be seen and that does not look ahead already."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        inside = next(inside_of(optimizer), None)
        way_out = f" Give the {type(inside).__name__} inside it." if inside is not None else ""
        message = f"optimizer is a {name}; it must be a torch.optim.Optimizer.{way_out}"
        raise TypeError(message)
    if _looks_ahead(optimizer):
        message = (
            f"optimizer is a {name}, which is Lookahead itself or contains it: it would pull back twice. Give the"
            " optimizer inside it (for Ranger and its like RAdam)."
        )
        raise ValueError(message)
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        message = (
            f"optimizer is a {name} that has never called torch.optim.Optimizer.__init__, so that nobody can see its"
            " steps. Give the optimizer inside it."
        )
        raise TypeError(message)
    in_backward = not {base.__name__ for base in type(optimizer).__mro__}.isdisjoint(_IN_BACKWARD)
    if in_backward or getattr(optimizer, "_overlap_with_ddp", False):  # ZeroRedundancyOptimizer(overlap_with_ddp=True)
        message = (
            f"optimizer is a {name}, which moves the weights within the backward and not in step(): there are no inner"
            " steps to count. Take another optimizer."
        )
        raise ValueError(message)


_IN_BACKWARD = ("LOMO", "AdaLOMO")
"""Optimizers whose update is fused into the backward."""


def inside_of(optimizer: object) -> Iterator[Optimizer]:
    """The optimizer that a wrapper has inside, the one inside that, and so on."""
    while True:
        inside = [getattr(optimizer, name, None) for name in ("optimizer", "base_optimizer", "base", "optim")]
        optimizer = next((own for own in inside if isinstance(own, Optimizer) and own is not optimizer), None)
        if optimizer is None:
            return
        yield optimizer


def _looks_ahead(optimizer: Optimizer) -> bool:
    """Whether an optimizer, or one that it wraps, contains Lookahead: Ranger is RAdam with Lookahead."""
    for own in (optimizer, *inside_of(optimizer)):
        names = [base.__name__ for base in type(own).__mro__]
        if any("lookahead" in name.lower() or name.startswith("Ranger") for name in names):
            return True
        if any("lookahead" in name.lower() for name in vars(own)):
            return True
    return False
