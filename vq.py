"""Image tokenizers: pictures to discrete codes and back. Networks and quantizers, all in this file.

A tokenizer is a convolutional encoder and decoder (the taming-transformers layout) around one of three quantizers:

- SingleScaleVQ (LlamaGen): each cell of the feature map f is replaced by the nearest row of a codebook, and the index
  of that row is the token. A picture of 256 pixels has 16 x 16 tokens.
- MultiScaleVQ (VAR): f becomes a sequence of token maps, 1x1, 2x2, ... 16x16, instead of one. Each map encodes what
  the coarser maps left over. All maps share one codebook.
- MultiScaleBSQ (Infinity): the same sequence of maps, but a token is d bits, the signs of the d channels. This gives
  2^d codes, 4 billion for d = 32, with no codebook, no search, and nothing to collapse. The maps need not be square.

VAR's quantizer, step by step:

    image (B, 3, 256, 256) --Encoder--> f (B, 32, 16, 16)
                                        |  rest = f, f_hat = 0
              +-------------------------+
              |  for every scale p in 1 2 3 4 5 6 8 10 13 16:
              |      z     = area-resize(rest, p x p)              what is still missing, seen coarsely
              |      index = nearest codebook row of every z       p * p tokens of this scale
              |      h     = phi(bicubic-resize(codebook[index]))  back to 16 x 16; phi repairs what the resize blurred
              |      f_hat += h;  rest = f - f_hat
              v
             f_hat (B, 32, 16, 16) --Decoder--> image

A picture is therefore 680 tokens, ordered from coarse to fine. The first k maps alone decode to a blurrier version.

Letters: B batch, C channels, d bits (channels), H W feature-map size, h w (or p) token-map size, K scales, V codebook
size. Papers: VAR, arXiv 2404.02905, section 3.2 and algorithms 1 and 2; Infinity, arXiv 2412.04431, section 3.2; BSQ,
arXiv 2406.07548; LlamaGen, arXiv 2406.06525, section 3.1; VQGAN, arXiv 2012.09841. Released weights:

    vae_ch160v4096z32.pth                                   109 M, stride 16   FoundationVision/var, 256 and 512 pixels
    infinity_vae_d16.pth, d24, d32, d32reg, d64             110 M, stride 16   FoundationVision/Infinity
    infinity_vae_d56_f8_14_patchify.pth                     82 M, stride 8     FoundationVision/Infinity
    vq_ds16_c2i.pt                                          72 M, stride 16    FoundationVision/LlamaGen
    vq_ds8_c2i.pt                                           70 M, stride 8     FoundationVision/LlamaGen
    vq_ds16_t2i.pt                                          72 M, stride 16    peizesun/llamagen_t2i

    tokenizer = vq.load("vae_ch160v4096z32.pth")
    indices = tokenizer.tokenize(image)         # image (B, 3, 256, 256) in [-1, 1] -> list of K (B, p * p) int64
    image = tokenizer.detokenize(indices)
    tokenizer, scales = vq.load("infinity_vae_d32.pth"), vq.schedule(aspect=1.5, pixels="0.25M")
    bits = tokenizer.tokenize(image, scales)    # image (B, 3, 624, 416) -> list of K (B, h * w, 32) bool

LatentSync's autoencoder, which is Stable Diffusion's, has no tokens. It turns a picture into a Gaussian over latents
of 4 channels, kept near the standard normal by a KL divergence (latent diffusion, arXiv 2112.10752). Its weights are
the folder sd-vae-ft-mse, 84 M parameters, stride 8, stabilityai/sd-vae-ft-mse.

    autoencoder = vq.load_autoencoder("sd-vae-ft-mse")
    z = autoencoder.encode(image).sample(generator)     # (B, 3, 256, 256) in [-1, 1] -> (B, 4, 32, 32), scaled to std 1
    image = autoencoder.decode(z)

The last section is shared by all model files: recomputation, a mel filter bank, reading and writing checkpoints. The
losses that a tokenizer is trained with are in lib/losses.py.
"""
import argparse
import codecs
import errno
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import warnings
import zipfile
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from triton_ops import group_norm_silu, vq_nearest

PATCH_NUMS = {  # VAR's released schedules at stride 16: picture size -> side of the token map at every scale
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}

_TALL_SCHEDULES = {     # Infinity's, for pictures of 1M pixels at stride 16: height / width -> h,w of the 13 token maps
    1.0: "1,1 2,2 4,4 6,6 8,8 12,12 16,16 20,20 24,24 32,32 40,40 48,48 64,64",
    1.25: "1,1 2,2 3,3 5,4 10,8 15,12 20,16 25,20 30,24 35,28 45,36 55,44 70,56",
    1.333: "1,1 2,2 4,3 8,6 12,9 16,12 20,15 24,18 28,21 36,27 48,36 60,45 72,54",
    1.5: "1,1 2,2 3,2 6,4 9,6 15,10 21,14 27,18 33,22 39,26 48,32 63,42 78,52",
    1.75: "1,1 2,2 3,3 7,4 11,6 14,8 21,12 28,16 35,20 42,24 56,32 70,40 84,48",
    2.0: "1,1 2,2 4,2 6,3 10,5 16,8 22,11 30,15 38,19 46,23 60,30 74,37 90,45",
    2.5: "1,1 2,2 5,2 10,4 15,6 20,8 25,10 30,12 40,16 50,20 65,26 80,32 100,40",
    3.0: "1,1 2,2 6,2 9,3 15,5 21,7 27,9 36,12 45,15 54,18 72,24 90,30 111,37",
}
PIXELS = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}       # budget -> number of scales: about 256^2 ... 1024^2


def _with_wide_schedules(tall):
    """{height / width: ((h, w), ...)} of the tall pictures, then of the wide ones, with h and w exchanged."""
    schedules = {}
    for ratio, text in tall.items():
        pairs = [pair.split(",") for pair in text.split()]
        schedules[ratio] = tuple((int(h), int(w)) for h, w in pairs)
    for ratio, pairs in list(schedules.items()):
        schedules[int(1000 / ratio) / 1000] = tuple((w, h) for h, w in pairs)       # 1 / ratio, cut to three decimals
    return schedules


ASPECTS = _with_wide_schedules(_TALL_SCHEDULES)


def nearest_aspect(aspect):
    """The ratio height / width among ASPECTS, 0.333 .. 3, that is nearest to `aspect`."""
    return min(ASPECTS, key=lambda ratio: abs(ratio - aspect))


def schedule(aspect=1.0, pixels="1M"):
    """Infinity's token maps ((h, w), ...) for pictures of height / width `aspect`, at 16 pixels per token and side."""
    if pixels not in PIXELS:
        raise ValueError(f"pixels is one of {', '.join(PIXELS)}, not {pixels!r}")
    return ASPECTS[nearest_aspect(aspect)][:PIXELS[pixels]]


@dataclass(frozen=True)
class Config:
    """Sizes of a tokenizer. Released files determine all but patch_nums, phi_ratio, beta, entropy, znorm and
    unit_codes."""

    ch: int = 160                               # width of the highest resolution
    ch_mult: tuple = (1, 1, 2, 2, 4)            # width of each level / ch. All levels but the last halve the size
    num_res_blocks: int = 2                     # per encoder level. Decoder levels have one more
    attn_lowest: bool = True                    # attention after each block of the lowest resolution
    attn_mid: bool = True                       # attention in the middle
    z_channels: int = 32                        # channels of f, width of the codebook
    vocab_size: int = 4096                      # V. 0 means that a token is one bit per channel, without a codebook
    patch_nums: tuple = PATCH_NUMS[256]         # schedule that methods use when they are given no other
    phi_count: int = 4                          # number of convolutions phi that the scales share. 0: one per scale
    phi_ratio: float = 0.5                      # phi(x) = (1 - ratio) x + ratio conv(x)
    quant_kernel: int = 3                       # kernel of the convolutions before and after the quantizer. 0: none
    beta: float = 0.25                          # weight of the commitment loss
    entropy: float = 0.1                        # weight of the entropy loss, of bits or of a single-scale codebook
    znorm: bool = False                         # look codes up by cosine instead of distance
    single_scale: bool = False                  # one token map instead of a sequence
    unit_codes: bool = True                     # codes of a single-scale codebook have length 1
    hidden_channels: int = 0                    # channels of encoder output and decoder input. 0: z_channels

    @property
    def stride(self):
        """Pixels per feature-map cell and side."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class KLConfig:
    """Sizes of an autoencoder with a KL head. Files determine all but scaling."""

    ch: int = 128
    ch_mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4
    scaling: float = 0.18215                    # 1 / standard deviation of its latents

    stride = Config.stride


def _bits(d, **changes):
    """Config of Infinity's tokenizers: d bits per token, and no attention."""
    base = dict(ch=128, ch_mult=(1, 2, 4, 4, 4), attn_lowest=False, attn_mid=False, vocab_size=0, phi_count=0,
                quant_kernel=0, patch_nums=schedule(pixels="0.06M"))
    return Config(**base | dict(z_channels=d) | changes)


def _single(side, ch_mult, **changes):
    """Config of LlamaGen's tokenizers: one map of tokens, a codebook of few channels, 1 x 1 convolutions around it."""
    base = dict(ch=128, ch_mult=ch_mult, z_channels=8, hidden_channels=256, vocab_size=16384, patch_nums=(side,),
                quant_kernel=1, entropy=0.0, single_scale=True)
    return Config(**base | changes)


CONFIGS = {
    "vae_ch160v4096z32": Config(),
    "vq_ds16_c2i": _single(16, (1, 1, 2, 2, 4)),                            # side at 256 pixels
    "vq_ds8_c2i": _single(32, (1, 2, 2, 4)),
    "vq_ds16_t2i": _single(16, (1, 1, 2, 2, 4)),
    **{f"infinity_vae_d{d}": _bits(d) for d in (16, 24, 32, 64)},
    "infinity_vae_d32reg": _bits(32),
    "infinity_vae_d56_f8_14_patchify": _bits(14, ch_mult=(1, 2, 4, 4),     # 8 pixels per token: maps of twice the size
                                             patch_nums=tuple((2 * h, 2 * w) for h, w in schedule(pixels="0.06M"))),
    "sd-vae-ft-mse": KLConfig(),
    # trained in demo/, the emoji on 32 x 32 pixels and the heads on 64 x 64
    "emoji_vq": Config(ch=32, ch_mult=(1, 2, 4), num_res_blocks=1, attn_lowest=False, z_channels=16, vocab_size=4096,
                       patch_nums=(1, 2, 3, 4, 6, 8)),
    "emoji_vq_single": _single(8, (1, 2, 4), ch=32, num_res_blocks=1, attn_lowest=False, hidden_channels=64,
                               vocab_size=4096),
    "talking_head_kl": KLConfig(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, scaling=1.0),
    "emoji_bsq": _bits(16, ch=32, ch_mult=(1, 2, 4), num_res_blocks=1, patch_nums=(1, 2, 4, 6, 8)),
}


# ----------------------------------------------------------------------------------------------------------------------
# Encoder and decoder


def norm_silu(norm, x, silu=True):
    """silu(norm(x)), or norm(x) with silu=False, for a GroupNorm module. `norm.exact` asks for exact statistics."""
    exact = getattr(norm, "exact", False)
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu, exact)


def group_norm(channels):
    """The normalisation of all tokenizers. It has 32 groups, so widths are multiples of 32."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the skip path where the width changes."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x):                                                   # (B, c_in, H, W) -> (B, c_out, H, W)
        h = self.conv1(norm_silu(self.norm1, x))
        h = self.conv2(norm_silu(self.norm2, h))
        h += x if self.nin_shortcut is None else self.nin_shortcut(x)       # in place: h is a large tensor of its own
        return h


class AttnBlock(nn.Module):
    """Single-head self-attention over all H * W positions, with a residual connection."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):                                                   # (B, C, H, W)
        qkv = self.qkv(norm_silu(self.norm, x, silu=False))
        q, k, v = rearrange(qkv, "b (three c) h w -> three b 1 (h w) c", three=3)
        h = F.scaled_dot_product_attention(q, k, v)                         # scale C ** -0.5
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halves the resolution. Zeros pad the right and bottom only, as in the code that the weights were trained with."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, attention after each (or none), then a change of resolution (or none)."""

    def __init__(self, c_in, c_out, num_blocks, attn=False, downsample=False, upsample=False):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if j == 0 else c_out, c_out) for j in range(num_blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(num_blocks if attn else 0))
        self.downsample = Downsample(c_out) if downsample else None
        self.upsample = Upsample(c_out) if upsample else None

    def forward(self, x):
        for j, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[j](x)
        resample = self.downsample or self.upsample
        return resample(x) if resample else x


class Middle(nn.Module):
    """The lowest resolution, between the levels and the latent: block, attention (or none), block."""

    def __init__(self, channels, attn):
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = AttnBlock(channels) if attn else None
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x):
        x = self.block_1(x)
        if self.attn_1:
            x = self.attn_1(x)
        return self.block_2(x)


class Encoder(nn.Module):
    """Image (B, 3, H * stride, W * stride) -> (B, out_channels, H, W).

    out_channels: channels of the latent, or twice as many for a KL head, which reads them as mean and log-variance.
    """

    def __init__(self, ch, ch_mult, num_res_blocks, out_channels, attn_lowest=True, attn_mid=True):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(widths[i - 1] if i else ch, w, num_res_blocks, attn=attn_lowest and i == last, downsample=i < last)
            for i, w in enumerate(widths))
        self.mid = Middle(widths[-1], attn_mid)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(norm_silu(self.norm_out, self.mid(x)))


class Decoder(nn.Module):
    """Latent (B, in_channels, H, W) -> image (B, 3, H * stride, W * stride), not clamped.

    `up` is indexed by resolution like the encoder's `down`: up[-1] is the coarsest level and runs first.
    """

    def __init__(self, ch, ch_mult, num_res_blocks, in_channels, attn_lowest=True, attn_mid=True):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], attn_mid)
        self.up = nn.ModuleList(
            Level(widths[min(i + 1, last)], w, num_res_blocks + 1, attn=attn_lowest and i == last, upsample=i > 0)
            for i, w in enumerate(widths))
        self.norm_out = group_norm(ch)
        self.conv_out = nn.Conv2d(ch, 3, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(norm_silu(self.norm_out, x))


# ----------------------------------------------------------------------------------------------------------------------
# Quantizers
#
#     ResidualQuantizer          the loop over scales, shared by the two multi-scale quantizers
#       MultiScaleBSQ            Infinity: tokens are bits
#       CodebookQuantizer        tokens are rows of a codebook
#         MultiScaleVQ           VAR: phi, statistics per scale
#         SingleScaleVQ          LlamaGen: replaces the loop by one look-up of unit vectors


def area_resize(x, size):
    """(B, C, H, W) -> (B, C, *size). Each output is the mean of the cells that it covers, in part or whole."""
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="area")


def bicubic_resize(x, size):
    """(B, C, h, w) -> (B, C, *size). Upsamples smoothly."""
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bicubic")


def bilinear_resize(x, size):
    """(B, C, h, w) -> (B, C, *size). On the way down it skips cells: it has no anti-aliasing."""
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear")


def as_pairs(patch_nums):
    """Sides or (h, w) pairs -> list of (h, w)."""
    return [(p, p) if isinstance(p, int) else tuple(p) for p in patch_nums]


def straight_through(x, codes):
    """The values of `codes` with the gradient of x, as if there were no quantizer between encoder and decoder."""
    return x + (codes - x).detach()


def gather_from_all(x):
    """The tensor x of every training process, in the order of their ranks: a list."""
    if not (dist.is_available() and dist.is_initialized()):
        return [x]
    gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, x.contiguous())
    return gathered


class ResidualQuantizer(nn.Module):
    """A feature map as a sequence of token maps, coarse to fine, each encoding what the coarser ones left over.

    Subclasses define what a token is: `quantize` maps features to tokens and codes, `embed` maps tokens to codes,
    `contribution` brings codes to full size, and `next_input` is what a transformer sees. Everything is computed in
    float32. In half precision a few tokens would flip, and all later scales would then encode other residuals.
    Methods take an optional schedule `patch_nums` of sides or (h, w) pairs, whose last entry is the size of f.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_nums = tuple(config.patch_nums)

    def quantize_scales(self, f, patch_nums=None):
        """Algorithm 1 of VAR: yields (z, tokens, f_hat) at every scale, coarse to fine.

        z: (B, C, h, w) the residual seen at that scale; tokens: (B, h * w, ...); f_hat: (B, C, H, W) the sum so far.
        Raises ValueError if the schedule does not end with the size of f.
        """
        sizes = as_pairs(patch_nums or self.patch_nums)
        if tuple(f.shape[-2:]) != sizes[-1]:
            raise ValueError(f"the feature map is {f.shape[-2]}x{f.shape[-1]}, but the schedule ends with "
                             f"{sizes[-1][0]}x{sizes[-1][1]}: pass patch_nums that end with the feature size")
        f = f.float()
        f_hat = torch.zeros_like(f)
        for k, size in enumerate(sizes):
            z = area_resize(f - f_hat.detach(), size)
            tokens, h = self.quantize(z)
            f_hat = f_hat + self.contribution(h, k, len(sizes), sizes[-1])
            yield z, tokens, f_hat

    @torch.no_grad()
    def encode(self, f, patch_nums=None):
        """f (B, C, H, W) -> list of K tensors of tokens (B, h * w, ...)."""
        return [tokens for _, tokens, _ in self.quantize_scales(f, patch_nums)]

    def partial_sums(self, tokens, patch_nums=None):
        """Algorithm 2 of VAR: tokens of the first scales -> list of f_hat (B, C, H, W), one after each of them."""
        sizes = as_pairs(patch_nums or self.patch_nums)
        sums = []
        for k, (tokens_k, size) in enumerate(zip(tokens, sizes)):
            h = self.contribution(self.embed(tokens_k, size), k, len(sizes), sizes[-1])
            sums.append(sums[-1] + h if sums else h)
        return sums

    @torch.no_grad()
    def teacher_input(self, tokens, patch_nums=None):
        """Tokens of all scales -> the transformer's inputs at scales 1 .. K - 1: (B, L - h_0 w_0, C) float32."""
        sums = self.partial_sums(tokens[:-1], patch_nums)
        return torch.cat([self.next_input(f_hat, k + 1, patch_nums) for k, f_hat in enumerate(sums)], 1)


class CodebookQuantizer(ResidualQuantizer):
    """Tokens are rows of one codebook, (B, h * w) int64. Official key: `quantize.embedding.weight`."""

    def __init__(self, config):
        super().__init__(config)
        self.codebook = nn.Parameter(torch.zeros(config.vocab_size, config.z_channels))
        # How many training passes ago each code was last used. Official files do not have this buffer.
        self.register_buffer("steps_unused", torch.zeros(config.vocab_size, dtype=torch.int64))

    def nearest(self, z):
        """Feature map z (B, C, h, w) -> index of the nearest code per cell, row-major (B, h * w)."""
        flat = rearrange(z.detach().float(), "b c h w -> (b h w) c")
        by_cosine = self.config.znorm or self.config.single_scale and self.config.unit_codes
        with torch.autocast(z.device.type, enabled=False):
            return vq_nearest(flat, self.codebook, l2norm=by_cosine).view(z.shape[0], -1)

    def quantize(self, z):
        """z (B, C, h, w) -> indices (B, h * w) and their codes (B, C, h, w)."""
        index = self.nearest(z)
        return index, self.embed(index, z.shape[-2:])

    def embed(self, index, size):
        """Indices (B, h * w) -> their codes as a map (B, C, h, w)."""
        return rearrange(F.embedding(index, self.codebook), "b (h w) c -> b c h w", h=size[0])

    @staticmethod
    def coverage(tokens, config):
        """Share of the codebook, in percent, that `tokens`, a list of (B, h * w), make use of."""
        return 100 * len(torch.cat(tokens, 1).unique()) / config.vocab_size

    def _count_unused(self, counts):
        """Advances `steps_unused` by one training pass in which code i was chosen counts[i] times."""
        self.steps_unused.copy_(torch.where(counts > 0, 0, self.steps_unused + 1))

    @torch.no_grad()
    def restart_codes(self, f, dead, generator=None):
        """Moves the codes marked in `dead` (V,) bool onto random residuals of the batch f; returns how many.

        This is the cure for codebook collapse: a code that is never the nearest never gets a gradient. Processes that
        train together must broadcast the codebook afterwards.
        """
        if self.config.znorm:
            raise ValueError("restart_codes compares by distance: it does not apply to a znorm codebook")
        residuals = torch.cat([rearrange(z, "b c h w -> (b h w) c") for z, _, _ in self.quantize_scales(f)])
        where = dead.nonzero()[:, 0]
        drawn = torch.randint(len(residuals), (len(where),), generator=generator, device=residuals.device)
        self.codebook[where] = residuals[drawn]
        self.steps_unused[where] = 0
        return len(where)

    @torch.no_grad()
    def init_codebook(self, f, generator=None, rounds=8):
        """Fills the codebook from features f (B, C, H, W): random residuals first; then codes that f does not use are
        drawn again, `rounds` times."""
        self.codebook.zero_()
        self.restart_codes(f, torch.ones_like(self.steps_unused, dtype=torch.bool), generator)
        for _ in range(rounds):
            dead = torch.ones_like(self.steps_unused, dtype=torch.bool)
            dead[torch.cat(self.encode(f), 1).flatten()] = False
            self.restart_codes(f, dead, generator)


class SingleScaleVQ(CodebookQuantizer):
    """LlamaGen's quantizer, VQGAN's with unit-length codes: every cell of f is one token, and there is no residual.

    Two choices of LlamaGen (section 3.1) keep the codes in use. The low dimension, 8 channels instead of 256, spreads
    the codes: in many channels a few codes are nearest to everything, and the others die. The unit length makes the
    look-up compare directions, so that no code wins by its length alone. The stored codebook need not have unit
    length. f may have any size; without a schedule, tokens are taken for a square map. Official key besides the
    codebook: `quantize.codebook_used`, the last 65,536 indices of training, is our `recent`.
    """

    SHARPNESS = 100.0                           # inverse temperature of the entropy loss

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("recent", torch.zeros(65536))                  # starts as zeros: code 0 counts as used

    def quantize_scales(self, f, patch_nums=None):
        """Yields (z, tokens, codes) once: unit features and their codes, both (B, C, H, W), and indices (B, H * W)."""
        z = self.unit(f.float())
        index, codes = self.quantize(z)
        yield z, index, codes

    def partial_sums(self, tokens, patch_nums=None):
        """[indices (B, h * w)] -> [their codes (B, C, h, w)]."""
        index, = tokens
        size, = as_pairs(patch_nums or [math.isqrt(index.shape[1])])
        return [self.embed(index, size)]

    def embed(self, index, size):
        """Indices (B, h * w) -> their codes as a map (B, C, h, w). Raises ValueError for a wrong size."""
        if index.shape[1] != size[0] * size[1]:
            raise ValueError(f"{index.shape[1]} tokens are no map of {size[0]}x{size[1]}: pass patch_nums=[(h, w)]")
        return self.unit(super().embed(index, size))

    def unit(self, x):
        """x with unit length along dimension 1; with unit_codes=False x itself."""
        return F.normalize(x, dim=1) if self.config.unit_codes else x

    # training

    def forward(self, f):
        """f (B, C, H, W) -> (codes with a straight-through gradient, loss, (1,) percent of codes in `recent`).

        The reconstruction's gradient goes straight to the encoder; the codes learn from the loss alone.
        """
        z = self.unit(f.float())
        index, codes = self.quantize(z)
        if self.training:
            self._record(index)
        usage = 100 * len(self.recent.unique()) / len(self.codebook)
        return straight_through(z, codes), sum(self.losses(z, codes)), z.new_tensor([usage])

    def losses(self, z, codes):
        """Unit features and their codes (B, C, h, w) -> three losses, scalars, already weighted.

        |e - sg(z)|^2 trains the codes; beta |sg(e) - z|^2 keeps the encoder near them; the entropy loss has weight 0
        in the released models. (sg: stop-gradient)
        """
        follow = F.mse_loss(codes, z.detach())
        commit = self.config.beta * F.mse_loss(z, codes.detach())
        if not self.config.entropy:
            return follow, commit, z.new_zeros(())
        return follow, commit, self.config.entropy * self.entropy_loss(z)

    def entropy_loss(self, z):
        """Mean entropy of the cells' soft assignments, minus the entropy of the mean assignment, a scalar.

        A cell's assignment is the softmax of its negative distances to all codes. The first term is low if each cell
        has a clear code, the second high if all codes are used. N cells take memory for N x V numbers.
        """
        z = rearrange(z, "b c h w -> (b h w) c")
        e = self.unit(self.codebook)
        distances = z.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * z @ e.T                       # (N, V)
        scores = -self.SHARPNESS * distances
        p = scores.softmax(-1)
        log_p = (scores + 1e-5).log_softmax(-1)         # a softmax ignores this 1e-5; it stands here as in the original
        mean_p = p.mean(0)                                                  # (V,)
        return -(p * log_p).sum(-1).mean() + (mean_p * (mean_p + 1e-5).log()).sum()

    @torch.no_grad()
    def _record(self, index):
        """Appends the indices of all processes to `recent`, whose oldest entries drop out."""
        for part in gather_from_all(index.flatten()):
            self.recent.copy_(torch.cat([self.recent, part.to(self.recent.dtype)])[-len(self.recent):])
            self._count_unused(part.bincount(minlength=len(self.codebook)))


def phi_index(k, num_scales, num_phi):
    """Index of the convolution phi that scale k of num_scales uses: the one whose tick is nearest to k / (K - 1).

    Neighbouring scales share a phi because they resize by similar factors and need a similar repair. Ticks are evenly
    spaced in [1/(2n), 1 - 1/(2n)] for n convolutions, but in [1/12, 11/12] for n = 4, as in the official code. The
    released tokenizer therefore uses 0 0 1 1 1 2 2 3 3 3. Its scales 2 and 7 lie half-way between two ticks. Float64
    rounding decides for the upper tick both times, as in the official code; float32 would not at scale 7.
    """
    margin = 1 / (3 * num_phi) if num_phi == 4 else 1 / (2 * num_phi)
    ticks = np.linspace(margin, 1 - margin, num_phi)
    return int(np.argmin(np.abs(ticks - k / max(num_scales - 1, 1))))


class MultiScaleVQ(CodebookQuantizer):
    """VAR's quantizer (section 3.2): indices on every scale. Official keys besides the codebook:
    `quantize.quant_resi.*` is our phi, `quantize.ema_vocab_hit_SV` our hits."""

    def __init__(self, config):
        super().__init__(config)
        V, C, K = config.vocab_size, config.z_channels, len(self.patch_nums)
        self.phi = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1) for _ in range(config.phi_count or K))
        self.register_buffer("hits", torch.zeros(K, V))                     # moving average of how often a code is used
        self.register_buffer("hit_updates", torch.zeros((), dtype=torch.int64))

    def contribution(self, h, k, num_scales, size):
        """What scale k adds to f_hat: its code map h (B, C, h, w), resized to `size` and corrected by phi_k."""
        h = bicubic_resize(h, size)
        phi = self.phi[phi_index(k, num_scales, len(self.phi))]
        with torch.autocast(h.device.type, enabled=False):
            return (1 - self.config.phi_ratio) * h + self.config.phi_ratio * phi(h)

    def next_input(self, f_hat, k, patch_nums=None):
        """What the transformer sees at scale k: f_hat of the scales before, resized to scale k: (B, h * w, C)."""
        return area_resize(f_hat, as_pairs(patch_nums or self.patch_nums)[k]).flatten(2).transpose(1, 2)

    # training

    def forward(self, f):
        """f (B, C, H, W) -> (f_hat with a straight-through gradient, loss, usage per scale in percent).

        With f_hat the sum after each scale, |f_hat - sg(f)|^2 trains the codes and phi, and nothing else does: the
        gradients of reconstruction, LPIPS and discriminator go straight to the encoder. beta * |f - sg(f_hat)|^2 keeps
        the encoder near the codes. (sg: stop-gradient)
        """
        f = f.float()
        loss = 0.0
        counts = []
        for _, index, f_hat in self.quantize_scales(f):
            loss = loss + self.config.beta * F.mse_loss(f, f_hat.detach()) + F.mse_loss(f_hat, f.detach())
            counts.append(index.flatten().bincount(minlength=len(self.codebook)).float())
        if self.training:
            self._record(torch.stack(counts))
        # The original's rule: a code counts as used at 8 % of the hits it would get if the cells of the last scale were
        # spread evenly over all codes.
        threshold = 0.08 * f[:, 0].numel() / len(self.codebook)
        usage = (self.hits >= threshold).float().mean(1) * 100
        return straight_through(f, f_hat), loss / len(self.patch_nums), usage

    @torch.no_grad()
    def _record(self, counts):
        """Updates the moving averages with counts (K, V). Their decay is 0 at first, 0.9 up to update 100, then 0.99.

        As in the original every scale counts as an update. So only the first scale of the first step has decay 0. The
        counts of several processes enter one after the other, while the original adds them up. The result is then the
        same whether several processes share a batch or one process takes its parts in turn.
        """
        for process_counts in gather_from_all(counts):
            for hits, count in zip(self.hits, process_counts):
                decay = torch.where(self.hit_updates < 100, 0.9, 0.99) * (self.hit_updates > 0)
                hits.copy_(hits * decay + count * (1 - decay))
                self.hit_updates += 1
            self._count_unused(process_counts.sum(0))


class MultiScaleBSQ(ResidualQuantizer):
    """Infinity's quantizer (section 3.2; BSQ): tokens are d bits, (B, h * w, d) bool, the signs of the d channels.

    The code of bits b is (2 b - 1) / sqrt(d), a corner of the cube inside the unit sphere, at every scale. The nearest
    of the 2^d corners to a direction is the one with its signs. The quantizer has no weights. Official files contain
    `quantize(r).lfq.mask`, the value of each bit in an integer index, highest first; nothing needs it.
    """

    SHARPNESS = 100.0                           # inverse temperature of the entropy loss

    def quantize(self, z):
        """z (B, d, h, w) -> bits (B, h * w, d) and codes (B, d, h, w); a channel of exactly zero gives bit 0.

        The codes have the gradient of u = z / |z|: it passes through the normalisation, but not through the signs.
        """
        u = F.normalize(z, dim=1)
        bits = rearrange(u > 0, "b d h w -> b (h w) d")
        codes = self.embed(bits, z.shape[-2:])
        if u.requires_grad:                                                 # only then, as u + (codes - u) is rounded
            codes = straight_through(u, codes)
        return bits, codes

    def embed(self, bits, size):
        """Bits (B, h * w, d) -> codes of length 1 as a map (B, d, h, w)."""
        return rearrange(2 * bits.float() - 1, "b (h w) d -> b d h w", h=size[0]) * bits.shape[-1] ** -0.5

    def contribution(self, h, k, num_scales, size):
        """What scale k adds to f_hat: its code map h (B, d, h, w) at the size of f_hat."""
        return bilinear_resize(h, size)

    def next_input(self, f_hat, k, patch_nums=None):
        """What the transformer sees at scale k: f_hat of the scales before, resized to scale k: (B, h * w, d).
        It is bilinear, although the quantizer resizes by area, because the released weights were trained this way."""
        return bilinear_resize(f_hat, as_pairs(patch_nums or self.patch_nums)[k]).flatten(2).transpose(1, 2)

    @staticmethod
    def coverage(tokens, config):
        """Mean entropy of each bit over a list of (B, h * w, d), in percent: 100 if every bit is set half the time."""
        p = torch.cat(tokens, 1).float().mean((0, 1))
        return 100 * (torch.special.entr(p) + torch.special.entr(1 - p)).mean().item() / math.log(2)

    # training

    def forward(self, f):
        """f (B, d, H, W) -> (f_hat with a straight-through gradient, loss, coverage per scale in percent)."""
        losses, coverage = [], []
        for z, bits, f_hat in self.quantize_scales(f):
            commitment, each, overall = self.losses(z)
            losses.append(self.config.beta * commitment + self.config.entropy * (each - overall) / self.SHARPNESS)
            coverage.append(self.coverage([bits], self.config))
        return f_hat, torch.stack(losses).mean(), torch.tensor(coverage)

    def losses(self, z):
        """z (B, d, h, w) -> commitment, mean |u - code|^2; entropy of one position's bits; entropy of all bits.

        The entropies are those of BSQ, in closed form: with a soft assignment of u to all 2^d corners the bits are
        independent. Bit j is 0 with probability p_j = sigmoid(-4 sharpness u_j / sqrt(d)), the softmax over the two
        squared distances |u_j -+ 1/sqrt(d)|^2 times -sharpness. The first entropy should be low (each
        position is sure of its bits), the second high (both values of each bit are used).
        """
        def entropy(p):
            return -(p * (p + 1e-8).log() + (1 - p) * (1 - p + 1e-8).log())
        u = F.normalize(z, dim=1)
        p = torch.sigmoid(-4 * self.SHARPNESS * z.shape[1] ** -0.5 * u)
        commitment = F.mse_loss(u, torch.where(u > 0, 1, -1) * z.shape[1] ** -0.5)
        return commitment, entropy(p).sum(1).mean(), entropy(p.mean((0, 2, 3))).sum()


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer


class VQVAE(nn.Module):
    """Encoder, quantizer, decoder. Images are (B, 3, h, w) in [-1, 1], h and w divisible by the stride."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        hidden = config.hidden_channels or config.z_channels
        sizes = (config.ch, config.ch_mult, config.num_res_blocks, hidden, config.attn_lowest, config.attn_mid)
        if config.single_scale:
            quantizer = SingleScaleVQ
        elif config.vocab_size:
            quantizer = MultiScaleVQ
        else:
            quantizer = MultiScaleBSQ
        self.encoder = Encoder(*sizes)
        self.quant_conv = self._conv(hidden, config.z_channels)
        self.quantize = quantizer(config)
        self.post_quant_conv = self._conv(config.z_channels, hidden)
        self.decoder = Decoder(*sizes)
        # Large convolutions run up to 1.7 times faster channels_last on CPU, and without layout copies on tensor cores.
        self.encoder.to(memory_format=torch.channels_last)
        self.decoder.to(memory_format=torch.channels_last)

    def _conv(self, c_in, c_out):
        kernel = self.config.quant_kernel
        return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2) if kernel else nn.Identity()

    def encode(self, image):
        """Image in [-1, 1] -> continuous features f (B, C, H, W). Raises ValueError for sizes that do not fit."""
        s = self.config.stride
        if image.dim() != 4 or image.shape[1] != 3 or image.shape[2] % s or image.shape[3] % s:
            raise ValueError(f"images must be (B, 3, h, w) with h and w divisible by {s}, not {tuple(image.shape)}")
        return self.quant_conv(self.encoder(image.to(memory_format=torch.channels_last)))

    def decode(self, f_hat):
        """Quantized features (B, C, H, W) -> image in [-1, 1], float32. The decoder computes in its weights' dtype."""
        return self._decode(f_hat.to(self.decoder.conv_in.weight.dtype)).float().clamp(-1, 1)

    def decode_resized(self, f_hat, size):
        """decode, with a bicubic resize to size x size pixels before the clamp and no anti-aliasing. LlamaGen's authors
        resize pictures of 384 pixels to 256 in this way before they evaluate them."""
        image = self._decode(f_hat.to(self.decoder.conv_in.weight.dtype)).float()
        return F.interpolate(image, (size, size), mode="bicubic").clamp(-1, 1)

    @torch.no_grad()
    def decode_tiled(self, f_hat, tile, overlap=8):
        """decode, in overlapping tiles of `tile` cells that are cross-faded: less memory for large pictures.

        Close to decode, not equal: GroupNorm sees a tile's statistics instead of the picture's. Raises ValueError for
        tiles that are not larger than the overlap.
        """
        B, _, H, W = f_hat.shape
        s = self.config.stride
        if tile <= overlap:
            raise ValueError(f"tiles of {tile} cells do not overlap by {overlap}")

        def starts(n):
            return [*range(0, max(n - tile, 0), tile - overlap), max(n - tile, 0)]

        def fade(n):                                                        # rises and falls linearly at the borders
            rising = torch.arange(1, n + 1, device=f_hat.device)
            return torch.minimum(rising, rising.flip(0)).clamp(max=overlap * s)
        image = f_hat.new_zeros(B, 3, H * s, W * s, dtype=torch.float32)
        weight = torch.zeros_like(image)
        for y, x in itertools.product(starts(H), starts(W)):
            part = self.decode(f_hat[:, :, y:y + tile, x:x + tile])
            mask = (fade(part.shape[2])[:, None] * fade(part.shape[3])).to(part.dtype)
            where = ..., slice(y * s, y * s + part.shape[2]), slice(x * s, x * s + part.shape[3])
            image[where] += part * mask
            weight[where] += mask
        return image / weight

    def _decode(self, f_hat):
        return self.decoder(self.post_quant_conv(f_hat).to(memory_format=torch.channels_last))

    @torch.no_grad()
    def tokenize(self, image, patch_nums=None):
        """Image in [-1, 1] -> K tensors of tokens, coarse to fine: indices (B, h * w) or bits (B, h * w, d)."""
        return self.quantize.encode(self.encode(image), patch_nums)

    @torch.no_grad()
    def detokenize(self, tokens, patch_nums=None, all_scales=False):
        """Tokens of all scales -> image in [-1, 1]; with all_scales=True a list, the image after every scale."""
        sums = self.quantize.partial_sums(tokens, patch_nums)
        return [self.decode(f_hat) for f_hat in sums] if all_scales else self.decode(sums[-1])

    @torch.no_grad()
    def reconstruct(self, image, patch_nums=None, all_scales=False):
        """Image in [-1, 1] -> what its tokens keep of it; with all_scales=True a list, the image after every scale."""
        sums = [f_hat for _, _, f_hat in self.quantize.quantize_scales(self.encode(image), patch_nums)]
        return [self.decode(f_hat) for f_hat in sums] if all_scales else self.decode(sums[-1])

    def forward(self, image, quantize=True):
        """Training pass -> (reconstruction, not clamped; quantizer loss; usage per scale in percent, or None).

        quantize=False passes f through unquantized: a warm-up, after which `init_codebook` has features to start from.
        """
        f = self.encode(image)
        if not quantize:
            return self._decode(f), f.new_zeros(()), None
        f_hat, loss, usage = self.quantize(f)
        return self._decode(f_hat), loss, usage

    @torch.no_grad()
    def init_weights(self, generator=None):
        """Random weights drawn from `generator`: PyTorch's default for convolutions, a small normal for the codes of
        MultiScaleVQ, and random directions of length 1 for those of SingleScaleVQ."""
        init_default(self, generator)
        if self.config.single_scale:
            codebook = self.quantize.codebook.uniform_(-1, 1, generator=generator)
            codebook.copy_(F.normalize(codebook, dim=1))
        elif self.config.vocab_size:
            self.quantize.codebook.normal_(0, self.config.z_channels ** -0.5, generator=generator)


class Posterior(namedtuple("Posterior", "mean std scaling")):
    """The distribution of a picture's latent: an independent Gaussian per number. mean, std: (B, C, H, W)."""

    def sample(self, generator=None):
        """A scaled latent (B, C, H, W), drawn with `generator`; without one, the scaled mean."""
        if generator is None:
            return self.mean * self.scaling
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return (self.mean + self.std * noise) * self.scaling

    def kl(self):
        """KL divergence from the standard normal, (B,): summed over all numbers of a latent."""
        variance = self.std.square()
        return 0.5 * (self.mean.square() + variance - 1 - variance.log()).sum((1, 2, 3))


class KLAutoencoder(nn.Module):
    """Encoder, Gaussian latent, decoder (latent diffusion, section 3.1).

    Images are (B, 3, h, w) in [-1, 1], h and w divisible by the stride. Latents are (B, 4, h / stride, w / stride),
    scaled to a standard deviation of about 1.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.z_channels
        sizes = (config.ch, config.ch_mult, config.num_res_blocks)
        self.encoder = Encoder(*sizes, 2 * C, attn_lowest=False)
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1)
        self.post_quant_conv = nn.Conv2d(C, C, 1)
        self.decoder = Decoder(*sizes, C, attn_lowest=False)
        for m in self.encoder.modules():
            if isinstance(m, nn.GroupNorm):
                m.exact = True                                              # masked pictures are constant in part
        self.to(memory_format=torch.channels_last)

    def encode(self, image):
        """Image -> Posterior of its latent."""
        image = image.to(self.quant_conv.weight.dtype, memory_format=torch.channels_last)
        mean, log_variance = self.quant_conv(self.encoder(image)).chunk(2, 1)
        std = (0.5 * log_variance.clamp(-30, 20)).exp()                     # the limits of Stable Diffusion
        return Posterior(mean, std, self.config.scaling)

    def decode(self, z):
        """Scaled latents (B, C, H, W) -> image, float32, not clamped."""
        z = (z / self.config.scaling).to(self.quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(z).to(memory_format=torch.channels_last)).float()

    def forward(self, image, generator=None):
        """Training pass -> (reconstruction, not clamped; KL divergence per number of the picture, a scalar)."""
        posterior = self.encode(image)
        return self.decode(posterior.sample(generator)), posterior.kl().mean() / image[0].numel()

    @torch.no_grad()
    def reconstruct(self, image):
        """Image -> the decoded mean of its latent, clamped to [-1, 1]."""
        return self.decode(self.encode(image).sample()).clamp(-1, 1)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """PyTorch's default for convolutions, drawn from `generator`."""
        init_default(self, generator)


def init_default(module, generator=None):
    """PyTorch's default initialisation, drawn from `generator`; norms get weight 1 and bias 0."""
    for m in module.modules():
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            bound = m.weight[0].numel() ** -0.5                             # Kaiming uniform with a = sqrt(5)
            m.weight.uniform_(-bound, bound, generator=generator)
            if m.bias is not None:
                m.bias.uniform_(-bound, bound, generator=generator)
        elif isinstance(m, (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d)):
            m.weight.fill_(1)
            m.bias.zero_()


# ----------------------------------------------------------------------------------------------------------------------
# Loading a tokenizer

# Infinity's files wrap each convolution and each norm in a module. Some older files do not.
UNWRAP = [(f"{name}.conv", name) for name in ("conv_in", "conv_out", "conv1", "conv2", "nin_shortcut",
                                              "downsample.conv", "upsample.conv")]
UNWRAP += [(f"{name}.norm", name) for name in ("norm1", "norm2", "norm_out")]


def renames(config):
    """Official key <-> our key; {} stands for a number. Every key not covered is the same in both."""
    if not config.vocab_size:
        return UNWRAP
    codebook = ("quantize.embedding.weight", "quantize.codebook")
    if config.single_scale:
        last = len(config.ch_mult) - 1
        table = [codebook, ("quantize.codebook_used", "quantize.recent"),
                 ("encoder.conv_blocks.{}.res", "encoder.down.{}.block"), ("encoder.conv_blocks", "encoder.down")]
        for i in range(last + 1):                       # LlamaGen's decoder numbers levels in the order they run
            table.append((f"decoder.conv_blocks.{i}.res", f"decoder.up.{last - i}.block"))
            table.append((f"decoder.conv_blocks.{i}", f"decoder.up.{last - i}"))
        return table + [("mid.0", "mid.block_1"), ("mid.1", "mid.attn_1"), ("mid.2", "mid.block_2")]
    theirs = {0: "quant_resi.{}.", 1: "quant_resi.qresi."}.get(config.phi_count, "quant_resi.qresi_ls.{}.")
    ours = "phi.0." if config.phi_count == 1 else "phi.{}."
    return [codebook, ("quantize.ema_vocab_hit_SV", "quantize.hits"), (f"quantize.{theirs}", f"quantize.{ours}")]


QKV = ("qkv", ("q", "k", "v"))              # files of LlamaGen and Stable Diffusion have three layers where we have one
BOOKKEEPING = {"quantize.hit_updates", "quantize.steps_unused"}             # ours alone, not in official files
STATISTICS = {"quantize.hits", "quantize.recent"}       # statistics of training, which files may lack


def infer_config(state, path, patch_nums=None):
    """The Config of an official state dict, read from its shapes.

    No tensor holds the sides of the token maps: they are `patch_nums`, or those of 256 pixels if their number fits.
    """
    single = any(k.startswith("encoder.conv_blocks.") for k in state)
    down, block, mid = ("conv_blocks", "res", "1") if single else ("down", "block", "attn_1")   # fragments of keys
    q = "q" if single else "qkv"
    levels = 1 + max(int(k.split(".")[2]) for k in state if k.startswith(f"encoder.{down}."))
    ch = len(state["encoder.conv_in.weight"])
    widths = [len(state[f"encoder.{down}.{i}.{block}.0.conv1.weight"]) for i in range(levels)]
    first_level = re.compile(rf"encoder\.{down}\.0\.{block}\.\d+\.conv1\.weight")
    sizes = dict(ch=ch, ch_mult=tuple(width // ch for width in widths),
                 num_res_blocks=sum(bool(first_level.match(k)) for k in state))
    if "quantize.embedding.weight" not in state:
        like = "infinity_vae_d56_f8_14_patchify" if levels == 4 else "infinity_vae_d16"
        patch_nums = patch_nums or CONFIGS[like].patch_nums
        return _bits(len(state["encoder.conv_out.weight"]), patch_nums=tuple(patch_nums), **sizes)
    vocab_size, z_channels = state["quantize.embedding.weight"].shape
    sizes |= dict(vocab_size=vocab_size, z_channels=z_channels, quant_kernel=state["quant_conv.weight"].shape[-1],
                  attn_lowest=f"encoder.{down}.{levels - 1}.attn.0.{q}.weight" in state,
                  attn_mid=f"encoder.mid.{mid}.{q}.weight" in state)
    if single:
        side = 256 // 2 ** (levels - 1)
        return Config(**sizes, hidden_channels=len(state["encoder.conv_out.weight"]), entropy=0.0, single_scale=True,
                      patch_nums=tuple(patch_nums or (side,)))
    if patch_nums is None:
        patch_nums = PATCH_NUMS[256]
        num_scales = len(state.get("quantize.ema_vocab_hit_SV", patch_nums))
        if num_scales != len(patch_nums):
            raise CheckpointError(f"{path}: has {num_scales} scales, whose sizes no file tells; its VAR does, and "
                                  "vq.load takes them as patch_nums=")
    phis = [k for k in state if k.startswith("quantize.quant_resi.") and k.endswith(".weight")]
    shared = any(".qresi" in k for k in phis)
    return Config(**sizes, patch_nums=tuple(patch_nums), phi_count=len(phis) if shared else 0)


def load(path, config=None, patch_nums=None, dtype=torch.float32, weights=None):
    """A VQVAE in eval mode from a released file, a training checkpoint of the original, or a file of ours.

    path: .pth or .safetensors; config: used instead of the inferred one; patch_nums: another schedule, for example
    PATCH_NUMS[512]; dtype: for the decoder only, since tokens need a float32 encoder; weights: see read_checkpoint.
    Raises CheckpointError.
    """
    what = "an image tokenizer (VQVAE)"
    state, header = read_checkpoint(path, nested=(("vae",), ("trainer", "vae_local")), weights=weights)
    if KL_MARK in state:
        raise CheckpointError(f"{path}: an autoencoder without tokens, LatentSync's kind; expected a tokenizer (VQVAE)")
    state = rename_keys({k: v for k, v in state.items() if not k.endswith("lfq.mask")}, UNWRAP)
    codebook = ["quantize.embedding.weight"] if "quant_conv.weight" in state else []
    require(state, "encoder.conv_in.weight", *codebook, path=path, what=what)
    with understanding(path, what):
        if config is None:
            config = read_config(Config, header, path, lambda: infer_config(state, path, patch_nums))
        if patch_nums is not None:
            config = replace(config, patch_nums=tuple(patch_nums))
        hits = state.get("quantize.ema_vocab_hit_SV")
        if hits is not None and len(hits) != len(config.patch_nums):        # statistics of another schedule: reset
            state["quantize.ema_vocab_hit_SV"] = torch.zeros(len(config.patch_nums), config.vocab_size)
        state = rename_keys(state, renames(config))
        if config.single_scale:
            state = join_rows(state, *QKV)
        optional = BOOKKEEPING | STATISTICS
        check_fit(on_meta(VQVAE, config), state, path, optional)
        model = build(VQVAE, config)
        load_strict(model, state, path, optional)
    model.origin = header.origin
    return set_decoder_dtype(model.eval(), dtype)


# Stable Diffusion's names, as diffusers has them, in the order in which they are replaced
KL_RENAMES = (
    [("encoder.down_blocks", "encoder.down"), ("mid_block.resnets.0", "mid.block_1"),
     ("mid_block.resnets.1", "mid.block_2"), ("mid_block.attentions.0", "mid.attn_1"), ("conv_norm_out", "norm_out")],
    [("resnets", "block"), ("downsamplers.0.conv", "downsample.conv"), ("upsamplers.0.conv", "upsample.conv"),
     ("group_norm", "norm"), ("query", "q"), ("key", "k"), ("value", "v"), ("proj_attn", "proj_out")],
    [("conv_shortcut", "nin_shortcut")],
)
KL_MARK = "encoder.mid_block.resnets.0.norm1.weight"                        # a key that only such files have
KL_NEWER = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]       # a later spelling


def _kl_tables(levels):
    """KL_RENAMES for `levels` levels. The file's decoder counts them from the coarsest, ours from the finest."""
    up = [(f"decoder.up_blocks.{i}", f"decoder.up.{levels - 1 - i}") for i in range(levels)]
    return [KL_RENAMES[0] + up, *KL_RENAMES[1:]]


def _infer_kl_config(state):
    widths = []
    while (key := f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in state:
        widths.append(len(state[key]))
    blocks = sum(bool(re.fullmatch(r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight", k)) for k in state)
    ch = len(state["encoder.conv_in.weight"])
    return KLConfig(ch, tuple(w // ch for w in widths), blocks, len(state["quant_conv.weight"]) // 2)


def load_autoencoder(path, config=None, dtype=torch.float32):
    """A KLAutoencoder in eval mode from a folder or file in the layout of diffusers, or from a file of ours.

    Both spellings of the attention's keys are read. config: used instead of the inferred one. Raises CheckpointError.
    """
    what = "an autoencoder (sd-vae-ft-mse, or one of train.py vq)"
    state, header = read_checkpoint(path)
    require(state, KL_MARK, "quant_conv.weight", "encoder.conv_in.weight", path=path, what=what)
    with understanding(path, what):
        if config is None:
            config = read_config(KLConfig, header, path, lambda: _infer_kl_config(state))
        state = rename_keys(state, KL_NEWER)
        for table in _kl_tables(len(config.ch_mult)):
            state = rename_keys(state, table)
        # their attention multiplies matrices where ours convolves 1 x 1: the same numbers
        for k, v in state.items():
            if "attn_1" in k and v.dim() == 2:
                state[k] = v[..., None, None]
        state = join_rows(state, *QKV)
        check_fit(on_meta(KLAutoencoder, config), state, path)
        model = build(KLAutoencoder, config)
        load_strict(model, state, path)
    model.origin = header.origin
    return model.eval().to(dtype)


def _export_kl(model):
    """The state dict of a KLAutoencoder with the keys of sd-vae-ft-mse, in float32."""
    state = split_rows({k: v.float() for k, v in model.state_dict().items()}, *QKV)
    state = {k: v.flatten(1) if "attn_1" in k and v.dim() == 4 else v for k, v in state.items()}
    for table in reversed(_kl_tables(len(model.config.ch_mult))):
        state = rename_keys(state, table, inverse=True)
    return {k: v.contiguous() for k, v in state.items()}


def set_decoder_dtype(model, dtype):
    """Makes the decoder compute in another dtype; encoder and quantizer stay in float32."""
    model.post_quant_conv.to(dtype)
    model.decoder.to(dtype)
    return model


def fingerprint(model):
    """A short hash of a tokenizer, the same in every dtype. Saved with tokens, it tells which tokenizer made them."""
    has_codes = getattr(model.config, "vocab_size", 0)
    weight = model.quantize.codebook if has_codes else model.encoder.conv_out.weight
    return hashlib.sha256(weight.detach().half().cpu().numpy().tobytes()).hexdigest()[:12]


def export(model):
    """The official state dict of a tokenizer, in float32, which the original code loads strictly."""
    if isinstance(model, KLAutoencoder):
        return _export_kl(model)
    state = {k: v.float().contiguous() for k, v in model.state_dict().items() if k not in BOOKKEEPING}
    if model.config.single_scale:
        state = split_rows(state, *QKV)
    state = rename_keys(state, renames(model.config), inverse=True)
    if not model.config.vocab_size:       # 2^(d - 1) ... 1. For d = 64 the first one overflows
        mask = torch.ones(model.config.z_channels, dtype=torch.int64) << torch.arange(model.config.z_channels).flip(0)
        state |= {"quantizer.lfq.mask": mask, "quantize.lfq.mask": mask.clone()}
    return state


def save(model, path, dtype=None, **extra):
    """Writes a tokenizer as safetensors with official keys; the header holds config and `extra`. dtype: of floats."""
    state = export(model)
    state.pop("quantize.codebook_used", None)           # indices as floats, which half precision would round
    save_checkpoint(path, state, model.config, dtype, **extra)


# ----------------------------------------------------------------------------------------------------------------------
# Shared by all model files: recomputation, a filter bank, and checkpoints


def recompute(wanted, function, *inputs, generator=None, **options):
    """Calls function(*inputs, **options), with generator=generator if there is one.

    `wanted` turns on gradient checkpointing: only the inputs are stored, and the backward pass computes the function
    again with the same random draws. This saves memory and takes about a third more time.
    """
    if generator is not None:
        options["generator"] = generator
    if not (wanted and torch.is_grad_enabled()):
        return function(*inputs, **options)
    if generator is None:
        return checkpoint(function, *inputs, use_reentrant=False, **options)
    before = generator.get_state()
    passes = itertools.count()

    def replay(*inputs):
        if next(passes) == 0:                                               # the forward pass
            return function(*inputs, **options)
        now = generator.get_state()
        generator.set_state(before)
        try:
            return function(*inputs, **options)
        finally:                            # checkpoint() ends the second pass by an exception once it has all it needs
            generator.set_state(now)
    return checkpoint(replay, *inputs, use_reentrant=False)


def slaney_mels(bands, low, high, n_fft, rate):
    """Filter bank (bands, n_fft / 2 + 1) that turns a spectrum of sound into mel bands from `low` to `high` Hz.

    The filters are triangles of equal area, evenly spaced on Slaney's mel scale: linear up to 1 kHz, then logarithmic.
    """
    def to_mel(f):
        return f * 3 / 200 if f < 1000 else 15 + 27 * math.log(f / 1000) / math.log(6.4)
    mels = np.linspace(to_mel(low), to_mel(high), bands + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * math.log(6.4) / 27))
    f = np.arange(n_fft // 2 + 1) * rate / n_fft
    left, peak, right = (edges[i:bands + i, None] for i in range(3))
    return np.maximum(0, np.minimum((f - left) / (peak - left), (right - f) / (right - peak))) * 2 / (right - left)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message is one line: the file, what was expected, and the way out."""


@dataclass
class Header:
    """What a checkpoint says besides its tensors."""

    config: str = None                          # the config as JSON, in files of ours
    origin: str = ""                            # which weights were taken if there were several, what was renamed
    flags: dict = field(default_factory=dict)   # flags of the original's training script

    def note(self, text):
        """Adds to the origin."""
        self.origin = f"{self.origin}, {text}" if self.origin else text


# Names under which training scripts keep weights, in the order in which they are looked for. Averaged weights come
# first, because the originals evaluate those.
AVERAGED = ("ema", "model_ema", "ema_state_dict", "ema_model", "gpt_ema_fsdp")
TRAINED = ("state_dict", "model_state_dict", "model", "module", "net")
WRAPPERS = ("module.", "model.", "net.", "ema_model.")      # what DDP, Lightning and others put before every name


def read_checkpoint(path, nested=(), weights=None):
    """Reads a .safetensors, .pth, .pt, .ckpt or .bin file, memory-mapped, or a folder with one such file or with shards
    and an index -> (state dict, Header).

    nested: where the model's own training checkpoints have the weights, e.g. (("trainer", "var_wo_ddp"),); else they
    are looked for under AVERAGED and TRAINED. weights: "ema" or "model" to choose; by default ema if there is one.
    Nothing is ever unpickled that could run code. Raises CheckpointError.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    header = Header()
    if path.name.endswith(".index.json"):
        state = _read_shards(path)
    else:
        state = _read_file(path, nested, weights, header)
    return _unwrap(state, header), header


def _read_file(path, nested, weights, header):
    """The state dict of one file. Fills the header."""
    _check_file(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open
        try:
            with safe_open(path, "pt") as f:
                header.config = (f.metadata() or {}).get("config")
                return {k: f.get_tensor(k) for k in f.keys()}
        except (SafetensorError, OSError, ValueError, AttributeError) as e:     # the last two: dtypes that torch lacks
            raise CheckpointError(f"{path}: truncated or not a safetensors file ({e})") from None
    content = _read_pickle(path)
    if isinstance(content, dict):
        flags = content.get("args")
        if isinstance(flags, argparse.Namespace):
            flags = vars(flags)
        header.flags = flags if isinstance(flags, dict) else {}
    return _find_weights(content, nested, weights, path, header)


def _find_weights(content, nested, weights, path, header):
    """The state dict among what a training script has saved. Notes in the header which one was taken of several."""
    found = content
    taken = []                                                              # the keys that lead to `found`
    for keys in nested:
        is_averaged = keys[-1] in AVERAGED
        if (weights == "model" and is_averaged) or (weights == "ema" and not is_averaged):
            continue
        inner = content
        for key in keys:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            found = inner
            taken = list(keys)
            break
    rivals = _dicts_in(found, (*AVERAGED, *TRAINED))
    wanted = TRAINED if weights == "model" else (*AVERAGED, *TRAINED)
    while isinstance(found, dict) and not any(isinstance(v, torch.Tensor) for v in found.values()):
        names = _dicts_in(found, wanted)
        if not names:
            break
        found = found[names[0]]
        taken.append(names[0])
    is_averaged = any(key in AVERAGED for key in taken)
    if weights == "ema" and not is_averaged:
        raise CheckpointError(f"{path}: has no averaged weights (under {', '.join(AVERAGED)}); leave out --weights")
    if len(rivals) > 1 and taken:
        header.note(f"'{taken[0]}' of {' and '.join(rivals)}")
    elif is_averaged:
        header.note(f"'{taken[-1]}'")
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: no state dict in it: expected tensors by name, found {type(found).__name__}")
    state = {k: v for k, v in found.items() if isinstance(v, torch.Tensor)}
    if not state:
        raise CheckpointError(f"{path}: no state dict in it: expected tensors by name, found {list(found)[:5]}")
    return state


def _dicts_in(content, names):
    """Those of the names under which `content` holds a dict, in their order; none if it is no dict itself."""
    if not isinstance(content, dict):
        return []
    return [name for name in names if isinstance(content.get(name), dict)]


def _unwrap(state, header):
    """Removes from all names what wrappers of the model have put before them."""
    removed = []
    if any("_orig_mod." in name for name in state):                         # torch.compile
        state = {name.replace("_orig_mod.", ""): x for name, x in state.items()}
        removed.append("_orig_mod.")
    while state:
        common = [prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in state)]
        if not common:
            break
        state = {name.removeprefix(common[0]): x for name, x in state.items()}
        removed.append(common[0])
    if removed:
        header.note(f"names without {' '.join(removed)}")
    return state


def _check_file(path):
    """Raises CheckpointError if a file cannot be read, or if its first bytes are those of something else."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file")
    try:
        with open(path, "rb") as f:
            start = f.read(64)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({(e.strerror or str(e)).lower()})") from None
    what = None
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        what = "a web page, perhaps an error page or one that asks to log in; download the file itself"
    elif start.startswith(b"version https://git-lfs"):
        what = "a pointer of git-lfs, not the file; get it with git lfs pull, or from the site itself"
    elif not start:
        what = "empty; download it again"
    elif path.suffix != ".safetensors" and not start.startswith((b"PK", b"\x80")):
        what = "not a PyTorch file, a zip archive or a pickle; get it from where it is published"
    if what:
        raise CheckpointError(f"{path}: is {what}")


def _read_pickle(path):
    """The object in a file of torch.save. Raises CheckpointError, also if loading it could run code."""
    try:
        zipped = _is_archive(path)
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore")                                 # about protocols of pickle
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except Exception as e:                                                  # a damaged pickle can raise anything
        refused = re.search(r"(?:GLOBAL|Unsupported \w+|class) ([\w.]+)", str(e))
        if refused and isinstance(e, pickle.UnpicklingError):
            raise CheckpointError(f"{path}: refused: loading it would run code ({refused[1]}); open it where you trust "
                                  "it and save only its tensors") from None
        reason = (str(e) or "it is empty").splitlines()[0][:100]
        raise CheckpointError(f"{path}: truncated or not a PyTorch file ({reason})") from None


def _is_archive(path):
    """Whether a file is a zip archive, as torch.save has written since version 1.6; only these can be memory-mapped.

    Raises CheckpointError for an archive that torch.save did not write, and EOFError if its end is missing.
    """
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as f:
            if f.read(2) == b"PK":
                raise EOFError("the end of the zip archive is missing")
        return False
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if not any(member.filename.endswith("data.pkl") for member in members):
        raise CheckpointError(f"{path}: is a zip archive of other files; unpack it and give the file of weights in it")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{path}: is compressed, as torch.save never does; unpack it and save it again")
    return True


def _harmless():
    """Classes that training scripts save beside weights and that only hold values: flags, paths, numbers of numpy.

    A pair is (class, the name that a file gives it).
    """
    multiarray = (np._core if hasattr(np, "_core") else np.core).multiarray             # numpy 2, numpy 1
    numbers = [(multiarray.scalar, f"{package}.multiarray.scalar") for package in ("numpy.core", "numpy._core")]
    kinds = [type(np.dtype(code)) for code in "?bhilqBHILQefd"]
    paths = [(PurePosixPath, "pathlib.PosixPath"), (PureWindowsPath, "pathlib.WindowsPath")]
    return [argparse.Namespace, *numbers, np.dtype, *dict.fromkeys(kinds), (codecs.encode, "_codecs.encode"), *paths]


def _in_folder(folder):
    """The index of a folder of shards, or the one file of weights in it."""
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin", "*.pth", "*.pt",
                    "*.ckpt"):
        try:
            files = sorted(p for p in folder.iterdir() if p.match(pattern))
        except OSError as e:
            raise CheckpointError(f"{folder}: cannot be read ({(e.strerror or str(e)).lower()})") from None
        if len(files) == 1:
            return files[0]
        if files:
            raise CheckpointError(f"{folder}: {len(files)} files {pattern}, and no index that joins them: give one "
                                  "file, or get the *.index.json that belongs to them")
    raise CheckpointError(f"{folder}: no weights in it (*.safetensors, *.bin, *.pth, *.pt, *.ckpt, or shards with an "
                          "*.index.json)")


def shards_of(index):
    """Names of the files that an index of shards joins, sorted. They lie beside it. Raises CheckpointError."""
    with understanding(index, "an index of shards"):
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            if not re.fullmatch(r"[\w.\-]+\.(safetensors|bin)", name):
                raise ValueError(f"it names {name!r}, which is no file of weights beside it")
    return names


def _read_shards(index):
    """One state dict of all shards that an index names."""
    shards = shards_of(index)
    missing = [shard for shard in shards if not (index.parent / shard).exists()]
    if missing:
        raise CheckpointError(f"{index.parent}: {len(missing)} of {len(shards)} shards missing: "
                              f"{', '.join(missing[:3])}; get them from where the others came from")
    state = {}
    for shard in shards:
        state |= _read_file(index.parent / shard, (), None, Header())
    return state


# What Python raises while it makes sense of a file whose content is not as expected, with their kinds: KeyError,
# UnicodeError, RecursionError and so on.
MISUNDERSTOOD = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError, TypeError,
                 ValueError)


@contextmanager
def understanding(path, what):
    """Turns whatever goes wrong while the content of a file is interpreted into one CheckpointError with its name.

    what: what the file should be, such as "an index of shards".
    """
    try:
        yield
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except KeyError as e:
        raise CheckpointError(f"{path}: not {what}, or not all of it: it lacks {e}") from e
    except (OSError, *MISUNDERSTOOD) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{path}: not {what}, or damaged ({reason})") from e


def require(state, *keys, path, what):
    """Raises CheckpointError unless `state` has all `keys`, which a checkpoint of `what` is known by."""
    missing = [k for k in keys if k not in state]
    if missing:
        raise CheckpointError(f"{path}: not {what}: it has no '{missing[0]}', but {len(state)} others such as "
                              + ", ".join(f"'{k}'" for k in list(state)[:3]))


def read_config(cls, header, path, infer):
    """The Config of a checkpoint: the one in its header, else the one that infer() reads off its tensors.

    A header that is not one of this class is ignored if the tensors suffice, and noted in header.origin. Raises
    CheckpointError.
    """
    if header.config is None:
        return infer()
    try:
        return config_from_json(cls, header.config, path)
    except CheckpointError as e:
        try:
            config = infer()
        except CheckpointError:
            raise e from None
        header.note("sizes from its tensors, because the config in its header is not one of this model")
        return config


# The largest value that a config in a file may have, by its name; 2^20 for others.
LARGEST = {"depth": 1000, "layers": 1000, "num_res_blocks": 100, "chunks": 1000, "side": 1024}


def config_from_json(cls, text, path):
    """A Config from the JSON in a file's header; lists become tuples.

    Values must have the types of the class and sizes of networks that exist. Raises CheckpointError.
    """
    def frozen(value):
        return tuple(map(frozen, value)) if isinstance(value, list) else value
    try:
        values = {k: frozen(v) for k, v in json.loads(text).items()}
        known = {f.name: f for f in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"unknown entry {name!r}")
            _check_value(name, value, known[name].type)
        return cls(**values)
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{path}: the config in its header is not one of this model ({e})") from None


def _check_value(name, value, kind):
    """Raises ValueError unless a value of a config has the type that its class names, and a possible size."""
    kind = kind.__name__ if isinstance(kind, type) else str(kind)           # such as "tuple | None"
    if value is None and kind.endswith(" | None"):
        return
    kind = kind.removesuffix(" | None")
    if kind == "tuple":
        if not isinstance(value, tuple) or not 0 < len(value) <= 1000:
            raise ValueError(f"{name} is {str(value)[:50]}, expected a list")
        for entry in value:
            if isinstance(entry, tuple):
                _check_value(name, entry, "tuple")
            elif not isinstance(entry, (bool, str)):
                _check_value(name, entry, "int")
                if entry == 0:
                    raise ValueError(f"{name} holds a zero")
    elif kind == "int":
        most = LARGEST.get(name, 2**20)
        if type(value) is not int or not 0 <= value <= most:
            raise ValueError(f"{name} is {str(value)[:50]}, expected a whole number up to {most}")
    elif kind == "float":
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{name} is {str(value)[:50]}, expected a number")
    elif kind in ("bool", "str") and type(value).__name__ != kind:
        raise ValueError(f"{name} is {str(value)[:50]}, expected {kind}")


before_building = None          # a function (cls, args), called before a module takes memory; lib/memory.py sets it


def build(cls, *args):
    """A module with uninitialised weights, for loading or init_weights, without the cost of PyTorch's initialisation.

    This concerns weights only: what a module computes for itself (masks, constants) keeps its value.
    """
    if before_building is not None:
        before_building(cls, args)
    with _NoInit():
        return cls(*args)


def on_meta(cls, *args):
    """A module without memory for its weights, for `check_fit` before a config from a file makes anything large."""
    with torch.device("meta"), _NoInit():
        return cls(*args)


def build_on(device, cls, *args, cast=lambda model: model):
    """A module with uninitialised weights on a device, already in the dtypes that `cast` gives it, so that it takes no
    memory in another dtype. Only for modules that compute no buffers for themselves."""
    if before_building is not None:
        before_building(cls, args)
    with torch.device("meta"):
        model = cls(*args)
    return cast(model).to_empty(device=device)


class _NoInit(TorchFunctionMode):
    """Context manager. Inside it the functions of torch.nn.init return their tensor untouched."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def rename_keys(state, table, inverse=False):
    """Keys rewritten by a table of (official, ours) pairs of key fragments; others stay unchanged.

    A fragment is one or more whole dotted parts of a key. {} stands for a number. If there are several, they have the
    same order in both fragments. Only the first pair that matches is applied. inverse: from ours to official.
    """
    rules = []
    for official, ours in table:
        old, new = (ours, official) if inverse else (official, ours)
        pattern = re.escape(old).replace(r"\{\}", r"(\d+)")
        end = "" if old.endswith(".") else r"(?=\.|$)"
        for i in range(1, new.count("{}") + 1):
            new = new.replace("{}", f"\\{i}", 1)
        rules.append((re.compile(rf"(?:^|(?<=\.)){pattern}{end}"), new))
    renamed = {}
    for key, value in state.items():
        for pattern, new in rules:
            if pattern.search(key):
                key = pattern.sub(new, key)
                break
        renamed[key] = value
    return renamed


class Stacked:
    """Tensors of a file that become one, with the rows of the first on top. They are stacked only where `copy_to`
    writes them, because a copy of all of them would take as much memory as a model."""

    def __init__(self, parts):
        self.parts = parts
        self.shape = torch.Size((sum(map(len, parts)), *parts[0].shape[1:]))
        self.dtype = parts[0].dtype

    def is_floating_point(self):
        return self.dtype.is_floating_point

    def copy_to(self, tensor):
        for rows, part in zip(tensor.split([len(part) for part in self.parts]), self.parts):
            rows.copy_(part)


def join_rows(state, whole, parts):
    """Stacks matrices that are applied to the same input into one, first rows first: `x.q.weight`, `x.k.weight` and
    `x.v.weight` become `x.qkv.weight`, a Stacked, for whole = "qkv", parts = ("q", "k", "v")."""
    joined = {}
    for key, value in state.items():
        match = re.fullmatch(rf"(.*\.)({'|'.join(parts)})(\.\w+)", key)
        names = [match[1] + part + match[3] for part in parts] if match else []
        if not names or len({state[name].shape[1:] if name in state else None for name in names}) > 1:
            joined[key] = value                                             # check_fit will name what is wrong
        elif match[2] == parts[0]:
            joined[match[1] + whole + match[3]] = Stacked([state[name] for name in names])
    return joined


def split_rows(state, whole, parts):
    """The inverse of join_rows, for parts of equal size."""
    split = {}
    for key, value in state.items():
        match = re.fullmatch(rf"(.*\.){whole}(\.\w+)", key)
        if match:
            names = [match[1] + part + match[2] for part in parts]
            split |= dict(zip(names, value.chunk(len(names))))
        else:
            split[key] = value
    return split


def check_fit(model, state, path, optional=()):
    """Raises a CheckpointError that lists missing, unexpected and mis-shaped entries of `state`, and wrong types.

    optional: keys that may be missing.
    """
    own = model.state_dict()
    shared = [k for k in own if k in state]
    wrong = {"missing": [k for k in own if k not in state and k not in optional],
             "unexpected": [k for k in state if k not in own],
             "of wrong shape": [f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
                                for k in shared if state[k].shape != own[k].shape],
             "not in floating point": [f"{k} is {str(state[k].dtype).removeprefix('torch.')}" for k in shared
                                       if own[k].is_floating_point() and not state[k].is_floating_point()]}
    problems = []
    for what, items in wrong.items():
        if items:
            more = " ..." if len(items) > 4 else ""
            problems.append(f"{len(items)} {what}: {', '.join(items[:4])}{more}")
    if problems:
        raise CheckpointError(f"{path}: does not fit {type(model).__name__}: " + "; ".join(problems))


after_loading = None            # a function (model, key) that load_strict calls after each tensor; lib/int8.py sets it


def load_strict(model, state, path, optional=()):
    """Copies `state` into `model`. All that does not fit is listed in one CheckpointError, see `check_fit`.

    optional: keys that keep the model's own value where the file has none. Values that are no finite numbers are
    refused as well.
    """
    check_fit(model, state, path, optional)
    own = model.state_dict()
    with torch.no_grad():
        for k in list(own):
            tensor = own.pop(k)                                             # the only reference besides the model's
            if k not in state:
                continue
            if isinstance(state[k], Stacked):
                state[k].copy_to(tensor)
            else:
                tensor.copy_(state[k])
            # A sum is fast. Where it is not finite, finite values may have added up to more than a float can hold.
            if tensor.is_floating_point() and not math.isfinite(tensor.sum(dtype=torch.float32)):
                if not tensor.isfinite().all():
                    raise CheckpointError(f"{path}: {k} holds values that are no finite numbers; the file is damaged, "
                                          "or training it failed")
            if after_loading is not None:
                after_loading(model, k)


def save_checkpoint(path, state, config, dtype=None, **extra):
    """Writes tensors, config and further JSON-able `extra` metadata as safetensors, atomically.

    dtype: what floats are stored as. With torch.float8_e4m3fn vectors are float16, because 3 bits of mantissa are too
    few for them.
    """
    from safetensors.torch import save_file

    def cast(t):
        if dtype is None or not t.is_floating_point():
            return t
        if dtype == torch.float8_e4m3fn:
            return t.clamp(-448, 448).to(dtype) if t.ndim > 1 else t.half()     # beyond 448 it has only NaN
        return t.to(dtype)
    metadata = {k: json.dumps(v) for k, v in {"config": asdict(config), **extra}.items()}
    with atomic(path) as temporary:
        save_file({k: cast(v).contiguous() for k, v in state.items()}, temporary, metadata)


def temporary_name(path):
    """A hidden name beside `path` that nobody else has: several machines may write the same file."""
    return path.with_name(f".{os.urandom(6).hex()}.{path.name}")


@contextmanager
def atomic(path):
    """Yields a temporary name beside `path`. It is renamed to `path` at the end, or removed after an error."""
    path = Path(path)
    temporary = temporary_name(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode                                     # what the user's umask allows
        yield temporary
        os.chmod(temporary, mode)                                           # safetensors writes files for oneself only
        os.replace(temporary, path)
    except OSError as e:
        number = e.errno or errno.ENOSPC                                    # numpy does not say why it wrote less
        raise OSError(number, e.strerror or os.strerror(number), str(path)) from e      # some do not name the file
    except Exception as e:
        number = re.search(r"os error (\d+)", str(e))                       # safetensors hides it in a text
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from e
    finally:
        temporary.unlink(missing_ok=True)
