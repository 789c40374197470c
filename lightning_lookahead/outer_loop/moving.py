"""The weights that a sync moves, sorted once for many syncs."""

from __future__ import annotations

import cmath
from typing import TYPE_CHECKING, Any

import torch
from torch._utils import _flatten_dense_tensors
from torch.distributed.tensor import DTensor

from .tensors import not_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from .tensors import OuterMomentum

SMALL = 2**15
"""Most values of a small tensor: a call takes longer than its arithmetic, and it is not worth a block of its own."""

MANY = 20
"""Tensors from which on it is worth to join those of one shape apart."""

BLOCK = 2**17
"""Values of a block: theta and phi stay in the cache from the first of two calls to the second."""


class Moving:
    """The weights that a sync moves.

    Args:
        fast: theta.
        slow: For each fast tensor its phi.
        outer_momentum: Their momentum.
    """

    def __init__(self, fast: list[Tensor], slow: list[Tensor], outer_momentum: OuterMomentum | None = None) -> None:
        self.fast, self.slow, self.outer_momentum = fast, slow, outer_momentum
        self._kind = self._kind_now
        pairs = list(zip(fast, slow, strict=True))
        self._alike = all(_are_alike(theta, phi) for theta, phi in pairs)
        self._on_cpu = all(theta.is_cpu and not isinstance(theta, DTensor) for theta in fast)
        large = [theta.ndim == 0 or theta.numel() > SMALL for theta in fast]
        self._large = [pair for pair, is_large in zip(pairs, large, strict=True) if is_large]
        small = [pair for pair, is_large in zip(pairs, large, strict=True) if not is_large]
        self._small = [theta for theta, _ in small], [phi for _, phi in small]
        self._joins = _ways_to_join(self._small[0])

    @property
    def fits(self) -> bool:
        """Whether the fast weights are where they were when they were sorted, and of the dtype that they had."""
        return self._kind == self._kind_now

    @property
    def _kind_now(self) -> list[object]:
        return [(tensor.dtype, tensor.device) for tensor in self.fast[:1]]

    def portions(self) -> Iterator[tuple[list[Tensor], list[Tensor]]] | None:
        """Both sets in portions to move one after the other; ``None`` if their dtypes or devices differ.

        On a CPU large tensors go one by one, and with one thread in blocks: what is moved is in the cache from one call
        to the next. Several threads would wait for each other at every block, and on a busy machine that takes long.
        """
        if not self._alike or not self.fast:
            return None
        return self._for_cpu(cuts=torch.get_num_threads() == 1) if self._on_cpu else iter([(self.fast, self.slow)])

    def _for_cpu(self, *, cuts: bool) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        if self._small[0]:
            yield self._small
        for theta, phi in self._large:
            if cuts and theta.is_contiguous() and phi.is_contiguous():
                blocks = zip(*(torch.split(tensor.view(-1), BLOCK) for tensor in (theta, phi)), strict=True)
                yield from (([one], [other]) for one, other in blocks)
            else:
                yield [theta], [phi]

    def not_finite(self) -> list[int]:
        """Which of the fast weights have a value that is NaN or infinite; waits for the device."""
        with torch.no_grad():
            return [] if self._on_cpu and self._seem_finite() else not_finite(self.fast)

    def _seem_finite(self) -> bool:
        """Whether sums of all values are finite, as fast as memory can be read; finite values may overflow."""
        joined = (join(tensors) for join, tensors in self._joins)
        return all(map(_has_finite_sum, joined)) and all(_has_finite_sum(theta) for theta, _ in self._large)


def _ways_to_join(tensors: list[Tensor]) -> list[tuple[Callable[[list[Tensor]], Tensor], list[Tensor]]]:
    """How to make few tensors of many small ones: those of one shape `torch.cat` joins soonest, if they are many."""
    alike: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.dtype, tensor.shape[1:]), []).append(tensor)
    ways: list[tuple[Any, list[Tensor]]] = []
    others: dict[torch.dtype, list[Tensor]] = {}
    for own in alike.values():
        if len(own) >= MANY:
            ways.append((torch.cat, own))
        else:
            others.setdefault(own[0].dtype, []).extend(own)
    return ways + [(_flatten_dense_tensors, own) for own in others.values()]


def _are_alike(theta: Tensor, phi: Tensor) -> bool:
    return theta.dtype == phi.dtype and theta.device == phi.device and not isinstance(theta, DTensor)


def _has_finite_sum(tensor: Tensor) -> bool:
    half = tensor.dtype in {torch.float16, torch.bfloat16}
    return cmath.isfinite(tensor.sum(dtype=torch.float32 if half else None).item())
