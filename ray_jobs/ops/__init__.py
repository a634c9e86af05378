"""Checks of a cluster, and submission to it."""
