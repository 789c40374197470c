"""How the second set of weights travels.

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

if TYPE_CHECKING:
    import os
    from collections.abc import Hashable, Iterator

    from torch import Tensor
    from torch.optim import Optimizer

Weights = Literal["slow", "fast"]
"""Which set of weights: ``"slow"`` is phi, ``"fast"`` is theta."""

OTHER: dict[Weights, Weights] = {"slow": "fast", "fast": "slow"}
ENTRIES: dict[str, Weights] = {"lookahead_slow": "slow", "lookahead_fast": "fast"}
"""Names of the entries that carry weights, and which ones."""
OWN = ("lookahead_k", "lookahead_alpha")
"""What a group may have of its own."""
PREFIX = "lookahead_"
"""What the names of all entries begin with: beside a set of weights they carry the momentum after the last sync."""


@dataclass
class Carried:
    """What an optimizer's ``state_dict`` carries for us, by name and parameter.

    Attributes:
        entries: Name without its prefix (``"slow"``, ``"exp_avg"``) -> parameter -> value, of the parameter's shape.
    """

    entries: dict[str, dict[Tensor, Tensor]] = field(default_factory=dict)

    def take(self, parameter: Tensor, own: dict[str, Any]) -> dict[str, Any]:
        """Take what one parameter's state carries, and return the rest of that state."""
        for name in filter(_is_ours, own):
            shape = tuple(getattr(own[name], "shape", ["no tensor"]))
            if shape != tuple(parameter.shape):
                message = (
                    f"The checkpoint has {ENTRIES.get(name, 'slow')} weights of shape {shape} for a parameter of shape"
                    f" {tuple(parameter.shape)}: it is of another model. Load it into the model that it was saved"
                    " from, or start a new run from its weights alone."
                )
                raise ValueError(message)
            self.entries.setdefault(name.removeprefix(PREFIX), {})[parameter] = own[name]
        return {name: value for name, value in own.items() if not _is_ours(name)}


def _is_ours(name: object) -> bool:
    return isinstance(name, str) and name.startswith(PREFIX)


def pack(state_dict: dict[str, Any], optimizer: Optimizer, carried: Carried) -> dict[str, Any]:
    """Return the optimizer's ``state_dict`` with ``carried`` in it; neither the argument nor live state is changed."""
    state = dict(state_dict["state"])
    for parameter, key in _keys(state_dict, optimizer):
        entries = {PREFIX + name: values[parameter] for name, values in carried.entries.items() if parameter in values}
        if entries:
            state[key] = {**state.get(key, {}), **entries}
    return {**state_dict, "state": state}


def keep_groups(state_dict: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer's ``state_dict`` with the live groups' own k and alpha, with a warning if they differ."""
    groups = []
    for saved, live in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        then, now = ({name: group[name] for name in OWN if name in group} for group in (saved, live))
        if then != now:
            message = (
                f"The checkpoint's Lookahead settings of a group are {then}, and this run's {now}. Those are used."
            )
            warnings.warn(message, stacklevel=2)
        groups.append({**{name: value for name, value in saved.items() if name not in OWN}, **now})
    return {**state_dict, "param_groups": groups}


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
    state, carried = dict(state_dict["state"]), Carried()
    for parameter, key in _keys(state_dict, optimizer):
        if key in state:
            own = state.pop(key)
            rest = carried.take(parameter, own)
            if rest or not own:  # SGD without momentum has no state: then none is left, as it was before packing
                state[key] = rest
    return {**state_dict, "state": state}, carried if carried.entries else None


def adopt(optimizer: Optimizer) -> Carried | None:
    """Take out of an optimizer's live state what it carried when it was loaded without `unpack`.

    That is so where it was loaded before there were slow weights, or where its class loads in a way of its own.
    """
    carried = Carried()
    for parameter, own in list(optimizer.state.items()):
        rest = carried.take(parameter, own)
        if rest:
            optimizer.state[parameter] = rest
        elif own:
            del optimizer.state[parameter]
    return carried if carried.entries else None


def _keys(state_dict: dict[str, Any], optimizer: Optimizer) -> Iterator[tuple[Tensor, Hashable]]:
    """Each parameter and its key in ``state_dict["state"]``: an int in one strategy, a name in another."""
    for saved, live in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        yield from zip(live["params"], saved["params"], strict=True)


def carried_in(path: str | os.PathLike[str], weights_only: bool | None = None) -> set[str]:  # noqa: FBT001
    """Names without their prefix of what the optimizers' states carry in a checkpoint, a file or a folder of shards."""
    path = Path(path)
    if path.is_dir():
        names = FileSystemReader(path).read_metadata().state_dict_metadata
        found = {name.rsplit(".", 1)[-1] for name in names}
    elif path.is_file():
        states = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only).get("optimizer_states", [])
        found = {name for state in states for own in state.get("state", {}).values() for name in own}
    else:
        return set()  # which the strategy will say in its own words
    return {name.removeprefix(PREFIX) for name in filter(_is_ours, found)}
