"""The functions SGLang calls by name on its live model."""

import json
from pathlib import Path

import pytest
import torch
from fused_model import DIM, HEADS, HIDDEN, Model

from zerokl.weightsync import sglang_loader


def call(function, model: Model, folder: Path, **request):
    answer = folder / "answer.json"
    payload = torch.frombuffer(bytearray(json.dumps(request | {"answer": str(answer)}).encode()), dtype=torch.uint8)
    function(model, [("request", payload)])
    result = json.loads(answer.read_text())
    answer.unlink()
    if "error" in result:
        raise RuntimeError(result["error"])
    return result["result"]


def test_flip_bit_flips_exactly_one(tmp_path):
    model = Model()
    before = model.self_attn.qkv_proj.weight.detach().clone()
    call(sglang_loader.flip_bit, model, tmp_path, name="self_attn.k_proj.weight", element=5, bit=15)
    after = model.self_attn.qkv_proj.weight.detach()
    changed = (before.view(torch.int16) ^ after.view(torch.int16)).view(-1)
    row = HEADS * DIM * HIDDEN + 5
    assert changed.nonzero().tolist() == [[row]]
    assert changed[row].item() == -(1 << 15)
    with pytest.raises(RuntimeError, match="no bit 16 of 0"):
        call(sglang_loader.flip_bit, model, tmp_path, name="self_attn.k_proj.weight", element=0, bit=16)
