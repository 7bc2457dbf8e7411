"""Draw pictures, reconstruct pictures, measure speed. No checkpoint given: the small one in demo/.

    python sample.py var                                            a grid of emoji, seconds on a laptop
    python sample.py var --steps-grid                               how they came to be, scale by scale
    python sample.py var --ckpt var_d16.pth --classes 207 360       the released model; fetched if it is not here
    python sample.py var --ckpt var_d30.pth --image cat.png --edit in --box 0.1 0.1 0.8 0.8
    python sample.py var --ckpt var_d16.pth -n 50000 --npz d16.npz --cfg 1.5 --top-p 0.96       for the ADM evaluator
    python sample.py var --bench --random-weights var_d16           speed, against what this machine can do
    python sample.py vq --image photo.jpg                           what the tokenizer makes of a picture
"""
import argparse
import sys


def parse_args(argv=None):
    """The command line. usage=SUPPRESS makes argparse's own complaints one line, as all of ours are."""
    style = dict(formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--ckpt", metavar="FILE|NAME", help="weights: a file, or a released name such as var_d16.pth; default: demo/")
    add("--out", metavar="PATH", help="a .png, or a folder for one file per picture; default: out/MODEL.png")
    add("--seed", type=int, default=0, help="picture i is drawn with seed + i, whatever its batch (default 0)")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add(
        "--dtype",
        default="auto",
        choices=["auto", "fp32", "bf16", "fp16"],
        help="of the matrix products and convolutions",
    )
    add("--batch-size", type=int, default=8, help="pictures drawn at a time (default 8)")
    add("--steps-grid", action="store_true", help="a filmstrip: one frame per scale")
    add("--no-download", action="store_true", help="never fetch anything")
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__, **style)
    models = parser.add_subparsers(dest="model", metavar="MODEL", required=True)

    p = models.add_parser("var", help="class -> image", parents=[common], **style)
    add = p.add_argument
    add("--vae", metavar="FILE|NAME", help="the tokenizer; default: beside --ckpt, else the released one")
    add("-n", type=int, help="how many pictures (default: one per class given, else 16)")
    add(
        "--classes",
        nargs="+",
        default=[],
        metavar="ID|NAME",
        help="repeated as needed; default: spread over all classes",
    )
    add("--list-classes", action="store_true", help="print the class names that the checkpoint knows")
    add("--cfg", type=float, help="guidance at the last scale (default 4, demo 2)")
    add("--top-k", type=int, default=900, help="keep so many tokens, 0 = all (default 900)")
    add("--top-p", type=float, default=0.95, help="then keep those that hold this share, 0 = all (default 0.95)")
    add("--smooth", action="store_true", help="mixtures of codes: smoother pictures, lower scores")
    add("--one-generator", action="store_true", help="draw a batch from one generator, as the original code does")
    add("--image", metavar="FILE", help="the picture to edit")
    add(
        "--edit",
        choices=["in", "out", "class"],
        help="redraw inside --box | outside it | inside it, as the class of --classes",
    )
    add(
        "--box",
        type=float,
        nargs=4,
        default=[0.1, 0.1, 0.8, 0.8],
        metavar=("Y0", "X0", "Y1", "X1"),
        help="shares of the picture",
    )
    add(
        "--npz",
        metavar="FILE",
        help="all pictures as one uint8 array arr_0; goes on where it was interrupted; torchrun works",
    )
    add("--bench", action="store_true", help="time it, and say which share of this machine's limit it reaches")
    add("--json", metavar="FILE", help="with --bench: the numbers as JSON")
    add("--random-weights", metavar="NAME", help="a model of this size without its file, e.g. var_d16")

    p = models.add_parser("vq", help="image -> tokens -> image", parents=[common], **style)
    p.add_argument("--image", nargs="+", default=[], metavar="FILE", help="pictures; default: some of the demo's")
    p.add_argument("--keep-size", action="store_true", help="do not cut a square; any size that the stride divides")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()                     # before the imports that take seconds: --help answers at once

import csv
import ctypes
import json
import os
import resource
import time
import urllib.error
import urllib.request
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import var
import vq

DEMO = Path(__file__).resolve().parent / "demo"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class UserError(Exception):
    """A mistake of the user's: one line that names the thing, what was expected and the way out. Exit code 2."""


# ----------------------------------------------------------------------------------------------------------------------
# Device and precision


def choose_device(name):
    """'auto' or a device name -> (torch.device, why)."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), torch.cuda.get_device_name()
        if torch.backends.mps.is_available():
            return torch.device("mps"), "Apple GPU"
        return torch.device("cpu"), "no GPU found"
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(
        name, lambda: name == "cpu"
    )
    if not available():
        raise UserError(f"--device {name}: not on this machine; use --device cpu, or leave it out")
    return torch.device(name), "as asked"


def choose_dtype(name, device):
    """'auto', 'fp32', 'bf16' or 'fp16' -> (torch.dtype, why)."""
    if name != "auto":
        return DTYPES[name], "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "this GPU computes in it"
        return torch.float16, "this GPU has no bf16"
    return torch.float32, "half precision is slow on a CPU" if device.type == "cpu" else "safe on mps"


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def keep_freed_memory():
    """Tells glibc to keep large freed blocks for the next tensor. By default it hands them back to the system and gets
    them anew page by page, zeroed: on a CPU that costs a run about 4 %. Without glibc nothing happens."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):           # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        mallopt(option, value)


class PeakMemory:
    """Peak memory in bytes of what comes after this object is made: of the GPU's allocator, or on a CPU of the process,
    less what Python and its libraries (several 100 MB) held before."""

    def __init__(self, device):
        self.device, self.before = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self.before = self._process_peak()

    @staticmethod
    def _process_peak():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss           # kilobytes, but bytes on macOS
        return peak if sys.platform == "darwin" else peak * 1024

    def __call__(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return self._process_peak() - self.before


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints by name

RELEASED = {  # file -> repository on the model hub
    "vae_ch160v4096z32.pth": "FoundationVision/var",
    "var_d16.pth": "FoundationVision/var",
    "var_d20.pth": "FoundationVision/var",
    "var_d24.pth": "FoundationVision/var",
    "var_d30.pth": "FoundationVision/var",
    "var_d36.pth": "FoundationVision/var",
}


def find_checkpoint(name, download=True):
    """A path as it is; otherwise a released name, looked for in the cache folder and then fetched into it."""
    path = Path(name)
    if path.exists():
        return path
    released = path.name if path.name in RELEASED else path.name + ".pth"
    if released not in RELEASED or path.parent != Path("."):
        raise UserError(f"{name}: no such file" + ("" if path.suffix else f", and no released model of that name "
                                                   f"({', '.join(f for f in RELEASED)})"))
    cached = Path(os.environ.get("LEGIBLE_CACHE", Path.home() / ".cache" / "legible")) / released
    if not cached.exists():
        if not download:
            raise UserError(f"{name}: not here and not in {cached.parent}, and --no-download is set")
        fetch(
            f"{os.environ.get('LEGIBLE_HUB', 'https://huggingface.co')}/{RELEASED[released]}/resolve/main/{released}",
            cached,
        )
    return cached


def fetch(url, path):
    """Downloads with a progress bar. What came before an interruption is continued; `path` appears when complete."""
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        have = partial.stat().st_size if partial.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=30) as response:
            if response.status != 206:                                      # the server starts from the beginning
                have = 0
            total = have + int(response.headers.get("Content-Length", 0))
            with (
                open(partial, "ab" if have else "wb") as f,
                tqdm(total=total or None, initial=have, unit="B", unit_scale=True, desc=path.name) as bar,
            ):
                while block := response.read(2 ** 20):
                    f.write(block)
                    bar.update(len(block))
        if total and partial.stat().st_size != total:
            raise UserError(f"{url}: broke off at {partial.stat().st_size} of {total} bytes; run again to continue")
        os.replace(partial, path)
    except urllib.error.HTTPError as e:
        if e.code == 416:  # nothing left to fetch, or another file: start anew
            partial.unlink(missing_ok=True)
        raise UserError(
            f"{url}: the server answered {e.code} ({e.reason}); get {path.name} yourself and give its path"
        ) from None
    except (urllib.error.URLError, TimeoutError, ConnectionError) as e:
        raise UserError(
            f"{url}: cannot be reached ({getattr(e, 'reason', e)}); get {path.name} yourself and give its path"
        ) from None
    except OSError as e:
        raise UserError(f"{partial}: cannot be written ({e.strerror})") from None


def find_companion(given, beside, fallback, download, flag):
    """A second file: as given, else `fallback` beside the first, else `fallback` by released name."""
    if given:
        return find_checkpoint(given, download)
    if (Path(beside).parent / fallback).exists():
        return Path(beside).parent / fallback
    if fallback in RELEASED:
        return find_checkpoint(fallback, download)
    raise UserError(f"{beside}: which tokenizer? None named {fallback} lies beside it; give {flag} FILE")


def read_metadata(path):
    """The JSON entries in a safetensors header other than the config, e.g. class names; {} for other files."""
    if Path(path).suffix != ".safetensors":
        return {}
    from safetensors import safe_open
    with safe_open(path, "pt") as f:
        return {k: json.loads(v) for k, v in (f.metadata() or {}).items()}


# ----------------------------------------------------------------------------------------------------------------------
# Reading and writing pictures


def read_picture(path):
    """An RGB PIL picture; a transparent one on white."""
    try:
        with Image.open(path) as picture:
            picture.load()
            if picture.mode in ("RGBA", "LA", "P"):
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
            return picture.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise UserError(f"{path}: not a readable picture ({e})") from None


def square(picture, side):
    """Resizes the shorter edge to `side` and cuts the centre."""
    ratio = side / min(picture.size)
    w, h = (max(side, round(s * ratio)) for s in picture.size)
    picture = picture.resize((w, h), Image.LANCZOS)
    x, y = (w - side) // 2, (h - side) // 2
    return picture.crop((x, y, x + side, y + side))


def to_tensor(picture, device):
    """PIL picture -> (1, 3, h, w) float32 in [-1, 1]."""
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].to(device).float() / 127.5 - 1


def to_pixels(images):
    """(B, 3, h, w) in [0, 1] -> uint8 array (B, h, w, 3). Truncates, as the original demo does."""
    return images.mul(255).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def grid(pictures, columns, gap=2, enlarge=None, titles=()):
    """uint8 (N, h, w, 3) -> one picture, row by row on white, small ones enlarged; titles stand over the columns."""
    n, h, w, _ = pictures.shape
    scale = enlarge or max(1, 128 // h)
    h, w = h * scale, w * scale
    top = 20 if titles else 0
    rows = -(-n // columns)
    sheet = np.full((top + rows * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = top + i // columns * (h + gap), i % columns * (w + gap)
        sheet[y:y + h, x:x + w] = picture.repeat(scale, 0).repeat(scale, 1)
    if titles:
        sheet = Image.fromarray(sheet)
        for i, title in enumerate(titles):
            ImageDraw.Draw(sheet).text(
                (i * (w + gap) + w // 2, top // 2), title, "black", ImageFont.load_default(12), anchor="mm"
            )
        sheet = np.asarray(sheet)
    return sheet


def save_png(path, picture, text=None):
    """Writes a uint8 (h, w, 3) picture with text metadata, atomically."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, str(value))
    with vq.atomic(path) as temporary:
        Image.fromarray(picture).save(temporary, "PNG", pnginfo=info)


def last_line(device, device_why, dtype, dtype_why, models, seconds, peak, where, note=""):
    """The line of truth that every run ends with."""
    name = next(name for name, d in DTYPES.items() if d == dtype)
    parameters = sum(p.numel() for model in models for p in model.parameters())
    return (f"{device} ({device_why}), {name} ({dtype_why}), {parameters / 1e6:.1f} M parameters, "
            f"{seconds:.2f} s per picture, {note}peak memory {peak() / 1e9:.2f} GB -> {where}")


def check_writable(path, flag="--out"):
    """Creates the folder of an output and makes sure, before any work, that a file can be written there."""
    folder = path if path.suffix == "" else path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.suffix and path.is_dir():
            raise OSError(21, "it is a folder")
        probe = folder / f".{os.getpid()}.probe"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise UserError(f"{flag} {path}: cannot be written ({e.strerror}); choose another place") from None
    return path


def write_pictures(out, pictures, text, names=None):
    """One file per picture in a folder; returns what to tell the user."""
    for i, picture in enumerate(pictures):
        save_png(
            out / f"{i:05d}.png", picture, text | {"seed": text["seed"] + i} | ({"class": names[i]} if names else {})
        )
    return f"{out}/00000.png .. {len(pictures) - 1:05d}.png"


# ----------------------------------------------------------------------------------------------------------------------
# Speed: how close a run comes to its bare matrix products, convolutions and attention calls

ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
             torch.ops.aten._scaled_dot_product_flash_attention.default,
             torch.ops.aten._scaled_dot_product_efficient_attention.default,
             torch.ops.aten._scaled_dot_product_cudnn_attention.default}


def attention_flops(q, k, v):
    """2 * B * H * Lq * Lk * (Dk + Dv)."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


class Heavy(TorchDispatchMode):
    """Records every matrix product, convolution and attention call: operator, layouts, scalars, and the stage."""

    def __init__(self, parameters):
        super().__init__()
        self.calls, self.stage = {}, None
        self.weights = {p.untyped_storage().data_ptr() for p in parameters}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in ATTENTION or func._overloadpacket in flop_registry:
            spec = tree_map(self._describe, (args, kwargs))
            key = (str(func), repr(spec), self.stage)
            if key not in self.calls:
                self.calls[key] = [
                    func,
                    spec,
                    self.stage,
                    self._flops(func, args, kwargs, out),
                    _bytes((args, kwargs, out)),
                    0,
                ]
            self.calls[key][-1] += 1
        return out

    def _describe(self, x):
        if not isinstance(x, torch.Tensor):
            return x
        return _Tensor(tuple(x.shape), x.stride(), x.dtype, x.device, x.untyped_storage().data_ptr() in self.weights)

    @staticmethod
    def _flops(func, args, kwargs, out):
        if func in ATTENTION:
            return attention_flops(*(a.shape for a in args[:3]))
        return flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)


class _Tensor:
    """A tensor's layout, and whether it is a weight."""

    def __init__(self, shape, stride, dtype, device, weight):
        self.shape, self.stride, self.dtype, self.device, self.weight = shape, stride, dtype, device, weight

    def __repr__(self):
        return f"{self.shape}{self.stride}{self.dtype}{self.weight}"

    def make(self):
        t = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return t.normal_() if t.is_floating_point() else t.zero_()


def _bytes(tree):
    total = 0

    def add(x):
        nonlocal total
        if isinstance(x, torch.Tensor):
            total += x.numel() * x.element_size()
    tree_map(add, tree)
    return total


def timed(run, device):
    """(seconds, result) of one run."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - start, result


def replay(func, spec, device, repeats=5):
    """Best time of one bare call on random inputs of the recorded layout.

    Activations stay in cache from call to call as they do in the model. Weights do not: each call gets another copy, of
    more than a cache holds, because in the model all other weights are read before the same one's turn comes again.
    """
    weights = []
    tree_map(lambda x: weights.append(x) if isinstance(x, _Tensor) and x.weight else None, spec)
    size = sum(np.prod(t.shape) * t.dtype.itemsize for t in weights)
    copies = int(min(16, max(1, -(-2**27 // size)))) if weights else 1      # 128 MB of them
    first = tree_map(lambda x: (x, x.make()) if isinstance(x, _Tensor) else x, spec)
    fresh = lambda x: x[1].clone() if x[0].weight else x[1]
    is_pair = lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], _Tensor)
    sets = [tree_map(lambda x: fresh(x) if is_pair(x) else x, first, is_leaf=is_pair) for _ in range(copies)]
    seconds = []
    for i in range(1 + repeats):
        args, kwargs = sets[i % copies]
        seconds.append(timed(lambda: func(*args, **kwargs), device)[0])
    return min(seconds[1:])


@contextmanager
def staged(methods, enter):
    """Wraps methods, {stage: [(object, name), ...]}: `enter(stage)` is called before each and enter(None) after."""
    wrapped = []
    for stage, places in methods.items():
        for obj, name in places:
            original = getattr(obj, name)

            def wrapper(*args, _f=original, _stage=stage, **kwargs):
                enter(_stage)
                try:
                    return _f(*args, **kwargs)
                finally:
                    enter(None)
            setattr(obj, name, wrapper)
            wrapped.append((obj, name))
    try:
        yield
    finally:
        for obj, name in wrapped:
            delattr(obj, name)


def split_by_stage(run, stages, rest, device):
    """Seconds of one run inside the methods of each stage, and in the `rest`."""
    spent = dict.fromkeys([rest, *stages], 0.0)
    now = {"stage": rest, "since": 0.0}

    def enter(stage):
        synchronize(device)
        t = time.perf_counter()
        spent[now["stage"]] += t - now["since"]
        now.update(stage=stage or rest, since=t)
    with staged(stages, enter):
        now["since"] = time.perf_counter()
        run()
        enter(None)
    return spent


def bench(name, run, stages, rest, parameters, device, dtype, pictures, peak, repeats=3):
    """Times run() -> images and compares with its bare heavy operators -> the dict that --json writes.

    stages: {name: [(object, method), ...]}; `rest` names what happens outside of them; peak: a PeakMemory from before
    the weights were loaded.
    """
    weights = sum({p.untyped_storage().data_ptr(): p.numel() * p.element_size() for p in parameters}.values())
    warmup, images = timed(run, device)
    runs = [timed(run, device) for _ in range(repeats)]
    peak_bytes = peak()
    spent = split_by_stage(run, stages, rest, device)
    heavy = Heavy(parameters)
    with staged(stages, lambda stage: setattr(heavy, "stage", stage)), heavy:
        run()
    totals = {stage: {"seconds": 0.0, "flops": 0, "bytes": 0, "bare": 0.0} for stage in spent}
    for func, spec, stage, flops, size, count in tqdm(heavy.calls.values(), desc="bare operators", leave=False):
        total = totals[stage or rest]
        total["flops"] += flops * count / pictures
        total["bytes"] += size * count / pictures
        total["bare"] += replay(func, spec, device) * count / pictures
    runs += [timed(run, device) for _ in range(repeats)]                    # before and after: a machine's speed drifts
    if not all(torch.equal(images, again) for _, again in runs):
        raise RuntimeError("the same seed gave different pictures: nothing is reported")
    best = min(seconds for seconds, _ in runs)
    for stage, total in totals.items():
        total["seconds"] = spent[stage] * best / sum(spent.values()) / pictures     # split as in that run
    whole = {k: sum(t[k] for t in totals.values()) for k in ("seconds", "flops", "bytes", "bare")}
    for total in (whole, *totals.values()):
        total["share"] = total.pop("bare") / total["seconds"]
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    return {
        "model": name,
        "device": where,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "pictures": pictures,
        "seconds_per_image": whole["seconds"],
        "warmup_seconds": warmup,
        "share": whole["share"],
        "flops": whole["flops"],
        "bytes": whole["bytes"],
        "stages": totals,
        "variants": {"plain": {"seconds": whole["seconds"], "equal": True}},
        "peak_memory_bytes": peak_bytes,
        "weight_bytes": weights,
    }


def print_bench(b, tokens):
    """The table of a bench."""
    print(f"{b['model']}  {b['device']}, {b['dtype']}, torch {b['torch']}, batch {b['pictures']}")
    print(f"{'stage':<14}{'s/picture':>10}{'GFLOP':>9}{'GFLOP/s':>9}{'GB':>7}{'share of the limit':>21}")
    for stage, s in [*b["stages"].items(), ("total", b | {"seconds": b["seconds_per_image"]})]:
        print(f"{stage:<14}{s['seconds']:>10.3f}{s['flops'] / 1e9:>9.1f}{s['flops'] / s['seconds'] / 1e9:>9.0f}"
              f"{s['bytes'] / 1e9:>7.1f}{s['share']:>21.2f}")
    warmup = b["warmup_seconds"] / b["pictures"]
    speed = tokens / b["seconds_per_image"]
    print(f"{speed:.1f} tokens/s; first run {warmup:.2f} s/picture; the share is the time of the "
          "bare\nmatrix products, convolutions and attention calls / the time of the run")
    print(f"peak memory {b['peak_memory_bytes'] / 1e9:.2f} GB, of which weights {b['weight_bytes'] / 1e9:.2f} GB")


# ----------------------------------------------------------------------------------------------------------------------
# python sample.py var


def load_var(args, device, dtype):
    """(tokenizer, transformer, metadata, name) of --ckpt, --vae, or --random-weights."""
    if args.random_weights:
        name = args.random_weights.removesuffix(".pth")
        if name not in var.CONFIGS:
            raise UserError(f"--random-weights {name}: choose one of {', '.join(var.CONFIGS)}")
        g = torch.Generator().manual_seed(args.seed)
        config = var.CONFIGS[name]
        tokenizer = vq.build(vq.VQVAE, replace(vq.CONFIGS["emoji_vq" if name == "emoji_var" else "vae_ch160v4096z32"],
                                               patch_nums=config.patch_nums)).eval()
        tokenizer.init_weights(g)
        model = vq.build(var.VAR, config).eval()
        model.init_weights(generator=g)
        vq.set_decoder_dtype(tokenizer, dtype)
        return tokenizer.to(device), var.set_dtype(model, dtype).to(device), {}, name
    ckpt = find_checkpoint(args.ckpt, not args.no_download) if args.ckpt else DEMO / "emoji_var.safetensors"
    model = var.load(ckpt, dtype=dtype)
    c = model.config
    released = (c.vocab_size, c.z_channels) == (4096, 32)
    vae = find_companion(
        args.vae, ckpt, "vae_ch160v4096z32.pth" if released else "emoji_vq.safetensors", not args.no_download, "--vae"
    )
    tokenizer = vq.load(vae, patch_nums=c.patch_nums, dtype=dtype)
    t = tokenizer.config
    if (t.vocab_size, t.z_channels) != (c.vocab_size, c.z_channels):
        raise UserError(
            f"{vae}: has {t.vocab_size} codes of {t.z_channels} channels, but {ckpt} was trained on {c.vocab_size} of "
            f"{c.z_channels}; give the tokenizer it was trained with as --vae"
        )
    return tokenizer.to(device), model.to(device), read_metadata(ckpt), Path(ckpt).name


def choose_labels(args, config, names):
    """The class of every picture, from --classes (ids or names) and -n."""
    chosen = []
    for c in args.classes:
        if c in names:
            chosen.append(names.index(c))
        elif c.lstrip("-").isdigit() and 0 <= int(c) <= config.num_classes:
            chosen.append(int(c))
        else:
            raise UserError(
                f"--classes {c}: expected an id 0 .. {config.num_classes - 1}, {config.num_classes} for no class"
                + (", or a name that --list-classes prints" if names else "")
            )
    n = args.n or (len(chosen) if chosen else 50 * config.num_classes if args.npz else 16)
    if chosen:
        return [chosen[i % len(chosen)] for i in range(n)]
    if n >= config.num_classes:
        return [i % config.num_classes for i in range(n)]
    return [int((i + 0.5) * config.num_classes / n) for i in range(n)]


def check_var_args(args):
    """What argparse does not check."""
    for flag, value, low, high in (
        ("-n", args.n, 1, None),
        ("--batch-size", args.batch_size, 1, None),
        ("--top-k", args.top_k, 0, None),
        ("--top-p", args.top_p, 0, 1),
        ("--cfg", args.cfg, 0, None),
    ):
        if value is not None and not (low <= value and (high is None or value <= high)):
            raise UserError(
                f"{flag} {value}: expected " + (f"{low} .. {high}" if high is not None else f"at least {low}")
            )
    y0, x0, y1, x1 = args.box
    if not (0 <= y0 < y1 <= 1 and 0 <= x0 < x1 <= 1):
        raise UserError(f"--box {y0} {x0} {y1} {x1}: expected 0 <= Y0 < Y1 <= 1 and 0 <= X0 < X1 <= 1")
    if bool(args.edit) != bool(args.image):
        raise UserError("--edit and --image go together: the way to edit and the picture to be edited")
    if args.edit == "class" and not args.classes:
        raise UserError("--edit class: give the new class with --classes")
    if args.ckpt and args.random_weights:
        raise UserError("--ckpt and --random-weights exclude each other")
    if args.json and not args.bench:
        raise UserError("--json goes with --bench")


def sample_var(args):
    check_var_args(args)
    device, device_why = choose_device(args.device)
    dtype, dtype_why = choose_dtype(args.dtype, device)
    out = check_writable(Path(args.out or "out/var.png")) if not (args.bench or args.npz or args.list_classes) else None
    npz = check_writable(Path(args.npz), "--npz") if args.npz else None
    if args.json:
        check_writable(Path(args.json), "--json")
    peak = PeakMemory(device)
    tokenizer, model, metadata, name = load_var(args, device, dtype)
    names = metadata.get("classes", [])
    if args.list_classes:
        print(
            "\n".join(f"{i:4d}  {c}" for i, c in enumerate(names))
            or f"{name}: {model.config.num_classes} classes, no names in the file"
        )
        return
    labels = choose_labels(args, model.config, names)
    options = dict(
        cfg=args.cfg if args.cfg is not None else metadata.get("cfg", 4.0),
        top_k=args.top_k,
        top_p=args.top_p,
        more_smooth=args.smooth,
    )
    if args.bench:
        return bench_var(args, tokenizer, model, name, labels, options, device, dtype, peak)
    settings = {"model": "var", "checkpoint": name, "seed": args.seed} | options
    if npz:
        return write_npz(args, npz, tokenizer, model, labels, options, settings, device)
    original = None
    if args.edit:
        side = tokenizer.config.stride * model.config.patch_nums[-1]
        original = to_tensor(square(read_picture(args.image), side), device)
        options |= {"given": tokenizer.tokenize(original, model.config.patch_nums),
                    "keep": var.edit_mask(args.box, model.config.patch_nums[-1], inpaint=args.edit != "out").to(device)}
        if args.edit != "class":
            labels = [model.config.num_classes] * len(labels)               # in- and out-painting know no class
        settings |= {"edit": args.edit, "box": args.box, "image": args.image}
    seconds, images = timed(lambda: draw_all(args, tokenizer, model, labels, options, device), device)
    pictures = np.concatenate([to_pixels(torch.stack(ladder, 1).flatten(0, 1)) for ladder in images])
    frames = len(pictures) // len(labels)
    named = [names[label] if label < len(names) else str(label) for label in labels]
    if out.suffix:
        titles = [f"{p}x{p}" for p in model.config.patch_nums] if args.steps_grid else ()
        if args.edit and not args.steps_grid:
            shown = [original, torch.where(mask_picture(options["keep"], side), original, 0.5)]
            pictures = np.concatenate([to_pixels(torch.cat(shown).add(1).div(2)), pictures])
            titles = ["given", "kept"]
        columns = frames if frames > 1 else min(len(pictures), 8 if len(pictures) > 4 else 4)
        save_png(out, grid(pictures, columns, titles=titles), settings | {"classes": ", ".join(named)})
        where = out
    else:
        where = write_pictures(out, pictures, settings, [c for c in named for _ in range(frames)])
    print(last_line(device, device_why, dtype, dtype_why, (tokenizer, model), seconds / len(labels), peak, where))


def mask_picture(keep, side):
    """(p, p) bool -> (1, 1, side, side) bool."""
    return keep.repeat_interleave(side // len(keep), 0).repeat_interleave(side // len(keep), 1)[None, None]


def draw_batch(args, tokenizer, model, labels, first, options, device, ladder=False):
    """Pictures first .. first + len(labels): a list of (B, 3, h, w) in [0, 1], one per scale, or just the last."""
    generator = [torch.Generator(device).manual_seed(args.seed + first + i) for i in range(len(labels))]
    if args.one_generator:
        generator = torch.Generator(device).manual_seed(args.seed + first)
    images = model.sample(tokenizer, torch.tensor(labels, device=device), generator=generator, ladder=ladder, **options)
    return images if ladder else [images]


def draw_all(args, tokenizer, model, labels, options, device):
    """All pictures, batch by batch."""
    batches = range(0, len(labels), args.batch_size)
    return [draw_batch(args, tokenizer, model, labels[i:i + args.batch_size], i, options, device, args.steps_grid)
            for i in tqdm(batches, unit="batch", disable=len(batches) == 1, leave=False)]


def write_npz(args, path, tokenizer, model, labels, options, settings, device, chunk=250):
    """All pictures as one array arr_0 (N, h, w, 3) uint8, in chunks that survive an interruption.

    Every picture has its own generator: neither the batch size nor the number of processes changes it.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    parts = path.with_name(path.name + ".parts")
    parts.mkdir(exist_ok=True)
    note = parts / "settings.json"
    wanted = json.dumps(
        settings | {"n": len(labels), "classes": args.classes, "one_generator": args.one_generator and args.batch_size}
    )
    if note.exists() and note.read_text() != wanted:
        raise UserError(f"{parts}: holds pictures of other settings; delete it, or choose another --npz")
    with vq.atomic(note) as temporary:
        temporary.write_text(wanted)
    chunks = [parts / f"{i:07d}.npy" for i in range(0, len(labels), chunk)]
    for i, file in enumerate(tqdm(chunks, unit=f"x{chunk} pictures", disable=rank > 0)):
        if i % world != rank or file.exists():
            continue
        pictures = []
        for start in range(i * chunk, min((i + 1) * chunk, len(labels)), args.batch_size):
            batch = labels[start:min(start + args.batch_size, (i + 1) * chunk)]
            pictures.append(to_pixels(draw_batch(args, tokenizer, model, batch, start, options, device)[0]))
        with vq.atomic(file) as temporary, open(temporary, "wb") as f:
            np.save(f, np.concatenate(pictures))
    while rank == 0 and not all(file.exists() for file in chunks):          # the other processes' share
        time.sleep(1)
    if rank == 0:
        with vq.atomic(path) as temporary:
            merge_npz(temporary, chunks, len(labels))
        for file in [*chunks, note]:
            file.unlink()
        parts.rmdir()
        print(f"{len(labels)} pictures -> {path}")


def merge_npz(path, chunks, n):
    """Streams .npy chunks into one .npz: 50,000 pictures of 256 pixels are 10 GB and need not be in memory at once."""
    first = np.load(chunks[0], mmap_mode="r")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z, z.open("arr_0.npy", "w", force_zip64=True) as f:
        np.lib.format.write_array_header_1_0(
            f, {"descr": "|u1", "fortran_order": False, "shape": (n, *first.shape[1:])}
        )
        for chunk in chunks:
            f.write(np.load(chunk).tobytes())


def bench_var(args, tokenizer, model, name, labels, options, device, dtype, peak):
    """--bench: -n pictures in one batch (default one)."""
    labels = labels[:args.n or 1]
    run = lambda: draw_batch(args, tokenizer, model, labels, 0, options, device)[0]
    stages = {
        "sampling": [(model, "_draw")],
        "quantizer": [(tokenizer.quantize, "contribution"), (tokenizer.quantize, "next_input")],
        "decoder": [(tokenizer, "decode")],
    }
    parameters = [*tokenizer.parameters(), *model.parameters()]
    result = bench(name, run, stages, "transformer", parameters, device, dtype, len(labels), peak)
    print_bench(result, sum(p * p for p in model.config.patch_nums))
    if args.json:
        with vq.atomic(args.json) as temporary:
            temporary.write_text(json.dumps(result, indent=1))


# ----------------------------------------------------------------------------------------------------------------------
# python sample.py vq


def demo_tiles():
    """The demo sheet as PIL pictures, and the rows of its table (index, category, subcategory, name)."""
    with open(DEMO / "emoji64.tsv", encoding="utf-8") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    sheet = read_picture(DEMO / "emoji64.webp")
    per_row = sheet.width // 64
    box = lambda i: (i % per_row * 64, i // per_row * 64, i % per_row * 64 + 64, i // per_row * 64 + 64)
    return [sheet.crop(box(i)) for i in range(len(rows))], rows


def sample_vq(args):
    """Pictures, and below each what is left of it: by default after all scales, with --steps-grid after every one."""
    device, device_why = choose_device(args.device)
    dtype, dtype_why = choose_dtype(args.dtype, device)
    out = check_writable(Path(args.out or "out/vq.png"))
    peak = PeakMemory(device)
    tokenizer = vq.load(
        find_checkpoint(args.ckpt, not args.no_download) if args.ckpt else DEMO / "emoji_vq.safetensors", dtype=dtype
    )
    c, tokenizer = tokenizer.config, tokenizer.to(device)
    tiles = [read_picture(file) for file in args.image] if args.image else demo_tiles()[0][19::240]
    rows, scores, used, seconds = [], [], set(), 0.0
    for picture in tqdm(tiles, unit="picture", leave=False, disable=len(tiles) < 8):
        picture, patch_nums = fit(picture, c, args.keep_size)
        image = to_tensor(picture, device)
        elapsed, (indices, ladder) = timed(lambda: both_ways(tokenizer, image, patch_nums), device)
        seconds += elapsed
        used |= set(torch.cat(indices, 1).flatten().tolist())
        scores.append(10 * torch.log10(4 / (ladder[-1] - image).square().mean()).item())    # [-1, 1]: the peak is 2
        rows.append(to_pixels(torch.cat([image, *(ladder if args.steps_grid else ladder[-1:])]).add(1).div(2)))
    titles = ["original"] + ([f"{p}x{p}" for p in c.patch_nums] if args.steps_grid else ["decoded"])
    if len({row.shape for row in rows}) == 1 and out.suffix:
        if args.steps_grid:
            sheet = grid(np.concatenate(rows), len(titles), titles=titles)
        else:
            sheet = grid(np.concatenate([np.stack([row[i] for row in rows]) for i in range(2)]), len(rows))
        save_png(out, sheet, {"model": "vq", "checkpoint": args.ckpt or "demo"})
    else:                                                                   # sizes differ: one file per picture
        out = out.with_suffix("")
        check_writable(out)
        for i, row in enumerate(rows):
            save_png(
                out / f"{i:05d}.png",
                grid(row, len(row), titles=titles),
                {"model": "vq", "checkpoint": args.ckpt or "demo"},
            )
    note = f"PSNR {np.mean(scores):.2f} dB, {len(used)} of {c.vocab_size} codes used, "
    print(last_line(device, device_why, dtype, dtype_why, (tokenizer,), seconds / len(rows), peak, out, note))


def fit(picture, config, keep_size):
    """The picture at a size that the tokenizer takes, and the schedule that goes with it."""
    stride, last = config.stride, config.patch_nums[-1]
    if not keep_size:
        return square(picture, stride * last), config.patch_nums
    w, h = picture.width // stride, picture.height // stride                # in cells
    if min(w, h) < 1:
        raise UserError(
            f"a picture of {picture.width}x{picture.height} is smaller than one cell of {stride}x{stride} pixels"
        )
    patch_nums = [(max(1, round(p * h / last)), max(1, round(p * w / last))) for p in config.patch_nums]
    return picture.crop((0, 0, w * stride, h * stride)), patch_nums


def both_ways(tokenizer, image, patch_nums):
    indices = tokenizer.tokenize(image, patch_nums)
    return indices, tokenizer.detokenize(indices, patch_nums, ladder=True)


# ----------------------------------------------------------------------------------------------------------------------

MODELS = {"var": sample_var, "vq": sample_vq}


def guarded(run, args):
    """Runs a command. Mistakes of the user's become one line and exit code 2, Ctrl-C 130; a bug shows itself."""
    keep_freed_memory()
    try:
        run(args)
    except (UserError, vq.CheckpointError) as e:
        sys.exit(_complain(e))
    except torch.OutOfMemoryError as e:
        sys.exit(_complain(f"out of GPU memory; try a smaller --batch-size or --dtype bf16 ({str(e).splitlines()[0]})"))
    except OSError as e:
        sys.exit(_complain(f"{e.filename or 'output'}: {e.strerror or e}"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _complain(message):
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    guarded(MODELS[ARGS.model], ARGS)
