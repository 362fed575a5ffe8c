"""Templates, tokenizer choice, and text that never breaks inside a character."""

from __future__ import annotations

import json
import os
import random
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from moe_offload.errors import UserError
from moe_offload.model import tokenization
from moe_offload.model.tokenization import (
    CheckpointTokenizer,
    MistralTokenizer,
    StreamingDetokenizer,
    check_tokenizer,
    load_tokenizer,
)

DATA = Path(mistral_common.__file__).parent / "data"
PHI_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture
def mixtral_folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes((DATA / "tokenizer.model.v1").read_bytes())
    return tmp_path


def write_byte_tokenizer(folder: Path, template: str | None) -> None:
    """A tokenizer whose tokens are single bytes: every non-ASCII character spans several."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fast = FastTokenizer(models.BPE(vocabulary, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def test_mixtral_uses_the_v1_instruct_template(mixtral_folder: Path) -> None:
    tokenizer = load_tokenizer(mixtral_folder, "mixtral")
    assert isinstance(tokenizer, MistralTokenizer)
    ids = tokenizer.encode("Hello there", raw=False)
    assert ids[0] == 1  # <s>
    assert tokenizer.decode(ids).strip() == "[INST] Hello there [/INST]"
    assert tokenizer.decode(tokenizer.encode("Hello there", raw=True)).strip() == "Hello there"
    assert tokenizer.eos_ids == {2}


def test_versioned_and_tekken_files_are_mistrals(tmp_path: Path) -> None:
    name = "mistral_instruct_tokenizer_240323.model.v3"
    (tmp_path / "tokenizer.model.v3").write_bytes((DATA / name).read_bytes())
    assert "v3" in load_tokenizer(tmp_path, "mixtral").name
    other = tmp_path / "tekken"
    other.mkdir()
    (other / "tekken.json").write_bytes((DATA / "tekken_240911.json").read_bytes())
    assert isinstance(load_tokenizer(other, "mistral"), MistralTokenizer)


def test_a_fine_tune_keeps_its_own_template(mixtral_folder: Path) -> None:
    write_byte_tokenizer(mixtral_folder, PHI_TEMPLATE)
    tokenizer = load_tokenizer(mixtral_folder, "mixtral")
    assert isinstance(tokenizer, CheckpointTokenizer)
    text = tokenizer.decode(tokenizer.encode("Hi", raw=False))
    assert text == "<|user|>\nHi\n<|assistant|>\n"  # <|end|> is a special token


def test_other_models_use_their_chat_template(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, PHI_TEMPLATE)
    tokenizer = load_tokenizer(tmp_path, "phimoe")
    ids = tokenizer.encode("Hi", raw=False)
    assert tokenizer.decode(ids).startswith("<|user|>\nHi")
    assert tokenizer.decode(ids).endswith("<|assistant|>\n")
    assert tokenizer.decode(tokenizer.encode("Hi", raw=True)) == "Hi"


def test_without_a_template_the_text_is_the_prompt(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, None)
    tokenizer = load_tokenizer(tmp_path, "olmoe")
    assert tokenizer.encode("Hi", raw=False) == tokenizer.encode("Hi", raw=True)


def test_no_tokenizer_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmoe"}))
    with pytest.raises(UserError, match="copy the model's tokenizer files"):
        load_tokenizer(tmp_path, "olmoe")


EVIL = """open({marker!r}, "w").write("ran")
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
class EvilConfig(PreTrainedConfig):
    model_type = "evil"
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


def edit_json(path: Path, **changes: Any) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | changes))


@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("has_own", [False, True])
def test_code_of_the_folder_never_runs_and_nobody_is_asked(
    in_config: bool, has_own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where a yes waits on standard input; a tokenizer.json beside it serves all the
    same."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder, marker = tmp_path / "model", tmp_path / "marker"
    folder.mkdir()
    if has_own:
        write_byte_tokenizer(folder, PHI_TEMPLATE)
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]},
    )
    if in_config:
        edit_json(
            folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"}
        )
    if has_own:
        tokenizer = load_tokenizer(folder, "evil")
        assert tokenizer.decode(tokenizer.encode("Hi", raw=True)) == "Hi"
    else:
        with pytest.raises(UserError, match="code of its own") as refused:
            load_tokenizer(folder, "evil")
        assert "copy a tokenizer.json there" in str(refused.value)
    assert not marker.exists()


def write_own_twin(folder: Path, template: str) -> None:
    """What the hub has beside `tokenizer.model`: the same tokens as transformers keeps them."""
    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


INSTRUCT = "{{ bos_token }} [INST] {{ messages[0]['content'] }} [/INST]"


def test_the_hubs_own_form_of_mistrals_tokens_asks_as_mistral_does(mixtral_folder: Path) -> None:
    """Spaces aside: what is special to the one is plain text to the other."""
    mistrals = load_tokenizer(mixtral_folder, "mixtral")
    write_own_twin(mixtral_folder, INSTRUCT)
    own = load_tokenizer(mixtral_folder, "mixtral")
    assert isinstance(mistrals, MistralTokenizer) and isinstance(own, CheckpointTokenizer)
    asked = [one.encode("What is it?", raw=False) for one in (mistrals, own)]
    blank = own.encode(" ", raw=True)[-1]
    first, second = ([token for token in ids if token != blank] for ids in asked)
    assert first == second
    (mixtral_folder / "tokenizer.json").unlink()  # a slow tokenizer's template counts as well
    assert isinstance(load_tokenizer(mixtral_folder, "mixtral"), CheckpointTokenizer)


def test_the_newest_of_mistrals_files_is_used(tmp_path: Path) -> None:
    for number in (3, 11):
        name = "mistral_instruct_tokenizer_240323.model.v3"
        (tmp_path / f"tokenizer.model.v{number}").write_bytes((DATA / name).read_bytes())
    assert "tokenizer.model.v11" in load_tokenizer(tmp_path, "mixtral").name


@pytest.mark.parametrize("template", [PHI_TEMPLATE, None, "[INST] {{ messages[0]['content'] }}"])
@pytest.mark.parametrize("leftover", ["tekken.json", "tokenizer.model", "tokenizer.model.v3"])
def test_a_leftover_file_of_mistrals_does_not_beat_the_checkpoints_own(
    leftover: str, template: str | None, tmp_path: Path
) -> None:
    source = {
        "tekken.json": "tekken_240911.json",
        "tokenizer.model": "tokenizer.model.v1",
        "tokenizer.model.v3": "mistral_instruct_tokenizer_240323.model.v3",
    }[leftover]
    (tmp_path / leftover).write_bytes((DATA / source).read_bytes())
    write_byte_tokenizer(tmp_path, template)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    tokenizer = load_tokenizer(tmp_path, "mixtral")
    assert isinstance(tokenizer, CheckpointTokenizer)
    assert len(tokenizer.backend.get_vocab()) == 257  # the bytes and <|end|>
    assert tokenizer.decode(tokenizer.encode("Hi", raw=True)) == "Hi"


def test_tokens_that_a_fine_tune_added_are_its_own(mixtral_folder: Path) -> None:
    added = {"<|im_end|>": 32000, "<|im_start|>": 32001}
    (mixtral_folder / "added_tokens.json").write_text(json.dumps(added))
    entries = {
        str(number): {"content": text, "special": False, "normalized": False}
        | dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
        for text, number in added.items()
    }
    edit_json(
        mixtral_folder / "tokenizer_config.json",
        tokenizer_class="LlamaTokenizer",
        added_tokens_decoder=entries,
    )
    tokenizer = load_tokenizer(mixtral_folder, "mixtral")
    assert tokenizer.decode([32001]) == "<|im_start|>"
    assert 32001 in tokenizer.encode("<|im_start|>user", raw=True)


def test_ids_beyond_mistrals_vocabulary_have_no_text(mixtral_folder: Path) -> None:
    tokenizer = load_tokenizer(mixtral_folder, "mixtral")
    ids = tokenizer.encode("Hello there", raw=True)
    assert tokenizer.decode([*ids, 32001, 32767]) == tokenizer.decode(ids)


def test_a_processors_template_is_used(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, None)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": PHI_TEMPLATE}))
    tokenizer = load_tokenizer(tmp_path, "olmoe")
    assert tokenizer.decode(tokenizer.encode("Hi", raw=False)).startswith("<|user|>\nHi")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 9000000000 }}",
        "{{ 'x' * 9000000 }}",
    ],
)
def test_a_template_without_end_or_measure_is_a_sentence(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "_TEMPLATE_S", 0.3)
    write_byte_tokenizer(tmp_path, template)
    tokenizer = load_tokenizer(tmp_path, "olmoe")
    limit = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError, match="mend it there, or use --raw-prompt"):
        tokenizer.encode("Hi", raw=False)
    assert resource.getrlimit(resource.RLIMIT_AS) == limit


def test_what_ends_in_time_is_left_alone() -> None:
    with tokenization.bounded(0.05, 1 << 30):
        pass
    time.sleep(0.1)  # no exception comes late


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("content", [b"", b"junk", POINTER, bytes(range(256)) * 8])
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.model.v3", "tekken.json"])
def test_a_damaged_file_of_mistrals_is_a_sentence(
    name: str, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    for refuse in (load_tokenizer, check_tokenizer):
        with pytest.raises(UserError, match="download it again") as refused:
            refuse(tmp_path, "mixtral")
        assert f"{tmp_path / name}" in str(refused.value)
        assert len(str(refused.value)) < len(str(tmp_path)) + 250, "a library's essay is cut short"


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_without_measure_is_a_sentence(name: str, tmp_path: Path) -> None:
    """The libraries would take all memory for it, or wait for a pipe's writer."""
    write_byte_tokenizer(tmp_path, PHI_TEMPLATE)
    os.truncate(tmp_path / name, 9 << 30)  # a hole, which takes no room
    with pytest.raises(UserError, match=f"expected at most 256 MiB in .*{name}, found 9216 MiB"):
        load_tokenizer(tmp_path, "olmoe")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"expected a file at .*{name}"):
        load_tokenizer(tmp_path, "olmoe")


@pytest.mark.parametrize("text", ["[]", '{"chat_template": "x', "[" * 100_000, ""])
@pytest.mark.parametrize("model_type", ["mixtral", "olmoe"])
def test_a_damaged_tokenizer_config_is_a_sentence(
    text: str, model_type: str, mixtral_folder: Path
) -> None:
    write_byte_tokenizer(mixtral_folder, None)
    (mixtral_folder / "tokenizer_config.json").write_text(text)
    for refuse in (load_tokenizer, check_tokenizer):
        with pytest.raises(UserError, match=r"download it again|copy the model's tokenizer"):
            refuse(mixtral_folder, model_type)


def test_a_template_that_takes_parts_alone_gets_them(tmp_path: Path) -> None:
    template = "{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}!"
    write_byte_tokenizer(tmp_path, template)
    tokenizer = load_tokenizer(tmp_path, "olmoe")
    assert tokenizer.decode(tokenizer.encode("Hi", raw=False)) == "Hi!"


def test_a_template_may_write_the_message_as_json(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, "{{ messages | tojson }}")
    tokenizer = load_tokenizer(tmp_path, "olmoe")
    text = tokenizer.decode(tokenizer.encode('é\n"', raw=False))
    assert json.loads(text) == [{"role": "user", "content": 'é\n"'}]


@pytest.mark.parametrize(
    "template",
    ["{% for", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{% if tools %}x{% endif %}Hello"],
)
def test_a_template_that_fails_is_a_sentence(template: str, tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, template)
    check_tokenizer(tmp_path, "olmoe")
    tokenizer = load_tokenizer(tmp_path, "olmoe")
    with pytest.raises(UserError, match="mend it there, or use --raw-prompt"):
        tokenizer.encode("Hi", raw=False)
    assert tokenizer.decode(tokenizer.encode("Hi", raw=True)) == "Hi"


TEXTS = [
    "plain words, with  two spaces\n and a line",
    "naïve café — “quotes” … ½ µs",
    "専門家の混合 мозг 🙂🙃 👩‍👩‍👧‍👦 ok",
    "🙂",
]


def stream(tokenizer: object, ids: Sequence[int]) -> list[str]:
    detokenizer = StreamingDetokenizer(tokenizer)  # type: ignore[arg-type]
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_are_whole_characters(
    text: str, tmp_path: Path, mixtral_folder: Path
) -> None:
    bytewise = tmp_path / "bytes"
    bytewise.mkdir()
    write_byte_tokenizer(bytewise, None)
    for tokenizer in (load_tokenizer(bytewise, "olmoe"), load_tokenizer(mixtral_folder, "mixtral")):
        ids = tokenizer.encode(text, raw=True)
        pieces = stream(tokenizer, ids)
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) == tokenizer.decode(ids)


def test_streaming_equals_decoding_for_any_ids(mixtral_folder: Path) -> None:
    tokenizer = load_tokenizer(mixtral_folder, "mixtral")
    generator = random.Random(0)
    for _ in range(50):
        ids = [generator.randrange(300, 32000) for _ in range(20)]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)
