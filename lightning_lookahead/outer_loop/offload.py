"""Slow weights on the CPU that visit the GPU for a sync, without the GPU waiting for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Offload:
    """Copies pinned memory to a GPU before a sync and back after it, on a stream of its own.

    Between a sync and the next `fetch` no slow weight is on the GPU. ``pairs`` are theta -> phi, theta on one GPU.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._fetched: dict[Tensor, Tensor] = {}
        self._written: torch.cuda.Event | None = None

    def fetch(self, pairs: dict[Tensor, Tensor]) -> None:
        """Begin to copy phi to theta's device, while the GPU computes a step."""
        if self._fetched or not pairs:
            return
        self._stream = self._stream or torch.cuda.Stream(next(iter(pairs)).device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            self._fetched = {theta: phi.to(theta.device, non_blocking=True) for theta, phi in pairs.items()}

    def take(self, pairs: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Theta -> phi on theta's device, ready for the next kernels."""
        self.fetch(pairs)
        fetched, self._fetched = self._fetched, {}
        if self._stream is not None and fetched:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for phi in fetched.values():
                phi.record_stream(current)
        return {
            theta: fetched[theta] if theta in fetched else phi.to(theta.device, non_blocking=True)
            for theta, phi in pairs.items()
        }

    def store(self, pairs: dict[Tensor, Tensor], taken: dict[Tensor, Tensor]) -> None:
        """Begin to copy ``taken`` back to phi, after the kernels so far."""
        if self._stream is None or not pairs:
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for theta, phi in pairs.items():
                phi.copy_(taken[theta], non_blocking=True)
                taken[theta].record_stream(self._stream)
            self._written = self._stream.record_event()

    def wait(self) -> None:
        """Wait until phi is back, so that the CPU can read it."""
        if self._written is not None:
            self._written.synchronize()
            self._written = None

    def forget(self) -> None:
        """Drop fetched copies: phi has changed."""
        self._fetched = {}

    def __getstate__(self) -> dict[str, Any]:
        self.wait()
        return {"_stream": None, "_fetched": {}, "_written": None}
