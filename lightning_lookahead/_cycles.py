"""Which parameters sync together, and when: an optimizer's groups may have a k and an alpha of their own."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from lightning_lookahead._numbers import check_alpha, check_k
from lightning_lookahead._saved_format import GROUP_SETTINGS
from lightning_lookahead.step_size import Length, StepSize, k_at

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_lookahead._settings import Settings


class Cycle:
    """The inner steps from one sync to the next.

    Attributes:
        step_size: That of the sync that ends it, or where it comes from.
        begins: Inner steps before it.
        syncs: Syncs before it.
    """

    def __init__(self, k: Length, alpha: StepSize, begins: int) -> None:
        self._k = k
        self.step_size = alpha
        self.begins, self.syncs = begins, 0

    @property
    def ends(self) -> int:
        """Inner steps before the sync that ends it."""
        return self.begins + k_at(self._k, self.syncs)


class Cycles:
    """The cycles of an optimizer: one, unless groups have a ``"lookahead_k"`` or ``"lookahead_alpha"`` of their own.

    Groups with the same settings share one. They are in the order in which the groups first name them.
    """

    def __init__(self, optimizer: Optimizer, settings: Settings) -> None:
        self._optimizer = optimizer
        self._k, self._alpha = settings.k, settings.alpha
        self._by_settings: dict[tuple[Any, Any], Cycle] = {}
        self.update(settings.start_step)

    def __iter__(self) -> Iterator[Cycle]:
        return iter(self._by_settings.values())

    def __len__(self) -> int:
        return len(self._by_settings)

    def update(self, step: int) -> None:
        """Look at the groups again, after ``step`` inner steps; what is new begins there, what no group has ends."""
        known = self._by_settings
        self._by_settings = {}
        for group in self._optimizer.param_groups:
            k, alpha = settings = _settings(group)
            cycle = known.get(settings) or Cycle(
                self._k if k is None else k, self._alpha if alpha is None else alpha, step
            )
            self._by_settings.setdefault(settings, cycle)

    def of(self, cycle: Cycle, kept: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Those of the parameters that sync at the end of a cycle, with their second tensors."""
        if len(self) == 1:
            return kept
        groups = [group for group in self._optimizer.param_groups if self._by_settings[_settings(group)] is cycle]
        own: Collection[Tensor] = {parameter for group in groups for parameter in group["params"]}
        return {parameter: value for parameter, value in kept.items() if parameter in own}


def _settings(group: dict[str, Any]) -> tuple[int | None, float | None]:
    """A group's own k and alpha, which are numbers: they are saved with the optimizer."""
    k, alpha = group.get("lookahead_k"), group.get("lookahead_alpha")
    return (
        None if k is None else check_k(k, "lookahead_k"),
        None if alpha is None else check_alpha(alpha, "lookahead_alpha"),
    )


def keep_settings(optimizer: Optimizer, own: list[dict[str, Any]]) -> None:
    """Give the optimizer's groups these settings of their own, with a warning if they have got others from a file."""
    for group, now in zip(optimizer.param_groups, own, strict=False):
        then = {name: group.pop(name) for name in GROUP_SETTINGS if name in group}
        if then != now:
            message = (
                f"The checkpoint's Lookahead settings of a group are {then}, and this run's {now}. Those are used."
            )
            warnings.warn(message, stacklevel=2)
        group.update(now)
