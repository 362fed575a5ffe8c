"""A tiny model that can chat: random weights in fp32, a tokenizer of whole words, a template."""

from __future__ import annotations

from pathlib import Path

from against_transformers import prepared
from tiny_models import build_model, mixtral, write_hub
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

_TEMPLATE = (
    "{% for one in messages %}{{ '[' + one['role'] + '] ' + one['content'] + ' ' }}"
    "{% if one['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
_MARKS = ("?", "[system]", "[user]", "[assistant]", "[tool]")


def write_chat_model(folder: Path, context_tokens: int) -> Path:
    """A prepared folder; no token ends its answers. Its words are `w5` to `w95`."""
    config = mixtral(
        vocab_size=96,
        max_position_embeddings=context_tokens,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    source = write_hub(build_model(config), folder / "source")
    words = (*_MARKS, *(f"w{n}" for n in range(len(_MARKS), config.vocab_size)))
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(source)
    return prepared(source, folder / "tiny-chat", "--hf", "--expert-dtype", "fp32")
