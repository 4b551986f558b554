"""Our quantisers against torchao's and ml_dtypes'. Run by ``test_quantize.py`` where those are on the path."""

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx

sys.path.insert(0, str(Path(__file__).parent))

from data import hashed
from test_quantize import E4M3, edge_blocks

from zerokl import kernels
from zerokl.kernels.reference import quantize as ref


def test_mxfp8_equals_torchao():
    """Codes and scales of torchao, where the rules agree.

    They differ, by choice, in two places, neither in the blocks here: torchao takes an E8M0 scale of 0 as 1 in RCEIL,
    as 2^-126 in FLOOR (we: as 2^-127, what E8M0 says), and maps Inf to a finite scale (we poison the block). Its RCEIL
    calls log2, which bf16 input forgives: amax / 448 is a power of two or at least 2^-9 away from one.
    """
    edges = edge_blocks(32)
    edges = edges[edges.abs().amax(1) > 2.0**-110]
    for x in (hashed(300, 256, seed=2, kind="wide"), hashed(65, 256, seed=2, kind="cancel"), edges):
        for rounding, mode in (("rceil", ScaleCalculationMode.RCEIL), ("floor", ScaleCalculationMode.FLOOR)):
            q = kernels.quantize_mxfp8(x, rounding=rounding)
            scales, codes = to_mx(x, E4M3, 32, mode)
            assert (q.scales.view(torch.uint8) == scales.view(torch.uint8)).all(), rounding
            assert (q.codes.view(torch.uint8) == codes.view(torch.uint8)).all(), rounding


def test_e4m3_equals_ml_dtypes():
    x = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    x = x[~np.isnan(x)]
    np.testing.assert_array_equal(ref.e4m3(x), np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
