"""Every MoE architecture of transformers is what docs/SUPPORTED_MODELS.md says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import WRAPPERS, examine, moe_types, rows_of_the_page
from transformers import CONFIG_MAPPING

ROWS = rows_of_the_page()
# Of the kinds that once failed: a norm that needs a gate, head sizes that differ between layers,
# top-k as a list, a head kept in fp32, experts outside the convention, a model that takes images
# too, one of them with experts of two sizes, one whose own initialisation asks for the experts.
OFTEN = (
    *("qwen3_next", "gemma4_text", "hunyuan_v1_moe", "hy_v4", "llama4_text", "ernie4_5_vl_moe"),
    "qwen3_omni_moe_thinker",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in OFTEN else pytest.mark.nightly) for name in ROWS],
)
def test_is_what_its_row_says(name: str, tmp_path: Path) -> None:
    if name not in CONFIG_MAPPING:
        pytest.skip("this release of transformers has no such model")
    assert examine(name, tmp_path).line() == ROWS[name]


@pytest.mark.nightly
def test_each_has_a_row() -> None:
    assert {*moe_types(), *WRAPPERS} <= ROWS.keys()
