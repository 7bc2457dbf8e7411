"""`train.py latentsync --prepare`: videos of any kind become clips of aligned faces with sound in sync.

Videos are converted to 25 frames a second and 16 kHz, cut where shots end and every few seconds, faces are aligned, and
the sound is moved until it is in sync. prepared.csv says what was left out and why. An interrupted run continues.
"""
import argparse
import collections
import concurrent.futures
import csv
import functools
import importlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import threading
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import latentsync
import syncnet
from lib.console import MissingPackage, UserError, check_writable, choose_device
from lib.face_metrics import score_aligned
from lib.faces import check_judge, find_faces, given_points, is_cut, points_of_faces, scene_colors
from lib.pictures import UNREADABLE, write_table
from lib.readers import ignore_signals
from lib.talking_head import shift_sound
from lib.video import VIDEOS, Video, VideoWriter, pyav, read_sound, videos_in
from lib.weights import find_checkpoint
from syncnet import FPS, SAMPLE_RATE

SMALLEST_FACE = 50                              # pixels. Smaller faces are not counted


class Rejected(Exception):
    """The reason why a video or a piece of it is not used."""


class Piece:
    """Some frames of a Video, which can be iterated over again and again."""

    def __init__(self, video, start, count):
        self.video = video
        self.start = start
        self.count = count
        self.path = video.path
        self.height = video.height
        self.width = video.width

    def __len__(self):
        return self.count

    def __iter__(self):
        return itertools.islice(self.video.frames(self.start), self.count)


def shots_of(video):
    """(frames with which a shot begins, from 0 on; number of all frames).

    The authors' detector PySceneDetect finds them if it is installed. Otherwise a shot begins where colors change.
    """
    try:
        from scenedetect import AdaptiveDetector, VideoOpenFailure, detect
        scenes = detect(str(video.path), AdaptiveDetector(adaptive_threshold=2))
        return sorted({0, *(round(begin.seconds * FPS) for begin, _ in scenes)}), len(video)
    except ImportError:
        pass
    except VideoOpenFailure:                                                # its reader knows fewer formats
        pass
    cuts = [0]
    before = None
    count = 0
    for i, frame in enumerate(video):
        colors = scene_colors(Image.fromarray(frame))
        if before is not None and is_cut(before, colors):
            cuts.append(i)
        before = colors
        count = i + 1
    return cuts, count


def pieces_of(cuts, count, length, shortest):
    """Shots -> [(first frame, frames)] of `length` frames. The rest of a shot is added to its last piece."""
    pieces = []
    for start, end in zip(cuts, [*cuts[1:], count]):
        starts = list(range(start, max(end - length, start) + 1, length))
        for first, last in zip(starts, [*starts[1:], end]):
            if last - first >= shortest:
                pieces.append((first, last - first))
    return pieces


def aligned_faces(piece, options, device):
    """Aligned faces of a piece, a list of uint8 (3, r, r). Raises Rejected unless all frames show one large face.

    The list ends where the video does, which may be before its header says. Landmarks come from NAME.npz beside
    NAME.mp4, or from a detector.
    """
    file = piece.path.with_suffix(".npz")
    if file.exists():
        points = given_points(file, piece.start + piece.count)[piece.start:piece.start + piece.count]
    else:
        points = points_of_one_face(piece, options, device)
    missing = int(np.isnan(points).any((1, 2)).sum())
    if missing:
        raise Rejected(f"no face in {missing} of {piece.count} frames")
    align = latentsync.Aligner(options.resolution)
    faces = []
    for frame, three_points in zip(piece, points):
        matrix = align(three_points)
        face = latentsync.align_face(torch.from_numpy(frame), matrix, align.canvas, options.resolution)
        faces.append(face.byte())
    if len(faces) < max(options.shortest, piece.count - FPS):
        raise Rejected(f"ends after {len(faces)} of {piece.count} frames")
    return faces


def points_of_one_face(piece, options, device):
    """Points (frames, 3, 2) of a piece, nan where no face was found. Raises Rejected unless there is one large face."""
    every = 1 if device.type == "cuda" else 3
    faces, cuts = find_faces(piece, device, every, instead="NAME.npz with landmarks beside NAME.mp4")
    if cuts:
        raise Rejected(f"another shot begins at frame {piece.start + cuts[0]}")
    sides = []                                                              # sides of the faces in every examined frame
    for found in faces[::every]:
        longer = [max(box[2] - box[0], box[3] - box[1]) for box in found]
        sides.append([side for side in longer if side >= SMALLEST_FACE])
    if max(map(len, sides), default=0) > 1:
        raise Rejected(f"{max(map(len, sides))} faces")
    ranks = points_of_faces(faces, cuts, every)
    if not ranks or not any(sides):
        raise Rejected(f"no face of {SMALLEST_FACE} pixels or more")
    median = float(np.median(sum(sides, [])))
    if median < options.min_face:
        raise Rejected(f"a face of {median:.0f} pixels, --min-face is {options.min_face}")
    return ranks[0]


load_judge = functools.lru_cache(maxsize=1)(syncnet.load)                   # loaded once per process
sound_of = functools.lru_cache(maxsize=1)(read_sound)                       # kept for the next piece of a video


@functools.lru_cache(maxsize=1)
def quality_function(name):
    """The function that --quality MODULE:FUNCTION names."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as e:
        raise UserError(f"--quality {name}: {e}; expected MODULE:FUNCTION, of a file here or of a package") from None


def sync_score(faces, sound, options, device):
    """The Score of aligned faces and their sound. Raises Rejected if they do not belong together."""
    try:
        score = score_aligned(load_judge(options.syncnet, device=device.type), faces, sound)
    except ValueError as e:
        raise Rejected(f"SyncNet: {e}") from None
    if score.confidence < options.min_confidence:
        raise Rejected(f"confidence {score.confidence:.2f}, --min-confidence is {options.min_confidence:g}")
    if abs(score.offset) > options.max_offset:
        raise Rejected(f"offset {score.offset:+d} frames, --max-offset is {options.max_offset}")
    return score


def split_video(source, options):
    """The pieces [(first frame, frames)] of a video. Raises Rejected."""
    with rejecting(source):
        sound_of(source)
        cuts, count = shots_of(Video(source))
    pieces = pieces_of(cuts, count, options.piece * FPS, options.shortest)
    if not pieces:
        raise Rejected(f"too short: {count} frames in {len(cuts)} shots, a clip takes {options.shortest} in one")
    return pieces


@contextmanager
def rejecting(source):
    """Turn an error of a video into Rejected, without its path and without advice."""
    try:
        yield
    except MissingPackage:                                                  # this is no fault of the video
        raise
    except (UserError, *UNREADABLE) as e:
        raise Rejected(str(e).removeprefix(f"{source}: ").split(";")[0]) from None


def make_clip(source, out, start, count, options):
    """Write one clip -> columns of its row in prepared.csv. Raises Rejected."""
    device, _ = choose_device(options.device)
    with rejecting(source):
        faces = aligned_faces(Piece(Video(source), start, count), options, device)
        sound = sound_of(source)
    count = len(faces)

    def cut(sound):
        return sound[start * SAMPLE_RATE // FPS:(start + count) * SAMPLE_RATE // FPS]
    if len(cut(sound)) < (count - 1) * SAMPLE_RATE // FPS:
        raise Rejected("its sound ends too soon")
    row = {"frames": count}
    if options.syncnet:
        score = sync_score(faces, cut(sound), options, device)
        row |= {"offset": score.offset, "confidence": score.confidence}
        sound = shift_sound(sound, score.offset)                            # early sound is delayed
    if options.quality:
        pictures = [faces[i].permute(1, 2, 0).numpy() for i in (0, count // 2, -1)]
        row["quality"] = float(quality_function(options.quality)(pictures))
        if row["quality"] < options.min_quality:
            raise Rejected(f"quality {row['quality']:.1f}, --min-quality is {options.min_quality:g}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(out, options.resolution, options.resolution, sound=cut(sound), crf=13) as video:
        for face in faces:
            video.write(face.permute(1, 2, 0).numpy())
    return row


COLUMNS = ("source", "bytes", "start", "verdict", "frames", "offset", "confidence", "quality", "file", "settings")


class Table:
    """prepared.csv: a row for every piece, with the reason if it was rejected, and a row for every finished video.

    Rows count as long as their video and their clip have not changed. Failures are tried again.
    """

    def __init__(self, path, sizes, settings):
        self.path = path
        self.sizes = sizes                                                  # {source: bytes} of the videos
        self.settings = settings
        rows = []
        if path.exists():
            with open(path, newline="", encoding="utf-8") as file:          # its last row may have been cut off
                rows = [row for row in csv.DictReader(file) if None not in row.values()]
        other = next((row["settings"] for row in rows if row["settings"] != settings), None)
        if other:
            raise UserError(f"{path}: was made with other settings ({other}; now {settings}); give the same, or "
                            "another --data")
        incomplete = {row["source"] for row in rows if not self.counts(row)}
        for row in rows:
            if row["verdict"] == "kept" and not self.same_video(row):
                (path.parent / row["file"]).unlink(missing_ok=True)         # a clip of a video that has changed
        self.rows = [row for row in rows if self.counts(row)
                     and not (row["verdict"] == "done" and row["source"] in incomplete)]
        write_table(path, self.rows, COLUMNS)
        self.known = {(row["source"], row["start"]) for row in self.rows}

    def same_video(self, row):
        return row["bytes"] == self.sizes.get(row["source"], row["bytes"])

    def counts(self, row):
        """Whether a row need not be done again."""
        clip_exists = row["verdict"] != "kept" or (self.path.parent / row["file"]).is_file()
        return self.same_video(row) and clip_exists and not row["verdict"].startswith("failed")

    def add(self, source, verdict, start="", **columns):
        row = {"source": source, "bytes": self.sizes[source], "start": start, "verdict": verdict} | columns
        self.rows.append(row | {"settings": self.settings})
        with open(self.path, "a", newline="", encoding="utf-8") as f:
            csv.DictWriter(f, COLUMNS).writerow(self.rows[-1])

    def has(self, source, start=""):
        return (source, str(start)) in self.known

    def summary(self):
        """What was kept, and the reasons for the rest, without the numbers in them."""
        kept = [row for row in self.rows if row["verdict"] == "kept"]
        rejected = [row["verdict"] for row in self.rows if row["verdict"] not in ("kept", "done")]
        reasons = collections.Counter(re.sub(r"[-+]?[0-9.]+", "..", verdict) for verdict in rejected)
        seconds = sum(int(row["frames"]) for row in kept) / FPS
        text = f"kept {len(kept)} clips, {seconds / 60:.1f} min"
        if reasons:
            text += "; rejected: " + ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common())
        return text


def check_args(args):
    """(folder of raw videos, folder of clips, the arguments with all defaults). Raises UserError."""
    if args.data == "demo":
        raise UserError("--prepare: give the folder that is to hold the clips as --data DIR")
    for flag, needs in (("min_confidence", "syncnet"), ("max_offset", "syncnet"), ("min_quality", "quality")):
        if getattr(args, flag) is not None and not getattr(args, needs):
            raise UserError(f"--{flag.replace('_', '-')}: goes with --{needs}")
    pyav()
    raw = Path(args.prepare)
    out = check_writable(args.data, "--data")
    if raw.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"--data {out}: lies in the folder of the raw videos; choose one outside of it")
    if args.quality:
        quality_function(args.quality)
    judge = None
    min_confidence = 3.0
    if args.syncnet:
        judge = str(find_checkpoint(args.syncnet))
        network = load_judge(judge, device="cpu")
        check_judge(network, f"--syncnet {args.syncnet}", original=True)
        if not isinstance(network, syncnet.OriginalSyncNet):                # its confidence lies in 0 .. 1
            min_confidence = 0.3
    resolution = latentsync.CONFIGS[args.model].resolution
    defaults = {"min_face": resolution, "min_confidence": min_confidence, "max_offset": 6, "min_quality": 40.0}
    unset = {name: value for name, value in defaults.items() if getattr(args, name) is None}
    shortest = 3 * max(16, args.frames)                                     # frames that a clip needs
    options = vars(args) | unset | {"syncnet": judge, "resolution": resolution, "shortest": shortest}
    return raw, out, argparse.Namespace(**options)


def prepare(args):
    """`train.py latentsync --prepare RAW_DIR --data OUT_DIR`."""
    raw, out, options = check_args(args)
    paths = {str(path.relative_to(raw)): path for path in videos_in(raw)}
    if not paths:
        raise UserError(f"--prepare {raw}: no videos in it; expected {', '.join(sorted(VIDEOS))}")
    for leftover in out.rglob(f".{'[0-9a-f]' * 12}.*.mp4"):                 # left by a run that was killed
        leftover.unlink()
    settings = [f"of {raw.resolve()}", f"{options.resolution} pixels", f"{options.piece} s", f"face {options.min_face}"]
    if options.syncnet:
        settings.append(f"{Path(options.syncnet).name} {options.min_confidence:g} {options.max_offset}")
    if options.quality:
        settings.append(f"{options.quality} {options.min_quality:g}")
    sizes = {source: str(path.stat().st_size) for source, path in paths.items()}
    table = Table(out / "prepared.csv", sizes, ", ".join(settings))
    def stop(*_):
        """SIGTERM and Ctrl-C alike. A second one ends the process at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        tqdm.write("stopping: clips that have begun are finished; the same command goes on from there")
        raise KeyboardInterrupt
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    pool = concurrent.futures.ThreadPoolExecutor(1)                         # jobs run in this process
    if args.workers:
        pool = concurrent.futures.ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), start_worker)
    try:
        work_off(pool, max(1, 2 * args.workers), table, paths, out, options)
    finally:
        pool.shutdown(cancel_futures=True)                                  # jobs that have begun are finished
    print(f"{table.summary()}; all rows in {table.path}")
    if not options.syncnet:
        print("note: without --syncnet sound and picture are assumed to be in sync")


def work_off(pool, room, table, paths, out, options):
    """Split all videos and make all clips, `room` jobs at a time. Begun videos are finished first."""
    sources = [source for source in paths if not table.has(source)]
    waiting = iter(sources)
    pieces = collections.deque()                                            # (source, first frame, frames) to be made
    open_pieces = collections.Counter()                                     # how many of each video are not finished
    jobs = {}                                                               # future: (source, first frame or "", file)
    with tqdm(total=len(sources), unit="video") as bar:
        while True:
            while len(jobs) < room:
                if pieces:
                    source, start, count = pieces.popleft()
                    file = f"{source}_{start:06d}.mp4"
                    job = pool.submit(make_clip, paths[source], out / file, start, count, options)
                    jobs[job] = source, start, file
                elif (source := next(waiting, None)) is not None:
                    jobs[pool.submit(split_video, paths[source], options)] = source, "", ""
                else:
                    break
            if not jobs:
                return
            for job in concurrent.futures.wait(jobs, return_when=concurrent.futures.FIRST_COMPLETED).done:
                source, start, file = jobs.pop(job)
                result, verdict = outcome(job)
                if start != "":
                    columns = result | {"file": file} if verdict == "kept" else {}
                    table.add(source, verdict, start, **columns)
                    open_pieces[source] -= 1
                elif verdict == "kept":
                    new = [(source, *piece) for piece in result if not table.has(source, piece[0])]
                    pieces.extend(new)
                    open_pieces[source] = len(new)
                else:
                    table.add(source, verdict)
                if not open_pieces[source]:
                    if start != "" or verdict == "kept":
                        table.add(source, "done")
                    bar.update()


def outcome(job):
    """(result of a job, "kept" or the reason why not). After an unexpected error the next run tries again."""
    try:
        return job.result(), "kept"
    except Rejected as e:
        return None, str(e)
    except BrokenProcessPool:
        raise UserError("--workers: one of the processes died, perhaps out of memory; what was done is kept: start "
                        "again, with fewer of them, or with 0 to see at which video") from None
    except (UserError, OSError, KeyboardInterrupt):
        raise
    except Exception as e:
        return None, f"failed: {type(e).__name__}: {e}".replace("\n", " ")[:200]


def start_worker():
    """Initialise a worker: one thread, ignore Ctrl-C, exit with the parent."""
    ignore_signals()
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process().sentinel

    def exit_with_parent():
        multiprocessing.connection.wait([parent])
        os._exit(1)
    threading.Thread(target=exit_with_parent, daemon=True).start()
