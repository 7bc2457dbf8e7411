"""What frozen networks make of the training data, computed once and kept in files beside the run."""
import hashlib
import time
import zlib
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
from lib.pictures import to_input
from lib.text import encode_texts


class TokenCache:
    """A data set of pictures as token indices (B, L) of a frozen tokenizer. Items and conditions stay the same.

    crops: "1" for the centre crop, another number for that number of random crops per picture, or a name of
    PictureFolder.VIEWS for all of those. The tokens lie in files of SHARD items each, which the processes share out.
    """

    SHARD = 2**14

    def __init__(self, pictures, tokenizer, patch_nums, crops, device, folder, tag):
        self.pictures = pictures
        self.classes = getattr(pictures, "classes", [])
        self.patch_nums = patch_nums
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
        damaged = [path for path in own if path.exists() and not self.is_whole(path)]
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
        while not all(path.exists() for path in shards):                    # the other processes still write
            time.sleep(1)
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

    @staticmethod
    def is_whole(path):
        try:
            with safe_open(path, "pt") as f:
                return f.metadata()["crc32"] == str(zlib.crc32(f.get_tensor("tokens").numpy()))
        except (SafetensorError, OSError, KeyError, TypeError):
            return False

    def write(self, path, items, tokenizer, device):
        """Tokenize items into a file -> the paths that could not be read."""
        broken = set()
        tokens = [torch.zeros(0, sum(h * w for h, w in vq.as_pairs(self.patch_nums)), dtype=torch.int32)]
        indices = []
        starts = range(0, len(items), 64)
        for start in tqdm(starts, desc=f"tokenizing {len(items)} pictures", unit="batch", leave=False, disable=None):
            batch = []
            for item in items[start:start + 64]:
                pixels, _, paths = self.pictures.__getitems__([item])
                broken.update(paths)
                if not paths:
                    batch.append(pixels)
                    indices.append(item[0])
            if batch:
                maps = tokenizer.tokenize(to_input(torch.cat(batch), device), self.patch_nums)
                tokens.append(torch.cat(maps, 1).int().cpu())
        tokens = torch.cat(tokens)
        with vq.atomic(path) as temporary:
            save_file({"tokens": tokens, "index": torch.tensor(indices, dtype=torch.int64)}, temporary,
                      {"crc32": str(zlib.crc32(tokens.numpy()))})
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
        if not path.exists() and rank_and_world()[0] == 0:
            rows = []
            starts = range(0, len(captions), 16)
            for start in tqdm(starts, desc=f"reading {len(captions)} captions", leave=False):
                rows += [row.half() for row in encode_texts(t5, captions[start:start + 16], slots, clean)]
            starts = torch.tensor([0] + [len(row) for row in rows]).cumsum(0)
            with vq.atomic(path) as temporary:
                save_file({"features": torch.cat(rows), "starts": starts}, temporary)
        while not path.exists():                                            # rank 0 still writes
            time.sleep(1)
        self.file = safe_open(path, "pt")
        starts = self.file.get_tensor("starts").tolist()
        self.rows = dict(zip(captions, zip(starts, starts[1:])))

    def __getitem__(self, caption):
        start, end = self.rows[caption]
        return self.file.get_slice("features")[start:end].float()
