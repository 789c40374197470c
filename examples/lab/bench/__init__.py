"""What the benchmarks share beside tables and machine names: times, memory, models and the other implementations."""
