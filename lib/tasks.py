"""What the image models learn from a batch: model, loss, validation, a picture, and the file that sample.py reads."""
import math
import re
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import infinity
import llamagen
import var
import vq
from lib import losses
from lib.caches import FeatureCache, TokenCache
from lib.console import Interrupted, UserError, check_pixels, rank_and_world
from lib.data import PictureFolder, spread
from lib.parallel import all_gather_objects, data_parallel, full_model, gradient_sync
from lib.pictures import grid, psnr, save_png, to_input, to_pixels
from lib.text import WORD_T5, T5Encoder, load_infinity, load_llamagen, load_t5, save_t5
from lib.weights import check_fingerprint, check_kind, content_hash, read_metadata, warm_start

VAL_PICTURES = 1024                             # largest number that is validated
MOST_CROPS = 1000                               # of a picture that are tokenized before training


class Task:
    """What all tasks have in common. Subclasses have setup, loss or loss_of, validate, picture (or show) and save.

    Several processes share a validation, and all of them get the same scores.
    """

    metrics = []                                # columns of the log besides the loss
    val_metrics = ["loss"]
    tokens_per_picture = 0                      # 0: nothing is counted in tokens
    most_val_pictures = VAL_PICTURES
    unused_weights = False                      # whether some weights get no gradient in some steps
    interrupted = staticmethod(lambda: False)   # whether a signal has arrived; the training loop replaces it

    def __init__(self, args, train_set, val_set, device, generator, micro_batches):
        self.args = args
        self.train_set = train_set
        self.val_set = val_set
        self.device = device
        self.micro_batches = micro_batches                                  # in a batch, over all processes
        self.steps = args.steps or args.epochs * -(-len(train_set) // args.batch_size)      # steps of the whole run
        self.learners = {}                      # {name: (module, optimizer)} that are trained besides the model
        self.setup(generator)

    @staticmethod
    def check_args(args):
        """Raise UserError for arguments that no range covers."""

    @staticmethod
    def score(scores):
        """The validation metric to maximise, from a dict of all."""
        return -scores["loss"]

    def loss(self, batch, step, generator):
        """Mean loss and metrics of a micro-batch."""
        return self.loss_of(self.model, batch, generator)

    def after_step(self, step, lr, generator):
        """What else a training step does, after the optimizer -> a dict of metrics for the log."""
        return {}

    def sync_ema(self, ema):
        """Copy to the EMA what must not be averaged."""

    def show(self, model, path):
        """Save a picture of what the model does. The task chooses the suffix of the path."""
        save_png(path.with_suffix(".png"), self.picture(model))

    def identity(self):
        """Fingerprints of frozen networks, which a continued run must have the same."""
        return {}

    def val_items(self):
        """Lists of validation items. Items of different lists never share a batch."""
        return [spread(len(self.val_set), self.most_val_pictures)]

    def val_batches(self):
        """The validation items in batches, which are no larger than those of training."""
        size = max(1, min(32, self.args.batch_size // self.micro_batches))
        return [items[start:start + size] for items in self.val_items() for start in range(0, len(items), size)]

    def map_batches(self, function):
        """[function(batch, generator)] for all validation batches. The processes share the work. Collective.

        Raises Interrupted on all processes if a signal has arrived at one of them.
        """
        batches = self.val_batches()

        def result_of(k):
            batch = self.val_set.__getitems__(batches[k])
            return function(batch, torch.Generator(self.device).manual_seed(k))
        return self.shared(range(len(batches)), result_of, "validating")

    def shared(self, numbers, result_of, what):
        """[result_of(k) for k in numbers], of which every process computes its share. Collective. Raises Interrupted.
        """
        rank, world = rank_and_world()
        own = {}
        for k in tqdm(numbers[rank::world], desc=what, leave=False, disable=True if rank else None):
            if self.interrupted():
                break
            own[k] = result_of(k)
        parts = all_gather_objects((own, self.interrupted()))
        if any(interrupted for _, interrupted in parts):
            raise Interrupted
        results = {k: result for own, _ in parts for k, result in own.items()}
        return [results[k] for k in numbers]

    def stop_if_interrupted(self):
        """Raise Interrupted if a signal has arrived. Between two pictures."""
        if self.interrupted():
            raise Interrupted

    @torch.no_grad()
    def validate(self, model):
        """Means over the validation items of the scalars that `loss_of` returns. Eval mode drops no conditions."""
        def scores(batch, generator):
            loss, metrics = self.loss_of(model, batch, generator)
            metrics = metrics | {"loss": loss}
            return {name: value.item() for name, value in metrics.items() if value.dim() == 0}
        results = self.map_batches(scores)
        sizes = [len(items) for items in self.val_batches()]
        means = {}
        for name in results[0]:
            means[name] = sum(result[name] * size for size, result in zip(sizes, results)) / sum(sizes)
        return means


class TokenizerTask(Task):
    """`train.py vq`: pixel, quantizer, LPIPS and adversarial losses. Codes start from features and are restarted."""

    metrics = ["l1", "l2", "lpips", "adv", "vq", "usage", "disc", "restarted"]
    val_metrics = ["psnr", "usage"]
    unused_weights = True                                                   # the codebook, before it is in use
    load = staticmethod(vq.load)

    @staticmethod
    def check_args(args):
        if bool(args.lpips) != bool(args.lpips_weight):
            raise UserError("LPIPS needs both: --lpips VGG16 HEADS (torchvision's vgg16-397923af.pth, LPIPS' vgg.pth) "
                            "and a --lpips-weight above 0; with --lpips-weight 0 training goes without it")
        if args.decoder_only and (not args.init or args.warm_steps):
            raise UserError("--decoder-only: goes with --init, whose tokens stay as they are, and with --warm-steps 0")
        if args.patch_nums and vq.as_pairs(args.patch_nums) != sorted(set(vq.as_pairs(args.patch_nums))):
            raise UserError(f"--patch-nums {' '.join(map(str, args.patch_nums))}: expected sides that grow")

    @staticmethod
    def score(scores):
        return scores["psnr"]

    def build(self, config):
        cells, _ = vq.as_pairs(config.patch_nums)[-1]
        if self.args.size != config.stride * cells:
            raise UserError(f"--size {self.args.size}: recipe {self.args.recipe} has stride {config.stride} and ends "
                            f"with a {cells}x{cells} map; use --size {config.stride * cells}")
        return vq.build(vq.VQVAE, config)

    def setup(self, generator):
        args = self.args
        config = vq.CONFIGS[args.model]
        if args.patch_nums:
            config = replace(config, patch_nums=tuple(args.patch_nums))
        self.model = self.build(config).to(self.device)
        self.model.init_weights(generator)
        if args.init:
            warm_start(self.model, self.load(args.init), f"--init {args.init}")
        if args.decoder_only:
            self.model.requires_grad_(False)
            for part in (self.model.post_quant_conv, self.model.decoder):
                part.requires_grad_(True)
        discriminator = None
        if args.disc_weight:
            patch = args.disc == "patch"
            discriminator = losses.PatchDiscriminator() if patch else losses.StyleDiscriminator(args.size)
            discriminator.to(self.device)
            discriminator.init_weights(generator)
            optimizer = torch.optim.AdamW(discriminator.parameters(), args.lr, args.betas, weight_decay=0.0)
            self.learners["discriminator"] = discriminator, optimizer
        lpips = losses.load_lpips(*args.lpips).to(self.device) if args.lpips else None
        self.criterion = losses.TokenizerLoss(
            lpips, discriminator, l1=args.l1, l2=args.l2, lpips_weight=args.lpips_weight, disc_weight=args.disc_weight,
            disc_start=args.disc_start, adaptive=args.adaptive, gan=args.gan)
        if discriminator is not None:
            self.discriminator_engine = data_parallel(discriminator, self.criterion.discriminator_loss)
        self.pairs = []                                                     # (picture, reconstruction) of this step
        self.step_of_pairs = 0
        self.restarted = None                                               # codes that this step moved, (V,) bool
        self.has_codes = None                                               # whether the codebook is initialised

    def loss(self, batch, step, generator):
        image = to_input(batch[0], self.device)
        if self.has_codes is None:                                          # a continued run has codes by then
            self.has_codes = step >= self.args.warm_steps
        rec, vq_loss, usage = self.model(image, quantize=step >= self.args.warm_steps)
        loss, metrics = self.reconstruction_loss(image, rec.float(), vq_loss, step)
        return loss, metrics if usage is None else metrics | {"usage": usage}           # (K,) one number per scale

    def identity(self):
        """The networks that judge and the start, by content."""
        files = [*(self.args.lpips or ()), *([self.args.init] if self.args.init else [])]
        return {f"content of {path}": content_hash(path, 2**20) for path in files if Path(path).is_file()}

    def reconstruction_loss(self, image, rec, vq_loss, step):
        """The criterion's loss and its parts. The pictures are kept for the discriminator's turn."""
        if self.step_of_pairs != step:
            self.pairs = []
            self.step_of_pairs = step
        self.pairs.append((image, rec.detach()))
        if self.criterion.adversarial(step):
            self.criterion.discriminator.requires_grad_(False)              # it learns in its own turn only
        return self.criterion(image, rec, vq_loss, step, self.model.decoder.conv_out.weight)

    def after_step(self, step, lr, generator):
        """The discriminator's update, and codebook initialisation or restarts."""
        args = self.args
        metrics = {}
        self.restarted = None
        if self.criterion.adversarial(step):
            metrics["disc"] = self.update_discriminator(lr)
        starts = not self.has_codes and step + 1 >= args.warm_steps         # later, if that step was skipped
        may_restart = args.restart_after and not args.decoder_only
        restarts = may_restart and step % 50 == 49 and args.warm_steps < step < args.restart_until * self.steps
        if not starts and not restarts:
            return metrics
        with self.shared_codebook(self.model) as model, torch.no_grad():
            index = torch.randint(len(self.train_set), (128,), generator=generator, device=self.device).tolist()
            pixels, _, _ = self.train_set.__getitems__([(i, (i,)) for i in index])
            features = model.encode(to_input(pixels, self.device))          # codes are taken from these
            unused = model.quantize.steps_unused                            # counted in forward passes
            if starts:
                self.has_codes = True
                self.restarted = torch.ones_like(unused, dtype=torch.bool)
                model.quantize.init_codebook(features, generator)
            else:
                self.restarted = unused > args.restart_after * self.micro_batches
                count = model.quantize.restart_codes(features, self.restarted, generator)
                metrics["restarted"] = torch.tensor(float(count))
        return metrics

    @contextmanager
    def shared_codebook(self, model):
        """Change the codebook: all processes do the same, and then take rank 0's. Collective."""
        with full_model(model, write=True) as model:
            yield model
            if dist.is_initialized():
                dist.broadcast(model.quantize.codebook.data, 0)

    def sync_ema(self, ema):
        """Codes that jumped jump in the EMA too, or it would hold dead codes for thousands of steps."""
        if self.restarted is not None:
            with full_model(self.model) as model, self.shared_codebook(ema) as ema:
                ema.quantize.codebook.data[self.restarted] = model.quantize.codebook.data[self.restarted]

    def update_discriminator(self, lr):
        """One optimizer step of the discriminator on the pictures of this step -> its loss."""
        discriminator, optimizer = self.learners["discriminator"]
        discriminator.requires_grad_(True)
        losses_of_pairs = []
        for i, (image, rec) in enumerate(self.pairs):
            with gradient_sync(self.discriminator_engine, last=i + 1 == len(self.pairs)):
                loss = self.discriminator_engine(image, rec)
                (loss / len(self.pairs)).backward()
            losses_of_pairs.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(discriminator.parameters(), self.args.clip)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses_of_pairs).mean()

    @torch.no_grad()
    def validate(self, model):
        """Mean PSNR in dB of the validation pictures, and the percentage of codes that they use."""
        def reconstruct(batch, generator):
            image = to_input(batch[0], self.device)
            indices = model.tokenize(image)
            return psnr(model.detokenize(indices), image).cpu(), torch.cat(indices, 1).cpu()
        scores, tokens = zip(*self.map_batches(reconstruct))
        usage = model.quantize.coverage([torch.cat(tokens)], model.config)
        return {"psnr": torch.cat(scores).mean().item(), "usage": usage}

    @torch.no_grad()
    def picture(self, model):
        """Validation pictures, each beside its reconstruction."""
        image = to_input(self.val_set.__getitems__(spread(len(self.val_set), 32))[0], self.device)
        pairs = torch.stack([image, model.reconstruct(image)], 1).flatten(0, 1)
        return grid(to_pixels(pairs.add(1).div(2)), 8)

    def save(self, model, path, dtype):
        vq.save(model, path, dtype, size=self.args.size)


class AutoencoderTask(TokenizerTask):
    """`train.py vq` for an autoencoder with a KL head: the KL divergence replaces the quantizer's loss."""

    metrics = ["l1", "l2", "lpips", "adv", "vq", "disc"]
    val_metrics = ["psnr", "std"]
    load = staticmethod(vq.load_autoencoder)

    def build(self, config):
        if self.args.size % config.stride:
            raise UserError(f"--size {self.args.size}: expected a multiple of {config.stride}")
        return vq.build(vq.KLAutoencoder, config)

    def loss(self, batch, step, generator):
        image = to_input(batch[0], self.device)
        rec, kl = self.model(image, generator)
        return self.reconstruction_loss(image, rec.float(), self.args.kl_weight * kl, step)

    def after_step(self, step, lr, generator):
        return {"disc": self.update_discriminator(lr)} if self.criterion.adversarial(step) else {}

    @torch.no_grad()
    def validate(self, model):
        """Mean PSNR in dB over the validation pictures, and the standard deviation of scaled latents."""
        def reconstruct(batch, generator):
            image = to_input(batch[0], self.device)
            latents = model.encode(image).sample()
            return psnr(model.decode(latents).clamp(-1, 1), image).cpu(), latents.cpu()
        scores, latents = zip(*self.map_batches(reconstruct))
        return {"psnr": torch.cat(scores).mean().item(), "std": torch.cat(latents).std().item()}

    @torch.no_grad()
    def save(self, model, path, dtype):
        """With the scaling that gives latents a standard deviation of 1, measured on the validation pictures."""
        latents = []
        for items in self.val_batches():
            image = to_input(self.val_set.__getitems__(items)[0], self.device)
            latents.append(model.encode(image).sample())
        config = model.config
        model.config = replace(config, scaling=config.scaling / max(torch.cat(latents).std().item(), 1e-6))
        super().save(model, path, dtype)
        model.config = config


def check_tokenizer(args):
    """Raise UserError without a tokenizer."""
    if args.vae is None:
        raise UserError("--vae: give the trained tokenizer, a file of train.py vq or a released one")


class TransformerTask(Task):
    """What the three transformers have in common. Their tokenizers are frozen.

    Subclasses have `draw(model, what, generators)`, which samples pictures of classes or captions.
    """

    @staticmethod
    def check_args(args):
        check_tokenizer(args)
        views = []
        if args.model_name == "llamagen" and not args.captions and args.data != "demo":
            views = list(PictureFolder.VIEWS)
        is_count = re.fullmatch("[0-9]{1,4}", args.cache_crops) and int(args.cache_crops) <= MOST_CROPS
        if not is_count and args.cache_crops not in views:
            raise UserError(f"--cache-crops {args.cache_crops}: expected "
                            f"{' or '.join([f'a number up to {MOST_CROPS}', *views])}")

    def identity(self):
        identity = {"tokenizer": vq.fingerprint(self.tokenizer)}
        if self.args.lora:
            identity["frozen weights"] = content_hash(self.args.init, 2**20)    # no checkpoint has them
        return identity

    def cache_tokens(self, patch_nums):
        """With --cache-crops, replace the data sets by their tokens."""
        crops = self.args.cache_crops
        if crops != "0":
            options = dict(tokenizer=self.tokenizer, patch_nums=patch_nums, device=self.device, folder=self.args.out,
                           workers=self.args.workers)
            self.train_set = TokenCache(self.train_set, crops=crops, tag="train", **options)
            self.val_set = TokenCache(self.val_set, crops="1", tag="val", **options)

    def tokens(self, batch, patch_nums):
        """Token indices per scale, from cached tokens or from pictures."""
        if batch[0].dim() == 2:
            return batch[0].to(self.device).split([h * w for h, w in vq.as_pairs(patch_nums)], 1)
        with torch.autocast(self.device.type, enabled=False):               # half precision would change tokens
            return self.tokenizer.tokenize(to_input(batch[0], self.device), patch_nums)

    @torch.no_grad()
    def picture(self, model):
        """A sample of each of 32 classes, or of captions of training (upper half) and validation pictures."""
        if self.args.captions:
            what = [data.__getitems__([item])[1][0] for data in (self.train_set, self.val_set)
                    for item in spread(len(data), 16)]
        else:
            what = torch.tensor([i for i, _ in spread(len(self.classes), 32)])
        images = []
        for start in range(0, len(what), 4):                                # few at a time, to save memory
            self.stop_if_interrupted()
            few = what[start:start + 4]
            seeds = range(start, start + len(few))
            images.append(self.draw(model, few, [torch.Generator(self.device).manual_seed(seed) for seed in seeds]))
        return grid(to_pixels(torch.cat(images)), 8)


class VARTask(TransformerTask):
    """`train.py var`: cross entropy of every token, given the class and all coarser scales."""

    metrics = ["accuracy", "tail_loss", "tail_accuracy"]
    val_metrics = ["loss", "accuracy", "tail_loss", "tail_accuracy"]

    @staticmethod
    def score(scores):
        return -scores["tail_loss"]                                         # the authors use that of the last scale

    def setup(self, generator):
        args = self.args
        self.classes = self.train_set.classes
        config = replace(var.CONFIGS[args.model], num_classes=len(self.classes))
        if args.depth:
            width = config.width // config.depth * args.depth
            config = replace(config, depth=args.depth, width=width, heads=args.depth)
        if args.patch_nums:
            config = replace(config, patch_nums=tuple(args.patch_nums))
        self.tokenizer = vq.load(args.vae, patch_nums=config.patch_nums).to(self.device)
        if args.init:
            of_classes = torch.Generator().manual_seed(args.seed)           # draws new class embeddings
            self.model = var.load(args.init, num_classes=len(self.classes), generator=of_classes).to(self.device)
            check_fingerprint(self.tokenizer, args.vae, read_metadata(args.init), args.init)
        else:
            t = self.tokenizer.config
            config = replace(config, vocab_size=t.vocab_size, z_channels=t.z_channels)
            self.model = vq.build(var.VAR, config).to(self.device)
            self.model.init_weights(args.init_gamma, generator)
        self.patch_nums = self.model.config.patch_nums
        check_kind(self.model, self.tokenizer, f"--vae {args.vae}", "train one with train.py vq, or give a released "
                   "one")
        self.check_scales()
        self.tokens_per_picture = sum(p * p for p in self.patch_nums)
        self.cache_tokens(self.patch_nums)

    def check_scales(self):
        """Raise UserError unless --patch-nums, the model, its tokenizer and --size agree."""
        args = self.args
        scales = " ".join(map(str, self.patch_nums))
        if args.patch_nums and tuple(args.patch_nums) != tuple(self.patch_nums):
            raise UserError(f"--init {args.init}: has the scales {scales}, which --patch-nums cannot change")
        # Released tokenizers do not say which scales they were trained on, and serve several schedules.
        trained_on = read_metadata(args.vae).get("config", {}).get("patch_nums", self.patch_nums)
        if tuple(trained_on) != tuple(self.patch_nums):
            theirs = " ".join(map(str, trained_on))
            raise UserError(f"--vae {args.vae}: was trained on the scales {theirs}, but the model has {scales}; use "
                            f"--patch-nums {theirs}, or another tokenizer")
        stride = self.tokenizer.config.stride
        side = stride * self.patch_nums[-1]
        if args.size != side:
            raise UserError(f"--size {args.size}: {args.vae} has {stride} pixels per token and {args.recipe} ends with "
                            f"{self.patch_nums[-1]}x{self.patch_nums[-1]} tokens, {side} pixels; use --size {side}, or "
                            "another tokenizer")

    def loss_of(self, model, batch, generator):
        indices = self.tokens(batch, self.patch_nums)
        features = self.tokenizer.quantize.teacher_input(indices, self.patch_nums)
        labels = batch[1].to(self.device)
        return model.loss(labels, torch.cat(tuple(indices), 1), features, generator=generator)

    def draw(self, model, what, generators):
        return model.sample(self.tokenizer, what, generator=generators, **self.args.sampling)

    def save(self, model, path, dtype):
        show = [c for c in self.args.show if c in self.classes]
        var.save(model, path, dtype, classes=self.classes, show=show, sampling=self.args.sampling,
                 tokenizer=vq.fingerprint(self.tokenizer))


def small_t5(args):
    """The text encoder that is trained along, or None with --t5."""
    if not args.t5:
        return T5Encoder(WORD_T5)
    return None


def start_text(encoder, args):
    """Start the text encoder from --init-text, if it is given."""
    if not args.init_text:
        return
    flag = f"--init-text {args.init_text}"
    if encoder is not None:
        warm_start(encoder, load_t5(args.init_text, encoder.config.width), flag)
    elif not args.t5:
        raise UserError(f"{flag}: this run trains no text encoder; use recipe emoji_text")


class CaptionReader(torch.nn.Module):
    """T5's encoder, and a network that predicts a coarse picture from the mean of its features."""

    SIDE = 8                                                                # of the picture, in pixels

    def __init__(self, config):
        super().__init__()
        self.t5 = T5Encoder(config)
        self.head = torch.nn.Sequential(torch.nn.Linear(config.width, 2 * config.width), torch.nn.GELU(),
                                        torch.nn.Linear(2 * config.width, 3 * self.SIDE**2))

    def forward(self, captions):
        """B texts -> (B, 3, 8, 8) in [-1, 1]."""
        features, mask = self.t5.encode(captions)
        if mask is None:
            mean = features.mean(1)
        else:
            mean = (features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(mean).unflatten(1, (3, self.SIDE, self.SIDE))


class T5Task(Task):
    """`train.py t5`: a text encoder for the demo, which learns what colors captions speak of, and where they are.

    It stands for Flan-T5, which has read much text before Infinity and LlamaGen are trained. Without it they learn
    their training pictures by heart before they pay attention to captions.
    """

    def setup(self, generator):
        self.model = vq.build(CaptionReader, WORD_T5).to(self.device)
        with torch.no_grad():
            vq.init_default(self.model.head, generator)
        self.model.t5.init_weights(generator)

    def loss_of(self, model, batch, generator):
        image = to_input(batch[0], self.device)
        coarse = F.avg_pool2d(image, image.shape[-1] // model.SIDE)
        return F.mse_loss(model(batch[1]), coarse), {}

    @torch.no_grad()
    def picture(self, model):
        """Unseen pictures, made coarse, and what their captions say."""
        items = spread(len(self.val_set), 32)
        pixels, captions, _ = self.val_set.__getitems__(items)
        coarse = F.avg_pool2d(to_input(pixels, self.device), pixels.shape[-1] // model.SIDE)
        rows = torch.stack([coarse.unflatten(0, (4, 8)), model(captions).unflatten(0, (4, 8))], 1)
        return grid(to_pixels(rows.flatten(0, 2).add(1).div(2).clamp(0, 1)), 8)

    def save(self, model, path, dtype):
        save_t5(model.t5, path, dtype)


class InfinityTask(TransformerTask):
    """`train.py infinity`: cross entropy of every bit, given the text and all coarser scales, where some bits are
    flipped (bitwise self-correction). T5 is frozen, unless a small T5 on words is trained along.
    """

    metrics = ["bit_accuracy", "token_accuracy", "scale_accuracy"]
    val_metrics = ["loss", "bit_accuracy", "token_accuracy"]

    @staticmethod
    def check_args(args):
        check_tokenizer(args)
        check_pixels(args.pixels)

    def setup(self, generator):
        args = self.args
        self.tokenizer = vq.load(args.vae).to(self.device)
        if args.init:
            place = "cpu" if args.lora else self.device                     # a GPU may have no room for it otherwise
            self.model = load_infinity(args.init, device=place).to(self.device)
        else:
            encoder = small_t5(args)
            config = infinity.CONFIGS[args.model]
            d = self.tokenizer.config.z_channels
            config = replace(config, bits=4 * d if config.patchify else d,
                             levels=max(config.levels, len(self.scales())),         # the demo's has 5, --pixels more
                             text_width=encoder.config.width if encoder else 2048)
            self.model = vq.build(infinity.Infinity, config, encoder).to(self.device)
            self.model.init_weights(args.init_gamma, generator)
            start_text(encoder, args)
        check_kind(self.model, self.tokenizer, f"--vae {args.vae}", f"give the one that {args.init or args.model} goes "
                   "with")
        if len(self.scales()) > self.model.config.levels:
            raise UserError(f"--pixels {args.pixels}: has {len(self.scales())} scales, but {args.init} has only "
                            f"{self.model.config.levels}; choose fewer pixels")
        for data in (self.train_set, self.val_set):
            data.pixels_per_token = self.tokenizer.config.stride * (self.model.config.patchify + 1)
        self.tokens_per_picture = sum(h * w for h, w in self.scales()[:args.scales or None])
        self.t5 = self.model.text_encoder
        if self.t5 is None and not args.t5:
            raise UserError(f"--init {args.init}: has no text encoder of its own: give one as --t5 DIR")
        if self.t5 is None:
            self.t5 = load_t5(args.t5, self.model.config.text_width, device=self.device).requires_grad_(False)

    def encode(self, model, captions):
        """Features and mask of captions, with gradients if the text encoder is trained along."""
        trained = model.text_encoder is not None
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return (model.text_encoder if trained else self.t5).encode(captions, model.config.text_maxlen)

    def scales(self, aspect=1.0):
        """The schedule of pictures of an aspect ratio."""
        if self.args.pixels:
            return vq.schedule(aspect, self.args.pixels)
        return vq.as_pairs(self.tokenizer.config.patch_nums)

    def loss_of(self, model, batch, generator, **options):
        with torch.autocast(self.device.type, enabled=False), torch.no_grad():          # half precision changes bits
            image = to_input(batch[0], self.device)
            scales = self.scales(image.shape[2] / image.shape[3])
            f = self.tokenizer.encode(image)
            inputs, labels = infinity.self_correct(self.tokenizer.quantize, f, scales, self.args.strength,
                                                   patchify=model.config.patchify, generator=generator)
        if self.args.scales:
            inputs = inputs[:, :sum(h * w for h, w in scales[:self.args.scales]) - 1]
        return model.loss(*self.encode(model, batch[1]), inputs, labels, scales, generator=generator, **options)

    def loss(self, batch, step, generator):
        return self.loss_of(self.model, batch, generator, reweight=self.args.reweight)

    def val_items(self):
        groups = getattr(self.val_set, "groups", [np.arange(len(self.val_set))])        # one size each
        most = self.most_val_pictures // len(groups)
        return [[(int(group[i]), None) for i, _ in spread(len(group), most)] for group in groups]

    def draw(self, model, what, generators):
        return model.sample(self.tokenizer, *self.encode(model, what), scales=self.scales(), generator=generators,
                            **self.args.sampling)

    def save(self, model, path, dtype):
        infinity.save(model, path, dtype, show=self.args.show, sampling=self.args.sampling,
                      tokenizer=vq.fingerprint(self.tokenizer), pixels=self.args.pixels)


class LlamaGenTask(TransformerTask):
    """`train.py llamagen`: cross entropy of every token, given the class or text and all tokens before it.

    T5 is frozen and its features are computed once, unless a small T5 on words is trained along.
    """

    metrics = ["accuracy"]
    val_metrics = ["loss", "accuracy"]

    def setup(self, generator):
        args = self.args
        self.tokenizer = vq.load(args.vae).to(self.device)
        stride = self.tokenizer.config.stride
        if args.size % stride:
            raise UserError(f"--size {args.size}: expected a multiple of {stride}, the stride")
        side = args.size // stride
        config = llamagen.CONFIGS[args.model]
        self.classes = [] if config.text_width else self.train_set.classes
        encoder = None
        t5 = None
        if config.text_width and args.t5:
            t5 = load_t5(args.t5, args.text_width, device=self.device)
        elif config.text_width:
            encoder = small_t5(args)
        text_width = (encoder or t5).config.width if config.text_width else 0
        config = replace(config, side=side, num_classes=len(self.classes), text_width=text_width, dropout=args.dropout,
                         vocab_size=self.tokenizer.config.vocab_size)
        if args.lora:
            self.model = self.frozen_base(side, generator).to(self.device)
        else:
            self.model = vq.build(llamagen.LlamaGen, config, encoder).to(self.device)
            self.model.init_weights(generator)
            start_text(encoder, args)
        if args.init and not args.lora:
            warm_start(self.model, load_llamagen(args.init, side=side), f"--init {args.init}")
        if args.init:
            check_fingerprint(self.tokenizer, args.vae, read_metadata(args.init), args.init)
        check_kind(self.model, self.tokenizer, f"--vae {args.vae}", "train one with train.py vq --recipe "
                   "llamagen_emoji, or give a released one")
        self.shape = ((side, side),)
        self.tokens_per_picture = side * side
        self.features = None
        if t5 is not None:
            captions = sorted({caption for data in (self.train_set, self.val_set) for i in range(len(data))
                               for caption in data.captions(i)})
            self.features = FeatureCache(captions, t5, config.text_slots, args.clean, args.out)
        self.cache_tokens(self.shape)

    def frozen_base(self, side, generator):
        """The model of --init, for --lora. If it has another number of classes, their table starts anew."""
        model = load_llamagen(self.args.init, side=side)
        if model.config.text_width and model.text_encoder is None and not self.args.t5:
            raise UserError(f"--init {self.args.init}: has no text encoder of its own: give one as --t5 DIR")
        config = replace(model.config, dropout=self.args.dropout)
        if self.classes and config.num_classes != len(self.classes):
            table = torch.nn.Embedding(len(self.classes) + 1, config.width, device=self.device)
            table.weight.data.normal_(0, 0.02, generator=generator)
            table.weight.data[-1] = model.class_embed.weight[-1]            # the null class
            model.class_embed = table
            config = replace(config, num_classes=len(self.classes))
        model.config = config
        return model

    def condition(self, model, what):
        """Labels (B,) or captions -> conditions, and the mask of texts or None."""
        if not model.config.text_width:
            return what.to(self.device), None
        if self.features is not None:
            rows = [self.features[caption].to(self.device) for caption in what]
        else:
            features, mask = model.text_encoder.encode(what, model.config.text_slots)
            rows = features if mask is None else [f[:n] for f, n in zip(features, mask.sum(1).tolist())]
        text, mask = llamagen.left_pad(rows, model.config.text_slots)
        return text, mask.to(self.device)

    def loss_of(self, model, batch, generator):
        tokens, = self.tokens(batch, self.shape)
        cond, text_mask = self.condition(model, batch[1])
        return model.loss(cond, tokens, text_mask, generator=generator)

    def draw(self, model, what, generators):
        return model.sample(self.tokenizer, *self.condition(model, what), generator=generators, **self.args.sampling)

    def save(self, model, path, dtype):
        show = [c for c in self.args.show if c in self.classes or not self.classes]
        extra = {"text_encoder": asdict(model.text_encoder.config)} if model.text_encoder is not None else {}
        llamagen.save(model, path, dtype, classes=self.classes, show=show, sampling=self.args.sampling,
                      tokenizer=vq.fingerprint(self.tokenizer), **extra)
