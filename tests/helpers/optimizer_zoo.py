"""Every optimizer class of the packages that are installed, and what becomes of a run with it that is resumed.

No class is named here: the packages are asked for theirs, and a signature says how to make one. How it steps, whether
it resumes by itself and whether it does with Lookahead is found out by trying.
"""

import functools
import importlib
import importlib.util
import inspect
import io
import itertools
import os
import random
import sys
import tempfile
import traceback
import types
import warnings
from collections import deque
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader

import lightning_lookahead
from lightning_lookahead import LookaheadCallback, SlowWeights
from tests.helpers.oracle import lookahead
from tests.helpers.runs import both, equal, make_trainer

PACKAGES = (
    "torch.optim",
    "pytorch_optimizer",
    "torch_optimizer",
    "schedulefree",
    "prodigyopt",
    "lion_pytorch",
    "timm.optim",
    "lookahead_pytorch",
    "bitsandbytes.optim",  # last: to import it takes seconds
)
STEPS, K, ALPHA = 8, 3, 0.5
STOPS = (3, 4, 5)  # right after a sync, one step into a cycle and two

RESUMES = "resumes"
ALONE = "does not resume by itself"
REFUSED = "refused"
NOT_HERE = "cannot be run here"
FAILS = "fails"

_OURS = str(Path(lightning_lookahead.__file__).parent)


# -- which there are


def optimizers_of(package):
    """The public classes of a package that look like an optimizer and are none of torch's, by name."""
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        return {}
    listed = [vars(module) for module in _modules(package)]
    classes = {name: value for names in listed for name, value in names.items() if _is_optimizer(name, value)}
    return classes if package == "torch.optim" else {n: c for n, c in classes.items() if not _is_of_torch(c)}


def _is_optimizer(name, value):
    methods = ("step", "zero_grad", "state_dict", "load_state_dict")  # a scheduler has no zero_grad
    return (
        inspect.isclass(value)
        and not name.startswith("_")
        and value is not Optimizer
        and not inspect.isabstract(value)
        and all(callable(getattr(value, method, None)) for method in methods)
    )


def _is_of_torch(cls):
    return cls.__module__.startswith("torch.")


@functools.cache
def _modules(package):
    if package != "timm.optim":
        return [importlib.import_module(package)]
    # As a whole it needs torchvision; the files of the optimizers need torch and each other alone.
    folder = Path(importlib.util.find_spec("timm").submodule_search_locations[0], "optim")
    sys.modules["timm_optim"] = types.ModuleType("timm_optim")
    sys.modules["timm_optim"].__path__ = [str(folder)]
    files = [path.stem for path in sorted(folder.glob("[!_]*.py")) if not path.stem.endswith("factory")]
    return [importlib.import_module(f"timm_optim.{name}") for name in files]


def contains_lookahead(cls):
    """Whether its source says so."""
    file = Path(sys.modules[cls.__module__].__file__)  # first, as to cut out a class takes time
    return "lookahead" in file.read_text().lower() and "lookahead" in inspect.getsource(cls).lower()


_NO_DEFAULT = inspect.Parameter.empty
_VARIABLE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def is_wrapper(cls):
    """Whether it is made from another optimizer."""
    return bool(set(WRAPPED) & set(required(cls)))


def arguments_of(cls):
    """Name -> parameter of the constructor."""
    return dict(list(inspect.signature(cls.__init__).parameters.items())[1:])


def required(cls):
    """The names of the arguments without a default."""
    arguments = arguments_of(cls).items()
    return [name for name, argument in arguments if argument.default is _NO_DEFAULT and argument.kind not in _VARIABLE]


# -- how one is made and how it steps

NETS = {
    "plain": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
    "matrices": lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)),
    "double": lambda: NETS["plain"]().double(),  # where float32 rounds the first steps away
    "sparse": lambda: nn.Sequential(nn.Embedding(8, 4, sparse=True)),
    "wide": lambda: nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)),  # enough elements for 8 bit states
}
PARAMS = {
    "list": lambda net: list(net.parameters()),
    "groups": lambda net: [  # what every Muon but torch's asks for
        {"params": [p for p in net.parameters() if (p.ndim > 1) == matrices], "use_muon": matrices}
        for matrices in (True, False)
    ],
}
INNER = {"instance": lambda net, inside: inside(net.parameters(), lr=0.01), "class": lambda _, inside: inside}
INSIDE = (Adam, SGD)
"""Some wrappers put what is theirs into the state before the one inside has made its own, which Adam does not bear."""
WRAPPED = ("optimizer", "base_optimizer", "base")
"""What the argument for an inner optimizer is called."""
ALWAYS = {"max_iter": 4}
"""Fewer evaluations in a step."""
SETTINGS = {"momentum": 0.9, "keep_num": 2, "threshold": 1.0, "lr": 0.01}
"""For what does not run, or does not move a weight in eight steps, with its own defaults."""


class _Rho:
    def step(self):
        return 0.05


def _given(net, params, inner):
    values = {
        "params": params,
        "model": net,
        "num_data": 8,
        "num_iterations": STEPS,
        "lr": 0.01,
        "rho_scheduler": _Rho(),
    }
    return {**values, **dict.fromkeys(WRAPPED, inner)}


def _plain(optimizer, loss):
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def _closure_of(optimizer, loss):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def _closure(optimizer, loss):
    optimizer.step(_closure_of(optimizer, loss))


def _twice(optimizer, loss):
    closure = _closure_of(optimizer, loss)
    closure()
    optimizer.step(closure)


def _graph(optimizer, loss):
    optimizer.zero_grad()
    loss().backward(create_graph=True)
    optimizer.step()


def _told(optimizer, loss):
    optimizer.zero_grad()
    value = loss()
    value.backward()
    optimizer.step(value.item)


def _handed(optimizer, loss):
    optimizer.set_closure(lambda output, target: (output - target).square().mean(), loss.keywords["batch"], 1)
    optimizer.step()


def _fused(optimizer, loss):
    optimizer.fused_backward(loss(), lr=0.01)


def _scaled(optimizer, loss):
    optimizer.zero_grad()
    optimizer.backward(loss())
    optimizer.step()


WAYS = {
    "plain": _plain,
    "graph": _graph,
    "twice": _twice,
    "closure": _closure,
    "told": _told,
    "handed": _handed,
    "fused": _fused,
    "scaled": _scaled,
}
"""Ways to take a step; the first that works is taken."""
_NEEDS = {"handed": "set_closure", "fused": "fused_backward", "scaled": "backward"}
_IN_A_FIT = ("plain", "closure", "graph", "told")
"""Those that Lightning's automatic optimization may stand for: it steps with a closure that computes the gradients."""


def seed(number):
    """For everything that an optimizer may draw from."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 (what a package draws from is the global one)


def _loss(net, batch):
    return (net(batch) - 1).square().mean()


def loss_at(net, step):
    """The loss of a step, as a function; what it is of depends on the step's number alone."""
    seed(100 + step)
    first = net[0]
    if isinstance(first, nn.Embedding):
        batch = torch.randint(first.num_embeddings, (4,))
    else:
        batch = torch.randn(4, first.in_features, dtype=first.weight.dtype)
    return functools.partial(_loss, net, batch=batch)


@dataclass
class Recipe:
    """How to make an optimizer of a class, with a net for it, and how it takes a step."""

    cls: type
    net: str
    params: str
    inner: str
    inside: type
    settings: dict
    way: str

    def build(self, inside=None):
        """A net and its optimizer, the same each time; of a wrapper, one around an optimizer of class ``inside``."""
        seed(0)
        net = NETS[self.net]()
        given = _given(net, PARAMS[self.params](net), INNER[self.inner](net, inside or self.inside))
        optimizer = self.cls(**{name: given[name] for name in required(self.cls)}, **self.settings)
        if hasattr(optimizer, "train"):  # of the schedule-free ones
            optimizer.train()
        return net, optimizer

    def take(self, net, optimizer, step):
        """One step."""
        WAYS[self.way](optimizer, loss_at(net, step))


def _recipes(cls):
    arguments = arguments_of(cls)
    nets = ["wide", "matrices"] if "min_8bit_size" in arguments else ["plain", "matrices", "double", "sparse"]
    inner = list(itertools.product(INNER, INSIDE) if is_wrapper(cls) else [("instance", Adam)])
    always = {name: value for name, value in ALWAYS.items() if name in arguments}
    more = {name: value for name, value in SETTINGS.items() if name in arguments}
    settings = [always, *({**always, name: value} for name, value in more.items()), {**always, **more}]
    ways = [way for way in WAYS if way not in _NEEDS or hasattr(cls, _NEEDS[way])]
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is _NO_DEFAULT:
        ways = ["closure"]
    params = PARAMS if "params" in arguments else ["list"]
    for some, net, wrapped, own, way in itertools.product(params, nets, inner, settings, ways):
        yield Recipe(cls, net, some, *wrapped, own, way)


def wrapped_around(cls, inside):
    """A wrapper of class ``cls`` around an optimizer of class ``inside``."""
    for recipe in _recipes(cls):
        with suppress(Exception):  # the next may do
            return recipe.build(inside)[1]
    message = f"{cls} is not made in any way that is known here"
    raise TypeError(message)


@functools.cache
def recipe_of(cls):
    """The first that moves the weights to finite values, or what the last one that came furthest says."""
    furthest, reason, first = -1, "no argument that it takes is known here", None
    for recipe in _recipes(cls):
        came, first = 0, first or recipe.net  # what the other nets are for has reasons of its own
        try:
            net, optimizer = recipe.build()
            before = _copies(net)
            came = 1
            for step in range(STEPS):
                recipe.take(net, optimizer, step)
            came = 2
            _check_end(before, net)
        except Exception as error:  # noqa: BLE001 (whatever it says is what was to be found out)
            if came > furthest or (came == furthest and recipe.net == first):
                furthest, reason = came, _said(error)
        else:
            return recipe
    return reason


def _check_end(before, net):
    if equal(before, net.parameters()):
        message = f"no weight moves in {STEPS} steps"
        raise RuntimeError(message)
    if not all(parameter.isfinite().all() for parameter in net.parameters()):
        message = f"a weight is not finite after {STEPS} steps"
        raise RuntimeError(message)


# -- what came of it


@dataclass(frozen=True)
class Outcome:
    """What becomes of runs with a class.

    Attributes:
        status: One of the five.
        reason: Why, where it does not resume.
        pickled: Whether its own state has more in it than ``weights_only=True`` loads.
    """

    status: str
    reason: str = ""
    pickled: bool = False

    def __str__(self):
        more = f": {self.reason}" if self.reason else ""
        return f"{self.status}{more}"


class _FoundError(Exception):
    """Carries an outcome out of the trial."""

    def __init__(self, status, reason="", **more):
        super().__init__(status)
        self.outcome = Outcome(status, reason, **more)


def _said(error, *, where=False):
    line = " ".join(str(error).split()) or "no reason given"
    at = traceback.extract_tb(error.__traceback__)[-1]
    place = f" ({Path(at.filename).name}:{at.lineno})" if where else ""
    return f"{type(error).__name__}: {line}{place}"


@contextmanager
def _with_us():
    """What is raised in here is to be laid to Lookahead."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*[Ll]ookahead", UserWarning)
            yield
    except _FoundError:
        raise
    except Exception as error:
        ours = traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_OURS)
        if ours and isinstance(error, (TypeError, ValueError)):
            raise _FoundError(REFUSED, str(error)) from error
        raise _FoundError(FAILS, _said(error, where=True)) from error


def _check_refused(recipe):
    if contains_lookahead(recipe.cls):
        raise _FoundError(FAILS, "contains Lookahead and is not refused")


def _trial(function):
    """Make a function that raises `_FoundError` one that returns an outcome, quietly, once for each class."""

    @functools.cache
    @functools.wraps(function)
    def trial(cls):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums that are the same each time
        try:
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
                warnings.simplefilter("ignore")
                recipe = recipe_of(cls)
                if isinstance(recipe, str):
                    return Outcome(NOT_HERE, recipe)
                return Outcome(RESUMES, pickled=function(recipe, folder))
        except _FoundError as found:
            return found.outcome
        finally:
            torch.set_num_threads(threads)

    return trial


def _copies(net):
    return [parameter.detach().clone() for parameter in net.parameters()]


# -- in a plain loop


class Loop:
    """A plain loop, with `SlowWeights` if it is to look ahead."""

    def __init__(self, recipe, *, looks_ahead):
        self.recipe = recipe
        self.net, self.optimizer = recipe.build()
        self.slow = SlowWeights(self.optimizer, k=K, alpha=ALPHA) if looks_ahead else None

    def run(self, start=0, stop=STEPS, saves=()):
        """Take steps; return what was saved after some of them."""
        saved = {}
        for step in range(start, stop):
            self.recipe.take(self.net, self.optimizer, step)
            if step + 1 in saves:
                saved[step + 1] = self.save()
        return saved

    def save(self):
        """What a plain loop puts into a file."""
        file, own = io.BytesIO(), io.BytesIO()
        torch.save([self.net.state_dict(), self.optimizer.state_dict()], file)
        if self.slow is not None:
            torch.save(self.slow.state_dict(), own)
        return file, own

    def load(self, saved, *, weights_only):
        """Load what was saved into this new loop."""
        file, own = saved
        file.seek(0)
        own.seek(0)
        net, optimizer = torch.load(file, weights_only=weights_only)
        self.net.load_state_dict(net)
        self.optimizer.load_state_dict(optimizer)
        if self.slow is not None:
            self.slow.load_state_dict(torch.load(own, weights_only=True))

    def sets(self):
        """theta, and phi if there is one."""
        if self.slow is None:
            return [_copies(self.net)]
        kept = [self.slow.values(weights) for weights in ("fast", "slow")]
        return [[values[p].detach().clone() for p in self.net.parameters() if p in values] for values in kept]


def _resumed(recipe, saved, at, *, looks_ahead, weights_only):
    loop = Loop(recipe, looks_ahead=looks_ahead)
    loop.load(saved, weights_only=weights_only)
    loop.run(at)
    return loop.sets()


def _same(left, right):
    return all(equal(a, b) for a, b in zip(left, right, strict=True))


def _bare(recipe):
    """Whether only an unrestricted load resumes the class by itself; raises if it does not resume."""
    whole, again = Loop(recipe, looks_ahead=False), Loop(recipe, looks_ahead=False)
    saved = whole.run(saves=STOPS)
    again.run()
    if not _same(whole.sets(), again.sets()):
        raise _FoundError(NOT_HERE, "two runs from one seed differ")
    for weights_only in (True, False):
        try:
            ends = {
                at: _resumed(recipe, file, at, looks_ahead=False, weights_only=weights_only)
                for at, file in saved.items()
            }
        except Exception as error:
            if not weights_only:
                raise _FoundError(ALONE, _said(error)) from error
        else:
            break
    differ = [at for at, end in ends.items() if not _same(end, whole.sets())]
    if differ:
        raise _FoundError(ALONE, f"other weights after a stop at step {', '.join(map(str, differ))}")
    return not weights_only


@_trial
def in_a_loop(recipe, _):
    """What becomes of plain loops with the class."""
    with _with_us():
        whole = Loop(recipe, looks_ahead=True)
        _check_refused(recipe)
        saved = whole.run(saves=STOPS)
        if (whole.slow.steps, whole.slow.syncs) != (STEPS, STEPS // K):
            raise _FoundError(FAILS, f"counts {whole.slow.steps} steps and {whole.slow.syncs} syncs")
    net, optimizer = recipe.build()
    parameters = list(net.parameters())
    phi = lookahead(parameters, lambda step: recipe.take(net, optimizer, step), k=K, alpha=ALPHA, steps=STEPS)
    if not _same(whole.sets(), [parameters, phi]):
        raise _FoundError(FAILS, "not the weights of Algorithm 1")
    pickled = _bare(recipe)
    with _with_us():
        for at, file in saved.items():
            end = _resumed(recipe, file, at, looks_ahead=True, weights_only=not pickled)
            if not _same(end, whole.sets()):
                raise _FoundError(FAILS, f"other weights after a stop at step {at}")
    return pickled


# -- in a Trainer


class Fit(LightningModule):
    """Takes one step of a recipe in a batch, with Lightning's optimization or by hand."""

    def __init__(self, recipe, *, by_hand):
        super().__init__()
        self.recipe, self.automatic_optimization = recipe, not by_hand
        self.net, self.made = recipe.build()

    def configure_optimizers(self):
        return self.made

    def train_dataloader(self):
        return DataLoader(range(5))

    def training_step(self, batch, batch_idx):
        step = self.trainer.global_step
        if not self.automatic_optimization:
            return self.recipe.take(self.net, self.optimizers(), step)
        return loss_at(self.net, step)()

    def backward(self, loss):
        loss.backward(create_graph=self.recipe.way == "graph")

    def weights(self):
        return _copies(self.net)


class Saves(Callback):
    """Saves after some of the steps."""

    def __init__(self, folder, name, stops=STOPS):
        self.paths = {at: os.path.join(folder, f"{name}-{at}.ckpt") for at in stops}  # noqa: PTH118

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in self.paths:
            trainer.save_checkpoint(self.paths[trainer.global_step])


def fit(recipe, *callbacks, by_hand=False, path=None, steps=STEPS, **settings):
    """Train, from a file if there is one; return the module and the Trainer."""
    module = Fit(recipe, by_hand=by_hand)
    # Epochs end what takes no step that Lightning counts.
    trainer = make_trainer(*callbacks, max_steps=steps, max_epochs=STEPS)
    trainer.fit(module, ckpt_path=path, **settings)
    if trainer.global_step != steps:
        message = f"the Trainer counts {trainer.global_step} steps of {steps}"
        raise RuntimeError(message)
    return module, trainer


def _ends(callback, module):
    return [module.weights()] if callback is None else list(both(callback, module))


def _try_fit(recipe, folder):
    """Optimize by hand only if Lightning cannot; return which, the end and the files."""
    for by_hand in (False, True) if recipe.way in _IN_A_FIT else (True,):
        saves = Saves(folder, f"bare-{by_hand}")
        try:
            module, _ = fit(recipe, saves, by_hand=by_hand)
            _check_end(_copies(recipe.build()[0]), module.net)
        except Exception as error:  # noqa: BLE001 (the next way may do)
            reason = _said(error)
        else:
            return by_hand, module, saves.paths
    try:
        with _with_us():
            fit(recipe, LookaheadCallback(k=K, alpha=ALPHA), by_hand=by_hand)
    except _FoundError as found:
        if found.outcome.status == REFUSED:
            raise
    raise _FoundError(NOT_HERE, reason)


def _bare_fit(recipe, folder):
    """Whether it is optimized by hand and its files need an unrestricted load; raises if it does not resume."""
    by_hand, whole, paths = _try_fit(recipe, folder)
    for weights_only in (True, False):
        try:
            ends = {
                at: fit(recipe, by_hand=by_hand, path=path, weights_only=weights_only)[0].weights()
                for at, path in paths.items()
            }
        except Exception as error:
            if not weights_only:
                raise _FoundError(ALONE, _said(error)) from error
        else:
            break
    differ = [at for at, end in ends.items() if not equal(end, whole.weights())]
    if differ:
        raise _FoundError(ALONE, f"other weights after a stop at step {', '.join(map(str, differ))}")
    return by_hand, not weights_only


@_trial
def in_a_trainer(recipe, folder):
    """What becomes of fits with the class."""
    by_hand, _, _ = _try_fit(recipe, folder)
    callback, saves = LookaheadCallback(k=K, alpha=ALPHA), Saves(folder, "whole")
    with _with_us():
        whole, _ = fit(recipe, callback, saves, by_hand=by_hand)
        _check_refused(recipe)
        (slow,) = callback.slow_weights
        if (slow.steps, slow.syncs) != (STEPS, STEPS // K):
            raise _FoundError(FAILS, f"counts {slow.steps} steps and {slow.syncs} syncs")
    by_hand, pickled = _bare_fit(recipe, folder)
    with _with_us():
        for at, path in saves.paths.items():
            again = LookaheadCallback(k=K, alpha=ALPHA)
            module, _ = fit(recipe, again, by_hand=by_hand, path=path, weights_only=not pickled)
            if not _same(both(again, module), both(callback, whole)):
                raise _FoundError(FAILS, f"other weights after a stop at step {at}")
    return pickled


@_trial
def saved_states(recipe, folder):
    """Whether a checkpoint has the optimizer's state as it is without Lookahead: bit for bit where the weights are."""
    by_hand, _, paths = _try_fit(recipe, folder)
    with _with_us():
        for name, k, alpha, compare in (("each", 1, 1.0, identical), ("cycles", K, ALPHA, alike)):
            saves = Saves(folder, name)
            fit(recipe, LookaheadCallback(k=k, alpha=alpha), saves, by_hand=by_hand)
            for at, path in paths.items():
                states = [torch.load(file, weights_only=False)["optimizer_states"] for file in (path, saves.paths[at])]
                if not compare(*states):
                    raise _FoundError(FAILS, f"another state of the optimizer at step {at}, k={k}, alpha={alpha}")
    return False


def identical(left, right):
    """Whether two states are the same, key for key, type for type and bit for bit."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(map(identical, left.values(), right.values()))
    if isinstance(left, (list, tuple, deque)):
        return len(left) == len(right) and all(map(identical, left, right))
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.equal(right)
    if hasattr(left, "__dict__"):  # an object of a package's own
        return identical(vars(left), vars(right))
    return left == right


def alike(left, right):
    """Whether two states have the same keys: there are as many values in a list as its steps have left there."""
    if isinstance(left, dict):
        return list(left) == list(right) and all(map(alike, left.values(), right.values()))
    return not isinstance(right, dict)
