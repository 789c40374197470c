"""The paper's Figure 1: test accuracy on the plane through three fast weights of one inner loop, and where a sync goes.

    python examples/paper/figure1.py                          # Fashion-MNIST, a narrow network
    python examples/paper/figure1.py --data FOLDER --full     # CIFAR-100 as in the paper, on a GPU

Halfway through training a ResNet-32 with k 10 and alpha .5, the plane goes through the first, the middle and the last
fast weights of the inner loop that comes next; the slow weights after its sync lie on the line from the first to the
last. BatchNorm's statistics are computed anew at each point, from the same training batches.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters
from torch.optim.swa_utils import update_bn

from examples.command_line import stoppable
from examples.lab.images import ImageData, Images, augment
from examples.lab.progress import track
from examples.lab.report import Table, cell, figure, style
from examples.lab.study import GOES_ON, show
from examples.lab.sweep import sweep, title
from examples.lab.training import Classifier, Settings, around, quietly, resumable, trainer

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from matplotlib.figure import Figure

    from examples.lab.study import Record
    from examples.lab.sweep import Sweep

POINTS = ("first", "middle", "last", "slow")
MARGIN = 0.35


@dataclass(frozen=True)
class Plane(Settings):
    """A run that is followed by one inner loop, and by a look around.

    Args:
        points: Points of the plane along each of its two axes.
        batches: Training batches that BatchNorm's statistics are computed from.
    """

    points: int = 13
    batches: int = 20


class StopAt(Callback):
    """Ends training after so many inner steps, while the learning rate falls as if it went on."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> int | None:
        trainer.should_stop = trainer.global_step >= self.steps
        return -1 if trainer.should_stop else None


def vector(model: nn.Module) -> Tensor:
    """All parameters in a row; torch's `parameters_to_vector` does not take those that are stored channels last."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def inner_loop(
    model: Classifier, optimizer: torch.optim.Optimizer, batches: Iterable[Any], k: int
) -> dict[str, Tensor]:
    """Take k inner steps; the weights before, in the middle and after, as vectors."""
    weights = [vector(model)]
    model.train()
    for x, y in islice(batches, k):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(augment(x.to(model.device))), y.to(model.device)).backward()
        optimizer.step()
        weights.append(vector(model))
    return {"first": weights[0], "middle": weights[k // 2], "last": weights[-1]}


def axes(first: Tensor, middle: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Two orthogonal unit vectors: from the first weights to the last, and on the side of the middle ones."""
    along = (last - first) / (last - first).norm()
    across = middle - first
    across = across - (across @ along) * along
    return along, across / across.norm()


@torch.no_grad()
def accuracy(model: Classifier, weights: Tensor, statistics: list[Tensor], test: list[Any]) -> float:
    """Test accuracy of these weights, with BatchNorm's statistics of these weights."""
    vector_to_parameters(weights, model.parameters())
    update_bn(statistics, model)
    model.eval()
    correct = sum((model(x).argmax(dim=1) == y).sum().item() for x, y in test)
    return correct / sum(len(y) for _, y in test)


def plane(settings: Plane, images: Images, folder: Path) -> Record:
    """One run up to the middle, one inner loop, and the accuracies on the plane.

    Returns:
        ``first``, ``middle``, ``last`` and ``slow``, the accuracies of these weights; ``at``, where they lie on the
        plane; ``x`` and ``y``, the axes' values (distances in weight space); ``accuracies``, a row for each y.
    """
    quietly()
    seed_everything(settings.seed, verbose=False)
    data = ImageData(
        images, batch_size=settings.batch_size, seed=settings.seed, size=settings.size, limit=settings.limit
    )
    model = Classifier(settings, images)
    half = settings.epochs * (len(data.train) // settings.batch_size) // 2
    fit = trainer(settings, folder, [around(settings), StopAt(half - half % settings.k)])
    fit.fit(model, data, ckpt_path=resumable(folder))

    batches = data.train_dataloader()
    statistics = [x.to(model.device) for x, _ in islice(batches, settings.batches)]
    test = [(x.to(model.device), y.to(model.device)) for x, y in data.val_dataloader()]
    found = inner_loop(model, fit.optimizers[0], batches, settings.k)
    found["slow"] = torch.lerp(found["first"], found["last"], settings.alpha)
    basis = torch.stack(axes(found["first"], found["middle"], found["last"]))
    at = {name: (basis @ (weights - found["first"])).tolist() for name, weights in found.items()}
    x, y = (grid([at[name][axis] for name in POINTS], settings.points) for axis in (0, 1))
    accuracies = [
        [round(accuracy(model, found["first"] + a * basis[0] + b * basis[1], statistics, test), 6) for a in x]
        for b in track(y, "rows of the plane")
    ]
    values = {name: accuracy(model, weights, statistics, test) for name, weights in found.items()}
    return {**values, "at": at, "x": x, "y": y, "accuracies": accuracies}


def grid(values: list[float], points: int) -> list[float]:
    """Equal steps from below the lowest value to above the highest."""
    room = MARGIN * (max(values) - min(values))
    return torch.linspace(min(values) - room, max(values) + room, points, dtype=torch.float64).tolist()


def run(runs: Sweep) -> list[Record]:
    """A plane from every seed."""
    base = Plane(**asdict(replace(runs.base, model="resnet32", k=10, alpha=0.5)))
    return runs.complete(runs.repeat([replace(base, epochs=3, points=3, batches=2) if runs.smoke else base]), plane)


def tables(records: list[Record]) -> list[Table]:
    """Accuracy of the three fast weights and of the slow ones, a row for each seed."""
    s = records[0]["settings"]
    name = f"{title(s)}, stopped halfway, k {s['k']}, alpha {s['alpha']}"
    result = Table(name, ["seed", *(f"{name}, %" for name in POINTS), "best on the plane, %"])
    for record in records:
        found = record["results"]
        numbers = [found[name] for name in POINTS] + [max(map(max, found["accuracies"]))]
        result.rows.append([str(record["settings"]["seed"]), *(f"{100 * number:.2f}" for number in numbers)])
    result.rows.append(["all", *(cell(records, name, scale=100) for name in POINTS), "-"])
    return [result]


def draw(records: list[Record]) -> Figure:
    """The plane of the first seed."""
    found = records[0]["results"]
    with style():
        result = figure(5.2, 3.8)
        panel = result.subplots()
        filled = panel.contourf(found["x"], found["y"], found["accuracies"], levels=16, cmap="viridis")
        result.colorbar(filled, label="test accuracy", format="{x:.1%}")
        path = [found["at"][name] for name in ("first", "middle", "last")]
        panel.plot(*zip(*path, strict=True), "o-", color="white", markersize=5, label="fast weights")
        panel.plot(*zip(found["at"]["first"], found["at"]["slow"], strict=True), "--", color="tab:red", linewidth=1.5)
        panel.plot(*found["at"]["slow"], "*", color="tab:red", markersize=13, label="slow weights, after the sync")
        for name, (a, b) in zip(("first", "middle", "last"), path, strict=True):
            panel.annotate(name, (a, b), textcoords="offset points", xytext=(6, 6), color="white")
        panel.set(xlabel="distance along first to last", ylabel="distance across")
        panel.legend(labelcolor="white", loc="lower center")
    return result


@stoppable(GOES_ON)
def main() -> None:
    runs = sweep(__doc__, "figure1", small={"epochs": 4}, full={"width": 16})
    records = run(runs)
    show(runs.study, tables(records), draw(records))


if __name__ == "__main__":
    main()
