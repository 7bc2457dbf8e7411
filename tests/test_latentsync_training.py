"""Training LatentSync: what is trained, losses on pixels, clips and their references, the folder, preparing videos."""
import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import latentsync
import syncnet
import train
import vq
from helpers import (CLIP, JUDGE_CONFIG, KL_CONFIG, ROOT, UNET_CONFIG, VIDEOMAE_CONFIG, WHISPER_CONFIG, complaint,
                     log_rows, make_tiny_latentsync, randn, run, same, smooth_pictures, speech, tiny, tiny_syncnet,
                     weights, write_video)
from lib import prepare, recipes, speech_tasks, studies, videomae
from lib.clips import FolderDubbing, SyntheticDubbing, VideoFolder
from lib.console import UserError
from lib.face_metrics import compare_faces, mouth_points
from lib.pictures import ssim, write_table
from lib.talking_head import mouth_of, shift_sound, talking_head, talking_scene
from lib.talking_head import speech as synthetic_speech
from lib.video import Video, read_sound


# ----------------------------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize("stage, motion, millions", [("1", "none", 850.0), ("2", "all", 674.8),
                                                     ("2-efficient", "up", 284.7)])
def test_what_a_stage_trains(stage, motion, millions):
    with torch.device("meta"):
        model = latentsync.UNet(replace(latentsync.CONFIGS["latentsync_1.5"], motion=motion))
    model.freeze(stage)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6 == pytest.approx(millions, abs=0.05)


def test_the_video_encoder_has_the_released_shapes():
    with torch.device("meta"):
        model = videomae.VideoMAE(videomae.VIDEOMAES["vit_g"])
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert shapes["blocks.39.mlp.fc1.weight"] == (6144, 1408) and shapes["head.weight"] == (174, 1408)
    assert model.positions.shape == (1, 2048, 1408) and not any("positions" in k for k in shapes)


def supervision(**changes):
    encoder = tiny(videomae.VideoMAE, VIDEOMAE_CONFIG)
    networks = dict(syncnet=tiny_syncnet(config=JUDGE_CONFIG), videomae=encoder, frames=4)
    return latentsync.Supervision(tiny(vq.KLAutoencoder, KL_CONFIG), **networks | changes)


def test_losses_on_pixels_reach_the_latents():
    z, true, mel = randn(2, 4, 4, 8, 8), randn(2, 4, 3, 16, 16, seed=1).clamp(-1, 1), randn(2, 1, 80, 13)
    expected = None                                                         # gradient without checkpointing
    for checkpointing in (False, True):
        judge, z = supervision(checkpointing=checkpointing), z.detach().requires_grad_()
        loss, parts = judge(z, true, mel)
        assert set(parts) == {"sync", "trepa"} and judge.decode(z).shape == true.shape
        torch.testing.assert_close(loss, 0.05 * parts["sync"] + 10 * parts["trepa"])
        loss.backward()
        assert z.grad.flatten(1).norm(dim=1).min() > 0
        if checkpointing:
            torch.testing.assert_close(z.grad, expected)
        expected = z.grad
    with torch.no_grad():
        alone = supervision(videomae=None)
        each = torch.stack([alone(z[i:i + 1], true[i:i + 1], mel[i:i + 1])[1]["sync"] for i in range(2)])
        silent = alone(z, true, mel, has_audio=torch.tensor([1.0, 0.0]))[1]["sync"]
        torch.testing.assert_close(silent, each[0] / 2)                     # lips cannot follow what is not heard
        same_clip = supervision(syncnet=None)
        decoded = same_clip.decode(z)
        assert same_clip(z, decoded)[1]["trepa"] < 1e-9 < same_clip(z, true)[1]["trepa"]
        trembling = decoded[:, [0, 2, 1, 3]]
        assert same_clip(z, trembling)[1]["trepa"] > 1e-9                   # the same frames in another order


def test_supervision_wants_clips_of_one_length():
    with pytest.raises(ValueError, match="a SyncNet for clips of 4 frames, but clips have 8"):
        supervision(frames=8)
    with pytest.raises(ValueError, match="clips of 1 frames: the video encoder takes at least 2"):
        supervision(syncnet=None, frames=1)


@pytest.mark.parametrize("frames", [3, 5])
def test_clips_of_an_odd_number_of_frames(frames):
    """The video encoder leaves out the last frame, as the original's strided convolution does."""
    losses = supervision(syncnet=None, frames=frames)
    clips = randn(2, 3, frames, 16, 16)
    encoder = losses.videomae
    assert torch.equal(encoder.features(clips), encoder.features(clips[:, :, :-1]))
    assert not torch.equal(encoder.features(clips), encoder.features(clips[:, :, 1:]))
    loss, parts = losses(randn(2, 4, frames, 8, 8), randn(2, frames, 3, 16, 16, seed=1))
    assert loss.isfinite() and parts["trepa"] > 0


def test_checkpointing_changes_no_gradient():
    model = tiny(latentsync.UNet, UNET_CONFIG).requires_grad_()
    grads = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        loss, clean = model.loss(randn(1, 4, 4, 8, 8), randn(1, 9, 4, 8, 8), randn(1, 4, 20, 16),
                                 torch.Generator().manual_seed(0))
        (loss + clean.mean()).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_clean_latents_are_those_that_were_noised():
    """A UNet that predicts the true noise, or velocity, finds the clean latents."""
    z, noise, t = randn(2, 4, 3, 8, 8), randn(2, 4, 3, 8, 8, seed=1), torch.tensor([10, 900])
    for velocity in (False, True):
        model = tiny(latentsync.UNet, replace(UNET_CONFIG, velocity=velocity))
        model.forward = lambda x, t, audio: latentsync.velocity(z, noise, t) if velocity else noise
        loss, clean = model.loss(z, randn(2, 9, 3, 8, 8), None, t=t, noise=noise)
        assert loss < 1e-10
        torch.testing.assert_close(clean, z, atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Measures


def test_structural_similarity():
    a, b = randn(2, 3, 16, 20).clamp(-1, 1), randn(2, 3, 16, 20, seed=1).clamp(-1, 1)
    torch.testing.assert_close(ssim(a, a), torch.ones(2))
    assert ssim(a, 0.8 * a).min() > ssim(a, b).max()
    grey = lambda v: torch.full((1, 3, 12, 12), v)
    expected = (2 * 0.5 * 0.25 + 0.0004) / (0.5**2 + 0.25**2 + 0.0004)      # the formula, where nothing varies
    assert ssim(grey(0.5), grey(0.25)).item() == pytest.approx(expected, rel=1e-4)


def test_mouths_are_followed_and_flicker_is_seen():
    frames, _ = talking_head(4)
    faces, mouth = frames.float() / 127.5 - 1, mouth_of(synthetic_speech(4).plan)
    points = mouth_points(faces)
    assert np.corrcoef((points[:, 3, 1] - points[:, 2, 1]).numpy(), mouth[:, 0])[0, 1] > 0.8
    mask = latentsync.face_mask(256)[::4, ::4]
    perfect = compare_faces(faces, faces, mask)
    assert perfect["ssim"] == pytest.approx(1) and perfect["lmd"] == 0 == perfect["flicker"]
    brightness = 0.1 * torch.randn(len(faces), 1, 1, 1, generator=torch.Generator().manual_seed(0))
    steady, restless = (compare_faces(faces + add, faces, mask)["flicker"] for add in (0.1, brightness))
    assert steady < 1e-3 < 5 < restless


# ----------------------------------------------------------------------------------------------------------------------
# Data


class Ear:
    """Stands for Whisper: a row of features is its own number."""

    calls = 0
    config = WHISPER_CONFIG

    def pieces(self, sound):
        Ear.calls += 1
        rows = torch.arange(latentsync.count_rows(len(sound), 1500), dtype=torch.float32)
        yield rows[:, None, None].expand(-1, 2, 16)

    def state_dict(self):
        return {"weight": torch.ones(1)}


def test_references_have_no_frame_in_common_and_the_sound_is_that_of_the_frames():
    data = SyntheticDubbing(0, 3, 16)
    data.encode_audio(Ear(), None)
    data.columns, starts = 52, set()
    for seed in range(20):
        index = seed % 3
        seen, others, heard, sound, start = data.scene(index, (seed,), clips=3)
        whole, voice = talking_head(index)
        assert torch.equal(seen, whole[start:start + 48]) and np.array_equal(sound, voice)
        rows = np.stack([latentsync.window_rows(start + i, 240) for i in range(48)])
        assert torch.equal(heard[:, ::2, 0], torch.from_numpy(rows).float())
        for k in range(3):
            where = [s for s in range(105) if torch.equal(whole[s:s + 16], others[16 * k:16 * k + 16])]
            assert where and all(abs(s - start - 16 * k) >= 16 for s in where)
        (clip, _), (_, mel), broken = data.__getitems__([(index, (seed,))])
        begin = data.scene(index, (seed,))[4]
        assert torch.equal(mel[0], syncnet.mel_window(voice, begin, 52)) and not broken
        starts.add(begin)
    assert len(starts) > 10 and min(starts) < 30 and max(starts) > 70


@pytest.fixture
def tiny_networks(dub_files, tmp_path, monkeypatch):
    """Flags of a run with networks that take milliseconds."""
    make_tiny_latentsync(monkeypatch)
    folder = tmp_path / "networks"
    folder.mkdir()
    return tiny_flags(folder, dub_files, monkeypatch)


def tiny_flags(folder, dub_files, monkeypatch):
    """(flags, those of the start) of a run whose networks lie in these two folders."""
    syncnet.save(tiny_syncnet(config=JUDGE_CONFIG), folder / "sync.safetensors")
    videomae.save(tiny(videomae.VideoMAE, VIDEOMAE_CONFIG), folder / "eye.safetensors")
    monkeypatch.setitem(recipes.HEAD_COMPANIONS, "videomae", folder / "eye")
    latentsync.save(tiny(latentsync.UNet, replace(UNET_CONFIG, resolution=16, motion="none")),
                    folder / "stage1.safetensors")
    return ("latentsync", "--vae", dub_files / "talking_head_kl.safetensors", "--whisper",
            dub_files / "talking_head_whisper.safetensors", "--syncnet", folder / "sync.safetensors", "--frames", 4,
            "--videos", 4, "--val-videos", 1, "--batch-size", 2, "--device", "cpu", "--workers", 0,
            "--log-every", 1), ("--init", folder / "stage1.safetensors")


@pytest.mark.parametrize("stage", [pytest.param("1", marks=pytest.mark.slow), "2", "2-efficient"])
def test_resumed_run_equals_an_uninterrupted_one(tiny_networks, tmp_path, stage, capsys):
    flags, init = tiny_networks
    argv = (*flags, "--stage", stage, *init, "--steps", 4, "--val-every", 2, "--sample-every", 0)
    run(train, *argv, "--out", tmp_path / "whole")
    whole, parts = weights(tmp_path / "whole"), "whole"
    if stage != "2-efficient":                                              # which differs in what is trained alone
        parts = "parts"
        run(train, *argv, "--out", tmp_path / "parts", "--stop-after", 2)
        run(train, *argv, "--out", tmp_path / "parts", "--resume", "auto")
        assert same(whole, weights(tmp_path / "parts"))
    before, moving = weights_of(init[1]), [k for k in whole if "motion_modules" in k]
    changed = {k for k in before if not torch.equal(before[k], whole[k])}
    assert bool(moving) == (stage != "1") and any("attn2" in k for k in changed)
    assert any("resnets" in k for k in changed) == (stage == "1")
    assert any("attn1" in k for k in changed) == (stage != "2-efficient")
    rows = log_rows(tmp_path / parts)
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert all(rows[-1][f"val_{k}"] for k in ("loss", "ssim", "lmd", "flicker", "sync_c", "offset"))
    assert stage == "1" or float(rows[0]["sync"]) > 0
    assert ("trepa" in rows[0]) == (stage == "2") and ("sync" in rows[0]) == (stage != "1")
    assert (tmp_path / "whole" / "curves.png").exists() and list((tmp_path / "whole" / "samples").glob("*.png"))


def weights_of(path):
    return load_file(path)


def test_a_run_goes_on_with_the_same_networks_only(tiny_networks, tmp_path, capsys):
    """Stage 1, judged by a SyncNet for longer clips."""
    flags, init = tiny_networks
    judge = ROOT / "demo" / "talking_head_syncnet.safetensors"
    argv = (*flags, *init, "--steps", 2, "--sample-every", 0, "--out", tmp_path / "out")
    run(train, *argv, "--syncnet", judge, "--stop-after", 1)
    said = complaint(capsys, train, *argv, "--resume", "auto")
    assert "is of another run (syncnet was" in said


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_without_sound_there_is_no_sync_loss(tiny_networks, tmp_path, dtype, monkeypatch):
    """In half precision as well, in which painting to validate would take half a minute on a CPU."""
    flags, init = tiny_networks
    monkeypatch.setattr(speech_tasks.LatentSyncTask, "validate", lambda self, model: {"loss": 0.0})
    run(train, *flags, "--stage", 2, *init, "--steps", 1, "--drop-audio", 1, "--dtype", dtype, "--checkpointing",
        "--out", tmp_path / "out", "--sample-every", 0)
    row = log_rows(tmp_path / "out")[0]
    assert float(row["sync"]) == 0 < float(row["noise"]) and float(row["trepa"]) > 0


@pytest.mark.slow
def test_the_study_runs_its_parts_from_the_same_start(tiny_networks, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(studies, "STAGE2_VIDEOS", 1)
    flags, init = tiny_networks
    run(train, *flags, "--study", *init, "--steps", 2, "--val-every", 0, "--out", tmp_path)
    rows = list(csv.DictReader(open(tmp_path / "study.csv")))
    assert [row[""] for row in rows] == ["true frames", "before: stage 1", *studies.STAGE2_STUDY]
    assert float(rows[0]["ssim"]) == 1 and float(rows[0]["flicker"]) == 0
    assert (tmp_path / "study.png").exists() and (tmp_path / "study_frames.png").exists()
    assert "--study: give what stage 1 has made" in complaint(capsys, train, *flags, "--study", "--out", tmp_path / "b")


def test_mistakes_are_named(tiny_networks, dub_files, tmp_path, capsys):
    flags, init = tiny_networks
    other, original = tmp_path / "other.safetensors", tmp_path / "syncnet_v2.model"
    syncnet.save(tiny_syncnet(), other)                                     # clips of 5 frames
    torch.save(syncnet.export(syncnet.OriginalSyncNet()), original)
    for extra, said in ((("--stage", 2), "--stage 2: trains attention and motion modules only"),
                        (("--stage", 2, *init, "--syncnet", other), "is made for clips of 5 frames, but clips have 4"),
                        (("--stage", 2, *init, "--syncnet", original), "is the original SyncNet"),
                        (("--stage", 2, *init, "--syncnet", dub_files / "talking_head_kl.safetensors"),
                         "not a SyncNet"),
                        (("--stage", 2, *init, "--lpips-weight", 0.1), "--lpips: needed: VGG16 HEADS"),
                        (("--stage", 2, *init, "--videomae", other), "not a VideoMAE v2"),
                        (("--stage", 3), ""),
                        (("--videomae", other), "--videomae: belongs to --stage 2"),
                        (("--sync-weight", 1), "--sync-weight: belongs to --stage 2"),
                        (("--stage", 2, *init, "--frames", 25), "--frames 25: expected at most 8"),
                        (("--stage", 2, *init, "--frames", 1),
                         "--frames 1: TREPA's video encoder takes frames in pairs"),
                        (("--drop-audio", 2), "--drop-audio 2.0: expected"),
                        ((*init, "--stable-diffusion", tmp_path), "exclude each other")):
        if extra == ("--stage", 3):
            with pytest.raises(SystemExit):
                run(train, *flags, *extra)
            continue
        line = complaint(capsys, train, *flags, *extra, "--out", tmp_path / "out")
        assert said in line, line
    data = ("--data", tmp_path, "--stage", 2, *init)
    assert "--videomae: needed: TREPA's video encoder" in complaint(capsys, train, *flags, *data, "--out",
                                                                    tmp_path / "out")


def test_training_on_a_folder(tiny_networks, tmp_path, av, capsys):
    flags, init = tiny_networks
    data = tmp_path / "data"
    data.mkdir()
    for i in range(3):
        write_video(data / f"{i}.mp4", smooth_pictures(20, 24, seed=i), speech(0.8, seed=i))
    write_video(data / "mute.mp4", smooth_pictures(20, 24))
    write_video(data / "short.mp4", smooth_pictures(6, 24), speech(1))
    write_video(data / "wide.mp4", smooth_pictures(20, 24)[:, :, :12], speech(0.8))
    (data / "corrupt.mp4").write_bytes((data / "0.mp4").read_bytes()[:700])
    eye = recipes.HEAD_COMPANIONS["videomae"].with_suffix(".safetensors")
    argv = (*flags, "--stage", 2, *init, "--videomae", eye, "--data", data, "--steps", 6, "--sample-every", 0)
    run(train, *argv, "--out", tmp_path / "out")
    said = capsys.readouterr()
    assert "7 videos" in said.out and "skipped 4 unreadable of 7 videos" in said.out + said.err
    cache = sorted((data / ".whisper").iterdir())
    assert len(cache) == 5                                                  # of all that have sound
    (data / "empty").mkdir()
    assert "no videos in it" in complaint(capsys, train, *flags, "--data", data / "empty", "--out", tmp_path / "b")
    (data / "short").mkdir()
    os.rename(data / "short.mp4", data / "short" / "short.mp4")
    line = complaint(capsys, train, *flags, "--data", data / "short", "--out", tmp_path / "c")
    assert "not one of these videos can be used; each has to have sound and 12 frames" in line
    os.rename(data / "mute.mp4", data / "empty" / "mute.mp4")
    line = complaint(capsys, train, *flags, "--data", data / "empty", "--out", tmp_path / "d")
    assert "not one of these 1 videos has sound that can be read" in line


def test_features_are_cached_by_content(tmp_path, av):
    write_video(tmp_path / "a.mp4", smooth_pictures(20, 16), speech(0.8))
    args = train.parse_args(["latentsync"])
    listen = lambda: FolderDubbing(tmp_path, 4, 16, split=False).encode_audio(Ear(), args)
    Ear.calls = 0
    listen()
    listen()
    assert Ear.calls == 1
    os.rename(tmp_path / "a.mp4", tmp_path / "b.mp4")
    listen()
    assert Ear.calls == 1                                                   # another name, the same video
    write_video(tmp_path / "b.mp4", smooth_pictures(20, 16), speech(0.8, seed=1))
    listen()
    assert Ear.calls == 2 and len(list((tmp_path / ".whisper").iterdir())) == 2
    data = FolderDubbing(tmp_path, 4, 16, split=False)
    data.encode_audio(Ear(), args)
    length, frames_at, features, sound = data.video(0)
    assert length == 20
    assert frames_at(3, 4).shape == (4, 3, 16, 16)
    assert len(features) in (40, 41)
    assert len(sound) // 640 in (20, 21)


# ----------------------------------------------------------------------------------------------------------------------
# Preparing


def scene(path, seed, seconds, late=0, size=96):
    """A drawn person's video, its sound so many frames late, with landmarks beside it."""
    frames, sound, points = talking_scene(seed, seconds, size)
    write_video(path, frames, shift_sound(sound, late))
    np.savez(path.with_suffix(".npz"), landmarks=points)
    return frames, sound, points


PREPARE = ("latentsync", "--recipe", "talking_head", "--device", "cpu", "--workers", 0, "--piece", 2)


def rows_of(folder):
    return list(csv.DictReader(open(folder / "prepared.csv")))


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Videos of all kinds: one of 5 s that is good, one whose sound is 4 frames late, and what is to be left out."""
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("raw")
    scene(folder / "good.mp4", 85, 5.0)
    scene(folder / "late.mp4", 86, 4.0, late=4)
    _, _, points = scene(folder / "hidden.mp4", 87, 2.4, size=64)
    points[20:23] = np.nan
    np.savez(folder / "hidden.npz", landmarks=points)
    (folder / "corrupt.mp4").write_bytes((folder / "good.mp4").read_bytes()[:3000])
    write_video(folder / "mute.mp4", smooth_pictures(60, 32))
    write_video(folder / "short.mp4", smooth_pictures(30, 32), speech(2))
    return folder


def test_videos_become_clips_of_aligned_faces(raw, tmp_path, capsys):
    run(train, *PREPARE, "--prepare", raw, "--data", tmp_path / "out")
    said, rows = capsys.readouterr().out, rows_of(tmp_path / "out")
    verdicts = {(row["source"], row["start"]): row["verdict"] for row in rows}
    assert verdicts["good.mp4", "0"] == verdicts["good.mp4", "50"] == "kept" == verdicts["late.mp4", "50"]
    assert verdicts["good.mp4", ""] == "done"
    assert "no face in 3 of 60 frames" in verdicts["hidden.mp4", "0"]
    assert "has no sound" in verdicts["mute.mp4", ""] and "too short: 30 frames" in verdicts["short.mp4", ""]
    assert verdicts["corrupt.mp4", ""] not in ("done", "kept")
    assert "kept 4 clips, 0.1 min; rejected: " in said and "1 x no face in .. of .. frames" in said
    assert "sound and picture are assumed to be in sync" in said
    first = Video(tmp_path / "out" / "good.mp4_000050.mp4")
    assert (first.height, first.width, len(first)) == (64, 64, 75)          # the rest goes to the last piece
    frames, sound, points = talking_scene(85, 5.0, 96)
    align = latentsync.Aligner(64)
    face_map = [align(p) for p in points[50:61]][-1]
    expected = latentsync.align_face(frames[60].permute(1, 2, 0), face_map, align.canvas, 64)
    found = first.clip(10, 1)[0].float()
    assert (found - expected).abs().mean() < 8                              # twice through the encoder
    heard = read_sound(first.path)
    assert np.corrcoef(heard[:40000], sound[32000:][:40000])[0, 1] > 0.95
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.mp4")}
    run(train, *PREPARE, "--prepare", raw, "--data", tmp_path / "out")      # all is done: nothing is touched
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.mp4")}
    assert rows_of(tmp_path / "out") == rows


@pytest.mark.slow
def test_sound_is_moved_into_step_and_what_is_not_in_step_left_out(raw, tmp_path, capsys, monkeypatch):
    judge = ("--syncnet", ROOT / "demo" / "talking_head_syncnet.safetensors")
    argv = (*PREPARE, "--prepare", raw, "--piece", 4, *judge, "--min-confidence", 0.15)
    run(train, *argv, "--data", tmp_path / "out")
    rows = {row["source"]: row for row in rows_of(tmp_path / "out") if row["verdict"] == "kept"}
    assert rows["late.mp4"]["offset"] == "-4" and rows["good.mp4"]["offset"] == "0"
    model = syncnet.load(judge[1])
    for row in rows.values():
        path = tmp_path / "out" / row["file"]
        score = syncnet.score(model, [torch.from_numpy(f).permute(2, 0, 1) for f in Video(path)], read_sound(path))
        assert score.offset == 0
    weak = min(float(row["confidence"]) for row in rows.values())
    run(train, *argv, "--data", tmp_path / "strict", "--max-offset", 3, "--min-confidence", weak + 1e-4)
    verdicts = {row["source"]: row["verdict"] for row in rows_of(tmp_path / "strict") if row["start"]}
    late_is_weak = float(rows["late.mp4"]["confidence"]) == weak
    assert ("--min-confidence is" if late_is_weak else "offset -4 frames, --max-offset is 3") in verdicts["late.mp4"]
    assert "kept" == verdicts["good.mp4"] if late_is_weak else "--min-confidence is" in verdicts["good.mp4"]


def test_quality_is_asked_of_a_function(raw, tmp_path, capsys, monkeypatch):
    taste = "def sharp(frames):\n    assert len(frames) == 3\n    return float(frames[0].std())\n"
    (tmp_path / "taste.py").write_text(taste)
    monkeypatch.chdir(tmp_path)
    argv = (*PREPARE, "--prepare", raw, "--quality", "taste:sharp")
    run(train, *argv, "--data", tmp_path / "out", "--min-quality", 1)
    assert {row["verdict"] for row in rows_of(tmp_path / "out") if row["source"] == "good.mp4"} == {"kept", "done"}
    run(train, *argv, "--data", tmp_path / "none", "--min-quality", 1000)
    assert any("--min-quality is 1000" in row["verdict"] for row in rows_of(tmp_path / "none"))
    said = complaint(capsys, train, *PREPARE, "--prepare", raw, "--data", tmp_path / "b", "--quality", "taste:blunt")
    assert "--quality taste:blunt" in said and "expected MODULE:FUNCTION" in said


def test_what_goes_wrong_by_surprise_is_tried_again(raw, tmp_path, monkeypatch, capsys):
    real = prepare.make_clip

    def flaky(source, *rest):
        return 1 / 0 if "good" in str(source) else real(source, *rest)
    monkeypatch.setattr(prepare, "make_clip", flaky)
    argv = (*PREPARE, "--prepare", raw, "--data", tmp_path)
    run(train, *argv)
    assert "2 x failed: ZeroDivisionError" in capsys.readouterr().out
    monkeypatch.setattr(prepare, "make_clip", real)
    run(train, *argv)
    assert "kept 4 clips" in capsys.readouterr().out
    assert "with other settings" in complaint(capsys, train, *argv, "--piece", 3)


def test_an_interrupted_preparation_goes_on(raw, tmp_path, monkeypatch):
    made, real = [], prepare.make_clip

    def piece(source, out, *rest):
        if len(made) == 2 and not os.environ.get("GO_ON"):
            raise KeyboardInterrupt
        made.append(out.name)
        return real(source, out, *rest)
    monkeypatch.setattr(prepare, "make_clip", piece)
    argv = (*PREPARE, "--prepare", raw, "--data", tmp_path)
    with pytest.raises(SystemExit) as e:
        run(train, *argv)
    assert e.value.code == 130
    with open(tmp_path / "prepared.csv", "a") as f:
        f.write("good.mp4,1234")                                            # a row that a crash cut off
    (tmp_path / ".0123456789ab.half.mp4").write_bytes(b"half")                        # and a clip
    monkeypatch.setenv("GO_ON", "1")
    run(train, *argv)
    assert sorted(set(made)) == sorted(made) and not list(tmp_path.glob(".*"))      # nothing twice
    assert sum(row["verdict"] == "kept" for row in rows_of(tmp_path)) == 4
    (tmp_path / "good.mp4_000000.mp4").unlink()                             # a clip that is gone is made again
    run(train, *argv)
    assert made.count("good.mp4_000000.mp4") == 2 and len(made) == len(set(made)) + 1


@pytest.mark.slow
def test_killed_processes_leave_no_half_clip(raw, tmp_path):
    argv = [sys.executable, "train.py", *PREPARE, "--workers", 2, "--prepare", raw, "--data", tmp_path]
    process = subprocess.Popen([str(a) for a in argv], cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("*.mp4")):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for clip in tmp_path.glob("*.mp4"):
        if clip.name[0] != ".":
            assert Video(clip).clip(0, 999).shape[0] >= 50
    run(train, *PREPARE, "--prepare", raw, "--data", tmp_path)
    assert sum(row["verdict"] == "kept" for row in rows_of(tmp_path)) == 4 == len(list(tmp_path.glob("*.mp4")))


@pytest.mark.slow
def test_a_real_clip_is_prepared(tmp_path, av):
    pytest.importorskip("facenet_pytorch",
                        reason="the detector is optional; .ci/run installs it and runs this once more")
    if not CLIP.exists():
        pytest.skip("the real clip is not in the repository")
    (tmp_path / "raw").mkdir()
    frames = Video(CLIP / "demo1_video.mp4").clip(0, 65)
    write_video(tmp_path / "raw" / "a.mp4", frames, read_sound(CLIP / "demo1_audio.wav"))
    argv = ("latentsync", "--device", "cpu", "--workers", 0, "--prepare", tmp_path / "raw")
    run(train, *argv, "--data", tmp_path / "out", "--min-face", 64)
    assert [row["verdict"] for row in rows_of(tmp_path / "out")] == ["kept", "done"]
    video = Video(tmp_path / "out" / "a.mp4_000000.mp4")
    assert (video.width, len(video)) == (256, 65)                           # the large recipe's
    run(train, *argv, "--data", tmp_path / "large", "--min-face", 2000)
    assert "pixels, --min-face is 2000" in rows_of(tmp_path / "large")[0]["verdict"]


def test_preparing_wants_folders(tmp_path, capsys, av):
    (tmp_path / "raw").mkdir()
    assert "no videos in it" in complaint(capsys, train, *PREPARE, "--prepare", tmp_path / "raw", "--data",
                                          tmp_path / "o")
    assert "give the folder" in complaint(capsys, train, *PREPARE, "--prepare", tmp_path / "raw")
    write_video(tmp_path / "raw" / "a.mp4", smooth_pictures(20, 16), speech(0.8))
    for inside in (tmp_path / "raw", tmp_path / "raw" / "clips"):
        line = complaint(capsys, train, *PREPARE, "--prepare", tmp_path / "raw", "--data", inside)
        assert "lies in the folder of the raw videos" in line
    for flags, said in ((("--max-offset", 3), "--max-offset: goes with --syncnet"),
                        (("--min-quality", 3), "--min-quality: goes with --quality"),
                        (("--piece", 1), "--piece 1: expected at least 2"),
                        (("--study",), "--prepare, --study: each of these runs instead of training")):
        assert said in complaint(capsys, train, *PREPARE, "--prepare", tmp_path / "raw", "--data", tmp_path / "o",
                                 *flags)


def test_shots_are_found_without_a_package(tmp_path, av, monkeypatch):
    two = torch.cat([smooth_pictures(1, 64, seed=seed).expand(20, -1, -1, -1) for seed in (0, 5)])
    write_video(tmp_path / "two.mp4", two)
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    assert prepare.shots_of(Video(tmp_path / "two.mp4")) == ([0, 20], 40)


def test_clips_of_one_video_are_not_on_both_sides(tmp_path, av):
    for i in range(40):
        for start in (0, 125):
            (tmp_path / f"{i:02d}.mp4_{start:06d}.mp4").write_bytes(b"")
    train_files, val_files = (VideoFolder(tmp_path, side, True).files for side in (True, False))
    assert len(train_files) == 76
    assert sorted(os.path.basename(f)[:6] for f in val_files) == ["19.mp4"] * 2 + ["39.mp4"] * 2


def test_shots_become_pieces():
    assert prepare.pieces_of([0, 100, 130], 400, 125, 48) == [(0, 100), (130, 125), (255, 145)]
    assert prepare.pieces_of([0], 40, 125, 48) == []
    assert prepare.pieces_of([0], 125, 125, 48) == [(0, 125)] and prepare.pieces_of([0], 249, 125, 48) == [(0, 249)]


def test_tables_of_preparation_are_not_trusted(tmp_path):
    """No file outside of --data is deleted, a last row that was cut is made again, failures block nothing."""
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "prepared.csv"
    victim = tmp_path / "victim.txt_000000.mp4"
    victim.touch()
    row = dict.fromkeys(prepare.COLUMNS, "") | {"source": "a.mp4", "bytes": "9", "start": "0", "verdict": "kept",
                                                "frames": "50", "file": "a.mp4_000000.mp4", "settings": "of raw, 5 s"}
    foreign = [row | {"source": "../victim.txt", "file": "../victim.txt_000000.mp4"},
               row | {"file": str(victim)}, row | {"start": "x"}, row | {"file": "b.mp4"}]
    failed = row | {"verdict": "failed: TypeError", "start": "", "settings": "of raw, 5 s, os:sep 40"}
    write_table(path, [row, *foreign, failed], prepare.COLUMNS)
    (tmp_path / "data" / row["file"]).touch()
    table = prepare.Table(path, {"a.mp4": "9", "../victim.txt": "1"}, "of raw, 5 s")
    assert [r["file"] for r in table.rows] == [row["file"]] and victim.exists()
    write_table(path, [row, row | {"settings": "of ra"}], prepare.COLUMNS)
    assert len(prepare.Table(path, {"a.mp4": "9"}, "of raw, 5 s").rows) == 1
    with pytest.raises(UserError, match="was made with other settings"):
        prepare.Table(path, {"a.mp4": "9"}, "of raw, 6 s")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="prepared.csv: expected a table that --prepare wrote"):
        prepare.Table(path, {}, "")
    for name in ("os:sep", "os:nothing", "nowhere:f", ":f"):
        with pytest.raises(UserError, match=f"--quality {name}: .*expected MODULE:FUNCTION"):
            prepare.quality_function(name)
