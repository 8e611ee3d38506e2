"""Comparisons that run on any machine: `python -m benchmarks --help`."""
