"""What ranks that train apart have of their own, in the one checkpoint file of all."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.utils._pytree import tree_map

from lightning_lookahead.outer_loop.saved_format import OUTER_MOMENTUM, WORKERS

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import Tensor

    from lightning_lookahead.outer_loop.workers import Workers

    from .apart import Apart
    from .outer_loops import OuterLoops

_ORDINARY = ("optimizer_states", "lr_schedulers")
"""Keys of a Lightning checkpoint that a rank has values of its own for, beside the precision plugin's."""

_SHARED = {"weights": "slow", "momentum": OUTER_MOMENTUM}
"""Of parts of an outer loop's state the entry that is the same on all ranks: phi, and its momentum."""


@dataclass
class _Sent:
    """Stands for a tensor that is sent by itself."""

    shape: torch.Size
    dtype: torch.dtype


def gather(state: Any, workers: Workers) -> list[Any]:
    """The states of all ranks but the first, on the first, with tensors on the CPU; on other ranks none.

    A collective. One tensor is under way at a time.
    """
    tensors: list[Tensor] = []

    def stand_in(leaf: Any) -> Any:
        if type(leaf) not in {torch.Tensor, torch.nn.Parameter}:
            return leaf  # a tensor of a kind of its own is sent with the rest
        tensors.append(leaf)
        return _Sent(leaf.shape, leaf.dtype)

    outline = tree_map(stand_in, state)
    found: list[Any] = [None] * len(workers.ranks)
    first = workers.ranks[0]
    distributed.gather_object(outline, None if workers.rank else found, first, workers.numbers)
    if workers.rank:
        for tensor in tensors:
            if tensor.numel():
                distributed.send(_bytes_of(tensor.detach().cpu().contiguous()), first, workers.numbers)
        return []
    return [_received(own, rank, workers) for rank, own in zip(workers.ranks[1:], found[1:], strict=True)]


def _received(outline: Any, rank: int, workers: Workers) -> Any:
    def receive(leaf: Any) -> Any:
        if not isinstance(leaf, _Sent):
            return leaf
        tensor = torch.empty(leaf.shape, dtype=leaf.dtype)
        if tensor.numel():
            distributed.recv(_bytes_of(tensor), rank, workers.numbers)
        return tensor

    return tree_map(receive, outline)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def save(trainer: Trainer, checkpoint: dict[str, Any], state: dict[str, Any], apart: Apart, loops: OuterLoops) -> None:
    """Add what the other ranks have of their own to the callback's state on the first rank; a collective.

    The first rank's own stays where Lightning keeps it. After an exception, which may be on one rank alone, the file
    may have to do without the others.

    Args:
        trainer: The Trainer.
        checkpoint: The checkpoint of this rank.
        state: The callback's state in it.
        apart: The ranks.
        loops: The outer loops.
    """
    try:
        if trainer.interrupted:
            apart.workers.await_all()
    except RuntimeError as error:
        message = (
            "Lookahead: this checkpoint was saved after an exception that other ranks do not know of. It lacks what"
            f" they have of their own ({error}). A run that resumes from it starts on all ranks where this one was."
        )
        warnings.warn(message, stacklevel=2)
        return
    saved = {name for slow in loops.slow_weights for name in slow.statistics.names}
    plugin = type(trainer.precision_plugin).__qualname__
    own = {
        "optimizers": [_without_shared(loop) for loop in state["optimizers"]],
        "buffers": {name: buffer for name, buffer in apart.buffers.own().items() if name not in saved},
        "ordinary": {key: checkpoint[key] for key in (*_ORDINARY, plugin) if key in checkpoint},
    }
    gathered = gather(own, apart.workers)
    if not apart.workers.rank:
        state[WORKERS] = gathered


def _without_shared(loop: dict[str, Any]) -> dict[str, Any]:
    """The state of an outer loop without what is the same on all ranks."""
    own = {part: {key: v for key, v in loop.get(part, {}).items() if key != _SHARED[part]} for part in _SHARED}
    return {**loop, **own}


def _shared(part: str, loop: dict[str, Any]) -> dict[str, Any]:
    """Of a part of the state of an outer loop what is the same on all ranks."""
    return {key: values for key, values in loop.get(part, {}).items() if key == _SHARED[part]}


def take(checkpoint: dict[str, Any], state: dict[str, Any], rank: int, number: int) -> dict[str, Tensor]:
    """Let a checkpoint be that of this rank, in place; with another number of ranks all start from phi.

    Args:
        checkpoint: What a Trainer has read.
        state: The callback's state in it.
        rank: This rank's place among those that train apart.
        number: How many there are; 1 if they do not train apart.

    Returns:
        This rank's own buffers, by name; of the first rank and with another number of ranks none.
    """
    others = state.pop(WORKERS, None)
    if others is None:
        return {}
    before = len(others) + 1
    own = others[rank % before - 1] if rank % before else None
    if own is not None:
        checkpoint.update(own["ordinary"])
        for loop, mine in zip(state["optimizers"], own["optimizers"], strict=True):
            shared = {part: _shared(part, loop) for part in _SHARED}
            loop.update(mine, **{part: {**mine[part], **shared[part]} for part in _SHARED})
    if number == before:
        return own["buffers"] if own is not None else {}
    now = f"there are {number}" if number > 1 else "none do from there on"
    message = (
        f"Lookahead: the checkpoint is of {before} ranks that train apart, and in this run {now}: all start from the"
        " slow weights and begin a new cycle, with the optimizer states of the saved ranks in turn."
    )
    warnings.warn(message, stacklevel=2)
    for loop in state["optimizers"]:
        loop["weights"] = _shared("weights", loop)
        loop["statistics"] = {}
        for counts in (loop, *loop.get("groups", [])):
            counts["steps_since_sync"] = 0
        loop["idle"] = None
    return {}
