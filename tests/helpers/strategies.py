"""All that Hypothesis draws."""

from fractions import Fraction

import torch
from hypothesis import strategies as st

# -- weights and step sizes

weights = st.floats(-1e6, 1e6, allow_nan=False)
lists_of_weights = st.lists(weights, min_size=1)
alphas = st.floats(0.01, 1.0)
small_alphas = st.floats(1e-3, 1.0)
large_alphas = st.floats(0.05, 1.0)
ks = st.integers(1, 12)
small_ks = st.integers(1, 8)

# -- tensors, of which some are turned

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]
shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)
kinds_of_tensors = st.lists(st.tuples(shapes, st.sampled_from(DTYPES), st.booleans()), max_size=12)
threads = st.sampled_from([1, 2])
outer_momenta = st.sampled_from([None, (0.75, True), (0.9, False)])
"""None, or mu and whether it is Nesterov's."""


def either(*values):
    """One of them."""
    return st.sampled_from(values)


def settings(**names):
    """A dict with one of some values for each name."""
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in names.items()})


# -- what happens to a run

histories = st.lists(st.sampled_from(["step", "swap", "save", "copy"]), max_size=25)
cycle_lengths = st.integers(1, 6)

# -- quadratics

momenta = st.floats(0.0, 0.99)
xs = st.floats(0.0, 2.0)  # learning rate times curvature
few_xs = st.lists(xs, min_size=1, max_size=4)
xs_of_sgd = st.floats(0.01, 1.99)  # with noise
factors = st.floats(1.001, 1.5)
exact_xs = st.fractions(Fraction(1, 50), Fraction(19, 10), max_denominator=50)
exact_alphas = st.fractions(Fraction(1, 20), 1, max_denominator=20)
steps = st.integers(0, 5)
syncs = st.integers(0, 4)
risks = st.floats(1e-4, 2.0)
seeds = st.integers(0, 10_000)
sizes = st.integers(1, 5)
