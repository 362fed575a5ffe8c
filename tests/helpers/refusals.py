"""What the preprocessor says of a checkpoint that it does not take."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_offload.commands import prepare


def refusal(
    capsys: pytest.CaptureFixture[str], source: Path, *flags: str, output: Path | None = None
) -> str:
    """The one line on stderr."""
    output = source.parent / "out" if output is None else output
    capsys.readouterr()
    assert prepare.main(["--input-path", str(source), "--output-path", str(output), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert not (output / "manifest.json").exists()
    return captured.err
