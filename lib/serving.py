"""`sample.py llamagen --engine`: LlamaGen on the serving engine vLLM, in this process or on a server.

    python sample.py llamagen --engine vllm --classes 207 360                       the engine runs in this process
    python -m lib.serving --ckpt c2i_L_384.pt --port 8000                           vLLM's own server
    python sample.py llamagen --engine http://localhost:8000 --ckpt c2i_L_384.pt --classes 207 360
    python -m lib.serving --ckpt c2i_L_384.pt --bench                               vLLM in turn with our own loop

The engine draws tokens. Before that sample.py turns texts into embeddings, and afterwards it decodes the tokens. Every
picture is a request of its own, with its own guidance and seed, so requests may arrive at any time. vLLM has its own
random numbers: a seed gives another picture than without --engine. `lib/vllm_llamagen.py` is the part that runs inside
of the engine.

Other clients send to /v1/completions what `Server.draw` sends: {"model": name of the file, "prompt": [V + class],
"max_tokens": N, "ignore_eos": true, "return_token_ids": true, "vllm_xargs": {"cfg": 4.0}} and vLLM's own settings, or
instead of "prompt" a text as "prompt_embeds", a tensor (n, C) of LlamaGen.embed_condition in base64.
"""
import argparse
import base64
import functools
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

import llamagen
from lib.bench import device_name, race
from lib.console import (MissingPackage, UserError, check_json, check_ranges, choose_device, choose_dtype, run_command,
                         save_json)
from lib.products import prepare
from lib.weights import find_checkpoint

REPOSITORY = Path(__file__).resolve().parent.parent
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 192, 256)       # that vLLM's attention kernels know, on CPUs and on GPUs
INSTALL = ("needs vLLM: pip install vllm, or without a GPU as lib/check_vllm.sh does; 0.32 was tried; it needs an "
           "environment of its own, because it wants another torch")
LONGEST_WAIT = 3600                                     # seconds for an answer of a server
GPU_SHARE = 0.7                                         # of the memory, for vLLM beside a tokenizer in one process
RACED = (1, 8, 32)                                      # numbers of pictures for which --bench measures

# ----------------------------------------------------------------------------------------------------------------------
# What vLLM has to be told


def write_folder(folder, checkpoint, config, dtype, weights=None):
    """Write what vLLM expects beside weights: config.json, and an entry point that registers our model.

    The weights stay where they are. weights: see vq.read_checkpoint. Raises UserError for heads that vLLM's attention
    does not take, and for more classes than tokens, see `lib/vllm_llamagen.py`.
    """
    D = config.width // config.heads
    sizes = [size for size in HEAD_SIZES if size >= D]
    if not sizes:
        raise UserError(f"--engine: heads of {D} numbers; vLLM's attention takes at most {HEAD_SIZES[-1]}")
    if config.num_classes >= config.vocab_size:
        raise UserError(f"--engine: {config.num_classes} classes; expected less than {config.vocab_size}, the tokens")
    description = {
        "architectures": ["EngineLlamaGen"], "model_type": "legible_llamagen", "dtype": str(dtype).split(".")[1],
        "checkpoint": str(Path(checkpoint).resolve()), "weights": weights, "sizes": asdict(config),
        "hidden_size": config.width, "intermediate_size": config.hidden, "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": sizes[0], "rms_norm_eps": config.norm_eps,
        "vocab_size": 2 * config.vocab_size,            # the logits of two streams; in prompts, tokens and classes
        "max_position_embeddings": config.slots + config.side**2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [D // 2]},
    }
    (folder / "config.json").write_text(json.dumps(description))
    plugin = folder / "legible_llamagen-1.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: legible-llamagen\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text("[vllm.general_plugins]\nllamagen = lib.vllm_llamagen:register\n")


def environment(folder, device):
    """The environment in which the processes of vLLM find our model, and, on a CPU, start at all.

    vLLM's second model runner has another interface for what `Guidance` does.
    """
    defaults = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    if device.type == "cpu":
        defaults |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}       # 1 GB
    paths = [str(folder), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return defaults | dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def engine_options(config, dtype, device):
    """Options of vLLM's LLM. With dashes instead of underscores they are those of `vllm serve`."""
    return {"load_format": "legible_llamagen", "skip_tokenizer_init": True,
            "enable_prompt_embeds": config.text_width > 0, "enable_prefix_caching": False,
            "logits_processors": ["lib.vllm_llamagen:Guidance"], "max_model_len": config.slots + config.side**2,
            "dtype": str(dtype).split(".")[1], "enforce_eager": device.type == "cpu"}


def sampling(config, temperature, top_k, top_p, seed):
    """Settings of a request, with the names that SamplingParams and the server share."""
    return {"temperature": temperature, "top_k": top_k, "top_p": top_p or 1.0, "seed": seed, "ignore_eos": True,
            "max_tokens": config.side**2}


# ----------------------------------------------------------------------------------------------------------------------
# Engines


class Engine:
    """vLLM in this process. Raises UserError if it cannot start."""

    def __init__(self, checkpoint, config, dtype, device, weights=None):
        self.config = config
        self.folder = tempfile.TemporaryDirectory()
        write_folder(Path(self.folder.name), checkpoint, config, dtype, weights)
        os.environ |= environment(self.folder.name, device)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if device.type == "cpu":
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        sys.path.insert(0, self.folder.name)            # where vLLM looks for entry points
        try:
            import vllm
        except ImportError:
            raise MissingPackage(f"--engine vllm: {INSTALL}") from None
        self.vllm = vllm
        self.dtype = dtype
        options = engine_options(config, dtype, device)
        if device.type == "cuda":
            options["gpu_memory_utilization"] = GPU_SHARE
        try:
            self.llm = vllm.LLM(self.folder.name, **options)
        except Exception as e:                          # of many kinds, from several libraries
            reason = (str(e) or type(e).__name__).splitlines()[0][:200]
            raise UserError(f"--engine vllm: does not start ({reason}); VLLM_LOGGING_LEVEL=INFO says more") from e

    def draw(self, prompts, cfgs, cfg_interval, seeds, **settings):
        """Prompts, ids or embeddings (n, C), to tokens, a list of N numbers for each.

        cfgs, seeds: one for each prompt. settings: temperature, top_k and top_p, as in `LlamaGen.generate`.
        """
        requests = []
        for prompt in prompts:
            is_text = isinstance(prompt, torch.Tensor)
            requests.append({"prompt_embeds": prompt.to(self.dtype)} if is_text else {"prompt_token_ids": [prompt]})
        params = []
        for cfg, seed in zip(cfgs, seeds):
            params.append(self.vllm.SamplingParams(**sampling(self.config, seed=seed, **settings), detokenize=False,
                                                   extra_args={"cfg": cfg, "cfg_interval": cfg_interval}))
        answers = self.llm.generate(requests, params, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]


class Server:
    """A server that `python -m lib.serving` has started."""

    def __init__(self, url, checkpoint, config):
        self.url = url.rstrip("/")
        self.config = config
        self.name = Path(checkpoint).name
        served = self.ask("/v1/models", lambda answer: {m["id"]: m["max_model_len"] for m in answer["data"]})
        if self.name not in served:
            raise UserError(f"--engine {url}: serves {', '.join(served)}, not {self.name}; give that as --ckpt")
        if served[self.name] != config.slots + config.side**2:
            raise UserError(f"--engine {url}: draws {served[self.name] - config.slots} tokens for a picture, but here "
                            f"it has {config.side**2}; start the server with another --side, or give another --size")

    def ask(self, path, read, question=None):
        """read(the JSON that the server answers). With a question, JSON too, it is posted. Raises UserError."""
        data = None if question is None else json.dumps(question).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=LONGEST_WAIT) as answer:
                return read(json.load(answer))
        except urllib.error.HTTPError as e:
            reason = e.read(500).decode(errors="replace")
            raise UserError(f"--engine {self.url}: refused, {e.code} {e.reason}: {reason}") from e
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as e:
            reason = getattr(e, "reason", None) or f"{type(e).__name__}: {e}"
            raise UserError(f"--engine {self.url}: no answer of vLLM's server ({reason}); python -m lib.serving starts "
                            "one") from e

    def draw(self, prompts, cfgs, cfg_interval, seeds, **settings):
        """As in Engine. All requests are sent at once."""
        def draw_one(prompt, cfg, seed):
            question = sampling(self.config, seed=seed, **settings) | {"model": self.name, "return_token_ids": True}
            question["vllm_xargs"] = {"cfg": cfg, "cfg_interval": cfg_interval}
            if isinstance(prompt, torch.Tensor):
                content = io.BytesIO()
                torch.save(prompt.contiguous(), content)
                question["prompt_embeds"] = base64.b64encode(content.getvalue()).decode()
            else:
                question["prompt"] = [prompt]
            return self.ask("/v1/completions", lambda answer: answer["choices"][0]["token_ids"], question)
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(draw_one, prompts, cfgs, seeds))


def open_engine(args, loaded, machine):
    """--engine -> an Engine or a Server. The model of a Loaded leaves the GPU, because from now on it only reads texts.

    Raises UserError.
    """
    config = loaded.model.config
    checkpoint = loaded.files[0]
    loaded.model.to("cpu")
    if args.engine == "vllm":
        return Engine(checkpoint, config, machine.dtype, machine.device, args.weights)
    if not args.engine.startswith(("http://", "https://")):
        raise UserError(f"--engine {args.engine}: expected vllm, or the address of a server, such as "
                        "http://localhost:8000")
    return Server(args.engine, checkpoint, config)


@torch.no_grad()
def sample(engine, model, tokenizer, cond, text_mask, cfgs, seeds, size=None, **settings):
    """`LlamaGen.sample` with an engine -> (B, 3, h, w) in [0, 1].

    cond, text_mask, size: as there. model: embeds texts. cfgs, seeds: one for each picture. settings: see Engine.draw.
    """
    config = engine.config
    if config.text_width:
        slots = model.embed_condition(cond.cpu())                           # (B, T, C)
        prompts = [row[mask] for row, mask in zip(slots, text_mask.cpu())]
    else:
        prompts = (config.vocab_size + cond).tolist()
    tokens = torch.tensor(engine.draw(prompts, cfgs, seeds=seeds, **settings))          # (B, N)
    return model.decode(tokenizer, tokens.to(next(tokenizer.parameters()).device), size)


# ----------------------------------------------------------------------------------------------------------------------
# python -m lib.serving


def serve(args):
    """Start vLLM's server. It ends with this process."""
    check_ranges(("--port", args.port, 1, 65535), ("--side", args.side, 1, 1024))
    check_json(args, args.bench)
    device, _ = choose_device(args.device)
    dtype, _ = choose_dtype(args.dtype, device)
    checkpoint = find_checkpoint(args.ckpt, not args.no_download)
    if args.bench:
        return bench_engine(checkpoint, args, dtype, device)
    config = llamagen.load(checkpoint, side=args.side, weights=args.weights).config
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), checkpoint, config, dtype, args.weights)
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder,
                   "--served-model-name", Path(checkpoint).name, "--host", args.host, "--port", str(args.port)]
        for name, value in engine_options(config, dtype, device).items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                command.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                command += [f"--{flag}", *(value if isinstance(value, list) else [str(value)])]
        signal.signal(signal.SIGTERM, signal.default_int_handler)           # raises KeyboardInterrupt, as Ctrl-C does
        server = subprocess.Popen(command + args.more, env=environment(folder, device))
        try:
            code = server.wait()
        except KeyboardInterrupt:
            return
        finally:
            server.terminate()
            server.wait()
    raise UserError(f"vLLM's server ended with code {code}; its messages above say why. {INSTALL}")


@torch.no_grad()
def bench_engine(checkpoint, args, dtype, device):
    """--bench: print the tokens per second of LlamaGen.generate and of vLLM, each with several numbers of pictures.

    Both draw the likeliest tokens of classes with guidance. Raises UserError where they are not the same: a GPU may
    round differently in half precision.
    """
    model = llamagen.load(checkpoint, side=args.side, dtype=dtype, device=device, weights=args.weights).eval()
    config = model.config
    if config.text_width:
        raise UserError(f"--bench: {checkpoint} reads texts; give a model of classes")
    products = prepare(model)                                               # as sample.py does on a CPU
    engine = Engine(checkpoint, config, dtype, device, args.weights)
    results = {}
    print("pictures | our loop, tokens/s | vLLM, tokens/s | vLLM is so many times as fast")
    for n in RACED:
        classes = torch.arange(n, device=device) % config.num_classes
        prompts = (config.vocab_size + classes).tolist()
        ours = functools.partial(model.generate, classes, cfg=4.0, temperature=0)
        theirs = functools.partial(engine.draw, prompts, cfgs=[4.0] * n, cfg_interval=-1, seeds=[0] * n,
                                   temperature=0.0, top_k=0, top_p=1.0)
        as_tensor = lambda draw=theirs: torch.tensor(draw(), device=device)
        result = race(ours, {"vLLM": as_tensor}, n, device, allowed=0, what="tokens")["vLLM"]
        if not result["equal"]:
            raise UserError(f"--bench: vLLM draws other tokens for {n} pictures, so its time would mean nothing; try "
                            "--dtype fp32")
        tokens_per_second = config.side**2 / result["plain_seconds"]
        of_vllm = config.side**2 / result["seconds"]
        results[n] = result | {"tokens_per_second": tokens_per_second, "vllm_tokens_per_second": of_vllm}
        print(f"{n:8} | {tokens_per_second:18.1f} | {of_vllm:14.1f} | {result['ratio']:.2f}")
    save_json(args.json, {"checkpoint": Path(checkpoint).name, "device": device_name(device), "dtype": str(dtype),
                          "packed": bool(products and products.packed), "results": results})


def parse_args():
    """The command line -> a Namespace. What follows -- is for vLLM."""
    parser = argparse.ArgumentParser(prog="python -m lib.serving", description="Start vLLM's server with a LlamaGen")
    parser.add_argument("--ckpt", metavar="FILE|NAME", required=True)
    parser.add_argument("--weights", choices=["ema", "model"], help="as in sample.py")
    parser.add_argument("--side", type=int, metavar="TOKENS", help="of the token map, if the file does not contain it")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--no-download", action="store_true", help="never download anything")
    parser.add_argument("--bench", action="store_true", help="start no server, but measure vLLM in turn with our own "
                        "loop")
    parser.add_argument("--json", metavar="FILE", help="with --bench: write the results")
    parser.add_argument("more", nargs="*", metavar="-- ARGUMENTS", help="of `vllm serve`, such as -- "
                        "--tensor-parallel-size 2")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(serve, parse_args())
