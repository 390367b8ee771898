"""The decoder of the representation autoencoder: latent tokens become an image (a ViT-MAE decoder).

    z [B,N,C]  ->  embed, class token, fixed 2-D sin-cos positions, blocks, norm, pixels per patch

The patch size is free: 16 x 16 tokens give 224 px with patch 14 and 256 px with patch 16. Parameter
names are the keys of the released files. Paper (arXiv 2601.16208) section 2; arXiv 2510.11690.

B batch, N tokens (256), C latent channels (1152), W decoder width, H heads.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class DecoderConfig:
    """The fields of the released config.json that this network reads, under the same names."""
    hidden_size: int                        # C, the channels of the latent
    decoder_hidden_size: int
    decoder_num_hidden_layers: int
    decoder_num_attention_heads: int
    decoder_intermediate_size: int
    patch_size: int = 14                    # pixels on a token's side
    num_patches: int = 256                  # N, a square number
    image_size: int = 224                   # patch_size * sqrt(num_patches)
    image_mean: tuple = (0.5, 0.5, 0.5)     # the encoder's normalisation: the network predicts
    image_std: tuple = (0.5, 0.5, 0.5)      # pixels as the encoder sees them
    layer_norm_eps: float = 1e-12
    encoder: str | None = None              # name of the encoder that the decoder was trained for

    def __post_init__(self):
        width, heads = self.decoder_hidden_size, self.decoder_num_attention_heads
        if width % (4 * heads):
            raise ValueError(f"decoder_hidden_size {width} must be a multiple of 4 x "
                             f"decoder_num_attention_heads = {4 * heads}")
        if math.isqrt(self.num_patches) ** 2 != self.num_patches:
            raise ValueError(f"num_patches {self.num_patches} is not a square number")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError(f"image_mean {self.image_mean}, image_std {self.image_std}: expected "
                             "three numbers each, the second above 0")


#         depth  width  heads    MLP     parameters and TFLOP to decode, C = 1152 and patch 14
SIZES = {
    "tiny": (4,    160,     4,   640),   #   1.6 M  0.001
    "b":   (12,    768,    12,  3072),   #  86.6 M  0.047
    "l":   (24,   1024,    16,  4096),   # 304.4 M  0.163
    "xl":  (28,   1152,    16,  4096),   # 415.6 M  0.222, the released decoders
}


def size_config(size, channels, tokens, patch, mean, std, encoder=None):
    """Return the DecoderConfig of a row of SIZES for a latent [tokens, channels]."""
    depth, width, heads, hidden = SIZES[size]
    return DecoderConfig(
        hidden_size=channels, decoder_hidden_size=width, decoder_num_hidden_layers=depth,
        decoder_num_attention_heads=heads, decoder_intermediate_size=hidden, patch_size=patch,
        num_patches=tokens, image_size=patch * math.isqrt(tokens), image_mean=tuple(mean),
        image_std=tuple(std), encoder=encoder)


class Linear(nn.Linear):
    """Keep fp32 weights and multiply in the dtype of x (bf16 on accelerators), without autocast."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """Compute statistics in fp32 and return the dtype of x."""

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias,
                            self.eps).to(x.dtype)


def sincos_positions(width, side):
    """Return the fixed table [side*side, width]: the first half of the channels encodes the column,
    the second half the row."""
    # On the CPU and in fp64, so that every device has the same table
    exponent = torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4)
    position = torch.arange(side, dtype=torch.float64, device="cpu")
    angle = position[:, None] * 10000.0 ** -exponent                        # [side, width/4]
    axis = torch.cat([angle.sin(), angle.cos()], 1)                         # [side, width/2]
    column = axis[None, :, :].expand(side, side, -1)                        # [row,column,width/2]
    row = axis[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], 2).flatten(0, 1).float()                # [side*side, width]


def attention(q, k, v):
    """Softmax attention from all tokens to all tokens, each [B,H,L,W/H]."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # torch's fused kernel is two to six times slower here (LOG.md, 2026-11-23)
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    """x += Attn(LN(x)); x += MLP(LN(x))"""

    def __init__(self, width, heads, hidden, eps):
        super().__init__()
        self.heads = heads
        self.layernorm_before = LayerNorm(width, eps=eps)
        self.layernorm_after = LayerNorm(width, eps=eps)
        self.attention = nn.Module()
        self.attention.attention = nn.ModuleDict(
            {name: Linear(width, width) for name in ("query", "key", "value")})
        self.attention.output = nn.ModuleDict({"dense": Linear(width, width)})
        self.intermediate = nn.ModuleDict({"dense": Linear(width, hidden)})
        self.output = nn.ModuleDict({"dense": Linear(hidden, width)})

    def forward(self, x):                                                   # [B,1+N,W]
        y, qkv = self.layernorm_before(x), self.attention.attention
        q, k, v = (qkv[n](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for n in ("query", "key", "value"))                      # [B,H,1+N,W/H]
        y = attention(q, k, v).transpose(1, 2).flatten(2)                   # [B,1+N,W]
        x = x + self.attention.output["dense"](y)
        y = self.intermediate["dense"](self.layernorm_after(x))             # [B,1+N,MLP]
        y = F.gelu(y, approximate="none")                                   # the exact (erf) GELU
        return x + self.output["dense"](y)


class Decoder(nn.Module):
    """The ViT decoder. dtype: the dtype of the token stream; weights, statistics of the norms and
    pixels are fp32. Set `remat` to recompute each block's activations in the backward pass."""

    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        self.config, self.dtype, self.remat = config, dtype, False
        C, W = config.hidden_size, config.decoder_hidden_size
        self.channels, self.tokens, self.patch = C, config.num_patches, config.patch_size
        self.grid = math.isqrt(self.tokens)
        self.decoder_embed = Linear(C, W)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, W))
        table = torch.cat([torch.zeros(1, W, device="cpu"), sincos_positions(W, self.grid)])
        self.decoder_pos_embed = nn.Parameter(table[None], requires_grad=False)     # [1,1+N,W]
        self.decoder_layers = nn.ModuleList(
            Block(W, config.decoder_num_attention_heads, config.decoder_intermediate_size,
                  config.layer_norm_eps)
            for _ in range(config.decoder_num_hidden_layers))
        self.decoder_norm = LayerNorm(W, eps=config.layer_norm_eps)
        self.decoder_pred = Linear(W, self.patch ** 2 * 3)
        for name in ("image_mean", "image_std"):        # from the config; no file stores them
            value = torch.tensor(getattr(config, name), device="cpu").view(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def patches(self, z):
        """z [B,N,C] -> normalised pixels of each patch [B,N,p*p*3], channel fastest."""
        x = self.decoder_embed(z.to(self.dtype))                            # [B,N,W]
        token = self.trainable_cls_token.to(x.dtype).expand(len(x), -1, -1)
        x = torch.cat([token, x], 1)                                        # [B,1+N,W]
        x = x + self.decoder_pos_embed.to(x.dtype)
        for block in self.decoder_layers:
            x = checkpoint(block, x, use_reentrant=False) if self.remat else block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:].float()       # [B,N,p*p*3]

    def unpatchify(self, x):
        """[B,N,p*p*3] -> [B,3,S,S], S = p*sqrt(N)."""
        g, p = self.grid, self.patch
        x = x.view(-1, g, g, p, p, 3).permute(0, 5, 1, 3, 2, 4)             # [B,3,row,py,col,px]
        return x.reshape(-1, 3, g * p, g * p)                               # [B,3,S,S]

    def forward(self, z):
        """z [B,N,C] -> images [B,3,S,S] in fp32. The range is about [0,1] and not clamped, because
        the losses need the unclamped values."""
        return self.unpatchify(self.patches(z)) * self.image_std + self.image_mean

    def forward_flops(self):
        """Return the FLOPs to decode one image, 2 per multiply-add. A training step takes three
        times as many."""
        c, L, W = self.config, self.tokens + 1, self.config.decoder_hidden_size
        block = 4 * W * W + 2 * L * W + 2 * W * c.decoder_intermediate_size
        return 2 * (L * (c.decoder_num_hidden_layers * block + 3 * self.patch ** 2 * W)
                    + self.tokens * self.channels * W)


def initial(name, shape, seed):
    """Return the initial value of one parameter: N(0, 0.02^2) for matrices, zero for biases and
    the class token; norms are one. Nothing about them is published, so they are our choice."""
    from data import rng
    if name == "trainable_cls_token":
        value = np.zeros(shape)
    elif len(shape) > 1:
        value = rng(seed, f"init decoder {name}").standard_normal(shape, np.float32) * 0.02
    else:
        value = np.full(shape, float(name.endswith("weight")))
    return torch.from_numpy(value).float()
