"""xxh3_128 of GPU memory, computed there: the same digests as `digest`, without a copy on the host.

The algorithm is XXH3 (Y. Collet, xxHash specification, doc/xxhash_spec.md) for inputs of more than 240 bytes: eight
64-bit accumulators take stripes of 64 bytes, 16 stripes make a block, and every block scrambles what is there. So
blocks follow each other, and what is done side by side are the stripes of a block and the runs of memory, a program to
each.
Checked in Triton's interpreter and by compiling; not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
import xxhash

from zerokl.kernels.triton._math import launch_options

SHORT = 240
"""Bytes of the longest input with an algorithm of its own; such runs are digested on the host."""

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_PRIME32 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_PRIME64 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_START = (_PRIME32[2], *_PRIME64[:4], _PRIME32[1], _PRIME64[4], _PRIME32[0])
_MASK = (1 << 64) - 1
_WARPS = 4
_PRIME = tl.constexpr(_PRIME32[0])
_LOW = tl.constexpr((1 << 32) - 1)


@triton.jit
def _stripes(base, at, limit, row_bytes, pitch, STRIDED: tl.constexpr):
    """The words [stripes, 8] that begin ``at`` [stripes, 8, 8] bytes into the run; 0 from ``limit`` on."""
    place = at
    if STRIDED:
        place = at // row_bytes * pitch + at % row_bytes
    byte = tl.load(base + place, mask=at < limit, other=0).to(tl.uint64)
    shift = (tl.arange(0, 8) * 8).to(tl.uint64)
    return tl.sum(byte << shift[None, None, :], axis=2)


@triton.jit
def _add(acc, data, key):
    """The accumulators after the stripes ``data`` [stripes, 8]; a stripe of zeros must have a key of zero."""
    mixed = data ^ key
    even, odd = tl.split(tl.reshape(tl.sum(data, axis=0), [4, 2]))
    return acc + tl.sum((mixed & _LOW) * (mixed >> 32), axis=0) + tl.reshape(tl.join(odd, even), [8])


@triton.jit
def _accumulate(runs_ptr, words_ptr, out_ptr, STRIDED: tl.constexpr):
    """Accumulators [runs, 8] of runs (address, bytes, bytes of a row, pitch); words: start, secret, secret's end."""
    program = tl.program_id(0)
    base = tl.load(runs_ptr + 4 * program).to(tl.pointer_type(tl.uint8))
    nbytes = tl.load(runs_ptr + 4 * program + 1)
    row_bytes, pitch = tl.load(runs_ptr + 4 * program + 2), tl.load(runs_ptr + 4 * program + 3)
    stripe, lane = tl.arange(0, 16), tl.arange(0, 8)
    at = (stripe[:, None, None] * 64 + lane[None, :, None] * 8 + lane[None, None, :]).to(tl.int64)
    acc = tl.load(words_ptr + lane)
    key = tl.load(words_ptr + 8 + stripe[:, None] + lane[None, :])
    scramble = tl.load(words_ptr + 24 + lane)
    blocks = (nbytes - 1) // 1024
    for _ in range(blocks):
        acc = _add(acc, _stripes(base, at, nbytes, row_bytes, pitch, STRIDED), key)
        acc = (acc ^ (acc >> 47) ^ scramble) * _PRIME
        at += 1024
    whole = (nbytes - 1 - blocks * 1024) // 64  # stripes of the last block, all but the very last one
    data = _stripes(base, at, blocks * 1024 + whole * 64, row_bytes, pitch, STRIDED)
    acc = _add(acc, data, tl.where(stripe[:, None] < whole, key, 0))
    last = nbytes - 64 + (lane[None, :, None] * 8 + lane[None, None, :]).to(tl.int64)
    acc = _add(acc, _stripes(base, last, nbytes, row_bytes, pitch, STRIDED), tl.load(words_ptr + 32 + lane)[None, :])
    tl.store(out_ptr + 8 * program + lane, acc)


def digests(views: Sequence[torch.Tensor]) -> list[bytes]:
    """xxh3_128 of each view, uint8 [rows, bytes of a row] with any pitch, all on one device."""
    found = {i: _on_host(view) for i, view in enumerate(views) if view.numel() <= SHORT}
    for strided in (False, True):
        chosen = [i for i, v in enumerate(views) if i not in found and (not v.is_contiguous()) == strided]
        found |= dict(zip(chosen, _long([views[i] for i in chosen], strided=strided), strict=True))
    return [found[i] for i in range(len(views))]


def _on_host(view: torch.Tensor) -> bytes:
    return xxhash.xxh3_128_digest(view.cpu().contiguous().numpy().tobytes())


def _long(views: list[torch.Tensor], *, strided: bool) -> list[bytes]:
    if not views:
        return []
    device = views[0].device
    runs = torch.tensor([[v.data_ptr(), v.numel(), v.shape[1], v.stride(0)] for v in views], device=device)
    words = torch.from_numpy(_words().view(np.int64)).to(device).view(torch.uint64)
    out = torch.empty(len(views), 8, dtype=torch.uint64, device=device)
    _accumulate[(len(views),)](runs, words, out, STRIDED=strided, **launch_options(_WARPS))
    return [_finish(acc, view.numel()) for acc, view in zip(out.cpu().numpy().tolist(), views, strict=True)]


def _words() -> np.ndarray:
    """uint64 [40]: the accumulators' start, the secret as words, and the eight words for a run's last stripe."""
    secret = np.frombuffer(_SECRET, "<u8")
    return np.concatenate([np.array(_START, np.uint64), secret, np.frombuffer(_SECRET[121:185], "<u8")])


def _finish(acc: list[int], nbytes: int) -> bytes:
    low = _merge(acc, 11, nbytes * _PRIME64[0] & _MASK)
    high = _merge(acc, 117, ~(nbytes * _PRIME64[1]) & _MASK)
    return high.to_bytes(8, "big") + low.to_bytes(8, "big")


def _merge(acc: list[int], offset: int, start: int) -> int:
    words = np.frombuffer(_SECRET[offset : offset + 64], "<u8").tolist()
    total = start
    for i in range(0, 8, 2):
        product = (acc[i] ^ words[i]) * (acc[i + 1] ^ words[i + 1])
        total += (product & _MASK) ^ (product >> 64)
    total &= _MASK
    total ^= total >> 37
    total = total * 0x165667919E3779F9 & _MASK
    return total ^ total >> 32
