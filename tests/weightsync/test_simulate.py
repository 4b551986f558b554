"""Predicted seconds against what one can compute by hand, and shapes and layouts of large models."""

import math
from dataclasses import replace

import engines
import numpy as np
import pytest
from test_plan import DENSE, MOE, run

from zerokl.weightsync.known_shapes import SHAPES
from zerokl.weightsync.layout import LayoutError
from zerokl.weightsync.megatron_layout import MegatronSizes, megatron_layout
from zerokl.weightsync.model_shape import Latent, ModelShape
from zerokl.weightsync.plan import Batch, Copy, Plan, make_plan
from zerokl.weightsync.sglang_layout import SglangSizes, sglang_layout
from zerokl.weightsync.simulate import Links, predict

GB = 10**9


def batch(source: int, target: int, size: int, rows: int = 1) -> Batch:
    return Batch(source, target, (Copy("w", "a", 0, size // rows, "b", 0, size // rows, rows, size // rows),))


# trainers 0 and 1, rollouts 0 and 1, two GPUs to a node: rollout-1 gets 6 GB, of which 4 from trainer-1
PLAN = Plan((batch(0, 0, 3 * GB), batch(0, 1, 2 * GB), batch(1, 1, 4 * GB, rows=1000)), "")


def test_the_busiest_end_of_the_network_decides():
    found = predict(PLAN, Links(nic=2))
    assert (found.seconds, found.bottleneck) == (6 / 2, "nic into rollout-1")
    assert found.bytes == {"nic": 9 * GB}


def test_what_stays_in_a_node_goes_over_its_own_links():
    found = predict(PLAN, Links(nic=2, nvlink=10, gpus_per_node=2, colocated=True))
    assert (found.seconds, found.bottleneck) == (6 / 10, "nvlink into rollout-1")
    assert found.bytes == {"nvlink": 9 * GB}
    found = predict(PLAN, Links(nic=2, nvlink=10, gpus_per_node=1, colocated=True))
    assert (found.seconds, found.bottleneck) == (2 / 2, "nic out of trainer-0")  # 3 and 4 GB inside: 0.3 and 0.4 s
    assert found.bytes == {"nvlink": 7 * GB, "nic": 2 * GB}


def test_staging_and_shared_memory_bound_too():
    assert predict(PLAN, Links(nic=2, pcie=1)).bottleneck == "pcie into rollout-1"
    assert predict(PLAN, Links(nic=2, pcie=1)).seconds == 6
    found = predict(PLAN, Links(nvlink=100, host=3, gpus_per_node=2, colocated=True))
    assert (found.seconds, found.bottleneck) == (9 / 3, "host in node 0")


def test_many_small_runs_cost_time_of_their_own():
    found = predict(PLAN, Links(nic=10, write_us=1000))
    assert math.isclose(found.seconds, 4 / 10 + 1000 * 1e-3)
    assert found.bottleneck == "nic out of trainer-1"


@pytest.mark.parametrize("links", [Links(nic=0), Links(host=-1), Links(gpus_per_node=0), Links(write_us=-1)])
def test_impossible_links_are_refused(links):
    with pytest.raises(ValueError, match="must be positive"):
        predict(PLAN, links)


def test_nothing_to_move():
    assert predict(Plan((), ""), Links(nic=1)).seconds == 0


@pytest.mark.parametrize(("name", "billions"), [("kimi-k2", 1026.4), ("deepseek-v3", 671.0)])
def test_known_models_have_their_published_sizes(name, billions):
    assert round(sum(t.rows * t.columns for t in SHAPES[name].tensors().values()) / 1e9, 1) == billions


LATENT = ModelShape(
    vocabulary=76, hidden=24, ffn=8, layers=5, heads=4, kv_heads=4, head_dim=6, tied=False, experts=4,
    latent=Latent(q_rank=6, kv_rank=4, nope=4, rope=2, value=3), dense_layers=2, dense_ffn=16, shared_ffn=8,
    choice_bias=True,
)  # fmt: skip


def latent_rank(full: dict, rank: int, tp: int, ep: int, mlp_tp: int) -> dict[str, np.ndarray]:
    """What an engine's rank holds of LATENT, cut directly."""
    held, each = {}, LATENT.experts // ep
    for name, x in full.items():
        parts = name.split(".")
        path, last = ".".join(parts[:-2]), parts[-2]
        if "experts." in name and "shared" not in name:
            continue
        if last in ("embed_tokens", "lm_head"):
            held[name] = np.split(engines.padded(x, 64), tp)[rank]
        elif last in ("q_b_proj", "kv_b_proj"):
            held[name] = np.split(x, tp)[rank]
        elif last == "o_proj":
            held[name] = np.split(x, tp, 1)[rank]
        elif last == "q_a_proj":
            fused = np.concatenate([x, full[f"{path}.kv_a_proj_with_mqa.weight"]])
            held[f"{path}.fused_qkv_a_proj_with_mqa.weight"] = fused
        elif last == "gate_proj":
            gate, up = (np.split(full[f"{path}.{n}_proj.weight"], mlp_tp)[rank % mlp_tp] for n in ("gate", "up"))
            held[f"{path}.gate_up_proj.weight"] = np.concatenate([gate, up])
        elif last == "down_proj":
            held[name] = np.split(x, mlp_tp, 1)[rank % mlp_tp]
        elif last not in ("kv_a_proj_with_mqa", "up_proj"):
            held[name] = x
    for index in range(LATENT.dense_layers, LATENT.layers):
        group = f"model.layers.{index}.mlp.experts"
        first = rank * ep // tp * each
        split, part = tp // ep, rank % (tp // ep)
        mine = [f"{group}.{e}" for e in range(first, first + each)]
        gates = [np.split(full[f"{e}.{n}_proj.weight"], split)[part] for e in mine for n in ("gate", "up")]
        held[f"{group}.w13_weight"] = np.concatenate(gates)
        held[f"{group}.w2_weight"] = np.concatenate(
            [np.split(full[f"{e}.down_proj.weight"], split, 1)[part] for e in mine]
        )
    return held


@pytest.mark.parametrize(
    ("trainer", "rollout"),
    [
        (MegatronSizes(), SglangSizes()),
        (MegatronSizes(tp=2, pp=2, ep=2, dp=2, vocabulary_multiple=4, last_stage=1), SglangSizes(tp=2, ep=2, mlp_tp=1)),
        (MegatronSizes(tp=4, pp=3, ep=4, vocabulary_multiple=4, last_stage=1), SglangSizes(tp=4, ep=2, engines=2)),
    ],
)
def test_latent_attention_shared_experts_and_uneven_stages_arrive(trainer, rollout):
    sender, receiver = megatron_layout(LATENT, trainer), sglang_layout(LATENT, rollout)
    # the trainer's buffers hold what its layout says; that the engine's are right is checked against direct cutting
    full = {n: x.astype(np.uint16) for n, x in engines.values(LATENT).items()}
    full = {n: (x.astype(np.uint32) if "correction" in n else x) for n, x in full.items()}
    tensors = LATENT.tensors()
    sources = []
    for rank in sender.ranks:
        memory = {name: np.zeros(size, np.uint8) for name, size in rank.buffers.items()}
        for piece in rank.pieces:
            box, item = piece.box, tensors[piece.tensor].item_bytes
            x = full[piece.tensor].reshape(tensors[piece.tensor].rows, -1)[box.top : box.bottom, box.left : box.right]
            for row, values in enumerate(np.ascontiguousarray(x).view(np.uint8)):
                start = piece.offset + row * piece.pitch
                memory[piece.buffer][start : start + (box.right - box.left) * item] = values
        sources.append(memory)
    targets = engines.blank(receiver)
    run(make_plan(sender, receiver), sources, targets)
    for number, held in enumerate(targets):
        wanted = latent_rank(full, number % rollout.tp, rollout.tp, rollout.ep, rollout.mlp_tp or rollout.tp)
        wanted = {n: np.ascontiguousarray(x).reshape(-1).view(np.uint8) for n, x in wanted.items()}
        assert held.keys() == wanted.keys()
        assert [name for name in held if not np.array_equal(held[name], wanted[name])] == []


def test_uneven_stages_must_leave_an_even_rest():
    with pytest.raises(LayoutError, match=r"the layers before the last stage \(4\) do not divide into 3"):
        megatron_layout(LATENT, MegatronSizes(pp=4, last_stage=1))
    assert megatron_layout(DENSE, MegatronSizes(pp=1, last_stage=3)) == megatron_layout(DENSE, MegatronSizes())
    with pytest.raises(LayoutError, match=r"the tensor-parallel ranks \(4\) do not divide into 3"):
        sglang_layout(MOE, SglangSizes(tp=4, mlp_tp=3))


def test_a_slice_of_a_trillion_parameters():
    """One layer of each kind of Kimi-K2, planned for one engine of the table in docs/weightsync.md."""
    model = replace(SHAPES["kimi-k2"], layers=2)
    trainer = megatron_layout(model, MegatronSizes(tp=8, pp=2, ep=32, dp=4))
    plan = make_plan(trainer, sglang_layout(model, SglangSizes(tp=32, ep=32, mlp_tp=1)))
    found = predict(plan, Links(nic=50))
    into = max(sum(n for (_, t), n in plan.routes().items() if t == rank) for rank in range(32))
    out = max(sum(n for (s, _), n in plan.routes().items() if s == rank) for rank in range(64))
    assert math.isclose(found.seconds, max(into, out) / 50e9)
    experts = 384 * 3 * 2048 * 7168 * 2
    assert into > experts / 32
