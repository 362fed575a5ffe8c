"""Hardware files, model shapes, and the cost models they make."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from moe_offload.checkpoint.block import block_layout
from moe_offload.errors import UserError
from moe_offload.experts.costs import CostModel, SideCost
from moe_offload.simulation.machine_file import calibrated_machine, load_machine, write_machine
from moe_offload.simulation.shapes import SHAPES_FILE, load_shape

HARDWARE = Path(__file__).resolve().parents[2] / "hardware"
FILES = sorted(HARDWARE.glob("*.yaml"))
MACHINE = load_machine(HARDWARE / "rtx4090.yaml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_files_load_and_name_their_sources(path):
    machine = load_machine(path)
    for cores in (2, 8, 24):
        for pcie in (3, 4, 5):
            variant = machine.variant(cores, pcie)
            assert (variant.cpu.cores, variant.bus.pcie) == (cores, pcie)
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if line.startswith("  ") and ":" in line and not line.strip().startswith("#"):
            nearby = "\n".join(lines[max(0, number - 6) : number + 1])
            assert "#" in nearby, f"{path.name}:{number + 1}: a number without a source"


def test_there_is_a_file_for_each_promised_gpu():
    assert {path.stem for path in FILES} >= {"rtx3080", "rtx4080", "rtx4090"}


@pytest.mark.parametrize(
    "path", sorted(HARDWARE.glob("desktop-*.yaml")), ids=lambda path: path.stem
)
def test_a_desktops_numbers_are_the_shares_that_its_file_says(path):
    """Two channels of 8 bytes, lanes of 8, 16 and 32 GT/s, 512 operations a cycle and SM."""
    machine, text = load_machine(path), path.read_text()
    mts = int(re.search(r"at (\d+) MT/s", text)[1])
    assert machine.cpu.socket_gbps == pytest.approx(0.9 * 2 * 8 * mts / 1e3, abs=0.06)
    lanes = int(re.search(r"# (\d+) lanes of", text)[1])
    for generation, gigatransfers in ((3, 8), (4, 16), (5, 32)):
        rate_gbps = lanes * gigatransfers * 128 / 130 / 8
        assert machine.bus.gbps[generation] == pytest.approx(0.8 * rate_gbps, abs=0.06)
    sms, ghz = map(float, re.search(r"(\d+) SMs at ([\d.]+) GHz", text).groups())
    assert machine.gpu.tflops == pytest.approx(sms * ghz * 512 / 1e3, abs=0.06)
    bits, gbit = map(float, re.search(r"(\d+) bits at (\d+) Gbit/s", text).groups())
    assert machine.gpu.gbps == pytest.approx(bits * gbit / 8)
    assert machine.gpu.memory_gb == pytest.approx(
        int(re.search(r"(\d+) GiB", text)[1]) * 2**30 / 1e9, abs=0.06
    )
    wanted = machine.cpu.gbps + machine.bus.gbps[machine.bus.pcie]
    assert f"{machine.cpu.gbps:.1f} + {machine.bus.gbps[machine.bus.pcie]:g} GB/s" in text
    assert machine.bus.cpu_shared_factor == pytest.approx(
        max(1.1, wanted / machine.cpu.socket_gbps), abs=0.006
    )
    assert machine.bus.shared == pytest.approx(1 / machine.bus.cpu_shared_factor, abs=0.012)


def test_desktops_span_what_people_have():
    machines = [load_machine(path) for path in HARDWARE.glob("desktop-*.yaml")]
    assert {machine.bus.pcie for machine in machines} == {3, 4, 5}
    assert {machine.cpu.cores for machine in machines} == {8, 12, 16}
    gib = sorted(round(machine.gpu.memory_gb / 2**30 * 1e9) for machine in machines)
    assert (gib[0], gib[-1]) == (8, 24)


def test_more_cores_read_more_and_saturate():
    speeds = [MACHINE.variant(cores=cores).cpu.gbps for cores in (1, 2, 8, 24, 1000)]
    assert speeds == sorted(speeds)
    assert speeds[0] == pytest.approx(1 / (1 / 29 + 1 / 125))
    assert 120 < speeds[-1] < 125


def test_costs_of_mixtral_by_hand():
    cpu = replace(MACHINE.cpu, core_gbps=25.0, socket_gbps=100.0, cores=4)
    machine = replace(MACHINE, cpu=cpu, layer_us=500.0)
    costs = machine.cost_model(load_shape("mixtral-8x7b"), "bf16")
    assert costs.block_bytes == 352_321_536
    # 50 GB/s: 7046 us for one token; a second token costs its arithmetic alone.
    assert costs.cpu.us(1, 1) == pytest.approx(20 + 352_321.536 / 50)
    more = costs.cpu.us(1, 2) - costs.cpu.us(1, 1)
    assert more == pytest.approx(2 * 176_160_768 / (4 * 60e9) * 1e6)
    assert costs.copy_us(shared=False) == pytest.approx(20 + 352_321.536 / 25.1)
    assert costs.dense_us_per_layer == pytest.approx(500 + 2 * 41_943_040 / 1008e3)


def test_arithmetic_limits_a_slow_core():
    machine = replace(MACHINE, cpu=replace(MACHINE.cpu, core_gflops=0.1, cores=1))
    costs = machine.cost_model(load_shape("olmoe-1b-7b"), "bf16")
    assert costs.cpu.expert_us == 0
    assert costs.cpu.us(1, 3) == pytest.approx(20 + 3 * costs.cpu.token_us)


def test_a_file_round_trips(tmp_path):
    write_machine(tmp_path / "m.yaml", MACHINE, "copied\nin a test")
    text = (tmp_path / "m.yaml").read_text()
    assert text.startswith("# copied\n# in a test\n")
    assert load_machine(tmp_path / "m.yaml") == MACHINE


def test_a_calibration_becomes_a_file_that_predicts_the_same(tmp_path):
    shape = load_shape("mixtral-8x7b")
    costs = CostModel(
        cpu=SideCost(15, 8000, 900),
        gpu=SideCost(40, 400, 6),
        copy_call_us=12,
        copy_gbps=24,
        copy_gbps_shared=20,
        cpu_shared_factor=1.2,
        block_bytes=shape.block_bytes("bf16"),
        dense_us_per_layer=900,
        step_us=5000,
    )
    machine = calibrated_machine(costs, shape, name="this one", cores=8, gpu_memory_gb=24.0)
    write_machine(tmp_path / "m.yaml", machine, "measured")
    again = load_machine(tmp_path / "m.yaml").cost_model(shape, "bf16")
    for hits in (0, 1, 2):
        expected = costs.decode_layer_us(hits, 2 - hits, copying=True)
        assert again.decode_layer_us(hits, 2 - hits, copying=True) == pytest.approx(expected, 1e-3)
    # The head of a model of many layers is one head.
    assert again.step_us == pytest.approx(5000, 1e-3)
    prompt = dict.fromkeys(range(8), 90)
    assert again.split({}, prompt) == costs.split({}, prompt)
    assert again.cpu_us([90] * 8) == pytest.approx(costs.cpu_us([90] * 8), 1e-3)
    assert again.gpu.us_of([90] * 8) == pytest.approx(costs.gpu.us_of([90] * 8), 1e-3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d["cpu"].pop("cores"), "Machine.cpu: .* missing .* 'cores'"),
        (lambda d: d.pop("gpu"), "Machine: .* missing .* 'gpu'"),
        (lambda d: d.update(step=5), "Machine: unknown field 'step'"),
        (
            lambda d: d["cpu"].update(core_gbps="fast"),
            "cpu.core_gbps: expected float, found 'fast'",
        ),
        (lambda d: d["cpu"].update(core_gbps=True), "cpu.core_gbps: expected float, found True"),
        (lambda d: d["cpu"].update(core_gbps=10**400), "too large"),
        (lambda d: d["cpu"].update(core_gbps=0), "cpu.core_gbps: expected 1e-06 to 1e.09, found 0"),
        (lambda d: d["cpu"].update(core_gbps=float("nan")), "cpu.core_gbps: .* found nan"),
        (lambda d: d["cpu"].update(cores=0), "cpu.cores: expected 1 to 1e.09, found 0"),
        (lambda d: d["cpu"].update(cores=2.5), "cpu.cores: expected int, found 2.5"),
        (lambda d: d["gpu"].update(gbps=float("inf")), "gpu.gbps: .* found inf"),
        (lambda d: d["gpu"].update(tflops=1e-300), "gpu.tflops: .* found 1e-300"),
        (lambda d: d.update(layer_us=1e300), "layer_us: expected 0 to 1e.09"),
        (lambda d: d.update(step_us=-1), "step_us: expected 0 to 1e.09"),
        (lambda d: d["watts"].update(idle=-1), "watts.idle: expected 0 to 1e.09"),
        (lambda d: d["bus"].update(shared=-1), "bus.shared: expected 1e-06 to 1, found -1"),
        (lambda d: d["bus"].update(shared=7), "bus.shared: expected 1e-06 to 1, found 7"),
        (lambda d: d["bus"].update(cpu_shared_factor=0.9), "bus.cpu_shared_factor: expected 1 to"),
        (lambda d: d["bus"].update(gbps=25), "bus.gbps: expected Mapping, found 25"),
        (lambda d: d["bus"].update(pcie=6), "bus.gbps: .* by PCIe generation, 6 among them"),
        (lambda d: d["bus"].update(gbps={4: None}), "bus.gbps.4: expected float, found None"),
        (lambda d: d["bus"].update(gbps={4: float("inf")}), "bus.gbps: .* found inf"),
        (lambda d: d["bus"].update(gbps={4: 25, "fast": 50}), "by PCIe generation"),
    ],
)
def test_a_wrong_file_is_a_sentence(tmp_path, change, sentence):
    data = yaml.safe_load((HARDWARE / "rtx4090.yaml").read_text())
    change(data)
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(UserError, match=sentence):
        load_machine(tmp_path / "m.yaml")


def test_a_few_lines_do_not_stand_for_more_than_memory_holds(tmp_path):
    """Each name of this YAML is nine of the last: their text would have 9^12 entries."""
    lines = ["- &n0 [x]", *(f"- &n{i} [{', '.join([f'*n{i - 1}'] * 9)}]" for i in range(1, 13))]
    (tmp_path / "m.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="refers to another place of itself"):
        load_machine(tmp_path / "m.yaml")


def test_missing_files_and_impossible_variants(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="expected a hardware file"):
        load_machine(tmp_path / "none.yaml")
    (tmp_path / "m.yaml").write_text("a: [")
    with pytest.raises(UserError, match="in YAML"):
        load_machine(tmp_path / "m.yaml")
    (tmp_path / "m.yaml").write_text("just text")
    with pytest.raises(UserError, match="expected an object, found 'just text'"):
        load_machine(tmp_path / "m.yaml")
    for endless in ("/dev/zero", tmp_path / "pipe"):
        with pytest.raises(UserError, match="found a folder, device or pipe"):
            load_machine(Path(endless))
    with pytest.raises(UserError, match="generation of 3, 4, 5, found 2"):
        MACHINE.variant(pcie=2)


@pytest.mark.parametrize("name", yaml.safe_load(SHAPES_FILE.read_text()))
@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4"])
def test_block_sizes_are_those_of_the_prepared_folder(name, weight_format):
    shape = load_shape(name)
    layout = block_layout(weight_format, shape.hidden, shape.intermediate, True, False)
    assert shape.block_bytes(weight_format) == pytest.approx(layout.block_bytes, rel=0.01)


def test_published_shapes():
    mixtral = load_shape("mixtral-8x7b")
    assert (mixtral.n_layers, mixtral.n_experts, mixtral.top_k) == (32, 8, 2)
    assert load_shape("phi-3.5-moe").block_bytes("bf16") == 157_286_400
    assert load_shape("deepseek-v2-lite").n_layers == 26  # the first of 27 is dense
    total = mixtral.dense_bytes() + 2 * 32 * 8 * mixtral.expert_weights
    assert total / 2 == pytest.approx(46.7e9, rel=0.01)
    with pytest.raises(UserError, match="found 'gpt-9'"):
        load_shape("gpt-9")
