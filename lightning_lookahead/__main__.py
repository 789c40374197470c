"""``python -m lightning_lookahead``."""

import sys


def main() -> None:
    """Run the command line, or say in one line what it needs."""
    if sys.argv[1:2] == ["report"]:
        from lightning_lookahead.evaluation.report.command import main as report  # noqa: PLC0415 (needs no Lightning)

        report(sys.argv[2:])
        return
    try:
        from lightning_lookahead.trainer.cli import main as run  # noqa: PLC0415 (jsonargparse is optional)

        run()
    except ModuleNotFoundError as error:
        if "jsonargparse" not in str(error):
            raise
        sys.stderr.write("error: the command line needs jsonargparse: pip install 'lightning-lookahead[cli]'\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
