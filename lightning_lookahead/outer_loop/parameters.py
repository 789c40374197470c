"""The parameters of an optimizer: what they are called, and whether they are spread over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.parameter import is_lazy

from .names import names_in
from .sharding import is_sharded, reshard

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimizer in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class Parameters:
    """The parameters of an optimizer, and the module that names them.

    Args:
        optimizer: The optimizer.
        module: The module that they belong to. Without one they go by their place in the optimizer.

    Attributes:
        sharded: Whether each rank has a piece of them only.

    Raises:
        ValueError: If one has no values yet, or if they are sharded and there is no module.
    """

    def __init__(self, optimizer: Optimizer, module: nn.Module | None) -> None:
        self._optimizer, self.module = optimizer, module
        if any(parameter.is_meta or is_lazy(parameter) for parameter in self.listed):
            message = (
                "optimizer has parameters without values (on the meta device, or of a lazy module), which phi could"
                " start from: materialize them before training starts, a lazy module by running a batch through it."
            )
            raise ValueError(message)
        self.sharded = is_sharded(module, self.listed)
        if self.sharded and module is None:
            message = "optimizer has sharded parameters: give the module that they belong to, too, as module=."
            raise ValueError(message)

    @property
    def listed(self) -> list[Tensor]:
        """All of them, in the order of the optimizer's groups."""
        return parameters_of(self._optimizer)

    @property
    def device(self) -> torch.device:
        """The device of the first one."""
        return self.listed[0].device

    def names(self) -> dict[Tensor, str]:
        """Each one's name in the module, or its place in the optimizer, ``"[0]"``."""
        known = names_in(self.module) if self.module is not None else {}
        return {p: known[p][0] if p in known else f"[{at}]" for at, p in enumerate(self.listed)}

    def describe(self, parameter: Tensor) -> str:
        """What an error calls a parameter."""
        name = self.names()[parameter]
        if name.startswith("["):
            return f"Parameter {name[1:-1]} of the optimizer, of shape {tuple(parameter.shape)},"
        return f"Parameter {name!r}"

    def reshard(self) -> None:
        """Free gathered copies of the weights, so that what is written to the shards is seen."""
        if self.sharded and self.module is not None:
            reshard(self.module)
