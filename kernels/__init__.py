"""TEMPORARY plain-torch stand-ins with the final signatures (replaced by the compiled ops)."""
from typing import NamedTuple
import torch, torch.nn.functional as F

def linear(x, w, bias=None, *, segments=1, out_dtype=None):
    y = F.linear(x.float(), w.float(), None if bias is None else bias.float())
    return y.to(out_dtype or x.dtype)

def embedding(ids, weight):
    return F.embedding(ids, weight)

def rms_norm(x, w, eps, *, residual=None):
    if residual is not None:
        x = (x.float() + residual.float()).to(x.dtype)
    xf = x.float()
    y = (xf * (1 / torch.sqrt(xf.pow(2).mean(-1, keepdim=True) + eps)) * w.float()).to(x.dtype)
    return y if residual is None else (y, x)

def rotary_table(max_positions, dim, base):
    inv = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
    a = torch.arange(max_positions, dtype=torch.float64)[:, None] * inv
    return torch.cat([a.cos(), a.sin()], -1).float()

def _rope(x, positions, table):
    c, s = table[positions].chunk(2, -1); c, s = c[:, None], s[:, None]
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)

def rotary(q, k, positions, table):
    return _rope(q, positions, table), _rope(k, positions, table)

def silu_and_mul(x):
    a, b = x.float().chunk(2, -1)
    return (F.silu(a) * b).to(x.dtype)

def _attend(q, k, v, scale):            # one query row: [H,D], keys [n,Hk,D]
    g = q.shape[0] // k.shape[1]
    k = k.float().repeat_interleave(g, 1); v = v.float().repeat_interleave(g, 1)
    p = torch.softmax((q.float()[None] * k).sum(-1) * scale, 0)
    return (p[..., None] * v).sum(0).to(q.dtype)

def attention_varlen(q, k, v, cu_seqlens, *, scale, causal=True, window=None, sinks=None):
    out = []
    c = cu_seqlens.tolist()
    for a, b in zip(c, c[1:]):
        for t in range(a, b):
            out.append(_attend(q[t], k[a:t + 1], v[a:t + 1], scale))
    return torch.stack(out) if out else q * 0

def attention_paged(q, k_cache, v_cache, page_table, seq_lens, q_lens, *, scale, window=None, sinks=None):
    out, s = torch.empty_like(q), 0
    page = k_cache.shape[1]
    kc, vc = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    for i in range(len(seq_lens)):
        L, n = int(seq_lens[i]), int(q_lens[i])
        t = torch.arange(L); slot = page_table[i].long()[t // page] * page + t % page
        for j in range(n):
            out[s + j] = _attend(q[s + j], kc[slot[:L - n + j + 1]], vc[slot[:L - n + j + 1]], scale)
        s += n
    return out

class SelectedLogprob(NamedTuple):
    logprob: torch.Tensor
    entropy: torch.Tensor | None

def logprob_from_logits(logits, targets, *, temperature=1.0, top_p=1.0, top_k=0):
    z = logits.float() / temperature
    return torch.log_softmax(z, -1).gather(-1, targets[:, None])[:, 0]

def selected_logprob(hidden, w, targets, *, temperature=1.0, top_p=1.0, top_k=0, entropy=False):
    return SelectedLogprob(logprob_from_logits(F.linear(hidden.float(), w.float()), targets, temperature=temperature), None)

class Sampled(NamedTuple):
    token: torch.Tensor
    logprob: torch.Tensor
    raw_logprob: torch.Tensor

def sample(logits, *, temperature, top_p, top_k, seed, position):
    """temperature, top_p fp32 [T]; top_k int32 [T] (0 = off); seed, position int64 [T]. temperature 0 = greedy."""
    tok = []
    for i in range(logits.shape[0]):
        g = torch.Generator().manual_seed(int(seed[i]) * 1000003 + int(position[i]))
        t = float(temperature[i])
        tok.append(logits[i].argmax() if t == 0 else torch.multinomial(torch.softmax(logits[i] / t, -1), 1, generator=g)[0])
    tok = torch.stack(tok)
    t = torch.where(temperature == 0, 1.0, temperature)[:, None]
    return Sampled(tok, logprob_from_logits(logits / t, tok), logprob_from_logits(logits, tok))
