"""LatentSync's UNet and autoencoder with the arithmetic of the original code, to compare speeds with.

`sample.py latentsync --bench` times latentsync.py and vq.py against this file. The functions take our modules, and use
of them only the weights, the sizes and the layers that are torch's own. They find the same numbers as our code, except
for rounding. Where our code takes another way, a comment says which. Three differences are everywhere:

- Layout. The original's maps are contiguous: each channel is a picture of its own. Ours are channels_last: a pixel's
  channels stand together. GPUs convolve in that layout in half precision, and need not transpose ours. For attention,
  a map in that layout is a list of tokens already.
- Frames. The original's clips are (B, C, F, h, w). Each convolution wants (B F, C, h, w), and each norm wants the clip
  back, so F and C change places all the time, which copies. Ours stay (B F, C, h, w). In channels_last that memory is
  also a clip.
- Norm and SiLU. In the original each writes a tensor. Ours are one kernel on CUDA, and on a CPU SiLU overwrites what
  the norm has written.

This is written from a description of bytedance/LatentSync (arXiv 2412.09262), not from its code. Where the description
says too little, the faster way was taken. Attention, for instance, is PyTorch's fused one.

    twin = baseline_dubbing.contiguous(unet)
    noise = baseline_dubbing.unet_step(twin, z, condition, t, audio, cfg)

Letters as in latentsync.py: B clips, F frames, A audio features of a frame, C width, h w size of a map.
"""
import copy
import math

import torch
import torch.nn.functional as F
from einops import rearrange


def contiguous(model):
    """A copy of a UNet or an autoencoder with contiguous kernels of convolutions. It shares all other weights.

    The functions below take any model. But with ours, whose kernels are channels_last, torch would convolve in that
    layout, and so would all that follows.
    """
    shared = {id(p): p for p in model.parameters() if p.dim() != 4}
    return copy.deepcopy(model, shared).to(memory_format=torch.contiguous_format)


# ----------------------------------------------------------------------------------------------------------------------
# The UNet


@torch.no_grad()
def unet_step(unet, z, condition, t, audio, cfg):
    """What a step of `latentsync.denoise` with guidance predicts, (1, 4, F, h, w), float32.

    z: noisy latents (1, 4, F, h, w); condition: (1, 9, F, h, w), see `latentsync.encode_condition`; t: 0 .. 999;
    audio: (1, F, A, audio_width); cfg: guidance scale.
    """
    dtype = unet.conv_in.weight.dtype
    x = torch.cat([z, condition], 1).to(dtype)
    audio = audio.to(dtype)
    both = unet_forward(unet, torch.cat([x, x]), t, torch.cat([torch.zeros_like(audio), audio]))
    silent, spoken = both.float().chunk(2)
    return silent + cfg * (spoken - silent)


@torch.no_grad()
def unet_forward(unet, x, t, audio):
    """What `latentsync.UNet.forward` computes: (B, 4, F, h, w), from x (B, 13, F, h, w), one time step t for all of x,
    and audio (B, F, A, audio_width)."""
    time = time_embedding(unet.time_embedding, t, x).expand(len(x), -1)
    x = each_frame(unet.conv_in, x)
    skips = [x]
    for i, level in enumerate(unet.down_blocks):
        for j in range(len(level.resnets)):
            x = layer(level, j, x, time, audio)
            skips.append(x)
        if i < len(unet.downsample):
            x = each_frame(unet.downsample[i], x)
            skips.append(x)
    middle = unet.mid_block
    x = residual_block(middle.resnets[0], x, time)
    x = spatial_transformer(middle.attentions[0], x, audio)
    x = residual_block(middle.resnets[1], x, time)
    for i, level in enumerate(unet.up_blocks):
        for j in range(len(level.resnets)):
            x = layer(level, j, torch.cat([x, skips.pop()], 1), time, audio)
        if i < len(unet.upsample):
            x = upsample(unet.upsample[i], x, skips[-1].shape[3:])
    return each_frame(unet.conv_out, F.silu(unet.conv_norm_out(x)))


def time_embedding(embedding, t, like):
    """The time step t -> (1, 4 C), on the device and in the precision of `like`."""
    half = embedding.C // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=like.device) / half)
    angle = t * frequency[None]
    waves = torch.cat([angle.cos(), angle.sin()], 1).to(like.dtype)
    return embedding.linear_2(F.silu(embedding.linear_1(waves)))


def layer(level, j, x, time, audio):
    """Layer j of a level: x (B, C, F, h, w) -> the same size."""
    x = residual_block(level.resnets[j], x, time)
    if level.attentions:
        x = spatial_transformer(level.attentions[j], x, audio)
    if level.motion_modules:
        x = motion_module(level.motion_modules[j], x)
    return x


def each_frame(conv, x):
    """A convolution of each frame: x (B, C, F, h, w) -> (B, c_out, F, ...)."""
    frames = rearrange(x, "b c f h w -> (b f) c h w")                       # copies what a norm has written
    return rearrange(conv(frames), "(b f) c h w -> b c f h w", b=len(x))    # a view, which the next norm copies


def residual_block(block, x, time):
    """x (B, c_in, F, h, w), time (B, c_time) -> (B, c_out, F, h, w). Norms take their statistics over whole clips."""
    h = each_frame(block.conv1, F.silu(block.norm1(x)))
    h = h + block.time_emb_proj(F.silu(time))[:, :, None, None, None]       # ours adds in place
    h = each_frame(block.conv2, F.silu(block.norm2(h)))
    if block.conv_shortcut is not None:
        x = each_frame(block.conv_shortcut, x)
    return x + h                                                            # ours adds in place


def spatial_transformer(block, x, audio):
    """x (B, C, F, h, w), audio (B, F, A, c_audio) -> (B, C, F, h, w). GroupNorm takes its statistics per frame."""
    audio = rearrange(audio, "b f n c -> (b f) n c")
    frames = rearrange(x, "b c f h w -> (b f) c h w")
    h = block.proj_in(block.norm(frames))
    tokens = rearrange(h, "n c h w -> n (h w) c")           # a view, which norm1 copies. Ours is a list of tokens as is
    tokens = tokens + self_attention(block.attn1, block.norm1(tokens))
    tokens = tokens + audio_attention(block.attn2, block.norm2(tokens), audio)
    tokens = tokens + feed_forward(block.ff, block.norm3(tokens))
    h = rearrange(tokens, "n (h w) c -> n c h w", h=x.shape[3]).contiguous()        # a copy. Ours needs none
    return rearrange(frames + block.proj_out(h), "(b f) c h w -> b c f h w", b=len(x))


def motion_module(module, x):
    """x (B, C, F, h, w) -> the same size. GroupNorm takes its statistics per frame."""
    frames = rearrange(x, "b c f h w -> (b f) c h w")
    h = module.norm(frames)
    tokens = module.proj_in(rearrange(h, "(b f) c h w -> (b h w) f c", b=len(x)))       # a copy, in ours as well
    for norm, attention in zip(module.norms, module.attention):
        positions = attention.positions[:, :tokens.shape[1]]
        tokens = tokens + self_attention(attention.attn, norm(tokens) + positions)
    tokens = tokens + feed_forward(module.ff, module.ff_norm(tokens))
    h = rearrange(module.proj_out(tokens), "(b h w) f c -> b c f h w", b=len(x), h=x.shape[3])
    return x + h


def self_attention(attention, x):
    """Attention of tokens x (N, L, C) to each other."""
    q, k, v = (F.linear(x, weight) for weight in attention.qkv.weight.chunk(3))     # three products. Ours is one
    return attention.proj(attend(q, k, v, attention.heads))


def audio_attention(attention, x, audio):
    """Attention of tokens x (N, L, C) to audio (N, A, c_audio).

    The audio is the same in all steps, but its keys and values are computed again in each. Ours does so too.
    """
    k, v = (F.linear(audio, weight) for weight in attention.key_value.weight.chunk(2))      # two products. Ours is one
    return attention.proj(attend(attention.query(x), k, v, attention.heads))


def attend(q, k, v, heads):
    """Attention of queries (N, L, C) to keys and values (N, M, C) -> (N, L, C)."""
    q, k, v = (rearrange(x, "n l (h d) -> n h l d", h=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "n h l d -> n l (h d)")


def feed_forward(ff, x):
    """GEGLU of tokens (N, L, C), in separate steps. Ours takes the same."""
    value, gate = ff.value_gate(x).chunk(2, -1)
    return ff.out(value * F.gelu(gate))


def upsample(module, x, size):
    """x (B, C, F, h, w) -> (B, C, F, *size): nearest neighbour on the whole clip, then a convolution of each frame."""
    return each_frame(module.conv, F.interpolate(x, (x.shape[2], *size), mode="nearest"))


# ----------------------------------------------------------------------------------------------------------------------
# The autoencoder. It has no clips: frames are N pictures


@torch.no_grad()
def vae_encode(autoencoder, pictures):
    """Pictures (N, 3, H, W) in [-1, 1] -> mean and standard deviation of their latents, both (N, 4, h, w), unscaled.

    Ours takes more time for norms here, on a CPU: torch's own would be inexact for channels_last maps that are constant
    in part (`exact` in triton_ops.py). Contiguous maps have no such problem.
    """
    encoder = autoencoder.encoder
    x = encoder.conv_in(pictures.to(encoder.conv_in.weight.dtype))
    for level in encoder.down:
        for block in level.block:
            x = picture_block(block, x)
        if level.downsample is not None:
            x = level.downsample.conv(F.pad(x, (0, 1, 0, 1)))
    x = middle_blocks(encoder.mid, x)
    x = encoder.conv_out(F.silu(encoder.norm_out(x)))
    mean, log_variance = autoencoder.quant_conv(x).chunk(2, 1)
    return mean, (0.5 * log_variance.clamp(-30, 20)).exp()


@torch.no_grad()
def vae_decode(autoencoder, z):
    """Scaled latents (N, 4, h, w) -> pictures (N, 3, H, W), float32, not clamped."""
    decoder = autoencoder.decoder
    z = (z / autoencoder.config.scaling).to(decoder.conv_in.weight.dtype)
    x = middle_blocks(decoder.mid, decoder.conv_in(autoencoder.post_quant_conv(z)))
    for level in reversed(decoder.up):
        for block in level.block:
            x = picture_block(block, x)
        if level.upsample is not None:
            x = level.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    return decoder.conv_out(F.silu(decoder.norm_out(x))).float()


def middle_blocks(middle, x):
    """The lowest resolution, x (N, C, h, w) -> the same size."""
    return picture_block(middle.block_2, picture_attention(middle.attn_1, picture_block(middle.block_1, x)))


def picture_block(block, x):
    """A residual block: x (N, c_in, h, w) -> (N, c_out, h, w)."""
    h = block.conv1(F.silu(block.norm1(x)))
    h = block.conv2(F.silu(block.norm2(h)))
    if block.nin_shortcut is not None:
        x = block.nin_shortcut(x)
    return x + h                                                            # ours adds in place


def picture_attention(attention, x):
    """Self-attention with one head over the pixels of a map: x (N, C, h, w) -> the same size."""
    tokens = rearrange(attention.norm(x), "n c h w -> n (h w) c")
    weights = attention.qkv.weight.flatten(1).chunk(3)
    biases = attention.qkv.bias.chunk(3)
    q, k, v = (F.linear(tokens, w, b) for w, b in zip(weights, biases))     # three products. Ours is one
    out = F.linear(attend(q, k, v, 1), attention.proj_out.weight.flatten(1), attention.proj_out.bias)
    return x + rearrange(out, "n (h w) c -> n c h w", h=x.shape[2])
