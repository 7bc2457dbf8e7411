"""Tokenizers: invariants of the quantizers, training losses, loading and saving."""
import pytest
import torch

import vq
from helpers import ROOT, randn, tiny_tokenizer
from lib import losses
from lib.data import EmojiSheet
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
    image = to_input(EmojiSheet(32, train=False).pixels[::4], "cpu")
    first = tokenizer.detokenize(tokenizer.tokenize(image))
    second = tokenizer.detokenize(tokenizer.tokenize(first))
    third = tokenizer.detokenize(tokenizer.tokenize(second))
    kept = [psnr(a, b).mean() for a, b in ((image, first), (first, second), (second, third))]
    assert kept[0] > 24 and kept[1] > kept[0] + 3 and kept[2] > kept[1]
    agree = [(a == b).float().mean() for a, b in zip(tokenizer.tokenize(first), tokenizer.tokenize(second))]
    assert agree[0] > 0.8 and min(agree) > 0.3                              # 1,024 codes: by chance 0.001
