"""The listing is the architecture: a wing imports wings above it in WINGS only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "moe_offload"

# Each wing and what it may import; "" is the ground: the modules beside the wings.
WINGS = {
    "": [],
    "machine": [""],
    "checkpoint": [""],
    "kernels": ["", "checkpoint"],
    "experts": ["", "machine", "checkpoint", "kernels"],
    "simulation": ["", "experts"],
    "model": ["", "checkpoint", "kernels", "experts", "simulation"],
    "engine": ["", "machine", "checkpoint", "kernels", "experts", "simulation", "model"],
    "report": ["", "machine", "experts", "simulation"],
    "commands": [
        *("", "machine", "checkpoint", "kernels", "experts", "simulation"),
        *("model", "engine", "report"),
    ],
}

# What answers before torch is loaded, and what plans and counts without tensors.
WITHOUT_TORCH = [
    "commands.check",
    "commands.draw",
    "commands.generate",
    "commands.prepare",
    "commands.serve",
    "commands.simulate",
]
WITHOUT_TENSORS = ["errors", "experts.cache", "prerequisites"]

# Variables that belong to the user's system or shell. The project has none of its own.
FOREIGN_VARIABLES = {
    "THP_MEM_ALLOC_ENABLE",
    *("OMP_NUM_THREADS", "CXX", "XDG_CACHE_HOME", "NO_COLOR", "PATH"),
    "RAY_USAGE_STATS_ENABLED",
    *("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    *("SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    *("SKYPILOT_JOB_RANK", "SKYPILOT_NUM_JOBS", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
    "SKYPILOT_NODE_IPS",
}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def wing_of(module: str) -> str:
    return module.partition(".")[0] if module.partition(".")[0] in WINGS else ""


MODULES = {name_of(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def imported(tree: ast.AST) -> Iterator[str]:
    """The dotted name of every import, also those inside functions and TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno}: a relative import"
            for alias in node.names:
                module = f"{node.module}.{alias.name}".removeprefix("moe_offload.")
                is_module = node.module.startswith("moe_offload") and module in MODULES
                yield f"moe_offload.{module}" if is_module else node.module


def own_imports(tree: ast.AST) -> set[str]:
    names = (name.removeprefix("moe_offload").removeprefix(".") for name in imported(tree)
             if name.split(".")[0] == "moe_offload")  # fmt: skip
    return {name for name in names if name}  # the package itself holds the version alone


def at_top(name: str) -> ast.Module:
    """What importing the module runs: no functions' bodies, nothing for type checkers alone."""
    kept = []
    for node in MODULES[name].body:
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not for_types and not isinstance(node, ast.FunctionDef | ast.ClassDef):
            kept.append(node)
    return ast.Module(kept, [])


def reached(name: str) -> set[str]:
    """Top-level packages that importing this module loads, through modules of our own."""
    seen, waiting, packages = {name}, [name], set()
    while waiting:
        tree = at_top(waiting.pop())
        packages |= {found.split(".")[0] for found in imported(tree)}
        new = {found for found in own_imports(tree) if found in MODULES} - seen
        seen |= new
        waiting += new
    return packages


def is_attribute(node: ast.AST, module: str, name: str) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) == f"{module}.{name}"


def test_every_folder_is_a_wing() -> None:
    assert {wing_of(name) for name in MODULES} == set(WINGS)
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert folders == set(WINGS) - {""}


def test_the_architecture_page_shows_this_house() -> None:
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    assert re.findall(r"^    (\w+)/ ", page, flags=re.MULTILINE) == list(WINGS)[1:]
    named = re.findall(rf"`((?:{'|'.join(list(WINGS)[1:])})/[\w/.]+)`", page)
    assert len(named) > 20
    assert not [name for name in named if not (PACKAGE / name).exists()]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_one_way(name: str) -> None:
    wing = wing_of(name)
    wrong = [
        other
        for other in own_imports(MODULES[name])
        if name and wing_of(other) not in [wing, *WINGS[wing]]
    ]
    assert not wrong, f"{name} imports {wrong}"


def test_no_circles() -> None:
    arrows = {name: own_imports(tree) for name, tree in MODULES.items() if name}
    try:
        list(TopologicalSorter(arrows).static_order())
    except CycleError as circle:
        raise AssertionError(" -> ".join(circle.args[1])) from circle


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_answers_at_once_loads_no_torch(name: str) -> None:
    assert not reached(name) & {"torch", "transformers"}


def test_a_run_loads_nothing_that_only_preparing_needs() -> None:
    assert "transformers" in reached("commands.run") and "gguf" not in reached("commands.run")


@pytest.mark.parametrize("name", WITHOUT_TENSORS)
def test_planning_and_counting_need_no_tensors(name: str) -> None:
    assert not reached(name) & {"torch", "numpy", "transformers"}


def test_no_import_escapes_the_walk() -> None:
    tree = ast.parse("import a.b\nif TYPE_CHECKING:\n    from c import d\ndef f():\n    import e")
    assert list(imported(tree)) == ["a.b", "c", "e"]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_environment_variable_of_our_own(name: str) -> None:
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Subscript) and is_attribute(node.value, "os", "environ"):
            key: ast.AST = node.slice
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            *("os.getenv", "os.environ.get", "os.environ.setdefault", "os.environ.pop"),
        ):
            key = node.args[0]
        else:
            continue
        literal = isinstance(key, ast.Constant) and key.value in FOREIGN_VARIABLES
        assert literal, f"{name}:{node.lineno} uses {ast.unparse(key)}"


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "examples"])
def test_no_sys_path_tricks(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if is_attribute(node, "sys", "path")
    ]
    assert not wrong, "sys.path is set by pytest's configuration and by nobody else: " + str(wrong)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_mutable_module_state(name: str) -> None:
    """No `global`, no lower-case container at a module's top."""
    containers = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    for node in MODULES[name].body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, containers):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            assert isinstance(target, ast.Name), ast.unparse(node)
            constant = target.id == target.id.upper() or target.id == "__all__"
            assert constant, f"{name}:{node.lineno}: {target.id} is a mutable container"
    assert not [node.lineno for node in ast.walk(MODULES[name]) if isinstance(node, ast.Global)]
