"""Weights that are spread over ranks: DTensors (FSDP2, tensor parallelism) and the flat shards of FSDP1.

Every rank keeps phi of its pieces of theta, so that a sync is local. Both kinds of FSDP can leave weights gathered
after a forward: the next forward then does not see what is written to the shards, unless they are resharded first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.distributed.tensor import DTensor

from .names import bare, names_in, unwrapped
from .tensors import copies, copy_, exchange_, local

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from torch import Tensor, nn


def is_sharded(module: nn.Module | None, parameters: Iterable[Tensor]) -> bool:
    """Whether the weights are spread over ranks."""
    modules = module.modules() if module is not None else ()
    return any(isinstance(part, FullyShardedDataParallel) for part in modules) or any(
        isinstance(parameter, DTensor) for parameter in parameters
    )


def reshard(module: nn.Module) -> None:
    """Free every gathered copy of the weights, so that the next forward gathers them from the shards.

    Both kinds of FSDP keep the outermost group gathered after a forward without gradients.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
        elif isinstance(part, FullyShardedDataParallel):
            handle = part._handle
            # Before the first forward there is nothing to free, and nothing is ever gathered under NO_SHARD. FSDP1 has
            # no public way: leaving `summon_full_params` does not free what a forward has left behind.
            if handle is not None and handle.uses_sharded_strategy and hasattr(handle.flat_param, "_full_param_padded"):
                _reshard(part, handle, True)  # noqa: FBT003


def named_shards(module: nn.Module, values: Mapping[Tensor, Tensor], *, whole: bool) -> dict[str, Any]:
    """Values for parameters of a sharded module, by name, in the form in which its own weights are saved.

    The parameters hold the values while torch makes the module's ``state_dict``: so torch treats the values as it
    treats the weights of each strategy. All ranks take part.

    Args:
        module: The module that is sharded.
        values: Parameter -> value, of the parameter's type and the shape of this rank's piece.
        whole: Gather whole tensors on the CPU of the first rank; other ranks get none. Otherwise each rank has its
            shards.

    Returns:
        Name -> a copy: a whole tensor, a `DTensor`, or what FSDP1 has for it.
    """
    left_out = {bare(name) for name, _ in unwrapped(module).named_buffers()}
    left_out |= {name for parameter, own in names_in(module).items() if parameter not in values for name in own}
    reshard(module)
    exchange_(values.keys(), values.values())
    try:
        options = StateDictOptions(full_state_dict=whole, cpu_offload=whole)
        state_dict = get_model_state_dict(unwrapped(module), options=options)
        detach_aliases(state_dict)
    finally:
        exchange_(values.keys(), values.values())
        reshard(module)
    return {bare(name): value for name, value in state_dict.items() if bare(name) not in left_out}


def pieces(module: nn.Module, base: Mapping[Tensor, Tensor], named: Mapping[str, Any], *, whole: bool) -> list[Tensor]:
    """This rank's piece of each value that `named_shards` returned; all ranks take part.

    Args:
        module: The module that is sharded.
        base: Parameter -> the default where ``named`` lacks its name, of its dtype and the shape of this rank's piece.
        named: Name -> value.
        whole: Whether the values are whole tensors, on every rank; otherwise they are shards.
    """
    spelt = {bare(name): name for name in get_model_state_dict(unwrapped(module))}
    before = copies(base)
    reshard(module)
    try:
        copy_(base, base.values())
        load_named(module, {spelt[name]: value for name, value in named.items() if name in spelt}, whole=whole)
        reshard(module)
        return local(copies(base))
    finally:
        copy_(base, before)
        reshard(module)


def load_named(module: nn.Module, named: dict[str, Any], *, whole: bool) -> None:
    """Load tensors by name into a module that may be sharded; parameters without a value stay as they are."""
    set_model_state_dict(unwrapped(module), named, options=StateDictOptions(full_state_dict=whole, strict=False))


def detach_aliases(state_dict: dict[str, Any]) -> None:
    """Replace every tensor of a sharded ``state_dict`` by a copy: on the CPU torch offloads without copying."""
    for name, value in state_dict.items():
        if hasattr(value, "local_shards"):
            for shard in value.local_shards():
                shard.tensor = shard.tensor.clone()
        elif hasattr(value, "clone"):
            state_dict[name] = value.detach().clone()


def any_rank(flag: bool, device: torch.device) -> bool:  # noqa: FBT001
    """Whether the flag is set on any rank; one collective of one number."""
    found = torch.tensor(float(flag), device=device)
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    return bool(found.item())


def entry(module: nn.Module, root: nn.Module) -> nn.Module:
    """The module to call for ``module``'s forward: on this rank alone, unless weights are sharded.

    FSDP1 gathers weights only where its outermost wrapper is entered. DDP's wrapper would send buffers around.
    """
    return root if isinstance(root, FullyShardedDataParallel) else module


class BackwardSeen:
    """Whether a backward has reached parameters of which this rank has no piece: FSDP1 shows no gradient of them.

    Their flat parameter has its gradient on every rank, before FSDP1 scatters it.

    Args:
        module: The module.
        parameters: The parameters.
    """

    def __init__(self, module: nn.Module, parameters: Collection[Tensor]) -> None:
        self.since_last = False
        """Whether a backward has reached them since this was last set to ``False``."""
        handles = [part._handle for part in module.modules() if isinstance(part, FullyShardedDataParallel)]
        flat = [handle.flat_param for handle in handles if handle is not None]
        own = [f for f in flat if any(p is mine for p in f._params or [] for mine in parameters)]
        self._hooks = [f.register_hook(self._note) for f in own]  # type: ignore[no-untyped-call]

    @classmethod
    def where_needed(cls, module: nn.Module | None, parameters: Collection[Tensor]) -> BackwardSeen | None:
        """A `BackwardSeen` if this rank has no piece of any of the parameters, else ``None``."""
        parts = module.modules() if module is not None else ()
        if module is None or not any(isinstance(part, FullyShardedDataParallel) for part in parts):
            return None
        return None if any(piece.numel() for piece in local(parameters)) else cls(module, parameters)

    def _note(self, _: Tensor) -> None:
        self.since_last = True

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
