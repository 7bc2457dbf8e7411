"""Users' data: folders of classes, tar files, files of captions and prompts, odd pictures, caches of tokens."""
import gzip
import io
import json
import os
import struct
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import T5_CONFIG, complaint, run, tiny_single
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train
from lib import clips, pictures, shards
from lib.caches import FeatureCache, TokenCache
from lib.console import UserError
from lib.data import CaptionedPictures, PictureFolder, view
from lib.pictures import cover, picture_size, read_picture
from lib.text import T5Encoder, read_features, read_prompts


def smooth(width, height):
    """A picture whose colours change slowly, so that rounding shows and aliasing does not."""
    rng = np.random.default_rng(width)
    small = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.BICUBIC)


def put(path, width=40, height=30, **options):
    """Write a picture, and its folders -> the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    smooth(width, height).save(path, **options)
    return path


def png(width=40, height=30):
    buffer = io.BytesIO()
    smooth(width, height).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path, members, **options):
    """Write a tar file of {name: bytes, text, or TarInfo} -> its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, options.pop("mode", "w"), **options) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.parent


def link(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


def captions(path, text, size=None):
    """The data set of a file of captions with this content."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return CaptionedPictures(path, None if size else "0.06M", split=False, size=size)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def test_thin_pictures_take_little_memory_and_look_the_same(monkeypatch):
    """1 x 20000 pixels would become 256 x 5120000. Others stay as they were, byte for byte."""
    folder = PictureFolder.__new__(PictureFolder)
    folder.size, folder.zoom, folder.flip = 64, (1.0, 1.2), False
    for width, height in ((100, 70), (64, 500), (1300, 200)):
        picture = smooth(width, height)
        ratio = max(48 / height, 64 / width)
        large = picture.resize((max(64, round(width * ratio)), max(48, round(height * ratio))), Image.LANCZOS)
        x, y = (large.width - 64) // 2, (large.height - 48) // 2
        assert cover(picture, 48, 64).tobytes() == large.crop((x, y, x + 64, y + 48)).tobytes()
    thin = smooth(4, 3000)
    whole = thin.resize((64, 48000), Image.LANCZOS).crop((0, 23968, 64, 24032))
    assert np.abs(np.asarray(cover(thin, 64, 64)).astype(int) - np.asarray(whole)).max() <= 1
    areas, resize = [], Image.Image.resize

    def measured(self, size, *arguments):
        areas.append(size[0] * size[1])
        return resize(self, size, *arguments)
    monkeypatch.setattr(Image.Image, "resize", measured)
    for size in ((1, 30000), (30000, 2), (65000, 3)):
        thin = Image.new("RGB", size, "red")
        for cut in (cover(thin, 64, 64), folder.random_crop(thin, None), folder.random_crop(thin, (5,)),
                    view(thin, 64, "ten", 3), view(thin, 64, "flip", 1)):
            assert cut.size == (64, 64) and cut.getpixel((9, 9)) == (255, 0, 0)
    assert max(areas) < 200_000


def test_pictures_that_lie_about_their_size(tmp_path, monkeypatch):
    for size in ((1, 30_000_000), (40_000, 40_000)):
        header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
        chunk = b"IHDR" + header
        crc = struct.pack(">I", zlib.crc32(chunk))
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + crc + png()[33:])
        with pytest.raises(UserError, match="a.png: not a readable picture"):
            read_picture(tmp_path / "a.png")
    put(tmp_path / "c" / "a.png", 40)
    put(tmp_path / "c" / "b.png", 41)
    data = PictureFolder(tmp_path, 16, split=False)
    resize = pictures.resize_and_cut

    def short_of_memory(picture, *arguments):
        if picture.width == 40:
            raise MemoryError
        return resize(picture, *arguments)
    monkeypatch.setattr("lib.data.resize_and_cut", short_of_memory)
    assert data.__getitems__([(0, None)])[2] == [str(tmp_path / "c" / "a.png")]
    put(tmp_path / "c" / "b.png", 40)
    with pytest.raises(UserError, match="a.png and 1 others: not one picture can be read; the first: MemoryError"):
        data.__getitems__([(0, None)])


@pytest.mark.parametrize("error", [struct.error("unpack"), TypeError("tag"), RuntimeError("avif"), IndexError(),
                                   NotImplementedError("dds"), MemoryError(), ZeroDivisionError(), KeyError("x")])
def test_whatever_a_decoder_raises_skips_the_picture(error, tmp_path, monkeypatch):
    put(tmp_path / "c" / "a.png")
    put(tmp_path / "c" / "b.jpg")
    data = PictureFolder(tmp_path, 16, split=False)

    def broken(self):
        raise error
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", broken)
    assert data.__getitems__([(0, (1,)), (1, (1,))])[2] == [str(tmp_path / "c" / "a.png")]
    with pytest.raises(UserError, match="a.png: not a readable picture"):
        read_picture(tmp_path / "c" / "a.png")


def test_what_is_no_picture_is_named(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "photo.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    for name, words in (("fifo.png", "not a file"), (".", "not a file"), ("none.png", "no such file"),
                        ("photo.HEIC", "pip install pillow-heif")):
        with pytest.raises(UserError, match=words):
            read_picture(tmp_path / name)


def test_grey_values_of_many_bits(tmp_path):
    """Values 0 .. 1 of white, whatever the file counts to; what does not say where white is, is refused."""
    ramp = np.linspace(0, 1, 48).reshape(6, 8)
    expected = np.rint(ramp * 255)
    kinds = {"unit": ramp.astype(np.float32), "byte": (ramp * 255).astype(np.float32),
             "word": (ramp * 65535).astype(np.float32), "int8": np.rint(ramp * 255).astype(np.int32),
             "int16": np.rint(ramp * 65535).astype(np.int32), "u16": np.rint(ramp * 65535).astype(np.uint16)}
    for name, values in kinds.items():
        Image.fromarray(values).save(tmp_path / f"{name}.tif")
        read = np.asarray(read_picture(tmp_path / f"{name}.tif"))[..., 0]
        assert np.abs(read - expected).max() <= 1, name
    for name, values in {"dark": ramp - 0.5, "bright": ramp * 1e6, "nan": ramp * np.nan}.items():
        Image.fromarray(values.astype(np.float32)).save(tmp_path / f"{name}.tif")
        with pytest.raises(UserError, match="expected 0 .. 1, 0 .. 255 or 0 .. 65535"):
            read_picture(tmp_path / f"{name}.tif")
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 1000 " + struct.pack(">HH", 500, 1000))           # its own white
    assert np.asarray(read_picture(tmp_path / "a.pgm"))[0, :, 0].tolist() == [127, 255]
    (tmp_path / "dark.pgm").write_bytes(b"P5 2 1 65535 " + struct.pack(">HH", 0, 200))          # dark, not 8-bit
    assert np.asarray(read_picture(tmp_path / "dark.pgm")).max() == 0
    packed = Image.fromarray(np.full((1, 4), 4095, np.uint16))
    packed.save(tmp_path / "twelve.tif")
    data = bytearray((tmp_path / "twelve.tif").read_bytes())
    at = data.find(struct.pack("<HHIH", 258, 3, 1, 16))                     # BitsPerSample
    data[at + 8:at + 10] = struct.pack("<H", 12)
    pixels = data.find(struct.pack("<4H", *[4095] * 4))
    data[pixels:pixels + 6] = b"\xff" * 6                                   # four numbers of 12 bits
    (tmp_path / "twelve.tif").write_bytes(data)
    assert np.asarray(read_picture(tmp_path / "twelve.tif")).min() == 255


def test_photos_that_were_turned_go_to_their_own_aspect_ratio(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("jpg", "png", "webp", "tif"):
        path = put(tmp_path / f"a.{suffix}", 60, 40, exif=exif)
        assert picture_size(path, path) == read_picture(path).size == (40, 60), suffix
    assert captions(tmp_path / "a.tsv", "a.jpg\tportrait").aspects == [1.5]
    pack(tmp_path / "tars" / "0.tar", {"a.jpg": (tmp_path / "a.jpg").read_bytes(), "a.txt": "portrait"})
    assert CaptionedPictures(tmp_path / "tars", "0.06M", split=False, notes=tmp_path).aspects == [1.5]


def test_readable_pictures_give_no_warnings(tmp_path, capfd):
    exif = Image.Exif()
    exif[0x010E] = "x"
    path = put(tmp_path / "a.jpg", exif=exif)
    data = path.read_bytes()
    tag = struct.pack(">HHI" if b"MM\0*" in data else "<HHI", 0x010E, 2, 2)
    path.write_bytes(data.replace(tag, tag[:4] + b"\0\xff\xff\0"))           # a text that is longer than the file
    assert tag in data
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_picture(path).size == picture_size(path, path) == (40, 30)
    assert capfd.readouterr().err == ""


# ----------------------------------------------------------------------------------------------------------------------
# Folders of classes


def test_classes_are_those_of_torchvision(tmp_path, capsys):
    from torchvision.datasets import ImageFolder
    root = tmp_path / "data"
    suffixes = ["JPG", "jpeg", "PNG", "ppm", "bmp", "pgm", "tif", "TIFF", "webp", "gif"]
    for i, suffix in enumerate(suffixes):
        put(root / f"{i} {suffix}" / f"x.{suffix}")
    put(tmp_path / "elsewhere" / "deep" / "a.png"), put(tmp_path / "elsewhere" / "b.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    put(root / "partly" / "a.png")
    (root / "partly" / "more").symlink_to(tmp_path / "elsewhere" / "deep")
    theirs = ImageFolder(root, is_valid_file=lambda p: True)
    (root / "partly" / "round").symlink_to(root / "partly")                 # a circle
    (root / "partly" / "lost.png").symlink_to(root / "nowhere")
    put(root / "__MACOSX" / "partly" / "._a.png"), put(root / ".thumbs" / "a.png"), put(root / "partly" / "._a.png")
    (root / "partly" / "notes.txt").write_text("")
    data = PictureFolder(root, 16, split=False)
    assert data.classes == theirs.classes and data.labels.tolist() == theirs.targets
    assert list(data.files) == [path for path, _ in theirs.samples]
    assert "left out 1 files that are not pictures (.txt 1), such as" in capsys.readouterr().out
    assert data.__getitems__([(i, None) for i in range(len(data))])[2] == []


def test_a_class_without_pictures_is_refused(tmp_path, monkeypatch):
    put(tmp_path / "cat" / "a.png"), put(tmp_path / "dog" / "a.png")
    (tmp_path / "cow").mkdir()
    (tmp_path / "cow" / "a.heic").write_bytes(b"")
    with pytest.raises(UserError, match=r"no picture in 1 of 3 class folders \(cow\).*\.heic 1"):
        PictureFolder(tmp_path, 16)
    (tmp_path / "cow" / "a.heic").unlink()
    put(tmp_path / "cow" / "a.png")
    scandir = os.scandir

    def forbidden(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(UserError, match="dog: cannot be read .Permission denied"):
        PictureFolder(tmp_path, 16)


def test_the_parent_folder_of_train_and_val_is_refused(tmp_path):
    for name in ("train/n1/a.png", "train/n2/a.png", "val/n1/a.png", "val/n2/a.png"):
        put(tmp_path / name)
    with pytest.raises(UserError, match=f"use --data {tmp_path}/train --val-data {tmp_path}/val"):
        PictureFolder(tmp_path, 16)
    put(tmp_path / "train" / "engine.png"), put(tmp_path / "val" / "a.png")         # two classes of these names
    assert PictureFolder(tmp_path, 16).classes == ["train", "val"]


def test_other_classes_for_validation_are_named(tmp_path, capsys):
    for name in ("a/cat/1.png", "a/dog/1.png", "b/cat/1.png", "b/cow/1.png"):
        put(tmp_path / name)
    said = complaint(capsys, train, "vq", "--data", tmp_path / "a", "--val-data", tmp_path / "b", "--size", 16,
                     "--device", "cpu", "--out", tmp_path / "out")
    assert "1 are missing (dog), 1 are unknown (cow)" in said


def test_names_that_are_not_utf8(tmp_path, capsys):
    folder = os.fsencode(tmp_path / "data") + b"/caf\xe9"
    os.makedirs(folder)
    for name in (b"\xff.png", b"b.png"):
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(png())
    Path(os.fsdecode(folder + b"/\xfe.png")).write_bytes(b"broken")
    data = PictureFolder(tmp_path / "data", 16, split=False)
    assert len(data) == 3 and len(data.fingerprint) > 64 and data.__getitems__([(0, None)])[0].shape == (1, 3, 16, 16)
    run(train, "vq", "--data", tmp_path / "data", "--size", 32, "--batch-size", 2, "--steps", 2, "--workers", 0,
        "--lpips-weight", 0, "--disc-weight", 0, "--device", "cpu", "--out", tmp_path / "out")
    assert "skipped 1 unreadable" in capsys.readouterr().out
    assert (tmp_path / "out" / "unreadable.txt").read_bytes() == folder + b"/\xfe.png\n"
    listed = captions(tmp_path / "a.tsv", b"data/caf\xe9/\xff.png\tna\xefve\ndata/caf\xe9/b.png\tb")
    assert [listed.captions(i)[0] for i in (0, 1)] == ["na\ufffdve", "b"]


def test_names_of_videos_that_are_not_utf8(tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "pyav", lambda: None)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.MP4")).write_bytes(b"x")
    data = clips.VideoFolder(tmp_path, True, False)
    assert len(data) == 1 and len(data.fingerprint) == 64


# ----------------------------------------------------------------------------------------------------------------------
# Tar files


def test_members_that_cannot_be_used_are_counted(tmp_path, capsys):
    members = {"a.png": png(), "a.cls": "1\n", "b.png": png(), "b.cls": "0", "noclass.png": png()}
    for number, text in enumerate(["-1", "1000000000000", "\u00b2", "cat", "1" * 5000, ""]):
        members |= {f"bad{number}.png": png(), f"bad{number}.cls": text}
    members |= {"s.png": link("s.png", tarfile.SYMTYPE, "/etc/passwd"), "s.cls": "0",
                "h.png": link("h.png", tarfile.LNKTYPE, "a.png"), "d.png": link("d.png", tarfile.DIRTYPE),
                "f.png": link("f.png", tarfile.FIFOTYPE), "c.png": link("c.png", tarfile.CHRTYPE),
                "._a.png": b"resource", "__MACOSX/a.png": png()}
    folder = pack(tmp_path / "tars" / "0.TAR", members)
    data = PictureFolder(folder, 16, split=False, notes=tmp_path)
    assert [data.name(i).split("/")[-1] for i in range(len(data))] == ["a.png", "b.png"]
    assert data.classes == ["0", "1"] and data.labels.tolist() == [1, 0]
    said = capsys.readouterr().out
    assert ("skipped 12 of 14 files: its .cls is no number from 0 to 999999 (6), not a plain file (5), no .cls beside "
            "it (1); such as") in said and said.count("0.TAR/") == 3


def test_a_tar_file_that_was_cut_ends_early(tmp_path, capsys):
    folder = pack(tmp_path / "tars" / "0.tar", {"a.png": png(), "a.cls": "0", "b.png": png(), "b.cls": "0"})
    with tarfile.open(folder / "0.tar") as tar:
        end = tar.getmember("b.cls").offset
    (folder / "0.tar").write_bytes((folder / "0.tar").read_bytes()[:end])   # between a picture and its label
    data = PictureFolder(folder, 16, split=False, notes=tmp_path)
    said = capsys.readouterr().out
    assert len(data) == 1 and "read in part 1 damaged of 1 tar files" in said and "no .cls beside it (1)" in said


def test_tar_files_that_are_none(tmp_path, capsys):
    def say():
        with pytest.raises(UserError) as e:
            PictureFolder(tmp_path / "tars", 16, notes=tmp_path)
        return str(e.value)
    folder = pack(tmp_path / "tars" / "0.tar", {"a.png": png(), "a.cls": "0"})
    (folder / "0.tar").write_bytes(gzip.compress((folder / "0.tar").read_bytes()))
    assert "0.tar: is compressed with gzip" in say()
    pack(tmp_path / "tars" / "0.tar", {"a.png": png(), "a.cls": "0"}, mode="w:xz")
    assert "0.tar: is compressed with xz" in say()
    (folder / "0.tar").unlink()
    (folder / "0.tar").mkdir()
    assert "0.tar: not a file; expected a tar file" in say()
    (folder / "0.tar").rmdir()
    (folder / "0.tar").write_bytes(b"")
    assert "no pictures in it" in say()
    (folder / "0.tar").write_bytes(os.urandom(2000))
    assert "no pictures in it" in say()


def test_a_damaged_index_is_made_again(tmp_path, monkeypatch):
    folder = pack(tmp_path / "tars" / "0.tar", {"a.png": png(), "a.cls": "0"})
    made, index_tar = [], shards.index_tar

    def counted(path):
        made.append(path)
        return index_tar(path)
    monkeypatch.setattr(shards, "index_tar", counted)
    read = lambda: PictureFolder(folder, 16, split=False, notes=tmp_path / "notes").files[0]
    entry = read()
    index, = (tmp_path / "notes").iterdir()
    whole = json.loads(index.read_text())
    assert read() == entry and len(made) == 1
    name, start, size, what = whole["members"][0]
    for members in ([[name, start, 10**15, what]], [[name, -5, size, what]], [[name, start, size, [0, 3]]],
                    [[3, start, size, what]], [[name, start, size]], 7, [[name, start, size, None]]):
        index.write_text(json.dumps(whole | {"members": members}))
        assert read() == entry
    for text in ("", "[]", "null", "{}", "[" * 100_000, '{"whole": 1, "members": []}'):
        index.write_text(text)
        assert read() == entry
    index.write_bytes(b"\xff\xfe")
    assert read() == entry and len(made) == 15


def test_texts_in_tar_files_are_bounded(tmp_path, capsys):
    members = {"a.png": png(), "a.txt": "one", "deep.png": png(), "deep.json": "[" * 100_000, "long.png": png(),
               "long.txt": "x" * 2**21}
    data = CaptionedPictures(pack(tmp_path / "tars" / "0.tar", members), size=16, split=False, notes=tmp_path)
    said = capsys.readouterr().out
    assert len(data) == 1 and "not JSON (1)" in said and "a text of more than 1 MB (1)" in said


# ----------------------------------------------------------------------------------------------------------------------
# Captions and prompts


def test_captions_as_img2dataset_writes_them(tmp_path, capsys):
    meta = json.dumps({"caption": "from json", "url": "x", "width": 40, "exif": "{}", "text": None})
    members = {"0.png": png(), "0.txt": "from txt", "0.json": meta, "1.png": png(), "1.json": meta, "2.png": png(),
               "2.txt": "\ufeffalone", "3.png": png(), "3.txt": "t",
               "3.json": '{"long_caption": "long", "text": "short"}', "4.png": png(), "4.json": '{"text": "plain"}',
               "5.png": png(), "5.json": '{"text": ["list", "other"]}'}
    for size in (None, 16):
        data = CaptionedPictures(pack(tmp_path / "tars" / "0.tar", members), "0.06M", split=False, size=size,
                                 notes=tmp_path)
        assert [data.captions(i)[0] for i in range(6)] == ["from txt", "from json", "alone", "long", "plain", "list"]
    put(tmp_path / "a.png")
    data = captions(tmp_path / "a.jsonl", '{"image_path": "a.png", "text": "a string"}', 16)
    assert data.captions(0)[0] == "a string"
    assert "skipped" not in capsys.readouterr().out


def test_lines_end_at_line_ends_only(tmp_path):
    put(tmp_path / "a.png")
    odd = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven\x1deight\x1enine\rten"
    data = captions(tmp_path / "a.tsv", f"\ufeffa.png\tfirst\r\na.png\t{odd}\n\na.png\tlast")
    assert [data.captions(i)[0] for i in range(len(data))] == ["first", odd, "last"]
    line = json.dumps({"image_path": "a.png", "long_caption": odd}, ensure_ascii=False)
    assert captions(tmp_path / "a.jsonl", f"\ufeff{line}\n").captions(0)[0] == odd
    (tmp_path / "p.txt").write_bytes(f"\ufefffirst\r\n{odd}\n\nlast\n".encode())
    assert read_prompts(tmp_path / "p.txt") == (["first", odd, "last"], None)


def test_only_infinity_cuts_captions_at_two_dashes(tmp_path):
    put(tmp_path / "a.png")
    text = "a.png\tan owl -- at night --ar 3:2"
    assert captions(tmp_path / "a.tsv", text).captions(0)[0] == "an owl"
    assert captions(tmp_path / "a.tsv", text, size=16).captions(0)[0] == "an owl -- at night --ar 3:2"


def test_broken_lines_say_why(tmp_path, capsys):
    put(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    lines = ["no tab", "a.png\t ", "gone.png\tx", "gone2.png\tx", "b.png\tx", "a.png\tgood"]
    captions(tmp_path / "a.tsv", "\n".join(lines))
    said = capsys.readouterr().out
    assert ("skipped 5 broken of 6 lines: no such picture (2), no tab between a path and a caption (1), "
            "no caption (1), no readable picture (1); such as "
            f"{tmp_path}/a.tsv:1, {tmp_path}/a.tsv:2, {tmp_path}/a.tsv:3") in said
    rows = [3, [], "x", {"text": "x"}, {"image_path": 3, "text": "x"}, {"image_path": "a.png", "text": 3},
            {"image_path": "a.png", "text": [3]}, {"image_path": "a.png", "text": "\ud800"},
            {"image_path": "\ud800", "text": "x", "h_div_w": 1},
            *({"image_path": "a.png", "text": "x", "h_div_w": ratio} for ratio in ("wide", -1, 1e999, [1], 10**400)),
            {"image_path": "a\0b", "text": "x"}, {"image_path": "", "text": "x"},
            {"image_path": "a.png", "text": "good"}]
    text = "\n".join([*map(json.dumps, rows), "{", "[" * 50_000])
    assert len(captions(tmp_path / "a.jsonl", text)) == 1
    assert "skipped 18 broken of 19 lines: " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"not one of 2 lines can be used: no such picture \(2\)"):
        captions(tmp_path / "gone.TSV", "x.png\tx\ny.png\ty")
    assert len(CaptionedPictures(tmp_path, "0.06M", split=False)) == 2      # .TSV too, which has no good line


def test_prompts_that_are_none(tmp_path):
    def say(content, name="p.txt"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError) as e:
            read_prompts(tmp_path / name)
        assert str(e.value).startswith(f"--prompts {tmp_path / name}")
        return str(e.value)
    assert "is JSON" in say('["a cat",\n "a dog"]') and "is JSON" in say('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert "is JSON" in say("[" * 50_000)
    assert "line 3: expected" in say('{"prompt": "a"}\n\n{"prompt": 5}\n', "p.jsonl")
    for line in ("[]", "5", "{}", '{"prompt": null}', '{"prompt": ["a"]}', '{"prompt": "\\ud800"}', "[" * 50_000):
        assert 'line 1: expected {"prompt": "..."}' in say(line, "P.JSONL")
    assert "expected UTF-8 text" in say(b"caf\xe9")
    os.mkfifo(tmp_path / "fifo")
    for path, words in (("fifo", "not a file"), ("", "not a file"), ("/dev/zero", "not a file"), ("none", "No such")):
        with pytest.raises(UserError, match=words):
            read_prompts(tmp_path / path)
    with open(tmp_path / "huge", "wb") as f:
        f.truncate(2**40)
    with pytest.raises(UserError, match="has more than 64 MB"):
        read_prompts(tmp_path / "huge")
    (tmp_path / "p.txt").write_text("[red] hat\n{\n3\n")                    # these are prompts
    assert read_prompts(tmp_path / "p.txt")[0] == ["[red] hat", "{", "3"]


def test_features_that_are_none(tmp_path):
    rows = {"text.0": torch.ones(3, 8), "text.1": torch.ones(2, 8)}

    def say(state, prompts):
        save_file(state, tmp_path / "f.safetensors", {"prompts": prompts})
        with pytest.raises(UserError, match="--features .*f.safetensors: ") as e:
            read_features(tmp_path / "f.safetensors", 8, 5)
        return str(e.value)
    good = '["a", "b"]'
    assert "has features of 7 numbers" in say({"text.0": torch.ones(2, 7)}, '["a"]')
    for prompts in ("null", "[]", "{}", "3", "[[1]]", "[1, 2]", '["a", "b", "c"]', "[" * 50_000, "x"):
        assert "a file that --save-features wrote" in say(rows, prompts)
    for bad in (torch.ones(8), torch.ones(0, 8), torch.full((2, 8), torch.nan), torch.ones(1, 2, 8)):
        assert "a file that --save-features wrote" in say(rows | {"text.1": bad}, good)
    save_file(rows, tmp_path / "f.safetensors", {"prompts": good})
    assert list(read_features(tmp_path / "f.safetensors", 8, 5)) == ["a", "b"]


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


def folder_of(tmp_path, count=9):
    """A data set of pictures, one of them broken."""
    for i in range(count):
        put(tmp_path / "data" / ("cat" if i < 5 else "dog") / f"{i}.png", 30 + i, 40)
    (tmp_path / "data" / "cat" / "3.png").write_bytes(b"broken")
    return PictureFolder(tmp_path / "data", 16, split=False)


def cache_of(data, folder, crops="ten", **options):
    folder.mkdir(exist_ok=True)
    return TokenCache(data, tiny_single(), tiny_single().config.patch_nums, crops, "cpu", folder, "x", **options)


def test_a_picture_is_opened_once_for_all_its_views(tmp_path, monkeypatch):
    data = folder_of(tmp_path)
    opened = []

    def counted(file, name):
        opened.append(name)
        return read_picture(file, name)
    monkeypatch.setattr("lib.data.read_picture", counted)
    cache = cache_of(data, tmp_path / "cache")
    assert opened == list(data.files) and len(cache) == 8 * 20
    pixels = [data.read(i, ("ten", n)) for i in (0, 4) for n in range(20)]
    tokens = cache.__getitems__([(i * 20 + n, None) for i in (0, 3) for n in range(20)])[0]     # 3 is unreadable
    assert torch.equal(tokens, tiny_single().tokenize(torch.stack(pixels).float() / 127.5 - 1)[0])


@pytest.mark.slow
def test_workers_write_the_same_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(TokenCache, "SHARD", 70)                            # cuts the views of a picture
    data = folder_of(tmp_path)
    for crops in ("ten", "flip", "1", "90"):
        alone = cache_of(data, tmp_path / "alone", crops)
        many = cache_of(data, tmp_path / "many", crops, workers=2)
        assert torch.equal(alone.index, many.index) and len(alone.files) == len(many.files)
        assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(alone.files, many.files))


def test_every_kind_of_damage_to_tokens_is_found(tmp_path, capsys):
    data = folder_of(tmp_path)
    cache_of(data, tmp_path / "cache", "flip")
    capsys.readouterr()
    path, = (tmp_path / "cache").rglob("*.safetensors")
    whole = load_file(path)
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    index, tokens = whole["index"], whole["tokens"]
    damages = [{"index": index.flip(0)}, {"index": index.where(index != 5, 3)}, {"index": index + 10**6},
               {"index": index[:-1]}, {"index": index.float()}, {"tokens": tokens[:-2]}, {"tokens": tokens[:, :8]},
               {"tokens": tokens.reshape(-1, 8)}, {"tokens": tokens.flip(0)}, {"tokens": tokens.long()}]
    for damage in damages:
        save_file({k: v.contiguous() for k, v in (whole | damage).items()}, path, metadata)
        again = cache_of(data, tmp_path / "cache", "flip")
        assert "made again: 1 damaged of 1 files of tokens" in capsys.readouterr().out, damage
        assert torch.equal(again.index, index) and torch.equal(again.files[0]["tokens"], tokens)
    for state, note in (({"tokens": tokens}, metadata), (whole, None), (whole, {"crc32": "1"})):
        save_file(state, path, note)
        cache_of(data, tmp_path / "cache", "flip")
        assert "made again: 1 damaged" in capsys.readouterr().out
    cache_of(data, tmp_path / "cache", "flip")
    assert "made again" not in capsys.readouterr().out


def test_damaged_text_features_are_made_again(tmp_path, capsys):
    t5 = T5Encoder(T5_CONFIG)
    make = lambda: FeatureCache(["a", "bc"], t5, 6, False, tmp_path)
    before = make()["bc"]
    path, = tmp_path.glob("text_*.safetensors")
    whole = load_file(path)
    for damage in ({"starts": torch.tensor([0, 9, 4])}, {"starts": torch.tensor([0, 2])},
                   {"features": whole["features"][:-1].contiguous()}):
        save_file(whole | damage, path)
        assert torch.equal(make()["bc"], before) and "made again" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:50])
    assert torch.equal(make()["bc"], before) and "made again" in capsys.readouterr().out
    assert torch.equal(make()["bc"], before) and "made again" not in capsys.readouterr().out


def test_numbers_of_crops_are_bounded(files, tmp_path, capsys):
    for crops in ("1000000000", "1001", "-1", "\u00b2", "1.5", "1" * 5000):
        said = complaint(capsys, train, "var", "--vae", files[1], f"--cache-crops={crops}", "--out", tmp_path)
        assert "expected a number up to 1000" in said
