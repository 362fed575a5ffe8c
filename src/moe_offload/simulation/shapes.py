"""Shapes of published models, from `shapes.yaml` beside this file: no weights, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moe_offload.config import WEIGHT_FORMATS
from moe_offload.errors import UserError

SHAPES_FILE = Path(__file__).resolve().with_name("shapes.yaml")
_PAGE_BYTES = 4096


@dataclass(frozen=True)
class ModelShape:
    """A model's sizes: `n_layers` MoE layers of `n_experts`, experts of `hidden` x `intermediate`.

    `dense_weights_per_layer` counts attention and shared experts of an MoE layer, `other_weights`
    the embedding, the head and the `n_dense_layers` layers before the first MoE layer. Routers,
    norms and biases are left out.
    """

    name: str
    n_layers: int
    n_experts: int
    top_k: int
    hidden: int
    intermediate: int
    dense_weights_per_layer: int
    other_weights: int
    n_dense_layers: int = 0

    @property
    def expert_weights(self) -> int:
        """The weights of one gated expert, biases left out."""
        return 3 * self.hidden * self.intermediate

    def block_bytes(self, weight_format: str) -> int:
        """One expert's bytes in a weight format, up to biases and the padding of odd shapes."""
        n_bytes = self.expert_weights * WEIGHT_FORMATS[weight_format].bits_per_weight / 8
        return -(-int(n_bytes) // _PAGE_BYTES) * _PAGE_BYTES

    def dense_bytes(self) -> int:
        """Everything that is not routed experts, in bf16."""
        return 2 * (self.n_layers * self.dense_weights_per_layer + self.other_weights)


def known_shapes() -> dict[str, dict[str, Any]]:
    """The transformers configurations of the models whose shapes are known, by name."""
    shapes: dict[str, dict[str, Any]] = yaml.safe_load(SHAPES_FILE.read_text(encoding="utf-8"))
    return shapes


def shape_config(name: str, n_layers: int | None = None) -> dict[str, Any]:
    """The transformers configuration of the shape called `name`, cut to `n_layers` where given.

    Raises UserError for a name that is not known, and for layers that the shape has not.
    """
    shapes = known_shapes()
    if name not in shapes:
        raise UserError(
            f"expected one of the shapes {', '.join(sorted(shapes))}, found {name!r}; choose one "
            f"of those or add it to {SHAPES_FILE}"
        )
    fields = dict(shapes[name])
    if n_layers is not None:
        first = 1 + (fields.get("first_k_dense_replace") or 0)
        most = fields["num_hidden_layers"]
        if not first <= n_layers <= most:
            raise UserError(
                f"expected --dummy-layers from {first} to {most}, for {name} has experts from "
                f"layer {first} to the last, found {n_layers}"
            )
        fields["num_hidden_layers"] = n_layers
    return fields


def load_shape(name: str) -> ModelShape:
    """Return the shape called `name`; raises UserError with the known names for another."""
    config = shape_config(name)
    hidden = config["hidden_size"]
    intermediate = config.get("moe_intermediate_size") or config["intermediate_size"]
    n_experts = next(
        config[key]
        for key in ("num_local_experts", "num_experts", "n_routed_experts")
        if config.get(key)
    )
    shared = config.get("n_shared_experts") or 0
    n_dense_layers = config.get("first_k_dense_replace") or 0
    attention = _attention_weights(config)
    dense_layer = attention + 3 * hidden * config["intermediate_size"]
    return ModelShape(
        name=name,
        n_layers=config["num_hidden_layers"] - n_dense_layers,
        n_experts=n_experts,
        top_k=config["num_experts_per_tok"],
        hidden=hidden,
        intermediate=intermediate,
        dense_weights_per_layer=attention + 3 * hidden * intermediate * shared,
        other_weights=2 * config["vocab_size"] * hidden + n_dense_layers * dense_layer,
        n_dense_layers=n_dense_layers,
    )


def _attention_weights(config: dict[str, Any]) -> int:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if config.get("kv_lora_rank"):  # multi-head latent attention
        rank, value = config["kv_lora_rank"], config["v_head_dim"]
        plain, rotary = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        query = hidden * heads * (plain + rotary)
        if config.get("q_lora_rank"):
            query = config["q_lora_rank"] * (hidden + heads * (plain + rotary))
        return int(
            query
            + hidden * (rank + rotary)
            + rank * heads * (plain + value)
            + heads * value * hidden
        )
    head = config.get("head_dim") or hidden // heads
    n_key_value = config.get("num_key_value_heads") or heads
    return int(2 * hidden * head * (heads + n_key_value))
