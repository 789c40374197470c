"""Write the tables and figures of RESULTS.md from the records.

    python examples/paper/results.py             # from examples/paper/records
    python examples/paper/results.py --check     # only say whether RESULTS.md holds what the records give

To publish a run of yours: copy its `.jsonl` from `outputs/paper` into `examples/paper/records` and run this.
"""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from examples.command_line import stop, stoppable
from examples.lab.published import arguments, publish
from examples.lab.study import Study

if TYPE_CHECKING:
    from examples.lab.study import Record

HERE = Path(__file__).parent


def origin(records: list[Record]) -> str:
    """Where records come from, and what they cost."""
    seconds = sum(record["seconds"] for record in records)
    seeds = len({record["settings"]["seed"] for record in records})
    machines = Counter(
        f"{record['machine']['device']}, {record['machine']['threads']} thread(s) a run" for record in records
    )
    versions = Counter(
        ", ".join(f"{name} {number}" for name, number in record["versions"].items()) for record in records
    )
    days = sorted({record["finished"][:10] for record in records})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    runs = f"{len(records)} runs, {seeds} seeds, {seconds / 60:.1f} minutes in all, {when}"
    return "; ".join([runs, *machines, *versions]) + "."


def block(name: str, records: list[Record]) -> str:
    """The tables of one program, its figure, and where the records come from."""
    tables = [table.markdown() for table in import_module(name).tables(records)]
    return "\n" + "\n\n".join([*tables, f"![{name}](figures/{name}.png)", origin(records), ""])


@stoppable()
def main() -> None:
    args = arguments(__doc__)

    def write(name: str) -> str:
        records = Study(name, HERE / "records").records()
        records.sort(key=lambda record: record["settings"]["seed"])
        if not records:
            stop(f"no records in {HERE / 'records' / name}.jsonl")
        if not args.check:
            import_module(name).draw(records).savefig(HERE / "figures" / f"{name}.png")
        return block(name, records)

    publish(HERE / "RESULTS.md", write, "examples/paper/results.py", check=args.check)


if __name__ == "__main__":
    main()
