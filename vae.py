"""FLUX's VAE (diffusers' AutoencoderKL in the FLUX.1 form): the paper's baseline latent.

It has the methods of the representation autoencoder: encode(images) -> tokens and
decode(tokens) -> images. Parameter names are diffusers' keys; `from_ldm` renames those of the
original `ae.safetensors`. Architecture: arXiv 2112.10752.

B batch, H W pixels, h w latent grid (H/f, W/f), c latent channels (16), N = h/2 * w/2 tokens of
C = 4c channels (64). The VAE computes in fp32, in training too: --dtype does not change it.
"""
import math
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class VAEConfig:
    """diffusers' fields that this network reads, under the same names. The defaults are FLUX.1-dev:
    f = 8, 256 px -> 32 x 32 x 16 -> 256 tokens of 64 channels."""
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    scaling_factor: float = 0.3611
    shift_factor: float | None = 0.1159

    def __post_init__(self):
        if self.use_quant_conv or self.use_post_quant_conv:
            raise ValueError("use_quant_conv or use_post_quant_conv is true in the VAE's config: "
                             "only FLUX's form, without quant convolutions, is built here")


# f = 4, 64 px -> 16 x 16 x 16 -> 64 tokens of 64; training measures the scale and the shift
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

    def forward(self, x):
        s = self.group_norm(x).flatten(2).mT                    # [B, c, h, w] -> [B, hw, c]
        q, k, v = (f(s)[:, None] for f in (self.to_q, self.to_k, self.to_v))  # [B, 1, hw, c]
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
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
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
        z = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            z = block(z)
        return self.conv_out(F.silu(self.conv_norm_out(z)))


def pack(z):
    """[B, c, h, w] -> [B, h/2 * w/2, 4c]: 2x2 patches, row-major, channel = c*4 + dy*2 + dx."""
    z = z.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))           # [B, c, row, dy, col, dx]
    return z.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens):
    """Invert `pack` for a square grid: [B, N, 4c] -> [B, c, h, w]."""
    B, N, C = tokens.shape
    side = math.isqrt(N)
    if side * side != N or C % 4:
        raise ValueError(f"tokens {list(tokens.shape)}: expected [B, n*n, 4*c] for a square image")
    z = tokens.reshape(B, side, side, C // 4, 2, 2)             # [B, row, col, c, dy, dx]
    return z.permute(0, 3, 1, 4, 2, 5).reshape(B, C // 4, 2 * side, 2 * side)


class VAE(nn.Module):
    """AutoencoderKL with FLUX's packing of the latent into tokens. config: a VAEConfig.

    `channels` is C, `stride` the number of pixels on a token's side (16). A new VAE has PyTorch's
    default initial weights, as the original.
    """
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
        and shift."""
        if images.shape[-1] % self.stride or images.shape[-2] % self.stride:
            raise ValueError(f"images {list(images.shape)}: sides must divide by {self.stride}")
        mean, logvar = self.encoder(2 * images - 1).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)                      # diffusers' clamp: exp stays finite

    def encode(self, images, generator=None, sample=False):
        """images [B,3,H,W] in [0,1] -> tokens [B,N,4c], shifted and scaled: the posterior's mean,
        or a draw from it with `sample` or a `generator` (on any device). The paper's baseline
        trains on draws."""
        z, logvar = self.posterior(images)
        if sample or generator is not None:
            device = getattr(generator, "device", z.device)
            eps = torch.randn(z.shape, generator=generator, device=device).to(z)
            z = z + torch.exp(0.5 * logvar) * eps
        return pack((z - self.shift) * self.scale)

    def decode(self, tokens):
        """tokens [B,N,4c] of a square image -> images [B,3,H,W], about [0,1], not clamped."""
        return (self.decoder(unpack(tokens) / self.scale + self.shift) + 1) / 2

    def forward(self, images):
        return self.encode(images)                              # as the other frozen encoders

    @torch.no_grad()
    def measure(self, batches):
        """Return the shift and the scale, under their names in the config, that give the latent of
        these batches of images mean 0 and variance 1."""
        sums = []
        for images in batches:
            mean, logvar = self.posterior(images)
            sums.append([mean.mean(), (mean.square() + logvar.exp()).mean()])
        mean, square = torch.tensor(sums).mean(0).tolist()
        return dict(shift_factor=mean, scaling_factor=(square - mean ** 2) ** -0.5)

    def forward_flops(self, side, decode=True):
        """Return the FLOPs to encode (and decode) one square image. torch counts them on the meta
        device."""
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


# Names in ae.safetensors (latent diffusion's) -> diffusers' names
FROM_LDM = [
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"\.norm_out\.", r".conv_norm_out."),
]


def from_ldm(state):
    """Give the state dict of `ae.safetensors` diffusers' keys and shapes."""
    levels = 1 + max(int(m[1]) for m in (re.match(r"decoder\.up\.(\d+)\.", k) for k in state) if m)
    out = {}
    for key, value in state.items():
        for pattern, words in FROM_LDM:
            key = re.sub(pattern, words, key)
        # the original numbers the decoder's levels by resolution, diffusers in running order
        key = re.sub(r"(up_blocks\.)(\d+)", lambda m: m[1] + str(levels - 1 - int(m[2])), key)
        if ".attentions." in key and value.dim() == 4:          # 1x1 convolution -> Linear
            value = value[:, :, 0, 0]
        out[key] = value
    return out
