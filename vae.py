"""FLUX's VAE (diffusers AutoencoderKL, FLUX.1 form): the baseline latent of the paper.

The same two methods as the RAE: encode(images) -> tokens, decode(tokens) -> images. Key names are
diffusers'; `from_ldm` turns the original `ae.safetensors` into them. Architecture: arXiv
2112.10752.

B batch, H W pixels, h w latent grid (H/f, W/f), c latent channels (16), N = h/2 * w/2 tokens of
C = 4c channels (64). fp32 throughout, in training too: --dtype does not change it.
"""
import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

# black-forest-labs/FLUX.1-dev, vae/config.json: f = 8, 256 px -> 32x32x16 -> 256 tokens of 64
FLUX = dict(in_channels=3, out_channels=3, block_out_channels=(128, 256, 512, 512),
            layers_per_block=2, latent_channels=16, norm_num_groups=32, use_quant_conv=False,
            use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159)
# f = 4, 64 px -> 16x16x16 -> 64 tokens of 64; a small VAE sets its own scale and shift when trained
TINY = dict(FLUX, block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8,
            scaling_factor=1.0, shift_factor=0.0)


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice, around a skip: [B, c_in, h, w] -> [B, c_out, h, w]."""

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
    """One head over all positions, as wide as the feature map."""

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
    """ResnetBlock, Attention, ResnetBlock at the lowest resolution."""

    def __init__(self, c, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c, c, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(c, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """n ResnetBlocks at one resolution, then one convolution that halves or doubles it, or none."""

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

    def __init__(self, cfg):
        super().__init__()
        widths, groups = cfg["block_out_channels"], cfg["norm_num_groups"]
        self.conv_in = nn.Conv2d(cfg["in_channels"], widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(a, b, cfg["layers_per_block"], groups, "down" if i < len(widths) - 1 else None)
            for i, (a, b) in enumerate(zip((widths[0], *widths), widths)))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * cfg["latent_channels"], 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """[B, c, h, w] -> [B, 3, f*h, f*w], about [-1,1]. One ResnetBlock more a level."""

    def __init__(self, cfg):
        super().__init__()
        widths, groups = cfg["block_out_channels"][::-1], cfg["norm_num_groups"]
        self.conv_in = nn.Conv2d(cfg["latent_channels"], widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(a, b, cfg["layers_per_block"] + 1, groups, "up" if i < len(widths) - 1 else None)
            for i, (a, b) in enumerate(zip((widths[0], *widths), widths)))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], cfg["out_channels"], 3, padding=1)

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
    """The inverse of `pack` for a square grid: [B, N, 4c] -> [B, c, h, w]."""
    B, N, C = tokens.shape
    side = math.isqrt(N)
    if side * side != N or C % 4:
        raise ValueError(f"tokens {list(tokens.shape)}: expected [B, n*n, 4*c] for a square image")
    z = tokens.reshape(B, side, side, C // 4, 2, 2)             # [B, row, col, c, dy, dx]
    return z.permute(0, 3, 1, 4, 2, 5).reshape(B, C // 4, 2 * side, 2 * side)


class VAE(nn.Module):
    """AutoencoderKL with FLUX's token packing. `config` holds diffusers' fields; FLUX.1 if None.

    `channels` is C, `stride` the pixels on a token's side (16). Before they are trained the weights
    are PyTorch's defaults, as in the original. Raises ValueError for another form's config.
    """
    crop, resample = "squash", 1                    # diffusers' VaeImageProcessor: 1 is Lanczos

    def __init__(self, config=None):
        super().__init__()
        self.config = cfg = {**FLUX, **(config or {})}
        if cfg["use_quant_conv"] or cfg["use_post_quant_conv"]:
            raise ValueError("use_quant_conv or use_post_quant_conv is true in the VAE's config: "
                             "only FLUX's form, without quant convolutions, is built here")
        self.scale, self.shift = cfg["scaling_factor"], cfg["shift_factor"] or 0.0
        self.channels = 4 * cfg["latent_channels"]              # C
        self.stride = 2 ** len(cfg["block_out_channels"])       # f = 2^(levels-1), 2x2 packing
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)

    def posterior(self, images):
        """images [B,3,H,W] in [0,1] -> mean, logvar, each [B, c, H/f, W/f], before scale and shift.

        KL to N(0,1) per image: 0.5 * (mean^2 + exp(logvar) - 1 - logvar).sum((1, 2, 3)).
        """
        if images.shape[-1] % self.stride or images.shape[-2] % self.stride:
            raise ValueError(f"images {list(images.shape)}: sides must divide by {self.stride}")
        mean, logvar = self.encoder(2 * images - 1).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)                      # diffusers' clamp, exp stays finite

    def encode(self, images, generator=None, sample=False):
        """images [B,3,H,W] in [0,1] -> tokens [B,N,4c], shifted and scaled: the posterior's mean;
        with `sample` or a `generator` (of any device) a draw, which the paper's baseline trains on.
        """
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
        """Images -> the shift and scale that give the latent mean 0 and variance 1, by their names
        in diffusers' config. For a VAE trained without (scale 1, shift 0)."""
        sums = []
        for images in batches:
            mean, logvar = self.posterior(images)
            sums.append([mean.mean(), (mean.square() + logvar.exp()).mean()])
        mean, square = torch.tensor(sums).mean(0).tolist()
        return dict(shift_factor=mean, scaling_factor=(square - mean ** 2) ** -0.5)

    def forward_flops(self, side, decode=True):
        """FLOPs to encode (and decode) one square image, counted by torch on the meta device."""
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            twin = VAE(self.config)
            z = twin.encode(torch.empty(1, 3, side, side))
            if decode:
                twin.decode(z)
        return counter.get_total_flops()

    def activation_bytes(self, side):
        """Kept for the backward pass of one square image, fp32: a ResnetBlock some six maps of its
        size (the inputs of its norms, SiLUs and convolutions), a resampling its input. Checked
        against autograd in the tests."""
        c, total = self.config, 0
        for i, width in enumerate(c["block_out_channels"]):
            blocks = 2 * c["layers_per_block"] + 1              # of the encoder and the decoder
            blocks += 4 * (i == len(c["block_out_channels"]) - 1)       # two mid blocks
            total += 4 * width * (side >> i) ** 2 * (6 * blocks + 5)
        return total


# The names in ae.safetensors (those of ldm) -> diffusers'.
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
    """The state dict of `ae.safetensors` with diffusers' keys and shapes."""
    levels = 1 + max(int(m[1]) for m in (re.match(r"decoder\.up\.(\d+)\.", k) for k in state) if m)
    out = {}
    for key, value in state.items():
        for pattern, words in FROM_LDM:
            key = re.sub(pattern, words, key)
        # ldm counts the decoder's levels by resolution, diffusers in the order they run
        key = re.sub(r"(up_blocks\.)(\d+)", lambda m: m[1] + str(levels - 1 - int(m[2])), key)
        if ".attentions." in key and value.dim() == 4:          # 1x1 convolution -> Linear
            value = value[:, :, 0, 0]
        out[key] = value
    return out
