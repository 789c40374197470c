"""Checkpoints in which Lightning's `ModelPruning` has made its pruning permanent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_lookahead.outer_loop.names import names_in
from lightning_lookahead.outer_loop.tensors import checksum

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from lightning_lookahead.outer_loop.slow_weights import SlowWeights


def make_permanent(
    state_dict: dict[str, Any], module: nn.Module, states: Sequence[dict[str, Any]], slow_weights: Sequence[SlowWeights]
) -> None:
    """Prune the states of the outer loops as `ModelPruning` pruned the ``state_dict``, in place; nothing if it did not.

    `ModelPruning` replaces the ``state_dict`` to be saved: ``weight``, masked, stands for ``weight_orig`` and
    ``weight_mask``. It takes the weights that the module holds at that moment, which may be the other set.

    Args:
        state_dict: The module's ``state_dict``, as it will be written.
        module: The module, with its masks.
        states: The state of each outer loop, as it will be written.
        slow_weights: The outer loops.
    """
    masks: dict[str, Tensor] = {}
    for name, buffer in module.named_buffers():
        pruned = name.removesuffix("_mask")
        if name.endswith("_mask") and pruned in state_dict and f"{pruned}_orig" not in state_dict:
            masks[f"{pruned}_orig"] = buffer
    if not masks:
        return
    names = names_in(module)
    for state, slow in zip(states, slow_weights, strict=False):
        for parameter, value in slow.values(state["saved_with"]).items():
            for name in names.get(parameter, []):
                new = _permanent(name, value, masks).detach().to(parameter.dtype, copy=True)
                state_dict[_bare(name, masks)] = new
        for part in ("weights", "momentum"):
            for entry, values in state.get(part, {}).items():
                state[part][entry] = {_bare(n, masks): _permanent(n, value, masks) for n, value in values.items()}
        sums = {
            which: {name: checksum(value) for name, value in own.items()}
            for which, own in state.get("weights", {}).items()
        }
        bare = [_bare(name, masks) for name in state["checksums"].get(state["saved_with"], {})]
        sums[state["saved_with"]] = {name: checksum(state_dict[name]) for name in bare if name in state_dict}
        state["checksums"] = sums


def _permanent(name: str, value: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    return masks[name].to(value) * value if name in masks else value


def _bare(name: str, masks: Mapping[str, Tensor]) -> str:
    return name.removesuffix("_orig") if name in masks else name
