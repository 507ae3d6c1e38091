"""Polar Express on symmetric products: half of X·Xᵀ is computed, the other half is its mirror image.

Two of the three products of a step are symmetric: A = XXᵀ, and bA + cA² = bA + c·AAᵀ, since A = Aᵀ. One kernel makes
both: a program per pair of row blocks (i, j) with j ≤ i of each matrix, which writes its tile and, transposed, the
mirrored one. n blocks of rows need n(n+1)/2 tiles: at 768 columns and tiles of 128 that is 21 of 36. The third
product, aX + PX, is a plain one and torch's. Published experience: a gain of 20–40% in isolation for sides above 1024,
a loss below.

Ways, `orthogonalize_triton` picks one per shape:

    blas        every product by torch (orthogonalize.py)
    symmetric   as above
    gram        the short side only: from R = XXᵀ the next Gram matrix is QRQ with Q = aI + bR + cR², a polynomial of R,
                so X itself is needed before and after a few steps, not in each. For long = 4·short a third of the work
                goes (`products` counts). Errors that a 16-bit product leaves in directions of small singular values
                are amplified from step to step, negative ones without bound: in bf16 five steps in a row end 10² to
                10⁵ off on ill-conditioned matrices, three do on some, two are as exact as the other ways. So R is
                formed anew from X every RESTART = 2 steps.

The pick is a measured entry of autotune.py's table; before there is one, `default_way`, unproven.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_kernels import autotune
from nanochat_kernels.compiled import Build
from nanochat_kernels.orthogonalize import COEFFICIENTS, iterate_blas
from nanochat_kernels.triton_support import interpreted

RESTART = 2


@triton.jit
def _symmetric_product_kernel(
    x_ptr, add_ptr, out_ptr, rows, columns, alpha, beta, x_batch, x_row, x_column,
    HAS_ADD: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = alpha·XXᵀ + beta·add, add symmetric; out and add contiguous. EVEN: the blocks divide X."""
    pair = tl.program_id(0)
    i = ((tl.sqrt(8.0 * pair + 1.0) - 1.0) * 0.5).to(tl.int32)
    i += ((i + 1) * (i + 2) // 2 <= pair).to(tl.int32) - (i * (i + 1) // 2 > pair).to(tl.int32)  # the root is rounded
    j = pair - i * (i + 1) // 2
    batch = tl.program_id(1).to(tl.int64)
    row_i = i * BLOCK + tl.arange(0, BLOCK)
    row_j = j * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    left = x_ptr + batch * x_batch + row_i[:, None] * x_row + k[None, :] * x_column
    right = x_ptr + batch * x_batch + row_j[:, None] * x_row + k[None, :] * x_column
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, columns, BLOCK_K):
        if EVEN:
            a = tl.load(left)
            b = tl.load(right)
        else:
            inside = (start + k < columns)[None, :]
            a = tl.load(left, mask=inside & (row_i < rows)[:, None], other=0.0)
            b = tl.load(right, mask=inside & (row_j < rows)[:, None], other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
        left += BLOCK_K * x_column
        right += BLOCK_K * x_column
    acc *= alpha
    tile = batch * rows * rows + row_i[:, None].to(tl.int64) * rows + row_j[None, :]
    inside = (row_i < rows)[:, None] & (row_j < rows)[None, :]
    if HAS_ADD:
        acc += beta * tl.load(add_ptr + tile, mask=inside, other=0.0).to(tl.float32)
    value = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + tile, value, mask=inside)
    if i != j:
        mirrored = batch * rows * rows + row_j[:, None].to(tl.int64) * rows + row_i[None, :]
        tl.store(out_ptr + mirrored, tl.trans(value), mask=(row_j < rows)[:, None] & (row_i < rows)[None, :])


@dataclass(frozen=True)
class Launch:
    """Square tile of the result, step along the sum, warps, and how many steps are under way at once."""

    BLOCK: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


SHIPPED = (Launch(128, 64, 8, 3), Launch(128, 64, 4, 4), Launch(64, 64, 4, 4))
SMALL = Launch(32, 32, 4, 2)  # float32, gates


def symmetric_product(
    x: Tensor, add: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0, dtype: torch.dtype | None = None
) -> Tensor:
    """alpha·XXᵀ + beta·add, (K, m, m), from X (K, m, n) of any strides and a symmetric add (K, m, m)."""
    count, rows, columns = x.shape
    out = x.new_empty((count, rows, rows), dtype=dtype or x.dtype)
    add = None if add is None else add.contiguous()

    def run(launch: Launch) -> None:
        blocks = triton.cdiv(rows, launch.BLOCK)
        even = rows % launch.BLOCK == 0 and columns % launch.BLOCK_K == 0
        _symmetric_product_kernel[(blocks * (blocks + 1) // 2, count)](
            x, add, out, rows, columns, alpha, beta, *x.stride(), HAS_ADD=add is not None, EVEN=even, **asdict(launch)
        )

    candidates = SHIPPED if x.element_size() == 2 and rows >= 64 else (SMALL,)
    kind = "wide" if x.stride(2) == 1 else "tall"
    run(autotune.choose("symmetric_product", f"{x.dtype} {rows}x{columns} {kind}", candidates, run, x.device))
    return out


def _plain_product(
    x: Tensor, add: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0, dtype: torch.dtype | None = None
) -> Tensor:
    """The same by torch, for the Gram way without Triton (and to test it alone)."""
    product = torch.bmm(x, x.mT) if add is None else torch.baddbmm(add.to(x.dtype), x, x.mT, beta=beta, alpha=alpha)
    return product.to(dtype or x.dtype)


def iterate_symmetric(x: Tensor, steps: int = 5) -> Tensor:
    """Three products a step, two of them halved, on normalized (K, m, n)."""
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for a, b, c in COEFFICIENTS[:steps]:
        gram = symmetric_product(x)
        polynomial = symmetric_product(gram, gram, c, b)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def iterate_gram(x: Tensor, steps: int = 5, product: Callable[..., Tensor] = symmetric_product) -> Tensor:
    """Products of the short side between two of X every RESTART steps, on normalized (K, m, n)."""
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for start in range(0, steps, RESTART):
        gram = product(x)
        coefficients = COEFFICIENTS[start : min(start + RESTART, steps)]
        whole = None
        for i, (a, b, c) in enumerate(coefficients):
            q = product(gram, gram, c, b, torch.float32)
            q.diagonal(dim1=-2, dim2=-1).add_(a)
            q = q.to(x.dtype)
            if i + 1 < len(coefficients):
                gram = torch.bmm(torch.bmm(q, gram), q)
            whole = q if whole is None else torch.bmm(q, whole)
        assert whole is not None
        x = torch.bmm(whole, x)
    return x.mT if tall else x


@dataclass(frozen=True)
class Way:
    """One of `WAYS`, as the table of measurements keeps it."""

    way: str


WAYS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "blas": iterate_blas,
    "symmetric": iterate_symmetric,
    "gram": iterate_gram,
}


def default_way(short: int, long: int) -> str:
    """What to take before anything was measured: published experience, unproven here."""
    return "symmetric" if short > 1024 or interpreted() else "blas"


def products(way: str, short: int, long: int, steps: int = 5) -> float:
    """FLOPs of a way per matrix, counting symmetric products by what the kernel computes of them."""
    half = 0.5
    if way == "gram":
        restarts = -(-steps // RESTART)
        inner = steps - restarts
        # per restart: R, and X ← QX; per step: Q (half); per inner step: QRQ and the product of the Qs
        wide = restarts * (half + 1) * 2 * short**2 * long
        return wide + (steps * half + inner * 3) * 2 * short**3
    share = half if way == "symmetric" else 1.0
    return steps * ((share + 1) * 2 * short**2 * long + share * 2 * short**3)


def orthogonalize_triton(x: Tensor, steps: int = 5) -> Tensor:
    """As the reference, by the way that was measured fastest for this shape on this machine."""
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    return iterate(x / (norm * 1.01 + 1e-6).to(x.dtype), steps).reshape(shape)


def iterate(x: Tensor, steps: int = 5) -> Tensor:
    """The steps alone, on normalized (K, m, n), by the way picked for its shape."""
    count, m, n = x.shape
    first = default_way(min(m, n), max(m, n))
    ways = [Way(first), *(Way(name) for name in WAYS if name != first)]
    key = f"{x.dtype} {count}x{m}x{n}"
    way = autotune.choose("orthogonalize", key, ways, lambda way: WAYS[way.way](x, steps), x.device)
    return WAYS[way.way](x, steps)


def shipped() -> Iterator[Build]:
    """bf16 at depths 12 and 24: A = XXᵀ of a wide and of a tall matrix, and bA + cAAᵀ."""
    types = dict.fromkeys(("x_ptr", "add_ptr", "out_ptr"), "*bf16")
    types |= dict.fromkeys(("rows", "columns", "x_batch", "x_row", "x_column"), "i32")
    types |= dict.fromkeys(("alpha", "beta"), "fp32")
    kinds: dict[str, dict[str, object]] = {
        "gram wide": {"x_column": 1, "add_ptr": None},
        "gram tall": {"x_row": 1, "add_ptr": None},
        "polynomial": {"x_column": 1},
    }
    for launch in SHIPPED:
        for kind, constants in kinds.items():
            tile = {"HAS_ADD": kind == "polynomial", "EVEN": True, "BLOCK": launch.BLOCK, "BLOCK_K": launch.BLOCK_K}
            arguments = {name: kind_ for name, kind_ in types.items() if name not in constants}
            name = f"orthogonalize {kind} {launch.BLOCK}x{launch.BLOCK_K} {launch.num_warps} warps"
            kernel, stages = _symmetric_product_kernel, launch.num_stages
            yield Build(name, kernel, arguments, constants | tile, launch.num_warps, num_stages=stages)
