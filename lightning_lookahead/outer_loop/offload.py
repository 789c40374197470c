"""Tensors on the CPU that visit the GPU for a sync, without the GPU waiting for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Offload:
    """Copies pinned memory to a GPU before a sync and back after it, on a stream of its own.

    Between a sync and the next `fetch` the GPU holds no copy. ``pairs`` are a fast weight, on one GPU, and a tensor
    that the CPU keeps for it: its slow weight or its momentum.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._fetched: dict[Tensor, Tensor] = {}  # kept tensor -> its copy
        self._written: torch.cuda.Event | None = None

    def fetch(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Begin to copy the kept tensors to the GPU, while it computes a step."""
        if self._fetched or not pairs:
            return
        self._stream = self._stream or torch.cuda.Stream(pairs[0][0].device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            self._fetched = {kept: kept.to(theta.device, non_blocking=True) for theta, kept in pairs}

    def take(self, pairs: list[tuple[Tensor, Tensor]]) -> dict[Tensor, Tensor]:
        """Kept tensor -> its copy on the GPU, ready for the next kernels."""
        self.fetch(pairs)
        fetched, self._fetched = self._fetched, {}
        if self._stream is not None and fetched:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for copy in fetched.values():
                copy.record_stream(current)
        return {
            kept: fetched[kept] if kept in fetched else kept.to(theta.device, non_blocking=True)
            for theta, kept in pairs
        }

    def store(self, taken: dict[Tensor, Tensor]) -> None:
        """Begin to copy ``taken`` back to the kept tensors, after the kernels so far."""
        if self._stream is None or not taken:
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for kept, copy in taken.items():
                kept.copy_(copy, non_blocking=True)
                copy.record_stream(self._stream)
            self._written = self._stream.record_event()

    def wait(self) -> None:
        """Wait until the kept tensors are written, so that the CPU can read them."""
        if self._written is not None:
            self._written.synchronize()
            self._written = None

    def forget(self) -> None:
        """Drop fetched copies: the kept tensors have changed."""
        self._fetched = {}

    def __getstate__(self) -> dict[str, Any]:
        self.wait()
        return {"_stream": None, "_fetched": {}, "_written": None}
