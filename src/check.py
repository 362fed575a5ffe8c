"""A prepared folder's answers against transformers' own model: python3 src/check.py --help."""

import sys

import moe_offload.prerequisites  # noqa: F401 - one sentence where a package is missing

from moe_offload.commands.check import main

if __name__ == "__main__":
    sys.exit(main())
