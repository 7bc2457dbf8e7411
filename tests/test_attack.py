"""sample.py under attack: odd values, files in each other's way, full disks; and whole folders through a tokenizer."""
import os
import re
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import var
import vq
from helpers import ROOT, complaint, info, run, smooth_pictures, tiny_var
from lib import bench, drawing, editing, reconstruction
from lib.console import UserError, check_out, check_paths, save_json
from lib.pictures import psnr, read_picture, ssim, to_pixels, to_tensor


@pytest.fixture
def models(files, text_files, token_files):
    """{name: arguments} of the tiny models."""
    device = ("--device", "cpu")
    return {"var": ("var", "--ckpt", files[2], *device), "vq": ("vq", "--ckpt", files[1], *device),
            "classes": ("llamagen", "--ckpt", token_files[2], *device),
            "text": ("llamagen", "--ckpt", token_files[3], *device),
            "infinity": ("infinity", "--ckpt", text_files[2], *device)}


def picture(path, width=16, height=16, seed=0):
    """Write a smooth picture -> path."""
    pixels = smooth_pictures(1, max(width, height), seed)[0, :, :height, :width].permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def pixels_of(path):
    return np.array(Image.open(path)).astype(int)


# ----------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("model, argv, message", [
    ("var", ["-n", 2, "--classes", "owl", 1, 4], "-n 2: --classes names 3; leave out -n, or give 3 or more"),
    ("classes", ["-n", 1, "--classes", 0, 1], "-n 1: --classes names 2"),
    ("classes", ["-n", 2, "--cfg", 1, 2, 3], "--cfg has 3 values, but there are 2 pictures"),
    ("text", ["--prompt", "a", "--cfg", 1, 2], "--cfg has 2 values, but there are 1 pictures"),
    ("var", ["--cfg", "inf"], "--cfg inf: expected 0 .. 1000"),
    ("var", ["--cfg", "1e37"], "--cfg 1e+37: expected 0 .. 1000"),
    ("classes", ["--cfg", 2, "nan"], "--cfg nan: expected 0 .. 1000"),
    ("classes", ["--temperature", "1e-30"], "--temperature 1e-30: expected 0, or 0.001 .. 1000"),
    ("classes", ["--temperature", "inf"], "--temperature inf: expected 0 .. 1000"),
    ("infinity", ["--tau", "inf"], "--tau inf: expected 0.001 .. 1000"),
    ("infinity", ["--cfg", 3, 3, "1e30"], "--cfg 1e+30: expected 0 .. 1000"),
    ("var", ["--seed", 2**64], f"--seed {2**64}: expected 0 .. {2**63 - 1}"),
    ("text", ["--prompt", "a", "--seed", 2**63], f"--seed {2**63}: expected 0 .. {2**63 - 1}"),
    ("var", ["-n", 2 * 10**9], "-n 2000000000: expected 1 .. 1000000"),
    ("infinity", ["--batch-size", 10**8], "--batch-size 100000000: expected 1 .. 4096"),
    ("vq", ["--batch-size", 10**8], "--batch-size 100000000: expected 1 .. 4096"),
    ("classes", ["--size", 2 * 10**6], "--size 2000000: expected 1 .. 4096"),
    ("classes", ["--eval-size", 10**5], "--eval-size 100000: expected 1 .. 4096"),
    ("var", ["-n", 5000, "--out", "a.png"], "--out a.png: 5000 pictures do not fit into one .png"),
    ("infinity", ["-n", 600, "--prompt", "a", "b"], "1200 pictures do not fit into one .png"),
    ("var", ["--classes", "²"], "--classes ²: expected an id 0 .. 4"),
    ("classes", ["--classes", "①"], "--classes ①: expected an id 0 .. 4"),
    ("var", ["--classes", ""], "--classes '': expected an id 0 .. 4"),
    ("var", ["--classes", "9" * 5000], "expected an id 0 .. 4"),
    ("var", ["--classes", "-1"], "--classes -1: expected an id 0 .. 4"),
    ("infinity", ["--prompt", "half \udcff"], "a prompt is not UTF-8: half \\udcff; set the terminal to UTF-8"),
    ("text", ["--prompt", "a", "\udc80"], "a prompt is not UTF-8"),
    ("infinity", ["--prompt", "a", "--negative", "\ud800"], "a prompt is not UTF-8"),
    ("infinity", ["--prompt", "a", "--t5", "/nope"], "--t5 /nope: this model has a text encoder of its own"),
    ("text", ["--prompt", "a", "--no-clean"], "--no-clean: this model has a text encoder of its own"),
    ("classes", ["--t5", "/nope"], "--t5: is for models that read text, but classes.safetensors draws classes"),
    ("classes", ["--no-clean"], "--no-clean: is for models that read text"),
    ("infinity", ["--t5", "a", "--features", "b"], "--t5 and --features exclude each other"),
    ("infinity", ["--keep", 2], "--keep goes with --image"),
    ("text", ["--bench", "--prompts", "p.txt"], "--bench times one batch: give its prompts with --prompt"),
    ("var", ["--box", 0, 0, 1, 1], "--box goes with --edit"),
    ("var", ["--mask", "m.png"], "--mask goes with --edit"),
    ("var", ["--ckpt", ""], "--ckpt '': is empty; give a path, or leave it out"),
    ("vq", ["--image", "a.png", ""], "--image '': is empty"),
    ("var", ["--ckpt", "/nope"], "error: --ckpt /nope: no such file"),
    ("var", ["--vae", "/nope"], "error: --vae /nope: no such file"),
    ("classes", ["--vq", "/nope.pt"], "error: --vq /nope.pt: no such file"),
    ("vq", ["--ckpt", "nope.pth"], "error: --ckpt nope.pth: no such file"),
    ("vq", ["--npz", "a.npz", "--keep-size"], "leave out --out and --keep-size"),
    ("vq", ["--out", "x" * 242 + ".png"], ".png: cannot be written (File name too long)"),
    ("var", ["--npz", "x" * 245 + ".npz"], ".npz: cannot be written (File name too long)"),
], ids=str)
def test_odd_values(models, capsys, tmp_path, monkeypatch, model, argv, message):
    monkeypatch.chdir(tmp_path)
    said = complaint(capsys, sample, *models[model], *argv)
    assert re.search(re.escape(message) + r"(?!\d)", said), said            # 1000 is not 1000000
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_limits_come_before_anything_is_loaded(capsys):
    """The checkpoint of these commands does not exist."""
    for argv in (["var", "-n", 10**7], ["var", "-n", 5000], ["llamagen", "--size", 10**6], ["vq", "--batch-size", 0],
                 ["infinity", "--batch-size", 10**6, "--prompt", "a"], ["llamagen", "--eval-size", 10**6]):
        assert "nowhere.pt" not in complaint(capsys, sample, *argv, "--ckpt", "nowhere.pt")


def test_what_a_header_suggests_is_in_range(tmp_path, files, capsys):
    shutil.copy(files[1], tmp_path)
    var.save(tiny_var(), tmp_path / "a.safetensors", classes=["a", "b"], show=["b", "gone"], sampling={"top_k": 16384})
    run(sample, "var", "--ckpt", tmp_path / "a.safetensors", "--device", "cpu", "-n", 2, "--out", tmp_path / "a")
    assert info(tmp_path / "a" / "00001.png")[1]["class"] == "b"            # the only one of `show` that there is
    var.save(tiny_var(), tmp_path / "b.safetensors", sampling={"temperature": 1e-30})
    said = complaint(capsys, sample, "var", "--ckpt", tmp_path / "b.safetensors", "--out", tmp_path / "b.png")
    assert "'sampling' in its header is {'temperature': 1e-30}" in said


def test_the_largest_seed(models, tmp_path):
    run(sample, *models["var"], "--seed", 2**63 - 1, "-n", 2, "--out", tmp_path / "a")
    assert info(tmp_path / "a" / "00001.png")[1]["seed"] == str(2**63)


def test_every_class_that_is_named_is_timed(models, monkeypatch):
    counts = []
    monkeypatch.setattr(sample, "bench_generator", lambda *inputs: counts.append(inputs[-1]))
    run(sample, *models["var"], "--bench", "--classes", 0, 1, 2)
    run(sample, *models["classes"], "--bench", "--classes", 0, 1)
    run(sample, *models["text"], "--bench", "--prompt", "a", "b", "-n", 2)
    run(sample, *models["infinity"], "--bench", "--prompt", "a", "b")
    run(sample, *models["var"], "--bench")
    assert counts == [3, 2, 4, 2, 1]


def test_seeds_mean_nothing_to_a_tokenizer(models, tmp_path, capsys):
    run(sample, *models["vq"], "--seed", 7, "--image", picture(tmp_path / "a.png"), "--out", tmp_path / "b.png")
    assert "note: --seed does nothing here" in capsys.readouterr().err


def test_values_for_scales_that_there_are_not_are_said(models, tmp_path, capsys):
    run(sample, *models["infinity"], "--prompt", "a", "--cfg", 1, 2, 3, 4, "--out", tmp_path / "a.png")
    assert "the first 3 of 4 values of --cfg are used" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_with_few_files_another_locale_or_half_a_pipe(models, tmp_path):
    shell = lambda line, **kwargs: subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT,
                                                  errors="surrogateescape", **kwargs)
    python = f"{sys.executable} sample.py"
    ran = shell(f"{python} var --list-classes --device cpu | head -1; echo ${{PIPESTATUS[@]}}")
    assert ran.stdout.split() == ["0", "emojione/activities", "0", "0"] and ran.stderr == ""
    ran = shell(f"{python} infinity --prompt 'grüne 猫' --device cpu --out {tmp_path}/a.png",
                env=os.environ | {"LC_ALL": "C"})
    assert ran.returncode == 0 and info(tmp_path / "a.png")[1]["prompts"] == "grüne 猫", ran.stderr
    ran = shell(f"ulimit -n 20; {python} var --device cpu --out {tmp_path}/b.png")
    assert ran.returncode == 0 or len(ran.stderr.strip().splitlines()) == 1, ran.stderr
    ran = shell(f"{python} var --ckpt var_d16.pth --out {tmp_path}/c.png",
                env=os.environ | {"HF_ENDPOINT": "http://[::1", "HF_HOME": str(tmp_path)})
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert "error: HF_ENDPOINT=http://[::1: no usable address" in ran.stderr or "pip install" in ran.stderr


# ----------------------------------------------------------------------------------------------------------------------
# ImageNet's names


def test_released_models_know_the_names_of_imagenet(files, tmp_path, capsys):
    shutil.copy(files[1], tmp_path)
    var.save(tiny_var(num_classes=1000), tmp_path / "a.safetensors")
    argv = ("var", "--ckpt", tmp_path / "a.safetensors", "--device", "cpu")
    run(sample, *argv, "--list-classes")
    said = capsys.readouterr()
    assert " 207  golden retriever\n" in said.out and "a.safetensors holds no names" in said.err
    assert "ImageNet's, from torchvision" in said.err
    run(sample, *argv, "--classes", "golden retriever", "9", "--out", tmp_path / "a")
    assert "names of classes: ImageNet's, from torchvision" in capsys.readouterr().out
    assert info(tmp_path / "a" / "00000.png")[1]["class"] == "207" and len(list((tmp_path / "a").iterdir())) == 2
    run(sample, *argv, "--classes", "9", "--out", tmp_path / "b")
    assert "ImageNet" not in capsys.readouterr().out
    said = complaint(capsys, sample, "var", "--ckpt", files[2], "--classes", "golden retriever")
    assert "expected an id 0 .. 4" in said                                  # five classes with names of their own


def test_a_name_of_two_classes_is_refused(files, tmp_path, capsys):
    shutil.copy(files[1], tmp_path)
    var.save(tiny_var(), tmp_path / "a.safetensors", classes=["heron", "crane", "digger", "crane", "owl"])
    said = complaint(capsys, sample, "var", "--ckpt", tmp_path / "a.safetensors", "--classes", "crane")
    assert "--classes crane: is the name of the classes 1, 3; give one of these ids" in said


# ----------------------------------------------------------------------------------------------------------------------
# Editing


def test_boxes_and_masks_have_a_cell():
    for box in ([0.5, 0.5, 0.51, 0.52], [0.99, 0.99, 1, 1], [0, 0, 0.01, 0.01]):
        assert (~var.edit_mask(box, 16)).sum() == 1
        assert var.edit_mask(box, 4, inpaint=False).sum() == 1
    inside = ~var.edit_mask([0.25, 0.5, 0.75, 1], 4)
    assert inside.nonzero().tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]
    dot = Image.new("RGB", (64, 64))
    dot.paste("white", (20, 36, 25, 40))
    kept = editing.keep_black(dot, 4)
    assert (~kept).nonzero().tolist() == [[2, 1]]
    half = Image.new("L", (80, 40))                                         # of which 20 to 60 is the centre square
    half.paste(255, (40, 0, 80, 40))
    assert torch.equal(editing.keep_black(half, 4), torch.tensor([[True, True, False, False]] * 4))
    with pytest.raises(UserError, match="is black"):
        editing.keep_black(Image.new("L", (9, 9)), 4)


def test_a_mask_redraws_what_is_white(models, tmp_path, capsys):
    given = picture(tmp_path / "given.png", 24, 16)
    mask = Image.new("L", (24, 16))
    mask.paste(255, (12, 0, 24, 16))
    mask.save(tmp_path / "mask.png")
    edit = (*models["var"], "-n", 1, "--image", given, "--edit", "in")
    run(sample, *edit, "--mask", tmp_path / "mask.png", "--out", tmp_path / "mask")
    run(sample, *edit, "--box", 0, 0.5, 1, 1, "--out", tmp_path / "box")
    assert "the centre square of the picture was used" in capsys.readouterr().out
    assert np.array_equal(pixels_of(tmp_path / "mask" / "00000.png"), pixels_of(tmp_path / "box" / "00000.png"))
    assert info(tmp_path / "mask" / "00000.png")[1]["mask"] == str(tmp_path / "mask.png")
    say = lambda *argv: complaint(capsys, sample, *models["var"], "--image", given, *argv)
    Image.new("L", (16, 24)).save(tmp_path / "other.png")
    assert "has 16x24 pixels, but the picture has 24x16" in say("--edit", "in", "--mask", tmp_path / "other.png")
    assert "--edit out is for a --box" in say("--edit", "out", "--mask", tmp_path / "mask.png")
    assert "exclude each other" in say("--edit", "in", "--mask", tmp_path / "mask.png", "--box", 0, 0, 1, 1)
    assert "leave out --classes" in say("--edit", "in", "--classes", 1)


def test_the_help_says_why_tokens_in_rows_cannot_be_edited(capsys):
    with pytest.raises(SystemExit):
        sample.parse_args(["llamagen", "--help"])
    assert "cannot redraw a part of a picture" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Whole folders through a tokenizer


@pytest.fixture
def folder(tmp_path):
    """Eleven pictures of three sizes in a folder and below it, one of them damaged, and a text."""
    for i, size in enumerate([(16, 16)] * 4 + [(30, 16)] * 3 + [(20, 40)] * 3):
        picture(tmp_path / "data" / f"{i % 2}" / f"{i}.PNG", *size, seed=i)
    (tmp_path / "data" / "0" / "3a.jpg").write_bytes(b"broken")
    (tmp_path / "data" / "notes.txt").write_text("no picture")
    return tmp_path / "data"


def test_a_whole_folder_is_reconstructed(models, folder, tmp_path, capsys):
    run(sample, *models["vq"], "--image", folder, "--npz", tmp_path / "a.npz", "--batch-size", 3)
    said = capsys.readouterr()
    assert "3a.jpg: not a readable picture" in said.err
    assert "10 pictures, 1 of 11 cannot be read, PSNR " in said.out
    array = np.load(tmp_path / "a.npz")["arr_0"]
    assert array.shape == (10, 16, 16, 3) and array.dtype == np.uint8
    tokenizer = vq.load(models["vq"][2])
    expected = []
    scores = []
    codes = []
    for file in sorted(folder.glob("*/*.PNG")):
        cut, _ = reconstruction.fit(read_picture(file), tokenizer.config, False)
        image = to_tensor(cut, "cpu")
        decoded = tokenizer.reconstruct(image)
        codes += tokenizer.tokenize(image)
        scores.append((psnr(decoded, image).item(), ssim(decoded, image).item()))
        expected.append(to_pixels(decoded.add(1).div(2))[0])
    assert abs(array.astype(int) - np.stack(expected)).max() <= 1
    quality, similarity = np.mean(scores, 0)
    used = 100 * len(torch.cat(codes, 1).unique()) / tokenizer.config.vocab_size
    assert f"PSNR {quality:.2f} dB, SSIM {similarity:.3f}, {used:.0f} % of the codes used" in said.out
    run(sample, *models["vq"], "--image", folder, "--out", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{i:05d}.png" for i in range(10)]
    size, text = info(tmp_path / "out" / "00003.png")
    assert size == (16, 16) and text["image"] == str(sorted(folder.glob("*/*.PNG"))[3])
    assert abs(pixels_of(tmp_path / "out" / "00003.png") - array[3]).max() <= 1


def test_bits_and_single_tokens_of_a_folder(folder, text_files, token_files, tmp_path, capsys):
    """The usage of bits over all pictures is that of all their tokens together. LlamaGen's authors round."""
    run(sample, "vq", "--ckpt", text_files[1], "--image", folder, "--npz", tmp_path / "b.npz", "--device", "cpu",
        "--batch-size", 4)
    tokenizer = vq.load(text_files[1])
    images = [to_tensor(reconstruction.fit(read_picture(f), tokenizer.config, False)[0], "cpu") for f in
              sorted(folder.glob("*/*.PNG"))]
    tokens = torch.cat(tokenizer.tokenize(torch.cat(images)), 1).flatten(0, 1)[None]
    expected = tokenizer.quantize.coverage([tokens], tokenizer.config)
    assert f"{expected:.0f} % of the bits' entropy" in capsys.readouterr().out
    run(sample, "vq", "--ckpt", token_files[1], "--image", folder, "--npz", tmp_path / "c.npz", "--device", "cpu")
    tokenizer = vq.load(token_files[1])
    decoded = tokenizer.reconstruct(images[0])
    assert np.array_equal(np.load(tmp_path / "c.npz")["arr_0"][0], to_pixels(decoded.add(1).div(2), 0.5)[0])


def test_folders_that_cannot_be_reconstructed(models, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"broken")
    say = lambda *argv: complaint(capsys, sample, *models["vq"], "--image", *argv)
    assert "empty: no picture in this folder (.bmp" in say(tmp_path / "empty")
    assert "a.png: not a readable picture" in say(tmp_path / "bad", "--npz", tmp_path / "a.npz")
    good = picture(tmp_path / "good.png")
    assert "nope.png: no such file" in say(good, tmp_path / "nope.png", "--npz", tmp_path / "a.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "empty", "good.png"]


# ----------------------------------------------------------------------------------------------------------------------
# Files in each other's way


def test_inputs_are_never_replaced(models, tmp_path, capsys, files):
    given = picture(tmp_path / "p.png")
    shutil.copy(files[1], tmp_path)
    shutil.copy(files[2], tmp_path / "m.safetensors")
    (tmp_path / "link.png").symlink_to(given)
    (tmp_path / "folder").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "folder")
    picture(tmp_path / "folder" / "00000.png")
    (tmp_path / "folder" / "p.jsonl").write_text('{"prompt": "a"}\n')
    run(sample, *models["infinity"], "--prompt", "a", "--save-features", tmp_path / "f.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    inside = tmp_path / "folder" / "00000.png"
    for argv in (["vq", "--image", given, "--out", given], ["vq", "--image", given, "--out", tmp_path / "link.png"],
                 ["vq", "--image", tmp_path / "link.png", "--out", tmp_path / "x" / ".." / "p.png"],
                 ["vq", "--image", given, inside, "--out", tmp_path / "linked"],
                 ["vq", "--image", tmp_path / "folder", "--out", tmp_path / "folder"],
                 ["var", "--edit", "in", "--image", given, "--out", given],
                 ["var", "--edit", "in", "--image", given, "--mask", inside, "--out", tmp_path / "folder"],
                 ["infinity", "--image", given, "--prompt", "a", "--out", given],
                 ["infinity", "--features", tmp_path / "f.safetensors", "--save-features", tmp_path / "f.safetensors"],
                 ["infinity", "--prompt", "a", "--ckpt", tmp_path / "m.safetensors", "--save-features",
                  tmp_path / "m.safetensors"],
                 ["llamagen", "--prompts", tmp_path / "folder" / "p.jsonl", "--out", tmp_path / "folder"]):
        said = complaint(capsys, sample, *argv)
        assert "would replace" in said and "which it is made from; choose another name" in said
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_default_output_may_be_an_input_too(models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "out" / "vq.png")
    assert "--out out/vq.png: would replace" in complaint(capsys, sample, *models["vq"], "--image", "out/vq.png")


def test_names_of_outputs(tmp_path):
    (tmp_path / "samples.png").mkdir()
    with pytest.raises(UserError, match="samples.png: cannot be written .it is a folder."):
        check_out(tmp_path / "samples.png", None)
    with pytest.raises(UserError, match="a name that ends in .png, or a folder"):
        check_out(tmp_path / "a.JPG", None)
    assert check_out(tmp_path / "A.PNG", None)[1]
    assert check_out(tmp_path / "v1.5", None) == (tmp_path / "v1.5", False)     # a folder with a dot
    assert [p.name for p in tmp_path.iterdir()].count("v1.5") == 1
    check_paths(SimpleNamespace(ckpt="a.pth", npz=str(tmp_path / "a.npz")))
    check_paths(SimpleNamespace(image=[str(tmp_path / "x.jpg")]), tmp_path)     # outputs of a folder are .png


# ----------------------------------------------------------------------------------------------------------------------
# Full disks, damaged parts


@contextmanager
def full_disk(size):
    """No file may grow beyond a size for a while."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("model, argv, flag, name", [
    ("infinity", ["--prompt", "a cat"], "--save-features", "a.safetensors"),
    ("var", ["-n", 2], "--out", "a.png"),
    ("var", ["-n", 2], "--npz", "a.npz"),
    ("vq", ["--image", "p.png"], "--npz", "a.npz"),
    ("vq", ["--image", "p.png"], "--out", "a.png"),
], ids=str)
def test_a_full_disk_leaves_nothing_half_written(models, tmp_path, capsys, monkeypatch, model, argv, flag, name):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "p.png")
    with full_disk(1000):                                                   # settings.json is smaller
        said = complaint(capsys, sample, *models[model], *argv, flag, tmp_path / "out" / name)
    assert "File too large" in said and ("a.npz" in said or name in said or ".npy" in said)
    left = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert left in ([], ["settings.json"])                                  # of an --npz, which can go on


def test_a_full_disk_for_json(tmp_path):
    with full_disk(150), pytest.raises(OSError) as e:
        save_json(tmp_path / "a.json", list(range(200)))
    assert e.value.filename == str(tmp_path / "a.json") and not list(tmp_path.iterdir())


def test_the_reason_of_a_full_disk_is_never_hidden(tmp_path):
    """numpy and safetensors raise errors that do not say why."""
    for error in (OSError("7 requested and 3 written"), ValueError("I/O error: no space left (os error 28)")):
        with pytest.raises(OSError) as e:
            with vq.atomic(tmp_path / "a"):
                raise error
        assert e.value.strerror == "No space left on device" and e.value.filename == str(tmp_path / "a")
    with pytest.raises(ValueError):
        with vq.atomic(tmp_path / "a"):
            raise ValueError("another one")
    assert not list(tmp_path.iterdir())


def test_damaged_parts_are_drawn_again(models, tmp_path, capsys, monkeypatch):
    """Of another shape, of another type, cut off, and no array at all: each is drawn again with a line."""
    monkeypatch.setattr(drawing, "NPZ_CHUNK", 2)
    command = (*models["classes"], "-n", 9)
    run(sample, *command, "--npz", tmp_path / "a.npz")
    parts = tmp_path / "b.npz.parts"
    real = drawing.merge_npz
    monkeypatch.setattr(drawing, "merge_npz", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit, match="130"):
        run(sample, *command, "--npz", tmp_path / "b.npz")
    monkeypatch.setattr(drawing, "merge_npz", real)
    capsys.readouterr()
    np.save(parts / "0000000.npy", np.zeros((2, 16, 16, 3)))
    np.save(parts / "0000001.npy", np.zeros((2, 8, 16, 3), np.uint8))
    whole = (parts / "0000002.npy").read_bytes()
    (parts / "0000002.npy").write_bytes(whole[:-1])
    (parts / "0000003.npy").write_bytes(b"junk")
    run(sample, *command, "--npz", tmp_path / "b.npz")
    said = capsys.readouterr().err
    assert all(f"{i:07d}.npy is damaged, or holds other pictures; they are drawn again" in said for i in range(4))
    assert "0000004.npy is" not in said
    assert np.array_equal(np.load(tmp_path / "b.npz")["arr_0"], np.load(tmp_path / "a.npz")["arr_0"])


# ----------------------------------------------------------------------------------------------------------------------
# Speed of a device


def test_half_precision_on_a_slow_cpu_is_measured_with_small_products(monkeypatch):
    """0.5 GFLOP/s, as measured on a CPU without half precision: a product of 1024 x 1024 would take 4 s."""
    spent = []

    def slow(product, device):
        n = len(product())
        spent.append(2 * n**3 / 0.5e9)
        return spent[-1], None
    monkeypatch.setattr(bench, "timed", slow)
    speed = bench.product_speed.__wrapped__
    assert speed(torch.device("cpu"), torch.float16) == pytest.approx(0.5e9)
    assert sum(spent) < 1
    spent.clear()
    speed(torch.device("cpu"), torch.float32)
    assert len(spent) == 10
