"""Draw pictures, reconstruct pictures, dub videos, measure speed. Without --ckpt it uses the small models of demo/.

    python sample.py var                                            a grid of emoji, in seconds on a laptop
    python sample.py var --steps-grid                               how they came to be, scale by scale
    python sample.py var --ckpt var_d16.pth --classes 207 360       the released model; downloaded if it is not here
    python sample.py var --ckpt var_d30.pth --image cat.png --edit in --box 0.1 0.1 0.8 0.8
    python sample.py var --ckpt var_d16.pth -n 50000 --npz d16.npz --cfg 1.5 --top-p 0.96       for the ADM evaluator
    python sample.py var --bench --compile --random-weights var_d16         speed, beside the limits of this machine
    python sample.py infinity --prompt "grinning cat face"          text -> emoji
    python sample.py infinity --ckpt infinity_2b_reg.pth --prompt "a red fox in the snow" --aspect 1.5
    python sample.py llamagen --classes noto/people --cfg 1.5 4     class -> emoji, token by token
    python sample.py llamagen --prompt "noto style, red heart"      text -> emoji, token by token
    python sample.py llamagen --ckpt c2i_L_384.pt --classes 207 360
    python sample.py vq --image photo.jpg                           what the tokenizer makes of a picture
    python sample.py vq --ckpt vae_ch160v4096z32.pth --image imagenet/val --npz val.npz         for rFID
    python sample.py latentsync                                     a synthetic head says something else
    python sample.py latentsync --ckpt latentsync_1.5.pt --video talk.mp4 --audio speech.wav --out dubbed.mp4
    python sample.py syncnet --video clip.mp4                       is its sound in sync? offset, confidence, distance
    python sample.py app                                            a page in the browser to try all of them
    python sample.py ops --bench                                    speed of the fused kernels, one by one
"""
import argparse
import signal

from lib.flags import FLAGS, NOTES


def parse_args(argv=None):
    """The command line -> a Namespace. With usage=SUPPRESS argparse's errors take one line, like all other errors."""
    style = dict(formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__, **style)
    commands = parser.add_subparsers(dest="model", metavar="MODEL", required=True)
    for name, (what, add_flags) in FLAGS.items():
        command = commands.add_parser(name, help=what, description=NOTES.get(name, what), **style)
        add_flags(command.add_argument)
        command.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    return parser.parse_args(argv)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # during the imports Ctrl-C ends the process without a traceback
    ARGS = parse_args()                         # before the imports that take seconds, so that --help answers at once

import contextlib
import functools
import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import infinity
import latentsync
import llamagen
import syncnet
import var
import vq
from lib import app, baselines, bench_ops, dubbing, emoji, lora, serving
from lib.console import (Machine, UserError, check_json, check_out, check_paths, check_pixels, check_ranges,
                         check_writable, run_command, save_json, timed)
from lib.drawing import (DEFAULTS, LONGEST_SIDE, MOST_BATCH, MOST_GUIDANCE, NpzFile, bench_generator,
                         check_generator_args, check_npz, check_prompt_args, check_prompts_out, check_sheet,
                         choose_labels, choose_prompts, class_name, faster, filmstrips, generators, given, in_batches,
                         is_drawn, names_to_choose_from, print_classes, save_sheet, write_npz)
from lib.editing import BOX, check_edit, keep_black, read_mask
from lib.faces import SHIFTS, check_judge, describe_score, faces_to_score, is_in_step
from lib.loading import known_pixels, load_infinity_pair, load_llamagen_pair, load_var_pair
from lib.memory import planned
from lib.pictures import (DEMO, chart, cover, grid, psnr, read_picture, save_png, ssim, to_pixels,
                          to_tensor)
from lib.products import prepare
from lib.reconstruction import Usage, fit, picture_files, save_rows
from lib.text import load_infinity, load_llamagen, save_features
from lib.video import Video, VideoWriter, is_silent, mono, read_channels, read_sound_to_write
from lib.weights import find_checkpoint
from syncnet import FPS, SAMPLE_RATE
from triton_ops import REGISTRY

# ----------------------------------------------------------------------------------------------------------------------
# python sample.py var


def sample_var(args):
    """Draw classes into a grid or one file per picture, or do what --edit, --npz, --bench or --list-classes asks."""
    check_paths(args)
    check_generator_args(args)
    check_ranges(("--cfg", args.cfg, 0, MOST_GUIDANCE))
    check_npz(args, "--edit", "--steps-grid")
    check_edit(args)
    lora.check_flags(args)
    if args.merge:
        return lora.merge(args, functools.partial(var.load, weights=args.weights), var.save)
    if not (args.bench or args.npz or args.list_classes):
        out, single = check_out(args.out, "out/var.png")
        check_paths(args, out)
        check_sheet(out, single, args.n or len(args.classes))
    given_picture = read_picture(args.image) if args.edit else None
    mask = read_mask(args.mask, given_picture) if args.mask else None

    # Load.
    machine = Machine(args)
    device = machine.device
    loaded = load_var_pair(args, machine)
    name = loaded.name
    model = loaded.model
    tokenizer = loaded.tokenizer
    metadata = loaded.metadata

    # What to draw.
    names = metadata.get("classes", [])
    total = model.config.num_classes
    known_names, note = names_to_choose_from(args, names, total)
    if args.list_classes:
        return print_classes(known_names, note, name, total)
    patch_nums = model.config.patch_nums
    labels = choose_labels(args, known_names, total, metadata.get("show"))
    options = DEFAULTS["var"] | metadata.get("sampling", {}) | given(args, "cfg", "top_k", "top_p")
    options["more_smooth"] = args.smooth
    settings = {"model": "var", "checkpoint": name, "seed": args.seed} | options
    before = []                                                             # pictures shown before the drawn ones
    box = args.box or BOX
    side = tokenizer.config.stride * patch_nums[-1]
    if args.edit:
        image = to_tensor(cover(given_picture, side, side), device)
        if mask is not None:
            keep_mask = keep_black(mask, patch_nums[-1]).to(device)
        else:
            keep_mask = var.edit_mask(box, patch_nums[-1], inpaint=args.edit != "out").to(device)
        options |= {"given_tokens": tokenizer.tokenize(image, patch_nums), "keep_mask": keep_mask}
        settings |= {"edit": args.edit, "image": args.image} | ({"mask": args.mask} if args.mask else {"box": box})
        if given_picture.width != given_picture.height:
            note += "the centre square of the picture was used, "
        cell = side // patch_nums[-1]
        kept = torch.where(keep_mask.repeat_interleave(cell, 0).repeat_interleave(cell, 1), image, 0.5)
        before = list(to_pixels(torch.cat([image, kept]).add(1).div(2)))
        if args.edit != "class":
            labels = [total] * len(labels)                                  # in- and out-painting use the null class

    def draw(numbers, model=model, tokenizer=tokenizer, all_scales=False):
        """Draw the pictures with these numbers -> (B, 3, h, w) in [0, 1], or a list of that, one entry per scale."""
        return model.sample(tokenizer, torch.tensor([labels[i] for i in numbers]), all_scales=all_scales,
                            generator=generators(args, numbers, device), **options)
    if args.bench:
        n = args.n or len(args.classes) or 1
        sampling = [(var, "sample_logits"), (var, "filter_logits"), (var, "exponential_noise")]
        quantizer = [(tokenizer.quantize, "contribution"), (tokenizer.quantize, "next_input")]
        tokens = sum(p * p for p in patch_nums)

        def baseline(model, generator):
            return baselines.var_images(model, tokenizer, torch.tensor(labels[:n]), cfg=options["cfg"],
                                        top_k=options["top_k"], top_p=options["top_p"], generator=generator)
        original = None if args.edit or args.smooth else baseline
        return bench_generator(args, loaded, draw, original, machine, sampling, quantizer, tokens, n)
    pair = model, tokenizer
    if args.compile:
        pair = next(iter(faster(model, tokenizer, device).values()))        # the first is the fastest
    if args.npz:
        settings["dtype"] = str(machine.dtype)
        return write_npz(args, lambda numbers: draw(numbers, *pair), len(labels), side, settings, loaded.files)

    # Draw, batch by batch, and save.
    start = time.perf_counter()
    pictures = []
    for numbers in in_batches(range(len(labels)), args.batch_size):
        images = draw(numbers, *pair, all_scales=args.steps_grid)
        for i, strip in zip(numbers, filmstrips(images, args.steps_grid)):
            frames = to_pixels(strip)
            pictures += list(frames)
            if not single:
                text = settings | {"seed": args.seed + i, "class": class_name(names, labels[i])}
                save_png(out / f"{i:05d}.png", grid(frames, len(frames), enlarge=1), text)
    seconds = (time.perf_counter() - start) / len(labels)
    if single:
        classes = ", ".join(dict.fromkeys(class_name(names, label) for label in labels))
        scales = [f"{p}x{p}" for p in patch_nums] if args.steps_grid else []
        titles = ["given", "kept"] if before else []
        sheet = pictures if scales else before + pictures
        save_sheet(out, sheet, scales, titles, settings | {"classes": classes})
    print(machine.summary((tokenizer, model), seconds, out if single else f"{len(labels)} files in {out}", note))


# ----------------------------------------------------------------------------------------------------------------------
# python sample.py infinity

FACE_SUFFIX = ". very smooth faces, good looking faces, face to the camera, perfect facial features"
PEOPLE = ("man", "woman", "men", "women", "boy", "girl", "child", "person", "human", "adult", "teenager", "employee",
          "employer", "worker", "mother", "father", "sister", "brother", "grandmother", "grandfather", "son",
          "daughter")                                                       # also found inside other words


def sample_infinity(args):
    """Draw prompts into a grid, one file per picture, or a folder (--prompts), or do --save-features or --bench."""
    check_paths(args)
    check_generator_args(args)
    check_prompt_args(args)
    check_pixels(args.pixels)
    check_ranges(*(("--cfg", c, 0, MOST_GUIDANCE) for c in args.cfg or []),
                 *(("--tau", t, 1e-3, MOST_GUIDANCE) for t in args.tau or []),
                 ("--aspect", args.aspect, 0.3, 3.4), ("--keep", args.keep, 1, None), ("--tile", args.tile, 0, None))
    if 0 < args.tile <= 8:
        raise UserError(f"--tile {args.tile}: tiles overlap by 8 cells; use 16 or more")
    if args.keep and not args.image:
        raise UserError("--keep goes with --image, the picture whose first scales are kept")
    lora.check_flags(args)
    if args.merge:
        return lora.merge(args, functools.partial(load_infinity, weights=args.weights), infinity.save,
                          pixels=known_pixels(args.ckpt))
    if not (args.bench or args.save_features):
        out, single = check_prompts_out(args, "out/infinity.png")
        check_paths(args, out)
        check_sheet(out, single, args.n * len(args.prompt))
    given_picture = read_picture(args.image) if args.image else None

    # Load.
    machine = Machine(args)
    device = machine.device
    loaded = load_infinity_pair(args, machine)
    name = loaded.name
    model = loaded.model
    tokenizer = loaded.tokenizer
    metadata = loaded.metadata

    # Scales and settings.
    config = model.config
    pixels = args.pixels or metadata.get("pixels")
    if args.pixels and metadata.get("pixels", "any") is None:
        raise UserError(f"--pixels {args.pixels}: {name} draws pictures of one size only; leave it out")
    if pixels is None and args.aspect not in (None, 1.0):
        raise UserError(f"--aspect {args.aspect}: {name} draws squares of one size only")
    scales = tuple(vq.as_pairs(tokenizer.config.patch_nums))                # the tokenizer's own
    if pixels:
        scales = vq.schedule(args.aspect or 1.0, pixels)
    options = DEFAULTS["infinity"] | metadata.get("sampling", {}) | given(args, "cfg", "tau", "top_k", "top_p")
    note = ""
    for key in ("cfg", "tau"):
        if isinstance(options[key], list) and len(options[key]) > len(scales):      # a list for larger pictures
            note += f"the first {len(scales)} of {len(options[key])} values of --{key} are used, "
        if isinstance(options[key], list) and len(options[key]) == 1:       # one value for all scales
            options[key] = options[key][0]
        try:
            infinity.per_scale(options[key], len(scales), f"--{key}")
        except ValueError as e:
            raise UserError(str(e)) from None
    for block in args.guide_features or ():
        check_ranges(("--guide-features", block, -config.depth, config.depth - 1))
    cell = tokenizer.config.stride * (config.patchify + 1)                  # pixels per token
    height, width = (n * cell for n in scales[-1])
    keep = args.keep or 4 if args.image else 0
    settings = {"model": "infinity", "checkpoint": name, "size": f"{height}x{width}"} | options
    settings |= {"guide_after": args.guide_features, "negative": args.negative, "image": args.image,
                 "keep": keep, "tile": args.tile} | origin(args, machine, tokenizer)
    options |= {"scales": scales, "guide_after": args.guide_features, "tile": args.tile}

    # Prompts, as their text features.
    if args.random_weights and args.bench:                                  # no T5 is loaded then
        texts = ["random"]
        features = {"random": torch.randn(24, config.text_width, generator=torch.Generator().manual_seed(0))}
    else:
        def with_suffix(prompt):
            about_people = args.face_suffix and any(word in prompt for word in PEOPLE)
            return prompt + FACE_SUFFIX if about_people and FACE_SUFFIX not in prompt else prompt
        also = [args.negative] if args.negative is not None else []
        prompts = choose_prompts(args, model, device, config.text_width, config.text_maxlen, metadata.get("show"),
                                 suffix=with_suffix, also=also)
        texts = prompts.texts
        features = prompts.features
    if args.save_features:
        save_features(features, args.save_features)
        return print(f"features of {len(features)} prompts -> {args.save_features}")
    if args.bench and not args.prompt:
        texts = texts[:1]
    items = [text for text in texts for _ in range(args.n)]
    if args.negative is not None:
        options["negative"] = features[args.negative][None], None
    if given_picture is not None:
        image = to_tensor(cover(given_picture, height, width), device)
        sizes = infinity.tokenizer_scales(scales, config.patchify)
        if keep > len(sizes):
            raise UserError(f"--keep {keep}: there are {len(sizes)} scales")
        options |= {"given_bits": tokenizer.tokenize(image, sizes), "keep_scales": keep}

    def condition(numbers):
        """The text features of these pictures (B, T, Ct), and their mask, or None without padding."""
        rows = [features[items[i]] for i in numbers]
        text = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        text_mask = torch.arange(text.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        return text, None if text_mask.all() else text_mask

    def draw(numbers, model=model, tokenizer=tokenizer, all_scales=False):
        """Draw the pictures with these numbers -> (B, 3, h, w) in [0, 1], or a list of that, one entry per scale."""
        return model.sample(tokenizer, *condition(numbers), all_scales=all_scales,
                            generator=generators(args, numbers, device), **options)
    if args.bench:
        sampling = [(infinity, "draw_bits"), (infinity, "exponential_noise")]
        quantizer = [(tokenizer.quantize, "contribution"), (tokenizer.quantize, "next_input")]
        tokens = sum(h * w for h, w in scales)

        def baseline(model, generator):
            filters = {key: options[key] for key in ("cfg", "tau", "top_k", "top_p")}
            return baselines.infinity_images(model, tokenizer, *condition(range(len(items))), scales,
                                             generator=generator, **filters)
        ours_only = args.negative is not None or args.guide_features or args.tile or keep
        original = None if ours_only else baseline
        return bench_generator(args, loaded, draw, original, machine, sampling, quantizer, tokens, len(items))
    pair = model, tokenizer
    if args.compile:
        pair = next(iter(faster(model, tokenizer, device).values()))        # the first is the fastest

    # Draw, batch by batch, and save. Pictures that are there already are kept.
    start = time.perf_counter()
    prompts.write_geneval(out)
    png_texts = [settings | {"seed": args.seed + i, "prompt": item} for i, item in enumerate(items)]
    todo = list(range(len(items)))
    if args.prompts and not args.one_generator:                             # one generator draws all or none
        todo = [i for i in todo if not is_drawn(prompts.path(out, i, args.n), png_texts[i])]
    pictures = []                                                           # for the sheet
    for numbers in in_batches(todo, args.batch_size):
        images = draw(numbers, *pair, all_scales=args.steps_grid)
        for i, strip in zip(numbers, filmstrips(images, args.steps_grid)):
            frames = to_pixels(strip)
            pictures += list(frames)
            if not single:
                path = prompts.path(out, i, args.n)
                path.parent.mkdir(parents=True, exist_ok=True)
                save_png(path, grid(frames, len(frames), enlarge=1), png_texts[i])
    seconds = (time.perf_counter() - start) / len(items)
    if single:
        titles = [f"{h}x{w}" for h, w in scales] if args.steps_grid else []
        save_sheet(out, pictures, titles, [], settings | {"prompts": ", ".join(dict.fromkeys(items))})
    print(machine.summary((tokenizer, model), seconds, out if single else f"{len(items)} files in {out}", note))


def origin(args, machine, tokenizer):
    """What else a picture depends on. It is saved with the picture, so that no folder mixes pictures of two origins."""
    return {"dtype": str(machine.dtype).removeprefix("torch."), "tokenizer": vq.fingerprint(tokenizer),
            "features": args.features, "t5": args.t5, "clean": not getattr(args, "no_clean", True)}


# ----------------------------------------------------------------------------------------------------------------------
# python sample.py llamagen


def sample_llamagen(args):
    """Draw classes or prompts into a grid, one file per picture, or a folder (--prompts).

    Or do what --npz, --save-features, --bench or --list-classes asks.
    """
    check_paths(args)
    check_generator_args(args)
    check_prompt_args(args)
    check_ranges(*(("--cfg", c, 0, MOST_GUIDANCE) for c in args.cfg or []),
                 ("--temperature", args.temperature, 0, MOST_GUIDANCE), ("--cfg-interval", args.cfg_interval, -1, None),
                 ("--size", args.size, 1, LONGEST_SIDE), ("--eval-size", args.eval_size, 1, LONGEST_SIDE))
    if args.temperature and args.temperature < 1e-3:
        raise UserError(f"--temperature {args.temperature}: expected 0, or 0.001 .. {MOST_GUIDANCE}")
    check_npz(args, "--steps-grid")
    for flag in ("steps_grid", "one_generator", "bench", "compile", "random_weights"):
        if args.engine and getattr(args, flag):
            raise UserError(f"--engine and --{flag.replace('_', '-')} exclude each other: vLLM draws in its own way")
    lora.check_flags(args, "engine")
    if args.merge:
        return lora.merge(args, functools.partial(load_llamagen, weights=args.weights), llamagen.save)
    if not (args.bench or args.npz or args.list_classes or args.save_features):
        out, single = check_prompts_out(args, "out/llamagen.png")
        check_paths(args, out)
        check_sheet(out, single, (args.n or 1) * max(len(args.prompt), len(args.classes) if not args.n else 1))

    # Load.
    machine = Machine(args)
    device = machine.device
    loaded = load_llamagen_pair(args, machine)
    name = loaded.name
    model = loaded.model
    tokenizer = loaded.tokenizer
    metadata = loaded.metadata

    # Classes or text.
    config = model.config
    reads_text = config.text_width > 0
    names = metadata.get("classes", [])
    if reads_text and (args.classes or args.list_classes):
        raise UserError(f"{name}: draws what a text says and knows no classes; give --prompt, not --classes")
    if not reads_text and (args.prompt or args.prompts or args.features):
        raise UserError(f"{name}: draws classes and reads no text; give --classes, or as --ckpt a t2i_* model")
    if not reads_text and args.save_features:
        raise UserError(f"{name}: reads no text, so there are no features to save")
    if not reads_text and (args.t5 or args.no_clean):
        flag = "--t5" if args.t5 else "--no-clean"
        raise UserError(f"{flag}: is for models that read text, but {name} draws classes; leave it out")
    if reads_text and args.npz:
        raise UserError("--npz is for classes; for prompts fill a folder with --prompts FILE --out DIR")
    known_names, note = names_to_choose_from(args, names, config.num_classes)
    if args.list_classes:
        return print_classes(known_names, note, name, config.num_classes)

    # Settings.
    defaults = DEFAULTS["llamagen-text" if reads_text else "llamagen"]
    options = defaults | metadata.get("sampling", {}) | given(args, *defaults)
    settings = {"model": "llamagen", "checkpoint": name, "seed": args.seed} | options
    side = config.side * tokenizer.config.stride
    settings |= {"side": side, "eval_size": args.eval_size}
    settings |= origin(args, machine, tokenizer)
    cfg = options.pop("cfg")
    cfgs = cfg if isinstance(cfg, list) else [cfg]                          # one for all pictures, or one for each

    # What to draw.
    n = args.n or 1                                                         # pictures of each prompt
    if not reads_text:
        items = choose_labels(args, known_names, config.num_classes, metadata.get("show"))
        descriptions = [{"class": class_name(names, label)} for label in items]
    else:
        if args.random_weights and args.bench:                              # no T5 is loaded then
            texts = ["random"]
            features = {"random": torch.randn(24, config.text_width, generator=torch.Generator().manual_seed(0))}
        else:
            prompts = choose_prompts(args, model, device, config.text_width, config.text_slots, metadata.get("show"),
                                     clean=not args.no_clean)
            texts = prompts.texts
            features = prompts.features
        if args.save_features:
            save_features(features, args.save_features)
            return print(f"features of {len(features)} prompts -> {args.save_features}")
        if args.bench and not args.prompt:
            texts = texts[:1]
        items = [text for text in texts for _ in range(n)]
        descriptions = [{"prompt": item} for item in items]
    if args.bench and not reads_text:
        items = items[:args.n or len(args.classes) or 1]
    if len(cfgs) > len(items):
        raise UserError(f"--cfg has {len(cfgs)} values, but there are {len(items)} pictures; give one value for all, "
                        "or at most one for each")

    def condition(numbers):
        """What the model takes for these pictures: classes and None, or text features and their mask."""
        if not reads_text:
            return torch.tensor([items[i] for i in numbers]), None
        return llamagen.left_pad([features[items[i]] for i in numbers], config.text_slots)

    if args.engine:
        engine = serving.open_engine(args, loaded, machine)
        settings["engine"] = args.engine
        note += f"tokens by {args.engine}, "

    def draw(numbers, model=model, tokenizer=tokenizer, progress_frames=0):
        """Draw the pictures with these numbers -> (B, 3, h, w) in [0, 1], or a list of that while they grow."""
        scales = [cfgs[i % len(cfgs)] for i in numbers]
        if args.engine:
            return serving.sample(engine, model, tokenizer, *condition(numbers), scales,
                                  [args.seed + i for i in numbers], args.eval_size, **options)
        return model.sample(tokenizer, *condition(numbers), generator=generators(args, numbers, device),
                            cfg=torch.tensor(scales), size=args.eval_size, progress_frames=progress_frames, **options)
    if args.bench:
        def baseline(model, generator):
            return baselines.llamagen_images(model, tokenizer, *condition(range(len(items))), cfg=cfgs[0],
                                             generator=generator, **options)
        original = None if len(cfgs) > 1 or args.eval_size else baseline
        sampling = [(llamagen, "sample_logits"), (llamagen, "exponential_noise")]
        return bench_generator(args, loaded, draw, original, machine, sampling, [], config.side**2, len(items))
    pair = model, tokenizer
    if args.compile:
        pair = next(iter(faster(model, tokenizer, device).values()))        # the first is the fastest
    if args.npz:                                                            # 0.5: LlamaGen's authors round
        return write_npz(args, lambda numbers: draw(numbers, *pair), len(items), args.eval_size or side, settings,
                         loaded.files, add=0.5)

    # Draw, batch by batch, and save. Pictures that are there already are kept.
    start = time.perf_counter()
    png_texts = []
    for i, description in enumerate(descriptions):
        png_texts.append(settings | {"seed": args.seed + i} | description | {"cfg": cfgs[i % len(cfgs)]})
    todo = list(range(len(items)))
    paths = []
    if reads_text and not single:
        prompts.write_geneval(out)
        paths = [prompts.path(out, i, n) for i in todo]
    elif not single:
        paths = [out / f"{i:05d}.png" for i in todo]
    if args.prompts and not args.one_generator:                             # one generator draws all or none
        todo = [i for i in todo if not is_drawn(paths[i], png_texts[i])]
    pictures = []
    for numbers in in_batches(todo, args.batch_size):
        images = draw(numbers, *pair, progress_frames=8 if args.steps_grid else 0)
        for i, strip in zip(numbers, filmstrips(images, args.steps_grid)):
            frames = to_pixels(strip, add=0.5)
            pictures += list(frames)
            if not single:
                paths[i].parent.mkdir(parents=True, exist_ok=True)
                save_png(paths[i], grid(frames, len(frames), enlarge=1), png_texts[i])
    seconds = (time.perf_counter() - start) / len(items)
    if single:
        titles = [f"{k}/8" for k in range(1, 9)] if args.steps_grid else []
        kind = "prompts" if reads_text else "classes"
        drawn = ", ".join(dict.fromkeys(text for description in descriptions for text in description.values()))
        save_sheet(out, pictures, titles, [], settings | {kind: drawn})
    print(machine.summary((tokenizer, model), seconds, out if single else f"{len(items)} files in {out}", note))


# ----------------------------------------------------------------------------------------------------------------------
# python sample.py vq


def sample_vq(args):
    """Reconstruct pictures into a sheet, a folder or an array, and say how well.

    On a sheet the originals stand above, what the tokenizer keeps of them below; with --steps-grid, after every scale.
    """
    check_paths(args)
    check_ranges(("--batch-size", args.batch_size, 1, MOST_BATCH))
    check_npz(args, "--out", "--keep-size", "--steps-grid")
    sources = picture_files(args.image)
    if not args.npz:
        out, single = check_out(args.out, "out/vq.png")
        check_paths(args, out)
        check_sheet(out, single, len(sources))
    if args.seed is not None:
        print("note: --seed does nothing here, because nothing is drawn at random", file=sys.stderr)
    machine = Machine(args)
    device = machine.device
    ckpt = DEMO / "emoji_vq.safetensors"
    if args.ckpt:
        ckpt = find_checkpoint(args.ckpt, not args.no_download, "--ckpt")
    tokenizer = vq.load(ckpt, dtype=machine.dtype, weights=args.weights).to(device)
    config = tokenizer.config
    titles = ["original", "decoded"]
    if args.steps_grid:
        titles = ["original"] + [f"{h}x{w}" for h, w in vq.as_pairs(config.patch_nums)]
    text = {"model": "vq", "checkpoint": args.ckpt or "demo"}
    add = 0.5 if config.single_scale else 0.0                               # LlamaGen's authors round, VAR's cut off
    unreadable = []

    def pictures():
        """Yield (name, picture, schedule) of all pictures that can be read."""
        if not sources:                                                     # eight of the demo's, of different kinds
            for index in emoji.split()[1][::110]:
                yield "demo", *fit(emoji.tile(emoji.rows()[index]), config, args.keep_size)
        for path, was_named in sources:
            try:
                yield path, *fit(read_picture(path), config, args.keep_size)
            except UserError as e:
                if was_named:
                    raise
                unreadable.append(e)

    def batches():
        """Yield lists of pictures of one size, at most --batch-size of them."""
        for _, alike in itertools.groupby(pictures(), lambda item: item[1].size):
            while batch := list(itertools.islice(alike, args.batch_size)):
                yield batch

    # Reconstruct, batch by batch. A folder or an array is written on the way, a sheet at the end.
    rows = []
    qualities = []                                                          # (PSNR, SSIM) of each picture
    usage = Usage(tokenizer)
    seconds = 0.0
    npz = NpzFile(args.npz) if args.npz else None
    with npz or contextlib.nullcontext(), tqdm(total=len(sources), unit="picture", leave=False,
                                               disable=len(sources) < 8) as bar:
        for batch in batches():
            names, originals, schedules = zip(*batch)
            image = torch.cat([to_tensor(picture, device) for picture in originals])
            patch_nums = schedules[0]
            encoding, indices = timed(lambda: tokenizer.tokenize(image, patch_nums), device)
            decoding, decoded = timed(
                lambda: tokenizer.detokenize(indices, patch_nums, all_scales=args.steps_grid), device)
            if not args.steps_grid:
                decoded = [decoded]
            seconds += encoding + decoding
            usage.count(indices)
            similar = [math.nan] * len(batch)
            if min(image.shape[2:]) >= 11:
                similar = ssim(decoded[-1], image).tolist()
            first = len(qualities)
            qualities += zip(psnr(decoded[-1], image).tolist(), similar)
            if args.npz:
                npz.add(to_pixels(decoded[-1].add(1).div(2), add))
            elif single or args.steps_grid:
                strips = torch.stack([image, *decoded], 1).add(1).div(2)
                strips = [to_pixels(strip) for strip in strips]
            if not args.npz and single:
                rows += strips
            elif not args.npz:
                for i, name in enumerate(names):
                    picture = to_pixels(decoded[-1][i:i + 1].add(1).div(2), add)[0]
                    if args.steps_grid:
                        picture = grid(strips[i], len(titles), titles=titles)
                    save_png(out / f"{first + i:05d}.png", picture, text | {"image": name})
            bar.update(len(batch))
        if not qualities:
            raise unreadable[0]
    where = out if not args.npz else args.npz
    if not args.npz and single:
        where = save_rows(out, rows, titles, args.steps_grid, text)
    for e in unreadable[:3]:
        print(f"note: {e}", file=sys.stderr)
    note = f"{len(unreadable)} of {len(sources)} cannot be read, " if unreadable else ""
    quality, similarity = np.mean(qualities, 0)
    note += f"PSNR {quality:.2f} dB, SSIM {similarity:.3f}, {usage.percent():.0f} % of the {usage.what}, "
    if len(qualities) > 8:
        note = f"{len(qualities)} pictures, " + note
    print(machine.summary((tokenizer,), seconds / len(qualities), where, note))


# ----------------------------------------------------------------------------------------------------------------------
# python sample.py syncnet


def sample_syncnet(args):
    """Score every face of a video: offset, confidence, distance, and a chart of the distance over all shifts."""
    check_ranges(("--batch-size", args.batch_size, 1, None), ("--max-shift", args.max_shift, 1, 100))
    machine = Machine(args)
    device = machine.device
    out = check_writable(args.out or "out/syncnet.png", suffix=".png")
    ckpt = DEMO / "talking_head_syncnet.safetensors"
    if args.ckpt:
        ckpt = find_checkpoint(args.ckpt, not args.no_download)
    model = syncnet.load(ckpt, dtype=machine.dtype, device=device, weights=args.weights)
    check_judge(model, ckpt, original=True)
    name = Path(ckpt).name
    video = Video(args.video or DEMO / "talking_head.mp4")
    sound, sound_note = mono(read_channels(args.audio or video.path, SAMPLE_RATE, args.audio_track))
    start = time.perf_counter()
    scores = []
    clips = 0
    for number, (first, crop, count) in enumerate(faces_to_score(video, args, device, model), 1):
        pictures = itertools.islice(video.frames(first), count)
        pictures = tqdm(pictures, total=count or len(video), desc=f"face {number}", unit="frame", leave=False)
        crops = (crop(torch.from_numpy(picture).permute(2, 0, 1), i) for i, picture in enumerate(pictures))
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
        clips += score.clips
        print(f"face {number}: {score.clips} clips from frame {first}: {describe_score(score, model)}")
    seconds = time.perf_counter() - start
    if not scores:
        raise UserError(f"{video.path}: {why}")
    if len(scores) > 1:
        offset, confidence, distance = syncnet.combine(scores)
        found = f"offset {offset:+d}, " if all(is_in_step(score, model) for score in scores) else ""
        print(f"all {len(scores)}: {found}confidence {confidence:.3f}, distance {distance:.3f}")
    if is_silent(sound):
        print("note: the sound is silent: nothing is in sync with it, and the offset means nothing", file=sys.stderr)
    shifts = range(-args.max_shift, args.max_shift + 1)
    curves = {}
    for i, score in enumerate(scores, 1):
        curves[f"face {i}" if len(scores) > 1 else ""] = (shifts, score.curve.tolist())
    best = max(scores, key=lambda score: score.confidence)
    marks = [(-best.offset, best.distance, f"offset {best.offset:+d}")] if is_in_step(best, model) else []
    path = str(video.path).encode(errors="replace").decode()                # a name need not be text
    picture = chart(curves, f"{Path(path).name}, judged by {name}", SHIFTS, "distance", marks=marks)
    save_png(out, picture, {"model": "syncnet", "checkpoint": name, "video": path,
                            "sound": args.audio or "its own"})
    note = notes_of(video, sound_note, toy_note(ckpt, video))
    print(machine.summary((model,), seconds / clips, out, note, unit="frame"))


def toy_note(ckpt, video):
    """What has to be said if a network of the demo meets a video that is not the demo's."""
    if Path(ckpt).resolve().parent != DEMO.resolve() or video.path.resolve().parent == DEMO.resolve():
        return ""
    return f"{Path(ckpt).name} is a toy that was trained on drawn heads and knows no real faces"


def notes_of(video, *more):
    """Part of a summary line: what the user should know about a video, and what else there is to say."""
    return "".join(f"{note}, " for note in (*video.notes, *more) if note)


# ----------------------------------------------------------------------------------------------------------------------
# python sample.py latentsync


def sample_latentsync(args):
    """Dub a video: the person in it says what the speech says."""
    dubbing.check_args(args)
    lora.check_flags(args)
    if args.merge:
        return lora.merge(args, lambda ckpt: dubbing.load_unet(args, ckpt)[0], latentsync.save)
    out = check_writable(args.out or "out/latentsync.mp4", suffix=".mp4")
    path = Path(args.video or DEMO / "talking_scene.mp4")
    speech = Path(args.audio or DEMO / "other_speech.flac")
    if not args.bench:
        video = Video(path)
        sound, sound_note = mono(read_channels(speech, SAMPLE_RATE, args.audio_track))
        if is_silent(sound):
            print(f"note: {speech}: the sound is silent, so the lips have nothing to say", file=sys.stderr)
        if out.resolve() in (path.resolve(), speech.resolve()):
            raise UserError(f"--out {out}: would replace what it is made from; choose another name")
        if len(sound) < SAMPLE_RATE // FPS:
            raise UserError(f"{speech}: {len(sound) * 1000 // SAMPLE_RATE} ms of sound; expected 40 or more, one frame")

    # Load.
    machine = Machine(args)
    device = machine.device
    if args.dtype == "auto" and device.type == "cuda":                      # the original's rule
        machine.dtype = torch.float16 if torch.cuda.get_device_capability(device)[0] > 7 else torch.float32
        machine.dtype_why = "as the original has it here"
    load = dubbing.random_models if args.random_weights else dubbing.load_models
    name, resolution, cfg, unet, autoencoder, whisper = load(args)
    unet = unet.to(device, machine.dtype)
    autoencoder = autoencoder.to(device, machine.dtype)
    whisper = whisper.to(device)                                            # it is small, so it stays in float32
    dubbing.set_frames(unet, args)
    products = prepare(unet)

    def dub(frames, windows, unet=unet):
        """Yield the dubbed frames of an iterable of (picture, map to the aligned face)."""
        generator = torch.Generator(device).manual_seed(args.seed)
        return latentsync.lipsync(unet, autoencoder, frames, windows, generator, steps=args.steps, cfg=cfg,
                                  cache_every=3 if args.deep_cache else 1, decode_batch=args.decode,
                                  overlap=args.overlap)
    if args.bench:
        return dubbing.bench_dubbing(args, name, cfg, dub, unet, autoencoder, whisper, machine, products)
    if args.compile:
        unet = next(iter(dubbing.faster_unets(unet, device).values()))

    # Dub frame by frame: find the face, paint it, write the frame.
    count = latentsync.count_frames(latentsync.count_rows(len(sound), whisper.config.positions))
    judge = dubbing.load_judge(args, device)
    face_maps = dubbing.FaceMaps(video, device, args, unet.config.resolution, count)
    shown = []                                                              # the video's frame behind each dubbed one
    without_face = 0
    start = time.perf_counter()

    def frames():
        # A video that is shorter than the speech goes back and forth.
        for number, picture in dubbing.forth_and_back(video, count):
            shown.append(number)
            yield picture, face_maps(number)
    shared_rows = latentsync.ROWS_PER_SECOND if args.overlap else 0         # a second
    windows = latentsync.windows(whisper, sound, window=unet.config.audio_window, overlap=shared_rows)
    dubbed = dub(frames(), windows, unet)
    size = dubbing.panel_size(unet, video) if args.steps_grid else (video.height, video.width)
    given = read_sound_to_write(speech, args.audio_track)
    with VideoWriter(out, *size, sound=given, crf=args.crf, colors=video.colors) as writer:
        for frame in tqdm(dubbed, total=count, desc="dubbing", unit="frame", smoothing=0.05):
            writer.write(dubbing.panels(frame, size) if args.steps_grid else frame.picture)
            without_face += frame.generated is None
    seconds = time.perf_counter() - start
    if without_face:
        print(f"note: {without_face} of {len(shown)} frames have no face; they stay as they were", file=sys.stderr)
    toy = toy_note(args.ckpt or DEMO / "talking_head_latentsync.safetensors", video) if not args.random_weights else ""
    if judge:
        dubbing.print_scores(judge, video, out, shown, face_maps, sound)
    note = f"{len(shown)} frames of {len(shown) / FPS:.2f} s, " + notes_of(video, sound_note, resolution, toy)
    print(machine.summary((unet, autoencoder, whisper), seconds / max(len(shown), 1), out, note, unit="frame"))


# ----------------------------------------------------------------------------------------------------------------------
# python sample.py ops


def sample_ops(args):
    """Print how many bytes each op has to move, or with --bench how fast it is."""
    check_json(args, args.bench is not None)
    if args.bench is None:
        return print(*bench_ops.ops_table(), sep="\n")
    for name in args.bench:
        if name not in REGISTRY:
            raise UserError(f"--bench {name}: expected some of {', '.join(REGISTRY)}, or nothing for all")
    machine = Machine(args)
    save_json(args.json, bench_ops.bench_ops(args.bench or [*REGISTRY], machine.device, machine.dtype))


MODELS = {"var": sample_var, "infinity": sample_infinity, "llamagen": sample_llamagen, "vq": sample_vq,
          "latentsync": sample_latentsync, "syncnet": sample_syncnet, "app": app.run, "ops": sample_ops}
MODELS = {name: planned(command) for name, command in MODELS.items()}

if __name__ == "__main__":
    run_command(MODELS[ARGS.model], ARGS)
