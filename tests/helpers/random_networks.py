"""What random cases train: a few small networks, and which optimizers and options go with them."""

import torch
from torch import nn

MOMENTUM = {"SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Muon", "SparseAdam"}
OPTIMIZERS = sorted({*MOMENTUM, "LBFGS", "Adadelta", "Adafactor", "Adagrad", "ASGD", "Rprop"})


class Layers:
    """Layers and a loss, for a module of any kind."""

    def build(self, net, dtype):
        torch.manual_seed(1)
        bias = net != "matrices"
        self.first = nn.Embedding(5, 3, sparse=True) if net == "sparse" else nn.Linear(3, 4, bias=bias)
        if net != "sparse":
            self.norm = nn.BatchNorm1d(4) if net == "norm" else nn.Identity()
            self.last = nn.Linear(4, 4, bias=bias)
        self.more = nn.Linear(4, 4) if net == "tied" else nn.Identity()
        if net == "tied":
            self.more.weight = self.last.weight
        self.to(dtype)

    def loss(self, seed, *, part=False):
        """That on data of a seed; of a part of the network, the last layer gets no gradient."""
        generator = torch.Generator().manual_seed(seed)
        if isinstance(self.first, nn.Embedding):
            return (self.first(torch.randint(5, (4,), generator=generator)) - 1).square().mean()
        x = torch.randn(4, 3, dtype=torch.float64, generator=generator).to(self.first.weight.dtype)
        hidden = self.norm(self.first(x)).tanh()
        return ((hidden if part else self.more(self.last(hidden))) - 1).square().mean()

    def halves(self):
        """The parameters of the first layer and of its statistics, and the others."""
        named = list(self.named_parameters())
        own = [name.startswith(("first", "norm")) for name, _ in named]
        return (
            [parameter for (_, parameter), is_first in zip(named, own, strict=True) if is_first],
            [parameter for (_, parameter), is_first in zip(named, own, strict=True) if not is_first],
        )


def make_optimizer(name, groups):
    settings = {"momentum": 0.9} if name in {"SGD", "RMSprop"} else {}
    return getattr(torch.optim, name)(groups, lr=0.05, **settings)


def go_together(case):
    """Whether an optimizer and options are for a network, as far as torch and the package have a say."""
    optimizer, net, mode = case["optimizer"], case["net"], case["pullback_momentum"]
    half = case["dtype"] == "bfloat16"
    return not any(
        (
            (optimizer == "SparseAdam") != (net == "sparse"),
            net == "sparse" and (half or case["group"] or case["exclude"]),
            optimizer == "Muon" and net != "matrices",
            net == "matrices" and "*.bias" in case["exclude"],
            optimizer == "LBFGS" and (half or case["group"] or mode != "none"),  # it keeps one state for all
            mode == "pullback" and (optimizer not in MOMENTUM or case["outer_momentum"]),
            case["buffers"] == "sync" and net != "norm",
            # Torch makes numbers in their state the type of the parameters when it loads them.
            optimizer in {"NAdam", "ASGD"} and case["dtype"] != "float32",
        )
    )


def coarse(case):
    """Whether slow weights have fewer digits than the parameters."""
    digits = ["bfloat16", "float32", "float64"]
    return case["slow_dtype"] is not None and digits.index(case["slow_dtype"]) < digits.index(case["dtype"])


def same(ours, expected, what):
    """Raise unless both are equal, down to the bits and types of tensors."""
    if isinstance(expected, dict):
        same(sorted(ours, key=str), sorted(expected, key=str), f"{what}, names")
        for name, value in expected.items():
            same(ours[name], value, f"{what}, {name}")
    elif isinstance(expected, torch.Tensor):
        if ours.dtype != expected.dtype or not torch.equal(ours, expected):
            apart = (ours - expected).abs().max() if ours.shape == expected.shape else "of another shape"
            message = f"{what}: {ours.dtype} instead of {expected.dtype}, {apart} apart"
            raise AssertionError(message)
    elif isinstance(expected, (list, tuple)) and len(ours) == len(expected):
        for index, value in enumerate(expected):
            same(ours[index], value, f"{what}, {index}")
    elif ours != expected:
        message = f"{what}: {ours} instead of {expected}"
        raise AssertionError(message)


def counts_of(outer):
    """Steps, and of each cycle the steps since its last sync and its syncs."""
    return (outer.taken, *((cycle.since, cycle.syncs) for cycle in outer.cycles.values()))


def counts_in(state):
    """The same of a saved state."""
    return (state["steps"], *((own["steps_since_sync"], own["syncs"]) for own in [state, *state.get("groups", [])]))
