"""What `sample.py vq` needs besides the tokenizer: the pictures, their sizes, and how much of the codes they use."""
from pathlib import Path

import numpy as np
import torch

import vq
from lib.console import UserError, check_writable
from lib.data import suffix_of, visible_files
from lib.pictures import cover, grid, save_png
from lib.shards import PICTURES


def picture_files(given):
    """Files and folders of --image -> [(path, whether the file itself was named)]. Raises UserError."""
    found = []
    for path in given:
        if not Path(path).is_dir():
            found.append((path, True))
            continue
        inside = [(file, False) for file in visible_files(path) if suffix_of(file) in PICTURES]
        if not inside:
            raise UserError(f"--image {path}: no picture in this folder ({', '.join(sorted(PICTURES))})")
        found += inside
    return found


def save_rows(out, rows, titles, steps_grid, text):
    """Save strips of pictures as one .png, or in a folder if they differ in size -> where they are."""
    alike = len({row.shape for row in rows}) == 1
    if alike and steps_grid:
        save_png(out, grid(np.concatenate(rows), len(titles), titles=titles), text)
    elif alike:
        save_png(out, grid(np.concatenate(np.stack(rows, 1)), len(rows)), text)
    else:
        out = check_writable(out.with_suffix(""))
        for i, row in enumerate(rows):
            save_png(out / f"{i:05d}.png", grid(row, len(row), titles=titles), text)
    return out


class Usage:
    """How much of a tokenizer's codes any number of pictures make use of."""

    def __init__(self, tokenizer):
        self.quantizer = tokenizer.quantize
        self.config = tokenizer.config
        self.what = "codes used" if self.config.vocab_size else "bits' entropy"
        self.seen = []                                                      # codes; or for bits how many of each are 1
        self.total = 0

    def count(self, tokens):
        """Add the tokens of a batch, a list of (B, l) indices or (B, l, d) bits."""
        tokens = torch.cat(tokens, 1).flatten(0, 1).cpu()
        self.total += len(tokens)
        if self.config.vocab_size:
            self.seen = torch.cat([*self.seen, tokens])[None].unique(dim=1)
        else:
            self.seen = [sum(self.seen) + tokens.sum(0)]

    def percent(self):
        """See `coverage` of the quantizer."""
        if self.config.vocab_size:
            return self.quantizer.coverage([self.seen], self.config)
        return self.quantizer.coverage([self.seen[0][None, None] / self.total], self.config)


def fit(picture, config, keep_size):
    """A PIL picture, resized or cropped to a size that the tokenizer takes, and the schedule for it."""
    stride = config.stride
    last, _ = vq.as_pairs(config.patch_nums)[-1]
    if not keep_size:
        return cover(picture, stride * last, stride * last), config.patch_nums
    if not config.vocab_size:                                               # bits: the largest schedule that fits
        aspect = picture.height / picture.width
        fits = [p for p in vq.PIXELS if vq.schedule(aspect, p)[-1][0] * 16 <= picture.height] or ["0.06M"]
        cells = 16 // stride                                                # along a cell of a schedule, 16 pixels
        patch_nums = [(cells * h, cells * w) for h, w in vq.schedule(aspect, fits[-1])]
        h, w = patch_nums[-1]
        return cover(picture, h * stride, w * stride), patch_nums
    w = picture.width // stride
    h = picture.height // stride
    if min(w, h) < 1:
        raise UserError(f"a picture of {picture.width}x{picture.height} is smaller than one cell of {stride}x{stride} "
                        "pixels")
    patch_nums = [(max(1, round(p * h / last)), max(1, round(p * w / last))) for p in config.patch_nums]
    return picture.crop((0, 0, w * stride, h * stride)), patch_nums
