"""Groups with a k and an alpha of their own, and parameters that are left alone."""

import pytest
import torch

from lightning_lookahead import LookaheadCallback, load_weights
from tests.helpers.oracle import lookahead
from tests.helpers.runs import Regression, both, equal, fit


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


def test_a_wider_exclude_is_resumed():
    callback = LookaheadCallback(k=3)
    fit(callback, max_steps=4)[1].save_checkpoint("stop.ckpt")
    with pytest.warns(UserWarning, match="exclude was"):
        module, _ = fit(LookaheadCallback(k=3, exclude="net.0.*"), ckpt_path="stop.ckpt")
    assert all(value.isfinite().all() for value in module.weights())
