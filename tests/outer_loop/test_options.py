"""Each option by itself: what it makes of phi in a few steps, by numbers."""

import pytest
import torch
from torch import nn

from lightning_lookahead import SlowWeights


def end(*, group=None, dtype=torch.float64, **options):
    """phi after five steps with momentum down the slope of a square."""
    weight = nn.Parameter(torch.ones(1, dtype=dtype))
    optimizer = torch.optim.SGD([{"params": [weight], **(group or {})}], lr=0.25, momentum=0.5)
    slow = SlowWeights(optimizer, **{"k": 2, **options})
    for _ in range(5):
        optimizer.zero_grad()
        (weight**2).sum().backward()
        optimizer.step()
    return slow.values("slow")[weight].item()


@pytest.mark.parametrize(
    ("options", "phi"),
    [
        ({}, 0.125),
        ({"start_step": 2}, -0.125),
        ({"pullback_momentum": "reset"}, 0.25),
        ({"pullback_momentum": "pullback"}, 0.1875),
        ({"alpha": lambda sync: 1.0 if sync else 0.5}, -0.25),
        ({"k": lambda sync: 3 if sync else 1}, 0.21875),
        ({"group": {"lookahead_k": 5, "lookahead_alpha": 0.8}}, 0.1),
        ({"dtype": torch.bfloat16, "alpha": 0.3}, 0.41441),
        ({"dtype": torch.bfloat16, "alpha": 0.3, "slow_dtype": "bfloat16"}, 0.41406),
    ],
    ids=["as it is", "late", "reset", "pullback", "alpha", "k", "group", "bfloat16", "bfloat16 throughout"],
)
def test_phi_after_five_steps(options, phi):
    assert round(end(**options), 5) == phi


def test_a_weight_that_blew_up_is_refused_and_restored_by_slow_weights_on_the_cpu():
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([weight], lr=0.25)
    slow = SlowWeights(optimizer, k=2)
    for _ in range(2):  # down the slope of a square: 1 -> 0.5 -> 0.25, then half the way back
        optimizer.zero_grad()
        (weight**2).sum().backward()
        optimizer.step()
    assert (weight.item(), slow.syncs) == (0.625, 1)

    def blow_up():
        with torch.no_grad():
            weight.fill_(float("inf"))

    blow_up()
    with pytest.raises(
        RuntimeError, match=r"Parameter 0 of the optimizer, of shape \(1,\), has a value that is NaN or infinite"
    ):
        slow.sync()
    assert slow.values("slow")[weight].item() == 0.625
    slow.close()
    with torch.no_grad():
        weight.fill_(0.5)
    slow = SlowWeights(optimizer, k=9, nonfinite="restore", slow_device="cpu")
    optimizer.step()
    blow_up()
    with pytest.warns(UserWarning, match="no sync"):
        slow.sync()
    assert weight.item() == 0.5
    assert slow.values("slow")[weight].device == torch.device("cpu")


@pytest.mark.parametrize(("buffers", "mean"), [("keep", 0.38), ("sync", 0.29)])
def test_the_running_mean_of_batch_norm_after_two_syncs_without_the_bias(buffers, mean):
    net = nn.BatchNorm1d(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    slow = SlowWeights(optimizer, k=1, module=net, buffers=buffers, exclude=[net.bias])
    for _ in range(2):
        net(torch.tensor([[1.0], [3.0]])).sum().backward()
        optimizer.step()
    assert round(net.running_mean.item(), 2) == mean
    assert net.bias not in slow.values("slow")
    assert net.weight in slow.values("slow")
