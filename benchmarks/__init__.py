"""Benchmarks and studies; results and pages: `pages`."""
