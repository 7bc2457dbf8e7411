"""`python sample.py app`: a page on which all models can be tried, with the optional package gradio.

The generators and the tokenizers run in this process, and pictures appear while they are drawn. A dub takes minutes and
much memory, so `sample.py latentsync` and `sample.py syncnet` run as processes of their own, which end when somebody
leaves the page. Uploads and results are deleted after an hour, and all of them when the server ends.
"""
import argparse
import functools
import tempfile
from pathlib import Path

import torch

import llamagen
import var
import vq
from lib.background import run_sample, streamed
from lib.console import Machine, MissingPackage, UserError, check_ranges, explain
from lib.drawing import choose_prompts, names_to_choose_from
from lib.flags import FLAGS
from lib.loading import load_infinity_pair, load_llamagen_pair, load_var_pair
from lib.pictures import DEMO, cover, grid, psnr, read_picture, to_pixels, to_tensor
from lib.reconstruction import fit
from lib.weights import find_checkpoint

LOADERS = {"var": load_var_pair, "llamagen": load_llamagen_pair, "llamagen-text": load_llamagen_pair,
           "infinity": load_infinity_pair}
SERVED = (*LOADERS, "vq", "latentsync", "syncnet")      # names that --ckpt takes
TOKENIZERS = ("emoji_vq", "emoji_bsq", "emoji_vq_single")
EDITS = ("inside the box", "outside of the box", "inside the box, as the class")
MOST_PICTURES = 8                               # that one click draws
MOST_UPLOAD = "200mb"
PROGRESS = '<progress value="{}" style="width: 100%"></progress>'
HOUR = 3600                                     # seconds
NO_PICTURE = "no picture: upload one first"


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
            args.prompt = ["which of the demo's two models is meant"]
        return LOADERS[name](args, Machine(args))

    @functools.cache
    def load_tokenizer(self, file):
        machine = Machine(self.arguments("vq"))
        return vq.load(self.files.get("vq", DEMO / f"{file}.safetensors"), dtype=machine.dtype).to(machine.device)

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

    def options(self, name, n, seed, **changes):
        """Settings of `sample`: the checkpoint's own, then `changes`, and a generator for each picture."""
        loaded = self.load(name)
        device = next(loaded.model.parameters()).device
        generators = [torch.Generator(device).manual_seed(int(seed) + i) for i in range(int(n))]
        return loaded.metadata.get("sampling", {}) | changes | {"generator": generators}

    def run(self, command, **given):
        """`sample.py COMMAND` in a process of its own, see lib/background.py."""
        flags = {"ckpt": self.files.get(command), "device": self.args.device, "dtype": self.args.dtype}
        return run_sample(command, flags | given)


# ----------------------------------------------------------------------------------------------------------------------
# What a click does. Each function yields what the page shows.


def filmstrips(frames, titles):
    """Steps of B pictures, a list of (B, 3, h, w) in [0, 1] -> one picture: a row for each, a column for each title."""
    missing = [torch.ones_like(frames[0])] * (len(titles) - len(frames))
    return grid(to_pixels(torch.stack(frames + missing, 1).flatten(0, 1)), len(titles), titles=titles)


def draw_scales(loaded, condition, scales, options):
    """Draw with VAR or Infinity; yield the pictures after each scale beside those before."""
    frames = []
    for step in streamed(lambda on_step: loaded.model.sample(loaded.tokenizer, condition, on_step=on_step, **options)):
        frames.append(loaded.tokenizer.decode(step.f_hat).add(1).div(2))
        yield filmstrips(frames, [f"{h}x{w}" for h, w in scales])


def draw_var(page, label, n, cfg, top_p, seed):
    """Draw a class."""
    loaded = page.load("var")
    options = page.options("var", n, seed, cfg=cfg, top_p=top_p)
    scales = vq.as_pairs(loaded.model.config.patch_nums)
    yield from draw_scales(loaded, torch.full((int(n),), int(label)), scales, options)


def edit_var(page, image, edit, y0, x0, y1, x1, label, n, cfg, top_p, seed):
    """Redraw a box of a picture, or what is around it. The box is in shares of its centre square."""
    if image is None:
        raise UserError(NO_PICTURE)
    if not (y0 < y1 and x0 < x1):
        raise UserError(f"a box from ({y0}, {x0}) to ({y1}, {x1}): top and left must be less than bottom and right")
    loaded = page.load("var")
    config = loaded.model.config
    last = config.patch_nums[-1]
    device = next(loaded.model.parameters()).device
    side = loaded.tokenizer.config.stride * last
    tokens = loaded.tokenizer.tokenize(to_tensor(cover(read_picture(image), side, side), device))
    options = page.options("var", n, seed, cfg=cfg, top_p=top_p)
    options["given_tokens"] = [t.expand(int(n), -1) for t in tokens]
    options["keep_mask"] = var.edit_mask((y0, x0, y1, x1), last, edit != EDITS[1]).to(device)
    labels = torch.full((int(n),), int(label) if edit == EDITS[2] else config.num_classes)      # or the null class
    yield from draw_scales(loaded, labels, vq.as_pairs(config.patch_nums), options)


def draw_llamagen(page, label, prompt, n, cfg, top_p, seed):
    """Draw a prompt, or without one a class; show every row of tokens."""
    name = "llamagen-text" if prompt.strip() else "llamagen"
    loaded = page.load(name)
    model = loaded.model
    condition = torch.full((int(n),), int(label)), None
    if prompt.strip():
        features = page.features(name, prompt)[prompt]
        condition = llamagen.left_pad([features] * int(n), model.config.text_slots)
    options = page.options(name, n, seed, cfg=cfg, top_p=top_p)
    tokens = []
    for step in streamed(lambda on_step: model.generate(*condition, on_step=on_step, **options)):
        tokens.append(step.tokens)
        if len(tokens) % model.config.side == 0:
            yield grid(to_pixels(model.decode(loaded.tokenizer, torch.stack(tokens, 1)), add=0.5), int(n))


def draw_infinity(page, prompt, negative, aspect, n, cfg, tau, seed):
    """Draw a prompt."""
    loaded = page.load("infinity")
    pixels = loaded.metadata.get("pixels")
    scales = vq.schedule(aspect, pixels) if pixels else vq.as_pairs(loaded.tokenizer.config.patch_nums)
    if not pixels and aspect != 1:
        raise UserError(f"height / width {aspect}: {loaded.name} draws squares only")
    features = page.features("infinity", prompt, *filter(str.strip, [negative]))
    options = page.options("infinity", n, seed, cfg=cfg, tau=tau, scales=tuple(scales))
    if negative.strip():
        options["negative"] = features[negative][None], None
    yield from draw_scales(loaded, features[prompt].repeat(int(n), 1, 1), scales, options)


def reconstruct(page, image, file):
    """A picture after every scale of a tokenizer, with its PSNR."""
    if image is None:
        raise UserError(NO_PICTURE)
    tokenizer = page.load_tokenizer(file)
    picture, schedule = fit(read_picture(image), tokenizer.config, keep_size=False)
    original = to_tensor(picture, next(tokenizer.parameters()).device)
    rungs = tokenizer.reconstruct(original, schedule, all_scales=True)
    titles = [f"{h}x{w}: {psnr(rung, original).item():.1f} dB" for (h, w), rung in zip(vq.as_pairs(schedule), rungs)]
    yield filmstrips([frame.add(1).div(2) for frame in (original, *rungs)], ["original", *titles])


def dub(page, video, speech, aligned):
    """Dub a video, and show what SyncNet says before and after."""
    if bool(video) != bool(speech):
        raise UserError("only one file: upload a video and a speech, or neither to take the demo's")
    yield from watch(page, "latentsync", "dubbed.mp4", str, video=video, audio=speech, aligned=aligned)


def judge(page, video):
    """Score the faces of a video, and show the distance over the shift of the sound."""
    yield from watch(page, "syncnet", "curve.png", read_picture, video=video)


def watch(page, command, name, read, **given):
    """Run a command of sample.py; yield its progress, its result (read from the file), and its messages."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/{name}"
        for share, lines in page.run(command, out=out, **given):
            messages = "\n".join(lines).replace(f" -> {out}", "")
            yield PROGRESS.format(share), None, messages
        yield PROGRESS.format(1), read(out), messages                       # gradio copies it before the folder goes


# ----------------------------------------------------------------------------------------------------------------------
# The page


def build(page, gr):
    """The page: at the left what a model asks for, at the right what it makes. gr: the package gradio."""
    def sliders(name, lowest, cfg, last, default):
        """What all generators ask for: number, guidance, one more setting, seed."""
        given = {"cfg": cfg, last: default} | page.load(name).metadata.get("sampling", {})
        return [gr.Slider(1, MOST_PICTURES, 4, step=1, label="pictures"),
                gr.Slider(lowest, 10, given["cfg"], step=0.1, label="guidance"),
                gr.Slider(0.05, 1, given[last], step=0.01, label=last), gr.Number(0, precision=0, label="seed")]

    def classes(name):
        names, first = page.class_names(name)
        return gr.Dropdown(names, value=first, label="class")

    def picture():
        image = gr.Image(type="filepath", label="picture", height=240)
        image.preprocess = lambda upload: upload and upload.path            # read_picture reads more formats
        return image

    def video():
        return gr.Video(label="video; without one the demo's", height=240)
    box = [gr.Slider(0, 1, at, step=0.05, label=edge) for edge, at in
           (("top", 0.25), ("left", 0.25), ("bottom", 0.75), ("right", 0.75))]
    prompts = page.load("infinity").metadata.get("show") or ["a red fox in the snow"]
    tokenizers = [Path(page.files["vq"]).name] if "vq" in page.files else TOKENIZERS
    tabs = {
        "VAR": (draw_var, [classes("var"), *sliders("var", 0, 4.0, "top_p", 0.95)], [gr.Image(label="scale by scale")]),
        "VAR redraws": (edit_var, [picture(), gr.Radio(EDITS, value=EDITS[0], label="redraw"), *box, classes("var"),
                                   *sliders("var", 0, 4.0, "top_p", 0.95)], [gr.Image(label="scale by scale")]),
        "LlamaGen": (draw_llamagen, [classes("llamagen"), gr.Textbox(label="or a prompt"),
                                     *sliders("llamagen", 1, 4.0, "top_p", 1.0)], [gr.Image(label="row by row")]),
        "Infinity": (draw_infinity, [gr.Textbox(prompts[0], label="prompt"),
                                     gr.Textbox(label="what the picture should not show"),
                                     gr.Slider(0.333, 3, 1, step=0.001, label="height / width"),
                                     *sliders("infinity", 1, 3.0, "tau", 0.5)], [gr.Image(label="scale by scale")]),
        "Tokenizers": (reconstruct, [picture(), gr.Radio(tokenizers, value=tokenizers[0], label="tokenizer")],
                       [gr.Image(label="after every scale")]),
        "LatentSync": (dub, [video(), gr.Audio(type="filepath", label="speech; without one the demo's"),
                             gr.Checkbox(label="the video shows nothing but an aligned face")],
                       [gr.HTML(), gr.Video(label="dubbed"), gr.Textbox(label="messages", lines=6)]),
        "SyncNet": (judge, [video()], [gr.HTML(), gr.Image(label="distance over the shift of the sound"),
                                       gr.Textbox(label="messages", lines=6)]),
    }
    with gr.Blocks(title="legible", delete_cache=(HOUR, HOUR)) as blocks:
        for title, (function, inputs, outputs) in tabs.items():
            with gr.Tab(title), gr.Row():
                with gr.Column(scale=2):
                    for component in inputs:
                        component.render()
                    button = gr.Button("go", variant="primary")
                with gr.Column(scale=3):
                    for component in outputs:
                        component.render()
            button.click(shown(functools.partial(function, page), gr), inputs, outputs, concurrency_id="models",
                         concurrency_limit=1)
    return blocks


def shown(function, gr):
    """A function whose errors appear on the page as the line that the command line prints."""
    def run(*values):
        try:
            yield from function(*values)
        except Exception as e:
            message = explain(e)
            if message is None:
                raise
            raise gr.Error(" ".join(message.split()), print_exception=False) from None
    return run


def run(args):
    """`python sample.py app`."""
    try:
        import gradio as gr
    except ImportError:
        raise MissingPackage("sample.py app needs a package: pip install gradio") from None
    check_ranges(("--port", args.port, 1, 65535))
    page = build(Page(args), gr).queue(max_size=32)
    page.launch(server_name=args.host, server_port=args.port, max_file_size=MOST_UPLOAD)
