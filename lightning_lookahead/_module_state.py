"""phi in a module's ``state_dict``, whatever the module holds at that moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_lookahead._tensors import place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lightning_lookahead.slow_weights import SlowWeights


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


def detach_aliases(state_dict: dict[str, Any]) -> None:
    """Replace every tensor of a sharded ``state_dict`` by a copy: on the CPU, "offloaded" ones are live still."""
    for name, value in state_dict.items():
        if hasattr(value, "local_shards"):
            for shard in value.local_shards():
                shard.tensor = shard.tensor.clone()
        elif hasattr(value, "clone"):
            state_dict[name] = value.detach().clone()
