"""`python sample.py app`: a page on which all models can be tried, with the optional package gradio.

The generators and the tokenizers run in this process, and pictures appear while they are drawn. A dub takes minutes and
much memory, so `sample.py latentsync` and `sample.py syncnet` run as processes of their own, which end when somebody
leaves the page. Uploads and results are deleted after one to two hours, and all of them when the server ends.
"""
import functools
import os
import tempfile
from pathlib import Path

import torch

import llamagen
import var
import vq
from lib.background import streamed
from lib.console import MissingPackage, UserError, check_ranges, explain
from lib.pictures import cover, grid, psnr, read_picture, to_pixels, to_tensor
from lib.reconstruction import fit
from lib.served import Page

TOKENIZERS = ("emoji_vq", "emoji_bsq", "emoji_vq_single")
EDITS = ("inside the box", "outside of the box", "inside the box, as the class")
MOST_PICTURES = 8                               # that one click draws
MOST_UPLOAD = "200mb"
PROGRESS = '<progress value="{}" style="width: 100%"></progress>'
HOUR = 3600                                     # seconds
NO_PICTURE = "no picture: upload one first"


# ----------------------------------------------------------------------------------------------------------------------
# What a click does. Each function yields what the page shows.


def filmstrips(frames, titles):
    """Steps of B pictures, a list of (B, 3, h, w) in [0, 1] -> one picture: a row for each, a column for each title."""
    missing = [torch.ones_like(frames[0])] * (len(titles) - len(frames))
    return grid(to_pixels(torch.stack(frames + missing, 1).flatten(0, 1)), len(titles), titles=titles)


def draw_scales(loaded, condition, scales, options):
    """Draw with VAR or Infinity; yield the pictures after each scale beside those before."""
    def draw(push):
        loaded.model.sample(loaded.tokenizer, condition, on_step=lambda step: push(step.f_hat), **options)
    frames = []
    for f_hat in streamed(draw):
        frames.append(loaded.tokenizer.decode(f_hat).add(1).div(2))
        yield filmstrips(frames, [f"{h}x{w}" for h, w in scales])


def draw_var(page, label, n, cfg, top_p, seed):
    """Draw a class."""
    loaded = page.load("var")
    options = page.options("var", n, seed, cfg=cfg, top_p=top_p)
    scales = vq.as_pairs(loaded.model.config.patch_nums)
    yield from draw_scales(loaded, torch.full((n,), label), scales, options)


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
    tokens = loaded.tokenizer.tokenize(to_tensor(cover(read_picture(image, Path(image).name), side, side), device))
    options = page.options("var", n, seed, cfg=cfg, top_p=top_p)
    options["given_tokens"] = [t.expand(n, -1) for t in tokens]
    options["keep_mask"] = var.edit_mask((y0, x0, y1, x1), last, edit != EDITS[1]).to(device)
    if edit != EDITS[2]:
        label = config.num_classes                                          # in- and out-painting use the null class
    labels = torch.full((n,), label)
    yield from draw_scales(loaded, labels, vq.as_pairs(config.patch_nums), options)


def draw_llamagen(page, label, n, cfg, top_p, seed):
    """Draw a class, row by row."""
    options = page.options("llamagen", n, seed, cfg=cfg, top_p=top_p)
    yield from draw_rows(page.load("llamagen"), (torch.full((n,), label), None), options)


def draw_text(page, prompt, n, cfg, top_p, seed):
    """Draw a prompt with LlamaGen, row by row."""
    loaded = page.load("llamagen-text")
    features = page.features("llamagen-text", prompt)[prompt]
    condition = llamagen.left_pad([features] * n, loaded.model.config.text_slots)
    yield from draw_rows(loaded, condition, page.options("llamagen-text", n, seed, cfg=cfg, top_p=top_p))


def draw_rows(loaded, condition, options):
    """Draw with LlamaGen; yield the pictures after each row of tokens."""
    model = loaded.model

    def draw(push):
        model.generate(*condition, on_step=lambda step: push(step.tokens), **options)
    tokens = []
    for token in streamed(draw):
        tokens.append(token)
        if len(tokens) % model.config.side == 0:
            yield grid(to_pixels(model.decode(loaded.tokenizer, torch.stack(tokens, 1)), add=0.5), len(token))


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
    yield from draw_scales(loaded, features[prompt].repeat(n, 1, 1), scales, options)


def reconstruct(page, image, file):
    """A picture after every scale of a tokenizer, with its PSNR."""
    if image is None:
        raise UserError(NO_PICTURE)
    tokenizer = page.load_tokenizer(file)
    picture, schedule = fit(read_picture(image, Path(image).name), tokenizer.config, keep_size=False)
    original = to_tensor(picture, next(tokenizer.parameters()).device)
    rungs = tokenizer.reconstruct(original, schedule, all_scales=True)
    titles = [f"{h}x{w}: {psnr(rung, original).item():.1f} dB" for (h, w), rung in zip(vq.as_pairs(schedule), rungs)]
    yield filmstrips([frame.add(1).div(2) for frame in (original, *rungs)], ["original", *titles])


def dub(page, video, speech, aligned):
    """Dub a video, and show what SyncNet says before and after."""
    if bool(video) != bool(speech):
        raise UserError("only one file: upload a video and a speech, or neither to take the demo's")
    yield from run_and_show(page, "latentsync", "dubbed.mp4", str, video=video, audio=speech, aligned=aligned)


def judge(page, video):
    """Score the faces of a video, and show the distance over the shift of the sound."""
    yield from run_and_show(page, "syncnet", "curve.png", read_picture, video=video)


def run_and_show(page, command, name, read, **given):
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
    def sliders(name, no_guidance, setting="top_p"):
        """What all generators ask for: number, guidance, one more setting, seed."""
        usual = page.sampling(name)
        return [gr.Slider(1, MOST_PICTURES, 4, step=1, precision=0, label="pictures"),
                gr.Slider(no_guidance, 10, usual["cfg"], step=0.1, label="guidance"),
                gr.Slider(0.05, 1, usual[setting], step=0.01, label=setting), gr.Number(0, precision=0, label="seed")]

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
    edit = gr.Radio(EDITS, value=EDITS[0], label="redraw")
    prompts = page.load("infinity").metadata.get("show") or ["a red fox in the snow"]
    negative = gr.Textbox(label="what the picture should not show")
    aspect = gr.Slider(0.333, 3, 1, step=0.001, label="height / width")
    tokenizers = [Path(page.files["vq"]).name] if "vq" in page.files else TOKENIZERS
    speech = gr.Audio(type="filepath", label="speech; without one the demo's")
    aligned = gr.Checkbox(label="the video shows nothing but an aligned face")

    def report(result):
        return [gr.HTML(), result, gr.Textbox(label="messages", lines=6)]
    scales = "scale by scale"
    tabs = {  # title: what a click does, what it asks for, what it shows
        "VAR": (draw_var, [classes("var"), *sliders("var", 0)], [gr.Image(label=scales)]),
        "VAR redraws": (edit_var, [picture(), edit, *box, classes("var"), *sliders("var", 0)],
                        [gr.Image(label=scales)]),
        "LlamaGen": (draw_llamagen, [classes("llamagen"), *sliders("llamagen", 1)], [gr.Image(label="row by row")]),
        "LlamaGen, text": (draw_text, [gr.Textbox(prompts[0], label="prompt"), *sliders("llamagen-text", 1)],
                           [gr.Image(label="row by row")]),
        "Infinity": (draw_infinity, [gr.Textbox(prompts[0], label="prompt"), negative, aspect,
                                     *sliders("infinity", 1, "tau")], [gr.Image(label=scales)]),
        "Tokenizers": (reconstruct, [picture(), gr.Radio(tokenizers, value=tokenizers[0], label="tokenizer")],
                       [gr.Image(label="after every scale")]),
        "LatentSync": (dub, [video(), speech, aligned], report(gr.Video(label="dubbed"))),
        "SyncNet": (judge, [video()], report(gr.Image(label="distance over the shift of the sound"))),
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
            for value in values:
                if isinstance(value, str) and os.path.isabs(value):         # an upload: not where the server keeps it
                    message = message.replace(value, Path(value).name)
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
    try:
        page.launch(server_name=args.host, server_port=args.port, max_file_size=MOST_UPLOAD)
    except OSError as e:
        raise UserError(f"--host {args.host} --port {args.port}: cannot listen there ({e}); give another --port") from e
