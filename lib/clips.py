"""Clips of talking faces with their sound: for SyncNet, for LatentSync, and for the demo's audio and video encoders.

As in lib/data.py, items are (index, seed), and __getitems__ returns (inputs, conditions, names of unusable videos).
"""
import hashlib
import itertools
import os
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import latentsync
import syncnet
import vq
from lib.console import UserError, check_ranges, check_writable, rank_and_world
from lib.data import fingerprint_of, first_readable, held_out, open_pictures
from lib.emoji import Emoji
from lib.pictures import UNREADABLE
from lib.syncnet_variants import variant
from lib.talking_head import RATE, shift_sound, speech, talking_head
from lib.video import Video, pyav, read_sound, videos_in
from lib.weights import content_hash
from syncnet import FPS, SAMPLE_RATE

VAL_HEADS = 100                                 # synthetic heads with the seeds 0 .. 99 are for validation
FIRST_HEAD = 1000                               # seed of the first head for training


def clip_items(data, items, read):
    """([read(index, seed)] of items, with the next usable video in place of an unusable one; the unusable ones)."""
    clips = []
    broken = []
    why_none = f"not one of these videos can be used; each has to have sound and {data.needed}"
    for index, seed in items:
        clips.append(first_readable(lambda i: read(i, seed), index, len(data), data.name, broken, why_none)[1])
    return clips, broken


class VideoFolder:
    """A folder of videos with sound and with aligned faces that fill the picture, as --prepare makes them.

    Every 20th video is held out; all clips of a source video go to one side.
    """

    READS_FILES = True
    LONGEST = 30 * FPS                          # frames of a video that is decoded as a whole
    kinds = "videos"

    def __init__(self, root, train, split, *options):
        pyav()
        self.root = root
        self.validates = not train
        self.kept = {}                                                      # what was read of the last videos
        self.files = [str(file) for file in videos_in(root)]
        if not self.files:
            raise UserError(f"--data {root}: no videos in it; expected .mp4 files of aligned faces, with sound")
        if split:
            sources = list(dict.fromkeys(map(self.source, self.files)))
            chosen = set(held_out(sources, train))
            self.files = [file for file in self.files if self.source(file) in chosen]
        listing = (f"{os.path.relpath(file, root)} {os.path.getsize(file)}" for file in self.files)
        self.fingerprint = " ".join(map(str, (fingerprint_of(listing), *options)))

    def video(self, index):
        """What `read` returns. Videos for validation are asked for again and again, so the last four are kept."""
        if not self.validates:
            return self.read(index)
        if index not in self.kept:
            if len(self.kept) == 4:
                del self.kept[next(iter(self.kept))]
            self.kept[index] = self.read(index)
        return self.kept[index]

    def clips_of(self, video):
        """clip(start, count) -> frames of a Video, uint8 (count, 3, h, w). For validation it is decoded only once."""
        if self.validates:
            whole = video.clip(0, self.LONGEST + 1)
            if len(whole) <= self.LONGEST:
                return lambda start, count: whole[start:start + count]
        return video.clip

    @staticmethod
    def source(file):
        """The video from which --prepare cut a clip."""
        return re.sub(r"_[0-9]{6}$", "", os.path.splitext(file)[0])

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return self.files[index]


class SyntheticHeads:
    """Talking heads from seeds, drawn when they are first needed and kept: 1.2 MB each at 64 x 64 pixels."""

    kinds = "synthetic heads"

    def __init__(self, first, count):
        self.first = first                                                  # seed
        self.count = count

    def __len__(self):
        return self.count

    def name(self, index):
        return f"talking head {self.first + index}"


class SyncClips:
    """Pairs of clip and sound. Subclasses have name(index), video(index) and whole(index).

    video(index) returns (number of frames, frames_at(start), mel_at(start)); whole(index) returns (frames, sound).
    moments: clips per video, see `pair`. audio_offset: see `spoiled`.
    """

    def __init__(self, config, audio_offset=0, moments=1):
        self.config = config
        self.audio_offset = audio_offset
        self.moments = moments
        self.shortest = max(2 * config.frames, moments + config.frames - 1)
        self.needed = f"{self.shortest} frames"
        if moments > config.frames + 1:
            self.needed += f" (as many different clips as --moments {moments} asks for)"

    def spoiled(self, index, sound):
        """The sound, shifted by at most audio_offset frames, by another amount for each video, as in raw data."""
        offset = np.random.default_rng((index, 1)).uniform(-self.audio_offset, self.audio_offset)
        return shift_sound(sound, offset)

    def pair(self, index, seed):
        """(frames uint8 (F, 3, H, W), mel (80, columns), label): label 1 if both are of one moment, else 0.

        Half of the pairs match. In the other half the frames come from any other start of the same video. With K
        `moments`, which all differ, it is frames (K, F, 3, H, W), mel (K, 80, columns) and label 1.
        """
        rng = np.random.default_rng(seed)
        frames = self.config.frames
        length, frames_at, mel_at = self.video(index)
        starts = length - frames + 1
        if length < self.shortest:
            raise OSError("too short")
        if self.moments > 1:
            sound_starts = rng.choice(starts, self.moments, replace=False).tolist()
            clip_starts = sound_starts
            label = 1
        else:
            sound_starts = [int(rng.integers(starts))]
            label = int(rng.integers(2))
            shift = 0 if label else int(rng.integers(1, starts))
            clip_starts = [(sound_starts[0] + shift) % starts]
        clips = [frames_at(start) for start in clip_starts]
        mels = [mel_at(start) for start in sound_starts]
        if any(len(clip) < frames for clip in clips) or any(mel is None for mel in mels):
            raise OSError("ends too soon")
        if self.moments > 1:
            return torch.stack(clips), torch.stack(mels), label
        return clips[0], mels[0], label

    def first_usable(self, n):
        """(frames, sound) of the first n videos that can be used."""
        usable = []
        for index in range(len(self)):
            with suppress(UserError, *UNREADABLE):
                frames, sound = self.whole(index)
                if len(frames) >= self.shortest:
                    usable.append((frames, sound))
            if len(usable) == n:
                break
        return usable

    def __getitems__(self, items):
        pairs, broken = clip_items(self, items, self.pair)
        frames, mels, labels = zip(*pairs)
        return (torch.stack(frames), torch.stack(mels)), torch.tensor(labels), broken


class SyntheticSyncClips(SyntheticHeads, SyncClips):
    """Videos of synthetic heads."""

    kinds = "synthetic videos"

    def __init__(self, config, count, first=0, seconds=4.8, unaligned=False, **options):
        SyntheticHeads.__init__(self, first, count)
        SyncClips.__init__(self, config, **options)
        self.seconds = seconds
        self.unaligned = unaligned
        self.mels = {}
        self.fingerprint = f"talking heads {first}+{count} {seconds} {config} {options} {unaligned}"

    def whole(self, index):
        height, width = self.config.picture
        return talking_head(self.first + index, self.seconds, width, height, self.unaligned)

    def video(self, index):
        frames, sound = self.whole(index)
        if index not in self.mels:
            self.mels[index] = syncnet.mel_spectrogram(self.spoiled(index, sound))

        def mel_at(start):
            first = syncnet.mel_start(start)
            return self.mels[index][:, first:first + self.config.columns]
        return len(frames), lambda start: frames[start:start + self.config.frames], mel_at


class FolderSyncClips(VideoFolder, SyncClips):
    """Videos of a folder. The videos must be short, because in training the whole sound is read for every pair."""

    def __init__(self, root, config, train=True, split=True, **options):
        SyncClips.__init__(self, config, **options)
        VideoFolder.__init__(self, root, train, split, config, options)

    def read(self, index):
        video = Video(self.files[index])
        sound = read_sound(self.files[index])
        clip = self.clips_of(video)

        def frames_at(start):
            return syncnet.lower_halves(clip(start, self.config.frames), self.config)

        def mel_at(start):
            return syncnet.mel_window(self.spoiled(index, sound), start, self.config.columns)
        return min(len(video), len(sound) * FPS // SAMPLE_RATE), frames_at, mel_at

    def whole(self, index):
        """(lower halves of the frames of at most 30 s, sound) of a video, for syncnet.score."""
        halves = []
        for frame in itertools.islice(Video(self.files[index]), 30 * FPS):
            halves += syncnet.lower_halves(torch.from_numpy(frame).permute(2, 0, 1)[None], self.config)
        return halves, read_sound(self.files[index])


def clip_config(args):
    """The SyncNet that --model, --frames, --embedding and --attention ask for."""
    if args.model not in syncnet.CONFIGS:
        raise UserError(f"--model {args.model}: choose one of {', '.join(syncnet.CONFIGS)}")
    try:
        return variant(syncnet.CONFIGS[args.model], args.frames, args.embedding, args.attention)
    except ValueError as e:
        raise UserError(f"--model {args.model}: {e}; leave --frames and --embedding out, or change them") from None


def open_sync_clips(args, config=None):
    """(training set, validation set) of `train.py syncnet`. Validation data are never spoiled."""
    config = config or clip_config(args)
    options = dict(audio_offset=args.audio_offset, moments=args.moments)
    if config.latent:
        raise UserError("--model 16_latent: reads latents, for which there is no training data here yet")
    if args.data == "demo":
        if config.picture[1] > 64:
            raise UserError(f"--data: recipe {args.recipe} needs a folder of videos; synthetic ones have 64 x 64 "
                            "pixels")
        check_ranges(("--moments", args.moments, 1, 120 - config.frames + 1))           # clips of a video of 4.8 s
        train = SyntheticSyncClips(config, args.videos, FIRST_HEAD, unaligned=args.unaligned, **options)
        return train, SyntheticSyncClips(config, VAL_HEADS, seconds=8.0)    # real clips have 5 to 10 s
    if args.unaligned:
        raise UserError("--unaligned: is for synthetic videos")
    train = FolderSyncClips(args.data, config, split=not args.val_data, **options)
    return train, FolderSyncClips(args.val_data or args.data, config, train=False, split=not args.val_data)


class DubbingDataset:
    """Dubbing examples. Subclasses have name(index) and video(index).

    video(index) returns (number of frames, frames_at(start, count), audio features (rows, layers, C), sound (n,)).
    `columns` is the length of a mel window if SyncNet takes part in the loss, else None. `audio_window`: see
    latentsync.Config.
    """

    def __init__(self, frames):
        self.frames = frames
        self.columns = None
        self.audio_window = (2, 2)
        self.shortest = 3 * frames
        self.needed = f"{self.shortest} frames"

    def scene(self, index, seed, clips=1):
        """`clips` successive clips of one video. Raises OSError if it is too short.

        Returns frames uint8 (clips * F, 3, H, W); for each clip a clip of another moment as reference, the same shape;
        the audio window of each frame (clips * F, rows * layers, C); the sound of the video; the first frame's number.
        """
        rng = np.random.default_rng(seed)
        F = self.frames
        length, frames_at, features, sound = self.video(index)
        clips = min(clips, length // F)
        if length < self.shortest:
            raise OSError("too short")
        start = int(rng.integers(length - clips * F + 1))
        references = []
        for first in range(start, start + clips * F, F):
            without_overlap = [i for i in range(length - F + 1) if abs(i - first) >= F]
            references.append(frames_at(int(rng.choice(without_overlap)), F))
        references = torch.cat(references)
        frames = frames_at(start, clips * F)
        if len(frames) < clips * F or len(references) < clips * F:
            raise OSError("ends too soon")
        rows = [latentsync.window_rows(start + i, len(features), window=self.audio_window) for i in range(clips * F)]
        return frames, references, features[np.stack(rows)].flatten(1, 2).float(), sound, start

    def clip(self, index, seed):
        """One clip: frames, references, audio windows, and the mel window of SyncNet or an empty tensor."""
        frames, references, audio, sound, start = self.scene(index, seed)
        mel = syncnet.mel_window(sound, start, self.columns) if self.columns else torch.zeros(0)
        if mel is None:
            raise OSError("its sound ends too soon")
        return frames, references, audio, mel

    def __getitems__(self, items):
        clips, broken = clip_items(self, items, self.clip)
        frames, references, audio, mel = (torch.stack(part) for part in zip(*clips))
        return (frames, references), (audio, mel), broken


class SyntheticDubbing(SyntheticHeads, DubbingDataset):
    """Synthetic talking heads as dubbing examples."""

    def __init__(self, first, count, frames):
        SyntheticHeads.__init__(self, first, count)
        DubbingDataset.__init__(self, frames)
        self.features = {}
        self.fingerprint = f"clips of heads {first}+{count} {frames} 4.8"         # seconds of a video

    def encode_audio(self, whisper, args):
        self.whisper = whisper                                              # runs when a video is first needed

    def video(self, index):
        frames, sound = talking_head(self.first + index)
        if index not in self.features:
            self.features[index] = torch.cat(list(self.whisper.pieces(sound))).cpu()
        return len(frames), lambda start, count: frames[start:start + count], self.features[index], sound


class FolderDubbing(VideoFolder, DubbingDataset):
    """Dubbing examples from a folder of videos."""

    def __init__(self, root, frames, resolution, train=True, split=True):
        DubbingDataset.__init__(self, frames)
        VideoFolder.__init__(self, root, train, split, frames, resolution)
        self.resolution = resolution

    def encode_audio(self, whisper, args):
        """Compute the audio features of all videos, which the processes share out.

        Their files are named after the content of the video and the encoder's weights, so renamed videos keep them.
        """
        folder = check_writable(args.cache or Path(self.root) / ".whisper", "--cache")
        weights = b"".join(p.detach().cpu().numpy().tobytes() for p in whisper.state_dict().values())
        encoder = hashlib.sha256(weights).hexdigest()[:16]
        rank, world = rank_and_world()
        self.features = []
        for i, path in enumerate(tqdm(self.files, desc="encoding sound", unit="video", leave=False, disable=rank > 0)):
            file = folder / f"{content_hash(path)[:32]}_{encoder}.safetensors"
            self.features.append(file)
            if file.exists() or i % world != rank:
                continue
            try:
                sound = torch.from_numpy(read_sound(path))
                features = torch.cat([piece.cpu().half() for piece in whisper.pieces(sound)])
            except (UserError, ValueError):                                 # `video` finds no file and reports it
                continue
            with vq.atomic(file) as temporary:
                save_file({"features": features, "sound": sound}, temporary)
        if world > 1:
            dist.barrier()
        if not any(file.exists() for file in self.features):
            raise UserError(f"--data {self.root}: not one of these {len(self)} videos has sound that can be read")

    def read(self, index):
        path = self.files[index]
        if not self.features[index].exists():
            raise OSError("no sound")
        tensors = load_file(self.features[index])
        sound = tensors["sound"].numpy()
        video = Video(path)
        if video.height != video.width:
            raise UserError(f"{path}: has {video.width} x {video.height} pixels, expected a square, an aligned face; "
                            "--prepare makes such videos")
        if video.width < self.resolution:
            raise UserError(f"{path}: has {video.width} pixels, but {self.resolution} are to be painted")

        clip = self.clips_of(video)

        def frames_at(start, count):
            frames = clip(start, count)
            if video.width == self.resolution:
                return frames
            size = (self.resolution, self.resolution)
            return F.interpolate(frames.float(), size, mode="bicubic", antialias=True).round().clamp(0, 255).byte()
        return min(len(video), len(sound) * FPS // SAMPLE_RATE), frames_at, tensors["features"], sound


def open_dubbing(args):
    """(training set, validation set) of `train.py latentsync`."""
    resolution = latentsync.CONFIGS[args.model].resolution
    if args.data == "demo":
        if resolution > 64:
            raise UserError(f"--data: recipe {args.recipe} needs a folder of videos; synthetic ones have 64 x 64 "
                            "pixels")
        check_ranges(("--frames", args.frames, 1, 40))                      # a reference needs as many of 120 again
        train = SyntheticDubbing(FIRST_HEAD, args.videos, args.frames)
        return train, SyntheticDubbing(0, VAL_HEADS, args.frames)
    options = dict(frames=args.frames, resolution=resolution, split=not args.val_data)
    train = FolderDubbing(args.data, **options)
    return train, FolderDubbing(args.val_data or args.data, train=False, **options)


class HeadPictures:
    """Frames of synthetic heads, 64 x 64 pixels, three of every person: for an autoencoder."""

    kinds = "frames of synthetic heads"

    def __init__(self, first, people):
        heads = tqdm(range(first, first + people), desc="drawing heads", unit="head", leave=False)
        self.pixels = torch.cat([talking_head(seed)[0][10::40] for seed in heads])
        self.fingerprint = f"frames of heads {first}+{people}"

    def __len__(self):
        return len(self.pixels)

    def __getitems__(self, items):
        return self.pixels[[i for i, _ in items]], torch.zeros(len(items)), []


class HeadSpeech:
    """For an audio encoder: log-mel spectrograms of voices, and the mouth 50 times a second (open, wide, teeth)."""

    kinds = "synthetic voices"

    def __init__(self, first, people):
        seeds = tqdm(range(first, first + people), desc="synthesizing", unit="voice", leave=False)
        voices = [speech(seed) for seed in seeds]
        self.mels = torch.stack([latentsync.log_mel(voice.sound) for voice in voices])
        self.mouths = torch.stack([torch.from_numpy(voice.plan[::RATE // 50, 6:]).float() for voice in voices])
        self.fingerprint = f"voices {first}+{people}"

    def __len__(self):
        return len(self.mels)

    def __getitems__(self, items):
        index = [i for i, _ in items]
        return self.mels[index], self.mouths[index], []


class HeadClips(SyntheticHeads):
    """Clips of 16 frames of synthetic heads: for a video encoder."""

    def __init__(self, first, count):
        super().__init__(first, count)
        self.fingerprint = f"bare clips of heads {first}+{count} 16"

    def clip(self, index, seed):
        frames, _ = talking_head(self.first + index)
        start = int(np.random.default_rng(seed).integers(len(frames) - 16 + 1))
        return frames[start:start + 16]

    def __getitems__(self, items):
        return torch.stack([self.clip(index, seed) for index, seed in items]), torch.zeros(len(items)), []


def open_data(args):
    """(training set, validation set) of a command line."""
    if args.model_name == "syncnet":
        return open_sync_clips(args)
    if args.model_name == "latentsync":
        return open_dubbing(args)
    if args.model_name not in ("whisper", "videomae", "t5"):
        if args.data == "demo" and args.recipe == "talking_head":
            return HeadPictures(FIRST_HEAD, 600), HeadPictures(0, VAL_HEADS)
        return open_pictures(args)
    if args.data != "demo":
        raise UserError(f"--data {args.data}: train.py {args.model_name} makes a small stand-in for the demo; its data "
                        "is always demo")
    if args.model_name == "t5":
        return Emoji(32, "training", captions=True), Emoji(32, "unseen", captions=True)
    if args.model_name == "whisper":
        return HeadSpeech(FIRST_HEAD, args.videos), HeadSpeech(0, VAL_HEADS)
    return HeadClips(FIRST_HEAD, args.videos), HeadClips(0, VAL_HEADS)
