"""Weights of linear layers as 8-bit integers, with a scale for each output channel: a quarter of the memory of float32.

A layer is quantized as soon as its weight is loaded, so the model is never in memory as a whole in another precision.
torchao's int8 weights compute the same, but it quantizes models that are in memory already. Only the memory shrinks: a
weight is cast to the precision of the run for each product. (torch._weight_int8pack_mm, which does without the cast, is
2 to 80 times as slow as this on an x86 CPU with torch 2.15.)
"""
import functools
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

import infinity
import latentsync
import llamagen
import var
import vq
from lib.console import keep_freed_memory, return_freed_memory
from lib.text import T5Encoder

LARGEST = 127                                   # of an int8, to both sides
REDUCED = (var.VAR, infinity.Infinity, llamagen.LlamaGen, latentsync.UNet, T5Encoder)


class LayerWeight(torch.Tensor):
    """Stands for the weight (c_out, c_in) of a layer that multiplies in its own way: F.linear with it calls
    layer.product. Models that use the weight of a layer without calling the layer need no change then.

    Shape, dtype and device are those of a weight. What its elements are is the layer's affair, see `like`.
    """

    @staticmethod
    def __new__(cls, layer, like):
        return torch.Tensor._make_subclass(cls, like)

    def __init__(self, layer, like):
        self.layer = layer

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.linear and isinstance(args[1], cls):
            x, weight, *bias = args
            return weight.layer.product(x, *bias, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)


class Int8Product(torch.autograd.Function):
    """x (..., c_in) times q (c_out, c_in) int8, row i of it scale[i] times as large -> (..., c_out). Only x has a
    gradient."""

    @staticmethod
    def forward(ctx, x, q, scale):
        ctx.save_for_backward(q, scale)
        return F.linear(x, (q * scale[:, None]).to(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        q, scale = ctx.saved_tensors
        return gradient @ (q * scale[:, None]).to(gradient.dtype), None, None


class Int8Linear(nn.Module):
    """A linear layer whose weight is quantized. It does not learn."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-30) / LARGEST
        self.bias = linear.bias
        self.register_buffer("q", (weight / scale[:, None]).round().to(torch.int8))
        # Stored as int32, because `.to(dtype)` casts buffers of floats, and the scale must not be rounded. What that
        # does change is `like`.
        self.register_buffer("scale_bits", scale.view(torch.int32))
        self.register_buffer("like", torch.full((1, 1), torch.nan, dtype=linear.weight.dtype, device=weight.device))

    @property
    def weight(self):
        """What models take for the weight of a linear layer. Its elements read as NaN."""
        return LayerWeight(self, self.like.expand(self.q.shape))

    @property
    def scale(self):
        """(c_out,) float32."""
        return self.scale_bits.view(torch.float32)

    def product(self, x, bias=None):
        """x (..., c_in) -> (..., c_out) in the dtype of x."""
        out = Int8Product.apply(x, self.q, self.scale)
        return out if bias is None else out + bias.to(out.dtype)

    def forward(self, x):
        return self.product(x, self.bias)


def reduce_layer(model, key, kind):
    """Make the linear layer of a model smaller whose weight has the name `key` in its state dict.

    kind: "int8", or a dtype. Tokenizers, autoencoders and judges stay as they are: they are small, and tokens would
    change.
    """
    name, _, last = key.rpartition(".")
    if last != "weight" or not isinstance(model, REDUCED):
        return
    layer = model.get_submodule(name)
    if isinstance(layer, nn.Linear) and kind == "int8":
        model.set_submodule(name, Int8Linear(layer))                        # load_strict will fill the same bias
    elif isinstance(layer, nn.Linear):
        layer.weight.data = layer.weight.data.to(kind)                      # load_strict will fill the bias


def quantize(model, kind):
    """Quantize the linear layers of a model that comes from no file, in place. kind: "int8", or None for no change."""
    for key in list(model.state_dict()) if kind else []:
        reduce_layer(model, key, kind)


@contextmanager
def reduced(kind):
    """Models that are loaded inside of this `with` have smaller linear layers. kind: "int8", a dtype, or None for no
    change."""
    if kind is None:
        yield
        return
    vq.after_loading = functools.partial(reduce_layer, kind=kind)
    return_freed_memory()                       # of a weight, which is freed when its layer is quantized
    try:
        yield
    finally:
        vq.after_loading = None
        keep_freed_memory()
