"""Linear layers and the embedding, forward and backward (R1, R2, R9).

The products follow profile ``sm90-bf16``: per output one fp32 accumulator through matrix steps of ascending k, so their
bits are not the CPU's. Bias gradient and embedding are cross-device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._check import check_index
from ._math import launch_options, to_bf16, to_f32
from .linear_config import LinearConfig, linear_config
from .tuned import LINEAR

MAX_SEGMENTS = 8
_COLUMNS = 128  # columns one program of the bias gradient or the embedding owns


@triton.jit
def chain(a_at, b_at, acc, depth, a_column, b_row, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    """acc + a [M, depth] b [depth, N] over ascending k; a short last block reads zeros."""
    k = tl.arange(0, BLOCK_K)
    for start in range(0, depth, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_at)
            b = tl.load(b_at)
        else:
            a = tl.load(a_at, mask=(k < depth - start)[None, :], other=0.0)
            b = tl.load(b_at, mask=(k < depth - start)[:, None], other=0.0)
        acc = tl.dot(a, b, acc)
        a_at += a_column * BLOCK_K
        b_at += b_row * BLOCK_K
    return acc


@triton.jit
def tree(
    a_at,
    b_at,
    depth,
    a_column,
    b_row,
    SHAPE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """R2: SEGMENTS (2, 4 or 8) neighbouring chains of ``depth`` k, added as a balanced tree.

    The walk is a binary counter: ``one``, ``two`` and ``four`` hold finished subtrees of so many chains that wait for
    their neighbour. A loop, not recursion: unrolled, the pointers of every chain live at once and spill.
    """
    zero = tl.zeros(SHAPE, tl.float32)
    acc = zero
    one = zero
    two = zero
    four = zero
    for g in range(0, SEGMENTS):
        acc = chain(a_at, b_at, zero, depth, a_column, b_row, BLOCK_K, EVEN_K)
        a_at += depth * a_column
        b_at += depth * b_row
        acc = tl.where(g % 2 == 1, one + acc, acc)
        one = tl.where(g % 2 == 0, acc, one)
        if SEGMENTS >= 4:
            acc = tl.where(g % 4 == 3, two + acc, acc)
            two = tl.where(g % 4 == 1, acc, two)
        if SEGMENTS >= 8:
            acc = tl.where(g == 7, four + acc, acc)
            four = tl.where(g == 3, acc, four)
    return acc


@triton.jit
def place(tiles_m, tiles_n, GROUP: tl.constexpr):
    """A program's tile: groups of row blocks walk the columns together, so that their share of b stays in L2."""
    program = tl.program_id(0)
    group = program // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    return group * GROUP + (program % (GROUP * tiles_n)) % height, (program % (GROUP * tiles_n)) // height


@triton.jit
def rows_and_columns(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Those of a program's tile of y [m, n]; some may lie past the edge."""
    tile_m, tile_n = place(tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
    return tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def finish(acc, bias_ptr, y_ptr, row, column, m, n, BIAS: tl.constexpr, ROUND: tl.constexpr):
    """y [m, n] = acc (+ bias), rounded once if ROUND; what lies past the edge is not stored."""
    if BIAS:
        acc = acc + tl.load(bias_ptr + column, mask=column < n, other=0.0)[None, :]
    mask = (row < m)[:, None] & (column < n)[None, :]
    tl.store(y_ptr + row.to(tl.int64)[:, None] * n + column[None, :], to_bf16(acc) if ROUND else acc, mask=mask)


@triton.jit
def matmul_kernel(
    a_ptr,
    b_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    depth,
    a_row,
    a_column,
    b_row,
    b_column,
    BIAS: tl.constexpr,
    CONTINUE: tl.constexpr,
    ROUND: tl.constexpr,
    SEGMENTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y [m, n] = a [m, k] b [k, n] (+ bias), a and b bf16 by strides, y contiguous, bf16 if ROUND, else fp32.

    depth = k / SEGMENTS, an argument so that its divisibility is known: without it loads shrink to single elements.
    CONTINUE: the chains start from what y holds. Rows and columns past the edge wrap around and are not stored: an
    output depends on its own row of a and column of b alone.
    """
    row, column = rows_and_columns(m, n, BLOCK_M, BLOCK_N, GROUP)
    i = tl.arange(0, BLOCK_K)
    a_at = a_ptr + (row % m).to(tl.int64)[:, None] * a_row + i.to(tl.int64)[None, :] * a_column
    b_at = b_ptr + i.to(tl.int64)[:, None] * b_row + (column % n).to(tl.int64)[None, :] * b_column
    if SEGMENTS > 1:
        acc = tree(a_at, b_at, depth, a_column, b_row, (BLOCK_M, BLOCK_N), SEGMENTS, BLOCK_K, EVEN_K)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if CONTINUE:
            y_at = y_ptr + row.to(tl.int64)[:, None] * n + column[None, :]
            acc = tl.load(y_at, mask=(row < m)[:, None] & (column < n)[None, :], other=0.0)
        acc = chain(a_at, b_at, acc, depth, a_column, b_row, BLOCK_K, EVEN_K)
    finish(acc, bias_ptr, y_ptr, row, column, m, n, BIAS, ROUND)


@triton.jit
def bias_grad_kernel(dy_ptr, db_ptr, rows, n, COLUMNS: tl.constexpr):
    """db += dy over ascending rows."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < n
    db = tl.load(db_ptr + column, mask=mask, other=0.0)
    at = column.to(tl.int64)
    for _ in range(0, rows):
        db = db + to_f32(tl.load(dy_ptr + at, mask=mask, other=0.0))
        at += n
    tl.store(db_ptr + column, db, mask=mask)


@triton.jit
def embedding_kernel(id_ptr, w_ptr, y_ptr, n, COLUMNS: tl.constexpr):
    """Program (token, column block): y = w[id], copied."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    w = tl.load(w_ptr + tl.load(id_ptr + token) * n + column, mask=column < n, other=0.0)
    tl.store(y_ptr + token * n + column, w, mask=column < n)


@triton.jit
def embedding_dw_kernel(id_ptr, order_ptr, dy_ptr, dw_ptr, tokens, n, COLUMNS: tl.constexpr):
    """Program (place, column block): where a run of equal sorted ids begins, dw[id] += dy over it, in token order."""
    place = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < n
    own = tl.load(id_ptr + place)
    before = tl.load(id_ptr + place - 1, mask=place > 0, other=-1)
    if own != before:
        at = dw_ptr + own * n + column
        dw = tl.load(at, mask=mask, other=0.0)
        same = own == own
        while same:
            token = tl.load(order_ptr + place)
            dw = dw + to_f32(tl.load(dy_ptr + token * n + column, mask=mask, other=0.0))
            place += 1
            same = tl.load(id_ptr + place, mask=place < tokens, other=-1) == own
        tl.store(at, dw, mask=mask)


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    y: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    segments: int = 1,
    add: bool = False,
    config: LinearConfig | None = None,
) -> None:
    """y [m, n] = a [m, k] b [k, n], or (``add``) the chains continue from fp32 y. a and b may have any strides.

    ``config``: tiles of choice; they change no bit.
    """
    (m, k), n = a.shape, b.shape[1]
    if segments > MAX_SEGMENTS or (segments > 1 and add):
        raise ValueError(f"zerokl::linear: segments={segments}; supported on CUDA: 1 to {MAX_SEGMENTS}, 1 when adding")
    if m == 0 or n == 0:
        return
    config = config or linear_config(m, n, segments)
    matmul_kernel[(triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)](
        a,
        b,
        y if bias is None else bias,
        y,
        m,
        n,
        k // segments,
        *a.stride(),
        *b.stride(),
        BIAS=bias is not None,
        CONTINUE=add,
        ROUND=y.dtype == torch.bfloat16,
        SEGMENTS=segments,
        EVEN_K=(k // segments) % config.block_k == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        **launch_options(config.num_warps, config.num_stages),
    )


def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, segments: int, y: torch.Tensor) -> None:
    """``zerokl::linear``: x bf16 [..., K], w bf16 [N, K], bias fp32 [N], y bf16 or fp32 [..., N]."""
    x = x.view(-1, w.shape[1])
    rows = 1 << max(0, x.shape[0] - 1).bit_length()
    tuned = LINEAR.get((rows, *w.shape)) if segments == 1 else None
    matmul(x, w.t(), y, bias=bias, segments=segments, config=tuned)


def linear_dx(dy: torch.Tensor, w: torch.Tensor, dx: torch.Tensor) -> None:
    """``zerokl::linear_dx``: dx [..., K] chains over ascending n."""
    matmul(dy.view(-1, w.shape[0]), w, dx)


def linear_dw(dy: torch.Tensor, x: torch.Tensor, dw: torch.Tensor) -> None:
    """``zerokl::linear_dw``: dw fp32 [N, K] continues its chain over ascending tokens."""
    matmul(dy.view(-1, dw.shape[0]).t(), x.view(-1, dw.shape[1]), dw, add=True)


def bias_grad(dy: torch.Tensor, db: torch.Tensor) -> None:
    """``zerokl::bias_grad``: db fp32 [N] += dy bf16 [..., N], tokens in order."""
    n = db.numel()
    grid = (triton.cdiv(n, _COLUMNS),)
    bias_grad_kernel[grid](dy, db, dy.numel() // n, n, COLUMNS=_COLUMNS, **launch_options(1))


def embedding(ids: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> None:
    """``zerokl::embedding``: ids int64, w bf16 [V, H], y bf16 [..., H]."""
    check_index("embedding", ids, w.shape[0])
    if ids.numel():
        grid = (ids.numel(), triton.cdiv(w.shape[1], 1024))
        embedding_kernel[grid](ids, w, y, w.shape[1], COLUMNS=1024, **launch_options(4))


def embedding_dw(ids: torch.Tensor, dy: torch.Tensor, dw: torch.Tensor) -> None:
    """``zerokl::embedding_dw``: dw fp32 [V, H]; each row adds its tokens' gradients in token order."""
    check_index("embedding_dw", ids, dw.shape[0])
    if ids.numel():
        # stable: equal ids stay in token order
        ids, order = torch.sort(ids.view(-1), stable=True)
        grid = (ids.numel(), triton.cdiv(dw.shape[1], _COLUMNS))
        embedding_dw_kernel[grid](ids, order, dy, dw, ids.numel(), dw.shape[1], COLUMNS=_COLUMNS, **launch_options(1))
