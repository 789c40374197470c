"""The outer loops' tensors in a folder of shards: listed, and loaded by every rank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from .saved_format import SHARDS, TENSORS

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from .slow_weights import SlowWeights

KEY = ("optimizer_0", SHARDS)
"""Lightning's sharded strategies write the state of the first optimizer there; the tensors are in it."""


def listed(path: str | os.PathLike[str]) -> dict[tuple[str, ...], TensorStorageMetadata]:
    """Keys of a tensor, from the optimizer's number on -> its metadata, for all tensors of outer loops in a folder."""
    metadata = FileSystemReader(Path(path)).read_metadata()
    found: dict[tuple[str, ...], TensorStorageMetadata] = {}
    for name, keys in (metadata.planner_data or {}).items():
        entry = metadata.state_dict_metadata.get(name)
        if tuple(keys[:2]) == KEY and isinstance(entry, TensorStorageMetadata):
            found[tuple(keys[2:])] = entry
    return found


def load_folder(
    path: str | os.PathLike[str], states: Sequence[dict[str, Any]], slow_weights: Sequence[SlowWeights]
) -> None:
    """Give each state its tensors out of a folder, as shards of this run; nothing is done for a file."""
    if not Path(path).is_dir():
        return
    found = listed(path)
    for at, (state, slow) in enumerate(zip(states, slow_weights, strict=False)):
        wanted = {keys[1:] for keys in found if keys[0] == str(at)}
        template = slow.state_dict()
        parts = {
            part: {
                entry: {name: value for name, value in values.items() if (part, entry, name) in wanted}
                for entry, values in template[part].items()
            }
            for part in TENSORS
            if part in template
        }
        load({KEY[0]: {SHARDS: {str(at): parts}}}, checkpoint_id=path)
        state.update(parts)
