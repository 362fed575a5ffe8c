"""Prompts to token ids and back, through mistral-common or the checkpoint's own tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

from moe_offload.errors import UserError
from moe_offload.files import read_json_object

_LFS_POINTER = b"version https://git-lfs"
_SENTENCEPIECE_VERSIONED = re.compile(r"tokenizer\.model\.v\d+(m\d+)?$")


Message = Mapping[str, str]  # of a chat: its role (system, user, assistant) and its content


class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    name: str
    eos_ids: frozenset[int]

    def encode(self, prompt: str | Sequence[Message], raw: bool) -> list[int]:
        """Token ids of a prompt, inside the model's chat template unless `raw`, or of a chat.

        UserError for a chat that the template does not take.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        ...


class MistralTokenizer:
    """mistral-common's tokenizer for one of Mistral's own tokenizer files."""

    def __init__(self, path: Path) -> None:
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer as Backend

        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # sentencepiece, tiktoken and pydantic raise their own kinds
            raise UserError(
                f"{path} is no tokenizer that mistral-common can read ({_said(error)}): download "
                "it again, without git-lfs it is a pointer to the file"
            ) from error
        self._tokenizer = self._backend.instruct_tokenizer.tokenizer
        version = self._tokenizer.version.value
        self.name = f"mistral-common {version} ({path.name})"
        self.eos_ids = frozenset({self._tokenizer.eos_id})

    @property
    def vocabulary_size(self) -> int:
        return int(self._tokenizer.n_words)

    def encode(self, prompt: str | Sequence[Message], raw: bool) -> list[int]:
        if raw and isinstance(prompt, str):
            return list(self._tokenizer.encode(prompt, bos=True, eos=False))
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        try:
            messages: Any = _messages(prompt)  # as pydantic takes them
            request = ChatCompletionRequest(messages=messages)
            return list(self._backend.encode_chat_completion(request).tokens)
        except Exception as error:  # of its own kinds and pydantic's
            raise UserError(f"is a chat that mistral-common refuses ({_said(error)})") from error

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids)))


class CheckpointTokenizer:
    """The checkpoint's own tokenizer and chat template, through transformers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._backend: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # of as many kinds as there are ways for its files to be wrong
            raise UserError(
                f"{folder} holds no tokenizer that transformers can read ({_said(error)}): copy "
                "the model's tokenizer files there"
            ) from error
        if len(self._backend.get_vocab()) <= len(self._backend.all_special_tokens):
            raise UserError(
                f"{folder} holds no tokenizer (transformers made an empty one): copy the model's "
                "tokenizer files there"
            )
        self._folder = folder
        self.name = f"{type(self._backend).__name__} ({folder.name})"
        eos = self._backend.eos_token_id
        self.eos_ids = frozenset() if eos is None else frozenset({int(eos)})

    def encode(self, prompt: str | Sequence[Message], raw: bool) -> list[int]:
        if isinstance(prompt, str) and (raw or not self._backend.chat_template):
            return list(self._backend(prompt)["input_ids"])
        if not self._backend.chat_template:
            raise UserError("is a chat, but the model's tokenizer has no chat template")
        try:
            encoded = self._backend.apply_chat_template(
                _messages(prompt), add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except Exception as error:  # a template is a program
            raise UserError(
                f"makes the chat template of {self._folder} fail ({_said(error)}): mend it there, "
                "or use --raw-prompt"
            ) from error
        return list(encoded["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(
            self._backend.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def _messages(prompt: str | Sequence[Message]) -> list[dict[str, str]]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(message) for message in prompt]


def load_tokenizer(folder: Path, model_type: str) -> Tokenizer:
    """The tokenizer of the model in `folder`.

    mistral-common serves Mistral's own files: `tekken.json`, `tokenizer.model.vN`, and the plain
    `tokenizer.model` (v1) of a Mixtral 8x7B whose chat template, where one is shipped, is
    Mistral's too: a fine-tune with another template keeps its own. Raises UserError when the
    folder holds no usable tokenizer.
    """
    path = _mistral_file(folder, model_type)
    return CheckpointTokenizer(folder) if path is None else MistralTokenizer(path)


def check_tokenizer(folder: Path, model_type: str) -> None:
    """UserError for a damaged tokenizer file; a folder without any is a Python program's matter.

    Mistral's are read; of others only what needs no library is looked at.
    """
    for path in sorted(folder.glob("tokenizer*")):
        if path.is_file():
            with path.open("rb") as file:
                if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                    raise UserError(
                        f"{path} is a git-lfs pointer, not the file itself: run git lfs pull "
                        "there, or download it again"
                    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            read_json_object(folder / name)
    mistrals = _mistral_file(folder, model_type)
    if mistrals is not None:
        MistralTokenizer(mistrals)


def _said(error: Exception) -> str:
    return shorten(str(error), 100, placeholder=" ...") or type(error).__name__


def _mistral_file(folder: Path, model_type: str) -> Path | None:
    versioned = sorted(p for p in folder.iterdir() if _SENTENCEPIECE_VERSIONED.search(p.name))
    if (folder / "tekken.json").is_file():
        return folder / "tekken.json"
    plain = folder / "tokenizer.model"
    if model_type not in ("mixtral", "mistral") or not _has_mistral_template(folder):
        return None
    if versioned:
        return versioned[-1]
    return plain if plain.is_file() else None


def _has_mistral_template(folder: Path) -> bool:
    template = None
    config_path = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    elif config_path.is_file():
        template = read_json_object(config_path).get("chat_template")
    return template is None or "[INST]" in str(template)


class StreamingDetokenizer:
    """Turns one token after another into text, never cutting a character in two.

    A token may hold part of a multi-byte character, and its text may depend on its neighbour's
    (SentencePiece drops a leading space). So each new piece is the difference between decoding
    a short window with and without the new tokens, held back while it ends in an incomplete
    character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._window_start = 0
        self._printed_end = 0

    def push(self, token: int) -> str:
        """The text that became certain with `token`, possibly empty."""
        self._ids.append(token)
        piece = self._pending()
        if piece.endswith("\ufffd"):
            return ""
        return self._commit(piece)

    def finish(self) -> str:
        """Whatever was held back, incomplete characters included."""
        return self._commit(self._pending())

    def _pending(self) -> str:
        known = self._tokenizer.decode(self._ids[self._window_start : self._printed_end])
        return self._tokenizer.decode(self._ids[self._window_start :])[len(known) :]

    def _commit(self, piece: str) -> str:
        if piece:
            self._window_start = self._printed_end
            self._printed_end = len(self._ids)
        return piece
