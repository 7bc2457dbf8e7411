"""Synthetic talking heads that need no data: faces drawn from a seed, whose lips follow speech from the same plan."""
import functools
from typing import NamedTuple

import numpy as np
import torch

from syncnet import FPS, SAMPLE_RATE

# Columns: the formants F1, F2, F3 in Hz; the level of the voice and of the noise, and the frequency of the noise in Hz;
# then the mouth: how far it is open, its width (-1 rounded .. 1 spread), and how much of the teeth is visible.
PHONES = {
    "a": (800, 1250, 2550, 1.0, 0.0, 0, 1.0, 0.1, 0.3), "e": (550, 1900, 2600, 0.75, 0.0, 0, 0.55, 0.7, 0.5),
    "i": (300, 2300, 3000, 0.5, 0.0, 0, 0.25, 1.0, 0.7), "o": (500, 900, 2500, 0.8, 0.0, 0, 0.6, -0.8, 0.0),
    "u": (320, 750, 2300, 0.45, 0.0, 0, 0.22, -1.0, 0.0), "schwa": (500, 1500, 2500, 0.6, 0.0, 0, 0.4, 0.0, 0.2),
    "m": (250, 1000, 2200, 0.15, 0.0, 0, 0.0, 0.0, 0.0), "n": (250, 1600, 2600, 0.25, 0.0, 0, 0.2, 0.2, 0.5),
    "l": (360, 1300, 2700, 0.45, 0.0, 0, 0.35, 0.1, 0.3), "p": (400, 900, 2300, 0.0, 0.0, 0, 0.0, 0.0, 0.0),
    "b": (250, 900, 2300, 0.05, 0.0, 0, 0.0, 0.0, 0.0), "t": (400, 1700, 2600, 0.0, 0.1, 4500, 0.15, 0.3, 0.7),
    "k": (400, 1900, 2500, 0.0, 0.1, 2500, 0.3, 0.1, 0.1), "s": (350, 1700, 2600, 0.0, 0.5, 6000, 0.12, 0.6, 1.0),
    "sh": (350, 1700, 2600, 0.0, 0.6, 3000, 0.2, -0.6, 0.9), "f": (350, 1100, 2400, 0.0, 0.25, 7000, 0.08, 0.2, 1.0),
    "pause": (500, 1500, 2500, 0.0, 0.0, 0, 0.0, 0.0, 0.0),
}
VOWELS = ("a", "e", "i", "o", "u", "schwa")
CONSONANTS = ("m", "p", "b") * 2 + ("n", "l", "t", "k", "s", "sh", "f")                 # half of them close the lips
RATE = 200                                                                  # rows of a plan per second


def smooth(track, width):
    """Smooth a track (T, ...) with a Gaussian-like window of `width` rows; mouths do not jump between positions."""
    n = max(3, int(width) | 1)
    window = np.hanning(n + 2)[1:-1]
    padded = np.pad(track, [(n // 2, n // 2)] + [(0, 0)] * (track.ndim - 1), mode="edge")
    return np.tensordot(np.lib.stride_tricks.sliding_window_view(padded, n, axis=0), window / window.sum(), 1)


def speech_plan(rng, seconds):
    """Random syllables as smoothed rows of PHONES, RATE rows a second -> (T, 9)."""
    rows = []
    tempo = rng.uniform(0.75, 1.35)

    def length(low, high):
        return int(rng.uniform(low, high) / tempo * RATE)
    while len(rows) < seconds * RATE:
        if rng.random() < 0.4:
            rows += [PHONES["pause"]] * length(0.08, 0.35)
        for _ in range(rng.integers(1, 4)):                                 # the syllables of a word
            stress = np.ones(9)
            stress[[3, 4, 6]] = rng.uniform(0.5, 1.2)                       # louder syllables open the mouth wider
            if rng.random() < 0.85:
                rows += [PHONES[rng.choice(CONSONANTS)]] * length(0.06, 0.13)
            rows += [PHONES[rng.choice(VOWELS)] * stress] * length(0.06, 0.28)
            if rng.random() < 0.3:
                rows += [PHONES[rng.choice(CONSONANTS)]] * length(0.06, 0.13)
    plan = np.array(rows[:int(seconds * RATE)], float)
    plan[:, :3] = smooth(plan[:, :3], 0.06 * RATE)                          # formants move for 60 ms,
    plan[:, 3:6] = smooth(plan[:, 3:6], 0.025 * RATE)                       # levels for 25 ms,
    plan[:, 6:] = smooth(plan[:, 6:], 0.08 * RATE)                          # the mouth for 80 ms
    return plan


def synthesize(rng, plan):
    """Sound (T * 16000 / RATE,) in [-1, 1] of a plan: pulses of the vocal folds, and noise, go through filters that
    follow the plan (source-filter model)."""
    hop = SAMPLE_RATE // RATE
    T = len(plan)
    n = T * hop
    frame = 4 * hop
    n_fft = 512
    pitch = rng.uniform(85, 240) * (1 + 0.25 * smooth(rng.standard_normal(T), 0.5 * RATE)) * np.linspace(1.05, 0.95, T)
    phase = np.cumsum(np.repeat(pitch, hop)) / SAMPLE_RATE
    pulses = np.diff(np.floor(phase), prepend=0.0) * np.sqrt(np.repeat(1 / pitch, hop))
    f = np.arange(n_fft // 2 + 1) * SAMPLE_RATE / n_fft
    tract = rng.uniform(0.87, 1.15)                                         # a longer vocal tract has lower formants
    voice = 1 / (1 + (f / rng.uniform(250, 700)) ** 1.2) * np.ones((T, 1))
    formants = [*(plan[:, :3] * tract).T, np.full(T, 3600 * tract)]         # a fourth one does not move
    for formant, bandwidth in zip(formants, (80, 110, 160, 250)):
        F = formant[:, None]
        B = bandwidth / 2
        voice *= (F**2 + B**2) / np.sqrt(((f - F) ** 2 + B**2) * ((f + F) ** 2 + B**2))
    hiss = np.exp(-0.5 * ((f - np.maximum(plan[:, 5:6], 1500) * tract) / 1200) ** 2)
    window = np.hanning(frame + 1)[:-1]
    out = np.zeros((T + n_fft // hop + 1, hop))
    for source, filters in ((pulses * 30, voice * plan[:, 3:4]), (rng.standard_normal(n) * 0.3, hiss * plan[:, 4:5])):
        pieces = np.lib.stride_tricks.sliding_window_view(np.pad(source, (frame // 2, frame)), frame)[:n:hop]
        pieces = np.fft.irfft(np.fft.rfft(pieces * window, n_fft) * filters)
        pieces = np.pad(pieces, ((0, 0), (0, -n_fft % hop))).reshape(T, -1, hop)
        for k in range(pieces.shape[1]):                                    # overlap and add
            out[k:k + T] += pieces[:, k]
    sound = out.flatten()[frame // 2:][:n]
    sound *= rng.uniform(0.02, 0.15) / (np.sqrt(np.mean(sound**2)) + 1e-6)
    room_noise = smooth(rng.standard_normal(n), rng.choice([3, 5, 11])) * np.std(sound)
    return np.clip(sound + room_noise * rng.uniform(0.02, 0.2), -1, 1).astype(np.float32)


class Canvas:
    """Pictures (T, 3, h, w) in [0, 1] to paint ellipses on, in coordinates -1 .. 1 of a face that moves."""

    WIDE = 1.45                                 # width / height of a circle on an aligned face
    STRETCH = 70 / 52                           # the part of WIDE that comes from alignment

    def __init__(self, pose, size, rows, aligned=True):
        """pose: (T, 4), shift in x and y, angle, scale. rows: number of rows to draw, at the bottom of the square.
        aligned: stretched to a square, as aligned faces are; otherwise as a camera sees it."""
        centres = (torch.arange(size) + 0.5) * 2 / size - 1                 # centres of the pixels
        y, x = torch.meshgrid(centres[-rows:], centres, indexing="ij")
        dx, dy, angle, scale = (pose[:, i, None, None] for i in range(4))
        x = (x - dx) / scale / (self.WIDE if aligned else 1)
        y = (y - dy) / scale
        self.x = x * angle.cos() + y * angle.sin()
        self.y = y * angle.cos() - x * angle.sin()
        if not aligned:
            self.x = self.x / self.WIDE * self.STRETCH
        self.pixel = 2 / size
        self.top = float(self.y.min())
        self.picture = torch.zeros(len(pose), 3, rows, size)

    def ellipse(self, x, y, a, b, sharp=1.0):
        """Coverage (T, h, w) of an ellipse around (x, y) with half axes a, b, each a number or (T,).

        None if the ellipse ends above the rows that are drawn.
        """
        if self.top > np.max(y + (1 + 0.5 / sharp) * b):
            return None
        x, y, a, b = (torch.as_tensor(v, dtype=torch.float32).reshape(-1, 1, 1) for v in (x, y, a, b))
        rim = 1 - (((self.x - x) / a) ** 2 + ((self.y - y) / b) ** 2).sqrt()        # 0 at the rim, 1 in the middle
        return (0.5 + rim * torch.minimum(a, b) / self.pixel * sharp).clamp(0, 1)

    def paint(self, coverage, color, opacity=1.0):
        """Blend a color (3,) over the covered part."""
        if coverage is not None:
            color = torch.as_tensor(color, dtype=torch.float32).view(3, 1, 1)
            self.picture += (coverage * opacity)[:, None] * (color - self.picture)


def draw_head(rng, mouth, pose, size, rows, aligned=True):
    """A random face that speaks: mouth (T, 3) open, wide, teeth; pose (T, 4) -> uint8 (T, 3, rows, size).

    rows = size draws the whole face. An aligned face has brows and nose at 1/5 and 2/5 of its height, as
    latentsync.Aligner places them.
    """
    T = len(mouth)
    canvas = Canvas(pose, size, rows, aligned)
    uniform = rng.uniform
    opening, wide, teeth = mouth.T                                          # (T,) each
    skin = np.array([[0.96, 0.80, 0.69], [0.87, 0.67, 0.53], [0.71, 0.49, 0.36], [0.55, 0.37, 0.27]])[rng.integers(4)]
    skin = np.clip(skin + uniform(-0.06, 0.06, 3), 0.1, 1)
    lips = np.clip(skin * [uniform(0.8, 1.0), uniform(0.5, 0.75), uniform(0.55, 0.8)], 0, 1)
    hair = uniform(0.05, 0.6) * uniform(0.4, 1, 3)
    shirt, wall, other = uniform(0, 1, (3, 3))
    # Wall, shoulders, hair, head. The chin falls as the mouth opens.
    canvas.picture += torch.as_tensor(wall, dtype=torch.float32).view(3, 1, 1)
    canvas.paint(((canvas.x * uniform(-1, 1) + canvas.y * uniform(-1, 1)) * 0.5 + 0.5).clamp(0, 1), other)
    for _ in range(3):
        canvas.paint(canvas.ellipse(*uniform(-1.2, 1.2, 2), *uniform(0.1, 0.5, 2), sharp=0.3), uniform(0, 1, 3), 0.7)
    width = uniform(0.66, 0.8)
    chin = uniform(0.88, 0.98)
    canvas.paint(canvas.ellipse(0, 1.45, 1.15, 0.5), shirt)
    canvas.paint(canvas.ellipse(0, 0.95, 0.36, 0.4), skin * 0.8)
    canvas.paint(canvas.ellipse(0, -0.35, width * uniform(1.05, 1.3), uniform(0.8, 1.0)), hair)
    fallen = torch.as_tensor(chin + 0.09 * opening).float()[:, None, None]
    lowest = torch.where(canvas.y > 0, fallen, torch.tensor(0.98))
    rim = 1 - ((canvas.x / width) ** 2 + (canvas.y / lowest) ** 2).sqrt()
    head = (0.5 + rim * width / canvas.pixel).clamp(0, 1)
    canvas.paint(head, skin)
    side = uniform(-0.35, 0.35)                                             # direction of the light
    above = uniform(-0.25, 0.05)
    canvas.picture *= (1 + head * (canvas.x * side + canvas.y * above))[:, None]
    if rng.random() < 0.3:                                                  # a beard
        canvas.paint(canvas.ellipse(0, 0.55, width * 0.75, 0.5, sharp=0.4) * head * uniform(0.2, 0.7), hair)
    # Eyes that blink, brows, nose, cheeks.
    blink = np.ones(T)
    for start in rng.integers(0, T, 1 + T // 60):
        blink[start:start + 4] = 0.15
    apart = uniform(0.28, 0.36)
    iris = uniform(0.1, 0.6, 3)
    for sign in (-1, 1):
        canvas.paint(canvas.ellipse(sign * apart, -0.42, 0.13, 0.07 * blink), np.ones(3) * 0.95)
        canvas.paint(canvas.ellipse(sign * apart, -0.42, 0.06, 0.065 * blink), iris)
        canvas.paint(canvas.ellipse(sign * apart, -0.6, 0.17, uniform(0.02, 0.05)), hair * 0.8)
        canvas.paint(canvas.ellipse(sign * 0.4, 0.08, 0.2, 0.16, sharp=0.1), lips, uniform(0, 0.4))
    nose = uniform(0.07, 0.12)
    canvas.paint(canvas.ellipse(0, -0.22, nose, 0.16, sharp=0.2), np.ones(3), 0.25)
    canvas.paint(canvas.ellipse(0, -0.06, nose * 1.5, 0.05, sharp=0.4), skin * 0.6, 0.5)
    # Mouth: lips, between them the dark inside with teeth and tongue. The lower lip moves more than the upper one.
    half = uniform(0.26, 0.34)
    thick = uniform(0.05, 0.08)
    deep = uniform(0.24, 0.32)
    a = half * (1 + 0.25 * wide) * (1 - 0.12 * opening)
    gap = 0.012 + deep * opening
    y = uniform(0.30, 0.40) + 0.5 * gap
    canvas.paint(canvas.ellipse(0, y, a + 0.03, gap + thick), lips)
    inside = canvas.ellipse(0, y, a, gap)
    canvas.paint(inside, np.array([0.12, 0.03, 0.04]))
    canvas.paint(inside * canvas.ellipse(0, y + 0.9 * gap, a * 0.6, gap * 0.7), np.array([0.75, 0.3, 0.32]), 0.8)
    upper = (0.5 + (torch.as_tensor(y - 0.3 * gap).float()[:, None, None] - canvas.y) / canvas.pixel).clamp(0, 1)
    shown = torch.as_tensor(np.maximum(teeth, 0.6 * opening).clip(0, 1)).float()[:, None, None]
    canvas.paint(inside * upper, np.ones(3) * 0.93, 0.9 * shown)
    flicker = 1 + 0.02 * torch.from_numpy(smooth(rng.standard_normal(T), 9)).float()
    canvas.picture *= (flicker * uniform(0.7, 1.1))[:, None, None, None]
    grain = torch.randn(canvas.picture.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31))))
    return canvas.picture.add_(grain, alpha=uniform(0.005, 0.015)).mul_(255).round_().clamp_(0, 255).byte()


class Voice(NamedTuple):
    """What a synthetic person says, before the picture is drawn."""

    rng: np.random.Generator                    # for the picture
    plan: np.ndarray                            # (RATE * seconds, 9), see PHONES
    drift: np.ndarray                           # (25 * seconds, 4), slow movement of the head
    sound: np.ndarray                           # (16000 * seconds,)


def speech(seed, seconds=4.8):
    """The Voice of a synthetic person, a function of the seed alone."""
    rng = np.random.default_rng(seed)
    plan = speech_plan(rng, seconds)
    times = frame_times(len(plan))
    drift = smooth(rng.standard_normal((len(plan), 4)), 0.6 * RATE) * 6     # standard deviation of about 1
    drift = (drift + rng.standard_normal(4) * 0.5)[times.astype(int)].clip(-2, 2)
    return Voice(rng, plan, drift, synthesize(rng, plan))


def frame_times(length):
    """The middle of every frame, in rows of a plan of this length."""
    return (np.arange(length * FPS // RATE) + 0.5) / FPS * RATE


@functools.lru_cache(maxsize=4096)
def talking_head(seed, seconds=4.8, size=64, rows=None, unaligned=False):
    """A random person who says random syllables, a function of the seed alone.

    Returns frames uint8 (25 * seconds, 3, rows or size, size) and sound (16000 * seconds,). Both come from one plan, so
    they are exactly in sync. unaligned: head and camera move, as in a video whose faces were not aligned.
    """
    voice = speech(seed, seconds)
    reach = np.array([0.3, 0.3, 0.35, 0.15] if unaligned else [0.02, 0.02, 0.03, 0.02])
    pose = torch.from_numpy(voice.drift * reach + [0, 0, 0, 1]).float()
    return draw_head(voice.rng, mouth_of(voice.plan), pose, size, rows or size), voice.sound


def mouth_of(plan):
    """(frames, 3): open, wide, teeth in the middle of every frame."""
    rows = np.arange(len(plan)) + 0.5
    return np.stack([np.interp(frame_times(len(plan)), rows, plan[:, 6 + i]) for i in range(3)], 1)


def talking_scene(seed, seconds, size=128):
    """A talking head as a camera sees it: small and moving -> frames uint8 (T, 3, size, size), sound, points.

    points: (T, 3, 2), brows and nose in pixels, for latentsync.Aligner.
    """
    voice = speech(seed, seconds)
    pose = voice.drift * [0.09, 0.06, 0.1, 0.02] + [0, 0.1, 0, 0.55]
    face = np.array([(-0.361, -0.586), (0.4, -0.586), (0.02, -0.186)]) * [Canvas.WIDE / Canvas.STRETCH, 1]
    dx, dy, angle, scale = pose.T[:, :, None]
    x = (face[:, 0] * np.cos(angle) - face[:, 1] * np.sin(angle)) * scale + dx      # (T, 3)
    y = (face[:, 0] * np.sin(angle) + face[:, 1] * np.cos(angle)) * scale + dy
    points = (np.stack([x, y], -1) + 1) * size / 2 - 0.5
    frames = draw_head(voice.rng, mouth_of(voice.plan), torch.from_numpy(pose).float(), size, size, aligned=False)
    return frames, voice.sound, points


def shift_sound(sound, frames):
    """Delay a sound (n,) by a number of video frames (negative: advance it). Silence fills the gap."""
    late = round(frames * SAMPLE_RATE / FPS)
    return np.pad(sound, (max(late, 0), max(-late, 0)))[max(-late, 0):][:len(sound)]
