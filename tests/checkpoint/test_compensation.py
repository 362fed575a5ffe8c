"""Compensated rounding against its definition in float64, and against plain rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_offload.checkpoint import compensation, quantization
from moe_offload.checkpoint.compensation import compensate
from moe_offload.checkpoint.matrix import MatrixLayout
from moe_offload.config import WEIGHT_FORMATS


def related_inputs(n: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs that a few directions explain in part, as hidden states are."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(columns // 8, columns, generator=generator)
    strengths = torch.randn(n, columns // 8, generator=generator)
    return strengths @ directions + 0.5 * torch.randn(n, columns, generator=generator)


def rounded(weight: Tensor) -> Tensor:
    packed, scales = quantization.quantize(weight, 4)
    return quantization.dequantize(packed, scales, *weight.shape, 4)


def by_definition(weight: Tensor, inputs: Tensor, unit: Tensor) -> Tensor:
    """Each column rounded, those after it refitted by least squares: float64, one row at a time.

    Groups of 32 by how large their inputs are, and the columns of each in the same way.
    """
    x = inputs.double()
    products = x.T @ x / len(x)
    squares = products.diagonal().tolist()
    groups = [range(at, at + 32) for at in range(0, len(squares), 32)]
    groups.sort(key=lambda group: -sum(squares[j] for j in group))
    order = [j for group in groups for j in sorted(group, key=lambda j: -squares[j])]
    products = products[order][:, order]
    products.diagonal().add_(0.2 * products.diagonal().mean())
    out = []
    for row, steps in zip(weight[:, order].double(), unit[:, order].double(), strict=True):
        wanted, left = products @ row, row.clone()
        fixed: list[float] = []
        for j in range(len(row)):
            fixed.append(float((left[0] / steps[j]).round().clamp(-8, 7) * steps[j]))
            done = torch.tensor(fixed, dtype=torch.float64)
            rest = slice(j + 1, len(row))
            if j + 1 < len(row):
                target = wanted[rest] - products[rest, : j + 1] @ done
                left = torch.linalg.solve(products[rest, rest], target)
        out.append(torch.tensor(fixed))
    return torch.stack(out)[:, torch.tensor(order).argsort()]


def test_each_column_is_what_least_squares_leave() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    inputs = related_inputs(200, 64)
    found = compensate(weight, inputs)
    unit = found.units.repeat_interleave(32, 1)
    assert torch.allclose(found.values(), by_definition(weight, inputs, unit), atol=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(48, 160), (7, 33), (20, 200)])
def test_the_product_with_these_inputs_changes_less(
    rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a row is longer than one piece; and every weight is a level times a float16."""
    monkeypatch.setattr(compensation, "MOST_COLUMNS", 128)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    inputs = related_inputs(400, columns)
    found = compensate(weight, inputs)

    def error(changed: Tensor) -> float:
        return float(((changed - weight) @ inputs.T).norm())

    assert error(found.values()) < 0.75 * error(rounded(weight))
    arrays = MatrixLayout("int4", rows, columns, WEIGHT_FORMATS["int4"].scales).take_over(found)
    assert arrays is not None


def test_what_was_rounded_before_is_made_up_for() -> None:
    """Inputs that are not what they should be: the product comes nearer to what it should be."""
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(4))
    wanted = related_inputs(600, 96)
    inputs = wanted + 0.3 * (wanted @ related_inputs(96, 96, seed=1)) / 96**0.5
    found = compensate(weight, inputs, wanted=wanted), compensate(weight, inputs)
    errors = [float((inputs @ one.values().T - wanted @ weight.T).norm()) for one in found]
    assert errors[0] < 0.8 * errors[1]


def test_unrelated_inputs_of_one_size_are_plain_rounding() -> None:
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(1))
    found = compensate(weight, torch.eye(96) * 96**0.5)
    assert torch.equal(found.values(), rounded(weight))


def test_few_inputs_of_its_own_do_not_decide_alone() -> None:
    """An expert that saw one token still serves the others' inputs, by a share."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    others = related_inputs(400, 64)
    found = compensate(weight, others[:1], others), compensate(weight, others[:1])
    errors = [float(((one.values() - weight) @ others.T).norm()) for one in found]
    assert errors[0] < 0.8 * errors[1]
