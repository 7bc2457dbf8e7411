"""The baselines of lib/baselines.py draw what our models and the originals draw, without our improvements."""
import math
from collections import Counter
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import infinity
import llamagen
import test_parity as parity
import triton_ops
import var
import vq
from fill import load_case, noise
from helpers import (SCALES, randn, steps_of, tiny_bits, tiny_infinity, tiny_llamagen, tiny_single, tiny_tokenizer,
                     tiny_var)
from lib import baselines
from lib.pictures import to_pixels

LABELS = torch.tensor([0, 3, 4])
TEXT, TEXT_MASK = llamagen.left_pad([randn(2, 128), randn(6, 128, seed=4), randn(4, 128, seed=9)], 6)
PROMPTS, PROMPT_MASK = randn(2, 5, 128, seed=3), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
# Convolutions in NCHW and channels_last add in another order, and so do group norms. Pictures have values of order one.
close = partial(torch.testing.assert_close, atol=2e-5, rtol=0)


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def all_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def spy(monkeypatch):
    """Two lists: the logits of every scale, before the filters, and draws that replace those of the first scales."""
    logits, given = [], []

    def noted(scale_logits, *arguments, _draw=baselines.draw):
        logits.append(scale_logits.clone())
        drawn, table = _draw(scale_logits, *arguments)
        if given:
            drawn = given.pop(0)
        return drawn, table
    monkeypatch.setattr(baselines, "draw", noted)
    return logits, given


# ----------------------------------------------------------------------------------------------------------------------
# The same pictures as ours


@pytest.mark.parametrize("changes", [{}, {"shared_adaln": True}, {"attn_l2_norm": False}], ids=str)
def test_var_draws_the_same(changes):
    model, tokenizer = tiny_var(**changes), tiny_tokenizer()
    for cfg, top_k, top_p in ((0, 0, 0.0), (3.0, 5, 0.0), (2.0, 0, 0.8), (2.0, 9, 0.7)):
        options = dict(cfg=cfg, top_k=top_k, top_p=top_p)
        ours = steps_of(model, tokenizer, LABELS, generator=seeded(), **options)
        tokens, f_hat = baselines.var_tokens(model, tokenizer, LABELS, generator=seeded(), **options)
        assert all_equal(tokens, [step.tokens for step in ours])
        close(f_hat, ours[-1].f_hat)
        close(baselines.var_images(model, tokenizer, LABELS, generator=seeded(), **options),
              model.sample(tokenizer, LABELS, generator=seeded(), **options))


@pytest.mark.parametrize("changes, cond", [({}, (LABELS,)), ({"kv_heads": 1}, (LABELS,)),
                                           ({"text": True}, (TEXT, TEXT_MASK)), ({"text": True}, (TEXT,))],
                         ids=["classes", "shared heads", "padded text", "text"])
def test_llamagen_draws_the_same(changes, cond):
    model, tokenizer = tiny_llamagen(**changes), tiny_single()
    for options in (dict(cfg=1.0), dict(cfg=3.0, top_k=7), dict(cfg=2.0, top_p=0.8, temperature=1.2),
                    dict(cfg=3.0, cfg_interval=0), dict(cfg=3.0, cfg_interval=4, top_k=9, top_p=0.7)):
        tokens = baselines.llamagen_tokens(model, *cond, generator=seeded(), **options)
        assert torch.equal(tokens, model.generate(*cond, generator=seeded(), **options))
        close(baselines.llamagen_images(model, tokenizer, *cond, generator=seeded(), **options),
              model.sample(tokenizer, *cond, generator=seeded(), **options))


@pytest.mark.parametrize("patchify, mask", list(product((False, True), (None, PROMPT_MASK))),
                         ids=["plain", "padded", "patchify", "patchify, padded"])
def test_infinity_draws_the_same(patchify, mask):
    model, tokenizer = tiny_infinity(bits=24 if patchify else 6, patchify=patchify), tiny_bits()
    scales = SCALES[:2] if patchify else SCALES                             # the tokenizer's maps are twice as large
    condition = model, tokenizer, PROMPTS, mask
    for cfg, tau, top_k, top_p in ((1.0, 1.0, 0, 0.0), (3.0, 0.5, 0, 0.97), (3.0, 1.0, 1, 0.0),
                                   ([1.0, 3.0, 2.0], [1.0, 0.5, 2.0], 2, 0.8)):
        options = dict(cfg=cfg, tau=tau, top_k=top_k, top_p=top_p)
        ours = steps_of(*condition, scales=scales, generator=seeded(), **options)
        bits, f_hat = baselines.infinity_bits(*condition, scales, generator=seeded(), **options)
        if patchify:
            bits = [infinity.unfold(each, size) for each, size in zip(bits, scales)]
        assert all_equal([each.bool() for each in bits], [step.bits for step in ours])
        close(f_hat, ours[-1].f_hat)
        close(baselines.infinity_images(*condition, scales, generator=seeded(), **options),
              model.sample(*condition[1:], scales=scales, generator=seeded(), **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gives_nearly_the_same_logits(dtype, monkeypatch):
    """Both round, but at other places. The baselines are given our tokens, because one other token would change all
    that follow."""
    logits, given = spy(monkeypatch)
    options = dict(top_k=0, top_p=0.0, generator=seeded())
    model = var.set_dtype(tiny_var(), dtype)
    ours = steps_of(model, tiny_tokenizer(), LABELS, cfg=0, **options)
    given += [step.tokens for step in ours]
    baselines.var_tokens(model, tiny_tokenizer(), LABELS, cfg=0, **options)

    model = llamagen.set_dtype(tiny_llamagen(), dtype)
    steps = steps_of(model, tiny_single(), LABELS, cfg=1.0, **options)
    given += [step.tokens for step in steps]
    baselines.llamagen_tokens(model, LABELS, cfg=1.0, **options)
    ours += steps

    model = infinity.set_dtype(tiny_infinity(), dtype)
    steps = steps_of(model, tiny_bits(), PROMPTS, PROMPT_MASK, scales=SCALES, cfg=1.0, tau=1.0, **options)
    given += [step.bits.long().flatten(1) for step in steps]
    baselines.infinity_bits(model, tiny_bits(), PROMPTS, PROMPT_MASK, SCALES, cfg=1.0, tau=1.0, **options)
    ours += steps
    for found, step in zip(logits, ours, strict=True):
        error = found.view(step.logits.shape) - step.logits
        assert error.norm() < 10 * torch.finfo(dtype).eps * step.logits.norm()      # about ten layers round


@pytest.mark.parametrize("make", [tiny_tokenizer, tiny_single, tiny_bits])
def test_decode_is_that_of_the_tokenizer(make):
    tokenizer = make()
    f_hat = randn(2, tokenizer.config.z_channels, 3, 4)
    with torch.no_grad():
        close(baselines.decode(tokenizer, f_hat), tokenizer.decode(f_hat))
        assert tokenizer.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)    # as it was
        tokenizer.decoder.conv_out.bias += 0.5
        close(baselines.decode(tokenizer, f_hat), tokenizer.decode(f_hat))  # new weights are noticed
        for dtype in (torch.float16, torch.bfloat16):
            vq.set_decoder_dtype(tokenizer, dtype)
            image = baselines.decode(tokenizer, f_hat)
            assert image.dtype == torch.float32
            close(image, tokenizer.decode(f_hat), atol=20 * torch.finfo(dtype).eps)         # about 20 layers round


# ----------------------------------------------------------------------------------------------------------------------
# What is missing there


def draw_everything():
    """Pictures by each baseline."""
    options = dict(cfg=2.0, top_k=9, top_p=0.9, generator=seeded())
    baselines.var_images(tiny_var(), tiny_tokenizer(), LABELS, **options)
    baselines.llamagen_images(tiny_llamagen(), tiny_single(), LABELS, **options)
    baselines.infinity_images(tiny_infinity(), tiny_bits(), PROMPTS, None, SCALES, tau=1.0, **options)


def test_no_op_of_ours_is_used(monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("a baseline called an op of triton_ops.py")
    ops = [name for name, op in vars(triton_ops).items() if getattr(op, "__module__", None) == "triton_ops"]
    for module, name in product((var, llamagen, infinity, vq), ops):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, forbidden)
    draw_everything()
    with pytest.raises(AssertionError, match="a baseline called an op"):
        tiny_var().sample(tiny_tokenizer(), LABELS)


def test_layers_run_at_every_scale(monkeypatch):
    """F.linear is called with AdaLN's weights, or those of the text's keys and values, once per block and scale."""
    calls = Counter()

    def counting(x, weight, bias=None, _linear=F.linear):
        calls[weight.data_ptr()] += 1
        return _linear(x, weight, bias)
    monkeypatch.setattr(F, "linear", counting)
    model = tiny_var()
    baselines.var_tokens(model, tiny_tokenizer(), LABELS, cfg=0, top_k=0, top_p=0.0, generator=seeded())
    assert [calls[layer.weight.data_ptr()] for layer in (model.blocks[1].adaln, model.head_adaln)] == [4, 4]
    calls.clear()                                                           # the next model may take the same memory
    model = tiny_infinity()
    baselines.infinity_bits(model, tiny_bits(), PROMPTS, None, SCALES, cfg=1.0, tau=1.0, top_k=0, top_p=0.0,
                            generator=seeded())
    assert [calls[layer.weight.data_ptr()] for layer in (model.blocks[1].cross.kv, model.head_adaln)] == [3, 3]


class Layouts(TorchDispatchMode):
    """Notes for every tensor of a convolution whether it is in NCHW."""

    def __init__(self):
        super().__init__()
        self.in_nchw = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func is torch.ops.aten.convolution.default:
            # Not is_contiguous, which is true of 1 x 1 weights in either layout
            self.in_nchw += [x.stride(1) >= x.stride(2) for x in (args[0], args[1], out)]
        return out


@pytest.mark.parametrize("make", [tiny_tokenizer, tiny_single, tiny_bits])
def test_the_decoder_stays_in_nchw(make):
    tokenizer = make()
    f_hat = randn(2, tokenizer.config.z_channels, 3, 4).to(memory_format=torch.channels_last)
    with Layouts() as layouts, torch.no_grad():
        baselines.decode(tokenizer, f_hat)
    assert len(layouts.in_nchw) > 30 and all(layouts.in_nchw)
    with Layouts() as layouts, torch.no_grad():
        tokenizer.decode(f_hat)
    assert not all(layouts.in_nchw)


def test_llamagen_copies_its_caches_for_every_token_and_keeps_both_halves(monkeypatch):
    steps = []

    def noted(q, k, v, attn_mask, _attention=F.scaled_dot_product_attention):
        copies = all(x.untyped_storage().nbytes() == x.nbytes for x in (k, v))      # a view would share a larger one
        fused = torch.backends.cuda.flash_sdp_enabled()                     # decides on a CPU, too
        steps.append((tuple(k.shape), tuple(attn_mask.shape), copies, fused))
        return _attention(q, k, v, attn_mask=attn_mask)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    baselines.llamagen_tokens(tiny_llamagen(), LABELS, cfg=2.0, cfg_interval=3, generator=seeded())
    whole = (6, 2, 24, 16), (6, 1, 1, 24), True                             # 1 + 16 positions, rounded up to 24
    assert steps == 2 * [(*whole, True)] + 2 * 15 * [(*whole, False)]


# ----------------------------------------------------------------------------------------------------------------------
# What the originals drew


def drawn_with_our_options(path):
    """Whether a parity case is a drawing without what the baselines leave out."""
    meta, _ = load_case(path)
    c = meta["config"] | meta.get("call", {})
    others = c.get("more_smooth") or c.get("negative_lens") or c.get("cfg_insertion_layer", [0]) != [0]
    stops_early = c.get("trunk_scale", math.inf) < len(c.get("scale_schedule", ()))
    return meta["kind"] in ("var.sample", "llamagen.generate", "infinity.sample") and not (others or stops_early)


CASES = [path for path in sorted(parity.FOLDER.glob("*.safetensors")) if drawn_with_our_options(path)]


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_parity(path, tmp_path, monkeypatch):
    """Tolerances are those of test_parity.py."""
    meta, t = load_case(path)
    if meta["kind"] == "llamagen.generate":
        check_llamagen(meta, t, tmp_path)
    elif meta["kind"] == "var.sample":
        check_var(meta, t, tmp_path, *spy(monkeypatch))
    else:
        check_infinity(meta, t, tmp_path, *spy(monkeypatch))


def check_var(meta, t, tmp_path, logits, _):
    tokenizer, model = parity.load_var(meta, t, tmp_path)
    call = meta["call"]
    tokens, f_hat = baselines.var_tokens(model, tokenizer, torch.tensor(call["label_B"]), cfg=call["cfg"],
                                         top_k=call["top_k"], top_p=call["top_p"], generator=seeded(call["g_seed"]))
    parity.equal(torch.cat(tokens, 1), t["out.tokens"], "tokens")
    parity.close(torch.cat(logits, 1), t["out.logits"], what="logits")
    parity.close(f_hat, t["out.fhat"], what="f_hat")
    parity.check_image((baselines.decode(tokenizer, f_hat) + 1) / 2, t, "img")


def check_llamagen(meta, t, tmp_path):
    model = parity.load_llamagen(meta, t, tmp_path)
    cond, text_mask = parity.condition(meta, t)
    for i, run in enumerate(meta["runs"]):
        options = {k: v for k, v in run.items() if k not in ("cfg_scale", "seed", "use_mask")}
        tokens = baselines.llamagen_tokens(model, cond, text_mask if run.get("use_mask", True) else None,
                                           cfg=run["cfg_scale"], generator=seeded(run.get("seed", 0)), **options)
        parity.equal(tokens, t[f"out.tokens.{i}"], f"tokens of run {i}")


def check_infinity(meta, t, tmp_path, logits, given):
    tokenizer, model = parity.load_infinity(meta, t, tmp_path)
    c = meta["config"]
    scales = parity.check_schedule(c)
    sizes = infinity.tokenizer_scales(scales, model.config.patchify)
    text, text_mask = parity.unpack(parity.noted(meta, r"in.text\d*"), c["text_lens"])
    if c["gt_leak"]:
        leaked = noise("in.gt", (len(text), sum(h * w for h, w in sizes), tokenizer.config.z_channels)) > 0
        leaked = leaked.long().split([h * w for h, w in sizes], 1)[:c["gt_leak"]]
        if model.config.patchify:
            leaked = [infinity.fold(x, size) for x, size in zip(leaked, scales)]
        given += [x.flatten(1) for x in leaked]
    bits, f_hat = baselines.infinity_bits(model, tokenizer, text, text_mask, scales, cfg=c["cfg_list"],
                                          tau=c["tau_list"], top_k=c["top_k"], top_p=c["top_p"],
                                          generator=seeded(c["g_seed"] or 0))
    if model.config.patchify:
        bits = [infinity.unfold(x, size) for x, size in zip(bits, scales)]
    parity.equal(torch.cat(bits, 1), t["out.bits"], "bits")
    found = torch.cat([x.unflatten(1, (-1, model.config.bits)) for x in logits], 1).flatten(2)
    parity.close(parity.thinned(found, t["out.logits"]), t["out.logits"], what="logits")
    parity.close(f_hat, t["out.quantized"], what="quantized")
    image = to_pixels((baselines.decode(tokenizer, f_hat) + 1) / 2)
    off = abs(image.astype(int) - t["out.image_bgr"].flip(-1).numpy().astype(int))
    assert off.max() <= 1 and (off > 0).any(-1).mean() <= 0.002             # rounded to the other of two numbers
