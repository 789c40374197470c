"""The tensors b that an outer step with momentum keeps beside phi."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .saved_format import OUTER_MOMENTUM
from .tensors import OuterMomentum, copy_

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from torch import Tensor

    from .settings import Settings


class MomentumBuffers:
    """b of each parameter that a sync has moved: a tensor of phi's shape and dtype, on phi's device.

    An absent b is zero. Without ``outer_momentum`` all are absent.

    Args:
        settings: ``outer_momentum`` and ``outer_nesterov``.

    Attributes:
        b: Parameter -> b.
    """

    def __init__(self, settings: Settings) -> None:
        self.mu, self._nesterov = settings.outer_momentum, settings.outer_nesterov
        self.b: dict[Tensor, Tensor] = {}

    @torch.inference_mode(mode=False)
    def of(self, fast: Collection[Tensor], slow: Collection[Tensor]) -> OuterMomentum | None:
        """The momentum of these weights, zero for new ones; ``None`` without ``outer_momentum``."""
        if not self.mu:
            return None
        for theta, phi in zip(fast, slow, strict=True):
            if theta not in self.b:
                b = torch.zeros_like(phi)
                self.b[theta] = b.pin_memory() if phi.is_cpu and theta.is_cuda else b
        return OuterMomentum([self.b[theta] for theta in fast], self.mu, self._nesterov)

    def forget(self, parameters: Iterable[Tensor]) -> None:
        """Let b of these parameters be zero."""
        for parameter in parameters:
            self.b.pop(parameter, None)

    def keep(self, counterparts: Mapping[Tensor, Tensor]) -> None:
        """Drop b of parameters that have left the optimizer."""
        self.b = {parameter: b for parameter, b in self.b.items() if parameter in counterparts}

    def follow(self, counterparts: Mapping[Tensor, Tensor]) -> None:
        """Move each b to where phi is."""
        self.b = {parameter: b.to(counterparts[parameter].device) for parameter, b in self.b.items()}

    def saved(self, counterparts: Mapping[Tensor, Tensor], *, lean: bool) -> dict[str, dict[Tensor, Tensor]]:
        """`OUTER_MOMENTUM` -> parameter -> b, of all trained parameters; ``lean`` leaves absent ones out."""
        if not self.mu or (lean and not self.b):
            return {}
        if lean:
            return {OUTER_MOMENTUM: dict(self.b)}
        return {
            OUTER_MOMENTUM: {p: self.b[p] if p in self.b else torch.zeros_like(phi) for p, phi in counterparts.items()}
        }

    def restore(self, saved: Mapping[str, Mapping[Tensor, Tensor]], counterparts: Mapping[Tensor, Tensor]) -> None:
        """Take b from a checkpoint, for the trained parameters; without ``outer_momentum`` nothing."""
        own = {parameter: b for parameter, b in saved.get(OUTER_MOMENTUM, {}).items() if parameter in counterparts}
        momentum = self.of(own, [counterparts[parameter] for parameter in own])
        if momentum is not None:
            copy_(momentum.b, own.values())
