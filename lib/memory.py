"""How much memory a run needs, estimated before it makes anything large, and which flags bring that down.

Weights, gradients and the optimizer's averages are counted. The rest is estimated from a few numbers. They were
measured with networks of the released widths and two to four blocks, and leave out tokenizers, judges, and copies that
are made in passing, so an estimate is too low rather than too high. Each model is checked before it is made. One that
runs out of memory all the same ends in the same line.
"""
import functools
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn

import infinity
import latentsync
import llamagen
import var
import vq
from lib.console import DTYPES, UserError, choose_device, choose_dtype, rank_and_world
from lib.text import T5Encoder

GB = 1e9
SAVED = 52                      # numbers that a block keeps for each token and channel until the backward pass
SAVED_CHECKPOINTED = 4          # the same with --checkpointing, where the rest is computed anew
SAVED_LOGITS = 4                # numbers for each logit: itself, its gradient, and the softmax between them
STEP = 12                       # numbers for each token and channel while a model draws a scale
DRAWN_LOGITS = 4                # for each logit: guidance, sorting and the sum of probabilities
DECODER = 7                     # maps of the finest level that a decoder has in memory at the same time
DECODER_WIDTH = 160             # channels of the released tokenizers' finest level (128 to 160)
UNET_FRAME = {"none": 0.47, "up": 0.7, "all": 0.86}     # GB that a training UNet with such motion modules keeps for a
                                                        # frame of 256 pixels in fp32
UNET_CHECKPOINTED = 0.03        # the same with --checkpointing
UNET_DRAWN = 0.06               # the same while it denoises
SHOWN = 16                      # pictures that sample.py draws if nothing says how many
MANY = 10**6                    # as many as a batch has

# ----------------------------------------------------------------------------------------------------------------------
# What a run needs


@dataclass(frozen=True)
class Setting:
    """What of a command line decides how much memory it needs. For one process."""

    training: bool
    bytes: int                  # of a number in the precision of the run
    batch: int                  # pictures at a time; in training, of a micro-batch
    quantize: bool = False
    pixels: str = None          # of Infinity, see vq.PIXELS
    size: int = None            # of LlamaGen's pictures, if not those of its file
    tile: int = 0               # side of the tiles that are decoded one by one, in tokens; 0: none
    checkpointing: bool = False
    ema: bool = False
    lora: int = 0               # rank
    lora_layers: tuple = ()
    stage: str = None           # of LatentSync's training
    shards: int = 1             # processes that share the weights


def setting_of(args, device):
    """The Setting of a command line of sample.py or train.py."""
    get = functools.partial(getattr, args)
    shared = dict(quantize=bool(get("quantize", None)), pixels=get("pixels", None), size=get("size", None))
    world = rank_and_world()[1]
    if hasattr(args, "recipe") and not get("evaluate", None):
        return Setting(True, DTYPES[args.dtype].itemsize, max(1, args.batch_size // (args.accum * world)),
                       checkpointing=args.checkpointing, ema=bool(args.ema), lora=get("lora", 0),
                       lora_layers=tuple(get("lora_layers", ())), stage=get("stage", None),
                       shards=world if args.fsdp else 1, **shared)
    dtype, _ = choose_dtype(get("dtype", "auto"), device)
    pictures = (get("n", None) or 1) * len(get("prompt", None) or [1])
    if get("npz", None) or get("prompts", None):
        pictures = MANY
    elif not get("prompt", None):
        pictures = get("n", None) or len(get("classes", None) or [])
        pictures = pictures or SHOWN
    return Setting(False, dtype.itemsize, min(get("batch_size", 1), pictures), tile=get("tile", 0), **shared)


def ways_out(setting, sketch, cuda):
    """{flags: Setting} that need less memory."""
    found = {}
    if setting.bytes == 4 and cuda:
        found["--dtype bf16"] = replace(setting, bytes=2)
    if setting.training:
        if not setting.checkpointing:
            found["--checkpointing"] = replace(setting, checkpointing=True)
        if setting.batch > 1:
            found["a larger --accum, down to one picture at a time"] = replace(setting, batch=1)
        if hasattr(sketch, "blocks") and not setting.lora:
            found["--lora 16 --quantize int8"] = replace(setting, lora=16, quantize=True, lora_layers=("qkv", "proj"))
        elif setting.lora and not setting.quantize:
            found["--quantize int8"] = replace(setting, quantize=True)
        return found
    if not setting.quantize:
        found["--quantize int8"] = replace(setting, quantize=True)
    if setting.batch > 1:
        found["--batch-size 1"] = replace(setting, batch=1)
    if isinstance(sketch, infinity.Infinity) and not setting.tile:
        found["--tile 32"] = replace(setting, tile=32)
    return found


def need(sketch, setting):
    """{what for: bytes} of a model without weights, see vq.on_meta."""
    found = weights_and_optimizer(sketch, setting)
    if isinstance(sketch, T5Encoder):
        return found
    if isinstance(sketch, latentsync.UNet):
        found["activations"] = unet_activations(sketch.config, setting)
        return found
    tokens, at_a_time, pixels = picture_sizes(sketch, setting)
    C = sketch.config.width
    V = sketch.config.vocab_size if hasattr(sketch.config, "vocab_size") else 2 * sketch.config.bits
    if setting.training:
        kept = SAVED * sketch.config.depth                                  # numbers for each token and channel
        if setting.checkpointing:
            kept = SAVED_CHECKPOINTED * sketch.config.depth + SAVED
        found["activations"] = setting.batch * tokens * setting.bytes * (kept * C + SAVED_LOGITS * V)
        return found
    rows = 2 * setting.batch                                                # with guidance
    cached = C // sketch.config.heads * (getattr(sketch.config, "kv_heads", 0) or sketch.config.heads)
    found["cache"] = 2 * sketch.config.depth * rows * tokens * cached * setting.bytes
    drawing = rows * at_a_time * (STEP * C * setting.bytes + DRAWN_LOGITS * V * 4)
    pixels = min(pixels, (16 * setting.tile) ** 2) if setting.tile else pixels
    decoding = setting.batch * pixels * DECODER * DECODER_WIDTH * setting.bytes
    found["activations"] = max(drawing, decoding)
    return found


def weights_and_optimizer(sketch, setting):
    """{"weights": bytes} and, in training, {"optimizer": bytes} with gradients and averages."""
    linear = {name: layer.weight for name, layer in sketch.named_modules() if isinstance(layer, nn.Linear)}
    total = sum(p.numel() for p in sketch.parameters())
    multiplied = sum(weight.numel() for weight in linear.values())
    frozen = not setting.training or setting.lora
    if not frozen:
        learnt = total
        if isinstance(sketch, latentsync.UNet):                             # a stage trains some of its weights
            sketch.freeze(setting.stage)
            learnt = sum(p.numel() for p in sketch.parameters() if p.requires_grad)
        copies = 2 * multiplied if setting.bytes < 4 else 0                 # that autocast makes of them
        kept = 4 + 8 + (4 if setting.ema else 0)                            # gradient, two averages, EMA
        return {"weights": 4 * total / setting.shards + copies, "optimizer": kept * learnt / setting.shards}
    whole = isinstance(sketch, (llamagen.LlamaGen, latentsync.UNet, T5Encoder)) and not setting.training
    found = {"weights": multiplied * (1 if setting.quantize else setting.bytes)
             + (total - multiplied) * (setting.bytes if whole else 4)}
    if not setting.quantize:
        found["weights"] /= setting.shards                                  # int8 is not sharded
    if setting.training:
        learnt = sum(setting.lora * sum(weight.shape) for name, weight in linear.items()
                     if name.rpartition(".")[2] in setting.lora_layers)
        found["optimizer"] = learnt * (4 + 4 + 8 + (4 if setting.ema else 0))
    return found


def picture_sizes(sketch, setting):
    """(tokens of a picture with its condition, tokens that are drawn at the same time, pixels)."""
    config = sketch.config
    if isinstance(sketch, var.VAR):
        last = config.patch_nums[-1] ** 2
        return sum(p * p for p in config.patch_nums), last, 256 * last
    if isinstance(sketch, llamagen.LlamaGen):
        side = setting.size // 16 if setting.size else config.side
        return config.slots + side * side, 1, 256 * side * side
    maps = vq.schedule(1.0, setting.pixels or ("1M" if config.width >= 2048 else "0.06M"))
    last = maps[-1][0] * maps[-1][1]
    return sum(h * w for h, w in maps), last, 256 * last


def unet_activations(config, setting):
    """Bytes of LatentSync's UNet while it learns or denoises clips."""
    frames = setting.batch * config.frames * (config.resolution / 256) ** 2 * setting.bytes / 4
    if setting.training:
        return frames * GB * (UNET_CHECKPOINTED if setting.checkpointing else UNET_FRAME[config.motion])
    return frames * GB * UNET_DRAWN * 2                                     # with guidance


# ----------------------------------------------------------------------------------------------------------------------
# What there is


def free_memory(device):
    """Free bytes on a device, None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if device.type != "cpu":
        return None
    free = []
    with suppress(OSError, ValueError, KeyError):
        rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(1024 * sum(int(rows[name].split()[0]) for name in ("MemAvailable", "SwapFree")))
    with suppress(OSError, ValueError, KeyError):                           # the limit of a container, or "max"
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        rows = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free.append(limit - used + int(rows["inactive_file"]))              # files in memory make room
    return min(free, default=None)


def in_words(parts):
    """{"weights": 8.1e9, ...} -> "8.1 GB (weights 8.1, ...)"."""
    details = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts.items())
    return f"{sum(parts.values()) / GB:.1f} GB ({details})"


def advice(sketch, setting, cuda):
    """What brings the memory down, as a sentence; "" if nothing does."""
    now = sum(need(sketch, setting).values())
    ways = {}
    everything = setting
    for flags, other in ways_out(setting, sketch, cuda).items():
        less = sum(need(sketch, other).values())
        if less < 0.97 * now:
            ways[flags] = less
            changes = {name: value for name, value in vars(other).items() if value != getattr(setting, name)}
            everything = replace(everything, **changes)
    if not ways:
        return "nothing here brings it down"
    text = ", ".join(f"{less / GB:.1f} GB with {flags}" for flags, less in ways.items())
    if len(ways) > 1:
        text += f", {sum(need(sketch, everything).values()) / GB:.1f} GB with all of these"
    return f"it would need {text}"


def check(args, plans, cls, sizes):
    """Raise UserError if a model cls(*sizes) of a command line does not fit. Appends (sketch, setting) to plans."""
    if cls not in (var.VAR, infinity.Infinity, llamagen.LlamaGen, latentsync.UNet, T5Encoder):
        return
    device, _ = choose_device(args.device)
    sketch = vq.on_meta(cls, *sizes)
    setting = setting_of(args, device)
    if setting.training and (cls is T5Encoder or any(isinstance(other, cls) for other, _ in plans)):
        setting = replace(setting, training=False, batch=0)                 # not the model that learns: it reads texts,
    plans.append((sketch, setting))                                         # or is what --init names
    free = free_memory(device)
    parts = need(sketch, setting)
    if free is not None and sum(parts.values()) > free:
        raise UserError(f"{cls.__name__} needs about {in_words(parts)}, but {device} has {free / GB:.1f} GB free; "
                        + advice(sketch, setting, device.type == "cuda"))


def is_out_of_memory(error):
    """Whether an exception says that there is no memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def planned(command):
    """A command(args) that refuses models which do not fit, and in which running out of memory becomes a UserError."""
    @functools.wraps(command)
    def run(args):
        plans = []
        vq.before_building = functools.partial(check, args, plans)
        try:
            return command(args)
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e) or not plans:
                raise
            sketch, setting = max(plans, key=lambda plan: sum(need(*plan).values()))
            device, _ = choose_device(args.device)
            expected = in_words(need(sketch, setting))
            raise UserError(f"out of memory on {device}: {type(sketch).__name__} should need about {expected}; "
                            + advice(sketch, setting, device.type == "cuda")) from e
        finally:
            vq.before_building = None
    return run
