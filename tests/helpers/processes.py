"""Processes that are forked from one which has imported everything, and ranks that stay for many calls.

To start Python with torch and Lightning takes seconds. Here one process pays for it, `Forks`; what it forks has trained
nothing yet. `Groups` gives tests the ranks that they ask for, as torchrun starts them; `Forks.program` runs a program.
Started as a program, this module is the process that forks.
"""

import contextlib
import gc
import importlib
import os
import pickle
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from tests.helpers.places import environment

IMPORTS = ("tests.helpers.sharded", "tests.helpers.modes", "torch.profiler", "matplotlib.pyplot", "rich.table")


class Forks:
    """The process that forks; it ends with this one."""

    def __init__(self, folder, imports):
        self.folder, self.requests = folder, 0
        self.log = (folder / "log").open("wb")
        # Where a GPU may be seen nothing is imported before the fork: CUDA does not outlive one.
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, *(imports if hidden else ())],
            env=environment(PYTHONWARNINGS="ignore"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )

    def fork(self, function, *arguments):
        """Call a function of this module in a process of its own; return the process's number."""
        pickle.dump((function.__name__, arguments), self.process.stdin)
        self.process.stdin.flush()
        try:
            return pickle.load(self.process.stdout)
        except EOFError:
            raise AssertionError((self.folder / "log").read_text(errors="replace")[-4000:]) from None

    def program(self, *arguments, **variables):
        """Do in this process's folder what Python does with these arguments: a path, or ``-m`` or ``-c`` first.

        Returns:
            What became of it, as `subprocess.run` does.
        """
        self.requests += 1
        said = [self.folder / f"{self.requests}-{name}" for name in ("stdout", "stderr", "code")]
        process = self.fork(_run, Path.cwd(), [*map(str, arguments)], variables, said)
        while not said[2].exists() and _there(process):
            time.sleep(0.005)
        code = int(said[2].read_text()) if said[2].exists() else None
        return subprocess.CompletedProcess(arguments, code, *(part.read_text() for part in said[:2]))

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


class Ranks:
    """A number of processes that call functions of modules together.

    Args:
        number: How many.
        folder: An empty folder for what is passed to and fro.
        forks: What forks them.
    """

    def __init__(self, number, folder, forks):
        self.number, self.folder, self.calls = number, folder, 0
        jobs = [folder / f"jobs-{rank}" for rank in range(number)]
        for path in jobs:
            os.mkfifo(path)
        self.leader = forks.fork(_lead, number, folder)
        self.jobs = [self._open(path) for path in jobs]

    def _open(self, path):
        while self.alive:
            with contextlib.suppress(OSError):  # nobody reads there yet
                return os.fdopen(os.open(path, os.O_WRONLY | os.O_NONBLOCK), "wb")
            time.sleep(0.005)
        raise AssertionError(self._said())

    def call(self, function, *arguments, **named):
        """Call it on every rank, in this process's folder; return what each rank returns, or raise what one raised."""
        self.calls += 1
        job = Path.cwd(), function.__module__, function.__name__, arguments, named
        (self.folder / f"call-{self.calls}").write_bytes(pickle.dumps(job))
        results = [self.folder / f"result-{self.calls}-{rank}" for rank in range(self.number)]
        try:
            for jobs in self.jobs:
                jobs.write(b"%d\n" % self.calls)
                jobs.flush()
            found = self._wait_for(results)
        except BaseException:  # out of time: they wait for each other, and would in the next call
            self.close()
            raise
        wrong = [text for fine, text in found if not fine]
        if wrong or len(found) < self.number:
            self.close()
            raise AssertionError("\n".join(wrong) or f"{self.number - len(found)} ranks have ended:\n{self._said()}")
        return [value for _, value in found]

    def _wait_for(self, results):
        while not all(path.exists() for path in results) and self.alive:
            if any(path.exists() and not pickle.loads(path.read_bytes())[0] for path in results):
                time.sleep(2)  # what the others say, unless they wait for this one
                break
            time.sleep(0.005)
        return [pickle.loads(path.read_bytes()) for path in results if path.exists()]

    def _said(self):
        return (self.folder / "log").read_text(errors="replace")[-4000:]

    @property
    def alive(self):
        return _there(self.leader)

    def dismiss(self):
        """Tell the processes that there are no more calls: they end by themselves."""
        for jobs in self.jobs:
            with contextlib.suppress(OSError):  # they have ended
                jobs.close()

    def close(self):
        """End the processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.leader, signal.SIGKILL)


class Groups:
    """One `Ranks` for each number and name that is asked for, from the first call to the end of the session."""

    def __init__(self, folders):
        self.folders, self.started, self.forking = folders, {}, {}

    def __call__(self, number, function, *arguments, group="", **named):
        """Call a function on so many ranks; other groups are other processes."""
        ranks = self.started.get((number, group))
        if ranks is None or not ranks.alive:
            ranks = Ranks(number, self.folders.mktemp(f"ranks-{number}-{group}"), self.forks())
            self.started[number, group] = ranks
        return ranks.call(function, *arguments, **named)

    def forks(self, *imports):
        """What forks processes that see the GPUs which this one sees now, and have imported these modules, or all."""
        kind = os.environ.get("CUDA_VISIBLE_DEVICES"), imports or IMPORTS
        if kind not in self.forking:
            self.forking[kind] = Forks(self.folders.mktemp("forks"), kind[1])
        return self.forking[kind]

    def close(self):
        # In order where that goes: a process that is killed cannot say which lines it has reached.
        for ranks in self.started.values():
            ranks.dismiss()
        patience = time.monotonic() + 20
        while any(ranks.alive for ranks in self.started.values()) and time.monotonic() < patience:
            time.sleep(0.005)
        for ranks in self.started.values():
            ranks.close()
        for forks in self.forking.values():
            forks.close()


def _there(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _write(path, value):
    """So that whoever sees the file sees all of it."""
    part = path.with_name(f"part-{path.name}")
    part.write_bytes(value)
    part.rename(path)


# -- in the process that forks, and in those that it has forked


def _fork_on_demand():
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is no answer
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that end
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()
    while True:
        try:
            function, arguments = pickle.load(requests)
        except EOFError:
            return
        process = os.fork()
        if process == 0:
            _alone(globals()[function], *arguments)
        pickle.dump(process, answers)
        answers.flush()


def _alone(function, *arguments):
    """Call a function in a process that was forked, and end it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    code = 1
    try:
        code = function(*arguments) or 0
    except BaseException:  # noqa: BLE001 (nothing may go back into the loop)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _print_to(stdout, stderr):
    for number, path in ((0, os.devnull), (1, stdout), (2, stderr)):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0)  # noqa: SIM115 (what was read ahead is of the one that forks)


def _run(folder, arguments, variables, said):
    """Do what Python does with these arguments."""
    os.setsid()
    _print_to(*said[:2])
    os.chdir(folder)
    os.environ.update(variables)
    option = arguments[0] in {"-c", "-m"}
    sys.argv[:] = [arguments[0], *arguments[1 + option :]]
    sys.path.insert(0, "" if option else str(Path(arguments[0]).parent))
    code = 1
    try:
        if arguments[0] == "-c":
            exec(compile(arguments[1], "-c", "exec"), {"__name__": "__main__"})
        elif arguments[0] == "-m":
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = int(end.code) if isinstance(end.code, int) else int(end.code is not None)
        if code == 1 and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)  # noqa: T201
    except BaseException:  # noqa: BLE001 (whatever it is)
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    _write(said[2], str(code).encode())


def _lead(number, folder):
    """Fork ranks and end with all of them, or with the first that fails, as torchrun does."""
    os.setsid()
    _print_to(folder / "log", folder / "log")
    if number == 1:
        _serve(folder, 0, {})
        return
    launched = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1}
    launched |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RUN_ID": "tests"}
    launched |= {"TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0}
    for rank in range(number):
        if os.fork() == 0:
            _alone(_serve, folder, rank, {**launched, "RANK": rank, "LOCAL_RANK": rank})
    from torch.distributed import TCPStore  # noqa: PLC0415 (which has threads: nothing is forked after it)

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # at a port that is free, whichever it is
    _write(folder / "port", str(store.port).encode())
    for _ in range(number):
        if os.wait()[1]:
            time.sleep(1)  # what the others say
            os.killpg(0, signal.SIGKILL)


def _serve(folder, rank, variables):
    """Call what is asked for until nobody can ask any more."""
    import torch  # noqa: PLC0415 (not in the process of the tests, which has it)

    torch.set_num_threads(1)
    if variables:
        while not (folder / "port").exists():
            time.sleep(0.005)
        os.environ.update({name: str(value) for name, value in variables.items()})
        os.environ["MASTER_PORT"] = (folder / "port").read_text()
    with (folder / f"jobs-{rank}").open("rb") as jobs:
        for number in map(int, jobs):
            cwd, module, name, arguments, named = pickle.loads((folder / f"call-{number}").read_bytes())
            os.chdir(cwd)
            torch.manual_seed(0)
            try:
                result = True, getattr(importlib.import_module(module), name)(*arguments, **named)
            except BaseException:  # noqa: BLE001 (the test raises it)
                result = False, f"rank {rank}: {traceback.format_exc()}"
            _write(folder / f"result-{number}-{rank}", pickle.dumps(result))
            gc.collect()


if __name__ == "__main__":
    _fork_on_demand()
