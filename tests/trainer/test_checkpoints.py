"""What a checkpoint holds, whoever saves it and whenever, and what becomes of it when it is loaded."""

import copy
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import nn

from lightning_lookahead import LookaheadCallback, load_weights
from tests.helpers.runs import Regression, both, equal, inputs, make_trainer, reference

WHERES = [
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_after_backward",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
]


class SaveIn(Callback):
    """Saves once, in the hook named, when four steps are done."""

    def __init__(self, where, **settings):
        self.saved = False

        def save(trainer, pl_module, *_):
            if trainer.global_step == 4 and not self.saved:
                self.saved = True
                before = pl_module.weights()
                trainer.save_checkpoint("saved.ckpt", **settings)
                assert equal(pl_module.weights(), before)

        setattr(self, where, save)


@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("eval_weights", ["slow", "fast"])
def test_each_set_is_in_its_place_wherever_the_checkpoint_is_saved(where, eval_weights):
    callback = LookaheadCallback(k=3, eval_weights=eval_weights)
    save = SaveIn(where)
    steps = 4 if where in {"on_train_end", "on_fit_end"} else 8
    make_trainer(save, callback, max_steps=steps, limit_val_batches=1).fit(Regression(batches=4))
    theta, phi = reference(4)
    held = torch.load("saved.ckpt", weights_only=True)["state_dict"].values()
    assert equal(held, phi if eval_weights == "slow" else theta)
    assert equal(load_weights("saved.ckpt", "fast").values(), theta)
    assert equal(load_weights("saved.ckpt", "slow").values(), phi)


def test_a_checkpoint_saved_between_forward_and_backward_disturbs_neither():
    class Saves(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.trainer.save_checkpoint("saved.ckpt")
            return loss

    module = Saves()
    make_trainer(LookaheadCallback(k=3), max_steps=5).fit(module)
    assert equal(module.weights(), reference(5)[1])
    assert equal(load_weights("saved.ckpt", "fast").values(), reference(4)[0])


@pytest.mark.parametrize("phase", ["training_step", "validation_step"])
def test_a_signal_handler_may_save(phase):
    callback = LookaheadCallback(k=3)

    class Signalled(Regression):
        def training_step(self, batch, batch_idx):
            if phase == "training_step" and self.trainer.global_step == 4:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            if phase == "validation_step" and self.trainer.global_step == 4:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().validation_step(batch, batch_idx)

    trainer = make_trainer(callback, max_steps=8, limit_val_batches=1, val_check_interval=2)
    previous = signal.signal(signal.SIGUSR1, lambda *_: trainer.save_checkpoint("saved.ckpt"))
    try:
        trainer.fit(Signalled())
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert equal(load_weights("saved.ckpt", "fast").values(), reference(4)[0])
    assert equal(load_weights("saved.ckpt", "slow").values(), reference(4)[1])


@pytest.mark.parametrize("where", ["on_train_batch_end", "on_validation_epoch_end", "on_fit_end"])
def test_a_checkpoint_of_weights_only_holds_phi(where):
    callback = LookaheadCallback(k=3)
    save = SaveIn(where, weights_only=True)
    make_trainer(callback, save, max_steps=4, limit_val_batches=1).fit(Regression(batches=4))
    checkpoint = torch.load("saved.ckpt", weights_only=True)
    assert equal(checkpoint["state_dict"].values(), reference(4)[1])
    assert "optimizer_states" not in checkpoint


def test_model_checkpoint_on_a_sync_batch_saves_after_the_sync():
    every = ModelCheckpoint(".", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    make_trainer(every, LookaheadCallback(k=3), max_steps=7).fit(Regression())
    for weights in ("slow", "fast"):
        assert equal(load_weights("step=3.ckpt", weights).values(), reference(3)[1])


def test_a_checkpoint_is_the_same_inside_use_weights_after_fit():
    callback, module = LookaheadCallback(k=3), Regression()
    trainer = make_trainer(callback, max_steps=4)
    trainer.fit(module)
    for index, weights in enumerate(("slow", "fast")):
        with callback.use_weights(weights):
            trainer.save_checkpoint(f"{index}.ckpt")
        assert equal(load_weights(f"{index}.ckpt", "fast").values(), reference(4)[0])
        assert equal(load_weights(f"{index}.ckpt", "slow").values(), reference(4)[1])
    resumed, again = Regression(), LookaheadCallback(k=3)
    make_trainer(again, max_steps=10).fit(resumed, ckpt_path="1.ckpt")
    assert equal(resumed.weights(), reference(10)[1])


def test_asynchronous_saving_writes_what_the_weights_were():
    every = ModelCheckpoint(".", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    make_trainer(every, LookaheadCallback(k=3), max_steps=8, plugins=[AsyncCheckpointIO()]).fit(Regression())
    for steps in range(1, 9):
        assert equal(load_weights(f"step={steps}.ckpt", "fast").values(), reference(steps)[0])
        assert equal(load_weights(f"step={steps}.ckpt", "slow").values(), reference(steps)[1])


class Custom(Regression):
    """Saves something made from its parameters."""

    def state_dict(self, *args, **kwargs):
        return {name: value.to(torch.float32) for name, value in super().state_dict(*args, **kwargs).items()}


def test_a_state_dict_that_is_computed_from_the_parameters_is_computed_from_phi():
    callback, module = LookaheadCallback(k=3), Custom()
    save = SaveIn("on_train_batch_end", weights_only=True)
    make_trainer(callback, save, max_steps=6).fit(module)
    held = torch.load("saved.ckpt", weights_only=True)["state_dict"].values()
    assert equal(held, [value.float() for value in reference(4)[1]])
    assert equal(module.weights(), reference(6)[1])


class Filtered(Regression):
    def state_dict(self, *args, **kwargs):
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "bias" not in name}


def test_a_state_dict_that_leaves_parameters_out_holds_copies_of_phi():
    callback, module = LookaheadCallback(k=3), Filtered()
    trainer = make_trainer(callback, max_steps=4)
    kept = {}

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 2:
                kept.update(trainer.strategy.lightning_module_state_dict())

    trainer.callbacks.append(Keep())
    trainer.fit(module)
    assert list(kept) == ["net.0.weight", "net.2.weight"]
    assert equal(kept.values(), reference(2)[1][::2])


# -- resuming


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


def checkpoint_after(steps, module_class=Regression, path="from.ckpt", callbacks=None, **settings):
    callbacks = [LookaheadCallback(k=3)] if callbacks is None else callbacks
    trainer = make_trainer(*callbacks, max_steps=steps)
    trainer.fit(module_class(**settings))
    trainer.save_checkpoint(path)
    return path


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


class Two(Regression):
    """Two optimizers in manual optimization, the second one every other step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(3, 2).to(torch.float64)
        self.register_buffer("taken", torch.zeros((), dtype=torch.long))

    def configure_optimizers(self):
        return super().configure_optimizers(), torch.optim.Adam(self.other.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        step = int(self.taken)
        first.zero_grad()
        self.manual_backward(self.loss(step))
        first.step()
        if step % 2:
            second.zero_grad()
            self.manual_backward((self.other(inputs(step)) - 1).square().mean())
            second.step()
        self.taken += 1


def test_two_optimizers_resume_each_with_its_own_count():
    def run(ckpt_path=None):
        callback, module = LookaheadCallback(k=3), Two()
        every = ModelCheckpoint(".", "two-{step}", every_n_train_steps=1, save_top_k=-1)
        make_trainer(callback, every, max_epochs=4, limit_train_batches=4).fit(module, ckpt_path=ckpt_path)
        counts = [(slow.steps, slow.syncs) for slow in callback.slow_weights]
        with callback.use_weights("fast"):
            fast = [parameter.detach().clone() for parameter in module.parameters()]
        return counts, fast, [parameter.detach().clone() for parameter in module.parameters()]

    counts, fast, slow = run()
    assert counts == [(16, 5), (8, 2)]
    paths = sorted(Path().glob("two-*"))
    assert len(paths) > 10
    for path in paths:
        again = run(path)
        assert again[0] == counts
        assert equal(again[1], fast)
        assert equal(again[2], slow)


@pytest.mark.parametrize("eval_weights", ["slow", "fast"])
def test_a_finished_run_resumed_ends_with_the_same_weights(eval_weights):
    path = checkpoint_after(4, callbacks=[LookaheadCallback(k=3, eval_weights=eval_weights)])
    callback, module = LookaheadCallback(k=3, eval_weights=eval_weights), Regression()
    make_trainer(callback, max_steps=4).fit(module, ckpt_path=path)
    theta, phi = reference(4)
    assert equal(module.weights(), phi if eval_weights == "slow" else theta)
    assert equal(both(callback, module)[0], theta)
    assert equal(both(callback, module)[1], phi)
    assert not callback.slow_weights[0].counting


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


# -- files that are not what they should be


def spoilt(kind):
    path = checkpoint_after(4)
    if kind == "truncated":
        with open(path, "r+b") as file:  # noqa: PTH123
            file.truncate(os.path.getsize(path) // 2)  # noqa: PTH202
    elif kind == "empty":
        open(path, "wb").close()  # noqa: PTH123
    elif kind == "text":
        with open(path, "w") as file:  # noqa: PTH123
            file.write("not a checkpoint")
    else:
        torch.save({"list": [1, 2]} if kind == "foreign" else [1, 2], path)
    return path


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "foreign", "list"])
def test_a_spoilt_file_gives_a_clear_error_and_leaves_the_model_as_it_was(kind):
    path = spoilt(kind)
    with pytest.raises(ValueError, match=f"{path} (cannot be read as a checkpoint|is no Lightning checkpoint)"):
        load_weights(path)
    module = Regression()
    before = module.weights()
    with pytest.raises(Exception):  # noqa: B017, PT011 (Lightning's and torch's own)
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


class Renamed(Regression):
    def state_dict(self, *args, **kwargs):
        return {f"model.{name}": value for name, value in super().state_dict(*args, **kwargs).items()}


def test_load_weights_does_not_guess_names():
    path = checkpoint_after(4, Renamed)
    assert equal(load_weights(path, "slow").values(), reference(4)[1])
    with pytest.raises(ValueError, match="has no such name: the module saves its weights under names of its own"):
        load_weights(path, "fast")


def test_load_weights_says_what_a_file_lacks():
    with pytest.raises(FileNotFoundError):
        load_weights("nowhere.ckpt")
    with pytest.raises(ValueError, match="'mean' is unknown: give 'slow'"):
        load_weights(checkpoint_after(4), "mean")
    with pytest.raises(ValueError, match="saved without LookaheadCallback"):
        load_weights(checkpoint_after(4, callbacks=[]))
    trainer = make_trainer(LookaheadCallback(), max_steps=2)
    trainer.fit(Regression())
    trainer.save_checkpoint("light.ckpt", weights_only=True)
    with pytest.raises(ValueError, match="save_weights_only=True"):
        load_weights("light.ckpt")


def test_a_newer_version_is_refused_with_its_number():
    path = checkpoint_after(4)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["LookaheadCallback"]["lookahead_version"] = 3
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="of version 3; this package reads version 2"):
        load_weights(path)
    with pytest.raises(ValueError, match="of version 3; this package reads version 2"):
        make_trainer(LookaheadCallback(k=3), max_steps=8).fit(Regression(), ckpt_path=path)


def test_load_weights_reads_hyperparameters_of_ones_own_classes_if_the_file_is_trusted():
    path = checkpoint_after(4)
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "hyper_parameters": {"schedule": Custom}}, path)
    with pytest.raises(
        pickle.UnpicklingError, match=r"is whole.*test_checkpoints.Custom,.*weights_only=False.*safe_globals"
    ):
        load_weights(path)
    assert equal(load_weights(path, weights_only=False).values(), reference(4)[1])


def test_a_full_disk_loses_neither_the_weights_nor_the_run(monkeypatch):
    callback, module = LookaheadCallback(k=3), Regression()
    failed = []

    class Fails(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
                patch.setattr(torch, "save", full)
                trainer.save_checkpoint("full.ckpt")
            failed.append(trainer.global_step)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    make_trainer(callback, Fails(), max_steps=8, val_check_interval=2, limit_val_batches=1).fit(module)
    assert failed
    assert equal(module.weights(), reference(8)[1])
