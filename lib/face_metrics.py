"""How well a face was painted: similarity, mouth, flicker, and what a SyncNet says."""
import numpy as np
import torch
import torch.nn.functional as F

import syncnet
from lib.faces import original_crop
from lib.pictures import ssim


def mouth_points(faces):
    """Left, right, top and bottom of the mouth in aligned faces (N, 3, H, W) -> (N, 4, 2), x and y / side of the face.

    It is no landmark detector, but it is good enough to compare two pictures of one synthetic face, whose opening it
    follows (correlation 0.9). The mouth is what differs in color from the skin around it: its points lie two standard
    deviations to each side of its mean.
    """
    side = faces.shape[3]
    rows = slice(round(0.6 * side), round(0.9 * side))
    columns = slice(round(0.32 * side), round(0.68 * side))
    window = faces[:, :, rows, columns]
    skin = window.flatten(2).median(2).values[:, :, None, None]             # more than half of the window is skin
    weight = ((window - skin).norm(dim=1) - 0.3).clamp(min=0) + 1e-6
    weight = weight / weight.sum((1, 2), keepdim=True)                      # (N, h, w)

    def mean_and_spread(share, part):
        position = (torch.arange(part.start, part.stop, device=faces.device) + 0.5) / side
        mean = (share * position).sum(1, keepdim=True)
        variance = (share * (position - mean).square()).sum(1, keepdim=True)
        return mean[:, 0], (2 * variance.sqrt())[:, 0]
    x, dx = mean_and_spread(weight.sum(1), columns)
    y, dy = mean_and_spread(weight.sum(2), rows)
    points = [(x - dx, y), (x + dx, y), (x, y - dy), (x, y + dy)]
    return torch.stack([torch.stack(point, 1) for point in points], 1)


def compare_faces(painted, target, mask):
    """Compare successive painted faces (N, 3, H, W) in [-1, 1] with the true ones -> {"ssim", "lmd", "flicker"}.

    ssim: structural similarity, 0 .. 1. lmd: distance of `mouth_points`, in % of the face's side. flicker: temporal
    consistency, the mean difference between the change from frame to frame and the true change, over the painted part,
    in levels 0 .. 255; it is 0 if the painted part moves exactly as the true face. It is computed on means of 16 x 16
    cells, so that grain does not count. mask: (H, W), 1 where the picture is kept.
    """
    def cells(x):
        return F.adaptive_avg_pool2d(x, 16)
    change = (cells(painted) - cells(target)).diff(dim=0).abs().mean(1) * 127.5         # (N - 1, 16, 16)
    painted_part = 1 - cells(mask[None])[0]
    return {"ssim": ssim(painted, target).mean().item(),
            "lmd": 100 * (mouth_points(painted) - mouth_points(target)).norm(dim=2).mean().item(),
            "flicker": (change * painted_part).sum().item() / (len(change) * painted_part.sum().item())}


def score_aligned(judge, faces, sound):
    """syncnet.score of aligned faces, uint8 (3, r, r), by either network.

    The original SyncNet gets the crops of them on which it was trained, as LatentSync's authors do it.
    """
    if isinstance(judge, syncnet.OriginalSyncNet):
        _, height, width = faces[0].shape
        crop = original_crop(np.tile([0.0, 0.0, width, height], (len(faces), 1)))
        faces = (crop(face, i) for i, face in enumerate(faces))
    return syncnet.score(judge, faces, sound)
