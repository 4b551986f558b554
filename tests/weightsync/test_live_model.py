"""A real module as the engine: fused parameters get their parts, and a failure gives back what was there."""

import fused_model
import pytest
import torch
from fused_model import VOCAB, weights  # noqa: F401
from parties import QUICK, TOKEN

from zerokl.weightsync.channel import WeightSender
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.live_model import LiveModel, block_layout, named_layout
from zerokl.weightsync.members import WeightReceiver, WeightSource
from zerokl.weightsync.sglang_loader import live_parameters
from zerokl.weightsync.transports.ipc import IpcSource, IpcTarget


def test_a_model_follows_the_trainer_and_goes_back_when_a_transfer_fails(tmp_path, weights):  # noqa: F811
    tmp_path.chmod(0o700)
    model, calls = fused_model.Model(), []
    before = {name: x.clone() for name, x in live_parameters(model).items()}
    engine = LiveModel(
        model,
        pause=lambda _: calls.append("pause"),
        run=lambda action: [action(), calls.append("changed")],
        resume=calls.append,
    )
    layout, buffers = named_layout(weights)
    source = WeightSource(tmp_path / "s", TOKEN, layout, 0, IpcSource(tmp_path))
    receiver = WeightReceiver(tmp_path / "s", TOKEN, engine.layout, 0, IpcTarget(), engine)
    with WeightSender(tmp_path / "s", TOKEN, sources=1, receivers=1, deadlines=QUICK) as sender:
        source.buffers = buffers
        source.start()
        receiver.start()
        sender.wait(20)
        install, engine.install = engine.install, lambda *_: install(*_) or 1 / 0  # type: ignore[method-assign]
        outcome = sender.sync("v0")
        assert "ZeroDivisionError" in outcome.cause
        assert all(torch.equal(x, before[name]) for name, x in live_parameters(model).items())
        engine.install = install  # type: ignore[method-assign]
        calls.clear()
        outcome = sender.sync("v1")
        assert outcome.committed, outcome.cause
        assert calls == ["pause", "changed", "v1"]
        live = live_parameters(model)
        assert live.keys() == weights.keys()
        assert all(torch.equal(live[name], x) for name, x in weights.items())
        assert model.lm_head.weight is model.embed_tokens.weight
        assert not model.embed_tokens.weight[VOCAB:].any()
        parts = [weights[f"self_attn.{name}_proj.weight"] for name in "qkv"]
        assert torch.equal(model.self_attn.qkv_proj.weight, torch.cat(parts))
        x = torch.ones(1, 8, dtype=torch.bfloat16)
        assert torch.equal(model.mlp.gate_up_proj(x)[0, :6], (x @ weights["mlp.gate_proj.weight"].T)[0])
    source.close()
    receiver.close()


def test_a_model_on_another_kind_of_device_or_on_several_is_refused():
    split = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    for model, where in ((split[1], "meta"), (split, "cpu, meta")):
        with pytest.raises(WeightSyncError, match=f"CPU memory or one GPU's; the model is on {where}"):
            LiveModel(model, pause=print, run=print, resume=print)


def test_weights_on_another_device_than_the_models_are_not_swapped_in():
    model = torch.nn.Linear(2, 2)
    engine = LiveModel(model, pause=print, run=lambda action: action(), resume=print)
    assert engine.device == torch.device("cpu")
    buffers = {"weight": torch.zeros(16, dtype=torch.uint8), "bias": torch.zeros(8, dtype=torch.uint8, device="meta")}
    before = model.weight.data_ptr()
    with pytest.raises(WeightSyncError, match=r"lie on cpu, meta, the model is on cpu: .* any transport but cuda_ipc"):
        engine.install("v", buffers)
    assert model.weight.data_ptr() == before


def test_blocks_of_tensors_lie_in_the_parameters_that_hold_them():
    """Rows of `q` and `k` that take turns in one parameter, and half the columns of `o`, as in a trainer's."""
    fused, half, bias = torch.arange(48).bfloat16().view(6, 8), torch.zeros(3, 4).bfloat16(), torch.zeros(5)
    shapes = {"q": (4, 8), "k": (2, 8), "o": (3, 8)}
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    layout, buffers = block_layout(
        {"qk": fused, "half": half, "bias": bias},
        tensors | {"b": bias},
        [("q", 0, 2, 0, 8, "qk", 0), ("k", 0, 1, 0, 8, "qk", 2), ("q", 2, 4, 0, 8, "qk", 3), ("k", 1, 2, 0, 8, "qk", 5),
         ("o", 0, 3, 4, 8, "half", 0), ("b", 0, 5, 0, 1, "bias", 0)],
    )  # fmt: skip
    assert {t.name: (t.shape, t.dtype) for t in layout.tensors} == {
        "q": ((4, 8), "bfloat16"), "k": ((2, 8), "bfloat16"), "o": ((3, 8), "bfloat16"), "b": ((5,), "float32"),
    }  # fmt: skip
    pieces = [(p.tensor, p.box.top, p.box.bottom, p.buffer, p.offset, p.pitch) for p in layout.ranks[0].pieces]
    assert pieces == [("q", 0, 2, "qk", 0, 16), ("k", 0, 1, "qk", 32, 16), ("q", 2, 4, "qk", 48, 16),
                      ("k", 1, 2, "qk", 80, 16), ("o", 0, 3, "half", 0, 8), ("b", 0, 5, "bias", 0, 4)]  # fmt: skip
    assert (layout.ranks[0].pieces[4].box.left, layout.ranks[0].pieces[4].box.right) == (4, 8)
    layout.check("trainer")
    fused[0, 0] = 7  # buffers are the parameters' own memory
    assert buffers["qk"].view(torch.bfloat16)[0] == 7
    with pytest.raises(WeightSyncError, match="need a contiguous CPU or CUDA tensor"):
        block_layout({"qk": fused.T}, {"q": fused}, [])
