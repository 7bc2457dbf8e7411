"""LlamaGen: class or text -> image by next-token prediction. Full definition of the model, all of it in this file.

The claim of the paper is that pictures need no special model: a plain Llama, trained as on text, draws as well as
diffusion models do if the tokenizer is good. The tokenizer (vq.py, single scale) turns a picture of G x G patches, of
16 x 16 pixels each, into one index per patch. Read row by row they are a sequence of N = G * G tokens, and drawing a
picture means sampling that sequence:

    class c --> a row of a table --> 1 slot          text features (B, 120, Ct) --> two-layer MLP --> 120 slots
                      |                                                                 |
    positions      slot ... slot | token 0    token 1    ...    token N-2               T slots, then the picture
                      |              |           |                  |
    transformer    every position sees itself and all before it
                      |              |           |                  |
    logits         token 0        token 1     token 2    ...    token N-1               V each

    tokens (B, N) -> codebook rows (B, 8, G, G) -> decoder -> image

How it differs from the Llama of text:
- RoPE is two-dimensional: the first half of a head's pairs is rotated by the row of a token, the second half by its
  column. A model knows the rows and columns of its training only, so it draws pictures of one size.
- The condition stands in front as T slots, 1 for a class, 120 for a text. Texts are padded on the left, so that the
  last word is next to the picture. The rotation table of the slots is zero, not the identity: their q and k vanish, so
  every score that involves a slot is 0. Softmax turns that into a weight of exp(0) = 1 before normalisation, not into
  no weight: all slots share one weight, and the condition enters as a mean of v. Probably unintended, but the
  released weights were trained this way.
- Padding is hidden from all other positions, in training and in sampling. A padded position still sees itself, because
  its softmax would have nothing to sum otherwise.
- Classifier-free guidance uses a second row per picture, with the null class or the null text. A null text fills all
  slots and takes over the padding mask of its prompt. Logits are u + cfg (c - u), where c has the condition and u the
  null one. `cfg_interval` ends guidance after cfg_interval + 2 tokens.
Everything else is Llama: RMSNorm before each branch, SwiGLU, no biases, untied embedding and output. Generation is one
prefill of the slots and N - 1 steps of one token each. Every step appends keys and values to a cache and reads every
weight once, so for one or two pictures at a time memory bandwidth is the limit.

Letters: B batch, R rows (2B with guidance, else B), T condition slots, N tokens of a picture, L = T + N, l tokens of
one call, C width, H heads, D head dim, V codebook size, G side of the token map, Ct text width. Paper: Autoregressive
Model Beats Diffusion, arXiv 2406.06525. Released weights, repository FoundationVision/LlamaGen: c2i_B_256.pt,
c2i_B_384.pt 111 M parameters, c2i_L_256.pt, c2i_L_384.pt 343 M, c2i_XL_384.pt 775 M, c2i_XXL_384.pt 1.4 B,
c2i_3B_384.pt 3.1 B, with vq_ds16_c2i.pt. Repository peizesun/llamagen_t2i: t2i_XL_stage1_256.pt, t2i_XL_stage2_512.pt
778 M, with vq_ds16_t2i.pt and the features of Flan-T5-XL. The last number in a name is the side of the pictures.

    tokenizer, model = vq.load("vq_ds16_c2i.pt"), llamagen.load("c2i_L_384.pt")
    images = model.sample(tokenizer, torch.tensor([207, 360]), cfg=4, top_k=2000,
                          generator=torch.Generator().manual_seed(0))       # (2, 3, 384, 384) in [0, 1]
"""
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import vq
from triton_ops import adaln_modulate, decode_attention, exponential_noise, qk_norm_rope, sample_logits


@dataclass(frozen=True)
class Config:
    """Sizes of a LlamaGen. `infer_config` reads most of them from a released file."""

    depth: int = 12
    width: int = 768                            # C
    heads: int = 12                             # H
    kv_heads: int = 0                           # heads of k and v, each shared by H / kv_heads heads of q. 0: H heads
    hidden: int = 2048                          # width inside the feed-forward
    side: int = 16                              # G
    vocab_size: int = 16384                     # V
    num_classes: int = 1000                     # class `num_classes` is the null class. 0: text instead of classes
    text_width: int = 0                         # Ct. 0: classes instead of text
    text_slots: int = 120
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    cond_drop: float = 0.1                      # share of conditions replaced by the null one in training
    dropout: float = 0.1                        # in training, of the embeddings and of both branches
    drop_path: float = 0.0                      # rate of the last block. If it is not 0, branches have no dropout

    @property
    def slots(self):
        """T, the number of positions before the picture."""
        return self.text_slots if self.text_width else 1


# hidden is 8/3 of the width, rounded up to a multiple of 256: three matrices then cost as much as two of 4 C
_B = Config()
_L = Config(depth=24, width=1024, heads=16, hidden=2816)
_XL = Config(depth=36, width=1280, heads=20, hidden=3584)
CONFIGS = {
    "c2i_B_256": _B,
    "c2i_B_384": replace(_B, side=24),
    "c2i_L_256": _L,
    "c2i_L_384": replace(_L, side=24),
    "c2i_XL_384": replace(_XL, side=24),
    "c2i_XXL_384": Config(depth=48, width=1536, heads=24, hidden=4096, side=24),
    "c2i_3B_384": Config(depth=24, width=3200, heads=32, hidden=8704, side=24),     # D = 100, the others have 64
    "t2i_XL_stage1_256": replace(_XL, num_classes=0, text_width=2048),
    "t2i_XL_stage2_512": replace(_XL, num_classes=0, text_width=2048, side=32),
    "emoji_llamagen": Config(depth=6, width=192, heads=6, hidden=512, side=8, vocab_size=4096, num_classes=575),
    "emoji_llamagen_t2i": Config(depth=6, width=192, heads=6, hidden=512, side=8, vocab_size=4096, num_classes=0,
                                 text_width=128, text_slots=32),            # 32 x 32 pixels, both trained in demo/
}
# Sizes by their own names, for random weights
CONFIGS["llamagen_B"] = CONFIGS["c2i_B_256"]
CONFIGS |= {f"llamagen_{size}": CONFIGS[f"c2i_{size}_384"] for size in ("L", "XL", "XXL", "3B")}


def left_pad(rows, slots=120):
    """Pads text features, a list of B (n, Ct), on the left -> features (B, slots, Ct) and mask (B, slots) bool.

    Padding is zero in the features and False in the mask. Only the first `slots` rows of a longer text are used.
    """
    rows = [row[:slots] for row in rows]
    text = torch.stack([F.pad(row, (0, 0, slots - len(row), 0)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(slots) >= slots - lengths[:, None]
    return text, mask.to(text.device)


# ----------------------------------------------------------------------------------------------------------------------
# Building blocks


def rope_table(config, device=None):
    """2D RoPE: cos and sin (2, L, D / 2) of all positions, zero for the condition slots (see above).

    The token at row r, column c has the angles r * f_j, then c * f_j; D / 4 frequencies fall from 1 to about 1 / base.
    """
    D = config.width // config.heads
    G = config.side
    frequency = config.rope_base ** (-torch.arange(0, D // 2, 2, device=device, dtype=torch.float32) / (D // 2))
    index = torch.arange(G, device=device, dtype=torch.float32)
    grid = torch.cartesian_prod(index, index)                               # (N, 2): row and column, in raster order
    angles = (grid[:, :, None] * frequency).flatten(1)                      # (N, D / 2)
    return F.pad(torch.stack([angles.cos(), angles.sin()]), (0, 0, config.slots, 0))


class Attention(nn.Module):
    """Multi-head attention to all earlier positions."""

    def __init__(self, config):
        super().__init__()
        C = config.width
        self.heads = config.heads
        self.kv_heads = config.kv_heads or config.heads
        rows = (self.heads + 2 * self.kv_heads) * (C // self.heads)         # q, k, v, each head-major
        self.qkv = nn.Linear(C, rows, bias=False)
        self.proj = nn.Linear(C, C, bias=False)

    def forward(self, x, rope, mask=None, kv_cache=None, pos=None):
        """x (B, l, C) -> (B, l, C). rope: cos and sin (2, l, D / 2).

        pos None: x is a whole sequence. mask (B, 1, l, l) bool: True where a row may look at a column; None: causal.
        The keys and values are written to the start of kv_cache (2, B, Hkv, L, D), if there is one.
        pos an int, or an int tensor of one element on the device: x is the token of that position, l = 1. Its key and
        value are written to the cache, and it sees the cache up to itself. mask (B, L) bool: False hides a cache row.
        """
        qkv = self.qkv(x).unflatten(-1, (self.heads + 2 * self.kv_heads, -1))           # (B, l, H + 2 Hkv, D)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 2)
        k_cache, v_cache = kv_cache if kv_cache is not None else (None, None)
        q, k, v = qk_norm_rope(q, k, v, l2norm=False, cos=rope[0], sin=rope[1], k_cache=k_cache, v_cache=v_cache,
                               pos=0 if pos is None else pos)               # (B, H or Hkv, l, D)
        if pos is not None:
            out = decode_attention(q, k_cache, v_cache, pos, visible=mask)  # (B, H, 1, D)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                                 enable_gqa=self.heads != self.kv_heads)
        return self.proj(rearrange(out, "b h l d -> b l (h d)"))


class FeedForward(nn.Module):
    """SwiGLU: fc2(silu(w1 x) * (w3 x)). fc1 holds w1 and w3, so that x is read once."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.width, 2 * config.hidden, bias=False)   # rows: w1, w3
        self.fc2 = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x):
        gate, value = self.fc1(x).chunk(2, -1)
        return self.fc2(F.silu(gate) * value)


class Block(nn.Module):
    """One Llama block: x = x + attention(norm1(x)), then x = x + feed_forward(norm2(x)).

    The second sum is left to the next norm, which then reads and writes x once. A block therefore takes and returns x
    and the branch that is still to be added to it.
    """

    def __init__(self, config, drop_path):
        super().__init__()
        self.attn = Attention(config)
        self.ffn = FeedForward(config)
        self.norm1 = nn.RMSNorm(config.width, config.norm_eps)
        self.norm2 = nn.RMSNorm(config.width, config.norm_eps)
        self.drop_path = drop_path
        self.dropout = 0.0 if config.drop_path else config.dropout

    def forward(self, x, branch, rope, mask=None, kv_cache=None, pos=None, generator=None):
        """Residual stream x and branch, both (B, l, C) -> the same. The branch is None for the first block."""
        h, x = add_and_norm(x, branch, self.norm1)
        h = self._drop(self.attn(h, rope, mask, kv_cache, pos), generator)
        h, x = add_and_norm(x, h, self.norm2)
        return x, self._drop(self.ffn(h), generator)

    def _drop(self, branch, generator):
        """In training: dropout, or stochastic depth, which removes the whole branch for some pictures."""
        if not self.training:
            return branch
        return dropout(dropout(branch, self.dropout, generator), self.drop_path, generator, per_picture=True)


def add_and_norm(x, branch, norm):
    """Residual stream x, branch or None (B, l, C) -> norm(x + branch), x + branch. The normalised values are float32,
    rounded to the dtype of the weight, then multiplied by the weight, as in the original."""
    if branch is None:
        return adaln_modulate(x, None, None, norm.eps, kind="rms", weight=norm.weight), x
    return adaln_modulate(branch, None, None, norm.eps, kind="rms", weight=norm.weight, residual=x)


def dropout(x, share, generator, per_picture=False):
    """Sets a share of the numbers, or of the pictures, of x (B, l, C) to zero and scales the others up."""
    if share == 0:
        return x
    kept = x.new_empty((len(x), 1, 1) if per_picture else x.shape).bernoulli_(1 - share, generator=generator)
    return x * kept / (1 - share)                   # a division, because 1 / 0.9 is not representable in bfloat16


# ----------------------------------------------------------------------------------------------------------------------
# The model


class Step(NamedTuple):
    """What `LlamaGen.generate` passes to on_step after token i. Clone logits to keep them: a model replayed as a CUDA
    graph overwrites them at the next token."""

    i: int
    tokens: torch.Tensor        # (B,)
    logits: torch.Tensor        # (R, V) before guidance and filters. Rows with the condition come first


class LlamaGen(nn.Module):
    """The transformer. Methods take the tokenizer, and features of text, as arguments.

    text_encoder: a module that is trained with the model and saved in the same file (demo). Only init_weights calls it.
    """

    def __init__(self, config, text_encoder=None):
        super().__init__()
        self.config = config
        self.text_encoder = text_encoder
        self.checkpointing = False
        C = config.width
        if config.text_width:
            self.text_fc1 = nn.Linear(config.text_width, C, bias=False)
            self.text_fc2 = nn.Linear(C, C, bias=False)
            # The null text is random and never trained. It is a buffer that must come from the file.
            self.register_buffer("null_text", torch.zeros(config.text_slots, config.text_width))
        else:
            self.class_embed = nn.Embedding(config.num_classes + 1, C)      # last row: the null class
        self.token_embed = nn.Embedding(config.vocab_size, C)
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.RMSNorm(C, config.norm_eps)
        self.head = nn.Linear(C, config.vocab_size, bias=False)

    # pieces that training and sampling share

    def embed_condition(self, cond):
        """Labels (B,) or text features (B, T, Ct) -> slots (B, T, C)."""
        if not self.config.text_width:
            return self.class_embed(cond)[:, None]
        hidden = F.gelu(self.text_fc1(cond.to(self.text_fc1.weight.dtype)), approximate="tanh")
        return self.text_fc2(hidden)

    def null_condition(self, cond):
        """The null class or null text, in the shape of cond."""
        if self.config.text_width:
            return self.null_text.to(cond.dtype).expand_as(cond)
        return torch.full_like(cond, self.config.num_classes)

    def attention_mask(self, text_mask, length):
        """Text mask (B, T) bool or None -> which of the first `length` positions see which: (B, 1, length, length)
        bool, or None where each sees all before it."""
        if text_mask is None:
            return None
        position = torch.arange(length, device=text_mask.device)
        visible = F.pad(text_mask, (0, length - text_mask.shape[1]), value=True)[:, None]       # (B, 1, length) keys
        causal = position[:, None] >= position
        itself = position[:, None] == position
        return ((causal & visible) | itself)[:, None]

    def logits(self, x, branch):
        """Residual stream and last branch (B, l, C) -> (B, l, V) float32."""
        return self.head(add_and_norm(x, branch, self.norm)[0]).float()

    # training

    def stream(self, cond, tokens, text_mask=None, cond_drop=0.0, generator=None):
        """Takes forward's arguments. Returns residual stream and last branch (B, T + n, C), including the slots."""
        self.check_condition(cond, text_mask)
        if cond_drop:
            dropped = torch.rand(len(cond), generator=generator, device=cond.device) < cond_drop
            cond = torch.where(dropped.view(-1, *[1] * (cond.dim() - 1)), self.null_condition(cond), cond)
        x = torch.cat([self.embed_condition(cond), self.token_embed(tokens)], 1)        # (B, T + n, C)
        x = dropout(x, self.config.dropout if self.training else 0.0, generator)
        rope = rope_table(self.config, x.device)[:, :x.shape[1]]
        mask = self.attention_mask(text_mask, x.shape[1])
        branch = None
        for block in self.blocks:
            x, branch = vq.recompute(self.checkpointing, block, x, branch, rope, mask, generator=generator)
        return x, branch

    def forward(self, cond, tokens, text_mask=None, cond_drop=0.0, generator=None):
        """Teacher-forced logits.

        cond:      (B,) classes, 0 .. num_classes, or text features (B, T, Ct) from `left_pad`
        tokens:    (B, n) true tokens in raster order, without the last
        text_mask: (B, T) bool, False for padding of the text; None: no padding
        cond_drop: share of conditions replaced by the null one; generator gives one uniform number per picture
        returns    (B, n + 1, V) float32; row i predicts token i
        """
        x, branch = self.stream(cond, tokens, text_mask, cond_drop, generator)
        start = self.config.slots - 1                                       # the last slot predicts token 0
        return self.logits(x[:, start:], branch[:, start:])

    def loss(self, cond, tokens, text_mask=None, *, valid=None, cond_drop=None, generator=None):
        """Cross entropy of all N tokens (B, N), mean over the batch -> (loss, {accuracy}).

        valid: (B,), 0 for pictures that must not count, such as unreadable ones. cond_drop: by default that of the
        config in training, and 0 in eval mode.
        """
        if cond_drop is None:
            cond_drop = self.config.cond_drop if self.training else 0.0
        logits = self(cond, tokens[:, :-1], text_mask, cond_drop, generator)
        losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)      # (B, N)
        correct = (logits.detach().argmax(-1) == tokens).float()
        if valid is None:
            return losses.mean(), {"accuracy": correct.mean()}
        weight = valid.to(losses.dtype)[:, None].expand_as(losses)
        total = weight.sum().clamp(min=1)
        return (losses * weight).sum() / total, {"accuracy": (correct * weight).sum() / total}

    @torch.no_grad()
    def bits_per_token(self, cond, tokens, text_mask=None):
        """-log2 p of each token (B, N) of a given picture, given the tokens before it: (B, N) float32.

        The mean is log2(V) for a model that knows nothing. It is smallest for the class or text that fits best. Raises
        ValueError for tokens of another codebook.
        """
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            raise ValueError(f"tokens {int(tokens.min())} .. {int(tokens.max())}, but the model knows "
                             f"{self.config.vocab_size}: they are of another codebook")
        log_p = self(cond, tokens[:, :-1], text_mask).log_softmax(-1)
        return -log_p.gather(-1, tokens[..., None])[..., 0] / math.log(2)

    def check_condition(self, cond, text_mask):
        """Raises ValueError for conditions of the wrong kind or shape."""
        c = self.config
        if cond.shape[1:] != ((c.text_slots, c.text_width) if c.text_width else ()):
            wanted = f"text features (B, {c.text_slots}, {c.text_width})" if c.text_width else "classes (B,)"
            raise ValueError(f"this model is conditioned on {wanted}, not on a tensor {tuple(cond.shape)}")
        if text_mask is not None and text_mask.shape != (len(cond), c.slots):
            raise ValueError(f"the mask is {tuple(text_mask.shape)}, expected {(len(cond), c.slots)}: one entry per "
                             "slot")

    def check_pair(self, tokenizer):
        """Raises ValueError if the tokenizer cannot be the one of this model."""
        t = tokenizer.config
        V = self.config.vocab_size
        if not t.single_scale or t.vocab_size != V:
            kind = f"{t.vocab_size} codes" if t.single_scale else "tokens of several scales"
            raise ValueError(f"the tokenizer has {kind}, but this model draws maps of {V} codes")

    # sampling

    @torch.no_grad()
    def generate(self, cond, text_mask=None, *, cfg=1.0, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0,
                 generator=None, on_step=None):
        """Draws the tokens of pictures, in raster order -> (B, N) int64.

        cond:         (B,) int64 classes, or text features (B, T, Ct); text_mask: (B, T) bool, see `left_pad`
        cfg:          guidance. Logits are u + cfg (c - u), so 1 or less means none (where VAR writes 0). A number, or
                      a tensor (B,) with one for each picture
        cfg_interval: number of the last guided decode step, from 0. The prefill draws token 0, so cfg_interval + 2
                      tokens are guided. -1: all. Later tokens mostly continue what earlier ones began, and without
                      guidance they take half the work
        temperature:  0 takes the likeliest token
        top_k, top_p: keep the k likeliest tokens, then the fewest likeliest ones whose probabilities sum to at least p.
                      top_k=0, top_p=0 (VAR's default) and top_p=1 (the default here) turn the filter off
        generator:    a torch.Generator on the model's device, consumed exactly as by the original; or a list of B, one
                      per picture, so that no picture depends on its batch; None: torch's global one
        on_step:      called with a Step after every token
        """
        self.check_condition(cond, text_mask)
        config = self.config
        device = self.token_embed.weight.device
        B = len(cond)
        T = config.slots
        N = config.side ** 2
        cond = cond.to(device)
        text_mask = None if text_mask is None or bool(text_mask.all()) else text_mask.to(device)
        cfg = torch.as_tensor(cfg, dtype=torch.float32).clamp(min=1).expand(B)
        guided = bool((cfg > 1).any())
        cfg = cfg.to(device)[:, None]                                       # (B, 1)
        if guided:
            cond = torch.cat([cond, self.null_condition(cond)])             # R rows
            text_mask = None if text_mask is None else text_mask.repeat(2, 1)       # null text, padded like the prompt

        kv_cache = self.new_kv_cache(len(cond))
        rope = rope_table(config, device)                                   # (2, L, D / 2)
        visible = None if text_mask is None else F.pad(text_mask, (0, N), value=True)       # (R, L) rows of the cache
        noise = token_noise((B, config.vocab_size), N, generator, device)
        tokens = []
        logits = self.prefill(cond, text_mask, rope[:, :T], kv_cache)       # (R, V) of token 0
        for i in range(N):
            mixed = torch.lerp(logits[B:], logits[:B], cfg) if guided else logits           # exactly c where cfg is 1
            tokens.append(sample_logits(mixed, temperature=temperature, top_k=top_k, top_p=top_p,
                                        noise=next(noise) if temperature else None))
            if on_step is not None:
                on_step(Step(i, tokens[-1], logits))
            if i + 1 < N:
                if guided and 0 <= cfg_interval < i:                        # B rows are enough from here on
                    guided = False
                    kv_cache = kv_cache[:, :, :B]
                    visible = None if visible is None else visible[:B]
                pos = T + i                                                 # position of the token just drawn
                logits = self.decode_one(tokens[-1], pos, rope[:, pos:pos + 1], kv_cache, visible)
        return torch.stack(tokens, 1)

    def new_kv_cache(self, rows):
        """An empty cache (depth, 2, R, Hkv, L, D) for the keys and values of all positions. It is zero, because rows
        that are still empty may be read with a weight of 0, and 0 times NaN is NaN."""
        c = self.config
        return self.token_embed.weight.new_zeros(c.depth, 2, rows, c.kv_heads or c.heads, c.slots + c.side ** 2,
                                                 c.width // c.heads)

    def prefill(self, cond, text_mask, rope, kv_cache):
        """Conditions (R,) or (R, T, Ct) -> logits (R, V) of token 0. Adds the T slots to the cache."""
        x = self.embed_condition(cond)                                      # (R, T, C)
        branch = None
        mask = self.attention_mask(text_mask, x.shape[1])
        for block, block_cache in zip(self.blocks, kv_cache):
            x, branch = block(x, branch, rope, mask, block_cache)
        return self.logits(x[:, -1:], branch[:, -1:])[:, 0]

    def decode_one(self, tokens, pos, rope, kv_cache, visible=None):
        """Tokens (B,) of position pos -> logits (R, V) of the next ones. Adds the position to the cache.

        pos: an int, or an int tensor of one element on the device, with which one CUDA graph (lib/graphs.py) serves all
        positions. rope: (2, 1, D / 2) of that position. visible: (R, L) bool, False for padding.
        """
        x = self.token_embed(tokens)[:, None]                               # (B, 1, C)
        branch = None
        x = x.repeat(kv_cache.shape[2] // len(tokens), 1, 1)                # both halves have drawn the same tokens
        for block, block_cache in zip(self.blocks, kv_cache):
            x, branch = block(x, branch, rope, visible, block_cache, pos)
        return self.logits(x, branch)[:, 0]

    @torch.no_grad()
    def sample(self, tokenizer, cond, text_mask=None, *, progress_frames=0, size=None, **options):
        """Draws pictures -> (B, 3, h, w) float32 in [0, 1].

        tokenizer:       the VQVAE, on the same device
        cond, text_mask, options: as in `generate`
        progress_frames: return a list of that many frames instead, which show the pictures grow. Cells without a token
                         are grey
        size:            side of the pictures in pixels, if they are to be resized as for the authors' evaluation
        """
        self.check_pair(tokenizer)
        tokens = self.generate(cond, text_mask, **options)                  # (B, N)
        if not progress_frames:
            return self.decode(tokenizer, tokens, size)
        N = tokens.shape[1]
        return [self.decode(tokenizer, tokens[:, :N * k // progress_frames], size)
                for k in range(1, progress_frames + 1)]

    @torch.no_grad()
    def decode(self, tokenizer, tokens, size=None):
        """The first n tokens of pictures (B, n) -> (B, 3, h, w) in [0, 1]. Cells without a token are grey.

        size: as in `sample`.
        """
        G = self.config.side
        n = tokens.shape[1]
        f_hat = tokenizer.quantize.embed(F.pad(tokens, (0, G * G - n)), (G, G))         # (B, 8, G, G)
        drawn = (torch.arange(G * G, device=f_hat.device) < n).view(G, G)
        f_hat = f_hat * drawn
        image = tokenizer.decode_resized(f_hat, size) if size else tokenizer.decode(f_hat)
        drawn = F.interpolate(drawn[None, None].float(), image.shape[2:]) > 0
        return torch.where(drawn, image.add(1).mul(0.5), 0.5)

    # initialisation

    @torch.no_grad()
    def init_weights(self, generator=None):
        """The authors' initialisation: normal with deviation 0.02, and zero for the output matrix, so that the first
        loss is that of a uniform guess, ln V."""
        for name, p in self.named_parameters():
            if name.startswith("text_encoder."):
                continue
            if "norm" in name:
                p.fill_(1)
            else:
                p.normal_(0, 0.02, generator=generator)
        self.head.weight.zero_()
        if self.config.text_width:
            self.null_text.normal_(0, self.config.text_width ** -0.5, generator=generator)
        if self.text_encoder is not None:
            self.text_encoder.init_weights(generator)


def token_noise(shape, n, generator, device, chunk=32):
    """Exp(1) noise (B, V) for each of n draws: argmax of p / noise is a draw from p (`sample_logits`).

    One generator is consumed as by the original, one draw after the other. A list of generators, one per picture, is
    asked for `chunk` draws at a time: this saves launching B small kernels for every token.
    """
    if not isinstance(generator, (list, tuple)):
        for _ in range(n):
            yield exponential_noise(shape, generator, device)
        return
    for start in range(0, n, chunk):
        yield from exponential_noise((shape[0], min(chunk, n - start), *shape[1:]), generator, device).unbind(1)


# ----------------------------------------------------------------------------------------------------------------------
# Loading

RENAMES = [     # fragment of an official key, fragment of our key
    ("tok_embeddings", "token_embed"), ("cls_embedding.embedding_table", "class_embed"),
    ("cls_embedding.cap_proj.fc1", "text_fc1"), ("cls_embedding.cap_proj.fc2", "text_fc2"),
    ("cls_embedding.uncond_embedding", "null_text"), ("layers.{}.attention.wqkv", "blocks.{}.attn.qkv"),
    ("layers.{}.attention.wo", "blocks.{}.attn.proj"), ("layers.{}.attention_norm", "blocks.{}.norm1"),
    ("layers.{}.ffn_norm", "blocks.{}.norm2"), ("layers.{}.feed_forward.w2", "blocks.{}.ffn.fc2"),
    ("layers.{}.feed_forward", "blocks.{}.ffn"), ("output", "head"),
]
GATED = ("fc1", ("w1", "w3"))                                               # our fc1 holds their w1 and w3


def side_of(path, flags, sides):
    """Tokens per side of a checkpoint, which is in no tensor but the position table. Raises vq.CheckpointError.

    Training scripts note image_size and downsample_size among their flags; names of files end in pixels, such as
    c2i_XL_256.pt. sides: those of released models of the same depth and width, to be named in the error.
    """
    stride = flags.get("downsample_size", 16)
    pixels = flags.get("image_size")
    if not isinstance(pixels, int):
        found = re.search(r"(?:^|[_-])(\d{2,4})(?:px)?$", Path(path).stem)
        pixels = int(found[1]) if found else None
    if not isinstance(stride, int) or not pixels or stride < 1 or pixels % stride or not 16 <= pixels <= 4096:
        released = " or ".join(str(16 * side) for side in sorted(sides)) or "16 times the tokens per side"
        raise vq.CheckpointError(f"{path}: neither the file nor its name tells the size of its pictures: give --size, "
                                 f"in pixels ({released}), or side=, in tokens")
    return pixels // stride


def infer_config(state, path, side=None, heads=None, flags=None):
    """The Config of an official state dict, read from its keys and shapes. Raises vq.CheckpointError.

    side: tokens per side. By default it comes from the position table, if the file has one, else see `side_of`. heads:
    by default those of released models with this depth and width; for other sizes D = 64 is assumed. flags: those of
    the training script.
    """
    vocab_size, width = state["tok_embeddings.weight"].shape
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("layers."))
    is_text = "cls_embedding.uncond_embedding" in state
    slots, text_width = state["cls_embedding.uncond_embedding"].shape if is_text else (120, 0)
    same_size = [c for c in CONFIGS.values() if (c.depth, c.width, bool(c.text_width)) == (depth, width, is_text)]
    if side is None and "freqs_cis" in state:                               # the RoPE table, one row per position
        side = math.isqrt(len(state["freqs_cis"]) - (slots if is_text else 1))
    elif side is None:
        side = side_of(path, flags or {}, {c.side for c in same_size})
    heads = heads or (same_size[0].heads if same_size else width // 64)     # 64 wide in all released models but 3B
    if not heads or width % (4 * heads):
        raise vq.CheckpointError(f"{path}: how many heads it has is in no tensor, but llamagen.load takes it as heads=")
    kv_rows = (len(state["layers.0.attention.wqkv.weight"]) - width) // 2   # wqkv has C rows for q, the rest is k and v
    kv_heads = kv_rows // (width // heads)
    classes = 0 if is_text else len(state["cls_embedding.embedding_table.weight"]) - 1
    return Config(depth=depth, width=width, heads=heads, kv_heads=0 if kv_heads == heads else kv_heads,
                  hidden=len(state["layers.0.feed_forward.w1.weight"]), side=side, vocab_size=vocab_size,
                  num_classes=classes, text_width=text_width, text_slots=slots)


def load(path, config=None, side=None, heads=None, dtype=torch.float32, device="cpu", text_encoder=None, weights=None):
    """A LlamaGen in eval mode from a released file, a training checkpoint of the original, or a file of ours.

    Weights go from the mapped file straight to `device` in `dtype`. config: replaces the inferred one. side: tokens per
    side, if not those of the file. heads: for official files, see `infer_config`. text_encoder: an uninitialised module
    for the encoder that a file of ours may hold, loaded in float32; None leaves it out. weights: see
    vq.read_checkpoint. Raises vq.CheckpointError.
    """
    what = "a LlamaGen transformer"
    state, header = vq.read_checkpoint(path, weights=weights)
    vq.require(state, "tok_embeddings.weight", "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight",
               path=path, what=what)
    with vq.understanding(path, what):
        if config is None:
            config = vq.read_config(Config, header, path, lambda: infer_config(state, path, side, heads, header.flags))
        if side is not None and side != config.side:
            config = replace(config, side=side)
        encoder_state = {k: v for k, v in state.items() if k.startswith("text_encoder.")}
        state = {k: v for k, v in state.items() if not k.startswith(("freqs_cis", "text_encoder."))}
        state = vq.join_rows(vq.rename_keys(state, RENAMES), *GATED)
        if text_encoder is not None:
            state |= encoder_state
        vq.check_fit(vq.on_meta(LlamaGen, config, text_encoder), state, path)
        model = vq.build_on(device, LlamaGen, config, text_encoder, cast=lambda model: set_dtype(model, dtype))
        vq.load_strict(model, state, path)
    model.origin = header.origin
    return model.eval()


def set_dtype(model, dtype):
    """Casts all weights except those of a text encoder, and with them the residual stream, as the original does. Norms,
    rotations, and everything after the logits are still computed in float32."""
    for name, child in model.named_children():
        if name != "text_encoder":
            child.to(dtype)
    return model


def export(model):
    """The official state dict of a LlamaGen, in float32, without a text encoder."""
    state = {k: v.float().contiguous() for k, v in model.state_dict().items() if not k.startswith("text_encoder.")}
    return vq.rename_keys(vq.split_rows(state, *GATED), RENAMES, inverse=True)


def save(model, path, dtype=None, **extra):
    """Writes a LlamaGen as safetensors with official keys (and `text_encoder.*`), in dtype; the header holds the config
    and `extra`."""
    text_encoder = {k: v for k, v in model.state_dict().items() if k.startswith("text_encoder.")}
    vq.save_checkpoint(path, export(model) | text_encoder, model.config, dtype, **extra)
