"""LlamaGen as a model of the serving engine vLLM: what runs inside of the engine. `lib/serving.py` drives it.

The engine brings continuous batching, a paged cache, tensor parallelism and an HTTP server. This file brings guidance
and the condition slots. Only processes that have vLLM import it.

- **Guidance.** Every request carries two streams of hidden states, conditional (c) and unconditional (u), through the
  same weights. Each block therefore has two attention layers with a KV cache each. Both streams are always computed in
  one product, so no two requests have to be kept in step, and each has its own guidance. The model returns the logits
  of both side by side, 2 V numbers, and `Guidance` mixes them. `cfg` and `cfg_interval` are extra arguments of a
  request.
- **Ids.** 0 .. V - 1 are picture tokens. vLLM is told of 2 V ids, because there are 2 V logits. The upper ones are
  never drawn, and prompts use them: V + c is class c, and whatever is above the last class is the null class. The
  prompt of a text model is not ids but embeddings (n, C), from `LlamaGen.embed_condition`.
- **Positions.** The prompt ends at slot T - 1, whatever its length, so that the padding on its left is simply absent.
  vLLM lets models with M-RoPE number the tokens of a request, and that is the use made of it here.
- **Heads.** Where D is no size that attention kernels know (100 in the 3B), heads are filled up with zeros.

Tried with vLLM 0.32 on a CPU.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import AutoConfig, PretrainedConfig
from vllm import ModelRegistry
from vllm.compilation.decorators import support_torch_compile
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor as GatherLogits
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

import llamagen
from triton_ops import rotate_pairs

NAME = "legible_llamagen"                       # model_type in config.json, and --load-format, as in lib/serving.py


class EngineConfig(PretrainedConfig):
    """config.json of a folder that `lib/serving.py` writes. `checkpoint` is the path of the LlamaGen file."""

    model_type = NAME


class EngineAttention(nn.Module):
    """Attention of both streams: one product for q, k, v, then two attention layers with a cache each."""

    def __init__(self, config, vllm_config, prefix):
        super().__init__()
        shards = get_tensor_model_parallel_world_size()
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads
        D = config.head_dim                     # with the filling
        self.D = D
        self.rotated = config.hidden_size // heads                          # D of the model
        self.heads = heads // shards
        self.kv_heads = max(1, kv_heads // shards)
        self.qkv = QKVParallelLinear(config.hidden_size, D, heads, kv_heads, bias=False, prefix=f"{prefix}.qkv")
        self.proj = RowParallelLinear(heads * D, config.hidden_size, bias=False, prefix=f"{prefix}.proj")
        options = dict(num_kv_heads=self.kv_heads, cache_config=vllm_config.cache_config)
        scale = self.rotated ** -0.5
        self.conditional = Attention(self.heads, D, scale, prefix=f"{prefix}.conditional", **options)
        self.unconditional = Attention(self.heads, D, scale, prefix=f"{prefix}.unconditional", **options)

    def forward(self, x, rope):
        """x (2 n, C), c then u, of n tokens -> (2 n, C). rope: cos and sin (2, 2 n, D / 2)."""
        qkv, _ = self.qkv(x)
        q, k, v = qkv.split([self.heads * self.D, self.kv_heads * self.D, self.kv_heads * self.D], -1)
        q = self.rotate(q, rope)
        k = self.rotate(k, rope)
        n = len(x) // 2
        out = torch.cat([self.conditional(q[:n], k[:n], v[:n]), self.unconditional(q[n:], k[n:], v[n:])])
        return self.proj(out)[0]

    def rotate(self, x, rope):
        """q or k (2 n, H D), its heads rotated in float32."""
        heads = x.unflatten(-1, (-1, self.D))                               # (2 n, H, D)
        turned = rotate_pairs(heads[None, ..., :self.rotated].float(), *rope)[0].to(x.dtype)
        return F.pad(turned, (0, self.D - self.rotated)).flatten(1)


class EngineBlock(nn.Module):
    """One block of LlamaGen on both streams. As in llamagen.py it leaves its second sum to the next norm."""

    def __init__(self, config, vllm_config, prefix):
        super().__init__()
        C = config.hidden_size
        self.attn = EngineAttention(config, vllm_config, f"{prefix}.attn")
        self.fc1 = MergedColumnParallelLinear(C, [config.intermediate_size] * 2, bias=False, prefix=f"{prefix}.fc1")
        self.fc2 = RowParallelLinear(config.intermediate_size, C, bias=False, prefix=f"{prefix}.fc2")
        self.swiglu = SiluAndMul()
        self.norm1 = RMSNorm(C, config.rms_norm_eps)
        self.norm2 = RMSNorm(C, config.rms_norm_eps)

    def forward(self, x, branch, rope):
        """Residual stream x and branch, both (2 n, C) -> the same. The branch is None for the first block."""
        h, x = add_and_norm(x, branch, self.norm1)
        h, x = add_and_norm(x, self.attn(h, rope), self.norm2)
        return x, self.fc2(self.swiglu(self.fc1(h)[0]))[0]


def add_and_norm(x, branch, norm):
    """Residual stream x, branch or None (2 n, C) -> norm(x + branch), x + branch."""
    if branch is None:
        return norm(x), x
    return norm(branch, x)


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "inputs_embeds": 0})
class EngineLlamaGen(nn.Module, SupportsMRoPE):
    """The transformer, with the interface that vLLM expects of a model."""

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        sizes = llamagen.Config(**config.sizes)
        C = sizes.width
        V = sizes.vocab_size
        self.sizes = sizes
        self.T = sizes.slots
        rows = V if sizes.text_width else V + sizes.num_classes + 1
        self.last_id = rows - 1
        self.embed = VocabParallelEmbedding(rows, C)
        self.null_slots = nn.Parameter(torch.empty(self.T, C), requires_grad=False)     # embedded null condition
        self.register_buffer("rope", llamagen.rope_table(sizes).float(), persistent=False)      # (2, L, D / 2)
        self.blocks = nn.ModuleList(
            EngineBlock(config, vllm_config, f"{prefix}.blocks.{i}".lstrip(".")) for i in range(sizes.depth))
        self.norm = RMSNorm(C, sizes.norm_eps)
        self.head = ParallelLMHead(V, C, bias=False)
        self.gather = GatherLogits(V)

    def embed_input_ids(self, input_ids):
        """Ids (n,) -> (n, C)."""
        return self.embed(input_ids.clamp(max=self.last_id))

    def get_mrope_input_positions(self, input_tokens, mm_features):
        """Positions (3, n) of a prompt, and what is to be added to the number of a later token.

        All three rows are the same. A class is slot 0, and known tokens of a picture may follow it. A text ends at
        slot T - 1; one that is longer begins at slot 0, and its end is taken for tokens.
        """
        start = max(0, self.T - len(input_tokens)) if self.sizes.text_width else 0
        positions = torch.arange(start, start + len(input_tokens)).expand(3, -1)
        return positions, start

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        """Ids (n,) or embeddings (n, C), positions (3, n) -> hidden states of both streams, (n, 2 C)."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        position = positions[0]
        is_slot = (position < self.T)[:, None]
        unconditional = torch.where(is_slot, self.null_slots[position.clamp(max=self.T - 1)], inputs_embeds)
        rope = self.rope[:, position.repeat(2)]
        x = torch.cat([inputs_embeds, unconditional])                       # (2 n, C)
        branch = None
        for block in self.blocks:
            x, branch = block(x, branch, rope)
        h, _ = add_and_norm(x, branch, self.norm)
        return torch.cat(h.chunk(2), -1)

    def compute_logits(self, hidden_states):
        """Hidden states (n, 2 C) -> logits (n, 2 V): conditional, unconditional."""
        both = torch.cat(hidden_states.chunk(2, -1))
        logits = self.gather(self.head, both)
        return None if logits is None else torch.cat(logits.chunk(2), -1)

    @torch.no_grad()
    def load_from(self, source):
        """Copy the weights of a llamagen.LlamaGen; each process of tensor parallelism takes its part."""
        def put(parameter, weight, *shard):
            parameter.weight_loader(parameter, weight.to(parameter.dtype), *shard)
        tables = [source.token_embed.weight]
        if self.sizes.text_width:
            null = source.null_text[None]
        else:
            null = torch.tensor([self.sizes.num_classes])
            tables.append(source.class_embed.weight)
        put(self.embed.weight, torch.cat(tables))
        self.null_slots.copy_(source.embed_condition(null)[0])
        for ours, theirs in zip(self.blocks, source.blocks):
            heads = theirs.attn.heads
            kv_heads = theirs.attn.kv_heads
            q, k, v = pad_heads(theirs.attn.qkv.weight, ours.attn.D, heads + 2 * kv_heads).split(
                [ours.attn.D * n for n in (heads, kv_heads, kv_heads)])
            for shard, weight in (("q", q), ("k", k), ("v", v)):
                put(ours.attn.qkv.weight, weight, shard)
            put(ours.attn.proj.weight, pad_heads(theirs.attn.proj.weight.T, ours.attn.D, heads).T)
            for shard, weight in enumerate(theirs.ffn.fc1.weight.chunk(2)):
                put(ours.fc1.weight, weight, shard)
            put(ours.fc2.weight, theirs.ffn.fc2.weight)
            ours.norm1.weight.copy_(theirs.norm1.weight)
            ours.norm2.weight.copy_(theirs.norm2.weight)
        self.norm.weight.copy_(source.norm.weight)
        put(self.head.weight, source.head.weight)


def pad_heads(weight, D, heads):
    """A matrix with the rows of `heads` heads -> the same with D rows for each head. The added ones are zero."""
    rows = weight.unflatten(0, (heads, -1))
    return F.pad(rows, (0, 0, 0, D - rows.shape[1])).flatten(0, 1)


class Guidance(LogitsProcessor):
    """Mixes the logits of both streams, (B, 2 V): u + cfg (c - u) in the first V, -inf in the others.

    Extra arguments of a request: cfg, by default 1, which is no guidance; cfg_interval, see `LlamaGen.generate`.
    """

    def __init__(self, vllm_config, device, is_pin_memory):
        self.requests = {}                      # row of the batch -> cfg, cfg_interval, the list of tokens drawn so
                                                # far, to which vLLM appends

    @classmethod
    def validate_params(cls, sampling_params):
        """Raise ValueError for extra arguments that are no numbers."""
        extra = sampling_params.extra_args or {}
        for name in ("cfg", "cfg_interval"):
            if not isinstance(extra.get(name, 1), (int, float)):
                raise ValueError(f"{name} {extra[name]!r}: expected a number")

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        """Follow the requests as they come, go, and change their rows."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.requests.pop(row, None)
        for row, params, _, drawn in batch_update.added:
            extra = params.extra_args or {}
            self.requests[row] = (max(1.0, extra.get("cfg", 1.0)), extra.get("cfg_interval", -1), drawn)
        for a, b, direction in batch_update.moved:
            request = self.requests.pop(a, None)
            other = self.requests.pop(b, None)
            if request is not None:
                self.requests[b] = request
            if other is not None and direction == MoveDirectionality.SWAP:
                self.requests[a] = other

    def apply(self, logits):
        cfg = torch.ones(len(logits))
        for row, (scale, interval, drawn) in self.requests.items():
            if interval < 0 or len(drawn) < interval + 2:
                cfg[row] = scale
        conditional, unconditional = logits.chunk(2, -1)
        mixed = torch.lerp(unconditional, conditional, cfg.to(logits.device)[:, None])     # exactly c where cfg is 1
        return torch.cat([mixed, torch.full_like(mixed, float("-inf"))], -1)


class CheckpointLoader(BaseModelLoader):
    """Loads what llamagen.load reads: released files, and those of train.py."""

    def download_model(self, model_config):
        pass                                                                # `lib/serving.py` has found it

    def load_weights(self, model, model_config):
        config = model_config.hf_config
        model.load_from(llamagen.load(config.checkpoint, llamagen.Config(**config.sizes), dtype=model_config.dtype,
                                      weights=config.weights))


def register():
    """Make LlamaGen known to vLLM, which calls this in each of its processes (entry point vllm.general_plugins)."""
    AutoConfig.register(NAME, EngineConfig, exist_ok=True)
    ModelRegistry.register_model("EngineLlamaGen", EngineLlamaGen)
    register_model_loader(NAME)(CheckpointLoader)
