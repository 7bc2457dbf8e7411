"""From detected boxes to tracks of faces, and from tracks to the crops that the original SyncNet sees."""
import numpy as np
import torch.nn.functional as F


def overlap(a, b):
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (area_a + area_b - width * height)


def face_tracks(boxes, cuts=(), least_overlap=0.5, longest_gap=25, shortest=50, smallest=100):
    """Follow faces through a video: per frame a list of boxes (x0, y0, x1, y1, ...) -> [(first frame, (n, 4))].

    A box continues the track whose last box it overlaps most, more than least_overlap, at most longest_gap frames ago
    and on the same side of all `cuts` (frames with which a new scene begins). Tracks have more than `shortest` frames
    and a mean side above `smallest` pixels. Gaps are filled linearly, also for numbers after the four of a box.
    """
    tracks = []                                                             # each a list of (frame, box)
    for frame, frame_boxes in enumerate(boxes):
        scene = max((cut for cut in cuts if cut <= frame), default=0)
        taken = set()
        for box in frame_boxes:
            candidates = [(overlap(box, track[-1][1]), i) for i, track in enumerate(tracks)
                          if i not in taken and track[-1][0] >= max(scene, frame - longest_gap)]
            best, i = max(candidates, default=(0.0, None))
            if best > least_overlap:
                tracks[i].append((frame, box))
            else:
                i = len(tracks)
                tracks.append([(frame, box)])
            taken.add(i)
    result = []
    for track in tracks:
        times = np.array([frame for frame, _ in track])
        corners = np.array([box for _, box in track], float)
        every = np.arange(times[0], times[-1] + 1)
        filled = np.stack([np.interp(every, times, column) for column in corners.T], 1)
        sides = filled[:, 2:4] - filled[:, :2]
        if len(filled) > shortest and sides.mean(0).max() > smallest:
            result.append((int(times[0]), filled))
    return result


def smooth_track(boxes):
    """Boxes (n, 4) of one face -> half sides (n,) and centres (n, 2) as x, y, each the median of 13 frames."""
    sizes = (boxes[:, 2:] - boxes[:, :2]).max(1, keepdims=True) / 2
    values = np.concatenate([sizes, (boxes[:, :2] + boxes[:, 2:]) / 2], 1)
    padded = np.pad(values, ((6, 6), (0, 0)))       # with zeros, as in the original, which makes both ends too small
    medians = np.median(np.lib.stride_tricks.sliding_window_view(padded, 13, axis=0), axis=-1)
    return medians[:, 0], medians[:, 1:]


def face_crop(frame, half, centre, share=0.4):
    """The kind of crop on which the original SyncNet was trained: uint8 (3, h, w) -> uint8 (3, 224, 224).

    It reaches from `half` above the centre to 1.8 * half below it, and 1.4 * half to both sides. Around is grey (110).
    """
    margin = int(half * (1 + 2 * share)) + 1
    centre = np.clip(centre, 0, frame.shape[:0:-1])                         # a track may leave the picture
    padded = F.pad(frame, (margin,) * 4, value=110)
    x, y = centre[0] + margin, centre[1] + margin
    to_side, to_bottom = half * (1 + share), half * (1 + 2 * share)
    crop = padded[:, int(y - half):int(y + to_bottom), int(x - to_side):int(x + to_side)]
    resized = F.interpolate(crop[None].float(), (224, 224), mode="bilinear", align_corners=False)
    return resized[0].round().clamp(0, 255).byte()
