"""What frozen networks make of the training data, computed once and kept in files beside the run."""
import hashlib
import itertools
import time
import zlib
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import vq
from lib.console import UserError, rank_and_world
from lib.data import PictureFolder, report_broken
from lib.parallel import all_gather_objects
from lib.pictures import UNREADABLE, to_input
from lib.readers import read_batches
from lib.text import encode_texts

BATCH = 64                                      # pictures that the tokenizer gets at once


class Views:
    """What the processes that read for a TokenCache return: [index and whether it is readable of each item, pictures].

    Pictures are uint8 (n, 3, h, w) of the readable ones. A picture is opened once for all of its items, which follow
    each other.
    """

    def __init__(self, pictures):
        self.pictures = pictures

    def __getitems__(self, items):
        views = []
        entries = []
        for index, same_picture in itertools.groupby(items, itemgetter(0)):
            crops = [crop for _, crop in same_picture]
            try:
                views += self.pictures.read_views(index, crops)
                entries += [(index, True)] * len(crops)
            except (UserError, *UNREADABLE):
                entries += [(index, False)] * len(crops)
        return entries, torch.stack(views) if views else []

    def __len__(self):
        return len(self.pictures)


def one_by_one(portions):
    """What Views returned for several portions -> one pair (index, picture or None) for each item."""
    for entries, views in portions:
        views = iter(views)
        for index, readable in entries:
            yield index, next(views) if readable else None


def portions(items):
    """Lists of at most BATCH items, one for each turn of a reader. Items of a picture stay together, up to BATCH."""
    lists = []
    for _, same_picture in itertools.groupby(items, itemgetter(0)):
        same_picture = list(same_picture)
        if lists and len(lists[-1]) + len(same_picture) <= BATCH:
            lists[-1] += same_picture
        else:
            lists += [same_picture[start:start + BATCH] for start in range(0, len(same_picture), BATCH)]
    return lists


def checksum(*tensors):
    """CRC-32 of the bytes of tensors on the host, as text."""
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(tensor.numpy(), crc)
    return str(crc)


def wait_for(paths):
    """Wait until other processes have written these files."""
    while not all(path.exists() for path in paths):
        time.sleep(1)


class TokenCache:
    """A data set of pictures as token indices (B, L) of a frozen tokenizer. Items and conditions stay the same.

    crops: "1" for the centre crop, another number for that number of random crops per picture, or a name of
    PictureFolder.VIEWS for all of those. The tokens lie in files of SHARD items each, which the processes share out.
    Each has `workers` processes that read pictures.
    """

    SHARD = 2**14

    def __init__(self, pictures, tokenizer, patch_nums, crops, device, folder, tag, workers=0):
        self.pictures = pictures
        self.classes = getattr(pictures, "classes", [])
        self.patch_nums = patch_nums
        self.length = sum(h * w for h, w in vq.as_pairs(patch_nums))        # L
        self.workers = workers if getattr(pictures, "READS_FILES", False) else 0
        weights = hashlib.sha256()
        for module in (tokenizer.encoder, tokenizer.quant_conv, tokenizer.quantize):
            for p in module.parameters():
                weights.update(p.detach().cpu().numpy().tobytes())
        key = f"{pictures.fingerprint} {weights.hexdigest()} {patch_nums} {crops}"
        self.fingerprint = hashlib.sha256(key.encode()).hexdigest()[:12]
        folder = Path(folder) / f"codes_{tag}_{self.fingerprint}"
        folder.mkdir(exist_ok=True)
        items = self.items(crops)
        shards = {}
        for i, start in enumerate(range(0, len(items), self.SHARD)):
            shards[folder / f"{i:05d}.safetensors"] = items[start:start + self.SHARD]
        rank, world = rank_and_world()
        own = list(shards)[rank::world]
        damaged = [path for path in own if path.exists() and not self.is_whole(path, shards[path])]
        for path in damaged:
            path.unlink()
        if damaged:
            paths = ", ".join(map(str, damaged[:3]))
            tqdm.write(f"made again: {len(damaged)} damaged of {len(shards)} files of tokens: {paths}")
        all_gather_objects("deleted")                                       # from here on no process sees a damaged one
        broken = set()
        for path in own:
            if not path.exists():
                broken |= self.write(path, shards[path], tokenizer, device)
        report_broken(broken, pictures)
        wait_for(shards)                                                    # the other processes still write
        self.files = [load_file(path) for path in shards]                   # memory-mapped: tokens (n, L), index (n,)
        self.ends = np.cumsum([len(file["index"]) for file in self.files])
        self.index = torch.cat([file["index"] for file in self.files])      # number of the picture of every item
        if not len(self.index):
            raise UserError(f"--data: of {len(pictures)} pictures not one can be read")

    def items(self, crops):                                                 # all (index, crop)
        n = len(self.pictures)
        if crops in PictureFolder.VIEWS:
            return [(i, (crops, c)) for i in range(n) for c in range(PictureFolder.VIEWS[crops])]
        if int(crops) == 1:
            return [(i, None) for i in range(n)]
        return [(i, (i, c)) for i in range(n) for c in range(int(crops))]

    def is_whole(self, path, items):
        """Whether a file is undamaged: its checksum, and tokens for these items except for unreadable pictures."""
        try:
            with safe_open(path, "pt") as f:
                tokens = f.get_tensor("tokens")
                index = f.get_tensor("index")
                crc32 = f.metadata()["crc32"]
            readable = set(index.tolist())
            expected = [i for i, _ in items if i in readable]               # in this order
            return (tokens.dtype == torch.int32 and tokens.shape == (len(expected), self.length)
                    and index.dtype == torch.int64 and index.tolist() == expected and crc32 == checksum(tokens, index))
        except (SafetensorError, OSError, *vq.MISUNDERSTOOD):
            return False

    def write(self, path, items, tokenizer, device):
        """Tokenize items into a file -> the paths that could not be read.

        The tokenizer gets the readable ones of BATCH items at a time, whatever the readers return at a time.
        """
        broken = set()
        tokens = [torch.zeros(0, self.length, dtype=torch.int32)]
        indices = []
        bar = tqdm(total=len(items), desc="tokenizing", unit="picture", leave=False, disable=None)
        with bar, read_batches(Views(self.pictures), portions(items), self.workers) as readers:
            pictures = one_by_one(readers)
            for _ in range(0, len(items), BATCH):
                batch = []
                for index, picture in itertools.islice(pictures, BATCH):
                    if picture is None:
                        broken.add(self.pictures.name(index))
                    else:
                        batch.append(picture)
                        indices.append(index)
                    bar.update()
                if batch:
                    maps = tokenizer.tokenize(to_input(torch.stack(batch), device), self.patch_nums)
                    tokens.append(torch.cat(maps, 1).int().cpu())
        tokens = torch.cat(tokens)
        index = torch.tensor(indices, dtype=torch.int64)
        with vq.atomic(path) as temporary:
            save_file({"tokens": tokens, "index": index}, temporary, {"crc32": checksum(tokens, index)})
        return broken

    def __len__(self):
        return len(self.index)

    def name(self, index):
        return self.pictures.name(int(self.index[index]))

    def captions(self, index):
        return self.pictures.captions(int(self.index[index]))

    def __getitems__(self, items):
        tokens = []
        for i, _ in items:
            file = int(np.searchsorted(self.ends, i, "right"))
            row = i - self.ends[file - 1] if file else i
            tokens.append(self.files[file]["tokens"][row])
        conditions = self.pictures.conditions([(int(self.index[i]), seed) for i, seed in items])
        return torch.stack(tokens).long(), conditions, []


class FeatureCache:
    """Text features of captions from a frozen T5 in a memory-mapped file: cache[caption] is (n, Ct), float16 inside."""

    def __init__(self, captions, t5, slots, clean, folder):
        weights = [p.float().sum().item() for p in (t5.embed.weight, *t5.blocks[-1].parameters())]
        key = hashlib.sha256(f"{slots} {clean} {t5.config} {weights} {captions}".encode()).hexdigest()[:12]
        path = Path(folder) / f"text_{key}.safetensors"
        first = rank_and_world()[0] == 0
        if first and path.exists() and not self.is_whole(path, len(captions)):
            tqdm.write(f"made again: a damaged file of text features: {path}")
            path.unlink()
        all_gather_objects("deleted")
        if first and not path.exists():
            rows = []
            batches = range(0, len(captions), 16)
            for start in tqdm(batches, desc=f"reading {len(captions)} captions", leave=False):
                rows += [row.half() for row in encode_texts(t5, captions[start:start + 16], slots, clean)]
            starts = torch.tensor([0] + [len(row) for row in rows]).cumsum(0)           # and the end of the last one
            with vq.atomic(path) as temporary:
                save_file({"features": torch.cat(rows), "starts": starts}, temporary)
        wait_for([path])                                                    # rank 0 still writes
        self.file = safe_open(path, "pt")
        starts = self.file.get_tensor("starts").tolist()
        self.rows = dict(zip(captions, zip(starts, starts[1:])))

    @staticmethod
    def is_whole(path, count):
        """Whether a file has features of `count` captions. They are many, so there is no checksum."""
        try:
            with safe_open(path, "pt") as f:
                starts = f.get_tensor("starts").tolist()
                rows = f.get_slice("features").get_shape()[0]
            return len(starts) == count + 1 and starts == sorted(starts) and starts[0] == 0 and starts[-1] == rows
        except (SafetensorError, OSError, *vq.MISUNDERSTOOD):
            return False

    def __getitem__(self, caption):
        start, end = self.rows[caption]
        return self.file.get_slice("features")[start:end].float()
