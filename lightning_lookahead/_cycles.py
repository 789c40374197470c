"""Which parameters sync together, and when: an optimizer's groups may have a k and an alpha of their own."""

from __future__ import annotations

import operator
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_lookahead._cpu_buckets import CpuBuckets
from lightning_lookahead._numbers import check_alpha, check_k
from lightning_lookahead._saved_format import GROUP_SETTINGS
from lightning_lookahead._tensors import not_finite
from lightning_lookahead.step_size import Length, StepSize, k_at

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_lookahead._settings import Settings


@dataclass
class Moving:
    """What a sync moves: fast weights, a slow tensor of each, and both arranged for a CPU."""

    fast: list[Tensor]
    slow: list[Tensor]
    buckets: CpuBuckets | None = None

    def not_finite(self) -> list[int]:
        """Which of the fast weights have a value that is NaN or infinite."""
        return not_finite(self.fast) if self.buckets is None else self.buckets.not_finite()


class Cycle:
    """The inner steps from one sync to the next, of the parameters that the sync moves.

    Attributes:
        step_size: That of the sync that ends it, or where it comes from.
        begins: Inner steps before it.
        syncs: Syncs before it.
        weights: Its parameters, theta -> phi.
    """

    def __init__(self, k: Length, alpha: StepSize, begins: int) -> None:
        self._k = k
        self.step_size = alpha
        self.begins, self.syncs = begins, 0
        self.weights: dict[Tensor, Tensor] = {}
        self._moving = Moving([], [])

    @property
    def ends(self) -> int:
        """Inner steps before the sync that ends it."""
        return self.begins + k_at(self._k, self.syncs)

    def moving(self, idle: Collection[Tensor]) -> Moving:
        """What its sync moves: all but the ``idle``; arranged anew only if they are others or elsewhere than before."""
        own = {p: phi for p, phi in self.weights.items() if p not in idle} if idle else self.weights
        fast, slow, known = list(own), list(own.values()), self._moving
        if not (_same(known.fast, fast) and _same(known.slow, slow) and (known.buckets is None or known.buckets.fit)):
            self._moving = Moving(fast, slow, CpuBuckets.arranged(fast, slow))
        return self._moving

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_moving": Moving([], [])}


class Cycles:
    """The cycles of an optimizer: one, unless groups have a ``"lookahead_k"`` or ``"lookahead_alpha"`` of their own.

    Groups with the same settings share one. They are in the order in which the groups first name them.
    """

    def __init__(self, optimizer: Optimizer, settings: Settings) -> None:
        self._optimizer = optimizer
        self._k, self._alpha = settings.k, settings.alpha
        self._by_settings: dict[tuple[Any, Any], Cycle] = {}
        self.update(settings.start_step, {})

    def __iter__(self) -> Iterator[Cycle]:
        return iter(self._by_settings.values())

    def __len__(self) -> int:
        return len(self._by_settings)

    def update(self, step: int, weights: dict[Tensor, Tensor]) -> None:
        """Look at the groups again.

        Args:
            step: Inner steps taken: what is new begins there. What no group has ends.
            weights: theta -> phi of all trained parameters; each cycle takes its own.
        """
        known, self._by_settings = self._by_settings, {}
        groups: dict[Cycle, list[dict[str, Any]]] = {}
        for group in self._optimizer.param_groups:
            k, alpha = settings = _settings(group)
            cycle = known.get(settings) or Cycle(
                self._k if k is None else k, self._alpha if alpha is None else alpha, step
            )
            groups.setdefault(self._by_settings.setdefault(settings, cycle), []).append(group)
        for cycle, own in groups.items():
            cycle.weights = weights if len(groups) == 1 else _those_of(own, weights)


def _those_of(groups: list[dict[str, Any]], weights: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    own = {parameter for group in groups for parameter in group["params"]}
    return {parameter: phi for parameter, phi in weights.items() if parameter in own}


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(operator.is_, left, right))


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
