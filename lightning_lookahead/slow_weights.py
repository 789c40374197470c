"""The outer loop of Lookahead around one torch optimizer. Imports torch and nothing of Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch.nn.parallel import DistributedDataParallel

from lightning_lookahead._both import BothWeights
from lightning_lookahead._buffers import SlowBuffers, check_statistics
from lightning_lookahead._checks import (
    NONFINITE,
    check_device,
    check_dtype,
    check_materialized,
    check_optimizer,
    check_start,
    check_weights,
)
from lightning_lookahead._cycles import Cycle, Cycles
from lightning_lookahead._finite import all_finite
from lightning_lookahead._inner_steps import is_rehearsal
from lightning_lookahead._numbers import check_choice
from lightning_lookahead._sharding import is_sharded
from lightning_lookahead._tensors import copy_, distance, not_finite
from lightning_lookahead._tracked import Tracked, parameters_of
from lightning_lookahead.adaptive import AdaptiveAlpha, TrainingLoss
from lightning_lookahead.momentum import Mode, Momentum, state_names
from lightning_lookahead.step_size import Length, StepSize, alpha_at, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from lightning_lookahead._carried import Weights
    from lightning_lookahead._pairs import Pairs


Nonfinite = Literal["raise", "skip", "restore"]


class SlowWeights(BothWeights):
    """The outer loop of Lookahead around one optimizer: one slow tensor per trained parameter.

    Every ``k`` inner steps the slow weights go part of the way to the fast ones, and the fast ones are put there::

        phi   <- phi + alpha * (theta - phi)
        theta <- phi

    The second line copies and never recomputes, so both are equal bit for bit after a sync, in every dtype. phi starts
    from the weights before the first step. An inner step is one that moved weights: a call of ``optimizer.step()``
    that a gradient scaler skipped, or before which no parameter had a gradient, does not count.

    The set of weights that the parameters do not hold travels in ``optimizer.state_dict()``. To resume, save the
    model, the optimizer and this object, outside of `use`; build the three anew and load each one's ``state_dict``, in
    any order.

    Args:
        optimizer: The inner optimizer, any `torch.optim.Optimizer`. Its parameters must be where they will be trained
            (device, shard). Parameters that need no gradient are left alone, until they do; added ones join.
        k: Inner steps from one sync to the next; at least 1. A function makes it of the number of syncs done, see
            `lightning_lookahead.Linear` and its like. A group's own ``"lookahead_k"`` goes before it.
        alpha: Slow weights step size, the fraction of the way to go, in (0, 1]. 1 leaves the inner optimizer as it is.
            Or a function as for ``k``; a group's own ``"lookahead_alpha"`` goes before it.
        module: The module that the parameters belong to, as FSDP or a `Fabric` returned it. Needed if they are sharded.
        sync_in_step: Sync by itself at the end of the k-th ``optimizer.step()``; ``False`` leaves it to the caller,
            who calls `sync` when `due`.
        model_weights: The weights that the model's own ``state_dict`` holds in checkpoints; ``optimizer.state_dict()``
            carries the others. ``None``: those that the parameters hold when it is called.
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
        ValueError: If ``k`` or ``alpha`` is out of range, the optimizer trains no parameter, has parameters without
            values, has slow weights already, or is itself a Lookahead wrapper; if a mode is unknown or would do
            nothing.

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
        pullback_momentum: Mode = "none",
        nonfinite: Nonfinite = "raise",
        slow_dtype: str | None = None,
        slow_device: str | None = None,
        buffers: Literal["keep", "sync"] = "keep",
        loss: Callable[[], Tensor] | None = None,
        measure_distance: bool = False,
    ) -> None:
        check_optimizer(optimizer)
        if model_weights is not None:
            check_weights(model_weights, "model_weights")
        check_choice("nonfinite", nonfinite, NONFINITE)
        check_choice("buffers", buffers, ("keep", "sync"))
        if buffers == "sync":
            check_statistics(module, "buffers='sync'")
        sharded = _check_parameters(optimizer, module)
        tracked = Tracked(optimizer, list(exclude), check_dtype(slow_dtype), check_device(slow_device))
        if not tracked.kept:
            message = "optimizer trains no parameter: none of its parameters has requires_grad=True."
            raise ValueError(message)
        super().__init__(
            optimizer,
            k,
            alpha,
            tracked=tracked,
            cycles=Cycles(optimizer, k, alpha, check_start(start_step)),
            momentum=Momentum(optimizer, pullback_momentum, sharded=sharded),
            buffers=SlowBuffers(module) if module is not None and buffers == "sync" else None,
            sharded=module if sharded else None,
            model_weights=model_weights,
            start_step=start_step,
        )
        self.loss = TrainingLoss(loss) if loss is not None else None
        """The training loss of the last batch, for an alpha that needs it."""
        self.last_alpha: float | None = None
        """The step size of the last sync."""
        self.last_distance: Tensor | None = None
        """How far theta and phi were apart just before the last sync, over all trained parameters; if measured."""
        self._module = module
        self._sync_in_step = sync_in_step
        self._nonfinite = nonfinite
        self._fetches = slow_device is not None
        self._measure_distance = measure_distance
        if isinstance(alpha, AdaptiveAlpha):
            self._check_adaptive(alpha)
        self._step_hooks: list[Any] = []
        self._state_hooks: list[Any] = []
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
        settings = f"k={describe(self.k)}, alpha={describe(self.alpha)}"
        return f"SlowWeights({type(self.optimizer).__name__}, {settings}, syncs={self.syncs})"

    # -- counting

    @property
    def syncs(self) -> int:
        """Syncs done so far; of the optimizer's first group, if groups have a ``k`` or ``alpha`` of their own."""
        return next(iter(self._cycles)).syncs

    @property
    def steps_since_sync(self) -> int:
        """Inner steps since the last sync, of the group that waits longest; reads as `steps` does."""
        return max(self._since(cycle) for cycle in self._cycles)

    @property
    def changes_alpha(self) -> bool:
        """Whether the step size is not the same number at every sync."""
        return not isinstance(self.alpha, (int, float)) or len(self._cycles) > 1

    @property
    def due(self) -> bool:
        """Whether a cycle has ended, ``k`` inner steps after it began; reads the device only if it may have."""
        return bool(self._ended())

    def _ended(self) -> list[Cycle]:
        return [cycle for cycle in self._cycles if self._inner_steps.reached(cycle.ends)]

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        if is_rehearsal(optimizer):
            return
        if self.holds == "slow":
            message = (
                "optimizer.step() was called while the parameters hold the slow weights: step after the"
                " `with ...use('slow')` block (or the validation) is left."
            )
            raise RuntimeError(message)
        if not self._started:
            begins = self._inner_steps.reached(self._start_step)
            if begins or not self._looked:
                self._settle()
            self._started = self._started or begins
        if self._tracked.update_if_more():
            self._cycles.update(max(self.steps, self._start_step))
        self._inner_steps.begin()

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        counted = self._inner_steps.end(optimizer, self._tracked.stepped)
        if counted and self._fetches and self._inner_steps.counted + 1 in {c.ends for c in self._cycles}:
            self._tracked.prepare()
        if counted and self._sync_in_step and self.due:
            self.sync()

    # -- the outer step

    def sync(self) -> None:
        """Do the outer step now: ``phi <- phi + alpha * (theta - phi)``, then ``theta <- phi``; starts a new cycle.

        If groups have cycles of their own, those that have ended are synced, or all if none has. A parameter that was
        frozen since keeps its value, and phi takes it.

        Raises:
            RuntimeError: If the parameters hold the slow weights, or if a fast weight is not finite and that is to
                raise.
        """
        if self.holds == "slow":
            message = "sync() was called while the parameters hold the slow weights: leave use('slow') first."
            raise RuntimeError(message)
        self._settle()
        self._tracked.update_if_other()
        self._cycles.update(max(self.steps, self._start_step))
        ended = self._ended() or list(self._cycles)
        own = {cycle: self._cycles.of(cycle, self._tracked.kept) for cycle in ended}
        moving = {cycle: _trained(kept) for cycle, kept in own.items()}
        pairs = {cycle: self._tracked.pairs(trained) for cycle, trained in moving.items()}
        finite = {
            cycle: all_finite(paired, self._nonfinite, self._name, sharded=self.sharded)
            for cycle, paired in pairs.items()
        }
        if self._measure_distance:
            self.last_distance = distance(self._tracked.kept, self._tracked.kept.values())
        for cycle, kept in own.items():
            trained = moving[cycle]
            if finite[cycle]:
                self._move(cycle, trained, pairs[cycle])
            elif self._nonfinite == "restore":
                copy_(trained, trained.values())
                self._momentum.forget(trained)  # what made the weights infinite is in there, too
                if self.buffers is not None:
                    copy_(self.buffers.live, self.buffers.kept)
            frozen = [] if trained is kept else [parameter for parameter in kept if not parameter.requires_grad]
            copy_([kept[parameter] for parameter in frozen], frozen)
            cycle.begins = max(self.steps, self._start_step)

    def _move(self, cycle: Cycle, trained: dict[Tensor, Tensor], pairs: Pairs) -> None:
        if not trained:  # all frozen
            cycle.syncs += 1
            return
        alpha = self._step_size(cycle, trained)
        self._tracked.sync(trained, pairs, alpha)
        self._momentum.after_sync(trained, alpha)
        if self.buffers is not None and cycle is next(iter(self._cycles)) and not not_finite(self.buffers.live):
            self.buffers.sync(alpha)
        cycle.syncs += 1
        self.last_alpha = alpha

    def _step_size(self, cycle: Cycle, trained: dict[Tensor, Tensor]) -> float:
        adaptive = cycle.step_size
        if not isinstance(adaptive, AdaptiveAlpha):
            return alpha_at(adaptive, cycle.syncs)
        if adaptive.needs_loss and self.loss is None:  # a sync that was due when the run was stopped
            return adaptive.alpha_low
        reduce = adaptive.needs_loss and isinstance(self._module, DistributedDataParallel)
        return adaptive.step_size(self.optimizer, trained, self.loss, reduce=reduce)

    def _name(self, parameter: Tensor) -> str:
        for name, other in self._module.named_parameters() if self._module is not None else ():
            if other is parameter:
                return f"Parameter {name!r}"
        index = next(i for i, other in enumerate(parameters_of(self.optimizer)) if other is parameter)
        return f"Parameter {index} of the optimizer, of shape {tuple(parameter.shape)},"

    # -- hooks

    @property
    def counting(self) -> bool:
        """Whether steps are counted and synced: from the start until `stop`."""
        return bool(self._step_hooks)

    def stop(self) -> None:
        """Stop counting and syncing: training is over. Both sets of weights stay, also in checkpoints."""
        _remove(self._step_hooks)

    def close(self) -> None:
        """Let go of the optimizer altogether; its ``state_dict`` no longer carries a second set."""
        self.stop()
        _remove(self._state_hooks)

    def _hook(self) -> None:
        optimizer = self.optimizer
        self._step_hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._state_hooks = [
            optimizer.register_state_dict_post_hook(self._pack),
            optimizer.register_load_state_dict_pre_hook(self._unpack),
        ]

    def __getstate__(self) -> dict[str, Any]:
        # An optimizer leaves its hooks behind when it is copied or pickled, and so does this object.
        return {**self.__dict__, "_step_hooks": len(self._step_hooks), "_state_hooks": len(self._state_hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        counting, saving = state["_step_hooks"], state["_state_hooks"]
        self.__dict__.update(state)
        self._hook()
        if not counting:
            _remove(self._step_hooks)
        if not saving:
            _remove(self._state_hooks)


def _check_parameters(optimizer: Optimizer, module: nn.Module | None) -> bool:
    """Return whether the optimizer's parameters are sharded; raise if they cannot have slow weights."""
    if any(isinstance(getattr(hook, "__self__", None), SlowWeights) for hook in _state_hooks_of(optimizer)):
        message = "optimizer has slow weights already, which would pull back twice: close() those first."
        raise ValueError(message)
    check_materialized(parameters_of(optimizer))
    sharded = is_sharded(module, parameters_of(optimizer))
    if sharded and module is None:
        message = "optimizer has sharded parameters: give the module that they belong to, too, as module=."
        raise ValueError(message)
    return sharded


def _trained(kept: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """Those that are not frozen now."""
    if all([parameter.requires_grad for parameter in kept]):  # noqa: C419 (twice as fast as one by one)
        return kept
    return {parameter: slow for parameter, slow in kept.items() if parameter.requires_grad}


def _state_hooks_of(optimizer: Optimizer) -> list[Any]:
    return list(optimizer._optimizer_state_dict_post_hooks.values())


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()
