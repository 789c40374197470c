"""What the benchmarks share. Tables and machine names are those of the programs of the paper."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "paper"))  # where the package lab is
