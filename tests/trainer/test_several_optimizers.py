"""Several optimizers: each by itself, or all together."""

import math

import pytest
import torch
from torch import nn

from lightning_lookahead import LookaheadCallback
from tests.helpers.runs import Regression, fit, make_trainer


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
