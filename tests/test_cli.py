"""The scripts, as users run them: what works, and what is said when it does not."""
import http.server
import json
import os
import shutil
import sys
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import infinity
import llamagen
import sample
import triton_ops
import var
import vq
from helpers import (ROOT, complaint, info, run, script, tiny_bits, tiny_infinity, tiny_llamagen, tiny_single,
                     tiny_tokenizer, tiny_var)
from lib import bench, bench_ops, data, drawing


@pytest.fixture
def tiny(files, tmp_path):
    """The arguments that name the tiny model, and an empty folder to write to."""
    return ("--ckpt", files[2], "--device", "cpu"), tmp_path


@pytest.fixture
def tokens(token_files, tmp_path):
    """The arguments that name the tiny LlamaGens of classes and of text, and an empty folder to write to."""
    arguments = lambda file: ("llamagen", "--ckpt", file, "--device", "cpu")
    return arguments(token_files[2]), arguments(token_files[3]), tmp_path


@pytest.fixture
def prompts(text_files, tmp_path):
    """The arguments that name the tiny text-to-image model, and an empty folder to write to."""
    return ("infinity", "--ckpt", text_files[2], "--device", "cpu"), tmp_path


# ----------------------------------------------------------------------------------------------------------------------
# What works


@pytest.mark.slow
def test_first_command_of_the_readme(tmp_path):
    """No arguments: a grid from the checkpoint in the repository."""
    result = script(ROOT / "sample.py", "var", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "fp32 (half precision is slow on a CPU)" in result.stdout and "out/var.png" in result.stdout
    picture = Image.open(tmp_path / "out" / "var.png")
    assert picture.size == (8 * 130 - 2, 2 * 130 - 2)
    assert picture.text["checkpoint"] == "emoji_var.safetensors" and picture.text["seed"] == "0"
    assert np.asarray(picture.convert("L")).std() > 20


@pytest.mark.parametrize("argv", [["sample.py"], ["sample.py", "var"], ["train.py", "vq"]], ids=" ".join)
def test_help_comes_before_the_heavy_imports(argv):
    """-X importtime lists what was imported."""
    result = script("-X", "importtime", *argv, "--help")
    assert result.returncode == 0 and "usage" not in result.stderr and len(result.stdout) > 200
    assert "torch" not in result.stderr and "numpy" not in result.stderr


def test_pictures_do_not_depend_on_the_batch_size(tiny, capsys):
    argv, out = tiny
    for size in (1, 3):
        run(sample, "var", *argv, "-n", 4, "--batch-size", size, "--out", out / f"by{size}")
    names = [f"{i:05d}.png" for i in range(4)]
    assert sorted(p.name for p in (out / "by1").iterdir()) == names
    for name in names:
        one, three = (np.asarray(Image.open(out / f"by{size}" / name)) for size in (1, 3))
        assert np.abs(one.astype(int) - three).max() <= 1                   # float rounding before truncation to uint8
    text = Image.open(out / "by1" / "00002.png").text
    assert text["seed"] == "2" and text["class"] in ("cat", "dog", "owl", "fox", "bee") and text["cfg"] == "4.0"


def test_classes_by_name_filmstrip_and_editing(tiny, capsys):
    argv, out = tiny
    run(sample, "var", *argv, "--classes", "owl", "1", "--steps-grid", "--out", out / "strip.png")
    strip = Image.open(out / "strip.png")
    assert strip.text["classes"] == "owl, dog" and strip.width == 4 * 130 - 2
    Image.new("RGBA", (40, 30), (255, 0, 0, 128)).save(out / "given.png")
    for edit in (["in"], ["out"], ["class", "--classes", "fox"]):
        run(sample, "var", *argv, "-n", 2, "--image", out / "given.png", "--edit", *edit, "--out", out / "edit.png")
        assert Image.open(out / "edit.png").width == 4 * 130 - 2            # given, kept, two samples
    run(sample, "var", *argv, "--list-classes")
    assert "   2  owl" in capsys.readouterr().out


def test_prompts_draw_their_own_pictures_whatever_the_batch(prompts, capsys):
    """One file per picture, numbered, with what it was made from; a second run draws nothing anew."""
    arguments, out = prompts
    (out / "prompts.txt").write_text("a cat\n\na dog with a long name\nfox\n")
    options = (*arguments, "--prompts", out / "prompts.txt", "-n", 2)
    run(sample, *options, "--out", out / "a", "--batch-size", 4)
    run(sample, *options, "--out", out / "b", "--batch-size", 1)
    names = sorted(p.name for p in (out / "a").iterdir())
    assert names == [f"{i:05d}_{n:02d}.png" for i in range(3) for n in range(2)]
    pixels = lambda folder: np.stack([np.array(Image.open(out / folder / name)).astype(int) for name in names])
    assert abs(pixels("a") - pixels("b")).max() <= 1                        # products of other shapes round otherwise
    size, text = info(out / "a" / "00001_01.png")
    assert size == (16, 16)
    assert text["prompt"] == "a dog with a long name"
    assert text["seed"] == "3"
    assert text["tau"] == "1.0"
    (out / "a" / names[0]).unlink()
    (out / "a" / names[1]).write_bytes(b"cut off")
    times = {name: (out / "a" / name).stat().st_mtime_ns for name in names[2:]}
    run(sample, *options, "--out", out / "a")
    assert abs(pixels("a") - pixels("b")).max() <= 1
    assert times == {name: (out / "a" / name).stat().st_mtime_ns for name in names[2:]}
    assert "6 files in" in capsys.readouterr().out


def test_geneval_folders_features_and_other_ways_to_draw(prompts, capsys):
    arguments, out = prompts
    (out / "geneval.jsonl").write_text('{"tag": "x", "prompt": "a cat"}\n{"prompt": "a man"}\n')
    run(sample, *arguments, "--prompts", out / "geneval.jsonl", "--out", out / "g", "--face-suffix")
    assert json.loads((out / "g" / "00000" / "metadata.jsonl").read_text())["tag"] == "x"
    assert info(out / "g" / "00000" / "samples" / "0000.png")[1]["prompt"] == "a cat"
    assert info(out / "g" / "00001" / "samples" / "0000.png")[1]["prompt"].endswith("perfect facial features")
    run(sample, *arguments, "--save-features", out / "f.safetensors", "--prompt", "a cat", "fox")
    run(sample, *arguments, "--features", out / "f.safetensors", "--prompt", "fox", "--out", out / "f.png")
    run(sample, *arguments, "--prompt", "fox", "--out", out / "fox.png")
    assert abs(np.array(Image.open(out / "f.png")).astype(int) - np.array(Image.open(out / "fox.png"))).max() <= 40
    said = complaint(capsys, sample, *arguments, "--features", out / "f.safetensors", "--prompt", "owl")
    assert "lacks 'owl'" in said
    run(sample, *arguments, "--out", out / "show.png")                      # the checkpoint's own prompts
    assert info(out / "show.png")[1]["prompts"] == "a cat, a red dog"
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(out / "in.png")
    ways = {"steps": ["--steps-grid"], "negative": ["--negative", "a dog"], "tiles": ["--tile", 16],
            "given": ["--image", out / "in.png", "--keep", 2], "scales": ["--cfg", 1, 2, 3, "--tau", 2, 1, 1],
            "features": ["--guide-features", -1], "original": ["--one-generator"]}
    for name, more in ways.items():
        run(sample, *arguments, "--prompt", "fox", "--out", out / f"{name}.png", *more)
    strip = {name: np.array(Image.open(out / f"{name}.png")) for name in ("steps", "negative", "tiles", "fox", "given")}
    assert strip["steps"].shape[1] == 3 * 128 + 2 * 2 and np.array_equal(strip["tiles"], strip["fox"])
    assert not np.array_equal(strip["negative"], strip["fox"]) and not np.array_equal(strip["given"], strip["fox"])


def test_llamagen_draws_classes_and_prompts_whatever_the_batch(tokens, capsys, monkeypatch):
    """Another guidance for each picture; what it was made from stands in the file."""
    classes, text, out = tokens
    options = (*classes, "--classes", "owl", 1, "--cfg", 1, 5, "-n", 4)
    run(sample, *options, "--out", out / "a", "--batch-size", 3)
    run(sample, *options, "--out", out / "b", "--batch-size", 1)
    pixels = lambda name: np.array(Image.open(out / name)).astype(int)
    for i in range(4):
        assert abs(pixels(f"a/{i:05d}.png") - pixels(f"b/{i:05d}.png")).max() <= 1
    size, said = info(out / "a" / "00003.png")
    assert size == (16, 16) and (said["class"], said["seed"], said["cfg"]) == ("dog", "3", "5.0")
    run(sample, *classes, "--classes", 1, "--cfg", 5, "--seed", 3, "--out", out / "c")
    assert abs(pixels("a/00003.png") - pixels("c/00000.png")).max() <= 1
    run(sample, *classes, "--steps-grid", "-n", 2, "--out", out / "steps.png")
    assert pixels("steps.png").shape[1] == 8 * 128 + 7 * 2
    run(sample, *classes, "-n", 5, "--eval-size", 8, "--npz", out / "a.npz", "--cfg-interval", 3, "--temperature", 0)
    assert np.load(out / "a.npz")["arr_0"].shape == (5, 8, 8, 3)
    run(sample, *classes, "--list-classes")
    assert "   2  owl" in capsys.readouterr().out
    (out / "prompts.txt").write_text("a cat\na dog with a long name that goes on\n")
    run(sample, *text, "--prompts", out / "prompts.txt", "--out", out / "p", "-n", 2)
    assert sorted(p.name for p in (out / "p").iterdir()) == [f"0000{i}_0{n}.png" for i in (0, 1) for n in (0, 1)]
    assert "only the first 6 tokens are read of: a dog with a long" in capsys.readouterr().err
    run(sample, *text, "--save-features", out / "f.safetensors", "--prompt", "a cat")
    run(sample, *text, "--features", out / "f.safetensors", "--out", out / "f", "--seed", 1)
    assert abs(pixels("f/00000.png") - pixels("p/00000_01.png")).max() <= 40    # features were rounded to halves
    run(sample, *text, "--out", out / "show.png")
    assert info(out / "show.png")[1]["prompts"] == "a cat, a red dog"


def test_bench_of_tokens_races_the_original(tokens, capsys):
    classes, _, out = tokens
    run(sample, *classes, "--bench", "--json", out / "b.json")
    result = json.loads((out / "b.json").read_text())
    assert result["stages"]["transformer"]["flops"] > 0 and result["copy_bytes_per_second"] > 0
    original = result["variants"]["original's arithmetic"]
    assert original["equal"] and original["seconds"] > 0 and original["ratio"] > 0
    assert "GB/s" in capsys.readouterr().out


def test_the_demo_draws_what_it_is_told(tmp_path):
    """From the checkpoints in the repository: hearts of the colors that the prompts name, two each."""
    run(sample, "infinity", "--prompt", "noto style, green heart", "noto style, blue heart", "-n", 2, "--device", "cpu",
        "--out", tmp_path / "h")
    heart = lambda i, n: np.array(Image.open(tmp_path / "h" / f"{i:05d}_{n:02d}.png"), float)[8:20, 8:24].mean((0, 1))
    green, blue = (heart(i, 0) + heart(i, 1) for i in (0, 1))
    assert green.argmax() == 1 and blue.argmax() == 2, (green, blue)


def test_the_token_demo_draws_what_it_is_told(tmp_path):
    """Hearts of the colors that the prompts name, and of two classes what looks like them: blue signs, yellow faces."""
    run(sample, "llamagen", "--prompt", "noto style, red heart", "noto style, green heart", "noto style, blue heart",
        "--device", "cpu", "--out", tmp_path / "h")
    heart = lambda i: np.array(Image.open(tmp_path / "h" / f"{i:05d}.png"), float)[8:20, 8:24].mean((0, 1))
    assert [heart(i).argmax() for i in range(3)] == [0, 1, 2]
    run(sample, "llamagen", "--classes", "twemoji/arrows", "noto-v1/concerned", "-n", 8, "--device", "cpu", "--out",
        tmp_path / "c")
    pictures = np.stack([np.array(Image.open(p), float) for p in sorted((tmp_path / "c").iterdir())])[:, 4:12, 8:24]
    sign, face = (pictures[i::2].mean((0, 1, 2)) for i in (0, 1))
    r, g, b = face
    assert sign.argmax() == 2 and r > 200 > g > 100 > b, (sign, face)       # blue, and yellow


def test_bench_of_bits(prompts, capsys):
    arguments, out = prompts
    run(sample, *arguments, "--bench", "--json", out / "b.json")
    result = json.loads((out / "b.json").read_text())
    assert result["stages"]["transformer"]["flops"] > 0 and result["stages"]["decoder"]["seconds"] > 0
    assert "share of the limit" in capsys.readouterr().out


def test_npz_goes_on_where_it_stopped_and_is_the_same_in_pieces(tiny, capsys, monkeypatch):
    argv, out = tiny
    command = ["var", *argv, "-n", 10, "--cfg", 1.5]
    monkeypatch.setattr(drawing, "NPZ_CHUNK", 4)
    run(sample, *command, "--npz", out / "a.npz", "--batch-size", 10)
    expected = np.load(out / "a.npz")["arr_0"]
    assert expected.shape == (10, 16, 16, 3) and expected.dtype == np.uint8

    calls, real = [], var.VAR.sample

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)
    monkeypatch.setattr(var.VAR, "sample", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run(sample, *command, "--npz", out / "b.npz", "--batch-size", 3)
    assert not (out / "b.npz").exists() and len(list((out / "b.npz.parts").glob("*.npy"))) == 1
    other = complaint(capsys, sample, *command, "--npz", out / "b.npz", "--seed", 5)
    assert "holds pictures of other settings" in other
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    run(sample, *command, "--npz", out / "b.npz", "--batch-size", 3)        # the second of two processes does its share
    monkeypatch.setenv("RANK", "0")
    run(sample, *command, "--npz", out / "b.npz", "--batch-size", 3)
    assert np.abs(np.load(out / "b.npz")["arr_0"].astype(int) - expected).max() <= 1
    assert not (out / "b.npz.parts").exists()


def test_vq_reconstructs_pictures_of_any_shape(files, tmp_path, capsys):
    Image.new("RGB", (33, 17), "orange").save(tmp_path / "wide.png")
    Image.new("L", (16, 16), 7).save(tmp_path / "grey.png")
    argv = ("vq", "--ckpt", files[1], "--image", tmp_path / "wide.png", tmp_path / "grey.png")
    run(sample, *argv, "--out", tmp_path / "squares.png")
    assert "PSNR" in capsys.readouterr().out and (tmp_path / "squares.png").exists()
    run(sample, *argv, "--keep-size", "--steps-grid", "--out", tmp_path / "kept.png")
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_bench_reports_share_flops_and_writes_json(tiny, capsys):
    argv, out = tiny
    run(sample, "var", *argv, "--bench", "--json", out / "b.json")
    result = json.loads((out / "b.json").read_text())
    assert set(result["stages"]) == {"transformer", "sampling", "quantizer", "decoder"}
    # two rows of 30 tokens: 2 FLOP per weight of qkv, proj, fc1, fc2, head, word; 4 C per pair of tokens in attention
    C, rows, L = 64, 2, 30
    linear = 2 * rows * L * (2 * 12 * C * C + 32 * C) + 2 * 29 * 8 * C
    pairs = 1 * 1 + 4 * 5 + 9 * 14 + 16 * 30
    adaln = 2 * rows * (2 * 6 * C * C + 2 * C * C)                           # once per picture, not once per scale
    assert result["stages"]["transformer"]["flops"] == linear + rows * 2 * 4 * C * pairs + adaln
    assert 0 < result["share"] and result["seconds_per_image"] > 0 and result["variants"]["plain"]["equal"]
    assert "share of the limit" in capsys.readouterr().out


@pytest.mark.slow
def test_compile_draws_the_same_pictures(tiny, monkeypatch):
    """torch.compile gets the blocks, and each is one graph. A fast back end stands in for 40 s of compiling."""
    argv, out = tiny
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    run(sample, "var", *argv, "--bench", "--compile", "--json", out / "b.json")
    variants = json.loads((out / "b.json").read_text())["variants"]
    graph = {"graph"} if torch.cuda.is_available() else set()
    assert set(variants) == {"plain", "compile", "original's arithmetic"} | graph
    assert all(v["equal"] and v["seconds"] > 0 for v in variants.values())
    run(sample, "var", *argv, "--compile", "-n", 2, "--out", out / "compiled.png")
    run(sample, "var", *argv, "-n", 2, "--out", out / "plain.png")
    compiled, plain = (np.asarray(Image.open(out / f"{name}.png")).astype(int) for name in ("compiled", "plain"))
    assert np.abs(compiled - plain).max() <= 1                              # rounding


def test_a_variant_that_draws_something_else_gets_no_time():
    flaky = iter([torch.zeros(1), torch.ones(1)])                           # right when captured, wrong when replayed
    found = bench.race(lambda: torch.zeros(1), {"flaky": lambda: next(flaky)}, 1, torch.device("cpu"))
    assert not found["flaky"]["equal"] and "seconds" not in found["flaky"]


@pytest.mark.slow
def test_ops_table_and_bench(tmp_path, capsys, monkeypatch):
    """The table in lib/README.md is the registry's. A benchmark's row holds what it promises."""
    table = script("triton_ops.py").stdout
    assert table and table in (ROOT / "lib" / "README.md").read_text()
    spec = triton_ops.REGISTRY["adaln_modulate"]
    monkeypatch.setitem(triton_ops.REGISTRY, "adaln_modulate",
                        replace(spec, shapes={"odd": (1, 1, 8), "small": (1, 3, 8)}))
    run(sample, "ops", "--bench", "adaln_modulate", "--dtype", "fp32", "--json", tmp_path / "ops.json")
    out, rows = capsys.readouterr().out, json.loads((tmp_path / "ops.json").read_text())
    assert [row["op"] for row in rows] == ["adaln_modulate: small", "adaln_modulate backward: small"]
    own = "triton" if torch.cuda.is_available() else "fallback"
    for row in rows:
        assert row["op"] in out and row["bytes"] > 0 and row["floor_seconds"] > 0 and row["difference"] < 1e-5
        assert all(row["seconds"][name] > 0 for name in ("eager", "compile", own))
    assert torch.cuda.is_available() or "Triton is not timed" in out


def test_an_op_that_differs_gets_no_time(monkeypatch):
    spec = triton_ops.REGISTRY["sample_logits"]
    monkeypatch.setitem(triton_ops.REGISTRY, "sample_logits", replace(spec, fn=lambda cond, *_, **__: cond.argmin(-1)))
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)
    seconds, difference = bench_ops.time_op("sample_logits", (7, 33), torch.device("cpu"), torch.float32, False)
    assert difference > 0.5 and "differs from torch" in seconds["fallback"] and seconds["eager"] > 0


@pytest.mark.slow
def test_ops_mistakes(capsys, tmp_path):
    assert "--bench softmax: expected some of adaln_modulate," in complaint(capsys, sample, "ops", "--bench", "softmax")
    assert "cannot be written" in complaint(capsys, sample, "ops", "--bench", "--json", "/proc/nowhere/ops.json")
    assert "--json goes with --bench" in complaint(capsys, sample, "ops", "--json", tmp_path / "x.json")
    out = script("triton_ops.py", "--bench", "softmax")                     # the same command line by its other name
    assert out.returncode == 2 and out.stderr.startswith("error: --bench softmax")


@pytest.mark.parametrize("argv", [["var"], ["var", "--compile"], ["ops", "--bench"]])
def test_backend_that_is_not_there(argv, monkeypatch, capsys):
    monkeypatch.setattr(triton_ops, "BACKEND", "gpu")
    assert complaint(capsys, sample, *argv) == "error: OPS_BACKEND=gpu: expected auto, torch or triton"


@pytest.mark.slow
def test_compile_without_a_compiler(tiny, tmp_path):
    argv, out = tiny
    env = os.environ | {"CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ran = script("sample.py", "var", *argv, "--device", "cpu", "--compile", "--out", out / "x.png", env=env)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr and not (out / "x.png").exists()
    assert "error: torch.compile failed; it needs a C++ compiler" in ran.stderr.splitlines()[-1]


# ----------------------------------------------------------------------------------------------------------------------
# Downloads, from a server on this machine


@pytest.fixture
def hub(tmp_path):
    """A hub on this machine that serves stand-ins under the released names -> (server, its folder, environment)."""
    pytest.importorskip("huggingface_hub", reason="optional; .ci/run installs it and runs these tests")
    folder = tmp_path / "hub" / "FoundationVision" / "var" / "resolve" / "main"
    folder.mkdir(parents=True)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def end_headers(self):
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", '"%s"' % self.path.rpartition("/")[2])
            super().end_headers()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "hub"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    yield server, folder, environment
    server.shutdown()


@pytest.mark.slow
def test_released_names_are_downloaded_once(hub, tmp_path):
    """Into the cache that other programs use, too; without a network they are found there."""
    server, folder, environment = hub
    big = dict(vocab_size=4096, z_channels=32)
    torch.save(vq.export(tiny_tokenizer(**big)), folder / "vae_ch160v4096z32.pth")
    torch.save(var.export(tiny_var(**big, heads=1)), folder / "var_d16.pth")
    argv = (ROOT / "sample.py", "var", "--ckpt", "var_d16", "-n", 1, "--device", "cpu", "--out")
    result = script(*argv, tmp_path / "a.png", env=environment)
    assert result.returncode == 0, result.stderr
    server.shutdown()
    result = script(*argv, tmp_path / "b.png", "--no-download", env=environment)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.slow
def test_failed_downloads_say_so(hub, tmp_path):
    _, _, environment = hub
    argv = (ROOT / "sample.py", "var", "--ckpt", "var_d16.pth", "--out", tmp_path / "a.png")
    result = script(*argv, env=environment)
    way_out = "get it from https://huggingface.co/FoundationVision/var/blob/main/var_d16.pth and give its path"
    assert result.returncode == 2 and "var_d16.pth: cannot be downloaded (" in result.stderr, result.stderr
    assert way_out in result.stderr and "Traceback" not in result.stderr


def test_without_the_package_the_way_out_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = complaint(capsys, sample, "var", "--ckpt", "var_d16.pth", "--out", tmp_path / "a.png")
    assert "var_d16.pth: to download it, pip install huggingface_hub; or get it from https://huggingface.co/" in said
    said = complaint(capsys, sample, "var", "--ckpt", "var_d16.pth", "--out", tmp_path / "a.png", "--no-download")
    assert "not here" in said and "--no-download is set" in said


# ----------------------------------------------------------------------------------------------------------------------
# What is said when it does not work


def test_bad_files(tiny, files, capsys):
    argv, out = tiny
    picture = out / "a.png"
    say = lambda *a: complaint(capsys, sample, "var", "--out", picture, *a)
    assert "nowhere.pth: no such file" in say("--ckpt", "nowhere.pth")
    assert "no released model of that name (vae_ch160v4096z32.pth, var_d16.pth" in say("--ckpt", "var_d17")
    assert "not a VAR transformer" in say("--ckpt", files[1])
    assert "not an image tokenizer (VQVAE)" in say(*argv, "--vae", str(shutil.copy(files[2], out / "x.safetensors")))
    whole = files[2].read_bytes()
    (out / "cut.safetensors").write_bytes(whole[:len(whole) // 2])
    assert "cut.safetensors: truncated or not a safetensors file" in say("--ckpt", out / "cut.safetensors")
    torch.save(var.export(tiny_var()), out / "whole.pth")
    (out / "cut.pth").write_bytes((out / "whole.pth").read_bytes()[:9000])
    assert "cut.pth: truncated or not a PyTorch file" in say("--ckpt", out / "cut.pth")
    for i, junk in enumerate((b"", b"root:x:0:0", b"PK\x03\x04junk", b"\x80\x02junk", bytes(5000))):
        for suffix in ("pth", "safetensors"):
            (out / f"junk{i}.{suffix}").write_bytes(junk)
            said = say("--ckpt", out / f"junk{i}.{suffix}")
            reasons = ("truncated or not a", "refused", "is empty", "is not a PyTorch file")
            assert any(f"junk{i}.{suffix}: {reason}" in said for reason in reasons)
    torch.save({"args": data.Batches(1, 1, 0)}, out / "code.pth")
    assert "code.pth: refused: loading it would run code (lib.data.Batches)" in say("--ckpt", out / "code.pth")
    wrong = var.export(tiny_var(heads=1))
    wrong["head.weight"] = wrong["head.weight"][:, :5].clone()
    torch.save(wrong, out / "shape.pth")
    assert "head.weight is (32, 5), expected (32, 64)" in say("--ckpt", out / "shape.pth")
    var.save(tiny_var(), out / "known.safetensors", tokenizer=vq.fingerprint(tiny_tokenizer()))
    vq.save(tiny_tokenizer(z_channels=8, phi_count=1), out / "stranger.safetensors")
    said = say("--ckpt", out / "known.safetensors", "--vae", out / "stranger.safetensors")
    assert "is not the tokenizer that" in said
    vq.save(tiny_tokenizer(vocab_size=16), out / "other.safetensors")
    assert "has 16 codes of 8 channels, but" in say(*argv, "--vae", out / "other.safetensors")
    (out / "text.png").write_text("no picture")
    assert "text.png: not a readable picture" in say(*argv, "--edit", "in", "--image", out / "text.png")
    assert not picture.exists()


@pytest.mark.parametrize("argv, message", [
    (["-n", "0"], "-n 0: expected 1 .. 1000000"),
    (["--top-p", "1.5"], "--top-p 1.5: expected 0 .. 1"),
    (["--batch-size", "0"], "--batch-size 0: expected 1 .. 4096"),
    (["--classes", "7"], "--classes 7: expected an id 0 .. 4, 5 for no class, or a name that --list-classes prints"),
    (["--classes", "unicorn"], "--classes unicorn: expected an id"),
    (["--box", "0.5", "0", "0.2", "1"], "--box 0.5 0.0 0.2 1.0: expected 0 <= Y0 < Y1 <= 1"),
    (["--edit", "in"], "--edit and --image go together"),
    (["--edit", "class", "--image", "x.png"], "give the new class with --classes"),
    (["--json", "x.json"], "--json goes with --bench"),
    (["--random-weights", "var_d17"], "exclude each other"),
    (["--seed", "-1"], "--seed -1: expected 0 .. 9223372036854775807"),
    (["--npz", "a.npz", "--steps-grid"], "leave out --edit and --steps-grid"),
    (["--npz", "a"], "--npz a: expected a name that ends in .npz"),
    (["--out", "a.jpg"], "--out a.jpg: expected a name that ends in .png, or a folder"),
    (["--out", "/proc/nowhere/a.png"], "--out /proc/nowhere/a.png: cannot be written"),
    (["--top-k", "many"], "argument --top-k: invalid int value: 'many'"),
    (["--device", "tpu"], "invalid choice: 'tpu'"),
], ids=lambda v: v if isinstance(v, str) else None)
def test_bad_arguments(tiny, capsys, argv, message):
    assert message in complaint(capsys, sample, "var", *tiny[0], *argv)


@pytest.mark.parametrize("argv, message", [
    (["--pixels", "2M"], "--pixels 2M: choose one of 0.06M, 0.25M, 0.60M, 1M"),
    (["--cfg", "1", "2"], "--cfg has 2 values, but there are 3 scales"),
    (["--tau", "0"], "--tau 0.0: expected 0.001 .. 1000"),
    (["--prompt", ""], "an empty prompt"),
    (["--prompt", "a", " "], "an empty prompt"),
    (["--prompts", "nowhere.txt"], "nowhere.txt: cannot be read"),
    (["--prompt", "a", "--prompts", "b"], "--prompt and --prompts exclude each other"),
    (["--aspect", "9"], "--aspect 9.0: expected 0.3 .. 3.4"),
    (["--aspect", "2"], "draws squares of one size only"),
    (["--guide-features", "0", "7"], "--guide-features 7: expected -2 .. 1"),
    (["--tile", "4"], "use 16 or more"),
    (["--features", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
    (["--image", "nowhere.png"], "nowhere.png: no such file"),
    (["--random-weights", "infinity_9b"], "--ckpt and --random-weights exclude each other"),
])
def test_bad_arguments_for_prompts(prompts, capsys, argv, message):
    assert message in complaint(capsys, sample, *prompts[0], *argv)


@pytest.mark.parametrize("kind, argv, message", [
    (0, ["--prompt", "a"], "classes.safetensors: draws classes and reads no text; give --classes, or as --ckpt a t2i_"),
    (1, ["--classes", "1"],
     "text.safetensors: draws what a text says and knows no classes; give --prompt, not --classes"),
    (1, ["--npz", "a.npz"], "--npz is for classes"),
    (0, ["--save-features", "a.safetensors"], "reads no text, so there are no features to save"),
    (0, ["--classes", "9"], "--classes 9: expected an id 0 .. 4"),
    (0, ["--cfg", "-1"], "--cfg -1.0: expected 0 .. 1000"),
    (0, ["--temperature", "-1"], "--temperature -1.0: expected 0 .. 1000"),
    (0, ["--cfg-interval", "-2"], "--cfg-interval -2: expected at least -1"),
    (0, ["--eval-size", "0"], "--eval-size 0: expected 1 .. 4096"),
    (0, ["--size", "18"], "--size 18: expected a multiple of 4, the tokenizer's stride"),
    (0, ["--size", "3"], "--size 3: expected a multiple of 4, the tokenizer's stride"),
    (0, ["--npz", "a.npz", "--steps-grid"], "leave out --steps-grid"),
    (1, ["--features", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
    (1, ["--prompt", " "], "an empty prompt"),
    (0, ["--random-weights", "llamagen_9B"], "exclude each other"),
])
def test_bad_arguments_for_tokens(tokens, capsys, kind, argv, message):
    assert message in complaint(capsys, sample, *tokens[kind], *argv)


def test_llamagen_files_that_do_not_belong_together(tokens, token_files, files, capsys, tmp_path, monkeypatch):
    classes, text, out = tokens
    say = lambda *argv: complaint(capsys, sample, *argv)
    vq.save(tiny_single(vocab_size=64), out / "v64.safetensors")
    said = say(*classes, "--vq", out / "v64.safetensors")
    assert "the tokenizer has 64 codes, but this model draws maps of 32" in said
    assert "has tokens of several scales" in say(*classes, "--vq", files[1])
    assert "not a LlamaGen transformer" in say("llamagen", "--ckpt", token_files[1])
    other = tiny_single()
    torch.nn.init.normal_(other.quantize.codebook)
    vq.save(other, out / "other.safetensors")
    assert "is not the tokenizer that" in say(*classes, "--vq", out / "other.safetensors")
    llamagen.save(tiny_llamagen(text=True), out / "t2i.safetensors")        # without a text encoder of its own
    vq.save(tiny_single(), out / "emoji_vq_single.safetensors")
    mine = ("llamagen", "--ckpt", out / "t2i.safetensors", "--device", "cpu", "--prompt", "a", "--no-download")
    assert "flan-t5-xl: not here" in say(*mine)
    (out / "t5").mkdir()
    assert "no weights in it" in say(*mine, "--t5", out / "t5")
    assert "c2i_B_256.pt: not here" in say("llamagen", "--ckpt", "c2i_B_256", "--no-download")
    torch.save({"model": llamagen.export(tiny_llamagen())}, out / "narrow.pt")
    assert "how many heads it has is in no tensor" in say("llamagen", "--ckpt", out / "narrow.pt", "--size", 16)
    torch.save({"model": llamagen.export(tiny_llamagen(width=64, heads=1))}, out / "mine.pt")
    assert "neither the file nor its name tells the size of its pictures" in say("llamagen", "--ckpt", out / "mine.pt")
    run(sample, "llamagen", "--ckpt", out / "mine.pt", "--size", 16, "--device", "cpu", "--out", out / "mine.png")


def test_files_that_do_not_belong_together(prompts, text_files, files, capsys):
    arguments, out = prompts
    vq.save(tiny_bits(z_channels=8), out / "d8.safetensors")
    line = complaint(capsys, sample, *arguments, "--vae", out / "d8.safetensors")
    assert "tokens of 8 bits, but this model needs 6 bits; give emoji_bsq.safetensors as --vae" in line
    other = tiny_bits()
    torch.nn.init.normal_(other.encoder.conv_out.weight)
    vq.save(other, out / "other.safetensors")
    assert "is not the tokenizer that" in complaint(capsys, sample, *arguments, "--vae", out / "other.safetensors")
    assert "tokens of codes" in complaint(capsys, sample, *arguments, "--vae", files[1])
    infinity.save(tiny_infinity(t5=None, bits=32), out / "infinity_2b_mine.safetensors")
    two = ("infinity", "--ckpt", out / "infinity_2b_mine.safetensors", "--no-download", "--prompt", "a", "--device",
           "cpu")
    assert "infinity_vae_d32reg.pth: not here" in complaint(capsys, sample, *two)
    vq.save(tiny_bits(z_channels=32), out / "d32.safetensors")
    assert "flan-t5-xl: not here" in complaint(capsys, sample, *two, "--vae", out / "d32.safetensors")
    (out / "p.jsonl").write_text('{"prompt": "a"}\nbroken\n')
    assert "line 2" in complaint(capsys, sample, *arguments, "--prompts", out / "p.jsonl")
    (out / "p.txt").write_text("\n")
    assert "no prompt in it" in complaint(capsys, sample, *arguments, "--prompts", out / "p.txt")
    assert "a file that --save-features wrote" in complaint(capsys, sample, *arguments, "--features", text_files[2])


@pytest.mark.slow
def test_model_files_can_be_lifted(tmp_path):
    """Each model with vq.py and triton_ops.py alone, with only torch, numpy, einops and safetensors to import."""
    code = """
import sys
class Blocker:
    def find_spec(self, name, *_):
        if name.split(".")[0] in {"torchvision", "scipy", "soundfile", "triton", "PIL", "tqdm", "av", "tokenizers",
                                  "lib"}:
            raise ImportError(name + " is not installed")
import torch                                # which looks for triton itself
for name in [m for m in sys.modules if m.split(".")[0] in ("triton", "tqdm")]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocker())
import numpy as np, vq
g = torch.Generator().manual_seed(0)
def random(cls, config, *inputs):
    model = cls(config, *inputs).eval()
    model.init_weights(generator=g)
    return model
"""
    bodies = {
        "var": """
import var
images = random(var.VAR, var.CONFIGS["emoji_var"]).sample(
    random(vq.VQVAE, vq.CONFIGS["emoji_vq"]), torch.tensor([3]), generator=g)
""",
        "infinity": """
import infinity
tokenizer = random(vq.VQVAE, vq.CONFIGS["emoji_bsq"])
model = random(infinity.Infinity, infinity.CONFIGS["emoji_infinity"])
scales = vq.as_pairs(tokenizer.config.patch_nums)
images = model.sample(tokenizer, torch.randn(1, 5, 128, generator=g), scales=scales, generator=g)
""",
        "llamagen": """
import llamagen
images = random(llamagen.LlamaGen, llamagen.CONFIGS["emoji_llamagen"]).sample(
    random(vq.VQVAE, vq.CONFIGS["emoji_vq_single"]), torch.tensor([3]), generator=g)
""",
        "latentsync": """
import latentsync
unet, whisper = random(latentsync.UNet, latentsync.CONFIGS["talking_head"]), random(
    latentsync.Whisper, latentsync.WHISPERS["talking_head"])
autoencoder, align = random(vq.KLAutoencoder, vq.CONFIGS["talking_head_kl"]), latentsync.Aligner(64)
points = torch.tensor([(30.0, 30.0), (70.0, 30.0), (50.0, 50.0)])
frames = [(np.zeros((100, 100, 3), np.uint8), align(points))] * 2
windows = latentsync.windows(whisper, torch.rand(2000).numpy())
dubbed = list(latentsync.lipsync(unet, autoencoder, frames, windows, g, steps=1))
images = dubbed[0].generated[None, :, :32, :32]
""",
        "syncnet": """
import syncnet
model = random(syncnet.StableSyncNet, syncnet.CONFIGS["talking_head"])
faces = torch.zeros(20, 3, 64, 64, dtype=torch.uint8)
assert syncnet.score(model, faces, np.random.default_rng(0).standard_normal(16000) * 0.1, max_shift=2).clips == 5
images = torch.zeros(1, 3, 32, 32)
"""}
    for model, body in bodies.items():
        folder = tmp_path / model
        folder.mkdir()
        for name in (f"{model}.py", "vq.py", "triton_ops.py"):
            shutil.copy(ROOT / name, folder)
        result = script("-c", code + body + "print(tuple(images.shape), torch.cuda.is_initialized())", cwd=folder)
        assert result.stdout == "(1, 3, 32, 32) False\n", (model, result.stderr)
