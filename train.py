"""Runs `esper train` as a script: ``python train.py configs/digits.yaml``."""

import sys

from esper.cli.app import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
