"""The functions SGLang calls by name on its live model."""

import json
import os
from pathlib import Path

import pytest
import torch
from fused_model import DIM, HEADS, HIDDEN, Model

from zerokl.weightsync import sglang_loader
from zerokl.weightsync.transports.memory_file import MemoryFile, map_file


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


def test_flip_bit_works_on_weights_that_nobody_can_write(tmp_path):
    model = Model()
    weight = model.self_attn.qkv_proj.weight
    file = MemoryFile(weight.nbytes)
    with file.writable(0, weight.nbytes) as memory:
        memory[:] = weight.data.view(torch.uint8).reshape(-1)
    before = weight.data.clone()
    weight.data = map_file(os.dup(file.descriptor), file.nbytes, "t").view(weight.dtype).view(weight.shape)
    call(sglang_loader.flip_bit, model, tmp_path, name="self_attn.q_proj.weight", element=0, bit=0)
    assert (model.self_attn.qkv_proj.weight != before).sum() == 1
