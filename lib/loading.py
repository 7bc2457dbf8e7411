"""The tokenizer and the model of a command line of sample.py: from files, from the demo, or with random weights."""
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import infinity
import llamagen
import var
import vq
from lib import lora
from lib.console import UserError
from lib.int8 import quantize, reduced
from lib.pictures import DEMO
from lib.products import Products, prepare
from lib.text import load_infinity, load_llamagen
from lib.weights import check_fingerprint, check_kind, find_checkpoint, find_companion, read_metadata

INFINITY_TOKENIZERS = {16: "infinity_vae_d16.pth", 24: "infinity_vae_d24.pth", 32: "infinity_vae_d32reg.pth",
                       56: "infinity_vae_d56_f8_14_patchify.pth", 64: "infinity_vae_d64.pth"}   # by the model's bits
INFINITY_PIXELS = {"infinity_125M": "0.06M", "infinity_2b": "1M", "infinity_8b": "1M", "infinity_8b_512": "0.25M"}


@dataclass
class Loaded:
    """A model with its tokenizer, on the device."""

    name: str                                   # name of the checkpoint, for the metadata of pictures
    model: torch.nn.Module
    tokenizer: torch.nn.Module
    metadata: dict = field(default_factory=dict)    # what train.py wrote into the header, see read_metadata
    files: tuple = ()                           # paths of the weights
    products: Products = None                   # how a CPU multiplies, None on other devices

    def to(self, device):
        """Move both to a device, and prepare the model's products there."""
        self.model = self.model.to(device)
        self.tokenizer = self.tokenizer.to(device)
        self.products = prepare(self.model)
        return self


def known_pixels(ckpt):
    """The size of pictures that the name of a released Infinity stands for. Others are taken for 1M."""
    released = [known for known in INFINITY_PIXELS if Path(ckpt).name.startswith(known)]
    return INFINITY_PIXELS[released[-1]] if released else "1M"


def random_config(args, configs):
    """(name, Config) of --random-weights."""
    name = args.random_weights.removesuffix(".pth")
    if name not in configs:
        raise UserError(f"--random-weights {name}: choose one of {', '.join(configs)}")
    return name, configs[name]


def find_files(args, demo, load, fallback_of, flag):
    """Load the model of --ckpt and find the tokenizer that belongs to it -> (model, metadata, path, path of tokenizer).

    The model is changed as --quantize and --lora say.
    fallback_of(model) -> name of the tokenizer if --vae is not given.
    """
    download = not args.no_download
    ckpt = find_checkpoint(args.ckpt, download, "--ckpt") if args.ckpt else DEMO / f"{demo}.safetensors"
    with reduced(args.quantize):
        model = load(ckpt)
    metadata = read_metadata(ckpt) | lora.add(model, args.lora, ckpt)
    vae = find_companion(args.vae, ckpt, fallback_of(model), download, flag)
    return model, metadata, Path(ckpt), Path(vae)


def weight_options(args, machine):
    """Options of the load functions of Infinity and LlamaGen. A GPU may have room for a quantized model only, which is
    therefore made in the host's memory."""
    device = torch.device("cpu") if args.quantize else machine.device
    return {"dtype": machine.dtype, "device": device, "weights": args.weights}


def load_var_pair(args, machine):
    """VAR and its tokenizer."""
    if args.random_weights:
        name, config = random_config(args, var.CONFIGS)
        g = torch.Generator().manual_seed(args.seed)
        sizes = vq.CONFIGS["emoji_vq" if name == "emoji_var" else "vae_ch160v4096z32"]
        tokenizer = vq.build(vq.VQVAE, replace(sizes, patch_nums=config.patch_nums)).eval()
        tokenizer.init_weights(g)
        model = vq.build(var.VAR, config).eval()
        model.init_weights(generator=g)
        quantize(model, args.quantize)
        tokenizer = vq.set_decoder_dtype(tokenizer, machine.dtype)
        return Loaded(name, var.set_dtype(model, machine.dtype), tokenizer).to(machine.device)

    def fallback_of(model):
        released = (model.config.vocab_size, model.config.z_channels) == (4096, 32)
        return "vae_ch160v4096z32.pth" if released else "emoji_vq.safetensors"
    model, metadata, ckpt, vae = find_files(
        args, "emoji_var", lambda path: var.load(path, dtype=machine.dtype, weights=args.weights), fallback_of,
        "--vae")
    tokenizer = vq.load(vae, patch_nums=model.config.patch_nums, dtype=machine.dtype)
    check_kind(model, tokenizer, vae, "give the tokenizer that it was trained with as --vae")
    check_fingerprint(tokenizer, vae, metadata, ckpt)
    return Loaded(ckpt.name, model, tokenizer, metadata, (ckpt, vae)).to(machine.device)


def load_infinity_pair(args, machine):
    """Infinity and its tokenizer. metadata["pixels"] is the size that the model was trained for, None for the demo."""
    if args.random_weights:
        name, config = random_config(args, infinity.CONFIGS)
        g = torch.Generator().manual_seed(args.seed)
        sizes = "emoji_bsq" if name == "emoji_infinity" else INFINITY_TOKENIZERS[config.bits].removesuffix(".pth")
        tokenizer = vq.build(vq.VQVAE, vq.CONFIGS[sizes]).eval()
        tokenizer.init_weights(g)
        model = vq.build(infinity.Infinity, config).eval()
        model.init_weights(generator=g)
        quantize(model, args.quantize)
        tokenizer = vq.set_decoder_dtype(tokenizer, machine.dtype)
        metadata = {"pixels": INFINITY_PIXELS.get(name)}
        return Loaded(name, infinity.set_dtype(model, machine.dtype), tokenizer, metadata).to(machine.device)

    def fallback_of(model):
        if model.text_encoder is not None:
            return "emoji_bsq.safetensors"
        return INFINITY_TOKENIZERS.get(model.config.bits, "the tokenizer")
    options = weight_options(args, machine)
    model, metadata, ckpt, vae = find_files(args, "emoji_infinity", lambda path: load_infinity(path, **options),
                                            fallback_of, "--vae")
    metadata = {"pixels": known_pixels(ckpt)} | metadata
    tokenizer = vq.load(vae, dtype=machine.dtype)
    check_kind(model, tokenizer, vae, f"give {fallback_of(model)} as --vae")
    check_fingerprint(tokenizer, vae, metadata, ckpt)
    return Loaded(ckpt.name, model, tokenizer, metadata, (ckpt, vae)).to(machine.device)


def load_llamagen_pair(args, machine):
    """LlamaGen and its tokenizer, which decodes in float32 as in the original."""
    if args.random_weights:
        name, config = random_config(args, llamagen.CONFIGS)
        g = torch.Generator().manual_seed(args.seed)
        sizes = "vq_ds16_t2i" if config.text_width else "vq_ds16_c2i"
        sizes = vq.CONFIGS["emoji_vq_single" if name.startswith("emoji") else sizes]
        tokenizer = vq.build(vq.VQVAE, replace(sizes, patch_nums=(config.side,))).eval()
        tokenizer.init_weights(g)
        model = vq.build(llamagen.LlamaGen, with_size(config, args.size, tokenizer.config.stride)).eval()
        model.init_weights(g)
        torch.nn.init.normal_(model.head.weight, 0, 0.02, generator=g)      # it starts at zero, where all tokens tie
        quantize(model, args.quantize)
        return Loaded(name, llamagen.set_dtype(model, machine.dtype), tokenizer).to(machine.device)

    def fallback_of(model):
        if model.config.vocab_size != 16384:
            return "emoji_vq_single.safetensors"
        return "vq_ds16_t2i.pt" if model.config.text_width else "vq_ds16_c2i.pt"
    reads_text = args.prompt or args.prompts or args.features
    side = args.size and 1                                                  # with --size it is set below
    model, metadata, ckpt, vae = find_files(
        args, "emoji_llamagen_t2i" if reads_text else "emoji_llamagen",
        lambda path: load_llamagen(path, side=side, **weight_options(args, machine)),
        fallback_of, "--vq")
    tokenizer = vq.load(vae)
    check_kind(model, tokenizer, vae, f"give {fallback_of(model)} as --vq")
    check_fingerprint(tokenizer, vae, metadata, ckpt)
    model.config = with_size(model.config, args.size, tokenizer.config.stride)
    return Loaded(ckpt.name, model, tokenizer, metadata, (ckpt, vae)).to(machine.device)


def with_size(config, size, stride):
    """A LlamaGen Config for pictures of --size pixels."""
    if size and size % stride:
        raise UserError(f"--size {size}: expected a multiple of {stride}, the tokenizer's stride")
    return replace(config, side=size // stride) if size else config
