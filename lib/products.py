"""Products with weights on a CPU: in which layout the weights lie, and how many threads multiply.

Drawing multiplies a few rows with every weight of a model, again and again, and what is fast differs between CPUs.
F.linear goes to MKL, which is slow on CPUs of other makers. oneDNN is fast on all of them once a weight is packed,
stored in the order in which the product reads it. `prepare` measures both and takes the faster way. Packed products do
not depend on the number of threads, so that may be chosen anew while a picture is drawn: threads of a small product
wait for each other, and while another process keeps a core busy, one thread alone is faster than two.
"""
import copy
import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

STEPS = ("forward_scale", "decode_one")         # the methods of models that are called for every scale or token
SMALLEST = 2**18                                # numbers in a weight that is worth packing
ROWS = (2, 64)                                  # numbers of rows for which the ways to multiply are compared
TOLERATED = 1.2                                 # weights are packed unless that takes so many times as long: two ways
                                                # that are alike must not change places from run to run
PROBE_SECONDS = 0.008                           # longer than the time for which a scheduler gives a core away
SECONDS_BETWEEN_PROBES = 2.0


class PackedWeight(torch.Tensor):
    """A weight (c_out, c_in) in oneDNN's layout, which F.linear takes like any other. It has no gradient.

    Shape, dtype and device are those of the weight, but its elements can be read with `dense` only. Anything else that
    reads them finds NaN.
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


def packed_product(x, weight, bias=None):
    """x (..., c_in) times a PackedWeight (c_out, c_in), plus bias (c_out,) -> (..., c_out)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight.packed, bias, "none", [], "")


class Products:
    """How a model on a CPU multiplies: whether its weights are packed, and the number of threads of a step."""

    def __init__(self, model):
        layers = large_layers(model)
        middle = sorted(layers, key=lambda layer: layer.weight.numel())[len(layers) // 2]
        self.seconds = measure(middle.weight.detach())
        self.packed = self.seconds.get("packed", math.inf) < TOLERATED * self.seconds["plain"]
        self.most_threads = torch.get_num_threads()
        self.threads = self.most_threads
        self.probed = -math.inf
        if not self.packed:
            return
        for layer in layers:                                                # one by one: each dense weight is freed
            layer._parameters["weight"] = PackedWeight(layer.weight)
        self.weight = middle.weight                                         # with which threads are compared
        for name in STEPS:
            if hasattr(model, name):
                setattr(model, name, self.with_threads(getattr(model, name)))

    def with_threads(self, step):
        """A method of a model that runs with the number of threads that is best at the moment."""
        def run(*args, **kwargs):
            if self.most_threads > 1 and time.perf_counter() - self.probed > SECONDS_BETWEEN_PROBES:
                self.probe()
            torch.set_num_threads(self.threads)
            try:
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
        torch.set_num_threads(self.most_threads)
        self.threads = max(speeds, key=speeds.get)
        self.probed = time.perf_counter()

    def __str__(self):
        plain = f"{1e6 * self.seconds['plain']:.0f} us"
        if "packed" not in self.seconds:
            return f"F.linear ({plain}), because this PyTorch packs no weights of this type"
        packed = f"{1e6 * self.seconds['packed']:.0f} us"
        if not self.packed:
            return f"F.linear ({plain}), which is faster here than packed weights ({packed})"
        return f"packed weights ({packed}; F.linear {plain}), {self.threads} of {self.most_threads} threads"


def measure(weight):
    """Seconds of products of a few rows with a dense weight: {"plain": F.linear, "packed": oneDNN, if there is one}."""
    ways = {"plain": weight}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise") and weight.dtype == torch.float32:
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
    start = time.perf_counter()
    count = 0
    seconds = 0.0
    while seconds < PROBE_SECONDS:
        F.linear(x, weight)
        count += 1
        seconds = time.perf_counter() - start
    return count / seconds


def large_layers(model):
    """The linear layers whose products take longer than the call of a product."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.weight.numel() >= SMALLEST]


@torch.no_grad()
def prepare(model):
    """Make products of a model on a CPU fast, in place -> Products. It cannot be trained or saved afterwards.

    On another device, or without large linear layers, nothing happens and None is returned.
    """
    layers = large_layers(model)
    if not layers or layers[0].weight.device.type != "cpu":
        return None
    return Products(model)


def unpacked(module):
    """A copy of a prepared model with dense weights. It shares all weights that are not packed."""
    twin = copy.copy(module)
    for name in STEPS:
        twin.__dict__.pop(name, None)                                       # the class's own method again
    twin._parameters = {}
    for name, weight in module._parameters.items():
        twin._parameters[name] = weight.dense() if isinstance(weight, PackedWeight) else weight
    twin._modules = {name: child and unpacked(child) for name, child in module._modules.items()}
    return twin
