"""The listing is the architecture: project modules import modules of a lower level only.

`docs/ARCHITECTURE.md` shows the same levels to readers; a test below keeps the two from drifting.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"

# Level -> modules. A module imports modules of lower levels only; two of one level never meet.
LEVELS: dict[int, frozenset[str]] = {
    level: frozenset(names.split())
    for level, names in {
        12: "main prepare simulator plots patterns",
        11: "run",
        10: "machine_measurement run_prompts",
        9: "engine",
        8: "moe_dispatcher accelerator_setup",
        7: "layer_step machine_costs dummy_model prepare_model cpu_modules",
        6: (
            "accelerator model_loader machine_probes preflight tokenization generation "
            "xformers_attention preparation cpu_self_attention"
        ),
        5: (
            "gpu_experts cpu_experts onednn_choice dense_plan companion_files output_folder "
            "simulator_arguments cpu_norm cpu_router"
        ),
        4: (
            "activation_probe checkpoint expert_store expert_fetcher triton_experts "
            "onednn_experts cpu_linear cpu_attention source_checkpoint autotune sweep paper "
            "comparison_figures destinations decode_kernels"
        ),
        3: (
            "torch_experts cpu_kernels shards mistral_native weight_conversion "
            "moe_convention miss_trial replay reports run_figures trace_reader triton_kernels"
        ),
        2: (
            "arguments prompts expert_format expert_cache plan calibration kernel_library "
            "source_files report_tables belady time_model workload machine_file "
            "routing_patterns recorded_routing forced_routing trace_formats"
        ),
        1: (
            "config quantization safetensors_file replacement_policies cost_model traces "
            "model_shapes summary run_files figures hardware argument_parser kernel_build "
            "model_folders handoff json_files model_description"
        ),
        0: (
            "errors version recorder sensors provenance streams device_memory "
            "next_layer nvtx_ranges interruption prerequisites steadiness host_memory "
            "run_progress terminal packed_routing kv_cache prompt_cells report_paths"
        ),
    }.items()
}
LEVEL_OF = {name: level for level, names in LEVELS.items() for name in names}

# Modules that plan or count and so must run, and be tested, without tensors.
PURE = frozenset(["errors", "expert_cache", "replacement_policies"])

# `engine` builds these and hands them to the dispatcher; none of them knows another.
LEAVES = {
    "expert_store",
    "expert_cache",
    "expert_fetcher",
    "gpu_experts",
    "cpu_experts",
    "recorder",
}

# Variables that belong to the user's system or shell. The project has none of its own.
FOREIGN_VARIABLES = frozenset({"OMP_NUM_THREADS", "CXX", "XDG_CACHE_HOME", "NO_COLOR", "PATH"})

MUTATORS = {"append", "add", "extend", "insert", "update", "setdefault", "pop", "remove", "clear"}


def modules() -> dict[str, ast.Module]:
    return {path.stem: ast.parse(path.read_text(), str(path)) for path in SOURCE.glob("*.py")}


MODULES = modules()


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(top-level name, line) of every import, also those inside functions and TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import in a flat folder"
            assert node.module is not None
            yield node.module.split(".")[0], node.lineno


def attribute_of(node: ast.AST, module: str, name: str) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == name
        and isinstance(node.value, ast.Name)
        and node.value.id == module
    )


def environment_keys(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(key, line) of every read or write of one environment variable; '?' for a computed key."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and attribute_of(node.value, "os", "environ"):
            key = node.slice
        elif isinstance(node, ast.Call) and (
            attribute_of(node.func, "os", "getenv")
            or (
                isinstance(node.func, ast.Attribute)
                and attribute_of(node.func.value, "os", "environ")
                and node.func.attr in {"get", "setdefault", "pop"}
            )
        ):
            key = node.args[0]
        else:
            continue
        literal = isinstance(key, ast.Constant) and isinstance(key.value, str)
        yield (key.value if literal else "?"), node.lineno


def test_every_module_has_a_level() -> None:
    unknown = set(MODULES) - set(LEVEL_OF)
    gone = set(LEVEL_OF) - set(MODULES)
    assert not unknown, f"give these a level here and in docs/ARCHITECTURE.md: {sorted(unknown)}"
    assert not gone, f"no longer in src/: {sorted(gone)}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name: str) -> None:
    wrong = [
        f"src/{name}.py:{line} (level {LEVEL_OF[name]}) imports {other} (level {LEVEL_OF[other]})"
        for other, line in imported(MODULES[name])
        if other in LEVEL_OF and LEVEL_OF[other] >= LEVEL_OF[name]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_leaves_do_not_know_each_other(name: str) -> None:
    assert not {other for other, _ in imported(MODULES[name])} & LEAVES


def test_no_import_escapes_the_walk() -> None:
    tree = ast.parse("import a.b\nif TYPE_CHECKING:\n    from c import d\ndef f():\n    import e")
    assert [name for name, _ in imported(tree)] == ["a", "c", "e"]


@pytest.mark.parametrize("name", sorted(PURE))
def test_planning_and_counting_need_no_tensors(name: str) -> None:
    heavy = {"torch", "numpy", "transformers"}
    reached, waiting = set(), [name]
    while waiting:
        current = waiting.pop()
        for other, _ in imported(MODULES[current]):
            if other in MODULES and other not in reached:
                waiting.append(other)
            reached.add(other)
    assert not reached & heavy, f"{name} reaches {sorted(reached & heavy)}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_environment_variable_of_our_own(name: str) -> None:
    wrong = [
        f"src/{name}.py:{line} uses the environment variable {key}"
        for key, line in environment_keys(MODULES[name])
        if key not in FOREIGN_VARIABLES
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "examples", "."])
def test_no_sys_path_tricks(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / folder).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if attribute_of(node, "sys", "path")
    ]
    assert not wrong, "sys.path is set by pytest's configuration and by nobody else: " + str(wrong)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_mutable_module_state(name: str) -> None:
    """No `global`, no lower-case module-level container, and tables in capitals stay as written."""
    tree = MODULES[name]
    containers = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    wrong, tables = [], set()
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign):
            targets, value = [node.target], node.value
        else:
            continue
        if not isinstance(value, containers):
            continue
        for target in targets:
            assert isinstance(target, ast.Name)
            if target.id == target.id.upper() or target.id == "__all__":
                tables.add(target.id)
            else:
                wrong.append(f"line {node.lineno}: {target.id} is a mutable module-level container")
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            wrong.append(f"line {node.lineno}: global {', '.join(node.names)}")
        elif isinstance(node, ast.Attribute | ast.Subscript):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            changes = (
                node.attr in MUTATORS
                if isinstance(node, ast.Attribute)
                else isinstance(node.ctx, ast.Store | ast.Del)
            )
            if owner in tables and changes:
                wrong.append(f"line {node.lineno}: changes {owner}")
    assert not wrong, f"src/{name}.py: " + "; ".join(wrong)


def test_architecture_page_shows_the_same_levels() -> None:
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    shown: dict[int, frozenset[str]] = {}
    for level, cell in re.findall(r"^\| (\d+) \| ([^|]+) \|", page, flags=re.MULTILINE):
        shown[int(level)] = frozenset(re.findall(r"`(\w+)`", cell))
    assert shown == LEVELS
