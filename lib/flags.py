"""Flags of sample.py. Importing this file needs no package, so that --help answers at once."""
import argparse


def output_flags(add, batch_size):
    """Flags of all commands that make pictures."""
    add("--ckpt", metavar="FILE|NAME", help="weights: a file, or a released name such as var_d16.pth; default: demo/")
    add("--batch-size", type=int, default=batch_size, help=f"pictures at a time (default {batch_size})")
    add("--steps-grid", action="store_true", help="a filmstrip: how each picture came to be")
    machine_flags(add)


def machine_flags(add):
    """Flags of all commands that run a model."""
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"],
        help="precision of the matrix products and convolutions")
    add("--no-download", action="store_true", help="never download anything")
    add("--weights", choices=["ema", "model"], help="of a training checkpoint that has both; default: ema, the "
        "averaged ones")


def weight_flags(add):
    """Flags of all commands that draw with a large model: changes of its weights, and their precision."""
    add("--quantize", choices=["int8"], help="linear layers of the model and of T5 as 8-bit integers: a quarter of the "
        "memory of fp32, half of that of bf16")
    add("--lora", nargs="+", default=[], metavar="FILE[:STRENGTH]", help="what train.py --lora or peft has learnt; "
        "several add up; strength 1: as learnt")
    add("--merge", metavar="FILE", help="draw nothing, but write the model with the changes of --lora in it")


def bench_flags(add, example):
    """Flags of all commands that can be timed."""
    add("--compile", action="store_true", help="warm up longer, then run faster: CUDA graphs; without CUDA "
        "torch.compile, which gains little")
    add("--bench", action="store_true", help="time it, and compare it with what this machine can do")
    add("--neighbour", action="store_true", help="with --bench: also beside a process that keeps one core busy")
    add("--json", metavar="FILE", help="with --bench: write the numbers as JSON")
    add("--random-weights", metavar="NAME", help=f"a model of this size without its file, such as {example}")


def generator_flags(add, example):
    """Flags of the three generators. Defaults of the settings come from the checkpoint, or are those in the help."""
    output_flags(add, batch_size=8)
    add("--out", metavar="PATH", help="a .png, or a folder for one file per picture; default: out/MODEL.png")
    add("--seed", type=int, default=0, help="picture i is drawn with seed + i, in any batch (default 0)")
    add("--vae", "--vq", dest="vae", metavar="FILE|NAME",
        help="the tokenizer; default: the one beside --ckpt, else the released one")
    add("--one-generator", action="store_true", help="draw a batch from one generator, as the original code does")
    weight_flags(add)
    bench_flags(add, example)


def class_flags(add):
    """Flags of generators that draw classes."""
    add("--classes", nargs="+", default=[], metavar="ID|NAME", help="in turn, each at least once; default: the "
        "checkpoint's choice, else all. Released models have ImageNet's: ids in the order of WordNet ids")
    add("--list-classes", action="store_true", help="print the class names that --classes takes")
    add("--npz", metavar="FILE", help="all pictures as one uint8 array arr_0; an interrupted run continues")


def prompt_flags(add):
    """Flags of generators that read text."""
    add("--prompt", nargs="+", default=[], metavar="TEXT", help="one or more; default: the checkpoint's choice")
    add("--prompts", metavar="FILE", help="one prompt per line, or a .jsonl with \"prompt\" (then GenEval's folders "
        "are written); fills a folder; an interrupted run continues")
    add("--t5", metavar="DIR", help="folder of google/flan-t5-xl; default: beside --ckpt, else downloaded")
    add("--features", metavar="FILE", help="prompts and text features from --save-features; then no T5 is needed")
    add("--save-features", metavar="FILE", help="write the text features of the prompts, and draw nothing")


def var_flags(add):
    """Flags of `sample.py var`."""
    generator_flags(add, "var_d16")
    class_flags(add)
    add("-n", type=int, help="number of pictures (default: one per class given, else 16)")
    add("--cfg", type=float, help="guidance at the last scale, 0: none; default 4")
    add("--top-k", type=int, help="keep the N likeliest tokens, 0: all; default 900")
    add("--top-p", type=float, help="then keep the likeliest tokens with this total probability, 0: all; default 0.95")
    add("--smooth", action="store_true", help="mixtures of codes: smoother pictures, lower scores")
    add("--image", metavar="FILE", help="the picture to edit")
    add("--edit", choices=["in", "out", "class"],
        help="redraw inside --box | outside it | inside it, as the class of --classes")
    add("--box", type=float, nargs=4, metavar=("Y0", "X0", "Y1", "X1"), help="in shares of the picture's centre "
        "square, which is all that is used of it (default 0.1 0.1 0.8 0.8); at least one cell is redrawn")
    add("--mask", metavar="FILE", help="instead of --box: a picture of the same size, white where to redraw")


def infinity_flags(add):
    """Flags of `sample.py infinity`."""
    generator_flags(add, "infinity_2b")
    prompt_flags(add)
    add("-n", type=int, default=1, help="pictures of each prompt (default 1)")
    add("--negative", metavar="TEXT", help="what the picture should not show")
    add("--face-suffix", action="store_true", help="the authors' addition to prompts about people")
    add("--cfg", type=float, nargs="+", help="guidance, 1: none; one for all scales, or one for each; default 3")
    add("--tau", type=float, nargs="+", help="temperature; one for all scales, or one for each; default 0.5")
    add("--top-k", type=int, help="1: always the likelier value of a bit, 0: draw; default 0")
    add("--top-p", type=float, help="draw only bits whose likelier value has at most this probability; default 0.97")
    add("--guide-features", type=int, nargs="+", metavar="BLOCK", help="guide the features after these blocks (-1: the "
        "last) instead of the logits")
    add("--aspect", type=float, help="height / width, 0.333 .. 3; the nearest of 15 is taken (default 1)")
    add("--pixels", metavar="SIZE", help="0.06M, 0.25M, 0.60M or 1M; default: what the checkpoint was trained for")
    add("--image", metavar="FILE", help="a picture whose first --keep scales are kept")
    add("--keep", type=int, metavar="N", help="with --image (default 4): few scales keep its colors and "
        "layout, all of them reconstruct it")
    add("--tile", type=int, default=0, metavar="CELLS", help="decode in tiles with this side: less memory and nearly "
        "the same picture; 0: at once")


def llamagen_flags(add):
    """Flags of `sample.py llamagen`."""
    generator_flags(add, "llamagen_L")
    class_flags(add)
    prompt_flags(add)
    add("-n", type=int, help="number of pictures (default: one per class given, else 16), or per prompt (default 1)")
    add("--no-clean", action="store_true", help="give prompts to T5 as they are; by default they are cleaned like the "
        "captions of the training data, which needs ftfy and beautifulsoup4")
    add("--cfg", type=float, nargs="+", help="guidance, 1: none; one for all pictures, or several in turn; default 4, "
        "for text 7.5")
    add("--cfg-interval", type=int, help="guide only the first N + 2 tokens, -1: all; default -1")
    add("--temperature", type=float, help="0: always the likeliest token; default 1")
    add("--top-k", type=int, help="keep the N likeliest tokens, 0: all; default 2000, for text 1000")
    add("--top-p", type=float, help="then keep the likeliest tokens with this total probability, 0, 1: all; default 1")
    add("--size", type=int, metavar="PIXELS", help="that the model was trained for, if its file does not contain it")
    add("--eval-size", type=int, metavar="PIXELS", help="resize pictures as the authors did to measure FID: 256")
    add("--engine", metavar="vllm|URL", help="draw with the serving engine vLLM, here or on a server that python -m "
        "lib.serving has started; give a larger --batch-size then")


def vq_flags(add):
    """Flags of `sample.py vq`."""
    output_flags(add, batch_size=1)
    add("--image", nargs="+", default=[], metavar="FILE|DIR", help="pictures, or folders of them, with their "
        "sub-folders, in sorted order; default: some of the demo's")
    add("--out", metavar="PATH", help="a .png with the originals above, or a folder for the reconstructions, one file "
        "each; default: out/vq.png")
    add("--npz", metavar="FILE", help="all reconstructions as one uint8 array arr_0, for rFID")
    add("--keep-size", action="store_true", help="do not cut a square; any size that the stride divides")
    add("--seed", type=int, help=argparse.SUPPRESS)                         # nothing is drawn


def audio_track_flag(add):
    """The flag of both commands that hear a file."""
    add("--audio-track", type=int, metavar="N", help="of a file with several, from 1 on; default: the first that is "
        "not silent")


def syncnet_flags(add):
    """Flags of `sample.py syncnet`."""
    add("--video", metavar="FILE", help="default: the demo's")
    add("--audio", metavar="FILE", help="another sound than the video's own")
    audio_track_flag(add)
    add("--ckpt", metavar="FILE|NAME", help="syncnet_v2.model (Sync-C, Sync-D), stable_syncnet.pt, or one of train.py; "
        "default: demo/")
    add("--face", nargs="+", default=["auto"], metavar="WHERE", help="whole: the video is a face, aligned or cropped; "
        "detect: find and follow faces; X0 Y0 X1 Y1: a box in pixels; auto: whole if it is square, else detect")
    add("--max-shift", type=int, default=15, metavar="FRAMES", help="of the sound, to both sides (default 15)")
    add("--batch-size", type=int, default=16, help="clips at a time (default 16)")
    add("--out", metavar="FILE", help="a .png of the curve; default: out/syncnet.png")
    machine_flags(add)


def latentsync_flags(add):
    """Flags of `sample.py latentsync`."""
    add("--video", metavar="FILE", help="the video to dub; default: the demo's")
    add("--audio", metavar="FILE", help="the speech: a sound file, or a video with sound (with the demo's video: the "
        "demo's); the result has its channels and rate")
    audio_track_flag(add)
    add("--ckpt", metavar="FILE|NAME", help="weights: a file, or latentsync_1.0.pt, latentsync_1.5.pt, "
        "latentsync_1.6.pt; default: demo/")
    add("--vae", metavar="DIR|NAME", help="the autoencoder; default: sd-vae-ft-mse")
    add("--whisper", metavar="FILE|NAME", help="the audio encoder; default: beside --ckpt, else whisper_tiny.pt")
    add("--resolution", type=int, choices=[256, 512], help="of the faces; default: what the file or a "
        "name in the path of --ckpt says")
    add("--out", metavar="FILE", help="an .mp4; default: out/latentsync.mp4")
    add("--steps", type=int, default=20, help="of diffusion (default 20)")
    add("--cfg", type=float, help="guidance, useful from 1 (none) to 3; default: the demo's own, else 1.5")
    add("--seed", type=int, default=1247, help="default 1247, the original's")
    add("--deep-cache", action="store_true", help="run most of the network in every third step only: faster, nearly "
        "the same result")
    add("--overlap", type=int, default=0, metavar="FRAMES", help="paint the last frames of each clip again with the "
        "next one, and cross-fade: no seams (default 0); the 30-second pieces in which Whisper hears then overlap by a "
        "second")
    add("--face", type=int, default=1, metavar="N", help="if there are several faces, the N-th largest (default 1)")
    add("--landmarks", metavar="FILE.npz", help="do not look for faces: an array `landmarks` (frames, N, 2) in pixels, "
        "25 frames a second, N = 3 (brows, nose), 5, 106 or 478; nan where there is no face")
    add("--aligned", action="store_true", help="the video shows nothing but an aligned face")
    add("--detect-every", type=int, metavar="FRAMES", help="look for faces in every N-th frame; default: 1, on a CPU 3")
    add("--decode", type=int, default=4, metavar="FRAMES", help="that the autoencoder gets at a time; fewer need less "
        "memory (default 4)")
    add("--crf", type=int, default=13, help="quality of the written video, 0 best, 51 worst (default 13)")
    add("--steps-grid", action="store_true", help="write face, masked face, painted face and result side by side")
    add("--syncnet", metavar="FILE|NAME", help="score the video before and after with this stable_syncnet.pt")
    add("--frames", type=int, help="painted at a time (default: as trained, 16)")
    weight_flags(add)
    bench_flags(add, "latentsync_1.5")
    machine_flags(add)


def ops_flags(add):
    """Flags of `sample.py ops`."""
    add("--bench", nargs="*", metavar="OP", help="time these ops, or all, against plain and compiled torch")
    add("--json", metavar="FILE", help="with --bench: write the numbers as JSON")
    add("--device", default="auto", choices=["auto", "cuda", "cpu"])
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"])


def app_flags(add):
    """Flags of `sample.py app`."""
    add("--ckpt", nargs="+", default=[], metavar="NAME=FILE", help="weights that replace the demo's, such as "
        "var=var_d16.pth; names are var, llamagen, llamagen-text, infinity, vq (of the tab of tokenizers), latentsync "
        "and syncnet")
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1, this machine alone)")
    add("--port", type=int, default=7860, help="default 7860")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    add("--no-download", action="store_true", help="never download anything")


NOTES = {  # command: what else --help says
    "llamagen": """class or text -> image

LlamaGen cannot redraw a part of a picture, as `sample.py var --edit` does. It draws row by row, and a token sees only
those above it and to its left, so a new part would know nothing of what is kept below it and to its right.""",
}
FLAGS = {  # command: what it does, and its flags
    "var": ("class -> image", var_flags),
    "infinity": ("text -> image", infinity_flags),
    "llamagen": ("class or text -> image", llamagen_flags),
    "vq": ("image -> tokens -> image", vq_flags),
    "latentsync": ("video and speech -> lip-synced video", latentsync_flags),
    "syncnet": ("is the sound of a video in sync with the lips?", syncnet_flags),
    "app": ("a page to try all models in a browser", app_flags),
    "ops": ("the ops of triton_ops.py: what they have to move, and how fast they are", ops_flags),
}
