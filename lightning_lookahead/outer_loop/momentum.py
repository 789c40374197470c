"""What a sync does to the inner optimizer's state: nothing, a pullback of the momentum, or a reset."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .algorithm import outer_step
from .inner_optimizer import inside_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_lookahead._arguments import PullbackMomentum

FIRST_MOMENTS = ("momentum_buffer", "exp_avg")
"""Names of the moving average of the gradient in optimizers' states."""

_PROBED = {"capturable": False, "fused": None, "foreach": None}
"""Settings with which a probe, a new optimizer of the class, can step on the CPU."""


class Momentum:
    """Changes the state of an inner optimizer after a sync.

    ``"none"`` leaves the state alone. ``"reset"`` makes it the state of a new optimizer: moments, step counters,
    whatever the class keeps. ``"pullback"`` moves the first moment ``m`` from ``m'``, its value after the last sync and
    zero at the start: ``m <- m' + alpha (m - m')``. It keeps a copy of the first moments.

    Args:
        optimizer: The inner optimizer.
        mode: ``"none"``, ``"reset"`` or ``"pullback"``.
        sharded: Whether the parameters are sharded. A reset then overwrites the state and removes no entry: entries
            that a folder of shards lacks, `torch.distributed.checkpoint` does not load.
        restores: Whether `forget` may be called.

    Attributes:
        names: First moments that the optimizer keeps; empty unless the mode is ``"pullback"``.

    Raises:
        ValueError: If ``mode`` would do nothing for this optimizer, or needs a state that is out of reach.

    Source: Zhang, Lucas, Hinton, Ba 2019, section 3 and appendix; the official code's ``pullback_momentum``.
    """

    def __init__(
        self, optimizer: Optimizer, mode: PullbackMomentum, *, sharded: bool = False, restores: bool = False
    ) -> None:
        self.mode = mode
        self.previous: dict[str, dict[Tensor, Tensor]] = {}
        """First moments after the last sync: name -> parameter -> value; an absent one is zero."""
        self._optimizer = optimizer
        self._sharded = sharded
        self.names: list[str] = []
        self._warned = False  # that there is no momentum to pull back
        if mode != "none" or restores:
            _check_own_state(optimizer, f"pullback_momentum={mode!r}" if mode != "none" else "nonfinite='restore'")
        if mode != "none":
            self._check()
        if sharded and (mode == "reset" or restores):
            for group in optimizer.param_groups:
                check_start_anew(optimizer, group, "nonfinite='restore'" if restores else "pullback_momentum='reset'")

    def after_sync(self, parameters: Collection[Tensor], alpha: float) -> None:
        """Pull back or reset the state of these parameters, by the mode."""
        if self.mode == "reset":
            self.reset(parameters)
        elif self.mode == "pullback":
            pulled = [self._pull_back(name, parameters, alpha) for name in FIRST_MOMENTS]
            own = next((self._optimizer.state[p] for p in parameters if self._optimizer.state.get(p)), None)
            if own and not any(pulled) and not self._warned:  # the class could not be probed before training
                self._warned = True
                message = (
                    f"pullback_momentum='pullback' does nothing: of a parameter {type(self._optimizer).__name__} keeps"
                    f" {', '.join(map(str, own))}, and no momentum as a tensor (momentum_buffer, exp_avg). Give 'none'."
                )
                warnings.warn(message, stacklevel=2)

    def restore(self, entries: dict[str, dict[Tensor, Tensor]]) -> None:
        """Take saved first moments, as they were after the last sync."""
        if self.mode == "pullback":
            self.previous = {
                name: {parameter: value.to(parameter.device, copy=True) for parameter, value in entries[name].items()}
                for name in FIRST_MOMENTS
                if name in entries
            }

    def _pull_back(self, name: str, parameters: Collection[Tensor], alpha: float) -> bool:
        """Pull back the first moment of this name; return whether the optimizer keeps one."""
        state = self._optimizer.state
        owners = [p for p in parameters if isinstance(state.get(p, {}).get(name), torch.Tensor)]
        if not owners:
            return False
        moments: list[Tensor] = [state[parameter][name] for parameter in owners]
        previous = self.previous.setdefault(name, {})
        for parameter, moment in zip(owners, moments, strict=True):
            if parameter not in previous:
                previous[parameter] = torch.zeros_like(moment)
        outer_step(moments, [previous[parameter] for parameter in owners], alpha)
        return True

    def forget(self, parameters: Collection[Tensor]) -> None:
        """Reset the state of these parameters, and the first moments after the last sync with it."""
        self.reset(parameters)
        for own in self.previous.values():
            for parameter in parameters:
                own.pop(parameter, None)

    def reset(self, parameters: Collection[Tensor]) -> None:
        """Make the state of these parameters the state of a new optimizer, in any mode."""
        for group in self._optimizer.param_groups:
            early = _makes_state_early(self._optimizer, group)
            as_weights = begins_as_weights(self._optimizer, group) if self._sharded else set()
            for parameter in set(parameters).intersection(group["params"]):
                if self._sharded:
                    _start_anew(self._optimizer.state.get(parameter, {}), group, parameter, as_weights)
                    continue
                self._optimizer.state.pop(parameter, None)
                if early:
                    self._optimizer.state[parameter] = _new(self._optimizer, group, parameter).state[parameter]

    def _check(self) -> None:
        """Raise if no group of the optimizer keeps the state that the mode changes."""
        known = set().union(*(state_names(self._optimizer, group) for group in self._optimizer.param_groups))
        self.names = [name for name in FIRST_MOMENTS if name in known and self.mode == "pullback"]
        if not (known if self.mode == "reset" else self.names):
            what = "state" if self.mode == "reset" else "momentum as a tensor (momentum_buffer, exp_avg)"
            message = (
                f"pullback_momentum={self.mode!r} does nothing: {type(self._optimizer).__name__} as it is set keeps no"
                f" {what}. Give 'none', or the optimizer momentum."
            )
            raise ValueError(message)


def _check_own_state(optimizer: Optimizer, what: str) -> None:
    """Raise if the optimizer wraps one with a state of its own: only ``optimizer.state`` is written to."""
    for inside in inside_of(optimizer):
        if inside.state is not optimizer.state:
            message = (
                f"{what} does not work with {type(optimizer).__name__}: the momentum is in the state of the"
                f" {type(inside).__name__} inside it, out of reach. Leave it out, or give the optimizer inside."
            )
            raise ValueError(message)


@torch.no_grad()
def _start_anew(state: dict[str, Any], group: dict[str, Any], parameter: Tensor, as_weights: Collection[str]) -> None:
    """Overwrite a parameter's state with what optimizers begin with; entries in ``as_weights`` begin as the weights."""
    first: dict[str, Any] = {"mu": 1.0, "mu_product": 1.0, "eta": group.get("lr"), "step_size": group.get("lr")}
    first["sum"] = group.get("initial_accumulator_value", 0.0)
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            if name in as_weights:
                value.copy_(parameter)
            else:
                value.fill_(first.get(name, 0.0))
        elif isinstance(value, (int, float)):
            state[name] = type(value)(first.get(name, 0))


def check_start_anew(optimizer: Optimizer, group: dict[str, Any], what: str) -> None:
    """Raise unless two steps after `_start_anew` are the first two steps of a new optimizer of this class."""
    if not _starts_anew(optimizer, group):
        message = (
            f"{what} does not work with sharded parameters and {type(optimizer).__name__} as it is set, whose state"
            " cannot be written back to where it begins: leave it out, or take another optimizer."
        )
        raise ValueError(message)


def _starts_anew(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    start = torch.linspace(0.5, 1.5, 4).view(2, 2)
    gradients = [torch.linspace(-1.0, 2.0, 4).view(2, 2) * factor for factor in (1.0, -0.7, 0.4)]
    with torch.random.fork_rng(devices=[]):
        try:
            used, new = nn.Parameter(start.clone()), nn.Parameter(start.clone())
            probe = _new(optimizer, {**group, **_PROBED}, used)
            _step(probe, used, gradients)
            with torch.no_grad():
                used.copy_(start)
            _start_anew(probe.state[used], probe.param_groups[0], used, begins_as_weights(optimizer, group))
            fresh = _new(optimizer, {**group, **_PROBED}, new)
            for target, parameter in ((probe, used), (fresh, new)):
                torch.manual_seed(0)
                _step(target, parameter, gradients[1:])
        except Exception:  # noqa: BLE001 (the class is made or stepped in another way)
            return False
    return torch.equal(used, new)


def _step(optimizer: Optimizer, parameter: Tensor, gradients: list[Tensor]) -> None:
    if hasattr(optimizer, "train"):  # schedule-free optimizers want to be told
        optimizer.train()
    sparse = type(optimizer).__name__ == "SparseAdam"
    for gradient in gradients:
        parameter.grad = gradient.to_sparse() if sparse else gradient.clone()
        optimizer.step()


def begins_as_weights(optimizer: Optimizer, group: dict[str, Any]) -> set[str]:
    """Names of state entries that begin as the weights, as schedule-free optimizers have them."""
    parameter = nn.Parameter(torch.linspace(0.5, 1.5, 4).view(2, 2))
    start = parameter.detach().clone()
    with torch.random.fork_rng(devices=[]):
        try:
            probe = _new(optimizer, {**group, **_PROBED, "lr": 0.0}, parameter)
            _step(probe, parameter, [torch.zeros(2, 2)])
        except Exception:  # noqa: BLE001 (the class is made in another way)
            return set()
    own = probe.state[parameter]
    return {name for name, value in own.items() if isinstance(value, torch.Tensor) and torch.equal(value, start)}


def _new(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Optimizer:
    """A new optimizer of this class and this group's settings, around one parameter."""
    accepted = inspect.signature(type(optimizer)).parameters
    settings = {name: value for name, value in group.items() if name in accepted and name != "params"}
    return type(optimizer)([parameter], **settings)


def _makes_state_early(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether the class makes its state before the first step, as Adagrad does."""
    try:
        return bool(_new(optimizer, group, nn.Parameter(torch.zeros(2, 2))).state)
    except Exception:  # noqa: BLE001 (the class is made in another way: it makes its state in a step)
        return False


def state_names(optimizer: Optimizer, group: dict[str, Any]) -> set[str]:
    """Names of the state entries that an optimizer keeps for a parameter, found out by a step of a new one."""
    parameter = nn.Parameter(torch.zeros(2, 2))
    sparse = type(optimizer).__name__ == "SparseAdam"
    parameter.grad = torch.zeros(2, 2).to_sparse() if sparse else torch.zeros(2, 2)
    try:
        probe = _new(optimizer, {**group, **_PROBED}, parameter)
        probe.step(lambda: 0.0)
        own = dict(probe.state[parameter])
    except Exception:  # noqa: BLE001 (the class is made in another way: believe what was asked for)
        return {*FIRST_MOMENTS, "exp_avg_sq"}
    return {name for name, value in own.items() if value is not None and not isinstance(value, dict)}
