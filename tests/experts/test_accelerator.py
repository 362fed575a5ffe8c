"""What guessing the next layer's experts was worth."""

from __future__ import annotations

from moe_offload.experts.accelerator import PrefetchStats


def test_prefetch_statistics() -> None:
    stats = PrefetchStats(block_bytes=100)
    stats.guess(1, [3, 4])
    stats.fetch(slot=8, layer=1, expert=3)
    stats.fetch(slot=9, layer=1, expert=4)
    stats.observe(1, {3: 8}, [3, 5])
    assert (stats.recall, stats.used, stats.wasted_bytes) == (0.5, 1, 100)
    stats.observe(1, {3: 8}, [3, 5])  # no guess was made for this step
    assert (stats.chosen, stats.used) == (2, 1)
