"""Lookahead in a plain PyTorch loop, saved in the middle of a cycle and resumed. Imports nothing of Lightning.

    python examples/plain_loop.py

trains a small network on scikit-learn's digits with `SlowWeights`, looks at both sets of weights, and trains once more:
stopped two steps after a sync, saved, and gone on with from the file in new objects. Both ends are compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from command_line import stoppable
from lightning_lookahead import SlowWeights

STEPS, STOP = 403, 202
FILE = Path("outputs/plain_loop.pt")

Objects = tuple[nn.Sequential, torch.optim.Optimizer, SlowWeights]


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images of 64 pixels, and what they show."""
    images, labels = load_digits(return_X_y=True)
    return torch.as_tensor(images / 16).float(), torch.as_tensor(labels)


def build() -> Objects:
    """A network, its optimizer, and Lookahead around it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return net, optimizer, SlowWeights(optimizer, k=5, alpha=0.5, module=net)


def train(objects: Objects, data: tuple[Tensor, Tensor], steps: range) -> None:
    """Take some steps. The images of a step depend on its number alone."""
    net, optimizer, _ = objects
    images, labels = data
    for step in steps:
        batch = torch.randint(1347, (32,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()  # in every fifth one the slow weights follow


def accuracy(net: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """On the images that are not trained on."""
    images, labels = (part[1347:] for part in data)
    with torch.no_grad():
        return (net(images).argmax(dim=1) == labels).float().mean().item()


def same(one: SlowWeights, other: SlowWeights) -> bool:
    """Whether both sets of weights are equal, bit for bit."""
    pairs = zip(*([*each.values("fast").values(), *each.values("slow").values()] for each in (one, other)), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@stoppable()
def main() -> None:
    torch.set_num_threads(1)  # in a network this small more threads only wait for one another
    data = digits()
    net, _, slow = whole = build()
    train(whole, data, range(STEPS))
    print(f"{slow.steps} steps, {slow.syncs} syncs")
    for weights in ("slow", "fast"):
        with slow.use(weights):
            print(f"test accuracy of the {weights} weights: {accuracy(net, data):.1%}")

    first = build()
    train(first, data, range(STOP))
    FILE.parent.mkdir(exist_ok=True)
    torch.save([part.state_dict() for part in first], FILE)

    resumed = build()
    for part, state in zip(resumed, torch.load(FILE), strict=True):
        part.load_state_dict(state)
    train(resumed, data, range(STOP, STEPS))
    equal = same(slow, resumed[2])
    print(f"resumed from {FILE} after {STOP} steps: both sets equal bit for bit: {equal}")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
