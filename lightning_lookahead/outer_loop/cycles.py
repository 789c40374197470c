"""Which parameters sync together, and when: an optimizer's groups may have a k and an alpha of their own."""

from __future__ import annotations

import operator
import warnings
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

from lightning_lookahead._arguments import check_k

from .inner_steps import InnerSteps
from .moving import Moving
from .saved_format import GROUP_SETTINGS
from .schedules import CycleLength, StepSize, k_at

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from torch import Tensor
    from torch.optim import Optimizer

    from .outer_momentum import MomentumBuffers
    from .parameters import Parameters
    from .settings import Settings
    from .weight_pairs import WeightPairs


class Cycle:
    """The inner steps from one sync to the next, of the parameters that the sync moves.

    Attributes:
        step_size: alpha of the sync that ends the cycle: a number, a schedule or an `AdaptiveAlpha`.
        begins: Inner steps before the cycle.
        syncs: Syncs before the cycle.
        weights: theta -> phi of the cycle's parameters.
        moving: The weights that the sync moves; set by `split`.
        still: theta -> phi of the weights that the sync leaves where they are; set by `split`.
    """

    def __init__(self, k: CycleLength, alpha: StepSize, begins: int) -> None:
        self._k = k
        self.step_size = alpha
        self.begins, self.syncs = begins, 0
        self.weights: dict[Tensor, Tensor] = {}
        self.moving = Moving([], [])
        self.still: dict[Tensor, Tensor] = {}
        self._sorted: dict[Tensor, Tensor] | None = None  # the weights when `moving` was made of all of them

    @property
    def ends(self) -> int:
        """Inner steps before the sync that ends the cycle."""
        return self.begins + k_at(self._k, self.syncs)

    def split(self, idle: Collection[Tensor], buffers: MomentumBuffers) -> None:
        """Set what the sync moves: all weights but the ``idle`` ones. They are sorted anew only if they are others."""
        self.still = {p: phi for p, phi in self.weights.items() if p in idle} if idle else {}
        if self.still or self._sorted is not self.weights or not self.moving.fits:
            own = {p: phi for p, phi in self.weights.items() if p not in self.still} if self.still else self.weights
            fast, slow, known = list(own), list(own.values()), self.moving
            if not (_same(known.fast, fast) and _same(known.slow, slow) and known.fits):
                self.moving = Moving(fast, slow)
            self._sorted = None if self.still else self.weights
        self.moving.outer_momentum = buffers.of(self.moving.fast, self.moving.slow)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "moving": Moving([], []), "still": {}, "_sorted": None}


class Cycles:
    """The cycles of an optimizer: one, unless groups have a ``"lookahead_k"`` or ``"lookahead_alpha"`` of their own.

    Groups with equal settings share one cycle. Cycles are in the order of the first group of each.

    Args:
        optimizer: The inner optimizer.
        settings: ``k`` and ``alpha`` for groups without their own, and ``start_step``.
        parameters: The optimizer's parameters.
        attempts: Whether a step counts that was attempted and moved nothing.

    Attributes:
        next_end: Inner steps before the next sync: all that an ordinary step has to compare.
    """

    def __init__(
        self, optimizer: Optimizer, settings: Settings, parameters: Parameters, *, attempts: bool = False
    ) -> None:
        self._optimizer, self.steps = optimizer, InnerSteps(optimizer, parameters, attempts=attempts)
        self._settings, self._start = settings, settings.start_step
        self._by_settings: dict[tuple[Any, Any], Cycle] = {}
        self._seen: tuple[dict[Tensor, Tensor], list[Any]] = {}, []  # weights and settings at the last look
        self.update({})

    def __iter__(self) -> Iterator[Cycle]:
        return iter(self._by_settings.values())

    def __len__(self) -> int:
        return len(self._by_settings)

    def update(self, weights: dict[Tensor, Tensor]) -> None:
        """Look at the groups again: begin the cycles of new settings, drop the cycles that no group has.

        Args:
            weights: theta -> phi of all trained parameters; each cycle takes those of its groups.
        """
        seen = (
            weights,
            [(group.get("lookahead_k"), group.get("lookahead_alpha")) for group in self._optimizer.param_groups],
        )
        if weights is self._seen[0] and seen[1] == self._seen[1]:
            return
        self._seen = seen
        known, self._by_settings = self._by_settings, {}
        groups: dict[Cycle, list[dict[str, Any]]] = {}
        for group in self._optimizer.param_groups:
            k, alpha = own = self._own(group)
            cycle = known.get(own) or Cycle(
                self._settings.k if k is None else k, self._settings.alpha if alpha is None else alpha, self._now
            )
            groups.setdefault(self._by_settings.setdefault(own, cycle), []).append(group)
        for cycle, members in groups.items():
            cycle.weights = weights if len(groups) == 1 else _those_of(members, weights)
        self.steps.look_again()
        self._look_ahead()

    def _look_ahead(self) -> None:
        self.next_end = min(cycle.ends for cycle in self)

    def _own(self, group: dict[str, Any]) -> tuple[int | None, float | None]:
        """A group's own k and alpha, which are numbers: they are saved with the optimizer."""
        k, alpha = group.get("lookahead_k"), group.get("lookahead_alpha")
        return (
            None if k is None else check_k(k, "lookahead_k"),
            None if alpha is None else self._settings.check_alpha(alpha, "lookahead_alpha"),
        )

    @property
    def _now(self) -> int:
        """Inner steps so far, at least ``start_step``."""
        return max(self.steps.total, self._start)

    @property
    def first(self) -> Cycle:
        """The cycle of the optimizer's first group."""
        return next(iter(self))

    def since(self, cycle: Cycle) -> int:
        """Inner steps since a cycle began."""
        return max(self.steps.total - cycle.begins, 0)

    def ended(self) -> list[Cycle]:
        """The cycles whose ``k`` inner steps were taken; reads the device only if there may be one."""
        return [cycle for cycle in self if self.steps.reached(cycle.ends)]

    def begun(self) -> list[Cycle]:
        """The cycles with at least one inner step."""
        return [cycle for cycle in self if self.since(cycle)]

    def to_sync(self, pairs: WeightPairs, *, unfinished: bool) -> list[Cycle]:
        """Prepare and return the cycles that a sync ends: the ended ones or else all, or those with an inner step."""
        pairs.track_replaced()
        self.update(pairs.counterparts)
        found = self.begun() if unfinished else self.ended() or list(self)
        for cycle in found:
            idle = pairs.idle
            if not self.since(cycle):  # nothing can be said of gradients, but momentum does not move what is frozen
                momentum = self._settings.outer_momentum
                idle = {p: None for p in idle if not p.requires_grad} if momentum else {}
            cycle.split(idle, pairs.outer_momentum)
        return found

    @property
    def at_sync(self) -> bool:
        """Whether theta is phi: training has not begun, or no inner step was taken since a sync."""
        return not self.begun() and (not self.steps.total or any(cycle.syncs for cycle in self))

    @property
    def steps_since_sync(self) -> int:
        """Inner steps since the last sync; of several cycles the largest number."""
        return max(self.since(cycle) for cycle in self)

    def begin_next(self, cycle: Cycle) -> None:
        """Begin a cycle again, after its sync."""
        cycle.begins = self._now
        self._look_ahead()

    def counters(self) -> dict[str, Any]:
        """Counts of steps and syncs, for a checkpoint."""
        first, *others = [{"steps_since_sync": self.since(cycle), "syncs": cycle.syncs} for cycle in self]
        return {"steps": self.steps.total, **first, **({"groups": others} if others else {})}

    def restore(self, saved: dict[str, Any], weights: dict[Tensor, Tensor]) -> None:
        """Go on from saved counts."""
        self.steps.restore(saved["steps"])
        self.update(weights)
        new = {"steps_since_sync": 0, "syncs": 0}  # of groups that were added since
        for cycle, own in zip(self, chain([saved, *saved.get("groups", [])], repeat(new)), strict=False):
            cycle.begins = max(saved["steps"] - own["steps_since_sync"], self._start)
            cycle.syncs = own["syncs"]
        self._look_ahead()


def _those_of(groups: list[dict[str, Any]], weights: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    own = {parameter for group in groups for parameter in group["params"]}
    return {parameter: phi for parameter, phi in weights.items() if parameter in own}


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(operator.is_, left, right))


class KeptSettings:
    """Keeps the ``lookahead_k`` and ``lookahead_alpha`` of this run's groups while a state with others is loaded."""

    def __init__(self) -> None:
        self._own: list[dict[str, Any]] = []

    def before(self, optimizer: Optimizer, _: object) -> None:
        """Remember the settings of this run's groups."""
        self._own = [
            {name: group[name] for name in GROUP_SETTINGS if name in group} for group in optimizer.param_groups
        ]

    def after(self, optimizer: Optimizer) -> None:
        """Put the remembered settings back, with a warning if the file has others."""
        for group, now in zip(optimizer.param_groups, self._own, strict=False):
            then = {name: group.pop(name) for name in GROUP_SETTINGS if name in group}
            if then != now:
                message = f"The checkpoint's Lookahead settings of a group are {then}. This run's are used: {now}."
                warnings.warn(message, stacklevel=2)
            group.update(now)
