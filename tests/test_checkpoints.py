"""Checkpoints that somebody else has made: wrapped, renamed, incomplete, damaged, or no checkpoints at all."""
import argparse
import io
import json
import math
import os
import pickle
import re
import stat
import zipfile
from pathlib import PosixPath

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import infinity
import llamagen
import sample
import syncnet
import var
import vq
from helpers import (SYNCNET_CONFIG, VAR_CONFIG, complaint, run, same, shards, tiny_bits, tiny_infinity,
                     tiny_llamagen, tiny_single, tiny_syncnet, tiny_tokenizer, tiny_var)
from lib.weights import fetch_from_hub, has_all_weights

# Of each kind of file: the loader, and the official state dict of a tiny model with what no shape tells.
KINDS = {
    "var": (lambda path, **o: var.load(path, **o), lambda: var.export(tiny_var())),
    "llamagen": (lambda path, **o: llamagen.load(path, side=4, heads=2, **o),
                 lambda: llamagen.export(tiny_llamagen())),
    "infinity": (lambda path, **o: infinity.load(path, **o), lambda: infinity.export(tiny_infinity(t5=None))),
    "syncnet": (lambda path, **o: syncnet.load(path, config=SYNCNET_CONFIG, **o),
                lambda: syncnet.export(tiny_syncnet())),
    "vq": (lambda path, **o: vq.load(path, patch_nums=(1, 2, 3, 4), **o), lambda: vq.export(tiny_tokenizer())),
    "single": (lambda path, **o: vq.load(path, patch_nums=(4,), **o), lambda: vq.export(tiny_single())),
    "bits": (lambda path, **o: vq.load(path, **o), lambda: vq.export(tiny_bits())),
}
LOADERS = ["var", "llamagen", "infinity", "syncnet", "vq"]                 # one kind for each


@pytest.fixture(scope="module")
def official():
    """{kind: official state dict}"""
    return {kind: make() for kind, (_, make) in KINDS.items()}


def moved(state, by=1.0):
    """The same weights, other values: what an average differs by."""
    return {k: v + by if v.is_floating_point() else v for k, v in state.items()}


def loaded(kind, path, **options):
    model = KINDS[kind][0](path, **options)
    return model, {k: v.float() for k, v in model.state_dict().items()}


# ----------------------------------------------------------------------------------------------------------------------
# Wrappings


@pytest.mark.parametrize("kind", LOADERS)
def test_every_wrapping_of_every_model(kind, official, tmp_path):
    """The weights are found under any name and behind any prefix."""
    state = official[kind]
    torch.save(state, tmp_path / "plain.pth")
    _, expected = loaded(kind, tmp_path / "plain.pth")
    prefixed = {f"module._orig_mod.{k}": v for k, v in state.items()}
    wrapped = {
        "lightning.ckpt": {"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 3},
        "ddp.pt": {"model_state_dict": prefixed},
        "compiled.pt": {"net": {k.replace(".0.", ".0._orig_mod."): v for k, v in state.items()}},
        "deepspeed.pt": {"module": state, "lr_scheduler": None},
        "beside.pth": state | {"epoch": 7, "best": np.float64(0.5), "out": PosixPath("/runs/a"), "n": np.int32(3)},
        "ema.pt": {"ema": state, "steps": 10},
        "flags.pt": {"model": state, "args": argparse.Namespace(lr=1e-4), "score": np.float32(1.5)},
    }
    for name, content in wrapped.items():
        torch.save(content, tmp_path / name)
        assert same(loaded(kind, tmp_path / name)[1], expected), name
    save_file({k: v.contiguous() for k, v in prefixed.items()}, tmp_path / "prefixed.safetensors")
    model, found = loaded(kind, tmp_path / "prefixed.safetensors")
    assert same(found, expected) and model.origin == "names without _orig_mod. module."
    (tmp_path / "folder").mkdir()
    os.replace(tmp_path / "lightning.ckpt", tmp_path / "folder" / "last.ckpt")
    assert same(loaded(kind, tmp_path / "folder")[1], expected)


@pytest.mark.parametrize("kind", LOADERS)
def test_averaged_weights_come_first(kind, official, tmp_path):
    state, average = official[kind], moved(official[kind], 0.25)
    torch.save({"model": state, "ema": average, "optimizer": {}}, tmp_path / "both.pt")
    torch.save(average, tmp_path / "average.pt")
    torch.save(state, tmp_path / "trained.pt")
    model, found = loaded(kind, tmp_path / "both.pt")
    assert same(found, loaded(kind, tmp_path / "average.pt")[1]) and model.origin == "'ema' of ema and model"
    assert same(found, loaded(kind, tmp_path / "both.pt", weights="ema")[1])
    model, found = loaded(kind, tmp_path / "both.pt", weights="model")
    assert same(found, loaded(kind, tmp_path / "trained.pt")[1]) and model.origin == "'model' of ema and model"
    with pytest.raises(vq.CheckpointError, match="trained.pt: has no averaged weights"):
        loaded(kind, tmp_path / "trained.pt", weights="ema")


def test_containers_of_the_originals_training(official, tmp_path):
    """Infinity's trainer with an average; its tokenizers, whose `ema` the original reads only if asked to."""
    average = moved(official["infinity"], 0.25)
    torch.save({"trainer": {"gpt_fsdp": official["infinity"], "gpt_ema_fsdp": average}}, tmp_path / "a.pth")
    torch.save({"vae": official["bits"], "ema": moved(official["bits"])}, tmp_path / "vae.pth")
    torch.save(average, tmp_path / "average.pth")
    torch.save(official["bits"], tmp_path / "bits.pth")
    assert same(loaded("infinity", tmp_path / "a.pth")[1], loaded("infinity", tmp_path / "average.pth")[1])
    assert not same(loaded("infinity", tmp_path / "a.pth", weights="model")[1],
                    loaded("infinity", tmp_path / "average.pth")[1])
    assert same(loaded("bits", tmp_path / "vae.pth")[1], loaded("bits", tmp_path / "bits.pth")[1])


def test_the_summary_line_says_which_weights(official, files, tmp_path, capsys):
    torch.save({"model": official["var"], "ema": moved(official["var"], 0.01)}, tmp_path / "both.pth")
    argv = ("var", "--ckpt", tmp_path / "both.pth", "--vae", files[1], "--device", "cpu", "-n", 1, "--out",
            tmp_path / "a.png")
    run(sample, *argv)
    assert "weights: 'ema' of ema and model" in capsys.readouterr().out
    run(sample, *argv, "--weights", "model")
    assert "weights: 'model' of ema and model" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# What no tensor tells


@pytest.mark.parametrize("name, flags, side", [
    ("XL.pt", {"image_size": 256, "downsample_size": 16}, 16), ("XL.pt", {"image_size": 512, "downsample_size": 8}, 64),
    ("c2i_XL_256.pt", {}, 16), ("my-512px.pt", {}, 32), ("c2i_XL_384.pt", {}, 24), ("t2i_XL_stage2_512.pt", {}, 32),
    ("c2i_XL_384.pt", {"image_size": 256}, 16), ("epoch_0300000.pt", {}, None), ("XL.pt", {"image_size": "big"}, None),
    ("XL.pt", {"image_size": 250}, None)])
def test_the_size_of_llamagen_pictures(name, flags, side):
    """What the file says, then its name, and nothing else: depth and width do not tell it."""
    if side is not None:
        assert llamagen.side_of(name, flags, {24}) == side
        return
    with pytest.raises(vq.CheckpointError, match=r"tells the size of its pictures: give --size, in pixels \(384\)"):
        llamagen.side_of(name, flags, {24})


def test_llamagen_files_with_flags(official, tmp_path):
    state = {k: v for k, v in official["llamagen"].items() if k != "freqs_cis"}
    torch.save({"model": state, "args": argparse.Namespace(image_size=128, downsample_size=8)}, tmp_path / "a.pt")
    assert llamagen.load(tmp_path / "a.pt", heads=2).config.side == 16
    torch.save({"model": state, "args": {"image_size": 64}}, tmp_path / "b.pt")
    assert llamagen.load(tmp_path / "b.pt", heads=2).config.side == 4


# ----------------------------------------------------------------------------------------------------------------------
# Headers


HEADERS = [
    {"depth": 10**9}, {"width": 10**9}, {"patch_nums": []}, {"patch_nums": "abc"}, {"patch_nums": None}, {"heads": 0},
    {"patch_nums": [-1]}, {"patch_nums": [10**6] * 4}, {"depth": None}, {"depth": 2.0}, {"depth": True},
    {"width": "64"}, {"norm_eps": float("nan")}, {"shared_adaln": "yes"}, {"colour": 3}, {"heads": 3}, {"mlp_ratio": 0}]


@pytest.mark.parametrize("change", HEADERS, ids=str)
def test_headers_are_checked_before_anything_is_allocated(change, files, tmp_path, capsys):
    """Nonsense in a header: the sizes are read off the tensors where they suffice, else it is one line."""
    with_config = json.loads(json.dumps(vars(VAR_CONFIG) | change))
    state = load_file(files[2])
    save_file(state, tmp_path / "a.safetensors", {"config": json.dumps(with_config)})
    argv = ("var", "--ckpt", tmp_path / "a.safetensors", "--vae", files[1], "--device", "cpu", "-n", 1, "--out",
            tmp_path / "a.png")
    try:
        run(sample, *argv)
        assert "sizes from its tensors, because the config in its header is not one" in capsys.readouterr().out
    except SystemExit as e:
        assert e.code == 2
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert err.startswith("error: ") and "a.safetensors" in err


def test_a_foreign_header_is_ignored(official, tmp_path):
    state = {k: v.contiguous() for k, v in official["var"].items()}
    for text in ("{", "[1]", "null", '{"model_type": "bert"}', "[" * 100000):
        save_file(state, tmp_path / "a.safetensors", {"config": text})
        model = var.load(tmp_path / "a.safetensors")
        assert "the config in its header is not one of this model" in model.origin


@pytest.mark.parametrize("key, value", [
    ("classes", '"cat,dog"'), ("classes", "[1, 2]"), ("classes", "{"), ("show", "3"), ("sampling", "[4]"),
    ("sampling", '{"cfg": [1, 2]}'), ("sampling", '{"speed": 1}'), ("sampling", '{"cfg": 1e300}'),
    ("tokenizer", "[]"), ("pixels", '"9M"'), ("text_encoder", "[]")])
def test_other_entries_of_headers(key, value, files, tmp_path, capsys):
    save_file(load_file(files[2]), tmp_path / "a.safetensors", {"config": json.dumps(vars(VAR_CONFIG)), key: value})
    said = complaint(capsys, sample, "var", "--ckpt", tmp_path / "a.safetensors", "--vae", files[1], "--device", "cpu")
    assert f"a.safetensors: '{key}' in its header is" in said and "expected" in said


# ----------------------------------------------------------------------------------------------------------------------
# Incomplete and damaged


@pytest.mark.parametrize("kind", KINDS)
def test_every_missing_or_misshapen_tensor_is_one_line(kind, official, tmp_path, monkeypatch):
    """Each tensor in turn is left out, and given another rank. Of tensors that blocks repeat the first one is."""
    state = official[kind]
    content = {}
    monkeypatch.setattr(vq, "_check_file", lambda path: None)               # no file is written, which is slow
    monkeypatch.setattr(vq, "_read_pickle", lambda path: dict(content))
    first = {re.sub(r"\d+", "#", key): key for key in reversed(state)}
    allowed_to_miss = ("lvl_1L", "attn_bias", "freqs_cis", "hits", "codebook_used", "lfq.mask", "ema_vocab_hit",
                       "num_batches", "zero_k_bias")
    for key in first.values():
        without = {k: v for k, v in state.items() if k != key}
        for content in (without, state | {key: state[key][None]}, state | {key: state[key].flatten()[:1]}):
            try:
                KINDS[kind][0](tmp_path / "a.pth")
            except vq.CheckpointError as e:
                assert "a.pth" in str(e) and "\n" not in str(e), key
            else:
                assert any(part in key for part in allowed_to_miss), key


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_no_numbers(kind, value, official, tmp_path):
    state = dict(official[kind])
    key = max((k for k, v in state.items() if v.is_floating_point() and "hit" not in k), key=lambda k: state[k].numel())
    state[key] = state[key].clone()
    state[key].view(-1)[-1] = value
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(vq.CheckpointError, match="a.pth: .* holds values that are no finite numbers"):
        KINDS[kind][0](tmp_path / "a.pth")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.int64])
def test_weights_of_other_types(dtype, official, tmp_path):
    torch.save({k: v.to(dtype) if v.ndim > 1 and k != "lvl_1L" else v for k, v in official["var"].items()},
               tmp_path / "a.pth")
    with pytest.raises(vq.CheckpointError, match="not in floating point: .* is " + str(dtype)[6:]):
        var.load(tmp_path / "a.pth")


class Attack:
    def __reduce__(self):
        return open, ("/nowhere/at/all", "w")


def zipped(name, content, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as z:
        z.writestr(name, content)
    return buffer.getvalue()


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("content, said", [
    (b"<!DOCTYPE html><html>log in", "is a web page"), (b"\n <HTML>", "is a web page"), (b"", "is empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a pointer of git-lfs"),
    (b"Please download it by hand", "is not a PyTorch file"), (b"PK", "truncated"), (b"\x80\x02", "truncated"),
    (zipped("photo.jpg", b"1234"), "is a zip archive of other files"),
    (zipped("archive/data.pkl", bytes(10**6), zipfile.ZIP_DEFLATED), "is compressed"),
    (pickle.dumps(Attack()), "refused: loading it would run code"), (saved([1, 2]), "no state dict in it"),
    (saved({"model": 3}), "no state dict in it"), (saved({"weight": torch.ones(2)}), "not a VAR transformer"),
    (saved({"a": torch.ones(9)})[:300], "truncated")], ids=lambda value: value if isinstance(value, str) else "")
def test_files_of_other_kinds(content, said, tmp_path):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(vq.CheckpointError, match=f"a.pth: .*{said}"):
        var.load(tmp_path / "a.pth")
    if content[:2] != b"PK":
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(vq.CheckpointError, match="a.safetensors: "):
            var.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("names", [["../a.safetensors"], ["/etc/passwd"], ["model.safetensors.index.json"], [3], [""],
                                   ["sub/a.safetensors"], None])
def test_an_index_names_only_files_beside_it(names, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    entries = {f"weight{i}": name for i, name in enumerate(names)} if names else names
    index.write_text(json.dumps({"weight_map": entries}))
    for read in (lambda: var.load(tmp_path), lambda: has_all_weights(tmp_path)):
        with pytest.raises(vq.CheckpointError, match="index.json: not an index of shards"):
            read()


def test_a_damaged_index_in_the_cache_of_the_hub_is_named(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map"')
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: tmp_path)
    with pytest.raises(vq.CheckpointError, match="index.json: not an index of shards"):
        fetch_from_hub("flan-t5-xl", download=True)


def test_shards_are_unwrapped_as_one(official, tmp_path):
    folder = shards(tmp_path / "folder", {f"module.{k}": v.contiguous() for k, v in official["var"].items()})
    assert var.load(folder).origin == "names without module."


# ----------------------------------------------------------------------------------------------------------------------
# Files that others may read


def test_files_are_for_those_whom_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        vq.save(tiny_single(), tmp_path / "a.safetensors")
        with vq.atomic(tmp_path / "a.json") as temporary:
            temporary.write_text("{}")
    finally:
        os.umask(before)
    for name in ("a.safetensors", "a.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(tmp_path):
    for name in ("a.safetensors", "a.pth"):
        (tmp_path / name).write_bytes(b"PK")
        (tmp_path / name).chmod(0)
        with pytest.raises(vq.CheckpointError, match=f"{name}: cannot be read .permission denied."):
            var.load(tmp_path / name)
