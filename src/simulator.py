"""Replay routing through the cache without a model: python3 src/simulator.py --help."""

import sys

import moe_offload.prerequisites  # noqa: F401 - one sentence where a package is missing

from moe_offload.commands.simulate import main

if __name__ == "__main__":
    sys.exit(main())
