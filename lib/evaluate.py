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
from lib.console import UserError, check_writable, choose_device, save_json
from lib.emoji import Emoji
from lib.int8 import quantize
from lib.judge import judge_drawings
from lib.pictures import psnr, ssim, to_input
from lib.reconstruction import Usage
from lib.speech_tasks import SyncNetTask
from lib.talking_head import shift_sound
from lib.tasks import check_tokenizer
from lib.text import load_infinity, load_llamagen
from lib.weights import check_fingerprint, read_metadata
from syncnet import FPS

BATCH = 32                                      # pictures that a tokenizer gets at once
PARTS = {"pairs": "unseen pairs of thing and style", "things": "unseen things"}     # of the demo's held-out pictures


def evaluate(args, task_class):
    """Print how well the model in --evaluate does on held-out data, and write the numbers to --json."""
    if args.model_name == "syncnet":
        return evaluate_syncnet(args)
    device, why = choose_device(args.device)
    if args.model_name == "vq":
        model = vq.load(args.evaluate).to(device)
        check_size(args, model.config)
        _, unseen = open_data(args)
    else:
        check_tokenizer(args)
        check_writable(args.out)
        # Each picture is tokenized when it is scored. Without flipped bits, Infinity's loss is that of the true bits.
        args = argparse.Namespace(**vars(args) | dict(cache_crops="0", strength=0.0, init=None, lora=0))
        train_set, unseen = open_data(args)
        generator = torch.Generator(device).manual_seed(args.seed)
        task = task_class(args, train_set, unseen, device, generator, micro_batches=1)
        model = load_generator(task).to(device)
    print(f"{args.evaluate}: {device} ({why}), {len(unseen):,} unseen {unseen.kinds}")
    parts = {"all": unseen}
    if isinstance(unseen, Emoji):
        parts |= {part: Emoji(args.size, part, args.captions, styles=unseen.styles) for part in PARTS}
    result = {"file": Path(args.evaluate).name}
    for part, data in parts.items():
        result[part] = score_tokenizer(model, data, device) if args.model_name == "vq" else score(task, model, data)
        print(f"{PARTS.get(part, part)} ({len(data):,}): {in_words(result[part])}")
    if args.model_name != "vq" and isinstance(unseen, Emoji):
        result["drawings"] = judge_drawings(task, model, parts["pairs"])
    save_json(args.json, result)


def check_size(args, config):
    """Raise UserError if a tokenizer does not take pictures of --size pixels."""
    cells, _ = vq.as_pairs(config.patch_nums)[-1]
    if not config.single_scale and args.size != config.stride * cells:
        raise UserError(f"--size {args.size}: {args.evaluate} takes pictures of {config.stride * cells} pixels")


def load_generator(task):
    """The model in --evaluate. Raises UserError if it is not one of this recipe, with this tokenizer."""
    args = task.args
    if args.model_name == "llamagen":
        model = load_llamagen(args.evaluate, side=task.model.config.side)
    else:
        model = {"var": var.load, "infinity": load_infinity}[args.model_name](args.evaluate)
    ours = {name: tuple(p.shape) for name, p in task.model.state_dict().items()}
    theirs = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    different = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if different:
        name = different[0]
        raise UserError(f"--evaluate {args.evaluate}: is not a model of recipe {args.recipe} ({name} is "
                        f"{theirs.get(name, 'missing')}, expected {ours.get(name, 'none')}); give the --recipe and "
                        "the other flags that it was trained with")
    metadata = read_metadata(args.evaluate)
    check_fingerprint(task.tokenizer, args.vae, metadata, args.evaluate)
    args.sampling = metadata.get("sampling", args.sampling)                 # with which it draws
    quantize(model, args.quantize)
    return model.eval()


def in_words(scores):
    """{name: value} as one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())


@torch.no_grad()
def score_tokenizer(model, data, device):
    """Means over a data set: PSNR in dB, SSIM (at most 1), bits per picture; and the share of the codes in use."""
    usage = Usage(model)
    quality = []
    for start in tqdm(range(0, len(data), BATCH), desc="decoding", unit="batch", leave=False, disable=None):
        items = [(i, None) for i in range(start, min(start + BATCH, len(data)))]
        image = to_input(data.__getitems__(items)[0], device)
        tokens = model.tokenize(image)
        usage.count(tokens)
        decoded = model.detokenize(tokens)
        quality.append(torch.stack([psnr(decoded, image), ssim(decoded, image)]).cpu())
    mean_psnr, mean_ssim = torch.cat(quality, 1).mean(1).tolist()
    vocab_size = model.config.vocab_size
    bits = sum(t.shape[1] for t in tokens) * (math.log2(vocab_size) if vocab_size else model.config.z_channels)
    return {"PSNR": mean_psnr, "SSIM": mean_ssim, "bits per picture": bits, usage.what + ", %": usage.percent()}


def score(task, model, data):
    """Validation metrics of a generator. The loss is in nats per token, or per bit for Infinity.

    Bits per picture are those with which the model could store the tokens of a picture. Infinity's pictures of several
    aspect ratios have no common number of tokens, so they go without.
    """
    task.val_set = data
    task.most_val_pictures = len(data)
    scores = task.validate(model)
    if task.args.model_name == "infinity" and task.args.pixels:
        return scores
    symbols = task.tokens_per_picture * (model.config.bits if task.args.model_name == "infinity" else 1)
    return scores | {"bits per picture": scores["loss"] * symbols / math.log(2)}


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
    else:                                                                   # all of them: no training had them
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
