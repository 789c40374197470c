"""Runs as other people have them: what trained without the callback trains with it, isolated, and is resumed."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateFinder, ModelCheckpoint, ModelPruning
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, IterableDataset

from lightning_lookahead import LookaheadCallback, SlowWeights, load_weights
from tests.helpers.classifier import Classifier
from tests.helpers.runs import Regression, both, equal, hooks, make_trainer, reference


def trained(module, *callbacks, ckpt_path=None, **settings):
    trainer = make_trainer(*callbacks, **{"max_steps": 8, **settings})
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer, [parameter.detach().clone() for parameter in module.parameters()]


# -- validation


class KeepsBest(Callback):
    """Copies the module when validation is over, as a library's own checkpoint callbacks do."""

    def __init__(self):
        self.kept = []

    def on_validation_end(self, trainer, pl_module):
        weights = [parameter.detach().clone() for parameter in copy.deepcopy(pl_module.net).parameters()]
        self.kept.append((trainer.callback_metrics["val_loss"].item(), weights))


@pytest.mark.parametrize("first", [True, False])
def test_a_callback_that_copies_the_module_after_validation_has_the_weights_that_were_validated(first):
    callback, keeps = LookaheadCallback(k=3), KeepsBest()
    trained(
        Regression(), *([callback, keeps] if first else [keeps, callback]), val_check_interval=2, limit_val_batches=1
    )
    for loss, weights in keeps.kept:
        module = Regression()
        with torch.no_grad():
            for parameter, value in zip(module.net.parameters(), weights, strict=True):
                parameter.copy_(value)
        assert module.loss(1000).item() == loss
    assert len(keeps.kept) == 3


def test_the_first_hook_after_validation_finds_the_fast_weights_again():
    seen = []

    class Looks(Regression):
        def on_validation_model_train(self):
            seen.append(self.weights())
            super().on_validation_model_train()

    trained(Looks(), LookaheadCallback(k=3), max_steps=5, val_check_interval=5, limit_val_batches=1)
    assert equal(seen[0], reference(5)[0])


class KeepsOnSaving(Callback):
    """Copies the module where checkpoints are saved, as libraries do that save it in a form of their own."""

    def __init__(self):
        self.kept = []

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.kept.append((pl_module.weights(), [value.clone() for value in checkpoint["state_dict"].values()]))


@pytest.mark.parametrize("eval_weights", ["slow", "fast"])
@pytest.mark.parametrize("at", ["epoch", "batch", "validation"])
def test_who_copies_the_module_where_checkpoints_are_saved_has_the_weights_of_the_checkpoint(at, eval_weights):
    saving = {
        "epoch": ModelCheckpoint(".", "{epoch}", save_on_train_epoch_end=True, save_top_k=-1),
        "batch": ModelCheckpoint(".", "{step}", every_n_train_steps=2, save_top_k=-1),
        "validation": ModelCheckpoint(".", "{epoch}", monitor="val_loss", save_on_train_epoch_end=False),
    }[at]
    callback, keeps, module = LookaheadCallback(k=3, eval_weights=eval_weights), KeepsOnSaving(), Regression()
    _, end = trained(module, callback, keeps, saving, limit_val_batches=1)
    assert keeps.kept
    assert all(equal(weights, held) for weights, held in keeps.kept)
    assert equal(end, reference(8)[1 if eval_weights == "slow" else 0])


def test_weights_that_another_callback_loads_when_training_has_ended_are_noticed():
    class LoadsBest(Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.load_state_dict(torch.load("step=4.ckpt", weights_only=True)["state_dict"])

    callback, module = LookaheadCallback(k=3), Regression()
    every = ModelCheckpoint(".", "{step}", every_n_train_steps=4, save_top_k=-1)
    trained(module, callback, LoadsBest(), every)
    with (
        pytest.raises(RuntimeError, match="does not hold the weights that the fit has left"),
        callback.use_weights("fast"),
    ):
        pass


# -- frozen parameters


class Backbone(Regression):
    def __init__(self):
        super().__init__(batches=4)
        self.backbone = self.net[0]

    def configure_optimizers(self):
        return torch.optim.SGD(filter(lambda p: p.requires_grad, self.net.parameters()), lr=0.05, momentum=0.9)


class AllFrozen(Regression):
    """Unfreezes all of it after the third step."""

    def configure_optimizers(self):
        self.net.requires_grad_(False)
        return super().configure_optimizers()

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step >= 3:
            self.net.requires_grad_(True)
        loss = super().training_step(batch, batch_idx)
        return loss if loss.requires_grad else None


@pytest.mark.filterwarnings("error:.*Lookahead", "ignore:.*training_step. returned")
def test_what_is_frozen_at_first_gets_slow_weights_when_it_is_unfrozen():
    callback, module = LookaheadCallback(k=2), AllFrozen()
    trained(module, callback)
    assert callback.slow_weights[0].steps == 5
    plain = Regression()
    optimizer = plain.configure_optimizers()
    phi = plain.weights()
    for taken, step in enumerate(range(3, 8), 1):
        optimizer.zero_grad()
        plain.loss(step).backward()
        optimizer.step()
        if taken % 2 == 0:
            phi = [torch.lerp(slow, fast, 0.5) for slow, fast in zip(phi, plain.weights(), strict=True)]
            for parameter, value in zip(plain.net.parameters(), phi, strict=True):
                parameter.data.copy_(value)
    assert equal(module.weights(), phi)
    assert equal(both(callback, module)[0], plain.weights())


def test_backbone_finetuning_over_an_optimizer_of_the_backbone_alone_is_the_run_without_us_at_alpha_one():
    class Frozen(Backbone):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[2].parameters(), lr=0.05)

    ends = [
        trained(Frozen(), *own, BackboneFinetuning(1, verbose=False), max_steps=10)[1]
        for own in ([], [LookaheadCallback(k=1, alpha=1.0)])
    ]
    assert equal(*ends)


@pytest.mark.filterwarnings("error:.*Lookahead")
def test_a_module_without_any_trained_parameter_runs_as_without_us():
    class Nothing(AllFrozen):
        def training_step(self, batch, batch_idx):
            return None

    callback, module = LookaheadCallback(k=2), Nothing()
    start = module.weights()
    trainer, _ = trained(module, callback, max_epochs=1, max_steps=-1, limit_val_batches=1)
    trainer.save_checkpoint("nothing.ckpt")
    assert equal(module.weights(), start)
    assert callback.slow_weights[0].steps == 0


class OneOptimizer(Regression):
    """Gives the same optimizer object to every fit."""

    def configure_optimizers(self):
        if not hasattr(self, "kept"):
            self.kept = [super().configure_optimizers()]
        return self.kept[0]


@pytest.mark.parametrize("then", ["the same", "another", "none"])
def test_an_optimizer_object_goes_from_fit_to_fit(then):
    callback, module = LookaheadCallback(k=3), OneOptimizer()
    trained(module, callback, max_steps=4)
    assert hooks(module.kept[0]) == 0
    start = module.weights()
    second = {"the same": [callback], "another": [LookaheadCallback(k=3)], "none": []}[then]
    twin = OneOptimizer()
    twin.load_state_dict(module.state_dict())
    twin.configure_optimizers().load_state_dict(copy.deepcopy(module.kept[0].state_dict()))
    seen = []

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            if second:
                seen.append([value.clone() for value in second[0].slow_weights[0].values("slow").values()])

    _, end = trained(module, *second, Start(), max_steps=4)
    assert equal(end, trained(twin, *([LookaheadCallback(k=3)] if second else []), max_steps=4)[1])
    assert all(equal(phi, start) for phi in seen)
    assert hooks(module.kept[0]) == 0


def test_an_exception_leaves_no_hook_on_an_optimizer():
    class Fails(OneOptimizer):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 4:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    module = Fails()
    with pytest.raises(ZeroDivisionError):
        trained(module, LookaheadCallback(k=3))
    assert hooks(module.kept[0]) == 0


def test_a_fit_that_is_refused_for_one_optimizer_leaves_no_hook_on_another():
    class Half(OneOptimizer):
        def configure_optimizers(self):
            first = super().configure_optimizers()
            return [first, torch.optim.SGD(nn.Linear(2, 2, device="meta").parameters(), lr=0.1)]

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    module = Half()
    with pytest.raises(ValueError, match="parameters without values"):
        trained(module, LookaheadCallback(k=3))
    assert hooks(module.kept[0]) == 0


class Shared(Regression):
    """Two optimizers, the second of which trains the last layer, too."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return super().configure_optimizers(), torch.optim.Adam(self.net[2].parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch_idx))
            optimizer.step()


@pytest.mark.parametrize("sync_optimizers", ["independently", "together"])
def test_a_parameter_in_two_optimizers_has_one_slow_tensor_of_the_first(sync_optimizers):
    callback, module = LookaheadCallback(k=2, sync_optimizers=sync_optimizers), Shared()
    with pytest.warns(UserWarning, match=r"'net.2.weight' and 1 more are in several optimizers. .* optimizer 0"):
        trained(module, callback, max_epochs=1, max_steps=-1)
    first, second = callback.slow_weights
    assert (len(first.values("slow")), len(second.values("slow"))) == (4, 0)
    assert (first.steps, first.syncs, second.steps, second.syncs) == (5, 2, 5, 2)


@pytest.mark.filterwarnings("ignore:.*in several optimizers")
@pytest.mark.parametrize("sync_optimizers", ["independently", "together"])
def test_at_alpha_one_shared_parameters_are_trained_as_without_us(sync_optimizers):
    own = LookaheadCallback(k=1, alpha=1.0, sync_optimizers=sync_optimizers)
    ends = [trained(Shared(), *callbacks, max_epochs=2, max_steps=-1)[1] for callbacks in ([], [own])]
    assert equal(*ends)


class Toggled(Regression):
    """A game of two players as Lightning's documentation writes it: in each one's turn the other is frozen."""

    toggles = True

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[index].parameters(), lr=0.05, momentum=0.9) for index in (0, 2)]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            if self.toggles:
                self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch_idx))
            optimizer.step()
            if self.toggles:
                self.untoggle_optimizer(optimizer)


def test_players_that_are_toggled_are_pulled_back_together():
    ends, syncs = [], []
    for toggles in (True, False):
        callback, module = LookaheadCallback(k=2, sync_optimizers="together"), Toggled()
        module.toggles = toggles
        ends.append(trained(module, callback, max_epochs=1, max_steps=-1)[1])
        syncs.append([slow.syncs for slow in callback.slow_weights])
    assert equal(*ends)
    assert syncs == [[2, 2], [2, 2]]


def test_the_last_sync_is_done_although_nothing_is_left_to_train():
    callback, module = LookaheadCallback(k=3, unfinished_cycle="sync"), Regression()
    last = ModelCheckpoint(".", "{step}", every_n_train_steps=1, save_top_k=-1)
    trained(module, callback, last)
    again, resumed = LookaheadCallback(k=3, unfinished_cycle="sync"), Regression()
    trained(resumed, again, ckpt_path="step=8.ckpt")
    assert equal(resumed.weights(), module.weights())
    assert callback.slow_weights[0].syncs == again.slow_weights[0].syncs == 3


def test_the_sweep_of_a_learning_rate_finder_is_not_left_in_the_module_by_an_exception():
    class Fails(Callback):
        def on_fit_start(self, trainer, pl_module):
            raise ZeroDivisionError

    module = Regression(batches=30)
    module.lr = 0.05
    start = module.weights()
    trainer = make_trainer(LearningRateFinder(num_training_steps=5), LookaheadCallback(k=3), Fails(), max_epochs=1)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module)
    assert equal(module.weights(), start)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "NAdam", "Adagrad", "Rprop", "ASGD", "RAdam"])
@pytest.mark.parametrize("mode", ["none", "reset"])
def test_a_file_trains_on_without_the_callback_and_then_holds_nothing_of_ours(optimizer, mode):
    save = ModelCheckpoint(".", "{step}", every_n_train_steps=1, save_top_k=-1)
    trained(Regression(optimizer), LookaheadCallback(k=3, pullback_momentum=mode), save, max_steps=4)
    for step in (2, 3, 4):
        with pytest.warns(UserWarning, match="Please add the following callbacks"):
            trainer, _ = trained(Regression(optimizer), ckpt_path=f"step={step}.ckpt", max_steps=6)
        trainer.save_checkpoint("without.ckpt")
        (state,) = torch.load("without.ckpt", weights_only=True)["optimizer_states"]
        assert state.keys() == {"state", "param_groups"}
        plain, _ = trained(Regression(optimizer), max_steps=6)
        assert [list(own) for own in state["state"].values()] == [
            list(own) for own in plain.optimizers[0].state_dict()["state"].values()
        ]


def test_the_optimizers_states_in_a_checkpoint_are_those_of_the_run_without_us():
    states = []
    for own in ([], [LookaheadCallback(k=1, alpha=1.0)]):
        trainer, _ = trained(Regression("Adam"), *own, max_steps=5)
        trainer.save_checkpoint("run.ckpt")
        states.append(torch.load("run.ckpt", weights_only=True)["optimizer_states"][0])
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for mine, its in zip(states[0]["state"].values(), states[1]["state"].values(), strict=True):
        assert list(mine) == list(its)
        assert all(torch.equal(mine[name], its[name]) for name in its)


# -- other callbacks


def test_what_pruning_writes_after_the_last_step_is_in_both_sets():
    def lottery():
        return ModelPruning(
            prune.L1Unstructured, parameter_names=["weight"], amount=0.5, use_lottery_ticket_hypothesis=True
        )

    ends = [
        trained(Regression(), *own, lottery(), max_epochs=2, max_steps=-1)[0].lightning_module.state_dict()
        for own in ([], [LookaheadCallback(k=1, alpha=1.0)])
    ]
    assert ends[0].keys() == ends[1].keys()
    assert equal(ends[0].values(), ends[1].values())


def test_pruned_weights_are_resumed_in_mid_cycle():
    def run(ckpt_path=None):
        callback, module = LookaheadCallback(k=4), Regression(batches=5)
        every = ModelCheckpoint(".", "{step}", every_n_train_steps=1, save_top_k=-1)
        pruning = ModelPruning(prune.L1Unstructured, parameter_names=["weight"], amount=0.5)
        seen = []

        class Start(Callback):
            def on_train_start(self, trainer, pl_module):
                seen.extend(both(callback, pl_module))

        trained(module, callback, pruning, every, Start(), max_epochs=2, max_steps=-1, ckpt_path=ckpt_path)
        return seen

    run()
    assert sorted(load_weights("step=7.ckpt", "fast")) == sorted(Regression().state_dict())
    theta, phi = run("step=7.ckpt")  # three steps into a cycle, pruned after the fifth
    fast, slow = load_weights("step=7.ckpt", "fast"), load_weights("step=7.ckpt", "slow")
    names = [name for name, _ in Regression().named_parameters()]
    assert equal(theta, [fast[name] for name in names])
    assert equal(phi, [slow[name] for name in names])
    assert not equal(theta, phi)


# -- what is asked for


def test_statistics_from_an_endless_stream_want_a_number():
    class Endless(IterableDataset):
        def __iter__(self):
            generator = torch.Generator().manual_seed(0)
            while True:
                x = torch.randn(4, generator=generator)
                yield x, (x[0] > 0).long()

    class Streamed(Classifier):
        def train_dataloader(self):
            return DataLoader(Endless(), batch_size=8)

    settings = {"max_steps": 4, "limit_val_batches": 1, "val_check_interval": 2}
    with pytest.raises(ValueError, match="they never end: say from how many, recalibrate_batch_norm=100"):
        make_trainer(LookaheadCallback(k=2, recalibrate_batch_norm=True), **settings).fit(Streamed())
    make_trainer(LookaheadCallback(k=2, recalibrate_batch_norm=3), **settings).fit(Streamed())


def test_two_callbacks_in_one_trainer_are_refused_before_the_fit_in_our_words():
    trainer = Trainer(callbacks=[LookaheadCallback(), LookaheadCallback()], logger=False, accelerator="cpu")
    with pytest.raises(ValueError, match="second LookaheadCallback, which would pull back twice"):
        trainer.fit(Regression())


def test_a_module_without_a_name_for_a_parameter_is_saved_by_its_place():
    outside = nn.Linear(3, 2).to(torch.float64)

    class Elsewhere(Regression):
        def __init__(self):
            super().__init__()
            self.hidden = [outside]

        def configure_optimizers(self):
            return torch.optim.SGD([*self.net.parameters(), *outside.parameters()], lr=0.05)

    callback = LookaheadCallback(k=3)
    trainer, _ = trained(Elsewhere(), callback, max_steps=4)
    trainer.save_checkpoint("places.ckpt")
    (state,) = torch.load("places.ckpt", weights_only=True)["callbacks"]["LookaheadCallback"]["optimizers"]
    assert list(state["checksums"]["slow"])[-2:] == ["[4]", "[5]"]


def test_what_slow_weights_wait_for_is_let_go_when_training_goes_on():
    module = Regression()
    optimizer = module.configure_optimizers()
    slow = SlowWeights(optimizer, k=3)
    slow.load_state_dict(slow.state_dict())
    assert slow.persistence.pending is not None
    module.loss(0).backward()
    optimizer.step()
    assert slow.persistence.pending is None
