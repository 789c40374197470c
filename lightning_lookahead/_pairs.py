"""Fast weights and slow weights side by side, arranged once for many syncs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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


class Row(NamedTuple):
    """Small fast weights, their slow ones, and the slow ones seen as one tensor."""

    fast: list[Tensor]
    slow: list[Tensor]
    slow_joined: Tensor


class Pairs:
    """The arithmetic of a sync over pairs of tensors.

    It is two calls over all of them, but for small tensors on the CPU, where calls take longer than values: those whose
    slow weights lie `side_by_side` are joined. The values are the same bit for bit.

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
        for theta, phi in zip(local(self.fast), local(slow), strict=True):
            if _is_small(theta) and _is_small(phi) and theta.dtype == phi.dtype:
                self._join(theta.detach().view(-1), phi.view(-1))
                continue
            alike = theta.dtype == phi.dtype and theta.device == phi.device
            for tensors, tensor in zip(self._alike if alike else self._apart, (theta, phi), strict=True):
                tensors.append(tensor)

    def _join(self, theta: Tensor, phi: Tensor) -> None:
        last = self._rows[-1].slow_joined if self._rows else None
        if last is not None and _continues(last, phi) and last.numel() + phi.numel() <= JOINED:
            fast, slow, _ = self._rows[-1]
            joined = last.as_strided((last.numel() + phi.numel(),), (1,))
            self._rows[-1] = Row([*fast, theta], [*slow, phi], joined)
        else:
            self._rows.append(Row([theta], [phi], phi))

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
        for (fast, slow), move in ((self._alike, torch._foreach_lerp_), (self._apart, interpolate_)):
            if fast:
                move(slow, fast, alpha)
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
    """Copies of tensors: small ones on the CPU in one storage for each dtype, the others each in its own."""
    small: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if _is_small(tensor):
            small.setdefault(tensor.dtype, []).append(tensor)
    pieces = {
        dtype: iter(torch.split(torch.cat([one.detach().view(-1) for one in alike]), [one.numel() for one in alike]))
        for dtype, alike in small.items()
    }
    return [
        next(pieces[tensor.dtype]).view(tensor.shape) if _is_small(tensor) else copies([tensor])[0]
        for tensor in tensors
    ]


def _is_small(tensor: Tensor) -> bool:
    plain = not isinstance(tensor, DTensor)
    return plain and 0 < tensor.numel() <= SMALL and tensor.is_cpu and tensor.is_contiguous()


def _continues(first: Tensor, second: Tensor) -> bool:
    """Whether the second tensor lies right behind the first, in the same storage."""
    return (
        second.data_ptr() == first.data_ptr() + first.numel() * first.element_size()
        and second.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    )


def _pointers(tensors: Iterable[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in local(tensors)]
