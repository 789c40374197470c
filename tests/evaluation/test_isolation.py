"""A run does not notice that it is evaluated."""

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from torchmetrics import (
    CatMetric,
    MeanMetric,
    MeanSquaredError,
)

from lightning_lookahead import InnerOuterMonitor
from lightning_lookahead.evaluation.isolation import isolated
from tests.helpers.classifier import Classifier, Manual, everything, images, same
from tests.helpers.monitoring import fit
from tests.helpers.runs import equal

RUNS = {
    "plain": {},
    "validated in the middle": {"val_check_interval": 2},
    "accumulated": {"accumulate_grad_batches": 2},
    "mixed precision": {"precision": "bf16-mixed"},
    "double precision": {"precision": "64-true"},
}


def end(model_class, monitor, **settings):
    torch.manual_seed(7)
    model = model_class(generator=torch.Generator().manual_seed(3))  # shared by training and validation data
    modes, tensors = [], []

    def keep(*_):
        modes.append([part.training for part in model.modules()])
        tensors.extend(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)

    model.on_train_batch_end = keep
    trainer = fit(model, monitor, max_epochs=2, **settings)
    with trainer.callbacks[0].use_weights("fast"):
        state = everything(model)
    tensors += [entry["momentum_buffer"] for entry in trainer.optimizers[0].state.values()]
    return [*state, model.order, modes, model.generator.get_state()], tensors, trainer.callback_metrics


def assert_same(watched, plain):
    for left, right in zip(watched[0], plain[0], strict=True):
        assert same(left, right)
    assert equal(watched[1], plain[1])
    assert len(plain[1]) > 20
    assert watched[2]["accuracy"] == plain[2]["accuracy"]


@pytest.mark.parametrize(
    ("model_class", "name"),
    # Lightning accumulates in automatic optimization only
    [*((Classifier, name) for name in RUNS), *((Manual, name) for name in RUNS if name != "accumulated")],
)
def test_a_run_is_bit_for_bit_the_same_with_it(model_class, name):
    settings = RUNS[name]
    monitor = InnerOuterMonitor(updates=9, every_n_syncs=4)
    assert_same(end(model_class, monitor, **settings), end(model_class, None, **settings))
    assert len(monitor.history) > 10


def rude(module, batch):
    x, y = batch
    module.train()
    module.training_accuracy(module(x + torch.rand(())), y)
    module.eval()
    return module(x), y


def test_a_step_function_that_draws_and_moves_statistics_changes_nothing_either():
    assert_same(end(Classifier, InnerOuterMonitor(updates=9, step=rude)), end(Classifier, None))


def test_workers_that_the_validation_keeps_are_left_alone():
    class Working(Classifier):
        def val_dataloader(self):
            return DataLoader(images(40, 3), batch_size=20, num_workers=1, persistent_workers=True)

    monitor = InnerOuterMonitor(updates=6, every_n_syncs=3, batches=1)
    assert_same(end(Working, monitor), end(Working, None))
    assert len(monitor.history) > 10


def run_both(make, **settings):
    """The end of a run with the monitor and without, of models that ``make`` gives."""
    ends = []
    for monitor in (InnerOuterMonitor(updates=6, every_n_syncs=2, data=settings.get("data")), None):
        torch.manual_seed(7)
        model = make()
        own = {name: value for name, value in settings.items() if name != "data"}
        trainer = fit(model, monitor, **{"max_epochs": 3, **own})
        with trainer.callbacks[0].use_weights("fast"):
            ends.append([*model.weights(), torch.get_rng_state(), torch.tensor(model.order)])
    return ends


class DrawingData(Classifier):
    """Draws random numbers when it is asked for its validation data, and says when that was."""

    def val_dataloader(self):
        self.order.append(1000.0 + self.trainer.current_epoch)
        indices = torch.randperm(40)[:20].tolist()
        return DataLoader(torch.utils.data.Subset(images(40, 3), indices), batch_size=10)


@pytest.mark.parametrize("settings", [{"check_val_every_n_epoch": 2}, {"reload_dataloaders_every_n_epochs": 1}])
def test_validation_data_that_are_drawn_when_they_are_loaded_are_loaded_when_they_would_be(settings):
    watched, plain = run_both(DrawingData, **settings, max_epochs=4)
    # the monitor may ask for data of its own, but draws nothing for the run
    kept = [value for value in watched[-1].tolist() if value < 1000]
    assert kept == [value for value in plain[-1].tolist() if value < 1000]
    assert equal(watched[:-1], plain[:-1])


class NoisyMetric(MeanSquaredError):  # noqa: N818 (a mean squared error is no exception)
    def compute(self):
        return super().compute() + 0 * torch.rand(())


def test_a_metric_that_draws_when_it_is_computed_changes_nothing():
    ends = []
    for monitor in (
        InnerOuterMonitor(updates=6, metric=NoisyMetric(), step=lambda m, b: (m(b[0])[:, 0], b[1].float())),
        None,
    ):
        torch.manual_seed(7)
        model = Classifier()
        fit(model, monitor)
        ends.append([*model.weights(), torch.get_rng_state()])
    assert equal(*ends)


class Buffered(Classifier):
    """Has buffers that cannot be written to in place, are shared, and are replaced in a forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(1, 4).expand(3, 4))
        self.register_buffer("count", torch.zeros(()))
        self.net[1].register_buffer("count", self.count)

    def forward(self, x):
        self.count = self.count + 1
        return self.net(x * self.mask[0])


def test_buffers_that_are_expanded_shared_or_replaced_are_the_same_objects_afterwards():
    watched, plain = run_both(Buffered)
    assert equal(watched, plain)
    model = Buffered()
    before = list(model.named_buffers(remove_duplicate=False))
    with isolated(model):
        model(torch.ones(2, 4))
        model.net[1].count += 5
        assert model.mask.data_ptr() != before[0][1].data_ptr()
    after = list(model.named_buffers(remove_duplicate=False))
    assert all(name == other and now is then for (name, now), (other, then) in zip(after, before, strict=True))
    assert model.count == 0


def test_a_backward_that_is_yet_to_come_does_not_notice():
    class Pending(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.register_buffer("scale", torch.ones(()))

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            loss = (self.net[4](torch.ones(2, 8)) * self.scale).square().mean()
            other = (self.net[0](batch[0]) * self.scale).square().mean()
            self.manual_backward(other)
            first.step()
            self.manual_backward(loss)
            second.step()
            for optimizer in (first, second):
                optimizer.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[part].parameters(), lr=0.1) for part in (0, 4)]

    assert equal(*run_both(Pending))


def test_what_metrics_have_gathered_is_put_back_also_lists_and_cached_results():
    class Gathering(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.all, self.off = MeanMetric(), CatMetric(), nn.Linear(1, 1).eval()

    module = Gathering()
    for metric in (module.mean, module.all):
        metric.update(torch.tensor([1.0, 3.0]))
    first = module.mean.compute()
    with isolated(module):
        module.train()
        for metric in (module.mean, module.all):
            metric.update(torch.tensor([100.0]))
            metric(torch.tensor([100.0]))
        module.all.reset()
    assert module.mean.compute() == first == 2.0
    assert module.mean.update_count == module.all.update_count == 1
    assert module.all.compute().tolist() == [1.0, 3.0]
    assert module.training
    assert not module.off.training


@pytest.mark.parametrize("where", ["loader", "sampler", "batch sampler", "attribute", "attribute's loader"])
def test_generators_of_loaders_and_modules_are_put_back(where):
    generator = torch.Generator().manual_seed(1)
    data, plain = images(8, 1), RandomSampler(range(8))
    sampler = RandomSampler(range(8), generator=generator)
    loader = {
        "loader": lambda: DataLoader(data, generator=generator, sampler=plain),
        "sampler": lambda: DataLoader(data, sampler=sampler),
        "batch sampler": lambda: DataLoader(data, batch_sampler=BatchSampler(sampler, 2, drop_last=False)),
    }.get(where, lambda: DataLoader(data, shuffle=True, generator=generator))()
    module = nn.Linear(1, 1)
    if where == "attribute":
        module.generator = generator
    if where == "attribute's loader":
        module.loader = loader
    before = generator.get_state()
    with isolated(module, [] if "attribute" in where else [loader]):
        list(loader)
        assert not torch.equal(generator.get_state(), before)
    assert torch.equal(generator.get_state(), before)


def test_after_a_manual_fit_no_hook_is_left_on_the_optimizer():
    trainer = fit(Manual(), None)
    (optimizer,) = trainer.optimizers
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
