"""Reading and writing videos and their sound: colors, geometry, channels, tracks, and what cannot be read."""
import os
from fractions import Fraction

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

import latentsync
import sample
from helpers import SYNCNET_CONFIG, complaint, run, smooth_pictures, speech, write_video
from lib.clips import FolderSyncClips
from lib.console import UserError
from lib.video import Video, VideoWriter, energy, mono, read_channels, read_sound, read_sound_to_write

WEIGHTS = {1: (0.2126, 0.7152, 0.0722), 6: (0.299, 0.587, 0.114), 5: (0.299, 0.587, 0.114)}     # of R, G, B in luma
SD, HD = (96, 128), (720, 1280)


@pytest.fixture(autouse=True)
def needs_pyav(av):
    """All tests of this file need PyAV."""


# ----------------------------------------------------------------------------------------------------------------------
# Colors


def code_matrix(matrix, full):
    """(3 x 3 matrix, offset) from RGB in 0 .. 255 to Y, Cb, Cr, by the formulas of the standards."""
    r, g, b = WEIGHTS[matrix]
    rows = np.array([[r, g, b], np.array([-r, -g, 1 - b]) / (2 * (1 - b)), np.array([1 - r, -g, -b]) / (2 * (1 - r))])
    if full:
        return rows, np.array([0.0, 128, 128])
    return rows * np.array([[219], [224], [224]]) / 255, np.array([16.0, 128, 128])


def picture(size):
    """A smooth picture with strong colors, (h, w, 3)."""
    corners = torch.tensor([[(31, 190, 40), (200, 40, 40)], [(30, 60, 220), (230, 225, 215)]], dtype=torch.float32)
    smooth = F.interpolate(corners.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=True)[0]
    return smooth.permute(1, 2, 0).numpy()


def write_coded(av, path, rgb, matrix, full, tag=2, codec="libx264", pix_fmt="yuv420p", frames=2, **tags):
    """A video of one picture, coded by `code_matrix`. tag: the matrix that the file names, 2 for none."""
    rows, offset = code_matrix(matrix, full)
    yuv = rgb @ rows.T + offset
    small = F.avg_pool2d(torch.from_numpy(yuv[..., 1:]).permute(2, 0, 1), 2).numpy()
    coded = 2 if full else 1
    planes = np.concatenate([yuv[..., 0].ravel(), small.ravel()]).round().astype(np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25, options={"qp": "0"} if codec == "libx264" else {})
        stream.height, stream.width, stream.pix_fmt = *rgb.shape[:2], pix_fmt
        context = stream.codec_context
        context.colorspace = tag
        context.color_range = coded
        for name, value in tags.items():
            setattr(context, name, value)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(planes.reshape(-1, rgb.shape[1]), format="yuv420p")
            frame.color_range = coded
            frame.pts, frame.time_base = i, Fraction(1, 25)
            out.mux(stream.encode(frame.reformat(format=pix_fmt, src_color_range=coded, dst_color_range=coded)))
        out.mux(stream.encode(None))
    return path


def decode(av, path, matrix, full):
    """(the last picture of a video, decoded by the formulas; its PyAV frame)."""
    with av.open(str(path)) as container:
        *_, frame = container.decode(video=0)
    height, width = frame.height, frame.width
    planes = frame.to_ndarray().ravel().astype(float)
    chroma = planes[height * width:].reshape(2, height // 2, width // 2).repeat(2, 1).repeat(2, 2)
    yuv = np.concatenate([planes[:height * width].reshape(1, height, width), chroma]).transpose(1, 2, 0)
    rows, offset = code_matrix(matrix, full)
    return ((yuv - offset) @ np.linalg.inv(rows).T).clip(0, 255), frame


CODED = [(SD, 6, 6, False), (SD, 1, 1, False), (SD, 6, 2, False), (HD, 6, 6, False), (HD, 1, 1, False),
         (HD, 1, 2, False), (SD, 5, 5, True), (SD, 6, 2, True), (HD, 1, 1, True), (HD, 1, 2, True)]


@pytest.mark.parametrize("size, matrix, tag, full", CODED)
def test_colors_come_back_as_they_were(tmp_path, av, size, matrix, tag, full):
    """Untagged videos are BT.709 from 720 lines on. What a dub writes is coded like what it read."""
    rgb = picture(size)
    video = Video(write_coded(av, tmp_path / "in.mp4", rgb, matrix, full, tag))
    found = next(iter(video))
    before, _ = decode(av, tmp_path / "in.mp4", matrix, full)
    assert np.abs(found - before).max() < 0.51 and np.abs((found - rgb).mean()) < 0.2
    assert bool(video.notes) == (tag == 2)
    with VideoWriter(tmp_path / "out.mp4", *size, crf=0, colors=video.colors) as out:      # without the codec's noise
        out.write(found)
    after, frame = decode(av, tmp_path / "out.mp4", matrix, full)
    assert np.abs(after - before).max() < 0.01
    assert frame.colorspace == matrix and frame.color_range == (2 if full else 1)


def test_a_dub_keeps_the_colors_of_untagged_hd_video(tmp_path, av, dub_files, capsys):
    rgb = picture((720, 320))
    source = write_coded(av, tmp_path / "in.mp4", rgb, 1, False)
    soundfile.write(tmp_path / "a.wav", speech(0.05), 16000)
    points = latentsync.Aligner(32).template.numpy() + 100                 # a small face at the upper left
    np.savez(tmp_path / "points.npz", landmarks=points[None].repeat(2, 0))
    run(sample, "latentsync", "--ckpt", dub_files / "dub.safetensors", "--video", source, "--audio", tmp_path / "a.wav",
        "--landmarks", tmp_path / "points.npz", "--steps", 1, "--crf", 0, "--device", "cpu", "--out",
        tmp_path / "out.MP4")
    assert "colors taken as BT.709 for lack of a tag, " in capsys.readouterr().out
    before, _ = decode(av, source, 1, False)
    after, frame = decode(av, tmp_path / "out.MP4", 1, False)
    assert frame.colorspace == 1
    assert np.abs(after - before)[200:].max() < 0.01
    assert np.abs(after - before)[100:140, 100:140].max() > 5               # the face was painted


def test_colors_of_ten_bits_and_of_rgb(tmp_path, av):
    rgb = picture(SD)
    ten = Video(write_coded(av, tmp_path / "ten.mkv", rgb, 1, False, 1, "ffv1", "yuv420p10le"))
    found = next(iter(ten))
    assert np.percentile(np.abs(found - rgb), 99) < 3 and np.abs((found - rgb).mean()) < 0.3
    with av.open(str(tmp_path / "rgb.mkv"), "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = *SD, "bgr0"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(rgb.round().astype(np.uint8)).reformat(format="bgr0")))
        out.mux(stream.encode(None))
    found = next(iter(Video(tmp_path / "rgb.mkv")))
    assert np.abs(found - rgb).max() <= 0.5


@pytest.mark.parametrize("tags, kind", [
    ({"color_trc": 16}, "PQ"), ({"color_trc": 18, "color_primaries": 9}, "HLG"), ({"color_primaries": 9}, "BT.2020")])
def test_hdr_is_refused(tmp_path, av, tags, kind):
    path = write_coded(av, tmp_path / "hdr.mp4", picture(SD), 1, False, 1, **tags)
    with pytest.raises(UserError, match=rf"hdr.mp4: its colors are HDR .*\({kind}\).*ffmpeg -i .*tonemap=hable"):
        Video(path)


# ----------------------------------------------------------------------------------------------------------------------
# Geometry


@pytest.mark.parametrize("ratio, width", [(Fraction(64, 45), 182), (Fraction(3, 4), 96), (Fraction(1), 128)])
def test_pixels_become_square(tmp_path, av, ratio, width):
    path = write_coded(av, tmp_path / "a.mkv", picture(SD), 6, False, 6, sample_aspect_ratio=ratio)
    video = Video(path)
    frame = next(iter(video))
    assert frame.shape == (96, width, 3) == (video.height, video.width, 3)
    assert video.notes == ([f"pixels made square, 128 x 96 became {width} x 96"] if ratio != 1 else [])
    assert np.abs(frame[10:-10, 10:-10] - picture((96, width))[10:-10, 10:-10]).max() < 5


IDENTITY = np.array([0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000], ">i4")


@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1), (0, 1, 1, 0),
                                    (0, -1, 1, 0), (0, 1, -1, 0), (0, -1, -1, 0)])
def test_all_ways_to_turn_and_mirror(tmp_path, av, matrix):
    """Against x' = a x + c y, y' = b x + d y for every pixel."""
    rgb = np.zeros((32, 64, 3), np.float32) + 60
    rgb[:16, :16] = 250                                                     # the upper left corner
    rgb[:16, 48:] = 150                                                     # the upper right corner
    path = write_coded(av, tmp_path / "a.mp4", rgb, 6, False, 6)
    a, b, c, d = matrix
    turned = IDENTITY.copy()
    turned[[0, 1, 3, 4]] = np.array(matrix) * 0x10000
    data = path.read_bytes()
    at = data.rindex(IDENTITY.tobytes())                                    # of the track; the first is the file's
    path.write_bytes(data[:at] + turned.tobytes() + data[at + 36:])
    y, x = np.mgrid[:32, :64]
    new_x, new_y = a * x + c * y, b * x + d * y
    expected = np.zeros((64, 32) if a == 0 else (32, 64))
    expected[new_y - new_y.min(), new_x - new_x.min()] = rgb[..., 0]
    video = Video(path)
    found = next(iter(video))
    assert found.shape[:2] == expected.shape == (video.height, video.width)
    assert np.abs(found[..., 0] - expected).max() < 4


def test_transparency_is_said(tmp_path, av):
    path = write_coded(av, tmp_path / "a.mkv", picture(SD), 6, False, 6, "ffv1", "yuva420p")
    assert Video(path).notes == ["transparency left out"]


# ----------------------------------------------------------------------------------------------------------------------
# Sound


def write_tracks(av, path, tracks, rate=16000, late=0.0, picture_from=None):
    """A file with one audio track for each (layout, samples (channels, n)). late: second at which they begin."""
    with av.open(str(path), "w") as out:
        streams = [out.add_stream("pcm_f32le", rate=rate, layout=layout) for layout, _ in tracks]
        if picture_from is not None:
            video = out.add_stream("libx264", rate=25)
            video.width = video.height = 32
            video.pix_fmt = "yuv420p"
        for stream, (layout, samples) in zip(streams, tracks):
            packed = np.ascontiguousarray(samples.T.reshape(1, -1), np.float32)
            frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), int(late * rate)
            out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
        if picture_from is not None:
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))
            frame.pts, frame.time_base = int(25 * picture_from), Fraction(1, 25)
            out.mux(video.encode(frame))
            out.mux(video.encode(None))
    return path


def decibels(a, b):
    return 10 * np.log10(energy(a) / energy(b))


VOICE = speech(1)
OTHER = 0.2 * speech(1, seed=9)
QUIET = 0 * VOICE
MIXES = {
    "mono": ("mono", [VOICE]), "both sides": ("stereo", [VOICE, VOICE]), "left": ("stereo", [VOICE, QUIET]),
    "right": ("stereo", [QUIET, VOICE]), "antiphase": ("stereo", [VOICE, -VOICE]),
    "nearly antiphase": ("stereo", [VOICE, -0.9 * VOICE]), "centre": ("5.1", [QUIET] * 2 + [VOICE] + [QUIET] * 3),
    "centre and music": ("5.1(side)", [OTHER, OTHER[::-1], VOICE, QUIET, OTHER, OTHER]),
    "7.1": ("7.1", [QUIET] * 2 + [VOICE] + [QUIET] * 5)}


@pytest.mark.parametrize("name", MIXES)
def test_a_voice_stays_as_loud_as_it_is(tmp_path, av, name):
    """Within 1 dB of the loudest channel, in whichever channel it is."""
    layout, channels = MIXES[name]
    path = write_tracks(av, tmp_path / "a.mkv", [(layout, np.stack(channels))])
    samples, note = mono(read_channels(path, 16000))
    assert abs(decibels(samples, VOICE)) < 1
    assert np.corrcoef(samples, VOICE)[0, 1] > 0.9
    assert bool(note) == ("antiphase" in name)


def test_files_of_many_channels_are_heard_like_tracks(tmp_path, av):
    """soundfile does not say which channel is which, so PyAV reads them."""
    soundfile.write(tmp_path / "a.wav", np.stack([QUIET, QUIET, VOICE, 0.9 * speech(1, 4), QUIET, QUIET], 1), 16000)
    sound = read_sound(tmp_path / "a.wav")
    assert np.corrcoef(sound, VOICE)[0, 1] > 0.99                           # the fourth is for low frequencies


def test_tracks_can_be_chosen(tmp_path, av):
    path = write_tracks(av, tmp_path / "a.mkv", [("mono", QUIET[None]), ("stereo", np.stack([VOICE, VOICE])),
                                                 ("mono", OTHER[None])])
    sound = read_channels(path)
    assert sound.layout == "stereo"
    assert "sound is track 2 (pcm_f32le 2 channels) of 1 (pcm_f32le 1 channels), 2" in sound.note
    assert abs(decibels(read_sound(path), VOICE)) < 0.1
    assert abs(decibels(read_sound(path, track=3), OTHER)) < 0.1 and not read_sound(path, track=1).any()
    for track in (0, 4):
        with pytest.raises(UserError, match=rf"--audio-track {track}: .*a.mkv has 1 \(pcm_.* channels\), 2 .*, 3 "):
            read_sound(path, track=track)
    soundfile.write(tmp_path / "a.wav", VOICE, 16000)
    with pytest.raises(UserError, match="--audio-track 2: .*a.wav has 1 "):
        read_sound(tmp_path / "a.wav", track=2)


@pytest.mark.parametrize("layout, rate, layout_after, rate_after", [
    ("stereo", 44100, "stereo", 44100), ("mono", 22050, "mono", 22050), ("5.1(side)", 48000, "5.1", 48000),
    ("stereo", 37800, "stereo", 48000)])
def test_a_written_sound_keeps_channels_and_rate(tmp_path, av, layout, rate, layout_after, rate_after):
    count = len(av.AudioLayout(layout).channels)
    time = np.arange(rate) / rate
    voices = np.stack([0.3 * np.sin(2 * np.pi * 60 * (i + 1) * time) for i in range(count)])
    path = write_tracks(av, tmp_path / "a.mkv", [(layout, voices)], rate)
    with VideoWriter(tmp_path / "out.mp4", 32, 32, sound=read_sound_to_write(path)) as out:
        for _ in range(25):
            out.write(np.zeros((32, 32, 3), np.uint8))
    found = read_channels(tmp_path / "out.mp4")
    assert (found.rate, found.layout) == (rate_after, layout_after)
    own = [np.corrcoef(a[:rate_after // 2], b[:rate_after // 2])[0, 1]
           for a, b in zip(found.samples, read_channels(path, rate_after).samples)]
    assert min(own) > 0.9


def test_streamed_wav_files_have_no_length(tmp_path, av):
    for subtype, length in (("PCM_16", 0), ("FLOAT", 0), ("PCM_16", 0xFFFFFFFF)):
        soundfile.write(tmp_path / "a.wav", VOICE, 16000, subtype=subtype)
        data = bytearray((tmp_path / "a.wav").read_bytes())
        at = data.index(b"data") + 4
        data[at:at + 4] = data[4:8] = length.to_bytes(4, "little")
        (tmp_path / "a.wav").write_bytes(data)
        np.testing.assert_allclose(read_sound(tmp_path / "a.wav"), VOICE, atol=1e-4)


def test_sound_that_ends_before_its_picture(tmp_path, av):
    path = write_tracks(av, tmp_path / "a.mov", [("mono", VOICE[None])], picture_from=3)
    with pytest.raises(UserError, match="a.mov: its sound ends 2.00 s before its picture begins; take the sound alone"):
        read_sound(path)


@pytest.mark.parametrize("peak", [1e30, 32768.0, -200.0])
def test_sound_beyond_all_measure_is_named(tmp_path, peak):
    samples = VOICE.copy()
    samples[99] = peak
    soundfile.write(tmp_path / "loud.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(UserError, match=r"loud.wav: holds samples up to .*, expected -1 .. 1"):
        read_sound(tmp_path / "loud.wav")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_a_dub_says_what_it_heard(tmp_path, av, dub_files, capsys):
    """Antiphase stereo in the second of two tracks, at 44.1 kHz: heard, said, and written as it was."""
    video = write_video(tmp_path / "A.MP4", smooth_pictures(5, 64))
    voice = speech(0.2, rate=44100)
    tracks = [("mono", 0 * voice[None]), ("stereo", np.stack([voice, -voice]))]
    given = write_tracks(av, tmp_path / "B.MKV", tracks, 44100)
    argv = ("latentsync", "--ckpt", dub_files / "dub.safetensors", "--video", video, "--aligned", "--steps", 1,
            "--device", "cpu", "--out", tmp_path / "out.v1" / "a.b.mp4")
    run(sample, *argv, "--audio", given)
    said = capsys.readouterr()
    assert "its channels cancel each other, so that only FL was heard, " in said.out and "sound is track 2" in said.out
    found = read_channels(tmp_path / "out.v1" / "a.b.mp4")
    assert (found.rate, found.layout) == (44100, "stereo") and "silent" not in said.err
    run(sample, *argv, "--audio", given, "--audio-track", 1)
    assert "the sound is silent, so the lips have nothing to say" in capsys.readouterr().err
    assert "--audio-track 3: " in complaint(capsys, sample, *argv, "--audio", given, "--audio-track", 3)


def test_names_need_not_be_text(tmp_path, av, judge_file, capsys):
    video = write_video(tmp_path / "a.mp4", smooth_pictures(40, 24), speech(2))
    odd = tmp_path / os.fsdecode(b"\xff caf\xe9.MP4")
    odd.write_bytes(video.read_bytes())
    run(sample, "syncnet", "--ckpt", judge_file, "--video", odd, "--device", "cpu", "--out", tmp_path / "a.b.png")
    data = FolderSyncClips(tmp_path, SYNCNET_CONFIG, split=False)
    assert [len(data.pair(i, (i,))) for i in range(len(data))] == [3, 3]


def test_the_demo_s_dub_says_that_it_is_a_toy(tmp_path, av, capsys):
    video = write_video(tmp_path / "a.mp4", smooth_pictures(2, 64), speech(0.05))
    run(sample, "latentsync", "--video", video, "--audio", video, "--aligned", "--steps", 1, "--device", "cpu", "--out",
        tmp_path / "b.mp4")
    said = capsys.readouterr().out
    assert "talking_head_latentsync.safetensors is a toy that was trained on drawn heads" in said


def test_what_is_no_video(tmp_path, capsys):
    (tmp_path / "folder.mp4").mkdir()
    for path in ("/dev/null", tmp_path / "folder.mp4"):
        said = complaint(capsys, sample, "syncnet", "--video", path, "--device", "cpu", "--out", tmp_path / "a.png")
        assert f"{path}: not a file; expected a video or a sound file" in said
