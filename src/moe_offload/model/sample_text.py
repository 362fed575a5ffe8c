"""What every expert sees while the model reads a sample text, for int4 that suits these inputs.

The checkpoint is read once more before it is prepared: transformers' own model with the dense
weights, its experts computed in fp32 from the source, one in memory at a time. Kept are the inputs
of every layer's experts, in the model's dtype: T x H a layer.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from moe_offload.checkpoint.block import pack_block
from moe_offload.checkpoint.codes import Codes
from moe_offload.checkpoint.compensation import compensate
from moe_offload.checkpoint.conversion import ExpertsModule
from moe_offload.checkpoint.source import SourceCheckpoint
from moe_offload.kernels.oracle import apply_activation, experts_forward
from moe_offload.model.loader import (
    ExpertsFunction,
    MoeSite,
    build_skeleton,
    fill_model,
    find_moe_sites,
)

WINDOW: Final = 512  # tokens that attend to each other
N_WINDOWS: Final = 16
FEWEST_INPUTS: Final = 128  # an expert that the text sends fewer gets others' as well
_MODULES: Final = (
    *("argparse", "asyncio", "collections", "datetime", "decimal", "email", "fractions", "heapq"),
    *("json", "logging", "pathlib", "pickle", "random", "re", "shutil", "socket", "string"),
    *("subprocess", "tarfile", "textwrap", "threading", "typing", "unittest", "urllib", "zipfile"),
)


def default_text() -> str:
    """English and some Python that every installation has: docstrings of the standard library."""

    def docstrings(name: str) -> Iterator[str]:
        module = importlib.import_module(name)
        yield module.__doc__ or ""
        for _, member in sorted(vars(module).items()):
            ours = getattr(member, "__module__", None) or ""
            if ours.startswith(name) and (inspect.isclass(member) or inspect.isfunction(member)):
                yield inspect.getdoc(member) or ""

    return "\n\n".join(filter(None, (text for name in _MODULES for text in docstrings(name))))


def windows_of(ids: Sequence[int]) -> Tensor:
    """At most N_WINDOWS windows [n, WINDOW] from all over a text's token ids."""
    length = min(WINDOW, len(ids))
    n = max(1, min(N_WINDOWS, len(ids) // length))
    starts = [position * (len(ids) - length) // max(n - 1, 1) for position in range(n)]
    return torch.tensor([list(ids[start : start + length]) for start in starts])


@dataclass(frozen=True)
class LayerInputs:
    """What the experts of one layer were given: hidden [T, H], the chosen ids [T, K]."""

    site: MoeSite
    hidden: Tensor
    index: Tensor

    def of_expert(self, expert: int) -> Tensor:
        """fp32 [n, H]: the tokens sent to this expert, and others where these are few."""
        chosen = (self.index == expert).any(dim=1)
        if int(chosen.sum()) < FEWEST_INPUTS:
            chosen[:: max(1, len(chosen) // FEWEST_INPUTS)] = True
        return self.hidden[chosen].float()


def expert_bytes(source: SourceCheckpoint) -> int:
    """What `on_bytes` of `compensated` hears of in all."""
    return sum(one.n_experts * one.block_layout("fp32").block_bytes for one in source.experts)


@torch.inference_mode()
def read_sample(
    source: SourceCheckpoint, ids: Tensor, on_bytes: Callable[[int], None] = lambda _: None
) -> list[LayerInputs]:
    """Let the source's model read `ids` [n, length]; `on_bytes` hears of each expert's block."""
    model = build_skeleton(source.config, source.model.dtype, "sdpa")
    layers: dict[int, LayerInputs] = {}

    def compute(site: MoeSite, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        layers[site.layer] = LayerInputs(site, hidden, index)
        module = source.experts[site.layer]
        layout = module.block_layout("fp32")
        block = torch.empty(layout.block_bytes, dtype=torch.uint8)
        out = torch.zeros(hidden.shape)
        plain = partial(experts_forward, activation=site.activation, act_module=site.act_module)
        read = source.weights_reader(module)
        for expert in range(module.n_experts):
            pack_block(layout, read(expert), block)
            out += plain(layout, {expert: block}, hidden.float(), index, weights)
            on_bytes(layout.block_bytes)
        return out.to(hidden.dtype)

    for site in find_moe_sites(model, [module.name for module in source.experts]):
        model.set_submodule(site.experts_path, ExpertsFunction(partial(compute, site)))
    dense = {name: source.read_dense(name) for name in source.dense_names}
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    fill_model(model, {name: t.to(dtypes[name]) for name, t in dense.items()}, torch.device("cpu"))
    model.base_model(input_ids=ids, use_cache=False)
    return [layers[position] for position in sorted(layers)]


@dataclass(frozen=True)
class CompensatedSource(SourceCheckpoint):
    """A source whose experts are rounded to int4 for what they see in a sample text."""

    layers: Sequence[LayerInputs]

    def expert_reader(self, module: ExpertsModule) -> Callable[[int], dict[str, Tensor | Codes]]:
        """As the source's own, the matrices rounded: codes that are packed as they are."""
        inputs, read = self.layers[self.experts.index(module)], self.weights_reader(module)
        site = inputs.site

        def middle(x: Tensor, gate_up: Tensor, bias: Tensor | None) -> Tensor:
            first = functional.linear(x, gate_up.float(), None if bias is None else bias.float())
            return apply_activation(first, site.activation, module.has_gate, site.act_module)

        @torch.inference_mode()
        def rounded(expert: int) -> dict[str, Tensor | Codes]:
            fields, x = read(expert), inputs.of_expert(expert)
            bias = fields.get("gate_up_bias")
            gate_up = compensate(fields["gate_up"], x, inputs.hidden)
            wanted = middle(x, fields["gate_up"], bias)
            down = compensate(fields["down"], middle(x, gate_up.values(), bias), wanted=wanted)
            return fields | {"gate_up": gate_up, "down": down}

        return rounded


def compensated(
    source: SourceCheckpoint, ids: Tensor, on_bytes: Callable[[int], None]
) -> CompensatedSource:
    """`source` with experts in int4 that suit the sample text of token ids [n, length]."""
    layers = read_sample(source, ids, on_bytes)
    return CompensatedSource(**vars(source), layers=layers)
