"""The ops: torch against float64 and slower definitions, kernels against torch.

Tests marked `kernel` run Triton kernels. Without a GPU they run in Triton's interpreter, in a second pytest process
that `test_kernels_in_the_interpreter` starts, because Triton reads TRITON_INTERPRET when it is imported. What the
interpreter of Triton 3.9 gets wrong or does not show:
- It truncates float32 to bfloat16 instead of rounding, so bf16 results may be one ulp (2^-7) further off.
- Its tl.dot multiplies the bit patterns of bfloat16 operands. Ours are float32.
- `vector & scalar` of two booleans comes out as int32, which tl.load refuses as a mask, so kernels compare vectors.
- Arguments stay Python numbers, and `a = b = value` is not understood. Shared memory, registers, races, and types that
  only a compiler sees, do not exist there. test_kernels_compile_for_gpus checks them.
"""
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import triton_ops
from helpers import ROOT, generators, randn
from lib.bench_ops import TEXTBOOK
from triton_ops import (REGISTRY, BackendError, adaln_modulate, backend, decode_attention, exponential_noise,
                        filter_logits, group_norm_silu, qk_norm_rope, sample_logits, vq_nearest)

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TRAINED = [name for name, op in REGISTRY.items() if op.trains]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}      # relative to the largest value
RMS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}              # relative root mean square
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(name, shape="odd", dtype=torch.float32, device=DEVICE, seed=0):
    """An op's inputs from the registry."""
    op, g = REGISTRY[name], torch.Generator().manual_seed(seed)
    shape = op.shapes[shape] if isinstance(shape, str) else shape
    return op.inputs(lambda *size: torch.randn(size, generator=g, dtype=torch.float64).to(dtype).to(device), *shape)


def double(tree):
    return tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, tree)


def check(out, expected, dtype, factor=1, what=""):
    """Largest and mean error of every tensor; indices exactly."""
    for a, b in zip(tree_leaves(out), tree_leaves(expected), strict=True):
        assert a.shape == b.shape, f"{what}: {tuple(a.shape)}, not {tuple(b.shape)}"
        if a.dtype == torch.int64:
            assert torch.equal(a, b), f"{what}: {(a != b).sum()} of {a.numel()} indices differ"
        elif a.numel():
            assert torch.equal(a.isfinite(), b.isfinite()), f"{what}: inf or NaN in other places"
            a, b = (t.double().nan_to_num(0, 0, 0) for t in (a, b))
            error, scale = (a - b).abs().max(), b.abs().max()
            assert error <= factor * TOLERANCE[dtype] * scale, f"{what}: {error / scale:.1e} of the largest value off"
            rms = (a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-30)
            assert rms <= factor * RMS[dtype], f"{what}: {rms:.1e} off in the mean"


# ----------------------------------------------------------------------------------------------------------------------
# The torch definitions


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", REGISTRY)
def test_torch_equals_float64(name, dtype):
    """Same rounded inputs, computed in float64."""
    args, kwargs = inputs(name, dtype=dtype, device="cpu")
    with backend("torch"):
        check(REGISTRY[name].fn(*args, **kwargs), REGISTRY[name].fn(*double(args), **double(kwargs)), dtype)


@pytest.mark.parametrize("name", TRAINED)
def test_torch_gradients(name):
    args, kwargs = double(inputs(name, device="cpu"))
    names = [k for k in kwargs if k not in ("cos", "sin")]

    def fn(*tensors):
        return REGISTRY[name].fn(*tensors[:len(args)], **kwargs | dict(zip(names, tensors[len(args):])))
    leaves = [t.detach().requires_grad_() for t in (*args, *(kwargs[k] for k in names))]
    assert torch.autograd.gradcheck(fn, leaves, fast_mode=True)


@pytest.mark.parametrize("name", TEXTBOOK)
def test_torch_equals_the_textbook(name):
    args, kwargs = inputs(name, device="cpu")
    assert torch.equal(REGISTRY[name].fn(*args, **kwargs), TEXTBOOK[name](*args, **kwargs))


@pytest.mark.parametrize("name", REGISTRY)
def test_no_graph_breaks(name):
    """The whole op, its choice of backend included, is one graph to torch.compile, which changes nothing."""
    args, kwargs = inputs(name, device="cpu")
    torch._dynamo.reset()
    check(torch.compile(REGISTRY[name].fn, fullgraph=True, backend="aot_eager")(*args, **kwargs),
          REGISTRY[name].fn(*args, **kwargs), torch.float32)


def filter_by_definition(logits, top_k, top_p):
    """One row at a time."""
    out = logits.clone()
    for row in out:
        if top_k:
            row[row < row.sort(descending=True).values[min(top_k, len(row)) - 1]] = -torch.inf
        if 0 < top_p < 1:
            p = row.softmax(0)
            mass_above = torch.stack([p[p > v].sum() for v in p])
            row[mass_above >= top_p] = -torch.inf
    return out


FILTERS = [(0, 0.0), (5, 0.0), (0, 0.7), (9, 0.6), (1, 0.0), (0, 1e-6), (64, 1.0), (200, 0.5)]


@pytest.mark.parametrize("top_k, top_p", FILTERS)
def test_filter_keeps_what_its_definition_keeps(top_k, top_p):
    logits = randn(50, 64) * 3
    logits[:, 10] = logits[:, 11]                                           # ties
    assert torch.equal(filter_logits(logits, top_k, top_p), filter_by_definition(logits, top_k, top_p))


def test_one_generator_per_picture_makes_draws_independent_of_the_batch():
    together = exponential_noise((2, 3, 8), generators(5, 6))
    assert torch.equal(together[1:], exponential_noise((1, 3, 8), generators(6)))
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        exponential_noise((3, 8), generators(5, 6))


# ----------------------------------------------------------------------------------------------------------------------
# The choice


def test_backend_that_is_not_there():
    x = randn(1, 1, 4)
    with backend("cuda"), pytest.raises(BackendError, match="OPS_BACKEND=cuda: expected auto, torch or triton"):
        adaln_modulate(x, None, None)
    if not triton_ops.INTERPRET:
        message = "Triton cannot run on cpu here; use OPS_BACKEND=auto"
        with backend("triton"), pytest.raises(BackendError, match=message):
            adaln_modulate(x, None, None)


def test_arguments_that_do_not_fit_together():
    x, row = randn(1, 2, 4), randn(1, 1, 4)
    for options in (dict(scale=row, shift=None), dict(scale=None, shift=row), dict(scale=None, shift=None, gate=row)):
        with pytest.raises(ValueError, match="scale and shift go together, and a gate needs a residual"):
            adaln_modulate(x, **options)
    with pytest.raises(ValueError, match="kind is 'layer' or 'rms', not 'batch'"):
        adaln_modulate(x, None, None, kind="batch")
    with pytest.raises(ValueError, match="6 channels do not divide into 4 groups"):
        group_norm_silu(randn(1, 6, 3), row, row, 4)
    cache = torch.zeros(1, 1, 4, 4)
    for pos in (-1, 3):
        with pytest.raises(ValueError, match=f"2 tokens at {pos} do not fit into a cache of 4"):
            qk_norm_rope(x[:, :, None], x[:, :, None], x[:, :, None], k_cache=cache, v_cache=cache, pos=pos)


def in_a_process(before, **env):
    """What a process prints after the statement `before`: is there no Triton, and vq_nearest of unit vectors."""
    code = (f"import sys, torch; {before}; import triton_ops as ops; "
            "print(ops.triton is None, ops.vq_nearest(torch.eye(3), torch.eye(3)).tolist())")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | env)
    return out.stdout or out.stderr


def test_works_without_triton():
    """A Mac has no such package. The kernels still have to parse."""
    assert in_a_process('sys.modules["triton"] = None') == "True [0, 1, 2]\n"


@pytest.mark.skipif(triton_ops.triton is None, reason="Triton is not installed here")
def test_a_kernel_in_the_interpreter():
    """One kernel, so that the quick tests run Triton at all. `test_kernels_in_the_interpreter` runs all."""
    assert in_a_process("pass", OPS_BACKEND="triton", TRITON_INTERPRET="1") == "False [0, 1, 2]\n"


# ----------------------------------------------------------------------------------------------------------------------
# The kernels, against the torch definitions in float64


def agrees(fn, args, kwargs, dtype, constant=("cos", "sin", "noise"), gradients=True):
    """Results and all gradients of the kernel are those of float64 torch on the same inputs. A second backward pass
    gives the same gradients bit for bit."""
    names = [k for k, v in kwargs.items() if isinstance(v, torch.Tensor) and k not in constant]
    tensors = [*args, *(kwargs[k] for k in names)]

    def run(tensors, kwargs, which):
        with backend(which):
            leaves = [t.detach().requires_grad_(gradients) if t is not None else None for t in tensors]
            out = fn(*leaves[:len(args)], **kwargs | dict(zip(names, leaves[len(args):])))
            if not gradients:
                return out
            grads = [randn(*t.shape, seed=9).to(t) for t in tree_leaves(out)]
            leaves = [t for t in leaves if t is not None]
            again = [torch.autograd.grad(tree_leaves(out), leaves, grads, retain_graph=True) for _ in range(2)]
            assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(*again)), "two backward passes differ"
            return out, again[0]
    expected = run(double(tensors), double(kwargs), "torch")
    out = run(tensors, kwargs, "triton")
    if gradients:
        check(out[1], expected[1], dtype, factor=2, what="gradient")
        out, expected = out[0], expected[0]
    check(out, expected, dtype, what="result")


def R(*shape, seed=0):
    return randn(*shape, seed=seed).to(DEVICE)


SIZES = [(0, 40), (1, 1), (3, 8), (17, 40), (3, 64), (17, 100), (3, 128), (17, 768), (3, 1000), (1, 1920), (3, 2048)]
SIZES += [(257, 8)] + [(257, 1920), (17, 3200), (1000, 8192)] * CUDA


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("L, C", SIZES)
def test_adaln_sizes(L, C, dtype):
    """Gated residual, LayerNorm and modulation as in VAR, of odd sizes. The LayerNorm of one number is always zero."""
    def g(*shape, seed=0):
        return randn(*shape, seed=seed).to(dtype).to(DEVICE)
    scale, shift, gate = g(2, 1, 3, C).unbind(2)                            # strided views
    agrees(adaln_modulate, (g(2, L, C, seed=1), scale, shift),
           dict(residual=g(2, L, C, seed=2), gate=gate, kind="layer" if C > 1 else "rms"), dtype, gradients=L < 200)


@pytest.mark.kernel
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("given", ["nothing", "weight", "modulation", "residual", "everything"])
def test_adaln_variants(kind, given):
    options = dict(kind=kind)
    scale = shift = None
    if given in ("weight", "everything"):
        options["weight"] = R(24)
    if given in ("residual", "everything"):
        options["residual"] = R(2, 5, 24, seed=3)
    if given in ("modulation", "everything"):
        scale, shift = R(1, 1, 24, seed=5), R(1, 1, 24, seed=6)
    if given == "everything":
        options["gate"] = R(2, 1, 24, seed=4)
    agrees(adaln_modulate, (R(2, 5, 24, seed=1), scale, shift), options, torch.float32)


@pytest.mark.kernel
def test_adaln_layouts_and_dtypes():
    x = randn(3, 40, 10).to(DEVICE)
    scale, shift = randn(2, 1, 1, 40).to(DEVICE).expand(2, 3, 1, 40)        # one for all, by stride 0
    agrees(adaln_modulate, (x.transpose(1, 2), scale, shift), {}, torch.float32)        # the last dimension is strided
    agrees(adaln_modulate, (randn(3, 8, 80).to(DEVICE)[:, ::2, 40:], scale, shift), {}, torch.float32)
    half = x.transpose(1, 2).bfloat16()
    with backend("triton"):                                                 # VAR's mixture: branch bf16, stream fp32
        y, h = adaln_modulate(half, scale, shift, residual=x.transpose(1, 2), out_dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
    assert torch.equal(h, x.transpose(1, 2) + half.float())


UNFITTING = {
    "modulation per token": lambda: adaln_modulate(R(2, 3, 8), R(2, 3, 8), R(2, 3, 8)),
    "modulation of one number": lambda: adaln_modulate(R(2, 3, 8), R(1, 1, 1), R(1, 1, 1)),
    "modulation of another width": lambda: adaln_modulate(R(2, 3, 8), R(2, 1, 9), R(2, 1, 9)),
    "modulation of another batch": lambda: adaln_modulate(R(2, 3, 8), R(3, 1, 8), R(3, 1, 8)),
    "residual of one row": lambda: adaln_modulate(R(2, 3, 8), None, None, residual=R(2, 1, 8)),
    "weight too short": lambda: adaln_modulate(R(2, 3, 8), None, None, weight=R(7)),
    "no batch": lambda: adaln_modulate(R(3, 8), None, None),
    "one scale for all heads": lambda: qk_norm_rope(*R(3, 1, 2, 3, 8), q_scale=R(1)),
    "angles for one token": lambda: qk_norm_rope(*R(3, 1, 2, 3, 8), cos=R(1, 4), sin=R(1, 4)),
    "angles for other tokens": lambda: qk_norm_rope(*R(3, 1, 2, 3, 8), cos=R(3, 4), sin=R(3, 4)),
    "odd head dimension": lambda: qk_norm_rope(*R(3, 1, 2, 3, 7), cos=R(2, 3), sin=R(2, 3)),
    "cache of fewer heads": lambda: qk_norm_rope(*R(3, 1, 2, 3, 8), k_cache=R(1, 2, 4, 8), v_cache=R(1, 2, 4, 8)),
    "cache too short for v": lambda: qk_norm_rope(*R(3, 1, 2, 3, 8), k_cache=R(1, 3, 4, 8),
                                                  v_cache=R(1, 3, 4, 8)[:, :, :1]),
    "visible rows of another cache": lambda: decode_attention(R(1, 2, 1, 8), *R(2, 1, 2, 5, 8), 3, visible=R(1, 4) > 0),
    "two tokens at once": lambda: decode_attention(R(1, 2, 2, 8), *R(2, 1, 2, 5, 8), 3),
    "noise for one row": lambda: sample_logits(R(4, 8), noise=R(8).abs()),
    "uncond for one row": lambda: sample_logits(R(4, 8), R(1, 8, seed=1), cfg=2.0, noise=R(4, 8).abs()),
    "codes of another width": lambda: vq_nearest(R(4, 8), R(4, 9)),
    "no codes": lambda: vq_nearest(R(4, 8), R(0, 8)),
    "weight for other channels": lambda: group_norm_silu(R(1, 8, 4), R(7), R(7), 2),
    "no affine": lambda: group_norm_silu(R(1, 8, 4), None, None, 2),
}


@pytest.mark.kernel
@pytest.mark.parametrize("case", UNFITTING)
def test_shapes_that_no_kernel_is_made_for_go_to_torch(case):
    """Which broadcasts or complains; a kernel would read what is not there."""
    outcomes = []
    for which in ("torch", "triton"):
        try:
            with torch.no_grad(), backend(which):
                outcomes.append(UNFITTING[case]())
        except Exception as e:
            outcomes.append((type(e), str(e)))
    a, b = outcomes
    assert a == b if isinstance(a[0], type) else all(map(torch.equal, tree_leaves(a), tree_leaves(b)))


@pytest.mark.kernel
def test_cache_position_outside_of_the_cache_writes_nothing():
    (q, k, v), _ = inputs("qk_norm_rope", (1, 2, 2, 8))
    for pos in (-2, 7):
        caches = torch.zeros(3, 1, 2, 4, 8, device=DEVICE)
        with torch.no_grad(), backend("triton"):
            qk_norm_rope(q, k, v, k_cache=caches[1], v_cache=caches[2], pos=torch.tensor(pos, device=DEVICE))
        assert not caches.any()


@pytest.mark.kernel
@pytest.mark.parametrize("name", TRAINED)
def test_second_derivatives_are_refused(name):
    """Rather than left out of a gradient penalty without a word. OPS_BACKEND=torch has them."""
    args, kwargs = inputs(name)
    leaves = [t.detach().requires_grad_() for t in args]
    with backend("triton"):
        out = REGISTRY[name].fn(*leaves, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    grad, = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.kernel
def test_adaln_values():
    """A large mean with a small variance, constant rows, inf and NaN."""
    x = randn(1, 4, 64).to(DEVICE)
    x[0, 0] += 1e3
    x[0, 1] = 5.0
    with backend("triton"):
        y = adaln_modulate(x, None, None)
    expected = adaln_modulate(x.double(), None, None)
    assert (y - expected).abs().max() < 1e-3                                # 1e3 leaves 4 digits of the rest in float32
    assert (y[0, 1] == 0).all()
    x[0, 2, 3], x[0, 3, 5] = torch.inf, torch.nan
    agrees(adaln_modulate, (x[:, 1:], None, None), {}, torch.float32, gradients=False)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 3, 12), (0, 3, 2, 8), (1, 17, 2, 64), (2, 2, 5, 40),
                                   (1, 1, 32, 100)])
@pytest.mark.parametrize("names", [("q_scale", "cos", "sin"), ("q_scale",), ("cos", "sin")],
                         ids=["infinity", "var", "llamagen"])
def test_qk_norm_rope(shape, dtype, names):
    """q, k and v are views of one packed projection."""
    args, kwargs = inputs("qk_norm_rope", shape, dtype)
    kwargs = {name: kwargs[name].float() for name in names}
    agrees(qk_norm_rope, args, kwargs | dict(l2norm="q_scale" in names), dtype)


@pytest.mark.kernel
def test_qk_norm_rope_of_zeros_and_of_unlike_layouts():
    (q, k, v), kwargs = inputs("qk_norm_rope", (2, 3, 2, 8))
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    agrees(qk_norm_rope, (q, k, v), kwargs, torch.float32)
    with backend("triton"):                                                 # fewer key heads than query heads
        assert qk_norm_rope(q, k[:, :, :1], v[:, :, :1], **kwargs)[1].shape == (2, 1, 3, 8)
    q = q.clone()
    q[0, 1, 0] = 0
    agrees(qk_norm_rope, (q, k, v), kwargs | dict(pos=2), torch.float32, gradients=False)      # pos is of caches only


@pytest.mark.kernel
@pytest.mark.parametrize("on_device", [False, True], ids=["pos int", "pos tensor"])
def test_cache_is_filled_in_place(on_device):
    """In the layout (B, H, L, D) and as a view of (B, L, H, D). Other rows and what lies past the end do not change."""
    (q, k, v), kwargs = inputs("qk_norm_rope", (2, 3, 2, 8))
    pos = torch.tensor([2], dtype=torch.int32, device=DEVICE) if on_device else 2
    for make in (lambda: torch.full((2, 2, 2, 6, 8), torch.nan, device=DEVICE),
                 lambda: torch.full((2, 2, 6, 2, 8), torch.nan, device=DEVICE).transpose(2, 3)):
        caches = {which: make() for which in ("torch", "triton")}
        results = {}
        for which, cache in caches.items():
            with torch.no_grad(), backend(which):
                results[which] = qk_norm_rope(q, k, v, k_cache=cache[0], v_cache=cache[1], pos=pos, **kwargs)
        assert results["triton"][1].shape[2] == (6 if on_device else 5)
        check(results["triton"], results["torch"], torch.float32)
        check(caches["triton"], caches["torch"], torch.float32)
        assert caches["triton"][:, :, :, :2].isnan().all() and caches["triton"][:, :, :, 5:].isnan().all()
    with pytest.raises(ValueError, match="3 tokens at 4 do not fit into a cache of 6"):
        qk_norm_rope(q, k, v, k_cache=make()[0], v_cache=make()[1], pos=4)
    k_cache, v_cache = torch.zeros(2, 2, 6, 8, device=DEVICE), torch.zeros(2, 6, 2, 8, device=DEVICE).transpose(1, 2)
    with torch.no_grad(), backend("triton"):                                # unlike layouts
        _, k_seen, v_seen = qk_norm_rope(q, k, v, k_cache=k_cache, v_cache=v_cache, pos=pos, **kwargs)
    check((k_seen[:, :, 2:5], v_seen[:, :, 2:5]), tuple(t[:, :, 2:5] for t in results["torch"][1:]), torch.float32)
    if on_device:
        cache = make()
        with torch.no_grad(), backend("triton"):
            qk_norm_rope(q, k, v, k_cache=cache[0, :, :, :4], v_cache=cache[1, :, :, :4], pos=pos)
        assert cache[:, :, :, 4:].isnan().all()


@pytest.mark.parametrize("which", ["torch", pytest.param("triton", marks=pytest.mark.kernel)])
@pytest.mark.parametrize("heads, D, dtype", [((2, 2), 64, torch.float32), ((6, 2), 20, torch.float32),
                                             ((3, 3), 100, torch.float16), ((4, 1), 8, torch.bfloat16)], ids=str)
def test_decode_attention_sees_the_filled_rows_only(which, heads, D, dtype):
    """A softmax by hand is the reference, with the position as a number or on the device, hidden rows, and heads in
    groups. Rows beyond the position, here inf, must not be read. Only torch with a position on the device reads them
    and multiplies them by zero."""
    (H, Hkv), room = heads, 70
    q, cache = R(2, H, 1, D).to(dtype), R(2, 2, Hkv, room, D, seed=1).to(dtype)
    visible = torch.ones(2, room, dtype=torch.bool, device=DEVICE)
    visible[0, :9] = visible[1, 2] = False
    with torch.no_grad(), backend(which):
        for pos, seen in ((0, None), (33, None), (33, visible), (69, visible)):
            k, v = (t[:, :, :pos + 1].double().repeat_interleave(H // Hkv, 1) for t in cache)
            score = q.double() @ k.transpose(2, 3) / D ** 0.5
            if seen is not None:
                score = score.masked_fill(~seen[:, None, None, :pos + 1], -torch.inf)
            k, v, expected = *cache.clone(), score.softmax(-1) @ v
            k[:, :, pos + 1:], v[:, :, pos + 1:] = torch.inf, torch.inf
            check(decode_attention(q, k, v, pos, visible=seen), expected, dtype, what=f"position {pos}")
            k, v = cache if which == "torch" else (k, v)
            on_device = torch.tensor([pos], device=DEVICE)
            check(decode_attention(q, k, v, on_device, visible=seen), expected, dtype, what=f"position {on_device}")


@pytest.mark.kernel
@pytest.mark.parametrize("top_k, top_p", FILTERS)
@pytest.mark.parametrize("R, V", [(5, 64), (3, 33), (2, 1000)] + [(64, 4096), (8, 16384), (2, 32768)] * CUDA)
def test_sample_logits(R, V, top_k, top_p):
    cond, uncond = (3 * randn(R, V, seed=s) for s in (1, 2))
    noise = torch.empty(R, V).exponential_(generator=torch.Generator().manual_seed(0))
    cond[:, 10], uncond[:, 10] = cond[:, 11], uncond[:, 11]                 # ties
    args = (cond.to(DEVICE), uncond.to(DEVICE))
    kwargs = dict(cfg=2.5, temperature=0.7, top_k=top_k, top_p=top_p, noise=noise.to(DEVICE))
    agrees(sample_logits, args, kwargs, torch.float32, gradients=False)
    agrees(sample_logits, (args[0][:, ::2].half(), None), kwargs | dict(noise=kwargs["noise"][:, ::2]), torch.float16,
           gradients=False)


@pytest.mark.kernel
def test_sample_logits_edges():
    noise = torch.ones(6, 5, device=DEVICE)
    logits = torch.zeros(6, 5, device=DEVICE)
    logits[0] = -torch.inf
    logits[1, 3] = torch.inf
    logits[2, :] = torch.nan
    logits[3, 2:] = torch.tensor([1.0, torch.nan, 0.5])
    logits[4] = torch.tensor([0.0, -0.0, -1, -1, -1])                       # 0 and -0 are one value
    noise[4, 1] = 0.1
    with backend("triton"):
        index = sample_logits(logits, top_k=1, noise=noise)
        assert index[[0, 1, 3, 4]].tolist() == [0, 3, 2, 1] and 0 <= index[2] < 5
        assert sample_logits(logits[:0], noise=noise[:0]).shape == (0,)
        assert sample_logits(logits[4:, :1], noise=noise[4:, :1]).tolist() == [0, 0]
        assert sample_logits(logits.view(2, 3, 5), temperature=0).shape == (2, 3)


def follows(tokens, logits):
    """The tokens follow softmax(logits): chi-square with 15 degrees of freedom, p = 0.001."""
    expected = len(tokens) * logits.softmax(0)
    assert ((tokens.bincount(minlength=16) - expected) ** 2 / expected).sum() < 37.7


@pytest.mark.kernel
def test_draws_are_those_of_multinomial_and_follow_the_distribution():
    g, again, third = generators(3, 3, 3, device=DEVICE)
    logits = 2 * R(60, 64)
    with backend("triton"):
        tokens = sample_logits(logits, generator=g)
        assert torch.equal(tokens, torch.multinomial(logits.softmax(-1), 1, True, generator=again)[:, 0])
        if CUDA:                                                            # the interpreter needs 0.1 s per row
            follows(sample_logits(logits[:1, :16].expand(20000, 16), generator=third), logits[0, :16])


def test_draws_in_torch_are_those_of_multinomial_and_follow_the_distribution():
    g, again = generators(0, 0)
    logits = randn(1, 16).expand(20000, 16)
    with backend("torch"):
        tokens = sample_logits(logits, generator=g)
    follows(tokens, logits[0])
    assert torch.equal(tokens, torch.multinomial(logits.softmax(-1), 1, True, generator=again)[:, 0])


@pytest.mark.kernel
@pytest.mark.parametrize("N, V, C", [(0, 4, 4), (1, 1, 8), (17, 33, 5), (130, 100, 8), (3, 300, 32), (65, 64, 64)])
@pytest.mark.parametrize("l2norm", [False, True])
def test_vq_nearest(N, V, C, l2norm):
    args, _ = inputs("vq_nearest", (N, V, C))
    agrees(vq_nearest, args, dict(l2norm=l2norm), torch.float32, gradients=False)


@pytest.mark.parametrize("which", ["torch", pytest.param("triton", marks=pytest.mark.kernel)])
def test_nearest_code_takes_the_lowest_of_equals(which):
    """Small integers: equal codes are exactly as far away, wherever in the codebook they stand."""
    codes = torch.randint(-9, 10, (70, 4), generator=torch.Generator().manual_seed(0)).float().to(DEVICE)
    codes = torch.cat([codes, codes])                                       # every code twice, in different tiles
    lowest = (codes[:70, None] == codes).all(-1).float().argmax(1)
    with backend(which):
        assert torch.equal(vq_nearest(codes[70:], codes), lowest)
        assert vq_nearest(codes[:0], codes).shape == (0,)
        assert vq_nearest(codes[:7, ::2], codes[:1, ::2]).tolist() == [0] * 7               # strided


GROUPS = [((2, 32, 5, 3), 32), ((1, 64, 16, 16), 32), ((1, 40, 7), 8), ((1, 32, 70, 70), 32), ((2, 12, 60, 50), 3),
          ((0, 32, 4, 4), 32), ((1, 8, 1, 1), 1), ((1, 16, 3, 4, 5), 4), ((3, 16), 4)]


@pytest.mark.kernel
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape, groups", GROUPS)
def test_group_norm_silu(shape, groups, channels_last):
    """Both paths, a group in registers and three launches; the memory format stays."""
    if channels_last and len(shape) < 4:
        return
    form = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)] if channels_last else torch.contiguous_format
    x = (randn(*shape) + 1).to(DEVICE).contiguous(memory_format=form)
    weight, bias = randn(2, shape[1]).to(DEVICE)
    for silu in (True, False):
        agrees(group_norm_silu, (x, weight, bias), dict(groups=groups, silu=silu), torch.float32)
    with backend("triton"):
        assert group_norm_silu(x, weight, bias, groups).is_contiguous(memory_format=form) or x.numel() == 0


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_group_norm_silu_in_half_precision_and_strided(dtype):
    x, (weight, bias) = randn(1, 8, 48, 48).to(DEVICE), randn(2, 8).to(DEVICE)
    agrees(group_norm_silu, (x.to(dtype), weight.to(dtype), bias.to(dtype)), dict(groups=1), dtype)
    agrees(group_norm_silu, (x.to(dtype), weight, bias), dict(groups=8), dtype)         # float32 weights
    agrees(group_norm_silu, (x.transpose(2, 3)[:, :, ::2], weight, bias), dict(groups=2), torch.float32)


@pytest.mark.kernel
@pytest.mark.parametrize("size", [8, 70])
def test_group_norm_silu_values(size):
    """A large mean: E[x^2] - E[x]^2 would have no digit left. Constant groups come out as the bias."""
    x = (randn(1, 8, size, size) + 1e4).to(DEVICE)
    x[:, 4:] = 3.0
    one, zero = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    with backend("triton"):
        y = group_norm_silu(x, one, zero, 2, silu=False)
    expected = group_norm_silu(x.double(), one.double(), zero.double(), 2, silu=False)
    assert (y - expected).abs().max() < 1e-2                                # x itself has 3 digits after the point
    assert (y[:, 4:] == 0).all()


# ----------------------------------------------------------------------------------------------------------------------
# Kernels where there is no GPU


def subprocess_pytest(*args, **env):
    out = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args], cwd=ROOT,
                         capture_output=True, text=True, env=os.environ | env)
    assert out.returncode == 0 and "passed" in out.stdout, out.stdout[-3000:] + out.stderr[-1000:]
    return out.stdout


needs_triton = pytest.mark.skipif(triton_ops.triton is None, reason="Triton is not installed here")
once = pytest.mark.skipif(triton_ops.INTERPRET, reason="this is the second process")


@once
@needs_triton
@pytest.mark.slow
def test_kernels_in_the_interpreter():
    """All tests marked `kernel`, and one parity case that goes through every op: editing a picture with VAR. Those of
    Infinity pass too, but take minutes, because the interpreter runs every row by itself."""
    here = dict(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    subprocess_pytest("tests/test_triton_ops.py", "tests/test_transformers.py", "-m", "kernel", **here)
    subprocess_pytest("tests/test_parity.py", "-k", "var_edit_inpaint", OPS_BACKEND="triton",
                      PARITY_DIR=str(ROOT / "tests" / "parity"), **here)


@once
@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability):
    """Kernels compile to machine code for an A100 and an H100, with all argument types of the models, without a GPU.

    Their shared memory fits into a block, and none spills more than a few registers. torch.compile takes a call of any
    op as one graph with its kernels in it.
    """
    script = ROOT / "tests" / "compile_kernels.py"
    out = subprocess.run([sys.executable, script, str(capability)], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    report = json.loads(out.stdout.splitlines()[-1])
    launched = re.findall(r"^ +(_\w+)\[.*\]\(", (ROOT / "triton_ops.py").read_text(), re.M)      # _kernel[grid](...)
    assert {r["kernel"] for r in report["kernels"]} == set(launched) != set()
    for r in report["kernels"]:
        assert r["shared"] <= 99 * 1024, r                                  # what also smaller GPUs have
        assert r["spilled"] <= 512, r
    assert set(report["graphs"]) == set(REGISTRY) and all(n >= 1 for n in report["graphs"].values())


# ----------------------------------------------------------------------------------------------------------------------
# Only on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", REGISTRY)
def test_compiled_and_captured(name):
    """torch.compile(fullgraph=True) with kernels in it, and a CUDA graph, replayed on new inputs."""
    fn, (args, kwargs) = REGISTRY[name].fn, inputs(name)
    expected = fn(*args, **kwargs)
    check(torch.compile(fn, fullgraph=True)(*args, **kwargs), expected, torch.float32)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = fn(*args, **kwargs)
    others, _ = inputs(name, seed=1)
    for mine, other in zip(args, others):
        mine.copy_(other)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(out), tree_leaves(fn(*args, **kwargs))))


@pytest.mark.gpu
@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_shapes(name, dtype):
    """Kernels against torch on the same GPU. One index in a thousand may differ, where rounding decides between two."""
    op = REGISTRY[name]
    for label in list(op.shapes)[1:]:
        args, kwargs = inputs(name, label, dtype)
        with backend("torch"):
            expected = op.fn(*args, **kwargs)
        out = op.fn(*args, **kwargs)
        if op.tol >= 1e-3:
            assert (out != expected).float().mean() <= op.tol, label
        else:
            check(out, expected, dtype, factor=2, what=label)


@pytest.mark.gpu
def test_more_than_2_to_the_31_numbers():
    """Only what lies behind the 2^31st number is compared."""
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    logits = torch.empty(2 ** 17, 2 ** 14 + 8, dtype=torch.float16, device="cuda").normal_()        # 2.1e9
    noise = torch.ones((), dtype=torch.float32, device="cuda").expand(4, logits.shape[1])
    tail = sample_logits(logits[-4:], noise=noise)
    with backend("torch"):
        assert torch.equal(tail, sample_logits(logits[-4:], noise=noise))
    y = adaln_modulate(logits.view(1, -1, logits.shape[1]), None, None)
    with backend("torch"):
        check(y[:, -4:], adaln_modulate(logits[None, -4:], None, None), torch.float16)
    del y
    z = logits.view(-1)[:2 ** 31 + 2 ** 20].view(-1, 8, 2 ** 17)            # (2049, 8, 2^17)
    weight, bias = torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")
    y = group_norm_silu(z, weight, bias, 8)
    with backend("torch"):
        check(y[-1:], group_norm_silu(z[-1:], weight, bias, 8), torch.float16)
