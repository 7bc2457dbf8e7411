"""LoRA (arXiv 2106.09685): a frozen model learns changes of low rank of some of its linear layers.

A layer's weight W (c_out, c_in) acts as W + scale * B A, with A (rank, c_in), B (c_out, rank) and scale = alpha / rank.
B starts at zero. Models are changed from outside: `wrap` exchanges linear layers for adapted ones. Some models multiply
by `layer.weight` themselves. `weight` therefore returns a LayerWeight, and F.linear with it computes
W x + scale * B A x. A table of classes is small, and new classes need one of their own, so it learns as a whole.

Files have the layout of the package peft: lora_A and lora_B of each layer, and adapter_config.json beside them. peft
wants them under the name adapter_model.safetensors. Names are those of our modules.
"""
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import vq
from lib.console import UserError, check_writable
from lib.int8 import LARGEST, Int8Linear, LayerWeight
from lib.weights import content_hash, find_checkpoint, read_metadata

FILES = ("adapter_model.safetensors", "model.safetensors")      # in a folder of peft's, in one of train.py's
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."                    # of names in peft's files
CLASSES = "class_embed"                         # the table of classes, which learns as a whole
TRACED_ROWS = 8                                 # rows of a weight by which a base is recognised
MOST_STRENGTH = 100
UNSUPPORTED = ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern")      # of peft


class AdaptedLinear(nn.Module):
    """A frozen linear layer, and the two matrices that it learns."""

    def __init__(self, layer, rank, scale):
        super().__init__()
        c_out, c_in = layer.weight.shape
        device = layer.weight.device
        self.layer = layer
        self.scale = scale
        self.lora_A = nn.Parameter(torch.empty(rank, c_in, device=device))
        self.lora_B = nn.Parameter(torch.zeros(c_out, rank, device=device))

    @property
    def weight(self):
        """What models take for the weight of a linear layer. Its elements are those of the frozen one."""
        return LayerWeight(self, self.layer.weight.detach())

    @property
    def bias(self):
        return self.layer.bias

    def product(self, x, bias=None):
        """x (..., c_in) -> (..., c_out)."""
        change = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return F.linear(x, self.layer.weight, bias) + self.scale * change

    def forward(self, x):
        return self.product(x, self.bias)


def linear_layers(model):
    """{name: module} of the linear layers of a model, without those of its text encoder."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Int8Linear)) and not name.startswith("text_encoder.")}


def last_part(name):
    """The last part of a dotted name."""
    return name.rpartition(".")[2]


def wrap(model, rank, alpha, chosen, generator=None):
    """Freeze a model, and let its linear layers with the chosen last names learn changes of a rank.

    Raises UserError for names that the model lacks, and for a rank that is larger than a layer.
    """
    layers = linear_layers(model)
    kinds = dict.fromkeys(map(last_part, layers))
    for name in chosen:
        if name not in kinds:
            raise UserError(f"--lora-layers {name}: no linear layer of this model has that name; choose some of "
                            f"{', '.join(kinds)}")
    model.requires_grad_(False)
    for name, layer in layers.items():
        if last_part(name) not in chosen:
            continue
        if rank > min(layer.weight.shape):
            raise UserError(f"--lora {rank}: more than the rank of {name}, which is {min(layer.weight.shape)}")
        adapted = AdaptedLinear(layer, rank, alpha / rank)
        adapted.lora_A.data.normal_(0, adapted.lora_A.shape[1] ** -0.5, generator=generator)
        model.set_submodule(name, adapted)
    if hasattr(model, CLASSES):
        model.class_embed.requires_grad_(True)


def adapted_layers(model):
    """{name: AdaptedLinear} of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


# ----------------------------------------------------------------------------------------------------------------------
# Files


@dataclass(frozen=True)
class Config:
    """adapter_config.json, as peft reads it."""

    r: int                                      # rank
    lora_alpha: float
    target_modules: tuple                       # last parts of the names of adapted layers
    modules_to_save: tuple                      # modules that learn as a whole
    bias: str = "none"
    peft_type: str = "LORA"


@torch.no_grad()
def trace(layer):
    """Largest magnitudes in the first rows of a weight: they tell weights apart, in every precision to 2 %."""
    if isinstance(layer, Int8Linear):
        return (LARGEST * layer.scale[:TRACED_ROWS]).tolist()
    return layer.weight[:TRACED_ROWS].float().abs().amax(1).tolist()


def save(model, path, dtype=None, **extra):
    """Write what the adapted layers of a model have learnt, and peft's configuration beside it.

    The header holds the trace of a frozen weight, by which `add` recognises the model, and `extra`.
    """
    layers = adapted_layers(model)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
    whole = (CLASSES,) if hasattr(model, CLASSES) else ()
    if whole:
        tensors[f"{PREFIX}{CLASSES}.weight"] = model.class_embed.weight
    first, layer = next(iter(layers.items()))
    rank = len(layer.lora_A)
    config = Config(rank, layer.scale * rank, tuple(sorted(set(map(last_part, layers)))), whole)
    if dtype == torch.float8_e4m3fn:
        dtype = torch.float16                                               # changes are too small for fp8
    vq.save_checkpoint(path, tensors, config, dtype, base={first: trace(layer.layer)}, **extra)
    with vq.atomic(Path(path).with_name(CONFIG)) as temporary:
        temporary.write_text(json.dumps(asdict(config)))


@dataclass
class Lora:
    """A file of `save`, or of peft."""

    path: Path
    pairs: dict                                 # {name of a layer: (A, B)}
    scale: float
    classes: torch.Tensor                       # the table of classes, or None
    metadata: dict


def read(path):
    """The Lora in a file, or in the folder of a run or of peft. Raises vq.CheckpointError."""
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in FILES if (path / name).exists()), path / FILES[0])
    state, header = vq.read_checkpoint(path)
    with vq.understanding(path, "a LoRA of train.py --lora or of peft"):
        state = {key.removeprefix(PREFIX): x for key, x in state.items()}
        names = [key.partition(".lora_A")[0] for key in state if ".lora_A" in key]
        if not names:
            raise ValueError("it has no lora_A")
        end = ".weight" if f"{names[0]}.lora_A.weight" in state else ".default.weight"
        pairs = {name: (state.pop(f"{name}.lora_A{end}"), state.pop(f"{name}.lora_B{end}")) for name in names}
        config = json.loads(header.config or path.with_name(CONFIG).read_text(encoding="utf-8"))
        scale = float(config["lora_alpha"]) / int(config["r"])
        classes = state.pop(f"{CLASSES}.weight", None)
        unknown = [*state, *(name for name in UNSUPPORTED if config.get(name))]
        if unknown:
            raise ValueError(f"it has {', '.join(unknown[:3])}, which is not plain LoRA")
        return Lora(path, pairs, scale, classes, read_metadata(path))


def parse(texts):
    """["FILE", "FILE:0.5"] -> [(path, strength)]. Raises UserError."""
    parsed = []
    for text in texts:
        path, colon, number = text.rpartition(":")
        if not colon or Path(text).exists():
            path = text
            number = "1"
        try:
            strength = float(number)
        except ValueError:
            raise UserError(f"--lora {text}: expected FILE or FILE:STRENGTH") from None
        if not abs(strength) <= MOST_STRENGTH:
            raise UserError(f"--lora {text}: expected a strength of at most {MOST_STRENGTH}")
        parsed.append((path, strength))
    return parsed


def check_base(lora, model, ckpt):
    """Raise UserError if a Lora was learnt on another model than that of the file ckpt, or is in it already."""
    layers = linear_layers(model)
    for name, (A, B) in lora.pairs.items():
        if name not in layers:
            raise UserError(f"--lora {lora.path}: changes {name}, which {ckpt} does not have; it is of another model")
        shape = tuple(layers[name].weight.shape)
        if (len(B), A.shape[1]) != shape or len(A) != B.shape[1]:
            raise UserError(f"--lora {lora.path}: changes {name} by {tuple(B.shape)} times {tuple(A.shape)}, but in "
                            f"{ckpt} it is {shape}; it is of another model")
    if lora.classes is not None:
        table = getattr(model, CLASSES, None)
        if table is None or table.weight.shape[1] != lora.classes.shape[1]:
            raise UserError(f"--lora {lora.path}: has classes of {lora.classes.shape[1]} numbers, {ckpt} has none; "
                            "it is of another model")
    if content_hash(lora.path) in read_metadata(ckpt).get("merged", []):
        raise UserError(f"--lora {lora.path}: is part of {ckpt} already; leave it out")
    for name, expected in lora.metadata.get("base", {}).items():
        found = trace(layers[name])
        if not all(math.isclose(a, b, rel_tol=0.02, abs_tol=1e-20) for a, b in zip(expected, found)):
            raise UserError(f"--lora {lora.path}: was not learnt on the weights of {ckpt}; give what was its --init as "
                            "--ckpt")


@torch.no_grad()
def add(model, texts, ckpt):
    """Add LoRAs, the texts of --lora, to a model from the file ckpt -> what their headers say instead of its own.

    A strength of 1 adds one as it was learnt, 0 leaves the model as it is. Raises UserError for one of another model.
    """
    loras = [(read(path), strength) for path, strength in parse(texts)]
    loras = [(lora, strength) for lora, strength in loras if strength != 0]
    for lora, _ in loras:
        check_base(lora, model, ckpt)
    tables = [str(lora.path) for lora, _ in loras if lora.classes is not None]
    if len(tables) > 1:
        raise UserError(f"--lora {' '.join(tables)}: each has a table of classes of its own; give one of them")
    metadata = {}
    for lora, strength in loras:
        for name, (A, B) in lora.pairs.items():
            layer = model.get_submodule(name)
            if isinstance(layer, nn.Linear):
                layer.weight.add_((strength * lora.scale * (B.float() @ A.float())).to(layer.weight))
            else:                                                           # int8 cannot be changed: add a product
                adapted = AdaptedLinear(layer, len(A), strength * lora.scale)
                adapted.lora_A.data = A.to(adapted.lora_A)
                adapted.lora_B.data = B.to(adapted.lora_B)
                model.set_submodule(name, adapted.requires_grad_(False))
        if lora.classes is not None:
            model.class_embed.weight = nn.Parameter(lora.classes.to(model.class_embed.weight))
            model.config = replace(model.config, num_classes=len(lora.classes) - 1)
            metadata |= {key: lora.metadata[key] for key in ("classes", "show") if key in lora.metadata}
    return metadata


def check_flags(args, *excluded):
    """Raise UserError for flags that --lora and --quantize do not go with. excluded: those of one command."""
    for flag in ("random_weights", *excluded):
        for other in ("lora", "merge", *(["quantize"] if flag != "random_weights" else [])):
            if getattr(args, flag) and getattr(args, other):
                raise UserError(f"--{other} and --{flag.replace('_', '-')} exclude each other")
    if args.merge and not args.lora:
        raise UserError(f"--merge {args.merge}: what is to be merged? Give LoRAs as --lora FILE")
    if args.merge and not args.ckpt:
        raise UserError(f"--merge {args.merge}: into what? Give the model as --ckpt FILE")
    if args.merge and args.quantize:
        raise UserError("--merge and --quantize exclude each other: 8 bits have no room for small changes")


def merge(args, load, save, **defaults):
    """--merge: write the model of --ckpt with the LoRAs of --lora in it, as an ordinary checkpoint in float32.

    load, save: those of the model, load(path) and save(model, path, **header). defaults: of the header.
    """
    path = check_writable(args.merge, "--merge", suffix=".safetensors")
    ckpt = find_checkpoint(args.ckpt, not args.no_download)
    model = load(ckpt)
    header = defaults | read_metadata(ckpt) | add(model, args.lora, ckpt)
    added = [content_hash(read(file).path) for file, strength in parse(args.lora) if strength]
    header["merged"] = header.get("merged", []) + added
    header.pop("config", None)                                              # save writes it
    save(model, path, **header)
    print(f"{ckpt} with {', '.join(args.lora)} -> {path}")
