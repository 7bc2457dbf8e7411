"""What tokenizers and autoencoders are trained with: LPIPS, two discriminators, and the loss that combines them."""
import math
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

import vq


class LPIPS(nn.Module):
    """Learned perceptual distance (arXiv 1801.03924): weighted differences of VGG16 features after relu 1_2, 2_2, 3_3,
    4_3 and 5_3. Frozen.

    Inputs in [-1, 1] (B, 3, H, W); returns (B,). Official keys: `net.slice{1..5}.{n}`, n being the layer's number in
    torchvision's vgg16().features, and `lin{0..4}.model.1`.
    """

    SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))     # numbers of the 3x3 convolutions
    WIDTHS = (64, 128, 256, 512, 512)

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict()
        self.lin = nn.ModuleList()
        c_in = 3
        for i, (numbers, width) in enumerate(zip(self.SLICES, self.WIDTHS), 1):
            layers = OrderedDict()
            for n in numbers:
                layers[str(n)] = nn.Conv2d(c_in, width, 3, padding=1)
                c_in = width
            self.net[f"slice{i}"] = nn.Sequential(layers)
            self.lin.append(nn.Conv2d(width, 1, 1, bias=False))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)                                         # also inside a module that is being trained

    def features(self, x):
        """Unit-normalised features of the five slices."""
        x = (x - self.shift) / self.scale
        for i, convs in enumerate(self.net.values()):
            x = F.max_pool2d(x, 2) if i else x
            for conv in convs:
                x = F.relu(conv(x))
            yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    def forward(self, a, b):
        distance = 0.0
        for lin, f in zip(self.lin, self.features(torch.cat([a, b]))):
            fa, fb = f.chunk(2)
            distance = distance + lin((fa - fb).square()).mean((1, 2, 3))
        return distance


def load_lpips(vgg_path, heads_path):
    """An LPIPS from torchvision's vgg16 weights and the linear heads of LPIPS. Raises vq.CheckpointError."""
    vgg, _ = vq.read_checkpoint(vgg_path)
    heads, _ = vq.read_checkpoint(heads_path)
    vq.require(vgg, "features.28.weight", path=vgg_path, what="torchvision's vgg16")
    vq.require(heads, "lin0.model.1.weight", path=heads_path, what="the linear heads of LPIPS (its vgg.pth)")
    model = LPIPS()
    with vq.understanding(heads_path, "the linear heads of LPIPS"):
        state = {f"lin.{i}.weight": heads[f"lin{i}.model.1.weight"] for i in range(len(model.lin))}
    with vq.understanding(vgg_path, "torchvision's vgg16"):
        for i, numbers in enumerate(LPIPS.SLICES, 1):
            for n in numbers:
                for p in ("weight", "bias"):
                    state[f"net.slice{i}.{n}.{p}"] = vgg[f"features.{n}.{p}"]
    vq.load_strict(model, state, vgg_path)
    return model


class PatchDiscriminator(nn.Module):
    """PatchGAN: (B, 3, H, W) -> real / fake logits of overlapping patches (B, 1, h, w). Official keys `main.{n}`."""

    def __init__(self, width=64, num_layers=3):
        super().__init__()
        layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        c = width
        for i in range(1, num_layers + 1):
            c_out = width * min(2 ** i, 8)
            stride = 2 if i < num_layers else 1
            layers += [nn.Conv2d(c, c_out, 4, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2, True)]
            c = c_out
        self.main = nn.Sequential(*layers, nn.Conv2d(c, 1, 4, 1, 1))

    def forward(self, x):
        return self.main(x)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """DCGAN initialisation: convolutions N(0, 0.02), BatchNorm weights N(1, 0.02), biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                module.weight.normal_(float(isinstance(module, nn.BatchNorm2d)), 0.02, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()


class StyleDiscriminator(nn.Module):
    """The discriminator of StyleGAN2 without its tricks: (B, 3, side, side) -> one logit per picture (B, 1).

    Residual blocks halve the side down to 4; a 1-2-1 blur before each stride avoids aliasing. Official keys
    `blocks.{n}`, `final_conv`, `final_linear`. Raises ValueError for other sides than 8, 16, ... 1024.
    """

    WIDTHS = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}

    def __init__(self, side=256):
        super().__init__()
        if side not in self.WIDTHS or side < 8:
            raise ValueError(f"the discriminator takes pictures of 8, 16, ... 1024 pixels, not {side}")
        self.blocks = nn.ModuleList([nn.Conv2d(3, self.WIDTHS[side], 3, padding=1), nn.LeakyReLU(0.2)])
        while side > 4:
            self.blocks.append(StyleBlock(self.WIDTHS[side], self.WIDTHS[side // 2]))
            side //= 2
        self.final_conv = nn.Sequential(nn.Conv2d(512, 512, 3, padding=1), nn.LeakyReLU(0.2))
        self.final_linear = nn.Sequential(nn.Linear(512 * 16, 512), nn.LeakyReLU(0.2), nn.Linear(512, 1))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.final_linear(self.final_conv(x).flatten(1))

    @torch.no_grad()
    def init_weights(self, generator=None):
        vq.init_default(self, generator)


class StyleBlock(nn.Module):
    """Residual block (B, c_in, H, W) -> (B, c_out, H / 2, W / 2). Dividing by sqrt(2) keeps the variance."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv_res = nn.Conv2d(c_in, c_out, 1, stride=2)
        self.net = nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.LeakyReLU(0.2),
                                 nn.Conv2d(c_out, c_out, 3, padding=1), nn.LeakyReLU(0.2))
        self.downsample = nn.Sequential(Blur(), nn.Conv2d(c_out, c_out, 3, stride=2, padding=1))

    def forward(self, x):
        return (self.downsample(self.net(x)) + self.conv_res(x)) / math.sqrt(2)


class Blur(nn.Module):
    """Convolves each channel with the outer product of 1-2-1, divided by its sum; edges are reflected."""

    def __init__(self):
        super().__init__()
        self.register_buffer("f", torch.tensor([1.0, 2.0, 1.0]))

    def forward(self, x):                                                   # (B, C, H, W)
        kernel = torch.outer(self.f, self.f) / self.f.sum() ** 2
        kernel = kernel.to(x.dtype).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=x.shape[1])


def logit_bce(logits, target):
    """The standard binary cross entropy of logits against 0 or 1, arguments in order."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def swapped_bce(logits, target):
    """LlamaGen's "non-saturating" loss, a slip: the constant is taken for the logit, and the logits for the target.

    It is linear in the logits, and flat where the target is 0, so the discriminator learns nothing from fake pictures.
    """
    return F.binary_cross_entropy_with_logits(torch.full_like(logits, target), logits)


def hinge(real, fake):
    """The discriminator's hinge loss on logits of real and of fake pictures."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def vanilla(real, fake):
    """The discriminator's binary cross entropy on logits of real and of fake pictures."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def negative_mean(fake):
    """The generator's loss beside `hinge` and `vanilla`."""
    return -fake.mean()


GAN_LOSSES = {  # name: (loss of the discriminator on (real, fake) logits, loss of the generator on fake logits)
    "hinge": (hinge, negative_mean),
    "vanilla": (vanilla, negative_mean),
    "non-saturating": (lambda real, fake: logit_bce(real, 1.0) + logit_bce(fake, 0.0),
                       lambda fake: logit_bce(fake, 1.0)),
    "non-saturating-swapped": (lambda real, fake: swapped_bce(real, 1.0) + swapped_bce(fake, 0.0),
                               lambda fake: swapped_bce(fake, 1.0)),
}


class TokenizerLoss(nn.Module):
    """|x - x'| + |x - x'|^2 + quantizer loss + LPIPS + adversarial loss; every part but the quantizer's has a weight.

    lpips: an LPIPS or None. discriminator: a PatchDiscriminator, a StyleDiscriminator or None; it takes part from
    step disc_start on. gan: one of GAN_LOSSES. adaptive: scale the adversarial gradient to the size of the
    reconstruction's, at the last layer (VQGAN, eq. 7).

    The default weights are not those of any released tokenizer. LlamaGen's were trained with l1 = 0 and adaptive off,
    otherwise as here; the weights used for VAR's and Infinity's are not published.
    """

    def __init__(self, lpips=None, discriminator=None, *, l1=1.0, l2=1.0, lpips_weight=1.0, disc_weight=0.5,
                 disc_start=20000, adaptive=True, gan="hinge"):
        super().__init__()
        self.lpips = lpips
        self.discriminator = discriminator
        self.l1 = l1
        self.l2 = l2
        self.lpips_weight = lpips_weight
        self.disc_weight = disc_weight
        self.disc_start = disc_start
        self.adaptive = adaptive
        self.gan_discriminator, self.gan_generator = GAN_LOSSES[gan]

    def adversarial(self, step):
        return self.discriminator is not None and step >= self.disc_start

    def forward(self, image, rec, vq_loss, step, last_layer):
        """The generator's loss (a scalar) and its parts. last_layer: weight of the decoder's last convolution."""
        parts = {"l1": F.l1_loss(rec, image), "l2": F.mse_loss(rec, image)}
        reconstruction = self.l1 * parts["l1"] + self.l2 * parts["l2"]
        if self.lpips is not None:
            parts["lpips"] = self.lpips(rec, image).mean()
            reconstruction = reconstruction + self.lpips_weight * parts["lpips"]
        loss = reconstruction + vq_loss
        if self.adversarial(step):
            parts["adv"] = self.gan_generator(self.discriminator(rec))
            weight = self.balance(reconstruction, parts["adv"], last_layer) if self.adaptive else 1.0
            loss = loss + self.disc_weight * weight * parts["adv"]
        return loss, parts | {"vq": vq_loss}

    @staticmethod
    def balance(reconstruction, adv, last_layer):
        """|gradient of the reconstruction| / |gradient of the adversarial loss| at last_layer, at most 10,000."""
        rec_grad, = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
        adv_grad, = torch.autograd.grad(adv, last_layer, retain_graph=True)
        return (rec_grad.norm() / (adv_grad.norm() + 1e-4)).clamp(0, 1e4).detach()

    def discriminator_loss(self, image, rec):
        """disc_weight / 2 * the discriminator's loss. The BatchNorm statistics of real and fake pictures stay apart."""
        real = self.discriminator(image.detach())
        fake = self.discriminator(rec.detach())
        return self.disc_weight * 0.5 * self.gan_discriminator(real, fake)
