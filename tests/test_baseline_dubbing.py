"""lib/baseline_dubbing.py computes what our code and the original compute, in the original's memory layout."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import helpers
import latentsync
import sample
import vq
from helpers import KL_CONFIG, UNET_CONFIG, WHISPER_CONFIG, randn, run
from lib import baseline_dubbing, bench, dubbing
from test_parity import close, load_case, load_kl, load_unet, noise, noted, part_of

PARITY = Path(__file__).parent / "parity"

# Ours and the baseline sum up in other orders. On numbers of order one that makes 5e-5 at most in these tests, in
# float32. Keys and values exchanged in one attention make 0.1 or more.
ROUNDING = dict(atol=1e-4, rtol=0)


def clip(size=(6, 5), frames=3, audio_width=16):
    """Latents (1, 4, F, h, w), condition (1, 9, F, h, w) and audio (1, F, A, audio_width)."""
    z = randn(1, 4, frames, *size, seed=1)
    condition = randn(1, 9, frames, *size, seed=2)
    return z, condition, randn(1, frames, 10, audio_width, seed=3)


def guided_noise(monkeypatch, unet, z, condition, audio, cfg):
    """What the first of 20 steps of latentsync.denoise, t = 951, predicts."""
    monkeypatch.setattr(latentsync, "ddim_step", lambda z, noise, t, count: noise)
    with torch.no_grad():
        return next(latentsync.denoise(unet, z, condition, audio, 20, cfg))


@pytest.mark.parametrize("motion", ["all", "up", "none"])
def test_a_step_is_ours(monkeypatch, motion):
    """Of maps with sides that do not halve, so that upsampling has to meet a size."""
    unet = helpers.tiny(latentsync.UNet, replace(UNET_CONFIG, motion=motion))
    z, condition, audio = clip()
    ours = guided_noise(monkeypatch, unet, z, condition, audio, 2.0)
    for model in (unet, baseline_dubbing.contiguous(unet)):
        found = baseline_dubbing.unet_step(model, z, condition, 951, audio, 2.0)
        torch.testing.assert_close(found, ours, **ROUNDING)
    assert ours.std() > 0.1


def test_the_autoencoder_is_ours(dub_parts):
    """Also of a picture that is constant in part, as masked faces are."""
    ours = dub_parts[1]
    pictures = randn(3, 3, 24, 32).clamp(-1, 1)
    pictures[0, :, 8:] = 0
    theirs = baseline_dubbing.contiguous(ours)
    with torch.no_grad():
        posterior = ours.encode(pictures)
        decoded = ours.decode(posterior.sample())
    mean, std = baseline_dubbing.vae_encode(theirs, pictures)
    torch.testing.assert_close(mean, posterior.mean, **ROUNDING)
    torch.testing.assert_close(std, posterior.std, **ROUNDING)
    found = baseline_dubbing.vae_decode(theirs, mean * ours.config.scaling)
    torch.testing.assert_close(found, decoded, **ROUNDING)


def test_maps_are_contiguous_and_steps_are_its_own(dub_parts):
    """Otherwise the baseline would be our code under another name."""
    def check(module, given, out):
        assert type(module).__module__.startswith("torch.nn"), f"{type(module)} is ours"
        if isinstance(module, torch.nn.Conv2d):
            convolutions.append(module)
            for x in (*given, out):
                assert x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last), x.stride()
    convolutions = []
    unet, autoencoder = (baseline_dubbing.contiguous(model) for model in dub_parts[:2])
    for model in (unet, autoencoder):
        for module in model.modules():
            module.register_forward_hook(check)
    z, condition, audio = clip()
    baseline_dubbing.unet_step(unet, z, condition, 951, audio, 2.0)
    mean, _ = baseline_dubbing.vae_encode(autoencoder, randn(2, 3, 16, 16))
    baseline_dubbing.vae_decode(autoencoder, mean)
    inside_attention = 2 * 2                                                # qkv and proj_out, as products
    all_of_them = [m for model in (unet, autoencoder) for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(set(convolutions)) == len(all_of_them) - inside_attention


def test_a_contiguous_copy_shares_what_it_can(dub_parts):
    unet = dub_parts[0]
    twin = baseline_dubbing.contiguous(unet)
    layouts = set()
    for ours, theirs in zip(unet.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert (ours.data_ptr() == theirs.data_ptr()) == (ours.dim() != 4)
        layouts.add((ours.dim(), ours.stride() == theirs.stride()))
    assert layouts == {(1, True), (2, True), (4, False)}
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------------------------------------
# The numbers of the original, with the tolerance of test_parity.py


def test_parity_of_the_unet(tmp_path):
    meta, t = load_case(PARITY / "latentsync_unet.safetensors")
    unet = load_unet(part_of(meta, t), meta["config"], tmp_path / "unet.pt")
    unet = baseline_dubbing.contiguous(unet)
    x = noted(meta, "in.sample")
    audio = noted(meta, "in.audio")
    (step,) = meta["timesteps"]
    close(baseline_dubbing.unet_forward(unet, x, step, audio), t["out.sample"], what="sample")
    silent = baseline_dubbing.unet_forward(unet, x, step, torch.zeros_like(audio))
    close(silent, t["out.sample_zero_audio"], what="zeros for audio")
    guided = baseline_dubbing.unet_step(unet, x[:, :4], x[:, 4:], step, audio, 1.5)
    close(guided, torch.lerp(t["out.sample_zero_audio"], t["out.sample"], 1.5), what="guided")


def test_parity_of_denoising(tmp_path):
    meta, t = load_case(PARITY / "latentsync_denoise.safetensors")
    c = meta["config"]
    unet = load_unet(part_of(meta, t), c["unet"], tmp_path / "unet.pt")
    unet = baseline_dubbing.contiguous(unet)
    shape = tuple(t["out.latents_0"].shape)
    z = noted(meta, "in.z").expand(shape)
    mask = (noted(meta, "in.mask") > 0).float()
    condition = torch.cat([mask, noise("in.masked", shape), noise("in.ref", shape)], 1)
    for i, step in enumerate(latentsync.time_steps(c["steps"])):
        found = baseline_dubbing.unet_step(unet, z, condition, step, noted(meta, "in.audio"), c["guidance"])
        z = latentsync.ddim_step(z, found, step, c["steps"])
        close(z, t[f"out.latents_{i}"], what=f"latents after step {i}")


def test_parity_of_blocks():
    meta, t = load_case(PARITY / "latentsync_unet_blocks.safetensors")
    c = meta["config"]
    state = part_of(meta, t)
    x = noted(meta, "in.x")
    time = noted(meta, "in.temb")

    def loaded(name, module, place=""):
        """The module with its weights in the case. place: where a UNet has such a module, for its keys."""
        own = {k.replace(f"{name}.", place, 1): v for k, v in state.items() if k.startswith(f"{name}.")}
        own = {k.removeprefix(place): v for k, v in latentsync._to_ours(own).items()}
        vq.load_strict(module, own, name, optional=latentsync._tables(module))
        return module.eval()
    with torch.no_grad():
        r = c["resnet"]
        block = loaded("resnet", latentsync.ResBlock(r["cin"], r["cout"], r["temb"]))
        close(baseline_dubbing.residual_block(block, x, time), t["out.resnet"], what="resnet")
        s = c["transformer"]
        block = loaded("transformer", latentsync.SpatialTransformer(s["channels"], s["heads"], s["audio_dim"]),
                       "attentions.0.")
        found = baseline_dubbing.spatial_transformer(block, x, noted(meta, "in.audio"))
        close(found, t["out.transformer"], what="transformer")
        m = c["motion"]
        block = loaded("motion", latentsync.MotionModule(m["channels"], m["heads"], m["max_len"]), "motion_modules.0.")
        close(baseline_dubbing.motion_module(block, x), t["out.motion"], what="motion")
        up = latentsync.Upsample(c["up"]["cin"])
        up.conv = torch.nn.Conv2d(c["up"]["cin"], c["up"]["cout"], 3, padding=1)
        up = loaded("up", up)
        close(baseline_dubbing.upsample(up, x, (2 * x.shape[3], 2 * x.shape[4])), t["out.up"], what="up")
        close(baseline_dubbing.upsample(up, x, (11, 7)), t["out.up_to_11x7"], what="up to 11 x 7")


def test_parity_of_the_autoencoder(tmp_path):
    meta, t = load_case(PARITY / "latentsync_vae.safetensors")
    autoencoder = load_kl(part_of(meta, t), meta["config"], tmp_path / "vae.pth")
    autoencoder = baseline_dubbing.contiguous(autoencoder)
    mean, std = baseline_dubbing.vae_encode(autoencoder, noted(meta, "in.image"))
    close(mean, t["out.mean"], what="mean")
    close(std, t["out.std"], what="std")
    z = noise("in.latent", tuple(mean.shape)) * autoencoder.config.scaling
    close(baseline_dubbing.vae_decode(autoencoder, z), t["out.decoded"], what="decoded")


# ----------------------------------------------------------------------------------------------------------------------
# The benchmark


def test_bench_races_the_baseline(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(vq.CONFIGS, "talking_head_kl", KL_CONFIG)
    monkeypatch.setitem(latentsync.WHISPERS, "talking_head", WHISPER_CONFIG)
    monkeypatch.setitem(latentsync.CONFIGS, "talking_head", UNET_CONFIG)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e9)
    run(sample, "latentsync", "--bench", "--random-weights", "talking_head", "--frames", 3, "--steps", 1, "--decode", 2,
        "--device", "cpu", "--json", tmp_path / "a.json")
    variants = json.loads((tmp_path / "a.json").read_text())["variants"]
    names = [f"original's arithmetic, {what}" for what in ("a step of the UNet", "the autoencoder")]
    assert list(variants) == ["plain", *names]
    for name in names:
        v = variants[name]
        assert v["equal"] and v["seconds"] > 0 and v["ratio"] > 0
        assert 0 < v["max_difference"] < 1e-4                               # 0 would mean that it races with itself
    out = capsys.readouterr().out
    assert all(f"{name}: ours / original's" in out for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_benchmark_would_find_a_slip(dub_parts, monkeypatch, dtype):
    """In keys and values, and in the statistics of norms. It takes rounding for equal, in half precision as well."""
    unet, autoencoder = (helpers.tiny(type(model), model.config).to(dtype) for model in dub_parts[:2])
    audio = list(randn(2, 20, 16))
    race = lambda: list(dubbing.race_originals(unet, autoencoder, audio, 1.5, 4, False).values())
    assert all(result["equal"] for result in race())
    right = baseline_dubbing.attend
    monkeypatch.setattr(baseline_dubbing, "attend", lambda q, k, v, heads: right(q, v, k, heads))
    results = race()
    assert not any(result["equal"] for result in results)
    assert "seconds" not in results[0]
