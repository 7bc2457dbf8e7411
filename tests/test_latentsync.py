"""LatentSync: sound, faces, the network, the pipeline, and `sample.py latentsync`."""
import itertools
import math
import re
import resource
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from safetensors import safe_open

import latentsync
import sample
import train
import vq
from helpers import (CLIP, KL_CONFIG, ROOT, UNET_CONFIG, WHISPER_CONFIG, complaint, randn, run, same, script,
                     smooth_pictures, speech, tiny, weights, write_video)
from lib import bench, clips, dubbing, faces, videomae
from lib.console import UserError
from lib.talking_head import talking_head, talking_scene
from lib.video import Video, VideoWriter, read_sound


# ----------------------------------------------------------------------------------------------------------------------
# Sound


def test_mel_in_blocks_is_that_of_one_transform():
    """Against torch.stft over all of it; 61 s are three blocks, and reflections stand at both ends only."""
    sound = torch.from_numpy(speech(61.234))
    power = torch.stft(sound, 400, 160, window=torch.hann_window(400), return_complex=True)[:, :-1].abs() ** 2
    filters = torch.from_numpy(vq.slaney_mels(80, 0.0, 8000.0, 400, 16000)).float()
    mel = (filters @ power).clamp(min=1e-10).log10()
    expected = (mel.clamp(min=mel.max() - 8) + 4) / 4
    torch.testing.assert_close(latentsync.log_mel(sound), expected[:, :len(sound) // 160], atol=2e-5, rtol=0)


@pytest.mark.parametrize("samples", [320, 6400, 6400 + 330, 3 * 6400 + 5000])
def test_windows_are_those_of_all_features_at_once(dub_parts, samples):
    """However many pieces of 0.4 s the sound has, held one or two at a time."""
    ear, sound = dub_parts[2], torch.from_numpy(speech(2))[:samples]
    features = torch.cat(list(ear.pieces(sound)))
    assert len(features) == latentsync.count_rows(samples, 20)
    found = list(latentsync.windows(ear, sound))
    assert len(found) == latentsync.count_frames(len(features)) == len(features) // 2 + 2
    for frame, window in enumerate(found):
        rows = [min(max(r, 0), len(features) - 1) for r in range(2 * frame - 4, 2 * frame + 6)]
        assert torch.equal(window, features[rows].flatten(0, 1))


@pytest.mark.parametrize("samples", [320, 20 * 320, 21 * 320, 32 * 320, 33 * 320, 100 * 320 + 500])
@pytest.mark.parametrize("overlap", [1, 8])
def test_pieces_of_sound_may_overlap(dub_parts, samples, overlap):
    """Each row comes once, from the piece in which it is farther from an edge. 20 rows are a piece."""
    ear, sound = dub_parts[2], torch.from_numpy(speech(3))[:samples]
    mel = latentsync.log_mel(sound)
    rows = mel.shape[1] // 2
    found = torch.cat(list(ear.pieces(sound, overlap)))
    assert len(found) == rows == latentsync.count_rows(samples, 20)
    step = 20 - overlap
    for row in range(rows):
        piece = max(0, row - overlap // 2) // step
        if piece * step >= rows - overlap:                                  # the piece before reaches to the end
            piece = max(0, -(-(rows - overlap) // step) - 1)
        part = mel[:, 2 * step * piece:][:, :40]
        expected = ear(F.pad(part, (0, 40 - part.shape[1]))[None])[0, row - step * piece]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)
    assert torch.equal(torch.cat(list(ear.pieces(sound, 0))), torch.cat(list(ear.pieces(sound))))
    windows = list(latentsync.windows(ear, sound, overlap=overlap))
    index = latentsync.window_rows(len(windows) - 1, rows)
    assert torch.equal(windows[-1], found[index].flatten(0, 1))


def test_audio_windows_may_be_asymmetric(dub_parts):
    assert latentsync.window_rows(10, 99).tolist() == list(range(16, 26))
    assert latentsync.window_rows(10, 99, window=(1, 3)).tolist() == list(range(18, 28))
    assert latentsync.window_rows(0, 99, window=(3, 0)).tolist() == [0] * 6 + [0, 1]
    ear, sound = dub_parts[2], torch.from_numpy(speech(1))
    features = torch.cat(list(ear.pieces(sound)))
    for frame, window in enumerate(latentsync.windows(ear, sound, window=(0, 4))):
        index = latentsync.window_rows(frame, len(features), window=(0, 4))
        assert torch.equal(window, features[index].flatten(0, 1))


def test_too_little_sound():
    with pytest.raises(ValueError, match="expected at least 160"):
        latentsync.log_mel(np.zeros(159))
    with pytest.raises(ValueError, match="shorter than"):
        next(latentsync.windows(tiny(latentsync.Whisper, WHISPER_CONFIG), np.zeros(200, np.float32)))
    assert latentsync.log_mel(np.zeros(160, np.float32)).shape == (80, 1)   # less than a window: mirrored zeros


# ----------------------------------------------------------------------------------------------------------------------
# Faces


def test_the_mask_is_that_of_the_released_models():
    mask = latentsync.face_mask()
    assert mask.shape == (256, 256) and set(mask.unique().tolist()) == {0.0, 1.0}
    extent = lambda row: (int((mask[row] == 0).nonzero()[0]), int((mask[row] == 0).nonzero()[-1]))
    assert {row: extent(row) for row in (95, 128, 170, 200, 230, 242)} == {
        95: (9, 246), 128: (9, 247), 170: (12, 243), 200: (33, 223), 230: (76, 185), 242: (131, 152)}
    assert mask[127, 78:178].all() and not mask[128, 78:178].any() and mask[:95].all() and mask[243:].all()
    assert (mask == 0).float().mean().item() == pytest.approx(0.40699768)
    small = latentsync.face_mask(64)
    assert small.shape == (64, 64) and small.min() == 0 and small.max() == 1
    if not (CLIP / "mask.png").exists():
        pytest.skip("the authors' picture is not in the repository")
    from PIL import Image
    assert np.array_equal(np.asarray(Image.open(CLIP / "mask.png").convert("L")), mask.numpy() * 255)


def test_lanczos_is_opencv_s():
    """Sums over what cv2.resize(picture, (128, 128), interpolation=cv2.INTER_LANCZOS4) of opencv 5.0 gave. A weight is
    2047.49996 / 2048 in float64 and 2047.5 in float32: rounding it from the former changes 15 of the 16,384 pixels."""
    y, x = torch.meshgrid(torch.arange(140), torch.arange(105), indexing="ij")
    picture = (x * x * 7 + y * y * 3 + x * y) % 256
    out = latentsync.lanczos_resize(picture.float(), 128).long()
    assert out[60, :8].tolist() == [37, 87, 164, 64, 45, 206, 24, 66]
    assert (out.sum().item(), (out * torch.arange(128)).sum().item()) == (2088666, 132638663)


def test_aligned_points_stand_where_the_template_has_them():
    """Turned, scaled, moved, mirrored even: brows and nose come to their places, but for the smoothing's pixel."""
    for angle, scale in ((0.0, 1.0), (0.5, 0.3), (-2.5, 4.0)):
        align = latentsync.Aligner(256)
        assert align.canvas == (280, 210)
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        points = align.template @ turn.T * scale + torch.tensor([100.0, 37.0])
        matrix = align(points)
        there = points @ matrix[:, :2].T + matrix[:, 2]
        torch.testing.assert_close(there, align.template + align.bias, atol=1e-3, rtol=0)
        assert align.bias.abs().max() < 3                                   # upside down; upright it is a fraction
        torch.testing.assert_close(latentsync.inverse(latentsync.inverse(matrix)), matrix, atol=1e-3, rtol=1e-4)
    flipped = latentsync.Aligner(256)(align.template * torch.tensor([-1.0, 1.0]))
    assert flipped[:, :2].det() > 0                                         # faces are turned, never mirrored
    assert align(None) is None
    with pytest.raises(ValueError, match="not three points of a face"):
        align(torch.ones(3, 2))


def test_smoothing_is_a_running_average():
    points = torch.tensor([[40.0, 30], [80, 33], [58, 60]])
    wide = torch.tensor([[40.0, 30], [80, 33], [58, 50]])
    align, alone = latentsync.Aligner(256), latentsync.Aligner(256)
    first, second = align(points), align(wide)
    only = alone(wide)
    assert torch.equal(first[:, :2], latentsync.Aligner(256)(points)[:, :2]) and torch.equal(second[:, :2], only[:, :2])
    plain = only[:, 2] - alone.bias
    first_bias = latentsync.Aligner(256)
    first_bias(points)
    torch.testing.assert_close(second[:, 2], plain + 0.2 * first_bias.bias + 0.8 * alone.bias)


def test_points_of_all_kinds_of_landmarks():
    five = np.array([(30.0, 40), (70, 40), (50, 60), (35, 80), (65, 80)])
    np.testing.assert_allclose(latentsync.three_points(five), [(30, 26.8), (70, 26.8), (50, 60)])
    many = np.zeros((2, 106, 2))
    many[:, [43, 48, 49, 51, 50]] = (10.4, 20.4)
    np.testing.assert_array_equal(latentsync.three_points(many)[1], [(10, 20), (0, 0), (0, 0)])       # rounded
    assert latentsync.three_points(np.ones((4, 478, 2))).shape == (4, 3, 2)
    assert np.isnan(latentsync.three_points(np.full((1, 5, 2), np.nan))).all()
    for shape in ((4, 68, 2), (4, 5, 3), (5,), ()):
        with pytest.raises(ValueError, match="expected"):
            latentsync.three_points(np.zeros(shape))


@pytest.mark.parametrize("move", [(0, 0), (-60, 0), (70, 90), (500, 0)])
def test_pasting_the_face_of_a_frame_back_changes_it_little(move):
    """Wherever it lies, half outside of the frame included; and nothing at all beyond the face."""
    align, frame = latentsync.Aligner(64), F.interpolate(randn(1, 3, 8, 8), (120, 100), mode="bicubic")[0].sigmoid()
    frame = (frame * 255).byte().permute(1, 2, 0)
    points = align.template * 1.3 + torch.tensor([15.0, 20.0]) + torch.tensor(move)
    matrix = align(points)
    face = latentsync.align_face(frame, matrix, align.canvas, 64)
    assert face.shape == (3, 64, 64) and face.min() >= 0 and face.max() <= 255
    back = latentsync.paste_back(frame, face / 127.5 - 1, matrix, align.canvas)
    assert back.shape == frame.shape and back.dtype == torch.uint8
    far = (back.int() - frame.int()).abs()
    assert far.float().mean() < 3
    other = latentsync.paste_back(frame, -torch.ones(3, 64, 64), matrix, align.canvas)
    changed = (other != frame).any(-1)
    there = latentsync.warp(torch.ones(1, *align.canvas), latentsync.inverse(matrix), changed.shape, 0.0)
    there = F.max_pool2d(there, 3, 1, 1)[0] > 0                             # the blur may reach a pixel beyond
    assert not (changed & ~there).any() and changed.any() == (move[0] < 100)


# ----------------------------------------------------------------------------------------------------------------------
# The network


def inputs(B=2, frames=3, side=16):
    return randn(B, 13, frames, side, side), torch.tensor([5, 700])[:B], randn(B, frames, 20, 16)


def test_clips_of_a_batch_do_not_mix(dub_parts):
    unet, (x, t, audio) = dub_parts[0], inputs()
    both = unet(x, t, audio)
    assert both.shape == (2, 4, 3, 16, 16)
    for i in range(2):
        torch.testing.assert_close(unet(x[i:i + 1], t[i:i + 1], audio[i:i + 1]), both[i:i + 1], atol=2e-5, rtol=0)
    assert (unet(x, t, torch.zeros_like(audio)) - unet(x, t, None)).abs().max() > 1e-3       # the output has a bias


def test_frames_know_of_each_other_by_norms_and_motion_modules(dub_parts):
    x, t, audio = inputs(1)
    changed = x.clone()
    changed[:, :, 2] += 1
    moves, still = dub_parts[0], tiny(latentsync.UNet, replace(UNET_CONFIG, motion="none"))
    for unet in (moves, still):
        assert (unet(x, t, audio) - unet(changed, t, audio))[:, :, 0].abs().max() > 1e-4
    flip = lambda model: (model(x.flip(2), t, audio.flip(1)).flip(2) - model(x, t, audio)).abs().max()
    assert flip(still) < 2e-5 < 1e-3 < flip(moves)                          # only motion modules know the order


@pytest.mark.parametrize("side", [10, 11, 13])
def test_maps_that_do_not_halve(dub_parts, side):
    x, t, audio = inputs(1, side=side)
    assert dub_parts[0](x, t, audio).shape == (1, 4, 3, side, side)


def test_cached_deep_layers(dub_parts):
    """The same input again: the same output, from a fraction of the work."""
    unet, (x, t, audio) = dub_parts[0], inputs()
    noise, deep = unet.forward_with_deep(x, t, audio)
    again, same_deep = unet.forward_with_deep(x, t, audio, deep)
    assert same_deep is deep
    torch.testing.assert_close(again, noise, atol=1e-5, rtol=0)
    other, _ = unet.forward_with_deep(x + 1, t, audio, deep)
    assert (other - noise).abs().max() > 1e-4


def test_guidance_mixes_two_branches(dub_parts):
    unet, (x, _, audio) = dub_parts[0], inputs(1)
    z, condition = x[:, :4], x[:, 4:]
    step = lambda **kwargs: next(latentsync.denoise(unet, z, condition, audio, steps=2, **kwargs))
    silent = next(latentsync.denoise(unet, z, condition, torch.zeros_like(audio), steps=2, cfg=1.0))
    torch.testing.assert_close(step(cfg=2.0), silent + 2 * (step(cfg=1.0) - silent), atol=1e-4, rtol=0)
    assert torch.equal(step(cfg=0.5), step(cfg=1.0))  # guidance below 1 is none, as in the original


def test_noise_of_a_clip():
    noise = latentsync.mixed_noise((4, 4, 16, 16, 16), torch.Generator().manual_seed(0))
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    between = (noise[:, :, 0] * noise[:, :, 1]).mean().item()               # half of the variance is common
    assert between == pytest.approx(0.5, abs=0.05)
    z, t = randn(2, 4, 3, 4, 4), torch.tensor([0, 999])
    noisy = latentsync.add_noise(z, noise[:2, :, :3, :4, :4], t)
    torch.testing.assert_close(latentsync.remove_noise(noisy, noise[:2, :, :3, :4, :4], t), z, atol=1e-4, rtol=0)


def test_training_starts_from_no_noise_and_reaches_all_weights():
    model = vq.build(latentsync.UNet, UNET_CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    x, t, audio = inputs()
    assert not model(x, t, audio).any()
    loss, _ = model.loss(x[:, :4], x[:, 4:], audio, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(1, abs=0.1)                         # the noise's variance
    model.conv_out.weight.data.normal_()
    for m in model.modules():
        if isinstance(m, latentsync.MotionModule):
            m.proj_out.weight.data.normal_()
    model.loss(x[:, :4], x[:, 4:], audio, torch.Generator().manual_seed(0))[0].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_posterior():
    posterior = vq.Posterior(randn(2, 4, 3, 3), torch.full((2, 4, 3, 3), 0.5), 0.2)
    assert torch.equal(posterior.sample(), posterior.mean * 0.2)
    draw = lambda: posterior.sample(torch.Generator().manual_seed(3))
    assert torch.equal(draw(), draw()) and not torch.equal(draw(), posterior.sample())
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(posterior.kl(), expected)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_save_and_load(dub_parts, dub_files):
    for model, path, load in zip(dub_parts, ("dub", "talking_head_kl", "talking_head_whisper"),
                                 (latentsync.load, vq.load_autoencoder, latentsync.load_whisper)):
        again = load(dub_files / f"{path}.safetensors")
        assert again.config == model.config
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    with safe_open(dub_files / "dub.safetensors", "pt") as f:
        assert not [k for k in f.keys() if k.endswith(".pe")]               # computed anew


def test_released_sizes():
    """Numbers of the notes: parameters, keys of the official files."""
    for name, parameters, keys in (("latentsync_1.5", 1267.1, 1246), ("latentsync_1.0", 850.0, 686),
                                   ("latentsync_1.5_efficient", 1100.2, None)):
        with torch.device("meta"):
            model = latentsync.UNet(latentsync.CONFIGS[name])
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.05)
        exported = latentsync.export(model)
        assert keys in (None, len(exported))
        config = latentsync.infer_config(exported, "a.pt")
        assert config == replace(latentsync.CONFIGS[name], resolution=256)
    temporal = "up_blocks.3.motion_modules.2.temporal_transformer.transformer_blocks.0"
    shapes = {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 384),
              "conv_in.weight": (320, 13, 3, 3), f"{temporal}.attention_blocks.1.to_out.0.bias": (320,),
              "up_blocks.0.resnets.0.conv1.weight": (1280, 2560, 3, 3), "up_blocks.2.resnets.2.norm1.weight": (960,),
              "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
              "down_blocks.2.downsamplers.0.conv.bias": (1280,), "up_blocks.2.upsamplers.0.conv.bias": (640,)}
    assert {k: tuple(exported[k].shape) for k in shapes} == shapes
    with torch.device("meta"):
        autoencoder = vq.KLAutoencoder(vq.CONFIGS["sd-vae-ft-mse"])
    assert sum(p.numel() for p in autoencoder.parameters()) / 1e6 == pytest.approx(83.7, abs=0.05)
    assert len(vq.export(autoencoder)) == 248


def test_keys_of_version_1_0(tmp_path):
    model = tiny(latentsync.UNet, replace(UNET_CONFIG, motion="none"))
    official = latentsync.export(model)
    old = vq.rename_keys(official, latentsync.VERSION_1_0, inverse=True)
    assert [k for k in old if "audio_cross_attn" in k] and set(old) != set(official)
    torch.save({"global_step": 7, "state_dict": old}, tmp_path / "latentsync_unet.pt")
    again = latentsync.load(tmp_path / "latentsync_unet.pt", model.config)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())


def test_starting_from_stable_diffusion(tmp_path):
    """4 channels in, text of another width, no motion modules; in diffusers' folder."""
    config = replace(UNET_CONFIG, motion="none", in_channels=4, audio_width=24)
    theirs = latentsync.export(tiny(latentsync.UNet, config, seed=1))
    vq.save_checkpoint(tmp_path / "diffusion_pytorch_model.safetensors", theirs, UNET_CONFIG)
    model = vq.build(latentsync.UNet, UNET_CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in latentsync.export(model).items()}
    latentsync.start_from_stable_diffusion(model, tmp_path)
    after = latentsync.export(model)
    for k, v in after.items():
        if k.startswith("conv_in."):
            assert not v.any()
        elif "motion_modules" in k or k.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            assert torch.equal(v, before[k]), k
        else:
            assert torch.equal(v, theirs[k]), k
    x, t, audio = inputs()
    assert torch.equal(model(x, t, audio), model(-x, t, audio))             # it sees nothing yet


def test_files_that_do_not_fit(dub_parts, dub_files, tmp_path):
    with pytest.raises(vq.CheckpointError, match="not a UNet of LatentSync"):
        latentsync.load(dub_files / "talking_head_kl.safetensors")
    with pytest.raises(vq.CheckpointError, match="not a Whisper model"):
        latentsync.load_whisper(dub_files / "dub.safetensors")
    state = latentsync.export(dub_parts[0])
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    with pytest.raises(vq.CheckpointError, match=r"widths \(32, 64\); no tensor tells its number of heads"):
        latentsync.load(tmp_path / "a.pt")
    del state["mid_block.resnets.0.conv1.weight"]
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    with pytest.raises(vq.CheckpointError, match="1 missing: mid_block.resnets.0.conv1.weight"):
        latentsync.load(tmp_path / "a.pt", UNET_CONFIG)


# ----------------------------------------------------------------------------------------------------------------------
# The pipeline


def scene(count, size=(60, 50), seed=0):
    """[(picture, map)] of a face that moves a little."""
    align = latentsync.Aligner(32)
    move = torch.linspace(0, 6, count)
    points = [align.template + torch.tensor([8.0, 6.0]) + m for m in move]
    frames = F.interpolate(smooth_pictures(count, 16, seed).float(), size, mode="bilinear").byte()
    frames = frames.permute(0, 2, 3, 1).numpy()
    return [(frame, align(p)) for frame, p in zip(frames, points)]


def dub(dub_parts, frames, seconds=2, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    windows = latentsync.windows(dub_parts[2], speech(seconds))
    return list(latentsync.lipsync(*dub_parts[:2], frames, windows, generator, **{"steps": 2} | options))


def test_a_dub_is_as_long_as_the_shorter_input(dub_parts):
    assert len(dub(dub_parts, scene(10))) == 10
    assert len(dub(dub_parts, scene(10), seconds=0.1)) == 4                     # 5 rows: 2 + 2 frames
    assert not dub(dub_parts, [])


def test_what_is_kept_and_what_is_painted(dub_parts):
    mask = latentsync.face_mask(32)
    for found, (picture, _) in zip(dub(dub_parts, scene(5)), scene(5)):
        assert np.array_equal(found.source, picture)
        assert found.picture.shape == picture.shape
        assert found.picture.dtype == np.uint8
        assert torch.equal(found.generated * (mask == 1), found.face * (mask == 1))
        assert torch.equal(found.masked, found.face * mask)                 # mid-grey where it is masked
        assert (found.generated - found.face)[:, mask == 0].abs().mean() > 0.01


def test_frames_without_a_face_stay_as_they_are(dub_parts):
    frames = scene(11)
    for i in (0, 4, 5, 6, 7, 10):                                           # a whole clip of four among them
        frames[i] = frames[i][0], None
    found = dub(dub_parts, frames)
    assert len(found) == 11
    for i, dubbed in enumerate(found):
        unchanged = frames[i][1] is None
        assert (dubbed.generated is None) == unchanged and np.array_equal(dubbed.picture, frames[i][0]) == unchanged


def test_chunks_do_not_depend_on_what_follows(dub_parts):
    """The first clip of a long video is that of a short one, bit for bit: the noise is shared, draws come in order."""
    long, short = dub(dub_parts, scene(12)), dub(dub_parts, scene(12)[:4])
    for a, b in zip(long, short):
        assert np.array_equal(a.picture, b.picture)
    assert not np.array_equal(dub(dub_parts, scene(4), seed=1)[0].picture, short[0].picture)


@pytest.mark.parametrize("count", [1, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("overlap", [1, 3])
def test_overlap_cross_fades(dub_parts, count, overlap):
    found, plain = dub(dub_parts, scene(count), overlap=overlap), dub(dub_parts, scene(count))
    assert [f.source.tobytes() for f in found] == [p.source.tobytes() for p in plain]
    for a, b in list(zip(found, plain))[:min(count, 4 - overlap)]:
        assert np.array_equal(a.picture, b.picture)                         # before the first border nothing changes
    with pytest.raises(ValueError, match="expected 0 .. 3"):
        dub(dub_parts, scene(2), overlap=4)


def test_a_cross_fade_goes_from_one_clip_to_the_next(dub_parts, monkeypatch):
    """With clips that paint plain 1, 2, 3 ... the border is a staircase."""
    value = itertools.count(1)

    def paint(unet, autoencoder, faces, audio, **options):
        return torch.full_like(faces, next(value)), faces
    monkeypatch.setattr(latentsync, "paint", paint)
    found = [dubbed.generated.mean().item() for dubbed in dub(dub_parts, scene(7), overlap=2)]
    assert found == pytest.approx([1, 1, 4 / 3, 5 / 3, 2, 2 + 1 / 3, 2 + 2 / 3]) or found == pytest.approx(
        [1, 1, 4 / 3, 5 / 3, 7 / 3, 8 / 3, 3])


def test_only_a_clip_is_held(dub_parts):
    """The pipeline asks for four frames, not for the next ones before these are out."""
    asked = []

    def frames():
        for i, frame in enumerate(scene(12)):
            asked.append(i)
            yield frame
    stream = latentsync.lipsync(*dub_parts[:2], frames(), latentsync.windows(dub_parts[2], speech(2)),
                                torch.Generator().manual_seed(0), steps=1)
    next(stream)
    assert len(asked) == 4
    next(itertools.islice(stream, 3, None))
    assert len(asked) == 8


# ----------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def clip(tmp_path, av):
    """(video, sound, landmarks): 20 frames of 50 x 60 pixels with a face."""
    align = latentsync.Aligner(32)
    points = np.stack([(align.template + torch.tensor([8.0, 6.0]) + i / 4).numpy() for i in range(20)])
    np.savez(tmp_path / "points.npz", landmarks=points)
    frames = F.interpolate(smooth_pictures(20).float(), (60, 50), mode="bilinear").byte()
    soundfile.write(tmp_path / "speech.wav", speech(1.2), 16000)
    return write_video(tmp_path / "in.mp4", frames), tmp_path / "speech.wav", tmp_path / "points.npz"


def command(dub_files, clip, out, *more):
    return ("latentsync", "--ckpt", dub_files / "dub.safetensors", "--video", clip[0], "--audio", clip[1], "--steps", 2,
            "--device", "cpu", "--out", out, *(("--landmarks", clip[2]) if "--aligned" not in more else ()), *more)


def test_dubbing_by_the_command(dub_files, clip, tmp_path, capsys):
    """1.2 s of sound for 0.8 s of video: it goes back and forth; length, sound and surroundings are right."""
    run(sample, *command(dub_files, clip, tmp_path / "out.mp4"))
    said = capsys.readouterr()
    assert "32 frames of 1.28 s" in said.out and "out.mp4" in said.out
    before, after = list(Video(clip[0])), list(Video(tmp_path / "out.mp4"))
    assert len(after) == 32 and after[0].shape == (60, 50, 3)
    order = [*range(20), *reversed(range(20))][:32]
    edge = [np.abs(after[i][:4].astype(int) - before[order[i]][:4]).mean() for i in range(32)]
    assert max(edge) < 3                                                    # up to the codec
    wrong = np.mean([np.abs(after[i][:4].astype(int) - before[(order[i] + 10) % 20][:4]).mean() for i in range(32)])
    assert wrong > 3 * np.mean(edge)                                        # the measure can tell frames apart
    heard, spoken = read_sound(tmp_path / "out.mp4"), speech(1.2)
    assert abs(len(heard) - 1.28 * 16000) < 2100                            # AAC comes in blocks of 1024
    lag = np.argmax(np.correlate(heard[:19200], spoken[:16000], "valid"))
    assert np.corrcoef(heard[lag:lag + 16000], spoken[:16000])[0, 1] > 0.9


def test_same_seed_same_video(dub_files, clip, tmp_path, monkeypatch):
    """The frames before they are encoded: on a busy machine x264 writes other bytes for the same frames."""
    write = VideoWriter.write
    frames = {}

    def noted(self, frame):
        frames[self.path.stem].append(frame)
        write(self, frame)
    monkeypatch.setattr(VideoWriter, "write", noted)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        frames[name] = []
        run(sample, *command(dub_files, clip, tmp_path / f"{name}.mp4", "--seed", seed, "--overlap", 1, "--deep-cache"))
    assert np.array_equal(frames["a"], frames["b"]) and not np.array_equal(frames["a"], frames["c"])


def test_steps_grid_and_aligned(dub_files, clip, tmp_path, capsys):
    run(sample, *command(dub_files, clip, tmp_path / "grid.mp4", "--steps-grid"))
    grid = next(iter(Video(tmp_path / "grid.mp4")))
    assert grid.shape == (128, 3 * 128 + 108, 3)                            # widths are even
    run(sample, *command(dub_files, clip, tmp_path / "aligned.mp4", "--aligned"))
    before, after = (next(iter(Video(path))) for path in (clip[0], tmp_path / "aligned.mp4"))
    assert np.abs(before.astype(int) - after)[:12].mean() < 6               # above the mask


def test_frames_without_a_face_by_the_command(dub_files, clip, tmp_path, capsys):
    points = np.load(clip[2])["landmarks"]
    points[5:12] = np.nan
    np.savez(tmp_path / "some.npz", landmarks=points)
    run(sample, *command(dub_files, (*clip[:2], tmp_path / "some.npz"), tmp_path / "out.mp4"))
    assert "note: 11 of 32 frames have no face; they stay as they were" in capsys.readouterr().err


def test_what_cannot_be_dubbed(dub_files, clip, tmp_path, capsys):
    out = tmp_path / "out.mp4"

    def error(*changes, clip=clip):
        line = complaint(capsys, sample, *command(dub_files, clip, out, *changes))
        assert not out.exists() and not list(tmp_path.glob(".*"))
        return line
    zeros = np.load(clip[2])["landmarks"]
    zeros[3:] = 0                                                           # what some detectors give for no face
    np.savez(tmp_path / "zeros.npz", landmarks=zeros)
    run(sample, *command(dub_files, (*clip[:2], tmp_path / "zeros.npz"), tmp_path / "zeros.mp4"))
    assert "29 of 32 frames have no face" in capsys.readouterr().err
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "short.wav", np.zeros(300), 16000)
    with_sound = lambda name: (clip[0], tmp_path / name, clip[2])
    assert "none.wav: there is no sound in it, not one sample" in error(clip=with_sound("none.wav"))
    assert "short.wav: 18 ms of sound; expected 40" in error(clip=with_sound("short.wav"))
    assert "in.mp4: has no sound" in error(clip=(clip[0], clip[0], clip[2]))
    for name, array, what in (("few.npz", np.load(clip[2])["landmarks"][:9], "are for 9 frames, expected 20"),
                              ("odd.npz", np.zeros((20, 68, 2)), "landmarks of shape (20, 68, 2): expected"),
                              ("nan.npz", np.full((20, 3, 2), np.nan), "with a face in one frame at least")):
        np.savez(tmp_path / name, landmarks=array)
        assert what in error(clip=(*clip[:2], tmp_path / name))
    (tmp_path / "text.npz").write_text("no")
    assert "expected an .npz with an array 'landmarks'" in error(clip=(*clip[:2], tmp_path / "text.npz"))
    assert "no such file" in error(clip=(*clip[:2], tmp_path / "gone.npz"))
    assert "--json goes with --bench" in error("--json", tmp_path / "a.json")
    assert "--landmarks and --aligned exclude" in complaint(capsys, sample, *command(dub_files, clip, out), "--aligned")
    assert "--overlap 16: expected 0 .. 15" in error("--overlap", 16)
    assert "ends in .mp4" in complaint(capsys, sample, *command(dub_files, clip, tmp_path / "out.avi"))
    assert "would replace what it is made from" in complaint(capsys, sample, *command(dub_files, clip, clip[0]))
    assert "what is to be said" in complaint(capsys, sample, "latentsync", "--video", clip[0], "--device", "cpu")
    assert "--overlap 4: expected 0 .. 3" in error("--overlap", 4)
    assert "an autoencoder without tokens" in complaint(
        capsys, sample, "vq", "--ckpt", dub_files / "talking_head_kl.safetensors", "--out", tmp_path / "a.png")
    assert "emoji_vq.safetensors: not an autoencoder" in error("--vae", ROOT / "demo" / "emoji_vq.safetensors")
    (tmp_path / "empty.npz").touch()
    assert "expected an .npz" in error(clip=(*clip[:2], tmp_path / "empty.npz"))
    assert "talking_head_kl.safetensors: not a UNet" in complaint(
        capsys, sample, "latentsync", "--ckpt", dub_files / "talking_head_kl.safetensors", "--device", "cpu")
    other = tmp_path / "other.safetensors"
    vq.save(tiny(vq.KLAutoencoder, KL_CONFIG, seed=5), other)
    assert "is not the tokenizer that" in error("--vae", other)
    latentsync.save(tiny(latentsync.Whisper, replace(WHISPER_CONFIG, width=32)), other)
    assert "its features are 32 wide" in error("--whisper", other)


def test_files_that_hold_no_landmarks(tmp_path):
    good = np.random.default_rng(0).uniform(0, 50, (9, 3, 2))
    np.save(tmp_path / "plain.npy", good)
    np.savez(tmp_path / "other.npz", points=good, names=np.arange(3))
    np.savez(tmp_path / "empty.npz")
    np.savez(tmp_path / "words.npz", landmarks=good.astype(str))
    np.savez(tmp_path / "object.npz", landmarks=np.array([good, None], object))
    np.savez(tmp_path / "far.npz", landmarks=good * 1e9)
    np.savez(tmp_path / "good.npz", landmarks=good)
    data = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[:len(data) // 2])
    (tmp_path / "huge.npz").write_bytes(data.replace(b"(9, 3, 2)", b"(9e9,3,2)"))
    (tmp_path / "text.txt").write_text("10 20\n30 40\n")
    for name, reason in (("plain.npy", "not an .npz file"), ("text.txt", "not an .npz file"),
                         ("other.npz", "has no array 'landmarks', only points, names"),
                         ("empty.npz", "has no array 'landmarks', only nothing"),
                         ("words.npz", "its landmarks are no numbers but of type <U"), ("object.npz", "Object arrays"),
                         ("far.npz", "coordinates up to 4.99e+10, expected pixels"), ("cut.npz", ""), ("huge.npz", ""),
                         ("no.npz", "no such"), (".", "Is a directory")):
        with pytest.raises(UserError, match=re.escape(f"--landmarks {tmp_path / name}: {reason}")) as e:
            faces.given_points(tmp_path / name, 9)
        assert "expected an .npz with an array 'landmarks' (frames, N, 2)" in str(e.value)
    np.testing.assert_array_equal(faces.given_points(tmp_path / "good.npz", 9), good)


@pytest.mark.parametrize("path, pixels, why", [
    ("LatentSync-1.6/latentsync_unet.pt", 512, "LatentSync-1.6"),
    ("models--ByteDance--LatentSync-1.6/snapshots/0123abcd/latentsync_unet.pt", 512, "LatentSync-1.6"),
    ("LatentSync-1.6/checkpoints/latentsync_unet.pt", 512, "LatentSync-1.6"),
    ("x/latentsync_v1.5.pt", 256, "latentsync_v1.5"), ("LatentSync-1.6/a/latentsync_1.5.pt", 256, "latentsync_1.5"),
    ("latentsync_1.5/models-v1.6.2/unet.pt", 256, "latentsync_1.5"), ("models-v1.6.2/latentsync_unet.pt", None, ""),
    ("latentsync-1.6.2/unet.pt", None, ""), ("checkpoints/latentsync_unet.pt", None, ""), ("1.6/unet.pt", None, "")])
def test_the_resolution_comes_from_a_name(path, pixels, why):
    found = dubbing.named_resolution("latentsync.pt", path)
    assert found == (pixels, f"{why} in its path" if why else "")


def test_a_resolution_is_said_or_asked_for(dub_parts, dub_files, clip, tmp_path, capsys, monkeypatch):
    """Files like the released ones: the name of a folder tells it, version 1.0 has no motion modules, else we ask."""
    monkeypatch.setitem(latentsync.CONFIGS, "tiny", UNET_CONFIG)
    monkeypatch.setattr(dubbing, "RESOLUTIONS", {"1.5": 32, "1.6": 64})
    def load(name, motion="all"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        state = latentsync.export(tiny(latentsync.UNet, replace(UNET_CONFIG, motion=motion)))
        torch.save({"state_dict": state}, path)
        companions = [f"--{flag}={dub_files / f'talking_head_{name}.safetensors'}"
                      for flag, name in (("vae", "kl"), ("whisper", "whisper"))]
        _, resolution, _, unet, _, _ = dubbing.load_models(sample.parse_args(
            ["latentsync", "--ckpt", str(path), *companions]))
        return resolution, unet.config.resolution
    assert load("LatentSync-1.6/snapshots/123/unet.pt") == ("faces of 64 pixels (LatentSync-1.6 in its path)", 64)
    assert load("checkpoints/unet.pt", motion="none") == ("faces of 32 pixels (version 1.0)", 32)
    with pytest.raises(UserError, match=r"or say it: --resolution 256 \(version 1.5\) or 512 \(1.6\)"):
        load("checkpoints/unet.pt")
    run(sample, *command(dub_files, clip, tmp_path / "out.mp4"))
    assert "faces of 32 pixels (as its file says), " in capsys.readouterr().out


@pytest.mark.slow
def test_a_full_disk_leaves_no_video(dub_files, clip, tmp_path):
    """No file may be larger than 4 kB: what a full disk looks like to a program."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    argv = command(dub_files, clip, tmp_path / "full" / "out.mp4")
    code = ("import signal, runpy, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            f"sys.argv[1:] = {[str(a) for a in argv]}; runpy.run_path('sample.py', run_name='__main__')")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
    assert result.returncode == 2 and "out.mp4: cannot be written" in result.stderr and "Traceback" not in result.stderr
    assert not list((tmp_path / "full").iterdir())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_a_dub(dub_files, tmp_path, av):
    """Peak memory of the whole command: 1 s and 12 s of sound for 0.4 s of video of 256 x 256 pixels."""
    write_video(tmp_path / "a.mp4", smooth_pictures(10, 256))
    peaks = []
    for seconds in (1, 12):
        soundfile.write(tmp_path / "a.wav", speech(seconds), 16000)
        argv = command(dub_files, (tmp_path / "a.mp4", tmp_path / "a.wav"), tmp_path / "b.mp4", "--aligned", "--steps",
                       1)
        code = (f"import resource, runpy, sys; sys.argv[1:] = {[str(a) for a in argv]}; "
                "runpy.run_path('sample.py', run_name='__main__'); "
                "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout.split()[-1]) / 1000)                 # MB
    assert peaks[1] - peaks[0] < 50, peaks      # the frames would be 110 MB more, and runs differ by 20


def test_back_and_forth_in_pieces(clip):
    """Backwards a video is decoded piece by piece: whatever their size, the frames are the same."""
    video = Video(clip[0])
    frames, order = list(video), [*range(20), *reversed(range(20)), *range(20)][:50]
    for held in (1, 3 * 60 * 50 * 7, 2**27):
        found = list(dubbing.forth_and_back(video, 50, held))
        assert [number for number, _ in found] == order
        assert all(np.array_equal(picture, frames[number]) for number, picture in found)
    assert len(list(dubbing.forth_and_back(video, 7))) == 7


def test_any_rate_and_ten_bits(dub_files, clip, tmp_path, av):
    """30 frames a second, 10 bits per color, an odd size and 16 x 9: dubbed all the same, at 25."""
    frames = F.interpolate(smooth_pictures(24).float(), (61, 109), mode="bilinear").byte().permute(0, 2, 3, 1).numpy()
    with av.open(str(tmp_path / "odd.mkv"), "w") as out:
        stream = out.add_stream("ffv1", rate=30)
        stream.height, stream.width, stream.pix_fmt = 61, 109, "yuv420p10le"
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))
            frame.pts, frame.time_base = i, Fraction(1, 30)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    run(sample, *command(dub_files, (tmp_path / "odd.mkv", *clip[1:]), tmp_path / "out.mp4", "--aligned"))
    found = list(Video(tmp_path / "out.mp4"))
    assert len(found) == 32 and found[0].shape == (62, 110, 3)              # even: the codec halves colors
    assert np.abs(found[0][:8, :100].astype(int) - frames[0][:8, :100]).mean() < 12


class Detector:
    """In place of a network: faces at given times. {frame: [(x0, y0, x1, y1)]}"""

    def __init__(self, boxes):
        self.boxes, self.looked = boxes, []

    def __call__(self, video, device, every, count, instead):
        def row(box):
            x0, y0, x1, y1 = box
            w, h = x1 - x0, y1 - y0
            return (*box, x0 + .3 * w, y0 + .4 * h, x0 + .7 * w, y0 + .4 * h, x0 + .5 * w, y0 + .6 * h,
                    x0 + .35 * w, y0 + .8 * h, x0 + .65 * w, y0 + .8 * h)
        return [[row(b) for b in self.boxes.get(i, ())] if i % every == 0 else [] for i in range(40)], [20]


@pytest.mark.parametrize("every", [1, 3])
def test_faces_are_followed(monkeypatch, every):
    """Two people in the first scene, one in the second, who comes late."""
    big, small, late = (10, 10, 110, 130), (200, 10, 270, 90), (50, 50, 150, 170)
    boxes = {i: [small, big] for i in range(20)} | {i: [late] for i in range(30, 40)}
    monkeypatch.setattr(dubbing, "find_faces", Detector(boxes))
    args = sample.parse_args(["latentsync", "--detect-every", str(every)])
    find = lambda: dubbing.detected_points(type("Video", (), {"path": "a.mp4"}), torch.device("cpu"), args)
    points = find()
    there = ~np.isnan(points[:, 0, 0])
    assert there[:20].all() and there[32:].all() and not there[20:27].any()
    assert points[5, 2, 0] == pytest.approx(60) and points[35, 2, 0] == pytest.approx(100)
    args.face = 2
    second = find()
    assert second[5, 2, 0] == pytest.approx(235) and np.isnan(second[20:]).all()
    args.face = 3
    with pytest.raises(UserError, match="--face 3: there are never more than 2"):
        find()
    # somebody who jumps, in the same scene: another track, but the same rank
    jumped = {i: [(300, 10, 420, 130)] if i > 9 else [big] for i in range(20)}
    monkeypatch.setattr(dubbing, "find_faces", Detector(jumped))
    args.face = 1
    points = find()
    assert points[4, 2, 0] == pytest.approx(60)
    assert points[15, 2, 0] == pytest.approx(360)
    assert not np.isnan(points[:20]).any()
    monkeypatch.setattr(dubbing, "find_faces", Detector({}))
    with pytest.raises(UserError, match="no face of 50 pixels or more in any of 40 frames"):
        find()


def test_detecting_a_real_face(dub_files, tmp_path, av, capsys):
    """Against the landmarks that are known of the first frame; and a video without faces says so."""
    pytest.importorskip("facenet_pytorch", reason="optional; .ci/run installs it and runs these tests once more")
    frames = F.interpolate(smooth_pictures(8).float(), (80, 64), mode="bilinear").byte()
    blank, out = write_video(tmp_path / "blank.mp4", frames, speech(0.3)), tmp_path / "out.mp4"
    line = complaint(capsys, sample, "latentsync", "--ckpt", dub_files / "dub.safetensors", "--video", blank, "--audio",
                     blank, "--device", "cpu", "--out", out)
    assert "blank.mp4: no face of 50 pixels or more in any of 8 frames" in line and not out.exists()
    if not CLIP.exists():
        pytest.skip("the real clip is not in the repository")
    args = sample.parse_args(["latentsync", "--detect-every", "25"])
    points = dubbing.detected_points(Video(CLIP / "demo1_video.mp4"), torch.device("cpu"), args)
    known = np.array([(280.3, 327.5), (328.6, 334.8), (297.8, 357.6)])
    assert np.abs(points[0] - known).max() < 6 and not np.isnan(points).any()


@pytest.mark.slow
def test_the_demo(tmp_path, av):
    """No arguments but fewer steps: a video, and what SyncNet says before and after."""
    result = script("sample.py", "latentsync", "--steps", 2, "--out", tmp_path / "out.mp4")
    assert result.returncode == 0, result.stderr
    assert re.search(r"before: .*confidence [\d.]+.*\nafter: .*confidence [\d.]+", result.stdout)
    assert len(list(Video(tmp_path / "out.mp4"))) == 122


def test_random_weights_and_bench(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(vq.CONFIGS, "talking_head_kl", KL_CONFIG)
    monkeypatch.setitem(latentsync.WHISPERS, "talking_head", WHISPER_CONFIG)
    monkeypatch.setitem(latentsync.CONFIGS, "talking_head", UNET_CONFIG)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e9)
    run(sample, "latentsync", "--bench", "--random-weights", "talking_head", "--frames", 2, "--steps", 1, "--device",
        "cpu", "--json", tmp_path / "a.json")
    out = capsys.readouterr().out
    assert re.search(r"unet +[\d.]+", out) and "share of the limit" in out and "32 pixels, 2 frames in a clip" in out
    assert "choose one of latentsync_1.5" in complaint(
        capsys, sample, "latentsync", "--bench", "--random-weights", "latentsync_9", "--device", "cpu")


# ----------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("name", ["vq", "whisper", "videomae"])
def test_resumed_runs_equal_uninterrupted_ones(dub_files, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(vq.CONFIGS, "talking_head_kl", KL_CONFIG)
    monkeypatch.setitem(latentsync.WHISPERS, "talking_head", replace(WHISPER_CONFIG, positions=240))
    monkeypatch.setitem(videomae.VIDEOMAES, "talking_head", videomae.VideoMAEConfig(64, 16, 16, 2, 16, 1, 2, 32, 0))
    monkeypatch.setattr(clips, "VAL_HEADS", 2)
    monkeypatch.setattr(clips.HeadPictures, "__init__", lambda self, first, people: vars(self).update(
        pixels=smooth_pictures(12, 64), fingerprint="none"))
    more = ("--recipe", "talking_head") if name == "vq" else ("--videos", 4)
    argv = (name, *more, "--steps", 2, "--batch-size", 2, "--device", "cpu", "--log-every", 1, "--val-every", 2,
            "--sample-every", 0, "--save-every", 0)
    run(train, *argv, "--out", tmp_path / "a")
    run(train, *argv, "--out", tmp_path / "b", "--stop-after", 1)
    run(train, *argv, "--out", tmp_path / "b", "--resume", "auto")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_velocities_are_noise_in_other_words():
    """Of the same latents and noise; and a network that predicts them is sampled and trained accordingly."""
    z, noise, t = randn(3, 4, 2, 4, 4), randn(3, 4, 2, 4, 4), torch.tensor([0, 500, 999])
    noisy, v = latentsync.add_noise(z, noise, t), latentsync.velocity(z, noise, t)
    torch.testing.assert_close(latentsync.noise_of(v, noisy, t), noise, atol=1e-5, rtol=0)
    class Oracle:
        """Knows z: every sampler must end there, whatever it is told in."""

        def __init__(self, velocity):
            self.config = replace(UNET_CONFIG, velocity=velocity)

        def forward_with_deep(self, x, t, audio, deep):
            true = latentsync.add_noise(torch.zeros_like(z[:1]), torch.ones_like(z[:1]), t)     # sqrt(1 - alpha)
            found = (x[:, :4] - (1 - true**2).sqrt() * z[:1]) / true
            return (latentsync.velocity(z[:1], found, t) if self.config.velocity else found), None
    for kind in (False, True):
        *_, last = latentsync.denoise(Oracle(kind), noise[:1], randn(1, 9, 2, 4, 4), randn(1, 2, 20, 16), 20, 1.0)
        torch.testing.assert_close(last, latentsync.add_noise(z[:1], noise[:1], torch.tensor([0])), atol=0.1, rtol=0)


def test_scenes_have_their_landmarks():
    """A filmed head, aligned by its points, stands like the heads that models are trained on."""
    frames, _, points = talking_scene(85, 1.0)
    align, heads = latentsync.Aligner(64), talking_head(85, 1.0)[0]
    faces = [latentsync.align_face(f.permute(1, 2, 0), align(p), align.canvas, 64) for f, p in zip(frames, points)]
    error = torch.stack([(face - head.float()).abs().mean() for face, head in zip(faces[::6], heads[::6])]).mean()
    pairs = zip(faces[::6], heads[::6])
    shifted = torch.stack([(face.roll(8, 2) - head.float()).abs().mean() for face, head in pairs]).mean()
    assert error < 0.7 * shifted
