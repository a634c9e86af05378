"""How to get a Ray cluster: several nodes on this machine, for development and tests."""
