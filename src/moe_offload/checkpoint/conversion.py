"""A checkpoint's tensors as those of transformers' module tree, one at a time.

First the convention by which transformers describes a layer's experts: from version 5 every MoE
architecture has an experts module with the flags `has_gate`, `has_bias`, `is_transposed` and
`is_concatenated` and the parameters `gate_up_proj` (or, gateless, `up_proj`) and `down_proj`, each
with the experts as first dimension. Whatever has these is supported; there is no list of
architectures. `ExpertsModule` reads it and brings an expert into the one normal form.

Then the plan that leads there. Names and layouts follow transformers' own conversion mapping, the
one `from_pretrained` uses; there are no name tables here. A plan is made from names and shapes
alone (converters run on meta tensors), so a missing or misshapen tensor is found before anything is
written. Only reading touches data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moe_offload.checkpoint.block import BlockLayout, block_layout
from moe_offload.checkpoint.codes import Codes, Grid, joined
from moe_offload.checkpoint.source_files import LazyTensor, Quantised
from moe_offload.config import Scales, WeightFormat
from moe_offload.errors import UserError

_PLAIN_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FLAGS: Final = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


@dataclass(frozen=True)
class ExpertsModule:
    """The experts of one layer as the model stores them; `name` is the module's path."""

    name: str
    n_experts: int
    hidden_size: int
    intermediate_size: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool

    @property
    def parameters(self) -> dict[str, str]:
        """Block field -> name of the model's parameter, such as `<name>.gate_up_proj`."""
        first = f"{self.name}.{'gate_up_proj' if self.has_gate else 'up_proj'}"
        names = {"gate_up": first, "down": f"{self.name}.down_proj"}
        if self.has_bias:
            names |= {"gate_up_bias": f"{first}_bias", "down_bias": f"{self.name}.down_proj_bias"}
        return names

    def block_layout(
        self, weight_format: WeightFormat, scales: Scales | None = None
    ) -> BlockLayout:
        """How one expert is stored, with the format's own scales or a source's."""
        sizes = self.hidden_size, self.intermediate_size
        return block_layout(weight_format, *sizes, self.has_gate, self.has_bias, scales)

    def normalise(self, field: str, stored: Tensor) -> Tensor:
        """One expert's tensor in normal form, a view where possible.

        `gate_up` becomes [R, H] with the gate's rows before the up projection's, `down` [H, I],
        `gate_up_bias` [R]; interleaved rows (gate 0, up 0, gate 1, ...) are sorted apart.
        """
        if self.is_transposed and stored.dim() == 2:
            stored = stored.t()
        if self.has_gate and not self.is_concatenated and field in ("gate_up", "gate_up_bias"):
            stored = torch.cat((stored[0::2], stored[1::2]))
        return stored


def find_experts(model: nn.Module) -> tuple[ExpertsModule, ...]:
    """The experts modules of a model, which may be on the meta device, in module order.

    UserError when the model has no experts, or experts that the convention does not describe; the
    message names the flag.
    """
    found = []
    for name, module in model.named_modules():
        missing = [flag for flag in FLAGS if not hasattr(module, flag)]
        if not missing:
            found.append(_describe(name, module))
        elif name.rpartition(".")[2] == "experts":
            raise _unsupported(
                name, module, f"lacks the flag {missing[0]} of transformers' experts convention"
            )
    if not found:
        raise UserError(
            f"{type(model).__name__} has no experts module as transformers 5 describes one: it is "
            "no Mixture-of-Experts model, or has its experts elsewhere; run it with transformers"
        )
    return tuple(found)


def _unsupported(name: str, module: nn.Module, reason: str) -> UserError:
    return UserError(
        f"the experts of this model are not supported: {type(module).__name__} at {name} {reason}"
    )


def _describe(name: str, module: nn.Module) -> ExpertsModule:
    if getattr(module, "has_post_expert_norm", False):
        reason = "has the flag has_post_expert_norm, a norm after each expert that no kernel here"
        raise _unsupported(name, module, f"{reason} computes")
    flags = {flag: bool(getattr(module, flag)) for flag in FLAGS}
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    first = "gate_up_proj" if flags["has_gate"] else "up_proj"
    expected = {first, "down_proj"}
    if flags["has_bias"]:
        expected |= {f"{first}_bias", "down_proj_bias"}
    if set(shapes) != expected:
        raise _unsupported(
            name,
            module,
            f"has the parameters {', '.join(sorted(shapes))}, where its flags "
            f"has_gate={flags['has_gate']} and has_bias={flags['has_bias']} promise "
            + ", ".join(sorted(expected)),
        )
    inward, outward = shapes[first], shapes["down_proj"]
    if len(inward) == 3 and len(outward) == 3:
        if flags["is_transposed"]:
            inward, outward = (inward[0], *inward[:0:-1]), (outward[0], *outward[:0:-1])
        n_experts, hidden_size, intermediate_size = outward
        rows = 2 * intermediate_size if flags["has_gate"] else intermediate_size
        if inward == (n_experts, rows, hidden_size):
            return ExpertsModule(name, n_experts, hidden_size, intermediate_size, **flags)
    raise _unsupported(
        name,
        module,
        f"has {first} of shape {shapes[first]} and down_proj of shape {shapes['down_proj']}, which "
        f"do not fit its flag is_transposed={flags['is_transposed']}",
    )


@dataclass
class _Group:
    """The source tensors that become `target`, and by a converter perhaps further targets."""

    target: str
    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(default_factory=dict)  # converter's pattern -> names

    @property
    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]


class ConversionPlan:
    """Which source tensors make which tensor of `model`, a model on the meta device.

    UserError when the source lacks a tensor that the model needs, or has one of another shape.
    """

    def __init__(self, model: PreTrainedModel, tensors: Mapping[str, LazyTensor]) -> None:
        self._model = model
        self._tensors = tensors
        self._expected: dict[str, Tensor] = dict(model.state_dict())
        self._group_of: dict[str, _Group] = {}
        self._converted: dict[str, Tensor] = {}
        self.unused: list[str] = []
        for group in self._group_sources():
            for target, shape in self._outcome(group).items():
                if target not in self._expected:
                    self.unused.extend(group.names)
                    continue
                self._check(group, target, shape)
                self._group_of[target] = group
        self._tie()
        self._require_all()

    @property
    def targets(self) -> list[str]:
        """The tensors to store, in the model's order; of tied ones only the first."""
        return [name for name in self._expected if name in self._group_of]

    def expected(self, target: str) -> Tensor:
        """The model's own meta tensor: shape and dtype."""
        return self._expected[target]

    def read(self, target: str) -> Tensor:
        """One whole tensor, in the source's dtype, on the CPU.

        When a conversion makes several targets at once the others wait in memory to be read.
        """
        if target not in self._converted:
            group = self._group_of[target]
            if group.converter is None:
                return self._tensors[group.names[0]].read()
            results = self._convert(group, lambda name: self._tensors[name].read())
            self._converted |= {name: results[name] for name in results if name in self._group_of}
        return self._converted.pop(target)

    def expert_reader(self, target: str) -> Callable[[int], Tensor]:
        """A function that reads row `e` of dimension 0, touching only that expert where it can.

        Call it for experts in ascending order. Where the conversion mixes experts the whole tensor
        is read and stays in memory as long as the function does.
        """
        group, tensors = self._group_of[target], self._tensors
        if not _keeps_experts_apart(group.converter):
            whole = self.read(target)
            return lambda expert: whole[expert]
        if group.converter is None:
            return lambda expert: tensors[group.names[0]].read_rows(expert, expert + 1)[0]

        def read(expert: int) -> Tensor:
            part = self._of_expert(group, expert)
            return self._convert(part, lambda name: tensors[name].read())[target][0]

        return read

    def codes_reader(self, target: str) -> Callable[[int], Codes | None]:
        """The same of the codes of a quantised source; None where there are none, or experts mix.

        So it is where the matrices of an expert, which lie apart, are quantised unlike each other.
        """
        group, quantised = self._group_of[target], self._quantised(target) or {}
        readers = {name: one.read_rows for name, one in quantised.items()}
        if None in readers.values() or len({one.kind for one in quantised.values()}) != 1:
            return lambda expert: None

        def read(expert: int) -> Codes | None:
            if group.converter is None:
                found = quantised[group.names[0]].read_rows(expert, expert + 1)  # type: ignore[misc]
                return found.map(lambda part: part[0])
            part = self._of_expert(group, expert)
            found = {
                name: readers[name](0, self._tensors[name].shape[0])  # type: ignore[misc]
                for name in part.names
            }

            def convert(parts: list[Tensor]) -> Tensor:
                by_name = dict(zip(found, parts, strict=True))
                return self._convert(part, by_name.__getitem__)[target][0]

            try:
                return joined([*found.values()], convert)
            except (RuntimeError, ValueError):  # units of other groups do not fit together
                return None

        return read

    def grids(self, target: str) -> Iterator[Grid] | None:
        """What a quantised source asks of a format; None where it is not quantised."""
        quantised = self._quantised(target)
        if quantised is None:
            return None
        return chain.from_iterable(one.grids() for one in quantised.values())

    def _quantised(self, target: str) -> dict[str, Quantised] | None:
        group = self._group_of[target]
        found = {name: self._tensors[name].quantised for name in group.names}
        quantised = {name: one for name, one in found.items() if one is not None}
        whole = len(quantised) == len(found) and _keeps_experts_apart(group.converter)
        return quantised if whole else None

    def _of_expert(self, group: _Group, expert: int) -> _Group:
        sources = {pattern: [names[expert]] for pattern, names in group.sources.items()}
        return _Group(group.target, group.converter, sources)

    def _group_sources(self) -> Iterable[_Group]:
        transforms = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        converter_of = {key: entry for entry in converters for key in entry.source_patterns}
        prefix = self._model.base_model_prefix
        groups: dict[str, _Group] = {}
        for name in sorted(self._tensors, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self._expected)
            if target not in self._expected and name in self._expected:
                target, pattern = rename_source_key(name, [], [], prefix, self._expected)
            converter = None if pattern is None else converter_of[pattern]
            group = groups.setdefault(target, _Group(target, converter))
            group.sources.setdefault(pattern or name, []).append(name)
        return groups.values()

    def _outcome(self, group: _Group) -> dict[str, tuple[int, ...]]:
        """Target name -> shape, found by converting meta tensors."""
        if group.converter is None:
            if len(group.names) > 1 and group.target in self._expected:
                raise UserError(
                    f"the tensors {group.names[0]} and {group.names[1]} are both the model's "
                    f"{group.target}: keep the right one, or download the checkpoint again"
                )
            return {group.target: self._tensors[group.names[0]].shape}
        if group.target not in self._expected:
            return {group.target: ()}
        self._check_experts(group)
        try:
            results = self._convert(group, self._empty)
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f"the tensors for {group.target} do not fit together ({error}): "
                f"{group.names[0]} and {len(group.names) - 1} more; download them again"
            ) from error
        return {name: tuple(tensor.shape) for name, tensor in results.items()}

    def _empty(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    def _convert(self, group: _Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        converter: Any = deepcopy(group.converter)
        for pattern, names in group.sources.items():
            for name in names:
                converter.add_tensor(group.target, name, pattern, read(name))
        results = converter.convert(group.target, model=self._model, config=self._model.config)
        return {
            name: tensor[0] if isinstance(tensor, list) else tensor
            for name, tensor in results.items()
        }

    def _check_experts(self, group: _Group) -> None:
        """One tensor per expert and pattern, or the name of one that is missing."""
        assert group.converter is not None
        if not isinstance(group.converter.operations[0], MergeModulelist):
            return
        n_experts = self._expected[group.target].shape[0]
        for pattern in group.converter.source_patterns:
            found = group.sources.get(pattern, [])
            if len(found) != n_experts:
                raise UserError(
                    f"tensor {_absent(found, n_experts) or pattern} is missing: expected "
                    f"{n_experts} experts for {group.target}, found {len(found)}; the checkpoint "
                    "is incomplete, download it again"
                )

    def _check(self, group: _Group, target: str, shape: tuple[int, ...]) -> None:
        """UserError when a source tensor has another shape or is not in plain floating point."""
        wanted, expected = self._expected[target], tuple(self._expected[target].shape)
        for source in group.names:
            found = self._tensors[source].dtype
            if wanted.is_floating_point() and found not in _PLAIN_DTYPES:
                raise UserError(
                    f"tensor {source} in {self._tensors[source].path} has dtype {found}, expected "
                    "bf16, fp16 or fp32: prepare an unquantised copy of the model"
                )
        if shape != expected:
            source = group.names[0]
            raise UserError(
                f"tensor {source} in {self._tensors[source].path} has the wrong shape: {target} "
                f"needs {expected}, found {shape}; config.json and weights do not belong together"
            )

    def _tie(self) -> None:
        """Of weights the model ties keep the one the others point to; UserError if they differ."""
        for tied, kept in dict(getattr(self._model, "all_tied_weights_keys", {})).items():
            self._expected.pop(tied, None)
            group = self._group_of.pop(tied, None)
            if group is None:
                continue
            twin = self._group_of.setdefault(kept, group)
            if twin is not group and not self._same(twin, group):
                raise UserError(
                    f"config.json ties {tied} to {kept}, but the checkpoint holds different values "
                    'for them; set "tie_word_embeddings": false in a copy of its config.json'
                )

    def _same(self, one: _Group, other: _Group) -> bool:
        """Whether two renamed tensors are equal, compared a few rows at a time."""
        a, b = (self._tensors[group.names[0]] for group in (one, other))
        n_rows, step = a.shape[0], 4096
        parts = [(row, min(row + step, n_rows)) for row in range(0, n_rows, step)]
        return all(torch.equal(a.read_rows(*part), b.read_rows(*part)) for part in parts)

    def _require_all(self) -> None:
        optional = self._model._keys_to_ignore_on_load_missing or ()
        missing = [
            name
            for name in self._expected
            if name not in self._group_of and not any(re.search(key, name) for key in optional)
        ]
        if missing:
            others = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
            raise UserError(
                f"tensor {missing[0]}{others} missing: the model needs what no file of the "
                "checkpoint has; download the model again"
            )


def _keeps_experts_apart(converter: WeightConverter | None) -> bool:
    """Whether there is no conversion, or stacking experts comes first and nothing mixes them."""
    if converter is None:
        return True
    first, *rest = converter.operations
    return (
        isinstance(first, MergeModulelist)
        and first.dim == 0
        and all(
            (isinstance(step, Concatenate) and step.dim > 0)
            or (
                isinstance(step, Transpose)
                and 0 not in (step.dim0, step.dim1)
                and not getattr(step, "check_dims", False)  # it looks at the full shape
            )
            for step in rest
        )
    )


def _absent(found: list[str], n_experts: int) -> str | None:
    """The first expert's tensor that `found` lacks; the last number of a name is its expert."""
    name = re.fullmatch(r"(.+\.)\d+(\..+)", found[0]) if found else None
    wanted = [f"{name[1]}{expert}{name[2]}" for expert in range(n_experts)] if name else []
    return next((tensor for tensor in wanted if tensor not in found), None)
