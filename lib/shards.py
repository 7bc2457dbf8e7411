"""Training data in tar files, as the webdataset package writes them.

A run that continues in the middle of an epoch needs random access, which webdataset's own reader does not have.
"""
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import vq
from lib.console import UserError, understanding
from lib.pictures import picture_size

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
TEXTS = {".cls", ".txt", ".json"}
LONGEST_TEXT = 2**20                            # bytes of a text beside a picture
INDEX_VERSION = 2                               # counted up when an index holds something else than before
PACKERS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}    # by first bytes


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


def files_of(folder, *suffixes):
    """Paths of the visible files of a folder whose names end in one of the suffixes, in capitals or not, sorted."""
    with understanding(folder, "a folder"):
        return sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in suffixes and not is_hidden(p.name))


def is_hidden(name):
    """Whether a file or folder is no part of the data: names with a dot in front, and what macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def read_shards(root, notes):
    """(the Samples in all ROOT/*.tar, [(name, why)] of what cannot be used).

    A damaged tar file counts as far as it can be read. Files that share a name up to its first dot belong together. The
    index of every tar file is kept in the folder `notes`, because making it reads the whole tar file.
    """
    tars = files_of(root, ".tar")
    samples = []
    unusable = []
    damaged = []
    for number, tar in enumerate(tqdm(tars, desc="reading tar files", leave=False, disable=None)):
        index = read_index(tar, Path(notes))
        if not index["whole"]:
            damaged.append(str(tar))
        groups = {}                                                         # {(folder, key): {suffix: (entry, what)}}
        for name, start, size, what in index["members"]:
            folder, _, file = name.rpartition("/")
            key, _, suffix = file.partition(".")
            entry = TarEntry(str(tar), name, start, size)
            if isinstance(what, dict):
                unusable.append((str(entry), what["unusable"]))
            else:
                groups.setdefault((folder, key), {})[suffix.lower()] = (entry, what)
        for group in groups.values():
            texts = {suffix: what for suffix, (_, what) in group.items() if isinstance(what, str)}
            pictures = [(entry, what) for entry, what in group.values() if not isinstance(what, str)]
            if pictures:
                samples.append(Sample(*pictures[0], texts, number))
    if damaged:
        tqdm.write(f"read in part {len(damaged)} damaged of {len(tars)} tar files: {', '.join(damaged[:3])}")
    return samples, unusable


def read_index(tar, notes):
    """The index of a tar file, from `notes` if the file has not changed since it was written. Raises UserError."""
    with understanding(tar, "a tar file"):
        if not tar.is_file():
            raise UserError(f"{tar}: not a file; expected a tar file")
        with open(tar, "rb") as f:
            start = f.read(6)
        for magic, packer in PACKERS.items():
            if start.startswith(magic):
                raise UserError(f"{tar}: is compressed with {packer}; pictures are read from the middle of a tar file, "
                                f"so unpack it to one that is not compressed")
        version = f"{INDEX_VERSION} {tar.resolve()} {tar.stat().st_size} {tar.stat().st_mtime_ns}"
    name = hashlib.sha256(version.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    path = notes / f"tar_{name}.json"
    index = saved_index(path, tar.stat().st_size)
    if index is None:
        with understanding(tar, "a tar file"):
            index = index_tar(tar)
        path.parent.mkdir(exist_ok=True)
        with vq.atomic(path) as temporary:
            temporary.write_text(json.dumps(index), encoding="utf-8")
    return index


def saved_index(path, size):
    """An index that was written for a tar file of `size` bytes; None if it is not there or damaged."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(index["whole"], bool):
            raise TypeError
        for name, start, length, what in index["members"]:
            is_size = isinstance(what, list) and len(what) == 2 and min(what) >= 1
            is_known = is_size or isinstance(what, str) or isinstance(what["unusable"], str)
            if not (isinstance(name, str) and is_known and 0 <= start <= size and 0 <= length <= size):
                raise ValueError
    except (OSError, *vq.MISUNDERSTOOD):
        return None
    return index


def index_tar(path):
    """What lies where in a tar file: {"whole": whether it is undamaged, "members": [(name, start, size, what)]}.

    `what` is (w, h) for a picture, the text for a text file, and {"unusable": why} for a link and its like.
    """
    members = []
    whole = True
    place = -1
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.offset_data <= place or info.size < 0:              # a lying header could lead back for ever
                    raise tarfile.InvalidHeaderError
                place = info.offset_data
                suffix = Path(info.name).suffix.lower()
                parts = [part for part in info.name.split("/") if part != "."]
                if (suffix in PICTURES or suffix in TEXTS) and not any(map(is_hidden, parts)):
                    members.append((info.name, info.offset_data, info.size, content_of(tar, info, suffix)))
    except (tarfile.TarError, *vq.MISUNDERSTOOD):
        whole = False
    end = members[-1][1] + members[-1][2] + 1024 if members else 0          # a tar file ends with two empty blocks
    return {"whole": whole and end <= os.path.getsize(path), "members": members}


def content_of(tar, info, suffix):
    """What index_tar keeps of a member of a tar file."""
    if not info.isreg() or info.issparse():
        return {"unusable": "not a plain file"}                             # a link may point anywhere
    if suffix in PICTURES:
        try:
            return picture_size(tar.extractfile(info), info.name)
        except UserError:
            return 1, 1                                                     # it is skipped when it is read
    if info.size > LONGEST_TEXT:
        return {"unusable": f"a text of more than {LONGEST_TEXT >> 20} MB"}
    return tar.extractfile(info).read().decode("utf-8-sig", "replace")
