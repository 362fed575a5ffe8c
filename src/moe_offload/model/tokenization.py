"""Prompts to token ids and back, through mistral-common or the checkpoint's own tokenizer."""

from __future__ import annotations

import ctypes
import json
import re
import resource
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

import psutil

from moe_offload.checkpoint.folders import COMPANIONS
from moe_offload.errors import UserError
from moe_offload.files import LARGEST_JSON_BYTES, read_json_object, require_regular

# A chat template of the hub renders in milliseconds; the largest, with tools, in some 100 kB.
_TEMPLATE_S = 10.0
_TEMPLATE_BYTES = 1 << 30
_TEMPLATE_CHARACTERS = 1 << 20
_OWN_FILES = ("tokenizer.json", "added_tokens.json")
_SENTENCEPIECE_VERSIONED = re.compile(r"tokenizer\.model\.v(\d+)(m\d+)?")

Message = Mapping[str, str]  # of a chat: its role (system, user, assistant) and its content


class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    name: str
    eos_ids: frozenset[int]

    def encode(self, prompt: str | Sequence[Message], raw: bool) -> list[int]:
        """Token ids of a prompt, inside the model's chat template unless `raw`, or of a chat.

        UserError for a chat that the template does not take.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""


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

    def encode(self, prompt: str | Sequence[Message], raw: bool) -> list[int]:
        if raw and isinstance(prompt, str):
            return list(self._tokenizer.encode(prompt, bos=True, eos=False))
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        try:
            messages: Any = _messages(prompt)  # as pydantic takes them
            request = ChatCompletionRequest(messages=messages)
            return list(self._backend.encode_chat_completion(request).tokens)
        except Exception as error:  # of its own kinds and pydantic's
            raise UserError(f"mistral-common refuses these messages ({_said(error)})") from error

    def decode(self, ids: Sequence[int]) -> str:
        known = [token for token in ids if token < self._tokenizer.n_words]  # rows may be padded
        return str(self._tokenizer.decode(known))


class CheckpointTokenizer:
    """The checkpoint's own tokenizer and chat template, through transformers.

    The template is a program of the checkpoint's; it runs in a sandbox, for so long and with so
    much memory. Python files of the checkpoint never run.
    """

    def __init__(self, folder: Path) -> None:
        self.backend: Any = _own_backend(folder)  # transformers' tokenizer, with its template
        if len(self.backend.get_vocab()) <= len(self.backend.all_special_tokens):
            raise UserError(
                f"{folder} holds no tokenizer (transformers made an empty one): copy the model's "
                "tokenizer files there"
            )
        self.backend.chat_template = self.backend.chat_template or _template(folder)
        self._folder = folder
        self.name = f"{type(self.backend).__name__} ({folder.name})"
        eos = self.backend.eos_token_id
        self.eos_ids = frozenset() if eos is None else frozenset({int(eos)})

    def encode(self, prompt: str | Sequence[Message], raw: bool) -> list[int]:
        if isinstance(prompt, str) and (raw or not self.backend.chat_template):
            return list(self.backend(prompt)["input_ids"])
        if not self.backend.chat_template:
            raise UserError(
                f"messages need a chat template, and the tokenizer of {self._folder} has none"
            )
        try:
            text = self._render(_messages(prompt))
        except Exception as error:  # a template is a program
            raise UserError(
                f"the chat template of {self._folder} fails ({_said(error)}): mend it there, or "
                "use --raw-prompt"
            ) from error
        return list(self.backend(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: list[dict[str, str]]) -> str:
        """`messages` in the template; ValueError where their text does not show in what it makes.

        Templates of models that see may take a message's content as a list of parts alone.
        """
        in_parts = [
            one | {"content": [{"type": "text", "text": one["content"]}]} for one in messages
        ]
        last = messages[-1]
        said = last["content"].strip() if last["role"] == "user" else ""
        as_json = json.dumps(said, ensure_ascii=False)[1:-1]
        for form in (messages, in_parts):
            with bounded(_TEMPLATE_S, _TEMPLATE_BYTES):
                template = self.backend.apply_chat_template
                text = str(template(form, add_generation_prompt=True, tokenize=False))
            n_given = sum(len(one["content"]) for one in messages)
            if len(text) > n_given + _TEMPLATE_CHARACTERS:
                raise ValueError(f"it makes {len(text)} characters of {n_given}")
            if said in text or as_json in text:
                return text
        raise ValueError("it leaves out the user's message")

    def decode(self, ids: Sequence[int]) -> str:
        settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self.backend.decode(list(ids), **settings))


def _messages(prompt: str | Sequence[Message]) -> list[dict[str, str]]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(message) for message in prompt]


def _own_backend(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = {"local_files_only": True, "trust_remote_code": False}
    try:
        if all((folder / name).is_file() for name in ("tokenizer.json", "tekken.json")):
            # AutoTokenizer would take Mistral's file for the checkpoint's own
            return PreTrainedTokenizerFast.from_pretrained(folder, **settings)
        with _no_search_for_mistrals(folder):
            return AutoTokenizer.from_pretrained(folder, **settings)
    except Exception as error:  # of as many kinds as there are ways for its files to be wrong
        config_path = folder / "tokenizer_config.json"
        has_code = config_path.is_file() and "auto_map" in read_json_object(config_path)
        if has_code and (folder / "tokenizer.json").is_file():
            with suppress(Exception):  # its code may add to what this file says; mostly it repeats
                return PreTrainedTokenizerFast.from_pretrained(folder, **settings)
        if has_code:
            raise UserError(
                f"the tokenizer of {folder} is Python code of its own (auto_map in "
                "tokenizer_config.json), which is never run here: copy a tokenizer.json there"
            ) from error
        raise UserError(
            f"{folder} holds no tokenizer that transformers can read ({_said(error)}): copy "
            "the model's tokenizer files there"
        ) from error


@contextmanager
def _no_search_for_mistrals(folder: Path) -> Iterator[None]:
    """AutoTokenizer loads mistral-common to look for a file that is not there: 0.2 s."""
    from transformers.models.auto import tokenization_auto

    auto: Any = tokenization_auto
    search = getattr(auto, "_use_mistral_format", None)
    if search is None or (folder / "tekken.json").is_file():
        yield
        return
    auto._use_mistral_format = lambda *_, **__: False
    try:
        yield
    finally:
        auto._use_mistral_format = search


@contextmanager
def bounded(seconds: float, n_bytes: int) -> Iterator[None]:
    """Inside, Python code that runs longer or takes more memory ends with an exception.

    What one call into C does can only be bounded in memory. For the process's other threads the
    memory is bounded as well.
    """
    thread, done = threading.get_ident(), threading.Lock()
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def expire() -> None:
        if done.acquire(blocking=False):  # else it has ended at this moment
            raise_in(ctypes.c_ulong(thread), ctypes.py_object(TimeoutError))

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [one for one in (soft, hard) if one != resource.RLIM_INFINITY]
    limit = min([psutil.Process().memory_info().vms + n_bytes, *limits])
    timer = threading.Timer(seconds, expire)
    try:
        timer.start()
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if done.acquire(blocking=False):
            timer.cancel()
        else:
            timer.join()  # the exception comes here, if it has not come before


def load_tokenizer(folder: Path, model_type: str) -> Tokenizer:
    """The tokenizer of the model in `folder`: the checkpoint's own, or mistral-common.

    UserError when the folder holds no usable tokenizer.
    """
    _require_regular_files(folder)
    mistrals = _mistral_file(folder, model_type)
    return CheckpointTokenizer(folder) if mistrals is None else MistralTokenizer(mistrals)


def check_tokenizer(folder: Path, model_type: str) -> None:
    """UserError for a damaged tokenizer file; a folder without any is a Python program's matter.

    Mistral's are read; of others only what needs no library is looked at.
    """
    _require_regular_files(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            read_json_object(folder / name)
    mistrals = _mistral_file(folder, model_type)
    if mistrals is not None:
        MistralTokenizer(mistrals)


def _require_regular_files(folder: Path) -> None:
    """UserError for a file beside the weights that the libraries could not read whole."""
    for pattern in COMPANIONS:
        for path in folder.glob(pattern):
            if path.exists() and not path.is_dir():
                require_regular(path, LARGEST_JSON_BYTES)


def _said(error: Exception) -> str:
    return shorten(str(error), 100, placeholder=" ...") or type(error).__name__


def _mistral_file(folder: Path, model_type: str) -> Path | None:
    """The file of Mistral's that mistral-common is to read; None where transformers has its own.

    That is `tekken.json`, `tokenizer.model.vN`, or the plain `tokenizer.model` of a Mixtral 8x7B
    without a chat template: a fine-tune's files are its own.
    """
    if any((folder / name).is_file() for name in _OWN_FILES):
        return None
    if (folder / "tekken.json").is_file():
        return folder / "tekken.json"
    if model_type not in ("mixtral", "mistral"):
        return None
    versions = {
        int(match[1]): path
        for path in sorted(folder.iterdir())
        if (match := _SENTENCEPIECE_VERSIONED.fullmatch(path.name))
    }
    if versions:
        return versions[max(versions)]
    plain = folder / "tokenizer.model"
    return plain if plain.is_file() and not _template(folder) else None


def _template(folder: Path) -> str:
    """The checkpoint's own chat template; empty where it has none."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    # the last is a processor's file, which holds the text model's template as well
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (folder / name).is_file():
            template = read_json_object(folder / name).get("chat_template")
            if template:
                return str(template)
    return ""


class StreamingDetokenizer:
    """Turns one token after another into text, never cutting a character in two.

    A token may hold part of a multi-byte character, and its text may depend on its neighbour's
    (SentencePiece drops a leading space). So each new piece is the difference between decoding
    a short window with and without the new tokens, held back while it ends in an incomplete
    character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: list[int] = []  # the tokens of the last piece
        self._new: list[int] = []

    def push(self, token: int) -> str:
        """The text that became certain with `token`, possibly empty."""
        self._new.append(token)
        piece = self.finish()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._known, self._new = self._new, []
        return piece

    def finish(self) -> str:
        """What is held back, incomplete characters included."""
        known = self._tokenizer.decode(self._known)
        return self._tokenizer.decode([*self._known, *self._new])[len(known) :]
