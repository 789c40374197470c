"""What is refused before training."""

import re

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_lookahead import LookaheadCallback, SlowWeights
from tests.helpers.runs import Regression, make_trainer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, r"k=0 .* integer of at least 1"),
        ({"alpha": 10**400}, r"alpha=1000.* \(0, 1\]"),
        ({"eval_weights": ["slow"]}, r"eval_weights=\['slow'\] is unknown"),
        ({"k": 2.5}, r"k=2.5 .* integer of at least 1"),
        ({"alpha": 0.0}, r"alpha=0.0 .*\(0, 1\]"),
        ({"alpha": 1.5}, r"alpha=1.5 .*\(0, 1\]"),
        ({"alpha": float("nan")}, r"alpha=nan .*\(0, 1\]"),
        ({"eval_weights": "average"}, "eval_weights='average' is unknown: give 'slow'"),
        ({"pullback_momentum": "restart"}, "pullback_momentum='restart' is unknown: give 'none'"),
    ],
)
def test_bad_arguments_are_refused_with_name_value_and_range(settings, message):
    with pytest.raises(ValueError, match=message):
        LookaheadCallback(**settings)


def test_numbers_of_numpy_are_numbers():
    callback = LookaheadCallback(k=np.int64(3), alpha=np.float32(0.5))
    assert (callback.settings.k, callback.settings.alpha) == (3, 0.5)
    assert (type(callback.settings.k), type(callback.settings.alpha)) == (int, float)


class Refused(Regression):
    def training_step(self, batch, batch_idx):
        pytest.fail("training began")


def refused(error, match, *own, module=None, **settings):
    with pytest.raises(error, match=match):
        make_trainer(*(own or (LookaheadCallback(),)), max_steps=1, **settings).fit(module or Refused())


def test_a_second_callback_is_refused():
    class Mine(LookaheadCallback):
        pass

    refused(ValueError, "a second LookaheadCallback", LookaheadCallback(), Mine())
    refused(ValueError, "a second LookaheadCallback", LookaheadCallback(), LookaheadCallback())


def with_optimizer(configure):
    class Configured(Refused):
        def configure_optimizers(self):
            return configure(self)

    return Configured()


def test_optimizers_that_cannot_be_looked_ahead_with_are_refused():
    class Lookahead(torch.optim.SGD):
        pass

    refused(ValueError, "pull back twice", module=with_optimizer(lambda module: Lookahead(module.parameters(), lr=1)))

    class Duck:
        param_groups, defaults, state = [], {}, {}

        def step(self, closure=None): ...

        def zero_grad(self): ...

        def state_dict(self): ...

        def load_state_dict(self, state_dict): ...

    refused(TypeError, "it must be a torch.optim.Optimizer", module=with_optimizer(lambda _: Duck()))


def test_a_lazy_module_is_refused_with_the_way_out():
    class Lazy(Refused):
        def __init__(self):
            super().__init__()
            self.net = nn.LazyLinear(2)

    refused(ValueError, "by running a batch through it", module=Lazy())


def test_slow_weights_of_ones_own_beside_the_callback_are_refused():
    def doubled(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=1)
        module.slow = SlowWeights(optimizer)
        return optimizer

    refused(ValueError, "has slow weights already", module=with_optimizer(doubled))


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "XLAStrategy", "XLAFSDPStrategy", "SingleDeviceXLAStrategy"])
def test_strategies_that_are_not_supported_are_refused_by_name(name):
    # The real ones ask for packages and devices of their own before any callback has a say.
    class Disguise(Callback):
        def setup(self, trainer, pl_module, stage):
            trainer.strategy.__class__ = type(name, (type(trainer.strategy),), {})

    refused(ValueError, f"strategy={name}: .* Use one device, 'ddp', 'fsdp'", Disguise(), LookaheadCallback())


@pytest.mark.parametrize("argument", ["pullback_momentum", "unfinished_cycle", "sync_optimizers", "nonfinite"])
def test_unknown_choices_are_refused(argument):
    with pytest.raises(ValueError, match=f"{argument}='what' is unknown: give '"):
        LookaheadCallback(**{argument: "what"})


def test_a_start_that_is_no_number_of_steps_is_refused():
    for wrong in (-1, 1.5, True, np.array([1, 2])):
        with pytest.raises(ValueError, match=re.escape(f"start_step={wrong!r} is out of range")):
            LookaheadCallback(start_step=wrong)
