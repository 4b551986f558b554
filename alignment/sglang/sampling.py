"""SGLang's sampler replaced by `kernels.sample`.

Two log-probabilities leave with every token, both exact fp32: the one under the distribution it was sampled from
(SGLang's ``output_token_logprobs``) and the raw one at temperature 1 without filters (``customized_info`` under
`RAW_LOGPROB`, which SGLang carries per token into the response's ``meta_info``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import xxhash
from sglang.srt.layers.sampler import Sampler
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from zerokl import kernels
from zerokl.alignment.sglang.errors import UnsupportedError
from zerokl.alignment.sglang.protocol import RAW_LOGPROB

DEFAULT_SEED = 42  # SGLang's own, for a request that names none


class ZeroKLSampler(Sampler):
    """Samples every row by its own seed and position, so a token does not depend on its batch.

    Ranks that share a model each sample, from the same bits of all logits; `sampled` shows that they drew the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self._sampled = xxhash.xxh3_128()

    def sampled(self) -> str:
        """The digest of all tokens so far, and of both log-probabilities of each; of nothing where one rank is all."""
        return self._sampled.hexdigest()

    def forward(  # SGLang's signature
        self,
        logits_output: Any,
        sampling_info: Any,
        return_logprob: bool,
        top_logprobs_nums: list[int],
        token_ids_logprobs: list[Any],
        positions: torch.Tensor,
        *,
        logprob_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sample one token per row of ``logits_output.next_token_logits`` (fp32 [T, V]); returns the tokens [T].

        ``positions`` int64 [T] is the position of each row's last known token. Raises UnsupportedError for a request
        feature that `kernels.sample` does not define.
        """
        _refuse(sampling_info, top_logprobs_nums, token_ids_logprobs, logprob_logits)
        self.calls += 1
        top_k = sampling_info.top_ks
        greedy = top_k == 1  # SGLang's form of temperature 0
        whole_vocabulary = top_k >= logits_output.next_token_logits.shape[-1]
        sampled = kernels.sample(
            logits_output.next_token_logits,
            temperature=sampling_info.temperatures.view(-1).masked_fill(greedy, 0.0),
            top_p=sampling_info.top_ps.masked_fill(greedy, 1.0),
            top_k=top_k.masked_fill(greedy | whole_vocabulary, 0),
            seed=sampling_info.sampling_seed,
            position=positions + 1,
        )
        if dist.get_world_size(self.tp_sync_group) > 1:
            for values in sampled:
                self._sampled.update(values.cpu().numpy().tobytes())
        if return_logprob:
            logits_output.next_token_logprobs = sampled.logprob
            logits_output.customized_info = {RAW_LOGPROB: sampled.raw_logprob.tolist()}
        return sampled.token


def create() -> ZeroKLSampler:
    """The sampler of one zerokl engine; called once, in its scheduler process."""
    HookRegistry.register(
        "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.adjusted_from_schedule_batch",
        _set_seeds,
        HookType.REPLACE,
    )
    HookRegistry.register(
        "sglang.srt.managers.schedule_batch.Req.reset_for_retract", _keep_known_logprobs, HookType.AFTER
    )
    HookRegistry.apply_hooks()
    return ZeroKLSampler()


def _keep_known_logprobs(_: Any, request: Any) -> None:
    """A retracted request is fed its own tokens again; SGLang would score them as a prompt, as which they are not."""
    request.logprob_start_len = len(request.origin_input_ids) + len(request.output_ids)


def _set_seeds(self: SamplingBatchInfo, batch: Any, vocab_size: int) -> None:  # noqa: ARG001  (SGLang's signature)
    """Fill ``sampling_seed`` (int64 [B]).

    SGLang fills it only under its deterministic inference, which would also patch torch's own matrix products.
    This method is the override point SGLang leaves at the end of building a batch; merging and filtering carry the
    field along once it is set.
    """
    seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
    self.sampling_seed = torch.tensor(
        [DEFAULT_SEED if seed is None else seed for seed in seeds], dtype=torch.int64, device=self.device
    )


def _refuse(info: Any, top_logprobs: list[int], token_ids: list[Any], logprob_logits: torch.Tensor | None) -> None:
    """Raise for anything that changed, or would change, the distribution beyond temperature, top-p and top-k."""
    orchestrator = info.penalizer_orchestrator
    found = {
        "min_p": info.need_min_p_sampling,
        "logit_bias": info.logit_bias is not None,
        "a frequency, presence or repetition penalty, or min_new_tokens": orchestrator and orchestrator.is_required,
        "a grammar (json_schema, regex, ebnf, structural_tag)": bool(info.grammars),
        "custom_logit_processor": info.has_custom_logit_processor,
        "watermark": info.has_watermark_candidates or logprob_logits is not None,
        "return_sampling_mask": info.sampling_mask_batch_indices is not None,
        "top_logprobs_num": any(top_logprobs or ()),
        "token_ids_logprob": any(ids is not None for ids in token_ids or ()),
    }
    names = [name for name, present in found.items() if present]
    if names:
        raise UnsupportedError(f"a request asks for {', '.join(names)}; zerokl samples by temperature, top_p and top_k")
