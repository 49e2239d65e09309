"""Benchmarks: each can be run by itself from the root of the repository, and prints ratios of one run."""
