"""int4 whose rounding errors make up for each other on known inputs (GPTQ, Frantar et al. 2022).

Rounding to nearest treats a matrix's inputs as equally large and unrelated. Where they are known,
columns are rounded one after another, those with the largest inputs first, and each one's error is
spread over those still to come, so that the product with these inputs changes least. A group's
scale is searched when its turn comes, by what each column's error will then cost. The bytes are of
the same layout as any int4's.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from moe_offload.checkpoint import quantization
from moe_offload.checkpoint.codes import Codes
from moe_offload.checkpoint.quantization import GROUP, TILE_ROWS

# Products of inputs are held as [C, C]: longer rows are compensated piece by piece.
MOST_COLUMNS: Final = 4096
# Of the mean square of an input, added to each: what a few thousand tokens say of a text is not all
# true of another. On three experts of the demo, reading another text, 0.01 left 15% more error.
_DAMPING: Final = 0.2
_DAMPING_OF_CHANGES: Final = 1.0
_ZERO: Final = 8  # int4's own
_BLOCK: Final = 128  # columns whose errors reach the rest in one product


def compensate(
    weight: Tensor, inputs: Tensor, others: Tensor | None = None, wanted: Tensor | None = None
) -> Codes:
    """W [R, C] rounded to int4 for `inputs` X [n, C], as codes that are packed as they are.

    `others` [m, C] are inputs of the same kind that the matrix did not get; they count as C more
    inputs together, so that few of its own do not decide alone. `wanted` [n, C] are what X would be
    had nothing been rounded before it: the product with X then comes near to that with these (as
    in GPTAQ, Li et al. 2025). Errors as of `quantization.quantize`; scratch memory is four times
    W, or of MOST_COLUMNS squared, in fp32.
    """
    rows, columns = weight.shape
    padded_rows, padded_columns = -rows % TILE_ROWS + rows, -columns % GROUP + columns
    remaining = torch.zeros(padded_columns, padded_rows)
    remaining[:columns, :rows] = weight.t()
    scales = torch.empty_like(remaining)
    for start in range(0, columns, MOST_COLUMNS):
        piece = slice(start, min(start + MOST_COLUMNS, columns))
        x = inputs[:, piece].float()
        products = _mean_products(x, None if others is None else others[:, piece].float())
        if wanted is not None:
            change = x.t() @ (wanted[:, piece].float() - x) / max(len(x), 1)
            damped = _damped(products, _DAMPING_OF_CHANGES)
            remaining[piece] += torch.linalg.solve(damped, change @ remaining[piece])
        order = _largest_first(products.diagonal())
        place = slice(start, start + len(order))
        weights = remaining[place][order]
        scales_in_order = torch.empty_like(weights)
        _compensate(weights, _cost(products, order), scales_in_order)
        remaining[place][order] = weights
        scales[place][order] = scales_in_order
    levels = torch.where(scales == 0, 0, remaining / scales).round_() + _ZERO
    units = scales[::GROUP, :rows].t()
    codes = levels[:columns, :rows].t().to(torch.uint8)
    return Codes("int", codes, units, torch.full_like(units, _ZERO))


def _mean_products(inputs: Tensor, others: Tensor | None) -> Tensor:
    """Mean of x x^T, [C, C]."""
    n, columns = inputs.shape
    total = inputs.t() @ inputs
    if others is None:
        return total / max(n, 1)
    return (total + others.t() @ others * (columns / len(others))) / (n + columns)


def _damped(products: Tensor, share: float) -> Tensor:
    damped = products.clone()
    damped.diagonal().add_(max(share * float(products.diagonal().mean()), 1e-20))
    return damped


def _largest_first(squares: Tensor) -> Tensor:
    """An order of columns, padded to whole groups, by mean square: groups, and inside of each."""
    groups = torch.nn.functional.pad(squares, (0, -len(squares) % GROUP)).view(-1, GROUP)
    first = groups.sum(1).argsort(descending=True, stable=True)
    inside = groups.argsort(dim=1, descending=True, stable=True)
    return (inside + torch.arange(len(groups))[:, None] * GROUP)[first].flatten()


def _cost(products: Tensor, order: Tensor) -> Tensor:
    """Upper triangular U [C, C], C padded, with (mean of x x^T)^-1 = U^T U, columns in `order`.

    A rounding error e of column j costs (e / U[j, j])^2 once it is spread over the columns after j.
    """
    padding = len(order) - len(products)
    padded = torch.nn.functional.pad(_damped(products, _DAMPING), (0, padding, 0, padding))
    padded.diagonal()[len(products) :] = products.diagonal().mean() + 1e-20
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(padded[order][:, order]))
    cost: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return cost


def _compensate(weights: Tensor, cost: Tensor, scales: Tensor) -> None:
    """Round `weights` [C, R] in place, column of W by column; `scales` [C, R] is filled."""
    columns, rows = weights.shape
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.empty(stop - start, rows)
        for j in range(start, stop):
            if j % GROUP == 0:
                group = slice(j, j + GROUP)
                importance = cost.diagonal()[group].pow(-2)
                importance = (importance / importance.mean()).view(-1, 1, 1, 1)
                tiles = weights[group].view(GROUP, -1, 1, TILE_ROWS)
                scales[group] = quantization.search_scale(tiles, 4, importance).reshape(1, rows)
            rounded = quantization.round_to_levels(weights[j], scales[j], 4) * scales[j]
            errors[j - start] = (weights[j] - rounded) / cost[j, j]
            weights[j] = rounded
            weights[j + 1 : stop].addr_(cost[j, j + 1 : stop], errors[j - start], alpha=-1)
        weights[stop:].addmm_(cost[start:stop, stop:].t(), errors, alpha=-1)
