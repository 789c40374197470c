"""Write the table of README.md: runs every example and takes the time.

python examples/readme.py             # minutes
python examples/readme.py --check     # runs nothing; only says whether README.md lists what is there
"""

from __future__ import annotations

import ast
import datetime as dt
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from examples.command_line import stoppable
from examples.lab.bench.program import cpu
from examples.lab.progress import track
from examples.lab.published import arguments, publish

HERE = Path(__file__).parent
README = HERE / "README.md"
ONE, TWO = "one process", "two processes, gloo"
NEEDS = {
    "digits.py": ONE,
    "plain_loop.py": f"{ONE}; no Lightning",
    "resume.py": "a second process, which it kills",
    "sharded.py": TWO,
    "bf16.py": ONE,
    "fine_tuning.py": ONE,
    "gan.py": ONE,
    "figure10.py": ONE,
    "outer_momentum.py": ONE,
    "workers.py": TWO,
    "digits.yaml": f"{ONE}; `pip install 'lightning-lookahead[cli]'`",
}
"""What is in the table, in this order."""
YAML = "A run without a program, from the command line and YAML."


def command(name: str) -> str:
    """What a user types, from the root of the repository."""
    if name.endswith(".yaml"):
        return f"python -m lightning_lookahead fit --config examples/{name}"
    return f"python examples/{name}"


def shows(name: str) -> str:
    """The first line of its docstring."""
    if name.endswith(".yaml"):
        return YAML
    return ast.get_docstring(ast.parse((HERE / name).read_text())).splitlines()[0]


def seconds(name: str) -> str:
    """Run it and take the time."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "examples").symlink_to(HERE)
        started = time.monotonic()
        own = command(name).replace("python", sys.executable, 1).split()
        subprocess.run(own, check=True, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
        return f"{time.monotonic() - started:.0f}"


def measured() -> str:
    """The table, from runs one after the other."""
    taken = {name: seconds(name) for name in track(NEEDS, "examples")}
    when = dt.datetime.now(dt.UTC).date().isoformat()
    return table(taken, f"Taken on {when}: {cpu()}, {os.cpu_count()} cores.")


def as_it_is() -> str:
    """The table with the times that README.md has."""
    text = README.read_text()
    found = re.findall(r"^\| `.*examples/(\S+)` \| .* \| (\d+) \| .* \|$", text, re.MULTILINE)
    origin = re.search(r"^Taken on .*$", text, re.MULTILINE)
    return table(dict(found), origin.group() if origin else "")


def table(taken: dict[str, str], origin: str) -> str:
    """A row for each example, and how the times were taken."""
    lines = ["| program | what it shows | seconds | runs in |", "| --- | --- | ---: | --- |"]
    lines += [
        f"| `{command(name)}` | {shows(name)} | {taken.get(name, '')} | {needs} |" for name, needs in NEEDS.items()
    ]
    return "\n".join(["", *lines, "", origin, ""])


@stoppable()
def main() -> None:
    args = arguments(__doc__)
    text = as_it_is() if args.check else measured()
    publish(README, lambda _: text, "examples/readme.py", check=args.check)


if __name__ == "__main__":
    main()
