"""What the three generators of sample.py share: classes, prompts, seeds, sheets, sets for evaluation, benchmarks."""
import json
import shutil
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import vq
from lib.bench import bench, print_bench, race
from lib.console import UserError, check_json, check_out, check_ranges, check_writable, rank_and_world, save_json
from lib.graphs import captured, with_compiled_blocks
from lib.pictures import grid, opened, save_png, to_pixels
from lib.text import encode_texts, load_t5, read_features, read_prompts
from lib.weights import find_companion
from triton_ops import INTERPRET

NPZ_CHUNK = 250                                 # pictures per file of an unfinished --npz


# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def check_generator_args(args):
    """Raise UserError for wrong values of the flags that all generators have."""
    check_ranges(("-n", args.n, 1, None), ("--batch-size", args.batch_size, 1, None), ("--seed", args.seed, 0, None),
                 ("--top-k", args.top_k, 0, None), ("--top-p", args.top_p, 0, 1))
    if args.ckpt and args.random_weights:
        raise UserError("--ckpt and --random-weights exclude each other")
    if args.compile and INTERPRET:
        raise UserError("--compile cannot compile what TRITON_INTERPRET=1 interprets: leave one of them out")
    check_json(args, args.bench)


def check_npz(args, *excluded):
    """Raise UserError if --npz cannot be written, or if it was given together with flags for single pictures."""
    if not args.npz:
        return
    check_writable(args.npz, "--npz", suffix=".npz")
    if any(getattr(args, flag[2:].replace("-", "_")) for flag in excluded):
        raise UserError(f"--npz is for whole sets of pictures: leave out {' and '.join(excluded)}")


def given(args, *names):
    """{name: value} of the flags that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def choose_labels(args, names, total, show=()):
    """The class of every picture, from --classes (ids or names) and -n.

    names: class names in the checkpoint; total: number of classes; show: names that the checkpoint suggests.
    """
    chosen = []
    for c in args.classes:
        if c in names:
            chosen.append(names.index(c))
        elif c.isdigit() and int(c) <= total:
            chosen.append(int(c))
        else:
            known = ", or a name that --list-classes prints" if names else ""
            raise UserError(f"--classes {c}: expected an id 0 .. {total - 1}, {total} for no class{known}")
    n = args.n or len(chosen) or (50 * total if args.npz else 16)
    if not chosen and not args.npz and show:
        chosen = [names.index(c) for c in show]
    elif not chosen and n < total:
        chosen = [int((i + 0.5) * total / n) for i in range(n)]
    chosen = chosen or range(total)
    return [chosen[i % len(chosen)] for i in range(n)]


def class_name(names, label):
    """The name of a class if the checkpoint has names, else its id."""
    return names[label] if label < len(names) else str(label)


def print_classes(names, checkpoint, total):
    """--list-classes."""
    lines = "\n".join(f"{i:4d}  {name}" for i, name in enumerate(names))
    print(lines or f"{checkpoint}: {total} classes, no names in the file")


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
    if args.features:
        missing = [text for text in needed if text not in saved]
        if missing:
            raise UserError(f"--features {args.features}: lacks '{missing[0]}'; write it with --save-features")
        return Prompts(texts, saved, geneval)
    encoder = model.text_encoder
    if encoder is None:
        path = find_companion(args.t5, args.ckpt or ".", "flan-t5-xl", not args.no_download, "--t5")
        encoder = load_t5(path, width, device=device)
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


def write_npz(args, draw, n, settings, files, add=0.0):
    """--npz: all pictures as one array arr_0 (n, h, w, 3) uint8, in chunks that survive an interruption.

    draw(numbers) -> (B, 3, h, w). Every picture has its own generator, so neither the batch size nor the number of
    processes changes it. add: see to_pixels.
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
    if note.exists() and note.read_text() != settings:
        raise UserError(f"{parts}: holds pictures of other settings; delete it, or choose another --npz")
    with vq.atomic(note) as temporary:
        temporary.write_text(settings)
    chunks = [parts / f"{i:07d}.npy" for i in range(0, n, NPZ_CHUNK)]
    for i, file in enumerate(tqdm(chunks, unit=f"x{NPZ_CHUNK} pictures", disable=rank > 0)):
        if i % world != rank or file.exists():
            continue
        numbers = range(i * NPZ_CHUNK, min((i + 1) * NPZ_CHUNK, n))
        starts = range(0, len(numbers), args.batch_size)
        pictures = [to_pixels(draw(numbers[start:start + args.batch_size]), add) for start in starts]
        with vq.atomic(file) as temporary, open(temporary, "wb") as f:
            np.save(f, np.concatenate(pictures))
    while rank == 0 and not all(file.exists() for file in chunks):          # the other processes still draw
        time.sleep(1)
    if rank == 0:
        with vq.atomic(path) as temporary:
            merge_npz(temporary, chunks, n)
        shutil.rmtree(parts)                                                # with leftovers of killed processes
        print(f"{n} pictures -> {path}")


def merge_npz(path, chunks, n):
    """Join .npy files into one .npz without holding them in memory: 50,000 pictures of 256 pixels are 10 GB."""
    shape = (n, *np.load(chunks[0], mmap_mode="r").shape[1:])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z, z.open("arr_0.npy", "w", force_zip64=True) as f:
        np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for chunk in chunks:
            f.write(np.load(chunk).tobytes())


# ----------------------------------------------------------------------------------------------------------------------
# Speed


def faster(model, tokenizer, device):
    """{name: (model, tokenizer)}: copies that share the weights and draw the same pictures faster; the best first."""
    if device.type != "cuda":
        return {"compile": (with_compiled_blocks(model), tokenizer)}
    return {"graph": (captured(model), captured(tokenizer)),
            "compile": (captured(with_compiled_blocks(model)), captured(tokenizer))}


def bench_generator(args, name, draw, model, tokenizer, machine, sampling, quantizer, tokens, n, rivals=None):
    """--bench: n pictures in one batch.

    draw(numbers, model, tokenizer) -> images; sampling, quantizer: the functions of these stages, for bench.watch;
    tokens: per picture; rivals: {name: result of `race`} of other ways to do the same.
    """
    numbers = range(n)
    stages = {"sampling": sampling, "quantizer": quantizer, "decoder": [(tokenizer, "decode")]}
    stages = {name: functions for name, functions in stages.items() if functions}
    parameters = [*tokenizer.parameters(), *model.parameters()]

    def run():
        return draw(numbers, model, tokenizer)
    result = bench(name, run, stages, "transformer", parameters, machine.device, machine.dtype, n, machine.peak_memory)
    if args.compile:
        variants = {}
        for variant, pair in faster(model, tokenizer, machine.device).items():
            variants[variant] = lambda pair=pair: draw(numbers, *pair)
        result["variants"] |= race(run, variants, n, machine.device)
    if rivals:
        result["variants"] |= rivals()
    print_bench(result, tokens)
    save_json(args.json, result)
