"""Infinity: text -> image by next-scale prediction of bits. Full definition of the model, all of it in this one file.

Like VAR, a transformer draws a picture resolution by resolution, from one token to 64 x 64 and more, all tokens of a
resolution at once. But a token is d bits (d = 16 ... 64), the signs of d channels, so the vocabulary has 2^d entries.
No softmax could span it: the head is d independent two-way classifiers (the paper's infinite-vocabulary classifier).

    prompt --> T5 --> text (T, 2048) --+--> pooled: one vector, the first token and the condition of every AdaLN
                                       +--> memory: k and v of every cross-attention, computed once
                    scale 0         scale 1              scale 2                   scale 12
    inputs          pooled + start  word(f_hat 2x2)      word(f_hat 4x4)    ...    word(f_hat 64x64)   + level
                         |               |                    |                         |
    transformer     sees 1 token    sees 1 + 4           sees 1 + 4 + 16           sees all 10,521         block-causal
                         |               |                    |                         |
    logits          1 x d x 2       4 x d x 2            16 x d x 2                4096 x d x 2

    bits -> codes +-1/sqrt(d) -> grown bilinearly, added to f_hat, the picture so far; f_hat resized is the next input

How it differs from VAR (var.py), besides the bits:
- *bitwise self-correction*: training flips random bits of every scale and computes the targets of the finer ones
  against the flipped picture, so the model learns to repair what it drew wrong. See `self_correct`;
- the condition is text: pooled into AdaLN, and attended to by a cross-attention between attention and feed-forward;
- pictures have any aspect ratio and several sizes: schedules come from `vq.schedule`, positions are 2D RoPE on the grid
  of the full resolution, so that the same place has the same angle at every scale and size, and no table is learned;
- guidance and temperature may differ from scale to scale, guidance may act on features instead of logits;
- one AdaLN map is shared by all blocks, each adding a table of its own.
With patchify a token is four neighbours' bits: 14 bits of a map twice as large become D = 56 (8B).

Letters: B batch, R rows (2B with guidance, else B), L tokens of all scales, l tokens of one scale, T text tokens, C
width, Ct text width, H heads, d bits of a tokenizer token, D bits of a transformer token (but inside of attention, as
everywhere, the width of a head), K scales, h w token-map size; the first scale has one token.
Paper: Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image Synthesis, arXiv 2412.04431. Released
weights, repository FoundationVision/Infinity: infinity_125M_256x256.pth (tokenizer d16, 0.06M pixels),
infinity_2b_reg.pth (tokenizer d32reg, 1M), the folders infinity_8b_weights (tokenizer d56_f8_14_patchify, 1M) and
infinity_8b_512x512_weights (0.25M); all with the encoder of google/flan-t5-xl, which stands here too.

    tokenizer, model = vq.load("infinity_vae_d32reg.pth"), infinity.load("infinity_2b_reg.pth")
    text, mask = infinity.load_t5("flan-t5-xl").encode(["a red fox in the snow"])
    images = model.sample(tokenizer, text, mask, scales=vq.schedule(aspect=1.0, pixels="1M"), cfg=3, tau=0.5,
                          generator=torch.Generator().manual_seed(0))       # (1, 3, 1024, 1024) in [0, 1]
"""
import itertools
import math
import re
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import vq
from triton_ops import adaln_modulate, exponential_noise, qk_norm_rope


@dataclass(frozen=True)
class Config:
    """Sizes of an Infinity. Released files tell all but patchify, norm_eps, text_drop and drop_path."""

    depth: int = 32
    width: int = 2048                           # C
    heads: int = 16                             # H
    bits: int = 32                              # D
    patchify: bool = False                      # a token is 2 x 2 of the tokenizer's: D = 4 d
    text_width: int = 2048                      # Ct, a multiple of 128
    text_maxlen: int = 512                      # rows of the null text
    levels: int = 15                            # rows of the level embedding, at least K
    chunks: int = 8                             # in official keys the blocks stand in so many groups
    norm_eps: float = 1e-6
    text_drop: float = 0.1                      # share of prompts replaced by the null text in training
    drop_path: float = 0.1                      # of the last block; grows linearly from 0 at the first

    @property
    def hidden(self):
        """Width inside the feed-forward: 4 C to the nearest multiple of 256, halves to the even one."""
        return round(4 * self.width / 256) * 256


CONFIGS = {
    "infinity_125M": Config(depth=12, width=768, heads=8, bits=16, chunks=4),
    "infinity_2b": Config(),
    "infinity_8b": Config(depth=40, width=3584, heads=28, bits=56, patchify=True),
    "emoji_infinity": Config(depth=6, width=192, heads=3, bits=16, text_width=128, text_maxlen=64, chunks=1,
                             drop_path=0.025),                              # 32 x 32 pixels, trained in demo/
}


# ----------------------------------------------------------------------------------------------------------------------
# Text: the encoder of Flan-T5


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 encoder (version 1.1, gated GELU). Files tell all but max_distance and eps."""

    vocab_size: int = 32128
    width: int = 2048                           # Ct; these are Flan-T5-XL's
    layers: int = 24
    heads: int = 32
    head_dim: int = 64                          # heads * head_dim need not be the width
    hidden: int = 5120
    buckets: int = 32                           # of relative positions
    max_distance: int = 128                     # beyond it all distances share the last bucket
    eps: float = 1e-6


BYTE_T5 = T5Config(vocab_size=259, width=128, layers=3, heads=4, head_dim=32, hidden=256)   # the demo's, on bytes


class T5Attention(nn.Module):
    """Bidirectional attention without biases and without the usual 1 / sqrt(head_dim): T5's weights absorbed it."""

    def __init__(self, config):
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.q, self.k, self.v = (nn.Linear(config.width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.width, bias=False)

    def forward(self, x, bias):                                             # (B, T, Ct), (B or 1, H, T, T)
        q, k, v = (rearrange(f(x), "b t (h d) -> b h t d", h=self.heads) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        return self.o(rearrange(out, "b h t d -> b t (h d)"))


class T5Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), the latter gelu(wi_0 x) * wi_1 x."""

    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(config.width, config.eps) for _ in range(2))
        self.attn = T5Attention(config)
        self.wi_0, self.wi_1 = (nn.Linear(config.width, config.hidden, bias=False) for _ in range(2))
        self.wo = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x, bias):
        dtype = self.wo.weight.dtype                                        # of the products; the stream is float32,
        x = x + self.attn(self.norm1(x).to(dtype), bias)                    # as T5's grows beyond what float16 holds
        h = self.norm2(x).to(dtype)
        return x + self.wo(F.gelu(self.wi_0(h), approximate="tanh") * self.wi_1(h))


class T5Encoder(nn.Module):
    """Token ids -> features. `tokenize` turns prompts into ids: bytes, or what `load_t5` found beside the weights."""

    def __init__(self, config):
        super().__init__()
        self.config, self.tokenize = config, byte_ids
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.relative_bias = nn.Embedding(config.buckets, config.heads)     # of the first layer, used by all
        self.blocks = nn.ModuleList(T5Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.eps)

    def bucket(self, distance):
        """Key position - query position -> bucket: half of them for each sign; of these one for each distance below a
        half of them, then logarithmically wider ones up to max_distance."""
        half = self.config.buckets // 2
        exact, n = half // 2, distance.abs()
        far = (n.clamp(min=1).float() / exact).log() / math.log(self.config.max_distance / exact) * (half - exact)
        far = (exact + far.long()).clamp(max=half - 1)
        return torch.where(distance > 0, half, 0) + torch.where(n < exact, n, far)

    def forward(self, ids, mask=None):
        """ids (B, T) int64, mask (B, T) bool, False for padding -> features (B, T, Ct) float32."""
        place = torch.arange(ids.shape[1], device=ids.device)
        bias = self.relative_bias(self.bucket(place - place[:, None]))                  # (T, T, H)
        bias = rearrange(bias, "q k h -> 1 h q k")
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None], -math.inf)
        x = self.embed(ids).float()
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)

    def encode(self, prompts, max_length=512):
        """Prompts -> (features (B, T, Ct), mask (B, T) bool or None where no prompt is padded). T: the longest one."""
        device = self.embed.weight.device
        ids, mask = self.tokenize(prompts, max_length)
        mask = None if bool(mask.all()) else mask.to(device)
        return self(ids.to(device), mask), mask

    @torch.no_grad()
    def init_weights(self, generator=None):
        """T5's own rule: normal, of variance 1 / inputs, but q smaller, as nothing divides by sqrt(head_dim)."""
        c = self.config
        for name, p in self.named_parameters():
            if "norm" in name:
                p.fill_(1)
            elif "embed" in name:
                p.normal_(0, 1, generator=generator)
            elif "relative_bias" in name:
                p.normal_(0, c.width ** -0.5, generator=generator)
            else:
                p.normal_(0, (p.shape[1] * (c.head_dim if ".q." in name else 1)) ** -0.5, generator=generator)


def byte_ids(prompts, max_length=512):
    """Tokens without a vocabulary file, as ByT5's: UTF-8 bytes + 3, then 1 for the end; 0 pads -> ids, mask (B, T)."""
    rows = [torch.tensor([b + 3 for b in prompt.encode()[:max_length - 1]] + [1]) for prompt in prompts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, ids != 0


def load_tokenizer(path):
    """The function prompts, max_length -> ids, mask (B, T) of a `tokenizer.json`; needs the package `tokenizers`."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise vq.CheckpointError(f"{path}: to read it, `pip install tokenizers`") from None
    tokenizer = Tokenizer.from_file(str(path))

    def tokenize(prompts, max_length=512):
        tokenizer.enable_truncation(max_length)
        tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
        rows = tokenizer.encode_batch(list(prompts))
        return torch.tensor([row.ids for row in rows]), torch.tensor([row.attention_mask for row in rows]).bool()
    return tokenize


T5_RENAMES = [  # fragment of a key of transformers' T5EncoderModel, of ours
    ("shared", "embed"), ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "relative_bias"),
    ("encoder.block.{}.layer.0.SelfAttention", "blocks.{}.attn"), ("encoder.final_layer_norm", "norm"),
    ("encoder.block.{}.layer.0.layer_norm", "blocks.{}.norm1"),
    ("encoder.block.{}.layer.1.layer_norm", "blocks.{}.norm2"),
    ("encoder.block.{}.layer.1.DenseReluDense", "blocks.{}"),
]


def load_t5(path, dtype=torch.float32, device="cpu"):
    """A T5Encoder in eval mode from a Hugging Face folder (safetensors or .bin, sharded or not, with tokenizer.json).

    Decoder weights, if there are any, are left out. Raises vq.CheckpointError.
    """
    state, _ = vq.read_checkpoint(path)
    vq.require(state, "shared.weight", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
               "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", path=path,
               what="a T5 of version 1.1 (such as google/flan-t5-xl)")
    state = {k: v for k, v in state.items() if k.startswith(("shared.", "encoder.")) and "embed_tokens" not in k}
    state = vq.rename_keys(state, T5_RENAMES)
    model = vq.build_on(device, T5Encoder, infer_t5_config(state), cast=lambda model: model.to(dtype))
    vq.load_strict(model, state, path)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if (folder / "tokenizer.json").exists():
        model.tokenize = load_tokenizer(folder / "tokenizer.json")
    elif model.config.vocab_size > 384:                                     # those on bytes have 259, or 384
        raise vq.CheckpointError(f"{folder}: has no tokenizer.json; it belongs to the weights, get it from there too")
    return model.eval()


def infer_t5_config(state):
    """The T5Config of a state dict under our keys."""
    (vocab_size, width), (buckets, heads) = state["embed.weight"].shape, state["relative_bias.weight"].shape
    inner, hidden = len(state["blocks.0.attn.q.weight"]), len(state["blocks.0.wi_0.weight"])
    layers = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    return T5Config(vocab_size, width, layers, heads, inner // heads, hidden, buckets)


# ----------------------------------------------------------------------------------------------------------------------
# Building blocks


def rope_angles(scales, head_dim, device=None):
    """2D RoPE: (h, w) of every scale -> angles (L, head_dim / 2), the first half of them for y, the second for x.

    Places are counted on the grid of the 1M schedule of that aspect ratio, whatever the size of the picture, and
    rounded, halves to the even one. Frequencies fall from 1 to nearly 1 / 10000, as in text.
    """
    H, W = vq.ASPECTS[vq.nearest_aspect(scales[-1][0] / scales[-1][1])][-1]
    place = lambda n, full: (torch.arange(n, device=device, dtype=torch.float32) * (full / n)).round()
    frequency = 10000 ** (-torch.arange(0, head_dim // 2, 2, device=device, dtype=torch.float32) / (head_dim // 2))
    grids = [torch.cartesian_prod(place(h, H), place(w, W)) for h, w in scales]         # (h * w, 2), row by row
    return (torch.cat(grids)[:, :, None] * frequency).flatten(1)


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of this scale and of all coarser ones."""

    def __init__(self, config):
        super().__init__()
        C, H = config.width, config.heads
        self.heads = H
        self.qkv = nn.Linear(C, 3 * C, bias=False)                          # rows: q, k, v; inside each head-major
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(C)), nn.Parameter(torch.zeros(C))
        self.log_scale = nn.Parameter(torch.full((1, H, 1, 1), math.log(4)))    # q has this length: sharpness
        self.proj = nn.Linear(C, C)

    def constants(self):
        """What depends on weights alone: the bias of qkv (3C,), zero for k; the length of q (H,)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return bias, self.log_scale.float().clamp(max=math.log(100)).exp().flatten()

    def forward(self, x, constants, rope, bounds=None, cache=None, pos=0):
        """x (B, l, C); rope: cos and sin (l, D / 2), applied after the normalisation, so that lengths stay.

        bounds: in training, (start, end) of every scale. Attention is full within a scale and causal between scales, so
        a call per scale, whose keys are all that is there up to its end, needs no mask, and skips what a mask would
        hide. cache: in sampling, (k, v) of all scales, each (B, H, L, D), filled up to pos.
        """
        bias, q_scale = constants
        qkv = F.linear(x, self.qkv.weight, bias)                            # (B, l, 3C)
        q, k, v = rearrange(qkv, "b l (three h d) -> three b l h d", three=3, h=self.heads)
        k_cache, v_cache = cache if cache is not None else (None, None)
        q, k, v = qk_norm_rope(q, k, v, q_scale=q_scale, cos=rope[0], sin=rope[1], k_cache=k_cache, v_cache=v_cache,
                               pos=pos)
        attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0)     # the sharpness is in q
        if bounds is None:
            out = attend(q, k, v)                                           # (B, H, l, D)
        else:
            parts = zip(q.split([b - a for a, b in bounds], 2), bounds)
            out = torch.cat([attend(part, k[:, :, :b], v[:, :, :b]) for part, (_, b) in parts], 2)
        return self.proj(rearrange(out, "b h l d -> b l (h d)"))


class CrossAttention(nn.Module):
    """Multi-head attention of picture tokens to text. No normalisation of q and k, no positions, no gate."""

    def __init__(self, config):
        super().__init__()
        C = config.width
        self.heads = config.heads
        self.q = nn.Linear(C, C)
        self.kv = nn.Linear(C, 2 * C, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(C))
        self.proj = nn.Linear(C, C)

    def keys_values(self, memory):
        """Text memory (B, T, C) -> k, v (B, H, T, D): the same at all scales, so computed once."""
        bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        kv = F.linear(memory.to(self.kv.weight.dtype), self.kv.weight, bias)
        return rearrange(kv, "b t (two h d) -> two b h t d", two=2, h=self.heads).unbind(0)

    def forward(self, x, k, v, mask):                                       # mask (B, 1, 1, T) bool, or None
        q = rearrange(self.q(x), "b l (h d) -> b h l d", h=self.heads)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)       # scale D ** -0.5
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
    """Self-attention and feed-forward, each between an AdaLN modulation and a gate; in between, the text is read."""

    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config)
        self.cross_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.cross = CrossAttention(config)
        self.ffn = FeedForward(config.width, config.hidden)
        self.adaln_table = nn.Parameter(torch.zeros(1, 1, 6, config.width))
        self.eps = config.norm_eps

    def prepare(self, shared, memory):
        """Shared AdaLN output (B, 1, 6, C), text memory (B, T, C) -> all that no picture token has a part in: two
        gates, two scales, two shifts (of each the first for attention); constants of attention; text keys, values."""
        return self.adaln_table + shared, self.attn.constants(), self.cross.keys_values(memory)

    def forward(self, x, prepared, rope, mask, bounds=None, cache=None, pos=0, kept=(1.0, 1.0)):
        """x (B, l, C), the residual stream -> the same. kept: factors of the two gated branches, see drop_path."""
        modulation, constants, (k, v) = prepared
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        dtype = self.ffn.fc1.weight.dtype                                   # of the products; the stream stays wider
        h = adaln_modulate(x, scale1, shift1, self.eps, out_dtype=dtype)
        h = self.attn(h, constants, rope, bounds, cache, pos)
        weight, bias = (p.float()[None, None] for p in (self.cross_norm.weight, self.cross_norm.bias))
        h, x = adaln_modulate(h, weight - 1, bias, self.eps, residual=x, gate=gate1 * kept[0], out_dtype=dtype)
        h = self.cross(h, k, v, mask)
        h, x = adaln_modulate(h, scale2, shift2, self.eps, residual=x, out_dtype=dtype)
        return torch.addcmul(x, gate2 * kept[1], self.ffn(h))


class TextPool(nn.Module):
    """Text (B, T, Ct) -> one vector (B, C): attention of a learned query per head. Heads: Ct / 128, whatever C is."""

    def __init__(self, config):
        super().__init__()
        C, heads = config.width, config.text_width // 128
        self.query = nn.Parameter(torch.zeros(1, heads, C // heads))
        self.kv = nn.Linear(config.text_width, 2 * C, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(C))
        self.proj = nn.Linear(C, C)

    def forward(self, text, mask):
        bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        kv = F.linear(text, self.kv.weight, bias)
        k, v = rearrange(kv, "b t (two h d) -> two b h t d", two=2, h=self.query.shape[1])
        q = self.query[:, :, None].expand(len(text), -1, -1, -1).to(k.dtype)            # (B, heads, 1, C / heads)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)       # scale (C / heads) ** -0.5
        return self.proj(rearrange(out, "b h 1 d -> b (h d)"))


# ----------------------------------------------------------------------------------------------------------------------
# Bits: tokens of the transformer, and the training signal


def fold(x, size):
    """Tokenizer tokens (B, 2h * 2w, d) -> transformer tokens (B, h * w, 4d), those of 2 x 2 neighbours bit by bit."""
    return rearrange(x, "b (h dy w dx) d -> b (h w) (d dy dx)", h=size[0], dy=2, dx=2)


def unfold(x, size):
    """The inverse of fold."""
    return rearrange(x, "b (h w) (d dy dx) -> b (h dy w dx) d", h=size[0], dy=2, dx=2)


def tokenizer_scales(scales, patchify):
    """The transformer's schedule -> the tokenizer's: with patchify all maps are twice as large."""
    return tuple((2 * h, 2 * w) for h, w in scales) if patchify else tuple(scales)


@torch.no_grad()
def self_correct(quantizer, f, scales, strength=0.3, *, layers=None, patchify=False, generator=None, chances=None):
    """Bitwise self-correction (section 3.4): inputs with mistakes in them, and targets that make up for these.

    A model that only ever saw correct prefixes does not know what to do after its first wrong bit. So at every scale
    some bits are flipped, as if drawn wrong, the picture goes on from the flipped ones, and what the next scales should
    add is computed anew, from what is missing now. A flipped bit is never a target; its repair is.

    f:        (B, d, H, W) features of the pictures, from `tokenizer.encode`; with patchify twice as large as the last
              of the scales
    strength: each scale's chance of a flip is 0, 0.01, ... or strength, at random; 0: no flips
    layers:   flip in so many of the first scales; None: all
    chances:  the chance at every scale, instead of drawing it
    returns   inputs of scales 1 .. K - 1 (B, L - h_0 w_0, D), labels of all (B, L, D) bool
    """
    sizes = tokenizer_scales(scales, patchify)
    f = f.float()
    f_hat, inputs, labels = torch.zeros_like(f), [], []
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
            following = quantizer.next_input(f_hat, k + 1, sizes)
            inputs.append(fold(following, scales[k + 1]) if patchify else following)
    return torch.cat(inputs, 1), torch.cat(labels, 1)


def draw_bits(logits, noise, top_k=0, top_p=0.0):
    """Logits (B, l, D, 2), Exp(1) noise (B, l * D, 2) -> bits (B, l, D) bool: both values run an exponential race.

    `torch.multinomial(p, 1, generator=...)` runs the same one, so the draws are the same, but makes the host wait. With
    two values filters need no sort: top_k = 1 drops the less likely one, 0 < top_p < 1 if its probability is at most
    1 - top_p: for 0.97, bits that the model is sure of to 97 % are no longer drawn.
    """
    odds = logits[..., 1] - logits[..., 0]
    one, zero = odds.sigmoid(), (-odds).sigmoid()
    if top_k == 1 or 0 < top_p < 1:
        most = 1.0 if top_k == 1 else 1 - top_p                             # that the less likely one may have
        one, zero = (p.masked_fill((p <= most) & (p < other), 0) for p, other in ((one, zero), (zero, one)))
    noise = noise.view(*one.shape, 2)
    return one / noise[..., 1] > zero / noise[..., 0]


# ----------------------------------------------------------------------------------------------------------------------
# The model

# What `Infinity.steps` yields after scale k:
#   logits  (B, l, D, 2), guided and divided by tau, before the filters
#   bits    (B, h * w, d) of the tokenizer, as drawn or as given; with patchify (B, 2h * 2w, d)
#   f_hat   (B, d, H, W) the picture so far, at the size of the last scale
Step = namedtuple("Step", "k logits bits f_hat")


def call(function, constants, *tensors):
    """How `Infinity.sample` has device work done. Anything else of this signature may capture it once and replay it.
    constants can be hashed; tensors are tensors, None, and lists of them."""
    return function(*constants, *tensors)


def scale_bounds(scales, L):
    """(start, end) of the tokens of every scale, of those that make up the first L tokens."""
    ends = list(itertools.accumulate(h * w for h, w in scales))
    if L not in ends:
        raise ValueError(f"{L} tokens are no whole number of the scales {scales}")
    return list(zip([0, *ends], ends[:ends.index(L) + 1]))


def per_scale(value, K, name):
    """A number, or one per scale -> a list of K."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * K
    if len(values) < K:
        raise ValueError(f"{name} has {len(values)} values, but there are {K} scales: give one for all, or {K}")
    return [float(v) for v in values[:K]]


class Infinity(nn.Module):
    """The transformer. The tokenizer is no part of it; a text encoder only if it was trained along, as in the demo."""

    NO_DECAY = ("null_text", "pos_start", "level_embed", "adaln_table", "log_scale", "text_pool.query")

    def __init__(self, config, t5=None):
        super().__init__()
        self.config, self.checkpointing = config, False
        C, Ct = config.width, config.text_width
        self.text_norm = nn.RMSNorm(Ct, 1e-6)
        self.text_pool = TextPool(config)
        self.text_in, self.text_out = nn.Linear(Ct, C), nn.Linear(C, C)     # text -> memory, with a GELU in between
        self.null_text = nn.Parameter(torch.zeros(config.text_maxlen, Ct))  # row t stands for token t of no prompt
        self.word_embed = nn.Linear(config.bits, C)                         # of f_hat's cells; the name is the paper's
        self.level_embed = nn.Embedding(config.levels, C)
        self.pos_start = nn.Parameter(torch.zeros(1, 1, C))
        self.shared_adaln = nn.Linear(C, 6 * C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_adaln = nn.Linear(C, 2 * C)
        self.head = nn.Linear(C, 2 * config.bits)                           # row 2j + c: bit j is c
        self.text_encoder = T5Encoder(t5) if t5 is not None else None

    # pieces that training and sampling share

    def read(self, text, mask):
        """Text features (B, T, Ct), mask (B, T) or None -> condition (B, C), memory (B, T, C), mask (B, 1, 1, T)."""
        text = self.text_norm(text.float())
        mask = None if mask is None else mask[:, None, None]
        return self.text_pool(text, mask), self.text_out(F.gelu(self.text_in(text), approximate="tanh")), mask

    def prepare(self, cond, memory):
        """Condition (B, C), memory (B, T, C) -> what every block makes of them: once per picture, not per scale."""
        shared = rearrange(self.shared_adaln(F.silu(cond)), "b (six c) -> b 1 six c", six=6)
        return [block.prepare(shared, memory) for block in self.blocks]

    def head_modulation(self, cond):
        """Condition (B, C) -> scale and shift (B, 1, C) of the last norm."""
        return self.head_adaln(F.silu(cond)).unsqueeze(1).chunk(2, dim=-1)

    def logits(self, x, scale, shift):
        """Residual stream (B, l, C) -> (B, l, D, 2) float32."""
        x = adaln_modulate(x, scale, shift, self.config.norm_eps, out_dtype=self.head.weight.dtype)
        return rearrange(self.head(x).float(), "b l (bits two) -> b l bits two", two=2)

    def rope(self, scales):
        """cos and sin (L, head dim / 2) of all tokens."""
        angles = rope_angles(scales, self.config.width // self.config.heads, self.pos_start.device)
        return torch.stack([angles.cos(), angles.sin()])

    # training

    def forward(self, text, mask, inputs, scales, *, text_drop=0.0, generator=None):
        """Teacher-forced logits.

        text, mask: (B, T, Ct) features of the prompts; (B, T) bool, False for padding, or None
        generator:  of dropped prompts, and in training mode of stochastic depth
        inputs:     (B, L - 1, D) what enters at scales 1, 2, ..., from `self_correct`; those of the first scales are
                    enough: then these alone are computed
        scales:     (h, w) of all scales, from `vq.schedule`
        text_drop:  share of prompts replaced by the null text: one uniform number per picture from generator
        returns     (B, L, D, 2) float32; row i predicts token i of the same scale (not of the next position)
        """
        B, L = len(text), 1 + inputs.shape[1]
        if text_drop:
            dropped = torch.rand(B, generator=generator, device=text.device) < text_drop
            text = torch.where(dropped[:, None, None], self.null_rows(text.shape[1]), text)
        cond, memory, mask = self.read(text, mask)
        bounds = scale_bounds(scales, L)
        x = torch.cat([cond[:, None] + self.pos_start, self.word_embed(inputs)], 1)     # (B, L, C)
        level = [self.level_embed.weight[k].expand(b - a, -1) for k, (a, b) in enumerate(bounds)]
        x, rope = x + torch.cat(level), self.rope(scales)[:, :L]
        for block, prepared, kept in zip(self.blocks, self.prepare(cond, memory), self._kept(B, x.device, generator)):
            arguments = (x, prepared, rope, mask, bounds, None, 0, kept)
            x = vq.checkpointed(self.checkpointing, block, *arguments)
        return self.logits(x, *self.head_modulation(cond))

    def null_rows(self, T):
        """The null text in place of a prompt of T tokens: as long as that, row by row (T, Ct)."""
        if T > len(self.null_text):
            raise ValueError(f"a prompt has {T} tokens, but the null text {len(self.null_text)}: shorten the prompt, "
                             "or do without guidance and without dropping")
        return self.null_text[:T]

    def _kept(self, B, device, generator):
        """Stochastic depth: per block, factors of both gated branches. In training a branch is removed for some
        pictures and scaled up for the others, in deeper blocks more often."""
        depth = self.config.depth
        for i in range(depth):
            keep = 1 - self.config.drop_path * i / max(depth - 1, 1)
            if self.training and keep < 1:
                yield (torch.rand(2, B, 1, 1, generator=generator, device=device) < keep).float() / keep
            else:
                yield 1.0, 1.0

    def loss(self, text, mask, inputs, labels, scales, *, reweight=False, text_drop=None, generator=None):
        """Cross entropy of every bit, mean over bits and tokens -> (loss, {bit_, token_ and scale_accuracy}).

        labels:   (B, L, D) bool, from `self_correct`; of the first scales alone, like inputs, if these alone train
        reweight: weigh tokens of coarse scales more, by 1 / sqrt(h w), as there are fewer of them
        """
        if text_drop is None:
            text_drop = self.config.text_drop if self.training else 0.0
        labels = labels[:, :1 + inputs.shape[1]]
        logits = self(text, mask, inputs, scales, text_drop=text_drop, generator=generator)
        odds = logits[..., 1] - logits[..., 0]                              # a two-way softmax is a sigmoid of these
        losses = F.binary_cross_entropy_with_logits(odds, labels.float(), reduction="none").mean((0, 2))    # (L,)
        bounds = scale_bounds(scales, len(losses))
        with torch.no_grad():
            right = (odds > 0) == labels                                    # (B, L, D)
            metrics = {"bit_accuracy": right.float().mean(), "token_accuracy": right.all(-1).float().mean(),
                       "scale_accuracy": torch.stack([right[:, a:b].float().mean() for a, b in bounds])}
        if not reweight:
            return losses.mean(), metrics
        weights = torch.cat([losses.new_full((b - a,), (b - a) ** -0.5) for a, b in bounds])
        return (losses * weights).sum() / weights.sum(), metrics

    # sampling

    @torch.no_grad()
    def steps(self, tokenizer, text, mask=None, *, scales, cfg=3.0, tau=0.5, top_k=0, top_p=0.97, negative=None,
              guide_after=None, generator=None, given=None, keep=0, run=call):
        """Yields a Step per scale, coarse to fine; arguments as in `sample`.

        What happens between two random draws is one call, of `_begin` and then of `_advance` for every scale: shapes
        that depend on nothing but B, T and the schedule, and nothing that makes the host wait for the device.
        """
        self.check_pair(tokenizer)
        scales, B = tuple(map(tuple, scales)), len(text)
        K, device, depth = len(scales), self.pos_start.device, len(self.blocks)
        cfg, tau = per_scale(cfg, K, "cfg"), per_scale(tau, K, "tau")
        if min(tau) <= 0:
            raise ValueError(f"tau must be above 0, not {min(tau)}: top_k=1 takes the likelier value of every bit")
        if guide_after is not None and not -depth <= guide_after < depth:
            raise ValueError(f"guide_after is a block, -{depth} .. {depth - 1}, not {guide_after}")
        if (given is None) != (keep == 0):
            raise ValueError("given and keep go together: the bits, and of how many scales they are to be kept")
        guided = any(c != 1 for c in cfg)
        text, mask = self.rows(text.to(device), mask, negative) if guided else (text.to(device), mask)
        x, f_hat, *state = run(self._begin, (scales, B), text, None if mask is None else mask.to(device))
        for k, (h, w) in enumerate(scales):
            noise = exponential_noise((B, h * w * self.config.bits, 2), generator, device)
            constants = (tokenizer.quantize, scales, k, cfg[k], tau[k], top_k, top_p, guide_after)
            kept = given[k] if k < keep else None
            x, f_hat, logits, bits = run(self._advance, constants, x, f_hat, state, noise, kept)
            yield Step(k, logits, bits, f_hat)

    def check_pair(self, tokenizer):
        """Raises ValueError unless the tokenizer is one of the kind that this model was trained with."""
        d, wanted = tokenizer.config.z_channels, self.config.bits // (4 if self.config.patchify else 1)
        if tokenizer.config.vocab_size or d != wanted:
            kind = "codes" if tokenizer.config.vocab_size else f"{d} bits"
            raise ValueError(f"the tokenizer has tokens of {kind}, but this model needs {wanted} bits")

    def rows(self, text, mask, negative):
        """Text of the prompts -> of all 2B rows, the second half being the null text, or a negative prompt's (features,
        mask), for one or for all B. (The null text has each prompt's own length.)"""
        B, T = text.shape[:2]
        if negative is None:
            null = self.null_rows(T).expand(B, -1, -1)
            return torch.cat([text, null]), None if mask is None else mask.repeat(2, 1)
        other, other_mask = negative
        other = other.to(text).expand(B, -1, -1)
        everything = lambda t: torch.ones(t.shape[:2], dtype=torch.bool, device=text.device)
        mask = everything(text) if mask is None else mask.to(text.device)
        other_mask = everything(other) if other_mask is None else other_mask.to(text.device).expand(B, -1)
        width = max(T, other.shape[1])
        pad = lambda t: F.pad(t, (0, 0) * (t.dim() - 2) + (0, width - t.shape[1]))
        return torch.cat([pad(text), pad(other)]), torch.cat([pad(mask), pad(other_mask)])

    def _begin(self, scales, B, text, mask):
        """Text of all rows (R, T, Ct) -> x (R, 1, C), what enters at the first scale; f_hat, zero; and what stays the
        same throughout: cache (depth, 2, R, H, L, D), cos and sin (2, L, D / 2), head modulation (2, R, 1, C), the
        text's mask, and what every block has prepared."""
        config = self.config
        cond, memory, mask = self.read(text, mask)
        L, R = sum(h * w for h, w in scales), len(text)
        cache = self.blocks[0].ffn.fc1.weight.new_empty(                    # keys and values of all scales, at once
            config.depth, 2, R, config.heads, L, config.width // config.heads)
        d, size = config.bits // (4 if config.patchify else 1), tokenizer_scales(scales, config.patchify)[-1]
        return (cond[:, None] + self.pos_start, cond.new_zeros(B, d, *size), cache, self.rope(scales),
                torch.stack(self.head_modulation(cond)), mask, *self.prepare(cond, memory))

    def _advance(self, quantizer, scales, k, cfg, tau, top_k, top_p, guide_after, x, f_hat, state, noise, given):
        """Scale k: its input x (R, l, C), f_hat so far -> the next scale's x, f_hat, logits, bits.

        noise: Exp(1) (B, l * D, 2); given: bits of the tokenizer to take instead of those drawn, or None
        """
        cache, rope, head_modulation, mask, *prepared = state
        (h, w), B, patchify = scales[k], len(f_hat), self.config.patchify
        pos, guided = sum(h * w for h, w in scales[:k]), cfg != 1
        x = x + self.level_embed.weight[k]
        for i, (block, mine, kv) in enumerate(zip(self.blocks, prepared, cache)):
            x = block(x, mine, rope[:, pos:pos + h * w], mask, cache=kv, pos=pos)
            if guided and guide_after is not None and i == guide_after % len(self.blocks):
                x = (cfg * x[:B] + (1 - cfg) * x[B:]).repeat(2, 1, 1)
        if guided and guide_after is None:
            logits = self.logits(x, *head_modulation) / tau                 # each half with its own condition
            logits = cfg * logits[:B] + (1 - cfg) * logits[B:]
        else:
            logits = self.logits(x[:B], *head_modulation[:, :B]) / tau

        bits = draw_bits(logits, noise, top_k, top_p)                       # (B, l, D)
        if patchify:
            bits = unfold(bits, (h, w))                                     # (B, 2h * 2w, d)
        if given is not None:
            bits = given
        sizes = tokenizer_scales(scales, patchify)
        codes = quantizer.embed(bits, sizes[k])                             # (B, d, h, w)
        f_hat = f_hat + quantizer.contribution(codes, k, len(sizes), sizes[-1])
        if k + 1 < len(sizes):
            following = quantizer.next_input(f_hat, k + 1, sizes)
            following = self.word_embed(fold(following, scales[k + 1]) if patchify else following)      # (B, l, C)
            x = following.repeat(len(x) // B, 1, 1)                         # both halves see the same picture
        return x, f_hat, logits, bits

    @torch.no_grad()
    def sample(self, tokenizer, text, mask=None, *, scales, cfg=3.0, tau=0.5, top_k=0, top_p=0.97, negative=None,
               guide_after=None, generator=None, given=None, keep=0, ladder=False, tile=0, run=call):
        """Draws pictures -> (B, 3, height, width) float32 in [0, 1], or with ladder=True a list, one per scale.

        tokenizer:    the VQVAE, on the same device
        text, mask:   (B, T, Ct) features of the prompts; (B, T) bool, False for padding, or None: `T5Encoder.encode`
        scales:       (h, w) of every scale, from `vq.schedule(aspect, pixels)`
        cfg:          guidance: logits = cfg * cond + (1 - cfg) * uncond, 1 for none; a number, or one per scale. The
                      authors take 3 or 4, and 1 for close-ups of faces
        tau:          temperature, below 1 for cleaner pictures; a number, or one per scale
        top_k, top_p: filters of both values of a bit, see `draw_bits`; top_k=1 takes the likelier one
        negative:     features (1 or B, T', Ct) and mask, or None, of what to stay away from, in place of the null text
        guide_after:  guide the features after that block (-1: the last) instead of the logits
        generator:    a torch.Generator of the model's device, consumed exactly as by the original; or a list of B, one
                      per picture, which makes every picture independent of its batch; None: torch's global one
        given, keep:  bits of a picture, `tokenizer.tokenize(image, tokenizer_scales(scales, patchify))`, whose first
                      `keep` scales are taken: its layout and colors with other details. The random numbers of these are
                      drawn all the same
        tile:         decode in overlapping tiles of so many cells, see `vq.VQVAE.decode_tiled`; 0: at once
        run:          run(function, constants, *tensors) has device work done. By default a plain call; what captures it
                      once and replays it takes away the launches, e.g. `CUDAGraphs` in sample.py
        """
        steps = self.steps(tokenizer, text, mask, scales=scales, cfg=cfg, tau=tau, top_k=top_k, top_p=top_p,
                           negative=negative, guide_after=guide_after, generator=generator, given=given, keep=keep,
                           run=run)
        sums = [step.f_hat for step in steps]                               # first all: then the KV cache is free
        sums = sums if ladder else sums[-1:]
        decode, constants = (tokenizer.decode_tiled, (tile,)) if tile else (tokenizer.decode, ())
        images = [run(decode, constants, f_hat).add(1).mul(0.5) for f_hat in sums]
        return images if ladder else images[0]

    # initialisation

    @torch.no_grad()
    def init_weights(self, init_gamma=5e-6, generator=None):
        """The authors' initialisation. init_gamma scales the gates of the blocks' own tables."""
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
                p[:, :, :2] *= init_gamma
                p[:, :, 2:] *= 1e-3
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

RENAMES = [     # fragment of an official key, of ours
    ("cfg_uncond", "null_text"), ("text_proj_for_sos.ca.mat_q", "text_pool.query"),
    ("text_proj_for_sos.ca.mat_kv", "text_pool.kv"), ("text_proj_for_sos.ca", "text_pool"),
    ("text_proj_for_ca.0", "text_in"), ("text_proj_for_ca.2", "text_out"), ("lvl_embed", "level_embed"),
    ("shared_ada_lin.1", "shared_adaln"), ("head_nm.ada_lin.1", "head_adaln"), ("ada_gss", "adaln_table"),
    ("sa.mat_qkv", "attn.qkv"), ("sa.scale_mul_1H11", "attn.log_scale"), ("sa", "attn"),
    ("ca.mat_q", "cross.q"), ("ca.mat_kv", "cross.kv"), ("ca", "cross"), ("ca_norm", "cross_norm"),
]
DERIVED = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")


def _numbered(state):
    """(state with block_chunks.{chunk}.module.{i} as blocks.{n}, number of chunks)."""
    found = [re.match(r"block_chunks\.(\d+)\.module\.(\d+)\.(.*)", k) for k in state]
    chunks = 1 + max((int(m[1]) for m in found if m), default=0)
    per_chunk = 1 + max((int(m[2]) for m in found if m), default=0)
    rename = lambda k, m: f"blocks.{int(m[1]) * per_chunk + int(m[2])}.{m[3]}" if m else k
    return {rename(k, m): v for (k, v), m in zip(state.items(), found)}, chunks


def infer_config(state, chunks, patchify=None):
    """The Config of a state dict under our keys. patchify is in no shape: by default where D is 56, as in 8B."""
    width, bits = state["word_embed.weight"].shape
    (text_maxlen, text_width), depth = state["null_text"].shape, 1 + max(
        int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    return Config(depth=depth, width=width, heads=state["blocks.0.attn.log_scale"].shape[1], bits=bits, chunks=chunks,
                  patchify=bits == 56 if patchify is None else patchify, text_width=text_width,
                  text_maxlen=text_maxlen, levels=len(state["level_embed.weight"]))


def load(path, config=None, patchify=None, dtype=torch.float32, device="cpu", ema=False):
    """An Infinity in eval mode from a released file or folder of shards, a training checkpoint, or a file of ours.

    Weights go from the mapped file straight to `device` in their final dtype (see set_dtype), one after another.
    config: instead of the inferred one; patchify: what no shape tells; ema: the averaged weights of a training
    checkpoint. Raises vq.CheckpointError.
    """
    training = (("trainer", "gpt_fsdp"), ("trainer", "gpt_wo_ddp"))
    state, saved = vq.read_checkpoint(path, nested=(("trainer", "gpt_ema_fsdp"),) if ema else training)
    vq.require(state, "text_proj_for_sos.ca.mat_q", "word_embed.weight", "cfg_uncond", path=path,
               what="an Infinity transformer")
    state = {k: v for k, v in state.items() if k not in DERIVED and not k.endswith("zero_k_bias")}
    text_encoder = {k.removeprefix("text_encoder."): v for k, v in state.items() if k.startswith("text_encoder.")}
    state, chunks = _numbered({k: v for k, v in state.items() if not k.startswith("text_encoder.")})
    state = vq.rename_keys(state, RENAMES)
    if config is None:
        config = vq.config_from_json(Config, saved, path) if saved else infer_config(state, chunks, patchify)
    t5 = None
    if text_encoder:
        text_encoder = vq.rename_keys(text_encoder, T5_RENAMES)
        t5, state = infer_t5_config(text_encoder), state | {f"text_encoder.{k}": v for k, v in text_encoder.items()}
    model = vq.build_on(device, Infinity, config, t5, cast=lambda model: set_dtype(model, dtype))
    vq.load_strict(model, state, path)
    return model.eval()


def set_dtype(model, dtype):
    """Casts the parameters of the blocks. Text, embeddings, residual stream, logits and f_hat stay in float32."""
    model.blocks.to(dtype)
    return model


def export(model, buffers=True):
    """The official state dict of an Infinity, in float32, with or without the buffers that hold nothing but zeros."""
    state = {k: v.float().contiguous() for k, v in model.state_dict().items()}
    text_encoder = {k: v for k, v in state.items() if k.startswith("text_encoder.")}
    state = {k: v for k, v in state.items() if k not in text_encoder}
    c, official = model.config, {}
    for k, v in vq.rename_keys(state, RENAMES, inverse=True).items():
        if (m := re.match(r"blocks\.(\d+)\.(.*)", k)) and c.chunks > 1:
            chunk, i = divmod(int(m[1]), max(c.depth // c.chunks, 1))
            k = f"block_chunks.{chunk}.module.{i}.{m[2]}"
        official[k] = v
    if buffers:
        biases = [k for k in official if re.search(r"\.(sa|ca)\.v_bias$", k)]
        official |= {k.replace("v_bias", "zero_k_bias"): torch.zeros(c.width) for k in biases}
    return official | vq.rename_keys(text_encoder, T5_RENAMES, inverse=True)


def save(model, path, dtype=None, **extra):
    """Writes an Infinity as safetensors: official keys, config (and `extra`) in the header. dtype: of stored floats."""
    vq.save_checkpoint(path, export(model, buffers=False), model.config, dtype, **extra)
