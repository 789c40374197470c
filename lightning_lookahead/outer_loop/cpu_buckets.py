"""The outer step in fewer calls, for a CPU. Without it, and its one call in `Cycle.split`, a sync is slower.

On a CPU a call takes longer than the arithmetic on a small tensor, and memory is slower than the cache. So the slow
weights of small tensors lie side by side in one storage, as one tensor. With one thread large tensors are cut into
blocks.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from .tensors import OuterMomentum, copy_, descend_, interpolate_, not_finite, seem_finite, sgd_step_

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

SMALL = 2**13
"""Most values of a small tensor: a call takes longer than its arithmetic."""

JOINED = 2**14
"""Most values of a joined tensor: larger ones torch divides among threads, which then wait for each other."""

BLOCK = 2**17
"""Values of a block: the fast and the slow ones stay in the cache from the first of two calls to the second."""

MOMENTUM_BLOCK = 2**18
"""Values of a block with momentum: it has a second slow tensor, and three calls."""

EVEN = 64
"""Values of which torch's kernels leave none over: what is left over they may round in another way."""

Row = tuple["Tensor", ...]
"""A fast weight, its slow weight, and its momentum if there is one."""


@dataclass
class Bucket:
    """Small fast weights, and their slow weights and momentum as tensors and joined.

    Attributes:
        fast: The fast weights.
        slow: Their slow weights.
        kept: The slow weights and their momentum, all pieces of the joined tensors.
        joined: The slow weights as one tensor, and their momentum as another if there is some.
    """

    fast: list[Tensor]
    slow: list[Tensor]
    kept: list[Tensor]
    joined: list[Tensor]


class CpuBuckets:
    """Fast and slow weights on the CPU, arranged once for many outer steps.

    Args:
        fast: The fast weights.
        slow: For each fast tensor a slow one of its shape. Small ones move to a storage that they share; the tensors
            and their values stay.
        momentum: Their momentum, arranged like the slow tensors.
    """

    def __init__(self, fast: Sequence[Tensor], slow: Sequence[Tensor], momentum: OuterMomentum | None = None) -> None:
        self._fast, self._momentum = fast, momentum
        self._pointers = _pointers(fast)
        self._joined: list[Tensor] = []  # the fast weights of each bucket, from `not_finite` to `outer_step`
        small: dict[object, list[Row]] = {}
        self._large: list[Row] = []
        self._others: list[Row] = []  # as they are: theta and phi have different dtypes, or momentum is rounded
        for row in zip(fast, slow, *([momentum.b] if momentum else []), strict=True):
            theta, phi = row[:2]
            # In half precision torch rounds a product in the last values of a tensor and not in the first ones, so that
            # it matters where a tensor is cut.
            if theta.dtype != phi.dtype or (momentum and phi.dtype not in {torch.float32, torch.float64}):
                self._others.append(row)
            elif all(map(_is_small, row)):
                small.setdefault((phi.dtype, phi.shape[1:]), []).append(row)
            else:
                self._large.append(row)
        self._buckets = [_bucket(rows) for alike in small.values() for rows in _filled(alike)]

    @staticmethod
    def arranged(
        fast: Sequence[Tensor], slow: Sequence[Tensor], momentum: OuterMomentum | None = None
    ) -> CpuBuckets | None:
        """Arrange the tensors; ``None`` if one is not on the CPU or is sharded."""
        if not all(tensor.is_cpu and not isinstance(tensor, DTensor) for tensor in itertools.chain(fast, slow)):
            return None
        return CpuBuckets(fast, slow, momentum)

    @property
    def fit(self) -> bool:
        """Whether the fast weights have not moved to other memory."""
        return _pointers(self._fast) == self._pointers

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def release(self) -> None:
        """Give each tensor of a shared storage its own: in other buckets a part would keep all of the storage alive."""
        for bucket in self._buckets:
            for tensor in bucket.kept:
                tensor.set_(tensor.clone())  # type: ignore[call-overload]  # the stubs know storages alone

    @torch.no_grad()
    def outer_step(self, alpha: float) -> None:
        """What `lightning_lookahead.outer_loop.algorithm.outer_step` does."""
        joined, self._joined = self._joined or self._join(), []
        step = self._step if self._momentum is None else self._momentum_step
        step(joined, alpha)
        for bucket in self._buckets:
            torch._foreach_copy_(bucket.fast, bucket.slow)
        if self._others:
            fast, slow, *b = map(list, zip(*self._others, strict=True))
            if self._momentum is None:
                interpolate_(slow, fast, alpha)
            else:
                descend_(slow, fast, replace(self._momentum, b=b[0]), alpha)
            copy_(fast, slow)

    def _step(self, joined: list[Tensor], alpha: float) -> None:
        for bucket, theta in zip(self._buckets, joined, strict=True):
            bucket.joined[0].lerp_(theta, alpha)
        if torch.get_num_threads() == 1:
            # Several threads would wait for each other at every block, and on a busy machine that takes long.
            for theta, phi in itertools.chain.from_iterable(_blocks(row, BLOCK) for row in self._large):
                phi.lerp_(theta, alpha)
                theta.copy_(phi)
        elif self._large:
            fast, slow = zip(*self._large, strict=True)
            torch._foreach_lerp_(slow, fast, alpha)
            torch._foreach_copy_(fast, slow)

    def _momentum_step(self, joined: list[Tensor], alpha: float) -> None:
        assert self._momentum is not None  # noqa: S101 (the caller has looked)
        for bucket, theta in zip(self._buckets, joined, strict=True):
            phi, b = bucket.joined
            sgd_step_([phi], [torch.sub(phi, theta, out=theta)], [b], self._momentum, alpha)
        # Several threads divide a block, so that it may be larger, and wait for each other less often.
        size = MOMENTUM_BLOCK * (1 if torch.get_num_threads() == 1 else 4)
        room: dict[torch.dtype, Tensor] = {}
        for theta, phi, b in itertools.chain.from_iterable(_blocks(row, size) for row in self._large):
            if phi.ndim == 1 and len(phi) <= size:
                room.setdefault(phi.dtype, phi.new_empty(size))
                _descend_block(phi, torch.sub(phi, theta, out=room[phi.dtype][: len(phi)]), b, self._momentum, alpha)
            else:  # not cut, as one of the three is not contiguous
                sgd_step_([phi], [phi - theta], [b], self._momentum, alpha)
            theta.copy_(phi)

    @torch.no_grad()
    def not_finite(self) -> list[int]:
        """Which of the fast weights have a value that is NaN or infinite."""
        self._joined = self._join()
        if seem_finite([*self._joined, *(row[0] for row in (*self._large, *self._others))]):
            return []
        self._joined = []
        return not_finite(self._fast)

    def _join(self) -> list[Tensor]:
        return [torch.cat(bucket.fast) for bucket in self._buckets]


def _descend_block(phi: Tensor, s: Tensor, b: Tensor, momentum: OuterMomentum, alpha: float) -> None:
    """`sgd_step_` for one block, in a single pass where torch's fused kernel gives the bits of `sgd_step_`."""
    if not _is_exact(phi.dtype, nesterov=momentum.nesterov):
        sgd_step_([phi], [s], [b], momentum, alpha)
        return
    left = len(phi) % EVEN
    if left:
        sgd_step_([phi[-left:]], [s[-left:]], [b[-left:]], momentum, alpha)
        phi, s, b = phi[:-left], s[:-left], b[:-left]
    _fused(phi, s, b, momentum, alpha)


def _fused(phi: Tensor, s: Tensor, b: Tensor, momentum: OuterMomentum, alpha: float) -> None:
    torch._fused_sgd_(
        [phi],
        [s],
        [b],
        weight_decay=0.0,
        momentum=momentum.mu,
        lr=alpha,
        dampening=0.0,
        nesterov=momentum.nesterov,
        maximize=False,
        is_first_step=False,
    )


@functools.cache
def _is_exact(dtype: torch.dtype, *, nesterov: bool) -> bool:
    """Whether torch's fused kernel gives the bits of `sgd_step_` on this machine: it may add without rounding."""
    numbers = torch.linspace(-1.0, 1.0, 3 * 4096, dtype=torch.float64).sin().mul(7.0).to(dtype).reshape(3, -1)
    momentum = OuterMomentum([], 0.9, nesterov)
    phi, s, b = numbers.clone().unbind()
    sgd_step_([phi], [s], [b], momentum, 0.7)
    try:
        _fused(numbers[0], numbers[1], numbers[2], momentum, 0.7)
    except Exception:  # noqa: BLE001 (a torch without it, or with other arguments)
        return False
    return torch.equal(phi, numbers[0]) and torch.equal(b, numbers[2])


def _is_small(tensor: Tensor) -> bool:
    return tensor.ndim > 0 and 0 < tensor.numel() <= SMALL and tensor.is_contiguous()


def _filled(rows: Iterable[Row]) -> Iterable[list[Row]]:
    """The rows in lists, each of at most `JOINED` fast values."""
    filled: list[Row] = []
    size = 0
    for row in rows:
        if filled and size + row[0].numel() > JOINED:
            yield filled
            filled, size = [], 0
        filled.append(row)
        size += row[0].numel()
    if filled:
        yield filled


@torch.inference_mode(mode=False)
@torch.no_grad()
def _bucket(rows: list[Row]) -> Bucket:
    fast, *others = map(list, zip(*rows, strict=True))
    return Bucket(fast, others[0], [*itertools.chain(*others)], [_side_by_side(tensors) for tensors in others])


def _side_by_side(tensors: list[Tensor]) -> Tensor:
    """One tensor whose pieces the tensors are from now on."""
    joined = torch.cat(tensors)
    for tensor, piece in zip(tensors, torch.split(joined, [len(tensor) for tensor in tensors]), strict=True):
        tensor.set_(piece)  # type: ignore[call-overload]  # the stubs know storages alone
    return joined


def _blocks(row: Row, size: int) -> Iterable[Row]:
    """The tensors of a row cut into blocks that belong together."""
    if all(tensor.is_contiguous() for tensor in row):
        return zip(*(torch.split(tensor.view(-1), size) for tensor in row), strict=True)
    return [row]


def _pointers(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(torch.Tensor.data_ptr, tensors))
