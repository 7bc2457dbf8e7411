"""Settings of train.py: what the papers trained with, and the demo. Flags, their defaults, their help and the
comparison at --resume all come from here.

A recipe is a dict of settings. COMMON and the dicts per model hold Setting objects: default, help, range. Recipes
change defaults by `derive`. A setting without help has no flag. Flags on the command line override the recipe.
"""
import argparse
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable

DEMO = Path(__file__).resolve().parent.parent / "demo"
DTYPES = ["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Setting:
    """One setting of a recipe: the default, and the flag that changes it."""

    default: object
    help: str = ""                              # no help: no flag, only a recipe sets it
    low: float = None                           # lowest value; None: not checked
    high: float = None
    type: Callable = None                       # type of the flag's value. None: the type of the default
    metavar: str = None
    flags: tuple = ()                           # names of the flag; by default --name-of-setting
    options: dict = field(default_factory=dict)     # more arguments of argparse: choices, nargs, action


def file(help, metavar="FILE", flags=(), **options):
    """A setting that names a file or folder."""
    return Setting(None, help, type=str, metavar=metavar, flags=flags, options=options)


def choice(default, choices, help):
    """A setting with a few possible values."""
    return Setting(default, help, options={"choices": choices})


def switch(help):
    """A setting that is off by default."""
    return Setting(False, help, options={"action": "store_true"})


def yes_no(default, help):
    """A setting with the flags --name and --no-name."""
    return Setting(default, help, options={"action": argparse.BooleanOptionalAction})


def derive(base, **changes):
    """A recipe like `base` with other defaults, or with further Settings."""
    merged = dict(base)
    for name, value in changes.items():
        merged[name] = value if isinstance(value, Setting) else replace(base[name], default=value)
    return merged


# Settings that a continued run may change: where it runs and what it reports, but not what it computes. All others,
# and the content of data and files, must be the same.
MAY_DIFFER = {"data", "val_data", "out", "resume", "override", "traceback", "accum", "device", "workers", "compile",
              "fsdp", "checkpointing", "log_every", "val_every", "sample_every", "save_every", "save_dtype", "keep",
              "max_skipped", "stop_after", "bench", "json", "cache"}
INSTEAD_OF_TRAINING = ("bench", "evaluate", "prepare", "scaling_laws", "study")
OF_PREPARE = ("min_face", "min_confidence", "max_offset", "quality", "min_quality", "piece")

COMMON = {
    "data": Setting("demo", metavar="DIR"),                                 # its help differs from model to model
    "val_data": file("held-out data; default: every 20th item of --data", "DIR"),
    "out": file("default: runs/MODEL", "DIR"),
    "resume": choice("no", ["no", "auto"], "auto: continue the run in --out if there is one"),
    "override": Setting(None, "with --resume auto: settings that this time have other values on purpose, such as lr "
                        "or steps", type=str, metavar="SETTING", options={"nargs": "+"}),
    "steps": Setting(0, "optimizer steps (or --epochs)", 0),
    "epochs": Setting(0, "passes over the training data, instead of --steps", 0, 10**6),
    "batch_size": Setting(16, "items per optimizer step, over all processes and --accum", 1, 10**6),
    "accum": Setting(1, "backward passes per optimizer step and process", 1, 10**6),
    "lr": Setting(1e-4, "peak learning rate, for the whole batch (papers give it per 256 items)", 0, 10),
    "schedule": Setting("lin0", "fall of the learning rate: lin, lin0, lin00 (a line after a plateau of 15, 5 or 0 %% "
                        "of the steps), lin0.8 (two lines), cos, exp or const", metavar="NAME"),
    "warmup": Setting(0.02, "share of the steps in which the learning rate rises", 0, 1),
    "warmup_from": Setting(0.005),                                          # where it starts, relative to the peak
    "final_lr": Setting(0.1, "last learning rate / peak", 0, 1),
    "wd": Setting(0.05, "weight decay at the start", 0, 100),
    "wd_end": Setting(0.0, "weight decay at the end (0: the same)", 0, 100),
    "betas": Setting((0.9, 0.95)),                                          # AdamW's
    "clip": Setting(2.0, "largest global gradient norm", 1e-6),
    "ema": Setting(0.0, "decay of the moving average of weights that is exported; 0: none", 0, 1),
    "dtype": choice("fp32", DTYPES, "precision of the matrix products"),
    "save_dtype": choice("fp32", [*DTYPES, "fp8"], "precision of model.safetensors"),
    "device": choice("auto", ["auto", "cuda", "mps", "cpu"], "where to train"),
    "seed": Setting(0, "of all random draws", 0, 2**63 - 1),
    "workers": Setting(min(4, os.cpu_count() or 1), "processes that read data (default: one per core, at most 4)", 0,
                       1000),
    "shuffle": Setting(10000, "size of the shuffle buffer for data in tar files", 1, metavar="N"),
    "checkpointing": yes_no(False, "recompute activations in the backward pass: slower, less memory"),
    "compile": switch("torch.compile for the blocks of the model"),
    "fsdp": switch("under torchrun: shard weights and optimizer state over the processes (FSDP2), for models that one "
                   "GPU cannot train; otherwise every process holds all of them (DDP)"),
    "log_every": Setting(20, "steps between two log rows; 0: never (so for the next three)", 0),
    "val_every": Setting(500, "steps between two validations", 0),
    "sample_every": Setting(500, "steps between two pictures", 0),
    "save_every": Setting(500, "steps between two checkpoints", 0),
    "keep": Setting(2, "number of checkpoints to keep", 1, metavar="N"),
    "max_skipped": Setting(10, "stop after N steps in a row whose gradient was not finite", 1, metavar="N"),
    "stop_after": Setting(0, "save and stop after this number of steps; --resume auto continues", 0, metavar="STEPS"),
    "bench": switch("do not train: time a step, and its matrix products alone"),
    "json": file("with --bench, or --evaluate of an image model: write the numbers"),
    "traceback": switch("show where in the code an error arose"),
}

# Tokenizers and autoencoders. VAR's authors released no tokenizer recipe. "imagenet" is ours, near LlamaGen's.

EVALUATE = file("do not train: how well does this model do on held-out pictures?")
PATCH_NUMS = Setting(None, "sides of the token maps of all scales, coarse to fine, instead of the recipe's", type=int,
                     metavar="N", options={"nargs": "+"})
VQ = derive(
    COMMON, epochs=40, batch_size=128, schedule="const", wd=0.0, clip=1.0, ema=0.9999, dtype="bf16",
    model=Setting("vae_ch160v4096z32"),
    size=Setting(256, "side of the pictures in pixels", 1, 8192),
    zoom=Setting((1.125, 1.125)),               # the shorter edge is resized to this times the size, then cut
    flip=Setting(False),                        # mirror half of the pictures
    captions=Setting(False),
    l1=Setting(0.0, "weight of the absolute error", 0),
    l2=Setting(1.0, "weight of the squared error", 0),
    lpips_weight=Setting(1.0, "weight of LPIPS", 0),
    kl_weight=Setting(0.0, "weight of the KL divergence per number of a picture, of autoencoders", 0),
    disc_weight=Setting(0.5, "weight of the adversarial loss", 0),
    disc_start=Setting(20000, "first step of the discriminator", 0),
    disc=choice("patch", ["patch", "style"], "PatchGAN's discriminator, or StyleGAN2's"),
    gan=choice("hinge", ["hinge", "vanilla", "non-saturating", "non-saturating-swapped"],
               "adversarial loss; the last is LlamaGen's, whose arguments are exchanged"),
    adaptive=Setting(True),                     # scale the adversarial gradient to the reconstruction's
    lpips=file("torchvision's vgg16 weights, and the linear heads of LPIPS", ("VGG16", "HEADS"), nargs=2),
    init=file("start from this tokenizer"),
    evaluate=EVALUATE,
    decoder_only=switch("with --init: train the decoder alone; tokens stay as they are"),
    patch_nums=PATCH_NUMS,
    warm_steps=Setting(0, "steps without quantization before the codebook is initialised (with --init none)", 0),
    restart_after=Setting(1000, "restart codes that were unused for this number of steps; 0: never", 0),
    restart_until=Setting(0.7),                 # share of the steps after which no code is restarted
)
EMOJI = dict(size=32, epochs=0, lr=1e-3, schedule="lin00", final_lr=0.01, betas=(0.9, 0.99), clip=2.0, ema=0.0,
             dtype="fp32", batch_size=16, l1=1.0, lpips_weight=0.0, disc_weight=0.0, disc_start=0)
VQ_EMOJI = derive(VQ, **EMOJI | dict(batch_size=8, lr=7e-4), model="emoji_vq", steps=19000, warm_steps=600,
                  restart_after=600)
VQ_BITS = derive(VQ, restart_after=0)                                       # bits have no codebook that could collapse
# LlamaGen's optimizer is Adam, whose weight decay is ignored. Its codes have length 1 and need no restarts.
VQ_SINGLE = derive(VQ, adaptive=False, restart_after=0, ema=0.0, warmup=0.0, zoom=(1.0, 1.25), flip=True)
# LatentSync's autoencoder was trained by the authors of latent diffusion. Rate and KL weight are theirs.
KL = derive(VQ, model="sd-vae-ft-mse", l1=1.0, l2=0.0, lr=4.5e-6, kl_weight=1e-6, disc_start=50000)

VQ_RECIPES = {
    "emoji": VQ_EMOJI,
    "imagenet": VQ,
    "infinity_emoji": derive(VQ, **EMOJI, model="emoji_bsq", steps=9000, restart_after=0),
    **{f"infinity_d{d}": derive(VQ_BITS, model=f"infinity_vae_d{d}") for d in (16, 24, 32, 64)},
    "infinity_d56": derive(VQ_BITS, model="infinity_vae_d56_f8_14_patchify"),
    "llamagen_emoji": derive(VQ, **EMOJI, model="emoji_vq_single", steps=8500, warm_steps=300, restart_after=300),
    "llamagen_ds16": derive(VQ_SINGLE, model="vq_ds16_c2i"),
    "llamagen_ds8": derive(VQ_SINGLE, model="vq_ds8_c2i"),
    "llamagen_ds16_t2i": derive(VQ_SINGLE, model="vq_ds16_t2i", disc_start=0),          # continues ds16, with --init
    "talking_head": derive(KL, **EMOJI | dict(size=64, batch_size=8, lr=2e-3, ema=0.998), model="talking_head_kl",
                           steps=3500, kl_weight=1e-3, warm_steps=300, restart_after=300),
    "kl": KL,
}

# VAR

LORA = dict(
    lora=Setting(0, "freeze the weights of --init, and learn changes of this rank only (LoRA)", 0, 2**16,
                 metavar="RANK"),
    lora_alpha=Setting(None, "the changes count alpha / rank times; default: the rank", 0, type=float, metavar="A"),
    quantize=choice(None, ["int8"], "with --lora: the frozen linear layers as 8-bit integers; with --evaluate: all"),
    lora_layers=Setting(("qkv", "proj", "fc1", "fc2"), "last names of the linear layers that learn", type=str,
                        metavar="NAME", options={"nargs": "+"}),
)
GENERATOR = derive(                             # what the three transformers have in common
    COMMON, model=Setting(""), size=VQ["size"], zoom=VQ["zoom"], flip=VQ["flip"],
    captions=Setting(False),                    # text instead of classes
    views=Setting(1),                           # of a picture of the demo, in which it is a little moved and scaled
    styles=Setting(()),                         # of the demo's pictures; none: all
    most_pictures=Setting(0),                   # of the demo, spread over all; 0: all
    vae=file("the trained tokenizer; recipes of the demo have one", flags=("--vae", "--vq")),
    init=file("start from these weights, such as those of another stage; the number of classes may differ"),
    evaluate=EVALUATE, **LORA,
    sampling=Setting({}),                       # settings that sample.py uses with the model by default
    show=Setting(()),                           # classes or prompts that sample.py draws; none: spread over all classes
)
INIT_GAMMA = Setting(1e-3, "scale of the AdaLN gates at the start", 0, 100)
CACHE_CROPS = Setting("0", "tokenize N crops of each picture before training (1: its centre); 0: tokenize in each step",
                      type=str, metavar="N")
T5 = file("folder of the frozen text encoder; without it a small T5 on words is trained along", "DIR")

INIT_TEXT = file("start the text encoder that is trained along from this file of train.py t5; recipes of the demo have "
                 "one")

VAR = derive(
    GENERATOR, batch_size=768, lr=3e-4, dtype="fp16", sampling=dict(cfg=4.0, top_k=900, top_p=0.95),
    init_gamma=INIT_GAMMA, cache_crops=CACHE_CROPS,
    depth=Setting(None, "number of blocks instead of the recipe's; width and heads grow with it", 1, 100, type=int),
    patch_nums=PATCH_NUMS,
    scaling_laws=switch("the paper's experiment in small: train models of several depths and fit their losses as "
                        "powers of their sizes; writes a table and a picture"),
)
VAR_LARGE = derive(VAR, epochs=350, lr=2.4e-4, final_lr=0.01)
SHOWN_CLASSES = ("noto/smiling", "twemoji/cat-faces", "twemoji/hearts", "fluent-flat/shapes-colors", "twemoji/time",
                 "noto/zodiac-signs", "noto-v1/concerned", "emojione/smiling", "noto/fruit", "fluent/people",
                 "fluent/smiling", "noto/people", "fluent/arrows", "fluent/fruit", "noto/with-tongue",
                 "fluent-flat/hearts")
VAR_EMOJI = derive(
    VAR, model="emoji_var", vae=str(DEMO / "emoji_vq.safetensors"), size=32, epochs=0, steps=8500, batch_size=16,
    lr=1e-3, init_gamma=0.1, ema=0.998, dtype="fp32", cache_crops="8", sampling=dict(cfg=3.0, top_k=0, top_p=0.6),
    show=SHOWN_CLASSES,
)
VAR_RECIPES = {
    "emoji": VAR_EMOJI,
    "ladder": derive(VAR_EMOJI, steps=2000, lr=8e-4, warmup=0.1, cache_crops="2"),     # for --scaling-laws
    "d16": derive(VAR, model="var_d16", epochs=200),
    "d20": derive(VAR, model="var_d20", epochs=250),
    "d24": derive(VAR_LARGE, model="var_d24", init_gamma=1e-4),
    "d30": derive(VAR_LARGE, model="var_d30", batch_size=1024, lr=3.2e-4, init_gamma=1e-5, wd_end=0.08),
    "d36": derive(VAR_LARGE, model="var_d36", size=512, init_gamma=5e-6, wd_end=0.08),
}

# Infinity. The authors' script has a base rate of 6e-3, which users found far too high. Steps and rates are the
# paper's, as far as it gives them.

SHORT_CAPTIONS = Setting(0.5, "share of pictures that get the short one of their captions", 0, 1)
INFINITY = derive(
    GENERATOR, steps=190000, batch_size=4096, lr=2e-4, warmup=0.0, final_lr=1.0, wd=0.005, betas=(0.9, 0.97), clip=5.0,
    dtype="bf16", checkpointing=True, captions=True, sampling=dict(cfg=3.0, tau=0.5, top_k=0, top_p=0.97),
    init_gamma=replace(INIT_GAMMA, default=5e-6),
    pixels=Setting("0.06M", "size of all pictures, whatever their aspect: 0.06M, 0.25M, 0.60M or 1M", type=str,
                   metavar="SIZE"),
    strength=Setting(0.3, "bitwise self-correction: largest probability of a flipped bit; 0: none", 0, 1),
    reweight=yes_no(False, "weigh the tokens of coarse scales more"),
    scales=Setting(0, "train only this number of scales, coarse ones first; 0: all", 0),
    short_captions=SHORT_CAPTIONS, t5=T5, init_text=INIT_TEXT,
)
SHOWN_PROMPTS = ("fluent style, mouse face", "noto style, red heart", "twemoji style, crying cat",
                 "fluent-flat style, rocket", "noto-v1 style, green apple", "emojione style, sunflower",
                 "twemoji style, mushroom", "fluent style, smiling face with sunglasses")
NEW_STYLE = "fluent"
FIVE_STYLES = ("noto", "noto-v1", "fluent-flat", "twemoji", "emojione")
INFINITY_EMOJI = derive(
    INFINITY, model="emoji_infinity", vae=str(DEMO / "emoji_bsq.safetensors"), size=32, pixels=None, steps=9500,
    batch_size=16, lr=1e-3, warmup=0.02, final_lr=0.02, clip=2.0, ema=0.998, dtype="fp32", strength=0.02, reweight=True,
    init_gamma=0.1, checkpointing=False, init_text=str(DEMO / "emoji_t5.safetensors"), show=SHOWN_PROMPTS,
    views=1000, sampling=dict(cfg=4.0, tau=0.5, top_k=0, top_p=0.97),
)
INFINITY_RECIPES = {                            # each stage of the larger models starts from the last, with --init
    "emoji": INFINITY_EMOJI,
    # What LoRA is for: "five" has never seen the style that "new_style" learns from 50 pictures.
    "emoji_five": derive(INFINITY_EMOJI, styles=FIVE_STYLES, steps=4500),
    "emoji_new_style": derive(INFINITY_EMOJI, styles=(NEW_STYLE,), most_pictures=50, lora=8, steps=400, lr=1e-3,
                              init=str(DEMO / "emoji_infinity_five.safetensors"), init_text=None),
    "125M": derive(INFINITY, model="infinity_125M"),
    "2B_256": derive(INFINITY, model="infinity_2b"),
    "2B_512": derive(INFINITY, model="infinity_2b", pixels="0.25M", steps=110000),
    "2B_1024": derive(INFINITY, model="infinity_2b", pixels="1M", steps=60000, lr=2e-5),
    "8B_512": derive(INFINITY, model="infinity_8b", pixels="0.25M", steps=110000),
    "8B_1024": derive(INFINITY, model="infinity_8b", pixels="1M", steps=60000, lr=2e-5),
}

# LlamaGen

LLAMAGEN = derive(
    GENERATOR, epochs=300, batch_size=256, schedule="const", warmup=0.0, clip=1.0, dtype="bf16",
    sampling=dict(cfg=4.0, top_k=2000, top_p=1.0, temperature=1.0),
    cache_crops=replace(CACHE_CROPS, default="ten", help=CACHE_CROPS.help + "; ten: ten crops of each of two sizes, as "
                        "the authors did; flip: the centre and its mirror image", metavar="N|ten|flip"),
    dropout=Setting(0.1, "of embeddings and branches", 0, 0.9),
    short_captions=replace(SHORT_CAPTIONS, default=0.3),
    pixels=Setting(None),                       # pictures are squares
    text_width=Setting(2048),                   # width of the features of --t5
    t5=T5,
    clean=yes_no(True, "clean captions for T5 as the authors did (needs ftfy and beautifulsoup4)"),
    init_text=INIT_TEXT,
)
LLAMAGEN_TEXT = derive(LLAMAGEN, cache_crops="1", epochs=0, steps=200000, captions=True,    # no length is published
                       sampling=dict(cfg=7.5, top_k=1000, top_p=1.0, temperature=1.0))
LLAMAGEN_EMOJI = dict(
    vae=str(DEMO / "emoji_vq_single.safetensors"), size=32, epochs=0, steps=5500, batch_size=16, lr=1e-3,
    schedule="lin0", warmup=0.02, final_lr=0.02, clip=2.0, ema=0.998, dtype="fp32", cache_crops="8", dropout=0.1,
    sampling=dict(cfg=4.0, top_k=0, top_p=0.8, temperature=1.0),
)
LLAMAGEN_SHOWN = ("fluent-flat/smiling", "noto-v1/concerned", "emojione/hearts", "twemoji/arrows", "noto/people",
                  "fluent/smiling", "twemoji/fruit", "emojione/with-tongue", "noto/concerned", "fluent/hearts",
                  "twemoji/smiling", "fluent/time", "noto-v1/people", "emojione/arrows", "noto-v1/with-tongue",
                  "noto-v1/hearts")
LLAMAGEN_SIZES = (("B", 256), ("L", 256), ("B", 384), ("L", 384), ("XL", 384), ("XXL", 384), ("3B", 384))
LLAMAGEN_RECIPES = {
    "emoji": derive(LLAMAGEN, **LLAMAGEN_EMOJI, model="emoji_llamagen", show=LLAMAGEN_SHOWN),
    "emoji_text": derive(LLAMAGEN_TEXT, **LLAMAGEN_EMOJI | dict(
        steps=13000, model="emoji_llamagen_t2i", init_text=str(DEMO / "emoji_t5.safetensors"), show=SHOWN_PROMPTS,
        sampling=dict(cfg=6.0, top_k=0, top_p=0.5, temperature=1.0))),
    **{f"{size}_{pixels}": derive(LLAMAGEN, model=f"c2i_{size}_{pixels}", size=pixels)
       for size, pixels in LLAMAGEN_SIZES},
    "t2i_stage1": derive(LLAMAGEN_TEXT, model="t2i_XL_stage1_256"),         # stage 2 starts from it, with --init
    "t2i_stage2": derive(LLAMAGEN_TEXT, model="t2i_XL_stage2_512", size=512, steps=50000),
}

# SyncNet, with the authors' rate, clipping and precision. The paper recommends 1024 pairs per step. How long they
# trained is not known.

VIDEOS = Setting(600, "number of synthetic heads for --data demo (about 1.5 MB of memory each)", 1)
SYNCNET = derive(
    COMMON, steps=50000, batch_size=1024, lr=1e-5, schedule="const", warmup=0.0, wd=0.01, betas=(0.9, 0.999), clip=1.0,
    dtype="fp16",
    model=Setting("16_pixel_attn", "a network of syncnet.CONFIGS; talking_head_plain is Wav2Lip's kind",
                  metavar="NAME"),
    init=file("start from these weights"),
    frames=Setting(None, "frames of a clip", 1, 1000, type=int),
    embedding=Setting(None, "length of the embeddings", 1, 10**5, type=int),
    attention=yes_no(None, "--no-attention: residual blocks alone"),
    moments=Setting(1, "K clips of each video in a batch, whose K * K pairs all count; 1: one pair, as in the paper",
                    1, metavar="K"),
    contrast_steps=Setting(0, "with --moments: first steps with a contrastive loss, which has no plateau", 0),
    audio_offset=Setting(0, "spoil the data: shift the sound of each video, by at most this number of frames", 0,
                         metavar="FRAMES"),
    unaligned=switch("spoil the synthetic videos: head and camera move"),
    videos=replace(VIDEOS, default=800),
    val_pairs=Setting(2048, "pairs to validate with", 1),
    evaluate=file("do not train: how well does this network do on unseen videos?"),
    study=switch("the paper's study in small: short runs with other batches, clips, networks and data; writes a table "
                 "and a picture"),
)
SYNCNET_HEADS = derive(SYNCNET, model="talking_head", steps=3000, batch_size=4, lr=1e-3, schedule="lin00", warmup=0.02,
                       final_lr=0.02, dtype="fp32", ema=0.998, val_pairs=800, moments=8, contrast_steps=300)
SYNCNET_RECIPES = {
    "talking_head": SYNCNET_HEADS,
    "study": derive(SYNCNET_HEADS, steps=100, batch_size=3, moments=4, contrast_steps=40, val_pairs=160, videos=240,
                    ema=0.0),
    **{name: derive(SYNCNET, model=name) for name in ("16_pixel_attn", "16_pixel", "25_pixel", "5_pixel_wav2lip")},
}

# Stand-ins of the demo for networks that others trained: an audio encoder, TREPA's video encoder, and a text encoder

STAND_IN = derive(COMMON, schedule="lin00", final_lr=0.02, clip=1.0, ema=0.99, model=Setting("talking_head"))
T5_WORDS = derive(STAND_IN, steps=1500, batch_size=64, lr=1e-3, model="words")
WHISPER = derive(STAND_IN, steps=2000, lr=2e-3, videos=replace(VIDEOS, help="number of synthetic voices"))
VIDEOMAE = derive(STAND_IN, steps=1000, batch_size=8, lr=1e-3, videos=replace(VIDEOS, default=400))

# LatentSync. The authors trained stage 1 for 14 days on 8 H100, stage 2 for one or two. The batch is that of all 8.

LATENTSYNC = derive(
    COMMON, **LORA, steps=200000, batch_size=192, lr=1e-5, schedule="const", warmup=0.0, wd=0.01, betas=(0.9, 0.999),
    clip=1.0, dtype="fp16", checkpointing=True,
    model=Setting("latentsync_1.5"),
    stage=choice("1", ["1", "2", "2-efficient"], "1: the UNet without motion modules, on the noise loss; 2: attention "
                 "and motion modules, also on the decoded pixels; 2-efficient: fewer of them, without TREPA"),
    vae=file("the autoencoder; with --data demo: the demo's"),
    whisper=file("the audio encoder; with --data demo: the demo's"),
    syncnet=file("a StableSyncNet, for stage 2 and for validation; with --data demo: the demo's"),
    judge=file("the SyncNet for validation, such as syncnet_v2.model for Sync-C; default: that of --syncnet"),
    videomae=file("the video encoder of TREPA, for stage 2; with --data demo: the demo's"),
    lpips=VQ["lpips"],
    init=file("start from these weights: a released file, or those of stage 1"),
    stable_diffusion=file("start from the UNet of Stable Diffusion 1.5", "DIR"),
    frames=Setting(16, "frames of a clip", 1, 1000),
    drop_audio=Setting(0.0, "share of clips without sound, which trains the branch that guidance compares with", 0, 1),
    sync_weight=Setting(0.0, "weight of SyncNet's loss, in stage 2; 0: without it", 0),
    trepa_weight=Setting(0.0, "weight of TREPA, in stage 2; 0: without it", 0),
    lpips_weight=Setting(0.0, "weight of LPIPS, in stage 2; 0: without it", 0),
    videos=VIDEOS,
    val_videos=Setting(8, "videos that every validation repaints and scores", 1),
    val_clips=Setting(3),                       # clips of 16 frames of each of them
    sampling=Setting(dict(cfg=1.5)),
    cache=file("where features of the sound are kept; default: in --data", "DIR"),
    study=switch("stage 2 on the synthetic heads three times: without SyncNet, with it, and with TREPA as well; writes "
                 "a table and pictures"),
    prepare=file("do not train: make aligned clips of the videos in RAW_DIR and write them to --data, in --workers "
                 "processes; an interrupted run continues", "RAW_DIR"),
    min_face=Setting(None, "leave out smaller faces, in pixels; default: the size of the clips", 1, type=int),
    min_confidence=Setting(None, "leave out clips with a lower confidence of --syncnet; default: 3, with a "
                           "StableSyncNet 0.3", -10**6, type=float),
    max_offset=Setting(None, "leave out clips whose sound is off by more frames (default 6)", 0, 15, type=int),
    quality=file("leave out clips that this function gives less than --min-quality; it gets three frames, uint8 "
                 "(h, w, 3)", "MODULE:FUNCTION"),
    min_quality=Setting(None, "default 40, the authors' for hyperIQA", -10**6, type=float),
    piece=Setting(5, "length of the clips; the last of a shot may be up to twice as long (default 5)", 2,
                  metavar="SECONDS"),
)
LATENTSYNC["lora_layers"] = replace(LORA["lora_layers"], default=("qkv", "query", "key_value", "proj"))
STAGE2 = dict(steps=20000, batch_size=32, sync_weight=0.05, trepa_weight=10.0, lpips_weight=0.1)
# Without weights of VGG there is no LPIPS in the demo. Its video encoder sees differences between two clips of 1e-6 to
# 1e-5 only; with this weight the gradient of TREPA at the pixels is about as large as that of the noise loss.
STAGE2_HEADS = dict(steps=700, batch_size=1, lr=3e-4, frames=16, drop_audio=0.1, sync_weight=0.05, trepa_weight=2000.0,
                    ema=0.99)
LATENTSYNC_RECIPES = {
    "talking_head": derive(LATENTSYNC, model="talking_head", steps=2800, batch_size=4, lr=1e-3, schedule="lin00",
                           warmup=0.02, final_lr=0.02, ema=0.998, dtype="fp32", frames=4, checkpointing=False,
                           val_videos=3, sampling=dict(cfg=1.0)),
    "256": LATENTSYNC,
    "512": derive(LATENTSYNC, model="latentsync_1.6", batch_size=64),
}

RECIPES = {"vq": VQ_RECIPES, "var": VAR_RECIPES, "infinity": INFINITY_RECIPES, "llamagen": LLAMAGEN_RECIPES,
           "syncnet": SYNCNET_RECIPES, "whisper": {"talking_head": WHISPER}, "videomae": {"talking_head": VIDEOMAE},
           "t5": {"emoji": T5_WORDS},
           "latentsync": LATENTSYNC_RECIPES}
RECIPE_NAMES = {name for recipes in RECIPES.values() for recipe in recipes.values() for name in recipe}
CLASSES = "a folder with one folder of pictures per class"
CAPTIONS = "*.tsv or *.jsonl files with captions"
FACES = "videos of aligned faces, with sound"
DATA = {"infinity": f"a folder of {CAPTIONS}, which end at --", "llamagen": f"{CLASSES}, or of {CAPTIONS}",
        "syncnet": f"a folder of {FACES}", "latentsync": f"a folder of {FACES} (see --prepare)"}
HEAD_COMPANIONS = {"vae": "talking_head_kl", "whisper": "talking_head_whisper", "syncnet": "talking_head_syncnet",
                   "videomae": "talking_head_videomae"}                     # flag of latentsync -> file in demo/


def add_flags(parser, model):
    """Add a flag for every setting of a model's recipes. A flag that is not given has the value None."""
    recipes = RECIPES[model]
    parser.add_argument("--recipe", choices=recipes,
                        help=f"named settings, default {next(iter(recipes))}; flags below override them")
    for name, setting in next(iter(recipes.values())).items():
        text = setting.help
        if name == "data":
            text = f"{DATA.get(model, CLASSES)}, or 'demo' (default)"
        if not text:
            continue
        options = dict(setting.options)
        if setting.metavar:
            options["metavar"] = setting.metavar
        if "action" not in options and "choices" not in options:
            options["type"] = setting.type or type(setting.default)
        flags = setting.flags or [f"--{name.replace('_', '-')}"]
        parser.add_argument(*flags, dest=name, default=None, help=text, **options)


def contradiction(args):
    """What is wrong with a combination of parsed flags, of which those that were not given are None; or None."""
    given = {name: value for name, value in vars(args).items() if value not in (None, False)}

    def flags(names):
        return ", ".join(f"--{name.replace('_', '-')}" for name in names)
    empty = [name for name, value in given.items() if value == ""]
    if empty:
        return f"{flags(empty)}: an empty text is no value; leave the flag out, or give one"
    instead = [name for name in INSTEAD_OF_TRAINING if name in given]
    if len(instead) > 1:
        return f"{flags(instead)}: each of these runs instead of training; give one of them"
    if given.get("steps") and given.get("epochs"):
        return "--steps, --epochs: both say how long to train; give one of them"
    if "t5" in given and "init_text" in given:
        return "--t5, --init-text: a frozen text encoder, and one that is trained along; give one of them"
    if "override" in given and given.get("resume") != "auto":
        return "--override: goes with --resume auto"
    unknown = [name for name in given.get("override", []) if name.replace("-", "_") not in RECIPE_NAMES]
    if unknown:
        return f"--override {unknown[0]}: no setting of that name"
    lonely = [name for name in OF_PREPARE if name in given]
    if lonely and "prepare" not in given:
        return f"{flags(lonely)}: goes with --prepare"
    if "val_data" in given and given.get("data", "demo") == "demo":
        return "--val-data: goes with --data; the demo's data have a validation part of their own"
    return None


def fill(args):
    """Parsed flags -> a Namespace with a value for every setting: the flag's, else the recipe's."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    model = args.model_name
    recipe_name = given.get("recipe", next(iter(RECIPES[model])))
    changes = {}
    if "out" not in given:
        changes["out"] = f"runs/{model}"
    if "epochs" in given and "steps" not in given:
        changes["steps"] = 0                                                # the recipe's steps do not count then
    if model == "vq" and "init" in given and "warm_steps" not in given:
        changes["warm_steps"] = 0                                           # its codes must not be initialised again
    if model == "syncnet" and "study" in given:
        recipe_name = "study"
    if model == "var" and "scaling_laws" in given:
        recipe_name = given.get("recipe", "ladder")
    if model == "latentsync":
        if "prepare" in given:
            recipe_name = given.get("recipe", "256")
        stage = "2" if "study" in given else given.get("stage", "1")
        changes["stage"] = stage
        if stage != "1":
            changes |= STAGE2_HEADS if recipe_name == "talking_head" else STAGE2
        if stage == "2-efficient":
            changes["trepa_weight"] = 0.0
        if given.get("data", "demo") == "demo":
            for flag, file in HEAD_COMPANIONS.items():
                if stage != "1" or flag != "videomae":
                    changes[flag] = str(DEMO / f"{file}.safetensors")
    defaults = {name: setting.default for name, setting in RECIPES[model][recipe_name].items()}
    values = defaults | changes | given | {"recipe": recipe_name}
    if "study" in given and model == "latentsync":
        values["stage"] = "2"                                               # whose parts the study compares
    return argparse.Namespace(**values)


def out_of_range(args):
    """Rows (flag, value, lowest, highest) of all settings with a range, for console.check_ranges."""
    rows = []
    for name, setting in RECIPES[args.model_name][args.recipe].items():
        if setting.low is not None:
            rows.append((f"--{name.replace('_', '-')}", getattr(args, name), setting.low, setting.high))
    return rows


def compared(args):
    """What a continued run must have the same, {setting: value}; the data and files are compared by their content."""
    return {name: value for name, value in vars(args).items() if name not in MAY_DIFFER}
