"""`python -m smolseek` is the command line."""

import sys

from smolseek.cli import main

if __name__ == "__main__":
    sys.exit(main())
