"""The README's snippets run as they stand, and its table and map say what is there."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import Regression

import lightning_lookahead
from lightning_lookahead import LookaheadCallback

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("ignore")  # Lightning's, of a tiny run
def test_python_snippets_run_one_after_the_other(capsys):
    names = {"model": Regression()}
    for snippet in blocks("python"):
        exec(compile(snippet, "README.md", "exec"), names)
    assert len(blocks("python")) == 6
    assert names["slow"].syncs == 2
    shown = capsys.readouterr().out
    assert "'val_loss'" in shown
    assert "run.ckpt" in shown


def test_the_command_for_the_main_job_ends_in_a_table_and_saves_a_plot(tmp_path):
    main, tests = blocks("sh")
    assert tests.strip().endswith(".venv/bin/pytest")  # that one runs this
    *setup, program = (part.strip() for part in main.split("&&"))
    assert setup == ["python3 -m venv .venv", ".venv/bin/pip install -c constraints.txt -e '.[examples]'"]
    command = program.replace(".venv/bin/python", sys.executable).replace("examples/", f"{ROOT}/examples/").split()
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    for row in ("SGD", "Lookahead, slow weights", "Lookahead, fast weights"):
        assert re.search(rf"│ {row} +│ +\d+\.\d% │", shown)
    assert (tmp_path / "outputs" / "digits.png").stat().st_size > 10_000


def test_the_table_of_options_has_every_argument_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", README, re.MULTILINE))
    arguments = inspect.signature(LookaheadCallback).parameters
    assert rows == {name: repr(argument.default).replace("'", '"') for name, argument in arguments.items()}


def test_the_map_of_the_code_names_every_module():
    named = set(re.findall(r"^  (\w+\.py) ", README, re.MULTILINE))
    assert named == {path.name for path in (ROOT / "lightning_lookahead").glob("*.py")} - {"__init__.py"}


def test_public_names_are_those_that_exist():
    for name in lightning_lookahead.__all__:
        assert getattr(lightning_lookahead, name).__doc__
    assert set(lightning_lookahead.__all__) <= set(dir(lightning_lookahead))
    with pytest.raises(AttributeError, match="no attribute 'Lookahead'"):
        lightning_lookahead.Lookahead  # noqa: B018
