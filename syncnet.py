"""SyncNet: does this mouth say this sound? Full definition of two networks, all of it in this file.

Both turn a short clip of a face into one vector and the sound of the same moment into another, and say how near the
two are. They share the idea, not a scale: scores of one mean nothing to the other.

**StableSyncNet** (LatentSync, arXiv 2412.09262, section 3.3) supervises training: its gradient tells a generator how to
move the lips.

    16 frames of an aligned face, (B, 16, 3, 256, 256) in [-1, 1]         0.64 s of sound, 16 kHz
                  | frames side by side as channels, lower half             | mel spectrogram, 80 bands, 80 columns/s
    (B, 48, 128, 256)                                               (B, 1, 80, 52)
                  | visual encoder: residual blocks that each               | audio encoder: the same kind
                  | shrink the map, self-attention at 8x8 and 4x4           |
    (B, 2048, 1, 1) -> ReLU -> length 1                             (B, 2048, 1, 1) -> ReLU -> length 1
                  +------------------- cosine of the two, in [0, 1] -------------------+

After a ReLU no number is negative, so neither is the cosine: it is taken for the probability that the two belong
together, and trained as such, by binary cross entropy. Every second pair does not: it is the sound with frames of any
other moment of the same video, so that identity, light and microphone tell nothing.

The finding of the paper is what training needs to converge. The loss soon falls to ln 2 = 0.69, that of answering "one
half" to everything, and stays there for thousands of steps, or for ever, if batches are small, if sound and picture of
the training videos are not in step, if faces are not aligned, if clips are short (too little to hear) or long (too hard
to start with). Large batches, clean data and 16 frames break the plateau; so does another loss to start with
(`loss_of_moments`). `train.py syncnet --study` shows it in small, Wav2Lip's plain convolutions included (`plain`).

**OriginalSyncNet** (Chung and Zisserman, "Out of time", 2016) is the judge of the lip-sync literature: 5 frames against
0.2 s of MFCCs, trained so that vectors of matching pairs lie near each other. `score` slides it over a video and shifts
the sound by -15 ... 15 frames against the picture: Sync-D (LSE-D) is the smallest mean distance of all shifts, Sync-C
(LSE-C) the median minus the smallest, and the offset says where that is. StableSyncNet can be slid likewise; its
distances lie between 0 and 1, the original's, Euclidean ones of vectors of any length, around 10.

Letters: B batch, F frames of a clip, N clips of a video, C width, H W height and width, D numbers of an embedding, S
shifts, n samples. Pictures come at 25 a second, sound at 16 kHz. Released weights: stable_syncnet.pt (401 M parameters,
repository ByteDance/LatentSync-1.6), syncnet_v2.model (13.6 M).

    model, original = syncnet.load("stable_syncnet.pt"), syncnet.load("syncnet_v2.model")
    mel = syncnet.mel_window(audio, frame, model.config.columns)            # of the clip that begins with that frame
    similarity = model(model.prepare(frames), mel[None, None])              # (1,) in [0, 1]
    offset, confidence, distance, curve, clips = syncnet.score(original, faces, audio)
"""
import math
from collections import namedtuple
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import vq

FPS, SAMPLE_RATE = 25, 16000


@dataclass(frozen=True)
class Config:
    """A StableSyncNet or its ablation. Of each encoder a row per level: (width, factor, attention), where factor is how
    much smaller the level's end is, a number or one for height and one for width. A plain one has instead
    (width, kernel, stride, padding, residual blocks after it). The last width is D; the last map has to be 1 x 1."""

    visual: tuple
    audio: tuple
    frames: int = 16                            # F
    picture: tuple = (128, 256)                 # height, width that the visual encoder sees
    latent: bool = False                        # per frame 4 channels of a face's latent, not 3 of its lower half
    plain: bool = False                         # Wav2Lip's convolutions and batch norms

    @property
    def channels(self):
        """Of the visual encoder's input."""
        return self.frames * (4 if self.latent else 3)

    @property
    def columns(self):
        """Of the mel spectrogram of a clip: 3.2 per frame, rounded up."""
        return math.ceil(self.frames / 5 * 16)


def _levels(widths, factors, attention=()):
    return tuple((width, factor, i in attention) for i, (width, factor) in enumerate(zip(widths, factors)))


_AUDIO = (32, 64, 128, 256, 512, 1024, 2048), ((2, 1), 2, 2, 1, 2, 2, (2, 3))
_VISUAL = (64, 128, 256, 256, 512, 1024, 2048, 2048), ((1, 2), 2, 2, 2, 2, 2, 2, 2)
CONFIGS = {
    "16_pixel_attn": Config(_levels(*_VISUAL, attention={4, 5}), _levels(*_AUDIO, attention={3, 4})),       # released
    "16_pixel": Config(_levels(*_VISUAL), _levels(*_AUDIO)),
    "16_latent": Config(_levels((64, 128, 256, 256, 512, 1024), (2, 2, 2, 1, 2, 2)),
                        _levels((32, 64, 128, 256, 512, 1024), ((2, 1), 2, 2, 2, 2, (2, 3))), 16, (32, 32), True),
    "25_pixel": Config(_levels((128, 128, 256, 256, 512, 512, 1024, 1024), ((1, 2), 2, 2, 2, 2, 2, 2, 2)),
                       _levels((64, 128, 256, 256, 512, 1024), (2, 2, 2, 2, 2, 2)), 25),
    "5_pixel_wav2lip": Config(
        ((32, 7, 1, 3, 0), (64, 5, (1, 2), 1, 2), (128, 3, 2, 1, 3), (256, 3, 3, 1, 2), (512, 3, 2, 1, 2),
         (1024, 3, 2, 1, 2), (1024, 3, 2, 1, 0), (1024, 3, 1, 0, 0), (1024, 1, 1, 0, 0)),
        ((32, 3, 1, 1, 2), (64, 3, (3, 1), 1, 2), (128, 3, 3, 1, 2), (256, 3, (3, 2), 1, 2), (512, 3, 1, 1, 2),
         (1024, 3, 1, 0, 0), (1024, 1, 1, 0, 0)), 5, plain=True),
    "talking_head": Config(_levels((32, 32, 64, 96, 128, 256), ((1, 2), 2, 2, 2, 2, 2), {3}),       # the demo's
                           _levels((32, 32, 64, 96, 128, 256), ((2, 1), 2, 2, 2, 2, 2), {3}), picture=(32, 64)),
    "talking_head_plain": Config(
        ((32, 5, (1, 2), 2, 0), (32, 3, 2, 1, 1), (64, 3, 2, 1, 1), (96, 3, 2, 1, 1), (128, 3, 2, 1, 1),
         (128, 2, 1, 0, 0), (128, 1, 1, 0, 0)),
        ((32, 3, (2, 1), 1, 1), (32, 3, 2, 1, 1), (64, 3, 2, 1, 1), (96, 3, (2, 3), 1, 1), (128, 3, 2, 1, 1),
         (128, 3, 1, 0, 0), (128, 1, 1, 0, 0)), 16, (32, 64), plain=True),
}


def variant(config, frames=None, embedding=None, attention=None):
    """The same network for clips of `frames`, with `embedding` numbers (a multiple of 32), or with attention=False:
    what the paper compares. None leaves as it is. For other frames the audio encoder halves the time in its last
    levels, as often as it takes to come down to 1, and the first ones shrink the 80 bands alone. Raises ValueError."""
    visual, audio = list(config.visual), list(config.audio)
    if config.plain and (frames not in (None, config.frames) or embedding not in (None, visual[-1][0])):
        raise ValueError(f"a plain network is made for {config.frames} frames and {visual[-1][0]} numbers")
    if embedding and embedding % 32:
        raise ValueError(f"an embedding of {embedding} numbers: expected a multiple of 32")
    if frames and frames != config.frames:
        config = replace(config, frames=frames)
        late = 6 - int(math.log2(config.columns))
        if not 0 <= late < 6 <= len(audio):
            raise ValueError(f"clips of {frames} frames: expected 1 to 39, and an audio encoder of 6 levels or more")
        factors = [(2, 1)] * late + [2] * (6 - late)
        factors[3:3] = [1] * (len(audio) - 6)
        audio = [(width, factor, attends) for (width, _, attends), factor in zip(audio, factors)]
    for levels in (visual, audio) if not config.plain else ():
        levels[-1] = (embedding or levels[-1][0], *levels[-1][1:])
        levels[:] = levels if attention in (None, True) else [(width, factor, False) for width, factor, _ in levels]
    return replace(config, visual=tuple(visual), audio=tuple(audio))


# ----------------------------------------------------------------------------------------------------------------------
# Sound: what the networks hear. Computed in float64, as by the authors; no gradient flows through it.


def windows(audio, size, hop, first, count, before=0):
    """`count` windows of sound (n,) -> (count, size), from number `first` on: i begins at sample i * hop - before.

    The sound is pre-emphasized, y[n] = x[n] - 0.97 x[n - 1]: speech has little energy in its high frequencies, and much
    to tell there. Zeros stand where there is none. Only the part that these windows see is touched.
    """
    start, length = first * hop - before, (count - 1) * hop + size
    low, high = max(start, 0), min(start + length, len(audio))
    piece = np.zeros(length)
    if high > low:
        x = np.concatenate([audio[low - 1:low] if low else [0.0], audio[low:high]]).astype(np.float64)
        piece[low - start:high - start] = x[1:] - 0.97 * x[:-1]
    return np.lib.stride_tricks.sliding_window_view(piece, size)[::hop]


MELS, HANN = vq.slaney_mels(80, 55.0, 7600.0, 800, SAMPLE_RATE), 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(800) / 800)
HOP = 200                                                                   # 80 columns a second, 3.2 a frame


def mel_spectrogram(audio, first=0, columns=None):
    """What StableSyncNet hears: sound, an array (n,) in [-1, 1] -> tensor (80, columns) float32 in [-4, 4], from column
    `first` on.

    By default all 1 + n // 200 columns. Asking for a part computes only that, and the same numbers. Not whisper's:
    other windows, zeros beyond the ends, magnitudes instead of powers.
    """
    columns = 1 + len(audio) // HOP - first if columns is None else columns
    spectrum = np.abs(np.fft.rfft(windows(audio, 800, HOP, first, columns, before=400) * HANN))     # centred
    level = 20 * np.log10(np.maximum(1e-5, spectrum @ MELS.T)) - 20         # dB, so that loud speech is near 0
    return torch.from_numpy(np.clip(8 * (level + 100) / 100 - 4, -4, 4).T.astype(np.float32))


def mel_start(frame):
    """The first column of the window that belongs to a clip from video frame `frame` on."""
    return int(80 * frame / FPS)                                            # truncated: 0, 3, 6, 9, 12, 16 ...


def mel_window(audio, frame, columns):
    """The window (80, columns) of a clip that begins at `frame`; None where the sound ends too soon."""
    first = mel_start(frame)
    if first + columns > 1 + len(audio) // HOP:
        return None
    return mel_spectrogram(audio, first, columns)


def mfcc(audio, first=0, columns=None):
    """What the original SyncNet hears: sound, an array (n,) in int16's range -> tensor (13, columns), 100 a second.

    Mel-frequency cepstral coefficients as of python_speech_features: windows of 25 ms, rectangular, 26 bands; the first
    coefficient is the logarithm of the energy.
    """
    available = 1 + max(0, math.ceil((len(audio) - 400) / 160))
    columns = available - first if columns is None else columns
    power = np.abs(np.fft.rfft(windows(audio, 400, 160, first, columns), 512)) ** 2 / 512
    edges = np.linspace(0, 2595 * math.log10(1 + 8000 / 700), 28)           # mel; up to half the sample rate
    edges = np.floor(513 * 700 * (10 ** (edges / 2595) - 1) / SAMPLE_RATE)
    f = np.arange(257)
    left, peak, right = (edges[i:26 + i, None] for i in range(3))
    rising, falling = (f - left) / (peak - left), (right - f) / (right - peak)
    bands = np.where((left <= f) & (f < peak), rising, np.where((peak <= f) & (f < right), falling, 0))
    bands = np.log(np.maximum(power @ bands.T, np.finfo(float).eps))        # (columns, 26)
    n, k = np.arange(26), np.arange(13)[:, None]
    dct = np.cos(np.pi * k * (2 * n + 1) / 52) * np.where(k == 0, (1 / 26) ** 0.5, (2 / 26) ** 0.5)
    cepstrum = bands @ dct.T * (1 + 11 * np.sin(np.pi * np.arange(13) / 22))        # "lifted": higher ones weigh more
    cepstrum[:, 0] = np.log(np.maximum(power.sum(1), np.finfo(float).eps))
    return torch.from_numpy(cepstrum.T.astype(np.float32))


# ----------------------------------------------------------------------------------------------------------------------
# StableSyncNet: building blocks


class Shrink(nn.Conv2d):
    """Convolution 3x3 that makes a map (H, W) smaller by `factor`. Zeros are added so that multiples of the factor are
    divided by it, others rounded down: on the right and below, but on both ends of a side that stays as it is."""

    def __init__(self, channels, factor):
        self.factor = factor = (factor, factor) if isinstance(factor, int) else tuple(factor)
        super().__init__(channels, channels, 3, stride=factor)
        vertical, horizontal = factor
        self.margin = (int(horizontal == 1), 1, int(vertical == 1), 1)      # left, right, top, bottom

    def forward(self, x):
        return super().forward(F.pad(x, self.margin))


class ResBlock(vq.ResBlock):
    """The residual block of the tokenizers, and then, unless the factor is 1, a smaller map."""

    def __init__(self, c_in, c_out, factor):
        super().__init__(c_in, c_out)
        self.downsample = Shrink(c_out, factor) if factor != 1 else None

    def forward(self, x):                                                   # (B, c_in, H, W) -> (B, c_out, H', W')
        x = super().forward(x)
        return x if self.downsample is None else self.downsample(x)


class Attention(nn.Module):
    """A transformer block between two 1x1 convolutions, around which the input is added: every place of the map sees
    every other."""

    HEADS = 8

    def __init__(self, channels):
        super().__init__()
        self.norm1 = vq.group_norm(channels)
        self.conv_in = nn.Conv2d(channels, channels, 1)
        self.norm2 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff_in = nn.Linear(channels, 8 * channels)
        self.ff_out = nn.Linear(4 * channels, channels)
        self.conv_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        B, C, height, width = x.shape
        y = self.conv_in(vq.norm_silu(self.norm1, x, silu=False))
        y = rearrange(y, "b c h w -> b (h w) c")
        qkv = rearrange(self.qkv(self.norm2(y)), "b l (three h d) -> three b h l d", three=3, h=self.HEADS)
        y = y + self.proj(rearrange(F.scaled_dot_product_attention(*qkv), "b h l d -> b l (h d)"))
        value, gate = self.ff_in(self.norm3(y)).chunk(2, -1)
        y = y + self.ff_out(value * F.gelu(gate))                           # GEGLU
        return x + self.conv_out(rearrange(y, "b (h w) c -> b c h w", h=height))


class Encoder(nn.Module):
    """(B, c_in, H, W) -> (B, D): residual blocks, each followed by attention or not, down to a map of one place."""

    def __init__(self, c_in, levels):
        super().__init__()
        widths = [levels[0][0]] + [width for width, *_ in levels]
        self.conv_in = nn.Conv2d(c_in, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()                                  # numbered through, as in the released file
        for before, (width, factor, attention) in zip(widths, levels):
            self.down_blocks.append(ResBlock(before, width, factor))
            if attention:
                self.down_blocks.append(Attention(width))
        self.norm_out = vq.group_norm(widths[-1])

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return F.relu(vq.norm_silu(self.norm_out, x, silu=False)).flatten(1)


class ConvBlock(nn.Module):
    """Convolution, batch norm, activation. A residual one adds its input before the activation."""

    def __init__(self, c_in, c_out, kernel, stride, padding, residual, slope):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding)
        self.norm = nn.BatchNorm2d(c_out)
        self.residual, self.slope = residual, slope

    def forward(self, x):
        y = self.norm(self.conv(x))
        return F.leaky_relu(y + x if self.residual else y, self.slope)


class PlainEncoder(nn.Sequential):
    """Wav2Lip's kind: convolutions one after the other. (B, c_in, H, W) -> (B, D). The last block has to have a ReLU,
    so that embeddings are not negative; the last `relus` have one, as in LatentSync's copy, the others a leaky one."""

    def __init__(self, c_in, levels, relus):
        blocks = []
        for width, kernel, stride, padding, more in levels:
            blocks.append((c_in, width, kernel, stride, padding, False))
            blocks += [(width, width, 3, 1, 1, True)] * more
            c_in = width
        slopes = [0.2] * (len(blocks) - relus) + [0.0] * relus
        super().__init__(*(ConvBlock(*block, slope) for block, slope in zip(blocks, slopes)))

    def forward(self, x):
        return super().forward(x).flatten(1)


# ----------------------------------------------------------------------------------------------------------------------
# StableSyncNet


def lower_halves(faces, config):
    """Pictures of aligned faces, uint8 (n, 3, h, w) -> uint8 (n, 3, H, W): resized to a square, bicubic, of which then
    the lower half is kept. Pictures that have the size of a half pass as they are."""
    height, width = config.picture
    if faces.shape[2:] == (height, width):
        return faces
    if faces.shape[2:] != (width, width):
        faces = F.interpolate(faces.float(), (width, width), mode="bicubic", antialias=True)
        faces = faces.round().clamp(0, 255).byte()
    return faces[:, :, -height:]                                            # rows 128 .. 255


class StableSyncNet(nn.Module):
    """Two encoders, and the cosine of what they say."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.plain:
            self.visual_encoder = PlainEncoder(config.channels, config.visual, relus=3)
            self.audio_encoder = PlainEncoder(1, config.audio, relus=2)
        else:
            self.visual_encoder = Encoder(config.channels, config.visual)
            self.audio_encoder = Encoder(1, config.audio)

    def prepare(self, frames):
        """Aligned faces, uint8 (B, F, 3, h, w) of any size, or their lower halves (B, F, 3, H, W) -> (B, 3F, H, W) in
        [-1, 1]. Channels are frame by frame, then rgb. Latents are the caller's to make: (B, 4F, 32, 32), of whole
        faces, times 0.18215."""
        halves = lower_halves(frames.flatten(0, 1), self.config).to(self.dtype).div(127.5).sub(1)
        return rearrange(halves, "(b f) c h w -> b (f c) h w", f=self.config.frames)

    @property
    def dtype(self):
        return next(self.parameters()).dtype

    def embed_frames(self, frames):
        """(B, 3F, H, W) as `prepare` makes them (or 4F of latents) -> (B, D) of length 1."""
        return F.normalize(self.visual_encoder(frames).float(), dim=1)

    def embed_audio(self, mel):
        """(B, 1, 80, columns) -> (B, D) of length 1."""
        return F.normalize(self.audio_encoder(mel).float(), dim=1)

    def forward(self, frames, mel):
        """Probability (B,) that they belong together. Gradients reach the frames: that supervises a generator."""
        cosine = (self.embed_frames(frames) * self.embed_audio(mel)).sum(1)
        return cosine.clamp(0, 1)                                           # rounding can make it 1.0000001

    def loss(self, frames, mel, label):
        """(binary cross entropy, {"accuracy"}); label (B,): 1 where they belong together, else 0."""
        cosine = self(frames, mel)
        with torch.autocast(cosine.device.type, enabled=False):             # it is not safe in half precision
            loss = F.binary_cross_entropy(cosine, label.float())
        return loss, {"accuracy": ((cosine > 0.5) == (label > 0.5)).float().mean()}

    def loss_of_moments(self, frames, mel, contrast=False):
        """(loss, {"accuracy"}) of B videos at K moments each, frames (B, K, 3F, H, W) and mel (B, K, 1, 80, columns): a
        harder school than the paper's, for small machines. All K * K pairs of a video count, so that the same encodings
        serve more often; the K that match weigh as much as the others together.

        contrast: to start with, not cross entropy of each pair, but (InfoNCE) of finding each clip's sound among the K
        of its video, and the other way round. Binary cross entropy first makes all cosines one half, which is best as
        long as nothing is known, and what the encoders could tell apart is lost with it: the plateau. Here only
        differences count.
        """
        B, K = frames.shape[:2]
        vision = self.embed_frames(frames.flatten(0, 1)).unflatten(0, (B, K))
        audio = self.embed_audio(mel.flatten(0, 1)).unflatten(0, (B, K))
        cosine = (vision @ audio.transpose(1, 2)).clamp(0, 1)               # (B, K, K): clip, sound
        match = torch.eye(K, device=cosine.device).expand(B, K, K)
        with torch.autocast(cosine.device.type, enabled=False):
            if contrast:                                                    # 10: the inverse of a temperature
                rows = torch.cat([10 * cosine, 10 * cosine.transpose(1, 2)]).flatten(0, 1)
                loss = F.cross_entropy(rows, torch.arange(K, device=rows.device).repeat(2 * B))
            else:
                weight = torch.where(match > 0, 0.5 * K, 0.5 * K / (K - 1))         # K * K on average 1
                loss = F.binary_cross_entropy(cosine, match, weight)
        right = ((cosine > 0.5) == (match > 0.5)).float()
        return loss, {"accuracy": ((right * match).sum() / K + (right * (1 - match)).sum() / (K * K - K)) / (2 * B)}

    # what `score` needs, of both networks

    @property
    def frames(self):
        """F, of a clip."""
        return self.config.frames

    SPARE = 0                                                               # frames that have to follow a clip
    PADDING = math.nan                                                      # shifts beyond the ends do not count

    def embed_clips(self, faces):
        """All clips of successive faces, uint8 (N + F - 1, 3, h, w) -> (N, D)."""
        halves = lower_halves(faces, self.config)                           # each frame is in F clips, but resized once
        return self.embed_frames(self.prepare(rearrange(halves.unfold(0, self.frames, 1), "n c h w f -> n f c h w")))

    def embed_sound(self, audio, first, count):
        """Embeddings (at most count, D) of the sound (n,) of clips `first` and following; fewer at its end."""
        columns, last, like = self.config.columns, 1 + len(audio) // HOP, next(self.parameters())
        starts = [mel_start(i) for i in range(first, first + count)]
        starts = [start for start in starts if start + columns <= last]
        if not starts:
            return like.new_zeros(0, self.config.audio[-1][0])
        mel = mel_spectrogram(audio, starts[0], starts[-1] + columns - starts[0])
        mels = [mel[:, start - starts[0]:start - starts[0] + columns] for start in starts]
        return self.embed_audio(torch.stack(mels)[:, None].to(like))

    @staticmethod
    def distance(vision, audio):
        """1 - cosine, 0 .. 1, over the last axis."""
        return 1 - (vision * audio).sum(-1)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """PyTorch's defaults, as the authors'."""
        vq.init_default(self, generator)


# ----------------------------------------------------------------------------------------------------------------------
# The original SyncNet


def _conv(layer, norm, c_in, c_out, kernel, stride=1, padding=0):
    return layer(c_in, c_out, kernel, stride, padding), norm(c_out), nn.ReLU()


class OriginalSyncNet(nn.Module):
    """The judge: 5 frames of a face crop, 224 x 224, and 20 columns of MFCCs -> 1024 numbers each. Evaluation only."""

    SPARE = 1                                                               # the original leaves the last clip out
    PADDING = 0.0                                                           # and compares with zeros beyond the ends
    frames = 5

    def __init__(self):
        super().__init__()
        flat, deep = (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d)
        head = lambda: nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 1024))
        self.audio_convs = nn.Sequential(
            *_conv(*flat, 1, 64, 3, padding=1), nn.MaxPool2d(1, 1),         # does nothing, but counts in the file
            *_conv(*flat, 64, 192, 3, padding=1), nn.MaxPool2d(3, (1, 2)),
            *_conv(*flat, 192, 384, 3, padding=1),
            *_conv(*flat, 384, 256, 3, padding=1),
            *_conv(*flat, 256, 256, 3, padding=1), nn.MaxPool2d(3, 2),
            *_conv(*flat, 256, 512, (5, 4)))
        self.lip_convs = nn.Sequential(
            *_conv(*deep, 3, 96, (5, 7, 7), (1, 2, 2)), nn.MaxPool3d((1, 3, 3), (1, 2, 2)),     # joins the 5 frames
            *_conv(*deep, 96, 256, (1, 5, 5), (1, 2, 2), (0, 1, 1)), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            *_conv(*deep, 256, 256, (1, 3, 3), padding=(0, 1, 1)),
            *_conv(*deep, 256, 256, (1, 3, 3), padding=(0, 1, 1)),
            *_conv(*deep, 256, 256, (1, 3, 3), padding=(0, 1, 1)), nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_conv(*deep, 256, 512, (1, 6, 6)))
        self.audio_head, self.lip_head = head(), head()

    def embed_frames(self, frames):
        """(B, 3, 5, 224, 224), values 0 .. 255 in the order blue, green, red -> (B, 1024)."""
        return self.lip_head(self.lip_convs(frames).flatten(1))

    def embed_audio(self, mfcc):
        """(B, 1, 13, 20) -> (B, 1024)."""
        return self.audio_head(self.audio_convs(mfcc).flatten(1))

    def embed_clips(self, faces):
        """All clips of successive faces, uint8 (N + 4, 3, h, w), red first, of any size -> (N, 1024)."""
        faces = faces.to(next(self.parameters()))
        if faces.shape[2:] != (224, 224):
            faces = F.interpolate(faces, (224, 224), mode="bilinear", align_corners=False)
        return self.embed_frames(rearrange(faces.flip(1).unfold(0, 5, 1), "n c h w f -> n c f h w"))

    def embed_sound(self, audio, first, count):
        """Embeddings (at most count, 1024) of the sound (n,) in [-1, 1] of clips `first` and following; of the last
        ones there are none, as in the original."""
        count = min(count, len(audio) // 640 - 5 - first)
        like = next(self.parameters())
        if count <= 0:
            return like.new_zeros(0, 1024)
        low = max(0, 640 * first - 160)                                     # a column more: it emphasizes the next one
        heard = np.round(np.asarray(audio[low:640 * (first + count) + 3200], np.float64) * 32768).clip(-32768, 32767)
        columns = mfcc(heard, (640 * first - low) // 160, 4 * count + 16)   # 4 columns a frame, windows of 20
        return self.embed_audio(columns.unfold(1, 20, 4).transpose(0, 1)[:, None].to(like))

    @staticmethod
    def distance(vision, audio):
        """Euclidean, over the last axis."""
        return (vision - audio + 1e-6).norm(dim=-1)                         # F.pairwise_distance, that eps included


# ----------------------------------------------------------------------------------------------------------------------
# Scoring a video

Score = namedtuple("Score", "offset confidence distance curve clips")
Score.__doc__ = """offset: in frames; where it is positive, the sound comes so much too early. confidence (Sync-C):
median of the curve minus its minimum. distance (Sync-D): the minimum. curve (S,): mean distance over all clips for each
shift k = -15 ... 15, which compares a clip with the sound of k frames later; the offset is -k. clips: their number."""


def best_shift(curve, clips=0):
    """A Score from a curve (S,) of mean distances. Shifts that are nan do not count."""
    distance, k = torch.where(curve.isnan(), math.inf, curve).min(0)
    return Score(len(curve) // 2 - int(k), float(curve.nanmedian() - distance), float(distance), curve, clips)


@torch.no_grad()
def score(model, frames, audio, max_shift=15, batch_size=16):
    """How well the lips of one face fit the sound -> Score.

    model: a StableSyncNet, or the OriginalSyncNet; frames: faces at 25 frames a second, uint8 (3, h, w), all of one
    size, in any iterable, of which no more are held at a time than `batch_size` clips need. For the first network they
    are aligned faces, for the second such crops as `face_crop` makes. audio: an array (n,) in [-1, 1] at 16 kHz, which
    begins with the first frame; what goes beyond the last one is not heard. Shifts that half of the clips or more do
    not allow are nan, unless the model compares with zeros there (`PADDING`). Raises ValueError if video or sound is
    shorter than one clip.
    """
    like = next(model.parameters())
    total, count = (torch.zeros(2 * max_shift + 1, dtype=torch.float64) for _ in range(2))      # mps has no float64
    vision = sound = None                       # embeddings of clips whose neighbours are yet to come
    held, first, clips, at_end = [], 0, 0, False
    frames = iter(frames)
    while not at_end:
        held += islice(frames, batch_size + model.frames - 1 + model.SPARE - len(held))
        n = max(0, len(held) - model.frames + 1 - model.SPARE)              # clips in it
        heard = model.embed_sound(audio, first, n)
        at_end = n < batch_size or len(heard) < n                           # of the video, or of the sound
        if vision is None:
            vision, sound = heard[:0], F.pad(heard[:0], (0, 0, max_shift, 0), value=model.PADDING)
        if len(heard):
            faces = torch.stack(held[:len(heard) + model.frames - 1]).to(like.device)
            vision = torch.cat([vision, model.embed_clips(faces)])
        sound = torch.cat([sound, heard])
        if at_end:
            sound = F.pad(sound, (0, 0, 0, max_shift), value=model.PADDING)
        ready = sound.unfold(0, len(total), 1) if len(sound) >= len(total) else sound[:0, :, None]  # (n, D, S)
        distances = model.distance(vision[:len(ready), None], ready.transpose(1, 2)).cpu().double()
        total, count = total + distances.nansum(0), count + (~distances.isnan()).sum(0)
        vision, sound = vision[len(ready):], sound[len(ready):]
        held, first, clips = held[n:], first + n, clips + len(heard)
    if not clips:
        raise ValueError(f"expected at least {model.frames + model.SPARE} frames of video and as much sound")
    common = count * 2 > clips                                              # shifts that most clips allow
    return best_shift(torch.where(common, total / count, math.nan).float(), clips)


def combine(scores):
    """Of the faces of a video, as LatentSync's authors do: (int of the mean offset, mean confidence, mean distance)."""
    offset, confidence, distance = (sum(score[i] for score in scores) / len(scores) for i in range(3))
    return int(offset), confidence, distance


def overlap(a, b):
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    return width * height / (area(a) + area(b) - width * height)


def face_tracks(boxes, cuts=(), least_overlap=0.5, longest_gap=25, shortest=50, smallest=100):
    """Follows faces through a video: per frame a list of boxes (x0, y0, x1, y1) in pixels -> [(first frame, (n, 4))].
    Numbers that follow those of a box, such as its landmarks, go along.

    A box continues the track whose last box it overlaps most, more than least_overlap, at most longest_gap frames ago
    and on the same side of all `cuts` (frames with which a new scene begins). Tracks have more than `shortest` frames
    and a mean side above `smallest` pixels; gaps in them are filled by straight lines.
    """
    tracks = []                                                             # each a list of (frame, box)
    for frame, found in enumerate(boxes):
        scene = max((cut for cut in cuts if cut <= frame), default=0)
        taken = set()
        for box in found:
            candidates = [(overlap(box, track[-1][1]), i) for i, track in enumerate(tracks)
                          if i not in taken and track[-1][0] >= max(scene, frame - longest_gap)]
            best, i = max(candidates, default=(0.0, None))
            if best > least_overlap:
                tracks[i].append((frame, box))
            else:
                i = len(tracks)
                tracks.append([(frame, box)])
            taken.add(i)
    result = []
    for track in tracks:
        times, corners = np.array([t for t, _ in track]), np.array([box for _, box in track], float)
        every = np.arange(times[0], times[-1] + 1)
        filled = np.stack([np.interp(every, times, column) for column in corners.T], 1)
        sides = filled[:, 2:4] - filled[:, :2]
        if len(filled) > shortest and sides.mean(0).max() > smallest:
            result.append((int(times[0]), filled))
    return result


def smooth_track(boxes):
    """Boxes (n, 4) of one face -> half sides (n,) and centres (n, 2) as x, y, each the median of 13 frames."""
    sizes = (boxes[:, 2:] - boxes[:, :2]).max(1, keepdims=True) / 2
    values = np.concatenate([sizes, (boxes[:, :2] + boxes[:, 2:]) / 2], 1)
    padded = np.pad(values, ((6, 6), (0, 0)))       # zeros, as in the original: at both ends the smaller values win
    medians = np.median(np.lib.stride_tricks.sliding_window_view(padded, 13, axis=0), axis=-1)
    return medians[:, 0], medians[:, 1:]


def face_crop(frame, half, centre, share=0.4):
    """The crop on which the judge was trained: uint8 (3, h, w) -> uint8 (3, 224, 224), from `half` above the centre of
    the face to 1.8 * half below, and 1.4 * half to both sides; grey (110) where the picture ends."""
    margin = int(half * (1 + 2 * share)) + 1
    centre = np.clip(centre, 0, frame.shape[:0:-1])                         # of a track that leaves the picture
    padded = F.pad(frame, (margin,) * 4, value=110)
    x, y = centre[0] + margin, centre[1] + margin
    wide, low = half * (1 + share), half * (1 + 2 * share)
    crop = padded[:, int(y - half):int(y + low), int(x - wide):int(x + wide)]
    resized = F.interpolate(crop[None].float(), (224, 224), mode="bilinear", align_corners=False)
    return resized[0].round().clamp(0, 255).byte()


# ----------------------------------------------------------------------------------------------------------------------
# Loading

RENAMES = [     # fragment of an official key, of ours
    ("conv_shortcut", "nin_shortcut"), ("downsample_conv", "downsample"), ("attn.to_out.0", "proj"),
    ("attn.to_q", "q"), ("attn.to_k", "k"), ("attn.to_v", "v"), ("ff.net.0.proj", "ff_in"), ("ff.net.2", "ff_out"),
    ("conv_block.0", "conv"), ("conv_block.1", "norm"),                     # of the plain network
]
QKV = ("qkv", ("q", "k", "v"))
ORIGINAL_RENAMES = [("netcnnaud", "audio_convs"), ("netcnnlip", "lip_convs"), ("netfcaud", "audio_head"),
                    ("netfclip", "lip_head")]


def infer_config(state, path):
    """The Config of an official state dict. Widths and attention are read from its shapes; how much smaller a level
    becomes is in none: it is that of the entry of CONFIGS that has the same levels, else config= must be given."""
    if "visual_encoder.0.conv_block.0.weight" in state:
        key = lambda encoder, i: f"{encoder}_encoder.{i}.conv_block.0.weight"
        rows = lambda encoder: [len(state[key(encoder, i)]) for i in range(len(state)) if key(encoder, i) in state]
        plan = lambda levels: [level[0] for level in levels for _ in range(1 + level[4])]
        matches = [c for c in CONFIGS.values() if c.plain and rows("visual") == plan(c.visual) and
                   rows("audio") == plan(c.audio)]
    else:
        levels = {encoder: _levels_of(state, f"{encoder}_encoder.") for encoder in ("visual", "audio")}
        alike = lambda mine, level: (level[2], level[1] != 1) == mine[1:]
        matches = [replace(c, **{name: tuple((width, level[1], attention) for (width, attention, _), level in
                                             zip(found, getattr(c, name))) for name, found in levels.items()})
                   for c in CONFIGS.values()
                   if not c.plain and c.channels == state["visual_encoder.conv_in.weight"].shape[1]
                   and all(len(found) == len(getattr(c, name)) and all(map(alike, found, getattr(c, name)))
                           for name, found in levels.items())]
    if not matches:
        raise vq.CheckpointError(f"{path}: a SyncNet of unknown plan: how much its levels shrink the map is in no "
                                 "tensor; pass config=")
    return matches[0]


def _levels_of(state, encoder):
    """(width, attention, whether the map becomes smaller) of every level."""
    found, n = [], 0
    while f"{encoder}down_blocks.{n}.norm1.weight" in state:
        block = f"{encoder}down_blocks.{n}."
        if block + "conv1.weight" in state:
            found.append((len(state[block + "conv1.weight"]), False, block + "downsample_conv.weight" in state))
        elif found:                                                         # attention belongs to the level before it
            found[-1] = (found[-1][0], True, found[-1][2])
        n += 1
    return found


def load(path, config=None, dtype=torch.float32, device="cpu"):
    """A StableSyncNet or an OriginalSyncNet in eval mode, from a released file, a training checkpoint of LatentSync, or
    a file of ours. config: of a StableSyncNet, instead of the inferred one. Raises vq.CheckpointError."""
    state, saved = vq.read_checkpoint(path, nested=(("state_dict",),))
    if "netcnnlip.0.weight" in state:
        model = vq.build(OriginalSyncNet)
        vq.load_strict(model, vq.rename_keys(state, ORIGINAL_RENAMES), path, optional=_counters(model))
        return model.eval().to(device, dtype)
    plain = "visual_encoder.0.conv_block.0.weight" in state
    vq.require(state, *[] if plain else ["visual_encoder.conv_in.weight", "audio_encoder.conv_in.weight"], path=path,
               what="a SyncNet (stable_syncnet.pt, syncnet_v2.model, or one of train.py)")
    config = config or (vq.config_from_json(Config, saved, path) if saved else infer_config(state, path))
    model = vq.build(StableSyncNet, config)
    state = vq.join_rows(vq.rename_keys(state, RENAMES), *QKV)
    vq.load_strict(model, state, path, optional=_counters(model))
    return model.eval().to(device, dtype)


def _counters(model):
    """Batch norms count their batches; no result depends on it, and older files lack it."""
    return {name for name in model.state_dict() if name.endswith("num_batches_tracked")}


def export(model):
    """The official state dict, in float32."""
    state = {k: v.float().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    if isinstance(model, OriginalSyncNet):
        return vq.rename_keys(state, ORIGINAL_RENAMES, inverse=True)
    return vq.rename_keys(vq.split_rows(state, *QKV), RENAMES, inverse=True)


def save(model, path, dtype=None, **extra):
    """Writes a StableSyncNet as safetensors: official keys, config (and `extra`) in the header."""
    vq.save_checkpoint(path, export(model), model.config, dtype, **extra)
