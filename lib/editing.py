"""What `sample.py var --edit` redraws of a picture: a box, or the white part of a mask."""
import numpy as np
import torch
import torch.nn.functional as F

from lib.console import UserError
from lib.pictures import cover, read_picture

BOX = [0.1, 0.1, 0.8, 0.8]                      # y0 x0 y1 x1, as shares of the picture


def check_edit(args):
    """Raise UserError for wrong values of the flags that edit a picture, and wrong combinations of them."""
    y0, x0, y1, x1 = args.box or BOX
    if not (0 <= y0 < y1 <= 1 and 0 <= x0 < x1 <= 1):
        raise UserError(f"--box {y0} {x0} {y1} {x1}: expected 0 <= Y0 < Y1 <= 1 and 0 <= X0 < X1 <= 1")
    if bool(args.edit) != bool(args.image):
        raise UserError("--edit and --image go together: the way to edit and the picture to be edited")
    if (args.box or args.mask) and not args.edit:
        raise UserError(f"{'--box' if args.box else '--mask'} goes with --edit in|out|class")
    if args.box and args.mask:
        raise UserError("--box and --mask exclude each other")
    if args.mask and args.edit == "out":
        raise UserError("--edit out is for a --box; --mask is white where to redraw, so use --edit in")
    if args.edit == "class" and not args.classes:
        raise UserError("--edit class: give the new class with --classes")
    if args.edit in ("in", "out") and args.classes:
        raise UserError(f"--edit {args.edit} redraws without a class: leave out --classes, or use --edit class")


def read_mask(path, picture):
    """The mask of --mask as a PIL picture. Raises UserError unless it is as large as the picture."""
    mask = read_picture(path)
    if mask.size != picture.size:
        raise UserError(f"--mask {path}: has {mask.width}x{mask.height} pixels, but the picture has {picture.width}x"
                        f"{picture.height}")
    return mask


def keep_black(mask, side):
    """The cells of the last token map to keep: bool (side, side). Cells that are half white or more are redrawn.

    mask: a PIL picture; if it is white anywhere, at least one cell is redrawn. Raises UserError if it is all black.
    """
    pixels = torch.tensor(np.asarray(cover(mask, 16 * side, 16 * side).convert("L"))).float()
    white = F.avg_pool2d(pixels[None], 16)[0] / 255
    if white.max() < 0.01:
        raise UserError("--mask: the centre square is black, so nothing would be redrawn; paint white where to redraw")
    return white < min(0.5, white.max())
