"""Infinity: what must hold whatever the weights, the bits, the text encoder, and loading."""
import json
import math

import pytest
import torch
from safetensors.torch import save_file

import infinity
import vq
from conftest import SCALES, T5_CONFIG, randn, tiny_bits, tiny_infinity
from lib.graphs import captured
from lib.text import T5Encoder, byte_ids, load_infinity, load_t5, load_tokenizer
from test_var import CAPTURES, check_nothing_waits, steps_of
from triton_ops import backend, filter_logits

PATCHES = ((1, 1), (2, 2))                      # with patchify, the tokenizer's being 2x2 and 4x4


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def texts(B=2, T=5):
    return randn(B, T, 128, seed=3)


def images(model, *arguments, **options):
    return model.sample(*arguments, **dict(scales=SCALES, tau=1.0, top_p=0.0, cfg=2.0) | options)


@pytest.mark.parametrize("patchify", [False, True])
def test_cached_sampling_equals_teacher_forcing(patchify):
    model, tokenizer = tiny_infinity(bits=24 if patchify else 6, patchify=patchify), tiny_bits()
    scales = PATCHES if patchify else SCALES
    steps = steps_of(model, tokenizer, texts(), scales=scales, cfg=1.0, tau=1.0, generator=generators(0, 1))
    sizes = infinity.tokenizer_scales(scales, patchify)
    sums = tokenizer.quantize.partial_sums([s.bits for s in steps], sizes)
    inputs = [tokenizer.quantize.next_input(f_hat, k + 1, sizes) for k, f_hat in enumerate(sums[:-1])]
    if patchify:
        inputs = [infinity.fold(x, size) for x, size in zip(inputs, scales[1:])]
    forced = model(texts(), None, torch.cat(inputs, 1), scales)
    torch.testing.assert_close(torch.cat([s.logits for s in steps], 1), forced, atol=1e-5, rtol=0)
    torch.testing.assert_close(sums[-1], steps[-1].f_hat)
    first = model(texts(), None, torch.cat(inputs, 1)[:, :scales[1][0] * scales[1][1]], scales)     # two scales alone
    torch.testing.assert_close(first, forced[:, :first.shape[1]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [dict(), dict(top_k=1), dict(cfg=[1.0, 3.0, 2.0], tau=[1.0, 0.5, 2.0]),
                                     dict(guide_after=-1), dict(cfg=1.0)])
def test_a_batch_of_two_prompts_is_two_batches_of_one(options):
    """Prompts of other lengths, padded in the batch."""
    model, tokenizer, text = tiny_infinity(), tiny_bits(), texts()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    both = images(model, tokenizer, text, mask, generator=generators(5, 6), **options)
    alone = [images(model, tokenizer, text[:1], generator=generators(5), **options),
             images(model, tokenizer, text[1:, :3], generator=generators(6), **options)]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-5, rtol=0)
    given = tokenizer.tokenize(randn(2, 3, 16, 16), SCALES)
    kept = images(model, tokenizer, text, mask, generator=generators(5, 6), given_bits=given, keep_scales=3, **options)
    torch.testing.assert_close(kept, (tokenizer.detokenize(given) + 1) / 2, atol=1e-5, rtol=0)


def test_text_seed_guidance_and_negative_prompt_matter():
    model, tokenizer = tiny_infinity(), tiny_bits()
    draw = lambda text=texts(1), seed=0, **options: images(model, tokenizer, text, generator=generators(seed), **options)
    plain = draw()
    assert torch.equal(plain, draw()) and plain.shape == (1, 3, 16, 16) and 0 <= plain.min() and plain.max() <= 1
    others = [draw(-texts(1)), draw(seed=1), draw(cfg=4.0), draw(tau=0.3), draw(negative=(texts(1, 7), None))]
    assert all(not torch.equal(plain, other) for other in others)
    pictures = draw(all_scales=True)
    assert len(pictures) == 3 and torch.equal(pictures[-1], plain)
    null = model.null_text[:5][None]                                        # guidance towards the null text: nothing to do
    torch.testing.assert_close(draw(null, cfg=1.0), draw(null, cfg=5.0), atol=1e-4, rtol=0)


@CAPTURES
def test_captured_steps_draw_the_same_pictures(device, call):
    model, tokenizer = tiny_infinity().to(device), tiny_bits().to(device)
    fast, fast_tokenizer = captured(model, call), captured(tokenizer, call)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    for text, mask, seed in ((texts(), mask, 0), (-texts(), mask, 3), (texts(), None, 1), (texts(), ~mask, 2)):
        for options in (dict(), dict(guide_after=0)):
            found, expected = (images(
                m, t, text, mask, all_scales=True, **options,
                generator=[torch.Generator(device).manual_seed(s) for s in (seed, 9)])
                for m, t in ((fast, fast_tokenizer), (model, tokenizer)))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(fast.forward_scale.graphs) == 3 * 2 * 2 and len(fast_tokenizer.decode.graphs) == 1
    check_nothing_waits(model, lambda model: images(model, tokenizer, texts(), mask))


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
    expected = torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
    folded = infinity.fold(x.flatten(2).transpose(1, 2), (2, 4))
    assert torch.equal(folded, expected) and torch.equal(infinity.unfold(folded, (2, 4)), x.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("top_k, top_p", [(0, 0.0), (1, 0.0), (0, 0.97), (2, 0.8), (0, 0.3)])
def test_bits_are_what_multinomial_draws(top_k, top_p):
    logits = 2 * randn(3, 50, 4, 2)
    p = filter_logits(logits, top_k, top_p).softmax(-1).view(-1, 2)
    expected = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(4)).view(3, 50, 4).bool()
    noise = infinity.exponential_noise((3, 200, 2), torch.Generator().manual_seed(4))
    assert torch.equal(infinity.draw_bits(logits, noise, top_k, top_p), expected)


def test_two_class_entropies_are_those_of_the_full_softmax():
    """With 2^d corners written out, d = 6: the closed form is no approximation."""
    quantizer, z = tiny_bits().quantize, randn(2, 6, 3, 3)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 6) / math.sqrt(6)
    u = torch.nn.functional.normalize(z, dim=1).flatten(2).transpose(1, 2)  # (B, l, d)
    p = (-100 * (u[..., None, :] - corners).square().sum(-1)).softmax(-1)   # (B, l, 64)
    entropy = torch.special.entr(p).sum(-1).mean()
    _, sure, varied = quantizer.losses(z)
    torch.testing.assert_close(sure, entropy, atol=1e-4, rtol=1e-4)
    bits = ((p[..., None] * (corners > 0)).sum(-2)).mean((0, 1))            # marginals of the mean distribution
    torch.testing.assert_close(varied, (torch.special.entr(bits) + torch.special.entr(1 - bits)).sum(), atol=1e-4, rtol=0)


def test_training_draws_from_the_generator_only_and_checkpointing_changes_nothing():
    model, tokenizer = tiny_infinity().train(), tiny_bits()
    inputs, labels = infinity.self_correct(tokenizer.quantize, randn(2, 6, 4, 4), SCALES, 0.0)
    state = torch.get_rng_state()

    def gradients(seed):
        model.zero_grad()
        loss, metrics = model.loss(texts(), None, inputs, labels, SCALES, text_drop=0.5, generator=generators(seed)[0])
        loss.backward()
        assert 0 <= metrics["token_accuracy"] <= metrics["bit_accuracy"] <= 1 and len(metrics["scale_accuracy"]) == 3
        return [p.grad for p in model.parameters() if p.grad is not None]
    plain, other = gradients(0), gradients(1)
    model.checkpointing = True
    for mine, expected in zip(gradients(0), plain):
        torch.testing.assert_close(mine, expected)
    assert any(not torch.equal(a, b) for a, b in zip(plain, other)) and torch.equal(state, torch.get_rng_state())
    model.eval()
    part, _ = model.loss(texts(), None, inputs[:, :4], labels, SCALES, text_drop=0.0)       # the first two scales alone
    logits = model(texts(), None, inputs, SCALES)[:, :5]
    torch.testing.assert_close(part, torch.nn.functional.cross_entropy(logits.flatten(0, 2), labels[:, :5].flatten().long()))


def test_initial_loss_is_that_of_a_coin():
    model = infinity.Infinity(tiny_infinity().config)
    model.init_weights(generator=torch.Generator().manual_seed(0))
    inputs, labels = infinity.self_correct(tiny_bits().quantize, randn(2, 6, 4, 4), SCALES, 0.0)
    assert model.loss(texts(), None, inputs, labels, SCALES)[0].item() == pytest.approx(math.log(2), rel=0.02)


@pytest.mark.parametrize("name, parameters", [("infinity_125M", 125.15e6), ("infinity_2b", 2204.6e6), ("infinity_8b", 8375.8e6)])
def test_released_sizes(name, parameters):
    with torch.device("meta"):
        model = infinity.Infinity(infinity.CONFIGS[name])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-4)
    official = infinity.export(model, buffers=True)
    config = infinity.CONFIGS[name]
    assert f"block_chunks.{config.chunks - 1}.module.{config.depth // config.chunks - 1}.ca.mat_kv.weight" in official
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
    assert exported["quantize.lfq.mask"].tolist()[-2:] == [2, 1] and (d != "d64" or exported["quantize.lfq.mask"][0] < 0)


# ----------------------------------------------------------------------------------------------------------------------
# Loading


@pytest.mark.parametrize("chunks", [1, 2])
def test_save_load_export(tmp_path, chunks):
    model = tiny_infinity(chunks=chunks)
    infinity.save(model, tmp_path / "m.safetensors")
    official = infinity.export(model)
    torch.save(official, tmp_path / "flat.pth")
    torch.save({"args": {}, "trainer": {"gpt_fsdp": official, "gpt_ema_fsdp": {k: v + 1 for k, v in official.items()}}},
               tmp_path / "training.pth")
    for name in ("m.safetensors", "flat.pth", "training.pth"):
        again = load_infinity(tmp_path / name)
        assert again.config == model.config or name != "m.safetensors"
        for key, value in infinity.export(again).items():
            assert torch.equal(value, official[key]), key
    averaged = load_infinity(tmp_path / "training.pth", ema=True)
    assert torch.equal(averaged.head.bias, model.head.bias + 1)
    assert torch.equal(averaged.text_encoder.norm.weight, model.text_encoder.norm.weight + 1)
    assert infinity.load(tmp_path / "m.safetensors").text_encoder is None   # features come from elsewhere then
    half = infinity.load(tmp_path / "m.safetensors", dtype=torch.bfloat16)
    assert half.blocks[0].ffn.fc1.weight.dtype == torch.bfloat16 and half.head.weight.dtype == torch.float32
    draw = lambda model: steps_of(model, tiny_bits(), texts(), scales=SCALES, generator=generators(0, 1))[0].logits
    torch.testing.assert_close(draw(half), draw(model), atol=0.05, rtol=0.05)


def shards(folder, state, count=2):
    """A folder as Hugging Face has large models."""
    folder.mkdir()
    names = {k: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, k in enumerate(state)}
    for name in set(names.values()):
        save_file({k: v for k, v in state.items() if names[k] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


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


def test_plain_and_wrapped_tokenizer_files_are_the_same(tmp_path):
    tokenizer = tiny_bits()
    state = vq.export(tokenizer)
    assert "encoder.down.0.downsample.conv.conv.weight" in state and "decoder.norm_out.norm.bias" in state
    torch.save({"vae": state, "ema": {}, "optimizer": {}}, tmp_path / "wrapped.pth")
    torch.save(vq.rename_keys(state, vq.UNWRAP), tmp_path / "plain.pth")
    for name in ("wrapped.pth", "plain.pth"):
        again = vq.load(tmp_path / name, patch_nums=(1, 2, 4))
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), tokenizer.state_dict().values()))


def test_tiles_are_close_to_the_whole():
    tokenizer, f_hat = tiny_bits(), randn(1, 6, 20, 28)
    whole = tokenizer.decode(f_hat)
    torch.testing.assert_close(tokenizer.decode_tiled(f_hat, 28), whole, atol=1e-5, rtol=0)
    tiled = tokenizer.decode_tiled(f_hat, 16)
    assert tiled.shape == whole.shape and 0 < (tiled - whole).abs().mean() < 0.2 * whole.std()


# ----------------------------------------------------------------------------------------------------------------------
# T5


def test_t5_does_not_see_padding():
    t5 = T5Encoder(T5_CONFIG).eval()
    t5.init_weights(torch.Generator().manual_seed(0))
    (both, mask), (alone, none) = t5.encode(["a cat", "fox"]), t5.encode(["fox"])
    assert none is None and mask.sum(1).tolist() == [6, 4]
    torch.testing.assert_close(both[1:, :4], alone, atol=1e-5, rtol=0)
    ids, _ = byte_ids(["é", ""], 512)
    assert ids.tolist() == [[0xC3 + 3, 0xA9 + 3, 1], [1, 0, 0]]
    assert byte_ids(["x" * 100], 8)[0].shape == (1, 8)


def test_t5_is_that_of_transformers(tmp_path):
    """A small random T5 saved by transformers, in shards; prompts longer than the exact relative positions."""
    transformers = pytest.importorskip("transformers", reason="the reference of this test; not needed otherwise")
    config = transformers.T5Config(vocab_size=300, d_model=64, d_kv=16, num_heads=3, num_layers=3, d_ff=96,
                                   feed_forward_proj="gated-gelu", dropout_rate=0.0)
    torch.manual_seed(0)
    reference = transformers.T5EncoderModel(config).eval()
    reference.save_pretrained(tmp_path / "t5", max_shard_size="200KB")
    assert len(list((tmp_path / "t5").glob("*.safetensors"))) > 1
    t5 = load_t5(tmp_path / "t5")
    ids = torch.randint(3, 300, (2, 200), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(200) < torch.tensor([[200], [150]])
    with torch.no_grad():
        expected, found = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state, t5(ids, mask)
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-4, rtol=0)


def test_t5_folders(tmp_path):
    t5 = T5Encoder(T5_CONFIG)
    t5.init_weights(torch.Generator().manual_seed(0))
    state = vq.rename_keys({k: v.clone() for k, v in t5.state_dict().items()}, T5Encoder.RENAMES, inverse=True)
    extra = {"encoder.embed_tokens.weight": state["shared.weight"].clone(), "lm_head.weight": torch.zeros(2, 2),
             "decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2, 2)}
    again = load_t5(shards(tmp_path / "t5", state | extra, 3))
    assert again.config == T5_CONFIG and again.tokenize is byte_ids
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), t5.state_dict().values()))
    state["shared.weight"] = torch.zeros(32128, 128)
    with pytest.raises(vq.CheckpointError, match="has no tokenizer.json"):
        load_t5(shards(tmp_path / "words", state))
    with pytest.raises(vq.CheckpointError, match="not a T5 of version 1.1"):
        load_t5(shards(tmp_path / "other", {"x": torch.zeros(1)}, 1))


def test_tokenizer_json_is_read_by_its_package(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="an optional package, for Flan-T5's tokenizer.json")
    words = tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "cat": 4}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenize = load_tokenizer(tmp_path / "tokenizer.json")
    ids, mask = tokenize(["a cat", "a dog cat", ""], 512)
    assert ids.tolist() == [[3, 4, 1, 0], [3, 2, 4, 1], [1, 0, 0, 0]] and mask.sum(1).tolist() == [3, 4, 1]
    assert tokenize(["a cat a cat"], 3)[0].tolist() == [[3, 4, 1]]


@pytest.mark.kernel
def test_kernels_draw_and_learn_what_torch_does():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = tiny_infinity().to(device), tiny_bits().to(device)
    given = [bits.to(device) for bits in tiny_bits().tokenize(randn(1, 3, 16, 16), SCALES)]
    f, text = tokenizer.encode(randn(1, 3, 16, 16).to(device)).detach(), texts(B=1).to(device)

    def numbers():
        steps = steps_of(model, tokenizer, text, scales=SCALES, given_bits=given, keep_scales=3, top_k=1)
        logits = torch.cat([step.logits for step in steps], 1)
        inputs, labels = infinity.self_correct(tokenizer.quantize, f, SCALES, 0.0)
        model.zero_grad()
        model.loss(text, None, inputs, labels, SCALES)[0].backward()
        return [logits, *(p.grad for p in model.parameters() if p.grad is not None)]
    with backend("torch"):
        expected = numbers()
    with backend("triton"):
        for mine, theirs in zip(numbers(), expected):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.gpu
def test_cuda_with_kernels_gives_the_numbers_of_the_cpu():
    model, tokenizer = tiny_infinity(), tiny_bits()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    given = tokenizer.tokenize(randn(2, 3, 16, 16), SCALES)
    draw = lambda text, mask: [step.logits.cpu() for step in steps_of(
        model, tokenizer, text, mask, scales=SCALES, top_k=1, given_bits=given, keep_scales=3)]
    expected = draw(texts(), mask)
    given = [bits.cuda() for bits in given]
    model, tokenizer = model.cuda(), tokenizer.cuda()
    for mine, theirs in zip(draw(texts(), mask), expected):
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=0)
