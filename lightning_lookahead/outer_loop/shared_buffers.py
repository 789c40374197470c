"""Buffers of ranks that train apart: each rank's own between two syncs, shared at a sync."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .batch_norm import statistics_of
from .names import unwrapped
from .tensors import copies, copy_, equal, in_portions, not_finite

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from .workers import Workers


class SharedBuffers:
    """The buffers that DDP would send at each forward, and BatchNorm's.

    Args:
        module: The module, as DDP has wrapped it.
        workers: The ranks.
        sends: Whether DDP would send buffers; otherwise only BatchNorm's are shared.
    """

    def __init__(self, module: nn.Module, workers: Workers, *, sends: bool) -> None:
        self._module, self._workers, self._sends = unwrapped(module), workers, sends
        self._left_out = set(getattr(self._module, "_ddp_params_and_buffers_to_ignore", ()))
        self._kept: dict[str, Tensor] | None = None  # this rank's own, while the module holds the first rank's

    def _shared(self) -> dict[str, Tensor]:
        norms = set(statistics_of(self._module))
        return {
            name: buffer
            for name, buffer in self._module.named_buffers()
            if buffer in norms or (self._sends and name not in self._left_out)
        }

    def share(self, slow: Sequence[Tensor]) -> None:
        """Let BatchNorm's means and variances be the mean over all ranks, and other buffers the first rank's.

        The mean is taken over the ranks on which all of them are finite.

        Args:
            slow: Slow statistics: they become the first rank's, too.
        """
        shared, norms = self._shared().values(), set(statistics_of(self._module))
        averaged = [buffer for buffer in shared if buffer in norms and buffer.is_floating_point()]
        finite = not not_finite(averaged)
        number = self._workers.count(finite) if averaged else 0
        for (portion,) in in_portions(averaged) if number else ():
            copy_(portion, self._workers.mean(portion, portion, number, takes_part=finite))
        self._workers.take_firsts([*(buffer for buffer in shared if buffer not in set(averaged)), *slow])

    def hold_firsts(self) -> None:
        """Let the module hold the first rank's buffers, which a checkpoint's ``state_dict`` has, until `give_back`."""
        if self._kept is None:
            shared = self._shared()
            own = dict(zip(shared, copies(shared.values()), strict=True))
            self.take_firsts()
            # What is the same on all ranks may be written to meanwhile.
            self._kept = {name: own[name] for name, buffer in shared.items() if not equal(own[name], buffer)}

    def take_firsts(self) -> None:
        """Let the buffers be the first rank's."""
        self._workers.take_firsts(list(self._shared().values()))

    def give_back(self) -> None:
        """Let the module hold this rank's own buffers again."""
        self.load(self._kept or {})
        self._kept = None

    def own(self) -> dict[str, Tensor]:
        """Name -> this rank's own buffer, of those that the module saves."""
        passing = {
            f"{prefix}.{name}" if prefix else name
            for prefix, part in self._module.named_modules()
            for name in part._non_persistent_buffers_set
        }
        named = {name: buffer for name, buffer in self._module.named_buffers() if name not in passing}
        return {**named, **{name: value for name, value in (self._kept or {}).items() if name in named}}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take this rank's own buffers from a checkpoint."""
        named = {name: buffer for name, buffer in self._module.named_buffers() if name in saved}
        copy_(named.values(), [saved[name] for name in named])
