"""A run's folder and its formats."""
