"""The planner: every receiver byte is written exactly once, with the byte that direct slicing would put there."""

import json
import math
from dataclasses import replace

import engines
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zerokl.alignment.megatron.convert import hf_to_megatron
from zerokl.alignment.megatron.model_config import ModelConfig
from zerokl.weightsync import plan as planner
from zerokl.weightsync.layout import Box, Layout, LayoutError, Piece, Rank, Tensor
from zerokl.weightsync.megatron_layout import MegatronSizes, megatron_layout
from zerokl.weightsync.model_shape import ModelShape, read_shape
from zerokl.weightsync.plan import BATCH_BYTES, Plan, make_plan
from zerokl.weightsync.sglang_layout import SglangSizes, sglang_layout

DENSE = ModelShape(
    vocabulary=75, hidden=24, ffn=16, layers=4, heads=8, kv_heads=4, head_dim=6, tied=True, qkv_bias=True, qk_norm=True
)
MOE = replace(DENSE, tied=False, qkv_bias=False, experts=4)
GLM = {"choice_bias": True, "dense_layers": 1, "dense_ffn": 32, "shared_ffn": 24}


@st.composite
def cases(draw):
    """(model, trainer's sizes, rollout's sizes) that divide."""
    power = st.sampled_from([1, 2, 4])
    tied, bias, norm = (draw(st.booleans()) for _ in range(3))
    model = replace(
        DENSE, tied=tied, qkv_bias=bias, qk_norm=norm, kv_heads=draw(power), experts=draw(st.sampled_from([0, 4]))
    )
    if model.experts and draw(st.booleans()):
        model = replace(model, **GLM)
    tp = draw(st.sampled_from([n for n in (1, 2, 4) if n <= model.kv_heads]))
    dp, pp = draw(st.sampled_from([1, 2, 3])), draw(power)
    ep = draw(st.sampled_from([n for n in (1, 2, 4) if tp * dp % n == 0])) if model.experts else 1
    etp = draw(st.sampled_from([n for n in (1, 2) if tp * dp % (n * ep) == 0])) if model.experts else 1
    trainer = MegatronSizes(tp, pp, ep, dp, etp, vocabulary_multiple=tp * draw(st.sampled_from([1, 5])))
    rollout_tp = draw(st.sampled_from([1, 2, 4, 8]))
    rollout_ep = draw(st.sampled_from([n for n in (1, 2, 4) if n <= rollout_tp])) if model.experts else 1
    return model, trainer, SglangSizes(rollout_tp, rollout_ep, draw(st.sampled_from([1, 2])))


def run(plan: Plan, sources: list[dict], targets: list[dict]) -> list[dict]:
    """Carry out the plan on plain arrays; how often each target byte was written."""
    written = [{name: np.zeros(len(x), int) for name, x in rank.items()} for rank in targets]
    for batch in plan.batches:
        for c in batch.copies:
            source = sources[batch.source][c.source_buffer]
            target, count = targets[batch.target][c.target_buffer], written[batch.target][c.target_buffer]
            for row in range(c.rows):
                a, b = c.source_offset + row * c.source_pitch, c.target_offset + row * c.target_pitch
                target[b : b + c.row_bytes] = source[a : a + c.row_bytes]
                count[b : b + c.row_bytes] += 1
    return written


@settings(max_examples=30, deadline=None, derandomize=True)
@given(cases(), st.integers(512, 4096))
def test_a_simulated_transfer_is_direct_slicing_and_writes_each_byte_once(case, limit):
    model, trainer, rollout = case
    sender, receiver = megatron_layout(model, trainer), sglang_layout(model, rollout)
    with pytest.MonkeyPatch.context() as patch:  # small models: split and batch them as large ones would be
        patch.setattr(planner, "BATCH_BYTES", 4 * limit)
        patch.setattr(planner, "COPY_BYTES", limit)
        plan = make_plan(sender, receiver)
    full = engines.values(model)
    sources = [
        engines.memory(engines.megatron_rank(model, full, trainer, i), rank) for i, rank in enumerate(sender.ranks)
    ]
    expected = [
        engines.memory(engines.sglang_rank(model, full, rollout, i), rank) for i, rank in enumerate(receiver.ranks)
    ]
    targets = engines.blank(receiver)
    written = run(plan, sources, targets)
    for rank, held in enumerate(receiver.ranks):
        inside = {name: np.zeros(size, bool) for name, size in held.buffers.items()}
        item = {tensor.name: tensor.item_bytes for tensor in receiver.tensors}
        for piece in held.pieces:
            width = (piece.box.right - piece.box.left) * item[piece.tensor]
            for row in range(piece.box.bottom - piece.box.top):
                inside[piece.buffer][piece.offset + row * piece.pitch :][:width] = True
        for name in held.buffers:
            assert np.array_equal(targets[rank][name], expected[rank][name]), (rank, name)
            assert np.array_equal(written[rank][name], inside[name].astype(int)), (rank, name)
    pairs = [(b.source, b.target) for b in plan.batches]
    small = [b for b in plan.batches if b.nbytes < 4 * limit]
    assert all(pairs.count((b.source, b.target)) == 1 for b in small)
    assert all(c.nbytes <= limit for b in plan.batches for c in b.copies)


def test_the_layout_of_one_rank_is_what_the_trainer_holds():
    config = ModelConfig(
        "Qwen3ForCausalLM", 75, 24, 16, 4, 8, 4, 6, max_position_embeddings=8, rms_norm_eps=1e-6, rope_theta=1e4,
        tie_word_embeddings=False, qk_norm=True, qkv_bias=False, rotary_dim=4, interleaved_rotary=False,
    )  # fmt: skip
    model = replace(DENSE, tied=False, qkv_bias=False)
    full = engines.values(model)
    held = hf_to_megatron(config, {name: torch.from_numpy(x.view(np.int16)) for name, x in full.items()})
    expected = engines.megatron_rank(model, full, MegatronSizes(), 0)
    assert {name: x.shape for name, x in held.items()} == {name: x.shape for name, x in expected.items()}
    assert all(np.array_equal(held[name].numpy().view(np.uint16), x) for name, x in expected.items())
    (rank,) = megatron_layout(model, MegatronSizes()).ranks
    assert rank.buffers == {name: x.nbytes for name, x in expected.items()}


def test_replicas_share_the_work_evenly():
    plan = make_plan(
        megatron_layout(DENSE, MegatronSizes(tp=2, dp=3, vocabulary_multiple=4)),
        sglang_layout(DENSE, SglangSizes(engines=6)),
    )
    out: dict[int, int] = {}
    for (source, _), size in plan.routes().items():
        out[source] = out.get(source, 0) + size
    largest = max(c.nbytes for b in plan.batches for c in b.copies)
    assert len(out) == 6
    assert max(out.values()) - min(out.values()) <= largest
    assert plan.nbytes == 6 * sum(t.nbytes for t in DENSE.tensors().values())


def test_no_rank_gathers_what_it_does_not_hold():
    receiver = sglang_layout(DENSE, SglangSizes(tp=4))
    plan = make_plan(megatron_layout(DENSE, MegatronSizes(tp=2, pp=2, vocabulary_multiple=4)), receiver)
    for target, rank in enumerate(receiver.ranks):
        received = sum(size for (_, t), size in plan.routes().items() if t == target)
        assert received <= sum(rank.buffers.values())


def test_batches_of_a_real_size_hold_a_mebibyte():
    model = ModelShape(49152, 576, 1536, 4, 9, 3, 64, tied=True)
    plan = make_plan(megatron_layout(model, MegatronSizes()), sglang_layout(model, SglangSizes()))
    assert all(b.nbytes >= BATCH_BYTES for b in plan.batches)
    assert max(c.nbytes for b in plan.batches for c in b.copies) <= planner.COPY_BYTES


def test_both_sides_compute_the_same_digest_from_decoded_layouts():
    sender, receiver = (
        megatron_layout(MOE, MegatronSizes(tp=2, ep=2, vocabulary_multiple=4)),
        sglang_layout(MOE, SglangSizes(2, 2)),
    )
    sent = [msgspec.msgpack.decode(msgspec.msgpack.encode(x), type=Layout) for x in (sender, receiver)]
    digest = make_plan(sender, receiver).digest
    assert make_plan(*sent).digest == digest
    assert make_plan(sender, sglang_layout(MOE, SglangSizes(2, 1))).digest != digest


def test_predicted_seconds():
    plan = make_plan(
        megatron_layout(DENSE, MegatronSizes(tp=2, vocabulary_multiple=4)), sglang_layout(DENSE, SglangSizes(engines=2))
    )
    assert plan.seconds(2.0, shared=True) == plan.nbytes / 2e9
    assert math.isclose(plan.seconds(2.0, shared=False), plan.nbytes / 2 / 2e9, rel_tol=0.1)  # two links each way


@pytest.mark.parametrize(
    ("model", "trainer", "rollout", "message"),
    [
        (replace(DENSE, kv_heads=2), MegatronSizes(tp=4), SglangSizes(), "2 key-value heads cannot be split over 4"),
        (DENSE, MegatronSizes(pp=3), SglangSizes(), r"the layers \(4\) do not divide into 3"),
        (MOE, MegatronSizes(dp=3, ep=2), SglangSizes(), r"ranks of one pipeline stage \(3\) do not divide into 2"),
        (MOE, MegatronSizes(dp=3, ep=3), SglangSizes(), r"the experts \(4\) do not divide into 3"),
        (DENSE, MegatronSizes(tp=2), SglangSizes(), r"the padded rows of model.embed_tokens.weight \(75\) do not"),
        (DENSE, MegatronSizes(), SglangSizes(tp=3), r"\(128\) do not divide into 3"),
    ],
)
def test_a_split_that_does_not_come_out_is_refused(model, trainer, rollout, message):
    with pytest.raises(LayoutError, match=message):
        make_plan(megatron_layout(model, trainer), sglang_layout(model, rollout))


def simple(*pieces: Piece, size: int = 64) -> Layout:
    return Layout((Tensor("w", (4, 8), "bfloat16"),), (Rank({"b": size}, pieces),))


WHOLE = Piece("w", Box(0, 4, 0, 8), "b", 0, 16)
BESIDE = [Piece("w", Box(0, 4, 2 * i, 2 * i + 2), "b", 4 * i, 16) for i in range(4)]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (simple(msgspec.structs.replace(WHOLE, tensor="v")), "no such tensor"),
        (simple(msgspec.structs.replace(WHOLE, box=Box(0, 5, 0, 8))), "not inside 'w'"),
        (simple(msgspec.structs.replace(WHOLE, box=Box(2, 2, 0, 8))), "not inside 'w'"),
        (simple(msgspec.structs.replace(WHOLE, offset=2)), "not inside 'b' of 64 bytes"),
        (simple(msgspec.structs.replace(WHOLE, offset=-16)), "not inside 'b'"),
        (simple(msgspec.structs.replace(WHOLE, pitch=14)), "not inside 'b'"),
        (simple(WHOLE, msgspec.structs.replace(WHOLE, offset=48), size=128), "overlap in 'b'"),
        (simple(*BESIDE[:2], msgspec.structs.replace(BESIDE[1], offset=14), size=72), "overlap in 'b'"),
        (simple(BESIDE[0], msgspec.structs.replace(BESIDE[1], pitch=18), size=96), "overlap in 'b'"),
        (simple(BESIDE[0], msgspec.structs.replace(BESIDE[1], offset=14), size=96), "overlap in 'b'"),
        (Layout((Tensor("w", (4, 0), "bfloat16"),), ()), "has shape"),
        (Layout((Tensor("w", (1 << 50,), "bfloat16"),), ()), "has shape"),
        (Layout((Tensor("w", (4,), "int4"),), ()), "dtype 'int4'"),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(layout, message):
    with pytest.raises(LayoutError, match=message):
        make_plan(layout, layout)


def test_pieces_may_lie_side_by_side():
    """As columns of one matrix, or of two, one below the other."""
    side_by_side = simple(*BESIDE)
    assert make_plan(simple(WHOLE), side_by_side).nbytes == 64
    below = [msgspec.structs.replace(piece, offset=64 + piece.offset) for piece in BESIDE]
    simple(*BESIDE, *below, size=128).check("receiver")


def test_bytes_that_no_sender_has_are_named():
    part = msgspec.structs.replace(WHOLE, box=Box(0, 3, 0, 8))
    with pytest.raises(LayoutError, match=r"rank 0 needs Box\(top=3, bottom=4, left=0, right=8\) of 'w'"):
        make_plan(simple(part), simple(WHOLE))
    other = Layout((Tensor("w", (4, 8), "float16"),), simple(WHOLE).ranks)
    more = Layout((*other.tensors, Tensor("v", (4,), "float16")), other.ranks)
    for sides in ((simple(WHOLE), other), (more, other), (other, more)):
        with pytest.raises(LayoutError, match="the receiver expects"):
            make_plan(*sides)


MOE_CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 75, "hidden_size": 24, "moe_intermediate_size": 16,
    "intermediate_size": 99, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 6, "num_experts": 4,
}  # fmt: skip
GLM_CONFIG = MOE_CONFIG | {
    "architectures": ["Glm4MoeForCausalLM"], "n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1,
    "attention_bias": True, "use_qk_norm": True,
}  # fmt: skip


def test_the_shape_of_a_model_folder(tmp_path):
    path = tmp_path / "config.json"
    newer = {("num_local_experts" if key == "num_experts" else key): value for key, value in MOE_CONFIG.items()}
    for config in (MOE_CONFIG, newer):  # transformers 5 writes the other name
        path.write_text(json.dumps(config))
        assert read_shape(tmp_path) == MOE
    path.write_text(json.dumps(GLM_CONFIG))
    glm = replace(MOE, qkv_bias=True, choice_bias=True, dense_layers=1, dense_ffn=99, shared_ffn=32)
    assert read_shape(tmp_path) == glm
    path.write_text(json.dumps(GLM_CONFIG | {"attention_bias": False, "use_qk_norm": False}))
    assert read_shape(tmp_path) == replace(glm, qkv_bias=False, qk_norm=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"architectures": ["Mamba"]}', "'Mamba'.* is not supported"),
        ('{"architectures": ["LlamaForCausalLM"]}', "KeyError: 'num_attention_heads'"),
        (json.dumps(MOE_CONFIG | {"attention_bias": True}), "other biases"),
        (json.dumps(MOE_CONFIG | {"mlp_only_layers": [1]}), "dense ones can only come first"),
        (json.dumps(MOE_CONFIG | {"num_experts": None}), "experts must be a whole number of at least 1, got None"),
        (json.dumps(GLM_CONFIG | {"mlp_bias": True}), "other biases"),
        (json.dumps(GLM_CONFIG | {"first_k_dense_replace": 4}), "first_k_dense_replace 4 leaves no layer of 4"),
        (json.dumps(GLM_CONFIG | {"n_shared_experts": True}), "n_shared_experts must be a whole number"),
    ],
)
def test_a_model_folder_that_cannot_be_read_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(LayoutError, match=rf"config\.json.*{message}"):
        read_shape(tmp_path)
