"""Memory needed against memory there is, before anything heavy is done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from moe_offload.config import smaller_format
from moe_offload.errors import UserError
from moe_offload.machine.hardware import available_bytes
from moe_offload.machine.streams import is_out_of_memory

EXPERTS, KV_CACHE, SLOTS = "experts", "KV cache", "expert cache slots"
_WORKSPACE_BYTES = 512 << 20  # torch, its kernels' workspaces, activations of a short prompt
_CUDA_CONTEXT_BYTES = 512 << 20


@dataclass(frozen=True)
class Budget:
    """The needs of a run and what is available, in bytes: of "host" memory and a GPU's, "gpu"."""

    needs: Mapping[str, Mapping[str, int]]  # memory -> what -> bytes
    available: Mapping[str, int]  # memory -> bytes

    @property
    def expert_room_bytes(self) -> int:
        """Host memory that is left for experts beside all else."""
        others = sum(n for what, n in self.needs["host"].items() if what != EXPERTS)
        return max(0, self.available["host"] - others)

    def with_experts(self, n_bytes: int) -> Budget:
        """The same with experts of `n_bytes` in host memory."""
        return replace(self, needs={**self.needs, "host": {**self.needs["host"], EXPERTS: n_bytes}})

    def table(self) -> str:
        """The table a user reads: GB by need, then the total against what is available."""
        host, gpu = (self.needs.get(memory, {}) for memory in ("host", "gpu"))
        rows: list[tuple[str, int | None, int | None]] = [
            *((what, host.get(what), gpu.get(what)) for what in {**host, **gpu}),
            ("total", sum(host.values()), sum(gpu.values()) if gpu else None),
            ("available", self.available["host"], self.available.get("gpu")),
        ]
        lines = [
            f"  {what:<24}{_gb(in_host)}{_gb(in_gpu)}".rstrip() for what, in_host, in_gpu in rows
        ]
        return "\n".join(["memory needed (GB)            host     gpu", *lines])

    def check(self, weight_format: str, context_tokens: int, dummy: bool = False) -> None:
        """UserError with the remedies that help when a memory cannot hold its part.

        The KV cache holds `context_tokens`; `dummy` models are made in any format.
        """
        for memory, available in self.available.items():
            needed = sum(self.needs[memory].values())
            if needed <= available:
                continue
            remedies = self._smaller_caches(memory, needed - available, context_tokens)
            if memory == "gpu":
                remedies.append("use --device cpu")
            else:
                smaller = smaller_format(weight_format)
                if dummy:
                    remedies.append("use fewer --dummy-layers")
                if smaller is not None:
                    remedies.append(
                        f"use --dummy-format {smaller}"
                        if dummy
                        else f"prepare the model with --expert-dtype {smaller}"
                    )
                remedies += ["close other programs", "use a machine with more memory"]
            raise UserError(
                f"this run needs {needed / 1e9:.1f} GB of {memory} memory and "
                f"{available / 1e9:.1f} GB are available: {', or '.join(remedies)}"
            )

    def _smaller_caches(self, memory: str, missing: int, context_tokens: int) -> list[str]:
        """The remedies that a smaller KV cache or expert cache is, where `missing` bytes are."""
        needs, remedies = self.needs[memory], []
        kv_bytes, slot_bytes = needs.get(KV_CACHE, 0), needs.get(SLOTS, 0)
        if kv_bytes > missing:  # fewer tokens alone would do
            fitting = int(context_tokens * (kv_bytes - missing) / kv_bytes)
            remedies.append(
                f"use a smaller --max-tokens or --batch-size ({fitting} of the "
                f"{context_tokens} tokens of prompts and answers fit)"
            )
        if slot_bytes > missing:
            remedies.append("use a smaller --cache-nblocks or --cache-nways")
        elif slot_bytes and slot_bytes + kv_bytes > missing:
            remedies.append("use a smaller cache and a smaller --max-tokens")
        return remedies


def _gb(n_bytes: int | None) -> str:
    return " " * 8 if n_bytes is None else f"{n_bytes / 1e9:8.2f}"


def kv_cache_bytes(config: PretrainedConfig, n_tokens: int, bytes_per_value: int) -> int:
    """Bytes of the KV cache for `n_tokens`, from the usual config fields; an upper estimate."""
    text: Any = config.get_text_config()
    # where sizes differ from layer to layer (Gemma 4), each has a config of its own
    layers = getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers
    return sum(map(_values_per_token, layers)) * n_tokens * bytes_per_value


def _values_per_token(layer: Any) -> int:
    """Keys and values that one layer keeps of a token."""
    heads = getattr(layer, "num_attention_heads", 1) or 1
    if getattr(layer, "kv_lora_rank", None):  # latent attention caches expanded heads here
        key = (getattr(layer, "qk_nope_head_dim", 0) or 0) + (layer.qk_rope_head_dim or 0)
        return int(heads * (key + layer.v_head_dim))
    kv_heads = getattr(layer, "num_key_value_heads", None) or heads
    return int(2 * kv_heads * (getattr(layer, "head_dim", None) or layer.hidden_size // heads))


def make_budget(
    device: torch.device, *, expert_bytes: int, dense_bytes: int, kv_bytes: int, slot_bytes: int
) -> Budget:
    """The budget of a run whose attention is on `device`; slots without a GPU are host memory.

    What an earlier model of this process has left to torch's allocator counts as available.
    """
    model = {"dense weights": dense_bytes, KV_CACHE: kv_bytes, SLOTS: slot_bytes}
    model = {what: n_bytes for what, n_bytes in model.items() if n_bytes}
    host, workspace = {EXPERTS: expert_bytes}, {"workspace": _WORKSPACE_BYTES}
    if device.type != "cuda":
        return Budget({"host": host | model | workspace}, {"host": available_bytes()})
    return Budget(
        {"host": host | workspace, "gpu": model | {"workspace": _CUDA_CONTEXT_BYTES}},
        {"host": available_bytes(), "gpu": _free_gpu_bytes(device)},
    )


def free_slot_bytes(device: torch.device, kv_bytes: int) -> int:
    """Memory left for expert slots beside a loaded model, its KV cache to come and workspace.

    An emulated accelerator is given half of the free host memory.
    """
    if device.type == "cuda":
        return max(0, _free_gpu_bytes(device) - kv_bytes - _WORKSPACE_BYTES)
    return max(0, (available_bytes() - kv_bytes - _WORKSPACE_BYTES) // 2)


@contextmanager
def gpu_memory_told() -> Iterator[None]:
    """Raise UserError where the GPU's memory ends all the same, whoever found it."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(str(error)) from error


def _free_gpu_bytes(device: torch.device) -> int:
    torch.cuda.empty_cache()  # the driver counts what torch keeps for later as used
    return int(torch.cuda.mem_get_info(device)[0])
