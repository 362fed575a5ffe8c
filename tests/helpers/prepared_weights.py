"""A prepared folder's experts, in the model's own terms."""

from __future__ import annotations

import torch
from cpu_oracle import unpack_block
from torch import Tensor
from transformers import PreTrainedModel

from moe_offload.checkpoint.prepared import Manifest, MoeLayer, read_block


def blocks(layer: MoeLayer) -> list[dict[str, Tensor]]:
    """Every expert's logical weights in fp32."""
    out = []
    for expert in range(layer.n_experts):
        block = torch.empty(layer.layout.block_bytes, dtype=torch.uint8)
        read_block(layer, expert, block)
        out.append(unpack_block(layer.layout, block))
    return out


def logical_experts(model: PreTrainedModel, layer: MoeLayer) -> list[dict[str, Tensor]]:
    """The same from the model's own parameters, gpt-oss's layout spelled out."""
    experts = model.get_submodule(layer.module)
    parameters = dict(experts.named_parameters())
    first = "gate_up_proj" if "gate_up_proj" in parameters else "up_proj"
    out = []
    for expert in range(layer.n_experts):
        gate_up, down = parameters[first][expert], parameters["down_proj"][expert]
        weights = {"gate_up": gate_up, "down": down}
        if model.config.model_type == "gpt_oss":
            bias = parameters[f"{first}_bias"][expert]
            weights = {
                "gate_up": torch.cat((gate_up[:, 0::2].t(), gate_up[:, 1::2].t())),
                "gate_up_bias": torch.cat((bias[0::2], bias[1::2])),
                "down": down.t(),
                "down_bias": parameters["down_proj_bias"][expert],
            }
        out.append(weights)
    return out


def assert_same_experts(manifest: Manifest, model: PreTrainedModel) -> None:
    for layer in manifest.moe_layers:
        for found, wanted in zip(blocks(layer), logical_experts(model, layer), strict=True):
            assert found.keys() == wanted.keys()
            for name, tensor in wanted.items():
                assert torch.equal(found[name], tensor.float()), (layer.module, name)
