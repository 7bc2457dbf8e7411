"""Finding faces in videos, following them, and the crops of them that the networks take."""
import itertools
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import latentsync
import syncnet
from lib.console import MissingPackage, UserError
from lib.tracks import face_crop, face_tracks, smooth_track
from syncnet import FPS

SHIFTS = "frames by which the sound is moved to an earlier moment"          # x axis of a chart of a Score
CUT = 27                                        # mean change of HSV values from which a new scene begins


def scene_colors(picture):
    """A small HSV version of a PIL picture, for `is_cut`."""
    return np.asarray(picture.resize((64, 64), Image.BOX).convert("HSV"), np.int16)


def is_cut(before, after):
    """Whether two successive frames, as `scene_colors`, belong to two scenes."""
    return np.abs(after - before).mean() > CUT


def find_faces(video, device, every=5, count=None, instead="--face X0 Y0 X1 Y1, in pixels, or --face whole"):
    """Detect faces in every `every`-th frame -> (faces of each frame, frames where a scene begins).

    A face is (x0, y0, x1, y1) followed by x and y of both eyes, the nose and both mouth corners, in pixels; frames in
    between have none. count: number of frames to look at; instead: what a user can do without the package.
    """
    try:
        from facenet_pytorch import MTCNN
    except ImportError as e:
        raise MissingPackage(f"finding faces needs {e.name}: pip install --no-deps facenet-pytorch, pip install "
                             f"requests; or say where the face is: {instead}") from None
    detector = MTCNN(keep_all=True, device=device if device.type == "cuda" else "cpu")
    shrink = max(1.0, max(video.height, video.width) / 640)
    size = (round(video.width / shrink), round(video.height / shrink))
    large_enough = min(video.height, video.width) / shrink >= 20            # the detector needs 20 pixels
    faces = []
    cuts = []
    before = None
    frames = tqdm(itertools.islice(video, count), total=min(len(video), count or len(video)), desc="looking for faces",
                  unit="frame", leave=False)
    for i, frame in enumerate(frames):
        picture = Image.fromarray(frame).resize(size, Image.BOX)
        colors = scene_colors(picture)
        if before is not None and is_cut(before, colors):
            cuts.append(i)
        before = colors
        faces.append([])
        if large_enough and i % every == 0:
            boxes, probabilities, points = detector.detect(picture, landmarks=True)
            for box, p, point in zip(*([], [], []) if boxes is None else (boxes, probabilities, points)):
                if p >= 0.9:
                    faces[-1].append((*(box * shrink), *(point.flatten() * shrink)))
    return faces, cuts


# ----------------------------------------------------------------------------------------------------------------------
# Crops for SyncNet


def check_judge(model, what, original=False):
    """Raise UserError for a SyncNet that reads latents, and for the original one unless it is allowed."""
    if isinstance(model, syncnet.OriginalSyncNet):
        if not original:
            raise UserError(f"{what}: is the original SyncNet, whose distances are no probability; expected a "
                            "StableSyncNet for aligned faces, such as stable_syncnet.pt")
    elif model.config.latent:
        raise UserError(f"{what}: reads latents, not pictures; expected one such as stable_syncnet.pt")


# Below this confidence a StableSyncNet may have heard anything. Measured with the demo's on 30 synthetic heads: other
# heads' sound gives at most 0.18 for 4.8 s of video and 0.28 for 2.4 s, a head's own sound at least 0.53.
LEAST_CONFIDENCE = 0.3


def is_in_step(score, model):
    """Whether a Score tells the offset. At the edge of the window the distance may go on falling beyond it.

    No number is known for the original SyncNet, whose confidence has another unit, so it is judged by the edge alone.
    """
    shifts = torch.arange(len(score.curve)) - len(score.curve) // 2
    known = shifts[score.curve.isfinite()]                                  # short clips allow fewer shifts
    if not len(known):
        return False
    margin = 1 if len(known) > 10 else 0
    at_edge = -score.offset <= known.min() + margin or -score.offset >= known.max() - margin
    unsure = isinstance(model, syncnet.StableSyncNet) and score.confidence < LEAST_CONFIDENCE
    return not (at_edge or unsure)


def describe_score(score, model):
    """A Score of this model in words."""
    numbers = f"confidence {score.confidence:.3f}, distance {score.distance:.3f}"
    if not is_in_step(score, model):
        return f"not in step within +-{len(score.curve) // 2} frames, {numbers}"
    milliseconds = abs(score.offset) * 1000 // FPS
    when = ""
    if score.offset:
        when = f" (the sound is {milliseconds} ms too {'early' if score.offset > 0 else 'late'})"
    return f"offset {score.offset:+d} frames{when}, {numbers}"


def faces_to_score(video, args, device, model):
    """The faces that --face asks for: [(first frame, crop(frame, i), number of frames or None for all)].

    crop maps frame i of the face, uint8 (3, h, w), to what the model takes.
    """
    if args.face == ["whole"] or (args.face == ["auto"] and video.height == video.width):
        return [(0, lambda frame, i: frame, None)]
    crop = original_crop if isinstance(model, syncnet.OriginalSyncNet) else aligned_crop
    if args.face not in (["auto"], ["detect"]):
        box = parse_box(args.face, video)
        return [(0, crop(np.tile(box, (13, 1))), None)]                     # 13 frames, as many as are smoothed over
    faces, cuts = find_faces(video, device)
    tracks = face_tracks(faces, cuts)
    if not tracks:
        raise UserError(f"{video.path}: no face to score: expected one of 100 pixels or more that stays for 2 s; found "
                        f"some in {sum(map(bool, faces))} of {-(-len(faces) // 5)} frames; say where it is: --face X0 "
                        "Y0 X1 Y1, in pixels")
    return [(first, crop(track[:, :4]), len(track)) for first, track in tracks]


def parse_box(words, video):
    """--face X0 Y0 X1 Y1 -> array (4,)."""
    try:
        x0, y0, x1, y1 = map(float, words)
        inside = 0 <= x0 < x1 <= video.width and 0 <= y0 < y1 <= video.height
    except ValueError:
        inside = False
    if not inside:
        raise UserError(f"--face {' '.join(words)}: expected auto, detect, whole, or a box X0 Y0 X1 Y1 in pixels "
                        f"inside of {video.width} x {video.height}")
    return np.array([x0, y0, x1, y1])


def original_crop(boxes):
    """crop(frame, i) for the boxes (n, 4) of a face, as the original SyncNet's training data were cut."""
    halves, centres = smooth_track(boxes)

    def crop(frame, i):
        i = min(i, len(boxes) - 1)
        return face_crop(frame, halves[i], centres[i])
    return crop


def aligned_crop(boxes):
    """crop(frame, i) for the boxes (n, 4) of a face, similar to the aligned faces of StableSyncNet.

    A face box that is stretched to a square has brows, nose and mouth where aligned faces have them, as long as the
    head is upright. Beyond the picture its edge is repeated.
    """
    _, centres = smooth_track(boxes)
    sides = np.median(boxes[:, 2:] - boxes[:, :2], 0)

    def pixels(centre, side, n):
        first = round(centre - side / 2)
        return np.arange(first, first + max(1, round(side))).clip(0, n - 1)

    def crop(frame, i):
        _, height, width = frame.shape
        x, y = centres[min(i, len(boxes) - 1)]
        face = frame[:, pixels(y, sides[1], height)][:, :, pixels(x, sides[0], width)]
        face = F.interpolate(face[None].float(), (256, 256), mode="bicubic", antialias=True)
        return face[0].round().clamp(0, 255).byte()
    return crop


# ----------------------------------------------------------------------------------------------------------------------
# Points for alignment


def points_of_faces(faces, cuts, every):
    """What `find_faces` found in every `every`-th frame -> points of the largest face, of the second, ...

    Each is an array (frames, 3, 2), see latentsync.three_points, with nan where the face was not found.
    """
    tracks = face_tracks(faces, cuts, longest_gap=2 * every, shortest=0, smallest=50)
    tracks.sort(key=lambda track: -np.prod(track[1][:, 2:4] - track[1][:, :2], 1).mean())
    bounds = [0, *cuts, len(faces)]
    ranks = []
    for first, track in tracks:
        last = first + len(track)
        points = latentsync.three_points(track[:, 4:].reshape(-1, 5, 2))
        if every == 1 and len(points) > 4:                                  # detections jitter
            padded = np.pad(points, ((1, 1), (0, 0), (0, 0)), mode="edge")
            points = 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]
        # A face may have come or gone between two detections. Within its scene its first and last points are repeated.
        low = max(first - every + 1, max(b for b in bounds if b <= first))
        high = min(last + every - 1, min(b for b in bounds if b >= last))
        points = np.pad(points, ((first - low, high - last), (0, 0), (0, 0)), mode="edge")
        rank = next((rank for rank in ranks if np.isnan(rank[first:last]).all()), None)
        if rank is None:
            rank = np.full((len(faces), 3, 2), np.nan)
            ranks.append(rank)
        rank[low:high] = np.where(np.isnan(rank[low:high]), points, rank[low:high])
    return ranks


def read_landmarks(path):
    """The array `landmarks` of an .npz file, of numbers. Raises an error of numpy's, of zipfile's, or ValueError."""
    if not Path(path).exists():
        raise ValueError("no such file")
    with open(path, "rb") as file:                                          # np.load would take other kinds for pickles
        if file.read(2) != b"PK":
            raise ValueError("not an .npz file")
    with np.load(path, allow_pickle=False) as arrays:
        if "landmarks" not in arrays:
            raise ValueError(f"has no array 'landmarks', only {', '.join(arrays) or 'nothing'}")
        landmarks = arrays["landmarks"]
    if landmarks.dtype.kind not in "iuf":
        raise ValueError(f"its landmarks are no numbers but of type {landmarks.dtype}")
    largest = np.abs(landmarks, where=np.isfinite(landmarks), out=np.zeros(landmarks.shape)).max(initial=0)
    if largest > 1e6:
        raise ValueError(f"coordinates up to {largest:.3g}, expected pixels")
    return landmarks


def given_points(path, frames):
    """Points (frames, 3, 2) from the array `landmarks` of an .npz file, nan where there is no face.

    One or two frames that are missing at the end get the points of the last one. Raises UserError.
    """
    try:
        landmarks = read_landmarks(path)
        points = latentsync.three_points(np.where(np.isfinite(landmarks), landmarks, np.nan))
    except (OSError, ValueError, EOFError, MemoryError, NotImplementedError, zipfile.BadZipFile, zlib.error) as e:
        reason = getattr(e, "strerror", None) or str(e) or "too large for the memory"
        raise UserError(f"--landmarks {path}: {reason}; expected an .npz with an array 'landmarks' (frames, N, 2), N = "
                        "3, 5, 106 or 478") from None
    if points.ndim == 3:
        points = points.astype(float)
        points[np.ptp(points, 1).max(-1, initial=0) == 0] = np.nan          # some programs write zeros for no face
    if points.ndim != 3 or np.isnan(points).any((1, 2)).all():
        raise UserError(f"--landmarks {path}: expected (frames, N, 2), with a face in one frame at least, found an "
                        f"array of {landmarks.shape}")
    if len(points) < frames - 2:
        raise UserError(f"--landmarks {path}: are for {len(points)} frames, expected {frames}, one for each at {FPS} a "
                        "second")
    return np.concatenate([points, np.repeat(points[-1:], max(frames - len(points), 0), 0)])
