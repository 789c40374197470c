"""Write the tables of RESULTS.md from the records.

    python examples/benchmarks/results.py             # from examples/benchmarks/records
    python examples/benchmarks/results.py --check     # only say whether RESULTS.md holds what the records give

To publish what you measured, write it to `examples/benchmarks/records/NAME.json` (`--json`), and run this. NAME is the
program's, or, for a second record of one, any that stands in RESULTS.md as `<!-- records: NAME -->`.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

from bench.program import origin
from lab.published import arguments, publish

HERE = Path(__file__).parent


def block(name: str) -> str:
    """The tables of one record, and how they were made."""
    report = json.loads((HERE / "records" / f"{name}.json").read_text())
    tables = [table.markdown() for table in import_module(report["program"]).tables(report)]
    return "\n" + "\n\n".join([f"    {report['command']}", *tables, origin(report), ""]) + "\n"


def main() -> None:
    publish(HERE / "RESULTS.md", block, "examples/benchmarks/results.py", check=arguments(__doc__).check)


if __name__ == "__main__":
    main()
