"""Algorithm 1 once more, with every option: what random runs are compared with.

Weights go by name and everything is written out: nothing of the package is used, nothing is saved or restored, nothing
is arranged to be fast.
"""

import copy
import functools
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from lightning.pytorch import Callback


@dataclass
class Cycle:
    """Inner steps since the last sync, and syncs, of groups with the same k and alpha."""

    since: int = 0
    syncs: int = 0


def at(value, syncs):
    """What a number or a schedule gives after so many syncs."""
    return value(syncs) if callable(value) else value


class Outer:
    """The outer loop around one optimizer, which moves the parameters in ``names``; the others it leaves alone."""

    def __init__(
        self,
        optimizer,
        names,
        *,
        k=5,
        alpha=0.5,
        start_step=0,
        mode="none",
        dtype=None,
        norms=None,
        mu=0,
        nesterov=True,
    ):
        self.optimizer, self.names, self.k, self.alpha, self.start_step = optimizer, names, k, alpha, start_step
        self.mu, self.nesterov, self.descents = mu, nesterov, {}
        self.mode, self.dtype, self.norms = mode, dtype, norms
        self.taken, self.holds, self.cycles, self.moved = 0, "fast", {}, set()
        self.phi, self.moments, self.aside = {}, {}, {}
        self.statistics = self.clones(self.live())
        self.new = {parameter: copy.deepcopy(own) for parameter, own in optimizer.state.items()}
        self.follow()
        self.look_at_groups()

    # -- what there is

    @staticmethod
    def clones(tensors):
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @staticmethod
    def settings(group):
        return group.get("lookahead_k"), group.get("lookahead_alpha")

    def listed(self):
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def own(self, settings=None):
        groups = [g for g in self.optimizer.param_groups if settings is None or self.settings(g) == settings]
        return {self.names[p]: p for group in groups for p in group["params"] if p in self.names}

    def live(self):
        """BatchNorm's running means and variances, if they move as weights do."""
        return {n: b for n, b in self.norms.named_buffers() if b.is_floating_point()} if self.norms else {}

    def follow(self):
        """Until the first step of the first cycle phi is theta; and it starts there for a parameter that joins."""
        for name, parameter in self.own().items():
            if not self.begun() if name in self.phi else parameter.requires_grad:
                wider = torch.promote_types(parameter.dtype, torch.float32)
                self.phi[name] = parameter.detach().to(self.dtype or wider, copy=True)
        if not self.begun():
            self.statistics = self.clones(self.live())

    def begun(self):
        """Whether the first step of the first cycle was taken."""
        return self.taken > self.start_step

    def look_at_groups(self):
        for group in self.optimizer.param_groups:
            self.cycles.setdefault(self.settings(group), Cycle())

    # -- counting

    def before(self, *_):
        self.follow()
        self.look_at_groups()
        if self.taken == self.start_step:  # the first cycle begins
            self.moved = set()

    def after(self, *_):
        """Count the step, if it moved anything."""
        if all(parameter.grad is None for parameter in self.listed()):
            return
        self.moved |= {name for name, parameter in self.own().items() if parameter.grad is not None}
        self.taken += 1
        if self.taken > self.start_step:
            for cycle in self.cycles.values():
                cycle.since += 1

    def due(self):
        return [own for own, cycle in self.cycles.items() if cycle.since >= round(at(own[0] or self.k, cycle.syncs))]

    # -- the outer step

    @torch.no_grad()
    def sync(self, which=None):
        self.follow()
        self.look_at_groups()
        for settings in which or self.due() or list(self.cycles):
            cycle = self.cycles[settings]
            alpha = at(settings[1] or self.alpha, cycle.syncs)
            for name, theta in self.own(settings).items():
                frozen = self.mu and not theta.requires_grad
                if name in self.phi and name not in self.moved and (cycle.since or frozen):
                    self.phi[name].copy_(theta)
                    if not theta.requires_grad:
                        self.descents.pop(name, None)
                elif name in self.phi:
                    self.outer_step(name, theta, alpha)
                    theta.copy_(self.phi[name])
                    self.momentum(theta, alpha)
            if settings == next(iter(self.cycles)):
                for name, live in self.live().items():
                    self.statistics[name] = torch.lerp(self.statistics[name], live, min(alpha, 1))
                    live.copy_(self.statistics[name])
            self.moved -= set(self.own(settings))
            cycle.since, cycle.syncs = 0, cycle.syncs + 1

    def outer_step(self, name, theta, alpha):
        """With momentum phi is a parameter that torch's SGD descends with."""
        if not self.mu:
            self.phi[name] = torch.lerp(self.phi[name], theta.to(self.phi[name]), alpha)
            return
        if name not in self.descents:
            phi = torch.nn.Parameter(self.phi[name])
            self.descents[name] = phi, torch.optim.SGD([phi], 1.0, self.mu, nesterov=self.nesterov, foreach=False)
        phi, descent = self.descents[name]
        phi.copy_(self.phi[name])
        phi.grad = phi.detach() - theta.to(phi)
        descent.param_groups[0]["lr"] = alpha
        descent.step()
        self.phi[name] = phi.detach().clone()

    def momentum(self, theta, alpha):
        if self.mode == "reset":
            self.optimizer.state.pop(theta, None)
            if theta in self.new:
                self.optimizer.state[theta] = copy.deepcopy(self.new[theta])
        for key in ("momentum_buffer", "exp_avg") if self.mode == "pullback" else ():
            moment = self.optimizer.state.get(theta, {}).get(key)
            if moment is not None:
                last = self.moments.get((theta, key), torch.zeros_like(moment))
                self.moments[theta, key] = torch.lerp(last, moment, alpha)
                moment.copy_(self.moments[theta, key])

    # -- either set

    @torch.no_grad()
    def put(self, weights):
        if weights == self.holds:
            return
        self.holds = weights
        if weights == "slow":
            self.follow()
            places = {**self.own(), **self.live()}
            values = {**(self.phi if self.begun() else {}), **self.statistics}
            self.aside = self.clones({name: places[name] for name in values})
        else:
            places, values = {**self.own(), **self.live()}, self.aside
        for name, value in values.items():
            places[name].copy_(value)


class NaiveLookahead(Callback):
    """What `LookaheadCallback` has to do in a run that is never stopped."""

    def __init__(
        self,
        *,
        eval_weights="slow",
        unfinished_cycle="drop",
        exclude=(),
        sync_optimizers="independently",
        buffers="keep",
        pullback_momentum="none",
        slow_dtype=None,
        slow_device=None,
        outer_momentum=0.0,
        outer_nesterov=True,
        **options,
    ):
        self.eval_weights, self.unfinished_cycle, self.exclude = eval_weights, unfinished_cycle, exclude
        self.together, self.buffers = sync_optimizers == "together", buffers
        dtype = getattr(torch, slow_dtype) if slow_dtype else None
        self.options = {**options, "mode": pullback_momentum, "dtype": dtype}
        self.options |= {"mu": outer_momentum, "nesterov": outer_nesterov}
        self.outers = []

    def on_train_start(self, trainer, pl_module):
        names = {
            parameter: name
            for name, parameter in pl_module.named_parameters()
            if not any(fnmatchcase(name, pattern) for pattern in self.exclude)
        }
        for optimizer in trainer.optimizers:
            norms = pl_module if self.buffers == "sync" and not self.outers else None
            outer = Outer(optimizer, names, norms=norms, **self.options)
            self.outers.append(outer)
            names = {parameter: name for parameter, name in names.items() if parameter not in set(outer.listed())}
            optimizer.register_step_pre_hook(outer.before)
            optimizer.register_step_post_hook(functools.partial(self.after, outer))

    def after(self, outer, *_):
        outer.after()
        syncing = self.outers if self.together else [outer]
        if all(other.due() for other in syncing):
            for other in syncing:
                other.sync()

    def sync_now(self):
        for outer in self.outers:
            outer.sync()

    def put(self, weights):
        for outer in self.outers:
            outer.put(weights)

    def on_validation_start(self, trainer, pl_module):
        self.put(self.eval_weights)

    def on_validation_end(self, trainer, pl_module):
        self.put("fast")

    def on_train_end(self, trainer, pl_module):
        for outer in self.outers if self.unfinished_cycle == "sync" else ():
            begun = [settings for settings, cycle in outer.cycles.items() if cycle.since]
            if begun:
                outer.sync(begun)
        self.put(self.eval_weights)

    def both(self, pl_module):
        """The module's ``state_dict`` with each set, and phi as it is kept."""
        held = [outer.holds for outer in self.outers]
        shown = {}
        for weights in ("fast", "slow"):
            self.put(weights)
            shown[weights] = Outer.clones(pl_module.state_dict())
        for outer, weights in zip(self.outers, held, strict=True):
            outer.put(weights)
        phi = {p: outer.phi[n] for outer in self.outers for n, p in outer.own().items() if n in outer.phi}
        named = pl_module.named_parameters(remove_duplicate=False)
        return {**shown, "phi": Outer.clones({name: phi[parameter] for name, parameter in named if parameter in phi})}
