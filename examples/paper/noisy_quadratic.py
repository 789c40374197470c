"""The paper's noisy quadratic model: how much variance Lookahead takes away, and what that buys.

    python examples/paper/noisy_quadratic.py
    python examples/paper/noisy_quadratic.py --data FILE     # your own eigenvalues of the Hessian, one in a line

Left: the variance that the weights settle at, as a part of SGD's with the same learning rate; lines are the formula,
dots a simulation from each seed. Right: SGD and Lookahead with the same steady-state risk (the excess loss that they
settle at) after 1000 steps, the learning rate of each chosen to give that risk, alpha the best. Unless you give others,
the eigenvalues are 1/i for i from 1 to 100; the noise has variance 1, and each weight starts at 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from examples.command_line import stop, stoppable
from examples.lab.report import Table, figure, groups, spread, style
from examples.lab.study import GOES_ON, Study, parser, show
from lightning_lookahead.theory.noisy_quadratic import compare_at_risk, lookahead_variance, sgd_variance, simulate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from examples.lab.study import Record

ALPHAS = (0.2, 0.5, 0.8)
PRODUCTS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5)
RISKS = (0.003, 0.0055, 0.01, 0.0175, 0.03, 0.055, 0.1, 0.175, 0.3)
HARMONIC = "1/i"


@dataclass(frozen=True)
class Ratio:
    """A simulation of one alpha, at several products of learning rate and curvature.

    Args:
        alpha: Slow weights step size.
        products: Learning rate times curvature, one mode for each.
        k: Inner steps between two syncs.
        particles: Independent runs; the variance over them is off by sqrt(2 / particles).
        syncs: After which it is taken.
        seed: Of the noise.
    """

    alpha: float
    products: tuple[float, ...] = PRODUCTS
    k: int = 5
    particles: int = 20_000
    syncs: int = 60
    seed: int = 0

    def run(self) -> Record:
        """Variances of phi, as parts of SGD's."""
        phi = simulate(
            learning_rate=1.0,
            curvature=self.products,
            noise_variance=1.0,
            k=self.k,
            alpha=self.alpha,
            syncs=self.syncs,
            initial_mean=0.0,
            particles=self.particles,
            seed=self.seed,
        )
        sgd = sgd_variance(learning_rate=1.0, curvature=self.products, noise_variance=1.0)
        return {"ratios": (phi.var(axis=0, ddof=1) / sgd).tolist()}


@dataclass(frozen=True)
class Risk:
    """SGD and the best Lookahead with one steady-state risk.

    Args:
        risk: The excess loss that both settle at.
        data: Where the eigenvalues come from.
        k: Inner steps between two syncs.
        steps: Inner steps after which the loss is looked at.
        seed: Of nothing: this is a formula.
    """

    risk: float
    data: str = HARMONIC
    k: int = 5
    steps: int = 1000
    seed: int = 0

    def run(self) -> Record:
        """Learning rate, alpha and excess loss of both."""
        a = eigenvalues(self.data)
        sgd, lookahead = compare_at_risk(
            self.risk, curvature=a, noise_variance=1.0, initial_mean=1.0, k=self.k, steps=self.steps
        )
        return {"sgd": sgd._asdict(), "lookahead": lookahead._asdict()}


def eigenvalues(data: str) -> np.ndarray:
    """1/i, or the numbers in a file, one in a line.

    Raises:
        ValueError: If the file does not hold eigenvalues.
    """
    return 1 / np.arange(1.0, 101.0) if data == HARMONIC else np.loadtxt(data, ndmin=1)


def theory(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """The simulations and the comparisons among the records."""
    compared = [record for record in records if "risk" in record["settings"]]
    simulated = [record for record in records if "alpha" in record["settings"]]
    return simulated, sorted(compared, key=lambda record: record["settings"]["risk"])


def ratio(alpha: float, k: int, products: np.ndarray) -> np.ndarray:
    """What the formula gives for the variance of phi, as a part of SGD's."""
    mode = {"learning_rate": 1.0, "curvature": products, "noise_variance": 1.0}
    return lookahead_variance(**mode, k=k, alpha=alpha) / sgd_variance(**mode)


def tables(records: list[Record]) -> list[Table]:
    """Predicted and simulated variances, and the matched risks."""
    simulated, compared = theory(records)
    first = simulated[0]["settings"]
    variances = Table(
        f"Variance of phi as a part of SGD's, k {first['k']}: formula / simulation; x is learning rate times curvature",
        ["alpha", *(f"x = {x:g}" for x in first["products"])],
    )
    for alpha, runs in groups(simulated, lambda r: r["settings"]["alpha"]).items():
        predicted = ratio(alpha, first["k"], np.array(first["products"]))
        measured = zip(*(run["results"]["ratios"] for run in runs), strict=True)
        cells = [f"{p:.4f} / {spread(m, '{:.4f}')}" for p, m in zip(predicted, measured, strict=True)]
        variances.rows.append([f"{alpha:g}", *cells])
    s = compared[0]["settings"]
    risks = Table(
        f"Excess loss after {s['steps']} steps with the same steady-state risk, eigenvalues {s['data']}, k {s['k']}",
        ["risk", "SGD", "best Lookahead", "alpha", "learning rate: SGD", "learning rate: Lookahead"],
    )
    for record in compared:
        sgd, best = record["results"]["sgd"], record["results"]["lookahead"]
        losses = [f"{one['excess_loss']:.4f}" for one in (sgd, best)]
        rates = [f"{one['learning_rate']:.4g}" for one in (sgd, best)]
        risks.rows.append([f"{record['settings']['risk']:g}", *losses, f"{best['alpha']:.3f}", *rates])
    return [variances, risks]


def draw(records: list[Record]) -> Figure:
    """The variance ratio against learning rate times curvature, and excess loss against risk."""
    simulated, compared = theory(records)
    x = np.linspace(0.01, 1.99, 200)
    with style():
        result = figure(7.2, 3.2)
        left, right = result.subplots(1, 2)
        for index, (alpha, runs) in enumerate(groups(simulated, lambda r: r["settings"]["alpha"]).items()):
            settings = runs[0]["settings"]
            left.plot(x, ratio(alpha, settings["k"], x), color=f"C{index}", label=f"alpha {alpha:g}")
            for run in runs:
                left.plot(settings["products"], run["results"]["ratios"], ".", color=f"C{index}", markersize=5)
        left.axhline(1, color="tab:gray", linewidth=1, label="SGD")
        left.set(xlabel="learning rate x curvature", ylabel="variance / SGD's", ylim=(0, 1.4))
        left.legend(ncols=2, loc="upper center")
        risks = [record["settings"]["risk"] for record in compared]
        for name, label, colour in (("sgd", "SGD", "tab:gray"), ("lookahead", "best Lookahead", "tab:blue")):
            losses = [record["results"][name]["excess_loss"] for record in compared]
            right.plot(risks, losses, "o-", color=colour, markersize=4, label=label)
        right.set(xlabel="steady-state risk", ylabel=f"excess loss after {compared[0]['settings']['steps']} steps")
        right.set(xscale="log", yscale="log")
        right.legend()
    return result


@stoppable(GOES_ON)
def main() -> None:
    arguments = parser(__doc__, seeds=3, data=HARMONIC)
    args = arguments.parse_args()
    try:
        compare_at_risk(1e-9, curvature=eigenvalues(args.data), noise_variance=1.0, initial_mean=1.0, k=1, steps=0)
    except (OSError, ValueError) as error:
        stop(f"--data {args.data}: {error} A file holds one eigenvalue of a Hessian in each line, at least 0.")
    data = args.data if args.data == HARMONIC else str(Path(args.data).resolve())
    particles, risks = (500, RISKS[:2]) if args.smoke else (20_000, RISKS)
    simulated = [Ratio(alpha, particles=particles, seed=seed) for alpha in ALPHAS for seed in range(args.seeds)]
    study = Study("noisy_quadratic", args.out)
    records = study.complete([*simulated, *(Risk(risk, data) for risk in risks)], lambda one, _: one.run())
    show(study, tables(records), draw(records))


if __name__ == "__main__":
    main()
