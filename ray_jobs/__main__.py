"""`python -m ray_jobs` is the program `patternnet`."""

import sys

from ray_jobs import standard

__all__ = ["main"]


def main() -> None:
    """Run the program and exit with its status."""
    standard.use_utf8()
    standard.secure()
    try:
        from ray_jobs import cli, stopping  # takes seconds
    except KeyboardInterrupt:
        print("patternnet: interrupted", file=sys.stderr)
        sys.exit(3)
    stopping.Signals.end = staticmethod(stopping.end_process)
    cli.main()


if __name__ == "__main__":
    main()
