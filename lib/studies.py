"""Experiments of the papers in small: what makes SyncNet learn, what stage 2 of LatentSync adds, VAR's scaling laws.

Each function gets `train` from train.py and runs it several times. A run that was interrupted continues.
"""
import argparse
import csv
import math

import numpy as np
import torch

import latentsync
import var
from lib.clips import open_data
from lib.console import UserError, check_writable, choose_device
from lib.pictures import chart, grid, save_png, sheet_of_charts, to_pixels, write_table
from lib.speech_tasks import LatentSyncTask

# SyncNet: settings of the recipe "study" that each run replaces
SYNCNET_STUDY = {
    "clips in a batch": {"4": dict(batch_size=1), "12": {}, "36": dict(batch_size=9)},
    "frames of a clip": {"5": dict(frames=5), "16": {}, "25": dict(frames=25)},
    "numbers of an embedding": {"64": dict(embedding=64), "256": {}, "512": dict(embedding=512)},
    "network": {"residual, attention": {}, "residual": dict(attention=False),
                "Wav2Lip's kind": dict(model="talking_head_plain")},
    "training videos": {"clean": {}, "sound moved, up to 10 frames": dict(audio_offset=10),
                        "faces not aligned": dict(unaligned=True)},
    "loss": {"contrast, then cross entropy": {}, "cross entropy alone": dict(contrast_steps=0),
             "single pairs, as in the paper": dict(contrast_steps=0, moments=1, batch_size=12)},
}
# LatentSync: settings of stage 2 that each run replaces
STAGE2_STUDY = {
    "noise loss alone": dict(sync_weight=0.0, trepa_weight=0.0),
    "with SyncNet": dict(trepa_weight=0.0),
    "with SyncNet and TREPA": {},
}
STAGE2_VIDEOS = 16                              # unseen videos that score each run
LADDER = (1, 2, 3, 4, 5, 6)                     # depths of VAR; the demo's models are 32 wide per block


def changed(args, folder, **changes):
    """The arguments of one run of a study."""
    return argparse.Namespace(**vars(args) | changes | {"out": str(folder), "resume": "auto", "sample_every": 0})


def validations(folder):
    """Rows of a run's log that have validation metrics."""
    with open(folder / "log.csv", encoding="utf-8") as f:
        return [row for row in csv.DictReader(f) if row["val_loss"]]


def curve(log, column):
    """(steps, values) of a column of rows of a log."""
    return [int(row["step"]) for row in log], [float(row[column]) for row in log]


def study_syncnet(args, train):
    """`train.py syncnet --study`: a short run of every setting in SYNCNET_STUDY, a table and a picture."""
    if args.frames or args.embedding or args.attention is not None:
        raise UserError("--study: varies --frames, --embedding and --attention itself; leave them out")
    out = check_writable(args.out)
    rows = []
    charts = []
    for panel, settings in SYNCNET_STUDY.items():
        curves = {}
        for label, changes in settings.items():
            name = "_".join(f"{key}_{value}" for key, value in changes.items()) or "base"   # shared by all panels
            print(f"{panel}: {label}")
            train(changed(args, out / name, **changes, val_every=max(1, args.steps // 6)))
            log = validations(out / name)
            rows += [{"panel": panel, "setting": label} | row for row in log]
            curves[label] = curve(log, "val_loss")
        charts.append(chart(curves, panel, "steps", "loss", [(math.log(2), "ln 2: always one half")], y_range=(0, 0.9),
                            size=(400, 300)))
    write_table(out / "study.csv", rows)
    save_png(out / "study.png", sheet_of_charts(charts), {"model": "syncnet", "steps": args.steps})
    print(f"curves in {out}/study.csv and {out}/study.png")


def study_latentsync(args, train):
    """`train.py latentsync --study`: stage 2 from the same weights and with the same draws for each of STAGE2_STUDY.

    All runs, the start and the true frames are scored on unseen videos. Writes study.csv, curves and frames.
    """
    if not args.init:
        raise UserError("--study: give what stage 1 has made as --init FILE")
    out = check_writable(args.out)
    device, _ = choose_device(args.device)
    generator = torch.Generator(device).manual_seed(args.seed)
    task = LatentSyncTask(args, *open_data(args), device, generator, micro_batches=1)
    rows = []
    strips = {}
    curves = {}

    def score(label, model):
        row = task.scores_of_painted(model, STAGE2_VIDEOS)
        rows.append({"": label} | row)
        strips[label] = task.paint(model, 0)[0][8:40:4]
        print(", ".join([label, *(f"{name} {value:.3f}" for name, value in row.items())]))
    score("true frames", None)
    score("before: stage 1", task.model)
    for label, changes in STAGE2_STUDY.items():
        folder = out / label.replace(" ", "_")
        print(f"{label}:")
        train(changed(args, folder, **changes))
        curves[label] = validations(folder)
        score(label, latentsync.load(folder / "model.safetensors", device=device))
    write_table(out / "study.csv", rows)
    charts = []
    for name in ("sync_c", "flicker", "lmd"):
        if name in rows[0]:
            lines = {label: curve(log, f"val_{name}") for label, log in curves.items()}
            charts.append(chart(lines, name, "steps", size=(400, 300)))
    columns = min(map(len, strips.values()))
    frames = torch.cat([strip[:columns] for strip in strips.values()])
    save_png(out / "study.png", sheet_of_charts(charts), {"model": "latentsync", "steps": args.steps})
    save_png(out / "study_frames.png", grid(to_pixels(frames.add(1).div(2)), columns), {"rows": ", ".join(strips)})
    print(f"table in {out}/study.csv, curves in {out}/study.png, frames in {out}/study_frames.png")


def scaling_laws(args, train):
    """`train.py var --scaling-laws`: section 4.2 of VAR's paper in small.

    Models of all depths in LADDER see the same batches. Their losses on unseen pictures are fitted as loss = a N^alpha,
    where N is the number of parameters in the blocks. The paper counts AdaLN as well, which all blocks share here.
    The lowest loss for a given compute C is fitted in the same way, over the validations of all runs, as in the paper.
    C counts 6 FLOP per token and parameter of blocks and head; the compute of attention is not in it. --lr is for the
    recipe's own depth; wider models need lower rates (muP, arXiv 2203.03466). Writes scaling.csv and scaling.png.
    """
    out = check_writable(args.out)
    usual_depth = var.CONFIGS[args.model].depth
    rows = []
    curves = {}                                                             # depth -> (compute, loss) of validations
    for depth in LADDER:
        folder = out / f"d{depth}"
        print(f"depth {depth}:")
        train(changed(args, folder, depth=depth, lr=args.lr * usual_depth / depth))
        log = validations(folder)
        model = var.load(folder / "model.safetensors")
        in_blocks = sum(p.numel() for p in model.blocks.parameters())
        tokens = sum(p * p for p in model.config.patch_nums)
        flop = 6 * (in_blocks + model.head.weight.numel()) * tokens * args.batch_size       # of a step
        steps, losses = curve(log, "val_loss")
        curves[depth] = [step * flop for step in steps], losses
        row = {"depth": depth, "parameters": in_blocks, "steps": steps[-1], "FLOP": steps[-1] * flop}
        row |= {name: float(log[-1][f"val_{name}"]) for name in ("loss", "tail_loss", "accuracy", "tail_accuracy")}
        rows.append(row | {"lowest_loss": min(losses)})
    write_table(out / "scaling.csv", rows)
    charts = [*laws_of_size(rows), law_of_compute(curves)]
    save_png(out / "scaling.png", sheet_of_charts(charts, 3), {"model": "var", "steps": args.steps})
    print(f"table in {out}/scaling.csv, picture in {out}/scaling.png")


def laws_of_size(rows):
    """Fit the four laws of N, print them, and draw a chart of each."""
    sizes = np.array([row["parameters"] for row in rows])
    charts = []
    for name, title in (("loss", "loss, all scales"), ("tail_loss", "loss, last scale"),
                        ("accuracy", "error, all scales"), ("tail_accuracy", "error, last scale")):
        values = np.array([row[name] for row in rows])
        if "accuracy" in name:
            values = 1 - values
        law, line = power_law(sizes, values, "N")
        print(f"{title}: {law}")
        points = [(x, y, f"d{row['depth']}") for x, y, row in zip(np.log10(sizes), np.log10(values), rows)]
        charts.append(chart({law: line}, title, "log10 N", "log10", (), points, size=(400, 300)))
    return charts


def law_of_compute(curves):
    """Fit the lowest loss that any model reached with a given compute, print the law, and draw all curves.

    A validation counts if no other one with less compute has a loss as low.
    """
    points = sorted((flop, loss) for xs, ys in curves.values() for flop, loss in zip(xs, ys))
    frontier = [point for i, point in enumerate(points) if all(point[1] < loss for _, loss in points[:i])]
    law, line = power_law(*np.array(frontier).T, "C")
    print(f"lowest loss for a compute of C FLOP: {law}")
    lines = {f"d{depth}": (np.log10(xs), np.log10(ys)) for depth, (xs, ys) in curves.items()}
    return chart(lines | {law: line}, "loss, all scales", "log10 FLOP", "log10", size=(400, 300))


def power_law(xs, values, letter):
    """Fit values = a x^alpha by least squares between logarithms -> (the law in words, its line in logarithms of 10).

    r is the correlation of the logarithms.
    """
    alpha, offset = np.polyfit(np.log10(xs), np.log10(values), 1)
    r = np.corrcoef(np.log10(xs), np.log10(values))[0, 1]
    ends = [np.log10(xs).min() - 0.1, np.log10(xs).max() + 0.1]
    return f"{10**offset:.3g} {letter}^{alpha:.4f}, r = {r:.3f}", (ends, [alpha * x + offset for x in ends])
