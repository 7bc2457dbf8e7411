"""VAR: class -> image by next-scale prediction. Full definition of the model, all of it in this single file.

An autoregressive transformer whose step is not the next token but the next *resolution*. The tokenizer (vq.py) turns
a picture into token maps of growing size, 1x1, 2x2, ... 16x16: grids of codebook indices, each encoding what the
coarser ones left over. Step k predicts all p_k * p_k tokens of map k at once, from the class and all coarser maps: ten
steps instead of 680, and no left-to-right order imposed on a picture.

    class c --> embed --+--> condition of every AdaLN: gates, scales and shifts, the same in all steps
                        |
                   scale 0          scale 1            scale 2                  scale 9
    inputs         c + start        word(f_hat 2x2)    word(f_hat 3x3)   ...    word(f_hat 16x16)   + level + position
                        |                |                  |                       |
    transformer    sees 1 token     sees 1 + 4         sees 1 + 4 + 9           sees all 680         block-causal
                        |                |                  |                       |
    logits         1 x 4096         4 x 4096           9 x 4096                 256 x 4096

    tokens -> codes -> phi(bicubic(.)) added to f_hat, the picture so far; f_hat resized to the next scale is its input

How it differs from a textbook GPT:
- the input at scale k is not an embedding of earlier tokens but f_hat, the sum of all coarser maps, resized to scale k.
  Training computes it from the true tokens, sampling from the drawn ones; the same tokens give the same inputs;
- attention is full within a scale and causal between scales. In training that takes a mask. In sampling a whole scale
  goes in at once and the KV cache holds coarser scales only, so everything present may be looked at;
- q and k have length 1, times a learned sharpness per head; keys have no bias;
- AdaLN-Zero conditioning as in DiT; var_d36 (and the demo) shares one AdaLN map among all blocks;
- classifier-free guidance grows linearly over the scales, from none at 1x1.
Left out on purpose: progressive training (`pg` in the original), which no released model used.

Letters: B batch, R rows (2B with guidance, else B), L tokens of all scales (680 at 256 pixels, 2240 at 512), l tokens
of one scale, C width, H heads, D head dim, V codebook size, K number of scales, p side of a token map, Cv codebook
channels. Paper: Visual Autoregressive Modeling, arXiv 2404.02905. Released weights, repository FoundationVision/var:
var_d16.pth 310 M, var_d20.pth 601 M, var_d24.pth 1.0 B, var_d30.pth 2.0 B parameters at 256 pixels, var_d36.pth 2.4 B
at 512; all with the tokenizer vae_ch160v4096z32.pth.

    tokenizer, model = vq.load("vae_ch160v4096z32.pth"), var.load("var_d16.pth")
    images = model.sample(tokenizer, labels=torch.tensor([207, 360]), cfg=4, top_k=900, top_p=0.95,
                          generator=torch.Generator().manual_seed(0))       # (2, 3, 256, 256) in [0, 1]
"""
import math
from collections import namedtuple
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import vq
from triton_ops import adaln_modulate, exponential_noise, filter_logits, qk_norm_rope, sample_logits


@dataclass(frozen=True)
class Config:
    """Sizes of a VAR. Released files tell all but norm_eps and class_drop; drop_path follows from the depth."""

    depth: int = 16
    width: int = 1024                           # C; released models: 64 * depth
    heads: int = 16                             # released models: depth, so D = 64
    patch_nums: tuple = vq.PATCH_NUMS[256]      # side of the token map at every scale
    num_classes: int = 1000                     # class `num_classes` is the null class of guidance
    vocab_size: int = 4096                      # V
    z_channels: int = 32                        # Cv
    mlp_ratio: int = 4
    norm_eps: float = 1e-6
    shared_adaln: bool = False                  # one AdaLN map for all blocks, plus a table in each (depth 36)
    attn_l2_norm: bool = True                   # q and k of length 1: all files but the very first uploads
    class_drop: float = 0.1                     # share of labels replaced by the null class in training
    drop_path: float = 0.1 * 16 / 24            # of the last block; grows linearly from 0 at the first


def _released(depth, side=256):
    return Config(depth=depth, width=64 * depth, heads=depth, patch_nums=vq.PATCH_NUMS[side], shared_adaln=side == 512,
                  drop_path=0.1 * depth / 24)


CONFIGS = {
    "var_d16": _released(16),
    "var_d20": _released(20),
    "var_d24": _released(24),
    "var_d30": _released(30),
    "var_d36": _released(36, side=512),
    "emoji_var": Config(depth=6, width=192, heads=3, patch_nums=(1, 2, 3, 4, 6, 8), num_classes=98, vocab_size=1024,
                        z_channels=16, shared_adaln=True, drop_path=0.025),     # 32 x 32 pixels, trained in demo/
}


# ----------------------------------------------------------------------------------------------------------------------
# Building blocks


class Attention(nn.Module):
    """Multi-head attention over the tokens of this scale and of all coarser ones (there by mask, or in the cache)."""

    def __init__(self, config):
        super().__init__()
        C, H = config.width, config.heads
        self.heads, self.l2_norm = H, config.attn_l2_norm
        self.qkv = nn.Linear(C, 3 * C, bias=False)                          # rows: q, k, v; inside each head-major
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(C)), nn.Parameter(torch.zeros(C))
        self.proj = nn.Linear(C, C)
        if self.l2_norm:
            self.log_scale = nn.Parameter(torch.full((1, H, 1, 1), math.log(4)))    # q has this length: sharpness
        # Without the l2 norm the softmax scale is 0.25 / sqrt(D), a quarter of the textbook's.
        self.softmax_scale = 1.0 if self.l2_norm else 0.25 / math.sqrt(C // H)

    def constants(self):
        """What depends on weights alone: the bias of qkv (3C,), zero for k; the length of q (H,), or None."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return bias, self.log_scale.float().clamp(max=math.log(100)).exp().flatten() if self.l2_norm else None

    def forward(self, x, constants, mask=None, cache=None, pos=0):
        """x (B, l, C); mask (l, l) bool, True = may look; cache (k, v), each (B, H, L, D), filled up to pos."""
        bias, q_scale = constants
        qkv = F.linear(x, self.qkv.weight, bias)                            # (B, l, 3C)
        q, k, v = rearrange(qkv, "b l (three h d) -> three b l h d", three=3, h=self.heads)
        k_cache, v_cache = cache if cache is not None else (None, None)
        q, k, v = qk_norm_rope(q, k, v, q_scale=q_scale, l2norm=self.l2_norm, k_cache=k_cache, v_cache=v_cache, pos=pos)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.softmax_scale)     # (B, H, l, D)
        return self.proj(rearrange(out, "b h l d -> b l (h d)"))


class FeedForward(nn.Module):
    """C -> 4C -> C with GELU in its tanh form, which differs from the exact one in the fourth digit."""

    def __init__(self, width, ratio):
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and feed-forward, each between an AdaLN modulation and a gate that come from the condition."""

    def __init__(self, config):
        super().__init__()
        C = config.width
        self.attn = Attention(config)
        self.ffn = FeedForward(C, config.mlp_ratio)
        if config.shared_adaln:
            self.adaln_table = nn.Parameter(torch.zeros(1, 1, 6, C))
        else:
            self.adaln = nn.Linear(C, 6 * C)
        self.eps = config.norm_eps

    def prepare(self, cond, shared=None):
        """Condition (B, C) -> all that no token has a part in: the modulation (B, 1, 6, C), two gates, two scales and
        two shifts, of each the first for attention; and the constants of attention."""
        if shared is not None:
            modulation = self.adaln_table + shared
        else:
            modulation = self.adaln(F.silu(cond).to(self.adaln.weight.dtype))
            modulation = rearrange(modulation, "b (six c) -> b 1 six c", six=6)
        return modulation, self.attn.constants()

    def forward(self, x, prepared, mask=None, cache=None, pos=0, kept=None):
        """x (B, l, C), the residual stream -> the same. kept: factors (2, B, 1, 1) of both branches, in training."""
        modulation, constants = prepared
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        dtype = self.ffn.fc1.weight.dtype                                   # of the products; the stream stays wider
        h = adaln_modulate(x, scale1, shift1, self.eps, out_dtype=dtype)
        h = self._drop(self.attn(h, constants, mask, cache, pos), kept, 0)
        h, x = adaln_modulate(h, scale2, shift2, self.eps, residual=x, gate=gate1, out_dtype=dtype)
        h = self._drop(self.ffn(h), kept, 1)
        return torch.addcmul(x, gate2, h)

    @staticmethod
    def _drop(branch, kept, which):
        return branch if kept is None else branch * kept[which].to(branch.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# The model

# What `VAR.steps` yields after scale k:
#   logits    (R, l, V) before guidance and filters, the rows with the class first
#   guidance  t: what was drawn from is (1 + t) * conditional - t * unconditional logits
#   tokens    (B, l) as drawn. f_hat may hold others: kept ones when editing, mixtures with more_smooth
#   f_hat     (B, Cv, p, p) the picture so far, at the size of the last scale
Step = namedtuple("Step", "k logits guidance tokens f_hat")


def call(function, constants, *tensors):
    """How `VAR.sample` has device work done. Anything else of this signature may capture it once and replay it."""
    return function(*constants, *tensors)


class VAR(nn.Module):
    """The transformer. The tokenizer is no part of it: methods that need one take it as an argument."""

    NO_DECAY = ("pos_embed", "pos_start", "level_embed", "adaln_table", "log_scale")    # spared by weight decay

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False
        C, patch_nums = config.width, config.patch_nums
        lengths = [p * p for p in patch_nums]
        level = torch.tensor([k for k, n in enumerate(lengths) for _ in range(n)])
        self.register_buffer("level", level, persistent=False)                      # (L,) scale of every position
        self.register_buffer("mask", level[:, None] >= level, persistent=False)     # (L, L) True = row sees column

        self.class_embed = nn.Embedding(config.num_classes + 1, C)          # last row: the null class
        self.word_embed = nn.Linear(config.z_channels, C)                   # of f_hat's cells; the name is the paper's
        self.level_embed = nn.Embedding(len(patch_nums), C)
        self.pos_start = nn.Parameter(torch.zeros(1, lengths[0], C))
        self.pos_embed = nn.Parameter(torch.zeros(1, sum(lengths), C))
        if config.shared_adaln:
            self.shared_adaln = nn.Linear(C, 6 * C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_adaln = nn.Linear(C, 2 * C)
        self.head = nn.Linear(C, config.vocab_size)

    # pieces that training and sampling share

    def prepare(self, cond):
        """Condition (B, C) -> what every block makes of it, `Block.prepare`: once per picture, not once per scale."""
        shared = None
        if self.config.shared_adaln:
            shared = rearrange(self.shared_adaln(F.silu(cond)), "b (six c) -> b 1 six c", six=6)
        return [block.prepare(cond, shared) for block in self.blocks]

    def head_modulation(self, cond):
        """Condition (B, C) -> scale and shift (B, 1, C) of the last norm, which is never shared."""
        return self.head_adaln(F.silu(cond)).unsqueeze(1).chunk(2, dim=-1)

    def logits(self, x, scale, shift):
        """Residual stream (B, l, C) -> (B, l, V) float32."""
        x = adaln_modulate(x, scale, shift, self.config.norm_eps, out_dtype=self.head.weight.dtype)
        return self.head(x).float()

    def positions(self, start, end):
        """Level and position embeddings of tokens start .. end: (1, end - start, C)."""
        return self.level_embed(self.level[start:end]) + self.pos_embed[:, start:end]

    # training

    def forward(self, labels, features, class_drop=0.0, generator=None):
        """Teacher-forced logits of all scales.

        labels:     (B,) class of each picture, 0 .. num_classes
        features:   (B, L - p_0^2, Cv): the true f_hat at every scale but the first, from
                    `tokenizer.quantize.teacher_input(indices, model.config.patch_nums)`
        class_drop: share of labels replaced by the null class: one uniform number per picture from generator
        returns     (B, L, V) float32; row i predicts token i of the same scale (not of the next position)
        """
        if class_drop:
            dropped = torch.rand(len(labels), generator=generator, device=labels.device) < class_drop
            labels = torch.where(dropped, self.config.num_classes, labels)
        cond = self.class_embed(labels)
        x = torch.cat([cond[:, None] + self.pos_start, self.word_embed(features)], 1)       # (B, L, C)
        x = x + self.positions(0, x.shape[1])
        for block, prepared, kept in zip(self.blocks, self.prepare(cond), self._kept(len(x), x.device, generator)):
            x = vq.checkpointed(self.checkpointing, block, x, prepared, self.mask, kept=kept)
        return self.logits(x, *self.head_modulation(cond))

    def _kept(self, B, device, generator):
        """Stochastic depth, per block: in training, factors (2, B, 1, 1) of both branches, which remove a branch for
        some pictures and scale it up for the others, in deeper blocks more often; otherwise None."""
        for i in range(self.config.depth):
            keep = 1 - self.config.drop_path * i / max(self.config.depth - 1, 1)
            draw = lambda: torch.rand(B, 1, 1, generator=generator, device=device)
            yield (torch.stack([draw(), draw()]) < keep).float() / keep if self.training and keep < 1 else None

    def loss(self, labels, tokens, features, *, class_drop=None, label_smoothing=0.0, generator=None):
        """Cross entropy, mean over the L tokens and the batch -> (loss, {accuracy, tail_loss, tail_accuracy}).

        tokens: (B, L) true indices of all scales; "tail" is the last scale. class_drop: by default that of the config
        in training and 0 in eval mode, where the original goes on dropping and so gets a random validation loss.
        """
        if class_drop is None:
            class_drop = self.config.class_drop if self.training else 0.0
        logits = self(labels, features, class_drop, generator)
        losses = F.cross_entropy(logits.transpose(1, 2), tokens, label_smoothing=label_smoothing, reduction="none")
        with torch.no_grad():
            correct = (logits.argmax(-1) == tokens).float()
            tail = slice(-self.config.patch_nums[-1] ** 2, None)
            metrics = {"accuracy": correct.mean(), "tail_loss": losses[:, tail].mean(),
                       "tail_accuracy": correct[:, tail].mean()}
        return losses.mean(), metrics

    # sampling

    @torch.no_grad()
    def steps(self, tokenizer, labels, *, cfg=1.5, top_k=0, top_p=0.0, more_smooth=False, generator=None,
              given=None, keep=None, run=call):
        """Yields a Step per scale, coarse to fine. labels: (B,); the rest as in `sample`.

        What happens between two random draws is one call, of `_begin` and then of `_advance` for every scale: shapes
        that depend on nothing but B, and nothing that makes the host wait for the device.
        """
        config, device = self.config, self.pos_embed.device
        B, K, V = len(labels), len(config.patch_nums), config.vocab_size
        guided = cfg != 0 and bool((labels != config.num_classes).any())    # else both halves would be the same
        x, f_hat, *state = run(self._begin, (guided,), labels.to(device))
        for k, p in enumerate(config.patch_nums):
            t = cfg * k / max(K - 1, 1) if guided else 0.0                  # grows from 0 at the first scale
            noise = [exponential_noise((B, p * p, V), generator, device) for _ in range(1 + more_smooth)]
            edit = [] if keep is None else [given[k], kept_cells(keep, p)]
            constants = (tokenizer.quantize, k, t, top_k, top_p)
            x, f_hat, logits, tokens = run(self._advance, constants, x, f_hat, state, noise, edit)
            yield Step(k, logits, t, tokens, f_hat)

    def _begin(self, guided, labels):
        """Labels (B,) -> x (R, 1, C), what enters at the first scale; f_hat, zero; and what stays the same throughout:
        cache (depth, 2, R, H, L, D), head modulation (2, R, 1, C), and what every block has prepared."""
        config = self.config
        B, side = len(labels), config.patch_nums[-1]
        rows = torch.cat([labels, torch.full_like(labels, config.num_classes)]) if guided else labels
        cond = self.class_embed(rows)                                       # (R, C)
        cache = self.blocks[0].ffn.fc1.weight.new_empty(                    # keys and values of all scales, at once
            config.depth, 2, len(rows), config.heads, len(self.level), config.width // config.heads)
        f_hat = cond.new_zeros(B, config.z_channels, side, side)
        return (cond[:, None] + self.pos_start, f_hat, cache, torch.stack(self.head_modulation(cond)),
                *self.prepare(cond))

    def _advance(self, quantizer, k, t, top_k, top_p, x, f_hat, state, noise, edit):
        """Scale k: its input x (R, l, C), f_hat so far -> the next scale's x, f_hat, logits (R, l, V), tokens (B, l).

        noise: Exp(1) (B, l, V), twice for mixtures of codes; edit: given indices (B, l) and kept cells, or nothing
        """
        patch_nums, (cache, head_modulation, *prepared) = self.config.patch_nums, state
        p, K, pos, B = patch_nums[k], len(patch_nums), sum(n * n for n in patch_nums[:k]), len(f_hat)
        x = x + self.positions(pos, pos + p * p)                            # (R, l, C)
        for block, mine, kv in zip(self.blocks, prepared, cache):
            x = block(x, mine, cache=kv, pos=pos)
        logits = self.logits(x, *head_modulation)                           # (R, l, V)

        tokens, h = self._draw(logits[:B], logits[B:] if t else None, t, k / max(K - 1, 1), quantizer.codebook,
                               top_k, top_p, noise)
        h = rearrange(h, "b (h w) c -> b c h w", h=p)                       # (B, Cv, p, p)
        if edit:                                                            # put the given codes back
            given, kept = edit
            h = torch.where(kept, quantizer.embed(given, (p, p)), h)
        f_hat = f_hat + quantizer.contribution(h, k, K, f_hat.shape[-2:])
        if k + 1 < K:
            following = self.word_embed(quantizer.next_input(f_hat, k + 1, patch_nums))     # (B, l, C)
            x = following.repeat(len(x) // B, 1, 1)                         # both halves see the same picture
        return x, f_hat, logits, tokens

    @staticmethod
    def _draw(cond, uncond, t, ratio, codebook, top_k, top_p, noise):
        """Logits of one scale with and without the class (B, l, V) -> tokens (B, l) and their codes (B, l, Cv)."""
        if len(noise) == 1:
            tokens = sample_logits(cond, uncond, cfg=1 + t, top_k=top_k, top_p=top_p, noise=noise[0])
            return tokens, F.embedding(tokens, codebook)
        # Instead of a code a Gumbel-softmax mixture of codes, with noise of its own, sharper from scale to scale. The
        # token is drawn all the same: nothing uses it, but its noise moves the generator on, as in the original.
        combined = cond if uncond is None else (1 + t) * cond - t * uncond
        filtered = filter_logits(combined, top_k, top_p)
        temperature = 0.27 * (1 - 0.95 * ratio)
        mixture = ((filtered * (1 + ratio) - noise[1].log()) / temperature).softmax(-1)     # -log Exp(1) is Gumbel
        return sample_logits(filtered, noise=noise[0]), mixture @ codebook

    @torch.no_grad()
    def sample(self, tokenizer, labels, *, cfg=1.5, top_k=0, top_p=0.0, more_smooth=False, generator=None,
               given=None, keep=None, ladder=False, run=call):
        """Draws pictures -> (B, 3, h, w) float32 in [0, 1], or with ladder=True a list, one per scale.

        tokenizer:    the VQVAE, on the same device
        labels:       (B,) int64 classes, num_classes being the null class; or an int: so many random classes. On a
                      GPU best given on the host, where looking at them makes nothing wait
        cfg:          guidance: logits = (1 + t) cond - t uncond, t = cfg * k / (K - 1). In the convention where 1 means
                      none, cfg=4 is a guidance of 1 at the first scale, 5 at the last and 3 on average
        top_k, top_p: keep the k likeliest tokens, then the likeliest that hold a share p; 0 = all
        more_smooth:  mixtures of codes instead of single ones: smoother pictures, lower scores
        generator:    a torch.Generator of the model's device, consumed exactly as by the original; or a list of B, one
                      per picture, which makes every picture independent of its batch; None: torch's global one
        given, keep:  editing: indices of a picture (list of K (B, l)) and a bool mask (p, p) on the last scale. Cells
                      that are True keep the given codes at every scale. The null class in- and out-paints, a class
                      edits. What is kept comes back as its reconstruction, blended into what is new by phi and decoder
        run:          run(function, constants, *tensors) has device work done. By default a plain call; what captures it
                      once and replays it takes away the launches, e.g. `CUDAGraphs` in sample.py
        """
        if (given is None) != (keep is None):
            raise ValueError("editing takes both: the indices of the picture as given=, the mask as keep=")
        options = dict(cfg=cfg, top_k=top_k, top_p=top_p, more_smooth=more_smooth, generator=generator, run=run)
        steps = self.steps(tokenizer, self.check_labels(labels, generator), given=given, keep=keep, **options)
        sums = [step.f_hat for step in steps]                               # first all: then the KV cache is free
        images = [run(tokenizer.decode, (), f_hat).add(1).mul(0.5) for f_hat in (sums if ladder else sums[-1:])]
        return images if ladder else images[0]

    def check_labels(self, labels, generator=None):
        """Labels (B,), checked; an int B is B classes drawn at random, the first use of the generator."""
        device, n = self.pos_embed.device, self.config.num_classes
        if isinstance(labels, int):
            uniform = torch.full((1, n), 1.0 / n, device=device)
            if isinstance(generator, (list, tuple)):
                return torch.cat([torch.multinomial(uniform, 1, True, generator=g)[0] for g in generator[:labels]])
            return torch.multinomial(uniform, labels, True, generator=generator)[0]
        if labels.numel() == 0 or labels.min() < 0 or labels.max() > n:
            raise ValueError(f"class ids must be 0 .. {n - 1}, or {n} for the null class, not {labels.tolist()}")
        return labels

    # initialisation

    @torch.no_grad()
    def init_weights(self, init_gamma=1e-3, generator=None):
        """The authors' initialisation. init_gamma scales the AdaLN gates; deeper models take smaller values."""
        c = self.config
        std = math.sqrt(1 / (3 * c.width))
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif name.endswith("log_scale"):
                p.fill_(math.log(4))
            elif name.endswith("adaln_table"):
                p.normal_(0, c.width ** -0.5, generator=generator)
            else:
                nn.init.trunc_normal_(p, std=std, generator=generator)
        self.head.weight *= 0.02
        self.head_adaln.weight *= 0.5
        for block in self.blocks:
            block.attn.proj.weight /= math.sqrt(2 * c.depth)
            block.ffn.fc2.weight /= math.sqrt(2 * c.depth)
            gates, rest = (block.adaln_table[:, :, :2], block.adaln_table[:, :, 2:]) if c.shared_adaln else (
                block.adaln.weight[:2 * c.width], block.adaln.weight[2 * c.width:])
            gates *= init_gamma
            rest *= 0.5


def edit_mask(box, side, inpaint=True):
    """Which cells of the last token map to keep: bool (side, side), for `VAR.sample(keep=...)`.

    box: (y0, x0, y1, x1) as shares of the picture. inpaint: keep what is outside of it; else, to out-paint, the inside.
    """
    y0, x0, y1, x1 = (round(v * side) for v in box)
    inside = torch.zeros(side, side, dtype=torch.bool)
    inside[y0:y1, x0:x1] = True
    return ~inside if inpaint else inside


def kept_cells(keep, p):
    """The mask of the last scale at scale p: bool (1, 1, p, p). A single cell, the overall color, is always kept."""
    if p == 1:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=keep.device)
    return F.interpolate(keep[None, None].float(), (p, p), mode="bilinear") > 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Loading

RENAMES = [     # fragment of an official key, of ours
    ("pos_1LC", "pos_embed"), ("class_emb", "class_embed"), ("lvl_embed", "level_embed"),
    ("attn.mat_qkv", "attn.qkv"), ("attn.scale_mul_1H11", "attn.log_scale"),
    ("head_nm.ada_lin.1", "head_adaln"), ("shared_ada_lin.1", "shared_adaln"), ("ada_lin.1", "adaln"),
    ("ada_gss", "adaln_table"),
]


def _is_derived(key):
    """Official buffers that follow from the config: scale of each position, mask, the zeros in place of a key bias."""
    return key in ("lvl_1L", "attn_bias_for_masking") or key.endswith("zero_k_bias")


def infer_config(state, path):
    """The Config of an official state dict, read from its keys and shapes."""
    width, z_channels = state["word_embed.weight"].shape
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    scale = state.get("blocks.0.attn.scale_mul_1H11")
    length, num_scales = state["pos_1LC"].shape[1], len(state["lvl_embed.weight"])
    if "lvl_1L" in state:
        patch_nums = tuple(math.isqrt(n) for n in state["lvl_1L"].flatten().bincount().tolist())
    else:
        known = {(len(s), sum(p * p for p in s)): s for s in vq.PATCH_NUMS.values()}
        if (num_scales, length) not in known:
            raise vq.CheckpointError(f"{path}: {num_scales} scales with {length} tokens are no released schedule, and "
                                     "there is no lvl_1L in the file to tell their sizes; pass config=")
        patch_nums = known[num_scales, length]
    return Config(
        depth=depth, width=width, heads=scale.shape[1] if scale is not None else width // 64, patch_nums=patch_nums,
        num_classes=len(state["class_emb.weight"]) - 1, vocab_size=len(state["head.weight"]), z_channels=z_channels,
        mlp_ratio=len(state["blocks.0.ffn.fc1.weight"]) // width, shared_adaln="shared_ada_lin.1.weight" in state,
        attn_l2_norm=scale is not None, drop_path=0.1 * depth / 24)


def load(path, config=None, num_classes=None, dtype=torch.float32, generator=None):
    """A VAR in eval mode from a released file, a training checkpoint of the original, or a file of ours.

    config: instead of the inferred one. num_classes: to fine-tune on other classes: if it differs from the file's, all
    class embeddings but the null class, the last row, start anew from generator. dtype: see set_dtype.
    Raises vq.CheckpointError.
    """
    state, saved = vq.read_checkpoint(path, nested=(("trainer", "var_wo_ddp"), ("state_dict",), ("model",)))
    vq.require(state, "word_embed.weight", "pos_1LC", "class_emb.weight", "blocks.0.attn.mat_qkv.weight", path=path,
               what="a VAR transformer")
    if config is None:
        config = vq.config_from_json(Config, saved, path) if saved else infer_config(state, path)
    if num_classes is not None and num_classes != config.num_classes:
        config = replace(config, num_classes=num_classes)
        fresh = torch.empty(num_classes + 1, config.width)
        nn.init.trunc_normal_(fresh, std=math.sqrt(1 / (3 * config.width)), generator=generator)
        fresh[-1] = state["class_emb.weight"][-1]
        state["class_emb.weight"] = fresh
    model = vq.build(VAR, config)
    vq.load_strict(model, vq.rename_keys({k: v for k, v in state.items() if not _is_derived(k)}, RENAMES), path)
    return set_dtype(model.eval(), dtype)


def set_dtype(model, dtype):
    """Casts the parameters of blocks and head. Embeddings, residual stream, logits and f_hat stay in float32."""
    model.blocks.to(dtype)
    model.head.to(dtype)
    return model


def export(model, buffers=True):
    """The official state dict of a VAR, in float32, with or without the buffers that follow from the config."""
    state = {k: v.float().contiguous() for k, v in model.state_dict().items()}
    state = vq.rename_keys(state, RENAMES, inverse=True)
    if buffers:
        state["lvl_1L"] = model.level[None].clone()
        bias = torch.zeros(model.mask.shape).masked_fill(~model.mask.cpu(), -math.inf)
        state["attn_bias_for_masking"] = bias[None, None]
        for i in range(model.config.depth):
            state[f"blocks.{i}.attn.zero_k_bias"] = torch.zeros(model.config.width)
    return state


def save(model, path, dtype=None, **extra):
    """Writes a VAR as safetensors: official keys, config (and `extra`) in the header. dtype: of the stored floats."""
    vq.save_checkpoint(path, export(model, buffers=False), model.config, dtype, **extra)
