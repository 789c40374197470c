"""`SlowWeights`: the outer loop of Lookahead around one torch optimizer. Imports torch and nothing of Lightning."""

from __future__ import annotations

import zlib
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from .algorithm import outer_step
from .alpha import Alpha
from .batch_norm import SlowStatistics
from .cycles import Cycles
from .inner_loop import InnerLoop
from .inner_optimizer import check_optimizer
from .momentum import Momentum
from .nonfinite import all_finite, restore
from .parameters import Parameters
from .persistence import Persistence
from .schedules import CycleLength, StepSize, describe
from .settings import Buffers, Nonfinite, Settings, warn_of_differences
from .sharded_entries import Shards
from .weight_pairs import WeightPairs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from lightning_lookahead._arguments import PullbackMomentum

    from .saved_format import Weights
    from .workers import Workers


class SlowWeights:
    """The outer loop of Lookahead around one optimizer: one slow tensor per trained parameter.

    Every ``k`` inner steps it does Algorithm 1's `outer_step`. phi starts from the weights before the first step. An
    inner step is a call of ``optimizer.step()`` that moved weights, not one that a scaler skipped or without gradients.

    To resume, save the model, the optimizer and this object (the optimizer's ``state_dict`` is what it is without it);
    build the three anew and load each one's in any order.

    Args:
        optimizer: The inner optimizer, any `torch.optim.Optimizer`. Its parameters must be where they will be trained
            (device, shard). Frozen ones are left alone until they need a gradient. Those of a new group join, and those
            that are put into another group's list do so at the next sync.
        k: Inner steps from one sync to the next; at least 1. Or a function of the number of syncs done, `Linear`, say.
            A group's own ``"lookahead_k"`` goes before it.
        alpha: Slow weights step size, in (0, 1]; 1 leaves the inner optimizer as it is. Or a function as for ``k``, or
            an `AdaptiveAlpha`. A group's own ``"lookahead_alpha"`` goes before it. With ``outer_momentum`` it may be
            above 1, below ``2 (1 + m) / (1 + 2 m)`` for Nesterov's momentum m.
        module: The module that the parameters belong to, as FSDP or a `Fabric` returned it: it gives them their names.
            Needed if they are sharded.
        sync_in_step: Sync at the end of the k-th ``optimizer.step()``. ``False``: the caller syncs when it is `due`.
        model_weights: The weights that the model's own ``state_dict`` holds in checkpoints; this one's holds the
            others. ``None``: those that the parameters hold when it is called.
        start_step: Inner steps before the first cycle begins; until then phi is theta.
        exclude: Parameters to leave alone.
        shared: Parameters that another optimizer moves, too.
        pullback_momentum: What a sync does to the optimizer's state: ``"none"`` leaves it alone, ``"pullback"`` moves
            its momentum as the weights, ``"reset"`` makes it that of a new optimizer.
        outer_momentum: mu of the outer step, in [0, 1); 0 is Lookahead. It costs one more slow tensor per parameter.
        outer_nesterov: Whether the outer momentum is Nesterov's; without outer momentum it is not used.
        nonfinite: What a sync does if a fast weight is NaN or infinite: ``"raise"``, with phi as it was; ``"skip"``
            this sync; ``"restore"`` theta to phi, with the state of a new optimizer. ``"ignore"`` does not look: a
            sync then reads nothing twice and never waits for the device.
        slow_dtype: Floating-point type of the slow weights; by default the parameters', but at least float32.
        slow_device: Device of the slow weights, ``"cpu"``, say; by default the parameters'.
        buffers: What a sync does to the running means and variances of ``module``'s BatchNorm layers: ``"keep"`` leaves
            them alone, ``"sync"`` moves them as the weights.
        loss: Computes the training loss at the weights that the parameters hold, for an `AdaptiveAlpha`.
        measure_distance: Keep the distance between theta and phi just before each sync in ``last_distance``.
        workers: Ranks that train apart: a sync moves phi towards the mean of their fast weights. All ranks sync
            together, so that an inner step is counted as soon as it is attempted.
        share_buffers: Called at a sync of the optimizer's first group with its slow BatchNorm statistics, if there are
            some: those ranks share their buffers in it.

    Raises:
        TypeError: If ``optimizer`` is not a torch optimizer.
        ValueError: If an option is out of range or would do nothing, or if the optimizer has slow weights already,
            contains Lookahead, or has parameters without values.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.25)
        >>> slow = SlowWeights(optimizer, k=2, alpha=0.5)
        >>> for _ in range(2):  # two steps down the slope of w**2: 1 -> 0.5 -> 0.25, then half the way back
        ...     optimizer.zero_grad()
        ...     (weight**2).sum().backward()
        ...     loss = optimizer.step()
        >>> weight.item(), slow.syncs
        (0.625, 1)

    Source: Zhang, Lucas, Hinton, Ba 2019, Algorithm 1. With outer momentum: SNOO (arXiv 2510.15830).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        k: CycleLength = 5,
        alpha: StepSize = 0.5,
        *,
        module: nn.Module | None = None,
        sync_in_step: bool = True,
        model_weights: Weights | None = None,
        start_step: int = 0,
        exclude: Iterable[Tensor] = (),
        shared: Iterable[Tensor] = (),
        pullback_momentum: PullbackMomentum = "none",
        outer_momentum: float = 0.0,
        outer_nesterov: bool = True,
        nonfinite: Nonfinite = "raise",
        slow_dtype: str | None = None,
        slow_device: str | None = None,
        buffers: Buffers = "keep",
        loss: Callable[[], Tensor] | None = None,
        measure_distance: bool = False,
        workers: Workers | None = None,
        share_buffers: Callable[[list[Tensor]], None] | None = None,
    ) -> None:
        check_optimizer(optimizer)
        self.settings = settings = Settings.among(locals())
        self.optimizer, self._measure_distance = optimizer, measure_distance
        self.last_distance: Tensor | None = None
        self._workers = workers
        self.parameters = Parameters(optimizer, module)
        self.pairs = WeightPairs(optimizer, settings, exclude, shared)
        self.cycles = Cycles(optimizer, settings, self.parameters, attempts=workers is not None)
        self.statistics = SlowStatistics(module, settings, share_buffers)
        self._momentum = Momentum(
            optimizer, pullback_momentum, sharded=self.parameters.sharded, restores=nonfinite == "restore"
        )
        self.alpha = Alpha(optimizer, settings, self.parameters, loss, comes_later=not sync_in_step)
        self.persistence = Persistence(
            settings, self.parameters, self.pairs, self.cycles, self._momentum, self.statistics, model_weights
        )
        self.inner_loop = InnerLoop(optimizer, settings, self.pairs, self.cycles, self.persistence)
        self.inner_loop.watch(module if sync_in_step else None)
        if sync_in_step:
            self.inner_loop.when_due = self.sync

    def __repr__(self) -> str:
        k, alpha = describe(self.settings.k), describe(self.settings.alpha)
        return f"SlowWeights({type(self.optimizer).__name__}, k={k}, alpha={alpha}, syncs={self.syncs})"

    @property
    def active(self) -> Weights:
        """The set of weights that the parameters hold now; the other one is kept here."""
        return self.pairs.active

    def swap_to(self, weights: Weights, *, statistics: bool = True) -> None:
        """Let the parameters hold ``weights`` from now on, in place: `data_ptr` and `Parameter` stay.

        Right after a sync both sets are one: what was written into the parameters since belongs to both. BatchNorm
        layers that have two sets of ``statistics`` hold those of ``weights`` then, unless they are to stay.
        """
        self.persistence.place()
        self.parameters.reshard()
        self.pairs.move_to_parameters()  # after a fit Lightning moves the module to the CPU
        other = weights != self.active
        self.pairs.swap_to(weights, synced=not self.cycles.begun())
        if other and statistics:
            self.statistics.exchange()

    @contextmanager
    def use(self, weights: Weights, *, statistics: bool = True) -> Iterator[None]:
        """Let the parameters hold ``weights`` inside the ``with`` block, and what they held before it after it."""
        before = self.active
        self.swap_to(weights, statistics=statistics)
        try:
            yield
        finally:
            self.swap_to(before, statistics=statistics)

    def values(self, weights: Weights) -> dict[Tensor, Tensor]:
        """Each trained parameter and its value in ``weights``: live tensors, not copies.

        Slow weights of low precision parameters are of ``slow_dtype``, also while the parameters hold them, rounded.
        """
        self.persistence.place()
        return self.pairs.values(weights)

    def state_dict(self, *, whole: bool = False) -> dict[str, Any]:
        """The set of weights that the model's own ``state_dict`` does not hold, by parameter name, and the counts.

        Args:
            whole: Of sharded weights, gather whole tensors on the first rank, which writes them alone, as `Fabric.save`
                does. By default each rank has its shards, for `torch.distributed.checkpoint`, which always finds the
                same keys; they cannot be pickled, as one rank's are not enough. Either loads with any number of ranks.
        """
        state = self.persistence.state_dict(whole=whole)
        return Shards(state) if self.parameters.sharded and not whole else state

    def load_state_dict(self, state_dict: dict[str, Any], model: Mapping[str, Any] | None = None) -> None:
        """Go on where the saved one was, with this one's settings, and a warning if they differ.

        The weights take their places when they are first used: the model may be loaded later.

        Args:
            state_dict: What `state_dict` returned, on any number of ranks, whole or in shards.
            model: The model's ``state_dict`` that was saved and loaded with it: to compare it with, if it is at hand.

        Raises:
            ValueError: If it is damaged or of another model; nothing is changed then.
        """
        self.persistence.load_state_dict(state_dict, model)
        warn_of_differences(state_dict, self.settings.saved())

    @property
    def steps(self) -> int:
        """Inner steps taken so far. May read one number from the device if a fused optimizer and a scaler are used."""
        return self.cycles.steps.total

    @property
    def syncs(self) -> int:
        """Syncs done so far; of the optimizer's first group, if groups have a ``k`` or ``alpha`` of their own."""
        return self.cycles.first.syncs

    @property
    def due(self) -> bool:
        """Whether a cycle has ended, ``k`` inner steps after it began; reads the device only if it may have."""
        return bool(self.cycles.ended())

    def sync(self, *, unfinished: bool = False) -> None:
        """Do the outer step now, ``phi <- phi + alpha * (theta - phi)``, ``theta <- phi``, and start a new cycle.

        If groups have cycles of their own, the ended ones are synced, or all if none has ended; with ``unfinished``
        those with an inner step, as at the end of training. A parameter without a gradient in this optimizer's steps
        since its last sync keeps its value, and phi takes it.

        Raises:
            RuntimeError: If the parameters hold the slow weights; if ``nonfinite="raise"`` finds a NaN or infinity.
        """
        if self.active == "slow":
            message = "sync() was called while the parameters hold the slow weights: leave use('slow') first."
            raise RuntimeError(message)
        self.persistence.begin()
        if self._workers is not None:
            self._meet(self._workers)
        due = self.cycles.to_sync(self.pairs, unfinished=unfinished)
        # All cycles are checked before one moves: an error leaves all as they were.
        finite = [all_finite(cycle.moving, self.settings.nonfinite, self.parameters, self._workers) for cycle in due]
        if self._measure_distance:
            self.last_distance = self.pairs.distance()
        alphas = [self.alpha.of(cycle) if is_finite else None for cycle, is_finite in zip(due, finite, strict=True)]
        for cycle, alpha in zip(due, alphas, strict=True):
            if alpha is not None:
                with (
                    self.pairs.at_hand(cycle.moving)
                    if self.settings.slow_device
                    else nullcontext(cycle.moving) as moving
                ):
                    own = moving.fast, moving.slow, alpha, moving.outer_momentum
                    if self._workers is None:
                        outer_step(*own, portions=moving.portions())
                    else:
                        self._workers.outer_step(*own)
                self._momentum.after_sync(cycle.moving.fast, alpha)
                if cycle is self.cycles.first:
                    self.statistics.sync(min(alpha, 1.0))  # further than the fast ones a variance may be negative
                cycle.syncs += 1
            elif self.settings.nonfinite == "restore":
                restore(cycle.moving, self.pairs, self._momentum, self.statistics)
            if self._workers is not None:
                self._workers.take_firsts(list(cycle.still))
            self.pairs.end_cycle(cycle.weights, cycle.still)
            self.cycles.begin_next(cycle)

    def _meet(self, workers: Workers) -> None:
        """Agree with the other ranks on what this sync moves."""
        self.pairs.track_replaced()
        trained = self.pairs.counterparts
        names = self.parameters.names()
        trains = zlib.crc32(repr([(names[p], p.requires_grad) for p in trained]).encode())
        workers.agree("at a sync", steps=self.steps, parameters=trains)
        self.pairs.idle = workers.idle(trained, self.pairs.idle)

    def close(self) -> None:
        """Let go of the optimizer: stop counting and syncing. Both sets of weights stay here."""
        self.inner_loop.close()
