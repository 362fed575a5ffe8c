"""Imported before all else by every entry point: one sentence where Python lacks its packages.

Started with another Python than the one that `make setup` equips, a program would end in the
traceback of an ImportError, or, stopped while it still imports, of a KeyboardInterrupt. Uses the
standard library alone.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What requirements.txt installs, by the names that are imported.
PACKAGES = (
    *("torch", "transformers", "safetensors", "mistral_common", "google.protobuf", "numpy"),
    *("gguf", "accelerate", "tqdm", "nvtx", "psutil", "pynvml", "matplotlib", "yaml"),
    "pydantic",
)


def missing_packages() -> list[str]:
    """Those of PACKAGES that this Python cannot import."""
    return [name for name in PACKAGES if not _is_there(name)]


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:  # not even the package around it
        return False


def complaint(missing: list[str], root: Path = ROOT) -> str:
    """The sentence for people who started this Python; `root` is the project's folder."""
    python = root / ".venv" / "bin" / "python"
    remedy = "run `make setup` in the project's folder, then `source .venv/bin/activate`"
    if python.exists():
        remedy = f"run `source {root}/.venv/bin/activate` first, or start it with {python}"
    named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
    return (
        f"error: expected the packages of requirements.txt, found {sys.executable} without "
        f"{named}: {remedy}"
    )


if _missing := missing_packages():
    print(complaint(_missing), file=sys.stderr)
    sys.exit(2)
if sys.excepthook is sys.__excepthook__:
    sys.excepthook = lambda kind, value, trace: (
        print("interrupted before any work was done", file=sys.stderr)
        if issubclass(kind, KeyboardInterrupt)
        else sys.__excepthook__(kind, value, trace)
    )
