"""The monitor and the comparison in several real processes."""

from pathlib import Path

import pytest
from runs import make_trainer
from sharded_worker import Sharded
from test_resume import run

from lightning_lookahead import compare_weights, load_weights

WORKER = Path(__file__).with_name("seeing_worker.py")


class Whole(Sharded):
    """The module of the worker, in one process."""

    def configure_model(self):
        pass


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2", "fsdp2_full"])
def test_looking_at_the_weights_of_all_ranks_changes_nothing(kind):
    assert run(WORKER, kind, "run.ckpt", processes=2).count("nothing was disturbed") == 2
    one = compare_weights(make_trainer(limit_val_batches=1), Whole("SGD", kind), ckpt_path="run.ckpt")
    for weights in ("slow", "fast"):
        module = Whole("SGD", kind)
        module.load_state_dict(load_weights("run.ckpt", weights))
        assert getattr(one, weights) == {"val_loss": pytest.approx(module.loss(1000).item(), rel=1e-6)}
    assert one.slow != one.fast


def test_under_ddp_the_numbers_are_those_of_all_the_data_with_the_first_rank_s_statistics():
    assert run(WORKER, "ddp_classifier", "run.ckpt", processes=2).count("nothing was disturbed") == 2
