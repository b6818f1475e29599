"""The program: `streamprune`, or `python -m streamprune`."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C ends it without a traceback, also while the commands are imported."""
    try:
        from streamprune.cli import main as commands
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    commands()


if __name__ == "__main__":
    main()
