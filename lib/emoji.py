"""The demo's pictures: 9,020 emoji in six drawing styles, and which of them no model sees in training."""
import csv
import functools
import hashlib
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lib.pictures import read_picture

FOLDER = Path(__file__).resolve().parent.parent / "demo" / "emoji"
STYLES = ("noto", "noto-v1", "fluent", "fluent-flat", "twemoji", "emojione")
TILE = 64                                       # side of a picture in a sheet, in pixels
MARGIN = 8                                      # white pixels around a picture of which `moved` shows a part
PER_ROW = 50                                    # pictures in a row of a sheet
UNSEEN_THINGS = 0.03                            # share of things that are held out in all styles
UNSEEN_PAIRS = 0.1                              # share of (thing, style) pairs that are held out
PARAPHRASED = 0.5                               # share of training captions that are paraphrases


@functools.cache
def rows():
    """The lines of emoji.tsv: dicts with style, index in the style's sheet, group, subgroup, name and tags."""
    with open(FOLDER / "emoji.tsv", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))


@functools.lru_cache(1)
def sheet(style):
    """All pictures of a style, 50 in a row, as one PIL picture."""
    return read_picture(FOLDER / f"{style}.webp")


def tile(row, size=TILE):
    """The picture of a row as a PIL picture of size x size pixels."""
    index = int(row["index"])
    x = index % PER_ROW * TILE
    y = index // PER_ROW * TILE
    return sheet(row["style"]).resize((size, size), Image.LANCZOS, (x, y, x + TILE, y + TILE))


@functools.lru_cache(2)
def pictures(size):
    """The pictures of all rows, uint8 (9020, 3, size, size)."""
    small = np.stack([np.asarray(tile(row, size)) for row in rows()])
    return torch.from_numpy(small).permute(0, 3, 1, 2).contiguous()


def moved(picture, size, rng):
    """A picture, uint8 (3, 64, 64), moved by up to two pixels and scaled by up to 6 % -> (3, size, size)."""
    canvas = np.full((TILE + 2 * MARGIN, TILE + 2 * MARGIN, 3), 255, np.uint8)
    canvas[MARGIN:-MARGIN, MARGIN:-MARGIN] = picture.permute(1, 2, 0)
    side = TILE * rng.uniform(0.96, 1.06)                                   # of the part that is seen
    x, y = (len(canvas) - side) / 2 + rng.uniform(-2, 2, 2)
    seen = Image.fromarray(canvas).resize((size, size), Image.LANCZOS, (x, y, x + side, y + side))
    return torch.from_numpy(np.array(seen)).permute(2, 0, 1)


def class_of(row):
    """The class of a row: its style and its subgroup, such as fluent/cat-faces."""
    subgroup = re.sub("[^a-z]+", "-", row["subgroup"])
    return f"{row['style']}/{subgroup}"


def captions_of(row):
    """The usual caption of a row, then its paraphrases: prompts may name the style last, or not at all, or be keywords.
    """
    style = f"{row['style']} style"
    name = row["name"]
    tags = row["tags"].split("|")
    captions = [f"{style}, {name}", f"{name}, {style}", name]
    for start in range(0, len(tags), 3):
        few = tags[start:start + 3]
        if len(few) > 1:                                                    # one keyword alone says too little
            captions.append(", ".join([*few, style]))
    return captions


def hash_to_unit(text):
    """A number in [0, 1) that depends on a text alone. It is uniform over many texts."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8


@functools.cache
def split():
    """Indices of rows: (training, unseen pairs, unseen things).

    3 % of the things are held out in all styles. Of all other (thing, style) pairs 10 % are held out, but at least one
    style of each thing stays in training. So a model has seen both the thing and the style of an unseen pair, but never
    together.
    """
    rows_of_thing = {}
    for i, row in enumerate(rows()):
        rows_of_thing.setdefault(row["name"], []).append(i)
    training = []
    pairs = []
    things = []
    for name, indices in rows_of_thing.items():
        if hash_to_unit(f"{name}, all styles") < UNSEEN_THINGS:
            things += indices
            continue
        unseen = [i for i in indices if hash_to_unit(f"{name}, {rows()[i]['style']}") < UNSEEN_PAIRS]
        if len(unseen) == len(indices):
            unseen = unseen[1:]
        pairs += unseen
        training += sorted(set(indices) - set(unseen))
    return sorted(training), sorted(pairs), sorted(things)


class Emoji:
    """One part of the demo's pictures: "training", "pairs", "things", or "unseen", which is pairs and then things.

    Conditions are numbers of classes, of which each is a style and a subgroup. With captions=True they are texts.
    views: in how many ways a training picture is seen, a little moved and scaled, so that models do not learn its
    tokens by heart. The first view is the picture itself. styles: leave out all others. most: take so many pictures,
    spread over all.
    """

    def __init__(self, size, part="training", captions=False, views=1, styles=STYLES, most=None):
        training, pairs, things = split()
        chosen = dict(training=training, pairs=pairs, things=things, unseen=pairs + things)[part]
        self.indices = [i for i in chosen if rows()[i]["style"] in styles]
        if most and most < len(self.indices):
            self.indices = [self.indices[k * len(self.indices) // most] for k in range(most)]
        self.rows = [rows()[i] for i in self.indices]
        self.with_captions = captions
        self.size = size
        self.views = views
        self.styles = styles
        self.classes = sorted({class_of(row) for row in rows()})
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = torch.tensor([numbers[class_of(row)] for row in self.rows])
        self.pixels = pictures(size)[self.indices]                          # (n, 3, size, size) uint8
        self.fingerprint = hashlib.sha256(self.pixels.numpy()).hexdigest()
        self.kinds = "pictures, captions" if captions else f"pictures, {len(self.classes)} classes"

    def __len__(self):
        return len(self.rows)

    def name(self, index):
        return self.captions(index)[0]

    def captions(self, index):
        """All captions that a picture may get."""
        return captions_of(self.rows[index])

    def caption(self, index, seed):
        """One of the captions of a picture; without a seed the usual one."""
        usual, *others = self.captions(index)
        rng = np.random.default_rng(seed)
        if seed is None or rng.random() >= PARAPHRASED:
            return usual
        return others[rng.integers(len(others))]

    def conditions(self, items):
        """Captions, or classes (B,)."""
        if self.with_captions:
            return [self.caption(i, seed) for i, seed in items]
        return self.labels[[i for i, _ in items]]

    def view(self, index, number):
        """One of the views of a picture, uint8 (3, size, size)."""
        if number == 0:
            return self.pixels[index]
        row = self.indices[index]
        return moved(pictures(TILE)[row], self.size, np.random.default_rng((row, number)))

    def read_views(self, index, crops):
        """The views of a picture with these numbers, of which None stands for the picture itself."""
        return [self.view(index, crop or 0) for crop in crops]

    def __getitems__(self, items):
        pixels = []
        for index, seed in items:
            number = 0
            if self.views > 1 and seed is not None:
                number = np.random.default_rng(seed).integers(self.views)
            pixels.append(self.view(index, number))
        return torch.stack(pixels), self.conditions(items), []
