"""R2 over ranks: tensor parallel 1, 2, 4 and 8 give the bits of one rank."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from collective_ranks import column_inputs, filter_inputs, logprob_inputs, share_of_columns
from data import assert_same_bits, hashed

from zerokl import kernels

SCRIPT = Path(__file__).with_name("collective_ranks.py")


@pytest.fixture(scope="module", params=[1, 2, 4, 8])
def ranks(request, tmp_path_factory):
    """What every rank got, in rank order."""
    folder = tmp_path_factory.mktemp("ranks")
    # the script's own folder holds its data module; the package is the one under test here
    path = os.pathsep.join([str(SCRIPT.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-P", str(SCRIPT), str(request.param), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [np.load(folder / f"{r}.npz") for r in range(request.param)]


def test_every_rank_holds_the_bits_of_one_rank(ranks):
    width = 48
    x = hashed(11, width, seed=1, kind="cancel").requires_grad_()
    w = hashed(9, width, seed=2, kind="wide")
    whole = kernels.linear(x, w, segments=8, out_dtype=torch.float32)
    whole.backward(hashed(11, 9, seed=3).float())
    for r, got in enumerate(ranks):
        assert_same_bits(got["total"], whole, f"rank {r} of {len(ranks)}")
    assert_same_bits(np.concatenate([got["dx"] for got in ranks], 1), x.grad, "dx")


def test_a_shared_vocabulary_gives_the_bits_of_a_whole_one(ranks):
    hidden, head, targets = logprob_inputs()
    head.requires_grad_()
    whole = kernels.selected_logprob(hidden, head, targets, temperature=0.7, entropy=True)
    whole.logprob.backward(torch.arange(9).float() - 3)
    for r, got in enumerate(ranks):
        assert_same_bits(got["logprob"], whole.logprob, f"logprob of rank {r}")
        assert_same_bits(got["entropy"], whole.entropy, f"entropy of rank {r}")
        assert_same_bits(got["dhidden"], hidden.grad, f"dhidden of rank {r}")
    assert_same_bits(np.concatenate([got["dhead"] for got in ranks]), head.grad, "dhead")


def test_filters_over_a_shared_vocabulary_are_those_of_a_whole_one(ranks):
    hidden, head, targets, top_p, top_k = filter_inputs()
    head.requires_grad_()
    whole = kernels.selected_logprob(
        hidden, head, targets, temperature=0.7, top_p=top_p, top_k=top_k, entropy=True
    )  # fmt: skip
    plain = kernels.selected_logprob(hidden.detach(), head.detach(), targets, temperature=0.7).logprob
    assert ((whole.logprob > plain) == ((top_p != 1) | (top_k != 0))).all()  # each filter takes something away
    whole.logprob.backward(torch.arange(9).float() - 3)
    for r, got in enumerate(ranks):
        assert_same_bits(got["filtered"], whole.logprob, f"logprob of rank {r}")
        assert_same_bits(got["filtered_entropy"], whole.entropy, f"entropy of rank {r}")
        assert_same_bits(got["dchosen"], hidden.grad, f"dhidden of rank {r}")
    assert_same_bits(np.concatenate([got["dhead_of_chosen"] for got in ranks]), head.grad, "dhead")


def test_shared_columns_have_one_gradient(ranks):
    """dX is eight chains, each over a segment's gate columns and then its up columns, added as a tree."""
    x, w, bias, dy = column_inputs()
    y = kernels.linear(x, w.requires_grad_(), bias.requires_grad_())
    y.backward(dy)
    order = torch.cat([torch.cat([gate, up]) for gate, up in zip(*torch.arange(96).view(2, 8, 6), strict=True)])
    dx = kernels.linear(dy[:, order].contiguous(), w.detach()[order].t().contiguous(), segments=8)
    for r, got in enumerate(ranks):
        assert_same_bits(got["columns"], share_of_columns(y.detach().t(), r, len(ranks)).t(), f"columns of rank {r}")
        assert_same_bits(got["dcolumns"], dx, f"dx of rank {r}")
        assert_same_bits(got["down"], share_of_columns(w.grad, r, len(ranks)), f"dw of rank {r}")
        assert_same_bits(got["dshift"], share_of_columns(bias.grad, r, len(ranks)), f"dbias of rank {r}")


def test_the_tree_is_not_just_any_order():
    """The check can fail: adding the eight segments in ascending order gives other bits."""
    x, w = hashed(11, 48, seed=1, kind="cancel"), hashed(9, 48, seed=2, kind="wide")
    parts = [
        kernels.linear(a.contiguous(), b.contiguous(), out_dtype=torch.float32)
        for a, b in zip(x.split(6, 1), w.split(6, 1), strict=True)
    ]
    assert (sum(parts[1:], parts[0]) != kernels.linear(x, w, segments=8, out_dtype=torch.float32)).any()
