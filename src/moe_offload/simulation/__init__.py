"""The same cache on a modelled clock: traces, replay, sweeps, the paper's tables."""
