"""Running means and variances of BatchNorm layers, and a slow set of them that syncs as the weights do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.modules.batchnorm import _BatchNorm

from .algorithm import outer_step
from .names import bare, unwrapped
from .tensors import copies, copy_, exchange_, not_finite

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from .settings import Settings


def statistics_of(module: nn.Module) -> list[Tensor]:
    """All buffers of the module's BatchNorm layers."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    return [buffer for part in norms for buffer in part.buffers(recurse=False)]


def check_statistics(module: nn.Module | None, argument: str) -> None:
    """Raise if there is no module or it has no BatchNorm statistics."""
    if module is None or not statistics_of(module):
        what = "no module was given" if module is None else f"{type(module).__name__} has no BatchNorm statistics"
        message = f"{argument} has nothing to do: {what}. Leave it out."
        raise ValueError(message)


class SlowStatistics:
    """Slow running means and variances of a module's BatchNorm layers; none, unless ``buffers="sync"``.

    Counts of batches are left alone: they are integers. The module's buffers are looked up at each use, because
    Lightning replaces them when it moves the module.
    """

    def __init__(
        self, module: nn.Module | None, settings: Settings, share: Callable[[list[Tensor]], None] | None = None
    ) -> None:
        syncs = settings.buffers == "sync"
        if syncs:
            check_statistics(module, "buffers='sync'")
        self._module = module if syncs else None
        self._counterparts = copies(self.live)
        self._share, self._looks = share, settings.nonfinite != "ignore"

    @property
    def live(self) -> list[Tensor]:
        """The statistics that the module holds."""
        statistics = statistics_of(self._module) if self._module is not None else []
        return [buffer for buffer in statistics if buffer.is_floating_point()]

    @property
    def names(self) -> list[str]:
        """Names of the statistics in the module's ``state_dict``."""
        live = set(self.live)
        buffers = unwrapped(self._module).named_buffers() if self._module is not None else ()
        return [bare(name) for name, buffer in buffers if buffer in live]

    @property
    def counterparts(self) -> list[Tensor]:
        """The set of statistics that the module does not hold, on the module's device."""
        self._counterparts = [slow.to(live.device) for slow, live in zip(self._counterparts, self.live, strict=True)]
        return self._counterparts

    def named_counterparts(self) -> dict[str, Tensor]:
        """Name in the module's ``state_dict`` -> copy of the counterpart."""
        return dict(zip(self.names, copies(self.counterparts), strict=True))

    def start(self) -> None:
        """Let the slow statistics be the module's."""
        copy_(self.counterparts, self.live)

    def sync(self, alpha: float) -> None:
        """Do the outer step, unless a statistic of the module is NaN or infinite; share what ranks share before it."""
        if self._share is not None:
            self._share(self.counterparts)
        live = self.live
        if live and not (self._looks and not_finite(live)):
            outer_step(live, self.counterparts, alpha)

    def restore(self) -> None:
        """Let the module hold what the slow statistics are."""
        copy_(self.live, self.counterparts)

    def exchange(self) -> None:
        """Exchange the module's statistics with their counterparts."""
        exchange_(self.live, self.counterparts)
