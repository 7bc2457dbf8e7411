"""What a training run leaves behind and how it ends: checkpoints, log, timing, signals."""
import csv
import errno
import importlib.util
import json
import math
import os
import signal
import socket
import time

import torch

import vq
from lib.bench import product_speed
from lib.console import DTYPES, UserError, check_writable, rank_and_world, say
from lib.parallel import all_reduce_max
from lib.pictures import chart, save_png, sheet_of_charts

SAVE_DTYPES = DTYPES | {"fp8": torch.float8_e4m3fn}
RESULTS = ("model.safetensors", "best.safetensors", "log.csv")


def open_folder(args):
    """Create --out -> (its path, the open file that keeps other runs out of it; None on ranks other than 0).

    Raises UserError if it cannot be written, if another run is writing into it, or if another run's results would be
    lost in it. Results without a checkpoint, from which a run could continue, are moved into a folder of their own.
    """
    out = check_writable(args.out)
    for name in (*RESULTS, "best.json", "curves.png", "unreadable.txt"):
        if (out / name).is_dir():
            raise UserError(f"{out / name}: is a folder, but a run writes a file of that name; choose another --out")
    for name in ("state", "samples"):
        if (out / name).exists() and not (out / name).is_dir():
            raise UserError(f"{out / name}: is a file, but a run writes a folder of that name; choose another --out")
    if rank_and_world()[0] != 0:
        return out, None
    lock = lock_folder(out)
    results = [name for name in (*RESULTS, "state", "state.pt") if (out / name).exists()]
    if args.resume == "no" and results:
        raise UserError(f"--out {out}: it holds a run already; continue it with --resume auto, or choose another --out")
    if "state.pt" in results:
        raise UserError(f"{out}/state.pt: was written by an older version, which this one cannot continue; start a new "
                        f"run with --init {out}/model.safetensors")
    if results and not any(out.glob("state/*/notes.json")):
        aside = out / f"before-{time.strftime('%Y%m%d-%H%M%S')}"
        aside.mkdir()
        for name in results:
            os.replace(out / name, aside / name)
        say(f"{out}: there is no checkpoint to go on from; {', '.join(results)} of an earlier run -> {aside}")
    return out, lock


def lock_folder(out):
    """Keep other runs out of a folder for as long as the file that is returned stays open. Raises UserError.

    The system unlocks it when this process ends, however it ends.
    """
    try:
        import fcntl
    except ImportError:                                                     # Windows
        return None
    file = open(out / ".lock", "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            raise UserError(f"--out {out}: another run writes into it ({file.read().strip()}); stop that one, or "
                            "choose another --out") from None
        return file                                                         # a file system without locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


class Best:
    """The best validation score so far, kept in best.json beside best.safetensors."""

    def __init__(self, path, resumed):
        self.path = path
        self.score = -math.inf
        if resumed and path.exists():
            try:
                score = float(json.loads(path.read_text(encoding="utf-8"))["score"])
                if not math.isfinite(score):
                    raise ValueError(f"score is {score}")
                self.score = score
            except (OSError, ValueError, LookupError, TypeError) as e:
                say(f"{path}: is damaged ({e}); the next validation counts as the best so far")

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
            rows = [row for row in self.rows() if number(row["step"]) <= resume_step]
        with vq.atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(path.with_name("tensorboard"), purge_step=resume_step)

    def rows(self):
        """All rows that have a number in the column "step". A file without that column is set aside."""
        with open(self.path, encoding="utf-8-sig", errors="replace", newline="") as f:
            reader = csv.DictReader(f)
            try:
                if "step" in (reader.fieldnames or ()):
                    return [row for row in reader if math.isfinite(number(row["step"]))]
            except csv.Error:
                pass
        aside = self.path.with_name(f"{self.path.name}.damaged-{os.urandom(3).hex()}")
        os.replace(self.path, aside)
        say(f"{self.path}: is not the log of a run and was renamed to {aside.name}")
        return []

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
        """(steps, values) of the rows that have a number in a column; "nan" counts as one."""
        rows = [row for row in self.rows() if row.get(name) == "nan" or not math.isnan(number(row.get(name)))]
        return [number(row["step"]) for row in rows], [number(row[name]) for row in rows]

    def draw(self):
        """Write curves.png: the training loss and all validation metrics."""
        charts = [chart({"": self.column("loss")}, "loss in training", "steps", size=(400, 300))]
        for name in self.columns:
            if name.startswith("val_") and self.column(name)[0]:
                title = name.replace("val_", "validation: ")
                charts.append(chart({"": self.column(name)}, title, "steps", size=(400, 300)))
        save_png(self.path.with_name("curves.png"), sheet_of_charts(charts, min(3, len(charts))))


def number(text):
    """The number in a cell; nan if there is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


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
    """Within a `with`, Ctrl-C, SIGTERM and SIGHUP (the end of the terminal) are noted and do not end the process.

    Another signal, more than a second later, ends it at once. Where nohup ignores SIGHUP, it stays ignored.
    """

    def __enter__(self):
        self.number = 0                                                     # of the first signal that arrived; 0: none
        self.when = 0.0                                                     # the time of the first one
        self.old = [(s, signal.signal(s, self.note)) for s in (signal.SIGINT, signal.SIGTERM)]
        hangup = getattr(signal, "SIGHUP", None)                            # Windows has none
        if hangup and signal.getsignal(hangup) != signal.SIG_IGN:
            self.old.append((hangup, signal.signal(hangup, self.note)))
        return self

    def note(self, number, frame):
        if self.number and time.monotonic() - self.when > 1:                # torchrun may send the same signal twice
            raise KeyboardInterrupt
        if not self.number:
            self.number = number
            self.when = time.monotonic()

    def arrived(self):
        """The number of the signal that any process received, or 0. Collective."""
        return all_reduce_max(self.number)

    def __exit__(self, *_):
        for s, handler in self.old:
            signal.signal(s, handler)
