"""What a call of the CPU kernels may meet: used memory, odd addresses, unusual arguments.

Comparisons are of bits where the same sums are done: none of this may change a result at all.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Iterator

import pytest
import torch
from cpu_oracle import Layer, Routed, expected, make_layer, make_routing
from torch import Tensor, nn

from moe_offload.checkpoint import quantization
from moe_offload.checkpoint.block import Activation, BlockLayout, WeightFormat
from moe_offload.config import WEIGHT_FORMATS
from moe_offload.kernels import cpu_experts as experts_module
from moe_offload.kernels import library
from moe_offload.kernels.bindings import load_kernels
from moe_offload.kernels.cpu_experts import CpuExperts
from moe_offload.kernels.cpu_linear import CpuLinear
from moe_offload.kernels.library import supported_isas
from moe_offload.kernels.oracle import apply_activation

FORMATS: tuple[WeightFormat, ...] = ("fp32", "bf16", "int8", "int4")
SILU = Activation("silu")
NAN = float("nan")

NATIVE = load_kernels("native")
assert NATIVE is not None
ISAS = supported_isas(NATIVE.library)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that what is left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@functools.cache
def shared_layer(weight_format: WeightFormat, hidden: int, width: int, bias: bool = False) -> Layer:
    """A layer that tests only read."""
    return make_layer(weight_format, hidden, width, has_bias=bias)


def native(layer: Layer, isa: str = "auto") -> CpuExperts:
    return CpuExperts(layer.layout, SILU, kernel="native", isa=isa)


def run(experts: CpuExperts, layer: Layer, routed: Routed) -> Tensor:
    out = torch.full((len(routed.hidden), layer.layout.hidden_size), NAN)
    experts.run(routed.hidden, layer.pointers, routed.on_cpu, routed.index, routed.weight, out)
    return out


def poison_padding(layout: BlockLayout, block: Tensor) -> Tensor:
    """The same block with NaN or noise in every byte that is no weight, scale or bias."""
    poisoned = torch.full_like(block, 0xFF)
    for field in layout.fields:
        field.view(poisoned).copy_(field.view(block))
    if WEIGHT_FORMATS[layout.weight_format].group == 0:
        return poisoned
    hidden, width = layout.hidden_size, layout.intermediate_size
    for name, rows, columns in (
        ("gate_up", layout.first_rows, hidden),
        ("down", hidden, width),
    ):
        last = rows % quantization.TILE_ROWS
        packed = layout.field(name).view(poisoned)  # [RB, G, bits, 16, 4]
        if last:
            scale = layout.field(f"{name}_scale").view(poisoned)
            scale[-1, :, last:] = 255 if scale.dtype == torch.uint8 else NAN
            packed[-1, :, :, last:] = 0x7E
        for column in range(columns % quantization.GROUP or 32, quantization.GROUP):
            if layout.weight_format == "int8":
                packed[:, -1, column // 4, :, column % 4] = 0x7E
            else:
                line = packed[:, -1, column % 16 // 4, :, column % 4]
                line.copy_(line & 0xF0 | 0x0E if column < 16 else line & 0x0F | 0xE0)
    return poisoned


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_padding_is_never_read_into_a_result(weight_format, isa):
    for hidden, width in ((1, 1), (45, 70), (33, 17), (130, 15)):
        layer = shared_layer(weight_format, hidden, width, bias=True)
        blocks = torch.stack([poison_padding(layer.layout, block) for block in layer.blocks])
        poisoned = dataclasses.replace(layer, blocks=blocks)
        for n_tokens in (1, 3, 20):
            routed = make_routing(layer, n_tokens)
            clean = run(native(layer, isa), layer, routed)
            assert torch.equal(run(native(layer, isa), poisoned, routed), clean)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("n_tokens", [1, 4, 21])
def test_scratch_memory_carries_nothing_to_the_next_call(weight_format, isa, n_tokens):
    layer = shared_layer(weight_format, 45, 70)
    routed = make_routing(layer, n_tokens)
    experts = native(layer, isa)
    clean = run(experts, layer, routed)
    large = shared_layer(weight_format, 200, 150)
    spoiler = make_routing(large, 64)
    spoiler.on_cpu.fill_(1)
    spoiler.hidden.fill_(NAN)
    assert run(native(large, isa), large, spoiler).isnan().all()
    assert torch.equal(run(experts, layer, routed), clean)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_buffers_between_the_passes_are_written_whole(weight_format, isa, poisoned_memory):
    layer = shared_layer(weight_format, 45, 35, bias=True)
    linear = nn.Linear(45, 35).requires_grad_(False)
    if weight_format in ("fp32", "bf16"):
        dense = CpuLinear.from_linear(
            linear.to(torch.bfloat16 if weight_format == "bf16" else torch.float32), isa=isa
        )
    else:
        bits = 8 if weight_format == "int8" else 4
        dense = CpuLinear.from_packed(
            linear, *quantization.quantize(linear.weight, bits), bits, isa=isa
        )
    seen = []

    def own_gate(first: Tensor) -> Tensor:
        seen.append(first)
        return apply_activation(first, SILU, True)

    own = CpuExperts(
        layer.layout, Activation("module"), act_module=own_gate, kernel="native", isa=isa
    )
    for n_tokens in (0, 1, 4, 21):
        routed = make_routing(layer, n_tokens)
        assert run(own, layer, routed).isfinite().all()
        pairs = routed.on_cpu[routed.index].sum()
        assert seen[-1].shape == (pairs, 70) and seen[-1].isfinite().all()
        assert dense(routed.hidden).isfinite().all()
        assert dense(routed.hidden.bfloat16()).isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_any_address_of_an_element_will_do(weight_format, isa):
    layer = shared_layer(weight_format, 45, 70)
    experts = native(layer, isa)
    for n_tokens in (1, 21):
        for dtype in (torch.float32, torch.bfloat16):
            routed = make_routing(layer, n_tokens, dtype=dtype)
            memory = torch.empty(n_tokens * 45 + 1, dtype=dtype)
            shifted = memory[1:].view(n_tokens, 45).copy_(routed.hidden)
            out = torch.full((n_tokens * 45 + 2,), NAN)
            experts.run(
                shifted,
                layer.pointers,
                routed.on_cpu,
                routed.index,
                routed.weight,
                out[1:-1].view(n_tokens, 45),
            )
            assert out[0].isnan() and out[-1].isnan()
            assert torch.equal(out[1:-1].view(n_tokens, 45), run(experts, layer, routed))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_what_is_left_out_leaves_no_trace(kernel, isa):
    """Extreme ids, NaN weights and null blocks of pairs that are not the CPU's."""
    layer = shared_layer("bf16", 40, 24)
    experts = CpuExperts(layer.layout, SILU, kernel=kernel, isa=isa)
    routed = make_routing(layer, 4, 3)
    routed.on_cpu.copy_(torch.tensor([0, 255, 1, 0], dtype=torch.uint8))
    index = torch.tensor([[2**63 - 1, -(2**63), 4], [1, 0, 2**32 + 1], [-1, 2, 3], [1, 1, 2]])
    weight = torch.tensor([[NAN, NAN, NAN], [0.5, NAN, NAN], [NAN, 0.25, NAN], [1.0, -3.0, 0.0]])
    pointers = layer.pointers
    pointers[[0, 3]] = 0
    out = torch.full((4, 40), NAN)
    experts.run(routed.hidden, pointers, routed.on_cpu, index, weight, out)
    kept = torch.tensor([[-1, -1, -1], [1, -1, -1], [-1, 2, -1], [1, 1, 2]])
    want, bound = expected(
        layer, dataclasses.replace(routed, index=kept, weight=weight.abs().nan_to_num()), SILU
    )
    ones = dataclasses.replace(routed, index=torch.tensor([[1]] * 4), weight=torch.ones(4, 1))
    want[3] = -2 * expected(layer, ones, SILU)[0][3]  # of weights 1 - 3 + 0
    assert (out[0] == 0).all()
    assert ((out.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_routing_weight_that_is_not_finite_shows(weight_format, isa):
    layer = shared_layer(weight_format, 40, 24)
    routed = make_routing(layer, 12)
    routed.on_cpu.fill_(1)
    clean = run(native(layer, isa), layer, routed)
    routed.weight[3, 1], routed.weight[5, 0] = NAN, float("inf")
    out = run(native(layer, isa), layer, routed)
    assert out[3].isnan().all() and not out[5].isfinite().any()
    others = [t for t in range(12) if t not in (3, 5)]
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_no_choices_at_all_give_zeros(kernel):
    layer = shared_layer("int4", 40, 24)
    experts = CpuExperts(layer.layout, SILU, kernel=kernel)
    assert (run(experts, layer, make_routing(layer, 5, 0)) == 0).all()


def test_a_wrong_array_is_refused_before_the_kernels_see_it():
    layer = shared_layer("fp32", 40, 24)
    good = make_routing(layer, 6)
    wrong = (
        {"hidden": good.hidden[:, :39].contiguous()},
        {"hidden": good.hidden.double()},
        {"hidden": good.hidden.t().contiguous().t()},
        {"hidden": good.hidden[:5]},
        {"on_cpu": good.on_cpu.bool()},
        {"on_cpu": good.on_cpu[:3]},
        {"index": good.index[:, :1]},
        {"weight": good.weight.double()},
        {"weight": good.weight.t().contiguous().t()},
    )
    for change in wrong:
        with pytest.raises(ValueError, match=r"expected .* contiguous, on the CPU; found"):
            run(native(layer), layer, dataclasses.replace(good, **change))
    out = torch.full((6, 80), NAN)
    for bad in (out[:, ::2], out[:, :39], out[:5, :40].contiguous(), out[:, :40].bfloat16()):
        with pytest.raises(ValueError, match="expected out to be"):
            native(layer).run(
                good.hidden, layer.pointers, good.on_cpu, good.index, good.weight, bad
            )
    assert out.isnan().all()


def test_what_the_models_own_gate_gives_must_fit():
    layer = shared_layer("fp32", 40, 24)
    own = CpuExperts(
        layer.layout, Activation("module"), act_module=lambda first: first[:, :23], kernel="native"
    )
    with pytest.raises(ValueError, match=r"24\] from the model's own activation"):
        run(own, layer, make_routing(layer, 6))


def test_the_c_interface_refuses_what_cannot_be():
    """It sees numbers and addresses: sizes, formats, threads and null pointers are told there."""
    assert NATIVE is not None
    layer = shared_layer("int8", 40, 24)
    routed = make_routing(layer, 2)
    out = torch.full((2, 40), NAN)
    arguments = native(layer)._layer
    given = experts_module.Routed(
        routed.hidden, layer.pointers, routed.on_cpu, routed.index, routed.weight
    )
    tokens = given.arguments()  # addresses, valid as long as `given` is
    wrong_layers = (
        {"weight_format": 4},
        {"weight_format": -1},
        {"weight_format": 1},  # bf16 has no scales
        {"activation": -1},  # the caller's own, which `run` does not compute
        {"activation": 6},
        {"hidden_size": 0},
        {"intermediate_size": -5},
        {"gate_up": -1},
        {"down_scale": -1},
    )
    wrong_tokens = (
        {"n_tokens": -1},
        {"top_k": -1},
        {"n_experts": -1},
        *({name: None} for name in ("hidden", "index", "weight", "blocks", "on_cpu")),
    )
    cases = [(changed(arguments, change), tokens) for change in wrong_layers]
    cases += [(arguments, changed(tokens, change)) for change in wrong_tokens]
    for bad_layer, bad_tokens in cases:
        with pytest.raises(ValueError, match="CPU kernels, run"):
            NATIVE.call("run", bad_layer, bad_tokens, out)
    for threads in (0, -1, 1025):
        with pytest.raises(ValueError, match="number of threads"):
            dataclasses.replace(NATIVE, threads=threads).call("run", arguments, tokens, out)
    with pytest.raises(RuntimeError, match="instruction set"):
        dataclasses.replace(NATIVE, isa_code=99).call("run", arguments, tokens, out)
    with pytest.raises(ValueError, match="contiguous tensor on the CPU"):
        NATIVE.call("run", arguments, tokens, out.t())
    assert out.isnan().all()
    NATIVE.call("run", arguments, tokens, out)
    assert out.isfinite().all()


def test_a_burst_of_multiply_adds_is_never_empty():
    """On a busy machine a thread may first run when the burst is over; rates are divided by."""
    for isa in ISAS:
        kernels = load_kernels("native", isa)
        assert kernels is not None and kernels.fma_gflops(0.0) > 0


def test_every_entry_point_refuses_what_cannot_be():
    assert NATIVE is not None
    x, y = torch.ones(1, 8), torch.full((1, 8), NAN)
    index = torch.zeros(1, 8, dtype=torch.int64)
    weight = x.data_ptr()
    matrix = {"weight_format": 0, "rows": 8, "cols": 1, "w": weight}
    norm = {"form": 0, "epsilon": 1e-5, "width": 8, "weight": weight}
    attention = {"n_batch": 1, "n_heads": 2, "n_kv_heads": 1, "n_queries": 1, "n_keys": 1}
    attention |= {"key_size": 4, "value_size": 4, "query": weight, "keys": weight, "values": weight}
    for change in ({"weight_format": 2}, {"rows": 0}, {"cols": -1}, {"w": None}):
        bad = library.MatrixArguments(**matrix | change)
        with pytest.raises(ValueError, match="linear"):
            NATIVE.call("linear", bad, x, False, 1, y)
        with pytest.raises(ValueError, match="route"):
            NATIVE.call("route", library.RouterArguments(bad, top_k=1), x, 1, y, y, index)
    good = library.MatrixArguments(**matrix)
    for top_k in (0, 9):
        with pytest.raises(ValueError, match="route"):
            NATIVE.call("route", library.RouterArguments(good, top_k=top_k), x, 1, y, y, index)
    for change in ({"form": 3}, {"width": 0}, {"weight": None}):
        with pytest.raises(ValueError, match="rms_norm"):
            NATIVE.call("rms_norm", library.NormArguments(**norm | change), x, False, 1, y)
    for change in ({"n_kv_heads": 0}, {"n_heads": 3, "n_kv_heads": 2}, {"key_size": 0}):
        with pytest.raises(ValueError, match="attend"):
            NATIVE.call("attend", library.AttentionArguments(**attention | change), y)
    for change in ({"query": None}, {"values": None}, {"n_keys": -1}, {"n_queries": 2}):
        with pytest.raises(ValueError, match="attend"):
            NATIVE.call("attend", library.AttentionArguments(**attention | change), y)
    assert y.isnan().all()


def changed(arguments: ctypes.Structure, change: dict[str, object]) -> ctypes.Structure:
    other = type(arguments).from_buffer_copy(arguments)
    for name, value in change.items():
        setattr(other, name, value)
    return other


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_bad_row_of_a_linear_spoils_itself_alone(weight_format, isa):
    torch.manual_seed(0)
    linear = nn.Linear(45, 35).requires_grad_(False)
    if weight_format in ("int8", "int4"):
        bits = 8 if weight_format == "int8" else 4
        packed = quantization.quantize(linear.weight, bits)
        layer = CpuLinear.from_packed(linear, *packed, bits, kernel="native", isa=isa)
    else:
        dtype = torch.bfloat16 if weight_format == "bf16" else torch.float32
        layer = CpuLinear.from_linear(linear.to(dtype), kernel="native", isa=isa)
    for n_tokens in (1, 3, 20):
        x = torch.randn(n_tokens, 45)
        clean = layer(x)
        for bad in (NAN, float("inf")):
            spoiled = x.clone()
            spoiled[n_tokens // 2, 44] = bad
            y = layer(spoiled)
            others = [t for t in range(n_tokens) if t != n_tokens // 2]
            assert not y[n_tokens // 2].isfinite().any()
            assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("kernel", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float32, torch.bfloat16])
def test_a_linear_takes_any_floating_input(kernel, dtype):
    linear = nn.Linear(48, 20).bfloat16().requires_grad_(False)
    packed = quantization.quantize(linear.weight, 8)
    x = torch.randn(3, 48).to(dtype)
    want = x.double() @ linear.weight.double().T + linear.bias.double()
    for layer in (
        CpuLinear.from_linear(linear, kernel=kernel),
        CpuLinear.from_packed(linear, *packed, 8, kernel=kernel),
    ):
        y = layer(x)
        assert y.dtype == dtype
        # bf16 output: half a unit of 2^-8; int8 twice, of weights and activations: 1% of the norm
        assert (y.double() - want).norm() <= 0.02 * want.norm()


@pytest.mark.parametrize("weight_format", ["bf16", "int8"])
def test_a_linear_follows_its_parameters(weight_format):
    """A state dict that is loaded later counts, bias included."""
    linear = nn.Linear(48, 20).bfloat16().requires_grad_(False)
    other = nn.Linear(48, 20).bfloat16().requires_grad_(False)
    layer, target = (
        CpuLinear.from_linear(module, kernel="native")
        if weight_format == "bf16"
        else CpuLinear.from_packed(
            module, *quantization.quantize(module.weight, 8), 8, kernel="native"
        )
        for module in (linear, other)
    )
    x = torch.randn(3, 48)
    layer.load_state_dict(target.state_dict())
    assert torch.equal(layer(x), target(x))


def test_a_linear_never_reads_another_dtype_as_its_own():
    """`module.to(dtype)` converts scales and biases, whose bytes the kernels take as they are."""
    linear = nn.Linear(48, 20).requires_grad_(False)
    x = torch.randn(3, 48)
    plain = CpuLinear.from_linear(linear, kernel="native")
    want = plain(x)
    assert torch.allclose(plain.to(torch.bfloat16)(x), want, rtol=0.02, atol=0.02)
    packed = CpuLinear.from_packed(
        linear, *quantization.quantize(linear.weight, 8), 8, kernel="native"
    )
    packed(x)  # so that the addresses of now are known
    with pytest.raises(ValueError, match="int8 as it was made"):
        packed.to(torch.bfloat16)(x)
    with pytest.raises(ValueError, match="as it was made"):
        CpuLinear.from_linear(nn.Linear(48, 20), kernel="native").half()(x)


def test_a_linear_takes_rows_of_its_width_alone():
    """[1, 96] holds two rows of 48, and [48, 1] one."""
    linear = nn.Linear(48, 20).requires_grad_(False)
    packed = quantization.quantize(linear.weight, 8)
    for layer in (
        CpuLinear.from_linear(linear, kernel="native"),
        CpuLinear.from_packed(linear, *packed, 8, kernel="native"),
    ):
        for shape in ((1, 96), (48, 1), (3, 50), (0, 47)):
            with pytest.raises(ValueError, match="expected rows of 48"):
                layer(torch.zeros(shape))
