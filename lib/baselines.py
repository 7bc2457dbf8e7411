"""VAR, LlamaGen and Infinity with the arithmetic of the original code, to compare speeds with.

`sample.py MODEL --bench` times the models against this file. The functions take our models, and use of them only the
weights, the sizes and small tables. With the same generator they draw the same tokens. Comments say what our code does
instead. Written from descriptions of the original repositories, not from their code.

    images = baselines.var_images(model, tokenizer, torch.tensor([207]), cfg=4, top_k=900, top_p=0.95, generator=g)

`generator` is one torch.Generator for the whole batch, which torch.multinomial consumes as in the originals. Letters as
in the model files: B pictures, R rows (2B with guidance), l tokens of a call, C width, H heads, D head dim, V codes.
"""
import copy
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.nn.attention import SDPBackend, sdpa_kernel

import infinity
import llamagen
import vq

# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer's decoder


def contiguous(tokenizer):
    """A copy of a tokenizer with contiguous kernels of convolutions, as in the originals. Ours are channels_last."""
    shared = {id(p): p for p in tokenizer.parameters() if p.dim() != 4}
    return copy.deepcopy(tokenizer, shared).to(memory_format=torch.contiguous_format)


@torch.no_grad()
def decode(tokenizer, f_hat):
    """Features (B, Cv, h, w) -> pictures (B, 3, H, W) in [-1, 1]. tokenizer: from `contiguous`."""
    decoder = tokenizer.decoder
    x = decoder.conv_in(tokenizer.post_quant_conv(f_hat.to(decoder.conv_in.weight.dtype)))
    x = residual_block(decoder.mid.block_1, x)
    if decoder.mid.attn_1 is not None:
        x = pixel_attention(decoder.mid.attn_1, x)
    x = residual_block(decoder.mid.block_2, x)
    for level in reversed(decoder.up):
        for j, block in enumerate(level.block):
            x = residual_block(block, x)
            if level.attn:
                x = pixel_attention(level.attn[j], x)
        if level.upsample is not None:
            x = level.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    return decoder.conv_out(swish(group_norm(decoder.norm_out, x))).float().clamp(-1, 1)


def group_norm(norm, x):
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def swish(x):
    """x sigmoid(x) in two steps, which write two tensors. Ours overwrites x."""
    return x * torch.sigmoid(x)


def residual_block(block, x):
    """x (B, c_in, h, w) -> (B, c_out, h, w)."""
    h = block.conv1(swish(group_norm(block.norm1, x)))
    h = block.conv2(swish(group_norm(block.norm2, h)))
    if block.nin_shortcut is not None:
        x = block.nin_shortcut(x)
    return x + h                                                            # ours adds in place


def pixel_attention(block, x):
    """Attention with one head of x (B, C, h, w), with the table of all scores in memory. Ours is one fused call."""
    q, k, v = block.qkv(group_norm(block.norm, x)).flatten(2).chunk(3, 1)   # (B, C, h w)
    scores = torch.bmm(q.transpose(1, 2), k) * x.shape[1] ** -0.5           # (B, h w, h w)
    out = torch.bmm(v, scores.softmax(-1).transpose(1, 2))
    return x + block.proj_out(out.view_as(x))


# ----------------------------------------------------------------------------------------------------------------------
# LlamaGen


def rms_norm(norm, x):
    wide = x.float()
    wide = wide * torch.rsqrt(torch.mean(wide * wide, -1, keepdim=True) + norm.eps)
    return wide.type_as(x) * norm.weight


def rotated(x, cos, sin):
    """Rotate the pairs of x (R, l, H, D); cos, sin: (l, D / 2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos = cos[:, None]
    sin = sin[:, None]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(3).type_as(x)


class LlamaLoop:
    """LlamaGen's transformer with a cache of fixed length, of which every call reads everything under a mask."""

    def __init__(self, model, rows, text_mask):
        c = model.config
        device = model.token_embed.weight.device
        dtype = model.token_embed.weight.dtype
        length = -(-(c.slots + c.side ** 2) // 8) * 8
        shape = (rows, c.kv_heads or c.heads, length, c.width // c.heads)
        self.model = model
        self.caches = [[torch.zeros(shape, dtype=dtype, device=device) for _ in "kv"] for _ in model.blocks]
        self.rope = llamagen.rope_table(c, device)
        self.mask = torch.ones(length, length, dtype=torch.bool, device=device).tril().repeat(rows, 1, 1)
        if text_mask is not None:
            self.mask[:, :, :c.slots] &= text_mask[:, None]
            self.mask |= torch.eye(length, dtype=torch.bool, device=device)     # a padded slot sees itself
        # Ours multiplies with w1 and w3 at once.
        self.feed_forwards = [(*b.ffn.fc1.weight.chunk(2), b.ffn.fc2.weight) for b in model.blocks]

    def __call__(self, x, pos):
        """x (R, l, C) of the positions pos (l,) -> logits of the last one (R, V), float32."""
        model = self.model
        mask = self.mask[:, None, pos]                                      # (R, 1, l, length)
        cos, sin = self.rope[:, pos]
        for block, cache, (w1, w3, w2) in zip(model.blocks, self.caches, self.feed_forwards):
            x = x + self.attention(block.attn, rms_norm(block.norm1, x), cos, sin, mask, cache, pos)
            h = rms_norm(block.norm2, x)
            x = x + F.linear(F.silu(F.linear(h, w1)) * F.linear(h, w3), w2)
        return F.linear(rms_norm(model.norm, x), model.head.weight)[:, -1].float()

    def attention(self, attn, x, cos, sin, mask, cache, pos):
        kv_heads = attn.kv_heads
        qkv = F.linear(x, attn.qkv.weight).unflatten(-1, (attn.heads + 2 * kv_heads, -1))
        q, k, v = qkv.split([attn.heads, kv_heads, kv_heads], 2)            # (R, l, heads, D)
        q = rotated(q, cos, sin).transpose(1, 2)
        k = rotated(k, cos, sin).transpose(1, 2)
        cache[0][:, :, pos] = k
        cache[1][:, :, pos] = v.transpose(1, 2)
        # Copies both caches, even if each key head serves one query head. Ours attends to the cache as it is.
        keys, values = (t.repeat_interleave(attn.heads // kv_heads, 1) for t in cache)
        with sdpa_kernel(SDPBackend.MATH):                                  # ours reads the filled rows only
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return F.linear(out.transpose(1, 2).flatten(2), attn.proj.weight)


@torch.no_grad()
def llamagen_tokens(model, cond, text_mask=None, *, cfg, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0,
                    generator=None):
    """The tokens (B, N) that `LlamaGen.generate` draws. cfg: one number for all pictures."""
    device = model.token_embed.weight.device
    cond = cond.to(device)
    text_mask = None if text_mask is None else text_mask.to(device)
    B = len(cond)
    T = model.config.slots
    guided = cfg > 1
    if guided:
        cond = torch.cat([cond, model.null_condition(cond)])
        text_mask = None if text_mask is None else text_mask.repeat(2, 1)
    transformer = LlamaLoop(model, len(cond), text_mask)
    logits = transformer(model.embed_condition(cond), torch.arange(T, device=device))
    tokens = []
    tables = []                                                             # the probabilities of all tokens are kept
    for i in range(model.config.side ** 2):
        if i > 0:
            x = model.token_embed(tokens[-1])
            x = torch.cat([x, x]) if guided else x                          # also where guidance has ended
            logits = transformer(x, torch.tensor([T + i - 1], device=device))
        if guided:
            c, u = logits.chunk(2)
            logits = u + (c - u) * cfg if cfg_interval < 0 or i - 1 <= cfg_interval else c
        if temperature == 0:
            tokens.append(logits.argmax(-1, keepdim=True))
            continue
        p = descending_filter(logits / max(temperature, 1e-5), top_k, top_p).softmax(-1)
        tables.append(p)
        tokens.append(torch.multinomial(p, 1, generator=generator))
    return torch.cat(tokens, 1).view(B, -1)


def descending_filter(logits, top_k, top_p):
    """Logits (B, V) after top-k, then top-p of what is left. Each sorts; ours finds a threshold or sorts k numbers."""
    if top_k > 0:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        drop = ordered.softmax(-1).cumsum(-1) > top_p
        drop = F.pad(drop[..., :-1], (1, 0))                                # the first one above top_p stays
        logits = logits.masked_fill(drop.scatter(-1, index, drop), -math.inf)
    return logits


@torch.no_grad()
def llamagen_images(model, tokenizer, cond, text_mask=None, **options):
    """The pictures (B, 3, h, w) in [0, 1] that `LlamaGen.sample` draws. tokenizer: from `contiguous`."""
    tokens = llamagen_tokens(model, cond, text_mask, **options)
    G = model.config.side
    codebook = F.normalize(tokenizer.quantize.codebook, dim=-1)
    f_hat = rearrange(codebook[tokens], "b (h w) c -> b c h w", h=G)
    return decode(tokenizer, f_hat).add(1).mul(0.5)


# ----------------------------------------------------------------------------------------------------------------------
# VAR


@torch.no_grad()
def var_images(model, tokenizer, labels, *, cfg, top_k=0, top_p=0.0, generator=None):
    """The pictures (B, 3, h, w) in [0, 1] that `VAR.sample` draws. tokenizer: from `contiguous`."""
    config = model.config
    B = len(labels)
    labels = labels.to(model.pos_embed.device)
    cond = model.class_embed(torch.cat([labels, torch.full_like(labels, config.num_classes)]))
    positions = model.level_embed(model.level) + model.pos_embed            # (1, L, C)
    caches = [{} for _ in model.blocks]
    quantizer = tokenizer.quantize
    side = config.patch_nums[-1]
    last = len(config.patch_nums) - 1
    f_hat = cond.new_zeros(B, config.z_channels, side, side)
    x = cond[:, None] + model.pos_start + positions[:, :1]
    pos = 0
    for k, p in enumerate(config.patch_nums):
        pos += p * p
        shared = None
        if config.shared_adaln:
            shared = model.shared_adaln(F.silu(cond)).view(-1, 1, 6, config.width)
        for block, cache in zip(model.blocks, caches):
            x = var_block(block, x, cond, shared, cache)
        scale, shift = model.head_adaln(F.silu(cond)).view(-1, 1, 2, config.width).unbind(2)
        x = F.layer_norm(x, (config.width,), eps=config.norm_eps).mul(scale.add(1)).add(shift)
        logits = model.head(x).float()
        t = cfg * k / max(last, 1)
        logits = (1 + t) * logits[:B] - t * logits[B:]                      # (B, l, V)
        p_of_tokens = ascending_filter(logits, top_k, top_p).softmax(-1)
        tokens = torch.multinomial(p_of_tokens.flatten(0, 1), 1, True, generator=generator).view(B, -1)
        h = rearrange(quantizer.codebook[tokens], "b (h w) c -> b c h w", h=p)
        if k < last:
            h = F.interpolate(h, (side, side), mode="bicubic")
        phi = quantizer.phi[vq.phi_index(k, last + 1, len(quantizer.phi))]
        ratio = quantizer.config.phi_ratio
        f_hat = f_hat.add(h.mul(1 - ratio) + phi(h).mul(ratio))
        if k < last:
            after = config.patch_nums[k + 1]
            small = F.interpolate(f_hat, (after, after), mode="area").flatten(2).transpose(1, 2)
            x = model.word_embed(small) + positions[:, pos:pos + after ** 2]
            x = x.repeat(2, 1, 1)
    return decode(tokenizer, f_hat).add(1).mul(0.5)


def var_block(block, x, cond, shared, cache):
    """A block of VAR, x (R, l, C) -> the same size. cache: {"k", "v"}, of the scales before.

    The modulation depends on the class only, but is computed at every scale. Ours computes it once per picture.
    """
    C = x.shape[-1]
    if shared is None:
        modulation = block.adaln(F.silu(cond)).view(-1, 1, 6, C)
    else:
        modulation = block.adaln_table + shared
    gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
    h = F.layer_norm(x, (C,), eps=block.eps).mul(scale1.add(1)).add_(shift1)
    x = x + cosine_attention(block.attn, h, cache, softmax_scale=block.attn.softmax_scale).mul_(gate1)
    h = F.layer_norm(x, (C,), eps=block.eps).mul(scale2.add(1)).add_(shift2)
    return x + block.ffn.fc2(F.gelu(block.ffn.fc1(h), approximate="tanh")).mul_(gate2)


def cosine_attention(attn, x, cache, rope=None, softmax_scale=1.0):
    """Self-attention of VAR and Infinity: x (R, l, C) -> the same size. rope: cos and sin (l, D / 2), or None."""
    bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    qkv = F.linear(x, attn.qkv.weight, bias).unflatten(-1, (3, attn.heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)                          # (R, H, l, D)
    if getattr(attn, "l2_norm", True):
        q = F.normalize(q, dim=-1) * attn.log_scale.clamp_max(math.log(100)).exp()
        k = F.normalize(k, dim=-1)
    if rope is not None:
        q, k = (rotated(t.transpose(1, 2), *rope).transpose(1, 2) for t in (q, k))
    if cache:                               # copies all keys and values so far. Ours writes behind them
        k = torch.cat([cache["k"], k], 2)
        v = torch.cat([cache["v"], v], 2)
    cache["k"] = k
    cache["v"] = v
    out = F.scaled_dot_product_attention(q, k, v, scale=softmax_scale)
    return attn.proj(out.transpose(1, 2).flatten(2))


def ascending_filter(logits, top_k, top_p):
    """Logits (..., V) after top-k, then top-p of what is left, by a second sort."""
    if top_k > 0:
        least = logits.topk(min(top_k, logits.shape[-1])).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p > 0:
        ordered, index = logits.sort()
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1:] = False
        logits = logits.masked_fill(drop.scatter(-1, index, drop), -math.inf)
    return logits


# ----------------------------------------------------------------------------------------------------------------------
# Infinity


@torch.no_grad()
def infinity_images(model, tokenizer, text, text_mask, scales, *, cfg, tau, top_k=0, top_p=0.0, generator=None):
    """The pictures (B, 3, h, w) in [0, 1] that `Infinity.sample` draws. tokenizer: from `contiguous`."""
    config = model.config
    device = model.pos_start.device
    B = len(text)
    K = len(scales)
    cfg = infinity.per_scale(cfg, K, "cfg")
    tau = infinity.per_scale(tau, K, "tau")
    sizes = infinity.tokenizer_scales(scales, config.patchify)
    text = text.to(device)
    text_mask = None if text_mask is None else text_mask.to(device)
    copies = 2 if any(c != 1 for c in cfg) else 1
    if copies == 2:
        text, text_mask = model.with_unconditional(text, text_mask, None)
    cond, memory, text_mask = model.read_text(text, text_mask)
    shared = model.shared_adaln(F.silu(cond)).view(-1, 1, 6, config.width)
    rope = model.rope(scales)
    caches = [{} for _ in model.blocks]
    x = cond[:, None] + model.pos_start
    f_hat = cond.new_zeros(B, tokenizer.config.z_channels, *sizes[-1])
    pos = 0
    for k, (h, w) in enumerate(scales):
        x = x + model.level_embed.weight[k]
        for block, cache in zip(model.blocks, caches):
            x = infinity_block(block, x, shared, memory, text_mask, rope[:, pos:pos + h * w], cache)
        pos += h * w
        scale, shift = model.head_adaln(F.silu(cond)).view(-1, 1, 2, config.width).unbind(2)
        x = F.layer_norm(x, (config.width,), eps=config.norm_eps).mul(scale.add(1)).add(shift)
        logits = model.head(x).float().mul(1 / tau[k])                      # both halves. Ours may need one only
        if copies == 2:
            logits = cfg[k] * logits[:B] + (1 - cfg[k]) * logits[B:] if cfg[k] != 1 else logits[:B]
        # A sort and a draw over tables of two columns. Ours needs a sigmoid and a comparison per bit.
        p = ascending_filter(logits.view(-1, 2), top_k, top_p).softmax(-1)
        bits = torch.multinomial(p, 1, True, generator=generator).view(B, h * w, config.bits).bool()
        if config.patchify:
            bits = infinity.unfold(bits, (h, w))
        codes = tokenizer.quantize.embed(bits, sizes[k])
        f_hat = f_hat + F.interpolate(codes, sizes[-1], mode="bilinear")
        if k + 1 < K:
            small = F.interpolate(f_hat, sizes[k + 1], mode="bilinear").flatten(2).transpose(1, 2)
            if config.patchify:
                small = infinity.fold(small, scales[k + 1])
            x = model.word_embed(small).repeat(copies, 1, 1)
    return decode(tokenizer, f_hat).add(1).mul(0.5)


def infinity_block(block, x, shared, memory, text_mask, rope, cache):
    """A block of Infinity, x (R, l, C) -> the same size. memory: (R, T, C)."""
    C = x.shape[-1]
    gate1, gate2, scale1, scale2, shift1, shift2 = (block.adaln_table + shared).unbind(2)
    h = F.layer_norm(x, (C,), eps=block.eps).mul(scale1.add(1)).add_(shift1)
    x = x + cosine_attention(block.attn, h, cache, rope).mul_(gate1)
    cross = block.cross
    q = cross.q(block.cross_norm(x)).unflatten(-1, (cross.heads, -1)).transpose(1, 2)
    k, v = cross.keys_values(memory)        # of the text, at every scale. Ours computes them once per picture
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=text_mask)
    x = x + cross.proj(out.transpose(1, 2).flatten(2))
    h = F.layer_norm(x, (C,), eps=block.eps).mul(scale2.add(1)).add_(shift2)
    return x + block.ffn.fc2(F.gelu(block.ffn.fc1(h), approximate="tanh")).mul_(gate2)
