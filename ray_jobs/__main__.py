"""`python -m ray_jobs` is the program `patternnet`."""

from ray_jobs.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
