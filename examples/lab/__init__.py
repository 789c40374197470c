"""What the programs of the paper and the benchmarks share: data, models, training, and runs that leave records."""
