"""Is there one copy of the trained weights and nothing else?

    python examples/benchmarks/memory.py

What `SlowWeights` holds beside the model, the gradients and the optimizer, in multiples of the bytes of the trained
parameters: one second tensor each, so 1 at rest. A sync should need no more. A swap in the middle of a cycle exchanges
the two sets a block at a time, so it may hold one block more, and it writes both sets. A swap right after a sync finds
both sets equal and should write nothing. The saved state carries a copy of one set; what is restored is read into
memory first, so there is a second set until training goes on. The inner optimizer, SGD without momentum, holds nothing
of its own.

All bytes are those that the allocator of the device gave out and has not got back. They are summed by event on the CPU
and asked for on a GPU, whose allocator rounds each tensor up to 512 bytes. Storage that several tensors share
therefore counts once. Of several rounds the largest numbers are reported.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from examples.lab.bench.allocated import held
from examples.lab.bench.parameters import MODELS, SMOKE, parameters
from examples.lab.bench.program import arguments, run
from examples.lab.progress import track
from examples.lab.report import Table
from lightning_lookahead import SlowWeights

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from torch import Tensor, nn

    from examples.lab.bench.parameters import Shape
    from examples.lab.bench.program import Report

K = 5
CHOSEN = ("ResNet-18", "one tensor of 40M", "1,000 vectors of 100")
HALF_FROZEN = {"ResNet-18", "10 vectors"}
"""Those measured once more with every second tensor frozen."""


class Written(TorchDispatchMode):
    """The bytes that in-place operations write to the storage of some tensors while it is on."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = 0
        self._watched = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look which arguments the operation says that it writes, then do it."""
        schema = func._schema.arguments
        given = {**dict(zip([argument.name for argument in schema], args, strict=False)), **(kwargs or {})}
        for argument in schema:
            if argument.is_write:
                self.bytes += sum(tensor.nbytes for tensor in tree_leaves(given.get(argument.name)) if self._is(tensor))
        return func(*args, **(kwargs or {}))

    def _is(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in self._watched


def made(shapes: list[Shape], device: str, *, half_frozen: bool) -> list[nn.Parameter]:
    """Parameters of which all, or every second one, are trained, with gradients of one that take no memory."""
    result = parameters(shapes, device)
    for index, parameter in enumerate(result):
        parameter.requires_grad_(not half_frozen or index % 2 == 0)
        parameter.grad = torch.ones((), device=device).expand(parameter.shape) if parameter.requires_grad else None
    return result


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each model: the most that each of several rounds found."""
    models = SMOKE if args.smoke else {name: MODELS[name] for name in CHOSEN}
    rows = []
    for model, shapes in track(models.items(), "models"):
        for half_frozen in (False, True) if model in HALF_FROZEN else (False,):
            found = [_one(shapes, args.device, half_frozen=half_frozen) for _ in range(args.rounds)]
            name = f"{model}, half of its tensors frozen" if half_frozen else model
            rows.append({"model": name, **{key: max(one[key] for one in found) for key in found[0]}})
    return rows


def _one(shapes: list[Shape], device: str, *, half_frozen: bool) -> dict[str, int]:
    weights = made(shapes, device, half_frozen=half_frozen)
    trained = [parameter for parameter in weights if parameter.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1e-3)
    optimizer.step()
    objects: list[SlowWeights] = []
    building, built = held(lambda: objects.append(SlowWeights(optimizer, K)), device)
    (slow,) = objects

    def cycle() -> None:
        for _ in range(K):
            optimizer.step()

    rest = built + held(cycle, device)[1]

    def there_and_back() -> None:
        slow.swap_to("slow")
        slow.swap_to("fast")

    def written() -> int:
        with Written([*trained, *slow.values("slow").values()]) as count:
            there_and_back()
        return count.bytes

    found = {
        "parameters": sum(parameter.numel() for parameter in trained),
        "tensors": len(trained),
        "bytes": sum(parameter.nbytes for parameter in trained),
        "building": building,
        "rest": rest,
        "written after a sync": written(),
    }
    optimizer.step()  # from here on theta and phi are apart
    found["written mid-cycle"] = written()
    found["swap"] = rest + held(there_and_back, device)[0]
    saved: dict[str, Any] = {}

    def save() -> None:
        saved.update(optimizer=optimizer.state_dict(), slow=slow.state_dict())

    found["save"] = rest + held(save, device)[0]
    found["restore"], found["restored"] = _restored(weights, saved, device)
    found["sync"] = rest + held(slow.sync, device)[0]
    return found


def _restored(weights: list[nn.Parameter], saved: dict[str, Any], device: str) -> tuple[int, int]:
    """The most while new slow weights are built and what was saved is loaded, and what is left after a step."""
    again = copy.deepcopy(weights)
    for parameter, one in zip(again, weights, strict=True):
        parameter.grad = one.grad
    optimizer = torch.optim.SGD(again, lr=1e-3)
    objects = []

    def load() -> None:
        state = copy.deepcopy(saved)  # as if read from a file
        slow = SlowWeights(optimizer, K)
        optimizer.load_state_dict(state["optimizer"])
        slow.load_state_dict(state["slow"])
        del state
        optimizer.step()  # until then what was loaded is kept: the model may be loaded later
        objects.append(slow)

    return held(load, device)


def tables(report: Report) -> list[Table]:
    """What is held, and what a swap writes, in multiples of the bytes of the trained parameters."""
    most = {
        "at rest": "rest",
        "most in building": "building",
        "most in a sync": "sync",
        "most in a swap": "swap",
        "most in a save": "save",
        "most in a restore": "restore",
        "at rest again": "restored",
    }
    holding = Table(
        "Bytes held beside model, gradients and optimizer / bytes of the trained parameters",
        ["model", "trained parameters", "tensors", *most],
    )
    writing = Table(
        "Bytes that a swap to the slow weights and back writes / bytes of the trained parameters",
        ["model", "mid-cycle", "right after a sync"],
    )
    for row in report["rows"]:

        def multiple(name: str, row: dict[str, Any] = row) -> str:
            return f"{row[name] / row['bytes']:.3f}"

        holding.rows.append(
            [
                row["model"],
                f"{row['parameters']:,}",
                f"{row['tensors']:,}",
                *(multiple(name) for name in most.values()),
            ]
        )
        writing.rows.append([row["model"], multiple("written mid-cycle"), multiple("written after a sync")])
    return [holding, writing]


if __name__ == "__main__":
    run(arguments(__doc__, rounds=2).parse_args(), measure, tables)
