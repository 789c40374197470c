"""What the pages show runs as it stands: Python, commands, YAML."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch.distributed.run
import yaml

from tests.docs.pages import PAGES, blocks, commands, program_of, text
from tests.helpers.places import EXAMPLES, ROOT, environment

WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
COMMANDS = [pytest.param(command, id=f"{page}-{at}") for page in PAGES for at, command in enumerate(commands(page))]
CLI = ("-m", "lightning_lookahead")
MODEL = ("--model", "lightning.pytorch.demos.boring_classes.BoringModel")


def arguments_of(page):
    """What the page gives its program on the command line."""
    names = {name for _, name, _ in blocks(page, "python") if name}
    given = [shlex.split(command)[2:] for command in commands(page) if command.split()[1] in names]
    return given[0] if given else []


def expected(page):
    """What the page says that is printed, in the comments behind `print`."""
    return re.findall(r"^print\(.*\)  # (.+)$", program_of(page), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_runs_and_prints_what_is_said(page, program):
    Path("page.py").write_text(program_of(page))
    done = program("page.py", *arguments_of(page))
    assert done.returncode == 0, done.stderr
    at = 0
    for line in expected(page):
        found = re.compile(rf"^{re.escape(line)}$", re.MULTILINE).search(done.stdout.replace("\r", "\n"), at)
        assert found, f"{line!r} was not printed: {done.stdout[at:]}"
        at = found.end()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["guides/distributed.md", "guides/ranks-apart.md"])
def test_programs_for_several_ranks_run_under_torchrun(page, tmp_path):
    (tmp_path / "train.py").write_text(program_of(page))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]


def shape(shown):
    """What stays the same on another machine, of tables and of errors: words and lines, not numbers."""
    lines = [re.sub(r"[+-]?\d[\d.e-]*%?", "#", re.sub(r"[\s━─]+", " ", line)).strip() for line in shown.splitlines()]
    return [line for line in lines if re.match("[┏┃┡│└]|error:", line)]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "console")])
def test_commands_print_what_is_shown(page, tmp_path):
    (tmp_path / "examples").symlink_to(EXAMPLES)
    for _, _, block in blocks(page, "console"):
        for part in block.removeprefix("$ ").split("\n$ "):
            command, _, shown = part.partition("\n")
            done = subprocess.run(
                [sys.executable, *shlex.split(command)[1:]],
                capture_output=True,
                text=True,
                check=False,
                env=environment(COLUMNS="100"),
            )
            errors = "".join(line for line in done.stderr.splitlines(keepends=True) if line.startswith("error:"))
            assert shape(done.stdout + errors) == shape(shown)
            assert done.returncode == (2 if errors else 0)


def check_pip(arguments):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for wanted in re.findall(r"\[(.+?)\]", " ".join(arguments)):
        assert set(wanted.split(",")) <= set(extras)


def check_python(arguments, program):
    script, *given = arguments
    if script == "-m":
        assert given[0] == "venv"
    elif script.startswith("examples/"):
        done = program(ROOT / script, "--help")
        assert done.returncode == 0
        assert all(option in done.stdout for option in given if option.startswith("--"))
    else:  # a program of the reader's own, with the callback or without
        done = program(*CLI, *given, *MODEL, "--print_config")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_can_be_given(command, program):
    name, *arguments = shlex.split(command)
    name = name.removeprefix(".venv/bin/")
    if name == "pip":
        check_pip(arguments)
    elif name == "torchrun":
        torch.distributed.run.get_args_parser().parse_args(arguments)
    else:
        assert name in {"python", "python3"}
        check_python(arguments, program)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")])
def test_yaml_is_what_the_command_line_takes(page, program):
    for _, _, block in blocks(page, "yaml"):
        Path("config.yaml").write_text(block)
        done = program(*CLI, "fit", "--config", "config.yaml", *MODEL, "--print_config")
        assert done.returncode == 0, done.stderr


def test_the_yaml_of_the_callback_is_what_is_printed(program):
    printed = program(*CLI, "fit", *MODEL, "--lookahead.monitor.updates", "60", "--print_config")
    (shown,) = (block for _, _, block in blocks("guides/command-line.md", "yaml") if block.startswith("lookahead:"))
    assert yaml.safe_load(shown)["lookahead"] == yaml.safe_load(printed.stdout)["lookahead"]


def test_every_block_is_of_a_kind_that_is_tried():
    kinds = {kind for page in PAGES for kind in re.findall(r"^ *```(\w.*?)(?: title=.*)?$", text(page), re.MULTILINE)}
    assert kinds == {"python", "sh", "console", "yaml"}
