"""BatchNorm's statistics, and a second set of them that moves as the weights do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.modules.batchnorm import _BatchNorm

from .algorithm import outer_step
from .names import bare, unwrapped
from .tensors import copies, copy_, exchange_, not_finite

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .settings import Settings


def statistics_of(module: nn.Module) -> list[Tensor]:
    """All buffers of the module's BatchNorm layers."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    return [buffer for part in norms for buffer in part.buffers(recurse=False)]


def check_statistics(module: nn.Module | None, argument: str) -> None:
    """Raise if there is no module or it has no BatchNorm statistics."""
    if module is None or not statistics_of(module):
        what = "without a module" if module is None else f"{type(module).__name__} has no BatchNorm statistics"
        message = f"{argument} has nothing to do: {what}."
        raise ValueError(message)


class SlowStatistics:
    """Slow running means and variances of a module's BatchNorm layers; none, unless they are to sync.

    Counts of batches, which are integers, are left alone. The module's buffers are looked up at each use: Lightning
    puts others in their place when it moves the module.
    """

    def __init__(self, module: nn.Module | None, settings: Settings) -> None:
        syncs = settings.buffers == "sync"
        if syncs:
            check_statistics(module, "buffers='sync'")
        self._module = module if syncs else None
        self._slow = copies(self.live)

    @property
    def live(self) -> list[Tensor]:
        """The module's own."""
        statistics = statistics_of(self._module) if self._module is not None else []
        return [buffer for buffer in statistics if buffer.is_floating_point()]

    @property
    def names(self) -> list[str]:
        """Their names in the module's ``state_dict``."""
        live = set(self.live)
        buffers = unwrapped(self._module).named_buffers() if self._module is not None else ()
        return [bare(name) for name, buffer in buffers if buffer in live]

    @property
    def kept(self) -> list[Tensor]:
        """Those of the set that the module does not hold, on its device."""
        self._slow = [slow.to(live.device) for slow, live in zip(self._slow, self.live, strict=True)]
        return self._slow

    def counterparts(self) -> dict[str, Tensor]:
        """Copies of those that the module does not hold, by name."""
        return dict(zip(self.names, copies(self.kept), strict=True))

    def start(self) -> None:
        """Let the slow ones be those of the module."""
        copy_(self.kept, self.live)

    def sync(self, alpha: float) -> None:
        """Do the outer step, unless one of the module's own is NaN or infinite."""
        if not not_finite(self.live):
            outer_step(self.live, self.kept, alpha)

    def restore(self) -> None:
        """Put the module's own back to the slow ones."""
        copy_(self.live, self.kept)

    def exchange(self) -> None:
        """Let the module hold the other set."""
        exchange_(self.live, self.kept)
