"""Train a model. One loop from batch to optimizer serves all of them.

    python train.py vq                                              the demo's tokenizer; an hour and a half on a CPU
    python train.py var --vae runs/vq/model.safetensors             class -> emoji, scale by scale
    python train.py llamagen                                        class -> emoji, token by token
    python train.py infinity                                        text -> emoji, with a small T5 on words
    python train.py infinity --evaluate runs/infinity/model.safetensors     how well does it draw unseen combinations?
    python train.py vq  --recipe imagenet --data DIR --lpips vgg16.pth vgg_lpips.pth
    python train.py var --recipe d16 --data DIR --vae vae_ch160v4096z32.pth
    python train.py infinity --recipe 2B_256 --data DIR --vae infinity_vae_d32reg.pth --t5 flan-t5-xl
    torchrun --nproc-per-node 8 train.py var ...                    data parallel

DIR holds one folder of pictures per class. For text it holds *.tsv files (picture path, tab, caption), or *.jsonl files
in the format of Infinity's authors; pictures may have any aspect ratio. A run writes into --out: model.safetensors,
which sample.py reads, state/, from which --resume auto continues, log.csv, curves.png and samples/. On a CPU a
continued run gives bit for bit the numbers of a run without a break. It may continue with another number of processes.

Where to look: lib/recipes.py has all settings, lib/tasks.py and lib/speech_tasks.py have what differs between models,
lib/parallel.py has DDP and FSDP, lib/run.py has checkpoints, log and signals.
"""
import argparse
import signal

from lib import recipes


def parse_args(argv=None):
    """The command line -> a Namespace with a value for every setting of the recipe."""
    style = dict(formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, **style)
    models = parser.add_subparsers(dest="model_name", metavar="MODEL", required=True)
    for model, its_recipes in recipes.RECIPES.items():
        subparser = models.add_parser(model, help=f"recipes: {', '.join(its_recipes)}", **style)
        recipes.add_flags(subparser, model)
    args = parser.parse_args(argv)
    contradiction = recipes.contradiction(args)
    if contradiction:
        parser.error(contradiction)
    return recipes.fill(args)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # during the imports Ctrl-C ends the process without a traceback
    ARGS = parse_args()                         # before the imports that take seconds, so that --help answers at once

import copy
import functools
import json
import math
import os
import re
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import vq
from lib import lora, parallel, studies
from lib.bench import TrainingStep, bench_training_step, count_flops
from lib.clips import open_data
from lib.checkpoints import Checkpoints, named_tensors
from lib.console import (DTYPES, Interrupted, PeakMemory, UserError, check_json, check_ranges, choose_device,
                         rank_and_world, run_command, say)
from lib.data import order_of_batches, report_broken
from lib.evaluate import evaluate
from lib.int8 import reduced
from lib.memory import planned
from lib.parallel import all_gather_objects
from lib.prepare import prepare
from lib.readers import read_batches
from lib.run import SAVE_DTYPES, Best, Log, Meter, StopOnSignal, open_folder
from lib.speech_tasks import LatentSyncTask, SyncNetTask, VideoMAETask, WhisperTask
from lib.tasks import AutoencoderTask, InfinityTask, LlamaGenTask, T5Task, TokenizerTask, VARTask

TASKS = {"vq": TokenizerTask, "var": VARTask, "infinity": InfinityTask, "llamagen": LlamaGenTask,
         "syncnet": SyncNetTask, "whisper": WhisperTask, "videomae": VideoMAETask, "t5": T5Task,
         "latentsync": LatentSyncTask}


def task_of(args):
    """The Task class of a command line."""
    if args.model_name == "vq" and isinstance(vq.CONFIGS[args.model], vq.KLConfig):
        return AutoencoderTask
    return TASKS[args.model_name]


def train(args):
    """Train a model.

    A step depends only on its number and on the state that the step before left. The random numbers of a micro-batch
    are seeded with (seed, step, its number in the batch). The number of processes therefore changes only the order of
    sums.
    """
    # Where it runs.
    rank, world = rank_and_world()
    device, device_why = choose_device(args.device)
    dtype = DTYPES[args.dtype]
    autocast = functools.partial(torch.autocast, device.type, dtype, args.dtype != "fp32")
    memory = PeakMemory(device)
    parallel.join(device)
    out, lock = open_folder(args)                                           # `lock` keeps other runs out

    # Where it stopped last time. A continued run keeps its number of micro-batches per batch, whatever --accum says.
    checkpoints = Checkpoints(out / "state", args.keep)
    resume_from, notes = checkpoints.newest() if args.resume == "auto" else (None, {})
    micro_batches = notes.get("micro_batches", args.accum * world)
    if micro_batches != args.accum * world:
        say(f"note: this run goes on with {micro_batches} micro-batches per step, as it began; --accum and the number "
            "of processes do not change that")
    accum = micro_batches_per_process(args, micro_batches, world)

    # What it learns, and from what. The seed gives all processes the same weights.
    train_set, val_set = open_data(args)
    generator = torch.Generator(device).manual_seed(args.seed)
    drawing = nullcontext                                                   # as sample.py draws
    frozen = {}                                                             # weights that every process has from a file
    if getattr(args, "lora", 0):
        with reduced(args.quantize or dtype):
            task = task_of(args)(args, train_set, val_set, device, generator, micro_batches)
        model = task.model
        lora.wrap(model, args.lora, args.lora_alpha or args.lora, args.lora_layers, generator)
        drawing = autocast                                                  # weights have several dtypes
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        frozen |= {name: b for name, b in model.named_buffers() if b.dtype == torch.int8}
    else:
        task = task_of(args)(args, train_set, val_set, device, generator, micro_batches)
        model = task.model
    if args.checkpointing:
        model.checkpointing = True
    ema = None
    if args.ema:
        ema = copy.deepcopy(model, {id(p): p for p in frozen.values()}).requires_grad_(False)
    if args.compile:
        for block in parallel.repeated_blocks(model):
            block.compile(dynamic=False)
    if args.fsdp:
        engine = parallel.shard(model, dtype, task.loss)
        if ema is not None:
            parallel.shard(ema, torch.float32)
    else:
        engine = parallel.data_parallel(model, task.loss, task.unused_weights)
    exported = model if ema is None else ema                                # what is validated, drawn and exported
    optimizer = torch.optim.AdamW(parameter_groups(model), args.lr, args.betas, eps=1e-8, fused=True)
    # Start, growth and cap (below) of the scale are those of VAR's authors. Only fp16 is scaled.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**11, growth_interval=1000, enabled=args.dtype == "fp16")
    learners = {"model": (model, optimizer)} | task.learners                    # {name: (module, optimizer)}
    tensors = functools.partial(named_tensors, learners, ema, without=frozen)

    # Continue, if it is the same run.
    step = 0
    skipped = 0                                                             # steps whose gradient was not finite
    skipped_in_a_row = 0                                                    # counts from here, overflows of fp16 too
    settings = describe_run(args, task)
    if resume_from:
        refuse_other_settings(resume_from, notes["settings"], settings, args.override or ())
        checkpoints.load(resume_from, lambda saved: tensors(saved=saved))
        scaler.load_state_dict(notes["scaler"])
        step = notes["step"]
        skipped = notes["skipped"]
    last_step = min(task.steps, step + args.stop_after) if args.stop_after else task.steps

    # Data from the present step on. Only data sets that read files get processes for reading.
    order = functools.partial(order_of_batches, task.train_set, args, micro_batches=micro_batches, rank=rank,
                              world=world)
    workers = args.workers if getattr(task.train_set, "READS_FILES", False) else 0
    reading = functools.partial(read_batches, task.train_set, order(step), workers, device.type == "cuda")
    meter = Meter(device, dtype, memory)
    if args.bench:
        ema_step = functools.partial(update_ema, ema, model, args.ema, step) if ema is not None else None
        with reading() as batches:
            one_batch = [next(batches) for _ in range(accum)]
        one_step = TrainingStep(model, engine, optimizer, scaler, one_batch, generator, autocast, args.clip, ema_step)
        return bench_training_step(one_step, args, task.tokens_per_picture, device, dtype, memory)

    best = Best(out / "best.json", resumed=resume_from is not None)
    log = Log(out / "log.csv", task, step) if rank == 0 else None
    unreadable = set()                                                      # paths
    started = time.perf_counter()
    if rank == 0:
        parameters = sum(p.numel() for p in model.parameters())
        shared = f" on {world} processes ({'FSDP' if args.fsdp else 'DDP'})" if world > 1 else ""
        print(f"{device} ({device_why}){shared}, {args.dtype}, {parameters:,} parameters, {len(task.train_set):,} "
              f"{train_set.kinds}, steps {step} to {task.steps}", flush=True)
    hidden = None if rank == 0 else True                                    # None: shown only in a terminal
    bar = tqdm(total=task.steps, initial=step, disable=hidden, smoothing=0.05)
    signal_number = 0
    warmup_steps = args.warmup * task.steps
    model.train()
    with StopOnSignal() as stop, checkpoints, reading() as batches:
        task.interrupted = lambda: bool(stop.number)
        while step < last_step and not signal_number:
            # Forward and backward, one micro-batch after the other.
            step_started = time.perf_counter()
            lr = args.lr * learning_rate(step, task.steps, args.schedule, warmup_steps, args.warmup_from, args.final_lr)
            set_rates(optimizer, lr, weight_decay(step, task.steps, args.wd, args.wd_end))
            parts = []                                                      # loss and metrics of each micro-batch
            for i in range(accum):
                waiting_since = time.perf_counter()
                batch = next(batches)
                unreadable.update(batch[2])
                meter.waited += time.perf_counter() - waiting_since
                seed_draws(generator, args.seed, step, rank + i * world)
                with parallel.gradient_sync(engine, last=i == accum - 1), count_flops(meter, args.compile):
                    with autocast():
                        loss, metrics = engine(batch, step, generator)      # calls task.loss
                    scaler.scale(loss / accum).backward()                   # the last call averages over processes
                parts.append({"loss": loss.detach()} | {k: v.detach() for k, v in metrics.items()})
            row = {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}

            # Clip and update. One micro-batch whose gradient is not finite makes the average not finite. Then this step
            # changes no weight, but it counts as a step.
            scaler.unscale_(optimizer)
            grad_norm = parallel.unshard(torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip))
            if math.isfinite(grad_norm):                                    # the norm is the same on all processes
                skipped_in_a_row = 0
                scaler.step(optimizer)
                seed_draws(generator, args.seed, step, micro_batches)       # all processes draw the same
                row |= task.after_step(step, lr, generator)                 # such as the discriminator's update
                if ema is not None:
                    update_ema(ema, model, args.ema, step)
                    task.sync_ema(ema)
            else:
                skipped += 1
                skipped_in_a_row += 1
                if skipped_in_a_row >= args.max_skipped:
                    losses = [part["loss"] for part in parts]
                    raise UserError(explain_skipped(task.train_set, order(step), losses, skipped_in_a_row, step))
            scaler.update()
            if args.dtype == "fp16" and scaler.get_scale() > 2.0**15:
                scaler.update(2.0**15)                                      # VAR's authors cap it there
            optimizer.zero_grad()
            step += 1
            meter.steps += 1
            meter.seconds += time.perf_counter() - step_started
            bar.update()

            # Report. The checkpoint comes first, because it cannot be computed again. It is written in the background.
            checkpoints.poll()
            due = functools.partial(is_due, step, last_step)
            if any(map(due, (args.log_every, args.val_every, args.sample_every, args.save_every))):
                row = mean_over_processes(row) | meter.numbers(args.batch_size, accum, task.tokens_per_picture)
                row |= {"step": step, "lr": lr, "grad_norm": grad_norm, "skipped": skipped}
                row["seconds"] = time.perf_counter() - started
                bar.set_postfix(loss=f"{float(row['loss']):.4g}", lr=f"{lr:.2g}", refresh=False)
            if due(args.save_every):
                save(checkpoints, tensors(), settings, step, micro_batches, skipped, scaler)
                export(checkpoints, task, exported, out / "model.safetensors", args)
            scores = {}
            if due(args.val_every):
                with suppress(Interrupted), parallel.full_model(exported) as full, autocast():
                    scores = task.validate(full.eval())
            if scores:
                say(f"step {step}: " + ", ".join(f"val {name} {value:.4g}" for name, value in scores.items()))
                row |= {f"val_{name}": value for name, value in scores.items()}
                score = task.score(scores)
                if score > best.score:
                    written = export(checkpoints, task, exported, out / "best.safetensors", args)
                    if written:
                        checkpoints.attempt("best.json", lambda: best.write(step, score))
            if due(args.sample_every):
                picture = out / "samples" / f"{step:07d}"
                with suppress(Interrupted), parallel.full_model(exported) as full, drawing():
                    if rank == 0:
                        picture.parent.mkdir(exist_ok=True)
                        checkpoints.attempt(str(picture), lambda: task.show(full.eval(), picture))
            if rank == 0 and (due(args.log_every) or due(args.val_every)):
                checkpoints.attempt("a row of log.csv", lambda: log.write(row))
                if not sys.stderr.isatty():
                    say(describe_step(row, task.steps))
            if rank == 0 and due(args.val_every):
                checkpoints.attempt("curves.png", log.draw)
            model.train()
            signal_number = stop.arrived() if step < last_step else 0       # all processes stop after the same step

        # The end.
        if signal_number:
            save(checkpoints, tensors(), settings, step, micro_batches, skipped, scaler)
            export(checkpoints, task, exported, out / "model.safetensors", args)
        bar.close()
        checkpoints.finish()
        broken = sorted(set().union(*all_gather_objects(unreadable)))       # on all processes
        if broken and rank == 0:
            report_broken(broken, task.train_set)
            lines = os.fsencode("\n".join(broken) + "\n")                  # names need not be UTF-8
            checkpoints.attempt("unreadable.txt", lambda: (out / "unreadable.txt").write_bytes(lines))
        if rank == 0:
            checkpoints.attempt("curves.png", log.draw)
            how = "stopped" if last_step < task.steps else "done"
            if signal_number:
                how = "interrupted"
            more = "; go on with --resume auto" if step < task.steps else ""
            print(f"{how} at step {step} of {task.steps}, {time.perf_counter() - started:.0f} s; weights in "
                  f"{out}/model.safetensors{more}", flush=True)
    not_saved = checkpoints.failed.get("state") or checkpoints.failed.get("model.safetensors")
    if not_saved:
        raise UserError(f"--out {out}: {not_saved}; make room and go on with --resume auto")
    if not all(parallel.unshard(torch.isfinite(p).all()) for p in exported.parameters()):
        raise UserError(f"--out {out}: the weights are not finite numbers any more; start again with a lower --lr, or "
                        "with --dtype bf16 or fp32")
    if signal_number:
        sys.exit(128 + signal_number)


# ----------------------------------------------------------------------------------------------------------------------
# Optimization


def learning_rate(step, steps, schedule, warmup_steps, warmup_from, final):
    """The learning rate at a step, as a share of its peak: a linear warm-up, a plateau, then a fall to `final`.

    Of the steps after the warm-up:
    lin, lin0, lin00: a plateau of 15, 5 or 0 %, then a straight line
    exp: a plateau of 15 %, then a geometric fall; cos: half a cosine; const: no fall
    linT, such as lin0.8: two straight lines that meet at share T, at the mean of 1 and of what one line gives there
    Raises UserError for other names.
    """
    if step < warmup_steps:
        return warmup_from + (1 - warmup_from) * step / warmup_steps
    progress = (step - warmup_steps) / max(steps - 1 - warmup_steps, 1)     # 0 .. 1
    if schedule == "const":
        return 1.0
    if schedule == "cos":
        return final + (1 - final) * (0.5 + 0.5 * math.cos(math.pi * progress))
    plateaus = {"lin": 0.15, "lin0": 0.05, "lin00": 0.0, "exp": 0.15}
    if schedule in plateaus:
        plateau = plateaus[schedule]
        if progress < plateau:
            return 1.0
        if schedule == "exp":
            return max(final, 1e-8) ** ((progress - plateau) / (1 - plateau))
        return final + (1 - final) * (1 - progress) / (1 - plateau)
    if not re.fullmatch(r"lin0?\.\d*[1-9]\d*", schedule):
        raise UserError(f"--schedule {schedule}: choose lin, lin0, lin00, lin0.8, cos, exp or const")
    bend = float(schedule.removeprefix("lin"))
    middle = (1 + final + (1 - final) * (1 - bend)) / 2                     # the rate at the bend
    if progress < bend:
        return 1 + (middle - 1) * progress / bend
    return final + (middle - final) * (1 - progress) / (1 - bend)


def weight_decay(step, steps, start, end):
    """The weight decay at a step: half a cosine from `start` to `end` over the whole run. If `end` is 0 it stays."""
    end = end or start
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * step / max(steps - 1, 1)))


def parameter_groups(model):
    """Groups for AdamW: matrices decay. Vectors do not, nor does what NO_DECAY of the model names (positions, scales).
    """
    spared = getattr(model, "NO_DECAY", ())
    decaying = []
    others = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decays = p.ndim > 1 and not name.endswith("bias") and not any(word in name for word in spared)
        group = decaying if decays else others
        group.append(p)
    return [{"params": decaying, "decay": 1.0}, {"params": others, "decay": 0.0}]


def set_rates(optimizer, lr, wd):
    """Set the learning rate of all groups, and the weight decay of the groups that decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = wd * group["decay"]


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """Update the exponential moving average of the weights. Its memory is shorter in the first steps. Buffers are
    copied, frozen weights are the same tensors."""
    decay = min(decay, (1 + step) / (10 + step))
    pairs = [(mine, theirs) for mine, theirs in zip(ema.parameters(), model.parameters()) if theirs.requires_grad]
    torch._foreach_lerp_(*zip(*pairs), 1 - decay)
    for mine, theirs in zip(ema.buffers(), model.buffers()):
        if mine is not theirs:
            mine.copy_(theirs)


def seed_draws(generator, seed, step, micro_batch):
    """Seed the generator for a micro-batch of a step."""
    generator.manual_seed(int(np.random.default_rng((seed, step, micro_batch)).integers(2**63)))


# ----------------------------------------------------------------------------------------------------------------------
# Around the loop


def micro_batches_per_process(args, micro_batches, world):
    """How many of a batch's micro-batches each process gets. Raises UserError if they cannot be shared evenly."""
    accum, left = divmod(micro_batches, world)
    if left:
        raise UserError(f"{args.out}: this run cuts a batch into {micro_batches} micro-batches, which {world} "
                        f"processes cannot share; start a number of processes that divides {micro_batches}")
    if args.batch_size % micro_batches:
        processes = f" times {world} processes" if world > 1 else ""
        raise UserError(f"--batch-size {args.batch_size}: not divisible by --accum {accum}{processes}")
    return accum


def describe_run(args, task):
    """The settings that a continued run may not change, as a JSON file gives them back.

    Raises UserError if the processes of this run do not agree.
    """
    config = getattr(task.model, "config", None)
    sizes = {f"config.{name}": value for name, value in asdict(config).items()} if config else {}
    settings = recipes.compared(args) | sizes | task.identity()
    settings |= {"data": task.train_set.fingerprint, "validation data": task.val_set.fingerprint}
    settings = json.loads(json.dumps(settings, default=str))
    different = set()
    for theirs in all_gather_objects(settings):
        different |= {name for name in theirs if theirs[name] != settings[name]}
    if different:
        raise UserError(f"processes do not see the same {', '.join(sorted(different))}: all machines need the same "
                        "--data, --out and weights")
    return settings


def refuse_other_settings(path, then, now, override=()):
    """Raise UserError if a checkpoint comes from a run with other settings. The message lists those that differ.

    override: names of settings that may differ.
    """
    allowed = {name.replace("-", "_") for name in override}
    changed = [f"{name} was {then.get(name)}, now {now.get(name)}"
               for name in {**then, **now} if then.get(name) != now.get(name) and name not in allowed]
    if changed:
        raise UserError(f"{path}: is of another run ({'; '.join(changed)}); give the same flags, or another --out, or "
                        "change a flag on purpose with --override")


def is_due(step, last_step, every):
    """Whether something that happens after every `every` steps happens now. After the last step everything does."""
    return step == last_step or (every > 0 and step % every == 0)


def save(checkpoints, tensors, settings, step, micro_batches, skipped, scaler):
    """Start to write everything that is needed to continue exactly here."""
    notes = {"settings": settings, "step": step, "micro_batches": micro_batches, "skipped": skipped,
             "scaler": scaler.state_dict(), "torch": torch.__version__}
    checkpoints.save(step, tensors, notes)


def export(checkpoints, task, model, path, args):
    """Write the file that sample.py reads -> whether it worked. All processes must call it; rank 0 writes."""
    worked = True
    with parallel.full_model(model) as full:
        if rank_and_world()[0] == 0:
            write = task.save
            if getattr(args, "lora", 0):
                write = functools.partial(lora.save, classes=getattr(task, "classes", []))
            worked = checkpoints.attempt(path.name, lambda: write(full.eval(), path, SAVE_DTYPES[args.save_dtype]))
    return all_gather_objects(worked)[0]


def mean_over_processes(row):
    """Means of the metrics over all processes. All processes must call it."""
    rows = all_gather_objects({name: value.float().cpu() for name, value in row.items()})
    return {name: torch.stack([one[name] for one in rows]).mean(0) for name in rows[0]}


def describe_step(row, steps):
    """A log row as a line, for output that is not a terminal."""
    return (f"step {row['step']}/{steps}: loss {float(row['loss']):.4g}, lr {row['lr']:.2g}, "
            f"{row['step_seconds']:.3g} s/step, {row['images_per_s']:.3g} images/s, waiting for data "
            f"{row['data_wait']:.1%}")


def explain_skipped(data, batches, losses, count, step):
    """The message when too many steps in a row had no finite gradient. All processes must call it."""
    name_of = getattr(data, "name", "number {}".format)
    guilty = [items for items, loss in zip(batches, losses) if not math.isfinite(loss)]
    own_names = [name_of(i) for items in guilty for i, _ in items]
    names = [name for found in all_gather_objects(own_names) for name in found]
    of_items = f"; in the last one the loss was not finite for {', '.join(names[:8])}: look at these" if names else ""
    return (f"no finite gradient in {count} steps in a row, up to step {step + 1}{of_items}; lower --lr or use --dtype "
            "bf16; --resume auto goes on from the last checkpoint")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def check_args(args):
    """Raise UserError for what argparse does not check."""
    check_ranges(*recipes.out_of_range(args))
    learning_rate(1, 2, args.schedule, 0, 0, 1)                             # raises if --schedule is unknown
    evaluates = getattr(args, "evaluate", None)
    if not evaluates:                                                       # else the settings of training do not count
        task_of(args).check_args(args)
    check_json(args, args.bench or evaluates and args.model_name != "syncnet")
    folder = Path(args.data).resolve()
    if args.data != "demo" and folder in (Path(args.out).resolve(), *Path(args.out).resolve().parents):
        raise UserError(f"--out {args.out}: lies in --data, so its pictures would become data; choose another folder")
    if not args.steps and not args.epochs:
        raise UserError("nothing to do: give --steps or --epochs")
    if getattr(args, "lora", 0) and not args.init and not evaluates:
        raise UserError(f"--lora {args.lora}: what is to be changed? Give the weights as --init FILE")
    if getattr(args, "quantize", None) and not args.lora and not evaluates:
        raise UserError("--quantize: quantized weights cannot learn; it goes with --lora RANK, or with --evaluate")
    if args.fsdp and rank_and_world()[1] == 1:
        raise UserError("--fsdp: shards a model over several processes; start them with torchrun --nproc-per-node N")


def bench(args):
    """`train.py MODEL --bench`: time one step of a run in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        settings = vars(args) | {"out": folder, "resume": "no"}
        train(argparse.Namespace(**settings))


@planned
def main(args):
    """Train, or do what a flag asks for instead."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")      # from torch.distributed.checkpoint
    check_args(args)
    study = studies.study_latentsync if args.model_name == "latentsync" else studies.study_syncnet
    commands = {"evaluate": functools.partial(evaluate, task_class=task_of(args)), "prepare": prepare, "bench": bench,
                "study": functools.partial(study, train=train),
                "scaling_laws": functools.partial(studies.scaling_laws, train=train)}
    for flag, command in commands.items():
        if getattr(args, flag, None):
            if rank_and_world()[1] > 1:
                raise UserError(f"--{flag.replace('_', '-')}: runs in one process; start it without torchrun")
            return command(args)
    train(args)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main, ARGS, needs_output=False)
