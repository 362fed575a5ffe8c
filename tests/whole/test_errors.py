"""A message for people is one short line, whatever the file that it quotes holds."""

from __future__ import annotations

from moe_offload.errors import LONGEST_MESSAGE, UserError


def test_a_message_cannot_steer_the_terminal() -> None:
    said = str(UserError("tensor \x1b[2J\x1b]0;title\x07 is\nmissing\r \u202e\ud800"))
    assert said.isprintable()
    assert "\\x1b[2J" in said and "is missing" in said and "\\u202e" in said


def test_other_languages_stay_readable() -> None:
    assert str(UserError("the folder 模型 für Ünïcode 💾")) == "the folder 模型 für Ünïcode 💾"


def test_the_beginning_and_the_remedy_of_a_long_message_stay() -> None:
    said = str(UserError(f"expected a name, found {'A' * 200_000}; download it again"))
    assert len(said) < LONGEST_MESSAGE + 10
    assert said.startswith("expected a name, found AAA") and said.endswith("; download it again")
