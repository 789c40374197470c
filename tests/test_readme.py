"""The README's snippets run as they stand, and its table and map say what is there."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_lookahead
from lightning_lookahead import InnerOuterMonitor, LookaheadCallback
from tests.helpers.classifier import Classifier
from tests.helpers.places import EXAMPLES, ROOT

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("ignore")  # Lightning's, of a tiny run
def test_python_snippets_run_one_after_the_other(capsys):
    names = {"model": Classifier()}
    for snippet in blocks("python"):
        exec(compile(snippet, "README.md", "exec"), names)
    assert len(blocks("python")) == 11
    assert names["slow"].syncs == 2
    shown = capsys.readouterr().out
    assert "'accuracy'" in shown
    assert "slow - fast" in shown
    assert Path("figure10.png").stat().st_size > 10_000
    assert len(names["monitor"].history) == 16 + 16 // 5 + 1
    assert "run.ckpt" in shown


@pytest.mark.slow
def test_the_command_for_the_main_job_ends_in_a_table_and_saves_a_plot(tmp_path):
    main, tests = blocks("sh")
    assert tests.strip().endswith(".venv/bin/pytest -n 2 --dist loadfile")  # that one runs this
    *setup, program = (part.strip() for part in main.split("&&"))
    assert setup == ["python3 -m venv .venv", ".venv/bin/pip install -c constraints.txt -e '.[examples]'"]
    command = program.replace(".venv/bin/python", sys.executable).replace("examples/", f"{ROOT}/examples/").split()
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    for row in ("SGD", "Lookahead, slow weights", "Lookahead, fast weights"):
        assert re.search(rf"│ {row} +│ +\d+\.\d% │", shown)
    assert (tmp_path / "outputs" / "digits.png").stat().st_size > 10_000


def shape(text):
    """What stays the same on another machine: words and lines, not numbers."""
    return [
        re.sub(r"[+-]?\d[\d.e-]*%?", "#", re.sub(r"[\s━─]+", " ", line)).strip() for line in text.strip().splitlines()
    ]


@pytest.mark.slow
def test_the_commands_print_what_is_shown(tmp_path):
    (block,) = blocks("console")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for part in block.strip().removeprefix("$ ").split("\n$ "):
        command, _, expected = part.partition("\n")
        done = subprocess.run(
            command.replace("python", sys.executable, 1).split(),
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        errors = "".join(line for line in done.stderr.splitlines(keepends=True) if line.startswith("error:"))
        assert shape(done.stdout + errors) == shape(expected)
        assert done.returncode == (2 if errors else 0)
    command = "-m lightning_lookahead fit --config examples/digits.yaml --lookahead.monitor.updates 60 --print_config"
    printed = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    (shown,) = blocks("yaml")
    assert yaml.safe_load(shown)["lookahead"] == yaml.safe_load(printed.stdout)["lookahead"]
    numbers = json.loads((tmp_path / "outputs" / "digits.json").read_text())
    assert numbers["slow"].keys() == numbers["fast"].keys() == {"accuracy", "loss"}


def test_the_windows_of_the_digits_are_drawn_and_counted(tmp_path, program):
    done = program(EXAMPLES / "figure10.py", "--seeds", "1")
    assert done.returncode == 0, done.stderr
    (heading,) = (line.strip() for line in done.stdout.splitlines() if "Digits, lr" in line)
    assert heading in README
    assert re.search(r"│ all +│ +36 │", done.stdout)
    assert (tmp_path / "outputs" / "figure10.png").stat().st_size > 10_000


def test_the_gan_trains_in_three_ways(program):
    done = program(EXAMPLES / "gan.py", "--seeds", "1", "--steps", "12", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"│ ([A-Z].*?) +│", done.stdout)
    assert rows == ["Adam", "Lookahead, each by itself", "Lookahead, together"]


@pytest.mark.parametrize(
    ("heading", "documented"), [("option", LookaheadCallback), ("option of the monitor", InnerOuterMonitor)]
)
def test_the_tables_of_options_have_every_argument_with_its_default(heading, documented):
    table = README.split(f"| {heading} | default |")[1].split("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", table, re.MULTILINE))
    arguments = inspect.signature(documented).parameters
    assert rows == {name: repr(argument.default).replace("'", '"') for name, argument in arguments.items()}


def test_public_names_are_those_that_exist():
    for name in lightning_lookahead.__all__:
        assert getattr(lightning_lookahead, name).__doc__
    assert set(lightning_lookahead.__all__) <= set(dir(lightning_lookahead))
    with pytest.raises(AttributeError, match="no attribute 'Lookahead'"):
        lightning_lookahead.Lookahead  # noqa: B018
