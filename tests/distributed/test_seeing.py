"""The monitor and the comparison in several real processes."""

import pytest

from lightning_lookahead import compare_weights, load_weights
from tests.distributed.seeing_worker import check_ddp, check_sharded
from tests.helpers.runs import make_trainer
from tests.helpers.sharded import Sharded


class Whole(Sharded):
    """The module of the worker, in one process."""

    def configure_model(self):
        pass


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2", "fsdp2_full"])
def test_looking_at_the_weights_of_all_ranks_changes_nothing(kind, ranks):
    ranks(2, check_sharded, kind, "run.ckpt")
    one = compare_weights(make_trainer(limit_val_batches=1), Whole("SGD", kind), ckpt_path="run.ckpt")
    for weights in ("slow", "fast"):
        module = Whole("SGD", kind)
        module.load_state_dict(load_weights("run.ckpt", weights))
        assert getattr(one, weights) == {"val_loss": pytest.approx(module.loss(1000).item(), rel=1e-6)}
    assert one.slow != one.fast


def test_under_ddp_the_numbers_are_those_of_all_the_data_with_the_first_rank_s_statistics(ranks):
    ranks(2, check_ddp)
