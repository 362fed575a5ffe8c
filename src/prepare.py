"""A checkpoint as users have it -> a prepared folder: python3 weights_preprocessor.py --help."""

import sys

import moe_offload.prerequisites  # noqa: F401 - one sentence where a package is missing

from moe_offload.commands.prepare import main

if __name__ == "__main__":
    sys.exit(main())
