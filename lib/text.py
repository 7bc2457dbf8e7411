"""Text for LlamaGen and Infinity: Flan-T5's encoder, caption cleaning, files of prompts and of text features."""
import html
import json
import math
import re
import sys
import urllib.parse
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

import infinity
import llamagen
import vq
from lib.console import UserError, read_text, understanding
from lib.weights import read_metadata

# ----------------------------------------------------------------------------------------------------------------------
# The encoder of Flan-T5


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 encoder (version 1.1, gated GELU). Files contain all of them except max_distance and eps."""

    vocab_size: int = 32128
    width: int = 2048                           # Ct. All defaults are Flan-T5-XL's sizes
    layers: int = 24
    heads: int = 32
    head_dim: int = 64                          # heads * head_dim need not be the width
    hidden: int = 5120
    buckets: int = 32                           # for relative positions
    max_distance: int = 128                     # all larger distances share the last bucket
    eps: float = 1e-6


WORD_T5 = T5Config(vocab_size=4098, width=128, layers=3, heads=4, head_dim=32, hidden=256)  # the demo's, on words
MOST_BYTES = 384                                # ids of ByT5. An encoder that has no more reads bytes


class T5Attention(nn.Module):
    """Bidirectional attention without biases and without the usual 1 / sqrt(head_dim): T5's weights absorbed it."""

    def __init__(self, config):
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(config.width, inner, bias=False)
        self.v = nn.Linear(config.width, inner, bias=False)
        self.o = nn.Linear(inner, config.width, bias=False)

    def forward(self, x, bias):                                             # (B, T, Ct), (B or 1, H, T, T)
        q, k, v = (rearrange(f(x), "b t (h d) -> b h t d", h=self.heads) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        return self.o(rearrange(out, "b h t d -> b t (h d)"))


class T5Block(nn.Module):
    """x = x + attention(norm1(x)), then x = x + wo(gelu(wi_0 h) * wi_1 h) with h = norm2(x)."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.width, config.eps)
        self.norm2 = nn.RMSNorm(config.width, config.eps)
        self.attn = T5Attention(config)
        self.wi_0 = nn.Linear(config.width, config.hidden, bias=False)
        self.wi_1 = nn.Linear(config.width, config.hidden, bias=False)
        self.wo = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x, bias):
        dtype = self.wo.weight.dtype                                        # x itself is float32, because it grows
        x = x + self.attn(self.norm1(x).to(dtype), bias)                    # beyond what float16 can hold
        h = self.norm2(x).to(dtype)
        return x + self.wo(F.gelu(self.wi_0(h), approximate="tanh") * self.wi_1(h))


class T5Encoder(nn.Module):
    """Token ids -> features. `tokenize` turns prompts into ids: what `load_t5` found beside the weights, else bytes, or
    in encoders of the demo words."""

    RENAMES = [     # fragment of a key of transformers' T5EncoderModel, fragment of our key
        ("shared", "embed"), ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "relative_bias"),
        ("encoder.block.{}.layer.0.SelfAttention", "blocks.{}.attn"), ("encoder.final_layer_norm", "norm"),
        ("encoder.block.{}.layer.0.layer_norm", "blocks.{}.norm1"),
        ("encoder.block.{}.layer.1.layer_norm", "blocks.{}.norm2"),
        ("encoder.block.{}.layer.1.DenseReluDense", "blocks.{}"),
    ]

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokenize = byte_ids if config.vocab_size <= MOST_BYTES else word_ids
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.relative_bias = nn.Embedding(config.buckets, config.heads)     # stored with the first layer, used by all
        self.blocks = nn.ModuleList(T5Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.eps)

    def bucket(self, distance):
        """Key position - query position -> bucket, int64.

        Half of the buckets are for each sign. Half of those stand for one distance each, the others for ranges that
        grow logarithmically up to max_distance.
        """
        half = self.config.buckets // 2
        exact = half // 2
        n = distance.abs()
        far = (n.clamp(min=1).float() / exact).log() / math.log(self.config.max_distance / exact) * (half - exact)
        far = (exact + far.long()).clamp(max=half - 1)
        return torch.where(distance > 0, half, 0) + torch.where(n < exact, n, far)

    def forward(self, ids, mask=None):
        """ids (B, T) int64, mask (B, T) bool, False for padding -> features (B, T, Ct) float32."""
        position = torch.arange(ids.shape[1], device=ids.device)
        bias = self.relative_bias(self.bucket(position - position[:, None]))            # (T, T, H)
        bias = rearrange(bias, "q k h -> 1 h q k")
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None], -math.inf)
        x = self.embed(ids).float()
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)

    def encode(self, prompts, max_length=512):
        """Prompts -> features (B, T, Ct) and mask (B, T) bool, or None where no prompt is padded; T: of the longest."""
        device = self.embed.weight.device
        ids, mask = self.tokenize(prompts, max_length)
        mask = None if bool(mask.all()) else mask.to(device)
        return self(ids.to(device), mask), mask

    @torch.no_grad()
    def init_weights(self, generator=None):
        """T5's own rule: normal with variance 1 / inputs. q is smaller, because nothing divides by sqrt(head_dim).

        Embeddings have variance 1 in T5. Here they start small: Adam's steps are then large beside them, which is what
        the embeddings of rare words need.
        """
        c = self.config
        for name, p in self.named_parameters():
            if "norm" in name:
                p.fill_(1)
            elif "embed" in name:
                p.normal_(0, 0.01, generator=generator)
            elif "relative_bias" in name:
                p.normal_(0, c.width ** -0.5, generator=generator)
            else:
                p.normal_(0, (p.shape[1] * (c.head_dim if ".q." in name else 1)) ** -0.5, generator=generator)


def byte_ids(prompts, max_length=512):
    """Tokens without a vocabulary file, as ByT5's: UTF-8 bytes + 3, then 1 for the end; 0 pads -> ids, mask (B, T)."""
    rows = [torch.tensor([b + 3 for b in prompt.encode()[:max_length - 1]] + [1]) for prompt in prompts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, ids != 0


def word_ids(prompts, max_length=512):
    """Tokens without a vocabulary: two hashes of each word, then 1 for the end; 0 pads -> ids, mask (B, T).

    Hardly any two words share both hashes. A network that has never seen text learns what words mean sooner than how
    they are spelt.
    """
    def hashes(word):
        return [2 + zlib.crc32(salt + word.encode()) % (WORD_T5.vocab_size - 2) for salt in (b"a", b"b")]
    rows = []
    for prompt in prompts:
        ids = [number for word in re.findall(r"\w+", prompt.lower()) for number in hashes(word)]
        rows.append(torch.tensor(ids[:max_length - 1] + [1]))
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, ids != 0


def load_tokenizer(path):
    """The function prompts, max_length -> ids, mask (B, T) of a `tokenizer.json`. Needs the package `tokenizers`."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise vq.CheckpointError(f"{path}: to read it, `pip install tokenizers`") from None
    tokenizer = Tokenizer.from_file(str(path))

    def tokenize(prompts, max_length=512):
        tokenizer.enable_truncation(max_length)
        tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
        rows = tokenizer.encode_batch(list(prompts))
        return torch.tensor([row.ids for row in rows]), torch.tensor([row.attention_mask for row in rows]).bool()
    return tokenize


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def load_t5(path, width=None, device="cpu", dtype=None):
    """A T5Encoder in eval mode from a Hugging Face folder (safetensors or .bin, sharded or not, with tokenizer.json).

    width: of the features that a model reads; raises UserError if the encoder has others. dtype: by default bfloat16 on
    a GPU, else float32. Decoder weights are left out. Raises vq.CheckpointError.
    """
    state, _ = vq.read_checkpoint(path)
    vq.require(state, "shared.weight", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
               "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", path=path,
               what="a T5 of version 1.1 (such as google/flan-t5-xl)")
    state = {k: v for k, v in state.items() if k.startswith(("shared.", "encoder.")) and "embed_tokens" not in k}
    state = vq.rename_keys(state, T5Encoder.RENAMES)
    with vq.understanding(path, "a T5 of version 1.1"):
        config = infer_t5_config(state)
    if width is not None and config.width != width:
        raise UserError(f"--t5 {path}: has features of {config.width} numbers, but the model reads {width}; all "
                        "released ones use google/flan-t5-xl")
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    model = vq.build_on(device, T5Encoder, config, cast=lambda model: model.to(dtype))
    vq.load_strict(model, state, path)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if (folder / "tokenizer.json").exists():
        model.tokenize = load_tokenizer(folder / "tokenizer.json")
    elif config.vocab_size > MOST_BYTES and config.vocab_size != WORD_T5.vocab_size:
        raise vq.CheckpointError(f"{folder}: has no tokenizer.json; it belongs to the weights, get it from there too")
    return model.eval()


def save_t5(model, path, dtype=None):
    """Write a T5Encoder as safetensors with the keys of transformers' T5EncoderModel, which `load_t5` reads."""
    vq.save_checkpoint(path, vq.rename_keys(model.state_dict(), T5Encoder.RENAMES, inverse=True), model.config, dtype)


def infer_t5_config(state):
    """The T5Config of a state dict under our keys."""
    vocab_size, width = state["embed.weight"].shape
    buckets, heads = state["relative_bias.weight"].shape
    inner = len(state["blocks.0.attn.q.weight"])
    hidden = len(state["blocks.0.wi_0.weight"])
    layers = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    return T5Config(vocab_size, width, layers, heads, inner // heads, hidden, buckets)


def load_llamagen(path, **options):
    """llamagen.load, with the text encoder that a file of ours may hold; its sizes are in the header."""
    if encoder := read_metadata(path).get("text_encoder"):
        config = vq.config_from_json(T5Config, json.dumps(encoder), path)
        options["text_encoder"] = T5Encoder(config)
    return llamagen.load(path, **options)


def load_infinity(path, **options):
    """infinity.load, with the text encoder that a file of ours may hold; its sizes follow from its shapes."""
    state, _ = vq.read_checkpoint(path, nested=infinity.NESTED)
    state = {k.removeprefix("text_encoder."): v for k, v in state.items() if k.startswith("text_encoder.")}
    if state:
        with vq.understanding(path, "an Infinity with a text encoder"):
            options["text_encoder"] = T5Encoder(infer_t5_config(vq.rename_keys(state, T5Encoder.RENAMES)))
    return infinity.load(path, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Prompts and their features


@torch.no_grad()
def encode_texts(t5, texts, slots, clean=False):
    """Features of texts: a list of (n, Ct) on the host, n at most `slots`. clean: clean them first, as for LlamaGen."""
    cleaned = texts
    if clean:
        try:
            cleaned = [clean_caption(clean_caption(text)) for text in texts]
        except ImportError as e:
            raise UserError(f"cleaning prompts as the authors did needs {e.name}: pip install ftfy beautifulsoup4, or "
                            "leave it out with --no-clean") from None
    lengths = t5.tokenize(cleaned, slots + 1)[1].sum(1).tolist()
    for text, n in zip(texts, lengths):
        if n > slots:
            tqdm.write(f"note: only the first {slots} tokens are read of: {text[:60]}...", file=sys.stderr)
    features, _ = t5.encode(cleaned, slots)
    return [f[:n].cpu() for f, n in zip(features, lengths)]


def read_prompts(path):
    """A file of --prompts: (the prompts, the lines of a .jsonl or None). Raises UserError."""
    text = read_text(path, "UTF-8 text with one prompt per line", "--prompts")
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise UserError(f"--prompts {path}: no prompt in it; expected one per line")
    lines = [line for _, line in numbered]
    if Path(path).suffix.lower() != ".jsonl":
        if is_json(text) or is_json(lines[0]):
            raise UserError(f"--prompts {path}: is JSON; expected one prompt per line as plain text, or a name that "
                            'ends in .jsonl and {"prompt": "..."} on every line')
        return [line.strip() for line in lines], None
    prompts = []
    for number, line in numbered:
        name = f"--prompts {path}, line {number}"
        with understanding(name, '{"prompt": "..."}'):
            prompt = json.loads(line)["prompt"]
            prompt.encode()                                                 # it is text, without half characters
            prompts.append(prompt)
    return prompts, lines


def is_json(text):
    """Whether a text is a list or an object in JSON."""
    if not text.lstrip().startswith(("[", "{")):
        return False
    try:
        json.loads(text)
    except ValueError:
        return False
    except RecursionError:                                                  # nested deeper than any prompt
        return True
    return True


def save_features(features, path):
    """Writes features {prompt: (T, Ct)} in half precision, for `read_features`."""
    from safetensors.torch import save_file
    state = {f"text.{i}": rows.half() for i, rows in enumerate(features.values())}
    with vq.atomic(path) as temporary:
        save_file(state, temporary, {"prompts": json.dumps(list(features))})


def read_features(path, width, longest):
    """A file of --features: {prompt: (T, Ct) float32}, T at most `longest`. Raises UserError."""
    state, _ = vq.read_checkpoint(path)
    name = f"--features {path}"
    from safetensors import SafetensorError, safe_open
    with understanding(name, "a file that --save-features wrote"):
        try:
            with safe_open(path, "pt") as f:
                prompts = json.loads(f.metadata()["prompts"])
        except SafetensorError as e:                                        # a .pth
            raise ValueError(e) from None
        if not isinstance(prompts, list) or not prompts:
            raise ValueError("no list of prompts in its header")
        features = {prompt: state[f"text.{i}"].float()[:longest] for i, prompt in enumerate(prompts)}
        for prompt, rows in features.items():
            if not isinstance(prompt, str) or rows.dim() != 2 or not len(rows) or not rows.isfinite().all():
                raise ValueError(f"no usable features of {prompt!r}")
            if rows.shape[1] != width:
                raise UserError(f"{name}: has features of {rows.shape[1]} numbers, but the model reads {width}")
    return features


# ----------------------------------------------------------------------------------------------------------------------
# Cleaning captions from the web

# Patterns and replacements. The first list is applied to a caption as it was found, the second after its markup was
# removed, the third after its encoding was repaired.
WEB_REMAINS = [
    (r"<person>", "person"),                                                # a placeholder of one data set
    (r"\b(https?:/*|www\.)\S+", ""),                                       # addresses, with or without the protocol
    (r"\b[\w.-]+\.(com|co|net|org|edu|gov|info|ru|it)\b/?\S*", ""),
]
ORNAMENT = [
    (r"@\w+\b", ""),                                                       # user names
    (r"[\u3040-\u30ff\u31c0-\u31ff\u3200-\u4dbf\u4e00-\u9fff]+", ""),       # Chinese and Japanese script
    (r"[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
     r"\ufe63\uff0d]+", "-"),                                              # every kind of dash
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?|&amp", ""),
    (r"\b\d{1,3}(\.\d{1,3}){3}\b", " "),                                   # IP addresses
    (r"\d:\d\d\s+$", ""),                                                  # the time of a subtitle
    (r"\\n", " "),
    (r"#\d{1,3}\b|#\d{5,}\b|\b\d{6,}\b", ""),                             # serial numbers; years stay
    (r"\S+\.(png|jpe?g|bmp|webp|eps|pdf|apk|mp4)\b", ""),                  # file names
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
]
NOISE = [
    (r"\b[a-z]{1,3}\d{3,15}\b|\b[a-z]+\d+[a-z]+\b|\b\d+[a-z]+\d+\b", ""),   # order numbers, such as jc6640vc
    (r"(worldwide\s+)?(free\s+)?shipping\b|\bfree\s+download\b|\bdownload\s+free\b", ""),
    (r"\bclick\s+(for|on)\s+\w+", ""),
    (r"\b(png|jpe?g|bmp|webp|eps|pdf|apk|mp4)(\s+images?)?\b", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),                                # sizes, such as 1920x1080
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),                                              # a missing space after a comma or full stop
    (r"\s+", " "),
    (r"^[\"'](.+)[\"']$", r"\1"),                                          # a caption that is one quotation
    (r"^['_,:;-]|['_,:;+-]$|^\.\S+$", ""),
]


def clean_caption(text):
    """Clean a caption as LlamaGen's were: lower case, without addresses, markup, file names and ornament.

    The text-to-image models were trained on captions from the web, cleaned twice, `clean_caption(clean_caption(x))`:
    the second pass removes what the first one exposes. Raises ImportError without ftfy and beautifulsoup4.
    """
    import ftfy
    from bs4 import BeautifulSoup
    text = urllib.parse.unquote_plus(str(text)).strip().lower()             # a+b%20c -> a b c
    text = _substitute(WEB_REMAINS, text)
    text = _substitute(ORNAMENT, BeautifulSoup(text, features="html.parser").text)
    if len(re.findall("[-_]", text)) > 3:                                   # words_joined_to_a_file_name
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _substitute(NOISE, text).strip()


def _substitute(rules, text):
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text
