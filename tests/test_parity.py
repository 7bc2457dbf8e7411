"""The numbers of the original implementations, on stand-in weights in the official layout, through the public loaders.

Runs every case of a known kind in tests/parity, or in the folder named by PARITY_DIR. A case brings its own config,
weights manifest, inputs and expected outputs, so new cases of a known kind need no code. See tests/parity/fill.py.
"""
import itertools
import os
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

FOLDER = Path(os.environ.get("PARITY_DIR", Path(__file__).parent / "parity"))
sys.path.insert(0, str(Path(__file__).parent / "parity"))

import infinity
import latentsync
import llamagen
import syncnet
import triton_ops
import train
import var
import vq
from lib import losses, videomae
from lib.pictures import to_pixels
from lib.text import clean_caption
from fill import fill_state_dict, load_case, noise

RUNNERS = {}


def runner(kind):
    return lambda f: RUNNERS.setdefault(kind, f)


def thinned(out, expected):
    """Every n-th entry of a tensor in each dimension, so that the shape is that of what a case has stored."""
    assert out.dim() == expected.dim(), f"{tuple(out.shape)} cannot be thinned to {tuple(expected.shape)}"
    strides = []
    for n, stored in zip(out.shape, expected.shape):
        strides.append(next(stride for stride in range(1, n + 1) if -(-n // stride) == stored))
    return out[tuple(slice(None, None, stride) for stride in strides)]


def noted(meta, name, shape=None):
    """The input that a case's note describes: "2 noise('in.mel', (3, 1, 80, 52))".

    name: a pattern, because some names have a number, as in.features2. shape: for notes that do not say it in numbers.
    """
    found = re.search(rf"([\d.]+ )?noise\('({name})'(?:, [(\[]([\d, ]+)[)\]])?", meta["note"])
    scale, name, noted_shape = found.groups()
    if noted_shape:
        shape = tuple(map(int, noted_shape.split(",")))
    return float(scale or 1) * noise(name, shape)


def said(meta, pattern):
    """The numbers in a case's note that a pattern finds."""
    return [float(number) for number in re.search(pattern, meta["note"]).groups()]


def close(out, expected, atol=1e-4, what=""):
    """Within atol on values of order one, which separates a right implementation from a wrong one in float32."""
    torch.testing.assert_close(out.detach().float(), expected.float(), atol=atol, rtol=0, msg=lambda m: f"{what}: {m}")


def equal(out, expected, what=""):
    differ = (out.long() != expected.long()).sum()
    assert out.shape == expected.shape and not differ, f"{what}: {differ} of {out.numel()} differ"


def same_rounding():
    """Whether this CPU's matrix library rounds products and inverses of 3 x 3 like the one that made the cases.

    The maps of faces are computed by it, and values of pictures that are very near to a whole number are truncated to
    it or to the one below, as the last bit of the map decides. An Intel CPU made the cases. On an AMD EPYC 1 to 4 of
    10,920 values differ by 1, and whatever is computed from these faces by up to 0.002.
    """
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def equal_faces(out, expected, what=""):
    """Equal bytes where this CPU rounds as the one of the cases, see `same_rounding`."""
    if same_rounding():
        return equal(out, expected, what)
    apart = (out.long() - expected.long()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3, f"{what}: {apart.max()}, {(apart > 0).sum()} values"


def check_image(image, t, prefix):
    """8x8 average pool of everything, and one corner in full."""
    close(F.avg_pool2d(image, 8), t[f"out.{prefix}_mean8"], what=f"{prefix}_mean8")
    close(image[..., :16, :16], t[f"out.{prefix}_slice"], what=f"{prefix}_slice")


def check_norms(found, t, prefix, atol=1e-6):
    """found: official key -> tensor. Norms agree to 1e-3. Norms below 1e-6 are rounding noise, and stored as 0."""
    expected = {k.removeprefix(prefix): v.item() for k, v in t.items() if k.startswith(prefix)}
    norms = {k: v.norm().item() for k, v in found.items()}
    assert set(expected) <= set(norms), f"no such parameter: {sorted(set(expected) - set(norms))[:5]}"
    wrong = {k: (norms[k], e) for k, e in expected.items() if abs(norms[k] - e) > 1e-3 * abs(e) + atol}
    assert not wrong, f"{prefix}: {dict(list(wrong.items())[:5])}"


def official_names(model, module):
    """Parameter -> official key, through the module's own export."""
    flat = {id(p): n for n, p in model.named_parameters()}
    table = module.renames(model.config) if module is vq else module.RENAMES
    return {n: next(iter(module_rename(n, table))) for n in flat.values()}


def module_rename(name, table):
    return vq.rename_keys({name: None}, table, inverse=True)


# ----------------------------------------------------------------------------------------------------------------------
# VAR and its tokenizer


def load_var(meta, t, tmp_path, schedule_in_file=True):
    """(tokenizer, transformer or None), written as the release would be, read by the public loaders, exported back."""
    kept = {k.removeprefix("keep."): v for k, v in t.items() if k.startswith("keep.")}
    state = fill_state_dict(meta["manifest"], kept)
    prefixes = tuple(meta["config"]["vae_key_prefixes"])
    parts = {"vae": {k: v for k, v in state.items() if k.startswith(prefixes)},
             "var": {k: v for k, v in state.items() if not k.startswith(prefixes)}}
    c = meta["config"]
    torch.save(parts["vae"], tmp_path / "vae.pth")
    tokenizer = vq.load(tmp_path / "vae.pth", patch_nums=c["patch_nums"])
    for name, value in dict(ch=c["ch"], ch_mult=tuple(c["ch_mult"]), num_res_blocks=c["num_res_blocks"],
                            vocab_size=c["vocab_size"], z_channels=c["z_channels"], phi_count=c["share_quant_resi"],
                            phi_ratio=c["quant_resi"], beta=c["beta"], znorm=c["using_znorm"]).items():
        assert getattr(tokenizer.config, name) == value, f"inferred {name}"
    check_export(vq.export(tokenizer), parts["vae"])
    if not any(k.startswith("blocks.") for k in state):
        return tokenizer, None
    torch.save(parts["var"], tmp_path / "var.pth")
    model = var.load(tmp_path / "var.pth")
    for name, value in dict(depth=c["depth"], width=c["width"], heads=c["heads"], patch_nums=tuple(c["patch_nums"]),
                            num_classes=c["num_classes"], shared_adaln=c["shared_aln"], attn_l2_norm=c["attn_l2_norm"],
                            norm_eps=c["norm_eps"], mlp_ratio=c["mlp_ratio"]).items():
        assert getattr(model.config, name) == value, f"inferred {name}"
    check_export(var.export(model), {k: v for k, v in parts["var"].items()})
    return tokenizer, model


def check_export(exported, official):
    """An export equals the official state dict, key for key and bit for bit."""
    assert set(exported) == set(official), f"{set(exported) ^ set(official)}"
    for k, v in official.items():
        assert exported[k].dtype == v.dtype and torch.equal(exported[k], v), k


@runner("var.vqvae")
def var_vqvae(meta, t, tmp_path):
    tokenizer, _ = load_var(meta, t, tmp_path)
    image = noise(meta["image_name"], tuple(meta["image_shape"]))
    patch_nums = meta["config"]["patch_nums"]
    f = tokenizer.encode(image)
    close(f, t["out.f"], what="f")
    steps = list(tokenizer.quantize.quantize_scales(f))
    indices = [index for _, index, _ in steps]
    equal(torch.cat(indices, 1), t["out.idx"], "tokens")
    close(torch.stack([f_hat for *_, f_hat in steps]), t["out.fhat"], what="partial sums of encode")
    close(torch.stack(tokenizer.quantize.partial_sums(indices)), t["out.fhat"], what="partial sums of decode")
    close(tokenizer.quantize.teacher_input(indices, patch_nums), t["out.var_input"], what="teacher input")
    check_image(tokenizer.reconstruct(image), t, "rec")


@runner("var.vqvae_decode")
def var_vqvae_decode(meta, t, tmp_path):
    tokenizer, _ = load_var(meta, t, tmp_path)
    indices = t["in.idx"].long().split([p * p for p in meta["config"]["patch_nums"]], 1)
    images = tokenizer.detokenize(indices, all_scales=True)
    close(torch.stack([F.avg_pool2d(image, 8) for image in images]), t["out.ladder_mean8"], what="images of all scales")
    close(thinned(images[-1], t["out.img"]), t["out.img"], what="image")
    check_image(images[-1], t, "img")
    # An experimental path of the original: the running sum has the size of its scale and is resized to the next one.
    quantizer, sizes, f_hat = tokenizer.quantize, vq.as_pairs(tokenizer.config.patch_nums), 0
    for k, (index, size) in enumerate(zip(indices, sizes)):
        h = quantizer.contribution(quantizer.embed(index, size), k, len(sizes), size)
        f_hat = h + (vq.bicubic_resize(f_hat, size) if k else 0)
    with torch.no_grad():
        close(F.avg_pool2d(tokenizer.decode(f_hat), 8), t["out.unresized_mean8"], what="step by step")


@runner("var.vqvae_train")
def var_vqvae_train(meta, t, tmp_path):
    tokenizer, _ = load_var(meta, t, tmp_path)
    tokenizer.train()
    names = official_names(tokenizer, vq)
    for i, name in enumerate(meta["image_names"]):
        image = noise(name, tuple(meta["image_shape"]))
        rec, vq_loss, usage = tokenizer(image)
        close(usage, t[f"out.usages{i}"], what=f"usage {i}")
        if i == 0:
            check_image(rec, t, "rec")
            loss = F.mse_loss(rec, image) + vq_loss
            close(vq_loss, t["out.vq_loss"], atol=1e-5 * t["out.vq_loss"].item())
            close(loss, t["out.loss"], atol=1e-5 * t["out.loss"].item())
            loss.backward()
            check_norms({names[n]: p.grad for n, p in tokenizer.named_parameters()}, t, "out.grad_norm.")
    close(tokenizer.quantize.hits, t["out.ema_vocab_hit_SV"], what="hit statistics")


@runner("var.logits")
def var_logits(meta, t, tmp_path):
    tokenizer, model = load_var(meta, t, tmp_path)
    indices = t["in.idx"].long().split([p * p for p in model.config.patch_nums], 1)
    features = tokenizer.quantize.teacher_input(indices, model.config.patch_nums)
    labels = t["in.labels"].long()
    logits = model(labels, features)
    close(logits, t["out.logits"], what="logits")
    close(logits.mean(), t["out.logits_mean"])
    close(logits.std(), t["out.logits_std"])
    rate, seed = said(meta, r"cond_drop_rate ([\d.]+) right after torch.manual_seed\((\d+)\)")
    dropped = model(labels, features, class_drop=rate, generator=torch.Generator().manual_seed(int(seed)))
    close(thinned(dropped, t["out.logits_dropped"]), t["out.logits_dropped"], what="logits with class dropping")


@runner("var.train")
def var_train(meta, t, tmp_path):
    tokenizer, model = load_var(meta, t, tmp_path)
    model.train()
    assert meta["config"]["drop_path_rate"] == 0                            # theirs holds for all blocks, ours grows
    model.config = replace(model.config, drop_path=0.0)
    names = official_names(model, var)
    indices = tokenizer.tokenize(noise(meta["image_name"], tuple(meta["image_shape"])))
    features = tokenizer.quantize.teacher_input(indices)
    tokens, labels, drop = torch.cat(indices, 1), t["in.labels"].long(), meta["config"]["cond_drop_rate"]
    loss, _ = model.loss(labels, tokens, features, class_drop=drop, label_smoothing=meta["config"]["label_smoothing"])
    close(loss, t["out.loss"], atol=1e-5 * t["out.loss"].item())
    loss.backward()
    found = {names[n]: p.grad for n, p in model.named_parameters()}
    check_norms(found, t, "out.grad_norm.")
    total = t["out.total_grad_norm"]
    close(torch.stack([g.norm() for g in found.values()]).norm(), total, atol=1e-3 * total.item())

    s, start = meta["schedule"], {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(train.parameter_groups(model), s["peak_lr"], (0.9, 0.95), eps=1e-8)
    for step in range(s["steps"]):
        lr = s["peak_lr"] * train.learning_rate(step, s["max_it"], s["sche"], s["wp_it"], s["wp0"], s["wpe"])
        wd = train.weight_decay(step, s["max_it"], s["wd"], s["wd_end"])
        assert lr == pytest.approx(t["out.opt_lr"][step].item()) and wd == pytest.approx(t["out.opt_wd"][step].item())
        train.set_rates(optimizer, lr, wd)
        optimizer.zero_grad()
        model.loss(labels, tokens, features, class_drop=drop)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s["clip"])
        optimizer.step()
    check_norms({names[n]: p.detach() - start[n] for n, p in model.named_parameters()}, t, "out.delta_norm.")


@runner("var.schedule")
def var_schedule(meta, t, tmp_path):
    c = meta["config"]
    for name, run in c["runs"].items():
        n = run["max_it"]
        lr = [c["peak_lr"] * train.learning_rate(i, n, name, run["wp_it"], c["wp0"], run["wpe"]) for i in range(n)]
        wd = [train.weight_decay(i, n, c["wd"], c["wd_end"]) for i in range(n)]
        torch.testing.assert_close(torch.tensor(lr, dtype=torch.float64), t[f"out.lr.{name}"], rtol=1e-9, atol=0)
        torch.testing.assert_close(torch.tensor(wd, dtype=torch.float64), t[f"out.wd.{name}"], rtol=1e-9, atol=0)
    for key, expected in t.items():
        if key.startswith("out.phi."):
            kind, scales = key.removeprefix("out.phi.").split(".")
            scales = int(scales.removeprefix("scales"))
            count = scales if kind == "nonshared" else int(kind.removeprefix("share"))
            assert [vq.phi_index(k, scales, count) for k in range(scales)] == expected.tolist(), key


def check_draw(model, tokenizer, t, call, **edit):
    """A call of the original, made through `VAR.sample`, gives its numbers."""
    labels = call["B"] if call["label_B"] is None else torch.tensor(call["label_B"])
    options = {k: call[k] for k in ("cfg", "top_k", "top_p", "more_smooth") if k in call}
    # Gumbel mixtures divide by temperatures down to 0.014 and so enlarge rounding differences.
    atol = 1e-3 if call.get("more_smooth") else 1e-4
    steps = []
    image = model.sample(tokenizer, labels, generator=torch.Generator().manual_seed(call["g_seed"]),
                         on_step=steps.append, **options, **edit)
    combined = []
    for step in steps:
        cond, *uncond = step.logits.chunk(2) if len(step.logits) > len(step.tokens) else (step.logits,)
        combined.append((1 + step.guidance) * cond - step.guidance * uncond[0] if uncond else cond)
    equal(torch.cat([s.tokens for s in steps], 1), t["out.tokens"], "tokens")
    close(torch.cat(combined, 1), t["out.logits"], atol, what="logits")
    close(steps[-1].f_hat, t["out.fhat"], atol, what="f_hat")
    check_image(image, t, "img")


@runner("var.sample")
def var_sample(meta, t, tmp_path):
    tokenizer, model = load_var(meta, t, tmp_path)
    check_draw(model, tokenizer, t, meta["call"])


@runner("var.edit")
def var_edit(meta, t, tmp_path):
    tokenizer, model = load_var(meta, t, tmp_path)
    image = noise(meta["image_name"], tuple(meta["image_shape"]))
    given = tokenizer.tokenize(image)
    equal(torch.cat(given, 1), t["in.idx"], "tokens of the given picture")
    keep = var.edit_mask(meta["box"], model.config.patch_nums[-1], inpaint=meta["inpainting"])
    equal(keep, t["in.mask"], "mask")
    check_draw(model, tokenizer, t, meta["call"], given_tokens=given, keep_mask=keep)


def full(meta, t, tmp_path, parts):
    """A case of the real size is told by what it has stored, and runs as the small case with the same entries."""
    chosen = [run for needed, run in parts if needed <= set(t) | set(meta)]
    assert chosen, f"{meta['kind']}: {sorted(t)} are the entries of no known kind"
    chosen[0](meta, t, tmp_path)


@runner("var.full")
def var_full(meta, t, tmp_path):
    full(meta, t, tmp_path, [({"in.mask", "box"}, var_edit), ({"out.tokens", "call"}, var_sample),
                             ({"in.idx", "in.labels", "out.logits"}, var_logits), ({"out.f", "out.idx"}, var_vqvae),
                             ({"in.idx", "out.ladder_mean8"}, var_vqvae_decode)])


# ----------------------------------------------------------------------------------------------------------------------
# LlamaGen and its tokenizers


def filled(meta, t):
    """The official state dict of a case."""
    kept = {k.removeprefix("keep."): v for k, v in t.items() if k.startswith("keep.")}
    kept |= {k: torch.zeros(shape) for k, shape in meta.get("zeros", {}).items()}
    return fill_state_dict(meta["manifest"], {k: v for k, v in kept.items() if k in meta["manifest"]}) | kept


def load_single_scale(meta, state, tmp_path):
    """The tokenizer of a case, through the public loader and back."""
    torch.save({"model": state}, tmp_path / "vq.pt")
    c = meta["config"]
    tokenizer = vq.load(tmp_path / "vq.pt", patch_nums=(meta["image_shape"][-1] // c["downsample"],))
    tokenizer.config = tokenizer.quantize.config = replace(tokenizer.config, entropy=c["entropy_ratio"])
    for name, value in dict(ch=c["ch"], ch_mult=tuple(c["ch_mult"]), num_res_blocks=c["num_res_blocks"],
                            hidden_channels=c["z_channels"], vocab_size=c["codebook_size"], beta=c["commit_beta"],
                            z_channels=c["codebook_dim"], single_scale=c["codebook_l2_norm"]).items():
        assert getattr(tokenizer.config, name) == value, f"inferred {name}"
    check_export(vq.export(tokenizer), state)
    return tokenizer, noise(meta["image_noise"], tuple(meta["image_shape"]))


def official_gradients(model, module, **options):
    """Official key -> gradient, split and renamed by the module's own export."""
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.load_state_dict(gradients, strict=False)
    return module.export(model, **options)


def load_llamagen(meta, t, tmp_path):
    """The transformer of a case, through the public loader and back."""
    state, c = filled(meta, t), meta["config"]
    stray = {"freqs_cis": torch.zeros(c["cls_token_num"] + c["block_size"], 2, 2)}
    torch.save({"model": state | stray}, tmp_path / "c2i.pt")
    model = llamagen.load(tmp_path / "c2i.pt", heads=c["n_head"])           # the side follows from the stray table
    found = model.config
    for name, value in dict(depth=c["n_layer"], width=c["dim"], heads=c["n_head"], hidden=c["ffn_hidden"],
                            side=c["grid"], vocab_size=c["vocab_size"], rope_base=c["rope_base"],
                            norm_eps=c["norm_eps"], slots=c["cls_token_num"],
                            text_width=c["caption_dim"] or 0).items():
        assert getattr(found, name) == value, f"inferred {name}"
    assert (found.kv_heads or found.heads) == c["n_kv_head"]
    assert c["model_type"] == "t2i" or found.num_classes == c["num_classes"]
    check_export(llamagen.export(model), state)
    return model


def condition(meta, t):
    """The condition of a case: classes, or features and mask of texts."""
    if "lengths" not in meta:
        return t["in.labels"].long(), None
    width, name = meta["config"]["caption_dim"], meta["caption_noise"]
    rows = [noise(f"{name}.{i}", (n, width)) for i, n in enumerate(meta["lengths"])]
    text, mask = llamagen.left_pad(rows, meta["config"]["cls_token_num"])
    equal(mask, t["in.mask"], "mask")
    return text, mask


@runner("llamagen.logits")
def llamagen_logits(meta, t, tmp_path):
    model, (cond, mask) = load_llamagen(meta, t, tmp_path), condition(meta, t)
    close(model(cond, t["in.tokens"].long(), mask), t["out.logits"], what="logits")
    if "out.text_logits_mean" in t:
        everywhere = model.logits(*model.stream(cond, t["in.tokens"].long(), mask))
        close(everywhere[:, :model.config.slots - 1].mean(-1), t["out.text_logits_mean"], what="logits of the text")


@runner("llamagen.train")
def llamagen_train(meta, t, tmp_path):
    model, (cond, mask) = load_llamagen(meta, t, tmp_path), condition(meta, t)
    model.config = replace(model.config, dropout=0.0)
    for block in model.train().blocks:
        block.dropout = 0.0
    loss, _ = model.loss(cond, t["in.tokens"].long(), mask, valid=t.get("in.valid"), cond_drop=0.0)
    torch.testing.assert_close(loss, t["out.loss"], rtol=1e-5, atol=0)
    loss.backward()
    check_norms(official_gradients(model, llamagen), t, "out.grad_norm.")


@runner("llamagen.generate")
def llamagen_generate(meta, t, tmp_path):
    model, (cond, mask) = load_llamagen(meta, t, tmp_path), condition(meta, t)
    for i, settings in enumerate(meta["runs"]):
        settings = dict(settings)
        text_mask = mask if settings.pop("use_mask", True) else None
        generator = torch.Generator().manual_seed(settings.pop("seed", 0))
        tokens = model.generate(cond, text_mask, cfg=settings.pop("cfg_scale"), generator=generator, **settings)
        equal(tokens, t[f"out.tokens.{i}"], f"tokens of run {i}")


@runner("llamagen.full")
def llamagen_full(meta, t, tmp_path):
    full(meta, t, tmp_path, [({"runs", "out.tokens.0"}, llamagen_generate),
                             ({"in.tokens", "out.logits"}, llamagen_logits), ({"in.codes", "out.quant"}, llamagen_vq)])


@runner("llamagen.filters")
def llamagen_filters(meta, t, tmp_path):
    for i, run in enumerate(meta["runs"]):
        kept = triton_ops.filter_logits(t["in.logits"], **run).isfinite()
        rows = [row for row in range(len(kept)) if not (row == 2 and run["top_p"] < 1)]     # row 2 is full of ties
        equal(kept[rows], t[f"out.kept.{i}"][rows], f"kept by run {i}")


@runner("llamagen.t5_clean")
def llamagen_t5_clean(meta, t, tmp_path):
    pytest.importorskip("ftfy", reason="cleaning captions needs ftfy and beautifulsoup4, optional packages")
    pytest.importorskip("bs4", reason="cleaning captions needs ftfy and beautifulsoup4, optional packages")
    once = [clean_caption(text) for text in meta["texts"]]
    assert once == meta["cleaned_once"]
    assert [clean_caption(text) for text in once] == meta["cleaned"]


@runner("llamagen.vq")
def llamagen_vq(meta, t, tmp_path):
    tokenizer, image = load_single_scale(meta, filled(meta, t), tmp_path)
    codes, = tokenizer.tokenize(image)
    equal(codes.flatten(), t["out.indices"], "codes")
    close(tokenizer.quantize.partial_sums([codes])[-1], t["out.quant"], what="quantized")
    close(tokenizer.detokenize([codes]), t["out.recon"].clamp(-1, 1), what="reconstruction")
    given = t["in.codes"].long().view(len(image), -1)
    close(tokenizer._decode(tokenizer.quantize.partial_sums([given])[-1]), t["out.decoded"], what="decoder")


@runner("llamagen.vq_train")
def llamagen_vq_train(meta, t, tmp_path):
    tokenizer, image = load_single_scale(meta, filled(meta, t), tmp_path)
    rec, vq_loss, usage = tokenizer.train()(image)
    z = F.normalize(tokenizer.encode(image), dim=1)
    quantizer = tokenizer.quantize
    parts = dict(zip(("vq_loss", "commit_loss", "entropy_loss"), quantizer.losses(z, quantizer.quantize(z)[1])))
    for key, found in (parts | {"recon_mse": F.mse_loss(rec, image), "usage": usage[0] / 100}).items():
        torch.testing.assert_close(found, t[f"out.{key}"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(vq_loss, sum(parts.values()))
    equal(tokenizer.quantize.recent[-32:], t["out.used_tail"], "used codes")
    (F.mse_loss(rec, image) + vq_loss).backward()
    check_norms(official_gradients(tokenizer, vq), t, "out.grad_norm.")


@runner("llamagen.vq_gan")
def llamagen_vq_gan(meta, t, tmp_path):
    state, c = filled(meta, t), meta["config"]
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    lpips, disc = part("perceptual_loss."), part("discriminator.")
    state = {k: v for k, v in state.items() if not k.startswith(("perceptual_loss.", "discriminator."))}
    tokenizer, image = load_single_scale(meta, state, tmp_path)
    vgg = {f"features.{k.split('.', 2)[2]}": v for k, v in lpips.items() if k.startswith("net.")}
    torch.save(vgg, tmp_path / "vgg16.pth")
    torch.save({k: v for k, v in lpips.items() if k.startswith("lin")}, tmp_path / "vgg.pth")
    side = image.shape[-1]
    discriminator = (losses.PatchDiscriminator(c["loss.disc_dim"], c["loss.disc_num_layers"])
                     if c["loss.disc_type"] == "patchgan" else losses.StyleDiscriminator(side))
    buffers = {k: v for k, v in discriminator.state_dict().items() if k not in disc}    # BatchNorm's running statistics
    vq.load_strict(discriminator, disc | buffers, "discriminator")
    gan = {"hinge": "hinge", "vanilla": "vanilla", "non-saturating": "non-saturating-swapped"}[c["loss.disc_loss"]]
    pixels = {"l1": 0.0, "l2": 0.0, c["loss.reconstruction_loss"]: c["loss.reconstruction_weight"]}
    criterion = losses.TokenizerLoss(
        losses.load_lpips(tmp_path / "vgg16.pth", tmp_path / "vgg.pth"), discriminator, **pixels, adaptive=False,
        gan=gan, lpips_weight=c["loss.perceptual_weight"], disc_weight=c["loss.disc_weight"],
        disc_start=c["loss.disc_start"])
    last = tokenizer.train().decoder.conv_out.weight
    for name, step in (("before", c["loss.disc_start"] - 1), ("after", c["loss.disc_start"])):
        rec, vq_loss, _ = tokenizer(image)
        close(criterion.lpips(rec, image), t[f"out.lpips.{name}"], what="lpips")
        loss, _ = criterion(image, rec, vq_loss, step, last)
        torch.testing.assert_close(loss, t[f"out.gen_loss.{name}"], rtol=1e-5, atol=0)
        disc_loss = criterion.discriminator_loss(image, rec) if criterion.adversarial(step) else torch.tensor(0.0)
        torch.testing.assert_close(disc_loss, t[f"out.disc_loss.{name}"], rtol=1e-5, atol=0)
    close(discriminator(image), t["out.logits_real"], what="logits of real pictures")
    close(discriminator(rec), t["out.logits_fake"], what="logits of reconstructions")
    loss.backward()
    discriminator.zero_grad()
    disc_loss.backward()
    gradients = {f"discriminator.{n}": p.grad for n, p in discriminator.named_parameters()}
    check_norms(official_gradients(tokenizer, vq) | gradients, t, "out.grad_norm.")


# ----------------------------------------------------------------------------------------------------------------------
# LPIPS, the perceptual loss of all tokenizers


@runner("latentsync.lpips")
def lpips(meta, t, tmp_path):
    kept = {k.removeprefix("keep."): v for k, v in t.items() if k.startswith("keep.")}
    state = fill_state_dict(meta["manifest"], kept)
    vgg = {f"features.{k.split('.', 2)[2]}": v for k, v in state.items() if k.startswith("net.")}
    heads = {k: v for k, v in state.items() if k.startswith("lin")}
    torch.save(vgg, tmp_path / "vgg16.pth")
    torch.save(heads, tmp_path / "vgg.pth")
    a = noted(meta, "in.a")
    b = (a + 0.5 * noise("in.b", tuple(a.shape))).clamp(-1, 1)
    close(losses.load_lpips(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")(a, b), t["out.lpips"], what="lpips")


# ----------------------------------------------------------------------------------------------------------------------
# Infinity and its tokenizer


def pairs(schedule):
    """(t, h, w) of every scale -> (h, w)."""
    return tuple((h, w) for _, h, w in schedule)


def check_schedule(c):
    """The schedule of a case, after making sure that our table has it."""
    assert vq.schedule(c["h_div_w"], c["pn"])[:len(c["scale_schedule"])] == pairs(c["scale_schedule"])
    return pairs(c["scale_schedule"])


def load_infinity(meta, t, tmp_path):
    """(tokenizer or None, transformer or None), through the public loaders and back."""
    c, tokenizer, model = meta["config"], None, None
    kept = {k.removeprefix("keep."): v for k, v in t.items() if k.startswith("keep.")}
    masks = {k: v for k, v in kept.items() if k.endswith("lfq.mask")}
    manifest_vae = meta.get("manifest_vae") or (meta["manifest"] if meta["kind"] == "infinity.vae" else None)
    if manifest_vae:
        state, v = fill_state_dict(manifest_vae, masks), c["vae"]
        torch.save({"vae": state, "step": 1}, tmp_path / "vae.pth")
        tokenizer = vq.load(tmp_path / "vae.pth")
        found = tokenizer.config
        assert (found.z_channels, found.ch, list(found.ch_mult), found.num_res_blocks, found.stride) == (
            v["codebook_dim"], v["base_ch"], v["ch_mult"], v["num_res_blocks"], v["patch_size"])
        check_export(vq.export(tokenizer), state)
    if "transformer" in c:
        state = fill_state_dict(meta["manifest"], {k: v for k, v in kept.items() if k not in masks})
        torch.save(state, tmp_path / "model.pth")
        model = infinity.load(tmp_path / "model.pth", patchify=bool(c.get("spatial_patchify")))
        found, v = model.config, c["transformer"]
        for name, value in dict(depth=v["depth"], width=v["embed_dim"], heads=v["num_heads"], chunks=v["block_chunks"],
                                text_width=v["text_channels"], text_maxlen=v["text_maxlen"],
                                hidden=v["mlp_hidden"]).items():
            assert getattr(found, name) == value, f"inferred {name}"
        check_export(infinity.export(model), state)
    return tokenizer, model


def unpack(rows, lengths):
    """Packed text rows (sum of lengths, Ct) -> padded (B, T, Ct), mask (B, T) or None."""
    text = torch.nn.utils.rnn.pad_sequence(rows.split(lengths), batch_first=True)
    mask = torch.arange(text.shape[1]) < torch.tensor(lengths)[:, None]
    return text, None if mask.all() else mask


@runner("infinity.vae")
def infinity_vae(meta, t, tmp_path):
    tokenizer, _ = load_infinity(meta, t, tmp_path)
    c, scales = meta["config"], check_schedule(meta["config"])
    h, w = (n * tokenizer.config.stride for n in scales[-1])
    image = noted(meta, r"in.image\d*")
    assert image.shape == (c["batch"], 3, h, w)
    image = 3 * F.avg_pool2d(F.pad(image, (2,) * 4, "reflect"), 5, 1)
    f = tokenizer.encode(image)
    close(f, t["out.features"], what="features")
    bits = tokenizer.tokenize(image, scales)
    equal(torch.cat(bits, 1), t["out.bits"], "bits")
    quantized = tokenizer.quantize.partial_sums(bits, scales)[-1]
    close(quantized, t["out.quantized"], what="quantized")
    close(tokenizer._decode(quantized), t["out.decoder_raw"], what="decoder")
    close(tokenizer.detokenize(bits, scales), t["out.decoder_raw"].clamp(-1, 1), what="image")


@runner("infinity.quantizer")
def infinity_quantizer(meta, t, tmp_path):
    c, scales = meta["config"], check_schedule(meta["config"])
    d = c["quantizer"]["codebook_dim"]
    quantizer = vq.MultiScaleBSQ(vq.CONFIGS[f"infinity_vae_d{d}"])
    f = noted(meta, r"in.features\d*").requires_grad_()
    steps = list(quantizer.quantize_scales(f, scales))
    equal(torch.cat([bits for _, bits, _ in steps], 1), t["out.bits"], "bits")
    quantized = steps[-1][2]
    close(thinned(quantized, t["out.quantized"]), t["out.quantized"], what="quantized")
    (quantized * noise("in.dz", tuple(quantized.shape))).sum().backward()
    close(thinned(f.grad, t["out.grad_features"]), t["out.grad_features"], what="gradient")
    commitment, each, overall = (torch.stack(column) for column in zip(*(quantizer.losses(z) for z, _, _ in steps)))
    for found, key in ((commitment, "commitment"), (each, "per_sample_entropy"), (overall, "codebook_entropy")):
        torch.testing.assert_close(found, t[f"out.{key}"], rtol=1e-5, atol=1e-7)
    _, loss, _ = quantizer(f)
    torch.testing.assert_close(loss, t["out.aux_loss"].mean(), rtol=1e-5, atol=1e-7)


def correct(quantizer, f, scales, c):
    """self_correct with the draws of the original: chances from numpy's global generator, masks from torch's."""
    chances = np.random.RandomState(c["seed"])
    chances = [0.01 * chances.randint(0, 100 * c["noise_apply_strength"] + 1) for _ in scales]
    torch.manual_seed(c["seed"])
    inputs, labels = infinity.self_correct(
        quantizer, f, scales, c["noise_apply_strength"], layers=c["noise_apply_layers"],
        patchify=bool(c.get("spatial_patchify")), chances=chances)
    return inputs, labels, chances


@runner("infinity.bsc")
def infinity_bsc(meta, t, tmp_path):
    c = meta["config"]
    scales = check_schedule(c)
    d = c["quantizer"]["codebook_dim"]
    quantizer = vq.MultiScaleBSQ(vq._bits(d))
    f = noted(meta, r"in.features\d*")
    inputs, labels, chances = correct(quantizer, f, scales, c)
    close(torch.tensor(chances), t["out.strengths"], what="chances")
    equal(labels, t["out.labels"], "labels")
    close(thinned(inputs, t["out.inputs"]), t["out.inputs"], what="inputs")
    inputs, labels = infinity.self_correct(quantizer, f, scales, 0.0, patchify=bool(c["spatial_patchify"]))
    equal(thinned(labels, t["out.labels_noflip"]), t["out.labels_noflip"], "labels without flips")
    close(thinned(inputs, t["out.inputs_noflip"]), t["out.inputs_noflip"], what="inputs without flips")


@runner("infinity.logits")
def infinity_logits(meta, t, tmp_path):
    _, model = load_infinity(meta, t, tmp_path)
    c, scales = meta["config"], check_schedule(meta["config"])
    lengths, L = c["text_lens"], sum(h * w for h, w in scales)
    text, mask = unpack(noted(meta, "in.text"), lengths)
    x = noted(meta, "in.x")
    assert x.shape == (len(lengths), L - 1, model.config.bits)
    logits = model(text, mask, x, scales).flatten(2)
    close(thinned(logits, t["out.logits"]), t["out.logits"], what="logits")
    rate, seed = said(meta, r"conditional dropout ([\d.]+) after python random.seed\((\d+)\)")
    random.seed(int(seed))
    dropped = torch.tensor([random.random() < rate for _ in lengths])
    null = torch.where(dropped[:, None, None], model.null_rows(text.shape[1]), text)
    logits = model(null, mask, x, scales).flatten(2)
    close(thinned(logits, t["out.logits_cond_drop"]), t["out.logits_cond_drop"], what="logits, some prompts dropped")


@runner("infinity.train")
def infinity_train(meta, t, tmp_path):
    tokenizer, model = load_infinity(meta, t, tmp_path)
    c, scales = meta["config"], check_schedule(meta["config"])
    model.train()
    model.config = replace(model.config, drop_path=0.0)
    lengths = c["text_lens"]
    f = tokenizer.encode(noted(meta, r"in.image\d*"))
    inputs, labels, _ = correct(tokenizer.quantize, f, scales, c)
    equal(thinned(labels, t["out.labels"]), t["out.labels"], "labels")
    text, mask = unpack(noted(meta, "in.text"), lengths)
    n = sum(h * w for h, w in scales[:c["always_training_scales"]]) - 1
    drop = c["cond_drop_rate"]
    random.seed(c["seed"])
    if drop:                                                                # Python draws one number per prompt
        dropped = torch.tensor([random.random() < drop for _ in lengths])
        text = torch.where(dropped[:, None, None], model.null_rows(text.shape[1]), text)
    arguments = (text, mask, inputs[:, :n], labels, scales)
    logits = model(*arguments[:3], scales).flatten(2)
    close(thinned(logits, t["out.logits"]), t["out.logits"], what="logits")
    loss, metrics = model.loss(*arguments, text_drop=0.0)
    if c["bitloss_type"] == "sum":
        loss = loss * model.config.bits
    torch.testing.assert_close(loss[None], t["out.loss"].flatten(), rtol=1e-5, atol=0)
    accuracy = t["out.bit_accuracy"].flatten()
    close(metrics["bit_accuracy"][None] * (100 if accuracy > 1 else 1), accuracy, what="bit accuracy")
    reweighted, _ = model.loss(*arguments, text_drop=0.0, reweight=True)
    torch.testing.assert_close(reweighted[None], t["out.loss_reweighted_by_scale"].flatten(), rtol=1e-5, atol=0)
    loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.load_state_dict(grads)                                            # export() then gives them official names
    check_norms(infinity.export(model, buffers=False), t, "out.grad_norm.")


@runner("infinity.sample")
def infinity_sample(meta, t, tmp_path):
    tokenizer, model = load_infinity(meta, t, tmp_path)
    c, scales = meta["config"], check_schedule(meta["config"])
    d = tokenizer.config.z_channels
    width = model.config.text_width
    text, mask = unpack(noted(meta, r"in.text\d*"), c["text_lens"])
    negative = None
    if c["negative_lens"]:
        rows = noise(f"in.negative{c['input_index']}", (sum(c["negative_lens"]), width))
        negative = unpack(rows, c["negative_lens"])
    sizes = infinity.tokenizer_scales(scales, model.config.patchify)
    lengths = [h * w for h, w in sizes]
    given = (noise("in.gt", (len(text), sum(lengths), d)) > 0).split(lengths, 1) if c["gt_leak"] else None
    guided_blocks = [layer for layer in c["cfg_insertion_layer"] if layer < 0]  # 0 means the logits
    generator = torch.Generator().manual_seed(c["g_seed"] or 0)
    steps = []
    model.sample(tokenizer, text, mask, scales=scales, cfg=c["cfg_list"], tau=c["tau_list"], top_k=c["top_k"],
                 top_p=c["top_p"], negative=negative, guide_after=guided_blocks, generator=generator,
                 given_bits=given, keep_scales=c["gt_leak"], on_step=steps.append)
    steps = steps[:c["trunk_scale"]]
    equal(torch.cat([s.bits for s in steps], 1), t["out.bits"], "bits")
    logits = torch.cat([s.logits for s in steps], 1).flatten(2)
    close(thinned(logits, t["out.logits"]), t["out.logits"], what="logits")
    close(steps[-1].f_hat, t["out.quantized"], what="quantized")
    image = to_pixels((tokenizer.decode(steps[-1].f_hat) + 1) / 2)
    off = np.abs(image.astype(int) - t["out.image_bgr"].flip(-1).numpy().astype(int))
    assert off.max() <= 1 and (off > 0).any(-1).mean() <= 0.002, (off.max(), (off > 0).any(-1).mean())


# ----------------------------------------------------------------------------------------------------------------------
# SyncNet


@runner("syncnet.mel")
def syncnet_mel(meta, t, tmp_path):
    audio, c = t["in.audio"].numpy(), meta["config"]
    mel = syncnet.mel_spectrogram(audio)
    close(mel, t["out.mel"], what="mel")
    starts = [syncnet.mel_start(frame) for frame in c["start_frames"]]
    equal(torch.tensor(starts), t["out.window_starts"], "window starts")
    for frame, start in zip(c["start_frames"], starts):                     # a window has the numbers of the whole
        window = syncnet.mel_window(audio, frame, c["window"])
        if start + c["window"] > mel.shape[1]:
            assert window is None
        else:
            assert torch.equal(window, mel[:, start:start + c["window"]])
    assert syncnet.Config((), (), c["num_frames"]).columns == c["window"]


def stable_config(c, picture):
    """The Config that the original describes. Plain networks are recognised by their weights."""
    def levels(e):
        rows = zip(e["block_out_channels"], e["downsample_factors"], e.get("attn_blocks") or [0] * 99)
        return tuple((width, tuple(f) if isinstance(f, list) else f, bool(attends)) for width, f, attends in rows)
    channels = c["visual_encoder"]["in_channels"]
    latent = picture[0] == picture[1]
    return syncnet.Config(levels(c["visual_encoder"]), levels(c["audio_encoder"]), channels // (4 if latent else 3),
                          picture, latent)


@runner("syncnet.stable")
@runner("syncnet.wav2lip")
def syncnet_stable(meta, t, tmp_path):
    """No case is known for the ablation net. Its kind is taken to be like the other one."""
    kept = {k.removeprefix("keep."): v for k, v in t.items() if k.startswith("keep.")}
    state = fill_state_dict(meta["manifest"], kept)
    torch.save({"state_dict": state}, tmp_path / "syncnet.pt")
    frames, mel = noted(meta, "in.frames"), noted(meta, "in.mel")
    inferred = syncnet.load(tmp_path / "syncnet.pt")
    model = inferred
    if meta["kind"] == "syncnet.stable":
        config = stable_config(meta["config"], tuple(frames.shape[2:]))
        model = syncnet.load(tmp_path / "syncnet.pt", config)
        if any(config.audio[0][1:] == c.audio[0][1:] and len(c.visual) == len(config.visual)
               for c in syncnet.CONFIGS.values()):
            assert inferred.config == config, "inferred config"
    check_export(syncnet.export(model), state)
    close(model.embed_frames(frames), t["out.vision"], what="vision")
    close(model.embed_audio(mel), t["out.audio"], what="audio")
    close(model(frames, mel), t["out.similarity"], what="similarity")
    labels = torch.arange(1, len(frames) + 1) % 2
    loss, _ = model.loss(frames, mel, labels)
    torch.testing.assert_close(loss[None], t["out.loss"].flatten(), rtol=1e-5, atol=0)
    loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.load_state_dict(grads, strict=False)                              # export() then gives them official names
    check_norms(syncnet.export(model), t, "out.grad_norm.")


@runner("syncnet.original")
def syncnet_original(meta, t, tmp_path):
    kept = {k.removeprefix("keep."): v for k, v in t.items() if k.startswith("keep.")}
    state = fill_state_dict(meta["manifest"], kept)
    torch.save(state, tmp_path / "syncnet_v2.model")
    model = syncnet.load(tmp_path / "syncnet_v2.model")
    exported = {k: v for k, v in syncnet.export(model).items() if not k.endswith("num_batches_tracked")}
    check_export(exported, {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")})
    frames, mfcc = noted(meta, "in.frames"), noted(meta, "in.mfcc")
    clips = frames[0].unfold(1, 5, 1)[:, :-1].permute(1, 0, 4, 2, 3)        # the original leaves the last one out
    with torch.no_grad():
        vision = model.embed_frames(clips)
        audio = model.embed_audio(mfcc[0].unfold(2, 20, 4)[:, :, :len(clips)].permute(2, 0, 1, 3))
    every = vision.shape[1] // t["out.vision"].shape[1]                     # only every n-th column was stored
    close(vision[:, ::every], t["out.vision"], what="vision")
    close(audio[:, ::every], t["out.audio"], what="audio")
    most = meta["config"]["vshift"]
    shifted = F.pad(audio, (0, 0, most, most)).unfold(0, 2 * most + 1, 1).transpose(1, 2)
    score = syncnet.best_shift(model.distance(vision[:, None], shifted).mean(0))
    close(score.curve, t["out.mean_dists"], what="distances")
    assert score.offset == t["out.offset"].item()
    close(torch.tensor([score.confidence, score.distance]), torch.cat([t["out.sync_c"], t["out.sync_d"]]), what="score")


# ----------------------------------------------------------------------------------------------------------------------
# LatentSync


def load_kl(state, c, path):
    """The autoencoder, written as the release would be, with both names of its attention weights."""
    torch.save(state, path)
    model = vq.load_autoencoder(path)
    assert [w // model.config.ch for w in c["width"]] == list(model.config.ch_mult), "inferred widths"
    assert model.config.num_res_blocks == c["layers_per_block"], "inferred blocks"
    check_export(vq.export(model), state)
    newer = vq.rename_keys(state, vq.KL_NEWER, inverse=True)
    assert set(newer) != set(state)
    torch.save(newer, path)
    check_export(vq.export(vq.load_autoencoder(path)), state)
    return model


@runner("latentsync.vae")
def latentsync_vae(meta, t, tmp_path):
    model = load_kl(fill_state_dict(meta["manifest"]), meta["config"], tmp_path / "vae.pth")
    assert model.config.scaling == meta["config"]["scaling_factor"]
    with torch.no_grad():
        posterior = model.encode(noted(meta, "in.image"))
        close(posterior.mean, t["out.mean"], what="mean")
        close(posterior.std, t["out.std"], what="std")
        z = noise("in.latent", tuple(t["out.mean"].shape))
        close(model.decode(z * model.config.scaling), t["out.decoded"], what="decoded")


def part_of(meta, t, prefix=""):
    """The official state dict of a model of a case. Tables that the original computes are in `buffers_as_built`."""
    kept = {k.removeprefix("keep."): v for k, v in t.items() if k.startswith("keep.")}
    state = fill_state_dict(meta["manifest"], kept)
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def load_unet(state, c, path, resolution=256):
    """A video UNet, written as the release would be. Its export has the same keys and bits, and also tables."""
    config = latentsync.Config(
        tuple(c["width"]), c["layers_per_block"], c["heads"], c["audio_dim"],
        "none" if not c["motion"] else "up" if c["motion_decoder_only"] else "all", c["motion_heads"],
        c["motion_max_len"], resolution, in_channels=c["in_channels"], out_channels=c["out_channels"])
    torch.save({"global_step": 1, "state_dict": state}, path)
    model = latentsync.load(path, config)
    exported = latentsync.export(model)
    tables = {k for k in exported if k.endswith("pos_encoder.pe")}
    check_export({k: v for k, v in exported.items() if k in state or k not in tables}, state)
    known = {config.widths: latentsync.Config(heads=c["heads"], motion_heads=c["motion_heads"], resolution=resolution)}
    with pytest.MonkeyPatch.context() as patch:                             # what shapes contain is read from them
        entries = {"case": replace(known[config.widths], widths=config.widths)}
        patch.setattr(latentsync, "CONFIGS", entries)
        inferred = latentsync.infer_config(state, path)
    assert replace(inferred, motion_length=config.motion_length) == config, "inferred config"
    return model


@runner("latentsync.unet")
def latentsync_unet(meta, t, tmp_path):
    model = load_unet(part_of(meta, t), meta["config"], tmp_path / "unet.pt")
    x, audio = noted(meta, "in.sample"), noted(meta, "in.audio").flatten(2, 3)[..., None]
    audio = noted(meta, "in.audio")
    (step,), found = meta["timesteps"], {}
    names = {k.removeprefix("out.act."): v for k, v in t.items() if k.startswith("out.act.")}
    for name in names:
        ours = next(iter(vq.rename_keys({name.replace("samplers.0", "samplers.0.conv"): None}, latentsync.RENAMES)))
        ours = ours.removesuffix(".conv") if "upsample" in ours else ours
        hook = lambda module, given, out, name=name: found.__setitem__(name, out if out.dim() < 4 else out.mean((2, 3)))
        model.get_submodule(ours).register_forward_hook(hook)
    with torch.no_grad():
        out = model(x, step, audio)
        # conv_norm_out and the norms of residual blocks are applied without calling their modules
        missing = set(names) - set(found)
        assert missing <= {"conv_norm_out"}, missing
        for name in found:
            close(found[name], names[name], what=name)
        close(out, t["out.sample"], what="sample")
        close(model(x, step, torch.zeros_like(audio)), t["out.sample_zero_audio"], what="zeros for audio")
        close(model(x, step, None), t["out.sample_no_audio"], what="no audio")


@runner("latentsync.unet_blocks")
def latentsync_unet_blocks(meta, t, tmp_path):
    c, state = meta["config"], part_of(meta, t)
    x, time, audio = noted(meta, "in.x"), noted(meta, "in.temb"), noted(meta, "in.audio")
    (B, _, frames, *_), flat = x.shape, rearrange(x, "b c f h w -> (b f) c h w")
    r, s, m = c["resnet"], c["transformer"], c["motion"]

    def check(name, module, *inputs, key=None, part=None):
        place = {"transformer": "attentions.0.", "motion": "motion_modules.0."}.get(name, "")
        own = {k.replace(f"{name}.", place, 1): v for k, v in state.items() if k.startswith(f"{name}.")}
        own = {k.removeprefix(place): v for k, v in latentsync._to_ours(own).items()}
        vq.load_strict(module, own, name, optional=latentsync._tables(module))
        with torch.no_grad():
            out = module.eval()(*inputs)
        out = rearrange(out, "(b f) c h w -> b c f h w", f=frames)
        close(out, t[f"out.{key or name}"], what=key or name)
    check("resnet", latentsync.ResBlock(r["cin"], r["cout"], r["temb"]), flat, time)
    check("resnet_inflated", latentsync.ResBlock(r["cin"], r["cin"], r["temb"]), flat,
          time.repeat_interleave(frames, 0))                                # each frame is a clip of its own
    check("transformer", latentsync.SpatialTransformer(s["channels"], s["heads"], s["audio_dim"]), flat,
          audio.flatten(0, 1))
    check("motion", latentsync.MotionModule(m["channels"], m["heads"], m["max_len"]), flat, B)
    down = torch.nn.Sequential()
    down.conv = torch.nn.Conv2d(c["down"]["cin"], c["down"]["cout"], 3, stride=2, padding=1)
    check("down", down, flat)
    up = latentsync.Upsample(c["up"]["cin"])
    up.conv = torch.nn.Conv2d(c["up"]["cin"], c["up"]["cout"], 3, padding=1)
    check("up", up, flat, (2 * x.shape[3], 2 * x.shape[4]))
    check("up", up, flat, (11, 7), key="up_to_11x7")
    close(latentsync.sinusoids(torch.tensor([0, 1, 500, 999]), 64), t["out.time_proj_64"], what="time")


@runner("latentsync.ddim")
def latentsync_ddim(meta, t, tmp_path):
    close(latentsync.ALPHAS, t["out.alphas_cumprod"], what="alphas")
    close(latentsync.ALPHAS[:1], t["out.final_alpha_cumprod"], what="the last alpha")
    x, eps = noted(meta, "in.x"), 1.7 * noise("in.eps", tuple(t["out.trajectory_20"].shape[1:]))
    for key, expected in t.items():
        if key.startswith("out.timesteps_"):
            equal(torch.tensor(latentsync.time_steps(len(expected))), expected, key)
        if key.startswith("out.trajectory_"):
            z, states = x, []
            for step in latentsync.time_steps(len(expected)):
                z = latentsync.ddim_step(z, eps, step, len(expected))
                states.append(z)
            close(torch.stack(states), expected, what=key)
    steps, shape = torch.tensor([0, 500, 999]), tuple(t["out.add_noise"].shape)
    x3, eps3 = noise("in.x3", shape), noise("in.eps3", shape)
    close(latentsync.add_noise(x3, eps3, steps), t["out.add_noise"], what="add_noise")
    close(latentsync.remove_noise(x3, eps3, steps), t["out.x0_from_eps"], what="remove_noise")


@runner("latentsync.denoise")
def latentsync_denoise(meta, t, tmp_path):
    c = meta["config"]
    model = load_unet(part_of(meta, t), c["unet"], tmp_path / "unet.pt")
    shape = t["out.latents_0"].shape
    z = noted(meta, "in.z").expand(shape)
    mask = (noted(meta, "in.mask") > 0).float()
    condition = torch.cat([mask, noise("in.masked", tuple(shape)), noise("in.ref", tuple(shape))], 1)
    every = c["deepcache"]["cache_interval"] if c["deepcache"] else 1
    with torch.no_grad():
        states = latentsync.denoise(model, z, condition, noted(meta, "in.audio"), c["steps"], c["guidance"], every)
        for i, z in enumerate(states):
            close(z, t[f"out.latents_{i}"], what=f"latents after step {i}")
    assert i == c["steps"] - 1


def load_ear(state, c, path):
    """A Whisper encoder, written as OpenAI's file."""
    torch.save({"dims": c, "model_state_dict": state}, path)
    config = latentsync.WhisperConfig(c["n_mels"], c["n_audio_ctx"], c["n_audio_state"], c["n_audio_head"],
                                      c["n_audio_layer"])
    model = latentsync.load_whisper(path, config)
    if "encoder.positional_embedding" in state and c["n_audio_state"] >= 64:
        assert replace(latentsync.load_whisper(path, None).config, heads=config.heads) == config
    exported = latentsync.export(model)
    check_export({k: v for k, v in exported.items() if k in state},
                 {k: v for k, v in state.items() if k.startswith("encoder.")})
    return model


@runner("latentsync.whisper_encoder")
def latentsync_whisper_encoder(meta, t, tmp_path):
    model = load_ear(part_of(meta, t), meta["config"], tmp_path / "tiny.pt")
    mel = latentsync.log_mel(t["in.audio"])
    close(mel, t["in.mel"], what="mel")
    mel = F.pad(mel, (0, 2 * meta["config"]["n_audio_ctx"] - mel.shape[1]))
    with torch.no_grad():
        found = model(mel[None])
        close(found.transpose(1, 2)[:, :, meta["rows"]], t["out.embeddings"], what="embeddings")
        close(model.ln_post(found[:, :, -1])[:, meta["rows"]], t["out.final"], what="final")


@runner("latentsync.whisper_features")
def latentsync_whisper_features(meta, t, tmp_path):
    model = load_ear(part_of(meta, t), meta["config"], tmp_path / "tiny.pt")
    sound = t["in.audio"]
    close(thinned(latentsync.log_mel(sound), t["out.mel"]), t["out.mel"], what="mel")
    features = torch.cat(list(model.pieces(sound)))
    assert len(features) == t["out.length"].item() == latentsync.count_rows(len(sound), meta["config"]["n_audio_ctx"])
    close(features[meta["rows"]], t["out.features"], what="features")


@runner("latentsync.whisper_windows")
def latentsync_whisper_windows(meta, t, tmp_path):
    c = meta["config"]
    rows, layers, C = c["feature_frames"], c["layers"] + 1, c["state"]
    grid = torch.meshgrid(1.0 * torch.arange(rows), 0.01 * torch.arange(layers), 1e-4 * torch.arange(C), indexing="ij")
    features, count = sum(grid), latentsync.count_frames(rows, c["fps"])
    assert count == t["out.num_chunks"].item()
    around = c["audio_feat_length"]
    index = [latentsync.window_rows(frame, rows, c["fps"], around) for frame in range(count)]
    equal(torch.tensor(np.stack(index)), t["out.index"], "rows")

    class Ear:
        config = latentsync.WhisperConfig()

        def pieces(self, sound):
            return iter(features.split(5))                                  # in pieces, as long sounds have them
    found = list(latentsync.windows(Ear(), torch.zeros(rows * 320), c["fps"], around))
    assert len(found) == count
    close(found[0], t["out.chunk_first"], what="first")
    close(found[-1], t["out.chunk_last"], what="last")
    for i, which in ((0, "first"), (c["num_frames"] - 1, "last")):
        window = features[latentsync.window_rows(c["start_index"] + i, rows, window=around)].flatten(0, 1)
        close(window, t[f"out.train_window_{which}"], what=f"{which} of a training clip")


def noted_pictures(name, n, h, w):
    """Smooth pictures with some grain, uint8 (n, h, w, 3), as the note of latentsync_affine describes them."""
    base = F.interpolate(noise(name, (n, 3, 7, 7)), (h, w), mode="bicubic", align_corners=False) * 0.5 + 0.5
    grain = 0.5 * noise(f"{name}.fine", (n, 3, h, w)) + 0.5
    return ((0.9 * base + 0.1 * grain).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1)


def close_pictures(found, expected, what, share=0.002):
    """uint8: within 1, on at most this share of the pixels."""
    off = (torch.as_tensor(found).int() - expected.int()).abs()
    assert off.max() <= 1 and (off > 0).any(-1).float().mean() <= share, (
        what, off.max().item(), (off > 0).any(-1).float().mean().item())


@runner("latentsync.affine")
def latentsync_affine(meta, t, tmp_path):
    c = meta["config"]
    align = latentsync.Aligner(c["resolution"])
    assert [*align.canvas][::-1] == c["face_size_wh"]
    close(align.template, t["out.template"], what="template")
    for i, picture in enumerate(noted_pictures("in.images", c["frames"], *c["image"])):
        matrix = align(t["in.landmarks3"][i])
        close(matrix, t["out.matrix"][i], what=f"matrix {i}")
        face = latentsync.warp(picture.permute(2, 0, 1).float(), matrix, align.canvas, 127.0).byte()
        equal_faces(face.permute(1, 2, 0), t["out.face"][i], f"face {i}")
        aligned = latentsync.align_face(picture, matrix, align.canvas, c["resolution"])
        equal_faces(aligned.permute(1, 2, 0), t["out.face_resized"][i], f"resized face {i}")
        res = c["resolution"]
        painted = 0.3 * noise(f"in.face.{i}", (3, res, res)) + t["out.face_resized"][i].permute(2, 0, 1) / 127.5 - 1
        restored = latentsync.paste_back(picture, painted, matrix, align.canvas)
        close_pictures(restored, t["out.restored"][i], f"paste {i}")


@runner("latentsync.pipeline")
def latentsync_pipeline(meta, t, tmp_path):
    c = meta["config"]
    unet = load_unet(part_of(meta, t, "unet."), c["unet"], tmp_path / "unet.pt", c["resolution"])
    unet.config = replace(unet.config, frames=c["num_frames"])
    autoencoder = load_kl(part_of(meta, t, "vae."), c["vae"], tmp_path / "vae.pt")
    ear = load_ear(part_of(meta, t, "whisper."), c["whisper"], tmp_path / "tiny.pt")
    video = list(noted_pictures("in.video", c["video_frames"], *c["image"]))
    align = latentsync.Aligner(c["resolution"])
    frames = [(picture, align(points)) for picture, points in zip(video, t["in.landmarks3"])]
    count = latentsync.count_frames(latentsync.count_rows(len(t["in.audio"])))
    assert count == t["out.num_frames"].item()
    assert int(count / 25 * 16000) == t["out.audio_length"].item() or len(t["in.audio"]) == t["out.audio_length"].item()
    order = list(itertools.islice(itertools.cycle([*range(len(video)), *reversed(range(len(video)))]), count))
    windows = list(latentsync.windows(ear, t["in.audio"]))
    assert len(windows) == count
    latents, decode = [], autoencoder.decode
    autoencoder.decode = lambda z: latents.append(z) or decode(z)
    g = torch.Generator().manual_seed(c["seed"])
    clip = [frames[i] for i in order]
    found = list(latentsync.lipsync(unet, autoencoder, clip, windows, g, steps=c["steps"], cfg=c["guidance"]))
    atol = 1e-4 if same_rounding() else 1e-2
    close(torch.cat(latents), t["out.latents"], atol, "latents")
    faces = torch.stack([dubbed.generated for dubbed in found])
    close(F.avg_pool2d(faces, faces.shape[-1] // t["out.faces_mean8"].shape[-1]), t["out.faces_mean8"], atol, "faces")
    for row, expected in zip(meta["rows"], t["out.frames"]):
        close_pictures(found[row].picture, expected, f"frame {row}", share=0.002 if same_rounding() else 0.01)


def load_videomae(state, c, path):
    """A VideoMAE, written as the release would be, under both names of its weights."""
    config = videomae.VideoMAEConfig(c.get("image", 224), c.get("patch", 14), c.get("table_frames", 16),
                                      c.get("tubelet", 2), len(state["fc_norm.weight"]),
                                      sum(k.endswith("q_bias") for k in state), c.get("heads", 4),
                                      len(state["blocks.0.mlp.fc1.weight"]), len(state["head.weight"]))
    for name in ("model", "module"):
        torch.save({name: state}, path)
        model = videomae.load(path, config)
    check_export(videomae.export(model), state)
    return model


@runner("latentsync.trepa")
def latentsync_trepa(meta, t, tmp_path):
    c, state = meta["config"], fill_state_dict(meta["manifest"])
    model = load_videomae(state, c, tmp_path / "videomae.pth")
    assert model.config.hidden == int(c["width"] * c["mlp_ratio"])
    shape = tuple(map(int, re.search(r"noise\(\., \(([\d, ]+)\)\)", meta["note"])[1].split(",")))
    fake, real = noise("in.fake", shape).requires_grad_(), noise("in.real", shape)
    close(model.features(real), t["out.feature_real"], what="features")
    loss = latentsync.trepa(model, fake, real)
    torch.testing.assert_close(loss[None], t["out.loss"], rtol=1e-5, atol=0)
    loss.backward()
    cells = 1000 * F.avg_pool3d(fake.grad, (1, 8, 8))       # how it is stored follows from the numbers, not the note
    close(cells, t["out.grad_fake"], atol=1e-3 * t["out.grad_fake"].abs().max().item(), what="gradient")


@runner("latentsync.losses")
def latentsync_losses(meta, t, tmp_path):
    c, weights = meta["config"], meta["config"]["weights"]
    side, frames, steps = c["resolution"], c["frames"], torch.tensor(c["timesteps"])
    unet = load_unet(part_of(meta, t, "unet."), c["unet"], tmp_path / "unet.pt", side)
    autoencoder = load_kl(part_of(meta, t, "vae."), c["vae"], tmp_path / "vae.pt").requires_grad_(False)
    true, other = (noise(name, (len(steps), frames, 3, side, side)) for name in ("in.gt", "in.ref"))
    audio = noise("in.audio", (len(steps), frames, 10, c["unet"]["audio_dim"]))
    mel = 2 * noise("in.mel", (len(steps), 1, 80, syncnet.Config((), (), frames).columns))
    mask = latentsync.face_mask(side)
    to_clips = lambda x: x.unflatten(0, (len(steps), frames)).transpose(1, 2)
    with torch.no_grad():
        z = to_clips(autoencoder.encode(true.flatten(0, 1)).sample())
        flat = true.flatten(0, 1), other.flatten(0, 1)
        condition = to_clips(latentsync.encode_condition(autoencoder, flat[0] * mask, flat[1], mask, None))
    own, common = (1.7 * noise(name, tuple(z.shape)) for name in ("in.noise_ind", "in.noise_shared"))
    alpha = c["alpha"] if c["mixed_noise"] else 0.0
    eps = (own + alpha * common[:, :, :1]) / (1 + alpha**2) ** 0.5 if alpha else common[:, :, :1].expand_as(z)
    assert not alpha or torch.equal(eps, mixed(own, common[:, :, :1], alpha)), "mixed noise"
    stage = next(k for k, parts in latentsync.STAGES.items() if set(parts) == set(c["trainable"] or [""]))
    unet.freeze(stage)
    recon, x0 = unet.loss(z, condition, audio, t=steps, noise=eps)
    loss = weights["recon"] * recon
    torch.testing.assert_close(recon[None], t["out.loss_recon"], rtol=1e-5, atol=0)
    with torch.no_grad():
        noisy = latentsync.add_noise(z, eps, steps)
        close(unet(torch.cat([noisy, condition], 1), steps, audio), t["out.pred_noise"], what="noise")
        # An error in the noise is up to 2.6 times as large in x0, at step 640. The tolerance grows by the same factor.
        room = (1 / latentsync.ALPHAS[steps] - 1).sqrt().clamp(min=1).view(-1, 1, 1, 1, 1)
        close(x0 / room, t["out.x0"] / room, what="x0")
    if weights["sync"] or weights["trepa"]:
        torch.save({"state_dict": part_of(meta, t, "syncnet.")}, tmp_path / "syncnet.pt")
        picture = (c["sync_resolution"] // 2, c["sync_resolution"])
        sync = syncnet.load(tmp_path / "syncnet.pt", stable_config(c["syncnet"], picture)).requires_grad_(False)
        eye = load_videomae(part_of(meta, t, "videomae."), c.get("videomae", {}), tmp_path / "videomae.pth")
        eye.requires_grad_(False)
        totals, norms = [], []
        for checkpointing in (False, True):                                 # recomputation must change nothing
            unet.checkpointing = checkpointing
            recon, x0 = unet.loss(z, condition, audio, t=steps, noise=eps)
            judge = latentsync.Supervision(
                autoencoder, sync, eye, frames=frames, sync_weight=weights["sync"], trepa_weight=weights["trepa"],
                checkpointing=checkpointing)
            total, parts = judge(x0, true, mel)
            for name in ("sync", "trepa"):
                torch.testing.assert_close(parts[name][None], t[f"out.loss_{name}"], rtol=1e-5, atol=0)
            totals.append(weights["recon"] * recon + total)
            unet.zero_grad()
            totals[-1].backward()
            norms.append({n: p.grad.norm().item() for n, p in unet.named_parameters() if p.grad is not None})
        assert norms[0] == pytest.approx(norms[1], rel=1e-4, abs=1e-8)
        loss = totals[0]
        pixels = judge.decode(x0)
        close(F.avg_pool2d(pixels.flatten(0, 1), 8), t["out.pixels_mean8"], what="pixels")
        lower = (pixels - true)[:, :, :, side // 2:].abs().mean()
        torch.testing.assert_close(lower[None], t["out.lower_half_l1"], rtol=1e-5, atol=0)
    else:
        loss.backward()
    torch.testing.assert_close(loss[None], t["out.loss"], rtol=1e-5, atol=0)
    expected = {k.removeprefix("out.grad_norm.") for k in t if k.startswith("out.grad_norm.")}
    state = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in unet.named_parameters()}
    unet.load_state_dict(state, strict=False)                               # export() then gives them official names
    found = {k: v for k, v in latentsync.export(unet).items() if k in expected}
    check_norms(found, t, "out.grad_norm.")


def mixed(own, common, share):
    """latentsync.mixed_noise for given draws."""
    draws = iter([own, common])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: next(draws))
        return latentsync.mixed_noise(own.shape, share=share)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.safetensors")), ids=lambda path: path.stem)
def test_parity(path, tmp_path):
    meta, t = load_case(path)
    check_case(meta, t, tmp_path)


def check_case(meta, t, tmp_path):
    """Run a case. A kind without a runner fails."""
    assert meta["kind"] in RUNNERS, f"no runner for the kind {meta['kind']}: write one"
    RUNNERS[meta["kind"]](meta, t, tmp_path)


def test_cases_describe_themselves(tmp_path):
    """Strides, names, sizes and seeds come from the case. A kind without a runner, or an unknown full case, fails."""
    out = torch.arange(60).view(3, 20)
    assert torch.equal(thinned(out, torch.zeros(1, 7)), out[:1, ::3])
    meta = {"kind": "var.other", "note": "x = 3 noise('in.features7', [2, 5]); drop 0.25 after seed(12)"}
    assert torch.equal(noted(meta, r"in.features\d*"), 3 * noise("in.features7", (2, 5)))
    assert said(meta, r"drop ([\d.]+) after seed\((\d+)\)") == [0.25, 12]
    with pytest.raises(AssertionError, match="no runner for the kind var.other"):
        check_case(meta, {}, tmp_path)
    with pytest.raises(AssertionError, match="are the entries of no known kind"):
        check_case(meta | {"kind": "llamagen.full"}, {"out.unknown": 0}, tmp_path)


def test_a_full_case_runs_as_the_small_one(tmp_path):
    meta, t = load_case(Path(__file__).parent / "parity" / "llamagen_c2i_greedy.safetensors")
    check_case(meta | {"kind": "llamagen.full"}, t, tmp_path)
    t["out.tokens.0"] = t["out.tokens.0"] + 1
    with pytest.raises(AssertionError, match="tokens of run 0"):
        check_case(meta | {"kind": "llamagen.full"}, t, tmp_path)
