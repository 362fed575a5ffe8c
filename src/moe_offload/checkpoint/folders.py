"""Whether a folder is a model's, told before any of it is read: no torch is needed for that."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from moe_offload.errors import UserError
from moe_offload.files import LARGEST_JSON_BYTES, read_json_object, require_regular

MANIFEST_NAME: Final = "manifest.json"
FORMAT_VERSION: Final = 1
PREPARE_AGAIN: Final = "prepare the model again with weights_preprocessor.py --force"
# The names of checkpoints' weights: Hugging Face's, older ones, Mistral's native.
WEIGHT_FILES: Final = ("model*.safetensors", "pytorch_model*.bin", "consolidated*")
CONFIGS: Final = ("config.json", "params.json")
# The small files that travel with the weights.
COMPANIONS: Final = (
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
    "tiktoken.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template*",
)
_OF_NO_TOKENIZER: Final = ("config.json", "generation_config.json", "params.json", "chat_template*")
_NO_CHECKPOINTS: Final = {
    "adapter_config.json": "a LoRA adapter, not a model: merge it into its base model with peft's "
    "merge_and_unload() and save_pretrained(), and prepare that folder",
}
_SPLIT: Final = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


def gguf_parts(path: Path) -> tuple[Path, ...]:
    """All files of the GGUF model at `path`, one of them or their folder, in order; else none.

    UserError where a part of a split model is missing, or a folder holds several models.
    """
    if path.is_dir():
        if any(any(path.glob(pattern)) for pattern in WEIGHT_FILES):
            return ()
        # a multimodal model has its other half beside it
        found = sorted(one for one in path.glob("*.gguf") if not one.name.startswith("mmproj"))
    else:
        found = [path] if path.suffix == ".gguf" and path.exists() else []
    if not found:
        return ()
    models = {}
    for one in found:
        split = _SPLIT.fullmatch(one.name)
        models[split.groups() if split else one.name] = one
    if len(models) > 1:
        names = [one.name for one in models.values()]
        raise UserError(
            f"{path} holds {len(models)} GGUF models, such as {names[0]} and {names[1]}: give one "
            "of the files as --input-path"
        )
    ((name, one),) = models.items()
    if isinstance(name, str):
        return (one,)
    stem, count = name
    numbers = range(1, int(count) + 1)
    parts = tuple(one.with_name(f"{stem}-{number:05d}-of-{count}.gguf") for number in numbers)
    for part in parts:
        if not part.exists():
            raise UserError(
                f"{part} is missing: expected {len(parts)} parts of {stem} beside each other; "
                "download it"
            )
    return parts


def require_prepared(folder: Path) -> dict[str, Any]:
    """What the manifest of a prepared folder says, as it is in the file.

    UserError for a folder that is missing, that `weights_preprocessor.py` has not finished, or of
    another format version, and for a manifest that is not whole.
    """
    try:
        gguf = () if (folder / MANIFEST_NAME).exists() else gguf_parts(folder)
        if gguf:
            raise UserError(
                f"{folder} is a GGUF model and not prepared yet; run: python3 "
                f'weights_preprocessor.py --input-path "{gguf[0]}" --output-path FOLDER, and give '
                "that folder"
            )
        if not folder.is_dir():
            raise UserError(
                f"expected a prepared model folder at {folder}, found "
                f"{_what_else(folder, 'the path')}"
            )
        if not (folder / MANIFEST_NAME).exists():
            if not any((folder / name).exists() for name in CONFIGS):
                raise UserError(
                    f"expected a prepared model folder at {folder}, found neither {MANIFEST_NAME} "
                    "nor a model to prepare (config.json or params.json); check the path"
                )
            flag = "" if (folder / "params.json").exists() else " --hf"
            raise UserError(
                f"{folder} is not prepared yet (it has no {MANIFEST_NAME}); run: python3 "
                f'weights_preprocessor.py --input-path "{folder}" --output-path "{folder}"{flag}'
            )
        path = folder / MANIFEST_NAME
        require_regular(path, LARGEST_JSON_BYTES)
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from error
    try:
        data = read_json_object(path, PREPARE_AGAIN, decode_floats)
    except TypeError as error:  # of a float that is none
        raise UserError(f"{path} is damaged ({error!s:.200}); {PREPARE_AGAIN}") from error
    if "format_version" not in data:
        raise UserError(
            f"{path} is not the manifest of a prepared folder (it has no format_version); "
            "choose another folder"
        )
    version = data["format_version"]
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(
            f"{folder} was prepared in format version {version!r:.40}, this program reads "
            f"version {FORMAT_VERSION}; prepare it again with weights_preprocessor.py --force"
        )
    return data


def decode_floats(data: dict[str, Any]) -> Any:
    """`object_hook` for `json.loads` that undoes the encoding of Infinity and NaN."""
    return float(data["__float__"]) if data.keys() == {"__float__"} else data


def require_tokenizer(folder: Path) -> None:
    """UserError for a prepared folder without any file of a tokenizer."""
    patterns = [one for one in COMPANIONS if one not in _OF_NO_TOKENIZER]
    if not any(any(folder.glob(pattern)) for pattern in patterns):
        raise UserError(f"{folder} holds no tokenizer: copy the model's tokenizer files there")


def _what_else(path: Path, where: str) -> str:
    """What there is in a folder's place, and what to do."""
    if path.exists():
        return f"a file; check {where}"
    if is_hub_name(path):
        return (
            "nothing; a model of the hub is prepared first: python3 weights_preprocessor.py "
            f"--input-path {path} --output-path FOLDER --hf"
        )
    return f"nothing; check {where}"


def is_hub_name(path: Path) -> bool:
    """Whether what is given as a path, and is none here, may be the hub's name of a model."""
    return bool(re.fullmatch(r"[\w.-]*\w/[\w.-]+", str(path))) and not path.parent.exists()


def require_source(folder: Path, hugging_face: bool) -> None:
    """UserError for what is no checkpoint: GGUF, Hugging Face's, or else Mistral's native."""
    if gguf_parts(folder):
        return
    if not folder.is_dir():
        raise UserError(
            f"expected a model folder at {folder}, found {_what_else(folder, '--input-path')}"
        )
    if not any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES):
        for pattern, what in _NO_CHECKPOINTS.items():
            if any(folder.glob(pattern)):
                raise UserError(f"{folder} holds {what}")
    wanted, other = CONFIGS if hugging_face else CONFIGS[::-1]
    if (folder / wanted).exists():
        return
    if not (folder / other).exists():
        raise UserError(
            f"{folder} is no model folder: it has no {wanted} and no {other}; check --input-path"
        )
    form, remedy = ("Mistral's native", "without") if hugging_face else ("Hugging Face", "with")
    raise UserError(
        f"{folder} has {other} and no {wanted}: it is in {form} format; run again {remedy} --hf"
    )
