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
from datetime import date
from pathlib import Path
from statistics import median, quantiles

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import MixtralConfig

from moe_offload.checkpoint.prepared import MANIFEST_NAME
from moe_offload.config import (
    WEIGHT_FORMATS,
    CacheOptions,
    GenerationOptions,
    ModelOptions,
)
from moe_offload.engine.engine import Engine, load_engine, open_prepared
from moe_offload.kernels.bindings import load_kernels
from moe_offload.machine.hardware import read_hardware
from moe_offload.model.generation import generate_batch

ROOT = Path(__file__).parent.parent
FORMATS = ("bf16", "int8", "int4")  # those that there are a peer's figures of
HIDDEN, INNER, KV, VOCABULARY, LAYERS, EXPERTS, TOP_K = 4096, 14336, 1024, 32000, 2, 8, 2
HEAD_WEIGHTS = VOCABULARY * HIDDEN
LAYER_WEIGHTS = LAYERS * (TOP_K * 3 * HIDDEN * INNER + 2 * HIDDEN * (HIDDEN + KV))  # per token
N_PROMPT = 64
WARM_UP_STEPS = 4
READ_BYTES = 1 << 28
# ik_llama.cpp on two AVX2 cores: tokens/s, and the limits of that machine.
PEER_DECODE = {"bf16": 16.0, "int8": 21.2, "int4": 44.6}
PEER_PREFILL = {"bf16": 100.6, "int8": 144.2, "int4": 201.9}
PEER_READ_GBPS = 28.0
PEER_FMA_GFLOPS = 235.0


@dataclass(frozen=True)
class Speed:
    """Tokens per second in runs that had a limit (GB/s or GFLOP/s) measured beside each of them.

    `low` and `high` are quartiles. `percent_of_limit` counts the weights' bytes, or their
    multiply-adds, that the tokens need. `vs_peer` compares tokens per second per unit of the
    limit; above 1 is faster than the peer.
    """

    tokens_per_s: float
    low: float
    high: float
    limit: float
    percent_of_limit: float
    vs_peer: float
    vs_peer_low: float
    vs_peer_high: float


@dataclass(frozen=True)
class Row:
    """One format on one instruction set."""

    weight_format: str
    kernels: str
    decode: Speed
    prefill: Speed


def write_checkpoint(folder: Path) -> Path:
    """A random 2-layer Mixtral under the hub's names; kept for the next run."""
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        num_hidden_layers=LAYERS,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()

    up, down = matrix(INNER, HIDDEN), matrix(HIDDEN, INNER)
    shards: list[dict[str, Tensor]] = [
        {
            "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
            "lm_head.weight": matrix(VOCABULARY, HIDDEN),
            "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
        }
    ]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shard = {
            f"{prefix}input_layernorm.weight": torch.ones(HIDDEN).bfloat16(),
            f"{prefix}post_attention_layernorm.weight": torch.ones(HIDDEN).bfloat16(),
            f"{prefix}self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{prefix}self_attn.k_proj.weight": matrix(KV, HIDDEN),
            f"{prefix}self_attn.v_proj.weight": matrix(KV, HIDDEN),
            f"{prefix}self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{prefix}block_sparse_moe.gate.weight": matrix(EXPERTS, HIDDEN),
        }
        for expert in range(EXPERTS):  # rotations of one matrix: other values, no time to draw them
            name = f"{prefix}block_sparse_moe.experts.{expert}."
            shift = 1 + EXPERTS * layer + expert
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


def measure(
    engine: Engine, isa: str, n_steps: int, n_prompts: int
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Seconds of decode steps, GB/s of a read after each, seconds of prompts, GFLOP/s of each."""
    kernels = load_kernels("auto", isa)
    assert kernels is not None, "the limits are measured by the compiled kernels"
    memory = engine.store.blocks(1).view(-1)[:READ_BYTES]
    steps, reads, prompts, peaks = [], [], [], []
    prompt = [(37 * i + 11) % VOCABULARY for i in range(N_PROMPT)]
    tokens = generate_batch(
        engine.model, [prompt], GenerationOptions(max_tokens=WARM_UP_STEPS + n_steps)
    )
    for step in range(WARM_UP_STEPS + n_steps):
        started = time.perf_counter()
        next(tokens)  # the generator runs one step; the read below is not in its time
        if step >= WARM_UP_STEPS:
            steps.append(time.perf_counter() - started)
            reads.append(kernels.read_gbps(memory))
    for repetition in range(n_prompts + 1):
        peak = kernels.fma_gflops(0.05)
        for record, _ in generate_batch(engine.model, [prompt], GenerationOptions(max_tokens=1)):
            if repetition > 0:  # the first one warms up
                prompts.append(record.token_times_s[0])
                peaks.append(peak)
    return steps, reads, prompts, peaks


def speed(rates: list[float], limits: list[float], cost: float, peer: float) -> Speed:
    """`cost`: units of the limit that one token per second takes; `peer`: its rate per unit."""
    ratios = [rate / limit / peer for rate, limit in zip(rates, limits, strict=True)]
    low, middle, high = quantiles(rates, n=4)
    ratio_low, ratio, ratio_high = quantiles(ratios, n=4)
    return Speed(
        tokens_per_s=middle,
        low=low,
        high=high,
        limit=median(limits),
        percent_of_limit=100 * ratio * peer * cost,
        vs_peer=ratio,
        vs_peer_low=ratio_low,
        vs_peer_high=ratio_high,
    )


def run(folder: Path, weight_format: str, isa: str, arguments: argparse.Namespace) -> Row:
    options = ModelOptions(folder, device="cpu", cpu_kernel=arguments.cpu_kernel, cpu_isa=isa)
    with load_engine(open_prepared(options), options, CacheOptions()) as engine:
        if engine.cpu.suits_onednn:
            engine.calibrate()  # as a run does: oneDNN may take over for many tokens
        steps, reads, prompts, peaks = measure(engine, isa, arguments.tokens, arguments.prompts)
        description = engine.cpu.description
    matrices = HEAD_WEIGHTS + LAYER_WEIGHTS  # that one decode step reads
    flops = 2 * (LAYER_WEIGHTS + HEAD_WEIGHTS / N_PROMPT)  # per token: only the last has logits
    return Row(
        weight_format=weight_format,
        kernels=description,
        decode=speed(
            [1 / step for step in steps],
            reads,
            matrices * WEIGHT_FORMATS[weight_format].bits_per_weight / 8 / 1e9,
            PEER_DECODE[weight_format] / PEER_READ_GBPS,
        ),
        prefill=speed(
            [N_PROMPT / prompt for prompt in prompts],
            peaks,
            flops / 1e9,
            PEER_PREFILL[weight_format] / PEER_FMA_GFLOPS,
        ),
    )


def describe(name: str, speed: Speed, unit: str) -> str:
    return (
        f"  {name:7} {speed.tokens_per_s:7.2f} tok/s [{speed.low:.2f}, {speed.high:.2f}]"
        f"  {speed.percent_of_limit:5.1f}% of {speed.limit:.1f} {unit}"
        f"  {speed.vs_peer:.2f}x the peer [{speed.vs_peer_low:.2f}, {speed.vs_peer_high:.2f}]"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument(
        "--isa", nargs="+", default=["auto"], help="instruction sets of kernels and limits (auto)"
    )
    parser.add_argument(
        "--cpu-kernel", choices=("auto", "torch"), default="auto", help="torch: without our kernels"
    )
    parser.add_argument("--tokens", type=int, default=32, help="decode steps measured (32)")
    parser.add_argument("--prompts", type=int, default=7, help="prompts of 64 tokens measured (7)")
    parser.add_argument("--prepare-only", action="store_true", help="write the checkpoints, stop")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    arguments = parser.parse_args()
    if arguments.tokens < 2 or arguments.prompts < 2:
        parser.error("expected --tokens and --prompts of at least 2: quartiles need them")
    source = write_checkpoint(arguments.work_dir / "hub")
    rows = []
    for weight_format in arguments.formats:
        folder = prepare(source, arguments.work_dir / weight_format, weight_format)
        for isa in () if arguments.prepare_only else arguments.isa:
            row = run(folder, weight_format, isa, arguments)
            rows.append(row)
            print(f"{row.weight_format}, {row.kernels}; limits: {isa}")
            print(describe("decode", row.decode, "GB/s read"))
            print(describe("prefill", row.prefill, "GFLOP/s"), flush=True)
    if arguments.json is not None:
        document = {
            "date": date.today().isoformat(),
            "command": sys.argv,
            "hardware": read_hardware().to_json(),
            "torch": torch.__version__,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
