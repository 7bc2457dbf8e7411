"""Training: exact resumption, broken files, fine-tuning, interruptions."""
import csv
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import infinity
import sample
import train
import var
import vq
from conftest import BITS_CONFIG, INFINITY_CONFIG, ROOT, T5_CONFIG, VAR_CONFIG, VQ_CONFIG
from test_cli import complaint, run


@pytest.fixture(autouse=True)
def tiny_configs(monkeypatch):
    monkeypatch.setitem(vq.CONFIGS, "emoji_vq", VQ_CONFIG)
    monkeypatch.setitem(var.CONFIGS, "emoji_var", VAR_CONFIG)
    monkeypatch.setitem(vq.CONFIGS, "emoji_bsq", BITS_CONFIG)
    monkeypatch.setitem(infinity.CONFIGS, "emoji_infinity", INFINITY_CONFIG)
    monkeypatch.setattr(infinity, "BYTE_T5", T5_CONFIG)
    monkeypatch.setattr(vq, "PatchDiscriminator", partial(vq.PatchDiscriminator, width=8, num_layers=1))


@pytest.fixture
def pictures(tmp_path):
    """40 pictures in two classes, one of them broken."""
    rng = np.random.default_rng(0)
    for c in ("circle", "square"):
        (tmp_path / "data" / c).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(tmp_path / "data" / c / f"{i:02d}.png")
    (tmp_path / "data" / "circle" / "07.png").write_bytes(b"broken")
    return tmp_path / "data"


VQ = ("vq", "--size", 16, "--batch-size", 4, "--device", "cpu", "--workers", 0, "--log-every", 1, "--lr", 1e-3,
      "--warm-steps", 2, "--ema", 0.9, "--restart-after", 1)
VAR = ("var", "--size", 16, "--batch-size", 4, "--device", "cpu", "--log-every", 1)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("extra", [(), ("--disc-weight", 0.5, "--disc-start", 3)], ids=["plain", "discriminator"])
def test_resumed_tokenizer_run_equals_an_uninterrupted_one(pictures, tmp_path, capsys, extra):
    argv = (*VQ, "--data", pictures, "--steps", 6, *extra)
    run(train, *argv, "--out", tmp_path / "whole")
    run(train, *argv, "--out", tmp_path / "parts", "--stop-after", 4)
    assert "stopped at step 4 of 6" in capsys.readouterr().out
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    run(train, *argv, "--out", tmp_path / "parts", "--resume", "auto")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    rows = list(csv.DictReader(open(tmp_path / "parts" / "log.csv")))
    assert [int(r["step"]) for r in rows] == [1, 2, 3, 4, 5, 6] and rows[-1]["val_psnr"]
    assert len(list((tmp_path / "parts" / "samples").iterdir())) == 2
    other = complaint(capsys, train, *argv, "--out", tmp_path / "parts", "--resume", "auto", "--lr", 1e-4)
    assert "is of another run (lr was 0.001, now 0.0001); give the same flags" in other
    again = complaint(capsys, train, *argv, "--out", tmp_path / "parts")
    assert "it holds a run already; continue it with --resume auto" in again


def test_resumed_var_run_equals_an_uninterrupted_one(pictures, files, tmp_path, capsys):
    argv = (*VAR, "--data", pictures, "--vae", files[1], "--steps", 5, "--accum", 2, "--ema", 0.5, "--cache-crops", 2)
    run(train, *argv, "--out", tmp_path / "whole")
    said = capsys.readouterr()
    assert "skipped 1 unreadable of 38 pictures: " in said.err + said.out and "circle/07.png" in said.err + said.out
    assert "74 pictures, 2 classes" in said.out                             # two crops of each readable one
    run(train, *argv, "--out", tmp_path / "parts", "--stop-after", 2)
    run(train, *argv, "--out", tmp_path / "parts", "--resume", "auto")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    run(sample, "var", "--ckpt", tmp_path / "parts" / "model.safetensors", "--vae", files[1], "--classes", "square",
        "--out", tmp_path / "a.png", "--device", "cpu")


def test_training_on_pictures_without_a_cache_skips_the_broken_one(pictures, files, tmp_path, capsys):
    argv = (*VAR, "--data", pictures, "--vae", files[1], "--steps", 12, "--cache-crops", 0, "--workers", 0)
    run(train, *argv, "--out", tmp_path / "a")
    assert "skipped 1 unreadable of 38 pictures: " in capsys.readouterr().out


def test_cached_tokens_are_those_of_the_pictures(files, tmp_path):
    tokenizer, data = vq.load(files[1]), train.EmojiSheet(16, train=False)
    cache = train.TokenCache(data, tokenizer, (1, 2, 3, 4), 1, "cpu", tmp_path, "val")
    pixels, labels, _ = data.__getitems__([(3, None), (11, None)])
    tokens, cached_labels, _ = cache.__getitems__([(3, None), (11, None)])
    assert torch.equal(tokens, torch.cat(tokenizer.tokenize(sample.to_input(pixels, "cpu")), 1))
    assert torch.equal(labels, cached_labels)


def test_fine_tuning_starts_from_the_given_weights(pictures, files, tmp_path):
    argv = (*VAR, "--data", pictures, "--vae", files[1], "--init", files[2], "--steps", 1, "--lr", 0)
    run(train, *argv, "--out", tmp_path / "a")
    tuned, start = weights(tmp_path / "a"), load_file(files[2])
    assert torch.equal(tuned["head.weight"], start["head.weight"])
    assert tuned["class_emb.weight"].shape[0] == 3
    assert torch.equal(tuned["class_emb.weight"][-1], start["class_emb.weight"][-1])


def test_loss_goes_down(files, tmp_path, capsys):
    run(train, *VAR, "--vae", files[1], "--steps", 40, "--lr", 3e-3, "--batch-size", 32, "--out", tmp_path / "a")
    rows = list(csv.DictReader(open(tmp_path / "a" / "log.csv")))
    assert float(rows[-1]["loss"]) < 0.8 * float(rows[0]["loss"])


def test_ctrl_c_saves_the_run(tmp_path):
    argv = ["train.py", "vq", "--out", str(tmp_path / "a"), "--batch-size", "2", "--device", "cpu", "--log-every", "1"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, **pipes)
    log = tmp_path / "a" / "log.csv"
    deadline = time.time() + 120
    while time.time() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 2):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert "interrupted at step" in out and "go on with --resume auto" in out
    assert (tmp_path / "a" / "state.pt").exists() and (tmp_path / "a" / "model.safetensors").exists()


def test_two_processes_compute_what_one_does(pictures, files, tmp_path):
    """torchrun with gloo: without dropping, the mean of two half batches' gradients is the whole batch's."""
    code = ("import sys; sys.path[:0] = [{0!r}, {0!r} + '/tests']; import conftest, train, sample, var;"
            "from dataclasses import replace;"
            "var.CONFIGS['emoji_var'] = replace(conftest.VAR_CONFIG, class_drop=0.0, drop_path=0.0);"
            "sample.guarded(train.train, train.parse_args(sys.argv[1:]))").format(str(ROOT))
    (tmp_path / "go.py").write_text(code)
    argv = [*map(str, VAR), "--data", str(pictures), "--vae", str(files[1]), "--steps", "3"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in (("one", []), ("two", torchrun)):
        command = [sys.executable, *launcher, str(tmp_path / "go.py"), *argv, "--out", str(tmp_path / name)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for k in one:
        torch.testing.assert_close(one[k], two[k], atol=1e-5, rtol=1e-4)    # sums in another order


BITS = ("vq", "--recipe", "infinity_emoji", "--size", 16, "--batch-size", 4, "--device", "cpu", "--log-every", 1)
INFINITY = ("infinity", "--size", 16, "--batch-size", 4, "--device", "cpu", "--log-every", 1)


def test_bitwise_runs_resume_and_their_files_draw(text_files, tmp_path, capsys):
    """Tokenizer, then a transformer with its text encoder on it: uninterrupted equals resumed, and sample.py takes both."""
    run(train, *BITS, "--steps", 3, "--out", tmp_path / "vq")
    vae = tmp_path / "vq" / "model.safetensors"
    arguments = (*INFINITY, "--vae", vae, "--steps", 4)
    run(train, *arguments, "--out", tmp_path / "whole")
    run(train, *arguments, "--out", tmp_path / "parts", "--stop-after", 2)
    run(train, *arguments, "--out", tmp_path / "parts", "--resume", "auto")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    start = infinity.load(tmp_path / "parts" / "model.safetensors").text_encoder
    assert start is not None and start.config == T5_CONFIG
    run(sample, "infinity", "--ckpt", tmp_path / "whole" / "model.safetensors", "--vae", vae, "--out", tmp_path / "a.png",
        "--prompt", "a cat")
    row = list(csv.DictReader(open(tmp_path / "whole" / "log.csv")))[-1]
    assert 0.4 < float(row["bit_accuracy"]) < 1 and len(row["scale_accuracy"].split()) == 3 and row["val_loss"]


def captioned(folder):
    """Pictures of two aspect ratios with captions, one of them unreadable, and two broken lines."""
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for i in range(24):
        size = (40, 40, 3) if i % 2 else (60, 40, 3)
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(f"{i}.png\tpicture {i}. It is noise. --ar 1")
    (folder / "9.png").write_bytes((folder / "9.png").read_bytes()[:60])
    (folder / "a.tsv").write_text("\n".join([*lines, "no tab here", "gone.png\tgone"]))
    return folder


def test_captioned_pictures_come_in_buckets(tmp_path, capsys):
    data = train.CaptionedPictures(captioned(tmp_path / "data"), "0.06M", split=False)
    assert "skipped 2 broken of 26 lines" in capsys.readouterr().out
    assert data.aspects == [1.0, 1.5] and [len(g) for g in data.groups] == [12, 12]
    batches = iter(train.Batches(data.groups, 4, seed=0))
    seen, shapes = set(), set()
    for _ in range(6):
        items = next(batches)
        pixels, captions, broken = data.__getitems__(items)
        shapes.add(tuple(pixels.shape))
        seen |= {i for i, _ in items}
        assert all(c.startswith("picture") and "--" not in c for c in captions)
        assert all(path.endswith("9.png") for path in broken)
    assert seen == set(range(24)) and shapes == {(4, 3, 256, 256), (4, 3, 336, 224)}
    assert data.caption(3, None) == "picture 3. It is noise." and len({data.caption(3, (s,)) for s in range(20)}) > 1
    (tmp_path / "1.0_2.jsonl").write_text('{"image_path": "data/1.png", "h_div_w": 1, "long_caption": "long", "text": "s"}')
    both = train.CaptionedPictures(tmp_path / "1.0_2.jsonl", "0.06M")
    assert {both.caption(0, (s,)) for s in range(20)} == {"long", "s"}


def test_training_on_captions_and_its_mistakes(text_files, tmp_path, capsys, monkeypatch):
    folder = captioned(tmp_path / "data")
    monkeypatch.setattr(vq, "PIXELS", {"0.06M": 3})                         # three scales: tiny pictures
    vae = tmp_path / "d6.safetensors"                                       # stride 16, as of all released ones
    tokenizer = vq.VQVAE(replace(BITS_CONFIG, ch_mult=(1, 1, 1, 1, 1)))
    tokenizer.init_weights()
    vq.save(tokenizer, vae)
    arguments = (*INFINITY, "--vae", vae, "--steps", 2, "--pixels", "0.06M", "--workers", 0)
    run(train, *arguments, "--data", folder, "--out", tmp_path / "run", "--reweight", "--scales", 2)
    assert "done at step 2" in capsys.readouterr().out
    wrong = partial(complaint, capsys, train, *INFINITY)
    assert "tokens of codes" in wrong("--vae", vae_of_codes(tmp_path), "--out", tmp_path / "x")
    assert "--pixels 3M: choose" in wrong("--vae", vae, "--pixels", "3M", "--out", tmp_path / "x")
    assert "expected a folder with .tsv" in wrong("--vae", vae, "--pixels", "0.06M", "--data", tmp_path / "none")
    (tmp_path / "bad.tsv").write_text("nothing\n")
    assert "not one of 1 lines" in wrong("--vae", vae, "--pixels", "0.06M", "--data", tmp_path / "bad.tsv")
    assert "give the size of pictures as --pixels" in wrong("--vae", vae, "--data", folder)


def vae_of_codes(folder):
    from conftest import tiny_tokenizer
    vq.save(tiny_tokenizer(), folder / "codes.safetensors")
    return folder / "codes.safetensors"


def test_mistakes(pictures, files, tmp_path, capsys):
    say = lambda *argv: complaint(capsys, train, *argv, "--out", tmp_path / "a")
    assert "--data nowhere: no such folder" in say(*VQ, "--data", "nowhere")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    assert "no pictures in it; expected" in say(*VQ, "--data", tmp_path / "empty")
    assert "--size 20: recipe emoji has stride 4 and ends with a 4x4 map; use --size 16" in say(*VQ, "--size", 20)
    assert "not divisible by --accum 3" in say(*VQ, "--accum", 3)
    assert "--schedule fast: choose lin" in say(*VQ, "--schedule", "fast", "--steps", 9)
    assert "needs both: --lpips VGG16 HEADS" in say(*VQ, "--lpips-weight", 1)
    assert "--log-every -1: expected at least 0" in say(*VQ, "--log-every", -1)
    assert "--accum 0: expected at least 1" in say(*VQ, "--accum", 0)
    assert "not an image tokenizer" in say(*VAR, "--vae", files[2])
    assert "the loss is" in say(*VQ, "--lr", 1e30, "--steps", 9, "--clip", 1e30)
    assert "--out /proc/nowhere: cannot be written" in complaint(capsys, train, *VQ, "--out", "/proc/nowhere")


def test_batches_cover_every_epoch_and_continue_anywhere():
    take = lambda n, **kw: [b for b, _ in zip(train.Batches([np.arange(10)], 4, 0, **kw), range(n))]
    epoch = [i for batch in take(3) for i, _ in batch]
    assert sorted(epoch[:10]) == list(range(10)) and epoch[10:] == epoch[:2]
    assert take(4, first=2) == take(6)[2:]
    ranks = [take(2, rank=r, world=2) for r in (0, 1)]
    assert [a + b for a, b in zip(*ranks)] == take(2)
    assert [a + b for a, b in zip(*[iter(take(4, accum=2))] * 2)] == take(2)


def test_pictures_of_every_kind_are_read_as_a_person_sees_them(tmp_path):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "16bit.png")
    assert np.abs(np.asarray(sample.open_picture(tmp_path / "16bit.png"))[..., 0].astype(int) - ramp // 257).max() <= 1
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(sample.open_picture(tmp_path / "clear.png")).min() == 255         # transparent: white
    turned = Image.new("RGB", (8, 4), "red")
    exif = turned.getexif()
    exif[0x0112] = 6                                                        # hold the camera upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert sample.open_picture(tmp_path / "turned.jpg").size == (4, 8)
    for mode in ("L", "P", "CMYK", "1"):
        Image.new(mode, (8, 8)).save(tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    assert all(sample.open_picture(p).mode == "RGB" for p in tmp_path.iterdir())
