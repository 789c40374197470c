"""The outer loop of Lookahead around one torch optimizer. Imports torch and nothing of Lightning."""

from __future__ import annotations

import copy
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from lightning_lookahead._algorithm import outer_step
from lightning_lookahead._buffers import SlowBuffers, check_statistics
from lightning_lookahead._checks import check_materialized, check_optimizer, check_weights
from lightning_lookahead._cycles import Cycle, Cycles, Moving, keep_settings
from lightning_lookahead._finite import all_finite
from lightning_lookahead._inner_steps import InnerSteps, is_rehearsal, step_hooks_of
from lightning_lookahead._names import unwrapped
from lightning_lookahead._persistence import Persistence
from lightning_lookahead._saved_format import GROUP_SETTINGS, OTHER
from lightning_lookahead._settings import (
    Buffers,
    Nonfinite,
    PullbackMomentum,
    Settings,
    device_of,
    dtype_of,
    warn_of_differences,
)
from lightning_lookahead._sharding import BackwardSeen, is_sharded, reshard
from lightning_lookahead._tensors import bit_sum, copies, copy_, distance, local, not_finite
from lightning_lookahead._tracked import Tracked, parameters_of
from lightning_lookahead.adaptive import AdaptiveAlpha, TrainingLoss
from lightning_lookahead.momentum import Momentum, state_names
from lightning_lookahead.step_size import Length, StepSize, alpha_at, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from lightning_lookahead._saved_format import Weights


class SlowWeights:
    """The outer loop of Lookahead around one optimizer: one slow tensor per trained parameter.

    Every ``k`` inner steps the slow weights go part of the way to the fast ones, and the fast ones are put there::

        phi   <- phi + alpha * (theta - phi)
        theta <- phi

    The second line copies and never recomputes, so both are equal bit for bit after a sync, in every dtype. phi starts
    from the weights before the first step. An inner step is one that moved weights: a call of ``optimizer.step()``
    that a gradient scaler skipped, or before which no parameter had a gradient, does not count.

    Its ``state_dict`` holds the set of weights that the parameters do not hold; the optimizer's is what it is without
    this object. To resume, save the model, the optimizer and this object; build the three anew and load each one's
    ``state_dict``, in any order.

    Args:
        optimizer: The inner optimizer, any `torch.optim.Optimizer`. Its parameters must be where they will be trained
            (device, shard). Parameters that need no gradient are left alone, until they do; added ones join. Any
            number of them may be frozen, also all.
        k: Inner steps from one sync to the next; at least 1. A function makes it of the number of syncs done, see
            `lightning_lookahead.Linear` and its like. A group's own ``"lookahead_k"`` goes before it.
        alpha: Slow weights step size, the fraction of the way to go, in (0, 1]. 1 leaves the inner optimizer as it is.
            Or a function as for ``k``; a group's own ``"lookahead_alpha"`` goes before it.
        module: The module that the parameters belong to, as FSDP or a `Fabric` returned it: its names are those of the
            ``state_dict``. Needed if they are sharded.
        sync_in_step: Sync by itself at the end of the k-th ``optimizer.step()``; ``False`` leaves it to the caller,
            who calls `sync` when `due`.
        model_weights: The weights that the model's own ``state_dict`` holds in checkpoints; this one's holds the
            others. ``None``: those that the parameters hold when it is called.
        start_step: Inner steps before the first cycle begins; until then phi is theta.
        exclude: Parameters to leave alone.
        pullback_momentum: What a sync does to the optimizer's state, see `lightning_lookahead.momentum.Momentum`:
            ``"none"``, ``"reset"`` or ``"pullback"``.
        nonfinite: What a sync does if a fast weight is infinite or no number: ``"raise"``, with phi as it was;
            ``"skip"``: leave out this sync; ``"restore"``: put theta back to phi and make the optimizer's state that
            of a new one.
        slow_dtype: Floating-point type of the slow weights, ``"float64"``, say; by default the parameters', at least
            float32, so that they keep progress that is too small for a parameter in bfloat16.
        slow_device: Device that the slow weights are kept on, ``"cpu"``, say; by default the parameters'.
        buffers: What a sync does to the running means and variances of ``module``'s BatchNorm layers: ``"keep"`` leaves
            them alone, ``"sync"`` moves them as it does weights.
        loss: A function that computes the training loss at the weights that the parameters hold, of the last batch
            say, for an `AdaptiveAlpha` that needs it.
        measure_distance: Keep the Euclidean distance between theta and phi just before each sync in `last_distance`,
            a 0-dim tensor on the parameters' device.

    Raises:
        TypeError: If ``optimizer`` is not a torch optimizer.
        ValueError: If ``k`` or ``alpha`` is out of range, the optimizer has parameters without values, has slow weights
            already, or contains Lookahead itself; if a mode is unknown or would do nothing.

    Example:
        >>> import torch, warnings
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.25)
        >>> slow = SlowWeights(optimizer, k=2, alpha=0.5)
        >>> for _ in range(2):  # two steps down the slope of w**2: 1 -> 0.5 -> 0.25, then half the way back
        ...     optimizer.zero_grad()
        ...     (weight**2).sum().backward()
        ...     loss = optimizer.step()
        >>> weight.item(), slow.syncs
        (0.625, 1)

        What other arguments change, in phi after five steps with momentum down the same slope:

        >>> def end(group=None, dtype=torch.float64, **mode):
        ...     weight = torch.nn.Parameter(torch.ones(1, dtype=dtype))
        ...     optimizer = torch.optim.SGD([{"params": [weight], **(group or {})}], lr=0.25, momentum=0.5)
        ...     slow = SlowWeights(optimizer, **{"k": 2, **mode})
        ...     for _ in range(5):
        ...         optimizer.zero_grad()
        ...         (weight**2).sum().backward()
        ...         loss = optimizer.step()
        ...     return round(slow.values("slow")[weight].item(), 5)
        >>> end(), end(start_step=2)
        (0.125, -0.125)
        >>> end(pullback_momentum="reset"), end(pullback_momentum="pullback")
        (0.25, 0.1875)
        >>> end(alpha=lambda sync: 1.0 if sync else 0.5), end(k=lambda sync: 3 if sync else 1)
        (-0.25, 0.21875)
        >>> end(group={"lookahead_k": 5, "lookahead_alpha": 0.8})
        0.1
        >>> end(dtype=torch.bfloat16, alpha=0.3), end(dtype=torch.bfloat16, alpha=0.3, slow_dtype="bfloat16")
        (0.41441, 0.41406)

        What a sync does with a value that is not finite, by default and to go on:

        >>> def blow_up():
        ...     with torch.no_grad():
        ...         _ = weight.fill_(float("inf"))
        >>> blow_up()
        >>> slow.sync()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        RuntimeError: Parameter 0 of the optimizer, of shape (1,), has a value that is not finite...
        >>> slow.values("slow")[weight].item()
        0.625
        >>> slow.close()
        >>> with torch.no_grad():
        ...     _ = weight.fill_(0.5)
        >>> slow = SlowWeights(optimizer, k=9, nonfinite="restore", slow_device="cpu")
        >>> loss = optimizer.step()
        >>> blow_up()
        >>> with warnings.catch_warnings(action="ignore"):  # which names the parameter
        ...     slow.sync()
        >>> weight.item(), slow.values("slow")[weight].device
        (0.5, device(type='cpu'))

        And what it does with BatchNorm's statistics, 0.38 without it:

        >>> net = torch.nn.BatchNorm1d(1)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> slow = SlowWeights(optimizer, k=1, module=net, buffers="sync", exclude=[net.bias])
        >>> for _ in range(2):
        ...     net(torch.tensor([[1.0], [3.0]])).sum().backward()
        ...     loss = optimizer.step()
        >>> round(net.running_mean.item(), 2), net.bias in slow.values("slow")
        (0.29, False)

    Source: Zhang, Lucas, Hinton, Ba 2019, Algorithm 1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        k: Length = 5,
        alpha: StepSize = 0.5,
        *,
        module: nn.Module | None = None,
        sync_in_step: bool = True,
        model_weights: Weights | None = None,
        start_step: int = 0,
        exclude: Iterable[Tensor] = (),
        pullback_momentum: PullbackMomentum = "none",
        nonfinite: Nonfinite = "raise",
        slow_dtype: str | None = None,
        slow_device: str | None = None,
        buffers: Buffers = "keep",
        loss: Callable[[], Tensor] | None = None,
        measure_distance: bool = False,
    ) -> None:
        check_optimizer(optimizer)
        if model_weights is not None:
            check_weights(model_weights, "model_weights")
        self.settings = settings = Settings(
            k, alpha, start_step, pullback_momentum, nonfinite, slow_dtype, slow_device, buffers
        )
        if buffers == "sync":
            check_statistics(module, "buffers='sync'")
        sharded = _check_parameters(optimizer, module)
        self.optimizer = optimizer
        self.buffers = SlowBuffers(module) if module is not None and buffers == "sync" else None
        """Slow BatchNorm statistics, if there are any."""
        self._tracked = Tracked(optimizer, list(exclude), dtype_of(slow_dtype), device_of(slow_device))
        self._cycles = Cycles(optimizer, settings)
        self._inner_steps = InnerSteps()
        self._momentum = Momentum(optimizer, pullback_momentum, sharded=sharded, restores=nonfinite == "restore")
        self._sharded = module if sharded else None
        self._started = False  # until the first step of the first cycle phi follows the parameters
        self._backward_seen = (
            BackwardSeen(module, parameters_of(optimizer))
            if module is not None and BackwardSeen.needed(module, parameters_of(optimizer))
            else None
        )
        self._begins_now = False  # whether the step that is under way is the first one
        self._looked = False  # whether both sets were in their places since something was loaded
        self._persistence = Persistence(
            optimizer,
            settings,
            tracked=self._tracked,
            cycles=self._cycles,
            inner_steps=self._inner_steps,
            momentum=self._momentum,
            buffers=self.buffers,
            module=module,
            sharded=sharded,
            model_weights=model_weights,
        )
        self.loss = TrainingLoss(loss) if loss is not None else None
        """The training loss of the last batch, for an alpha that needs it."""
        self.last_alpha: float | None = None
        """The step size of the last sync."""
        self.last_distance: Tensor | None = None
        """How far theta and phi were apart just before the last sync, over all trained parameters; if measured."""
        self._module = module
        self._sync_in_step = sync_in_step
        self._measure_distance = measure_distance
        if isinstance(alpha, AdaptiveAlpha):
            self._check_adaptive(alpha)
        self._hooks: list[Any] = []
        self._hook()

    def _check_adaptive(self, alpha: AdaptiveAlpha) -> None:
        if self.sharded:
            message = f"alpha={alpha} does not work with sharded parameters: give a number or a schedule."
            raise ValueError(message)
        if alpha.needs_loss and self._sync_in_step and self.loss is None:
            message = f"alpha={alpha} needs the training loss: give a function that computes it, loss=."
            raise ValueError(message)
        for group in self.optimizer.param_groups:
            alpha.check(state_names(self.optimizer, group), self.optimizer)

    def __repr__(self) -> str:
        settings = f"k={describe(self.settings.k)}, alpha={describe(self.settings.alpha)}"
        return f"SlowWeights({type(self.optimizer).__name__}, {settings}, syncs={self.syncs})"

    # -- either set

    @property
    def holds(self) -> Weights:
        """Which weights the parameters hold now; the other set is kept here."""
        return self._tracked.holds

    @property
    def sharded(self) -> bool:
        """Whether the parameters are spread over ranks; each then keeps its own piece of both sets."""
        return self._sharded is not None

    def put(self, weights: Weights, *, statistics: bool = True) -> None:
        """Let the parameters hold ``weights`` from now on, in place: `data_ptr` and `Parameter` stay.

        Right after a sync both sets are one: what was written into the parameters since belongs to both.

        Args:
            weights: The set that they hold then.
            statistics: Let the BatchNorm layers hold this set's statistics, too, if they have two.
        """
        check_weights(weights)
        self._settle()
        if self._sharded is not None:
            reshard(self._sharded)
        # After a fit Lightning moves the module to the CPU; what is kept here follows.
        self._tracked.follow()
        other = weights != self.holds
        self._tracked.put(weights, synced=self._synced)
        if self.buffers is not None and other and statistics:
            self.buffers.exchange()

    @contextmanager
    def use(self, weights: Weights, *, statistics: bool = True) -> Iterator[None]:
        """Let the parameters hold ``weights`` inside the ``with`` block, and what they held before it after it."""
        before = self.holds
        self.put(weights, statistics=statistics)
        try:
            yield
        finally:
            self.put(before, statistics=statistics)

    def other_statistics(self) -> dict[str, Tensor]:
        """The BatchNorm statistics of the set that the parameters do not hold, by name: copies."""
        if self.buffers is None:
            return {}
        return dict(zip(self.buffers.names, copies(self.buffers.kept), strict=True))

    def values(self, weights: Weights) -> dict[Tensor, Tensor]:
        """Each trained parameter and its value in ``weights``: live tensors, not copies.

        Slow weights of low precision parameters are of ``slow_dtype``, also while the parameters hold them, rounded.
        """
        check_weights(weights)
        self._settle()
        return self._tracked.values(weights)

    def adopt(self) -> None:
        """Right after a sync, let both sets have what was written into the parameters from outside since."""
        self._settle()
        if self._synced and self.holds == "fast":
            self._tracked.adopt(self._tracked.shared)

    def fingerprint(self) -> list[int]:
        """Sums over the bits of both sets as the parameters hold them, on this rank, and how many the module has.

        Of other weights, in either set, or of a module with other parameters it is another.
        """
        trained = self._tracked.kept
        sums = []
        for weights in OTHER:
            values = {p: p for p in trained} if weights == self.holds else self._tracked.values(weights)
            sums += [bit_sum(*local([value.to(p)])) for p, value in values.items()]
        own = set(self._module.parameters()) if self._module is not None else set()
        together = torch.stack([one.to(sums[0].device) for one in sums]).tolist() if sums else []  # one wait for it
        return [*together, len(own & trained.keys())]

    @property
    def _synced(self) -> bool:
        """Whether no inner step was taken since the last sync."""
        return not any(self._since(cycle) for cycle in self._cycles)

    # -- saving and restoring

    def state_dict(self, *, whole: bool = False) -> dict[str, Any]:
        """The set of weights that the model's own ``state_dict`` does not hold, by parameter name, and the counts.

        Whatever the history, the same keys: `torch.distributed.checkpoint` can load into it.

        Args:
            whole: Of sharded weights, gather whole tensors on the first rank, for a file that this rank writes alone,
                as `Fabric.save` does with all that is neither module nor optimizer. By default each rank has its
                shards, for `torch.distributed.checkpoint`; they cannot be pickled, as one rank's are not enough.
                Either loads with any number of ranks.
        """
        self.adopt()
        state = self._persistence.state_dict(whole=whole, lean=False)
        return Shards(state) if self.sharded and not whole else state

    def lean_state_dict(self, *, whole: bool = False) -> dict[str, Any]:
        """What `state_dict` returns without the tensors that the model's own ``state_dict`` gives."""
        self.adopt()
        return self._persistence.state_dict(whole=whole, lean=not self.sharded)

    def counters(self) -> dict[str, Any]:
        """What `state_dict` returns without a tensor."""
        return self._persistence.counters()

    def load_state_dict(
        self, state_dict: dict[str, Any], model: Mapping[str, Any] | None = None, *, compare: bool = True
    ) -> None:
        """Go on where the saved one was; ``k`` and ``alpha`` stay as they were given, with a warning if they differ.

        The weights take their places when they are first used, as the model may be loaded later.

        Args:
            state_dict: What `state_dict` returned, with tensors of any number of ranks, whole or in shards.
            model: The model's ``state_dict`` that was saved with it and has been loaded, if it is at hand: to compare
                with, instead of with the parameters.
            compare: Warn if the settings differ.

        Raises:
            ValueError: If it is damaged or of another model; nothing is changed then.
        """
        self._persistence.load_state_dict(state_dict)
        if compare:
            warn_of_differences(state_dict, self.settings.saved())
        if model is not None:
            self._persistence.compare(model)
        self._started = self._looked = False
        self._tracked.end_swap()
        if self.waits:  # the model was loaded before
            self._settle()

    @property
    def waits(self) -> bool:
        """Whether something was loaded that waits for the model to be loaded, too, and now can take its place."""
        return self._persistence.pending is not None and self._persistence.pending.fits

    def when_loaded(self) -> None:
        """Put what waits for the module in its place: the module was loaded just now, its statistics, too."""
        if self._persistence.pending is not None:
            self._persistence.pending.placed = False
        if self.waits:
            self.put("fast")

    def _settle(self) -> None:
        """Make both sets what they have to be before anything looks at them or moves them."""
        pending = self._persistence.pending
        if self.holds == "slow" or (self._started and pending is None):
            return
        if self._sharded is not None:
            reshard(self._sharded)
        self._looked = True
        if pending is not None:
            self._persistence.place()
            if pending.begun:
                return
        self._tracked.update_if_other()
        self._tracked.start()
        if self.buffers is not None:
            self.buffers.start()

    # -- counting

    @property
    def steps(self) -> int:
        """Inner steps taken so far. May read one number from the device if a fused optimizer and a scaler are used."""
        return self._inner_steps.total

    def _since(self, cycle: Cycle) -> int:
        return max(self.steps - cycle.begins, 0)

    @property
    def syncs(self) -> int:
        """Syncs done so far; of the optimizer's first group, if groups have a ``k`` or ``alpha`` of their own."""
        return next(iter(self._cycles)).syncs

    @property
    def steps_since_sync(self) -> int:
        """Inner steps since the last sync, of the group that waits longest; reads as `steps` does."""
        return max(self._since(cycle) for cycle in self._cycles)

    @property
    def at_sync(self) -> bool:
        """Whether theta is phi: training has not begun, or no inner step was taken since a sync."""
        return self._synced and (not self.steps or any(cycle.syncs for cycle in self._cycles))

    @property
    def changes_alpha(self) -> bool:
        """Whether the step size is not the same number at every sync."""
        return not isinstance(self.settings.alpha, (int, float)) or len(self._cycles) > 1

    @property
    def due(self) -> bool:
        """Whether a cycle has ended, ``k`` inner steps after it began; reads the device only if it may have."""
        return bool(self._ended())

    def _ended(self) -> list[Cycle]:
        return [cycle for cycle in self._cycles if self._inner_steps.reached(cycle.ends)]

    def _before_step(self, optimizer: Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if is_rehearsal(optimizer):
            return
        has_closure = named.get("closure") is not None or len(arguments) > 1
        has_gradient = self._has_gradient()
        if not self._inner_steps.begin(optimizer, moves=has_gradient and not has_closure):
            return
        if self.holds == "slow":
            message = (
                "optimizer.step() was called while the parameters hold the slow weights: step after the"
                " `with ...use('slow')` block (or the validation) is left."
            )
            raise RuntimeError(message)
        self._begins_now = not self._started
        if self._begins_now:  # as far as can be known: without a closure, too, a step may compute its own gradients
            self._begin(computes=has_closure or not has_gradient)
        self.track_new()
        if not has_closure:  # which will compute others
            self._tracked.note_gradients()

    def track_new(self) -> None:
        """Take in parameters that were added or unfrozen: their slow weights begin where they are now."""
        if self._tracked.update_if_more():
            self._cycles.update(max(self.steps, self.settings.start_step), self._tracked.kept)

    def _has_gradient(self) -> bool:
        if self._backward_seen is not None:
            return self._backward_seen.since_last
        groups = self.optimizer.param_groups  # the first that has one ends it: no list is made in each step
        return any(parameter.grad is not None for group in groups for parameter in group["params"])

    def _begin(self, *, computes: bool) -> None:
        """Begin, or go on with, training: what was loaded takes its place for good.

        Args:
            computes: Whether the step that begins computes the gradients, at the weights that are there by then.
        """
        pending = self._persistence.pending
        if pending is not None and not computes and not pending.in_place:
            message = (
                "The model was loaded with its slow weights after SlowWeights.load_state_dict, and a step was taken"
                " at once: its gradient is not that of the fast weights. Call put('fast') when all is loaded, or load"
                " SlowWeights last, or give it the module."
            )
            raise RuntimeError(message)
        begins = self._inner_steps.reached(self.settings.start_step)
        if pending is not None:
            self._settle()
            if not pending.begun:  # there is one set still
                self._persistence.pending = None
        if begins or not self._looked:
            self._settle()
        if begins and (pending is None or not pending.begun):
            # What was trained before the first cycle is not in it.
            self._tracked.idle = dict.fromkeys(self._tracked.kept)
        self._go_on(begins=begins)

    def go_on(self) -> None:
        """Say that all is loaded: what moves the parameters from here on is training, also another optimizer's."""
        self._settle()
        self._go_on(begins=False)

    def share(self, parameters: Iterable[Tensor]) -> None:
        """Say that another optimizer moves these parameters, too: not all that a step did not move is from outside.

        With an alpha of 1, a sync takes theta whatever phi is: what another optimizer moves then belongs to both.
        """
        self._tracked.shared = set() if self.settings.alpha == 1 else set(parameters)

    def _go_on(self, *, begins: bool) -> None:
        """Let go of what was loaded: from here on the weights are moved."""
        pending, self._persistence.pending = self._persistence.pending, None
        self._started = self._started or begins or (pending is not None and pending.begun)
        self._tracked.begun = self._started

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        if is_rehearsal(optimizer):
            return
        self._tracked.note_gradients()
        counted = self._inner_steps.end(optimizer, moved=self._has_gradient())
        if self._backward_seen is not None:
            self._backward_seen.since_last = False
        if (
            self._begins_now
            and not counted
            and not self._inner_steps.under_way
            and self._inner_steps.counted <= self.settings.start_step
        ):
            self._started = self._tracked.begun = False  # there was no gradient: the first cycle has not begun
        if (
            counted
            and self.settings.slow_device is not None
            and self._inner_steps.counted + 1 in {c.ends for c in self._cycles}
        ):
            self._tracked.prepare()
        if counted and self._sync_in_step and self.due:
            self.sync()

    # -- the outer step

    def sync(self) -> None:
        """Do the outer step now: ``phi <- phi + alpha * (theta - phi)``, then ``theta <- phi``; starts a new cycle.

        If groups have cycles of their own, those that have ended are synced, or all if none has. A parameter that had
        no gradient in the steps of this optimizer since keeps its value, and phi takes it.

        Raises:
            RuntimeError: If the parameters hold the slow weights, or if a fast weight is not finite and that is to
                raise.
        """
        self._sync(lambda: self._ended() or list(self._cycles))

    def sync_unfinished(self) -> None:
        """Do the outer step of each cycle that has begun, as at the end of training; `sync` says the rest."""
        if self.steps_since_sync:
            self._sync(lambda: [cycle for cycle in self._cycles if self._since(cycle)])

    def _sync(self, which: Callable[[], list[Cycle]]) -> None:
        self._make_ready()
        cycles = {cycle: cycle.moving(self._idle_in(cycle)) for cycle in which()}
        finite = [self._is_finite(moving) for moving in cycles.values()]  # of all before one moves
        if self._measure_distance:
            self.last_distance = distance(self._tracked.kept, self._tracked.kept.values())
        for (cycle, moving), is_finite in zip(cycles.items(), finite, strict=True):
            if is_finite:
                alpha = self._step_size(cycle, moving)
                with self._tracked.at_hand(moving) as beside:
                    outer_step(beside.fast, beside.slow, alpha, buckets=beside.buckets)
                self._momentum.after_sync(moving.fast, alpha)
                self._sync_statistics(cycle, alpha)
                cycle.syncs += 1
            elif self.settings.nonfinite == "restore":
                self._restore(moving)
            self._begin_next(cycle)

    def _make_ready(self) -> None:
        """See that there are two sets, and which parameters they are of."""
        if self.holds == "slow":
            message = "sync() was called while the parameters hold the slow weights: leave use('slow') first."
            raise RuntimeError(message)
        self.go_on()
        self._tracked.update_if_other()
        self._cycles.update(max(self.steps, self.settings.start_step), self._tracked.kept)

    def _idle_in(self, cycle: Cycle) -> Collection[Tensor]:
        """Those that had no gradient in the cycle; of a cycle without a step nothing can be said of gradients."""
        return self._tracked.idle if self._since(cycle) else ()

    def _is_finite(self, moving: Moving) -> bool:
        shared_on = parameters_of(self.optimizer)[0].device if self.sharded else None
        return all_finite(moving, self.settings.nonfinite, self._name, shared_on=shared_on)

    def _restore(self, moving: Moving) -> None:
        copy_(moving.fast, moving.slow)
        self._momentum.forget(moving.fast)  # what made the weights infinite is in there, too
        if self.buffers is not None:
            copy_(self.buffers.live, self.buffers.kept)

    def _sync_statistics(self, cycle: Cycle, alpha: float) -> None:
        """The optimizer's first group says when."""
        if self.buffers is not None and cycle is next(iter(self._cycles)) and not not_finite(self.buffers.live):
            self.buffers.sync(alpha)

    def _begin_next(self, cycle: Cycle) -> None:
        still = {p: slow for p, slow in cycle.weights.items() if p in self._idle_in(cycle)}
        copy_(still.values(), still)  # no step moved them: where they are is from outside, and belongs to both sets
        cycle.begins = max(self.steps, self.settings.start_step)
        self._tracked.idle.update(dict.fromkeys(cycle.weights))

    def _step_size(self, cycle: Cycle, moving: Moving) -> float:
        adaptive = cycle.step_size
        if not isinstance(adaptive, AdaptiveAlpha):
            alpha = alpha_at(adaptive, cycle.syncs)
        elif not moving.fast or (adaptive.needs_loss and self.loss is None):  # due when the run was stopped
            alpha = adaptive.alpha_low
        else:
            reduce = adaptive.needs_loss and isinstance(self._module, DistributedDataParallel)
            weights = dict(zip(moving.fast, moving.slow, strict=True))
            alpha = adaptive.step_size(self.optimizer, weights, self.loss, reduce=reduce)
        if moving.fast:  # not all frozen
            self.last_alpha = alpha
        return alpha

    def _name(self, parameter: Tensor) -> str:
        for name, other in self._module.named_parameters() if self._module is not None else ():
            if other is parameter:
                return f"Parameter {name!r}"
        index = next(i for i, other in enumerate(parameters_of(self.optimizer)) if other is parameter)
        return f"Parameter {index} of the optimizer, of shape {tuple(parameter.shape)},"

    # -- hooks

    @property
    def counting(self) -> bool:
        """Whether steps are counted and synced: from the start until `close`."""
        return bool(self._hooks)

    def close(self) -> None:
        """Let go of the optimizer: stop counting and syncing. Both sets of weights stay here."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._backward_seen is not None:
            self._backward_seen.close()

    def _hook(self) -> None:
        optimizer = self.optimizer
        self._own: list[dict[str, Any]] = []  # the groups' settings, while a state is loaded into the optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if hasattr(optimizer, "_optimizer_load_state_dict_pre_hooks"):  # some wrappers have made themselves without
            self._hooks += [
                optimizer.register_load_state_dict_pre_hook(self._before_load),
                optimizer.register_load_state_dict_post_hook(self._after_load),
            ]
        if self._module is not None and self._sync_in_step:
            module: Any = unwrapped(self._module)
            self._hooks.append(module.register_load_state_dict_post_hook(WhenLoaded(self)))

    def _before_load(self, optimizer: Optimizer, _: object) -> None:
        self._own = [
            {name: group[name] for name in GROUP_SETTINGS if name in group} for group in optimizer.param_groups
        ]

    def _after_load(self, optimizer: Optimizer) -> None:
        """Torch takes a group's further keys from the file; k and alpha are this run's."""
        keep_settings(optimizer, self._own)

    def __getstate__(self) -> dict[str, Any]:
        # An optimizer leaves its hooks behind when it is copied or pickled, and so does this object.
        return {**self.__dict__, "_hooks": bool(self._hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        counting = state["_hooks"]
        self.__dict__.update({**state, "_hooks": []})
        if counting:
            self._hook()


class Shards(dict[str, Any]):
    """The state of sharded weights. One rank's shards, pickled alone, would be a file that nothing can go on from."""

    def __reduce_ex__(self, _: object) -> tuple[Any, ...]:
        message = (
            "SlowWeights.state_dict() holds this rank's shards, for torch.distributed.checkpoint: to pickle, as"
            " Fabric.save does on one rank, give it SlowWeights.state_dict(whole=True)."
        )
        raise TypeError(message)

    def __deepcopy__(self, memo: dict[int, Any]) -> Shards:
        return Shards({key: copy.deepcopy(value, memo) for key, value in self.items()})


class WhenLoaded:
    """Tells a `SlowWeights` that its module was loaded; nothing, where module or hook have been copied or pickled."""

    def __init__(self, slow: SlowWeights) -> None:
        self._slow = weakref.ref(slow)

    def __call__(self, *_: object) -> None:
        """Put the fast weights in their place, if they wait for it."""
        slow = self._slow()
        if slow is not None:
            slow.when_loaded()

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_one_is_told, ()


def _no_one_is_told() -> Callable[..., None]:
    return _nothing


def _nothing(*_: object) -> None:
    pass


def _check_parameters(optimizer: Optimizer, module: nn.Module | None) -> bool:
    """Return whether the optimizer's parameters are sharded; raise if they cannot have slow weights."""
    if any(isinstance(getattr(hook, "__self__", None), SlowWeights) for hook in step_hooks_of(optimizer)):
        message = "optimizer has slow weights already, which would pull back twice: close() those first."
        raise ValueError(message)
    check_materialized(parameters_of(optimizer))
    sharded = is_sharded(module, parameters_of(optimizer))
    if sharded and module is None:
        message = "optimizer has sharded parameters: give the module that they belong to, too, as module=."
        raise ValueError(message)
    return sharded
