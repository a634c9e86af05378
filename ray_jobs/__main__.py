"""The program `patternnet`, also as `python -m ray_jobs`."""

import sys

from ray_jobs.cli import standard_streams

__all__ = ["main"]


def main() -> None:
    """Run the program and exit with its status."""
    standard_streams.use_utf8()
    standard_streams.secure()
    try:
        from ray_jobs.cli import app  # takes seconds
        from ray_jobs.engine import signals
    except KeyboardInterrupt:
        print("patternnet: interrupted", file=sys.stderr)
        sys.exit(3)
    signals.Signals.end = staticmethod(signals.end_process)
    app.main()


if __name__ == "__main__":
    main()
