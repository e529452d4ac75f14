"""`python -m pysteer`, the same as the command `pysteer`."""

from pysteer.cli import main

if __name__ == "__main__":
    main()
