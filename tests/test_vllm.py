"""LlamaGen on vLLM draws what LlamaGen.generate draws. Skipped without vLLM, which lib/check_vllm.sh installs."""
import gc
from contextlib import contextmanager

import pytest
import torch

import llamagen
from lib import serving
from lib.pictures import DEMO
from lib.text import encode_texts, load_llamagen

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

CFGS = [1.0, 1.5, 2.0, 4.0, 1.0, 3.0, 1.2, 7.5]
INTERVALS = [-1, -1, 10, -1, -1, 0, -1, 30]
PROMPTS = ["red heart", "crying cat face", "green apple", "rocket", "sunflower", "a", "french fries", "robot face"]


@contextmanager
def opened(path, config):
    """An Engine, and no trace of it in this process afterwards, so that the next one can start."""
    from vllm.distributed import cleanup_dist_env_and_memory
    engine = serving.Engine(path, config, torch.float32, torch.device("cpu"))
    try:
        yield engine
    finally:
        engine.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()


def draw_arriving(engine, prompts, cfgs, intervals, every=5, **settings):
    """Requests that arrive one by one, `every` steps apart -> their tokens."""
    from vllm import SamplingParams
    core = engine.llm.llm_engine
    waiting = list(enumerate(zip(prompts, cfgs, intervals)))
    tokens = {}
    step = 0
    while waiting or core.has_unfinished_requests():
        if waiting and step % every == 0:
            number, (prompt, cfg, interval) = waiting.pop(0)
            is_text = isinstance(prompt, torch.Tensor)
            core.add_request(
                str(number), {"prompt_embeds": prompt} if is_text else {"prompt_token_ids": [prompt]},
                SamplingParams(**serving.sampling(engine.config, **settings), detokenize=False,
                               extra_args={"cfg": cfg, "cfg_interval": interval}))
        for answer in core.step():
            if answer.finished:
                tokens[int(answer.request_id.split("-")[0])] = list(answer.outputs[0].token_ids)
        step += 1
    return [tokens[number] for number in range(len(prompts))]


GREEDY = dict(temperature=0.0, top_k=0, top_p=1.0, seed=0)


def test_classes_that_arrive_at_different_times():
    path = DEMO / "emoji_llamagen.safetensors"
    model = load_llamagen(path)
    classes = [0, 5, 17, 33, 46, 60, 77, model.config.num_classes]
    with opened(path, model.config) as engine:
        prompts = [model.config.vocab_size + label for label in classes]
        drawn = draw_arriving(engine, prompts, CFGS, INTERVALS, **GREEDY)
        some = dict(cfg_interval=-1, temperature=1.0, top_k=0, top_p=0.8)
        together = engine.draw(prompts, CFGS, seeds=range(8), **some)
        alone = [engine.draw([prompts[i]], [CFGS[i]], seeds=[i], **some)[0] for i in (3, 5)]
        others = engine.draw(prompts, CFGS, seeds=range(8, 16), **some)
        beyond = engine.draw([2 * model.config.vocab_size - 1], [1.0], -1, [0], temperature=0.0, top_k=0, top_p=1.0)
    for label, cfg, interval, tokens in zip(classes, CFGS, INTERVALS, drawn):
        wanted = model.generate(torch.tensor([label]), cfg=cfg, cfg_interval=interval, temperature=0)
        assert tokens == wanted[0].tolist()
    assert [together[3], together[5]] == alone                              # seeds, whatever else is in the batch
    assert together != others
    assert beyond[0] == model.generate(torch.tensor([classes[7]]), temperature=0)[0].tolist()


def test_texts_of_different_lengths():
    path = DEMO / "emoji_llamagen_t2i.safetensors"
    model = load_llamagen(path)
    features = encode_texts(model.text_encoder, PROMPTS, model.config.text_slots)
    with opened(path, model.config) as engine:
        text, mask = llamagen.left_pad(features, model.config.text_slots)
        with torch.no_grad():
            prompts = [row[seen].clone() for row, seen in zip(model.embed_condition(text), mask)]
        drawn = draw_arriving(engine, prompts, CFGS, INTERVALS, **GREEDY)
    for i, tokens in enumerate(drawn):
        wanted = model.generate(text[i:i + 1], mask[i:i + 1], cfg=CFGS[i], cfg_interval=INTERVALS[i], temperature=0)
        assert tokens == wanted[0].tolist()


@pytest.mark.parametrize("config", [
    pytest.param(llamagen.Config(side=8), id="GPT-B"),                      # its first 64 tokens
    pytest.param(llamagen.Config(depth=3, width=400, heads=4, kv_heads=2, hidden=256, side=4, vocab_size=64,
                                 num_classes=10), id="heads of 100, shared keys"),
])
def test_stand_in_weights(config, tmp_path):
    model = llamagen.LlamaGen(config).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():                                # far from uniform, so that no tokens tie
            if parameter.dim() > 1:
                parameter.normal_(0, 0.05, generator=g)
            else:
                parameter.fill_(1)
    llamagen.save(model, tmp_path / "model.safetensors")
    labels = [0, 3, 7, 9]
    with opened(tmp_path / "model.safetensors", config) as engine:
        prompts = [config.vocab_size + label for label in labels]
        drawn = draw_arriving(engine, prompts, CFGS[:4], [-1] * 4, **GREEDY)
    for label, cfg, tokens in zip(labels, CFGS, drawn):
        assert tokens == model.generate(torch.tensor([label]), cfg=cfg, temperature=0)[0].tolist()
