"""What becomes of a checkpoint when a fit goes on from it."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lookahead import LookaheadCallback, load_weights
from tests.helpers.runs import Regression, both, checkpoint_after, equal, fit, make_trainer, reference


class Tied(Regression):
    def __init__(self):
        super().__init__()
        self.net[2] = nn.Linear(4, 4).to(torch.float64)
        self.net.append(nn.Linear(4, 4).to(torch.float64))
        self.net[3].weight = self.net[2].weight


def test_tied_parameters_are_saved_under_both_names_and_resumed():
    callback, module = LookaheadCallback(k=3), Tied()
    make_trainer(callback, ModelCheckpoint(".", "tied", every_n_train_steps=4), max_steps=4).fit(module)
    for weights, values in zip(("fast", "slow"), both(callback, module), strict=True):
        loaded = load_weights("tied.ckpt", weights)
        assert torch.equal(loaded["net.2.weight"], loaded["net.3.weight"])
        plain = Tied()
        plain.load_state_dict(loaded)
        assert equal(plain.weights(), values)
    full = Tied()
    make_trainer(LookaheadCallback(k=3), max_steps=8).fit(full)
    resumed = Tied()
    make_trainer(LookaheadCallback(k=3), max_steps=8).fit(resumed, ckpt_path="tied.ckpt")
    assert equal(resumed.weights(), full.weights())


def test_other_settings_than_the_checkpoints_win_with_one_warning():
    path = checkpoint_after(4)
    callback, module = LookaheadCallback(k=2, alpha=0.8, eval_weights="fast"), Regression()
    with pytest.warns(UserWarning, match="k was 3 and is 2; alpha was 0.5 and is 0.8; eval_weights was") as caught:
        make_trainer(callback, max_steps=7).fit(module, ckpt_path=path)
    assert sum("settings" in str(warning.message) for warning in caught) == 1
    # one step into the cycle of 3: the cycle of 2 ends at step 5, then at 7
    theta, phi = reference(4)
    plain = Regression()
    optimizer = plain.configure_optimizers()
    optimizer.load_state_dict(reference_optimizer(4))
    for parameter, value in zip(plain.net.parameters(), theta, strict=True):
        parameter.data.copy_(value)
    for step in range(4, 7):
        optimizer.zero_grad()
        plain.loss(step).backward()
        optimizer.step()
        if step in {4, 6}:
            phi = [torch.lerp(slow, fast.detach(), 0.8) for slow, fast in zip(phi, plain.net.parameters(), strict=True)]
            for parameter, value in zip(plain.net.parameters(), phi, strict=True):
                parameter.data.copy_(value)
    assert equal(module.weights(), plain.weights())


def reference_optimizer(steps):
    states = []

    class Keep(Callback):
        def on_train_end(self, trainer, pl_module):
            states.append(copy.deepcopy(trainer.optimizers[0].state_dict()))

    callback = LookaheadCallback(k=3)
    make_trainer(callback, Keep(), max_steps=steps).fit(Regression())
    return states[0]


def test_a_checkpoint_made_without_the_callback_starts_phi_from_its_weights_with_one_warning():
    path = checkpoint_after(4, callbacks=[])
    start = list(torch.load(path, weights_only=True)["state_dict"].values())
    callback, module, seen = LookaheadCallback(k=3), Regression(), []

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.extend(both(callback, pl_module))

    with pytest.warns(UserWarning, match="made without LookaheadCallback") as caught:
        make_trainer(callback, Start(), max_steps=8).fit(module, ckpt_path=path)
    assert sum("Lookahead" in str(warning.message) for warning in caught) == 1
    assert equal(seen[0], start)
    assert equal(seen[1], start)
    assert (callback.slow_weights[0].steps, callback.slow_weights[0].syncs) == (4, 1)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_our_checkpoints_load_without_the_callback(optimizer):
    path = checkpoint_after(4, optimizer=optimizer)
    phi = reference(4, optimizer=optimizer)[1]
    module = Regression(optimizer)
    with pytest.warns(UserWarning, match="Please add the following callbacks"):
        make_trainer(max_steps=4).fit(module, ckpt_path=path)
    assert equal(module.weights(), phi)
    make_trainer(max_steps=3).fit(module)
    loaded = Regression.load_from_checkpoint(path, optimizer=optimizer)
    assert equal(loaded.weights(), phi)


def test_a_run_without_lookahead_in_between_leaves_no_trace_in_the_weights():
    path = checkpoint_after(4)
    between, trainer = Regression(), make_trainer(max_steps=6)
    with pytest.warns(UserWarning, match="Please add the following callbacks"):
        trainer.fit(between, ckpt_path=path)
    trainer.save_checkpoint("between.ckpt")
    callback, module, seen = LookaheadCallback(k=3), Regression(), []

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.extend(both(callback, pl_module))

    with pytest.warns(UserWarning, match="made without LookaheadCallback") as caught:
        make_trainer(callback, Start(), max_steps=8).fit(module, ckpt_path="between.ckpt")
    assert sum("Lookahead" in str(warning.message) for warning in caught) == 1
    assert equal(seen[0], between.weights())
    assert equal(seen[1], between.weights())


def test_weights_migrated_in_on_load_checkpoint_are_those_that_training_goes_on_with():
    path = checkpoint_after(4)
    seen = []

    class Migrates(Regression):
        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"]["net.0.weight"] = checkpoint["state_dict"]["net.0.weight"] * 3

        def on_train_start(self):
            seen.extend(self.weights())

    with pytest.warns(UserWarning, match="1 of 4 parameters"):
        make_trainer(LookaheadCallback(k=3), max_steps=6).fit(Migrates(), ckpt_path=path)
    assert torch.equal(seen[0], reference(4)[1][0] * 3)
    assert equal(seen[1:], reference(4)[0][1:])


def test_a_scheduler_still_moves_the_learning_rate_after_a_resume():
    class Scheduled(Regression):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    full = Scheduled()
    make_trainer(LookaheadCallback(k=3), max_steps=8).fit(full)
    path = checkpoint_after(4, Scheduled)
    resumed = Scheduled()
    trainer = make_trainer(LookaheadCallback(k=3), max_steps=8)
    trainer.fit(resumed, ckpt_path=path)
    assert equal(resumed.weights(), full.weights())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05 * 0.5**8


def test_a_checkpoint_saved_after_the_kth_step_and_before_its_sync_is_synced_when_training_starts_again():
    class Saves(Regression):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        def lr_scheduler_step(self, scheduler, metric):
            super().lr_scheduler_step(scheduler, metric)
            if self.trainer.global_step == 3 and self.saves:
                assert callback.slow_weights[0].due  # the sync belongs to on_train_batch_end
                self.trainer.save_checkpoint("due.ckpt")

    callback, module = LookaheadCallback(k=3), Saves(batches=20)
    module.saves = True
    make_trainer(callback, max_steps=8).fit(module)
    assert equal(module.weights(), reference(8)[1])
    again, resumed, started = LookaheadCallback(k=3), Saves(batches=20), []
    resumed.saves = False

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            started.extend(both(again, pl_module))

    make_trainer(again, Start(), max_steps=8).fit(resumed, ckpt_path="due.ckpt")
    assert equal(started[0], reference(3)[1])
    assert equal(started[1], reference(3)[1])


@pytest.mark.parametrize("eval_weights", ["slow", "fast"])
def test_a_finished_run_resumed_ends_with_the_same_weights(eval_weights):
    path = checkpoint_after(4, callbacks=[LookaheadCallback(k=3, eval_weights=eval_weights)])
    callback, module = LookaheadCallback(k=3, eval_weights=eval_weights), Regression()
    make_trainer(callback, max_steps=4).fit(module, ckpt_path=path)
    theta, phi = reference(4)
    assert equal(module.weights(), phi if eval_weights == "slow" else theta)
    assert equal(both(callback, module)[0], theta)
    assert equal(both(callback, module)[1], phi)
    assert not callback.slow_weights[0].inner_loop.watches


def test_a_fit_without_the_callback_saves_its_own_weights_although_the_strategy_knew_us():
    callback, module = LookaheadCallback(k=3), Failing()
    trainer = make_trainer(callback, max_steps=9)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module)
    trainer.callbacks.remove(callback)
    trainer.fit_loop.epoch_loop.max_steps = 14
    module.fails_at = None
    trainer.fit(module)
    trainer.save_checkpoint("without.ckpt")
    assert equal(torch.load("without.ckpt", weights_only=True)["state_dict"].values(), module.weights())


class Failing(Regression):
    fails_at = 4

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == self.fails_at:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


def test_a_callback_that_went_on_to_another_trainer_says_nothing_in_the_first_ones_checkpoints():
    callback, module = LookaheadCallback(k=3), Regression()
    first, second = make_trainer(callback, max_steps=4), make_trainer(callback, max_steps=8)
    first.fit(module)
    second.fit(Regression())
    first.save_checkpoint("first.ckpt")
    saved = torch.load("first.ckpt", weights_only=True)
    assert equal(saved["state_dict"].values(), reference(4)[1])
    assert saved["callbacks"]["LookaheadCallback"]["optimizers"] == []
    with pytest.raises(ValueError, match="holds one set of weights"):
        load_weights("first.ckpt", "fast")


def test_a_checkpoint_with_another_number_of_optimizers_is_refused():
    path = checkpoint_after(4)

    class Halves(Regression):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[index].parameters(), lr=0.1) for index in (0, 2)]

    module = Halves()
    before = module.weights()
    with pytest.raises(ValueError, match="made with 1 optimizers, and configure_optimizers gives 2"):
        make_trainer(LookaheadCallback(k=3), max_steps=8).fit(module, ckpt_path=path)
    assert equal(module.weights(), before)


class Wider(Regression):
    def __init__(self):
        super().__init__()
        self.net[2] = nn.Linear(4, 5).to(torch.float64)


def damage(checkpoint, kind):
    ours = checkpoint["callbacks"]["LookaheadCallback"]
    weights = ours["optimizers"][0]["weights"]["fast"]
    if kind == "counters":
        ours["optimizers"][0]["steps"] = "many"
    elif kind == "no counters":
        del ours["optimizers"]
    elif kind == "weights":
        weights["net.0.weight"] = 3
    else:
        weights["net.0.weight"] = weights["net.0.weight"][:1]


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("counters", ValueError, "'steps'.* is 'many'; it must be an integer"),
        ("no counters", ValueError, "counters .* are missing"),
        ("weights", ValueError, "'weights'. is damaged: it must be a dict of dicts of tensors"),
        ("shape", ValueError, "for parameter 'net.0.weight' of shape .4, 3.: it is of another model"),
        ("another model", RuntimeError, "size mismatch"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_leaves_the_model_as_it_was(kind, error, message):
    path = checkpoint_after(4)
    if kind != "another model":
        checkpoint = torch.load(path, weights_only=True)
        damage(checkpoint, kind)
        torch.save(checkpoint, path)
    module = Wider() if kind == "another model" else Regression()
    before = module.weights()
    with pytest.raises(error, match=message):
        make_trainer(LookaheadCallback(k=3), max_steps=8).fit(module, ckpt_path=path)
    assert equal(module.weights(), before)


def test_a_run_that_is_given_momentum_or_loses_it_says_so_once():
    plain, given = LookaheadCallback(k=3), LookaheadCallback(k=3, outer_momentum=0.9)
    paths = [checkpoint_after(4, callbacks=[one], path=f"{number}.ckpt") for number, one in enumerate((plain, given))]
    with pytest.warns(UserWarning, match=r"outer_momentum was 0.0 and is 0.9.*The outer momentum starts") as caught:
        _, trainer = fit(LookaheadCallback(k=3, outer_momentum=0.9), Regression(), ckpt_path=paths[0], max_steps=7)
    assert sum("Lookahead" in str(warning.message) for warning in caught) == 1
    assert trainer.callbacks[0].slow_weights[0].pairs.outer_momentum.b
    with pytest.warns(UserWarning, match=r"outer_momentum was 0.9 and is 0.0") as caught:
        _, trainer = fit(LookaheadCallback(k=3), Regression(), ckpt_path=paths[1], max_steps=7)
    assert sum("Lookahead" in str(warning.message) for warning in caught) == 1
    assert not trainer.callbacks[0].slow_weights[0].pairs.outer_momentum.b
