"""The operations that the models spend their time in besides matrix products: one contract each, two implementations.

    op               used by                     what becomes one pass over memory
    adaln_modulate   var, infinity, llamagen     gated residual add, LayerNorm or RMSNorm, scale and shift
    qk_norm_rope     var, infinity, llamagen     l2 norm of q and k, learned scale, 2D RoPE, write into the KV cache
    decode_attention llamagen                    one token's attention to the filled part of a KV cache, and no more
    sample_logits    var, llamagen               guidance, temperature, top-k, top-p and the random draw, without a sort
    vq_nearest       vq                          nearest codebook row, without the N x V distance matrix
    group_norm_silu  vq, latentsync              GroupNorm followed by SiLU, in either memory format

Each op is one public function: its contract, the choice, and its definition in plain torch, which is the fallback on
every device and what the kernel has to equal. The Triton kernel stands right below it. REGISTRY at the end knows
inputs, real shapes and unavoidable bytes of every op; tests, benchmark and README iterate over it. Importing this file
needs torch only, no Triton and no GPU.

These ops do little arithmetic per number: on a GPU they take the time their bytes take (an H100 moves 3.35 TB/s) or, if
small, that of a launch. Unfused, each step of a chain writes its result to memory and the next reads it back. In all
kernels a program (a block of threads) owns some rows or a tile and holds them in registers, in float32, from the load
to the store. Sums over rows are added up in a fixed order, without atomics: two runs give the same bits. Nothing waits
for the device, so all may stand in a CUDA graph; call once with the same arguments before capture, to compile.

    OPS_BACKEND=auto     kernels for CUDA tensors where Triton is installed, else torch (the default)
    OPS_BACKEND=torch    never kernels;     OPS_BACKEND=triton   an error where there is no Triton for a tensor
    TRITON_INTERPRET=1   kernels run on the CPU, one program at a time: for tests, and to step through them
    python triton_ops.py --bench [op ...] [--json FILE]

Whatever the setting, torch does float64, empty tensors and what no kernel `fits`: kernels check no shapes, so those
that are not the contract's go to torch, which broadcasts or complains. Kernels run on the current CUDA device, as all
of Triton does: `torch.cuda.set_device` first if the tensors are on another one.
"""
import os
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
except ImportError:                                                         # the kernels below must parse all the same
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda kernel: kernel

BACKEND = os.environ.get("OPS_BACKEND", "auto")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


class BackendError(RuntimeError):
    """OPS_BACKEND asks for what is not there."""


@contextmanager
def backend(name):
    """Within it, OPS_BACKEND is `name`."""
    global BACKEND
    before, BACKEND = BACKEND, name
    try:
        yield
    finally:
        BACKEND = before


def use_triton(x):
    """Whether a kernel takes over for x. Decided on Python values alone, so that torch.compile folds it away."""
    if BACKEND == "torch" or x.dtype == torch.float64 or x.numel() == 0:    # float64 is for the oracles of the tests
        return False
    possible = triton is not None and (x.is_cuda or INTERPRET)
    if BACKEND == "triton" and not possible:
        raise BackendError(f"OPS_BACKEND=triton: no Triton for tensors on {x.device} here; use OPS_BACKEND=auto")
    if BACKEND not in ("auto", "triton"):
        raise BackendError(f"OPS_BACKEND={BACKEND}: expected auto, torch or triton")
    return possible


def _wide(t):
    """float32, in which every op computes; float64 stays float64, so that an op can serve as its own oracle."""
    return t if t.dtype == torch.float64 else t.float()


def _block(n):
    """n rounded up to a power of two, which block sizes must be: `ok` masks in the kernels cover the rest."""
    return 1 << (n - 1).bit_length()


def _warps(block):
    """Warps per program for so many numbers."""
    return 4 if block < 2048 else 8 if block < 8192 else 16 if block < 32768 else 32


# ----------------------------------------------------------------------------------------------------------------------
# adaln_modulate


def adaln_modulate(x, scale, shift, eps=1e-6, *, kind="layer", weight=None, residual=None, gate=None, out_dtype=None):
    """y = norm(h) * (1 + scale) + shift, where h = residual + gate * x if a residual is given, else h = x.

    x:            (B, L, C), any float dtype: the input, or the output of the branch that has just been computed
    scale, shift: (B, 1, C) or (1, 1, C), in torch also (B, L, C); both None: the norm alone
    gate:         likewise, None means 1
    kind:         "layer": LayerNorm without affine, population variance; "rms": h / sqrt(mean(h^2) + eps)
    weight:       (C,), multiplies the norm after it was rounded to the weight's dtype, as in Llama
    residual:     (B, L, C), the residual stream; its dtype is that of h
    returns       y (B, L, C) in out_dtype (default x.dtype), or (y, h) if a residual was given

    Bytes: read x and residual, write y and h, in bf16 8 per element. As separate steps under autocast 38: gate 4,
    add 6, norm into float32 6, scale 8, shift 8, cast 6. Scale, shift and gate are one row per picture, and cached.
    """
    if (scale is None) != (shift is None) or (gate is not None and residual is None):
        raise ValueError("adaln_modulate: scale and shift go together, and a gate needs a residual")
    if kind not in ("layer", "rms"):
        raise ValueError(f"adaln_modulate: kind is 'layer' or 'rms', not {kind!r}")
    B, L, C = x.shape if x.dim() == 3 else (0, 0, 0)
    fits = (0 < C <= 16384 and all(t is None or t.shape in ((B, 1, C), (1, 1, C)) for t in (scale, shift, gate))
            and (residual is None or residual.shape == x.shape) and (weight is None or weight.shape == (C,)))
    if use_triton(x) and fits:                                              # a row has to fit into registers
        return _AdaLN.apply(x, scale, shift, weight, residual, gate, eps, kind == "layer", out_dtype or x.dtype)
    h = x
    if residual is not None:
        h = _wide(residual) + _wide(x) if gate is None else torch.addcmul(_wide(residual), _wide(gate), _wide(x))
        h = h.to(residual.dtype)
    y = (F.layer_norm if kind == "layer" else F.rms_norm)(_wide(h), h.shape[-1:], eps=eps)
    if weight is not None:
        y = y.to(weight.dtype) * weight                                     # Llama's order: round, then multiply
    if scale is not None:
        y = torch.addcmul(_wide(shift), _wide(y), 1 + _wide(scale))
    y = y.to(out_dtype or x.dtype)
    return y if residual is None else (y, h)


@jit
def _adaln_fwd(x, residual, gate, scale, shift, weight, y, h, mean, rstd, L, C, eps, gate_b, scale_b, shift_b,
               LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row of C numbers, which it keeps in registers from the first load to the last store."""
    row = tl.program_id(0).to(tl.int64)                                     # int64: offsets may pass 2^31
    b, col = row // L, tl.arange(0, BLOCK)
    ok = col < C
    v = tl.load(x + row * C + col, mask=ok, other=0).to(tl.float32)
    if residual is not None:
        if gate is not None:
            v *= tl.load(gate + b * gate_b + col, mask=ok, other=0).to(tl.float32)
        v += tl.load(residual + row * C + col, mask=ok, other=0).to(tl.float32)
        v = v.to(h.dtype.element_ty)                                        # the norm sees what the next block will see
        tl.store(h + row * C + col, v, mask=ok)
        v = v.to(tl.float32)
    if LAYER:
        m = tl.sum(v, 0) / C
        tl.store(mean + row, m)
        v = tl.where(ok, v - m, 0)                                          # two passes: no cancellation
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
    """ROWS rows of one picture per program. With u = norm(h) and g the gradient of u, that of h is
    rstd * (g - mean(g) - u * mean(g * u)); RMSNorm lacks the middle term. partial (B, chunks, 4, C): sums over these
    rows, the gradients of scale, shift, gate and weight."""
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
        at, inner = row * C + col, col < tl.where(inside, C, 0)
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


def _step(t):
    """Stride of the batch of a modulation (B, 1, C): 0 if it is not there, or one for all pictures."""
    return 0 if t is None or len(t) == 1 else t.stride(0)


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift, weight, residual, gate, eps, layer, out_dtype):
        (B, L, C), block = x.shape, _block(x.shape[-1])
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        scale, shift, gate, weight = (t if t is None or t.stride(-1) == 1 else t.contiguous()
                                      for t in (scale, shift, gate, weight))
        y = x.new_empty(x.shape, dtype=out_dtype)
        h = x if residual is None else x.new_empty(x.shape, dtype=residual.dtype)
        mean, rstd = x.new_empty(2, B * L, dtype=torch.float32)
        _adaln_fwd[(B * L,)](x, residual, gate, scale, shift, weight, y, h, mean, rstd, L, C, eps, _step(gate),
                             _step(scale), _step(shift), LAYER=layer, BLOCK=block, num_warps=_warps(block))
        ctx.save_for_backward(x, h, scale, shift, weight, gate, mean, rstd)
        ctx.residual, ctx.layer = None if residual is None else residual.dtype, layer
        return y if residual is None else (y, h)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh=None):
        x, h, scale, shift, weight, gate, mean, rstd = ctx.saved_tensors
        (B, L, C), block, rows = x.shape, _block(x.shape[-1]), 16
        chunks = -(-L // rows)
        dx, d_residual = torch.empty_like(x), None if ctx.residual is None else torch.empty_like(h)
        partial = x.new_empty(B, chunks, 4, C, dtype=torch.float32)
        _adaln_bwd[(B * chunks,)](dy.contiguous(), dh if dh is None else dh.contiguous(), x, h, scale, gate, weight,
                                  mean, rstd, dx, d_residual, partial, L, C, chunks, _step(gate), _step(scale),
                                  LAYER=ctx.layer, ROWS=rows, BLOCK=block, num_warps=_warps(block))
        d_scale, d_shift, d_gate, d_weight = (                              # (B, C), and whose gradient it is
            t if t is None else (d.sum(0) if t.dim() == 1 else d[:, None].sum_to_size(t.shape)).to(t.dtype)
            for d, t in zip(partial.sum(1).unbind(1), (scale, shift, gate, weight)))
        return dx, d_scale, d_shift, d_weight, d_residual, d_gate, None, None, None


# ----------------------------------------------------------------------------------------------------------------------
# qk_norm_rope


def rotate_pairs(x, cos, sin):
    """Rotates the pairs (x[2i], x[2i+1]) by their angle: (a cos - b sin, a sin + b cos).

    x: (B, L, H, D); cos, sin: (L, D / 2). In 2D RoPE the first half of the angles is for rows, the second for columns.
    """
    a, b = x[..., 0::2], x[..., 1::2]                                       # (B, L, H, D / 2)
    cos, sin = cos[None, :, None], sin[None, :, None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def qk_norm_rope(q, k, v, *, q_scale=None, l2norm=True, cos=None, sin=None, k_cache=None, v_cache=None, pos=0):
    """Everything between the qkv projection and the attention kernel.

    q, k, v:          (B, L, H, D), may be views of a packed projection; k and v with fewer heads than q go to torch
    q_scale:          (H,) float32, multiplies q after its normalisation
    l2norm:           divide q and k by max(norm, 1e-12) over D
    cos, sin:         (L, D / 2) float32, rotation of the pairs (2i, 2i + 1) of q and k; None for no rotation
    k_cache, v_cache: (B, H, Lmax, D); the new keys and values are written at pos .. pos + L. No gradient flows then
    pos:              an int, or an int tensor of one element on the device, which a CUDA graph reads at every replay
    returns           q (B, H, L, D) in v.dtype, and what it may look at: k and v (B, H, L, D), or with caches their
                      first pos + L rows. With a tensor as pos the whole caches: the host does not know their fill

    Bytes: read q, k, v, write q and the new rows of the caches, in bf16 4 per number. As separate steps (norm,
    division, both halves of the rotation, stack, cast, copy), most of them in float32, q and k move about 70.
    """
    on_device, room = isinstance(pos, torch.Tensor), 0 if k_cache is None else k_cache.shape[2]
    end = room if on_device else pos + k.shape[1]
    if k_cache is not None and not (on_device or 0 <= pos <= end <= room):
        raise ValueError(f"qk_norm_rope: {k.shape[1]} tokens at {pos} do not fit into a cache of {room}")
    B, L, H, D = q.shape
    fits = (q.shape == k.shape == v.shape and (q_scale is None or q_scale.shape == (H,))
            and (cos is None or (cos.shape == sin.shape == (L, D // 2) and D % 2 == 0)))
    if k_cache is not None:                                                 # both addressed by one set of strides
        fits = (fits and not torch.is_grad_enabled() and k_cache.shape == v_cache.shape == (B, H, room, D)
                and k_cache.stride() == v_cache.stride() and k_cache.stride(-1) == 1)
    if use_triton(q) and fits:
        q_scale, cos, sin = (t if t is None else t.contiguous() for t in (q_scale, cos, sin))
        q, new_k = _QKNormRope.apply(q, k, v, q_scale, cos, sin, l2norm, k_cache, v_cache, pos if room else 0)
        return (q, new_k, v.transpose(1, 2)) if k_cache is None else (q, k_cache[:, :, :end], v_cache[:, :, :end])
    dtype = v.dtype
    if l2norm:
        q, k = F.normalize(_wide(q), dim=-1), F.normalize(_wide(k), dim=-1)
    if q_scale is not None:
        q = _wide(q) * _wide(q_scale)[:, None]
    if cos is not None:
        q, k = rotate_pairs(_wide(q), cos, sin), rotate_pairs(_wide(k), cos, sin)
    q, k, v = (t.transpose(1, 2).to(dtype) for t in (q, k, v))              # (B, H, L, D)
    if k_cache is None:
        return q, k, v
    where = pos + torch.arange(k.shape[2], device=k.device) if on_device else slice(pos, end)
    k_cache[:, :, where] = k
    v_cache[:, :, where] = v
    return q, k_cache[:, :, :end], v_cache[:, :, :end]


@jit
def _rotated(p, cos, sin, l, d, ok, D, SIGN: tl.constexpr):
    """A tile x (heads, D), and the same with its pairs rotated: x[d] cos -+ x[d ^ 1] sin. The second load hits L1."""
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
    """One program per token and group of heads: a tile (HEADS, D) of q, of k, and a copy of v."""
    row = tl.program_id(0).to(tl.int64)
    b, l = row // L, row % L
    head = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)[:, None]     # (HEADS, 1)
    d = tl.arange(0, BLOCK)[None, :]                                        # (1, BLOCK)
    ok = (head < H) & (d < D)
    at = b * x_b + l * x_l + head * x_h
    cache_l = l + (tl.load(pos) if POS_TENSOR else pos)
    to = b * out_b + head * out_h + cache_l * out_l + d
    fits = (head < tl.where((cache_l < room) & (cache_l >= 0), H, 0)) & (d < D)     # never outside of the cache
    for i in tl.static_range(2):                                            # q, then k
        x, y = _rotated((k if i else q) + at, cos, sin, l, d, ok, D, 1.0)
        if L2NORM:                                                          # a rotation does not change lengths
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
    """Turns the gradients back by the angles; then with u = x / |x| that of x is (g - u (u . g)) / |x|, and that of
    q_scale the sum of u . g, of which d_scale (B * L, H) holds one term per token."""
    row = tl.program_id(0).to(tl.int64)
    b, l = row // L, row % L
    head = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    ok = (head < H) & (d < D)
    at, to, grad_at = b * x_b + l * x_l + head * x_h, (row * H + head) * D + d, ((b * H + head) * L + l) * D
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
    """Grid and tile: as many heads per program as make about 2048 numbers."""
    heads = min(_block(H), max(1, 2048 // _block(D)))
    return (B * L, -(-H // heads)), dict(HEADS=heads, BLOCK=_block(D))


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, q_scale, cos, sin, l2norm, k_out, v_out, pos):
        B, L, H, D = q.shape
        if not (q.stride() == k.stride() == v.stride() and q.stride(-1) == 1):      # views of one projection are alike
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
        dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
        d_scale = None if q_scale is None else q.new_empty(B * L, H, dtype=torch.float32)
        grid, tile = _qk_grid(B, L, H, D)
        _qk_bwd[grid](dq_out.contiguous(), dk_out.contiguous(), q, k, q_scale, cos, sin, dq, dk, d_scale, L, H, D,
                      *q.stride()[:3], L2NORM=ctx.l2norm, **tile)
        return dq, dk, None, None if d_scale is None else d_scale.sum(0).to(q_scale.dtype), *[None] * 6


# ----------------------------------------------------------------------------------------------------------------------
# decode_attention


def decode_attention(q, k, v, pos, *, visible=None, scale=None):
    """softmax(scale q k^T) v of one token per row, over the first pos + 1 rows of a KV cache.

    q:       (B, H, 1, D)
    k, v:    (B, Hkv, Lmax, D), whole caches of the same strides; each of their heads serves H / Hkv heads of q
    pos:     where the token itself is: an int, or an int tensor of one element on the device, which a CUDA graph reads
             at every replay
    visible: (B, Lmax) bool, False for rows that may not be looked at; of those up to pos at least one must be True
    scale:   by default D ** -0.5
    returns  (B, H, 1, D) in q.dtype. No gradient

    Bytes: read the filled rows of both caches. With a position on the device torch has to read all of both and hide the
    rest by a mask: over a whole picture twice as much.
    """
    B, H, _, D = q.shape
    scale, (_, heads, room, _), on_device = scale or D ** -0.5, k.shape, isinstance(pos, torch.Tensor)
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
        k, v, mask = k[:, :, :pos + 1], v[:, :, :pos + 1], None if mask is None else mask[..., :pos + 1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=H != heads)


def _decode(q, k, v, pos, visible, scale):
    """Two launches: few pictures and heads would leave most of a GPU idle, so the cache of each is cut into `parts`, of
    fixed places; those beyond the position read nothing."""
    (B, H, _, D), (_, heads, room, _) = q.shape, k.shape
    q, group = q.contiguous(), H // heads
    rows = max(16, 2048 // _block(D) // _block(group))                      # at a time: a tile of 2048 numbers
    steps = -(-room // (rows * max(1, min(256 // (B * heads), room // 64))))
    parts = -(-room // (steps * rows))
    sums = torch.empty(B * H, parts, D, dtype=torch.float32, device=q.device)
    tops, totals = torch.empty(2, B * H, parts, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    seen_b = 0 if visible is None else visible.stride(0)
    _decode_part[(B * heads, parts)](q, k, v, visible, sums, tops, totals, pos, float(scale), heads, group, D, room,
                                     parts, *k.stride()[:3], seen_b, POS_TENSOR=isinstance(pos, torch.Tensor),
                                     STEPS=steps, GROUP=_block(group), ROWS=rows, BLOCK=_block(D))
    _decode_merge[(B * H,)](sums, tops, totals, out, D, parts, PARTS=_block(parts), BLOCK=_block(D))
    return out


@jit
def _decode_part(q, k, v, visible, sums, tops, totals, pos, scale, heads, group, D, room, parts, x_b, x_h, x_l, seen_b,
                 POS_TENSOR: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
                 BLOCK: tl.constexpr):
    """One program per key head and part of its cache, ROWS at a time: the largest score so far, and relative to it the
    sum of the exponentials and of the values they weigh."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, head = row // heads, row % heads
    filled = tl.minimum((tl.load(pos) if POS_TENSOR else pos) + 1, room)
    g, d = tl.arange(0, GROUP), tl.arange(0, BLOCK)
    mine = row * group + g                                                  # heads of q over all pictures
    ok_q = (g < group)[:, None] & (d < D)[None, :]
    query = tl.load(q + mine[:, None] * D + d[None, :], mask=ok_q, other=0).to(tl.float32) * tl.cast(scale, tl.float32)
    top = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    acc = tl.zeros((GROUP, BLOCK), tl.float32)
    for i in range(STEPS):
        at = (part * STEPS + i) * ROWS + tl.arange(0, ROWS)
        ok = at < filled
        if visible is not None:
            ok = ok & (tl.load(visible + b * seen_b + at, mask=ok, other=0) != 0)
        to = b * x_b + head * x_h + at[:, None] * x_l + d[None, :]
        inside = ok[:, None] & (d < D)[None, :]
        keys = tl.load(k + to, mask=inside, other=0).to(tl.float32)         # (ROWS, BLOCK)
        score = tl.sum(query[:, None, :] * keys[None, :, :], 2)             # (GROUP, ROWS)
        score = tl.where(ok[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)               # nothing to look at yet
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
    """One program per head of q: its parts, brought to a common largest score."""
    row = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, PARTS), tl.arange(0, BLOCK)
    top = tl.load(tops + row * parts + s, mask=s < parts, other=float("-inf"))
    weight = tl.exp(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(totals + row * parts + s, mask=s < parts, other=0), 0)
    at = (row * parts + s)[:, None] * D + d[None, :]
    acc = tl.load(sums + at, mask=(s < parts)[:, None] & (d < D)[None, :], other=0)
    tl.store(out + row * D + d, tl.sum(weight[:, None] * acc, 0) / total, mask=d < D)


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
    if not nucleus:                                                         # the k-th largest needs no sort at all
        least = logits.kthvalue(V - top_k + 1, keepdim=True).values
    else:
        best = logits.topk(top_k).values                                    # (..., k), descending
        least = best[..., -1:]                                              # smallest value kept
        kept = logits.masked_fill(logits < least, float("-inf")) if top_k < V else logits
        p = (_wide(best) - _wide(kept).logsumexp(-1, keepdim=True)).exp()   # exact even if more than k survive
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
    """One draw per row from softmax(filter((cfg * cond + (1 - cfg) * uncond) / temperature)), see filter_logits.

    cond, uncond: (..., V) float logits; temperature 0 takes the largest
    noise:        Exp(1) noise of that shape, by default drawn from generator
    returns       (...) int64; 0 for a row of nothing but -inf; some index in range for one with NaN or +inf

    The draw is an exponential race, argmax(p / noise): of runners that take Exp(1) / p_i, number i is first with
    probability p_i. `torch.multinomial(p, 1, generator=...)` runs the same race, so the draws are the same, but makes
    the host wait for checks of p. Bytes: read both logits and the noise, 3 V numbers per row, in one launch; as
    separate steps a sort and two dozen launches.
    """
    V = cond.shape[-1]
    if noise is None and temperature != 0:
        noise = exponential_noise(cond.shape, generator, cond.device)
    fits = V <= 32768 and temperature != 0 and all(t is None or t.shape == cond.shape for t in (uncond, noise))
    if use_triton(cond) and fits:                                           # a row has to fit into registers
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


@jit
def _largest_threshold(key, weight, target):
    """The largest t with sum(weight[key >= t]) >= target, bit by bit from the top: 32 sums, no sort. With weight 1 and
    target k it is the k-th largest key; with probabilities and target p, the smallest that top-p keeps."""
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
    e = tl.where(ok, tl.exp(tl.where(x == top, 0.0, x - top)), 0.0)         # probabilities but for their sum
    if TOP_K or TOP_P:
        bits = x.to(tl.uint32, bitcast=True)
        sign = tl.full((), 1, tl.uint32) << 31
        key = bits ^ sign ^ tl.where(bits >= sign, sign - 1, 0)             # flip the sign; of negative ones, all bits
        least = tl.full((), 0, tl.uint32)                                   # so unsigned keys are ordered as the floats
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
# vq_nearest

SEARCH_CHUNK = 4 * 2**20    # distances per slice in torch: 4M floats = 16 MB, which a last-level cache holds


def vq_nearest(z, codebook, *, l2norm=False):
    """Index of the nearest codebook row: argmin_v |z|^2 + |e_v|^2 - 2 z.e_v, the lowest index on ties.

    z: (N, C); codebook: (V, C); l2norm: normalise both first; returns (N,) int64. No gradient. Which of two codes wins
    whose distances differ by less than 1e-5 relative may depend on the device. In torch on CUDA leave the float32
    matmul precision at "highest", its default: TF32 has 10 bits of mantissa and flips indices.

    Bytes: read z and the codebook, write N indices. The N x V distances, gigabytes for a batch of pictures, never leave
    the registers. What remains is arithmetic: 2 N V C operations in true float32.
    """
    z, codebook = _wide(z.detach()), _wide(codebook.detach())
    if l2norm:
        z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
    code_norm = codebook.square().sum(1)                                    # (V,)
    if use_triton(z) and z.shape[1] == codebook.shape[1] <= 64 and len(codebook):
        (N, C), out = z.shape, torch.empty(len(z), dtype=torch.int64, device=z.device)
        _nearest[(-(-N // 64),)](z.contiguous(), codebook.contiguous(), code_norm, out, N, C,
                                 V=len(codebook), ROWS=64, CODES=64, BLOCK=max(16, _block(C)))
        return out
    best = [torch.addmm(part.square().sum(1, keepdim=True) + code_norm, part, codebook.T, alpha=-2).argmin(1)
            for part in z.split(max(1, SEARCH_CHUNK // len(codebook)))]     # slices of (n, V)
    return torch.cat(best)


@jit
def _nearest(z, codebook, code_norm, out, N, C, V: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
             BLOCK: tl.constexpr):
    """ROWS rows of z per program, against CODES codes at a time; keeps the best so far of every row."""
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
        index = tl.where(least < best, start + at, index)                   # strictly: the lowest index wins a tie
        best = tl.minimum(least, best)
    tl.store(out + row, index.to(tl.int64), mask=row < N)


# ----------------------------------------------------------------------------------------------------------------------
# group_norm_silu


def group_norm_silu(x, weight, bias, groups=32, eps=1e-6, silu=True, exact=False):
    """silu(group_norm(x)) of x (N, C, ...), contiguous or channels_last; keeps the memory format and the dtype.

    weight, bias: (C,). Statistics over the C / groups channels of a group and all positions; silu=False leaves it out;
    exact: sums without bias also of large maps that are constant in part, which costs time on a CPU only.

    Bytes: read x twice (small groups once; the second time from the L2 cache if it fits), write y. Torch reads and
    writes once more for SiLU, and has no channels_last GroupNorm on CUDA: it copies to NCHW, and back for convolutions.
    """
    if x.shape[1] % groups:
        raise ValueError(f"group_norm_silu: {x.shape[1]} channels do not divide into {groups} groups")
    fits = weight is not None and weight.shape == bias.shape == x.shape[1:2] and x.numel() <= 2**25 * groups * len(x)
    if use_triton(x) and fits:                                              # larger groups have too many tiles
        return _GroupNormSiLU.apply(x, weight, bias, groups, eps, silu)
    large = x.numel() > 2**12 * groups * len(x) and x.dtype == torch.float32 and fits
    biased = exact and x.device.type == "cpu" and large and not x.is_contiguous()       # torch's own, see below
    normed = _group_norm_in_two_steps if biased else lambda x, w, b, groups, eps: F.group_norm(x, groups, w, b, eps)
    y = normed(x, weight, bias, groups, eps)
    return F.silu(y, inplace=not torch.is_grad_enabled()) if silu else y


def _group_norm_in_two_steps(x, weight, bias, groups, eps):
    """F.group_norm of large channels_last maps on a CPU. There torch adds up values and squares one after the other, by
    which the same number is rounded in the same direction each time: 1e-3 off where half of a map is constant."""
    N, C = x.shape[:2]
    variance, mean = torch.var_mean(x.movedim(1, -1).flatten(1, -2), 1, correction=0)      # (N, C)
    variance, mean = (v.unflatten(1, (groups, -1)) for v in (variance, mean))
    centre = mean.mean(2, keepdim=True)                                     # (N, groups, 1)
    variance = variance.mean(2, keepdim=True) + (mean - centre).square().mean(2, keepdim=True)
    scale = (variance + eps).rsqrt() * weight.unflatten(0, (groups, -1))
    shift = bias.unflatten(0, (groups, -1)) - centre * scale
    wide = lambda v: v.reshape(N, C, *[1] * (x.dim() - 2))
    return torch.addcmul(wide(shift), x, wide(scale))


# A picture (C, S = H * W) is cut into tiles, wide along the dimension that is dense in memory. A group that fits into
# registers takes one launch. Others take three: mean and squared deviations of every channel in a tile, (N * C, tiles);
# these combined into mean and 1 / std of every group; the normalisation.


@jit
def _gn_tile(C, S, tiles, LAST: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr):
    """The tile of this program: its channels c and the same counted over all pictures, addresses, mask, and place of
    its sums. LAST: channels_last."""
    pid = tl.program_id(0).to(tl.int64)
    tile, n = pid % tiles, pid // tiles // tl.cdiv(C, BC)
    c = pid // tiles % tl.cdiv(C, BC) * BC + tl.arange(0, BC)
    s = tile * BS + tl.arange(0, BS)
    at = n * C * S + (c[:, None] + s[None, :] * C if LAST else c[:, None] * S + s[None, :])
    return c, n * C + c, at, (c < C)[:, None] & (s < S)[None, :], (n * C + c) * tiles + tile


@jit
def _gn_silu(u, weight, bias, c, ok, SILU: tl.constexpr):
    """silu(z), silu'(z) and weight, where z = u * weight + bias; z and 1 without SiLU. u: (channels, positions)."""
    w = tl.load(weight + c, mask=ok, other=0).to(tl.float32)[:, None]
    z = u * w + tl.load(bias + c, mask=ok, other=0).to(tl.float32)[:, None]
    y, slope = z, tl.full((1, 1), 1, tl.float32)
    if SILU:
        sigma = 1 / (1 + tl.exp(-z))
        y, slope = z * sigma, sigma * (1 + z * (1 - sigma))
    return y, slope, w


@jit
def _gn_group(x, weight, bias, y, mean, rstd, C, S, D, eps, SILU: tl.constexpr, LAST: tl.constexpr,
              BC: tl.constexpr, BS: tl.constexpr):
    """One program per group of D channels, which it keeps in registers."""
    pid = tl.program_id(0).to(tl.int64)
    row, s = pid * D + tl.arange(0, BC), tl.arange(0, BS)                   # row: channels over all pictures
    c, mine = row % C, tl.arange(0, BC) < D
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
    """One program per group: its D * tiles partial results -> mean and 1 / std, by Chan's formula: no cancellation."""
    pid = tl.program_id(0).to(tl.int64)
    d, t = tl.arange(0, BD)[:, None], tl.arange(0, BT)[None, :]
    at, ok = (pid * D + d) * tiles + t, (d < D) & (t < tiles)
    share = tl.where(ok, tl.minimum(S - t * BS, BS), 0).to(tl.float32) / S / D
    part = tl.load(means + at, mask=ok, other=0)
    m = tl.sum(part * share)
    variance = tl.sum(tl.load(squares + at, mask=ok, other=0) / S / D + (part - m) * (part - m) * share)
    tl.store(mean + pid, m)
    tl.store(rstd + pid, 1 / tl.sqrt(variance + tl.cast(eps, tl.float32)))


@jit
def _gn_apply(x, weight, bias, y, mean, rstd, C, S, D, tiles, SILU: tl.constexpr, LAST: tl.constexpr,
              BC: tl.constexpr, BS: tl.constexpr):
    c, row, at, ok, _ = _gn_tile(C, S, tiles, LAST, BC, BS)
    m, r = tl.load(mean + row // D, mask=c < C, other=0), tl.load(rstd + row // D, mask=c < C, other=0)
    u = (tl.load(x + at, mask=ok, other=0).to(tl.float32) - m[:, None]) * r[:, None]
    out, _, _ = _gn_silu(u, weight, bias, c, c < C, SILU)
    tl.store(y + at, out, mask=ok)


@jit
def _gn_bwd(dy, x, weight, bias, mean, rstd, a, b, dx, C, S, D, tiles, SUMS: tl.constexpr, SILU: tl.constexpr,
            LAST: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr):
    """Run twice. SUMS: sums of dz and dz * u per channel and tile into a and b. Then, with g = dz * weight and in a and
    b the group's means of g and g * u: dx = rstd * (g - a - u * b)."""
    c, row, at, ok, to = _gn_tile(C, S, tiles, LAST, BC, BS)
    m, r = tl.load(mean + row // D, mask=c < C, other=0), tl.load(rstd + row // D, mask=c < C, other=0)
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
    """(N, C, S), memory format, number of tiles along S, grid, and how a kernel is told about it."""
    N, C, S = x.shape[0], x.shape[1], x.numel() // (x.shape[0] * x.shape[1])
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last and not x.is_contiguous() and x.is_contiguous(memory_format=last):
        BC, BS, form = min(64, _block(C)), min(128, _block(S)), last
    else:
        BS, form = min(8192, _block(S)), torch.contiguous_format
        BC = min(8192 // BS, _block(C))
    tiles = -(-S // BS)
    how = dict(LAST=form != torch.contiguous_format, BC=BC, BS=BS, num_warps=_warps(BC * BS))
    return (N, C, S), form, tiles, (N * -(-C // BC) * tiles,), how


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, silu):
        (N, C, S), form, tiles, grid, how = _gn_layout(x)
        x, weight, bias, D = x.contiguous(memory_format=form), weight.contiguous(), bias.contiguous(), C // groups
        y, whole = torch.empty_like(x), _block(D) * _block(S)
        mean, rstd = x.new_empty(2, N * groups, dtype=torch.float32)
        if whole <= 16384:                                                  # at most 32 numbers per thread
            _gn_group[(N * groups,)](x, weight, bias, y, mean, rstd, C, S, D, eps, SILU=silu, LAST=how["LAST"],
                                     BC=_block(D), BS=_block(S), num_warps=_warps(whole))
        else:
            means, squares = x.new_empty(2, N * C, tiles, dtype=torch.float32)
            _gn_stats[grid](x, means, squares, C, S, tiles, **how)
            _gn_combine[(N * groups,)](means, squares, mean, rstd, S, D, tiles, eps, BS=how["BS"], BD=_block(D),
                                       BT=_block(tiles), num_warps=_warps(_block(D) * _block(tiles)))
            _gn_apply[grid](x, weight, bias, y, mean, rstd, C, S, D, tiles, SILU=silu, **how)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.silu, ctx.D = silu, D
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        (N, C, S), form, tiles, grid, how = _gn_layout(x)
        dy, dx, D = dy.contiguous(memory_format=form), torch.empty_like(x), ctx.D
        sums = x.new_empty(2, N * C, tiles, dtype=torch.float32)
        _gn_bwd[grid](dy, x, weight, bias, mean, rstd, *sums, dx, C, S, D, tiles, SUMS=True, SILU=ctx.silu, **how)
        sums = sums.sum(-1).view(2, N, C)
        means = (sums * weight.float()).view(2, -1, D).sum(-1) / (D * S)    # (2, N * groups)
        _gn_bwd[grid](dy, x, weight, bias, mean, rstd, *means, dx, C, S, D, tiles, SUMS=False, SILU=ctx.silu, **how)
        d_bias, d_weight = sums.sum(1)
        return dx, d_weight.to(weight.dtype), d_bias.to(bias.dtype), None, None, None


# ----------------------------------------------------------------------------------------------------------------------
# The registry: what tests, benchmark and README know about the ops


@dataclass(frozen=True)
class OpSpec:
    """An op, inputs to try it on, and what it cannot avoid doing."""

    fn: Callable
    inputs: Callable                        # (randn, *shape) -> args, kwargs; randn(*size): a tensor to fill them with
    shapes: dict                            # name -> shape: a small odd one for tests, then real ones from the models
    bytes: Callable                         # (itemsize, *shape) -> bytes moved at least
    flops: Callable = lambda *shape: 0      # float32 operations at least, where those count
    trains: bool = False                    # has a backward
    tol: float = 2e-5                       # float32, relative to the largest value; of indices, the share that differs


def _adaln_inputs(randn, B, L, C):
    scale, shift, gate = randn(B, 1, 3, C).unbind(2)
    return (randn(B, L, C), scale, shift), dict(residual=randn(B, L, C), gate=gate)


def _qk_inputs(randn, B, L, H, D):
    (q, k, v), angle = randn(B, L, 3, H, D).unbind(2), randn(L, D // 2)
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
        lambda i, B, L, H, D: 4 * B * L * H * D * i, trains=True),         # without a cache v stays where it is
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


if __name__ == "__main__":                  # the registry as a table, or --bench: both live with all other benchmarks
    import runpy
    import sys
    sys.argv[:1] = ["sample.py", "ops"]
    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "sample.py"), run_name="__main__")
