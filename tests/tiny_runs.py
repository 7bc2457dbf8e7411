"""Runs of train.py on tiny networks, in a process of their own: `python tiny_runs.py RUNS.json`, or under torchrun.

RUNS.json: [[argument, ...], ...], one after the other. In the environment, LEGIBLE_FAULT names something that goes
wrong: see `break_something`.
"""
import json
import math
import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import pytest
import torch

import sample
import test_latentsync_training
import test_syncnet
import test_train
import train


def make_tiny():
    """The configs of all tests of training."""
    monkeypatch = pytest.MonkeyPatch()
    test_train.make_tiny(monkeypatch)
    test_syncnet.make_tiny(monkeypatch)
    test_latentsync_training.make_tiny(monkeypatch)


def break_something(fault):
    """nan:N[:M] a loss that is not a number in steps N ... M; die:N, in step N process 1 is killed; sleep:S, every step
    takes S seconds; reader:N, the process that reads item N is killed. And contiguous: weights lie in memory as FSDP wants
    them, so that convolutions sum in the same order."""
    kind, *numbers = fault.split(":")
    numbers = [float(n) for n in numbers]
    whole = train.Run.next_batch
    if kind == "nan":
        loss = train.TokenizerTask.loss

        def broken(self, batch, step, g):
            value, metrics = loss(self, batch, step, g)
            return value * (math.nan if numbers[0] <= step <= numbers[-1] else 1.0), metrics
        train.TokenizerTask.loss = broken
    if kind == "die":
        def dying(self):
            if self.step == numbers[0] and self.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(self)
        train.Run.next_batch = dying
    if kind == "contiguous":
        start = train.Run.start_engine

        def start_engine(self):
            for p in self.task.model.parameters():
                p.data = p.data.clone(memory_format=torch.contiguous_format)
            start(self)
        train.Run.start_engine = start_engine
    if kind == "sleep":
        import time
        train.Run.next_batch = lambda self: time.sleep(numbers[0]) or whole(self)
    if kind == "reader":
        read = train.PictureFolder.read

        def killed(self, index, crop):
            if index == numbers[0] and torch.utils.data.get_worker_info():
                os.kill(os.getpid(), signal.SIGKILL)
            return read(self, index, crop)
        train.PictureFolder.read = killed


if __name__ == "__main__":
    torch.set_num_threads(1)                                                # two of these share the machine
    make_tiny()
    train.VAL_HEADS = 1
    break_something(os.environ.get("LEGIBLE_FAULT", ""))
    for argv in json.loads(Path(sys.argv[1]).read_text()):
        sample.guarded(train.train, train.parse_args([str(a) for a in argv]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
