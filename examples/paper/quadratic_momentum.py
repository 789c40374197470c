"""How fast heavy ball and Lookahead around it converge on a quadratic, against its condition number.

    python examples/paper/quadratic_momentum.py

Momentum is .99, k 20 and alpha .5; the learning rate of each is the best for each condition number, and the rate is
that of the slowest mode, per inner step. The spectrum decides: with two eigenvalues, 1 and 1/kappa, Lookahead is far
ahead where heavy ball oscillates; with 100 eigenvalues between them (`--data dense`) only up to some condition number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from examples.command_line import stoppable
from examples.lab.report import Table, figure, groups, style
from examples.lab.study import GOES_ON, Study, parser, show
from lightning_lookahead.theory.quadratic import MODES
from lightning_lookahead.theory.tuning import best_parameters

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from examples.lab.study import Record

SPECTRA = {"two": "two eigenvalues, 1 and 1/kappa", "dense": "100 eigenvalues from 1 to 1/kappa, evenly on a log scale"}
KAPPAS = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
HEAVY_BALL = "heavy ball"
KINDS = (HEAVY_BALL, *MODES)


@dataclass(frozen=True)
class Point:
    """One spectrum, and heavy ball alone or with Lookahead around it.

    Args:
        data: A name in `SPECTRA`.
        kappa: The condition number.
        kind: ``"heavy ball"``, or what a sync does to momentum.
        momentum: Of heavy ball.
        k: Inner steps between two syncs.
        alpha: Slow weights step size.
        seed: Of nothing: this is a formula.
    """

    data: str
    kappa: float
    kind: str
    momentum: float = 0.99
    k: int = 20
    alpha: float = 0.5
    seed: int = 0

    def run(self) -> Record:
        """The best learning rate and its rate, the part of the distance that an inner step takes away."""
        number = {"two": 2, "dense": 100}[self.data]
        around = {} if self.kind == HEAVY_BALL else {"k": self.k, "alpha": self.alpha, "mode": self.kind}
        spectrum = np.logspace(0, -np.log10(self.kappa), number)
        best = best_parameters(curvature=spectrum, momentum=self.momentum, **around)
        return {"learning_rate": best.learning_rate, "rate": best.rate}


def tables(records: list[Record]) -> list[Table]:
    """A table for each spectrum: a row for each condition number."""
    result = []
    for data, runs in groups(records, lambda r: r["settings"]["data"], SPECTRA).items():
        s = runs[0]["settings"]
        kinds = groups(runs, lambda r: r["settings"]["kind"], KINDS)
        title = f"Rate for {SPECTRA[data]}; momentum {s['momentum']}, k {s['k']}, alpha {s['alpha']}"
        table = Table(title, ["kappa", *(name(kind) for kind in kinds)])
        for kappa, row in groups(runs, lambda r: r["settings"]["kappa"]).items():
            by_kind = groups(row, lambda r: r["settings"]["kind"], KINDS)
            rates = [f"{record['results']['rate']:.2e}" for of in by_kind.values() for record in of]
            table.rows.append([f"{kappa:g}", *rates])
        result.append(table)
    return result


def name(kind: str) -> str:
    """For headings."""
    return kind if kind == HEAVY_BALL else f"Lookahead, {kind}"


def draw(records: list[Record]) -> Figure:
    """Rate against condition number, a panel for each spectrum."""
    spectra = groups(records, lambda r: r["settings"]["data"], SPECTRA)
    with style():
        result = figure(3.6 * len(spectra), 3.2)
        panels = result.subplots(1, len(spectra), sharey=True, squeeze=False)[0]
        for panel, (data, runs) in zip(panels, spectra.items(), strict=True):
            for index, (kind, of) in enumerate(groups(runs, lambda r: r["settings"]["kind"], KINDS).items()):
                colour = "tab:gray" if kind == HEAVY_BALL else f"C{index - 1}"
                points = [(record["settings"]["kappa"], record["results"]["rate"]) for record in of]
                panel.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, label=name(kind))
            panel.set(xlabel="condition number", xscale="log", yscale="log")
            panel.set_title(SPECTRA[data].partition(",")[0])
        panels[0].set_ylabel("rate of convergence, 1 - rho")
        panels[0].legend()
    return result


@stoppable(GOES_ON)
def main() -> None:
    arguments = parser(__doc__, seeds=1)
    arguments.add_argument("--data", choices=[*SPECTRA, "both"], default="both", help="the spectrum (both)")
    args = arguments.parse_args()
    spectra = list(SPECTRA) if args.data == "both" else [args.data]
    kappas, k = (KAPPAS[:2], 5) if args.smoke else (np.logspace(1, 6, 16).tolist(), 20)
    todo = [Point(data, float(f"{kappa:.3g}"), kind, k=k) for data in spectra for kappa in kappas for kind in KINDS]
    study = Study("quadratic_momentum", args.out)
    records = study.complete(todo, lambda point, _: point.run())
    show(study, tables(records), draw(records))


if __name__ == "__main__":
    main()
