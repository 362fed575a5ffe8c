"""A GPU of pretence: CPU tensors marked as a GPU's, and every meeting of both kinds looked at.

A `GpuTensor` lies in host memory and says that it is on `cuda:0`. Python code that touches it goes
through `GpuTensor.__torch_function__`, which refuses what a GPU would refuse (operands on two
devices, an address handed to a CPU kernel) and notes every transfer and whatever else would hold
the host up. Values are computed as ever, so results can be compared with a run on the CPU. Streams
do nothing: order is not what this is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host_graph import HostGraph
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
# CUDA takes so little from pageable memory into the command itself, without holding the host up.
INLINE_BYTES = 1 << 16
EVENTS_APART_MS = 0.001

_READS = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "__array__"}
_SIZED_BY_VALUES = {"nonzero", "unique", "masked_select", "bincount", "equal", "allclose"}
_ANSWERS = {Tensor.device.__get__: GPU, Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False}


class WrongDeviceError(AssertionError):
    """What CUDA, or the process at an address that is not the host's, would have failed at."""


@dataclass
class Seen:
    """What went between host and GPU: bytes of each copy, and what held the host up."""

    to_host: list[int] = field(default_factory=list)
    to_gpu: list[int] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)  # on another GPU than the one that is used
    current: int = 0  # the current device
    forbids_waits: bool = False
    graph: HostGraph | None = None  # that is being recorded
    clock_ms: float = 0.0  # the GPU's own: what a test adds, and `EVENTS_APART_MS` at each event
    pinned: list[tuple[int, int]] = field(default_factory=list)

    def clear(self) -> None:
        for noted in (self.to_host, self.to_gpu, self.waits):
            noted.clear()

    def wait(self, what: str) -> None:
        self.waits.append(what)
        if self.forbids_waits or self.graph is not None:
            raise RuntimeError(f"the host would wait: {what}")

    def pin(self, pointer: int, n_bytes: int) -> None:
        self.pinned.append((pointer, pointer + n_bytes))

    def is_pinned(self, host: Tensor) -> bool:
        return any(a <= host.data_ptr() < b for a, b in self.pinned)

    def copy(self, target: Tensor, source: Tensor, non_blocking: bool) -> None:
        on_gpu = isinstance(target, GpuTensor), isinstance(source, GpuTensor)
        if on_gpu[0] == on_gpu[1] or source.is_meta:
            return
        host = source if on_gpu[0] else target
        (self.to_gpu if on_gpu[0] else self.to_host).append(source.nbytes)
        is_pinned = self.is_pinned(host)
        is_inline = on_gpu[0] and source.nbytes <= INLINE_BYTES
        if not non_blocking or not (is_pinned or is_inline):
            what = "non_blocking" if non_blocking else "blocking"
            self.wait(f"{what} copy of {source.nbytes} bytes, pinned {is_pinned}")


class GpuTensor(Tensor):
    """A tensor in host memory that says it is on `GPU`; `seen` is set while one is pretended."""

    seen: Seen

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ANSWERS:
            return _ANSWERS[func]
        name = getattr(func, "__name__", "")
        plain = super().__torch_function__
        if name == "to":
            return cls._to(*args, **kwargs)
        if name in ("cpu", "cuda"):
            return cls._to(args[0], "cpu" if name == "cpu" else GPU)
        if name == "copy_":
            blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            cls.seen.copy(args[0], args[1], not blocking)
            kind = type(args[0])
            out = plain(func, types, args, kwargs)
            return out if kind is GpuTensor else out.as_subclass(Tensor)
        cls._refuse_two_devices(func, name, (args, kwargs))
        if name in _READS or name in _SIZED_BY_VALUES or (name == "where" and len(args) == 1):
            cls.seen.wait(name)
        if name in ("__getitem__", "__setitem__"):
            cls._look_at_index(args[1])
        if name == "data_ptr":
            raise WrongDeviceError("an address on the GPU was asked for by code of the host")
        return plain(func, types, args, kwargs)

    @classmethod
    def _refuse_two_devices(cls, func: Any, name: str, operands: Any) -> None:
        for operand in tree_leaves(operands):
            on_host = isinstance(operand, Tensor) and not isinstance(operand, GpuTensor)
            if on_host and operand.dim() and not operand.is_meta:
                raise WrongDeviceError(f"{name or func}: one operand is on the GPU, one not")

    @classmethod
    def _look_at_index(cls, index: Any) -> None:
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, list):
                cls.seen.wait("indexed by a list, which is sent")
            if isinstance(part, Tensor) and part.dtype == torch.bool:
                cls.seen.wait("indexed by a mask, whose sum is read")

    @classmethod
    def _to(cls, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        target = tensor.device if device is None else device
        host = tensor.as_subclass(Tensor)
        moved = target.type != tensor.device.type
        out = host.to(dtype or tensor.dtype, copy=copy or moved)
        if target.type == "cuda":
            out = tensor if out is host else out.as_subclass(GpuTensor)
        if moved:
            cls.seen.copy(out, tensor, non_blocking)
        return out


class _Factories(TorchFunctionMode):
    """Makes on the host, marked, what is asked for on a GPU; notes what is to be pinned."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "to" and isinstance(args[0], GpuTensor):
            return func(*args, **kwargs)
        if name == "to":
            device, *_ = torch._C._nn._parse_to(
                *(a.device if isinstance(a, Tensor) else a for a in args[1:]),
                **{k: v for k, v in kwargs.items() if k != "copy"},
            )
            if device is not None and device.type == "cuda":
                return GpuTensor._to(*args, **kwargs)
        elif name == "copy_" and isinstance(args[1], GpuTensor):
            return func(*args, **kwargs)
        on_gpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if on_gpu:
            kwargs["device"] = "cpu"
        pinned = kwargs.pop("pin_memory", False)
        out = func(*args, **kwargs)
        if pinned:
            self._seen.pin(out.data_ptr(), out.nbytes)
        return out.as_subclass(GpuTensor) if on_gpu else out


class _Stream:
    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    def synchronize(self) -> None:
        self._seen.wait("stream")

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...


class _Event:
    def __init__(self, seen: Seen, external: bool = False) -> None:
        self._seen = seen
        self._is_external = external
        self._time_ms: float | None = None

    def record(self, stream: Any) -> None:
        assert isinstance(stream, _Stream)
        if self._seen.graph is None:
            self._mark()
        else:
            assert self._is_external, "in a graph such an event orders, and has no time"
            self._seen.graph.add(self._mark)

    def _mark(self) -> None:
        self._seen.clock_ms += EVENTS_APART_MS
        self._time_ms = self._seen.clock_ms

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._seen.wait("event")

    def elapsed_time(self, later: _Event) -> float:
        assert self._time_ms is not None and later._time_ms is not None, "never recorded"
        return later._time_ms - self._time_ms


class _Runtime:
    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    def cudaHostRegister(self, pointer: int, n_bytes: int, flags: int) -> int:
        self._seen.pin(pointer, n_bytes)
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        return 0


@contextmanager
def pretended_gpu(patch: pytest.MonkeyPatch, gpu_bytes: int = 1 << 30) -> Iterator[Seen]:
    """Inside, torch sees a GPU of `gpu_bytes`, all of them free."""
    seen = Seen()
    GpuTensor.seen = seen
    stream = _Stream(seen)

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        before, seen.current = seen.current, wanted.index
        yield
        seen.current = before

    def current_stream(device: torch.device | None = None) -> _Stream:
        if (seen.current if device is None else device.index) != GPU.index:
            seen.elsewhere.append("stream")
        return stream

    @contextmanager
    def entered(_: _Stream) -> Iterator[None]:
        yield

    for name, stand_in in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "current_device": lambda: seen.current,
        "device": device,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device: SimpleNamespace(uuid="none"),
        "mem_get_info": lambda device=None: (gpu_bytes, gpu_bytes),
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: seen.wait("device"),
        "current_stream": current_stream,
        "stream": entered,
        "Stream": lambda device=None: _Stream(seen),
        "Event": lambda external=False, **_: _Event(seen, external),
        "cudart": lambda: _Runtime(seen),
        "CUDAGraph": lambda: HostGraph(lambda graph: setattr(seen, "graph", graph)),
        "graph_pool_handle": lambda: None,
        "set_sync_debug_mode": lambda mode: setattr(seen, "forbids_waits", mode == "error"),
    }.items():
        patch.setattr(torch.cuda, name, stand_in)
    with _Factories(seen):
        yield seen
