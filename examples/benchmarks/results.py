"""Write the tables of RESULTS.md from the records.

    python examples/benchmarks/results.py             # from examples/benchmarks/records
    python examples/benchmarks/results.py --check     # only say whether RESULTS.md holds what the records give

To publish what you measured, write it to `examples/benchmarks/records/NAME.json` (`--json`), and run this. NAME is the
program's, or, for a second record of one, any that stands in RESULTS.md as `<!-- records: NAME -->`. What
`on_cuda.py` has measured, in `examples/benchmarks/records/cuda`, stands there as `<!-- records: cuda -->`.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

from examples.lab.bench.program import origin
from examples.lab.published import arguments, publish

HERE = Path(__file__).parent


def block(name: str) -> str:
    """The tables of one record, and how they were made; or of all records of a GPU."""
    if name == "cuda":
        found = sorted((HERE / "records" / name).glob("*.json"))
        return "".join(tables_of(path) for path in found) if found else "\nIt has not been run yet.\n\n"
    return tables_of(HERE / "records" / f"{name}.json")


def tables_of(path: Path) -> str:
    """The tables of one record, and how they were made."""
    report = json.loads(path.read_text())
    tables = [table.markdown() for table in import_module(report["program"]).tables(report)]
    return "\n" + "\n\n".join([f"    {report['command']}", *tables, origin(report), ""]) + "\n"


def main() -> None:
    publish(HERE / "RESULTS.md", block, "examples/benchmarks/results.py", check=arguments(__doc__).check)


if __name__ == "__main__":
    main()
