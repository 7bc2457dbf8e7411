"""VAR: class -> image by next-scale prediction. Full definition of the model, all of it in this single file.

VAR is an autoregressive transformer whose step is the next *resolution*, not the next token. The tokenizer (vq.py)
turns a picture into token maps of growing size, 1x1, 2x2, ... 16x16. A token map is a grid of codebook indices, and
each map encodes what the coarser maps left over. Step k predicts all p_k * p_k tokens of map k at once, from the class
and from all coarser maps. This takes ten steps instead of 680 and imposes no left-to-right order on a picture.

    class c --> embed --+--> condition of every AdaLN: gates, scales and shifts, the same in all steps
                        |
                   scale 0          scale 1            scale 2                  scale 9
    inputs         c + start        word(f_hat 2x2)    word(f_hat 3x3)   ...    word(f_hat 16x16)   + level + position
                        |                |                  |                       |
    transformer    sees 1 token     sees 1 + 4         sees 1 + 4 + 9           sees all 680         block-causal
                        |                |                  |                       |
    logits         1 x 4096         4 x 4096           9 x 4096                 256 x 4096

    tokens -> codebook rows -> bicubic resize -> convolution phi (vq.py) -> added to f_hat, the picture so far
    f_hat resized to the next scale -> linear layer "word" -> input of that scale

How it differs from a textbook GPT:
- The input at scale k is not an embedding of earlier tokens. It is f_hat, the sum of all coarser maps, resized to
  scale k. In training f_hat is computed from the true tokens, in sampling from those drawn so far.
- Attention is full within a scale and causal between scales. Training uses a mask for this. Sampling needs none: a
  whole scale goes in at once, and the KV cache holds coarser scales only.
- q and k are unit vectors, and each head has a learned inverse temperature. The keys have no bias. Without the
  normalisation, a key bias would add the same number to all scores of a query, and softmax ignores that.
- The condition enters by AdaLN-Zero, as in DiT. In var_d36 and the demo model all blocks share one AdaLN layer.
- Classifier-free guidance grows linearly over the scales, from none at 1x1.
Progressive training (`pg` in the original code) is left out, because no released model used it.

Letters: B batch, R rows (2B with guidance, else B), L tokens of all scales (680 at 256 pixels, 2240 at 512), l tokens
of one scale, C width, H heads, D head dim, V codebook size, K number of scales, p side of a token map, Cv codebook
channels. Paper: Visual Autoregressive Modeling, arXiv 2404.02905. Released weights, repository FoundationVision/var:
var_d16.pth 310 M, var_d20.pth 601 M, var_d24.pth 1.0 B, var_d30.pth 2.0 B parameters at 256 pixels, var_d36.pth 2.4 B
at 512. All use the tokenizer vae_ch160v4096z32.pth.

    tokenizer, model = vq.load("vae_ch160v4096z32.pth"), var.load("var_d16.pth")
    images = model.sample(tokenizer, labels=torch.tensor([207, 360]), cfg=4, top_k=900, top_p=0.95,
                          generator=torch.Generator().manual_seed(0))       # (2, 3, 256, 256) in [0, 1]
"""
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import vq
from triton_ops import adaln_modulate, exponential_noise, filter_logits, qk_norm_rope, sample_logits


@dataclass(frozen=True)
class Config:
    """Sizes of a VAR. `infer_config` reads them from a released file, except norm_eps and class_drop."""

    depth: int = 16
    width: int = 1024                           # C, 64 * depth in released models
    heads: int = 16                             # released models: depth, so D = 64
    patch_nums: tuple = vq.PATCH_NUMS[256]      # side of the token map at every scale
    num_classes: int = 1000                     # class `num_classes` is the null class of guidance
    vocab_size: int = 4096                      # V
    z_channels: int = 32                        # Cv
    mlp_ratio: int = 4
    norm_eps: float = 1e-6
    shared_adaln: bool = False                  # blocks share one AdaLN layer and add a table each (d36 and the demo)
    attn_l2_norm: bool = True                   # scale q and k to length 1. False only for the very first uploads
    class_drop: float = 0.1                     # share of labels replaced by the null class in training
    drop_path: float = 0.1 * 16 / 24            # rate of the last block, grows linearly from 0 at the first


def _released(depth, side=256):
    return Config(depth=depth, width=64 * depth, heads=depth, patch_nums=vq.PATCH_NUMS[side], shared_adaln=side == 512,
                  drop_path=0.1 * depth / 24)


CONFIGS = {
    "var_d16": _released(16),
    "var_d20": _released(20),
    "var_d24": _released(24),
    "var_d30": _released(30),
    "var_d36": _released(36, side=512),
    "emoji_var": Config(depth=6, width=192, heads=3, patch_nums=(1, 2, 3, 4, 6, 8), num_classes=575, vocab_size=4096,
                        z_channels=16, shared_adaln=True, drop_path=0.025),     # 32 x 32 pixels, trained in demo/
}


# ----------------------------------------------------------------------------------------------------------------------
# Building blocks


class Attention(nn.Module):
    """Multi-head attention to the tokens of the same scale and of all coarser scales.

    With attn_l2_norm a score is the cosine of q and k times a learned factor per head (an inverse temperature) of at
    most 100. The scores are then bounded, which keeps deep models and half precision stable.
    """

    def __init__(self, config):
        super().__init__()
        C, H = config.width, config.heads
        self.heads = H
        self.l2_norm = config.attn_l2_norm
        self.qkv = nn.Linear(C, 3 * C, bias=False)                          # rows: q, k, v, each head-major
        self.q_bias = nn.Parameter(torch.zeros(C))
        self.v_bias = nn.Parameter(torch.zeros(C))
        self.proj = nn.Linear(C, C)
        if self.l2_norm:
            self.log_scale = nn.Parameter(torch.full((1, H, 1, 1), math.log(4)))    # log of the sharpness
        # Without the norm the scale is a quarter of the usual 1 / sqrt(D). The authors give no reason for the quarter.
        self.softmax_scale = 1.0 if self.l2_norm else 0.25 / math.sqrt(C // H)

    def forward(self, x, mask=None, kv_cache=None, pos=0):
        """x (B, l, C) -> (B, l, C). mask (l, l) bool: True where a row may look at a column.

        kv_cache (2, B, H, L, D): keys and values of the coarser scales up to pos; those of x are written behind them.
        """
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)                            # (B, l, 3C)
        q, k, v = rearrange(qkv, "b l (three h d) -> three b l h d", three=3, h=self.heads)
        q_scale = self.log_scale.float().clamp(max=math.log(100)).exp().flatten() if self.l2_norm else None     # (H,)
        k_cache, v_cache = kv_cache if kv_cache is not None else (None, None)
        q, k, v = qk_norm_rope(q, k, v, q_scale=q_scale, l2norm=self.l2_norm, k_cache=k_cache, v_cache=v_cache, pos=pos)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.softmax_scale)     # (B, H, l, D)
        return self.proj(rearrange(out, "b h l d -> b l (h d)"))


class FeedForward(nn.Module):
    """C -> 4C -> C with the tanh approximation of GELU, which is off by up to 5e-4."""

    def __init__(self, width, ratio):
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """A transformer block whose two branches, attention and feed-forward, are modulated and gated by the condition."""

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

    def modulation(self, cond, shared=None):
        """Condition (B, C), output of the shared AdaLN layer (B, 1, 6, C) or None -> (B, 1, 6, C): two gates, scales,
        and shifts. The first of each pair is for attention, the second for the feed-forward."""
        if shared is not None:
            return self.adaln_table + shared
        modulation = self.adaln(F.silu(cond).to(self.adaln.weight.dtype))
        return rearrange(modulation, "b (six c) -> b 1 six c", six=6)

    def forward(self, x, modulation, mask=None, kv_cache=None, pos=0, branch_scale=None):
        """Residual stream x (B, l, C) -> the same. branch_scale: see `VAR.branch_scale`; the rest as in Attention."""
        # In a textbook this reads
        #     x = x + gate1 * attn(modulate(norm(x), scale1, shift1))
        #     x = x + gate2 * ffn(modulate(norm(x), scale2, shift2))
        # Here the second adaln_modulate does the first sum as well, in the same pass over memory.
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        dtype = self.ffn.fc1.weight.dtype                                   # x stays float32 if the weights are not
        h = adaln_modulate(x, scale1, shift1, self.eps, out_dtype=dtype)
        h = self.attn(h, mask, kv_cache, pos)
        if branch_scale is not None:
            h = h * branch_scale[0].to(h.dtype)
        h, x = adaln_modulate(h, scale2, shift2, self.eps, residual=x, gate=gate1, out_dtype=dtype)
        h = self.ffn(h)
        if branch_scale is not None:
            h = h * branch_scale[1].to(h.dtype)
        return torch.addcmul(x, gate2, h)


# ----------------------------------------------------------------------------------------------------------------------
# The model


class Modulation(NamedTuple):
    """Everything that depends on the condition only. It is computed once per picture, not once per scale."""

    blocks: torch.Tensor        # (depth, R, 1, 6, C)
    head: torch.Tensor          # (2, R, 1, C): scale and shift of the last norm


class Step(NamedTuple):
    """What `VAR.sample` passes to on_step after scale k. Clone logits to keep them: a model that is replayed as a CUDA
    graph overwrites them in its next picture."""

    k: int
    logits: torch.Tensor        # (R, l, V) before guidance and filters. Rows with the class come first
    guidance: float             # t: tokens are drawn from (1 + t) * conditional - t * unconditional logits
    tokens: torch.Tensor        # (B, l) as drawn. Editing and more_smooth put other codes into f_hat
    f_hat: torch.Tensor         # (B, Cv, p, p) the picture so far, at the size of the last scale


class VAR(nn.Module):
    """The transformer. The tokenizer is not part of it: methods that need one take it as an argument."""

    NO_DECAY = ("pos_embed", "pos_start", "level_embed", "adaln_table", "log_scale")    # excluded from weight decay

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False
        C = config.width
        patch_nums = config.patch_nums
        lengths = [p * p for p in patch_nums]
        level = torch.cat([torch.full((n,), k) for k, n in enumerate(lengths)])
        self.register_buffer("level", level, persistent=False)                      # (L,) scale of every position
        self.register_buffer("mask", level[:, None] >= level, persistent=False)     # (L, L) True = row sees column

        self.class_embed = nn.Embedding(config.num_classes + 1, C)          # last row: the null class
        self.word_embed = nn.Linear(config.z_channels, C)                   # embeds the cells of f_hat
        self.level_embed = nn.Embedding(len(patch_nums), C)
        self.pos_start = nn.Parameter(torch.zeros(1, lengths[0], C))
        self.pos_embed = nn.Parameter(torch.zeros(1, sum(lengths), C))
        if config.shared_adaln:
            self.shared_adaln = nn.Linear(C, 6 * C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_adaln = nn.Linear(C, 2 * C)                               # never shared
        self.head = nn.Linear(C, config.vocab_size)

    # pieces that training and sampling share

    def modulation(self, cond):
        """Condition (B, C) -> Modulation of all blocks and of the head."""
        shared = None
        if self.config.shared_adaln:
            shared = rearrange(self.shared_adaln(F.silu(cond)), "b (six c) -> b 1 six c", six=6)
        blocks = torch.stack([block.modulation(cond, shared) for block in self.blocks])
        head = self.head_adaln(F.silu(cond)).unsqueeze(1).chunk(2, dim=-1)
        return Modulation(blocks, torch.stack(head))

    def position_embed(self, start, end):
        """Level and position embeddings of tokens start .. end: (1, end - start, C)."""
        return self.level_embed(self.level[start:end]) + self.pos_embed[:, start:end]

    def logits(self, x, modulation):
        """Residual stream (B, l, C) -> (B, l, V) float32."""
        scale, shift = modulation.head
        x = adaln_modulate(x, scale, shift, self.config.norm_eps, out_dtype=self.head.weight.dtype)
        return self.head(x).float()

    # training

    def forward(self, labels, features, class_drop=0.0, generator=None):
        """Teacher-forced logits of all scales.

        labels:     (B,) class of each picture, 0 .. num_classes
        features:   (B, L - p_0^2, Cv): the true f_hat at every scale except the first, from
                    `tokenizer.quantize.teacher_input(indices, model.config.patch_nums)`
        class_drop: share of labels replaced by the null class
        generator:  gives one uniform number per picture for class_drop, and in training mode those of stochastic depth
        returns     (B, L, V) float32; row i predicts token i of the same scale (not of the next position)
        """
        if class_drop:
            dropped = torch.rand(len(labels), generator=generator, device=labels.device) < class_drop
            labels = torch.where(dropped, self.config.num_classes, labels)
        cond = self.class_embed(labels)                                                     # (B, C)
        x = torch.cat([cond[:, None] + self.pos_start, self.word_embed(features)], 1)       # (B, L, C)
        x = x + self.position_embed(0, x.shape[1])
        modulation = self.modulation(cond)
        for i, (block, block_modulation) in enumerate(zip(self.blocks, modulation.blocks)):
            branch_scale = self.branch_scale(i, len(x), x.device, generator)
            x = vq.recompute(self.checkpointing, block, x, block_modulation, self.mask, branch_scale=branch_scale)
        return self.logits(x, modulation)

    def branch_scale(self, i, B, device, generator):
        """Stochastic depth: factors (2, B, 1, 1) of both branches of block i, or None in eval mode. A factor is 0 for
        some pictures and above 1 for the others, so that the mean stays. Deeper blocks lose branches more often."""
        keep = 1 - self.config.drop_path * i / max(self.config.depth - 1, 1)
        if not self.training or keep >= 1:
            return None
        uniform = [torch.rand(B, 1, 1, generator=generator, device=device) for _ in range(2)]
        return (torch.stack(uniform) < keep).float() / keep

    def loss(self, labels, tokens, features, *, class_drop=None, label_smoothing=0.0, generator=None):
        """Cross entropy, mean over the L tokens and the batch -> (loss, {accuracy, tail_loss, tail_accuracy}).

        tokens: (B, L) true indices of all scales; "tail" means the last scale. class_drop: by default that of the
        config in training, and 0 in eval mode. The original drops classes in eval mode too: its loss is random there.
        """
        if class_drop is None:
            class_drop = self.config.class_drop if self.training else 0.0
        logits = self(labels, features, class_drop, generator)
        losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), label_smoothing=label_smoothing,
                                 reduction="none").view_as(tokens)          # (B, L)
        with torch.no_grad():
            correct = (logits.argmax(-1) == tokens).float()
            tail = slice(-self.config.patch_nums[-1] ** 2, None)
            metrics = {"accuracy": correct.mean(), "tail_loss": losses[:, tail].mean(),
                       "tail_accuracy": correct[:, tail].mean()}
        return losses.mean(), metrics

    def check_pair(self, tokenizer):
        """Raises ValueError if the tokenizer cannot be the one of this model."""
        t = tokenizer.config
        c = self.config
        if t.single_scale or not t.vocab_size:
            kind = "one map of tokens per picture" if t.single_scale else "tokens of bits"
            raise ValueError(f"the tokenizer has {kind}, but VAR needs token maps of several scales, with a codebook")
        if (t.vocab_size, t.z_channels) != (c.vocab_size, c.z_channels):
            raise ValueError(f"the tokenizer has {t.vocab_size} codes of {t.z_channels} channels, but this model draws "
                             f"{c.vocab_size} of {c.z_channels}")

    # sampling

    @torch.no_grad()
    def sample(self, tokenizer, labels, *, cfg=1.5, top_k=0, top_p=0.0, more_smooth=False, generator=None,
               given_tokens=None, keep_mask=None, all_scales=False, on_step=None):
        """Draws pictures -> (B, 3, h, w) float32 in [0, 1], or with all_scales=True a list, one per scale.

        tokenizer:    the VQVAE, on the same device
        labels:       (B,) int64 classes, num_classes being the null class; or an int B, for B random classes. Pass a
                      CPU tensor: checking its range then needs no GPU synchronisation
        cfg:          guidance. Logits are (1 + t) cond - t uncond with t = cfg * k / (K - 1). 0 turns it off; LlamaGen
                      and Infinity write 1 for that. In their convention cfg=4 here is 1 at scale 0 and 5 at the last
        top_k, top_p: keep the k likeliest tokens, then the fewest likeliest ones whose probabilities sum to at least p;
                      0 turns a filter off
        more_smooth:  use mixtures of codes instead of single codes: smoother pictures, lower scores
        generator:    a torch.Generator on the model's device, consumed exactly as by the original; or a list of B, one
                      per picture, so that no picture depends on its batch; None: torch's global one
        given_tokens, keep_mask: editing. The tokens of a picture, K times (B, l), and a bool mask (p, p) on the last
                      scale, see `edit_mask`. Where it is True the given codes are kept at every scale; the one cell of
                      a 1x1 scale is always kept. Pass the null class to in- or out-paint, another class to edit. Kept
                      cells show the tokenizer's reconstruction, not the original pixels
        on_step:      called with a Step after every scale
        Raises ValueError for labels out of range, and for only one of given_tokens and keep_mask.
        """
        if (given_tokens is None) != (keep_mask is None):
            raise ValueError("editing takes both: the tokens of the picture as given_tokens=, the mask as keep_mask=")
        labels = self.check_labels(labels, generator)
        config = self.config
        device = self.pos_embed.device
        quantizer = tokenizer.quantize
        B = len(labels)
        K = len(config.patch_nums)
        side = config.patch_nums[-1]
        guided = cfg != 0 and bool((labels != config.num_classes).any())    # else both halves would be equal
        labels = labels.to(device)
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])       # (R,)

        cond = self.class_embed(labels)                                     # (R, C)
        modulation = self.modulation(cond)
        kv_cache = self.new_kv_cache(len(labels))
        x = cond[:, None] + self.pos_start                                  # (R, 1, C), the input of the first scale
        f_hat = cond.new_zeros(B, config.z_channels, side, side)
        f_hats = []
        for k, p in enumerate(config.patch_nums):                           # coarse to fine
            logits = self.forward_scale(x, k, kv_cache, modulation)         # (R, p * p, V)

            # Guidance grows with the scale. A likely reason: coarse scales fix the layout, and strong guidance there
            # would make all pictures of a class alike, while fine scales only add the details.
            t = cfg * k / max(K - 1, 1) if guided else 0.0
            cond_logits = logits[:B]
            uncond_logits = logits[B:] if t else None
            noise = exponential_noise((B, p * p, config.vocab_size), generator, device)     # more_smooth draws it too
            if not more_smooth:
                tokens = sample_logits(cond_logits, uncond_logits, cfg=1 + t, top_k=top_k, top_p=top_p, noise=noise)
                codes = F.embedding(tokens, quantizer.codebook)             # (B, p * p, Cv)
            else:                       # Gumbel-softmax, sharper at finer scales; the numbers are the authors' choice
                progress = k / max(K - 1, 1)
                guided_logits = (1 + t) * cond_logits - t * uncond_logits if t else cond_logits
                filtered = filter_logits(guided_logits, top_k, top_p)
                gumbel = -exponential_noise((B, p * p, config.vocab_size), generator, device).log()
                weights = ((filtered * (1 + progress) + gumbel) / (0.27 * (1 - 0.95 * progress))).softmax(-1)
                codes = weights @ quantizer.codebook
                tokens = sample_logits(filtered, noise=noise)               # for on_step only
            codes = rearrange(codes, "b (h w) c -> b c h w", h=p)
            if keep_mask is not None:                                       # put the kept codes back
                codes = torch.where(keep_cells(keep_mask, p), quantizer.embed(given_tokens[k], (p, p)), codes)

            f_hat = f_hat + quantizer.contribution(codes, k, K, (side, side))
            if all_scales or k + 1 == K:
                f_hats.append(f_hat)
            if on_step is not None:
                on_step(Step(k, logits, t, tokens, f_hat))
            if k + 1 < K:
                next_input = quantizer.next_input(f_hat, k + 1, config.patch_nums)          # (B, l, Cv)
                x = self.word_embed(next_input).repeat(len(labels) // B, 1, 1)      # both halves see the same picture
        del kv_cache, x, logits, noise                                      # large: free them before decoding
        images = [tokenizer.decode(f_hat).add(1).mul(0.5) for f_hat in f_hats]
        return images if all_scales else images[0]

    def new_kv_cache(self, rows):
        """An empty cache (depth, 2, R, H, L, D) for the keys and values of all scales."""
        c = self.config
        return self.blocks[0].ffn.fc1.weight.new_empty(c.depth, 2, rows, c.heads, len(self.level), c.width // c.heads)

    def forward_scale(self, x, k, kv_cache, modulation):
        """Input of scale k (R, l, C) -> logits (R, l, V). Adds the keys and values of the scale to the cache.

        Shapes depend on k and R only, and the CPU never waits for the GPU. So lib/graphs.py can capture a CUDA graph.
        """
        start = sum(p * p for p in self.config.patch_nums[:k])
        x = x + self.position_embed(start, start + x.shape[1])
        for block, block_modulation, block_cache in zip(self.blocks, modulation.blocks, kv_cache):
            x = block(x, block_modulation, kv_cache=block_cache, pos=start)
        return self.logits(x, modulation)

    def check_labels(self, labels, generator=None):
        """Checks labels (B,) and returns them. For an int B it draws B random classes, before any other draw."""
        device = self.pos_embed.device
        n = self.config.num_classes
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
            rows = block.adaln_table[0, 0] if c.shared_adaln else block.adaln.weight.unflatten(0, (6, c.width))
            rows[:2] *= init_gamma                                          # gates
            rows[2:] *= 0.5                                                 # scales and shifts


def edit_mask(box, side, inpaint=True):
    """The cells of the last token map to keep: bool (side, side), for `VAR.sample(keep_mask=...)`.

    box: (y0, x0, y1, x1) as fractions of the picture; it has at least one cell. inpaint=True keeps everything outside
    the box, inpaint=False keeps the inside (out-painting).
    """
    y0, x0, y1, x1 = (round(v * side) for v in box)
    y0 = min(y0, side - 1)
    x0 = min(x0, side - 1)
    inside = torch.zeros(side, side, dtype=torch.bool)
    inside[y0:max(y1, y0 + 1), x0:max(x1, x0 + 1)] = True
    return ~inside if inpaint else inside


def keep_cells(keep_mask, p):
    """The keep mask of the last scale resized to a scale of side p: bool (1, 1, p, p); all True for p = 1."""
    if p == 1:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=keep_mask.device)
    return F.interpolate(keep_mask[None, None].float(), (p, p), mode="bilinear") > 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Loading

RENAMES = [     # fragment of an official key, fragment of our key
    ("pos_1LC", "pos_embed"), ("class_emb", "class_embed"), ("lvl_embed", "level_embed"),
    ("attn.mat_qkv", "attn.qkv"), ("attn.scale_mul_1H11", "attn.log_scale"),
    ("head_nm.ada_lin.1", "head_adaln"), ("shared_ada_lin.1", "shared_adaln"), ("ada_lin.1", "adaln"),
    ("ada_gss", "adaln_table"),
]
# Official buffers that follow from the config: scale of each position, mask, zeros in place of a key bias
DERIVED = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")


def infer_config(state, path):
    """The Config of an official state dict, read from its keys and shapes. Raises vq.CheckpointError."""
    width, z_channels = state["word_embed.weight"].shape
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    log_scale = state.get("blocks.0.attn.scale_mul_1H11")
    if "lvl_1L" in state:
        patch_nums = tuple(math.isqrt(n) for n in state["lvl_1L"].flatten().bincount().tolist())
    else:
        known = {(len(nums), sum(p * p for p in nums)): nums for nums in vq.PATCH_NUMS.values()}
        K, L = len(state["lvl_embed.weight"]), state["pos_1LC"].shape[1]
        if (K, L) not in known:
            raise vq.CheckpointError(f"{path}: {K} scales with {L} tokens are no released schedule, and there is no "
                                     "lvl_1L in the file to tell their sizes; var.load takes them in a config=")
        patch_nums = known[K, L]
    heads = width // 64 if log_scale is None else log_scale.shape[1]        # older files do not tell the heads
    return Config(
        depth=depth, width=width, heads=heads, patch_nums=patch_nums,
        num_classes=len(state["class_emb.weight"]) - 1, vocab_size=len(state["head.weight"]), z_channels=z_channels,
        mlp_ratio=len(state["blocks.0.ffn.fc1.weight"]) // width, shared_adaln="shared_ada_lin.1.weight" in state,
        attn_l2_norm=log_scale is not None, drop_path=0.1 * depth / 24)


def load(path, config=None, num_classes=None, dtype=torch.float32, generator=None, weights=None):
    """A VAR in eval mode from a released file, a training checkpoint of the original, or a file of ours.

    config: replaces the inferred one. num_classes: for fine-tuning on other classes. If it differs from the file's, all
    class embeddings except the null class (the last row) are drawn from generator. dtype: see set_dtype. weights: see
    vq.read_checkpoint. Raises vq.CheckpointError.
    """
    what = "a VAR transformer"
    state, header = vq.read_checkpoint(path, nested=(("trainer", "var_wo_ddp"),), weights=weights)
    vq.require(state, "word_embed.weight", "pos_1LC", "class_emb.weight", "blocks.0.attn.mat_qkv.weight", path=path,
               what=what)
    with vq.understanding(path, what):
        if config is None:
            config = vq.read_config(Config, header, path, lambda: infer_config(state, path))
        if num_classes is not None and num_classes != config.num_classes:
            config = replace(config, num_classes=num_classes)
            fresh = torch.empty(num_classes + 1, config.width)
            nn.init.trunc_normal_(fresh, std=math.sqrt(1 / (3 * config.width)), generator=generator)
            fresh[-1] = state["class_emb.weight"][-1]
            state["class_emb.weight"] = fresh
        state = vq.rename_keys({k: v for k, v in state.items() if not k.endswith(DERIVED)}, RENAMES)
        vq.check_fit(vq.on_meta(VAR, config), state, path)
        model = vq.build(VAR, config)
        vq.load_strict(model, state, path)
    model.origin = header.origin
    return set_dtype(model.eval(), dtype)


def set_dtype(model, dtype):
    """Casts the parameters of blocks and head. Embeddings, residual stream, logits and f_hat stay in float32."""
    model.blocks.to(dtype)
    model.head.to(dtype)
    return model


def export(model, buffers=True):
    """The official state dict of a VAR in float32. buffers=False omits the buffers that follow from the config."""
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
    """Writes a VAR as safetensors with official keys, in dtype; the header holds the config and `extra`."""
    vq.save_checkpoint(path, export(model, buffers=False), model.config, dtype, **extra)
