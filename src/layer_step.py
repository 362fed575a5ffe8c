"""Executes the plan of one layer: launches, copies, CPU compute, and the sum of both sides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from accelerator import Accelerator
from cpu_experts import CpuExperts
from expert_store import ExpertStore
from gpu_experts import Pending
from handoff import HostHandoff
from plan import Plan
from recorder import Duration

Pairs = list[list[int]]


@dataclass
class LayerStep:
    """One call of one MoE layer. `hidden` is where the model runs, the `host_*` are its copies.

    `host_index` int64 [T, K] holds -1 where a token is padding; `pairs` is the same as a list.
    """

    store: ExpertStore
    cpu: CpuExperts
    handoff: HostHandoff
    layer: int
    hidden: Tensor
    weights: Tensor
    host_hidden: Tensor
    host_index: Tensor
    host_weights: Tensor
    pairs: Pairs
    n_fetches: int = 0
    _accelerator_out: Tensor | None = None  # one sum for all launches of the step
    _failed: list[int] = field(default_factory=list)
    _pending: list[tuple[Pending, tuple[int, ...]]] = field(default_factory=list)

    def launch(self, accelerator: Accelerator, slots: dict[int, int]) -> None:
        """Start computing the experts of `slots` (expert -> slot) on the accelerator."""
        if slots:
            table = torch.full((self.store.n_experts[self.layer] + 1,), -1, dtype=torch.int64)
            for expert, slot in slots.items():
                table[expert] = slot
            slot_of_pair = table[self.host_index]  # -1, padding, takes the last entry: -1
            if self._accelerator_out is None:
                self._accelerator_out = torch.zeros(
                    self.hidden.shape, dtype=torch.float32, device=self.hidden.device
                )
            pending = accelerator.gpu.launch(
                self.hidden,
                slot_of_pair,
                self.weights,
                accelerator.fetcher,
                self._accelerator_out,
            )
            self._pending.append((pending, tuple(slots)))

    def launch_waited(
        self, accelerator: Accelerator, experts: Iterable[int], staging_only: bool
    ) -> None:
        """Copy and compute each expert, one launch each, so that a copy hides the previous one."""
        for expert in experts:
            slot, started = accelerator.slot_for_waited(self.layer, expert, staging_only)
            self.n_fetches += started
            self.launch(accelerator, {expert: slot})

    def compute_on_cpu(self, experts: Sequence[int]) -> Tensor | None:
        """The CPU's share, fp32 [T, H] on the host, or None without experts."""
        if not experts:
            return None
        on_cpu = torch.zeros(self.store.n_experts[self.layer], dtype=torch.uint8)
        on_cpu[list(experts)] = 1
        n_tokens, hidden_size = self.hidden.shape
        out = self.handoff.result(n_tokens, hidden_size, self.hidden.device)
        self.cpu.run(
            self.host_hidden,
            self.store.pointers(self.layer),
            on_cpu,
            self.host_index,
            self.host_weights,
            out,
        )
        return out

    def wait(self) -> None:
        """Wait for the emulated accelerator; on a GPU the stream does, and the host runs on."""
        for pending, experts in self._pending:
            try:
                pending.result()
            except Exception:
                if not pending.copy_failed:  # a mistake of ours, not of the copy
                    raise
                self._failed.extend(experts)

    def combine(self, cpu_out: Tensor | None) -> Tensor:
        """The layer's output [T, H] in hidden's dtype, after `wait`.

        Experts whose copy failed are computed on the CPU here.
        """
        failed = self._failed
        total = self._accelerator_out
        parts = [cpu_out]
        if failed:
            if cpu_out is not None:
                parts = [cpu_out.clone()]
            parts.append(self.compute_on_cpu(failed))
        for result in parts:
            if result is not None:
                moved = self.handoff.to_device(result, self.hidden.device)
                total = moved if total is None else total + moved
        if total is None:
            return torch.zeros_like(self.hidden)
        return total.to(self.hidden.dtype)

    def gpu_us(self) -> Duration:
        """The accelerator's own time for this layer, known after the run on a GPU."""
        return _Sum([pending for pending, _ in self._pending]) if self._pending else 0.0

    def hits_of_token(self, plan: Plan) -> list[int]:
        """How many of each token's experts were ready on the accelerator."""
        return [sum(expert in plan.hits for expert in token) for token in self.pairs]


@dataclass(frozen=True)
class _Sum:
    pending: list[Pending]

    def resolve(self) -> float:
        return sum(pending.resolve() for pending in self.pending)
