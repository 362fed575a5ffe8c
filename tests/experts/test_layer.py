"""One call of one layer: what it hands to the host."""

from __future__ import annotations

import torch

from moe_offload.experts.layer import HostHandoff


def test_nothing_moves_on_the_cpu() -> None:
    hidden, index = torch.randn(3, 4), torch.zeros(3, 2, dtype=torch.int64)
    moved = HostHandoff().to_host(hidden, index)
    assert moved[0].data_ptr() == hidden.data_ptr()
    assert moved[1].data_ptr() == index.data_ptr()
