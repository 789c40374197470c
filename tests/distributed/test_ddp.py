"""Two real processes under DDP."""

import pytest
import torch

from lightning_lookahead import LookaheadCallback
from tests.distributed.ddp_worker import agree_and_issue_no_collective
from tests.helpers.oracle import lookahead
from tests.helpers.runs import Regression, both, equal, inputs, make_trainer, reference


def test_ranks_agree_bit_for_bit_and_a_sync_issues_no_collective(ranks):
    ranks(2, agree_and_issue_no_collective)
    module = Regression()
    optimizer = module.configure_optimizers()

    def inner_step(step):  # the mean over both ranks' data
        optimizer.zero_grad()
        (sum((module.net(inputs(step * 7 + rank)) - 1).square().mean() for rank in range(2)) / 2).backward()
        optimizer.step()

    phi = lookahead(list(module.net.parameters()), inner_step, k=3, alpha=0.5, steps=8)
    for ours, expected in zip(torch.load("ddp.pt", weights_only=True), (module.weights(), phi), strict=True):
        for mine, exact in zip(ours, expected, strict=True):
            assert (mine - exact).abs().max() < 1e-14  # the ranks' gradients are summed in another order


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processes_started_from_within_return_phi(start):
    callback, module = LookaheadCallback(k=3), Regression()
    make_trainer(callback, max_steps=8, strategy=f"ddp_{start}", devices=1).fit(module)
    assert equal(module.weights(), reference(8)[1])
    with pytest.raises(RuntimeError, match="in the process that trains"):
        both(callback, module)
