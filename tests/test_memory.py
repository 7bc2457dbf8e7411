"""Estimates of memory: what they are made of, and what happens when there is too little."""
from dataclasses import replace
from functools import partial

import pytest
import torch

import infinity
import llamagen
import sample
import train
import var
import vq
from helpers import complaint, tiny_llamagen
from lib import int8, memory
from lib.memory import Setting

pytestmark = pytest.mark.usefixtures("tiny_configs")

GUESS = Setting(training=True, bytes=4, batch=2)


def kept_for_backward(loss):
    """Bytes of the tensors that autograd keeps, without weights."""
    kept = {}

    def pack(x):
        if not isinstance(x, torch.nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x                        # storages must live, or addresses repeat
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss()
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def llamagen_loss(depth, checkpointing):
    config = llamagen.Config(depth=depth, width=128, heads=4, hidden=512, side=8, vocab_size=256, num_classes=10)
    model = vq.build(llamagen.LlamaGen, config).train()
    model.init_weights(torch.Generator().manual_seed(0))
    model.checkpointing = checkpointing
    tokens = torch.randint(256, (2, 64))
    return model, lambda: model.loss(torch.tensor([1, 2]), tokens)


def var_loss(depth, checkpointing):
    config = var.Config(depth=depth, width=128, heads=2, patch_nums=(1, 2, 4, 6), vocab_size=256, num_classes=10)
    model = vq.build(var.VAR, config).train()
    model.init_weights(generator=torch.Generator().manual_seed(0))
    model.checkpointing = checkpointing
    cells = sum(p * p for p in config.patch_nums)
    tokens = torch.randint(256, (2, cells))
    return model, lambda: model.loss(torch.tensor([1, 2]), tokens, torch.randn(2, cells - 1, 32))


@pytest.mark.parametrize("make", [llamagen_loss, var_loss])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations(make, checkpointing):
    """The estimate is within a third of what autograd keeps; with checkpointing there is one more block in it."""
    model, loss = make(6, checkpointing)
    setting = replace(GUESS, checkpointing=checkpointing)
    expected = memory.need(model, setting)["activations"]
    kept = kept_for_backward(loss)
    if checkpointing:
        one, of_one = make(1, False)
        kept += kept_for_backward(of_one)
    assert 0.67 < expected / kept < 1.5


def test_weights_and_optimizer():
    sketch = vq.on_meta(llamagen.LlamaGen, tiny_llamagen().config)
    numbers = sum(p.numel() for p in tiny_llamagen().parameters())
    assert memory.need(sketch, GUESS)["weights"] == 4 * numbers
    assert memory.need(sketch, replace(GUESS, ema=True))["optimizer"] == 16 * numbers
    drawing = replace(GUESS, training=False)
    quantized = tiny_llamagen()
    int8.quantize(quantized, "int8")
    bytes_held = sum(x.numel() * x.element_size() for name, x in quantized.state_dict().items() if "scale" not in name)
    assert abs(memory.need(sketch, replace(drawing, quantize=True))["weights"] - bytes_held) < 100


def test_what_does_not_fit(files, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1e3)
    argv = ("var", "--ckpt", files[2], "--vae", files[1], "--device", "cpu", "--out", tmp_path / "a.png", "-n", 4)
    line = complaint(capsys, sample, *argv)
    assert "VAR needs about" in line and "cpu has 0.0 GB free" in line and "with --batch-size 1" in line
    learn = partial(complaint, capsys, train, "var", "--size", 16, "--data", pictures, "--vae", files[1], "--device",
                    "cpu", "--steps", 1, "--batch-size", 4, "--out", tmp_path / "run")
    line = learn()
    assert "optimizer" in line and "with --checkpointing" in line and "--lora" in line
    line = learn("--checkpointing", "--lora", 2, "--quantize", "int8", "--init", files[2], "--accum", 4)
    assert "nothing here brings it down" in line


def test_running_out_all_the_same(files, tmp_path, capsys, monkeypatch):
    def fail(*inputs, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(var.VAR, "sample", fail)
    line = complaint(capsys, sample, "var", "--ckpt", files[2], "--vae", files[1], "--device", "cpu", "--out",
                     tmp_path / "a.png", "-n", 4)
    assert "out of memory on cpu: VAR should need about" in line and "with --batch-size 1" in line


def test_ways_out_of_released_sizes():
    """The numbers that people ask for: what fits into 12 and 16 GB."""
    two = vq.on_meta(infinity.Infinity, infinity.CONFIGS["infinity_2b"])
    full = Setting(training=True, bytes=2, batch=1, pixels="0.25M", checkpointing=True, ema=True)
    assert 30e9 < sum(memory.need(two, full).values()) < 60e9
    small = replace(full, lora=16, lora_layers=("qkv", "proj", "fc1", "fc2"), quantize=True, ema=False)
    assert sum(memory.need(two, small).values()) < 12e9
    eight = vq.on_meta(infinity.Infinity, infinity.CONFIGS["infinity_8b"])
    drawing = Setting(training=False, bytes=2, batch=1, pixels="0.25M")
    assert sum(memory.need(eight, drawing).values()) > 16e9 > sum(
        memory.need(eight, replace(drawing, quantize=True)).values())
