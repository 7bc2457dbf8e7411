"""Shared by all tests: the project on the path, and a tiny random model that samples in milliseconds."""
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import infinity
import llamagen
import triton_ops
import var
import vq

VQ_CONFIG = vq.Config(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=8, vocab_size=32, patch_nums=(1, 2, 3, 4))
VAR_CONFIG = var.Config(depth=2, width=64, heads=2, patch_nums=(1, 2, 3, 4), num_classes=5, vocab_size=32, z_channels=8)


BITS_CONFIG = replace(vq.CONFIGS["emoji_bsq"], z_channels=6, patch_nums=(1, 2, 4))
INFINITY_CONFIG = infinity.Config(depth=2, width=64, heads=2, bits=6, text_width=128, text_maxlen=32, levels=5, chunks=1)
T5_CONFIG = infinity.T5Config(vocab_size=259, width=128, layers=2, heads=2, head_dim=16, hidden=32)
SCALES = ((1, 1), (2, 2), (4, 4))
SINGLE_CONFIG = replace(vq.CONFIGS["emoji_vq_single"], vocab_size=32, patch_nums=(4,))
CLASS_CONFIG = llamagen.Config(depth=2, width=32, heads=2, hidden=48, side=4, vocab_size=32, num_classes=5)
TEXT_CONFIG = replace(CLASS_CONFIG, num_classes=0, text_width=128, text_slots=6)


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


def tiny_vq(config, **changes):
    """A random tokenizer of 16 x 16 pixels."""
    model = vq.VQVAE(replace(config, **changes)).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    return model


tiny_tokenizer = partial(tiny_vq, VQ_CONFIG)            # 30 tokens on four scales
tiny_bits = partial(tiny_vq, BITS_CONFIG)               # 21 tokens of 6 bits on three scales
tiny_single = partial(tiny_vq, SINGLE_CONFIG)           # 16 tokens


def tiny_var(**changes):
    """Gates of order one: with the training initialisation a random model would hardly depend on its input."""
    model = var.VAR(replace(VAR_CONFIG, **changes)).eval()
    g = torch.Generator().manual_seed(1)
    model.init_weights(init_gamma=1.0, generator=g)
    with torch.no_grad():
        model.head.weight.normal_(0, 0.3, generator=g)
        for block in model.blocks:
            if not model.config.shared_adaln:
                block.adaln.weight.normal_(0, 0.3, generator=g)
    return model


def tiny_infinity(t5=T5_CONFIG, **changes):
    """Gates of order one, as in tiny_var, and a text that matters."""
    model = infinity.Infinity(replace(INFINITY_CONFIG, **changes), t5).eval()
    g = torch.Generator().manual_seed(1)
    model.init_weights(init_gamma=1.0, generator=g)
    with torch.no_grad():
        model.head.weight.normal_(0, 0.3, generator=g)
        model.text_out.weight.normal_(0, 0.3, generator=g)
    return model


def tiny_llamagen(text=False, t5=None, **changes):
    """Weights large enough for logits that differ, and an output that is not zero."""
    model = llamagen.LlamaGen(replace(TEXT_CONFIG if text else CLASS_CONFIG, **changes), t5).eval()
    g = torch.Generator().manual_seed(1)
    model.init_weights(g)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and not name.startswith("text_encoder."):
                p.normal_(0, 0.4, generator=g)
    return model


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model():
    return tiny_var()


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """(folder, tokenizer file, model file) as `sample.py` takes them."""
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
    folder, tokenizer = tmp_path_factory.mktemp("tiny_tokens"), tiny_single()
    vq.save(tokenizer, folder / "emoji_vq_single.safetensors")
    extra = dict(tokenizer=vq.fingerprint(tokenizer), sampling={"top_k": 0, "cfg": 2.0})
    llamagen.save(tiny_llamagen(), folder / "classes.safetensors", classes=["cat", "dog", "owl", "fox", "bee"], **extra)
    t5 = infinity.T5Encoder(T5_CONFIG)
    llamagen.save(tiny_llamagen(text=True, t5=t5), folder / "text.safetensors", show=["a cat", "a red dog"],
                  text_encoder=asdict(T5_CONFIG), **extra)
    return folder, folder / "emoji_vq_single.safetensors", folder / "classes.safetensors", folder / "text.safetensors"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
