"""The job that explains samples, and its service."""
