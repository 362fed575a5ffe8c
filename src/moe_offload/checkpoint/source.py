"""A checkpoint as users have it, opened for reading in the names and layout of the run time.

Opening reads configuration, file headers and nothing else: it yields the model on the meta device,
its experts modules and a conversion plan, or a sentence on why the checkpoint cannot be served. Its
small files (configuration, tokenizer, generation defaults) travel with the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moe_offload.checkpoint.block import MATRIX_NAMES
from moe_offload.checkpoint.codes import Codes
from moe_offload.checkpoint.conversion import ConversionPlan, ExpertsModule, find_experts
from moe_offload.checkpoint.exact_format import ExactFormat
from moe_offload.checkpoint.folders import COMPANIONS, gguf_parts, require_source
from moe_offload.checkpoint.gguf_file import open_gguf
from moe_offload.checkpoint.gguf_models import read_gguf_config, to_model_tensors
from moe_offload.checkpoint.gguf_tokenizer import tokenizer_files
from moe_offload.checkpoint.mistral import to_hub_tensors
from moe_offload.checkpoint.model_config import (
    build_on_meta,
    read_hub_config,
    read_native_config,
    require_experts_per_token,
    require_generation_config,
)
from moe_offload.checkpoint.quantized_source import dequantised
from moe_offload.checkpoint.safetensors_file import checksum
from moe_offload.checkpoint.source_files import open_hugging_face, open_mistral_native
from moe_offload.config import Scales, WeightFormat
from moe_offload.errors import UserError
from moe_offload.files import (
    LARGEST_JSON_BYTES,
    read_json_object,
    require_regular,
    write_atomically,
)


@dataclass(frozen=True)
class SourceCheckpoint:
    """An opened checkpoint.

    `model` is on the meta device in the dtype to run in, `dense_names` are its tensors outside the
    experts that need storing, `unused` the checkpoint's tensors that the model has no place for.
    `fingerprint` is of the moment it was opened; see `current_fingerprint`. `path` is what was
    given, the checkpoint's `folder` or a file in it; `made_files` are those of the small files,
    by name, that the weights' files contain.
    """

    path: Path
    folder: Path
    files: tuple[Path, ...]
    config: PreTrainedConfig
    generation_config: dict[str, Any] | None
    model: PreTrainedModel
    experts: tuple[ExpertsModule, ...]
    plan: ConversionPlan
    dense_names: tuple[str, ...]
    unused: tuple[str, ...]
    fingerprint: str
    made_files: dict[str, bytes]

    def read_dense(self, name: str) -> Tensor:
        """One tensor in the source's dtype; UserError for a weight that is not finite."""
        tensor = self.plan.read(name)
        path, _, leaf = name.rpartition(".")
        if leaf in self.model.get_submodule(path)._parameters:  # a buffer may be a mask
            finite = not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())
            _require_finite(finite, name)
        return tensor

    def weights_reader(self, module: ExpertsModule) -> Callable[[int], dict[str, Tensor]]:
        """What reads an expert of a layer: block field -> tensor in normal form, source dtype.

        Call it in ascending order, from any thread. UserError for a weight that is not finite.
        """
        read = self._field_reader(module)
        return lambda expert: {field: read(field, expert) for field in module.parameters}

    def expert_reader(self, module: ExpertsModule) -> Callable[[int], dict[str, Tensor | Codes]]:
        """The same, where matrices of a quantised source are its codes if these are to be had."""
        read = self._field_reader(module)
        codes = {name: self._codes_reader(module, name) for name in MATRIX_NAMES}

        def read_expert(expert: int) -> dict[str, Tensor | Codes]:
            weights: dict[str, Tensor | Codes] = {
                field: read(field, expert) for field in module.parameters if field not in codes
            }
            for name, read_codes in codes.items():
                kept = read_codes(expert)
                if kept is None:
                    weights[name] = read(name, expert)
                else:
                    _require_finite(kept.is_finite(), f"{name} of expert {expert} in {module.name}")
                    weights[name] = kept
            return weights

        return read_expert

    def _codes_reader(self, module: ExpertsModule, field: str) -> Callable[[int], Codes | None]:
        """What reads the codes of an expert's matrix in normal form; None where there are none.

        Blocks of the matrix that the model stores transposed are not those of rows and groups.
        """
        read = self.plan.codes_reader(module.parameters[field])

        def read_codes(expert: int) -> Codes | None:
            stored = read(expert)
            found = stored and stored.map(partial(module.normalise, field))
            return found if found is not None and found.unit_columns else None

        return read_codes

    def _field_reader(self, module: ExpertsModule) -> Callable[[str, int], Tensor]:
        readers = {
            field: self.plan.expert_reader(name) for field, name in module.parameters.items()
        }

        def read(field: str, expert: int) -> Tensor:
            found = readers[field](expert)
            finite = all(bool(end.isfinite()) for end in found.aminmax())
            _require_finite(finite, f"{field} of expert {expert} in {module.name}")
            return module.normalise(field, found)

        return read

    def find_format(self) -> tuple[WeightFormat, Scales | None, str | None]:
        """The smallest format that holds every expert's matrices exactly, or else bf16.

        With it come the scales it needs, or the name of a tensor that bf16 rounds. Reads the scales
        of a quantised source; one that is not quantised becomes bf16.
        """
        exact = ExactFormat()
        for module in self.experts:
            for field in MATRIX_NAMES:
                grids = self.plan.grids(module.parameters[field])
                if grids is None:
                    return "bf16", None, None
                has_codes = self._codes_reader(module, field)(0) is not None
                for grid in grids:
                    if not has_codes or not exact.add(grid):
                        return "bf16", None, None if grid.is_bf16 else grid.name
        n_rows = math.gcd(*(module.intermediate_size for module in self.experts))
        interleaved = not all(module.is_concatenated for module in self.experts)
        return *exact.result(1 if interleaved else n_rows), None

    def current_fingerprint(self) -> str:
        """What changes with the weight files (name, size, modification time) and the config."""
        return _fingerprint(self.files)


def _require_finite(is_finite: bool, name: str) -> None:
    """UserError where one weight would spoil every answer that it takes part in."""
    if not is_finite:
        raise UserError(
            f"{name} holds weights that are infinite or not a number, as fp16 copies of bf16 "
            "models may: use the model's bf16 or fp32 version"
        )


def open_source(path: Path, hugging_face: bool, dtype: torch.dtype) -> SourceCheckpoint:
    """Open a GGUF file, a Hugging Face folder or, without `hugging_face`, Mistral's native one.

    `dtype` is what the model will run in. UserError for a missing or wrong folder, damaged or
    missing files, missing tensors, a model without experts, an unsupported experts layout or one
    quantised in a way that `quantized_source.py` does not read.
    """
    require_source(path, hugging_face)
    folder, made_files, gguf = path, {}, None
    if parts := gguf_parts(path):
        folder, gguf = parts[0].parent, open_gguf(parts)
        config, found = read_gguf_config(gguf), gguf.tensors
        made_files = tokenizer_files(gguf)
    elif hugging_face:
        config, settings = read_hub_config(folder)
        found = tensors = open_hugging_face(folder)
        if settings is not None:
            tensors = dequantised(found, settings)
    else:
        config = read_native_config(folder)
        found = open_mistral_native(folder)
        tensors = to_hub_tensors(found, config)
    weights = sorted({tensor.path for tensor in found.values()})
    configs = () if gguf else (folder / ("config.json" if hugging_face else "params.json"),)
    paths = (*configs, *weights)
    # eager, whatever the config asks for: a name like "org/kernel" is code from the hub
    task = f"build the model of {paths[0]}"
    remedy = "expected a text-generation (causal LM) model"
    model = build_on_meta(config, dtype, "eager", task, remedy)
    experts = find_experts(model)
    fewest = min(module.n_experts for module in experts)
    require_experts_per_token(config, fewest, paths[0], "correct it or download it again")
    if gguf:
        tensors = to_model_tensors(gguf, model, experts)
    plan = ConversionPlan(model, tensors)
    of_experts = {name for module in experts for name in module.parameters.values()}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    return SourceCheckpoint(
        path=path,
        folder=folder,
        config=config,
        generation_config=_read_generation_config(folder, made_files),
        model=model,
        experts=experts,
        plan=plan,
        dense_names=tuple(name for name in plan.targets if name not in of_experts),
        unused=tuple(
            name for name in plan.unused if not any(re.search(key, name) for key in ignored)
        ),
        files=paths,
        fingerprint=_fingerprint(paths),
        made_files=made_files,
    )


def _read_generation_config(folder: Path, made: dict[str, bytes]) -> dict[str, Any] | None:
    if made:
        inside = made.get("generation_config.json")
        return json.loads(inside) if inside else None
    path = folder / "generation_config.json"
    if not path.exists():
        return None
    found = read_json_object(path)
    require_generation_config(found, path, "correct it or download it again")
    return found


def _fingerprint(paths: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.suffix == ".json":
            digest.update(path.read_bytes())
        else:
            facts = path.stat()
            digest.update(f"{path.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def copy_companions(source: SourceCheckpoint, output: Path) -> dict[str, int]:
    """Copy the small files into another folder and make sure that there is a `config.json`.

    A file of the source folder is never changed: where source and output are the same folder, only
    missing ones (Mistral's native format has no `config.json`, GGUF has none at all) are added.
    Returns the checksum of each by its name. UserError when one cannot be read; OSError from the
    output passes through.
    """
    same = source.folder.samefile(output)
    made = dict(source.made_files)
    made.setdefault("config.json", source.config.to_json_string(use_diff=True).encode())
    found = {} if source.made_files and not same else _small_files(source.folder)
    for name, data in (made | found).items():
        if not same or name not in found:
            write_atomically(output / name, data)
    return {name: checksum(data) for name, data in (made | found).items()}


def _small_files(folder: Path) -> dict[str, bytes]:
    paths = [path for pattern in COMPANIONS for path in sorted(folder.glob(pattern))]
    return {path.name: _read(path) for path in paths if path.is_file()}


def _read(path: Path) -> bytes:
    try:
        require_regular(path, LARGEST_JSON_BYTES)
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; mend its permissions or copy it again"
        ) from error
