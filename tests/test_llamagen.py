"""LlamaGen and its tokenizer: what must hold whatever the weights."""
import argparse
import math
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import llamagen
import vq
from conftest import CLASS_CONFIG, T5_CONFIG, TEXT_CONFIG, randn, tiny_llamagen, tiny_single, tiny_tokenizer
from lib import losses
from lib.graphs import captured
from lib.text import T5Encoder, clean_caption
from test_var import CAPTURES, Rerun, check_no_synchronisation, check_nothing_waits
from triton_ops import backend

LABELS = torch.tensor([0, 3])
KINDS = pytest.mark.parametrize("changes", [{}, {"text": True}, {"heads": 4, "kv_heads": 2}], ids=["class", "text", "gqa"])


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def conditions(model):
    """Two classes, or two texts of which one is padded."""
    if not model.config.text_width:
        return LABELS, None
    return llamagen.left_pad([randn(6, 128, seed=3), randn(2, 128, seed=4)], model.config.text_slots)


def steps_of(model, *arguments, **options):
    """A list of the Steps of model.generate, whose logits a captured model overwrites."""
    steps = []
    model.generate(*arguments, on_step=lambda step: steps.append(step._replace(logits=step.logits.clone())), **options)
    return steps


@KINDS
@pytest.mark.parametrize("as_captured", [False, True], ids=["pos int", "pos tensor"])
def test_cached_sampling_equals_teacher_forcing(changes, as_captured):
    model = tiny_llamagen(**changes)
    cond, text_mask = conditions(model)
    drawing = captured(model, Rerun) if as_captured else model
    steps = steps_of(drawing, cond, text_mask, cfg=2.0, generator=torch.Generator().manual_seed(0))
    tokens = torch.stack([step.tokens for step in steps], 1)
    forced = [model(c, tokens[:, :-1], text_mask) for c in (cond, model.null_condition(cond))]
    torch.testing.assert_close(torch.stack([s.logits for s in steps], 1), torch.cat(forced), atol=2e-5, rtol=1e-5)
    assert torch.cat(forced).std() > 0.1 and not torch.allclose(*forced)    # the comparison is not between zeros
    assert not hasattr(model, "cache") and not list(model.blocks.buffers())


@KINDS
@pytest.mark.parametrize("options", [dict(top_k=1), dict(temperature=0.0), dict(top_k=9, top_p=0.9, temperature=1.3),
                                     dict(cfg_interval=3)], ids=str)
def test_a_mixed_batch_is_its_rows_alone(changes, options):
    """Other classes or texts, other guidance, other seeds, in one batch."""
    model = tiny_llamagen(**changes)
    cond, text_mask = conditions(model)
    both = model.generate(cond, text_mask, cfg=torch.tensor([1.0, 4.0]), generator=generators(5, 6), **options)
    part = lambda i: None if text_mask is None else text_mask[i:i + 1]
    alone = [model.generate(cond[i:i + 1], part(i), cfg=cfg, generator=generators(seed), **options)
             for i, cfg, seed in ((0, 1.0, 5), (1, 4.0, 6))]
    assert torch.equal(both, torch.cat(alone)) and not torch.equal(both[0], both[1])


def test_seeds_guidance_and_its_end_matter():
    model, tokenizer = tiny_llamagen(), tiny_single()
    draw = lambda seed=0, **options: model.sample(tokenizer, LABELS, **dict(cfg=3.0) | options,
                                                  generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(), draw()) and not torch.equal(draw(), draw(1)) and not torch.equal(draw(), draw(cfg=1.0))
    assert draw().shape == (2, 3, 16, 16) and 0 <= draw().min() and draw().max() <= 1
    assert draw(size=8).shape == (2, 3, 8, 8)
    rows = [len(step.logits) for step in steps_of(model, LABELS, cfg=3.0, cfg_interval=3)]
    assert rows == [4] * 5 + [2] * 11                                       # cfg_interval + 2 tokens are guided
    assert [len(step.logits) for step in steps_of(model, LABELS, cfg=0.5)] == [2] * 16
    tokens = [model.generate(LABELS, generator=generators(*seeds)) for seeds in ((1, 2), (2, 1))]
    assert not torch.equal(*tokens)


def test_filmstrip_follows_the_raster_and_ends_with_the_picture():
    model, tokenizer = tiny_llamagen(), tiny_single()
    frames = model.sample(tokenizer, LABELS, generator=generators(1, 2), progress_frames=4)
    assert torch.equal(frames[-1], model.sample(tokenizer, LABELS, generator=generators(1, 2)))
    for k, frame in enumerate(frames[:-1], 1):                              # a row of 4 x 4 pixels each at a time
        assert (frame[:, :, 4 * k:] == 0.5).all() and (frame[:, :, :4 * k] != 0.5).any()


def test_padding_holds_nothing():
    """What stands in padded slots does not matter."""
    model, (text, text_mask) = tiny_llamagen(text=True), llamagen.left_pad([randn(2, 128)], 6)
    tokens = torch.randint(32, (1, 15), generator=torch.Generator().manual_seed(0))
    logits = model(text, tokens, text_mask)
    junk = torch.where(text_mask[..., None], text, randn(1, 6, 128, seed=9))
    torch.testing.assert_close(model(junk, tokens, text_mask), logits)
    assert not torch.allclose(model(-text, tokens, text_mask), logits)
    long, mask = llamagen.left_pad([randn(9, 128)], 6)
    assert mask.all() and torch.equal(long[0], randn(9, 128)[:6])           # the first six of nine remain


@CAPTURES
@pytest.mark.parametrize("text", [False, True])
def test_captured_steps_draw_the_same_pictures(text, device, call):
    """One capture of `decode_one` serves all positions, conditions, seeds and guidance scales of a batch size."""
    model, tokenizer = tiny_llamagen(text=text).to(device), tiny_single().to(device)
    fast, fast_tokenizer = captured(model, call), captured(tokenizer, call)
    cond, text_mask = conditions(model)
    for _ in range(2):
        for order, cfg in (([0, 1], 3.0), ([1, 0], 1.5), ([0, 1], torch.tensor([1.0, 5.0])), ([1], 2.0)):
            for options in (dict(), dict(cfg_interval=2)):
                found, expected = (m.sample(
                    t, cond[order], text_mask if text_mask is None else text_mask[order], cfg=cfg, **options,
                    generator=[torch.Generator(device).manual_seed(i) for i in order])
                    for m, t in ((fast, fast_tokenizer), (model, tokenizer)))
                torch.testing.assert_close(found, expected, atol=1e-4 * (device == "cuda"), rtol=0)
    assert len(fast_tokenizer.decode.graphs) == 2                           # per batch size


def test_nothing_in_a_loop_waits_for_the_device():
    for options in (dict(cfg=3.0), dict(cfg=3.0, cfg_interval=2, top_k=3), dict(temperature=0.0)):
        check_nothing_waits(tiny_llamagen(), lambda model: model.sample(tiny_single(), LABELS, **options))


def test_few_rows_are_multiplied_from_the_left():
    layer = llamagen.Linear(24, 40)
    for shape in ((1, 1, 24), (2, 1, 24), (3, 5, 24), (2, 17, 24)):
        with torch.no_grad():
            torch.testing.assert_close(layer(randn(*shape)), F.linear(randn(*shape), layer.weight))


def test_bits_per_token_are_the_cross_entropy():
    model, tokens = tiny_llamagen(), torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    bits = model.bits_per_token(LABELS, tokens)
    assert bits.shape == (2, 16) and bits.min() >= 0
    torch.testing.assert_close(bits.mean() * math.log(2), model.loss(LABELS, tokens)[0])
    drawn = model.generate(LABELS, generator=generators(3, 4))
    assert model.bits_per_token(LABELS, drawn).mean() < bits.mean()               # its own pictures are likelier
    with pytest.raises(ValueError, match=r"tokens 0 \.\. 99, but the model knows 32: they are of another codebook"):
        model.bits_per_token(LABELS, torch.tensor([[0, 99]]))


def test_training_draws_from_the_generator_only():
    tokens = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    loss = lambda model, seed: model.train().loss(LABELS, tokens, generator=torch.Generator().manual_seed(seed))[0].item()
    for changes in ({}, {"drop_path": 0.5}, {"dropout": 0.0, "cond_drop": 0.5}):
        model, state = tiny_llamagen(**changes), torch.get_rng_state()
        assert loss(model, 0) == loss(model, 0) and len({loss(model, seed) for seed in range(8)}) > 1
        assert torch.equal(state, torch.get_rng_state())
    assert model.eval().loss(LABELS, tokens)[0].item() == loss(tiny_llamagen(dropout=0.0, cond_drop=0.0), 5)


def test_pictures_that_do_not_count():
    model, tokens = tiny_llamagen(), torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    first = model.loss(LABELS[:1], tokens[:1])[0]
    torch.testing.assert_close(model.loss(LABELS, tokens, valid=torch.tensor([1, 0]))[0], first)
    assert model.loss(LABELS, tokens, valid=torch.tensor([0, 0]))[0] == 0


def test_initial_loss_is_that_of_a_uniform_guess():
    model = llamagen.LlamaGen(CLASS_CONFIG).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    tokens = torch.randint(32, (2, 16))
    assert model.loss(LABELS, tokens)[0].item() == pytest.approx(math.log(32))
    assert model.bits_per_token(LABELS, tokens).mean().item() == pytest.approx(5)


@pytest.mark.parametrize("name, millions, side", [("c2i_B_256", 110.9, 16), ("c2i_L_384", 342.9, 24), ("c2i_XL_384", 774.7, 24),
                                                  ("c2i_XXL_384", 1411, 24), ("c2i_3B_384", 3097, 24),
                                                  ("t2i_XL_stage2_512", 777.7, 32), ("llamagen_B", 110.9, 16)])
def test_released_sizes(name, millions, side):
    with torch.device("meta"):
        model = llamagen.LlamaGen(llamagen.CONFIGS[name])
    counted = sum(p.numel() for p in model.parameters())
    assert counted / 1e6 == pytest.approx(millions, rel=1e-3) and model.config.side == side


@pytest.mark.parametrize("name, parameters, entries", [("vq_ds16_c2i", 71_883_403, 344), ("vq_ds8_c2i", 70_109_835, 300)])
def test_released_tokenizer_sizes(name, parameters, entries):
    model = vq.build(vq.VQVAE, vq.CONFIGS[name])
    assert sum(p.numel() for p in model.parameters()) == parameters and len(vq.export(model)) == entries
    assert vq.export(model)["quantize.codebook_used"].shape == (65536,)


@pytest.mark.parametrize("changes", [{}, {"text": True}, {"heads": 4, "kv_heads": 2}], ids=["class", "text", "gqa"])
def test_files_of_every_kind(changes, tmp_path):
    """As DDP, DeepSpeed and FSDP leave them, with what else lies in a training checkpoint, and ours."""
    model = tiny_llamagen(**changes)
    state = llamagen.export(model)
    rest = {"optimizer": {"state": {}}, "steps": 3}
    stray = {"freqs_cis": torch.zeros(model.config.slots + 16, 8, 2)}
    files = {"ddp.pt": {"model": state} | rest, "deepspeed.pt": {"module": state} | rest, "flat.pth": state | stray,
             "args.pt": {"model": state, "args": argparse.Namespace(gpt_model="GPT-B")}}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        again = llamagen.load(tmp_path / name, side=None if name == "flat.pth" else 4, heads=model.config.heads)
        assert again.config == model.config
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    llamagen.save(model, tmp_path / "ours.safetensors")
    assert llamagen.load(tmp_path / "ours.safetensors").config == model.config
    assert llamagen.load(tmp_path / "ours.safetensors", side=8).config.side == 8


def test_a_text_encoder_travels_along(tmp_path):
    model = tiny_llamagen(text=True, t5=T5Encoder(T5_CONFIG))
    llamagen.save(model, tmp_path / "a.safetensors", dtype=torch.float16)
    again = llamagen.load(tmp_path / "a.safetensors", text_encoder=T5Encoder(T5_CONFIG), dtype=torch.bfloat16)
    assert again.text_encoder.embed.weight.dtype == torch.float32 and again.head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(again.text_encoder.embed.weight, model.text_encoder.embed.weight, atol=2e-3, rtol=1e-3)
    assert llamagen.load(tmp_path / "a.safetensors").text_encoder is None   # features come from elsewhere then
    assert not any(k.startswith("text_encoder") for k in llamagen.export(model))


def test_the_side_comes_from_the_name_or_must_be_given(tmp_path, monkeypatch):
    """c2i_B_256.pt and c2i_B_384.pt have tensors of the same shapes."""
    small, large = replace(CLASS_CONFIG, side=4), replace(CLASS_CONFIG, side=6)
    monkeypatch.setattr(llamagen, "CONFIGS", {"c2i_B_256": small, "c2i_B_384": large})
    state = {"model": llamagen.export(tiny_llamagen())}
    for name, side in (("c2i_B_256.pt", 4), ("c2i_B_384.pt", 6)):
        torch.save(state, tmp_path / name)
        assert llamagen.load(tmp_path / name).config == replace(CLASS_CONFIG, side=side)
    torch.save(state, tmp_path / "mine.pt")
    with pytest.raises(vq.CheckpointError, match=r"mine.pt: the size .* is in no tensor: pass side=.* \(4, 6\)"):
        llamagen.load(tmp_path / "mine.pt")


def test_half_precision_stays_close():
    tokens = torch.randint(32, (2, 15), generator=torch.Generator().manual_seed(0))
    exact = tiny_llamagen()(LABELS, tokens)
    half = llamagen.set_dtype(tiny_llamagen(), torch.bfloat16)(LABELS, tokens)
    assert half.dtype == torch.float32 and (half - exact).norm() / exact.norm() < 0.03


def test_what_does_not_fit_is_explained(tmp_path):
    model, text = tiny_llamagen(), tiny_llamagen(text=True)
    state = llamagen.export(model)
    cases = {
        "missing.pt": ({k: v for k, v in state.items() if k != "norm.weight"}, "1 missing: norm.weight"),
        "gate.pt": ({k: v for k, v in state.items() if k != "layers.1.feed_forward.w3.weight"},
                    "1 missing: blocks.1.ffn.fc1.weight; 1 unexpected: blocks.1.ffn.w1.weight"),
        "vq.pt": (vq.export(tiny_single()), "not a LlamaGen transformer: it has no 'tok_embeddings.weight'"),
    }
    for name, (content, message) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(vq.CheckpointError, match=f"{name}: .*{message}"):
            llamagen.load(tmp_path / name, side=4, heads=2)
    with pytest.raises(ValueError, match=r"conditioned on classes \(B,\), not on a tensor \(2, 6, 128\)"):
        model.sample(tiny_single(), randn(2, 6, 128))
    with pytest.raises(ValueError, match=r"conditioned on text features \(B, 6, 128\), not on a tensor \(2,\)"):
        text(LABELS, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"the mask is \(2, 5\), expected \(2, 6\): one entry per slot"):
        text.generate(randn(2, 6, 128), torch.ones(2, 5, dtype=torch.bool))
    for tokenizer, message in ((tiny_single(vocab_size=64), "has 64 codes, but the model draws maps of 32"),
                               (tiny_tokenizer(), "has tokens of several scales")):
        with pytest.raises(ValueError, match=message):
            model.check_pair(tokenizer)
    model.check_pair(tiny_single())


def test_cleaning_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match="ftfy"):
        clean_caption("a cat")


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer


def test_codes_are_unit_vectors_and_any_size_will_do():
    tokenizer = tiny_single()
    with torch.no_grad():
        tokenizer.quantize.codebook *= 3                                    # lengths do not matter
    image = randn(2, 3, 24, 40)
    tokens, = tokenizer.tokenize(image)
    assert tokens.shape == (2, 60)
    f_hat = tokenizer.quantize.embed(tokens, (6, 10))
    torch.testing.assert_close(f_hat.norm(dim=1), torch.ones(2, 6, 10))
    z = F.normalize(tokenizer.encode(image), dim=1)
    best = torch.einsum("bchw,vc->bvhw", z, F.normalize(tokenizer.quantize.codebook, dim=1)).argmax(1)
    assert torch.equal(tokens, best.flatten(1))
    torch.testing.assert_close(tokenizer.reconstruct(image), tokenizer.detokenize([tokens], [(6, 10)]))
    assert tokenizer.detokenize(tokenizer.tokenize(randn(1, 3, 24, 24))).shape == (1, 3, 24, 24)    # squares of any size
    with pytest.raises(ValueError, match="60 tokens are no map of 7x7: pass patch_nums"):
        tokenizer.detokenize([tokens])


def test_usage_counts_the_last_65536_indices():
    quantizer = tiny_single().quantize.train()
    used = lambda f: quantizer(f)[2].item()
    assert used(quantizer.embed(torch.arange(8)[None], (2, 4))) == 100 * 8 / 32
    assert used(quantizer.embed(torch.full((1, 8), 9), (2, 4))) == 100 * 9 / 32     # the history remembers
    assert quantizer.recent[-8:].tolist() == [9] * 8
    assert used(quantizer.embed(torch.full((1, 70000), 3), (250, 280))) == 100 / 32     # more than it holds
    assert quantizer.steps_unused[[3, 0, 31]].tolist() == [0, 2, 3]


def test_gradients_of_the_single_scale_quantizer():
    quantizer, f = tiny_single().quantize, randn(2, 8, 4, 4).requires_grad_()
    out, loss, _ = quantizer(f)
    grad, = torch.autograd.grad(out.sum(), f, retain_graph=True)
    expected, = torch.autograd.grad(F.normalize(f, dim=1).sum(), f)         # straight through to the unit vectors
    torch.testing.assert_close(grad, expected)
    codebook, = torch.autograd.grad(loss, quantizer.codebook)
    used = torch.zeros(32, dtype=torch.bool)
    used[quantizer.nearest(f).flatten()] = True
    assert codebook[used].any() and not codebook[~used].any()
    quantizer.config = replace(quantizer.config, entropy=0.1)
    assert torch.autograd.grad(quantizer(f)[1], quantizer.codebook)[0][~used].any()     # entropy reaches all of them


def test_discriminators_and_their_losses():
    discriminator = losses.StyleDiscriminator(32)
    discriminator.init_weights(torch.Generator().manual_seed(0))
    assert discriminator(randn(2, 3, 32, 32)).shape == (2, 1)
    keys = set(discriminator.state_dict())
    assert {"blocks.0.weight", "blocks.2.conv_res.weight", "blocks.2.net.2.bias", "blocks.4.downsample.0.f",
            "blocks.4.downsample.1.weight", "final_conv.0.weight", "final_linear.2.weight"} <= keys
    torch.testing.assert_close(losses.Blur()(torch.ones(1, 2, 5, 5)), torch.ones(1, 2, 5, 5))
    with pytest.raises(ValueError, match="8, 16, ... 1024 pixels, not 48"):
        losses.StyleDiscriminator(48)
    real, fake = randn(4, 1).requires_grad_(), randn(4, 1, seed=1).requires_grad_()
    slopes = lambda name: torch.autograd.grad(losses.GAN_LOSSES[name][0](real, fake), (real, fake))
    for name in ("hinge", "vanilla", "non-saturating"):                     # up with the real, down with the fake
        up, down = slopes(name)
        assert (up <= 0).all() and (down >= 0).all() and up.any() and down.any()
    torch.testing.assert_close(slopes("vanilla"), slopes("non-saturating"))
    up, down = slopes("non-saturating-swapped")
    assert not down.any() and up.unique().numel() == 1                      # the original's slip
    for name in losses.GAN_LOSSES:
        assert torch.autograd.grad(losses.GAN_LOSSES[name][1](fake), fake)[0].max() < 0


# ----------------------------------------------------------------------------------------------------------------------
# Kernels


@pytest.mark.kernel
@pytest.mark.parametrize("text", [False, True])
def test_kernels_draw_and_learn_what_torch_does(text):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_llamagen(text=text).to(device)
    cond, text_mask = (t if t is None else t.to(device) for t in conditions(model))
    tokens = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0)).to(device)

    def numbers(model_or_twin):
        logits = [step.logits for step in steps_of(model_or_twin, cond, text_mask, cfg=2.0, top_k=1)[:4]]
        model.zero_grad()
        model.loss(cond, tokens, text_mask)[0].backward()
        return [*logits, *(p.grad for p in model.parameters() if p.grad is not None)]
    with backend("torch"):
        expected = numbers(model)
    with backend("triton"):
        for mine, theirs in zip(numbers(captured(model, Rerun)), expected):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("text", [False, True])
def test_cuda_draws_what_the_cpu_does(text):
    model = tiny_llamagen(text=text)
    here = model.generate(*conditions(model), cfg=3.0, top_k=1)
    assert torch.equal(model.cuda().generate(*conditions(model), cfg=3.0, top_k=1).cpu(), here)


@pytest.mark.gpu
def test_no_synchronisation_on_cuda():
    check_no_synchronisation(tiny_llamagen(), tiny_single())
