"""VideoMAE v2, the video encoder that TREPA compares clips with (latentsync.trepa): network, loading, saving."""
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import vq
from latentsync import attend, frame_positions


@dataclass(frozen=True)
class VideoMAEConfig:
    """Sizes of a video encoder. Files determine all but heads, size and frames."""

    size: int = 224                             # pixels that clips are resized to
    patch: int = 14                             # side of a token in pixels
    frames: int = 16                            # frames of a clip
    tubelet: int = 2                            # frames that a token spans
    width: int = 1408
    depth: int = 40
    heads: int = 16
    hidden: int = 6144                          # width inside the feed-forward layers
    classes: int = 174                          # actions that its head tells apart, not used by TREPA; 0: no head


VIDEOMAES = {
    "vit_g": VideoMAEConfig(),                  # vit_g_hybrid_pt_1200e_ssv2_ft.pth
    "talking_head": VideoMAEConfig(64, 8, width=96, depth=4, heads=4, hidden=384, classes=0),       # trained in demo/
}


def resize_positions(positions, tokens, side):
    """Positions (1, L, C) for `tokens` tokens instead of L, with side * side tokens at each time.

    A clip that is longer or shorter than those of the training has its positions interpolated in time.
    """
    if tokens == positions.shape[1]:
        return positions
    table = rearrange(positions, "1 (l h w) c -> 1 c l h w", h=side, w=side)
    # Rounding down this length + 0.1 is safe from rounding errors but moves all positions a little. The authors' code
    # does the same, and their numbers depend on it.
    stretch = (tokens // side**2 + 0.1) / table.shape[2]
    table = F.interpolate(table, scale_factor=(stretch, 1, 1), mode="trilinear", align_corners=False)
    return rearrange(table, "1 c l h w -> 1 (l h w) c")


class Attention(nn.Module):
    """Multi-head self-attention of tokens (B, L, C); queries and values have a bias, keys none."""

    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(C))
        self.v_bias = nn.Parameter(torch.zeros(C))
        self.proj = nn.Linear(C, C)

    def forward(self, x):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        return self.proj(attend(q, k, v, self.heads))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, c):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.width, eps=1e-6)
        self.attn = Attention(c.width, c.heads)
        self.norm2 = nn.LayerNorm(c.width, eps=1e-6)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(c.width, c.hidden)
        self.mlp.fc2 = nn.Linear(c.hidden, c.width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class VideoMAE(nn.Module):
    """Video transformer (VideoMAE v2, arXiv 2303.16727), which describes what happens in a clip by one vector.

    Module names are the official ones.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.checkpointing = False                                          # recompute activations, see vq.recompute
        tokens = c.frames // c.tubelet * (c.size // c.patch) ** 2
        kernel = (c.tubelet, c.patch, c.patch)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv3d(3, c.width, kernel, kernel)
        self.register_buffer("positions", frame_positions(tokens, c.width), persistent=False)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.fc_norm = nn.LayerNorm(c.width, eps=1e-6)
        self.head = nn.Linear(c.width, c.classes) if c.classes else None    # in the file, not needed here

    def patches(self, clips):
        """Clips (B, 3, F, H, W) in [-1, 1] -> pixels of all tokens (B, L, 3 * tubelet * patch^2) in [0, 1].

        Frames that do not fill a token are left out at the end, as by the original's strided convolution.
        """
        c = self.config
        whole = clips[:, :, :clips.shape[2] // c.tubelet * c.tubelet]
        x = rearrange(whole, "b c f h w -> (b f) c h w")
        if x.shape[2:] != (c.size, c.size):
            x = F.interpolate(x, (c.size, c.size), mode="bicubic", align_corners=False)
        return rearrange((x / 2 + 0.5).clamp(0, 1), "(b l t) c (h p) (w q) -> b (l h w) (c t p q)", b=len(clips),
                         t=c.tubelet, p=c.patch, q=c.patch)

    def embed(self, patches):
        """`patches` -> (B, tokens, width), with their positions. The convolution does not overlap: it is a product."""
        proj = self.patch_embed.proj
        x = F.linear(patches.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)
        return x + resize_positions(self.positions, x.shape[1], self.config.size // self.config.patch)

    def encode(self, tokens):
        for block in self.blocks:
            tokens = vq.recompute(self.checkpointing, block, tokens)
        return tokens

    def features(self, clips):
        """(B, 3, F, H, W) in [-1, 1] -> (B, width): the mean of the last block's tokens, normalised."""
        return self.fc_norm(self.encode(self.embed(self.patches(clips))).mean(1))

    @torch.no_grad()
    def init_weights(self, generator=None):
        vq.init_default(self, generator)
        for block in self.blocks:
            block.attn.q_bias.zero_()
            block.attn.v_bias.zero_()


def infer_config(state, path):
    """The config of an official state dict, with the help of the entry of VIDEOMAES with the same width and depth."""
    width, _, tubelet, patch, _ = state["patch_embed.proj.weight"].shape
    depth = sum(k.endswith(".attn.q_bias") for k in state)
    for known in VIDEOMAES.values():
        if (known.width, known.depth) == (width, depth):
            return replace(known, patch=patch, tubelet=tubelet, hidden=len(state["blocks.0.mlp.fc1.weight"]),
                           classes=len(state.get("head.weight", ())))
    raise vq.CheckpointError(f"{path}: a VideoMAE of width {width} and depth {depth} with an unknown number of heads")


def load(path, config=None, dtype=torch.float32, device="cpu"):
    """The video encoder in eval mode, from a released file or one of ours. Raises vq.CheckpointError."""
    what = "a VideoMAE v2 (vit_g_hybrid_pt_1200e_ssv2_ft.pth, or one of train.py)"
    state, header = vq.read_checkpoint(path)
    vq.require(state, "patch_embed.proj.weight", "blocks.0.attn.q_bias", "blocks.0.mlp.fc1.weight", path=path,
               what=what)
    with vq.understanding(path, what):
        if config is None:
            config = vq.read_config(VideoMAEConfig, header, path, lambda: infer_config(state, path))
        vq.check_fit(vq.on_meta(VideoMAE, config), state, path)
        model = vq.build(VideoMAE, config)
        vq.load_strict(model, state, path)
    return model.eval().to(device, dtype)


def export(model):
    """The official state dict, in float32."""
    return {k: v.float().contiguous() for k, v in model.state_dict().items()}


def save(model, path, dtype=None, **extra):
    """Writes a VideoMAE as safetensors: official keys, config (and `extra`) in the header."""
    vq.save_checkpoint(path, export(model), model.config, dtype, **extra)
