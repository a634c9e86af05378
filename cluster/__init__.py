"""Ray clusters: several nodes on this machine, for development and tests, and definitions for other clusters."""
