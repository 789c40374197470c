"""A module's ``state_dict`` with phi in it, and its weights while a checkpoint is loaded into it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lightning_lookahead.outer_loop.sharding import load_named, reshard
from lightning_lookahead.outer_loop.tensors import copies, copy_, storage_key

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from torch import nn

    from lightning_lookahead.outer_loop.slow_weights import SlowWeights


def state_dict_of_slow(
    module_state_dict: Callable[[], dict[str, Any]], slow_weights: Collection[SlowWeights]
) -> dict[str, Any] | None:
    """A module's ``state_dict`` with phi in place of theta, whatever the module holds, without touching its weights.

    Values are matched by storage and not by name, so that tied, compiled and renamed parameters need no care. ``None``
    if that does not work: the weights are sharded, or the ``state_dict`` leaves some out or computes from them.
    """
    if any(slow.parameters.sharded for slow in slow_weights):
        return None
    state_dict = module_state_dict()
    pairs = [pair for slow in slow_weights if slow.active == "fast" for pair in slow.values("slow").items()]
    for slow in slow_weights:
        if slow.active == "fast":
            pairs += zip(slow.statistics.live, slow.statistics.counterparts, strict=True)
    by_storage = {storage_key(fast): (fast.dtype, phi) for fast, phi in pairs if fast.numel()}
    missing = set(by_storage)
    for name, value in state_dict.items():
        where = storage_key(value) if isinstance(value, torch.Tensor) else ()
        if where in by_storage and value.dtype == by_storage[where][0]:
            state_dict[name] = by_storage[where][1].detach().to(value)
            missing.discard(where)
    return None if missing else state_dict


def load_whole(module: nn.Module, state_dict: dict[str, Any]) -> None:
    """Load whole tensors by name into a module that may be sharded; parameters without a value stay as they are."""
    reshard(module)
    load_named(module, state_dict, whole=True)


@contextmanager
def kept_weights(module: nn.Module) -> Iterator[None]:
    """Restore a module's weights after the ``with`` block, inside which others are loaded."""
    before = dict(module.named_parameters())
    values = dict(zip(before, copies(before.values()), strict=True))
    try:
        yield
    finally:
        reshard(module)
        now = set(module.parameters())
        same = [name for name, parameter in before.items() if parameter in now]
        copy_([before[name] for name in same], [values[name] for name in same])
        if len(same) < len(before):  # sharded since, into parameters of their own
            load_whole(module, {name: value for name, value in values.items() if name not in same})
