"""What a sync does to the inner optimizer's momentum: nothing, a fresh start, or the way that the weights go."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lightning_lookahead._numbers import check_choice
from lightning_lookahead._tensors import copy_, interpolate_

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor
    from torch.optim import Optimizer

Mode = Literal["none", "reset", "pullback"]
MODES = ("none", "reset", "pullback")
FIRST_MOMENTS = ("momentum_buffer", "exp_avg")
"""What optimizers call the moving average of the gradient."""


class Momentum:
    """What the end of a cycle does to the state of an inner optimizer.

    ``"none"`` leaves it alone. ``"reset"`` removes all of it, as of an optimizer that is new: moments, step counters,
    whatever the class keeps. ``"pullback"`` lets the first moments go with alpha from where they were after the last
    sync, zero at the start, to where they are: ``m <- m' + alpha (m - m')``; that takes a copy of them.

    Args:
        optimizer: The inner optimizer.
        mode: Which of the three.
        sharded: Whether the parameters are. A reset then writes to the state and removes nothing: what a checkpoint
            of shards does not have, `torch.distributed.checkpoint` does not load.

    Raises:
        ValueError: If ``mode`` is unknown or would do nothing for this optimizer.

    Source: Zhang, Lucas, Hinton, Ba 2019, section 3 and appendix; the official code's ``pullback_momentum``.
    """

    def __init__(self, optimizer: Optimizer, mode: Mode, *, sharded: bool = False) -> None:
        check_choice("pullback_momentum", mode, MODES)
        self.mode = mode
        self.previous: dict[str, dict[Tensor, Tensor]] = {}
        """First moments after the last sync: name -> parameter -> value. Zero if it is not there."""
        self._optimizer = optimizer
        self._sharded = sharded
        if mode != "none":
            self._check()

    def after_sync(self, parameters: Collection[Tensor], alpha: float) -> None:
        """Do it to the state of these parameters."""
        if self.mode == "reset":
            self.reset(parameters)
        elif self.mode == "pullback":
            for name in FIRST_MOMENTS:
                self._pull_back(name, parameters, alpha)

    def restore(self, entries: dict[str, dict[Tensor, Tensor]]) -> None:
        """Go on with the first moments after the last sync that were saved."""
        if self.mode == "pullback":
            self.previous = {
                name: {parameter: value.to(parameter.device, copy=True) for parameter, value in entries[name].items()}
                for name in FIRST_MOMENTS
                if name in entries
            }

    def _pull_back(self, name: str, parameters: Collection[Tensor], alpha: float) -> None:
        state = self._optimizer.state
        owners = [parameter for parameter in parameters if state.get(parameter, {}).get(name) is not None]
        if not owners:
            return
        moments: list[Tensor] = [state[parameter][name] for parameter in owners]
        previous = self.previous.setdefault(name, {})
        for parameter, moment in zip(owners, moments, strict=True):
            if parameter not in previous:
                previous[parameter] = torch.zeros_like(moment)
        kept = [previous[parameter] for parameter in owners]
        interpolate_(kept, moments, alpha)
        copy_(moments, kept)

    def forget(self, parameters: Collection[Tensor]) -> None:
        """Make the state of these parameters that of a new optimizer, and what it was after the last sync as well."""
        self.reset(parameters)
        for own in self.previous.values():
            for parameter in parameters:
                own.pop(parameter, None)

    def reset(self, parameters: Collection[Tensor]) -> None:
        """Make the state of these parameters that of a new optimizer, whatever the mode is."""
        for group in self._optimizer.param_groups:
            early = _makes_state_early(self._optimizer, group)
            for parameter in set(parameters).intersection(group["params"]):
                if self._sharded:
                    _start_anew(self._optimizer.state.get(parameter, {}), group)
                    continue
                self._optimizer.state.pop(parameter, None)
                if early:
                    self._optimizer.state[parameter] = _new(self._optimizer, group, parameter).state[parameter]

    def _check(self) -> None:
        """Raise if no group of the optimizer has what this is about."""
        known = [state_names(self._optimizer, group) for group in self._optimizer.param_groups]
        wanted = known if self.mode == "reset" else [names.intersection(FIRST_MOMENTS) for names in known]
        dampened = [group for group in self._optimizer.param_groups if group.get("dampening", 0)]
        if self._sharded and self.mode == "reset" and dampened:
            message = (
                "pullback_momentum='reset' does not work with sharded parameters and an optimizer with dampening, which"
                " leaves out the first step of a new optimizer: set dampening to 0."
            )
            raise ValueError(message)
        if not any(wanted):
            what = "state" if self.mode == "reset" else "momentum (momentum_buffer, exp_avg)"
            message = (
                f"pullback_momentum={self.mode!r} does nothing: {type(self._optimizer).__name__} as it is set keeps no"
                f" {what}. Give 'none', or the optimizer momentum."
            )
            raise ValueError(message)


@torch.no_grad()
def _start_anew(state: dict[str, Any], group: dict[str, Any]) -> None:
    """Write to a parameter's state what torch's optimizers begin with."""
    first: dict[str, Any] = {"mu": 1.0, "mu_product": 1.0, "eta": group.get("lr"), "step_size": group.get("lr")}
    first["sum"] = group.get("initial_accumulator_value", 0.0)
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            value.fill_(first.get(name, 0.0))
        elif isinstance(value, (int, float)):
            state[name] = type(value)(first.get(name, 0))


def _dummy() -> nn.Parameter:
    return nn.Parameter(torch.zeros(2, 2))


def _new(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Optimizer:
    """An optimizer of the same class and settings that has just been made, around one parameter."""
    accepted = inspect.signature(type(optimizer)).parameters
    settings = {name: value for name, value in group.items() if name in accepted and name != "params"}
    return type(optimizer)([parameter], **settings)


def _makes_state_early(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether the class wants its state to be there before the first step, as Adagrad does."""
    try:
        return bool(_new(optimizer, group, _dummy()).state)
    except Exception:  # noqa: BLE001 (a class that is made in another way: it has to do without)
        return False


def state_names(optimizer: Optimizer, group: dict[str, Any]) -> set[str]:
    """What an optimizer keeps of a parameter, found out by a step of another one like it."""
    parameter = _dummy()
    sparse = type(optimizer).__name__ == "SparseAdam"
    parameter.grad = torch.zeros(2, 2).to_sparse() if sparse else torch.zeros(2, 2)
    try:
        probe = _new(optimizer, {**group, "capturable": False, "fused": None, "foreach": None}, parameter)
        probe.step(lambda: 0.0)
    except Exception:  # noqa: BLE001 (a class that is made in another way: believe what was asked for)
        return {*FIRST_MOMENTS, "exp_avg_sq"}
    return {name for name, value in probe.state[parameter].items() if value is not None}
