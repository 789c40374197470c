"""Which weights a checkpoint holds, and where the others travel.

The model's ``state_dict`` holds one set of weights. The other set travels in the optimizer's ``state_dict``, as one
more entry of each parameter's state: the only place that every strategy of Lightning saves, shards and restores.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

from lightning_lookahead._checks import check_saved, check_weights
from lightning_lookahead._tensors import place

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Hashable, Iterable, Iterator

    from torch import Tensor
    from torch.optim import Optimizer

    from lightning_lookahead.slow_weights import SlowWeights

Weights = Literal["slow", "fast"]
"""Which set of weights: ``"slow"`` is phi, ``"fast"`` is theta."""

OTHER: dict[Weights, Weights] = {"slow": "fast", "fast": "slow"}
_MODELS = ("state_dict.", "model.")  # where ModelParallelStrategy and FSDPStrategy keep the model among the shards
_CARRIED: dict[str, Weights] = {"lookahead_slow": "slow", "lookahead_fast": "fast"}


@dataclass
class Carried:
    """The set of weights that an optimizer's ``state_dict`` carried, by parameter.

    Attributes:
        weights: Which set it is.
        values: Parameter -> its value in that set, of the parameter's shape.
    """

    weights: Weights
    values: dict[Tensor, Tensor] = field(default_factory=dict)

    def take(self, parameter: Tensor, own: dict[str, Any]) -> dict[str, Any]:
        """Take what one parameter's state carries, and return the rest of that state."""
        for name, weights in _CARRIED.items():
            if name not in own:
                continue
            shape = tuple(getattr(own[name], "shape", ["no tensor"]))
            if shape != tuple(parameter.shape):
                message = (
                    f"The checkpoint has {weights} weights of shape {shape} for a parameter of shape"
                    f" {tuple(parameter.shape)}: it is of another model. Load it into the model that it was saved"
                    " from, or start a new run from its weights alone."
                )
                raise ValueError(message)
            self.weights = weights
            self.values[parameter] = own[name]
        return {name: value for name, value in own.items() if name not in _CARRIED}


def pack(state_dict: dict[str, Any], optimizer: Optimizer, carried: Carried) -> dict[str, Any]:
    """Return the optimizer's ``state_dict`` with ``carried`` in it; neither the argument nor live state is changed."""
    state = dict(state_dict["state"])
    for parameter, key in _keys(state_dict, optimizer):
        if parameter in carried.values:
            state[key] = {**state.get(key, {}), f"lookahead_{carried.weights}": carried.values[parameter]}
    return {**state_dict, "state": state}


def fits(state_dict: dict[str, Any], optimizer: Optimizer) -> bool:
    """Whether the optimizer's ``state_dict`` has this optimizer's groups; if not, torch refuses it in its own words."""
    saved, live = state_dict.get("param_groups", []), optimizer.param_groups
    return [len(group["params"]) for group in saved] == [len(group["params"]) for group in live]


def unpack(state_dict: dict[str, Any], optimizer: Optimizer) -> tuple[dict[str, Any], Carried | None]:
    """Return the optimizer's ``state_dict`` as torch wants it, and what it carried; the argument is not changed.

    ``None`` if it carried nothing. The two must have the same groups, see `fits`.

    Raises:
        ValueError: If a carried tensor has another shape than its parameter.
    """
    state, carried = dict(state_dict["state"]), Carried("slow")
    for parameter, key in _keys(state_dict, optimizer):
        if key in state:
            own = state.pop(key)
            rest = carried.take(parameter, own)
            if rest or not own:  # SGD without momentum has no state: then none is left, as it was before packing
                state[key] = rest
    return {**state_dict, "state": state}, carried if carried.values else None


def adopt(optimizer: Optimizer) -> Carried | None:
    """Take out of an optimizer's live state what it carried when it was loaded without `unpack`.

    That is so where it was loaded before there were slow weights, or where its class loads in a way of its own.
    """
    carried = Carried("slow")
    for parameter, own in list(optimizer.state.items()):
        rest = carried.take(parameter, own)
        if rest:
            optimizer.state[parameter] = rest
        elif own:
            del optimizer.state[parameter]
    return carried if carried.values else None


def _keys(state_dict: dict[str, Any], optimizer: Optimizer) -> Iterator[tuple[Tensor, Hashable]]:
    """Each parameter and its key in ``state_dict["state"]``: an int in one strategy, a name in another."""
    for saved, live in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        yield from zip(live["params"], saved["params"], strict=True)


def state_dict_of_slow(
    module_state_dict: Callable[[], dict[str, Any]], slow_weights: Iterable[SlowWeights]
) -> dict[str, Any] | None:
    """A module's ``state_dict`` with phi in place of theta, whatever the module holds, without touching its weights.

    Matches by storage and not by name, so that tied, compiled and renamed parameters need no care. ``None`` if that is
    not enough: if the weights are sharded, or if the ``state_dict`` leaves some out or computes from them.
    """
    if any(slow.sharded for slow in slow_weights):
        return None
    state_dict = module_state_dict()
    pairs = [pair for slow in slow_weights if slow.holds == "fast" for pair in slow.values("slow").items()]
    by_place = {place(fast): phi for fast, phi in pairs if fast.numel()}
    missing = set(by_place)
    for name, value in state_dict.items():
        where = place(value) if isinstance(value, torch.Tensor) else ()
        if where in by_place and value.dtype == by_place[where].dtype:
            state_dict[name] = by_place[where].detach()
            missing.discard(where)
    return None if missing else state_dict


def carried_in(path: str | os.PathLike[str], weights_only: bool | None = None) -> Weights | None:  # noqa: FBT001
    """Which set of weights the optimizers' states carry in a checkpoint, a file or a folder of shards."""
    path = Path(path)
    if path.is_dir():
        names = FileSystemReader(path).read_metadata().state_dict_metadata
        found = {name.rsplit(".", 1)[-1] for name in names}
    elif path.is_file():
        states = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only).get("optimizer_states", [])
        found = {name for state in states for own in state.get("state", {}).values() for name in own}
    else:
        return None  # which the strategy will say in its own words
    return next((weights for name, weights in _CARRIED.items() if name in found), None)


def load_weights(
    path: str | os.PathLike[str], weights: Weights = "slow", *, weights_only: bool = True
) -> dict[str, Tensor]:
    """Read one set of weights out of a checkpoint file, without a Trainer.

    Args:
        path: A checkpoint that a run with `LookaheadCallback` saved: a file, or a folder of shards.
        weights: ``"slow"`` (phi, what the algorithm returns) or ``"fast"`` (theta, where the inner optimizer was).
        weights_only: As in `torch.load`. ``False`` runs code from the file: only for files that you trust.

    Returns:
        Parameter and buffer names -> tensors on the CPU, for ``module.load_state_dict``. The ``_orig_mod.`` that
        ``torch.compile`` puts into names is left out: load first, compile then.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, no Lightning checkpoint, was made without the callback, or does not hold
            both sets (``save_weights_only=True``).

    Example::

        model.load_state_dict(load_weights("run.ckpt", "slow"))
    """
    check_weights(weights)
    checkpoint = _read(path, weights_only=weights_only)
    saved = _callback_state(checkpoint, path)
    state_dict = dict(checkpoint["state_dict"])
    if weights != saved["eval_weights"]:
        for optimizer_state, names in zip(checkpoint["optimizer_states"], saved["names"], strict=True):
            for aliases, value in _others(optimizer_state, [*names, *saved["tied"]], f"lookahead_{weights}"):
                known = [name for name in aliases if name in state_dict]
                if not known:
                    message = (
                        f"{path} has {weights} weights of {aliases or ['a parameter without a name']}, but its"
                        " 'state_dict' has no such name: the module saves its weights under names of its own. Load the"
                        f" checkpoint in a Trainer and take callback.use_weights({weights!r})."
                    )
                    raise ValueError(message)
                state_dict.update(dict.fromkeys(known, value))
    return {name.replace("_orig_mod.", ""): value for name, value in state_dict.items()}


def _others(optimizer_state: dict[str, Any], names: list[list[str]], entry: str) -> Iterator[tuple[list[str], Tensor]]:
    """The set that an optimizer's state carries: all names of each parameter, and its value."""
    state = optimizer_state["state"]
    if "param_groups" in optimizer_state:
        keys = [key for group in optimizer_state["param_groups"] for key in group["params"]]
        aliases = dict(zip(keys, names, strict=False))
    else:  # shards name the parameters, each by one of its names
        aliases = {name: own for own in names for name in own}
    return ((aliases.get(key, [key]), own[entry]) for key, own in state.items() if entry in own)


def _read_shards(path: Path, *, weights_only: bool) -> dict[str, Any]:
    """Put a folder of shards together as if it were one file, with nothing of the optimizers but what they carry."""
    checkpoint: dict[str, Any] = torch.load(path / "meta.pt", map_location="cpu", weights_only=weights_only)
    reader = FileSystemReader(path)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and (name.startswith(_MODELS) or name.endswith(tuple(_CARRIED)))
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be here
        load_shards(tensors, storage_reader=reader, no_dist=True)
    checkpoint["state_dict"] = {}
    states: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if name.startswith(_MODELS):
            checkpoint["state_dict"][rest] = tensor
        else:  # optimizer_0.state.NAME.lookahead_fast
            parameter, _, entry = rest.removeprefix("state.").rpartition(".")
            states.setdefault(part, {})[parameter] = {entry: tensor}
    checkpoint["optimizer_states"] = [{"state": states[part]} for part in sorted(states)]
    return checkpoint


def _read(path: str | os.PathLike[str], *, weights_only: bool) -> dict[str, Any]:
    if not Path(path).exists():
        message = f"{path} does not exist."
        raise FileNotFoundError(message)
    try:
        if Path(path).is_dir():
            checkpoint = _read_shards(Path(path), weights_only=weights_only)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:
        hint = "it holds objects other than tensors, or it is cut short or damaged" if weights_only else "is it whole?"
        message = (
            f"{path} cannot be read as a checkpoint: {hint} ({type(error).__name__}). A checkpoint with objects of"
            " your own classes (hyperparameters, say) can be read with weights_only=False if you trust it."
        )
        raise ValueError(message) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        message = f"{path} is no Lightning checkpoint: it has no 'state_dict'. Give a file that a Trainer saved."
        raise ValueError(message)  # noqa: TRY004 (the argument is a path; what is wrong is in the file)
    return checkpoint


def _callback_state(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, dict) and "lookahead_version" in state:
            check_saved(state, path)
            if state["optimizers"] and "names" in state and "optimizer_states" in checkpoint:
                return state
    message = (
        f"{path} holds one set of weights and does not say which: it was saved without LookaheadCallback, before"
        " training began, or with save_weights_only=True. Use torch.load(path)['state_dict'] for the weights that it"
        " has, or save whole checkpoints."
    )
    raise ValueError(message)
