"""Reading sound and video, and writing videos, with PyAV and soundfile."""
import itertools
import math
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

import vq
from lib.console import MissingPackage, UserError
from syncnet import FPS, SAMPLE_RATE

VIDEOS = {".mp4", ".mkv", ".mov", ".avi", ".webm"}
SOUND_FILES = {".wav", ".flac", ".ogg"}         # soundfile reads these, PyAV reads the rest


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


def open_container(path):
    """A file opened by PyAV. Raises UserError."""
    av = pyav()
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
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


def read_sound(path, rate=SAMPLE_RATE):
    """The sound of a file, or of a video, as (n,) float32 in [-1, 1] at 16 kHz or another rate. Raises UserError.

    Channels are averaged, other rates are resampled. The sound of a video begins where its picture begins.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    read = read_sound_file if path.suffix.lower() in SOUND_FILES else read_sound_track
    sound = read(path, rate)
    if not len(sound):
        raise UserError(f"{path}: there is no sound in it, not one sample")
    if not np.isfinite(sound).all():
        raise UserError(f"{path}: holds samples that are not numbers (nan or inf); export it again from its source")
    return sound


def read_sound_file(path, rate):
    """Read a sound file with soundfile, or with PyAV if soundfile does not know its kind."""
    import soundfile
    from scipy.signal import resample_poly
    try:
        sound, own_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as e:
        try:
            return read_sound_track(path, rate)                             # it knows more kinds of wav
        except UserError:
            raise UserError(f"{path}: not a readable sound file ({e})") from None
    sound = sound.mean(1)
    if own_rate != rate and len(sound):
        common = math.gcd(own_rate, rate)
        sound = resample_poly(sound, rate // common, own_rate // common).astype(np.float32)
    return sound


def read_sound_track(path, rate):
    """Read the sound of any file with PyAV. Gaps in it become silence."""
    av = pyav()
    with open_container(path) as container:
        stream = container.streams.best("audio")
        picture = container.streams.best("video")
        if stream is None:
            raise UserError(f"{path}: has no sound; give one as --audio FILE")
        origin = float((picture.start_time or 0) * picture.time_base) if picture else None     # second 0 of the result
        pieces = []
        begin = 0                                                           # sample at which the first piece begins
        end = 0                                                             # sample at which the next piece begins
        resampler = None
        layout = None

        def add(frames):
            nonlocal end
            for frame in frames:
                pieces.append(frame.to_ndarray().mean(0, dtype=np.float32))
                end += len(pieces[-1])
        try:
            for frame in decoded(container, stream):
                if (frame.rate, frame.format.name, frame.layout.name) != layout:    # it may change in joined files
                    add(resampler.resample(None) if resampler else ())
                    layout = frame.rate, frame.format.name, frame.layout.name
                    resampler = av.AudioResampler(format="fltp", rate=rate)
                if frame.time is not None:
                    origin = frame.time if origin is None else origin
                    start = round((frame.time - origin) * rate)
                    if not pieces:
                        begin = start
                        end = start
                    elif start - end > rate // 50:                          # something is missing: silence
                        pieces.append(np.zeros(start - end, np.float32))
                        end = start
                add(resampler.resample(frame))
            add(resampler.resample(None) if resampler else ())
        except (av.error.FFmpegError, ValueError) as e:
            raise UserError(f"{path}: its sound cannot be read ({e})") from None
    if not pieces:
        return np.zeros(0, np.float32)
    return np.pad(np.concatenate(pieces), (max(begin, 0), 0))[max(-begin, 0):]


# ----------------------------------------------------------------------------------------------------------------------
# Video


class Video:
    """The frames of a video at a constant rate, decoded when they are needed: memory does not depend on its length.

    Frame k is the last one of those that are shown nearer to k / fps seconds than to any other multiple, or, if there
    is none, the frame before. So frames of videos with another or an irregular rate are repeated or left out. `len` is
    the length in the file's header, which may be wrong. Every iteration starts from the beginning.
    """

    def __init__(self, path, fps=FPS):
        self.path = Path(path)
        self.fps = fps
        with open_container(path) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise UserError(f"{path}: has no picture, expected a video")
            duration = stream.duration
            if not duration:                                                # recorders of browsers do not write it
                ends = [packet.pts + (packet.duration or 0) - (stream.start_time or 0)
                        for packet in container.demux(stream) if packet.pts is not None]
                duration = max(ends, default=0)
            self.length = round(float(duration * stream.time_base) * fps)
        _, _, first = next(self.numbered(), (0, 0, None))
        if first is None:
            raise UserError(f"{path}: not one picture in it can be decoded")
        self.size = dict(width=first.width, height=first.height)
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
        """A PyAV frame as uint8 (h, w, 3), of the size of the first one, rotated as the file says."""
        picture = frame.to_ndarray(format="rgb24", **self.size)
        return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90) % 4))

    def clip(self, start, count):
        """`count` frames from `start` on, uint8 (count, 3, h, w); fewer at the end of the video."""
        pictures = list(itertools.islice(self.frames(start), count))
        if not pictures:
            return torch.zeros(0, 3, self.height, self.width, dtype=torch.uint8)
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


class VideoWriter:
    """Writes an .mp4 frame by frame: H.264 pictures and AAC sound.

    with VideoWriter(path, height, width, sound=samples) as video: video.write(picture), uint8 (h, w, 3). sound: (n,) in
    [-1, 1] at `rate`, cut to the length of the pictures. The file appears when it is complete.
    """

    def __init__(self, path, height, width, fps=FPS, sound=None, crf=18, rate=SAMPLE_RATE):
        self.path = Path(path)
        self.fps = fps
        self.sound = sound
        self.crf = crf
        self.rate = rate
        self.height = height + height % 2                                   # the format needs even sizes
        self.width = width + width % 2
        self.frames = 0                                                     # written so far
        self.samples = 0

    def __enter__(self):
        self.av = pyav()
        self.stack = ExitStack()
        temporary = self.stack.enter_context(vq.atomic(self.path))
        self.stack.push(self.explain_error)
        self.container = self.stack.enter_context(self.av.open(str(temporary.absolute()), "w", format="mp4"))
        self.stack.push(self.flush)
        self.stream = self.container.add_stream("libx264", rate=self.fps, options={"crf": str(self.crf)})
        self.stream.height = self.height
        self.stream.width = self.width
        self.stream.pix_fmt = "yuv420p"
        codec = self.stream.codec_context                                   # 1 is BT.709. Without it players guess
        codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = 1
        if self.sound is not None:
            self.track = self.container.add_stream("aac", rate=self.rate, layout="mono")
        return self

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
        if isinstance(error, self.av.error.FFmpegError):                    # a full disk, a missing folder
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None

    def write(self, picture):
        """Add the next picture."""
        down = self.height - picture.shape[0]
        right = self.width - picture.shape[1]
        if down or right:
            picture = np.pad(picture, ((0, down), (0, right), (0, 0)), mode="edge")
        frame = self.av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        frame.pts = self.frames
        frame.time_base = Fraction(1, self.fps)
        self.container.mux(self.stream.encode(frame))
        self.frames += 1
        if self.sound is not None:
            self.write_sound(self.frames * self.rate // self.fps)

    def write_sound(self, until):
        """Add the sound up to a sample; behind its end comes silence."""
        piece = np.zeros((1, until - self.samples), np.float32)
        available = np.asarray(self.sound[self.samples:until], np.float32)
        piece[0, :len(available)] = available
        frame = self.av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
        frame.sample_rate = self.rate
        frame.pts = self.samples
        frame.time_base = Fraction(1, self.rate)
        self.container.mux(self.track.encode(frame))
        self.samples = until
