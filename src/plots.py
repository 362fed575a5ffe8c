"""Figures of one run or several: python3 src/plots.py --help."""

import sys

import moe_offload.prerequisites  # noqa: F401 - one sentence where a package is missing

from moe_offload.commands.draw import plots

if __name__ == "__main__":
    sys.exit(plots())
