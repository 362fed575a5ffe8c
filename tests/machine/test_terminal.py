"""Text reaches whatever a person looks at; progress is shown on a terminal, and nowhere else."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import nn

from moe_offload.errors import FEW_THREADS, UserError, plain
from moe_offload.machine.terminal import (
    RunProgress,
    answer,
    complain,
    say,
    show,
)

SOURCES = Path(__file__).resolve().parents[2] / "src"


class Terminal(io.StringIO):
    def __init__(self, is_terminal: bool = True) -> None:
        super().__init__()
        self._is_terminal = is_terminal
        self.written = Event()

    def write(self, text: str) -> int:
        n_characters = super().write(text)
        self.written.set()
        return n_characters

    def isatty(self) -> bool:
        return self._is_terminal


def run(file: Terminal, n_prompts: int, streamed: bool = False) -> list[nn.Module]:
    """Two tokens for each prompt; returns the blocks, of which evaluating runs three."""
    blocks = [nn.Identity() for _ in range(3)]
    progress = RunProgress(blocks, n_prompts, 2, streamed=streamed, file=file, delay_s=0.0)
    for _ in range(n_prompts):
        progress.evaluate(1)
        for block in blocks:
            block(torch.zeros(1))
        progress.token()
        progress.token()
        progress.prompt_done()
    progress.close()
    return blocks


@pytest.mark.parametrize(("n_prompts", "unit"), [(1, "tok"), (4, "prompt")])
def test_a_terminal_sees_evaluation_and_tokens(n_prompts: int, unit: str) -> None:
    file = Terminal()
    blocks = run(file, n_prompts)
    shown = file.getvalue()
    assert "evaluating the prompt" in shown
    assert "layer" in shown
    assert unit in shown
    assert not any(block._forward_hooks for block in blocks), "decode steps pay for no hook"


def test_streamed_text_is_not_mixed_with_a_bar() -> None:
    file = Terminal()
    run(file, 4, streamed=True)
    assert "evaluating the prompt" in file.getvalue()
    assert "prompts:" not in file.getvalue()


@pytest.mark.parametrize("streamed", [False, True])
def test_nothing_where_there_is_no_terminal(streamed: bool) -> None:
    file = Terminal(is_terminal=False)
    blocks = run(file, 4, streamed)
    assert file.getvalue() == ""
    assert not any(block._forward_hooks for block in blocks)


def test_a_log_gets_a_line_now_and_then() -> None:
    file = io.StringIO()
    progress = RunProgress([], 3, 5, streamed=False, logged=True, file=file, line_every_s=0.0)
    progress.token()
    progress.prompt_done()
    progress.token()
    progress.close()
    first, second = file.getvalue().splitlines()
    assert first.startswith("0 of 3 prompts done, 1 tokens, ")
    assert second.startswith("1 of 3 prompts done, 2 tokens, ") and second.endswith(" tok/s")


def test_what_takes_under_a_second_is_not_shown() -> None:
    file = Terminal()
    progress = RunProgress([nn.Identity()], 1, 5, streamed=False, file=file)
    progress.evaluate(1)
    progress.token()
    progress.close()
    assert file.getvalue() == ""


def test_an_evaluation_that_is_cut_short_leaves_no_hook() -> None:
    block = nn.Identity()
    progress = RunProgress([block], 3, 5, streamed=False, file=Terminal(), delay_s=0.0)
    progress.evaluate(3)
    progress.close()
    assert not block._forward_hooks


def encoded(encoding: str, text: str) -> bytes:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    show(text, file=file)
    return file.buffer.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize(
    ("encoding", "written"),
    [
        ("utf-8", "é 日 \\udcff\n".encode()),
        ("latin-1", b"\xe9 \\u65e5 \\udcff\n"),
        ("ascii", b"\\xe9 \\u65e5 \\udcff\n"),
    ],
)
def test_what_a_terminal_cannot_show_it_shows_as_an_escape(encoding: str, written: bytes) -> None:
    """The last character stands for a byte that is not UTF-8."""
    assert encoded(encoding, "é 日 \udcff") == written


def test_an_answer_reaches_a_file_to_the_letter() -> None:
    assert encoded("utf-8", "\x1b[1mbold\x1b[0m\tend") == b"\x1b[1mbold\x1b[0m\tend\n"


def test_messages_hold_no_escapes_and_are_short(capsys: pytest.CaptureFixture[str]) -> None:
    complain(UserError("no file\n  \x1b]0;owned\x07\x9b31m \udcff\u2028"))
    complain("x" * 200_000 + "; shorten it")
    say("two\nlines\r")
    hostile, long, *lines = capsys.readouterr().err.splitlines()
    assert hostile == r"error: no file \x1b]0;owned\x07\x9b31m \udcff\u2028"
    assert len(long) < 2100
    assert long.startswith("error: xxx") and long.endswith("x; shorten it")
    assert lines == ["two", r"lines\r"]
    assert plain("é, 日 and \U0001f4a5") == "é, 日 and \U0001f4a5"


def raising(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("give another"), 2, "error: give another\n"),
        (OSError(28, "No space left", "a.csv"), 2, "error: [Errno 28] No space left: 'a.csv'\n"),
        (RuntimeError("can't start new thread"), 2, f"error: {FEW_THREADS}\n"),
        (
            MemoryError(),
            2,
            "error: no memory is left: end other programs, or raise the limit that is set\n",
        ),
        (
            RuntimeError("Symlink loop from 'a'"),
            2,
            "error: Symlink loop from 'a': it leads to itself, remove it\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_what_ends_a_program_early_is_one_sentence(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(raising(error), debug=False) == code
    assert capsys.readouterr() == ("", said)


def test_the_debugger_sees_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(raising(UserError("give another")), debug=True) == 2
    assert "Traceback" in capsys.readouterr().err


PROGRAM = """
import os, sys
from moe_offload.machine.terminal import answer, say, show

def work():
    with open("file", "w") as file:
        show("an answer")
        os.write(1, b"a library's words")
        say("a note")
        file.write(f"{file.fileno()}")
    return 7

sys.exit(answer(work, debug=False))
"""


@pytest.mark.parametrize(
    ("streams", "code", "out", "err"),
    [
        ("", 7, "an answer\na library's words", "a note\n"),
        (">&-", 7, "", "standard output is closed: what this program prints is lost\na note\n"),
        ("2>&-", 7, "an answer\na library's words", ""),
        ("<&- >&- 2>&-", 7, "", ""),
        (">/dev/full", 2, "", "error: [Errno 28] No space left on device: '<stdout>'\n"),
        ("2>/dev/full", 7, "an answer\na library's words", ""),
    ],
)
def test_closed_and_full_streams(
    streams: str, code: int, out: str, err: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        ["/bin/bash", "-c", f'"$0" -c "$1" {streams}', sys.executable, PROGRAM],
        env=os.environ | {"PYTHONPATH": str(SOURCES)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)
    if code == 7:
        assert int((tmp_path / "file").read_text()) > 2  # not the place of a closed stream


PRINTING = """
import sys
from moe_offload.machine.terminal import answer

def work():
    print("\\u65e5")  # not yet flushed where this is no terminal
    return 0

sys.exit(answer(work, debug=False))
"""


@pytest.mark.parametrize(
    ("streams", "encoding", "code", "out", "err"),
    [
        ("", "utf-8", 0, "日\n", ""),
        ("", "ascii", 0, "\\u65e5\n", ""),
        (">/dev/full", "utf-8", 2, "", "error: [Errno 28] No space left on device: '<stdout>'\n"),
        ("| true", "utf-8", 0, "", ""),
    ],
)
def test_what_is_merely_printed_is_shown_as_well(
    streams: str, encoding: str, code: int, out: str, err: str
) -> None:
    environment = {"PYTHONPATH": str(SOURCES), "PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        ["/bin/bash", "-c", f'set -o pipefail; "$0" -c "$1" {streams}', sys.executable, PRINTING],
        env=os.environ | environment,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (code, out, err)
