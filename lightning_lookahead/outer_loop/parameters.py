"""The parameters of an optimizer: their names, and whether they are sharded."""

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
        module: The module that they belong to. Without one a parameter's name is its place in the optimizer.

    Attributes:
        sharded: Whether each rank has only a piece of them.

    Raises:
        ValueError: If a parameter has no values yet, or if parameters are sharded and there is no module.
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
        """All parameters, in the order of the optimizer's groups."""
        return parameters_of(self._optimizer)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return self.listed[0].device

    def names(self) -> dict[Tensor, str]:
        """Parameter -> its name in the module, or its place in the optimizer, ``"[0]"``."""
        known = names_in(self.module) if self.module is not None else {}
        return {p: known[p][0] if p in known else f"[{at}]" for at, p in enumerate(self.listed)}

    def describe(self, parameter: Tensor) -> str:
        """A parameter's name, for the beginning of an error."""
        name = self.names()[parameter]
        if name.startswith("["):
            return f"Parameter {name[1:-1]} of the optimizer, of shape {tuple(parameter.shape)},"
        return f"Parameter {name!r}"

    def reshard(self) -> None:
        """Free gathered copies of the weights, so that the next forward sees what was written to the shards."""
        if self.sharded and self.module is not None:
            reshard(self.module)
