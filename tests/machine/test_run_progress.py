"""Progress is shown on a terminal, and nowhere else."""

from __future__ import annotations

import io
from threading import Event

import pytest
import torch
from torch import nn

from moe_offload.machine.terminal import RunProgress, told_if_slow


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


def test_slow_work_is_told_of_once() -> None:
    file = Terminal()
    with told_if_slow("writing reports...", file=file, delay_s=0.0):
        assert file.written.wait(60)
    assert file.getvalue().splitlines() == ["writing reports..."]


def test_quick_work_and_work_without_a_terminal_is_not_told_of() -> None:
    quick, file = Terminal(), Terminal(is_terminal=False)
    with told_if_slow("writing reports...", file=quick, delay_s=3600.0):
        pass
    with told_if_slow("writing reports...", file=file, delay_s=0.0):
        assert not file.written.wait(0.2)
    assert quick.getvalue() == file.getvalue() == ""
