"""The transformer: what must hold whatever the weights."""
import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import var
import vq
from conftest import randn, tiny_var
from lib.graphs import CapturedCall, captured, captured_method

LABELS = torch.tensor([0, 3])
VARIANTS = pytest.mark.parametrize("changes", [{}, {"shared_adaln": True}, {"attn_l2_norm": False}],
                                   ids=["plain", "shared_adaln", "no_l2_norm"])


def generators(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


def steps_of(model, *arguments, **options):
    """A list of the Steps of model.sample."""
    steps = []
    model.sample(*arguments, on_step=steps.append, **options)
    return steps


@VARIANTS
def test_cached_sampling_equals_teacher_forcing(changes, tokenizer):
    model = tiny_var(**changes)
    steps = steps_of(model, tokenizer, LABELS, cfg=2.0, generator=torch.Generator().manual_seed(0))
    features = tokenizer.quantize.teacher_input([s.tokens for s in steps])
    forced = torch.cat([model(LABELS, features), model(torch.full_like(LABELS, 5), features)])
    torch.testing.assert_close(torch.cat([s.logits for s in steps], 1), forced, atol=2e-5, rtol=1e-5)
    assert forced.std() > 0.1                                               # the comparison is not between zeros


def test_a_batch_of_two_is_two_batches_of_one(model, tokenizer):
    for options in (dict(top_k=1), dict(top_k=8, top_p=0.9), dict(more_smooth=True)):
        tokens = lambda labels, seeds: torch.cat(
            [s.tokens for s in steps_of(model, tokenizer, labels, cfg=3.0, generator=generators(*seeds), **options)], 1)
        both = tokens(LABELS, (7, 8))
        assert torch.equal(both, torch.cat([tokens(LABELS[:1], (7,)), tokens(LABELS[1:], (8,))]))


def test_same_seed_same_picture_other_seed_another(model, tokenizer):
    draw = lambda seed: model.sample(tokenizer, LABELS, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert draw(0).shape == (2, 3, 16, 16) and draw(0).min() >= 0 and draw(0).max() <= 1


def test_guidance_zero_leaves_the_unconditional_half_out(model, tokenizer):
    null = torch.tensor([5, 5])                                             # no class: both halves would be equal
    for labels, cfg, rows in ((LABELS, 2.0, 4), (LABELS, 0, 2), (null, 4, 2)):
        assert all(len(step.logits) == rows for step in steps_of(model, tokenizer, labels, cfg=cfg))


def test_pictures_of_all_scales_end_with_the_picture(model, tokenizer):
    draw = lambda **options: model.sample(tokenizer, LABELS, generator=generators(0)[0], cfg=2.0, top_k=4, **options)
    pictures = draw(all_scales=True)
    assert len(pictures) == 4 and torch.equal(pictures[-1], draw())


def test_editing_keeps_what_the_mask_keeps(model, tokenizer):
    given = tokenizer.tokenize(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    draw = lambda keep: model.sample(tokenizer, LABELS[:1], given_tokens=given, keep_mask=keep, generator=generators(0)[0])
    everything, nothing = torch.ones(4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
    torch.testing.assert_close(draw(everything), tokenizer.detokenize(given).add(1).div(2))
    assert (draw(nothing) - draw(everything)).abs().mean() > 1e-3
    with pytest.raises(ValueError, match="editing takes both: .* given_tokens=, the mask as keep_mask="):
        model.sample(tokenizer, LABELS, keep_mask=everything)
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
# CUDA graphs


class Rerun(CapturedCall):
    """CUDA graphs without CUDA: `replay` computes again what was captured, from the same tensors into the same tensors."""

    def record(self, run):
        results = run()

        def replay():
            for old, new in zip(tree_leaves(results), tree_leaves(run())):
                if old is not None:
                    old.copy_(new)
        return replay, results


CAPTURES = pytest.mark.parametrize("device, call", [
    pytest.param("cuda", CapturedCall, marks=pytest.mark.gpu, id="cuda graphs"), pytest.param("cpu", Rerun, id="simulated")])
WAYS = [dict(cfg=3.0, top_k=9, top_p=0.9), dict(cfg=0), dict(cfg=3.0, more_smooth=True), dict(cfg=3.0, all_scales=True)]


def test_a_captured_call_is_replayed_on_other_numbers():
    """Copies of the arguments go in, static buffers are used in place, and results are overwritten by the next call."""
    runs, total = [], torch.zeros(3)

    def add(total, x, factor):
        runs.append(factor)
        total += factor * x
        return 2 * total
    call = Rerun(add, static={total.untyped_storage().data_ptr()})
    first = call(total, randn(3), 1)
    total.zero_()
    second = call(total, randn(3, seed=1), 1)
    torch.testing.assert_close(total, randn(3, seed=1))
    assert second is first and torch.equal(second, 2 * total) and len(call.graphs) == 1
    call(total, randn(3), 5)                                                # another constant, another graph
    assert len(call.graphs) == 2 and runs == [1, 1, 1, 5, 5]


def test_calls_that_are_not_worth_a_capture_go_plain():
    layer, captures = torch.nn.Linear(3, 2), []
    layer.double = lambda x: captures.append(len(x)) or 2 * layer(x)
    twin = captured_method(layer, "double", lambda x: len(x) == 4, call=Rerun)
    for n in (4, 4, 1):
        torch.testing.assert_close(twin.double(randn(n, 3)), 2 * layer(randn(n, 3)))
    assert captures == [4, 4, 4, 1] and twin.weight is layer.weight


@CAPTURES
def test_captured_steps_draw_the_same_pictures(model, tokenizer, device, call):
    """With other classes and seeds than those of the capture, other settings and batch sizes, and back."""
    model, tokenizer = model.to(device), tokenizer.to(device)
    fast, fast_tokenizer = captured(model, call), captured(tokenizer, call)
    draw = lambda model, tokenizer, labels, seed, **options: model.sample(
        tokenizer, labels, generator=torch.Generator(device).manual_seed(seed), **options)
    keep = var.edit_mask((0, 0, 0.5, 0.5), 4).to(device)
    given = tokenizer.tokenize(torch.rand(1, 3, 16, 16, device=device))
    for _ in range(2):
        for options in [*WAYS, dict(cfg=3.0, given_tokens=given, keep_mask=keep)]:
            for labels, seed in ((LABELS, 0), (LABELS.flip(0), 1), (LABELS[:1], 2)):
                expected = draw(model, tokenizer, labels, seed, **options)
                found = draw(fast, fast_tokenizer, labels, seed, **options)
                assert all(torch.equal(a, b) for a, b in zip(tree_leaves(expected), tree_leaves(found)))
    # 4 scales for 4, 2 and 1 rows (with and without guidance, two batch sizes); the second round found them all
    assert len(fast.forward_scale.graphs) == 3 * 4 and len(fast_tokenizer.decode.graphs) == 2
    assert model.forward_scale.__func__ is var.VAR.forward_scale            # the model itself is as it was


def check_nothing_waits(model, draw):
    """No number goes to the host once the KV cache is there: no operator of this list is called while draw(model) runs."""
    waits = {"_local_scalar_dense", "item", "nonzero", "multinomial", "is_nonzero", "equal", "masked_select", "unique"}

    class NoWaiting(TorchDispatchMode):
        begun = False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert not self.begun or func.overloadpacket.__name__ not in waits, f"{func} waits for the device"
            return func(*args, **kwargs or {})

    def new_kv_cache(*size):
        mode.begun = True
        return model.new_kv_cache(*size)
    twin = copy.copy(model)
    twin.new_kv_cache = new_kv_cache
    with NoWaiting() as mode:
        draw(twin)
        assert mode.begun
        with pytest.raises(AssertionError, match="waits"):
            LABELS.sum().item()


def test_nothing_in_a_loop_waits_for_the_device(model, tokenizer):
    for options in WAYS:
        check_nothing_waits(model, lambda model: model.sample(tokenizer, LABELS, **options))


def check_no_synchronisation(model, tokenizer):
    model, tokenizer = model.cuda(), tokenizer.cuda()
    draw = lambda model, tokenizer: model.sample(tokenizer, LABELS, cfg=3.0, top_k=9, top_p=0.9,
                                                 generator=torch.Generator("cuda").manual_seed(0))
    pairs = (model, tokenizer), (captured(model), captured(tokenizer))
    for pair in pairs:                                                      # compiles and captures, which may wait
        draw(*pair)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for pair in pairs:
            draw(*pair)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_no_synchronisation_on_cuda(model, tokenizer):
    check_no_synchronisation(model, tokenizer)


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
