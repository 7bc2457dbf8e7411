"""What a training run leaves behind and how it ends: checkpoints, log, timing, signals."""
import csv
import importlib.util
import json
import math
import os
import pickle
import shutil
import signal
import sys
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import vq
from lib.bench import product_speed
from lib.console import DTYPES, UserError, check_writable, rank_and_world
from lib.parallel import TIMEOUT, all_gather_objects, all_reduce_max
from lib.pictures import chart, save_png, sheet_of_charts

SAVE_DTYPES = DTYPES | {"fp8": torch.float8_e4m3fn}
NOT_WRITTEN = (OSError, RuntimeError, ValueError, SafetensorError, dcp.api.CheckpointException)     # a full disk
NOT_READABLE = (OSError, RuntimeError, KeyError, EOFError, ValueError, AttributeError, pickle.UnpicklingError,
                dcp.api.CheckpointException)


def open_folder(args):
    """Create --out. Raises UserError if it cannot be written, or if another run's results would be lost in it."""
    out = check_writable(args.out)
    (out / "samples").mkdir(exist_ok=True)
    if args.resume == "no" and any((out / name).exists() for name in ("state", "state.pt", "model.safetensors")):
        raise UserError(f"--out {out}: it holds a run already; continue it with --resume auto, or choose another --out")
    if (out / "state.pt").exists():
        raise UserError(f"{out}/state.pt: was written by an older version, which this one cannot continue; start a new "
                        f"run with --init {out}/model.safetensors")
    return out


def say(line):
    """Print a line above the progress bar, on rank 0 only."""
    if rank_and_world()[0] == 0:
        tqdm.write(line)
        sys.stdout.flush()


class Checkpoints:
    """The state of a run in FOLDER/STEP/: tensors and notes.json.

    torch.distributed.checkpoint writes the tensors while training goes on. Every process writes its share, and any
    number of processes can read them. A folder gets its name when it is complete. The `keep` newest stay. A full disk
    does not end the run: `failed` says what was not written, and the next save tries again.
    """

    def __init__(self, folder, keep):
        self.folder = folder
        self.keep = keep
        self.rank = rank_and_world()[0]
        self.pending = None                                                 # (temporary folder, future) being written
        self.failed = {}                                                    # {file: why it could not be written}
        self.group = None
        if dist.is_initialized():                                           # a group of its own: training never waits
            self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def complete(self):
        """All complete folders, the newest last."""
        return sorted(path for path in self.folder.glob("[0-9]*") if (path / "notes.json").exists())

    def newest(self):
        """The newest complete folder as rank 0 sees it, or None. Collective."""
        folders = all_gather_objects(self.complete())[0]
        return folders[-1] if folders else None

    # writing

    def attempt(self, file, write, name=None):
        """Call write(), print what went wrong, and remember it in `failed` -> whether it worked."""
        self.failed.pop(file, None)
        try:
            write()
        except NOT_WRITTEN as e:
            reason = os.strerror(e.errno) if isinstance(e, OSError) and e.errno else str(e).strip().splitlines()[-1]
            steps = [int(path.name) for path in self.complete()]
            intact = f"step {steps[-1]} is intact" if steps else "nothing is saved yet"
            self.failed[file] = f"could not save {name or file} ({reason})"
            say(f"{self.failed[file]}; {intact}")
        return file not in self.failed

    def save(self, step, tensors, notes):
        """Start to write a checkpoint. Collective."""
        self.finish()
        self.attempt("state", lambda: self.begin(step, tensors, notes), f"step {step}")

    def begin(self, step, tensors, notes):
        """Copy the tensors and start to write them. Raises OSError if there is no room for the first file."""
        temporary = self.folder / f".{step:07d}"
        known = (self.folder / f"{step:07d}").exists()
        error = None
        if self.rank == 0 and not known:
            try:
                for leftover in self.folder.glob(".[0-9]*"):                # left by a run that was killed
                    shutil.rmtree(leftover)
                temporary.mkdir(parents=True)
                (temporary / "notes.json").write_text(json.dumps(notes, indent=1), encoding="utf-8")
            except OSError as e:
                error = e.strerror
        error, known = all_gather_objects((error, known))[0]                # all processes do what rank 0 decides
        if error:
            raise OSError(error)
        if known:                                                           # no step was taken since it was written
            return
        world = rank_and_world()[1]
        copies = {}
        whole = 0                                                           # tensors so far that all processes have
        for name, x in tensors.items():
            if not isinstance(x, DTensor):
                whole += 1
                if whole % world != self.rank:                              # each process writes every world-th of them
                    continue
            on_cpu = x.device.type == "cpu"
            copies[name] = x.detach().clone() if on_cpu else x.detach()     # async_save copies tensors of a GPU itself
        writer = dcp.FileSystemWriter(temporary)
        self.pending = temporary, dcp.async_save(copies, storage_writer=writer, process_group=self.group)

    def poll(self):
        if self.pending and self.pending[1].done():
            self.finish()

    def finish(self):
        """Wait until the checkpoint that is being written is complete."""
        if self.pending:
            self.attempt("state", self.rename, f"step {int(self.pending[0].name[1:])}")

    def rename(self):
        """Give the written folder its name, and delete old ones."""
        (temporary, future), self.pending = self.pending, None
        future.result()
        if self.rank == 0:
            os.replace(temporary, temporary.with_name(temporary.name[1:]))
            for old in self.complete()[:-self.keep]:
                shutil.rmtree(old)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Finish pending writes, except after a second Ctrl-C."""
        if kind is not None and kind is not KeyboardInterrupt:
            self.finish()

    # reading

    def notes(self, path):
        try:
            return json.loads((path / "notes.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise self.unusable(path, e) from None

    def load(self, path, tensors_for):
        """Fill the tensors that tensors_for(names of saved tensors) returns, {name: tensor}. Collective."""
        try:
            reader = dcp.FileSystemReader(path)
            tensors = tensors_for(reader.read_metadata().state_dict_metadata)
            dcp.load(tensors, storage_reader=reader, process_group=self.group)
        except NOT_READABLE as e:
            raise self.unusable(path, e) from None

    def unusable(self, path, error):
        reason = (str(error) or type(error).__name__).strip().splitlines()[-1]
        earlier = [p.name for p in self.complete() if p != path]
        way_out = f" to go on from step {int(earlier[-1])}" if earlier else " or choose another --out"
        return UserError(f"{path}: cannot continue from it ({reason}); delete it{way_out}")


def named_tensors(learners, ema=None, saved=None):
    """All tensors of a run by name, to be saved or filled.

    learners: {name: (module, optimizer)}. The optimizer's tensors are named after the weight that they belong to, which
    is shorter than torch.distributed.checkpoint.state_dict's names and also works for weights without a gradient so
    far. saved: names in a checkpoint; the optimizer's tensors are created first.
    """
    tensors = {}
    if ema is not None:
        tensors |= {f"ema.{name}": x for name, x in ema.state_dict().items()}
    for what, (model, optimizer) in learners.items():
        tensors |= {f"{what}.{name}": x for name, x in model.state_dict().items()}
        for name, p in model.named_parameters():
            if saved is not None and f"{what}.{name}.exp_avg" in saved:
                optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                      "exp_avg_sq": torch.zeros_like(p)}
            tensors |= {f"{what}.{name}.{key}": x for key, x in optimizer.state.get(p, {}).items()}
    return tensors


class Best:
    """The best validation score so far, kept in best.json beside best.safetensors."""

    def __init__(self, path, resumed):
        self.path = path
        self.score = -math.inf
        if resumed and path.exists():
            self.score = json.loads(path.read_text())["score"]

    def write(self, step, score):
        self.score = score
        if rank_and_world()[0] == 0:
            with vq.atomic(self.path) as temporary:
                temporary.write_text(json.dumps({"step": step, "score": score}))


class Log:
    """log.csv with a row every few steps, curves.png, and TensorBoard's files if that package is installed.

    A resumed run drops the rows after its checkpoint. Only rank 0 writes.
    """

    COLUMNS = ["step", "loss", "lr", "grad_norm", "seconds", "step_seconds", "data_wait", "images_per_s",
               "tokens_per_s", "flops_share", "memory_gb", "skipped"]

    def __init__(self, path, task, resume_step):
        self.path = path
        self.board = None
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
            csv.DictWriter(f, self.columns).writerow({name: self.cell(value) for name, value in row.items()})
        if self.board:
            for name, value in row.items():
                one_per_scale = isinstance(value, torch.Tensor) and value.numel() > 1
                if name != "step" and not one_per_scale:
                    self.board.add_scalar(name, float(value), row["step"])
            self.board.flush()

    @staticmethod
    def cell(value):
        """Six digits of a number; several numbers of a tensor, one per scale, in one cell."""
        if isinstance(value, torch.Tensor):
            return " ".join(f"{v:.6g}" for v in value.detach().flatten().tolist())
        return f"{value:.6g}" if isinstance(value, float) else value

    def column(self, name):
        """(steps, values) of the rows that have a value in a column."""
        with open(self.path, encoding="utf-8") as f:
            rows = [row for row in csv.DictReader(f) if row[name]]
        return [int(row["step"]) for row in rows], [float(row[name]) for row in rows]

    def draw(self):
        """Write curves.png: the training loss and all validation metrics."""
        charts = [chart({"": self.column("loss")}, "loss in training", "steps", size=(400, 300))]
        for name in self.columns:
            if name.startswith("val_") and self.column(name)[0]:
                title = name.replace("val_", "validation: ")
                charts.append(chart({"": self.column(name)}, title, "steps", size=(400, 300)))
        save_png(self.path.with_name("curves.png"), sheet_of_charts(charts, min(3, len(charts))))


class Meter:
    """How long steps take, and how long they wait for data, since the last log row."""

    def __init__(self, device, dtype, memory):
        self.limit = product_speed(device, dtype)                           # FLOP/s of a large matrix product
        self.memory = memory
        self.flops = 0                                                      # FLOP per micro-batch. 0: not counted
        self.start()

    def start(self):
        self.steps = 0
        self.seconds = 0.0
        self.waited = 0.0

    def numbers(self, batch_size, accum, tokens):
        """The numbers for a log row. Counting starts again."""
        seconds = self.seconds / max(self.steps, 1)
        row = {"step_seconds": seconds, "data_wait": self.waited / self.seconds, "images_per_s": batch_size / seconds,
               "memory_gb": self.memory() / 1e9, "flops_share": self.flops * accum / seconds / self.limit}
        if tokens:
            row["tokens_per_s"] = row["images_per_s"] * tokens
        self.start()
        return row


class StopOnSignal:
    """Within a `with`, Ctrl-C and SIGTERM are noted instead of ending the process. A second Ctrl-C ends it at once."""

    def __enter__(self):
        self.number = 0                                                     # number of the signal that arrived
        self.when = 0.0
        self.old = [(s, signal.signal(s, self.note)) for s in (signal.SIGINT, signal.SIGTERM)]
        return self

    def note(self, number, frame):
        if self.number and time.monotonic() - self.when > 1:                # torchrun may send the same signal twice
            raise KeyboardInterrupt
        self.number = self.number or number
        self.when = time.monotonic()

    def arrived(self):
        """The number of the signal that any process received, or 0. Collective."""
        return all_reduce_max(self.number)

    def __exit__(self, *_):
        for s, handler in self.old:
            signal.signal(s, handler)
