"""Files written whole, and dataclasses read back from JSON."""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from moe_offload.files import from_json, write_atomically, write_together


@dataclass(frozen=True)
class Inner:
    size: int
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    ratio: float
    few: tuple[tuple[int, float], ...]
    inner: Inner | None = None
    others: tuple[Inner, ...] = ()
    facts: dict[str, int] | None = None


EXAMPLES = (
    Outer("x", 0.5, ()),
    Outer("y", 2.0, ((1, 2.5), (3, 4.0)), Inner(3, "b"), (Inner(1), Inner(2)), {"a": 1}),
)


@pytest.mark.parametrize("example", EXAMPLES)
def test_there_and_back(example: Outer) -> None:
    assert from_json(Outer, json.loads(json.dumps(asdict(example)))) == example


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"name": 3}, "Outer.name"),
        ({"ratio": "x"}, "Outer.ratio"),
        ({"ratio": True}, "Outer.ratio"),
        ({"few": [[1]]}, r"Outer.few.0.1"),
        ({"few": [[1.5, 2]]}, r"Outer.few.0.0"),
        ({"inner": {"size": True}}, "Outer.inner"),
        ({"others": [{"size": 1, "kind": "z"}]}, r"Outer.others.0.kind"),
        ({"facts": {"a": "b"}}, "Outer.facts"),
    ],
)
def test_another_form_is_refused_with_its_place(change: dict[str, Any], place: str) -> None:
    with pytest.raises(ValueError, match=place):
        from_json(Outer, json.loads(json.dumps(asdict(EXAMPLES[1]))) | change)


def test_a_missing_field_is_refused() -> None:
    with pytest.raises(ValueError, match="name"):
        from_json(Outer, {"ratio": 1, "few": []})


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def broken():  # type: ignore[no-untyped-def]
        yield b"new"
        raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(OSError, match="no space"):
        write_together({tmp_path / "other": [b"x"], path: broken()})
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
