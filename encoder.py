"""The frozen encoder: an image becomes N latent tokens of C channels.

    images [B,3,H,W] in [0,1]  ->  latent z [B,N,C],  z = LayerNorm(ViT(x))

Two networks, in the key layout of their published weights, so that files load without a mapping:
SigLIP2 (google/siglip2-so400m-patch14-224: C = 1152, N = 16 x 16), whose LayerNorm has no affine,
and DINOv2, the architecture of WebSSL-DINO (facebook/webssl-dino300m-full2b-224: C = 1024), with
its own. Paper section 2; arXiv 2510.11690.

dtype is that of the whole stream: tokens, positions, residuals. In fp32 are the weights, which are
cast as they are used, the pictures, the norms' statistics and z.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

SO400M = dict(model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304,
              num_hidden_layers=27, num_attention_heads=16, image_size=224, patch_size=14)
WEBSSL_300M = dict(model_type="dinov2", hidden_size=1024, mlp_ratio=4, num_hidden_layers=24,
                   num_attention_heads=16, image_size=224, patch_size=14)
TINY = dict(model_type="siglip_vision_model", hidden_size=96, intermediate_size=384,
            num_hidden_layers=5, num_attention_heads=4, image_size=64, patch_size=8)


class Linear(nn.Linear):
    """fp32 weights, product in the dtype of x (bf16 on accelerators), no autocast needed."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """Statistics in fp32, result in the dtype of x."""

    def forward(self, x):
        w, b = self.weight, self.bias
        return F.layer_norm(x.float(), self.normalized_shape, w, b, self.eps).to(x.dtype)


def attention(q, k, v, heads):
    """Softmax attention over all tokens; q [B,L,C], k and v [B,N,C] -> [B,L,C]."""
    q, k, v = (a.unflatten(-1, (heads, -1)).transpose(1, 2) for a in (q, k, v))  # [B,H,.,C/H]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:    # the fused kernel is 3 to 5 times
        y = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v  # slower there (LOG.md)
    else:
        y = F.scaled_dot_product_attention(q, k, v)
    return y.transpose(1, 2).flatten(2)


def resize(images, size):
    """Bicubic resize to size x size, only when it differs (the RAE code's rule). Not Pillow's or
    jax.image's: a = -0.75 where they have -0.5, and no antialiasing."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", align_corners=False)


# ------------------------------------------------------------------------------------------------
# SigLIP-2
# ------------------------------------------------------------------------------------------------

class SiglipAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = Linear(width, width), Linear(width, width)
        self.v_proj, self.out_proj = Linear(width, width), Linear(width, width)

    def forward(self, x):                                                   # [B,N,C]
        return self.out_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads))


class SiglipMLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = Linear(width, hidden), Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiglipBlock(nn.Module):
    def __init__(self, width, hidden, heads, eps):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = LayerNorm(width, eps=eps), LayerNorm(width, eps=eps)
        self.self_attn = SiglipAttention(width, heads)
        self.mlp = SiglipMLP(width, hidden)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipHead(nn.Module):
    """Attention pooling by one learned probe: tokens [B,N,C] -> image embedding [B,C].

    Not part of the latent; train_encoder.py and SigLIP's image-text similarity use it.
    """

    def __init__(self, width, hidden, heads, eps):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        self.attention = nn.Module()
        self.attention.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.attention.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.attention.out_proj = Linear(width, width)
        self.layernorm = LayerNorm(width, eps=eps)
        self.mlp = SiglipMLP(width, hidden)
        self.heads = heads

    def forward(self, x):
        probe = self.probe.to(x.dtype).expand(len(x), -1, -1)               # [B,1,C]
        wq, wk, wv = self.attention.in_proj_weight.to(x.dtype).chunk(3)
        bq, bk, bv = self.attention.in_proj_bias.to(x.dtype).chunk(3)
        q, k, v = F.linear(probe, wq, bq), F.linear(x, wk, bk), F.linear(x, wv, bv)
        x = self.attention.out_proj(attention(q, k, v, self.heads))         # [B,1,C]
        return (x + self.mlp(self.layernorm(x)))[:, 0]                      # [B,C]


class SigLIP2(nn.Module):
    """SigLIP-2 vision tower with learned positions (reference: transformers SiglipVisionModel).

    config: the fields of the published `vision_config`. layers: the latent sums the outputs of the
    last `layers` blocks before the norm (RAEv2, arXiv 2605.18324); 1 is Scale-RAE.
    The published `post_layernorm` is kept for the pooled head; the latent does not pass through it:
    it takes the last block's output and a LayerNorm without affine (spec: released models).
    """
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)
    crop = "squash"             # how its processor makes a picture square
    resample = 3                # by Pillow's number, bicubic; weights.load_encoder may know better

    def __init__(self, config, layers=1, dtype=torch.float32):
        super().__init__()
        c = {**SO400M, "layer_norm_eps": 1e-6, **config}
        C, hidden, heads, eps = (c[k] for k in ("hidden_size", "intermediate_size",
                                                "num_attention_heads", "layer_norm_eps"))
        if not 1 <= layers <= c["num_hidden_layers"]:
            raise ValueError(f"--layers {layers}: the encoder has {c['num_hidden_layers']} blocks")
        self.config, self.layers, self.dtype = c, layers, dtype
        self.image_size, self.patch_size = c["image_size"], c["patch_size"]
        self.grid = self.image_size // self.patch_size
        self.tokens, self.channels = self.grid ** 2, C                      # N, C
        m = self.vision_model = nn.Module()
        m.embeddings = nn.Module()
        m.embeddings.patch_embedding = nn.Conv2d(3, C, self.patch_size, self.patch_size)
        m.embeddings.position_embedding = nn.Embedding(self.tokens, C)
        m.encoder = nn.Module()
        m.encoder.layers = nn.ModuleList(SiglipBlock(C, hidden, heads, eps)
                                         for _ in range(c["num_hidden_layers"]))
        m.post_layernorm = LayerNorm(C, eps=eps)
        m.head = SiglipHead(C, hidden, heads, eps)

    def blocks(self, images):
        """images [B,3,H,W] in [0,1] -> the outputs of the last `layers` blocks, each [B,N,C]."""
        m = self.vision_model
        x = (resize(images.float(), self.image_size) - 0.5) / 0.5
        w, b = m.embeddings.patch_embedding.weight, m.embeddings.patch_embedding.bias
        x = F.conv2d(x.to(self.dtype), w.to(self.dtype), b.to(self.dtype), stride=self.patch_size)
        x = x.flatten(2).transpose(1, 2)                                    # [B,N,C], row-major
        x = x + m.embeddings.position_embedding.weight.to(x.dtype)
        if self.layers == 1:
            return [self.run(m.encoder.layers, x)]
        outputs = []
        for block in m.encoder.layers:
            x = block(x)
            outputs.append(x)
        return outputs[-self.layers:]

    def run(self, blocks, x):
        """The stack; parallel.use_scan may put a compiled loop in its place."""
        for block in blocks:
            x = block(x)
        return x

    def forward(self, images):
        """images [B,3,H,W] in [0,1] -> latent z [B,N,C], fp32, each token of mean 0, variance 1."""
        x = sum(y.float() for y in self.blocks(images))
        return F.layer_norm(x, (self.channels,), eps=1e-6)

    def forward_flops(self):
        return forward_flops(self.config["num_hidden_layers"], self.tokens, self.channels,
                             self.config["intermediate_size"], self.patch_size)

    def pool(self, x):
        """Last block's output [B,N,C] -> image embedding [B,C] (before SigLIP normalises it)."""
        return self.vision_model.head(self.vision_model.post_layernorm(x))


# ------------------------------------------------------------------------------------------------
# DINOv2 / WebSSL-DINO
# ------------------------------------------------------------------------------------------------

class DinoBlock(nn.Module):
    def __init__(self, width, hidden, heads, eps):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = LayerNorm(width, eps=eps), LayerNorm(width, eps=eps)
        self.attention = nn.Module()
        self.attention.attention = nn.ModuleDict(
            {name: Linear(width, width) for name in ("query", "key", "value")})
        self.attention.output = nn.ModuleDict({"dense": Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": Linear(width, hidden), "fc2": Linear(hidden, width)})
        self.layer_scale1 = nn.ParameterDict({"lambda1": torch.ones(width)})
        self.layer_scale2 = nn.ParameterDict({"lambda1": torch.ones(width)})

    def forward(self, x):                                                   # [B,1+N,C]
        y, qkv = self.norm1(x), self.attention.attention
        y = attention(qkv["query"](y), qkv["key"](y), qkv["value"](y), self.heads)
        x = x + self.attention.output["dense"](y) * self.layer_scale1["lambda1"].to(x.dtype)
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))            # the erf form
        return x + y * self.layer_scale2["lambda1"].to(x.dtype)


class DINOv2(nn.Module):
    """DINOv2 without registers; WebSSL-DINO is this network (reference: transformers Dinov2Model).

    The latent is `last_hidden_state[:, 1:]`: the network's own affine norm, no further one. It runs
    at the config's image_size.
    """
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    crop = "center"             # the short side resized, then the middle
    resample = 3

    def __init__(self, config, layers=1, dtype=torch.float32):
        super().__init__()
        c = {**WEBSSL_300M, "layer_norm_eps": 1e-6, **config}
        if c.get("use_swiglu_ffn"):
            raise ValueError("use_swiglu_ffn=true (the giant DINOv2) is not supported; "
                             "WebSSL-DINO 300M and DINOv2 S/B/L have a plain MLP")
        if not 1 <= layers <= c["num_hidden_layers"]:
            raise ValueError(f"--layers {layers}: the encoder has {c['num_hidden_layers']} blocks")
        C, eps = c["hidden_size"], c["layer_norm_eps"]
        self.config, self.layers, self.dtype = c, layers, dtype
        self.image_size, self.patch_size = c["image_size"], c["patch_size"]
        self.tokens, self.channels = (self.image_size // self.patch_size) ** 2, C
        self.embeddings = nn.Module()
        self.embeddings.cls_token = nn.Parameter(torch.zeros(1, 1, C))
        self.embeddings.mask_token = nn.Parameter(torch.zeros(1, C))        # in the files, unused
        self.embeddings.position_embeddings = nn.Parameter(torch.zeros(1, 1 + self.tokens, C))
        self.embeddings.patch_embeddings = nn.ModuleDict(
            {"projection": nn.Conv2d(3, C, self.patch_size, self.patch_size)})
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(
            DinoBlock(C, int(C * c["mlp_ratio"]), c["num_attention_heads"], eps)
            for _ in range(c["num_hidden_layers"]))
        self.layernorm = LayerNorm(C, eps=eps)
        for name in ("mean", "std"):                    # in no file; on the CPU for meta builds too
            value = torch.tensor(getattr(self, name), device="cpu").view(1, 3, 1, 1)
            self.register_buffer(f"image_{name}", value, False)

    def blocks(self, images):
        """images [B,3,H,W] in [0,1] -> the outputs of the last `layers` blocks, each [B,1+N,C]."""
        x = (resize(images.float(), self.image_size) - self.image_mean) / self.image_std
        p = self.embeddings.patch_embeddings["projection"]
        x = F.conv2d(x.to(self.dtype), p.weight.to(self.dtype), p.bias.to(self.dtype),
                     stride=self.patch_size)
        x = x.flatten(2).transpose(1, 2)                                    # [B,N,C]
        x = torch.cat([self.embeddings.cls_token.to(x.dtype).expand(len(x), -1, -1), x], 1)
        x = x + self.embeddings.position_embeddings.to(x.dtype)             # [B,1+N,C]
        if self.layers == 1:
            return [self.run(self.encoder.layer, x)]
        outputs = []
        for block in self.encoder.layer:
            x = block(x)
            outputs.append(x)
        return outputs[-self.layers:]

    run = SigLIP2.run

    def forward(self, images):
        """images [B,3,H,W] in [0,1] -> latent z [B,N,C], fp32 (class token dropped)."""
        x = sum(y.float() for y in self.blocks(images))
        return self.layernorm(x)[:, 1:]

    def forward_flops(self):
        return forward_flops(self.config["num_hidden_layers"], self.tokens + 1, self.channels,
                             int(self.channels * self.config["mlp_ratio"]), self.patch_size)


# ------------------------------------------------------------------------------------------------

def init_weights(model, seed):
    """Trunc-normal 0.02 for matrices, zero biases, unit norms; on the CPU generator, in the order
    of named_parameters.

    For training an encoder from scratch (train_encoder.py) and for random-weight timing runs.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.data = nn.init.trunc_normal_(torch.empty(p.shape), std=0.02, generator=generator)
        elif name.endswith("bias"):
            p.data.zero_()                                  # norm weights and layer scales stay 1


def forward_flops(depth, tokens, C, hidden, patch):
    """FLOPs to encode one image: 2 per multiply-add of projections, attention and MLP."""
    return 2 * tokens * (depth * (4 * C * C + 2 * tokens * C + 2 * C * hidden) + 3 * patch ** 2 * C)


# transformers leaves a field out of a nested config when it has its class's default
HF_SIGLIP = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                 num_attention_heads=12, image_size=224, patch_size=16)
HF_DINOV2 = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, mlp_ratio=4,
                 image_size=224, patch_size=14)


def build_encoder(config, layers=1, dtype=torch.float32):
    """The encoder that a config.json names: `model_type` siglip* or dinov2; SO400M if it is empty.

    Raises ValueError.
    """
    config = config.get("vision_config", config)            # the full SigLIP file nests it
    kind = config.get("model_type", "siglip_vision_model")
    if not kind.startswith(("siglip", "dinov2")):
        raise ValueError(f"encoder model_type is {kind!r}; known: siglip_vision_model, dinov2")
    model = (SigLIP2({**(HF_SIGLIP if config else {}), **config}, layers, dtype)
             if kind.startswith("siglip") else
             DINOv2({**HF_DINOV2, **config}, layers, dtype))
    if model.channels % (heads := model.config["num_attention_heads"]):
        raise ValueError(f"hidden_size {model.channels} is not a multiple of "
                         f"num_attention_heads {heads}")
    return model
