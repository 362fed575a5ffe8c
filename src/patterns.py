"""Reuse of experts across layers and tokens: python3 src/patterns.py --help."""

import sys

import moe_offload.prerequisites  # noqa: F401 - one sentence where a package is missing

from moe_offload.commands.draw import patterns

if __name__ == "__main__":
    sys.exit(patterns())
