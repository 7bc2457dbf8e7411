"""The drawing loops of VAR, LlamaGen and Infinity with the arithmetic of the original code, to race ours against.

A rival shows that ours is faster than the original only if it computes what the original computes. These functions take
our models, so they have the same weights, and with the same generator they draw the same tokens, but they go through
the steps of the original code. Comments that begin with "Ours" say which improvement of our models is missing at that
place. What takes no time, such as reading the text once per picture, is done by the models.

In half precision VAR, Infinity and the decoders run under autocast, as the originals do. On a GPU Infinity's original
is faster than this file in two places: it compiles LayerNorm and modulation into one kernel, and it packs texts of
different lengths without padding.
"""
import copy
import functools
import math
import weakref

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import infinity
import llamagen
import vq


def autocast(weight):
    """Autocast to the precision of a weight. For float32 it does nothing."""
    return torch.autocast(weight.device.type, weight.dtype, enabled=weight.dtype != torch.float32)


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer's decoder

_contiguous = weakref.WeakKeyDictionary()       # tokenizer -> (versions of its weights, copy of its layers)


def contiguous_layers(tokenizer):
    """post_quant_conv and decoder with contiguous weights, a copy. A convolution follows the layout of its weights.

    Ours: channels_last. The copy is kept until the weights change, because the originals need not copy anything.
    """
    layers = nn.ModuleList([tokenizer.post_quant_conv, tokenizer.decoder])
    versions = [(p.data_ptr(), p.dtype, p._version) for p in layers.parameters()]
    if tokenizer not in _contiguous or _contiguous[tokenizer][0] != versions:
        _contiguous[tokenizer] = versions, copy.deepcopy(layers).to(memory_format=torch.contiguous_format)
    return _contiguous[tokenizer][1]


@torch.no_grad()
def decode(tokenizer, f_hat):
    """Quantized features (B, C, H, W) -> image (B, 3, h, w) in [-1, 1], float32."""
    post_quant_conv, decoder = contiguous_layers(tokenizer)
    is_var = isinstance(tokenizer.quantize, vq.MultiScaleVQ)
    activation = functools.partial(F.silu, inplace=True) if is_var else swish
    weight = decoder.conv_in.weight
    with autocast(weight):
        x = decoder.conv_in(post_quant_conv(f_hat.to(weight.dtype).contiguous()))
        x = residual_block(decoder.mid.block_1, x, activation)
        if decoder.mid.attn_1 is not None:
            x = attention_block(decoder.mid.attn_1, x)
        x = residual_block(decoder.mid.block_2, x, activation)
        for level in reversed(decoder.up):
            for j, block in enumerate(level.block):
                x = residual_block(block, x, activation)
                if level.attn:
                    x = attention_block(level.attn[j], x)
            if level.upsample is not None:
                x = level.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = decoder.conv_out(activation(decoder.norm_out(x)))
    return x.float().clamp(-1, 1)


def swish(x):
    """The activation of LlamaGen's and Infinity's tokenizers. Ours: silu in place."""
    return x * torch.sigmoid(x)


def residual_block(block, x, activation):
    """x (B, c_in, H, W) -> (B, c_out, H, W). Ours: the last sum is in place."""
    h = block.conv1(activation(block.norm1(x)))
    h = block.conv2(activation(block.norm2(h)))
    return (x if block.nin_shortcut is None else block.nin_shortcut(x)) + h


def attention_block(block, x):
    """Attention of all positions of x (B, C, H, W) to each other. Ours: a kernel that does not store all scores."""
    q, k, v = block.qkv(block.norm(x)).flatten(2).chunk(3, 1)               # (B, C, H W)
    scores = torch.bmm(q.transpose(1, 2), k) * x.shape[1] ** -0.5           # (B, H W, H W)
    h = torch.bmm(v, scores.softmax(2).transpose(1, 2))
    return x + block.proj_out(h.view(x.shape))


# ----------------------------------------------------------------------------------------------------------------------
# What several models share


def rotated(x, cos, sin):
    """RoPE, step by step: the pairs (2i, 2i + 1) of x (..., D), turned in float32. Ours: one op for q, k and cache."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).type_as(x)


def draw(logits, top_k, top_p, generator):
    """Logits (..., V), which it overwrites -> draws (...) int64 and the table of probabilities (rows, V).

    Ours: only the top_k survivors are sorted, bits are not sorted at all, and nothing waits for the GPU as multinomial
    does. (LlamaGen's original sorts in the other direction.)
    """
    V = logits.shape[-1]
    if top_k > 0:
        smallest = logits.topk(min(top_k, V)).values[..., -1:]
        logits.masked_fill_(logits < smallest, -math.inf)
    if 0 < top_p < 1:
        ascending, order = logits.sort(-1)
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        removed[..., -1:] = False
        logits.masked_fill_(removed.scatter(-1, order, removed), -math.inf)
    table = logits.softmax(-1).view(-1, V)
    return torch.multinomial(table, 1, generator=generator).view(logits.shape[:-1]), table


def modulated(x, scale, shift, eps):
    """LayerNorm of x (B, l, C), times 1 + scale, plus shift. Ours: one op, which also adds the branch before it."""
    return F.layer_norm(x, x.shape[-1:], eps=eps).mul(scale.add(1)).add_(shift)


def self_attention(attn, x, cache, rope=None):
    """Attention of VAR and Infinity. x (B, l, C), keys and values of the coarser scales -> (B, l, C), new cache."""
    bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    qkv = F.linear(x, attn.qkv.weight, bias)                                # (B, l, 3C)
    q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=attn.heads)
    if hasattr(attn, "log_scale"):
        sharpness = attn.log_scale.float().clamp(max=math.log(100)).exp()   # (1, H, 1, 1)
        q = F.normalize(q.float(), dim=-1).mul(sharpness)
        k = F.normalize(k.float(), dim=-1)                                  # Ours: cached in the dtype of the weights
    if rope is not None:
        q = rotated(q, *rope)
        k = rotated(k, *rope)
    if cache is not None:                                                   # Ours: one cache for all scales, no copies
        k = torch.cat([cache[0], k], 2)
        v = torch.cat([cache[1], v], 2)
    out = F.scaled_dot_product_attention(q, k, v, scale=getattr(attn, "softmax_scale", 1.0))
    return attn.proj(rearrange(out, "b h l d -> b l (h d)")), (k, v)


def cross_attention(cross, x, memory, text_mask):
    """Infinity's look at the text: x (B, l, C), memory (B, T, C), mask (B, 1, 1, T) or None -> (B, l, C)."""
    bias = torch.cat([torch.zeros_like(cross.v_bias), cross.v_bias])
    kv = F.linear(memory, cross.kv.weight, bias)                            # Ours: once per picture, not once per scale
    k, v = rearrange(kv, "b t (two h d) -> two b h t d", two=2, h=cross.heads)
    q = rearrange(cross.q(x), "b l (h d) -> b h l d", h=cross.heads)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=text_mask)
    return cross.proj(rearrange(out, "b h l d -> b l (h d)"))


def scale_block(block, x, modulation, cache, rope=None, memory=None, text_mask=None):
    """A block of VAR or Infinity: x (B, l, C), modulation (B, 1, 6, C), cache -> (B, l, C), new cache."""
    gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
    h, cache = self_attention(block.attn, modulated(x, scale1, shift1, block.eps), cache, rope)
    x = x + h.mul_(gate1)
    if memory is not None:
        norm = block.cross_norm
        h = F.layer_norm(x, x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps)
        x = x + cross_attention(block.cross, h, memory, text_mask)
    h = F.gelu(block.ffn.fc1(modulated(x, scale2, shift2, block.eps)), approximate="tanh")
    return x + block.ffn.fc2(h).mul_(gate2), cache


def head(model, x, cond):
    """Residual stream of VAR or Infinity (B, l, C), condition (B, C) -> logits (B, l, V). Ours: AdaLN once
    per picture, not once per scale."""
    scale, shift = model.head_adaln(F.silu(cond))[:, None].chunk(2, -1)
    return model.head(modulated(x, scale, shift, model.config.norm_eps)).float()


# ----------------------------------------------------------------------------------------------------------------------
# VAR


def var_images(model, tokenizer, labels, **options):
    """Takes the arguments of `var_tokens` -> pictures (B, 3, h, w) in [0, 1]."""
    _, f_hat = var_tokens(model, tokenizer, labels, **options)
    return decode(tokenizer, f_hat).add_(1).mul_(0.5)


@torch.no_grad()
def var_tokens(model, tokenizer, labels, *, cfg, top_k, top_p, generator):
    """Classes (B,) -> list of tokens (B, l), one tensor per scale, and f_hat (B, Cv, p, p). generator: a single one;
    the other options as in VAR.sample."""
    config = model.config
    quantizer = tokenizer.quantize
    B = len(labels)
    K = len(config.patch_nums)
    full_size = config.patch_nums[-1], config.patch_nums[-1]
    labels = labels.to(model.pos_embed.device)
    labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])
    cond = model.class_embed(labels)                                        # (2B, C). Ours: (B, C) if cfg is 0
    positions = model.level_embed(model.level) + model.pos_embed            # (1, L, C)
    positions = positions.split([p * p for p in config.patch_nums], 1)
    x = cond[:, None] + model.pos_start
    f_hat = x.new_zeros(B, config.z_channels, *full_size)
    caches = [None] * config.depth
    tokens = []
    for k, p in enumerate(config.patch_nums):
        logits = var_logits(model, x + positions[k], cond, caches)          # (2B, l, V)
        t = cfg * k / max(K - 1, 1)
        logits = (1 + t) * logits[:B] - t * logits[B:]
        tokens.append(draw(logits, top_k, top_p, generator)[0])
        h = rearrange(F.embedding(tokens[k], quantizer.codebook), "b (h w) c -> b c h w", h=p)
        if k + 1 < K:
            h = F.interpolate(h, full_size, mode="bicubic")
        phi = quantizer.phi[vq.phi_index(k, K, len(quantizer.phi))]
        f_hat.add_(h.mul(1 - quantizer.config.phi_ratio) + phi(h).mul_(quantizer.config.phi_ratio))
        if k + 1 < K:
            next_map = F.interpolate(f_hat, (config.patch_nums[k + 1],) * 2, mode="area")
            x = model.word_embed(next_map.flatten(2).transpose(1, 2)).repeat(2, 1, 1)
    return tokens, f_hat


def var_logits(model, x, cond, caches):
    """Input of a scale (2B, l, C), condition (2B, C) -> logits (2B, l, V). Changes the list `caches`, one per block."""
    with autocast(model.head.weight):
        if model.config.shared_adaln:                                       # Ours: AdaLN once per picture, as in `head`
            shared = model.shared_adaln(F.silu(cond)).unflatten(-1, (1, 6, -1))
        for i, block in enumerate(model.blocks):
            if model.config.shared_adaln:
                modulation = block.adaln_table + shared
            else:
                modulation = block.adaln(F.silu(cond)).unflatten(-1, (1, 6, -1))
            x, caches[i] = scale_block(block, x, modulation, caches[i])
        return head(model, x, cond)


# ----------------------------------------------------------------------------------------------------------------------
# Infinity


def infinity_images(model, tokenizer, text, text_mask, scales, **options):
    """Takes the arguments of `infinity_bits` -> pictures (B, 3, h, w) in [0, 1]."""
    _, f_hat = infinity_bits(model, tokenizer, text, text_mask, scales, **options)
    return decode(tokenizer, f_hat).add_(1).mul_(0.5)


@torch.no_grad()
def infinity_bits(model, tokenizer, text, text_mask, scales, *, cfg, tau, top_k, top_p, generator):
    """Text (B, T, Ct), mask (B, T) or None -> list of bits (B, h w, bits), one tensor per scale, and f_hat
    (B, d, h, w). generator: a single one; the other options as in Infinity.sample."""
    config = model.config
    B = len(text)
    K = len(scales)
    sizes = [(1, h, w) for h, w in infinity.tokenizer_scales(scales, config.patchify)]      # videos of one frame
    cfg = infinity.per_scale(cfg, K, "cfg")
    tau = infinity.per_scale(tau, K, "tau")
    text = text.to(model.pos_start.device)
    text_mask = None if text_mask is None else text_mask.to(text.device)
    if any(c != 1 for c in cfg):
        text, text_mask = model.with_unconditional(text, text_mask, None)   # R rows
    cond, memory, text_mask = model.read_text(text, text_mask)
    shared = model.shared_adaln(F.silu(cond)).unflatten(-1, (1, 6, -1))
    rope = model.rope(scales).split([h * w for h, w in scales], 1)          # (2, l, D / 2) per scale
    x = cond[:, None] + model.pos_start
    f_hat = x.new_zeros(B, tokenizer.config.z_channels, *sizes[-1])
    caches = [None] * config.depth
    bits = []
    for k, (h, w) in enumerate(scales):
        x = x + model.level_embed.weight[k]
        with autocast(model.blocks[0].ffn.fc1.weight):
            for i, block in enumerate(model.blocks):
                modulation = block.adaln_table + shared                     # Ours: once per picture
                x, caches[i] = scale_block(block, x, modulation, caches[i], rope[k], memory, text_mask)
        logits = head(model, x, cond).mul(1 / tau[k])                       # (R, l, 2 bits)
        # Ours: where a scale has no guidance, the head reads the first half only.
        logits = logits[:B] if cfg[k] == 1 else cfg[k] * logits[:B] + (1 - cfg[k]) * logits[B:]
        drawn, _ = draw(logits.reshape(B, -1, 2), top_k, top_p, generator)
        bits.append(drawn.view(B, h * w, config.bits))
        codes = rearrange(2 * bits[k].float() - 1, "b (h w) d -> b d h w", h=h)
        if config.patchify:
            codes = F.pixel_shuffle(codes, 2)
        codes = F.normalize(codes * codes.shape[1] ** -0.5, dim=1)[:, :, None]      # Ours: they have length 1 anyway
        if k + 1 == K:
            return bits, (f_hat + codes)[:, :, 0]
        f_hat = f_hat + F.interpolate(codes, sizes[-1], mode="trilinear")   # Ours: bilinear
        next_map = F.interpolate(f_hat, sizes[k + 1], mode="trilinear")[:, :, 0]
        if config.patchify:
            next_map = F.pixel_unshuffle(next_map, 2)
        x = model.word_embed(next_map.flatten(2).transpose(1, 2)).repeat(len(text) // B, 1, 1)


# ----------------------------------------------------------------------------------------------------------------------
# LlamaGen


@torch.no_grad()
def llamagen_images(model, tokenizer, cond, text_mask=None, **options):
    """Takes the arguments of `llamagen_tokens` -> pictures (B, 3, h, w) in [0, 1]."""
    tokens = llamagen_tokens(model, cond, text_mask, **options)
    codebook = tokenizer.quantize.codebook
    if tokenizer.config.unit_codes:
        codebook = F.normalize(codebook, dim=-1)                            # Ours: of the drawn codes only
    f_hat = rearrange(F.embedding(tokens, codebook), "b (h w) c -> b c h w", h=model.config.side)
    return decode(tokenizer, f_hat).add_(1).mul_(0.5)


@torch.no_grad()
def llamagen_tokens(model, cond, text_mask=None, *, cfg, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0,
                    generator):
    """Classes (B,) or text (B, T, Ct) with its mask (B, T) -> tokens (B, N). cfg: a number; generator: a single one;
    the other options as in LlamaGen.generate."""
    config = model.config
    weight = model.token_embed.weight
    B = len(cond)
    N = config.side ** 2
    length = math.ceil((config.slots + N) / 8) * 8                          # Ours: T + N
    cond = cond.to(weight.device)
    if cfg > 1:
        cond = torch.cat([cond, model.null_condition(cond)])
    R = len(cond)
    mask = weight.new_ones(R, length, length, dtype=torch.bool).tril()      # which positions see which
    if text_mask is not None:
        mask[:, :, :config.slots] &= text_mask.to(weight.device).repeat(R // B, 1)[:, None]
        mask |= torch.eye(length, dtype=torch.bool, device=weight.device)
    # The original has no cache with fewer heads than q, and fails for such models.
    heads = config.kv_heads or config.heads
    caches = weight.new_zeros(config.depth, 2, R, heads, length, config.width // config.heads)
    gates = [block.ffn.fc1.weight.chunk(2) for block in model.blocks]       # w1 and w3
    rope = llamagen.rope_table(config, weight.device)                       # (2, T + N, D / 2)
    pos = torch.arange(config.slots, device=weight.device)
    logits = llamagen_logits(model, model.embed_condition(cond), pos, rope, mask, caches, gates)
    tokens = []
    tables = []                                                             # Ours: not kept. They take N B V numbers
    for i in range(N):
        # Ours: the second half of the rows ends with guidance.
        guided = cfg > 1 and (cfg_interval < 0 or i <= cfg_interval + 1)
        logits = logits[B:] + (logits[:B] - logits[B:]) * cfg if guided else logits[:B]
        token, table = draw(logits / max(temperature, 1e-5), top_k, top_p, generator)
        tokens.append(token)
        tables.append(table)
        if i + 1 < N:
            x = model.token_embed(token.repeat(R // B))[:, None]            # (R, 1, C)
            pos = pos[-1:] + 1
            with sdpa_kernel(SDPBackend.MATH):                              # Ours: a kernel that stores no scores
                logits = llamagen_logits(model, x, pos, rope, mask, caches, gates)
    return torch.stack(tokens, 1)


def llamagen_logits(model, x, pos, rope, mask, caches, gates):
    """x (R, l, C) at positions pos (l,) -> logits (R, V) after the last of them. Writes keys and values to the caches.

    mask (R, length, length) bool, caches (depth, 2, R, Hkv, length, D), gates: w1 and w3 of every block
    """
    H = model.config.heads
    cos, sin = rope[:, pos, None]                                           # (l, 1, D / 2)
    mask = mask[:, None, pos]                                               # (R, 1, l, length)
    for block, (keys, values), (w1, w3) in zip(model.blocks, caches, gates):
        kv_heads = keys.shape[1]
        qkv = F.linear(rms_norm(x, block.norm1), block.attn.qkv.weight).unflatten(-1, (H + 2 * kv_heads, -1))
        q, k, v = qkv.split([H, kv_heads, kv_heads], 2)                     # (R, l, H or Hkv, D)
        keys[:, :, pos] = rotated(k, cos, sin).transpose(1, 2)
        values[:, :, pos] = v.transpose(1, 2)
        # This copies both caches for every token, even if each head is repeated once. Then attention reads them whole.
        # Ours: it reads the rows up to pos, where they are, and needs no mask.
        k = keys.repeat_interleave(H // kv_heads, 1)
        v = values.repeat_interleave(H // kv_heads, 1)
        out = F.scaled_dot_product_attention(rotated(q, cos, sin).transpose(1, 2), k, v, attn_mask=mask)
        x = x + F.linear(rearrange(out, "b h l d -> b l (h d)"), block.attn.proj.weight)
        h = rms_norm(x, block.norm2)
        h = F.silu(F.linear(h, w1)) * F.linear(h, w3)                       # Ours: one product, so h is read once
        x = x + F.linear(h, block.ffn.fc2.weight)
    return F.linear(rms_norm(x, model.norm), model.head.weight)[:, -1].float()      # Ours: of the last position only


def rms_norm(x, norm):
    """RMSNorm of x (R, l, C), step by step in float32. Ours: one op, which also adds the branch before it."""
    wide = x.float()
    return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + norm.eps)).type_as(x) * norm.weight
