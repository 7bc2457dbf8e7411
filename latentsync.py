"""LatentSync: a talking head says something else. Full definition of model and pipeline, all of it in this file.

A diffusion model repaints the lower half of a face, frame by frame, while it listens. It is Stable Diffusion 1.5's
UNet, with three changes: besides the noisy latent it sees the masked picture and a reference picture, as further
channels of its input; where that read a text it reads sound; and from version 1.5 on modules between the frames of a
clip keep them from flickering.

    video, 25 frames a second                                               speech, 16 kHz
      | three points of each face -> a similarity transform                   | log-mel, 100 columns a second
    aligned faces (F, 3, 256, 256)                                            | Whisper's encoder, all of its layers
      |            | * mask: without the mouth                              (T, 5, 384), 50 rows a second
      | E          | E         E, D: the autoencoder, vq.KLAutoencoder         | 10 rows around each frame
    reference    masked    mask    noise z                                  (F, 50, 384)
      +------------+---------+-------+                                        |
                   | (13, F, 32, 32), in the order z, mask, masked, reference |
            +--> UNet: convolutions, attention within a frame, to its sound, between frames
      20 times   | predicted noise -> a DDIM step -> z
            +----+
                 | D
    generated faces (F, 3, 256, 256) -> the surroundings of the mask are the original's -> warped back into the frames

What to look out for when reading:
- A frame hears ten rows of features, 0.2 s around it, each with the outputs of all of Whisper's layers: the network may
  choose between sound and word. (A row has seen the whole piece of up to 30 s, by Whisper's own attention.)
- Faces are aligned so that brows and nose stand still, and the mask hides most of what moves with speech: else the
  network guesses the mouth from cheeks and head instead of the sound (the paper's "shortcut"). For the same reason a
  SyncNet (syncnet.py) looks at the decoded pixels in the second stage of training (section 3.3), `Supervision`: of
  latents it would learn less, in which lips are a few numbers. The reference is a frame of another moment in training,
  `train.py latentsync`, but the frame itself when dubbing: the network has learnt to take looks from it, not the mouth.
- GroupNorm in residual blocks takes its statistics over all frames of a clip, in attention blocks per frame. So a
  clip of other frames, or of fewer, gives other pictures.
- Guidance compares with zeros for sound, although no training step of the released models ever dropped the sound
  (`train.py latentsync --drop-audio` does).
- All frames of a video start from one noise, drawn once: a face that does not move is painted alike.

Letters: B clips, F frames of each (16), C width, h w size of a feature map, H W of a picture, T rows of audio features;
in patterns of einops h are heads, d numbers of a head. Paper: arXiv 2412.09262. Released weights: latentsync_unet.pt of
repositories ByteDance/LatentSync (1.0: 850 M parameters, 256 pixels, no motion modules), ByteDance/LatentSync-1.5
(1267 M, 256) and ByteDance/LatentSync-1.6 (the same network at 512); with them whisper/tiny.pt, and
stabilityai/sd-vae-ft-mse.

    unet, whisper = latentsync.load("latentsync_unet.pt"), latentsync.load_whisper("tiny.pt")
    autoencoder = vq.load_autoencoder("sd-vae-ft-mse")                      # version 1.6: load(..., resolution=512)
    align = latentsync.Aligner(unet.config.resolution)
    frames = ((picture, align(points)) for picture, points in video)        # uint8 (H, W, 3); see three_points, or None
    for dubbed in latentsync.lipsync(unet, autoencoder, frames, latentsync.windows(whisper, sound), generator):
        dubbed.picture                                                      # uint8 (H, W, 3)
"""
import math
from collections import namedtuple
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

import vq
from triton_ops import group_norm_silu

FPS, SAMPLE_RATE = 25, 16000


@dataclass(frozen=True)
class Config:
    """Sizes of a video UNet. Files tell all but the numbers of heads, resolution and frames."""

    widths: tuple = (320, 640, 1280, 1280)      # of the levels, fine to coarse; each but the last halves the map
    layers: int = 2                             # per level on the way down; one more on the way up
    heads: int = 8                              # of every attention, whatever its width
    audio_width: int = 384                      # of Whisper's layers
    motion: str = "all"                         # levels with motion modules: "all", those on the way "up", or "none"
    motion_heads: int = 8
    motion_length: int = 24                     # frames that their table of positions has
    resolution: int = 256                       # of the aligned faces, in pixels
    frames: int = 16                            # F: painted at a time
    velocity: bool = False                      # predicted instead of noise: no released one does
    in_channels: int = 13
    out_channels: int = 4
    motion_levels: int = 99                     # so many of the finest levels may have motion modules


@dataclass(frozen=True)
class VideoMAEConfig:
    """Sizes of the video encoder of TREPA. Files tell all but heads, and the pixels and frames of its clips."""

    size: int = 224                             # pixels that clips are resized to
    patch: int = 14                             # of them that make a token's side
    frames: int = 16                            # of a clip
    tubelet: int = 2                            # of them that make a token
    width: int = 1408
    depth: int = 40
    heads: int = 16
    hidden: int = 6144                          # of the feed-forward layers
    classes: int = 174                          # what its head tells apart, which TREPA does not use; 0: no head


@dataclass(frozen=True)
class WhisperConfig:
    """Sizes of Whisper's encoder. Files tell all but heads."""

    mels: int = 80
    positions: int = 1500                       # 30 s
    width: int = 384
    heads: int = 6
    layers: int = 4


CONFIGS = {
    "latentsync_1.5": Config(),
    "latentsync_1.6": Config(resolution=512),
    "latentsync_1.0": Config(motion="none"),
    "latentsync_1.5_efficient": Config(motion="up"),                        # the authors' cheaper training of stage 2
    "talking_head": Config((64, 96, 128), layers=1, heads=4, audio_width=64, motion="none", motion_levels=2,  # demo
                           resolution=64, velocity=True),
}
WHISPERS = {
    "tiny": WhisperConfig(),
    "small": WhisperConfig(width=768, heads=12, layers=12),
    "talking_head": WhisperConfig(positions=250, width=64, heads=2, layers=2),          # the demo's
}
VIDEOMAES = {
    "vit_g": VideoMAEConfig(),                  # vit_g_hybrid_pt_1200e_ssv2_ft.pth
    "talking_head": VideoMAEConfig(64, 8, width=96, depth=4, heads=4, hidden=384, classes=0),       # the demo's
}
# What is trained: parameters whose name has one of these in it, in stage 1 all. Stage 1 goes with motion="none", the
# efficient one with "up"
STAGES = {"1": ("",), "2": ("motion_modules.", "attentions."), "2-efficient": ("motion_modules.", "attn2.")}


# ----------------------------------------------------------------------------------------------------------------------
# Blocks. Frames are pictures (B F, C, h, w), kept channels_last: so they are also tokens (B F, h w, C), and clips
# (B, C, F, h, w), without a copy.


def clip_norm_silu(norm, x, B):
    """silu(norm(x)) with statistics over all frames of each of B clips, x (B F, C, h, w)."""
    x = rearrange(x, "(b f) c h w -> b c f h w", b=B)
    return rearrange(group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps), "b c f h w -> (b f) c h w")


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))): norms see whole clips, convolutions single frames."""

    def __init__(self, c_in, c_out, c_time):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_time, c_out)
        self.norm2 = nn.GroupNorm(32, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x, time):
        """x (B F, c_in, h, w), time (B, c_time) -> (B F, c_out, h, w)."""
        B = len(time)
        h = self.conv1(clip_norm_silu(self.norm1, x, B))
        h += repeat(self.time_emb_proj(F.silu(time)), "b c -> (b f) c 1 1", f=len(x) // B)     # h is fresh: in place
        h = self.conv2(clip_norm_silu(self.norm2, h, B))
        h += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h


class SelfAttention(nn.Module):
    """Multi-head attention of tokens (N, L, C) to each other."""

    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.proj = nn.Linear(C, C)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "n l (three h d) -> three n h l d", three=3, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "n h l d -> n l (h d)"))


class CrossAttention(nn.Module):
    """Multi-head attention of tokens (N, L, C) to others (N, M, c_other)."""

    def __init__(self, C, heads, c_other):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(C, C, bias=False)
        self.key_value = nn.Linear(c_other, 2 * C, bias=False)
        self.proj = nn.Linear(C, C)

    def forward(self, x, other):
        q = rearrange(self.query(x), "n l (h d) -> n h l d", h=self.heads)
        k, v = rearrange(self.key_value(other), "n m (two h d) -> two n h m d", two=2, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "n h l d -> n l (h d)"))


class GEGLU(nn.Module):
    """The feed-forward layer: a linear value times the GELU of a linear gate, both 4 C wide, and back to C."""

    def __init__(self, C):
        super().__init__()
        self.value_gate = nn.Linear(C, 8 * C)
        self.out = nn.Linear(4 * C, C)

    def forward(self, x):
        value, gate = self.value_gate(x).chunk(2, -1)
        return self.out(value * F.gelu(gate))


class SpatialTransformer(nn.Module):
    """One transformer block over the positions of each frame: to each other, to the frame's sound, feed-forward."""

    def __init__(self, C, heads, c_audio):
        super().__init__()
        self.norm = nn.GroupNorm(32, C, eps=1e-6)
        self.proj_in = nn.Conv2d(C, C, 1)
        self.norm1, self.attn1 = nn.LayerNorm(C), SelfAttention(C, heads)
        self.norm2, self.attn2 = nn.LayerNorm(C), CrossAttention(C, heads, c_audio)
        self.norm3, self.ff = nn.LayerNorm(C), GEGLU(C)
        self.proj_out = nn.Conv2d(C, C, 1)

    def forward(self, x, audio=None):
        """x (N, C, h, w), audio (N, 50, c_audio): one window per frame. Without audio that attention is left out; zeros
        for audio would still add its output's bias."""
        h = self.proj_in(vq.norm_silu(self.norm, x, silu=False))
        tokens = rearrange(h, "n c h w -> n (h w) c")
        tokens = tokens + self.attn1(self.norm1(tokens))
        if audio is not None:
            tokens = tokens + self.attn2(self.norm2(tokens), audio)
        tokens = tokens + self.ff(self.norm3(tokens))
        return x + self.proj_out(rearrange(tokens, "n (h w) c -> n c h w", h=x.shape[2]))


def sinusoids(t, C):
    """(B,) -> (B, C): cosines first, then sines, of t * 10000 ** (-2 i / C)."""
    frequency = torch.exp(torch.arange(C // 2, device=t.device) * (-math.log(10000) / (C // 2)))
    angle = t[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], 1)


def frame_positions(length, C):
    """Table (1, length, C): the sine of a frame's number * 10000 ** (-2 i / C) at channel 2 i, its cosine beside."""
    frequency = torch.exp(torch.arange(0, C, 2).double() * (-math.log(10000.0) / C))
    angle = torch.arange(length).double()[:, None] * frequency              # float32 would not do for thousands
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[None].float()


class TemporalAttention(nn.Module):
    """Self-attention of tokens (N, F, C), to which their position in the clip is added."""

    def __init__(self, C, heads, length):
        super().__init__()
        self.attn = SelfAttention(C, heads)
        self.register_buffer("positions", frame_positions(length, C))

    def forward(self, x):
        return self.attn(x + self.positions[:, :x.shape[1]])


class MotionModule(nn.Module):
    """One transformer block over the frames of a clip, for each position: two attentions and a feed-forward layer. Its
    last projection starts at zero: to begin with it changes nothing (AnimateDiff, arXiv 2307.04725)."""

    def __init__(self, C, heads, length):
        super().__init__()
        self.norm = nn.GroupNorm(32, C, eps=1e-6)
        self.proj_in = nn.Linear(C, C)
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(2))
        self.attention = nn.ModuleList(TemporalAttention(C, heads, length) for _ in range(2))
        self.ff_norm, self.ff = nn.LayerNorm(C), GEGLU(C)
        self.proj_out = nn.Linear(C, C)

    def forward(self, x, B):
        """x (B F, C, h, w) -> the same."""
        h = vq.norm_silu(self.norm, x, silu=False)
        tokens = self.proj_in(rearrange(h, "(b f) c h w -> (b h w) f c", b=B))
        for norm, attention in zip(self.norms, self.attention):
            tokens = tokens + attention(norm(tokens))
        tokens = self.proj_out(tokens + self.ff(self.ff_norm(tokens)))
        return x + rearrange(tokens, "(b h w) f c -> (b f) c h w", b=B, h=x.shape[2])


class Upsample(nn.Module):
    """Nearest neighbour to the size of the map that comes next, twice as large or one less, then a convolution."""

    def __init__(self, C):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x, size):
        return self.conv(F.interpolate(x, size, mode="nearest"))


class Level(nn.Module):
    """One resolution: layers of a residual block, a spatial transformer (or none) and a motion module (or none)."""

    def __init__(self, config, c_ins, C, attends, moves):
        super().__init__()
        c, n = config, len(c_ins)
        self.resnets = nn.ModuleList(ResBlock(c_in, C, 4 * c.widths[0]) for c_in in c_ins)
        self.attentions = nn.ModuleList(SpatialTransformer(C, c.heads, c.audio_width) for _ in range(n * attends))
        self.motion_modules = nn.ModuleList(MotionModule(C, c.motion_heads, c.motion_length) for _ in range(n * moves))

    def layer(self, j, x, time, audio):
        """Layer j: x (B F, C, h, w), time (B, c_time), audio (B F, 50, c_audio) or None."""
        x = self.resnets[j](x, time)
        if self.attentions:
            x = self.attentions[j](x, audio)
        return self.motion_modules[j](x, len(time)) if self.motion_modules else x


class Middle(nn.Module):
    """At the lowest resolution: residual block, spatial transformer, residual block."""

    def __init__(self, config):
        super().__init__()
        C, c_time = config.widths[-1], 4 * config.widths[0]
        self.resnets = nn.ModuleList(ResBlock(C, C, c_time) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(C, config.heads, config.audio_width)])

    def forward(self, x, time, audio):
        x = self.attentions[0](self.resnets[0](x, time), audio)
        return self.resnets[1](x, time)


class TimeEmbedding(nn.Module):
    """A time step 0 .. 999 as a vector: cosines and sines of it, and two layers."""

    def __init__(self, C):
        super().__init__()
        self.C = C
        self.linear_1, self.linear_2 = nn.Linear(C, 4 * C), nn.Linear(4 * C, 4 * C)

    def forward(self, t):                                                   # (B,) -> (B, 4 C)
        return self.linear_2(F.silu(self.linear_1(sinusoids(t, self.C).to(self.linear_1.weight.dtype))))


# ----------------------------------------------------------------------------------------------------------------------
# The model


class UNet(nn.Module):
    """Predicts the noise in the latents of a clip. Down, middle, up; what was seen on the way down is joined on the way
    up, as channels."""

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False
        c, widths, last = config, config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0])
        self.down_blocks, self.downsample, self.up_blocks, self.upsample = (nn.ModuleList() for _ in range(4))
        skips = [widths[0]]                                                 # channels of the maps that are kept
        for i, C in enumerate(widths):
            c_ins = [widths[max(i - 1, 0)]] + [C] * (c.layers - 1)
            self.down_blocks.append(Level(c, c_ins, C, i < last, c.motion == "all" and i < c.motion_levels))
            skips += [C] * c.layers
            if i < last:
                self.downsample.append(nn.Conv2d(C, C, 3, stride=2, padding=1))
                skips.append(C)
        self.mid_block = Middle(c)
        below = widths[-1]
        for i, C in enumerate(reversed(widths)):
            c_ins = [(C if j else below) + skips.pop() for j in range(c.layers + 1)]
            self.up_blocks.append(Level(c, c_ins, C, i > 0, c.motion != "none" and last - i < c.motion_levels))
            below = C
            if i < last:
                self.upsample.append(Upsample(C))
        self.conv_norm_out = nn.GroupNorm(32, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], c.out_channels, 3, padding=1)
        self.to(memory_format=torch.channels_last)      # tokens are views of maps then, and convolutions are faster

    def forward(self, x, t, audio=None):
        """Noise (B, 4, F, h, w) in latents, or their velocity.

        x: (B, 13, F, h, w), channels: noisy latents, mask (1: keep), latents of the masked and of the reference picture
        t: (B,) or a number, 0 .. 999; audio: (B, F, 50, 384), zeros for the branch without sound, or None: no attention
        to it at all.
        """
        return self.with_cache(x, t, audio)[0]

    def with_cache(self, x, t, audio=None, deep=None):
        """(noise, deep), where deep is what all but the last layer of the last level made: its input. DeepCache (arXiv
        2312.00858) takes it from an earlier step, as it changes little from one to the next: 1/15 of the work."""
        B, _, frames, h, w = x.shape
        time = self.time_embedding(torch.as_tensor(t, device=x.device).expand(B))
        x = rearrange(x, "b c f h w -> (b f) c h w").to(self.conv_in.weight.dtype, memory_format=torch.channels_last)
        if audio is not None:
            audio = rearrange(audio, "b f n c -> (b f) n c").to(x.dtype)
        skips = [self.conv_in(x)]
        if deep is None:
            deep = self._all_but_last_layer(skips, time, audio)
        x = torch.cat([deep, skips[0]], 1)
        x = self._run(self.up_blocks[-1].layer, len(self.up_blocks[-1].resnets) - 1, x, time, audio)
        x = self.conv_out(clip_norm_silu(self.conv_norm_out, x, B))
        return rearrange(x, "(b f) c h w -> b c f h w", b=B), deep

    def _run(self, layer, *inputs):
        """A layer's output; if `checkpointing`, only its input is kept, and the backward pass computes the inside
        again, one layer at a time."""
        return vq.checkpointed(self.checkpointing, layer, *inputs)

    def _all_but_last_layer(self, skips, time, audio):
        """Down, middle, and up but for the last layer of the last level. Of `skips` it leaves the first."""
        x, last = skips[0], len(self.up_blocks) - 1
        for i, level in enumerate(self.down_blocks):
            for j in range(len(level.resnets)):
                x = self._run(level.layer, j, x, time, audio)
                skips.append(x)
            if i < last:
                x = self.downsample[i](x)
                skips.append(x)
        x = self._run(self.mid_block, x, time, audio)
        for i, level in enumerate(self.up_blocks):
            for j in range(len(level.resnets) - (i == last)):
                x = self._run(level.layer, j, torch.cat([x, skips.pop()], 1), time, audio)
            if i < last:
                x = self.upsample[i](x, skips[-1].shape[2:])
        return x

    @torch.no_grad()
    def init_weights(self, generator=None):
        """PyTorch's default, drawn from `generator`; zero in the last convolution and the motion modules' way out."""
        vq.init_default(self, generator)
        ends = [m.proj_out for m in self.modules() if isinstance(m, MotionModule)]
        for layer in (self.conv_out, *ends):
            layer.weight.zero_()
            layer.bias.zero_()

    def freeze(self, stage):
        """Makes only the parameters of this one of STAGES trainable. To be called before an optimizer takes them."""
        for name, p in self.named_parameters():
            p.requires_grad_(any(part in name for part in STAGES[stage]))

    def loss(self, z, condition, audio, generator=None, t=None, noise=None):
        """The squared error of the predicted noise (or velocity), a scalar: the loss of stage 1, and a part of stage
        2's. And the clean latents (B, 4, F, h, w) that the prediction amounts to, for `Supervision` in stage 2.

        z: (B, 4, F, h, w) scaled latents of true frames; condition: (B, 9, F, h, w) mask, masked and reference latents;
        audio: as for `forward`; t: (B,), and noise, as z: if not given drawn from `generator`, of z's device.
        """
        t = torch.randint(1000, (len(z),), generator=generator, device=z.device) if t is None else t
        noise = mixed_noise(z.shape, generator, z.device) if noise is None else noise
        noisy = add_noise(z, noise, t)
        found = self(torch.cat([noisy, condition], 1), t, audio).float()
        if self.config.velocity:
            loss, found = F.mse_loss(found, velocity(z, noise, t)), noise_of(found, noisy, t)
        else:
            loss = F.mse_loss(found, noise)
        return loss, remove_noise(noisy, found, t)


# ----------------------------------------------------------------------------------------------------------------------
# Diffusion

# alpha bar of the 1000 time steps: which share of a latent's variance is still picture
ALPHAS = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000)**2).cumprod(0)


def _alpha(t, like):
    """ALPHAS[t], a number or (B,), shaped to go with `like` (B, ...)."""
    alpha = ALPHAS.to(like.device)[t]
    return alpha.view(-1, *[1] * (like.dim() - 1)) if alpha.dim() else alpha


def add_noise(z, noise, t):
    """What latents look like at time step t (B,): sqrt(alpha) z + sqrt(1 - alpha) noise."""
    alpha = _alpha(t, z)
    return alpha.sqrt() * z + (1 - alpha).sqrt() * noise


def remove_noise(z, noise, t):
    """The inverse: clean latents, given their noise. In float32: near t = 999 it divides by 0.07."""
    alpha = _alpha(t, z)
    return (z.float() - (1 - alpha).sqrt() * noise.float()) / alpha.sqrt()


def velocity(z, noise, t):
    """sqrt(alpha) noise - sqrt(1 - alpha) z, (B, ...): what some networks predict instead of noise (arXiv 2202.00512).
    At time steps near 999 an error of the noise is one of the picture 12 times as large: it takes a large network, and
    long training, to get the colors right, which are decided there. Velocity is there the picture itself."""
    alpha = _alpha(t, z)
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * z


def noise_of(velocity, noisy, t):
    """The noise in latents `noisy`, given their velocity."""
    alpha = _alpha(t, noisy)
    return alpha.sqrt() * velocity.float() + (1 - alpha).sqrt() * noisy


def mixed_noise(shape, generator=None, device=None, share=1.0):
    """Noise (B, C, F, h, w) for training: a part of its own for each frame, and `share` times as much that all frames
    of a clip have in common; of variance 1. (When dubbing all of it is common.)"""
    own = torch.randn(shape, generator=generator, device=device)
    common = torch.randn((*shape[:2], 1, *shape[3:]), generator=generator, device=device)
    return (own + share * common) / math.sqrt(1 + share**2)


def time_steps(count):
    """Those of a sampler with `count` steps, 1 .. 999: 951, 901, ... 1 for 20."""
    if not 1 <= count <= 999:
        raise ValueError(f"{count} steps: expected 1 .. 999")
    return [1 + i * (1000 // count) for i in reversed(range(count))]


def ddim_step(z, noise, t, count):
    """The latents one of `count` steps earlier than t: the picture that z and its noise amount to, with less of the
    same noise (DDIM, arXiv 2010.02502, eq. 12, eta 0)."""
    before = max(t - 1000 // count, 0)                                      # in the end 0, where a little is left
    return add_noise(remove_noise(z, noise, t), noise.float(), before)


def call(function, constants, *tensors):
    """How `denoise` has the UNet called. Another function of this signature may capture it in a CUDA graph."""
    return function(*constants, *tensors)


def denoise(unet, z, condition, audio, steps=20, cfg=1.5, cache_every=1, run=call):
    """Yields the latents (1, 4, F, h, w) after each step, float32; the last are the result.

    z: noise (1, 4, F, h, w); condition (1, 9, F, h, w); audio (1, F, 50, 384). cfg: guidance, up to 1 none;
    cache_every: run the deep part of the network in every such step only, 3 for DeepCache; run: see `call`.
    """
    guided = cfg > 1
    if guided:                                                              # both branches as one batch
        audio, condition = torch.cat([torch.zeros_like(audio), audio]), condition.expand(2, *condition.shape[1:])
    for i, t in enumerate(time_steps(steps)):
        x = torch.cat([z.expand(len(condition), *z.shape[1:]), condition], 1)
        at = torch.full((len(x),), t, device=x.device)
        noise, deep = run(unet.with_cache, (), x, at, audio, deep if i % cache_every else None)
        if guided:
            silent, noise = noise.float().chunk(2)
            noise = silent + cfg * (noise - silent)
        z = ddim_step(z, noise_of(noise, z, t) if unet.config.velocity else noise, t, steps)
        yield z


# ----------------------------------------------------------------------------------------------------------------------
# Stage 2 of training: what the decoded pixels are told


def place_frames(positions, tokens, side):
    """A table of positions (1, L, C), of L tokens, for another number of them, side * side for each time: for clips
    that are longer or shorter than those that the encoder was trained with it is interpolated."""
    if tokens == positions.shape[1]:
        return positions
    table = rearrange(positions, "1 (l h w) c -> 1 c l h w", h=side, w=side)
    # 0.1 more than wanted and rounded down: a way around rounding errors, by which all positions are moved a little;
    # the authors' code has it, and their numbers depend on it
    stretch = (tokens // side**2 + 0.1) / table.shape[2]
    table = F.interpolate(table, scale_factor=(stretch, 1, 1), mode="trilinear", align_corners=False)
    return rearrange(table, "1 c l h w -> 1 (l h w) c")


class VideoAttention(nn.Module):
    """Multi-head attention of tokens (B, L, C) to each other; queries and values have a bias, keys none."""

    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(C)), nn.Parameter(torch.zeros(C))

    def forward(self, x):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = rearrange(F.linear(x, self.qkv.weight, bias), "b l (three h d) -> three b h l d", three=3,
                            h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)"))


class VideoBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, c):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(c.width, eps=1e-6), VideoAttention(c.width, c.heads)
        self.norm2, self.mlp = nn.LayerNorm(c.width, eps=1e-6), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(c.width, c.hidden), nn.Linear(c.hidden, c.width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class VideoMAE(nn.Module):
    """A video transformer that was trained to fill in masked videos, then to name actions (VideoMAE v2, arXiv
    2303.16727). Here it describes what happens in a clip by one vector. Module names are the official ones."""

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing, c = config, False, config
        side, length = c.size // c.patch, c.frames // c.tubelet
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv3d(3, c.width, (c.tubelet, c.patch, c.patch), (c.tubelet, c.patch, c.patch))
        self.register_buffer("positions", frame_positions(length * side * side, c.width), persistent=False)
        self.blocks = nn.ModuleList(VideoBlock(c) for _ in range(c.depth))
        self.fc_norm = nn.LayerNorm(c.width, eps=1e-6)
        self.head = nn.Linear(c.width, c.classes) if c.classes else None    # in the file, not needed here

    def patches(self, clips):
        """(B, 3, F, H, W) in [-1, 1], F even -> (B, tokens, 3 * tubelet * patch * patch) in [0, 1], no mean subtracted:
        the pixels of every token, frame pair by frame pair."""
        c = self.config
        x = rearrange(clips, "b c f h w -> (b f) c h w")
        if x.shape[2:] != (c.size, c.size):
            x = F.interpolate(x, (c.size, c.size), mode="bicubic", align_corners=False)
        return rearrange((x / 2 + 0.5).clamp(0, 1), "(b l t) c (h p) (w q) -> b (l h w) (c t p q)", b=len(clips),
                         t=c.tubelet, p=c.patch, q=c.patch)

    def embed(self, patches):
        """`patches` -> (B, tokens, width), with their positions. The convolution does not overlap: it is a product."""
        proj = self.patch_embed.proj
        x = F.linear(patches.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)
        return x + place_frames(self.positions, x.shape[1], self.config.size // self.config.patch)

    def encode(self, tokens):
        """(B, any number, width) -> the same, after all blocks."""
        for block in self.blocks:
            tokens = vq.checkpointed(self.checkpointing, block, tokens)
        return tokens

    def features(self, clips):
        """(B, 3, F, H, W) in [-1, 1], F even -> (B, width): the mean of the last block's tokens, normalised."""
        return self.fc_norm(self.encode(self.embed(self.patches(clips))).mean(1))

    @torch.no_grad()
    def init_weights(self, generator=None):
        """PyTorch's default, drawn from `generator`; no biases in attention."""
        vq.init_default(self, generator)
        for block in self.blocks:
            block.attn.q_bias.zero_()
            block.attn.v_bias.zero_()


def trepa(videomae, found, true):
    """Temporal representation alignment (section 3.4), a scalar: mean squared difference of what the encoder says of
    two clips (B, 3, F, H, W) in [-1, 1], as vectors of length 1; so at most 4 / width, which is why it weighs so much.
    It sees frames together: what trembles or flickers is far from what does not, though each frame may be fine."""
    with torch.no_grad():
        target = F.normalize(videomae.features(true).float(), dim=1)
    return F.mse_loss(F.normalize(videomae.features(found).float(), dim=1), target)


class Supervision:
    """The losses of stage 2 on decoded pixels. The noise's loss weighs all latents alike; these look at what a viewer
    looks at: lips, looks, motion. Each is by a network that is frozen here.

    autoencoder: a vq.KLAutoencoder; syncnet: a syncnet.StableSyncNet, lips and sound of the clip belong together;
    videomae: see `trepa`; lpips: a vq.LPIPS, the lower half of each frame looks like the true one. None leaves a loss
    out. checkpointing: compute activations twice, and hold those of `slices` decoded frames at a time (a UNet has a
    switch of its own). Raises ValueError if clips of so many `frames` are not what SyncNet and video encoder take.
    """

    def __init__(self, autoencoder, syncnet=None, videomae=None, lpips=None, *, frames=16, sync_weight=0.05,
                 trepa_weight=10.0, lpips_weight=0.1, checkpointing=False, slices=4):
        if syncnet is not None and syncnet.frames != frames:
            raise ValueError(f"a SyncNet for clips of {syncnet.frames} frames, but clips have {frames}")
        if videomae is not None:
            if frames % videomae.config.tubelet:
                raise ValueError(f"clips of {frames} frames: the video encoder takes them by "
                                 f"{videomae.config.tubelet}")
            videomae.checkpointing = checkpointing
        for network in filter(None, (autoencoder, syncnet, videomae, lpips)):
            network.requires_grad_(False).eval()
        self.autoencoder, self.syncnet, self.videomae, self.lpips = autoencoder, syncnet, videomae, lpips
        weights = ("sync", syncnet, sync_weight), ("lpips", lpips, lpips_weight), ("trepa", videomae, trepa_weight)
        self.weights = {name: weight for name, network, weight in weights if network is not None}
        self.frames, self.checkpointing, self.slices = frames, checkpointing, slices

    def decode(self, z):
        """Latents (B, 4, F, h, w) -> frames (B, F, 3, H, W) in about [-1, 1], through which gradients flow."""
        flat = rearrange(z, "b c f h w -> (b f) c h w")
        if self.checkpointing:
            decoded = [self._again(self.autoencoder.decode, part) for part in flat.split(self.slices)]
        else:
            decoded = [self.autoencoder.decode(flat)]
        return torch.cat(decoded).unflatten(0, (len(z), -1))

    def _again(self, function, *inputs):
        return vq.checkpointed(self.checkpointing, function, *inputs)

    def __call__(self, z, true, mel=None, heard=None):
        """(weighted sum, {"sync", "lpips", "trepa"} without weights), scalars.

        z: (B, 4, F, h, w), from UNet.loss; true: frames (B, F, 3, H, W) in [-1, 1]; mel: (B, 1, 80, columns), what
        SyncNet hears of the clip; heard: (B,) 1 or 0, whether the UNet got the sound, else lips cannot follow it.
        """
        if z.shape[2] != self.frames:
            raise ValueError(f"clips of {z.shape[2]} frames: expected {self.frames}")
        if not self.weights:
            return z.new_zeros(()), {}
        found, losses = self.decode(z), {}
        if self.syncnet is not None:
            losses["sync"] = self._sync(found, mel, heard)
        if self.lpips is not None:
            low = true.shape[3] // 2
            halves = (clips[:, :, :, low:].flatten(0, 1) for clips in (found, true))
            losses["lpips"] = self._again(self.lpips, *halves).mean()
        if self.videomae is not None:
            losses["trepa"] = trepa(self.videomae, found.transpose(1, 2), true.transpose(1, 2))     # channels first
        return sum(self.weights[name] * loss for name, loss in losses.items()), losses

    def _sync(self, found, mel, heard):
        """-log of the probability that these lips say this (section 3.3)."""
        height, width = self.syncnet.config.picture                         # of the lower half of a square face
        frames = found.flatten(0, 1)
        if frames.shape[3] != width:
            frames = F.interpolate(frames, (width, width), mode="bicubic", align_corners=False)
        halves = rearrange(frames[:, :, -height:], "(b f) c h w -> b (f c) h w", b=len(found))
        cosine = self._again(self.syncnet, halves, mel)
        with torch.autocast(cosine.device.type, enabled=False):             # not safe in half precision
            cosine = cosine.float().clamp(min=1e-6)                         # at 0 the gradient would be 1e12
            return F.binary_cross_entropy(cosine, torch.ones_like(cosine), heard)


# ----------------------------------------------------------------------------------------------------------------------
# Sound: Whisper's encoder, and the windows of it that belong to frames


def log_mel(sound, bands=80):
    """Sound (n,) in [-1, 1] -> tensor (bands, n // 160): what Whisper hears, 100 columns a second.

    Powers of windows of 400 samples, in mel bands, as logarithms down to 8 decades below the loudest of the whole
    signal. Computed block by block, for long signals.
    """
    sound = torch.as_tensor(sound, dtype=torch.float32)
    columns = len(sound) // 160
    if not columns:
        raise ValueError(f"{len(sound)} samples of sound: expected at least 160, a hundredth of a second")
    sound = F.pad(sound, (0, max(0, 201 - len(sound))))                     # as much as is mirrored
    sound = F.pad(sound[None, None], (200, 200), mode="reflect")[0, 0]
    filters = torch.from_numpy(vq.slaney_mels(bands, 0.0, 8000.0, 400, SAMPLE_RATE)).float()
    hann, mel = torch.hann_window(400), torch.empty(bands, columns)
    for start in range(0, columns, 3000):
        count = min(3000, columns - start)
        frames = sound[start * 160:(start + count - 1) * 160 + 400].unfold(0, 400, 160)
        power = torch.fft.rfft(frames * hann).abs().square()
        mel[:, start:start + count] = (filters @ power.T).clamp(min=1e-10).log10()
    return (mel.clamp(min=mel.max() - 8) + 4) / 4


class WhisperAttention(nn.Module):
    """Self-attention; keys have no bias, which a softmax would not notice."""

    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = nn.Linear(C, C), nn.Linear(C, C, bias=False), nn.Linear(
            C, C), nn.Linear(C, C)

    def forward(self, x):
        q, k, v = (rearrange(f(x), "b l (h d) -> b h l d", h=self.heads) for f in (self.query, self.key, self.value))
        return self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)"))


class WhisperBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, C, heads):
        super().__init__()
        self.attn_ln, self.attn = nn.LayerNorm(C), WhisperAttention(C, heads)
        self.mlp_ln, self.mlp = nn.LayerNorm(C), nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def forward(self, x):
        x = x + self.attn(self.attn_ln(x))
        return x + self.mlp(self.mlp_ln(x))


class Whisper(nn.Module):
    """The encoder of a speech recogniser (arXiv 2212.04356), as a source of features."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.width
        self.conv1 = nn.Conv1d(config.mels, C, 3, padding=1)
        self.conv2 = nn.Conv1d(C, C, 3, stride=2, padding=1)
        angle = torch.arange(config.positions)[:, None] * torch.exp(
            -math.log(10000) / (C // 2 - 1) * torch.arange(C // 2))
        self.register_buffer("positional_embedding", torch.cat([angle.sin(), angle.cos()], 1))
        self.blocks = nn.ModuleList(WhisperBlock(C, config.heads) for _ in range(config.layers))
        self.ln_post = nn.LayerNorm(C)                                      # before the recogniser's decoder: not used

    def forward(self, mel):
        """(B, mels, 2 * positions) -> (B, positions, layers + 1, C): the input of the first block, and what each makes
        of it."""
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel.to(self.conv1.weight.dtype)))))
        x = x.transpose(1, 2) + self.positional_embedding
        outputs = [x]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return torch.stack(outputs, 2)

    @torch.no_grad()
    def pieces(self, sound):
        """Features of a sound (n,) in pieces (rows, layers + 1, C), of at most 30 s; 50 rows a second. The last piece
        is filled up with zeros in the mel spectrogram. (Whisper itself would add silence, about -1.5 there.)"""
        mel, size = log_mel(sound, self.config.mels), 2 * self.config.positions
        for part in mel.split(size, 1):
            part = part.to(self.conv1.weight.device)
            yield self(F.pad(part, (0, size - part.shape[1]))[None])[0, :part.shape[1] // 2]

    @torch.no_grad()
    def init_weights(self, generator=None):
        """PyTorch's default, drawn from `generator`."""
        vq.init_default(self, generator)


def count_rows(samples, positions=1500):
    """Rows of features that so many samples of sound have."""
    whole, rest = divmod(samples // 160, 2 * positions)
    return whole * positions + rest // 2


def count_frames(rows, fps=FPS):
    """Frames that are made for so many rows: up to two more than the sound lasts, as in the original."""
    return next(i for i in range(math.ceil((rows + 1) * fps / 50) + 1) if int(i * 50 / fps) > rows) + 1


def window_rows(frame, rows, fps=FPS):
    """Numbers of the 10 rows of features that a frame hears, 0.2 s; at both ends the first and the last one repeat."""
    centre = int(frame * 50 / fps)
    return np.arange(centre - 4, centre + 6).clip(0, rows - 1)


def windows(whisper, sound, fps=FPS):
    """Yields what each frame hears, (50, C) for tiny: 10 rows of 5 layers, row by row. Only what is needed is kept."""
    rows = count_rows(len(sound), whisper.config.positions)
    if not rows:
        raise ValueError("the sound is shorter than a fiftieth of a second")
    pieces, held, first = whisper.pieces(sound), None, 0
    for frame in range(count_frames(rows, fps)):
        index = window_rows(frame, rows, fps)
        while held is None or first + len(held) <= index[-1]:
            piece = next(pieces)
            held = piece if held is None else torch.cat([held, piece])
        held, first = held[index[0] - first:], index[0]
        yield held[index - first].flatten(0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Faces: the mask, the way to the aligned face and back

# By how much the lower part of the mask narrows from row to row, at its left and at its right
LEFT = ("000000010000000000000100000000000001000000101010101101011010111101111111101111112111211212212122222222222323"
        "32454")
RIGHT = ("00000010000000000000100000000000001000000101010101101101101101101101111101111111111111211211212122122223232"
         "2322444")


def face_mask(size=256):
    """The mask of all released models, (size, size) float32: 1 where the picture is kept, 0 where it is painted anew.

    At 256 pixels it is 0 or 1: from row 95 on the cheeks, whose sides give away how the jaw moves, but not the nose;
    from row 128 on all down to the chin, where it narrows. 40.7 % of the picture. Other sizes are resized from that.
    """
    mask = np.ones((256, 256), np.float32)
    mask[95:128, 9:247] = 0
    mask[95:128, 78:178] = 1
    left, right = 9 + np.cumsum([0, *map(int, LEFT), 23]), 247 - np.cumsum([0, *map(int, RIGHT)])
    for row, (a, b) in enumerate(zip(left, right), 128):
        mask[row, a:b + 1] = 0
    mask = torch.from_numpy(mask)
    return mask if size == 256 else lanczos_resize(255 * mask[None], size)[0] / 255


def lanczos_resize(pictures, size):
    """(..., h, w) in 0 .. 255 -> (..., size, size), rounded: Lanczos over 4 pixels to each side, as OpenCV has it for
    bytes, weights being multiples of 1 / 2048. On the way down it skips pixels: no anti-aliasing."""
    def weights(n):
        centre = (torch.arange(size, dtype=torch.float64) + 0.5) * n / size - 0.5
        taps = centre.floor()[:, None] + torch.arange(-3, 5)
        distance = centre[:, None] - taps
        w = torch.sinc(distance) * torch.sinc(distance / 4)
        w = ((w / w.sum(1, keepdim=True)).float() * 2048).round().double() / 2048      # in float32, as there: ties
        return torch.zeros(size, n, dtype=torch.float64).scatter_add_(1, taps.long().clamp(0, n - 1), w)
    down, across = (weights(n).float().to(pictures) for n in pictures.shape[-2:])           # mps has no float64
    return (down @ pictures @ across.T + 0.5).floor().clamp(0, 255)


def three_points(landmarks):
    """Landmarks (..., N, 2), x and y in pixels -> the three that faces are aligned by, (..., 3, 2): middle of the brow
    at the left of the picture, of the one at the right, nose.

    N: 3, these themselves; 5, eyes, nose and mouth corners (MTCNN), brows being a third of the eyes' distance above
    them; 106 (InsightFace, what the authors used; rounded as there); 478 (MediaPipe's face mesh). Else ValueError.
    """
    p = np.asarray(landmarks, float)
    mean = lambda *numbers: p[..., list(numbers), :].mean(-2)
    n = p.shape[-2] if p.ndim >= 2 and p.shape[-1] == 2 else 0
    if n == 3:
        return p
    if n == 5:
        left, right, nose = p[..., 0, :], p[..., 1, :], p[..., 2, :]
        up = (left + right) / 2 - nose
        up *= 0.33 * np.linalg.norm(right - left, axis=-1, keepdims=True) / np.linalg.norm(up, axis=-1, keepdims=True)
        return np.stack([left + up, right + up, nose], -2)
    if n == 106:
        return np.round(np.stack([mean(43, 48, 49, 51, 50), mean(101, 102, 103, 104, 105), mean(74, 77, 83, 86)], -2))
    if n == 478:
        return np.stack([mean(70, 63, 105, 66, 107, 46, 53, 52, 65, 55), mean(
            300, 293, 334, 296, 336, 276, 283, 282, 295, 285), mean(195, 4, 129, 358)], -2)
    raise ValueError(f"landmarks of shape {p.shape}: expected (..., N, 2) with N = 3, 5, 106 or 478")


class Aligner:
    """Finds for each frame of a video the map to the aligned face. Call it in order: it smoothes a little.

    align(points (3, 2)) -> tensor (2, 3), or None for None: pixels of the frame, as (x, y, 1), to pixels of a canvas of
    size `canvas` (height, width), on which brows and nose stand where they stand in all faces. The canvas is higher
    than wide, 280 x 210, and then squeezed into a square of 256. Raises ValueError for points that coincide.
    """

    def __init__(self, resolution):
        scale = 2.8 * resolution / 256
        self.resolution, self.template = resolution, torch.tensor([(17, 20), (58, 20), (37.5, 40)]) * scale
        self.canvas, self.bias = (int(100 * scale), int(75 * scale)), None

    def __call__(self, points):
        if points is None:
            return None
        points = torch.as_tensor(points, dtype=torch.float32)
        c1, c2 = points.mean(0), self.template.mean(0)
        source, target = points - c1, self.template - c2
        s1, s2 = source.std(), target.std()
        if not s1 > 0:
            raise ValueError(f"these are not three points of a face: {points.tolist()}")
        source, target = source / s1, target / s2
        U, _, Vt = torch.linalg.svd(source.T @ target)                      # the rotation between the two (Procrustes)
        R = Vt.T @ U.T
        if R.det() < 0:                                                     # a mirror image: the nearest without
            R = Vt.T * torch.tensor([1, -1]) @ U.T
        # the original's smoothing, kept for its numbers: how far the noses are apart, not turned and in units of s2, is
        # averaged over frames and added as if it were pixels; for upright heads it is less than one
        misfit = target[2] - source[2]
        self.bias = misfit if self.bias is None else 0.2 * self.bias + 0.8 * misfit
        move = c2 - s2 / s1 * (R @ c1) + self.bias
        return torch.cat([s2 / s1 * R, move[:, None]], 1)


def inverse(matrix):
    """The inverse of a map (2, 3)."""
    return homogeneous(matrix).inverse()[:2]


def homogeneous(matrix):
    """(2, 3) -> (3, 3)."""
    return torch.cat([matrix, matrix.new_tensor([[0, 0, 1]])])


def warp(picture, matrix, size, fill):
    """Moves a picture (C, h, w) by a map (2, 3) of its pixels (x, y, 1) -> (C, *size), bilinear; `fill` outside.

    In float32, step by step as kornia does it: callers truncate to whole numbers, and where it is one already
    (saturated colors) the last bit decides.
    """
    def to_unit(h, w):                                                      # pixels to -1 .. 1, corners to corners
        return torch.tensor([[2 / max(w - 1, 1), 0, -1], [0, 2 / max(h - 1, 1), -1], [0, 0, 1]])
    between = to_unit(*size) @ (homogeneous(matrix.float().cpu()) @ to_unit(*picture.shape[1:]).inverse())
    at = F.affine_grid(between.inverse()[None, :2], [1, 1, *size], align_corners=True).to(picture)
    moved, covered = (F.grid_sample(x[None], at, align_corners=True)[0] for x in (picture, torch.ones_like(picture)))
    return moved + (1 - covered) * fill


def align_face(picture, matrix, canvas, resolution):
    """Frame uint8 (H, W, 3) -> aligned face (3, resolution, resolution), values 0 .. 255, float32, whole numbers."""
    face = warp(picture.permute(2, 0, 1).float(), matrix, canvas, fill=127.0)
    return lanczos_resize(face.clamp(0, 255).floor(), resolution)


def paste_back(picture, face, matrix, canvas):
    """A frame uint8 (H, W, 3) with the face (3, resolution, resolution) in [-1, 1] at its place, its rim faded.

    Only the part of the frame around the face is computed, and changed.
    """
    corners = torch.tensor([(x, y, 1.0) for x in (0, canvas[1] - 1) for y in (0, canvas[0] - 1)])
    there = corners @ inverse(matrix).T
    low, high = there.amin(0), there.amax(0)
    margin = (high - low).max() / 10 + 4                                    # more than is eroded and blurred
    (x0, y0), (x1, y1) = (low - margin).floor().int().tolist(), (high + margin).ceil().int().tolist()
    y0, x0, y1, x1 = max(y0, 0), max(x0, 0), min(y1, picture.shape[0]), min(x1, picture.shape[1])
    if y0 >= y1 or x0 >= x1:
        return picture                                                      # all of it is outside
    back = inverse(matrix) - torch.tensor([[0, 0, x0], [0, 0, y0]])
    size = y1 - y0, x1 - x0
    face = F.interpolate(face[None].float(), canvas, mode="bicubic", antialias=True, align_corners=False)[0]
    face = (warp(face, back, size, fill=127.0) / 2 + 0.5).clamp(0, 1) * 255           # 127: white, but not for long:
    covered = warp(torch.ones(1, *canvas, device=face.device), back, size, fill=0.0)
    covered = erode(covered, 2)                                             # pixels with a part of it are left out
    e = int(float(covered.sum()) ** 0.5) // 20
    soft = blur(erode(covered, 2 * e), e) if e else covered
    part = picture[y0:y1, x0:x1].permute(2, 0, 1).float()
    part = soft * covered * face + (1 - soft) * part
    result = picture.clone()
    result[y0:y1, x0:x1] = part.permute(1, 2, 0).clamp(0, 255).byte()       # truncates
    return result


def erode(x, n):
    """(1, h, w) -> the minimum of n x n pixels, n even, half of them to the left and above; a border does not erode."""
    padded = F.pad(x, (n // 2, n - n // 2 - 1) * 2, value=math.inf)
    return -F.max_pool2d(F.max_pool2d(-padded, (1, n), 1), (n, 1), 1)


def blur(x, radius):
    """(1, h, w) under a Gaussian of that radius in pixels; edges are reflected."""
    sigma = 0.3 * (radius - 1) + 0.8
    bell = torch.exp(-torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype) ** 2 / (2 * sigma**2))
    bell = bell / bell.sum()
    room = [min(radius, n - 1) for n in x.shape[1:]]                        # a reflection is no longer than the picture
    x = F.pad(x[None], (room[1], room[1], room[0], room[0]), mode="reflect")
    x = F.pad(x, (radius - room[1],) * 2 + (radius - room[0],) * 2, mode="replicate")
    return F.conv2d(F.conv2d(x, bell.view(1, 1, 1, -1)), bell.view(1, 1, -1, 1))[0]


# ----------------------------------------------------------------------------------------------------------------------
# The pipeline


Dubbed = namedtuple("Dubbed", "picture source face masked generated")
Dubbed.__doc__ = """One frame of the result. picture: uint8 (H, W, 3); source: the same before. face, masked, generated:
the aligned face, its masked version, and as it was painted, surroundings included, (3, resolution, resolution) in
about [-1, 1]; None where there was no face, and nothing was done."""


@torch.no_grad()
def paint(unet, autoencoder, faces, audio, z, mask, generator, steps=20, cfg=1.5, cache_every=1, slices=4, run=call,
          references=None):
    """Aligned faces (F, 3, r, r) in [-1, 1], audio (F, 50, 384), noise z (1, 4, 1, h, w) -> (faces painted anew, masked
    faces), both (F, 3, r, r). mask: (r, r); slices: faces that the autoencoder gets at a time; references: other
    pictures of this face, by default the same."""
    masked = faces * mask
    references = faces if references is None else references
    condition = see(autoencoder, masked, references, mask, generator, slices)           # (F, 9, h, w)
    run = run if len(faces) == unet.config.frames else call                 # others are rare: not worth a capture
    to_clip = lambda x: rearrange(x.float(), "f c h w -> 1 c f h w")
    z = z.expand(-1, -1, len(faces), -1, -1)
    for z in denoise(unet, z, to_clip(condition), audio[None], steps, cfg, cache_every, run):
        pass
    z = rearrange(z, "1 c f h w -> f c h w")
    painted = torch.cat([autoencoder.decode(part) for part in z.split(slices)])
    return painted * (1 - mask) + faces * mask, masked


def see(autoencoder, masked, references, mask, generator, slices=64):
    """What the UNet sees besides the noisy latents, (N, 9, h, w): the mask (r, r), and latents of masked and of
    reference pictures (N, 3, r, r). These are drawn, not means, the masked ones' first. slices: pictures encoded at a
    time."""
    latents = []
    for pictures in (masked, references):
        parts = [autoencoder.encode(part) for part in pictures.split(slices)]
        mean, std = (torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "std"))
        latents.append(vq.Posterior(mean, std, parts[0].scaling).sample(generator))     # one draw for all
    return torch.cat([F.interpolate(mask.expand(len(masked), 1, *mask.shape), latents[0].shape[2:]), *latents], 1)


@torch.no_grad()
def lipsync(unet, autoencoder, frames, sound, generator, *, overlap=0, **options):
    """Dubs a video -> yields Dubbed, as many as the shorter of the two inputs has. Holds one clip of frames at a time.

    frames: iterable of (picture uint8 (H, W, 3), its map from an Aligner of the UNet's resolution, or None where there
    is no face: it stays as it is, and its neighbours are neighbours in the clip). sound: iterable of (50, 384), see
    `windows`. overlap: so many frames are painted in two successive clips, and cross-faded; 0 is the original's way,
    and leaves a seam every 16 frames. options: of `paint`. With 0, and a face in every frame, random numbers are drawn
    as the original draws them: the noise, then for each clip those of the masked faces' latents and of the faces'.
    """
    c, device = unet.config, unet.conv_in.weight.device
    if not 0 <= overlap < c.frames:
        raise ValueError(f"overlap {overlap}: expected 0 .. {c.frames - 1}")
    mask, canvas = face_mask(c.resolution).to(device), Aligner(c.resolution).canvas
    place = device if device.type == "cuda" else "cpu"                      # of warping, which not all devices can do
    side = c.resolution // autoencoder.config.stride
    z = torch.randn(1, c.out_channels, 1, side, side, generator=generator, device=device)       # one for all frames
    options = dict(z=z, mask=mask, generator=generator) | options

    def finished(picture, matrix, _, found):
        if found is None:
            return Dubbed(picture, picture, None, None, None)
        result = paste_back(torch.as_tensor(picture, device=place), found[2].to(place), matrix, canvas)
        return Dubbed(result.cpu().numpy(), picture, *found)

    stream, held = zip(frames, sound), []                                   # held: painted, but not yet handed out
    while fresh := list(islice(stream, c.frames - len(held))):
        clip = held + [[picture, matrix, audio, None] for (picture, matrix), audio in fresh]
        _paint_clip(unet, autoencoder, clip, len(held), canvas, place, options)
        done = len(clip) - overlap if len(clip) == c.frames else len(clip)
        yield from (finished(*one) for one in clip[:done])
        held = clip[done:]
    yield from (finished(*one) for one in held)


def _paint_clip(unet, autoencoder, clip, known, canvas, place, options):
    """Fills in `found`, (face, masked, generated), in a clip of [picture, map, window, found]; of the first `known`
    frames it has been found before, and the two are cross-faded."""
    device = unet.conv_in.weight.device
    seen = [i for i, (_, matrix, _, _) in enumerate(clip) if matrix is not None]
    if not seen:
        return
    align = lambda picture, matrix: align_face(torch.as_tensor(picture, device=place), matrix, canvas,
                                               unet.config.resolution)
    faces = torch.stack([align(clip[i][0], clip[i][1]) for i in seen]).to(device) / 127.5 - 1
    audio = torch.stack([clip[i][2] for i in seen]).to(device)
    generated, masked = paint(unet, autoencoder, faces, audio, **options)
    for i, *found in zip(seen, faces, masked, generated):
        if i < known and clip[i][3]:                                        # the later, the more of this clip's
            found[2] = torch.lerp(clip[i][3][2], found[2], (i + 1) / (known + 1))
        clip[i][3] = found


# ----------------------------------------------------------------------------------------------------------------------
# Loading

_BLOCK = "transformer_blocks.0"
_FEED_FORWARD = [("ff.net.0.proj", "ff.value_gate"), ("ff.net.2", "ff.out")]
_SPATIAL = [
    *[(f"attn1.to_{x}", f"attn1.{x}") for x in "qkv"], ("attn1.to_out.0", "attn1.proj"),
    ("attn2.to_q", "attn2.query"), ("attn2.to_k", "attn2.key"), ("attn2.to_v", "attn2.value"),
    ("attn2.to_out.0", "attn2.proj"), *[(f"norm{i}", f"norm{i}") for i in (1, 2, 3)], *_FEED_FORWARD]
_TEMPORAL = [
    *[(f"attention_blocks.{{}}.to_{x}", f"attention.{{}}.attn.{x}") for x in "qkv"],
    ("attention_blocks.{}.to_out.0", "attention.{}.attn.proj"),
    ("attention_blocks.{}.pos_encoder.pe", "attention.{}.positions"),
    ("norms.{}", "norms.{}"), ("ff_norm", "ff_norm"), *_FEED_FORWARD]
_ATTENTION, _MOTION = "attentions.{}.", "motion_modules.{}."
RENAMES = [     # official fragment of a key, ours
    *[(f"{_ATTENTION}{_BLOCK}.{theirs}", f"{_ATTENTION}{ours}") for theirs, ours in _SPATIAL],
    *[(f"{_MOTION}temporal_transformer.{_BLOCK}.{theirs}", f"{_MOTION}{ours}") for theirs, ours in _TEMPORAL],
    *[(f"{_MOTION}temporal_transformer.{x}", f"{_MOTION}{x}") for x in ("norm", "proj_in", "proj_out")],
    ("down_blocks.{}.downsamplers.0.conv", "downsample.{}"), ("up_blocks.{}.upsamplers.0.conv", "upsample.{}.conv"),
]
VERSION_1_0 = [(f"{_BLOCK}.audio_cross_attn.norm", f"{_BLOCK}.norm2"),
               (f"{_BLOCK}.audio_cross_attn.attn", f"{_BLOCK}.attn2")]
QKV, KV = ("qkv", ("q", "k", "v")), ("key_value", ("key", "value"))


def infer_config(state, path):
    """The Config of an official state dict, read from its shapes. What these do not tell is that of the first entry of
    CONFIGS with the same widths; without one config= must be given."""
    count = lambda pattern: next(i for i in range(100) if pattern.format(i) not in state)
    levels = count("down_blocks.{}.resnets.0.conv1.weight")
    widths = tuple(len(state[f"down_blocks.{i}.resnets.0.conv1.weight"]) for i in range(levels))
    known = next((config for config in CONFIGS.values() if config.widths == widths), None)
    if known is None:
        raise vq.CheckpointError(f"{path}: a UNet of widths {widths}, whose number of heads no tensor tells: "
                                 "pass config=")
    moving = {key.split("_")[0] for key in state if ".motion_modules." in key}              # down, up
    tables = [v.shape[1] for k, v in state.items() if k.endswith("pos_encoder.pe")]
    return replace(known, layers=count("down_blocks.0.resnets.{}.conv1.weight"),
                   audio_width=state[f"down_blocks.0.attentions.0.{_BLOCK}.attn2.to_k.weight"].shape[1],
                   motion="all" if "down" in moving else "up" if moving else "none",
                   motion_length=tables[0] if tables else known.motion_length,
                   in_channels=state["conv_in.weight"].shape[1], out_channels=len(state["conv_out.weight"]))


def load(path, config=None, resolution=None, dtype=torch.float32, device="cpu"):
    """A UNet in eval mode from a released file of version 1.0, 1.5 or 1.6, a training checkpoint, or a file of ours.

    resolution: of the faces, 256 or 512, which no released file tells: those of 1.5 and 1.6 have the same shapes.
    Raises vq.CheckpointError.
    """
    state, saved = vq.read_checkpoint(path, nested=(("state_dict",),))
    state = vq.rename_keys(state, VERSION_1_0)
    vq.require(state, "conv_in.weight", "down_blocks.0.resnets.0.conv1.weight",
               "conv_out.weight", f"down_blocks.0.attentions.0.{_BLOCK}.attn2.to_k.weight", path=path,
               what="a UNet of LatentSync (latentsync_unet.pt, or one of train.py)")
    config = config or (vq.config_from_json(Config, saved, path) if saved else infer_config(state, path))
    if resolution:
        config = replace(config, resolution=resolution)
    model = vq.build(UNet, config)
    vq.load_strict(model, _to_ours(state), path, optional=_tables(model))
    return model.eval().to(device, dtype)


def _to_ours(state):
    return vq.join_rows(vq.join_rows(vq.rename_keys(state, RENAMES), *QKV), *KV)


def _tables(model):
    """Names of what is computed, and in files only for completeness: positions."""
    return {name for name, _ in model.named_buffers()}


def start_from_stable_diffusion(model, path):
    """Fills a UNet with the weights of Stable Diffusion 1.5's, a folder or file in diffusers' layout, where they fit:
    not its first convolution, which saw 4 channels and is set to zero, nor the keys and values of text: those of sound,
    and motion modules, stay as they are. Raises vq.CheckpointError."""
    state, _ = vq.read_checkpoint(path)
    vq.require(state, "conv_in.weight", f"down_blocks.0.attentions.0.{_BLOCK}.attn2.to_k.weight", path=path,
               what="the UNet of Stable Diffusion 1.5")
    foreign = ("conv_in.", *(f"{_BLOCK}.attn2.to_{x}." for x in "kv"))
    state = _to_ours({k: v for k, v in state.items() if not any(part in k for part in foreign)})
    own = {k for k in model.state_dict() if k.startswith("conv_in.") or ".key_value." in k or ".motion_modules." in k}
    vq.load_strict(model, state, path, optional=own)
    with torch.no_grad():
        model.conv_in.weight.zero_()
        model.conv_in.bias.zero_()


def load_whisper(path, config=None, dtype=torch.float32, device="cpu"):
    """Whisper's encoder in eval mode from OpenAI's file, tiny.pt for the released UNets, or a file of ours. Its decoder
    is left out. Raises vq.CheckpointError."""
    state, saved = vq.read_checkpoint(path, nested=(("model_state_dict",),))
    state = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    vq.require(state, "conv1.weight", "blocks.0.attn.query.weight", "ln_post.weight", path=path,
               what="a Whisper model (OpenAI's tiny.pt, or one of train.py)")
    if config is None and saved:
        config = vq.config_from_json(WhisperConfig, saved, path)
    elif config is None:
        width, mels, _ = state["conv1.weight"].shape
        heads = width // 64                                                 # in all that OpenAI made
        config = WhisperConfig(mels, len(state["positional_embedding"]), width, heads,
                               sum(k.endswith(".attn.query.weight") for k in state))
    model = vq.build(Whisper, config)
    vq.load_strict(model, state, path, optional=_tables(model))
    return model.eval().to(device, dtype)


def load_videomae(path, config=None, dtype=torch.float32, device="cpu"):
    """The video encoder in eval mode from vit_g_hybrid_pt_1200e_ssv2_ft.pth, or a file of ours. Raises
    vq.CheckpointError."""
    state, saved = vq.read_checkpoint(path, nested=(("model",), ("module",)))
    vq.require(state, "patch_embed.proj.weight", "blocks.0.attn.q_bias", "blocks.0.mlp.fc1.weight",
               path=path, what="a VideoMAE v2 (vit_g_hybrid_pt_1200e_ssv2_ft.pth, or one of train.py)")
    if config is None and saved:
        config = vq.config_from_json(VideoMAEConfig, saved, path)
    elif config is None:
        width, _, tubelet, patch, _ = state["patch_embed.proj.weight"].shape
        depth = sum(k.endswith(".attn.q_bias") for k in state)
        known = next((c for c in VIDEOMAES.values() if (c.width, c.depth) == (width, depth)), None)
        if known is None:
            raise vq.CheckpointError(f"{path}: a VideoMAE of width {width} and depth {depth}, whose number of heads no "
                                     "tensor tells: pass config=")
        config = replace(known, patch=patch, tubelet=tubelet, hidden=len(state["blocks.0.mlp.fc1.weight"]),
                         classes=len(state.get("head.weight", ())))
    model = vq.build(VideoMAE, config)
    vq.load_strict(model, state, path)
    return model.eval().to(device, dtype)


def export(model):
    """The official state dict of a UNet, in float32 and with the keys of version 1.5, or what a Whisper has of it,
    or that of a VideoMAE."""
    state = {k: v.float().contiguous() for k, v in model.state_dict().items()}
    if isinstance(model, VideoMAE):
        return state
    if isinstance(model, Whisper):
        return {f"encoder.{k}": v for k, v in state.items()}
    return vq.rename_keys(vq.split_rows(vq.split_rows(state, *QKV), *KV), RENAMES, inverse=True)


def save(model, path, dtype=None, **extra):
    """Writes a UNet, a Whisper or a VideoMAE as safetensors: official keys, config (and `extra`) in the header."""
    computed = {"encoder.positional_embedding"}
    state = {k: v for k, v in export(model).items() if k not in computed and not k.endswith("pos_encoder.pe")}
    vq.save_checkpoint(path, state, model.config, dtype, **extra)
