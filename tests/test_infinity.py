"""Infinity: what this model alone promises, beyond the contract of test_transformers.py; bits, T5, and loading."""

import pytest
import torch
import torch.nn.functional as F

import infinity
import vq
from helpers import SCALES, generators, randn, shards, steps_of, tiny_bits, tiny_infinity
from lib.text import load_infinity
from triton_ops import filter_logits


def texts(B=2, T=5):
    return randn(B, T, 128, seed=3)


def images(model, *arguments, **options):
    return model.sample(*arguments, **dict(scales=SCALES, tau=1.0, top_p=0.0, cfg=2.0) | options)


@pytest.mark.parametrize("patchify", [False, True])
def test_drawn_bits_add_up_to_f_hat_and_the_first_scales_alone_have_the_same_logits(patchify):
    model, tokenizer = tiny_infinity(bits=24 if patchify else 6, patchify=patchify), tiny_bits()
    scales = SCALES[:2] if patchify else SCALES
    steps = steps_of(model, tokenizer, texts(), scales=scales, generator=generators(0, 1))
    sizes = infinity.tokenizer_scales(scales, patchify)
    sums = tokenizer.quantize.partial_sums([step.bits for step in steps], sizes)
    torch.testing.assert_close(sums[-1], steps[-1].f_hat)
    inputs = [tokenizer.quantize.next_input(f_hat, k + 1, sizes) for k, f_hat in enumerate(sums[:-1])]
    if patchify:
        inputs = [infinity.fold(x, size) for x, size in zip(inputs, scales[1:])]
    first = model(texts(), None, inputs[0], scales)
    everything = model(texts(), None, torch.cat(inputs, 1), scales)
    torch.testing.assert_close(first, everything[:, :first.shape[1]], atol=1e-5, rtol=0)


def test_given_bits_replace_those_drawn():
    model, tokenizer = tiny_infinity(), tiny_bits()
    given = tokenizer.tokenize(randn(2, 3, 16, 16), SCALES)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    for options in (dict(), dict(top_k=1), dict(cfg=[1.0, 3.0, 2.0], tau=[1.0, 0.5, 2.0]), dict(guide_after=-1),
                    dict(cfg=1.0)):
        kept = images(model, tokenizer, texts(), mask, given_bits=given, keep_scales=3, **options)
        torch.testing.assert_close(kept, (tokenizer.detokenize(given) + 1) / 2, atol=1e-5, rtol=0)
    steps = steps_of(model, tokenizer, texts(), scales=SCALES, given_bits=given, keep_scales=2)
    assert [torch.equal(step.bits, bits) for step, bits in zip(steps, given)] == [True, True, False]


def test_temperature_and_negative_prompt_matter():
    model, tokenizer = tiny_infinity(), tiny_bits()
    options = [dict(), dict(tau=0.3), dict(negative=(texts(1, 7), None))]
    plain, *others = [images(model, tokenizer, texts(1), generator=generators(0), **each) for each in options]
    assert all(not torch.equal(plain, other) for other in others)


def test_guidance_from_the_null_text_towards_itself_does_nothing():
    model, tokenizer = tiny_infinity(), tiny_bits()
    pictures = [images(model, tokenizer, model.null_text[:5][None], generator=generators(0), cfg=cfg) for cfg in (1, 5)]
    torch.testing.assert_close(*pictures, atol=1e-4, rtol=0)


def test_features_are_guided_after_several_blocks():
    """The blocks are counted from either end. Without guidance (cfg 1) it makes no difference."""
    model, tokenizer = tiny_infinity(), tiny_bits()

    def draw(after, cfg=4.0):
        return images(model, tokenizer, texts(1), generator=generators(0), cfg=cfg, guide_after=after)
    assert torch.equal(draw([0, 1]), draw([-2, -1])) and torch.equal(draw([1]), draw(-1))
    both, first, last = draw([0, 1]), draw([0]), draw([1])
    assert not torch.equal(both, first) and not torch.equal(both, last)
    assert torch.equal(draw([0, 1], cfg=1.0), draw(None, cfg=1.0))
    with pytest.raises(ValueError, match="guide_after is a block, -2 .. 1, not 2"):
        draw([0, 2])


@pytest.mark.parametrize("pixels", vq.PIXELS)
def test_every_aspect_ratio_has_its_schedule(pixels):
    side = {"0.06M": 256, "0.25M": 512, "0.60M": 768, "1M": 1024}[pixels]
    assert len(vq.ASPECTS) == 15
    for ratio in vq.ASPECTS:
        scales = vq.schedule(ratio, pixels)
        h, w = scales[-1]
        assert len(scales) == vq.PIXELS[pixels] and scales[0] == (1, 1) and h / w == pytest.approx(ratio, rel=0.03)
        assert 0.9 < 256 * h * w / side ** 2 < 1.3, (ratio, h * 16, w * 16)     # budgets are kept roughly
        angles = infinity.rope_angles(scales, 64)
        assert angles.shape == (sum(h * w for h, w in scales), 32)
        H, W = vq.ASPECTS[ratio][-1]                                        # positions: never beyond the largest grid
        assert angles[:, 0].max() < H and angles[:, 16].max() < W
    sizes = {1.0: (1024, 1024), 1.25: (1120, 896), 1.333: (1152, 864), 1.5: (1248, 832), 1.75: (1344, 768),
             2.0: (1440, 720), 2.5: (1600, 640), 3.0: (1776, 592), 0.333: (592, 1776), 0.571: (768, 1344)}
    for ratio, size in sizes.items():
        assert tuple(16 * n for n in vq.schedule(ratio, "1M")[-1]) == size
    with pytest.raises(ValueError, match="0.06M, 0.25M, 0.60M, 1M, not '2M'"):
        vq.schedule(1.0, "2M")


def test_positions_are_those_of_the_full_grid_rounded_to_even():
    angles = infinity.rope_angles(vq.schedule(3.0, "0.06M"), 4)             # one frequency, 1, per axis
    last = angles[-27 * 9:].view(27, 9, 2)
    assert last[:, 0, 0].tolist() == [round(r * 111 / 27) for r in range(27)]
    assert last[0, :, 1].tolist() == [round(c * 37 / 9) for c in range(9)]
    assert infinity.rope_angles(((1, 1), (2, 2)) + vq.schedule(3.0, "1M")[2:], 4)[2, 1] == 18      # 37 / 2 = 18.5


def test_self_correction_repairs_and_without_flips_is_plain_quantization():
    quantizer, f = tiny_bits().quantize, randn(3, 6, 4, 4)
    bits = torch.cat(quantizer.encode(f, SCALES), 1)
    plain = quantizer.teacher_input(quantizer.encode(f, SCALES), SCALES)
    for options in (dict(strength=0.0), dict(strength=0.3, layers=0), dict(strength=0.3, chances=[0, 0, 0])):
        inputs, labels = infinity.self_correct(quantizer, f, SCALES, **options)
        assert torch.equal(labels, bits) and torch.equal(inputs, plain)
    g = torch.Generator().manual_seed(0)
    inputs, labels = infinity.self_correct(quantizer, f, SCALES, 0.3, layers=1, generator=g, chances=[1.0] * 3)
    assert torch.equal(labels[:, :1], bits[:, :1])                          # a flipped bit is never a target
    assert not torch.equal(inputs[:, :4], plain[:, :4])                     # but the next scale sees it
    assert (labels[:, 1:5] != bits[:, 1:5]).float().mean() > 0.2            # and is asked to make up for it
    state = torch.get_rng_state()
    one, two = (infinity.self_correct(quantizer, f, SCALES, 0.3, generator=torch.Generator().manual_seed(1))[0]
                for _ in range(2))
    assert torch.equal(one, two) and torch.equal(state, torch.get_rng_state())


def test_fold_is_pixel_unshuffle():
    x = randn(2, 6, 4, 8)
    tokens = x.flatten(2).transpose(1, 2)                                   # (2, 4 * 8, 6)
    folded = infinity.fold(tokens, (2, 4))
    assert torch.equal(folded, F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2))
    assert torch.equal(infinity.unfold(folded, (2, 4)), tokens)


@pytest.mark.parametrize("top_k, top_p", [(0, 0.0), (1, 0.0), (0, 0.97), (2, 0.8), (0, 0.3)])
def test_bits_are_what_multinomial_draws(top_k, top_p):
    logits = 2 * randn(3, 50, 4, 2)
    p = filter_logits(logits, top_k, top_p).softmax(-1).view(-1, 2)
    expected = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(4)).view(3, 50, 4).bool()
    noise = infinity.exponential_noise((3, 200, 2), torch.Generator().manual_seed(4))
    assert torch.equal(infinity.draw_bits(logits, noise, top_k, top_p), expected)


def test_the_loss_of_the_first_scales_is_their_cross_entropy():
    model = tiny_infinity()
    inputs, labels = infinity.self_correct(tiny_bits().quantize, randn(2, 6, 4, 4), SCALES, 0.0)
    loss, metrics = model.loss(texts(), None, inputs[:, :4], labels, SCALES, text_drop=0.0)
    logits = model(texts(), None, inputs, SCALES)[:, :5]
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 2), labels[:, :5].flatten().long()))
    assert 0 <= metrics["token_accuracy"] <= metrics["bit_accuracy"] <= 1 and len(metrics["scale_accuracy"]) == 2


@pytest.mark.parametrize("name", ["infinity_125M", "infinity_2b", "infinity_8b"])
def test_keys_of_the_released_files(name):
    config = infinity.CONFIGS[name]
    with torch.device("meta"):
        model = infinity.Infinity(config)
    official = infinity.export(model, buffers=True)
    last = f"block_chunks.{config.chunks - 1}.module.{config.depth // config.chunks - 1}"
    assert f"{last}.ca.mat_kv.weight" in official
    if name == "infinity_125M":
        assert len(official) == 274


@pytest.mark.parametrize("d, millions", [("d16", 109.97), ("d24", 110.04), ("d32", 110.12), ("d32reg", 110.12),
                                         ("d64", 110.41), ("d56_f8_14_patchify", 81.62)])
def test_released_tokenizer_sizes(d, millions):
    with torch.device("meta"):
        model = vq.VQVAE(vq.CONFIGS[f"infinity_vae_{d}"])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=1e-4)
    exported = vq.export(model.to_empty(device="cpu"))
    assert len(exported) == (226 if "d56" in d else 270)
    mask = exported["quantize.lfq.mask"]                                    # powers of two; the largest of 64 overflows
    assert mask.tolist()[-2:] == [2, 1] and (d != "d64" or mask[0] < 0)


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def test_averaged_weights_are_loaded_on_demand(tmp_path):
    model = tiny_infinity()
    official = infinity.export(model)
    averaged = {k: v + 1 for k, v in official.items()}
    torch.save({"trainer": {"gpt_fsdp": official, "gpt_ema_fsdp": averaged}}, tmp_path / "training.pth")
    ema = load_infinity(tmp_path / "training.pth", weights="ema")
    assert torch.equal(ema.head.bias, model.head.bias + 1)
    assert torch.equal(ema.text_encoder.norm.weight, model.text_encoder.norm.weight + 1)


def test_a_file_is_loaded_in_half_precision(tmp_path):
    model = tiny_infinity()
    infinity.save(model, tmp_path / "m.safetensors")
    half = infinity.load(tmp_path / "m.safetensors", dtype=torch.bfloat16)
    assert half.blocks[0].ffn.fc1.weight.dtype == torch.bfloat16 and half.head.weight.dtype == torch.float32
    assert half.text_encoder is None                                        # features come from elsewhere then
    exact, close = (steps_of(m, tiny_bits(), texts(), scales=SCALES, generator=generators(0, 1))[0].logits
                    for m in (model, half))
    torch.testing.assert_close(close, exact, atol=0.05, rtol=0.05)


def test_shards_and_what_is_wrong_with_them(tmp_path):
    model = tiny_infinity(t5=None)
    folder = shards(tmp_path / "8b", infinity.export(model))
    again = infinity.load(folder)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    assert infinity.load(folder, patchify=True).config.patchify
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(vq.CheckpointError, match="1 of 2 shards missing: model-00002-of-00002.safetensors"):
        infinity.load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(vq.CheckpointError, match="not an index of shards"):
        infinity.load(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(vq.CheckpointError, match="no weights in it"):
        infinity.load(tmp_path / "empty")
    vq.save(tiny_bits(), tmp_path / "vae.safetensors")
    with pytest.raises(vq.CheckpointError, match="not an Infinity transformer"):
        infinity.load(tmp_path / "vae.safetensors")
    state = infinity.export(model)
    torch.save({k: v for k, v in state.items() if "head.bias" not in k}, tmp_path / "short.pth")
    with pytest.raises(vq.CheckpointError, match="1 missing: head.bias"):
        infinity.load(tmp_path / "short.pth")
    with pytest.raises(ValueError, match="the tokenizer has tokens of 8 bits, but this model needs 6 bits"):
        model.sample(tiny_bits(z_channels=8), texts(), scales=SCALES)
    with pytest.raises(ValueError, match="cfg has 2 values, but there are 3 scales"):
        model.sample(tiny_bits(), texts(), scales=SCALES, cfg=[1.0, 2.0])
    with pytest.raises(ValueError, match="a prompt has 40 tokens, but the null text 32"):
        model.sample(tiny_bits(), texts(1, 40), scales=SCALES)
    with pytest.raises(ValueError, match="given_bits and keep_scales go together"):
        model.sample(tiny_bits(), texts(), scales=SCALES, keep_scales=2)
