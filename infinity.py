"""Infinity: text -> image by next-scale prediction of bits. Full definition of the model, all of it in this one file.

Like VAR, a transformer draws a picture resolution by resolution, from one token to 64 x 64 and more, all tokens of a
resolution at once. But a token consists of d bits (d = 16 ... 64), the signs of d channels. The vocabulary then has 2^d
entries, too many for a softmax, so the head is one two-way classifier per bit (an infinite-vocabulary classifier).

    prompt --> T5 --> text (T, 2048) --+--> pooled: one vector, the first token and the condition of every AdaLN
                                       +--> memory: k and v of every cross-attention, computed once
                    scale 0         scale 1              scale 2                   scale 12
    inputs          pooled + start  word(f_hat 2x2)      word(f_hat 4x4)    ...    word(f_hat 64x64)   + level
                         |               |                    |                         |
    transformer     sees 1 token    sees 1 + 4           sees 1 + 4 + 16           sees all 10,521         block-causal
                         |               |                    |                         |
    logits          1 x d x 2       4 x d x 2            16 x d x 2                4096 x d x 2

    bits -> codes +-1/sqrt(d) -> upsampled -> added to f_hat, the picture so far; f_hat resized is the next input

How it differs from VAR (var.py), besides the bits:
- *Bitwise self-correction*: training flips random bits of every scale and computes the targets of the finer scales
  against the flipped picture, so the model learns to repair its own mistakes. See `self_correct`.
- The condition is text. It is pooled for AdaLN, and a cross-attention between attention and feed-forward reads it.
- Pictures have one of 15 aspect ratios and several sizes, see `vq.schedule`. Positions are 2D RoPE on the grid of the
  1M schedule, so a place has the same angle at every scale and size, and no table is learned.
- Guidance and temperature may differ from scale to scale, and guidance may act on features instead of logits.
- One AdaLN map is shared by all blocks, and each block adds a table of its own.
With patchify a token holds the bits of 2 x 2 neighbours: 4 x 14 = 56 bits, from a map of twice the size (8B).

Letters: B batch, R rows (2B with guidance, else B), L tokens of all scales, l tokens of one scale, T text tokens, C
width, Ct text width, H heads, D head dim, K scales, h w token-map size (h_K w_K: of the last scale), d bits of a
tokenizer token. A transformer token has `bits` of them: d, or 4 d with patchify. tau is the temperature of the logits.
Paper: Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image Synthesis, arXiv 2412.04431. Released
weights, repository FoundationVision/Infinity: infinity_125M_256x256.pth (tokenizer d16, 0.06M pixels),
infinity_2b_reg.pth (tokenizer d32reg, 1M), the folders infinity_8b_weights (tokenizer d56_f8_14_patchify, 1M) and
infinity_8b_512x512_weights (0.25M). All read the features of google/flan-t5-xl, whose encoder is in lib/text.py.

    tokenizer, model = vq.load("infinity_vae_d32reg.pth"), infinity.load("infinity_2b_reg.pth")
    text, text_mask = lib.text.load_t5("flan-t5-xl").encode(["a red fox in the snow"])
    images = model.sample(tokenizer, text, text_mask, scales=vq.schedule(aspect=1.0, pixels="1M"), cfg=3, tau=0.5,
                          generator=torch.Generator().manual_seed(0))       # (1, 3, 1024, 1024) in [0, 1]
"""
import itertools
import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import vq
from triton_ops import adaln_modulate, exponential_noise, qk_norm_rope


@dataclass(frozen=True)
class Config:
    """Sizes of an Infinity. `infer_config` reads them from a released file, except patchify, norm_eps and the drops."""

    depth: int = 32
    width: int = 2048                           # C
    heads: int = 16                             # H
    bits: int = 32                              # per transformer token
    patchify: bool = False                      # a token is 2 x 2 of the tokenizer's: bits = 4 d
    text_width: int = 2048                      # Ct, a multiple of 128
    text_maxlen: int = 512                      # rows of the null text
    levels: int = 15                            # rows of the level embedding, at least K
    chunks: int = 8                             # number of groups in which official keys store the blocks
    norm_eps: float = 1e-6
    text_drop: float = 0.1                      # share of prompts replaced by the null text in training
    drop_path: float = 0.1                      # rate of the last block, grows linearly from 0 at the first

    @property
    def hidden(self):
        """Width inside the feed-forward: 4 C rounded to the nearest multiple of 256."""
        return round(4 * self.width / 256) * 256


CONFIGS = {
    "infinity_125M": Config(depth=12, width=768, heads=8, bits=16, chunks=4),
    "infinity_2b": Config(),
    "infinity_8b": Config(depth=40, width=3584, heads=28, bits=56, patchify=True),
    "emoji_infinity": Config(depth=6, width=192, heads=3, bits=16, text_width=128, text_maxlen=32, chunks=1,
                             drop_path=0.025),                              # 32 x 32 pixels, trained in demo/
}


# ----------------------------------------------------------------------------------------------------------------------
# Building blocks


def rope_angles(scales, head_dim, device=None):
    """2D RoPE: (h, w) of every scale -> angles (L, D / 2), the first half of them for rows, the second for columns.

    Positions are counted on the grid of the 1M schedule of that aspect ratio, no matter how large the picture is. They
    are rounded, halves to the even number. Frequencies fall from 1 to nearly 1 / 10000, as in RoPE for text.
    """
    h_K, w_K = scales[-1]
    full_h, full_w = vq.ASPECTS[vq.nearest_aspect(h_K / w_K)][-1]

    def positions(n, full):
        return (torch.arange(n, device=device, dtype=torch.float32) * (full / n)).round()
    frequency = 10000 ** (-torch.arange(0, head_dim // 2, 2, device=device, dtype=torch.float32) / (head_dim // 2))
    grids = [torch.cartesian_prod(positions(h, full_h), positions(w, full_w)) for h, w in scales]   # (h * w, 2) each
    return (torch.cat(grids)[:, :, None] * frequency).flatten(1)


class Attention(nn.Module):
    """Multi-head attention to the tokens of the same scale and of all coarser scales. As in VAR, a score is the cosine
    of q and k times a learned sharpness."""

    def __init__(self, config):
        super().__init__()
        C, H = config.width, config.heads
        self.heads = H
        self.qkv = nn.Linear(C, 3 * C, bias=False)                          # rows: q, k, v, each head-major
        self.q_bias = nn.Parameter(torch.zeros(C))
        self.v_bias = nn.Parameter(torch.zeros(C))
        self.log_scale = nn.Parameter(torch.full((1, H, 1, 1), math.log(4)))    # log of the sharpness
        self.proj = nn.Linear(C, C)

    def forward(self, x, rope, bounds=None, kv_cache=None, pos=0):
        """x (B, l, C) -> (B, l, C). rope: cos and sin (2, l, D / 2), applied to normalised q and k.

        bounds: in training, (start, end) of every scale. Attention is full within a scale and causal between scales, so
        one call per scale, with the keys up to its end, needs no mask and skips what a mask would hide.
        kv_cache (2, B, H, L, D): keys and values of the coarser scales up to pos; those of x are written behind them.
        """
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)                            # (B, l, 3C)
        q, k, v = rearrange(qkv, "b l (three h d) -> three b l h d", three=3, h=self.heads)
        q_scale = self.log_scale.float().clamp(max=math.log(100)).exp().flatten()       # (H,), at most 100
        k_cache, v_cache = kv_cache if kv_cache is not None else (None, None)
        q, k, v = qk_norm_rope(q, k, v, q_scale=q_scale, cos=rope[0], sin=rope[1], k_cache=k_cache, v_cache=v_cache,
                               pos=pos)
        if bounds is None:
            out = F.scaled_dot_product_attention(q, k, v, scale=1.0)        # (B, H, l, D). q_scale replaces the scale
        else:
            parts = zip(q.split([end - start for start, end in bounds], 2), bounds)
            out = torch.cat([F.scaled_dot_product_attention(part, k[:, :, :end], v[:, :, :end], scale=1.0)
                             for part, (_, end) in parts], 2)
        return self.proj(rearrange(out, "b h l d -> b l (h d)"))


class CrossAttention(nn.Module):
    """Multi-head attention of picture tokens to text. q and k are not normalised, and there are no positions."""

    def __init__(self, config):
        super().__init__()
        C = config.width
        self.heads = config.heads
        self.q = nn.Linear(C, C)
        self.kv = nn.Linear(C, 2 * C, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(C))
        self.proj = nn.Linear(C, C)

    def keys_values(self, memory):
        """Text memory (B, T, C) -> k, v (B, H, T, D)."""
        bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        kv = F.linear(memory.to(self.kv.weight.dtype), self.kv.weight, bias)
        return rearrange(kv, "b t (two h d) -> two b h t d", two=2, h=self.heads).unbind(0)

    def forward(self, x, k, v, text_mask):                                  # text_mask (B, 1, 1, T) bool, or None
        q = rearrange(self.q(x), "b l (h d) -> b h l d", h=self.heads)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=text_mask)  # scale D ** -0.5
        return self.proj(rearrange(out, "b h l d -> b l (h d)"))


class FeedForward(nn.Module):
    """C -> about 4C -> C with GELU in its tanh form."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """A transformer block: attention, cross-attention to the text, feed-forward. The pooled text modulates and gates
    attention and feed-forward."""

    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config)
        self.cross_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.cross = CrossAttention(config)
        self.ffn = FeedForward(config.width, config.hidden)
        self.adaln_table = nn.Parameter(torch.zeros(1, 1, 6, config.width))
        self.eps = config.norm_eps

    def condition(self, shared, memory):
        """What depends on the prompt only. Output of the shared AdaLN map (B, 1, 6, C) and text memory (B, T, C) -> two
        gates, two scales and two shifts (B, 1, 6, C), the first of each for attention; text keys, values (B, H, T, D).
        """
        return self.adaln_table + shared, *self.cross.keys_values(memory)

    def forward(self, x, condition, rope, text_mask, bounds=None, kv_cache=None, pos=0, branch_scale=None):
        """Residual stream x (B, l, C) -> the same. condition: from the method `condition`. branch_scale: see
        `Infinity.branch_scale`. rope, bounds, kv_cache and pos: see `Attention`. text_mask: see `CrossAttention`."""
        modulation, text_k, text_v = condition
        # In a textbook this reads
        #     x = x + gate1 * attn(modulate(norm(x), scale1, shift1))
        #     x = x + cross(cross_norm(x), text)
        #     x = x + gate2 * ffn(modulate(norm(x), scale2, shift2))
        # Here each adaln_modulate does the sum before it as well, in the same pass over memory.
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        if branch_scale is not None:
            gate1 = gate1 * branch_scale[0]
            gate2 = gate2 * branch_scale[1]
        dtype = self.ffn.fc1.weight.dtype                                   # x stays float32 if the weights are not
        h = adaln_modulate(x, scale1, shift1, self.eps, out_dtype=dtype)
        h = self.attn(h, rope, bounds, kv_cache, pos)
        # adaln_modulate multiplies by 1 + scale, so the weight of cross_norm is given as weight - 1.
        scale = self.cross_norm.weight.float()[None, None] - 1
        shift = self.cross_norm.bias.float()[None, None]
        h, x = adaln_modulate(h, scale, shift, self.eps, residual=x, gate=gate1, out_dtype=dtype)
        h = self.cross(h, text_k, text_v, text_mask)
        h, x = adaln_modulate(h, scale2, shift2, self.eps, residual=x, out_dtype=dtype)
        return torch.addcmul(x, gate2, self.ffn(h))


class TextPool(nn.Module):
    """Text (B, T, Ct) -> one vector (B, C) by attention with a learned query per head; Ct / 128 heads for any C."""

    def __init__(self, config):
        super().__init__()
        C, heads = config.width, config.text_width // 128
        self.query = nn.Parameter(torch.zeros(1, heads, C // heads))
        self.kv = nn.Linear(config.text_width, 2 * C, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(C))
        self.proj = nn.Linear(C, C)

    def forward(self, text, text_mask):
        bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        kv = F.linear(text, self.kv.weight, bias)
        k, v = rearrange(kv, "b t (two h d) -> two b h t d", two=2, h=self.query.shape[1])
        q = self.query[:, :, None].expand(len(text), -1, -1, -1).to(k.dtype)            # (B, heads, 1, C / heads)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=text_mask)  # scale (C / heads) ** -0.5
        return self.proj(rearrange(out, "b h 1 d -> b (h d)"))


# ----------------------------------------------------------------------------------------------------------------------
# Bits: tokens of the transformer, and the training signal


def fold(x, size):
    """Tokenizer tokens (B, 2h * 2w, d) -> transformer tokens (B, h * w, 4d): bit 0 of 2 x 2 neighbours, bit 1, ..."""
    return rearrange(x, "b (h dy w dx) d -> b (h w) (d dy dx)", h=size[0], dy=2, dx=2)


def unfold(x, size):
    """The inverse of fold."""
    return rearrange(x, "b (h w) (d dy dx) -> b (h dy w dx) d", h=size[0], dy=2, dx=2)


def tokenizer_scales(scales, patchify):
    """The transformer's schedule -> the tokenizer's. With patchify all maps are twice as large."""
    return tuple((2 * h, 2 * w) for h, w in scales) if patchify else tuple(scales)


@torch.no_grad()
def self_correct(quantizer, f, scales, strength=0.3, *, layers=None, patchify=False, generator=None, chances=None):
    """Bitwise self-correction (section 3.4): training inputs that contain mistakes, and targets that correct them.

    A model that has only seen correct prefixes does not know what to do after its first wrong bit. So some bits of
    every scale are flipped, as if drawn wrong. f_hat continues from the flipped bits, and the targets of the next
    scales are computed from what is missing then. So flipped bits are never targets, but the bits that repair them are.

    f:        (B, d, h_K, w_K) features of the pictures, from `tokenizer.encode`; with patchify of twice that size
    strength: largest chance of a flip. Each scale draws its chance from 0, 0.01, ... strength. 0: no flips
    layers:   flip bits of the first `layers` scales only; None: of all
    chances:  a list with the chance of every scale, instead of drawing them
    returns   inputs of scales 1 .. K - 1 (B, L - h_0 w_0, bits) float32, labels of all scales (B, L, bits) bool
    """
    sizes = tokenizer_scales(scales, patchify)
    f = f.float()
    f_hat = torch.zeros_like(f)
    inputs, labels = [], []
    for k, size in enumerate(sizes):
        missing = vq.area_resize(f - f_hat, size)
        bits, _ = quantizer.quantize(missing)                               # (B, h * w, d), the targets
        labels.append(fold(bits, scales[k]) if patchify else bits)
        if strength and (layers is None or k < layers):
            if chances is None:
                chance = 0.01 * torch.randint(round(100 * strength) + 1, (), generator=generator, device=f.device)
            else:
                chance = chances[k]
            bits = bits ^ (torch.rand(bits.shape, generator=generator, device=f.device) < chance)
        f_hat = f_hat + quantizer.contribution(quantizer.embed(bits, size), k, len(sizes), sizes[-1])
        if k + 1 < len(sizes):
            next_input = quantizer.next_input(f_hat, k + 1, sizes)
            inputs.append(fold(next_input, scales[k + 1]) if patchify else next_input)
    return torch.cat(inputs, 1), torch.cat(labels, 1)


def draw_bits(logits, noise, top_k=0, top_p=0.0):
    """Logits (B, l, bits, 2), Exp(1) noise (B, l * bits, 2) -> bits (B, l, bits) bool, by an exponential race.

    The value with the larger p / noise wins, which happens with probability p. `torch.multinomial(p, 1, generator=...)`
    runs the same race and draws the same bits, but it makes the CPU wait for the GPU.
    Two values need no sort. top_k = 1 drops the less likely value. 0 < top_p < 1 drops it if its probability is at most
    1 - top_p: with 0.97, a bit whose likelier value has a probability of 97 % or more is no longer random.
    """
    bit_logits = logits[..., 1] - logits[..., 0]
    one, zero = bit_logits.sigmoid(), (-bit_logits).sigmoid()
    if top_k == 1 or 0 < top_p < 1:
        limit = 1.0 if top_k == 1 else 1 - top_p
        drop_one = (one <= limit) & (one < zero)
        drop_zero = (zero <= limit) & (zero < one)
        one, zero = one.masked_fill(drop_one, 0), zero.masked_fill(drop_zero, 0)
    noise = noise.view(*one.shape, 2)
    return one / noise[..., 1] > zero / noise[..., 0]


# ----------------------------------------------------------------------------------------------------------------------
# The model


class Condition(NamedTuple):
    """Everything that depends on the prompts only: computed once per picture, not once per scale."""

    modulation: torch.Tensor    # (depth, R, 1, 6, C)
    text_k: torch.Tensor        # (depth, R, H, T, D)
    text_v: torch.Tensor        # (depth, R, H, T, D)
    text_mask: torch.Tensor     # (R, 1, 1, T) bool, or None
    head: torch.Tensor          # (2, R, 1, C): scale and shift of the last norm


class Step(NamedTuple):
    """What `Infinity.sample` passes to on_step after scale k."""

    k: int
    logits: torch.Tensor        # (B, l, bits, 2), guided and divided by tau, before the filters
    bits: torch.Tensor          # (B, h * w, d) of the tokenizer, drawn or given; with patchify (B, 2h * 2w, d)
    f_hat: torch.Tensor         # (B, d, h_K, w_K) the picture so far, at the size of the last scale


def scale_bounds(scales, L):
    """(start, end) of every scale in the first L tokens, which must be whole scales."""
    ends = list(itertools.accumulate(h * w for h, w in scales))
    if L not in ends:
        raise ValueError(f"{L} tokens are no whole number of the scales {scales}")
    return list(zip([0, *ends], ends[:ends.index(L) + 1]))


def per_scale(value, K, name):
    """A number, or a list with one per scale -> a list of K floats. Values beyond K are ignored: a list for the largest
    pictures then serves smaller ones too."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * K
    if len(values) < K:
        raise ValueError(f"{name} has {len(values)} values, but there are {K} scales: give one for all, or {K}")
    return [float(v) for v in values[:K]]


class Infinity(nn.Module):
    """The transformer. Methods take the tokenizer, and features of text, as arguments.

    text_encoder: a module that is trained with the model and saved in the same file (demo). Only init_weights calls it.
    """

    NO_DECAY = ("null_text", "pos_start", "level_embed", "adaln_table", "log_scale", "text_pool.query")

    def __init__(self, config, text_encoder=None):
        super().__init__()
        self.config = config
        self.checkpointing = False
        C, Ct = config.width, config.text_width
        self.text_norm = nn.RMSNorm(Ct, 1e-6)
        self.text_pool = TextPool(config)
        self.text_in = nn.Linear(Ct, C)                                     # text -> memory: text_in, GELU, text_out
        self.text_out = nn.Linear(C, C)
        self.null_text = nn.Parameter(torch.zeros(config.text_maxlen, Ct))  # row t stands in for token t of a prompt
        self.word_embed = nn.Linear(config.bits, C)                         # embeds the cells of f_hat
        self.level_embed = nn.Embedding(config.levels, C)
        self.pos_start = nn.Parameter(torch.zeros(1, 1, C))
        self.shared_adaln = nn.Linear(C, 6 * C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_adaln = nn.Linear(C, 2 * C)
        self.head = nn.Linear(C, 2 * config.bits)                           # row 2j + c: bit j has the value c
        self.text_encoder = text_encoder

    # pieces that training and sampling share

    def read_text(self, text, text_mask):
        """Text (B, T, Ct), mask (B, T) or None -> condition (B, C), memory (B, T, C), mask (B, 1, 1, T) or None."""
        text = self.text_norm(text.float())
        text_mask = None if text_mask is None else text_mask[:, None, None]
        memory = self.text_out(F.gelu(self.text_in(text), approximate="tanh"))
        return self.text_pool(text, text_mask), memory, text_mask

    def block_conditions(self, cond, memory):
        """Condition (B, C), memory (B, T, C) -> for each block what `Block.condition` computes."""
        shared = rearrange(self.shared_adaln(F.silu(cond)), "b (six c) -> b 1 six c", six=6)
        return [block.condition(shared, memory) for block in self.blocks]

    def head_modulation(self, cond):
        """Condition (B, C) -> scale and shift (2, B, 1, C) of the last norm."""
        return torch.stack(self.head_adaln(F.silu(cond)).unsqueeze(1).chunk(2, dim=-1))

    def logits(self, x, head_modulation):
        """Residual stream (B, l, C) -> (B, l, bits, 2) float32."""
        scale, shift = head_modulation
        x = adaln_modulate(x, scale, shift, self.config.norm_eps, out_dtype=self.head.weight.dtype)
        return rearrange(self.head(x).float(), "b l (bits two) -> b l bits two", two=2)

    def rope(self, scales):
        """cos and sin (2, L, D / 2) of all tokens."""
        angles = rope_angles(scales, self.config.width // self.config.heads, self.pos_start.device)
        return torch.stack([angles.cos(), angles.sin()])

    def null_rows(self, T):
        """The null text (T, Ct) that replaces a prompt of T tokens. Raises ValueError if it is shorter."""
        if T > len(self.null_text):
            raise ValueError(f"a prompt has {T} tokens, but the null text {len(self.null_text)}: shorten the prompt, "
                             "or do without guidance and without dropping")
        return self.null_text[:T]

    # training

    def forward(self, text, text_mask, inputs, scales, *, text_drop=0.0, generator=None):
        """Teacher-forced logits.

        text:      (B, T, Ct) features of the prompts
        text_mask: (B, T) bool, False for padding, or None
        inputs:    (B, L - 1, bits) what enters at scales 1, 2, ..., from `self_correct`. If only the inputs of the
                   first scales are given, only these scales are computed
        scales:    (h, w) of all scales, from `vq.schedule`
        text_drop: share of prompts replaced by the null text
        generator: gives one uniform number per picture for text_drop, and in training mode those of stochastic depth
        returns    (B, L, bits, 2) float32; row i predicts token i of the same scale (not of the next position)
        """
        B, L = len(text), 1 + inputs.shape[1]
        if text_drop:
            dropped = torch.rand(B, generator=generator, device=text.device) < text_drop
            text = torch.where(dropped[:, None, None], self.null_rows(text.shape[1]), text)
        cond, memory, text_mask = self.read_text(text, text_mask)
        bounds = scale_bounds(scales, L)
        x = torch.cat([cond[:, None] + self.pos_start, self.word_embed(inputs)], 1)     # (B, L, C)
        level = [self.level_embed.weight[k].expand(b - a, -1) for k, (a, b) in enumerate(bounds)]
        x = x + torch.cat(level)
        rope = self.rope(scales)[:, :L]
        for i, (block, condition) in enumerate(zip(self.blocks, self.block_conditions(cond, memory))):
            branch_scale = self.branch_scale(i, B, x.device, generator)
            x = vq.recompute(self.checkpointing, block, x, condition, rope, text_mask, bounds=bounds,
                             branch_scale=branch_scale)
        return self.logits(x, self.head_modulation(cond))

    def branch_scale(self, i, B, device, generator):
        """Stochastic depth: factors (2, B, 1, 1) of both gated branches of block i, or None in eval mode. A factor is 0
        for some pictures and above 1 for the others, so that the mean stays. Deeper blocks lose branches more often."""
        keep = 1 - self.config.drop_path * i / max(self.config.depth - 1, 1)
        if not self.training or keep >= 1:
            return None
        return (torch.rand(2, B, 1, 1, generator=generator, device=device) < keep).float() / keep

    def loss(self, text, text_mask, inputs, labels, scales, *, reweight=False, text_drop=None, generator=None):
        """Mean cross entropy of all bits -> (loss, {bit_accuracy, token_accuracy, scale_accuracy}).

        labels:   (B, L, bits) bool, from `self_correct`; those of scales that have no inputs are ignored
        reweight: give tokens of coarse scales more weight, 1 / sqrt(h w), because there are fewer of them. The authors'
                  training script turns it on; whether the released weights were trained with it is not documented
        """
        if text_drop is None:
            text_drop = self.config.text_drop if self.training else 0.0
        labels = labels[:, :1 + inputs.shape[1]]
        logits = self(text, text_mask, inputs, scales, text_drop=text_drop, generator=generator)
        bit_logits = logits[..., 1] - logits[..., 0]                        # a softmax over two values is a sigmoid
        losses = F.binary_cross_entropy_with_logits(bit_logits, labels.float(), reduction="none").mean((0, 2))  # (L,)
        bounds = scale_bounds(scales, len(losses))
        with torch.no_grad():
            correct = (bit_logits > 0) == labels                            # (B, L, bits)
            metrics = {"bit_accuracy": correct.float().mean(), "token_accuracy": correct.all(-1).float().mean(),
                       "scale_accuracy": torch.stack([correct[:, a:b].float().mean() for a, b in bounds])}
        if not reweight:
            return losses.mean(), metrics
        weights = torch.cat([losses.new_full((b - a,), (b - a) ** -0.5) for a, b in bounds])
        return (losses * weights).sum() / weights.sum(), metrics

    # sampling

    @torch.no_grad()
    def sample(self, tokenizer, text, text_mask=None, *, scales, cfg=3.0, tau=0.5, top_k=0, top_p=0.97, negative=None,
               guide_after=None, generator=None, given_bits=None, keep_scales=0, all_scales=False, tile=0,
               on_step=None):
        """Draws pictures -> (B, 3, height, width) float32 in [0, 1], or with all_scales=True a list, one per scale.

        tokenizer:    the VQVAE, on the same device
        text, text_mask: (B, T, Ct) features of the prompts; (B, T) bool, False for padding, or None: no padding
        scales:       (h, w) of every scale, from `vq.schedule(aspect, pixels)`
        cfg:          guidance. Logits are cfg * cond + (1 - cfg) * uncond, so 1 means none (where VAR writes 0); a
                      number, or one per scale. The authors take 3 or 4, and 1 for close-ups of faces
        tau:          temperature, below 1 for cleaner pictures; a number, or one per scale
        top_k, top_p: filters over the two values of a bit, see `draw_bits`; top_k=1 always takes the likelier value
        negative:     a prompt to stay away from, instead of the null text: features (1 or B, T', Ct), mask or None
        guide_after:  apply guidance to the features after that block (-1: the last), or after each block of a list,
                      instead of the logits
        generator:    a torch.Generator on the model's device, consumed exactly as by the original; or a list of B, one
                      per picture, so that no picture depends on its batch; None: torch's global one
        given_bits, keep_scales: for variations of a picture. Its bits, `tokenizer.tokenize(image, tokenizer_scales(
                      scales, patchify))`, replace those drawn at the first keep_scales scales. Layout and colors stay,
                      details change. Noise is drawn for these scales too, so later scales see the same noise as without
        tile:         decode in overlapping tiles of that many cells, see `vq.VQVAE.decode_tiled`; 0: at once
        on_step:      called with a Step after every scale
        Raises ValueError for settings that do not fit the model, the schedule or each other.
        """
        self.check_pair(tokenizer)
        if (given_bits is None) != (keep_scales == 0):
            raise ValueError("given_bits and keep_scales go together: the bits, and for how many scales to keep them")
        config = self.config
        device = self.pos_start.device
        quantizer = tokenizer.quantize
        scales = tuple(map(tuple, scales))
        sizes = tokenizer_scales(scales, config.patchify)
        B = len(text)
        K = len(scales)
        cfg, tau = per_scale(cfg, K, "cfg"), per_scale(tau, K, "tau")
        if min(tau) <= 0:
            raise ValueError(f"tau must be above 0, not {min(tau)}: top_k=1 takes the likelier value of every bit")
        guided_blocks = [guide_after] if isinstance(guide_after, int) else list(guide_after or ())
        for block in guided_blocks:
            if not -config.depth <= block < config.depth:
                raise ValueError(f"guide_after is a block, -{config.depth} .. {config.depth - 1}, not {block}")
        guided = any(c != 1 for c in cfg)
        text = text.to(device)
        if guided:
            text, text_mask = self.with_unconditional(text, text_mask, negative)
        cond, memory, text_mask = self.read_text(text, None if text_mask is None else text_mask.to(device))
        modulation, text_k, text_v = map(torch.stack, zip(*self.block_conditions(cond, memory)))
        condition = Condition(modulation, text_k, text_v, text_mask, self.head_modulation(cond))
        kv_cache = self.new_kv_cache(len(text), sum(h * w for h, w in scales))
        rope = self.rope(scales)                                            # (2, L, D / 2)

        x = cond[:, None] + self.pos_start                                  # (R, 1, C), the input of the first scale
        f_hat = cond.new_zeros(B, tokenizer.config.z_channels, *sizes[-1])
        f_hats = []
        pos = 0
        for k, (h, w) in enumerate(scales):                                 # coarse to fine
            guide_logits = cfg[k] != 1 and not guided_blocks
            guide_features = (tuple(guided_blocks), cfg[k]) if cfg[k] != 1 and guided_blocks else None
            logits = self.forward_scale(x, k, pos, rope[:, pos:pos + h * w], kv_cache, condition,
                                        rows=2 * B if guide_logits else B, guide_features=guide_features)
            logits = logits / tau[k]
            if guide_logits:
                logits = cfg[k] * logits[:B] + (1 - cfg[k]) * logits[B:]    # (B, l, bits, 2)

            noise = exponential_noise((B, h * w * config.bits, 2), generator, device)
            bits = draw_bits(logits, noise, top_k, top_p)                   # (B, l, bits)
            if config.patchify:
                bits = unfold(bits, (h, w))                                 # (B, 2h * 2w, d)
            if k < keep_scales:
                bits = given_bits[k]

            codes = quantizer.embed(bits, sizes[k])                         # (B, d, h, w)
            f_hat = f_hat + quantizer.contribution(codes, k, K, sizes[-1])
            if all_scales or k + 1 == K:
                f_hats.append(f_hat)
            if on_step is not None:
                on_step(Step(k, logits, bits, f_hat))
            if k + 1 < K:
                next_input = quantizer.next_input(f_hat, k + 1, sizes)
                if config.patchify:
                    next_input = fold(next_input, scales[k + 1])
                x = self.word_embed(next_input).repeat(len(text) // B, 1, 1)        # both halves see the same picture
            pos += h * w
        del kv_cache, condition, x, logits, noise                           # large: free them before decoding
        images = []
        for f_hat in f_hats:
            image = tokenizer.decode_tiled(f_hat, tile) if tile else tokenizer.decode(f_hat)
            images.append(image.add(1).mul(0.5))
        return images if all_scales else images[0]

    def new_kv_cache(self, rows, length):
        """An empty cache (depth, 2, R, H, L, D) for the keys and values of all scales."""
        c = self.config
        return self.blocks[0].ffn.fc1.weight.new_empty(c.depth, 2, rows, c.heads, length, c.width // c.heads)

    def forward_scale(self, x, k, pos, rope, kv_cache, condition, *, rows, guide_features=None):
        """Input of scale k (R, l, C) -> logits (rows, l, bits, 2). Adds its keys and values to the cache, behind pos.

        rope: (2, l, D / 2) of these tokens. rows: R, or B for the conditional half only. guide_features: None, or
        (indices of blocks, cfg) to guide the features behind these blocks. The CPU never waits for the GPU, so
        lib/graphs.py can capture this method in a CUDA graph.
        """
        blocks, cfg = guide_features or ((), 1.0)
        guided = [i % len(self.blocks) for i in blocks]
        x = x + self.level_embed.weight[k]
        for i, block in enumerate(self.blocks):
            block_condition = condition.modulation[i], condition.text_k[i], condition.text_v[i]
            x = block(x, block_condition, rope, condition.text_mask, kv_cache=kv_cache[i], pos=pos)
            if i in guided:
                cond_x, uncond_x = x.chunk(2)
                x = (cfg * cond_x + (1 - cfg) * uncond_x).repeat(2, 1, 1)
        return self.logits(x[:rows], condition.head[:, :rows])              # rows = B drops the unconditional half

    def with_unconditional(self, text, text_mask, negative):
        """Text (B, T, Ct) and mask of the prompts -> text and mask of all 2B rows. The second half is the negative
        prompt, (features, mask) of one picture or of all B; without one, the null text, as long as the prompts."""
        B, T = text.shape[:2]
        if negative is None:
            null = self.null_rows(T).expand(B, -1, -1)
            return torch.cat([text, null]), None if text_mask is None else text_mask.repeat(2, 1)
        longest = max(T, negative[0].shape[1])

        def padded(features, mask):
            missing = longest - features.shape[1]
            mask = torch.ones(features.shape[:2], dtype=torch.bool) if mask is None else mask
            features = F.pad(features.to(text), (0, 0, 0, missing))
            return features.expand(B, -1, -1), F.pad(mask.to(text.device), (0, missing)).expand(B, -1)
        text, text_mask = padded(text, text_mask)
        null, null_mask = padded(*negative)
        return torch.cat([text, null]), torch.cat([text_mask, null_mask])

    def check_pair(self, tokenizer):
        """Raises ValueError unless the tokenizer is of the kind that this model was trained with."""
        d = tokenizer.config.z_channels
        wanted = self.config.bits // (4 if self.config.patchify else 1)
        if tokenizer.config.vocab_size or d != wanted:
            kind = "codes" if tokenizer.config.vocab_size else f"{d} bits"
            raise ValueError(f"the tokenizer has tokens of {kind}, but this model needs {wanted} bits")

    # initialisation

    @torch.no_grad()
    def init_weights(self, init_gamma=5e-6, generator=None):
        """The authors' initialisation. init_gamma scales the gates in the table of each block."""
        c = self.config
        std = math.sqrt(1 / (3 * c.width))
        for name, p in self.named_parameters():
            if name.startswith("text_encoder"):
                continue
            if name.endswith("bias"):
                p.zero_()
            elif "norm" in name:
                p.fill_(1)
            elif name.endswith("log_scale"):
                p.fill_(math.log(4))
            elif name.endswith("adaln_table"):
                p.normal_(0, c.width ** -0.5, generator=generator)
                p[:, :, :2] *= init_gamma                                   # gates
                p[:, :, 2:] *= 1e-3                                         # scales and shifts
            elif name == "null_text":
                nn.init.trunc_normal_(p, std=1.2 * c.text_width ** -0.5, generator=generator)
            else:
                nn.init.trunc_normal_(p, std=std, generator=generator)
        self.head.weight *= 0.02
        self.head_adaln.weight *= 1e-3
        for block in self.blocks:
            for linear in (block.attn.proj, block.cross.proj, block.ffn.fc2):
                linear.weight /= math.sqrt(2 * c.depth)
        if self.text_encoder is not None:
            self.text_encoder.init_weights(generator)


# ----------------------------------------------------------------------------------------------------------------------
# Loading

RENAMES = [     # fragment of an official key, fragment of our key
    ("cfg_uncond", "null_text"), ("text_proj_for_sos.ca.mat_q", "text_pool.query"),
    ("text_proj_for_sos.ca.mat_kv", "text_pool.kv"), ("text_proj_for_sos.ca", "text_pool"),
    ("text_proj_for_ca.0", "text_in"), ("text_proj_for_ca.2", "text_out"), ("lvl_embed", "level_embed"),
    ("shared_ada_lin.1", "shared_adaln"), ("head_nm.ada_lin.1", "head_adaln"), ("ada_gss", "adaln_table"),
    ("sa.mat_qkv", "attn.qkv"), ("sa.scale_mul_1H11", "attn.log_scale"), ("sa", "attn"),
    ("ca.mat_q", "cross.q"), ("ca.mat_kv", "cross.kv"), ("ca", "cross"), ("ca_norm", "cross_norm"),
]
# Official buffers that follow from the config (export leaves them out); zero_k_bias below is one more
DERIVED = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")
NESTED = (("trainer", "gpt_ema_fsdp"), ("trainer", "gpt_fsdp"), ("trainer", "gpt_wo_ddp"))  # in training checkpoints


def _unchunk(state):
    """Keys block_chunks.{chunk}.module.{i} -> blocks.{n}. Returns the state and the number of chunks."""
    matches = {k: re.match(r"block_chunks\.(\d+)\.module\.(\d+)\.(.*)", k) for k in state}
    chunks = 1 + max((int(m[1]) for m in matches.values() if m), default=0)
    per_chunk = 1 + max((int(m[2]) for m in matches.values() if m), default=0)
    renamed = {}
    for k, v in state.items():
        if m := matches[k]:
            k = f"blocks.{int(m[1]) * per_chunk + int(m[2])}.{m[3]}"
        renamed[k] = v
    return renamed, chunks


def infer_config(state, chunks, patchify=None):
    """The Config of a state dict under our keys. patchify is in no shape: by default it is True for 56 bits (8B)."""
    width, bits = state["word_embed.weight"].shape
    text_maxlen, text_width = state["null_text"].shape
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    return Config(depth=depth, width=width, heads=state["blocks.0.attn.log_scale"].shape[1], bits=bits, chunks=chunks,
                  patchify=bits == 56 if patchify is None else patchify, text_width=text_width,
                  text_maxlen=text_maxlen, levels=len(state["level_embed.weight"]))


def load(path, config=None, patchify=None, dtype=torch.float32, device="cpu", text_encoder=None, weights=None):
    """An Infinity in eval mode from a released file or folder of shards, a training checkpoint, or a file of ours.

    Weights go from the mapped file straight to `device` in their final dtype, see `set_dtype`. config: replaces the
    inferred one. patchify: see `infer_config`. text_encoder: an uninitialised module for the one that a file of ours
    may hold; None leaves it out. weights: see vq.read_checkpoint. Raises vq.CheckpointError.
    """
    what = "an Infinity transformer"
    state, header = vq.read_checkpoint(path, nested=NESTED, weights=weights)
    vq.require(state, "text_proj_for_sos.ca.mat_q", "word_embed.weight", "cfg_uncond", path=path, what=what)
    with vq.understanding(path, what):
        encoder_state = {k: v for k, v in state.items() if k.startswith("text_encoder.")}
        state = {k: v for k, v in state.items() if k not in encoder_state and k not in DERIVED}
        state, chunks = _unchunk({k: v for k, v in state.items() if not k.endswith("zero_k_bias")})
        state = vq.rename_keys(state, RENAMES)
        if config is None:
            config = vq.read_config(Config, header, path, lambda: infer_config(state, chunks, patchify))
        if text_encoder is not None:
            state |= vq.rename_keys(encoder_state, text_encoder.RENAMES)
        vq.check_fit(vq.on_meta(Infinity, config, text_encoder), state, path)
        model = vq.build_on(device, Infinity, config, text_encoder, cast=lambda model: set_dtype(model, dtype))
        vq.load_strict(model, state, path)
    model.origin = header.origin
    return model.eval()


def set_dtype(model, dtype):
    """Casts the parameters of the blocks. Text, embeddings, residual stream, logits and f_hat stay in float32."""
    model.blocks.to(dtype)
    return model


def export(model, buffers=True):
    """The official state dict of an Infinity in float32. buffers=False omits the buffers that hold only zeros.

    A text encoder comes along, as `text_encoder.*`, with the keys that its own table RENAMES calls official.
    """
    state = {k: v.float().contiguous() for k, v in model.state_dict().items()}
    encoder_state = {k: v for k, v in state.items() if k.startswith("text_encoder.")}
    state = {k: v for k, v in state.items() if k not in encoder_state}
    c = model.config
    official = {}
    for k, v in vq.rename_keys(state, RENAMES, inverse=True).items():
        if (m := re.match(r"blocks\.(\d+)\.(.*)", k)) and c.chunks > 1:
            chunk, i = divmod(int(m[1]), max(c.depth // c.chunks, 1))
            k = f"block_chunks.{chunk}.module.{i}.{m[2]}"
        official[k] = v
    if buffers:
        biases = [k for k in official if re.search(r"\.(sa|ca)\.v_bias$", k)]
        official |= {k.replace("v_bias", "zero_k_bias"): torch.zeros(c.width) for k in biases}
    if encoder_state:
        official |= vq.rename_keys(encoder_state, model.text_encoder.RENAMES, inverse=True)
    return official


def save(model, path, dtype=None, **extra):
    """Writes an Infinity as safetensors with official keys, in dtype; the header holds the config and `extra`."""
    vq.save_checkpoint(path, export(model, buffers=False), model.config, dtype, **extra)
