"""FLUX's VAE (diffusers' AutoencoderKL in the FLUX.1 form): the paper's baseline latent.

    encode: images [B,3,H,W] in [0,1]  ->  mean of the posterior [B,c,h,w]  ->  tokens [B,N,C]
    decode: tokens [B,N,C]  ->  images

Parameter names are diffusers' keys (networks.py renames those of the original `ae.safetensors`).
Architecture: arXiv 2112.10752. The VAE computes in fp32, in training too.

B batch, H W pixels, h w latent grid (H/f, W/f), c latent channels (16), N = h/2 * w/2 tokens of
C = 4c channels (64).
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class VAEConfig:
    """Fields of diffusers' config, under the same names. The defaults are FLUX.1-dev's: f = 8,
    256 px -> 32 x 32 x 16 -> 256 tokens of 64 channels."""
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    use_quant_conv: bool = False            # FLUX has neither of these two convolutions. Nothing
    use_post_quant_conv: bool = False       # here reads them; diffusers' default is True
    scaling_factor: float = 0.3611
    shift_factor: float | None = 0.1159


# f = 4, 64 px -> 16 x 16 x 16 -> 64 tokens of 64 channels. Training measures scale and shift.
TINY = VAEConfig(block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8,
                 scaling_factor=1.0, shift_factor=0.0)


class ResnetBlock(nn.Module):
    """Twice GroupNorm, SiLU and conv, around a skip: [B, c_in, h, w] -> [B, c_out, h, w]."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))                   # [B, c_out, h, w]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    """Self-attention over all positions with one head, as wide as the feature map."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(c, c) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(c, c)])          # diffusers' key is to_out.0

    def forward(self, x):                                       # [B, c, h, w]
        s = self.group_norm(x).flatten(2).mT                    # [B, hw, c]
        q, k, v = (f(s)[:, None] for f in (self.to_q, self.to_k, self.to_v))    # [B, 1, hw, c]
        s = F.scaled_dot_product_attention(q, k, v)[:, 0]       # [B, hw, c]
        return x + self.to_out[0](s).mT.reshape(x.shape)        # [B, c, h, w]


class MidBlock(nn.Module):
    """A ResnetBlock, an Attention and a ResnetBlock at the lowest resolution."""

    def __init__(self, c, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c, c, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(c, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """n ResnetBlocks at one resolution, then at most one convolution that halves or doubles it."""

    def __init__(self, c_in, c_out, n, groups, resample):
        super().__init__()
        self.resample = resample                                # "down", "up" or None
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(n))
        if resample:                                            # downsamplers or upsamplers
            geometry = dict(stride=2) if resample == "down" else dict(padding=1)
            conv = nn.Conv2d(c_out, c_out, 3, **geometry)
            self.add_module(f"{resample}samplers", nn.ModuleList([nn.ModuleDict({"conv": conv})]))

    def forward(self, x):
        for block in self.resnets:
            x = block(x)                                        # [B, c_out, h, w]
        if self.resample == "down":                             # pads on the right and below only
            return self.downsamplers[0]["conv"](F.pad(x, (0, 1, 0, 1)))         # [.., h/2, w/2]
        if self.resample == "up":
            x = self.upsamplers[0]["conv"](F.interpolate(
                x, scale_factor=2.0, mode="nearest"))                           # [.., 2h, 2w]
        return x


class Encoder(nn.Module):
    """[B, 3, H, W] in [-1,1] -> [B, 2c, H/f, W/f]: mean and log variance."""

    def __init__(self, config):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(a, b, config.layers_per_block, groups, "down" if i < len(widths) - 1 else None)
            for i, (a, b) in enumerate(zip((widths[0], *widths), widths)))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)                                     # [B, 128, H, W]
        for block in self.down_blocks:
            x = block(x)                                        # at last [B, 512, H/f, W/f]
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """[B, c, h, w] -> [B, 3, f*h, f*w], about [-1,1], with one more ResnetBlock per level."""

    def __init__(self, config):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(a, b, config.layers_per_block + 1, groups, "up" if i < len(widths) - 1 else None)
            for i, (a, b) in enumerate(zip((widths[0], *widths), widths)))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z):
        z = self.mid_block(self.conv_in(z))                     # [B, 512, h, w]
        for block in self.up_blocks:
            z = block(z)                                        # at last [B, 128, f*h, f*w]
        return self.conv_out(F.silu(self.conv_norm_out(z)))


def pack(z):
    """[B, c, h, w] -> [B, h/2 * w/2, 4c]: 2x2 patches, row-major, channel = c*4 + dy*2 + dx."""
    return F.pixel_unshuffle(z, 2).flatten(2).mT.contiguous()           # [B, row*col, 4c]


def unpack(tokens):
    """Invert `pack` for a square grid: [B, N, 4c] -> [B, c, h, w]."""
    side = math.isqrt(tokens.shape[1])
    return F.pixel_shuffle(tokens.mT.contiguous().unflatten(2, (side, side)), 2)


class VAE(nn.Module):
    """AutoencoderKL with FLUX's packing of the latent into tokens. `stride` is the number of pixels
    on a token's side (16)."""
    crop, resample = "squash", 1                    # diffusers' VaeImageProcessor; 1 is Lanczos

    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.scale, self.shift = config.scaling_factor, config.shift_factor or 0.0
        self.channels = 4 * config.latent_channels              # C
        self.stride = 2 ** len(config.block_out_channels)       # f = 2^(levels-1), 2x2 packing
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def posterior(self, images):
        """images [B,3,H,W] in [0,1] -> mean and log variance, each [B, c, H/f, W/f], before scale
        and shift. Training takes draws from this posterior."""
        mean, logvar = self.encoder(2 * images - 1).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)                      # diffusers' clamp: exp stays finite

    def encode(self, images):
        """images [B,3,H,W] in [0,1] -> tokens [B,N,C]: the posterior's mean, shifted and scaled."""
        mean, _ = self.posterior(images)                        # [B, c, H/f, W/f]
        return pack((mean - self.shift) * self.scale)           # [B,N,C]

    def decode(self, tokens):
        """tokens [B,N,C] of a square image -> images [B,3,H,W], about [0,1], not clamped."""
        return (self.decoder(unpack(tokens) / self.scale + self.shift) + 1) / 2

    def forward(self, images):
        return self.encode(images)                              # like the other frozen encoders

    @torch.no_grad()
    def measure(self, batches):
        """Return the shift and the scale, under their names in the config, that give draws from
        the posteriors of these batches of images mean 0 and variance 1."""
        sums = []
        for images in batches:
            mean, logvar = self.posterior(images)
            sums.append([mean.mean(), (mean.square() + logvar.exp()).mean()])
        mean, square = torch.tensor(sums).mean(0).tolist()
        return dict(shift_factor=mean, scaling_factor=(square - mean ** 2) ** -0.5)

    def forward_flops(self, side, decode=True):
        """Return the FLOPs to encode (and decode) one square image, as torch counts them on the
        meta device."""
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            twin = VAE(self.config)
            z = twin.encode(torch.empty(1, 3, side, side))
            if decode:
                twin.decode(z)
        return counter.get_total_flops()


def initial(name, shape, seed):
    """Return the initial value of one parameter: uniform +-1/sqrt(fan in) for convolutions and
    Linears, as PyTorch draws them; zero biases; norms are one."""
    from data import rng
    if len(shape) > 1:
        bound = math.prod(shape[1:]) ** -0.5
        value = (2 * rng(seed, f"init vae {name}").random(shape, np.float32) - 1) * bound
    else:
        value = np.full(shape, float("norm" in name and name.endswith("weight")))
    return torch.from_numpy(value).float()
