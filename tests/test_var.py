"""VAR: what this model alone promises, beyond the contract of test_transformers.py."""
import pytest
import torch

import var
import vq
from helpers import generators, randn, steps_of

LABELS = torch.tensor([0, 3])


def features(tokenizer):
    return tokenizer.quantize.teacher_input(tokenizer.tokenize(torch.zeros(2, 3, 16, 16)))


def test_guidance_zero_leaves_the_unconditional_half_out(model, tokenizer):
    null = torch.tensor([5, 5])                                             # no class: both halves would be equal
    for labels, cfg, rows in ((LABELS, 2.0, 4), (LABELS, 0, 2), (null, 4, 2)):
        assert all(len(step.logits) == rows for step in steps_of(model, tokenizer, labels, cfg=cfg))


def test_guidance_grows_from_none_to_its_full_strength(model, tokenizer):
    steps = steps_of(model, tokenizer, LABELS, cfg=3.0)
    assert [step.guidance for step in steps] == [0, 1, 2, 3]


def test_editing_keeps_what_the_mask_keeps(model, tokenizer):
    given = tokenizer.tokenize(randn(1, 3, 16, 16).clamp(-1, 1))

    def draw(keep):
        return model.sample(tokenizer, LABELS[:1], given_tokens=given, keep_mask=keep, generator=generators(0)[0])
    everything, nothing = torch.ones(4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
    torch.testing.assert_close(draw(everything), tokenizer.detokenize(given).add(1).div(2))
    assert (draw(nothing) - draw(everything)).abs().mean() > 1e-3
    with pytest.raises(ValueError, match="editing takes both: .* given_tokens=, the mask as keep_mask="):
        model.sample(tokenizer, LABELS, keep_mask=everything)


def test_an_edit_mask_is_a_box_or_all_but_a_box():
    assert var.edit_mask((0, 0, 0.5, 1), 4, inpaint=False).tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    box = 0.1, 0.1, 0.8, 0.8
    assert torch.equal(var.edit_mask(box, 16), ~var.edit_mask(box, 16, inpaint=False))


def test_random_labels_and_wrong_ones(model):
    assert model.check_labels(40, torch.Generator().manual_seed(0)).unique().tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="class ids must be 0 .. 4, or 5 for the null class, not .7."):
        model.check_labels(torch.tensor([7]))


@pytest.mark.parametrize("name, entries", [("var_d16", 220), ("var_d20", 272), ("var_d24", 324), ("var_d30", 402),
                                           ("var_d36", 446)])
def test_entries_of_the_released_files(name, entries):
    with torch.device("meta"):
        model = var.VAR(var.CONFIGS[name])
    state = vq.rename_keys(model.state_dict(), var.RENAMES, inverse=True)
    assert len(state) + 2 + model.config.depth == entries                   # with the buffers that export() adds


def test_small_files_stay_close(model, tokenizer, tmp_path):
    exact = model(LABELS, features(tokenizer))
    for dtype, error in ((torch.float16, 2e-3), (torch.float8_e4m3fn, 0.15)):       # 11 and 4 bits of mantissa
        var.save(model, tmp_path / "a.safetensors", dtype)
        small = var.load(tmp_path / "a.safetensors")
        assert small.head.weight.dtype == torch.float32
        assert 0 < (small(LABELS, features(tokenizer)) - exact).norm() / exact.norm() < error


def test_fine_tuning_on_other_classes_keeps_the_null_row_last(model, tmp_path):
    var.save(model, tmp_path / "a.safetensors")
    tuned = var.load(tmp_path / "a.safetensors", num_classes=9, generator=torch.Generator().manual_seed(0))
    assert tuned.config.num_classes == 9 and tuned.class_embed.weight.shape[0] == 10
    assert torch.equal(tuned.class_embed.weight[-1], model.class_embed.weight[-1])
    assert torch.equal(tuned.head.weight, model.head.weight)


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


@pytest.mark.gpu
def test_the_tokenizer_finds_the_same_codes_on_cuda(tokenizer):
    image = torch.ones(1, 3, 16, 16)
    here = tokenizer.tokenize(image)
    there = tokenizer.cuda().tokenize(image.cuda())
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
