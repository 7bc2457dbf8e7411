"""Tokenizers: invariants of the quantizers, training losses, loading and saving."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

import vq
from helpers import ROOT, randn, tiny_bits, tiny_single, tiny_tokenizer
from lib import losses
from lib.emoji import Emoji
from lib.pictures import psnr, to_input


def test_shared_phis_of_the_released_schedule():
    assert [vq.phi_index(k, 10, 4) for k in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert vq.phi_index(0, 1, 4) == 0                                       # one scale: the original divides by zero


def test_encode_and_decode_agree_on_every_scale(tokenizer):
    f = tokenizer.encode(randn(2, 3, 16, 16))
    steps = list(tokenizer.quantize.quantize_scales(f))
    decoded = tokenizer.quantize.partial_sums([index for _, index, _ in steps])
    for (_, _, encoded_k), decoded_k in zip(steps, decoded):
        torch.testing.assert_close(encoded_k, decoded_k)


def test_a_batch_is_its_pictures(tokenizer):
    image = randn(2, 3, 16, 16)
    together = torch.cat(tokenizer.tokenize(image), 1)
    assert torch.equal(together, torch.cat([torch.cat(tokenizer.tokenize(picture[None]), 1) for picture in image]))


def test_pictures_that_are_not_square(tokenizer):
    image, patch_nums = randn(1, 3, 16, 24), [(1, 1), (2, 3), (4, 6)]
    indices = tokenizer.tokenize(image, patch_nums)
    assert [i.shape[1] for i in indices] == [1, 6, 24]
    assert tokenizer.detokenize(indices, patch_nums).shape == image.shape
    with pytest.raises(ValueError, match="4x6, but the schedule ends with 4x4"):
        tokenizer.tokenize(image)
    with pytest.raises(ValueError, match=r"divisible by 4, not \(1, 3, 15, 16\)"):
        tokenizer.tokenize(randn(1, 3, 15, 16))


@pytest.mark.parametrize("attn_lowest, attn_mid, z", [(True, True, 8), (False, True, 8), (False, False, 4)])
def test_encoder_and_decoder_with_and_without_attention(attn_lowest, attn_mid, z):
    sizes = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_lowest=attn_lowest, attn_mid=attn_mid)
    moments = vq.Encoder(out_channels=2 * z, **sizes)(randn(1, 3, 8, 8))    # a KL head: mean and log-variance
    assert moments.shape == (1, 2 * z, 4, 4)
    assert vq.Decoder(in_channels=z, **sizes)(moments[:, :z]).shape == (1, 3, 8, 8)


def test_gradient_passes_straight_through_the_quantizer(tokenizer):
    f = randn(2, 8, 4, 4).requires_grad_()
    tokenizer.quantize(f)[0].sum().backward()
    assert torch.equal(f.grad, torch.ones_like(f))


def test_dead_codes_are_restarted_on_residuals_and_the_codebook_recovers():
    tokenizer, image = tiny_tokenizer(vocab_size=64), randn(8, 3, 16, 16)
    quantizer, g = tokenizer.quantize.train(), torch.Generator().manual_seed(0)
    f = tokenizer.encode(image).detach()
    with torch.no_grad():
        quantizer.codebook.fill_(100.0)                                     # collapsed: only one code is ever chosen
        quantizer.codebook[0] = 0
    used = lambda: len(torch.cat(quantizer.encode(f), 1).unique())
    assert used() == 1
    for _ in range(3):
        quantizer(f)
    dead = quantizer.steps_unused >= 3
    assert dead.sum() == 63
    assert quantizer.restart_codes(f, dead, g) == 63 and used() > 32
    quantizer.init_codebook(f, g)
    assert used() > 48
    assert quantizer.steps_unused.max() == 0


def test_the_discriminator_waits_and_its_weight_adapts(tokenizer):
    discriminator = losses.PatchDiscriminator(width=8, num_layers=1)
    discriminator.init_weights(torch.Generator().manual_seed(0))
    criterion = losses.TokenizerLoss(None, discriminator, disc_start=10, disc_weight=0.5)
    image = randn(2, 3, 16, 16).clamp(-1, 1)
    rec, vq_loss, _ = tokenizer(image)
    last = tokenizer.decoder.conv_out.weight
    early, parts = criterion(image, rec, vq_loss, 9, last)
    assert "adv" not in parts and torch.equal(early, parts["l1"] + parts["l2"] + vq_loss)
    late, parts = criterion(image, rec, vq_loss, 10, last)
    balance = criterion.balance(parts["l1"] + parts["l2"], parts["adv"], last)
    torch.testing.assert_close(late, early + 0.5 * balance * parts["adv"])
    grad = lambda loss: torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
    # 2 %: the quotient of the norms has 1e-4 added to its denominator
    torch.testing.assert_close(grad(balance * parts["adv"]), grad(early - vq_loss), rtol=2e-2, atol=0)
    assert 0 < criterion.discriminator_loss(image, rec) < 3


@pytest.mark.parametrize("phi_count", [0, 1, 4])
def test_save_load_export(tmp_path, phi_count):
    tokenizer = tiny_tokenizer(phi_count=phi_count)
    vq.save(tokenizer, tmp_path / "a.safetensors")
    torch.save(vq.export(tokenizer), tmp_path / "a.pth")
    torch.save({"trainer": {"vae_local": vq.export(tokenizer), "config": None}, "epoch": 3}, tmp_path / "nested.pth")
    for file in ("a.safetensors", "a.pth", "nested.pth"):
        again = vq.load(tmp_path / file, patch_nums=(1, 2, 3, 4))
        assert again.config == tokenizer.config
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), tokenizer.parameters()))
    key = {0: "3", 1: "qresi", 4: "qresi_ls.3"}[phi_count]
    assert f"quantize.quant_resi.{key}.weight" in vq.export(tokenizer)


def test_the_released_file_serves_both_picture_sizes():
    assert vq.PATCH_NUMS[256][-1] == 16 and vq.PATCH_NUMS[512][-1] == 32
    assert sum(p * p for p in vq.PATCH_NUMS[256]) == 680 and sum(p * p for p in vq.PATCH_NUMS[512]) == 2240
    with torch.device("meta"):
        released = vq.VQVAE(vq.CONFIGS["vae_ch160v4096z32"])
    assert sum(p.numel() for p in released.parameters()) == 108_948_355
    exported = vq.rename_keys(released.state_dict(), vq.renames(released.config), inverse=True)
    assert len(exported) - len(vq.BOOKKEEPING) == 324


def test_saving_never_leaves_half_a_file(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with vq.atomic(tmp_path / "x") as temporary:
            temporary.write_text("ne")
            raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"
    with pytest.raises(OSError) as e:
        with vq.atomic(tmp_path / "x"):
            raise OSError(28, "No space left on device")
    assert e.value.filename == str(tmp_path / "x")


def test_tokens_survive_a_round_trip_through_the_picture():
    """With the trained demo tokenizer, on held-out pictures. Encoding a decoded picture again does not give every token
    back (many codes are near-ties), but loses much less than the first encoding did, and no more each time."""
    tokenizer = vq.load(ROOT / "demo" / "emoji_vq.safetensors")
    image = to_input(Emoji(32, "unseen").pixels[::40], "cpu")
    first = tokenizer.detokenize(tokenizer.tokenize(image))
    second = tokenizer.detokenize(tokenizer.tokenize(first))
    third = tokenizer.detokenize(tokenizer.tokenize(second))
    kept = [psnr(a, b).mean() for a, b in ((image, first), (first, second), (second, third))]
    assert kept[0] > 25 and kept[1] > kept[0] + 3 and kept[2] > kept[1]
    agree = [(a == b).float().mean() for a, b in zip(tokenizer.tokenize(first), tokenizer.tokenize(second))]
    assert agree[0] > 0.8 and min(agree) > 0.3                              # 1,024 codes: by chance 0.001


# ----------------------------------------------------------------------------------------------------------------------
# LlamaGen's tokenizer and the discriminators


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
    square = randn(1, 3, 24, 24)                                            # a square needs no patch_nums
    assert tokenizer.detokenize(tokenizer.tokenize(square)).shape == square.shape
    with pytest.raises(ValueError, match="60 tokens are no map of 7x7: pass patch_nums"):
        tokenizer.detokenize([tokens])


def test_codes_may_have_any_length():
    """LlamaGen's option of a codebook without l2 norm: tokens are the nearest codes by distance, as they are."""
    tokenizer = tiny_single(unit_codes=False)
    with torch.no_grad():
        tokenizer.quantize.codebook[::2] *= 3                               # lengths do matter
    image = randn(2, 3, 16, 16)
    tokens, = tokenizer.tokenize(image)
    z = rearrange(tokenizer.encode(image), "b c h w -> b (h w) c")
    assert torch.equal(tokens, torch.cdist(z, tokenizer.quantize.codebook[None]).argmin(2))
    codes = tokenizer.quantize.embed(tokens, (4, 4))
    assert torch.equal(rearrange(codes, "b c h w -> b (h w) c"), tokenizer.quantize.codebook[tokens])
    tokenizer.quantize.config = replace(tokenizer.config, unit_codes=True)
    assert not torch.equal(tokens, tokenizer.tokenize(image)[0])


def test_usage_counts_the_last_65536_indices():
    quantizer = tiny_single().quantize.train()

    def used(f):
        return quantizer(f)[2].item()
    assert used(quantizer.embed(torch.arange(8)[None], (2, 4))) == 100 * 8 / 32
    assert used(quantizer.embed(torch.full((1, 8), 9), (2, 4))) == 100 * 9 / 32     # the history remembers
    assert quantizer.recent[-8:].tolist() == [9] * 8
    assert used(quantizer.embed(torch.full((1, 70000), 3), (250, 280))) == 100 / 32         # more than it holds
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

    def slopes(name):
        return torch.autograd.grad(losses.GAN_LOSSES[name][0](real, fake), (real, fake))
    for name in ("hinge", "vanilla", "non-saturating"):                     # up with the real, down with the fake
        up, down = slopes(name)
        assert (up <= 0).all() and (down >= 0).all() and up.any() and down.any()
    torch.testing.assert_close(slopes("vanilla"), slopes("non-saturating"))
    up, down = slopes("non-saturating-swapped")
    assert not down.any() and up.unique().numel() == 1                      # the original's slip
    for name in losses.GAN_LOSSES:
        assert torch.autograd.grad(losses.GAN_LOSSES[name][1](fake), fake)[0].max() < 0


# ----------------------------------------------------------------------------------------------------------------------
# Infinity's tokenizer


def test_two_class_entropies_are_those_of_the_full_softmax():
    """With all 2^d codes written out for d = 6: the closed form is no approximation."""
    quantizer, z = tiny_bits().quantize, randn(2, 6, 3, 3)
    codes = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 6) / math.sqrt(6)       # (64, d)
    u = F.normalize(z, dim=1).flatten(2).transpose(1, 2)                    # (B, l, d)
    p = (-100 * (u[..., None, :] - codes).square().sum(-1)).softmax(-1)     # (B, l, 64)
    _, each, overall = quantizer.losses(z)
    torch.testing.assert_close(each, torch.special.entr(p).sum(-1).mean(), atol=1e-4, rtol=1e-4)
    bits = ((p[..., None] * (codes > 0)).sum(-2)).mean((0, 1))              # marginals of the mean distribution
    entropy = (torch.special.entr(bits) + torch.special.entr(1 - bits)).sum()
    torch.testing.assert_close(overall, entropy, atol=1e-4, rtol=0)


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
