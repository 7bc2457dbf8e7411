"""`sample.py ops`: what the ops of triton_ops.py have to move, and how fast they are."""
import itertools
import math
import time

import torch
from torch.utils._pytree import tree_flatten

from lib.bench import copy_bandwidth, device_name, op_seconds
from triton_ops import REGISTRY, backend


def sorting_sampler(cond, uncond, cfg, top_k, top_p, noise):
    """sample_logits as it is usually written, with sorts."""
    logits = cfg * cond.float() + (1 - cfg) * uncond.float()
    logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    ascending, index = logits.sort(-1)
    ascending = ascending.masked_fill(ascending.softmax(-1).cumsum(-1) <= 1 - top_p, float("-inf"))
    return (torch.empty_like(logits).scatter_(-1, index, ascending).softmax(-1) / noise).argmax(-1)


def whole_distance_matrix(z, codes):
    """vq_nearest as it is usually written."""
    z, codes = z.float(), codes.float()
    return torch.addmm(z.square().sum(1, keepdim=True) + codes.square().sum(1), z, codes.T, alpha=-2).argmin(1)


TEXTBOOK = {"sample_logits": sorting_sampler, "vq_nearest": whole_distance_matrix}     # others: their lines in torch


def peers(name):
    """Functions of installed packages that do the same as an op, or nearly: {name: function of the op's arguments}."""
    if name == "vq_nearest":
        return {"cdist().argmin": lambda z, codes: torch.cdist(z.float(), codes.float()).argmin(1)}
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction as Liger
    except ImportError:
        return {}

    def norm(x, scale, *_, **__):
        weight = scale[0, 0].contiguous()
        return Liger.apply(x, weight, weight, 1e-6)
    return {"liger-kernel, the norm alone": norm} if name == "adaln_modulate" else {}


def backward_of(fn, args, kwargs):
    """A function that computes the gradients of fn's tensor arguments, without its forward pass."""
    leaves = [t.detach().requires_grad_() for t in args]
    out = fn(*leaves, **kwargs)
    out = (out,) if isinstance(out, torch.Tensor) else out
    return lambda: torch.autograd.grad(out, leaves, [torch.ones_like(t) for t in out], retain_graph=True)


def largest_difference(out, expected):
    """Largest difference of two results, relative to the largest value; for indices the share that differs."""
    differences = []
    for a, b in zip(tree_flatten(out)[0], tree_flatten(expected)[0]):
        if a.dtype == torch.int64:
            differences.append((a != b).float().mean().item())
        else:
            differences.append(((a.float() - b.float()).abs().max() / b.float().abs().max()).item())
    return max(differences)


def time_op(name, shape, device, dtype, backward):
    """({version: seconds}, largest difference of our version from plain torch).

    A version that fails, and ours if it differs, has the reason in place of the seconds.
    """
    spec = REGISTRY[name]
    g = torch.Generator(device).manual_seed(0)
    args, kwargs = spec.inputs(lambda *size: torch.randn(size, generator=g, device=device).to(dtype), *shape)
    plain = TEXTBOOK.get(name, spec.fn)
    ours = "triton" if device.type == "cuda" else "fallback"
    versions = {"eager": plain, "compile": torch.compile(plain, dynamic=False), ours: spec.fn}
    if not backward:
        versions |= peers(name)
    tolerance = max(spec.tol, {torch.float32: 0, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype])
    seconds = {}
    expected = None
    difference = math.nan
    for version, fn in versions.items():
        if version == "fallback" and fn is plain:                           # the same function is not timed twice
            seconds[version] = seconds["eager"]
            difference = 0.0
            continue
        try:
            with backend("auto" if version == "triton" else "torch"):
                run = backward_of(fn, args, kwargs) if backward else lambda: fn(*args, **kwargs)
                out = run()
                if version == "eager":
                    expected = out
                if version == ours:
                    difference = largest_difference(out, expected)
                    if difference > tolerance:
                        raise ArithmeticError(f"differs from torch by {difference:.0e}")
                del out
                seconds[version] = op_seconds(run, device, graph=not backward)
        except Exception as e:                                              # the other versions go on
            seconds[version] = f"{type(e).__name__}: {e}".splitlines()[0]
    return seconds, difference


def bench_ops(names, device, dtype):
    """Print a line per op, real shape and direction -> the rows as dicts."""
    from torch._functorch import config
    config.donated_buffer = False                                           # a compiled backward has to run many times
    bandwidth = copy_bandwidth(device)
    square = torch.randn(2048, 2048, device=device)
    rate = 2 * 2048**3 / op_seconds(lambda: square @ square, device)
    info = {"device": device_name(device), "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"), "copy_bytes_per_second": bandwidth, "product_flops_per_second": rate}
    print(f"{info['device']}, {info['dtype']}, torch {info['torch']}, {info['date']}; the floor is the time of a large "
          f"copy\n({bandwidth / 1e9:.0f} GB/s) and of a float32 product ({rate / 1e9:.0f} GFLOP/s) of the same size")
    if device.type == "cpu":
        print("Triton is not timed on a CPU, where only its interpreter runs: 'ours' is the torch code that runs there")
    columns = ("MB", "floor", "eager", "compile", "ours", "x eager", "x comp.", "% floor", "differs")
    print(f"{'microseconds':<58}" + "".join(f"{c:>9}" for c in columns))
    rows = []
    for name in names:
        spec = REGISTRY[name]
        directions = (False, True) if spec.trains else (False,)
        real_shapes = list(spec.shapes.items())[1:]                         # the first one is for tests
        for (label, shape), backward in itertools.product(real_shapes, directions):
            size = spec.bytes(dtype.itemsize, *shape) * (1.5 if backward else 1)    # two tensors read for each written
            floor = max(size / bandwidth, spec.flops(*shape) / rate)
            seconds, difference = time_op(name, shape, device, dtype, backward)
            title = f"{name}{' backward' if backward else ''}: {label}"
            print_row(title, size, floor, seconds, difference)
            rows.append(info | {"op": title, "shape": [*map(str, shape)], "bytes": size, "floor_seconds": floor,
                                "seconds": seconds, "difference": None if math.isnan(difference) else difference})
    return rows


def print_row(title, size, floor, seconds, difference):
    """Print the times of one op as a line, and below it other packages and failures."""
    eager, compiled, ours = (s if isinstance(s, float) else math.nan for s in list(seconds.values())[:3])
    times = "".join(f"{s * 1e6:>9.0f}" for s in (floor, eager, compiled, ours))
    print(f"{title:<58}{size / 1e6:>9.0f}{times}{eager / ours:>9.2f}{compiled / ours:>9.2f}{100 * floor / ours:>9.0f}"
          f"{difference:>9.0e}", flush=True)
    for i, (version, s) in enumerate(seconds.items()):
        if isinstance(s, str):
            print(f"    {version}: {s}")
        elif i > 2:
            print(f"    {version}: {s * 1e6:.0f}")


def ops_table():
    """Lines of a Markdown table: what each op has to move in half precision, and how long that takes on an H100."""
    yield "| op | shape | MB | floor in us: 3.35 TB/s, float32 67 TFLOP/s |"
    yield "|---|---|---|---|"
    for name, spec in REGISTRY.items():
        for label, shape in list(spec.shapes.items())[1:]:
            size = spec.bytes(2, *shape)
            sizes = " x ".join(str(n) for n in shape if isinstance(n, int))
            floor = max(size / 3.35e12, spec.flops(*shape) / 67e12)
            yield f"| `{name}` | {label}: {sizes} | {size / 1e6:.1f} | {floor * 1e6:.1f} |"
