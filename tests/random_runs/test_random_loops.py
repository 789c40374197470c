"""Random loops with `SlowWeights`, saved, loaded, swapped and copied, beside the naive outer loop left alone.

For many more cases see `test_random_trainer`.
"""

import copy
import io
import pickle
import random
from fnmatch import fnmatchcase
from itertools import permutations

import pytest
import torch
from torch import nn

from lightning_lookahead import Cosine, Linear, SlowWeights
from tests.helpers.naive import Outer
from tests.helpers.oracle import lookahead
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

DEFAULTS = {
    "optimizer": "SGD",
    "net": "plain",
    "dtype": "float32",
    "group": {},  # what a second group has of its own
    "k": 3,
    "alpha": 0.5,
    "start_step": 0,
    "exclude": (),
    "pullback_momentum": "none",
    "outer_momentum": 0.0,
    "outer_nesterov": True,
    "slow_dtype": None,
    "slow_device": None,
    "buffers": "keep",
    "model_weights": None,
    "module": True,  # whether SlowWeights is given it
    "frozen": (),  # when it begins
    "events": (("step", ""),) * 5,
}

PARTS = ("net", "optimizer", "slow")
ORDERS = [" ".join(order) for order in permutations(("make", *PARTS)) if order.index("make") < order.index("slow")]
"""In which parts are loaded, and when SlowWeights is made, if it is made anew."""

STEPS = ("step", "closure", "part", "skip")
PATTERNS = ("*", "*.weight", "*.bias", "first.*", "last.*")


def allowed(case):
    """Whether the parts of a case go together."""
    names = [name for name, _ in case["events"]]
    moves = {"freeze", "thaw"}.intersection(names) or case["frozen"]
    saves = {"resume", "detour"}.intersection(names)
    return go_together(case) and not any(
        (
            case["net"] == "sparse" and (moves or "part" in names),
            case["optimizer"] == "LBFGS" and (moves or set(STEPS).intersection(names) - {"closure"}),
            # Torch lets some have no group later, gives one new keys when it is loaded, and one no copy.
            "add" in names and case["optimizer"] in {"LBFGS", "Adagrad", "SparseAdam", "Adafactor", "Muon"},
            "copy" in names and case["optimizer"] == "LBFGS",
            names.count("add") > 1 or ("add" in names and case["group"]),
            case["buffers"] == "sync" and not case["module"],
            # Phi of what has not moved is rounded.
            coarse(case) and (moves or case["start_step"] or saves or {"add", "sync"} <= set(names)),
        )
    )


def draw(seed):
    """A case that is allowed, of about half of the choices that there are."""
    rng = random.Random(seed)
    while True:
        case = {**DEFAULTS, **{name: value for name, value in choices(rng).items() if rng.random() < 0.5}}
        case["events"] = tuple(event(rng, case) for _ in range(rng.randint(4, 24)))
        if allowed(case):
            return case


def choices(rng):
    own = {"lookahead_k": rng.randint(1, 4), "lookahead_alpha": rng.choice([0.2, 0.8])}
    return {
        "optimizer": rng.choice(OPTIMIZERS),
        "net": rng.choice(["norm", "norm", "tied", "matrices", "sparse"]),
        "dtype": rng.choice(["float64", "bfloat16"]),
        "group": {name: own[name] for name in rng.sample(list(own), rng.randint(1, 2))},
        "k": rng.choice([1, 2, 4, 5, Linear(1, 4, 3), Cosine(4, 1, 3)]),
        "alpha": rng.choice([0.3, 0.8, 1.0, Linear(0.2, 0.9, 4)]),
        "start_step": rng.randint(0, 6),
        "exclude": tuple(rng.sample(["*.bias", "first.*", "last.weight"], rng.randint(1, 2))),
        "pullback_momentum": rng.choice(["reset", "pullback"]),
        "outer_momentum": rng.choice([0.5, 0.9]),
        "outer_nesterov": False,
        "slow_dtype": rng.choice(["float64", "float32", "bfloat16"]),
        "slow_device": "cpu",
        "buffers": "sync",
        "model_weights": rng.choice(["slow", "slow", "fast"]),
        "module": False,
        "frozen": rng.choice([("*",), ("*",), ("first.*",), ("*.bias",)]),
    }


def event(rng, case):
    if case["optimizer"] == "LBFGS" and rng.random() < 0.6:
        return "closure", ""
    if rng.random() < 0.5:
        return rng.choice([*STEPS, "step", "step"]), ""
    place, order = rng.choice(["", "slow", "fast"]), rng.choice(ORDERS)
    return rng.choice(
        [
            ("sync", ""),
            ("look", rng.choice(["slow", "fast"])),
            ("freeze", rng.choice(PATTERNS)),
            ("thaw", rng.choice(PATTERNS)),
            ("add", rng.choice(["", "lookahead_k", "lookahead_alpha"])),
            ("copy", rng.choice(["deepcopy", "pickle"])),
            ("resume", (place, order)),
            ("resume", (place, order)),
            ("detour", (place, order)),
        ]
    )


class Net(Layers, nn.Module):
    pass


class Loop:
    """A network that is trained by a plain loop, with the naive outer loop around it."""

    def __init__(self, case):
        self.case = case
        self.adds = any(name == "add" for name, _ in case["events"])
        self.added = None  # what a group that was added has of its own
        self.index = 0
        self.net, self.optimizer = self.build()
        self.match(case["frozen"], trained=False)
        self.outer = self.make_outer()

    def build(self):
        net = Net()
        net.build(self.case["net"], getattr(torch, self.case["dtype"]))
        first, second = net.halves()
        if self.adds:
            groups = [{"params": first}, *([] if self.added is None else [{"params": second, **self.added}])]
        elif self.case["group"]:
            groups = [{"params": first}, {"params": second, **self.case["group"]}]
        else:
            groups = [*first, *second]
        return net, make_optimizer(self.case["optimizer"], groups)

    def excluded(self, net):
        named = net.named_parameters()
        return [p for name, p in named if any(fnmatchcase(name, pattern) for pattern in self.case["exclude"])]

    def make_outer(self):
        excluded = set(self.excluded(self.net))
        names = {parameter: name for name, parameter in self.net.named_parameters() if parameter not in excluded}
        outer = Outer(
            self.optimizer,
            names,
            k=self.case["k"],
            alpha=self.case["alpha"],
            start_step=self.case["start_step"],
            mode=self.case["pullback_momentum"],
            mu=self.case["outer_momentum"],
            nesterov=self.case["outer_nesterov"],
            dtype=getattr(torch, self.case["slow_dtype"]) if self.case["slow_dtype"] else None,
            norms=self.net if self.case["buffers"] == "sync" else None,
        )
        self.optimizer.register_step_pre_hook(outer.before)
        self.optimizer.register_step_post_hook(self.after)
        return outer

    def after(self, *_):
        self.outer.after()
        if self.outer.due():
            self.outer.sync()

    # -- what may happen

    def do(self, name, value):
        if name in STEPS:
            self.take(name)
        elif name == "sync":
            self.outer.sync()
        elif name in {"freeze", "thaw"}:
            self.match([value], trained=name == "thaw")
        elif name == "add":
            self.add({value: {"lookahead_k": 2, "lookahead_alpha": 0.8}[value]} if value else {})

    def take(self, kind):
        self.index += 1

        def closure():
            self.net.zero_grad()
            loss = self.net.loss(self.index, part=kind == "part")
            if loss.requires_grad and kind != "skip":
                loss.backward()
            return loss

        if kind == "closure":
            self.optimizer.step(closure)
        else:
            closure()
            self.optimizer.step()

    def match(self, patterns, *, trained):
        for name, parameter in self.net.named_parameters():
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                parameter.requires_grad_(trained)

    def add(self, own):
        self.added = own
        self.optimizer.add_param_group({"params": self.net.halves()[1], **own})

    def weights(self):
        return Outer.clones(dict(self.net.named_parameters()))

    def both(self):
        """All that either set has, and phi as it is kept."""
        shown = {}
        for which in ("slow", "fast"):
            self.outer.put(which)
            shown[which] = Outer.clones(self.net.state_dict())
        return {**shown, "phi": Outer.clones(self.outer.phi), "counts": counts_of(self.outer)}


class Ours(Loop):
    """The same with `SlowWeights`, which is saved, loaded, swapped and copied."""

    def make_outer(self):
        self.slow = self.make_slow(self.net, self.optimizer)

    def make_slow(self, net, optimizer):
        names = ("k", "alpha", "start_step", "pullback_momentum", "slow_dtype", "slow_device", "buffers")
        options = {name: self.case[name] for name in (*names, "outer_momentum", "outer_nesterov", "model_weights")}
        module = net if self.case["module"] else None
        return SlowWeights(optimizer, module=module, exclude=self.excluded(net), **options)

    def do(self, name, value):
        if name == "sync":
            self.slow.sync()
        elif name == "copy":
            kept = self.net, self.optimizer, self.slow
            self.net, self.optimizer, self.slow = (
                copy.deepcopy(kept) if value == "deepcopy" else pickle.loads(pickle.dumps(kept))
            )
        elif name == "resume":
            self.resume(self.saved(value[0]), value[0], value[1])
        elif name == "detour":
            index, saved = self.index, self.saved(value[0])
            for _ in range(2):
                self.take("closure")
            self.slow.swap_to("slow" if self.case["module"] else "fast")
            self.load(saved, value[0], value[1])
            self.index = index
        else:
            super().do(name, value)

    def saved(self, place):
        """The three files, written while the parameters hold a set."""
        model = self.case["model_weights"]
        with self.slow.use(place or self.slow.active):
            states = [self.optimizer.state_dict(), self.slow.state_dict()]
            with self.slow.use(model or self.slow.active):
                states.insert(0, self.net.state_dict())
                file = io.BytesIO()
                torch.save(dict(zip(PARTS, states, strict=True)), file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def resume(self, saved, place, order):
        frozen = [name for name, parameter in self.net.named_parameters() if not parameter.requires_grad]
        self.net, self.optimizer = self.build()
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.fill_(7.0)
        if order.startswith("make"):  # or after all is loaded
            self.match(frozen, trained=False)
        self.load(saved, place, order, anew=True)
        self.match(frozen, trained=False)

    def load(self, saved, place, order, *, anew=False):
        for part in order.split():
            if part == "make":
                self.slow = self.make_slow(self.net, self.optimizer) if anew else self.slow
            else:
                getattr(self, part).load_state_dict(saved[part])
        if not self.case["module"] and (self.case["model_weights"] or place) == "slow":
            self.slow.swap_to("fast")  # nobody has told that the model was loaded

    def both(self):
        shown = {}
        for which in ("slow", "fast"):
            with self.slow.use(which):
                shown[which] = Outer.clones(self.net.state_dict())
        names = {parameter: name for name, parameter in self.net.named_parameters()}
        phi = {names[parameter]: value for parameter, value in self.slow.values("slow").items()}
        return {**shown, "phi": Outer.clones(phi), "counts": counts_in(self.slow.state_dict())}


def look(ours, reference, which, what):
    with ours.slow.use(which):
        reference.outer.put(which)
        same(ours.weights(), reference.weights(), what)
        with ours.slow.use("slow" if which == "fast" else "fast"):
            pass
        same(ours.weights(), reference.weights(), what)
    reference.outer.put("fast")


def check(case):
    reference, ours = Loop(case), Ours(case)
    for number, (name, value) in enumerate((*case["events"], ("closure", ""))):  # a group counts from its first step on
        what = f"{name}, event {number}"
        if name in {"resume", "detour"}:
            same(ours.optimizer.state_dict(), reference.optimizer.state_dict(), what)
        reference.do(name, value)
        ours.do(name, value)
        if name in STEPS:  # which may have been the first use since something was loaded
            same(ours.weights(), reference.weights(), what)
        if name == "look":
            look(ours, reference, value, what)
    end, expected = ours.both(), reference.both()
    for name in ("fast", "slow", "counts"):
        same(end[name], expected[name], f"{name} at the end")
    for name, value in end["phi"].items():  # also of what has never been trained
        same(value, expected["phi"].get(name, expected["fast"][name].to(value.dtype)), f"phi at the end, {name}")


@pytest.mark.parametrize("seed", seeds(100))
def test_a_loop_with_all_that_may_happen_is_that_of_the_naive_outer_loop(seed):
    run(check, draw(seed), DEFAULTS, allowed)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_naive_outer_loop_is_algorithm_1(optimizer):
    net = {"Muon": "matrices", "SparseAdam": "sparse"}.get(optimizer, "plain")
    for k, alpha in ((1, 0.3), (3, 0.5), (4, 1.0)):
        case = {**DEFAULTS, "optimizer": optimizer, "net": net, "k": k, "alpha": alpha}
        naive, plain = Loop(case), Loop({**case, "k": 100})
        for _ in range(10):
            naive.take("closure")
        phi = lookahead(
            list(plain.net.parameters()), lambda _, loop=plain: loop.take("closure"), k=k, alpha=alpha, steps=10
        )
        expected = dict(zip(plain.weights(), phi, strict=True))
        same(naive.weights(), plain.weights(), "theta")
        same(naive.both()["phi"], expected, "phi")
