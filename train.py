"""Train every part: one flat loop, one file.

    python train.py vq                              the demo tokenizer, on the emoji sheet; under an hour on two cores
    python train.py var --vae runs/vq/model.safetensors
    python train.py infinity --vae demo/emoji_bsq.safetensors       text -> emoji, a byte-level T5 trained along
    python train.py vq  --recipe imagenet --data DIR --lpips vgg16.pth vgg_lpips.pth
    python train.py var --recipe d16 --data DIR --vae vae_ch160v4096z32.pth
    torchrun --nproc-per-node 8 train.py var ...    data parallel

    python train.py llamagen --vae demo/emoji_vq_single.safetensors         class -> emoji, token by token
    python train.py infinity --recipe 2B_256 --data DIR --vae infinity_vae_d32reg.pth --t5 flan-t5-xl

DIR holds one folder of pictures per class; for text *.tsv files (picture path, caption) or the originals' *.jsonl, and
pictures of all aspect ratios. A run writes into --out: model.safetensors (what sample.py takes), state/ (what --resume
auto continues from, on a CPU bit for bit, or with another number of processes), log.csv, curves.png and samples/.
Every write is atomic.
"""
import argparse
import sys

# What the papers trained with, and the demo. Flags of the same name override an entry. lr is for the whole batch (the
# papers' base lr * batch / 256); warmup is a share of the steps; final_lr is relative to lr; wd_end 0 means like wd.
COMMON = dict(
    epochs=0, steps=0, accum=1, lr=1e-4, schedule="lin0", warmup=0.02, warmup_from=0.005, final_lr=0.1,
    wd=0.05, wd_end=0.0, betas=(0.9, 0.95), clip=2.0, ema=0.0, dtype="fp32", captions=False, zoom=(1.125, 1.125),
    flip=False,
)
# VAR's authors released no tokenizer recipe. "imagenet" is ours, near LlamaGen's: its batch, rate and discriminator.
VQ = COMMON | dict(
    model="vae_ch160v4096z32", size=256, epochs=40, batch_size=128, schedule="const", wd=0.0, clip=1.0, ema=0.9999,
    dtype="bf16", l1=0.0, l2=1.0, lpips_weight=1.0, disc_weight=0.5, disc_start=20000, adaptive=True, gan="hinge",
    disc="patch", warm_steps=0, restart_after=1000, restart_until=0.7,
)
VQ_EMOJI = dict(
    model="emoji_vq", size=32, epochs=0, steps=5000, batch_size=16, lr=1e-3, schedule="lin00", final_lr=0.01,
    betas=(0.9, 0.99), clip=2.0, ema=0.0, dtype="fp32", l1=1.0, lpips_weight=0.0, disc_weight=0.0, disc_start=0,
    warm_steps=300, restart_after=300,
)
VQ_BITS = VQ | dict(warm_steps=0, restart_after=0)                          # bits need no care of a codebook
# LlamaGen's. Its optimizer is Adam, whose weight decay is ignored; its codes on the unit sphere need no restarts
VQ_SINGLE = VQ | dict(adaptive=False, restart_after=0, ema=0.0, warmup=0.0, zoom=(1.0, 1.25), flip=True)
# An autoencoder for latent diffusion: LatentSync's was trained by others. kl_weight: of the divergence per number of a
# picture; the rate is that of latent diffusion's authors
KL = VQ | dict(model="sd-vae-ft-mse", l1=1.0, l2=0.0, lr=4.5e-6, kl_weight=1e-6, lpips_weight=1.0, disc_start=50000)
# init_gamma: scale of the AdaLN gates at the start; sampling, show: what sample.py does with the model by default, its
# settings and its classes (none: spread over all)
VAR = COMMON | dict(
    size=256, batch_size=768, lr=3e-4, init_gamma=1e-3, dtype="fp16", cache_crops="0",
    sampling=dict(cfg=4.0, top_k=900, top_p=0.95), show=(),
)
LARGE = dict(epochs=350, lr=2.4e-4, final_lr=0.01)
VAR_EMOJI = dict(
    model="emoji_var", size=32, epochs=0, steps=4800, batch_size=16, lr=1e-3, init_gamma=0.1, ema=0.998, dtype="fp32",
    cache_crops="1", sampling=dict(cfg=1.5, top_k=0, top_p=0.5),
    show=("face-smiling", "cat-face", "heart", "face-hat", "animal-reptile", "food-fruit", "person", "place-map",
          "face-tongue", "mail", "award-medal", "time", "country-flag", "animal-amphibian", "face-glasses", "money"),
)
# The script of the authors has a base rate of 6e-3, which users found far too high; steps and rates are the paper's as
# far as they are known. strength: of bitwise self-correction; shares of dropped text and paths: see infinity.Config
INFINITY = COMMON | dict(
    pixels="0.06M", steps=190000, batch_size=4096, lr=2e-4, schedule="lin0", warmup=0.0, final_lr=1.0, wd=0.005,
    betas=(0.9, 0.97), clip=5.0, dtype="bf16", strength=0.3, reweight=False, init_gamma=5e-6, short_captions=0.5,
    checkpointing=True, sampling=dict(cfg=3.0, tau=0.5, top_k=0, top_p=0.97), show=(), captions=True,
)
INFINITY_EMOJI = dict(
    model="emoji_infinity", size=32, pixels=None, steps=5000, batch_size=16, lr=1e-3, warmup=0.02, final_lr=0.02,
    clip=2.0, ema=0.998, dtype="fp32", strength=0.02, reweight=True, init_gamma=0.1, checkpointing=False,
    show=("grinning cat face", "red apple", "green heart", "french fries", "smiling face with sunglasses",
          "pouting cat face", "blue heart", "broken heart"),
)
# cache_crops: how pictures are tokenized before training: "ten" crops of each of two sizes as by the authors, a number
# of random ones (1: the centre), or 0: anew in every step
LLAMAGEN = COMMON | dict(
    size=256, epochs=300, batch_size=256, lr=1e-4, schedule="const", warmup=0.0, clip=1.0, dtype="bf16",
    cache_crops="ten", dropout=0.1, short_captions=0.3, pixels=None, text_width=2048, captions=False,
    sampling=dict(cfg=4.0, top_k=2000, top_p=1.0, temperature=1.0), show=(),
)
LLAMAGEN_TEXT = LLAMAGEN | dict(cache_crops="1", epochs=0, steps=200000, captions=True,     # no length is published
                                sampling=dict(cfg=7.5, top_k=1000, top_p=1.0, temperature=1.0))
LLAMAGEN_EMOJI = dict(
    size=32, epochs=0, steps=2600, batch_size=32, lr=1e-3, schedule="lin0", warmup=0.02, final_lr=0.02, clip=2.0,
    ema=0.998, dtype="fp32", cache_crops="1", dropout=0.0,
    sampling=dict(cfg=1.5, top_k=0, top_p=0.8, temperature=1.0),
)
# The authors' rate, clipping and precision; the paper recommends 1024 pairs a step. How long they trained is not known
SYNCNET = COMMON | dict(
    model="16_pixel_attn", steps=50000, batch_size=1024, lr=1e-5, schedule="const", warmup=0.0, wd=0.01,
    betas=(0.9, 0.999), clip=1.0, dtype="fp16", val_pairs=2048, moments=1, contrast_steps=0, videos=800,
)
SYNCNET_HEADS = dict(
    model="talking_head", steps=3000, batch_size=4, lr=1e-3, schedule="lin00", warmup=0.02, final_lr=0.02,
    dtype="fp32", ema=0.998, val_pairs=800, moments=8, contrast_steps=300,
)
# The demo's stand-ins for networks that others trained: an ear, and the video encoder of TREPA
WHISPER = COMMON | dict(
    model="talking_head", steps=2000, batch_size=16, lr=2e-3, schedule="lin00", final_lr=0.02, clip=1.0, ema=0.99,
    videos=600,
)
VIDEOMAE = COMMON | dict(
    model="talking_head", steps=1000, batch_size=8, lr=1e-3, schedule="lin00", final_lr=0.02, clip=1.0, ema=0.99,
    videos=400,
)
# The authors': stage 1 takes 14 days on 8 H100, stage 2 one or two. The batch is that of all 8. frames: of a clip;
# val_clips: clips of 16 frames of each of val_videos that are painted and judged with every validation
LATENTSYNC = COMMON | dict(
    model="latentsync_1.5", steps=200000, batch_size=192, lr=1e-5, schedule="const", warmup=0.0, wd=0.01,
    betas=(0.9, 0.999), clip=1.0, dtype="fp16", videos=600, frames=16, checkpointing=True, drop_audio=0.0,
    sync_weight=0.0, trepa_weight=0.0, lpips_weight=0.0, val_clips=3, val_videos=8, sampling=dict(cfg=1.5),
    stages={"1": {}, "2": (stage2 := dict(steps=20000, batch_size=32, sync_weight=0.05, trepa_weight=10.0,
                                          lpips_weight=0.1)),
            "2-efficient": stage2 | dict(trepa_weight=0.0)},
)
# Without weights of VGG there is no LPIPS in the demo. What its own video encoder says of two clips differs by 1e-6 to
# 1e-5 only; with this weight the pixels feel about as much of TREPA as of the noise loss
HEADS2 = dict(steps=700, batch_size=1, lr=3e-4, frames=16, drop_audio=0.1, sync_weight=0.05, trepa_weight=2000.0,
              ema=0.99, sampling=dict(cfg=1.0), checkpointing=False)
LATENTSYNC_HEADS = LATENTSYNC | dict(
    model="talking_head", steps=2800, batch_size=4, lr=1e-3, schedule="lin00", warmup=0.02, final_lr=0.02, ema=0.998,
    dtype="fp32", frames=4, checkpointing=False, val_videos=3, sampling=dict(cfg=1.0),
    stages={"1": {}, "2": HEADS2, "2-efficient": HEADS2 | dict(trepa_weight=0.0)},
)
RECIPES = {
    "vq": {
        "emoji": VQ | VQ_EMOJI,
        "imagenet": VQ,
        "infinity_emoji": VQ_BITS | VQ_EMOJI | dict(model="emoji_bsq", warm_steps=0, restart_after=0),
        **{f"infinity_d{d}": VQ_BITS | dict(model=f"infinity_vae_d{d}") for d in ("16", "24", "32", "64")},
        "infinity_d56": VQ_BITS | dict(model="infinity_vae_d56_f8_14_patchify"),
        "llamagen_emoji": VQ | VQ_EMOJI | dict(model="emoji_vq_single", steps=3600),
        "llamagen_ds16": VQ_SINGLE | dict(model="vq_ds16_c2i"),
        "llamagen_ds8": VQ_SINGLE | dict(model="vq_ds8_c2i"),
        "llamagen_ds16_t2i": VQ_SINGLE | dict(model="vq_ds16_t2i", disc_start=0),       # from the first, with --init
        "talking_head": KL | VQ_EMOJI | dict(model="talking_head_kl", size=64, steps=3500, batch_size=8, lr=2e-3,
                                             kl_weight=1e-3, ema=0.998),
        "kl": KL,
    },
    "var": {
        "emoji": VAR | VAR_EMOJI,
        "ladder": VAR | VAR_EMOJI | dict(steps=800, lr=8e-4, warmup=0.1),
        "d16": VAR | dict(model="var_d16", epochs=200),
        "d20": VAR | dict(model="var_d20", epochs=250),
        "d24": VAR | LARGE | dict(model="var_d24", init_gamma=1e-4),
        "d30": VAR | LARGE | dict(model="var_d30", batch_size=1024, lr=3.2e-4, init_gamma=1e-5, wd_end=0.08),
        "d36": VAR | LARGE | dict(model="var_d36", size=512, init_gamma=5e-6, wd_end=0.08),
    },
    "infinity": {                               # the stages of the larger ones: each starts with --init from the last
        "emoji": INFINITY | INFINITY_EMOJI,
        "125M": INFINITY | dict(model="infinity_125M"),
        "2B_256": INFINITY | dict(model="infinity_2b"),
        "2B_512": INFINITY | dict(model="infinity_2b", pixels="0.25M", steps=110000),
        "2B_1024": INFINITY | dict(model="infinity_2b", pixels="1M", steps=60000, lr=2e-5),
        "8B_512": INFINITY | dict(model="infinity_8b", pixels="0.25M", steps=110000),
        "8B_1024": INFINITY | dict(model="infinity_8b", pixels="1M", steps=60000, lr=2e-5),
    },
    "llamagen": {
        "emoji": LLAMAGEN | LLAMAGEN_EMOJI | dict(model="emoji_llamagen", show=VAR_EMOJI["show"]),
        "emoji_text": LLAMAGEN_TEXT | LLAMAGEN_EMOJI | dict(
            model="emoji_llamagen_t2i", steps=2800, show=(
                "red heart", "crying cat face", "green apple", "rocket", "sunflower", "french fries",
                "smiling face with sunglasses", "robot face")),
        **{f"{size}_{pixels}": LLAMAGEN | dict(model=f"c2i_{size}_{pixels}", size=pixels) for size, pixels in (
            ("B", 256), ("L", 256), ("B", 384), ("L", 384), ("XL", 384), ("XXL", 384), ("3B", 384))},
        "t2i_stage1": LLAMAGEN_TEXT | dict(model="t2i_XL_stage1_256"),      # the second starts with --init from it
        "t2i_stage2": LLAMAGEN_TEXT | dict(model="t2i_XL_stage2_512", size=512, steps=50000),
    },
    "syncnet": {
        "talking_head": SYNCNET | SYNCNET_HEADS,
        "study": SYNCNET | SYNCNET_HEADS | dict(steps=100, batch_size=3, moments=4, contrast_steps=40, val_pairs=160,
                                                videos=240, ema=0.0),
        **{name: SYNCNET | dict(model=name) for name in ("16_pixel_attn", "16_pixel", "25_pixel", "5_pixel_wav2lip")},
    },
    "whisper": {"talking_head": WHISPER},
    "videomae": {"talking_head": VIDEOMAE},
    "latentsync": {
        "talking_head": LATENTSYNC_HEADS,
        "256": LATENTSYNC,
        "512": LATENTSYNC | dict(model="latentsync_1.6", batch_size=64),
    },
}


def run_args(add, name, recipes):
    """Flags of every run."""
    add("--recipe", choices=recipes, help=f"named settings, default {next(iter(recipes))}; flags below override them")
    classes, captions = "one folder per class", "*.tsv or *.jsonl with captions"
    faces = "videos of aligned faces, with sound"
    holds = {"infinity": captions, "llamagen": f"{classes}, or {captions}", "syncnet": faces,
             "latentsync": f"{faces} (see --prepare)"}.get(name, classes)
    add("--data", default="demo", metavar="DIR", help=f"a folder of {holds}, or 'demo' (default)")
    add("--val-data", metavar="DIR", help="what is held out; default: every 20th of --data")
    add("--out", default=f"runs/{name}", metavar="DIR", help="default: runs/MODEL")
    add("--resume", choices=["no", "auto"], default="no", help="auto: continue the run in --out if there is one")
    add("--size", type=int, help="side of the pictures in pixels")
    add("--steps", type=int, help="optimizer steps (or --epochs)")
    add("--epochs", type=int)
    add("--batch-size", type=int, help="pictures per optimizer step, over all processes and --accum")
    add("--accum", type=int, help="backward passes per optimizer step")
    add("--lr", type=float, help="peak learning rate for the whole batch")
    add("--schedule", metavar="NAME", help="lin, lin0, lin00, lin0.8, cos, exp or const")
    add("--warmup", type=float, help="share of the steps")
    add("--final-lr", type=float, help="last learning rate / peak")
    add("--wd", type=float, help="weight decay at the start")
    add("--wd-end", type=float, help="and at the end (0: the same)")
    add("--clip", type=float, help="largest global gradient norm")
    add("--ema", type=float, help="decay of the weight average that is exported; 0: none")
    add("--dtype", choices=["fp32", "bf16", "fp16"])
    add("--save-dtype", choices=["fp32", "bf16", "fp16", "fp8"], default="fp32", help="of model.safetensors")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=4, help="processes that read pictures")
    add("--shuffle", type=int, default=10000, metavar="N", help="size of the shuffle buffer for data in tar files")
    add("--compile", action="store_true", help="torch.compile for the blocks of the model")
    add("--fsdp", action="store_true", help="under torchrun: every process keeps a share of the weights and of the "
        "optimizer's numbers (FSDP2), for models that one GPU cannot train; otherwise each has all (DDP)")
    add("--log-every", type=int, default=20)
    add("--val-every", type=int, default=500)
    add("--sample-every", type=int, default=500)
    add("--save-every", type=int, default=500)
    add("--keep", type=int, default=2, metavar="N", help="checkpoints to keep (default 2)")
    add("--max-skipped", type=int, default=10, metavar="N", help="steps whose gradient is not finite are skipped; stop "
        "after N in a row (default 10)")
    add("--stop-after", type=int, default=0, metavar="STEPS",
        help="save and stop after so many steps; --resume auto goes on")
    add("--bench", action="store_true", help="train nothing: how long a step takes, and its bare products alone")
    add("--json", metavar="FILE", help="with --bench: its numbers")


def model_args(add, name):
    """Flags of every transformer."""
    add("--vae", "--vq", dest="vae", required=True, metavar="FILE", help="the trained tokenizer")
    add("--init", metavar="FILE", help="start from these weights" + (
        "; another number of classes is fine" if name == "var" else ", such as those of the last stage"))
    if name != "llamagen":
        add("--init-gamma", type=float, help="scale of the AdaLN gates at the start")
    add("--checkpointing", action=argparse.BooleanOptionalAction,
        help="compute activations twice instead of keeping them: slower, for less memory")
    if name != "infinity":
        add("--cache-crops", metavar="N" if name == "var" else "N|ten|flip", help="tokenize N crops of each picture "
            "before training (1: its centre)" + (", ten crops of two sizes, or the centre and its mirror image"
                                                 if name == "llamagen" else "") + "; 0: do it on the fly")
    if name != "var":
        add("--t5", metavar="DIR", help="the frozen text encoder; without it one on bytes is trained along")
        add("--short-captions", type=float, help="share of pictures that get the short one of their captions")


def var_args(add):
    """Flags of `train.py var` alone."""
    add("--depth", type=int, help="another number of blocks than the recipe's; width and heads grow with it")
    add("--scaling-laws", action="store_true", help="the paper's experiment in small: trains models of several depths "
        "one after the other, and fits their losses as powers of their sizes; a table and a picture")


def vq_args(add):
    """Flags of `train.py vq` alone."""
    add("--lpips", nargs=2, metavar=("VGG16", "HEADS"), help="torchvision's vgg16 weights, and LPIPS' linear heads")
    for flag in ("l1", "l2", "lpips-weight", "disc-weight", "kl-weight"):
        add(f"--{flag}", type=float, help="weight of that loss")
    add("--disc-start", type=int, help="first step of the discriminator")
    add("--disc", choices=["patch", "style"], help="PatchGAN, or StyleGAN2's")
    add("--gan", choices=["hinge", "vanilla", "non-saturating", "non-saturating-swapped"],
        help="its loss; the last is LlamaGen's, whose arguments are exchanged")
    add("--init", metavar="FILE", help="start from this tokenizer")
    add("--warm-steps", type=int, help="steps without quantization before the codebook is initialised")
    add("--restart-after", type=int, help="restart codes unused for so many steps; 0: never")


def infinity_args(add):
    """Flags of `train.py infinity` alone."""
    add("--pixels", metavar="SIZE", help="of all pictures, whatever their aspect: 0.06M, 0.25M, 0.60M or 1M")
    add("--strength", type=float, help="bitwise self-correction: largest chance of a flipped bit; 0: none")
    add("--reweight", action=argparse.BooleanOptionalAction, help="weigh the tokens of coarse scales more")
    add("--scales", type=int, default=0, help="train so many of the first scales; 0: all")


def llamagen_args(add):
    """Flags of `train.py llamagen` alone."""
    add("--clean", action=argparse.BooleanOptionalAction, default=True,
        help="clean captions for T5 as the authors did (needs ftfy and beautifulsoup4)")
    add("--init-text", metavar="FILE", help="start the text encoder on bytes from that in this Infinity file")
    add("--dropout", type=float, help="of embeddings and branches")


def syncnet_args(add):
    """Flags of `train.py syncnet` alone."""
    add("--init", metavar="FILE", help="start from these weights")
    add("--model", metavar="NAME", help="a network of syncnet.CONFIGS; talking_head_plain is Wav2Lip's kind")
    add("--frames", type=int, help="of a clip")
    add("--embedding", type=int, help="numbers that a clip is described by")
    add("--attention", action=argparse.BooleanOptionalAction, help="--no-attention: residual blocks alone")
    add("--moments", type=int, metavar="K", help="clips of each video of a batch, whose K * K pairs all count; 1: one "
        "pair, as in the paper")
    add("--contrast-steps", type=int, help="with --moments: start with so many steps of a loss that knows no plateau")
    add("--audio-offset", type=int, default=0, metavar="FRAMES",
        help="spoil the data: shift the sound of each video, by up to so many frames to both sides")
    add("--unaligned", action="store_true", help="spoil the drawn videos: head and camera move")
    add("--videos", type=int, help="how many are drawn for --data demo (1.2 MB of memory each)")
    add("--val-pairs", type=int, help="pairs to validate with")
    add("--evaluate", metavar="FILE", help="train nothing: how well does this one do on unseen videos?")
    add("--study", action="store_true", help="the paper's study in small: short runs with other batches, clips, "
        "networks and data; a table and a picture of the curves")


def whisper_args(add):
    """Flags of `train.py whisper` alone."""
    add("--videos", type=int, help="how many voices are drawn")


def videomae_args(add):
    """Flags of `train.py videomae` alone."""
    add("--videos", type=int, help="how many heads are drawn (1.5 MB of memory each)")


def latentsync_args(add):
    """Flags of `train.py latentsync` alone."""
    add("--stage", choices=["1", "2", "2-efficient"], default="1", help="1: the UNet without motion modules, on the "
        "noise loss; 2: attention and motion modules, also on the decoded pixels; efficient: fewer of them, no TREPA")
    add("--vae", metavar="FILE", help="the autoencoder; with --data demo: the demo's")
    add("--whisper", metavar="FILE", help="the audio encoder; with --data demo: the demo's")
    add("--syncnet", metavar="FILE", help="a StableSyncNet, for stage 2 and to judge (with --data demo: the demo's)")
    add("--judge", metavar="FILE", help="the SyncNet that judges, such as syncnet_v2.model, for Sync-C; default: that "
        "of --syncnet")
    add("--videomae", metavar="FILE", help="the video encoder of TREPA, for stage 2 (likewise)")
    add("--lpips", nargs=2, metavar=("VGG16", "HEADS"), help="torchvision's vgg16 weights, and LPIPS' linear heads")
    add("--init", metavar="FILE", help="start from these weights: a released file, or those of stage 1")
    add("--stable-diffusion", metavar="DIR", help="start from the UNet of Stable Diffusion 1.5")
    add("--frames", type=int, help="of a clip")
    for name in ("sync", "trepa", "lpips"):
        add(f"--{name}-weight", type=float, help=f"of that loss, in stage 2; 0: without it")
    add("--drop-audio", type=float, help="share of clips without sound: then guidance has something to compare with")
    add("--checkpointing", action=argparse.BooleanOptionalAction,
        help="compute activations twice instead of keeping them: slower, for less memory")
    add("--cache", metavar="DIR", help="where features of the sound are kept; default: in --data")
    add("--videos", type=int, help="how many heads are drawn for --data demo (1.5 MB of memory each)")
    add("--val-videos", type=int, help="videos that are painted and judged with every validation")
    add("--study", action="store_true", help="stage 2 on the drawn heads three times, without SyncNet, with it, and "
        "with TREPA as well; a table and a picture")
    add("--prepare", metavar="RAW_DIR", help="train nothing: make aligned clips of these videos, into --data; "
        "continues where it was, in --workers processes")
    add("--min-face", type=int, help="leave out smaller faces, in pixels; default: the size of the clips")
    add("--min-confidence", type=float, help="leave out what --syncnet trusts less; default: 3, of a StableSyncNet 0.3")
    add("--max-offset", type=int, help="and where the sound is off by more frames (default 6)")
    add("--quality", metavar="MODULE:FUNCTION", help="leave out what this gives less than --min-quality to: called "
        "with three frames, uint8 (h, w, 3), of a clip")
    add("--min-quality", type=float, help="default 40, the authors' for hyperIQA")
    add("--piece", type=int, default=5, metavar="SECONDS", help="length of the clips; the last of a shot has up to "
        "twice as much (default 5)")


def parse_args(argv=None):
    """The command line; a recipe's entries fill what was not given."""
    style = dict(formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, **style)
    models = parser.add_subparsers(dest="model_name", metavar="MODEL", required=True)
    own = {"vq": vq_args, "var": var_args, "infinity": infinity_args, "llamagen": llamagen_args,
           "syncnet": syncnet_args, "whisper": whisper_args, "videomae": videomae_args, "latentsync": latentsync_args}
    for name, recipes in RECIPES.items():
        add = models.add_parser(name, help=f"recipes: {', '.join(recipes)}", **style).add_argument
        run_args(add, name, recipes)
        if name in ("var", "infinity", "llamagen"):
            model_args(add, name)
        if name in own:
            own[name](add)
    args = parser.parse_args(argv)
    if args.epochs and not args.steps:
        args.steps = 0                                                      # the recipe's steps do not count then
    if getattr(args, "study", False):
        if args.model_name == "latentsync":
            args.stage = "2"                                                # whose parts it compares
        else:
            args.recipe = "study"
    if getattr(args, "scaling_laws", False):
        args.recipe = args.recipe or "ladder"
    args.recipe = args.recipe or ("256" if getattr(args, "prepare", None) else next(iter(RECIPES[args.model_name])))
    recipe = RECIPES[args.model_name][args.recipe]
    for key, value in (recipe | recipe.get("stages", {}).get(getattr(args, "stage", None), {})).items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    return args


if __name__ == "__main__":
    ARGS = parse_args()                     # before the imports that take seconds: --help answers at once

import collections
import concurrent.futures
import copy
import csv
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import re
import shutil
import signal
import tarfile
import tempfile
import threading
import time
import warnings
import zlib
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from einops import rearrange
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import latentsync
import sample
import syncnet
import vq
from sample import UserError, place_of_process
from syncnet import FPS, SAMPLE_RATE


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def held_out(items, train):
    """All but every 20th of a list, which is for validation, or those; of fewer than 20 all are for both."""
    return [item for i, item in enumerate(items) if (i % 20 == 19) != train] or items


def first_readable(read, candidates, name, broken):
    """(index, read(index)) of the first candidate that can be read, or None; the others' names are added to broken."""
    for index in candidates:
        try:
            return index, read(index)
        except (UserError, *sample.UNREADABLE):
            broken.append(name(index))


def from_on(index, n):
    """All of 0 .. n - 1, from index on and round: in place of a broken picture comes the next."""
    return ((index + step) % n for step in range(n))


class EmojiSheet:
    """The demo set: 1,906 emoji with a class (the subcategory) and a caption (the name) each; see demo/README.md."""

    def __init__(self, size, train=True):
        tiles, rows = sample.demo_tiles()
        self.classes = sorted({row["subcategory"] for row in rows})
        keep = [i for i in range(len(rows)) if (i % 20 == 19) != train]     # every 20th picture is for validation
        self.labels = torch.tensor([self.classes.index(rows[i]["subcategory"]) for i in keep])
        self.names = [rows[i]["name"] for i in keep]
        small = [np.asarray(tiles[i].resize((size, size), Image.LANCZOS)) for i in keep]
        self.pixels = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).contiguous()
        self.fingerprint, self.kinds = f"emoji {size} {train}", f"pictures, {len(self.classes)} classes"

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return self.names[index]

    def conditions(self, items):
        """What a model is told about these pictures."""
        return self.labels[[i for i, _ in items]]

    def __getitems__(self, items):
        return self.pixels[[i for i, _ in items]], self.conditions(items), []


class EmojiCaptions(EmojiSheet):
    """The demo set with its captions in place of the classes. One of them misleads: "black" was Unicode's word for
    filled, and the picture of this heart is red."""

    def __init__(self, size, train=True):
        super().__init__(size, train)
        self.kinds = "pictures, captions"
        self.names = ["red heart" if name == "heavy black heart" else name for name in self.names]

    def captions(self, index):
        """All captions that a picture may get."""
        return [self.names[index]]

    def conditions(self, items):
        return [self.names[i] for i, _ in items]


class Member(collections.namedtuple("Member", "tar name start size")):
    """A file inside a tar file, where it can be read without the others."""

    def __str__(self):
        return f"{self.tar}/{self.name}"

    def read(self):
        with open(self.tar, "rb") as f:
            f.seek(self.start)
            return f.read(self.size)


def opened(file):
    """What PIL opens: the path of a file, or the bytes of a Member."""
    return io.BytesIO(file.read()) if isinstance(file, Member) else file


def size_of(file):
    """In bytes; 0 if there is no such file."""
    return file.size if isinstance(file, Member) else os.path.getsize(file) if os.path.exists(file) else 0


SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def index_of(tar):
    """Where the files in a tar file lie: {"whole": whether it is not damaged, "members": [(name, start, size, what)]};
    `what` of a picture is its width and height, of a text the text."""
    members, whole = [], True
    try:
        with tarfile.open(tar) as f:
            for info in f:
                suffix, what = Path(info.name).suffix.lower(), None
                if suffix in SUFFIXES:
                    try:
                        with Image.open(f.extractfile(info)) as picture:    # reads the header only
                            what = picture.size
                    except sample.UNREADABLE:
                        what = 1, 1                                         # it will be skipped when its turn comes
                elif suffix in (".cls", ".txt", ".json"):
                    what = f.extractfile(info).read().decode("utf-8", "replace")
                if what is not None:
                    members.append((info.name, info.offset_data, info.size, what))
    except (tarfile.TarError, EOFError):
        whole = False
    end = members[-1][1] + members[-1][2] + 1024 if members else 0          # two empty blocks say that it is over
    return {"whole": whole and end <= os.path.getsize(tar), "members": members}


def read_shards(root, notes):
    """The samples in all ROOT/*.tar, as webdataset packs them: [(Member of the picture, its (w, h), {suffix: text},
    number of the tar file)]. Files that share a name up to its first dot belong together. Every tar file is read
    through once, and what lies where is kept in the folder `notes`. A damaged one counts as far as it can be read."""
    tars, samples, broken = sorted(Path(root).glob("*.tar")), [], []
    for number, tar in enumerate(tqdm(tars, desc="reading tar files", leave=False, disable=None)):
        mark = f"{tar.resolve()} {tar.stat().st_size} {tar.stat().st_mtime_ns}"
        index = Path(notes) / f"tar_{hashlib.sha256(mark.encode()).hexdigest()[:16]}.json"
        if not index.exists():
            index.parent.mkdir(exist_ok=True)
            with vq.atomic(index) as temporary:
                temporary.write_text(json.dumps(index_of(tar)), encoding="utf-8")
        found, rows = json.loads(index.read_text(encoding="utf-8")), {}
        broken += [] if found["whole"] else [str(tar)]
        for name, start, size, what in found["members"]:
            folder, _, file = name.rpartition("/")
            key, _, suffix = file.partition(".")
            rows.setdefault((folder, key), {})[suffix.lower()] = (Member(str(tar), name, start, size), what)
        for parts in rows.values():
            texts = {suffix: what for suffix, (_, what) in parts.items() if isinstance(what, str)}
            pictures = [part for part in parts.values() if not isinstance(part[1], str)]
            samples += [(*picture, texts, number) for picture in pictures[:1]]
    if broken:
        tqdm.write(f"read in part {len(broken)} damaged of {len(tars)} tar files: {', '.join(broken[:3])}")
    return samples


class PictureFolder:
    """DIR/class/picture.*, or DIR/*.tar with a .cls, the number of the class, beside every picture. Items are (index,
    crop): a seed of a random crop, None for the centre, or ("ten", n) and ("flip", n) for number n of the VIEWS.

    The shorter edge is resized to zoom * size with Lanczos, then a square is cut; zoom is drawn between the two given.
    In place of an unreadable file comes the next readable one, and its path is handed on.
    """

    READS_FILES = True                          # so that processes of their own are worth it
    VIEWS = {"ten": 20, "flip": 2}      # corners, centre and these flipped, of 1.1 and of 1.05 * size; centre, flipped

    def __init__(self, root, size, train=True, split=True, zoom=(1.125, 1.125), flip=False, notes="."):
        root, self.shards = Path(root), None
        if not root.is_dir():
            raise UserError(f"--data {root}: no such folder; it should hold one folder of pictures per class")
        files = self._packed(root, notes) if any(root.glob("*.tar")) else self._in_folders(root)
        if not files:
            raise UserError(f"--data {root}: no pictures in it; expected {root}/CLASS/PICTURE.jpg (or png, webp, bmp), "
                            f"or {root}/SHARD.tar with PICTURE.jpg and PICTURE.cls, the number of its class")
        if split:
            files = held_out(files, train)
        self.files, labels, shards = zip(*files)
        self.labels = torch.tensor(labels)
        if isinstance(self.files[0], Member):
            self.shards = np.array(shards)
        self.size, self.zoom, self.flip = size, zoom, flip
        listing = "\n".join(f"{os.path.relpath(str(file), root)} {size_of(file)}" for file in self.files)
        self.fingerprint = f"{hashlib.sha256(listing.encode()).hexdigest()} {size}"
        self.kinds = f"pictures, {len(self.classes)} classes"

    def _in_folders(self, root):
        """[(path, class, 0)]."""
        folders = sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
        found = {d.name: sorted(p for p in d.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
                 for d in folders}
        self.classes = [name for name, paths in found.items() if paths]
        return [(str(p), c, 0) for c, name in enumerate(self.classes) for p in found[name]]

    def _packed(self, root, notes):
        """[(Member, class, number of the tar file)]."""
        found = []
        for picture, _, texts, number in read_shards(root, notes):
            try:
                found.append((picture, int(texts["cls"]), number))
            except (KeyError, ValueError):
                raise UserError(f"{picture}: has no class; expected a .cls beside it, with a number") from None
        self.classes = [str(c) for c in range(1 + max((c for _, c, _ in found), default=-1))]
        return found

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return str(self.files[index])

    def read(self, index, crop):
        """uint8 (3, size, size)."""
        picture = sample.open_picture(opened(self.files[index]))
        if crop is not None and crop[0] in self.VIEWS:
            picture = view(picture, self.size, *crop)
        else:
            rng = np.random.default_rng(crop)
            zoom = np.mean(self.zoom) if crop is None else rng.uniform(*self.zoom)
            ratio = round(zoom * self.size) / min(picture.size)
            picture = picture.resize([max(self.size, round(s * ratio)) for s in picture.size], Image.LANCZOS)
            room = [s - self.size for s in picture.size]
            x, y = (r // 2 for r in room) if crop is None else rng.integers(0, [r + 1 for r in room])
            picture = picture.crop((x, y, x + self.size, y + self.size))
            if self.flip and crop is not None and rng.random() < 0.5:
                picture = ImageOps.mirror(picture)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def conditions(self, items):
        """What a model is told about these pictures."""
        return self.labels[[i for i, _ in items]]

    def __getitems__(self, items):
        pixels, indices, broken = [], [], []
        for index, crop_seed in items:
            found = first_readable(lambda i: self.read(i, crop_seed), from_on(index, len(self)), self.name, broken)
            if found is None:
                raise UserError(f"{self.files[0]} and {len(self) - 1} others: not one picture can be read")
            indices.append(found[0])
            pixels.append(found[1])
        return torch.stack(pixels), self.labels[indices], broken


def view(picture, size, kind, number):
    """One of PictureFolder.VIEWS of a picture, as LlamaGen's authors cut them: a centred square of 1.1 or 1.05 * size
    (or just size), and of that the top left, top right, bottom left or bottom right corner, or the centre."""
    flipped, place = (number == 1, 4) if kind == "flip" else (number % 10 >= 5, number % 5)
    side = size if kind == "flip" else int(size * (1.1 if number < 10 else 1.05))
    while min(picture.size) >= 2 * side:                                    # halves by means, so that nothing aliases
        picture = picture.resize([s // 2 for s in picture.size], Image.BOX)
    ratio = side / min(picture.size)
    picture = picture.resize([round(s * ratio) for s in picture.size], Image.BICUBIC)
    x, y = ((s - side) // 2 for s in picture.size)
    room = side - size
    dx, dy = [(0, 0), (room, 0), (0, room), (room, room), (round(room / 2), round(room / 2))][place]
    picture = picture.crop((x, y, x + side, y + side))
    picture = ImageOps.mirror(picture) if flipped else picture              # the flipped ones are crops of the mirror
    return picture.crop((dx, dy, dx + size, dy + size))


class CaptionedPictures:
    """Pictures with captions, in buckets of equal aspect ratio: `groups`, from each of which a batch may be drawn.

    root: a .tsv or .jsonl file, or a folder of them. A line of the first: picture path, tab, caption; of the second, as
    in Infinity: {"image_path", "long_caption", "text" (a short caption, optional), "h_div_w" (optional)}, or as in
    LlamaGen: {"image_path", "text" (a list, of which the first counts)}. Paths are relative to the file. Or a folder of
    tar files, with a caption as .txt, or such a line as .json, beside each picture. Broken lines are skipped and
    counted. A picture is resized to cover the size that its aspect ratio has in `vq.schedule`, then its centre is cut;
    or with `size`, instead of pixels, a square of that side. Items are (index, seed), seed None for the whole caption.
    """

    READS_FILES = True

    def __init__(self, root, pixels=None, short_captions=0.5, train=True, split=True, size=None, notes="."):
        self.pixels, self.short_captions, self.root, self.size = pixels, short_captions, Path(root), size
        files = [self.root] if self.root.is_file() else sorted([*self.root.glob("*.tsv"), *self.root.glob("*.jsonl")])
        packed = [] if files or not any(self.root.glob("*.tar")) else read_shards(self.root, notes)
        if not files and not packed:
            raise UserError(f"--data {root}: expected a folder with .tsv (picture path, tab, caption), .jsonl or .tar "
                            "files")
        self.rows, broken = [], []
        for picture, (w, h), texts, number in packed:
            try:
                row = json.loads(texts["json"]) if "json" in texts else {"long_caption": texts["txt"]}
                self.rows.append(self._row(picture, {"h_div_w": h / w} | row, number))
            except (ValueError, KeyError, TypeError, AttributeError):
                broken.append(str(picture))
        for file in files:
            for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                try:
                    self.rows.append(self._parse(file, line))
                except (ValueError, KeyError, TypeError, AttributeError, *sample.UNREADABLE):
                    broken.append(f"{file}:{number}") if line.strip() else None
        if broken:
            print(f"skipped {len(broken)} broken of {len(broken) + len(self.rows)} lines: {', '.join(broken[:3])}")
        if not self.rows:
            raise UserError(f"--data {root}: not one of {len(broken)} lines can be used; a line of a .tsv is a path, a "
                            "tab and a caption")
        if split:
            self.rows = held_out(self.rows, train)
        ratios = np.array([row[1] for row in self.rows])
        self.aspects = sorted(set(ratios.tolist()))
        self.groups = [np.flatnonzero(ratios == ratio) for ratio in self.aspects]
        self.shards = np.array([row[3] for row in self.rows]) if packed else None
        near = files[0].parent if files else self.root                      # the data may lie elsewhere next time
        listing = "\n".join(f"{os.path.relpath(str(row[0]), near)} {row[1:3]} {size_of(row[0]) if size else ''}"
                            for row in self.rows)
        listing = hashlib.sha256(listing.encode()).hexdigest()
        self.fingerprint = f"{listing} {size or pixels}"
        self.kinds = f"pictures, {len(self.aspects)} aspect ratios"

    def _parse(self, file, line):
        """A row of a line."""
        if file.suffix == ".tsv":
            path, caption = line.split("\t")[:2]
            row = {"image_path": path, "long_caption": caption}
        else:
            row = json.loads(line)
        return self._row(str(file.parent / row["image_path"]), row)

    def _row(self, path, row, shard=0):
        """(path or Member, aspect ratio, captions, the long one first, number of the tar file)."""
        if isinstance(row.get("text"), list):
            row = row | {"long_caption": row["text"][0] if row["text"] else "", "text": ""}
        captions = [text.split("--")[0].strip() for text in (row["long_caption"], row.get("text") or "")]
        if not captions[0]:
            raise ValueError("no caption")
        if not (ratio := float(row.get("h_div_w") or 0)):
            with Image.open(path) as picture:                               # reads the header only
                ratio = picture.height / picture.width
        return path, 1.0 if self.size else vq.nearest_aspect(ratio), [c for c in captions if c], shard

    def __len__(self):
        return len(self.rows)

    def name(self, index):
        return str(self.rows[index][0])

    def captions(self, index):
        """The long and the short caption of a picture, the latter by default the first sentence of the former."""
        long, *short = self.rows[index][2]
        return [long, short[0] if short else long.split(".")[0]]

    def caption(self, index, seed):
        """Of a picture's captions the short one, or the first sentences of the long one, as many as chance says; of
        squares one of these two, whose features can be computed once."""
        long, *short = self.rows[index][2]
        if seed is None:
            return long
        if self.size:
            return self.captions(index)[np.random.default_rng(seed).random() < self.short_captions]
        rng, sentences = np.random.default_rng(seed), [s for s in long.split(". ") if s]
        if rng.random() < self.short_captions:
            return short[0] if short else ". ".join(sentences[:rng.integers(1, 3)])
        return ". ".join(sentences[:rng.integers(1, len(sentences) + 1)])

    def conditions(self, items):
        """What a model is told about these pictures."""
        return [self.caption(i, seed) for i, seed in items]

    def read(self, index):
        """uint8 (3, h, w)."""
        path, ratio, *_ = self.rows[index]
        h, w = [self.size] * 2 if self.size else (16 * n for n in vq.schedule(ratio, self.pixels)[-1])
        picture = sample.open_picture(opened(path))
        if self.size and min(picture.size) < self.size:
            raise OSError(f"smaller than {self.size} pixels")               # the authors leave such pictures out, too
        return torch.from_numpy(np.array(sample.cover(picture, h, w))).permute(2, 0, 1)

    def __getitems__(self, items):
        pixels, captions, broken = [], [], []
        group = next(g for g in self.groups if items[0][0] in g)
        for index, seed in items:
            places = from_on(int(np.searchsorted(group, index)), len(group))
            found = first_readable(self.read, (int(group[at]) for at in places), self.name, broken)
            if found is None:
                raise UserError(f"{self.rows[index][0]} and {len(group) - 1} others: not one picture can be read")
            pixels.append(found[1])
            captions.append(self.caption(found[0], seed))
        return torch.stack(pixels), captions, broken


def open_pictures(args):
    """(training set, validation set) of --data and --val-data."""
    if args.data == "demo" and args.recipe == "talking_head":
        return HeadPictures(FIRST_HEAD, 600), HeadPictures(0, VAL_HEADS)
    if args.data == "demo":
        if args.captions and (args.pixels or args.size > 64):
            raise UserError(f"--data: recipe {args.recipe} needs pictures with captions; the demo's are 32 x 32")
        sheet = EmojiCaptions if args.captions else EmojiSheet
        return sheet(args.size), sheet(args.size, train=False)
    if args.captions:
        squares = args.model_name == "llamagen"
        if not args.pixels and not squares:
            raise UserError(f"--data {args.data}: give the size of pictures as --pixels, one of {', '.join(vq.PIXELS)}")
        options = dict(pixels=args.pixels, short_captions=args.short_captions, split=not args.val_data,
                       size=args.size if squares else None, notes=Path(args.out) / "index")
        train = CaptionedPictures(args.data, **options)
        return train, CaptionedPictures(args.val_data or args.data, **options | dict(train=False))
    options = dict(zoom=args.zoom, flip=args.flip, notes=Path(args.out) / "index")
    if args.val_data:
        train, val = (PictureFolder(folder, args.size, split=False, **options) for folder in (args.data, args.val_data))
        if train.classes != val.classes:
            raise UserError(f"--val-data {args.val_data}: its class folders differ from those of {args.data}")
        return train, val
    return PictureFolder(args.data, args.size, **options), PictureFolder(args.data, args.size, train=False, **options)


class TokenCache:
    """The pictures of a set as token indices, computed once by the frozen tokenizer and kept beside the run.

    crops: how many versions of each picture, as text; 1 is the centre crop, and a name of PictureFolder.VIEWS all of
    these. Same items and results as a picture set, with tokens (B, L) instead of pixels. The tokens lie in files of
    SHARD versions each, which the processes share among them; one that was damaged is made again.
    """

    SHARD = 2**14

    def __init__(self, pictures, tokenizer, patch_nums, crops, device, folder, tag):
        self.pictures, self.classes, self.crops = pictures, getattr(pictures, "classes", []), crops
        weights = hashlib.sha256()
        for module in (tokenizer.encoder, tokenizer.quant_conv, tokenizer.quantize):
            for p in module.parameters():
                weights.update(p.detach().cpu().numpy().tobytes())
        key = f"{pictures.fingerprint} {weights.hexdigest()} {patch_nums} {crops}"
        self.fingerprint = key = hashlib.sha256(key.encode()).hexdigest()[:12]
        named = crops if crops in PictureFolder.VIEWS else None
        count = PictureFolder.VIEWS[named] if named else int(crops)
        crop = lambda i, c: (named, c) if named else (i, c) if count > 1 else None
        items, self.broken = [(i, crop(i, c)) for i in range(len(pictures)) for c in range(count)], set()
        folder = Path(folder) / f"codes_{tag}_{key}"
        folder.mkdir(exist_ok=True)
        shards = {folder / f"{i:05d}.safetensors": items[start:start + self.SHARD]
                  for i, start in enumerate(range(0, len(items), self.SHARD))}
        rank, world = place_of_process()
        mine = list(shards)[rank::world]
        if damaged := [path for path in mine if path.exists() and not self._is_whole(path)]:
            tqdm.write(f"made again: {len(damaged)} damaged of {len(shards)} files of tokens: "
                       + ", ".join(map(str, damaged[:3])))
        for path in damaged:
            path.unlink()
        of_all("nothing damaged is left")
        for path in [path for path in mine if not path.exists()]:
            self._fill(pictures, shards[path], tokenizer, patch_nums, device, path)
        report_broken(self.broken, pictures)
        while not all(path.exists() for path in shards):                    # the other processes are at it
            time.sleep(1)
        self.files = [load_file(path) for path in shards]                   # mapped: (n, L) int32, and whose they are
        self.ends = np.cumsum([len(file["index"]) for file in self.files])
        self.index = torch.cat([file["index"] for file in self.files])
        if not len(self.index):
            raise UserError(f"--data: of {len(pictures)} pictures not one can be read")

    @staticmethod
    def _is_whole(path):
        """Whether a file of tokens holds what was written."""
        try:
            with safe_open(path, "pt") as f:
                return f.metadata()["crc32"] == str(zlib.crc32(f.get_tensor("tokens").numpy()))
        except (SafetensorError, OSError, KeyError, TypeError):
            return False

    def _fill(self, pictures, items, tokenizer, patch_nums, device, path):
        tokens, indices = [], []
        starts = range(0, len(items), 64)
        for start in tqdm(starts, desc=f"tokenizing {len(items)} pictures", unit="batch", leave=False, disable=None):
            read = [(item[0], *pictures.__getitems__([item])) for item in items[start:start + 64]]
            self.broken.update(path for *_, paths in read for path in paths)
            read = [(i, pixels) for i, pixels, _, paths in read if not paths]
            if read:
                pixels = torch.cat([pixels for _, pixels in read])
                tokens.append(torch.cat(tokenizer.tokenize(sample.to_input(pixels, device), patch_nums), 1).int().cpu())
                indices += [i for i, _ in read]
        tokens = torch.cat([*tokens, torch.zeros(0, sum(h * w for h, w in vq.as_pairs(patch_nums)), dtype=torch.int32)])
        with vq.atomic(path) as temporary:
            save_file({"tokens": tokens, "index": torch.tensor(indices, dtype=torch.int64)}, temporary,
                      {"crc32": str(zlib.crc32(tokens.numpy()))})

    def __len__(self):
        return len(self.index)

    def name(self, index):
        return self.pictures.name(int(self.index[index]))

    def captions(self, i):
        return self.pictures.captions(int(self.index[i]))

    def __getitems__(self, items):
        whose = [(int(self.index[i]), seed) for i, seed in items]
        places = [(i - self.ends[file - 1] if file else i, file)
                  for i, _ in items for file in [np.searchsorted(self.ends, i, "right")]]
        tokens = torch.stack([self.files[file]["tokens"][row] for row, file in places])
        return tokens.long(), self.pictures.conditions(whose), []


class FeatureCache:
    """Text features of captions, computed once by the frozen encoder and kept beside the run, in half precision:
    cache[caption] is (n, Ct). The file is mapped, not read: only what is asked for comes into memory."""

    def __init__(self, captions, t5, slots, clean, folder):
        weights = [p.float().sum().item() for p in (t5.embed.weight, *t5.blocks[-1].parameters())]
        key = hashlib.sha256(f"{slots} {clean} {t5.config} {weights} {captions}".encode()).hexdigest()[:12]
        path = Path(folder) / f"text_{key}.safetensors"
        if not path.exists() and place_of_process()[0] == 0:
            rows = []
            for start in tqdm(range(0, len(captions), 16), desc=f"reading {len(captions)} captions", leave=False):
                rows += [row.half() for row in sample.encode_texts(t5, captions[start:start + 16], slots, clean)]
            starts = torch.tensor([0] + [len(row) for row in rows]).cumsum(0)
            with vq.atomic(path) as temporary:
                save_file({"features": torch.cat(rows), "starts": starts}, temporary)
        while not path.exists():                                            # the first process is at it
            time.sleep(1)
        self.file = safe_open(path, "pt")
        starts = self.file.get_tensor("starts").tolist()
        self.places = dict(zip(captions, zip(starts, starts[1:])))

    def __getitem__(self, caption):
        start, end = self.places[caption]
        return self.file.get_slice("features")[start:end].float()


# ----------------------------------------------------------------------------------------------------------------------
# A talking head that needs no data: faces drawn from a seed, whose lips follow speech synthesised from the same plan

# Of each sound: the formants F1, F2, F3 in Hz; how loud voice and noise are, where the noise lies in Hz; and what the
# mouth does: how far it opens, how wide it is (-1 rounded ... 1 spread), how much of the teeth shows
PHONES = {
    "a": (800, 1250, 2550, 1.0, 0.0, 0, 1.0, 0.1, 0.3), "e": (550, 1900, 2600, 0.75, 0.0, 0, 0.55, 0.7, 0.5),
    "i": (300, 2300, 3000, 0.5, 0.0, 0, 0.25, 1.0, 0.7), "o": (500, 900, 2500, 0.8, 0.0, 0, 0.6, -0.8, 0.0),
    "u": (320, 750, 2300, 0.45, 0.0, 0, 0.22, -1.0, 0.0), "schwa": (500, 1500, 2500, 0.6, 0.0, 0, 0.4, 0.0, 0.2),
    "m": (250, 1000, 2200, 0.15, 0.0, 0, 0.0, 0.0, 0.0), "n": (250, 1600, 2600, 0.25, 0.0, 0, 0.2, 0.2, 0.5),
    "l": (360, 1300, 2700, 0.45, 0.0, 0, 0.35, 0.1, 0.3), "p": (400, 900, 2300, 0.0, 0.0, 0, 0.0, 0.0, 0.0),
    "b": (250, 900, 2300, 0.05, 0.0, 0, 0.0, 0.0, 0.0), "t": (400, 1700, 2600, 0.0, 0.1, 4500, 0.15, 0.3, 0.7),
    "k": (400, 1900, 2500, 0.0, 0.1, 2500, 0.3, 0.1, 0.1), "s": (350, 1700, 2600, 0.0, 0.5, 6000, 0.12, 0.6, 1.0),
    "sh": (350, 1700, 2600, 0.0, 0.6, 3000, 0.2, -0.6, 0.9), "f": (350, 1100, 2400, 0.0, 0.25, 7000, 0.08, 0.2, 1.0),
    "pause": (500, 1500, 2500, 0.0, 0.0, 0, 0.0, 0.0, 0.0),
}
VOWELS = ("a", "e", "i", "o", "u", "schwa")
CONSONANTS = ("m", "p", "b") * 2 + ("n", "l", "t", "k", "s", "sh", "f")                 # half of them close the lips
RATE = 200                                                                  # numbers a second that describe speech


def smooth(track, width):
    """Averages of a track (T, ...) under a bell of so many numbers: organs do not jump."""
    n = max(3, int(width) | 1)
    bell = np.hanning(n + 2)[1:-1]
    padded = np.pad(track, [(n // 2, n // 2)] + [(0, 0)] * (track.ndim - 1), mode="edge")
    return np.tensordot(np.lib.stride_tricks.sliding_window_view(padded, n, axis=0), bell / bell.sum(), 1)


def speech_plan(rng, seconds):
    """Random syllables as rows of PHONES, RATE of them a second, smoothed -> (T, 9)."""
    rows, tempo = [], rng.uniform(0.75, 1.35)
    steps = lambda low, high: int(rng.uniform(low, high) / tempo * RATE)
    while len(rows) < seconds * RATE:
        if rng.random() < 0.4:
            rows += [PHONES["pause"]] * steps(0.08, 0.35)
        for _ in range(rng.integers(1, 4)):                                 # the syllables of a word
            stress = np.ones(9)
            stress[[3, 4, 6]] = rng.uniform(0.5, 1.2)                       # what is louder opens the mouth wider
            if rng.random() < 0.85:
                rows += [PHONES[rng.choice(CONSONANTS)]] * steps(0.06, 0.13)
            rows += [PHONES[rng.choice(VOWELS)] * stress] * steps(0.06, 0.28)
            if rng.random() < 0.3:
                rows += [PHONES[rng.choice(CONSONANTS)]] * steps(0.06, 0.13)
    plan = np.array(rows[:int(seconds * RATE)], float)
    plan[:, :3], plan[:, 3:6], plan[:, 6:] = (smooth(plan[:, part], width * RATE) for part, width in (
        (slice(0, 3), 0.06), (slice(3, 6), 0.025), (slice(6, 9), 0.08)))      # seconds
    return plan


def synthesize(rng, plan):
    """Sound (T * 16000 / RATE,) in [-1, 1] of a plan: pulses of the vocal folds and noise, both through filters that
    follow it, as the source-filter model of speech has it."""
    hop, T = SAMPLE_RATE // RATE, len(plan)
    n, frame, n_fft = T * hop, 4 * hop, 512
    pitch = rng.uniform(85, 240) * (1 + 0.25 * smooth(rng.standard_normal(T), 0.5 * RATE)) * np.linspace(1.05, 0.95, T)
    phase = np.cumsum(np.repeat(pitch, hop)) / SAMPLE_RATE
    pulses = np.diff(np.floor(phase), prepend=0.0) * np.sqrt(np.repeat(1 / pitch, hop))
    f = np.arange(n_fft // 2 + 1) * SAMPLE_RATE / n_fft
    tract = rng.uniform(0.87, 1.15)                                         # a longer one has lower formants
    voice = 1 / (1 + (f / rng.uniform(250, 700)) ** 1.2) * np.ones((T, 1))
    for formant, width in (*zip((plan[:, :3] * tract).T, (80, 110, 160)), (np.full(T, 3600 * tract), 250)):
        F, B = formant[:, None], width / 2
        voice *= (F**2 + B**2) / np.sqrt(((f - F) ** 2 + B**2) * ((f + F) ** 2 + B**2))
    hiss = np.exp(-0.5 * ((f - np.maximum(plan[:, 5:6], 1500) * tract) / 1200) ** 2)
    bell, out = np.hanning(frame + 1)[:-1], np.zeros((T + n_fft // hop + 1, hop))
    for source, filters in ((pulses * 30, voice * plan[:, 3:4]), (rng.standard_normal(n) * 0.3, hiss * plan[:, 4:5])):
        pieces = np.lib.stride_tricks.sliding_window_view(np.pad(source, (frame // 2, frame)), frame)[:n:hop]
        pieces = np.fft.irfft(np.fft.rfft(pieces * bell, n_fft) * filters)
        pieces = np.pad(pieces, ((0, 0), (0, -n_fft % hop))).reshape(T, -1, hop)
        for k in range(pieces.shape[1]):                                    # overlap and add
            out[k:k + T] += pieces[:, k]
    sound = out.flatten()[frame // 2:][:n]
    sound *= rng.uniform(0.02, 0.15) / (np.sqrt(np.mean(sound**2)) + 1e-6)
    noise = smooth(rng.standard_normal(n), rng.choice([3, 5, 11])) * np.std(sound)     # of the room
    return np.clip(sound + noise * rng.uniform(0.02, 0.2), -1, 1).astype(np.float32)


class Canvas:
    """Pictures (T, 3, h, w) in [0, 1] to paint ellipses on, in coordinates of a face that moves: -1 to 1."""

    WIDE = 1.45                                 # of an aligned face, in which a circle is so much wider than high
    STRETCH = 70 / 52                           # how much of that is alignment's

    def __init__(self, pose, size, rows, aligned=True):
        """pose (T, 4): shift in x and y, angle, scale; rows: how many of the lowest rows of the square are drawn.
        aligned: stretched to a square, as aligned faces are; else as in a picture that somebody took."""
        at = (torch.arange(size) + 0.5) * 2 / size - 1
        y, x = torch.meshgrid(at[-rows:], at, indexing="ij")
        dx, dy, angle, scale = (pose[:, i, None, None] for i in range(4))
        x, y = (x - dx) / scale / (self.WIDE if aligned else 1), (y - dy) / scale
        self.x, self.y = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        self.x = self.x if aligned else self.x / self.WIDE * self.STRETCH
        self.pixel, self.top = 2 / size, float(self.y.min())
        self.picture = torch.zeros(len(pose), 3, rows, size)

    def ellipse(self, x, y, a, b, sharp=1.0):
        """Coverage (T, h, w) of an ellipse around (x, y) with half axes a, b; all numbers, or one per picture (T,).
        None if it ends above the rows that are drawn."""
        if self.top > np.max(y + (1 + 0.5 / sharp) * b):
            return None
        x, y, a, b = (torch.as_tensor(v, dtype=torch.float32).reshape(-1, 1, 1) for v in (x, y, a, b))
        rim = 1 - (((self.x - x) / a) ** 2 + ((self.y - y) / b) ** 2).sqrt()        # 0 there, 1 in the middle
        return (0.5 + rim * torch.minimum(a, b) / self.pixel * sharp).clamp(0, 1)

    def paint(self, coverage, color, opacity=1.0):
        """Blends a color (3,) over what is covered."""
        if coverage is not None:
            color = torch.as_tensor(color, dtype=torch.float32).view(3, 1, 1)
            self.picture += (coverage * opacity)[:, None] * (color - self.picture)

    def light(self, gain):
        """Makes all that was painted brighter or darker, (T, h, w)."""
        self.picture *= gain[:, None]


def draw_head(rng, mouth, pose, size, rows, aligned=True):
    """A random face that speaks: mouth (T, 3) open, wide, teeth; pose (T, 4) -> uint8 (T, 3, rows, size), of which rows
    = size is all of it. Aligned, it has brows and nose where an aligned face has them: at 1/5 and 2/5 of the height."""
    T, canvas, uniform = len(mouth), Canvas(pose, size, rows, aligned), rng.uniform
    opening, wide, teeth = mouth.T                                          # (T,) each
    skin = np.array([[0.96, 0.80, 0.69], [0.87, 0.67, 0.53], [0.71, 0.49, 0.36], [0.55, 0.37, 0.27]])[rng.integers(4)]
    skin = np.clip(skin + uniform(-0.06, 0.06, 3), 0.1, 1)
    lips = np.clip(skin * [uniform(0.8, 1.0), uniform(0.5, 0.75), uniform(0.55, 0.8)], 0, 1)
    hair, shirt, wall, other = uniform(0.05, 0.6) * uniform(0.4, 1, 3), *uniform(0, 1, (3, 3))
    # wall, shoulders, hair, head; the chin falls as the mouth opens
    canvas.picture += torch.as_tensor(wall, dtype=torch.float32).view(3, 1, 1)
    canvas.paint(((canvas.x * uniform(-1, 1) + canvas.y * uniform(-1, 1)) * 0.5 + 0.5).clamp(0, 1), other)
    for _ in range(3):
        canvas.paint(canvas.ellipse(*uniform(-1.2, 1.2, 2), *uniform(0.1, 0.5, 2), sharp=0.3), uniform(0, 1, 3), 0.7)
    width, chin = uniform(0.66, 0.8), uniform(0.88, 0.98)
    canvas.paint(canvas.ellipse(0, 1.45, 1.15, 0.5), shirt)
    canvas.paint(canvas.ellipse(0, 0.95, 0.36, 0.4), skin * 0.8)
    canvas.paint(canvas.ellipse(0, -0.35, width * uniform(1.05, 1.3), uniform(0.8, 1.0)), hair)
    fallen = torch.as_tensor(chin + 0.09 * opening).float()[:, None, None]
    lowest = torch.where(canvas.y > 0, fallen, torch.tensor(0.98))
    rim = 1 - ((canvas.x / width) ** 2 + (canvas.y / lowest) ** 2).sqrt()
    head = (0.5 + rim * width / canvas.pixel).clamp(0, 1)
    canvas.paint(head, skin)
    side, above = uniform(-0.35, 0.35), uniform(-0.25, 0.05)                # where the light comes from
    canvas.light(1 + head * (canvas.x * side + canvas.y * above))
    if rng.random() < 0.3:                                                  # a beard
        canvas.paint(canvas.ellipse(0, 0.55, width * 0.75, 0.5, sharp=0.4) * head * uniform(0.2, 0.7), hair)
    # eyes, which blink; brows, nose, cheeks
    blink = np.ones(T)
    for start in rng.integers(0, T, 1 + T // 60):
        blink[start:start + 4] = 0.15
    apart, iris = uniform(0.28, 0.36), uniform(0.1, 0.6, 3)
    for sign in (-1, 1):
        canvas.paint(canvas.ellipse(sign * apart, -0.42, 0.13, 0.07 * blink), np.ones(3) * 0.95)
        canvas.paint(canvas.ellipse(sign * apart, -0.42, 0.06, 0.065 * blink), iris)
        canvas.paint(canvas.ellipse(sign * apart, -0.6, 0.17, uniform(0.02, 0.05)), hair * 0.8)
        canvas.paint(canvas.ellipse(sign * 0.4, 0.08, 0.2, 0.16, sharp=0.1), lips, uniform(0, 0.4))
    nose = uniform(0.07, 0.12)
    canvas.paint(canvas.ellipse(0, -0.22, nose, 0.16, sharp=0.2), np.ones(3), 0.25)
    canvas.paint(canvas.ellipse(0, -0.06, nose * 1.5, 0.05, sharp=0.4), skin * 0.6, 0.5)
    # mouth: lips, between them the dark, in it teeth and tongue. The lower lip moves more than the upper
    half, thick, deep = uniform(0.26, 0.34), uniform(0.05, 0.08), uniform(0.24, 0.32)
    a = half * (1 + 0.25 * wide) * (1 - 0.12 * opening)
    gap = 0.012 + deep * opening
    y = uniform(0.30, 0.40) + 0.5 * gap
    canvas.paint(canvas.ellipse(0, y, a + 0.03, gap + thick), lips)
    inside = canvas.ellipse(0, y, a, gap)
    canvas.paint(inside, np.array([0.12, 0.03, 0.04]))
    canvas.paint(inside * canvas.ellipse(0, y + 0.9 * gap, a * 0.6, gap * 0.7), np.array([0.75, 0.3, 0.32]), 0.8)
    upper = (0.5 + (torch.as_tensor(y - 0.3 * gap).float()[:, None, None] - canvas.y) / canvas.pixel).clamp(0, 1)
    shown = torch.as_tensor(np.maximum(teeth, 0.6 * opening).clip(0, 1)).float()[:, None, None]
    canvas.paint(inside * upper, np.ones(3) * 0.93, 0.9 * shown)
    flicker = 1 + 0.02 * torch.from_numpy(smooth(rng.standard_normal(T), 9)).float()
    canvas.light((flicker * uniform(0.7, 1.1))[:, None, None])
    grain = torch.randn(canvas.picture.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31))))
    return canvas.picture.add_(grain, alpha=uniform(0.005, 0.015)).mul_(255).round_().clamp_(0, 255).byte()


def speech(seed, seconds=4.8):
    """(random numbers to go on with, plan (RATE * seconds, 9), slow drift (25 * seconds, 4), sound (16000 * seconds,)):
    of a talking head all but the picture, of which the plan tells the mouth."""
    rng = np.random.default_rng(seed)
    plan = speech_plan(rng, seconds)
    times = frame_times(len(plan))
    drift = smooth(rng.standard_normal((len(plan), 4)), 0.6 * RATE) * 6            # of deviation about 1
    drift = (drift + rng.standard_normal(4) * 0.5)[times.astype(int)].clip(-2, 2)
    return rng, plan, drift, synthesize(rng, plan)


def frame_times(length):
    """The middle of every frame's time, in rows of a plan of this length."""
    return (np.arange(length * FPS // RATE) + 0.5) / FPS * RATE


@functools.lru_cache(maxsize=4096)
def talking_head(seed, seconds=4.8, size=64, rows=None, unaligned=False):
    """(frames uint8 (25 * seconds, 3, rows or size, size), sound (16000 * seconds,)) of a random person who says random
    syllables: a function of the seed alone. Sound and picture come from one plan, so they are exactly in step.
    unaligned: head and camera move, as in a video whose faces nobody aligned."""
    rng, plan, drift, sound = speech(seed, seconds)
    mouth = mouth_of(plan)
    reach = np.array([0.3, 0.3, 0.35, 0.15] if unaligned else [0.02, 0.02, 0.03, 0.02])
    pose = torch.from_numpy(drift * reach + [0, 0, 0, 1]).float()
    return draw_head(rng, mouth, pose, size, rows or size), sound


def mouth_of(plan):
    """(frames, 3): open, wide, teeth in the middle of every frame."""
    at = np.arange(len(plan)) + 0.5
    return np.stack([np.interp(frame_times(len(plan)), at, plan[:, 6 + i]) for i in range(3)], 1)


def talking_scene(seed, seconds, size=128):
    """(frames uint8 (T, 3, size, size), sound, points (T, 3, 2)) of a talking head that somebody filmed: small, and it
    moves. points: where the brows and the nose are, in pixels, for latentsync.Aligner."""
    rng, plan, drift, sound = speech(seed, seconds)
    pose = drift * [0.09, 0.06, 0.1, 0.02] + [0, 0.1, 0, 0.55]
    face = np.array([(-0.361, -0.586), (0.4, -0.586), (0.02, -0.186)]) * [Canvas.WIDE / Canvas.STRETCH, 1]
    dx, dy, angle, scale = pose.T[:, :, None]
    x = (face[:, 0] * np.cos(angle) - face[:, 1] * np.sin(angle)) * scale + dx      # (T, 3)
    y = (face[:, 0] * np.sin(angle) + face[:, 1] * np.cos(angle)) * scale + dy
    points = (np.stack([x, y], -1) + 1) * size / 2 - 0.5
    return draw_head(rng, mouth_of(plan), torch.from_numpy(pose).float(), size, size, aligned=False), sound, points


def moved(sound, frames):
    """Sound (n,) that comes so many frames of video later, or sooner if negative; silence fills the gap."""
    late = round(frames * SAMPLE_RATE / FPS)
    return np.pad(sound, (max(late, 0), max(-late, 0)))[max(-late, 0):][:len(sound)]


class Clips:
    """Pairs of a clip and the sound of the same or another moment of the same video. Items are (index, seed).
    Subclasses have `name(i)`, `video(i)`, which gives its length in frames and functions of a start that give frames
    and spectrogram, and `whole(i)`, which gives all frames and the sound."""

    def __init__(self, config, audio_offset=0, moments=1):
        self.config, self.audio_offset, self.moments = config, audio_offset, moments

    def spoiled(self, index, sound):
        """The sound, for the study moved by up to audio_offset frames: by a number of its own for each video, as where
        nobody corrected it."""
        return moved(sound, np.random.default_rng((index, 1)).uniform(-self.audio_offset, self.audio_offset))

    def pair(self, index, seed):
        """(frames uint8 (F, 3, H, W), mel (80, columns), 1 if they belong together, else 0), each half of the time. The
        sound stays; it is the frames that come from another start, any other. Of several `moments`, all different, the
        frames and the spectrograms, (K, F, 3, H, W) and (K, 80, columns), and 1."""
        rng, F = np.random.default_rng(seed), self.config.frames
        length, frames_at, mel_at = self.video(index)
        starts = length - F + 1
        if length < 2 * F:
            raise OSError("too short")
        if self.moments > 1:
            seen = heard = rng.choice(starts, self.moments, replace=False).tolist()
            label = 1
        else:
            heard, label = [int(rng.integers(starts))], int(rng.integers(2))
            seen = heard if label else [(heard[0] + int(rng.integers(1, starts))) % starts]
        clips, mels = [frames_at(start) for start in seen], [mel_at(start) for start in heard]
        if any(len(clip) < F for clip in clips) or any(mel is None for mel in mels):
            raise OSError("ends too soon")
        clips, mels = torch.stack(clips), torch.stack(mels)
        return (clips, mels, label) if self.moments > 1 else (clips[0], mels[0], label)

    def some(self, n):
        """(frames, sound) of the first n videos that can be used."""
        found = []
        for index in range(len(self)):
            try:
                frames, sound = self.whole(index)
                found += [(frames, sound)] if len(frames) >= 2 * self.config.frames else []
            except (UserError, *sample.UNREADABLE):
                continue
            if len(found) == n:
                break
        return found

    def __getitems__(self, items):
        pairs, broken = [], []
        for index, seed in items:
            found = first_readable(lambda i: self.pair(i, seed), from_on(index, len(self)), self.name, broken)
            if found is None:
                raise UserError(f"{self.name(0)} and {len(self) - 1} others: not one of these videos can be used; each "
                                f"has to have sound and {2 * self.config.frames} frames")
            pairs.append(found[1])
        frames, mels, labels = zip(*pairs)
        return (torch.stack(frames), torch.stack(mels)), torch.tensor(labels), broken


VIDEOS = {".mp4", ".mkv", ".mov", ".avi", ".webm"}


def videos_in(root):
    """Paths of the videos in a folder and those below it, sorted."""
    return sorted(p for p in Path(root).rglob("*") if p.suffix.lower() in VIDEOS and p.is_file() and p.name[0] != ".")


def video_files(root, train, split):
    """(paths of the videos in a folder, or of those for training or validation, and what stands for the list)."""
    sample.pyav()
    files = [str(file) for file in videos_in(root)]
    if not files:
        raise UserError(f"--data {root}: no videos in it; expected .mp4 files of aligned faces, with sound")
    if split:                                                               # all clips of a video to one side
        source = lambda file: re.sub(r"_[0-9]{6}$", "", os.path.splitext(file)[0])
        chosen = set(held_out(list(dict.fromkeys(map(source, files))), train))
        files = [file for file in files if source(file) in chosen]
    listing = "\n".join(f"{os.path.relpath(p, root)} {os.path.getsize(p)}" for p in files)
    return files, hashlib.sha256(listing.encode()).hexdigest()


VAL_HEADS, FIRST_HEAD = 100, 1000                                           # heads 0 .. 99 validate, 1000 .. train


class TalkingHeads(Clips):
    """Videos of people that do not exist, drawn when first asked for and kept: 1.2 MB each at 64 x 64 pixels."""

    kinds = "drawn videos"

    def __init__(self, config, count, first=0, seconds=4.8, unaligned=False, **options):
        super().__init__(config, **options)
        self.count, self.first, self.seconds, self.unaligned, self.mels = count, first, seconds, unaligned, {}
        self.fingerprint = f"talking heads {first}+{count} {seconds} {config} {options} {unaligned}"

    def __len__(self):
        return self.count

    def name(self, index):
        return f"talking head {self.first + index}"

    def whole(self, index):
        """(frames, sound) of a video, for syncnet.score."""
        height, width = self.config.picture
        return talking_head(self.first + index, self.seconds, width, height, self.unaligned)

    def video(self, index):
        frames, sound = self.whole(index)
        if index not in self.mels:
            self.mels[index] = syncnet.mel_spectrogram(self.spoiled(index, sound))
        window = lambda start: self.mels[index][:, (first := syncnet.mel_start(start)):first + self.config.columns]
        return len(frames), lambda start: frames[start:start + self.config.frames], window


class HeadPictures:
    """Frames of drawn videos, 64 x 64 pixels, three of every person: for an autoencoder."""

    kinds = "frames of drawn heads"

    def __init__(self, first, people):
        heads = tqdm(range(first, first + people), desc="drawing heads", unit="head", leave=False)
        self.pixels = torch.cat([talking_head(seed)[0][10::40] for seed in heads])
        self.fingerprint = f"frames of heads {first}+{people}"

    def __len__(self):
        return len(self.pixels)

    def __getitems__(self, items):
        return self.pixels[[i for i, _ in items]], torch.zeros(len(items)), []


class HeadSpeech:
    """The sound of drawn heads as log-mel spectrograms, and what the mouth does, 50 times a second: open, wide, teeth.
    For an audio encoder."""

    kinds = "drawn voices"

    def __init__(self, first, people):
        self.mels, self.mouths = [], []
        for seed in tqdm(range(first, first + people), desc="synthesizing", unit="voice", leave=False):
            _, plan, _, sound = speech(seed)
            self.mels.append(latentsync.log_mel(sound))
            self.mouths.append(torch.from_numpy(plan[::RATE // 50, 6:]).float())
        self.fingerprint = f"voices {first}+{people}"

    def __len__(self):
        return len(self.mels)

    def __getitems__(self, items):
        index = [i for i, _ in items]
        return torch.stack([self.mels[i] for i in index]), torch.stack([self.mouths[i] for i in index]), []


class Dubs:
    """Clips of faces, each with another of the same video, and the sound: for LatentSync. Items are (index, seed).

    Subclasses have `name(i)` and `video(i)`: its length in frames, a function of start and count that gives frames,
    what the audio encoder made of its sound (rows, layers, C), and the sound (n,). `columns` is set if SyncNet listens.
    """

    def __init__(self, frames):
        self.frames, self.columns = frames, None

    def scene(self, index, seed, clips=1):
        """`clips` clips in a row: frames uint8 (clips * F, 3, H, W), for each clip one of another moment as reference,
        likewise, what each frame hears (clips * F, rows * layers, C), the sound of the video, and the first frame's
        number. Raises OSError if the video is too short."""
        rng, F = np.random.default_rng(seed), self.frames
        length, frames_at, features, sound = self.video(index)
        clips = min(clips, length // F)
        if length < 3 * F:
            raise OSError("too short")
        start, references = int(rng.integers(length - clips * F + 1)), []
        for first in range(start, start + clips * F, F):
            apart = [i for i in range(length - F + 1) if abs(i - first) >= F]       # not one frame in common
            references.append(frames_at(int(rng.choice(apart)), F))
        seen, others = frames_at(start, clips * F), torch.cat(references)
        if len(seen) < clips * F or len(others) < clips * F:
            raise OSError("ends too soon")
        rows = np.stack([latentsync.window_rows(start + i, len(features)) for i in range(clips * F)])
        return seen, others, features[rows].flatten(1, 2).float(), sound, start

    def item(self, index, seed):
        """One clip: frames, references, what they hear, and the spectrogram that SyncNet hears, or nothing."""
        seen, others, heard, sound, start = self.scene(index, seed)
        if not self.columns:
            return seen, others, heard, torch.zeros(0)
        mel = syncnet.mel_window(sound, start, self.columns)
        if mel is None:
            raise OSError("its sound ends too soon")
        return seen, others, heard, mel

    def __getitems__(self, items):
        found, broken = [], []
        for index, seed in items:
            one = first_readable(lambda i: self.item(i, seed), from_on(index, len(self)), self.name, broken)
            if one is None:
                raise self.useless()
            found.append(one[1])
        seen, others, heard, mel = (torch.stack(part) for part in zip(*found))
        return (seen, others), (heard, mel), broken

    def useless(self):
        """The error if no video of all can be used."""
        return UserError(f"{self.name(0)} and {len(self) - 1} others: not one of these videos can be used; each has to "
                         f"have sound and {3 * self.frames} frames")


class HeadDubs(Dubs):
    """Drawn heads."""

    kinds = "drawn heads"

    def __init__(self, first, people, frames, seconds=4.8):
        super().__init__(frames)
        self.first, self.people, self.seconds, self.heard = first, people, seconds, {}
        self.fingerprint = f"clips of heads {first}+{people} {frames} {seconds}"

    def __len__(self):
        return self.people

    def name(self, index):
        return f"talking head {self.first + index}"

    def listen(self, whisper, args):
        self.whisper = whisper

    def video(self, index):
        frames, sound = talking_head(self.first + index, self.seconds)
        if index not in self.heard:
            self.heard[index] = torch.cat(list(self.whisper.pieces(sound))).cpu()
        return len(frames), lambda start, count: frames[start:start + count], self.heard[index], sound


def content_of(path, most=None):
    """A hash of a file, or of its size and of so many bytes at its start and at its end."""
    size, found = os.path.getsize(path), hashlib.sha256()
    with open(path, "rb") as f:
        if most is None or size <= 2 * most:
            while piece := f.read(2**20):
                found.update(piece)
        else:
            found.update(b"%d" % size + f.read(most))
            f.seek(-most, os.SEEK_END)
            found.update(f.read())
    return found.hexdigest()


class VideoFolder:
    """What sets of videos in a folder have in common: `train.py latentsync --prepare` makes such, with sound and with
    faces that are aligned and fill the picture. Every 20th is for validation."""

    READS_FILES = True
    kinds = "videos"

    def __init__(self, root, train, split, *options):
        self.root, (self.files, listing) = root, video_files(root, train, split)
        self.fingerprint = " ".join(map(str, (listing, *options)))

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return self.files[index]


class DubFolder(VideoFolder, Dubs):
    """Dubs of such a folder."""

    def __init__(self, root, frames, resolution, train=True, split=True):
        Dubs.__init__(self, frames)
        VideoFolder.__init__(self, root, train, split, frames, resolution)
        self.resolution = resolution

    def listen(self, whisper, args):
        """Has the audio encoder listen to all videos. What it says is kept in files that are named after the content of
        the video and the encoder's weights, so that neither a new name nor a new video gets what belongs to another."""
        folder = sample.check_writable(args.cache or Path(self.root) / ".whisper", "--cache")
        weights = b"".join(p.detach().cpu().numpy().tobytes() for p in whisper.state_dict().values())
        ear, self.heard = hashlib.sha256(weights).hexdigest(), []
        rank, world = place_of_process()
        for i, path in enumerate(tqdm(self.files, desc="listening", unit="video", leave=False, disable=rank > 0)):
            self.heard.append(folder / f"{content_of(path)[:32]}_{ear[:16]}.safetensors")
            if self.heard[-1].exists() or i % world != rank:
                continue
            try:
                sound = torch.from_numpy(sample.read_sound(path))
                features = torch.cat([piece.cpu().half() for piece in whisper.pieces(sound)])
            except (UserError, ValueError):                                 # `video` finds no file, and says so
                continue
            with vq.atomic(self.heard[-1]) as temporary:
                save_file({"features": features, "sound": sound}, temporary)
        if world > 1:
            dist.barrier()
        if not any(file.exists() for file in self.heard):
            raise UserError(f"--data {self.root}: not one of these {len(self)} videos has sound that can be read")

    def video(self, index):
        if not self.heard[index].exists():
            raise OSError("no sound")
        heard = load_file(self.heard[index])
        features, sound = heard["features"], heard["sound"].numpy()
        video = sample.Video(self.files[index])
        if video.height != video.width:
            raise UserError(f"{self.files[index]}: has {video.width} x {video.height} pixels, expected a square, an "
                            "aligned face; --prepare makes such videos")
        if video.width < self.resolution:
            raise UserError(f"{self.files[index]}: has {video.width} pixels, but {self.resolution} are to be painted; "
                            "--prepare with the same --recipe makes such videos")
        return min(len(video), len(sound) * FPS // SAMPLE_RATE), lambda start, count: self._resized(
            video.clip(start, count)), features, sound

    def _resized(self, frames):
        if frames.shape[3] == self.resolution:
            return frames
        size = (self.resolution, self.resolution)
        frames = torch.nn.functional.interpolate(frames.float(), size, mode="bicubic", antialias=True)
        return frames.round().clamp(0, 255).byte()


class HeadClips:
    """Clips of 16 frames of drawn heads. For a video encoder."""

    kinds = "drawn heads"

    def __init__(self, first, people, frames=16):
        self.first, self.people, self.frames = first, people, frames
        self.fingerprint = f"bare clips of heads {first}+{people} {frames}"

    def __len__(self):
        return self.people

    def clip(self, index, seed):
        frames, _ = talking_head(self.first + index)
        start = int(np.random.default_rng(seed).integers(len(frames) - self.frames + 1))
        return frames[start:start + self.frames]

    def __getitems__(self, items):
        return torch.stack([self.clip(index, seed) for index, seed in items]), torch.zeros(len(items)), []


class ClipFolder(VideoFolder, Clips):
    """Clips of such a folder: of short videos, since of each the whole sound is read for every pair."""

    def __init__(self, root, config, train=True, split=True, **options):
        Clips.__init__(self, config, **options)
        VideoFolder.__init__(self, root, train, split, config, options)

    def video(self, index):
        video, sound = sample.Video(self.files[index]), sample.read_sound(self.files[index])
        clip = lambda start: syncnet.lower_halves(video.clip(start, self.config.frames), self.config)
        window = lambda start: syncnet.mel_window(self.spoiled(index, sound), start, self.config.columns)
        return min(len(video), len(sound) * FPS // SAMPLE_RATE), clip, window

    def whole(self, index):
        """(lower halves of the frames of at most 30 s, sound) of a video, for syncnet.score."""
        frames = itertools.islice(sample.Video(self.files[index]), 30 * FPS)
        halves = [syncnet.lower_halves(torch.from_numpy(f).permute(2, 0, 1)[None], self.config)[0] for f in frames]
        return halves, sample.read_sound(self.files[index])


def open_clips(args, config=None):
    """(training set, validation set) of --data and --val-data, for the network of the flags or of this config.
    Validation data are never spoiled."""
    config, options = config or clip_config(args), dict(audio_offset=args.audio_offset, moments=args.moments)
    if config.latent:
        raise UserError("--model 16_latent: reads latents, which are not made here for training yet")
    if args.data == "demo":
        if config.picture[1] > 64:
            raise UserError(f"--data: recipe {args.recipe} needs a folder of videos; drawn ones have 64 x 64 pixels")
        train = TalkingHeads(config, args.videos, FIRST_HEAD, unaligned=args.unaligned, **options)
        return train, TalkingHeads(config, VAL_HEADS, seconds=8.0)          # real ones have 5 to 10 s
    if args.unaligned:
        raise UserError("--unaligned: is for the drawn videos; those in a folder are as aligned as they are")
    folder = ClipFolder(args.data, config, split=not args.val_data, **options)
    return folder, ClipFolder(args.val_data or args.data, config, train=False, split=not args.val_data)


def open_data(args):
    """(training set, validation set) of a command line."""
    if args.model_name == "syncnet":
        return open_clips(args)
    if args.model_name not in ("whisper", "videomae", "latentsync"):
        return open_pictures(args)
    if args.model_name == "latentsync":
        return open_dubs(args)
    if args.data != "demo":
        raise UserError(f"--data {args.data}: train.py {args.model_name} makes a small stand-in for the demo; its data "
                        "are the drawn heads: demo")
    if args.model_name == "whisper":
        return HeadSpeech(FIRST_HEAD, args.videos), HeadSpeech(0, VAL_HEADS)
    return HeadClips(FIRST_HEAD, args.videos), HeadClips(0, VAL_HEADS)


# What --data demo brings along: flag -> file
DUB_COMPANIONS = {"vae": "talking_head_kl", "whisper": "talking_head_whisper", "syncnet": "talking_head_syncnet",
                  "videomae": "talking_head_videomae"}


def check_dub_args(args):
    """What argparse does not check; of the drawn heads, the networks that go with them."""
    for flag in ("lpips", "videomae", "lpips_weight", "sync_weight", "trepa_weight") if args.stage == "1" else ():
        if getattr(args, flag):
            raise UserError(f"--{flag.replace('_', '-')}: belongs to --stage 2")
    for flag, name in DUB_COMPANIONS.items() if args.data == "demo" else ():
        if getattr(args, flag) is None:
            setattr(args, flag, sample.DEMO / f"{name}.safetensors")
    sample.check_ranges(("--frames", args.frames, 1, None), ("--drop-audio", args.drop_audio, 0, 1),
                        ("--val-videos", args.val_videos, 1, None),
                        *((f"--{name}-weight", getattr(args, f"{name}_weight"), 0, None) for name in (
                            "sync", "trepa", "lpips")))
    most = latentsync.CONFIGS[args.model].motion_length
    if args.stage != "1" and args.frames > most:
        raise UserError(f"--frames {args.frames}: expected at most {most}, which motion modules can tell apart")
    if args.trepa_weight and args.frames % 2:
        raise UserError(f"--frames {args.frames}: TREPA's video encoder takes frames in pairs; choose an even number")
    needed = [("vae", "the autoencoder", True), ("whisper", "the audio encoder", True)]
    if args.stage != "1":
        needed += [(flag, what, getattr(args, f"{weight}_weight")) for flag, what, weight in (
            ("syncnet", "a StableSyncNet, such as stable_syncnet.pt", "sync"),
            ("videomae", "TREPA's video encoder, vit_g_hybrid_pt_1200e_ssv2_ft.pth", "trepa"),
            ("lpips", "VGG16 HEADS, torchvision's vgg16-397923af.pth and LPIPS' vgg.pth", "lpips"))]
    for flag, what, used in needed:
        if used and not getattr(args, flag):
            without = f", or go without it: --{flag.replace('syncnet', 'sync').replace('videomae', 'trepa')}-weight 0"
            raise UserError(f"--{flag}: needed: {what}" + (without if used is not True else ""))
    if args.init and args.stable_diffusion:
        raise UserError("--init and --stable-diffusion exclude each other")


def open_dubs(args):
    """The same for LatentSync."""
    check_dub_args(args)
    resolution = latentsync.CONFIGS[args.model].resolution
    if args.data == "demo":
        if resolution > 64:
            raise UserError(f"--data: recipe {args.recipe} needs a folder of videos; drawn ones have 64 x 64 pixels")
        sample.check_ranges(("--frames", args.frames, 1, 40))               # of 120, of which others must be left
        return HeadDubs(FIRST_HEAD, args.videos, args.frames), HeadDubs(0, VAL_HEADS, args.frames)
    folders = (args.data, True), (args.val_data or args.data, False)
    return [DubFolder(folder, args.frames, resolution, train, not args.val_data) for folder, train in folders]


# ----------------------------------------------------------------------------------------------------------------------
# From videos as they come to clips of aligned faces: `train.py latentsync --prepare`


class Rejected(Exception):
    """Why a video or a piece of one is not used."""


class Piece:
    """Some frames of a sample.Video, likewise to be iterated over, as often as needed."""

    def __init__(self, video, start, count):
        self.video, self.start, self.count = video, start, count
        self.path, self.height, self.width = video.path, video.height, video.width

    def __len__(self):
        return self.count

    def __iter__(self):
        return itertools.islice(self.video.frames(self.start), self.count)


def shots_of(video):
    """Frames with which a new shot begins, from 0 on, and the number of all frames. By PySceneDetect where it is
    installed, which is better at it (the authors' adaptive detector), else where colors change."""
    try:
        from scenedetect import AdaptiveDetector, VideoOpenFailure, detect
        found = detect(str(video.path), AdaptiveDetector(adaptive_threshold=2))
        return sorted({0, *(round(begin.seconds * FPS) for begin, _ in found)}), len(video)
    except ImportError:
        pass
    except VideoOpenFailure:                                                # its reader knows fewer formats
        pass
    cuts, before, count = [0], None, 0
    for i, frame in enumerate(video):
        colors, count = sample.colors_of(Image.fromarray(frame)), i + 1
        if before is not None and sample.is_cut(before, colors):
            cuts.append(i)
        before = colors
    return cuts, count


def pieces_of(cuts, count, length, shortest):
    """Shots as pieces [(first frame, frames)] of `length` frames; what is left over is added to a shot's last piece."""
    pieces = []
    for start, end in zip(cuts, [*cuts[1:], count]):
        starts = list(range(start, max(end - length, start) + 1, length))
        pieces += [(a, b - a) for a, b in zip(starts, [*starts[1:], end]) if b - a >= shortest]
    return pieces


def aligned_faces(piece, args, device):
    """Frames of a piece, aligned, uint8 (3, r, r), as a list: a few less at the end of a video that is shorter than it
    says. Raises Rejected unless all of them show one face, large enough. Landmarks come from NAME.npz beside NAME.mp4,
    as for `sample.py latentsync --landmarks`, or are found."""
    file = piece.path.with_suffix(".npz")
    if file.exists():
        points = sample.given_points(file, piece.start + piece.count)[piece.start:piece.start + piece.count]
    else:
        points = points_of_one_face(piece, args, device)
    missing = int(np.isnan(points).any((1, 2)).sum())
    if missing:
        raise Rejected(f"no face in {missing} of {piece.count} frames")
    align, faces = latentsync.Aligner(args.resolution), []
    for frame, at in zip(piece, points):
        matrix = align(at)
        faces.append(latentsync.align_face(torch.from_numpy(frame), matrix, align.canvas, args.resolution).byte())
    if len(faces) < max(args.shortest, piece.count - FPS):
        raise Rejected(f"ends after {len(faces)} of {piece.count} frames")
    return faces


def points_of_one_face(piece, args, device, smallest=50):
    """Three points (frames, 3, 2) for every frame of a piece, by a detector, nan where it found none. Raises Rejected
    if there is a cut, or anything but one face. Faces of less than so many pixels do not count."""
    every = 1 if device.type == "cuda" else 3
    rows, cuts = sample.find_faces(piece, device, every, instead="NAME.npz with landmarks beside NAME.mp4")
    if cuts:
        raise Rejected(f"another shot begins at frame {piece.start + cuts[0]}")
    side = lambda box: max(box[2] - box[0], box[3] - box[1])
    sides = [[side(box) for box in found if side(box) >= smallest] for found in rows[::every]]
    if max(map(len, sides), default=0) > 1:
        raise Rejected(f"{max(map(len, sides))} faces")
    ranks = sample.points_of_faces(rows, cuts, every)
    if not ranks or not any(sides):
        raise Rejected(f"no face of {smallest} pixels or more")
    median = float(np.median(sum(sides, [])))
    if median < args.min_face:
        raise Rejected(f"a face of {median:.0f} pixels, --min-face is {args.min_face}")
    return ranks[0]


@functools.lru_cache(maxsize=1)
def preparing_judge(path, device):
    """The SyncNet of --prepare."""
    return syncnet.load(sample.find_checkpoint(path), device=device)


def score_aligned(judge, faces, sound):
    """syncnet.score of aligned faces, uint8 (3, r, r), by either network. The original sees such crops of them as it
    was trained on: so do LatentSync's authors."""
    if isinstance(judge, syncnet.OriginalSyncNet):
        crop = sample.judge_crop(np.tile([0.0, 0.0, *faces[0].shape[:0:-1]], (len(faces), 1)))
        faces = (crop(face, i) for i, face in enumerate(faces))
    return syncnet.score(judge, faces, sound)


def in_step(faces, sound, args, device):
    """(offset, confidence) of aligned faces and their sound. Raises Rejected if they do not belong together."""
    try:
        score = score_aligned(preparing_judge(args.syncnet, device.type), faces, sound)
    except ValueError as e:
        raise Rejected(f"SyncNet: {e}") from None
    if score.confidence < args.min_confidence:
        raise Rejected(f"confidence {score.confidence:.2f}, --min-confidence is {args.min_confidence:g}")
    if abs(score.offset) > args.max_offset:
        raise Rejected(f"offset {score.offset:+d} frames, --max-offset is {args.max_offset}")
    return score.offset, score.confidence


@functools.lru_cache(maxsize=1)
def quality_of(name):
    """The function that --quality MODULE:FUNCTION names."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as e:
        raise UserError(f"--quality {name}: {e}; expected MODULE:FUNCTION, of a Python file in this folder or a "
                        "package") from None


@functools.lru_cache(maxsize=1)
def sound_of(source):
    """The sound of a video, for the next piece as well."""
    return sample.read_sound(source)


def prepare_source(source, args):
    """The pieces [(first frame, frames)] of a video. Raises Rejected."""
    try:
        video = sample.Video(source)
        sound_of(source)
        cuts, count = shots_of(video)
    except (UserError, *sample.UNREADABLE) as e:
        raise Rejected(str(e).removeprefix(f"{source}: ").split(";")[0]) from None
    pieces = pieces_of(cuts, count, args.piece * FPS, args.shortest)
    if not pieces:
        raise Rejected(f"too short: {count} frames in {len(cuts)} shots, a clip takes {args.shortest} in one")
    return pieces


def prepare_piece(source, out, start, count, args):
    """Writes one clip -> what to note about it. Raises Rejected."""
    device = sample.choose_device(args.device)[0]
    try:
        faces = aligned_faces(Piece(sample.Video(source), start, count), args, device)
        sound, notes = sound_of(source), {}
    except sample.MissingPackage:                                           # no fault of the video
        raise
    except (UserError, *sample.UNREADABLE) as e:
        raise Rejected(str(e).removeprefix(f"{source}: ").split(";")[0]) from None
    count = len(faces)
    part = lambda sound: sound[start * SAMPLE_RATE // FPS:(start + count) * SAMPLE_RATE // FPS]
    if len(part(sound)) < count * SAMPLE_RATE // FPS - SAMPLE_RATE // FPS:
        raise Rejected("its sound ends too soon")
    if args.syncnet:
        notes["offset"], notes["confidence"] = in_step(faces, part(sound), args, device)
        sound = moved(sound, notes["offset"])                               # what comes too early comes later
    if args.quality:
        pictures = [faces[i].permute(1, 2, 0).numpy() for i in (0, len(faces) // 2, -1)]
        notes["quality"] = float(quality_of(args.quality)(pictures))
        if notes["quality"] < args.min_quality:
            raise Rejected(f"quality {notes['quality']:.1f}, --min-quality is {args.min_quality:g}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with sample.VideoWriter(out, args.resolution, args.resolution, sound=part(sound), crf=13) as video:
        for face in faces:
            video.write(face.permute(1, 2, 0).numpy())
    return notes | {"frames": count}


PREPARED = ("source", "bytes", "start", "verdict", "frames", "offset", "confidence", "quality", "file", "settings")


class Prepared:
    """prepared.csv: a row for every piece, with its reason if it was rejected, and one for every video that is done.
    Rows count as long as their video and their clip are what they were; failures are tried again."""

    def __init__(self, path, sources, settings):
        self.path, self.settings, self.rows = path, settings, []
        if path.exists():
            with open(path, newline="", encoding="utf-8") as f:
                rows = [row for row in csv.DictReader(f) if None not in row.values()]       # the last may be cut off
            other = next((row["settings"] for row in rows if row["settings"] != settings), None)
            if other:
                raise UserError(f"{path}: was made with other settings ({other}; now {settings}); give the same, or "
                                "another --data")
            lost = {row["source"] for row in rows if not self._holds(row, sources)}
            for row in rows:
                if row["verdict"] == "kept" and row["bytes"] != sources.get(row["source"], row["bytes"]):
                    (path.parent / row["file"]).unlink(missing_ok=True)     # of a video that is another one now
            self.rows = [row for row in rows if self._holds(row, sources)
                         and not (row["verdict"] == "done" and row["source"] in lost)]
        write_table(path, self.rows, PREPARED)
        self.known = {(row["source"], row["start"]) for row in self.rows}

    def _holds(self, row, sources):
        return (row["bytes"] == sources.get(row["source"], row["bytes"]) and not row["verdict"].startswith("failed")
                and (row["verdict"] != "kept" or (self.path.parent / row["file"]).is_file()))

    def add(self, **row):
        self.rows.append(row | {"settings": self.settings})
        with open(self.path, "a", newline="", encoding="utf-8") as f:
            csv.DictWriter(f, PREPARED).writerow(self.rows[-1])

    def has(self, source, start=""):
        return (source, str(start)) in self.known

    def summary(self):
        """What was kept, and why the rest was not, the numbers in reasons left out."""
        kept = [row for row in self.rows if row["verdict"] == "kept"]
        why = collections.Counter(re.sub(r"[-+]?[0-9.]+", "..", row["verdict"]) for row in self.rows
                                  if row["verdict"] not in ("kept", "done"))
        seconds = sum(int(row["frames"]) for row in kept) / FPS
        return (f"kept {len(kept)} clips, {seconds / 60:.1f} min" + ("; rejected: " if why else "")
                + ", ".join(f"{n} x {reason}" for reason, n in why.most_common()))


def check_prepare_args(args):
    """What argparse does not check -> (folder of raw videos, folder of clips)."""
    if args.data == "demo":
        raise UserError("--prepare: give the folder that is to hold the clips as --data DIR")
    if args.study:
        raise UserError("--prepare and --study exclude each other")
    sample.check_ranges(("--piece", args.piece, 2, None), ("--min-face", args.min_face, 1, None),
                        ("--max-offset", args.max_offset, 0, 15))
    for flag, needs in (("min_confidence", "syncnet"), ("max_offset", "syncnet"), ("min_quality", "quality")):
        if getattr(args, flag) is not None and not getattr(args, needs):
            raise UserError(f"--{flag.replace('_', '-')}: goes with --{needs}")
    sample.pyav()
    raw, out = Path(args.prepare), sample.check_writable(args.data, "--data")
    if raw.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"--data {out}: lies in the folder of the raw videos; choose one outside of it")
    if args.quality:
        quality_of(args.quality)
        args.min_quality = 40.0 if args.min_quality is None else args.min_quality
    if args.syncnet:
        args.syncnet = str(sample.find_checkpoint(args.syncnet))
        judge = preparing_judge(args.syncnet, "cpu")
        sample.check_judge(judge, f"--syncnet {args.syncnet}", original=True)
        original = isinstance(judge, syncnet.OriginalSyncNet)
        args.min_confidence = (3.0 if original else 0.3) if args.min_confidence is None else args.min_confidence
        args.max_offset = 6 if args.max_offset is None else args.max_offset
    args.resolution, args.shortest = latentsync.CONFIGS[args.model].resolution, 3 * max(16, args.frames)
    args.min_face = args.resolution if args.min_face is None else args.min_face
    return raw, out


def prepare(args):
    """`train.py latentsync --prepare RAW_DIR --data OUT_DIR`: videos at 25 frames a second and their sound at 16 kHz,
    cut where shots end and every few seconds, faces aligned, sound moved into step. What cannot be used is left out,
    and prepared.csv says why; what was done before is not done again."""
    raw, out = check_prepare_args(args)
    paths = {str(path.relative_to(raw)): path for path in videos_in(raw)}
    if not paths:
        raise UserError(f"--prepare {raw}: no videos in it; expected {', '.join(sorted(VIDEOS))}")
    for leftover in out.rglob(f".{'[0-9a-f]' * 12}.*.mp4"):                 # of a run that was killed
        leftover.unlink()
    settings = [f"of {raw.resolve()}", f"{args.resolution} pixels", f"{args.piece} s", f"face {args.min_face}"]
    if args.syncnet:
        settings.append(f"{Path(args.syncnet).name} {args.min_confidence:g} {args.max_offset}")
    if args.quality:
        settings.append(f"{args.quality} {args.min_quality:g}")
    sizes = {source: str(path.stat().st_size) for source, path in paths.items()}
    table = Prepared(out / "prepared.csv", sizes, ", ".join(settings))
    signal.signal(signal.SIGTERM, signal.default_int_handler)               # ends as by Ctrl-C
    left = [source for source in paths if not table.has(source)]
    sources, pieces, open_pieces, jobs = iter(left), collections.deque(), collections.Counter(), {}
    with Crew(args.workers) as crew, tqdm(total=len(left), unit="video") as bar:
        while True:
            while len(jobs) < crew.room and (pieces or (source := next(sources, None))):
                if pieces:                                                  # first what was begun
                    source, start, count = pieces.popleft()
                    file = f"{source}_{start:06d}.mp4"
                    job = crew.submit(prepare_piece, paths[source], out / file, start, count, args)
                    jobs[job] = source, start, file
                else:
                    jobs[crew.submit(prepare_source, paths[source], args)] = source, "", ""
            if not jobs:
                break
            for job in crew.some_done(jobs):
                source, start, file = jobs.pop(job)
                found, verdict = outcome_of(job)
                if start == "" and verdict == "kept":
                    new = [(source, *piece) for piece in found if not table.has(source, piece[0])]
                    pieces.extend(new)
                    open_pieces[source] = len(new)
                elif start == "":
                    table.add(source=source, bytes=sizes[source], start="", verdict=verdict)
                else:
                    notes = found | {"file": file} if verdict == "kept" else {}
                    table.add(source=source, bytes=sizes[source], start=start, verdict=verdict, **notes)
                    open_pieces[source] -= 1
                if not open_pieces[source]:
                    if start != "" or verdict == "kept":
                        table.add(source=source, bytes=sizes[source], start="", verdict="done")
                    bar.update()
    print(f"{table.summary()}; all rows in {table.path}")
    if not args.syncnet:
        print("note: without --syncnet sound and picture are taken to be in step")


def outcome_of(job):
    """(what a job found, "kept" or why not). What is no fault of the video is raised; of other surprises the row says
    that it failed, and the next run tries again."""
    try:
        return job.result(), "kept"
    except Rejected as e:
        return None, str(e)
    except BrokenProcessPool:
        raise UserError("--workers: one of the processes died, out of memory perhaps; what was done is kept: start "
                        "again, with fewer --workers, or 0 to see at which video") from None
    except (UserError, OSError, KeyboardInterrupt):
        raise
    except Exception as e:
        return None, f"failed: {type(e).__name__}: {e}".replace("\n", " ")[:200]


class Crew:
    """Processes that work on jobs, or with none of them this one. room: how many jobs it takes at a time."""

    def __init__(self, workers):
        self.room, self.pool = max(1, 2 * workers), concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), begin_work) if workers else None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.pool:
            self.pool.shutdown(cancel_futures=True)                         # what was begun is finished

    def submit(self, function, *inputs):
        if self.pool:
            return self.pool.submit(function, *inputs)
        job = concurrent.futures.Future()
        try:
            job.set_result(function(*inputs))
        except Exception as e:
            job.set_exception(e)
        return job

    def some_done(self, jobs):
        """Those that are done; waits until there is one."""
        return list(concurrent.futures.wait(jobs, return_when=concurrent.futures.FIRST_COMPLETED).done)


def begin_work():
    """What a process of a Crew begins with: other cores are for others, Ctrl-C for the parent, with which it ends."""
    leave_signals_to_parent(None)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process().sentinel
    end = lambda: (multiprocessing.connection.wait([parent]), os._exit(1))
    threading.Thread(target=end, daemon=True).start()


def clip_config(args):
    """The network that --model, --frames, --embedding and --attention ask for."""
    if args.model not in syncnet.CONFIGS:
        raise UserError(f"--model {args.model}: choose one of {', '.join(syncnet.CONFIGS)}")
    try:
        config = syncnet.variant(syncnet.CONFIGS[args.model], args.frames, args.embedding, args.attention)
    except ValueError as e:
        raise UserError(f"--model {args.model}: {e}; leave --frames and --embedding out, or choose others") from None
    return config


def report_broken(paths, data):
    """Says which files of a set could not be read."""
    if paths:
        tqdm.write(f"skipped {len(paths)} unreadable of {len(data)} {data.kinds.split(',')[0]}: "
                   + ", ".join(sorted(paths)[:3]))


class Batches:
    """Endless lists of (index, crop seed), a function of seed and step alone: that makes runs resumable.

    Every epoch is a new permutation; its last batch is filled from the epoch's start. A step's batch is cut into
    contiguous parts; process `rank` of `world` gets parts rank, rank + world, ... groups: arrays of indices, such as
    the pictures of one aspect ratio; a batch comes from one of them, and batches come in random order. shards: in which
    tar file each item is, see `permuted`.
    """

    def __init__(self, groups, batch_size, seed, first=0, parts=1, rank=0, world=1, shards=None, window=1):
        self.groups, self.batch_size, self.seed, self.first = groups, batch_size, seed, first
        self.parts, self.mine, self.shards, self.window = parts, range(rank, parts, world), shards, window

    def permuted(self, group, rng):
        """A group in random order. Items in tar files are read faster in the order in which they lie there: the files
        come in random order, and what lies in them goes through a shuffle buffer of `window` items."""
        if self.shards is None:
            return group[rng.permutation(len(group))]
        turn = rng.permutation(self.shards.max() + 1)
        group = group[np.argsort(turn[self.shards[group]], kind="stable")]
        starts = range(0, len(group), self.window)
        return np.concatenate([rng.permutation(group[start:start + self.window]) for start in starts])

    def __iter__(self):
        share = self.batch_size // self.parts
        plan = [(i, b) for i, group in enumerate(self.groups) for b in range(-(-len(group) // self.batch_size))]
        step, orders, orders_of = self.first, None, None
        while True:
            epoch, n = divmod(step, len(plan))
            if orders_of != epoch:
                rng, orders_of = np.random.default_rng((self.seed, epoch)), epoch
                orders = [self.permuted(group, rng) for group in self.groups]
                turns = rng.permutation(len(plan)) if len(orders) > 1 else range(len(plan))
            group, b = plan[turns[n]]
            chosen = orders[group][(b * self.batch_size + np.arange(self.batch_size)) % len(orders[group])]
            for part in self.mine:
                yield [(int(i), (self.seed, epoch, int(i))) for i in chosen[part * share:(part + 1) * share]]
            step += 1


def spread(n, most):
    """At most so many of n validation pictures, spread over the classes: items for __getitems__."""
    count = min(n, most)
    return [(i * n // count, None) for i in range(count)]


# ----------------------------------------------------------------------------------------------------------------------
# What is particular to each model: a task has a model, a loss, a validation, a picture and a file to write


class Task:
    """What most of them have in common. Subclasses have loss, validate, picture and save.

    Several processes validate together, each a share, and all get the same scores. learners: {name: (module,
    optimizer)} that are trained besides the model; length: tokens of a picture; parts: of a step's batch;
    UNUSED_WEIGHTS: whether some are, in some steps.
    """

    metrics, val_metrics, learners, length, parts, UNUSED_WEIGHTS = [], ["loss"], {}, 0, 1, False

    @staticmethod
    def whole(model, write=False):
        """A model as one piece, see Run.whole."""
        return nullcontext(model)

    @staticmethod
    def score(scores):
        """What the best checkpoint has most of."""
        return -scores["loss"]

    def after_step(self, step, lr, g):
        """What else happens in a training step -> what there is to log of it."""
        return {}

    def show(self, model, path):
        """Leaves a picture of what the model does at `path`, whose suffix is up to it."""
        sample.save_png(path.with_suffix(".png"), self.picture(model))

    def sync_average(self, average):
        """What the weight average has to take over at once."""

    def identity(self):
        """What else a resumed run has to have the same, besides settings and data."""
        return {"tokenizer": vq.fingerprint(self.tokenizer)} if hasattr(self, "tokenizer") else {}

    def cached(self, train_set, val_set, patch_nums):
        """The sets, or with --cache-crops their tokens."""
        if self.args.cache_crops == "0":
            return train_set, val_set
        cache = lambda pictures, crops, tag: TokenCache(
            pictures, self.tokenizer, patch_nums, crops, self.device, self.args.out, tag)
        return cache(train_set, self.args.cache_crops, "train"), cache(val_set, "1", "val")

    def tokens(self, batch, patch_nums):
        """Indices per scale, from cached tokens or from pictures."""
        if batch[0].dim() == 2:
            return batch[0].to(self.device).split([h * w for h, w in vq.as_pairs(patch_nums)], 1)
        with torch.autocast(self.device.type, enabled=False):               # half precision would change tokens
            return self.tokenizer.tokenize(sample.to_input(batch[0], self.device), patch_nums)

    def val_size(self):
        """How many pictures to validate at once: no more than are trained on at once."""
        return max(1, min(32, self.args.batch_size // self.parts))

    def mean_scores(self, scores, groups, size=None):
        """Means over validation pictures of what scores(batch, generator) says; groups: lists of items, none of which
        mix, in batches of that size."""
        size = size or self.val_size()
        batches = [items[start:start + size] for items in groups for start in range(0, len(items), size)]
        sums = [{key: value.item() * len(items) for key, value in found.items()}
                for items, found in self.shared(batches, scores)]
        return {key: sum(one[key] for one in sums) / sum(map(len, groups)) for key in sums[0]}

    def shared(self, batches, find):
        """[(items, find(batch, generator))] of batches of validation items: every process finds some, and gets all."""
        rank, world = place_of_process()
        found = {k: find(self.val_set.__getitems__(batches[k]), torch.Generator(self.device).manual_seed(k))
                 for k in range(rank, len(batches), world)}
        found = {k: v for one in of_all(found) for k, v in one.items()}
        return [(items, found[k]) for k, items in enumerate(batches)]

    @torch.no_grad()
    def drawn(self, n, draw):
        """A grid of n samples, draw(part, generators) -> (B, 3, h, w), few at a time: large models need memory."""
        parts = [slice(i, min(i + 4, n)) for i in range(0, n, 4)]
        seeds = lambda part: [torch.Generator(self.device).manual_seed(i) for i in range(part.start, part.stop)]
        return sample.grid(sample.to_pixels(torch.cat([draw(part, seeds(part)) for part in parts])), 8)


class TokenizerTask(Task):
    """`train.py vq`: pixel, quantizer, LPIPS and adversarial losses; codes start from features and are restarted."""

    NETWORK, LOAD = vq.VQVAE, staticmethod(vq.load)
    metrics = ["l1", "l2", "lpips", "adv", "vq", "usage", "disc", "restarted"]
    val_metrics, UNUSED_WEIGHTS = ["psnr", "usage"], True                   # a codebook that is not in use yet

    @staticmethod
    def score(scores):
        return scores["psnr"]

    def __init__(self, args, train_set, val_set, device, g):
        self.args, self.train_set, self.val_set, self.device = args, train_set, val_set, device
        config = vq.CONFIGS[args.model]
        self.check_size(config)
        self.model = vq.build(self.NETWORK, config).to(device)
        self.model.init_weights(g)
        if args.init:
            warm_start(self.model, self.LOAD(args.init), f"--init {args.init}")
            args.warm_steps = 0                                             # its codes are not to be drawn anew
        lpips = discriminator = None
        if bool(args.lpips) != bool(args.lpips_weight):
            raise UserError("LPIPS needs both: --lpips VGG16 HEADS (torchvision's vgg16-397923af.pth, LPIPS' vgg.pth) "
                            "and a --lpips-weight above 0; with --lpips-weight 0 training goes without it")
        if args.disc_weight:
            discriminator = vq.PatchDiscriminator() if args.disc == "patch" else vq.StyleDiscriminator(args.size)
            discriminator.to(device).init_weights(g)
            optimizer = torch.optim.AdamW(discriminator.parameters(), args.lr, args.betas, weight_decay=0.0)
            self.learners = {"discriminator": (discriminator, optimizer)}
        if args.lpips:
            lpips = vq.load_lpips(*args.lpips).to(device)
        self.pairs, self.pairs_of, self.moved = [], 0, None                 # pictures of this step; codes it restarted
        self.ready = None                                                   # whether there are codes
        self.criterion = vq.TokenizerLoss(lpips, discriminator, l1=args.l1, l2=args.l2, lpips_weight=args.lpips_weight,
                                          disc_weight=args.disc_weight, disc_start=args.disc_start,
                                          adaptive=args.adaptive, gan=args.gan)
        if args.disc_weight:
            self.opponent = data_parallel(discriminator, self.criterion.discriminator_loss)

    def check_size(self, config):
        """Makes sure that --size is that of the schedule."""
        cells, _ = vq.as_pairs(config.patch_nums)[-1]
        if self.args.size != config.stride * cells:
            raise UserError(f"--size {self.args.size}: recipe {self.args.recipe} has stride {config.stride} and ends "
                            f"with a {cells}x{cells} map; use --size {config.stride * cells}")

    def loss(self, batch, step, g):
        image = sample.to_input(batch[0], self.device)
        if self.ready is None:
            self.ready = step >= self.args.warm_steps                       # a run that is continued has codes by then
        rec, vq_loss, usage = self.model(image, quantize=step >= self.args.warm_steps)
        loss, metrics = self.judged(image, rec.float(), vq_loss, step)
        return loss, metrics if usage is None else metrics | {"usage": usage}           # (K,) one number per scale

    def judged(self, image, rec, vq_loss, step):
        """The criterion's loss and its parts; the pictures wait for the discriminator's turn."""
        self.pairs, self.pairs_of = self.pairs if self.pairs_of == step else [], step
        self.pairs.append((image, rec.detach()))
        if self.criterion.adversarial(step):
            self.criterion.discriminator.requires_grad_(False)              # it learns in its own turn only
        return self.criterion(image, rec, vq_loss, step, self.model.decoder.conv_out.weight)

    def after_step(self, step, lr, g):
        """What else happens in a training step: the discriminator's update, and the care of the codebook."""
        args, metrics, self.moved = self.args, {}, None
        if self.criterion.adversarial(step):
            metrics["disc"] = self._update_discriminator(lr)
        if not self.ready and step + 1 >= args.warm_steps:                  # later, if that step was skipped
            self.ready = True
            with self.codes(self.model) as model:
                self.moved = torch.ones_like(model.quantize.idle, dtype=torch.bool)
                model.quantize.init_codebook(self._features(model, g), g)
        elif args.restart_after and step % 50 == 49 and args.warm_steps < step < args.restart_until * args.steps:
            with self.codes(self.model) as model:
                self.moved = model.quantize.idle > args.restart_after * self.parts          # idle counts forward passes
                metrics["restarted"] = torch.tensor(float(
                    model.quantize.restart_codes(self._features(model, g), self.moved, g)))
        return metrics

    @contextmanager
    def codes(self, model):
        """To change the codebook: all processes do it alike, and then have what the first one has."""
        with self.whole(model, write=True) as model:
            yield model
            if dist.is_initialized():
                dist.broadcast(model.quantize.codebook.data, 0)

    def sync_average(self, average):
        """Codes that jumped must jump in the weight average too, or it would hold dead ones for thousands of steps."""
        if self.moved is not None:
            with self.whole(self.model) as model, self.codes(average) as average:
                average.quantize.codebook.data[self.moved] = model.quantize.codebook.data[self.moved]

    def _update_discriminator(self, lr):
        (discriminator, optimizer), losses = self.learners["discriminator"], []
        discriminator.requires_grad_(True)
        for image, rec in self.pairs:
            with synchronized(self.opponent, last=len(losses) + 1 == len(self.pairs)):
                losses.append(self.opponent(image, rec))
                (losses[-1] / len(self.pairs)).backward()
        norm = torch.nn.utils.clip_grad_norm_(discriminator.parameters(), self.args.clip)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).detach().mean()

    @torch.no_grad()
    def _features(self, model, g):
        """Features of 128 random training pictures, to take codes from."""
        index = torch.randint(len(self.train_set), (128,), generator=g, device=self.device).tolist()
        pixels, _, _ = self.train_set.__getitems__([(i, (i,)) for i in index])
        return model.encode(sample.to_input(pixels, self.device))

    @torch.no_grad()
    def validate(self, model):
        """Mean PSNR in dB over the validation pictures, and how far they use the codes, in percent."""
        def find(batch, g):
            image = sample.to_input(batch[0], self.device)
            indices = model.tokenize(image)
            return sample.psnr(model.detokenize(indices), image).cpu(), torch.cat(indices, 1).cpu()
        psnr, tokens = zip(*(found for _, found in self.shared(self.val_batches(), find)))
        usage = model.quantize.coverage([torch.cat(tokens)], model.config)
        return {"psnr": torch.cat(psnr).mean().item(), "usage": usage}

    def val_batches(self):
        """Up to 1,024 validation items, in batches."""
        items, size = spread(len(self.val_set), 1024), self.val_size()
        return [items[start:start + size] for start in range(0, len(items), size)]

    @torch.no_grad()
    def picture(self, model):
        """Validation pictures, each beside its reconstruction."""
        image = sample.to_input(self.val_set.__getitems__(spread(len(self.val_set), 32))[0], self.device)
        pairs = torch.stack([image, model.reconstruct(image)], 1).flatten(0, 1)
        return sample.grid(sample.to_pixels(pairs.add(1).div(2)), 8)

    def save(self, model, path, dtype):
        vq.save(model, path, dtype, size=self.args.size)


class AutoencoderTask(TokenizerTask):
    """`train.py vq` with a KL head: the same losses, the divergence instead of the quantizer's."""

    NETWORK, LOAD = vq.KLAutoencoder, staticmethod(vq.load_autoencoder)
    metrics = ["l1", "l2", "lpips", "adv", "vq", "disc"]
    val_metrics = ["psnr", "std"]

    def check_size(self, config):
        if self.args.size % config.stride:
            raise UserError(f"--size {self.args.size}: expected a multiple of {config.stride}")

    def loss(self, batch, step, g):
        image = sample.to_input(batch[0], self.device)
        rec, kl = self.model(image, g)
        return self.judged(image, rec.float(), self.args.kl_weight * kl, step)

    def after_step(self, step, lr, g):
        return {"disc": self._update_discriminator(lr)} if self.criterion.adversarial(step) else {}

    def sync_average(self, average):
        pass

    @torch.no_grad()
    def validate(self, model):
        """Mean PSNR in dB over the validation pictures, and the standard deviation of scaled latents."""
        def find(batch, g):
            image = sample.to_input(batch[0], self.device)
            latents = model.encode(image).sample()
            return sample.psnr(model.decode(latents).clamp(-1, 1), image).cpu(), latents.cpu()
        psnr, latents = zip(*(found for _, found in self.shared(self.val_batches(), find)))
        return {"psnr": torch.cat(psnr).mean().item(), "std": torch.cat(latents).std().item()}

    @torch.no_grad()
    def save(self, model, path, dtype):
        """With the scaling that gives latents a standard deviation of 1, measured on the validation pictures."""
        read = lambda items: sample.to_input(self.val_set.__getitems__(items)[0], self.device)
        latents = torch.cat([model.encode(read(items)).sample() for items in self.val_batches()])
        config = model.config
        model.config = replace(config, scaling=config.scaling / max(latents.std().item(), 1e-6))
        super().save(model, path, dtype)
        model.config = config


class VARTask(Task):
    """`train.py var`: cross entropy of every token given all coarser scales and the class; the tokenizer is frozen."""

    metrics = ["accuracy", "tail_loss", "tail_accuracy"]
    val_metrics = ["loss", "accuracy", "tail_loss", "tail_accuracy"]

    @staticmethod
    def score(scores):
        return -scores["tail_loss"]                                         # the authors go by the last scale's

    def __init__(self, args, train_set, val_set, device, g):
        import var
        self.args, self.device, self.classes = args, device, train_set.classes
        config = replace(var.CONFIGS[args.model], num_classes=len(train_set.classes))
        if args.depth:
            width = config.width // config.depth * args.depth
            config = replace(config, depth=args.depth, width=width, heads=args.depth)
        self.tokenizer = vq.load(args.vae, patch_nums=config.patch_nums).to(device)
        if args.init:
            fresh = torch.Generator().manual_seed(args.seed)                # of new class embeddings
            self.model = var.load(args.init, num_classes=len(train_set.classes), generator=fresh).to(device)
            sample.check_pair(self.tokenizer, args.vae, self.model.config, sample.read_metadata(args.init), args.init)
        else:
            expected = (self.tokenizer.config.vocab_size, self.tokenizer.config.z_channels)
            config = replace(config, vocab_size=expected[0], z_channels=expected[1])
            self.model = vq.build(var.VAR, config).to(device)
            self.model.init_weights(args.init_gamma, g)
        self.patch_nums = self.model.config.patch_nums
        side = self.tokenizer.config.stride * self.patch_nums[-1]
        if args.size != side:
            raise UserError(f"--size {args.size}: this model draws {side}x{side} pictures; use --size {side}")
        self.length = sum(p * p for p in self.patch_nums)
        self.train_set, self.val_set = self.cached(train_set, val_set, self.patch_nums)

    def loss(self, batch, step, g):
        indices = self.tokens(batch, self.patch_nums)
        features = self.tokenizer.quantize.teacher_input(indices, self.patch_nums)
        return self.model.loss(batch[1].to(self.device), torch.cat(tuple(indices), 1), features, generator=g)

    @torch.no_grad()
    def validate(self, model):
        """Mean loss and accuracy over the validation pictures, without class dropping."""
        def scores(batch, g):
            indices = self.tokens(batch, self.patch_nums)
            features = self.tokenizer.quantize.teacher_input(indices, self.patch_nums)
            loss, metrics = model.loss(batch[1].to(self.device), torch.cat(tuple(indices), 1), features, class_drop=0.0)
            return metrics | {"loss": loss}
        return self.mean_scores(scores, [spread(len(self.val_set), 1024)])

    def picture(self, model):
        """One sample of each of 32 classes, spread over the list."""
        labels = torch.tensor([i for i, _ in spread(len(self.classes), 32)])
        return self.drawn(len(labels), lambda part, generators: model.sample(
            self.tokenizer, labels[part], generator=generators, **self.args.sampling))

    def save(self, model, path, dtype):
        import var
        show = [c for c in self.args.show if c in self.classes]
        var.save(model, path, dtype, classes=self.classes, show=show, sampling=self.args.sampling,
                 tokenizer=vq.fingerprint(self.tokenizer))


class InfinityTask(Task):
    """`train.py infinity`: cross entropy of every bit given the text and all coarser scales, some of their bits flipped
    (bitwise self-correction). The tokenizer is frozen; so is T5, unless a small one on bytes is trained along."""

    metrics = ["bit_accuracy", "token_accuracy", "scale_accuracy"]
    val_metrics = ["loss", "bit_accuracy", "token_accuracy"]

    def __init__(self, args, train_set, val_set, device, g):
        import infinity
        self.args, self.device, self.infinity = args, device, infinity
        self.train_set, self.val_set = train_set, val_set
        self.tokenizer, config = vq.load(args.vae).to(device), infinity.CONFIGS[args.model]
        t5 = None if args.t5 else infinity.BYTE_T5
        if args.init:
            self.model = infinity.load(args.init, device=device)
        else:
            d = self.tokenizer.config.z_channels
            config = replace(config, bits=4 * d if config.patchify else d, text_width=t5.width if t5 else 2048)
            self.model = vq.build(infinity.Infinity, config, t5).to(device)
            self.model.init_weights(args.init_gamma, g)
        try:
            self.model.check_pair(self.tokenizer)
        except ValueError as e:
            raise UserError(f"--vae {args.vae}: {e}; give the one that {args.init or args.model} goes with") from None
        self.length = sum(h * w for h, w in self._scales()[:args.scales or None])
        self.t5 = self.model.text_encoder
        if self.t5 is None:
            if not args.t5:
                raise UserError(f"--init {args.init}: has no text encoder of its own: give one as --t5 DIR")
            self.t5 = sample.load_t5(args.t5, self.model.config.text_width, device).requires_grad_(False)

    def _encode(self, model, captions):
        """Features and mask of captions; with gradients if the text encoder is trained along."""
        own = model.text_encoder is not None
        with torch.set_grad_enabled(own and torch.is_grad_enabled()):
            return (model.text_encoder if own else self.t5).encode(captions, model.config.text_maxlen)

    def _scales(self, aspect=1.0):
        """The schedule of pictures of that aspect ratio."""
        own = vq.as_pairs(self.tokenizer.config.patch_nums)
        return vq.schedule(aspect, self.args.pixels) if self.args.pixels else own

    def _prepare(self, batch, g, model):
        """Text features, mask, inputs, labels, schedule of a batch."""
        with torch.autocast(self.device.type, enabled=False):               # half precision would change bits
            image = sample.to_input(batch[0], self.device)
            scales = self._scales(image.shape[2] / image.shape[3])
            with torch.no_grad():
                f = self.tokenizer.encode(image)
            inputs, labels = self.infinity.self_correct(self.tokenizer.quantize, f, scales, self.args.strength,
                                                        patchify=model.config.patchify, generator=g)
        if self.args.scales:
            inputs = inputs[:, :sum(h * w for h, w in scales[:self.args.scales]) - 1]
        return *self._encode(model, batch[1]), inputs, labels, scales

    def loss(self, batch, step, g):
        prepared = self._prepare(batch, g, self.model)
        return self.model.loss(*prepared, reweight=self.args.reweight, generator=g)

    @torch.no_grad()
    def validate(self, model):
        """Means over the validation pictures, bits flipped as in training, no prompt dropped."""
        groups = getattr(self.val_set, "groups", [np.arange(len(self.val_set))])

        def scores(batch, g):
            loss, metrics = model.loss(*self._prepare(batch, g, model), text_drop=0.0)
            return {key: loss if key == "loss" else metrics[key] for key in self.val_metrics}
        return self.mean_scores(scores, [[(int(i), None) for i in g[:1024 // len(groups)]] for g in groups])

    def picture(self, model):
        """Samples for captions of training (upper half) and validation pictures."""
        rows = [(data, i) for data in (self.train_set, self.val_set) for i, _ in spread(len(data), 16)]
        captions = [data.__getitems__([(i, None)])[1][0] for data, i in rows]
        return self.drawn(len(captions), lambda part, generators: model.sample(
            self.tokenizer, *self._encode(model, captions[part]), scales=self._scales(), generator=generators,
            **self.args.sampling))

    def save(self, model, path, dtype):
        self.infinity.save(model, path, dtype, show=self.args.show, sampling=self.args.sampling,
                           tokenizer=vq.fingerprint(self.tokenizer), pixels=self.args.pixels)


class LlamaGenTask(Task):
    """`train.py llamagen`: cross entropy of every token given the class or text and all tokens before it. The tokenizer
    is frozen; so is T5, whose features are computed once, unless a small one on bytes is trained along."""

    metrics = ["accuracy"]
    val_metrics = ["loss", "accuracy"]

    def __init__(self, args, train_set, val_set, device, g):
        import infinity
        import llamagen
        self.args, self.device, self.llamagen = args, device, llamagen
        self.tokenizer, config = vq.load(args.vae).to(device), llamagen.CONFIGS[args.model]
        side, left = divmod(args.size, self.tokenizer.config.stride)
        if left:
            raise UserError(f"--size {args.size}: expected a multiple of {self.tokenizer.config.stride}, the stride")
        text, classes = config.text_width > 0, getattr(train_set, "classes", [])
        encoder = infinity.T5Encoder(infinity.BYTE_T5) if text and not args.t5 else None
        self.classes = [] if text else classes
        t5 = sample.load_t5(args.t5, args.text_width, device) if text and args.t5 else None
        width = (encoder or t5).config.width if text else 0
        config = replace(config, side=side, num_classes=len(self.classes), text_width=width, dropout=args.dropout,
                         vocab_size=self.tokenizer.config.vocab_size)
        self.model = vq.build(llamagen.LlamaGen, config, encoder).to(device)
        self.model.init_weights(g)
        if args.init:
            warm_start(self.model, sample.load_llamagen(args.init, side=side), f"--init {args.init}")
            sample.check_fingerprint(self.tokenizer, args.vae, sample.read_metadata(args.init), args.init)
        if args.init_text:
            other = infinity.load(args.init_text).text_encoder
            if other is None or encoder is None:
                raise UserError(f"--init-text {args.init_text}: " + ("has no text encoder" if encoder else "this run "
                                "trains no text encoder; it takes recipe emoji_text without --t5"))
            warm_start(encoder, other, f"--init-text {args.init_text}")
        try:
            self.model.check_pair(self.tokenizer)
        except ValueError as e:
            raise UserError(f"--vae {args.vae}: {e}; train one with train.py vq --recipe llamagen_emoji") from None
        self.features, self.shape, self.length = None, ((side, side),), side * side
        self.train_set, self.val_set = self.cached(train_set, val_set, self.shape)
        if t5 is not None:
            captions = sorted({c for data in (train_set, val_set) for i in range(len(data)) for c in data.captions(i)})
            self.features = FeatureCache(captions, t5, config.text_slots, args.clean, args.out)

    def _prepare(self, batch, model):
        """Conditions, mask and tokens of a batch."""
        tokens, = self.tokens(batch, self.shape)
        return *self._condition(model, batch[1]), tokens

    def _condition(self, model, what):
        """Labels (B,) or captions -> conditions, mask or None."""
        if not model.config.text_width:
            return what.to(self.device), None
        if self.features is not None:
            rows = [self.features[caption].to(self.device) for caption in what]
        else:
            features, mask = model.text_encoder.encode(what, model.config.text_slots)
            lengths = mask.sum(1).tolist() if mask is not None else [features.shape[1]] * len(what)
            rows = [f[:n] for f, n in zip(features, lengths)]
        text, mask = self.llamagen.left_pad(rows, model.config.text_slots)
        return text, mask.to(self.device)

    def loss(self, batch, step, g):
        cond, words, tokens = self._prepare(batch, self.model)
        return self.model.loss(cond, tokens, words, generator=g)

    @torch.no_grad()
    def validate(self, model):
        """Mean loss and accuracy over the validation pictures, without dropping anything."""
        def scores(batch, g):
            cond, words, tokens = self._prepare(batch, model)
            loss, metrics = model.loss(cond, tokens, words, cond_drop=0.0)
            return metrics | {"loss": loss}
        return self.mean_scores(scores, [spread(len(self.val_set), 1024)])

    @torch.no_grad()
    def picture(self, model):
        """One sample of each of 32 classes, or of captions of training (upper half) and validation pictures."""
        if model.config.text_width:
            rows = [(data, i) for data in (self.train_set, self.val_set) for i, _ in spread(len(data), 16)]
            what = [data.__getitems__([(i, None)])[1][0] for data, i in rows]
        else:
            what = torch.tensor([i for i, _ in spread(len(self.classes), 32)])
        return self.drawn(len(what), lambda part, generators: model.sample(
            self.tokenizer, *self._condition(model, what[part]), generator=generators, **self.args.sampling))

    def save(self, model, path, dtype):
        show = [c for c in self.args.show if c in self.classes or not self.classes]
        extra = {"text_encoder": asdict(model.text_encoder.config)} if model.text_encoder is not None else {}
        self.llamagen.save(model, path, dtype, classes=self.classes, show=show, sampling=self.args.sampling,
                           tokenizer=vq.fingerprint(self.tokenizer), **extra)


class SyncNetTask(Task):
    """`train.py syncnet`: binary cross entropy of the cosine of a clip and a sound, which half of the time are of the
    same moment."""

    metrics = ["accuracy"]
    val_metrics = ["loss", "accuracy"]

    def __init__(self, args, train_set, val_set, device, g):
        self.args, self.train_set, self.val_set, self.device = args, train_set, val_set, device
        self.model = vq.build(syncnet.StableSyncNet, train_set.config).to(device)
        self.model.init_weights(g)
        if args.init:
            warm_start(self.model, syncnet.load(args.init), f"--init {args.init}")

    def _inputs(self, batch, model):
        (frames, mel), labels, _ = batch
        return model.prepare(frames.to(self.device)), mel[:, None].to(self.device), labels.to(self.device)

    def loss(self, batch, step, g):
        if self.args.moments == 1:
            return self.model.loss(*self._inputs(batch, self.model))
        (frames, mel), _, _ = batch                                         # (B, K, F, 3, H, W), (B, K, 80, columns)
        frames = self.model.prepare(frames.to(self.device).flatten(0, 1)).unflatten(0, frames.shape[:2])
        return self.model.loss_of_moments(frames, mel[:, :, None].to(self.device), step < self.args.contrast_steps)

    @torch.no_grad()
    def validate(self, model):
        """Mean loss and accuracy over pairs of the validation videos."""
        def scores(batch, g):
            loss, metrics = model.loss(*self._inputs(batch, model))
            return metrics | {"loss": loss}
        n = len(self.val_set)
        return self.mean_scores(scores, [[(i % n, (i,)) for i in range(self.args.val_pairs)]])

    def picture(self, model):
        """Distance over shifts, of some validation videos."""
        scores = [syncnet.score(model, frames, sound) for frames, sound in self.val_set.some(4)]
        curves = {f"{i}: offset {score.offset:+d}": (range(-15, 16), score.curve.tolist())
                  for i, score in enumerate(scores, 1)}
        return sample.chart(curves, "validation videos", sample.SHIFTS, "distance", y_range=(0, 1))

    def save(self, model, path, dtype):
        syncnet.save(model, path, dtype)


class MouthReader(torch.nn.Module):
    """Whisper's encoder, and a linear layer that reads off its last block what the mouth does."""

    def __init__(self, config):
        super().__init__()
        self.whisper, self.head = latentsync.Whisper(config), torch.nn.Linear(config.width, 3)

    def forward(self, mel):
        """(B, mels, n) -> (B, n / 2, 3), n at most 2 * positions; what is missing is filled up as when dubbing."""
        room = 2 * self.whisper.config.positions - mel.shape[2]
        last = self.whisper(torch.nn.functional.pad(mel, (0, room)))[:, :mel.shape[2] // 2, -1]
        return self.head(self.whisper.ln_post(last))

    @torch.no_grad()
    def init_weights(self, generator=None):
        """PyTorch's default, drawn from `generator`."""
        vq.init_default(self, generator)


class WhisperTask(Task):
    """`train.py whisper`: an ear for the demo. OpenAI's learnt to write down speech; this one, from synthesized voices,
    to tell what the mouth does."""

    metrics = []

    def __init__(self, args, train_set, val_set, device, g):
        self.args, self.train_set, self.val_set, self.device = args, train_set, val_set, device
        self.model = vq.build(MouthReader, latentsync.WHISPERS[args.model]).to(device)
        self.model.init_weights(g)

    def _loss(self, batch, model):
        return torch.nn.functional.mse_loss(model(batch[0].to(self.device)), batch[1].to(self.device))

    def loss(self, batch, step, g):
        return self._loss(batch, self.model), {}

    @torch.no_grad()
    def validate(self, model):
        """Mean squared error on voices that it never heard."""
        items = [(i, None) for i in range(len(self.val_set))]
        return {"loss": self._loss(self.val_set.__getitems__(items), model).item()}

    @torch.no_grad()
    def picture(self, model):
        """How far the mouth of an unheard voice opens, and what was understood."""
        mel, mouth, _ = self.val_set.__getitems__([(0, None)])
        seconds = [i / 50 for i in range(mouth.shape[1])]
        found = model(mel.to(self.device))[0, :, 0].tolist()
        return sample.chart({"true": (seconds, mouth[0, :, 0].tolist()), "heard": (seconds, found)},
                            "an unheard voice", "s", "mouth open", y_range=(-0.2, 1.4))

    def save(self, model, path, dtype):
        latentsync.save(model.whisper, path, dtype)


class MaskedVideo(torch.nn.Module):
    """A video encoder that sees a quarter of a clip's places, and a small decoder that fills in the rest (VideoMAE,
    arXiv 2203.12602). The places are the same in all frames, or the frame before would tell."""

    def __init__(self, config, width=64, depth=2):
        super().__init__()
        self.videomae = latentsync.VideoMAE(config)
        c = replace(config, width=width, depth=depth, hidden=4 * width, classes=0)
        self.inward, self.unseen = torch.nn.Linear(config.width, width), torch.nn.Parameter(torch.zeros(width))
        self.decoder = latentsync.VideoMAE(c)                               # of it only positions and blocks
        self.decoder.patch_embed = self.decoder.fc_norm = None
        self.norm = torch.nn.LayerNorm(width)
        self.pixels = torch.nn.Linear(width, 3 * c.tubelet * c.patch**2)

    def forward(self, clips, generator, seen=0.25):
        """Clips (B, 3, F, H, W) in [-1, 1] -> (what is made of all patches, what they are, which were seen: (B, L))."""
        patches = self.videomae.patches(clips)
        tokens, places = self.videomae.embed(patches), (self.videomae.config.size // self.videomae.config.patch) ** 2
        B, L, C = tokens.shape
        order = torch.rand(B, places, generator=generator, device=clips.device).argsort(1)[:, :round(seen * places)]
        index = (order[:, None] + places * torch.arange(L // places, device=clips.device)[:, None]).flatten(1)
        known = self.inward(self.videomae.encode(tokens.gather(1, index[:, :, None].expand(-1, -1, C)))).float()
        x = self.unseen.expand(B, L, -1).scatter(1, index[:, :, None].expand(-1, -1, known.shape[2]), known)
        x = self.decoder.encode(x + self.decoder.positions)
        return self.pixels(self.norm(x)), patches, torch.zeros(B, L, device=x.device).scatter(1, index, 1.0)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """PyTorch's default, drawn from `generator`."""
        vq.init_default(self, generator)


class VideoMAETask(Task):
    """`train.py videomae`: the eye that TREPA needs, for the demo. As the released one's training began, before it went
    on to name actions: masked autoencoding, here of drawn heads."""

    metrics = []

    def __init__(self, args, train_set, val_set, device, g):
        self.args, self.train_set, self.val_set, self.device = args, train_set, val_set, device
        self.model = vq.build(MaskedVideo, latentsync.VIDEOMAES[args.model]).to(device)
        self.model.init_weights(g)

    def _filled(self, batch, model, g):
        pictures = sample.to_input(batch[0].flatten(0, 1), self.device).unflatten(0, batch[0].shape[:2])
        return model(pictures.transpose(1, 2), g)

    def _loss(self, batch, model, g):
        found, true, seen = self._filled(batch, model, g)
        return ((found - true).square().mean(2) * (1 - seen)).sum() / (1 - seen).sum()

    def loss(self, batch, step, g):
        return self._loss(batch, self.model, g), {}

    @torch.no_grad()
    def validate(self, model):
        """Mean squared error of what was filled in, on people that it never saw."""
        items = [[(i % len(self.val_set), (i,)) for i in range(64)]]
        return self.mean_scores(lambda batch, g: {"loss": self._loss(batch, model, g)}, items)

    @torch.no_grad()
    def picture(self, model):
        """Unseen people: every fourth frame as it is, what of it was seen, and with the rest filled in."""
        c, rows = model.videomae.config, []
        found, true, seen = self._filled(self.val_set.__getitems__([(i, (i,)) for i in range(4)]), model,
                                         torch.Generator(self.device).manual_seed(0))
        seen = seen[:, :, None]
        for patches in (true, true * seen, found * (1 - seen) + true * seen):
            frames = rearrange(patches, "b (l h w) (c t p q) -> b (l t) c (h p) (w q)", h=c.size // c.patch,
                               w=c.size // c.patch, t=c.tubelet, p=c.patch, q=c.patch)
            rows.append(frames[:, ::4])
        return sample.grid(sample.to_pixels(torch.stack(rows, 1).flatten(0, 2).clamp(0, 1)), 4)

    def save(self, model, path, dtype):
        latentsync.save(model.videomae, path, dtype)


def mouth_points(faces):
    """Where the mouth of aligned faces (N, 3, H, W) is, (N, 4, 2): left, right, top, bottom, x and y as shares of the
    face's side. No detector of landmarks, but good enough to compare two pictures of one drawn face, whose openings it
    follows (correlation 0.9): what differs from the skin around the mouth, two deviations to each side of its mean."""
    side = faces.shape[3]
    rows, columns = slice(round(0.6 * side), round(0.9 * side)), slice(round(0.32 * side), round(0.68 * side))
    window = faces[:, :, rows, columns]
    skin = window.flatten(2).median(2).values[:, :, None, None]             # more than half of it
    weight = ((window - skin).norm(dim=1) - 0.3).clamp(min=0) + 1e-6
    weight = weight / weight.sum((1, 2), keepdim=True)                      # (N, h, w)
    at = [(torch.arange(s.start, s.stop, device=faces.device) + 0.5) / side for s in (columns, rows)]
    moments = []
    for axis, share in zip(at, (weight.sum(1), weight.sum(2))):             # x, y
        mean = (share * axis).sum(1, keepdim=True)
        moments += [mean, 2 * (share * (axis - mean).square()).sum(1, keepdim=True).sqrt()]
    x, dx, y, dy = (moment[:, 0] for moment in moments)
    return torch.stack([torch.stack(point, 1) for point in ((x - dx, y), (x + dx, y), (x, y - dy), (x, y + dy))], 1)


def compare_faces(painted, true, mask):
    """How near successive painted faces (N, 3, H, W) in [-1, 1] come to the true ones: {"ssim", "lmd", "flicker"}.

    ssim: structural similarity of the faces, 0 .. 1; lmd: distance of `mouth_points`, in % of the face's side;
    flicker: temporal consistency, as how far the change from one frame to the next is from the true one, the mean over
    all that is painted, in levels of 0 .. 255: 0 if what is painted moves, and stands, as the true face does. It is
    that of the means of 16 x 16 cells, so that grain does not count.
    """
    cells = lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 16)
    change = (cells(painted) - cells(true)).diff(dim=0).abs().mean(1) * 127.5           # (N - 1, 16, 16)
    mask = cells(mask[None])[0]
    return {"ssim": sample.ssim(painted, true).mean().item(),
            "lmd": 100 * (mouth_points(painted) - mouth_points(true)).norm(dim=2).mean().item(),
            "flicker": (change * (1 - mask)).sum().item() / (len(change) * (1 - mask).sum().item())}


class LatentSyncTask(Task):
    """`train.py latentsync`: the noise of true frames, given them masked, other frames and the sound; in stage 2 also
    what is seen of the frames without that noise. All networks but the UNet are frozen."""

    MOTION = {"1": "none", "2": "all", "2-efficient": "up"}                 # levels with motion modules
    STEPS = 10                                                              # of painting, when it is judged

    def __init__(self, args, train_set, val_set, device, g):
        self.args, self.train_set, self.val_set, self.device = args, train_set, val_set, device
        config = replace(latentsync.CONFIGS[args.model], motion=self.MOTION[args.stage], frames=args.frames)
        self.load_frozen(config)
        self.mask = latentsync.face_mask(config.resolution).to(device)
        self.model = vq.build(latentsync.UNet, config).to(device)
        self.model.init_weights(g)
        if args.stable_diffusion:
            latentsync.start_from_stable_diffusion(self.model, args.stable_diffusion)
        if args.init:
            warm_start(self.model, latentsync.load(sample.find_checkpoint(args.init)), f"--init {args.init}")
        elif args.stage != "1":
            raise UserError(f"--stage {args.stage}: trains attention and motion modules only; give what stage 1 has "
                            "made, or a released file, as --init FILE")
        self.model.freeze(args.stage)
        for data in (train_set, val_set):
            data.listen(self.whisper, args)
            data.columns = self.syncnet.config.columns if self.supervision and args.sync_weight else None
        self.metrics = ["noise", *self.supervision.weights] if self.supervision else []
        self.val_metrics = ["loss", "ssim", "lmd", "flicker", *(["sync_c", "offset"] if self.critic else [])]

    def load_frozen(self, config):
        """The networks that are not trained, in the precision of the run on a GPU."""
        args, half = self.args, self.args.dtype != "fp32" and self.device.type == "cuda"
        place = lambda model: model.to(self.device, sample.DTYPES[args.dtype] if half else None).requires_grad_(False)
        find = sample.find_checkpoint
        self.autoencoder = vq.load_autoencoder(find(args.vae))
        self.latents = vq.fingerprint(self.autoencoder)                     # before it is rounded
        place(self.autoencoder)
        self.whisper = latentsync.load_whisper(find(args.whisper), device=self.device).requires_grad_(False)
        if self.whisper.config.width != config.audio_width:
            raise UserError(f"--whisper {args.whisper}: its features are {self.whisper.config.width} wide, but "
                            f"{args.model} listens to {config.audio_width}")
        self.syncnet = videomae = lpips = self.supervision = None
        if args.syncnet:
            self.syncnet = place(syncnet.load(find(args.syncnet)))
            self.check_syncnet(config)
        self.critic = self.syncnet
        if args.judge:
            self.critic = syncnet.load(find(args.judge), device=self.device).requires_grad_(False)
            sample.check_judge(self.critic, f"--judge {args.judge}", original=True)
        if args.stage == "1":
            return
        if args.trepa_weight:
            videomae = place(latentsync.load_videomae(find(args.videomae)))
        if args.lpips_weight:
            lpips = vq.load_lpips(*map(find, args.lpips)).to(self.device)
        self.supervision = latentsync.Supervision(
            self.autoencoder, self.syncnet if args.sync_weight else None, videomae, lpips, frames=args.frames,
            sync_weight=args.sync_weight, trepa_weight=args.trepa_weight, lpips_weight=args.lpips_weight,
            checkpointing=args.checkpointing)

    def identity(self):
        """The networks that are not trained, and the start."""
        given = {flag: getattr(self.args, flag) for flag in ("init", "vae", "whisper", "syncnet", "judge", "videomae")}
        places = {flag: sample.find_checkpoint(name) for flag, name in given.items() if name}
        return {flag: content_of(path, 2**20) if Path(path).is_file() else str(path) for flag, path in places.items()}

    def check_syncnet(self, config):
        """Makes sure that --syncnet can look at these clips."""
        model, name = self.syncnet, self.args.syncnet
        sample.check_judge(model, f"--syncnet {name}")
        if self.args.stage != "1" and self.args.sync_weight and model.frames != config.frames:
            raise UserError(f"--syncnet {name}: is made for clips of {model.frames} frames, but clips have "
                            f"{config.frames}; choose --frames {model.frames}, or another one")

    @torch.no_grad()
    def _prepare(self, batch, g):
        """Latents (B, 4, F, h, w), condition (B, 9, F, h, w), audio (B, F, 50, C), true frames (B, F, 3, H, W), what
        SyncNet hears."""
        (clips, references), (audio, mel), _ = batch
        true, others = (sample.to_input(x.flatten(0, 1), self.device) for x in (clips, references))
        z = self.autoencoder.encode(true).sample(g)
        condition = latentsync.see(self.autoencoder, true * self.mask, others, self.mask, g)
        to_clips = lambda x: x.float().unflatten(0, clips.shape[:2])
        z, condition = (to_clips(x).transpose(1, 2) for x in (z, condition))
        return z, condition, audio.to(self.device), to_clips(true), mel.to(self.device)[:, None]

    def loss(self, batch, step, g):
        z, condition, audio, true, mel = self._prepare(batch, g)
        heard = torch.ones(len(z), device=self.device)
        if self.args.drop_audio:
            heard = (torch.rand(len(z), generator=g, device=self.device) >= self.args.drop_audio).float()
            audio = audio * heard.view(-1, 1, 1, 1)
        noise, clean = self.model.loss(z, condition, audio, g)
        if self.supervision is None:
            return noise, {}
        seen, losses = self.supervision(clean, true, mel, heard)
        return noise + seen, {"noise": noise, **losses}

    @torch.no_grad()
    def validate(self, model):
        """The noise loss on unseen people, always with the same noise; and how well some of them are painted."""
        def scores(batch, g):
            with self.half():
                return {"loss": model.loss(*self._prepare(batch, g)[:3], g)[0]}
        items = [(i % len(self.val_set), (i,)) for i in range(max(1, 128 // self.args.frames))]
        losses = self.mean_scores(scores, [items], max(1, 32 // self.args.frames))
        return losses | self.judge(model, self.args.val_videos)

    def half(self):
        """The precision of training."""
        return torch.autocast(self.device.type, sample.DTYPES[self.args.dtype], enabled=self.args.dtype != "fp32")

    def painted(self, model, index):
        """(painted, true faces (N, 3, H, W) in [-1, 1], sound) of one unseen video: its own words, but the reference is
        of other moments, so that nothing can be copied. Without a model the true faces twice."""
        clips = self.args.val_clips * -(-16 // self.args.frames)
        readable = first_readable(lambda i: self.val_set.scene(i, (index,), clips), from_on(index, len(self.val_set)),
                                  self.val_set.name, [])
        if readable is None:
            raise self.val_set.useless()
        seen, others, audio, sound, start = readable[1]
        sound = sound[start * SAMPLE_RATE // FPS:]
        if model is None:
            return *[sample.to_input(seen, self.device)] * 2, sound
        g, c, F, found = torch.Generator(self.device).manual_seed(index), model.config, self.args.frames, []
        side = c.resolution // self.autoencoder.config.stride
        z = torch.randn(1, c.out_channels, 1, side, side, generator=g, device=self.device)
        true, others = (sample.to_input(x, self.device) for x in (seen, others))
        for start in range(0, len(true), F):
            part = slice(start, start + F)
            with self.half():
                found.append(latentsync.paint(
                    model, self.autoencoder, true[part], audio[part].to(self.device), z, self.mask, g,
                    self.STEPS, self.args.sampling["cfg"], references=others[part])[0].float())
        return torch.cat(found).clamp(-1, 1), true, sound

    @torch.no_grad()
    def judge(self, model, videos):
        """Means over unseen videos of `compare_faces`; with a SyncNet also of sync_c, its confidence, and of offset,
        how many frames it finds the sound off."""
        scores, (rank, world) = {}, place_of_process()
        mine = range(rank, min(videos, len(self.val_set)), world)
        for index in tqdm(mine, desc="painting", unit="video", leave=False, disable=rank > 0):
            painted, true, sound = self.painted(model, index)
            scores[index] = compare_faces(painted, true, self.mask) | self.sync_of(painted, sound)
        scores = [score for _, score in sorted(item for found in of_all(scores) for item in found.items())]
        return {name: float(np.nanmean([score[name] for score in scores] or [math.nan])) for name in scores[0]}

    def sync_of(self, faces, sound):
        """What SyncNet says about faces (N, 3, H, W) in [-1, 1], if there is one."""
        if self.critic is None:
            return {}
        try:
            score = score_aligned(self.critic, faces.add(1).mul(127.5).round().clamp(0, 255).byte(), sound)
        except ValueError:                                                  # too short for it
            return {"sync_c": math.nan, "offset": math.nan}
        return {"sync_c": score.confidence, "offset": float(abs(score.offset))}

    @torch.no_grad()
    def show(self, model, path):
        """Up to three unseen people, above as they are, below as they are painted, every second frame; and with PyAV a
        video of the first, true and painted, with the sound."""
        rows = []
        for index in range(min(3, self.args.val_videos, len(self.val_set))):
            painted, true, sound = self.painted(model, index)
            rows += [true[:16:2], painted[:16:2]]
            if not index:
                self.film(path.with_suffix(".mp4"), torch.cat([true, painted], 3), sound)
        pictures = sample.grid(sample.to_pixels(torch.cat(rows).add(1).div(2)), len(rows[0]))
        sample.save_png(path.with_suffix(".png"), pictures)

    def film(self, path, faces, sound):
        """Faces (N, 3, H, W) in [-1, 1] as a video."""
        try:
            sample.pyav()
        except UserError:
            return                                                          # the picture will do
        with sample.VideoWriter(path, *faces.shape[2:], sound=sound) as video:
            for frame in sample.to_pixels(faces.add(1).div(2)):
                video.write(frame)

    def save(self, model, path, dtype):
        latentsync.save(model, path, dtype, tokenizer=self.latents, sampling=self.args.sampling,
                        stage=self.args.stage)


def evaluate_syncnet(args):
    """`train.py syncnet --evaluate FILE`: accuracy on pairs of unseen videos, and the offsets found where their sound
    was moved by -7 ... 7 frames."""
    device, why = sample.choose_device(args.device)
    model = syncnet.load(args.evaluate, device=device)
    if isinstance(model, syncnet.OriginalSyncNet):
        raise UserError(f"{args.evaluate}: is the original SyncNet, whose distances say neither yes nor no; it judges "
                        "videos in sample.py syncnet")
    _, unseen = open_clips(args, model.config)
    task = SyncNetTask(args, unseen, unseen, device, torch.Generator(device))
    print(f"{args.evaluate}: {device} ({why}), {len(unseen):,} unseen {unseen.kinds}")
    print("{accuracy:.2%} of {pairs:,} pairs told right (loss {loss:.3f})".format(
        **task.validate(model), pairs=args.val_pairs))
    moves, found = range(-7, 8), {}
    videos = [(frames[:4 * FPS], sound) for frames, sound in unseen.some(10)]
    for move, (frames, sound) in tqdm(list(itertools.product(moves, videos)), unit="video", leave=False):
        found.setdefault(move, []).append(syncnet.score(model, frames, moved(sound, move)).offset)
    print(f"{'sound moved by':>14}{'offset found':>14}{'error':>8}{'exact':>8}     "
          f"(medians of {len(videos)} videos, 4 s of each)")
    for move, offsets in found.items():                                     # what comes late has a negative offset
        errors = np.abs(np.array(offsets) + move)
        print(f"{move:>+14d}{np.median(offsets):>+14.0f}{np.median(errors):>8.0f}{(errors == 0).mean():>8.0%}")
    errors = np.abs([offset + move for move, offsets in found.items() for offset in offsets])
    print(f"median error over all {errors.size}: {np.median(errors):.0f} frames; exact: {(errors == 0).mean():.1%}")


# The small version of the paper's empirical study: what of the recipe "study" is replaced in each run
STUDY = {
    "clips in a batch": {"4": dict(batch_size=1), "12": {}, "36": dict(batch_size=9)},
    "frames of a clip": {"5": dict(frames=5), "16": {}, "25": dict(frames=25)},
    "numbers of an embedding": {"64": dict(embedding=64), "256": {}, "512": dict(embedding=512)},
    "network": {"residual, attention": {}, "residual": dict(attention=False),
                "Wav2Lip's kind": dict(model="talking_head_plain")},
    "training videos": {"clean": {}, "sound moved, up to 10 frames": dict(audio_offset=10),
                        "faces not aligned": dict(unaligned=True)},
    "loss": {"contrast, then cross entropy": {}, "cross entropy alone": dict(contrast_steps=0),
             "the same of single pairs, as in the paper": dict(contrast_steps=0, moments=1, batch_size=12)},
}


def study_syncnet(args):
    """`train.py syncnet --study`: a short run of every setting in STUDY, study.csv with all curves, and a picture."""
    if args.frames or args.embedding or args.attention is not None:
        raise UserError("--study: varies --frames, --embedding and --attention itself; leave them out")
    out, rows, charts = sample.check_writable(args.out), [], []
    for panel, settings in STUDY.items():
        curves = {}
        for label, changes in settings.items():
            name = "_".join([f"{k}_{v}" for k, v in changes.items()]) or "base"     # what all panels share runs once
            one = copy.copy(args)
            vars(one).update(changes, out=str(out / name), resume="auto", sample_every=0,
                             val_every=max(1, args.steps // 6))
            print(f"{panel}: {label}")
            train(one)                                                      # goes on, if it was interrupted
            with open(out / name / "log.csv", encoding="utf-8") as f:
                log = [row for row in csv.DictReader(f) if row["val_loss"]]
            rows += [{"panel": panel, "setting": label} | row for row in log]
            curves[label] = [int(row["step"]) for row in log], [float(row["val_loss"]) for row in log]
        charts.append(sample.chart(curves, panel, "steps", "loss", [(math.log(2), "ln 2: always one half")],
                                   y_range=(0, 0.9), size=(400, 300)))
    write_table(out / "study.csv", rows)
    sample.save_png(out / "study.png", sheet(charts), {"model": "syncnet", "steps": args.steps})
    print(f"curves in {out}/study.csv and {out}/study.png")


# Stage 2 in parts: what of the recipe is replaced in each run
DUB_STUDY = {
    "noise loss alone": dict(sync_weight=0.0, trepa_weight=0.0),
    "with SyncNet": dict(trepa_weight=0.0),
    "with SyncNet and TREPA": {},
}


STUDY_VIDEOS = 16                                                           # unseen ones, to judge each run by


def study_latentsync(args):
    """`train.py latentsync --study`: stage 2 from the same weights and with the same draws for each of DUB_STUDY. All,
    the start and the true frames are judged on unseen videos: study.csv, and a picture of curves and frames."""
    if not args.init:
        raise UserError("--study: give what stage 1 has made as --init FILE")
    out, rows, curves, strips = sample.check_writable(args.out), [], {}, {}
    device, _ = sample.choose_device(args.device)
    task = LatentSyncTask(args, *open_data(args), device, torch.Generator(device).manual_seed(args.seed))

    def judge(label, model):
        rows.append({"": label} | task.judge(model, STUDY_VIDEOS))
        print(", ".join(f"{name} {value:.3f}" if name else value for name, value in rows[-1].items()))
        strips[label] = task.painted(model, 0)[0][8:40:4]
    judge("true frames", None)
    judge("before: stage 1", task.model)
    for label, changes in DUB_STUDY.items():
        one, folder = copy.copy(args), out / label.replace(" ", "_")
        vars(one).update(changes, out=str(folder), resume="auto", sample_every=0)
        print(f"{label}:")
        train(one)                                                          # goes on, if it was interrupted
        with open(folder / "log.csv", encoding="utf-8") as f:
            curves[label] = [row for row in csv.DictReader(f) if row["val_loss"]]
        judge(label, latentsync.load(folder / "model.safetensors", device=device))
    write_table(out / "study.csv", rows)
    names = [name for name in ("sync_c", "flicker", "lmd") if name in rows[0]]
    charts = [sample.chart({label: ([int(row["step"]) for row in log], [float(row[f"val_{name}"]) for row in log])
                            for label, log in curves.items()}, name, "steps", size=(400, 300)) for name in names]
    columns = min(map(len, strips.values()))
    frames = torch.cat([strip[:columns] for strip in strips.values()])
    frames = sample.grid(sample.to_pixels(frames.add(1).div(2)), columns)
    sample.save_png(out / "study.png", sheet(charts), {"model": "latentsync", "steps": args.steps})
    sample.save_png(out / "study_frames.png", frames, {"rows": ", ".join(strips)})
    print(f"table in {out}/study.csv, curves in {out}/study.png, frames in {out}/study_frames.png")


LADDER = (1, 2, 3, 4, 6, 8)                                                # depths; the demo's are 32 wide per block


def scaling_laws(args):
    """`train.py var --scaling-laws`: section 4.2 of VAR's paper in small. Models of all depths in LADDER see the same
    batches; what they reach on unseen pictures is fitted as loss = a N^alpha, N the number of parameters, a straight
    line between logarithms: scaling.csv, with the correlation coefficients in scaling.png. --lr is that of the
    recipe's own depth; the wider a model, the lower the best rate (muP, arXiv 2203.03466)."""
    import var
    out, rows, usual = sample.check_writable(args.out), [], var.CONFIGS[args.model].depth
    for depth in LADDER:
        one, folder = copy.copy(args), out / f"d{depth}"
        vars(one).update(depth=depth, lr=args.lr * usual / depth, out=str(folder), resume="auto", sample_every=0)
        print(f"depth {depth}:")
        train(one)                                                          # goes on, if it was interrupted
        with open(folder / "log.csv", encoding="utf-8") as f:
            last = [row for row in csv.DictReader(f) if row["val_loss"]][-1]
        state, names = load_file(folder / "model.safetensors"), ("loss", "tail_loss", "accuracy", "tail_accuracy")
        rows.append({"depth": depth, "parameters": sum(p.numel() for p in state.values()), "steps": int(last["step"]),
                     **{name: float(last[f"val_{name}"]) for name in names}})
    write_table(out / "scaling.csv", rows)
    sample.save_png(out / "scaling.png", scaling_charts(rows), {"model": "var", "steps": args.steps})
    print(f"table in {out}/scaling.csv, picture in {out}/scaling.png")


def scaling_charts(rows):
    """Fits the four laws, prints and draws them."""
    sizes, charts = np.array([row["parameters"] for row in rows]), []
    for name, of in (("loss", "loss, all scales"), ("tail_loss", "loss, last scale"),
                     ("accuracy", "error, all scales"), ("tail_accuracy", "error, last scale")):
        found = np.array([1 - row[name] if "accuracy" in name else row[name] for row in rows])
        alpha, offset, r = power_law(sizes, found)
        law = f"{math.exp(offset):.3g} N^{alpha:.4f}, r = {r:.3f}"
        print(f"{of}: {law}")
        points = [(x, y, f"d{row['depth']}") for x, y, row in zip(np.log10(sizes), np.log10(found), rows)]
        ends = [points[0][0] - 0.1, points[-1][0] + 0.1]
        line = ends, [alpha * x + offset / math.log(10) for x in ends]
        charts.append(sample.chart({law: line}, of, "log10 N", "log10", (), points, size=(400, 300)))
    return sheet(charts, 2)


def power_law(sizes, values):
    """(alpha, log a, r) of values = a * sizes^alpha, by least squares between logarithms, whose correlation is r."""
    x, y = np.log(sizes), np.log(values)
    return *np.polyfit(x, y, 1), np.corrcoef(x, y)[0, 1]


def write_table(path, rows, columns=None):
    """Dicts as a CSV file."""
    with vq.atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns or list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def sheet(charts, columns=3):
    """Charts of one size side by side and below each other."""
    charts = charts + [np.full_like(charts[0], 255)] * (-len(charts) % columns)
    return np.concatenate([np.concatenate(charts[i:i + columns], 1) for i in range(0, len(charts), columns)])


TASKS = {"vq": TokenizerTask, "var": VARTask, "infinity": InfinityTask, "llamagen": LlamaGenTask,
         "syncnet": SyncNetTask, "whisper": WhisperTask, "videomae": VideoMAETask, "latentsync": LatentSyncTask}


def task_of(args):
    """The Task of a command line."""
    kl = args.model_name == "vq" and isinstance(vq.CONFIGS[args.model], vq.KLConfig)
    return AutoencoderTask if kl else TASKS[args.model_name]


@torch.no_grad()
def warm_start(model, other, what):
    """Starts from the weights of another model: all that exist there with the same shape. Says which do not; `what` is
    the flag that asked for it."""
    state, fresh = other.state_dict(), []
    for name, p in model.state_dict().items():
        if name in state and state[name].shape == p.shape:
            p.copy_(state[name])
        else:
            fresh.append(name)
    if len(fresh) == len(model.state_dict()):
        raise UserError(f"{what}: none of its weights fits this model; choose the recipe that goes with it")
    if fresh:
        tqdm.write(f"{what}: {len(fresh)} weights start anew: {', '.join(fresh[:4])}")


# ----------------------------------------------------------------------------------------------------------------------
# Optimization


def learning_rate(schedule, step, steps, warmup_steps, warmup_from, final):
    """Learning rate / peak at a step. Linear warm-up, a plateau, then the fall that the schedule is named after.

    lin, lin0, lin00: straight line to `final` after a plateau of 15, 5 or 0 % of the steps; cos: half cosine; exp:
    geometric after 15 %; linT, e.g. lin0.8: two straight lines that meet at share T, half-way between 1 and the single
    line; const: no fall.
    """
    if step < warmup_steps:
        return warmup_from + (1 - warmup_from) * step / warmup_steps
    u = (step - warmup_steps) / max(steps - 1 - warmup_steps, 1)            # 0 .. 1
    if schedule == "const":
        return 1.0
    if schedule == "cos":
        return final + (1 - final) * (0.5 + 0.5 * math.cos(math.pi * u))
    plateau = {"lin": 0.15, "lin0": 0.05, "lin00": 0.0, "exp": 0.15}.get(schedule)
    if plateau is None:
        try:
            bend = float(schedule.removeprefix("lin"))
        except ValueError:
            bend = 0.0
        if not 0 < bend < 1:
            raise UserError(f"--schedule {schedule}: choose lin, lin0, lin00, lin0.8, cos, exp or const")
        middle = (1 + final + (1 - final) * (1 - bend)) / 2
        return 1 + (middle - 1) * u / bend if u < bend else final + (middle - final) * (1 - u) / (1 - bend)
    if u < plateau:
        return 1.0
    if schedule == "exp":
        return max(final, 1e-8) ** ((u - plateau) / (1 - plateau))
    return final + (1 - final) * (1 - u) / (1 - plateau)


def weight_decay(step, steps, start, end):
    """Half a cosine from start to end over the whole run; end 0 means the same as start."""
    end = end or start
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * step / max(steps - 1, 1)))


def parameter_groups(model):
    """AdamW groups: matrices decay; vectors, and what the model names in NO_DECAY (positions, scales), do not."""
    spared = getattr(model, "NO_DECAY", ())
    decays = lambda name, p: p.ndim > 1 and not name.endswith("bias") and not any(word in name for word in spared)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [{"params": [p for n, p in named if decays(n, p)], "decay": 1.0},
            {"params": [p for n, p in named if not decays(n, p)], "decay": 0.0}]


def set_rates(optimizer, lr, wd):
    """Sets the learning rate of all groups and the weight decay of those that decay."""
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr, wd * group["decay"]


@torch.no_grad()
def update_average(average, model, decay, step):
    """Exponential moving average of the weights, with a shorter memory in the first steps; buffers are copied."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for mine, theirs in zip(average.buffers(), model.buffers()):
        mine.copy_(theirs)


# ----------------------------------------------------------------------------------------------------------------------
# Many processes: torchrun starts them, PyTorch's engines make them train as one
#
# A step's batch is cut into parts. Two processes (world 2, ranks 0 and 1) with --accum 2 share four: rank 0 takes
# parts 0 and 2, rank 1 parts 1 and 3. Each goes forward and backward with its own parts and draws; during the backward
# pass of its last one the engine averages all gradients, so that every process clips, judges and applies the same
# ones. With DDP each process has the whole model and all of Adam's numbers; with FSDP a share of both and of the
# average, and the weights of a block are put together when its turn comes, and given up after it. What is written on
# disk, drawn or printed is the first process's business (rank 0), what is validated is shared. `of_all` and everything
# that calls it must be reached by all of them, or they wait for each other for ever.


PATIENCE = timedelta(hours=1)                                               # while the first one draws pictures, say


def join_others(device):
    """Meets the other processes. What is computed goes over NCCL on GPUs, everything else over gloo."""
    if place_of_process()[1] > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)


def of_all(thing):
    """`thing` of every process, in order: a list. All must call it."""
    found = [thing] * place_of_process()[1]
    if dist.is_initialized():
        dist.all_gather_object(found, thing)
    return found


class Objective(torch.nn.Module):
    """A task's loss as the forward pass of a module that holds the task's model. DDP and FSDP act when the module that
    they wrap is called, and a task calls `model.loss`, which no wrapper would see."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *inputs):
        return self.loss(*inputs)


def units(model):
    """The pieces that a model repeats, such as transformer blocks: what is compiled and what is sharded, one by one."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    repeated = [unit for modules in lists for unit in modules]
    nested = {id(m) for unit in repeated for m in unit.modules() if m is not unit}
    return [unit for unit in repeated if id(unit) not in nested]


def data_parallel(model, loss, unused=False):
    """Every process has the whole model and a share of the batch; DDP averages gradients during the backward pass.
    unused: some weights get no gradient in some steps."""
    objective = Objective(model, loss)
    if not dist.is_initialized():
        return objective
    return DistributedDataParallel(objective, gradient_as_bucket_view=True, find_unused_parameters=unused)


def shard(model, dtype):
    """FSDP2: of every weight each process keeps its share; a block's are put together when its turn comes, in the
    precision of the run. What lies outside of blocks stays in float32."""
    keep = dict(reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, **keep)
    for p in model.parameters():
        p.data = p.data.contiguous()                                        # it takes no channels_last
    mesh = init_device_mesh(next(model.parameters()).device.type, (place_of_process()[1],))
    for unit in units(model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        for method in ("prepare", "layer"):                                 # they need the weights as well
            if hasattr(unit, method):
                register_fsdp_forward_method(unit, method)
    return fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(**keep))


@contextmanager
def synchronized(engine, last):
    """Processes exchange gradients in the last backward pass of a step alone; until then they add up (with FSDP those
    of whole weights, which takes memory)."""
    if isinstance(engine, FSDPModule):
        engine.set_requires_gradient_sync(last)
    with engine.no_sync() if isinstance(engine, DistributedDataParallel) and not last else nullcontext():
        yield


def full(x):
    """A tensor, or what all shards of one make together. All processes must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def without_weights(model):
    """A copy of a model that has no weights yet: deepcopy takes the empty ones for copies that it has already made."""
    return copy.deepcopy(model, {id(p): torch.nn.Parameter(p.new_empty(0), False) for p in model.parameters()})


@contextmanager
def put_together(model, empty, write=False):
    """A model that FSDP has sharded as one piece, on every process; `empty` is from `without_weights`. write: what is
    changed in it counts, as the first process has it."""
    twin = copy.deepcopy(empty)
    pairs = list(zip(twin.parameters(), model.parameters()))
    with torch.no_grad():
        for mine, theirs in pairs:
            mine.data = full(theirs)
        for mine, theirs in zip(twin.buffers(), model.buffers()):
            mine.copy_(theirs)
        yield twin
        if write:
            for mine, theirs in pairs:
                theirs.copy_(distribute_tensor(mine.data, theirs.device_mesh, theirs.placements))
            for mine, theirs in zip(twin.buffers(), model.buffers()):
                theirs.copy_(mine)


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


class Checkpoints:
    """The state of a run in FOLDER/STEP/: tensors, written by torch.distributed.checkpoint while training goes on, by
    every process its share, for any number of processes that may read them; and notes.json. A folder gets its name when
    all of it is there, so no half ones are ever found; the `keep` newest stay."""

    def __init__(self, folder, keep):
        self.folder, self.keep, self.pending = folder, keep, None
        self.rank = place_of_process()[0]
        self.group = None
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=PATIENCE)   # so as not to be in the way of training

    def complete(self):
        """All folders, the newest last."""
        return sorted(path for path in self.folder.glob("[0-9]*") if (path / "notes.json").exists())

    def begin(self, step, tensors, notes):
        """Copies the tensors and starts to write them; `finish` the last ones before. Raises OSError if there is no
        room to begin with."""
        temporary, error, known = self.folder / f".{step:07d}", None, (self.folder / f"{step:07d}").exists()
        if self.rank == 0 and not known:
            try:
                for left in self.folder.glob(".[0-9]*"):                    # by a run that was killed
                    shutil.rmtree(left)
                temporary.mkdir(parents=True)
                (temporary / "notes.json").write_text(json.dumps(notes, indent=1), encoding="utf-8")
            except OSError as e:
                error = e.strerror
        error, known = of_all((error, known))[0]                            # all do what the first one decides
        if error:
            raise OSError(error)
        if known:                                                           # nothing was done since
            return
        world, whole = place_of_process()[1], [name for name, x in tensors.items() if not isinstance(x, DTensor)]
        not_mine = {name for i, name in enumerate(whole) if i % world != self.rank}         # all processes have these
        copies = {name: x.detach().clone() if x.device.type == "cpu" else x.detach()        # those of a GPU are copied
                  for name, x in tensors.items() if name not in not_mine}                   # to the CPU in any case
        self.pending = temporary, dcp.async_save(
            copies, storage_writer=dcp.FileSystemWriter(temporary), process_group=self.group)

    def finish(self):
        """Waits until the last one is written. Raises if it could not be."""
        (temporary, future), self.pending = self.pending, None
        future.result()
        if self.rank == 0:
            os.replace(temporary, temporary.with_name(temporary.name[1:]))
            for old in self.complete()[:-self.keep]:
                shutil.rmtree(old)

    def notes(self, path):
        """What notes.json of a folder says."""
        try:
            return json.loads((path / "notes.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise self.useless(path, e) from None

    def load(self, path, tensors_for):
        """Fills tensors_for(names of what was saved) -> {name: tensor}."""
        try:
            reader = dcp.FileSystemReader(path)
            tensors = tensors_for(reader.read_metadata().state_dict_metadata)
            dcp.load(tensors, storage_reader=reader, process_group=self.group)
        except (OSError, RuntimeError, KeyError, EOFError, ValueError, AttributeError, pickle.UnpicklingError,
                dcp.api.CheckpointException) as e:
            raise self.useless(path, e) from None

    def useless(self, path, error):
        """What to say of a broken one."""
        reason = (str(error) or type(error).__name__).strip().splitlines()[-1]
        before = [p.name for p in self.complete() if p != path]
        return UserError(f"{path}: cannot continue from it ({reason}); delete it" + (
            f" to go on from step {int(before[-1])}" if before else " or choose another --out"))


class Log:
    """log.csv: one row every few steps; curves.png; with tensorboard installed its files in tensorboard/. A resumed run
    drops the rows after its checkpoint."""

    COLUMNS = ["step", "loss", "lr", "grad_norm", "seconds", "step_seconds", "data_wait", "images_per_s",
               "tokens_per_s", "flops_share", "memory_gb", "skipped"]

    def __init__(self, path, task, resume_step):
        self.path, self.board = path, None
        self.columns = [*self.COLUMNS, *task.metrics, *(f"val_{m}" for m in task.val_metrics)]
        rows = []
        if resume_step and path.exists():
            with open(path, encoding="utf-8") as f:
                rows = [row for row in csv.DictReader(f) if row["step"].isdigit() and int(row["step"]) <= resume_step]
        with vq.atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(path.with_name("tensorboard"), purge_step=resume_step)

    def write(self, row):
        with open(self.path, "a", newline="", encoding="utf-8") as f:
            csv.DictWriter(f, self.columns).writerow({k: self._cell(v) for k, v in row.items()})
        for name, value in row.items() if self.board else ():
            if name != "step" and not (isinstance(value, torch.Tensor) and value.numel() > 1):
                self.board.add_scalar(name, float(value), row["step"])
        if self.board:
            self.board.flush()

    def draw(self):
        """curves.png: the loss in training, and what all validations so far have found."""
        with open(self.path, encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        known = lambda name: ([int(row["step"]) for row in rows if row[name]],
                              [float(row[name]) for row in rows if row[name]])
        charts = [sample.chart({"": known("loss")}, "loss in training", "steps", size=(400, 300))]
        for name in self.columns:
            if name.startswith("val_") and known(name)[0]:
                charts.append(sample.chart({"": known(name)}, name.replace("val_", "validation: "), "steps",
                                           size=(400, 300)))
        sample.save_png(self.path.with_name("curves.png"), sheet(charts, min(3, len(charts))))

    @staticmethod
    def _cell(value):
        """Numbers with six digits; one number per scale as a list in one cell."""
        if isinstance(value, torch.Tensor):
            return " ".join(f"{v:.6g}" for v in value.detach().flatten().tolist())
        return f"{value:.6g}" if isinstance(value, float) else value


class Meter:
    """How long steps take, and how long they wait for data, since the log was written last."""

    def __init__(self, run):
        self.run = run
        self.limit = sample.product_speed(run.device, sample.DTYPES[run.args.dtype])
        self.flops = 0                                                      # of one part of a step
        self.start()

    def start(self):
        self.steps, self.spent, self.waited = 0, 0.0, 0.0

    def numbers(self):
        """What there is to log; counting starts anew."""
        run, seconds = self.run, self.spent / max(self.steps, 1)
        found = {"step_seconds": seconds, "data_wait": self.waited / self.spent,
                 "images_per_s": run.args.batch_size / seconds, "memory_gb": run.memory() / 1e9}
        if run.task.length:
            found["tokens_per_s"] = found["images_per_s"] * run.task.length
        found["flops_share"] = self.flops * run.accum / seconds / self.limit
        self.start()
        return found


# ----------------------------------------------------------------------------------------------------------------------
# The run


SAVE_DTYPES = sample.DTYPES | {"fp8": torch.float8_e4m3fn}


def leave_signals_to_parent(_):
    """Reading processes ignore Ctrl-C and SIGTERM: the training process finishes its step and ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class StopOnSignal:
    """Ctrl-C and SIGTERM end the run after the step in progress, with its state saved; a second one ends it at once."""

    asked = 0                                                               # the number of the signal

    def __enter__(self):
        self.old = [(s, signal.signal(s, self._ask)) for s in (signal.SIGINT, signal.SIGTERM)]
        return self

    def _ask(self, number, frame):
        if self.asked and time.monotonic() - self.when > 1:                 # torchrun's may come twice
            raise KeyboardInterrupt
        self.asked, self.when = self.asked or number, time.monotonic()

    def __exit__(self, *_):
        for s, handler in self.old:
            signal.signal(s, handler)


SYNCNET_COUNTS = ("videos", "val_pairs", "frames", "embedding", "moments", "audio_offset", "contrast_steps")


def check_args(args):
    """What argparse does not check."""
    at_least = {"batch_size": 1, "accum": 1, "keep": 1, "max_skipped": 1, "depth": 1}
    counts = ("steps", "epochs", "batch_size", "accum", "seed", "workers", "log_every", "val_every", "sample_every",
              "save_every", "stop_after", "lr", "wd", "wd_end", "clip", "keep", "max_skipped", "depth", "shuffle",
              *SYNCNET_COUNTS)
    at_least |= dict.fromkeys(SYNCNET_COUNTS, 1) | dict(audio_offset=0, contrast_steps=0, shuffle=1)
    sample.check_ranges(*((f"--{k.replace('_', '-')}", getattr(args, k, None), at_least.get(k, 0), None)
                          for k in counts),
                        ("--warmup", args.warmup, 0, 1), ("--final-lr", args.final_lr, 0, 1), ("--ema", args.ema, 0, 1),
                        ("--dropout", getattr(args, "dropout", None), 0, 0.9))
    crops = getattr(args, "cache_crops", "0")
    views = PictureFolder.VIEWS if args.model_name == "llamagen" and not args.captions and args.data != "demo" else {}
    if not crops.isdigit() and crops not in views:
        raise UserError(f"--cache-crops {crops}: expected a number" + "".join(f" or {name}" for name in views))
    learning_rate(args.schedule, 1, 2, 0, 0, 1)                             # does that schedule exist?
    if args.model_name == "infinity":
        sample.check_pixels(args.pixels)
        sample.check_ranges(("--strength", args.strength, 0, 1), ("--scales", args.scales, 0, None),
                            ("--short-captions", args.short_captions, 0, 1))
    if not args.steps and not args.epochs:
        raise UserError("nothing to do: give --steps or --epochs")
    if args.fsdp and place_of_process()[1] == 1:
        raise UserError("--fsdp: shards a model over several processes; start them with torchrun --nproc-per-node N")


def prepare_folder(args):
    """Creates --out, checks that it can be written, and that no other run's results would be lost in it."""
    out = sample.check_writable(args.out)
    (out / "samples").mkdir(exist_ok=True)
    if args.resume == "no" and any((out / name).exists() for name in ("state", "state.pt", "model.safetensors")):
        raise UserError(f"--out {out}: it holds a run already; continue it with --resume auto, or choose another --out")
    if (out / "state.pt").exists():
        raise UserError(f"{out}/state.pt: was written by an older version, which this one cannot continue; start anew, "
                        f"with --init {out}/model.safetensors")
    return out


class Run:
    """What a training run consists of, and what it does besides its steps.

    A step's batch comes in so many `parts`, each with random draws of its own, from (seed, step, part); process r of R
    has parts r, r + R, ... So what is computed depends on the number of parts alone: a run goes on with any number of
    processes that divides it. On a CPU, with the same number, bit for bit as if nothing had happened; with another one
    up to the order of sums.
    """

    SETTINGS = ("model_name", "recipe", "size", "steps", "batch_size", "lr", "schedule", "warmup", "warmup_from",
                "final_lr", "wd", "wd_end", "betas", "clip", "ema", "dtype", "seed", "shuffle", "zoom", "flip",
                "l1", "l2", "lpips_weight", "disc_weight", "disc_start", "disc", "gan", "adaptive", "kl_weight",
                "warm_steps", "restart_after", "pixels", "strength", "reweight", "scales", "short_captions", "t5",
                "clean", "dropout", "moments", "contrast_steps", "audio_offset", "unaligned", "stage", "sync_weight",
                "trepa_weight", "drop_audio")                               # a resumed run has the same

    def __init__(self, args):
        check_args(args)
        self.args = args
        self.rank, self.world = place_of_process()
        self.device, why = sample.choose_device(args.device)
        self.memory = sample.PeakMemory(self.device)
        join_others(self.device)
        self.out = prepare_folder(args)
        self.checkpoints = Checkpoints(self.out / "state", args.keep)
        found = of_all(self.checkpoints.complete() if args.resume == "auto" else [])[0]
        notes = self.checkpoints.notes(found[-1]) if found else {}
        self.share_batch(notes.get("parts", args.accum * self.world))
        train_set, val_set = open_data(args)
        self.g = torch.Generator(self.device).manual_seed(args.seed)        # the same weights on every process
        self.task = task_of(args)(args, train_set, val_set, self.device, self.g)
        args.steps = args.steps or args.epochs * -(-len(train_set) // args.batch_size)
        self.start_engine()
        self.step, self.best, self.skipped, self.skipped_in_a_row = 0, -math.inf, 0, 0
        self.broken, self.stop, self.unsaved, self.unexported = set(), StopOnSignal(), None, None
        self.settings = self.describe()
        if others := [k for one in of_all(self.settings) for k in one if one[k] != self.settings[k]]:
            raise UserError(f"processes do not see the same {', '.join(sorted(set(others)))}: all machines need the "
                            "same --data, --out and weights")
        if found:
            self.restore(found[-1], notes)
        self.first, self.started = self.step, time.perf_counter()
        self.last = min(args.steps, self.step + args.stop_after) if args.stop_after else args.steps
        self.batches, self.log = self.open_batches(), None
        if self.rank == 0:
            self.log = Log(self.out / "log.csv", self.task, self.step)
            parameters = sum(p.numel() for p in self.model.parameters())
            shared = f" on {self.world} processes ({'FSDP' if args.fsdp else 'DDP'})" if self.world > 1 else ""
            print(f"{self.device} ({why}){shared}, {args.dtype}, {parameters:,} parameters, "
                  f"{len(self.task.train_set):,} {train_set.kinds}, steps {self.step} to {args.steps}", flush=True)
        self.meter = Meter(self)

    def share_batch(self, parts):
        """Cuts a step's batch into parts, and deals them out."""
        self.parts, batch_size = parts, self.args.batch_size
        self.accum, left = divmod(parts, self.world)
        if left:
            raise UserError(f"{self.out}: this run cuts a batch into {parts} parts, which {self.world} processes "
                            f"cannot share; start a number of them that divides {parts}")
        if batch_size % parts:
            raise UserError(f"--batch-size {batch_size}: not divisible by --accum {self.accum} times {self.world} "
                            "processes" if self.world > 1 else
                            f"--batch-size {batch_size}: not divisible by --accum {self.accum}")

    def start_engine(self):
        """Optimizer, weight average, and what lets several processes train one model."""
        args, self.model = self.args, self.task.model
        if getattr(args, "checkpointing", False):
            self.model.checkpointing = True
        self.average = copy.deepcopy(self.model).requires_grad_(False) if args.ema else self.model
        for unit in units(self.model) if args.compile else ():
            unit.compile(dynamic=False)
        if args.fsdp:
            self.empty = without_weights(self.model)
            self.engine = shard(Objective(self.model, self.task.loss), sample.DTYPES[args.dtype])
            if self.average is not self.model:
                shard(self.average, torch.float32)
        else:
            self.engine = data_parallel(self.model, self.task.loss, self.task.UNUSED_WEIGHTS)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model), args.lr, args.betas, eps=1e-8, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**11, growth_interval=1000,
                                           enabled=args.dtype == "fp16")
        self.task.whole, self.task.parts = self.whole, self.parts

    def whole(self, model, write=False):
        """A model as one piece, for as long as a `with` lasts; without --fsdp it is. write: changes to it count."""
        return put_together(model, self.empty, write) if self.args.fsdp else nullcontext(model)

    def describe(self):
        """What a resumed run must have the same."""
        config = getattr(self.model, "config", None)
        config = {f"config.{k}": v for k, v in asdict(config).items()} if config else {}
        settings = {k: getattr(self.args, k, None) for k in self.SETTINGS} | config
        settings |= {"data": self.task.train_set.fingerprint} | self.task.identity()
        return json.loads(json.dumps(settings, default=str))                # as it comes back from a file

    def tensors(self, saved=None):
        """All tensors of the run by name; Adam's are those of the weight they belong to. saved: names of what is about
        to be loaded: makes room for it."""
        found = {f"average.{name}": x for name, x in self.average.state_dict().items()} if self.args.ema else {}
        for what, (model, optimizer) in ({"model": (self.model, self.optimizer)} | self.task.learners).items():
            found |= {f"{what}.{name}": x for name, x in model.state_dict().items()}
            for name, p in model.named_parameters():
                if saved is not None and f"{what}.{name}.exp_avg" in saved:
                    optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                          "exp_avg_sq": torch.zeros_like(p)}
                found |= {f"{what}.{name}.{key}": x for key, x in optimizer.state.get(p, {}).items()}
        return found

    def restore(self, path, notes):
        """Continues from a checkpoint, if that was a run with the same settings."""
        now, then = self.settings, notes["settings"]
        changed = [f"{k} was {then.get(k)}, now {now.get(k)}" for k in {**then, **now} if then.get(k) != now.get(k)]
        if changed:
            raise UserError(f"{path}: is of another run ({'; '.join(changed)}); give the same flags, or another --out")
        self.checkpoints.load(path, self.tensors)
        self.scaler.load_state_dict(notes["scaler"])
        self.step, self.skipped = notes["step"], notes["skipped"]
        if (self.out / "best.json").exists():
            self.best = json.loads((self.out / "best.json").read_text())["score"]

    def save(self):
        """Starts to write a checkpoint: everything needed to go on exactly here."""
        notes = {"settings": self.settings, "step": self.step, "parts": self.parts,
                 "skipped": self.skipped, "scaler": self.scaler.state_dict(), "torch": torch.__version__}
        self.settle()
        begin = lambda: self.checkpoints.begin(self.step, self.tensors(), notes)
        self.unsaved = self.writing(f"step {self.step}", begin)

    def settle(self, wait=True):
        """Waits for the checkpoint that is being written, or without `wait` looks whether it is done."""
        if self.checkpoints.pending and (wait or self.checkpoints.pending[1].done()):
            step = int(self.checkpoints.pending[0].name[1:])
            self.unsaved = self.writing(f"step {step}", self.checkpoints.finish)

    def writing(self, what, write):
        """Does it; a full disk does not end a run, which tries again when it saves next. What went wrong, or None."""
        try:
            write()
        except (OSError, RuntimeError, ValueError, SafetensorError, dcp.api.CheckpointException) as e:
            reason = os.strerror(e.errno) if isinstance(e, OSError) and e.errno else str(e).strip().splitlines()[-1]
            last = [int(path.name) for path in self.checkpoints.complete()]
            self.say(f"could not save {what} ({reason}); " + (
                f"step {last[-1]} is intact" if last else "nothing is saved yet"))
            return f"could not save {what} ({reason})"

    def say(self, line):
        """A line above the progress bar, from the first process alone."""
        if self.rank == 0:
            tqdm.write(line)
            sys.stdout.flush()

    def order(self, first):
        """The items of all batches from a step on, as far as they are of this process."""
        data = self.task.train_set
        groups = getattr(data, "groups", [np.arange(len(data))])
        return Batches(groups, self.args.batch_size, self.args.seed, first, self.parts, self.rank, self.world,
                       getattr(data, "shards", None), self.args.shuffle)

    def open_batches(self):
        """Batches from the present step on, for ever, from processes of their own if files are to be read."""
        data = self.task.train_set
        workers = self.args.workers if getattr(data, "READS_FILES", False) else 0
        return iter(DataLoader(data, batch_sampler=self.order(self.step), num_workers=workers, collate_fn=tuple,
                               worker_init_fn=leave_signals_to_parent, pin_memory=self.device.type == "cuda"))

    def next_batch(self):
        """The next part of a batch; how long that took is on record."""
        start = time.perf_counter()
        batch = next(self.batches)
        self.broken.update(batch[2])
        self.meter.waited += time.perf_counter() - start
        return batch

    def draws(self, part):
        """The generator, set to the start of the draws of this step and part; those after the last part are for what
        all processes do alike."""
        return self.g.manual_seed(int(np.random.default_rng((self.args.seed, self.step, part)).integers(2**63)))

    def rates(self):
        """Learning rate and weight decay of this step."""
        args, step = self.args, self.step
        warmup = args.warmup * args.steps
        ratio = learning_rate(args.schedule, step, args.steps, warmup, args.warmup_from, args.final_lr)
        return args.lr * ratio, weight_decay(step, args.steps, args.wd, args.wd_end)

    @contextmanager
    def counted(self):
        """Counts the products of the first part of the first step, outside of what torch.compile makes of them."""
        if self.meter.flops:
            yield
            return
        with torch.compiler.set_stance("force_eager") if self.args.compile else nullcontext(), sample.Flops() as count:
            yield
        self.meter.flops = max(count.total, 1)

    def may_learn(self, grad_norm, losses):
        """Whether this step may change the weights: a gradient that is not finite, if only in one part on one process,
        spoils the average of all. If many in a row may not, something is wrong: stops, and says what they saw."""
        if math.isfinite(grad_norm):
            self.skipped_in_a_row = 0
            return True
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.args.max_skipped:
            guilty = [part for part, loss in zip(self.order(self.step), losses) if not math.isfinite(loss)]
            name = getattr(self.task.train_set, "name", "number {}".format)
            names = [name(i) for part in guilty for i, _ in part]
            names = [name for found in of_all(names) for name in found]     # of all processes
            raise UserError(
                f"no finite gradient in {self.skipped_in_a_row} steps in a row, up to step {self.step + 1}"
                + (f", whose loss was not finite for {', '.join(names[:8])}" if names else "")
                + "; look at these, lower --lr or use --dtype bf16; --resume auto goes on from the last checkpoint")
        return False

    def __enter__(self):
        self.stop.__enter__()
        return self

    def __exit__(self, kind, error, trace):
        """Nothing is left half-written, whatever ended the run; unless somebody is in a hurry."""
        self.stop.__exit__()
        if kind is not None and kind is not KeyboardInterrupt:
            self.settle()
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            raise UserError(f"a process that reads --data has died ({str(error).splitlines()[0]}); if memory was short,"
                            " try fewer --workers; go on with --resume auto") from None

    def goes_on(self):
        """Whether there is another step to take. A signal to one process stops all after the same step."""
        asked = torch.tensor(self.stop.asked)
        if self.world > 1:
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        self.stopping = int(asked) if self.first < self.step < self.last else 0
        return self.step < self.last and not self.stopping

    def report(self, row, bar):
        """Checkpoint, log, validation and sample grid, each when its turn has come. row: what the step has found."""
        args, done, ended = self.args, self.step, self.step == self.last
        self.settle(wait=False)
        due = lambda every: ended or (every > 0 and done % every == 0)
        log, save, validate, draw = map(due, (args.log_every, args.save_every, args.val_every, args.sample_every))
        if not (log or save or validate or draw):
            return
        found = of_all({k: v.float().cpu() for k, v in row.items() if isinstance(v, torch.Tensor)})
        row |= {k: torch.stack([one[k] for one in found]).mean(0) for k in found[0]} | self.meter.numbers()
        row |= {"skipped": self.skipped, "seconds": time.perf_counter() - self.started}
        bar.set_postfix(loss=f"{float(row['loss']):.4g}", lr=f"{row['lr']:.2g}", refresh=False)
        if validate or save or draw:
            self.publish(row, validate, save, draw)
        if log or validate:
            self.note(row)
        if validate and self.rank == 0:
            self.writing("curves.png", self.log.draw)
        self.model.train()

    def note(self, row):
        """A row of the log; and a line, where there is no terminal to show a bar on."""
        if self.rank == 0:
            self.writing("a row of log.csv", lambda: self.log.write({"step": self.step} | row))
            if not sys.stderr.isatty():
                self.say(f"step {self.step}/{self.args.steps}: loss {float(row['loss']):.4g}, lr {row['lr']:.2g}, "
                         f"{row['step_seconds']:.3g} s/step, {row['images_per_s']:.3g} images/s, waiting for data "
                         f"{row['data_wait']:.1%}")

    def publish(self, row, validate=False, save=False, draw=False):
        """Saves, validates, draws, with the average of the weights if there is one. What cannot be replaced comes
        first; it is written while the rest goes on."""
        if save:
            self.save()
        with self.whole(self.average) as model:
            model.eval()
            if save:
                self.unexported = self.export(model, "model.safetensors")
            if validate:
                with torch.autocast(self.device.type, sample.DTYPES[self.args.dtype], self.args.dtype != "fp32"):
                    scores = self.task.validate(model)
                self.say(f"step {self.step}: " + ", ".join(f"val {k} {v:.4g}" for k, v in scores.items()))
                row |= {f"val_{k}": v for k, v in scores.items()}
                if self.task.score(scores) > self.best and not self.export(model, "best.safetensors"):
                    self.best = self.task.score(scores)
                    self.writing("best.json", self.note_best)
            if draw and self.rank == 0:
                name = self.out / "samples" / f"{self.step:07d}"
                self.writing(name, lambda: self.task.show(model, name))

    def export(self, model, name):
        """What sample.py takes. Returns what went wrong, or None."""
        dtype = SAVE_DTYPES[self.args.save_dtype]
        save = lambda: self.task.save(model, self.out / name, dtype)
        return self.writing(name, save) if self.rank == 0 else None

    def note_best(self):
        """Beside best.safetensors: of which step it is, and how good."""
        if self.rank == 0:
            with vq.atomic(self.out / "best.json") as temporary:
                temporary.write_text(json.dumps({"step": self.step, "score": self.best}))

    def end(self):
        """After the last step: what is not saved yet, and what there is to say."""
        if self.stopping:
            self.publish({}, save=True)
        self.settle()
        broken = sorted(set().union(*of_all(self.broken)))
        if broken and self.rank == 0:
            report_broken(broken, self.task.train_set)
            self.writing("unreadable.txt", lambda: (self.out / "unreadable.txt").write_text("\n".join(broken) + "\n"))
        if self.rank == 0:
            self.writing("curves.png", self.log.draw)
            how = "interrupted" if self.stopping else "stopped" if self.last < self.args.steps else "done"
            seconds, more = time.perf_counter() - self.started, self.step < self.args.steps
            print(f"{how} at step {self.step} of {self.args.steps}, {seconds:.0f} s; weights in "
                  f"{self.out}/model.safetensors" + ("; go on with --resume auto" if more else ""), flush=True)
        if wrong := self.unsaved or self.unexported:
            raise UserError(f"--out {self.out}: {wrong}; make room and go on with --resume auto")
        if self.stopping:
            sys.exit(128 + self.stopping)


def train(args):
    """The loop. A step is a function of its number and of what the one before has left."""
    run = Run(args)
    task, model, optimizer, scaler, meter = run.task, run.model, run.optimizer, run.scaler, run.meter
    precision = functools.partial(torch.autocast, run.device.type, sample.DTYPES[args.dtype], args.dtype != "fp32")
    model.train()
    hidden = None if run.rank == 0 else True                                # None: hidden unless there is a terminal
    bar = tqdm(total=args.steps, initial=run.step, disable=hidden, smoothing=0.05)
    with run:
        while run.goes_on():
            began, step, found = time.perf_counter(), run.step, []
            lr, wd = run.rates()
            set_rates(optimizer, lr, wd)
            for i in range(run.accum):                                      # this process's parts of the batch
                batch, g = run.next_batch(), run.draws(run.rank + i * run.world)
                with synchronized(run.engine, last=i == run.accum - 1), run.counted():
                    with precision():
                        loss, metrics = run.engine(batch, step, g)          # the task's loss
                    scaler.scale(loss / run.accum).backward()               # the last: averages over all processes
                found.append({"loss": loss.detach()} | {k: v.detach() for k, v in metrics.items()})
            scaler.unscale_(optimizer)
            grad_norm = full(torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip))
            row = {k: torch.stack([part[k] for part in found]).mean(0) for k in found[0]}
            if run.may_learn(grad_norm, [part["loss"] for part in found]):  # the norm is the same for all processes
                scaler.step(optimizer)
                row |= task.after_step(step, lr, run.draws(run.parts))      # the discriminator's turn, say
                if args.ema:
                    update_average(run.average, model, args.ema, step)
                    task.sync_average(run.average)
            scaler.update()
            if args.dtype == "fp16" and scaler.get_scale() > 2.0**15:
                scaler.update(2.0**15)                                      # the cap of VAR's authors
            optimizer.zero_grad()
            run.step += 1
            meter.steps, meter.spent = meter.steps + 1, meter.spent + time.perf_counter() - began
            bar.update()
            run.report(row | {"lr": lr, "grad_norm": grad_norm}, bar)
        bar.close()
        run.end()


class OneStep:
    """A training step of a run that can be taken again and again: its rate is 0."""

    def __init__(self, run):
        self.run, self.batches = run, [run.next_batch() for _ in range(run.accum)]
        set_rates(run.optimizer, 0.0, 0.0)

    def __call__(self):
        for part, batch in enumerate(self.batches):
            loss = self.forward(batch, self.run.draws(part))
            self.backward(loss)
        self.update()
        return loss.detach()

    def forward(self, batch, g):
        dtype = self.run.args.dtype
        with torch.autocast(self.run.device.type, sample.DTYPES[dtype], dtype != "fp32"):
            return self.run.engine(batch, self.run.step, g)[0] / self.run.accum

    def backward(self, loss):
        self.run.scaler.scale(loss).backward()

    def update(self):
        run = self.run
        run.scaler.unscale_(run.optimizer)
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.args.clip)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        if run.args.ema:
            update_average(run.average, run.model, run.args.ema, run.step)


def bench_step(args):
    """`train.py MODEL --bench`: the time of a step, of its stages, and of the bare matrix products, convolutions and
    attention calls in it."""
    with tempfile.TemporaryDirectory() as folder:
        args.out, args.resume = folder, "no"
        run = Run(args)
        run.model.train()
        one = OneStep(run)
        stages = {name: [(one, name)] for name in ("forward", "backward", "update")}
        name, dtype = f"{args.model_name} {args.recipe}", sample.DTYPES[args.dtype]
        found = sample.bench(name, one, stages, "rest", run.model.parameters(), run.device, dtype, args.batch_size,
                             run.memory)
    sample.print_bench(found, run.task.length)
    if args.json:
        with vq.atomic(args.json) as temporary:
            temporary.write_text(json.dumps(found, indent=1))


def main(args):
    """Trains, or what a flag asks for instead."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")      # so says the writer of checkpoints
    study = study_latentsync if args.model_name == "latentsync" else study_syncnet
    for flag, instead in (("evaluate", evaluate_syncnet), ("prepare", prepare), ("study", study),
                          ("scaling_laws", scaling_laws), ("bench", bench_step)):
        if getattr(args, flag, None):
            if place_of_process()[1] > 1:
                raise UserError(f"--{flag}: runs in one process; start it without torchrun")
            check_args(args)
            return instead(args)
    train(args)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sample.guarded(main, ARGS)
