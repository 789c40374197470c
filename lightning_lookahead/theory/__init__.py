"""What the paper derives about Lookahead, as functions of numpy: a noisy and a deterministic quadratic. No torch."""
