"""The real commands, in this process, and some of them in one of their own."""

import functools
import inspect
import io
import json
import os
import sys
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer, seed_everything

from lightning_lookahead import InnerOuterMonitor, LookaheadCallback, LookaheadCLI, compare_weights, load_weights
from lightning_lookahead.__main__ import main
from tests.helpers.classifier import Classifier
from tests.helpers.cli_module import Data, Model
from tests.helpers.runs import equal, make_trainer

MODULE = ["-m", "lightning_lookahead"]
SCRIPT = [Path(sys.executable).with_name("lightning-lookahead")]
OURS = ["--model=tests.helpers.cli_module.Model", "--data=tests.helpers.cli_module.Data"]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


class Done(NamedTuple):
    stdout: str
    stderr: str


def run(*arguments, expect=0):
    """What the command does and says, in this process: a process of its own would import everything anew."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["lightning-lookahead", *arguments])
        patch.setattr(os, "environ", os.environ.copy())  # which seed_everything writes to
        warnings.simplefilter("ignore")
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        except Exception:  # noqa: BLE001 (what Python does with it)
            traceback.print_exc()
            code = 1
    assert code == expect, err.getvalue()
    return Done(out.getvalue(), err.getvalue())


@pytest.fixture
def start(program):
    """The same of a process of its own."""

    def command(*arguments, command=MODULE, expect=0):
        done = program(*command, *arguments)
        assert done.returncode == expect, done.stderr
        return done

    return command


def fit(*arguments, name="run", command=run):
    """Train for one epoch, eight steps, and return the checkpoint."""
    saving = [
        "--trainer.callbacks=ModelCheckpoint",
        "--trainer.callbacks.dirpath=.",
        f"--trainer.callbacks.filename={name}",
    ]
    steps = ["--trainer.max_epochs=1", "--seed_everything=1"]
    command("fit", *OURS, *QUIET, *steps, *saving, *arguments)
    return Path(f"{name}.ckpt")


def state_of(path):
    states = torch.load(path, weights_only=True)["callbacks"]
    return next((state for name, state in states.items() if name == "LookaheadCallback"), None)


def test_a_run_of_the_command_is_that_of_a_trainer_and_can_be_looked_at_by_all_the_others(start):
    path = fit("--lookahead.k=3", "--lookahead.alpha=0.8", command=start)
    assert (state_of(path)["k"], state_of(path)["alpha"], state_of(path)["optimizers"][0]["syncs"]) == (3, 0.8, 2)
    seed_everything(1)
    model = Model()
    make_trainer(LookaheadCallback(k=3, alpha=0.8), max_epochs=1, num_sanity_val_steps=None, limit_val_batches=1.0).fit(
        model, Data()
    )
    assert equal([load_weights(path)[name] for name in model.state_dict()], model.state_dict().values())

    expected = compare_weights(make_trainer(limit_val_batches=1.0), Model(), datamodule=Data(), ckpt_path=path)
    shown = run("compare", *OURS, *QUIET, "--ckpt_path=run.ckpt", "--json=out.json")
    assert str(expected) == shown.stdout.strip()
    assert json.loads(Path("out.json").read_text()) == expected.to_dict()
    anew = run("compare", *OURS, *QUIET, "--ckpt_path=run.ckpt", "--recalibrate_batch_norm=3")
    assert anew.stdout != shown.stdout

    for subcommand in ("validate", "test"):
        assert f"{expected.slow['accuracy']:.6f}" in run(subcommand, *OURS, *QUIET, "--ckpt_path=run.ckpt").stdout
    assert run("predict", *OURS, *QUIET, "--ckpt_path=run.ckpt").stdout.count("predicted 20") == 2


def test_a_checkpoint_that_a_program_has_saved_is_compared():
    trainer = make_trainer(LookaheadCallback(k=3), max_steps=4)
    trainer.fit(Model(0.1), Data())
    trainer.save_checkpoint("run.ckpt")  # with hyperparameters, and no word of the class that they are of
    expected = compare_weights(make_trainer(limit_val_batches=1.0), Model(), datamodule=Data(), ckpt_path="run.ckpt")
    done = run("compare", *OURS, *QUIET, "--ckpt_path=run.ckpt")
    assert done.stdout.strip() == str(expected)
    assert "error" not in done.stderr


def test_a_run_can_be_stopped_and_gone_on_with():
    whole = fit("--lookahead.k=3", name="whole")
    fit("--lookahead.k=3", "--trainer.max_steps=4", name="half")
    resumed = fit(
        "--lookahead.k=3", "--ckpt_path=half.ckpt", "--trainer.max_epochs=2", "--trainer.max_steps=8", name="end"
    )
    assert state_of(whole)["optimizers"][0]["steps"] == state_of(resumed)["optimizers"][0]["steps"] == 8


def test_without_lookahead_it_is_the_plain_run():
    path = fit("--lookahead.enabled=false", "--lookahead.k=3")
    assert state_of(path) is None
    seed_everything(1)
    model = Model()
    make_trainer(max_epochs=1, num_sanity_val_steps=None, limit_val_batches=1.0).fit(model, Data())
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert equal([saved[name] for name in model.state_dict()], model.state_dict().values())


def test_a_monitor_is_set_by_its_options():
    options = ["updates=4", "batches=1", "metric=torchmetrics.classification.MulticlassF1Score", "metric.num_classes=3"]
    fit(*(f"--lookahead.monitor.{option}" for option in (*options, "save_csv=true")), "--lookahead.k=2")
    (records,) = Path("lightning_logs").glob("*/inner_outer.csv")
    assert len(records.read_text().splitlines()) == 1 + 4 + 3
    (config,) = Path("lightning_logs").glob("*/config.yaml")
    saved = yaml.safe_load(config.read_text())["lookahead"]
    assert saved["enabled"] is True
    assert saved["monitor"]["init_args"]["updates"] == 4


def test_yaml_goes_in_comes_out_and_goes_in_again():
    Path("first.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"class_path": "tests.helpers.cli_module.Model", "init_args": {"lr": 0.1}},
                "data": "tests.helpers.cli_module.Data",
                "trainer": {"max_steps": 4, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
                "lookahead": {
                    "k": 2,
                    "alpha": 0.8,
                    "eval_weights": "fast",
                    "outer_momentum": 0.9,
                    "monitor": {
                        "class_path": "InnerOuterMonitor",
                        "init_args": {"updates": 2, "metric": {"class_path": "torchmetrics.MeanSquaredError"}},
                    },
                },
            }
        )
    )
    first = run("fit", "--config=first.yaml", "--print_config").stdout
    Path("second.yaml").write_text(first)
    second = run("fit", "--config=second.yaml", "--print_config").stdout
    assert first == second
    read = yaml.safe_load(second)["lookahead"]
    assert (read["k"], read["alpha"], read["eval_weights"], read["enabled"]) == (2, 0.8, "fast", True)
    assert (read["outer_momentum"], read["outer_nesterov"]) == (0.9, True)
    assert read["monitor"]["class_path"] == "lightning_lookahead.InnerOuterMonitor"
    run("fit", "--config=second.yaml", "--lookahead.monitor=null")


BAD = {
    "fit --lookahead.k=0": "k=0 is out of range",
    "fit --lookahead.k=five": 'Parser key "lookahead.k"',
    "fit --lookahead.alpha=1.5": "alpha=1.5 is out of range",
    "fit --lookahead.outer_momentum=1": "outer_momentum=1.0 is out of range",
    "fit --lookahead.outer_momentum=0.9 --lookahead.alpha=1.5": "alpha=1.5 is out of range: with an outer mom",
    "fit --lookahead.eval_weights=middle": "'slow', 'fast'",
    "fit --lookahead.monitor.updates=0": "updates=0 is out of range",
    "fit --lookahead.monitor.update=1": "Option 'update' is not accepted",
    "fit --lookahead.what=1": "lookahead.what",
    "fit --trainer.max_epochs=many": 'Parser key "trainer.max_epochs"',
    "fit --trainer.accelerator=abacus": "accelerator='abacus'",
    "fit --ckpt_path=none.ckpt": "none.ckpt",
    "fit --lookahead=null": "lookahead",
    "fit --trainer.callbacks=lightning_lookahead.LookaheadCallback": "LookaheadCallback",
    "fit --ckpt_path=odd.ckpt": "no Lightning checkpoint",
    "fit --ckpt_path=folder": "folder",
    "fit --optimizer=SGD --optimizer.lr=-1": "Invalid learning rate",
    "compare --ckpt_path=both.ckpt --json=/nowhere/x.json": "json=/nowhere/x.json cannot be written",
    "compare": "give --ckpt_path",
    "compare --ckpt_path=none.ckpt": "none.ckpt",
    "compare --ckpt_path=cut.ckpt": "ckpt_path=cut.ckpt cannot be read",
    "compare --ckpt_path=plain.ckpt": "holds one set of weights",
    "compare --ckpt_path=cut.ckpt --recalibrate_batch_norm=-1": "cut.ckpt",
    "march": "march",
}


def test_a_bad_value_gives_one_line_and_exit_code_2(start):
    trainer = make_trainer(max_steps=2)
    trainer.fit(Model(), Data())
    trainer.save_checkpoint("plain.ckpt")
    trainer = make_trainer(LookaheadCallback(k=3), max_steps=2)
    trainer.fit(Model(), Data())
    trainer.save_checkpoint("both.ckpt")
    torch.save({"a": 1}, "odd.ckpt")
    Path("folder").mkdir()
    Path("cut.ckpt").write_bytes(Path("plain.ckpt").read_bytes()[:2000])

    def refused(line, run=run):
        subcommand, *rest = line.split()
        folder = f"--trainer.default_root_dir=root-{list(BAD).index(line)}"  # where a config is saved, which is once
        return run(subcommand, *OURS, *QUIET, "--trainer.logger=false", folder, *rest, expect=2).stderr

    first = next(iter(BAD))
    shown = [
        (first, refused(first, functools.partial(start, command=SCRIPT))),
        *((line, refused(line)) for line in BAD),
    ]
    for line, stderr in shown:
        assert "Traceback" not in stderr, line
        *_, last = stderr.splitlines()
        assert last.startswith("error: "), (line, stderr)
        assert BAD[line] in last, (line, last)
        assert not any("error" in other.lower() for other in stderr.splitlines()[:-1]), line


@pytest.mark.parametrize(("model", "message"), [("Failing", "of the model's own"), ("Mislogging", "hello")])
def test_an_error_of_the_model_keeps_its_traceback(model, message):
    done = run("fit", f"--model=tests.helpers.cli_module.{model}", OURS[1], *QUIET, "--trainer.logger=false", expect=1)
    assert "Traceback" in done.stderr
    assert "training_step" in done.stderr
    assert message in done.stderr


def test_before_the_first_batch_it_says_how_to_see_the_traceback(monkeypatch):
    arguments = ["fit", "--model=tests.helpers.cli_module.Unset", OURS[1], *QUIET, "--trainer.logger=false"]
    *_, way, last = run(*arguments, expect=2).stderr.splitlines()
    assert (way, last) == ("JSONARGPARSE_DEBUG=true shows the traceback.", "error: of the model's own")
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    done = run(*arguments, "--trainer.default_root_dir=again", expect=1)  # where a config is saved, which is once
    assert "Traceback" in done.stderr
    assert "in setup" in done.stderr


class Unparsed(LookaheadCLI):
    """Its parsers, without anything to parse."""

    def parse_arguments(self, parser, args):
        raise StopIteration


def test_every_argument_has_help():
    cli = Unparsed.__new__(Unparsed)
    with suppress(StopIteration):
        cli.__init__(Model, Data)
    assert set(cli._subcommand_parsers) == {"fit", "validate", "test", "predict", "compare"}
    own = ArgumentParser()
    own.add_class_arguments(InnerOuterMonitor, "monitor")
    actions = [*own._actions]
    for name, parser in cli._subcommand_parsers.items():
        actions += [action for action in parser._actions if action.dest.startswith("lookahead") or name == "compare"]
    documented = [action for action in actions if not action.dest.startswith(("optimizer", "lr_scheduler", "trainer"))]
    expected = {f"lookahead.{name}" for name in inspect.signature(LookaheadCallback).parameters}
    expected |= {f"monitor.{name}" for name in inspect.signature(InnerOuterMonitor).parameters}
    assert expected | {"lookahead.enabled", "ckpt_path", "json"} <= {action.dest for action in documented}
    for action in documented:
        assert action.help
        assert not action.help.strip().startswith("(type"), action.dest
        assert len(action.help) > 10, action.dest


def test_a_program_of_ones_own_takes_it(start):
    Path("train.py").write_text(
        "from lightning_lookahead import LookaheadCLI\nfrom tests.helpers.cli_module import Data, Model\n"
        "cli = LookaheadCLI(Model, Data, seed_everything_default=1)\n"
        "print('trained', cli.trainer.callbacks[0].settings.k)\n"
    )
    options = ["--trainer.max_steps=4", "--lookahead.k=3"]
    assert "trained 3\n" in start("fit", *QUIET, *options, command=["train.py"]).stdout


def test_without_subcommands_it_makes_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli = LookaheadCLI(Model, Data, run=False, args=["--lookahead.k=7", *QUIET])
    assert [callback.settings.k for callback in cli.trainer.callbacks if isinstance(callback, LookaheadCallback)] == [7]


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (
            ["alpha=lightning_lookahead.Cosine", "alpha.start=0.5", "alpha.end=1", "alpha.syncs=3"],
            "alpha",
            "Cosine(start=0.5",
        ),
        (["alpha=AdaptiveAlpha", "alpha.curvature=hvp"], "alpha", "AdaptiveAlpha(curvature='hvp', alpha_low=0.1)"),
        (["alpha=0.3"], "alpha", "0.3"),
        (["k=lightning_lookahead.Linear", "k.start=1", "k.end=4", "k.syncs=3"], "k", "Linear(start=1"),
        (["exclude=*.bias"], "exclude", "['*.bias']"),
        (['exclude=["*.bias","net.0.*"]'], "exclude", "['*.bias', 'net.0.*']"),
        (["slow_dtype=float64"], "slow_dtype", "'float64'"),
        (["buffers=sync"], "buffers", "'sync'"),
        (["outer_momentum=0.9", "alpha=1.2"], "outer_momentum", "0.9"),
        (["outer_momentum=0.9", "outer_nesterov=false"], "outer_nesterov", "False"),
    ],
)
def test_every_part_can_be_set(arguments, name, value, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli = LookaheadCLI(Model, Data, run=False, args=[*(f"--lookahead.{argument}" for argument in arguments), *QUIET])
    (callback,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, LookaheadCallback))
    assert repr({**vars(callback), **vars(callback.settings)}[name]).startswith(value)


def test_a_trainer_class_that_cannot_compare_is_refused():
    with pytest.raises(ValueError, match="has no compare.*subclass of LookaheadTrainer"):
        LookaheadCLI(Classifier, trainer_class=Trainer, args=["fit"])


def test_without_jsonargparse_it_says_what_to_install(start):
    program = "import sys; sys.modules['jsonargparse'] = None\nfrom lightning_lookahead.__main__ import main; main()"
    done = start(command=["-c", program], expect=2)
    assert done.stderr == "error: the command line needs jsonargparse: pip install 'lightning-lookahead[cli]'\n"


def test_nothing_is_added_to_trainers_that_did_not_ask():
    assert {entry.group for entry in distribution("lightning-lookahead").entry_points} == {"console_scripts"}
