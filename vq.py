"""Image tokenizers: pictures to discrete codes and back. The networks, the quantizers, the training losses, all of it.

One convolutional encoder / decoder (the taming-transformers layout) around a quantizer. LlamaGen's is the plain one:
each of the 16x16 cells of the feature map f is replaced by the nearest row of a codebook, and its index is the token.
That of VAR and Infinity is *multi-scale and residual*: f becomes not one grid of tokens but a ladder of token maps,
1x1, 2x2, ... 16x16. Each map encodes what the coarser ones left over. VAR's tokens are rows of a codebook that all maps
share:

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

So a picture is 680 tokens, ordered from coarse to fine, and any prefix of whole maps decodes to a blurrier version.
Infinity's tokens are d bits each, the signs of the d channels of z: 2^d codes, 4 billion for d = 32, with no codebook,
no search and nothing to collapse. Its maps need not be square, and grow by bilinear interpolation without any phi.

Letters: B batch, C channels, d bits (channels), H W feature-map size, h w (or p) token-map size, K scales, V codebook
size. Papers: VAR, arXiv 2404.02905, section 3.2 and algorithms 1 and 2; Infinity, arXiv 2412.04431, section 3.2; BSQ,
arXiv 2406.07548; LlamaGen, arXiv 2406.06525, section 3.1; VQGAN, arXiv 2012.09841; LPIPS, arXiv 1801.03924. Released
weights: vae_ch160v4096z32.pth, 109 M parameters, stride 16, for 256 and 512 pixels, FoundationVision/var;
infinity_vae_d16.pth, d24, d32, d32reg, d64, 110 M, stride 16, and infinity_vae_d56_f8_14_patchify.pth, 82 M, stride 8,
FoundationVision/Infinity; vq_ds16_c2i.pt, 72 M, stride 16, and vq_ds8_c2i.pt, 70 M, stride 8,
FoundationVision/LlamaGen; vq_ds16_t2i.pt, 72 M, stride 16, peizesun/llamagen_t2i.

    tokenizer = vq.load("vae_ch160v4096z32.pth")
    indices = tokenizer.tokenize(image)         # image (B, 3, 256, 256) in [-1, 1] -> list of K (B, p * p) int64
    image = tokenizer.detokenize(indices)
    tokenizer, scales = vq.load("infinity_vae_d32.pth"), vq.schedule(aspect=1.5, pixels="0.25M")
    bits = tokenizer.tokenize(image, scales)    # image (B, 3, 624, 416) -> list of K (B, h * w, 32) bool

LatentSync's autoencoder, Stable Diffusion's, has no tokens: a picture becomes a Gaussian over latents of 4 channels,
held near the standard one by a KL divergence (latent diffusion, arXiv 2112.10752). Folder sd-vae-ft-mse, 84 M
parameters, stride 8, stabilityai/sd-vae-ft-mse.

    autoencoder = vq.load_autoencoder("sd-vae-ft-mse")
    z = autoencoder.encode(image).sample(generator)     # (B, 3, 256, 256) in [-1, 1] -> (B, 4, 32, 32), scaled to std 1
    image = autoencoder.decode(z)

At the end stands what every model file shares: reading checkpoints safely, renaming keys, loading strictly, saving.
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict, namedtuple
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from triton_ops import group_norm_silu, vq_nearest

PATCH_NUMS = {  # the released schedules: side of the token map at every scale, by picture size at stride 16
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}

# Infinity's schedules for pictures of 1M pixels: height / width -> (h, w) of the 13 token maps at stride 16. Smaller
# budgets end earlier; wider pictures have the reciprocal's with h and w exchanged.
ASPECTS = {
    1.0: "1,1 2,2 4,4 6,6 8,8 12,12 16,16 20,20 24,24 32,32 40,40 48,48 64,64",
    1.25: "1,1 2,2 3,3 5,4 10,8 15,12 20,16 25,20 30,24 35,28 45,36 55,44 70,56",
    1.333: "1,1 2,2 4,3 8,6 12,9 16,12 20,15 24,18 28,21 36,27 48,36 60,45 72,54",
    1.5: "1,1 2,2 3,2 6,4 9,6 15,10 21,14 27,18 33,22 39,26 48,32 63,42 78,52",
    1.75: "1,1 2,2 3,3 7,4 11,6 14,8 21,12 28,16 35,20 42,24 56,32 70,40 84,48",
    2.0: "1,1 2,2 4,2 6,3 10,5 16,8 22,11 30,15 38,19 46,23 60,30 74,37 90,45",
    2.5: "1,1 2,2 5,2 10,4 15,6 20,8 25,10 30,12 40,16 50,20 65,26 80,32 100,40",
    3.0: "1,1 2,2 6,2 9,3 15,5 21,7 27,9 36,12 45,15 54,18 72,24 90,30 111,37",
}
ASPECTS = {ratio: tuple(tuple(map(int, pair.split(","))) for pair in text.split()) for ratio, text in ASPECTS.items()}
ASPECTS |= {int(1000 / ratio) / 1000: tuple((w, h) for h, w in pairs) for ratio, pairs in ASPECTS.items()}
PIXELS = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}       # budget -> number of scales: about 256^2 ... 1024^2


def nearest_aspect(aspect):
    """The ratio height / width of ASPECTS that is nearest: 0.333 .. 3."""
    return min(ASPECTS, key=lambda ratio: abs(ratio - aspect))


def schedule(aspect=1.0, pixels="1M"):
    """Infinity's token maps ((h, w), ...) for pictures of height / width `aspect`; they have 16 pixels per token."""
    if pixels not in PIXELS:
        raise ValueError(f"pixels is one of {', '.join(PIXELS)}, not {pixels!r}")
    return ASPECTS[nearest_aspect(aspect)][:PIXELS[pixels]]


@dataclass(frozen=True)
class Config:
    """Sizes of a tokenizer. Released files tell all but patch_nums, phi_ratio, beta, entropy and znorm."""

    ch: int = 160                               # width of the highest resolution
    ch_mult: tuple = (1, 1, 2, 2, 4)            # width of each level / ch; all levels but the last halve the size
    num_res_blocks: int = 2                     # per encoder level; decoder levels have one more
    attn_lowest: bool = True                    # attention after each block of the lowest resolution
    attn_mid: bool = True                       # attention in the middle
    z_channels: int = 32                        # channels of f, width of the codebook
    vocab_size: int = 4096                      # V; 0: no codebook, but a bit per channel
    patch_nums: tuple = PATCH_NUMS[256]         # of the pictures that it is used for unless a method is told otherwise
    phi_count: int = 4                          # convolutions phi shared by the scales: 1 for all, 0 one per scale
    phi_ratio: float = 0.5                      # phi(x) = (1 - ratio) x + ratio conv(x)
    quant_kernel: int = 3                       # kernel of the convolutions before and after the quantizer; 0: none
    beta: float = 0.25                          # weight of the commitment loss
    entropy: float = 0.1                        # weight of the entropy loss of bits
    znorm: bool = False                         # look codes up by cosine instead of distance
    single_scale: bool = False                  # one map of tokens instead of a ladder; its codes have length 1
    hidden_channels: int = 0                    # outside of the convolutions around the quantizer; 0: z_channels

    @property
    def stride(self):
        """Pixels per feature-map cell."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class KLConfig:
    """Sizes of an autoencoder with a KL head. Files tell all but scaling."""

    ch: int = 128
    ch_mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4
    scaling: float = 0.18215                    # 1 / standard deviation of its latents

    stride = Config.stride


def _bits(d, **changes):
    """Infinity's tokenizers: bits, and attention nowhere."""
    base = dict(ch=128, ch_mult=(1, 2, 4, 4, 4), attn_lowest=False, attn_mid=False, vocab_size=0, phi_count=0,
                quant_kernel=0, patch_nums=schedule(pixels="0.06M"))
    return Config(**base | dict(z_channels=d) | changes)


def _single(side, ch_mult, **changes):
    """LlamaGen's tokenizers: one map, and a codebook of few channels, between 1 x 1 convolutions."""
    base = dict(ch=128, ch_mult=ch_mult, z_channels=8, hidden_channels=256, vocab_size=16384, patch_nums=(side,),
                quant_kernel=1, entropy=0.0, single_scale=True)
    return Config(**base | changes)


CONFIGS = {
    "vae_ch160v4096z32": Config(),
    "vq_ds16_c2i": _single(16, (1, 1, 2, 2, 4)),                            # side: of the token map at 256 pixels
    "vq_ds8_c2i": _single(32, (1, 2, 2, 4)),
    "vq_ds16_t2i": _single(16, (1, 1, 2, 2, 4)),
    **{f"infinity_vae_d{d}": _bits(d) for d in (16, 24, 32, 64)},
    "infinity_vae_d32reg": _bits(32),
    "infinity_vae_d56_f8_14_patchify": _bits(14, ch_mult=(1, 2, 4, 4),     # maps of twice the size: 8 pixels per token
                                             patch_nums=tuple((2 * h, 2 * w) for h, w in schedule(pixels="0.06M"))),
    "emoji_vq": Config(ch=32, ch_mult=(1, 2, 4), num_res_blocks=1, attn_lowest=False, z_channels=16, vocab_size=1024,
                       patch_nums=(1, 2, 3, 4, 6, 8)),      # 32 x 32 pixels, trained in demo/
    "emoji_vq_single": _single(8, (1, 2, 4), ch=32, num_res_blocks=1, attn_lowest=False, hidden_channels=64,
                               vocab_size=2048),                            # likewise
    "sd-vae-ft-mse": KLConfig(),
    "talking_head_kl": KLConfig(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, scaling=1.0),   # 64 x 64 pixels, in demo/
    "emoji_bsq": _bits(16, ch=32, ch_mult=(1, 2, 4), num_res_blocks=1, patch_nums=(1, 2, 4, 6, 8)),     # likewise
}


# ----------------------------------------------------------------------------------------------------------------------
# Encoder and decoder


def norm_silu(norm, x, silu=True):
    """silu(norm(x)) for a GroupNorm module, which may be marked as `exact`."""
    exact = getattr(norm, "exact", False)
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu, exact)


def group_norm(channels):
    """The normalisation of all tokenizers: 32 groups, so widths are multiples of 32."""
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
        h += x if self.nin_shortcut is None else self.nin_shortcut(x)       # in place: h is a fresh, large tensor
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
    """Halves the resolution. Zeros pad the right and bottom only; padding all sides would shift the picture."""

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
    """Between the levels and the latent, at the lowest resolution: block, attention (or none), block."""

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

    out_channels: those of the latent, or twice as many for a KL head, which reads them as mean and log-variance.
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


def area_resize(x, size):
    """(B, C, H, W) -> (B, C, *size), each output the mean of the input cells it covers (bins overlap at odd ratios)."""
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="area")


def bicubic_resize(x, size):
    """(B, C, h, w) -> (B, C, *size), the smooth way up."""
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bicubic")


def bilinear_resize(x, size):
    """(B, C, h, w) -> (B, C, *size). On the way down it skips cells: no anti-aliasing."""
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear")


def as_pairs(patch_nums):
    """Sides or (h, w) pairs -> list of (h, w)."""
    return [(p, p) if isinstance(p, int) else tuple(p) for p in patch_nums]


class ResidualQuantizer(nn.Module):
    """A feature map as a ladder of token maps, coarse to fine, each encoding what the coarser ones left over.

    Subclasses say what a token is: `quantize` maps to tokens and their codes, `embed` tokens to codes, `contribution`
    brings codes to full size, `next_input` is what a transformer sees. All compute in float32 always: in half precision
    tokens flip, and all later scales then encode other residuals. Methods take an optional schedule `patch_nums`, sides
    or (h, w) pairs; its last entry is the size of f.
    """

    resize = staticmethod(bicubic_resize)

    def __init__(self, config):
        super().__init__()
        self.config, self.patch_nums = config, tuple(config.patch_nums)

    def walk(self, f, patch_nums=None):
        """Algorithm 1 of VAR: yields (z, tokens, f_hat) at every scale, coarse to fine.

        z: (B, C, h, w) the residual seen at that scale; tokens: (B, h * w, ...); f_hat: (B, C, H, W) the sum so far.
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
        return [tokens for _, tokens, _ in self.walk(f, patch_nums)]

    def ladder(self, tokens, patch_nums=None, step_by_step=False):
        """Algorithm 2: tokens of all scales -> list of f_hat (B, C, H, W), one per scale; the last one is the result.

        step_by_step (experimental in VAR's original): every f_hat has the size of its own scale, (B, C, h, w).
        """
        sizes = as_pairs(patch_nums or self.patch_nums)
        sums = []
        for k, (mine, size) in enumerate(zip(tokens, sizes)):
            target = size if step_by_step else sizes[-1]
            h = self.contribution(self.embed(mine, size), k, len(sizes), target)
            sums.append(self.resize(sums[-1], target) + h if sums else h)
        return sums

    @torch.no_grad()
    def teacher_input(self, tokens, patch_nums=None):
        """True tokens -> the transformer's inputs at scales 1 .. K - 1: (B, L - h_0 w_0, C) float32."""
        sums = self.ladder(tokens[:-1], patch_nums)
        return torch.cat([self.next_input(f_hat, k + 1, patch_nums) for k, f_hat in enumerate(sums)], 1)


def phi_index(k, num_scales, num_phi):
    """Which of the shared convolutions phi scale k of num_scales uses: the one whose tick is nearest to k / (K - 1).

    Ticks are evenly spaced in [1/(2n), 1 - 1/(2n)] for n convolutions, but for n = 4 in [1/12, 11/12], as in the
    official code. The released tokenizer so gets 0 0 1 1 1 2 2 3 3 3; its scales 2 and 7 lie half-way between two
    ticks, where float64, as there, makes both take the upper one.
    """
    margin = 1 / (3 * num_phi) if num_phi == 4 else 1 / (2 * num_phi)
    ticks = np.linspace(margin, 1 - margin, num_phi)
    return int(np.argmin(np.abs(ticks - k / max(num_scales - 1, 1))))


class CodebookQuantizer(ResidualQuantizer):
    """Tokens are rows of one codebook, (B, h * w) int64. Official key: `quantize.embedding.weight`."""

    def __init__(self, config):
        super().__init__(config)
        self.codebook = nn.Parameter(torch.zeros(config.vocab_size, config.z_channels))
        # forward passes in training since a code was last used
        self.register_buffer("idle", torch.zeros(config.vocab_size, dtype=torch.int64))

    def nearest(self, z):
        """Feature map z (B, C, h, w) -> index of the nearest code per cell, row-major (B, h * w)."""
        flat, cosine = rearrange(z.detach().float(), "b c h w -> (b h w) c"), self.config.znorm
        with torch.autocast(z.device.type, enabled=False):
            return vq_nearest(flat, self.codebook, l2norm=cosine or self.config.single_scale).view(z.shape[0], -1)

    def quantize(self, z):
        """z (B, C, h, w) -> indices (B, h * w) and their codes (B, C, h, w)."""
        index = self.nearest(z)
        return index, self.embed(index, z.shape[-2:])

    def embed(self, index, size):
        """Indices (B, h * w) -> their codes as a map (B, C, h, w)."""
        return rearrange(F.embedding(index, self.codebook), "b (h w) c -> b c h w", h=size[0])

    @staticmethod
    def coverage(tokens, config):
        """Of which share of the codebook tokens (list of (B, h * w)) make use, in percent."""
        return 100 * len(torch.cat(tokens, 1).unique()) / config.vocab_size

    @torch.no_grad()
    def restart_codes(self, f, dead, generator=None):
        """Moves the codes marked in `dead` (V,) bool onto random residuals of the batch f; returns how many.

        The cure for codebook collapse: codes that are never the nearest never get a gradient. Processes that train
        together must broadcast the codebook afterwards.
        """
        if self.config.znorm:
            raise ValueError("restart_codes compares by distance: it does not apply to a znorm codebook")
        z = torch.cat([rearrange(z, "b c h w -> (b h w) c") for z, _, _ in self.walk(f)])
        where = dead.nonzero()[:, 0]
        self.codebook[where] = z[torch.randint(len(z), (len(where),), generator=generator, device=z.device)]
        self.idle[where] = 0
        return len(where)

    @torch.no_grad()
    def init_codebook(self, f, generator=None, rounds=8):
        """Fills the codebook from features f (B, C, H, W): at random first, then what nothing chose tries again."""
        self.codebook.zero_()
        self.restart_codes(f, torch.ones_like(self.idle, dtype=torch.bool), generator)
        for _ in range(rounds):
            dead = torch.ones_like(self.idle, dtype=torch.bool)
            dead[torch.cat(self.encode(f), 1).flatten()] = False
            self.restart_codes(f, dead, generator)


class SingleScaleVQ(CodebookQuantizer):
    """The ladder of one step, the quantizer of VQGAN and LlamaGen: every cell of f is a token, nothing is left over.

    Features and codes are compared as unit vectors, and what is decoded is a unit vector (LlamaGen, section 3.1): with
    8 channels instead of 256 that makes use of nearly all of 16,384 codes, where without it most die: in many channels
    a few codes are nearest to everything. The stored codebook need not be of length 1. Any size of f will do; without a
    schedule tokens are taken for a square map. Official key besides the codebook: `quantize.codebook_used`, the last
    65,536 indices of training, is our `recent`.
    """

    SHARPNESS = 100.0                           # inverse temperature of the entropy loss

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("recent", torch.zeros(65536))                  # starts as zeros: code 0 counts as used

    def walk(self, f, patch_nums=None):
        """As in ResidualQuantizer, of the one scale that there is: that of f."""
        return super().walk(F.normalize(f.float(), dim=1), [tuple(f.shape[-2:])])

    def ladder(self, tokens, patch_nums=None, step_by_step=False):
        """As in ResidualQuantizer: a list of one (B, C, h, w)."""
        return super().ladder(tokens, patch_nums or (math.isqrt(tokens[0].shape[1]),))

    def embed(self, index, size):
        """Indices (B, h * w) -> their codes, of length 1, as a map (B, C, h, w)."""
        if index.shape[1] != size[0] * size[1]:
            raise ValueError(f"{index.shape[1]} tokens are no map of {size[0]}x{size[1]}: pass patch_nums=[(h, w)]")
        return F.normalize(super().embed(index, size), dim=1)

    def contribution(self, h, k, num_scales, size):
        """The codes are all there is."""
        return h

    # training

    def forward(self, f):
        """f (B, C, H, W) -> (codes with a straight-through gradient, loss, (1,) percent of codes in `recent`).

        What the decoder wants goes past the codes to the encoder; the codes learn from the loss alone.
        """
        z = F.normalize(f.float(), dim=1)
        index, codes = self.quantize(z)
        if self.training:
            self._record(index)
        usage = 100 * len(self.recent.unique()) / len(self.codebook)
        return z + (codes - z).detach(), sum(self.losses(z, codes)), z.new_tensor([usage])

    def losses(self, z, codes):
        """Unit features and their codes (B, C, h, w) -> what trains the codes, |e - sg(z)|^2; what keeps the encoder
        near them, beta |sg(e) - z|^2; and the entropy loss, whose weight in the released models is 0."""
        follow, commit = F.mse_loss(codes, z.detach()), self.config.beta * F.mse_loss(z, codes.detach())
        return follow, commit, self.config.entropy * self.entropy_loss(z) if self.config.entropy else z.new_zeros(())

    def entropy_loss(self, z):
        """Entropy of a softmax over minus the distances to all codes: low for each cell (it is sure of its code), less
        that of the mean over all cells, high (all codes are used). Makes N x V numbers."""
        z, e = rearrange(z, "b c h w -> (b h w) c"), F.normalize(self.codebook, dim=-1)
        scores = -self.SHARPNESS * (z.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * z @ e.T)      # (N, V)
        p, log_p = scores.softmax(-1), (scores + 1e-5).log_softmax(-1)      # the 1e-5 there cancels; the next does not
        mean = p.mean(0)
        return -(p * log_p).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()

    @torch.no_grad()
    def _record(self, index):
        """Keeps the last 65,536 indices, of all processes."""
        for index in of_all_processes(index.flatten()):
            self.recent.copy_(torch.cat([self.recent, index.to(self.recent.dtype)])[-len(self.recent):])
            used = index.bincount(minlength=len(self.codebook)) > 0
            self.idle.copy_(torch.where(used, 0, self.idle + 1))


class MultiScaleVQ(CodebookQuantizer):
    """A ladder of indices (VAR, section 3.2). Official keys besides the codebook: `quantize.quant_resi.*` is our phi,
    `quantize.ema_vocab_hit_SV` hits."""

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
        """What the transformer sees at scale k: the sum so far, resized to that scale: (B, h * w, C)."""
        return area_resize(f_hat, as_pairs(patch_nums or self.patch_nums)[k]).flatten(2).transpose(1, 2)

    # training

    def forward(self, f):
        """f (B, C, H, W) -> (f_hat with a straight-through gradient, loss, usage per scale in percent).

        With the sum after every scale as f_hat, |f_hat - sg(f)|^2 trains the codes and phi, and nothing else does:
        straight-through hands the gradient of reconstruction, LPIPS and discriminator to the encoder past them.
        beta * |f - sg(f_hat)|^2 keeps the encoder near the codes. (sg: no gradient.)
        """
        f = f.float()
        loss, counts = 0.0, []
        for _, index, f_hat in self.walk(f):
            loss = loss + self.config.beta * F.mse_loss(f, f_hat.detach()) + F.mse_loss(f_hat, f.detach())
            counts.append(index.flatten().bincount(minlength=len(self.codebook)).float())
        if self.training:
            self._record(torch.stack(counts))
        # The original's rule: a code is used if hit 8 % as often as by an even spread of the last scale's cells.
        threshold = 0.08 * f[:, 0].numel() / len(self.codebook)
        usage = (self.hits >= threshold).float().mean(1) * 100
        return f_hat.detach() - f.detach() + f, loss / len(self.patch_nums), usage

    @torch.no_grad()
    def _record(self, counts):
        """Updates the moving averages. The decay is 0 at the first update ever, 0.9 up to 100, then 0.99. As in the
        original every scale counts as an update: in the first step only the first scale starts from full counts. What
        several processes have counted comes in one by one, not summed up as there: then it does not matter whether they
        share a batch or one of them takes its parts in turn."""
        for counts in of_all_processes(counts):
            for hits, count in zip(self.hits, counts):
                decay = torch.where(self.hit_updates < 100, 0.9, 0.99) * (self.hit_updates > 0)
                hits.copy_(hits * decay + count * (1 - decay))
                self.hit_updates += 1
            self.idle.copy_(torch.where(counts.sum(0) > 0, 0, self.idle + 1))


class MultiScaleBSQ(ResidualQuantizer):
    """Tokens are d bits, (B, h * w, d) bool: the signs of a residual's channels (Infinity, section 3.2; BSQ).

    The code of bits b is (2 b - 1) / sqrt(d), a corner of the cube in the unit sphere, at every scale: the nearest of
    2^d corners to a direction is that of its signs. Nothing is learned here. Official keys `quantize(r).lfq.mask`: the
    value of each bit in an integer index, the first the highest; nothing needs it.
    """

    resize = staticmethod(bilinear_resize)
    SHARPNESS = 100.0                           # inverse temperature of the entropy loss

    def quantize(self, z):
        """z (B, d, h, w) -> bits (B, h * w, d), zero giving 0, and codes (B, d, h, w) with a straight-through gradient.

        Forward the codes, backward u = z / |z|: the gradient passes the normalisation, not the signs.
        """
        u = F.normalize(z, dim=1)
        bits = rearrange(u > 0, "b d h w -> b (h w) d")
        codes = self.embed(bits, z.shape[-2:])
        return bits, u + (codes - u).detach() if u.requires_grad else codes

    def embed(self, bits, size):
        """Bits (B, h * w, d) -> codes of length 1 as a map (B, d, h, w)."""
        return rearrange(2 * bits.float() - 1, "b (h w) d -> b d h w", h=size[0]) * bits.shape[-1] ** -0.5

    def contribution(self, h, k, num_scales, size):
        """What scale k adds to f_hat: its code map h (B, d, h, w) at the size of f_hat."""
        return bilinear_resize(h, size)

    def next_input(self, f_hat, k, patch_nums=None):
        """What the transformer sees at scale k: the sum so far, at that size: (B, h * w, d). Bilinear, where the
        quantizer takes means (area) of its residual: the original's choice, and what its weights were trained with."""
        return bilinear_resize(f_hat, as_pairs(patch_nums or self.patch_nums)[k]).flatten(2).transpose(1, 2)

    @staticmethod
    def coverage(tokens, config):
        """Entropy of the bits (list of (B, h * w, d)), in percent of the possible: 100 if each is set half the time."""
        p = torch.cat(tokens, 1).float().mean((0, 1))
        return 100 * (torch.special.entr(p) + torch.special.entr(1 - p)).mean().item() / math.log(2)

    def forward(self, f):
        """f (B, d, H, W) -> (f_hat with a straight-through gradient, loss, coverage per scale in percent)."""
        losses, coverage = [], []
        for z, bits, f_hat in self.walk(f):
            commitment, sure, varied = self.losses(z)
            losses.append(self.config.beta * commitment + self.config.entropy * (sure - varied) / self.SHARPNESS)
            coverage.append(self.coverage([bits], self.config))
        return f_hat, torch.stack(losses).mean(), torch.tensor(coverage)

    def losses(self, z):
        """z (B, d, h, w) -> commitment, mean |u - code|^2; entropy of one position's bits; entropy of the bits overall.

        The entropies are those of BSQ, in closed form: with a soft assignment of u to all 2^d corners the bits are
        independent, and bit j is 0 with the probability p_j of a two-way softmax, -sharpness |u_j -+ 1/sqrt(d)|^2. The
        first should be low (each position sure of its bits), the second high (both values of each bit used).
        """
        u = F.normalize(z, dim=1)
        p = torch.sigmoid(-4 * self.SHARPNESS * z.shape[1] ** -0.5 * u)
        entropy = lambda p: -(p * (p + 1e-8).log() + (1 - p) * (1 - p + 1e-8).log())
        commitment = F.mse_loss(u, torch.where(u > 0, 1, -1) * z.shape[1] ** -0.5)
        return commitment, entropy(p).sum(1).mean(), entropy(p.mean((0, 2, 3))).sum()


def of_all_processes(x):
    """A tensor of every process that trains along, in their order: a list."""
    if not (dist.is_available() and dist.is_initialized()):
        return [x]
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x.contiguous())
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer


class VQVAE(nn.Module):
    """Encoder, quantizer, decoder. Images are (B, 3, h, w) in [-1, 1], h and w divisible by the stride."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, hidden, kernel = config.z_channels, config.hidden_channels or config.z_channels, config.quant_kernel
        sizes = (config.ch, config.ch_mult, config.num_res_blocks, hidden, config.attn_lowest, config.attn_mid)
        conv = lambda *channels: nn.Conv2d(*channels, kernel, padding=kernel // 2) if kernel else nn.Identity()
        quantizer = SingleScaleVQ if config.single_scale else MultiScaleVQ if config.vocab_size else MultiScaleBSQ
        self.encoder = Encoder(*sizes)
        self.quant_conv = conv(hidden, C)
        self.quantize = quantizer(config)
        self.post_quant_conv = conv(C, hidden)
        self.decoder = Decoder(*sizes)
        # Large convolutions run up to 1.7 times faster channels_last on CPU, and without layout copies on tensor cores.
        self.encoder.to(memory_format=torch.channels_last)
        self.decoder.to(memory_format=torch.channels_last)

    def encode(self, image):
        """Image in [-1, 1] -> continuous features f (B, C, H, W)."""
        s = self.config.stride
        if image.dim() != 4 or image.shape[1] != 3 or image.shape[2] % s or image.shape[3] % s:
            raise ValueError(f"images must be (B, 3, h, w) with h and w divisible by {s}, not {tuple(image.shape)}")
        return self.quant_conv(self.encoder(image.to(memory_format=torch.channels_last)))

    def decode(self, f_hat):
        """Quantized features (B, C, H, W) -> image in [-1, 1], float32, in the precision of the decoder's weights."""
        return self._decode(f_hat.to(self.decoder.conv_in.weight.dtype)).float().clamp(-1, 1)

    def decode_resized(self, size, f_hat):
        """decode, resized to size x size pixels before it is clamped: bicubic, not anti-aliased, as LlamaGen's authors
        measure pictures of 384 pixels at 256."""
        image = self._decode(f_hat.to(self.decoder.conv_in.weight.dtype)).float()
        return F.interpolate(image, (size, size), mode="bicubic").clamp(-1, 1)

    @torch.no_grad()
    def decode_tiled(self, tile, f_hat, overlap=8):
        """decode, in overlapping tiles of `tile` cells, cross-faded: less memory for large pictures.

        Close to decode, not equal: GroupNorm sees a tile's statistics instead of the picture's.
        """
        (B, _, H, W), s = f_hat.shape, self.config.stride
        if tile <= overlap:
            raise ValueError(f"tiles of {tile} cells do not overlap by {overlap}")
        starts = lambda n: [*range(0, max(n - tile, 0), tile - overlap), max(n - tile, 0)]
        image = f_hat.new_zeros(B, 3, H * s, W * s, dtype=torch.float32)
        weight = torch.zeros_like(image)
        for y, x in itertools.product(starts(H), starts(W)):
            part = self.decode(f_hat[:, :, y:y + tile, x:x + tile])
            ramp = lambda n: torch.arange(1, n + 1, device=part.device)
            fade = lambda n: torch.minimum(ramp(n), ramp(n).flip(0)).clamp(max=overlap * s)
            mask = (fade(part.shape[2])[:, None] * fade(part.shape[3])).to(part.dtype)
            where = ..., slice(y * s, y * s + part.shape[2]), slice(x * s, x * s + part.shape[3])
            image[where] += part * mask
            weight[where] += mask
        return image / weight

    def _decode(self, f_hat):
        return self.decoder(self.post_quant_conv(f_hat).to(memory_format=torch.channels_last))

    @torch.no_grad()
    def tokenize(self, image, patch_nums=None):
        """Image in [-1, 1] -> list of K tensors of tokens, coarse to fine: indices (B, h * w) or bits (B, h * w, d)."""
        return self.quantize.encode(self.encode(image), patch_nums)

    @torch.no_grad()
    def detokenize(self, tokens, patch_nums=None, ladder=False, step_by_step=False):
        """Tokens of all scales -> image in [-1, 1]; with ladder=True a list, the image after every scale."""
        sums = self.quantize.ladder(tokens, patch_nums, step_by_step)
        return [self.decode(f_hat) for f_hat in sums] if ladder else self.decode(sums[-1])

    @torch.no_grad()
    def reconstruct(self, image, patch_nums=None, ladder=False):
        """Image in [-1, 1] -> what is left of it after tokenizing; with ladder=True a list, after every scale."""
        sums = [f_hat for _, _, f_hat in self.quantize.walk(self.encode(image), patch_nums)]
        return [self.decode(f_hat) for f_hat in sums] if ladder else self.decode(sums[-1])

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
        """Random weights: PyTorch's default for convolutions, drawn from `generator`; codes from a small normal, or
        those of a single scale of length 1."""
        init_default(self, generator)
        if self.config.single_scale:
            codebook = self.quantize.codebook.uniform_(-1, 1, generator=generator)
            codebook.copy_(F.normalize(codebook, dim=1))
        elif self.config.vocab_size:
            self.quantize.codebook.normal_(0, self.config.z_channels ** -0.5, generator=generator)


class Posterior(namedtuple("Posterior", "mean std scaling")):
    """What an encoder knows about a picture's latent: a Gaussian for every number. mean, std: (B, C, H, W)."""

    def sample(self, generator=None):
        """A latent (B, C, H, W), scaled; drawn with `generator`, or without one its mean."""
        if generator is None:
            return self.mean * self.scaling
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return (self.mean + self.std * noise) * self.scaling

    def kl(self):
        """Divergence from the standard normal, (B,): summed over all numbers of a latent."""
        variance = self.std.square()
        return 0.5 * (self.mean.square() + variance - 1 - variance.log()).sum((1, 2, 3))


class KLAutoencoder(nn.Module):
    """Encoder, Gaussian latent, decoder (latent diffusion, section 3.1). Images are (B, 3, h, w) in [-1, 1], h and w
    divisible by the stride; latents (B, 4, h / stride, w / stride), scaled to a standard deviation of about 1."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, sizes = config.z_channels, (config.ch, config.ch_mult, config.num_res_blocks)
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
        return Posterior(mean, (0.5 * log_variance.clamp(-30, 20)).exp(), self.config.scaling)

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
        """Image -> what its mean latent keeps of it, clamped to [-1, 1]."""
        return self.decode(self.encode(image).sample()).clamp(-1, 1)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """PyTorch's default for convolutions, drawn from `generator`."""
        init_default(self, generator)


# ----------------------------------------------------------------------------------------------------------------------
# Training losses of a tokenizer: pixels, LPIPS, patch discriminator


class LPIPS(nn.Module):
    """Learned perceptual distance: weighted differences of VGG16 features after relu 1_2, 2_2, 3_3, 4_3, 5_3.

    Frozen. Inputs in [-1, 1] (B, 3, H, W); returns (B,). Official keys: `net.slice{1..5}.{n}`, n being the layer's
    number in torchvision's vgg16().features, and `lin{0..4}.model.1`.
    """

    SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))     # numbers of the 3x3 convolutions
    WIDTHS = (64, 128, 256, 512, 512)

    def __init__(self):
        super().__init__()
        c_in = 3
        self.net, self.lin = nn.ModuleDict(), nn.ModuleList()
        for i, (numbers, width) in enumerate(zip(self.SLICES, self.WIDTHS), 1):
            layers = OrderedDict()
            for n in numbers:
                layers[str(n)] = nn.Conv2d(c_in, width, 3, padding=1)
                c_in = width
            self.net[f"slice{i}"] = nn.Sequential(layers)
            self.lin.append(nn.Conv2d(width, 1, 1, bias=False))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)                                         # a fixed yardstick, whoever owns it

    def features(self, x):
        """Unit-normalised features of the five slices."""
        x = (x - self.shift) / self.scale
        for i, convs in enumerate(self.net.values()):
            x = F.max_pool2d(x, 2) if i else x
            for conv in convs:
                x = F.relu(conv(x))
            yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    def forward(self, a, b):
        both = torch.cat([a, b])
        distance = 0.0
        for lin, f in zip(self.lin, self.features(both)):
            fa, fb = f.chunk(2)
            distance = distance + lin((fa - fb).square()).mean((1, 2, 3))
        return distance


class PatchDiscriminator(nn.Module):
    """PatchGAN: (B, 3, H, W) -> real / fake logits of overlapping patches (B, 1, h, w). Official keys `main.{n}`."""

    def __init__(self, width=64, num_layers=3):
        super().__init__()
        layers, c = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2, True)], width
        for i in range(1, num_layers + 1):
            c_out = width * min(2 ** i, 8)
            stride = 2 if i < num_layers else 1
            layers += [nn.Conv2d(c, c_out, 4, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2, True)]
            c = c_out
        self.main = nn.Sequential(*layers, nn.Conv2d(c, 1, 4, 1, 1))

    def forward(self, x):
        return self.main(x)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """DCGAN initialisation: convolutions N(0, 0.02), BatchNorm weights N(1, 0.02), biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                module.weight.normal_(float(isinstance(module, nn.BatchNorm2d)), 0.02, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()


class StyleDiscriminator(nn.Module):
    """StyleGAN2's without its tricks: (B, 3, side, side) -> one logit per picture (B, 1). Residual blocks halve the
    side, 1-2-1 blurred so that nothing aliases, down to 4. Official keys `blocks.{n}`, `final_conv`, `final_linear`."""

    WIDTHS = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}

    def __init__(self, side=256):
        super().__init__()
        if side not in self.WIDTHS or side < 8:
            raise ValueError(f"the discriminator takes pictures of 8, 16, ... 1024 pixels, not {side}")
        sides = [side // 2 ** i for i in range(int(math.log2(side)) - 1)]   # side, ..., 4
        self.blocks = nn.ModuleList([nn.Conv2d(3, self.WIDTHS[side], 3, padding=1), nn.LeakyReLU(0.2)])
        self.blocks.extend(StyleBlock(self.WIDTHS[s], self.WIDTHS[s // 2]) for s in sides[:-1])
        self.final_conv = nn.Sequential(nn.Conv2d(512, 512, 3, padding=1), nn.LeakyReLU(0.2))
        self.final_linear = nn.Sequential(nn.Linear(512 * 16, 512), nn.LeakyReLU(0.2), nn.Linear(512, 1))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.final_linear(self.final_conv(x).flatten(1))

    @torch.no_grad()
    def init_weights(self, generator=None):
        """PyTorch's default for convolutions and matrices, drawn from `generator`."""
        init_default(self, generator)


class StyleBlock(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H / 2, W / 2): two convolutions, blur, a strided one; plus the skip, / sqrt(2)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv_res = nn.Conv2d(c_in, c_out, 1, stride=2)
        self.net = nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.LeakyReLU(0.2),
                                 nn.Conv2d(c_out, c_out, 3, padding=1), nn.LeakyReLU(0.2))
        self.downsample = nn.Sequential(Blur(), nn.Conv2d(c_out, c_out, 3, stride=2, padding=1))

    def forward(self, x):
        return (self.downsample(self.net(x)) + self.conv_res(x)) / math.sqrt(2)


class Blur(nn.Module):
    """Each channel with the outer product of 1-2-1, divided by its sum; edges reflected."""

    def __init__(self):
        super().__init__()
        self.register_buffer("f", torch.tensor([1.0, 2.0, 1.0]))

    def forward(self, x):                                                   # (B, C, H, W)
        kernel = torch.outer(self.f, self.f) / self.f.sum() ** 2
        kernel = kernel.to(x.dtype).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=x.shape[1])


def init_default(module, generator=None):
    """PyTorch's default initialisation, drawn from `generator`; norms 1 and 0."""
    for m in module.modules():
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            bound = m.weight[0].numel() ** -0.5                             # Kaiming uniform with a = sqrt(5)
            m.weight.uniform_(-bound, bound, generator=generator)
            if m.bias is not None:
                m.bias.uniform_(-bound, bound, generator=generator)
        elif isinstance(m, (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d)):
            m.weight.fill_(1)
            m.bias.zero_()


def swapped_bce(logits, target):
    """Binary cross entropy with its arguments exchanged, as LlamaGen's "non-saturating" loss has them: the constant is
    taken for the logit and the logits for the target. It is linear in the logits, and flat where the target is 0: the
    discriminator learns nothing from fake pictures. Only for reproducing runs that were made with it."""
    return F.binary_cross_entropy_with_logits(torch.full_like(logits, target), logits)


def logit_bce(logits, target):
    """Binary cross entropy of logits against 0 or 1, as it should be."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


GAN_LOSSES = {  # name: loss of the discriminator on (real, fake) logits, and of the generator on the latter
    "hinge": (lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(), lambda fake: -fake.mean()),
    "vanilla": (lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(), lambda fake: -fake.mean()),
    "non-saturating": (lambda real, fake: logit_bce(real, 1.0) + logit_bce(fake, 0.0),
                       lambda fake: logit_bce(fake, 1.0)),
    "non-saturating-swapped": (lambda real, fake: swapped_bce(real, 1.0) + swapped_bce(fake, 0.0),
                               lambda fake: swapped_bce(fake, 1.0)),
}


class TokenizerLoss(nn.Module):
    """|x - x'| + |x - x'|^2 + quantizer loss + LPIPS + adversarial loss; every part but the quantizer's has a weight.

    lpips: an LPIPS module or None; discriminator: a Patch- or StyleDiscriminator or None, in effect from step
    disc_start on. gan: one of GAN_LOSSES. adaptive: scale the adversarial gradient to the size of the reconstruction's,
    at the last layer (VQGAN, eq. 7).
    """

    def __init__(self, lpips=None, discriminator=None, *, l1=1.0, l2=1.0, lpips_weight=1.0, disc_weight=0.5,
                 disc_start=20000, adaptive=True, gan="hinge"):
        super().__init__()
        self.lpips, self.discriminator, self.gan = lpips, discriminator, GAN_LOSSES[gan]
        self.l1, self.l2, self.lpips_weight = l1, l2, lpips_weight
        self.disc_weight, self.disc_start, self.adaptive = disc_weight, disc_start, adaptive

    def adversarial(self, step):
        """Whether the discriminator takes part at this step."""
        return self.discriminator is not None and step >= self.disc_start

    def forward(self, image, rec, vq_loss, step, last_layer):
        """The generator's loss (a scalar) and its parts. last_layer: weight of the decoder's last convolution."""
        parts = {"l1": F.l1_loss(rec, image), "l2": F.mse_loss(rec, image)}
        reconstruction = self.l1 * parts["l1"] + self.l2 * parts["l2"]
        if self.lpips is not None:
            parts["lpips"] = self.lpips(rec, image).mean()
            reconstruction = reconstruction + self.lpips_weight * parts["lpips"]
        loss = reconstruction + vq_loss
        if self.adversarial(step):
            adv = parts["adv"] = self.gan[1](self.discriminator(rec))
            weight = self.balance(reconstruction, adv, last_layer) if self.adaptive else 1.0
            loss = loss + self.disc_weight * weight * adv
        return loss, parts | {"vq": vq_loss}

    @staticmethod
    def balance(reconstruction, adv, last_layer):
        """|gradient of the reconstruction| / |gradient of the adversarial loss|, both at last_layer; at most 10,000."""
        rec_grad, = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
        adv_grad, = torch.autograd.grad(adv, last_layer, retain_graph=True)
        return (rec_grad.norm() / (adv_grad.norm() + 1e-4)).clamp(0, 1e4).detach()

    def discriminator_loss(self, image, rec):
        """disc_weight / 2 * the discriminator's loss. Two passes: BatchNorm is to see real and fake pictures apart."""
        real, fake = self.discriminator(image.detach()), self.discriminator(rec.detach())
        return self.disc_weight * 0.5 * self.gan[0](real, fake)


# ----------------------------------------------------------------------------------------------------------------------
# Loading a tokenizer

# Infinity's convolutions and norms are wrapped in modules of their own, but for those of some older files.
UNWRAP = [(f"{name}.conv", name) for name in ("conv_in", "conv_out", "conv1", "conv2", "nin_shortcut",
                                              "downsample.conv", "upsample.conv")]
UNWRAP += [(f"{name}.norm", name) for name in ("norm1", "norm2", "norm_out")]


def renames(config):
    """Official key <-> our key; {} stands for a number. Every key not covered is the same in both."""
    if not config.vocab_size:
        return UNWRAP
    if config.single_scale:                                                 # its decoder counts levels as they run
        last = len(config.ch_mult) - 1
        table = [("quantize.embedding.weight", "quantize.codebook"), ("quantize.codebook_used", "quantize.recent"),
                 ("encoder.conv_blocks.{}.res", "encoder.down.{}.block"), ("encoder.conv_blocks", "encoder.down")]
        for i in range(last + 1):
            table += [(f"decoder.conv_blocks.{i}.res", f"decoder.up.{last - i}.block"),
                      (f"decoder.conv_blocks.{i}", f"decoder.up.{last - i}")]
        return table + [("mid.0", "mid.block_1"), ("mid.1", "mid.attn_1"), ("mid.2", "mid.block_2")]
    phi = {0: ("quantize.quant_resi.{}.", "quantize.phi.{}."), 1: ("quantize.quant_resi.qresi.", "quantize.phi.0.")}
    return [("quantize.embedding.weight", "quantize.codebook"), ("quantize.ema_vocab_hit_SV", "quantize.hits"),
            phi.get(config.phi_count, ("quantize.quant_resi.qresi_ls.{}.", "quantize.phi.{}."))]


QKV = ("qkv", ("q", "k", "v"))                                  # LlamaGen keeps three convolutions where we have one
BOOKKEEPING = {"quantize.hit_updates", "quantize.idle"}         # ours alone, not in official files
STATISTICS = {"quantize.hits", "quantize.recent"}               # of training; files may lack them


def infer_config(state, path, patch_nums=None):
    """The Config of an official state dict, read from its shapes.

    The sides of the token maps are in no tensor: they are `patch_nums`, else those of 256 pixels if the number fits.
    """
    single = any(k.startswith("encoder.conv_blocks.") for k in state)
    down, block, q, mid = ("conv_blocks", "res", "q", "1") if single else ("down", "block", "qkv", "attn_1")
    levels = 1 + max(int(k.split(".")[2]) for k in state if k.startswith(f"encoder.{down}."))
    ch = len(state["encoder.conv_in.weight"])
    sizes = dict(
        ch=ch, ch_mult=tuple(len(state[f"encoder.{down}.{i}.{block}.0.conv1.weight"]) // ch for i in range(levels)),
        num_res_blocks=sum(bool(re.match(rf"encoder\.{down}\.0\.{block}\.\d+\.conv1\.weight", k)) for k in state))
    if "quantize.embedding.weight" not in state:
        known = CONFIGS["infinity_vae_d16" if levels != 4 else "infinity_vae_d56_f8_14_patchify"].patch_nums
        return _bits(len(state["encoder.conv_out.weight"]), patch_nums=tuple(patch_nums or known), **sizes)
    num_scales = len(state["quantize.ema_vocab_hit_SV"]) if "quantize.ema_vocab_hit_SV" in state else None
    if patch_nums is None:
        if num_scales not in (None, len(PATCH_NUMS[256])):
            raise CheckpointError(f"{path}: has {num_scales} scales, whose sizes no file tells: pass patch_nums=")
        patch_nums = PATCH_NUMS[256]
    vocab_size, z_channels = state["quantize.embedding.weight"].shape
    sizes |= dict(vocab_size=vocab_size, z_channels=z_channels, quant_kernel=state["quant_conv.weight"].shape[-1],
                  attn_lowest=f"encoder.{down}.{levels - 1}.attn.0.{q}.weight" in state,
                  attn_mid=f"encoder.mid.{mid}.{q}.weight" in state)
    if single:
        side = 256 // 2 ** (levels - 1)
        return Config(**sizes, hidden_channels=len(state["encoder.conv_out.weight"]), entropy=0.0, single_scale=True,
                      patch_nums=tuple(patch_nums or (side,)))
    phis = [k for k in state if k.startswith("quantize.quant_resi.") and k.endswith(".weight")]
    shared = any(".qresi" in k for k in phis)
    return Config(**sizes, patch_nums=tuple(patch_nums), phi_count=len(phis) if shared else 0)


def load(path, config=None, patch_nums=None, dtype=torch.float32):
    """A VQVAE in eval mode from a released file, a training checkpoint of the original, or a file of ours.

    path: .pth or .safetensors; config: instead of the inferred one; patch_nums: another schedule, e.g. PATCH_NUMS[512];
    dtype: of the decoder only, since tokens need a float32 encoder. Raises CheckpointError.
    """
    state, saved = read_checkpoint(path, nested=(("vae",), ("trainer", "vae_local"), ("state_dict",), ("model",)))
    if KL_MARK in state:
        raise CheckpointError(f"{path}: an autoencoder without tokens, LatentSync's kind; expected a tokenizer (VQVAE)")
    state = rename_keys({k: v for k, v in state.items() if not k.endswith("lfq.mask")}, UNWRAP)
    require(state, "encoder.conv_in.weight", *["quantize.embedding.weight"] * ("quant_conv.weight" in state), path=path,
            what="an image tokenizer (VQVAE)")
    if config is None:
        config = config_from_json(Config, saved, path) if saved else infer_config(state, path, patch_nums)
    if patch_nums is not None:
        config = replace(config, patch_nums=tuple(patch_nums))
    hits = state.get("quantize.ema_vocab_hit_SV")
    if hits is not None and len(hits) != len(config.patch_nums):            # statistics of another schedule: start anew
        state["quantize.ema_vocab_hit_SV"] = torch.zeros(len(config.patch_nums), config.vocab_size)
    state = rename_keys(state, renames(config))
    model = build(VQVAE, config)
    state = join_rows(state, *QKV) if config.single_scale else state
    load_strict(model, state, path, optional=BOOKKEEPING | STATISTICS)
    return set_decoder_dtype(model.eval(), dtype)


# Stable Diffusion's names, as diffusers has them, in the order in which they are replaced
KL_RENAMES = (
    [("encoder.down_blocks", "encoder.down"), ("mid_block.resnets.0", "mid.block_1"),
     ("mid_block.resnets.1", "mid.block_2"), ("mid_block.attentions.0", "mid.attn_1"), ("conv_norm_out", "norm_out")],
    [("resnets", "block"), ("downsamplers.0.conv", "downsample.conv"), ("upsamplers.0.conv", "upsample.conv"),
     ("group_norm", "norm"), ("query", "q"), ("key", "k"), ("value", "v"), ("proj_attn", "proj_out")],
    [("conv_shortcut", "nin_shortcut")],
)
KL_MARK = "encoder.mid_block.resnets.0.norm1.weight"                        # by which its files are known
KL_NEWER = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]       # a later spelling


def _kl_tables(levels):
    """KL_RENAMES for that many levels, of which the decoder counts the coarsest as 0."""
    up = [(f"decoder.up_blocks.{i}", f"decoder.up.{levels - 1 - i}") for i in range(levels)]
    return [KL_RENAMES[0] + up, *KL_RENAMES[1:]]


def load_autoencoder(path, config=None, dtype=torch.float32):
    """A KLAutoencoder in eval mode from a folder or file as diffusers lays it, with either spelling of attention's
    keys, or from a file of ours. config: instead of the inferred one. Raises CheckpointError."""
    state, saved = read_checkpoint(path)
    require(state, KL_MARK, "quant_conv.weight", "encoder.conv_in.weight", path=path,
            what="an autoencoder (sd-vae-ft-mse, or one of train.py vq)")
    if saved and config is None:
        config = config_from_json(KLConfig, saved, path)
    elif config is None:
        widths, n = [], 0
        while f"encoder.down_blocks.{n}.resnets.0.conv1.weight" in state:
            widths.append(len(state[f"encoder.down_blocks.{n}.resnets.0.conv1.weight"]))
            n += 1
        blocks = sum(bool(re.fullmatch(r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight", k)) for k in state)
        ch = len(state["encoder.conv_in.weight"])
        config = KLConfig(ch, tuple(w // ch for w in widths), blocks, len(state["quant_conv.weight"]) // 2)
    state = rename_keys(state, KL_NEWER)
    for table in _kl_tables(len(config.ch_mult)):
        state = rename_keys(state, table)
    # its attention multiplies matrices where ours convolves: the same numbers
    state = {k: v[..., None, None] if "attn_1" in k and v.dim() == 2 else v for k, v in state.items()}
    model = build(KLAutoencoder, config)
    load_strict(model, join_rows(state, *QKV), path)
    return model.eval().to(dtype)


def _export_kl(model):
    """The state dict of a KLAutoencoder as sd-vae-ft-mse has it, in float32."""
    state = split_rows({k: v.float() for k, v in model.state_dict().items()}, *QKV)
    state = {k: v.flatten(1) if "attn_1" in k and v.dim() == 4 else v for k, v in state.items()}
    for table in reversed(_kl_tables(len(model.config.ch_mult))):
        state = rename_keys(state, table, inverse=True)
    return {k: v.contiguous() for k, v in state.items()}


def set_decoder_dtype(model, dtype):
    """Lets the decoder compute in another dtype; encoder and quantizer stay in float32."""
    model.post_quant_conv.to(dtype)
    model.decoder.to(dtype)
    return model


def fingerprint(model):
    """A short name for a tokenizer, the same in every precision: tells whether tokens or latents belong to it."""
    has_codes = getattr(model.config, "vocab_size", 0)
    weight = model.quantize.codebook if has_codes else model.encoder.conv_out.weight
    return hashlib.sha256(weight.detach().half().cpu().numpy().tobytes()).hexdigest()[:12]


def export(model):
    """The official state dict of a tokenizer, in float32: what the original code loads strictly."""
    if isinstance(model, KLAutoencoder):
        return _export_kl(model)
    state = {k: v.float().contiguous() for k, v in model.state_dict().items() if k not in BOOKKEEPING}
    state = split_rows(state, *QKV) if model.config.single_scale else state
    state = rename_keys(state, renames(model.config), inverse=True)
    if not model.config.vocab_size:                                         # 2^(d - 1) ... 1; the first of 64 overflows
        mask = torch.ones(model.config.z_channels, dtype=torch.int64) << torch.arange(model.config.z_channels).flip(0)
        state |= {"quantizer.lfq.mask": mask, "quantize.lfq.mask": mask.clone()}
    return state


def save(model, path, dtype=None, **extra):
    """Writes a tokenizer as safetensors: official keys, config (and `extra`) in the header. dtype: of the floats."""
    state = {k: v for k, v in export(model).items() if k != "quantize.codebook_used"}   # indices, too large for halves
    save_checkpoint(path, state, model.config, dtype, **extra)


def load_lpips(vgg_path, heads_path):
    """An LPIPS from torchvision's vgg16 weights (`features.{n}.*`) and the linear heads (`lin{i}.model.1.weight`)."""
    vgg, _ = read_checkpoint(vgg_path)
    heads, _ = read_checkpoint(heads_path)
    require(vgg, "features.28.weight", path=vgg_path, what="torchvision's vgg16")
    require(heads, "lin0.model.1.weight", path=heads_path, what="the linear heads of LPIPS (its vgg.pth)")
    model = LPIPS()
    state = {f"lin.{i}.weight": heads[f"lin{i}.model.1.weight"] for i in range(len(model.lin))}
    for i, numbers in enumerate(LPIPS.SLICES, 1):
        state |= {f"net.slice{i}.{n}.{p}": vgg[f"features.{n}.{p}"] for n in numbers for p in ("weight", "bias")}
    load_strict(model, state, vgg_path)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# What model files share: recomputation, a filter bank, and checkpoints


def checkpointed(wanted, function, *inputs, generator=None, **options):
    """function(*inputs, **options, generator=generator if there is one). If `wanted`, only the inputs are kept, and the
    backward pass computes the inside again, with the same draws: less memory for a third more time."""
    if generator is not None:
        options["generator"] = generator
    if not (wanted and torch.is_grad_enabled()):
        return function(*inputs, **options)
    before, runs = generator.get_state() if generator is not None else None, itertools.count()

    def inside(*inputs):
        if before is None or not next(runs):
            return function(*inputs, **options)
        now = generator.get_state()
        generator.set_state(before)
        try:
            return function(*inputs, **options)
        finally:
            generator.set_state(now)
    return checkpoint(inside, *inputs, use_reentrant=False)


def slaney_mels(bands, low, high, n_fft, rate):
    """Triangular filters (bands, n_fft / 2 + 1) of equal area from `low` to `high` Hz, evenly spaced on Slaney's mel
    scale: linear up to 1 kHz, logarithmic above. What turns a spectrum of sound into what its networks hear."""
    to_mel = lambda f: f * 3 / 200 if f < 1000 else 15 + 27 * math.log(f / 1000) / math.log(6.4)
    mels = np.linspace(to_mel(low), to_mel(high), bands + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * math.log(6.4) / 27))
    f = np.arange(n_fft // 2 + 1) * rate / n_fft
    left, peak, right = (edges[i:bands + i, None] for i in range(3))
    return np.maximum(0, np.minimum((f - left) / (peak - left), (right - f) / (right - peak))) * 2 / (right - left)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message is one line: the file, what was expected, and the way out."""


def read_checkpoint(path, nested=()):
    """(state dict, config as JSON or None) of a .safetensors or .pth / .pt / .bin file, memory-mapped; or of a folder
    of such files with an index, as large models come.

    nested: where a training checkpoint may have the weights, e.g. (("trainer", "var_wo_ddp"),); first match counts.
    Nothing is ever unpickled that could run code. Raises CheckpointError.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if path.name.endswith(".index.json"):
        return _read_shards(path), None
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open
        try:
            with safe_open(path, "pt") as f:
                return {k: f.get_tensor(k) for k in f.keys()}, (f.metadata() or {}).get("config")
        except SafetensorError as e:
            raise CheckpointError(f"{path}: truncated or not a safetensors file ({e})") from None
    try:
        with open(path, "rb") as f:
            if f.read(2)[:1] not in (b"P", b"\x80"):                        # a zip archive, or a bare pickle
                raise EOFError("its first bytes are not those of one")
        with torch.serialization.safe_globals([argparse.Namespace]):        # a dictionary that trainers like to add
            obj = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as e:
        reason = re.search(r"(?:GLOBAL|Unsupported \w+|class) ([\w.]+)", str(e))
        raise CheckpointError(f"{path}: refused: loading it would run code" + (f" ({reason[1]})" if reason else "") +
                              "; open it where you trust it and save only its tensors") from None
    except PermissionError:
        raise CheckpointError(f"{path}: cannot be read (permission denied)") from None
    except Exception as e:                                                  # a damaged pickle can raise anything
        reason = (str(e) or "it is empty").splitlines()[0][:100]
        raise CheckpointError(f"{path}: truncated or not a PyTorch file ({reason})") from None
    for keys in nested:
        inner = obj
        for key in keys:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            obj = inner
            break
    if not isinstance(obj, dict) or not all(isinstance(v, torch.Tensor) for v in obj.values()):
        found = list(obj)[:5] if isinstance(obj, dict) else type(obj).__name__
        raise CheckpointError(f"{path}: no state dict in it: expected tensors by name, found {found}")
    return dict(obj), None


def _in_folder(folder):
    """The index of a folder of shards, or the one file of weights in it."""
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin", "*.pth", "*.pt"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(f"{folder}: {len(found)} files {pattern}, and no index that joins them: give one "
                                  "file, or get the *.index.json that belongs to them")
    raise CheckpointError(f"{folder}: no weights in it (*.safetensors, *.bin, *.pth, or shards with an *.index.json)")


def _read_shards(index):
    """One state dict of all shards that an index names."""
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{index}: not an index of shards ({type(e).__name__}: {e})") from None
    missing = [shard for shard in shards if not (index.parent / shard).exists()]
    if missing:
        raise CheckpointError(f"{index.parent}: {len(missing)} of {len(shards)} shards missing: "
                              f"{', '.join(missing[:3])}; get them from where the others came from")
    state = {}
    for shard in shards:
        state |= read_checkpoint(index.parent / shard)[0]
    return state


def require(state, *keys, path, what):
    """Raises CheckpointError unless `state` has the keys by which a checkpoint of `what` is known."""
    missing = [k for k in keys if k not in state]
    if missing:
        raise CheckpointError(f"{path}: not {what}: it has no '{missing[0]}', but {len(state)} others such as "
                              + ", ".join(f"'{k}'" for k in list(state)[:3]))


def config_from_json(cls, text, path):
    """A Config from the JSON in a file's header; lists become tuples."""
    try:
        frozen = lambda v: tuple(map(frozen, v)) if isinstance(v, list) else v
        values = {k: frozen(v) for k, v in json.loads(text).items()}
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown entries {sorted(unknown)}")
        return cls(**values)
    except (ValueError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path}: the config in its header is not one of this model ({e})") from None


def build(cls, *args):
    """A module with uninitialised weights: for loading or init_weights, without the cost of PyTorch's initialisation.

    Only the weights: what a module computes for itself (masks, constants) keeps its value.
    """
    with _NoInit():
        return cls(*args)


def build_on(device, cls, *args, cast=lambda model: model):
    """A module with uninitialised weights on a device, already in their final dtypes: it never exists in another. For
    modules that compute nothing for themselves."""
    with torch.device("meta"):
        model = cls(*args)
    return cast(model).to_empty(device=device)


class _NoInit(TorchFunctionMode):
    """Makes the functions of torch.nn.init return their tensor untouched, inside this block only."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def rename_keys(state, table, inverse=False):
    """Keys rewritten by a table of (official, ours) pairs of key fragments; others unchanged.

    A fragment is one or more whole dotted parts of a key, {} standing for a number; several come in the same order in
    both. The first pair that occurs applies.
    inverse: from ours to official.
    """
    rules = []
    for official, ours in table:
        old, new = (ours, official) if inverse else (official, ours)
        number = re.escape(old).replace(r"\{\}", r"(\d+)")
        end = "" if old.endswith(".") else r"(?=\.|$)"
        rules.append((re.compile(rf"(?:^|(?<=\.)){number}{end}"), "".join(f"{part}\\{i}" for i, part in
                      enumerate(new.split("{}")[:-1], 1)) + new.split("{}")[-1]))
    renamed = {}
    for key, value in state.items():
        for pattern, new in rules:
            if pattern.search(key):
                key = pattern.sub(new, key)
                break
        renamed[key] = value
    return renamed


def join_rows(state, whole, parts):
    """Matrices that are applied to the same input as one, first rows first: `x.q.weight`, `x.k.weight`, `x.v.weight`
    become `x.qkv.weight` for whole = "qkv", parts = ("q", "k", "v")."""
    joined = {}
    for key, value in state.items():
        found = re.fullmatch(rf"(.*\.)({'|'.join(parts)})(\.\w+)", key)
        names = [found[1] + part + found[3] for part in parts] if found else []
        if not names or any(name not in state for name in names):
            joined[key] = value                                             # load_strict will name what is missing
        elif found[2] == parts[0]:
            joined[found[1] + whole + found[3]] = torch.cat([state[name] for name in names])
    return joined


def split_rows(state, whole, parts):
    """The inverse of join_rows, for parts of equal size."""
    split = {}
    for key, value in state.items():
        found = re.fullmatch(rf"(.*\.){whole}(\.\w+)", key)
        names = [found[1] + part + found[2] for part in parts] if found else [key]
        split |= dict(zip(names, value.chunk(len(names)) if found else [value]))
    return split


def load_strict(model, state, path, optional=()):
    """Copies `state` into `model`. Missing, unexpected and mis-shaped entries are listed in one CheckpointError.

    optional: keys that keep the model's own value where the file has none.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state and k not in optional]
    unexpected = [k for k in state if k not in own]
    shapes = [f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
              for k in own if k in state and state[k].shape != own[k].shape]
    found = {"missing": missing, "unexpected": unexpected, "of wrong shape": shapes}
    problems = [f"{len(items)} {name}: " + ", ".join(items[:4]) + (" ..." if len(items) > 4 else "")
                for name, items in found.items() if items]
    if problems:
        raise CheckpointError(f"{path}: does not fit {type(model).__name__}: " + "; ".join(problems))
    with torch.no_grad():
        for k, tensor in own.items():
            if k in state:
                tensor.copy_(state[k])


def save_checkpoint(path, state, config, dtype=None, **extra):
    """Writes tensors, config and further JSON-able `extra` metadata as safetensors, atomically.

    dtype: of the floats; torch.float8_e4m3fn is for matrices alone (three bits of mantissa), vectors are then float16.
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


@contextmanager
def atomic(path):
    """A temporary name beside `path` to write to; renamed at the end, removed after an error: no half files."""
    path = Path(path)
    temporary = path.with_name(f".{os.urandom(6).hex()}.{path.name}")       # several machines may write the same file
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        e.filename = str(path)                                              # some writers do not say which file it was
        raise
    finally:
        temporary.unlink(missing_ok=True)
