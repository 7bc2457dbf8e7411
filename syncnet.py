"""SyncNet: does this mouth say this sound? This file defines two networks; blocks shared with tokenizers are in vq.py.

Both networks turn a short clip of a face into one vector and the sound of the same moment into another, and measure
how near the two are. The scores of one network cannot be compared with those of the other.

**StableSyncNet** (LatentSync, arXiv 2412.09262, section 3.3) supervises training: its gradient tells a generator how
to move the lips.

    16 frames of an aligned face, (B, 16, 3, 256, 256) in [-1, 1]         0.64 s of sound, 16 kHz
                  | frames side by side as channels, lower half             | mel spectrogram, 80 bands, 80 columns/s
    (B, 48, 128, 256)                                               (B, 1, 80, 52)
                  | visual encoder: residual blocks that each               | audio encoder: the same kind
                  | shrink the map, self-attention at 8x8 and 4x4           |
    (B, 2048, 1, 1) -> ReLU -> length 1                             (B, 2048, 1, 1) -> ReLU -> length 1
                  +------------------- cosine of the two, in [0, 1] -------------------+

The visual encoder sees the lower half of the face, because speech moves only mouth, chin and cheeks. Eyes and hair
would double the cost, and a generator that repaints the mouth cannot change them.

After a ReLU no number is negative, so neither is the cosine. It is taken as the probability that picture and sound
belong together, and trained by binary cross entropy. In half of the training pairs they do not: the frames come from
another moment of the same video, so that identity, light and microphone give nothing away.

The paper found what a SyncNet needs to converge. The loss soon falls to ln 2 = 0.69, which is the loss of the answer
"one half" to everything. It stays there for thousands of steps, or for ever, if batches are small, if sound
and picture of the training videos are out of step, if faces are not aligned, or if clips are short (too little to
hear) or long (too hard to start with). Large batches, clean data and 16 frames break the plateau; so does another
loss at the start (`loss_of_moments`). `train.py syncnet --study` shows this on a small scale, also for Wav2Lip's plain
convolutions.

**OriginalSyncNet** (Chung and Zisserman, "Out of time", 2016) is the judge of the lip-sync literature. It compares 5
frames with 0.2 s of MFCCs, and was trained so that vectors of matching pairs lie near each other. `score` slides it
over a video and shifts the sound by -15 ... 15 frames against the picture. Sync-D (LSE-D) is the smallest mean
distance over all shifts, Sync-C (LSE-C) the median minus the smallest, and the offset is where the smallest lies.
`score` also takes a StableSyncNet, whose distances lie between 0 and 1. Those of the original are Euclidean distances
between vectors of any length, and lie around 10.

Letters: B batch, F frames of a clip, N clips of a video, C width, H W height and width, D numbers of an embedding, S
shifts, n samples. Pictures come at 25 a second, sound at 16 kHz. Released weights: stable_syncnet.pt (401 M
parameters, repository ByteDance/LatentSync-1.6), syncnet_v2.model (13.6 M).

    model, original = syncnet.load("stable_syncnet.pt"), syncnet.load("syncnet_v2.model")
    mel = syncnet.mel_window(audio, frame, model.config.columns)    # sound of the clip that begins with that frame
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

FPS = 25
SAMPLE_RATE = 16000
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS                                      # 640


@dataclass(frozen=True)
class Config:
    """Sizes of a StableSyncNet. `visual` and `audio` hold one tuple per level of the encoder.

    A level is (width, factor, attention): it makes the map smaller by `factor`, a number or (height, width). In a
    plain network it is (width, kernel, stride, padding, residual blocks after it). The last width is D. The last map
    is 1 x 1.
    """

    visual: tuple
    audio: tuple
    frames: int = 16                            # F
    picture: tuple = (128, 256)                 # height, width that the visual encoder sees
    latent: bool = False                        # True: the input is the whole face's latent, 4 channels a frame
    plain: bool = False                         # Wav2Lip's convolutions and batch norms: the paper's ablation

    @property
    def channels(self):
        """Channels of the visual encoder's input."""
        return self.frames * (4 if self.latent else 3)

    @property
    def columns(self):
        """Columns of a clip's mel spectrogram: 3.2 per frame, rounded up."""
        return math.ceil(self.frames / 5 * 16)


def _levels(widths, factors, attention=()):
    """Levels with these widths and factors. attention: the numbers of the levels that have attention."""
    return tuple((width, factor, i in attention) for i, (width, factor) in enumerate(zip(widths, factors)))


_AUDIO = (32, 64, 128, 256, 512, 1024, 2048), ((2, 1), 2, 2, 1, 2, 2, (2, 3))
_VISUAL = (64, 128, 256, 256, 512, 1024, 2048, 2048), ((1, 2), 2, 2, 2, 2, 2, 2, 2)
CONFIGS = {
    "16_pixel_attn": Config(_levels(*_VISUAL, attention={4, 5}), _levels(*_AUDIO, attention={3, 4})),       # released
    "16_pixel": Config(_levels(*_VISUAL), _levels(*_AUDIO)),
    "16_latent": Config(_levels((64, 128, 256, 256, 512, 1024), (2, 2, 2, 1, 2, 2)),
                        _levels((32, 64, 128, 256, 512, 1024), ((2, 1), 2, 2, 2, 2, (2, 3))),
                        picture=(32, 32), latent=True),
    "25_pixel": Config(_levels((128, 128, 256, 256, 512, 512, 1024, 1024), ((1, 2), 2, 2, 2, 2, 2, 2, 2)),
                       _levels((64, 128, 256, 256, 512, 1024), (2, 2, 2, 2, 2, 2)), frames=25),
    "5_pixel_wav2lip": Config(
        ((32, 7, 1, 3, 0), (64, 5, (1, 2), 1, 2), (128, 3, 2, 1, 3), (256, 3, 3, 1, 2), (512, 3, 2, 1, 2),
         (1024, 3, 2, 1, 2), (1024, 3, 2, 1, 0), (1024, 3, 1, 0, 0), (1024, 1, 1, 0, 0)),
        ((32, 3, 1, 1, 2), (64, 3, (3, 1), 1, 2), (128, 3, 3, 1, 2), (256, 3, (3, 2), 1, 2), (512, 3, 1, 1, 2),
         (1024, 3, 1, 0, 0), (1024, 1, 1, 0, 0)), frames=5, plain=True),
    # trained in demo/
    "talking_head": Config(_levels((32, 32, 64, 96, 128, 256), ((1, 2), 2, 2, 2, 2, 2), {3}),
                           _levels((32, 32, 64, 96, 128, 256), ((2, 1), 2, 2, 2, 2, 2), {3}), picture=(32, 64)),
    "talking_head_plain": Config(
        ((32, 5, (1, 2), 2, 0), (32, 3, 2, 1, 1), (64, 3, 2, 1, 1), (96, 3, 2, 1, 1), (128, 3, 2, 1, 1),
         (128, 2, 1, 0, 0), (128, 1, 1, 0, 0)),
        ((32, 3, (2, 1), 1, 1), (32, 3, 2, 1, 1), (64, 3, 2, 1, 1), (96, 3, (2, 3), 1, 1), (128, 3, 2, 1, 1),
         (128, 3, 1, 0, 0), (128, 1, 1, 0, 0)), picture=(32, 64), plain=True),
}


# ----------------------------------------------------------------------------------------------------------------------
# Sound, as the networks receive it. It is computed in float64, as the authors do, and without gradient.


def windows(audio, size, hop, first, count, before=0):
    """Windows `first` ... `first + count - 1` of sound (n,) -> (count, size). Window i begins at sample i * hop -
    before.

    The sound is pre-emphasised, y[n] = x[n] - 0.97 x[n - 1], because the high frequencies of speech have little energy
    but carry much of its meaning. Beyond both ends the windows contain zeros. Only the samples they cover are read.
    """
    start = first * hop - before
    length = (count - 1) * hop + size
    low, high = max(start, 0), min(start + length, len(audio))
    piece = np.zeros(length)
    if high > low:
        before_low = audio[low - 1:low] if low else [0.0]
        x = np.concatenate([before_low, audio[low:high]]).astype(np.float64)
        piece[low - start:high - start] = x[1:] - 0.97 * x[:-1]
    return np.lib.stride_tricks.sliding_window_view(piece, size)[::hop]


MEL_WINDOW = 800                                                            # 0.05 s
MEL_HOP = 200                                                               # 80 columns a second, 3.2 a frame
MEL_FILTERS = vq.slaney_mels(80, 55.0, 7600.0, MEL_WINDOW, SAMPLE_RATE)
HANN = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(MEL_WINDOW) / MEL_WINDOW)


def mel_spectrogram(audio, first=0, columns=None):
    """The input of StableSyncNet: sound, an array (n,) in [-1, 1] -> tensor (80, columns) float32 in [-4, 4], from
    column `first` on.

    The whole spectrogram has 1 + n // 200 columns. Only the columns asked for are computed, and they have the same
    numbers as in the whole. Whisper's spectrogram differs: it has other windows, reflects the ends, and uses powers.
    """
    if columns is None:
        columns = 1 + len(audio) // MEL_HOP - first
    pieces = windows(audio, MEL_WINDOW, MEL_HOP, first, columns, before=MEL_WINDOW // 2)            # centred
    magnitude = np.abs(np.fft.rfft(pieces * HANN))
    level = 20 * np.log10(np.maximum(1e-5, magnitude @ MEL_FILTERS.T)) - 20         # dB, so that loud speech is near 0
    return torch.from_numpy(np.clip(8 * (level + 100) / 100 - 4, -4, 4).T.astype(np.float32))


def mel_start(frame):
    """The first column of the window that belongs to a clip from video frame `frame` on."""
    return int(80 * frame / FPS)                                            # truncated: 0, 3, 6, 9, 12, 16 ...


def mel_window(audio, frame, columns):
    """The window (80, columns) of a clip that begins at `frame`; None where the sound ends too soon."""
    first = mel_start(frame)
    if first + columns > 1 + len(audio) // MEL_HOP:
        return None
    return mel_spectrogram(audio, first, columns)


MFCC_WINDOW = 400                                                           # 25 ms
MFCC_HOP = 160                                                              # 100 columns a second, 4 a frame


def mfcc(audio, first=0, columns=None):
    """The input of the original SyncNet: sound, an array (n,) in int16's range -> tensor (13, columns), 100 a second.

    Mel-frequency cepstral coefficients as python_speech_features computes them: rectangular windows of 25 ms, 26
    bands. The first coefficient is the logarithm of the energy.
    """
    available = 1 + max(0, math.ceil((len(audio) - MFCC_WINDOW) / MFCC_HOP))
    if columns is None:
        columns = available - first
    power = np.abs(np.fft.rfft(windows(audio, MFCC_WINDOW, MFCC_HOP, first, columns), 512)) ** 2 / 512
    edges = np.linspace(0, 2595 * math.log10(1 + 8000 / 700), 28)           # in mel, up to half the sample rate
    edges = np.floor(513 * 700 * (10 ** (edges / 2595) - 1) / SAMPLE_RATE)
    f = np.arange(257)
    left, peak, right = (edges[i:26 + i, None] for i in range(3))
    rising = (f - left) / (peak - left)
    falling = (right - f) / (right - peak)
    bands = np.where((left <= f) & (f < peak), rising, np.where((peak <= f) & (f < right), falling, 0))
    bands = np.log(np.maximum(power @ bands.T, np.finfo(float).eps))        # (columns, 26)
    n, k = np.arange(26), np.arange(13)[:, None]
    dct = np.cos(np.pi * k * (2 * n + 1) / 52) * np.where(k == 0, (1 / 26) ** 0.5, (2 / 26) ** 0.5)
    cepstrum = bands @ dct.T * (1 + 11 * np.sin(np.pi * np.arange(13) / 22))        # liftering: higher ones weigh more
    cepstrum[:, 0] = np.log(np.maximum(power.sum(1), np.finfo(float).eps))
    return torch.from_numpy(cepstrum.T.astype(np.float32))


# ----------------------------------------------------------------------------------------------------------------------
# StableSyncNet: building blocks


class Shrink(nn.Conv2d):
    """A 3x3 convolution with stride `factor`, (height, width) or one number for both.

    A side with a factor above 1 is padded with a zero at its end only: n becomes (n - 2) // factor + 1, or half of n
    for factor 2. A side with factor 1 is padded at both ends and keeps its size.
    """

    def __init__(self, channels, factor):
        factor = (factor, factor) if isinstance(factor, int) else tuple(factor)
        super().__init__(channels, channels, 3, stride=factor)
        vertical, horizontal = factor
        self.margin = (int(horizontal == 1), 1, int(vertical == 1), 1)      # left, right, top, bottom

    def forward(self, x):
        return super().forward(F.pad(x, self.margin))


class ResBlock(vq.ResBlock):
    """The residual block of the tokenizers, followed by a Shrink unless the factor is 1."""

    def __init__(self, c_in, c_out, factor):
        super().__init__(c_in, c_out)
        self.downsample = Shrink(c_out, factor) if factor != 1 else None

    def forward(self, x):                                                   # (B, c_in, H, W) -> (B, c_out, H', W')
        x = super().forward(x)
        return x if self.downsample is None else self.downsample(x)


class Attention(nn.Module):
    """A transformer block over all places of a map, between two 1x1 convolutions, with a residual connection."""

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

    def forward(self, x):                                                   # (B, C, H, W)
        y = self.conv_in(vq.norm_silu(self.norm1, x, silu=False))
        y = rearrange(y, "b c h w -> b (h w) c")
        qkv = rearrange(self.qkv(self.norm2(y)), "b l (three h d) -> three b h l d", three=3, h=self.HEADS)
        y = y + self.proj(rearrange(F.scaled_dot_product_attention(*qkv), "b h l d -> b l (h d)"))
        value, gate = self.ff_in(self.norm3(y)).chunk(2, -1)
        y = y + self.ff_out(value * F.gelu(gate))                           # GEGLU
        return x + self.conv_out(rearrange(y, "b (h w) c -> b c h w", h=x.shape[2]))


class Encoder(nn.Module):
    """(B, c_in, H, W) -> (B, D): residual blocks, each followed by attention or not, down to a 1 x 1 map."""

    def __init__(self, c_in, levels):
        super().__init__()
        before = levels[0][0]
        self.conv_in = nn.Conv2d(c_in, before, 3, padding=1)
        self.down_blocks = nn.ModuleList()              # blocks of both kinds in one list, as in the released file
        for width, factor, attention in levels:
            self.down_blocks.append(ResBlock(before, width, factor))
            if attention:
                self.down_blocks.append(Attention(width))
            before = width
        self.norm_out = vq.group_norm(before)

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
        self.residual = residual
        self.slope = slope

    def forward(self, x):
        y = self.norm(self.conv(x))
        return F.leaky_relu(y + x if self.residual else y, self.slope)


class PlainEncoder(nn.Sequential):
    """Wav2Lip's encoder: convolutions one after the other. (B, c_in, H, W) -> (B, D).

    The last `relus` blocks have a ReLU, as in LatentSync's copy; the others have a leaky one. The last block needs the
    ReLU so that embeddings are not negative.
    """

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
    """Aligned faces, uint8 (n, 3, h, w) -> their lower halves, uint8 (n, 3, H, W), after a bicubic resize to a square.
    Pictures that already have the size of a half are returned as they are."""
    height, width = config.picture
    if faces.shape[2:] == (height, width):
        return faces
    if faces.shape[2:] != (width, width):
        faces = F.interpolate(faces.float(), (width, width), mode="bicubic", antialias=True)
        faces = faces.round().clamp(0, 255).byte()
    return faces[:, :, -height:]                                            # rows 128 .. 255 of 256


class StableSyncNet(nn.Module):
    """Two encoders, and the cosine of their embeddings."""

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
        [-1, 1]. Channels: rgb of frame 0, of frame 1 ... For a config with `latent` the caller makes the input:
        (B, 4F, 32, 32), latents of whole faces times 0.18215."""
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
        """Probability (B,) that they belong together. Gradients reach the frames, which supervises a generator."""
        cosine = (self.embed_frames(frames) * self.embed_audio(mel)).sum(1)
        return cosine.clamp(0, 1)                                           # rounding can make it 1.0000001

    def loss(self, frames, mel, label):
        """(binary cross entropy, {"accuracy"}); label (B,): 1 where they belong together, else 0."""
        cosine = self(frames, mel)
        with torch.autocast(cosine.device.type, enabled=False):             # it is not safe in half precision
            loss = F.binary_cross_entropy(cosine, label.float())
        return loss, {"accuracy": ((cosine > 0.5) == (label > 0.5)).float().mean()}

    def loss_of_moments(self, frames, mel, contrast=False):
        """(loss, {"accuracy"}) of B videos at K moments each, frames (B, K, 3F, H, W) and mel (B, K, 1, 80, columns).

        A harder task than the paper's, for small machines. All K * K pairs of a video count, so each encoding serves
        K times. The K matching pairs weigh as much as all others together.

        contrast: for the first steps, replace the cross entropy of each pair by InfoNCE: find each clip's sound among
        the K of its video, and the other way round. Binary cross entropy first makes all cosines one half, which is
        optimal as long as nothing is known, but also removes the differences that the encoders had: the plateau.
        InfoNCE depends on differences only.
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
                weight = torch.where(match > 0, 0.5 * K, 0.5 * K / (K - 1))         # weight of a pair, 1 on average
                loss = F.binary_cross_entropy(cosine, match, weight)
        right = ((cosine > 0.5) == (match > 0.5)).float()
        of_matching = (right * match).sum() / K                             # both summed over the B videos
        of_others = (right * (1 - match)).sum() / (K * K - K)
        return loss, {"accuracy": (of_matching + of_others) / (2 * B)}

    # `score` uses the next six members; OriginalSyncNet has them too.

    @property
    def frames(self):
        """F, the frames of a clip."""
        return self.config.frames

    SPARE = 0                                                               # frames that have to follow a clip
    PADDING = math.nan                                                      # shifts beyond the ends do not count

    def embed_clips(self, faces):
        """All clips of successive faces, uint8 (N + F - 1, 3, h, w) -> (N, D)."""
        halves = lower_halves(faces, self.config)                           # each frame is in F clips, but resized once
        clips = rearrange(halves.unfold(0, self.frames, 1), "n c h w f -> n f c h w")
        return self.embed_frames(self.prepare(clips))

    def embed_sound(self, audio, first, count):
        """Embeddings (at most count, D) of the sound (n,) of the clips from `first` on; fewer where the sound ends."""
        like = next(self.parameters())
        columns = self.config.columns
        available = 1 + len(audio) // MEL_HOP
        starts = [mel_start(i) for i in range(first, first + count)]
        starts = [start for start in starts if start + columns <= available]
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
        """PyTorch's default, which the authors use too, drawn from `generator`."""
        vq.init_default(self, generator)


# ----------------------------------------------------------------------------------------------------------------------
# The original SyncNet


def _conv2d(c_in, c_out, kernel, stride=1, padding=0):
    return nn.Conv2d(c_in, c_out, kernel, stride, padding), nn.BatchNorm2d(c_out), nn.ReLU()


def _conv3d(c_in, c_out, kernel, stride=1, padding=0):
    return nn.Conv3d(c_in, c_out, kernel, stride, padding), nn.BatchNorm3d(c_out), nn.ReLU()


def _head():
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 1024))


class OriginalSyncNet(nn.Module):
    """The judge: 5 frames of a face crop, 224 x 224, and 20 columns of MFCCs -> 1024 numbers each. Evaluation only."""

    SPARE = 1                                                               # the original leaves the last clip out
    PADDING = 0.0                                                           # it compares with zeros beyond the ends
    frames = 5
    CLIP_SAMPLES = 5 * SAMPLES_PER_FRAME                                    # 3200, 0.2 s

    def __init__(self):
        super().__init__()
        self.audio_convs = nn.Sequential(
            *_conv2d(1, 64, 3, padding=1), nn.MaxPool2d(1, 1),              # no effect, but file keys count it
            *_conv2d(64, 192, 3, padding=1), nn.MaxPool2d(3, (1, 2)),
            *_conv2d(192, 384, 3, padding=1),
            *_conv2d(384, 256, 3, padding=1),
            *_conv2d(256, 256, 3, padding=1), nn.MaxPool2d(3, 2),
            *_conv2d(256, 512, (5, 4)))
        self.lip_convs = nn.Sequential(
            *_conv3d(3, 96, (5, 7, 7), (1, 2, 2)), nn.MaxPool3d((1, 3, 3), (1, 2, 2)),          # joins the 5 frames
            *_conv3d(96, 256, (1, 5, 5), (1, 2, 2), (0, 1, 1)), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            *_conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1)),
            *_conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1)),
            *_conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1)), nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_conv3d(256, 512, (1, 6, 6)))
        self.audio_head = _head()
        self.lip_head = _head()

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
        clips = faces.flip(1).unfold(0, 5, 1)                               # blue first, (n, c, h, w, 5)
        return self.embed_frames(rearrange(clips, "n c h w f -> n c f h w"))

    def embed_sound(self, audio, first, count):
        """Embeddings (at most count, 1024) of the sound (n,) in [-1, 1] of the clips from `first` on. As in the
        original, the last clips of the sound have none."""
        like = next(self.parameters())
        count = min(count, len(audio) // SAMPLES_PER_FRAME - 5 - first)
        if count <= 0:
            return like.new_zeros(0, 1024)
        start = SAMPLES_PER_FRAME * first
        end = SAMPLES_PER_FRAME * (first + count) + self.CLIP_SAMPLES
        low = max(0, start - MFCC_HOP)                  # pre-emphasis of the first sample needs the one before it
        samples = np.round(np.asarray(audio[low:end], np.float64) * 32768).clip(-32768, 32767)
        columns = mfcc(samples, (start - low) // MFCC_HOP, 4 * count + 16)          # 4 columns a frame, windows of 20
        pieces = columns.unfold(1, 20, 4).transpose(0, 1)                   # (count, 13, 20)
        return self.embed_audio(pieces[:, None].to(like))

    @staticmethod
    def distance(vision, audio):
        """Euclidean, over the last axis."""
        return (vision - audio + 1e-6).norm(dim=-1)                         # F.pairwise_distance, that eps included


# ----------------------------------------------------------------------------------------------------------------------
# Scoring a video

Score = namedtuple("Score", "offset confidence distance curve clips")
Score.__doc__ = """How well lips and sound fit. offset: in frames; positive if the sound comes too early. confidence
(Sync-C): the median of the curve minus its minimum. distance (Sync-D): the minimum. curve (S,): mean distance over
all clips for each shift k = -15 ... 15, which compares a clip with the sound k frames later; the offset is -k at the
minimum. clips: their number."""


def best_shift(curve, clips=0):
    """A Score from a curve (S,) of mean distances. Shifts that are nan do not count."""
    distance, k = torch.where(curve.isnan(), math.inf, curve).min(0)
    return Score(len(curve) // 2 - int(k), float(curve.nanmedian() - distance), float(distance), curve, clips)


def embed_video(model, frames, audio, batch_size=16):
    """Yields (vision, sound, at_end) of up to `batch_size` successive clips at a time: their embeddings, both (n, D).

    Arguments are those of `score`. at_end: the video or the sound ends with this batch, which may be empty.
    """
    device = next(model.parameters()).device
    frames = iter(frames)
    overlap = model.frames - 1 + model.SPARE                                # frames shared with the next batch
    held = []                                                               # frames
    first = 0                                                               # number of the first clip in them
    at_end = False
    while not at_end:
        held += islice(frames, batch_size + overlap - len(held))
        n = max(0, len(held) - overlap)
        sound = model.embed_sound(audio, first, n)
        vision = sound[:0]                                                      # none, of the right width
        if len(sound):
            vision = model.embed_clips(torch.stack(held[:len(sound) + model.frames - 1]).to(device))
        at_end = n < batch_size or len(sound) < n
        yield vision, sound, at_end
        held = held[n:]
        first += n


@torch.no_grad()
def score(model, frames, audio, max_shift=15, batch_size=16):
    """How well the lips of one face fit the sound -> Score.

    model: a StableSyncNet, for aligned faces, or the OriginalSyncNet, for crops by lib.tracks.face_crop. frames:
    faces at 25 frames a second, uint8 (3, h, w), all of one size, in any iterable; the frames of `batch_size` clips
    are held at a time. audio: an array (n,) in [-1, 1] at 16 kHz that begins with the first frame; what is longer
    than the video is ignored. Shifts for which half of the clips or more have no sound are nan, unless the model
    compares with zeros there (`PADDING`). Raises ValueError if video or sound is shorter than one clip.
    """
    shifts = 2 * max_shift + 1
    total = torch.zeros(shifts, dtype=torch.float64)                        # on the CPU: mps has no float64
    count = torch.zeros(shifts, dtype=torch.float64)
    clips = 0
    vision = sound = None                       # embeddings of clips whose neighbours are yet to come
    for new_vision, new_sound, at_end in embed_video(model, frames, audio, batch_size):
        clips += len(new_sound)
        if vision is None:                                                  # before the first clip there is no sound
            new_sound = F.pad(new_sound, (0, 0, max_shift, 0), value=model.PADDING)
        vision = new_vision if vision is None else torch.cat([vision, new_vision])
        sound = new_sound if sound is None else torch.cat([sound, new_sound])
        if at_end:
            sound = F.pad(sound, (0, 0, 0, max_shift), value=model.PADDING)
        if len(sound) < shifts:
            continue
        near = sound.unfold(0, shifts, 1).transpose(1, 2)                   # (n, S, D): the sounds around n clips
        distances = model.distance(vision[:len(near), None], near).cpu().double()
        total += distances.nansum(0)
        count += (~distances.isnan()).sum(0)
        vision, sound = vision[len(near):], sound[len(near):]
    if not clips:
        raise ValueError(f"expected at least {model.frames + model.SPARE} frames of video and as much sound")
    common = count * 2 > clips                                              # shifts that most clips allow
    return best_shift(torch.where(common, total / count, math.nan).float(), clips)


def combine(scores):
    """(offset, confidence, distance) of several faces: means, as LatentSync's authors do. The offset is truncated."""
    offset, confidence, distance = (sum(score[i] for score in scores) / len(scores) for i in range(3))
    return int(offset), confidence, distance


# ----------------------------------------------------------------------------------------------------------------------
# Loading

RENAMES = [     # fragment of an official key, of ours
    ("conv_shortcut", "nin_shortcut"), ("downsample_conv", "downsample"), ("attn.to_out.0", "proj"),
    ("attn.to_q", "q"), ("attn.to_k", "k"), ("attn.to_v", "v"), ("ff.net.0.proj", "ff_in"), ("ff.net.2", "ff_out"),
    ("conv_block.0", "conv"), ("conv_block.1", "norm"),                     # keys of the plain network
]
QKV = ("qkv", ("q", "k", "v"))
ORIGINAL_RENAMES = [("netcnnaud", "audio_convs"), ("netcnnlip", "lip_convs"), ("netfcaud", "audio_head"),
                    ("netfclip", "lip_head")]
PLAIN_MARK = "visual_encoder.0.conv_block.0.weight"                         # a key that only plain networks have


def infer_config(state, path):
    """The Config of an official state dict.

    Widths and attention are read from shapes. No tensor holds the factor by which a level shrinks its map: it is taken
    from the first entry of CONFIGS with the same levels. Raises vq.CheckpointError if there is none.
    """
    if PLAIN_MARK in state:
        visual, audio = _plain_widths(state, "visual"), _plain_widths(state, "audio")
        for config in CONFIGS.values():
            if config.plain and visual == _planned_widths(config.visual) and audio == _planned_widths(config.audio):
                return config
    else:
        visual, audio = _levels_of(state, "visual"), _levels_of(state, "audio")
        channels = state["visual_encoder.conv_in.weight"].shape[1]
        for config in CONFIGS.values():
            if config.plain or config.channels != channels:
                continue
            if _same_plan(visual, config.visual) and _same_plan(audio, config.audio):
                return replace(config, visual=_with_factors(visual, config.visual),
                               audio=_with_factors(audio, config.audio))
    raise vq.CheckpointError(f"{path}: a SyncNet of unknown plan: how much its levels shrink the map is in no "
                             "tensor, but syncnet.load takes it in a config=")


def _plain_widths(state, encoder):
    """Widths of the convolutions of a plain encoder in a file."""
    widths = []
    while (key := f"{encoder}_encoder.{len(widths)}.conv_block.0.weight") in state:
        widths.append(len(state[key]))
    return widths


def _planned_widths(levels):
    """Widths of the convolutions of a plain encoder with these levels."""
    widths = []
    for width, _, _, _, more in levels:
        widths += [width] * (1 + more)
    return widths


def _levels_of(state, encoder):
    """[(width, attention, whether the map becomes smaller)] of the levels of an encoder in a file."""
    levels = []
    n = 0
    while f"{encoder}_encoder.down_blocks.{n}.norm1.weight" in state:
        block = f"{encoder}_encoder.down_blocks.{n}."
        if block + "conv1.weight" in state:
            levels.append((len(state[block + "conv1.weight"]), False, block + "downsample_conv.weight" in state))
        elif levels:                                                        # attention belongs to the level before it
            width, _, shrinks = levels[-1]
            levels[-1] = (width, True, shrinks)
        n += 1
    return levels


def _same_plan(found, levels):
    """Whether levels of a file attend and shrink where those of a Config do."""
    planned = [(attention, factor != 1) for _, factor, attention in levels]
    return [(attention, shrinks) for _, attention, shrinks in found] == planned


def _with_factors(found, levels):
    """The levels found in a file in the form of a Config, with the factors of `levels`."""
    return tuple((width, factor, attention) for (width, attention, _), (_, factor, _) in zip(found, levels))


def load(path, config=None, dtype=torch.float32, device="cpu", weights=None):
    """A StableSyncNet or an OriginalSyncNet in eval mode, from a released file, a training checkpoint of LatentSync,
    or a file of ours. config: of a StableSyncNet, used instead of the inferred one. weights: see vq.read_checkpoint.
    Raises vq.CheckpointError."""
    what = "a SyncNet (stable_syncnet.pt, syncnet_v2.model, or one of train.py)"
    state, header = vq.read_checkpoint(path, weights=weights)
    if "netcnnlip.0.weight" in state:
        model = vq.build(OriginalSyncNet)
        vq.load_strict(model, vq.rename_keys(state, ORIGINAL_RENAMES), path, optional=_counters(model))
        return model.eval().to(device, dtype)
    if PLAIN_MARK not in state:
        vq.require(state, "visual_encoder.conv_in.weight", "audio_encoder.conv_in.weight", path=path, what=what)
    with vq.understanding(path, what):
        if config is None:
            config = vq.read_config(Config, header, path, lambda: infer_config(state, path))
        state = vq.join_rows(vq.rename_keys(state, RENAMES), *QKV)
        sketch = vq.on_meta(StableSyncNet, config)
        vq.check_fit(sketch, state, path, optional=_counters(sketch))
        model = vq.build(StableSyncNet, config)
        vq.load_strict(model, state, path, optional=_counters(model))
    model.origin = header.origin
    return model.eval().to(device, dtype)


def _counters(model):
    """Keys under which batch norms count their batches. No result depends on them, and older files lack them."""
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
