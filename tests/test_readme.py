"""The README is short, its snippets run as they stand, and its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_lookahead
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
    assert len(blocks("python")) == 4
    assert "slow - fast" in capsys.readouterr().out
    assert Path("run.ckpt").is_file()
    assert Path("figure10.png").stat().st_size > 10_000
    assert len(names["monitor"].history) == 16 + 16 // 5 + 1


def test_it_is_read_in_one_go_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 150
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE) if anchor else []
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, target


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


@pytest.mark.slow
def test_its_commands_train_and_compare_and_report(tmp_path):
    (block,) = blocks("console")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    said = []
    for line in block.strip().splitlines():
        command = line.removeprefix("$ python ").split()
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "slow - fast" in said[1]
    assert (tmp_path / said[2].strip()).name == "report.html"
    assert (tmp_path / said[2].strip()).is_file()


def test_the_windows_of_the_digits_are_drawn_and_counted(tmp_path, program):
    done = program(EXAMPLES / "figure10.py", "--seeds", "1")
    assert done.returncode == 0, done.stderr
    assert re.search(r"│ all +│ +36 │", done.stdout)
    assert (tmp_path / "outputs" / "figure10.png").stat().st_size > 10_000


def test_the_gan_trains_in_three_ways(program):
    done = program(EXAMPLES / "gan.py", "--seeds", "1", "--steps", "12", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"│ ([A-Z].*?) +│", done.stdout)
    assert rows == ["Adam", "Lookahead, each by itself", "Lookahead, together"]


def test_public_names_are_those_that_exist():
    for name in lightning_lookahead.__all__:
        assert getattr(lightning_lookahead, name).__doc__
    assert set(lightning_lookahead.__all__) <= set(dir(lightning_lookahead))
    with pytest.raises(AttributeError, match="no attribute 'Lookahead'"):
        lightning_lookahead.Lookahead  # noqa: B018
