"""The callback in a fit: its run, one fit after the other, and copies of it."""

import copy
import pickle

import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_lookahead import LookaheadCallback, load_weights
from tests.helpers.oracle import lookahead
from tests.helpers.runs import Regression, both, equal, hooks, make_trainer, reference

# -- trajectory


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "LBFGS"])
@pytest.mark.parametrize("k", [1, 3])
def test_a_fit_is_algorithm_1_bit_for_bit_and_returns_phi(optimizer, k):
    callback, module = LookaheadCallback(k=k, alpha=0.8), Regression(optimizer)
    make_trainer(callback, max_steps=8).fit(module)
    theta, phi = reference_with_closure(8, k, optimizer)
    assert equal(module.weights(), phi)
    assert equal(both(callback, module)[0], theta)
    assert equal(both(callback, module)[1], phi)


def reference_with_closure(steps, k, optimizer):
    if optimizer != "LBFGS":
        return reference(steps, k, 0.8, optimizer=optimizer)
    module = Regression("LBFGS")
    lbfgs = module.configure_optimizers()

    def inner_step(index):
        def closure():
            lbfgs.zero_grad()
            loss = module.loss(index)
            loss.backward()
            return loss

        lbfgs.step(closure)

    phi = lookahead(list(module.net.parameters()), inner_step, k=k, alpha=0.8, steps=steps)
    return module.weights(), phi


def test_with_eval_weights_fast_the_module_holds_theta():
    callback, module = LookaheadCallback(k=3, eval_weights="fast"), Regression()
    make_trainer(callback, max_steps=8).fit(module)
    theta, phi = reference(8)
    assert equal(module.weights(), theta)
    assert equal(both(callback, module)[1], phi)


def test_it_runs_unchanged_in_a_pytorch_lightning_trainer():
    class Twin(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            vars(self).update({name: value for name, value in vars(Regression()).items() if name not in vars(self)})
            self.net = Regression().net

    for name, attribute in vars(Regression).items():
        if not name.startswith("__"):
            setattr(Twin, name, attribute)

    callback, module = LookaheadCallback(k=3), Twin()
    trainer = make_trainer(callback, trainer=pytorch_lightning.Trainer, max_steps=8, limit_val_batches=1)
    trainer.fit(module)
    assert equal(module.weights(), reference(8)[1])
    trainer.save_checkpoint("twin.ckpt")
    resumed, again = Twin(), LookaheadCallback(k=3)
    make_trainer(again, trainer=pytorch_lightning.Trainer, max_steps=13).fit(resumed, ckpt_path="twin.ckpt")
    assert equal(both(again, resumed)[0], reference(13)[0])


@pytest.mark.parametrize(
    "imports",
    [
        "from lightning_lookahead import LookaheadCallback; import {package} as package",
        "import {package} as package; from lightning_lookahead import LookaheadCallback",
    ],
)
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_either_package_keeps_its_messages_and_is_not_joined_by_the_other(package, imports, bare_program):
    program = f"""
{imports.format(package=package)}
import sys
from lightning_utilities.core import rank_zero
package.Trainer(callbacks=[LookaheadCallback()], logger=False, accelerator="cpu")
assert rank_zero.log.name.startswith({package!r}), rank_zero.log.name
assert {package!r} == "pytorch_lightning" or "pytorch_lightning" not in sys.modules
"""
    done = bare_program("-c", program)
    assert done.returncode == 0, done.stderr


# -- fits, one after the other


def test_hooks_are_removed_after_fit_and_not_doubled_by_a_second_one():
    callback, module = LookaheadCallback(k=3), Regression()
    trainer = make_trainer(callback, max_epochs=1)
    trainer.fit(module)
    first = trainer.optimizers[0]
    assert hooks(first) == 0
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    assert hooks(first) == hooks(trainer.optimizers[0]) == 0


def test_a_second_fit_starts_from_the_phi_that_the_first_one_returned():
    callback, module = LookaheadCallback(k=3), Regression()
    trainer = make_trainer(callback, max_epochs=1)
    trainer.fit(module)
    start = module.weights()
    seen = []

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append((pl_module.weights(), both(callback, pl_module)[1]))

    trainer.callbacks.append(Start())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    assert equal(seen[0][0], start)
    assert equal(seen[0][1], start)
    assert callback.slow_weights[0].steps == 5


def test_one_callback_serves_two_trainers():
    callback = LookaheadCallback(k=3)
    for _ in range(2):
        module = Regression()
        make_trainer(callback, max_steps=8).fit(module)
        assert equal(module.weights(), reference(8)[1])


def test_a_module_without_optimizer_trains_on_with_one_warning():
    class Idle(Regression):
        def configure_optimizers(self):
            return None

        def training_step(self, batch, batch_idx):
            return None

    with pytest.warns(UserWarning, match="nothing to look ahead with") as caught:
        make_trainer(LookaheadCallback(), max_epochs=1).fit(Idle())
    assert sum("look ahead" in str(warning.message) for warning in caught) == 1


def test_weights_loaded_when_training_starts_are_what_phi_starts_from():
    class Loads(Regression):
        def on_train_start(self):
            with torch.no_grad():
                for parameter in self.net.parameters():
                    parameter.fill_(0.5)

    callback, module = LookaheadCallback(k=10), Loads()
    make_trainer(callback, max_steps=2, num_sanity_val_steps=1, limit_val_batches=1).fit(module)
    assert all((parameter == 0.5).all() for parameter in module.weights())


# -- beside the rest of Lightning


def test_it_goes_first_whatever_place_it_was_given():
    other, callback = Callback(), LookaheadCallback()
    trainer = make_trainer(other, callback, max_steps=1)
    trainer.fit(Regression())
    assert trainer.callbacks.index(callback) < trainer.callbacks.index(other)
    assert trainer.callbacks.count(callback) == 1


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_callback_trainer_and_strategy_can_be_copied_and_pickled(when):
    callback, module = LookaheadCallback(k=3), Regression()
    done = []

    def duplicate(trainer):
        pickled, deep = pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)
        assert (pickled.settings.k, deep.settings.k) == (3, 3)
        pickle.loads(pickle.dumps(trainer.strategy))
        for twin in (pickled, deep):
            if when != "during":  # the settings, not the weights
                assert twin.slow_weights == []
                assert len(pickle.dumps(twin)) < 1000
                continue
            for mine, theirs in zip(callback.slow_weights, twin.slow_weights, strict=True):
                assert equal(mine.values("slow").values(), theirs.values("slow").values())
        done.append(when)

    class Middle(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if when == "during" and batch_idx == 3:
                duplicate(trainer)

    trainer = make_trainer(callback, *([Middle()] if when == "during" else []), max_steps=8)
    if when == "before":
        duplicate(trainer)
    trainer.fit(module)
    if when == "after":
        duplicate(trainer)
        assert pickle.loads(pickle.dumps(trainer)).callbacks[0].settings.k == 3
    assert done == [when]
    assert equal(module.weights(), reference(8)[1])


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_modules_see_every_swap(whole):
    torch._dynamo.reset()

    class Compiled(Regression):
        def __init__(self):
            super().__init__()
            if not whole:
                self.net = torch.compile(self.net, backend="aot_eager")

    callback, module = LookaheadCallback(k=3), Compiled()
    losses = []

    class Watch(Callback):
        def on_validation_end(self, trainer, pl_module):
            losses.append(trainer.callback_metrics["val_loss"].item())

    trainer = make_trainer(callback, Watch(), max_steps=8, limit_val_batches=1, val_check_interval=4)
    trainer.fit(torch.compile(module, backend="aot_eager") if whole else module)
    assert equal(module.weights(), reference(8)[1])
    expected = []
    for steps in (4, 8):
        plain = Regression()
        for parameter, value in zip(plain.net.parameters(), reference(steps)[1], strict=True):
            parameter.data.copy_(value)
        expected.append(plain.loss(1000).item())
    assert losses[0] == pytest.approx(expected[0], abs=1e-12)
    trainer.save_checkpoint("compiled.ckpt")
    plain = Regression()
    for weights, values in zip(("fast", "slow"), both(callback, module), strict=True):
        plain.load_state_dict(load_weights("compiled.ckpt", weights))
        assert equal(plain.weights(), values)


def test_data_of_the_module_are_not_touched():
    class Loader(Regression):
        def train_dataloader(self):
            return DataLoader(torch.arange(6.0), shuffle=True)

        def training_step(self, batch, batch_idx):
            self.order.append(batch.item())
            return super().training_step(batch, batch_idx) + torch.rand(()) * 0

    orders = []
    for callbacks in ([], [LookaheadCallback(k=2, log_distance=True)]):
        torch.manual_seed(3)
        module = Loader()
        module.order = []
        torch.manual_seed(4)
        make_trainer(*callbacks, max_epochs=3).fit(module)
        orders.append((module.order, torch.rand(3).tolist()))
    assert orders[0] == orders[1]
