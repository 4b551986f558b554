"""Binding one loaded SGLang model to `zerokl.kernels`, and proving that the binding holds.

The hooks sit on module *instances* of the engine's own model: SGLang's layer classes stay as they are, and an engine
that did not ask for zerokl is untouched. Every module of the model must be of a type listed here, so a model with an
unknown layer is refused instead of half bound. Every hook counts its calls: a forward pass makes an exact number of
them, and `report.check_reports` refuses an engine whose counts differ after its warm-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.layers.rotary_embedding import RotaryEmbedding
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from zerokl import kernels
from zerokl.alignment import architectures
from zerokl.alignment.architectures import Architecture
from zerokl.alignment.routing import Router, router_of
from zerokl.alignment.sglang import moe_hooks, sampling
from zerokl.alignment.sglang.config import ARCHITECTURE_KEY, DISABLED_HOOKS_KEY, SEGMENTS_KEY
from zerokl.alignment.sglang.errors import UnsupportedError
from zerokl.alignment.sglang.ranks import Ranks

CONTAINERS = {
    "UnquantizedFusedMoEMethod",  # a child of the experts, whose forward is bound
    "ModuleList", "Pooler",
}  # fmt: skip
"""Module types of every architecture that compute nothing on the path from token ids to log-probabilities."""


@dataclass
class Hook:
    """One op, bound at ``sites`` (module, attribute, function), called ``per_forward`` times in a forward pass.

    ``op`` None: nothing is computed there any more.
    """

    name: str
    op: str | None
    per_forward: int
    calls: int = 0
    sites: list[tuple[Any, str, Callable[..., Any]]] = field(default_factory=list)

    def attach(self, module: Any, attribute: str, function: Callable[..., Any]) -> None:
        setattr(module, attribute, function)
        self.sites.append((module, attribute, function))

    def intact(self) -> bool:
        """Whether every site still holds the function bound there."""
        return all(getattr(module, attribute) is function for module, attribute, function in self.sites)


@dataclass
class Binding:
    """All hooks of one engine, with the attention backend and the sampler that run beside them."""

    architecture: str
    layers: int
    hooks: dict[str, Hook]
    backend: Any
    sampler: Any
    ranks: Ranks

    def reports(self, more: dict[str, Any]) -> list[dict[str, Any]]:
        """What `check_reports` needs, of every rank, and ``more`` of this one's. Every rank must call it."""
        return self.ranks.gathered(self._report() | more)

    def _report(self) -> dict[str, Any]:
        """This rank's own, in plain types that cross SGLang's process boundary."""
        rows = [
            {
                "hook": hook.name,
                "op": hook.op,
                "sites": len(hook.sites),
                "per_forward": hook.per_forward,
                "calls": hook.calls,
                "intact": hook.intact(),
            }
            for hook in self.hooks.values()
        ]
        rows.append(_built("attention", "attention_paged", self.layers, self.backend.calls))
        rows.append(_built("sample", "sample", 1, self.sampler.calls))
        return {
            "rank": self.ranks.rank,
            "architecture": self.architecture,
            "forwards": self.backend.forwards,
            "sampled": self.sampler.sampled(),
            "hooks": rows,
        }


def _built(hook: str, op: str, per_forward: int, calls: int) -> dict[str, Any]:
    return {"hook": hook, "op": op, "sites": 1, "per_forward": per_forward, "calls": calls, "intact": True}


def bind(runner: Any, backend: Any) -> Binding:
    """Bind every module of the runner's model. Raises UnsupportedError for anything the kernels do not define."""
    model = runner.model
    config = model.config
    architecture = _architecture(type(model).__name__, getattr(config, ARCHITECTURE_KEY, None))
    containers = CONTAINERS.union(architecture.sglang_containers)
    _check_cache(runner)
    ranks = Ranks(getattr(config, SEGMENTS_KEY, 1))  # not there: a server started by hand, on one rank
    runner.sampler = sampling.create()
    described = config.to_dict() | {"architectures": [architecture.name]}
    router, head_norms = router_of(described), architecture.has_head_norm(described)
    _check_rotary(model, architecture, float(architecture.rotated_fraction(described)))
    table = {hook.name: hook for hook in _expected(config.num_hidden_layers, head_norms, router, ranks)}
    if ranks.size > 1:
        ranks.replace_sums(table["tree_all_reduce"], table["group_sum"])
    disabled = _disabled(getattr(config, DISABLED_HOOKS_KEY, ()), ranks.rank)
    for name, module in model.named_modules():  # a shared module (tied embedding, rotary table) comes once
        binder = _BINDERS.get(type(module)) or _MODEL_BINDERS.get(type(module).__name__)
        if binder is None:
            if type(module).__name__ not in containers:
                raise UnsupportedError(f"module {name} is a {type(module).__name__}, which zerokl does not define")
            continue
        bind_module, names = binder
        if disabled.isdisjoint(names):
            bind_module(name, module, ranks, *(table[key] for key in names))
    return Binding(architecture.name, config.num_hidden_layers, table, backend, runner.sampler, ranks)


def _disabled(names: Iterable[str], rank: int) -> set[str]:
    """The hooks left out on this rank: those named alone, or with it."""
    split = (name.partition("@") for name in names)
    return {name for name, _, where in split if where in ("", str(rank))}


def _architecture(name: str, plugin: dict[str, Any] | None) -> Architecture:
    found = architectures.find(name, None if plugin is None else Architecture(**plugin))
    if found is None:
        raise UnsupportedError(f"architecture {name} is not supported; supported: {architectures.supported()}")
    return found


def _check_rotary(model: Any, architecture: Architecture, fraction: float) -> None:
    """The engine's own model must turn its heads as the trainer reads the same ``config.json``."""
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            found = module.rotary_dim, not module.is_neox_style
            expected = int(fraction * module.head_size), architecture.interleaved_rotary
            if found != expected:
                raise UnsupportedError(
                    f"{architecture.name}: SGLang turns (dimensions, interleaved) = {found}, the architecture says "
                    f"{expected}; correct its partial_rotary or interleaved_rotary"
                )


def _expected(layers: int, head_norms: bool, router: Router | None, ranks: Ranks) -> Iterator[Hook]:
    """The hooks and how often one forward pass must call each."""
    sparse = 0 if router is None else router.sparse_layers
    shared = 0 if router is None or not router.shared_experts else sparse
    yield Hook("embedding", "embedding", 1)
    yield Hook("linear", "linear", layers + layers - sparse + shared)
    yield Hook("row_linear", "linear", layers + layers - sparse + shared)
    yield Hook("rms_norm", "rms_norm", 1 + (2 * layers if head_norms else 0))
    yield Hook("add_rms_norm", "rms_norm", 2 * layers)
    yield Hook("rotary", "rotary", layers)
    yield Hook("silu_and_mul", "silu_and_mul", layers + shared)
    yield Hook("lm_head", "linear", 1)
    if sparse:
        yield Hook("router_gate", "linear", sparse)
        yield Hook("router_topk", "router_topk", sparse)
        yield Hook("moe_permute", "moe_permute", sparse)
        yield Hook("grouped_linear", "grouped_linear", 2 * sparse)
        yield Hook("moe_combine", "moe_combine", sparse)
    if ranks.size > 1:
        yield Hook("tree_all_reduce", "tree_all_reduce", 2 * layers + shared)
        yield Hook("group_sum", None, 2 * layers)


def _check_cache(runner: Any) -> None:
    key = runner.token_to_kv_pool.get_key_buffer(0)
    if key.dim() != 3 or key.dtype is not torch.bfloat16:
        raise UnsupportedError(f"the KV pool must be bfloat16 [slots, heads, dim]: got {key.dtype} {tuple(key.shape)}")


def _bind_embedding(name: str, module: Any, ranks: Ranks, hook: Hook) -> None:

    def forward(ids: torch.Tensor) -> torch.Tensor:
        hook.calls += 1
        return ranks.embedding(ids.long(), module)

    if module.output_dtype is not None:
        raise UnsupportedError(f"module {name}: output_dtype is not supported")
    hook.attach(module, "forward", forward)


def _bind_linear(name: str, module: Any, ranks: Ranks, hook: Hook) -> None:  # noqa: ARG001
    _check_linear(name, module)
    _attach_linear(name, module, hook, lambda x: kernels.linear(x, module.weight, module.bias))


def _bind_row_linear(name: str, module: Any, ranks: Ranks, hook: Hook) -> None:
    _check_linear(name, module)
    if ranks.size > 1 and module.bias is not None:
        raise UnsupportedError(f"module {name}: a bias under tensor parallelism is not supported")
    _attach_linear(name, module, hook, lambda x: ranks.row_linear(x, module.weight, module.bias))


def _check_linear(name: str, module: Any) -> None:
    if type(module.quant_method) is not UnquantizedLinearMethod or module.weight.dtype is not torch.bfloat16:
        raise UnsupportedError(f"module {name}: quantized or non-bfloat16 weights are not supported")
    if module.skip_bias_add:
        raise UnsupportedError(f"module {name}: skip_bias_add is not supported")


def _attach_linear(name: str, module: Any, hook: Hook, product: Callable[[torch.Tensor], torch.Tensor]) -> None:

    def forward(x: torch.Tensor, *_: Any, output_tensor: torch.Tensor | None = None, **__: Any) -> Any:
        if output_tensor is not None:
            raise UnsupportedError(f"module {name}: a caller-owned output is not supported")
        hook.calls += 1
        return product(x), None

    hook.attach(module, "forward", forward)


def _bind_norm(name: str, module: Any, ranks: Ranks, plain: Hook, added: Hook) -> None:  # noqa: ARG001
    if module.variance_size_override is not None or not module.has_weight or module.weight.dtype is not torch.bfloat16:
        raise UnsupportedError(f"module {name}: only RMSNorm over the whole row with a bfloat16 weight is supported")
    eps = module.variance_epsilon

    def forward(x: torch.Tensor, residual: Any = None, extra: Any = None, quant_linear: Any = None) -> Any:  # noqa: ARG001
        if extra is not None:
            raise UnsupportedError(f"module {name}: a second residual addition is not supported")
        if residual is None:
            plain.calls += 1
            return kernels.rms_norm(x, module.weight, eps)
        added.calls += 1
        return kernels.rms_norm(x, module.weight, eps, residual=residual)

    plain.attach(module, "forward", forward)
    added.attach(module, "forward", forward)


def _bind_rotary(name: str, module: Any, ranks: Ranks, hook: Hook) -> None:  # noqa: ARG001
    dim, interleaved = module.head_size, not module.is_neox_style
    table = kernels.rotary_table(module.max_position_embeddings, module.rotary_dim, module.base)

    def forward(positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *unknown: Any, **named: Any) -> Any:
        if any(value is not None for value in (*unknown, *named.values())):
            raise UnsupportedError(f"module {name}: offsets and fused cache writes are not supported")
        hook.calls += 1
        tokens = q.shape[0]
        q, k = q.view(tokens, -1, dim), k.view(tokens, -1, dim)
        q_out, k_out = kernels.rotary(q, k, positions, table, interleaved=interleaved)
        return q_out.view(tokens, -1), k_out.view(tokens, -1)

    hook.attach(module, "forward", forward)


def _bind_silu(name: str, module: Any, ranks: Ranks, hook: Hook) -> None:  # noqa: ARG001

    def forward(x: torch.Tensor) -> torch.Tensor:
        hook.calls += 1
        return kernels.silu_and_mul(x)

    hook.attach(module, "forward", forward)


def _bind_logits(name: str, module: Any, ranks: Ranks, hook: Hook) -> None:
    if module.logit_scale is not None or module.final_logit_softcapping is not None:
        raise UnsupportedError(f"module {name}: logit scaling and soft-capping are not supported")
    vocabulary = module.vocab_size

    def lm_head(hidden: torch.Tensor, head: Any, bias: Any = None, *, out: Any = None) -> torch.Tensor:  # noqa: ARG001
        if bias is not None:
            raise UnsupportedError(f"module {name}: an LM head bias is not supported")
        hook.calls += 1
        # SGLang pads the vocabulary; the kernels see its real rows only. Of several ranks each has its share, without
        # padding, and SGLang puts their logits, as they are, beside each other on every rank
        rows = head.weight[:vocabulary] if ranks.size == 1 else head.weight
        return kernels.linear(hidden, rows, out_dtype=torch.float32)

    def input_logprobs(*_: Any, **__: Any) -> Any:
        raise UnsupportedError("log-probabilities of prompt tokens (logprob_start_len) are not supported")

    hook.attach(module, "_compute_lm_head", lm_head)
    hook.attach(module.input_logprob_processor, "forward", input_logprobs)


def _check_attention(name: str, module: Any, ranks: Ranks) -> None:  # noqa: ARG001
    """The backend computes it; only features it does not know are refused here."""
    plain = (
        module.logit_cap == 0
        and module.sliding_window_size == -1
        and not module.is_cross_attention
        and module.attn_type is AttentionType.DECODER
        and module.v_head_dim == module.qk_head_dim
        and module.k_scale is None
        and module.xai_temperature_len == -1
    )
    if not plain:
        raise UnsupportedError(f"module {name}: only plain causal attention is supported (no window, cap or scales)")


def _write_the_cache_apart(name: str, module: Any, ranks: Ranks) -> None:  # noqa: ARG001
    """On CUDA this model's rotary embedding would also store keys and values; the attention backend does."""
    module.compatible_with_fused_kv_buffer = False


def _ignore(name: str, module: Any, ranks: Ranks) -> None:
    """An untied LM head is only a weight: `_compute_lm_head` reads it."""


_BINDERS: dict[type, tuple[Callable[..., None], tuple[str, ...]]] = {
    VocabParallelEmbedding: (_bind_embedding, ("embedding",)),
    ParallelLMHead: (_ignore, ()),
    QKVParallelLinear: (_bind_linear, ("linear",)),
    MergedColumnParallelLinear: (_bind_linear, ("linear",)),
    RowParallelLinear: (_bind_row_linear, ("row_linear",)),
    RMSNorm: (_bind_norm, ("rms_norm", "add_rms_norm")),
    RotaryEmbedding: (_bind_rotary, ("rotary",)),
    SiluAndMul: (_bind_silu, ("silu_and_mul",)),
    RadixAttention: (_check_attention, ()),
    LogitsProcessor: (_bind_logits, ("lm_head",)),
    ReplicatedLinear: (moe_hooks.bind_gate, ("router_gate",)),
    TopK: (moe_hooks.bind_topk, ("router_topk",)),
    FusedMoE: (moe_hooks.bind_experts, ("moe_permute", "grouped_linear", "silu_and_mul", "moe_combine")),
}
"""For each module type: what binds it, and the hooks it is bound to."""

_MODEL_BINDERS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "Qwen3MoeAttention": (_write_the_cache_apart, ()),
    "Glm4MoeGate": (moe_hooks.bind_wide_gate, ("router_gate",)),
    "Glm4MoeSparseMoeBlock": (moe_hooks.bind_block, ("moe_combine",)),
}
"""The same for types of one model's own file, by name: importing the file would cost every engine seconds."""
