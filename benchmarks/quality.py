"""What each expert format costs a language model: perplexity, KL divergence and agreement on text.

    PYTHONPATH=src python3 benchmarks/quality.py [--input-path build/demo/hub] [--tokens 4096]
        [--formats bf16 int8 int4 int4+text] [--llama-cpp LIBRARY] [--schemes Q4_K_M]
        [--shuffle] [--json FILE]

The checkpoint is prepared in each format and the real engine reads Python's own documentation
(`pydoc_data.topics`, which every Python has), in windows of 512 tokens. Of every token but each
window's first, the distribution over the vocabulary is compared with the engine's own on experts
in fp32: mean KL divergence in nats, how often both prefer the same token, and the perplexity.
The rest of the model is stored in bf16 throughout.

With --llama-cpp (a shared library that exports ggml_quantize_chunk: libggml-base.so of
llama-cpp-python, or xllamacpp's extension), llama.cpp's quantiser packs the same experts in its
formats; what it leaves of them is read by our engine, as bf16. Those rows lack what llama.cpp
loses by rounding activations to 8 bits, as our int8 and int4 do. As llama.cpp does, a matrix whose
rows are no multiple of 256 gets the next plain format instead of a K-quant, and Q4_K_M gives half
of the layers' down projections six bits. "Q4_K_M filled" fills such rows with zeros up to whole
blocks instead and does not count these: the K-quants that a larger model would get. With "+text"
the quantiser is given an importance matrix, as llama.cpp's own program makes it: the mean squares
of what each expert's matrices see while the source reads the calibration text of int4+text.

--shuffle measures another checkpoint of the same function: hidden and intermediate channels in a
random order. Where the weights were published in groups of 32, as the demo's were in Q4_1, the
groups of the formats here are then others, and none of them profits from theirs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from moe_offload.checkpoint.source import open_source
from moe_offload.commands.prepare_model import prepare_model
from moe_offload.config import WEIGHT_FORMATS
from moe_offload.engine.loading import load_model
from moe_offload.kernels.oracle import apply_activation
from moe_offload.model.sample_text import default_text, read_sample, windows_of

EXPERT_MATRIX = re.compile(r"\.layers\.(\d+)\..*\.experts\.(\d+)\.(\w+)\.weight$")
DOWN_PROJECTIONS = ("w2", "down_proj")
K_BLOCK = 256
PLAIN_INSTEAD = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}


def _q4_k_m(layer: int, n_layers: int, name: str) -> Type:
    eighth = n_layers // 8
    more = layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2
    return Type.Q6_K if name in DOWN_PROJECTIONS and more else Type.Q4_K


LLAMA_CPP: dict[str, Callable[[int, int, str], Type]] = {
    "Q8_0": lambda *_: Type.Q8_0,
    "Q5_0": lambda *_: Type.Q5_0,
    "Q4_K_M": _q4_k_m,
    "Q4_K_M filled": _q4_k_m,
    "Q4_1": lambda *_: Type.Q4_1,
    "Q4_0": lambda *_: Type.Q4_0,
    "MXFP4": lambda *_: Type.MXFP4,
}


@dataclass(frozen=True)
class Row:
    """One format: bits per expert weight, perplexity, mean KL (nats) and agreement against fp32."""

    name: str
    bits: float
    perplexity: float
    kl: float
    kl_error: float
    agreement: float

    def line(self) -> str:
        return (
            f"| {self.name} | {self.bits:.2f} | {self.perplexity:.3f} "
            f"| {self.kl:.5f} ± {self.kl_error:.5f} | {self.agreement:.1%} |"
        )


def windows_of_text(folder: Path, n_tokens: int, length: int) -> list[Tensor]:
    """Token ids [1, length] of Python's documentation, topic by topic, in alphabetical order."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:n_tokens]
    return [torch.tensor([ids[at : at + length]]) for at in range(0, n_tokens - length + 1, length)]


def distributions(folder: Path, windows: Sequence[Tensor]) -> Iterator[Tensor]:
    """Log probabilities of each window's next tokens: fp32 [length - 1, vocabulary]."""
    model = load_model(folder, device="cpu")
    with torch.inference_mode():
        for window in windows:
            yield model(window).logits[0, :-1].float().log_softmax(-1)
    model.engine.close()


def compare(
    name: str, bits: float, found: Iterator[Tensor], expected: list[Tensor], windows: list[Tensor]
) -> Row:
    nats, kl, same = [], [], []
    for ours, theirs, window in zip(found, expected, windows, strict=True):
        nats.append(-ours.gather(1, window[0, 1:, None])[:, 0])
        kl.append((theirs.exp() * (theirs - ours)).sum(-1))
        same.append((ours.argmax(-1) == theirs.argmax(-1)).float())
    divergence = torch.cat(kl)
    return Row(
        name,
        bits,
        math.exp(float(torch.cat(nats).mean())),
        float(divergence.mean()),
        float(divergence.std()) / len(divergence) ** 0.5,
        float(torch.cat(same).mean()),
    )


# (layer, expert, whether of its down projection) -> mean squares of the matrix's inputs, fp32 [C].
Importance = dict[tuple[int, int, bool], Tensor]


@torch.inference_mode()
def importance_of(folder: Path) -> Importance:
    """What llama.cpp calls an importance matrix, from the default calibration text."""
    source = open_source(folder, True, torch.bfloat16)
    ids = AutoTokenizer.from_pretrained(folder)(default_text())["input_ids"]
    found = {}
    for layer, (module, inputs) in enumerate(
        zip(source.experts, read_sample(source, windows_of(ids)), strict=True)
    ):
        read, site = source.weights_reader(module), inputs.site
        for expert in range(module.n_experts):
            x = inputs.of_expert(expert)
            first = x @ read(expert)["gate_up"].float().t()
            middle = apply_activation(first, site.activation, module.has_gate, site.act_module)
            found[layer, expert, False] = x.square().mean(0)
            found[layer, expert, True] = middle.square().mean(0)
    return found


class LlamaCppQuantizer:
    """llama.cpp's own quantiser, from a shared library."""

    def __init__(self, library: Path) -> None:
        self._chunk = ctypes.CDLL(str(library)).ggml_quantize_chunk
        self._chunk.restype = ctypes.c_size_t
        pointer, whole = ctypes.c_void_p, ctypes.c_int64
        self._chunk.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]

    def round_trip(
        self, weight: Tensor, kind: Type, fill: bool, importance: Tensor | None
    ) -> tuple[Tensor, float]:
        """What W [R, C] becomes, in fp32, and the bytes that it takes; `importance` is fp32 [C]."""
        n_columns = weight.shape[1]
        if n_columns % K_BLOCK and not fill:
            kind = PLAIN_INSTEAD.get(kind, kind)
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        padding = (0, -n_columns % per_block)
        values = np.ascontiguousarray(functional.pad(weight.float(), padding).numpy())
        columns = None if importance is None else functional.pad(importance, padding, value=1.0)
        packed = np.empty((values.shape[0], values.shape[1] // per_block * block_bytes), np.uint8)
        by_column = None if columns is None else columns.data_ptr()
        written = self._chunk(
            int(kind), values.ctypes.data, packed.ctypes.data, 0, *values.shape, by_column
        )
        assert written == packed.nbytes
        numbers = torch.from_numpy(gguf.dequantize(packed, kind))[:, :n_columns].contiguous()
        return numbers, weight.numel() / per_block * block_bytes

    def requantized(self, source: Path, target: Path, scheme: str) -> float:
        """Copy `source`, experts as `scheme` leaves them; returns bits per expert weight."""
        n_layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
        name_of_kind, _, text = scheme.partition("+")
        importance: Importance = importance_of(source) if text else {}
        fill, n_bytes, n_weights = name_of_kind.endswith("filled"), 0.0, 0

        def requantize(name: str, tensor: Tensor) -> Tensor:
            nonlocal n_bytes, n_weights
            found = EXPERT_MATRIX.search(name)
            if found is None:
                return tensor
            layer, expert = int(found[1]), int(found[2])
            kind = LLAMA_CPP[name_of_kind](layer, n_layers, found[3])
            columns = importance.get((layer, expert, found[3] in DOWN_PROJECTIONS))
            numbers, size = self.round_trip(tensor, kind, fill, columns)
            n_bytes, n_weights = n_bytes + size, n_weights + numbers.numel()
            return numbers

        copy_changed(source, target, requantize)
        return 8 * n_bytes / n_weights


def copy_changed(source: Path, target: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    """Copy a checkpoint, each tensor as `change` of its name and itself makes it."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, target)
            continue
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            tensors = {name: change(name, opened.get_tensor(name)) for name in names}
        save_file(tensors, target / file.name)


def shuffle(source: Path, target: Path) -> None:
    """Copy a Mixtral checkpoint, its channels in a random order."""
    config = json.loads((source / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randperm(config["hidden_size"], generator=generator)
    middle = torch.randperm(config["intermediate_size"], generator=generator)

    def shuffled(name: str, tensor: Tensor) -> Tensor:
        if tensor.dim() == 1 or name.endswith("o_proj.weight"):
            return tensor[hidden]
        if name.endswith(".w2.weight"):
            return tensor[hidden][:, middle]
        if name.endswith((".w1.weight", ".w3.weight")):
            return tensor[middle][:, hidden]
        return tensor[:, hidden]

    copy_changed(source, target, lambda name, tensor: shuffled(name, tensor).contiguous())


def prepare(source: Path, target: Path, expert_dtype: str) -> Path:
    """Prepare `source` in a format; `int4+text` is int4 with the default calibration text."""
    name, _, text = expert_dtype.partition("+")
    prepare_model(
        source, target, hf=True, expert_dtype=name, dense_dtype="bf16", force=True,
        calibration_text=Path() if text else None,
    )  # fmt: skip
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input-path", type=Path, default=Path("build/demo/hub"))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    every = [*(name for name in WEIGHT_FORMATS if name != "fp32"), "int4+text"]
    parser.add_argument("--formats", nargs="+", default=every)
    parser.add_argument("--shuffle", action="store_true")
    parser.add_argument("--llama-cpp", type=Path)
    schemes = [*LLAMA_CPP, *(f"{name}+text" for name in LLAMA_CPP)]
    parser.add_argument("--schemes", nargs="+", default=schemes, choices=schemes)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    source = arguments.input_path
    windows = windows_of_text(source, arguments.tokens, arguments.window)
    rows = []

    def measured(row: Row) -> None:
        rows.append(asdict(row))
        print(row.line(), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if arguments.shuffle:
            shuffle(source, work / "shuffled")
            source = work / "shuffled"
        expected = list(distributions(prepare(source, work / "prepared", "fp32"), windows))
        print("| experts | bits a weight | perplexity | KL to fp32, nats | same token |")
        print("|---|---|---|---|---|")
        measured(compare("fp32", 32, iter(expected), expected, windows))
        for name in arguments.formats:
            found = distributions(prepare(source, work / "prepared", name), windows)
            bits = WEIGHT_FORMATS[name.partition("+")[0]].bits_per_weight
            measured(compare(name, bits, found, expected, windows))
        for scheme in arguments.schemes if arguments.llama_cpp else ():
            changed = work / "changed"
            bits = LlamaCppQuantizer(arguments.llama_cpp).requantized(source, changed, scheme)
            found = distributions(prepare(changed, work / "prepared", "bf16"), windows)
            measured(compare(f"llama.cpp {scheme}", bits, found, expected, windows))
            shutil.rmtree(changed)


if __name__ == "__main__":
    main()
