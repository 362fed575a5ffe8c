"""An answer that comes in pieces ends before the first of its stop texts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moe_offload.commands.stop_texts import UpToStop


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
