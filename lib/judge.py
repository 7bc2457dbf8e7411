"""What drawings of the demo's models show, judged by the true pictures that are nearest to them."""
import numpy as np
import torch
from tqdm import tqdm

from lib.console import check_writable
from lib.data import spread
from lib.emoji import STYLES, captions_of, class_of, pictures, rows, split
from lib.pictures import grid, save_png, to_input, to_pixels

BATCH = 20                                      # pictures drawn at once
ROWS = 10                                       # things in combinations.png
COLUMNS = 8                                     # pairs of pictures in a row of nearest.png
RED = (220, 30, 30)


class Judge:
    """Says what pictures show. Distances are Euclidean, over all pixel values, 0 .. 255."""

    def __init__(self, size):
        self.pictures = pictures(size)                                      # (n, 3, size, size) uint8
        self.flat = self.pictures.flatten(1).float()
        self.names = np.array([row["name"] for row in rows()])
        self.styles = np.array([row["style"] for row in rows()])
        self.classes = np.array([class_of(row) for row in rows()])

    def distances(self, images):
        """uint8 (N, 3, size, size) -> their distances to the pictures of all rows, (N, n)."""
        return torch.cdist(images.flatten(1).float(), self.flat).numpy()

    def scores(self, images, wanted):
        """How often pictures, uint8 (N, 3, size, size), show what N rows say, in percent.

        thing: of all pictures in the wanted style, the nearest is that of the wanted thing.
        style: of all pictures of the wanted thing, the nearest is that in the wanted style.
        class: the nearest of all pictures has the wanted class, which is a style and a subgroup.
        The wanted picture itself and other unseen ones are among these. At equal distances the first row counts.
        """
        right = {"thing": [], "style": [], "class": []}
        for distances, row in zip(self.distances(images), wanted):
            nearest_of_style = np.where(self.styles == self.styles[row], distances, np.inf).argmin()
            nearest_of_thing = np.where(self.names == self.names[row], distances, np.inf).argmin()
            right["thing"].append(self.names[nearest_of_style] == self.names[row])
            right["style"].append(self.styles[nearest_of_thing] == self.styles[row])
            right["class"].append(self.classes[distances.argmin()] == self.classes[row])
        return {what: 100 * float(np.mean(values)) for what, values in right.items()}


def judge_drawings(task, model, pairs):
    """Draw what unseen pairs say, and print what the drawings show -> the numbers. Writes pictures into --out.

    A text names thing and style of a pair; a class its style and subgroup only, and training has seen it. Two other
    sets of pictures say what the numbers mean: the true pictures as the tokenizer decodes them, and the same things in
    another style, which a model could copy from its training set.
    """
    args = task.args
    judge = Judge(args.size)
    out = check_writable(args.out)
    with torch.no_grad():
        decoded = [task.tokenizer.reconstruct(to_input(pixels, task.device)) for pixels in pairs.pixels.split(BATCH)]
    decoded = torch.cat(decoded).add(1).div(2)
    sets = {"drawn": draw(task, model, pairs.indices), "the true pictures, decoded": to_uint8(decoded),
            "copied from another style": judge.pictures[[another_style(row) for row in pairs.indices]]}
    result = {}
    for name, images in sets.items():
        result[name] = judge.scores(images, pairs.indices)
        if not args.captions and name == "drawn":
            del result[name]["thing"], result[name]["style"]                # a class says nothing about the thing
        print(f"{name}: " + ", ".join(f"right {what} {value:.1f}%" for what, value in result[name].items()))
    save_png(out / "nearest.png", nearest_pictures(judge, sets["drawn"]))
    print(f"drawings, each with the nearest picture of the training set at its right, in {out}/nearest.png")
    if args.captions:
        save_png(out / "combinations.png", combinations(task, model, judge))
        print(f"things in all styles, unseen pairs framed, the true pictures at the right, in {out}/combinations.png")
    return result


def draw(task, model, wanted):
    """Draw rows of the table, with seeds 0, 1, ... -> uint8 (N, 3, h, w)."""
    images = []
    for start in tqdm(range(0, len(wanted), BATCH), desc="drawing", unit="batch", leave=False, disable=None):
        few = wanted[start:start + BATCH]
        if task.args.captions:
            what = [captions_of(rows()[row])[0] for row in few]
        else:
            what = torch.tensor([task.train_set.classes.index(class_of(rows()[row])) for row in few])
        generators = [torch.Generator(task.device).manual_seed(start + i) for i in range(len(few))]
        images.append(task.draw(model, what, generators))
    return to_uint8(torch.cat(images))


def to_uint8(images):
    """(N, 3, h, w) in [0, 1] -> uint8 on the CPU."""
    return torch.from_numpy(to_pixels(images, 0.5)).permute(0, 3, 1, 2)


def as_grid(images):
    """uint8 (N, 3, h, w) -> (N, h, w, 3) for `grid`."""
    return images.permute(0, 2, 3, 1).numpy()


def another_style(row):
    """The row of a training picture of the same thing: in the next style of the table that has it, or in the first."""
    training = set(split()[0])
    alike = [i for i, other in enumerate(rows()) if other["name"] == rows()[row]["name"] and i in training]
    later = [i for i in alike if i > row]
    return (later or alike)[0]


def nearest_pictures(judge, drawn):
    """Some drawings, each with the nearest training picture at its right."""
    training = split()[0]
    shown = drawn[[i for i, _ in spread(len(drawn), 4 * COLUMNS)]]
    cells = []
    for picture, distances in zip(shown, judge.distances(shown)):
        cells += [picture, judge.pictures[training[distances[training].argmin()]]]
    return grid(as_grid(torch.stack(cells)), 2 * COLUMNS)


def combinations(task, model, judge):
    """Rows are things. The left half holds drawings, one column per style, with unseen pairs framed in red. The right
    half holds the true pictures. The things are spread over all that exist in all styles and have an unseen pair.
    """
    row_of = {(row["style"], row["name"]): i for i, row in enumerate(rows())}
    pairs = set(split()[1])
    whole = [name for name in dict.fromkeys(judge.names) if all((style, name) in row_of for style in STYLES)]
    whole = [name for name in whole if any(row_of[style, name] in pairs for style in STYLES)]
    chosen = [whole[i] for i, _ in spread(len(whole), ROWS)]
    cells = []
    for name in chosen:
        wanted = [row_of[style, name] for style in STYLES]
        for row, picture in zip(wanted, draw(task, model, wanted)):
            cells.append(framed(picture) if row in pairs else picture)
        cells += judge.pictures[wanted]
    return grid(as_grid(torch.stack(cells)), 2 * len(STYLES), titles=STYLES + STYLES, labels=chosen)


def framed(picture):
    """uint8 (3, h, w) with a red border."""
    picture = picture.clone()
    color = torch.tensor(RED, dtype=torch.uint8)[:, None]
    for edge in (0, -1):
        picture[:, edge] = color
        picture[:, :, edge] = color
    return picture
