"""T5 and the cleaning of captions."""
import sys

import pytest
import torch

import vq
from helpers import T5_CONFIG, shards
from lib.text import WORD_T5, T5Encoder, byte_ids, clean_caption, load_t5, load_tokenizer, word_ids


def test_t5_does_not_see_padding():
    t5 = T5Encoder(T5_CONFIG).eval()
    t5.init_weights(torch.Generator().manual_seed(0))
    (both, mask), (alone, none) = t5.encode(["a cat", "fox"]), t5.encode(["fox"])
    assert none is None and mask.sum(1).tolist() == [6, 4]
    torch.testing.assert_close(both[1:, :4], alone, atol=1e-5, rtol=0)
    ids, _ = byte_ids(["é", ""], 512)
    assert ids.tolist() == [[0xC3 + 3, 0xA9 + 3, 1], [1, 0, 0]]
    assert byte_ids(["x" * 100], 8)[0].shape == (1, 8)


def test_words_are_two_hashes_each():
    ids, mask = word_ids(["Noto style, red heart", "heart"])
    assert ids.shape == (2, 9) and mask.sum(1).tolist() == [9, 3] and ids[0, -1] == 1
    assert ids[0, 6:8].tolist() == ids[1, :2].tolist()                      # of "heart", wherever it stands
    assert 2 <= ids[mask & (ids != 1)].min() and ids.max() < WORD_T5.vocab_size
    assert word_ids(["heart " * 100], 32)[0].shape == (1, 32)


def test_t5_is_that_of_transformers(tmp_path):
    """A small random T5 saved by transformers, in shards; prompts longer than the exact relative positions."""
    transformers = pytest.importorskip("transformers", reason="the reference of this test; not needed otherwise")
    config = transformers.T5Config(vocab_size=300, d_model=64, d_kv=16, num_heads=3, num_layers=3, d_ff=96,
                                   feed_forward_proj="gated-gelu", dropout_rate=0.0)
    torch.manual_seed(0)
    reference = transformers.T5EncoderModel(config).eval()
    reference.save_pretrained(tmp_path / "t5", max_shard_size="200KB")
    assert len(list((tmp_path / "t5").glob("*.safetensors"))) > 1
    t5 = load_t5(tmp_path / "t5")
    ids = torch.randint(3, 300, (2, 200), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(200) < torch.tensor([[200], [150]])
    with torch.no_grad():
        expected, found = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state, t5(ids, mask)
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-4, rtol=0)


def test_t5_folders(tmp_path):
    t5 = T5Encoder(T5_CONFIG)
    t5.init_weights(torch.Generator().manual_seed(0))
    state = vq.rename_keys({k: v.clone() for k, v in t5.state_dict().items()}, T5Encoder.RENAMES, inverse=True)
    extra = {"encoder.embed_tokens.weight": state["shared.weight"].clone(), "lm_head.weight": torch.zeros(2, 2),
             "decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2, 2)}
    again = load_t5(shards(tmp_path / "t5", state | extra, 3))
    assert again.config == T5_CONFIG and again.tokenize is byte_ids
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), t5.state_dict().values()))
    state["shared.weight"] = torch.zeros(32128, 128)
    with pytest.raises(vq.CheckpointError, match="has no tokenizer.json"):
        load_t5(shards(tmp_path / "words", state))
    with pytest.raises(vq.CheckpointError, match="not a T5 of version 1.1"):
        load_t5(shards(tmp_path / "other", {"x": torch.zeros(1)}, 1))


def test_tokenizer_json_is_read_by_its_package(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="an optional package, for Flan-T5's tokenizer.json")
    words = tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "cat": 4}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenize = load_tokenizer(tmp_path / "tokenizer.json")
    ids, mask = tokenize(["a cat", "a dog cat", ""], 512)
    assert ids.tolist() == [[3, 4, 1, 0], [3, 2, 4, 1], [1, 0, 0, 0]] and mask.sum(1).tolist() == [3, 4, 1]
    assert tokenize(["a cat a cat"], 3)[0].tolist() == [[3, 4, 1]]


def test_cleaning_captions_says_which_package_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match="ftfy"):
        clean_caption("a cat")
