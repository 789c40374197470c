"""Each option by itself: syncs and parameters of a fit, by numbers."""

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_lookahead import LookaheadCallback
from lightning_lookahead.trainer.rank_check import check_ranks
from tests.helpers.runs import make_trainer


def train(model, **options):
    """Syncs and parameters of each optimizer after seven batches."""
    callback = LookaheadCallback(k=5, **options)
    make_trainer(callback, limit_train_batches=7, max_epochs=1).fit(model)
    return [(slow.syncs, len(slow.values("slow"))) for slow in callback.slow_weights]


@pytest.mark.parametrize(
    ("options", "expected"), [({}, (1, 2)), ({"unfinished_cycle": "sync"}, (2, 2)), ({"exclude": "*.weight"}, (1, 1))]
)
def test_a_last_cycle_of_two_steps_is_dropped_or_synced_and_the_weight_is_left_alone(options, expected):
    assert train(BoringModel(), **options) == [expected]


def test_options_work_together():
    assert train(BoringModel(), unfinished_cycle="sync", exclude="*.weight") == [(2, 1)]


class Two(BoringModel):
    """The second optimizer takes two steps in each batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in (first, second, second):
            optimizer.zero_grad()
            self.manual_backward(self(batch).sum())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD([parameter], lr=0.1) for parameter in self.parameters()]


@pytest.mark.parametrize(
    ("sync_optimizers", "expected"), [("independently", [(1, 1), (2, 1)]), ("together", [(1, 1), (1, 1)])]
)
def test_two_optimizers_sync_each_by_itself_or_together(sync_optimizers, expected):
    assert train(Two(), sync_optimizers=sync_optimizers) == expected


def test_ranks_without_a_trained_parameter_agree():
    check_ranks({}, torch.device("cpu"))
