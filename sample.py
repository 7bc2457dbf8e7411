"""Draw pictures, reconstruct pictures, measure speed. No checkpoint given: the small one in demo/.

    python sample.py var                                            a grid of emoji, seconds on a laptop
    python sample.py var --steps-grid                               how they came to be, scale by scale
    python sample.py var --ckpt var_d16.pth --classes 207 360       the released model; fetched if it is not here
    python sample.py var --ckpt var_d30.pth --image cat.png --edit in --box 0.1 0.1 0.8 0.8
    python sample.py var --ckpt var_d16.pth -n 50000 --npz d16.npz --cfg 1.5 --top-p 0.96       for the ADM evaluator
    python sample.py var --bench --compile --random-weights var_d16         speed, against what this machine can do
    python sample.py infinity --prompt "grinning cat face"          text -> emoji
    python sample.py infinity --ckpt infinity_2b_reg.pth --prompt "a red fox in the snow" --aspect 1.5
    python sample.py llamagen --classes heart cat-face --cfg 1.5 4  class -> emoji, token by token
    python sample.py llamagen --prompt "red heart"                  text -> emoji, likewise
    python sample.py llamagen --ckpt c2i_L_384.pt --classes 207 360
    python sample.py vq --image photo.jpg                           what the tokenizer makes of a picture
    python sample.py latentsync                                     a drawn head says something else
    python sample.py latentsync --ckpt latentsync_1.5.pt --video talk.mp4 --audio speech.wav --out dubbed.mp4
    python sample.py syncnet --video clip.mp4                       is its sound in step? offset, confidence, distance
    python sample.py ops --bench                                    speed of the fused kernels, one by one
"""
import argparse
import sys


OWN = "else the checkpoint's own, else"                # where a setting comes from that is not given


def common_args(add):
    """Flags of all that make pictures."""
    add("--ckpt", metavar="FILE|NAME", help="weights: a file, or a released name such as var_d16.pth; default: demo/")
    add("--out", metavar="PATH", help="a .png, or a folder for one file per picture; default: out/MODEL.png")
    add("--seed", type=int, default=0, help="picture i is drawn with seed + i, whatever its batch (default 0)")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"],
        help="of the matrix products and convolutions")
    add("--batch-size", type=int, default=8, help="pictures drawn at a time (default 8)")
    add("--steps-grid", action="store_true", help="a filmstrip: how each picture came to be")
    add("--no-download", action="store_true", help="never fetch anything")


def generator_args(add):
    """Flags of all that draw."""
    add("--vae", "--vq", dest="vae", metavar="FILE|NAME",
        help="the tokenizer; default: beside --ckpt, else the released one")
    add("--one-generator", action="store_true", help="draw a batch from one generator, as the original code does")
    add("--compile", action="store_true",
        help="warm up longer, then draw faster: CUDA graphs; without CUDA torch.compile, which gains little")
    add("--bench", action="store_true", help="time it, and say which share of this machine's limit it reaches")
    add("--json", metavar="FILE", help="with --bench: the numbers as JSON")
    add("--random-weights", metavar="NAME", help="a model of this size without its file, e.g. var_d16")


def class_args(add):
    """Flags of all that draw classes."""
    add("--classes", nargs="+", default=[], metavar="ID|NAME", help="default: the checkpoint's choice, else all")
    add("--list-classes", action="store_true", help="print the class names that the checkpoint knows")
    add("--npz", metavar="FILE",
        help="all pictures as one uint8 array arr_0; goes on where it was interrupted; torchrun works")


def prompt_args(add):
    """Flags of all that read text."""
    add("--prompt", nargs="+", default=[], metavar="TEXT", help="one or more; default: the checkpoint's choice")
    add("--prompts", metavar="FILE", help="one per line, or jsonl with \"prompt\" (GenEval's folders are made then); a "
        "folder is filled, and goes on where it was interrupted")
    add("--t5", metavar="DIR", help="folder of google/flan-t5-xl; default: beside --ckpt, else fetched")
    add("--features", metavar="FILE", help="prompts and their text features from --save-features: no T5 is needed then")
    add("--save-features", metavar="FILE", help="write those of the prompts, and draw nothing")


def var_args(add):
    """Flags of `sample.py var` alone."""
    add("-n", type=int, help="how many pictures (default: one per class given, else 16)")
    add("--cfg", type=float, help=f"guidance at the last scale; {OWN} 4")
    add("--top-k", type=int, help=f"keep so many tokens, 0 = all; {OWN} 900")
    add("--top-p", type=float, help=f"then keep those that hold this share, 0 = all; {OWN} 0.95")
    add("--smooth", action="store_true", help="mixtures of codes: smoother pictures, lower scores")
    add("--image", metavar="FILE", help="the picture to edit")
    add("--edit", choices=["in", "out", "class"],
        help="redraw inside --box | outside it | inside it, as the class of --classes")
    add("--box", type=float, nargs=4, default=[0.1, 0.1, 0.8, 0.8], metavar=("Y0", "X0", "Y1", "X1"),
        help="shares of the picture")


def infinity_args(add):
    """Flags of `sample.py infinity` alone."""
    add("-n", type=int, default=1, help="pictures of each prompt (default 1)")
    add("--negative", metavar="TEXT", help="what to stay away from")
    add("--face-suffix", action="store_true", help="the authors' addition to prompts about people")
    add("--cfg", type=float, nargs="+", help=f"guidance, 1: none; one for all scales, or one each; {OWN} 3")
    add("--tau", type=float, nargs="+", help=f"temperature; one for all scales, or one each; {OWN} 0.5")
    add("--top-k", type=int, help=f"1: always the likelier value of a bit, 0: draw; {OWN} 0")
    add("--top-p", type=float, help=f"draw only bits whose likelier value has at most this probability; {OWN} 0.97")
    add("--guide-features", type=int, metavar="BLOCK", help="guide the features after it (-1: the last block)")
    add("--aspect", type=float, help="height / width, 0.333 .. 3; the nearest of 15 is taken (default 1)")
    add("--pixels", metavar="SIZE", help="0.06M, 0.25M, 0.60M or 1M; default: what the checkpoint was trained for")
    add("--image", metavar="FILE", help="a picture whose first --keep scales are kept")
    add("--keep", type=int, default=4, metavar="N", help="with --image (default 4): few keep its colors and layout, "
        "all of them reconstruct it")
    add("--tile", type=int, default=0, metavar="CELLS", help="decode in tiles of so many cells a side: less memory, "
        "and nearly the same picture; 0: at once")


def llamagen_args(add):
    """Flags of `sample.py llamagen` alone."""
    add("-n", type=int, help="how many pictures (default: one per class given, else 16), or of each prompt (default 1)")
    add("--no-clean", action="store_true", help="give prompts to T5 as they are; by default they are cleaned like the "
        "captions it was trained with, which needs ftfy and beautifulsoup4")
    add("--cfg", type=float, nargs="+", help=f"guidance, 1: none; one for all, or one each; {OWN} 4 (text 7.5)")
    add("--cfg-interval", type=int, help=f"guide only the first so many tokens + 2, -1: all; {OWN} -1")
    add("--temperature", type=float, help=f"0: always the likeliest token; {OWN} 1")
    add("--top-k", type=int, help=f"keep so many tokens, 0 = all; {OWN} 2000 (text 1000)")
    add("--top-p", type=float, help=f"then keep those that hold this share, 0 or 1 = all; {OWN} 1")
    add("--size", type=int, metavar="PIXELS", help="that the model was trained for, if its file does not tell")
    add("--eval-size", type=int, metavar="PIXELS", help="resize pictures as the authors did to measure FID: 256")


def vq_args(add):
    """Flags of `sample.py vq` alone."""
    add("--image", nargs="+", default=[], metavar="FILE", help="pictures; default: some of the demo's")
    add("--keep-size", action="store_true", help="do not cut a square; any size that the stride divides")


def syncnet_args(add):
    """Flags of `sample.py syncnet` alone."""
    add("--video", metavar="FILE", help="default: the demo's")
    add("--audio", metavar="FILE", help="another sound than the video's own")
    add("--ckpt", metavar="FILE|NAME", help="syncnet_v2.model (Sync-C, Sync-D), stable_syncnet.pt, or one of train.py; "
        "default: demo/")
    add("--face", nargs="+", default=["auto"], metavar="WHERE", help="whole: the video is a face, aligned or cropped; "
        "detect: find and follow faces; X0 Y0 X1 Y1: a box in pixels; auto: whole if it is square, else detect")
    add("--max-shift", type=int, default=15, metavar="FRAMES", help="of the sound, to both sides (default 15)")
    add("--batch-size", type=int, default=16, help="clips at a time (default 16)")
    add("--out", metavar="FILE", help="the curve, a .png; default: out/syncnet.png")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    add("--no-download", action="store_true", help="never fetch anything")


def latentsync_args(add):
    """Flags of `sample.py latentsync` alone."""
    add("--video", metavar="FILE", help="who is to speak; default: the demo's")
    add("--audio", metavar="FILE", help="what: a sound file, or a video with sound (for the demo's video the demo's); "
        "the result has it in mono")
    add("--ckpt", metavar="FILE|NAME", help="weights: a file, or latentsync_1.0.pt, latentsync_1.5.pt, "
        "latentsync_1.6.pt; default: demo/")
    add("--vae", metavar="DIR|NAME", help="the autoencoder; default: sd-vae-ft-mse")
    add("--whisper", metavar="FILE|NAME", help="the audio encoder; default: beside --ckpt, else whisper_tiny.pt")
    add("--resolution", type=int, choices=[256, 512], help="of the faces; default: 512 if --ckpt names version 1.6")
    add("--out", metavar="FILE", help="an .mp4; default: out/latentsync.mp4")
    add("--steps", type=int, default=20, help="of diffusion (default 20)")
    add("--cfg", type=float, help="guidance, useful from 1, none, to 3; default: the demo's own, else 1.5")
    add("--seed", type=int, default=1247, help="draws what the original draws (default 1247)")
    add("--deep-cache", action="store_true", help="most of the network in every third step only: faster, nearly alike")
    add("--overlap", type=int, default=0, metavar="FRAMES",
        help="paint the last frames of each 16 again with the next ones, and cross-fade: no seams (default 0)")
    add("--face", type=int, default=1, metavar="N", help="of several faces the N-th largest (default 1)")
    add("--landmarks", metavar="FILE.npz", help="instead of looking for faces: an array `landmarks` (frames, N, 2) in "
        "pixels, 25 frames a second, N = 3 (brows, nose), 5, 106 or 478; nan where there is no face")
    add("--aligned", action="store_true", help="the video shows nothing but an aligned face")
    add("--detect-every", type=int, metavar="FRAMES", help="look for faces in every such frame; default: 1, on a CPU 3")
    add("--decode", type=int, default=4, metavar="FRAMES",
        help="that the autoencoder gets at a time: less memory if fewer (default 4)")
    add("--crf", type=int, default=13, help="quality of the video that is written, 0 best, 51 worst (default 13)")
    add("--steps-grid", action="store_true", help="write face, masked, painted, and pasted back, side by side")
    add("--syncnet", metavar="FILE|NAME", help="judge the video before and after by this stable_syncnet.pt")
    add("--compile", action="store_true", help="warm up longer, then paint faster: CUDA graphs; else torch.compile")
    add("--bench", action="store_true", help="time it, and say which share of this machine's limit it reaches")
    add("--frames", type=int, help="painted at a time (default: as trained, 16)")
    add("--json", metavar="FILE", help="with --bench: the numbers as JSON")
    add("--random-weights", metavar="NAME", help="a model of this size without its file, e.g. latentsync_1.5")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    add("--no-download", action="store_true", help="never fetch anything")


def ops_args(add):
    """Flags of `sample.py ops` alone."""
    add("--bench", nargs="*", metavar="OP", help="time these, or all, against plain and compiled torch")
    add("--json", metavar="FILE", help="with --bench: the numbers as JSON")
    add("--device", default="auto", choices=["auto", "cuda", "cpu"])
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"])


COMMANDS = {  # name: what it does, whose flags it has
    "var": ("class -> image", common_args, generator_args, class_args, var_args),
    "infinity": ("text -> image", common_args, generator_args, prompt_args, infinity_args),
    "llamagen": ("class or text -> image", common_args, generator_args, class_args, prompt_args, llamagen_args),
    "vq": ("image -> tokens -> image", common_args, vq_args),
    "latentsync": ("video and speech -> the video says it", latentsync_args),
    "syncnet": ("does this mouth say this sound?", syncnet_args),
    "ops": ("what the ops of triton_ops.py move, and how fast they are", ops_args),
}


def parse_args(argv=None):
    """The command line. usage=SUPPRESS makes argparse's own complaints one line, as all of ours are."""
    style = dict(formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__, **style)
    models = parser.add_subparsers(dest="model", metavar="MODEL", required=True)
    for name, (what, *groups) in COMMANDS.items():
        command = models.add_parser(name, help=what, **style)
        for flags in groups:
            flags(command.add_argument)
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()                     # before the imports that take seconds: --help answers at once

import copy
import csv
import ctypes
import functools
import itertools
import json
import math
import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import infinity
import latentsync
import llamagen
import syncnet
import var
import vq
from syncnet import FPS, SAMPLE_RATE
from triton_ops import INTERPRET, REGISTRY, BackendError, backend, use_triton

DEMO = Path(__file__).resolve().parent / "demo"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class UserError(Exception):
    """A mistake of the user's: one line that names the thing, what was expected and the way out. Exit code 2."""


class MissingPackage(UserError):
    """An optional package is needed now."""


# ----------------------------------------------------------------------------------------------------------------------
# Device and precision


def choose_device(name):
    """'auto' or a device name -> (torch.device, why). Raises BackendError if OPS_BACKEND cannot be had on it."""
    device, why = _choose_device(name)
    use_triton(torch.empty(1, device=device))
    return device, why


def _choose_device(name):
    if name == "auto":
        if torch.cuda.is_available():
            return this_process_gpu(), torch.cuda.get_device_name()
        if torch.backends.mps.is_available():
            return torch.device("mps"), "Apple GPU"
        return torch.device("cpu"), "no GPU found"
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(
        name, lambda: name == "cpu"
    )
    if not available():
        raise UserError(f"--device {name}: not on this machine; use --device cpu, or leave it out")
    return this_process_gpu() if name == "cuda" else torch.device(name), "as asked"


def place_of_process():
    """(number of this process, how many there are), as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def this_process_gpu():
    """The GPU of this process: the first, or under torchrun one for each."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


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
    """Waits for the work given to a GPU: before a clock is read."""
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
    for option, value in ((-4, 0), (-1, -1), (-2, 2**26)):                  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
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
        try:
            import resource
        except ImportError:                                                 # Windows
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss           # kilobytes, but bytes on macOS
        return peak if sys.platform == "darwin" else peak * 1024

    def __call__(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return self._process_peak() - self.before


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints by name

RELEASED = {  # file -> repository on the model hub, or address
    "vae_ch160v4096z32.pth": "FoundationVision/var",
    "var_d16.pth": "FoundationVision/var",
    "var_d20.pth": "FoundationVision/var",
    "var_d24.pth": "FoundationVision/var",
    "var_d30.pth": "FoundationVision/var",
    "var_d36.pth": "FoundationVision/var",
    **{f"infinity_vae_{d}.pth": "FoundationVision/Infinity" for d in ("d16", "d24", "d32", "d32reg", "d64",
                                                                      "d56_f8_14_patchify")},
    "infinity_125M_256x256.pth": "FoundationVision/Infinity",
    "infinity_2b_reg.pth": "FoundationVision/Infinity",
    **{f"{name}.pt": "FoundationVision/LlamaGen" for name in (
        "vq_ds16_c2i", "vq_ds8_c2i", "c2i_B_256", "c2i_B_384", "c2i_L_256", "c2i_L_384", "c2i_XL_384", "c2i_XXL_384",
        "c2i_3B_384")},
    **{f"{name}.pt": "peizesun/llamagen_t2i" for name in ("vq_ds16_t2i", "t2i_XL_stage1_256", "t2i_XL_stage2_512")},
    "stable_syncnet.pt": "ByteDance/LatentSync-1.6",
    "latentsync_1.0.pt": "ByteDance/LatentSync:latentsync_unet.pt",         # of these the names say too little
    "latentsync_1.5.pt": "ByteDance/LatentSync-1.5:latentsync_unet.pt",
    "latentsync_1.6.pt": "ByteDance/LatentSync-1.6:latentsync_unet.pt",
    "whisper_tiny.pt": "ByteDance/LatentSync-1.6:whisper/tiny.pt",
    "syncnet_v2.model": "http://www.robots.ox.ac.uk/~vgg/software/lipsync/data/",
}
FOLDERS = {  # folder -> repository and folder in it, files; shards come as the index names them
    "infinity_8b_weights": ("FoundationVision/Infinity", "infinity_8b_weights/", ["model.safetensors.index.json"]),
    "infinity_8b_512x512_weights": ("FoundationVision/Infinity", "infinity_8b_512x512_weights/",
                                    ["model.safetensors.index.json"]),
    "sd-vae-ft-mse": ("stabilityai/sd-vae-ft-mse", "", ["config.json", "diffusion_pytorch_model.safetensors"]),
    "flan-t5-xl": ("google/flan-t5-xl", "", ["tokenizer.json", "model.safetensors.index.json"]),
}


def cache_folder():
    """Where what is fetched is kept."""
    return Path(os.environ.get("LEGIBLE_CACHE", Path.home() / ".cache" / "legible"))


def fetch_folder(name, folder):
    """A released folder of shards: what is there already stays."""
    repository, inside, files = FOLDERS[name]
    files = list(files)
    for file in files:                                                      # grows by what the index names
        fetch_once(address_of(repository, inside + file), folder / file)
        if file.endswith(".index.json"):
            files += sorted(set(json.loads((folder / file).read_text())["weight_map"].values()))
    return folder


def address_of(home, file):
    """Where a file lies whose home is an address, or a repository of the hub, maybe with the file's name there."""
    if home.startswith("http"):
        return home + file
    home, _, there = home.partition(":")
    file = there or file
    return f"{os.environ.get('LEGIBLE_HUB', 'https://huggingface.co')}/{home}/resolve/main/{file}"


def fetch_once(address, path):
    """A file, unless it is there. Under torchrun the first process fetches and the others wait."""
    if not path.exists() and place_of_process()[0] == 0:
        fetch(address, path)
    while not path.exists():
        time.sleep(1)
    return path


def find_checkpoint(name, download=True):
    """A path as it is; otherwise a released name, looked for in the cache folder and then fetched into it."""
    path = Path(name)
    if path.exists():
        return path
    if name in FOLDERS:
        cached = cache_folder() / name
        if not download and not cached.exists():
            raise UserError(f"{name}: not here and not in {cached.parent}, and --no-download is set")
        return fetch_folder(name, cached) if download else cached
    released = next((path.name + end for end in ("", ".pth", ".pt") if path.name + end in RELEASED), None)
    if released is None or path.parent != Path("."):
        raise UserError(f"{name}: no such file" + ("" if path.suffix else f", and no released model of that name "
                                                   f"({', '.join([*RELEASED, *FOLDERS])})"))
    cached = cache_folder() / released
    if not cached.exists() and not download:
        raise UserError(f"{name}: not here and not in {cached.parent}, and --no-download is set")
    return fetch_once(address_of(RELEASED[released], released), cached)


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
    if fallback in RELEASED or fallback in FOLDERS:
        return find_checkpoint(fallback, download)
    what = "tokenizer" if flag == "--vae" else flag[2:]
    raise UserError(f"{beside}: which {what}? None named {fallback} lies beside it; give {flag} FILE")


def read_metadata(path):
    """What train.py wrote into a safetensors header besides the config: class names, tokenizer; {} for other files."""
    if Path(path).suffix != ".safetensors":
        return {}
    from safetensors import safe_open
    with safe_open(path, "pt") as f:
        metadata = f.metadata() or {}
    known = ("classes", "show", "sampling", "tokenizer", "pixels", "text_encoder")
    return {k: json.loads(metadata[k]) for k in known if k in metadata}


def check_pair(tokenizer, vae, config, metadata, ckpt):
    """Makes sure that a VAR is used with the tokenizer it was trained on, as far as the files tell."""
    t = tokenizer.config
    if (t.vocab_size, t.z_channels) != (config.vocab_size, config.z_channels):
        raise UserError(f"{vae}: has {t.vocab_size} codes of {t.z_channels} channels, but {ckpt} was trained on "
                        f"{config.vocab_size} of {config.z_channels}; give the tokenizer it was trained with as --vae")
    check_fingerprint(tokenizer, vae, metadata, ckpt)


def check_fingerprint(tokenizer, vae, metadata, ckpt):
    """Makes sure of the very tokenizer, where train.py wrote down which it was."""
    if metadata.get("tokenizer", vq.fingerprint(tokenizer)) != vq.fingerprint(tokenizer):
        raise UserError(f"{vae}: is not the tokenizer that {ckpt} was trained with; give that as --vae")


def load_llamagen(path, **options):
    """llamagen.load; a text encoder that was trained along, as in the demo, comes with it."""
    if encoder := read_metadata(path).get("text_encoder"):
        options["text_encoder"] = infinity.T5Encoder(infinity.T5Config(**encoder))
    return llamagen.load(path, **options)


def load_t5(path, width, device):
    """Flan-T5, in half precision on a GPU. width: of the features that a model reads."""
    t5 = infinity.load_t5(path, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    if t5.config.width != width:
        raise UserError(f"--t5 {path}: has features of {t5.config.width} numbers, but the model reads {width}; all "
                        "released ones use google/flan-t5-xl")
    return t5


@torch.no_grad()
def encode_texts(t5, texts, slots, clean=False):
    """Features of texts, a list of (n, Ct) on the host, of at most `slots` tokens each. clean: as LlamaGen does."""
    read = texts
    if clean:
        try:
            read = [llamagen.clean_caption(llamagen.clean_caption(text)) for text in texts]
        except ImportError as e:
            raise UserError(f"cleaning prompts as the authors did needs {e.name}: pip install ftfy beautifulsoup4, or "
                            "leave it out with --no-clean") from None
    lengths = t5.tokenize(read, slots + 1)[1].sum(1).tolist()
    for text, n in zip(texts, lengths):
        if n > slots:
            tqdm.write(f"note: only the first {slots} tokens are read of: {text[:60]}...", file=sys.stderr)
    features, _ = t5.encode(read, slots)
    return [f[:n].cpu() for f, n in zip(features, lengths)]


# ----------------------------------------------------------------------------------------------------------------------
# Reading and writing pictures


def open_picture(path):
    """An RGB PIL picture: turned as its EXIF says, 16 bits as 8, transparent parts on white. Raises what PIL raises."""
    with Image.open(path) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):
            picture = Image.fromarray((np.asarray(picture).astype(np.int64) // 257).clip(0, 255).astype(np.uint8))
        if "A" in picture.mode or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)   # what PIL raises for broken files


def read_picture(path):
    """open_picture, for a path that a user gave."""
    try:
        return open_picture(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UNREADABLE as e:
        raise UserError(f"{path}: not a readable picture ({e})") from None


def cover(picture, h, w):
    """Resizes so that h x w is covered, and cuts the centre."""
    ratio = max(h / picture.height, w / picture.width)
    sides = max(w, round(picture.width * ratio)), max(h, round(picture.height * ratio))
    picture = picture.resize(sides, Image.LANCZOS)
    x, y = (picture.width - w) // 2, (picture.height - h) // 2
    return picture.crop((x, y, x + w, y + h))


def to_input(pixels, device):
    """uint8 (B, 3, h, w) -> float32 in [-1, 1] on the device."""
    return pixels.to(device).float().div_(127.5).sub_(1)


def to_tensor(picture, device):
    """PIL picture -> (1, 3, h, w) float32 in [-1, 1]."""
    return to_input(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None], device)


def to_pixels(images, add=0.0):
    """(B, 3, h, w) in [0, 1] -> uint8 array (B, h, w, 3); truncates, after adding 0 (as VAR) or 0.5 (as LlamaGen)."""
    return images.mul(255).add(add).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of pictures (B, 3, h, w) in [-1, 1] -> (B,)."""
    return 10 * torch.log10(4 / (a - b).square().mean((1, 2, 3)))           # the peak is 2


def ssim(a, b):
    """Structural similarity of images (B, 3, h, w) in [-1, 1], at least 11 x 11 pixels -> (B,), 1 for equal ones (Wang
    et al. 2004: a Gaussian window of deviation 1.5)."""
    bell = torch.exp(-torch.arange(-5, 6, device=a.device) ** 2 / 4.5)
    window = (bell[:, None] * bell / bell.sum() ** 2).expand(3, 1, 11, 11)
    mean = lambda x: F.conv2d(x, window, groups=3)
    ma, mb = mean(a), mean(b)
    va, vb, both = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    c1, c2 = 0.02**2, 0.06**2                                               # (0.01 and 0.03 of the range, 2) squared
    similar = (2 * ma * mb + c1) * (2 * both + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    return similar.mean((1, 2, 3))


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


def last_line(device, device_why, dtype, dtype_why, models, seconds, peak, where, note="", unit="picture"):
    """The line of truth that every run ends with."""
    name = next(name for name, d in DTYPES.items() if d == dtype)
    parameters = sum(p.numel() for model in models for p in model.parameters())
    return (f"{device} ({device_why}), {name} ({dtype_why}), {parameters / 1e6:.1f} M parameters, "
            f"{seconds:.2f} s per {unit}, {note}peak memory {peak() / 1e9:.2f} GB -> {where}")


def check_writable(path, flag="--out", suffix=None):
    """Makes sure, before any work, that a file of that suffix, or files in that folder (no suffix), can be written."""
    path = Path(path)
    if suffix and path.suffix != suffix:
        raise UserError(f"{flag} {path}: expected a name that ends in {suffix}")
    folder = path.parent if suffix else path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if suffix and path.is_dir():
            raise OSError(21, "it is a folder")
        probe = folder / f".{os.urandom(6).hex()}.probe"                    # other machines may look at the same time
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise UserError(f"{flag} {path}: cannot be written ({e.strerror}); choose another place") from None
    return path


def check_out(given, default):
    """--out: (path, whether it is one picture rather than a folder of them)."""
    path = Path(given or default)
    if path.suffix not in ("", ".png") and not path.is_dir():
        raise UserError(f"--out {path}: expected a name that ends in .png, or a folder")
    single = path.suffix == ".png"
    return check_writable(path, suffix=".png" if single else None), single


def check_ranges(*rows):
    """Rows of (flag, value, lowest, highest or None); None as value means not given."""
    for flag, value, low, high in rows:
        if value is not None and not (low <= value and (high is None or value <= high)):
            wanted = f"{low} .. {high}" if high is not None else f"at least {low}"
            raise UserError(f"{flag} {value}: expected {wanted}")


# ----------------------------------------------------------------------------------------------------------------------
# Charts

INKS = ("#1f6fb4", "#d9541e", "#2a9d4a", "#8e4bb0", "#b8860b", "#555555")


def ticks(low, high, most=6):
    """Round numbers between two others."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step = next(step * k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= most)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(curves, title="", x_label="", y_label="", levels=(), marks=(), y_range=None, size=(560, 360)):
    """A line chart, uint8 (h, w, 3). curves: {name: (xs, ys)}; nan in ys is a gap; levels: (y, text) of dashed lines
    across; marks: (x, y, text) of points. The legend shows names that are not empty."""
    over, (width, height) = 2, size                                         # drawn larger and averaged: smooth lines
    sheet = Image.new("RGB", (width * over, height * over), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12 * over)
    points = [(x, y) for xs, ys in curves.values() for x, y in zip(xs, ys) if math.isfinite(y)]
    xs, ys = zip(*points or [(0, 0)])
    low, high = y_range or (min(*ys, *(y for y, _ in levels), math.inf), max(*ys, *(y for y, _ in levels), -math.inf))
    room = 0.0 if y_range else 0.06 * (high - low)
    low, high, first, last = low - room, high + room, min(xs), max(xs)
    high, last = high if high > low else low + 1, last if last > first else first + 1
    left, right, top, bottom = 58, width - 14, 30, height - 44
    place = lambda x, y: ((left + (x - first) / (last - first) * (right - left)) * over,
                          (bottom - (min(max(y, low), high) - low) / (high - low) * (bottom - top)) * over)
    for y in ticks(low, high):
        pen.line([place(first, y), place(last, y)], "#e4e4e4", over)
        pen.text((place(first, y)[0] - 6 * over, place(first, y)[1]), f"{y:.6g}", "black", font, anchor="rm")
    for x in ticks(first, last):
        pen.line([place(x, low), place(x, high)], "#e4e4e4", over)
        pen.text((place(x, low)[0], (bottom + 6) * over), f"{x:.6g}", "black", font, anchor="mt")
    pen.rectangle([place(first, high), place(last, low)], outline="#888888", width=over)
    for y, text in levels:
        start, end = place(first, y), place(last, y)
        for x in range(int(start[0]), int(end[0]), 12 * over):
            pen.line([(x, start[1]), (x + 6 * over, start[1])], "black", over)
        pen.text((end[0] - 4 * over, end[1] - 3 * over), text, "black", font, anchor="rb")
    for (name, (xs, ys)), ink in zip(curves.items(), itertools.cycle(INKS)):
        line = [place(x, y) if math.isfinite(y) else None for x, y in zip(xs, ys)]
        for a, b in zip(line, line[1:]):
            if a and b:
                pen.line([a, b], ink, 2 * over)
    for x, y, text in marks:
        at = place(x, y)
        pen.ellipse([at[0] - 4 * over, at[1] - 4 * over, at[0] + 4 * over, at[1] + 4 * over], fill="black")
        side, anchor = (8, "lm") if x < (first + last) / 2 else (-8, "rm")
        pen.text((at[0] + side * over, at[1]), text, "black", font, anchor=anchor)
    named = [(name, ink) for name, ink in zip(curves, itertools.cycle(INKS)) if name]
    for i, (name, ink) in enumerate(named):
        y = (bottom - 8 - 16 * (len(named) - i - 0.5)) * over
        pen.line([((left + 10) * over, y), ((left + 30) * over, y)], ink, 3 * over)
        pen.text(((left + 36) * over, y), name, "black", font, anchor="lm")
    pen.text((width * over // 2, 14 * over), title, "black", ImageFont.load_default(13 * over), anchor="mm")
    pen.text(((left + right) * over // 2, (height - 6) * over), x_label, "black", font, anchor="mb")
    pen.text((6 * over, 14 * over), y_label, "black", font, anchor="lm")
    return np.asarray(sheet.reduce(over))


# ----------------------------------------------------------------------------------------------------------------------
# Reading and writing sound and video


def pyav():
    """The package that reads and writes videos, without any program of the system's."""
    try:
        import av
    except ImportError:
        raise MissingPackage("reading and writing videos needs PyAV: pip install av") from None
    return av


SOUND_FILES = {".wav", ".flac", ".ogg"}                                     # what soundfile reads; the rest is PyAV's


def read_sound(path, rate=SAMPLE_RATE):
    """The sound of a file, videos included, as (n,) float32 in [-1, 1] at 16 kHz, or another rate: channels are
    averaged, other rates resampled. That of a video begins where its picture does."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    sound = (_read_sound_file if path.suffix.lower() in SOUND_FILES else _read_sound_track)(path, rate)
    if not len(sound):
        raise UserError(f"{path}: there is no sound in it, not one sample")
    if not np.isfinite(sound).all():
        raise UserError(f"{path}: holds samples that are no numbers (nan or inf); write it anew from its source")
    return sound


def _read_sound_file(path, rate):
    import soundfile
    from scipy.signal import resample_poly
    try:
        sound, own = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as e:
        try:
            return _read_sound_track(path, rate)                            # it knows more kinds of wav
        except UserError:
            raise UserError(f"{path}: not a readable sound file ({e})") from None
    sound, common = sound.mean(1), math.gcd(own, rate)
    if own != rate and len(sound):
        sound = resample_poly(sound, rate // common, own // common).astype(np.float32)
    return sound


def _read_sound_track(path, rate):
    av = pyav()
    with open_container(path) as container:
        stream, picture = container.streams.best("audio"), container.streams.best("video")
        if stream is None:
            raise UserError(f"{path}: has no sound; give one as --audio FILE")
        origin = float((picture.start_time or 0) * picture.time_base) if picture else None
        pieces, now, kind, resampler = [], 0, None, None                    # now: sample at which the next piece begins

        def add(frames):
            nonlocal now
            for frame in frames:
                pieces.append(frame.to_ndarray().mean(0, dtype=np.float32))
                now += len(pieces[-1])
        try:
            for frame in decoded(container, stream):
                if (frame.rate, frame.format.name, frame.layout.name) != kind:      # files that were joined may change
                    add(resampler.resample(None) if resampler else ())
                    kind = frame.rate, frame.format.name, frame.layout.name
                    resampler = av.AudioResampler(format="fltp", rate=rate)
                if frame.time is not None:
                    origin = frame.time if origin is None else origin
                    at = round((frame.time - origin) * rate)
                    if not pieces:
                        begin = now = at
                    elif at - now > rate // 50:                             # something is missing: silence
                        pieces.append(np.zeros(at - now, np.float32))
                        now = at
                elif not pieces:
                    begin = 0
                add(resampler.resample(frame))
            add(resampler.resample(None) if resampler else ())
        except (av.error.FFmpegError, ValueError) as e:
            raise UserError(f"{path}: its sound cannot be read ({e})") from None
    if not pieces:
        return np.zeros(0, np.float32)
    return np.pad(np.concatenate(pieces), (max(begin, 0), 0))[max(-begin, 0):]


def open_container(path):
    """A file opened by PyAV."""
    av = pyav()
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        return av.open(str(Path(path).absolute()), metadata_errors="replace")      # else "12:30.mp4" is a protocol
    except (av.error.FFmpegError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{path}: not a video or sound file that can be read ({reason})") from None


def decoded(container, stream):
    """The frames of a stream. Packets that are damaged are left out; what makes up for them is up to the caller."""
    av = pyav()
    if stream.codec_context is None:
        raise UserError(f"{container.name}: its {stream.type} is coded in a way that PyAV has no decoder for")
    try:
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except av.error.FFmpegError:
                continue
    except av.error.FFmpegError:                                            # the file breaks off
        return


class Video:
    """The frames of a video at a constant rate, each decoded when it is asked for: memory does not depend on length.

    Frame k of ours is the last of those that are shown nearer to k / fps seconds than to any other multiple, or, if
    there is none, the one before: where frames come at another rate, or irregularly, some are repeated or left out.
    `len` is what the file says of its length, which may be wrong. Every iteration starts anew.
    """

    def __init__(self, path, fps=FPS):
        self.path, self.fps = Path(path), fps
        with open_container(path) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise UserError(f"{path}: has no picture, expected a video")
            ends = stream.duration
            if not ends:                                                    # recorders of browsers do not write it
                ends = max((packet.pts + (packet.duration or 0) - (stream.start_time or 0)
                            for packet in container.demux(stream) if packet.pts is not None), default=0)
            self.length = round(float(ends * stream.time_base) * fps)
        _, _, first = next(self._numbered(), (0, 0, None))
        if first is None:
            raise UserError(f"{path}: not one picture in it can be decoded")
        self.size = dict(width=first.width, height=first.height)
        self.height, self.width = self._picture(first).shape[:2]

    def __len__(self):
        return self.length

    def __iter__(self):
        return self.frames()

    def _numbered(self, since=0.0):
        """(number in our count, second of its end, frame) of the decoded frames, from a key frame near `since` on."""
        with open_container(self.path) as container:
            stream = container.streams.best("video")
            stream.thread_type = "AUTO"
            rate, begins = float(stream.average_rate or self.fps), float((stream.start_time or 0) * stream.time_base)
            if since:
                container.seek(int((begins + since) / stream.time_base), stream=stream)
            for i, frame in enumerate(decoded(container, stream)):
                if frame.time is None and since:
                    return                                                  # nobody knows where we are
                seen = i / rate if frame.time is None else frame.time - begins
                yield math.floor(seen * self.fps + 0.5), seen + 1 / rate, frame

    def frames(self, start=0):
        """uint8 (h, w, 3), from frame `start` on. Decoding begins at a key frame before it, if there is a way there."""
        numbered = None
        for back in (0, 1, 10) if start else ():                            # some formats arrive later than asked for
            attempt = self._numbered(max(0.0, start / self.fps - back))
            try:
                first = next(attempt, None)
            except pyav().error.FFmpegError:                                # no seeking in this one
                first = None
            if first and first[0] <= start:
                numbered = itertools.chain([first], attempt)
                break
            attempt.close()
        shown = picture = None
        due, end = start, 0.0                                               # due: number of the next to hand out
        for number, end, frame in numbered or self._numbered():
            while shown is not None and due < number:
                picture = self._picture(shown) if picture is None else picture
                yield picture
                due += 1
            shown, picture = frame, None
        while shown is not None and due < max(math.floor(end * self.fps + 0.5), start == 0):
            picture = self._picture(shown) if picture is None else picture
            yield picture
            due += 1

    def _picture(self, frame):
        """A frame as uint8 (h, w, 3), of the size of the first, turned as the file says: phones film sideways."""
        picture = frame.to_ndarray(format="rgb24", **self.size)
        return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90) % 4))

    def clip(self, start, count):
        """`count` frames from `start` on as uint8 (count, 3, h, w); fewer at the end of the video."""
        pictures = list(itertools.islice(self.frames(start), count))
        if not pictures:
            return torch.zeros(0, 3, self.height, self.width, dtype=torch.uint8)
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


class VideoWriter:
    """An mp4 whose pictures are encoded once, H.264, as they come, and whose sound is muxed with them.

    with VideoWriter(path, height, width, sound=samples) as video: video.write(picture), uint8 (h, w, 3). sound: (n,) in
    [-1, 1] at `rate`, cut to the length of the pictures. The file appears when it is complete.
    """

    def __init__(self, path, height, width, fps=FPS, sound=None, crf=18, rate=SAMPLE_RATE):
        self.path, self.fps, self.sound, self.written, self.heard = Path(path), fps, sound, 0, 0
        self.rate = rate
        self.even = height + height % 2, width + width % 2                  # the format halves colors
        self.crf = crf

    def __enter__(self):
        self.av, self.stack = pyav(), ExitStack()
        temporary = self.stack.enter_context(vq.atomic(self.path))
        self.stack.push(self._complain)
        self.container = self.stack.enter_context(self.av.open(str(temporary.absolute()), "w", format="mp4"))
        self.stack.push(self._flush)
        self.stream = self.container.add_stream("libx264", rate=self.fps, options={"crf": str(self.crf)})
        self.stream.height, self.stream.width, self.stream.pix_fmt = *self.even, "yuv420p"
        codec = self.stream.codec_context                                   # BT.709, said so: players guess otherwise
        codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = 1
        if self.sound is not None:
            self.track = self.container.add_stream("aac", rate=self.rate, layout="mono")
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def _flush(self, kind, error, trace):
        if kind is None and not self.written:
            raise UserError(f"{self.path}: there is not one picture to write")
        for stream in self.container.streams if kind is None else ():
            self.container.mux(stream.encode(None))

    def _complain(self, kind, error, trace):
        if isinstance(error, self.av.error.FFmpegError):                    # a full disk, a missing folder
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None

    def write(self, picture):
        """The next picture."""
        down, right = (even - side for even, side in zip(self.even, picture.shape))
        picture = np.pad(picture, ((0, down), (0, right), (0, 0)), mode="edge") if down or right else picture
        frame = self.av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        frame.pts, frame.time_base = self.written, Fraction(1, self.fps)
        self.container.mux(self.stream.encode(frame))
        self.written += 1
        self._write_sound(self.written * self.rate // self.fps)

    def _write_sound(self, until):
        """The sound up to a sample: silence where there is none any more."""
        if self.sound is None:
            return
        piece = np.zeros((1, until - self.heard), np.float32)
        there = np.asarray(self.sound[self.heard:until], np.float32)
        piece[0, :len(there)] = there
        frame = self.av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = self.rate, self.heard, Fraction(1, self.rate)
        self.container.mux(self.track.encode(frame))
        self.heard = until


# ----------------------------------------------------------------------------------------------------------------------
# Speed: launches taken away


class CUDAGraphs:
    """Captures functions in CUDA graphs when they are first called and replays them from then on: `run=` of a sampler.

    A step of a small model is hundreds of kernels of a few microseconds each, and launching one takes the host as long.
    A graph is launched once. It works on fixed addresses: tensors given are copied to where it reads, unless they lie
    there already, being results of an earlier graph; results are overwritten by the next call with the same function,
    constants and shapes. To be captured a function runs three times: running again must not change what it does.
    """

    def __init__(self):
        self.graphs, self.own = {}, set()

    @torch.no_grad()
    def __call__(self, function, constants, *tensors):
        given, structure = tree_flatten(tensors)
        is_tensor = lambda t: isinstance(t, torch.Tensor)
        # what is read in place may be a part of a larger tensor, with strides of its own; others are copied
        strides = lambda t: t.stride() if t.data_ptr() in self.own else None
        layout = lambda t: (t.shape, t.dtype, strides(t)) if is_tensor(t) else t
        key = (function, constants, str(structure), *map(layout, given))
        if key not in self.graphs:
            inputs = [t.clone() if is_tensor(t) and t.data_ptr() not in self.own else t for t in given]
            replay, results = self.record(lambda: function(*constants, *tree_unflatten(inputs, structure)))
            self.own |= {t.data_ptr() for t in filter(is_tensor, tree_flatten(results)[0])}
            self.graphs[key] = replay, inputs, results
        replay, inputs, results = self.graphs[key]
        for mine, theirs in zip(inputs, given):
            if is_tensor(mine) and mine.data_ptr() != theirs.data_ptr():
                mine.copy_(theirs)
        replay()
        return results

    def record(self, run):
        """(a function that repeats run() on the same addresses, its results)."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):                                     # compiles kernels, sets up libraries
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):       # in a memory pool of its own: in a shared one the temporaries of a graph
            results = run()                 # could lie where another one, captured later, keeps its results
        return graph.replay, results


def with_compiled_blocks(model):
    """The same model, sharing its weights, whose blocks go through torch.compile. They are alike, so one is compiled,
    and again when it meets shapes of another kind."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    twin.blocks = torch.nn.ModuleList(torch.compile(block, fullgraph=True) for block in model.blocks)
    return twin


# ----------------------------------------------------------------------------------------------------------------------
# Speed: how close a run comes to its bare matrix products, convolutions and attention calls

ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
             torch.ops.aten._scaled_dot_product_flash_attention.default,
             torch.ops.aten._scaled_dot_product_efficient_attention.default,
             torch.ops.aten._scaled_dot_product_cudnn_attention.default}
ATTENTION_BACKWARD = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
                      torch.ops.aten._scaled_dot_product_flash_attention_backward.default,
                      torch.ops.aten._scaled_dot_product_efficient_attention_backward.default,
                      torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default}


def attention_flops(q, k, v):
    """2 * B * H * Lq * Lk * (Dk + Dv)."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def flops_of(func, args, kwargs, out):
    """Floating point operations of a call, or None if it is no matrix product, convolution or attention."""
    if func in ATTENTION:
        return attention_flops(*(a.shape for a in args[:3]))
    if func in ATTENTION_BACKWARD:                                          # five products where forward has two
        return 5 * attention_flops(*(a.shape for a in args[1:4])) // 2
    if func._overloadpacket in flop_registry:
        return flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
    return None


class Flops(TorchDispatchMode):
    """Counts the floating point operations of what is computed inside a `with`: `total`."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.total += flops_of(func, args, kwargs or {}, out) or 0
        return out


class Heavy(TorchDispatchMode):
    """Records every matrix product, convolution and attention call: operator, layouts, scalars, and the stage."""

    def __init__(self, parameters):
        super().__init__()
        self.calls, self.stage = {}, None
        self.weights = {p.untyped_storage().data_ptr() for p in parameters}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (flops := flops_of(func, args, kwargs, out)) is not None:
            spec = tree_map(self._describe, (args, kwargs))
            key = (str(func), repr(spec), self.stage)
            if key not in self.calls:
                self.calls[key] = [func, spec, self.stage, flops, _bytes((args, kwargs, out)), 0]
            self.calls[key][-1] += 1
        return out

    def _describe(self, x):
        if not isinstance(x, torch.Tensor):
            return x
        return _Tensor(tuple(x.shape), x.stride(), x.dtype, x.device, x.untyped_storage().data_ptr() in self.weights)


class _Tensor:
    """A tensor's layout, and whether it is a weight."""

    def __init__(self, shape, stride, dtype, device, weight):
        self.shape, self.stride, self.dtype, self.device, self.weight = shape, stride, dtype, device, weight

    def __repr__(self):
        return f"{self.shape}{self.stride}{self.dtype}{self.weight}"

    def make(self):
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride))      # expanded ones overlap themselves
        t = torch.empty(last + 1, dtype=self.dtype, device=self.device)
        return (t.normal_() if t.is_floating_point() else t.zero_()).as_strided(self.shape, self.stride)


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


def replay(func, spec, device, count):
    """Seconds of `count` bare calls on random inputs of the recorded layout, after one to warm up.

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
    seconds = [timed(lambda: func(*sets[i % copies][0], **sets[i % copies][1]), device)[0] for i in range(1 + count)]
    return sum(seconds[1:])


@contextmanager
def staged(methods, enter):
    """Wraps functions, {stage: [(owner, name), ...]}: `enter(stage)` is called before each and enter(None) after."""
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
            wrapped.append((obj, name, vars(obj).get(name)))
            setattr(obj, name, wrapper)
    try:
        yield
    finally:
        for obj, name, before in wrapped:
            delattr(obj, name) if before is None else setattr(obj, name, before)


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


def bench(name, run, stages, rest, parameters, device, dtype, pictures, peak, rounds=3):
    """Times run() -> images and compares with its bare heavy operators -> the dict that --json writes.

    stages: {name: [(object, method), ...]}; `rest` names what happens outside of them; peak: a PeakMemory from before
    the weights were loaded. A machine's speed drifts: whole runs take turns with replays of all recorded calls, as many
    and so as long as in a run, and the best run is compared with the best replay.
    """
    weights = sum({p.untyped_storage().data_ptr(): p.numel() * p.element_size() for p in parameters}.values())
    bandwidth = copy_bandwidth(device)
    warmup, images = timed(run, device)
    heavy = Heavy(parameters)
    with staged(stages, lambda stage: setattr(heavy, "stage", stage)), heavy, backend("torch"):     # it sees no kernels
        run()
    calls, runs, splits, peak_bytes = list(heavy.calls.values()), [], [], 0
    replays = []                                                            # per round: seconds of every kind of call
    for _ in tqdm(range(rounds), desc="whole runs and bare operators in turn", leave=False):
        runs += [timed(run, device) for _ in range(2)]
        splits.append(split_by_stage(run, stages, rest, device))
        peak_bytes = peak_bytes or peak()                                   # before the replays allocate anything
        replays.append([replay(func, spec, device, count) for func, spec, _, _, _, count in calls])
    if not all(torch.equal(images, again) for _, again in runs):
        raise RuntimeError("the same seed gave different pictures: nothing is reported")
    best = min(seconds for seconds, _ in runs) / pictures
    split = min(splits, key=lambda split: sum(split.values()))
    totals = {stage: {"seconds": best * spent / sum(split.values()), "flops": 0, "bytes": 0, "bare": 0.0}
              for stage, spent in split.items()}
    for seconds, (_, _, stage, flops, size, count) in zip(min(replays, key=sum), calls):
        for key, value in (("flops", flops * count), ("bytes", size * count), ("bare", seconds)):
            totals[stage or rest][key] += value / pictures
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
        "copy_bytes_per_second": bandwidth,
        "stages": totals,
        "variants": {"plain": {"seconds": whole["seconds"], "equal": True}},
        "peak_memory_bytes": peak_bytes,
        "weight_bytes": weights,
    }


def copy_bandwidth(device):
    """Bytes per second, read and written, of a large copy."""
    a, b = torch.randn(2, 2**26, device=device)
    return 8 * a.numel() / op_seconds(lambda: b.copy_(a), device)


@functools.cache
def product_speed(device, dtype):
    """Floating point operations per second of a large matrix product: what this device is capable of."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n**3 / min(timed(lambda: a @ b, device)[0] for _ in range(10))


def race(run, variants, pictures, device, rounds=3):
    """Other ways to do run() -> images, {name: function}, against run() itself, in turn.

    Returns {name: {seconds, first_seconds, equal, max_difference}}; no seconds for what draws other pictures: more than
    1e-4 apart, on a scale from 0 to 1.
    """
    expected, results = run(), {}
    for name, variant in tqdm(variants.items(), desc="variants", leave=False):
        first, images = timed(variant, device)
        again = variant()                                                   # a graph has to show itself when replayed
        difference = max((x - expected).abs().max().item() for x in (images, again))
        result = results[name] = {"first_seconds": first, "equal": difference <= 1e-4, "max_difference": difference}
        if result["equal"]:
            pairs = [(timed(run, device)[0], timed(variant, device)[0]) for _ in range(rounds)]
            plain, seconds = (min(times) / pictures for times in zip(*pairs))
            result |= {"seconds": seconds, "speedup": plain / seconds}
    return results


def print_bench(b, tokens=0):
    """The table of a bench; tokens: of a picture."""
    print(f"{b['model']}  {b['device']}, {b['dtype']}, torch {b['torch']}, batch {b['pictures']}")
    print(f"{'stage':<14}{'s/picture':>10}{'GFLOP':>9}{'GFLOP/s':>9}{'GB':>7}{'GB/s':>7}{'share of the limit':>21}")
    for stage, s in [*b["stages"].items(), ("total", b | {"seconds": b["seconds_per_image"]})]:
        print(f"{stage:<14}{s['seconds']:>10.3f}{s['flops'] / 1e9:>9.1f}{s['flops'] / s['seconds'] / 1e9:>9.0f}"
              f"{s['bytes'] / 1e9:>7.1f}{s['bytes'] / s['seconds'] / 1e9:>7.1f}{s['share']:>21.2f}")
    warmup = b["warmup_seconds"] / b["pictures"]
    speed = f"{tokens / b['seconds_per_image']:.1f} tokens/s; " if tokens else ""
    print(f"{speed}first run {warmup:.2f} s/picture; the share is the time of the bare\n"
          "matrix products, convolutions and attention calls / the time of the run; a large copy\nreads and writes "
          f"{b['copy_bytes_per_second'] / 1e9:.1f} GB/s")
    print(f"peak memory {b['peak_memory_bytes'] / 1e9:.2f} GB, of which weights {b['weight_bytes'] / 1e9:.2f} GB")
    for name, v in b["variants"].items():
        if name == "plain":
            continue
        what = v.get("what", "pictures")
        found = f"{what} {v['max_difference']:.0e} apart at most" if v["max_difference"] else f"{what} bit-identical"
        speed = f"{v['seconds']:.3f} s/picture, {v['speedup']:.2f}x" if v["equal"] else "NOT EQUAL, so not timed"
        print(f"{name:<14}{speed}; {found}; first run {v['first_seconds']:.1f} s")


# ----------------------------------------------------------------------------------------------------------------------
# What all models that draw have in common


class Job:
    """The models of a command line, loaded, and how to draw with them. Subclasses load them, and draw items: classes
    or prompts. Picture i has the seed --seed + i."""

    def __init__(self, args):
        self.args = args
        self.device, self.device_why = choose_device(args.device)
        self.dtype, self.dtype_why = choose_dtype(args.dtype, self.device)
        self.peak = PeakMemory(self.device)
        self.metadata, self.files = {}, []
        if args.random_weights:                                             # a released size without its file
            self.name, configs = args.random_weights.removesuffix(".pth"), self.MODULE.CONFIGS
            if self.name not in configs:
                raise UserError(f"--random-weights {self.name}: choose one of {', '.join(configs)}")
            models = self.random_models(configs[self.name], torch.Generator().manual_seed(args.seed))
        else:
            models = self.load_models()
        self.tokenizer, self.model = (model.to(self.device) for model in models)
        self.run = self.MODULE.call
        self.prepare()

    def variants(self):
        """{name: a copy of this job, sharing the weights, that draws the same pictures faster}, the best one first."""
        twins = {"graph": copy.copy(self)} if self.device.type == "cuda" else {}
        twins["compile"] = copy.copy(self)
        twins["compile"].model = with_compiled_blocks(self.model)
        if self.device.type == "cuda":
            for twin in twins.values():
                twin.run = CUDAGraphs()
        return twins

    def rivals(self, items):
        """For --bench: other ways to do what this job does, as `race` gives them."""
        return {}

    def generators(self, numbers):
        """One for each picture, or as the original has it one for all."""
        seeds = [self.args.seed + i for i in numbers]
        make = lambda seed: torch.Generator(self.device).manual_seed(seed)
        return make(seeds[0]) if self.args.one_generator else [make(seed) for seed in seeds]

    def to_pixels(self, images):
        """uint8 pictures, rounded as the original does."""
        return to_pixels(images)

    def describe(self, label):
        """An item in words: the name of a class if the checkpoint knows it, else its id."""
        return {"class": self.names[label] if label < len(self.names) else str(label)}

    def path(self, folder, i):
        """Where picture i goes."""
        return folder / f"{i:05d}.png"

    def text(self, i, item):
        """What a picture's file says about it."""
        return self.settings | {"seed": self.args.seed + i} | self.describe(item)


def check_json(args, bench):
    """--json goes with --bench, whether that was given, and has to be writable."""
    if args.json and not bench:
        raise UserError("--json goes with --bench")
    if args.json:
        check_writable(args.json, "--json", suffix=".json")


def save_json(path, result):
    """What --bench found, for --json; None: nowhere."""
    if path:
        with vq.atomic(path) as temporary:
            temporary.write_text(json.dumps(result, indent=1))


def check_generator_args(args):
    """What argparse does not check, of the arguments that all of them have."""
    check_ranges(("-n", args.n, 1, None), ("--batch-size", args.batch_size, 1, None), ("--seed", args.seed, 0, None),
                 ("--top-k", args.top_k, 0, None), ("--top-p", args.top_p, 0, 1))
    if args.ckpt and args.random_weights:
        raise UserError("--ckpt and --random-weights exclude each other")
    if args.compile and INTERPRET:
        raise UserError("--compile cannot compile what TRITON_INTERPRET=1 interprets: leave one of them out")
    check_json(args, args.bench)


def draw_all(job, items, folder, resume=False):
    """All pictures, batch by batch, as uint8 arrays; written as they come if there is a folder, else returned.

    resume: pictures that are there already, drawn with the same settings, are not drawn again.
    """
    args, pictures, numbers = job.args, [], range(len(items))
    if resume:
        numbers = [i for i in numbers if not is_picture_of(job.path(folder, i), job.text(i, items[i]))]
    starts = range(0, len(numbers), args.batch_size)
    for start in tqdm(starts, unit="batch", disable=len(starts) < 2, leave=False):
        mine = numbers[start:start + args.batch_size]
        images = torch.stack(job.draw([items[i] for i in mine], mine, args.steps_grid), 1)      # (B, frames, 3, h, w)
        for i, frames in zip(mine, images):
            frames = job.to_pixels(frames)
            if folder is None:
                pictures += list(frames)
                continue
            job.path(folder, i).parent.mkdir(parents=True, exist_ok=True)
            save_png(job.path(folder, i), grid(frames, len(frames), enlarge=1), job.text(i, items[i]))
    return pictures


def is_picture_of(path, text):
    """Whether a readable picture is there that says it was made with just these settings."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return {k: picture.info.get(k) for k in text} == {k: str(v) for k, v in text.items()}
    except UNREADABLE:
        return False


def draw_and_save(job, items, out, single, extra=(), titles=(), resume=False):
    """All pictures as one grid or as files in a folder, and the line of truth. extra: pictures that stand before."""
    frames = len(job.frames) if job.args.steps_grid else 1
    titles = job.frames if frames > 1 else titles
    seconds, pictures = timed(lambda: draw_all(job, items, None if single else out, resume), job.device)
    if single:
        pictures = list(extra) * (frames == 1) + pictures
        columns = frames if frames > 1 else min(len(pictures), 8 if len(pictures) > 4 else 4)
        text = ", ".join(dict.fromkeys(text for item in items for text in job.describe(item).values()))
        save_png(out, grid(np.stack(pictures), columns, titles=titles), job.settings | {job.ITEMS: text})
    where = out if single else f"{len(items)} files in {out}"
    print(last_line(job.device, job.device_why, job.dtype, job.dtype_why, (job.tokenizer, job.model),
                    seconds / len(items), job.peak, where))


def bench_job(job, items, stages):
    """--bench: the items in one batch."""
    numbers = range(len(items))
    stages |= {"decoder": [(job.tokenizer, "decode")]}
    parameters = [*job.tokenizer.parameters(), *job.model.parameters()]
    result = bench(job.name, lambda: job.draw(items, numbers)[0], stages, "transformer", parameters, job.device,
                   job.dtype, len(items), job.peak)
    if job.args.compile:
        variants = {name: lambda twin=twin: twin.draw(items, numbers)[0] for name, twin in job.variants().items()}
        result["variants"] |= race(lambda: job.draw(items, numbers)[0], variants, len(items), job.device)
    result["variants"] |= job.rivals(items)
    print_bench(result, sum(h * w for h, w in job.scales))
    save_json(job.args.json, result)


# ----------------------------------------------------------------------------------------------------------------------
# python sample.py var


DEMO_SETTINGS = dict(cfg=4.0, top_k=900, top_p=0.95)                        # the authors', for good-looking pictures


class VARJob(Job):
    """`sample.py var`: items are class ids."""

    MODULE, ITEMS = var, "classes"

    def prepare(self):
        args = self.args
        self.patch_nums = self.model.config.patch_nums
        self.scales = vq.as_pairs(self.patch_nums)
        self.frames = [f"{h}x{w}" for h, w in self.scales]                  # of a filmstrip
        self.side = self.tokenizer.config.stride * self.patch_nums[-1]      # of the pictures, in pixels
        self.names = self.metadata.get("classes", [])
        given = {k: v for k in ("cfg", "top_k", "top_p") if (v := getattr(args, k)) is not None}
        self.options = DEMO_SETTINGS | self.metadata.get("sampling", {}) | given | {"more_smooth": args.smooth}
        self.settings = {"model": "var", "checkpoint": self.name, "seed": args.seed} | self.options

    def random_models(self, config, g):
        tokenizer = vq.CONFIGS["emoji_vq" if self.name == "emoji_var" else "vae_ch160v4096z32"]
        tokenizer = vq.build(vq.VQVAE, replace(tokenizer, patch_nums=config.patch_nums)).eval()
        tokenizer.init_weights(g)
        model = vq.build(var.VAR, config).eval()
        model.init_weights(generator=g)
        return vq.set_decoder_dtype(tokenizer, self.dtype), var.set_dtype(model, self.dtype)

    def load_models(self):
        """--ckpt and --vae, or the demo."""
        args, download = self.args, not self.args.no_download
        ckpt = find_checkpoint(args.ckpt, download) if args.ckpt else DEMO / "emoji_var.safetensors"
        model, self.metadata = var.load(ckpt, dtype=self.dtype), read_metadata(ckpt)
        released = (model.config.vocab_size, model.config.z_channels) == (4096, 32)
        fallback = "vae_ch160v4096z32.pth" if released else "emoji_vq.safetensors"
        vae = find_companion(args.vae, ckpt, fallback, download, "--vae")
        tokenizer = vq.load(vae, patch_nums=model.config.patch_nums, dtype=self.dtype)
        check_pair(tokenizer, vae, model.config, self.metadata, ckpt)
        self.name, self.files = Path(ckpt).name, [Path(ckpt), Path(vae)]
        return tokenizer, model

    def draw(self, labels, numbers, ladder=False):
        """Pictures of these numbers: a list of (B, 3, h, w) in [0, 1], one per scale, or the last alone."""
        images = self.model.sample(self.tokenizer, torch.tensor(labels), generator=self.generators(numbers),
                                   ladder=ladder, run=self.run, **self.options)
        return images if ladder else [images]


def choose_labels(job):
    """The class of every picture, from --classes (ids or names) and -n."""
    args, names, total = job.args, job.names, job.model.config.num_classes
    chosen = []
    for c in args.classes:
        if c in names:
            chosen.append(names.index(c))
        elif c.isdigit() and int(c) <= total:
            chosen.append(int(c))
        else:
            known = ", or a name that --list-classes prints" if names else ""
            raise UserError(f"--classes {c}: expected an id 0 .. {total - 1}, {total} for no class{known}")
    n = args.n or (len(chosen) if chosen else 50 * total if args.npz else 16)
    if not chosen and not args.npz and job.metadata.get("show"):            # what its makers want to show
        chosen = [names.index(c) for c in job.metadata["show"]]
    elif not chosen and n < total:
        chosen = [int((i + 0.5) * total / n) for i in range(n)]
    chosen = chosen or range(total)
    return [chosen[i % len(chosen)] for i in range(n)]


def list_classes(job):
    """--list-classes."""
    names = "\n".join(f"{i:4d}  {c}" for i, c in enumerate(job.names))
    print(names or f"{job.name}: {job.model.config.num_classes} classes, no names in the file")


def check_var_args(args):
    """What argparse does not check."""
    check_ranges(("--cfg", args.cfg, 0, None))
    y0, x0, y1, x1 = args.box
    if not (0 <= y0 < y1 <= 1 and 0 <= x0 < x1 <= 1):
        raise UserError(f"--box {y0} {x0} {y1} {x1}: expected 0 <= Y0 < Y1 <= 1 and 0 <= X0 < X1 <= 1")
    if bool(args.edit) != bool(args.image):
        raise UserError("--edit and --image go together: the way to edit and the picture to be edited")
    if args.edit == "class" and not args.classes:
        raise UserError("--edit class: give the new class with --classes")
    if args.npz and (args.edit or args.steps_grid):
        raise UserError("--npz is for whole sets of pictures: leave out --edit and --steps-grid")


def sample_var(args):
    """Pictures as a grid or one by one; or one of --list-classes, --bench, --npz."""
    check_generator_args(args)
    check_var_args(args)
    if args.npz:
        check_writable(args.npz, "--npz", suffix=".npz")
    out, single = (None, True) if args.bench or args.npz or args.list_classes else check_out(args.out, "out/var.png")
    given = read_picture(args.image) if args.edit else None
    job = VARJob(args)
    if args.bench:
        labels = choose_labels(job)[:args.n or 1]                           # -n pictures in one batch, by default one
        quantizer = job.tokenizer.quantize
        return bench_job(job, labels, {"sampling": [(job.model, "_draw"), (var, "exponential_noise")],
                                       "quantizer": [(quantizer, "contribution"), (quantizer, "next_input")]})
    if args.compile:
        job = next(iter(job.variants().values()))
    if args.npz:
        return write_npz(job, Path(args.npz))
    if args.list_classes:
        return list_classes(job)
    labels = choose_labels(job)
    extra, titles = [], []
    if args.edit:
        (labels, extra), titles = prepare_edit(job, given, labels), ["given", "kept"]
    draw_and_save(job, labels, out, single, extra, titles)


def prepare_edit(job, given, labels):
    """Sets what to keep of the given PIL picture -> (labels, [the picture, and what is kept of it])."""
    args, last = job.args, job.patch_nums[-1]
    image = to_tensor(cover(given, job.side, job.side), job.device)
    keep = var.edit_mask(args.box, last, inpaint=args.edit != "out").to(job.device)
    job.options |= {"given": job.tokenizer.tokenize(image, job.patch_nums), "keep": keep}
    job.settings |= {"edit": args.edit, "box": args.box, "image": args.image}
    cell = job.side // last
    kept = torch.where(keep.repeat_interleave(cell, 0).repeat_interleave(cell, 1), image, 0.5)
    if args.edit != "class":
        labels = [job.model.config.num_classes] * len(labels)               # in- and out-painting know no class
    return labels, list(to_pixels(torch.cat([image, kept]).add(1).div(2)))


def write_npz(job, path, chunk=250):
    """All pictures as one array arr_0 (N, h, w, 3) uint8, in chunks that survive an interruption.

    Every picture has its own generator: neither the batch size nor the number of processes changes it.
    """
    args, labels = job.args, choose_labels(job)
    rank, world = place_of_process()
    parts = path.with_name(path.name + ".parts")
    parts.mkdir(exist_ok=True)
    files = [(str(f.resolve()), f.stat().st_size, int(f.stat().st_mtime)) for f in job.files]
    settings = {"n": len(labels), "classes": args.classes, "dtype": str(job.dtype), "files": files}
    settings = json.dumps(job.settings | settings | {"one_generator": args.one_generator and args.batch_size})
    note = parts / "settings.json"
    if note.exists() and note.read_text() != settings:
        raise UserError(f"{parts}: holds pictures of other settings; delete it, or choose another --npz")
    with vq.atomic(note) as temporary:
        temporary.write_text(settings)
    chunks = [parts / f"{i:07d}.npy" for i in range(0, len(labels), chunk)]
    for i, file in enumerate(tqdm(chunks, unit=f"x{chunk} pictures", disable=rank > 0)):
        if i % world != rank or file.exists():
            continue
        end, pictures = min((i + 1) * chunk, len(labels)), []
        for start in range(i * chunk, end, args.batch_size):
            batch = labels[start:min(start + args.batch_size, end)]
            pictures.append(job.to_pixels(job.draw(batch, range(start, start + len(batch)))[0]))
        with vq.atomic(file) as temporary, open(temporary, "wb") as f:
            np.save(f, np.concatenate(pictures))
    while rank == 0 and not all(file.exists() for file in chunks):          # the other processes' share
        time.sleep(1)
    if rank == 0:
        with vq.atomic(path) as temporary:
            merge_npz(temporary, chunks, len(labels))
        shutil.rmtree(parts)                                                # and what killed processes have left there
        print(f"{len(labels)} pictures -> {path}")


def merge_npz(path, chunks, n):
    """Streams .npy chunks into one .npz: 50,000 pictures of 256 pixels are 10 GB and need not be in memory at once."""
    shape = (n, *np.load(chunks[0], mmap_mode="r").shape[1:])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z, z.open("arr_0.npy", "w", force_zip64=True) as f:
        np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for chunk in chunks:
            f.write(np.load(chunk).tobytes())


# ----------------------------------------------------------------------------------------------------------------------
# What all models that read prompts have in common


class PromptJob(Job):
    """Items are prompts, and self.features has the text features of each. Subclasses set text_width, text_length (how
    many tokens they read) and clean (whether prompts are cleaned first)."""

    ITEMS, clean = "prompts", False
    features, prompts = {}, None                        # prompts: GenEval's lines, if that is what they are

    def read_texts(self, texts):
        """Features of all prompts at once, kept on the host, so that T5 is gone before anything is drawn."""
        args, encoder = self.args, self.model.text_encoder
        if encoder is None:
            t5 = find_companion(args.t5, args.ckpt or ".", "flan-t5-xl", not args.no_download, "--t5")
            encoder = load_t5(t5, self.text_width, self.device)
        texts, self.features = list(dict.fromkeys(texts)), {}
        starts = range(0, len(texts), 16)
        for start in tqdm(starts, desc="reading prompts", unit="batch", disable=len(starts) < 4, leave=False):
            batch = texts[start:start + 16]
            clean = self.clean and self.model.text_encoder is None
            self.features |= dict(zip(batch, encode_texts(encoder, batch, self.text_length, clean)))

    def origin(self):
        """What else a picture depends on: a folder is not to be completed with pictures of other making."""
        args = self.args
        return {"dtype": str(self.dtype).removeprefix("torch."), "tokenizer": vq.fingerprint(self.tokenizer),
                "features": args.features, "t5": args.t5, "clean": self.clean}

    def describe(self, prompt):
        return {"prompt": prompt}

    def path(self, folder, i):
        prompt, number = divmod(i, self.args.n)
        if self.prompts:                                                    # as GenEval wants them
            return folder / f"{prompt:05d}" / "samples" / f"{number:04d}.png"
        return folder / (f"{prompt:05d}.png" if self.args.n == 1 else f"{prompt:05d}_{number:02d}.png")


def read_prompts(path):
    """--prompts: (the prompts, the lines of a .jsonl or None)."""
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompts {path}: cannot be read ({getattr(e, 'strerror', None) or e})") from None
    if not lines:
        raise UserError(f"--prompts {path}: no prompt in it; expected one per line")
    if Path(path).suffix != ".jsonl":
        return [line.strip() for line in lines], None
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f'--prompts {path}, line {number}: expected {{"prompt": "..."}}') from None
    return prompts, lines


def read_features(path, width, longest):
    """--features: {prompt: (T, Ct)}, T at most `longest`."""
    state, _ = vq.read_checkpoint(path)
    try:
        from safetensors import safe_open
        with safe_open(path, "pt") as f:
            prompts = json.loads(f.metadata()["prompts"])
        features = {prompt: state[f"text.{i}"].float()[:longest] for i, prompt in enumerate(prompts)}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"--features {path}: not a file that --save-features wrote") from None
    if (found := next(iter(features.values())).shape[-1]) != width:
        raise UserError(f"--features {path}: has features of {found} numbers, but the model reads {width}")
    return features


def choose_prompts(job, suffix=lambda prompt: prompt, also=()):
    """All prompts of a command line, each with a suffix; job.features is filled, for other texts too."""
    args, given = job.args, {}
    if args.features:
        given = read_features(args.features, job.text_width, job.text_length)
    prompts = list(args.prompt)
    if args.prompts:
        prompts, job.prompts = read_prompts(args.prompts)
    elif not prompts:
        prompts = [p for p in given if p] or job.metadata.get("show")
    if not prompts:
        raise UserError("what to draw? Give --prompt TEXT, or --prompts FILE")
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("an empty prompt: say in a few words what to draw")
    prompts = [suffix(prompt) for prompt in prompts]
    if args.features:
        if missing := [p for p in [*prompts, *also] if p not in given]:
            raise UserError(f"--features {args.features}: lacks '{missing[0]}'; write it with --save-features")
        job.features = given
    else:
        job.read_texts([*prompts, *also])
    return prompts


def check_prompt_args(args):
    """What argparse does not check, of the arguments that all of them have."""
    if args.prompt and args.prompts:
        raise UserError("--prompt and --prompts exclude each other")
    if args.save_features:
        check_writable(args.save_features, "--save-features", suffix=".safetensors")


def save_features(job, path):
    """--save-features: those of all prompts, in half precision."""
    from safetensors.torch import save_file
    with vq.atomic(path) as temporary:
        save_file({f"text.{i}": job.features[prompt].half() for i, prompt in enumerate(job.features)}, temporary,
                  {"prompts": json.dumps(list(job.features))})
    print(f"features of {len(job.features)} prompts -> {path}")


def draw_prompts(job, prompts, out, single):
    """-n pictures of each prompt, as one grid or as files in a folder; for GenEval with its line beside each."""
    for i, line in enumerate(job.prompts or []):
        (out / f"{i:05d}").mkdir(parents=True, exist_ok=True)
        with vq.atomic(out / f"{i:05d}" / "metadata.jsonl") as temporary:
            temporary.write_text(line)
    items = [prompt for prompt in prompts for _ in range(job.args.n)]
    # pictures from one generator depend on each other, so that none can be added
    draw_and_save(job, items, out, single, resume=bool(job.args.prompts) and not job.args.one_generator)


def prompts_out(args, default):
    """--out of a command that may fill a folder with pictures of --prompts, as `check_out` gives it."""
    if args.bench or args.save_features:
        return None, True
    out, single = check_out(args.out, default if not args.prompts else default.removesuffix(".png"))
    if args.prompts and single:
        raise UserError(f"--out {out}: --prompts fills a folder; give one")
    return out, single


# ----------------------------------------------------------------------------------------------------------------------
# python sample.py infinity


TOKENIZERS = {16: "infinity_vae_d16.pth", 24: "infinity_vae_d24.pth", 32: "infinity_vae_d32reg.pth",   # by bits of the
              56: "infinity_vae_d56_f8_14_patchify.pth", 64: "infinity_vae_d64.pth"}                    # transformer
BUDGETS = {"infinity_125M": "0.06M", "infinity_2b": "1M", "infinity_8b": "1M", "infinity_8b_512": "0.25M"}
FACES = ". very smooth faces, good looking faces, face to the camera, perfect facial features"
PEOPLE = ("man", "woman", "men", "women", "boy", "girl", "child", "person", "human", "adult", "teenager", "employee",
          "employer", "worker", "mother", "father", "sister", "brother", "grandmother", "grandfather", "son",
          "daughter")                                                       # anywhere in a prompt, inside of words too


def check_pixels(pixels):
    """A budget that exists, or None."""
    if pixels is not None and pixels not in vq.PIXELS:
        raise UserError(f"--pixels {pixels}: choose one of {', '.join(vq.PIXELS)}")


class InfinityJob(PromptJob):
    """`sample.py infinity`."""

    MODULE = infinity

    def random_models(self, config, g):
        name = "emoji_bsq" if self.name == "emoji_infinity" else TOKENIZERS[config.bits].removesuffix(".pth")
        tokenizer = vq.build(vq.VQVAE, vq.CONFIGS[name]).eval()
        tokenizer.init_weights(g)
        model = vq.build(infinity.Infinity, config).eval()
        model.init_weights(generator=g)
        self.metadata = {"pixels": BUDGETS.get(self.name)}
        return vq.set_decoder_dtype(tokenizer, self.dtype), infinity.set_dtype(model, self.dtype)

    def load_models(self):
        """--ckpt and --vae, or the demo."""
        args, download = self.args, not self.args.no_download
        ckpt = find_checkpoint(args.ckpt, download) if args.ckpt else DEMO / "emoji_infinity.safetensors"
        model = infinity.load(ckpt, dtype=self.dtype, device=self.device)
        known = [name for name in BUDGETS if Path(ckpt).name.startswith(name)]
        self.metadata = {"pixels": BUDGETS[known[-1]] if known else "1M"} | read_metadata(ckpt)
        fallback = "emoji_bsq.safetensors" if model.text_encoder else TOKENIZERS.get(model.config.bits, "the tokenizer")
        vae = find_companion(args.vae, ckpt, fallback, download, "--vae")
        tokenizer = vq.load(vae, dtype=self.dtype)
        try:
            model.check_pair(tokenizer)
        except ValueError as e:
            raise UserError(f"{vae}: {e}; give {fallback} as --vae") from None
        check_fingerprint(tokenizer, vae, self.metadata, ckpt)
        self.name, self.files = Path(ckpt).name, [Path(ckpt), Path(vae)]
        return tokenizer, model

    def prepare(self):
        args, saved = self.args, self.metadata.get("sampling", {})
        pixels = args.pixels or self.metadata.get("pixels")
        if pixels is None and args.aspect not in (None, 1.0):
            raise UserError(f"--aspect {args.aspect}: {self.name} draws squares of one size only")
        own = vq.as_pairs(self.tokenizer.config.patch_nums)                 # of one that knows no other sizes
        self.scales = vq.schedule(args.aspect or 1.0, pixels) if pixels else tuple(own)
        self.frames = [f"{h}x{w}" for h, w in self.scales]
        given = {k: v for k in ("cfg", "tau", "top_k", "top_p") if (v := getattr(args, k)) is not None}
        self.options = dict(cfg=3.0, tau=0.5, top_k=0, top_p=0.97) | saved | given
        for name in ("cfg", "tau"):                                         # one value stands for all scales
            values = self.options[name]
            self.options[name] = values[0] if isinstance(values, list) and len(values) == 1 else values
            try:
                infinity.per_scale(self.options[name], len(self.scales), f"--{name}")
            except ValueError as e:
                raise UserError(str(e)) from None
        depth = self.model.config.depth
        if args.guide_features is not None and not -depth <= args.guide_features < depth:
            raise UserError(f"--guide-features {args.guide_features}: this model has {depth} blocks, -{depth} .. "
                            f"{depth - 1}")
        size = self.model.config.patchify + 1
        height, width = (n * size * self.tokenizer.config.stride for n in self.scales[-1])
        self.settings = {"model": "infinity", "checkpoint": self.name, "size": f"{height}x{width}"} | self.options | {
            "guide_after": args.guide_features, "negative": args.negative, "image": args.image,
            "keep": args.keep if args.image else 0, "tile": args.tile} | self.origin()
        self.options |= {"scales": self.scales, "guide_after": args.guide_features, "tile": args.tile}
        self.height, self.width = height, width
        self.text_width, self.text_length = self.model.config.text_width, self.model.config.text_maxlen

    def draw(self, prompts, numbers, ladder=False):
        """Pictures of these numbers: a list of (B, 3, h, w) in [0, 1], one per scale, or the last alone."""
        rows = [self.features[prompt] for prompt in prompts]
        text = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(text.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        negative = None
        if self.args.negative is not None:
            negative = self.features[self.args.negative][None], None
        images = self.model.sample(self.tokenizer, text, None if mask.all() else mask, negative=negative,
                                   generator=self.generators(numbers), ladder=ladder, run=self.run, **self.options)
        return images if ladder else [images]


def infinity_prompts(job):
    """All prompts of a command line, with --face-suffix."""
    args = job.args
    about_people = lambda p: args.face_suffix and any(word in p for word in PEOPLE) and FACES not in p
    return choose_prompts(job, lambda p: p + FACES if about_people(p) else p,
                          [args.negative] if args.negative is not None else [])


def sample_infinity(args):
    """Pictures as a grid, one by one, or a folder of them; or --bench, --save-features."""
    check_generator_args(args)
    check_pixels(args.pixels)
    check_ranges(*(("--cfg", c, 0, None) for c in args.cfg or []), *(("--tau", t, 1e-3, None) for t in args.tau or []),
                 ("--aspect", args.aspect, 0.3, 3.4), ("--keep", args.keep, 1, None), ("--tile", args.tile, 0, None))
    if 0 < args.tile <= 8:
        raise UserError(f"--tile {args.tile}: tiles overlap by 8 cells; use 16 or more")
    check_prompt_args(args)
    out, single = prompts_out(args, "out/infinity.png")
    given = read_picture(args.image) if args.image else None
    job = InfinityJob(args)
    if args.bench:
        return bench_infinity(job)
    prompts = infinity_prompts(job)
    if args.save_features:
        return save_features(job, args.save_features)
    if args.compile:
        job = next(iter(job.variants().values()))
    if given is not None:
        image = to_tensor(cover(given, job.height, job.width), job.device)
        sizes = infinity.tokenizer_scales(job.scales, job.model.config.patchify)
        if args.keep > len(sizes):
            raise UserError(f"--keep {args.keep}: there are {len(sizes)} scales")
        job.options |= {"given": job.tokenizer.tokenize(image, sizes), "keep": args.keep}
    draw_prompts(job, prompts, out, single)


def bench_infinity(job):
    """--bench: -n pictures of one prompt; with random weights of 24 random text features, as no T5 is loaded then."""
    if job.args.random_weights:
        features = torch.randn(24, job.model.config.text_width, generator=torch.Generator().manual_seed(0))
        prompts, job.features = ["random"], {"random": features}
    else:
        prompts = infinity_prompts(job)[:1]
    quantizer = job.tokenizer.quantize
    bench_job(job, prompts * job.args.n, {"sampling": [(infinity, "draw_bits"), (infinity, "exponential_noise")],
                                          "quantizer": [(quantizer, "contribution"), (quantizer, "next_input")]})


# ----------------------------------------------------------------------------------------------------------------------
# python sample.py llamagen


class LlamaGenJob(PromptJob):
    """`sample.py llamagen`: items are class ids, or prompts for models that read text."""

    MODULE = llamagen

    def random_models(self, config, g):
        released = "vq_ds16_t2i" if config.text_width else "vq_ds16_c2i"
        name = "emoji_vq_single" if self.name.startswith("emoji") else released
        tokenizer = vq.build(vq.VQVAE, replace(vq.CONFIGS[name], patch_nums=(config.side,))).eval()
        tokenizer.init_weights(g)
        model = vq.build(llamagen.LlamaGen, self.sized(config, tokenizer)).eval()
        model.init_weights(g)
        torch.nn.init.normal_(model.head.weight, 0, 0.02, generator=g)      # zero at the start of training: all ties
        return tokenizer, llamagen.set_dtype(model, self.dtype)             # which decodes in float32, as the original

    def load_models(self):
        """--ckpt and --vq, or the demo."""
        args, download = self.args, not self.args.no_download
        demo = "emoji_llamagen_t2i" if args.prompt or args.prompts or args.features else "emoji_llamagen"
        ckpt = find_checkpoint(args.ckpt, download) if args.ckpt else DEMO / f"{demo}.safetensors"
        self.metadata = read_metadata(ckpt)
        model = load_llamagen(ckpt, side=args.size and 1, dtype=self.dtype, device=self.device)
        released = "vq_ds16_t2i.pt" if model.config.text_width else "vq_ds16_c2i.pt"
        fallback = released if model.config.vocab_size == 16384 else "emoji_vq_single.safetensors"
        vae = find_companion(args.vae, ckpt, fallback, download, "--vq")
        tokenizer = vq.load(vae)
        try:
            model.check_pair(tokenizer)
        except ValueError as e:
            raise UserError(f"{vae}: {e}; give {fallback} as --vq") from None
        check_fingerprint(tokenizer, vae, self.metadata, ckpt)
        model.config = self.sized(model.config, tokenizer)
        self.name, self.files = Path(ckpt).name, [Path(ckpt), Path(vae)]
        return tokenizer, model

    def sized(self, config, tokenizer):
        """A Config for pictures of --size."""
        size, stride = self.args.size, tokenizer.config.stride
        if size and size % stride:
            raise UserError(f"--size {size}: expected a multiple of {stride}, the tokenizer's stride")
        return replace(config, side=size // stride) if size else config

    def prepare(self):
        args, config = self.args, self.model.config
        self.reads, self.names = config.text_width > 0, self.metadata.get("classes", [])
        self.ITEMS, self.clean = "prompts" if self.reads else "classes", not args.no_clean
        self.text_width, self.text_length = config.text_width, config.text_slots
        self.scales, self.frames = [(config.side, config.side)], [f"{k}/8" for k in range(1, 9)]
        if self.reads and (args.classes or args.list_classes):
            raise UserError(f"{self.name}: draws what a text says and knows no classes; give --prompt, not --classes")
        if not self.reads and (args.prompt or args.prompts or args.features):
            raise UserError(f"{self.name}: draws classes and reads no text; give --classes, or as --ckpt a t2i_* model")
        if self.reads and args.npz:
            raise UserError("--npz is for classes; for prompts fill a folder with --prompts FILE --out DIR")
        known = ("cfg", "cfg_interval", "temperature", "top_k", "top_p")
        given = {k: v for k in known if (v := getattr(args, k)) is not None}
        self.options = dict(cfg=7.5 if self.reads else 4.0, cfg_interval=-1, temperature=1.0,
                            top_k=1000 if self.reads else 2000, top_p=1.0) | self.metadata.get("sampling", {}) | given
        cfg = self.options.pop("cfg")
        self.cfg = cfg if isinstance(cfg, list) else [cfg]                  # one for all pictures, or one for each
        self.settings = {"model": "llamagen", "checkpoint": self.name, "seed": args.seed, "cfg": cfg} | self.options | {
            "side": config.side * self.tokenizer.config.stride, "eval_size": args.eval_size} | self.origin()

    def condition(self, items):
        """Class ids or prompts -> what the model takes, and the mask of texts or None."""
        if not self.reads:
            return torch.tensor(items), None
        return llamagen.left_pad([self.features[prompt] for prompt in items], self.text_length)

    def draw(self, items, numbers, ladder=False):
        """Pictures of these numbers: a list of (B, 3, h, w) in [0, 1], of the picture in progress, or the last one."""
        cond, words = self.condition(items)
        images = self.model.sample(
            self.tokenizer, cond, words, cfg=torch.tensor([self.cfg[i % len(self.cfg)] for i in numbers]),
            generator=self.generators(numbers), ladder=len(self.frames) if ladder else 0, size=self.args.eval_size,
            run=self.run, **self.options)
        return images if ladder else [images]

    def to_pixels(self, images):
        return to_pixels(images, 0.5)

    def describe(self, item):
        return super().describe(item) if self.reads else Job.describe(self, item)

    def text(self, i, item):
        return super().text(i, item) | {"cfg": self.cfg[i % len(self.cfg)]}

    def path(self, folder, i):
        return super().path(folder, i) if self.reads else Job.path(self, folder, i)

    def rivals(self, items):
        """The loop as it is usually written, without decoder. Its speed-up is below 1 by what this one gains."""
        numbers, cfg = range(len(items)), self.cfg[0]
        cond, words = self.condition(items)
        if words is not None or len(self.cfg) > 1 or self.options["cfg_interval"] != -1:
            return {}
        def mine():
            steps = self.model.steps(cond, cfg=cfg, generator=self.generators(numbers), run=self.run, **self.options)
            return torch.stack([step.tokens.clone() for step in steps], 1)
        options = {k: self.options[k] for k in ("temperature", "top_k", "top_p")}
        theirs = lambda: textbook_loop(self.model, cond.to(self.device), cfg, generator=self.generators(numbers),
                                       **options)
        result = race(mine, {"textbook loop": theirs}, len(items), self.device)
        return {name: v | {"what": "tokens"} for name, v in result.items()}


@torch.no_grad()
def textbook_loop(model, labels, cfg, temperature, top_k, top_p, generator):
    """LlamaGen's decode loop as it is usually written, with the same draws: caches looked at in full under a mask, keys
    and values repeated for each head, w1 and w3 apart, norm and rotation step by step, two sorts for the filters."""
    c, device = model.config, labels.device
    B, N, V, D, R = len(labels), c.side ** 2, c.vocab_size, c.width // c.heads, 2 * len(labels)
    cos, sin = llamagen.rope_table(c, device)
    mask = torch.tril(torch.ones(N + 8, N + 8, dtype=torch.bool, device=device))
    caches = [[torch.zeros(R, c.heads, N + 8, D, device=device, dtype=model.head.weight.dtype) for _ in range(2)]
              for _ in model.blocks]
    noises = llamagen.draws((B, V), N, generator, device)

    def norm(x, layer):
        wide = x.float()
        return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + layer.eps)).type_as(x) * layer.weight

    def rotate(x, pos):
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([a * cos[pos] - b * sin[pos], b * cos[pos] + a * sin[pos]], -1)
        return turned.flatten(-2).type_as(x)
    x, tokens = torch.cat([labels, torch.full_like(labels, c.num_classes)]), []
    for pos in range(N):
        h = (model.class_embed if pos == 0 else model.token_embed)(x)[:, None]
        for block, (keys, values) in zip(model.blocks, caches):
            qkv = F.linear(norm(h, block.norm1), block.attn.qkv.weight)
            q, k, v = qkv.view(R, 1, 3, c.heads, D).unbind(2)
            keys[:, :, pos], values[:, :, pos] = rotate(k, pos)[:, 0], v[:, 0]
            q, k, v = rotate(q, pos).transpose(1, 2), keys.repeat_interleave(1, 1), values.repeat_interleave(1, 1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[pos:pos + 1])
            h = h + F.linear(out.transpose(1, 2).reshape(R, 1, -1), block.attn.proj.weight)
            y, (w1, w3) = norm(h, block.norm2), block.ffn.fc1.weight.chunk(2)
            gated = F.silu(F.linear(y, w1)) * F.linear(y, w3)
            h = h + F.linear(gated, block.ffn.fc2.weight)
        cond, uncond = F.linear(norm(h, model.norm), model.head.weight)[:, 0].float().chunk(2)
        logits = (uncond + (cond - uncond) * cfg) / max(temperature, 1e-5)
        if top_k:
            logits = logits.masked_fill(logits < logits.topk(min(top_k, V)).values[:, -1:], -math.inf)
        if 0 < top_p < 1:
            ordered, index = logits.sort(descending=True)
            p = ordered.softmax(-1)
            ordered = ordered.masked_fill(p.cumsum(-1) - p > top_p, -math.inf)
            logits = torch.empty_like(logits).scatter_(-1, index, ordered)
        tokens.append((logits.softmax(-1) / next(noises)).argmax(-1))
        x = tokens[-1].repeat(2)
    return torch.stack(tokens, 1)


def sample_llamagen(args):
    """Pictures as a grid, one by one, or a folder of them; or --bench, --npz, --list-classes, --save-features."""
    check_generator_args(args)
    check_prompt_args(args)
    check_ranges(*(("--cfg", c, 0, None) for c in args.cfg or []), ("--temperature", args.temperature, 0, None),
                 ("--cfg-interval", args.cfg_interval, -1, None), ("--size", args.size, 1, None),
                 ("--eval-size", args.eval_size, 1, None))
    if args.npz:
        check_writable(args.npz, "--npz", suffix=".npz")
        if args.steps_grid:
            raise UserError("--npz is for whole sets of pictures: leave out --steps-grid")
    out, single = (None, True) if args.npz or args.list_classes else prompts_out(args, "out/llamagen.png")
    job = LlamaGenJob(args)
    if args.bench:
        return bench_llamagen(job)
    if args.list_classes:
        return list_classes(job)
    if job.reads:
        args.n = args.n or 1
        prompts = choose_prompts(job)
        if args.save_features:
            return save_features(job, args.save_features)
    elif args.save_features:
        raise UserError(f"{job.name}: reads no text, so there are no features to save")
    if args.compile:
        job = next(iter(job.variants().values()))
    if args.npz:
        return write_npz(job, Path(args.npz))
    if job.reads:
        return draw_prompts(job, prompts, out, single)
    draw_and_save(job, choose_labels(job), out, single)


def bench_llamagen(job):
    """--bench: -n pictures in one batch, by default one; of random text features where there is no T5."""
    n = job.args.n or 1
    if not job.reads:
        items = choose_labels(job)[:n]
    elif job.args.random_weights:
        features = torch.randn(24, job.text_width, generator=torch.Generator().manual_seed(0))
        items, job.features = ["random"] * n, {"random": features}
    else:
        items = choose_prompts(job)[:1] * n
    bench_job(job, items, {"sampling": [(job.model, "_draw"), (llamagen, "exponential_noise")]})


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
    out, single = check_out(args.out, "out/vq.png")
    peak = PeakMemory(device)
    tokenizer = vq.load(
        find_checkpoint(args.ckpt, not args.no_download) if args.ckpt else DEMO / "emoji_vq.safetensors", dtype=dtype
    )
    c, tokenizer = tokenizer.config, tokenizer.to(device)
    tiles = [read_picture(file) for file in args.image] if args.image else demo_tiles()[0][19::240]
    rows, scores, tokens, seconds = [], [], [], 0.0
    for picture in tqdm(tiles, unit="picture", leave=False, disable=len(tiles) < 8):
        picture, patch_nums = fit(picture, c, args.keep_size)
        image = to_tensor(picture, device)
        there, indices = timed(lambda: tokenizer.tokenize(image, patch_nums), device)
        back, decoded = timed(lambda: tokenizer.detokenize(indices, patch_nums, ladder=args.steps_grid), device)
        ladder = decoded if args.steps_grid else [decoded]
        seconds += there + back
        tokens.append(torch.cat(indices, 1))
        scores.append(psnr(ladder[-1], image).item())
        rows.append(to_pixels(torch.cat([image, *ladder]).add(1).div(2)))
    titles = ["original"] + (
        [f"{h}x{w}" for h, w in vq.as_pairs(c.patch_nums)] if args.steps_grid else ["decoded"])
    text = {"model": "vq", "checkpoint": args.ckpt or "demo"}
    if single and len({row.shape for row in rows}) == 1:
        if args.steps_grid:
            sheet = grid(np.concatenate(rows), len(titles), titles=titles)
        else:                                                               # originals above, reconstructions below
            sheet = grid(np.concatenate(np.stack(rows, 1)), len(rows))
        save_png(out, sheet, text)
    else:                                                                   # one file per picture
        out = check_writable(out.with_suffix("") if single else out)
        for i, row in enumerate(rows):
            save_png(out / f"{i:05d}.png", grid(row, len(row), titles=titles), text)
    usage = tokenizer.quantize.coverage([torch.cat([t.flatten(0, 1) for t in tokens])[None]], c)
    what = "codes used" if c.vocab_size else "bits' entropy"
    note = f"PSNR {np.mean(scores):.2f} dB, {usage:.0f} % of the {what}, "
    print(last_line(device, device_why, dtype, dtype_why, (tokenizer,), seconds / len(rows), peak, out, note))


def fit(picture, config, keep_size):
    """The picture at a size that the tokenizer takes, and the schedule that goes with it."""
    stride, (last, _) = config.stride, vq.as_pairs(config.patch_nums)[-1]
    if keep_size and not config.vocab_size:                                 # bits: the next smaller size of a schedule
        aspect, doubled = picture.height / picture.width, 16 // stride
        fits = [p for p in vq.PIXELS if vq.schedule(aspect, p)[-1][0] * 16 <= picture.height] or ["0.06M"]
        patch_nums = [(doubled * h, doubled * w) for h, w in vq.schedule(aspect, fits[-1])]
        return cover(picture, *(n * stride for n in patch_nums[-1])), patch_nums
    if not keep_size:
        return cover(picture, stride * last, stride * last), config.patch_nums
    w, h = picture.width // stride, picture.height // stride                # in cells
    if min(w, h) < 1:
        raise UserError(
            f"a picture of {picture.width}x{picture.height} is smaller than one cell of {stride}x{stride} pixels"
        )
    patch_nums = [(max(1, round(p * h / last)), max(1, round(p * w / last))) for p in config.patch_nums]
    return picture.crop((0, 0, w * stride, h * stride)), patch_nums


# ----------------------------------------------------------------------------------------------------------------------
# python sample.py syncnet

SHIFTS = "frames by which the sound is moved to an earlier moment"           # what a chart of a Score has below


def load_syncnet(args, device, dtype):
    """(network, its name) of --ckpt."""
    path = find_checkpoint(args.ckpt, not args.no_download) if args.ckpt else DEMO / "talking_head_syncnet.safetensors"
    model = syncnet.load(path, dtype=dtype, device=device)
    check_judge(model, path, original=True)
    return model, Path(path).name


def check_judge(model, what, original=False):
    """Makes sure that a SyncNet looks at pictures, and is a StableSyncNet unless the original one will do."""
    if isinstance(model, syncnet.OriginalSyncNet):
        if not original:
            raise UserError(f"{what}: is the original SyncNet, whose distances are no probability; expected a "
                            "StableSyncNet that sees aligned faces, such as stable_syncnet.pt")
    elif model.config.latent:
        raise UserError(f"{what}: reads latents, not pictures; expected one such as stable_syncnet.pt")


def colors_of(picture):
    """What `is_cut` compares."""
    return np.asarray(picture.resize((64, 64), Image.BOX).convert("HSV"), np.int16)


def is_cut(before, colors):
    """Whether two successive frames belong to two scenes."""
    return np.abs(colors - before).mean() > 27


def find_faces(video, device, every=5, count=None, instead="--face X0 Y0 X1 Y1, in pixels, or --face whole"):
    """Of the faces in every fifth frame, none in others: (x0, y0, x1, y1, and x, y of both eyes, the nose, both mouth
    corners); and the frames where scenes begin. count: of frames to look at; instead: what to do without the package.
    """
    try:
        from facenet_pytorch import MTCNN
    except ImportError as e:
        raise MissingPackage(f"finding faces needs {e.name}: pip install --no-deps facenet-pytorch, pip install "
                             f"requests; or say where the face is: {instead}") from None
    detector = MTCNN(keep_all=True, device=device if device.type == "cuda" else "cpu")     # sees 20 pixels and more
    shrink, boxes, cuts, before = max(1.0, max(video.height, video.width) / 640), [], [], None
    large = min(video.height, video.width) / shrink >= 20                   # enough for the detector
    frames = tqdm(itertools.islice(video, count), total=min(len(video), count or len(video)), desc="looking for faces",
                  unit="frame", leave=False)
    for i, frame in enumerate(frames):
        picture = Image.fromarray(frame).resize((round(video.width / shrink), round(video.height / shrink)), Image.BOX)
        colors = colors_of(picture)
        if before is not None and is_cut(before, colors):
            cuts.append(i)
        before = colors
        found, sure, points = detector.detect(picture, landmarks=True) if large and i % every == 0 else (
            None, None, None)
        boxes.append([] if found is None else [(*(box * shrink), *(at.flatten() * shrink)) for box, p, at in
                                               zip(found, sure, points) if p >= 0.9])
    return boxes, cuts


def faces_of(video, args, device, model):
    """[(first frame, what cuts the face of frame i out of it, number of frames or None for all)] of --face."""
    if args.face == ["whole"] or (args.face == ["auto"] and video.height == video.width):
        return [(0, lambda frame, i: frame, None)]
    if args.face in (["auto"], ["detect"]):
        boxes, cuts = find_faces(video, device)
        tracks = [(first, rows[:, :4]) for first, rows in syncnet.face_tracks(boxes, cuts)]
        if not tracks:
            seen, looked = sum(map(bool, boxes)), -(-len(boxes) // 5)
            raise UserError(f"{video.path}: no face to judge: expected one of 100 pixels or more that stays for 2 s; "
                            f"found some in {seen} of {looked} frames; say where it is: --face X0 Y0 X1 Y1, in pixels")
    else:
        tracks = [(0, np.tile(parse_box(args.face, video), (13, 1)))]       # 13: as many as are smoothed over
    cutter = judge_crop if isinstance(model, syncnet.OriginalSyncNet) else aligned_crop
    return [(first, cutter(boxes), None if len(args.face) == 4 else len(boxes)) for first, boxes in tracks]


def parse_box(words, video):
    """--face X0 Y0 X1 Y1 as an array."""
    try:
        x0, y0, x1, y1 = box = [float(word) for word in words]
    except ValueError:
        box = None
    if box is None or not (0 <= x0 < x1 <= video.width and 0 <= y0 < y1 <= video.height):
        raise UserError(f"--face {' '.join(words)}: expected auto, detect, whole, or a box X0 Y0 X1 Y1 in pixels "
                        f"inside of {video.width} x {video.height}")
    return np.array(box)


def judge_crop(boxes):
    """Crops as the original SyncNet saw them."""
    halves, centres = syncnet.smooth_track(boxes)
    return lambda frame, i: syncnet.face_crop(frame, halves[min(i, len(boxes) - 1)], centres[min(i, len(boxes) - 1)])


def aligned_crop(boxes):
    """Crops nearly as StableSyncNet's aligned faces: a face box stretched to a square has brows, nose and mouth where
    these have them, as long as the head is upright. What lies beyond the picture is like its edge."""
    _, centres = syncnet.smooth_track(boxes)
    sides = np.median(boxes[:, 2:] - boxes[:, :2], 0)

    def cut(frame, i):
        columns, rows = (np.arange(round(c - side / 2), round(c - side / 2) + max(1, round(side))).clip(0, n - 1)
                         for c, side, n in zip(centres[min(i, len(boxes) - 1)], sides, frame.shape[:0:-1]))
        crop = frame[:, rows][:, :, columns]
        crop = F.interpolate(crop[None].float(), (256, 256), mode="bicubic", antialias=True)
        return crop[0].round().clamp(0, 255).byte()
    return cut


def sample_syncnet(args):
    """Offset, confidence and distance of every face of a video, and the curve over all shifts as a picture."""
    check_ranges(("--batch-size", args.batch_size, 1, None), ("--max-shift", args.max_shift, 1, 100))
    device, device_why = choose_device(args.device)
    dtype, dtype_why = choose_dtype(args.dtype, device)
    out = check_writable(args.out or "out/syncnet.png", suffix=".png")
    peak = PeakMemory(device)
    model, name = load_syncnet(args, device, dtype)
    video = Video(args.video or DEMO / "talking_head.mp4")
    sound = read_sound(args.audio or video.path)
    faces, scores, frames, start = faces_of(video, args, device, model), [], 0, time.perf_counter()
    for number, (first, cut, count) in enumerate(faces, 1):
        pictures = itertools.islice(video.frames(first), count)
        pictures = tqdm(pictures, total=count or len(video), desc=f"face {number}", unit="frame", leave=False)
        crops = (cut(torch.from_numpy(picture).permute(2, 0, 1), i) for i, picture in enumerate(pictures))
        try:
            score = syncnet.score(model, crops, sound[first * SAMPLE_RATE // FPS:], args.max_shift, args.batch_size)
        except ValueError as e:
            why = (f"face {number}: {e}; it has {count or len(video)} frames from frame {first} on, and the sound ends "
                   f"at {len(sound) / SAMPLE_RATE:.2f} s")
            print(f"note: {why}", file=sys.stderr)
            continue
        if not math.isfinite(score.distance):
            raise UserError(f"{name}: distances overflow in {args.dtype}: use --dtype fp32")
        scores.append(score)
        frames += score.clips
        print(f"face {number}: {score.clips} clips from frame {first}: {describe_score(score)}")
    seconds = time.perf_counter() - start
    if not scores:
        raise UserError(f"{video.path}: {why}")
    if len(scores) > 1:
        print("all {}: offset {:+d}, confidence {:.3f}, distance {:.3f}".format(len(scores), *syncnet.combine(scores)))
    if np.abs(sound).max() < 1e-3:
        print("note: the sound is silent: nothing is in step with it, and the offset means nothing", file=sys.stderr)
    shifts = range(-args.max_shift, args.max_shift + 1)
    title = lambda i: f"face {i}" if len(scores) > 1 else ""
    curves = {title(i): (shifts, score.curve.tolist()) for i, score in enumerate(scores, 1)}
    best = max(scores, key=lambda score: score.confidence)
    save_png(out, chart(curves, f"{Path(video.path).name}, judged by {name}", SHIFTS, "distance",
                        marks=[(-best.offset, best.distance, f"offset {best.offset:+d}")]),
             {"model": "syncnet", "checkpoint": name, "video": video.path, "sound": args.audio or "its own"})
    print(last_line(device, device_why, dtype, dtype_why, (model,), seconds / frames, peak, out, unit="frame"))


def describe_score(score):
    """A Score in words."""
    milliseconds = abs(score.offset) * 1000 // FPS
    when = f" (the sound is {milliseconds} ms too {'early' if score.offset > 0 else 'late'})" if score.offset else ""
    return f"offset {score.offset:+d} frames{when}, confidence {score.confidence:.3f}, distance {score.distance:.3f}"


# ----------------------------------------------------------------------------------------------------------------------
# python sample.py latentsync


class Dubbing:
    """The three models of a dub, and where they came from."""

    def __init__(self, args):
        self.args = args
        self.device, self.device_why = choose_device(args.device)
        self.dtype, self.dtype_why = choose_dtype(args.dtype, self.device)
        if args.dtype == "auto" and self.device.type == "cuda":
            halves = torch.cuda.get_device_capability(self.device)[0] > 7
            self.dtype, self.dtype_why = (torch.float16 if halves else torch.float32), "as the original has it here"
        self.peak = PeakMemory(self.device)
        (self.random if args.random_weights else self.load)(args)
        self.unet, self.autoencoder = (model.to(self.device, self.dtype) for model in (self.unet, self.autoencoder))
        self.whisper = self.whisper.to(self.device)                         # small, and exact in float32
        self.parts = self.unet, self.autoencoder, self.whisper
        if args.frames:
            c = self.unet.config
            if c.motion != "none" and args.frames > c.motion_length:
                raise UserError(f"--frames {args.frames}: expected at most {c.motion_length}, the frames that its "
                                "motion modules can tell apart")
            self.unet.config = replace(c, frames=args.frames)
        check_ranges(("--overlap", args.overlap, 0, self.unet.config.frames - 1))

    def random(self, args):
        self.name, g = args.random_weights, torch.Generator().manual_seed(args.seed)
        if self.name not in latentsync.CONFIGS:
            raise UserError(f"--random-weights {self.name}: choose one of {', '.join(latentsync.CONFIGS)}")
        demo, config = self.name == "talking_head", latentsync.CONFIGS[self.name]
        self.unet = vq.build(latentsync.UNet, replace(config, resolution=args.resolution or config.resolution))
        self.autoencoder = vq.build(vq.KLAutoencoder, vq.CONFIGS["talking_head_kl" if demo else "sd-vae-ft-mse"])
        self.whisper = vq.build(latentsync.Whisper, latentsync.WHISPERS["talking_head" if demo else "tiny"])
        for model in (self.unet, self.autoencoder, self.whisper):
            model.eval().init_weights(g)
        self.cfg = 1.5 if args.cfg is None else args.cfg

    def load(self, args):
        find = lambda name: find_checkpoint(name, not args.no_download)
        companion = lambda given, fallback, flag: find_companion(given, self.ckpt, fallback, not args.no_download, flag)
        self.ckpt = Path(find(args.ckpt) if args.ckpt else DEMO / "talking_head_latentsync.safetensors")
        self.name, metadata = self.ckpt.name, read_metadata(self.ckpt)
        ours = "tokenizer" in metadata                                      # written by train.py
        newest = not ours and "1.6" in "/".join(self.ckpt.absolute().parts[-2:])        # which no tensor tells
        self.unet = latentsync.load(self.ckpt, resolution=args.resolution or (512 if newest else None))
        vae = companion(args.vae, "talking_head_kl.safetensors" if ours else "sd-vae-ft-mse", "--vae")
        ears = "talking_head_whisper.safetensors" if ours else "whisper_tiny.pt"
        if not ours and not args.whisper and (self.ckpt.parent / "whisper" / "tiny.pt").exists():
            args.whisper = self.ckpt.parent / "whisper" / "tiny.pt"         # as the authors lay it
        ear = companion(args.whisper, ears, "--whisper")
        self.autoencoder, self.whisper = vq.load_autoencoder(vae), latentsync.load_whisper(ear)
        check_fingerprint(self.autoencoder, vae, metadata, self.ckpt)
        if self.whisper.config.width != self.unet.config.audio_width:
            raise UserError(f"{ear}: its features are {self.whisper.config.width} wide, but {self.ckpt} listens to "
                            f"{self.unet.config.audio_width}; give the encoder it was trained with as --whisper")
        self.cfg = args.cfg if args.cfg is not None else metadata.get("sampling", {}).get("cfg", 1.5)

    def options(self):
        """Of latentsync.lipsync."""
        args = self.args
        return dict(steps=args.steps, cfg=self.cfg, cache_every=3 if args.deep_cache else 1, slices=args.decode,
                    overlap=args.overlap)

    def generator(self):
        return torch.Generator(self.device).manual_seed(self.args.seed)

    def faster(self):
        """{name: how its UNet is called}, the best first."""
        ways = {"graph": CUDAGraphs()} if self.device.type == "cuda" else {}
        compiled = torch.compile(self.unet.with_cache)
        return ways | {"compile": lambda function, constants, *tensors: compiled(*tensors)}

    def dub(self, frames, windows, run=latentsync.call):
        return latentsync.lipsync(self.unet, self.autoencoder, frames, windows, self.generator(), run=run,
                                  **self.options())


def detected_points(video, device, args, count=None):
    """Three points for each of the first `count` frames of a video, (frames, 3, 2), nan where there is no face. Of
    several faces that of rank --face, by size, followed through each scene."""
    every = args.detect_every or (1 if device.type == "cuda" else 3)
    rows, cuts = find_faces(video, device, every, count, "--landmarks FILE.npz, or --aligned")
    ranks = points_of_faces(rows, cuts, every)
    if not ranks:
        seen = sum(map(bool, rows))
        raise UserError(f"{video.path}: no face of 50 pixels or more in any of {len(rows)} frames"
                        + (f" (smaller ones in {seen})" if seen else "") + "; nothing was written; if there is one, "
                        "give --landmarks FILE.npz")
    if args.face > len(ranks):
        raise UserError(f"--face {args.face}: there are never more than {len(ranks)} faces at a time in {video.path}")
    return ranks[args.face - 1]


def points_of_faces(rows, cuts, every):
    """Three points for each frame, (frames, 3, 2), nan where there is none: of the largest face, of the second, ... in
    what find_faces found in every such frame."""
    tracks = syncnet.face_tracks(rows, cuts, longest_gap=2 * every, shortest=0, smallest=50)
    bounds, ranks = [0, *cuts, len(rows)], []
    for first, found in sorted(tracks, key=lambda t: -np.prod(t[1][:, 2:4] - t[1][:, :2], 1).mean()):
        points = latentsync.three_points(found[:, 4:].reshape(-1, 5, 2))
        if every == 1 and len(points) > 4:                                  # the detector trembles
            padded = np.pad(points, ((1, 1), (0, 0), (0, 0)), mode="edge")
            points = 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]
        # between two looks a face may have come or gone: as long as the scene lasts it is held to both sides
        low = max(first - every + 1, max(b for b in bounds if b <= first))
        high = min(first + len(points) + every - 1, min(b for b in bounds if b >= first + len(points)))
        points = np.pad(points, ((first - low, high - first - len(points)), (0, 0), (0, 0)), mode="edge")
        for rank in ranks:
            if np.isnan(rank[first:first + len(found)]).all():
                break
        else:
            ranks.append(rank := np.full((len(rows), 3, 2), np.nan))
        rank[low:high] = np.where(np.isnan(rank[low:high]), points, rank[low:high])
    return ranks


def given_points(path, wanted):
    """Three points for each frame, from an .npz file. wanted: so many frames will be shown; one or two that are missing
    at the end are like the last."""
    try:
        with np.load(path) as arrays:
            landmarks = arrays["landmarks"]
        points = latentsync.three_points(np.where(np.isfinite(landmarks), landmarks, np.nan))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, TypeError, EOFError, zlib.error) as e:
        reason = "no such file" if isinstance(e, FileNotFoundError) else str(e)
        raise UserError(f"--landmarks {path}: {reason}; expected an .npz with an array 'landmarks' (frames, N, 2), N = "
                        "3, 5, 106 or 478") from None
    if points.ndim == 3:
        points = points.astype(float)
        points[np.ptp(points, 1).max(-1, initial=0) == 0] = np.nan          # zeros: what some give for no face
    if points.ndim != 3 or np.isnan(points).any((1, 2)).all():
        raise UserError(f"--landmarks {path}: expected (frames, N, 2), with a face in one frame at least, found an "
                        f"array of {landmarks.shape}")
    if len(points) < wanted - 2:
        raise UserError(f"--landmarks {path}: are for {len(points)} frames, expected {wanted}, one for each at {FPS} a "
                        "second")
    return np.concatenate([points, np.repeat(points[-1:], max(wanted - len(points), 0), 0)])


class Faces:
    """For every frame of a video the map to its aligned face, or None. Maps are found in the order of the frames."""

    def __init__(self, video, device, args, resolution, count):
        self.maps, self.align = [], latentsync.Aligner(resolution)
        if args.aligned:
            (h, w), (H, W) = self.align.canvas, (video.height, video.width)
            self.whole = torch.tensor([[(w - 1) / max(W - 1, 1), 0, 0], [0, (h - 1) / max(H - 1, 1), 0]])
            self.points = None
        else:
            landmarks = args.landmarks or (DEMO / "talking_scene.npz" if args.video is None else None)
            wanted = min(count, len(video))
            self.points = given_points(landmarks, wanted) if landmarks else detected_points(video, device, args, count)

    def __call__(self, number):
        """The map of frame `number`, of which all earlier ones have been asked for before."""
        if self.points is None:
            return self.whole
        if number >= len(self.points):                                      # the file had said that it is shorter
            return None
        while len(self.maps) <= number:
            points = self.points[len(self.maps)]
            self.maps.append(None if np.isnan(points).any() else self.align(points))
        return self.maps[number]


def to_and_fro(video, count, held=2**28):
    """`count` times (number, frame) of a video: forth, and if it is shorter back, forth ... On the way back it is
    decoded in pieces from their start on, each of at most `held` bytes."""
    numbered, last, n = enumerate(video), -1, 0
    for last, picture in numbered:
        if n == count:
            return
        yield last, picture
        n += 1
    piece = max(1, held // (3 * video.height * video.width))
    while n < count:
        for end in range(last + 1, 0, -piece):
            start = max(end - piece, 0)
            pictures = list(itertools.islice(video.frames(start), end - start))
            for number in reversed(range(start, start + len(pictures))):
                if n == count:
                    return
                yield number, pictures[number - start]
                n += 1
        for number, picture in itertools.islice(enumerate(video), count - n):
            yield number, picture
            n += 1


def check_latentsync_args(args):
    """What argparse does not check."""
    check_ranges(("--steps", args.steps, 1, 999), ("--cfg", args.cfg, 0, None), ("--seed", args.seed, 0, None),
                 ("--overlap", args.overlap, 0, 15), ("--face", args.face, 1, None), ("--crf", args.crf, 0, 51),
                 ("--detect-every", args.detect_every, 1, 25), ("--decode", args.decode, 1, None),
                 ("--frames", args.frames, 1, None))
    exclude = [("--ckpt", "--random-weights"), ("--landmarks", "--aligned"), ("--syncnet", "--steps-grid")]
    for pair in exclude:
        if all(getattr(args, flag[2:].replace("-", "_")) for flag in pair):
            raise UserError(" and ".join(pair) + " exclude each other")
    if args.video and not args.audio and not args.bench:
        raise UserError("--audio FILE: what is to be said? A sound file, or a video with sound")
    if args.landmarks and not args.video:
        raise UserError("--landmarks: belongs to a --video FILE")
    check_json(args, args.bench)


def sample_latentsync(args):
    """A video in which somebody says what somebody else said."""
    check_latentsync_args(args)
    if args.bench:
        return bench_latentsync(Dubbing(args))
    out = check_writable(args.out or "out/latentsync.mp4", suffix=".mp4")
    path, audio = Path(args.video or DEMO / "talking_scene.mp4"), Path(args.audio or DEMO / "other_speech.flac")
    video, sound, rate = Video(path), read_sound(audio), 48000
    if path.resolve() == out.resolve() or audio.resolve() == out.resolve():
        raise UserError(f"--out {out}: would replace what it is made from; choose another name")
    if len(sound) < SAMPLE_RATE // 25:
        raise UserError(f"{audio}: {len(sound) * 1000 // SAMPLE_RATE} ms of sound; expected 40, a frame, at least")
    job = Dubbing(args)
    count = latentsync.count_frames(latentsync.count_rows(len(sound), job.whisper.config.positions))
    judge, faces = load_dub_judge(args, job.device), Faces(video, job.device, args, job.unet.config.resolution, count)
    numbers, empty, start = [], 0, time.perf_counter()                      # numbers: of the frames that are shown

    def frames():
        for number, picture in to_and_fro(video, count):
            numbers.append(number)
            yield picture, faces(number)
    run = next(iter(job.faster().values())) if args.compile else latentsync.call
    dubbed = job.dub(frames(), latentsync.windows(job.whisper, sound), run)
    size = (video.height, video.width) if not args.steps_grid else panel_size(job, video)
    with VideoWriter(out, *size, sound=read_sound(audio, rate), crf=args.crf, rate=rate) as writer:
        for frame in tqdm(dubbed, total=count, desc="dubbing", unit="frame", smoothing=0.05):
            writer.write(panels(frame, size) if args.steps_grid else frame.picture)
            empty += frame.generated is None
    seconds = time.perf_counter() - start
    if empty:
        print(f"note: {empty} of {len(numbers)} frames have no face; they stay as they were", file=sys.stderr)
    if judge:
        judge_dub(judge, job, video, out, numbers, faces, sound)
    print(last_line(job.device, job.device_why, job.dtype, job.dtype_why, job.parts, seconds / max(len(numbers), 1),
                    job.peak, out, f"{len(numbers)} frames of {len(numbers) / FPS:.2f} s, ", unit="frame"))


def panel_size(job, video):
    """(height, width) of four panels: three of a face's size, at least 128, and the frame, as high."""
    side = max(128, job.unet.config.resolution)
    return side, 3 * side + round(video.width / video.height * side)


def panels(frame, size):
    """Face, masked, painted, and the frame with it, side by side; grey where there is none."""
    side = size[0]
    resize = lambda picture, w: np.asarray(Image.fromarray(picture).resize((w, side), Image.LANCZOS))
    faces = [np.full((side, side, 3), 127, np.uint8) if face is None else
             resize(to_pixels(face[None].add(1).div(2).clamp(0, 1))[0], side)
             for face in (frame.face, frame.masked, frame.generated)]
    return np.concatenate([*faces, resize(frame.picture, size[1] - 3 * side)], 1)


def load_dub_judge(args, device):
    """The StableSyncNet of --syncnet, that of the demo for its own video, or None."""
    if not args.syncnet and (args.video or args.steps_grid):
        return None
    path = DEMO / "talking_head_syncnet.safetensors"
    if args.syncnet:
        path = find_checkpoint(args.syncnet, not args.no_download)
    judge = syncnet.load(path, device=device)
    check_judge(judge, path)
    return judge


def judge_dub(judge, job, video, out, numbers, faces, sound):
    """Prints what SyncNet says about the sound with the video as it was, and as it is now."""
    align, side = faces.align, judge.config.picture[1]

    def aligned(pictures):
        face = torch.full((3, side, side), 127.0)
        for number, picture in zip(numbers, pictures):
            if (found := faces(number)) is not None:                        # without a face it keeps the last one
                face = latentsync.align_face(torch.as_tensor(picture), found, align.canvas, align.resolution)[None]
                face = F.interpolate(face, (side, side), mode="bicubic", antialias=True)[0].round().clamp(0, 255)
            yield face.byte()
    for what, pictures in (("before", (p for _, p in to_and_fro(video, len(numbers)))), ("after", Video(out))):
        try:
            score = syncnet.score(judge, aligned(pictures), sound)
            print(f"{what + ':':<8}{describe_score(score)}")
        except ValueError as e:
            print(f"note: SyncNet cannot judge it: {e}", file=sys.stderr)
            return


def bench_latentsync(job):
    """--bench: one clip of random pictures, with a face at a given place; from sound and pictures to pictures."""
    args, c = job.args, job.unet.config
    height = 160 if c.resolution < 128 else 960
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, height, height * 9 // 16, 3), dtype=np.uint8)
    points = np.array([(0.4, 0.35), (0.6, 0.35), (0.5, 0.45)]) * (height * 9 // 16, height * 9 // 16)
    count = c.frames
    sound = 0.1 * rng.standard_normal(SAMPLE_RATE * count // FPS).astype(np.float32)

    def run(how=latentsync.call):
        align = latentsync.Aligner(c.resolution)
        frames = ((pictures[i % 2], align(points)) for i in range(count))
        windows = latentsync.windows(job.whisper, np.pad(sound, (0, SAMPLE_RATE)))
        faces = [frame.generated for frame in job.dub(frames, itertools.islice(windows, count), how)]
        return torch.stack(faces).float().cpu()
    stages = {"whisper": [(job.whisper, "forward")], "encoder": [(job.autoencoder, "encode")],
              "unet": [(job.unet, "with_cache")], "decoder": [(job.autoencoder, "decode")]}
    parameters = [p for model in job.parts for p in model.parameters()]
    result = bench(job.name, run, stages, "rest", parameters, job.device, job.dtype, count, job.peak,
                   rounds=1 if job.device.type == "cpu" else 3)
    result |= {"steps": args.steps, "cfg": job.cfg, "deep_cache": args.deep_cache, "resolution": c.resolution}
    if args.compile:
        ways = {name: lambda how=how: run(how) for name, how in job.faster().items()}
        result["variants"] |= race(run, ways, count, job.device)
    print(f"{c.resolution} pixels, {count} frames in a clip, {args.steps} steps, guidance {job.cfg}")
    print_bench(result)
    save_json(args.json, result)


# ----------------------------------------------------------------------------------------------------------------------
# python sample.py ops


def sorting_sampler(cond, uncond, cfg, top_k, top_p, noise):
    """sample_logits as it is usually written."""
    logits = cfg * cond.float() + (1 - cfg) * uncond.float()
    logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    ascending, index = logits.sort(-1)
    ascending = ascending.masked_fill(ascending.softmax(-1).cumsum(-1) <= 1 - top_p, float("-inf"))
    return (torch.empty_like(logits).scatter_(-1, index, ascending).softmax(-1) / noise).argmax(-1)


def whole_distance_matrix(z, codes):
    """vq_nearest as it is usually written."""
    z, codes = z.float(), codes.float()
    return torch.addmm(z.square().sum(1, keepdim=True) + codes.square().sum(1), z, codes.T, alpha=-2).argmin(1)


TEXTBOOK = {"sample_logits": sorting_sampler, "vq_nearest": whole_distance_matrix}     # others: as the op's torch lines


def peers(name):
    """{name: function of the op's arguments}: the same, or nearly, from packages that are installed."""
    if name == "vq_nearest":
        return {"cdist().argmin": lambda z, codes: torch.cdist(z.float(), codes.float()).argmin(1)}
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction as Liger
    except ImportError:
        return {}
    norm = lambda x, scale, *_, **__: Liger.apply(x, scale[0, 0].contiguous(), scale[0, 0].contiguous(), 1e-6)
    return {"liger-kernel, the norm alone": norm} if name == "adaln_modulate" else {}


def op_seconds(run, device, graph=True):
    """Seconds of a call. On CUDA the median with a cold L2 cache, or, if short, replayed in a graph as inference does
    (autograd cannot be); on a CPU the best of several, as now and then one pays for fresh memory."""
    if device.type == "cuda":
        from triton.testing import do_bench, do_bench_cudagraph
        ms = do_bench(run, return_mode="median")
        return (do_bench_cudagraph(run, return_mode="median") if graph and ms < 0.02 else ms) / 1e3
    seconds = []
    while len(seconds) < 6 or (sum(seconds) < 0.5 and len(seconds) < 50):
        seconds.append(timed(run, device)[0])
    return min(seconds)


def backward_of(fn, args, kwargs):
    """A function that computes the gradients of fn's tensor arguments, and nothing else, as often as it is called."""
    leaves = [t.detach().requires_grad_() for t in args]
    out = fn(*leaves, **kwargs)
    out = (out,) if isinstance(out, torch.Tensor) else out
    return lambda: torch.autograd.grad(out, leaves, [torch.ones_like(t) for t in out], retain_graph=True)


def largest_difference(out, expected):
    """Relative to the largest value; of indices, the share that differs."""
    pairs = list(zip(tree_flatten(out)[0], tree_flatten(expected)[0]))
    return max((a != b).float().mean().item() if a.dtype == torch.int64 else
               ((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in pairs)


def time_op(name, shape, device, dtype, backward):
    """({version: seconds}, difference of our version from plain torch). In place of the seconds of a version that
    fails, or of ours if it differs, stands the reason."""
    spec, g = REGISTRY[name], torch.Generator(device).manual_seed(0)
    args, kwargs = spec.inputs(lambda *size: torch.randn(size, generator=g, device=device).to(dtype), *shape)
    plain, own = TEXTBOOK.get(name, spec.fn), "triton" if device.type == "cuda" else "fallback"
    versions = {"eager": plain, "compile": torch.compile(plain, dynamic=False), own: spec.fn}
    versions |= {} if backward else peers(name)
    seconds, expected, difference = {}, None, math.nan
    for version, fn in versions.items():
        if version == "fallback" and fn is plain:                           # one and the same: not timed twice
            seconds[version], difference = seconds["eager"], 0.0
            continue
        try:
            with backend("auto" if version == "triton" else "torch"):
                run = backward_of(fn, args, kwargs) if backward else lambda: fn(*args, **kwargs)
                out = run()
                expected = out if version == "eager" else expected
                if version == own:
                    difference = largest_difference(out, expected)
                    if difference > max(spec.tol, {torch.float32: 0, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]):
                        raise ArithmeticError(f"differs from torch by {difference:.0e}")
                del out
                seconds[version] = op_seconds(run, device, graph=not backward)
        except Exception as e:                                              # whatever it is: the others go on
            seconds[version] = f"{type(e).__name__}: {e}".splitlines()[0]
    return seconds, difference


def bench_ops(names, device, dtype):
    """Prints a line per op, real shape and direction -> the rows as dicts."""
    from torch._functorch import config
    config.donated_buffer = False                                           # a compiled backward has to run many times
    square, bandwidth = torch.randn(2048, 2048, device=device), copy_bandwidth(device)
    rate = 2 * 2048**3 / op_seconds(lambda: square @ square, device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    info = {"device": where, "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"), "copy_bytes_per_second": bandwidth, "product_flops_per_second": rate}
    print(f"{where}, {info['dtype']}, torch {torch.__version__}, {info['date']}; the floor is what a large copy "
          f"({bandwidth / 1e9:.0f} GB/s)\nand a float32 product ({rate / 1e9:.0f} GFLOP/s) would take")
    if device.type == "cpu":
        print("Triton is not timed on a CPU, where only its interpreter runs: 'ours' is the torch code that runs there")
    columns = ("MB", "floor", "eager", "compile", "ours", "x eager", "x comp.", "% floor", "differs")
    print(f"{'microseconds':<58}" + "".join(f"{c:>9}" for c in columns))
    rows = []
    for name in names:
        spec = REGISTRY[name]
        directions = (False, True) if spec.trains else (False,)
        for (label, shape), backward in itertools.product(list(spec.shapes.items())[1:], directions):
            size = spec.bytes(dtype.itemsize, *shape) * (1.5 if backward else 1)    # two tensors read for each written
            floor = max(size / bandwidth, spec.flops(*shape) / rate)
            seconds, difference = time_op(name, shape, device, dtype, backward)
            eager, compiled, ours = (s if isinstance(s, float) else math.nan for s in list(seconds.values())[:3])
            title = f"{name}{' backward' if backward else ''}: {label}"
            print(f"{title:<58}{size / 1e6:>9.0f}" + "".join(f"{s * 1e6:>9.0f}" for s in (floor, eager, compiled, ours))
                  + f"{eager / ours:>9.2f}{compiled / ours:>9.2f}{100 * floor / ours:>9.0f}{difference:>9.0e}",
                  flush=True)
            for i, (version, s) in enumerate(seconds.items()):
                if i > 2 or isinstance(s, str):                             # peers, and what failed
                    print(f"    {version}: " + (s if isinstance(s, str) else f"{s * 1e6:.0f}"))
            rows.append(info | {"op": title, "shape": [*map(str, shape)], "bytes": size, "floor_seconds": floor,
                                "seconds": seconds, "difference": None if math.isnan(difference) else difference})
    return rows


def ops_table():
    """The registry in Markdown: what each op has to move in half precision, and the floor that sets on an H100."""
    yield "| op | shape | MB | floor in us: 3.35 TB/s, float32 67 TFLOP/s |"
    yield "|---|---|---|---|"
    for name, spec in REGISTRY.items():
        for label, shape in list(spec.shapes.items())[1:]:
            size, sizes = spec.bytes(2, *shape), " x ".join(str(n) for n in shape if isinstance(n, int))
            floor = max(size / 3.35e12, spec.flops(*shape) / 67e12)
            yield f"| `{name}` | {label}: {sizes} | {size / 1e6:.1f} | {floor * 1e6:.1f} |"


def sample_ops(args):
    """The table, or the benchmark."""
    check_json(args, args.bench is not None)
    if args.bench is None:
        return print(*ops_table(), sep="\n")
    for name in args.bench:
        if name not in REGISTRY:
            raise UserError(f"--bench {name}: expected some of {', '.join(REGISTRY)}, or nothing for all")
    device, _ = choose_device(args.device)
    rows = bench_ops(args.bench or [*REGISTRY], device, choose_dtype(args.dtype, device)[0])
    save_json(args.json, rows)


# ----------------------------------------------------------------------------------------------------------------------

MODELS = {"var": sample_var, "infinity": sample_infinity, "llamagen": sample_llamagen,
          "latentsync": sample_latentsync, "syncnet": sample_syncnet, "vq": sample_vq, "ops": sample_ops}


def guarded(run, args):
    """Runs a command. Mistakes of the user's become one line and exit code 2, Ctrl-C 130; a bug shows itself."""
    keep_freed_memory()
    try:
        run(args)
    except (UserError, vq.CheckpointError, BackendError) as e:
        sys.exit(_complain(e))
    except torch.OutOfMemoryError as e:
        hint = ("try a smaller --batch-size (latentsync: --decode, --frames), in training a larger --accum, or "
                "--dtype bf16")
        sys.exit(_complain(f"out of GPU memory: {hint} ({str(e).splitlines()[0]})"))
    except RuntimeError as e:
        if "WORLD_SIZE" in os.environ and any(words in str(e) for words in ("by peer", "Broken pipe", "NCCL")):
            sys.exit(_complain(f"another process of this run has died; what it said above, or torchrun below, is the "
                               f"reason ({str(e).splitlines()[0]})"))
        if type(e).__name__ != "InductorError":                             # whose module takes seconds to import
            raise
        needs = "torch.compile failed; it needs a C++ compiler and room in its cache folder. Leave out --compile"
        sys.exit(_complain(f"{needs} ({str(e).strip().splitlines()[0]})"))
    except OSError as e:                                                    # a full disk, a missing permission
        if e.filename is None:
            raise
        sys.exit(_complain(f"{e.filename}: {e.strerror}"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _complain(message):
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    guarded(MODELS[ARGS.model], ARGS)
