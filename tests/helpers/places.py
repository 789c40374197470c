"""Where things are, and how a program is started that finds them."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LAUNCHERS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(*folders, **variables):
    """That of a program which imports the package, the tests and what is in more folders; on one thread.

    This process, where other tests have trained, is no rank of it.
    """
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    path = os.pathsep.join(map(str, [*folders, ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
    return {**kept, "PYTHONPATH": path.strip(os.pathsep), "OMP_NUM_THREADS": "1", **variables}
