"""Where things are, and how a program is started that finds them."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def environment(*folders, **variables):
    """That of a program which imports the package, the tests and what is in more folders; on one thread."""
    path = os.pathsep.join(map(str, [*folders, ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
    return {**os.environ, "PYTHONPATH": path.strip(os.pathsep), "OMP_NUM_THREADS": "1", **variables}
