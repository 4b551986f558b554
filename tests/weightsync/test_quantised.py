"""Quantised wire forms: what an engine's rank holds is the whole tensor, quantised in one piece and then cut."""

import itertools
from dataclasses import replace

import engines
import numpy as np
import pytest
import torch
from parties import Parties, in_form, trainer_buffers
from test_plan import run
from test_transports import NAMES, ends

from zerokl import kernels
from zerokl.weightsync.layout import LayoutError
from zerokl.weightsync.megatron_layout import MegatronSizes, megatron_layout
from zerokl.weightsync.model_shape import ModelShape
from zerokl.weightsync.plan import make_plan
from zerokl.weightsync.quantised import FORMS, is_quantised, quantise, receiving_layout, sending_layout
from zerokl.weightsync.sglang_layout import SglangSizes, sglang_layout

# heads half a block high: Megatron spreads a block of the key weights over two pieces
MODEL = ModelShape(
    vocabulary=76, hidden=256, ffn=512, layers=1, heads=8, kv_heads=8, head_dim=64, tied=True, qkv_bias=True
)
MOE = replace(MODEL, tied=False, qkv_bias=False, experts=4, ffn=256)
BLOCKS = {"mxfp8": (1, 32), "int4_group32": (1, 32), "int4_group128": (1, 128)}
DTYPES = {"mxfp8": torch.float8_e8m0fnu, "int4_group32": torch.bfloat16, "int4_group128": torch.bfloat16}
BLACKWELL = "fp8_block_blackwell"


def model_for(name: str, model: ModelShape = MODEL) -> ModelShape:
    """Wide enough for two ranks to have groups of four blocks each, which Blackwell packs."""
    return replace(model, heads=16, ffn=1024) if name == BLACKWELL else model


def whole(name: str, x: np.ndarray):
    """Codes and scales of a whole weight, row-major, by the kernel itself."""
    weight = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    if "fp8_block" in name:
        return kernels.quantize_fp8_block(weight, block=(128, 128), power_of_two=name == BLACKWELL)
    if name == "mxfp8":
        return kernels.quantize_mxfp8(weight)
    return kernels.quantize_int4_group(weight, group=BLOCKS[name][1])


def dequantised(name: str, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    if "fp8_block" in name:
        return kernels.dequantize_fp8_block(kernels.Fp8Block(codes, scales, (128, 128)))
    if name == "mxfp8":
        return kernels.dequantize_mxfp8(kernels.Mxfp8(codes, scales))
    return kernels.dequantize_int4_group(kernels.Int4Group(codes, scales))


def as_bytes(x: torch.Tensor) -> np.ndarray:
    """[rows, columns] as uint8 [rows, columns in bytes]."""
    return x.contiguous().view(torch.uint8).numpy()


def expected(name: str, model, full, sizes, rank: int) -> dict[str, np.ndarray]:
    """A rank's buffers, cut from tensors quantised whole; the cutting is that of the plain weights."""
    rows, columns = BLOCKS.get(name, (128, 128))
    tensors = model.tensors()
    parts: list[dict] = [{}, {}]
    for key, x in full.items():
        if is_quantised(tensors[key]):
            codes, scales, *_ = whole(name, x)
            # every weight stands for its code's bytes, or for its block's scale: cut first, then thin out
            per_code = x.shape[1] // codes.shape[1]
            parts[0][key] = repeated(as_bytes(codes).reshape(*codes.shape, -1), 1, per_code, x.shape)
            parts[1][key] = repeated(as_bytes(scales).reshape(*scales.shape, -1), rows, columns, x.shape)
        else:
            parts[0][key] = parts[1][key] = x
    held = {}
    cut = [engines.sglang_rank(model, part, sizes, rank) for part in parts]
    plain = engines.sglang_rank(model, full, sizes, rank)
    for key, x in plain.items():
        if cut[0][key].ndim == x.ndim:
            held[key] = flat(x)
        else:
            held[key] = flat(cut[0][key][:, :: 8 if "int4" in name else 1])
            experts = model.experts // sizes.ep if ".experts.w" in key else 1
            held[f"{key}:scales"] = laid_out(name, cut[1][key][::rows, ::columns], experts)
    return held


def laid_out(name: str, scales: np.ndarray, matrices: int) -> np.ndarray:
    """The bytes of a rank's scales, uint8 [rows, columns, bytes], where the kernel puts them: all of its memory."""
    if not name.startswith("fp8_block_"):
        return flat(scales)
    values = torch.from_numpy(flat(scales)).view(torch.float32).view(matrices, -1, scales.shape[1])
    made = kernels.to_blackwell_scales(values) if name == BLACKWELL else kernels.to_hopper_scales(values)
    return torch.empty(0, dtype=torch.uint8).set_(made.untyped_storage()).numpy()


def row_major(name: str, held: np.ndarray, rows: int, columns: int) -> torch.Tensor:
    """The reverse for one matrix."""
    memory = torch.from_numpy(held)
    if not name.startswith("fp8_block_"):
        return memory.view(DTYPES.get(name, torch.float32)).view(rows, columns)
    if name == BLACKWELL:
        return kernels.from_blackwell_scales(memory.view(torch.int32).view(-(-columns // 4), -1).mT[:rows], columns)
    return kernels.from_hopper_scales(memory.view(torch.float32).view(columns, -1).mT[:rows])


def repeated(x: np.ndarray, rows: int, columns: int, shape) -> np.ndarray:
    return x.repeat(rows, 0).repeat(columns, 1)[: shape[0], : shape[1]]


def flat(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def bf16_values(model, seed=0):
    """Finite weights of quite different magnitudes."""
    generator = np.random.default_rng(seed)
    found = {}
    for key, tensor in model.tensors().items():
        x = generator.standard_normal(tensor.shape, np.float32) * np.exp2(generator.integers(-9, 3, tensor.shape))
        found[key] = torch.from_numpy(x.astype(np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return found


def moved(form, model, trainer, rollout, full):
    """Plan and carry out one transfer; (the receiver's layout, what each of its ranks holds)."""
    left, right = megatron_layout(model, trainer), sglang_layout(model, rollout)
    sender, receiver = in_form(form, left, right)
    sources = []
    for i, rank in enumerate(left.ranks):
        memory = engines.memory(engines.megatron_rank(model, full, trainer, i), rank)
        made = quantise(left, i, {n: torch.from_numpy(x) for n, x in memory.items()}, form)
        assert {n: x.numel() for n, x in made.items()} == sender.ranks[i].buffers
        sources.append({n: x.numpy() for n, x in made.items()})
    targets = engines.blank(receiver)
    run(make_plan(sender, receiver), sources, targets)
    return targets


@pytest.mark.parametrize("name", FORMS)
def test_every_rank_holds_the_whole_tensor_quantised_and_cut(name):
    model = model_for(name)
    full = bf16_values(model)
    for tp, rollout_tp in itertools.product((1, 2) if name == BLACKWELL else (1, 2, 4), repeat=2):
        trainer, rollout = MegatronSizes(tp=tp, vocabulary_multiple=4), SglangSizes(tp=rollout_tp)
        for rank, held in enumerate(moved(FORMS[name], model, trainer, rollout, full)):
            wanted = expected(name, model, full, rollout, rank)
            assert held.keys() == wanted.keys()
            assert [key for key in held if not np.array_equal(held[key], wanted[key])] == [], (tp, rollout_tp, rank)


@pytest.mark.parametrize("name", FORMS)
def test_experts_too(name):
    model = model_for(name, MOE)
    full = bf16_values(model)
    trainer, rollout = MegatronSizes(tp=2, ep=2, dp=2, etp=2), SglangSizes(tp=2, ep=2, engines=2)
    trainer = replace(trainer, vocabulary_multiple=4)
    for rank, held in enumerate(moved(FORMS[name], model, trainer, rollout, full)):
        wanted = expected(name, model, full, rollout, rank)
        assert held.keys() == wanted.keys()
        assert [key for key in held if not np.array_equal(held[key], wanted[key])] == []


@pytest.mark.parametrize("name", FORMS)
def test_dequantised_at_the_engine_is_the_weight_that_the_trainer_computes_with(name):
    model, key, tp = model_for(name), "model.layers.0.self_attn.o_proj.weight", 2 if name == BLACKWELL else 4
    full = bf16_values(model)
    weight = torch.from_numpy(full[key].view(np.int16)).view(torch.bfloat16)
    own, width = dequantised(name, *whole(name, full[key])[:2]), weight.shape[1] // 2
    rows, columns = BLOCKS.get(name, (128, 128))
    moves = moved(FORMS[name], model, MegatronSizes(tp=tp, vocabulary_multiple=4), SglangSizes(tp=2), full)
    for rank, held in enumerate(moves):
        codes = torch.from_numpy(held[key]).view(torch.int32 if "int4" in name else torch.float8_e4m3fn).view(256, -1)
        scales = row_major(name, held[f"{key}:scales"], 256 // rows, width // columns)
        assert torch.equal(dequantised(name, codes, scales), own[:, rank * width : (rank + 1) * width])
    assert not torch.equal(own, weight)


def test_sides_of_different_scale_layouts_do_not_fit_together():
    """Not even where all scales are square, so that shapes do not tell them apart."""
    square = replace(MODEL, hidden=512, kv_heads=8, ffn=512, qkv_bias=False)
    left, right = megatron_layout(square, MegatronSizes()), sglang_layout(square, SglangSizes())
    for mine, other in itertools.permutations(("fp8_block", "fp8_block_hopper", BLACKWELL), 2):
        with pytest.raises(LayoutError, match="weight_scale_inv"):
            make_plan(sending_layout(left, FORMS[mine]), receiving_layout(right, FORMS[other]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["fp8_block", BLACKWELL, "mxfp8", "int4_group32"])
def test_every_transport_carries_codes_and_scales(name, form, tmp_path):
    trainer, rollout = MegatronSizes(tp=2, vocabulary_multiple=4), SglangSizes(tp=2)
    model = model_for(form)
    parties = Parties(
        tmp_path, *ends(name, tmp_path, 2, 2), trainer=trainer, rollout=rollout, model=model, form=FORMS[form]
    )
    try:
        for version in range(3):
            outcome = parties.sync(f"v{version}", seed=version)
            assert outcome.committed, outcome.cause
            full = engines.values(model, version)
            for rank, engine in enumerate(parties.engines):
                assert engine.holds(expected(form, model, full, rollout, rank))
    finally:
        parties.close()


def test_scales_of_an_odd_number_of_bytes_travel_as_a_delta(tmp_path):
    model = replace(MODEL, hidden=96)
    parties = Parties(
        tmp_path, *ends("disk", tmp_path, 1, 2), rollout=SglangSizes(tp=2), model=model, form=FORMS["mxfp8"]
    )
    try:
        for version in range(2):
            assert parties.sync(f"v{version}", seed=version).committed
        for rank, engine in enumerate(parties.engines):
            assert engine.holds(expected("mxfp8", model, engines.values(model, 1), SglangSizes(tp=2), rank))
    finally:
        parties.close()


def test_a_rank_has_codes_and_scales_in_place_of_a_fused_weight_and_the_rest_uncopied():
    left = megatron_layout(MODEL, MegatronSizes())
    buffers = trainer_buffers(MODEL, MegatronSizes(), 0, 1)
    made = quantise(left, 0, buffers, FORMS["fp8_block"])
    assert made["decoder.final_layernorm.weight"] is buffers["decoder.final_layernorm.weight"]
    assert "decoder.layers.0.self_attention.linear_qkv.weight" not in made
    assert made["model.layers.0.self_attn.q_proj.weight"].numel() == 512 * 256


ONE, TWO, FOUR = (MegatronSizes(tp=tp, vocabulary_multiple=8) for tp in (1, 2, 4))
ENGINE, LOW, NARROW = SglangSizes(), replace(MODEL, head_dim=16), replace(MODEL, ffn=256)
REFUSED = [
    ("fp8_block", LOW, TWO, ENGINE, r"k_proj.weight' of shape \(128, 256\): rows 0..64 cut blocks of 128"),
    ("fp8_block", MODEL, ONE, SglangSizes(tp=8), r"rows 0..64 cut blocks of 128 \(fp8_block\)"),
    ("fp8_block", replace(MODEL, kv_heads=1), ONE, ENGINE, r"v_proj.weight' of shape \(64, 256\) begins at row 576 of"),
    ("mxfp8", replace(MODEL, hidden=240), ONE, ENGINE, r"240 columns are no whole blocks of 32 \(mxfp8\)"),
    (
        "int4_group128",
        NARROW,
        FOUR,
        ENGINE,
        r"down_proj.weight' of shape \(256, 256\): columns 0..64 cut blocks of 128",
    ),
    ("int4_group32", replace(MODEL, hidden=252), ONE, ENGINE, "has no whole codes of 8 columns"),
    (BLACKWELL, MODEL, TWO, ENGINE, r"down_proj.weight' of shape \(256, 512\): columns 0..256 cut the 512 that"),
    (BLACKWELL, MODEL, ONE, SglangSizes(tp=2), r"columns 0..256 cut the 512 that 4 packed scales stand for"),
]


@pytest.mark.parametrize(("form", "model", "trainer", "rollout", "message"), REFUSED)
def test_a_cut_through_a_block_is_refused(form, model, trainer, rollout, message):
    with pytest.raises(LayoutError, match=message):
        make_plan(*in_form(FORMS[form], megatron_layout(model, trainer), sglang_layout(model, rollout)))
