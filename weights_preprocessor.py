"""Launcher of src/prepare.py, so that the documented command runs from the project's root."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    program = Path(__file__).resolve().parent / "src" / "prepare.py"
    os.execv(sys.executable, [sys.executable, str(program), *sys.argv[1:]])
