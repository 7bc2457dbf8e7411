"""SyncNet: front ends, networks, scoring; sound and video in and out; the drawn talking head."""
import csv
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

import sample
import syncnet
import train
import vq
from helpers import (CLIP, ROOT, SYNCNET_CONFIG, complaint, make_tiny_syncnet, randn, run, same,
                     smooth_pictures, speech, tiny_syncnet, weights, write_video)
from lib import clips, speech_tasks, studies
from lib.clips import SyntheticSyncClips
from lib.console import UserError
from lib.faces import describe_score, find_faces, is_in_step
from lib.syncnet_variants import variant
from lib.talking_head import shift_sound, talking_head
from lib.tracks import face_crop, face_tracks, smooth_track
from lib.video import Video, VideoWriter, read_sound


# ----------------------------------------------------------------------------------------------------------------------
# Front ends and networks


@pytest.mark.parametrize("front_end, hop", [(syncnet.mel_spectrogram, 200), (syncnet.mfcc, 160)])
def test_a_part_of_a_spectrogram_has_the_numbers_of_the_whole(front_end, hop):
    audio = speech(1.0) * 1000
    whole = front_end(audio)
    for first, columns in ((0, 3), (1, 20), (7, 40), (whole.shape[1] - 5, 5)):
        torch.testing.assert_close(front_end(audio, first, columns), whole[:, first:first + columns], rtol=0, atol=1e-6)


def test_mfcc_against_its_definition():
    """A window of a pure tone, by hand: energy in the first coefficient, cosines of logarithms in the others."""
    n = np.arange(400)
    tone = 1000 * np.sin(2 * np.pi * 1000 * n / 16000)
    x = np.append(tone[0], tone[1:] - 0.97 * tone[:-1])
    power = np.abs(np.fft.rfft(x, 512)) ** 2 / 512
    out = syncnet.mfcc(tone)
    assert out.shape == (13, 1) and out[0, 0] == pytest.approx(np.log(power.sum()), rel=1e-6)
    mel = lambda f: 2595 * np.log10(1 + f / 700)
    edges = np.floor(513 * 700 * (10 ** (np.linspace(0, mel(8000), 28) / 2595) - 1) / 16000).astype(int)
    bands = []
    for low, peak, high in zip(edges, edges[1:], edges[2:]):
        weights = [(k - low) / (peak - low) if k < peak else (high - k) / (high - peak) for k in range(low, high)]
        bands.append(np.log(max(np.dot(weights, power[low:high]), 1e-16)))
    for k in (1, 5, 12):
        c = sum(b * np.cos(np.pi * k * (2 * i + 1) / 52) for i, b in enumerate(bands)) * (2 / 26) ** 0.5
        assert out[k, 0] == pytest.approx(c * (1 + 11 * np.sin(np.pi * k / 22)), abs=1e-3)


def test_sizes_of_the_released_networks():
    """Numbers of parameters that the notes of the release give, and maps that end in one place."""
    expected = {"16_pixel_attn": 401.3, "16_pixel": 371.8, "16_latent": 65.5}
    with torch.device("meta"):
        for name, config in syncnet.CONFIGS.items():
            model = syncnet.StableSyncNet(config).eval()
            vision = model.embed_frames(torch.zeros(1, config.channels, *config.picture))
            audio = model.embed_audio(torch.zeros(1, 1, 80, config.columns))
            assert vision.shape == audio.shape == (1, config.visual[-1][0]), name
            if name in expected:
                assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == expected[name]
        for frames in (1, 5, 10, 25, 39):
            for base in ("talking_head", "16_pixel_attn"):
                config = variant(syncnet.CONFIGS[base], frames=frames, embedding=64, attention=False)
                audio = syncnet.StableSyncNet(config).embed_audio(torch.zeros(1, 1, 80, config.columns))
                assert audio.shape == (1, 64)


@pytest.mark.parametrize("name", ["16_pixel_attn", "16_latent", "25_pixel", "5_pixel_wav2lip", "talking_head_plain"])
def test_plans_are_known_by_their_weights(name):
    """Factors are in no tensor: they come from the entry of CONFIGS that has the same levels."""
    config = syncnet.CONFIGS[name]
    with torch.device("meta"):
        state = syncnet.export(syncnet.StableSyncNet(config))
    assert syncnet.infer_config(state, "x.pt") == config
    assert all(k.split(".")[0] in ("visual_encoder", "audio_encoder") for k in state)


def test_save_load_and_export(tmp_path):
    model = tiny_syncnet()
    syncnet.save(model, tmp_path / "a.safetensors")
    again = syncnet.load(tmp_path / "a.safetensors")
    assert again.config == SYNCNET_CONFIG and same(model.state_dict(), again.state_dict())
    keys = set(syncnet.export(model))
    assert {"audio_encoder.down_blocks.0.downsample_conv.weight", "visual_encoder.down_blocks.2.attn.to_q.bias",
            "visual_encoder.down_blocks.2.ff.net.0.proj.weight"} <= keys
    torch.save({"state_dict": syncnet.export(model)}, tmp_path / "b.pt")
    with pytest.raises(vq.CheckpointError, match="of unknown plan: how much its levels shrink the map is in no tensor"):
        syncnet.load(tmp_path / "b.pt")
    assert same(syncnet.load(tmp_path / "b.pt", SYNCNET_CONFIG).state_dict(), model.state_dict())
    torch.save({"a": torch.zeros(1)}, tmp_path / "c.pt")
    with pytest.raises(vq.CheckpointError, match="not a SyncNet"):
        syncnet.load(tmp_path / "c.pt")


def test_plain_network_round_trip_and_modes(tmp_path):
    model = vq.build(syncnet.StableSyncNet, syncnet.CONFIGS["talking_head_plain"])
    model.init_weights(torch.Generator().manual_seed(0))
    frames, mel = randn(4, 48, 32, 64), randn(4, 1, 80, 52, seed=1)
    model.train()(frames, mel)                                              # moves the statistics of its batch norms
    syncnet.save(model, tmp_path / "plain.safetensors")
    again = syncnet.load(tmp_path / "plain.safetensors")
    assert torch.equal(again(frames, mel), model.eval()(frames, mel))
    assert "visual_encoder.0.conv_block.1.running_mean" in syncnet.export(model)


def test_probability_lies_between_0_and_1_and_gradients_reach_the_frames():
    model = tiny_syncnet()
    frames, mel = randn(6, 15, 8, 16).requires_grad_(), randn(6, 1, 80, 16, seed=1)
    p = model(frames, mel)
    assert p.shape == (6,) and (p >= 0).all() and (p <= 1).all()
    model.loss(frames, mel, torch.ones(6))[0].backward()
    assert frames.grad.abs().sum() > 0
    same_vector = syncnet.StableSyncNet.forward.__get__(type("Exact", (), {
        "embed_frames": lambda self, x: x, "embed_audio": lambda self, x: x})())
    ones = F.normalize(torch.ones(1, 3), dim=1) * (1 + 1e-6)                # a cosine above 1 would raise in the loss
    assert same_vector(ones, ones) == 1


def test_loss_of_moments_is_that_of_all_pairs():
    model, frames, mel = tiny_syncnet(), randn(2, 3, 15, 8, 16), randn(2, 3, 1, 80, 16, seed=1)
    match, others = [], []
    for b in range(2):
        for i in range(3):
            for j in range(3):
                loss, _ = model.loss(frames[b, i:i + 1], mel[b, j:j + 1], torch.tensor([float(i == j)]))
                (match if i == j else others).append(loss.item())
    loss, metrics = model.loss_of_moments(frames, mel)
    assert loss.item() == pytest.approx((np.mean(match) + np.mean(others)) / 2, rel=1e-5)
    assert 0 <= metrics["accuracy"] <= 1
    chance, _ = model.loss_of_moments(frames[:, :1].expand(2, 3, -1, -1, -1), mel[:, :1].expand(2, 3, -1, -1, -1), True)
    assert chance.item() == pytest.approx(math.log(3), rel=1e-5)            # all alike: one of three


def test_lower_halves_are_taken_after_resizing():
    faces = smooth_pictures(3, 40)
    halves = syncnet.lower_halves(faces, syncnet.CONFIGS["talking_head"])
    whole = F.interpolate(faces.float(), (64, 64), mode="bicubic", antialias=True).round().clamp(0, 255).byte()
    assert torch.equal(halves, whole[:, :, 32:])
    assert torch.equal(syncnet.lower_halves(halves, syncnet.CONFIGS["talking_head"]), halves)
    prepared = tiny_syncnet().prepare(smooth_pictures(5, 16)[None])
    assert torch.equal(prepared[0, 3:6],
                       smooth_pictures(5, 16)[1, :, 8:].float() / 127.5 - 1)     # frame by frame, then rgb


# ----------------------------------------------------------------------------------------------------------------------
# Scoring


class Echo(torch.nn.Module):
    """A network that knows: a frame's and a sound's embedding are the number written into them."""

    frames, SPARE, PADDING = 3, 0, math.nan
    distance = staticmethod(lambda vision, audio: (vision - audio).abs().sum(-1))

    def __init__(self, spare=0, padding=math.nan):
        super().__init__()
        self.weight, self.SPARE, self.PADDING = torch.nn.Parameter(torch.zeros(1)), spare, padding

    def embed_clips(self, faces):
        return faces.unfold(0, 3, 1)[:, 0, 0, :1, 0].float()

    def embed_sound(self, audio, first, count):
        return torch.from_numpy(np.asarray(audio[first:first + count], np.float32))[:, None]


@pytest.mark.parametrize("spare, padding", [(0, math.nan), (1, 0.0)])
@pytest.mark.parametrize("frames, batch", [(4, 16), (23, 1), (40, 7), (60, 16)])
def test_streamed_score_equals_the_definition(spare, padding, frames, batch):
    rng = np.random.default_rng(0)
    seen, heard = rng.integers(0, 255, frames), rng.integers(0, 255, frames + 5)
    faces = (torch.full((3, 2, 2), int(v), dtype=torch.uint8) for v in seen)
    score = syncnet.score(Echo(spare, padding), faces, heard, batch_size=batch)
    n = frames - 2 - spare
    assert score.clips == n
    for shift, value in zip(range(-15, 16), score.curve):
        sound = [heard[i + shift] if 0 <= i + shift < n else padding for i in range(n)]
        expected = np.abs(np.array(sound, float) - seen[:n])
        expected = np.nanmean(expected) if np.isfinite(expected).sum() * 2 > n else math.nan
        assert float(value) == pytest.approx(expected, rel=1e-5, nan_ok=True), shift
    kept = score.curve[~score.curve.isnan()]
    assert score.distance == kept.min() and score.confidence == pytest.approx(float(kept.median() - kept.min()))


@pytest.mark.parametrize("late", [-7, 0, 3])
def test_sign_of_the_offset(late):
    """Sound that comes too late has a negative offset, as in the original."""
    seen = np.random.default_rng(0).permutation(60)
    heard = np.roll(seen, late)
    faces = [torch.full((3, 2, 2), int(v), dtype=torch.uint8) for v in seen]
    assert syncnet.score(Echo(), faces, heard).offset == -late


def test_too_short_for_a_score():
    for frames, sound in ((2, 100), (10, 0)):
        with pytest.raises(ValueError, match="expected at least 3 frames of video and as much sound"):
            syncnet.score(Echo(), [torch.zeros(3, 2, 2).byte()] * frames, np.zeros(sound))


def test_original_syncnet_reads_bgr_and_leaves_the_last_clip_out():
    model = vq.build(syncnet.OriginalSyncNet).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(p.numel()))
    faces = smooth_pictures(12, 224)
    clips = torch.stack([faces[i:i + 5].flip(1).transpose(0, 1) for i in range(2)])
    with torch.no_grad():
        torch.testing.assert_close(model.embed_clips(faces[:6]), model.embed_frames(clips.float()))
        audio = speech(12 / 25)
        sounds = model.embed_sound(audio, 0, 99)
        assert len(sounds) == 12 - 5 == syncnet.score(model, faces, audio, batch_size=3).clips
        torch.testing.assert_close(model.embed_sound(audio, 2, 3), sounds[2:5], rtol=1e-4, atol=1e-5)


def test_tracks_of_faces():
    left = [(10 + t, 10, 210 + t, 250) for t in range(120)]
    boxes = [[left[t], (400, 0, 560, 150)] if t % 5 == 0 and not 30 <= t < 45 else [] for t in range(120)]
    tracks = face_tracks(boxes)
    assert [(first, len(track)) for first, track in tracks] == [(0, 116), (0, 116)]
    np.testing.assert_allclose(tracks[0][1][37], left[37])                  # a gap of 20 frames, filled
    assert [(f, len(t)) for f, t in face_tracks(boxes, cuts=[60])] == [(0, 56), (0, 56), (60, 56), (60, 56)]
    far = [b if t < 60 else [(x + 300, y, X + 300, Y) for x, y, X, Y in b] for t, b in enumerate(boxes)]
    assert len(face_tracks(far)) == 4                               # both jumped, neither onto the other
    assert face_tracks([[(0, 0, 60, 60)]] * 100) == [] == face_tracks([[left[0]]] * 50)
    halves, centres = smooth_track(tracks[0][1])
    assert halves[20] == 120 and tuple(centres[20]) == (130, 130)
    crop = face_crop(torch.zeros(3, 300, 600).byte(), 120, (130, 130))
    assert crop.shape == (3, 224, 224) and crop[0, 112, 0] == 110 and crop[0, 112, 112] == 0      # grey beyond the edge


def test_combine_scores():
    scores = [syncnet.Score(2, 5.0, 7.0, None, 10), syncnet.Score(-1, 3.0, 9.0, None, 10)]
    assert syncnet.combine(scores) == (0, 4.0, 8.0)                         # int() of 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Sound and video


@pytest.mark.parametrize("rate, channels, subtype, suffix", [
    (16000, 1, "PCM_16", ".wav"), (48000, 2, "FLOAT", ".wav"), (44100, 1, "PCM_24", ".wav"),
    (8000, 2, "PCM_U8", ".wav"), (22050, 2, "PCM_16", ".flac"), (16000, 1, "DOUBLE", ".wav")])
def test_sound_of_any_rate_and_kind(tmp_path, rate, channels, subtype, suffix):
    t = np.arange(rate) / rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * t)
    both = np.stack([1.1 * tone, 0.9 * tone], 1)[:, :channels] if channels == 2 else tone
    soundfile.write(tmp_path / f"a{suffix}", both, rate, subtype=subtype)
    sound = read_sound(tmp_path / f"a{suffix}")
    assert sound.dtype == np.float32 and len(sound) == 16000
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(sound - expected)[200:-200].max() < (0.01 if subtype == "PCM_U8" else 2e-3)


def test_sounds_that_cannot_be_used(tmp_path, av):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan, np.float32), 16000, subtype="FLOAT")
    (tmp_path / "broken.wav").write_bytes(b"RIFF no")
    (tmp_path / "broken.mp3").write_bytes(b"no sound" * 100)
    for name, reason in (("empty.wav", "not one sample"), ("nan.wav", "samples that are not numbers"),
                         ("no.wav", "no such"), ("broken.wav", "not a readable sound file"),
                         ("broken.mp3", "not a video or sound file")):
        with pytest.raises(UserError, match=reason):
            read_sound(tmp_path / name)


@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_video_round_trip(tmp_path, av, size):
    """Frames, their number, sound and its moment survive; odd sides grow by a pixel."""
    frames, sound = F.interpolate(smooth_pictures(30, 8).float(), size).byte(), speech(1.5)
    write_video(tmp_path / "a.mp4", frames, sound)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]                # no temporary file stays
    video = Video(tmp_path / "a.mp4")
    back = torch.from_numpy(np.stack(list(video))).permute(0, 3, 1, 2)
    assert len(video) == len(back) == 30 and (video.height, video.width) == tuple(n + n % 2 for n in size)
    assert (back[:, :, :size[0], :size[1]].float() - frames).abs().mean() < 12
    for start in (0, 1, 13, 29, 30):
        assert torch.equal(video.clip(start, 5), back[start:start + 5])
    again = read_sound(tmp_path / "a.mp4")
    n = 30 * 640
    assert len(again) >= n
    lags = [np.dot(again[400 + lag:n - 400 + lag], sound[400:n - 400]) for lag in range(-400, 400)]
    assert abs(np.argmax(lags) - 400) <= 1


def test_frame_rates_and_irregular_times(tmp_path, av):
    """What is shown at k / 25 s, to half a frame: of 30 frames a second some are left out, gaps are filled."""
    def write(path, times, base):
        from fractions import Fraction
        with av.open(str(path), "w") as out:
            stream = out.add_stream("libx264", rate=30, options={"crf": "5"})
            stream.width = stream.height = 32
            stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, base)
            stream.codec_context.time_base = Fraction(1, base)
            for i, time in enumerate(times):
                frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 8 * i, np.uint8))
                frame.pts, frame.time_base = time, Fraction(1, base)
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
        return [round(frame.mean() / 8) for frame in Video(path)]
    nearest = lambda times, base, count: [max(i for i, t in enumerate(times) if math.floor(t / base * 25 + 0.5) <= k)
                                          for k in range(count)]
    times = list(range(30))
    assert write(tmp_path / "30.mp4", times, 30)[:24] == nearest(times, 30, 24)
    times = [0, 20, 60, 80, 300, 340, 360, 700]                             # milliseconds
    assert write(tmp_path / "vfr.mkv", times, 1000)[:18] == nearest(times, 1000, 18)


def test_videos_filmed_sideways_are_turned(tmp_path, av):
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(90)                                     # counterclockwise
        picture = np.zeros((32, 64, 3), np.uint8)
        picture[:8] = 255                                                   # the top comes to the left
        out.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        out.mux(stream.encode(None))
    frame, = Video(tmp_path / "a.mp4")
    assert frame.shape == (64, 32, 3) and frame[:, :6].min() > 200 and frame[:, -6:].max() < 50


def test_sound_begins_where_the_picture_does(tmp_path, av):
    """A track that starts half a second late is late; one that starts early is cut."""
    from fractions import Fraction
    for late in (0.5, 0.0):
        with av.open(str(tmp_path / "a.mkv"), "w") as out:
            picture, track = out.add_stream("libx264", rate=25), out.add_stream("pcm_s16le", rate=16000, layout="mono")
            picture.width = picture.height = 32
            picture.pix_fmt = "yuv420p"
            for i in range(50):
                frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))
                frame.pts, frame.time_base = i, Fraction(1, 25)
                out.mux(picture.encode(frame))
            out.mux(picture.encode(None))
            for i in range(10):
                frame = av.AudioFrame.from_ndarray(np.full((1, 1600), 3000, np.int16), format="s16", layout="mono")
                frame.sample_rate, frame.time_base = 16000, Fraction(1, 16000)
                frame.pts = int(late * 16000) + 1600 * i
                out.mux(track.encode(frame))
            out.mux(track.encode(None))
        sound = read_sound(tmp_path / "a.mkv")
        assert len(sound) == 16000 * (1 + late) and np.flatnonzero(sound)[0] == 16000 * late


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_a_video(tmp_path, av, judge_file):
    """Peak memory of the whole command, for 5 s and 25 s of 256 x 256 pixels.

    A second of them takes 5 MB. Decoder and allocator need some seconds until they hold all that they use.
    """
    peaks = []
    for seconds in (5, 25):
        frames = smooth_pictures(25, 256).permute(0, 2, 3, 1).numpy()
        with VideoWriter(tmp_path / "a.mp4", 256, 256, sound=speech(seconds)) as video:
            for i in range(25 * seconds):
                video.write(frames[i % 25])
        argv = ["syncnet", "--ckpt", str(judge_file), "--device", "cpu", "--video", str(tmp_path / "a.mp4"), "--out",
                str(tmp_path / "a.png")]
        code = (
            f"import resource, runpy, sys; sys.argv[1:] = {argv}; runpy.run_path('sample.py', run_name='__main__'); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout.split()[-1]) / 1000)                 # MB
    assert peaks[1] - peaks[0] < 50, peaks      # all frames would be 98 MB more, and runs differ by 20


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_judging_a_video_by_the_command(tmp_path, av, judge_file, capsys):
    video = write_video(tmp_path / "a.mp4", smooth_pictures(40), speech(2))
    run(sample, "syncnet", "--ckpt", judge_file, "--video", video, "--out", tmp_path / "a.png", "--device", "cpu")
    out = capsys.readouterr().out
    found = r"face 1: 36 clips from frame 0: not in step within \+-15 frames, confidence 0\.\d+, distance 0\.\d+"
    assert re.search(found, out)                                            # its weights are random
    assert "s per frame, peak memory" in out and "a.png" in out
    from PIL import Image
    picture = Image.open(tmp_path / "a.png")
    assert picture.size == (560, 360) and picture.text["checkpoint"] == "tiny.safetensors"
    soundfile.write(tmp_path / "b.wav", np.zeros(32000), 16000)
    run(sample, "syncnet", "--ckpt", judge_file, "--video", video, "--audio", tmp_path / "b.wav", "--face", 2, 2, 14,
        14, "--out", tmp_path / "b.png", "--device", "cpu")
    said = capsys.readouterr()
    assert "note: the sound is silent" in said.err
    assert float(re.search(r"confidence ([\d.]+)", said.out)[1]) < 0.1      # not 0: other clips count at other shifts


def test_offsets_are_said_only_where_they_are_known():
    """A dip in the window; one beyond it, of which only the slope is seen; and next to none."""
    judge, original = tiny_syncnet(), vq.build(syncnet.OriginalSyncNet)
    shifts = torch.arange(-15, 16)
    dip = lambda at, depth: syncnet.best_shift(0.8 - depth / (1 + (shifts - at).abs() / 4), 100)
    for at in (-13, -3, 0, 8, 13):
        assert describe_score(dip(at, 0.6), judge).startswith(f"offset {-at:+d} frames")
    for at in (-20, -14, 14, 15, 25):
        assert describe_score(dip(at, 0.6), judge).startswith("not in step within +-15 frames, confidence 0.")
        assert describe_score(dip(at, 6.0), original).startswith("not in step within +-15 frames, confidence ")
    assert describe_score(dip(2, 0.2), judge).startswith("not in step within +-15")
    assert describe_score(dip(2, 0.2), original).startswith("offset -2 frames")             # of another unit
    short = torch.full((31,), math.nan)
    short[10:21] = torch.linspace(0.9, 0.2, 11)                             # a short clip allows few shifts
    assert describe_score(syncnet.best_shift(short, 9), judge).startswith("not in step within +-15")
    few = syncnet.best_shift(torch.tensor([0.9, 0.2, 0.9]), 9)              # --max-shift 1
    assert describe_score(few, judge).startswith("offset +0 frames")


def test_unrelated_sound_is_not_in_step():
    """The demo's judge on heads that it has not seen: where LEAST_CONFIDENCE comes from, with fewer of them."""
    judge = syncnet.load(ROOT / "demo" / "talking_head_syncnet.safetensors")
    frames, own = talking_head(3, 3.2)
    _, other = talking_head(4, 3.2)
    scores = [syncnet.score(judge, frames, sound) for sound in (own, other, shift_sound(own, -20))]
    assert [is_in_step(score, judge) for score in scores] == [True, False, False] and scores[0].offset == 0
    assert scores[0].confidence > 0.5 and max(score.confidence for score in scores[1:]) < 0.3


def test_a_toy_says_that_it_is_one(tmp_path, av, capsys):
    """The demo's judge on a video that is not the demo's; and weights that are no numbers."""
    video = write_video(tmp_path / "a.mp4", smooth_pictures(40), speech(2))
    run(sample, "syncnet", "--video", video, "--out", tmp_path / "a.png", "--device", "cpu", "--face", "whole")
    toy = "talking_head_syncnet.safetensors is a toy that was trained on drawn heads and knows no real faces, "
    assert toy in capsys.readouterr().out
    broken = tiny_syncnet()
    broken.visual_encoder.conv_in.weight.data[0] = math.nan
    syncnet.save(broken, tmp_path / "nan.safetensors")
    said = complaint(capsys, sample, "syncnet", "--ckpt", tmp_path / "nan.safetensors", "--video", video, "--out",
                     tmp_path / "b.png", "--device", "cpu")
    assert "holds values that are no finite numbers" in said


def test_what_is_said_about_videos_that_cannot_be_judged(tmp_path, av, judge_file, capsys):
    argv = ("syncnet", "--ckpt", judge_file, "--out", tmp_path / "a.png", "--device", "cpu")
    mute = write_video(tmp_path / "mute.mp4", smooth_pictures(20))
    assert "mute.mp4: has no sound; give one as --audio FILE" in complaint(capsys, sample, *argv, "--video", mute)
    short = write_video(tmp_path / "short.mp4", smooth_pictures(3), speech(1))
    said = complaint(capsys, sample, *argv, "--video", short)
    assert "short.mp4: face 1: expected at least 5 frames of video and as much sound; it has 3 frames" in said
    whole = write_video(tmp_path / "whole.mp4", smooth_pictures(40), speech(2)).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("cut.mp4", "text.mp4"):
        assert "not a video or sound file that can be read" in complaint(capsys, sample, *argv, "--video",
                                                                         tmp_path / name)
    assert "no such file" in complaint(capsys, sample, *argv, "--video", tmp_path / "none.mp4")
    soundfile.write(tmp_path / "a.wav", np.zeros(32000), 16000)
    said = complaint(capsys, sample, *argv, "--video", tmp_path / "a.wav")
    assert "has no picture, expected a video" in said or "not a video" in said
    said = complaint(capsys, sample, *argv, "--video", tmp_path / "whole.mp4", "--face", 5, 5, 99, 9)
    assert "--face 5 5 99 9: expected auto, detect, whole, or a box X0 Y0 X1 Y1 in pixels inside of 16 x 16" in said
    assert "ends in .png" in complaint(capsys, sample, *argv[:3], "--video", short, "--out", tmp_path / "a.jpg")


def test_without_pyav_the_way_out_is_named(tmp_path, judge_file, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    said = complaint(capsys, sample, "syncnet", "--ckpt", judge_file, "--video", tmp_path / "a.mp4", "--device", "cpu")
    assert "needs PyAV: pip install av" in said
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(UserError, match="pip install --no-deps facenet-pytorch"):
        find_faces(None, torch.device("cpu"))


def test_stereo_in_a_video_is_as_loud_as_in_a_file(tmp_path, av):
    from fractions import Fraction
    left, right = speech(1, 1), speech(1, 2)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        track = out.add_stream("pcm_f32le", rate=16000, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.stack([left, right], 1).reshape(1, -1), format="flt", layout="stereo")
        frame.sample_rate, frame.time_base, frame.pts = 16000, Fraction(1, 16000), 0
        out.mux(track.encode(frame))
        out.mux(track.encode(None))
    np.testing.assert_allclose(read_sound(tmp_path / "a.mkv"), read_sound(tmp_path / "a.wav"), atol=1e-5)


@pytest.mark.parametrize("suffix", [".mp4", ".ts", ".mkv", ".avi"])
def test_clips_from_the_middle_of_any_container(tmp_path, av, suffix):
    """Where a seek arrives differs; the frames must not."""
    from fractions import Fraction
    with av.open(str(tmp_path / f"a{suffix}"), "w") as out:
        stream = out.add_stream("mpeg4" if suffix == ".avi" else "libx264", rate=25, options={"g": "50"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for i, picture in enumerate(smooth_pictures(120, 32).permute(0, 2, 3, 1).numpy()):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))
            frame.pts, frame.time_base = i, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    video = Video(tmp_path / f"a{suffix}")
    whole = torch.from_numpy(np.stack(list(video))).permute(0, 3, 1, 2)
    assert len(whole) == 120 and abs(len(video) - 120) <= 2
    for start in (3, 49, 60, 99, 115):
        clip = video.clip(start, 4)
        assert len(clip) == 4 and (clip.float() - whole[start:start + 4]).abs().mean() < 2, start


def test_a_gap_in_the_sound_stays_a_gap(tmp_path, av):
    from fractions import Fraction
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        track = out.add_stream("pcm_s16le", rate=16000, layout="mono")
        for i in (0, 1, 2, 7, 8):                                           # tenths of a second
            frame = av.AudioFrame.from_ndarray(np.full((1, 1600), 3000 + i, np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = 16000, Fraction(1, 16000), 1600 * i
            out.mux(track.encode(frame))
        out.mux(track.encode(None))
    sound = read_sound(tmp_path / "a.mkv")
    assert len(sound) == 9 * 1600
    assert not sound[3 * 1600:7 * 1600].any()
    assert round(float(sound[7 * 1600] * 32768)) == 3007


def test_a_video_that_cannot_be_written_leaves_nothing(tmp_path, av):
    with pytest.raises(UserError, match="cannot be written"):
        write_video(tmp_path / "none" / "a.mp4", smooth_pictures(3))
    with pytest.raises(UserError, match="not one picture"):
        write_video(tmp_path / "a.mp4", smooth_pictures(0))
    with pytest.raises(KeyError), VideoWriter(tmp_path / "b.mp4", 16, 16) as video:
        video.write(smooth_pictures(1)[0].permute(1, 2, 0).numpy())
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_damaged_middle_is_survived(tmp_path, av):
    path = write_video(tmp_path / "a.mp4", smooth_pictures(60, 64), speech(3))
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + 2000
    data[at:at + 300] = bytes(300)
    path.write_bytes(data)
    frames = list(Video(path))
    assert 50 <= len(frames) <= 60


@pytest.mark.skipif(not CLIP.exists(), reason="the real clip is not part of the repository")
def test_a_real_clip_from_file_to_score(tmp_path, av, judge_file, capsys):
    """Decoding, resampling, cropping, scoring. The weights are random, so the scores only have to be finite."""
    video = Video(CLIP / "demo1_video.mp4")
    frames = list(video)
    assert len(frames) == len(video) == 65 and frames[0].shape == (960, 540, 3)
    assert len(read_sound(CLIP / "demo1_audio.wav")) == 48000
    argv = ("--video", CLIP / "demo1_video.mp4", "--audio", CLIP / "demo1_audio.wav", "--face", 255, 302, 343, 416)
    run(sample, "syncnet", *argv, "--ckpt", judge_file, "--out", tmp_path / "a.png", "--device", "cpu")
    assert "61 clips from frame 0" in capsys.readouterr().out
    torch.save(syncnet.export(random_judge()), tmp_path / "syncnet_v2.model")
    run(sample, "syncnet", *argv, "--ckpt", tmp_path / "syncnet_v2.model", "--out", tmp_path / "b.png", "--device",
        "cpu", "--max-shift", 3)
    out = capsys.readouterr().out
    assert "60 clips from frame 0" in out and math.isfinite(float(re.search(r"distance ([\d.]+)", out)[1]))


def random_judge():
    model = vq.build(syncnet.OriginalSyncNet).eval()
    for name, p in model.named_parameters():
        p.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(p.numel()))
    return model


# ----------------------------------------------------------------------------------------------------------------------
# The talking head, and training on it


def test_talking_heads_are_functions_of_their_seed():
    talking_head.cache_clear()
    frames, sound = talking_head(7, seconds=1.0, size=32)
    talking_head.cache_clear()
    again, sound_again = talking_head(7, seconds=1.0, size=32)
    assert torch.equal(frames, again) and np.array_equal(sound, sound_again)
    assert frames.shape == (25, 3, 32, 32) and frames.dtype == torch.uint8 and sound.shape == (16000,)
    assert 0.01 < np.abs(sound).max() <= 1 and not torch.equal(frames, talking_head(8, 1.0, 32)[0])


def test_mouths_move_with_the_sound_they_make():
    """The dark area of the mouth follows loudness, and fits best without a shift, on average over people."""
    curves = []
    for seed in range(12):
        frames, sound = talking_head(seed, seconds=4.0, size=48)
        dark = 255 - frames[:, 0, 28:42, 14:34].float().mean((1, 2))        # the mouth's place; the inside is dark
        loud = np.log(1e-3 + np.sqrt((sound[:100 * 640].reshape(100, 640) ** 2).mean(1)))
        curves.append([np.corrcoef(dark[10:90], loud[10 + shift:90 + shift])[0, 1] for shift in range(-8, 9)])
    mean = np.mean(curves, 0)
    assert abs(np.argmax(mean) - 8) <= 1 and mean.max() > 0.2 and mean[[0, -1]].max() < 0.5 * mean.max()


SYNCNET = ("syncnet", "--videos", 6, "--val-pairs", 8, "--batch-size", 4, "--device", "cpu", "--log-every", 1)


@pytest.fixture
def tiny_network(monkeypatch):
    make_tiny_syncnet(monkeypatch)


@pytest.mark.parametrize("extra", [("--contrast-steps", 2), ("--moments", 1)], ids=["moments", "pairs"])
def test_resumed_syncnet_run_equals_an_uninterrupted_one(tiny_network, tmp_path, capsys, extra):
    argv = (*SYNCNET, "--steps", 5, "--accum", 2, "--ema", 0.5, "--val-every", 2, *extra)
    run(train, *argv, "--out", tmp_path / "whole")
    assert "6 synthetic videos" in capsys.readouterr().out
    run(train, *argv, "--out", tmp_path / "parts", "--stop-after", 3)
    run(train, *argv, "--out", tmp_path / "parts", "--resume", "auto")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    rows = list(csv.DictReader(open(tmp_path / "parts" / "log.csv")))
    assert [int(r["step"]) for r in rows] == [1, 2, 3, 4, 5] and 0 <= float(rows[-1]["val_accuracy"]) <= 1
    run(train, *SYNCNET, "--evaluate", tmp_path / "parts" / "model.safetensors")
    out = capsys.readouterr().out
    assert "of 8 pairs classified correctly" in out and "median error over all 15" in out


def test_pairs_of_clips_and_sounds():
    data = SyntheticSyncClips(SYNCNET_CONFIG, 3, 1000)
    (frames, mels), labels, broken = data.__getitems__([(i % 3, (i,)) for i in range(40)])
    assert frames.shape == (40, 5, 3, 8, 16) and mels.shape == (40, 80, 16) and not broken
    assert 10 < labels.sum() < 30
    length, frames_at, mel_at = data.video(0)
    starts = range(length - 4)
    for i in (0, 3, 6):
        start = next(s for s in starts if torch.equal(mel_at(s), mels[i]))
        there = [s for s in starts if torch.equal(frames_at(s), frames[i])]
        assert (start in there) == bool(labels[i])
    late = SyntheticSyncClips(SYNCNET_CONFIG, 3, 1000, audio_offset=10)
    assert not torch.equal(late.video(0)[2](5), data.video(0)[2](5))
    sound = np.arange(1, 5001.0)
    assert shift_sound(sound, 2)[1280] == 1 == shift_sound(sound, 2)[:1281].sum() and shift_sound(sound, -2)[0] == 1281


def test_training_on_a_folder_of_clips(tiny_network, tmp_path, av, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(3):
        write_video(data / f"{i}.mp4", smooth_pictures(20, 24, seed=i), speech(0.8, seed=i))
    write_video(data / "mute.mp4", smooth_pictures(20, 24))
    write_video(data / "short.mp4", smooth_pictures(6, 24), speech(1))
    argv = (*SYNCNET, "--data", data, "--steps", 3, "--workers", 0, "--sample-every", 0)
    run(train, *argv, "--out", tmp_path / "out")
    said = capsys.readouterr()
    assert "5 videos" in said.out and "unreadable of 5" in said.out + said.err and "mute.mp4" in said.out + said.err
    (tmp_path / "empty").mkdir()
    assert "no videos in it" in complaint(capsys, train, *SYNCNET, "--data", tmp_path / "empty", "--out",
                                          tmp_path / "b")
    said = complaint(capsys, train, *argv, "--unaligned", "--out", tmp_path / "b")
    assert "--unaligned: is for synthetic videos" in said


@pytest.fixture
def folder(tmp_path, av):
    """Six videos of 40 frames with sound."""
    (tmp_path / "clips").mkdir()
    for i in range(6):
        write_video(tmp_path / "clips" / f"{i}.mp4", smooth_pictures(40, 24, seed=i), speech(1.6, seed=i))
    return tmp_path / "clips"


def test_videos_for_validation_are_decoded_once(tiny_network, folder, tmp_path, monkeypatch):
    """Not once per pair; and their clips are those that a video for training has."""
    args = train.parse_args([str(word) for word in (*SYNCNET, "--data", folder, "--val-data", folder, "--val-pairs", 24,
                                                    "--out", tmp_path / "out")])
    data, unseen = clips.open_sync_clips(args)
    opened = []
    monkeypatch.setattr(clips, "Video", lambda path: opened.append(str(path)) or Video(path))
    task = speech_tasks.SyncNetTask(args, unseen, unseen, torch.device("cpu"), torch.Generator(), micro_batches=1)
    assert len(task.val_items()[0]) == 24
    found = task.validate(tiny_syncnet())
    assert sorted(opened) == [str(folder / f"{i}.mp4") for i in range(6)]
    monkeypatch.setattr(unseen, "validates", False)
    assert task.validate(tiny_syncnet()) == pytest.approx(found, abs=1e-5) and len(opened) == 6 + 24
    monkeypatch.setattr(clips.VideoFolder, "LONGEST", 39)                   # too long to be kept: clips are sought
    unseen.validates, unseen.kept = True, {}
    assert task.validate(tiny_syncnet()) == pytest.approx(found, abs=1e-5) and len(opened) == 6 + 24 + 6


def test_all_given_videos_are_evaluated(tiny_network, folder, judge_file, capsys, monkeypatch):
    monkeypatch.setattr(clips.FolderSyncClips, "first_usable", lambda self, n: [self.whole(0)])
    run(train, *SYNCNET, "--evaluate", judge_file, "--data", folder)
    assert f"{judge_file}: cpu (as asked), 6 videos of {folder}" in capsys.readouterr().out


def test_more_moments_than_a_video_has(tiny_network, folder, tmp_path, capsys):
    argv = (*SYNCNET, "--workers", 0, "--out", tmp_path / "out", "--moments")
    assert "--moments 1000: expected 1 .. 116" in complaint(capsys, train, *argv, 1000)
    said = complaint(capsys, train, *argv, 37, "--data", folder)
    assert "each has to have sound and 41 frames (as many different clips as --moments 37 asks for)" in said
    data = clips.FolderSyncClips(folder, SYNCNET_CONFIG, split=False, moments=36)
    assert len(data.pair(0, (0,))[0]) == 36


def test_study_runs_every_setting_once(tiny_network, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(studies, "SYNCNET_STUDY",
                        {"batch": {"2": dict(batch_size=2), "4": {}}, "width": {"64": {}, "96": dict(embedding=96)}})
    run(train, "syncnet", "--study", "--steps", 2, "--videos", 4, "--val-pairs", 8, "--device", "cpu", "--out",
        tmp_path)
    rows = list(csv.DictReader(open(tmp_path / "study.csv")))
    cells = {(r["panel"], r["setting"]) for r in rows}
    assert cells == {("batch", "2"), ("batch", "4"), ("width", "64"), ("width", "96")}
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["base", "batch_size_2", "embedding_96"]
    from PIL import Image
    assert Image.open(tmp_path / "study.png").size == (1200, 300)


def test_settings_that_do_not_go_together(tmp_path, capsys):
    for flags, said in ((("--model", "var"), "--model var: choose one of 16_pixel_attn"),
                        (("--frames", 50), "clips of 50 frames: expected 1 to 39"),
                        (("--model", "talking_head_plain", "--frames", 5), "is made for 16 frames and 128 numbers"),
                        (("--model", "16_latent"), "reads latents, for which there is no training data here"),
                        (("--model", "16_pixel_attn"), "needs a folder of videos; synthetic ones have 64 x 64 pixels"),
                        (("--videos", 0), "--videos 0: expected at least 1"),
                        (("--study", "--frames", 5), "--study: varies --frames, --embedding and --attention itself")):
        assert said in complaint(capsys, train, *SYNCNET, *flags, "--out", tmp_path / "a")
