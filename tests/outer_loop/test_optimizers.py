"""Every optimizer class of torch and of other packages resumes with Lookahead wherever it resumes by itself.

The tests of all of them are marked slow; what they find is published in examples/optimizers/OPTIMIZERS.md.
"""

import re
import runpy
import warnings

import pytest
import torch

from lightning_lookahead import LookaheadCallback, SlowWeights
from tests.helpers import optimizer_zoo as zoo
from tests.helpers.places import EXAMPLES
from tests.helpers.runs import equal

OPTIMIZERS = EXAMPLES / "optimizers"
TORCH = zoo.optimizers_of("torch.optim")
WHOLE_MATRIX = pytest.mark.timeout(3000)  # for a whole package

pytestmark = pytest.mark.filterwarnings("ignore:.*(create_graph=True|Please add the following callbacks)")


def found_in(package):
    """The classes of a package; skips the test where it is not installed."""
    classes = zoo.optimizers_of(package)
    if not classes:
        pytest.skip(f"{package} is not installed")
    return classes


def failures(package, trial):
    """What fails with Lookahead, by name."""
    outcomes = {name: trial(cls) for name, cls in found_in(package).items()}
    assert not any("\n" in outcome.reason for outcome in outcomes.values() if outcome.status == zoo.REFUSED)
    return {name: outcome.reason for name, outcome in outcomes.items() if outcome.status == zoo.FAILS}


def recipe_of(package, name):
    recipe = zoo.recipe_of(found_in(package)[name])
    assert isinstance(recipe, zoo.Recipe), recipe
    return recipe


# -- all of torch's, and one of each kind of the others


@pytest.mark.parametrize("name", TORCH)
def test_a_plain_loop_with_an_optimizer_of_torch_is_resumed_at_every_offset(name):
    assert zoo.in_a_loop(TORCH[name]) == zoo.Outcome(zoo.RESUMES)


KINDS = [
    ("torch.optim", "SparseAdam"),  # sparse gradients
    ("pytorch_optimizer", "SPAM"),  # counts in its state that belong to no parameter
    ("pytorch_optimizer", "Muon"),  # groups of its own kind
    ("pytorch_optimizer", "SAM"),  # moves the weights there and back within a step
    ("pytorch_optimizer", "OrthoGrad"),  # a wrapper that never calls Optimizer.__init__
    ("schedulefree", "AdamWScheduleFree"),  # another average of the weights in its state
]


@pytest.mark.parametrize(("package", "name"), KINDS)
def test_a_fit_with_one_of_each_kind_is_resumed_at_every_offset(package, name):
    assert zoo.in_a_trainer(found_in(package)[name]) == zoo.Outcome(zoo.RESUMES)


class KeepsAnything(torch.optim.SGD):
    """Has a state of counts, words, lists and tensors in dicts, of parameters and of none."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        self.state["calls"] = self.state.get("calls", 0) + 1
        for parameter in self.param_groups[0]["params"]:
            own = self.state[parameter]
            own["history"] = [*own.get("history", []), float(parameter.sum())][-2:]
            own["nested"] = {"mean": parameter.mean(), "name": "mean", "nothing": None}
            parameter.sub_(own["nested"]["mean"] * 0.01 * self.state["calls"] + own["history"][0] * 0.001)
        return loss


class Clears(torch.optim.SGD):
    """Clears the gradients at the end of its step."""

    def step(self, closure=None):
        loss = super().step(closure)
        self.zero_grad()
        return loss


@pytest.mark.parametrize("trial", [zoo.in_a_loop, zoo.in_a_trainer, zoo.saved_states])
@pytest.mark.parametrize("cls", [KeepsAnything, Clears])
def test_an_optimizer_may_keep_anything_and_may_clear_the_gradients(cls, trial):
    assert trial(cls) == zoo.Outcome(zoo.RESUMES)


def test_a_step_with_a_closure_after_which_the_gradients_are_cleared_is_counted():
    net, _ = zoo.recipe_of(Clears).build()
    optimizer = Clears(net.parameters(), lr=0.01)
    slow = SlowWeights(optimizer, k=zoo.K)
    for step in range(zoo.STEPS):
        loss = zoo.loss_at(net, step)

        def closure(loss=loss):
            value = loss()
            value.backward()
            return value

        optimizer.step(closure)
    assert (slow.steps, slow.syncs) == (zoo.STEPS, zoo.STEPS // zoo.K)


# -- what is refused


def lookaheads():
    """Every class that has Lookahead in its source; of bitsandbytes, which takes seconds to import, none has."""
    packages = [package for package in zoo.PACKAGES if package != "bitsandbytes.optim"]
    classes = [(package, name, cls) for package in packages for name, cls in zoo.optimizers_of(package).items()]
    return [pytest.param(cls, id=f"{package}.{name}") for package, name, cls in classes if zoo.contains_lookahead(cls)]


@pytest.mark.parametrize("cls", lookaheads())
def test_an_optimizer_that_contains_lookahead_is_refused_before_training_with_the_way_out(cls):
    recipe = zoo.recipe_of(cls)
    assert isinstance(recipe, zoo.Recipe), recipe
    net, optimizer = recipe.build()
    refusal = pytest.raises((TypeError, ValueError), match=rf"{cls.__name__}\b.*(Give|Take) ")
    with refusal:
        SlowWeights(optimizer)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    module = zoo.Fit(recipe, by_hand=False)
    with refusal:
        zoo.make_trainer(LookaheadCallback(), max_steps=1).fit(module)
    assert equal(module.weights(), before)


def wrappers():
    """Every class that is made from another optimizer."""
    packages = ("pytorch_optimizer", "schedulefree", "torch_optimizer")
    classes = [(package, name, cls) for package in packages for name, cls in zoo.optimizers_of(package).items()]
    return [pytest.param(cls, id=f"{package}.{name}") for package, name, cls in classes if zoo.is_wrapper(cls)]


@pytest.mark.parametrize("cls", wrappers())
def test_a_wrapper_around_an_optimizer_that_contains_lookahead_is_refused(cls):
    optimizer = zoo.wrapped_around(cls, found_in("pytorch_optimizer")["Ranger"])
    with pytest.raises((TypeError, ValueError), match=r"Give|Take|must be a torch"):
        SlowWeights(optimizer)


@pytest.mark.filterwarnings("ignore:.*NaN or infinite")
@pytest.mark.parametrize("mode", [{"pullback_momentum": "reset"}, {"nonfinite": "restore"}])
@pytest.mark.parametrize("cls", wrappers())
def test_a_state_that_begins_anew_does_so_within_a_wrapper_or_is_refused(cls, mode):
    recipe = zoo.recipe_of(cls)
    assert isinstance(recipe, zoo.Recipe), recipe
    net, optimizer = recipe.build()
    slow, said = None, ""
    try:
        slow = SlowWeights(optimizer, k=3, **mode)
    except (TypeError, ValueError) as error:
        said = str(error)
    if slow is None:
        assert re.search(r"Give|give the optimizer inside", said)
        return
    for step in range(2):
        recipe.take(net, optimizer, step)
    inside = [
        optimizer.state,
        *(own.state for own in vars(optimizer).values() if isinstance(own, torch.optim.Optimizer)),
    ]
    kept = [state for state in inside if any(parameter in state for parameter in net.parameters())]
    assert kept
    if "nonfinite" in mode:
        with torch.no_grad():
            next(net.parameters()).fill_(float("nan"))
    slow.sync()
    assert not any(state.get(parameter) for state in inside for parameter in net.parameters())


class Unlike(torch.optim.Optimizer):
    """Calls its momentum something of its own, and cannot be made from what its groups have."""

    def __init__(self, params, lr, *, secret):
        super().__init__(params, {"lr": lr})
        self.secret = secret

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            own = self.state[parameter].setdefault("state1", torch.zeros_like(parameter))
            parameter.sub_(own.mul_(0.9).add_(parameter.grad), alpha=self.param_groups[0]["lr"])


def test_momentum_of_a_name_that_is_not_known_is_not_pulled_back_in_silence():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = Unlike([weight], 0.1, secret=1)
    SlowWeights(optimizer, k=2, pullback_momentum="pullback")
    told = []
    for _ in range(4):
        weight.grad = torch.ones(2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        told.append([str(warning.message) for warning in caught])
    assert [len(messages) for messages in told] == [0, 1, 0, 0]
    assert "pullback_momentum='pullback' does nothing: of a parameter Unlike keeps state1" in told[1][0]


def test_what_moves_the_weights_within_the_backward_is_counted_or_refused():
    fused = [cls for cls in found_in("pytorch_optimizer").values() if hasattr(cls, "fused_backward")]
    assert fused
    for cls in fused:
        assert zoo.in_a_loop(cls).status in {zoo.RESUMES, zoo.REFUSED}


# -- what a checkpoint says of the optimizer


@pytest.mark.parametrize(("package", "name"), [("torch.optim", "Adam"), *KINDS[1:3]])
def test_the_optimizers_state_in_a_checkpoint_is_what_it_is_without_us(package, name):
    assert zoo.saved_states(found_in(package)[name]) == zoo.Outcome(zoo.RESUMES)


def keys_in(state):
    """Every key of nested dicts and lists."""
    if isinstance(state, dict):
        return {*map(str, state), *(key for value in state.values() for key in keys_in(value))}
    return {key for value in state for key in keys_in(value)} if isinstance(state, (list, tuple)) else set()


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCH)
def test_a_file_saved_in_mid_cycle_trains_on_without_the_callback_and_without_a_trace_of_it(name):
    recipe = recipe_of("torch.optim", name)
    ours, never = zoo.Saves(".", "ours", stops=(5,)), zoo.Saves(".", "never", stops=(zoo.STEPS,))
    zoo.fit(recipe, LookaheadCallback(k=zoo.K), ours)
    zoo.fit(recipe, never)
    later = zoo.Saves(".", "later", stops=(zoo.STEPS,))
    module, trainer = zoo.fit(recipe, later, path=ours.paths[5])
    assert not equal(module.weights(), torch.load(ours.paths[5], weights_only=True)["state_dict"].values())
    assert trainer.global_step == zoo.STEPS
    states, expected = (
        torch.load(saves.paths[zoo.STEPS], weights_only=True)["optimizer_states"] for saves in (later, never)
    )
    assert zoo.alike(states, expected)
    assert not any("lookahead" in key.lower() for key in keys_in(states))


# -- all there are


@pytest.mark.slow
@WHOLE_MATRIX
@pytest.mark.parametrize("package", zoo.PACKAGES)
def test_a_plain_loop_resumes_with_every_class_that_resumes_by_itself(package):
    assert failures(package, zoo.in_a_loop) == {}


@pytest.mark.slow
@WHOLE_MATRIX
@pytest.mark.parametrize("package", zoo.PACKAGES)
def test_a_fit_resumes_with_every_class_that_resumes_by_itself(package):
    assert failures(package, zoo.in_a_trainer) == {}


@pytest.mark.slow
@WHOLE_MATRIX
@pytest.mark.parametrize("package", zoo.PACKAGES)
def test_a_checkpoint_has_the_state_of_every_class_as_it_is_without_us(package):
    assert failures(package, zoo.saved_states) == {}


def without_reasons(table):
    """What a reason says may be said in other words."""
    return re.sub(rf"({zoo.ALONE}|{zoo.REFUSED}|{zoo.NOT_HERE}): [^|]*", r"\1 ", table)


@pytest.mark.slow
@WHOLE_MATRIX
def test_the_published_table_is_what_was_found():
    for package in zoo.PACKAGES:
        found_in(package)
    table = runpy.run_path(str(OPTIMIZERS / "table.py"))["table"]
    assert without_reasons(table()) == without_reasons((OPTIMIZERS / "OPTIMIZERS.md").read_text())
