"""What tests and benchmarks need: a network in memory, a synthetic task."""
