"""The small files that travel with the weights: configuration, tokenizer, generation defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from transformers import PreTrainedConfig

from moe_offload.checkpoint.safetensors_file import write_file_atomically
from moe_offload.errors import UserError

_PATTERNS: Final = (
    "config.json",
    "generation_config.json",
    "params.json",
    "tokenizer.json",
    "tokenizer.model*",
    "tokenizer_config.json",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template*",
)


def copy_companions(source: Path, output: Path, config: PreTrainedConfig) -> None:
    """Copy these files into another folder and make sure that there is a `config.json`.

    A file of the source folder is never changed: where source and output are the same folder, only
    a missing `config.json` (Mistral's native format has none) is added. UserError when one cannot
    be read; OSError from the output passes through.
    """
    if not source.samefile(output):
        for pattern in _PATTERNS:
            for path in sorted(source.glob(pattern)):
                if path.is_file():
                    write_file_atomically(output / path.name, _read(path))
    if not (output / "config.json").exists():
        text = config.to_json_string(use_diff=True)
        write_file_atomically(output / "config.json", text.encode())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; mend its permissions or copy it again"
        ) from error
