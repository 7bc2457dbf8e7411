"""LoRA: what it learns is what the whole layer would learn, files, and how they are used."""
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import helpers
import infinity
import latentsync
import llamagen
import sample
import train
import var
import vq
from helpers import complaint, run, same, tiny_infinity, tiny_llamagen, tiny_var
from lib import int8, lora
from lib.console import UserError

pytestmark = pytest.mark.usefixtures("tiny_configs")

LAYERS = ("qkv", "proj", "fc1", "fc2")
TOKENS = ("llamagen", "--batch-size", 4, "--device", "cpu", "--log-every", 1, "--size", 16)
VAR = ("var", "--size", 16, "--batch-size", 4, "--device", "cpu", "--log-every", 1, "--cache-crops", 1)


def fill(model, seed=0):
    """Give B values, as if something had been learnt."""
    g = torch.Generator().manual_seed(seed)
    for layer in lora.adapted_layers(model).values():
        layer.lora_B.data.normal_(0, 0.1, generator=g)


def teacher_input(model):
    """Cells of f_hat that VAR reads, (2, L - first scale, Cv)."""
    n = sum(p * p for p in model.config.patch_nums) - model.config.patch_nums[0] ** 2
    return torch.randn(2, n, model.config.z_channels, generator=torch.Generator().manual_seed(0))


def llamagen_logits(model):
    tokens = torch.arange(30).reshape(2, 15) % model.config.vocab_size
    return model(torch.tensor([0, 3]), tokens)


def text_logits(model):
    text = torch.randn(2, 6, model.config.text_width, generator=torch.Generator().manual_seed(0))
    return model(text, torch.arange(30).reshape(2, 15) % model.config.vocab_size)


def test_a_fresh_one_changes_nothing_and_learns_as_the_layer_would():
    model = tiny_llamagen().eval()
    before = llamagen_logits(model)
    twin = tiny_llamagen().eval()
    lora.wrap(model, 4, 8.0, LAYERS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(llamagen_logits(model), before)
    fill(model)
    for name, layer in lora.adapted_layers(model).items():                  # the same weights in an ordinary model
        weight = twin.get_submodule(name).weight
        weight.data = layer.layer.weight.detach() + layer.scale * layer.lora_B.detach() @ layer.lora_A.detach()
    targets = torch.arange(32).reshape(2, 16) % model.config.vocab_size
    for one in (model, twin):
        one.loss(torch.tensor([0, 3]), targets)[0].backward()
    for name, layer in lora.adapted_layers(model).items():                  # dA = s B^T dW, dB = s dW A^T
        gradient = twin.get_submodule(name).weight.grad
        torch.testing.assert_close(layer.lora_A.grad, layer.scale * layer.lora_B.T @ gradient, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.lora_B.grad, layer.scale * gradient @ layer.lora_A.T, atol=1e-5, rtol=1e-4)
        assert layer.layer.weight.grad is None


def test_full_rank_reproduces_the_gradient_of_the_layer():
    linear = torch.nn.Linear(12, 20)
    model = torch.nn.Sequential(linear)
    x = torch.randn(7, 12)
    model(x).square().sum().backward()
    expected = linear.weight.grad.clone()
    lora.wrap(model, 12, 12.0, ("0",))
    layer = model[0]
    layer.lora_A.data = torch.eye(12)                                       # then W + B A = W + B
    model(x).square().sum().backward()
    torch.testing.assert_close(layer.lora_B.grad, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make, logits, rounding", [
    (tiny_llamagen, llamagen_logits, 2e-5),
    (partial(tiny_llamagen, text=True), text_logits, 5e-5),                 # more rows, logits up to 8: 2.7e-5 found
    (tiny_var, lambda m: m(torch.tensor([0, 1]), teacher_input(m)), 2e-5),
], ids=["llamagen", "llamagen-text", "var"])
def test_merged_equals_unmerged(make, logits, rounding, tmp_path):
    model = make().eval()
    base = logits(model)
    lora.wrap(model, 3, 6.0, LAYERS, generator=torch.Generator().manual_seed(0))
    fill(model)
    path = tmp_path / "a.safetensors"
    lora.save(model, path)
    with torch.no_grad():
        expected = logits(model)
        merged = make().eval()
        lora.add(merged, [str(path)], "base")
        assert (logits(merged) - expected).abs().max() < rounding < (base - expected).abs().max()
        twice = make().eval()
        if hasattr(model, lora.CLASSES):                                    # two tables of classes do not add up
            with pytest.raises(UserError, match="give one of them"):
                lora.add(twice, [f"{path}:0.25", f"{path}:0.75"], "base")
        else:
            lora.add(twice, [f"{path}:0.25", f"{path}:0.75"], "base")
            assert (logits(twice) - expected).abs().max() < rounding
        untouched = make().eval()
        lora.add(untouched, [f"{path}:0"], "base")
        assert torch.equal(logits(untouched), base)


def test_a_run_learns_little_resumes_and_draws(token_files, pictures, tmp_path, capsys):
    argv = (*TOKENS, "--data", pictures, "--vq", token_files[1], "--init", token_files[2], "--lora", 2,
            "--lora-alpha", 4, "--steps", 4, "--cache-crops", 1, "--ema", 0.5)
    run(train, *argv, "--out", tmp_path / "whole")
    run(train, *argv, "--out", tmp_path / "parts", "--stop-after", 2)
    run(train, *argv, "--out", tmp_path / "parts", "--resume", "auto")
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "parts")]
    learnt = [load_file(file) for file in files]
    assert same(*learnt) and all("lora" in key or "class_embed" in key for key in learnt[0])
    config = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 4.0, sorted(LAYERS))
    out = ("--vq", token_files[1], "--device", "cpu", "--classes", "square", "--seed", 3)
    run(sample, "llamagen", "--ckpt", token_files[2], "--lora", tmp_path / "whole", *out, "--out", tmp_path / "a.png")
    merged = tmp_path / "merged.safetensors"
    run(sample, "llamagen", "--ckpt", token_files[2], "--lora", files[0], "--vq", token_files[1], "--device", "cpu",
        "--merge", merged)
    run(sample, "llamagen", "--ckpt", merged, *out, "--out", tmp_path / "b.png")
    assert np.array_equal(*(np.array(Image.open(tmp_path / name)) for name in ("a.png", "b.png")))
    capsys.readouterr()
    say = partial(complaint, capsys, sample, "llamagen", *out, "--out", tmp_path / "c.png")
    assert "is part of" in say("--ckpt", merged, "--lora", files[0])
    assert "was not learnt on the weights of" in say("--ckpt", other_weights(tmp_path), "--lora", files[0])
    assert "expected FILE or FILE:STRENGTH" in say("--ckpt", token_files[2], "--lora", f"{files[0]}:much")
    assert "not a LoRA" in say("--ckpt", token_files[2], "--lora", token_files[2])


def other_weights(folder):
    """A LlamaGen with the same sizes and other weights."""
    model = tiny_llamagen()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    llamagen.save(model, folder / "other.safetensors")
    return folder / "other.safetensors"


@pytest.mark.parametrize("argv, nets, prompt", [
    ((*TOKENS, "--cache-crops", 1), "token_files", ("llamagen", "--classes", "square")),
    (VAR, "files", ("var", "--classes", "square")),
    (("infinity", "--size", 16, "--batch-size", 4, "--device", "cpu", "--log-every", 1), "text_files",
     ("infinity", "--prompt", "a cat")),
], ids=["llamagen", "var", "infinity"])
def test_a_quantized_base_learns_and_draws(argv, nets, prompt, pictures, tmp_path, request):
    _, tokenizer, model, *_ = request.getfixturevalue(nets)
    if argv[0] != "infinity":
        argv = (*argv, "--data", pictures)
    run(train, *argv, "--vae", tokenizer, "--init", model, "--lora", 2, "--quantize", "int8", "--steps",
        2, "--out", tmp_path / "run")
    learnt = load_file(tmp_path / "run" / "model.safetensors")
    assert any(x.abs().max() > 0 for key, x in learnt.items() if "lora_B" in key)
    run(sample, *prompt, "--ckpt", model, "--vae", tokenizer, "--lora", tmp_path / "run", "--quantize", "int8",
        "--device", "cpu", "--out", tmp_path / "a.png")


def test_of_another_model(token_files, text_files, tmp_path, capsys):
    model = tiny_infinity()
    lora.wrap(model, 2, 2.0, ("qkv", "q"))
    infinity_lora = tmp_path / "i.safetensors"
    lora.save(model, infinity_lora)
    say = partial(complaint, capsys, sample, "llamagen", "--ckpt", token_files[2], "--vq", token_files[1], "--device",
                  "cpu", "--out", tmp_path / "a.png", "--lora")
    assert "it is of another model" in say(infinity_lora)
    tell = partial(complaint, capsys, train, *TOKENS, "--vq", token_files[1], "--out", tmp_path / "a")
    assert "Give the weights as --init" in tell("--lora", 2)
    assert "more than the rank of" in tell("--lora", 500, "--init", token_files[2])
    assert "choose some of qkv, proj" in tell("--lora", 2, "--init", token_files[2], "--lora-layers", "to_q")


def test_merged_into_a_unet(nets, tmp_path):
    base = nets / "stage1.safetensors"
    model = latentsync.load(base)
    lora.wrap(model, 2, 4.0, ("qkv", "query", "key_value", "proj"))
    fill(model)
    lora.save(model, tmp_path / "a.safetensors")
    run(sample, "latentsync", "--ckpt", base, "--lora", tmp_path / "a.safetensors", "--merge",
        tmp_path / "merged.safetensors")
    merged = latentsync.load(tmp_path / "merged.safetensors")
    assert merged.config == model.config
    for name, layer in lora.adapted_layers(model).items():
        expected = layer.layer.weight + layer.scale * layer.lora_B @ layer.lora_A
        torch.testing.assert_close(merged.get_submodule(name).weight, expected)


def test_flags_that_exclude_each_other(files, tmp_path, capsys):
    say = partial(complaint, capsys, sample, "var", "--device", "cpu", "--out", tmp_path / "a.png")
    assert "Give LoRAs as --lora" in say("--merge", tmp_path / "m.safetensors")
    assert "Give the model as --ckpt" in say("--merge", tmp_path / "m.safetensors", "--lora", "x.safetensors")
    assert "no room for small changes" in say("--merge", tmp_path / "m.safetensors", "--lora", "x.safetensors",
                                              "--ckpt", files[2], "--quantize", "int8")
    assert "--lora and --random-weights exclude" in say("--lora", "x.safetensors", "--random-weights", "var_d16")
    assert "expected a name that ends in .safetensors" in say("--merge", tmp_path / "m.pth", "--lora", "x.safetensors",
                                                              "--ckpt", files[2])


def test_peft_reads_it(tmp_path):
    peft = pytest.importorskip("peft")                                      # optional, and large: not in .ci/run
    model = tiny_llamagen().eval()
    lora.wrap(model, 3, 6.0, ("qkv", "proj"), generator=torch.Generator().manual_seed(0))
    fill(model)
    lora.save(model, tmp_path / "adapter_model.safetensors")
    theirs = peft.PeftModel.from_pretrained(tiny_llamagen().eval(), tmp_path).merge_and_unload()
    ours = tiny_llamagen().eval()
    lora.add(ours, [str(tmp_path)], "base")
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, msg=lambda m: f"{name} {m}")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["qkv"], init_lora_weights=False)
    written = peft.get_peft_model(tiny_llamagen().eval(), config)
    written.save_pretrained(tmp_path / "theirs")
    again = tiny_llamagen().eval()
    lora.add(again, [str(tmp_path / "theirs")], "base")
    for (name, a), b in zip(again.named_parameters(), written.merge_and_unload().parameters()):
        torch.testing.assert_close(a, b, msg=lambda m: f"{name} {m}")


def test_several_at_once_on_int8(tmp_path):
    """Products of several LoRAs add up on an int8 layer, which cannot be changed itself."""
    learnt = []
    for seed in (1, 2):
        model = tiny_llamagen().eval()
        lora.wrap(model, 2, 2.0, LAYERS, generator=torch.Generator().manual_seed(seed))
        fill(model, seed)
        del model.class_embed                                               # else each has a table of its own
        learnt.append(tmp_path / f"{seed}.safetensors")
        lora.save(model, learnt[-1])
    quantized = tiny_llamagen().eval()
    int8.quantize(quantized, "int8")
    dense = tiny_llamagen().eval()
    with torch.no_grad():
        for name, layer in quantized.named_modules():
            if isinstance(layer, int8.Int8Linear):
                dense.get_submodule(name).weight.copy_(layer.q * layer.scale[:, None])
    for model in (quantized, dense):
        lora.add(model, [f"{learnt[0]}:0.5", str(learnt[1])], "base")
    with torch.no_grad():
        assert (llamagen_logits(quantized) - llamagen_logits(dense)).abs().max() < 2e-5


def test_what_is_no_plain_lora(token_files, tmp_path, capsys):
    model = tiny_llamagen()
    lora.wrap(model, 2, 2.0, LAYERS)
    lora.save(model, tmp_path / "adapter_model.safetensors")
    state = load_file(tmp_path / "adapter_model.safetensors")
    say = partial(complaint, capsys, sample, "llamagen", "--ckpt", token_files[2], "--vq", token_files[1], "--device",
                  "cpu", "--out", tmp_path / "a.png", "--lora", tmp_path)
    say_twice = partial(say, str(tmp_path / "adapter_model.safetensors"))
    assert "each has a table of classes" in say_twice()
    save_file(state, tmp_path / "adapter_model.safetensors")                # as peft does, without our header
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    assert "use_rslora, which is not plain LoRA" in say()
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(state | {"base_model.model.blocks.0.attn.qkv.lora_magnitude_vector": torch.ones(3)},
              tmp_path / "adapter_model.safetensors")
    assert "lora_magnitude_vector, which is not plain LoRA" in say()


def test_latentsync_learns_on_the_weights_of_init(nets, tmp_path, capsys, monkeypatch):
    """Frozen weights are those of --init, quantized or not, and a stage needs a network with all its parts."""
    helpers.make_tiny_latentsync(monkeypatch)
    whole = replace(helpers.UNET_CONFIG, resolution=16, motion="all")
    base = nets / "whole.safetensors"
    latentsync.save(helpers.tiny(latentsync.UNet, whole), base)
    argv = ("latentsync", "--stage", 2, "--vae", nets / "kl.safetensors", "--whisper", nets / "ear.safetensors",
            "--frames", 4, "--videos", 2, "--val-videos", 1, "--batch-size", 1, "--steps", 1, "--device", "cpu",
            "--sync-weight", 0, "--trepa-weight", 0, "--lpips-weight", 0, "--lora", 2, "--val-every", 0)
    for quantize in ((), ("--quantize", "int8")):
        run(train, *argv, "--init", base, *quantize, "--out", tmp_path / f"run{len(quantize)}")
        said = capsys.readouterr().out
        assert "from scratch" not in said
        unet = latentsync.load(base)
        lora.add(unet, [str(tmp_path / f"run{len(quantize)}")], base)       # raises for other weights
    assert "frozen weights cannot start from scratch" in complaint(
        capsys, train, *argv, "--init", nets / "stage1.safetensors", "--out", tmp_path / "b")
