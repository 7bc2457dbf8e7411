"""`train.py MODEL --evaluate FILE`: how well does a model do on data that no training has seen?"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import syncnet
import var
import vq
from lib.clips import FolderSyncClips, open_data, open_sync_clips
from lib.console import UserError, choose_device, save_json
from lib.emoji import Emoji
from lib.judge import judge_drawings
from lib.pictures import psnr, ssim, to_input
from lib.reconstruction import Usage
from lib.speech_tasks import SyncNetTask
from lib.talking_head import shift_sound
from lib.text import load_infinity, load_llamagen
from lib.weights import check_fingerprint, read_metadata
from syncnet import FPS

PARTS = {"pairs": "unseen pairs of thing and style", "things": "unseen things"}     # of the demo's held-out pictures


def evaluate(args, task_class):
    """Print how well the model in --evaluate does on held-out data, and write the numbers to --json."""
    if args.model_name == "syncnet":
        return evaluate_syncnet(args)
    device, why = choose_device(args.device)
    # Tokens are needed once, Infinity flips no bits, and the task's own model has random weights.
    args = argparse.Namespace(**vars(args) | dict(cache_crops="0", strength=0.0, init=None))
    train_set, unseen = open_data(args)
    task = task_class(args, train_set, unseen, device, torch.Generator(device).manual_seed(args.seed), micro_batches=1)
    if args.model_name == "vq":
        score = score_tokenizer
        model = load_tokenizer(args).to(device)
    else:
        score = score_generator
        model = load_generator(task).to(device)
    print(f"{args.evaluate}: {device} ({why}), {len(unseen):,} unseen {unseen.kinds}")
    parts = {"all": unseen}
    if args.data == "demo":
        parts |= {part: Emoji(args.size, part, args.captions) for part in PARTS}
    result = {"file": Path(args.evaluate).name}
    for part, data in parts.items():
        task.val_set = data
        result[part] = score(task, model)
        print(f"{PARTS.get(part, part)} ({len(data):,}): {in_words(result[part])}")
    if args.model_name != "vq" and args.data == "demo":
        result["drawings"] = judge_drawings(task, model, parts["pairs"])
    save_json(args.json, result)


def load_tokenizer(args):
    """The tokenizer in --evaluate, of any recipe. Raises UserError if it does not take pictures of --size."""
    model = vq.load(args.evaluate)
    config = model.config
    cells, _ = vq.as_pairs(config.patch_nums)[-1]
    if not config.single_scale and args.size != config.stride * cells:
        raise UserError(f"--size {args.size}: {args.evaluate} takes pictures of {config.stride * cells} pixels")
    return model


def load_generator(task):
    """The model in --evaluate. Raises UserError if it is not one of this recipe, with this tokenizer."""
    args = task.args
    load = {"var": var.load, "llamagen": load_llamagen, "infinity": load_infinity}[args.model_name]
    model = load(args.evaluate)
    ours = {name: tuple(p.shape) for name, p in task.model.state_dict().items()}
    theirs = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    different = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if different:
        name = different[0]
        raise UserError(f"--evaluate {args.evaluate}: is not a model of recipe {args.recipe} ({name} is "
                        f"{theirs.get(name, 'missing')}, expected {ours.get(name, 'none')}); give the --recipe and "
                        "--data that it was trained with")
    metadata = read_metadata(args.evaluate)
    check_fingerprint(task.tokenizer, args.vae, metadata, args.evaluate)
    args.sampling = metadata.get("sampling", args.sampling)
    return model.eval()


def in_words(scores):
    """{name: value} as one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())


@torch.no_grad()
def score_tokenizer(task, model):
    """Reconstruction of a data set's pictures, bits per picture, and how much of the codes they use, in percent."""
    usage = Usage(model)

    def reconstruct(batch, generator):
        image = to_input(batch[0], task.device)
        tokens = model.tokenize(image)
        usage.count(tokens)
        decoded = model.detokenize(tokens)
        return torch.stack([psnr(decoded, image), ssim(decoded, image)]).cpu()
    quality = torch.cat(task.map_batches(reconstruct), 1).mean(1).tolist()
    config = model.config
    tokens = sum(h * w for h, w in vq.as_pairs(config.patch_nums))
    bits = tokens * (math.log2(config.vocab_size) if config.vocab_size else config.z_channels)
    return {"PSNR": quality[0], "SSIM": quality[1], "bits per picture": bits, usage.what + ", %": usage.percent()}


def score_generator(task, model):
    """Held-out loss in nats (per token, or for Infinity per bit), what else validation gives, and bits per picture."""
    scores = task.validate(model)
    numbers = task.tokens_per_picture * (model.config.bits if task.args.model_name == "infinity" else 1)
    return scores | {"bits per picture": scores["loss"] * numbers / math.log(2)}


# ----------------------------------------------------------------------------------------------------------------------
# SyncNet


def evaluate_syncnet(args):
    """Print the accuracy on pairs of unseen videos, and the offsets found in sound shifted by -7 .. 7 frames."""
    device, why = choose_device(args.device)
    model = syncnet.load(args.evaluate, device=device)
    if isinstance(model, syncnet.OriginalSyncNet):
        raise UserError(f"{args.evaluate}: is the original SyncNet, whose distances say neither yes nor no; sample.py "
                        "syncnet scores videos with it")
    if args.data == "demo":
        _, unseen = open_sync_clips(args, model.config)
        which = f"unseen {unseen.kinds}"
    else:                                                                   # all of them, not only those held out
        unseen = FolderSyncClips(args.val_data or args.data, model.config, train=False, split=False)
        which = f"videos of {unseen.root}"
    task = SyncNetTask(args, unseen, unseen, device, torch.Generator(device), micro_batches=1)
    print(f"{args.evaluate}: {device} ({why}), {len(unseen):,} {which}")
    scores = task.validate(model)
    print(f"{scores['accuracy']:.2%} of {args.val_pairs:,} pairs classified correctly (loss {scores['loss']:.3f})")
    videos = [(frames[:4 * FPS], sound) for frames, sound in unseen.first_usable(10)]
    offsets = {}
    for shift in tqdm(range(-7, 8), unit="shift", leave=False):
        offsets[shift] = [syncnet.score(model, frames, shift_sound(sound, shift)).offset for frames, sound in videos]
    print(f"{'sound moved by':>14}{'offset found':>14}{'error':>8}{'exact':>8}     "
          f"(medians of {len(videos)} videos, 4 s of each)")
    all_errors = []
    for shift, found in offsets.items():                                    # a delayed sound has a negative offset
        errors = np.abs(np.array(found) + shift)
        all_errors += errors.tolist()
        print(f"{shift:>+14d}{np.median(found):>+14.0f}{np.median(errors):>8.0f}{(errors == 0).mean():>8.0%}")
    exact = np.mean(np.array(all_errors) == 0)
    print(f"median error over all {len(all_errors)}: {np.median(all_errors):.0f} frames; exact: {exact:.1%}")
