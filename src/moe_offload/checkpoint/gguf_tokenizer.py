"""The tokenizer and chat template of a GGUF file, as the files that a Hugging Face folder has.

A file has the vocabulary, the merges or scores, and the special tokens. By what rule text is split
before it is merged stands in it as a name alone; `_SPLITS` says what the names mean. transformers
takes GPT-2's rule for names that it does not know and leaves out special tokens such as DeepSeek's
<\uff5cend\u2581of\u2581sentence\uff5c>, whose characters no ordinary token has.
"""

from __future__ import annotations

import json
from typing import Any, Final

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from moe_offload.checkpoint.gguf_file import GgufFile
from moe_offload.errors import UserError
from moe_offload.files import read_json_object

_PREFIX: Final = "tokenizer.ggml."
# Of tokenizer.ggml.token_type; the others are ordinary ones, bytes, or unused.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE: Final = "\u2581"  # SentencePiece's
_SPECIAL: Final = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_LONGEST_PIECE: Final = 256  # of SentencePiece's; Llama's longest has 48 characters

_WORDS: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2: Final = (_WORDS,)
_DIGITS_APART: Final = (r"\p{N}", _WORDS)
_ENDINGS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_QWEN2: Final = (rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_MARKS}|{_BLANKS}",)
_LLAMA3: Final = (rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_MARKS}|{_BLANKS}",)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORDS: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
)
_MARKS_AND_SLASHES: Final = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_GPT4O: Final = (
    _CASED_WORDS % (f"{_ENDINGS}?", f"{_ENDINGS}?")
    + rf"|\p{{N}}{{1,3}}|{_MARKS_AND_SLASHES}|{_BLANKS}",
)
_TEKKEN: Final = (_CASED_WORDS % ("", "") + rf"|\p{{N}}|{_MARKS_AND_SLASHES}|{_BLANKS}",)
_IDEOGRAPHS: Final = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# The cased letters but the mathematical ones.
_DEEPSEEK_LLM: Final = (
    r"[\r\n]",
    "\\s?[[\\p{Lu}\\p{Ll}\\p{Lt}]&&[^\U0001d400-\U0001d7ff]]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _IDEOGRAPHS,
    r"\p{N}+",
)
_DEEPSEEK_CODER: Final = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS, r"\p{N}")
_DEEPSEEK_V3: Final = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}",
)
_SPLITS: Final[dict[str, tuple[str, ...]]] = (
    dict.fromkeys(("gpt-2", "gpt2", "olmo", "mpt", "granite-docling"), _GPT2)
    | dict.fromkeys(("smollm", "refact", "starcoder", "command-r", "codeshell"), _DIGITS_APART)
    | dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2)
    | dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), _LLAMA3)
    | dict.fromkeys(("glm4", "chatglm-bpe"), _LLAMA3)
    | dict.fromkeys(("gpt-4o", "llama4", "minimax-m2"), _GPT4O)
    | {"tekken": _TEKKEN, "deepseek-llm": _DEEPSEEK_LLM}
    | {"deepseek-coder": _DEEPSEEK_CODER, "deepseek-v3": _DEEPSEEK_V3}
)
# Where a word that is a token is not merged from parts.
_WHOLE_WORDS_FIRST: Final = ("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "tekken")


def tokenizer_files(file: GgufFile) -> dict[str, bytes]:
    """`tokenizer.json`, `tokenizer_config.json` and `generation_config.json` by their names.

    Where the file's splitting rule is not known here, a `tokenizer.json` beside it is taken.
    UserError when there is none, or for a vocabulary that is damaged.
    """
    said = _Vocabulary(file)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **said.special,
    }
    template = file.fields.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        config["chat_template"] = template
    files = {
        "tokenizer.json": said.tokenizer_json(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    stops = {said.ids[name] for name in ("eos", "eot") if name in said.ids}
    if stops:
        files["generation_config.json"] = json.dumps({"eos_token_id": sorted(stops)}).encode()
    return files


class _Vocabulary:
    """What a file says of its tokens, checked."""

    def __init__(self, file: GgufFile) -> None:
        self.path, self._fields = file.paths[0], file.fields
        self.kind = file.fields.get(f"{_PREFIX}model")
        self.split = str(file.fields.get(f"{_PREFIX}pre", "default"))
        self.tokens = self._array("tokens", str) or []
        if not self.tokens:
            raise UserError(
                f"expected a vocabulary in {self.path}, found no field {_PREFIX}tokens: download "
                "the file again, or use the model's Hugging Face version"
            )
        self.kinds = self._array("token_type", int) or [1] * len(self.tokens)
        self.scores = self._array("scores", float) or [0.0] * len(self.tokens)
        self.merges = self._array("merges", str)
        for name, entries in (("token_type", self.kinds), ("scores", self.scores)):
            if len(entries) != len(self.tokens):
                raise self._damaged(f"{len(self.tokens)} tokens and {len(entries)} of {name}")
        self.ids = self._special_ids()
        self.special = {
            f"{name}_token": self.tokens[self.ids[key]]
            for name, key in _SPECIAL.items()
            if key in self.ids
        }

    def _damaged(self, found: str) -> UserError:
        return UserError(
            f"the vocabulary of {self.path} is damaged (it has {found}): download the file again, "
            "or use the model's Hugging Face version"
        )

    def _array(self, name: str, kind: type) -> list[Any] | None:
        found = self._fields.get(f"{_PREFIX}{name}")
        if found is None:
            return None
        if not isinstance(found, list) or not all(type(entry) is kind for entry in found):
            raise self._damaged(f"a field {_PREFIX}{name} of another type")
        return found

    def _special_ids(self) -> dict[str, int]:
        ids = {}
        for name in ("bos", "eos", "eot", "unknown", "padding"):
            found = self._fields.get(f"{_PREFIX}{name}_token_id")
            if type(found) is int and 0 <= found < len(self.tokens):
                ids[name] = found
        return ids

    def tokenizer_json(self) -> bytes:
        if self.kind == "gpt2" and self.split not in _SPLITS:
            return self._beside(f"splits text by the rule {self.split!r:.40}")
        if self.kind not in ("gpt2", "llama"):
            return self._beside(f"has a tokenizer of the kind {self.kind!r:.40}")
        try:
            tokenizer = self._byte_level() if self.kind == "gpt2" else self._sentencepiece()
            self._add_special(tokenizer)
            return tokenizer.to_str().encode()
        except Exception as error:  # what the tokenizers library raises has no kind of its own
            raise self._damaged(f"{error}"[:100]) from error

    def _beside(self, what: str) -> bytes:
        path = self.path.with_name("tokenizer.json")
        if not path.is_file():
            raise UserError(
                f"{self.path} {what}, which is not known here: put the tokenizer.json of the "
                "model's Hugging Face version beside it"
            )
        read_json_object(path)
        return path.read_bytes()

    @property
    def _by_token(self) -> dict[str, int]:
        return {token: position for position, token in enumerate(self.tokens)}

    def _byte_level(self) -> Tokenizer:
        """GPT-2's kind: bytes are characters, merges stand in the file."""
        pairs = [(left, right) for left, _, right in (m.partition(" ") for m in self.merges or [])]
        rules = _SPLITS[self.split]
        model = models.BPE(self._by_token, pairs, ignore_merges=self.split in _WHOLE_WORDS_FIRST)
        tokenizer = Tokenizer(model)
        if rules is _QWEN2:
            tokenizer.normalizer = normalizers.NFC()
        splits: list[Any] = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in rules]
        splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _sentencepiece(self) -> Tokenizer:
        """SentencePiece's BPE: the better score is merged first, unknown bytes are tokens."""
        by_token = self._by_token
        model = models.BPE(
            by_token,
            self._merges_of_scores(by_token),
            unk_token=self.special.get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        )
        tokenizer = Tokenizer(model)
        spaces: list[Any] = [normalizers.Replace(" ", _SPACE)]
        texts: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if self._fields.get(f"{_PREFIX}add_space_prefix", True):
            spaces.insert(0, normalizers.Prepend(_SPACE))
            texts.append(decoders.Strip(" ", 1, 0))
        tokenizer.normalizer = normalizers.Sequence(spaces)
        tokenizer.decoder = decoders.Sequence(texts)
        return tokenizer

    def _merges_of_scores(self, by_token: dict[str, int]) -> list[tuple[str, str]]:
        """Each way to make a token of two others, that with the best score first."""
        found = []
        for position, token in enumerate(self.tokens):
            for cut in range(1, len(token) if len(token) <= _LONGEST_PIECE else 0):
                left, right = by_token.get(token[:cut]), by_token.get(token[cut:])
                if left is not None and right is not None:
                    found.append((-self.scores[position], position, left, right))
        return [(self.tokens[left], self.tokens[right]) for _, _, left, right in sorted(found)]

    def _add_special(self, tokenizer: Tokenizer) -> None:
        kinds = list(zip(self.tokens, self.kinds, strict=True))
        special = [
            AddedToken(token, special=True, normalized=False)
            for token, kind in kinds
            if kind == _CONTROL or (kind == _UNKNOWN and token == self.special.get("unk_token"))
        ]
        tokenizer.add_special_tokens(special)
        tokenizer.add_tokens(
            [AddedToken(token, normalized=False) for token, kind in kinds if kind == _USER_DEFINED]
        )
        before = self.kind == "llama" or self.split in _WHOLE_WORDS_FIRST
        before = bool(self._fields.get(f"{_PREFIX}add_bos_token", before)) and "bos" in self.ids
        after = bool(self._fields.get(f"{_PREFIX}add_eos_token", False)) and "eos" in self.ids
        ends = [self.special["bos_token"]] * before, [self.special["eos_token"]] * after
        if before or after:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[*ends[0], "$A", *ends[1]],
                special_tokens=[
                    (token, self.ids[name])
                    for name, tokens in zip(("bos", "eos"), ends, strict=True)
                    for token in tokens
                ],
            )
