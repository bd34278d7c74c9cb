"""The described command: python train.py [RECIPE] [--option value]; the same as `smolseek train`."""

import sys

from smolseek.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
