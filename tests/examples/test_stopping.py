"""Programs that take long show how long, and Ctrl-C ends them with one line and exit code 130."""

import io
import re
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console

from examples.command_line import leads, stop, stoppable
from examples.lab import processes, progress
from examples.lab.progress import TimeLeft, bar, track
from tests.helpers.places import EXAMPLES, LAUNCHERS
from tests.helpers.terminal import CTRL_C, Terminal


@pytest.fixture
def _as_first(monkeypatch):
    """A program of one process, which may change what SIGINT does."""
    for name in (*LAUNCHERS, "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.argv", ["some/program.py"])
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted():
    raise KeyboardInterrupt


def interrupted_in_a_trainer():
    """Lightning exits with code 1."""
    try:
        interrupted()
    except KeyboardInterrupt:
        raise SystemExit(1)  # noqa: B904 (as Lightning does)


@pytest.mark.usefixtures("_as_first")
@pytest.mark.parametrize("function", [interrupted, interrupted_in_a_trainer])
@pytest.mark.parametrize(("then", "line"), [("", "stopped."), ("Once more.", "stopped. Once more.")])
def test_an_interrupt_is_one_line_and_code_130(function, then, line, capsys):
    with pytest.raises(SystemExit) as end:
        stoppable(then)(function)()
    assert end.value.code == 130
    assert capsys.readouterr() == ("", f"program.py: {line}\n")


@pytest.mark.usefixtures("_as_first")
def test_another_end_stays_what_it_is(capsys):
    assert stoppable()(lambda: 7)() == 7
    with pytest.raises(SystemExit, match="program.py: no such file"):
        stoppable()(stop)("no such file")
    with pytest.raises(ZeroDivisionError):
        stoppable()(lambda: 1 / 0)()
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("_as_first")
def test_of_several_processes_the_first_one_says_it(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not leads()
    with pytest.raises(SystemExit) as end:
        stoppable()(interrupted)()
    assert end.value.code == 130
    assert capsys.readouterr().err == ""


@pytest.fixture
def screen(monkeypatch):
    """What bars show, as if on a terminal; the clock goes on by a minute with every look at it."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, height=20)
    clock = iter(range(0, 10**6, 60))
    monkeypatch.setattr(progress, "console", console)
    monkeypatch.setattr(progress._bars.live, "console", console)
    monkeypatch.setattr(progress, "INTERVAL", -1)
    monkeypatch.setattr(progress._bars, "get_time", lambda: float(next(clock)))
    return file


def test_bars_count_below_one_another_and_leave_nothing(screen):
    for outer in track(["a", "b"], "letters"):
        with bar("numbers", 10, before=4) as show:
            show(7)
        assert outer in "ab"
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"letters .* 0/2 .*-:--:-- left", shown)
    assert re.search(r"letters .* 1/2 .*\d:\d\d:\d\d left", shown)
    assert re.search(r"numbers .* 4/10 .*-:--:-- left", shown)
    assert re.search(r"numbers .* 7/10 .*\d:\d\d:\d\d left", shown)
    assert not progress._bars.tasks
    assert not progress._bars.live.is_started


def test_the_time_left_goes_by_what_was_done_since_the_bar_began():
    now = [0.0]
    bars = progress.Progress(TimeLeft(), get_time=lambda: now[0], auto_refresh=False)
    bars.add_task("", total=10, completed=4, before=4)
    (task,) = bars.tasks
    assert str(TimeLeft().render(task)) == "-:--:-- left"
    now[0], task.completed = 90.0, 7
    assert str(TimeLeft().render(task)) == "0:01:30 left"
    task.completed = 10
    assert str(TimeLeft().render(task)) == "0:00:00 left"


def test_without_a_terminal_bars_print_nothing(capsys):
    assert list(track([1, 2], "numbers")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_an_error_within_a_bar_takes_it_away():
    with pytest.raises(ZeroDivisionError), bar("numbers", 3):
        raise ZeroDivisionError
    assert not progress._bars.tasks


def test_a_command_that_fails_says_why(tmp_path):
    processes.run(["sh", "-c", "echo $HOW"], tmp_path / "log", HOW="fine")
    assert (tmp_path / "log").read_text() == "fine\n"
    with pytest.raises(RuntimeError, match="ended with code 3:\nout of luck"):
        processes.run(["sh", "-c", "echo out of luck >&2; exit 3"], tmp_path / "log")


PROGRAMS = {
    "digits.py": ((), r"Epoch 0"),
    "plain_loop.py": ((), r"403 steps"),
    "resume.py": ((), r"killed after"),
    "sharded.py": ((), r"Epoch 0"),
    "paper/momentum_at_sync.py": (("--smoke",), r"steps .* left"),
    "paper/noisy_quadratic.py": ((), r"noisy_quadratic .* \d+/\d+ .* left"),
    "benchmarks/sync.py": ((), r"rounds .* left"),
    "benchmarks/training.py": (("--smoke",), r"rounds of fits .* left"),
    "optimizers/table.py": ((), r"torch.optim .* left"),
}
"""Arguments, and what is on the terminal when it is time for Ctrl-C."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_ctrl_c_ends_a_program_with_one_line(name, tmp_path):
    arguments, pattern = PROGRAMS[name]
    with Terminal(EXAMPLES / name, *arguments, cwd=tmp_path) as terminal:
        terminal.wait_for(pattern)
        terminal.press(CTRL_C)
        code = terminal.end()
    assert code == 130, terminal.text
    assert "Traceback" not in terminal.text
    assert terminal.text.count(f"{Path(name).name}: stopped.") == 1, terminal.text


def commands_with(text):
    """The command lines of running processes in which a text is."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text(errors="replace").replace("\0", " ")
        except OSError:  # it has ended
            continue
        if text in line:
            found.append(line)
    return found


@pytest.mark.slow
def test_ctrl_c_ends_the_ranks_that_a_program_has_started_and_the_command_goes_on(tmp_path):
    arguments = EXAMPLES / "paper" / "workers.py", "--smoke", "--seeds", "1", "--out", tmp_path / "out"
    with Terminal(*arguments, cwd=tmp_path) as terminal:
        while (
            sum("--worker" in line and "torch.distributed.run" not in line for line in commands_with(str(tmp_path))) < 2
        ):
            assert terminal.process.poll() is None, terminal.text
            time.sleep(0.05)
        terminal.press(CTRL_C)
        code = terminal.end()
    assert code == 130, terminal.text
    assert "workers.py: stopped. The same command goes on" in terminal.text
    assert "Traceback" not in terminal.text
    assert not commands_with(str(tmp_path))


@pytest.mark.slow
def test_a_benchmark_of_many_runs_goes_on_where_it_was_stopped(tmp_path):
    command = EXAMPLES / "benchmarks" / "convergence.py", "--smoke"
    with Terminal(*command, cwd=tmp_path) as terminal:
        terminal.wait_for(r"\(\d+ s\)(?s:.)*\(\d+ s\)")
        terminal.press(CTRL_C)
        assert terminal.end() == 130, terminal.text
    assert "convergence.py: stopped. The same command goes on" in terminal.text
    (records,) = (tmp_path / "outputs").glob("*.jsonl")
    before = len(records.read_text().splitlines())
    with Terminal(*command, cwd=tmp_path) as terminal:
        assert terminal.end() == 0, terminal.text
    runs = 4 * 2 + 4 * 2  # of the tuning, and of the seeds
    assert len(re.findall(r"\(\d+ s\)", terminal.text)) == runs - before
    assert list((tmp_path / "outputs").iterdir()) == []
