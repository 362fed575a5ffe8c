"""bf16 products through oneDNN: held to float64, chosen by measurement, left alone elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from against_transformers import N_TOKENS, eager, greedy, prepared, prompt_ids
from cpu_oracle import Layer, expected, make_layer, make_routing
from kernel_cases import ACTIVATIONS, ISAS, SILU, random_cases, run_experts
from tiny_models import CONFIGS, build_model, write_hub
from torch import nn

from moe_offload.checkpoint.block import Activation
from moe_offload.engine import calibration, probes
from moe_offload.engine import engine as engine_module
from moe_offload.engine.engine import Engine
from moe_offload.engine.loading import load_model
from moe_offload.engine.probes import (
    Crossover,
    has_bf16_products,
    measure_crossover,
)
from moe_offload.kernels.cpu_experts import CpuExperts
from moe_offload.kernels.cpu_linear import CpuLinear
from moe_offload.kernels.oracle import apply_activation
from moe_offload.machine.hardware import Hardware, read_hardware

BF16 = torch.bfloat16
ALWAYS = Crossover("experts", 1, (4, 1), (3000.0, 900.0), (1400.0, 500.0))


def through_onednn(layer: Layer, activation: Activation = SILU, n_tokens: int = 1) -> CpuExperts:
    return CpuExperts(layer.layout, activation).with_onednn(n_tokens)


def with_flags(*flags: str) -> Callable[..., Hardware]:
    """`read_hardware` of a machine whose CPU has these flags."""
    return lambda **_: dataclasses.replace(read_hardware(), isa=flags)


@pytest.mark.parametrize("seed", range(4))
def test_every_expert_is_within_the_bound_of_float64(seed: int) -> None:
    for number, (h, i, t, gate, bias, activation) in enumerate(random_cases(seed + 10, 12)):
        layer = make_layer("bf16", h, i, has_gate=gate, has_bias=bias, seed=number)
        routed = make_routing(layer, t, 1 + number % 3, BF16, seed=number)
        want, bound = expected(layer, routed, activation, onednn=True)
        found = run_experts(through_onednn(layer, activation), layer, routed)
        assert ((found.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.kind)
def test_as_the_kernels(activation: Activation) -> None:
    """Each rounding to bf16 errs by at most 2^-8, a third of it on average: within 1% in norm."""
    for bias in (False, True):
        layer = make_layer("bf16", 256, 192, has_bias=bias)
        routed = make_routing(layer, 40, 3, BF16)
        found = run_experts(through_onednn(layer, activation), layer, routed)
        kernels = run_experts(CpuExperts(layer.layout, activation), layer, routed)
        assert not torch.equal(found, kernels)  # it did go another way
        assert (found - kernels).norm() <= 0.01 * kernels.norm()


def test_only_crowded_experts_go_there_and_all_others_keep_their_bits() -> None:
    layer = make_layer("bf16", 64, 96, n_experts=5)
    # Experts 0 and 1 have six tokens each, 3 has seven with its repeats, 2 has five.
    index = torch.tensor([[0, 1]] * 6 + [[2, 3]] * 5 + [[3, 3], [-1, 7], [4, -9]])
    routed = dataclasses.replace(
        make_routing(layer, len(index), 2, BF16),
        index=index,
        on_cpu=torch.tensor([1, 1, 1, 1, 0], dtype=torch.uint8),
    )
    kernels = CpuExperts(layer.layout, SILU)
    found = run_experts(through_onednn(layer, n_tokens=6), layer, routed)
    want, bound = expected(layer, routed, SILU, onednn=True)
    assert ((found.double() - want).abs() <= bound).all()
    differs = (found != run_experts(kernels, layer, routed)).any(1)
    assert differs.tolist() == [True] * 12 + [False] * 2
    routed.on_cpu[[0, 1, 3]] = 0
    left = run_experts(through_onednn(layer, n_tokens=6), layer, routed)
    assert torch.equal(left, run_experts(kernels, layer, routed))


def test_blocks_of_experts_elsewhere_are_not_read() -> None:
    layer = make_layer("bf16", 32, 48)
    routed = make_routing(layer, 20, 2, BF16)
    pointers = torch.where(routed.on_cpu.bool(), layer.pointers, 0)
    assert (pointers == 0).any()
    out = torch.empty(20, 32)
    through_onednn(layer).run(
        routed.hidden, pointers, routed.on_cpu, routed.index, routed.weight, out
    )
    assert torch.equal(out, run_experts(through_onednn(layer), layer, routed))


def test_a_long_prompt_in_chunks_and_the_same_bits_each_time() -> None:
    layer = make_layer("bf16", 48, 32, n_experts=2)
    routed = make_routing(layer, 1300, 2, BF16)
    experts = through_onednn(layer)
    first = run_experts(experts, layer, routed)
    want, bound = expected(layer, routed, SILU, onednn=True)
    assert ((first.double() - want).abs() <= bound).all()
    assert torch.equal(run_experts(experts, layer, routed), first)


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_models_own_activation_between_the_products(has_bias: bool) -> None:
    layer = make_layer("bf16", 80, 56, has_bias=has_bias)
    routed = make_routing(layer, 21, dtype=BF16)
    own = CpuExperts(
        layer.layout,
        Activation("module"),
        act_module=lambda first: apply_activation(first, SILU, True),
    ).with_onednn(1)
    want, bound = expected(layer, routed, SILU, onednn=True)
    assert ((run_experts(own, layer, routed).double() - want).abs() <= bound).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_spoils_itself_alone(bad: float) -> None:
    layer = make_layer("bf16", 70, 40)
    routed = make_routing(layer, 9, dtype=BF16)
    routed.on_cpu.fill_(1)
    routed.hidden[4, 69] = bad
    out = run_experts(through_onednn(layer), layer, routed)
    assert not out[4].isfinite().any()
    assert out[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


def test_fp32_tokens_keep_the_exact_product() -> None:
    layer = make_layer("bf16", 64, 48)
    routed = make_routing(layer, 12)
    found = run_experts(through_onednn(layer), layer, routed)
    assert torch.equal(found, run_experts(CpuExperts(layer.layout, SILU), layer, routed))


def test_what_is_forced_or_another_format_never_goes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16 = make_layer("bf16", 32, 32).layout
    linear = nn.Linear(32, 16).bfloat16()
    assert CpuExperts(bf16, SILU).suits_onednn and CpuLinear.from_linear(linear).suits_onednn
    for weight_format in ("int8", "int4", "fp32"):
        assert not CpuExperts(make_layer(weight_format, 32, 32).layout, SILU).suits_onednn
    assert not CpuLinear.from_linear(nn.Linear(32, 16)).suits_onednn
    for forced in ({"kernel": "native"}, {"kernel": "torch"}, *({"isa": isa} for isa in ISAS)):
        assert not CpuExperts(bf16, SILU, **forced).suits_onednn
        assert not CpuLinear.from_linear(linear, **forced).suits_onednn
    # With more threads than the kernels were given, torch would crowd the cores.
    n_threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads + 1)
    assert not CpuExperts(bf16, SILU).suits_onednn
    assert not CpuLinear.from_linear(linear).suits_onednn


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_linear_with_many_rows(has_bias: bool) -> None:
    torch.manual_seed(2)
    linear = nn.Linear(100, 60, bias=has_bias).bfloat16().requires_grad_(False)
    layer = CpuLinear.from_linear(linear)
    x = torch.randn(2, 9, 100).bfloat16()
    kernels = layer(x)
    layer.onednn_tokens = 18
    assert torch.equal(layer(x), linear(x))
    assert torch.allclose(layer(x).float(), kernels.float(), rtol=2**-7, atol=1e-3)
    layer.onednn_tokens = 19
    assert torch.equal(layer(x), kernels)


@pytest.mark.parametrize(
    ("ratios", "from_tokens", "n_measured"),
    [
        ({256: 0.5, 64: 0.9, 16: 0.94}, 16, 3),
        ({256: 0.5, 64: 0.9, 16: 0.97}, 64, 3),  # a win within the margin is none
        ({256: 0.5, 64: 1.1, 16: 0.1}, 256, 2),  # what wins below a loss is not tried
        ({256: 0.96, 64: 0.1, 16: 0.1}, None, 1),
    ],
)
def test_the_limit_is_the_least_that_wins_by_the_margin(
    ratios: dict[int, float],
    from_tokens: int | None,
    n_measured: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a machine whose speed changes from pair to pair."""
    now_s = 0.0
    speeds = iter([9.0, 1.0, 3.0, 0.25] * 3)  # the first pair warms up
    speed = 0.0

    def kernels(n: int) -> None:
        nonlocal now_s, speed
        speed = next(speeds)
        now_s += n * speed

    def onednn(n: int) -> None:
        nonlocal now_s
        now_s += n * speed * ratios[n]

    monkeypatch.setattr("moe_offload.engine.timing.time.perf_counter", lambda: now_s)
    found = measure_crossover("experts", kernels, onednn, budget_s=0.0)
    assert found.from_tokens == from_tokens
    assert found.tokens == (256, 64, 16)[:n_measured]
    assert found.kernels_us == pytest.approx([n * 1e6 for n in found.tokens])
    assert found.library_us == pytest.approx([n * ratios[n] * 1e6 for n in found.tokens])


def test_a_choice_in_words() -> None:
    used = Crossover("2 experts with many tokens", 64, (256, 64), (26e3, 8e3), (20.2e3, 7.4e3))
    assert str(used) == (
        "2 experts with many tokens: torch's oneDNN from 64 tokens on "
        "(256 tokens: oneDNN 20.2 ms, the kernels 26 ms)"
    )
    assert str(Crossover("all", None, (256,), (100e3,), (110e3,))) == (
        "all: the kernels (256 tokens: oneDNN 110 ms, the kernels 100 ms)"
    )
    assert has_bf16_products(["avx2", "avx512_bf16"]) and has_bf16_products(["amx_bf16"])
    assert not has_bf16_products(["avx2", "avx512f", "avx512_vnni", "amx_tile"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("onednn")
    model = build_model(CONFIGS["mixtral"](num_hidden_layers=3), dtype=BF16)
    return prepared(write_hub(model, root / "source"), root / "prepared", "--hf")


@pytest.fixture
def quick_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(probes, "_STEP_BUDGET_S", 0.01)
    monkeypatch.setattr("moe_offload.engine.timing.Steadiness.is_quiet", True)


def limits(engine: Engine) -> tuple[set[int | None], set[int | None]]:
    """(experts', linears') limits; the head has none."""
    head = engine.model.get_output_embeddings()
    assert isinstance(head, CpuLinear) and head.onednn_tokens is None
    linears = [m for m in engine.model.modules() if isinstance(m, CpuLinear) and m is not head]
    return (
        {experts.onednn_tokens for experts in engine.dispatcher.cpu},
        {linear.onednn_tokens for linear in linears},
    )


@pytest.mark.parametrize("from_tokens", [4, None])
@pytest.mark.usefixtures("quick_calibration")
def test_a_calibration_decides_is_kept_and_told(
    from_tokens: int | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[bool] = []

    def crossover(
        what: str, kernels: Callable[[int], object], onednn: Callable[[int], object]
    ) -> Crossover:
        went = []
        with monkeypatch.context() as patch:
            patch.setattr("moe_offload.kernels.cpu_experts.functional.linear", went.append)
            patch.setattr(
                "moe_offload.kernels.cpu_linear.functional.linear", lambda *_: went.append(1)
            )
            kernels(5)  # as many as the limits, which must not count here
            assert not went
        onednn(5)
        measured.append(True)
        return Crossover(what, from_tokens, (8, 4), (3000.0, 900.0), (1400.0, 800.0))

    monkeypatch.setattr(calibration, "measure_crossover", crossover)
    monkeypatch.setattr(engine_module, "read_hardware", with_flags("avx2", "avx512_bf16"))
    engine: Engine = load_model(folder, device="cpu").engine
    engine.calibrate_for(255)
    assert engine.costs is None and limits(engine) == ({None}, {None})
    engine.calibrate_for(256)
    assert engine.costs is not None and limits(engine) == ({from_tokens}, {from_tokens})
    assert len(measured) == 2  # the experts, and the dense part
    assert engine.costs.to_json()["onednn_experts"]["from_tokens"] == from_tokens
    assert sum("many tokens" in line for line in engine.costs.describe()) == 2
    notes = [note for note in engine.learnt() if "oneDNN from 4 tokens on" in note]
    if from_tokens is None:
        assert engine.costs.model.cpu_many is None and not notes
    else:
        n_experts, many = engine.store.n_experts[0], engine.costs.model.cpu_many
        assert many is not None and many.call_us == 0  # all of a layer's were measured together
        assert many.us(n_experts, 8 * n_experts) == pytest.approx(1400.0)
        assert many.us(n_experts, 4 * n_experts) == pytest.approx(800.0)
        assert engine.costs.model.cpu_many_tokens == 4 and len(notes) == 2

    again: Engine = load_model(folder, device="cpu").engine
    again.calibrate()
    assert len(measured) == 2 and again.costs == engine.costs  # read from disk
    again.calibrate(again=True)
    assert len(measured) == 4 and limits(again) == ({from_tokens}, {from_tokens})


@pytest.mark.usefixtures("quick_calibration")
def test_an_accelerators_calibration_decides_as_well(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "measure_crossover", lambda *_: ALWAYS)
    monkeypatch.setattr("moe_offload.engine.engine.read_hardware", with_flags("amx_bf16"))
    model = load_model(folder, device="cpu", cache_nblocks=2, cache_nways=2)
    assert limits(model.engine) == ({1}, {1})
    assert model.engine.accelerator.costs.cpu_many is not None
    model.engine.close()


@pytest.mark.usefixtures("quick_calibration")
def test_a_cpu_without_bf16_products_is_not_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "measure_crossover", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr(engine_module, "read_hardware", with_flags("avx2", "avx512f"))
    engine: Engine = load_model(folder, device="cpu").engine
    engine.calibrate_for(100_000)
    assert engine.costs is None
    engine.calibrate()
    assert engine.costs is not None and not engine.costs.crossovers
    assert limits(engine) == ({None}, {None})


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_tokens_match_transformers(name: str, tmp_path: Path) -> None:
    """As `test_bf16_matches_transformers`, with every expert and linear through oneDNN.

    A greedy token must be transformers' best, or as good within the same tolerance of its logits.
    """
    config = CONFIGS[name]()
    hub = write_hub(build_model(config, dtype=BF16), tmp_path / "source")
    theirs = eager(hub, BF16)
    ours = load_model(prepared(hub, tmp_path / "prepared", "--hf"), device="cpu")
    ours.engine.use_onednn(1, 1)
    assert {experts.onednn_tokens for experts in ours.engine.dispatcher.cpu} == {1}
    ids = prompt_ids(config.vocab_size, 6, n_prompts=16)
    tolerance = 4 * (6 * config.num_hidden_layers) ** 0.5 * 2**-9
    with torch.inference_mode():
        wanted, found = theirs(ids).logits.float(), ours(ids).logits.float()
    errors = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert (errors <= tolerance).float().mean() >= 0.75

    texts = torch.tensor(greedy(ours, ids[:4].tolist()))
    assert texts.shape == (4, N_TOKENS)
    with torch.inference_mode():
        logits = theirs(torch.cat([ids[:4], texts], dim=1)).logits.float()
    logits = logits[:, ids.shape[1] - 1 : -1]
    lost = logits.amax(-1) - logits.gather(-1, texts[..., None])[..., 0]
    assert (lost <= tolerance * logits.norm(dim=-1)).float().mean() >= 0.75
