"""One run on words: an LSTM, an optimizer with or without something around it, and what came of it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset

from examples.lab.language import LanguageModel, State
from examples.lab.training import Curves, DivergedError, quietly, resumable, trainer
from lightning_lookahead import LookaheadCallback, compare_weights

if TYPE_CHECKING:
    from pathlib import Path

    from examples.lab.text import Text

ROWS = 10
"""Sequences that validation and test text are cut into."""
LIMIT = 100.0
"""A cross-entropy above it, or nan, is a run that diverged; guessing alone costs the logarithm of the vocabulary."""


@dataclass(frozen=True)
class Settings:
    """One run on words. Sizes, dropouts, batch, ``bptt``, ``clip``, decay and ``patience`` are the paper's by default.

    Args:
        data: The name of the text.
        seed: Of the initial weights and the dropouts.
        optimizer: ``sgd`` or ``adam``.
        lr: Learning rate at the start.
        weight_decay: Times the weights, added to the gradient.
        k: Inner steps between two syncs; 0 for no Lookahead.
        alpha: Slow weights step size.
        average: Part of training, its end, over whose steps the weights are averaged to be looked at instead; 0 for
            none. Before it the weights themselves are looked at.
        embedding: Numbers for a word.
        hidden: Units of each layer but the last, which has ``embedding``.
        layers: LSTM layers.
        drop_output: Dropouts, see `examples.lab.language.LanguageModel`.
        drop_hidden: The same.
        drop_input: The same.
        drop_words: The same.
        drop_weights: The same.
        epochs: Passes over the training text.
        batch_size: Sequences that the training text is cut into, read side by side.
        bptt: Words of each sequence in a batch; gradients do not go further back.
        clip: Norm that gradients are clipped to.
        patience: Epochs in a row without gain on validation text after which the learning rate is halved.
        limit: Words to train on, from the start of each of the sequences; 0 for all.
        tested: Whether test text is looked at, at the end. Tuning does not.
    """

    data: str
    seed: int = 0
    optimizer: str = "sgd"
    lr: float = 20.0
    weight_decay: float = 1.2e-6
    k: int = 0
    alpha: float = 0.5
    average: float = 0.0
    embedding: int = 400
    hidden: int = 1150
    layers: int = 3
    drop_output: float = 0.4
    drop_hidden: float = 0.3
    drop_input: float = 0.65
    drop_words: float = 0.1
    drop_weights: float = 0.5
    epochs: int = 750
    batch_size: int = 80
    bptt: int = 70
    clip: float = 0.25
    patience: int = 15
    limit: int = 0
    tested: bool = False


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Batches of a text that is cut into sequences, read side by side: words and the words after them.

    Args:
        words: The text, of shape (words,).
        rows: Sequences; what is left over at the end of the text is left out.
        bptt: Words of each sequence in a batch; the last batch may have fewer.
        limit: Words to keep in all, from the start of each sequence; 0 for all.
    """

    def __init__(self, words: Tensor, rows: int, bptt: int, limit: int = 0) -> None:
        length = len(words) // rows
        self.columns = words[: length * rows].view(rows, length)[:, : limit // rows or None].t().contiguous()
        self.bptt = bptt

    def __len__(self) -> int:
        return math.ceil((len(self.columns) - 1) / self.bptt)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Two tensors of shape (bptt, rows), the second one word later."""
        start, end = index * self.bptt, min((index + 1) * self.bptt, len(self.columns) - 1)
        return self.columns[start:end], self.columns[start + 1 : end + 1]


def loader(windows: Windows) -> DataLoader:
    """In their order. With a generator of its own a loader does not move the dropouts' random numbers."""
    return DataLoader(windows, batch_size=None, generator=torch.Generator())


class WordPredictor(LightningModule):
    """Truncated back-propagation: the state goes from batch to batch, the gradient does not.

    Args:
        settings: Of the run.
        words: Size of the vocabulary.
        batches: Training batches in an epoch.
    """

    def __init__(self, settings: Settings, words: int, batches: int) -> None:
        super().__init__()
        s = self.settings = settings
        drops = {name: value for name, value in vars(s).items() if name.startswith("drop_")}
        self.net = LanguageModel(words, s.embedding, s.hidden, s.layers, **drops)
        self.batches = batches
        self.state: State | None = None
        self.state_looking: State | None = None  # of its own, so that a look does not disturb training

    def loss(self, batch: tuple[Tensor, Tensor], state: State | None) -> tuple[Tensor, State]:
        """Cross-entropy per word in nats, and the state after the batch.

        Raises:
            DivergedError: If it is nan or beyond all sense.
        """
        x, y = batch
        scores, after = self.net(x, state)
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), y.flatten())
        if not loss < LIMIT:  # nan, too
            raise DivergedError
        return loss, [(h.detach(), c.detach()) for h, c in after]

    def on_train_epoch_start(self) -> None:
        # So that dropout is the epoch's, whether training was stopped before it or not.
        torch.manual_seed(1000 * self.settings.seed + self.current_epoch)
        self.state = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss, self.state = self.loss(batch, self.state)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=batch[1].numel())
        return loss

    def on_validation_epoch_start(self) -> None:
        self.state_looking = None

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss, self.state_looking = self.loss(batch, self.state_looking)
        self.log("loss", loss, prog_bar=True, batch_size=batch[1].numel())

    def configure_optimizers(self) -> dict[str, Any]:
        s = self.settings
        optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[s.optimizer]
        inner = optimizer(self.parameters(), lr=s.lr, weight_decay=s.weight_decay)
        # torch counts the bad epochs that it lets pass.
        plateau = ReduceLROnPlateau(inner, factor=0.5, patience=s.patience - 1, threshold=0.0)
        # "epoch" would be after the epoch's checkpoint, and forgotten by a run that goes on from there.
        when = {"interval": "step", "frequency": self.batches, "monitor": "loss"}
        return {"optimizer": inner, "lr_scheduler": {"scheduler": plateau, **when}}


def averaged(start: int) -> WeightAveraging:
    """Evaluation on the equal average of the weights after each step from step ``start`` on, counted from 0.

    Before that the average is the weights themselves. Lightning's callback, asked to leave out those steps, would
    evaluate the initial weights until then, and the learning rate would fall for want of gain.
    """

    def average(mean: Tensor, weights: Tensor, steps: Tensor | int) -> Tensor:
        return mean.lerp(weights, 1 / max(int(steps) - start + 1, 1))

    return WeightAveraging(avg_fn=average)


def around(settings: Settings, steps: int) -> LookaheadCallback | WeightAveraging | None:
    """What is put around the optimizer for so many steps: Lookahead, an average of the weights, or nothing."""
    if settings.k:
        # A run that diverges ends at the next loss; here it is only left without a sync.
        return LookaheadCallback(settings.k, settings.alpha, nonfinite="skip")
    return averaged(steps - int(settings.average * steps)) if settings.average else None


def train(settings: Settings, text: Text, folder: Path, *more: Callback) -> dict[str, Any]:
    """Do one run, or the rest of it.

    Args:
        settings: What to train, and how.
        text: What on.
        folder: Where the run's checkpoint is.
        more: Callbacks, after what the settings put around the optimizer; with a Lookahead of its own among them it is
            that one which is put around.

    Returns:
        ``loss``, in nats per word, and ``perplexity`` on validation text at the end, of the slow weights or of the
        average if there are such; the same with ``test_`` if the settings want it, and with ``fast_`` in front with
        Lookahead. ``train_loss``, the mean over the last epoch's batches, of the fast weights. ``curves`` of
        ``train_loss`` and ``loss``. Of a run that diverged only ``diverged``, the step after which it did.
    """
    quietly()
    # What dropout makes of the weights is not where cuDNN had put them.
    warnings.filterwarnings("ignore", message=".*single contiguous chunk.*")
    seed_everything(settings.seed, verbose=False)
    data = Windows(text.train, settings.batch_size, settings.bptt, settings.limit)
    looks = {"": text.validation, **({"test_": text.test} if settings.tested else {})}
    loaders = {name: loader(Windows(words, ROWS, settings.bptt)) for name, words in looks.items()}
    model, curves = WordPredictor(settings, len(text.vocabulary), len(data)), Curves(["train_loss", "loss"])
    given = any(isinstance(one, LookaheadCallback) for one in more)
    outer = None if given else around(settings, settings.epochs * len(data))
    fit = trainer(settings, folder, [outer, *more, curves], gradient_clip_val=settings.clip)
    try:
        fit.fit(model, loader(data), loaders[""], ckpt_path=resumable(folder))
        losses = {before: look(fit, model, words) for before, words in loaders.items()}
    except DivergedError:
        return {"diverged": fit.global_step}
    results = {}
    for before, by_weights in losses.items():
        for weights, loss in by_weights.items():
            results |= {f"{weights}{before}loss": loss, f"{weights}{before}perplexity": math.exp(loss)}
    return {**results, "train_loss": curves.values["train_loss"][-1], "curves": curves.values}


def look(fit: Trainer, model: WordPredictor, words: DataLoader) -> dict[str, float]:
    """The loss of what the module holds after training, and with Lookahead that of the fast weights, ``fast_``."""
    if not model.settings.k:
        return {"": fit.validate(model, words, verbose=False)[0]["loss"]}
    both = compare_weights(fit, model, words)
    return {"": both.slow["loss"], "fast_": both.fast["loss"]}
