"""Generate text with a Mixture-of-Experts model: python3 src/main.py --help."""

import sys

import moe_offload.prerequisites  # noqa: F401 - one sentence where a package is missing

from moe_offload.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
