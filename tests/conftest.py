"""Fixtures that several test modules share, and which tests run where."""
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

# Threads would wait for each other longer than they compute on networks this small, above all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))

import helpers
import infinity
import latentsync
import llamagen
import syncnet
import triton_ops
import var
import vq
from helpers import (T5_CONFIG, tiny_bits, tiny_infinity, tiny_llamagen, tiny_single, tiny_syncnet, tiny_tokenizer,
                     tiny_var)
from lib import videomae
from lib.text import T5Encoder


def pytest_collection_modifyitems(items):
    for item in items:
        if {"av", "raw"} & set(item.fixturenames):
            item.add_marker(pytest.mark.video)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "kernel" in item.keywords and not triton_ops.INTERPRET:
            item.add_marker(pytest.mark.skip(reason="runs in test_kernels_in_the_interpreter's process"))


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model():
    return tiny_var()


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """(folder, tokenizer file, model file) as `sample.py var` takes them."""
    folder = tmp_path_factory.mktemp("tiny")
    vq.save(tiny_tokenizer(), folder / "emoji_vq.safetensors")
    var.save(tiny_var(), folder / "model.safetensors", classes=["cat", "dog", "owl", "fox", "bee"])
    return folder, folder / "emoji_vq.safetensors", folder / "model.safetensors"


@pytest.fixture(scope="session")
def text_files(tmp_path_factory):
    """(folder, bitwise tokenizer file, Infinity file with its own text encoder) as `sample.py infinity` takes them."""
    folder = tmp_path_factory.mktemp("tiny_text")
    tokenizer = tiny_bits()
    vq.save(tokenizer, folder / "emoji_bsq.safetensors")
    infinity.save(tiny_infinity(), folder / "model.safetensors", show=["a cat", "a red dog"], sampling={"tau": 1.0},
                  tokenizer=vq.fingerprint(tokenizer), pixels=None)
    return folder, folder / "emoji_bsq.safetensors", folder / "model.safetensors"


@pytest.fixture(scope="session")
def token_files(tmp_path_factory):
    """(folder, single-scale tokenizer, LlamaGen of classes, LlamaGen of text with its own text encoder)."""
    folder = tmp_path_factory.mktemp("tiny_tokens")
    tokenizer = tiny_single()
    vq.save(tokenizer, folder / "emoji_vq_single.safetensors")
    extra = dict(tokenizer=vq.fingerprint(tokenizer), sampling={"top_k": 0, "cfg": 2.0})
    llamagen.save(tiny_llamagen(), folder / "classes.safetensors", classes=["cat", "dog", "owl", "fox", "bee"], **extra)
    llamagen.save(tiny_llamagen(text=True, t5=T5Encoder(T5_CONFIG)), folder / "text.safetensors",
                  show=["a cat", "a red dog"], text_encoder=asdict(T5_CONFIG), **extra)
    return folder, folder / "emoji_vq_single.safetensors", folder / "classes.safetensors", folder / "text.safetensors"


@pytest.fixture(scope="session")
def dub_parts():
    """Tiny UNet, autoencoder and Whisper of LatentSync."""
    return (helpers.tiny(latentsync.UNet, helpers.UNET_CONFIG), helpers.tiny(vq.KLAutoencoder, helpers.KL_CONFIG),
            helpers.tiny(latentsync.Whisper, helpers.WHISPER_CONFIG))


@pytest.fixture(scope="session")
def dub_files(dub_parts, tmp_path_factory):
    """A folder with these three as train.py writes them, named so that the first finds the others."""
    folder = tmp_path_factory.mktemp("latentsync")
    latentsync.save(dub_parts[0], folder / "dub.safetensors", tokenizer=vq.fingerprint(dub_parts[1]))
    vq.save(dub_parts[1], folder / "talking_head_kl.safetensors")
    latentsync.save(dub_parts[2], folder / "talking_head_whisper.safetensors")
    return folder


@pytest.fixture(scope="session")
def judge_file(tmp_path_factory):
    """A tiny StableSyncNet."""
    path = tmp_path_factory.mktemp("syncnet") / "tiny.safetensors"
    syncnet.save(tiny_syncnet(), path)
    return path


@pytest.fixture(scope="session")
def nets(tmp_path_factory):
    """A folder with every frozen network that training needs."""
    folder = tmp_path_factory.mktemp("nets")
    vq.save(tiny_tokenizer(), folder / "emoji_vq.safetensors")
    vq.save(tiny_bits(), folder / "emoji_bsq.safetensors")
    vq.save(tiny_single(), folder / "single.safetensors")
    syncnet.save(tiny_syncnet(config=helpers.JUDGE_CONFIG), folder / "sync.safetensors")
    videomae.save(helpers.tiny(videomae.VideoMAE, helpers.VIDEOMAE_CONFIG), folder / "eye.safetensors")
    latentsync.save(helpers.tiny(latentsync.UNet, replace(helpers.UNET_CONFIG, resolution=16, motion="none")),
                    folder / "stage1.safetensors")
    latentsync.save(helpers.tiny(latentsync.Whisper, helpers.WHISPER_CONFIG), folder / "ear.safetensors")
    vq.save(helpers.tiny(vq.KLAutoencoder, helpers.KL_CONFIG), folder / "kl.safetensors")
    return folder


@pytest.fixture
def av():
    return pytest.importorskip("av", reason="PyAV is optional; .ci/run installs it and runs these tests once more")


@pytest.fixture
def tiny_configs(monkeypatch):
    """Tiny networks in place of the demo's, for training."""
    helpers.make_tiny(monkeypatch)


@pytest.fixture
def pictures(tmp_path):
    """A folder with 40 pictures in two classes, one of them broken."""
    rng = np.random.default_rng(0)
    for c in ("circle", "square"):
        (tmp_path / "data" / c).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / c / f"{i:02d}.png")
    (tmp_path / "data" / "circle" / "07.png").write_bytes(b"broken")
    return tmp_path / "data"
