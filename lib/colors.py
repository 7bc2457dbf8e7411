"""How videos code colors: which code a file has, and from luma and color differences to RGB and back."""
from collections import namedtuple

import numpy as np
import torch
import torch.nn.functional as F

from lib.console import UserError

Colors = namedtuple("Colors", "matrix primaries transfer full")
Colors.__doc__ = """matrix, primaries and transfer are FFmpeg's numbers (ISO/IEC 23091-2), 2 if the file says nothing.
full: black and white are 0 and 255, not 16 and 235."""
BT709 = Colors(1, 1, 1, False)
MATRICES = {1: (0.2126, 0.0722), 4: (0.3, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087)}
"""Matrix -> weights of red and blue in luma."""
BT2020 = (9, 10)
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
ROUNDED = 0x10 | 0x2000 | 0x4000 | 0x40000      # libswscale: no interpolation, and sums are rounded, not cut off


def colors_of(frame, path):
    """(Colors of a PyAV frame, whether the matrix is a guess). Raises UserError for HDR.

    Videos without a tag are taken as players do: from 720 lines on as BT.709, below as BT.601.
    """
    matrix = frame.colorspace
    if frame.color_trc in HDR_TRANSFERS or frame.color_primaries in BT2020 or matrix in BT2020:
        kind = HDR_TRANSFERS.get(frame.color_trc, "BT.2020")
        raise UserError(f"{path}: its colors are HDR or of wide gamut ({kind}), expected BT.709 or BT.601; convert it: "
                        f"ffmpeg -i {path} -vf zscale=t=linear:npl=100,format=gbrpf32le,tonemap=hable,zscale=p=bt709:"
                        "t=bt709:m=bt709:r=limited,format=yuv420p -c:a copy OUT.mp4")
    guessed = matrix not in MATRICES and not frame.format.is_rgb
    if matrix not in MATRICES:
        matrix = 1 if frame.height >= 720 or frame.width >= 1280 else 6
    full = frame.color_range == 2 or frame.format.name.startswith("yuvj")
    if frame.format.name.startswith("gray"):
        full = frame.color_range != 1
    if frame.format.is_rgb:                                                 # what is written from it is coded as usual
        full = False
    return Colors(matrix, frame.color_primaries, frame.color_trc, full), guessed


def levels(colors):
    """(black of luma, its range, the range of color differences, whose middle is 128)."""
    return (0, 255, 255) if colors.full else (16, 219, 224)


def to_rgb(frame, colors):
    """A PyAV frame -> uint8 (h, w, 3), rounded.

    We compute it ourselves: libswscale cuts sums off, which makes pictures a level darker, or it interpolates the color
    differences. We repeat them, so that `to_yuv` gets back exactly what was in the file.
    """
    if frame.format.is_rgb:
        return frame.reformat(format="rgb24", interpolation=ROUNDED).to_ndarray()
    luma, to_blue, to_red = planes(frame, colors)
    black, luma_range, difference_range = levels(colors)
    red, blue = MATRICES[colors.matrix]
    green = 1 - red - blue
    y = (luma.float() - black) * (255 / luma_range)                         # (h, w)
    cb = (to_blue.float() - 128) * (255 / difference_range)                 # (h / 2, w / 2) as a rule
    cr = (to_red.float() - 128) * (255 / difference_range)
    parts = (2 * (1 - red) * cr, -2 * (blue * (1 - blue) * cb + red * (1 - red) * cr) / green, 2 * (1 - blue) * cb)
    rgb = torch.empty(*y.shape, 3, dtype=torch.uint8)
    for i, part in enumerate(parts):
        down = -(-y.shape[0] // part.shape[0])
        across = -(-y.shape[1] // part.shape[1])
        part = part.repeat_interleave(across, 1).repeat_interleave(down, 0)[:y.shape[0], :y.shape[1]]
        rgb[:, :, i] = (y + part).round_().clamp_(0, 255)
    return rgb.numpy()


def planes(frame, colors):
    """Luma and both color differences of a PyAV frame, uint8 tensors. Other numbers of bits become 8."""
    luma, chroma = frame.format.components[0], frame.format.components[-1 if len(frame.format.components) < 3 else 1]
    shares = (-(-luma.width // chroma.width), -(-luma.height // chroma.height))
    name = {(2, 2): "yuv420p", (2, 1): "yuv422p"}.get(shares, "yuv444p")
    if frame.format.name not in (name, name.replace("yuv", "yuvj")):
        matrix = 5 if colors.matrix == 6 else colors.matrix                 # libswscale's number
        both = 2 if colors.full else 1
        frame = frame.reformat(format=name, src_colorspace=matrix, dst_colorspace=matrix, src_color_range=both,
                               dst_color_range=both, interpolation=ROUNDED)
    found = []
    for plane in frame.planes:
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:plane.height, :plane.width]
        found.append(torch.from_numpy(rows.copy()))
    return found


def to_yuv(picture, colors):
    """uint8 (h, w, 3) RGB of even size -> uint8 (h * 3 / 2, w), the planes of yuv420p: luma, and two color differences
    that are averaged over four pixels."""
    black, luma_range, difference_range = levels(colors)
    red, blue = MATRICES[colors.matrix]
    r, g, b = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).contiguous().float()
    y = red * r + (1 - red - blue) * g + blue * b
    small = F.avg_pool2d(torch.stack([y, b, r])[None], 2)[0]                # averages of luma, blue and red
    cb = (small[1] - small[0]) / (2 * (1 - blue))
    cr = (small[2] - small[0]) / (2 * (1 - red))
    y = y * (luma_range / 255) + black
    differences = torch.stack([cb, cr]) * (difference_range / 255) + 128
    coded = torch.cat([y.flatten(), differences.flatten()]).round_().clamp_(0, 255).byte()
    return coded.view(y.shape[0] * 3 // 2, y.shape[1]).numpy()


def oriented(picture, frame):
    """A picture (h, w, 3), turned and mirrored by the display matrix of its PyAV frame, to the nearest right angle."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return picture
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).tolist()       # x' = a x + c y, y' = b x + d y
    if abs(b) + abs(c) > abs(a) + abs(d):                                   # lines become columns
        picture = picture.transpose(1, 0, 2)
        a, d = c, b
    if a < 0:
        picture = picture[:, ::-1]
    if d < 0:
        picture = picture[::-1]
    return picture
