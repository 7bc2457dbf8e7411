"""What the three generators of sample.py share: classes, prompts, seeds, sheets, sets for evaluation, benchmarks."""
import functools
import io
import json
import shutil
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import vq
from lib.bench import bench, print_bench, race, race_baseline
from lib.console import (MOST_SEED, UserError, check_json, check_out, check_ranges, check_writable, rank_and_world,
                         save_json)
from lib.graphs import captured, with_compiled_blocks
from lib.int8 import reduced
from lib.pictures import grid, opened, save_png, to_pixels
from lib.products import unpacked
from lib.text import encode_texts, load_t5, read_features, read_prompts
from lib.weights import find_companion
from triton_ops import INTERPRET

NPZ_CHUNK = 250                                 # pictures per file of an unfinished --npz
MOST_PICTURES = 10**6                           # of one command
MOST_ON_SHEET = 1000                            # in one .png
MOST_BATCH = 4096                               # pictures drawn at a time
LONGEST_SIDE = 4096                             # of a picture that is drawn, in pixels
MOST_GUIDANCE = 1000                            # --cfg and temperatures: far beyond what is useful, far from overflow
DEFAULTS = {  # the authors' settings for good pictures; those in a checkpoint of train.py replace them
    "var": dict(cfg=4.0, top_k=900, top_p=0.95),
    "infinity": dict(cfg=3.0, tau=0.5, top_k=0, top_p=0.97),
    "llamagen": dict(cfg=4.0, cfg_interval=-1, temperature=1.0, top_k=2000, top_p=1.0),
    "llamagen-text": dict(cfg=7.5, cfg_interval=-1, temperature=1.0, top_k=1000, top_p=1.0),
}


# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def check_generator_args(args):
    """Raise UserError for wrong values of the flags that all generators have."""
    check_ranges(("-n", args.n, 1, MOST_PICTURES), ("--batch-size", args.batch_size, 1, MOST_BATCH),
                 ("--seed", args.seed, 0, MOST_SEED), ("--top-k", args.top_k, 0, None), ("--top-p", args.top_p, 0, 1))
    if args.ckpt and args.random_weights:
        raise UserError("--ckpt and --random-weights exclude each other")
    if args.compile and INTERPRET:
        raise UserError("--compile cannot compile what TRITON_INTERPRET=1 interprets: leave one of them out")
    check_json(args, args.bench)
    if args.bench:
        args.one_generator = True                                           # as the original code, to compare with


def check_npz(args, *excluded):
    """Raise UserError if --npz cannot be written, or if it was given together with flags for single pictures."""
    if not args.npz:
        return
    check_writable(args.npz, "--npz", suffix=".npz")
    if any(getattr(args, flag[2:].replace("-", "_")) for flag in excluded):
        raise UserError(f"--npz is for whole sets of pictures: leave out {' and '.join(excluded)}")


def check_sheet(out, single, count):
    """Raise UserError if `count` pictures are too many for one .png."""
    if single and count > MOST_ON_SHEET:
        raise UserError(f"--out {out}: {count} pictures do not fit into one .png, which takes at most {MOST_ON_SHEET}; "
                        "give a folder as --out, for one file per picture")


def given(args, *names):
    """{name: value} of the flags that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def choose_labels(args, names, total, show=()):
    """The class of every picture, from --classes (ids or names) and -n.

    names: class names in the checkpoint; total: number of classes; show: names that the checkpoint suggests.
    """
    chosen = [class_id(text, names, total) for text in args.classes]
    if args.n and args.n < len(chosen):
        raise UserError(f"-n {args.n}: --classes names {len(chosen)}; leave out -n, or give {len(chosen)} or more")
    n = args.n or len(chosen) or (50 * total if args.npz else 16)
    if not chosen and not args.npz and show:
        chosen = [names.index(c) for c in show if c in names]
    elif not chosen and n < total:
        chosen = [int((i + 0.5) * total / n) for i in range(n)]
    chosen = chosen or range(total)
    return [chosen[i % len(chosen)] for i in range(n)]


def class_id(text, names, total):
    """The class that an id or a name means. Raises UserError, also for a name that several classes have."""
    found = [i for i, name in enumerate(names) if name == text]
    if len(found) > 1:
        raise UserError(f"--classes {text}: is the name of the classes {', '.join(map(str, found))}; give one of these "
                        "ids")
    if found:
        return found[0]
    if text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= total:
        return int(text)
    known = ", or a name that --list-classes prints" if names else ""
    raise UserError(f"--classes {text or repr(text)}: expected an id 0 .. {total - 1}, {total} for no class{known}")


def names_to_choose_from(args, names, total):
    """(class names for --classes and --list-classes, where they are from): the checkpoint's names, else ImageNet's.

    Released models have 1000 classes and no names. Their ids are the places of ImageNet's sorted WordNet ids, and
    torchvision has the names in this order.
    """
    by_name = args.list_classes or any(not text.isdigit() for text in args.classes)
    if names or total != 1000 or not by_name:
        return names, ""
    from torchvision.models import ResNet50_Weights
    return ResNet50_Weights.DEFAULT.meta["categories"], "names of classes: ImageNet's, from torchvision, "


def class_name(names, label):
    """The name of a class if the checkpoint has names, else its id."""
    return names[label] if label < len(names) else str(label)


def print_classes(names, source, checkpoint, total):
    """--list-classes. source: where the names are from, if not from the checkpoint."""
    lines = "\n".join(f"{i:4d}  {name}" for i, name in enumerate(names))
    print(lines or f"{checkpoint}: {total} classes, no names in the file")
    if source:
        print(f"note: {checkpoint} holds no names; {source.strip(', ')}, in the order of WordNet ids", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# Prompts


@dataclass
class Prompts:
    """The prompts of a command line."""

    texts: list                                 # one per prompt
    features: dict                              # {text: (T, Ct)}, on the CPU
    geneval: list                               # lines of a .jsonl, to be written into GenEval's folders, or None

    def path(self, folder, i, n):
        """File of picture i, if there are n of every prompt."""
        prompt, number = divmod(i, n)
        if self.geneval:
            return folder / f"{prompt:05d}" / "samples" / f"{number:04d}.png"
        return folder / (f"{prompt:05d}.png" if n == 1 else f"{prompt:05d}_{number:02d}.png")

    def write_geneval(self, folder):
        """metadata.jsonl of every prompt, as GenEval reads it."""
        for i, line in enumerate(self.geneval or []):
            (folder / f"{i:05d}").mkdir(parents=True, exist_ok=True)
            with vq.atomic(folder / f"{i:05d}" / "metadata.jsonl") as temporary:
                temporary.write_text(line)


def check_prompt_args(args):
    """Raise UserError for wrong combinations of the flags of prompts."""
    if args.prompt and args.prompts:
        raise UserError("--prompt and --prompts exclude each other")
    if args.t5 and args.features:
        raise UserError("--t5 and --features exclude each other: features are what a T5 has read already")
    if args.bench and args.prompts:
        raise UserError("--bench times one batch: give its prompts with --prompt, not with --prompts")
    if args.save_features:
        check_writable(args.save_features, "--save-features", suffix=".safetensors")


def check_prompts_out(args, default):
    """--out -> (path, whether it is one picture). With --prompts it must be a folder."""
    out, single = check_out(args.out, default.removesuffix(".png") if args.prompts else default)
    if args.prompts and single:
        raise UserError(f"--out {out}: --prompts fills a folder; give one")
    return out, single


def choose_prompts(args, model, device, width, length, show, clean=False, suffix=lambda prompt: prompt, also=()):
    """The Prompts of a command line, with the features of all prompts and of the texts in `also`.

    T5 reads all texts at once and is gone before anything is drawn. width: of the features; length: number of tokens
    that the model reads; show: the checkpoint's own prompts; clean: clean captions, but not for a T5 that was trained
    along with the model.
    """
    saved = read_features(args.features, width, length) if args.features else {}
    texts = list(args.prompt)
    geneval = None
    if args.prompts:
        texts, geneval = read_prompts(args.prompts)
    elif not texts:
        texts = [text for text in saved if text] or show
    if not texts:
        raise UserError("what to draw? Give --prompt TEXT, or --prompts FILE")
    if any(not text.strip() for text in texts):
        raise UserError("an empty prompt: say in a few words what to draw")
    texts = [suffix(text) for text in texts]
    needed = list(dict.fromkeys([*texts, *also]))
    for text in needed:
        try:
            text.encode()
        except UnicodeEncodeError:                                          # from a command line in another encoding
            way_out = "set the terminal to UTF-8, or give --prompts FILE"
            raise UserError(f"a prompt is not UTF-8: {text}; {way_out}") from None
    if args.features:
        missing = [text for text in needed if text not in saved]
        if missing:
            raise UserError(f"--features {args.features}: lacks '{missing[0]}'; write it with --save-features")
        return Prompts(texts, saved, geneval)
    encoder = model.text_encoder
    if encoder is not None and (args.t5 or getattr(args, "no_clean", False)):
        flag = f"--t5 {args.t5}" if args.t5 else "--no-clean"
        raise UserError(f"{flag}: this model has a text encoder of its own, which reads prompts as they are; leave out "
                        f"{flag.split()[0]}")
    if encoder is None:
        path = find_companion(args.t5, args.ckpt or ".", "flan-t5-xl", not args.no_download, "--t5")
        with reduced(args.quantize):
            encoder = load_t5(path, width, device="cpu" if args.quantize else device).to(device)
    features = {}
    starts = range(0, len(needed), 16)
    for start in tqdm(starts, desc="reading prompts", unit="batch", disable=len(starts) < 4, leave=False):
        batch = needed[start:start + 16]
        rows = encode_texts(encoder, batch, length, clean and model.text_encoder is None)
        features |= dict(zip(batch, rows))
    return Prompts(texts, features, geneval)


# ----------------------------------------------------------------------------------------------------------------------
# Drawing and saving


def generators(args, numbers, device):
    """A generator for each picture, seeded --seed + number; with --one-generator one for all, as in the originals."""
    if args.one_generator:
        return torch.Generator(device).manual_seed(args.seed + numbers[0])
    return [torch.Generator(device).manual_seed(args.seed + i) for i in numbers]


def in_batches(numbers, size):
    """Lists of at most `size` of the numbers, with a progress bar."""
    starts = range(0, len(numbers), size)
    for start in tqdm(starts, unit="batch", disable=len(starts) < 2, leave=False):
        yield numbers[start:start + size]


def filmstrips(images, steps_grid):
    """What `sample` returns -> (B, frames, 3, h, w). With --steps-grid it is a list with a frame per step."""
    return torch.stack(images, 1) if steps_grid else images[:, None]


def save_sheet(path, pictures, frames, titles, text):
    """All pictures as one .png. frames: the titles of filmstrips, or (); titles: of the columns of other sheets."""
    columns = len(frames)
    if not frames:
        columns = min(len(pictures), 8 if len(pictures) > 4 else 4)
    save_png(path, grid(np.stack(pictures), columns, titles=frames or titles), text)


def is_drawn(path, text):
    """Whether a readable picture exists that was made with just these settings."""
    try:
        with opened(path, path) as picture:
            picture.load()
            return {key: picture.info.get(key) for key in text} == {key: str(value) for key, value in text.items()}
    except UserError:
        return False


def write_npz(args, draw, n, side, settings, files, add=0.0):
    """--npz: all pictures as one array arr_0 (n, side, side, 3) uint8, in chunks that survive an interruption.

    draw(numbers) -> (B, 3, side, side). Every picture has its own generator, so neither the batch size nor the number
    of processes changes it. add: see to_pixels.
    """
    path = Path(args.npz)
    rank, world = rank_and_world()
    parts = path.with_name(path.name + ".parts")
    parts.mkdir(exist_ok=True)
    versions = [(str(f.resolve()), f.stat().st_size, int(f.stat().st_mtime)) for f in files]
    one_batch = args.one_generator and args.batch_size                      # then the batch size does matter
    settings = settings | {"n": n, "classes": args.classes, "files": versions, "one_generator": one_batch}
    settings = json.dumps(settings)
    note = parts / "settings.json"
    if note.exists() and note.read_bytes() != settings.encode():
        raise UserError(f"{parts}: holds pictures of other settings; delete it, or choose another --npz")
    with vq.atomic(note) as temporary:
        temporary.write_text(settings)
    starts = range(0, n, NPZ_CHUNK)
    chunks = {parts / f"{start // NPZ_CHUNK:07d}.npy": (min(NPZ_CHUNK, n - start), side, side, 3) for start in starts}
    for i, (file, shape) in enumerate(tqdm(chunks.items(), unit=f"x{NPZ_CHUNK} pictures", disable=rank > 0)):
        if i % world != rank or is_chunk(file, shape):
            continue
        if file.exists():
            tqdm.write(f"note: {file} is damaged, or holds other pictures; they are drawn again", file=sys.stderr)
        numbers = range(i * NPZ_CHUNK, i * NPZ_CHUNK + shape[0])
        batches = range(0, len(numbers), args.batch_size)
        pictures = [to_pixels(draw(numbers[first:first + args.batch_size]), add) for first in batches]
        save_chunk(file, pictures)
    others = [chunk for i, chunk in enumerate(chunks.items()) if i % world != rank]
    while rank == 0 and not all(is_chunk(*chunk) for chunk in others):      # the other processes still draw
        time.sleep(1)
    if rank == 0:
        merge_npz(path, chunks)
        shutil.rmtree(parts)                                                # with leftovers of killed processes
        print(f"{n} pictures -> {path}")


def is_chunk(path, shape):
    """Whether a file holds pictures, an undamaged uint8 array of this shape."""
    try:
        pictures = np.load(path, mmap_mode="r")
    except (OSError, *vq.MISUNDERSTOOD):
        return False
    return isinstance(pictures, np.ndarray) and pictures.dtype == np.uint8 and pictures.shape == shape


def save_chunk(path, pictures):
    """Write arrays (B, h, w, 3) uint8 as one .npy."""
    content = io.BytesIO()                                                  # numpy does not notice every full disk
    np.save(content, np.concatenate(pictures))
    with vq.atomic(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def merge_npz(path, chunks):
    """Join .npy files into one .npz without holding them in memory: 50,000 pictures of 256 pixels are 10 GB.

    chunks: {path: shape}.
    """
    shapes = list(chunks.values())
    shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    with vq.atomic(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as z:
        with z.open("arr_0.npy", "w", force_zip64=True) as f:
            np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for chunk in chunks:
                f.write(np.load(chunk).tobytes())


class NpzFile:
    """A .npz of pictures whose number is known at the end only. Used in a `with`; an error leaves no file behind.

    Pictures wait in a folder beside the file, because the header of an array begins with its size.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.chunks = {}
        self.waiting = []

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(dir=self.path.parent, prefix=f".{self.path.name}.")
        return self

    def add(self, pictures):
        """Append (B, h, w, 3) uint8."""
        self.waiting.append(pictures)
        if sum(map(len, self.waiting)) >= NPZ_CHUNK:
            self._save()

    def _save(self):
        path = Path(self.folder.name) / f"{len(self.chunks):07d}.npy"
        save_chunk(path, self.waiting)
        self.chunks[path] = (sum(map(len, self.waiting)), *self.waiting[0].shape[1:])
        self.waiting = []

    def __exit__(self, error, *_):
        with self.folder:
            if error is None:
                if self.waiting:
                    self._save()
                merge_npz(self.path, self.chunks)


# ----------------------------------------------------------------------------------------------------------------------
# Speed


def faster(model, tokenizer, device):
    """{name: (model, tokenizer)}: copies that draw the same pictures; the best first.

    On CUDA they share the weights and are faster. On a CPU packed weights are copied as dense ones, because
    torch.compile cannot take a PackedWeight, and little is gained.
    """
    if device.type != "cuda":
        return {"compile": (with_compiled_blocks(unpacked(model)), tokenizer)}
    return {"graph": (captured(model), captured(tokenizer)),
            "compile": (captured(with_compiled_blocks(model)), captured(tokenizer))}


def bench_generator(args, loaded, draw, baseline, machine, sampling, quantizer, tokens, n):
    """--bench: n pictures in one batch.

    draw(numbers, model, tokenizer) -> images; baseline(model, generator) -> the same images, as the original code
    computes them, or None if lib/baselines.py has no such setting; sampling, quantizer: the functions of these stages,
    for bench.watch; tokens: per picture.
    """
    model = loaded.model
    tokenizer = loaded.tokenizer
    device = machine.device
    decoders = [(tokenizer, name) for name in ("decode", "decode_resized", "decode_tiled")]
    stages = {"sampling": sampling, "quantizer": quantizer, "decoder": decoders}
    stages = {name: functions for name, functions in stages.items() if functions}
    parameters = [*tokenizer.parameters(), *model.parameters()]

    def run(pair=(model, tokenizer)):
        return draw(range(n), *pair)
    result = bench(loaded.name, run, stages, "transformer", parameters, device, machine.dtype, n, machine.peak_memory)
    result["products"] = str(loaded.products or "")
    if args.compile:
        variants = {}
        for variant, pair in faster(model, tokenizer, device).items():
            variants[variant] = functools.partial(run, pair)
        result["variants"] |= race(run, variants, n, device)
    if baseline and not args.quantize:
        dense = unpacked(model)

        def original():
            return baseline(dense, torch.Generator(device).manual_seed(args.seed))
        result["variants"] |= race_baseline(run, original, n, device, args.neighbour)
    else:
        print("note: lib/baselines.py has no such setting, so the original is not compared with", file=sys.stderr)
    print_bench(result, tokens)
    save_json(args.json, result)
