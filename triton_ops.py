"""Six operations that take most of the models' time besides matrix products, in plain torch and as Triton kernels.

    op               used by                     what the kernel fuses into one pass over memory
    adaln_modulate   var, infinity, llamagen     gated residual add, LayerNorm or RMSNorm, scale and shift
    qk_norm_rope     var, infinity, llamagen     l2 norm of q and k, learned scale, 2D RoPE, write into the KV cache
    decode_attention llamagen                    attention of one new token to the filled part of a KV cache
    sample_logits    var, llamagen               guidance, temperature, top-k, top-p and the random draw, without a sort
    vq_nearest       vq                          nearest codebook row, without storing the N x V distance matrix
    group_norm_silu  vq, latentsync              GroupNorm followed by SiLU, contiguous or channels_last

The first part of the file has one public function per op. It states the contract, launches the kernel where one can
run, and otherwise computes the op in plain torch. These torch lines define what the kernel has to equal. The second
part has the kernels. REGISTRY at the end lists test inputs, real shapes and minimal memory traffic of every op. Tests,
benchmark and README iterate over it. Importing this file needs torch only, no Triton and no GPU.

These ops do little arithmetic per number. On a GPU their time is the time of their memory traffic (an H100 moves 3.35
TB/s) or, if the tensors are small, the time of a kernel launch. Without fusion, each step of a chain writes its result
to memory, and the next step reads it back. In every kernel a program (a block of threads) owns some rows or a tile. It
holds them in registers, in float32, from the load to the store. The kernels add up sums in a fixed order, without
atomics, so two runs give the same bits. No op waits for the device, so a CUDA graph can capture all of them. Call an op
once with the same arguments before capture, so that its kernel is compiled by then.

    OPS_BACKEND=auto     kernels for CUDA tensors if Triton is installed, else torch (the default)
    OPS_BACKEND=torch    always torch
    OPS_BACKEND=triton   kernels, and an error for a tensor on a device where Triton cannot run
    TRITON_INTERPRET=1   Triton's interpreter runs the kernels on the CPU, for tests and debugging
    python sample.py ops --bench [op ...] [--json FILE]

Under every setting, torch computes float64 tensors, empty tensors, and shapes for which the `fits` of an op is False.
So kernels need not check shapes: torch broadcasts other shapes or raises an error. Kernels run on the
current CUDA device, as in all of Triton. Call `torch.cuda.set_device` first if the tensors are on another device.
"""
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Callable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:                                                         # the kernels below must still be importable
    triton = None
    tl = SimpleNamespace(constexpr=None)

    def jit(kernel):
        return kernel

BACKEND = os.environ.get("OPS_BACKEND", "auto")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
SEARCH_CHUNK = 4 * 2**20  # distances that vq_nearest computes at a time in torch: 16 MB, which fit into the CPU's cache


class BackendError(RuntimeError):
    """OPS_BACKEND has an unknown value, or asks for Triton where it cannot run."""


@contextmanager
def backend(name):
    """Context manager in which BACKEND is `name`. The environment variable stays."""
    global BACKEND
    before = BACKEND
    BACKEND = name
    try:
        yield
    finally:
        BACKEND = before


def use_triton(x):
    """Whether a kernel computes the op for x. It looks at Python values only, so torch.compile can resolve it."""
    if BACKEND == "torch" or x.dtype == torch.float64 or x.numel() == 0:    # tests use float64 as their reference
        return False
    possible = triton is not None and (x.is_cuda or INTERPRET)
    if BACKEND == "triton" and not possible:
        raise BackendError(f"OPS_BACKEND=triton: Triton cannot run on {x.device} here; use OPS_BACKEND=auto")
    if BACKEND not in ("auto", "triton"):
        raise BackendError(f"OPS_BACKEND={BACKEND}: expected auto, torch or triton")
    return possible


def _wide(t):
    """t in float32, in which every op computes. float64 stays float64, so that tests can compare with an exact op."""
    return t if t.dtype == torch.float64 else t.float()


def _block(n):
    """n rounded up to a power of two, as Triton requires for block sizes. Kernels mask the rest with `ok`."""
    return 1 << (n - 1).bit_length()


def _warps(block):
    """Warps per program, for a block of this many numbers."""
    return 4 if block < 2048 else 8 if block < 8192 else 16 if block < 32768 else 32


# ----------------------------------------------------------------------------------------------------------------------
# The ops: what each computes, in torch


def adaln_modulate(x, scale, shift, eps=1e-6, *, kind="layer", weight=None, residual=None, gate=None, out_dtype=None):
    """y = norm(h) * (1 + scale) + shift, where h = residual + gate * x if a residual is given, else h = x.

    x:            (B, L, C) of any float dtype: the input, or the output of an attention or feed-forward branch
    scale, shift: (B, 1, C) or (1, 1, C), in torch also (B, L, C); both None: no modulation
    gate:         same shapes as scale; None means 1
    kind:         "layer": LayerNorm without affine, population variance; "rms": h / sqrt(mean(h^2) + eps)
    weight:       (C,). The normalised h is rounded to the weight's dtype, then multiplied by the weight, as in Llama
    residual:     (B, L, C), the residual stream. h has its dtype
    returns       y (B, L, C) in out_dtype (default x.dtype), or (y, h) if a residual was given

    Memory traffic in bf16: reading x and residual and writing y and h takes 8 bytes per element. Separate steps under
    autocast take 38: gate 4, add 6, norm into float32 6, scale 8, shift 8, cast 6. Scale, shift and gate have one row
    per picture, which stays in the cache.
    """
    if (scale is None) != (shift is None) or (gate is not None and residual is None):
        raise ValueError("adaln_modulate: scale and shift go together, and a gate needs a residual")
    if kind not in ("layer", "rms"):
        raise ValueError(f"adaln_modulate: kind is 'layer' or 'rms', not {kind!r}")
    B, L, C = x.shape if x.dim() == 3 else (0, 0, 0)
    fits = (0 < C <= 16384 and all(t is None or t.shape in ((B, 1, C), (1, 1, C)) for t in (scale, shift, gate))
            and (residual is None or residual.shape == x.shape) and (weight is None or weight.shape == (C,)))
    if use_triton(x) and fits:                                              # C <= 16384: a row must fit into registers
        return _AdaLN.apply(x, scale, shift, weight, residual, gate, eps, kind == "layer", out_dtype or x.dtype)
    h = x
    if residual is not None:
        if gate is None:
            h = _wide(residual) + _wide(x)
        else:
            h = torch.addcmul(_wide(residual), _wide(gate), _wide(x))
        h = h.to(residual.dtype)
    norm = F.layer_norm if kind == "layer" else F.rms_norm
    y = norm(_wide(h), h.shape[-1:], eps=eps)
    if weight is not None:
        y = y.to(weight.dtype) * weight                                     # Llama's order: round, then multiply
    if scale is not None:
        y = torch.addcmul(_wide(shift), _wide(y), 1 + _wide(scale))
    y = y.to(out_dtype or x.dtype)
    return y if residual is None else (y, h)


def rotate_pairs(x, cos, sin):
    """Rotates the pairs (x[2i], x[2i+1]) by their angle: (a cos - b sin, a sin + b cos).

    x: (B, L, H, D); cos, sin: (L, D / 2). In 2D RoPE the first half of the angles is for rows, the second for columns.
    """
    a = x[..., 0::2]                                                        # (B, L, H, D / 2)
    b = x[..., 1::2]
    cos = cos[None, :, None]
    sin = sin[None, :, None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def qk_norm_rope(q, k, v, *, q_scale=None, l2norm=True, cos=None, sin=None, k_cache=None, v_cache=None, pos=0):
    """Computes everything between the qkv projection and the attention: norm, scale, rotation, writing into the cache.

    q, k, v:          (B, L, H, D), may be views of a packed projection. Fewer heads in k and v than in q: torch only
    q_scale:          (H,) float32, multiplies q after its normalisation
    l2norm:           divide q and k by max(norm, 1e-12) over D
    cos, sin:         (L, D / 2) float32, rotation of the pairs (2i, 2i + 1) of q and k; None for no rotation
    k_cache, v_cache: (B, H, Lmax, D); the new keys and values are written at pos .. pos + L, without gradient
    pos:              an int, or an int tensor of one element on the device, which a CUDA graph reads at every replay
    returns           q (B, H, L, D) in v.dtype, and the keys and values it attends to: k and v (B, H, L, D), or the
                      first pos + L rows of the caches. If pos is a tensor it returns the whole caches, because the host
                      does not know how far they are filled

    Memory traffic in bf16: reading q, k, v and writing q and the new cache rows takes 4 bytes per number. Separate
    steps (norm, division, both halves of the rotation, stack, cast, copy), most of them in float32, take about 70 for q
    and k.
    """
    on_device = isinstance(pos, torch.Tensor)
    room = 0 if k_cache is None else k_cache.shape[2]
    end = room if on_device else pos + k.shape[1]
    if k_cache is not None and not (on_device or 0 <= pos <= end <= room):
        raise ValueError(f"qk_norm_rope: {k.shape[1]} tokens at {pos} do not fit into a cache of {room}")
    B, L, H, D = q.shape
    fits = (q.shape == k.shape == v.shape and (q_scale is None or q_scale.shape == (H,))
            and (cos is None or (cos.shape == sin.shape == (L, D // 2) and D % 2 == 0)))
    if k_cache is not None:                                                 # the kernel has one set of strides for both
        fits = (fits and not torch.is_grad_enabled() and k_cache.shape == v_cache.shape == (B, H, room, D)
                and k_cache.stride() == v_cache.stride() and k_cache.stride(-1) == 1)
    if use_triton(q) and fits:
        q_scale, cos, sin = (t if t is None else t.contiguous() for t in (q_scale, cos, sin))
        start = 0 if k_cache is None else pos                               # without a cache k_out begins at 0
        q, new_k = _QKNormRope.apply(q, k, v, q_scale, cos, sin, l2norm, k_cache, v_cache, start)
        if k_cache is None:
            return q, new_k, v.transpose(1, 2)
        return q, k_cache[:, :, :end], v_cache[:, :, :end]
    dtype = v.dtype
    if l2norm:
        q = F.normalize(_wide(q), dim=-1)
        k = F.normalize(_wide(k), dim=-1)
    if q_scale is not None:
        q = _wide(q) * _wide(q_scale)[:, None]
    if cos is not None:
        q = rotate_pairs(_wide(q), cos, sin)
        k = rotate_pairs(_wide(k), cos, sin)
    q, k, v = (t.transpose(1, 2).to(dtype) for t in (q, k, v))              # (B, H, L, D)
    if k_cache is None:
        return q, k, v
    where = pos + torch.arange(k.shape[2], device=k.device) if on_device else slice(pos, end)
    k_cache[:, :, where] = k
    v_cache[:, :, where] = v
    return q, k_cache[:, :, :end], v_cache[:, :, :end]


def decode_attention(q, k, v, pos, *, visible=None, scale=None):
    """softmax(scale q k^T) v for one token per picture, over the first pos + 1 rows of a KV cache.

    q:       (B, H, 1, D)
    k, v:    (B, Hkv, Lmax, D), whole caches with equal strides; each of their heads serves H / Hkv heads of q
    pos:     position of the token: an int, or an int tensor of one element on the device, which a CUDA graph reads at
             every replay
    visible: (B, Lmax) bool, False for rows that must not be attended to; at least one row up to pos must be True
    scale:   by default D ** -0.5
    returns  (B, H, 1, D) in q.dtype, without gradient

    Memory traffic: the kernel reads the filled rows of both caches. If the position is a tensor, torch has to read both
    caches whole and to mask the rest. Over a whole picture this is twice as much.
    """
    B, H, _, D = q.shape
    _, heads, room, _ = k.shape
    if scale is None:
        scale = D ** -0.5
    on_device = isinstance(pos, torch.Tensor)
    fits = (q.shape[2] == 1 and D <= 256 and H % heads == 0 and H // heads <= 8
            and k.shape == v.shape == (B, heads, room, D) and k.stride() == v.stride() and k.stride(-1) == 1
            and (visible is None or (visible.shape == (B, room) and visible.stride(1) == 1)))
    if use_triton(q) and fits and not (q.requires_grad or k.requires_grad or v.requires_grad):
        return _decode(q, k, v, pos, visible, scale)
    mask = None if visible is None else visible[:, None, None]              # (B, 1, 1, Lmax)
    if on_device:
        filled = (torch.arange(room, device=k.device) <= pos)[None, None, None]         # (1, 1, 1, Lmax)
        mask = filled if mask is None else mask & filled
    else:
        k = k[:, :, :pos + 1]
        v = v[:, :, :pos + 1]
        mask = None if mask is None else mask[..., :pos + 1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=H != heads)


def filter_logits(logits, top_k=0, top_p=0.0):
    """Sets the logits (..., V) that top-k removes to -inf, and then those that top-p removes from the rest.

    top_k: keep the k largest and their ties; 0 keeps all
    top_p: keep a value and its ties if all larger values have less than top_p probability mass together. The largest
           value therefore always stays. 0 and 1 keep all

    Only the top_k survivors are sorted. The originals sort all V logits a second time for top-p, with the same result.
    """
    V = logits.shape[-1]
    top_k = min(top_k, V) if top_k > 0 else V
    nucleus = 0 < top_p < 1
    if top_k == V and not nucleus:
        return logits
    if not nucleus:                                                         # finding the k-th largest needs no sort
        least = logits.kthvalue(V - top_k + 1, keepdim=True).values
    else:
        best = logits.topk(top_k).values                                    # (..., k), descending
        least = best[..., -1:]                                              # smallest value kept
        kept = logits.masked_fill(logits < least, float("-inf")) if top_k < V else logits
        p = (_wide(best) - _wide(kept).logsumexp(-1, keepdim=True)).exp()   # exact even if ties let more than k survive
        mass_above = p.cumsum(-1) - p
        n = (mass_above < top_p).sum(-1, keepdim=True).clamp(min=1)
        least = best.gather(-1, n - 1)
    return logits.masked_fill(logits < least, float("-inf"))


def exponential_noise(shape, generator=None, device=None):
    """Exp(1) noise of shape (B, ...). With a list of B generators, a picture's noise does not depend on its batch."""
    if not isinstance(generator, (list, tuple)):
        return torch.empty(shape, device=device).exponential_(generator=generator)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}: give one, or one per image")
    return torch.stack([torch.empty(shape[1:], device=device).exponential_(generator=g) for g in generator])


def sample_logits(cond, uncond=None, *, cfg=1.0, temperature=1.0, top_k=0, top_p=0.0, noise=None, generator=None):
    """One draw per row from softmax(filter((cfg * cond + (1 - cfg) * uncond) / temperature)), see filter_logits.

    cond, uncond: (..., V) float logits; temperature 0 takes the largest
    noise:        Exp(1) noise of that shape, by default drawn from generator
    returns       (...) int64. A row of only -inf gives 0, a row with NaN or +inf gives some index in range

    The draw is an exponential race, argmax(p / noise): if runner i needs the time Exp(1) / p_i, it wins with
    probability p_i. `torch.multinomial(p, 1, generator=...)` runs the same race and gives the same draws, but it makes
    the host wait for checks of p. Memory traffic: one launch reads both logits and the noise, 3 V numbers per row.
    Separate steps take a sort and two dozen launches.
    """
    V = cond.shape[-1]
    if noise is None and temperature != 0:
        noise = exponential_noise(cond.shape, generator, cond.device)
    fits = V <= 32768 and temperature != 0 and all(t is None or t.shape == cond.shape for t in (uncond, noise))
    if use_triton(cond) and fits:                                           # V <= 32768: a row must fit into registers
        out = torch.empty(cond.shape[:-1], dtype=torch.int64, device=cond.device)
        cond, uncond, noise = (t if t is None else t.reshape(-1, V).contiguous() for t in (cond, uncond, noise))
        _sample[(len(cond),)](cond, uncond, noise, out, V, float(cfg), float(1 - cfg), float(temperature),
                              min(top_k, V), float(top_p), TOP_K=0 < top_k < V, TOP_P=0 < top_p < 1, BLOCK=_block(V),
                              num_warps=_warps(_block(V)))
        return out
    logits = _wide(cond) if uncond is None else cfg * _wide(cond) + (1 - cfg) * _wide(uncond)
    if temperature == 0:
        return logits.argmax(-1)
    if temperature != 1:
        logits = logits / temperature
    return (filter_logits(logits, top_k, top_p).softmax(-1) / noise).argmax(-1)


def vq_nearest(z, codebook, *, l2norm=False):
    """Index of the nearest codebook row: argmin_v |z|^2 + |e_v|^2 - 2 z.e_v, the lowest index on ties.

    z: (N, C); codebook: (V, C); l2norm: normalise both first; returns (N,) int64 without gradient. If two distances
    differ by less than 1e-5 relative, the winner may depend on the device. In torch on CUDA leave the float32 matmul
    precision at "highest", its default: TF32 has 10 bits of mantissa and flips indices.

    Memory traffic: the kernel reads z and the codebook and writes N indices. The N x V distances, gigabytes for a batch
    of pictures, never leave the registers. The time goes into 2 N V C operations in true float32.
    """
    z = _wide(z.detach())
    codebook = _wide(codebook.detach())
    if l2norm:
        z = F.normalize(z, dim=-1)
        codebook = F.normalize(codebook, dim=-1)
    code_norm = codebook.square().sum(1)                                    # (V,)
    if use_triton(z) and z.shape[1] == codebook.shape[1] <= 64 and len(codebook):
        N, C = z.shape
        out = torch.empty(N, dtype=torch.int64, device=z.device)
        _nearest[(-(-N // 64),)](z.contiguous(), codebook.contiguous(), code_norm, out, N, C,
                                 V=len(codebook), ROWS=64, CODES=64, BLOCK=max(16, _block(C)))
        return out
    best = []
    for part in z.split(max(1, SEARCH_CHUNK // len(codebook))):
        distances = torch.addmm(part.square().sum(1, keepdim=True) + code_norm, part, codebook.T, alpha=-2)     # (n, V)
        best.append(distances.argmin(1))
    return torch.cat(best)


def group_norm_silu(x, weight, bias, groups=32, eps=1e-6, silu=True, exact=False):
    """silu(group_norm(x)) of x (N, C, ...), contiguous or channels_last. Memory format and dtype are kept.

    weight, bias: (C,). Statistics run over the C / groups channels of a group and all positions
    silu:         False returns the norm alone
    exact:        avoid rounding errors that add up in large feature maps that are constant in part. Only a CPU needs
                  this and only there it takes more time

    Memory traffic: the kernel reads x twice and writes y. It reads a small group once. The second read comes from the
    L2 cache if x fits. Torch reads and writes once more for SiLU. Torch has no channels_last GroupNorm on CUDA, so it
    copies to NCHW and back for the convolutions.
    """
    if x.shape[1] % groups:
        raise ValueError(f"group_norm_silu: {x.shape[1]} channels do not divide into {groups} groups")
    group_size = x.numel() // (groups * len(x)) if len(x) else 0           # numbers that share one mean
    fits = weight is not None and weight.shape == bias.shape == x.shape[1:2] and group_size <= 2**25
    if use_triton(x) and fits:              # a group is bounded because _gn_combine loads all its tiles at once
        return _GroupNormSiLU.apply(x, weight, bias, groups, eps, silu)
    in_steps = exact and x.device.type == "cpu" and x.dtype == torch.float32 and group_size > 2**12
    if in_steps and fits and not x.is_contiguous():                         # contiguous maps have no such error
        y = _group_norm_in_two_steps(x, weight, bias, groups, eps)
    else:
        y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y, inplace=not torch.is_grad_enabled()) if silu else y


def _group_norm_in_two_steps(x, weight, bias, groups, eps):
    """Exact group norm of large channels_last feature maps on a CPU.

    F.group_norm adds up values and squares one after the other there. Equal values are then rounded in the same
    direction each time, and a map that is half constant comes out 1e-3 off.
    """
    N, C = x.shape[:2]
    variance, mean = torch.var_mean(x.movedim(1, -1).flatten(1, -2), 1, correction=0)      # (N, C)
    variance, mean = (v.unflatten(1, (groups, -1)) for v in (variance, mean))
    centre = mean.mean(2, keepdim=True)                                     # (N, groups, 1)
    variance = variance.mean(2, keepdim=True) + (mean - centre).square().mean(2, keepdim=True)
    scale = (variance + eps).rsqrt() * weight.unflatten(0, (groups, -1))
    shift = bias.unflatten(0, (groups, -1)) - centre * scale
    shape = (N, C, *[1] * (x.dim() - 2))
    return torch.addcmul(shift.reshape(shape), x, scale.reshape(shape))


# ----------------------------------------------------------------------------------------------------------------------
# Kernels of adaln_modulate


@jit
def _adaln_fwd(x, residual, gate, scale, shift, weight, y, h, mean, rstd, L, C, eps, gate_b, scale_b, shift_b,
               LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row of C numbers. It keeps them in registers from the first load to the last store."""
    row = tl.program_id(0).to(tl.int64)                                     # int64: offsets may pass 2^31
    b = row // L
    col = tl.arange(0, BLOCK)
    ok = col < C
    v = tl.load(x + row * C + col, mask=ok, other=0).to(tl.float32)
    if residual is not None:
        if gate is not None:
            v *= tl.load(gate + b * gate_b + col, mask=ok, other=0).to(tl.float32)
        v += tl.load(residual + row * C + col, mask=ok, other=0).to(tl.float32)
        v = v.to(h.dtype.element_ty)                                        # the next block reads h with this rounding
        tl.store(h + row * C + col, v, mask=ok)
        v = v.to(tl.float32)
    if LAYER:
        m = tl.sum(v, 0) / C
        tl.store(mean + row, m)
        v = tl.where(ok, v - m, 0)                                          # subtract before squaring: no cancellation
    r = 1 / tl.sqrt(tl.sum(v * v, 0) / C + tl.cast(eps, tl.float32))        # torch.compile passes floats as doubles
    tl.store(rstd + row, r)
    v *= r
    if weight is not None:
        v = v.to(weight.dtype.element_ty).to(tl.float32) * tl.load(weight + col, mask=ok, other=0).to(tl.float32)
    if scale is not None:
        v *= 1 + tl.load(scale + b * scale_b + col, mask=ok, other=0).to(tl.float32)
        v += tl.load(shift + b * shift_b + col, mask=ok, other=0).to(tl.float32)
    tl.store(y + row * C + col, v, mask=ok)


@jit
def _adaln_bwd(dy, dh, x, h, scale, gate, weight, mean, rstd, dx, d_residual, partial, L, C, chunks, gate_b, scale_b,
               LAYER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program per ROWS rows of one picture.

    Let u = norm(h) and let g be the gradient of u. The gradient of h is rstd * (g - mean(g) - u * mean(g * u)). RMSNorm
    has no mean(g) term. partial (B, chunks, 4, C) takes the gradients of scale, shift, gate and weight, summed over the
    rows of a program.
    """
    b, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    col = tl.arange(0, BLOCK)
    ok = col < C
    zero = tl.zeros((BLOCK,), tl.float32)
    w, s, a = zero + 1, zero + 1, zero + 1
    if weight is not None:
        w = tl.load(weight + col, mask=ok, other=0).to(tl.float32)
    if scale is not None:
        s = 1 + tl.load(scale + b * scale_b + col, mask=ok, other=0).to(tl.float32)
    if gate is not None:
        a = tl.load(gate + b * gate_b + col, mask=ok, other=0).to(tl.float32)
    d_scale, d_shift, d_gate, d_weight = zero, zero, zero, zero
    for i in range(ROWS):
        row = b * L + chunk * ROWS + i
        inside = chunk * ROWS + i < L
        at = row * C + col
        inner = col < tl.where(inside, C, 0)
        g = tl.load(dy + at, mask=inner, other=0).to(tl.float32)
        u = tl.load(h + at, mask=inner, other=0).to(tl.float32)
        r = tl.load(rstd + row, mask=inside, other=0)
        if LAYER:
            u -= tl.load(mean + row, mask=inside, other=0)
        u = tl.where(inner, u * r, 0)
        d_shift += g
        d_scale += g * u * w
        d_weight += g * u * s
        g *= s * w
        d = g - u * (tl.sum(g * u, 0) / C)
        if LAYER:
            d -= tl.sum(g, 0) / C
        d *= r
        if d_residual is not None:
            d += tl.load(dh + at, mask=inner, other=0).to(tl.float32)
            tl.store(d_residual + at, d, mask=inner)
            d_gate += d * tl.load(x + at, mask=inner, other=0).to(tl.float32)
        tl.store(dx + at, d * a, mask=inner)
    to = partial + (b * chunks + chunk) * 4 * C + col
    tl.store(to, d_scale, mask=ok)
    tl.store(to + C, d_shift, mask=ok)
    tl.store(to + 2 * C, d_gate, mask=ok)
    tl.store(to + 3 * C, d_weight, mask=ok)


def _batch_stride(t):
    """Batch stride of a scale, shift or gate (B, 1, C). It is 0 if there is none or one row serves all pictures."""
    return 0 if t is None or len(t) == 1 else t.stride(0)


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift, weight, residual, gate, eps, layer, out_dtype):
        B, L, C = x.shape
        block = _block(C)
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
        scale, shift, gate, weight = (t if t is None or t.stride(-1) == 1 else t.contiguous()
                                      for t in (scale, shift, gate, weight))
        y = x.new_empty(x.shape, dtype=out_dtype)
        h = x if residual is None else x.new_empty(x.shape, dtype=residual.dtype)
        mean, rstd = x.new_empty(2, B * L, dtype=torch.float32)
        _adaln_fwd[(B * L,)](x, residual, gate, scale, shift, weight, y, h, mean, rstd, L, C, eps, _batch_stride(gate),
                             _batch_stride(scale), _batch_stride(shift), LAYER=layer, BLOCK=block,
                             num_warps=_warps(block))
        ctx.save_for_backward(x, h, scale, shift, weight, gate, mean, rstd)
        ctx.has_residual = residual is not None
        ctx.layer = layer
        return y if residual is None else (y, h)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh=None):
        x, h, scale, shift, weight, gate, mean, rstd = ctx.saved_tensors
        B, L, C = x.shape
        block = _block(C)
        rows = 16
        chunks = -(-L // rows)
        dx = torch.empty_like(x)
        d_residual = torch.empty_like(h) if ctx.has_residual else None
        partial = x.new_empty(B, chunks, 4, C, dtype=torch.float32)
        _adaln_bwd[(B * chunks,)](dy.contiguous(), dh if dh is None else dh.contiguous(), x, h, scale, gate, weight,
                                  mean, rstd, dx, d_residual, partial, L, C, chunks, _batch_stride(gate),
                                  _batch_stride(scale), LAYER=ctx.layer, ROWS=rows, BLOCK=block,
                                  num_warps=_warps(block))
        grads = []
        for grad, t in zip(partial.sum(1).unbind(1), (scale, shift, gate, weight)):     # grad: (B, C)
            if t is None:
                grads.append(None)
            elif t.dim() == 1:                                              # weight (C,)
                grads.append(grad.sum(0).to(t.dtype))
            else:                                                           # (B, 1, C) or (1, 1, C)
                grads.append(grad[:, None].sum_to_size(t.shape).to(t.dtype))
        d_scale, d_shift, d_gate, d_weight = grads
        return dx, d_scale, d_shift, d_weight, d_residual, d_gate, None, None, None


# ----------------------------------------------------------------------------------------------------------------------
# Kernels of qk_norm_rope


@jit
def _rotated(p, cos, sin, l, d, ok, D, SIGN: tl.constexpr):
    """Loads a tile x (heads, D). Returns x, and x with its pairs rotated: x[d] cos - x[d + 1] sin for even d, and
    x[d] cos + x[d - 1] sin for odd d. SIGN -1 rotates back. In code the neighbour is d ^ 1.

    The neighbour x[d ^ 1] is loaded a second time. It comes from the L1 cache.
    """
    x = tl.load(p + d, mask=ok, other=0).to(tl.float32)
    y = x
    if cos is not None:
        at = l * (D // 2) + d // 2
        c = tl.load(cos + at, mask=d < D, other=0).to(tl.float32)
        s = tl.load(sin + at, mask=d < D, other=0).to(tl.float32) * tl.where(d % 2 == 0, -SIGN, SIGN)
        y = x * c + tl.load(p + (d ^ 1), mask=ok, other=0).to(tl.float32) * s
    return x, y


@jit
def _qk_fwd(q, k, v, q_scale, cos, sin, q_out, k_out, v_out, pos, L, H, D, room, x_b, x_l, x_h, out_b, out_h, out_l,
            L2NORM: tl.constexpr, POS_TENSOR: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """One program per token and group of heads. It normalises and rotates tiles (HEADS, D) of q and k and copies v."""
    row = tl.program_id(0).to(tl.int64)
    b, l = row // L, row % L
    head = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)[:, None]     # (HEADS, 1)
    d = tl.arange(0, BLOCK)[None, :]                                        # (1, BLOCK)
    ok = (head < H) & (d < D)
    at = b * x_b + l * x_l + head * x_h
    cache_l = l + (tl.load(pos) if POS_TENSOR else pos)
    to = b * out_b + head * out_h + cache_l * out_l + d
    fits = (head < tl.where((cache_l < room) & (cache_l >= 0), H, 0)) & (d < D)     # never write outside the cache
    for i in tl.static_range(2):                                            # q, then k
        x, y = _rotated((k if i else q) + at, cos, sin, l, d, ok, D, 1.0)
        if L2NORM:                                                          # norm of x: a rotation does not change it
            y /= tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)[:, None]
        if i == 0 and q_scale is not None:
            y *= tl.load(q_scale + head, mask=head < H, other=0).to(tl.float32)
        if i == 0:
            tl.store(q_out + ((b * H + head) * L + l) * D + d, y, mask=ok)
        else:
            tl.store(k_out + to, y, mask=fits)
    if v is not None:
        tl.store(v_out + to, tl.load(v + at + d, mask=ok, other=0), mask=fits)


@jit
def _qk_bwd(dq_out, dk_out, q, k, q_scale, cos, sin, dq, dk, d_scale, L, H, D, x_b, x_l, x_h,
            L2NORM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Rotates the gradients back, which gives g, the gradient of u = x / |x|.

    The gradient of x is (g - u (u . g)) / |x|. The gradient of q_scale is the sum of u . g over tokens. d_scale
    (B * L, H) takes one term per token.
    """
    row = tl.program_id(0).to(tl.int64)
    b, l = row // L, row % L
    head = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    ok = (head < H) & (d < D)
    at = b * x_b + l * x_l + head * x_h
    to = (row * H + head) * D + d
    grad_at = ((b * H + head) * L + l) * D
    for i in tl.static_range(2):                                            # q, then k
        _, g = _rotated((dk_out if i else dq_out) + grad_at, cos, sin, l, d, ok, D, -1.0)
        u = tl.load((k if i else q) + at + d, mask=ok, other=0).to(tl.float32)
        norm = tl.full((HEADS, 1), 1, tl.float32)
        if L2NORM:
            norm = tl.sqrt(tl.sum(u * u, 1))[:, None]
        u /= tl.maximum(norm, 1e-12)
        along = tl.sum(g * u, 1)[:, None]
        if L2NORM:
            g -= tl.where(norm > 1e-12, u * along, 0)
            g /= tl.maximum(norm, 1e-12)
        if i == 0 and q_scale is not None:
            g *= tl.load(q_scale + head, mask=head < H, other=0).to(tl.float32)
            tl.store(d_scale + row * H + head, along, mask=head < H)
        tl.store((dk if i else dq) + to, g, mask=ok)


def _qk_grid(B, L, H, D):
    """Grid and tile size. A program gets as many heads as make about 2048 numbers."""
    heads = min(_block(H), max(1, 2048 // _block(D)))
    return (B * L, -(-H // heads)), dict(HEADS=heads, BLOCK=_block(D))


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, q_scale, cos, sin, l2norm, k_out, v_out, pos):
        B, L, H, D = q.shape
        if not (q.stride() == k.stride() == v.stride() and q.stride(-1) == 1):      # False for views of one projection
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        q_out = v.new_empty(B, H, L, D)
        caching = k_out is not None
        k_out = k_out if caching else torch.empty_like(q_out)
        grid, tile = _qk_grid(B, L, H, D)
        _qk_fwd[grid](q, k, v if caching else None, q_scale, cos, sin, q_out, k_out, v_out, pos, L, H, D,
                      k_out.shape[2], *q.stride()[:3], *k_out.stride()[:3], L2NORM=l2norm,
                      POS_TENSOR=isinstance(pos, torch.Tensor), **tile)
        ctx.save_for_backward(q, k, q_scale, cos, sin)
        ctx.l2norm = l2norm
        return q_out, None if caching else k_out

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_out, dk_out):
        q, k, q_scale, cos, sin = ctx.saved_tensors
        B, L, H, D = q.shape
        dq = q.new_empty(q.shape)
        dk = k.new_empty(k.shape)
        d_scale = None if q_scale is None else q.new_empty(B * L, H, dtype=torch.float32)
        grid, tile = _qk_grid(B, L, H, D)
        _qk_bwd[grid](dq_out.contiguous(), dk_out.contiguous(), q, k, q_scale, cos, sin, dq, dk, d_scale, L, H, D,
                      *q.stride()[:3], L2NORM=ctx.l2norm, **tile)
        return dq, dk, None, None if d_scale is None else d_scale.sum(0).to(q_scale.dtype), *[None] * 6


# ----------------------------------------------------------------------------------------------------------------------
# Kernels of decode_attention


def _decode(q, k, v, pos, visible, scale):
    """Attention in two launches: one program per part of the cache, then one per head that merges the parts.

    One program per head would leave most of a GPU idle. The boundaries of the parts are fixed. A part that lies beyond
    the position reads nothing.
    """
    B, H, _, D = q.shape
    _, heads, room, _ = k.shape
    q = q.contiguous()
    group = H // heads
    rows = max(16, 2048 // _block(D) // _block(group))                      # a tile of about 2048 numbers
    wanted = max(1, min(256 // (B * heads), room // 64))                    # parts: 256 programs, 64 cache rows or more
    steps = -(-room // (rows * wanted))                                     # tiles per part
    parts = -(-room // (steps * rows))
    sums = torch.empty(B * H, parts, D, dtype=torch.float32, device=q.device)
    tops, totals = torch.empty(2, B * H, parts, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    visible_b = 0 if visible is None else visible.stride(0)
    _decode_part[(B * heads, parts)](q, k, v, visible, sums, tops, totals, pos, float(scale), heads, group, D, room,
                                     parts, *k.stride()[:3], visible_b, POS_TENSOR=isinstance(pos, torch.Tensor),
                                     STEPS=steps, GROUP=_block(group), ROWS=rows, BLOCK=_block(D))
    _decode_merge[(B * H,)](sums, tops, totals, out, D, parts, PARTS=_block(parts), BLOCK=_block(D))
    return out


@jit
def _decode_part(q, k, v, visible, sums, tops, totals, pos, scale, heads, group, D, room, parts, x_b, x_h, x_l,
                 visible_b, POS_TENSOR: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
                 BLOCK: tl.constexpr):
    """One program per key head and part of its cache. It runs an online softmax over ROWS rows at a time.

    It keeps the largest score so far, top. It sums exp(score - top), and the values weighted by exp(score - top).
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    b, head = row // heads, row % heads
    filled = tl.minimum((tl.load(pos) if POS_TENSOR else pos) + 1, room)
    g = tl.arange(0, GROUP)
    d = tl.arange(0, BLOCK)
    mine = row * group + g                                                  # heads of q, counted over all pictures
    ok_q = (g < group)[:, None] & (d < D)[None, :]
    query = tl.load(q + mine[:, None] * D + d[None, :], mask=ok_q, other=0).to(tl.float32) * tl.cast(scale, tl.float32)
    top = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    acc = tl.zeros((GROUP, BLOCK), tl.float32)
    for i in range(STEPS):
        at = (part * STEPS + i) * ROWS + tl.arange(0, ROWS)
        ok = at < filled
        if visible is not None:
            ok = ok & (tl.load(visible + b * visible_b + at, mask=ok, other=0) != 0)
        to = b * x_b + head * x_h + at[:, None] * x_l + d[None, :]
        inside = ok[:, None] & (d < D)[None, :]
        keys = tl.load(k + to, mask=inside, other=0).to(tl.float32)         # (ROWS, BLOCK)
        score = tl.sum(query[:, None, :] * keys[None, :, :], 2)             # (GROUP, ROWS)
        score = tl.where(ok[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)               # no visible row so far
        p = tl.exp(score - base[:, None])
        fade = tl.exp(top - base)
        values = tl.load(v + to, mask=inside, other=0).to(tl.float32)
        acc = acc * fade[:, None] + tl.sum(p[:, :, None] * values[None, :, :], 1)
        total = total * fade + tl.sum(p, 1)
        top = higher
    to = mine * parts + part
    tl.store(tops + to, top, mask=g < group)
    tl.store(totals + to, total, mask=g < group)
    tl.store(sums + to[:, None] * D + d[None, :], acc, mask=ok_q)


@jit
def _decode_merge(sums, tops, totals, out, D, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """One program per head of q. It rescales the parts to their common largest score and adds them up."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, PARTS)
    d = tl.arange(0, BLOCK)
    top = tl.load(tops + row * parts + s, mask=s < parts, other=float("-inf"))
    weight = tl.exp(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(totals + row * parts + s, mask=s < parts, other=0), 0)
    at = (row * parts + s)[:, None] * D + d[None, :]
    acc = tl.load(sums + at, mask=(s < parts)[:, None] & (d < D)[None, :], other=0)
    tl.store(out + row * D + d, tl.sum(weight[:, None] * acc, 0) / total, mask=d < D)


# ----------------------------------------------------------------------------------------------------------------------
# Kernel of sample_logits


@jit
def _largest_threshold(key, weight, target):
    """The largest t with sum(weight[key >= t]) >= target. It is built bit by bit from the top: 32 sums, no sort.

    With weight 1 and target k, t is the k-th largest key. With probabilities and target p, t is the smallest key that
    top-p keeps.
    """
    t = tl.full((), 0, tl.uint32)
    for i in range(32):
        higher = t | (tl.full((), 1, tl.uint32) << (31 - i))
        t = tl.where(tl.sum(tl.where(key >= higher, weight, 0.0), 0) >= target, higher, t)
    return t


@jit
def _sample(cond, uncond, noise, out, V, cfg, rest, temperature, k, p,
            TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row of V logits."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    ok = col < V
    x = tl.load(cond + row * V + col, mask=ok, other=0).to(tl.float32)
    if uncond is not None:
        x = tl.cast(cfg, tl.float32) * x
        x += tl.cast(rest, tl.float32) * tl.load(uncond + row * V + col, mask=ok, other=0).to(tl.float32)
    x = x / tl.cast(temperature, tl.float32)
    x = tl.where(ok & (x == x), x, float("-inf"))                           # NaN is never drawn
    x = tl.where(x == 0, 0.0, x)                                            # -0 and 0 are ties
    top = tl.max(x, 0)
    e = tl.where(ok, tl.exp(tl.where(x == top, 0.0, x - top)), 0.0)         # probabilities that are not normalised
    if TOP_K or TOP_P:
        bits = x.to(tl.uint32, bitcast=True)
        sign = tl.full((), 1, tl.uint32) << 31
        # Flip the sign bit, and all bits of negative numbers: unsigned keys then have the order of the floats.
        key = bits ^ sign ^ tl.where(bits >= sign, sign - 1, 0)
        least = tl.full((), 0, tl.uint32)
        if TOP_K:
            least = _largest_threshold(key, tl.where(ok, 1.0, 0.0), tl.cast(k, tl.float32))
        if TOP_P:
            mass = tl.where(key >= least, e, 0.0)
            least = _largest_threshold(key, mass, tl.cast(p, tl.float32) * tl.sum(mass, 0))
        e = tl.where(key >= least, e, -1.0)                                 # loses every race
    race = tl.where(ok, e / tl.load(noise + row * V + col, mask=ok, other=1), float("-inf"))
    index = tl.argmax(race, 0)
    tl.store(out + row, tl.where(top == float("-inf"), 0, index).to(tl.int64))


# ----------------------------------------------------------------------------------------------------------------------
# Kernel of vq_nearest


@jit
def _nearest(z, codebook, code_norm, out, N, C, V: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
             BLOCK: tl.constexpr):
    """One program per ROWS rows of z. It compares CODES codes at a time and keeps the best code of every row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    mine = tl.load(z + row[:, None] * C + c[None, :], mask=(row < N)[:, None] & (c < C)[None, :], other=0)
    z_norm = tl.sum(mine * mine, 1)
    best = tl.full((ROWS,), float("inf"), tl.float32)
    index = tl.zeros((ROWS,), tl.int32)
    for start in range(0, V, CODES):
        code = start + tl.arange(0, CODES)
        e = tl.load(codebook + code[None, :] * C + c[:, None], mask=(code < V)[None, :] & (c < C)[:, None], other=0)
        norm = tl.load(code_norm + code, mask=code < V, other=float("inf"))
        distance = z_norm[:, None] + norm[None, :] - 2 * tl.dot(mine, e, input_precision="ieee")
        least, at = tl.min(distance, 1, return_indices=True, return_indices_tie_break_left=True)
        index = tl.where(least < best, start + at, index)                   # "<", not "<=": the lowest index wins a tie
        best = tl.minimum(least, best)
    tl.store(out + row, index.to(tl.int64), mask=row < N)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels of group_norm_silu
#
# A picture (C, S = H * W) is cut into tiles, which are wide along the dimension that is dense in memory. If a group
# fits into registers, one launch does all. Otherwise there are three launches. _gn_stats computes mean and squared
# deviations of every channel in a tile, (N * C, tiles). _gn_combine turns them into mean and 1 / std of every group.
# _gn_apply normalises.


@jit
def _gn_tile(C, S, tiles, LAST: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr):
    """The tile of this program. LAST: channels_last.

    Returns its channels c, the same channels counted over all pictures, the addresses of its numbers, their mask, and
    the addresses of its sums in (N * C, tiles).
    """
    pid = tl.program_id(0).to(tl.int64)
    tile = pid % tiles
    n = pid // tiles // tl.cdiv(C, BC)
    c = pid // tiles % tl.cdiv(C, BC) * BC + tl.arange(0, BC)
    s = tile * BS + tl.arange(0, BS)
    at = n * C * S + (c[:, None] + s[None, :] * C if LAST else c[:, None] * S + s[None, :])
    return c, n * C + c, at, (c < C)[:, None] & (s < S)[None, :], (n * C + c) * tiles + tile


@jit
def _gn_silu(u, weight, bias, c, ok, SILU: tl.constexpr):
    """silu(z), silu'(z) and weight, where z = u * weight + bias. Without SiLU: z, 1 and weight. u: (channels, S)."""
    w = tl.load(weight + c, mask=ok, other=0).to(tl.float32)[:, None]
    z = u * w + tl.load(bias + c, mask=ok, other=0).to(tl.float32)[:, None]
    y = z
    slope = tl.full((1, 1), 1, tl.float32)
    if SILU:
        sigma = 1 / (1 + tl.exp(-z))
        y, slope = z * sigma, sigma * (1 + z * (1 - sigma))
    return y, slope, w


@jit
def _gn_group(x, weight, bias, y, mean, rstd, C, S, D, eps, SILU: tl.constexpr, LAST: tl.constexpr,
              BC: tl.constexpr, BS: tl.constexpr):
    """One program per group of D channels. It keeps the group in registers."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid * D + tl.arange(0, BC)                                        # channels, counted over all pictures
    s = tl.arange(0, BS)
    c = row % C
    mine = tl.arange(0, BC) < D
    at = (row - c)[:, None] * S + (c[:, None] + s[None, :] * C if LAST else c[:, None] * S + s[None, :])
    ok = mine[:, None] & (s < S)[None, :]
    v = tl.load(x + at, mask=ok, other=0).to(tl.float32)
    m = tl.sum(v) / (D * S)
    v = tl.where(ok, v - m, 0)
    r = 1 / tl.sqrt(tl.sum(v * v) / (D * S) + tl.cast(eps, tl.float32))
    tl.store(mean + pid, m)
    tl.store(rstd + pid, r)
    out, _, _ = _gn_silu(v * r, weight, bias, c, mine, SILU)
    tl.store(y + at, out, mask=ok)


@jit
def _gn_stats(x, means, squares, C, S, tiles, LAST: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr):
    """Mean and sum of squared deviations of every channel in this tile."""
    c, _, at, ok, to = _gn_tile(C, S, tiles, LAST, BC, BS)
    v = tl.load(x + at, mask=ok, other=0).to(tl.float32)
    m = tl.sum(v, 1) / tl.minimum(S - (tl.program_id(0) % tiles) * BS, BS)
    v = tl.where(ok, v - m[:, None], 0)
    tl.store(means + to, m, mask=c < C)
    tl.store(squares + to, tl.sum(v * v, 1), mask=c < C)


@jit
def _gn_combine(means, squares, mean, rstd, S, D, tiles, eps, BS: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr):
    """One program per group. It merges D * tiles means and square sums into mean and 1 / std (Chan's formula)."""
    pid = tl.program_id(0).to(tl.int64)
    d, t = tl.arange(0, BD)[:, None], tl.arange(0, BT)[None, :]
    at = (pid * D + d) * tiles + t
    ok = (d < D) & (t < tiles)
    share = tl.where(ok, tl.minimum(S - t * BS, BS), 0).to(tl.float32) / S / D
    part = tl.load(means + at, mask=ok, other=0)
    m = tl.sum(part * share)
    variance = tl.sum(tl.load(squares + at, mask=ok, other=0) / S / D + (part - m) * (part - m) * share)
    tl.store(mean + pid, m)
    tl.store(rstd + pid, 1 / tl.sqrt(variance + tl.cast(eps, tl.float32)))


@jit
def _gn_apply(x, weight, bias, y, mean, rstd, C, S, D, tiles, SILU: tl.constexpr, LAST: tl.constexpr,
              BC: tl.constexpr, BS: tl.constexpr):
    """Normalises the tile of this program."""
    c, row, at, ok, _ = _gn_tile(C, S, tiles, LAST, BC, BS)
    m = tl.load(mean + row // D, mask=c < C, other=0)
    r = tl.load(rstd + row // D, mask=c < C, other=0)
    u = (tl.load(x + at, mask=ok, other=0).to(tl.float32) - m[:, None]) * r[:, None]
    out, _, _ = _gn_silu(u, weight, bias, c, c < C, SILU)
    tl.store(y + at, out, mask=ok)


@jit
def _gn_bwd(dy, x, weight, bias, mean, rstd, a, b, dx, C, S, D, tiles, SUMS: tl.constexpr, SILU: tl.constexpr,
            LAST: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr):
    """Backward pass, which is launched twice.

    With SUMS it writes the sums of dz and dz * u per channel and tile into a and b. Without SUMS, a and b are the means
    of g and g * u over a group, where g = dz * weight, and it writes dx = rstd * (g - a - u * b).
    """
    c, row, at, ok, to = _gn_tile(C, S, tiles, LAST, BC, BS)
    m = tl.load(mean + row // D, mask=c < C, other=0)
    r = tl.load(rstd + row // D, mask=c < C, other=0)
    u = tl.where(ok, (tl.load(x + at, mask=ok, other=0).to(tl.float32) - m[:, None]) * r[:, None], 0)
    _, slope, w = _gn_silu(u, weight, bias, c, c < C, SILU)
    dz = tl.load(dy + at, mask=ok, other=0).to(tl.float32) * slope
    if SUMS:
        tl.store(a + to, tl.sum(dz, 1), mask=c < C)
        tl.store(b + to, tl.sum(dz * u, 1), mask=c < C)
    else:
        g_mean = tl.load(a + row // D, mask=c < C, other=0)[:, None]
        gu_mean = tl.load(b + row // D, mask=c < C, other=0)[:, None]
        tl.store(dx + at, (dz * w - g_mean - u * gu_mean) * r[:, None], mask=ok)


def _gn_layout(x):
    """(N, C, S), memory format, number of tiles along S, grid, and keyword arguments for the kernels."""
    N, C = x.shape[:2]
    S = x.numel() // (N * C)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last and not x.is_contiguous() and x.is_contiguous(memory_format=last):
        form = last
        BC = min(64, _block(C))
        BS = min(128, _block(S))
    else:
        form = torch.contiguous_format
        BS = min(8192, _block(S))
        BC = min(8192 // BS, _block(C))
    tiles = -(-S // BS)
    tile = dict(LAST=form != torch.contiguous_format, BC=BC, BS=BS, num_warps=_warps(BC * BS))
    return (N, C, S), form, tiles, (N * -(-C // BC) * tiles,), tile


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, silu):
        (N, C, S), form, tiles, grid, tile = _gn_layout(x)
        D = C // groups                                                     # channels per group
        x = x.contiguous(memory_format=form)
        weight = weight.contiguous()
        bias = bias.contiguous()
        y = torch.empty_like(x)
        whole = _block(D) * _block(S)
        mean, rstd = x.new_empty(2, N * groups, dtype=torch.float32)
        if whole <= 16384:                                                  # at most 32 numbers per thread
            _gn_group[(N * groups,)](x, weight, bias, y, mean, rstd, C, S, D, eps, SILU=silu, LAST=tile["LAST"],
                                     BC=_block(D), BS=_block(S), num_warps=_warps(whole))
        else:
            means, squares = x.new_empty(2, N * C, tiles, dtype=torch.float32)
            _gn_stats[grid](x, means, squares, C, S, tiles, **tile)
            _gn_combine[(N * groups,)](means, squares, mean, rstd, S, D, tiles, eps, BS=tile["BS"], BD=_block(D),
                                       BT=_block(tiles), num_warps=_warps(_block(D) * _block(tiles)))
            _gn_apply[grid](x, weight, bias, y, mean, rstd, C, S, D, tiles, SILU=silu, **tile)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.silu = silu
        ctx.D = D
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        (N, C, S), form, tiles, grid, tile = _gn_layout(x)
        D = ctx.D
        dy = dy.contiguous(memory_format=form)
        dx = torch.empty_like(x)
        sums = x.new_empty(2, N * C, tiles, dtype=torch.float32)
        _gn_bwd[grid](dy, x, weight, bias, mean, rstd, *sums, dx, C, S, D, tiles, SUMS=True, SILU=ctx.silu, **tile)
        sums = sums.sum(-1).view(2, N, C)
        means = (sums * weight.float()).view(2, -1, D).sum(-1) / (D * S)    # (2, N * groups)
        _gn_bwd[grid](dy, x, weight, bias, mean, rstd, *means, dx, C, S, D, tiles, SUMS=False, SILU=ctx.silu, **tile)
        d_bias, d_weight = sums.sum(1)
        return dx, d_weight.to(weight.dtype), d_bias.to(bias.dtype), None, None, None


# ----------------------------------------------------------------------------------------------------------------------
# The registry: inputs, shapes and minimal cost of every op, for tests, benchmark and README


@dataclass(frozen=True)
class OpSpec:
    """An op, inputs for it, and the memory traffic and arithmetic that it cannot avoid."""

    fn: Callable
    inputs: Callable                        # (randn, *shape) -> args, kwargs; randn(*size) draws a tensor
    shapes: dict                            # name -> shape: first a small odd one for tests, then shapes of the models
    bytes: Callable                         # (itemsize, *shape) -> smallest number of bytes that must be moved
    flops: Callable = lambda *shape: 0      # smallest number of float32 operations, for ops where they take the time
    trains: bool = False                    # has a backward pass
    tol: float = 2e-5                       # float32: error relative to the largest value, or share of wrong indices


def _adaln_inputs(randn, B, L, C):
    scale, shift, gate = randn(B, 1, 3, C).unbind(2)
    return (randn(B, L, C), scale, shift), dict(residual=randn(B, L, C), gate=gate)


def _qk_inputs(randn, B, L, H, D):
    q, k, v = randn(B, L, 3, H, D).unbind(2)
    angle = randn(L, D // 2)
    return (q, k, v), dict(q_scale=randn(H).exp(), cos=angle.cos(), sin=angle.sin())


def _decode_inputs(randn, B, H, L, D):
    return (randn(B, H, 1, D), randn(B, H, L, D), randn(B, H, L, D)), dict(pos=L - 1)


def _sample_inputs(randn, R, V):
    noise = randn(R, V).float().abs() + 1e-3                                # any positive noise will do
    return (randn(R, V), randn(R, V)), dict(cfg=2.5, top_k=max(1, V // 4), top_p=0.95, noise=noise)


def _gn_inputs(randn, N, C, H, W, form=torch.contiguous_format):
    return (randn(N, C, H, W).contiguous(memory_format=form), randn(C), randn(C)), {}


REGISTRY = {
    "adaln_modulate": OpSpec(
        adaln_modulate, _adaln_inputs,
        {"odd": (3, 17, 40), "var_d30, 8 images, last scale": (16, 256, 1920),
         "infinity_2b, last scale": (2, 4096, 2048), "var_d16, training": (96, 680, 1024)},
        lambda i, B, L, C: 4 * B * L * C * i, trains=True),
    "qk_norm_rope": OpSpec(
        qk_norm_rope, _qk_inputs,
        {"odd": (2, 5, 3, 12), "var_d30, 8 images, last scale": (16, 256, 30, 64),
         "infinity_2b, last scale": (2, 4096, 16, 128)},
        lambda i, B, L, H, D: 4 * B * L * H * D * i, trains=True),         # without a cache v is not copied
    "decode_attention": OpSpec(
        decode_attention, _decode_inputs,
        {"odd": (2, 3, 77, 20), "llamagen_L at 384, 1 image, last token": (2, 16, 577, 64),
         "llamagen_L at 384, 8 images, last token": (16, 16, 577, 64), "llamagen_3B, 8 images": (16, 32, 577, 100)},
        lambda i, B, H, L, D: 2 * B * H * L * D * i),
    "sample_logits": OpSpec(
        sample_logits, _sample_inputs,
        {"odd": (7, 33), "var, 8 images, last scale": (2048, 4096), "llamagen, 8 images": (8, 16384)},
        lambda i, R, V: (2 * i + 4) * R * V, tol=1e-3),
    "vq_nearest": OpSpec(
        vq_nearest, lambda randn, N, V, C: ((randn(N, C), randn(V, C)), {}),
        {"odd": (17, 33, 5), "var, 64 images": (43520, 4096, 32), "llamagen, 16 images": (9216, 16384, 8)},
        lambda i, N, V, C: (N + V) * C * i + 8 * N, flops=lambda N, V, C: 2 * N * V * C, tol=1e-3),
    "group_norm_silu": OpSpec(
        group_norm_silu, _gn_inputs,
        {"odd": (2, 32, 5, 3), "vae decoder, 8 images, finest": (8, 160, 256, 256),
         "the same, channels_last": (8, 160, 256, 256, torch.channels_last),
         "vae decoder, 1 image, coarsest": (1, 640, 16, 16, torch.channels_last)},
        lambda i, N, C, H, W, *form: 2 * N * C * H * W * i, trains=True),
}


if __name__ == "__main__":                  # the same as `python sample.py ops`
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sample.py")
    sys.exit(subprocess.call([sys.executable, script, "ops", *sys.argv[1:]]))
