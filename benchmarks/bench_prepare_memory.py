"""Peak resident memory of weights_preprocessor.py against its bound: dense + 2 layers' experts.

Makes a random Mixtral-shaped checkpoint (0.9 GB by default) in each layout and prepares it in a
process of its own, whose peak is the kernel's VmHWM. Python with torch and transformers loaded
takes memory before the first weight; it is measured on its own and taken off. Run from anywhere:

    python benchmarks/bench_prepare_memory.py [--layers 4] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SOURCE = Path(__file__).resolve().parent.parent / "src"
HIDDEN, INTERMEDIATE, EXPERTS, VOCABULARY, KEY_VALUE = 1024, 3584, 8, 32000, 256
FORMATS = {
    "hub": ("bf16", "int4"),
    "fused": ("bf16", "int4"),
    "bin": ("bf16",),
    "native": ("bf16",),
    "fp8": ("bf16",),
    "int4": ("auto",),
}
# Codes and scales of random bytes: what they cost to read does not depend on what they are.
QUANTISED = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "int4": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}},
    },
}

CHILD = """
import sys, time
from moe_offload.commands import prepare, prepare_model
started_s = time.monotonic()
code = prepare.main(sys.argv[1:]) if len(sys.argv) > 1 else 0
duration_s = time.monotonic() - started_s
with open("/proc/self/status") as status:
    peak = next(line.split()[1] for line in status if line.startswith("VmHWM"))
print(int(peak) * 1024, duration_s)
sys.exit(code)
"""


def random(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)


def layer_tensors(layer: int, fused: bool) -> dict[str, Tensor]:
    prefix = f"model.layers.{layer}."
    tensors = {
        f"{prefix}self_attn.q_proj.weight": random(HIDDEN, HIDDEN),
        f"{prefix}self_attn.k_proj.weight": random(KEY_VALUE, HIDDEN),
        f"{prefix}self_attn.v_proj.weight": random(KEY_VALUE, HIDDEN),
        f"{prefix}self_attn.o_proj.weight": random(HIDDEN, HIDDEN),
        f"{prefix}input_layernorm.weight": random(HIDDEN),
        f"{prefix}post_attention_layernorm.weight": random(HIDDEN),
    }
    if fused:
        tensors[f"{prefix}mlp.gate.weight"] = random(EXPERTS, HIDDEN)
        tensors[f"{prefix}mlp.experts.gate_up_proj"] = random(EXPERTS, 2 * INTERMEDIATE, HIDDEN)
        tensors[f"{prefix}mlp.experts.down_proj"] = random(EXPERTS, HIDDEN, INTERMEDIATE)
        return tensors
    tensors[f"{prefix}block_sparse_moe.gate.weight"] = random(EXPERTS, HIDDEN)
    for expert in range(EXPERTS):
        name = f"{prefix}block_sparse_moe.experts.{expert}"
        tensors[f"{name}.w1.weight"] = random(INTERMEDIATE, HIDDEN)
        tensors[f"{name}.w2.weight"] = random(HIDDEN, INTERMEDIATE)
        tensors[f"{name}.w3.weight"] = random(INTERMEDIATE, HIDDEN)
    return tensors


def quantised(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The same with attention and experts as an FP8 or an int4 checkpoint has them."""
    out = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 1 or "gate" in name:
            out[name] = tensor
            continue
        rows, columns = tensor.shape
        codes = torch.randint(0, 120, (rows, columns), dtype=torch.uint8)
        if layout == "fp8":
            out[name] = codes.view(torch.float8_e4m3fn)
            out[f"{name}_scale_inv"] = torch.rand(-(-rows // 128), -(-columns // 128)) * 1e-4
        else:
            out[f"{name}_packed"] = codes[:, : columns // 2].contiguous().view(torch.int32)
            out[f"{name}_scale"] = torch.rand(rows, columns // 32).bfloat16() + 1e-3
    return out


def native_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "model.embed_tokens": "tok_embeddings",
        "model.norm": "norm",
        "lm_head": "output",
        "model.layers": "layers",
        "self_attn.": "attention.",
        "_proj": "",
        "attention.": "attention.w",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "block_sparse_moe": "feed_forward",
    }
    out = {}
    for key, tensor in tensors.items():
        for old, new in names.items():
            key = key.replace(old, new)
        out[key] = tensor
    return out


def write_checkpoint(folder: Path, layout: str, n_layers: int) -> None:
    """One file per layer and one for the rest."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    params = {
        "dim": HIDDEN,
        "n_layers": n_layers,
        "head_dim": 64,
        "hidden_dim": INTERMEDIATE,
        "n_heads": 16,
        "n_kv_heads": 4,
        "norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "moe": {"num_experts": EXPERTS, "num_experts_per_tok": 2},
    }
    weight_map: dict[str, str] = {}
    for part in range(n_layers + 1):
        if part < n_layers:
            tensors = layer_tensors(part, layout == "fused")
            if layout in QUANTISED:
                tensors = quantised(tensors, layout)
        else:
            tensors = {
                "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
                "lm_head.weight": random(VOCABULARY, HIDDEN),
                "model.norm.weight": random(HIDDEN),
            }
        if layout == "native":
            torch.save(native_names(tensors), folder / f"consolidated.{part:02d}.pth")
            continue
        suffix = "bin" if layout == "bin" else "safetensors"
        stem = "pytorch_model" if layout == "bin" else "model"
        name = f"{stem}-{part + 1:05d}-of-{n_layers + 1:05d}.{suffix}"
        if layout == "bin":
            torch.save(tensors, folder / name)
        else:
            save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if layout == "native":
        (folder / "params.json").write_text(json.dumps(params))
        return
    if layout in QUANTISED:
        config["quantization_config"] = QUANTISED[layout]
    (folder / "config.json").write_text(json.dumps(config))
    index = "pytorch_model.bin" if layout == "bin" else "model.safetensors"
    (folder / f"{index}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def run_child(arguments: list[str]) -> tuple[int, float]:
    """Peak resident bytes and seconds of a preparation; without arguments of the imports alone."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        cwd=SOURCE,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    peak, duration = done.stdout.splitlines()[-1].split()
    return int(peak), float(duration)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    options = parser.parse_args()
    experts_bytes = EXPERTS * 3 * HIDDEN * INTERMEDIATE * 2
    attention_bytes = 2 * HIDDEN * (HIDDEN + KEY_VALUE) * 2
    dense_bytes = 2 * VOCABULARY * HIDDEN * 2 + options.layers * attention_bytes
    bound = dense_bytes + 2 * experts_bytes
    base, _ = run_child([])
    print(
        f"dense {dense_bytes / 1e6:.0f} MB, {options.layers} layers of "
        f"{experts_bytes / 1e6:.0f} MB experts; bound {bound / 1e6:.0f} MB; "
        f"Python, torch and transformers {base / 1e6:.0f} MB"
    )
    print(
        f"{'source':8} {'experts':8} {'peak MB':>8} {'above base':>11} {'of bound':>9} {'GB/s':>6}"
    )
    total_bytes = dense_bytes + options.layers * experts_bytes
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for layout, formats in FORMATS.items():
            source = Path(scratch) / layout
            write_checkpoint(source, layout, options.layers)
            for weight_format in formats:
                output = Path(scratch) / "out"
                flags = [] if layout == "native" else ["--hf"]
                paths = ["--input-path", str(source), "--output-path", str(output)]
                peak, duration_s = run_child([*paths, *flags, "--expert-dtype", weight_format])
                shutil.rmtree(output)
                above = peak - base
                print(
                    f"{layout:8} {weight_format:8} {peak / 1e6:8.0f} {above / 1e6:8.0f} MB "
                    f"{above / bound:9.2f} {total_bytes / duration_s / 1e9:6.2f}"
                )
            shutil.rmtree(source)


if __name__ == "__main__":
    main()
