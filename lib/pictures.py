"""Pictures: reading files of any kind, tensors and back, PSNR and SSIM, grids and charts."""
import csv
import itertools
import logging
import math
import os
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

import vq
from lib.console import MissingPackage, UserError

DEMO = Path(__file__).resolve().parent.parent / "demo"
# What reading a damaged picture, sound or video raises.
UNREADABLE = (OSError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError)
LONGEST_EDGE = 2**16                            # of a picture that is read, in pixels; PIL bounds their number
logging.getLogger("PIL").addHandler(logging.NullHandler())                  # errors are reported here, in one line


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@contextmanager
def opened(file, name):
    """An open PIL picture of a path or a binary file, of which only the header is read yet.

    Whatever goes wrong until the end of the `with` becomes a UserError with the name of the picture: PIL raises almost
    any exception for damaged files. Its warnings about files that it can read are not shown.
    """
    if not hasattr(file, "read") and not os.path.isfile(file):
        raise UserError(f"{name}: {'not a file' if os.path.exists(file) else 'no such file'}")
    if str(name).lower().endswith((".heic", ".heif")):
        read_heif(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as picture:
                if max(picture.size) > LONGEST_EDGE:
                    raise ValueError(f"an edge of {max(picture.size)} pixels; at most {LONGEST_EDGE} are read")
                yield picture
    except Exception as e:
        reason = getattr(e, "strerror", None) or str(e) or type(e).__name__
        reason = reason.replace(f" {str(file)!r}", "")                      # PIL repeats the path
        raise UserError(f"{name}: not a readable picture ({reason})") from e


def read_heif(name):
    """Teach PIL to read HEIF, the format of many phones."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise MissingPackage(f"{name}: reading .heic needs a package: pip install pillow-heif; or convert it to "
                             ".jpg") from None
    register_heif_opener()


def picture_size(file, name):
    """(width, height) of a picture as a person sees it, from its header. Raises UserError."""
    with opened(file, name) as picture:
        width, height = picture.size
        # PIL has turned the size of a .tif already, and would decode a whole .png to look for a late tag.
        known = picture.format != "TIFF" and (picture.format != "PNG" or "exif" in picture.info)
        if known and picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
            return height, width
        return width, height


def read_picture(file, name=None):
    """Read an RGB PIL picture from a path or a binary file. Raises UserError with its name, by default the path.

    The picture is turned as its EXIF tag says, grey values of more than 8 bits become 8-bit (see `eight_bits`), and
    transparent parts become white.
    """
    with opened(file, name or file) as opened_picture:
        picture = ImageOps.exif_transpose(opened_picture)
        if picture.mode[0] in "IF":
            picture = eight_bits(np.asarray(picture), value_range(opened_picture))
        if "A" in picture.mode or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


def value_range(picture):
    """The value of white in a grey PIL picture of more than 8 bits, None if the file does not say it."""
    if picture.mode.startswith("I;16") and picture.format == "TIFF":
        bits = picture.tag_v2.get(258, 16)                                  # BitsPerSample: of 16, some files use 12
        return 2 ** (bits[0] if isinstance(bits, tuple) else bits) - 1
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        return 65535
    return None


def eight_bits(values, white):
    """Numbers (H, W) -> an 8-bit PIL picture. white: the largest value that the file could hold, or None.

    A file of floats or 32-bit integers does not say what white is. Floats up to 1 are shares of white. Other values up
    to 255 are 8-bit numbers, and up to 65535 16-bit ones. Raises ValueError for all others.
    """
    if white is None:
        low = values.min()
        high = values.max()
        ranges = (1, 255, 65535) if values.dtype.kind == "f" else (255, 65535)
        white = next((top for top in ranges if high <= top), None)
        if white is None or not low >= 0:                                   # not a number fails both
            raise ValueError(f"values from {low:g} to {high:g}; expected 0 .. 1, 0 .. 255 or 0 .. 65535")
    if values.dtype.kind == "f":
        values = np.rint(values * (255 / white))
    else:
        values = values.astype(np.int64) * 255 // white
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def resize_and_cut(picture, size, box, resample):
    """The part `box` (left, top, right, bottom) of a PIL picture resized to size (width, height).

    A picture that is much longer than wide would become huge first. Of such a one only the part is resized, with its
    edges rounded to a thousandth of a pixel.
    """
    width, height = size
    left, top, right, bottom = box
    if width * height <= 32 * (right - left) * (bottom - top):
        return picture.resize(size, resample).crop(box)
    across = picture.width / width
    down = picture.height / height
    part = (left * across, top * down, min(right * across, picture.width), min(bottom * down, picture.height))
    return picture.resize((right - left, bottom - top), resample, part)


def cover(picture, h, w):
    """Resize a PIL picture until it covers h x w pixels, then cut out the centre."""
    ratio = max(h / picture.height, w / picture.width)
    width = max(w, round(picture.width * ratio))
    height = max(h, round(picture.height * ratio))
    x = (width - w) // 2
    y = (height - h) // 2
    return resize_and_cut(picture, (width, height), (x, y, x + w, y + h), Image.LANCZOS)


# ----------------------------------------------------------------------------------------------------------------------
# Tensors


def to_input(pixels, device):
    """uint8 (B, 3, h, w) -> float32 in [-1, 1] on the device."""
    return pixels.to(device).float().div_(127.5).sub_(1)


def to_tensor(picture, device):
    """A PIL picture -> (1, 3, h, w) float32 in [-1, 1]."""
    return to_input(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None], device)


def to_pixels(images, add=0.0):
    """(B, 3, h, w) in [0, 1] -> uint8 array (B, h, w, 3).

    Values are truncated after adding 0 (as in VAR's code) or 0.5 (as in LlamaGen's).
    """
    return images.mul(255).add(add).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of pictures (B, 3, h, w) in [-1, 1] -> (B,)."""
    return 10 * torch.log10(4 / (a - b).square().mean((1, 2, 3)))           # the peak is 2


def ssim(a, b):
    """Structural similarity of pictures (B, 3, h, w) in [-1, 1] with at least 11 x 11 pixels -> (B,).

    It is 1 for equal pictures (Wang et al. 2004, with a Gaussian window of standard deviation 1.5).
    """
    bell = torch.exp(-torch.arange(-5, 6, device=a.device) ** 2 / 4.5)
    window = (bell[:, None] * bell / bell.sum() ** 2).expand(3, 1, 11, 11)

    def mean(x):
        return F.conv2d(x, window, groups=3)
    mean_a = mean(a)
    mean_b = mean(b)
    var_a = mean(a * a) - mean_a * mean_a
    var_b = mean(b * b) - mean_b * mean_b
    covariance = mean(a * b) - mean_a * mean_b
    c1 = 0.02**2                                                            # (0.01 times the range, which is 2) squared
    c2 = 0.06**2                                                            # (0.03 times the range) squared
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_a * mean_a + mean_b * mean_b + c1) * (var_a + var_b + c2))
    return similarity.mean((1, 2, 3))


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def grid(pictures, columns, gap=2, enlarge=None, titles=(), labels=()):
    """uint8 (N, h, w, 3) -> one picture on white, filled row by row. Small pictures are enlarged.

    titles: texts above the columns. labels: texts at the left of the rows.
    """
    n, h, w, _ = pictures.shape
    scale = enlarge or max(1, 128 // h)
    h = h * scale
    w = w * scale
    font = ImageFont.load_default(12)
    top = 20 if titles else 0
    left = 8 + math.ceil(max(font.getlength(label) for label in labels)) if labels else 0
    rows = -(-n // columns)
    sheet = np.full((top + rows * (h + gap) - gap, left + columns * (w + gap) - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y = top + i // columns * (h + gap)
        x = left + i % columns * (w + gap)
        sheet[y:y + h, x:x + w] = picture.repeat(scale, 0).repeat(scale, 1)
    sheet = Image.fromarray(sheet)
    pen = ImageDraw.Draw(sheet)
    for i, title in enumerate(titles):
        pen.text((left + i * (w + gap) + w // 2, top // 2), title, "black", font, anchor="mm")
    for i, label in enumerate(labels):
        pen.text((left - 4, top + i * (h + gap) + h // 2), label, "black", font, anchor="rm")
    return np.asarray(sheet)


def save_png(path, picture, text=None):
    """Write a uint8 (h, w, 3) picture atomically, with a dict of text metadata."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, str(value).encode(errors="replace").decode())    # names of files need not be text
    with vq.atomic(path) as temporary:
        Image.fromarray(picture).save(temporary, "PNG", pnginfo=info)


# ----------------------------------------------------------------------------------------------------------------------
# Charts. A plotting library would be a large dependency for one kind of picture.

INKS = ("#1f6fb4", "#d9541e", "#2a9d4a", "#8e4bb0", "#b8860b", "#555555")
OVERSAMPLE = 2                                  # charts are drawn larger and averaged, which makes lines smooth


def ticks(low, high, most=6):
    """Round numbers between two numbers, at most `most` of them."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step = next(step * k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= most)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [step * i for i in range(first, last + 1)]


class Axes:
    """The plotting area of a chart: maps values to pixels and draws on them."""

    def __init__(self, size, x_range, y_range):
        width, height = size
        self.sheet = Image.new("RGB", (width * OVERSAMPLE, height * OVERSAMPLE), "white")
        self.pen = ImageDraw.Draw(self.sheet)
        self.font = ImageFont.load_default(12 * OVERSAMPLE)
        self.left, self.right, self.top, self.bottom = 58, width - 14, 30, height - 44
        self.first, self.last = x_range
        self.low, self.high = y_range

    def pixel(self, x, y):
        """The place of a point; y is clipped to the range of the axis."""
        y = min(max(y, self.low), self.high)
        across = self.left + (x - self.first) / (self.last - self.first) * (self.right - self.left)
        down = self.bottom - (y - self.low) / (self.high - self.low) * (self.bottom - self.top)
        return across * OVERSAMPLE, down * OVERSAMPLE

    def line(self, start, end, ink, width=1):
        self.pen.line([start, end], ink, width * OVERSAMPLE)

    def text(self, x, y, text, anchor, size=None):
        font = ImageFont.load_default(size * OVERSAMPLE) if size else self.font
        self.pen.text((x, y), text, "black", font, anchor=anchor)

    def frame(self):
        """Grid lines with their numbers, and a border."""
        for y in ticks(self.low, self.high):
            start = self.pixel(self.first, y)
            self.line(start, self.pixel(self.last, y), "#e4e4e4")
            self.text(start[0] - 6 * OVERSAMPLE, start[1], f"{y:.6g}", "rm")
        for x in ticks(self.first, self.last):
            start = self.pixel(x, self.low)
            self.line(start, self.pixel(x, self.high), "#e4e4e4")
            self.text(start[0], (self.bottom + 6) * OVERSAMPLE, f"{x:.6g}", "mt")
        corners = [self.pixel(self.first, self.high), self.pixel(self.last, self.low)]
        self.pen.rectangle(corners, outline="#888888", width=OVERSAMPLE)

    def level(self, y, text):
        """A dashed line across, with a text at its end."""
        start = self.pixel(self.first, y)
        end = self.pixel(self.last, y)
        for x in range(int(start[0]), int(end[0]), 12 * OVERSAMPLE):
            self.line((x, start[1]), (x + 6 * OVERSAMPLE, start[1]), "black")
        self.text(end[0] - 4 * OVERSAMPLE, end[1] - 3 * OVERSAMPLE, text, "rb")

    def curve(self, xs, ys, ink):
        """A line through points; nan in ys leaves a gap."""
        points = [self.pixel(x, y) if math.isfinite(y) else None for x, y in zip(xs, ys)]
        for a, b in zip(points, points[1:]):
            if a and b:
                self.line(a, b, ink, 2)

    def mark(self, x, y, text):
        """A dot with a text beside it."""
        across, down = self.pixel(x, y)
        r = 4 * OVERSAMPLE
        self.pen.ellipse([across - r, down - r, across + r, down + r], fill="black")
        if x < (self.first + self.last) / 2:
            self.text(across + 8 * OVERSAMPLE, down, text, "lm")
        else:
            self.text(across - 8 * OVERSAMPLE, down, text, "rm")

    def legend(self, named):
        """(name, ink) of all curves, in the lower left corner."""
        for i, (name, ink) in enumerate(named):
            y = (self.bottom - 8 - 16 * (len(named) - i - 0.5)) * OVERSAMPLE
            self.line(((self.left + 10) * OVERSAMPLE, y), ((self.left + 30) * OVERSAMPLE, y), ink, 3)
            self.text((self.left + 36) * OVERSAMPLE, y, name, "lm")


def chart(curves, title="", x_label="", y_label="", levels=(), marks=(), y_range=None, size=(560, 360)):
    """Draw a line chart -> uint8 (h, w, 3).

    curves: {name: (xs, ys)}; the legend shows names that are not empty. levels: [(y, text)] of dashed lines across.
    marks: [(x, y, text)] of single points. y_range: (low, high), by default what the curves and levels need.
    """
    points = [(x, y) for xs, ys in curves.values() for x, y in zip(xs, ys) if math.isfinite(y)]
    xs, ys = zip(*points or [(0, 0)])
    if y_range:
        low, high = y_range
    else:
        ys = [*ys, *(y for y, _ in levels)]
        room = 0.06 * (max(ys) - min(ys))
        low = min(ys) - room
        high = max(ys) + room
    first = min(xs)
    last = max(xs) if max(xs) > first else first + 1
    axes = Axes(size, (first, last), (low, high if high > low else low + 1))
    axes.frame()
    for y, text in levels:
        axes.level(y, text)
    inks = dict(zip(curves, itertools.cycle(INKS)))
    for name, (xs, ys) in curves.items():
        axes.curve(xs, ys, inks[name])
    for x, y, text in marks:
        axes.mark(x, y, text)
    axes.legend([(name, ink) for name, ink in inks.items() if name])
    width, height = size
    axes.text(width * OVERSAMPLE // 2, 14 * OVERSAMPLE, title, "mm", size=13)
    axes.text((axes.left + axes.right) * OVERSAMPLE // 2, (height - 6) * OVERSAMPLE, x_label, "mb")
    axes.text(6 * OVERSAMPLE, 14 * OVERSAMPLE, y_label, "lm")
    return np.asarray(axes.sheet.reduce(OVERSAMPLE))


def sheet_of_charts(charts, columns=3):
    """Join charts of one size, side by side and below each other."""
    blank = np.full_like(charts[0], 255)
    charts = charts + [blank] * (-len(charts) % columns)
    return np.concatenate([np.concatenate(charts[i:i + columns], 1) for i in range(0, len(charts), columns)])


def write_table(path, rows, columns=None):
    """Write a list of dicts as a CSV file, atomically."""
    with vq.atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns or list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
