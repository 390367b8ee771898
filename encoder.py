"""The frozen encoder: an image becomes N latent tokens of C channels (paper section 2).

    images [B,3,H,W] in [0,1]  ->  latent z [B,N,C],  z = LayerNorm(ViT(x))

One ViT serves both published encoders. They differ in:

                SigLIP-2 (google/siglip2-so400m-patch14-224)    WebSSL-DINO (facebook/webssl-dino*)
    images      squashed to a square, mean and std 0.5          centre crop, ImageNet's mean and std
    latent      C = 1152, N = 16 x 16                           C = 1024, N = 16 x 16
    class token no                                              yes, dropped from the latent
    layer scale no                                              yes
    GELU        tanh                                            erf
    last norm   without affine (its own is not used)            its own, with affine

Another encoder is a class with the attributes of ViT, `forward` and `forward_flops`, and a row in
ENCODERS (docs/forking.md has one without weights).
B batch, N latent tokens, L = N or, with a class token, 1 + N, C channels, H heads.
"""
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class ViTConfig:
    """Fields of the published config.json, under their names."""
    model_type: str = "siglip_vision_model"     # or "dinov2"
    hidden_size: int = 1152                     # C
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-6


SO400M = ViTConfig()
WEBSSL_300M = ViTConfig("dinov2", 1024, 4096, 24, 16)
TINY = ViTConfig("siglip_vision_model", 96, 384, 5, 4, image_size=64, patch_size=8)


class Linear(nn.Linear):
    """Keep fp32 weights and multiply in the dtype of x (bf16 on accelerators), without autocast."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """Compute statistics in fp32 and return the dtype of x."""

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias,
                            self.eps).to(x.dtype)


def attention(q, k, v, heads):
    """Softmax attention over all tokens; q, k and v [B,L,C] -> [B,L,C]."""
    q, k, v = (a.unflatten(-1, (heads, -1)).transpose(1, 2) for a in (q, k, v))  # [B,H,L,C/H]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # torch's fused kernel is two to six times slower here (LOG.md, 2026-11-23)
        y = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v)                         # [B,H,L,C/H]
    return y.transpose(1, 2).flatten(2)


def resize(images, size):
    """Resize images [B,3,H,W] of another size to size x size, bicubic, as the RAE code does. Pillow
    and jax.image give other numbers: a = -0.5 instead of -0.75, and antialiasing."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", align_corners=False)


class Attention(nn.Module):
    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = Linear(C, C), Linear(C, C)
        self.v_proj, self.out_proj = Linear(C, C), Linear(C, C)

    def forward(self, x):                                                   # [B,L,C]
        return self.out_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads))


class MLP(nn.Module):
    def __init__(self, C, hidden, gelu):
        super().__init__()
        self.fc1, self.fc2, self.gelu = Linear(C, hidden), Linear(hidden, C), gelu

    def forward(self, x):                                                   # [B,L,C]
        return self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))         # "tanh", "none": erf


class Block(nn.Module):
    def __init__(self, k):
        super().__init__()
        C, dino = k.hidden_size, k.model_type == "dinov2"
        self.norm1, self.norm2 = (LayerNorm(C, eps=k.layer_norm_eps) for _ in range(2))
        self.attn = Attention(C, k.num_attention_heads)
        self.mlp = MLP(C, k.intermediate_size, "none" if dino else "tanh")
        self.scale1 = nn.Parameter(torch.ones(C)) if dino else None
        self.scale2 = nn.Parameter(torch.ones(C)) if dino else None

    def forward(self, x):                                                   # [B,L,C]
        y = self.attn(self.norm1(x))
        x = x + (y if self.scale1 is None else y * self.scale1.to(y.dtype))
        y = self.mlp(self.norm2(x))
        return x + (y if self.scale2 is None else y * self.scale2.to(y.dtype))


class ViT(nn.Module):
    """A frozen vision transformer. The references are transformers' SiglipVisionModel and
    Dinov2Model.

    dtype: of the token stream. The weights, which are cast where they are used, the images, the
    statistics of the norms and z are fp32. Raises ValueError for sizes that do not divide.
    """

    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        self.config, self.dtype, k = config, dtype, config
        C, dino = k.hidden_size, k.model_type == "dinov2"
        if C % k.num_attention_heads or k.image_size % k.patch_size:
            raise ValueError(f"hidden_size {C} must be a multiple of num_attention_heads "
                             f"{k.num_attention_heads}, image_size {k.image_size} of patch_size "
                             f"{k.patch_size}")
        self.image_size, self.patch_size = k.image_size, k.patch_size
        self.grid = k.image_size // k.patch_size
        self.tokens, self.channels = self.grid ** 2, C                      # N, C
        # What the published processors do. resample: Pillow's number of the bicubic filter;
        # networks.py takes the number of a published folder instead.
        self.mean = (0.485, 0.456, 0.406) if dino else (0.5, 0.5, 0.5)
        self.std = (0.229, 0.224, 0.225) if dino else (0.5, 0.5, 0.5)
        self.crop, self.resample = "center" if dino else "squash", 3
        self.patch_embed = nn.Conv2d(3, C, k.patch_size, k.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.tokens, C) if dino else
                                      torch.zeros(self.tokens, C))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, C)) if dino else None
        self.blocks = nn.ModuleList(Block(k) for _ in range(k.num_hidden_layers))
        self.norm = LayerNorm(C, eps=k.layer_norm_eps) if dino else None
        for name in ("mean", "std"):            # no file stores them; on the CPU in meta builds too
            value = torch.tensor(getattr(self, name), device="cpu").view(1, 3, 1, 1)
            self.register_buffer(f"image_{name}", value, False)

    def last_block(self, images):
        """images [B,3,H,W] in [0,1] -> the last block's output [B,N,C], with a class token in
        front [B,1+N,C]."""
        x = (resize(images.float(), self.image_size) - self.image_mean) / self.image_std
        w, b = self.patch_embed.weight.to(self.dtype), self.patch_embed.bias.to(self.dtype)
        x = F.conv2d(x.to(self.dtype), w, b, stride=self.patch_size)        # [B,C,grid,grid]
        x = x.flatten(2).transpose(1, 2)                                    # [B,N,C], row-major
        if self.cls_token is not None:
            token = self.cls_token.to(x.dtype).expand(len(x), -1, -1)
            x = torch.cat([token, x], 1)                                    # [B,1+N,C]
        return self.run(self.blocks, x + self.pos_embed.to(x.dtype))

    def run(self, blocks, x):
        """Run the stack. (On XLA a compiled loop takes the place of this method.)"""
        for block in blocks:
            x = block(x)
        return x

    def forward(self, images):
        """images [B,3,H,W] in [0,1] -> latent z [B,N,C], fp32. SigLIP's tokens have mean 0 and
        variance 1."""
        x = self.last_block(images).float()                                 # [B,N or 1+N,C]
        if self.norm is None:
            return F.layer_norm(x, (self.channels,), eps=1e-6)
        return self.norm(x)[:, 1:]                                          # [B,N,C]

    def forward_flops(self):
        """Return the FLOPs per image, 2 per multiply-add of projections, attention and MLP."""
        k, C, L = self.config, self.channels, self.pos_embed.shape[-2]
        block = 4 * C * C + 2 * L * C + 2 * C * k.intermediate_size
        return 2 * L * (k.num_hidden_layers * block + 3 * k.patch_size ** 2 * C)


def initial(name, shape, seed):
    """Return the initial value of one parameter: N(0, 0.02^2) for matrices and positions,
    zero biases; norms and layer scales are one."""
    from data import rng
    if len(shape) > 1:
        value = rng(seed, f"init encoder {name}").standard_normal(shape, np.float32) * 0.02
    else:
        value = np.full(shape, float(not name.endswith("bias")))
    return torch.from_numpy(value).float()


# ------------------------------------------------------------------------------------------------
# Published files
# ------------------------------------------------------------------------------------------------

# Keys of the published files -> ours, in order
SIGLIP_KEYS = [
    (r"^vision_model\.", ""), (r"^embeddings\.patch_embedding\.", "patch_embed."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^encoder\.layers\.", "blocks."), (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.", ".attn."),
]
DINOV2_KEYS = [
    (r"^embeddings\.cls_token$", "cls_token"), (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed."),
    (r"^encoder\.layer\.", "blocks."), (r"\.attention\.attention\.query\.", ".attn.q_proj."),
    (r"\.attention\.attention\.key\.", ".attn.k_proj."),
    (r"\.attention\.attention\.value\.", ".attn.v_proj."),
    (r"\.attention\.output\.dense\.", ".attn.out_proj."),
    (r"\.layer_scale([12])\.lambda1$", r".scale\1"), (r"^layernorm\.", "norm."),
]
# Keys that the network does not use: the text model, SigLIP's pooled head, DINO's mask token
UNUSED = ("text_model.", "logit_", "post_layernorm.", "head.", "embeddings.mask_token")

# transformers leaves a field out of a config when it has its class's default
HF_SIGLIP = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                 num_attention_heads=12, image_size=224, patch_size=16, layer_norm_eps=1e-6)
HF_DINOV2 = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, mlp_ratio=4,
                 image_size=224, patch_size=14, layer_norm_eps=1e-6)


def our_key(key, dino):
    """Return our name of a published key, or None for a key that the network does not use."""
    for pattern, words in DINOV2_KEYS if dino else SIGLIP_KEYS:
        key = re.sub(pattern, words, key)
    return None if key.startswith(UNUSED) else key


def vit_config(config):
    """Read a published config.json -> ViTConfig. The full SigLIP file nests the vision part. An
    empty config is that of SO400M. Raises ValueError for another network."""
    config = config.get("vision_config", config)
    kind = config.get("model_type", "siglip_vision_model")
    if kind.startswith("siglip"):
        found = {**HF_SIGLIP, **config} if config else vars(SO400M)
        kind = "siglip_vision_model"
    else:
        found = {**HF_DINOV2, **config}
        found["intermediate_size"] = int(found["hidden_size"] * found["mlp_ratio"])
        if found.get("use_swiglu_ffn"):
            raise ValueError("use_swiglu_ffn = true (the giant DINOv2) is not supported; "
                             "WebSSL-DINO 300M and DINOv2 S, B and L have a plain MLP")
    fields = {k: found[k] for k in ViTConfig.__dataclass_fields__ if k != "model_type"}
    return ViTConfig(model_type=kind, **fields)


def build_vit(config, dtype=torch.float32):
    """Build the network that a published config.json describes."""
    return ViT(vit_config(config), dtype)


# model_type of a config.json -> (config, dtype) -> encoder
ENCODERS = {"siglip": build_vit, "siglip_vision_model": build_vit, "siglip2": build_vit,
            "siglip2_vision_model": build_vit, "dinov2": build_vit}
