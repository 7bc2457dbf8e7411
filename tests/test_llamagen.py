"""LlamaGen and its tokenizer: what they alone promise, beyond the contract of test_transformers.py."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import llamagen
import vq
from helpers import (CLASS_CONFIG, T5_CONFIG, generators, randn, steps_of, tiny_llamagen, tiny_single, tiny_tokenizer)
from lib.text import T5Encoder

LABELS = torch.tensor([0, 3])
TOKENS = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))


def test_guidance_doubles_the_rows_until_its_interval_ends():
    model, tokenizer = tiny_llamagen(), tiny_single()
    for options, expected in ((dict(cfg=3.0), [4] * 16), (dict(cfg=3.0, cfg_interval=3), [4] * 5 + [2] * 11),
                              (dict(cfg=0.5), [2] * 16)):                   # cfg_interval + 2 tokens are guided
        assert [len(step.logits) for step in steps_of(model, tokenizer, LABELS, **options)] == expected


def test_pictures_are_resized_as_for_the_evaluation_of_the_authors():
    assert tiny_llamagen().sample(tiny_single(), LABELS, size=8).shape == (2, 3, 8, 8)


def test_a_filmstrip_follows_the_raster():
    frames = tiny_llamagen().sample(tiny_single(), LABELS, generator=generators(1, 2), progress_frames=4)
    for k, frame in enumerate(frames[:-1], 1):                              # a row of 4 x 4 pixels each at a time
        assert (frame[:, :, 4 * k:] == 0.5).all() and (frame[:, :, :4 * k] != 0.5).any()


def test_padded_slots_do_not_matter():
    model, tokens = tiny_llamagen(text=True), TOKENS[:1, :15]
    text, text_mask = llamagen.left_pad([randn(2, 128)], 6)
    logits = model(text, tokens, text_mask)
    noisy_padding = torch.where(text_mask[..., None], text, randn(1, 6, 128, seed=9))
    torch.testing.assert_close(model(noisy_padding, tokens, text_mask), logits)
    assert not torch.allclose(model(-text, tokens, text_mask), logits)


def test_long_texts_are_cut():
    long, mask = llamagen.left_pad([randn(9, 128)], 6)
    assert mask.all() and torch.equal(long[0], randn(9, 128)[:6])           # the first six of nine remain


def test_bits_per_token_are_the_cross_entropy():
    model = tiny_llamagen()
    bits = model.bits_per_token(LABELS, TOKENS)
    assert bits.shape == (2, 16) and bits.min() >= 0
    torch.testing.assert_close(bits.mean() * math.log(2), model.loss(LABELS, TOKENS)[0])
    drawn = model.generate(LABELS, generator=generators(3, 4))
    assert model.bits_per_token(LABELS, drawn).mean() < bits.mean()         # its own pictures are likelier
    fresh = llamagen.LlamaGen(CLASS_CONFIG).eval()
    fresh.init_weights(torch.Generator().manual_seed(0))
    assert fresh.bits_per_token(LABELS, TOKENS).mean().item() == pytest.approx(math.log2(32))
    with pytest.raises(ValueError, match=r"tokens 0 \.\. 99, but the model knows 32: they are of another codebook"):
        model.bits_per_token(LABELS, torch.tensor([[0, 99]]))


def test_the_loss_ignores_pictures_that_are_not_valid():
    model = tiny_llamagen()
    first = model.loss(LABELS[:1], TOKENS[:1])[0]
    torch.testing.assert_close(model.loss(LABELS, TOKENS, valid=torch.tensor([1, 0]))[0], first)
    assert model.loss(LABELS, TOKENS, valid=torch.tensor([0, 0]))[0] == 0


def test_sides_of_the_released_models():
    sides = {"c2i_B_256": 16, "c2i_L_384": 24, "c2i_XL_384": 24, "c2i_XXL_384": 24, "c2i_3B_384": 24,
             "t2i_XL_stage2_512": 32, "llamagen_B": 16}
    assert {name: llamagen.CONFIGS[name].side for name in sides} == sides


@pytest.mark.parametrize("name, parameters, entries", [("vq_ds16_c2i", 71_883_403, 344),
                                                       ("vq_ds8_c2i", 70_109_835, 300)])
def test_released_tokenizer_sizes(name, parameters, entries):
    model = vq.build(vq.VQVAE, vq.CONFIGS[name])
    assert sum(p.numel() for p in model.parameters()) == parameters and len(vq.export(model)) == entries
    assert vq.export(model)["quantize.codebook_used"].shape == (65536,)


def test_a_text_encoder_travels_along(tmp_path):
    model = tiny_llamagen(text=True, t5=T5Encoder(T5_CONFIG))
    llamagen.save(model, tmp_path / "a.safetensors", dtype=torch.float16)
    again = llamagen.load(tmp_path / "a.safetensors", text_encoder=T5Encoder(T5_CONFIG), dtype=torch.bfloat16)
    assert again.text_encoder.embed.weight.dtype == torch.float32 and again.head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(again.text_encoder.embed.weight, model.text_encoder.embed.weight, atol=2e-3, rtol=1e-3)
    assert llamagen.load(tmp_path / "a.safetensors").text_encoder is None   # features come from elsewhere then
    assert not any(k.startswith("text_encoder") for k in llamagen.export(model))
    assert llamagen.load(tmp_path / "a.safetensors", side=8).config.side == 8       # for pictures of another size


def test_the_side_comes_from_the_name_or_must_be_given(tmp_path, monkeypatch):
    """c2i_B_256.pt and c2i_B_384.pt have tensors of the same shapes."""
    small, large = replace(CLASS_CONFIG, side=4), replace(CLASS_CONFIG, side=6)
    monkeypatch.setattr(llamagen, "CONFIGS", {"c2i_B_256": small, "c2i_B_384": large})
    state = {"model": llamagen.export(tiny_llamagen())}
    for name, side in (("c2i_B_256.pt", 16), ("c2i_B_384.pt", 24)):
        torch.save(state, tmp_path / name)
        assert llamagen.load(tmp_path / name).config == replace(CLASS_CONFIG, side=side)
    torch.save(state, tmp_path / "mine.pt")
    with pytest.raises(vq.CheckpointError, match=r"mine.pt: neither the file nor its name tells .* \(64 or 96\)"):
        llamagen.load(tmp_path / "mine.pt")


def test_checkpoints_that_do_not_fit_are_explained(tmp_path):
    state = llamagen.export(tiny_llamagen())
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


def test_conditions_and_tokenizers_that_do_not_fit_are_explained():
    model, text = tiny_llamagen(), tiny_llamagen(text=True)
    with pytest.raises(ValueError, match=r"conditioned on classes \(B,\), not on a tensor \(2, 6, 128\)"):
        model.sample(tiny_single(), randn(2, 6, 128))
    with pytest.raises(ValueError, match=r"conditioned on text features \(B, 6, 128\), not on a tensor \(2,\)"):
        text(LABELS, TOKENS[:, :3])
    with pytest.raises(ValueError, match=r"the mask is \(2, 5\), expected \(2, 6\): one entry per slot"):
        text.generate(randn(2, 6, 128), torch.ones(2, 5, dtype=torch.bool))
    for tokenizer, message in ((tiny_single(vocab_size=64), "has 64 codes, but this model draws maps of 32"),
                               (tiny_tokenizer(), "has tokens of several scales")):
        with pytest.raises(ValueError, match=message):
            model.check_pair(tokenizer)
    model.check_pair(tiny_single())
