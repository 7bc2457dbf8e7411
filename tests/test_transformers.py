"""The contract of the image transformers: what VAR, LlamaGen and Infinity must all keep, whatever their weights.

There is one test per promise, and each test runs for every kind of model. A `Kind` says how to build a model, condition
it, train it and load it. What one model alone promises is in test_var.py, test_llamagen.py and test_infinity.py.
"""
import argparse
import copy
import math
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import infinity
import llamagen
import var
from helpers import (SCALES, generators, randn, same, steps_of, tiny_bits, tiny_infinity, tiny_llamagen, tiny_single,
                     tiny_tokenizer, tiny_var)
from lib.graphs import CapturedCall, captured, captured_method, with_compiled_blocks
from lib.text import load_infinity
from triton_ops import backend

LABELS = torch.tensor([0, 3])
PICTURES = randn(2, 3, 16, 16, seed=1)


class Kind:
    """One kind of model, for two pictures.

    A condition is a tuple, the arguments of `sample` behind the tokenizer. Tokens are a list with one tensor per scale,
    and for LlamaGen with a single tensor. A batch is a tuple, the arguments of `loss`.
    """

    # module, network, tiny, tokenizer: the model file, its class, and makers of a tiny model and of its tokenizer
    # condition, others: a condition, and more of them
    # mixed: options of `sample`, for batches of unlike pictures. A tensor has one value for each picture
    # draws: options of `sample` that take different ways through it; graphs: how many CUDA graphs they make
    # filmstrip, frames: options that draw a list of pictures, and its length
    # no_dropping, dropping: changes of the config that turn off all randomness of training, and that turn one kind on
    options = {}                                                            # of every call of `sample`
    in_files = {}                                                           # changes for models that files can describe
    cuda_atol = 0.0                                                         # of pictures drawn by CUDA graphs

    def __init__(self, **changes):
        self.make = partial(self.tiny, **changes)

    def alone(self, i):
        """The condition of picture i alone."""
        return tuple(None if c is None else c[i:i + 1] for c in self.condition)

    def tokens(self, steps):
        """The drawn tokens."""
        return [step.tokens for step in steps]

    def step_logits(self, steps):
        """The logits of all steps, along dimension 1."""
        return torch.cat([step.logits for step in steps], 1)

    def guided(self, cond, uncond):
        """Teacher-forced logits as they stand in a Step, for cfg = 2."""
        return torch.cat([cond, uncond])

    def tokenize(self, pictures):
        return self.tokenizer().tokenize(pictures)

    def batch(self):
        return self.batch_of(self.condition, self.tokenize(PICTURES))


class VARKind(Kind):
    module, network, tiny, tokenizer = var, var.VAR, staticmethod(tiny_var), staticmethod(tiny_tokenizer)
    condition, others = (LABELS,), [(LABELS.flip(0),)]
    mixed = [dict(cfg=3.0, top_k=1), dict(cfg=3.0, top_k=8, top_p=0.9), dict(cfg=3.0, more_smooth=True)]
    draws = [dict(cfg=3.0, top_k=9, top_p=0.9), dict(cfg=0), dict(cfg=3.0, more_smooth=True),
             dict(cfg=3.0, all_scales=True), dict(cfg=3.0, given_tokens=tiny_tokenizer().tokenize(PICTURES[:1]),
                                                  keep_mask=var.edit_mask((0, 0, 0.5, 0.5), 4))]
    graphs = [4 * 3, 2]                         # four scales for four, two and one rows; two batch sizes are decoded
    filmstrip, frames = dict(all_scales=True), 4
    uniform_loss = math.log(32)
    no_dropping, dropping = dict(class_drop=0.0, drop_path=0.0), [dict(class_drop=0.5), dict(drop_path=0.5)]
    in_files = dict(heads=1)                    # official files without log_scale are taken to have heads of 64

    def batch_of(self, condition, tokens):
        return *condition, torch.cat(tokens, 1), tiny_tokenizer().quantize.teacher_input(tokens)

    def logits(self, model, labels, _, features):
        return model(labels, features)

    def null(self, model):
        return torch.full_like(LABELS, model.config.num_classes),

    def checkpoints(self, state):
        nested = {"epoch": 1, "trainer": {"var_wo_ddp": state, "vae_local": {}}, "args": {}}
        return {"flat.pth": state, "ar-ckpt-last.pth": nested}

    def load(self, path, config):
        return var.load(path)


class LlamaGenKind(Kind):
    module, network, tokenizer = llamagen, llamagen.LlamaGen, staticmethod(tiny_single)
    tiny = staticmethod(tiny_llamagen)
    mixed = [dict(cfg=torch.tensor([1.0, 4.0])) | options for options in (
        dict(top_k=1), dict(temperature=0.0), dict(top_k=9, top_p=0.9, temperature=1.3), dict(cfg_interval=3))]
    draws = [dict(cfg=3.0, top_k=9, top_p=0.9), dict(cfg=1.5, cfg_interval=2),
             dict(cfg=3.0, cfg_interval=2, top_k=3), dict(cfg=torch.tensor([5.0, 1.0])), dict(temperature=0.0)]
    cuda_atol = 1e-4                            # a captured step attends to the whole cache, under a mask
    filmstrip, frames = dict(progress_frames=4), 4
    uniform_loss = math.log(32)
    no_dropping = dict(dropout=0.0, drop_path=0.0, cond_drop=0.0)
    dropping = [dict(dropout=0.1), dict(drop_path=0.5), dict(cond_drop=0.5)]

    def __init__(self, **changes):
        super().__init__(**changes)
        self.condition, self.others = (LABELS, None), [(LABELS.flip(0), None)]
        self.graphs = [3 * 2, 2]                # guidance, its end and none for two batch sizes, whatever the position
        if changes.get("text"):
            text, mask = llamagen.left_pad([randn(6, 128, seed=3), randn(2, 128, seed=4)], 6)
            self.condition, self.others = (text, mask), [(text.flip(0), mask.flip(0)), (text, None)]
            self.graphs = [3 * 3, 2]                                        # two pictures with and without a mask

    def tokens(self, steps):
        return [torch.stack([step.tokens for step in steps], 1)]

    def step_logits(self, steps):
        return torch.stack([step.logits for step in steps], 1)

    def batch_of(self, condition, tokens):
        return condition[0], tokens[0], condition[1]

    def logits(self, model, cond, tokens, text_mask):
        return model(cond, tokens[:, :-1], text_mask)

    def null(self, model):
        return model.null_condition(self.condition[0]), self.condition[1]

    def checkpoints(self, state):
        """Files of DDP, DeepSpeed and FSDP, with what else lies in a training checkpoint."""
        rest = {"optimizer": {"state": {}}, "steps": 3}
        positions = 16 + (6 if "cls_embedding.uncond_embedding" in state else 1)
        return {"ddp.pt": {"model": state} | rest, "deepspeed.pt": {"module": state} | rest,
                "flat.pth": state | {"freqs_cis": torch.zeros(positions, 8, 2)},
                "args.pt": {"model": state, "args": argparse.Namespace(gpt_model="GPT-B")}}

    def load(self, path, config):
        return llamagen.load(path, side=4 if path.suffix == ".pt" else None, heads=config.heads)


class InfinityKind(Kind):
    module, network, tiny, tokenizer = infinity, infinity.Infinity, staticmethod(tiny_infinity), staticmethod(tiny_bits)
    text, text_mask = randn(2, 5, 128, seed=3), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    condition, others = (text, text_mask), [(-text, text_mask), (text, None), (text, text_mask.flip(0))]
    mixed = [dict(), dict(top_k=1), dict(cfg=[1.0, 3.0, 2.0], tau=[1.0, 0.5, 2.0]), dict(guide_after=-1), dict(cfg=1.0)]
    draws = [dict(all_scales=True), dict(all_scales=True, guide_after=0), dict(tau=0.5, top_p=0.97)]
    filmstrip = dict(all_scales=True)
    uniform_loss = math.log(2)
    no_dropping, dropping = dict(text_drop=0.0, drop_path=0.0), [dict(text_drop=0.5), dict(drop_path=0.5)]

    def __init__(self, patchify=False, **changes):
        super().__init__(patchify=patchify, **changes)
        self.scales = SCALES[:2] if patchify else SCALES                    # of the transformer
        self.sizes = infinity.tokenizer_scales(self.scales, patchify)       # of the tokenizer
        self.patchify, self.frames = patchify, len(self.scales)
        self.graphs = [len(self.scales) * 2 * 3, 2]     # two places of guidance; two pictures with and without a mask
        self.options = dict(scales=self.scales, tau=1.0, top_p=0.0, cfg=2.0)

    def alone(self, i):
        return self.text[i:i + 1, :self.text_mask[i].sum()], None           # without padding

    def tokens(self, steps):
        return [step.bits for step in steps]

    def guided(self, cond, uncond):
        return 2 * cond - uncond

    def tokenize(self, pictures):
        return tiny_bits().tokenize(pictures, self.sizes)

    def batch_of(self, condition, bits):
        inputs = tiny_bits().quantize.teacher_input(bits, self.sizes).split([h * w for h, w in self.sizes[1:]], 1)
        if self.patchify:
            inputs = [infinity.fold(x, size) for x, size in zip(inputs, self.scales[1:])]
            bits = [infinity.fold(x, size) for x, size in zip(bits, self.scales)]
        return *condition, torch.cat(inputs, 1), torch.cat(bits, 1), self.scales

    def logits(self, model, text, text_mask, inputs, _, scales):
        return model(text, text_mask, inputs, scales)

    def null(self, model):
        return model.null_text[:5].expand(2, -1, -1), self.text_mask

    def checkpoints(self, state):
        trained = {k: v + 1 for k, v in state.items()}
        trainer = {"gpt_fsdp": trained, "gpt_ema_fsdp": state}
        return {"flat.pth": state, "training.pth": {"args": {}, "trainer": trainer}}

    def load(self, path, config):
        return load_infinity(path, patchify=config.patchify)


EVERY = {"var": VARKind(), "var shared_adaln": VARKind(shared_adaln=True),
         "var no_l2_norm": VARKind(attn_l2_norm=False), "llamagen class": LlamaGenKind(),
         "llamagen text": LlamaGenKind(text=True), "llamagen gqa": LlamaGenKind(heads=4, kv_heads=2),
         "infinity": InfinityKind(), "infinity patchify": InfinityKind(bits=24, patchify=True, chunks=2)}
KINDS = pytest.mark.parametrize("kind", EVERY.values(), ids=EVERY)


def own(options, i):
    """The options of picture i of a batch."""
    return {k: v[i] if k == "cfg" and isinstance(v, torch.Tensor) else v for k, v in options.items()}


def draw(kind, model, tokenizer, condition=None, generator=0, **options):
    """Pictures. generator: a seed, or what `sample` takes."""
    if isinstance(generator, int):
        generator = torch.Generator(next(model.parameters()).device).manual_seed(generator)
    return model.sample(tokenizer, *(condition or kind.condition), **kind.options | options, generator=generator)


def on(device, tree):
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), tree)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


class Rerun(CapturedCall):
    """CUDA graphs without CUDA: a replay computes again what was captured, from the same tensors into the same."""

    def record(self, run):
        results = run()

        def replay():
            for old, new in zip(tree_leaves(results), tree_leaves(run())):
                if old is not None:
                    old.copy_(new)
        return replay, results


@KINDS
@pytest.mark.parametrize("as_captured", [False, True], ids=["plain", "captured"])
def test_cached_sampling_equals_teacher_forcing(kind, as_captured):
    model, tokenizer = kind.make(), kind.tokenizer()
    attributes = set(vars(model))
    drawing = captured(model, Rerun) if as_captured else model
    steps = steps_of(drawing, tokenizer, *kind.condition, **kind.options | dict(cfg=2.0, generator=generators(0)[0]))
    tokens = kind.tokens(steps)
    cond, uncond = (kind.logits(model, *kind.batch_of(c, tokens)) for c in (kind.condition, kind.null(model)))
    torch.testing.assert_close(kind.step_logits(steps), kind.guided(cond, uncond), atol=2e-5, rtol=1e-5)
    assert cond.std() > 0.1 and not torch.allclose(cond, uncond)            # the comparison is not between zeros
    assert set(vars(model)) == attributes and not list(model.blocks.buffers())      # no cache stays in the model


@KINDS
def test_a_batch_is_its_pictures_drawn_alone(kind):
    """With other conditions, guidance and seeds in one batch, and a generator for each picture."""
    model, tokenizer = kind.make(), kind.tokenizer()
    for options in kind.mixed:
        both = draw(kind, model, tokenizer, generator=generators(5, 6), **options)
        steps = steps_of(model, tokenizer, *kind.condition, **kind.options | options, generator=generators(5, 6))
        for i in range(2):
            picture = draw(kind, model, tokenizer, kind.alone(i), generators(5 + i), **own(options, i))
            torch.testing.assert_close(picture[0], both[i], atol=1e-5, rtol=0)
            options_i = kind.options | own(options, i)
            alone = steps_of(model, tokenizer, *kind.alone(i), **options_i, generator=generators(5 + i))
            assert all(torch.equal(a[0], b[i]) for a, b in zip(kind.tokens(alone), kind.tokens(steps), strict=True))
        assert not torch.equal(*both)


@KINDS
def test_the_same_seed_gives_the_same_picture_and_another_seed_another(kind):
    model, tokenizer = kind.make(), kind.tokenizer()
    plain = draw(kind, model, tokenizer, cfg=2.0)
    assert torch.equal(plain, draw(kind, model, tokenizer, cfg=2.0))
    assert plain.shape == (2, 3, 16, 16) and 0 <= plain.min() and plain.max() <= 1
    others = [dict(generator=1), dict(cfg=1.0), dict(condition=kind.others[0]), dict(generator=generators(1, 2)),
              dict(generator=generators(2, 1))]
    pictures = [plain, *(draw(kind, model, tokenizer, **dict(cfg=2.0) | options) for options in others)]
    assert all(not torch.equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])


@KINDS
def test_a_filmstrip_ends_with_the_picture(kind):
    model, tokenizer = kind.make(), kind.tokenizer()
    frames = draw(kind, model, tokenizer, **kind.filmstrip)
    assert len(frames) == kind.frames and torch.equal(frames[-1], draw(kind, model, tokenizer))


@KINDS
@pytest.mark.parametrize("device, call", [
    pytest.param("cuda", CapturedCall, marks=pytest.mark.gpu, id="cuda graphs"),
    pytest.param("cpu", Rerun, id="simulated")])
def test_captured_steps_draw_the_plain_pictures(kind, device, call):
    """With other conditions, seeds, settings and batch sizes than those of the capture, and back."""
    model, tokenizer = kind.make().to(device), kind.tokenizer().to(device)
    calls = []

    def remembered(function, *static):
        calls.append(call(function, *static))
        return calls[-1]
    fast, fast_tokenizer = captured(model, remembered), captured(tokenizer, remembered)
    ways = [*product([kind.condition, *kind.others], kind.draws),
            *((kind.alone(0), own(options, 0)) for options in kind.draws)]
    counts = []
    for _ in range(2):
        for seed, (condition, options) in enumerate(on(device, ways)):
            expected = draw(kind, model, tokenizer, condition, seed, **options)
            pictures = draw(kind, fast, fast_tokenizer, condition, seed, **options)
            for mine, theirs in zip(tree_leaves(pictures), tree_leaves(expected), strict=True):
                torch.testing.assert_close(mine, theirs, atol=kind.cuda_atol if device == "cuda" else 0.0, rtol=0)
        counts.append([len(call.graphs) for call in calls if call.graphs])
    assert counts[0] == counts[1] == kind.graphs                            # the second round found them all
    assert not {"forward_scale", "decode_one", "new_kv_cache"} & set(vars(model))   # the model itself is as it was


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_compiled_blocks_draw_the_plain_pictures(name, monkeypatch):
    """With a backend that traces as torch.compile always does, but generates no code."""
    kind = EVERY[name]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    model, tokenizer = kind.make(), kind.tokenizer()
    compiled = with_compiled_blocks(model)
    for condition in (kind.condition, kind.others[0], kind.alone(0)):
        pictures = [draw(kind, m, tokenizer, condition, cfg=2.0) for m in (compiled, model)]
        torch.testing.assert_close(*pictures, atol=1e-5, rtol=0)
    assert model.blocks[0] is compiled.blocks[0]._orig_mod


class NoWaiting(TorchDispatchMode):
    """Refuses operators for whose result the host waits, once `begin` was called."""

    WAITS = {"_local_scalar_dense", "item", "nonzero", "multinomial", "is_nonzero", "equal", "masked_select", "unique"}
    begun = False

    def begin(self):
        self.begun = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not self.begun or func.overloadpacket.__name__ not in self.WAITS, f"{func} waits for the device"
        return func(*args, **kwargs or {})


def when_the_loop_begins(model, begin):
    """A copy of the model that calls begin() when it makes its KV cache, which is the last thing before its loop."""
    twin = copy.copy(model)

    def new_kv_cache(*size):
        begin()
        return model.new_kv_cache(*size)
    twin.new_kv_cache = new_kv_cache
    return twin


@KINDS
def test_nothing_in_the_loop_waits_for_the_device(kind):
    model, tokenizer = kind.make(), kind.tokenizer()
    for options in kind.draws:
        with NoWaiting() as mode:
            draw(kind, when_the_loop_begins(model, mode.begin), tokenizer, **options)
            with pytest.raises(AssertionError, match="waits"):
                LABELS.sum().item()


@pytest.mark.gpu
@KINDS
def test_nothing_in_the_loop_synchronises_on_cuda(kind):
    model, tokenizer = kind.make().cuda(), kind.tokenizer().cuda()
    forbid = partial(torch.cuda.set_sync_debug_mode, "error")
    for m, t in ((model, tokenizer), (captured(model), captured(tokenizer))):
        draw(kind, m, t, **kind.draws[0])                                   # compiles and captures, which may wait
        try:
            draw(kind, when_the_loop_begins(m, forbid), t, **kind.draws[0])
            assert torch.cuda.get_sync_debug_mode() == 2                    # "error", so it was on
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ----------------------------------------------------------------------------------------------------------------------
# Files and sizes


@KINDS
def test_files_of_every_layout_hold_the_same_model(kind, tmp_path):
    """Files of ours, released files, and the training checkpoints of the originals."""
    model = kind.make(**kind.in_files)
    official = kind.module.export(model)
    for name, content in kind.checkpoints(official).items():
        torch.save(content, tmp_path / name)
    kind.module.save(model, tmp_path / "ours.safetensors")
    for path in tmp_path.iterdir():
        again = kind.load(path, model.config)
        assert replace(again.config, drop_path=model.config.drop_path) == model.config, path    # not in official files
        assert same(again.state_dict(), model.state_dict()) and same(kind.module.export(again), official), path


@pytest.mark.parametrize("module, name, parameters, tolerance", [
    (var, "var_d16", 310_283_520, 0), (var, "var_d20", 600_917_136, 0), (var, "var_d24", 1_033_399_360, 0),
    (var, "var_d30", 2_010_020_356, 0), (var, "var_d36", 2_353_893_904, 0), (llamagen, "c2i_B_256", 110.9e6, 1e-3),
    (llamagen, "c2i_L_384", 342.9e6, 1e-3), (llamagen, "c2i_XL_384", 774.7e6, 1e-3),
    (llamagen, "c2i_XXL_384", 1411e6, 1e-3), (llamagen, "c2i_3B_384", 3097e6, 1e-3),
    (llamagen, "t2i_XL_stage2_512", 777.7e6, 1e-3), (llamagen, "llamagen_B", 110.9e6, 1e-3),
    (infinity, "infinity_125M", 125.15e6, 1e-4), (infinity, "infinity_2b", 2204.6e6, 1e-4),
    (infinity, "infinity_8b", 8375.8e6, 1e-4)])
def test_released_sizes(module, name, parameters, tolerance):
    network = next(kind.network for kind in EVERY.values() if kind.module is module)
    with torch.device("meta"):
        model = network(module.CONFIGS[name])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=tolerance, abs=0)


# ----------------------------------------------------------------------------------------------------------------------
# Training and precision


@KINDS
def test_the_first_loss_is_that_of_a_uniform_guess(kind):
    fresh = kind.network(kind.make().config).eval()
    fresh.init_weights(generator=torch.Generator().manual_seed(0))
    assert fresh.loss(*kind.batch())[0].item() == pytest.approx(kind.uniform_loss, rel=0.02)


@KINDS
def test_training_draws_from_the_generator_only(kind):
    batch = kind.batch()
    without = kind.make(**kind.no_dropping).train().loss(*batch)[0].item()
    for changes in kind.dropping:                                           # each source of randomness alone
        model = kind.make(**kind.no_dropping | changes).train()
        state = torch.get_rng_state()
        losses = [model.loss(*batch, generator=g)[0].item() for g in generators(0, *range(8))]
        assert losses[0] == losses[1] and len(set(losses)) > 1
        assert model.eval().loss(*batch)[0].item() == without               # nothing is dropped in eval mode
        assert torch.equal(state, torch.get_rng_state())


@KINDS
def test_recomputation_changes_neither_gradients_nor_later_draws(kind):
    """All sources of randomness at once."""
    changes = {name: value for one in kind.dropping for name, value in one.items()}
    model, batch = kind.make(**changes).train(), kind.batch()

    def gradients(seed):
        generator = torch.Generator().manual_seed(seed)
        model.zero_grad()
        model.loss(*batch, generator=generator)[0].backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None], generator.get_state()
    (plain, after), (other, _) = gradients(0), gradients(1)
    model.checkpointing = True
    again, after_again = gradients(0)
    for mine, expected in zip(again, plain, strict=True):
        torch.testing.assert_close(mine, expected)
    assert torch.equal(after_again, after) and any(not torch.equal(a, b) for a, b in zip(plain, other))


@KINDS
def test_half_precision_stays_close(kind):
    batch = kind.batch()
    exact = kind.logits(kind.make(), *batch)
    half = kind.logits(kind.module.set_dtype(kind.make(), torch.bfloat16), *batch)
    assert half.dtype == torch.float32 and 0 < (half - exact).norm() / exact.norm() < 0.03


# ----------------------------------------------------------------------------------------------------------------------
# Kernels


def numbers(model, tokenizer, kind, condition, pictures, device, call=None):
    """Logits of greedy drawing, teacher-forced logits, loss and gradients. call: draw with a captured copy."""
    model, tokenizer = model.to(device), tokenizer.to(device)
    condition, batch = on(device, (condition, kind.batch_of(condition, kind.tokenize(pictures))))
    drawing = captured(model, call) if call else model
    steps = steps_of(drawing, tokenizer, *condition, **kind.options | dict(cfg=2.0, top_k=1))
    model.zero_grad()
    loss, _ = model.loss(*batch)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return on("cpu", [kind.step_logits(steps), kind.logits(model, *batch), loss, *gradients])


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["var", "llamagen class", "llamagen text", "infinity"])
def test_kernels_draw_and_learn_what_torch_does(name):
    """For one picture, because the interpreter is slow. A captured LlamaGen has its positions on the device."""
    kind, device = EVERY[name], "cuda" if torch.cuda.is_available() else "cpu"
    arguments = kind.make(), kind.tokenizer(), kind, kind.alone(1), PICTURES[1:], device
    with backend("torch"):
        expected = numbers(*arguments)
    with backend("triton"):
        for mine, theirs in zip(numbers(*arguments, call=Rerun), expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.gpu
@KINDS
def test_cuda_gives_the_numbers_of_the_cpu(kind, monkeypatch):
    """Kernels there, torch here, both in float32 without TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, tokenizer = kind.make(), kind.tokenizer()
    here, there = (numbers(model, tokenizer, kind, kind.condition, PICTURES, device) for device in ("cpu", "cuda"))
    for mine, expected in zip(there, here, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# lib/graphs.py itself


def test_a_captured_call_is_replayed_on_other_numbers():
    """Copies of the arguments go in, static buffers are used in place, and the next call overwrites the results."""
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


def test_calls_that_are_not_worth_a_capture_run_plainly():
    layer, captures = torch.nn.Linear(3, 2), []

    def double(x):
        captures.append(len(x))
        return 2 * layer(x)
    layer.double = double
    twin = captured_method(layer, "double", lambda x: len(x) == 4, call=Rerun)
    for n in (4, 4, 1):
        torch.testing.assert_close(twin.double(randn(n, 3)), 2 * layer(randn(n, 3)))
    assert captures == [4, 4, 4, 1] and twin.weight is layer.weight
