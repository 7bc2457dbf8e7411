"""The drawing loops of VAR, LlamaGen and Infinity with the arithmetic of the original code, to race ours against.

That ours is faster than the original is worth saying only if the rival computes what the original computes. These
functions take our models, so they have the same weights, and with the same generator they draw the same tokens. But
they go through the steps of the original code. A comment that begins with "Ours" names the improvement of our models
that is missing at that place. What runs once per picture and takes no time, such as reading the text, is left to the
models. Letters stand for the same sizes as in the model files.

In half precision VAR, Infinity and all decoders run under autocast. LlamaGen computes in the precision of its weights.
The originals are known to differ in three places: Infinity's fuses LayerNorm and modulation into one kernel on GPUs and
does not pad texts of different lengths, so there it is faster than its baseline, and LlamaGen's decodes in float32.
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
    """Context manager: autocast to the precision of a weight. For float32 it does nothing."""
    return torch.autocast(weight.device.type, weight.dtype, enabled=weight.dtype != torch.float32)


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer's decoder

_contiguous = weakref.WeakKeyDictionary()       # tokenizer -> (versions of its weights, copy of its layers)


def contiguous_layers(tokenizer):
    """(post_quant_conv, decoder) with contiguous weights, whose layout convolutions follow. Ours: channels_last.

    It is a copy, kept until the weights change, because the originals spend no time on copying them.
    """
    layers = nn.ModuleList([tokenizer.post_quant_conv, tokenizer.decoder])
    versions = [(p.data_ptr(), p.dtype, p._version) for p in layers.parameters()]
    if tokenizer not in _contiguous or _contiguous[tokenizer][0] != versions:
        _contiguous[tokenizer] = versions, copy.deepcopy(layers).to(memory_format=torch.contiguous_format)
    return _contiguous[tokenizer][1]


@torch.no_grad()
def decode(tokenizer, f_hat):
    """What VQVAE.decode does: quantized features (B, C, H, W) -> image (B, 3, h, w) in [-1, 1], float32."""
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
    """Attention of all positions of x (B, C, H, W) to each other. Ours: a kernel that does not store the scores.
    (LlamaGen's original has three convolutions in place of qkv.)"""
    q, k, v = block.qkv(block.norm(x)).flatten(2).chunk(3, 1)               # (B, C, H W)
    scores = torch.bmm(q.transpose(1, 2), k) * x.shape[1] ** -0.5           # (B, H W, H W)
    h = torch.bmm(v, scores.softmax(2).transpose(1, 2))
    return x + block.proj_out(h.view(x.shape))


# ----------------------------------------------------------------------------------------------------------------------
# Rotations and draws


def rotated(x, cos, sin):
    """x (..., D) with its pairs (2i, 2i + 1) turned by the angles of cos and sin (..., D / 2). Ours: one op turns q and
    k and writes k and v into the cache."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).type_as(x)


def draw(logits, top_k, top_p, generator):
    """Logits (..., V), which it overwrites -> draws (...) int64 and the table of probabilities (rows, V).

    Ours: top-p sorts only what top-k has left, and does not sort the two values of a bit. The draw does not make the
    CPU wait for a GPU, as multinomial does. (LlamaGen's original sorts in descending order.)
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


# ----------------------------------------------------------------------------------------------------------------------
# The blocks of VAR and Infinity


def modulated(x, scale, shift, eps):
    """LayerNorm of x (B, l, C), times 1 + scale, plus shift. Ours: one op, which first adds a branch to x."""
    return F.layer_norm(x, x.shape[-1:], eps=eps).mul(scale.add(1)).add_(shift)


def self_attention(attn, x, cache, rope=None):
    """Attention of a scale x (B, l, C) to itself and to the coarser ones -> (B, l, C), new cache. cache: None, or keys
    and values (B, H, L, D) of the coarser scales; rope: None, or cos and sin (2, l, D / 2)."""
    bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    qkv = F.linear(x, attn.qkv.weight, bias)                                # (B, l, 3C)
    q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=attn.heads)
    if hasattr(attn, "log_scale"):                                          # all released models
        sharpness = attn.log_scale.float().clamp(max=math.log(100)).exp()   # (1, H, 1, 1)
        q = F.normalize(q.float(), dim=-1).mul(sharpness)
        k = F.normalize(k.float(), dim=-1)                                  # Ours: cached in the dtype of the weights
    if rope is not None:
        q = rotated(q, *rope)
        k = rotated(k, *rope)
    if cache is not None:                   # a copy of all that is cached. Ours: the cache has room for all scales
        k = torch.cat([cache[0], k], 2)
        v = torch.cat([cache[1], v], 2)
    scale = getattr(attn, "softmax_scale", 1.0)                             # Infinity's is always 1
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return attn.proj(rearrange(out, "b h l d -> b l (h d)")), (k, v)


def cross_attention(cross, x, memory, text_mask):
    """Attention of x (B, l, C) to the text -> (B, l, C). memory: (B, T, C); text_mask: (B, 1, 1, T) or None."""
    bias = torch.cat([torch.zeros_like(cross.v_bias), cross.v_bias])
    kv = F.linear(memory, cross.kv.weight, bias)                            # Ours: once per picture, not per scale
    k, v = rearrange(kv, "b t (two h d) -> two b h t d", two=2, h=cross.heads)
    q = rearrange(cross.q(x), "b l (h d) -> b h l d", h=cross.heads)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=text_mask)
    return cross.proj(rearrange(out, "b h l d -> b l (h d)"))


def next_scale_block(block, x, modulation, cache, rope=None, memory=None, text_mask=None):
    """Residual stream x (B, l, C) and cache -> the same. modulation: (B, 1, 6, C). VAR has no rope and no memory."""
    gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
    h, cache = self_attention(block.attn, modulated(x, scale1, shift1, block.eps), cache, rope)
    x = x + h.mul_(gate1)
    if memory is not None:
        norm = block.cross_norm
        h = F.layer_norm(x, x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps)
        x = x + cross_attention(block.cross, h, memory, text_mask)
    h = F.gelu(block.ffn.fc1(modulated(x, scale2, shift2, block.eps)), approximate="tanh")
    return x + block.ffn.fc2(h).mul_(gate2), cache


def next_scale_head(model, x, cond):
    """Residual stream x (B, l, C), condition (B, C) -> logits (B, l, V). Ours: AdaLN once per picture."""
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
    """Classes (B,) -> tokens (B, l) of every scale, a list, and f_hat (B, Cv, p, p). Options are those of VAR.sample,
    but there is one generator for all pictures."""
    config = model.config
    quantizer = tokenizer.quantize
    B = len(labels)
    K = len(config.patch_nums)
    full_size = config.patch_nums[-1], config.patch_nums[-1]
    labels = labels.to(model.pos_embed.device)
    labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])
    cond = model.class_embed(labels)                                        # (2B, C). Ours: (B, C) if cfg is 0
    positions = model.level_embed(model.level) + model.pos_embed            # (1, L, C)
    positions = positions.split([p * p for p in config.patch_nums], 1)      # (1, l, C) per scale
    x = cond[:, None] + model.pos_start
    f_hat = x.new_zeros(B, config.z_channels, *full_size)
    caches = [None] * config.depth
    tokens = []
    for k, p in enumerate(config.patch_nums):
        x = x + positions[k]                                                # (2B, l, C)
        with autocast(model.head.weight):
            if config.shared_adaln:                                         # Ours: all AdaLN once per picture
                shared = model.shared_adaln(F.silu(cond)).unflatten(-1, (1, 6, -1))
            for i, block in enumerate(model.blocks):
                if config.shared_adaln:
                    modulation = block.adaln_table + shared
                else:
                    modulation = block.adaln(F.silu(cond)).unflatten(-1, (1, 6, -1))
                x, caches[i] = next_scale_block(block, x, modulation, caches[i])
            logits = next_scale_head(model, x, cond)                        # (2B, l, V)
        t = cfg * k / max(K - 1, 1)
        logits = (1 + t) * logits[:B] - t * logits[B:]                      # Ours: in the op that draws
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


# ----------------------------------------------------------------------------------------------------------------------
# Infinity


def infinity_images(model, tokenizer, text, text_mask, scales, **options):
    """Takes the arguments of `infinity_bits` -> pictures (B, 3, h, w) in [0, 1]."""
    _, f_hat = infinity_bits(model, tokenizer, text, text_mask, scales, **options)
    return decode(tokenizer, f_hat).add_(1).mul_(0.5)


@torch.no_grad()
def infinity_bits(model, tokenizer, text, text_mask, scales, *, cfg, tau, top_k, top_p, generator):
    """Text (B, T, Ct), mask (B, T) or None -> bits (B, h w, bits) of every scale, a list, and f_hat (B, d, h, w).
    Options are those of Infinity.sample, but there is one generator for all pictures."""
    config = model.config
    B = len(text)
    K = len(scales)
    sizes = infinity.tokenizer_scales(scales, config.patchify)
    sizes = [(1, h, w) for h, w in sizes]                                   # a picture is a video of one frame
    cfg = infinity.per_scale(cfg, K, "cfg")
    tau = infinity.per_scale(tau, K, "tau")
    text = text.to(model.pos_start.device)
    text_mask = None if text_mask is None else text_mask.to(text.device)
    if any(c != 1 for c in cfg):
        text, text_mask = model.with_unconditional(text, text_mask, None)
    cond, memory, text_mask = model.read_text(text, text_mask)              # (R, C), (R, T, C), (R, 1, 1, T) or None
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
                x, caches[i] = next_scale_block(block, x, modulation, caches[i], rope[k], memory, text_mask)
        logits = next_scale_head(model, x, cond).mul(1 / tau[k])            # (R, l, 2 bits)
        if cfg[k] == 1:
            logits = logits[:B]                                             # Ours: the head reads this half only
        else:
            logits = cfg[k] * logits[:B] + (1 - cfg[k]) * logits[B:]
        drawn, _ = draw(logits.reshape(B, -1, 2), top_k, top_p, generator)
        bits.append(drawn.view(B, h * w, config.bits))

        codes = rearrange(2 * bits[k].float() - 1, "b (h w) d -> b d h w", h=h)
        if config.patchify:
            codes = F.pixel_shuffle(codes, 2)
        codes = codes * codes.shape[1] ** -0.5
        codes = F.normalize(codes, dim=1)[:, :, None]                       # Ours: the length is 1 already
        if k + 1 < K:
            codes = F.interpolate(codes, sizes[-1], mode="trilinear")       # Ours: bilinear, as there is one frame
        f_hat = f_hat + codes
        if k + 1 < K:
            next_map = F.interpolate(f_hat, sizes[k + 1], mode="trilinear")[:, :, 0]
            if config.patchify:
                next_map = F.pixel_unshuffle(next_map, 2)
            x = model.word_embed(next_map.flatten(2).transpose(1, 2)).repeat(len(text) // B, 1, 1)
    return bits, f_hat[:, :, 0]


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
    """Classes (B,), or text (B, T, Ct) and its mask (B, T) -> tokens (B, N). Options are those of LlamaGen.generate,
    but there is one cfg and one generator for all pictures."""
    config = model.config
    weight = model.token_embed.weight
    B = len(cond)
    N = config.side ** 2
    length = math.ceil((config.slots + N) / 8) * 8                          # Ours: T + N
    cond = cond.to(weight.device)
    if cfg > 1:
        cond = torch.cat([cond, model.null_condition(cond)])
    R = len(cond)

    # Ours: the slots have a small mask, and the tokens after them none if the text is not padded.
    mask = weight.new_ones(R, length, length, dtype=torch.bool).tril()
    if text_mask is not None:
        mask[:, :, :config.slots] &= text_mask.to(weight.device).repeat(R // B, 1)[:, None]
        mask |= torch.eye(length, dtype=torch.bool, device=weight.device)
    kv_heads = config.kv_heads or config.heads      # if q has more, the original cannot draw
    caches = weight.new_zeros(config.depth, 2, R, kv_heads, length, config.width // config.heads)
    gates = [block.ffn.fc1.weight.chunk(2) for block in model.blocks]       # w1 and w3
    rope = llamagen.rope_table(config, weight.device)                       # (2, T + N, D / 2)
    pos = torch.arange(config.slots, device=weight.device)
    logits = llamagen_logits(model, model.embed_condition(cond), pos, rope, mask, caches, gates)
    tokens = []
    tables = []                                                             # Ours: probabilities are not kept
    for i in range(N):
        # Token i comes from decode step i - 1. All rows are computed to the end. Ours: one half after the interval.
        guided = cfg > 1 and (cfg_interval < 0 or i - 1 <= cfg_interval)
        logits = logits[B:] + (logits[:B] - logits[B:]) * cfg if guided else logits[:B]
        token, table = draw(logits / max(temperature, 1e-5), top_k, top_p, generator)
        tokens.append(token)
        tables.append(table)
        if i + 1 < N:
            x = model.token_embed(token.repeat(R // B))[:, None]            # (R, 1, C)
            pos = pos[-1:] + 1
            with sdpa_kernel(SDPBackend.MATH):                              # Ours: a kernel that does not store scores
                logits = llamagen_logits(model, x, pos, rope, mask, caches, gates)
    return torch.stack(tokens, 1)


def llamagen_logits(model, x, pos, rope, mask, caches, gates):
    """Inputs x (R, l, C) of positions pos (l,) -> logits (R, V) of the next one. It writes to the caches.

    rope: (2, T + N, D / 2); mask: (R, length, length) bool, which positions see which; caches: (depth, 2, R, Hkv,
    length, D), keys and values; gates: w1 and w3 of every block
    """
    H = model.config.heads
    cos, sin = rope[:, pos, None]                                           # (l, 1, D / 2)
    mask = mask[:, None, pos]                                               # (R, 1, l, length)
    for block, (keys, values), (w1, w3) in zip(model.blocks, caches, gates):
        heads = [H, keys.shape[1], keys.shape[1]]
        qkv = F.linear(rms_norm(x, block.norm1), block.attn.qkv.weight)
        q, k, v = qkv.unflatten(-1, (sum(heads), -1)).split(heads, 2)       # (R, l, H or Hkv, D)
        q = rotated(q, cos, sin).transpose(1, 2)
        keys[:, :, pos] = rotated(k, cos, sin).transpose(1, 2)
        values[:, :, pos] = v.transpose(1, 2)
        # A head is repeated for all heads of q that share it. Even if there is only one, this copies the whole caches.
        # Attention then reads the copies whole. Ours: no copies, and attention reads the rows up to pos.
        repeats = H // keys.shape[1]
        k = keys.repeat_interleave(repeats, 1)
        v = values.repeat_interleave(repeats, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + F.linear(rearrange(out, "b h l d -> b l (h d)"), block.attn.proj.weight)
        h = rms_norm(x, block.norm2)
        h = F.silu(F.linear(h, w1)) * F.linear(h, w3)                       # Ours: one product for both
        x = x + F.linear(h, block.ffn.fc2.weight)
    logits = F.linear(rms_norm(x, model.norm), model.head.weight).float()   # (R, l, V). Ours: of one position only
    return logits[:, -1]


def rms_norm(x, norm):
    """RMSNorm of x (R, l, C), step by step in float32. Ours: one op, which also adds the last branch to x."""
    wide = x.float()
    return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + norm.eps)).type_as(x) * norm.weight
