"""Everything that a checkpoint holds of ours: each key, the version, and how older versions are read.

The state of one outer loop, what `SlowWeights.state_dict` returns:

===================  =========================================================================================
``k``, ``alpha``...  `Settings.saved`, to compare with a run that goes on
``steps``            inner steps taken
``steps_since_sync`` inner steps since the last sync
``syncs``            syncs done
``groups``           the last two for each further cycle, if groups have a ``k`` or ``alpha`` of their own
``trained``          names of the parameters that have two sets: they do also where a run that goes on has frozen them
``idle``             names of those that have had no gradient since their last sync; None: all
``saved_with``       ``"slow"`` or ``"fast"``: the set that the model's own ``state_dict`` holds
``weights``          the other set: its name -> parameter name -> tensor; slow weights that the model's ``state_dict``
                     cannot hold without rounding, too
``momentum``         the inner momentum after the last sync (``pullback_momentum="pullback"``): name of the optimizer's
                     entry -> parameter name -> tensor
``statistics``       the other set of BatchNorm statistics (``buffers="sync"``), as ``weights`` are
``checksums``        set -> parameter name -> CRC-32 of the values, of what is in the model's ``state_dict`` and of
                     ``weights``; empty if they are sharded
===================  =========================================================================================

Where parameters have no names they go by their place in the optimizer, ``"[0]"``. In a shard, which has the type of its
parameter, a slow weight of a wider type is cut into words: ``"slow"``, ``"slow.1"``, ...

The callback's state in a Lightning checkpoint: ``lookahead_version``, its settings, ``optimizers`` (the state of one
outer loop for each), ``aliases`` (lists of names that share a parameter), ``monitor``. What is a tensor lies there in
one file. In a folder of shards it lies in the state of the first optimizer under `SHARDS`, beside ``state`` and
``param_groups``, where torch and Lightning look for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

Weights = Literal["slow", "fast"]
"""Which set of weights: ``"slow"`` is phi, ``"fast"`` is theta."""

OTHER: dict[Weights, Weights] = {"slow": "fast", "fast": "slow"}

VERSION = 2
"""Version of what a checkpoint holds of ours, raised when an older reader would get it wrong."""

SHARDS = "lookahead"
"""Where a folder of shards has the tensors, in the state of the first optimizer."""

TENSORS = ("weights", "momentum", "statistics")
"""The parts of a state that are tensors, each of them a dict of dicts of tensors."""

GROUP_SETTINGS = ("lookahead_k", "lookahead_alpha")
"""What a param group may have of its own."""


def words(value: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """A tensor as tensors of its shape and of another type, bit for bit: several if it is wider, rounded never."""
    if value.dtype == dtype or value.element_size() < dtype.itemsize:
        return [value.to(dtype)]
    return list(value.contiguous().unsqueeze(-1).view(dtype).unbind(-1))


def joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The tensor of this type that was cut into `words`."""
    if parts[0].dtype == dtype or dtype.itemsize < parts[0].element_size():
        return parts[0].to(dtype)
    return torch.stack(list(parts), -1).view(dtype).squeeze(-1)


def word_key(name: str, index: int) -> str:
    """What a word of an entry is called."""
    return f"{name}.{index}" if index else name


def without_words(entries: Mapping[str, Mapping[str, Tensor]], dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """Entries of a state with the words of each tensor joined; ``dtypes`` are those of the slow weights, by name."""
    whole: dict[str, dict[str, Tensor]] = {}
    for key, values in entries.items():
        if "." in key:
            continue
        for name, value in values.items():
            parts = [value]
            while name in entries.get(word_key(key, len(parts)), {}):
                parts.append(entries[word_key(key, len(parts))][name])
            dtype = dtypes.get(name, value.dtype) if key == "slow" else value.dtype
            whole.setdefault(key, {})[name] = joined(parts, dtype)
    return whole


def slow_dtype(dtype: torch.dtype, chosen: torch.dtype | None) -> torch.dtype:
    """The type of a parameter's slow weights: what was chosen, or its own, but at least float32."""
    if not dtype.is_floating_point:
        return dtype
    return chosen or torch.promote_types(dtype, torch.float32)


# -- version 1: the other set was in the optimizers' states, as entries of these names

_ENTRIES_1 = {
    "lookahead_slow": ("weights", "slow"),
    "lookahead_fast": ("weights", "fast"),
    "lookahead_momentum_buffer": ("momentum", "momentum_buffer"),
    "lookahead_exp_avg": ("momentum", "exp_avg"),
}


def upgrade(checkpoint: dict[str, Any], ours: dict[str, Any]) -> None:
    """Make a file of version 1, whose callback's state is ``ours``, one of this version, in place."""
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
