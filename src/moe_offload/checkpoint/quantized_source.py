"""Quantised checkpoints, read as the ordinary ones that they stand for.

`LAYOUTS` is the table: how a layout's tensors are called, and in which form its codes lie. A weight
is `(codes - zeros) * scales`, computed in fp32 when it is read, one matrix at a time (of stacked
experts one expert). Its scales are one for each block of rows x columns, or one for each group of
columns that a `g_idx` names. What these stood for before anybody quantised them is not known: the
stored numbers are the model.

    form       codes of W [R, C]                 zeros                  published as
    elements   fp8 or int8 [R, C]                int8                   FP8, MXFP8, int8
    nibbles    e2m1, bytes [R, C/2]              -                      NVFP4, MXFP4, DeepSeek V4
    blocks     e2m1, uint8 [R, C/32, 16]         -                      gpt-oss, where it is W^T
    columns    int32 [R, C/n]                    int32 [R/n, groups]    compressed-tensors
    gptq       int32 [C/n, R]                    int32 [groups, R/n]    GPTQ
    awq        int32 [C, R/8]                    int32 [groups, R/8]    AWQ

n is 32 / bits. The first code is in the lowest bits; of awq's eight the order is 0 2 4 6 1 3 5 7.
Scales of a byte are powers of two, 2^(byte - 127) (E8M0).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final

import torch
from torch import Tensor

from moe_offload.checkpoint.quantization import Grid, GridKind
from moe_offload.checkpoint.source_files import LazyTensor, Quantised
from moe_offload.errors import UserError

_E8M0: Final = (torch.uint8, torch.float8_e8m0fnu)
_FP8: Final = (torch.float8_e4m3fn, torch.float8_e5m2)
_BYTES: Final = (torch.uint8, torch.int8)
_E2M1: Final = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
# Of each byte both numbers, the low nibble's first, as one element of eight bytes.
_E2M1_PAIRS: Final = torch.stack((_E2M1.repeat(16), _E2M1.repeat_interleave(16)), dim=-1).view(
    torch.float64
)[:, 0]
_AWQ_PLACES: Final = [0, 4, 1, 5, 2, 6, 3, 7]  # where column c of eight lies
# What activations and caches were quantised with: nothing here computes in that.
_ACTIVATIONS: Final = re.compile(r".*[._](input|output|activation|[qkv])_(global_)?scale(_ub)?")
_READABLE: Final = (
    "MXFP4, FP8, MXFP8, NVFP4, compressed-tensors, AWQ, GPTQ and AutoRound are read; download the "
    "model in one of these, or its unquantised version"
)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """uint8 [..., n * 32 / bits] from int32 [..., n], or from bytes: the lowest bits come first."""
    found: Tensor = words.contiguous().view(torch.uint8)
    if bits == 8:
        return found
    return torch.stack((found & 15, found >> 4), dim=-1).flatten(-2)


def _unpack_awq(words: Tensor, bits: int) -> Tensor:
    """uint8 [C, R] from int32 [C, R/8]."""
    eights = _unpack(words, bits).view(*words.shape, 8)
    return torch.stack([eights[..., place] for place in _AWQ_PLACES], dim=-1).flatten(-2)


def _e2m1(packed: Tensor, _: int) -> Tensor:
    """fp32 [R, 2 * n] from bytes [R, n]."""
    return _look_up(_E2M1_PAIRS, packed).view(torch.float32).view(len(packed), -1)


def _elements(codes: Tensor, _: int) -> Tensor:
    """int8 as it is, fp8 in fp32: torch's own conversion takes five times as long."""
    if codes.dtype == torch.int8:
        return codes
    numbers = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    return _look_up(numbers, codes).view(codes.shape)


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    """table[bytes of codes], flat; index_select is ten times as fast as an index in brackets."""
    return table.index_select(0, codes.contiguous().view(torch.uint8).flatten().int())


@dataclass(frozen=True)
class _Form:
    """How codes lie: `shape` is of what `codes` makes of a tensor, given the bits of a code."""

    kind: GridKind
    shape: Callable[[tuple[int, ...], int], tuple[int, int]]
    codes: Callable[[Tensor, int], Tensor]
    zeros: Callable[[Tensor, int], Tensor] = lambda stored, bits: stored
    n_dims: int = 2
    scales_transposed: bool = False
    becomes_transposed: bool = False


_ELEMENTS: Final = _Form("fp8", lambda shape, bits: (shape[0], shape[1]), _elements)
_NIBBLES: Final = _Form("e2m1", lambda shape, bits: (shape[0], shape[1] * 2), _e2m1)
_BLOCKS: Final = _Form(
    "e2m1",
    lambda shape, bits: (shape[0], shape[1] * shape[2] * 2),
    lambda blocks, bits: _e2m1(blocks.flatten(1), bits),
    n_dims=3,
    becomes_transposed=True,
)
_COLUMNS: Final = _Form(
    "int",
    lambda shape, bits: (shape[0], shape[1] * 32 // bits),
    _unpack,
    lambda zeros, bits: _unpack(zeros.t(), bits).t(),
)
_GPTQ: Final = _Form(
    "int",
    lambda shape, bits: (shape[1], shape[0] * 32 // bits),
    lambda words, bits: _unpack(words.t(), bits),
    lambda zeros, bits: _unpack(zeros, bits).t(),
    scales_transposed=True,
)
_AWQ: Final = _Form(
    "int",
    lambda shape, bits: (shape[1] * 8, shape[0]),
    lambda words, bits: _unpack_awq(words, bits).t(),
    lambda zeros, bits: _unpack_awq(zeros, bits).t(),
    scales_transposed=True,
)


@dataclass(frozen=True)
class Layout:
    """A row of the table: the names' ends, after a common stem, of the tensors of one weight.

    `codes` are of one of `dtypes`; `scale` is whichever is there. `factor` multiplies the scales,
    `divisor` divides them. `methods` limits it to these values of "quant_method".
    """

    codes: str
    dtypes: tuple[torch.dtype, ...]
    scale: tuple[str, ...]
    becomes: str
    form: _Form
    zeros: str = ""
    groups: str = ""
    factor: str = ""
    divisor: str = ""
    scale_dtypes: tuple[torch.dtype, ...] = ()
    methods: tuple[str, ...] = ()

    @property
    def optional(self) -> dict[str, str]:
        ends = {role: getattr(self, role) for role in ("zeros", "groups", "factor", "divisor")}
        return {role: end for role, end in ends.items() if end}


_WEIGHT_SCALES: Final = (".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight")
LAYOUTS: Final = (
    Layout("_blocks", (torch.uint8,), ("_scales",), "", _BLOCKS),
    Layout(
        ".weight_packed", (torch.int32,), (".weight_scale",), ".weight", _COLUMNS,
        zeros=".weight_zero_point", groups=".weight_g_idx",
    ),
    Layout(
        ".weight_packed", (torch.uint8,), (".weight_scale",), ".weight", _NIBBLES,
        divisor=".weight_global_scale",
    ),
    Layout(
        ".qweight", (torch.int32,), (".scales",), ".weight", _GPTQ,
        zeros=".qzeros", groups=".g_idx", methods=("gptq",),
    ),
    Layout(
        ".qweight", (torch.int32,), (".scales",), ".weight", _AWQ,
        zeros=".qzeros", methods=("awq",),
    ),
    Layout(".weight", _BYTES, _WEIGHT_SCALES, ".weight", _NIBBLES, scale_dtypes=_E8M0),
    Layout(
        ".weight", (torch.uint8,), (".weight_scale",), ".weight", _NIBBLES,
        factor=".weight_scale_2",
    ),
    Layout(
        ".weight", (*_FP8, torch.int8), _WEIGHT_SCALES, ".weight", _ELEMENTS,
        zeros=".weight_zero_point",
    ),
    Layout("_proj", _FP8, ("_proj_scale_inv", "_proj_scale"), "_proj", _ELEMENTS),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a `quantization_config` says that no tensor does.

    `bits` of an integer code, `block` of rows and columns that share a scale, where it says one;
    `zeros_less_one` are stored so (GPTQ's first format).
    """

    method: str
    bits: int = 4
    block: tuple[int, int] | None = None
    zeros_less_one: bool = False
    zeros_required: bool = False


def read_settings(found: Any, folder: str) -> Settings:
    """The settings of `quantization_config`; UserError, with a remedy, for what is not read.

    `folder` is what a message calls the checkpoint.
    """
    config = found if isinstance(found, Mapping) else {}
    method = str(config.get("quant_method", "an unknown method"))
    read = _METHODS.get(method)
    if read is None:
        raise UserError(f"{folder} is quantised with {method:.40}, which is not read: {_READABLE}")
    try:
        settings = read(method, config)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder} is quantised ({method}), and its quantization_config is not as {method} "
            f"writes it ({type(error).__name__}: {error!s:.100}); download config.json again"
        ) from error
    if isinstance(settings, str):
        raise UserError(
            f"{folder} is quantised with {method} in a way that is not read ({settings:.80}): "
            f"{_READABLE}"
        )
    return settings


def _from_fp8(method: str, config: Mapping[str, Any]) -> Settings | str:
    return Settings(method, block=_block(config.get("weight_block_size")))


def _block(found: Any) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where the config does not say."""
    if found is None:
        return None
    rows, columns = (int(one) for one in found)
    if rows < 1 or columns < 1:
        raise ValueError(f"blocks of {found}")
    return rows, columns


def _group(columns: Any) -> tuple[int, int] | None:
    """The same of a "group_size", which is -1 or missing where whole rows share one."""
    return _block((1, columns)) if columns not in (None, -1) else None


def _from_gptq(method: str, config: Mapping[str, Any]) -> Settings | str:
    bits = int(config["bits"])
    form = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if bits not in (4, 8) or form not in ("gptq", "gptq_v2"):
        return f"{bits} bits, format {form}"
    block = _group(config["group_size"])
    return Settings(method, bits, block, zeros_less_one=form == "gptq", zeros_required=True)


def _from_awq(method: str, config: Mapping[str, Any]) -> Settings | str:
    bits = int(config.get("bits") or config["w_bit"])
    form = str(config.get("version") or config.get("format") or "gemm").lower()
    if bits != 4 or form != "gemm":
        return f"{bits} bits, version {form}"
    block = _group(config.get("group_size") or config["q_group_size"])
    return Settings(method, bits, block, zeros_required=True)


def _from_auto_round(_: str, config: Mapping[str, Any]) -> Settings | str:
    """The layout of AWQ or of GPTQ; what it calls its own is GPTQ's second."""
    packing = str(config.get("packing_format") or config.get("backend") or "auto_round")
    kind = str(config.get("data_type") or "int")
    if kind != "int" or not packing.startswith(("auto_round", "auto_gptq", "auto_awq")):
        return f"{kind}, {packing}"
    if "awq" in packing:
        return _from_awq("awq", {**config, "version": "gemm"})
    form = "gptq" if "gptq" in packing else "gptq_v2"
    return _from_gptq("gptq", {**config, "checkpoint_format": form})


def _from_compressed_tensors(method: str, config: Mapping[str, Any]) -> Settings | str:
    form = str(config.get("format"))
    if "24" in form or "mxfp6" in form:
        return f"format {form}"
    if config.get("transform_config"):
        return "transform_config: its activations are rotated"
    sparsity = config.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        return f"sparsity {sparsity['format']}"
    weights = [group["weights"] for group in config["config_groups"].values() if group["weights"]]
    bits = {int(one["num_bits"]) for one in weights if one.get("type", "int") == "int"}
    if bits - {4, 8} or len(bits) > 1:
        return f"{' and '.join(map(str, sorted(bits)))} bits"
    blocks = {
        _block(one.get("block_structure")) or _group(one.get("group_size")) for one in weights
    }
    return Settings(
        method,
        bits=min(bits, default=4),
        block=blocks.pop() if len(blocks) == 1 else None,
        zeros_required=bool(weights) and not any(one.get("symmetric", True) for one in weights),
    )


_METHODS: Final[Mapping[str, Callable[[str, Mapping[str, Any]], Settings | str]]] = {
    **dict.fromkeys(("fp8", "mxfp8", "fbgemm_fp8"), _from_fp8),
    **dict.fromkeys(
        ("mxfp4", "modelopt", "modelopt_fp4", "modelopt_mixed"),
        lambda method, config: Settings(method),
    ),
    "gptq": _from_gptq,
    "awq": _from_awq,
    **dict.fromkeys(("auto-round", "intel/auto-round"), _from_auto_round),
    "compressed-tensors": _from_compressed_tensors,
}


def dequantised(tensors: Mapping[str, LazyTensor], settings: Settings) -> dict[str, LazyTensor]:
    """The checkpoint that `tensors` stand for, still unread; what is not quantised stays.

    UserError for codes without scales, or with scales of a shape that does not fit them.
    """
    layouts = [one for one in LAYOUTS if not one.methods or settings.method in one.methods]
    found: dict[str, LazyTensor] = {}
    used: set[str] = set()
    for name in tensors:
        parts = _parts_of(name, tensors, layouts)
        if parts is not None:
            layout, names = parts
            weight = _Weight(
                layout, settings, names, {role: tensors[n] for role, n in names.items()}
            )
            stem = name.removesuffix(layout.codes)
            found[stem + layout.becomes] = weight.lazy()
            used |= {name, *names.values(), f"{stem}.weight_shape"}
    rest = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in used and not _ACTIVATIONS.fullmatch(name)
    }
    return rest | found


def _parts_of(
    name: str, tensors: Mapping[str, LazyTensor], layouts: list[Layout]
) -> tuple[Layout, dict[str, str]] | None:
    """The layout that a tensor of codes is of, and the names of what belongs to it by role."""
    wanted = ""
    for layout in layouts:
        if not name.endswith(layout.codes) or tensors[name].dtype not in layout.dtypes:
            continue
        stem = name.removesuffix(layout.codes)
        scale = next((stem + end for end in layout.scale if stem + end in tensors), None)
        wanted = wanted or stem + layout.scale[0]
        if scale is None or (
            layout.scale_dtypes and tensors[scale].dtype not in layout.scale_dtypes
        ):
            continue
        names = {role: stem + end for role, end in layout.optional.items() if stem + end in tensors}
        return layout, {"codes": name, "scale": scale, **names}
    if wanted:
        raise UserError(
            f"tensor {name} in {tensors[name].path} is quantised, and its scales are missing: "
            f"expected {wanted}; the checkpoint is incomplete, download it again"
        )
    return None


@dataclass(frozen=True)
class _Weight:
    """One logical weight, or a stack of them: its tensors by role, and their names."""

    layout: Layout
    settings: Settings
    names: Mapping[str, str]
    parts: Mapping[str, LazyTensor]

    def lazy(self) -> LazyTensor:
        """The weight as an ordinary tensor: bf16 where that holds it, fp32 else."""
        self._check()
        codes, (rows, columns) = self.parts["codes"], self.shape
        matrix = (columns, rows) if self.layout.form.becomes_transposed else (rows, columns)
        shape = (*codes.shape[:1], *matrix) if self.stacked else matrix
        units = LazyTensor(shape, torch.float32, codes.path, partial(self._rows, self._units))
        stored = Quantised(units, self._grids)
        return LazyTensor(shape, self.dtype, codes.path, partial(self._rows, self._values), stored)

    @property
    def dtype(self) -> torch.dtype:
        """A power of two times a few bits is a bf16."""
        return torch.bfloat16 if self._has_e8m0 and self.kind != "int" else torch.float32

    @property
    def _has_e8m0(self) -> bool:
        return self.parts["scale"].dtype in _E8M0

    @property
    def kind(self) -> GridKind:
        of_int8 = self.layout.form is _ELEMENTS and self.parts["codes"].dtype == torch.int8
        return "int" if of_int8 else self.layout.form.kind

    @property
    def stacked(self) -> bool:
        return len(self.parts["codes"].shape) > self.layout.form.n_dims

    @cached_property
    def bits(self) -> int:
        """Of an integer code; in some of GPTQ's layers these may be others than in most."""
        if self.layout.form is _GPTQ and "zeros" in self.parts:
            rows, words = (self.parts[role].shape[-1:] for role in ("scale", "zeros"))
            for bits in (4, 8):
                if rows == tuple(32 // bits * n for n in words):
                    return bits
        return self.settings.bits

    @cached_property
    def shape(self) -> tuple[int, int]:
        form = self.layout.form
        return form.shape(self.parts["codes"].shape[-form.n_dims :], self.bits)

    @cached_property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale: the config's, or what fits the scales' shape.

        The last block of either may be cut off: 576 rows in blocks of 128 have five.
        """
        (rows, columns), found = self.shape, self.parts["scale"].shape
        if found not in ((), (1,)) and self.stacked:
            found = found[1:]
        if found in ((), (1,)):
            return rows, columns
        scales = (*found, 1)[:2] if len(found) < 3 else found
        scales = scales[::-1] if self.layout.form.scales_transposed else scales
        usual = [(1, 16), (1, 32), (1, 64), (1, 128), (1, columns), (rows, 1)]
        if self.settings.block is None:
            usual += [(128, 128), (rows, columns)]
        for block in (self.settings.block, *usual):
            if block and self._n_blocks(block) == scales:
                return block
        codes = f"{self.names['codes']}, {rows} x {columns}"
        raise self._wrong("scale", f"a scale for each {self.settings.block or (1, 32)} of {codes}")

    def _n_blocks(self, block: tuple[int, int]) -> tuple[int, int]:
        return -(-self.shape[0] // block[0]), -(-self.shape[1] // block[1])

    def _check(self) -> None:
        codes, form = self.parts["codes"], self.layout.form
        if len(codes.shape) - form.n_dims not in (0, 1):
            raise self._wrong("codes", f"{form.n_dims} dimensions, or one more for stacked experts")
        scale, zeros = self.parts["scale"], self.parts.get("zeros", codes)
        if not (scale.dtype.is_floating_point or (scale.dtype in _E8M0 and self.kind != "int")):
            raise self._wrong("scale", "floating point")
        if (zeros.dtype, len(zeros.shape)) != (codes.dtype, len(codes.shape)):
            raise self._wrong("zeros", f"{codes.dtype} of {len(codes.shape)} dimensions")
        for role, part in self.parts.items() if self.stacked else ():
            if part.shape not in ((), (1,)) and part.shape[0] != codes.shape[0]:
                raise self._wrong(role, f"{codes.shape[0]} experts")
        _ = self.block
        for role, end in self.layout.optional.items():
            is_factor = role in ("factor", "divisor")
            if role in self.parts:
                n_elements = math.prod(self.parts[role].shape[self.stacked :])
                if is_factor and n_elements != 1:
                    raise self._wrong(role, "one number")
            elif (is_factor and self.parts["scale"].dtype in _FP8) or (
                role == "zeros" and self.settings.zeros_required
            ):
                stem = self.names["codes"].removesuffix(self.layout.codes)
                raise UserError(
                    f"tensor {stem + end} is missing: {self.names['codes']} in {codes.path} cannot "
                    "be read without it; the checkpoint is incomplete, download it again"
                )

    def _wrong(self, role: str, wanted: str) -> UserError:
        part = self.parts[role]
        return UserError(
            f"tensor {self.names[role]} in {part.path} has the wrong shape or dtype: expected "
            f"{wanted}, found {part.dtype} {part.shape}; download the checkpoint again"
        )

    def _rows(self, of: Callable[[int], Tensor], start: int, stop: int) -> Tensor:
        if not self.stacked:
            return of(0)[start:stop]
        turned = self.layout.form.becomes_transposed
        matrices = [of(i).t() if turned else of(i) for i in range(start, stop)]
        return torch.stack(matrices) if len(matrices) != 1 else matrices[0][None]

    def _read(self, role: str, index: int) -> Tensor:
        part = self.parts[role]
        if self.stacked and part.shape[:1] == self.parts["codes"].shape[:1]:
            return part.read_rows(index, index + 1)[0]
        return part.read()

    def _scales(self, index: int) -> Tensor:
        """fp32 [row blocks, column blocks]."""
        stored = self._read("scale", index)
        scales = torch.exp2(stored.float() - 127) if stored.dtype == torch.uint8 else stored.float()
        if "factor" in self.parts:
            scales = scales * self._read("factor", index).float()
        if "divisor" in self.parts:
            scales = scales / self._read("divisor", index).float()
        if not bool(scales.isfinite().all()):
            raise UserError(
                f"tensor {self.names['scale']} in {self.parts['scale'].path} holds scales that are "
                "infinite or not a number; download the checkpoint again"
            )
        scales = scales.t() if self.layout.form.scales_transposed else scales
        return scales.reshape(self._n_blocks(self.block))

    def _zeros(self, index: int) -> Tensor:
        """What is subtracted from codes, int32 [row blocks, column blocks] or one for all."""
        form, bits = self.layout.form, self.bits
        if "zeros" not in self.parts:
            return torch.tensor([[1 << (bits - 1) if form.kind == "int" else 0]])
        stored = self._read("zeros", index)
        if self.settings.zeros_less_one:
            stored = stored + {4: 0x11111111, 8: 0x01010101}[bits]
        zeros = form.zeros(stored, bits).int()
        rows, columns = self._n_blocks(self.block)
        if zeros.shape[1:] != (columns,) or zeros.shape[0] < rows:
            raise self._wrong("zeros", f"a zero for each of {rows} x {columns} scales")
        return zeros[:rows]

    def _groups(self, index: int) -> Tensor | None:
        """int64 [columns], the column block of each column; None where they are in order."""
        if "groups" not in self.parts:
            return None
        groups, n_columns = self._read("groups", index).long(), self.shape[1]
        n_groups = self._n_blocks(self.block)[1]
        if groups.shape != (n_columns,) or not bool(((groups >= 0) & (groups < n_groups)).all()):
            raise self._wrong("groups", f"{n_columns} numbers of groups below {n_groups}")
        in_order = torch.equal(groups, torch.arange(n_columns) // self.block[1])
        return None if in_order else groups

    def _spread(self, per_block: Tensor, index: int) -> Tensor:
        """[rows, columns] from one value for each block, or [1, 1] from one for all."""
        if per_block.numel() == 1:
            return per_block
        groups = self._groups(index)
        per_row = per_block.repeat_interleave(self.block[0], dim=0)[: self.shape[0]]
        if groups is not None:
            return per_row[:, groups]
        return per_row.repeat_interleave(self.block[1], dim=1)[:, : self.shape[1]]

    def _values(self, index: int) -> Tensor:
        codes = self.layout.form.codes(self._read("codes", index), self.bits)
        values = codes.contiguous().float()
        blocks, zeros = self._beside(values, self._zeros(index), index)
        blocks.sub_(zeros)
        blocks, scales = self._beside(values, self._scales(index), index)
        blocks.mul_(scales)
        return values.to(self.dtype)

    def _beside(self, values: Tensor, per_block: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """A view of `values` and one value for each block that broadcasts over it.

        Where all blocks are whole nothing is spread, which would take five times as long.
        """
        (rows, columns), whole = self.block, self._n_blocks(self.block)
        is_whole = self.shape == (whole[0] * rows, whole[1] * columns)
        if per_block.numel() == 1 or not is_whole or self._groups(index) is not None:
            return values, self._spread(per_block, index)
        blocks = values.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        return blocks, per_block[:, None, :, None]

    def _units_by_block(self, index: int) -> Tensor:
        """What values are whole multiples of; of fp8, the scale. e2m1 has halves."""
        return self._scales(index) / (2 if self.kind == "e2m1" else 1)

    def _units(self, index: int) -> Tensor:
        return self._spread(self._units_by_block(index), index).expand(self.shape)

    def _grids(self) -> Iterator[Grid]:
        for index in range(self.parts["codes"].shape[0] if self.stacked else 1):
            low, high = (-12, 12) if self.kind == "e2m1" else (0, 0)
            if self.kind == "int":
                zeros, signed = self._zeros(index), self.layout.form is _ELEMENTS
                least, most = (-128, 127) if signed else (0, (1 << self.bits) - 1)
                low, high = least - int(zeros.max()), most - int(zeros.min())
            yield Grid(
                name=self.names["codes"],
                is_bf16=self.dtype == torch.bfloat16,
                kind=self.kind,
                low=low,
                high=high,
                group=self._group(index),
                units=self._units_by_block(index),
                used_units=partial(self._used_units, index),
                levels=1 << self.bits if self.layout.form.kind == "int" else 256,
                rows=self.block[0],
            )

    def _group(self, index: int) -> int:
        if self._groups(index) is not None or self.parts["codes"].dtype == torch.float8_e5m2:
            return 1
        return self.block[1] if self.block[1] < self.shape[1] else 0

    def _used_units(self, index: int) -> Tensor:
        """Those of weights that are not zero."""
        return self._units(index)[self._values(index) != 0]
