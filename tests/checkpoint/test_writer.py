"""A preparation may die at any write, at any rename; the next run completes it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_models

from moe_offload.checkpoint import safetensors_file
from moe_offload.checkpoint.prepared import read_manifest, verify
from moe_offload.checkpoint.writer import exclusive
from moe_offload.commands import prepare

ROOT = Path(__file__).resolve().parents[2]


class KilledError(BaseException):
    """Stands for SIGKILL: nothing runs after it, so the patched clean-up below does nothing."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = tiny_models.build_model(tiny_models.mixtral())
    return tiny_models.write_hub(model, tmp_path / "source")


@pytest.fixture
def reference(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """The files of an undisturbed preparation."""
    assert run(source, tmp_path / "reference") == 0
    return contents(tmp_path / "reference")


def run(source: Path, output: Path, *flags: str) -> int:
    return prepare.main(["--input-path", str(source), "--output-path", str(output), "--hf", *flags])


def assert_completed(source: Path, output: Path, reference: dict[str, bytes]) -> None:
    """The next run ends with the files of an undisturbed one."""
    assert run(source, output) == 0
    assert contents(output) == reference


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def fail_at(
    monkeypatch: pytest.MonkeyPatch, name: str, position: int, error: BaseException
) -> None:
    """Make the `position`-th call of `os.<name>` from safetensors_file raise `error`."""
    original: Callable[..., object] = getattr(os, name)
    calls = iter(range(position + 1))

    def call(*arguments: object) -> object:
        if next(calls, None) == position:
            raise error
        return original(*arguments)

    monkeypatch.setattr(safetensors_file.os, name, call)


def without_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    remove = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if sys.exc_info()[0] is not KilledError:
            remove(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "posix_fallocate"])
def test_killed_at_every_call_and_resumed(
    call: str,
    source: Path,
    reference: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n_calls = 0
    for position in range(200):
        output = tmp_path / f"{call}-{position}"
        with monkeypatch.context() as patch:
            fail_at(patch, call, position, KilledError())
            without_clean_up(patch)
            try:
                assert run(source, output) == 0
                break
            except KilledError:
                n_calls += 1
        if (output / "manifest.json").exists():  # killed after the last rename: it is whole
            verify(read_manifest(output))
        assert_completed(source, output, reference)
    assert n_calls >= 3
    assert contents(output) == reference


def test_killed_by_the_system_in_the_middle(
    source: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    slow = (
        "import os, sys, time\n"
        "from moe_offload.commands import prepare\n"
        "pwrite = os.pwrite\n"
        "def slowly(*arguments):\n"
        "    time.sleep(0.05)\n"
        "    return pwrite(*arguments)\n"
        "os.pwrite = slowly\n"
        "sys.exit(prepare.main(sys.argv[1:]))\n"
    )
    paths = ["--input-path", str(source), "--output-path", str(output), "--hf"]
    command = [sys.executable, "-c", slow, *paths]
    child = subprocess.Popen(command, cwd=ROOT / "src")
    deadline = time.monotonic() + 60
    record = output / "preparation.json"
    while not (record.exists() and '"experts-00000' in record.read_text()):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (output / "manifest.json").exists()
    finished = (output / "experts-00000.safetensors").stat().st_mtime_ns
    assert_completed(source, output, reference)
    assert (output / "experts-00000.safetensors").stat().st_mtime_ns == finished  # kept, not redone


def test_a_finished_file_that_changed_is_written_again(
    source: Path, reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_at(patch, "posix_fallocate", 2, KilledError())  # dense and one layer are finished
        with pytest.raises(KilledError):
            run(source, output)
    shard = output / "experts-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    assert_completed(source, output, reference)


@pytest.mark.parametrize(
    "recorded", [{"file": "dense.safetensors", "bytes": 1, "tensors": []}, [], [1, 2], 3, "text"]
)
def test_a_record_of_another_version_is_written_again(
    recorded: object,
    source: Path,
    reference: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_at(patch, "posix_fallocate", 2, KilledError())
        with pytest.raises(KilledError):
            run(source, output)
    path = output / "preparation.json"
    record = json.loads(path.read_text())
    assert record["shards"]
    path.write_text(json.dumps({**record, "shards": dict.fromkeys(record["shards"], recorded)}))
    assert_completed(source, output, reference)


def test_interrupted_with_other_settings_starts_over(
    source: Path, reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_at(patch, "posix_fallocate", 2, KilledError())
        with pytest.raises(KilledError):
            run(source, output, "--expert-dtype", "int8")
    assert_completed(source, output, reference)


def test_what_a_killed_run_left_half_written_goes(
    source: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    ours = ["dense.safetensors.partial", "experts-00001.safetensors.partial"]
    ours += [".manifest.json.4711.tmp", ".tokenizer.json.4711.tmp"]
    for name in (*ours, "download.partial", ".hidden"):
        (output / name).touch()
    assert run(source, output) == 0
    assert contents(output) == reference | {"download.partial": b"", ".hidden": b""}


def test_damaged_record_starts_over(
    source: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for text in ("{", "[]", '{"shards": 3}', '{"key": {}, "shards": {"../x": {}}}'):
        (output / "preparation.json").write_text(text)
        assert run(source, output, "--force") == 0
        assert contents(output) == reference


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
@pytest.mark.parametrize("position", [0, 2])
def test_disk_full(
    call: str,
    position: int,
    source: Path,
    reference: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_at(patch, call, position, OSError(errno.ENOSPC, "No space left on device"))
        assert run(source, output) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: the disk of {output} is full") and message.count("\n") == 1
    assert not list(output.glob("*.partial"))
    assert_completed(source, output, reference)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_system_that_cannot_reserve_room(
    code: int,
    source: Path,
    reference: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_at(monkeypatch, "posix_fallocate", 0, OSError(code, "no"))
    assert run(source, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == reference


def test_too_little_room_is_said_before_writing(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    monkeypatch.setattr(
        "moe_offload.checkpoint.writer.shutil.disk_usage",
        lambda _: type("Usage", (), {"free": 40_000}),
    )
    assert run(source, output) == 2
    message = capsys.readouterr().err
    assert "too little room" in message and " MB still to write, 0.04 MB free" in message
    assert not list(output.glob("*.safetensors*"))


def test_control_c(
    source: Path,
    reference: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_at(patch, "pwrite", 20, KeyboardInterrupt())
        assert run(source, output) == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to go on\n"
    assert not list(output.glob("*.partial")) and not (output / "manifest.json").exists()
    assert_completed(source, output, reference)


def test_control_c_while_libraries_load(source: Path, tmp_path: Path) -> None:
    interrupted = (
        "import sys\n"
        "from moe_offload.commands import prepare\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "sys.exit(prepare.main(sys.argv[1:]))\n"
    )
    paths = ["--input-path", str(source), "--output-path", str(tmp_path / "out"), "--hf"]
    done = subprocess.run(
        [sys.executable, "-c", interrupted, *paths],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted; run the same command again to go on\n"


def test_prepared_once_is_enough(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert run(source, output) == 0
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    capsys.readouterr()
    assert run(source, output) == 0
    assert "already prepared" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    assert run(source, output, "--force") == 0
    after = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert after.keys() == before.keys()
    assert all(after[path] > before[path] for path in before)


def test_other_settings_need_force(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert run(source, output, "--expert-dtype", "int4") == 0
    for flags in (
        ["--expert-dtype", "bf16"],
        ["--expert-dtype", "int4", "--dense-dtype", "int8"],
    ):
        assert run(source, output, *flags) == 2
        assert "--force" in capsys.readouterr().err
        assert read_manifest(output).weight_format == "int4"
    assert run(source, output, "--force") == 0
    assert read_manifest(output).weight_format == "bf16"


def test_another_source_needs_force(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert run(source, output) == 0
    model = tiny_models.build_model(tiny_models.mixtral(), seed=1)
    other = tiny_models.write_hub(model, tmp_path / "other")
    assert run(other, output) == 2
    assert f"was prepared from {source}" in capsys.readouterr().err
    assert run(other, output, "--force") == 0
    assert read_manifest(output).source == str(other)


def test_a_damaged_preparation_is_named_and_force_mends_it(
    source: Path,
    reference: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    assert run(source, output) == 0
    shard = output / "experts-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run(source, output) == 2
    assert f"{shard} is truncated" in capsys.readouterr().err
    assert run(source, output, "--force") == 0
    assert contents(output) == reference


def test_force_removes_only_shards_that_are_ours(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert run(source, output) == 0
    outside = tmp_path / "precious.safetensors"
    outside.write_text("keep me")
    manifest = json.loads((output / "manifest.json").read_text())
    manifest["dense"].append({"file": "../precious.safetensors"})
    (output / "manifest.json").write_text(json.dumps(manifest))
    assert run(source, output, "--force") == 0
    assert outside.read_text() == "keep me"


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    output = tmp_path / "out"
    output.mkdir()
    with exclusive(output):
        yield output


def test_two_preparations_do_not_meet(
    source: Path, held: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, held) == 2
    assert "another preparation" in capsys.readouterr().err
