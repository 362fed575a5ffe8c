"""An answer's text in pieces: it ends before its stop text; reasoning is dimmed or hidden."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_offload.commands.conversations import ThinkingView, UpToStop

DIM, NORMAL = "\x1b[2m", "\x1b[22m"
ANSWERS = [
    # the text, whether its prompt has opened a part, then as it is shown dimmed and hidden
    ("plain", False, "plain", "plain"),
    ("<think>a\n</think>\n\nb", False, f"{DIM}<think>a\n</think>{NORMAL}\n\nb", "b"),
    ("a</think>b", True, f"{DIM}a</think>{NORMAL}b", "b"),
    ("x <think>a</think> y <think>b", False,
     f"x {DIM}<think>a</think>{NORMAL} y {DIM}<think>b{NORMAL}", "x  y "),
    ("1 <thin 2 < 3 </think> <think", False, "1 <thin 2 < 3 </think> <think",
     "1 <thin 2 < 3 </think> <think"),
    ("<think></think>", False, f"{DIM}<think></think>{NORMAL}", ""),
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(("text", "thinks", "dimmed", "hidden"), ANSWERS, ids=range(len(ANSWERS)))
def test_parts_are_told_apart(text: str, thinks: bool, dimmed: str, hidden: str, size: int) -> None:
    pieces = [text[start : start + size] for start in range(0, len(text), size)]

    def shown(hides: bool, dims: bool) -> str:
        view = ThinkingView(hides, dims, thinks)
        begun = "".join(view.push(piece) for piece in pieces[:-1])
        return begun + view.finish(pieces[-1])

    assert shown(True, False) == shown(True, True) == hidden
    assert shown(False, False) == text
    # a part that goes on in the next piece is dim already
    assert shown(False, True) == dimmed


def test_what_cannot_become_a_tag_is_shown_at_once() -> None:
    view = ThinkingView(hidden=True, dimmed=False)
    assert [view.push(piece) for piece in ("a <", "b <th", "ink>c", "</thi", "nk>d")] == [
        *("a ", "<b ", "", "", "d"),
    ]


@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_pieces_end_where_the_whole_does_and_tell_only_what_is_certain(
    pieces: list[str], stops: list[str]
) -> None:
    whole = "".join(pieces)
    # where the first stop text is whole, as the text grows
    end = next((n for n in range(len(whole) + 1) if any(one in whole[:n] for one in stops)), None)
    places = [whole[:end].find(one) for one in stops if one in whole[:end]]
    expected = whole if end is None else whole[: min(places)]
    answer, told = UpToStop(stops), ""
    for n, piece in enumerate(pieces, start=1):
        told += answer.push(piece)
        assert expected.startswith(told)
        rest = "".join(pieces[:n])[len(told) :]
        if not answer.is_over:
            assert not rest or any(one.startswith(rest) for one in stops), "held in vain"
    assert told + answer.finish() == expected
    assert answer.is_over == (end is not None)
