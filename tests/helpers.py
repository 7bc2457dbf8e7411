"""What several test modules use: tiny random models that sample in milliseconds, and the scripts' command lines."""
import csv
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import infinity
import latentsync
import llamagen
import sample
import syncnet
import train
import var
import vq
from lib import clips, losses, recipes, speech_tasks, tasks, videomae
from lib.console import run_command
from lib.text import T5Config, T5Encoder
from lib.video import VideoWriter

CLIP = ROOT.parent / "shared" / "data" / "latentsync"                       # a real clip, not in the repository

VQ_CONFIG = vq.Config(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=8, vocab_size=32, patch_nums=(1, 2, 3, 4))
VAR_CONFIG = var.Config(depth=2, width=64, heads=2, patch_nums=(1, 2, 3, 4), num_classes=5, vocab_size=32, z_channels=8)
BITS_CONFIG = replace(vq.CONFIGS["emoji_bsq"], z_channels=6, patch_nums=(1, 2, 4))
INFINITY_CONFIG = infinity.Config(depth=2, width=64, heads=2, bits=6, text_width=128, text_maxlen=32, levels=5,
                                  chunks=1)
T5_CONFIG = T5Config(vocab_size=259, width=128, layers=2, heads=2, head_dim=16, hidden=32)
SCALES = ((1, 1), (2, 2), (4, 4))
SINGLE_CONFIG = replace(vq.CONFIGS["emoji_vq_single"], vocab_size=32, patch_nums=(4,))
CLASS_CONFIG = llamagen.Config(depth=2, width=32, heads=2, hidden=48, side=4, vocab_size=32, num_classes=5)
TEXT_CONFIG = replace(CLASS_CONFIG, num_classes=0, text_width=128, text_slots=6)
SYNCNET_CONFIG = syncnet.Config(((32, (1, 2), False), (32, (4, 4), True), (64, (2, 2), False)),
                                ((32, (4, 2), False), (32, 4, True), (64, (5, 2), False)), 5, (8, 16))
JUDGE_CONFIG = replace(SYNCNET_CONFIG, audio=((32, (4, 2), False), (32, 4, True), (64, (5, 5), False)), frames=4)
UNET_CONFIG = latentsync.Config((32, 64), 1, 2, 16, "all", 2, 8, 32, 4)
KL_CONFIG = vq.KLConfig(32, (1, 2), 1, scaling=0.5)
WHISPER_CONFIG = latentsync.WhisperConfig(positions=20, width=16, heads=2, layers=1)
VIDEOMAE_CONFIG = videomae.VideoMAEConfig(16, 8, 4, 2, 32, 2, 4, 64, 0)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generators(*seeds, device="cpu"):
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def steps_of(model, *arguments, **options):
    """The Steps of model.sample, as a list. A captured model overwrites its logits, so they are copied."""
    steps = []
    model.sample(*arguments, on_step=lambda step: steps.append(step._replace(logits=step.logits.clone())), **options)
    return steps


# ----------------------------------------------------------------------------------------------------------------------
# Tiny models


def tiny_vq(config, **changes):
    """A random tokenizer of 16 x 16 pixels."""
    model = vq.VQVAE(replace(config, **changes)).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    return model


tiny_tokenizer = partial(tiny_vq, VQ_CONFIG)            # 30 tokens on four scales
tiny_bits = partial(tiny_vq, BITS_CONFIG)               # 21 tokens of 6 bits on three scales
tiny_single = partial(tiny_vq, SINGLE_CONFIG)           # 16 tokens


def tiny_var(**changes):
    """Gates of order one: with the training initialisation a random model would hardly depend on its input."""
    model = var.VAR(replace(VAR_CONFIG, **changes)).eval()
    g = torch.Generator().manual_seed(1)
    model.init_weights(init_gamma=1.0, generator=g)
    with torch.no_grad():
        model.head.weight.normal_(0, 0.3, generator=g)
        for block in model.blocks:
            if not model.config.shared_adaln:
                block.adaln.weight.normal_(0, 0.3, generator=g)
    return model


def tiny_infinity(t5=T5_CONFIG, **changes):
    """Gates of order one, as in tiny_var, and a text that matters."""
    model = infinity.Infinity(replace(INFINITY_CONFIG, **changes), T5Encoder(t5) if t5 else None).eval()
    g = torch.Generator().manual_seed(1)
    model.init_weights(init_gamma=1.0, generator=g)
    with torch.no_grad():
        model.head.weight.normal_(0, 0.3, generator=g)
        model.text_out.weight.normal_(0, 0.3, generator=g)
    return model


def tiny_llamagen(text=False, t5=None, **changes):
    """Weights large enough for logits that differ, and an output that is not zero."""
    model = llamagen.LlamaGen(replace(TEXT_CONFIG if text else CLASS_CONFIG, **changes), t5).eval()
    g = torch.Generator().manual_seed(1)
    model.init_weights(g)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and not name.startswith("text_encoder."):
                p.normal_(0, 0.4, generator=g)
    return model


def tiny_syncnet(seed=0, config=SYNCNET_CONFIG):
    model = vq.build(syncnet.StableSyncNet, config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


def tiny(cls, config, seed=0):
    """A random network of LatentSync in eval mode."""
    model = vq.build(cls, config)
    g = torch.Generator().manual_seed(seed)
    model.init_weights(g)
    if cls is latentsync.UNet:  # layers that start at zero would hide the rest
        ends = [model.conv_out, *(m.proj_out for m in model.modules() if isinstance(m, latentsync.MotionModule))]
        for layer in ends:
            torch.nn.init.normal_(layer.weight, 0, 0.1, g)
    return model.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# The scripts


def script(*argv, cwd=ROOT, **kwargs):
    """Run a Python file in a process of its own."""
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, capture_output=True, text=True, **kwargs)


def run(module, *argv):
    """Run a command line of sample or train in this process, as `python MODULE.py ARGV` does after its imports."""
    args = module.parse_args([str(a) for a in argv])
    run_command(train.main if module is train else sample.MODELS[args.model], args)


def complaint(capsys, module, *argv):
    """The one line that a user error prints; the exit code is 2."""
    with pytest.raises(SystemExit) as e:
        run(module, *argv)
    err = capsys.readouterr().err.strip()
    assert e.value.code == 2 and "Traceback" not in err
    line = err.splitlines()[-1]
    assert "error: " in line
    return line


def info(path):
    """(size, text metadata) of a picture."""
    with Image.open(path) as picture:
        return picture.size, picture.info


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def log_rows(folder):
    with open(folder / "log.csv", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def make_tiny(monkeypatch):
    """Tiny networks in place of the demo's, for tests of training."""
    monkeypatch.setitem(vq.CONFIGS, "emoji_vq", VQ_CONFIG)
    monkeypatch.setitem(vq.CONFIGS, "emoji_bsq", BITS_CONFIG)
    monkeypatch.setitem(vq.CONFIGS, "emoji_vq_single", SINGLE_CONFIG)
    monkeypatch.setitem(var.CONFIGS, "emoji_var", VAR_CONFIG)
    monkeypatch.setitem(infinity.CONFIGS, "emoji_infinity", INFINITY_CONFIG)
    monkeypatch.setitem(llamagen.CONFIGS, "emoji_llamagen", CLASS_CONFIG)
    monkeypatch.setitem(llamagen.CONFIGS, "emoji_llamagen_t2i", TEXT_CONFIG)
    monkeypatch.setattr(tasks, "WORD_T5", T5_CONFIG)
    for model, name in (("infinity", "emoji"), ("llamagen", "emoji_text")):                 # the demo's T5 does not fit
        monkeypatch.setitem(recipes.RECIPES[model], name, recipes.derive(recipes.RECIPES[model][name], init_text=None))
    monkeypatch.setattr(losses, "PatchDiscriminator", partial(losses.PatchDiscriminator, width=8, num_layers=1))


def make_tiny_syncnet(monkeypatch):
    """A tiny network for `train.py syncnet`."""
    monkeypatch.setitem(syncnet.CONFIGS, "talking_head", SYNCNET_CONFIG)
    monkeypatch.setattr(clips, "VAL_HEADS", 4)
    monkeypatch.setattr(clips.SyntheticSyncClips, "first_usable",
                        lambda self, n: [(frames[:40], sound) for frames, sound in [self.whole(0)]])


def make_tiny_latentsync(monkeypatch):
    """A tiny network for `train.py latentsync`, and faces of 16 x 16 pixels."""
    recipe = recipes.RECIPES["latentsync"]["talking_head"]
    video = clips.SyntheticDubbing.video

    def small_video(self, index):
        length, frames_at, features, sound = video(self, index)
        return length, lambda start, count: frames_at(start, count)[:, :, ::4, ::4], features, sound
    monkeypatch.setitem(latentsync.CONFIGS, "talking_head", replace(UNET_CONFIG, resolution=16, motion="none"))
    monkeypatch.setattr(clips, "VAL_HEADS", 4)
    monkeypatch.setattr(speech_tasks.LatentSyncTask, "STEPS", 2)
    monkeypatch.setitem(recipes.RECIPES["latentsync"], "talking_head", recipes.derive(recipe, val_clips=1))
    monkeypatch.setattr(clips.SyntheticDubbing, "video", small_video)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures, sounds, videos


def captioned(folder):
    """Pictures of two aspect ratios with captions, one of them unreadable, and two broken lines."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(24):
        size = (40, 40, 3) if i % 2 else (60, 40, 3)
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(f"{i}.png\tpicture {i}. It is noise. --ar 1")
    (folder / "9.png").write_bytes((folder / "9.png").read_bytes()[:60])
    (folder / "a.tsv").write_text("\n".join([*lines, "no tab here", "gone.png\tgone"]))
    return folder


def speech(seconds, seed=0, rate=16000):
    """Sound that changes all the time."""
    rng = np.random.default_rng(seed)
    times = np.arange(0, seconds * rate + rate, rate // 8)
    levels = rng.uniform(0, 0.5, math.ceil(seconds * 8) + 9)[:len(times)]
    loud = np.interp(np.arange(round(seconds * rate)), times, levels)
    return (loud * rng.standard_normal(len(loud)) * 0.3).astype(np.float32)


def smooth_pictures(count, size=16, seed=0):
    """uint8 (count, 3, size, size), smooth enough to survive encoding."""
    small = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(small, (size, size), mode="bilinear").mul(255).byte()


def write_video(path, frames, sound=None):
    with VideoWriter(path, *frames.shape[2:], sound=sound) as video:
        for frame in frames.permute(0, 2, 3, 1).numpy():
            video.write(frame)
    return path


def shards(folder, state, count=2):
    """Write a state dict as a folder with an index, as Hugging Face stores large models -> the folder."""
    folder.mkdir()
    names = {k: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, k in enumerate(state)}
    for name in set(names.values()):
        save_file({k: v for k, v in state.items() if names[k] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder
