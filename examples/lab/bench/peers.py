"""A sync of each implementation of Lookahead that is at hand, as a call."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_lookahead import SlowWeights

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from torch import nn

OURS = "ours, nonfinite='ignore'"
CHECKED = "ours, nonfinite='raise'"
MOMENTUM = "ours, nonfinite='raise', with outer momentum"
K, ALPHA = 5, 0.5


def syncs(parameters: list[nn.Parameter]) -> dict[str, Callable[[], object]]:
    """Name -> a sync of these parameters, each with slow weights of its own; ours first."""
    makers = {
        OURS: functools.partial(_ours, nonfinite="ignore"),
        CHECKED: _ours,
        MOMENTUM: functools.partial(_ours, outer_momentum=0.9),
        "two foreach calls": _foreach,
        "official loop": _official,
        "timm": _timm,
        "pytorch_optimizer": _pytorch_optimizer,
        "torch-optimizer": _torch_optimizer,
        "torch2-look-ahead": _torch2,
        "EMAWeightAveraging": _average,
    }
    made = {name: maker(parameters) for name, maker in makers.items()}
    return {name: call for name, call in made.items() if call is not None}


def inner(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer that moves nothing."""
    return torch.optim.SGD(parameters, lr=0.0)


def _ours(parameters: list[nn.Parameter], **options: Any) -> Callable[[], object]:
    optimizer = inner(parameters)
    slow = SlowWeights(optimizer, K, ALPHA, **options)
    optimizer.step()
    return slow.sync


def _foreach(parameters: list[nn.Parameter]) -> Callable[[], object]:
    fast: list[Any] = [parameter.detach() for parameter in parameters]
    slow: list[Any] = [tensor.clone() for tensor in fast]

    def sync() -> None:
        torch._foreach_lerp_(slow, fast, ALPHA)
        torch._foreach_copy_(fast, slow)

    return sync


def _official(parameters: list[nn.Parameter]) -> Callable[[], object]:
    """As the paper's authors have it: three operations for each parameter."""
    cached = [parameter.detach().clone() for parameter in parameters]

    def sync() -> None:
        for parameter, slow in zip(parameters, cached, strict=True):
            parameter.data.mul_(ALPHA).add_(slow, alpha=1.0 - ALPHA)
            slow.copy_(parameter.data)

    return sync


def _timm(parameters: list[nn.Parameter]) -> Callable[[], object] | None:
    module = _file("timm", "optim/lookahead.py")
    return module.Lookahead(inner(parameters), ALPHA, K).sync_lookahead if module else None


def _pytorch_optimizer(parameters: list[nn.Parameter]) -> Callable[[], object] | None:
    if not importlib.util.find_spec("pytorch_optimizer"):
        return None
    from pytorch_optimizer import Lookahead  # noqa: PLC0415 (only where it is installed)

    return _by_groups(Lookahead(inner(parameters), K, ALPHA), "update")


def _torch_optimizer(parameters: list[nn.Parameter]) -> Callable[[], object] | None:
    module = _file("torch_optimizer", "lookahead.py")
    if not module:
        return None
    return torch.no_grad()(_by_groups(module.Lookahead(inner(parameters), K, ALPHA), "_update"))


def _torch2(parameters: list[nn.Parameter]) -> Callable[[], object] | None:
    if not importlib.util.find_spec("lookahead_pytorch"):
        return None
    from lookahead_pytorch import Lookahead  # noqa: PLC0415 (only where it is installed)

    return Lookahead(inner(parameters), K, ALPHA).sync_lookahead


def _average(parameters: list[nn.Parameter]) -> Callable[[], object]:
    """What Lightning's callback does with the model at each update."""
    model = torch.nn.ParameterList(parameters)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ALPHA))
    average.update_parameters(model)  # the first one copies
    return lambda: average.update_parameters(model)


def _by_groups(lookahead: Any, name: str) -> Callable[[], object]:
    update = getattr(lookahead, name)

    def sync() -> None:
        for group in lookahead.param_groups:
            update(group)

    return sync


def _file(package: str, path: str) -> ModuleType | None:
    """One file of a package that as a whole may not import: timm's needs torchvision."""
    found = importlib.util.find_spec(package)
    if not found or not found.submodule_search_locations:
        return None
    name = f"{package}.{path.removesuffix('.py').replace('/', '.')}"
    spec = importlib.util.spec_from_file_location(name, f"{found.submodule_search_locations[0]}/{path}")
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
