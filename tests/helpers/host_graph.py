"""A CUDA graph acted out on host tensors: what is recorded are torch's operations and their memory.

As on a card, recording computes nothing: results are garbage until the replay, and what was written
in place is as before. A replay reads and writes the same memory with the same Python values as when
it was recorded, so whatever was no tensor then is stale later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HostGraph:
    """`torch.cuda.CUDAGraph`; `on_recording` is told which graph is recorded from now on."""

    def __init__(self, on_recording: Callable[[HostGraph | None], None] = lambda _: None) -> None:
        self._on_recording = on_recording
        self._recording = _Recording()

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        self._on_recording(self)
        self._recording.__enter__()

    def capture_end(self) -> None:
        self._recording.__exit__(None, None, None)
        self._on_recording(None)
        self._recording.undo()

    def add(self, call: Callable[[], object]) -> None:
        """Record what is no operation of torch, such as an event."""
        self._recording.calls.append((call, (), {}, []))

    def replay(self) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            for function, args, kwargs, results in self._recording.calls:
                out = function(*args, **kwargs)
                for result, new in zip(results, tree_leaves(out), strict=False):
                    if result is not None:
                        result.copy_(new)


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        # (operation, arguments, keywords, the results that are no view of an argument)
        self.calls: list[tuple[Any, Any, Any, list[Tensor | None]]] = []
        self._before: list[tuple[Tensor, Tensor]] = []  # what was written to, and what it held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        operands = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        for argument, value in zip(func._schema.arguments, args, strict=False):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(value, Tensor):
                self._before.append((value, value.clone()))
        out = func(*args, **kwargs)
        known = {_memory(operand) for operand in operands}
        results = [
            one if isinstance(one, Tensor) and _memory(one) not in known else None
            for one in tree_leaves(out)
        ]
        if any(result is not None for result in results) or func._schema.is_mutable:
            self.calls.append((func, args, kwargs, results))
        return out

    def undo(self) -> None:
        """Leave memory as it is after recording: nothing has been computed."""
        for written, held in reversed(self._before):
            written.copy_(held)
        for _, _, _, results in self.calls:
            for result in results:
                if result is not None and result.is_floating_point():
                    result.fill_(float("nan"))


def _memory(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.untyped_storage().data_ptr()
