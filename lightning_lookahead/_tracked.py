"""Which parameters of an optimizer are trained, and the second tensor that each of them has."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from lightning_lookahead._tensors import copies, place

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor
    from torch.optim import Optimizer


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimizer in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class Tracked:
    """The trained parameters of an optimizer, each with a tensor that starts from its value when it appears.

    Parameters that need no gradient are left out until they do; those on one storage count once. A parameter that was
    trained stays although it is frozen later.

    Attributes:
        kept: Trained parameter -> its second tensor.
        stepped: Parameters that a step may move: the trained ones and those on the same storage.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.kept: dict[Tensor, Tensor] = {}
        self.stepped: list[Tensor] = []
        self._optimizer = optimizer
        self._listed: list[Tensor] = []
        self._idle: list[Tensor] = []
        self.update()

    def update(self, also: Collection[Tensor] = ()) -> None:
        """Look at the optimizer's groups again; take in ``also``, whether they need a gradient or not."""
        self._listed = parameters_of(self._optimizer)
        places = {place(parameter): parameter for parameter in reversed(self._listed)}
        single = dict.fromkeys(reversed(places.values()))
        trained = [p for p in single if p in self.kept or p.requires_grad or p in also]
        new = [parameter for parameter in trained if parameter not in self.kept]
        known = {**self.kept, **dict(zip(new, copies(new), strict=True))}
        self.kept = {parameter: known[parameter] for parameter in trained}
        self.stepped = [parameter for parameter in self._listed if places[place(parameter)] in self.kept]
        self._idle = [parameter for parameter in single if parameter not in self.kept]

    def update_if_more(self) -> None:
        """Take in parameters that were added or unfrozen; costs nothing per trained parameter."""
        listed = sum(len(group["params"]) for group in self._optimizer.param_groups)
        if listed != len(self._listed) or any(parameter.requires_grad for parameter in self._idle):
            self.update()

    def update_if_other(self) -> None:
        """Take in parameters that were put in the place of others."""
        if any(map(operator.is_not, self._listed, parameters_of(self._optimizer))):
            self.update()

    def follow(self) -> None:
        """Move each second tensor to where its parameter is now."""
        self.kept = {parameter: kept.to(parameter.device) for parameter, kept in self.kept.items()}
