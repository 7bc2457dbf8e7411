"""`train.py syncnet --evaluate`: a SyncNet on unseen videos."""
import numpy as np
import torch
from tqdm import tqdm

import syncnet
from lib.clips import FolderSyncClips, open_sync_clips
from lib.console import UserError, choose_device
from lib.speech_tasks import SyncNetTask
from lib.talking_head import shift_sound
from syncnet import FPS


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
