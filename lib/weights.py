"""Files of weights: released names and their downloads, files that belong together, and starting from other weights."""
import hashlib
import json
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

import vq
from lib.console import UserError, rank_and_world

LLAMAGEN_FILES = ("vq_ds16_c2i", "vq_ds8_c2i", "c2i_B_256", "c2i_B_384", "c2i_L_256", "c2i_L_384", "c2i_XL_384",
                  "c2i_XXL_384", "c2i_3B_384")
RELEASED = {  # the name that a user gives -> (repository on the Hugging Face hub, file in it)
    "vae_ch160v4096z32.pth": ("FoundationVision/var", "vae_ch160v4096z32.pth"),
    **{f"var_d{d}.pth": ("FoundationVision/var", f"var_d{d}.pth") for d in (16, 20, 24, 30, 36)},
    **{f"infinity_vae_{d}.pth": ("FoundationVision/Infinity", f"infinity_vae_{d}.pth")
       for d in ("d16", "d24", "d32", "d32reg", "d64", "d56_f8_14_patchify")},
    "infinity_125M_256x256.pth": ("FoundationVision/Infinity", "infinity_125M_256x256.pth"),
    "infinity_2b_reg.pth": ("FoundationVision/Infinity", "infinity_2b_reg.pth"),
    **{f"{name}.pt": ("FoundationVision/LlamaGen", f"{name}.pt") for name in LLAMAGEN_FILES},
    **{f"{name}.pt": ("peizesun/llamagen_t2i", f"{name}.pt")
       for name in ("vq_ds16_t2i", "t2i_XL_stage1_256", "t2i_XL_stage2_512")},
    "stable_syncnet.pt": ("ByteDance/LatentSync-1.6", "stable_syncnet.pt"),
    "latentsync_1.0.pt": ("ByteDance/LatentSync", "latentsync_unet.pt"),    # all three files have the same name there
    "latentsync_1.5.pt": ("ByteDance/LatentSync-1.5", "latentsync_unet.pt"),
    "latentsync_1.6.pt": ("ByteDance/LatentSync-1.6", "latentsync_unet.pt"),
    "whisper_tiny.pt": ("ByteDance/LatentSync-1.6", "whisper/tiny.pt"),
}
FOLDERS = {  # the name of a folder -> (repository, folder in it, patterns of the files that are needed)
    "infinity_8b_weights": ("FoundationVision/Infinity", "infinity_8b_weights", ["*.safetensors*"]),
    "infinity_8b_512x512_weights": ("FoundationVision/Infinity", "infinity_8b_512x512_weights", ["*.safetensors*"]),
    "sd-vae-ft-mse": ("stabilityai/sd-vae-ft-mse", "", ["config.json", "diffusion_pytorch_model.safetensors"]),
    "flan-t5-xl": ("google/flan-t5-xl", "", ["tokenizer.json", "model*.safetensors*"]),
}
WEBSITE = {"syncnet_v2.model": "http://www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model"}


def find_checkpoint(name, download=True, flag=""):
    """A path as it is, or a released name -> its file or folder in the cache, downloaded if it is not there.

    Files of the hub lie in the cache of huggingface_hub, so mirrors (HF_ENDPOINT), tokens and files that other
    programs have downloaded are used. flag: the one that gave the name; a UserError begins with it.
    """
    path = Path(name)
    if path.exists():
        return path
    known = [*RELEASED, *FOLDERS, *WEBSITE]
    released = next((path.name + end for end in ("", ".pth", ".pt") if path.name + end in known), None)
    if released is None or path.parent != Path("."):
        models = "" if path.suffix else f", and no released model of that name ({', '.join(known)})"
        raise UserError(f"{flag} {name}: no such file{models}".lstrip())
    if released in WEBSITE:
        return fetch_from_website(WEBSITE[released], download)
    return fetch_from_hub(released, download)


def fetch_from_hub(name, download):
    """A released file or folder in the cache of huggingface_hub. Under torchrun rank 0 downloads, the others wait."""
    repository, inside = FOLDERS[name][:2] if name in FOLDERS else RELEASED[name]
    page = f"https://huggingface.co/{repository}"
    if name in RELEASED:
        page += f"/blob/main/{inside}"
    not_here = f"{name}: not here and not in huggingface_hub's cache, and --no-download is set"
    bad_address = f"HF_ENDPOINT={os.environ.get('HF_ENDPOINT')}: no usable address"
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        way_out = f"to download it, pip install huggingface_hub; or get it from {page} and give its path"
        raise UserError(f"{name}: {way_out}" if download else not_here) from None
    except ValueError as e:                                                 # it reads HF_ENDPOINT when it is imported
        raise UserError(f"{bad_address} ({e})") from None
    try:
        return cached_in_hub(huggingface_hub, name, offline=True)
    except huggingface_hub.errors.LocalEntryNotFoundError:
        if not download:
            raise UserError(not_here) from None
    except vq.CheckpointError:                                              # a damaged index of shards
        raise
    except ValueError as e:
        raise UserError(f"{bad_address} ({e})") from None
    try:
        while rank_and_world()[0] != 0:                                     # until rank 0 has downloaded it
            time.sleep(1)
            try:
                return cached_in_hub(huggingface_hub, name, offline=True)
            except huggingface_hub.errors.LocalEntryNotFoundError:
                continue
        return cached_in_hub(huggingface_hub, name, offline=False)
    except Exception as e:                                                  # the hub's, the network's, a full disk's
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"{name}: cannot be downloaded ({reason}); get it from {page} and give its path") from None


def cached_in_hub(huggingface_hub, name, offline):
    """The path of a released file or folder; offline=True raises LocalEntryNotFoundError instead of downloading."""
    if name in RELEASED:
        repository, file = RELEASED[name]
        return Path(huggingface_hub.hf_hub_download(repository, file, local_files_only=offline))
    repository, inside, patterns = FOLDERS[name]
    prefix = f"{inside}/" if inside else ""
    patterns = [prefix + pattern for pattern in patterns]
    snapshot = huggingface_hub.snapshot_download(repository, allow_patterns=patterns, local_files_only=offline)
    folder = Path(snapshot) / inside
    if offline and not has_all_weights(folder):                             # other programs may need other files only
        raise huggingface_hub.errors.LocalEntryNotFoundError(name)
    return folder


def has_all_weights(folder):
    """Whether a folder holds a file of weights, or all shards that its index lists. Raises CheckpointError."""
    indices = sorted(folder.glob("*.index.json"))
    if not indices:
        return any(folder.glob("*.safetensors"))
    return all((folder / shard).exists() for shard in vq.shards_of(indices[0]))


def fetch_from_website(address, download):
    """A file in ~/.cache/legible, or in the folder that LEGIBLE_CACHE names."""
    folder = Path(os.environ.get("LEGIBLE_CACHE", Path.home() / ".cache" / "legible"))
    path = folder / address.rpartition("/")[2]
    if path.exists():
        return path
    if not download:
        raise UserError(f"{path.name}: not here and not in {folder}, and --no-download is set")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(path))                  # writes a temporary file, then renames it
    except OSError as e:                                                    # URLError is one
        reason = getattr(e, "reason", None) or e
        raise UserError(f"{address}: cannot be downloaded ({reason}); get it yourself and give its path") from None
    return path


def find_companion(given, beside, fallback, download, flag):
    """A second file that a model needs: the given one, else `fallback` beside the first file, else the released one."""
    if given:
        return find_checkpoint(given, download, flag)
    if (Path(beside).parent / fallback).exists():
        return Path(beside).parent / fallback
    if fallback in RELEASED or fallback in FOLDERS:
        return find_checkpoint(fallback, download)
    what = "tokenizer" if flag == "--vae" else flag[2:]
    raise UserError(f"{beside}: which {what}? None named {fallback} lies beside it; give {flag} FILE")


def is_texts(value):
    """Whether a value is a list of texts."""
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def is_sampling(value):
    """Whether a value is what sample.py takes from a header: numbers by the names of its flags."""
    names = {"cfg", "tau", "top_k", "top_p", "temperature"}
    numbers = isinstance(value, dict) and all(type(number) in (int, float) for number in value.values())
    return numbers and set(value) <= names and all(x == 0 or 1e-3 <= x < 1e5 for x in value.values())


def is_trace(value):
    """Whether a value is {name: list of numbers}."""
    return isinstance(value, dict) and all(isinstance(row, list) and all(isinstance(x, float) for x in row)
                                           for row in value.values())


METADATA = {  # what train.py writes into a safetensors header: (whether a value may be used, what it should be)
    "config": (lambda value: isinstance(value, dict), "settings of a network by name"),
    "classes": (is_texts, "a list of names"),
    "show": (is_texts, "a list of classes or prompts"),
    "sampling": (is_sampling, "numbers for cfg, tau, top_k, top_p or temperature"),
    "tokenizer": (lambda value: isinstance(value, str), "the fingerprint of a tokenizer"),
    "pixels": (lambda value: value is None or value in vq.PIXELS, f"one of {', '.join(vq.PIXELS)}"),
    "text_encoder": (lambda value: isinstance(value, dict), "settings of a network by name"),
    "merged": (is_texts, "a list of hashes of LoRAs"),
    "base": (is_trace, "numbers by name of a layer"),
}


def read_metadata(path):
    """What train.py wrote into a safetensors header, as a dict; {} for other files.

    Raises vq.CheckpointError for a damaged file, and for entries that train.py would not write.
    """
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return {}
    from safetensors import SafetensorError, safe_open
    found = {}
    with vq.understanding(path, "a safetensors file"):
        try:
            with safe_open(path, "pt") as f:
                header = f.metadata() or {}
        except SafetensorError as e:
            raise vq.CheckpointError(f"{path}: truncated or not a safetensors file ({e})") from None
        for key in METADATA.keys() & header.keys():
            try:
                found[key] = json.loads(header[key])
            except ValueError:
                found[key] = header[key]
    usable, _ = METADATA["config"]
    if "config" in found and not usable(found["config"]):
        del found["config"]                                                 # as vq.read_config, which asks the tensors
    for key, value in found.items():
        usable, expected = METADATA[key]
        if not usable(value):
            raise vq.CheckpointError(f"{path}: '{key}' in its header is {str(value)[:50]}, expected {expected}; remove "
                                     "it, or save the file again with train.py")
    return found


def check_kind(model, tokenizer, vae, way_out):
    """Raise UserError if the tokenizer in the file `vae` is of another kind than the model needs."""
    try:
        model.check_pair(tokenizer)
    except ValueError as e:
        raise UserError(f"{vae}: {e}; {way_out}") from None


def check_fingerprint(tokenizer, vae, metadata, ckpt):
    """Raise UserError if train.py noted another tokenizer in the file of the model."""
    if metadata.get("tokenizer", vq.fingerprint(tokenizer)) != vq.fingerprint(tokenizer):
        raise UserError(f"{vae}: is not the tokenizer that {ckpt} was trained with; give that as --vae")


def content_hash(path, limit=None):
    """A hash of a file's content, or of all files of a folder. With a limit, only the size of a large file and `limit`
    bytes at both ends count."""
    if os.path.isdir(path):
        hashes = [content_hash(file, limit) for file in sorted(Path(path).iterdir()) if file.is_file()]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()
    size = os.path.getsize(path)
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        if limit is None or size <= 2 * limit:
            while block := f.read(2**20):
                digest.update(block)
        else:
            digest.update(b"%d" % size + f.read(limit))
            f.seek(-limit, os.SEEK_END)
            digest.update(f.read())
    return digest.hexdigest()


@torch.no_grad()
def warm_start(model, other, what):
    """Copy the weights of another model wherever name and shape agree, and print which weights start from scratch.

    `what` is the flag that asked for it, with its file. Raises UserError if nothing fits.
    """
    state = other.state_dict()
    fresh = []
    for name, p in model.state_dict().items():
        if name in state and state[name].shape == p.shape:
            p.copy_(state[name])
        else:
            fresh.append(name)
    if len(fresh) == len(model.state_dict()):
        raise UserError(f"{what}: none of its weights fits this model; choose the recipe that goes with it")
    if fresh:
        tqdm.write(f"{what}: {len(fresh)} weights start from scratch: {', '.join(fresh[:4])}")
