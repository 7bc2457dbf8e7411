"""Pictures to train on, with classes or captions, and the order in which batches take them.

A data set has __len__ and __getitems__. The latter takes a list of items (index, random seed of the crop or None) and
returns (inputs, conditions, paths that could not be read). Where a file is damaged, the next readable one takes its
place.
"""
import hashlib
import itertools
import json
import math
import os
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import vq
from lib.console import UserError, rank_and_world, understanding
from lib.emoji import STYLES, Emoji
from lib.pictures import UNREADABLE, cover, picture_size, read_picture, resize_and_cut
from lib.shards import PICTURES, TarEntry, byte_size, files_of, is_hidden, open_entry, read_shards

VAL_EVERY = 20                                  # every 20th item is held out for validation
MOST_CLASSES = 10**6                            # a class number beyond is a mistake: every class takes a row of weights


class PictureFolder:
    """Pictures in DIR/class/, or in DIR/*.tar where a .cls file beside every picture holds the number of its class.

    Classes are the sorted names of the folders, whose pictures may lie deeper. Links are followed, hidden files are
    not read. Items are (index, crop). A crop is the seed of a random crop, None for the centre, or (name, n) for number
    n of the VIEWS. The shorter edge is resized to zoom * size with Lanczos, then a square is cut out.
    zoom: (lowest, highest).
    """

    READS_FILES = True                          # worth processes of their own
    VIEWS = {"ten": 20, "flip": 2}              # number of views, see `view`

    def __init__(self, root, size, train=True, split=True, zoom=(1.125, 1.125), flip=False, notes="."):
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"--data {root}: no such folder; it should hold one folder of pictures per class")
        rows, remarks = self.in_shards(root, notes) if files_of(root, ".tar") else self.in_folders(root)
        if not rows:
            also = f"; {remarks}" if remarks else ""
            raise UserError(f"--data {root}: no pictures in it; expected {root}/CLASS/PICTURE.jpg (or png, webp, bmp, "
                            f"gif, tif, ppm), or {root}/SHARD.tar with PICTURE.jpg and PICTURE.cls, the number of its "
                            f"class{also}")
        if remarks and (train or not split) and rank_and_world()[0] == 0:
            tqdm.write(f"--data {root}: {remarks}")
        if split:
            rows = held_out(rows, train)
        self.files, labels, shards = zip(*rows)
        self.labels = torch.tensor(labels)
        self.shards = np.array(shards) if isinstance(self.files[0], TarEntry) else None
        self.size = size
        self.zoom = zoom
        self.flip = flip
        listing = (f"{os.path.relpath(str(file), root)} {byte_size(file)}" for file in self.files)
        self.fingerprint = f"{fingerprint_of(listing)} {size}"
        self.kinds = f"pictures, {len(self.classes)} classes"

    def in_folders(self, root):
        """([(path, class, 0)], remarks) of a folder of folders. Raises UserError where a class would be missing."""
        with understanding(root, "one folder of pictures per class"):
            folders = sorted(p for p in root.iterdir() if p.is_dir() and not is_hidden(p.name))
            files = {folder.name: list(visible_files(folder)) for folder in folders}
        pictures = {name: [file for file in files[name] if suffix_of(file) in PICTURES] for name in files}
        others = [file for paths in files.values() for file in paths if suffix_of(file) not in PICTURES]
        suffixes = Counter(map(suffix_of, others)).most_common(5)
        remarks = ""
        if others:
            counted = ", ".join(f"{suffix or 'without a suffix'} {count}" for suffix, count in suffixes)
            remarks = f"left out {len(others)} files that are not pictures ({counted}), such as {others[0]}"
        if not any(pictures.values()):
            return [], remarks
        also = f"; {remarks}" if remarks else ""
        for val in ("val", "valid", "validation", "test"):
            if val not in pictures or not pictures.get("train"):
                continue
            if not any(Path(file).parent.parent == root for file in pictures["train"] + pictures[val]):
                raise UserError(f"--data {root}: its folders train and {val} hold folders of classes; use --data "
                                f"{root / 'train'} --val-data {root / val}")
        empty = [name for name in pictures if not pictures[name]]
        if empty:
            raise UserError(f"--data {root}: no picture in {len(empty)} of {len(pictures)} class folders ("
                            f"{', '.join(empty[:3])}); remove them, or put pictures there (.heic has to be converted "
                            f"to .jpg){also}")
        self.classes = list(pictures)
        numbers = {name: number for number, name in enumerate(self.classes)}
        return [(file, numbers[name], 0) for name in pictures for file in pictures[name]], remarks

    def in_shards(self, root, notes):
        """([(TarEntry, class, number of the tar file)], remarks) of a folder of tar files."""
        samples, broken = read_shards(root, notes)
        rows = []
        for sample in samples:
            with skipping(broken, str(sample.picture)):
                rows.append((sample.picture, class_number(sample.texts), sample.shard))
        self.classes = [str(c) for c in range(1 + max((c for _, c, _ in rows), default=-1))]
        remarks = f"skipped {len(broken)} of {len(rows) + len(broken)} files: {summary_of(broken)}" if broken else ""
        return rows, remarks

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return str(self.files[index])

    def read(self, index, crop):
        """Picture and crop -> uint8 (3, size, size)."""
        return self.read_views(index, [crop])[0]

    def read_views(self, index, crops):
        """Several crops of a picture, which is opened once: a list of uint8 (3, size, size)."""
        picture = read_picture(open_entry(self.files[index]), self.files[index])
        squares = {}                                                        # what `view` keeps from view to view
        cut = []
        for crop in crops:
            if crop is not None and crop[0] in self.VIEWS:
                kind, number = crop
                small = view(picture, self.size, kind, number, squares)
            else:
                small = self.random_crop(picture, crop)
            cut.append(torch.from_numpy(np.array(small)).permute(2, 0, 1))
        return cut

    def random_crop(self, picture, seed):
        """Resize and cut a PIL picture. Without a seed the mean zoom and the centre are taken."""
        rng = np.random.default_rng(seed)
        zoom = np.mean(self.zoom) if seed is None else rng.uniform(*self.zoom)
        ratio = round(zoom * self.size) / min(picture.size)
        resized = [max(self.size, round(s * ratio)) for s in picture.size]
        room = [s - self.size for s in resized]
        if seed is None:
            x, y = [r // 2 for r in room]
        else:
            x, y = rng.integers(0, [r + 1 for r in room]).tolist()
        picture = resize_and_cut(picture, resized, (x, y, x + self.size, y + self.size), Image.LANCZOS)
        if self.flip and seed is not None and rng.random() < 0.5:
            picture = ImageOps.mirror(picture)
        return picture

    def conditions(self, items):                                            # classes (B,)
        return self.labels[[i for i, _ in items]]

    def __getitems__(self, items):
        pixels = []
        indices = []
        broken = []
        for index, crop in items:
            i, picture = first_readable(lambda i: self.read(i, crop), index, len(self), self.name, broken)
            indices.append(i)
            pixels.append(picture)
        return torch.stack(pixels), self.labels[indices], broken


def suffix_of(file):
    """The suffix of a path in small letters."""
    return os.path.splitext(file)[1].lower()


def visible_files(folder, above=()):
    """Paths of the files in a folder and below it, sorted, without hidden ones. Links are followed, but not in circles.

    above: the folders that lead here.
    """
    here = os.path.realpath(folder)
    if here in above:
        return
    with understanding(folder, "a folder"):
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        if is_hidden(entry.name) or (entry.is_symlink() and not os.path.exists(entry.path)):
            continue
        if entry.is_dir():
            yield from visible_files(entry.path, (*above, here))
        elif entry.is_file():
            yield entry.path


def class_number(texts):
    """The number in the .cls of a picture in a tar file. Raises UserError without one."""
    if "cls" not in texts:
        raise UserError("no .cls beside it")
    text = texts["cls"].strip()
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) < MOST_CLASSES):
        raise UserError(f"its .cls is no number from 0 to {MOST_CLASSES - 1}")
    return int(text)


def view(picture, size, kind, number, squares=None):
    """One view of a PIL picture, cut as LlamaGen's authors cut it.

    "ten": a centred square of 1.1 * size (numbers 0 .. 9) or 1.05 * size (10 .. 19) pixels, and of it the top left, top
    right, bottom left or bottom right corner or the centre, then the same five of the mirror image. "flip": a centred
    square of size pixels (0) and its mirror image (1). squares: a dict that keeps the squares from view to view.
    """
    if kind == "flip":
        side = size
        mirrored = number == 1
        corner = 4
    else:
        side = int(size * (1.1 if number < 10 else 1.05))
        mirrored = number % 10 >= 5
        corner = number % 5
    squares = {} if squares is None else squares
    if side not in squares:
        squares[side] = centred_square(picture, side)
    picture = squares[side]
    if mirrored:
        picture = ImageOps.mirror(picture)
    room = side - size
    middle = round(room / 2)
    dx, dy = [(0, 0), (room, 0), (0, room), (room, room), (middle, middle)][corner]
    return picture.crop((dx, dy, dx + size, dy + size))


def centred_square(picture, side):
    """The largest centred square of a PIL picture, resized to side x side as LlamaGen's authors do."""
    while min(picture.size) >= 2 * side:                                    # halving by means avoids aliasing
        picture = picture.resize([s // 2 for s in picture.size], Image.BOX)
    ratio = side / min(picture.size)
    resized = [round(s * ratio) for s in picture.size]
    x, y = ((s - side) // 2 for s in resized)
    return resize_and_cut(picture, resized, (x, y, x + side, y + side), Image.BICUBIC)


class CaptionedPictures:
    """Pictures with captions. `groups` holds the indices of pictures of equal aspect ratio; a batch comes from one.

    root: a .tsv or .jsonl file, or a folder of such files, or of tar files with a caption as .txt or .json beside each
    picture. A line of a .tsv is: picture path, tab, caption. A line of a .jsonl, or a .json, is, as in Infinity,
    {"image_path", "long_caption", "text" (a short caption, optional), "h_div_w" (optional)}, or, as in LlamaGen,
    {"image_path", "text" (a list, whose first entry counts)}, or, as img2dataset writes it, {"caption"}. Paths are
    relative to the file. Broken lines are skipped and counted. As in Infinity's original, a caption ends at "--", where
    some captions from the web have options of other programs. Squares are for LlamaGen, which keeps the whole caption.

    A picture is resized to cover the size that its aspect ratio has in `vq.schedule`, or a square of `size` pixels,
    then its centre is cut out. Items are (index, seed), with seed None for the whole caption.
    """

    READS_FILES = True
    pixels_per_token = 16                       # and side; InfinityTask sets that of its tokenizer

    def __init__(self, root, pixels=None, short_captions=0.5, train=True, split=True, size=None, notes="."):
        self.root = Path(root)
        self.pixels = pixels
        self.short_captions = short_captions
        self.size = size
        files = []
        samples = []
        broken = []                                                         # [(name, why)]
        if self.root.is_dir():
            files = files_of(self.root, ".tsv", ".jsonl")
            if not files:
                samples, broken = read_shards(self.root, notes)
        elif self.root.is_file() and suffix_of(self.root) in (".tsv", ".jsonl", ".json"):
            files = [self.root]
        if not files and not samples and not broken:
            raise UserError(f"--data {root}: expected a folder with .tsv (path, tab, caption), .jsonl or .tar files")
        self.rows = self.read_rows(files, samples, broken)
        count = len(broken) + len(self.rows)
        if not self.rows:
            raise UserError(f"--data {root}: not one of {count} lines can be used: {summary_of(broken)}")
        if broken and (train or not split) and rank_and_world()[0] == 0:
            tqdm.write(f"skipped {len(broken)} broken of {count} lines: {summary_of(broken)}")
        if split:
            self.rows = held_out(self.rows, train)
        ratios = np.array([ratio for _, ratio, _, _ in self.rows])
        self.aspects = sorted(set(ratios.tolist()))
        self.groups = [np.flatnonzero(ratios == ratio) for ratio in self.aspects]
        self.shards = np.array([shard for _, _, _, shard in self.rows]) if samples else None
        base = files[0].parent if files else self.root                      # the data may lie elsewhere next time
        listing = (f"{os.path.relpath(str(path), base)} {(ratio, captions)} {byte_size(path) if size else ''}"
                   for path, ratio, captions, _ in self.rows)
        self.fingerprint = f"{fingerprint_of(listing)} {size or pixels}"
        self.kinds = f"pictures, {len(self.aspects)} aspect ratios"

    def read_rows(self, files, samples, broken):
        """[(path or TarEntry, aspect ratio, captions with the long one first, number of the tar file)].

        Appends to `broken` what cannot be used.
        """
        rows = []
        for sample in samples:
            with skipping(broken, str(sample.picture)):
                w, h = sample.size
                fields = {"h_div_w": h / w, "long_caption": sample.texts.get("txt")}
                if "json" in sample.texts:
                    fields |= {k: v for k, v in json_object(sample.texts["json"]).items() if v is not None}
                rows.append(self.row(sample.picture, fields, sample.shard))
        for file in files:
            for number, line in enumerate(lines_of(file), 1):
                if not line.strip():
                    continue
                with skipping(broken, f"{file}:{number}"):
                    fields = tsv_fields(line) if suffix_of(file) == ".tsv" else json_object(line)
                    if not isinstance(fields.get("image_path"), str):
                        raise UserError("no image_path")
                    path = str(file.parent / fields["image_path"])
                    os.fsencode(path)                                       # it can be the name of a file
                    rows.append(self.row(path, fields))
        return rows

    def row(self, path, fields, shard=0):
        """A row of a path and what its line says about it. Raises UserError, also if the picture is not there."""
        captions = captions_of(fields)
        if not self.size:
            captions = [text.split("--")[0] for text in captions]
        captions = [text.strip() for text in captions]
        if not captions[0]:
            raise UserError("no caption")
        ratio = fields.get("h_div_w") or 0
        if not isinstance(ratio, (int, float, str)) or not 0 <= float(ratio) < math.inf:
            raise UserError("h_div_w is no ratio")
        ratio = float(ratio)
        if not ratio:
            if not os.path.exists(path):
                raise UserError("no such picture")
            try:
                w, h = picture_size(path, path)
            except UserError:
                raise UserError("no readable picture") from None
            ratio = h / w
        return path, 1.0 if self.size else vq.nearest_aspect(ratio), [c for c in captions if c], shard

    def __len__(self):
        return len(self.rows)

    def name(self, index):
        return str(self.rows[index][0])

    def captions(self, index):
        """The long and the short caption of a picture; by default the short one is the long one's first sentence."""
        long, *short = self.rows[index][2]
        return [long, short[0] if short else long.split(".")[0]]

    def caption(self, index, seed):
        """A caption of a picture: the short one or a random number of sentences of the long one.

        For squares it is one of two fixed captions, so that their features can be computed once.
        """
        long, *short = self.rows[index][2]
        if seed is None:
            return long
        rng = np.random.default_rng(seed)
        takes_short = rng.random() < self.short_captions
        if self.size:
            return self.captions(index)[1 if takes_short else 0]
        sentences = [s for s in long.split(". ") if s]
        if takes_short and short:
            return short[0]
        most = 2 if takes_short else len(sentences)
        return ". ".join(sentences[:rng.integers(1, most + 1)])

    def conditions(self, items):                                            # captions
        return [self.caption(i, seed) for i, seed in items]

    def read(self, index):
        """uint8 (3, h, w)."""
        path, ratio, _, _ = self.rows[index]
        picture = read_picture(open_entry(path), path)
        if self.size:
            if min(picture.size) < self.size:
                raise OSError(f"smaller than {self.size} pixels")           # the authors leave such pictures out, too
            h = self.size
            w = self.size
        else:
            h, w = (self.pixels_per_token * cells for cells in vq.schedule(ratio, self.pixels)[-1])
        picture = cover(picture, h, w)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def read_views(self, index, crops):
        """The picture, once for each crop: it is always cut alike."""
        return [self.read(index)] * len(crops)

    def __getitems__(self, items):
        pixels = []
        captions = []
        broken = []
        group = next(g for g in self.groups if items[0][0] in g)
        for index, seed in items:
            place = int(np.searchsorted(group, index))
            place, picture = first_readable(lambda i: self.read(group[i]), place, len(group),
                                            lambda i: self.name(group[i]), broken)
            pixels.append(picture)
            captions.append(self.caption(group[place], seed))
        return torch.stack(pixels), captions, broken


def lines_of(file):
    """The lines of a UTF-8 file, which end at \\n or \\r\\n and at nothing else. Raises UserError.

    Bytes that are not UTF-8 become surrogates, as in names of files.
    """
    options = dict(encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    with understanding(file, "lines of text"), open(file, **options) as f:
        for line in f:
            yield line.rstrip("\r\n")


def tsv_fields(line):
    """What a line of a .tsv file says, with the names of a .jsonl file. Raises UserError."""
    path, tab, rest = line.partition("\t")
    if not tab:
        raise UserError("no tab between a path and a caption")
    return {"image_path": path, "long_caption": rest.split("\t")[0]}


def json_object(text):
    """A JSON object as a dict. Raises UserError."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError("not JSON") from None
    if not isinstance(fields, dict):
        raise UserError("not a JSON object")
    return fields


def captions_of(fields):
    """[long caption, short caption or ""] of a line. Raises UserError if they are no text."""
    long = fields.get("long_caption") or ""
    short = fields.get("text") or ""
    if isinstance(short, list):                                             # as LlamaGen's authors write it
        long = short[0]
        short = ""
    if not long:                                                            # the only text is the long caption
        long = short or fields.get("caption") or ""
        short = ""
    try:
        return [text.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for text in (long, short)]
    except (AttributeError, UnicodeError):
        raise UserError("a caption that is no text") from None


def open_pictures(args):
    """(training set, validation set) of --data and --val-data."""
    if args.data == "demo":
        if args.captions and (args.pixels or args.size > 64):
            raise UserError(f"--data: recipe {args.recipe} needs pictures with captions; the demo's are 32 x 32")
        styles = getattr(args, "styles", None) or STYLES
        train_set = Emoji(args.size, "training", args.captions, getattr(args, "views", 1), styles,
                          getattr(args, "most_pictures", None))
        return train_set, Emoji(args.size, "unseen", args.captions, styles=styles)
    notes = Path(args.out) / "index"
    if args.captions:
        squares = args.model_name == "llamagen"
        if not args.pixels and not squares:
            raise UserError(f"--data {args.data}: give the size of pictures as --pixels, one of {', '.join(vq.PIXELS)}")
        options = dict(pixels=args.pixels, short_captions=args.short_captions, split=not args.val_data,
                       size=args.size if squares else None, notes=notes)
        train = CaptionedPictures(args.data, **options)
        return train, CaptionedPictures(args.val_data or args.data, train=False, **options)
    options = dict(zoom=args.zoom, flip=args.flip, split=not args.val_data, notes=notes)
    train = PictureFolder(args.data, args.size, **options)
    val = PictureFolder(args.val_data or args.data, args.size, train=False, **options)
    some_of_the_numbers = val.shards is not None and set(val.classes) <= set(train.classes)     # in tar files
    if train.classes != val.classes and not some_of_the_numbers:
        missing = sorted(set(train.classes) - set(val.classes))
        unknown = sorted(set(val.classes) - set(train.classes))
        raise UserError(f"--val-data {args.val_data}: its classes differ from those of {args.data}: "
                        f"{len(missing)} are missing ({', '.join(missing[:3])}), {len(unknown)} are unknown "
                        f"({', '.join(unknown[:3])})")
    return train, val


class Batches:
    """Endless lists of items (index, seed of the crop), each list a micro-batch for one process.

    They depend on seed and step alone, so that a run can continue at any step: `first`. Every epoch is a new
    permutation. Its last batch is filled up from the epoch's start. A batch is cut into contiguous micro-batches.
    Process `rank` of `world` gets those with the numbers rank, rank + world and so on.

    groups: arrays of indices, such as the pictures of one aspect ratio. A batch comes from one group.
    shards: the tar file of each item, see `permuted`.
    """

    def __init__(self, groups, batch_size, seed, first=0, micro_batches=1, rank=0, world=1, shards=None, window=1):
        self.groups = groups
        self.batch_size = batch_size
        self.seed = seed
        self.first = first
        self.micro_batches = micro_batches
        self.own = range(rank, micro_batches, world)
        self.shards = shards
        self.window = window

    def __iter__(self):
        size = self.batch_size // self.micro_batches                        # of a micro-batch
        plan = []                                                           # (group, number of its batch) of an epoch
        for i, group in enumerate(self.groups):
            plan += [(i, b) for b in range(math.ceil(len(group) / self.batch_size))]
        permuted_for = None                                                 # the epoch of `orders` and `turns`
        for step in itertools.count(self.first):
            epoch, n = divmod(step, len(plan))
            if permuted_for != epoch:
                permuted_for = epoch
                rng = np.random.default_rng((self.seed, epoch))
                orders = [self.permuted(group, rng) for group in self.groups]
                turns = rng.permutation(len(plan)) if len(orders) > 1 else range(len(plan))
            group, b = plan[turns[n]]
            places = (b * self.batch_size + np.arange(self.batch_size)) % len(orders[group])
            batch = orders[group][places]
            for m in self.own:
                yield [(int(i), (self.seed, epoch, int(i))) for i in batch[m * size:(m + 1) * size]]

    def permuted(self, group, rng):
        """A group in random order.

        Items of tar files are read faster in the order in which they lie there. So only the order of the tar files is
        entirely random. Their items are permuted within each `window` of them, as by a shuffle buffer.
        """
        if self.shards is None:
            return group[rng.permutation(len(group))]
        turn = rng.permutation(self.shards.max() + 1)
        group = group[np.argsort(turn[self.shards[group]], kind="stable")]
        starts = range(0, len(group), self.window)
        return np.concatenate([rng.permutation(group[start:start + self.window]) for start in starts])


def order_of_batches(data, args, first, micro_batches, rank, world):
    """The Batches of this process from a step on."""
    groups = getattr(data, "groups", [np.arange(len(data))])
    shards = getattr(data, "shards", None)
    return Batches(groups, args.batch_size, args.seed, first, micro_batches, rank, world, shards, args.shuffle)


# ----------------------------------------------------------------------------------------------------------------------
# Shared by the data sets


def held_out(items, train):
    """The training part or the validation part of a list. A list of fewer than 20 items is used for both."""
    if len(items) < VAL_EVERY:
        return items
    if train:
        return [item for i, item in enumerate(items, 1) if i % VAL_EVERY]
    return items[VAL_EVERY - 1::VAL_EVERY]


def spread(n, most):
    """Up to `most` of n items, evenly spread, each with a centre crop: (index, None)."""
    count = min(n, most)
    return [(i * n // count, None) for i in range(count)]


def first_readable(read, index, n, name, broken, why_none="not one picture can be read"):
    """(i, read(i)) of the first readable one of n items, from index on. Appends names of the others to broken."""
    reasons = []
    for i in itertools.chain(range(index, n), range(index)):
        try:
            return i, read(i)
        except (UserError, *UNREADABLE) as e:
            broken.append(name(i))
            reasons.append(str(e) or type(e).__name__)
    raise UserError(f"{name(index)} and {n - 1} others: {why_none}; the first: {reasons[0]}")


def report_broken(paths, data):
    """Print which files of a data set could not be read."""
    if paths:
        tqdm.write(f"skipped {len(paths)} unreadable of {len(data)} {data.kinds.split(',')[0]}: "
                   + ", ".join(sorted(paths)[:3]))


@contextmanager
def skipping(broken, name):
    """Append (name, why) to `broken` where a row of data cannot be used, and go on."""
    try:
        yield
    except UserError as e:
        broken.append((name, str(e)))
    except (OSError, *vq.MISUNDERSTOOD) as e:
        broken.append((name, f"not understood, {type(e).__name__}"))


def summary_of(broken):
    """What [(name, why)] has in common: how often each reason, and the first three names."""
    reasons = Counter(why for _, why in broken).most_common()
    counted = ", ".join(f"{why} ({count})" for why, count in reasons)
    return f"{counted}; such as {', '.join(name for name, _ in broken[:3])}"


def fingerprint_of(lines):
    """A hash of lines of text. Names of files need not be UTF-8."""
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
