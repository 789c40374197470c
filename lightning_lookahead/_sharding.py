"""Weights that are spread over ranks: DTensors (FSDP2, tensor parallelism) and the flat shards of FSDP1.

Every rank keeps phi of the pieces of theta that it has, so that a sync is local. What needs care is that both kinds of
FSDP can leave weights gathered after a forward: what is then written to the shards is not seen by the next forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from collections.abc import Iterable

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


def any_rank(flag: bool, device: torch.device) -> bool:  # noqa: FBT001
    """Whether the flag is set on any rank; one collective of one number."""
    found = torch.tensor(float(flag), device=device)
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    return bool(found.item())


def entry(module: nn.Module, root: nn.Module) -> nn.Module:
    """The one of the two whose forward computes ``module``'s, on this rank alone where nothing is sharded.

    FSDP1 gathers weights only where its outermost wrapper is entered. DDP's wrapper would send buffers around.
    """
    return root if isinstance(root, FullyShardedDataParallel) else module
