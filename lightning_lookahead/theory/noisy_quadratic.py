"""The noisy quadratic model: what SGD and Lookahead around it do to a quadratic loss whose optimum moves at random.

The loss of a step is ``1/2 * sum_i a_i (x_i - c_i)^2``: mode i has the curvature ``a_i``, and an optimum ``c_i`` that
is drawn anew in each step, from a normal distribution of mean 0 and variance ``s2_i``. Modes do not mix. A step of SGD
multiplies the mean by ``r = 1 - learning_rate * a``, and adds to the variance what the noise brings::

    E <- r E
    V <- r^2 V + learning_rate^2 a^2 s2

A cycle of Lookahead, k steps and a sync, does to phi::

    E <- (1 - alpha + alpha r^k) E
    V <- (1 - alpha + alpha r^k)^2 V + alpha^2 learning_rate^2 a^2 s2 (1 + r^2 + ... + r^(2k - 2))

Weights are distances from the mean of the optimum; a number that is given for a vector holds for all modes. Each part
has a module of its own; all names are here.

Source: Zhang, Lucas, Hinton, Ba 2019, noisy quadratic model.
"""

from .loss import excess_loss, expected_loss
from .matched_risk import Comparison, Setting, compare_at_risk, matched_learning_rate
from .moments import Moments, lookahead_trajectory, lookahead_variance, sgd_trajectory, sgd_variance
from .outer_momentum import outer_matrix, outer_rate
from .simulation import simulate
from .step_size import optimal_alpha

__all__ = [
    "Comparison",
    "Moments",
    "Setting",
    "compare_at_risk",
    "excess_loss",
    "expected_loss",
    "lookahead_trajectory",
    "lookahead_variance",
    "matched_learning_rate",
    "optimal_alpha",
    "outer_matrix",
    "outer_rate",
    "sgd_trajectory",
    "sgd_variance",
    "simulate",
]
