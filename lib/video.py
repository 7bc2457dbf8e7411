"""Reading sound and video, and writing videos, with PyAV and soundfile."""
import itertools
import math
from collections import namedtuple
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import vq
from lib.colors import BT709, colors_of, oriented, to_rgb, to_yuv
from lib.console import MissingPackage, UserError
from syncnet import FPS, SAMPLE_RATE

VIDEOS = {".mp4", ".mkv", ".mov", ".avi", ".webm"}
SOUND_FILES = {".wav", ".flac", ".ogg"}         # soundfile reads these, PyAV reads the rest
SILENT = 1e-3                                   # a sound whose samples are all below this is called silent
LOUDEST = 100.0                                 # samples beyond this are no sound in [-1, 1]


def pyav():
    """The package that reads and writes videos without any program of the system."""
    try:
        import av
    except ImportError:
        raise MissingPackage("reading and writing videos needs PyAV: pip install av") from None
    return av


def videos_in(root):
    """Paths of the videos in a folder and in folders below it, sorted."""
    paths = [p for p in Path(root).rglob("*") if p.suffix.lower() in VIDEOS and p.is_file()]
    return sorted(p for p in paths if p.name[0] != ".")


def check_file(path):
    """Raise UserError unless a path leads to a file."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such file")
    if not Path(path).is_file():
        raise UserError(f"{path}: not a file; expected a video or a sound file")


def open_container(path):
    """A file opened by PyAV. Raises UserError."""
    av = pyav()
    check_file(path)
    try:
        return av.open(str(Path(path).absolute()), metadata_errors="replace")      # "12:30.mp4" would be a protocol
    except (av.error.FFmpegError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{path}: not a video or sound file that can be read ({reason})") from None


def decoded(container, stream):
    """The frames of a stream. Damaged packets are left out, and the caller fills the gap."""
    av = pyav()
    if stream.codec_context is None:
        raise UserError(f"{container.name}: its {stream.type} is coded in a way that PyAV has no decoder for")
    try:
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except av.error.FFmpegError:
                continue
    except av.error.FFmpegError:                                            # the file ends in the middle
        return


# ----------------------------------------------------------------------------------------------------------------------
# Sound


Sound = namedtuple("Sound", "samples rate layout channels note")
Sound.__doc__ = """The sound of a file. samples: (channels, n) float32 in [-1, 1], `rate` of them a second; layout:
FFmpeg's name, such as "stereo" or "5.1"; channels: their names, such as ["FL", "FR"]; note: for the user, or ""."""

# FFmpeg's layout for a number of channels, for files that do not say which channels they are.
LAYOUTS = {1: "mono", 2: "stereo", 3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
# FFmpeg's weights of channels in a mono mix. All that are not named here, such as surround channels, get 0.5.
MONO_WEIGHTS = {"FC": 1.0, "FL": 0.5**0.5, "FR": 0.5**0.5, "LFE": 0.0, "LFE2": 0.0}


def read_sound(path, rate=SAMPLE_RATE, track=None):
    """The sound of a file, or of a video, in mono: (n,) float32 at 16 kHz or another rate. Raises UserError.

    track: see `read_channels`.
    """
    samples, _ = mono(read_channels(path, rate, track))
    return samples


def mono(sound):
    """A Sound -> (its channels as one, (n,) float32; a note for the user or "").

    Channels are mixed with FFmpeg's weights. If the mix is more than 1 dB quieter than the loudest channel, it is
    amplified to be as loud: a voice that is on one side, or in the centre of 5.1, would become quiet. If the channels
    cancel each other, the loudest one is taken.
    """
    if len(sound.samples) == 1:
        return sound.samples[0], sound.note
    weights = np.array([MONO_WEIGHTS.get(name, 0.5) for name in sound.channels], np.float32)
    if not weights.any():
        weights += 1
    weights /= weights.sum()
    mix = weights @ sound.samples
    energies = np.array([energy(channel) for channel in sound.samples])
    loudest = int(energies.argmax())
    if energy(mix) < 0.1 * (weights**2 * energies).sum():                   # channels that differ would add up to all
        note = f"its channels cancel each other, so that only {sound.channels[loudest]} was heard"
        return sound.samples[loudest], ", ".join(filter(None, [sound.note, note]))
    gain = math.sqrt(energies[loudest] / max(energy(mix), 1e-30))
    if gain > 10 ** (1 / 20):
        mix *= min(gain, max(1.0, 1 / np.abs(mix).max()))
    return mix, sound.note


def energy(samples):
    """Mean square of samples (n,), as a float."""
    return float(np.square(samples, dtype=np.float64).mean())


def is_silent(samples):
    """Whether nothing can be heard in a sound."""
    return np.abs(samples).max(initial=0) < SILENT


def read_channels(path, rate=None, track=None, layout=None):
    """All channels of the sound of a file, or of a video, as a Sound. Raises UserError.

    rate: resample to this rate; layout: mix to these channels; track: which of several audio tracks, from 1 on, by
    default the first that is not silent. The sound of a video begins where its picture begins.
    """
    path = Path(path)
    check_file(path)
    sound = None
    if path.suffix.lower() in SOUND_FILES and track in (None, 1) and layout is None:
        sound = read_sound_file(path, rate)
    if sound is None:
        sound = read_sound_track(path, rate, track, layout)
    if not sound.samples.size:
        raise UserError(f"{path}: there is no sound in it, not one sample")
    if not np.isfinite(sound.samples).all():
        raise UserError(f"{path}: holds samples that are not numbers (nan or inf); export it again from its source")
    peak = np.abs(sound.samples).max()
    if peak > LOUDEST:
        raise UserError(f"{path}: holds samples up to {peak:.3g}, expected -1 .. 1; export it again from its source, "
                        "or divide it by its peak")
    return sound


def read_sound_file(path, rate):
    """Read mono or stereo with soundfile -> Sound; None for what PyAV may know better."""
    import soundfile
    from scipy.signal import resample_poly
    try:
        samples, own_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as e:
        try:
            return read_sound_track(path, rate)                             # it knows more kinds of wav
        except UserError:
            raise UserError(f"{path}: not a readable sound file ({e})") from None
    n, channels = samples.shape
    if channels > 2:                                                        # soundfile does not say which ones
        return None
    if not n and path.stat().st_size > 100:                                 # streamed: the header has no length
        return None
    samples = np.ascontiguousarray(samples.T)
    if rate is not None and own_rate != rate and n:
        common = math.gcd(own_rate, rate)
        samples = resample_poly(samples, rate // common, own_rate // common, axis=1).astype(np.float32)
    layout, names = ("mono", ["FC"]) if channels == 1 else ("stereo", ["FL", "FR"])
    return Sound(samples, rate or own_rate, layout, names, "")


def read_sound_track(path, rate=None, track=None, layout=None):
    """Read the sound of any file with PyAV -> Sound. Gaps in it become silence. The arguments: see `read_channels`."""
    with open_container(path) as container:
        streams = container.streams.audio
        if not streams:
            raise UserError(f"{path}: has no sound; give one as --audio FILE")
        names = []
        for i, stream in enumerate(streams, 1):
            parts = [stream.metadata.get("language"), stream.name, stream.layout.name if stream.codec_context else None]
            names.append(f"{i} ({' '.join(filter(None, parts))})")
    if track is not None and not 1 <= track <= len(names):
        raise UserError(f"--audio-track {track}: {path} has {', '.join(names)}")
    if track is not None or len(names) == 1:
        return decode_track(path, (track or 1) - 1, rate, layout)
    first = None
    for index in range(len(names)):
        sound = decode_track(path, index, rate, layout)
        note = f"sound is track {names[index]} of {', '.join(names)}; --audio-track N takes another"
        sound = sound._replace(note=note)
        if not is_silent(sound.samples):
            return sound
        first = first or sound
    return first


def decode_track(path, index, rate, layout):
    """The audio track with this index as a Sound."""
    av = pyav()
    with open_container(path) as container:
        stream = container.streams.audio[index]
        picture = container.streams.best("video")
        origin = float((picture.start_time or 0) * picture.time_base) if picture else None     # second 0 of the result
        pieces = []
        count = 0                                                           # channels
        begin = 0                                                           # sample at which the first piece begins
        end = 0                                                             # sample at which the next piece begins
        resampler = None
        kind = None

        def add(frames):
            nonlocal end
            for frame in frames:
                pieces.append(frame.to_ndarray().reshape(-1, count).T)
                end += pieces[-1].shape[1]
        try:
            for frame in decoded(container, stream):
                if not count:                                               # the first frame decides for all
                    rate = rate or frame.rate
                    layout = layout or frame.layout.name
                    count = len(av.AudioLayout(layout).channels)
                if (frame.rate, frame.format.name, frame.layout.name) != kind:      # it may change in joined files
                    add(resampler.resample(None) if resampler else ())
                    kind = frame.rate, frame.format.name, frame.layout.name
                    resampler = av.AudioResampler(format="flt", layout=layout, rate=rate)    # planes end at 7 channels
                if frame.time is not None:
                    origin = frame.time if origin is None else origin
                    start = round((frame.time - origin) * rate)
                    if not pieces:
                        begin = start
                        end = start
                    elif start - end > rate // 50:                          # something is missing: silence
                        pieces.append(np.zeros((count, start - end), np.float32))
                        end = start
                add(resampler.resample(frame))
            add(resampler.resample(None) if resampler else ())
        except (av.error.FFmpegError, ValueError) as e:
            raise UserError(f"{path}: its sound cannot be read ({e})") from None
    if not pieces:
        return Sound(np.zeros((1, 0), np.float32), rate or SAMPLE_RATE, "mono", ["FC"], "")
    if end <= 0:
        raise UserError(f"{path}: its sound ends {-end / rate:.2f} s before its picture begins; take the sound alone: "
                        f"ffmpeg -i {path} -vn sound.wav")
    samples = np.concatenate(pieces, 1)
    if begin > 0:
        samples = np.pad(samples, ((0, 0), (begin, 0)))
    channels = [channel.name for channel in av.AudioLayout(layout).channels]
    if set(channels) == {"NONE"} and count in LAYOUTS:
        layout = LAYOUTS[count]
        channels = [channel.name for channel in av.AudioLayout(layout).channels]
    return Sound(np.ascontiguousarray(samples[:, max(-begin, 0):]), rate, layout, channels, "")


# AAC's rates and layouts, as FFmpeg's encoder knows them.
AAC_RATES = {96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350}
AAC_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "quad", 5: "5.0", 6: "5.1"}


def read_sound_to_write(path, track=None):
    """The sound of a file as a Sound with its own rate and channels, or with the nearest that a VideoWriter takes."""
    sound = read_channels(path, track=track)
    rate = sound.rate if sound.rate in AAC_RATES else 48000
    layout = sound.layout
    if layout not in AAC_LAYOUTS.values():
        layout = AAC_LAYOUTS[min(len(sound.samples), 6)]
    if (rate, layout) == (sound.rate, sound.layout):
        return sound
    other_layout = layout if layout != sound.layout else None
    return read_channels(path, rate, track, other_layout)


# ----------------------------------------------------------------------------------------------------------------------
# Video


class Video:
    """The frames of a video at a constant rate, decoded when they are needed: memory does not depend on its length.

    Frame k is the last one of those that are shown nearer to k / fps seconds than to any other multiple, or, if there
    is none, the frame before. So frames of videos with another or an irregular rate are repeated or left out. `len` is
    the length in the file's header, which may be wrong. Every iteration starts from the beginning.

    Frames are as a player shows them: turned or mirrored as the file says, with square pixels, without transparency.
    colors: how the file codes colors; notes: what the user should know about this video. Raises UserError.
    """

    def __init__(self, path, fps=FPS):
        self.path = Path(path)
        self.fps = fps
        with open_container(path) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise UserError(f"{path}: has no picture, expected a video")
            aspect = stream.sample_aspect_ratio
            transparent = stream.metadata.get("alpha_mode") == "1"          # WebM keeps it beside the picture
            duration = stream.duration
            if not duration:                                                # recorders of browsers do not write it
                ends = [packet.pts + (packet.duration or 0) - (stream.start_time or 0)
                        for packet in container.demux(stream) if packet.pts is not None]
                duration = max(ends, default=0)
            self.length = round(float(duration * stream.time_base) * fps)
        _, _, first = next(self.numbered(), (0, 0, None))
        if first is None:
            raise UserError(f"{path}: not one picture in it can be decoded")
        self.notes = []
        self.colors, guessed = colors_of(first, path)
        if guessed:
            name = "BT.709" if self.colors.matrix == 1 else "BT.601"
            self.notes.append(f"colors taken as {name} for lack of a tag")
        width = first.width
        if aspect and aspect != 1:                                          # width of a pixel / its height
            width = max(2, 2 * round(width * float(aspect) / 2))
            self.notes.append(f"pixels made square, {first.width} x {first.height} became {width} x {first.height}")
        self.stored = (first.height, width)                                 # before it is turned
        if transparent or any(component.is_alpha for component in first.format.components):
            self.notes.append("transparency left out")
        self.height, self.width = self.picture(first).shape[:2]

    def __len__(self):
        return self.length

    def __iter__(self):
        return self.frames()

    def numbered(self, since=0.0):
        """(our frame number, second of its end, PyAV frame) of the decoded frames, from a key frame near `since` on."""
        with open_container(self.path) as container:
            stream = container.streams.best("video")
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate or self.fps)
            begins = float((stream.start_time or 0) * stream.time_base)
            if since:
                container.seek(int((begins + since) / stream.time_base), stream=stream)
            for i, frame in enumerate(decoded(container, stream)):
                if frame.time is None and since:
                    return                                                  # its place in the video is unknown
                seconds = i / rate if frame.time is None else frame.time - begins
                yield math.floor(seconds * self.fps + 0.5), seconds + 1 / rate, frame

    def numbered_from(self, start):
        """`numbered` from a key frame before frame `start` on; from the beginning if the file cannot seek."""
        for back in (0, 1, 10) if start else ():                            # some formats seek too far
            attempt = self.numbered(max(0.0, start / self.fps - back))
            try:
                first = next(attempt, None)
            except pyav().error.FFmpegError:                                # this file cannot seek
                first = None
            if first and first[0] <= start:
                return itertools.chain([first], attempt)
            attempt.close()
        return self.numbered()

    def frames(self, start=0):
        """uint8 (h, w, 3), from frame `start` on."""
        current = None                                                      # the frame that is shown
        picture = None                                                      # the same as an array
        due = start                                                         # number of the next frame to yield
        end = 0.0
        for number, end, frame in self.numbered_from(start):
            while current is not None and due < number:
                picture = self.picture(current) if picture is None else picture
                yield picture
                due += 1
            current = frame
            picture = None
        last = max(math.floor(end * self.fps + 0.5), start == 0)
        while current is not None and due < last:
            picture = self.picture(current) if picture is None else picture
            yield picture
            due += 1

    def picture(self, frame):
        """A PyAV frame as uint8 (h, w, 3), of the size of the first one, turned and mirrored as the file says."""
        picture = to_rgb(frame, self.colors)
        if picture.shape[:2] != self.stored:                                # other pixels, or a size that changes
            picture = np.asarray(Image.fromarray(picture).resize(self.stored[::-1], Image.BICUBIC))
        return np.ascontiguousarray(oriented(picture, frame))

    def clip(self, start, count):
        """`count` frames from `start` on, uint8 (count, 3, h, w); fewer at the end of the video."""
        pictures = list(itertools.islice(self.frames(start), count))
        if not pictures:
            return torch.zeros(0, 3, self.height, self.width, dtype=torch.uint8)
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


class VideoWriter:
    """Writes an .mp4 frame by frame: H.264 pictures and AAC sound.

    with VideoWriter(path, height, width, sound=samples) as video: video.write(picture), uint8 (h, w, 3). sound: (n,) in
    [-1, 1] at `rate`, or a Sound of `read_sound_to_write`; it is cut to the length of the pictures. colors: how colors
    are coded. The file appears when it is complete.
    """

    def __init__(self, path, height, width, fps=FPS, sound=None, crf=18, rate=SAMPLE_RATE, colors=BT709):
        self.path = Path(path)
        self.fps = fps
        if sound is not None and not isinstance(sound, Sound):
            sound = Sound(np.asarray(sound)[None], rate, "mono", ["FC"], "")
        self.sound = sound
        self.crf = crf
        self.colors = colors
        self.height = height + height % 2                                   # the format needs even sizes
        self.width = width + width % 2
        self.frames = 0                                                     # written so far
        self.samples = 0

    def __enter__(self):
        self.av = pyav()
        with ExitStack() as stack:                                          # after an error nothing is left behind
            stack.push(self.explain_error)
            temporary = stack.enter_context(vq.atomic(self.path))
            self.container = stack.enter_context(self.av.open(str(temporary.absolute()), "w", format="mp4"))
            stack.push(self.flush)
            self.add_streams()
            self.stack = stack.pop_all()
        return self

    def add_streams(self):
        self.stream = self.container.add_stream("libx264", rate=self.fps, options={"crf": str(self.crf)})
        self.stream.height = self.height
        self.stream.width = self.width
        self.stream.pix_fmt = "yuv420p"
        codec = self.stream.codec_context                                   # players guess what the file does not say
        codec.colorspace = self.colors.matrix
        codec.color_primaries = self.colors.primaries
        codec.color_trc = self.colors.transfer
        codec.color_range = 2 if self.colors.full else 1
        if self.sound is not None:
            self.track = self.container.add_stream("aac", rate=self.sound.rate, layout=self.sound.layout)

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def flush(self, kind, error, trace):
        if kind is not None:
            return
        if not self.frames:
            raise UserError(f"{self.path}: there is not one picture to write")
        for stream in self.container.streams:
            self.container.mux(stream.encode(None))

    def explain_error(self, kind, error, trace):
        if isinstance(error, (self.av.error.FFmpegError, OSError)):         # a full disk, a missing folder
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None

    def write(self, picture):
        """Add the next picture."""
        down = self.height - picture.shape[0]
        right = self.width - picture.shape[1]
        if down or right:
            picture = np.pad(picture, ((0, down), (0, right), (0, 0)), mode="edge")
        frame = self.av.VideoFrame.from_ndarray(to_yuv(picture, self.colors), format="yuv420p")
        frame.pts = self.frames
        frame.time_base = Fraction(1, self.fps)
        self.container.mux(self.stream.encode(frame))
        self.frames += 1
        if self.sound is not None:
            self.write_sound(self.frames * self.sound.rate // self.fps)

    def write_sound(self, until):
        """Add the sound up to a sample; behind its end comes silence."""
        available = self.sound.samples[:, self.samples:until]
        piece = np.zeros((len(available), until - self.samples), np.float32)
        piece[:, :available.shape[1]] = available
        frame = self.av.AudioFrame.from_ndarray(piece, format="fltp", layout=self.sound.layout)
        frame.sample_rate = self.sound.rate
        frame.pts = self.samples
        frame.time_base = Fraction(1, self.sound.rate)
        self.container.mux(self.track.encode(frame))
        self.samples = until
