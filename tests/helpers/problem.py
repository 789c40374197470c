"""What the tests of the outer loop train without Lightning: a small network, and two weights that are pushed."""

import inspect

import torch
from torch import nn

DOUBLE = torch.float64


OPTIMIZERS = [
    entry
    for entry in vars(torch.optim).values()
    if inspect.isclass(entry) and issubclass(entry, torch.optim.Optimizer) and entry is not torch.optim.Optimizer
]


class Problem:
    """A small network whose gradient depends on the step, the same for every object that is made."""

    def __init__(self, optimizer_class=torch.optim.SGD, **settings):
        torch.manual_seed(1)
        sparse = optimizer_class is torch.optim.SparseAdam
        if sparse:
            self.net = nn.Embedding(5, 3, sparse=True, dtype=DOUBLE)
        elif optimizer_class is torch.optim.Muon:  # takes matrices only
            self.net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).to(DOUBLE)
        else:
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(DOUBLE)
        if optimizer_class is torch.optim.LBFGS:
            settings.setdefault("max_iter", 4)  # calls of the closure in a step
        settings.setdefault("lr", 0.05)
        self.optimizer = optimizer_class(self.net.parameters(), **settings)
        self.closures = 0
        inputs = torch.Generator().manual_seed(2)
        self.inputs = [
            torch.randint(5, (4,), generator=inputs) if sparse else torch.randn(4, 3, dtype=DOUBLE, generator=inputs)
            for _ in range(50)
        ]

    def step(self, index):
        def closure():
            self.closures += 1
            self.optimizer.zero_grad()
            loss = (self.net(self.inputs[index]) - 1).square().mean()
            loss.backward()
            return loss

        self.optimizer.step(closure)

    @property
    def parameters(self):
        return list(self.net.parameters())

    def values(self):
        return [parameter.detach().clone() for parameter in self.parameters]


def slow_values(slow):
    return [value.detach().clone() for value in slow.values("slow").values()]


def two_weights(**settings):
    weights = [nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))]
    return (*weights, torch.optim.SGD(weights, lr=1.0, **settings))


def push(optimizer, **gradients):
    for parameter, gradient in gradients.values():
        parameter.grad = None if gradient is None else torch.tensor([gradient])
    optimizer.step()


class Decayed(torch.optim.SGD):
    """Extends ``super().step()``, after which it moves the weights once more."""

    raises = False

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        if self.raises:
            raise ZeroDivisionError
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)
        return loss
