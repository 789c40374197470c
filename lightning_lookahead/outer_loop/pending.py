"""A state that was loaded and waits for its model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .saved_format import OUTER_MOMENTUM
from .tensors import checksums, equal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Pending:
    """A state that was loaded and waits for its model, which may be loaded later.

    Attributes:
        two_sets: Whether the saved run had begun its first cycle.
        weights: Set -> parameter -> value.
        momentum: Entry of the optimizer's state -> parameter -> value.
        statistics: Set -> BatchNorm statistics, in the module's order.
        checksums: Parameter -> CRC-32 of the value that the model was saved with, where it is known.
        loaded: Parameter -> its value in the model's ``state_dict``, for parameters that rounded it in loading.
        changed: Parameters whose value in the model's ``state_dict`` is not the one that was saved.
        trained: Parameters that had a counterpart. Right after a sync they have no value in ``weights``.
        idle: Parameters without a gradient since the last sync; ``None``: all parameters.
        placed: Whether the state was put in its place once.
        left_out: Parameters that kept the values that they had when the state was put in its place.
    """

    two_sets: bool
    weights: dict[str, dict[Tensor, Tensor]] = field(default_factory=dict)
    momentum: dict[str, dict[Tensor, Tensor]] = field(default_factory=dict)
    statistics: dict[str, list[Tensor]] = field(default_factory=dict)
    checksums: dict[Tensor, int] | None = None
    loaded: dict[Tensor, Tensor] = field(default_factory=dict)
    changed: set[Tensor] = field(default_factory=set)
    trained: list[Tensor] = field(default_factory=list)
    idle: list[Tensor] | None = field(default_factory=list)
    placed: bool = False
    left_out: set[Tensor] = field(default_factory=set)

    @property
    def in_place(self) -> bool:
        """Whether the parameters hold the fast weights of this state, apart from those left out."""
        fast = self.weights.get("fast", {})
        return all(equal(p, value.to(p)) for p, value in fast.items() if p not in self.left_out)

    @property
    def parameters(self) -> dict[Tensor, None]:
        """The parameters that have a weight or outer momentum here, in order."""
        own = [*self.weights.values(), self.momentum.get(OUTER_MOMENTUM, {})]
        return dict.fromkeys(parameter for values in own for parameter in values)

    @property
    def fits(self) -> bool:
        """Whether the model has been loaded: whether the parameters hold the values that they were saved with."""
        return self.checksums is not None and bool(self.parameters) and not self.unlike()

    def unlike(self) -> set[Tensor]:
        """The parameters that do not hold the values that they were saved with."""
        known = self.checksums or {}
        asked = [p for p in self.parameters if p in known]
        found = zip(asked, checksums(asked), strict=True)
        return self.changed | {parameter for parameter, value in found if value != known[parameter]}
