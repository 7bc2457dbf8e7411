"""What `sample.py latentsync` needs besides the pipeline: models, faces, panels, scores, the benchmark."""
import itertools
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import latentsync
import syncnet
import vq
from lib import baseline_dubbing, lora
from lib.bench import bench, print_bench, race, race_baseline
from lib.console import UserError, check_json, check_ranges, save_json
from lib.faces import check_judge, describe_score, find_faces, given_points, points_of_faces
from lib.graphs import captured_unet
from lib.int8 import quantize, reduced
from lib.pictures import DEMO, to_pixels
from lib.products import unpacked
from lib.video import Video
from lib.weights import check_fingerprint, find_checkpoint, find_companion, read_metadata
from syncnet import FPS, SAMPLE_RATE


def check_args(args):
    """Raise UserError for what argparse does not check."""
    check_ranges(("--steps", args.steps, 1, 999), ("--cfg", args.cfg, 0, None), ("--seed", args.seed, 0, None),
                 ("--overlap", args.overlap, 0, 15), ("--face", args.face, 1, None), ("--crf", args.crf, 0, 51),
                 ("--detect-every", args.detect_every, 1, 25), ("--decode", args.decode, 1, None),
                 ("--frames", args.frames, 1, None))
    for pair in (("--ckpt", "--random-weights"), ("--landmarks", "--aligned"), ("--syncnet", "--steps-grid")):
        if all(getattr(args, flag[2:].replace("-", "_")) for flag in pair):
            raise UserError(" and ".join(pair) + " exclude each other")
    if args.video and not args.audio and not args.bench:
        raise UserError("--audio FILE: what is to be said? A sound file, or a video with sound")
    if args.landmarks and not args.video:
        raise UserError("--landmarks: belongs to a --video FILE")
    check_json(args, args.bench)


# ----------------------------------------------------------------------------------------------------------------------
# Models

RESOLUTIONS = {"1.0": 256, "1.5": 256, "1.6": 512}                          # version of LatentSync -> side of the faces


def load_unet(args, ckpt):
    """(UNet, why its faces have that resolution) of the file ckpt, which is the one that --ckpt means."""
    ours = bool({"tokenizer", "merged"} & read_metadata(ckpt).keys())       # its header has the resolution
    resolution, why = args.resolution, "as asked"
    if not resolution and not ours:
        resolution, why = named_resolution(args.ckpt, ckpt.absolute())
    with reduced(args.quantize):
        unet = latentsync.load(ckpt, resolution=resolution, weights=args.weights)
    if ours and not args.resolution:
        why = "as its file says"
    elif not resolution and unet.config.motion == "none":
        why = "version 1.0"                                                 # it has no motion modules
    elif not resolution:
        raise UserError(f"{ckpt}: versions 1.5 and 1.6 have the same tensors, and nothing in this path names one; "
                        "expected LatentSync-1.5 or latentsync_1.6 in it, or say it: --resolution 256 (version 1.5) or "
                        "512 (1.6)")
    return unet, why


def load_models(args):
    """(name, resolution in words, guidance, UNet, autoencoder, Whisper) of --ckpt, --vae, --whisper, or of the demo."""
    download = not args.no_download
    ckpt = DEMO / "talking_head_latentsync.safetensors"
    if args.ckpt:
        ckpt = Path(find_checkpoint(args.ckpt, download))
    metadata = read_metadata(ckpt)
    ours = "tokenizer" in metadata                                          # written by train.py
    unet, why = load_unet(args, ckpt)
    lora.add(unet, args.lora, ckpt)
    vae = find_companion(args.vae, ckpt, "talking_head_kl.safetensors" if ours else "sd-vae-ft-mse", download, "--vae")
    whisper = args.whisper
    if not ours and not whisper and (ckpt.parent / "whisper" / "tiny.pt").exists():     # as in the authors' folders
        whisper = ckpt.parent / "whisper" / "tiny.pt"
    fallback = "talking_head_whisper.safetensors" if ours else "whisper_tiny.pt"
    whisper = find_companion(whisper, ckpt, fallback, download, "--whisper")
    autoencoder = vq.load_autoencoder(vae)
    encoder = latentsync.load_whisper(whisper)
    check_fingerprint(autoencoder, vae, metadata, ckpt)
    if encoder.config.width != unet.config.audio_width:
        raise UserError(f"{whisper}: its features are {encoder.config.width} wide, but {ckpt} takes "
                        f"{unet.config.audio_width}; give the encoder it was trained with as --whisper")
    cfg = args.cfg if args.cfg is not None else metadata.get("sampling", {}).get("cfg", 1.5)
    return ckpt.name, f"faces of {unet.config.resolution} pixels ({why})", cfg, unet, autoencoder, encoder


def named_resolution(*paths):
    """(side of the faces, the reason) of the last part of the first path that names a version; (None, "") if none does.

    A version is a whole number such as 1.6, with or without a v. 1.6.2 is another one, which is not known.
    """
    for path in paths:
        for part in reversed(Path(path).parts):
            version = re.search(r"latentsync[-_ ]?v?([0-9]+(\.[0-9]+)+)", part, re.IGNORECASE)
            if version and version[1] in RESOLUTIONS:
                return RESOLUTIONS[version[1]], f"{version[0]} in its path"
    return None, ""


def random_models(args):
    """The same for --random-weights."""
    name = args.random_weights
    if name not in latentsync.CONFIGS:
        raise UserError(f"--random-weights {name}: choose one of {', '.join(latentsync.CONFIGS)}")
    demo = name == "talking_head"
    config = latentsync.CONFIGS[name]
    unet = vq.build(latentsync.UNet, replace(config, resolution=args.resolution or config.resolution))
    autoencoder = vq.build(vq.KLAutoencoder, vq.CONFIGS["talking_head_kl" if demo else "sd-vae-ft-mse"])
    whisper = vq.build(latentsync.Whisper, latentsync.WHISPERS["talking_head" if demo else "tiny"])
    g = torch.Generator().manual_seed(args.seed)
    for model in (unet, autoencoder, whisper):
        model.eval().init_weights(g)
    with torch.no_grad():
        vq.init_default(unet, g)                # the zeros that it is trained from would make all predictions equal
    quantize(unet, args.quantize)
    cfg = 1.5 if args.cfg is None else args.cfg
    return name, f"faces of {unet.config.resolution} pixels", cfg, unet, autoencoder, whisper


def set_frames(unet, args):
    """--frames: paint clips of another length. Raises UserError if the motion modules cannot."""
    config = unet.config
    if args.frames:
        if config.motion != "none" and args.frames > config.motion_length:
            raise UserError(f"--frames {args.frames}: expected at most {config.motion_length}, the frames that its "
                            "motion modules can tell apart")
        unet.config = replace(config, frames=args.frames)
    check_ranges(("--overlap", args.overlap, 0, unet.config.frames - 1))


def faster_unets(unet, device):
    """{name: UNet}: copies that share the weights and run faster; the best first."""
    compiled = captured_unet(unpacked(unet), call=torch.compile)            # torch.compile takes no PackedWeight
    return {"graph": captured_unet(unet), "compile": compiled} if device.type == "cuda" else {"compile": compiled}


# ----------------------------------------------------------------------------------------------------------------------
# Frames and faces


def forth_and_back(video, count, held=2**28):
    """Yield `count` times (number, frame) of a video: forth, and if it is shorter back, forth again ...

    On the way back it is decoded in pieces of at most `held` bytes, each from its start on.
    """
    last = -1
    n = 0
    for last, picture in itertools.islice(enumerate(video), count):
        yield last, picture
        n += 1
    piece = max(1, held // (3 * video.height * video.width))
    while n < count:
        for end in range(last + 1, 0, -piece):
            start = max(end - piece, 0)
            pictures = list(itertools.islice(video.frames(start), end - start))
            for number in reversed(range(start, start + len(pictures))):
                if n == count:
                    return
                yield number, pictures[number - start]
                n += 1
        for number, picture in itertools.islice(enumerate(video), count - n):
            yield number, picture
            n += 1


def detected_points(video, device, args, count=None):
    """Points (frames, 3, 2) of the face that --face asks for, in the first `count` frames; nan if it is not found."""
    every = args.detect_every or (1 if device.type == "cuda" else 3)
    faces, cuts = find_faces(video, device, every, count, "--landmarks FILE.npz, or --aligned")
    ranks = points_of_faces(faces, cuts, every)
    if not ranks:
        seen = sum(map(bool, faces))
        smaller = f" (smaller ones in {seen})" if seen else ""
        raise UserError(f"{video.path}: no face of 50 pixels or more in any of {len(faces)} frames{smaller}; nothing "
                        "was written; if there is one, give --landmarks FILE.npz")
    if args.face > len(ranks):
        raise UserError(f"--face {args.face}: there are never more than {len(ranks)} faces at a time in {video.path}")
    return ranks[args.face - 1]


class FaceMaps:
    """The map to the aligned face for every frame of a video, or None. Call it with 0, 1, 2 ... first."""

    def __init__(self, video, device, args, resolution, count):
        self.maps = []                                                      # found in order, because align smooths
        self.align = latentsync.Aligner(resolution)
        self.points = None
        if args.aligned:
            h, w = self.align.canvas
            H, W = (video.height, video.width)
            self.whole = torch.tensor([[(w - 1) / max(W - 1, 1), 0, 0], [0, (h - 1) / max(H - 1, 1), 0]])
            return
        landmarks = args.landmarks or (DEMO / "talking_scene.npz" if args.video is None else None)
        if landmarks:
            self.points = given_points(landmarks, min(count, len(video)))
        else:
            self.points = detected_points(video, device, args, count)

    def __call__(self, number):
        if self.points is None:
            return self.whole
        if number >= len(self.points):                                      # the file claims to be shorter than it is
            return None
        while len(self.maps) <= number:
            points = self.points[len(self.maps)]
            self.maps.append(None if np.isnan(points).any() else self.align(points))
        return self.maps[number]


def panel_size(unet, video):
    """(height, width) of four panels: three faces, at least 128 pixels high, and the frame with the same height."""
    side = max(128, unet.config.resolution)
    return side, 3 * side + round(video.width / video.height * side)


def panels(frame, size):
    """Face, masked face, painted face, and the result, side by side. Frames without a face have grey panels."""
    side = size[0]

    def resized(picture, width):
        return np.asarray(Image.fromarray(picture).resize((width, side), Image.LANCZOS))
    row = []
    for face in (frame.face, frame.masked, frame.generated):
        if face is None:
            row.append(np.full((side, side, 3), 127, np.uint8))
        else:
            row.append(resized(to_pixels(face[None].add(1).div(2).clamp(0, 1))[0], side))
    return np.concatenate([*row, resized(frame.picture, size[1] - 3 * side)], 1)


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def load_judge(args, device):
    """The StableSyncNet of --syncnet; for the demo's own video the demo's; else None."""
    if not args.syncnet and (args.video or args.steps_grid):
        return None
    path = DEMO / "talking_head_syncnet.safetensors"
    if args.syncnet:
        path = find_checkpoint(args.syncnet, not args.no_download)
    judge = syncnet.load(path, device=device)
    check_judge(judge, path)
    return judge


def print_scores(judge, video, out, shown, face_maps, sound):
    """Print how well the sound fits the video as it was, and as it is now. shown: numbers of its frames."""
    align = face_maps.align
    side = judge.config.picture[1]

    def aligned(pictures):
        face = torch.full((3, side, side), 127.0)
        for number, picture in zip(shown, pictures):
            face_map = face_maps(number)
            if face_map is not None:                                        # otherwise the last face stays
                face = latentsync.align_face(torch.as_tensor(picture), face_map, align.canvas, align.resolution)[None]
                face = F.interpolate(face, (side, side), mode="bicubic", antialias=True)[0].round().clamp(0, 255)
            yield face.byte()
    before = (picture for _, picture in forth_and_back(video, len(shown)))
    for what, pictures in (("before", before), ("after", Video(out))):
        try:
            score = syncnet.score(judge, aligned(pictures), sound)
        except ValueError as e:
            print(f"note: SyncNet cannot judge it: {e}", file=sys.stderr)
            return
        print(f"{what + ':':<8}{describe_score(score, judge)}")


# ----------------------------------------------------------------------------------------------------------------------
# Speed


def bench_dubbing(args, name, cfg, dub, unet, autoencoder, whisper, machine, products):
    """--bench: one clip of random pictures, with the face at a fixed place; from sound and pictures to faces.

    products: the Products that `prepare` returned for the UNet, or None.
    """
    config = unet.config
    count = config.frames
    height = 160 if config.resolution < 128 else 960
    width = height * 9 // 16
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    points = np.array([(0.4, 0.35), (0.6, 0.35), (0.5, 0.45)]) * (width, height)
    sound = 0.1 * rng.standard_normal(SAMPLE_RATE * count // FPS).astype(np.float32)

    def audio():
        """Yield the audio of each frame."""
        windows = latentsync.windows(whisper, np.pad(sound, (0, SAMPLE_RATE)), window=config.audio_window)
        return itertools.islice(windows, count)

    def run(unet=unet):
        align = latentsync.Aligner(config.resolution)
        frames = ((pictures[i % 2], align(points)) for i in range(count))
        faces = [frame.generated for frame in dub(frames, audio(), unet)]
        return torch.stack(faces).float().cpu()
    stages = {"whisper": [(whisper, "forward")], "encoder": [(autoencoder, "encode")],
              "unet": [(unet, "forward_with_deep")], "decoder": [(autoencoder, "decode")]}
    parameters = [p for model in (unet, autoencoder, whisper) for p in model.parameters()]
    device = machine.device
    result = bench(name, run, stages, "rest", parameters, device, machine.dtype, count, machine.peak_memory,
                   rounds=1 if device.type == "cpu" else 3)
    result |= {"steps": args.steps, "cfg": cfg, "deep_cache": args.deep_cache, "resolution": config.resolution}
    if args.compile:
        variants = {}
        for variant, twin in faster_unets(unet, device).items():
            variants[variant] = lambda twin=twin: run(twin)
        result["variants"] |= race(run, variants, count, device)
    result["products"] = str(products or "")
    result["variants"] |= race_originals(unet, autoencoder, list(audio()), cfg, args.decode, args.neighbour)
    print(f"{config.resolution} pixels, {count} frames in a clip, {args.steps} steps, guidance {cfg}")
    print_bench(result)
    save_json(args.json, result)


@torch.no_grad()
def race_originals(unet, autoencoder, audio, cfg, decode_batch, neighbour):
    """Time our code in turn with the original's steps, lib/baseline_dubbing.py -> {name: result of `race`}.

    Two things are timed: a step of the UNet with guidance, whatever --cfg says, and the autoencoder, there and back.
    Both get a clip of random numbers. audio: list of (A, audio_width), one per frame; decode_batch: frames that our
    autoencoder gets at a time; neighbour: see `race_baseline`.
    """
    config = unet.config
    device = unet.conv_in.weight.device
    count = len(audio)
    side = config.resolution // autoencoder.config.stride
    scaling = autoencoder.config.scaling
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device)
    z = randn(1, config.out_channels, count, side, side)
    condition = randn(1, config.in_channels - config.out_channels, count, side, side)
    audio = torch.stack(audio)[None].to(device)
    pictures = randn(count, 3, config.resolution, config.resolution).clamp(-1, 1)
    t = latentsync.time_steps(20)[0]

    def step():                                                             # what latentsync.denoise does in a step
        x = torch.cat([z, condition], 1).expand(2, -1, -1, -1, -1)
        silent, noise = unet(x, t, torch.cat([torch.zeros_like(audio), audio])).float().chunk(2)
        return silent + cfg * (noise - silent)

    def joined(mean, std, decoded):
        return torch.cat([part.float().flatten() for part in (mean, std, decoded)])

    def there_and_back():                                                   # what latentsync.paint does for a clip
        posteriors = [autoencoder.encode(part) for part in pictures.split(decode_batch)]
        mean = torch.cat([posterior.mean for posterior in posteriors]) * scaling
        std = torch.cat([posterior.std for posterior in posteriors]) * scaling
        return joined(mean, std, torch.cat([autoencoder.decode(part) for part in mean.split(decode_batch)]))

    options = dict(rounds=1 if device.type == "cpu" else 3, neighbour=neighbour,
                   allowed=rounding_of(unet.conv_in.weight))
    twin = baseline_dubbing.contiguous(unpacked(unet))
    results = race_baseline(step, lambda: baseline_dubbing.unet_step(twin, z, condition, t, audio, cfg), count, device,
                            what="a step of the UNet", **options)
    twin = baseline_dubbing.contiguous(autoencoder)

    def original_there_and_back():
        mean, std = (x * scaling for x in baseline_dubbing.vae_encode(twin, pictures))
        return joined(mean, std, baseline_dubbing.vae_decode(twin, mean))
    return results | race_baseline(there_and_back, original_there_and_back, count, device, what="the autoencoder",
                                   **options)


def rounding_of(weight):
    """How far two ways to compute the same numbers of order one may differ, if a network has weights like this one.

    That is 1e-4 in float32. Tiny networks, as deep as the released ones, differ by 4e-5, and by 0.07 or more if keys
    and values are exchanged in one attention. In half precision it is 100 times the dtype's eps, where these networks
    differ by 40 times. cuDNN's convolutions may round float32 to TF32, whose eps is that of float16.
    """
    dtype = weight.dtype
    if dtype == torch.float32 and weight.is_cuda and torch.backends.cudnn.allow_tf32:
        dtype = torch.float16
    return 1e-4 if dtype == torch.float32 else 100 * torch.finfo(dtype).eps
