"""The decoder's losses besides L1: LPIPS, Gram, and a GAN whose discriminator reads frozen DINO.

    lpips(x_hat, x) = sum_l mean_hw sum_c w_l,c (u_l(x_hat) - u_l(x))^2,   u = F / |F| over channels
    gram(x_hat, x)  = sum_l mean_cc' (G_l(x_hat) - G_l(x))^2,              G = F F^T / (c h w)

F_l are the maps relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of VGG16. LPIPS: arXiv 1801.03924.
Gram: Gatys et al., CVPR 2016. Scale-RAE (arXiv 2601.16208, section 2) gives Gram the weight 100 but
neither its layers nor its normalisation, so these are our choice. The discriminator is StyleGAN-T's
(arXiv 2301.09515) in the form of the RAE code (arXiv 2510.11690). It computes in fp32 throughout.

Parameter names are the keys of the published files: `features.*` as in torchvision's VGG16,
`lin{0..4}.model.1.weight` as in LPIPS v0.1, `dino.*` and `heads.{i}.*` as in the RAE code.

B batch, N patches (196), d trunk width (384), L number of heads of the discriminator (5).
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------
# VGG16: LPIPS and Gram
# ------------------------------------------------------------------------------------------------

CONVS = (2, 2, 3, 3, 3)                     # convolutions per stage, with a max pool between stages
WIDTHS = (64, 128, 256, 512, 512)           # channels per stage at width 1
TINY_WIDTH = 1 / 8                          # the tiny preset: 8, 16, 32, 64, 64 channels


class Perceptual(nn.Module):
    """A frozen VGG16 with the weights of LPIPS.

    width: factor on the number of channels. dtype: the dtype of the convolutions; the losses are in
    fp32. The LPIPS weights, fitted to human judgements, come from a file. Without one they are 1/C;
    the tiny network keeps 1/C.
    """

    def __init__(self, width=1.0, dtype=torch.float32):
        super().__init__()
        self.width, widths = width, [round(c * width) for c in WIDTHS]
        layers, self.taps, c_in = [], [], 3
        for n, c in zip(CONVS, widths):
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(n):
                layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU()]
                c_in = c
            self.taps.append(len(layers) - 1)               # 3, 8, 15, 22, 29: a stage's last ReLU
        self.features = nn.ModuleList(layers).to(dtype)     # torchvision's numbering
        for i, c in enumerate(widths):
            lin = nn.Conv2d(c, 1, 1, bias=False)
            nn.init.constant_(lin.weight, 1 / c)
            # index 0 is the original's dropout, which is never active here
            self.add_module(f"lin{i}", nn.ModuleDict({"model": nn.Sequential(nn.Identity(), lin)}))
        # LPIPS' input statistics for images in [-1,1]; no file stores them
        for name, value in (("shift", (-.030, -.088, -.188)), ("scale", (.458, .448, .450))):
            value = torch.tensor(value, device="cpu").view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)
        self.eval().requires_grad_(False)

    def maps(self, images):
        """images [B,3,H,W] in [0,1], H and W >= 16 -> five maps [B, c_l, H / 2^l, W / 2^l]."""
        x, out = (2 * images - 1 - self.shift) / self.scale, []
        x = x.to(self.features[0].weight.dtype)
        for i, layer in enumerate(self.features):
            x = layer(x)                                                    # [B, c_l, h, w]
            if i in self.taps:
                out.append(x)
        return out

    def lpips(self, maps_a, maps_b):
        """Two lists of maps -> LPIPS distance [B], fp32."""
        total = 0.0
        for i, (a, b) in enumerate(zip(maps_a, maps_b)):
            a, b = unit(a.float()), unit(b.float())                         # [B, c, h, w]
            w = self.get_submodule(f"lin{i}")["model"][1].weight.float()    # [1, c, 1, 1]
            total = total + F.conv2d((a - b).square(), w).mean(dim=(1, 2, 3))   # [B]
        return total

    def gram(self, maps_a, maps_b, layers=(0, 1, 2, 3, 4)):
        """Two lists of maps -> Gram distance [B], fp32: the mean squared difference of the c x c
        entries, summed over `layers` with weight 1."""
        total = 0.0
        for i in layers:
            a, b = (f.float().flatten(2) for f in (maps_a[i], maps_b[i]))       # [B, c, hw]
            difference = (a @ a.mT - b @ b.mT) / a[0].numel()                   # [B, c, c]
            total = total + difference.square().mean(dim=(1, 2))                # [B]
        return total

    def forward(self, x_hat, x, gram_layers=(0, 1, 2, 3, 4)):
        """Images [B,3,H,W] in [0,1] -> (lpips [B], gram [B]). Gradients reach only x_hat."""
        maps_a = self.maps(x_hat)
        with torch.no_grad():
            maps_b = self.maps(x)
        return self.lpips(maps_a, maps_b), self.gram(maps_a, maps_b, gram_layers)

    def forward_flops(self, side):
        """Return the FLOPs of the maps of one square image, 2 per multiply-add."""
        total = 0
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                side //= 2
            elif isinstance(layer, nn.Conv2d):
                total += 2 * layer.weight.numel() * side ** 2
        return total


def unit(f):
    """Divide a map [B,c,h,w] by its norm over channels + 1e-10, as LPIPS does."""
    # vector_norm, because its gradient where every ReLU is off is 0; that of sqrt(sum) is NaN
    return f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10)


# ------------------------------------------------------------------------------------------------
# The discriminator: a frozen trunk and trained heads
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class DiscConfig:
    """The discriminator's sizes. The defaults are DINO ViT-S/16 with the RAE code's heads."""
    dim: int = 384                          # d
    depth: int = 12
    num_heads: int = 6
    # Blocks whose output gets a head. The last block gets one more, as in the RAE code.
    key_depths: tuple = (2, 5, 8, 11)
    patch: int = 16
    kernel_size: int = 9                    # of the heads' residual convolution; odd
    image_size: int = 224

    def __post_init__(self):
        if not all(k in range(self.depth) for k in self.key_depths):
            raise ValueError(f"key_depths {self.key_depths} of {self.depth} blocks")


TINY_DISC = DiscConfig(dim=64, depth=4, num_heads=4, key_depths=(1, 3), patch=8, image_size=64)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # ImageNet


class Block(nn.Module):
    """A pre-norm transformer block of DINO: [B, 1+N, d] -> [B, 1+N, d]."""

    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d, eps=1e-6), nn.LayerNorm(d, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(d, 3 * d), "proj": nn.Linear(d, d)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(d, 4 * d), "fc2": nn.Linear(4 * d, d)})

    def forward(self, x):
        qkv = self.attn["qkv"](self.norm1(x))                           # [B, 1+N, 3d]
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)                     # [B, heads, 1+N, d/heads]
        x = x + self.attn["proj"](y.transpose(1, 2).flatten(2))         # [B, 1+N, d]
        y = self.mlp["fc1"](self.norm2(x))                              # [B, 1+N, 4d]
        # the tanh GELU, as in the RAE code; DINO itself was trained with the exact (erf) GELU
        return x + self.mlp["fc2"](F.gelu(y, approximate="tanh"))


class Dino(nn.Module):
    """A DINO ViT (arXiv 2104.14294). Its files hold the last `norm`, which the discriminator does
    not use. (The RAE code zeroes the bias of every key, which changes no softmax.)"""

    def __init__(self, config):
        super().__init__()
        d, patch, side = config.dim, config.patch, config.image_size // config.patch
        self.config, self.key_depths, self.image_size = config, config.key_depths, config.image_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, d, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side ** 2, d))
        self.blocks = nn.ModuleList(Block(d, config.num_heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(d, eps=1e-6)
        # From [-1,1] to ImageNet's normalisation: x * scale + shift. On the CPU in meta builds too.
        mean, std = (torch.tensor(v, device="cpu").view(1, 3, 1, 1) for v in (MEAN, STD))
        self.register_buffer("x_scale", 0.5 / std)
        self.register_buffer("x_shift", (0.5 - mean) / std)

    def forward(self, images):
        """images [B,3,H,W] in [0,1] -> L activations [B, d, N]: the last block's, then those of
        key_depths."""
        x, size = 2 * images.float() - 1, (self.image_size, self.image_size)
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        x = self.patch_embed["proj"](x * self.x_scale + self.x_shift)           # [B, d, n, n]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).mT], 1)  # [B, 1+N, d]
        x, out = x + self.pos_embed, []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.key_depths:
                out.append(x[:, 1:].mT)                                         # [B, d, N]
        return [x[:, 1:].mT] + out


class SpectralConv1d(nn.Module):
    """A circular conv1d with the weight W / sigma_max(W) (arXiv 1802.05957). The length stays.

    sigma = u^T W v, with one power iteration per call in train mode and none in eval mode. The
    names weight_orig, weight_u and weight_v are those of torch.nn.utils.spectral_norm.
    """

    def __init__(self, c_in, c_out, kernel):
        super().__init__()
        self.weight_orig = nn.Parameter(torch.zeros(c_out, c_in, kernel))
        self.bias = nn.Parameter(torch.zeros(c_out))
        self.register_buffer("weight_u", torch.zeros(c_out))
        self.register_buffer("weight_v", torch.zeros(c_in * kernel))

    def forward(self, x):                                       # [B, c_in, N] -> [B, c_out, N]
        W = self.weight_orig.flatten(1)                         # [c_out, c_in * kernel]
        if self.training:
            with torch.no_grad():
                self.weight_v.copy_(F.normalize(W.mT @ self.weight_u, dim=0, eps=1e-12))
                self.weight_u.copy_(F.normalize(W @ self.weight_v, dim=0, eps=1e-12))
        # clones: the next call changes the buffers in place, and backward needs these values
        sigma = self.weight_u.clone() @ (W @ self.weight_v.clone())
        pad = self.weight_orig.shape[2] // 2
        x = F.pad(x, (pad, pad), mode="circular") if pad else x
        return F.conv1d(x, self.weight_orig / sigma, self.bias)


class LocalNorm(nn.Module):
    """Batch norm over a virtual batch of one: the statistics of each image and channel, over N."""

    def __init__(self, c):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))

    def forward(self, x):                                       # [B, c, N]
        var, mean = torch.var_mean(x, dim=2, keepdim=True, correction=0)        # [B, c, 1]
        return (x - mean) * torch.rsqrt(var + 1e-6) * self.weight[:, None] + self.bias[:, None]


def conv_block(c, kernel):
    return nn.Sequential(SpectralConv1d(c, c, kernel), LocalNorm(c), nn.LeakyReLU(0.2))


class Residual(nn.Module):
    """(f(x) + x) / sqrt(2), which keeps the variance."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return (self.fn(x) + x) / math.sqrt(2)


class Discriminator(nn.Module):
    """A frozen trunk and L = 1 + len(key_depths) trained heads.

    Call `train()` for the discriminator's step, which takes power iterations, and `eval()` for the
    decoder's step.
    """

    def __init__(self, config=DiscConfig()):
        super().__init__()
        self.config, d = config, config.dim
        self.dino = Dino(config).requires_grad_(False)
        self.heads = nn.ModuleList(
            nn.Sequential(conv_block(d, 1), Residual(conv_block(d, config.kernel_size)),
                          SpectralConv1d(d, 1, 1)) for _ in range(1 + len(config.key_depths)))

    def forward(self, images):
        """images [B,3,H,W] in [0,1] -> logits [B, L*N], high for real images."""
        features = self.dino(images)                                            # L of [B, d, N]
        logits = [head(f).flatten(1) for head, f in zip(self.heads, features)]  # L of [B, N]
        return torch.cat(logits, 1)                                             # [B, L*N]

    def forward_flops(self):
        """Return the FLOPs of one image, 2 per multiply-add, as (frozen trunk, trained heads)."""
        c, d = self.config, self.config.dim
        N = (c.image_size // c.patch) ** 2
        trunk = c.depth * (N + 1) * (12 * d * d + 2 * (N + 1) * d) + 3 * N * c.patch ** 2 * d
        heads = len(self.heads) * N * (d * d + c.kernel_size * d * d + d)
        return 2 * trunk, 2 * heads


# ------------------------------------------------------------------------------------------------
# Augmentation and GAN losses
# ------------------------------------------------------------------------------------------------

def augment(images, draws):
    """Augment images [B,3,H,W] in [0,1] differentiably (DiffAug, arXiv 2006.10738).

    draws: uniform numbers [B,5] in [0,1): two for the translation, then brightness, saturation and
    contrast. The translation is at most 1/8 of the side and fills with grey. As in the RAE code,
    there is no cutout, and the ranges of the last three are those for images in [-1,1].
    """
    x, (_, _, H, W) = 2 * images - 1, images.shape
    dy, dx = round(H / 8), round(W / 8)
    x = F.pad(x, (dx, dx, dy, dy))                                      # [B, 3, H+2dy, W+2dx]
    top = (draws[:, 0] * (2 * dy + 1)).long()                           # [B], 0..2dy
    left = (draws[:, 1] * (2 * dx + 1)).long()                          # [B], 0..2dx
    rows = top[:, None] + torch.arange(H, device=x.device)              # [B, H]
    cols = left[:, None] + torch.arange(W, device=x.device)             # [B, W]
    x = x.gather(2, rows[:, None, :, None].expand(-1, 3, -1, x.shape[3]))       # [B, 3, H, W+2dx]
    x = x.gather(3, cols[:, None, None, :].expand(-1, 3, H, -1))                # [B, 3, H, W]
    brightness, saturation, contrast = draws[:, 2:, None, None, None].unbind(1)     # [B, 1, 1, 1]
    x = x + (brightness - 0.5)
    grey = x.mean(dim=1, keepdim=True)                                  # [B, 1, H, W]
    x = grey + (x - grey) * (2 * saturation)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)                          # [B, 1, 1, 1]
    x = mean + (x - mean) * (contrast + 0.5)
    return (x + 1) / 2


def d_loss_hinge(real, fake):
    """Logits [B, L*N] of real and of fake images -> the discriminator's loss, a scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def d_loss_vanilla(real, fake):
    """The alternative to hinge: binary cross-entropy, of the same logits."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def g_loss(fake):
    """Logits [B, L*N] of the decoder's images -> the decoder's loss, a scalar."""
    return -fake.mean()


def adaptive_weight(rec_loss, gan_loss, last_weight, average=lambda gradient: gradient):
    """Return |d rec / d W| / (|d gan / d W| + 1e-6), clamped to [0, 1e4] and detached (arXiv
    2012.09841): the factor that balances the two losses at W = `last_weight`, the decoder's last
    layer. Both graphs stay for the backward pass.

    average: a function that averages a gradient over the processes that share a batch.
    """
    rec, gan = (average(torch.autograd.grad(loss, last_weight, retain_graph=True)[0])
                for loss in (rec_loss, gan_loss))
    return (rec.norm() / (gan.norm() + 1e-6)).clamp(0, 1e4).detach()


def initial(name, shapes, seed):
    """Return the initial value of one tensor of the discriminator, whose tensors have `shapes`.

    Heads: uniform +-1/sqrt(fan in), PyTorch's default for convolutions, as in the RAE code. Trunk,
    where no file replaces it: N(0, 0.02^2), as DINO begins. Biases: zero. Norms: one. u, v: random
    unit vectors after 15 power iterations, so that the first steps have a correct norm.
    """
    from data import rng
    shape = shapes[name]
    if name.endswith(("weight_u", "weight_v")):
        W = initial(name[:-1] + "orig", shapes, seed).flatten(1)    # [c_out, c_in * kernel]
        generator = rng(seed, f"init discriminator {name[:-8]}u")
        u = F.normalize(torch.from_numpy(generator.standard_normal(len(W), np.float32)), dim=0)
        for _ in range(15):
            v = F.normalize(W.mT @ u, dim=0)
            u = F.normalize(W @ v, dim=0)
        return u if name.endswith("u") else v
    generator = rng(seed, f"init discriminator {name}")
    if len(shape) == 1:
        value = np.full(shape, float(name.endswith("weight")))
    elif name.startswith("heads."):
        value = (2 * generator.random(shape, np.float32) - 1) * math.prod(shape[1:]) ** -0.5
    else:
        value = generator.standard_normal(shape, np.float32) * 0.02
    return torch.from_numpy(value).float()
