"""The command `pysteer`, and `python -m pysteer`."""

import sys


def main() -> None:
    """Run the command that the program was called with, and exit.

    An interrupt ends the program with one line from the first import on.
    """
    try:
        from pysteer.cli import main as run

        run()
    except KeyboardInterrupt:
        print("pysteer: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
