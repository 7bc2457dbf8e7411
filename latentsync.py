"""LatentSync: a talking head says something else. This file has model and pipeline; the autoencoder is in vq.py.

A diffusion model repaints the lower half of a face, frame by frame, so that it fits a given speech. It is Stable
Diffusion 1.5's UNet with three changes: besides the noisy latent its input has the masked picture and a reference
picture as further channels; where Stable Diffusion attends to text it attends to audio; and from version 1.5 on,
motion modules attend between the frames of a clip, which keeps them from flickering.

    video, 25 frames a second                                               speech, 16 kHz
      | three points of each face -> a similarity transform                   | log-mel, 100 columns a second
    aligned faces (F, 3, 256, 256)                                            | Whisper's encoder, all of its layers
      |            | * mask: without the mouth                              (T, 5, 384), 50 rows a second
      | E          | E         E, D: the autoencoder, vq.KLAutoencoder         | 10 rows around each frame
    reference    masked    mask    noise z                                  (F, 50, 384)
      +------------+---------+-------+                                        |
                   | (13, F, 32, 32), in the order z, mask, masked, reference |
            +--> UNet: convolutions, attention within a frame, to its audio, between frames
      20 times   | predicted noise -> a DDIM step -> z
            +----+
                 | D
    generated faces (F, 3, 256, 256) -> pixels outside of the mask are the original's -> warped back into the frames

What to look out for when reading:
- The audio of a frame is ten rows of Whisper's features, 0.2 s around it. A row holds 5 layers: the input of the first
  of Whisper tiny's 4 blocks, and the output of each. Early layers are near to the sound, late ones to the words, and
  the UNet may use both. Whisper's own attention has already mixed the whole piece of up to 30 s into each row.
- Faces are aligned so that brows and nose stand still, and the mask hides most of what moves with speech. Otherwise
  the network would guess the mouth from cheeks and head instead of the audio (the paper's "shortcut"). For the same
  reason a SyncNet (syncnet.py) judges the decoded pixels in the second stage of training (section 3.3), see
  `Supervision`. Judging latents would teach it less, because the lips are only a few numbers there.
- In training the reference is a frame of another moment, in dubbing the frame itself. The network has learned to take
  identity from it, but not the mouth.
- GroupNorm in residual blocks takes its statistics over all frames of a clip, in attention blocks per frame. The
  picture of a frame therefore depends on the other frames of its clip, and on their number.
- Guidance compares with zeros for audio, although no training step of the released models ever dropped the audio
  (`train.py latentsync --drop-audio` does).
- All frames of a video start from one noise, drawn once, so that a face that does not move is painted alike.

Letters: B clips, F frames of each (16), A audio features of a frame (10 rows x 5 layers = 50 for Whisper tiny), C
width, h w size of a feature map, H W of a picture, T rows of audio features; in `attend` h are heads and d numbers
of a head. Paper: arXiv 2412.09262. Released weights: latentsync_unet.pt of ByteDance/LatentSync (1.0: 850 M
parameters, 256 pixels, no motion modules), ByteDance/LatentSync-1.5 (1267 M, 256) and ByteDance/LatentSync-1.6 (the
same network at 512); with them whisper/tiny.pt, and stabilityai/sd-vae-ft-mse.

    unet, whisper = latentsync.load("latentsync_unet.pt"), latentsync.load_whisper("tiny.pt")
    autoencoder = vq.load_autoencoder("sd-vae-ft-mse")                      # version 1.6: load(..., resolution=512)
    align = latentsync.Aligner(unet.config.resolution)
    frames = ((picture, align(points)) for picture, points in video)        # uint8; points: three_points(...) or None
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

FPS = 25
SAMPLE_RATE = 16000


@dataclass(frozen=True)
class Config:
    """Sizes of a video UNet. A released file tells all but heads, resolution, frames, velocity and motion_levels."""

    widths: tuple = (320, 640, 1280, 1280)      # channels per level. All levels but the last halve the map
    layers: int = 2                             # per level on the way down, one more on the way up
    heads: int = 8                              # heads of every attention, at every width
    audio_width: int = 384                      # width of Whisper's layers
    motion: str = "all"                         # levels with motion modules: "all", those on the way "up", or "none"
    motion_heads: int = 8
    motion_length: int = 24                     # frames that the table of positions has
    resolution: int = 256                       # side of the aligned faces, in pixels
    frames: int = 16                            # F, painted together
    velocity: bool = False                      # predict velocity instead of noise; no released model does
    in_channels: int = 13
    out_channels: int = 4
    motion_levels: int | None = None            # how many of the finest levels may have motion modules; None: all
    audio_window: tuple = (2, 2)                # audio around a frame, in frames before and after it

    def has_motion(self, level, way):
        """Whether a level (0: the finest) has motion modules on the `way`, "down" or "up"."""
        return self.motion in ("all", way) and (self.motion_levels is None or level < self.motion_levels)


@dataclass(frozen=True)
class WhisperConfig:
    """Sizes of Whisper's encoder. A released file tells all but heads."""

    mels: int = 80
    positions: int = 1500                       # 30 s
    width: int = 384
    heads: int = 6
    layers: int = 4                             # transformer blocks; a row of features has layers + 1


CONFIGS = {
    "latentsync_1.5": Config(),
    "latentsync_1.6": Config(resolution=512),
    "latentsync_1.0": Config(motion="none"),
    "latentsync_1.5_efficient": Config(motion="up"),                        # the authors' cheaper training of stage 2
    "talking_head": Config((64, 96, 128), layers=1, heads=4, audio_width=64, motion="none", motion_levels=2,
                           resolution=64, velocity=True),                   # trained in demo/
}
WHISPERS = {
    "tiny": WhisperConfig(),
    "small": WhisperConfig(width=768, heads=12, layers=12),
    "talking_head": WhisperConfig(positions=250, width=64, heads=2, layers=2),          # trained in demo/
}
# Stage of training -> parts of names. A stage trains the parameters whose name contains one of its parts. Stage 1 is
# for a UNet with motion="none", and trains all of it. The efficient stage 2 is for one with motion="up".
STAGES = {"1": ("",), "2": ("motion_modules.", "attentions."), "2-efficient": ("motion_modules.", "attn2.")}


# ----------------------------------------------------------------------------------------------------------------------
# Blocks. A batch of frames is (B F, C, h, w) in channels_last memory. It is therefore, without a copy, also a batch of
# tokens (B F, h w, C) and of clips (B, C, F, h, w).


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
        h += repeat(self.time_emb_proj(F.silu(time)), "b c -> (b f) c 1 1", f=len(x) // B)
        h = self.conv2(clip_norm_silu(self.norm2, h, B))
        h += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h


def attend(q, k, v, heads):
    """Multi-head attention of queries (N, L, C) to keys and values (N, M, C) -> (N, L, C)."""
    q, k, v = (rearrange(x, "n l (h d) -> n h l d", h=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "n h l d -> n l (h d)")


class SelfAttention(nn.Module):
    """Multi-head attention of tokens (N, L, C) to each other."""

    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.proj = nn.Linear(C, C)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(attend(q, k, v, self.heads))


class CrossAttention(nn.Module):
    """Multi-head attention of tokens (N, L, C) to others (N, M, c_other)."""

    def __init__(self, C, heads, c_other):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(C, C, bias=False)
        self.key_value = nn.Linear(c_other, 2 * C, bias=False)
        self.proj = nn.Linear(C, C)

    def forward(self, x, other):
        k, v = self.key_value(other).chunk(2, -1)
        return self.proj(attend(self.query(x), k, v, self.heads))


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
    """One transformer block over the positions of each frame: self-attention, attention to its audio, feed-forward."""

    def __init__(self, C, heads, c_audio):
        super().__init__()
        self.norm = nn.GroupNorm(32, C, eps=1e-6)
        self.proj_in = nn.Conv2d(C, C, 1)
        self.norm1 = nn.LayerNorm(C)
        self.attn1 = SelfAttention(C, heads)
        self.norm2 = nn.LayerNorm(C)
        self.attn2 = CrossAttention(C, heads, c_audio)
        self.norm3 = nn.LayerNorm(C)
        self.ff = GEGLU(C)
        self.proj_out = nn.Conv2d(C, C, 1)

    def forward(self, x, audio=None):
        """x (N, C, h, w), audio (N, A, c_audio): one window per frame. If audio is None, the attention to it is left
        out. If audio is zeros, the bias of that attention's output is still added."""
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
    """Table (1, length, C): sine and cosine of the frame's number * 10000 ** (-2 i / C) at channels 2 i and 2 i + 1."""
    frequency = torch.exp(torch.arange(0, C, 2).double() * (-math.log(10000.0) / C))
    angle = torch.arange(length).double()[:, None] * frequency              # float32 is too coarse for long tables
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
    """One transformer block over the frames of a clip, for each position: two attentions and a feed-forward layer.

    Its last projection starts at zero, so that at first it changes nothing (AnimateDiff, arXiv 2307.04725).
    """

    def __init__(self, C, heads, length):
        super().__init__()
        self.norm = nn.GroupNorm(32, C, eps=1e-6)
        self.proj_in = nn.Linear(C, C)
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(2))
        self.attention = nn.ModuleList(TemporalAttention(C, heads, length) for _ in range(2))
        self.ff_norm = nn.LayerNorm(C)
        self.ff = GEGLU(C)
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
    """Resize to the size of the map that is joined next, by nearest neighbour, then convolve. That size is twice the
    present one, or one less where the way down rounded up."""

    def __init__(self, C):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x, size):
        return self.conv(F.interpolate(x, size, mode="nearest"))


class Level(nn.Module):
    """One resolution: layers of a residual block, a spatial transformer (or none) and a motion module (or none)."""

    def __init__(self, config, c_ins, C, attends, moves):
        super().__init__()
        c = config
        n = len(c_ins)
        self.resnets = nn.ModuleList(ResBlock(c_in, C, 4 * c.widths[0]) for c_in in c_ins)
        self.attentions = nn.ModuleList(SpatialTransformer(C, c.heads, c.audio_width)
                                        for _ in range(n if attends else 0))
        self.motion_modules = nn.ModuleList(MotionModule(C, c.motion_heads, c.motion_length)
                                            for _ in range(n if moves else 0))

    def layer(self, j, x, time, audio):
        """Layer j: x (B F, C, h, w), time (B, c_time), audio (B F, A, c_audio) or None."""
        x = self.resnets[j](x, time)
        if self.attentions:
            x = self.attentions[j](x, audio)
        return self.motion_modules[j](x, len(time)) if self.motion_modules else x


class Middle(nn.Module):
    """The lowest resolution: residual block, spatial transformer, residual block."""

    def __init__(self, config):
        super().__init__()
        C = config.widths[-1]
        c_time = 4 * config.widths[0]
        self.resnets = nn.ModuleList(ResBlock(C, C, c_time) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(C, config.heads, config.audio_width)])

    def forward(self, x, time, audio):
        x = self.attentions[0](self.resnets[0](x, time), audio)
        return self.resnets[1](x, time)


class TimeEmbedding(nn.Module):
    """A time step 0 .. 999 as a vector: its cosines and sines, and two layers."""

    def __init__(self, C):
        super().__init__()
        self.C = C
        self.linear_1 = nn.Linear(C, 4 * C)
        self.linear_2 = nn.Linear(4 * C, 4 * C)

    def forward(self, t):                                                   # (B,) -> (B, 4 C)
        waves = sinusoids(t, self.C).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


# ----------------------------------------------------------------------------------------------------------------------
# The model


class UNet(nn.Module):
    """Predicts the noise in the latents of a clip: levels down, a middle, levels up. Outputs of layers on the way down
    are joined, as channels, to the inputs of layers on the way up."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.checkpointing = False                                          # recompute activations, see vq.recompute
        widths = c.widths
        last = len(c.widths) - 1
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0])
        self.down_blocks = nn.ModuleList()
        self.downsample = nn.ModuleList()
        self.up_blocks = nn.ModuleList()
        self.upsample = nn.ModuleList()
        skips = [widths[0]]                                                 # channels of the outputs to be joined
        for i, C in enumerate(widths):
            c_ins = [widths[max(i - 1, 0)]] + [C] * (c.layers - 1)
            self.down_blocks.append(Level(c, c_ins, C, i < last, c.has_motion(i, "down")))
            skips += [C] * c.layers
            if i < last:
                self.downsample.append(nn.Conv2d(C, C, 3, stride=2, padding=1))
                skips.append(C)
        self.mid_block = Middle(c)
        below = widths[-1]
        for i, C in enumerate(reversed(widths)):
            c_ins = [(C if j else below) + skips.pop() for j in range(c.layers + 1)]
            self.up_blocks.append(Level(c, c_ins, C, i > 0, c.has_motion(last - i, "up")))
            below = C
            if i < last:
                self.upsample.append(Upsample(C))
        self.conv_norm_out = nn.GroupNorm(32, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], c.out_channels, 3, padding=1)
        self.to(memory_format=torch.channels_last)      # tokens are views of maps then, and convolutions are faster

    def forward(self, x, t, audio=None):
        """The predicted noise (B, 4, F, h, w), or the velocity if config.velocity.

        x: (B, 13, F, h, w), channels: noisy latents, mask (1: keep), masked latents, reference latents
        t: (B,) or a number, 0 .. 999
        audio: (B, F, A, audio_width), zeros for the branch without audio, or None for no attention to audio at all
        """
        return self.forward_with_deep(x, t, audio)[0]

    def forward_with_deep(self, x, t, audio=None, deep=None):
        """(noise, deep), where deep is the output of all layers but the last. Other arguments are those of `forward`.

        `deep` changes little from one denoising step to the next. DeepCache (arXiv 2312.00858) passes in the `deep` of
        an earlier step, and only 1/15 of the work is left.
        """
        B = len(x)
        time = self.time_embedding(torch.as_tensor(t, device=x.device).expand(B))
        x = rearrange(x, "b c f h w -> (b f) c h w").to(self.conv_in.weight.dtype, memory_format=torch.channels_last)
        if audio is not None:
            audio = rearrange(audio, "b f n c -> (b f) n c").to(x.dtype)
        first = self.conv_in(x)
        if deep is None:
            deep = self._all_but_last_layer(first, time, audio)
        level = self.up_blocks[-1]
        x = torch.cat([deep, first], 1)
        x = vq.recompute(self.checkpointing, level.layer, len(level.resnets) - 1, x, time, audio)
        x = self.conv_out(clip_norm_silu(self.conv_norm_out, x, B))
        return rearrange(x, "(b f) c h w -> b c f h w", b=B), deep

    def _all_but_last_layer(self, x, time, audio):
        """Down, middle, and up without the last layer of the last level."""
        last = len(self.up_blocks) - 1
        skips = [x]
        for i, level in enumerate(self.down_blocks):
            for j in range(len(level.resnets)):
                x = vq.recompute(self.checkpointing, level.layer, j, x, time, audio)
                skips.append(x)
            if i < last:
                x = self.downsample[i](x)
                skips.append(x)
        x = vq.recompute(self.checkpointing, self.mid_block, x, time, audio)
        for i, level in enumerate(self.up_blocks):
            layers = len(level.resnets) - 1 if i == last else len(level.resnets)
            for j in range(layers):
                x = torch.cat([x, skips.pop()], 1)
                x = vq.recompute(self.checkpointing, level.layer, j, x, time, audio)
            if i < last:
                x = self.upsample[i](x, skips[-1].shape[2:])
        return x

    @torch.no_grad()
    def init_weights(self, generator=None):
        """PyTorch's default, drawn from `generator`; zeros in the last layer of the UNet and of its motion modules."""
        vq.init_default(self, generator)
        ends = [m.proj_out for m in self.modules() if isinstance(m, MotionModule)]
        for layer in (self.conv_out, *ends):
            layer.weight.zero_()
            layer.bias.zero_()

    def freeze(self, stage):
        """Makes only the parameters of one of STAGES trainable. Call it before creating the optimizer."""
        for name, p in self.named_parameters():
            p.requires_grad_(any(part in name for part in STAGES[stage]))

    def loss(self, z, condition, audio, generator=None, t=None, noise=None):
        """(loss, clean): mean squared error of the predicted noise (or velocity), a scalar, and the clean latents
        (B, 4, F, h, w) that the prediction implies.

        In stage 1 `loss` is the whole loss. In stage 2 it keeps weight 1, and `Supervision` adds losses on `clean`.
        z: (B, 4, F, h, w) scaled latents of the target frames; condition: (B, 9, F, h, w) from `encode_condition`;
        audio: as for `forward`. t (B,) and noise (like z) are drawn from `generator`, on z's device, unless given.
        """
        if t is None:
            t = torch.randint(1000, (len(z),), generator=generator, device=z.device)
        if noise is None:
            noise = mixed_noise(z.shape, generator, z.device)
        noisy = add_noise(z, noise, t)
        predicted = self(torch.cat([noisy, condition], 1), t, audio).float()
        if self.config.velocity:
            loss = F.mse_loss(predicted, velocity(z, noise, t))
            predicted = noise_of(predicted, noisy, t)
        else:
            loss = F.mse_loss(predicted, noise)
        return loss, remove_noise(noisy, predicted, t)


# ----------------------------------------------------------------------------------------------------------------------
# Diffusion

# alpha bar of the 1000 time steps: the share of a latent's variance that is still picture
ALPHAS = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000)**2).cumprod(0)


def _alpha(t, like):
    """ALPHAS[t], a number or (B,), shaped to go with `like` (B, ...)."""
    alpha = ALPHAS.to(like.device)[t]
    if alpha.dim():
        alpha = alpha.view(-1, *[1] * (like.dim() - 1))
    return alpha


def add_noise(z, noise, t):
    """Latents at time step t (B,): sqrt(alpha) z + sqrt(1 - alpha) noise."""
    alpha = _alpha(t, z)
    return alpha.sqrt() * z + (1 - alpha).sqrt() * noise


def remove_noise(z, noise, t):
    """The inverse of add_noise: clean latents, given their noise. In float32, as it divides by 0.07 near t = 999."""
    alpha = _alpha(t, z)
    return (z.float() - (1 - alpha).sqrt() * noise.float()) / alpha.sqrt()


def velocity(z, noise, t):
    """sqrt(alpha) noise - sqrt(1 - alpha) z, (B, ...): what some networks predict instead of noise (arXiv 2202.00512).

    The first steps decide the colors. There, at t = 951 .. 999, an error in the predicted noise makes an error in the
    picture that is 11 to 15 times as large, so only a large network learns the colors, after long training. The
    velocity there is almost the picture itself, with its sign changed.
    """
    alpha = _alpha(t, z)
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * z


def noise_of(velocity, noisy, t):
    """The noise in latents `noisy`, given their velocity."""
    alpha = _alpha(t, noisy)
    return alpha.sqrt() * velocity.float() + (1 - alpha).sqrt() * noisy


def mixed_noise(shape, generator=None, device=None, share=1.0):
    """Noise (B, C, F, h, w) of variance 1 for training: each frame's own noise, plus `share` times a noise that all
    frames of a clip have in common. (When dubbing, all of it is common.)"""
    own = torch.randn(shape, generator=generator, device=device)
    common = torch.randn((*shape[:2], 1, *shape[3:]), generator=generator, device=device)
    return (own + share * common) / math.sqrt(1 + share**2)


def time_steps(count):
    """The time steps of a sampler with `count` steps: 951, 901 ... 1 for 20. ValueError if not 1 .. 999."""
    if not 1 <= count <= 999:
        raise ValueError(f"{count} steps: expected 1 .. 999")
    return [1 + i * (1000 // count) for i in reversed(range(count))]


def ddim_step(z, noise, t, count):
    """One of `count` steps: latents z at t -> latents at the time step before (DDIM, arXiv 2010.02502, eq. 12, eta 0).

    z and its noise imply a clean picture. The step adds the same noise to it again, but less. The last step ends at
    t = 0, where a little noise stays, because the original sets the scheduler's option set_alpha_to_one to False.
    """
    before = max(t - 1000 // count, 0)
    return add_noise(remove_noise(z, noise, t), noise.float(), before)


def denoise(unet, z, condition, audio, steps=20, cfg=1.5, cache_every=1):
    """Yields the latents (1, 4, F, h, w) after each step, float32; the last ones are the result.

    z: noise (1, 4, F, h, w); condition: (1, 9, F, h, w); audio: (1, F, A, audio_width); cfg: guidance scale, 1 or less
    for none; cache_every: 3 runs the deep part of the network in every third step only (DeepCache), 1 in every step.
    """
    guided = cfg > 1
    if guided:                                                              # both branches as one batch
        audio = torch.cat([torch.zeros_like(audio), audio])
        condition = condition.expand(2, *condition.shape[1:])
    deep = None
    for i, t in enumerate(time_steps(steps)):
        x = torch.cat([z.expand(len(condition), *z.shape[1:]), condition], 1)           # (2, 13, F, h, w)
        if i % cache_every == 0:
            deep = None
        noise, deep = unet.forward_with_deep(x, torch.full((len(x),), t, device=x.device), audio, deep)
        if guided:
            silent, noise = noise.float().chunk(2)
            noise = silent + cfg * (noise - silent)
        if unet.config.velocity:
            noise = noise_of(noise, z, t)
        z = ddim_step(z, noise, t, steps)
        yield z


# ----------------------------------------------------------------------------------------------------------------------
# Stage 2 of training: losses on the decoded pixels


def trepa(videomae, generated, target):
    """Temporal representation alignment (section 3.4), a scalar: mean squared difference of the video encoder's
    features of two clips (B, 3, F, H, W) in [-1, 1], normalised to length 1.

    videomae: see lib/videomae.py. The encoder sees the frames together, so a clip that jitters or flickers is far
    from one that does not, though each frame may be fine. The loss is at most 4 / width, so its weight is large.
    """
    with torch.no_grad():
        target_features = F.normalize(videomae.features(target).float(), dim=1)
    return F.mse_loss(F.normalize(videomae.features(generated).float(), dim=1), target_features)


class Supervision:
    """The losses of stage 2 on decoded pixels, each computed by a frozen network.

    The noise loss weighs all latents alike; these losses weigh what a viewer looks at: lips, appearance and motion.
    Their weighted sum is added to the noise loss, which has weight 1.

    autoencoder: a vq.KLAutoencoder. syncnet: a syncnet.StableSyncNet, for whether lips and audio belong together.
    videomae: see `trepa`. lpips: a lib.losses.LPIPS, for the lower half of each frame. None leaves a loss out.
    checkpointing: recompute activations in the backward pass, `decode_batch` decoded frames at a time (a UNet has a
    switch of its own). Raises ValueError if SyncNet or video encoder do not take clips of `frames` frames. The video
    encoder takes them in pairs, and leaves out the last one of an odd number.
    """

    def __init__(self, autoencoder, syncnet=None, videomae=None, lpips=None, *, frames=16, sync_weight=0.05,
                 trepa_weight=10.0, lpips_weight=0.1, checkpointing=False, decode_batch=4):
        if syncnet is not None and syncnet.frames != frames:
            raise ValueError(f"a SyncNet for clips of {syncnet.frames} frames, but clips have {frames}")
        if videomae is not None:
            if frames < videomae.config.tubelet:
                raise ValueError(f"clips of {frames} frames: the video encoder takes at least "
                                 f"{videomae.config.tubelet}")
            videomae.checkpointing = checkpointing
        for network in filter(None, (autoencoder, syncnet, videomae, lpips)):
            network.requires_grad_(False).eval()
        self.autoencoder = autoencoder
        self.syncnet = syncnet
        self.videomae = videomae
        self.lpips = lpips
        weights = ("sync", syncnet, sync_weight), ("lpips", lpips, lpips_weight), ("trepa", videomae, trepa_weight)
        self.weights = {name: weight for name, network, weight in weights if network is not None}
        self.frames = frames
        self.checkpointing = checkpointing
        self.decode_batch = decode_batch

    def decode(self, z):
        """Latents (B, 4, F, h, w) -> frames (B, F, 3, H, W) in about [-1, 1], through which gradients flow."""
        flat = rearrange(z, "b c f h w -> (b f) c h w")
        if self.checkpointing:
            decoded = [vq.recompute(True, self.autoencoder.decode, part) for part in flat.split(self.decode_batch)]
        else:
            decoded = [self.autoencoder.decode(flat)]
        return torch.cat(decoded).unflatten(0, (len(z), -1))

    def __call__(self, z, target, mel=None, has_audio=None):
        """(weighted sum, {"sync", "lpips", "trepa": the loss before its weight}), all scalars.

        z: (B, 4, F, h, w), the clean latents from UNet.loss; target: frames (B, F, 3, H, W) in [-1, 1]; mel: (B, 1,
        80, columns), SyncNet's window of the clip's audio; has_audio: (B,) 1 or 0, whether the UNet got the audio.
        Without it the lips cannot follow, and the clip has no sync loss.
        """
        if z.shape[2] != self.frames:
            raise ValueError(f"clips of {z.shape[2]} frames: expected {self.frames}")
        if not self.weights:
            return z.new_zeros(()), {}
        decoded = self.decode(z)
        losses = {}
        if self.syncnet is not None:
            losses["sync"] = self._sync(decoded, mel, has_audio)
        if self.lpips is not None:
            middle = target.shape[3] // 2
            halves = (clips[:, :, :, middle:].flatten(0, 1) for clips in (decoded, target))
            losses["lpips"] = vq.recompute(self.checkpointing, self.lpips, *halves).mean()
        if self.videomae is not None:
            losses["trepa"] = trepa(self.videomae, decoded.transpose(1, 2), target.transpose(1, 2))
        return sum(self.weights[name] * loss for name, loss in losses.items()), losses

    def _sync(self, decoded, mel, has_audio):
        """-log of the probability that the lips of the decoded frames say this audio (section 3.3)."""
        height, width = self.syncnet.config.picture                         # size of the lower half of a square face
        frames = decoded.flatten(0, 1)
        if frames.shape[3] != width:
            frames = F.interpolate(frames, (width, width), mode="bicubic", align_corners=False)
        halves = rearrange(frames[:, :, -height:], "(b f) c h w -> b (f c) h w", b=len(decoded))
        cosine = vq.recompute(self.checkpointing, self.syncnet, halves, mel)
        with torch.autocast(cosine.device.type, enabled=False):             # not safe in half precision
            cosine = cosine.float().clamp(min=1e-6)                         # at 0 the gradient would be 1e12
            return F.binary_cross_entropy(cosine, torch.ones_like(cosine), has_audio)


# ----------------------------------------------------------------------------------------------------------------------
# Audio: Whisper's encoder, and the windows of its features that belong to frames

MEL_WINDOW = 400                                                            # samples, 25 ms
MEL_HOP = 160                                                               # samples: 100 columns a second
ROWS_PER_SECOND = 50                                # rows of Whisper features: one per two columns


def log_mel(sound, bands=80):
    """The input of Whisper: sound (n,) in [-1, 1] -> tensor (bands, n // 160), 100 columns a second.

    Powers in mel bands, as logarithms down to 8 decades below the loudest of the whole signal. Computed block by
    block, for long signals. Raises ValueError for less than a column of sound.
    """
    sound = torch.as_tensor(sound, dtype=torch.float32)
    columns = len(sound) // MEL_HOP
    if not columns:
        raise ValueError(f"{len(sound)} samples of sound: expected at least {MEL_HOP}, a hundredth of a second")
    margin = MEL_WINDOW // 2
    sound = F.pad(sound, (0, max(0, margin + 1 - len(sound))))              # long enough to be reflected
    sound = F.pad(sound[None, None], (margin, margin), mode="reflect")[0, 0]
    filters = torch.from_numpy(vq.slaney_mels(bands, 0.0, 8000.0, MEL_WINDOW, SAMPLE_RATE)).float()
    hann = torch.hann_window(MEL_WINDOW)
    mel = torch.empty(bands, columns)
    for start in range(0, columns, 3000):
        count = min(3000, columns - start)
        block = sound[start * MEL_HOP:(start + count - 1) * MEL_HOP + MEL_WINDOW].unfold(0, MEL_WINDOW, MEL_HOP)
        power = torch.fft.rfft(block * hann).abs().square()
        mel[:, start:start + count] = (filters @ power.T).clamp(min=1e-10).log10()
    return (mel.clamp(min=mel.max() - 8) + 4) / 4


class WhisperAttention(nn.Module):
    """Multi-head self-attention. Keys have no bias, because it would not change the softmax."""

    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(C, C)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C)
        self.out = nn.Linear(C, C)

    def forward(self, x):
        return self.out(attend(self.query(x), self.key(x), self.value(x), self.heads))


class WhisperBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, C, heads):
        super().__init__()
        self.attn_ln = nn.LayerNorm(C)
        self.attn = WhisperAttention(C, heads)
        self.mlp_ln = nn.LayerNorm(C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

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
        frequency = torch.exp(-math.log(10000) / (C // 2 - 1) * torch.arange(C // 2))
        angle = torch.arange(config.positions)[:, None] * frequency
        self.register_buffer("positional_embedding", torch.cat([angle.sin(), angle.cos()], 1))
        self.blocks = nn.ModuleList(WhisperBlock(C, config.heads) for _ in range(config.layers))
        self.ln_post = nn.LayerNorm(C)                                      # for the recogniser's decoder: unused here

    def forward(self, mel):
        """(B, mels, 2 * positions) -> (B, positions, layers + 1, C): the input of block 1, and the output of each."""
        x = F.gelu(self.conv1(mel.to(self.conv1.weight.dtype)))
        x = F.gelu(self.conv2(x))
        x = x.transpose(1, 2) + self.positional_embedding
        outputs = [x]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return torch.stack(outputs, 2)

    @torch.no_grad()
    def pieces(self, sound, overlap=0):
        """Yields the features of a sound (n,) in pieces (rows, layers + 1, C) of at most 30 s, 50 rows a second.

        The last piece is filled up with zeros in the mel spectrogram, as in the original. (Whisper itself would add
        silence, which is about -1.5 there.) overlap: rows that two successive pieces share. Each of the two gives half
        of them, so that no row stands at an edge where Whisper hears one side only. 0 is the original's way.
        """
        mel = log_mel(sound, self.config.mels)
        positions = self.config.positions
        overlap = min(overlap, positions // 2)
        rows = mel.shape[1] // 2
        for start in range(0, max(rows - overlap, 1), positions - overlap):
            part = mel[:, 2 * start:2 * (start + positions)].to(self.conv1.weight.device)
            part = F.pad(part, (0, 2 * positions - part.shape[1]))
            first = overlap // 2 if start else 0
            is_last = start + positions >= rows
            last = rows - start if is_last else positions - (overlap - overlap // 2)
            yield self(part[None])[0, first:last]

    @torch.no_grad()
    def init_weights(self, generator=None):
        """PyTorch's default, drawn from `generator`."""
        vq.init_default(self, generator)


def count_rows(samples, positions=1500):
    """Number of rows of features that a sound of `samples` samples has."""
    full_pieces, columns = divmod(samples // MEL_HOP, 2 * positions)
    return full_pieces * positions + columns // 2


def count_frames(rows, fps=FPS):
    """Number of frames made for a sound of `rows` rows: up to two more than the sound lasts, as in the original."""
    frame = 0
    while int(frame * ROWS_PER_SECOND / fps) <= rows:
        frame += 1
    return frame + 1


def window_rows(frame, rows, fps=FPS, window=(2, 2)):
    """Indices of the rows of features around a frame: two for it, and two for each of the frames before and after it
    in `window`, together 10 or 0.2 s. Beyond both ends the first and the last row repeat."""
    before, after = window
    centre = int(frame * ROWS_PER_SECOND / fps)
    return np.arange(centre - 2 * before, centre + 2 * after + 2).clip(0, rows - 1)


def windows(whisper, sound, fps=FPS, window=(2, 2), overlap=0):
    """Yields the audio of each frame, (A, C): 10 rows of all layers, row by row; A is 50 for Whisper tiny.

    window: Config.audio_window of the UNet; overlap: see Whisper.pieces. Only the rows that later frames need are
    kept. Raises ValueError for less than a row of sound.
    """
    rows = count_rows(len(sound), whisper.config.positions)
    if not rows:
        raise ValueError("the sound is shorter than a fiftieth of a second")
    pieces = whisper.pieces(sound, overlap) if overlap else whisper.pieces(sound)
    kept = next(pieces)                                                     # features of rows first, first + 1 ...
    first = 0
    for frame in range(count_frames(rows, fps)):
        index = window_rows(frame, rows, fps, window)
        while first + len(kept) <= index[-1]:
            kept = torch.cat([kept, next(pieces)])
        kept = kept[index[0] - first:]
        first = index[0]
        yield kept[index - first].flatten(0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Faces: the mask, the way to the aligned face and back

# The lower part of the mask is a U. Each digit is the number of pixels by which its left (or right) edge moves inwards
# from one row to the next, in the rows 129 .. 241.
LEFT_STEPS = ("000000010000000000000100000000000001000000101010101101011010"
              "11110111111110111111211121121221212222222222232332454")
RIGHT_STEPS = ("000000100000000000001000000000000010000001010101011011011011"
               "01101101111101111111111111211211212122122223232232244")


def face_mask(size=256):
    """The mask of all released models, (size, size) float32: 1 where the picture is kept, 0 where it is repainted.

    At 256 pixels it is 0 or 1, and 40.7 % are zeros. From row 95 down it hides the cheeks but not the nose, from row
    128 down everything, and at the chin it narrows. It hides the cheeks because they show how the jaw moves. It stays
    in place because a mask that followed the mouth would show how the mouth moves. Other sizes are resized from 256.
    """
    mask = np.ones((256, 256), np.float32)
    mask[95:128, 9:247] = 0
    mask[95:128, 78:178] = 1                                                # the nose
    left, right = 9, 247
    mask[128, left:right + 1] = 0
    for row, (step_left, step_right) in enumerate(zip(LEFT_STEPS, RIGHT_STEPS), 129):
        left += int(step_left)
        right -= int(step_right)
        mask[row, left:right + 1] = 0
    mask[242, 131:153] = 0                                                  # the last row
    mask = torch.from_numpy(mask)
    return mask if size == 256 else lanczos_resize(255 * mask[None], size)[0] / 255


def lanczos_resize(pictures, size):
    """(..., h, w) in 0 .. 255 -> (..., size, size), rounded: Lanczos over 4 pixels to each side, with weights that are
    multiples of 1 / 2048, as in OpenCV for bytes. When it shrinks it skips pixels: no anti-aliasing."""
    def weights(n):
        centre = (torch.arange(size, dtype=torch.float64) + 0.5) * n / size - 0.5
        taps = centre.floor()[:, None] + torch.arange(-3, 5)
        distance = centre[:, None] - taps
        w = torch.sinc(distance) * torch.sinc(distance / 4)
        w = (w / w.sum(1, keepdim=True)).float()                            # float32: ties as in OpenCV
        w = (w * 2048).round().double() / 2048
        w = torch.zeros(size, n, dtype=torch.float64).scatter_add_(1, taps.long().clamp(0, n - 1), w)
        return w.to(pictures.device)
    height, width = pictures.shape[-2:]
    resized = weights(height) @ pictures.double() @ weights(width).T        # exact, so that ties stay ties
    return (resized + 0.5).floor().clamp(0, 255).to(pictures.dtype)


def three_points(landmarks):
    """Landmarks (..., N, 2), x and y in pixels -> the three points that faces are aligned by, (..., 3, 2): the middle
    of the brow at the left of the picture, of the brow at the right, the nose.

    N = 3: these points. N = 5: eyes, nose and mouth corners (MTCNN); a brow is taken to be a third of the eyes'
    distance above its eye. N = 106: InsightFace, which the authors used, rounded as they do. N = 478: MediaPipe's
    face mesh. Otherwise ValueError.
    """
    p = np.asarray(landmarks, float)
    n = p.shape[-2] if p.ndim >= 2 and p.shape[-1] == 2 else 0

    def mean(*numbers):
        return p[..., list(numbers), :].mean(-2)
    if n == 3:
        return p
    if n == 5:
        left, right, nose = p[..., 0, :], p[..., 1, :], p[..., 2, :]
        up = (left + right) / 2 - nose
        height = 0.33 * np.linalg.norm(right - left, axis=-1, keepdims=True)
        up *= height / np.linalg.norm(up, axis=-1, keepdims=True)
        return np.stack([left + up, right + up, nose], -2)
    if n == 106:
        left, right = mean(43, 48, 49, 51, 50), mean(101, 102, 103, 104, 105)
        return np.round(np.stack([left, right, mean(74, 77, 83, 86)], -2))
    if n == 478:
        left = mean(70, 63, 105, 66, 107, 46, 53, 52, 65, 55)
        right = mean(300, 293, 334, 296, 336, 276, 283, 282, 295, 285)
        return np.stack([left, right, mean(195, 4, 129, 358)], -2)
    raise ValueError(f"landmarks of shape {p.shape}: expected (..., N, 2) with N = 3, 5, 106 or 478")


class Aligner:
    """Finds the map from each frame of a video to its aligned face. It smooths a little, so call it in frame order.

    align(points (3, 2)) -> tensor (2, 3), or None for None. The map takes pixels (x, y, 1) of the frame to pixels of
    a canvas of size `canvas` (height, width), on which brows and nose stand at fixed places. The canvas is higher
    than wide, 280 x 210 at resolution 256, and is later squeezed into a square. Every video needs an Aligner of its
    own. Raises ValueError for points that coincide.
    """

    def __init__(self, resolution):
        scale = 2.8 * resolution / 256
        self.resolution = resolution
        self.template = torch.tensor([(17, 20), (58, 20), (37.5, 40)]) * scale
        self.canvas = (int(100 * scale), int(75 * scale))
        self.bias = None

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
        if R.det() < 0:                                                     # a reflection: take the nearest rotation
            R = Vt.T * torch.tensor([1, -1]) @ U.T
        # The original smooths like this; we keep it to get the same numbers. `misfit` leads from one nose to the other.
        # Its average over frames is added to the translation, although it is in units of s2 and not rotated. For
        # upright heads it is below a pixel.
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

    The steps are those of kornia, in float32. Callers truncate the result to whole numbers. Where it is very near to a
    whole number, as in saturated colors, the last bit decides. A product of matrices with a batch dimension may round
    otherwise than one without. Kornia has this dimension, so we have it too.
    """
    def to_unit(h, w):                                                      # pixels to -1 .. 1, corners to corners
        return torch.tensor([[[2 / max(w - 1, 1), 0, -1], [0, 2 / max(h - 1, 1), -1], [0, 0, 1]]])
    pixels = homogeneous(matrix.float().cpu())[None]
    between = to_unit(*size) @ (pixels @ to_unit(*picture.shape[1:]).inverse())             # (1, 3, 3)
    grid = F.affine_grid(between.inverse()[:, :2], [1, 1, *size], align_corners=True).to(picture)
    moved = F.grid_sample(picture[None], grid, align_corners=True)[0]
    covered = F.grid_sample(torch.ones_like(picture)[None], grid, align_corners=True)[0]
    return moved + (1 - covered) * fill


def align_face(picture, matrix, canvas, resolution):
    """Frame uint8 (H, W, 3) -> aligned face (3, resolution, resolution), values 0 .. 255, float32, whole numbers."""
    face = warp(picture.permute(2, 0, 1).float(), matrix, canvas, fill=127.0)
    return lanczos_resize(face.clamp(0, 255).floor(), resolution)


def paste_back(picture, face, matrix, canvas):
    """A frame uint8 (H, W, 3) with the face (3, resolution, resolution) in [-1, 1] pasted in and its border blended.

    Only the part of the frame around the face is computed, and changed.
    """
    corners = torch.tensor([(x, y, 1.0) for x in (0, canvas[1] - 1) for y in (0, canvas[0] - 1)])
    corners = corners @ inverse(matrix).T                                   # corners of the canvas, in the frame
    low, high = corners.amin(0), corners.amax(0)
    margin = (high - low).max() / 10 + 4                                    # more than the erosion and the blur reach
    (x0, y0), (x1, y1) = (low - margin).floor().int().tolist(), (high + margin).ceil().int().tolist()
    x0, x1 = max(x0, 0), min(x1, picture.shape[1])
    y0, y1 = max(y0, 0), min(y1, picture.shape[0])
    if y0 >= y1 or x0 >= x1:
        return picture                                                      # the face is outside of the frame
    back = inverse(matrix) - torch.tensor([[0, 0, x0], [0, 0, y0]])
    size = y1 - y0, x1 - x0
    face = F.interpolate(face[None].float(), canvas, mode="bicubic", antialias=True, align_corners=False)[0]
    face = (warp(face, back, size, fill=127.0) / 2 + 0.5).clamp(0, 1) * 255         # the original fills with white too
    covered = warp(torch.ones(1, *canvas, device=face.device), back, size, fill=0.0)
    covered = covered * (covered > 1e-4)                # less is rounding, one row beyond the face on some processors
    covered = erode(covered, 2)                         # without the pixels that the face covers only in part
    radius = int(float(covered.sum()) ** 0.5) // 20
    soft = blur(erode(covered, 2 * radius), radius) if radius else covered
    part = picture[y0:y1, x0:x1].permute(2, 0, 1).float()
    part = soft * covered * face + (1 - soft) * part
    result = picture.clone()
    result[y0:y1, x0:x1] = part.permute(1, 2, 0).clamp(0, 255).byte()       # truncates
    return result


def erode(x, n):
    """(1, h, w) -> the minimum over n x n pixels, n even, half of them left and above. Borders do not erode."""
    padded = F.pad(x, (n // 2, n - n // 2 - 1) * 2, value=math.inf)
    return -F.max_pool2d(F.max_pool2d(-padded, (1, n), 1), (n, 1), 1)


def blur(x, radius):
    """(1, h, w) convolved with a Gaussian of `radius` pixels; edges are reflected."""
    sigma = 0.3 * (radius - 1) + 0.8
    bell = torch.exp(-torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype) ** 2 / (2 * sigma**2))
    bell = bell / bell.sum()
    high, wide = (min(radius, n - 1) for n in x.shape[1:])                  # a reflection is shorter than the picture
    x = F.pad(x[None], (wide, wide, high, high), mode="reflect")
    x = F.pad(x, (radius - wide,) * 2 + (radius - high,) * 2, mode="replicate")
    return F.conv2d(F.conv2d(x, bell.view(1, 1, 1, -1)), bell.view(1, 1, -1, 1))[0]


# ----------------------------------------------------------------------------------------------------------------------
# The pipeline


Dubbed = namedtuple("Dubbed", "picture source face masked generated")
Dubbed.__doc__ = """One frame of the result. picture: uint8 (H, W, 3); source: the same frame of the given video.
face, masked, generated: the aligned face, the same under the mask, and the repainted face, which outside of the mask is
the given one, all (3, resolution, resolution) in about [-1, 1]; None if there was no face: the frame is unchanged."""


@dataclass
class Frame:
    """A frame inside of `lipsync`. face, masked and generated are as in Dubbed, once the frame is painted."""

    picture: np.ndarray                         # uint8 (H, W, 3)
    matrix: torch.Tensor | None                 # map to the aligned face, or None without a face
    audio: torch.Tensor                         # (A, audio_width)
    face: torch.Tensor | None = None
    masked: torch.Tensor | None = None
    generated: torch.Tensor | None = None

    def finished(self, canvas, warp_device):
        """The frame as Dubbed, with its face pasted back."""
        if self.generated is None:
            return Dubbed(self.picture, self.picture, None, None, None)
        picture = torch.as_tensor(self.picture, device=warp_device)
        result = paste_back(picture, self.generated.to(warp_device), self.matrix, canvas)
        return Dubbed(result.cpu().numpy(), self.picture, self.face, self.masked, self.generated)


@torch.no_grad()
def lipsync(unet, autoencoder, frames, sound, generator, *, overlap=0, **options):
    """Dubs a video: yields a Dubbed per frame, until frames or sound end. Holds one clip of frames at a time.

    frames: iterable of (picture uint8 (H, W, 3), its map from an Aligner of the UNet's resolution). A map of None
    means that there is no face: the frame stays as it is, and the frames before and after it are neighbours in the
    clip. sound: iterable of (A, audio_width), see `windows`. overlap: number of frames that are painted in two
    successive clips and cross-faded; 0 is the original's way, and leaves a seam every 16 frames. options: of `paint`.

    With overlap 0 and a face in every frame, random numbers are drawn as in the original: the noise, then for each
    clip the latents of the masked faces and those of the faces. Raises ValueError for an overlap out of range.
    """
    c = unet.config
    device = unet.conv_in.weight.device
    if not 0 <= overlap < c.frames:
        raise ValueError(f"overlap {overlap}: expected 0 .. {c.frames - 1}")
    canvas = Aligner(c.resolution).canvas
    warp_device = device if device.type == "cuda" else "cpu"                # not all devices can warp
    side = c.resolution // autoencoder.config.stride
    z = torch.randn(1, c.out_channels, 1, side, side, generator=generator, device=device)       # one for all frames
    options = dict(z=z, mask=face_mask(c.resolution).to(device), generator=generator) | options
    stream = zip(frames, sound)
    pending = []                                                            # painted frames that the next clip repaints
    while fresh := list(islice(stream, c.frames - len(pending))):
        clip = pending + [Frame(picture, matrix, audio) for (picture, matrix), audio in fresh]
        _paint_clip(unet, autoencoder, clip, len(pending), canvas, warp_device, options)
        done = len(clip) - overlap if len(clip) == c.frames else len(clip)
        for frame in clip[:done]:
            yield frame.finished(canvas, warp_device)
        pending = clip[done:]
    for frame in pending:
        yield frame.finished(canvas, warp_device)


def _paint_clip(unet, autoencoder, clip, repeated, canvas, warp_device, options):
    """Paints the Frames of a clip that have a face. The first `repeated` frames were painted in the clip before, and
    are cross-faded."""
    device = unet.conv_in.weight.device
    with_face = [i for i, frame in enumerate(clip) if frame.matrix is not None]
    if not with_face:
        return
    faces = []
    for i in with_face:
        picture = torch.as_tensor(clip[i].picture, device=warp_device)
        faces.append(align_face(picture, clip[i].matrix, canvas, unet.config.resolution))
    faces = torch.stack(faces).to(device) / 127.5 - 1
    audio = torch.stack([clip[i].audio for i in with_face]).to(device)
    painted, masked = paint(unet, autoencoder, faces, audio, **options)
    for i, face, masked_face, generated in zip(with_face, faces, masked, painted):
        frame = clip[i]
        if i < repeated and frame.generated is not None:                    # the share of this clip grows with i
            generated = torch.lerp(frame.generated, generated, (i + 1) / (repeated + 1))
        frame.face = face
        frame.masked = masked_face
        frame.generated = generated


@torch.no_grad()
def paint(unet, autoencoder, faces, audio, z, mask, generator, steps=20, cfg=1.5, cache_every=1, decode_batch=4,
          references=None):
    """Repaints the faces of one clip -> (repainted faces, masked faces), both (F, 3, r, r).

    faces: aligned, (F, 3, r, r) in [-1, 1]; audio: (F, A, audio_width); z: noise (1, 4, 1, h, w); mask: (r, r);
    steps, cfg, cache_every: see `denoise`; decode_batch: faces that the autoencoder encodes or decodes at a time;
    references: other pictures of this person, by default the faces themselves.
    """
    masked = faces * mask
    references = faces if references is None else references
    condition = encode_condition(autoencoder, masked, references, mask, generator, decode_batch)        # (F, 9, h, w)
    condition = rearrange(condition.float(), "f c h w -> 1 c f h w")
    z = z.expand(-1, -1, len(faces), -1, -1)
    for z in denoise(unet, z, condition, audio[None], steps, cfg, cache_every):
        pass                                                                # only the last latents count
    z = rearrange(z, "1 c f h w -> f c h w")
    painted = torch.cat([autoencoder.decode(part) for part in z.split(decode_batch)])
    return painted * (1 - mask) + faces * mask, masked


def encode_condition(autoencoder, masked, references, mask, generator, encode_batch=64):
    """The input of the UNet besides the noisy latents, (N, 9, h, w): the mask (r, r), and latents of masked and of
    reference pictures (N, 3, r, r).

    Latents are drawn from their distribution as in the original, those of the masked pictures first. encode_batch:
    pictures encoded at a time.
    """
    latents = []
    for pictures in (masked, references):
        posteriors = [autoencoder.encode(part) for part in pictures.split(encode_batch)]
        mean = torch.cat([posterior.mean for posterior in posteriors])
        std = torch.cat([posterior.std for posterior in posteriors])
        latents.append(vq.Posterior(mean, std, posteriors[0].scaling).sample(generator))        # one draw for all
    mask = F.interpolate(mask.expand(len(masked), 1, *mask.shape), latents[0].shape[2:])
    return torch.cat([mask, *latents], 1)


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
    """The Config of an official state dict, read from its shapes. What shapes do not tell comes from the first entry
    of CONFIGS with the same widths. Raises vq.CheckpointError if there is none."""
    def count(key):
        n = 0
        while key.format(n) in state:
            n += 1
        return n
    levels = count("down_blocks.{}.resnets.0.conv1.weight")
    widths = tuple(len(state[f"down_blocks.{i}.resnets.0.conv1.weight"]) for i in range(levels))
    known = next((config for config in CONFIGS.values() if config.widths == widths), None)
    if known is None:
        raise vq.CheckpointError(f"{path}: a UNet of widths {widths}; no tensor tells its number of heads, "
                                 "which latentsync.load takes in a config=")
    motion = "none"
    with_motion = [key for key in state if ".motion_modules." in key]
    if with_motion:
        motion = "all" if any(key.startswith("down_blocks.") for key in with_motion) else "up"
    tables = [v.shape[1] for k, v in state.items() if k.endswith("pos_encoder.pe")]
    return replace(known, layers=count("down_blocks.0.resnets.{}.conv1.weight"),
                   audio_width=state[f"down_blocks.0.attentions.0.{_BLOCK}.attn2.to_k.weight"].shape[1],
                   motion=motion, motion_length=tables[0] if tables else known.motion_length,
                   in_channels=state["conv_in.weight"].shape[1], out_channels=len(state["conv_out.weight"]))


def load(path, config=None, resolution=None, dtype=torch.float32, device="cpu", weights=None):
    """A UNet in eval mode from a released file of version 1.0, 1.5 or 1.6, a training checkpoint, or a file of ours.

    resolution: side of the faces, 256 or 512. No released file tells it: those of 1.5 and 1.6 have the same shapes.
    weights: see vq.read_checkpoint. Raises vq.CheckpointError.
    """
    what = "a UNet of LatentSync (latentsync_unet.pt, or one of train.py)"
    state, header = vq.read_checkpoint(path, weights=weights)
    state = vq.rename_keys(state, VERSION_1_0)
    vq.require(state, "conv_in.weight", "down_blocks.0.resnets.0.conv1.weight",
               "conv_out.weight", f"down_blocks.0.attentions.0.{_BLOCK}.attn2.to_k.weight", path=path, what=what)
    with vq.understanding(path, what):
        if config is None:
            config = vq.read_config(Config, header, path, lambda: infer_config(state, path))
        if resolution:
            config = replace(config, resolution=resolution)
        state = _to_ours(state)
        sketch = vq.on_meta(UNet, config)
        vq.check_fit(sketch, state, path, optional=_tables(sketch))
        model = vq.build(UNet, config)
        vq.load_strict(model, state, path, optional=_tables(model))
    model.origin = header.origin
    return model.eval().to(device, dtype)


def _to_ours(state):
    """An official state dict with our keys."""
    return vq.join_rows(vq.join_rows(vq.rename_keys(state, RENAMES), *QKV), *KV)


def _tables(model):
    """Names of the position tables. The model computes them, so files may lack them."""
    return {name for name, _ in model.named_buffers()}


def start_from_stable_diffusion(model, path):
    """Fills a UNet with the weights of Stable Diffusion 1.5's UNet where they fit. path: a folder or file of diffusers.

    The first convolution had 4 input channels and has 13 here, so its weights do not fit. It starts at zero, as in the
    original. The keys and values that attended to text are not used: those for audio keep their values, and so do the
    motion modules. Raises vq.CheckpointError.
    """
    state, _ = vq.read_checkpoint(path)
    vq.require(state, "conv_in.weight", f"down_blocks.0.attentions.0.{_BLOCK}.attn2.to_k.weight", path=path,
               what="the UNet of Stable Diffusion 1.5")
    unused = ("conv_in.", f"{_BLOCK}.attn2.to_k.", f"{_BLOCK}.attn2.to_v.")
    state = _to_ours({k: v for k, v in state.items() if not any(part in k for part in unused)})
    own = {k for k in model.state_dict() if k.startswith("conv_in.") or ".key_value." in k or ".motion_modules." in k}
    vq.load_strict(model, state, path, optional=own)
    with torch.no_grad():
        model.conv_in.weight.zero_()
        model.conv_in.bias.zero_()


def load_whisper(path, config=None, dtype=torch.float32, device="cpu"):
    """Whisper's encoder in eval mode from OpenAI's file, tiny.pt for the released UNets, or a file of ours.

    Whisper's decoder is not loaded. Raises vq.CheckpointError.
    """
    what = "a Whisper model (OpenAI's tiny.pt, or one of train.py)"
    state, header = vq.read_checkpoint(path)
    state = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    vq.require(state, "conv1.weight", "blocks.0.attn.query.weight", "ln_post.weight", path=path, what=what)

    def infer():
        width, mels, _ = state["conv1.weight"].shape
        heads = width // 64                                                 # true of all Whispers that OpenAI made
        return WhisperConfig(mels, len(state["positional_embedding"]), width, heads,
                             sum(k.endswith(".attn.query.weight") for k in state))
    with vq.understanding(path, what):
        if config is None:
            config = vq.read_config(WhisperConfig, header, path, infer)
        sketch = vq.on_meta(Whisper, config)
        vq.check_fit(sketch, state, path, optional=_tables(sketch))
        model = vq.build(Whisper, config)
        vq.load_strict(model, state, path, optional=_tables(model))
    model.origin = header.origin
    return model.eval().to(device, dtype)


def export(model):
    """The official state dict, in float32: of a UNet with the keys of version 1.5, of a Whisper its encoder's part."""
    state = {k: v.float().contiguous() for k, v in model.state_dict().items()}
    if isinstance(model, Whisper):
        return {f"encoder.{k}": v for k, v in state.items()}
    return vq.rename_keys(vq.split_rows(vq.split_rows(state, *QKV), *KV), RENAMES, inverse=True)


def save(model, path, dtype=None, **extra):
    """Writes a UNet or a Whisper as safetensors: official keys, config (and `extra`) in the header, no position
    tables."""
    tables = ("encoder.positional_embedding", "pos_encoder.pe")
    state = {k: v for k, v in export(model).items() if not k.endswith(tables)}
    vq.save_checkpoint(path, state, model.config, dtype, **extra)
