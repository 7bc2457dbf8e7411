"""The models of `sample.py app`: loaded once, drawn with as on the command line."""
import argparse
import functools

import torch

import vq
from lib.background import run_sample
from lib.console import MOST_SEED, Machine, UserError, check_ranges
from lib.drawing import DEFAULTS, choose_prompts, names_to_choose_from
from lib.flags import FLAGS
from lib.loading import load_infinity_pair, load_llamagen_pair, load_var_pair
from lib.pictures import DEMO
from lib.weights import find_checkpoint

LOADERS = {"var": load_var_pair, "llamagen": load_llamagen_pair, "llamagen-text": load_llamagen_pair,
           "infinity": load_infinity_pair}
SERVED = (*LOADERS, "vq", "latentsync", "syncnet")      # names that --ckpt takes


class Page:
    """What all tabs share: the command line, and the models, each of which is loaded once."""

    def __init__(self, args):
        self.args = args
        self.files = {}                                                     # name -> file of --ckpt
        for text in args.ckpt:
            name, _, file = text.partition("=")
            if name not in SERVED or not file:
                raise UserError(f"--ckpt {text}: expected NAME=FILE, with one of {', '.join(SERVED)} as NAME")
            self.files[name] = str(find_checkpoint(file, not args.no_download, "--ckpt"))

    def arguments(self, name, **given):
        """The Namespace of `sample.py MODEL`, with the flags in `given`."""
        parser = argparse.ArgumentParser()
        _, add_flags = FLAGS[name.partition("-")[0]]
        add_flags(parser.add_argument)
        given |= {flag: getattr(self.args, flag) for flag in ("device", "dtype", "no_download")}
        return argparse.Namespace(**vars(parser.parse_args([])) | given | {"ckpt": self.files.get(name)})

    @functools.cache
    def load(self, name):
        """A generator and its tokenizer -> Loaded."""
        args = self.arguments(name)
        if name == "llamagen-text":
            args.prompt = ["a text"]                                        # by which the loader chooses that model
        loaded = LOADERS[name](args, Machine(args))
        loaded.tokenizer.requires_grad_(False)                              # or decoding would keep all activations
        return loaded

    @functools.cache
    def load_tokenizer(self, file):
        """One of the demo's tokenizers, or that of --ckpt vq=FILE, which serves the tab of tokenizers only."""
        machine = Machine(self.arguments("vq"))
        tokenizer = vq.load(self.files.get("vq", DEMO / f"{file}.safetensors"), dtype=machine.dtype)
        return tokenizer.requires_grad_(False).to(machine.device)

    def class_names(self, name):
        """[(name of a class, its number)] of a generator, and the number of one that it draws well."""
        loaded = self.load(name)
        total = loaded.model.config.num_classes
        args = self.arguments(name, list_classes=True)
        names, _ = names_to_choose_from(args, loaded.metadata.get("classes", []), total)
        names = names or [str(label) for label in range(total)]
        shown = loaded.metadata.get("show") or names
        return [(name, label) for label, name in enumerate(names)], names.index(shown[0])

    def features(self, name, *prompts):
        """{prompt: text features (T, Ct)}."""
        model = self.load(name).model
        c = model.config
        length = c.text_slots if name == "llamagen-text" else c.text_maxlen
        args = self.arguments(name, prompt=list(prompts))
        device = next(model.parameters()).device
        return choose_prompts(args, model, device, c.text_width, length, [], clean=name == "llamagen-text").features

    def sampling(self, name):
        """Settings with which a model draws unless told otherwise, as on the command line."""
        return DEFAULTS[name] | self.load(name).metadata.get("sampling", {})

    def options(self, name, n, seed, **changes):
        """Settings of `sample`, and a generator for each picture."""
        check_ranges(("seed", seed or 0, 0, MOST_SEED))
        device = next(self.load(name).model.parameters()).device
        generators = [torch.Generator(device).manual_seed((seed or 0) + i) for i in range(n)]
        return self.sampling(name) | changes | {"generator": generators}

    def run(self, command, **given):
        """`sample.py COMMAND` in a process of its own, see lib/background.py."""
        flags = {"ckpt": self.files.get(command), "device": self.args.device, "dtype": self.args.dtype,
                 "no-download": self.args.no_download}
        return run_sample(command, flags | given)
