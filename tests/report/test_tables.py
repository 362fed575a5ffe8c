"""The CSVs as a researcher reads them: plain pandas, no options."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from synthetic_recording import Shape, record_run, sensor_samples

from moe_offload.experts.recorder import Recorder
from moe_offload.report.files import ReportPaths, RunInfo, write_reports
from moe_offload.report.summary import summarize

SHAPES = [
    Shape(),
    Shape(top_k=1),
    Shape(n_layers=40, top_k=6, n_experts=16),
    Shape(prompt_lengths=(4, 6, 3), n_tokens=5, batch=2, top_k=3),
]


def written(folder: Path, shape: Shape) -> Recorder:
    recorder = record_run(shape)
    samples = sensor_samples()
    summary = summarize(recorder, samples=samples)
    write_reports(recorder, ReportPaths.in_folder(folder), RunInfo(samples=samples), summary)
    return recorder


@pytest.mark.parametrize("shape", SHAPES)
def test_passes_and_hits(tmp_path: Path, shape: Shape) -> None:
    recorder = written(tmp_path, shape)
    passes, layers = recorder.pass_table(), recorder.layer_table()
    time, hits = pd.read_csv(tmp_path / "out.csv"), pd.read_csv(tmp_path / "cache.csv")
    assert list(time.columns[:4]) == ["Index", "attn", "ffn_compute", "ffn_comm"]
    assert time.Index.tolist() == hits.Index.tolist() == list(range(len(passes)))
    assert time.step_ms.tolist() == pytest.approx((passes["duration_s"] * 1e3).tolist())
    for name in ("cpu_bytes", "gpu_bytes", "waited_bytes", "fetch_bytes"):
        assert time[name].sum() == layers[name].sum()
    blocks = hits[[f"Block_{layer}" for layer in range(shape.n_layers)]]
    for row in layers:
        assert blocks.iloc[row["pass_index"], row["layer"]] == row["hits"]
    assert (blocks.sum(axis=1) == hits.Hits).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_expert_choices(tmp_path: Path, shape: Shape) -> None:
    """pandas tells repeated column names apart by a number, and fills a prefill's row with NaN."""
    recorder = written(tmp_path, shape)
    choices = pd.read_csv(tmp_path / "expert_choices.csv")
    decode = recorder.pass_table()["decode"]
    for event in recorder.layer_events():
        names = [f"Block_{event.layer}" + (f".{k}" if k else "") for k in range(shape.top_k)]
        read = choices[choices.Index == event.pass_index][names]
        if decode[event.pass_index]:
            assert read.astype(int).to_numpy().tolist() == event.ids
        else:
            assert read.isna().all(axis=None)


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_and_seconds(tmp_path: Path, shape: Shape) -> None:
    recorder = written(tmp_path, shape)
    tokens = pd.read_csv(tmp_path / "token_gen_time.csv")
    table = recorder.token_table()
    decoded = table[recorder.pass_table()["decode"][table["pass_index"]]]
    assert tokens.Time.tolist() == pytest.approx(decoded["time_s"].tolist())
    assert tokens.Timestamp.tolist() == decoded["unix_s"].astype(int).tolist()
    if len(shape.prompt_lengths) > 1:
        assert tokens.Prompt.tolist() == decoded["prompt"].tolist()
    seconds = pd.read_csv(tmp_path / "cpu_freq_avg.csv")
    assert list(seconds.columns[:3]) == ["Seconds", "Temperature", "cpu0"]
    assert seconds.cpu0.tolist() == [sample.busiest_mhz for sample in sensor_samples()]
