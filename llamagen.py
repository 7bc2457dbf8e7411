"""LlamaGen: class or text -> image by next-token prediction. Full definition of the model, all of it in this file.

The claim of the paper is that a picture needs no model of its own: a plain Llama, trained as on text, draws as well as
diffusion models do, if the tokenizer is good. The tokenizer (vq.py, single scale) turns a picture of G x G patches, of
16 x 16 pixels each, into an index per patch; read row by row they are a sentence of N = G * G words, and drawing is
writing it:

    class c --> a row of a table --> 1 slot          text features (B, 120, Ct) --> two-layer MLP --> 120 slots
                      |                                                                 |
    positions      slot ... slot | token 0    token 1    ...    token N-2               T slots, then the picture
                      |              |           |                  |
    transformer    every position sees itself and all before it
                      |              |           |                  |
    logits         token 0        token 1     token 2    ...    token N-1               V each

    tokens (B, N) -> codebook rows (B, 8, G, G) -> decoder -> image

How it differs from the Llama of text:
- positions are rotated in two dimensions: of a head's pairs the first half turns with the row of a token, the second
  with its column (RoPE). Rows and columns beyond those of its training mean nothing to a model: it draws one size;
- the condition stands in front as T slots, 1 for a class, 120 for a text, padded on the left so that its last word is
  next to the picture. Their rotation table is zero, not the identity: q and k vanish there. So a picture token gives
  all slots the same score, 0, and a slot those before it; the condition enters as a mean of v alone. Hardly meant, but
  trained so, and so it must stay;
- padding is hidden from all others, in training and sampling, but sees itself, or its softmax would sum nothing;
- classifier-free guidance: a second row per picture, with the null class, or the null text in every slot (and the
  padding of its prompt), and logits u + cfg (c - u). `cfg_interval` ends it after so many tokens + 2.
Otherwise it is Llama: RMSNorm before each branch, SwiGLU, no biases, untied output. Generation is one prefill of the
slots and N - 1 steps of one token, whose keys and values are appended to a cache; the step is all that speed depends
on, and reads every weight once: for a picture or two at a time it can be no faster than memory.

Letters: B batch, R rows (2B with guidance, else B), T condition slots, N tokens of a picture, L = T + N, l tokens of
one call, C width, H heads, D head dim, V codebook size, G side of the token map, Ct text width. Paper: Autoregressive
Model Beats Diffusion, arXiv 2406.06525. Released weights, repository FoundationVision/LlamaGen: c2i_B_256.pt,
c2i_B_384.pt 111 M parameters, c2i_L_256.pt, c2i_L_384.pt 343 M, c2i_XL_384.pt 775 M, c2i_XXL_384.pt 1.4 B,
c2i_3B_384.pt 3.1 B, with vq_ds16_c2i.pt; peizesun/llamagen_t2i: t2i_XL_stage1_256.pt, t2i_XL_stage2_512.pt 778 M, with
vq_ds16_t2i.pt and the features of Flan-T5-XL. The number is the side of the pictures.

    tokenizer, model = vq.load("vq_ds16_c2i.pt"), llamagen.load("c2i_L_384.pt")
    images = model.sample(tokenizer, torch.tensor([207, 360]), cfg=4, top_k=2000,
                          generator=torch.Generator().manual_seed(0))       # (2, 3, 384, 384) in [0, 1]
"""
import html
import math
import re
import urllib.parse
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import vq
from triton_ops import adaln_modulate, decode_attention, exponential_noise, qk_norm_rope, sample_logits


@dataclass(frozen=True)
class Config:
    """Sizes of a LlamaGen. Released files tell all but heads, side, rope_base, norm_eps and what training drops."""

    depth: int = 12
    width: int = 768                            # C
    heads: int = 12                             # H
    kv_heads: int = 0                           # of keys and values, each for H / kv_heads of queries; 0: as many
    hidden: int = 2048                          # width inside the feed-forward
    side: int = 16                              # G, of the token map
    vocab_size: int = 16384                     # V
    num_classes: int = 1000                     # class `num_classes` is the null class; 0: text instead of classes
    text_width: int = 0                         # Ct; 0: classes instead of text
    text_slots: int = 120
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    cond_drop: float = 0.1                      # share of conditions replaced by the null one in training
    dropout: float = 0.1                        # of embeddings and both branches, in training
    drop_path: float = 0.0                      # of the last block; if not 0, the branches have no dropout

    @property
    def slots(self):
        """T, positions before the picture."""
        return self.text_slots if self.text_width else 1


SIZES = {  # depth, width, heads, hidden; hidden is 8/3 of the width, rounded up to a multiple of 256
    "B": (12, 768, 12, 2048), "L": (24, 1024, 16, 2816), "XL": (36, 1280, 20, 3584), "XXL": (48, 1536, 24, 4096),
    "3B": (24, 3200, 32, 8704),                                             # 3B: heads of 100
}


def _sized(size, pixels, **changes):
    return Config(*SIZES[size][:3], hidden=SIZES[size][3], side=pixels // 16, **changes)


CONFIGS = {
    **{f"c2i_{size}_{pixels}": _sized(size, pixels) for size, pixels in (
        ("B", 256), ("B", 384), ("L", 256), ("L", 384), ("XL", 384), ("XXL", 384), ("3B", 384))},
    **{f"t2i_XL_{name}": _sized("XL", pixels, num_classes=0, text_width=2048)
       for name, pixels in (("stage1_256", 256), ("stage2_512", 512))},
    "emoji_llamagen": Config(depth=6, width=192, heads=6, hidden=512, side=8, vocab_size=2048, num_classes=98),
    "emoji_llamagen_t2i": Config(depth=6, width=192, heads=6, hidden=512, side=8, vocab_size=2048, num_classes=0,
                                 text_width=128, text_slots=48),            # 32 x 32 pixels, both trained in demo/
}
# For --random-weights: the sizes by their own names, at 384 pixels but for the smallest
ALIASES = {"llamagen_B": "c2i_B_256"} | {f"llamagen_{size}": f"c2i_{size}_384" for size in ("L", "XL", "XXL", "3B")}
CONFIGS |= {alias: CONFIGS[name] for alias, name in ALIASES.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Text


def left_pad(rows, slots=120):
    """Text features, a list of B (n, Ct) -> features (B, slots, Ct) and mask (B, slots) bool, False and zero where a
    text has no word. Texts stand at the right, next to the picture; of too long ones the first `slots` rows remain."""
    lengths = torch.tensor([min(len(row), slots) for row in rows])
    text = torch.stack([F.pad(row[:slots], (0, 0, slots - min(len(row), slots), 0)) for row in rows])
    return text, (torch.arange(slots) >= slots - lengths[:, None]).to(text.device)


# Pattern, and what it becomes. The first list is for captions as they were found, the second after mended encodings.
WEB_REMAINS = [
    (r"<person>", "person"),                                                # a placeholder of one data set
    (r"\b(https?:/*|www\.)\S+", ""),                                       # addresses, with or without the protocol
    (r"\b[\w.-]+\.(com|co|net|org|edu|gov|info|ru|it)\b/?\S*", ""),
]
ORNAMENT = [
    (r"@\w+\b", ""),                                                       # names of users
    (r"[\u3040-\u30ff\u31c0-\u31ff\u3200-\u4dbf\u4e00-\u9fff]+", ""),       # Chinese and Japanese script
    (r"[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
     r"\ufe63\uff0d]+", "-"),                                              # every kind of dash
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?|&amp", ""),
    (r"\b\d{1,3}(\.\d{1,3}){3}\b", " "),                                   # IP addresses
    (r"\d:\d\d\s+$", ""),                                                  # the time of a subtitle
    (r"\\n", " "),
    (r"#\d{1,3}\b|#\d{5,}\b|\b\d{6,}\b", ""),                             # numbers that count something; years stay
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
    (r"(\D[,./])\b", r"\1 "),                                              # a space where a sentence goes on
    (r"\s+", " "),
    (r"^[\"'](.+)[\"']$", r"\1"),                                          # a caption that is one quotation
    (r"^['_,:;-]|['_,:;+-]$|^\.\S+$", ""),
]


def clean_caption(text):
    """A caption as T5 was given it in training: lower case, without addresses, markup, file names and ornament.

    The text-to-image models saw captions from the web cleaned by such rules, twice, `clean_caption(clean_caption(x))`;
    the second pass removes what the first lays open. Needs the packages ftfy and beautifulsoup4: raises ImportError.
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


# ----------------------------------------------------------------------------------------------------------------------
# Building blocks


def rope_table(config, device=None):
    """2D RoPE: cos and sin (2, L, D / 2) of all positions; zero for the condition slots, see above.

    Of the D / 2 pairs of neighbours the first half turns with the row r of token (r, c), the second with its column,
    by r * f_j and c * f_j, where the frequencies f_j fall from 1 to nearly 1 / base.
    """
    D, G = config.width // config.heads, config.side
    frequency = config.rope_base ** (-torch.arange(0, D // 2, 2, device=device, dtype=torch.float32) / (D // 2))
    place = torch.arange(G, device=device, dtype=torch.float32)
    grid = torch.cartesian_prod(place, place)                               # (N, 2): row, column, in raster order
    angles = (grid[:, :, None] * frequency).flatten(1)                      # (N, D / 2)
    return F.pad(torch.stack([angles.cos(), angles.sin()]), (0, 0, config.slots, 0))


class Linear(nn.Linear):
    """Without bias. With a few rows a product does little but read its weights, and CPU libraries read a matrix up to
    twice as fast if it stands on the left: W x^T instead of x W^T. The same sums, in another order."""

    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out, bias=False)

    def forward(self, x):                                                   # (B, l, c_in) -> (B, l, c_out)
        if x.is_cpu and 1 < x.shape[0] * x.shape[1] <= 16 and not torch.is_grad_enabled():
            return (self.weight @ x.flatten(0, 1).T).T.contiguous().unflatten(0, x.shape[:2])
        return F.linear(x, self.weight)


class Attention(nn.Module):
    """Multi-head attention to all earlier positions."""

    def __init__(self, config):
        super().__init__()
        C, self.heads, self.kv_heads = config.width, config.heads, config.kv_heads or config.heads
        self.qkv = Linear(C, (self.heads + 2 * self.kv_heads) * (C // self.heads))      # rows: q, k, v; head-major
        self.proj = Linear(C, C)

    def forward(self, x, rope, mask=None, cache=None, pos=None):
        """x (B, l, C) -> the same. rope: cos and sin (l, D / 2).

        pos None: a whole sequence. mask (B, 1, l, l) bool, True = may look, or None: causal; cache (k, v), each
        (B, Hkv, L, D), if there is one, gets its keys and values.
        pos an int, or a tensor of one on the device: a single token, l = 1, of that position, which is added to the
        cache and looks at all up to itself. mask (B, L) bool: of the cache's rows those that exist, None: all.
        """
        q, k, v = self.qkv(x).unflatten(-1, (self.heads + 2 * self.kv_heads, -1)).split(
            [self.heads, self.kv_heads, self.kv_heads], 2)                  # (B, l, H or Hkv, D)
        k_cache, v_cache = cache if cache is not None else (None, None)
        q, k, v = qk_norm_rope(q, k, v, l2norm=False, cos=rope[0], sin=rope[1], k_cache=k_cache, v_cache=v_cache,
                               pos=0 if pos is None else pos)               # (B, H or Hkv, l, D)
        if pos is not None:
            out = decode_attention(q, k_cache, v_cache, pos, visible=mask)  # (B, H, 1, D)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                                 enable_gqa=self.heads != self.kv_heads)
        return self.proj(rearrange(out, "b h l d -> b l (h d)"))


class FeedForward(nn.Module):
    """SwiGLU: fc2(silu(w1 x) * (w3 x)). fc1 holds w1 and w3, so that x is read once."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = Linear(config.width, 2 * config.hidden)                  # rows: w1, w3
        self.fc2 = Linear(config.hidden, config.width)

    def forward(self, x):
        gate, value = self.fc1(x).chunk(2, -1)
        return self.fc2(F.silu(gate) * value)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)). The second sum is left to whatever normalises next, which
    then reads and writes the stream once: so a block takes and gives the stream and the branch to be added to it."""

    def __init__(self, config, drop_path):
        super().__init__()
        self.attn = Attention(config)
        self.ffn = FeedForward(config)
        self.norm1, self.norm2 = (nn.RMSNorm(config.width, config.norm_eps) for _ in range(2))
        self.drop_path, self.dropout = drop_path, 0.0 if config.drop_path else config.dropout

    def forward(self, x, branch, rope, mask=None, cache=None, pos=None, generator=None):
        """Stream and branch (B, l, C), the latter None at first -> the same."""
        h, x = add_and_norm(x, branch, self.norm1)
        h = self._drop(self.attn(h, rope, mask, cache, pos), generator)
        h, x = add_and_norm(x, h, self.norm2)
        return x, self._drop(self.ffn(h), generator)

    def _drop(self, branch, generator):
        """In training: dropout, or stochastic depth, which removes the whole branch for some pictures."""
        if not self.training:
            return branch
        return dropout(dropout(branch, self.dropout, generator), self.drop_path, generator, per_picture=True)


def add_and_norm(x, branch, norm):
    """Stream x (B, l, C) and a branch or None -> norm(x + branch), x + branch. The norm is taken in float32, rounded to
    the dtype of its weight, and then multiplied by it: in half precision the order shows."""
    if branch is None:
        return adaln_modulate(x, None, None, norm.eps, kind="rms", weight=norm.weight), x
    return adaln_modulate(branch, None, None, norm.eps, kind="rms", weight=norm.weight, residual=x)


def dropout(x, share, generator, per_picture=False):
    """Sets a share of the numbers, or of the pictures, of x (B, l, C) to zero and scales the others up."""
    if share == 0:
        return x
    kept = x.new_empty((len(x), 1, 1) if per_picture else x.shape).bernoulli_(1 - share, generator=generator)
    return x * kept / (1 - share)                                           # in this order: 1 / 0.9 is no bfloat16


# ----------------------------------------------------------------------------------------------------------------------
# The model

# What `LlamaGen.steps` yields after token i: tokens (B,), and logits (R, V) before guidance and filters, the rows with
# the condition first. With a `run` that replays, both are overwritten by the next step.
Step = namedtuple("Step", "i tokens logits")


def call(function, constants, *tensors):
    """How `LlamaGen.sample` has device work done. Anything else of this signature may capture it once per function,
    constants and shapes, and replay it on new numbers. Tensors may be None, or stand in lists; the caches among them
    are written in place."""
    return function(*constants, *tensors)


class LlamaGen(nn.Module):
    """The transformer. Tokenizer and text encoder are no part of it: methods take the tokenizer, and features of text.

    text_encoder: a module that is trained along with it and kept in the same file, as in the demo; not used here.
    """

    def __init__(self, config, text_encoder=None):
        super().__init__()
        self.config, self.text_encoder, self.checkpointing = config, text_encoder, False
        C = config.width
        if config.text_width:
            self.text_fc1 = nn.Linear(config.text_width, C, bias=False)
            self.text_fc2 = nn.Linear(C, C, bias=False)
            # The null text, random and never trained: a buffer, which must come from the file.
            self.register_buffer("null_text", torch.zeros(config.text_slots, config.text_width))
        else:
            self.class_embed = nn.Embedding(config.num_classes + 1, C)      # last row: the null class
        self.token_embed = nn.Embedding(config.vocab_size, C)
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.RMSNorm(C, config.norm_eps)
        self.head = Linear(C, config.vocab_size)

    # pieces that training and sampling share

    def embed_condition(self, cond):
        """Labels (B,) or text features (B, T, Ct) -> slots (B, T, C)."""
        if not self.config.text_width:
            return self.class_embed(cond)[:, None]
        hidden = F.gelu(self.text_fc1(cond.to(self.text_fc1.weight.dtype)), approximate="tanh")
        return self.text_fc2(hidden)

    def null_condition(self, cond):
        """The null class or text, as many as there are in cond."""
        if self.config.text_width:
            return self.null_text.to(cond.dtype).expand_as(cond)
        return torch.full_like(cond, self.config.num_classes)

    def mask(self, words, length):
        """Words (B, T) bool, False for padding, or None -> what each of `length` positions may look at, (B, 1, length,
        length) bool, or None for what comes before it."""
        if words is None:
            return None
        place = torch.arange(length, device=words.device)
        seen = F.pad(words, (0, length - words.shape[1]), value=True)[:, None]          # (B, 1, length) keys
        return ((place[:, None] >= place) & seen | (place[:, None] == place))[:, None]

    def logits(self, x, branch):
        """Stream and last branch (B, l, C) -> (B, l, V) float32."""
        return self.head(add_and_norm(x, branch, self.norm)[0]).float()

    # training

    def stream(self, cond, tokens, words=None, cond_drop=0.0, generator=None):
        """As forward, but the stream and last branch (B, T + n, C) of all positions, those of the slots included."""
        self.check(cond, words)
        if cond_drop:
            dropped = torch.rand(len(cond), generator=generator, device=cond.device) < cond_drop
            cond = torch.where(dropped.view(-1, *[1] * (cond.dim() - 1)), self.null_condition(cond), cond)
        x = torch.cat([self.embed_condition(cond), self.token_embed(tokens)], 1)        # (B, T + n, C)
        x = dropout(x, self.config.dropout if self.training else 0.0, generator)
        rope, mask, branch = rope_table(self.config, x.device)[:, :x.shape[1]], self.mask(words, x.shape[1]), None
        for block in self.blocks:
            x, branch = vq.checkpointed(self.checkpointing, block, x, branch, rope, mask, generator=generator)
        return x, branch

    def forward(self, cond, tokens, words=None, cond_drop=0.0, generator=None):
        """Teacher-forced logits.

        cond:      (B,) classes, 0 .. num_classes, or text features (B, T, Ct) from `left_pad`
        tokens:    (B, n) true tokens but the last, in raster order
        words:     (B, T) bool, False for padding of the text; None: no padding
        cond_drop: share of conditions replaced by the null one: one uniform number per picture from generator
        returns    (B, n + 1, V) float32; row i predicts token i
        """
        x, branch = self.stream(cond, tokens, words, cond_drop, generator)
        start = self.config.slots - 1                                       # the last slot predicts token 0
        return self.logits(x[:, start:], branch[:, start:])

    def loss(self, cond, tokens, words=None, *, valid=None, cond_drop=None, generator=None):
        """Cross entropy of all N tokens (B, N), mean over the batch -> (loss, {accuracy}).

        valid: (B,), 0 for pictures that do not count, such as unreadable ones; cond_drop: by default that of the config
        in training and 0 in eval mode.
        """
        if cond_drop is None:
            cond_drop = self.config.cond_drop if self.training else 0.0
        logits = self(cond, tokens[:, :-1], words, cond_drop, generator)
        losses = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")      # (B, N)
        correct = (logits.detach().argmax(-1) == tokens).float()
        if valid is None:
            return losses.mean(), {"accuracy": correct.mean()}
        weight = valid.to(losses.dtype)[:, None].expand_as(losses)
        mean = lambda x: (x * weight).sum() / weight.sum().clamp(min=1)
        return mean(losses), {"accuracy": mean(correct)}

    @torch.no_grad()
    def surprise(self, cond, tokens, words=None):
        """How many bits each token (B, N) of a given picture takes, given those before it: -log2 p, (B, N) float32.

        Its mean is the picture's bits per token, log2(V) = 14 for a model that knows nothing; the class or text that
        makes it smallest is the likeliest. Raises ValueError for tokens that are of another codebook.
        """
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            raise ValueError(f"tokens {int(tokens.min())} .. {int(tokens.max())}, but the model knows "
                             f"{self.config.vocab_size}: they are of another codebook")
        log_p = self(cond, tokens[:, :-1], words).log_softmax(-1)
        return -log_p.gather(-1, tokens[..., None])[..., 0] / math.log(2)

    def check(self, cond, words):
        """Raises ValueError for conditions of the wrong kind or shape."""
        c = self.config
        if cond.shape[1:] != ((c.text_slots, c.text_width) if c.text_width else ()):
            wanted = f"text features (B, {c.text_slots}, {c.text_width})" if c.text_width else "classes (B,)"
            raise ValueError(f"this model is conditioned on {wanted}, not on a tensor {tuple(cond.shape)}")
        if words is not None and words.shape != (len(cond), c.slots):
            raise ValueError(f"the mask is {tuple(words.shape)}, expected {(len(cond), c.slots)}: one entry per slot")

    def check_pair(self, tokenizer):
        """Raises ValueError if the tokenizer cannot be this model's."""
        t, V = tokenizer.config, self.config.vocab_size
        if not t.single_scale or t.vocab_size != V:
            kind = f"{t.vocab_size} codes" if t.single_scale else "tokens of several scales"
            raise ValueError(f"has {kind}, but the model draws maps of {V} codes")

    # sampling

    @torch.no_grad()
    def steps(self, cond, words=None, *, cfg=1.0, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0, generator=None,
              run=call):
        """Yields a Step per token, in raster order. Arguments as in `sample`.

        What happens between two random draws is one call, of `_begin` and then of `_advance` for every token, whose
        shapes never change; with a `run` that may replay it, the position is a tensor, so that one capture serves all.
        """
        config, device = self.config, self.token_embed.weight.device
        B, N, T = len(cond), config.side ** 2, config.slots
        self.check(cond, words)
        words = None if words is None or bool(words.all()) else words.to(device)
        cfg = torch.as_tensor(cfg, dtype=torch.float32).clamp(min=1).expand(B)
        guided, cfg = bool((cfg > 1).any()), cfg.to(device)[:, None]
        noise = draws((B, config.vocab_size), N if temperature else 0, generator, device)
        filters = (temperature, top_k, top_p)
        places = range(T + N) if run is call else torch.arange(T + N, device=device).split(1)
        tokens, logits, *state = run(self._begin, (guided, filters), cond.to(device), words, cfg, next(noise, None))
        yield Step(0, tokens, logits)
        for i in range(1, N):
            if guided and -1 < cfg_interval < i - 1:                        # the rest goes without: B rows will do
                guided, (cache, rope, seen) = False, state
                state = [cache[:, :, :B], rope, None if seen is None else seen[:B]]
            pos = places[T + i - 1]                                         # of the last token, which goes in now
            tokens, logits = run(self._advance, (guided, filters), tokens, pos, state, cfg, next(noise, None))
            yield Step(i, tokens, logits)

    def _begin(self, guided, filters, cond, words, cfg, noise):
        """Condition -> first tokens (B,), their logits (R, V), and what later steps need: cache (depth, 2, R, Hkv, L,
        D), rotation table, and the rows of the cache that may be looked at, (R, L) bool or None for all."""
        config = self.config
        if guided:
            cond = torch.cat([cond, self.null_condition(cond)])
            words = None if words is None else words.repeat(2, 1)           # the null text is padded like its prompt
        x, branch, T, L = self.embed_condition(cond), None, config.slots, config.slots + config.side ** 2
        rope, mask = rope_table(config, x.device), self.mask(words, T)
        cache = x.new_zeros(config.depth, 2, len(x), config.kv_heads or config.heads, L, config.width // config.heads)
        for block, kv in zip(self.blocks, cache):
            x, branch = block(x, branch, rope[:, :T], mask, cache=kv)
        logits = self.logits(x[:, -1:], branch[:, -1:])[:, 0]
        seen = None if words is None else F.pad(words, (0, L - T), value=True)
        return self._draw(logits, guided, filters, cfg, noise), logits, cache, rope, seen

    def _advance(self, guided, filters, tokens, pos, state, cfg, noise):
        """Tokens (B,), written at pos -> the next tokens (B,), their logits (R, V)."""
        (cache, rope, seen), branch = state, None
        x = self.token_embed(tokens)[:, None].repeat(cache.shape[2] // len(tokens), 1, 1)      # (R, 1, C)
        rope = rope[:, pos:pos + 1] if isinstance(pos, int) else rope.index_select(1, pos)
        for block, kv in zip(self.blocks, cache):
            x, branch = block(x, branch, rope, seen, cache=kv, pos=pos)
        logits = self.logits(x, branch)[:, 0]
        return self._draw(logits, guided, filters, cfg, noise), logits

    @staticmethod
    def _draw(logits, guided, filters, cfg, noise):
        """Logits (R, V), guidance (B, 1), Exp(1) noise (B, V) -> tokens (B,)."""
        temperature, top_k, top_p = filters
        if guided:
            cond, uncond = logits.chunk(2)
            logits = torch.lerp(uncond, cond, cfg)                          # u + cfg (c - u), exactly c where cfg is 1
        return sample_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p, noise=noise)

    @torch.no_grad()
    def sample(self, tokenizer, cond, words=None, *, cfg=1.0, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0,
               generator=None, ladder=0, size=None, run=call):
        """Draws pictures -> (B, 3, h, w) float32 in [0, 1]; with ladder a list of so many, of the picture in progress.

        tokenizer:    the VQVAE, on the same device
        cond, words:  (B,) int64 classes; or text features (B, T, Ct) and mask (B, T), see `left_pad`
        cfg:          guidance: logits = u + cfg (c - u), 1 or less is none; a number, or one for each picture (B,)
        cfg_interval: no guidance after decode step `cfg_interval`, the prefill not counted: that of the first
                      cfg_interval + 2 tokens; -1: of all
        temperature:  0 takes the likeliest token
        top_k, top_p: keep the k likeliest tokens, then the likeliest that hold a share p; 0, or for p also 1, = all
        generator:    a torch.Generator of the model's device, consumed exactly as by the original; or a list of B, one
                      per picture, which makes every picture independent of its batch; None: torch's global one
        size:         side of the pictures in pixels, if they are to be resized as for the authors' evaluation
        run:          run(function, constants, *tensors) has device work done. By default a plain call; what captures it
                      once and replays it takes away the launches, e.g. `CUDAGraphs` in sample.py
        """
        self.check_pair(tokenizer)
        steps = self.steps(cond, words, cfg=cfg, cfg_interval=cfg_interval, temperature=temperature, top_k=top_k,
                           top_p=top_p, generator=generator, run=run)
        tokens = torch.stack([step.tokens.clone() for step in steps], 1)    # (B, N); a replay overwrites its results
        G, quantizer = self.config.side, tokenizer.quantize
        f_hat = quantizer.embed(tokens, (G, G))                             # (B, 8, G, G)
        function, constants = (tokenizer.decode_resized, (size,)) if size else (tokenizer.decode, ())
        decode = lambda f_hat: run(function, constants, f_hat).add(1).mul(0.5)
        if not ladder:
            return decode(f_hat)
        frames, order = [], torch.arange(G * G, device=f_hat.device).view(G, G)
        for k in range(1, ladder + 1):
            drawn = order < G * G * k // ladder                             # the rest is not there yet: grey
            image = decode(f_hat * drawn)
            frames.append(torch.where(F.interpolate(drawn[None, None].float(), image.shape[2:]) > 0, image, 0.5))
        return frames

    # initialisation

    @torch.no_grad()
    def init_weights(self, generator=None):
        """The authors' initialisation: normal of deviation 0.02, and zero for the output, so that the first loss is
        that of a model that knows nothing, ln V."""
        for name, p in self.named_parameters():
            if not name.startswith("text_encoder."):
                p.fill_(1) if "norm" in name else p.normal_(0, 0.02, generator=generator)
        self.head.weight.zero_()
        if self.config.text_width:
            self.null_text.normal_(0, self.config.text_width ** -0.5, generator=generator)
        if self.text_encoder is not None:
            self.text_encoder.init_weights(generator)


def draws(shape, n, generator, device, chunk=32):
    """Exp(1) noise (B, V) for each of n draws: argmax of p / noise is a draw from p (`sample_logits`), and making it is
    no part of a captured step. From one generator as the original consumes it, a draw after the other; from one per
    picture in chunks, since B of them would otherwise be launched for every token."""
    if not isinstance(generator, (list, tuple)):
        for _ in range(n):
            yield exponential_noise(shape, generator, device)
        return
    for start in range(0, n, chunk):
        yield from exponential_noise((shape[0], min(chunk, n - start), *shape[1:]), generator, device).unbind(1)


# ----------------------------------------------------------------------------------------------------------------------
# Loading

RENAMES = [     # fragment of an official key, of ours
    ("tok_embeddings", "token_embed"), ("cls_embedding.embedding_table", "class_embed"),
    ("cls_embedding.cap_proj.fc1", "text_fc1"), ("cls_embedding.cap_proj.fc2", "text_fc2"),
    ("cls_embedding.uncond_embedding", "null_text"), ("layers.{}.attention.wqkv", "blocks.{}.attn.qkv"),
    ("layers.{}.attention.wo", "blocks.{}.attn.proj"), ("layers.{}.attention_norm", "blocks.{}.norm1"),
    ("layers.{}.ffn_norm", "blocks.{}.norm2"), ("layers.{}.feed_forward.w2", "blocks.{}.ffn.fc2"),
    ("layers.{}.feed_forward", "blocks.{}.ffn"), ("output", "head"),
]
GATED = ("fc1", ("w1", "w3"))                                               # ours is both of theirs
NESTED = (("model",), ("module",), ("state_dict",))                         # DDP, DeepSpeed; FSDP's files are flat


def infer_config(state, path, side=None, heads=None):
    """The Config of an official state dict, read from its keys and shapes. Heads and side are in none. The side is that
    of the released file of this name, or of all that have this depth and width if it is one, else it must be given; so
    are the heads, but that in a model of another size they are taken to be 64 wide unless given."""
    (vocab_size, width), depth = state["tok_embeddings.weight"].shape, 1 + max(
        int(k.split(".")[1]) for k in state if k.startswith("layers."))
    text = "cls_embedding.uncond_embedding" in state
    slots, text_width = state["cls_embedding.uncond_embedding"].shape if text else (120, 0)
    released = [c for c in CONFIGS.values() if (c.depth, c.width, bool(c.text_width)) == (depth, width, text)]
    named = [c for c in released if CONFIGS.get(Path(path).stem) == c]
    sides = {c.side for c in named or released}
    if "freqs_cis" in state:                                                # a table of positions that was left inside
        sides = {math.isqrt(len(state["freqs_cis"]) - (slots if text else 1))}
    if side is None and len(sides) != 1:
        raise vq.CheckpointError(f"{path}: the size of its pictures is in no tensor: pass side=, tokens per side "
                                 f"({', '.join(str(s) for s in sorted(sides)) or 'pixels / 16'}), or --size, in pixels")
    side = sides.pop() if side is None else side
    heads = heads or (released[0].heads if released else width // 64)       # heads of 64, in all but 3B
    if not heads or width % (4 * heads):
        raise vq.CheckpointError(f"{path}: how many heads it has is in no tensor: pass heads=")
    kv_heads = (len(state["layers.0.attention.wqkv.weight"]) - width) // 2 // (width // heads)
    classes = 0 if text else len(state["cls_embedding.embedding_table.weight"]) - 1
    return Config(depth=depth, width=width, heads=heads, kv_heads=0 if kv_heads == heads else kv_heads,
                  hidden=len(state["layers.0.feed_forward.w1.weight"]), side=side,
                  vocab_size=vocab_size, num_classes=classes, text_width=text_width, text_slots=slots)


def load(path, config=None, side=None, heads=None, dtype=torch.float32, device="cpu", text_encoder=None):
    """A LlamaGen in eval mode from a released file, a training checkpoint of the original, or a file of ours.

    config: instead of the inferred one; side: tokens per side, if another; heads: of official files, see infer_config,
    which tells both if it can. Weights go from the mapped
    file straight to `device` in `dtype`. text_encoder: an uninitialised module for the one that a file of ours may
    hold, in float32; None: it is left out. Raises vq.CheckpointError.
    """
    state, saved = vq.read_checkpoint(path, nested=NESTED)
    vq.require(state, "tok_embeddings.weight", "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight",
               path=path, what="a LlamaGen transformer")
    if config is None:
        config = vq.config_from_json(Config, saved, path) if saved else infer_config(state, path, side, heads)
    if side is not None and side != config.side:
        config = replace(config, side=side)
    own = {k: v for k, v in state.items() if k.startswith("text_encoder.") and text_encoder is not None}
    state = {k: v for k, v in state.items() if not k.startswith(("freqs_cis", "text_encoder."))}
    model = vq.build_on(device, LlamaGen, config, text_encoder, cast=lambda model: set_dtype(model, dtype))
    vq.load_strict(model, vq.join_rows(vq.rename_keys(state, RENAMES), *GATED) | own, path)
    return model.eval()


def set_dtype(model, dtype):
    """Casts all weights but those of a text encoder, and the stream with them, as the original does. Norms and rotation
    compute in float32 all the same, and so does what follows the logits."""
    for name, child in model.named_children():
        if name != "text_encoder":
            child.to(dtype)
    return model


def export(model):
    """The official state dict of a LlamaGen, in float32."""
    state = {k: v.float().contiguous() for k, v in model.state_dict().items() if not k.startswith("text_encoder.")}
    return vq.rename_keys(vq.split_rows(state, *GATED), RENAMES, inverse=True)


def save(model, path, dtype=None, **extra):
    """Writes a LlamaGen as safetensors: official keys (and `text_encoder.*`), config (and `extra`) in the header.
    dtype: of the stored floats."""
    own = {k: v for k, v in model.state_dict().items() if k.startswith("text_encoder.")}
    vq.save_checkpoint(path, export(model) | own, model.config, dtype, **extra)
