"""Training data in tar files, as the webdataset package writes them.

A run that continues in the middle of an epoch needs random access, which webdataset's own reader does not have.
"""
import hashlib
import io
import json
import os
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

import vq
from lib.pictures import UNREADABLE

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
TEXTS = {".cls", ".txt", ".json"}


class TarEntry(NamedTuple):
    """A file inside a tar file, which can be read without reading the others."""

    tar: str
    name: str
    start: int                                  # first byte
    size: int                                   # in bytes

    def __str__(self):
        return f"{self.tar}/{self.name}"


class Sample(NamedTuple):
    """A picture in a tar file and the texts beside it."""

    picture: TarEntry
    size: tuple                                 # (w, h); (1, 1) if the picture is damaged
    texts: dict                                 # {suffix without dot: text}
    shard: int                                  # number of the tar file


def open_entry(file):
    """What PIL can open for a path or a TarEntry."""
    if not isinstance(file, TarEntry):
        return file
    with open(file.tar, "rb") as f:
        f.seek(file.start)
        return io.BytesIO(f.read(file.size))


def byte_size(file):
    """Size of a path or a TarEntry in bytes; 0 if the file does not exist."""
    if isinstance(file, TarEntry):
        return file.size
    return os.path.getsize(file) if os.path.exists(file) else 0


def index_tar(path):
    """What lies where in a tar file: {"whole": whether it is undamaged, "members": [(name, start, size, what)]}.

    `what` is (w, h) for a picture and the text for a text file.
    """
    members = []
    whole = True
    try:
        with tarfile.open(path) as tar:
            for info in tar:
                suffix = Path(info.name).suffix.lower()
                if suffix in PICTURES:
                    what = (1, 1)                                           # damaged: it is skipped later
                    with suppress(*UNREADABLE), Image.open(tar.extractfile(info)) as picture:
                        what = picture.size                                 # from its header
                elif suffix in TEXTS:
                    what = tar.extractfile(info).read().decode("utf-8", "replace")
                else:
                    continue
                members.append((info.name, info.offset_data, info.size, what))
    except (tarfile.TarError, EOFError):
        whole = False
    end = members[-1][1] + members[-1][2] + 1024 if members else 0          # a tar file ends with two empty blocks
    return {"whole": whole and end <= os.path.getsize(path), "members": members}


def read_shards(root, notes):
    """The Samples in all ROOT/*.tar. A damaged tar file counts as far as it can be read.

    Files that share a name up to its first dot belong together. The index of every tar file is kept in `notes`.
    """
    tars = sorted(Path(root).glob("*.tar"))
    samples = []
    damaged = []
    for number, tar in enumerate(tqdm(tars, desc="reading tar files", leave=False, disable=None)):
        index = read_index(tar, Path(notes))
        if not index["whole"]:
            damaged.append(str(tar))
        groups = {}
        for name, start, size, what in index["members"]:
            folder, _, file = name.rpartition("/")
            key, _, suffix = file.partition(".")
            groups.setdefault((folder, key), {})[suffix.lower()] = (TarEntry(str(tar), name, start, size), what)
        for group in groups.values():
            texts = {suffix: what for suffix, (_, what) in group.items() if isinstance(what, str)}
            pictures = [(entry, what) for entry, what in group.values() if not isinstance(what, str)]
            if pictures:
                samples.append(Sample(*pictures[0], texts, number))
    if damaged:
        tqdm.write(f"read in part {len(damaged)} damaged of {len(tars)} tar files: {', '.join(damaged[:3])}")
    return samples


def read_index(tar, notes):
    """The index of a tar file, from `notes` if the file has not changed since it was written."""
    version = f"{tar.resolve()} {tar.stat().st_size} {tar.stat().st_mtime_ns}"
    path = notes / f"tar_{hashlib.sha256(version.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with vq.atomic(path) as temporary:
            temporary.write_text(json.dumps(index_tar(tar)), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))
