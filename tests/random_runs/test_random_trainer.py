"""Random fits with `LookaheadCallback`, stopped and resumed, beside uninterrupted ones with a naive callback.

``LOOKAHEAD_RANDOM_RUNS=2000 .venv/bin/pytest tests/random_runs`` takes new cases, so many of each test, also with
``-n 2``; the number in a failing test's name, in ``LOOKAHEAD_RANDOM_SEED``, takes that one again.
"""

import contextlib
import copy
import random
from fnmatch import fnmatchcase

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_lookahead import Cosine, Linear, LookaheadCallback, load_weights
from tests.helpers.naive import NaiveLookahead, Outer
from tests.helpers.random_cases import run, seeds
from tests.helpers.random_networks import (
    OPTIMIZERS,
    Layers,
    coarse,
    counts_in,
    counts_of,
    go_together,
    make_optimizer,
    same,
)
from tests.helpers.runs import make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Lookahead. parameter .* in several optimizers"),  # that is asked for
    pytest.mark.filterwarnings("ignore:The dirpath has changed|Be aware that when using `ckpt_path`"),  # so it has
]

DEFAULTS = {
    "optimizer": "SGD",
    "net": "plain",
    "dtype": "float32",
    "precision": "32-true",
    "turns": (),  # which optimizers step in a batch, by hand; none: automatic optimization of one
    "toggle": False,
    "shared": False,  # the second optimizer trains a parameter of the first one, too
    "group": {},  # what a second group has of its own
    "k": 3,
    "alpha": 0.5,
    "start_step": 0,
    "eval_weights": "slow",
    "unfinished_cycle": "drop",
    "exclude": (),
    "sync_optimizers": "independently",
    "pullback_momentum": "none",
    "outer_momentum": 0.0,
    "outer_nesterov": True,
    "slow_dtype": None,
    "slow_device": None,
    "buffers": "keep",
    "accumulate": 1,
    "clip": None,
    "skips": (),  # steps without a loss
    "partial": False,  # whether in some steps the last layer gets no gradient
    "freezes": ((0, ()),),  # from which step on which parameters are frozen
    "sync_at": (),  # steps after which the outer step is done by hand
    "scheduler": False,
    "batches": 5,  # in an epoch
    "validate": 0,  # after so many batches
    "steps": 10,
    "stops": ((4, "on_train_batch_end", "raise"),),  # from which step on, where it is saved, how the run ends
}

PLACES = ("on_train_batch_end", "on_validation_start", "on_validation_end", "on_train_epoch_end", "ModelCheckpoint")


def allowed(case):
    """Whether the parts of a case go together; where not, torch, Lightning or the callback refuses it."""
    optimizer, double = case["optimizer"], case["precision"] == "64-true"
    several, still = 1 in case["turns"], case["skips"] or any(patterns for _, patterns in case["freezes"])
    steps, places, ways = ([stop[part] for stop in case["stops"]] for part in range(3))
    return go_together(as_trained(case)) and not any(
        (
            case["net"] == "sparse" and (several or case["clip"] or case["partial"]),
            case["precision"] != "32-true" and case["dtype"] != "float32",
            optimizer == "LBFGS" and (several or still or case["net"] == "tied"),  # where it diverges
            not several and (case["toggle"] or case["shared"] or case["sync_optimizers"] == "together"),
            set(case["turns"]) == {1},
            # Then what the second moves belongs to both sets.
            case["shared"] and case["alpha"] == 1 and not case["outer_momentum"],
            case["turns"] and (case["accumulate"] > 1 or case["scheduler"]),
            case["validate"] > case["batches"],
            "max_steps" in ways and case["unfinished_cycle"] == "sync",
            steps != sorted(steps) or max(steps, default=0) >= case["steps"],
            not case["freezes"] or case["freezes"][0][0],
            case["clip"] == "value" and (still or case["partial"]),  # torch finds no gradients to clip
            # Phi of what has had no gradient, and was moved by others, is rounded.
            coarse(as_trained(case)) and (len(case["freezes"]) > 1 or case["shared"] or case["partial"]),
            # Resumed at its end, a run has no batch before which to freeze.
            case["unfinished_cycle"] == "sync" and len(case["freezes"]) > 1,
            # Without the callback, too, Lightning does not resume these bit for bit: statistics are loaded before they
            # are made double, and its place in an epoch is lost.
            case["net"] == "norm" and double,
            case["accumulate"] > 1 and ("max_steps" in ways or {*places} - {"on_train_batch_end"}),
            optimizer == "Adagrad" and double and case["pullback_momentum"] == "reset",  # its count becomes double, too
        )
    )


def as_trained(case):
    """The case with the type that the parameters have while they are trained."""
    return {**case, "dtype": {"64-true": "float64", "bf16-true": "bfloat16"}.get(case["precision"], case["dtype"])}


def draw(seed):
    """A case that is allowed, of about half of the choices that there are."""
    rng = random.Random(seed)
    while True:
        case = {**DEFAULTS, **{name: value for name, value in choices(rng).items() if rng.random() < 0.5}}
        if allowed(case):
            return case


def choices(rng):
    steps = rng.randint(4, 16)
    names = ("*.weight", "*.bias", "first.*", "last.*", "first.weight", "*")
    stops = [
        (
            rng.randint(1, steps - 1),
            rng.choice([PLACES[0], *PLACES]),
            rng.choice(["raise", "should_stop", "max_steps", "go on"]),
        )
        for _ in range(rng.choice([1, 1, 2, 3]))
    ]
    freezes = [(rng.randint(1, steps), tuple(rng.sample(names, rng.randint(0, 2)))) for _ in range(rng.randint(0, 3))]
    own = {"lookahead_k": rng.randint(1, 4), "lookahead_alpha": rng.choice([0.2, 0.8])}
    batches = rng.randint(2, 7)
    return {
        "optimizer": rng.choice(OPTIMIZERS),
        "net": rng.choice(["norm", "norm", "tied", "matrices", "sparse"]),
        "dtype": rng.choice(["float64", "bfloat16"]),
        "precision": rng.choice(["64-true", "bf16-true"]),
        "turns": rng.choice([(0,), (0, 0), (0, 1), (1, 0), (0, 1, 1), (0, 0, 1)]),
        "toggle": True,
        "shared": True,
        "group": {name: own[name] for name in rng.sample(list(own), rng.randint(1, 2))},
        "k": rng.choice([1, 2, 4, 5, Linear(1, 4, 3), Cosine(4, 1, 3)]),
        "alpha": rng.choice([0.3, 0.8, 1.0, Linear(0.2, 0.9, 4)]),
        "start_step": rng.randint(0, 6),
        "eval_weights": "fast",
        "unfinished_cycle": "sync",
        "exclude": tuple(rng.sample(["*.bias", "first.*", "last.weight"], rng.randint(1, 2))),
        "sync_optimizers": "together",
        "pullback_momentum": rng.choice(["reset", "pullback"]),
        "outer_momentum": rng.choice([0.5, 0.9]),
        "outer_nesterov": False,
        "slow_dtype": rng.choice(["float64", "float32", "bfloat16"]),
        "slow_device": "cpu",
        "buffers": "sync",
        "accumulate": rng.randint(2, 3),
        "clip": rng.choice(["norm", "value"]),
        "skips": tuple(sorted(rng.sample(range(steps), rng.randint(1, 3)))),
        "partial": True,
        "freezes": ((0, rng.choice([("*",), ("*",), ("first.*",), ()])), *sorted(dict(freezes).items())),
        "sync_at": tuple(sorted(rng.sample(range(1, steps + 1), rng.randint(1, 2)))),
        "scheduler": True,
        "batches": batches,
        "validate": rng.randint(1, batches),
        "steps": steps,
        "stops": tuple(sorted({step: (step, where, way) for step, where, way in stops}.values())),
    }


class Network(Layers, LightningModule):
    """What is trained in a case. All that happens depends on the step alone, as Lightning replays a part-epoch."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        self.automatic_optimization = not case["turns"]
        self.build(case["net"], getattr(torch, case["dtype"]))
        self.since, self.micro, self.seen = -1, 0, []
        self.freeze(0)

    def freeze(self, step):
        patterns = [patterns for begin, patterns in self.case["freezes"] if begin <= step][-1]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not any(fnmatchcase(name, pattern) for pattern in patterns))

    def on_train_batch_start(self, batch, batch_idx):
        self.freeze(self.trainer.global_step)

    def loss_now(self):
        """That of this step, and of this batch where a step has several; None if there is none."""
        step = self.trainer.global_step
        self.since, self.micro = step, self.micro + 1 if step == self.since else 0
        if step in self.case["skips"] and self.micro <= step % 2:
            return None
        loss = self.loss(10 * step + self.micro, part=self.case["partial"] and step % 4 != 1)
        return loss if loss.requires_grad else None

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return self.loss_now()
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for turn in self.case["turns"]:
            self.step_by_hand(optimizers[turn])
        return None

    def step_by_hand(self, optimizer):
        if self.case["toggle"]:
            self.toggle_optimizer(optimizer)

        def closure():
            optimizer.zero_grad()
            self.micro = -1  # LBFGS calls it more than once
            loss = self.loss_now()
            if loss is not None:
                self.manual_backward(loss)
                if self.case["clip"]:
                    self.clip_gradients(optimizer, 0.05, self.case["clip"])
            return loss

        if self.case["optimizer"] == "LBFGS":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        if self.case["toggle"]:
            self.untoggle_optimizer(optimizer)

    def validation_step(self, batch, batch_idx):
        self.seen.append((self.trainer.global_step, Outer.clones(dict(self.named_parameters()))))

    def configure_optimizers(self):
        first, second = self.halves()
        name, group = self.case["optimizer"], self.case["group"]
        if 1 in self.case["turns"]:
            groups = [{"params": first[:1]}, {"params": first[1:], **group}] if first[1:] else [{"params": first}]
            shared = [first[-1]] if self.case["shared"] else []
            return [make_optimizer(name, groups), make_optimizer(name, [*second, *shared])]
        groups = [{"params": first}, {"params": second, **group}] if group else [*first, *second]
        optimizer = make_optimizer(name, groups)
        if not self.case["scheduler"]:
            return optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.8)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def train_dataloader(self):
        return DataLoader(range(self.case["batches"]))

    def val_dataloader(self):
        return DataLoader(range(1))


# -- a run, and stopping it


class StoppedError(Exception):
    """What ends a run from outside."""


class Events(Callback):
    """Does the outer step by hand; keeps what the weights were after each step, if the callback can tell."""

    def __init__(self, case, lookahead):
        self.case, self.lookahead, self.last, self.history = case, lookahead, 0, {}

    def on_train_start(self, trainer, pl_module):
        self.last = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, *_):
        step, last, self.last = trainer.global_step, self.last, trainer.global_step
        if any(last < at <= step for at in self.case["sync_at"]):
            self.lookahead.sync_now()
        if step != last and isinstance(self.lookahead, NaiveLookahead):
            self.history[step] = kept(self.lookahead, trainer, pl_module)


class Stop(Callback):
    """Saves in a hook, from a step on, and ends the run."""

    def __init__(self, step, where, way, path):
        self.saved, self.last = False, 0

        def save(trainer, *_):
            # Within accumulated batches nothing is saved: their gradients would be lost.
            between = where == "on_train_batch_end" and trainer.global_step == self.last
            self.last = trainer.global_step
            if self.saved or between or trainer.global_step < step:
                return
            trainer.save_checkpoint(path)
            self.saved = True
            if way == "raise":
                raise StoppedError
            trainer.should_stop = way == "should_stop"

        if where != "ModelCheckpoint" and way != "max_steps":
            setattr(self, where, save)


def fit(case, lookahead, *others, steps=None, ckpt_path=None):
    module, events = Network(case), Events(case, lookahead)
    by_trainer = case["clip"] and not case["turns"]
    trainer = make_trainer(
        lookahead,
        events,
        *others,
        max_steps=steps or case["steps"],
        precision=case["precision"],
        accumulate_grad_batches=case["accumulate"],
        limit_val_batches=1 if case["validate"] else 0,
        val_check_interval=case["validate"] or None,
        **({"gradient_clip_val": 0.05, "gradient_clip_algorithm": case["clip"]} if by_trainer else {}),
    )
    with contextlib.suppress(StoppedError):
        trainer.fit(module, ckpt_path=ckpt_path)
    return trainer, module, events


def options_of(case):
    names = ("k", "alpha", "start_step", "pullback_momentum", "slow_dtype", "slow_device", "buffers")
    names += ("eval_weights", "unfinished_cycle", "sync_optimizers", "outer_momentum", "outer_nesterov")
    return {**{name: case[name] for name in names}, "exclude": list(case["exclude"])}


def stopped_and_resumed(case, folder):
    """The last run's callback, trainer and module, all checkpoints, and what every validation has seen."""
    path, paths, seen = None, [], []
    for number, (step, where, way) in enumerate([*case["stops"], (None, "", "go on")]):
        lookahead, at = LookaheadCallback(**options_of(case)), folder / f"{number}.ckpt"
        others = [Stop(step, where, way, at)] if step else []
        if where == "ModelCheckpoint" and way != "max_steps":
            every = folder / str(number)
            others.append(ModelCheckpoint(every, "{step}", every_n_train_steps=1, save_top_k=-1))
        steps = step if way == "max_steps" else None
        trainer, module, _ = fit(case, lookahead, *others, steps=steps, ckpt_path=path)
        seen += module.seen
        if way == "max_steps":
            trainer.save_checkpoint(at)
        elif where == "ModelCheckpoint":
            found = {int(file.stem.partition("=")[2]): file for file in every.glob("*.ckpt")}
            paths += found.values()
            at = found.get(min((number for number in found if number >= step), default=None), at)
        if not at.exists():  # the hook was not called any more: the run is over
            break
        path = at
        paths.append(at)
    return lookahead, trainer, module, paths, seen


# -- what has to be equal


def kept(naive, trainer, pl_module):
    """All that a checkpoint has to have, now."""
    return {
        **naive.both(pl_module),
        "optimizers": copy.deepcopy([optimizer.state_dict() for optimizer in trainer.optimizers]),
        "counts": [counts_of(outer) for outer in naive.outers],
    }


def check_checkpoint(path, history, case):
    checkpoint = torch.load(path, weights_only=True)
    expected, what = history[checkpoint["global_step"]], f"checkpoint of step {checkpoint['global_step']}"
    same(dict(checkpoint["state_dict"]), expected[case["eval_weights"]], f"{what}, state_dict")
    same(checkpoint["optimizer_states"], expected["optimizers"], f"{what}, optimizer")
    for weights in ("fast", "slow"):
        loaded = load_weights(path, weights)
        wider = expected["phi"] if weights == "slow" else {}
        for name, value in expected[weights].items():
            exact = loaded[name].dtype != value.dtype  # phi that the module cannot hold without rounding
            same(loaded[name], wider[name] if exact else value, f"{what}, load_weights {weights}, {name}")
    (ours,) = [own for own in checkpoint["callbacks"].values() if "lookahead_version" in own]
    same([counts_in(state) for state in ours["optimizers"]], expected["counts"], f"{what}, counts")


def check(case, folder):
    naive = NaiveLookahead(**options_of(case))
    trainer, plain, events = fit(case, naive)
    history, end = events.history, kept(naive, trainer, plain)
    lookahead, _, module, paths, seen = stopped_and_resumed(case, folder)
    for path in paths:
        check_checkpoint(path, history, case)
    for step, weights in seen:
        if step:
            expected = {name: history[step][case["eval_weights"]][name] for name in weights}
            same(weights, expected, f"validation after step {step}")
    same(dict(module.state_dict()), Outer.clones(plain.state_dict()), "module after fit")
    for weights in ("fast", "slow"):
        with lookahead.use_weights(weights):
            same(dict(module.state_dict()), end[weights], weights)
    names = {parameter: name for name, parameter in module.named_parameters()}
    for slow in lookahead.slow_weights:
        for parameter, value in slow.values("slow").items():
            phi = end["phi"].get(names[parameter], value)
            one_set = coarse(as_trained(case)) and value.dtype != phi.dtype  # before the first cycle phi is theta
            same(value, end["slow"][names[parameter]] if one_set else phi, f"phi, {names[parameter]}")
    same([counts_in(slow.state_dict()) for slow in lookahead.slow_weights], end["counts"], "counts")


@pytest.mark.parametrize("seed", seeds(25))
def test_a_fit_that_is_stopped_and_resumed_is_that_of_a_naive_callback(seed, tmp_path):
    folders = (tmp_path / str(number) for number in range(10**6))

    def fresh(case):
        folder = next(folders)
        folder.mkdir()
        check(case, folder)

    run(fresh, draw(seed), DEFAULTS, allowed)


FOUND = {  # small cases of kinds that random runs have found to fail
    "a shared parameter that is frozen where the run goes on": {
        "turns": (1, 0),
        "shared": True,
        "freezes": ((0, ("*",)), (1, ("first.weight",))),
        "validate": 4,
        "stops": ((1, "on_validation_end", "go on"), (8, "ModelCheckpoint", "raise")),
    },
    "a shared parameter that the other optimizer moves between a sync and a validation": {
        "turns": (0, 1),
        "shared": True,
        "k": 2,
        "validate": 1,
        "stops": ((5, "on_validation_start", "raise"),),
    },
    "players that wait for one another when they are saved": {
        "turns": (0, 1, 1),
        "toggle": True,
        "sync_optimizers": "together",
        "k": 2,
        "stops": ((3, "on_train_batch_end", "raise"),),
    },
    "a cycle of a group that begins where training ends": {
        "group": {"lookahead_k": 4},
        "unfinished_cycle": "sync",
        "steps": 6,
    },
}


@pytest.mark.parametrize("case", FOUND.values(), ids=FOUND)
def test_a_fit_of_a_kind_that_has_failed_is_that_of_a_naive_callback(case, tmp_path):
    case = {**DEFAULTS, **case}
    assert allowed(case)
    check(case, tmp_path)
