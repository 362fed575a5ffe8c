"""The tool's version, as `--version` prints it and prepared folders record it."""

from typing import Final

VERSION: Final = "0.1.0"
