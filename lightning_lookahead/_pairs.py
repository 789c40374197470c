"""Fast weights and slow weights side by side, arranged once for many syncs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from lightning_lookahead._tensors import copies, interpolate_, local, not_finite, seem_finite

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

SMALL = 2**13
"""Values: what takes longer to call than to compute."""

JOINED = 2**14
"""Values: of many more torch makes work for several threads, which then wait for each other."""

BLOCK = 2**17
"""Values: as many fast and as many slow ones stay in a processor's cache from the first of two calls to the second."""


@dataclass
class Row:
    """Small fast weights, their slow ones, and the slow ones seen as one tensor."""

    fast: list[Tensor]
    slow: list[Tensor]
    slow_joined: Tensor

    def takes(self, theta: Tensor, phi: Tensor) -> bool:
        """Take in one more pair, if its slow weights lie right behind the others."""
        joined = self.slow_joined
        if not _continues(joined, phi) or joined.numel() + phi.numel() > JOINED:
            return False
        self.slow_joined = joined.as_strided((joined.numel() + phi.numel(),), (1,)).view(-1, *phi.shape[1:])
        self.fast.append(theta)
        self.slow.append(phi)
        return True


class Pairs:
    """The arithmetic of a sync over pairs of tensors.

    It is two calls over all of them, but on the CPU, where calls take longer than the values of small tensors, and
    memory is slower than its cache: the small ones whose slow weights lie `side_by_side` are joined, and with one
    thread the others are cut into blocks. The values are the same bit for bit.

    Args:
        fast: The fast weights.
        slow: A slow tensor of the same shape for each.
    """

    def __init__(self, fast: Iterable[Tensor], slow: Iterable[Tensor]) -> None:
        self.fast = list(fast)
        self._pointers = _pointers(self.fast)
        self._rows: list[Row] = []
        self._joined: list[Tensor] = []  # the fast weights of each row, from `not_finite` to `sync`
        self._alike: tuple[list[Tensor], list[Tensor]] = ([], [])  # fast and slow
        self._apart: tuple[list[Tensor], list[Tensor]] = ([], [])  # of different dtypes or on different devices
        latest: dict[object, Row] = {}
        for theta, phi in zip(local(self.fast), local(slow), strict=True):
            alike = theta.dtype == phi.dtype and theta.device == phi.device
            if alike and _is_small(theta) and _is_small(phi):
                row = latest.get(_kind(phi))
                if row is None or not row.takes(theta, phi):
                    row = latest[_kind(phi)] = Row([theta], [phi], phi)
                    self._rows.append(row)
                continue
            for tensors, tensor in zip(self._alike if alike else self._apart, (theta, phi), strict=True):
                tensors.append(tensor)

    def matches(self, fast: Iterable[Tensor]) -> bool:
        """Whether these are the same tensors, and where they were."""
        return _pointers(fast) == self._pointers

    @torch.no_grad()
    def sync(self, alpha: float) -> None:
        """``phi <- phi + alpha * (theta - phi)``, then ``theta <- phi``."""
        for row, joined in zip(self._rows, self._joined or self._join_fast(), strict=True):
            row.slow_joined.lerp_(joined, alpha)
            torch._foreach_copy_(row.fast, row.slow)
        self._joined = []
        fast, slow = self._alike
        if torch.get_num_threads() == 1 and all(tensor.is_cpu for tensor in fast):
            # Several threads would wait for each other at every block, and on a busy machine that takes long.
            for theta, phi in itertools.chain.from_iterable(map(_blocks, fast, slow)):
                phi.lerp_(theta, alpha)
                theta.copy_(phi)
        elif fast:
            torch._foreach_lerp_(slow, fast, alpha)
            torch._foreach_copy_(fast, slow)
        fast, slow = self._apart
        if fast:
            interpolate_(slow, fast, alpha)
            torch._foreach_copy_(fast, slow)

    @torch.no_grad()
    def not_finite(self) -> list[int]:
        """Which of the fast weights have a value that is infinite or no number; waits for the device once if none."""
        self._joined = self._join_fast()
        if seem_finite([*self._joined, *self._alike[0], *self._apart[0]]):
            return []
        self._joined = []
        return not_finite(self.fast)

    def _join_fast(self) -> list[Tensor]:
        return [torch.cat(row.fast) for row in self._rows]


@torch.inference_mode(mode=False)
@torch.no_grad()
def side_by_side(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors: small ones on the CPU that can be joined in one storage, the others each in its own."""
    small: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        if _is_small(tensor):
            small.setdefault(_kind(tensor), []).append(tensor)
    pieces = {kind: iter(torch.split(torch.cat(alike), [len(one) for one in alike])) for kind, alike in small.items()}
    return [next(pieces[_kind(tensor)]) if _is_small(tensor) else copies([tensor])[0] for tensor in tensors]


def _is_small(tensor: Tensor) -> bool:
    plain = not isinstance(tensor, DTensor) and tensor.ndim > 0
    return plain and 0 < tensor.numel() <= SMALL and tensor.is_cpu and tensor.is_contiguous()


def _kind(tensor: Tensor) -> object:
    """Equal for tensors that `torch.cat` joins into what their values in a row are."""
    return tensor.dtype, tensor.shape[1:]


def _continues(first: Tensor, second: Tensor) -> bool:
    """Whether the second tensor lies right behind the first, in the same storage."""
    return (
        second.data_ptr() == first.data_ptr() + first.numel() * first.element_size()
        and second.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    )


def _blocks(left: Tensor, right: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Both tensors in pieces that belong together."""
    if left.is_contiguous() and right.is_contiguous():
        return zip(torch.split(left.view(-1), BLOCK), torch.split(right.view(-1), BLOCK), strict=True)
    return [(left, right)]


def _pointers(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(torch.Tensor.data_ptr, local(tensors)))
