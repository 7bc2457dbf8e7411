"""How runs of train.py end, what they leave in --out, and what a damaged or foreign --out leads to."""
import io
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import sample
import train
import vq
from helpers import ROOT, captioned, complaint, info, log_rows, run, smooth_pictures, speech, write_video
from lib import recipes, tasks
from lib.checkpoints import Checkpoints, MetadataUnpickler
from lib.console import GuardedStream, UserError, guarded_output
from lib.readers import batches_of, read_batches
from lib.run import StopOnSignal
from test_distributed import TORCHRUN, finished, started, steps_saved, until
from test_train import VQ

pytestmark = pytest.mark.usefixtures("tiny_configs")
SECONDS = 20                                                                # in which a run must be gone


# ----------------------------------------------------------------------------------------------------------------------
# Processes that read data


def on_files(name, pictures, nets, tmp_path):
    """A training run of each model that reads files with two processes. Its steps take at least 0.1 s."""
    common = ("--batch-size", 4, "--device", "cpu", "--log-every", 1, "--val-every", 0, "--sample-every", 0,
              "--workers", 2, "--out", tmp_path / "out")
    faces = tmp_path / "faces"
    if name in ("syncnet", "latentsync"):
        faces.mkdir()
        for i in range(4):
            write_video(faces / f"{i}.mp4", smooth_pictures(20, 16, seed=i), speech(0.8, seed=i))
    of_model = {
        "vq": ("--size", 16, "--data", pictures),
        "var": ("--size", 16, "--data", pictures, "--vae", nets / "emoji_vq.safetensors", "--cache-crops", 0),
        "llamagen": ("--size", 16, "--data", pictures, "--vq", nets / "single.safetensors", "--cache-crops", 0),
        "infinity": ("--vae", nets / "emoji_bsq.safetensors", "--pixels", "0.06M"),
        "syncnet": ("--data", faces, "--frames", 5, "--contrast-steps", 0, "--moments", 1, "--val-pairs", 2),
        "latentsync": ("--data", faces, "--vae", nets / "kl.safetensors", "--whisper", nets / "ear.safetensors",
                       "--frames", 4, "--val-videos", 1)}
    if name == "infinity":
        of_model[name] += ("--data", captioned(tmp_path / "captions"))
    return name, *of_model[name], *common


def ends_in_time(process, code):
    """The process ends by itself in SECONDS from now, and so do all that it has started -> what it printed."""
    began = time.time()
    out, err = process.communicate(timeout=100)                             # waits for all that hold its pipes
    assert time.time() - began < SECONDS and process.returncode == code, out + err
    assert "Traceback" not in err, err
    return out + err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vq", "var", "llamagen", "infinity", "syncnet", "latentsync"])
def test_every_model_ends_when_it_is_done_and_after_a_signal(name, pictures, nets, tmp_path, request):
    if name in ("syncnet", "latentsync"):
        request.getfixturevalue("av")
    argv = on_files(name, pictures, nets, tmp_path)
    process = started(tmp_path, [(*argv, "--steps", 1000)], fault="sleep:0.1", start_new_session=True)
    until(lambda: (tmp_path / "out" / "log.csv").exists() and len(log_rows(tmp_path / "out")) > 1)
    os.killpg(process.pid, signal.SIGTERM)                                  # as a scheduler does: to readers as well
    assert "interrupted at step" in ends_in_time(process, 128 + signal.SIGTERM)
    (step,) = steps_saved(tmp_path / "out")
    process = started(tmp_path, [(*argv, "--steps", 1000, "--resume", "auto", "--stop-after", 2)])
    until(lambda: log_rows(tmp_path / "out")[-1]["step"] == str(step + 2))
    assert f"stopped at step {step + 2}" in ends_in_time(process, 0)


@pytest.mark.slow
@pytest.mark.parametrize("signals, code", [([signal.SIGINT], 130), ([signal.SIGINT] * 2, 130), ([signal.SIGHUP], 129)],
                         ids=["ctrl-c", "two", "hangup"])
def test_a_run_ends_after_signals(signals, code, pictures, nets, tmp_path):
    process = started(tmp_path, [(*on_files("vq", pictures, nets, tmp_path), "--steps", 1000)], start_new_session=True,
                      fault="sleep:3" if len(signals) > 1 else "sleep:0.1")
    until(lambda: (tmp_path / "out" / "log.csv").exists() and log_rows(tmp_path / "out"))
    for number in signals:
        os.killpg(process.pid, number)
        time.sleep(1.5)
    said = ends_in_time(process, code)
    assert "interrupted" in said and (len(signals) > 1 or "interrupted at step" in said)


@pytest.mark.slow
def test_a_run_ends_after_an_error_under_torchrun_and_with_bench(pictures, nets, tmp_path):
    argv = on_files("vq", pictures, nets, tmp_path)
    process = started(tmp_path, [(*argv, "--steps", 40, "--max-skipped", 2)], fault="nan:1:40")
    assert "no finite gradient in 2 steps" in finished(process, code=2)
    process = started(tmp_path, [(*argv[:-1], tmp_path / "two", "--steps", 4)], TORCHRUN)
    until(lambda: (tmp_path / "two" / "model.safetensors").exists())
    assert "done at step 4" in ends_in_time(process, 0)
    process = started(tmp_path, [(*argv[:-1], tmp_path / "three", "--bench", "--json", tmp_path / "b.json")])
    until(lambda: (tmp_path / "b.json").exists())
    assert "share of the limit" in ends_in_time(process, 0)


class Slow(torch.utils.data.Dataset):
    """Every batch takes a minute to read, except for the first one."""

    def __len__(self):
        return 8

    def __getitems__(self, items):
        time.sleep(60 if items[0] else 0)
        return items


def test_readers_end_in_the_middle_of_a_batch():
    began = time.time()
    with read_batches(Slow(), [[0], [1], [2]], workers=2) as batches:
        assert next(batches) == (0,)
    assert time.time() - began < SECONDS


class Complaining(Slow):
    def __getitems__(self, items):
        raise UserError("the line of a reader")


def test_what_readers_say_arrives_as_one_line():
    with pytest.raises(UserError, match="^the line of a reader$"), read_batches(Complaining(), [[0]], 1) as batches:
        next(batches)

    def dying():
        yield 1
        raise ConnectionResetError(104, "Connection reset by peer")         # it died while it handed over a batch
    with pytest.raises(UserError, match="a process that reads --data has died .*try fewer --workers"):
        list(batches_of(dying(), workers=1))
    with pytest.raises(ConnectionResetError):                               # this process reads itself
        list(batches_of(dying(), workers=0))


# ----------------------------------------------------------------------------------------------------------------------
# Signals


def test_a_signal_ends_a_validation(pictures, tmp_path, capsys, monkeypatch):
    """Of ten batches of validation two are computed; the run saves and ends, and goes on as if nothing had been."""
    validated = []
    result_of = tasks.psnr

    def psnr(*inputs):
        validated.append(1)
        if len(validated) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return result_of(*inputs)
    monkeypatch.setattr(tasks, "psnr", psnr)
    argv = (*VQ, "--data", pictures, "--val-data", pictures, "--steps", 4, "--val-every", 2, "--out", tmp_path / "a")
    with pytest.raises(SystemExit) as e:
        run(train, *argv)
    assert e.value.code == 128 + signal.SIGTERM and len(validated) == 2
    assert "interrupted at step 2" in capsys.readouterr().out and steps_saved(tmp_path / "a") == [2]
    assert not (tmp_path / "a" / "best.json").exists() and log_rows(tmp_path / "a")[-1]["val_psnr"] == ""
    run(train, *argv, "--resume", "auto")
    assert len(validated) == 12                                             # one whole validation, after step 4


def test_ignored_hangups_stay_ignored(monkeypatch):
    """`nohup python train.py ...`"""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.number and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_ctrl_c_during_the_imports_shows_no_traceback():
    for script in ("train.py", "sample.py"):
        process = subprocess.Popen([sys.executable, ROOT / script, "vq"], stderr=subprocess.PIPE, text=True, cwd=ROOT)
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=SECONDS)[1] == "" and process.returncode


# ----------------------------------------------------------------------------------------------------------------------
# Messages that cannot be printed


def test_messages_that_cannot_be_printed_end_nothing(monkeypatch, tmp_path):
    """A full disk is remembered, a reader that has left is not; a closed stream drops everything."""
    for error, remembered in ((OSError(28, "No space left on device"), True),
                              (BrokenPipeError(32, "Broken pipe"), False)):
        stream = open(tmp_path / "out", "w")
        guarded = GuardedStream(stream)
        monkeypatch.setattr(guarded, "stream", stream)
        with monkeypatch.context() as patched:
            failing = lambda *_, error=error: (_ for _ in ()).throw(error)
            patched.setattr(guarded, "stream", SimpleNamespace(write=failing, flush=failing, fileno=stream.fileno))
            print("one", file=guarded)
            guarded.flush()
        assert (guarded.error is error) == remembered
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with guarded_output():
        print("two")
        print("three", file=sys.stderr)
    assert sys.stdout is None


@pytest.mark.slow
@pytest.mark.parametrize("redirection, code", [("> /dev/full", 0), ("| true", 0), ("| head -1", 0), ("2>&-", 0),
                                               (">&- 2>&-", 0), ("> /dev/full 2>&1", 0)])
def test_training_goes_on_without_an_output(redirection, code, pictures, tmp_path):
    jobs = tmp_path / "jobs.json"
    argv = (*VQ, "--data", pictures, "--steps", 3, "--val-every", 0, "--sample-every", 0, "--out", tmp_path / "a")
    jobs.write_text(json.dumps([[str(a) for a in argv]]))
    command = f"{sys.executable} {ROOT}/tests/tiny_runs.py {jobs} {redirection}; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
    assert ran.returncode == code and "Traceback" not in ran.stderr and "Exception ignored" not in ran.stderr
    assert steps_saved(tmp_path / "a") == [3] and (tmp_path / "a" / "model.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------------------
# What lies in --out


def test_results_without_a_checkpoint_are_kept(pictures, tmp_path, capsys):
    """Nothing that an earlier run has written is overwritten."""
    argv = (*VQ, "--data", pictures, "--steps", 2, "--out", tmp_path / "a")
    run(train, *argv)
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    for folder in (tmp_path / "a" / "state").iterdir():
        (folder / "notes.json").unlink()                                    # what a kill leaves behind
    for name in ("log.csv", "best.safetensors"):                            # each alone keeps other runs out
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes((tmp_path / "a" / name).read_bytes())
        assert "it holds a run already" in complaint(capsys, train, *argv[:-1], tmp_path / name)
    run(train, *argv, "--seed", 1, "--resume", "auto")
    assert "there is no checkpoint to go on from; model.safetensors, best.safetensors" in capsys.readouterr().out
    (aside,) = (tmp_path / "a").glob("before-*")
    assert (aside / "model.safetensors").read_bytes() == before != (tmp_path / "a" / "model.safetensors").read_bytes()


def test_places_where_a_run_cannot_write(pictures, tmp_path, capsys):
    argv = (*VQ, "--data", pictures, "--steps", 1)
    assert f"--out {pictures}: lies in --data" in complaint(capsys, train, *argv, "--out", pictures)
    assert "lies in --data" in complaint(capsys, train, *argv, "--out", pictures / "circle" / "run")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "state").touch()
    assert "state: is a file, but" in complaint(capsys, train, *argv, "--out", tmp_path / "a")
    (tmp_path / "b" / "model.safetensors").mkdir(parents=True)
    assert "model.safetensors: is a folder, but" in complaint(capsys, train, *argv, "--out", tmp_path / "b")
    said = complaint(capsys, train, "var", "--size", 16, "--data", pictures, "--vae", tmp_path / "no.pth", "--steps", 1,
                     "--out", tmp_path / "c")
    assert "no.pth: no such file" in said and not (tmp_path / "c" / "samples").exists()


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(pictures, tmp_path, capsys):
    """The first one is another process, since a process does not lock out itself."""
    out = tmp_path / "a"
    holder = ("import sys; sys.path[:0] = sys.argv[1:2]; from lib.run import lock_folder; from pathlib import Path;"
              "lock = lock_folder(Path(sys.argv[2])); print('locked', flush=True); sys.stdin.read()")
    out.mkdir()
    with subprocess.Popen([sys.executable, "-c", holder, ROOT, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:
        assert process.stdout.readline() == "locked\n"
        said = complaint(capsys, train, *VQ, "--data", pictures, "--steps", 1, "--out", out)
        assert f"another run writes into it (process {process.pid} on {socket.gethostname()})" in said
        process.kill()
    run(train, *VQ, "--data", pictures, "--steps", 1, "--out", out)


# ----------------------------------------------------------------------------------------------------------------------
# The state of a run, damaged or from somebody else


class Attack:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


NOTES = [("null", "NoneType"), ("[]", "list"), ('{"settings": 3}', "settings is 3"), ('{"step": "x"}', "step is 'x'"),
         ('{"step": -1}', "step is -1"), ('{"step": 12.5}', "step is 12.5"),
         ('{"micro_batches": 0}', "micro_batches is 0"), ("[" * 100000, "recursion"), ("\xff", "decode")]


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory):
    """Where the folder of a run lies once the first test has made it."""
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def three_steps(pictures, kept_run, tmp_path):
    """The arguments of a run that has saved three times and can go on. Its folder is a copy."""
    argv = (*VQ, "--data", pictures, "--steps", 5, "--save-every", 1, "--keep", 5, "--val-every", 0, "--out",
            tmp_path / "a")
    if not kept_run.exists():
        run(train, *argv[:-1], kept_run, "--stop-after", 3)
    shutil.copytree(kept_run, tmp_path / "a")
    return *argv, "--resume", "auto"


def test_damaged_checkpoints_are_set_aside(three_steps, tmp_path, capsys):
    state = tmp_path / "a" / "state"
    notes = json.loads((state / "0000003" / "notes.json").read_text())
    (state / "9999999").mkdir()                                             # a stray folder
    (state / "9999999" / "notes.json").write_text(json.dumps(notes))
    said = []
    for text, _ in NOTES:
        step = len(said) + 10
        if text.startswith("{"):
            text = json.dumps(notes | {"step": step} | json.loads(text))
        folder = state / f"{step:07d}"
        folder.mkdir()
        (folder / "notes.json").write_text(text, encoding="latin-1")
        said.append(folder)
    for part in (state / "0000003").glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:2000])
    run(train, *three_steps)
    out = capsys.readouterr().out
    assert "steps 2 to 5" in out and "done at step 5" in out
    for folder, (_, reason) in zip(said, NOTES):
        line, = [line for line in out.splitlines() if line.startswith(f"{folder}: is damaged (")]
        assert reason in line
    for folder, reason in ((state / "9999999", "step is 3"), (state / "0000003", "is cut")):
        assert f"{folder}: is damaged (" in out and reason in out
        assert len(list(state.glob(f"{folder.name}.damaged-*"))) == 1


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for name in ("10000000", "9999999", "0000003", "0000004.damaged-00"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.json").touch()
    assert [path.name for path in Checkpoints(tmp_path, 3).complete()] == ["0000003", "9999999", "10000000"]


def test_a_foreign_state_runs_no_code(three_steps, tmp_path, capsys):
    state = tmp_path / "a" / "state"
    whole = (state / "0000002" / ".metadata").read_bytes()
    (state / "0000003" / ".metadata").write_bytes(pickle.dumps(Attack(str(tmp_path / "ran"))))
    metadata = pickle.loads(whole)
    name = next(iter(metadata.state_dict_metadata))
    metadata.state_dict_metadata[name] = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
    (state / "0000002" / ".metadata").write_bytes(pickle.dumps(metadata))   # its value would be unpickled
    for module, attribute in (("torch.distributed.checkpoint.metadata", "os.system"), ("torch", "load"),
                              ("pathlib", "Path.unlink"), ("torch.serialization", "load")):
        with pytest.raises(pickle.UnpicklingError, match="refused"):
            MetadataUnpickler(io.BytesIO()).find_class(module, attribute)
    # Early versions of Python 3.11 pickle members of enums as a call of getattr.
    member = torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    get = MetadataUnpickler(io.BytesIO()).find_class("builtins", "getattr")
    assert get(type(member), member.name) is member
    for thing, attribute in ((torch, "load"), (torch.Size, "__init__"), (type(member), "__class__")):
        with pytest.raises(pickle.UnpicklingError, match="refused"):
            get(thing, attribute)
    run(train, *three_steps)
    out = capsys.readouterr().out
    assert "refused: loading it would run code (io.open)" in out
    assert "refused: it holds other things than tensors" in out and "steps 1 to 5" in out
    assert not (tmp_path / "ran").exists()


def test_no_whole_checkpoint_is_left(three_steps, tmp_path, capsys):
    for folder in (tmp_path / "a" / "state").iterdir():
        (folder / ".metadata").unlink()
    assert "no checkpoint in it is whole; start a new run" in complaint(capsys, train, *three_steps)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00broken", b"", b"step\n\x00\n", b"a,b\n1,2\n"])
def test_a_damaged_log_and_best_are_set_aside(three_steps, tmp_path, capsys, content):
    (tmp_path / "a" / "log.csv").write_bytes(content)
    (tmp_path / "a" / "best.json").write_bytes(content)
    run(train, *three_steps)
    out = capsys.readouterr().out
    assert "best.json: is damaged" in out and "done at step 5" in out
    assert [row["step"] for row in log_rows(tmp_path / "a")] == ["4", "5"]


def test_a_log_with_a_byte_order_mark_goes_on(three_steps, tmp_path):
    log = tmp_path / "a" / "log.csv"
    log.write_bytes(b"\xef\xbb\xbf" + log.read_bytes())
    run(train, *three_steps)
    assert [row["step"] for row in log_rows(tmp_path / "a")] == ["1", "2", "3", "4", "5"]


# ----------------------------------------------------------------------------------------------------------------------
# Settings


def test_settings_that_change_on_purpose(three_steps, tmp_path, capsys):
    assert "lr was 0.001, now 0.5" in complaint(capsys, train, *three_steps, "--lr", 0.5)
    run(train, *three_steps, "--lr", 0.5, "--warmup", 0.5, "--steps", 6, "--override", "lr", "steps", "warmup")
    assert "steps 3 to 6" in capsys.readouterr().out and float(log_rows(tmp_path / "a")[-1]["lr"]) > 1e-3


@pytest.mark.parametrize("flags, said", [
    (("--lr", "inf"), "--lr inf: expected 0 .. 10"), (("--lr", "1e30"), "--lr 1e+30: expected 0 .. 10"),
    (("--l1", "nan"), "--l1 nan: expected at least 0"), (("--wd", "inf"), "--wd inf: expected 0 .. 100"),
    (("--clip", "0"), "--clip 0.0: expected at least 1e-06"), (("--l2", "-1"), "--l2 -1.0: expected at least 0"),
    (("--steps", 10**23), "expected 0 .. 1000000000"), (("--batch-size", 10**8), "expected 1 .. 1000000"),
    (("--size", 10**6), "expected 1 .. 8192"), (("--seed", 2**64), "--seed"),
    (("--epochs", 2), "--steps, --epochs: both say how long"), (("--json", "a.json"), "--json goes with --bench"),
    (("--out", ""), "--out: an empty text is no value"), (("--data", ""), "--data: an empty text is no value"),
    (("--override", "lr"), "--override: goes with --resume auto"),
    (("--resume", "auto", "--override", "speed"), "--override speed: no setting of that name"),
    (("--decoder-only",), "--decoder-only: goes with --init"),
    (("--patch-nums", 4, 2), "--patch-nums 4 2: expected sides that grow"),
], ids=lambda value: str(value[0]) if isinstance(value, tuple) else "")
def test_settings_that_cannot_be(flags, said, pictures, tmp_path, capsys):
    assert said in complaint(capsys, train, *VQ, "--data", pictures, "--steps", 1, "--out", tmp_path / "a", *flags)
    assert not (tmp_path / "a").exists()


def test_settings_that_exclude_each_other(tmp_path, capsys):
    for argv, said in ((("syncnet", "--study", "--bench"), "--bench, --study: each of these runs instead of training"),
                       (("latentsync", "--piece", 4, "--min-face", 9), "--min-face, --piece: goes with --prepare"),
                       (("vq", "--val-data", tmp_path / "nowhere"), "--val-data: goes with --data")):
        assert said in complaint(capsys, train, *argv)
    every = {name for model in recipes.RECIPES.values() for recipe in model.values() for name in recipe}
    assert {*recipes.INSTEAD_OF_TRAINING, *recipes.OF_PREPARE, *recipes.MAY_DIFFER} <= every


def test_weights_that_are_no_numbers_are_said(pictures, tmp_path, capsys, monkeypatch):
    """A run whose last step spoils the weights does not end as if nothing had happened."""
    after_step = tasks.TokenizerTask.after_step

    def spoil(self, step, lr, generator):
        if step == 1:
            self.model.decoder.conv_out.bias.data[0] = float("nan")
        return after_step(self, step, lr, generator)
    monkeypatch.setattr(tasks.TokenizerTask, "after_step", spoil)
    said = complaint(capsys, train, *VQ, "--data", pictures, "--steps", 2, "--ema", 0, "--out", tmp_path / "a")
    assert "the weights are not finite numbers any more" in said


def test_the_environment_of_many_processes(pictures, tmp_path, capsys, monkeypatch):
    argv = (*VQ, "--data", pictures, "--steps", 1, "--out", tmp_path / "a")
    for rank, world in (("x", "1"), ("0", "0"), ("2", "2"), ("-1", "2")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        assert f"RANK={rank} WORLD_SIZE={world}: expected 0 <= RANK < WORLD_SIZE" in complaint(capsys, train, *argv)
    monkeypatch.setenv("RANK", "0")
    assert "WORLD_SIZE=2 without MASTER_ADDR" in complaint(capsys, train, *argv)


# ----------------------------------------------------------------------------------------------------------------------
# Other ways to train


def test_only_the_decoder_learns(pictures, files, tmp_path):
    run(train, *VQ[:-2], "--data", pictures, "--init", files[1], "--decoder-only", "--warm-steps", 0, "--steps", 3,
        "--restart-after", 1, "--out", tmp_path / "a", "--ema", 0)
    before, after = vq.load(files[1]), vq.load(tmp_path / "a" / "model.safetensors")
    learnt = [name for name, p in after.named_parameters() if not torch.equal(p, dict(before.named_parameters())[name])]
    assert {name.split(".")[0] for name in learnt} == {"decoder", "post_quant_conv"}
    data = torch.rand(2, 3, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip(before.tokenize(data), after.tokenize(data)))


def test_another_schedule_of_scales(pictures, files, tmp_path, capsys):
    """Both parts learn it, or the run is refused before any work."""
    argv = ("var", "--size", 16, "--data", pictures, "--batch-size", 4, "--device", "cpu", "--steps", 1)
    said = complaint(capsys, train, *argv, "--vae", files[1], "--patch-nums", 1, 2, 4, "--out", tmp_path / "a")
    assert "was trained on the scales 1 2 3 4, but the model has 1 2 4; use --patch-nums 1 2 3 4" in said
    run(train, *VQ, "--data", pictures, "--steps", 1, "--patch-nums", 1, 2, 4, "--out", tmp_path / "vq")
    vae = tmp_path / "vq" / "model.safetensors"
    run(train, *argv, "--vae", vae, "--patch-nums", 1, 2, 4, "--out", tmp_path / "var")
    said = complaint(capsys, train, *argv, "--vae", vae, "--init", files[2], "--out", tmp_path / "b")
    assert "was trained on the scales 1 2 4" in said


def test_pixels_per_token_are_those_of_the_tokenizer(nets, tmp_path, capsys):
    """A tokenizer of stride 4: 16 x 16 tokens are 64 x 64 pixels. Its model draws them, and other sizes too."""
    argv = ("infinity", "--data", captioned(tmp_path / "captions"), "--vae", nets / "emoji_bsq.safetensors", "--device",
            "cpu", "--batch-size", 2, "--steps", 1, "--workers", 0, "--pixels", "0.06M", "--val-every", 0)
    run(train, *argv, "--sample-every", 0, "--out", tmp_path / "a")
    run(sample, "infinity", "--ckpt", tmp_path / "a" / "model.safetensors", "--vae", nets / "emoji_bsq.safetensors",
        "--device", "cpu", "--prompt", "noise", "-n", 1, "--out", tmp_path / "a.png")
    assert info(tmp_path / "a.png")[1]["size"] == "64x64"
    said = complaint(capsys, sample, "infinity", "--pixels", "1M")
    assert "--pixels 1M: emoji_infinity.safetensors draws pictures of one size only" in said


def test_tokenizers_of_other_kinds_are_refused_before_any_work(pictures, nets, tmp_path, capsys):
    out = tmp_path / "a"
    argv = ("--size", 16, "--data", pictures, "--batch-size", 4, "--device", "cpu", "--steps", 1, "--out", out)
    for name, vae, said in (("var", "single", "has one map of tokens per picture"),
                            ("var", "emoji_bsq", "tokens of bits"), ("var", "kl", "without tokens"),
                            ("llamagen", "emoji_vq", "tokens of several scales"),
                            ("llamagen", "emoji_bsq", "tokens of several scales")):
        assert said in complaint(capsys, train, name, *argv, "--vae", nets / f"{vae}.safetensors", "--cache-crops", "1")
    captions = captioned(tmp_path / "captions")
    said = complaint(capsys, train, "infinity", "--data", captions, "--vae", nets / "emoji_vq.safetensors", "--steps",
                     1, "--pixels", "0.06M", "--out", out, "--device", "cpu")
    assert "has tokens of codes, but this model needs" in said
    assert not list(out.glob("codes_*"))
