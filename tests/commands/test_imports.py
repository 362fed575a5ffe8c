"""What the commands load of torch and transformers, and how."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from moe_offload.commands import imports
from moe_offload.commands.imports import importing

SRC = Path(imports.__file__).parents[2]

LOADED = """
import sys
from moe_offload.commands import imports
if {is_broken}:
    imports._unmarked = None  # what a version might ask and does not get
with imports.importing():
    import moe_offload.commands.run
compiler = [name for name in sys.modules if name.startswith("torch._dynamo")]
assert bool(compiler) == {is_broken}, compiler
assert ("sympy" in sys.modules) == {is_broken}
import torch
from transformers import masking_utils, models
with masking_utils.TransformGetItemToIndex():
    pass
assert torch._dynamo.disable(reason="none") is not imports._unmarked
assert torch.distributed.is_available()
from transformers.utils.import_utils import define_import_structure
assert define_import_structure(models.__file__)
"""


@pytest.mark.parametrize("is_broken", [False, True])
def test_the_compiler_is_not_loaded_or_all_is(is_broken: bool) -> None:
    program = LOADED.format(is_broken=is_broken)
    command, path = [sys.executable, "-c", program], {"PYTHONPATH": str(SRC)}
    done = subprocess.run(command, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_imports_are_not_searched_for_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "_import_transformers", lambda: None)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() > 0
    gc.unfreeze()
    with pytest.raises(KeyboardInterrupt), importing():
        raise KeyboardInterrupt
    assert gc.isenabled() and gc.get_freeze_count() == 0
