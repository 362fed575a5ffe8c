"""The call that takes a decoder layer's decode steps, against the layer's modules, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import CONFIGS, build_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_offload.kernels.bindings import CpuKernels, load_kernels
from moe_offload.kernels.library import supported_isas
from moe_offload.model.decode_layers import CpuDecoderLayer, use_decoder_layers
from moe_offload.model.decode_modules import use_cpu_kernels
from moe_offload.model.generation import cache_argument
from moe_offload.model.kv_cache import make_cache

NATIVE = load_kernels("native")
assert NATIVE is not None


def pair(
    name: str, isa: str = "auto", **changes: object
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model of kernels without and with the layers' call."""
    models = []
    for is_served in (False, True):
        config = CONFIGS[name]()
        for field, value in changes.items():
            setattr(config, field, value)
        model = build_model(config, dtype=torch.bfloat16)
        use_cpu_kernels(model, "native", isa)
        if is_served:
            use_decoder_layers(model, load_kernels("native", isa))
        models.append(model)
    return models[0], models[1]


def served(model: PreTrainedModel) -> list[CpuDecoderLayer]:
    forwards = [vars(layer).get("forward") for layer in model.model.layers]
    return [forward for forward in forwards if isinstance(forward, CpuDecoderLayer)]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels' calls that take a layer's step."""
    found: list[str] = []
    call = CpuKernels.call

    def noted(kernels: CpuKernels, name: str, *arguments: object) -> None:
        found.extend([name] if name == "attend_step" else [])
        call(kernels, name, *arguments)

    monkeypatch.setattr(CpuKernels, "call", noted)
    return found


def logits(model: PreTrainedModel, texts: list[Tensor], **arguments: object) -> list[Tensor]:
    cache = make_cache(model.config, 600)
    found = []
    with torch.inference_mode():
        for ids in texts:
            first = cache.get_seq_length()
            positions = torch.arange(first, first + ids.shape[1]).expand_as(ids)
            given = arguments | {cache_argument(model): cache, "position_ids": positions}
            found.append(model(input_ids=ids, use_cache=True, **given).logits)
    return found


def text(batch: int, n_steps: int = 3, prompt: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    sizes = [(batch, prompt), *[(batch, 1)] * n_steps]
    return [torch.randint(3, 50, size, generator=generator) for size in sizes]


@pytest.mark.parametrize("isa", supported_isas(NATIVE.library))
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_same_bits_as_the_layers_own_modules(name: str, isa: str, steps: list[str]) -> None:
    """Also where the cache's memory grows, and for several sequences."""
    plain, changed = pair(name, isa)
    n_layers = changed.config.num_hidden_layers
    assert len(served(changed)) == n_layers
    steps.clear()
    for batch, n_steps in ((1, 262), (3, 2)):
        both = [logits(model, text(batch, n_steps)) for model in (plain, changed)]
        assert all(map(torch.equal, *both))
        assert len(steps) == n_layers * n_steps
        steps.clear()


@pytest.mark.parametrize("change", [lambda y: 0.5 * y, lambda y: y.clamp(-64, 64)])
def test_other_arithmetic_keeps_its_own_code(change: Callable[[Tensor], Tensor]) -> None:
    """As Granite's, which scales what attention adds, and what clips queries, keys or values."""
    model = pair("mixtral")[0]
    for layer in model.model.layers:
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, own=own, **kwargs: (
            change(own(*args, **kwargs)[0]),
            None,
        )
    use_decoder_layers(model, NATIVE)
    assert not served(model)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "phimoe", "qwen2_moe"])
def test_other_parts_keep_their_own_code(name: str) -> None:
    assert not served(pair(name)[1])


def test_sliding_layers_keep_their_own_code() -> None:
    model = pair("mixtral", sliding_window=4)[1]
    assert not served(model)


def test_other_calls_go_to_the_layers_own_code(steps: list[str]) -> None:
    plain, changed = pair("qwen3_moe")
    steps.clear()
    padded = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    ids = text(2)
    for arguments in ({"output_attentions": True}, {"output_hidden_states": True}):
        assert all(
            map(torch.equal, *(logits(model, ids, **arguments) for model in (plain, changed)))
        )
    steps.clear()
    prompt_alone = [ids[0]]
    masked = [logits(model, prompt_alone, attention_mask=padded) for model in (plain, changed)]
    assert all(map(torch.equal, *masked)) and not steps
    changed.train()
    logits(changed, ids)
    assert not steps


def test_what_a_user_changes_is_followed(steps: list[str]) -> None:
    plain, changed = pair("qwen3_moe")
    heard: list[nn.Module] = []
    attention = changed.model.layers[0].self_attn
    hook = attention.k_proj.register_forward_hook(lambda module, *_: heard.append(module))
    steps.clear()
    logits(changed, text(1, n_steps=1))
    assert len(heard) == 2 and len(steps) == changed.config.num_hidden_layers - 1
    hook.remove()
    for model in (plain, changed):
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight = nn.Parameter(2 * layer.self_attn.o_proj.weight)
        layer.self_attn.q_norm.weight = nn.Parameter(3 * layer.self_attn.q_norm.weight)
        model.requires_grad_(False)
        own = model.model.layers[1].self_attn
        own.v_proj = nn.Sequential(own.v_proj, nn.ReLU())
    steps.clear()
    assert all(map(torch.equal, *(logits(model, text(1)) for model in (plain, changed))))
    assert len(steps) == (changed.config.num_hidden_layers - 1) * 3


def test_a_bias_that_a_user_adds_counts(steps: list[str]) -> None:
    """As steering does, which adds a direction to what attention adds."""
    plain, changed = pair("mixtral")
    for model in (plain, changed):
        linear = model.model.layers[0].self_attn.o_proj
        linear.bias = nn.Parameter(torch.full((32,), 4.0).bfloat16(), requires_grad=False)
    steps.clear()
    assert all(map(torch.equal, *(logits(model, text(1)) for model in (plain, changed))))
    assert len(steps) == (changed.config.num_hidden_layers - 1) * 3
