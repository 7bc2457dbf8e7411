"""Draw pictures with a trained model."""
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin

DEMO = Path(__file__).resolve().parent / "demo"


class UserError(Exception):
    """A mistake of the user's: one line that names the thing, what was expected and the way out. Exit code 2."""


def choose_device(name):
    """'auto' or a torch device name -> (torch.device, why)."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), f"found {torch.cuda.get_device_name()}"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "found an Apple GPU"
        return torch.device("cpu"), "no GPU found"
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(name, lambda: True)
    if not available():
        raise UserError(f"--device {name}: this machine has none; use --device cpu, or leave it out")
    return torch.device(name), "as asked"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_dtype(name, device):
    """'auto', 'fp32', 'bf16' or 'fp16' -> (torch.dtype, why)."""
    if name != "auto":
        return DTYPES[name], "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "this GPU computes in it"
        return torch.float16, "this GPU has no bf16"
    return torch.float32, "half precision is slow on a CPU" if device.type == "cpu" else "safe on mps"


def grid(pictures, columns, scale=1, gap=2):
    """uint8 (N, h, w, 3) -> one uint8 picture, row-major, on white; each picture enlarged `scale` times."""
    n, h, w, _ = pictures.shape
    pictures = pictures.repeat(scale, 1).repeat(scale, 2)
    rows = -(-n // columns)
    h, w = h * scale, w * scale
    sheet = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * (h + gap), i % columns * (w + gap)
        sheet[y:y + h, x:x + w] = picture
    return sheet


def save_png(path, picture, text=None):
    """Writes a uint8 (h, w, 3) picture with text metadata, atomically."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, str(value))
    from vq import atomic
    with atomic(path) as temporary:
        Image.fromarray(picture).save(temporary, "PNG", pnginfo=info)


def complain(error):
    """Prints a user's mistake as one line and returns the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return 2
