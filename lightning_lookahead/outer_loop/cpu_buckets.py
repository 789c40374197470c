"""The outer step in fewer calls, for a CPU. Without it, and its one call in `Cycle.split`, a sync is slower.

On a CPU a call takes longer than the arithmetic on a small tensor, and memory is slower than the cache. So the slow
weights of small tensors lie side by side in one storage, as one tensor. With one thread large tensors are cut into
blocks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from .tensors import copy_, interpolate_, not_finite, seem_finite

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

SMALL = 2**13
"""Most values of a small tensor: a call takes longer than its arithmetic."""

JOINED = 2**14
"""Most values of a joined tensor: larger ones torch divides among threads, which then wait for each other."""

BLOCK = 2**17
"""Values of a block: the fast and the slow ones stay in the cache from the first of two calls to the second."""


@dataclass
class Bucket:
    """Small fast weights, their slow weights, and the slow weights seen as one tensor."""

    fast: list[Tensor]
    slow: list[Tensor]
    joined: Tensor


class CpuBuckets:
    """Fast and slow weights on the CPU, arranged once for many outer steps.

    Args:
        fast: The fast weights.
        slow: For each fast tensor a slow one of its shape. Small ones move to a storage that they share; the tensors
            and their values stay.
    """

    def __init__(self, fast: Sequence[Tensor], slow: Sequence[Tensor]) -> None:
        self._fast = fast
        self._pointers = _pointers(fast)
        self._joined: list[Tensor] = []  # the fast weights of each bucket, from `not_finite` to `outer_step`
        small: dict[object, list[tuple[Tensor, Tensor]]] = {}
        self._large: list[tuple[Tensor, Tensor]] = []
        self._unlike: list[tuple[Tensor, Tensor]] = []  # theta and phi have different dtypes
        for theta, phi in zip(fast, slow, strict=True):
            if theta.dtype != phi.dtype:
                self._unlike.append((theta, phi))
            elif _is_small(theta) and _is_small(phi):
                small.setdefault((phi.dtype, phi.shape[1:]), []).append((theta, phi))
            else:
                self._large.append((theta, phi))
        self._buckets = [_bucket(pairs) for alike in small.values() for pairs in _filled(alike)]

    @staticmethod
    def arranged(fast: Sequence[Tensor], slow: Sequence[Tensor]) -> CpuBuckets | None:
        """Arrange the tensors; ``None`` if one is not on the CPU or is sharded."""
        if not all(tensor.is_cpu and not isinstance(tensor, DTensor) for tensor in itertools.chain(fast, slow)):
            return None
        return CpuBuckets(fast, slow)

    @property
    def fit(self) -> bool:
        """Whether the fast weights have not moved to other memory."""
        return _pointers(self._fast) == self._pointers

    @torch.no_grad()
    def outer_step(self, alpha: float) -> None:
        """What `lightning_lookahead.outer_loop.algorithm.outer_step` does."""
        for bucket, joined in zip(self._buckets, self._joined or self._join(), strict=True):
            bucket.joined.lerp_(joined, alpha)
            torch._foreach_copy_(bucket.fast, bucket.slow)
        self._joined = []
        if torch.get_num_threads() == 1:
            # Several threads would wait for each other at every block, and on a busy machine that takes long.
            for theta, phi in itertools.chain.from_iterable(itertools.starmap(_blocks, self._large)):
                phi.lerp_(theta, alpha)
                theta.copy_(phi)
        elif self._large:
            fast, slow = zip(*self._large, strict=True)
            torch._foreach_lerp_(slow, fast, alpha)
            torch._foreach_copy_(fast, slow)
        if self._unlike:
            fast, slow = zip(*self._unlike, strict=True)
            interpolate_(slow, fast, alpha)
            copy_(fast, slow)

    @torch.no_grad()
    def not_finite(self) -> list[int]:
        """Which of the fast weights have a value that is NaN or infinite."""
        self._joined = self._join()
        if seem_finite([*self._joined, *(theta for theta, _ in (*self._large, *self._unlike))]):
            return []
        self._joined = []
        return not_finite(self._fast)

    def _join(self) -> list[Tensor]:
        return [torch.cat(bucket.fast) for bucket in self._buckets]


def _is_small(tensor: Tensor) -> bool:
    return tensor.ndim > 0 and 0 < tensor.numel() <= SMALL and tensor.is_contiguous()


def _filled(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterable[list[tuple[Tensor, Tensor]]]:
    """The pairs in lists, each of at most `JOINED` values."""
    filled: list[tuple[Tensor, Tensor]] = []
    size = 0
    for theta, phi in pairs:
        if filled and size + phi.numel() > JOINED:
            yield filled
            filled, size = [], 0
        filled.append((theta, phi))
        size += phi.numel()
    if filled:
        yield filled


@torch.inference_mode(mode=False)
@torch.no_grad()
def _bucket(pairs: list[tuple[Tensor, Tensor]]) -> Bucket:
    fast, slow = [theta for theta, _ in pairs], [phi for _, phi in pairs]
    joined = torch.cat(slow)
    for phi, piece in zip(slow, torch.split(joined, [len(phi) for phi in slow]), strict=True):
        phi.set_(piece)  # type: ignore[call-overload]  # the stubs know storages alone
    return Bucket(fast, slow, joined)


def _blocks(left: Tensor, right: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Both tensors cut into blocks, pairwise."""
    if left.is_contiguous() and right.is_contiguous():
        return zip(torch.split(left.view(-1), BLOCK), torch.split(right.view(-1), BLOCK), strict=True)
    return [(left, right)]


def _pointers(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(torch.Tensor.data_ptr, tensors))
