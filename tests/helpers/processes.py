"""Processes that stay, so that many tests of several ranks pay for one start.

`Ranks` is used by tests. Started as a program it is one rank, which does what it finds in a folder.
"""

import gc
import importlib
import os
import pickle
import subprocess
import sys
import time
import traceback
from pathlib import Path

from tests.helpers.places import environment


class Ranks:
    """A number of processes, started by torchrun if there are several, that call functions of test modules together.

    Args:
        number: How many.
        folder: An empty folder for what is passed to and fro.
    """

    def __init__(self, number, folder):
        self.number, self.folder, self.calls = number, folder, 0
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"] if number > 1 else []
        self.log = (folder / "log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "tests.helpers.processes", folder, str(os.getpid())],
            env=environment(PYTHONWARNINGS="ignore"),
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def call(self, function, *arguments, **named):
        """Call it on every rank, in this process's folder; return what each rank returns, or raise what one raised."""
        self.calls += 1
        job = function.__module__, function.__name__, arguments, named
        _write(self.folder / f"call-{self.calls}", (Path.cwd(), job))
        results = [self.folder / f"result-{self.calls}-{rank}" for rank in range(self.number)]
        try:
            found = self._wait_for(results)
        except BaseException:  # out of time: they wait for each other, and would in the next call
            self.close()
            raise
        wrong = [text for fine, text in found if not fine]
        if wrong or len(found) < self.number:
            self.close()
            said = (self.folder / "log").read_text(errors="replace")[-4000:]
            raise AssertionError("\n".join(wrong) or f"{self.number - len(found)} ranks have ended:\n{said}")
        return [value for _, value in found]

    def _wait_for(self, results):
        while not all(path.exists() for path in results) and self.alive:
            if any(path.exists() and not pickle.loads(path.read_bytes())[0] for path in results):
                time.sleep(2)  # what the others say, unless they wait for this one
                break
            time.sleep(0.01)
        return [pickle.loads(path.read_bytes()) for path in results if path.exists()]

    @property
    def alive(self):
        return self.process.poll() is None

    def close(self):
        """End the processes."""
        if self.alive:
            os.killpg(self.process.pid, 9)
            self.process.wait()
        self.log.close()


class Groups:
    """One `Ranks` for each number and name that is asked for, from the first call to the end of the session."""

    def __init__(self, folders):
        self.folders, self.started = folders, {}

    def __call__(self, number, function, *arguments, group="", **named):
        """Call a function on so many ranks; other groups are other processes."""
        ranks = self.started.get((number, group))
        if ranks is None or not ranks.alive:
            ranks = Ranks(number, self.folders.mktemp(f"ranks-{number}-{group}"))
            self.started[number, group] = ranks
        return ranks.call(function, *arguments, **named)

    def close(self):
        for ranks in self.started.values():
            ranks.close()


def _write(path, value):
    """So that whoever sees the file sees all of it."""
    part = path.with_name(f"part-{path.name}")
    part.write_bytes(pickle.dumps(value))
    part.rename(path)


def _serve(folder, parent):
    import torch  # noqa: PLC0415 (not in the process of the tests, which has it)

    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    calls = 0
    while _there(parent):
        path = folder / f"call-{calls + 1}"
        if not path.exists():
            time.sleep(0.01)
            continue
        calls += 1
        cwd, (module, name, arguments, named) = pickle.loads(path.read_bytes())
        os.chdir(cwd)
        torch.manual_seed(0)
        try:
            result = True, getattr(importlib.import_module(module), name)(*arguments, **named)
        except BaseException:  # noqa: BLE001 (the test raises it)
            result = False, f"rank {rank}: {traceback.format_exc()}"
        _write(folder / f"result-{calls}-{rank}", result)
        gc.collect()


def _there(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
