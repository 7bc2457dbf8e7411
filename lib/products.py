"""Linear layers on a CPU: weights packed for oneDNN, and the number of threads that multiply.

Drawing multiplies a few rows with every weight of a model, again and again, and what is fast differs between CPUs.
F.linear goes to MKL, Intel's library, which is slow on other x86 CPUs. oneDNN is fast on them, too, once a weight is
packed, which means stored in the order in which the product reads it. `prepare` measures both ways and takes the faster
one.

The results of packed products do not depend on the number of threads. It may therefore be chosen anew while a picture
is drawn. Threads of a small product wait for each other, and while another process keeps a core busy, one thread alone
is faster than two.
"""
import copy
import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

STEPS = ("forward_scale", "decode_one")         # the methods of models that are called for every scale or token
SMALLEST = 2**18                                # elements of the smallest weight that is packed
ROWS = (2, 64)                                  # numbers of rows for which the ways to multiply are compared
TOLERATED = 1.2                                 # pack if that takes less than so many times as long, so that of two
                                                # ways that are alike always the same is taken
PROBE_SECONDS = 0.008                           # longer than a time slice of Linux's scheduler, about 3 ms: a probe has
                                                # to notice that a core is shared
SECONDS_BETWEEN_PROBES = 2.0


class PackedWeight(torch.Tensor):
    """A weight (c_out, c_in) in oneDNN's layout, which F.linear takes like any other. It has no gradient.

    Shape, dtype and device are those of the weight, but its elements can be read with `dense` only. Anything else that
    reads them finds NaN, so its results are visibly wrong.
    """

    @staticmethod
    def __new__(cls, weight):
        nothing = torch.full((), math.nan, dtype=weight.dtype).expand(weight.shape)     # four bytes of memory
        return nothing.as_subclass(cls)

    def __init__(self, weight):
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())

    def dense(self):
        """The weight as an ordinary tensor."""
        return self.packed.to_dense()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.linear:
            return packed_product(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)


def packed_product(input, weight, bias=None):
    """Input (..., c_in) times a PackedWeight (c_out, c_in), plus bias (c_out,) -> (..., c_out)."""
    return torch.ops.mkldnn._linear_pointwise(input, weight.packed, bias, "none", [], "")


class Products:
    """How a model on a CPU multiplies: whether its weights are packed, and the number of threads of a step."""

    def __init__(self, model, layers):
        middle = sorted(layers, key=lambda layer: layer.weight.numel())[len(layers) // 2]
        self.seconds = measure(middle.weight.detach())
        self.packed = self.seconds.get("packed", math.inf) < TOLERATED * self.seconds["plain"]
        self.most_threads = torch.get_num_threads()
        self.threads = self.most_threads
        self.probed = -math.inf
        if not self.packed:
            return
        for layer in layers:                                                # one by one: each dense weight is freed
            layer._parameters["weight"] = PackedWeight(layer.weight)        # `layer.weight =` takes a Parameter only
        self.weight = middle.weight                                         # with which threads are compared
        for name in STEPS:
            if hasattr(model, name):
                setattr(model, name, self.with_threads(getattr(model, name)))   # shadows the class's method

    def with_threads(self, step):
        """A method of a model that runs with the number of threads that is best at the moment.

        All threads are there again after it, because the decoder's sums do depend on their number.
        """
        def run(*args, **kwargs):
            try:
                if self.most_threads > 1 and time.perf_counter() - self.probed > SECONDS_BETWEEN_PROBES:
                    with _disable_current_modes():                          # --bench must not record these products
                        self.probe()
                torch.set_num_threads(self.threads)
                return step(*args, **kwargs)
            finally:
                torch.set_num_threads(self.most_threads)
        return run

    def probe(self):
        """Choose the number of threads for the next seconds: all, half of them, a quarter, ... or one."""
        speeds = {}
        threads = self.most_threads
        while threads:
            torch.set_num_threads(threads)
            speeds[threads] = products_per_second(self.weight)
            threads //= 2
        self.threads = max(speeds, key=speeds.get)
        self.probed = time.perf_counter()

    def __str__(self):
        plain = f"{1e6 * self.seconds['plain']:.0f} us"
        if "packed" not in self.seconds:
            return f"F.linear ({plain}), because this PyTorch has no oneDNN"
        packed = f"{1e6 * self.seconds['packed']:.0f} us"
        if not self.packed:
            return f"F.linear ({plain}), which is faster here than packed weights ({packed})"
        return f"packed weights ({packed}; F.linear {plain}), {self.threads} of {self.most_threads} threads"


def measure(weight):
    """Seconds of products of a few rows with a dense weight: {"plain": F.linear, "packed": oneDNN, if there is one}."""
    ways = {"plain": weight}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        ways["packed"] = PackedWeight(weight)
    seconds = dict.fromkeys(ways, 0.0)
    for rows in ROWS:
        x = torch.zeros(rows, weight.shape[1], dtype=weight.dtype)
        best = dict.fromkeys(ways, math.inf)
        for _ in range(4):                                                  # in turn; the first ones are slow
            for name, way in ways.items():
                start = time.perf_counter()
                F.linear(x, way)
                best[name] = min(best[name], time.perf_counter() - start)
        for name in ways:
            seconds[name] += best[name]
    return seconds


def products_per_second(weight):
    """How many products of two rows with a weight a second takes."""
    x = torch.zeros(2, weight.shape[1], dtype=weight.dtype)
    F.linear(x, weight)                                                     # a new number of threads has to be set up
    start = time.perf_counter()
    count = 0
    seconds = 0.0
    while seconds < PROBE_SECONDS:
        F.linear(x, weight)
        count += 1
        seconds = time.perf_counter() - start
    return count / seconds


def large_layers(model):
    """The linear layers that are worth packing, and not packed yet.

    Only float32 is, because not every CPU computes in half precision.
    """
    layers = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not isinstance(layer.weight, PackedWeight):
            if layer.weight.numel() >= SMALLEST and layer.weight.dtype == torch.float32:
                layers.append(layer)
    return layers


@torch.no_grad()
def prepare(model):
    """Make products of a model on a CPU fast, in place -> Products. It cannot be trained or saved afterwards.

    On another device, or without large linear layers, nothing happens and None is returned.
    """
    layers = large_layers(model)
    if not layers or layers[0].weight.device.type != "cpu":
        return None
    return Products(model, layers)


def unpacked(module):
    """A copy of a prepared model with dense weights, which take memory a second time. It shares the others."""
    twin = copy.copy(module)
    for name in STEPS:
        twin.__dict__.pop(name, None)                                       # the class's own method again
    twin._parameters = {}
    for name, weight in module._parameters.items():
        twin._parameters[name] = weight.dense() if isinstance(weight, PackedWeight) else weight
    twin._modules = {}
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else unpacked(child)
    return twin
