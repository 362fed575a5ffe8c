"""A model of the hub: only what is needed is downloaded, and what refuses is one sentence."""

from __future__ import annotations

import errno
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx2
import pytest
import tiny_models
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from moe_offload.checkpoint import hub
from moe_offload.checkpoint.prepared import read_manifest, verify
from moe_offload.commands import prepare

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Stands for snapshot_download: links of a repository's files in a cache's snapshot folder."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.snapshot = repository, cache / "snapshots" / COMMIT
        self.revisions: list[str | None] = []

    def __call__(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert name == "someone/tiny"
        self.revisions.append(revision)
        for path in self.repository.rglob("*"):
            file = path.relative_to(self.repository)
            if path.is_file() and any(fnmatch(str(file), one) for one in allow_patterns):
                link = self.snapshot / file
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(path)
        return str(self.snapshot)

    @property
    def files(self) -> set[str]:
        found = (path for path in self.snapshot.rglob("*") if path.is_symlink())
        return {str(path.relative_to(self.snapshot)) for path in found}


@pytest.fixture
def tiny_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "repository", tmp_path / "cache")
    monkeypatch.setattr(hub, "snapshot_download", found)
    monkeypatch.chdir(tmp_path)
    return found


def run(*more: str) -> int:
    paths = ["--input-path", "someone/tiny", "--output-path", "out", *more]
    return prepare.main(paths)


def with_extras(repository: Path) -> None:
    """What repositories hold beside a model in the hub's format."""
    for file in ("original/model.safetensors", "consolidated.00.pth", "README.md", "onnx/m.onnx"):
        path = repository / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"not needed")


def test_safetensors_alone_are_downloaded(tiny_hub: Hub, tmp_path: Path) -> None:
    """Of one commit, though the branch may move between the small files and the weights."""
    model = tiny_models.build_model(tiny_models.mixtral())
    tiny_models.write_bin(model, tiny_hub.repository)
    tiny_models.write_hub(model, tiny_hub.repository, "20KB")
    with_extras(tiny_hub.repository)
    assert run("--hf", "--revision", "v2") == 0
    verify(read_manifest(tmp_path / "out"))
    assert tiny_hub.revisions == ["v2", COMMIT]
    index = json.loads((tiny_hub.repository / "model.safetensors.index.json").read_bytes())
    small = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert tiny_hub.files == small | {*index["weight_map"].values()}


def test_older_and_native_files(tiny_hub: Hub, tmp_path: Path) -> None:
    model = tiny_models.build_model(tiny_models.mixtral())
    tiny_models.write_bin(model, tiny_hub.repository, n_shards=2)
    assert run("--hf") == 0
    assert sum(name.endswith(".bin") for name in tiny_hub.files) == 2
    tiny_models.write_native(model, tiny_hub.repository)
    tiny_hub.snapshot = tmp_path / "native"
    assert run("--force") == 0
    assert {name for name in tiny_hub.files if "bin" in name} == {"pytorch_model.bin.index.json"}
    assert "consolidated.00.pth" in tiny_hub.files


def refused(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    assert run("--hf", "--revision", "v3") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_what_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = httpx2.Response(404, request=httpx2.Request("GET", "https://example.org"))
    for error, words in (
        (GatedRepoError("gated", response=answer), "someone/tiny is gated: accept its terms"),
        (RepositoryNotFoundError("404", response=answer), "no model of this name that you may"),
        (RevisionNotFoundError("404", response=answer), "has no revision v3; check --revision"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some"),
        (httpx2.ReadTimeout("timed out"), "timed out; run the same command again to go on"),
    ):
        assert words in refused(error, monkeypatch, capsys).replace("[Errno 28] ", "")


def test_offline_for_real(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The library itself, with an empty cache, refuses without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert run("--hf") == 2
    assert "offline mode is on (HF_HUB_OFFLINE), and the cache" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_offline_with_what_was_downloaded_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The library finds a branch's commit, whose files are links, in its cache alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    model = tiny_models.build_model(tiny_models.mixtral())
    plain = tiny_models.write_hub(model, tmp_path / "plain", "20KB")
    stored = tmp_path / "cache" / "models--someone--tiny"
    for folder in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (stored / folder).mkdir(parents=True)
    (stored / "refs" / "v2").write_text(COMMIT)
    for number, path in enumerate(sorted(plain.iterdir())):
        path.rename(stored / "blobs" / str(number))
        (stored / "snapshots" / COMMIT / path.name).symlink_to(f"../../blobs/{number}")
    assert run("--hf", "--revision", "v2") == 0
    verify(read_manifest(tmp_path / "out"))
    next((stored / "snapshots" / COMMIT).glob("model-00002*")).unlink()
    capsys.readouterr()
    assert run("--hf", "--revision", "v2", "--force") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_flags_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    same = ["--input-path", "someone/tiny", "--output-path", "someone/tiny", "--hf"]
    assert prepare.main(same) == 2
    assert "found the hub's name someone/tiny" in capsys.readouterr().err
    folder = tiny_models.write_hub(tiny_models.build_model(tiny_models.mixtral()), tmp_path / "m")
    paths = ["--input-path", str(folder), "--output-path", "out", "--hf", "--revision", "main"]
    assert prepare.main(paths) == 2
    assert "expected --revision with a name of the hub" in capsys.readouterr().err
