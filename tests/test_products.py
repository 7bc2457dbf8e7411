"""Packed weights and the number of threads on a CPU, and the race against the originals' arithmetic."""
import itertools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import latentsync
import sample
from helpers import (UNET_CONFIG, complaint, generators, randn, run, tiny, tiny_bits, tiny_infinity, tiny_llamagen,
                     tiny_single, tiny_tokenizer, tiny_var)
from lib import bench, products

packs = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch has no oneDNN")


@pytest.fixture
def packing(monkeypatch):
    """Tiny layers are packed too, whatever is faster."""
    monkeypatch.setattr(products, "SMALLEST", 1)
    monkeypatch.setattr(products, "TOLERATED", float("inf"))


@packs
@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 1, 24), (3, 5, 24), (2, 70, 24), (7, 24)])
def test_packed_products_are_products(shape):
    layer = nn.Linear(24, 40)
    weight = products.PackedWeight(layer.weight)
    x = randn(*shape)
    torch.testing.assert_close(F.linear(x, weight, layer.bias), layer(x))
    torch.testing.assert_close(F.linear(x.movedim(0, -1).movedim(-1, 0), weight), F.linear(x, layer.weight))


@packs
def test_a_packed_weight_looks_like_a_weight_and_hides_its_elements():
    weight = randn(40, 24)
    packed = products.PackedWeight(weight)
    assert (packed.shape, packed.dtype, packed.numel()) == (weight.shape, weight.dtype, weight.numel())
    assert torch.equal(packed.dense(), weight)
    assert packed.untyped_storage().nbytes() == 4 and packed.sum().isnan()
    assert packed.new_empty(3).shape == (3,)


@packs
def test_products_of_rows_do_not_depend_on_the_number_of_threads():
    """Therefore that number may change while a picture is drawn."""
    weights = [products.PackedWeight(randn(*shape)) for shape in ((700, 600), (768, 3072))]     # few and many summands
    before = torch.get_num_threads()
    try:
        for weight, rows in itertools.product(weights, (1, 2, 32, 300)):
            x = randn(rows, weight.shape[1])
            results = []
            for threads in (1, 2, 3, 4, 8):
                torch.set_num_threads(threads)
                results.append(F.linear(x, weight))
            assert all(torch.equal(results[0], result) for result in results)
    finally:
        torch.set_num_threads(before)


def draws():
    """Each model with a function that draws from it."""
    yield tiny_var(), lambda m: m.sample(tiny_tokenizer(), torch.tensor([1, 2]), generator=generators(3, 4))
    yield tiny_llamagen(), lambda m: m.sample(tiny_single(), torch.tensor([1, 2]), cfg=2.0, generator=generators(3, 4))
    yield tiny_infinity(), lambda m: m.sample(tiny_bits(), randn(2, 6, 128), None, cfg=2.0, scales=[
        (p, p) for p in tiny_bits().config.patch_nums], generator=generators(3, 4))


@packs
@pytest.mark.parametrize("i", range(3))
def test_prepared_models_draw_the_same_pictures(packing, i):
    model, draw = list(draws())[i]
    expected = draw(model)
    names = {name for name, _ in model.named_parameters()}
    found = products.prepare(model)
    assert found.packed and "packed weights" in str(found)
    assert products.prepare(model) is None                                  # the second time nothing is left to pack
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert all(isinstance(layer.weight, products.PackedWeight) for layer in linear)
    torch.testing.assert_close(draw(model), expected, rtol=0, atol=1e-4)    # sums in another order
    assert {name for name, _ in model.named_parameters()} == names          # the summary line counts them
    dense = products.unpacked(model)
    assert not any(isinstance(p, products.PackedWeight) for p in dense.parameters())
    assert torch.equal(draw(dense), expected)


@packs
def test_a_prepared_unet_predicts_the_same_noise(packing):
    unet = tiny(latentsync.UNet, UNET_CONFIG)
    x = randn(1, UNET_CONFIG.in_channels, 2, 8, 8)
    audio = randn(1, 2, 10, UNET_CONFIG.audio_width)
    with torch.no_grad():
        expected = unet(x, 500, audio)
        assert products.prepare(unet).packed
        torch.testing.assert_close(unet(x, 500, audio), expected, rtol=0, atol=1e-4)    # sums in another order


def test_slower_ways_are_not_taken(monkeypatch):
    monkeypatch.setattr(products, "SMALLEST", 1)
    monkeypatch.setattr(products, "measure", lambda weight: {"plain": 1.0, "packed": 1.5})
    model = tiny_var()
    found = products.prepare(model)
    assert not found.packed and "faster here than packed weights" in str(found)
    assert not any(isinstance(p, products.PackedWeight) for p in model.parameters())
    monkeypatch.setattr(products, "measure", lambda weight: {"plain": 1.0})
    assert "this PyTorch has no oneDNN" in str(products.prepare(model))


def test_small_layers_and_other_types_stay_as_they_are(monkeypatch):
    assert products.prepare(tiny_var()) is None
    monkeypatch.setattr(products, "SMALLEST", 1)
    assert products.prepare(tiny_var().to(torch.bfloat16)) is None


def test_the_number_of_threads_is_chosen_while_drawing(packing, monkeypatch):
    """The number of the fastest probe serves for a while; outside of a step all threads are there."""
    counts = []
    speeds = {4: 1.0, 2: 3.0, 1: 2.0}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(products, "products_per_second", lambda weight: speeds[counts[-1]])
    model = tiny_llamagen()
    found = products.prepare(model)
    step = found.with_threads(lambda: counts.append("step"))
    step()
    assert counts == [4, 2, 1, 2, "step", 4]
    counts.clear()
    speeds[4] = 9.0
    step()                                                                  # too early for another probe
    assert counts == [2, "step", 4]
    found.probed -= products.SECONDS_BETWEEN_PROBES
    counts.clear()
    step()
    assert counts == [4, 2, 1, 4, "step", 4]
    with pytest.raises(KeyError):
        found.with_threads(lambda: {}["x"])()
    assert counts[-1] == 4


def test_a_busy_process_ends(monkeypatch):
    started = []
    real = bench.subprocess.Popen
    monkeypatch.setattr(bench.subprocess, "Popen", lambda *args: started.append(real(*args)) or started[-1])
    with pytest.raises(RuntimeError), bench.busy_process():
        assert started[0].poll() is None
        raise RuntimeError
    assert started[0].poll() is not None


def test_races_report_medians(monkeypatch):
    clock = iter([5.0, 1.0, 4.0, 8.9, 10.0, 9.0, 4.0])                      # first, then pairs of ours and theirs
    monkeypatch.setattr(bench, "timed", lambda f, device: (next(clock), f()))
    found = bench.race(lambda: torch.zeros(1), {"a": lambda: torch.zeros(1)}, 2, torch.device("cpu"))["a"]
    assert found["ratios"] == [0.25, 0.89, 2.25]
    assert (found["plain_seconds"], found["seconds"], found["ratio"], found["first_seconds"]) == (4.45, 2.0, 0.89, 5.0)
    assert found["equal"] and found["max_difference"] == 0


@packs
def test_probes_are_not_recorded(packing, monkeypatch):
    monkeypatch.setattr(products, "SECONDS_BETWEEN_PROBES", -1)             # before every step
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    model = tiny_llamagen()
    found = products.prepare(model)
    counts = []
    for most in (1, 2):
        found.most_threads = most                                           # with one thread nothing is probed
        with bench.Recorder(model.parameters()) as recorder:
            model.generate(torch.tensor([1]), generator=generators(3))
        counts.append(sum(call.count for call in recorder.calls.values()))
    assert counts[0] == counts[1] > 0


def test_a_variant_of_nan_is_not_equal():
    results = iter([torch.zeros(1), torch.full((1,), float("nan"))])
    found = bench.race(lambda: torch.zeros(1), {"a": lambda: next(results)}, 1, torch.device("cpu"))["a"]
    assert not found["equal"] and "seconds" not in found


@pytest.mark.parametrize("model", ["var", "llamagen", "infinity", "latentsync"])
def test_a_neighbour_goes_with_a_benchmark(model, capsys):
    assert "--neighbour goes with --bench" in complaint(capsys, sample, model, "--neighbour")


def test_benchmarks_compare_with_the_original_beside_a_neighbour(files, capsys, monkeypatch):
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e9)
    run(sample, "var", "--ckpt", files[2], "--vae", files[1], "--device", "cpu", "--bench", "--neighbour")
    out = capsys.readouterr().out
    assert "original's arithmetic: ours / original's" in out
    assert "original's arithmetic, beside a busy process: ours / original's" in out
    run(sample, "var", "--ckpt", files[2], "--vae", files[1], "--device", "cpu", "--bench", "--smooth")
    assert "has no such setting, so the original is not compared with" in capsys.readouterr().err
