"""Training: exact resumption, broken files, fine-tuning, interruptions."""
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
from helpers import (BITS_CONFIG, ROOT, T5_CONFIG, VAR_CONFIG, captioned, complaint, log_rows, run, same, tiny_infinity,
                     tiny_single, tiny_tokenizer, weights)
from lib import recipes
from lib.caches import FeatureCache, TokenCache
from lib.data import Batches, CaptionedPictures, view
from lib.emoji import Emoji
from lib.pictures import read_picture, to_input
from lib.text import T5Encoder, load_infinity, load_llamagen, load_t5, save_t5

pytestmark = pytest.mark.usefixtures("tiny_configs")

VQ = ("vq", "--size", 16, "--batch-size", 4, "--device", "cpu", "--workers", 0, "--log-every", 1, "--lr", 1e-3,
      "--warm-steps", 2, "--ema", 0.9, "--restart-after", 1)
VAR = ("var", "--size", 16, "--batch-size", 4, "--device", "cpu", "--log-every", 1)


@pytest.mark.parametrize("extra", [(), ("--disc-weight", 0.5, "--disc-start", 3)], ids=["plain", "discriminator"])
def test_resumed_tokenizer_run_equals_an_uninterrupted_one(pictures, tmp_path, capsys, extra):
    argv = (*VQ, "--data", pictures, "--steps", 6, *extra)
    run(train, *argv, "--out", tmp_path / "whole")
    run(train, *argv, "--out", tmp_path / "parts", "--stop-after", 4)
    assert "stopped at step 4 of 6" in capsys.readouterr().out
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    run(train, *argv, "--out", tmp_path / "parts", "--resume", "auto")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    rows = log_rows(tmp_path / "parts")
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
    tokenizer, data = vq.load(files[1]), Emoji(16, "unseen")
    cache = TokenCache(data, tokenizer, (1, 2, 3, 4), 1, "cpu", tmp_path, "val")
    pixels, labels, _ = data.__getitems__([(3, None), (11, None)])
    tokens, cached_labels, _ = cache.__getitems__([(3, None), (11, None)])
    assert torch.equal(tokens, torch.cat(tokenizer.tokenize(to_input(pixels, "cpu")), 1))
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
    rows = log_rows(tmp_path / "a")
    assert float(rows[-1]["loss"]) < 0.8 * float(rows[0]["loss"])


@pytest.mark.slow
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
    assert list((tmp_path / "a" / "state").glob("0*")) and (tmp_path / "a" / "model.safetensors").exists()


@pytest.mark.slow
def test_two_processes_compute_what_one_does(pictures, files, tmp_path, monkeypatch):
    """torchrun with gloo: without dropping, the mean of two half batches' gradients is the whole batch's."""
    code = ("import sys; sys.path[:0] = [{0!r}, {0!r} + '/tests']; import helpers, train, var;"
            "from dataclasses import replace; from lib.console import run_command;"
            "var.CONFIGS['emoji_var'] = replace(helpers.VAR_CONFIG, class_drop=0.0, drop_path=0.0);"
            "run_command(train.train, train.parse_args(sys.argv[1:]))").format(str(ROOT))
    (tmp_path / "go.py").write_text(code)
    argv = [*map(str, VAR), "--data", str(pictures), "--vae", str(files[1]), "--steps", "3"]
    monkeypatch.setitem(var.CONFIGS, "emoji_var", replace(VAR_CONFIG, class_drop=0.0, drop_path=0.0))
    run(train, *argv, "--out", tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, tmp_path / "go.py", *argv, "--out", tmp_path / "two"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for k in one:
        torch.testing.assert_close(one[k], two[k], atol=1e-5, rtol=1e-4)    # sums in another order


BITS = ("vq", "--recipe", "infinity_emoji", "--size", 16, "--batch-size", 4, "--device", "cpu", "--log-every", 1)
INFINITY = ("infinity", "--size", 16, "--batch-size", 4, "--device", "cpu", "--log-every", 1)


@pytest.mark.slow
def test_bitwise_runs_resume_and_their_files_draw(text_files, tmp_path, capsys):
    """Tokenizer, then a transformer with its text encoder: uninterrupted equals resumed, and sample.py takes both."""
    run(train, *BITS, "--steps", 3, "--out", tmp_path / "vq")
    vae = tmp_path / "vq" / "model.safetensors"
    arguments = (*INFINITY, "--vae", vae, "--steps", 4)
    run(train, *arguments, "--out", tmp_path / "whole")
    run(train, *arguments, "--out", tmp_path / "parts", "--stop-after", 2)
    run(train, *arguments, "--out", tmp_path / "parts", "--resume", "auto")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    start = load_infinity(tmp_path / "parts" / "model.safetensors").text_encoder
    assert start is not None and start.config == T5_CONFIG
    run(sample, "infinity", "--ckpt", tmp_path / "whole" / "model.safetensors", "--vae", vae, "--out",
        tmp_path / "a.png", "--prompt", "a cat")
    row = log_rows(tmp_path / "whole")[-1]
    assert 0.4 < float(row["bit_accuracy"]) < 1 and len(row["scale_accuracy"].split()) == 3 and row["val_loss"]


def test_captioned_pictures_come_in_buckets(tmp_path, capsys):
    data = CaptionedPictures(captioned(tmp_path / "data"), "0.06M", split=False)
    assert "skipped 2 broken of 26 lines" in capsys.readouterr().out
    assert data.aspects == [1.0, 1.5] and [len(g) for g in data.groups] == [12, 12]
    batches = iter(Batches(data.groups, 4, seed=0))
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
    line = '{"image_path": "data/1.png", "h_div_w": 1, "long_caption": "long", "text": "s"}'
    (tmp_path / "1.0_2.jsonl").write_text(line)
    both = CaptionedPictures(tmp_path / "1.0_2.jsonl", "0.06M")
    assert {both.caption(0, (s,)) for s in range(20)} == {"long", "s"}
    (tmp_path / "llamagen.jsonl").write_text('{"image_path": "data/1.png", "text": ["A cat. It sleeps.", "other"]}')
    squares = CaptionedPictures(tmp_path / "llamagen.jsonl", size=32)
    assert {squares.caption(0, (s,)) for s in range(20)} == set(squares.captions(0)) == {"A cat. It sleeps.", "A cat"}


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
    vq.save(tiny_tokenizer(), folder / "codes.safetensors")
    return folder / "codes.safetensors"


# ----------------------------------------------------------------------------------------------------------------------
# LlamaGen

SINGLE = ("vq", "--recipe", "llamagen_emoji", "--size", 16, "--batch-size", 4, "--device", "cpu", "--log-every", 1)
TOKENS = ("llamagen", "--size", 16, "--batch-size", 4, "--device", "cpu", "--log-every", 1)


def test_single_scale_tokenizer_runs_resume(pictures, tmp_path):
    argv = (*SINGLE, "--data", pictures, "--workers", 0, "--steps", 5, "--warm-steps", 2, "--restart-after", 1,
            "--disc-weight", 0.5, "--disc-start", 3, "--gan", "non-saturating")
    run(train, *argv, "--out", tmp_path / "whole")
    run(train, *argv, "--out", tmp_path / "parts", "--stop-after", 3)
    run(train, *argv, "--out", tmp_path / "parts", "--resume", "auto")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    row = log_rows(tmp_path / "whole")[-1]
    assert float(row["disc"]) > 0 and 0 < float(row["usage"]) <= 100
    run(train, *SINGLE, "--data", pictures, "--workers", 0, "--steps", 1, "--lr", 0, "--warm-steps", 0, "--init",
        tmp_path / "whole" / "model.safetensors", "--out", tmp_path / "tuned")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "tuned"))


@pytest.mark.slow
def test_class_runs_resume_and_draw(pictures, token_files, tmp_path, capsys):
    argv = (*TOKENS, "--data", pictures, "--vq", token_files[1], "--steps", 4, "--cache-crops", "ten", "--ema", 0.5)
    run(train, *argv, "--out", tmp_path / "whole")
    assert "740 pictures, 2 classes" in capsys.readouterr().out             # 37 readable ones, twenty crops each
    run(train, *argv, "--out", tmp_path / "parts", "--stop-after", 2)
    run(train, *argv, "--out", tmp_path / "parts", "--resume", "auto")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    run(sample, "llamagen", "--ckpt", tmp_path / "parts" / "model.safetensors", "--vq", token_files[1], "--classes",
        "square", "--out", tmp_path / "a.png", "--device", "cpu")
    run(train, *TOKENS, "--vq", token_files[1], "--init", token_files[2], "--steps", 1, "--lr", 0, "--out",
        tmp_path / "b")
    tuned, start = weights(tmp_path / "b"), load_file(token_files[2])
    assert torch.equal(tuned["output.weight"], start["output.weight"])
    assert len(tuned["cls_embedding.embedding_table.weight"]) == 576
    assert "1 weights start from scratch: class_embed.weight" in capsys.readouterr().out


def test_text_runs_train_their_encoder_along(token_files, tmp_path, capsys):
    argv = (*TOKENS, "--recipe", "emoji_text", "--vq", token_files[1], "--data", captioned(tmp_path / "data"),
            "--steps", 4, "--init", token_files[2])
    run(train, *argv, "--out", tmp_path / "whole")
    assert "weights start from scratch" in capsys.readouterr().out                  # what concerns the text
    run(train, *argv, "--out", tmp_path / "parts", "--stop-after", 2)
    run(train, *argv, "--out", tmp_path / "parts", "--resume", "auto")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    once, more = (load_llamagen(tmp_path / name).text_encoder for name in ("whole/model.safetensors",) * 2)
    assert once.config == T5_CONFIG and torch.equal(once.embed.weight, more.embed.weight)
    reader = T5Encoder(T5_CONFIG)
    reader.init_weights(torch.Generator().manual_seed(5))
    save_t5(reader, tmp_path / "t5.safetensors")
    run(train, *argv[:-4], "--steps", 1, "--lr", 0, "--ema", 0, "--init-text", tmp_path / "t5.safetensors", "--out",
        tmp_path / "c")
    assert same(load_llamagen(tmp_path / "c" / "model.safetensors").text_encoder.state_dict(), reader.state_dict())
    run(sample, "llamagen", "--ckpt", tmp_path / "whole" / "model.safetensors", "--vq", token_files[1], "--prompt",
        "red heart", "--out", tmp_path / "a.png", "--device", "cpu")


def test_a_text_encoder_that_has_learnt_words(tmp_path):
    argv = ("t5", "--steps", 4, "--device", "cpu", "--workers", 0)
    run(train, *argv, "--out", tmp_path / "whole")
    run(train, *argv, "--out", tmp_path / "parts", "--stop-after", 2)
    run(train, *argv, "--out", tmp_path / "parts", "--resume", "auto")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    features, _ = load_t5(tmp_path / "whole" / "model.safetensors", 128).encode(["red heart"])
    assert features.shape == (1, 10, 128)                                   # the tiny network reads bytes


def tiny_t5(folder):
    """A T5 on bytes with the names of transformers, as --t5 takes it."""
    t5 = T5Encoder(T5_CONFIG)
    t5.init_weights(torch.Generator().manual_seed(0))
    folder.mkdir()
    torch.save(vq.rename_keys(t5.state_dict(), T5Encoder.RENAMES, inverse=True), folder / "pytorch_model.bin")
    return folder


def test_features_of_a_frozen_encoder_are_computed_once(token_files, tmp_path, capsys, monkeypatch):
    t5, folder = tiny_t5(tmp_path / "t5"), captioned(tmp_path / "data")
    recipe = recipes.derive(recipes.RECIPES["llamagen"]["emoji_text"], text_width=128)
    monkeypatch.setitem(recipes.RECIPES["llamagen"], "emoji_text", recipe)
    argv = (*TOKENS, "--recipe", "emoji_text", "--vq", token_files[1], "--steps", 3, "--t5", t5, "--data", folder,
            "--no-clean")
    run(train, *argv, "--out", tmp_path / "a", "--stop-after", 1)
    caches = sorted((tmp_path / "a").glob("text_*.safetensors"))
    assert len(caches) == 1 and "text_encoder.embed.weight" not in weights(tmp_path / "a")
    monkeypatch.setattr("lib.caches.encode_texts", None)                       # it is not asked again
    run(train, *argv, "--out", tmp_path / "a", "--resume", "auto")
    cached = FeatureCache(sorted({f"picture {i}{end}" for i in range(24) for end in ("", ". It is noise. --ar 1")}),
                                load_t5(t5), 6, False, tmp_path / "a")
    expected = load_t5(t5).encode(["picture 3"], 6)[0][0]
    torch.testing.assert_close(cached["picture 3"], expected, atol=2e-3, rtol=2e-3)
    assert "done at step 3" in capsys.readouterr().out


def test_crops_are_those_of_torchvision(tmp_path):
    from torchvision.transforms import TenCrop
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8))
    for start, factor in ((0, 1.1), (10, 1.05)):
        side = int(32 * factor)
        halved = picture.resize((45, 35), Image.BOX) if 70 >= 2 * side else picture
        ratio = side / min(halved.size)
        large = halved.resize([round(s * ratio) for s in halved.size], Image.BICUBIC)
        x, y = ((s - side) // 2 for s in large.size)
        for i, expected in enumerate(TenCrop(32)(large.crop((x, y, x + side, y + side)))):
            assert view(picture, 32, "ten", start + i).tobytes() == expected.tobytes(), (start, i)
    straight, flipped = (np.asarray(view(picture, 32, "flip", i)) for i in (0, 1))
    assert np.array_equal(straight, flipped[:, ::-1])


def test_llamagen_mistakes(token_files, files, tmp_path, capsys):
    say = lambda *argv: complaint(capsys, train, *TOKENS, "--out", tmp_path / "a", *argv)
    assert "has tokens of several scales" in say("--vq", files[1])
    assert "--size 18: expected a multiple of 4, the stride" in say("--vq", token_files[1], "--size", 18)
    assert "--cache-crops many: expected a number" in say("--vq", token_files[1], "--cache-crops", "many")
    assert "--cache-crops ten: expected a number" in say("--vq", token_files[1], "--cache-crops", "ten")     # of emoji
    assert "--dropout 1.0: expected 0 .. 0.9" in say("--vq", token_files[1], "--dropout", 1)
    assert "not a LlamaGen transformer" in say("--vq", token_files[1], "--init", token_files[1])
    infinity.save(tiny_infinity(t5=None), tmp_path / "i.safetensors")
    text = ("--vq", token_files[1], "--recipe", "emoji_text", "--init-text", tmp_path / "i.safetensors")
    assert "i.safetensors: not a T5" in say(*text)
    assert "give one of them" in say(*text, "--t5", "t5")
    assert "this run trains no text encoder" in say(*text[:2], *text[4:])
    other = tiny_single()
    torch.nn.init.normal_(other.quantize.codebook)
    vq.save(other, tmp_path / "other.safetensors")
    assert "is not the tokenizer that" in say("--vq", tmp_path / "other.safetensors", "--init", token_files[2])


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
    assert "--accum 0: expected 1 .. 1000000" in say(*VQ, "--accum", 0)
    assert "not an image tokenizer" in say(*VAR, "--vae", files[2])
    assert "no finite gradient in 3 steps in a row" in say(*VQ, "--l1", 1e9, "--l2", 1e9, "--lr", 10, "--steps", 99,
                                                           "--clip", 1e9, "--max-skipped", 3)
    assert "--out /proc/nowhere: cannot be written" in complaint(capsys, train, *VQ, "--out", "/proc/nowhere")


def test_batches_cover_every_epoch_and_continue_anywhere():
    take = lambda n, **kw: [b for b, _ in zip(Batches([np.arange(10)], 4, 0, **kw), range(n))]
    epoch = [i for batch in take(3) for i, _ in batch]
    assert sorted(epoch[:10]) == list(range(10)) and epoch[10:] == epoch[:2]
    assert take(4, first=2) == take(6)[2:]
    ranks = [take(2, micro_batches=2, rank=r, world=2) for r in (0, 1)]
    assert [a + b for a, b in zip(*ranks)] == take(2)
    assert [a + b for a, b in zip(*[iter(take(4, micro_batches=2))] * 2)] == take(2)
    ranks = [take(4, micro_batches=4, rank=r, world=2) for r in (0, 1)]             # two parts each, in turn
    assert [part for pair in zip(*ranks) for part in pair] == take(8, micro_batches=4)


def test_pictures_of_every_kind_are_read_as_a_person_sees_them(tmp_path):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "16bit.png")
    assert np.abs(np.asarray(read_picture(tmp_path / "16bit.png"))[..., 0].astype(int) - ramp // 257).max() <= 1
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(read_picture(tmp_path / "clear.png")).min() == 255         # transparent: white
    turned = Image.new("RGB", (8, 4), "red")
    exif = turned.getexif()
    exif[0x0112] = 6                                                        # hold the camera upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (4, 8)
    for mode in ("L", "P", "CMYK", "1"):
        Image.new(mode, (8, 8)).save(tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    assert all(read_picture(p).mode == "RGB" for p in tmp_path.iterdir())
