"""Everything that this package writes to a checkpoint: each key, the version, and how older versions are read.

The state of one outer loop, what `SlowWeights.state_dict` returns:

===================  =========================================================================================
``k``, ``alpha``...  `Settings.saved`, to compare with the settings of a run that resumes
``steps``            inner steps taken
``steps_since_sync`` inner steps since the first cycle began
``syncs``            syncs of the first cycle
``groups``           ``steps_since_sync`` and ``syncs`` of each further cycle, if groups have a ``k`` or ``alpha``
``trained``          names of the parameters that have slow weights, also if a run that resumes has frozen them
``idle``             names of the trained parameters without a gradient since their last sync; None: all
``saved_with``       ``"slow"`` or ``"fast"``: the set that the model's own ``state_dict`` holds
``weights``          set -> parameter name -> tensor, of the set that is not ``saved_with``; and slow weights that the
                     model's ``state_dict`` cannot hold without rounding
``momentum``         the inner momentum after the last sync (``pullback_momentum="pullback"``): entry of the optimizer's
                     state -> parameter name -> tensor; `OUTER_MOMENTUM` -> parameter name -> b, in phi's dtype
``statistics``       set -> buffer name -> tensor, of the set that is not ``saved_with`` (``buffers="sync"``)
``checksums``        set -> parameter name -> CRC-32 of the values in the model's ``state_dict`` and in ``weights``;
                     empty if the weights are sharded
===================  =========================================================================================

A parameter without a name goes by its place in the optimizer, ``"[0]"``. A shard has the dtype of its parameter: a slow
weight of a wider dtype is cut into words, ``"slow"``, ``"slow.1"``, ...

The callback's state in a Lightning checkpoint: ``lookahead_version``, its settings, ``optimizers`` (for each the state
of its outer loop), ``aliases`` (lists of names that share a parameter), ``monitor``, and under `WORKERS` what
other ranks have of their own. A file has tensors there. A folder of shards has them in the state of the first
optimizer, under `SHARDS`, beside ``state`` and ``param_groups``: torch and Lightning ignore that key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

import torch

from .settings import dtype_of
from .tensors import checksums

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

Weights = Literal["slow", "fast"]
"""Which set of weights: ``"slow"`` is phi, ``"fast"`` is theta."""

OTHER: dict[Weights, Weights] = {"slow": "fast", "fast": "slow"}

VERSION = 2
"""Version of this format. It is raised when an older reader would misread a file."""

SHARDS = "lookahead"
"""Key of the tensors in the state of the first optimizer, in a folder of shards."""

TENSORS = ("weights", "momentum", "statistics")
"""Keys of a state with tensors: each is a dict of dicts of tensors."""

OUTER_MOMENTUM = "outer"
"""Key of b in the ``momentum`` of a state, beside the entries of the inner optimizer."""

WORKERS = "workers"
"""Key of what ranks that train apart have of their own: a list of the second rank's, the third's and so on.

Each has ``optimizers`` (the states of its outer loops, without phi and b), ``buffers`` (name -> tensor) and
``ordinary`` (what stands in its place in the checkpoint: ``optimizer_states``, ``lr_schedulers``, the precision
plugin's state).
"""

GROUP_SETTINGS = ("lookahead_k", "lookahead_alpha")
"""Keys that a param group may have."""


def words(value: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """A tensor cut into tensors of its shape and of ``dtype``, bit for bit: several if it is wider."""
    if value.dtype == dtype or value.element_size() < dtype.itemsize:
        return [value.to(dtype)]
    return list(value.contiguous().unsqueeze(-1).view(dtype).unbind(-1))


def joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The tensor of this dtype that was cut into `words`."""
    if parts[0].dtype == dtype or dtype.itemsize < parts[0].element_size():
        return parts[0].to(dtype)
    return torch.stack(list(parts), -1).view(dtype).squeeze(-1)


def word_key(name: str, index: int) -> str:
    """The key of a word of an entry."""
    return f"{name}.{index}" if index else name


def without_words(entries: Mapping[str, Mapping[str, Tensor]], dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """Entries of a state with the words of each tensor joined; ``dtypes``: name -> dtype of the slow weight."""
    whole: dict[str, dict[str, Tensor]] = {}
    for key, values in entries.items():
        if "." in key:
            continue
        for name, value in values.items():
            parts = [value]
            while name in entries.get(word_key(key, len(parts)), {}):
                parts.append(entries[word_key(key, len(parts))][name])
            dtype = dtypes.get(name, value.dtype) if key in {"slow", OUTER_MOMENTUM} else value.dtype
            whole.setdefault(key, {})[name] = joined(parts, dtype)
    return whole


def slow_dtype(dtype: torch.dtype, chosen: torch.dtype | None) -> torch.dtype:
    """The dtype of a parameter's slow weights: the chosen one, or the parameter's own, but at least float32."""
    if not dtype.is_floating_point:
        return dtype
    return chosen or torch.promote_types(dtype, torch.float32)


# -- checks


def check_weights(weights: str, argument: str = "weights") -> None:
    """Raise unless ``weights`` is ``"slow"`` or ``"fast"``."""
    if weights not in get_args(Weights):
        message = f"{argument}={weights!r} is unknown: give 'slow' (phi) or 'fast' (theta)."
        raise ValueError(message)


def check_saved(state: object, where: object = "The checkpoint") -> None:
    """Raise unless ``state`` is the state of a callback, in this version of the format."""
    version = state.get("lookahead_version") if isinstance(state, dict) else None
    if not isinstance(state, dict) or version != VERSION:
        message = (
            f"{where} has Lookahead state of version {version!r}; this package reads version {VERSION}. Take the"
            " version of lightning-lookahead that saved it, or a newer one."
        )
        raise ValueError(message)
    if not isinstance(state.get("optimizers"), list):
        _refuse(f"{where} has damaged Lookahead state: its counters ('optimizers') are missing")
    for counters in state["optimizers"]:
        check_state(counters)
    for own in state.get(WORKERS, []):
        whole = isinstance(own, dict) and all(isinstance(own.get(key), dict) for key in ("buffers", "ordinary"))
        if not whole or len(own.get("optimizers", [])) != len(state["optimizers"]):
            _refuse(f"{where} has damaged Lookahead state: what a rank has of its own ({WORKERS!r}) is incomplete")
        for counters in own["optimizers"]:
            check_state(counters)
    check_weights(state.get("eval_weights", "(missing)"), f"{where}: eval_weights")


def check_state(state: object) -> None:
    """Raise unless ``state`` is the state of one outer loop: its counts fit together, its tensors are tensors."""
    if not isinstance(state, dict):
        _refuse(f"The saved Lookahead state is {state!r}; it must be a dict of steps, steps_since_sync and syncs")
    _check_counts(state)
    for key in ("trained", "idle"):
        names = state.get(key)
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            _refuse(f"state_dict[{key!r}] is {names!r}; it must be a list of names of parameters, or None")
    check_weights(state.get("saved_with", "slow"), "state_dict['saved_with']")
    dtype_of(state.get("slow_dtype"))
    for part in TENSORS:
        entries = state.get(part, {})
        if not isinstance(entries, dict) or not all(_are_tensors(values) for values in entries.values()):
            _refuse(f"state_dict[{part!r}] is damaged: it must be a dict of dicts of tensors")
    sums = state.get("checksums", {})
    if not isinstance(sums, dict) or not all(_are_integers(values) for values in sums.values()):
        _refuse("state_dict['checksums'] is damaged: it must be a dict of dicts of integers")


def _check_counts(state: dict[str, Any]) -> None:
    for name in ("steps", "steps_since_sync", "syncs"):
        value = state.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            _refuse(f"state_dict[{name!r}] is {value!r}; it must be an integer of at least 0")
    groups = state.get("groups", [])
    if not isinstance(groups, list) or not all(_is_group(group, state["steps"]) for group in groups):
        _refuse(f"state_dict['groups'] is {groups!r}; it must be a list of dicts of steps_since_sync and syncs")
    since, total = state["steps_since_sync"], state["steps"]
    if since > total:
        _refuse(f"state_dict has steps_since_sync={since} and steps={total}; it cannot be more")


def _refuse(what: str) -> NoReturn:
    message = f"{what}. Take another checkpoint."
    raise ValueError(message)


def _is_group(group: object, total: int) -> bool:
    if not isinstance(group, dict):
        return False
    since, syncs = group.get("steps_since_sync"), group.get("syncs")
    # There may be more syncs than steps: `sync_now()` takes none.
    return type(since) is int and 0 <= since <= total and type(syncs) is int and syncs >= 0


def _are_tensors(values: object) -> bool:
    return isinstance(values, dict) and all(
        hasattr(value, "shape") or hasattr(value, "local_shards") for value in values.values()
    )


def _are_integers(values: object) -> bool:
    return isinstance(values, dict) and all(type(value) is int for value in values.values())


def check_entries(entry: str, values: dict[str, Tensor], parameters: dict[str, Tensor]) -> None:
    """Raise unless each saved value has the shape of the parameter with its name."""
    for name, value in values.items():
        if name in parameters and tuple(value.shape) != tuple(parameters[name].shape):
            message = (
                f"The checkpoint has {entry} weights of shape {tuple(value.shape)} for parameter {name!r} of shape"
                f" {tuple(parameters[name].shape)}: it is of another model. Load it into the model that it was saved"
                " from, or start a new run from its weights alone."
            )
            raise ValueError(message)


def check_sums(entries: dict[str, dict[str, Tensor]], sums: dict[str, dict[str, int]]) -> None:
    """Raise if a weight does not have the checksum in the file."""
    for entry, values in entries.items():
        known = [name for name in values if name in sums.get(entry, {})]
        for name, found in zip(known, checksums([values[name] for name in known]), strict=True):
            if found != sums[entry][name]:
                message = f"The {entry} weights of {name!r} are not those that were saved: the file is damaged."
                raise ValueError(message)


# -- version 1: it had tensors in the optimizers' states, as entries of these names

_ENTRIES_1 = {
    "lookahead_slow": ("weights", "slow"),
    "lookahead_fast": ("weights", "fast"),
    "lookahead_momentum_buffer": ("momentum", "momentum_buffer"),
    "lookahead_exp_avg": ("momentum", "exp_avg"),
}


def upgrade(checkpoint: dict[str, Any], ours: dict[str, Any]) -> None:
    """Turn a checkpoint of version 1 into one of this version, in place; ``ours`` is the callback's state in it."""
    if ours.get("lookahead_version") != 1 or not isinstance(ours.get("optimizers"), list):
        return
    ours["lookahead_version"], ours["aliases"] = VERSION, ours.pop("tied", [])
    names = [[(aliases or [f"[{at}]"])[0] for at, aliases in enumerate(part)] for part in ours.pop("names", [])]
    statistics = ours.pop("statistics", [])
    for index, (state, optimizer) in enumerate(
        zip(ours["optimizers"], checkpoint.get("optimizer_states", []), strict=False)
    ):
        keys = [key for group in optimizer["param_groups"] for key in group["params"]]
        by_key = dict(zip(keys, names[index], strict=False))
        for key, own in optimizer["state"].items():
            for entry in _ENTRIES_1.keys() & own.keys():
                part, name = _ENTRIES_1[entry]
                state.setdefault(part, {}).setdefault(name, {})[by_key.get(key, key)] = own.pop(entry)
        optimizer["state"] = {key: own for key, own in optimizer["state"].items() if own}
        state["saved_with"] = ours["eval_weights"]
        sums = dict(zip(by_key.values(), state.get("checksums", []), strict=False))
        state["checksums"] = {ours["eval_weights"]: sums}
        if "statistics" in state:
            state["statistics"] = {
                which: dict(zip(statistics[index], values, strict=True))
                for which, values in state["statistics"].items()
            }
