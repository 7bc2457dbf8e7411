"""Runs of train.py on tiny networks, in a process of their own: `python tiny_runs.py RUNS.json`, or under torchrun.

RUNS.json: [[argument, ...], ...], one run after the other. The environment variable LEGIBLE_FAULT names something that
goes wrong: see `break_something`.
"""
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import pytest
import torch

import helpers
import train
from lib import clips, data, parallel, tasks
from lib.console import run_command


def break_something(fault):
    """Make something go wrong.

    nan:N[:M]: the loss is not a number in steps N ... M. die:N: process 1 is killed in step N. sleep:S: every step
    takes S seconds longer. reader:N: the process that reads item N is killed. contiguous: weights lie in memory as FSDP
    wants them, so that convolutions sum in the same order.
    """
    kind, *numbers = fault.split(":")
    numbers = [float(n) for n in numbers]
    if kind == "nan":
        loss = tasks.TokenizerTask.loss

        def broken(self, batch, step, generator):
            value, metrics = loss(self, batch, step, generator)
            return value * (math.nan if numbers[0] <= step <= numbers[-1] else 1.0), metrics
        tasks.TokenizerTask.loss = broken
    if kind in ("die", "sleep"):
        seed_draws = train.seed_draws

        def disturbed(generator, seed, step, micro_batch):
            if kind == "sleep":
                time.sleep(numbers[0])
            elif step == numbers[0] and os.environ.get("RANK") == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            seed_draws(generator, seed, step, micro_batch)
        train.seed_draws = disturbed
    if kind == "contiguous":
        data_parallel = parallel.data_parallel

        def contiguous(model, *inputs):
            for p in model.parameters():
                p.data = p.data.clone(memory_format=torch.contiguous_format)
            return data_parallel(model, *inputs)
        parallel.data_parallel = contiguous
    if kind == "reader":
        read = data.PictureFolder.read

        def killed(self, index, crop):
            if index == numbers[0] and torch.utils.data.get_worker_info():
                os.kill(os.getpid(), signal.SIGKILL)
            return read(self, index, crop)
        data.PictureFolder.read = killed


if __name__ == "__main__":
    torch.set_num_threads(1)                                                # two of these share the machine
    monkeypatch = pytest.MonkeyPatch()
    helpers.make_tiny(monkeypatch)
    helpers.make_tiny_syncnet(monkeypatch)
    helpers.make_tiny_latentsync(monkeypatch)
    clips.VAL_HEADS = 1
    break_something(os.environ.get("LEGIBLE_FAULT", ""))
    for argv in json.loads(Path(sys.argv[1]).read_text()):
        run_command(train.train, train.parse_args([str(a) for a in argv]), needs_output=False)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
