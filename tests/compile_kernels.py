"""Compiles every kernel to machine code for a GPU that need not be here: python tests/compile_kernels.py 90

Triton is made to believe that a GPU of that compute capability is present. Kernels are compiled with the arguments of
real calls instead of being launched. Prints a line of JSON: the shared memory, registers and spilled bytes of each
kernel, as ptxas reports them, and how many kernels torch.compile(fullgraph=True) found in the graph of each op.
"""
import contextlib
import functools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.utils._triton
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import triton_ops
from triton_ops import (REGISTRY, adaln_modulate, decode_attention, group_norm_silu, qk_norm_rope, sample_logits,
                        vq_nearest)

CAPABILITY = int(sys.argv[1])
BF16, F32 = torch.bfloat16, torch.float32
empty = torch.empty


class FakeDriver:
    """Answers what Triton asks a driver before a launch."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", CAPABILITY, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
    is_active = staticmethod(lambda: True)


compiled = []


def compile_only(kernel, grid):
    """What replaces kernel[grid]: a function that compiles the kernel for its arguments, and notes it in `compiled`."""
    def call(*args, **kwargs):
        compiled.append((kernel.__name__, kernel.warmup(*args, grid=grid, **kwargs)))
    return call


def ptxas(kernel):
    """(registers, spilled bytes) of a compiled kernel."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(kernel.asm["ptx"])
        f.flush()
        for tool in sorted(folder.glob("ptxas*"), reverse=True):            # the newest understands the newest PTX
            arch = "sm_90a" if CAPABILITY == 90 else f"sm_{CAPABILITY}"
            argv = [tool, "-v", f"-arch={arch}", f.name, "-o", "/dev/null"]
            out = subprocess.run(argv, capture_output=True, text=True)
            if found := re.search(r"Used (\d+) registers", out.stderr):
                spilled = re.search(r"(\d+) bytes spill stores", out.stderr)
                return int(found[1]), int(spilled[1]) if spilled else 0
    raise RuntimeError(f"ptxas reports no registers: {out.stderr}")


def leaf(*shape, dtype=BF16):
    return empty(*shape, dtype=dtype, requires_grad=True)


def backward(out):
    out = [t for t in (out if isinstance(out, tuple) else (out,)) if t.requires_grad]
    torch.autograd.backward(out, [torch.empty_like(t) for t in out])


def adaln(C, dtype, stream):
    scale, shift, gate = leaf(2, 1, 3, C, dtype=dtype).unbind(2)
    residual = leaf(2, 20, C, dtype=stream)
    backward(adaln_modulate(leaf(2, 20, C, dtype=dtype), scale, shift, residual=residual, gate=gate))


def qk(H, D, dtype, rope, norm):
    q, k, v = leaf(2, 5, 3, H, D, dtype=dtype).unbind(2)
    options = dict(cos=empty(5, D // 2), sin=empty(5, D // 2)) if rope else {}
    options |= dict(q_scale=leaf(H, dtype=F32)) if norm else {}
    backward(qk_norm_rope(q, k, v, l2norm=norm, **options)[:2])
    with torch.no_grad():
        cache = empty(2, 2, H, 9, D, dtype=dtype)
        for pos in (0, 3, torch.zeros(1, dtype=torch.int32)):
            qk_norm_rope(q, k, v, l2norm=norm, k_cache=cache[0], v_cache=cache[1], pos=pos, **options)


def gn(shape, dtype, form):
    x = empty(shape, dtype=dtype).to(memory_format=form).requires_grad_()
    backward(group_norm_silu(x, leaf(shape[1], dtype=dtype), leaf(shape[1], dtype=dtype)))


def calls():
    """Calls every op with the argument types and widths of the models."""
    adaln(1920, BF16, F32)
    adaln(2048, F32, F32)
    weight, bias, gate = (leaf(n, 1, 2048, dtype=F32) for n in (1, 1, 2))     # infinity's affine norm
    backward(adaln_modulate(leaf(2, 20, 2048), weight, bias, residual=leaf(2, 20, 2048, dtype=F32), gate=gate))
    backward(adaln_modulate(leaf(1, 1, 3200), None, None, kind="rms", weight=leaf(3200)))
    qk(30, 64, BF16, rope=False, norm=True)
    qk(16, 128, BF16, rope=True, norm=True)
    qk(32, 100, F32, rope=True, norm=False)
    with torch.no_grad():
        on_device, rows = torch.zeros(1, dtype=torch.int64), empty(2, 577, dtype=torch.bool)
        for heads, kv_heads, D, dtype, pos, visible in ((16, 16, 64, BF16, 3, None), (8, 2, 64, F32, on_device, rows),
                                                        (32, 32, 100, BF16, on_device, None)):
            cache = empty(2, 2, kv_heads, 577, D, dtype=dtype)
            decode_attention(empty(2, heads, 1, D, dtype=dtype), *cache, pos, visible=visible)
    for R, V, dtype in ((16, 4096, F32), (1, 16384, BF16), (2, 32768, F32)):
        logits = empty(2, R, V, dtype=dtype)
        sample_logits(*logits, cfg=1.5, temperature=0.9, top_k=900, top_p=0.95, noise=empty(R, V))
    sample_logits(empty(1, 4096), noise=empty(1, 4096))
    for V, C in ((4096, 32), (16384, 8), (1, 64)):
        vq_nearest(empty(1000, C), empty(V, C))
    for shape, dtype in (((1, 160, 256, 256), BF16), ((2, 640, 16, 16), F32)):
        gn(shape, dtype, torch.contiguous_format)
        gn(shape, dtype, torch.channels_last)


class Traced(Exception):
    """Stops torch.compile once it has handed over its graph."""


def graphs():
    """{op: number of kernels in its one graph}."""
    counts = {}
    torch.utils._triton.has_triton = lambda **_: True                       # or torch.compile would look for no kernels

    def count(graph, _, name):
        nodes = [node for module in graph.modules() if hasattr(module, "graph") for node in module.graph.nodes]
        counts[name] = sum("triton_kernel_wrapper" in str(node.target) for node in nodes)
        raise Traced
    for name, op in REGISTRY.items():
        args, kwargs = op.inputs(lambda *size: torch.randn(size), *op.shapes["odd"])
        args = [t.detach().requires_grad_(op.trains) for t in args]
        torch._dynamo.reset()
        with contextlib.suppress(torch._dynamo.exc.BackendCompilerFailed):
            torch.compile(op.fn, fullgraph=True, backend=functools.partial(count, name=name))(*args, **kwargs)
    return counts


if __name__ == "__main__":
    driver.set_active(FakeDriver())
    triton_ops.INTERPRET = True                                             # take CPU tensors too
    launch, JITFunction.__getitem__ = JITFunction.__getitem__, compile_only
    calls()
    JITFunction.__getitem__ = launch
    rows = [{"kernel": name, "shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps} |
            dict(zip(("registers", "spilled"), ptxas(kernel))) for name, kernel in compiled]
    print(json.dumps({"kernels": rows, "graphs": graphs()}))
