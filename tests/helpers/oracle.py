"""Algorithm 1 of the paper: two nested loops. What everything else is tested against.

``phi + alpha * (theta - phi)`` is computed by ``torch.lerp``, here and in the package; how near that is to the exact
value of the formula is tested in `test_tensors.py`.
"""

import torch


@torch.no_grad()
def lookahead(parameters, inner_step, *, k, alpha, steps):
    """Take ``steps`` inner steps, moving ``parameters`` in place; return phi. An unfinished cycle is not synced."""
    phi = [theta.detach().clone() for theta in parameters]
    taken = 0
    while taken < steps:
        for _ in range(k):
            if taken == steps:
                return phi
            with torch.enable_grad():
                inner_step(taken)
            taken += 1
        for slow, theta in zip(phi, parameters, strict=True):
            slow.copy_(torch.lerp(slow, theta, alpha))
            theta.copy_(slow)
    return phi
