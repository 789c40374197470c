"""`LookaheadCLI` and ``python -m lightning_lookahead``: a `LightningCLI` with the callback built in."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_lookahead._lightning import has_run_a_batch
from lightning_lookahead.checkpointing import read_checkpoint

from .callback import LookaheadCallback
from .comparison import compare_weights

if TYPE_CHECKING:
    from collections.abc import Iterator


class LookaheadTrainer(Trainer):
    """A Trainer that can `compare`, as a subcommand of `LookaheadCLI`."""

    def compare(  # noqa: PLR0917 (the command line names every argument)
        self,
        model: LightningModule,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        recalibrate_batch_norm: bool | int = False,  # noqa: FBT001, FBT002
        json: str | None = None,
        weights_only: bool | None = None,  # noqa: FBT001
    ) -> None:
        """Validate a checkpoint's slow and fast weights on the same data and print a table.

        Args:
            model: The module.
            dataloaders: The validation data.
            datamodule: The data module.
            ckpt_path: A checkpoint that a run with Lookahead saved, a file or a folder of shards.
            recalibrate_batch_norm: Gather BatchNorm's statistics anew for each set of weights, from all training
                batches (true) or the first so many.
            json: A file to write the table's numbers to.
            weights_only: Whether to read nothing but tensors and plain values from the checkpoint; false runs code
                from it.
        """
        if ckpt_path is None:
            message = "compare needs a checkpoint that holds both sets of weights: give --ckpt_path."
            raise ValueError(message)
        if json is not None and (Path(json).is_dir() or not Path(json).absolute().parent.is_dir()):
            message = f"json={json} cannot be written: give a file in a folder that is there."
            raise ValueError(message)
        comparison = compare_weights(
            self,
            model,
            dataloaders,
            datamodule,
            ckpt_path,
            recalibrate_batch_norm=recalibrate_batch_norm,
            weights_only=weights_only,
        )
        if self.is_global_zero:
            print(comparison)  # noqa: T201 (what the command is for)
            if json is not None:
                Path(json).write_text(comparison.to_json() + "\n", encoding="utf-8")


class OneLineParser(LightningArgumentParser):
    """A parser that refuses in one line, with exit code 2. ``JSONARGPARSE_DEBUG=true`` shows the traceback, too."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ:  # jsonargparse catches it and goes on
            super().error(message, ex)
        self.exit(2, f"error: {' '.join(message.split())}\n")


class LookaheadCLI(LightningCLI):
    """A `LightningCLI` with `LookaheadCallback` built in, set by ``--lookahead.*``, and a subcommand ``compare``.

    ``--lookahead.enabled=false`` trains without it. Takes the arguments of `LightningCLI`.

    Raises:
        ValueError: If ``trainer_class`` is given and is no `LookaheadTrainer`.

    Example::

        LookaheadCLI(MyModule, MyDataModule)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        trainer_class = kwargs.setdefault("trainer_class", LookaheadTrainer)
        if not (isinstance(trainer_class, type) and issubclass(trainer_class, LookaheadTrainer)):
            message = f"trainer_class={trainer_class!r} has no compare(): give a subclass of LookaheadTrainer."
            raise ValueError(message)  # noqa: TRY004 (a class that lacks a method)
        kwargs.setdefault("parser_class", OneLineParser)
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "compare": {"model", "dataloaders", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(LookaheadCallback, "lookahead")
        parser.add_argument(
            "--lookahead.enabled",
            type=bool,
            default=True,
            help="Whether to train with Lookahead; false trains without.",
        )

    def instantiate_classes(self) -> None:
        options = self._get(self.config, "lookahead")
        if options is None:
            self.parser.error("lookahead=null: to train without it, give lookahead.enabled=false.")
        enabled = options.pop("enabled")  # not an argument of the callback
        parser = self._parser(self.subcommand)
        if not enabled:
            parser.callback_keys.remove("lookahead")
        if self.subcommand == "compare":
            self.save_config_callback = None  # nothing is trained
        with self._in_one_line():
            super().instantiate_classes()
        options.enabled = enabled

    def _parse_ckpt_path(self) -> None:
        self.parser.exit_on_error = False
        try:
            super()._parse_ckpt_path()
        except ArgumentError:
            pass  # hyperparameters that another program saved: the given ones hold
        except Exception as error:  # noqa: BLE001 (whatever a cut file raises)
            self.parser.exit_on_error = True
            self._refuse(error)
        finally:
            self.parser.exit_on_error = True

    def _run_subcommand(self, subcommand: str) -> None:
        with self._in_one_line():
            super()._run_subcommand(subcommand)

    @contextmanager
    def _in_one_line(self) -> Iterator[None]:
        """Report an error before the first batch in one line; a later one keeps its traceback."""
        try:
            yield
        except Exception as error:
            if hasattr(self, "trainer") and has_run_a_batch(self.trainer):
                raise
            self._refuse(error)

    def _refuse(self, error: Exception) -> NoReturn:
        """Report an error in one line: that the checkpoint cannot be read, if so, or else ``error`` itself."""
        path = self.config.get(self.config.get("subcommand"), {}).get("ckpt_path")
        try:
            if path is not None and Path(path).exists():
                read_checkpoint(path, weights_only=True)
        except UnpicklingError:
            pass  # it is whole, and holds objects
        except ValueError as damage:
            self.parser.error(f"ckpt_path={path} cannot be read as a checkpoint: {damage}")
        if not isinstance(error, (ValueError, OSError, RuntimeError, UnpicklingError, MisconfigurationException)):
            raise error
        if hasattr(self, "trainer"):  # the arguments were accepted: the error may be the user's code's
            sys.stderr.write("JSONARGPARSE_DEBUG=true shows the traceback.\n")
        self.parser.error(str(error), error)


def main() -> None:
    """Run the command line; it can name modules in the current directory."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    epilog = "A page about a run that has trained: python -m lightning_lookahead report RUN"
    LookaheadCLI(parser_kwargs={"epilog": epilog})
