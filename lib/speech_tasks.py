"""What SyncNet, LatentSync and the demo's stand-ins for Whisper and VideoMAE learn from a batch."""
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

import latentsync
import syncnet
import vq
from lib import videomae
from lib.clips import clip_config, clip_items
from lib.console import DTYPES, MissingPackage, UserError
from lib.face_metrics import compare_faces, score_aligned
from lib.faces import SHIFTS, check_judge
from lib.losses import load_lpips
from lib.pictures import chart, grid, save_png, to_input, to_pixels
from lib.tasks import Task
from lib.video import VideoWriter
from lib.weights import content_hash, find_checkpoint, warm_start
from syncnet import FPS, SAMPLE_RATE


class SyncNetTask(Task):
    """`train.py syncnet`: binary cross entropy of the cosine of a clip and a sound; half of the pairs match."""

    metrics = ["accuracy"]
    val_metrics = ["loss", "accuracy"]

    @staticmethod
    def check_args(args):
        clip_config(args)

    def setup(self, generator):
        self.model = vq.build(syncnet.StableSyncNet, self.train_set.config).to(self.device)
        self.model.init_weights(generator)
        if self.args.init:
            warm_start(self.model, syncnet.load(self.args.init), f"--init {self.args.init}")

    def loss_of(self, model, batch, generator):
        (frames, mel), labels, _ = batch
        frames = model.prepare(frames.to(self.device))
        return model.loss(frames, mel[:, None].to(self.device), labels.to(self.device))

    def loss(self, batch, step, generator):
        if self.args.moments == 1:
            return self.loss_of(self.model, batch, generator)
        (frames, mel), _, _ = batch                                         # (B, K, F, 3, H, W), (B, K, 80, columns)
        videos = frames.shape[:2]
        frames = self.model.prepare(frames.to(self.device).flatten(0, 1)).unflatten(0, videos)
        return self.model.loss_of_moments(frames, mel[:, :, None].to(self.device), step < self.args.contrast_steps)

    def val_items(self):
        items = [(i % len(self.val_set), (i,)) for i in range(self.args.val_pairs)]
        if getattr(self.val_set, "READS_FILES", False):
            items.sort()                                                    # so that each video is decoded only once
        return [items]

    def picture(self, model):
        """Distance over shifts, of four validation videos."""
        curves = {}
        for i, (frames, sound) in enumerate(self.val_set.first_usable(4), 1):
            score = syncnet.score(model, frames, sound)
            curves[f"{i}: offset {score.offset:+d}"] = (range(-15, 16), score.curve.tolist())
        return chart(curves, "validation videos", SHIFTS, "distance", y_range=(0, 1))

    def save(self, model, path, dtype):
        syncnet.save(model, path, dtype)


class MouthReader(torch.nn.Module):
    """Whisper's encoder, and a linear layer that reads the mouth from the output of its last block."""

    def __init__(self, config):
        super().__init__()
        self.whisper = latentsync.Whisper(config)
        self.head = torch.nn.Linear(config.width, 3)

    def forward(self, mel):
        """(B, mels, n) -> (B, n / 2, 3), n at most 2 * positions. The mel is padded with zeros, as for dubbing."""
        missing = 2 * self.whisper.config.positions - mel.shape[2]
        last = self.whisper(F.pad(mel, (0, missing)))[:, :mel.shape[2] // 2, -1]
        return self.head(self.whisper.ln_post(last))


class WhisperTask(Task):
    """`train.py whisper`: an audio encoder for the demo, which learns from synthetic voices what the mouth does."""

    def setup(self, generator):
        self.model = vq.build(MouthReader, latentsync.WHISPERS[self.args.model]).to(self.device)
        with torch.no_grad():
            vq.init_default(self.model, generator)

    def loss_of(self, model, batch, generator):
        return F.mse_loss(model(batch[0].to(self.device)), batch[1].to(self.device)), {}

    def val_batches(self):
        return [[(i, None) for i in range(len(self.val_set))]]

    @torch.no_grad()
    def picture(self, model):
        """The opening of the mouth of an unseen voice: true and predicted."""
        mel, mouth, _ = self.val_set.__getitems__([(0, None)])
        seconds = [i / 50 for i in range(mouth.shape[1])]
        predicted = model(mel.to(self.device))[0, :, 0].tolist()
        curves = {"true": (seconds, mouth[0, :, 0].tolist()), "heard": (seconds, predicted)}
        return chart(curves, "an unseen voice", "s", "mouth open", y_range=(-0.2, 1.4))

    def save(self, model, path, dtype):
        latentsync.save(model.whisper, path, dtype)


class MaskedVideo(torch.nn.Module):
    """A video encoder that sees a quarter of a clip, and a decoder that fills in the rest (VideoMAE, arXiv 2203.12602).

    All frames show the same places, because a hidden place could otherwise be copied from the frame before.
    """

    def __init__(self, config, width=64, depth=2):
        super().__init__()
        self.videomae = videomae.VideoMAE(config)
        small = replace(config, width=width, depth=depth, hidden=4 * width, classes=0)
        self.inward = torch.nn.Linear(config.width, width)
        self.unseen = torch.nn.Parameter(torch.zeros(width))
        self.decoder = videomae.VideoMAE(small)                             # only its positions and blocks are used
        self.decoder.patch_embed = None
        self.decoder.fc_norm = None
        self.norm = torch.nn.LayerNorm(width)
        self.pixels = torch.nn.Linear(width, 3 * small.tubelet * small.patch**2)

    def forward(self, clips, generator, seen=0.25):
        """Clips (B, 3, F, H, W) in [-1, 1] -> (predicted patches, true patches, which were seen: (B, L))."""
        patches = self.videomae.patches(clips)
        tokens = self.videomae.embed(patches)
        config = self.videomae.config
        places = (config.size // config.patch) ** 2                         # in a frame
        B, L, C = tokens.shape
        order = torch.rand(B, places, generator=generator, device=clips.device).argsort(1)[:, :round(seen * places)]
        times = places * torch.arange(L // places, device=clips.device)[:, None]
        index = (order[:, None] + times).flatten(1)
        visible = tokens.gather(1, index[:, :, None].expand(-1, -1, C))
        encoded = self.inward(self.videomae.encode(visible)).float()
        x = self.unseen.expand(B, L, -1).scatter(1, index[:, :, None].expand(-1, -1, encoded.shape[2]), encoded)
        x = self.decoder.encode(x + self.decoder.positions)
        return self.pixels(self.norm(x)), patches, torch.zeros(B, L, device=x.device).scatter(1, index, 1.0)


class VideoMAETask(Task):
    """`train.py videomae`: a video encoder for TREPA in the demo, by masked autoencoding of synthetic heads."""

    def setup(self, generator):
        self.model = vq.build(MaskedVideo, videomae.VIDEOMAES[self.args.model]).to(self.device)
        with torch.no_grad():
            vq.init_default(self.model, generator)

    def predict(self, model, batch, generator):
        clips = to_input(batch[0].flatten(0, 1), self.device).unflatten(0, batch[0].shape[:2])
        return model(clips.transpose(1, 2), generator)

    def loss_of(self, model, batch, generator):
        predicted, target, seen = self.predict(model, batch, generator)
        error = (predicted - target).square().mean(2)
        return (error * (1 - seen)).sum() / (1 - seen).sum(), {}

    def val_items(self):
        return [[(i % len(self.val_set), (i,)) for i in range(64)]]

    @torch.no_grad()
    def picture(self, model):
        """Unseen people: every fourth frame, what the encoder saw of it, and the rest filled in."""
        c = model.videomae.config
        generator = torch.Generator(self.device).manual_seed(0)
        batch = self.val_set.__getitems__([(i, (i,)) for i in range(4)])
        predicted, target, seen = self.predict(model, batch, generator)
        seen = seen[:, :, None]
        rows = []
        for patches in (target, target * seen, predicted * (1 - seen) + target * seen):
            frames = rearrange(patches, "b (l h w) (c t p q) -> b (l t) c (h p) (w q)", h=c.size // c.patch,
                               w=c.size // c.patch, t=c.tubelet, p=c.patch, q=c.patch)
            rows.append(frames[:, ::4])
        return grid(to_pixels(torch.stack(rows, 1).flatten(0, 2).clamp(0, 1)), 4)

    def save(self, model, path, dtype):
        videomae.save(model.videomae, path, dtype)


class LatentSyncTask(Task):
    """`train.py latentsync`: the noise of true frames, given them masked, reference frames and the sound.

    Stage 2 adds losses on the decoded frames. All networks but the UNet are frozen.
    """

    MOTION = {"1": "none", "2": "all", "2-efficient": "up"}                 # levels with motion modules
    STEPS = 10                                                              # diffusion steps in validations

    @staticmethod
    def check_args(args):
        if args.stage == "1":
            for flag in ("lpips", "videomae", "lpips_weight", "sync_weight", "trepa_weight"):
                if getattr(args, flag):
                    raise UserError(f"--{flag.replace('_', '-')}: belongs to --stage 2")
        most = latentsync.CONFIGS[args.model].motion_length
        if args.stage != "1" and args.frames > most:
            raise UserError(f"--frames {args.frames}: expected at most {most}, the length of the motion modules")
        if args.trepa_weight and args.frames < 2:
            raise UserError(f"--frames {args.frames}: TREPA's video encoder takes frames in pairs; choose 2 or more")
        if args.init and args.stable_diffusion:
            raise UserError("--init and --stable-diffusion exclude each other")
        if args.prepare:
            return
        for flag, what in (("vae", "the autoencoder"), ("whisper", "the audio encoder")):
            if not getattr(args, flag):
                raise UserError(f"--{flag}: needed: {what}")
        networks = [("sync", "syncnet", "a StableSyncNet, such as stable_syncnet.pt"),
                    ("trepa", "videomae", "TREPA's video encoder, vit_g_hybrid_pt_1200e_ssv2_ft.pth"),
                    ("lpips", "lpips", "VGG16 HEADS, torchvision's vgg16-397923af.pth and LPIPS' vgg.pth")]
        for loss, flag, what in networks:
            if getattr(args, f"{loss}_weight") and not getattr(args, flag):
                raise UserError(f"--{flag}: needed: {what}, or go without it: --{loss}-weight 0")

    def setup(self, generator):
        args = self.args
        config = replace(latentsync.CONFIGS[args.model], motion=self.MOTION[args.stage], frames=args.frames)
        self.load_frozen(config)
        self.mask = latentsync.face_mask(config.resolution).to(self.device)
        if args.lora:
            self.model = self.frozen_base(config)
        else:
            self.model = vq.build(latentsync.UNet, config).to(self.device)
            self.model.init_weights(generator)
        if args.stable_diffusion:
            latentsync.start_from_stable_diffusion(self.model, args.stable_diffusion)
        if args.init and not args.lora:
            warm_start(self.model, latentsync.load(find_checkpoint(args.init)), f"--init {args.init}")
        elif args.stage != "1" and not args.lora:
            raise UserError(f"--stage {args.stage}: trains attention and motion modules only; give what stage 1 has "
                            "made, or a released file, as --init FILE")
        self.model.freeze(args.stage)
        for data in (self.train_set, self.val_set):
            data.encode_audio(self.whisper, args)
            data.audio_window = config.audio_window
            data.columns = self.syncnet.config.columns if self.supervision and args.sync_weight else None
        self.metrics = ["noise", *self.supervision.weights] if self.supervision else []
        self.val_metrics = ["loss", "ssim", "lmd", "flicker"]
        if self.judge:
            self.val_metrics += ["sync_c", "offset"]

    def frozen_base(self, config):
        """The UNet of --init, for --lora."""
        args = self.args
        if args.stable_diffusion:
            raise UserError("--lora and --stable-diffusion exclude each other: the weights of --init are frozen")
        unet = latentsync.load(find_checkpoint(args.init), resolution=config.resolution)
        if unet.config.motion != config.motion:
            raise UserError(f"--init {args.init}: has motion modules at \"{unet.config.motion}\" levels, but --stage "
                            f"{args.stage} trains a network with \"{config.motion}\"; frozen weights cannot start from "
                            "scratch")
        unet.config = replace(unet.config, frames=args.frames)
        return unet.to(self.device)

    def load_frozen(self, config):
        """Load the networks that are not trained, on a GPU in the precision of the run."""
        args = self.args
        half = DTYPES[args.dtype] if args.dtype != "fp32" and self.device.type == "cuda" else None

        def frozen(model):
            return model.to(self.device, half).requires_grad_(False)
        self.autoencoder = vq.load_autoencoder(find_checkpoint(args.vae))
        self.latents = vq.fingerprint(self.autoencoder)                     # before it is rounded
        self.autoencoder = frozen(self.autoencoder)
        self.whisper = latentsync.load_whisper(find_checkpoint(args.whisper), device=self.device).requires_grad_(False)
        if self.whisper.config.width != config.audio_width:
            raise UserError(f"--whisper {args.whisper}: its features are {self.whisper.config.width} wide, but "
                            f"{args.model} takes {config.audio_width}")
        self.syncnet = None
        if args.syncnet:
            self.syncnet = frozen(syncnet.load(find_checkpoint(args.syncnet)))
            check_judge(self.syncnet, f"--syncnet {args.syncnet}")
            if args.stage != "1" and args.sync_weight and self.syncnet.frames != config.frames:
                raise UserError(f"--syncnet {args.syncnet}: is made for clips of {self.syncnet.frames} frames, but "
                                f"clips have {config.frames}; choose --frames {self.syncnet.frames}, or another file")
        self.judge = self.syncnet
        if args.judge:
            self.judge = syncnet.load(find_checkpoint(args.judge), device=self.device).requires_grad_(False)
            check_judge(self.judge, f"--judge {args.judge}", original=True)
        self.supervision = None
        if args.stage == "1":
            return
        encoder = frozen(videomae.load(find_checkpoint(args.videomae))) if args.trepa_weight else None
        lpips = load_lpips(*map(find_checkpoint, args.lpips)).to(self.device) if args.lpips_weight else None
        self.supervision = latentsync.Supervision(
            self.autoencoder, self.syncnet if args.sync_weight else None, encoder, lpips, frames=args.frames,
            sync_weight=args.sync_weight, trepa_weight=args.trepa_weight, lpips_weight=args.lpips_weight,
            checkpointing=args.checkpointing)

    def identity(self):
        """Content hashes of the networks that are not trained, and of the start."""
        hashes = {}
        for flag in ("init", "vae", "whisper", "syncnet", "judge", "videomae", "stable_diffusion"):
            if getattr(self.args, flag):
                path = find_checkpoint(getattr(self.args, flag))
                hashes[flag] = content_hash(path, 2**20) if Path(path).is_file() else str(path)
        return hashes

    @torch.no_grad()
    def prepare(self, batch, generator):
        """(latents (B, 4, F, h, w), condition (B, 9, F, h, w), audio (B, F, A, C), frames (B, F, 3, H, W), mel)."""
        (clips, references), (audio, mel), _ = batch
        true = to_input(clips.flatten(0, 1), self.device)
        references = to_input(references.flatten(0, 1), self.device)
        z = self.autoencoder.encode(true).sample(generator)
        condition = latentsync.encode_condition(self.autoencoder, true * self.mask, references, self.mask, generator)

        def to_clips(x):
            return x.float().unflatten(0, clips.shape[:2])
        return (to_clips(z).transpose(1, 2), to_clips(condition).transpose(1, 2), audio.to(self.device), to_clips(true),
                mel.to(self.device)[:, None])

    def loss(self, batch, step, generator):
        z, condition, audio, true, mel = self.prepare(batch, generator)
        has_audio = torch.ones(len(z), device=self.device)
        if self.args.drop_audio:
            draws = torch.rand(len(z), generator=generator, device=self.device)
            has_audio = (draws >= self.args.drop_audio).float()
            audio = audio * has_audio.view(-1, 1, 1, 1)
        noise_loss, clean = self.model.loss(z, condition, audio, generator)
        if self.supervision is None:
            return noise_loss, {}
        pixel_loss, losses = self.supervision(clean, true, mel, has_audio)
        return noise_loss + pixel_loss, {"noise": noise_loss, **losses}

    def autocast(self):
        """The precision of training, also when a validation runs outside of the loop."""
        return torch.autocast(self.device.type, DTYPES[self.args.dtype], enabled=self.args.dtype != "fp32")

    def loss_of(self, model, batch, generator):
        z, condition, audio, _, _ = self.prepare(batch, generator)
        with self.autocast():
            return model.loss(z, condition, audio, generator)[0], {}

    def val_batches(self):
        F = self.args.frames
        items = [(i % len(self.val_set), (i,)) for i in range(max(1, 128 // F))]
        size = max(1, 32 // F)
        return [items[start:start + size] for start in range(0, len(items), size)]

    def validate(self, model):
        """The noise loss on unseen people, always with the same noise, and how well some of them are painted."""
        return super().validate(model) | self.scores_of_painted(model, self.args.val_videos)

    def paint(self, model, index):
        """(painted, true faces (N, 3, H, W) in [-1, 1], sound) of an unseen video; model=None returns true faces twice.

        The reference shows other moments of the video, so that nothing can be copied.
        """
        F = self.args.frames
        clips = self.args.val_clips * -(-16 // F)
        items = [(index, (index,))]
        (scene,), _ = clip_items(self.val_set, items, lambda i, seed: self.val_set.scene(i, seed, clips))
        frames, references, audio, sound, start = scene
        sound = sound[start * SAMPLE_RATE // FPS:]
        true = to_input(frames, self.device)
        if model is None:
            return true, true, sound
        references = to_input(references, self.device)
        generator = torch.Generator(self.device).manual_seed(index)
        side = model.config.resolution // self.autoencoder.config.stride
        z = torch.randn(1, model.config.out_channels, 1, side, side, generator=generator, device=self.device)
        painted = []
        for first in range(0, len(true), F):
            clip = slice(first, first + F)
            with self.autocast():
                faces, _ = latentsync.paint(
                    model, self.autoencoder, true[clip], audio[clip].to(self.device), z, self.mask, generator,
                    self.STEPS, self.args.sampling["cfg"], references=references[clip])
            painted.append(faces.float())
        return torch.cat(painted).clamp(-1, 1), true, sound

    @torch.no_grad()
    def scores_of_painted(self, model, videos):
        """Means over unseen videos of `compare_faces`; with a SyncNet also its confidence and the offset it finds."""
        def score_video(index):
            painted, true, sound = self.paint(model, index)
            scores = compare_faces(painted, true, self.mask)
            if self.judge is not None:
                faces = painted.add(1).mul(127.5).round().clamp(0, 255).byte()
                try:
                    score = score_aligned(self.judge, faces, sound)
                    scores |= {"sync_c": score.confidence, "offset": float(abs(score.offset))}
                except ValueError:                                          # the clip is too short for it
                    scores |= {"sync_c": math.nan, "offset": math.nan}
            return scores
        rows = self.shared(range(min(videos, len(self.val_set))), score_video, "painting")
        return {name: float(np.nanmean([row[name] for row in rows] or [math.nan])) for name in rows[0]}

    @torch.no_grad()
    def show(self, model, path):
        """Save every second frame of up to three unseen people, true above painted.

        With PyAV also a video of the first one, true beside painted, with the sound.
        """
        rows = []
        for index in range(min(3, self.args.val_videos, len(self.val_set))):
            self.stop_if_interrupted()
            painted, true, sound = self.paint(model, index)
            rows += [true[:16:2], painted[:16:2]]
            if index == 0:
                both = to_pixels(torch.cat([true, painted], 3).add(1).div(2))
                writer = VideoWriter(path.with_suffix(".mp4"), *both.shape[1:3], sound=sound)
                with suppress(MissingPackage), writer as video:
                    for frame in both:
                        video.write(frame)
        pictures = grid(to_pixels(torch.cat(rows).add(1).div(2)), len(rows[0]))
        save_png(path.with_suffix(".png"), pictures)

    def save(self, model, path, dtype):
        latentsync.save(model, path, dtype, tokenizer=self.latents, sampling=self.args.sampling, stage=self.args.stage)
