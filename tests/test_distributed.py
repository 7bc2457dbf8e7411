"""Training on several processes, and what happens when something goes wrong."""
import csv
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import helpers
import latentsync
import sample
import train
import vq
from helpers import (ROOT, captioned, complaint, log_rows, make_tiny, run, same, tiny_infinity, tiny_llamagen, tiny_var,
                     weights)
from lib import parallel, studies, tasks
from lib.caches import TokenCache
from lib.checkpoints import Checkpoints
from lib.data import Batches, CaptionedPictures, PictureFolder
from test_train import VQ

pytestmark = pytest.mark.usefixtures("tiny_configs")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SHORT = ("--batch-size", 4, "--device", "cpu", "--log-every", 1, "--val-every", 0, "--sample-every", 0, "--workers", 0)


def started(tmp_path, runs, launcher=(), fault="", **kwargs):
    """Command lines of train.py, on tiny networks, in a process of their own or in several."""
    jobs = tmp_path / f"jobs{len(list(tmp_path.glob('jobs*')))}.json"
    jobs.write_text(json.dumps([[str(a) for a in argv] for argv in runs]))
    command = [sys.executable, *launcher, str(ROOT / "tests" / "tiny_runs.py"), str(jobs)]
    environment = os.environ | {"LEGIBLE_FAULT": fault, "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
                            **kwargs)


def finished(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out + err


def steps_saved(folder):
    return [int(path.name) for path in sorted((folder / "state").glob("0*"))]


def losses(folder):
    return [(int(row["step"]), float(row["loss"])) for row in log_rows(folder)]


# ----------------------------------------------------------------------------------------------------------------------
# As many processes as you like


def every_model(nets, pictures):
    """Command lines by name: with random draws, a codebook that is restarted, a discriminator, dropout, averages."""
    size, of_pictures = ("--size", 16), ("--data", pictures)
    return {
        "vq": ("vq", *size, *of_pictures, "--warm-steps", 1, "--restart-after", 1, "--disc-weight", 0.5, "--disc-start",
               1, "--lr", 1e-3),
        "var": ("var", *size, *of_pictures, "--vae", nets / "emoji_vq.safetensors"),
        "llamagen": ("llamagen", *size, *of_pictures, "--vq", nets / "single.safetensors", "--dropout", 0.1),
        "infinity": ("infinity", *size, "--vae", nets / "emoji_bsq.safetensors"),
        "syncnet": ("syncnet", "--videos", 2, "--val-pairs", 2, "--contrast-steps", 1),
        "latentsync": ("latentsync", "--stage", 2, "--init", nets / "stage1.safetensors",
                       "--vae", nets / "kl.safetensors", "--whisper", nets / "ear.safetensors",
                       "--syncnet", nets / "sync.safetensors", "--videomae", nets / "eye.safetensors",
                       "--frames", 4, "--videos", 2, "--val-videos", 1)}


@pytest.mark.slow
def test_any_number_of_processes_computes_the_same(pictures, nets, tmp_path):
    """One process that takes a batch in two parts, two with DDP, two with FSDP; and a run that changes between them."""
    models = every_model(nets, pictures)
    changing = (*models["vq"], *SHORT, "--ema", 0.5, "--clip", 1e3, "--out", tmp_path / "changing", "--resume", "auto")
    runs = lambda name, *extra: [(*argv, *SHORT, "--steps", 2, "--ema", 0.5, "--clip", 1e3, *extra, "--out",
                                  tmp_path / name / model) for model, argv in models.items()]
    whole = [(*changing[:-4], "--steps", 5, "--out", tmp_path / "whole")]
    part = lambda stop, *extra: [(*changing, "--steps", 5, "--stop-after", stop, *extra)]
    finished(started(tmp_path, part(2) + whole + runs("ddp"), TORCHRUN))
    finished(started(tmp_path, runs("one", "--accum", 2) + part(1), fault="contiguous"))
    assert steps_saved(tmp_path / "changing") == [2, 3]
    finished(started(tmp_path, part(2, "--fsdp") + runs("fsdp", "--fsdp"), TORCHRUN))
    for model in models:
        one, ddp, fsdp = (weights(tmp_path / name / model) for name in ("one", "ddp", "fsdp"))
        # Weights lie in memory as FSDP wants them in "one" and "fsdp" alone, so convolutions sum in another order than
        # in "ddp". What is left is rounding: Adam makes steps of full size, 1e-3, from gradients that are nothing but
        # that, of biases before a normalisation. A shard of FSDP ends elsewhere than the tensor, and fused AdamW rounds
        # the numbers after its last full vector differently, by one unit in the last place.
        convolutions = model in ("vq", "syncnet", "latentsync")
        for name, other, exact in (("ddp", ddp, not convolutions), ("fsdp", fsdp, model != "latentsync")):
            assert set(one) == set(other)
            for k in one:
                torch.testing.assert_close(one[k], other[k], atol=0 if exact else 3e-3, rtol=2e-7 * (name == "fsdp"),
                                           msg=lambda m: f"{model} {name} {k} {m}")
        np.testing.assert_allclose(losses(tmp_path / "one" / model), losses(tmp_path / "ddp" / model), rtol=1e-5)
        np.testing.assert_allclose(losses(tmp_path / "one" / model), losses(tmp_path / "fsdp" / model), rtol=1e-5)
    assert [step for step, _ in losses(tmp_path / "changing")] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(losses(tmp_path / "changing"), losses(tmp_path / "whole"), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [(), ("--quantize", "int8")], ids=["fp32", "int8"])
def test_lora_on_any_number_of_processes(quantize, pictures, nets, tmp_path):
    """Frozen weights, which are in no checkpoint of a run, beside others that learn; with checkpointing too."""
    models = {name: argv for name, argv in every_model(nets, pictures).items() if name not in ("vq", "syncnet")}
    whole = replace(helpers.UNET_CONFIG, resolution=16, motion="all")       # frozen weights cannot start from scratch
    latentsync.save(helpers.tiny(latentsync.UNet, whole), nets / "base_latentsync.safetensors")
    models["latentsync"] = (*models["latentsync"], "--init", nets / "base_latentsync.safetensors")
    for name, make in (("var", tiny_var), ("llamagen", tiny_llamagen), ("infinity", tiny_infinity)):
        sys.modules[make().__module__].save(make(), nets / f"base_{name}.safetensors")
        models[name] = (*models[name], "--init", nets / f"base_{name}.safetensors")
    runs = lambda name, *extra: [(*argv, *SHORT, "--steps", 2, "--ema", 0.5, "--clip", 1e3, "--lora", 2, *quantize,
                                  "--checkpointing", *extra, "--out", tmp_path / name / model)
                                 for model, argv in models.items()]
    finished(started(tmp_path, runs("ddp"), TORCHRUN))
    finished(started(tmp_path, runs("one", "--accum", 2), fault="contiguous"))
    finished(started(tmp_path, runs("fsdp", "--fsdp"), TORCHRUN))
    for model in models:
        one, ddp, fsdp = (weights(tmp_path / name / model) for name in ("one", "ddp", "fsdp"))
        for name, other in (("ddp", ddp), ("fsdp", fsdp)):
            assert set(one) == set(other)
            for k in one:                                                   # see the test above for what rounds
                torch.testing.assert_close(one[k], other[k], atol=3e-3 if model == "latentsync" else 0,
                                           rtol=2e-7 * (name == "fsdp"), msg=lambda m: f"{model} {name} {k} {m}")


def test_a_batch_must_be_shared_evenly(pictures, tmp_path, capsys, monkeypatch):
    run(train, *VQ, "--data", pictures, "--steps", 2, "--stop-after", 1, "--accum", 2, "--out", tmp_path / "a")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(parallel, "join", lambda device: None)
    monkeypatch.setattr("lib.checkpoints.all_gather_objects", lambda thing: [thing])
    said = complaint(capsys, train, *VQ, "--data", pictures, "--steps", 2, "--out", tmp_path / "a", "--resume", "auto")
    assert "cuts a batch into 2 micro-batches, which 4 processes cannot share" in said
    said = complaint(capsys, train, *VQ, "--data", pictures, "--steps", 2, "--batch-size", 6, "--out", tmp_path / "b")
    assert "--batch-size 6: not divisible by --accum 1 times 4 processes" in said
    monkeypatch.undo()
    make_tiny(monkeypatch)
    assert "--fsdp: shards a model over several processes; start them with torchrun" in complaint(
        capsys, train, *VQ, "--data", pictures, "--steps", 2, "--fsdp", "--out", tmp_path / "c")


def test_recomputed_blocks_draw_the_same(tmp_path):
    """Stochastic depth and dropout come from a generator, which checkpointing must turn back."""
    labels = torch.tensor([1, 2, 3])
    of_var = (labels, torch.randint(32, (3, 30)), torch.randn(3, 29, 8))
    of_llamagen = (labels, torch.randint(32, (3, 16)))
    for model, inputs in ((tiny_var(drop_path=0.5), of_var), (tiny_llamagen(dropout=0.3), of_llamagen)):
        found = []
        for model.checkpointing in (False, True):
            model.train().zero_grad()
            loss, _ = model.loss(*inputs, generator=(g := torch.Generator().manual_seed(0)))
            loss.backward()
            found.append(([p.grad.clone() for p in model.parameters()], torch.rand(1, generator=g)))
        for a, b in zip(*(grads for grads, _ in found)):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
        assert found[0][1] == found[1][1]                                   # and what is drawn next is the same


@pytest.mark.slow
def test_sets_of_pictures_do_not_depend_on_the_processes(files, tmp_path, monkeypatch):
    """What torchrun's processes draw for an evaluator, one of them killed on the way: no gap, nothing twice."""
    argv = ["var", "--ckpt", files[2], "--vae", files[1], "--device", "cpu", "-n", 700, "--batch-size", 50]
    run(sample, *argv, "--npz", tmp_path / "one.npz")
    code = ("import sys, os, signal; sys.path[:0] = [{0!r}, {0!r} + '/tests']; import torch; torch.set_num_threads(1);"
            "import numpy as np, sample; save = np.save;"
            "np.save = lambda *a: (save(*a), os.kill(os.getpid(), signal.SIGKILL))"
            " if os.environ['DIE'] == os.environ['RANK'] else save(*a);"
            "from lib.console import run_command; run_command(sample.MODELS['var'], sample.parse_args(sys.argv[1:]))"
            ).format(str(ROOT))
    (tmp_path / "go.py").write_text(code)
    for die, ends in (("1", False), ("no", True)):
        command = [sys.executable, *TORCHRUN, tmp_path / "go.py", *argv, "--npz", tmp_path / "two.npz"]
        command = [str(a) for a in command]
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DIE": die})
        assert (result.returncode == 0) == ends, result.stderr
    one, two = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("one", "two"))
    assert len(two) == 700 and np.array_equal(one, two)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def test_tar_files_hold_the_same_pictures(pictures, tmp_path, capsys):
    """As webdataset packs them; read in a bounded shuffle; a damaged one as far as it goes."""
    (tmp_path / "tars").mkdir()
    (tmp_path / "class").write_text("1")
    files = sorted(pictures.rglob("*.png"))
    for i in range(4):
        with tarfile.open(tmp_path / "tars" / f"{i}.tar", "w") as tar:
            for path in files[i::4]:
                tar.add(path, f"{path.parent.name}_{path.stem}.png")
                (tmp_path / "class").write_text(str(int(path.parent.name == "square")))
                tar.add(tmp_path / "class", f"{path.parent.name}_{path.stem}.cls")
    options = dict(size=16, split=False)
    packed = PictureFolder(tmp_path / "tars", notes=tmp_path / "notes", **options)
    plain = PictureFolder(pictures, **options)
    assert packed.classes == ["0", "1"] and len(packed) == len(plain) == 40
    by_name = {packed.name(i).split("/")[-1]: i for i in range(40)}
    for i, path in enumerate(plain.files):
        at = by_name["_".join(path.split("/")[-2:])]
        if "circle/07" not in path:
            (a, one, _), (b, two, _) = plain.__getitems__([(i, (3,))]), packed.__getitems__([(at, (3,))])
            assert torch.equal(a, b) and one == two
    batches = Batches([np.arange(40)], 5, 0, shards=packed.shards, window=10)
    epoch = [i for batch, _ in zip(batches, range(8)) for i, _ in batch]
    assert sorted(epoch) == list(range(40)) and epoch != sorted(epoch)
    assert all(len(set(packed.shards[epoch[start:start + 10]])) == 1 for start in range(0, 40, 10))
    argv = (*VQ, "--data", tmp_path / "tars", "--steps", 2)
    run(train, *argv, "--out", tmp_path / "run")
    assert "38 pictures, 2 classes" in capsys.readouterr().out
    whole = (tmp_path / "tars" / "2.tar").read_bytes()
    (tmp_path / "tars" / "2.tar").write_bytes(whole[:len(whole) // 2])
    run(train, *argv, "--out", tmp_path / "damaged")
    said = capsys.readouterr().out
    assert "read in part 1 damaged of 4 tar files" in said and "2.tar" in said and "done at step 2" in said
    (tmp_path / "tars" / "3.tar").unlink()
    with tarfile.open(tmp_path / "tars" / "3.tar", "w") as tar:
        tar.add(files[0], "a.png")
    run(train, *argv, "--out", tmp_path / "c")
    assert "no .cls beside it (1); such as" in capsys.readouterr().out


def test_tar_files_with_captions(tmp_path, capsys):
    """The pictures of `captioned`, with texts beside them: the same buckets."""
    folder = captioned(tmp_path / "data")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for i, line in enumerate((folder / "a.tsv").read_text().splitlines()[:24]):
            text = line.split("\t")[1] if i else json.dumps({"long_caption": "long", "text": "s"})
            (tmp_path / "text").write_text(text)
            tar.add(folder / f"{i}.png", f"{i}.png")
            tar.add(tmp_path / "text", f"{i}.{'txt' if i else 'json'}")
        tar.add(folder / "0.png", "mute.png")
    packed = CaptionedPictures(tmp_path / "tars", "0.06M", split=False, notes=tmp_path)
    plain = CaptionedPictures(folder, "0.06M", split=False)
    assert "skipped 1 broken of 25 lines" in capsys.readouterr().out and packed.captions(0) == ["long", "s"]
    assert packed.aspects == plain.aspects == [1.0, 1.5]
    assert packed.name(3) == str(tmp_path / "tars" / "0.tar" / "3.png")
    for i in (1, 2, 23):
        (a, one, _), (b, two, _) = packed.__getitems__([(i, None)]), plain.__getitems__([(i, None)])
        assert torch.equal(a, b) and one == two
    (_, _, broken), (_, _, also) = packed.__getitems__([(9, None)]), plain.__getitems__([(9, None)])
    assert broken[0].endswith("0.tar/9.png") and also[0].endswith("data/9.png")


def test_damaged_tokens_are_made_again(pictures, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TokenCache, "SHARD", 16)
    tokenizer, data = vq.load(files[1]), PictureFolder(pictures, 16)
    make = lambda: TokenCache(data, tokenizer, (1, 2, 3, 4), "1", "cpu", tmp_path, "train")
    cache = make()
    assert "skipped 1 unreadable of 38 pictures" in capsys.readouterr().out and len(cache) == 37
    items = [(i, None) for i in (0, 20, 36)]
    before, labels, _ = cache.__getitems__(items)
    shards = sorted(next(tmp_path.glob("codes_train_*")).iterdir())
    assert len(shards) == 3
    data_of_one = bytearray(shards[1].read_bytes())
    data_of_one[-300] ^= 1                                                  # a single bit of its numbers
    shards[1].write_bytes(data_of_one)
    shards[2].write_bytes(shards[2].read_bytes()[:100])
    again = make()
    assert "made again: 2 damaged of 3 files of tokens" in capsys.readouterr().out
    after, same_labels, _ = again.__getitems__(items)
    assert torch.equal(before, after) and torch.equal(labels, same_labels)


# ----------------------------------------------------------------------------------------------------------------------
# Faults


def test_losses_that_are_not_finite(pictures, tmp_path, capsys, monkeypatch):
    loss, bad = tasks.TokenizerTask.loss, {2, 4, 5}

    def broken(self, batch, step, generator):
        value, metrics = loss(self, batch, step, generator)
        return value * (float("nan") if step in bad else 1.0), metrics
    monkeypatch.setattr(tasks.TokenizerTask, "loss", broken)
    argv = (*VQ, "--data", pictures, "--steps", 8, "--max-skipped", 3)
    run(train, *argv, "--out", tmp_path / "a")
    rows = log_rows(tmp_path / "a")
    assert [row["skipped"] for row in rows] == ["0", "0", "1", "1", "2", "3", "3", "3"] and rows[2]["loss"] == "nan"
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "a").values())
    bad |= {6}
    said = complaint(capsys, train, *argv, "--save-every", 2, "--out", tmp_path / "b")
    assert "no finite gradient in 3 steps in a row, up to step 7" in said and said.count(".png") == 4
    assert steps_saved(tmp_path / "b") == [4, 6]
    bad.clear()
    run(train, *argv, "--out", tmp_path / "b", "--resume", "auto")
    assert "steps 6 to 8" in capsys.readouterr().out


def test_a_reader_that_dies_ends_the_run(pictures, tmp_path, capsys, monkeypatch):
    read = PictureFolder.read

    def killed(self, index, crop):
        if index == 5 and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index, crop)
    monkeypatch.setattr(PictureFolder, "read", killed)
    argv = ("--data", pictures, "--steps", 40, "--workers", 1, "--val-every", 0, "--sample-every", 0)
    said = complaint(capsys, train, *VQ, *argv, "--out", tmp_path / "a")
    assert "a process that reads --data has died" in said and "try fewer --workers" in said


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others(pictures, tmp_path):
    began = time.time()
    said = finished(started(tmp_path, [(*VQ, "--data", pictures, "--steps", 1000, "--out", tmp_path / "a")], TORCHRUN,
                            fault="die:3"), code=1)
    assert time.time() - began < 100 and "Signal 9 (SIGKILL)" in said
    assert "error: another process of this run has died" in said and "RuntimeError" not in said


@pytest.mark.slow
def test_preempted_processes_stop_after_the_same_step(pictures, tmp_path, capsys):
    """SIGTERM to torchrun: all save after the step in progress, and one process goes on."""
    argv = (*VQ, "--data", pictures, "--steps", 1000, "--val-every", 0, "--sample-every", 0, "--out", tmp_path / "a")
    process = started(tmp_path, [argv], TORCHRUN, fault="sleep:0.1")
    until(lambda: (tmp_path / "a" / "log.csv").exists() and len(losses(tmp_path / "a")) > 2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert process.returncode and "interrupted at step" in out, out + err
    (stopped,) = steps_saved(tmp_path / "a")
    assert losses(tmp_path / "a")[-1][0] == stopped
    run(train, *argv, "--resume", "auto", "--stop-after", 1)
    assert f"steps {stopped} to 1000" in capsys.readouterr().out and steps_saved(tmp_path / "a")[-1] == stopped + 1


def until(happened, seconds=120):
    deadline = time.time() + seconds
    while time.time() < deadline and not happened():
        time.sleep(0.1)
    assert happened()


def test_a_full_disk_ends_nothing(pictures, tmp_path, capsys, monkeypatch):
    """No file may grow beyond a limit for a while: the run goes on, says so, and saves when there is room."""
    saves, begin = [], Checkpoints.begin

    def limited(self, step, *inputs):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if step in (2, 4) else hard, hard))
        saves.append(step)
        begin(self, step, *inputs)
        if self.pending:
            self.pending[1].exception()                                     # waits for it, inside of the limit
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    monkeypatch.setattr(Checkpoints, "begin", limited)
    plain = (*VQ, "--data", pictures, "--steps", 5)
    argv = (*plain, "--save-every", 1, "--out", tmp_path / "a", "--resume", "auto")
    run(train, *argv, "--stop-after", 3)
    said = capsys.readouterr().out
    assert "could not save step 2 (" in said and "step 1 is intact" in said and "stopped at step 3 of 5" in said
    assert saves == [1, 2, 3] and steps_saved(tmp_path / "a") == [1, 3]
    said = complaint(capsys, train, *argv, "--stop-after", 1)               # and when the last one fails
    assert "could not save" in said and "make room and go on with --resume auto" in said
    assert steps_saved(tmp_path / "a") == [1, 3] and not list((tmp_path / "a" / "state").glob(".0*/.metadata"))
    run(train, *argv)
    run(train, *plain, "--out", tmp_path / "whole")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "whole"))


KILLS = int(os.environ.get("LEGIBLE_KILLS", 3))                             # 20 by hand; each takes seconds


@pytest.mark.slow
def test_killed_while_it_saves(pictures, tmp_path, capsys):
    """SIGKILL at random moments of a run that saves after every step: what is complete stays so, and the end is that of
    a run that nobody killed."""
    rng, last = np.random.default_rng(), 0
    plain = (*VQ, "--data", pictures, "--steps", 400, "--val-every", 0, "--sample-every", 0)
    argv = (*plain, "--save-every", 1, "--resume", "auto", "--out", tmp_path / "a")
    for kill in range(KILLS):
        process = started(tmp_path, [argv], start_new_session=True)
        until(lambda: max(steps_saved(tmp_path / "a"), default=0) > last)
        time.sleep(rng.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        saved = steps_saved(tmp_path / "a")
        assert saved[-1] > last and len(saved) <= 3                         # the third was to be deleted
        last = saved[-1]
    said = finished(started(tmp_path, [(*argv, "--stop-after", 3),
                                       (*plain, "--stop-after", last + 3, "--out", tmp_path / "whole")]))
    assert f"steps {last} to 400" in said
    assert same(weights(tmp_path / "a"), weights(tmp_path / "whole"))
    assert [step for step, _ in losses(tmp_path / "a")] == list(range(1, last + 4))


def test_checkpoints_of_other_runs(pictures, tmp_path, capsys):
    argv = (*VQ, "--data", pictures, "--steps", 4, "--save-every", 1, "--keep", 3, "--out", tmp_path / "a")
    run(train, *argv, "--stop-after", 3)
    assert steps_saved(tmp_path / "a") == [1, 2, 3]
    again = partial(complaint, capsys, train, *argv, "--resume", "auto")
    newest = tmp_path / "a" / "state" / "0000003"
    notes = json.loads((newest / "notes.json").read_text())
    old = notes | {"settings": notes["settings"] | {"config.z_channels": 4, "lr": 0.1} | {"forgotten": 1}}
    (newest / "notes.json").write_text(json.dumps(old))
    said = again()
    assert "config.z_channels was 4, now 8" in said
    assert "lr was 0.1, now 0.001" in said
    assert "forgotten was 1, now None" in said
    (newest / "notes.json").write_text(json.dumps(notes))
    tensors = next(newest.glob("*.distcp"))
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:5000] + bytes(1000) + whole[6000:])         # of the right length, but damaged
    assert f"{newest}: cannot continue from it" in again() and "delete it to go on from step 2" in again()
    (tmp_path / "a" / "state.pt").touch()
    assert "state.pt: was written by an older version" in again()


def test_what_a_run_leaves_behind(pictures, tmp_path, capsys, monkeypatch):
    run(train, *VQ, "--data", pictures, "--batch-size", 16, "--steps", 3, "--out", tmp_path / "a")
    said = capsys.readouterr().out
    assert "step 3/3: loss " in said and "waiting for data" in said         # a line, where there is no terminal
    rows = log_rows(tmp_path / "a")
    for name in ("step_seconds", "images_per_s", "flops_share"):
        assert all(float(row[name]) > 0 for row in rows), name
    assert all(0 <= float(row["data_wait"]) < 1 for row in rows) and rows[0]["tokens_per_s"] == ""
    assert (tmp_path / "a" / "unreadable.txt").read_text().endswith("circle/07.png\n")
    assert sorted(p.name for p in (tmp_path / "a").iterdir() if p.name != "tensorboard") == [
        ".lock", "best.json", "best.safetensors", "curves.png", "log.csv", "model.safetensors", "samples", "state",
        "unreadable.txt"
    ]


@pytest.mark.slow
def test_scaling_laws(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(studies, "LADDER", (1, 2, 3))
    run(train, "var", "--scaling-laws", "--size", 16, "--steps", 2, "--vae", files[1], "--device", "cpu", "--out",
        tmp_path)
    rows = list(csv.DictReader(open(tmp_path / "scaling.csv")))
    assert [row["depth"] for row in rows] == ["1", "2", "3"] and (tmp_path / "scaling.png").exists()
    assert "loss, last scale: " in capsys.readouterr().out
    sizes = np.array([1e5, 1e6, 1e7])
    law, (ends, values) = studies.power_law(sizes, 5 * sizes**-0.2, "N")
    assert law == "5 N^-0.2000, r = -1.000"
    assert ends == pytest.approx([4.9, 7.1]) and 10 ** values[0] == pytest.approx(5 * (10**4.9) ** -0.2)


def test_bench_of_a_step(pictures, files, tmp_path, capsys):
    run(train, "var", "--size", 16, "--data", pictures, "--vae", files[1], "--device", "cpu", "--bench", "--json",
        tmp_path / "b.json", "--out", tmp_path / "none")
    said, found = capsys.readouterr().out, json.loads((tmp_path / "b.json").read_text())
    assert "share of the limit" in said and not (tmp_path / "none").exists()
    assert found["stages"]["backward"]["flops"] > 1.5 * found["stages"]["forward"]["flops"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_training_on_a_gpu(pictures, files, tmp_path, capsys, dtype):
    """Half precision, compiled and recomputed blocks, a checkpoint written from the GPU, and on from it."""
    argv = ("var", "--size", 16, "--data", pictures, "--vae", files[1], "--batch-size", 4, "--accum", 2, "--steps", 6,
            "--dtype", dtype, "--device", "cuda", "--compile", "--checkpointing", "--ema", 0.5, "--out", tmp_path / "a")
    run(train, *argv, "--stop-after", 3)
    run(train, *argv, "--resume", "auto")
    assert "done at step 6 of 6" in capsys.readouterr().out and steps_saved(tmp_path / "a") == [3, 6]
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "a").values())
