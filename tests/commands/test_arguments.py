"""The command line is made from the fields of the configuration."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints
from unittest.mock import Mock

import pytest
from transformers import MixtralConfig

from moe_offload.checkpoint.folders import FORMAT_VERSION, MANIFEST_NAME
from moe_offload.commands import check, draw, generate, prepare, simulate
from moe_offload.commands.arguments import build_parser, parse_config, parse_cpu_list
from moe_offload.config import Config, flag_of
from moe_offload.errors import UserError

RUN = ["--model-path", "m", "--prompt", "x", "--max-tokens", "4"]


def test_every_field_has_one_flag() -> None:
    kinds = get_type_hints(Config).values()
    found = [flag_of(one) for kind in kinds for one in fields(kind)]
    flags = Counter(flag.name for flag in found if flag.help)
    assert set(flags.values()) == {1}
    # The cache's seed is the one of the sampling.
    assert len(found) == len(flags) + 1
    parsed = {string for action in build_parser()._actions for string in action.option_strings}
    others = {"-h", "--help", "--show-calibration", "--version"}
    assert parsed == flags.keys() | others


@pytest.mark.parametrize(
    "main",
    [check.main, draw.patterns, draw.plots, generate.main, prepare.main, simulate.main],
)
def test_every_command_ends_with_one_sentence_and_shows_more_to_a_debugger(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in (["--no-such-flag"], ["--no-such-flag", "--debug"]):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.splitlines()[-1].startswith("error: ")
        assert (len(err.splitlines()) > 1) == ("Traceback" in err) == ("--debug" in argv)


def test_nobody_to_read_a_verdict_does_not_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `check.py ... | head -0`: exit code 0 would say that the answers are right."""

    def nobody(_: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(check, "show", nobody)
    monkeypatch.setattr(
        "moe_offload.engine.loading.load_engine", lambda *_: nullcontext(Mock(notes=[]))
    )
    source = Mock(config=MixtralConfig())
    monkeypatch.setattr("moe_offload.engine.loading.open_prepared", lambda _: source)
    tokenizer = Mock(encode=lambda text, raw: [1, 2, 3])
    monkeypatch.setattr("moe_offload.model.tokenization.load_tokenizer", lambda *_: tokenizer)
    verdict = Mock(is_right=False, lines=lambda: ["verdict: wrong"])
    monkeypatch.setattr("moe_offload.engine.check.check_engine", lambda *_: verdict)
    (tmp_path / MANIFEST_NAME).write_text(f'{{"format_version": {FORMAT_VERSION}}}')
    (tmp_path / "tokenizer.json").touch()
    arguments = ["--model-path", str(tmp_path), "--source", str(tmp_path)]
    assert check.main(arguments) == check.EXIT_WRONG


def test_what_is_not_given_has_its_default() -> None:
    config = parse_config(build_parser().parse_args(RUN))
    for part in fields(config):
        options = getattr(config, part.name)
        given = {"model_path", "prompt", "max_tokens"}
        for one in fields(options):
            assert (getattr(options, one.name) == one.default) == (one.name not in given)


def test_every_kind_of_flag_is_read() -> None:
    config = parse_config(
        build_parser().parse_args(
            [
                *(*RUN, "--cache-replace-policy", "lfru", "--seed", "7", "--temperature", "0.5"),
                *("--cpu-affinity", "0-2,5", "--no-record", "--verify", "--stop", "a"),
                *("--stop", "b", "--responses-jsonl", "r", "--device", "cpu"),
            ]
        )
    )
    assert config.model.model_path == Path("m")
    assert (config.model.device, config.model.verify) == ("cpu", True)
    assert config.model.cpu_affinity == (0, 1, 2, 5)
    assert (config.cache.policy, config.cache.seed, config.generation.seed) == ("LFRU", 7, 7)
    assert (config.generation.temperature, config.generation.stop) == (0.5, ("a", "b"))
    assert (config.output.record, config.output.responses_jsonl) == (False, Path("r"))


@pytest.mark.parametrize("text", ["", "a", "3-1", "0-99999999999", "-1", "1,,2"])
def test_what_is_no_list_of_cpus(text: str) -> None:
    with pytest.raises(UserError, match="such as 0-7,16"):
        parse_cpu_list(text)


@pytest.mark.parametrize("flag", ["--prompt", "--stop", "--system"])
def test_a_text_is_utf_8_in_any_locale(flag: str) -> None:
    field = flag.removeprefix("--")
    in_ascii = "\u00e7a va".encode().decode("ascii", "surrogateescape")
    assert getattr(build_parser().parse_args([flag, in_ascii]), field) in (
        "\u00e7a va",
        ["\u00e7a va"],
    )
    with pytest.raises(UserError, match=f"{flag}: expected UTF-8 text, found other bytes"):
        build_parser().parse_args([flag, b"caf\xe9".decode("ascii", "surrogateescape")])


@pytest.mark.parametrize("program", ["main.py", "moe-run"])
def test_help_calls_the_program_as_it_was_started(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [f"/somewhere/bin/{program}"])
    text = build_parser().format_help()
    assert text.startswith(f"usage: {program} ")
    installed = program == "moe-run"
    assert ("  moe-run --model-path M --prompt" in text) == installed
    assert ("python3 src/main.py --model-path M" in text) == (not installed)
    assert ("moe-prepare has prepared" in text) == installed
