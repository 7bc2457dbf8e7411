"""The ops against float64, against slower definitions, and against torch's own sampler."""
import pytest
import torch
from torch.utils._pytree import tree_map

from conftest import randn
from triton_ops import REGISTRY, exponential_noise, filter_logits, qk_norm_rope, sample_logits, vq_nearest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", REGISTRY)
def test_equals_float64(name, dtype):
    """Same rounded inputs, computed in float64. float32 within the op's tolerance, half precision within one rounding."""
    op = REGISTRY[name]
    args, kwargs = op.make_inputs(torch.Generator().manual_seed(0), op.shapes["odd"], dtype)
    double = lambda x: x.double() if isinstance(x, torch.Tensor) else x
    expected = op.fn(*tree_map(double, args), **tree_map(double, kwargs))
    out = op.fn(*args, **kwargs)
    tol = {torch.float32: op.tol, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype] if op.tol else 0
    for a, b in zip(out if isinstance(out, tuple) else [out], expected if isinstance(expected, tuple) else [expected]):
        if a.dtype == torch.int64:
            assert torch.equal(a, b)
        else:
            assert a.dtype == dtype and (a.double() - b).abs().max() <= tol * b.abs().max()


def slow_filter(logits, top_k, top_p):
    """One row at a time, by the definition."""
    out = logits.clone()
    for row in out:
        if top_k:
            row[row < row.sort(descending=True).values[min(top_k, len(row)) - 1]] = -torch.inf
        if 0 < top_p < 1:
            p = row.softmax(0)
            mass_above = torch.stack([p[p > v].sum() for v in p])
            row[mass_above >= top_p] = -torch.inf
    return out


@pytest.mark.parametrize("top_k, top_p", [(0, 0.0), (5, 0.0), (0, 0.7), (9, 0.6), (1, 0.0), (0, 1e-6), (64, 1.0), (200, 0.5)])
def test_filter_keeps_what_its_definition_keeps(top_k, top_p):
    logits = randn(50, 64) * 3
    logits[:, 10] = logits[:, 11]                                           # ties
    assert torch.equal(filter_logits(logits, top_k, top_p), slow_filter(logits, top_k, top_p))


def test_draws_are_those_of_multinomial():
    logits = randn(300, 64) * 2
    mine = sample_logits(logits, generator=torch.Generator().manual_seed(3))
    p = logits.softmax(-1)
    assert torch.equal(mine, torch.multinomial(p, 1, True, generator=torch.Generator().manual_seed(3))[:, 0])


def test_draws_follow_the_distribution():
    logits = randn(1, 16).expand(20000, 16)
    counts = sample_logits(logits, generator=torch.Generator().manual_seed(0)).bincount(minlength=16)
    expected = 20000 * logits[0].softmax(0)
    assert ((counts - expected) ** 2 / expected).sum() < 37.7               # chi-square, 15 degrees of freedom, p = 0.001


def test_one_generator_per_picture_makes_draws_independent_of_the_batch():
    make = lambda *seeds: [torch.Generator().manual_seed(s) for s in seeds]
    together = exponential_noise((2, 3, 8), make(5, 6))
    assert torch.equal(together[1:], exponential_noise((1, 3, 8), make(6)))
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        exponential_noise((3, 8), make(5, 6))


def test_cache_is_filled_in_place_and_returned_up_to_the_end():
    q, k, v = randn(2, 3, 3, 2, 8).unbind(2)
    k_cache, v_cache = torch.full((2, 2, 7, 8), torch.nan), torch.full((2, 2, 7, 8), torch.nan)
    _, k1, v1 = qk_norm_rope(q, k, v)
    k_cache[:, :, :2], v_cache[:, :, :2] = 0, 0
    _, k2, v2 = qk_norm_rope(q, k, v, k_cache=k_cache, v_cache=v_cache, pos=2)
    assert k2.shape[2] == 5 and torch.equal(k2[:, :, 2:], k1) and torch.equal(v2[:, :, 2:], v1)
    assert k_cache[:, :, 5:].isnan().all()


def test_nearest_code_takes_the_lowest_of_equals_and_any_number_of_rows():
    codes = torch.cat([randn(6, 4), randn(6, 4)])                           # every code twice
    assert vq_nearest(codes[6:], codes).tolist() == list(range(6))
    assert vq_nearest(codes[:0], codes).shape == (0,)
    assert vq_nearest(randn(3, 4), codes[:1]).tolist() == [0, 0, 0]
