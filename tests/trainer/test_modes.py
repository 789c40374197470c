"""Late starts, ends, groups, several optimizers, bad values, precision: each changes what it says and nothing else."""

import copy
import math
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_lookahead import Linear, LookaheadCallback, SlowWeights, load_weights
from tests.evaluation.test_monitor import logged_by
from tests.helpers.classifier import Classifier, images
from tests.helpers.oracle import lookahead
from tests.helpers.runs import Regression, both, equal, make_trainer, reference
from tests.outer_loop.test_slow_weights import Problem, slow_values

# -- where Lookahead begins and ends


def fit(callback, module=None, **settings):
    module = module or Regression(batches=12)
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = make_trainer(callback, **{"max_steps": 8, "max_epochs": 9, **settings})
    trainer.fit(module, ckpt_path=ckpt_path)
    return module, trainer


def started_late(steps, start, k=3):
    """theta and phi of plain steps up to ``start`` and Algorithm 1 from there on."""
    module = Regression()
    optimizer = module.configure_optimizers()

    def inner_step(index):
        optimizer.zero_grad()
        module.loss(index).backward()
        optimizer.step()

    for index in range(min(start, steps)):
        inner_step(index)
    phi = lookahead(
        list(module.net.parameters()), lambda i: inner_step(start + i), k=k, alpha=0.5, steps=max(steps - start, 0)
    )
    return module.weights(), phi


@pytest.mark.parametrize("start", [0, 1, 4, 6])
def test_the_first_cycle_begins_at_start_step_from_the_weights_of_that_moment(start):
    callback = LookaheadCallback(k=3, start_step=start)
    module, trainer = fit(callback)
    theta, phi = started_late(8, start)
    assert equal(both(callback, module)[0], theta)
    assert equal(both(callback, module)[1], phi)
    assert callback.slow_weights[0].syncs == (8 - start) // 3
    assert callback.slow_weights[0].steps == 8
    trainer.save_checkpoint("end.ckpt")


def test_before_it_there_is_one_set_of_weights_which_validation_sees():
    seen = []

    class Watching(Regression):
        def on_validation_start(self):
            seen.append(self.weights())

    callback = LookaheadCallback(k=3, start_step=20)
    module, _ = fit(callback, Watching(batches=12), val_check_interval=2, limit_val_batches=1)
    for index, steps in enumerate((2, 4, 6, 8)):
        assert equal(seen[index], started_late(steps, 20)[0])
    assert equal(*both(callback, module))


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_late_start_is_resumed(stop):
    def run(steps, ckpt_path=None):
        callback, module = LookaheadCallback(k=3, start_step=4), Regression("Adam", batches=5)
        trainer = make_trainer(callback, max_steps=steps, max_epochs=9)
        trainer.fit(module, ckpt_path=ckpt_path)
        return trainer, both(callback, module)

    run(stop)[0].save_checkpoint("stop.ckpt")
    whole, resumed = run(9)[1], run(9, "stop.ckpt")[1]
    assert equal(whole[0], resumed[0])
    assert equal(whole[1], resumed[1])


def test_a_sync_by_hand_begins_a_new_cycle():
    problem, other = Problem(), Problem()
    slow = SlowWeights(problem.optimizer, k=3)
    for index in range(2):
        problem.step(index)
    slow.sync()
    for index in range(2, 5):
        problem.step(index)
    phi = lookahead(other.parameters, other.step, k=2, alpha=0.5, steps=2)
    phi = lookahead(other.parameters, lambda index: other.step(2 + index), k=3, alpha=0.5, steps=3)
    assert equal(problem.parameters, other.parameters)
    assert equal(slow_values(slow), phi)
    assert slow.syncs == 2


def test_sync_now_syncs_all_and_only_within_a_fit():
    class Asking(Regression):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 3:
                callback.sync_now()

    callback = LookaheadCallback(k=3)
    with pytest.raises(RuntimeError, match=r"sync_now\(\) was called outside of a fit"):
        callback.sync_now()
    fit(callback, Asking(batches=12))
    assert callback.slow_weights[0].syncs == 3  # after steps 3, 4 and 7
    with pytest.raises(RuntimeError, match="outside of a fit"):
        callback.sync_now()


@pytest.mark.parametrize("steps", [6, 8])
def test_an_unfinished_cycle_is_dropped_or_synced(steps):
    dropping, syncing = LookaheadCallback(k=3), LookaheadCallback(k=3, unfinished_cycle="sync")
    theta, phi = reference(steps)
    dropped = fit(dropping, max_steps=steps)[0].weights()
    synced = fit(syncing, max_steps=steps)[0].weights()
    assert equal(dropped, phi)
    assert equal(synced, [slow.lerp(fast, 0.5) for slow, fast in zip(phi, theta, strict=True)])
    assert equal(dropped, synced) == (steps == 6)
    assert equal(*both(syncing, fit(syncing, max_steps=steps)[0]))


# -- groups and names


class Grouped(Regression):
    def configure_optimizers(self):
        first, second = self.net[0].parameters(), self.net[2].parameters()
        return torch.optim.SGD(
            [{"params": first}, {"params": second, "lookahead_k": 2, "lookahead_alpha": 0.8}], lr=0.05, momentum=0.9
        )


def grouped(steps):
    """The same written out: the first layer with k 3 and alpha .5, the second with k 2 and alpha .8."""
    module = Grouped()
    optimizer = module.configure_optimizers()
    layers = [(list(module.net[0].parameters()), 3, 0.5), (list(module.net[2].parameters()), 2, 0.8)]
    phis = [[p.detach().clone() for p in parameters] for parameters, _, _ in layers]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        module.loss(step - 1).backward()
        optimizer.step()
        for (parameters, k, alpha), phi in zip(layers, phis, strict=True):
            if step % k == 0:
                with torch.no_grad():
                    for slow, fast in zip(phi, parameters, strict=True):
                        fast.copy_(slow.lerp_(fast, alpha))
    return module.weights(), [*phis[0], *phis[1]]


@pytest.mark.parametrize("steps", [5, 7, 9])
def test_a_group_may_have_a_k_and_an_alpha_of_its_own(steps):
    callback = LookaheadCallback(k=3)
    module, _ = fit(callback, Grouped(batches=12), max_steps=steps)
    theta, phi = grouped(steps)
    assert equal(both(callback, module)[0], theta)
    assert equal(both(callback, module)[1], phi)


def test_groups_of_their_own_are_resumed_at_every_offset():
    def run(steps, ckpt_path=None):
        callback, module = LookaheadCallback(k=3), Grouped(batches=12)
        trainer = make_trainer(callback, max_steps=steps, max_epochs=9)
        trainer.fit(module, ckpt_path=ckpt_path)
        return trainer, both(callback, module)

    whole = run(11)[1]
    for stop in range(1, 8):
        run(stop)[0].save_checkpoint("stop.ckpt")
        resumed = run(11, "stop.ckpt")[1]
        assert equal(whole[0], resumed[0]), stop
        assert equal(whole[1], resumed[1]), stop
    torch.load("stop.ckpt", weights_only=True)


def test_a_group_with_a_bad_value_is_refused():
    for wrong in ({"lookahead_k": 0}, {"lookahead_alpha": 2.0}):
        ((name, value),) = wrong.items()
        optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], **wrong}], lr=0.1)
        with pytest.raises(ValueError, match=f"{name}={value} is out of range"):
            SlowWeights(optimizer)


@pytest.mark.parametrize("pattern", ["net.2.*", ["net.2.weight", "*.2.bias"]])
def test_parameters_can_be_excluded_by_name(pattern):
    callback = LookaheadCallback(k=3, exclude=pattern)
    module, trainer = fit(callback)
    other = Regression()
    optimizer = other.configure_optimizers()

    def inner_step(index):
        optimizer.zero_grad()
        other.loss(index).backward()
        optimizer.step()

    phi = lookahead(list(other.net[0].parameters()), inner_step, k=3, alpha=0.5, steps=8)
    theta, ours = both(callback, module)
    assert equal(theta, other.weights())
    assert equal(ours, [*phi, *other.weights()[2:]])
    trainer.save_checkpoint("end.ckpt")
    slow, fast = load_weights("end.ckpt", "slow"), load_weights("end.ckpt", "fast")
    assert torch.equal(slow["net.2.weight"], fast["net.2.weight"])
    assert not torch.equal(slow["net.0.weight"], fast["net.0.weight"])


def test_a_pattern_that_matches_nothing_is_refused_with_the_names():
    with pytest.raises(ValueError, match=r"exclude='head.*' matches no parameter: names are net.0.weight"):
        fit(LookaheadCallback(exclude="head.*"))


# -- several optimizers


def game(steps, together, gamma=0.1):
    """min over x, max over y of x * y by simultaneous descent; returns the distances from the equilibrium."""
    x, y = nn.Parameter(torch.tensor(1.0, dtype=torch.float64)), nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    class Game(Regression):
        def __init__(self):
            super().__init__()
            self.x, self.y, self.automatic_optimization, self.distances = x, y, False, []

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            gradients = self.y.detach().clone(), -self.x.detach().clone()
            for parameter, gradient, optimizer in ((self.x, gradients[0], first), (self.y, gradients[1], second)):
                parameter.grad = gradient
                optimizer.step()
            self.distances.append(math.hypot(self.x.item(), self.y.item()))

        def configure_optimizers(self):
            return [torch.optim.SGD([parameter], lr=gamma) for parameter in (self.x, self.y)]

    module = Game()
    callback = LookaheadCallback(k=20, alpha=0.5, sync_optimizers="together" if together else "independently")
    module.batches = steps
    make_trainer(*([callback] if together is not None else []), max_epochs=1).fit(module)
    return module.distances


def test_in_a_bilinear_game_descent_diverges_and_lookahead_over_both_players_contracts():
    plain, joint = game(200, None), game(200, together=True)
    assert plain[-1] / plain[0] == pytest.approx(math.sqrt(1.01) ** 199)  # a factor of 1.005 a step
    predicted = abs(0.5 + 0.5 * complex(1, 0.1) ** 20) ** (1 / 20)
    assert predicted == pytest.approx(0.973, abs=1e-3)
    assert (joint[199] / joint[99]) ** (1 / 100) == pytest.approx(predicted, rel=1e-6)


class Uneven(Regression):
    """The second optimizer steps twice as often as the first."""

    def __init__(self):
        super().__init__(batches=8)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in (first, second, second):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[layer].parameters(), lr=0.05) for layer in (0, 2)]


def test_together_all_wait_for_the_slowest():
    callback = LookaheadCallback(k=3, sync_optimizers="together")
    fit(callback, Uneven(), max_steps=-1, max_epochs=1)
    assert [slow.syncs for slow in callback.slow_weights] == [2, 2]
    assert [slow.steps for slow in callback.slow_weights] == [8, 16]
    alone = LookaheadCallback(k=3)
    fit(alone, Uneven(), max_steps=-1, max_epochs=1)
    assert [slow.syncs for slow in alone.slow_weights] == [2, 5]


# -- values that are not finite


class Exploding(Regression):
    """One weight becomes no number, or infinite, in the second step of the second cycle."""

    value = float("nan")

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == 5:
            with torch.no_grad():
                self.net[2].weight[0, 1] = self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_raises_with_its_name_and_phi_is_kept(value):
    callback, module = LookaheadCallback(k=3), Exploding(batches=12)
    module.value = value
    with pytest.raises(RuntimeError, match=r"'net.\d.weight' has a value that is not finite.*nonfinite='skip'"):
        fit(callback, module)
    with callback.use_weights("slow"):
        assert equal(module.weights(), reference(3)[1])


def test_restore_puts_the_weights_of_the_last_sync_back_and_training_goes_on():
    callback = LookaheadCallback(k=3, nonfinite="restore")
    with pytest.warns(UserWarning, match="Lookahead: Parameter 'net.0.weight' .* nonfinite='restore', no sync"):
        module, _ = fit(callback, Exploding(batches=12), max_steps=6)
    assert equal(both(callback, module)[0], reference(3)[1])
    assert equal(both(callback, module)[1], reference(3)[1])
    assert callback.slow_weights[0].syncs == 1
    assert callback.slow_weights[0].steps_since_sync == 0
    with pytest.warns(UserWarning, match="no sync"):
        module, _ = fit(callback, Exploding(batches=12), max_steps=11)
    other = Regression()
    with torch.no_grad():
        for parameter, value in zip(other.net.parameters(), reference(3)[1], strict=True):
            parameter.copy_(value)
    optimizer = other.configure_optimizers()  # a new one, without what made the weights infinite

    def inner_step(index):
        optimizer.zero_grad()
        other.loss(6 + index).backward()
        optimizer.step()

    phi = lookahead(list(other.net.parameters()), inner_step, k=3, alpha=0.5, steps=5)
    assert equal(both(callback, module)[0], other.weights())
    assert equal(both(callback, module)[1], phi)


def test_skip_leaves_both_sets_alone_and_waits_for_the_next_cycle():
    callback = LookaheadCallback(k=3, nonfinite="skip")
    with pytest.warns(UserWarning, match="nonfinite='skip'"):
        module, _ = fit(callback, Exploding(batches=12), max_steps=8)
    theta, phi = both(callback, module)
    assert equal(phi, reference(3)[1])
    assert not all(value.isfinite().all() for value in theta)
    assert callback.slow_weights[0].syncs == 1
    assert callback.slow_weights[0].steps_since_sync == 2


def test_a_plain_loop_names_the_place_of_the_parameter():
    problem = Problem()
    SlowWeights(problem.optimizer, k=1)
    with torch.no_grad():
        problem.parameters[1][0] = float("inf")
    with pytest.raises(RuntimeError, match=r"Parameter \d of the optimizer, of shape"):
        problem.step(0)


# -- precision


def creeping(dtype=torch.bfloat16, steps=40, **settings):
    """A weight at 1 whose phi goes up by a tenth of an ulp of bfloat16, or so, in every cycle of one step."""
    weight = nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    slow = SlowWeights(optimizer, k=1, alpha=0.1, **settings)
    for _ in range(steps):
        weight.grad = torch.full_like(weight, -0.01)
        optimizer.step()
    return weight, slow


def test_slow_weights_keep_progress_that_is_smaller_than_an_ulp_of_the_parameter():
    weight, slow = creeping()
    (phi,) = slow.values("slow").values()
    assert phi.dtype == torch.float32
    assert torch.equal(weight, phi.bfloat16())
    exact, rise = torch.ones(4), torch.full((4,), 0.01).bfloat16()
    for _ in range(40):  # theta steps from the rounded phi, as bfloat16 rounds
        exact.lerp_((exact.bfloat16() + rise).float(), 0.1)
    assert torch.equal(phi, exact)
    assert phi[0] > 1.01
    rounded, _ = creeping(slow_dtype="bfloat16")
    assert (rounded == 1).all()  # lost, each time


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_swap_never_rounds_phi(dtype):
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    slow = SlowWeights(optimizer, k=3, alpha=0.3, slow_dtype=dtype)
    for _ in range(4):  # one step into the second cycle, so that theta is not phi rounded
        weight.grad = torch.full_like(weight, 0.07)
        optimizer.step()
    (phi,), theta = [value.clone() for value in slow.values("slow").values()], weight.detach().clone()
    assert not torch.equal(phi.bfloat16().to(phi), phi)
    assert not torch.equal(phi.bfloat16(), theta)
    for _ in range(3):
        with slow.use("slow"):
            assert torch.equal(weight, phi.bfloat16())
            (inside,) = slow.values("slow").values()
            assert torch.equal(inside, phi)
            (fast,) = slow.values("fast").values()
            assert torch.equal(fast, theta)
        (after,) = slow.values("slow").values()
        assert torch.equal(after, phi)
        assert torch.equal(weight, theta)


class Half(Regression):
    def __init__(self, **settings):
        super().__init__(batches=12, **settings)
        self.net.to(torch.bfloat16)

    def loss(self, step):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step)).bfloat16()
        return (self.net(x) - 1).square().mean()


@pytest.mark.parametrize("eval_weights", ["slow", "fast"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_slow_weights_of_more_precision_survive_a_stop_at_every_offset(optimizer, eval_weights):
    def run(steps, ckpt_path=None):
        callback, module = LookaheadCallback(k=3, eval_weights=eval_weights), Half(optimizer=optimizer)
        trainer = make_trainer(callback, max_steps=steps, max_epochs=9)
        trainer.fit(module, ckpt_path=ckpt_path)
        (slow,) = callback.slow_weights
        return trainer, list(slow.values("fast").values()), list(slow.values("slow").values())

    _, theta, phi = run(10)
    assert all(value.dtype == torch.float32 for value in phi)
    assert not equal(phi, [value.bfloat16().float() for value in phi])
    for stop in range(1, 8):
        trainer, _, _ = run(stop)
        trainer.save_checkpoint("stop.ckpt")
        saved = torch.load("stop.ckpt", weights_only=True)["state_dict"]
        assert all(value.dtype == torch.bfloat16 for value in saved.values())
        _, resumed_theta, resumed_phi = run(10, "stop.ckpt")
        assert equal(resumed_theta, theta), stop
        assert equal(resumed_phi, phi), stop


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_keeps_the_precision(duplicate):
    weight, slow = creeping()
    optimizer, other = duplicate((slow.optimizer, slow))
    assert equal(other.values("slow").values(), slow.values("slow").values())
    (twin,) = optimizer.param_groups[0]["params"]
    for parameter, inner in ((weight, slow.optimizer), (twin, optimizer)):
        parameter.grad = torch.full_like(parameter, -0.01)
        inner.step()
    assert equal(other.values("slow").values(), slow.values("slow").values())


def test_names_of_types_and_devices_that_are_none_are_refused():
    for make in (lambda **wrong: SlowWeights(Problem().optimizer, **wrong), LookaheadCallback):
        with pytest.raises(ValueError, match="slow_dtype='float33' is unknown"):
            make(slow_dtype="float33")
        with pytest.raises(ValueError, match="slow_dtype='int64' is unknown"):
            make(slow_dtype="int64")
        with pytest.raises(ValueError, match="slow_device='moon' is unknown"):
            make(slow_device="moon")


# -- the callback's own


def test_a_changing_alpha_is_logged_and_another_is_not():
    logger = CSVLogger(".", name="log")
    fit(LookaheadCallback(k=2, alpha=Linear(0.5, 1.0, 2), log_syncs=True), logger=logger, log_every_n_steps=1)
    logged = [float(row["lookahead/alpha"]) for row in logged_by(logger) if row.get("lookahead/alpha")]
    assert logged[0] == 0.5
    assert logged[-1] == 1.0
    logger = CSVLogger(".", name="log")
    fit(LookaheadCallback(k=2, log_syncs=True), logger=logger, log_every_n_steps=1)
    assert not any("lookahead/alpha" in row for row in logged_by(logger))


@pytest.mark.parametrize("argument", ["pullback_momentum", "unfinished_cycle", "sync_optimizers", "nonfinite"])
def test_unknown_choices_are_refused(argument):
    with pytest.raises(ValueError, match=f"{argument}='what' is unknown: give '"):
        LookaheadCallback(**{argument: "what"})


def test_a_start_that_is_no_number_of_steps_is_refused():
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match=f"start_step={wrong} is out of range"):
            LookaheadCallback(start_step=wrong)


# -- BatchNorm's statistics


class Normed(Classifier):
    """Data that depend on the step's number alone."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.net[3].p = 0.0

    def train_dataloader(self):
        return DataLoader(images(self.batches * 8, 2), batch_size=8)

    def training_step(self, batch, batch_idx):
        return super().training_step(images(8, self.trainer.global_step)[:], batch_idx)

    def statistics(self):
        return [self.net[1].running_mean.clone(), self.net[1].running_var.clone()]


def normed(steps):
    """theta and phi of weights and statistics, written out."""
    model = Normed()
    optimizer = model.configure_optimizers()
    moved = [*model.parameters(), model.net[1].running_mean, model.net[1].running_var]

    def inner_step(index):
        optimizer.zero_grad()
        x, y = images(8, index)[:]
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    phi = lookahead(moved, inner_step, k=3, alpha=0.5, steps=steps)
    return [tensor.detach().clone() for tensor in moved], phi


def both_with_statistics(callback, model):
    shown = []
    for weights in ("fast", "slow"):
        with callback.use_weights(weights):
            shown.append([*model.weights(), *model.statistics()])
    return shown


@pytest.mark.parametrize("steps", [3, 5, 7])
def test_statistics_can_move_as_weights_do(steps):
    callback = LookaheadCallback(k=3, buffers="sync")
    model, trainer = fit(callback, Normed(), max_steps=steps, limit_val_batches=1, val_check_interval=2)
    for ours, expected in zip(both_with_statistics(callback, model), normed(steps), strict=True):
        assert equal(ours, expected)
    assert model.net[1].num_batches_tracked == steps
    trainer.save_checkpoint("end.ckpt")
    saved = torch.load("end.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["net.1.running_mean"], normed(steps)[1][-2])
    plain = fit(LookaheadCallback(k=3), Normed(), max_steps=steps)[0]
    assert not equal(plain.statistics(), model.statistics())


@pytest.mark.parametrize("eval_weights", ["slow", "fast"])
def test_statistics_that_move_are_resumed_at_every_offset(eval_weights):
    def run(steps, ckpt_path=None):
        callback = LookaheadCallback(k=3, buffers="sync", eval_weights=eval_weights)
        model, trainer = fit(callback, Normed(), max_steps=steps, ckpt_path=ckpt_path)
        return trainer, both_with_statistics(callback, model)

    whole = run(8)[1]
    for stop in range(1, 7):
        run(stop)[0].save_checkpoint("stop.ckpt")
        for ours, expected in zip(run(8, "stop.ckpt")[1], whole, strict=True):
            assert equal(ours, expected), stop


def test_without_statistics_there_is_nothing_to_move():
    with pytest.raises(ValueError, match="buffers='sync' has nothing to do: Regression has no BatchNorm"):
        fit(LookaheadCallback(buffers="sync"))
    with pytest.raises(ValueError, match="without a module"):
        SlowWeights(Problem().optimizer, buffers="sync")


def test_fast_weights_set_aside_come_back_where_the_module_has_been_moved_in_between():
    weight, slow = creeping(steps=3)
    weight.grad = torch.full_like(weight, 0.3)
    slow.put("slow")
    theta = next(iter(slow.values("fast").values())).clone()
    weight.data = weight.data.float()  # as after a fit, where the module is moved to what is kept
    slow.put("fast")
    assert torch.equal(weight, theta.float())


# -- modes together


@pytest.mark.parametrize("eval_weights", ["slow", "fast"])
@pytest.mark.parametrize("held", ["slow", "fast"])
def test_a_checkpoint_saved_within_a_swap_holds_each_set_in_its_place(eval_weights, held):
    class Saving(Regression):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 4:
                with callback.use_weights(held):
                    self.trainer.save_checkpoint("inside.ckpt")

    callback = LookaheadCallback(k=3, eval_weights=eval_weights)
    fit(callback, Saving(batches=12))
    theta, phi = reference(5)
    assert equal(load_weights("inside.ckpt", "slow").values(), phi)
    assert equal(load_weights("inside.ckpt", "fast").values(), theta)
    resumed, _ = fit(LookaheadCallback(k=3, eval_weights=eval_weights), ckpt_path="inside.ckpt")
    assert equal(resumed.weights(), reference(8)[eval_weights == "slow"])


COMBINED = {
    "everything": {"pullback_momentum": "pullback", "buffers": "sync", "start_step": 2, "slow_dtype": "float64"},
    "fast": {"pullback_momentum": "pullback", "buffers": "sync", "eval_weights": "fast", "alpha": Linear(0.4, 0.9, 2)},
    "reset": {"pullback_momentum": "reset", "slow_dtype": "float64", "start_step": 1, "k": Linear(2, 4, 2)},
}


class ByHand(Normed):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize("options", COMBINED.values(), ids=COMBINED)
@pytest.mark.parametrize("model_class", [Normed, ByHand])
def test_modes_together_are_resumed_at_every_offset_whatever_is_looked_at_in_between(model_class, options):
    def run(steps, ckpt_path=None, **settings):
        callback = LookaheadCallback(**{"k": 3, **options})
        model, trainer = fit(callback, model_class(), max_steps=steps, ckpt_path=ckpt_path, **settings)
        return trainer, both_with_statistics(callback, model)

    whole = run(9)[1]
    for ours, expected in zip(run(9, limit_val_batches=1, val_check_interval=2)[1], whole, strict=True):
        assert equal(ours, expected)
    for stop in range(1, 9):
        run(stop)[0].save_checkpoint("stop.ckpt")
        for ours, expected in zip(run(9, "stop.ckpt")[1], whole, strict=True):
            assert equal(ours, expected), stop
        slow = load_weights("stop.ckpt", "slow")
        assert slow.keys() == load_weights("stop.ckpt", "fast").keys()


def test_either_set_of_statistics_comes_out_of_a_file():
    callback = LookaheadCallback(k=3, buffers="sync")
    model, trainer = fit(callback, Normed(), max_steps=5)
    trainer.save_checkpoint("end.ckpt")
    for weights, expected in zip(("fast", "slow"), both_with_statistics(callback, model), strict=True):
        loaded = load_weights("end.ckpt", weights)
        assert torch.equal(loaded["net.1.running_mean"], expected[-2])
        assert torch.equal(loaded["net.1.running_var"], expected[-1])


def test_a_sync_before_the_first_cycle_leaves_its_beginning_where_it_is():
    problem, other = Problem(), Problem()
    slow, plain = (SlowWeights(it.optimizer, k=3, start_step=5) for it in (problem, other))
    for index in range(10):
        if index == 2:
            slow.sync()
        problem.step(index)
        other.step(index)
    assert equal(problem.parameters, other.parameters)
    assert (plain.syncs, slow.syncs) == (1, 2)


def test_a_group_s_own_settings_are_those_of_the_run_and_not_of_the_file():
    def build(own):
        torch.manual_seed(3)
        weights = [nn.Parameter(torch.randn(2)) for _ in range(2)]
        optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], **own}], lr=0.1)
        return optimizer, SlowWeights(optimizer, k=3)

    saved, slow = build({"lookahead_k": 4})
    optimizer, other = build({"lookahead_k": 2})
    with pytest.warns(UserWarning, match="'lookahead_k': 4.*'lookahead_k': 2"):
        optimizer.load_state_dict(saved.state_dict())
    other.load_state_dict(slow.state_dict())
    assert optimizer.param_groups[1]["lookahead_k"] == 2
    assert [cycle.ends for cycle in other._cycles] == [3, 2]
    bare, third = build({})
    with pytest.warns(UserWarning, match="settings of a group"):
        optimizer.load_state_dict(bare.state_dict())
    assert optimizer.param_groups[1]["lookahead_k"] == 2
    assert third.syncs == 0


def test_a_group_that_was_added_is_resumed_in_its_cycle():
    def build():
        torch.manual_seed(3)
        first, second = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))
        optimizer = torch.optim.SGD([first], lr=0.1)
        return first, second, optimizer, SlowWeights(optimizer, k=10)

    def step(optimizer, *weights):
        optimizer.zero_grad()
        sum((weight**2).sum() for weight in weights).backward()
        optimizer.step()

    first, second, optimizer, slow = build()
    for _ in range(3):
        step(optimizer, first, second)
    optimizer.add_param_group({"params": [second], "lookahead_k": 2})
    step(optimizer, first, second)
    saved = copy.deepcopy(([first.data, second.data], optimizer.state_dict(), slow.state_dict()))
    twin_first, twin_second, twin, other = build()
    twin.add_param_group({"params": [twin_second], "lookahead_k": 2})
    for parameter, value in zip((twin_first, twin_second), saved[0], strict=True):
        parameter.data.copy_(value)
    twin.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    for _ in range(4):
        step(optimizer, first, second)
        step(twin, twin_first, twin_second)
    assert torch.equal(second, twin_second)
    assert torch.equal(first, twin_first)


def test_statistics_that_are_no_numbers_do_not_reach_the_slow_ones():
    class Bursting(Normed):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 4:
                with torch.no_grad():
                    self(torch.full((8, 4), float("inf")))
                    next(self.parameters()).fill_(float("nan"))
            return super().training_step(batch, batch_idx)

    callback = LookaheadCallback(k=3, buffers="sync", nonfinite="restore")
    with pytest.warns(UserWarning, match="no sync"):
        model, _ = fit(callback, Bursting(), max_steps=8)
    for own in both_with_statistics(callback, model):
        assert all(value.isfinite().all() for value in own)


def test_a_wider_exclude_is_resumed():
    callback = LookaheadCallback(k=3)
    fit(callback, max_steps=4)[1].save_checkpoint("stop.ckpt")
    with pytest.warns(UserWarning, match="exclude was"):
        module, _ = fit(LookaheadCallback(k=3, exclude="net.0.*"), ckpt_path="stop.ckpt")
    assert all(value.isfinite().all() for value in module.weights())


def test_the_check_for_values_that_are_not_finite_is_made_once_in_a_sync_and_never_between():
    class Looks(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.number += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    problem = Problem()
    SlowWeights(problem.optimizer, k=3)
    seen = []
    for index in range(9):
        with Looks() as looks:
            problem.step(index)
        seen.append(looks.number)
    assert seen == [0, 0, 3] * 3  # sums read: of biases, of weights for 3 inputs and of those for 4


def test_optimizers_that_wait_for_each_other_are_resumed_after_every_batch(tmp_path):
    def run(*callbacks, ckpt_path=None):
        module, callback = Uneven(), LookaheadCallback(k=3, sync_optimizers="together")
        trainer = make_trainer(callback, *callbacks, max_epochs=1)
        trainer.fit(module, ckpt_path=ckpt_path)
        return both(callback, module)

    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1, save_on_train_epoch_end=False)
    whole = run(every)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 8
    for path in paths[:-1]:
        resumed = run(ckpt_path=path)
        assert equal(whole[0], resumed[0]), path
        assert equal(whole[1], resumed[1]), path
