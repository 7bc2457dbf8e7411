"""--bench: how long a run takes, and how close it comes to its bare matrix products, convolutions and attention calls.

That ratio is the share of the limit. It holds on any machine: the products of a run are recorded once, replayed bare at
their shapes and layouts, and compared with the run.
"""
import functools
import math
import platform
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.flop_counter import flop_registry, register_flop_formula
from tqdm import tqdm

from lib.console import save_json, synchronize, timed
from triton_ops import backend

# Older versions of PyTorch have no formula for the attention of CPUs. get_raw: the formulas take tensors, not shapes.
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
if CPU_ATTENTION not in flop_registry:
    register_flop_formula(CPU_ATTENTION, get_raw=True)(flop_counter.sdpa_flop)
    register_flop_formula(CPU_ATTENTION_BACKWARD, get_raw=True)(flop_counter.sdpa_backward_flop)
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):                          # products with packed weights

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def packed_product_flop(x_shape, weight_shape, *_, **__):
        return 2 * math.prod(x_shape) * weight_shape[0]


class FlopCounter(TorchDispatchMode):
    """Within it, the floating point operations of all products are added up in `total`.

    PyTorch's own FlopCounterMode decomposes some operators, such as silu_backward. That changes the last digits of a
    step, and a continued run would differ from an uninterrupted one.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


@contextmanager
def count_flops(meter, compiled):
    """Within it, count the floating point operations of the first micro-batch for the log.

    torch.compile steps aside for it, because its kernels are not counted.
    """
    if meter.flops:
        yield
        return
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with eager, FlopCounter() as counter:
        yield
    meter.flops = max(counter.total, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Recording and replaying


@dataclass(frozen=True)
class Layout:
    """The layout of a tensor, and whether it is a weight."""

    shape: tuple
    stride: tuple                               # None: a weight that is packed, see lib/products.py
    dtype: torch.dtype
    device: torch.device
    is_weight: bool

    def random(self):
        """A random tensor of this layout."""
        if self.stride is None:
            return torch.ops.mkldnn._reorder_linear_weight(torch.randn(self.shape, dtype=self.dtype))
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride))      # expanded dimensions have step 0
        t = torch.empty(last + 1, dtype=self.dtype, device=self.device)
        t = t.normal_() if t.is_floating_point() else t.zero_()
        return t.as_strided(self.shape, self.stride)


@dataclass
class Call:
    """A heavy operator with the layout of its arguments, and how often it was called in a stage."""

    func: Callable
    arguments: tuple                            # (args, kwargs) with Layouts in place of tensors
    stage: str
    flops: int                                  # floating point operations of one call
    bytes: int
    count: int = 0


class Recorder(TorchDispatchMode):
    """Within it, every matrix product, convolution and attention call is recorded in `calls`."""

    def __init__(self, parameters):
        super().__init__()
        self.calls = {}
        self.stage = None
        self.weights = {p.untyped_storage().data_ptr() for p in parameters}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            arguments = tree_map(self.layout, (args, kwargs))
            key = (str(func), repr(arguments), self.stage)
            if key not in self.calls:
                flops = formula(*args, **kwargs, out_val=out)
                tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
                moved = sum(x.numel() * x.element_size() for x in tensors)
                self.calls[key] = Call(func, arguments, self.stage, flops, moved)
            self.calls[key].count += 1
        return out

    def layout(self, x):
        if not isinstance(x, torch.Tensor):
            return x
        if x.is_mkldnn:
            return Layout(tuple(x.shape), None, x.dtype, x.device, True)
        is_weight = x.untyped_storage().data_ptr() in self.weights
        return Layout(tuple(x.shape), x.stride(), x.dtype, x.device, is_weight)


def replay(call, device):
    """Seconds of all bare calls of a Call on random inputs, after one call to warm up.

    Activations stay in the cache from call to call, as they do in the model. Weights do not: each call gets another
    copy, of more than a cache holds, because in the model all other weights are read in between.
    """
    leaves, structure = tree_flatten(call.arguments)
    leaves = [x.random() if isinstance(x, Layout) and not x.is_weight else x for x in leaves]
    weights = [x for x in leaves if isinstance(x, Layout)]
    size = sum(np.prod(x.shape) * x.dtype.itemsize for x in weights)
    copies = int(min(16, max(1, -(-2**27 // size)))) if weights else 1      # 128 MB of them
    inputs = []
    for _ in range(copies):
        inputs.append(tree_unflatten([x.random() if isinstance(x, Layout) else x for x in leaves], structure))
    seconds = []
    for i in range(1 + call.count):
        args, kwargs = inputs[i % copies]
        seconds.append(timed(lambda: call.func(*args, **kwargs), device)[0])
    return sum(seconds[1:])


@contextmanager
def watch(stages, enter):
    """Wrap functions, {stage: [(owner, name)]}: enter(stage) is called before each of them and enter(None) after it."""
    wrapped = []
    for stage, functions in stages.items():
        for owner, name in functions:
            original = getattr(owner, name)

            def wrapper(*args, _original=original, _stage=stage, **kwargs):
                enter(_stage)
                try:
                    return _original(*args, **kwargs)
                finally:
                    enter(None)
            wrapped.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, wrapper)
    try:
        yield
    finally:
        for owner, name, before in wrapped:
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def split_by_stage(run, stages, rest, device):
    """Seconds of one run inside the functions of each stage, and in the `rest`."""
    spent = dict.fromkeys([rest, *stages], 0.0)
    stage_now = rest
    since = 0.0

    def enter(stage):
        nonlocal stage_now, since
        synchronize(device)
        now = time.perf_counter()
        spent[stage_now] += now - since
        stage_now = stage or rest
        since = now
    with watch(stages, enter):
        since = time.perf_counter()
        run()
        enter(None)
    return spent


# ----------------------------------------------------------------------------------------------------------------------
# The benchmark of a run


def bench(name, run, stages, rest, parameters, device, dtype, pictures, peak_memory, rounds=3):
    """Time run() -> images, and compare it with its bare heavy operators -> the dict that --json writes.

    stages: {name: [(owner, function name)]}; `rest` is the name of everything else. peak_memory: a PeakMemory from
    before the weights were loaded. A machine's speed drifts, so whole runs and replays of all recorded calls take
    turns, and the best run is compared with the best replay.
    """
    storages = {p.untyped_storage().data_ptr(): p.numel() * p.element_size() for p in parameters}
    warmup, images = timed(run, device)
    recorder = Recorder(parameters)

    def enter(stage):
        recorder.stage = stage
    with watch(stages, enter), recorder, backend("torch"):                  # the recorder does not see Triton kernels
        run()
    calls = list(recorder.calls.values())
    runs = []
    splits = []
    replays = []                                                            # per round: seconds of every Call
    peak = 0
    for _ in tqdm(range(rounds), desc="whole runs and bare operators in turn", leave=False):
        runs += [timed(run, device) for _ in range(2)]
        splits.append(split_by_stage(run, stages, rest, device))
        peak = peak or peak_memory()                                        # before the replays allocate anything
        replays.append([replay(call, device) for call in calls])
    if not all(torch.equal(images, again) for _, again in runs):
        raise RuntimeError("the same seed gave different pictures: nothing is reported")
    best = min(seconds for seconds, _ in runs) / pictures
    split = min(splits, key=lambda split: sum(split.values()))
    totals = {}
    for stage, spent in split.items():
        totals[stage] = {"seconds": best * spent / sum(split.values()), "flops": 0, "bytes": 0, "bare": 0.0}
    for seconds, call in zip(min(replays, key=sum), calls):
        total = totals[call.stage or rest]
        total["flops"] += call.flops * call.count / pictures
        total["bytes"] += call.bytes * call.count / pictures
        total["bare"] += seconds / pictures
    whole = {key: sum(total[key] for total in totals.values()) for key in ("seconds", "flops", "bytes", "bare")}
    for total in (whole, *totals.values()):
        total["share"] = total.pop("bare") / total["seconds"] if total["seconds"] else 0.0
    return {
        "model": name, "device": device_name(device), "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "pictures": pictures,
        "seconds_per_image": whole["seconds"], "warmup_seconds": warmup, "share": whole["share"],
        "flops": whole["flops"], "bytes": whole["bytes"], "stages": totals,
        "copy_bytes_per_second": copy_bandwidth(device),
        "variants": {"plain": {"seconds": whole["seconds"], "equal": True}},
        "peak_memory_bytes": peak, "weight_bytes": sum(storages.values()),
    }


def device_name(device):
    """The name of a GPU, or of the CPU and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    if device.type != "cpu":
        return str(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):                                        # not Linux, or not x86
        pass
    wide = torch.backends.cpu.get_cpu_capability()                          # such as AVX512
    return f"{name} ({wide}), {torch.get_num_threads()} threads"


def op_seconds(run, device, graph=True):
    """Seconds of a call.

    On CUDA it is the median with a cold L2 cache. Short calls are replayed in a graph, as inference does; autograd
    cannot be (graph=False). On a CPU it is the best of several calls, because some of them pay for new memory.
    """
    if device.type == "cuda":
        from triton.testing import do_bench, do_bench_cudagraph
        ms = do_bench(run, return_mode="median")
        if graph and ms < 0.02:
            ms = do_bench_cudagraph(run, return_mode="median")
        return ms / 1e3
    seconds = []
    while len(seconds) < 6 or (sum(seconds) < 0.5 and len(seconds) < 50):
        seconds.append(timed(run, device)[0])
    return min(seconds)


def copy_bandwidth(device):
    """Bytes per second, read and written, of a large copy."""
    a, b = torch.randn(2, 2**26, device=device)
    return 8 * a.numel() / op_seconds(lambda: b.copy_(a), device)


@functools.cache
def product_speed(device, dtype):
    """Floating point operations per second of a large matrix product.

    Many CPUs compute in half precision number by number, a hundred times as slowly. There a smaller product must do.
    """
    def seconds(n, times):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        return min(timed(lambda: a @ b, device)[0] for _ in range(times))
    if device.type == "cpu" and dtype != torch.float32:
        seconds(256, 1)                                                     # the first product of all is slower
        once = seconds(512, 1)
        if once > 0.012:                                                    # ten of 1024 x 1024 would take a second
            return 2 * 512**3 / once
    n = 8192 if device.type == "cuda" else 1024
    return 2 * n**3 / seconds(n, 10)


def race(run, variants, pictures, device, rounds=3, what="pictures", allowed=1e-4):
    """Time other ways to compute run() -> a tensor, {name: function}, in turn with run() itself.

    Returns {name: {seconds, plain_seconds, ratio, ratios, first_seconds, equal, max_difference, what}}. Seconds are
    medians for each of the `pictures`; ratio is the median of the rounds' ratios, seconds of run() / seconds of the
    variant. A machine's speed drifts, but both runs of a round meet the same speed, so their ratio does not. A
    variant whose result differs by more than `allowed` gets no seconds; results are numbers of order one, such as
    pictures from 0 to 1. what: the name of results.
    """
    expected = run()
    results = {}
    for name, variant in tqdm(variants.items(), desc="variants", leave=False):
        first, images = timed(variant, device)
        again = variant()                                                   # a graph may be wrong only when replayed
        difference = torch.stack([(x - expected).abs().max() for x in (images, again)]).max().item()    # NaN stays NaN
        result = {"first_seconds": first, "equal": difference <= allowed, "max_difference": difference, "what": what}
        if result["equal"]:
            pairs = []
            for _ in tqdm(range(rounds), desc=f"in turn with {name}", leave=False):
                pairs.append((timed(run, device)[0], timed(variant, device)[0]))
            ratios = [plain / seconds for plain, seconds in pairs]
            result["plain_seconds"] = statistics.median(plain for plain, _ in pairs) / pictures
            result["seconds"] = statistics.median(seconds for _, seconds in pairs) / pictures
            result["ratio"] = statistics.median(ratios)
            result["ratios"] = sorted(ratios)
        results[name] = result
    return results


@contextmanager
def busy_process():
    """Within it, another process computes all the time, as on most machines somebody does."""
    busy = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(10**6))"
    process = subprocess.Popen([sys.executable, "-c", busy])
    try:
        time.sleep(0.5)                                                     # until it has started
        yield
    finally:
        process.kill()
        process.wait()


BASELINE = "original's arithmetic"


def race_baseline(run, baseline, pictures, device, neighbour=False, **options):
    """Time baseline(), which computes what run() does as the original code does, in turn with run() -> see `race`.

    neighbour: do it again beside a busy process. options: what, allowed and rounds of `race`.
    """
    name = BASELINE
    if "what" in options:
        name += f", {options['what']}"
    results = race(run, {name: baseline}, pictures, device, **options)
    if neighbour:
        with busy_process():
            results |= race(run, {f"{name}, beside a busy process": baseline}, pictures, device, **options)
    return results


def print_bench(b, tokens=0):
    """Print the result of `bench` as a table. tokens: per picture."""
    print(f"{b['model']}  {b['device']}, {b['dtype']}, torch {b['torch']}, batch {b['pictures']}")
    print(f"{'stage':<14}{'s/picture':>10}{'GFLOP':>9}{'GFLOP/s':>9}{'GB':>7}{'GB/s':>7}{'share of the limit':>21}")
    for stage, s in [*b["stages"].items(), ("total", b | {"seconds": b["seconds_per_image"]})]:
        print(f"{stage:<14}{s['seconds']:>10.3f}{s['flops'] / 1e9:>9.1f}{s['flops'] / s['seconds'] / 1e9:>9.0f}"
              f"{s['bytes'] / 1e9:>7.1f}{s['bytes'] / s['seconds'] / 1e9:>7.1f}{s['share']:>21.2f}")
    warmup = b["warmup_seconds"] / b["pictures"]
    speed = f"{tokens / b['seconds_per_image']:.1f} tokens/s; " if tokens else ""
    print(f"{speed}first run {warmup:.2f} s/picture; the share is the time of the bare\n"
          "matrix products, convolutions and attention calls / the time of the run; a large copy\nreads and writes "
          f"{b['copy_bytes_per_second'] / 1e9:.1f} GB/s")
    print(f"peak memory {b['peak_memory_bytes'] / 1e9:.2f} GB, weights alone {b['weight_bytes'] / 1e9:.2f} GB")
    if b.get("products"):
        print(f"products: {b['products']}")
    for name, v in b["variants"].items():
        if name == "plain":
            continue
        found = f"{v['what']} bit-identical"
        if v["max_difference"]:
            found = f"{v['what']} {v['max_difference']:.0e} apart at most"
        if not v["equal"]:
            print(f"{name}: NOT EQUAL, so not timed; {found}")
        elif name.startswith(BASELINE):
            print(f"{name}: ours / original's {v['ratio']:.2f} ({v['ratios'][0]:.2f} .. {v['ratios'][-1]:.2f}), "
                  f"{v['plain_seconds']:.2f} / {v['seconds']:.2f} s per picture; {found}")
        else:
            print(f"{name}: {v['seconds']:.3f} s/picture, {v['ratio']:.2f}x; {found}; first run "
                  f"{v['first_seconds']:.1f} s")


# ----------------------------------------------------------------------------------------------------------------------
# A training step


@dataclass
class TrainingStep:
    """A training step that can be repeated, because its learning rate is 0. The stages are methods, to be timed."""

    model: torch.nn.Module
    engine: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    micro_batches: list
    generator: torch.Generator
    autocast: Callable
    clip: float
    update_ema: Callable                        # or None

    def __call__(self):
        for i, batch in enumerate(self.micro_batches):
            self.generator.manual_seed(i)
            loss = self.forward(batch)
            self.backward(loss)
        self.update()
        return loss.detach()

    def forward(self, batch):
        with self.autocast():
            return self.engine(batch, 0, self.generator)[0] / len(self.micro_batches)

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def update(self):
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.update_ema:
            self.update_ema()


def bench_training_step(one_step, args, tokens, device, dtype, memory):
    """`train.py MODEL --bench`: time a step and its stages, and compare them with their bare operators."""
    one_step.model.train()
    for group in one_step.optimizer.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0
    stages = {name: [(one_step, name)] for name in ("forward", "backward", "update")}
    result = bench(f"{args.model_name} {args.recipe}", one_step, stages, "rest", one_step.model.parameters(), device,
                   dtype, args.batch_size, memory)
    print_bench(result, tokens)
    save_json(args.json, result)
