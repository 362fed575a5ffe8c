"""The generation loop: prefill, then decode one token per step until every prompt has stopped."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from moe_offload.errors import UserError
from moe_offload.model.kv_cache import make_cache

StopReason = Literal["eos", "length", "context", "stop", "interrupted"]


@dataclass
class Generated:
    """What one prompt produced; times in seconds, on one clock from the batch's start.

    `prefill_s` is the prompt's evaluation up to its first token (TTFT, shared by the batch);
    `token_times_s[i]` is the duration of the step that produced token `i`.
    """

    prompt: int
    n_prompt_tokens: int
    ids: list[int] = field(default_factory=list)
    prefill_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    stop: StopReason = "interrupted"


@dataclass(frozen=True)
class Sampler:
    """Chooses the next token: greedy at temperature 0, else nucleus sampling of mass `top_p`."""

    temperature: float
    top_p: float
    generator: torch.Generator | None

    def choose(self, logits: Tensor) -> Tensor:
        """int64 [B] from logits [B, vocabulary]."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        probabilities = torch.softmax(logits.float() / self.temperature, dim=-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            outside = ordered.cumsum(dim=-1) - ordered >= self.top_p
            ordered = ordered.masked_fill(outside, 0.0)
            drawn = torch.multinomial(ordered, 1, generator=self.generator)
            return order.gather(-1, drawn).squeeze(-1)
        return torch.multinomial(probabilities, 1, generator=self.generator).squeeze(-1)


def make_sampler(temperature: float, top_p: float, seed: int, device: torch.device) -> Sampler:
    generator = torch.Generator(device).manual_seed(seed) if temperature > 0 else None
    return Sampler(temperature, top_p, generator)


def stop_ids(model: PreTrainedModel, tokenizer_eos: frozenset[int]) -> frozenset[int]:
    """Ids that end a text: the generation config's, and the tokenizer's end of sequence."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        return tokenizer_eos
    return tokenizer_eos | frozenset([configured] if isinstance(configured, int) else configured)


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens the model's positions reach, or None where its config does not say."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampler: Sampler,
    eos_ids: frozenset[int],
    first_prompt: int = 0,
    on_pass: Callable[[Sequence[int]], None] | None = None,
    forced: Sequence[int] | None = None,
) -> Iterator[tuple[Generated, int]]:
    """Generate for a batch of prompts; yields (prompt's record, token id) as tokens appear.

    `prompts` are token ids, left-padded here to one length; prompt `i` is reported as
    `first_prompt + i`. A prompt that stops leaves the batch. `on_pass` hears, before each
    forward pass, which prompts are in it. `forced` overrides the sampled tokens (replays).
    Raises UserError for a prompt longer than the model's context. The end-of-sequence token is
    counted and yielded. Records end with their `stop` reason set. Whoever iterates may set it too,
    to end a prompt by what its text says.
    """
    limit = context_length(model)
    for ids in prompts:
        if limit is not None and len(ids) >= limit:
            raise UserError(
                f"the prompt has {len(ids)} tokens, but the model's context holds {limit}: "
                "shorten the prompt"
            )
    device = model.device
    records = [Generated(first_prompt + i, len(ids)) for i, ids in enumerate(prompts)]
    inputs, mask = _left_pad(prompts, device)
    n_past = 0
    cache = {cache_argument(model): make_cache(model.config, inputs.shape[1] + max_tokens)}
    active = records
    started = time.perf_counter()
    for step in range(max_tokens):
        if on_pass is not None:
            on_pass([record.prompt for record in active])
        logits = _forward(model, inputs, mask, _positions(mask, inputs, n_past), cache)
        tokens = sampler.choose(logits)
        if forced is not None:
            tokens = torch.full_like(tokens, forced[step])
        chosen = tokens.tolist()
        now = time.perf_counter()
        keep = []
        for row, (record, token) in enumerate(zip(active, chosen, strict=True)):
            record.ids.append(token)
            record.token_times_s.append(now - started)
            if step == 0:
                record.prefill_s = now - started
            stop = _stop_reason(record, token, eos_ids, max_tokens, limit)
            if stop is None:
                keep.append(row)
            else:
                record.stop = stop
        started = now
        yield from zip(active, chosen, strict=True)
        keep = [row for row in keep if active[row].stop == "interrupted"]
        if not keep:
            return
        if len(keep) < len(active):
            rows = torch.tensor(keep, device=device)
            for kept in cache.values():
                kept.batch_select_indices(rows)
            mask, tokens = None if mask is None else mask[rows], tokens[rows]
            active = [active[row] for row in keep]
        n_past += inputs.shape[1]
        inputs = tokens[:, None]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)


def _stop_reason(
    record: Generated, token: int, eos_ids: frozenset[int], max_tokens: int, limit: int | None
) -> StopReason | None:
    if token in eos_ids:
        return "eos"
    if len(record.ids) >= max_tokens:
        return "length"
    if limit is not None and record.n_prompt_tokens + len(record.ids) >= limit:
        return "context"
    return None


def _left_pad(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """int64 [B, S] ids, and 0 in a mask like it for padding; no mask where nothing is padded."""
    longest = max(len(ids) for ids in prompts)
    inputs = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, ids in enumerate(prompts):
        inputs[row, longest - len(ids) :] = torch.tensor(ids, dtype=torch.int64)
        mask[row, longest - len(ids) :] = 1
    if all(len(ids) == longest for ids in prompts):  # spares every step the look at it
        return inputs.to(device), None
    return inputs.to(device), mask.to(device)


def cache_argument(model: PreTrainedModel) -> str:
    """How this release of transformers calls the KV cache: `cache` from 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _positions(mask: Tensor | None, inputs: Tensor, n_past: int) -> Tensor:
    """int64 like `inputs` [B, S]: each token's number in its own sequence, padding not counted."""
    if mask is not None:
        return (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
    numbers = torch.arange(n_past, n_past + inputs.shape[1], device=inputs.device)
    return numbers.expand(inputs.shape)


def _forward(
    model: PreTrainedModel,
    inputs: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    cache: dict[str, DynamicCache],
) -> Tensor:
    output: Any = model(
        input_ids=inputs,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        **cache,
    )
    logits: Tensor = output.logits[:, -1]
    return logits
