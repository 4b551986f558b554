"""Small models for the tests: their tensors, and what each engine's rank holds of them, sliced directly."""

import numpy as np

from zerokl.weightsync.layout import Layout, Rank
from zerokl.weightsync.megatron_layout import MegatronSizes
from zerokl.weightsync.model_shape import ModelShape
from zerokl.weightsync.sglang_layout import SglangSizes

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def values(model: ModelShape, seed: int = 0) -> dict[str, np.ndarray]:
    """Random bits of every tensor: bf16 as uint16, fp32 as uint32."""
    generator = np.random.default_rng(seed)
    kinds = {"bfloat16": np.uint16, "float32": np.uint32}
    return {
        n: generator.integers(0, 1 << 8 * t.item_bytes, t.shape, kinds[t.dtype]) for n, t in model.tensors().items()
    }


def padded(x: np.ndarray, multiple: int) -> np.ndarray:
    return np.pad(x, ((0, -len(x) % multiple), (0, 0)))


def megatron_rank(model: ModelShape, full: dict, sizes: MegatronSizes, rank: int) -> dict[str, np.ndarray]:
    """The parameters of one rank as Megatron would hold them."""
    stage, inner = divmod(rank, sizes.tp * sizes.dp)
    tp = inner % sizes.tp
    held = {}
    if stage == 0:
        held["embedding.word_embeddings.weight"] = np.split(
            padded(full[EMBEDDING], sizes.vocabulary_multiple), sizes.tp
        )[tp]
    if stage == sizes.pp - 1:
        held["decoder.final_layernorm.weight"] = full["model.norm.weight"]
        if not model.tied or sizes.pp > 1:
            head = full[EMBEDDING if model.tied else HEAD]
            held["output_layer.weight"] = np.split(padded(head, sizes.vocabulary_multiple), sizes.tp)[tp]
    count = model.layers // sizes.pp
    for local in range(count):
        hf = {
            name.removeprefix(f"model.layers.{stage * count + local}."): x
            for name, x in full.items()
            if name.startswith(f"model.layers.{stage * count + local}.")
        }
        own = f"decoder.layers.{local}."
        for leaf in ("weight", "bias") if model.qkv_bias else ("weight",):
            q, k, v = (np.split(hf[f"self_attn.{n}_proj.{leaf}"], model.kv_heads) for n in "qkv")
            fused = np.concatenate([np.concatenate(group) for group in zip(q, k, v, strict=True)])
            held[f"{own}self_attention.linear_qkv.{leaf}"] = np.split(fused, sizes.tp)[tp]
        held[f"{own}self_attention.linear_proj.weight"] = np.split(hf["self_attn.o_proj.weight"], sizes.tp, 1)[tp]
        if model.sparse(stage * count + local):
            held[f"{own}mlp.router.weight"] = hf["mlp.gate.weight"]
            if model.choice_bias:
                held[f"{own}mlp.router.expert_bias"] = hf["mlp.gate.e_score_correction_bias"]
            if model.shared_ffn:
                held |= megatron_mlp(hf, "mlp.shared_experts.", f"{own}mlp.shared_experts.", tp, sizes.tp)
            etp, ep = inner % sizes.etp, inner // sizes.etp % sizes.ep
            mine = np.split(np.arange(model.experts), sizes.ep)[ep]
            mlps = {f"{own}mlp.experts.local_experts.{i}.": f"mlp.experts.{e}." for i, e in enumerate(mine)}
            part, parts = etp, sizes.etp
        else:
            mlps, part, parts = {f"{own}mlp.": "mlp."}, tp, sizes.tp
        for name, source in mlps.items():
            held |= megatron_mlp(hf, source, name, part, parts)
        held[f"{own}input_layernorm.weight"] = hf["input_layernorm.weight"]
        held[f"{own}pre_mlp_layernorm.weight"] = hf["post_attention_layernorm.weight"]
        if model.qk_norm:
            held[f"{own}self_attention.q_layernorm.weight"] = hf["self_attn.q_norm.weight"]
            held[f"{own}self_attention.k_layernorm.weight"] = hf["self_attn.k_norm.weight"]
    return held


def megatron_mlp(hf: dict, source: str, own: str, part: int, parts: int) -> dict[str, np.ndarray]:
    gate, up = (np.split(hf[f"{source}{n}_proj.weight"], parts)[part] for n in ("gate", "up"))
    down = np.split(hf[f"{source}down_proj.weight"], parts, 1)[part]
    return {f"{own}linear_fc1.weight": np.concatenate([gate, up]), f"{own}linear_fc2.weight": down}


def sglang_rank(model: ModelShape, full: dict, sizes: SglangSizes, rank: int) -> dict[str, np.ndarray]:
    """The parameters of one rank as SGLang would hold them."""
    rank, held = rank % sizes.tp, {}
    repeat = max(1, sizes.tp // model.kv_heads)  # this many ranks share a key-value head
    split = sizes.tp // sizes.ep
    for name, x in full.items():
        path, last = name.rsplit(".", 2)[0], name.split(".")[-2]
        expert = ".experts." in name
        leaf = name.split(".")[-1]
        if name in (EMBEDDING, HEAD):
            held[name] = np.split(padded(x, 64), sizes.tp)[rank]
        elif last in ("o_proj",) or (last == "down_proj" and not expert):
            held[name] = np.split(x, sizes.tp, 1)[rank]
        elif last == "q_proj":
            kv = [full[f"{path}.{n}_proj.{leaf}"] for n in "kv"]
            parts = [np.split(x, sizes.tp)[rank], *(np.split(y, sizes.tp // repeat)[rank // repeat] for y in kv)]
            held[f"{path}.qkv_proj.{leaf}"] = np.concatenate(parts)
        elif last == "gate_proj" and not expert:
            parts = [np.split(y, sizes.tp)[rank] for y in (x, full[f"{path}.up_proj.{leaf}"])]
            held[f"{path}.gate_up_proj.{leaf}"] = np.concatenate(parts)
        elif name.endswith("experts.0.gate_proj.weight"):
            group = path.rsplit(".", 1)[0]
            mine = np.split(np.arange(model.experts), sizes.ep)[rank // split]
            shares = [
                np.split(full[f"{group}.{e}.{n}_proj.weight"], split)[rank % split]
                for e in mine
                for n in ("gate", "up")
            ]
            held[f"{group}.w13_weight"] = np.concatenate(shares)
            downs = [np.split(full[f"{group}.{e}.down_proj.weight"], split, 1)[rank % split] for e in mine]
            held[f"{group}.w2_weight"] = np.concatenate(downs)
        elif last not in ("k_proj", "v_proj", "up_proj", "gate_proj", "down_proj"):
            held[name] = x
    return held


def memory(held: dict[str, np.ndarray], rank: Rank) -> dict[str, np.ndarray]:
    """A rank's buffers as bytes; they must be the ones its layout names, of the sizes it gives."""
    flat = {name: np.ascontiguousarray(x).reshape(-1).view(np.uint8).copy() for name, x in held.items()}
    assert {name: len(x) for name, x in flat.items()} == rank.buffers
    return flat


def blank(layout: Layout) -> list[dict[str, np.ndarray]]:
    return [{name: np.zeros(size, np.uint8) for name, size in rank.buffers.items()} for rank in layout.ranks]
