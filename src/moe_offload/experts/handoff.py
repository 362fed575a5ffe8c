"""Moves one layer's routing and hidden state to the host, and the CPU's result back.

With a GPU this is one device-to-host copy and one host-to-device copy per layer through pinned
staging memory; on the CPU nothing moves.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from moe_offload.machine.device_memory import is_out_of_memory


class HostHandoff:
    """Staging memory for one model; grows to the largest prompt seen.

    Not thread-safe. A result handed to `to_device` is copied asynchronously; its memory is
    reused by the next layer only after that layer's `to_host`, which waits for the stream, so no
    copy still reads it.
    """

    def __init__(self) -> None:
        self._inbox = torch.empty(0, dtype=torch.uint8)
        self._result = torch.empty(0, dtype=torch.float32)

    def to_host(self, hidden: Tensor, *routing: Tensor) -> list[Tensor]:
        """`hidden` [T, H] and the small `routing` tensors, contiguous on the host.

        On a GPU all travel in one buffer, and the call waits for the current stream.
        """
        if hidden.device.type == "cpu":
            return [part.contiguous() for part in (hidden, *routing)]
        parts = sorted((hidden, *routing), key=lambda part: -part.element_size())
        sources = [part.contiguous().view(torch.uint8).flatten() for part in parts]
        n_bytes = sum(source.numel() for source in sources)
        if self._inbox.numel() < n_bytes:
            self._inbox = _staging(n_bytes, torch.uint8)
        inbox = self._inbox[:n_bytes]
        _copy_joined(sources, inbox)
        torch.cuda.current_stream(hidden.device).synchronize()
        host = {}
        start = 0
        for part in parts:  # widest elements first, so that every view is aligned
            end = start + part.numel() * part.element_size()
            host[id(part)] = inbox[start:end].view(part.dtype).view(part.shape)
            start = end
        return [host[id(part)] for part in (hidden, *routing)]

    def result(self, n_tokens: int, hidden_size: int, device: torch.device) -> Tensor:
        """Host memory for the CPU's output, fp32 [T, H]: pinned and reused for a GPU, else new."""
        if device.type == "cpu":  # it may become the layer's output, which callers may keep
            return torch.empty(n_tokens, hidden_size)
        size = n_tokens * hidden_size
        if self._result.numel() < size:
            self._result = _staging(size, torch.float32)
        return self._result[:size].view(n_tokens, hidden_size)

    def to_device(self, result: Tensor, device: torch.device) -> Tensor:
        """`result` on `device`, asynchronously on a GPU."""
        return result if device.type == "cpu" else result.to(device, non_blocking=True)


def _copy_joined(sources: list[Tensor], inbox: Tensor) -> None:
    """The `sources`, uint8, one after the other into `inbox`: one copy, or one each.

    A GPU without room to join a long prompt's on the device sends each by itself.
    """
    try:
        inbox.copy_(torch.cat(sources), non_blocking=True)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        places = inbox.split([source.numel() for source in sources])
        for place, source in zip(places, sources, strict=True):
            place.copy_(source, non_blocking=True)


def _staging(size: int, dtype: torch.dtype) -> Tensor:
    """Pinned memory; where the system refuses to lock more, pageable: slower, not wrong.

    Its copies then hold the host up until they are staged, and say so once.
    """
    with torch.inference_mode(False):  # kept, so it must serve callers in either mode
        try:
            return torch.empty(size, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            print(
                f"warning: no memory could be pinned to hand layers over ({_first_line(error)}): "
                "it goes through pageable memory, slower",
                file=sys.stderr,
            )
            return torch.empty(size, dtype=dtype)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
