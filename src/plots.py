"""Figures of one run or several: python3 src/plots.py --help."""

import sys

import moe_offload.prerequisites  # noqa: F401 - one sentence where a package is missing

from moe_offload.commands.plots import main

if __name__ == "__main__":
    sys.exit(main())
