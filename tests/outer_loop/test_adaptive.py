"""Proposition 1: the step size that a quadratic model of the loss calls best."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_lookahead import AdaptiveAlpha, LookaheadCallback, SlowWeights
from tests.helpers.classifier import Classifier, Manual, everything, same
from tests.helpers.problem import Problem
from tests.helpers.runs import Regression, equal, logged_by, make_trainer


class Bowl:
    """f(w) = w·A w / 2 - b·w, with gradients that are exact."""

    def __init__(self, seed=0, size=6):
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(size, size, dtype=torch.float64, generator=generator)
        self.A = root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)
        self.b = torch.randn(size, dtype=torch.float64, generator=generator)
        self.weight = nn.Parameter(torch.randn(size, dtype=torch.float64, generator=generator))
        self.best = torch.linalg.solve(self.A, self.b)

    def loss(self):
        return self.weight @ self.A @ self.weight / 2 - self.b @ self.weight

    def optimal(self, start, end):
        """Proposition 1 as the paper states it."""
        way = start - end
        return ((start - self.best) @ self.A @ way / (way @ self.A @ way)).item()

    def descend(self, optimizer):
        optimizer.zero_grad()
        self.loss().backward()
        optimizer.step()


@pytest.mark.parametrize("curvature", ["secant", "hvp"])
@pytest.mark.parametrize("seed", range(4))
def test_on_a_quadratic_it_is_the_optimum_of_proposition_1(seed, curvature):
    bowl, twin = Bowl(seed), Bowl(seed)
    rate = 1.9 / torch.linalg.eigvalsh(bowl.A).max().item()
    optimizer, plain = (torch.optim.SGD([it.weight], lr=rate, momentum=0.5) for it in (bowl, twin))
    slow = SlowWeights(optimizer, 3, AdaptiveAlpha(curvature, alpha_low=1e-6), loss=bowl.loss)
    for _ in range(4):
        start = twin.weight.detach().clone()
        for _ in range(3):
            bowl.descend(optimizer)
            twin.descend(plain)
        alpha = min(max(twin.optimal(start, twin.weight.detach()), 1e-6), 1.0)
        assert slow.alpha.last == pytest.approx(alpha, rel=1e-9)
        with torch.no_grad():
            twin.weight.copy_(start.lerp(twin.weight, slow.alpha.last))
        assert torch.equal(bowl.weight, twin.weight)


@pytest.mark.parametrize("curvature", ["secant", "hvp"])
def test_the_bounds_hold(curvature):
    for rate, expected in ((1e-6, 1.0), (40.0, 0.25)):
        bowl = Bowl()
        optimizer = torch.optim.SGD([bowl.weight], lr=rate)
        slow = SlowWeights(optimizer, 1, AdaptiveAlpha(curvature, alpha_low=0.25), loss=bowl.loss)
        bowl.descend(optimizer)
        assert slow.alpha.last == expected


@pytest.mark.parametrize("uphill", [False, True])
@pytest.mark.parametrize("curvature", ["secant", "hvp"])
def test_where_the_loss_is_not_curved_upwards_the_way_it_falls_decides(curvature, uphill):
    weight = nn.Parameter(torch.tensor([1.0, -0.5], dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.1, maximize=uphill)
    slow = SlowWeights(optimizer, 1, AdaptiveAlpha(curvature, 0.3), loss=lambda: -(weight**2).sum())
    (-(weight**2).sum()).backward()
    optimizer.step()
    assert slow.alpha.last == (0.3 if uphill else 1.0)


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
@pytest.mark.parametrize("curvature", ["fisher", "sqrt_fisher"])
def test_second_moments_of_the_optimizer_are_the_curvature(optimizer_class, curvature):
    bowl = Bowl()
    optimizer = optimizer_class([bowl.weight], lr=0.1)
    slow = SlowWeights(optimizer, 3, AdaptiveAlpha(curvature, alpha_low=1e-9))
    start, squares = bowl.weight.detach().clone(), []
    for step in range(3):
        optimizer.zero_grad()
        bowl.loss().backward()
        squares.append(bowl.weight.grad**2)
        if step == 2:
            before = [bowl.weight.detach().clone(), copy.deepcopy(optimizer.state_dict())]
        optimizer.step()
    other = nn.Parameter(before[0])  # theta, without a sync
    twin = optimizer_class([other], lr=0.1)
    twin.load_state_dict(before[1])
    other.grad = bowl.weight.grad.clone()
    twin.step()
    way = other.detach() - start
    second = {
        torch.optim.Adam: sum(0.001 * 0.999 ** (2 - i) * square for i, square in enumerate(squares)) / (1 - 0.999**3),
        torch.optim.RMSprop: sum(0.01 * 0.99 ** (2 - i) * square for i, square in enumerate(squares)),
        torch.optim.Adagrad: sum(squares) / 3,
    }[optimizer_class]
    second = second.sqrt() if curvature == "sqrt_fisher" else second
    expected = 1 - (bowl.weight.grad @ way / (way @ (second * way))).item()
    assert slow.alpha.last == pytest.approx(min(max(expected, 1e-9), 1.0), rel=1e-9)


def test_a_parameter_that_the_loss_does_not_reach_counts_as_flat():
    bowl, other = Bowl(), nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([{"params": [bowl.weight]}, {"params": [other]}], lr=0.05)
    slow = SlowWeights(optimizer, 1, AdaptiveAlpha("hvp", 1e-6), loss=bowl.loss)
    start = bowl.weight.detach().clone()
    bowl.descend(optimizer)
    end = start - 0.05 * (bowl.A @ start - bowl.b)
    assert slow.alpha.last == pytest.approx(min(bowl.optimal(start, end), 1.0), rel=1e-9)


# -- in a Trainer


def fit(alpha, model=None, steps=8, ckpt_path=None, **settings):
    torch.manual_seed(7)
    model = model or Classifier(batches=12)
    callback = LookaheadCallback(k=3, alpha=alpha, log_syncs=True)
    trainer = make_trainer(callback, max_steps=steps, max_epochs=9, **settings)
    trainer.fit(model, ckpt_path=ckpt_path)
    return trainer, model, callback


@pytest.mark.parametrize("curvature", ["secant", "hvp"])
def test_it_is_logged_and_what_training_logs_stays_as_it_is(curvature):
    class Logging(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss, on_step=True)
            return {"loss": loss}

    logger, other = CSVLogger(".", name="log"), CSVLogger(".", name="other")
    fit(AdaptiveAlpha(curvature), Logging(batches=12, lr=0.3), logger=logger, log_every_n_steps=1)
    rows = logged_by(logger)
    alphas = {row["lookahead/alpha"] for row in rows if row.get("lookahead/alpha")}
    assert len(alphas) > 1
    assert all(0.1 <= float(alpha) <= 1 for alpha in alphas)
    fit(1.0, Logging(batches=12, lr=0.3), steps=3, logger=other, log_every_n_steps=1)
    losses = [row["train_loss"] for row in rows if row["train_loss"]][:3]
    assert losses == [row["train_loss"] for row in logged_by(other) if row["train_loss"]]


@pytest.mark.parametrize("curvature", ["secant", "hvp"])
def test_its_own_passes_leave_random_numbers_statistics_and_metrics_alone(curvature):
    _, model, _ = fit(AdaptiveAlpha(curvature, alpha_low=1.0))  # bounded to 1: the inner optimizer's own run
    _, plain, _ = fit(1.0)
    for ours, expected in zip(everything(model), everything(plain), strict=True):
        assert same(ours, expected)


@pytest.mark.parametrize("curvature", ["secant", "hvp", "fisher"])
def test_a_checkpoint_names_it(curvature):
    alpha = AdaptiveAlpha(curvature)
    trainer, module, _ = fit(alpha, Regression("Adam", batches=12))
    trainer.save_checkpoint("end.ckpt")
    assert torch.load("end.ckpt", weights_only=True)["callbacks"]["LookaheadCallback"]["alpha"] == repr(alpha)
    assert not equal(fit(0.5, Regression("Adam", batches=12))[1].weights(), module.weights())


# -- what it refuses


def test_what_it_needs_and_does_not_find_is_said_at_once():
    with pytest.raises(ValueError, match="curvature='diagonal' is unknown"):
        AdaptiveAlpha("diagonal")
    with pytest.raises(ValueError, match="alpha_low=0 is out of range"):
        AdaptiveAlpha(alpha_low=0)
    with pytest.raises(ValueError, match=r"needs the training loss.*loss="):
        SlowWeights(Problem().optimizer, alpha=AdaptiveAlpha("hvp"))
    with pytest.raises(ValueError, match="needs an optimizer that keeps second moments, and SGD"):
        SlowWeights(Problem().optimizer, alpha=AdaptiveAlpha("fisher"))
    with pytest.raises(ValueError, match="this module optimizes by hand"):
        fit(AdaptiveAlpha("secant"), Manual())
    fit(0.5, Manual(), steps=-1, max_time={"seconds": 0})


@pytest.mark.parametrize("curvature", ["secant", "hvp"])
def test_with_groups_it_is_the_optimum_along_each_group_s_way(curvature):
    bowl = Bowl(size=4)
    first, second = nn.Parameter(bowl.weight.detach()[:2].clone()), nn.Parameter(bowl.weight.detach()[2:].clone())

    def loss():
        weight = torch.cat([first, second])
        return weight @ bowl.A @ weight / 2 - bowl.b @ weight

    optimizer = torch.optim.SGD([{"params": [first], "lookahead_k": 1}, {"params": [second]}], lr=0.3)
    slow = SlowWeights(optimizer, 3, AdaptiveAlpha(curvature, 1e-6), loss=loss)
    start = first.detach().clone()
    loss().backward()
    gradient = first.grad.clone()
    optimizer.step()
    way = -0.3 * gradient
    gradient_there = (bowl.A @ torch.cat([start + way, second.detach()]) - bowl.b)[:2]
    expected = 1 - (gradient_there @ way / (way @ bowl.A[:2, :2] @ way)).item()
    assert slow.alpha.last == pytest.approx(min(max(expected, 1e-6), 1.0), rel=1e-9)


def test_a_loss_that_is_linear_and_a_group_that_is_frozen_are_no_trouble():
    weight, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    groups = [{"params": [weight]}, {"params": [frozen], "lookahead_k": 2}]
    slow = SlowWeights(optimizer := torch.optim.SGD(groups, lr=0.1), 1, AdaptiveAlpha("hvp", 0.3), loss=weight.sum)
    frozen.requires_grad_(False)
    for _ in range(4):
        optimizer.zero_grad()
        weight.sum().backward()
        optimizer.step()
    assert slow.alpha.last == 1.0
    assert slow.syncs == 4


def test_a_training_step_without_the_index_of_the_batch_will_do():
    class Short(Regression):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    assert fit(AdaptiveAlpha("secant"), Short(batches=12))[2].slow_weights[0].syncs == 2


def test_a_batch_whose_training_step_returned_none_has_no_loss_to_estimate_from():
    class Skips(Regression):
        def training_step(self, batch, batch_idx):
            return None if self.trainer.global_step == 3 else super().training_step(batch, batch_idx)

    class Syncs(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 4:
                trainer.callbacks[0].sync_now()

    callback = LookaheadCallback(k=20, alpha=AdaptiveAlpha("secant", alpha_low=0.3))
    make_trainer(callback, Syncs(), max_steps=6).fit(Skips(batches=9))
    assert callback.slow_weights[0].alpha.last == 0.3
