"""The operations that the models spend their time in besides matrix products, each with one contract.

    op               used by                     replaces
    adaln_modulate   var, infinity               LayerNorm, scale, shift (and the gated residual add before it)
    qk_norm_rope     var, infinity, llamagen     l2 norm of q and k, learned scale, 2D RoPE, write into the KV cache
    sample_logits    var, llamagen               guidance, temperature, top-k, top-p and the random draw
    vq_nearest       vq                          nearest codebook row, without the N x V distance matrix
    group_norm_silu  vq, latentsync              GroupNorm followed by SiLU, in either memory format

What stands here is plain torch: the mathematical definition, the fallback on every device and the oracle that a fused
kernel has to equal. REGISTRY at the end lists each op with inputs, bytes and tolerance; tests and benchmarks iterate
over it, so an op cannot exist without them. Importing this file needs torch only and has no side effect.

Arithmetic is float32 inside, whatever the inputs are.
"""
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F


def _wide(t):
    """float32, in which every op computes; float64 stays float64, so that an op can serve as its own oracle."""
    return t if t.dtype == torch.float64 else t.float()


# Distances per slice of a nearest-code search: 4M floats = 16 MB, which a last-level cache holds.
SEARCH_CHUNK = 4 * 2**20


# ----------------------------------------------------------------------------------------------------------------------
# adaln_modulate


def adaln_modulate(x, scale, shift, eps=1e-6, *, kind="layer", weight=None, residual=None, gate=None, out_dtype=None):
    """y = norm(h) * (1 + scale) + shift, where h = residual + gate * x if a residual is given, else h = x.

    x:            (B, L, C), any float dtype: the input, or the output of the branch that has just been computed
    scale, shift: (B, 1, C) or (1, 1, C), or both None for the norm alone; gate likewise (None means 1)
    kind:         "layer": LayerNorm without affine, population variance; "rms": h / sqrt(mean(h^2) + eps) * weight
    residual:     (B, L, C), the residual stream; its dtype is that of h
    returns       y (B, L, C) in out_dtype (default x.dtype), or (y, h) if a residual was given
    """
    h, out_dtype = x, out_dtype or x.dtype
    if residual is not None:
        x = x.to(residual.dtype)
        h = residual + x if gate is None else torch.addcmul(residual, gate.to(residual.dtype), x)
    if kind == "layer":
        y = F.layer_norm(_wide(h), h.shape[-1:], eps=eps)
    elif kind == "rms":
        y = F.rms_norm(_wide(h), h.shape[-1:], eps=eps)
    else:
        raise ValueError(f"adaln_modulate: kind is 'layer' or 'rms', not {kind!r}")
    if weight is not None:
        y = y.to(weight.dtype) * weight  # Llama's order: round first, then multiply
    if scale is not None:
        y = torch.addcmul(_wide(shift), y, 1 + _wide(scale))
    return y.to(out_dtype) if residual is None else (y.to(out_dtype), h)


# ----------------------------------------------------------------------------------------------------------------------
# qk_norm_rope


def rotate_pairs(x, cos, sin):
    """Rotates the pairs (x[2i], x[2i+1]) by their angle: (a cos - b sin, a sin + b cos).

    x: (B, L, H, D); cos, sin: (L, D / 2). In 2D RoPE the first half of the angles is for rows, the second for columns.
    """
    a, b = x[..., 0::2], x[..., 1::2]               # (B, L, H, D / 2)
    cos, sin = cos[None, :, None], sin[None, :, None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def qk_norm_rope(q, k, v, *, q_scale=None, l2norm=True, cos=None, sin=None, k_cache=None, v_cache=None, pos=0):
    """Everything between the qkv projection and the attention kernel.

    q, k, v:          (B, L, H, D), may be views of a packed projection
    q_scale:          (H,) float32, multiplies q after its normalisation
    l2norm:           divide q and k by max(norm, 1e-12) over D
    cos, sin:         (L, D / 2) float32, rotation of q and k; None for no rotation
    k_cache, v_cache: (B, H, Lmax, D); the new keys and values are written at pos .. pos + L
    returns           q (B, H, L, D), k and v (B, H, pos + L, D): what the new queries may look at, in v.dtype
    """
    dtype = v.dtype
    if l2norm:
        q, k = F.normalize(_wide(q), dim=-1), F.normalize(_wide(k), dim=-1)
    if q_scale is not None:
        q = q * _wide(q_scale)[:, None]
    if cos is not None:
        q, k = rotate_pairs(_wide(q), cos, sin), rotate_pairs(_wide(k), cos, sin)
    q, k, v = (t.transpose(1, 2).to(dtype) for t in (q, k, v))  # (B, H, L, D)
    if k_cache is None:
        return q, k, v
    end = pos + k.shape[2]
    k_cache[:, :, pos:end] = k
    v_cache[:, :, pos:end] = v
    return q, k_cache[:, :, :end], v_cache[:, :, :end]


# ----------------------------------------------------------------------------------------------------------------------
# sample_logits


def filter_logits(logits, top_k=0, top_p=0.0):
    """Sets to -inf what top-k, and then top-p on the rest, remove.

    logits: (..., V); top_k: keep the k largest and their ties, 0 = all; top_p: of these keep a value, and its ties, if
    the probability mass of all larger ones is below top_p, so the largest always stays; 0 or 1 = all.

    Only the top_k survivors are sorted; the originals sort all V logits once more for top-p, to the same effect.
    """
    V = logits.shape[-1]
    top_k = min(top_k, V) if top_k > 0 else V
    nucleus = 0 < top_p < 1
    if top_k == V and not nucleus:
        return logits
    best = logits.topk(top_k).values                                        # (..., k), descending
    least = best[..., -1:]                                                  # smallest value kept
    if nucleus:
        kept = logits.masked_fill(logits < least, float("-inf")) if top_k < V else logits
        p = (_wide(best) - _wide(kept).logsumexp(-1, keepdim=True)).exp() # exact even if ties make more than k survive
        mass_above = p.cumsum(-1) - p
        n = (mass_above < top_p).sum(-1, keepdim=True).clamp(min=1)
        least = best.gather(-1, n - 1)
    return logits.masked_fill(logits < least, float("-inf"))


def exponential_noise(shape, generator=None, device=None):
    """Exp(1) noise of shape (B, ...). A list of B generators makes image b's draws independent of its batch."""
    if not isinstance(generator, (list, tuple)):
        return torch.empty(shape, device=device).exponential_(generator=generator)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}: give one, or one per image")
    return torch.stack([torch.empty(shape[1:], device=device).exponential_(generator=g) for g in generator])


def sample_logits(cond, uncond=None, *, cfg=1.0, temperature=1.0, top_k=0, top_p=0.0, noise=None, generator=None):
    """One draw per row from softmax(filter((cfg * cond + (1 - cfg) * uncond) / temperature)).

    cond, uncond: (..., V) float logits; noise: Exp(1) noise of that shape, by default drawn from generator
    returns       (...) int64

    The draw is an exponential race, argmax(p / noise): index for index what `torch.multinomial(p, 1, generator=...)`
    gives, which does the same internally but then waits for the device.
    """
    logits = _wide(cond) if uncond is None else cfg * _wide(cond) + (1 - cfg) * _wide(uncond)
    if temperature != 1.0:
        logits = logits / temperature
    p = filter_logits(logits, top_k, top_p).softmax(-1)
    if noise is None:
        noise = exponential_noise(p.shape, generator, p.device)
    return (p / noise).argmax(-1)


# ----------------------------------------------------------------------------------------------------------------------
# vq_nearest


def vq_nearest(z, codebook, *, l2norm=False):
    """Index of the nearest codebook row: argmin_v |z|^2 + |e_v|^2 - 2 z.e_v, the lowest index on ties.

    z: (N, C); codebook: (V, C); l2norm: normalise both first; returns (N,) int64. On CUDA leave torch's float32 matmul
    precision at "highest", its default: TF32 flips indices.
    """
    z, codebook = _wide(z), _wide(codebook)
    if l2norm:
        z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
    code_norm = codebook.square().sum(1)                                    # (V,)
    best = [torch.addmm(part.square().sum(1, keepdim=True) + code_norm, part, codebook.T, alpha=-2).argmin(1)
            for part in z.split(max(1, SEARCH_CHUNK // len(codebook)))]     # slices of (n, V)
    return torch.cat(best)


# ----------------------------------------------------------------------------------------------------------------------
# group_norm_silu


def group_norm_silu(x, weight, bias, groups=32, eps=1e-6, silu=True):
    """silu(group_norm(x)) of x (N, C, ...), contiguous or channels_last; keeps the memory format and the dtype."""
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y, inplace=not torch.is_grad_enabled()) if silu else y


# ----------------------------------------------------------------------------------------------------------------------
# The registry: what tests and benchmarks know about the ops


@dataclass(frozen=True)
class OpSpec:
    """An op, inputs to try it on, the bytes it must move at least, and how far float32 may be from float64."""

    fn: Callable
    make_inputs: Callable   # (generator, shape, dtype) -> (args, kwargs)
    shapes: dict            # name -> shape: a small odd one for tests, and real ones from the models
    bytes: Callable         # (shape, itemsize) -> int
    tol: float = 2e-5       # relative to the largest value; 0 for exact (integer) results


def _randn(g, *shape, dtype):
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def _adaln_inputs(g, shape, dtype):
    B, L, C = shape
    x, residual = _randn(g, B, L, C, dtype=dtype), _randn(g, B, L, C, dtype=dtype)
    scale, shift, gate = _randn(g, B, 1, 3, C, dtype=dtype).unbind(2)
    return (x, scale, shift), dict(residual=residual, gate=gate)


def _qk_inputs(g, shape, dtype):
    B, L, H, D = shape
    q, k, v = _randn(g, B, L, 3, H, D, dtype=dtype).unbind(2)
    angle = _randn(g, L, D // 2, dtype=dtype)
    return (q, k, v), dict(q_scale=_randn(g, H, dtype=dtype).exp(), cos=angle.cos(), sin=angle.sin())


def _sample_inputs(g, shape, dtype):
    cond, uncond = _randn(g, *shape, dtype=dtype), _randn(g, *shape, dtype=dtype)
    noise = torch.empty(shape).exponential_(generator=g)
    return (cond, uncond), dict(cfg=2.5, top_k=max(1, shape[-1] // 4), top_p=0.95, noise=noise)


def _vq_inputs(g, shape, dtype):
    N, V, C = shape
    return (_randn(g, N, C, dtype=dtype), _randn(g, V, C, dtype=dtype)), {}


def _gn_inputs(g, shape, dtype):
    C = shape[1]
    return (_randn(g, *shape, dtype=dtype), _randn(g, C, dtype=dtype), _randn(g, C, dtype=dtype)), {}


REGISTRY = {
    "adaln_modulate": OpSpec(adaln_modulate, _adaln_inputs,
                             {"odd": (3, 17, 40), "var_d30 last scale, 8 images": (16, 256, 1920)},
                             lambda s, i: 4 * s[0] * s[1] * s[2] * i),
    "qk_norm_rope": OpSpec(qk_norm_rope, _qk_inputs,
                           {"odd": (2, 5, 3, 12), "var_d30 last scale, 8 images": (16, 256, 30, 64)},
                           lambda s, i: 6 * s[0] * s[1] * s[2] * s[3] * i),
    "sample_logits": OpSpec(sample_logits, _sample_inputs,
                            {"odd": (7, 33), "var last scale, 8 images": (2048, 4096)},
                            lambda s, i: 3 * s[0] * s[1] * i, tol=0),
    "vq_nearest": OpSpec(vq_nearest, _vq_inputs,
                         {"odd": (17, 33, 5), "var 64 images": (43520, 4096, 32)},
                         lambda s, i: (s[0] + s[1]) * s[2] * i + 8 * s[0], tol=0),
    "group_norm_silu": OpSpec(group_norm_silu, _gn_inputs,
                              {"odd": (2, 32, 5, 3), "vae decoder, full resolution": (8, 160, 256, 256)},
                              lambda s, i: 2 * s[0] * s[1] * s[2] * s[3] * i),
}
