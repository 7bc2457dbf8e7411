"""CUDA graphs, outside of the models: copies of a model whose step is captured once and replayed from then on.

A step of a small model is hundreds of kernels of a few microseconds each, and the host needs as long to launch one. A
graph is launched once for all of them.

    model, tokenizer = captured(model), captured(tokenizer)
    images = model.sample(tokenizer, labels)            # the same pictures; the first call is slow, later ones are fast
"""
import copy

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from infinity import Infinity
from llamagen import LlamaGen
from var import VAR


class CapturedCall:
    """A function that is captured in a CUDA graph when it is first called, and replayed from then on.

    There is one graph for each combination of shapes and of arguments that are not tensors. A graph reads and writes
    fixed addresses. Tensors that are passed are therefore copied to where it reads, unless they lie in a buffer of
    `static`, a set of storage addresses that stay valid. Results are overwritten by the next call of the same
    combination. Capturing runs the function three times, so running it again must not change what it does.
    """

    def __init__(self, function, static=()):
        self.function = function
        self.static = static
        self.graphs = {}

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        given, structure = tree_flatten((args, kwargs))
        key = str(structure), *map(self._key, given)
        if key not in self.graphs:
            inputs = [x.clone() if self._is_copied(x) else x for x in given]

            def run():
                args, kwargs = tree_unflatten(inputs, structure)
                return self.function(*args, **kwargs)
            self.graphs[key] = inputs, *self.record(run)
        inputs, replay, results = self.graphs[key]
        for mine, theirs in zip(inputs, given):
            if self._is_copied(theirs):
                mine.copy_(theirs)
        replay()
        return results

    def _is_copied(self, x):
        return isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.static

    def _key(self, x):
        """What a graph depends on. A part of a static buffer is read in place, with its own address and strides."""
        if not isinstance(x, torch.Tensor):
            return x
        return (x.shape, x.dtype) if self._is_copied(x) else (x.data_ptr(), x.shape, x.stride())

    def record(self, run):
        """(a function that repeats run() on the same addresses, the results of run())."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):                                     # compiles kernels and sets up libraries
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):       # in a memory pool of its own: in a shared one the temporaries of a graph
            results = run()                 # could lie where another graph, captured later, keeps its results
        return graph.replay, results


def captured(model, call=CapturedCall):
    """A copy of a VAR, Infinity, LlamaGen or VQVAE that shares its weights and whose step is captured.

    The step is `forward_scale`, `decode_one` or decoding. The copy keeps one KV cache per size, because the graphs need
    it at the same address for every picture. call: CapturedCall, or a subclass with another `record`.
    """
    twin = copy.copy(model)                                                 # attributes of the copy shadow methods
    if not isinstance(model, (VAR, Infinity, LlamaGen)):
        for name in ("decode", "decode_resized", "decode_tiled"):
            setattr(twin, name, call(getattr(model, name)))
        return twin
    caches = {}
    addresses = set()

    def new_kv_cache(*size):
        if size not in caches:
            caches[size] = model.new_kv_cache(*size)
            addresses.add(caches[size].untyped_storage().data_ptr())
        elif isinstance(model, LlamaGen):                                   # the others read no rows that are empty
            caches[size].zero_()
        return caches[size]
    twin.new_kv_cache = new_kv_cache
    if not isinstance(model, LlamaGen):
        twin.forward_scale = call(model.forward_scale, addresses)
        return twin
    step = call(model.decode_one, addresses)

    def decode_one(tokens, pos, *rest):
        pos = torch.full((1,), pos, device=tokens.device)                   # on the device: one graph for all tokens
        return step(tokens, pos, *rest)
    twin.decode_one = decode_one
    return twin


def captured_method(module, name, worth=None, call=CapturedCall):
    """A copy of a module that shares its weights and whose method `name` is captured.

    worth(*arguments): whether a call is worth a capture. For a UNet the last clip of a video, which is shorter, is not.
    """
    method = getattr(module, name)
    replayed = call(method)

    def choose(*args, **kwargs):
        function = replayed if worth is None or worth(*args, **kwargs) else method
        return function(*args, **kwargs)
    twin = copy.copy(module)
    setattr(twin, name, choose)
    return twin


def captured_unet(unet, call=CapturedCall):
    """A copy of a latentsync UNet whose calls for clips of config.frames frames are captured."""
    return captured_method(unet, "forward_with_deep", lambda x, *_: x.shape[2] == unet.config.frames, call)


def with_compiled_blocks(model):
    """A copy of a model that shares its weights and whose blocks go through torch.compile.

    The blocks are alike, so one is compiled, and again for other shapes and other optional arguments. LlamaGen with a
    guidance interval and a last batch that is smaller needs 14 variants, more than PyTorch allows by default.
    """
    from torch._dynamo import config                                        # takes seconds to import
    config.recompile_limit = max(config.recompile_limit, 64)
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    twin.blocks = torch.nn.ModuleList(torch.compile(block, fullgraph=True) for block in model.blocks)
    return twin
