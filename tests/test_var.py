"""The transformer: what must hold whatever the weights."""
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import var
import vq
from conftest import tiny_var
from sample import CUDAGraphs

LABELS = torch.tensor([0, 3])
VARIANTS = pytest.mark.parametrize("changes", [{}, {"shared_adaln": True}, {"attn_l2_norm": False}],
                                   ids=["plain", "shared_adaln", "no_l2_norm"])


def generators(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


@VARIANTS
def test_cached_sampling_equals_teacher_forcing(changes, tokenizer):
    model = tiny_var(**changes)
    steps = list(model.steps(tokenizer, LABELS, cfg=2.0, generator=torch.Generator().manual_seed(0)))
    features = tokenizer.quantize.teacher_input([s.tokens for s in steps])
    forced = torch.cat([model(LABELS, features), model(torch.full_like(LABELS, 5), features)])
    torch.testing.assert_close(torch.cat([s.logits for s in steps], 1), forced, atol=2e-5, rtol=1e-5)
    assert forced.std() > 0.1                                               # the comparison is not between zeros


def test_a_batch_of_two_is_two_batches_of_one(model, tokenizer):
    for options in (dict(top_k=1), dict(top_k=8, top_p=0.9), dict(more_smooth=True)):
        tokens = lambda labels, seeds: torch.cat(
            [s.tokens for s in model.steps(tokenizer, labels, cfg=3.0, generator=generators(*seeds), **options)], 1)
        both = tokens(LABELS, (7, 8))
        assert torch.equal(both, torch.cat([tokens(LABELS[:1], (7,)), tokens(LABELS[1:], (8,))]))


def test_same_seed_same_picture_other_seed_another(model, tokenizer):
    draw = lambda seed: model.sample(tokenizer, LABELS, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert draw(0).shape == (2, 3, 16, 16) and draw(0).min() >= 0 and draw(0).max() <= 1


def test_guidance_zero_leaves_the_unconditional_half_out(model, tokenizer):
    step = next(model.steps(tokenizer, LABELS, cfg=0, generator=torch.Generator().manual_seed(0)))
    assert len(step.logits) == 2
    null = torch.tensor([5, 5])                                             # no class: both halves would be equal
    assert len(next(model.steps(tokenizer, null, cfg=4, generator=torch.Generator().manual_seed(0))).logits) == 2


def test_ladder_ends_with_the_picture(model, tokenizer):
    options = dict(cfg=2.0, top_k=4)
    ladder = model.sample(tokenizer, LABELS, generator=torch.Generator().manual_seed(0), ladder=True, **options)
    assert len(ladder) == 4
    final = model.sample(tokenizer, LABELS, generator=torch.Generator().manual_seed(0), **options)
    assert torch.equal(ladder[-1], final)


def test_editing_keeps_what_the_mask_keeps(model, tokenizer):
    given = tokenizer.tokenize(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    draw = lambda keep: model.sample(tokenizer, LABELS[:1], given=given, keep=keep, generator=generators(0)[0])
    everything, nothing = torch.ones(4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
    torch.testing.assert_close(draw(everything), tokenizer.detokenize(given).add(1).div(2))
    assert (draw(nothing) - draw(everything)).abs().mean() > 1e-3
    assert var.edit_mask((0, 0, 0.5, 1), 4, inpaint=False).tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    assert torch.equal(var.edit_mask((0.1, 0.1, 0.8, 0.8), 16), ~var.edit_mask((0.1, 0.1, 0.8, 0.8), 16, inpaint=False))


def test_random_labels_and_wrong_ones(model):
    assert model.check_labels(40, torch.Generator().manual_seed(0)).unique().tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="class ids must be 0 .. 4, or 5 for the null class, not .7."):
        model.check_labels(torch.tensor([7]))


def test_class_dropping_and_drop_path_draw_from_the_generator_only(model, tokenizer):
    tokens = torch.cat(tokenizer.tokenize(torch.zeros(2, 3, 16, 16)), 1)
    features = tokenizer.quantize.teacher_input(tokens.split([1, 4, 9, 16], 1))
    model.train()
    state = torch.get_rng_state()
    loss = lambda seed: model.loss(LABELS, tokens, features, class_drop=0.5, generator=generators(seed)[0])[0]
    assert torch.equal(loss(0), loss(0)) and len({loss(s).item() for s in range(8)}) > 1
    assert torch.equal(state, torch.get_rng_state())


def test_initial_loss_is_that_of_a_uniform_guess(tokenizer):
    fresh = var.VAR(tiny_var().config)
    fresh.init_weights(1e-3, torch.Generator().manual_seed(0))
    tokens = torch.cat(tokenizer.tokenize(torch.zeros(2, 3, 16, 16)), 1)
    loss, _ = fresh.loss(LABELS, tokens, tokenizer.quantize.teacher_input(tokens.split([1, 4, 9, 16], 1)))
    assert loss.item() == pytest.approx(math.log(32), rel=0.02)


@pytest.mark.parametrize("name, parameters, entries", [
    ("var_d16", 310_283_520, 220), ("var_d20", 600_917_136, 272), ("var_d24", 1_033_399_360, 324),
    ("var_d30", 2_010_020_356, 402), ("var_d36", 2_353_893_904, 446)])
def test_released_sizes(name, parameters, entries):
    with torch.device("meta"):
        model = var.VAR(var.CONFIGS[name])
    assert sum(p.numel() for p in model.parameters()) == parameters
    state = vq.rename_keys(model.state_dict(), var.RENAMES, inverse=True)
    assert len(state) + 2 + model.config.depth == entries                   # and the buffers that export() adds


@VARIANTS
def test_save_load_export(tmp_path, changes):
    model = tiny_var(**changes, heads=1)
    var.save(model, tmp_path / "a.safetensors")
    torch.save(var.export(model), tmp_path / "a.pth")
    nested = {"epoch": 1, "trainer": {"var_wo_ddp": var.export(model), "vae_local": {}}, "args": {}}
    torch.save(nested, tmp_path / "ar-ckpt-last.pth")
    for file in ("a.safetensors", "a.pth", "ar-ckpt-last.pth"):
        again = var.load(tmp_path / file)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
        assert again.config.heads == 1 and again.config.patch_nums == (1, 2, 3, 4)


def test_small_files_stay_close(model, tokenizer, tmp_path):
    features = tokenizer.quantize.teacher_input(tokenizer.tokenize(torch.zeros(2, 3, 16, 16)))
    exact = model(LABELS, features)
    for dtype, error in ((torch.float16, 2e-3), (torch.float8_e4m3fn, 0.15)):   # 11 and 4 bits of mantissa
        var.save(model, tmp_path / "a.safetensors", dtype)
        small = var.load(tmp_path / "a.safetensors")
        assert small.head.weight.dtype == torch.float32
        assert 0 < (small(LABELS, features) - exact).norm() / exact.norm() < error


def test_fine_tuning_on_other_classes_keeps_the_null_row_last(model, tmp_path):
    var.save(model, tmp_path / "a.safetensors")
    tuned = var.load(tmp_path / "a.safetensors", num_classes=9, generator=torch.Generator().manual_seed(0))
    assert tuned.config.num_classes == 9 and tuned.class_embed.weight.shape[0] == 10
    assert torch.equal(tuned.class_embed.weight[-1], model.class_embed.weight[-1])
    assert torch.equal(tuned.head.weight, model.head.weight)


def test_half_precision_stays_close(model, tokenizer):
    features = tokenizer.quantize.teacher_input(tokenizer.tokenize(torch.zeros(2, 3, 16, 16)))
    exact = model(LABELS, features)
    half = var.set_dtype(tiny_var(), torch.bfloat16)(LABELS, features)
    assert half.dtype == torch.float32 and (half - exact).norm() / exact.norm() < 0.03


def test_checkpoints_that_do_not_fit_are_explained(model, tokenizer, tmp_path):
    state = var.export(model)
    cases = {
        "missing.pth": ({k: v for k, v in state.items() if k != "head.bias"}, "1 missing: head.bias"),
        "extra.pth": (state | {"surprise": torch.zeros(1)}, "1 unexpected: surprise"),
        "shape.pth": (state | {"head.bias": torch.zeros(7)}, r"head.bias is \(7,\), expected \(32,\)"),
        "tokenizer.pth": (vq.export(tokenizer), "not a VAR transformer: it has no 'word_embed.weight'"),
        "nothing.pth": ({"epoch": 3}, "no state dict in it"),
    }
    for name, (content, message) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(vq.CheckpointError, match=f"{name}: .*{message}"):
            var.load(tmp_path / name)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling as a chain of calls that can be captured


class Rerun(CUDAGraphs):
    """CUDA graphs but for CUDA: `replay` computes anew what it captured, from the same tensors into the same tensors."""

    def record(self, run):
        results = run()

        def replay():
            for old, new in zip(tree_leaves(results), tree_leaves(run())):
                if old is not None:
                    old.copy_(new)
        return replay, results


WAYS = [dict(cfg=3.0, top_k=9, top_p=0.9), dict(cfg=0), dict(cfg=3.0, more_smooth=True), dict(cfg=3.0, ladder=True)]


@pytest.mark.parametrize("make", [pytest.param(lambda: ("cuda", CUDAGraphs()), marks=pytest.mark.gpu, id="cuda graphs"),
                                  pytest.param(lambda: ("cpu", Rerun()), id="the same, simulated")])
def test_captured_steps_draw_the_same_pictures(model, tokenizer, make):
    """With other classes and seeds than those of the capture, other settings and batch sizes, and back."""
    device, run = make()
    model, tokenizer = model.to(device), tokenizer.to(device)
    draw = lambda labels, seed, **options: model.sample(
        tokenizer, labels, generator=torch.Generator(device).manual_seed(seed), **options)
    keep = var.edit_mask((0, 0, 0.5, 0.5), 4).to(device)
    given = tokenizer.tokenize(torch.rand(1, 3, 16, 16, device=device))
    for _ in range(2):
        for options in [*WAYS, dict(cfg=3.0, given=given, keep=keep)]:
            for labels, seed in ((LABELS, 0), (LABELS.flip(0), 1), (LABELS[:1], 2)):
                expected, got = (draw(labels, seed, run=r, **options) for r in (var.call, run))
                assert all(torch.equal(a, b) for a, b in zip(tree_leaves(expected), tree_leaves(got)))
    # per batch size: begin with and without guidance, decode, and 5 settings x 4 scales; the second round found them all
    assert len(run.graphs) == 2 * (3 + 5 * 4)


def test_nothing_in_a_step_waits_for_the_device(model, tokenizer):
    """No number goes to the host while a picture is drawn: what an operator of this list would do."""
    waits = {"_local_scalar_dense", "item", "nonzero", "multinomial", "is_nonzero", "equal", "masked_select", "unique"}

    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket.__name__ not in waits, f"{func} waits for the device"
            return func(*args, **kwargs or {})

    def run(function, constants, *tensors):
        with NoWaiting():
            return function(*constants, *tensors)
    for options in WAYS:
        model.sample(tokenizer, LABELS, run=run, **options)
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        LABELS.sum().item()


def check_no_synchronisation(model, tokenizer, call):
    model, tokenizer, run = model.cuda(), tokenizer.cuda(), CUDAGraphs()
    draw = lambda run: model.sample(tokenizer, LABELS, cfg=3.0, top_k=9, top_p=0.9, run=run,
                                    generator=torch.Generator("cuda").manual_seed(0))
    draw(call), draw(run)                                                   # compiles and captures, which may wait
    try:
        torch.cuda.set_sync_debug_mode("error")
        draw(call), draw(run)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_no_synchronisation_on_cuda(model, tokenizer):
    check_no_synchronisation(model, tokenizer, var.call)


@pytest.mark.gpu
def test_cuda_with_kernels_gives_the_numbers_of_the_cpu(model, tokenizer, monkeypatch):
    """Logits, loss and gradients in float32 without TF32; kernels there, torch here."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    tokens = tokenizer.tokenize(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    features, tokens = tokenizer.quantize.teacher_input(tokens), torch.cat(tokens, 1)

    def run(device):
        model.to(device).zero_grad()
        loss, _ = model.loss(*(t.to(device) for t in (LABELS, tokens, features)))
        loss.backward()
        logits = model(LABELS.to(device), features.to(device))
        return [loss.cpu(), logits.cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)]
    for here, there in zip(run("cpu"), run("cuda")):
        torch.testing.assert_close(there, here, atol=1e-4 * here.abs().max().item(), rtol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(tokenizer.tokenize(torch.ones(1, 3, 16, 16)),
                                                 [t.cpu() for t in tokenizer.cuda().tokenize(torch.ones(1, 3, 16, 16).cuda())]))
