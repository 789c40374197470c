"""The alpha of a sync: a number, a schedule's value, or an estimate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.parallel import DistributedDataParallel

from .adaptive import AdaptiveAlpha, Loss, TrainingLoss
from .momentum import state_names
from .schedules import alpha_at

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from .cycles import Cycle
    from .parameters import Parameters
    from .settings import Settings


class Alpha:
    """Tells each sync its step size.

    Args:
        optimizer: The inner optimizer. ``"fisher"`` estimates need its state.
        settings: ``alpha``, for groups without a ``"lookahead_alpha"``.
        parameters: The optimizer's parameters: estimates refuse sharded ones.
        loss: The training loss. ``"secant"`` and ``"hvp"`` estimates need it.
        comes_later: Whether the caller sets `loss` before a sync needs it.

    Attributes:
        loss: The training loss of the last batch.
        last: The step size of the last sync; ``None`` before the first one.

    Raises:
        ValueError: If an estimate lacks the loss or the state that it needs, or if the parameters are sharded.
    """

    def __init__(
        self, optimizer: Optimizer, settings: Settings, parameters: Parameters, loss: Loss | None, *, comes_later: bool
    ) -> None:
        self._optimizer, self._parameters, self._check = optimizer, parameters, settings.check_alpha
        self.loss = TrainingLoss(loss) if loss is not None else None
        self.last: float | None = None
        alpha = settings.alpha
        if not isinstance(alpha, AdaptiveAlpha):
            return
        if parameters.sharded:
            message = f"alpha={alpha} does not work with sharded parameters: give a number or a schedule."
            raise ValueError(message)
        if alpha.needs_loss and loss is None and not comes_later:
            message = f"alpha={alpha} needs the training loss: give a function that computes it, loss=."
            raise ValueError(message)
        for group in optimizer.param_groups:
            alpha.check(state_names(optimizer, group), optimizer)

    def of(self, cycle: Cycle) -> float:
        """The step size of the sync that ends a cycle."""
        source, moving = cycle.step_size, cycle.moving
        if isinstance(source, float):
            alpha = source
        elif not isinstance(source, AdaptiveAlpha):
            alpha = alpha_at(source, cycle.syncs, self._check)
        elif not moving.fast or (source.needs_loss and self.loss is None):  # a resumed run has no loss yet
            alpha = source.alpha_low
        else:
            reduce = source.needs_loss and isinstance(self._parameters.module, DistributedDataParallel)
            weights = dict(zip(moving.fast, moving.slow, strict=True))
            alpha = source.step_size(self._optimizer, weights, self.loss, reduce=reduce)
        if moving.fast:  # not all frozen
            self.last = alpha
        return alpha
