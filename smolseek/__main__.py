"""Runs the command line for `python -m smolseek`."""

import sys

from smolseek.cli import main

if __name__ == "__main__":
    sys.exit(main())
