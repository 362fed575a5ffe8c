"""A prompt file on a Ray cluster of two machines, which are two nodes on this one."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from against_transformers import prepared
from ray.cluster_utils import Cluster
from tiny_models import write_mixtral_with_tokenizer

from moe_offload.commands import generate

N_PROMPTS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    source = write_mixtral_with_tokenizer(folder / "hub", max_position_embeddings=256)
    return prepared(source, folder / "p", "--hf", "--expert-dtype", "fp32", "--dense-dtype", "fp32")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two machines of one CPU and 2 GB; a worker claims more than half of that."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    node = {"num_cpus": 1, "memory": 2 << 30, "object_store_memory": 80 << 20}
    started = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    started.add_node(**node)
    yield started
    ray.shutdown()
    started.shutdown()
    patch.undo()


def worker_processes(cluster: Cluster, does: str = "") -> list[psutil.Process]:
    """The processes of our workers; Ray calls them by the class, and by what they do."""
    nodes = [cluster.head_node, *cluster.worker_nodes]
    raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
    children = [child for pid in raylets for child in psutil.Process(pid).children(recursive=True)]
    return [one for one in children if " ".join(one.cmdline()).startswith(f"ray::Worker{does}")]


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may grow."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def run(model: Path, folder: Path, *flags: object) -> tuple[int, dict[int, Any]]:
    """The exit code of a run into `folder`, and what its answers say, by index."""
    answers = folder / "answers.jsonl"
    arguments = (
        *("--model-path", model, "--prompt-path", folder / "prompts.jsonl", "--max-tokens", 30),
        *("--responses-jsonl", answers, "--device", "cpu", "--hide-resp", *flags),
        *("--cpu-kernel", "torch"),  # the workers would compile kernels of their own
    )
    code = generate.main([str(argument) for argument in arguments])
    facts = ("prompt", "response", "stop", "prompt_tokens", "generated_tokens", "settings", "error")
    return code, {
        line["index"]: {name: line.get(name) for name in facts} for line in lines_of(answers)
    }


def new_folder(parent: Path, name: str, n_prompts: int = N_PROMPTS) -> Path:
    folder = parent / name
    folder.mkdir()
    lines = [
        {"prompt": f"Prompt number {n} is one of many", "max_tokens": 6 + 7 * n % 24}
        for n in range(n_prompts)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def when_answered(path: Path, n_more: int, act: Callable[[], object]) -> threading.Thread:
    """Does `act` once `n_more` lines have joined those of `path`."""
    n_wanted = len(lines_of(path)) + n_more

    def wait() -> None:
        while len(lines_of(path)) < n_wanted:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_neither_a_ctrl_c_nor_a_killed_worker_costs_an_answer_or_changes_one(
    model: Path,
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    alone, many = (new_folder(tmp_path, name) for name in ("alone", "many"))
    answers = many / "answers.jsonl"
    monkeypatch.chdir(tmp_path)
    _, expected = run(model, alone, "--no-record")
    flags = ("--ray", cluster.address, "--batch-size", 2)

    ctrl_c = when_answered(answers, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
    code, found = run(model, many, *flags)
    ctrl_c.join()
    assert code == 130
    assert 4 <= len(found) < N_PROMPTS
    assert f"interrupted (Ctrl-C): {len(found)} of {N_PROMPTS} prompts" in capsys.readouterr().err
    assert not worker_processes(cluster), "workers end with the run"

    before = answers.read_text()
    killer = when_answered(answers, 3, lambda: worker_processes(cluster, ".answer")[0].kill())
    code, found = run(model, many, *flags, "--resume")
    killer.join()
    assert code == 0
    out, err = capsys.readouterr()
    assert f"{before.count(chr(10))} prompts were answered before" in out
    assert "what it had is done again" in err, "the worker died after its last prompt"
    assert "is left out" not in err, "it is started again"
    assert found == expected
    assert answers.read_text().startswith(before)
    indexes = [line["index"] for line in lines_of(answers)]
    assert sorted(indexes) == list(range(N_PROMPTS)), "each once"
