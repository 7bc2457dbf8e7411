"""`sample.py llamagen --engine`: LlamaGen on the serving engine vLLM, in this process or on a server.

    python sample.py llamagen --engine vllm --classes 207 360       the engine runs in this process
    python -m lib.serving --ckpt c2i_L_384.pt --port 8000           vLLM's own server
    python sample.py llamagen --engine http://localhost:8000 --ckpt c2i_L_384.pt --classes 207 360

The engine draws tokens. Text features are computed before, and pictures are decoded afterwards, both by sample.py. All
pictures are requests of their own with their own guidance and seed, so they may come at any time and end in any order.
vLLM draws with its own random numbers: the same seed gives the same picture there, but another one than `LlamaGen.sample`.
"""
import argparse
import base64
import io
import json
import os
import sys
import tempfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

import vq
from lib.console import MissingPackage, UserError, check_ranges, choose_device, choose_dtype, run_command
from lib.text import load_llamagen
from lib.weights import find_checkpoint

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 192, 256)      # which vLLM's attention knows on CPUs and on GPUs
REPOSITORY = Path(__file__).resolve().parent.parent
TRIED = "0.32"                                          # version of vLLM


def write_folder(folder, checkpoint, config, dtype):
    """Write what vLLM wants to find beside weights: config.json, and an entry point that registers our model.

    The weights stay where they are.
    """
    D = config.width // config.heads
    filled = [size for size in HEAD_SIZES if size >= D]
    if not filled:
        raise UserError(f"--engine: heads of {D} numbers are more than vLLM's attention takes; draw without --engine")
    engine_config = {
        "architectures": ["EngineLlamaGen"], "model_type": "legible_llamagen", "torch_dtype": str(dtype).split(".")[1],
        "checkpoint": str(Path(checkpoint).resolve()), "sizes": asdict(config), "hidden_size": config.width,
        "intermediate_size": config.hidden, "num_hidden_layers": config.depth, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads, "head_dim": filled[0],
        "vocab_size": 2 * config.vocab_size,            # a model returns the logits of two streams
        "max_position_embeddings": config.slots + config.side ** 2, "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "mrope_section": [D // 2]},
    }
    (folder / "config.json").write_text(json.dumps(engine_config))
    plugin = folder / "legible_llamagen-1.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: legible-llamagen\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text("[vllm.general_plugins]\nllamagen = lib.vllm_llamagen:register\n")


def set_environment(folder, device):
    """Let vLLM's processes find our model, and suit it to a CPU."""
    paths = [str(folder), str(REPOSITORY)]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    if device.type == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")                # GB
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
