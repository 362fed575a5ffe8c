"""torch and transformers loaded without what none of the commands calls.

transformers imports torch's compiler, for decorators that tell it of functions, and torch's
distributed tensors, to know one when it sees it; with what those import that is a thousand modules.
And it reads all of its model files, twice. A program that uses the package from Python gets
transformers as it is.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Final

_COMPILER: Final = "torch._dynamo"
_TRACED: Final = f"{_COMPILER}._trace_wrapped_higher_order_op"


@contextmanager
def importing() -> Iterator[None]:
    """Inside, the two are loaded, and Python does not look for cycles meanwhile.

    Imports make a million objects and no garbage: to look for it is time lost.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        _import_transformers()
        yield
        gc.freeze()  # nor are they looked at later, but for the end, when libraries count leaks
        atexit.register(gc.unfreeze)
    finally:
        gc.enable()


def _import_transformers() -> None:
    """A version that asks the stand-ins for more than they have is left to whoever imports it."""
    finder = _ReadsOnce()
    sys.meta_path.insert(0, finder)
    try:
        with suppress(ImportError, AttributeError, TypeError), _without_compiler():
            for name in ("modeling_utils", "masking_utils"):
                import_module(f"transformers.{name}")
            return
    finally:
        sys.meta_path.remove(finder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        del sys.modules[name]


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Inside, stand-ins are in the compiler's place, and torch knows of one process alone."""
    distributed: Any = import_module("torch.distributed")
    compiler: Any = ModuleType(_COMPILER)
    compiler.__path__ = []
    compiler.allow_in_graph = compiler.assume_constant_result = compiler.disable = _unmarked
    traced: Any = ModuleType(_TRACED)
    traced.TransformGetItemToIndex = _transform_get_item_to_index
    is_available = distributed.is_available
    distributed.is_available = lambda: False
    sys.modules |= {_COMPILER: compiler, _TRACED: traced}
    try:
        yield
    finally:
        distributed.is_available = is_available
        del sys.modules[_COMPILER], sys.modules[_TRACED]


def _unmarked(function: Any = None, *_: object, **__: object) -> Any:
    """A decorator, with arguments or without, that does nothing."""
    return function or _unmarked


def _transform_get_item_to_index() -> Any:
    """The real one, which few masks need."""
    return import_module(_TRACED).TransformGetItemToIndex()


class _ReadsOnce(MetaPathFinder):
    """Lets transformers remember what it found in a folder of model files."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers.utils.import_utils":
            return None
        spec = PathFinder.find_spec(fullname, path)
        loader: Any = spec and spec.loader
        execute = loader.exec_module

        def execute_and_wrap(module: Any) -> None:
            execute(module)
            read: Callable[[Path], Any] = cache(module.create_import_structure_from_path)
            module.create_import_structure_from_path = lambda path: read(
                Path(path).parent if Path(path).is_file() else Path(path)
            )

        loader.exec_module = execute_and_wrap
        return spec
