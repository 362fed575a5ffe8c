"""Tokens per second of the whole engine on the CPU alone, as a share of what the machine allows.

    PYTHONPATH=src python3 benchmarks/bench_end_to_end.py --work-dir DIR [--json FILE]

Writes a random Mixtral-shaped checkpoint of 2 layers in the hub's layout (5.8 GB, once), prepares
it with weights_preprocessor.py in each format, experts and dense part alike, and runs it through
the real engine. Between steps the same threads read memory plainly, and between prompts they do
independent multiply-adds; each speed is divided by the limit measured beside it. The comparison is
with ik_llama.cpp's published ratio on two AVX2 cores: its tokens per second at 28 GB/s of plain
read (decode) and 235 GFLOP/s of fp32 multiply-adds (prefill of 64 tokens).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import MixtralConfig

from checkpoint import MANIFEST_NAME
from config import CacheOptions, ModelOptions
from cpu_kernels import load_kernels
from engine import Engine, load_engine, open_prepared
from generation import generate_batch, make_sampler

ROOT = Path(__file__).parent.parent
FORMATS = ("bf16", "int8", "int4")
N_PROMPT = 64
READ_BYTES = 1 << 28
# ik_llama.cpp on two AVX2 cores: tokens/s, and the limits of that machine.
PEER_DECODE = {"bf16": 16.0, "int8": 21.2, "int4": 44.6}
PEER_PREFILL = {"bf16": 100.6, "int8": 144.2, "int4": 201.9}
PEER_READ_GBPS = 28.0
PEER_FMA_GFLOPS = 235.0


@dataclass(frozen=True)
class Row:
    """One format. Speeds are medians; `*_low` and `*_high` the quartiles of the same runs.

    `decode_vs_peer` and `prefill_vs_peer` compare tokens per second per unit of the limit.
    """

    weight_format: str
    kernels: str
    decode_tokens_per_s: float
    decode_low: float
    decode_high: float
    read_gbps: float
    decode_vs_peer: float
    prefill_tokens_per_s: float
    prefill_low: float
    prefill_high: float
    fma_gflops: float
    prefill_vs_peer: float


def write_checkpoint(folder: Path) -> Path:
    """A random 2-layer Mixtral under the hub's names; kept for the next run."""
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = MixtralConfig(
        num_hidden_layers=2, vocab_size=32000, max_position_embeddings=4096, dtype="bfloat16"
    )
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()

    hidden, inner, kv = config.hidden_size, config.intermediate_size, 1024
    up, down = matrix(inner, hidden), matrix(hidden, inner)
    shards: list[dict[str, Tensor]] = [
        {
            "model.embed_tokens.weight": matrix(config.vocab_size, hidden),
            "lm_head.weight": matrix(config.vocab_size, hidden),
            "model.norm.weight": torch.ones(hidden).bfloat16(),
        }
    ]
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shard = {
            f"{prefix}input_layernorm.weight": torch.ones(hidden).bfloat16(),
            f"{prefix}post_attention_layernorm.weight": torch.ones(hidden).bfloat16(),
            f"{prefix}self_attn.q_proj.weight": matrix(hidden, hidden),
            f"{prefix}self_attn.k_proj.weight": matrix(kv, hidden),
            f"{prefix}self_attn.v_proj.weight": matrix(kv, hidden),
            f"{prefix}self_attn.o_proj.weight": matrix(hidden, hidden),
            f"{prefix}block_sparse_moe.gate.weight": matrix(8, hidden),
        }
        for expert in range(8):  # rotations of one matrix: other values, no time to draw them
            name = f"{prefix}block_sparse_moe.experts.{expert}."
            shift = 1 + 8 * layer + expert
            shard[f"{name}w1.weight"] = up.roll(shift, 0).contiguous()
            shard[f"{name}w3.weight"] = up.roll(-shift, 0).contiguous()
            shard[f"{name}w2.weight"] = down.roll(shift, 0).contiguous()
        shards.append(shard)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def prepare(source: Path, folder: Path, weight_format: str) -> Path:
    """The folder prepared by the real command; kept for the next run."""
    if not (folder / MANIFEST_NAME).exists():
        command = [sys.executable, str(ROOT / "weights_preprocessor.py"), "--hf"]
        command += ["--input-path", str(source), "--output-path", str(folder)]
        command += ["--expert-dtype", weight_format, "--dense-dtype", weight_format]
        subprocess.run(command, check=True)
    return folder


def measure(engine: Engine, isa: str, n_tokens: int, n_prompts: int) -> tuple[list[float], ...]:
    """Seconds and limits, in turn: decode steps, reads (GB/s), prompts, multiply-adds (GFLOP/s)."""
    kernels = load_kernels("auto", isa)
    assert kernels is not None, "the limits are measured by the compiled kernels"
    memory = engine.store.blocks(1).view(-1)[:READ_BYTES]
    sampler = make_sampler(0.0, 1.0, 0, engine.device)
    steps, reads, prompts, peaks = [], [], [], []
    prompt = [(37 * i + 11) % 32000 for i in range(N_PROMPT)]
    for record, _ in generate_batch(
        engine.model, [prompt], max_tokens=n_tokens + 4, sampler=sampler, eos_ids=frozenset()
    ):
        if len(record.ids) > 4:  # the first ones warm up
            steps.append(record.token_times_s[-1])
            reads.append(kernels.read_gbps(memory))
    with torch.inference_mode():
        for _ in range(n_prompts + 1):
            peaks.append(kernels.fma_gflops(0.05))
            started = time.perf_counter()
            engine.model(torch.tensor([prompt]), logits_to_keep=1)
            prompts.append(time.perf_counter() - started)
    return steps, reads, prompts[1:], peaks[1:]


def run(folder: Path, weight_format: str, arguments: argparse.Namespace) -> Row:
    options = ModelOptions(
        folder, device="cpu", cpu_kernel=arguments.cpu_kernel, cpu_isa=arguments.isa
    )
    with load_engine(open_prepared(options), options, CacheOptions()) as engine:
        steps, reads, prompts, peaks = measure(
            engine, arguments.isa, arguments.tokens, arguments.prompts
        )
        description = engine.cpu.description
    per_read = median(1 / step / read for step, read in zip(steps, reads, strict=True))
    per_flop = median(N_PROMPT / p / peak for p, peak in zip(prompts, peaks, strict=True))
    slow, _, fast = quantiles([1 / step for step in steps], n=4)
    slow_prompt, _, fast_prompt = quantiles([N_PROMPT / p for p in prompts], n=4)
    return Row(
        weight_format=weight_format,
        kernels=description,
        decode_tokens_per_s=1 / median(steps),
        decode_low=slow,
        decode_high=fast,
        read_gbps=median(reads),
        decode_vs_peer=per_read / (PEER_DECODE[weight_format] / PEER_READ_GBPS),
        prefill_tokens_per_s=N_PROMPT / median(prompts),
        prefill_low=slow_prompt,
        prefill_high=fast_prompt,
        fma_gflops=median(peaks),
        prefill_vs_peer=per_flop / (PEER_PREFILL[weight_format] / PEER_FMA_GFLOPS),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--isa", default="auto", help="instruction set of kernels and peak (auto)")
    parser.add_argument("--cpu-kernel", choices=("auto", "torch"), default="auto")
    parser.add_argument("--tokens", type=int, default=32, help="decode steps measured (32)")
    parser.add_argument("--prompts", type=int, default=5, help="prompts of 64 tokens measured (5)")
    parser.add_argument("--prepare-only", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    source = write_checkpoint(arguments.work_dir / "hub")
    rows = []
    for weight_format in arguments.formats:
        folder = prepare(source, arguments.work_dir / weight_format, weight_format)
        if arguments.prepare_only:
            continue
        row = run(folder, weight_format, arguments)
        rows.append(row)
        print(
            f"{row.weight_format:5} {row.kernels:28}"
            f" decode {row.decode_tokens_per_s:6.2f} tok/s"
            f" [{row.decode_low:.2f}, {row.decode_high:.2f}] at {row.read_gbps:.1f} GB/s read:"
            f" {row.decode_vs_peer:.2f}x the peer"
            f" | prefill {row.prefill_tokens_per_s:7.1f} tok/s"
            f" [{row.prefill_low:.1f}, {row.prefill_high:.1f}] at {row.fma_gflops:.0f} GFLOP/s:"
            f" {row.prefill_vs_peer:.2f}x the peer",
            flush=True,
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
