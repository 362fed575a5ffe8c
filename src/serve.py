"""An OpenAI-compatible server of one prepared model: python3 src/serve.py --help."""

import sys

import moe_offload.prerequisites  # noqa: F401 - one sentence where a package is missing

from moe_offload.commands.serve import main

if __name__ == "__main__":
    sys.exit(main())
