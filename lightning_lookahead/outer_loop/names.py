"""Names of parameters in a module's ``state_dict``, whatever the module is wrapped in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor, nn

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "_forward_module.")
"""Parts of names that FSDP1, activation checkpointing, ``torch.compile`` and Fabric add."""


def bare(name: str) -> str:
    """The name without the parts that wrappers add."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of DDP and Fabric."""
    while type(module).__name__ in {"DistributedDataParallel", "_FabricModule"}:
        inner: Any = getattr(module, "_forward_module", None)
        module = inner if inner is not None else cast("nn.Module", module.module)
    return module


def names_in(module: nn.Module) -> dict[Tensor, list[str]]:
    """Each parameter's names in the module's ``state_dict``: more than one if it is tied."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in unwrapped(module).named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(bare(name))
    return names
