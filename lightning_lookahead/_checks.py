"""What may be given to this package: every check of an argument, and what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_lookahead._saved_format import TENSORS, VERSION
from lightning_lookahead._settings import dtype_of
from lightning_lookahead._tensors import checksum

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


def check_weights(weights: str, argument: str = "weights") -> None:
    """Raise unless ``weights`` is ``"slow"`` or ``"fast"``."""
    if weights not in ("slow", "fast"):
        message = f"{argument}={weights!r} is unknown: give 'slow' (phi) or 'fast' (theta)."
        raise ValueError(message)


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
    """Whether an optimizer, or one that it wraps, is Lookahead under some name: Ranger is RAdam with Lookahead."""
    for own in (optimizer, *inside_of(optimizer)):
        names = [base.__name__ for base in type(own).__mro__]
        if any("lookahead" in name.lower() or name.startswith("Ranger") for name in names):
            return True
        if any("lookahead" in name.lower() for name in vars(own)):
            return True
    return False


def check_sharded_options(**options: object) -> None:
    """Raise if an option is set that looks at all of the weights, where each rank has a piece of them only."""
    for name, value in options.items():
        if value:
            message = f"{name}={value!r} does not work with a strategy that shards the weights: leave it out."
            raise ValueError(message)


def check_materialized(parameters: list[Tensor]) -> None:
    """Raise if a parameter has no values yet."""
    if any(parameter.is_meta or is_lazy(parameter) for parameter in parameters):
        message = (
            "optimizer has parameters without values (on the meta device, or of a lazy module), which phi could start"
            " from: materialize them before training starts, a lazy module by running a batch through it."
        )
        raise ValueError(message)


def check_state(state: object) -> None:
    """Raise unless this is the state of one outer loop: counts that fit together, tensors where there may be some."""
    if not isinstance(state, dict):
        message = f"The saved Lookahead state is {state!r}; it must be a dict of steps, steps_since_sync and syncs."
        raise ValueError(message)  # noqa: TRY004 (it comes from a file)
    for name in ("steps", "steps_since_sync", "syncs"):
        value = state.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            message = f"state_dict[{name!r}] is {value!r}; it must be an integer of at least 0."
            raise ValueError(message)
    groups = state.get("groups", [])
    if not isinstance(groups, list) or not all(_is_group(group, state["steps"]) for group in groups):
        message = f"state_dict['groups'] is {groups!r}; it must be a list of dicts of steps_since_sync and syncs."
        raise ValueError(message)
    since, total = state["steps_since_sync"], state["steps"]
    if since > total:
        message = f"state_dict has steps_since_sync={since} and steps={total}; it cannot be more."
        raise ValueError(message)
    for key in ("trained", "idle"):
        _check_names(key, state.get(key))
    check_weights(state.get("saved_with", "slow"), "state_dict['saved_with']")
    dtype_of(state.get("slow_dtype"))
    for part in TENSORS:
        entries = state.get(part, {})
        if not isinstance(entries, dict) or not all(_are_tensors(values) for values in entries.values()):
            message = f"state_dict[{part!r}] is damaged: it must be a dict of dicts of tensors."
            raise ValueError(message)
    sums = state.get("checksums", {})
    if not isinstance(sums, dict) or not all(_are_integers(values) for values in sums.values()):
        message = "state_dict['checksums'] is damaged: it must be a dict of dicts of integers."
        raise ValueError(message)


def _check_names(key: str, names: object) -> None:
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        message = f"state_dict[{key!r}] is {names!r}; it must be a list of names of parameters, or None."
        raise ValueError(message)


def _are_integers(values: object) -> bool:
    return isinstance(values, dict) and all(type(value) is int for value in values.values())


def check_sums(entries: dict[str, dict[str, Tensor]], sums: dict[str, dict[str, int]]) -> None:
    """Raise if a weight does not have the checksum that it was saved with."""
    for entry, values in entries.items():
        for name, value in values.items():
            if name in sums.get(entry, {}) and checksum(value) != sums[entry][name]:
                message = f"The {entry} weights of {name!r} are not those that were saved: the file is damaged."
                raise ValueError(message)


def _are_tensors(values: object) -> bool:
    return isinstance(values, dict) and all(
        hasattr(value, "shape") or hasattr(value, "local_shards") for value in values.values()
    )


def check_entries(entry: str, values: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
    """Raise unless the values that were saved have the shapes of the parameters of their names."""
    for name, value in values.items():
        if name in parameters and tuple(value.shape) != tuple(parameters[name].shape):
            message = (
                f"The checkpoint has {entry} weights of shape {tuple(value.shape)} for parameter {name!r} of shape"
                f" {tuple(parameters[name].shape)}: it is of another model. Load it into the model that it was saved"
                " from, or start a new run from its weights alone."
            )
            raise ValueError(message)


def _is_group(group: object, total: int) -> bool:
    if not isinstance(group, dict):
        return False
    since, syncs = group.get("steps_since_sync"), group.get("syncs")
    return (
        type(since) is int and 0 <= since <= total and type(syncs) is int and syncs >= 0
    )  # `sync_now()` takes no step


def check_saved(state: object, where: object = "The checkpoint") -> None:
    """Raise unless this is what a callback of this version has saved."""
    version = state.get("lookahead_version") if isinstance(state, dict) else None
    if not isinstance(state, dict) or version != VERSION:
        message = (
            f"{where} has Lookahead state of version {version!r}; this package reads version {VERSION}. Take the"
            " version of lightning-lookahead that saved it, or a newer one."
        )
        raise ValueError(message)
    if not isinstance(state.get("optimizers"), list):
        message = f"{where} has damaged Lookahead state: its counters ('optimizers') are missing."
        raise ValueError(message)  # noqa: TRY004 (it comes from a file)
    for counters in state["optimizers"]:
        check_state(counters)
    check_weights(state.get("eval_weights", "(missing)"), f"{where}: eval_weights")
