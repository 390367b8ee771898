"""The RAE decoder: latent tokens become an image (a ViT-MAE decoder; spec of the released files).

    z [B,N,C]  ->  embed, class token, fixed 2-D sin-cos positions, blocks, norm, pixels of a patch

The patch size is free: 16 x 16 tokens give 224 px with patch 14 and 256 px with patch 16.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# key: depth, width, heads, MLP; parameters with C = 1152, patch 14
SIZES = {
    "tiny": (4, 160, 4, 640),
    "b": (12, 768, 12, 3072),    # 0.086 B
    "l": (24, 1024, 16, 4096),   # 0.304 B
    "xl": (28, 1152, 16, 4096),  # 0.415 B, the released ones
}


class Linear(nn.Linear):
    """fp32 weights, product in the dtype of x (bf16 on accelerators), no autocast needed."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """Statistics in fp32, result in the dtype of x."""

    def forward(self, x):
        w, b = self.weight, self.bias
        return F.layer_norm(x.float(), self.normalized_shape, w, b, self.eps).to(x.dtype)


def sincos_positions(D, side):
    """Fixed table [side*side, D]: first half of the channels codes the column, second the row."""
    omega = 10000.0 ** (-torch.arange(D // 4, dtype=torch.float64, device="cpu") / (D // 4))
    angle = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * omega  # [side, D/4]
    axis = torch.cat([angle.sin(), angle.cos()], 1)                         # [side, D/2]
    col = axis[None, :, :].expand(side, side, -1)
    row = axis[:, None, :].expand(side, side, -1)
    return torch.cat([col, row], 2).flatten(0, 1).float()


def attention(q, k, v):
    """Softmax attention of all tokens to all, each [B,H,L,hd]."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:    # the fused kernel is 3 to 5 times
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v   # slower there (LOG.md)
    return F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    """x += Attn(LN(x)); x += MLP(LN(x)); module names are the released keys."""

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
        y = attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attention.output["dense"](y)
        y = F.gelu(self.intermediate["dense"](self.layernorm_after(x)))     # the erf form
        return x + self.output["dense"](y)


class Decoder(nn.Module):
    """config: the released fields `hidden_size` (C), `decoder_hidden_size`,
    `decoder_num_hidden_layers`, `decoder_num_attention_heads`, `decoder_intermediate_size`,
    `patch_size`, `num_patches` (N), and `image_mean`, `image_std` of the encoder (default 0.5),
    because the network predicts pixels normalised as the encoder saw them.

    With `latent_stats` true in it, the statistics of the latent, `latent_mean` and `latent_var`
    [C,h,w], are stored among the weights, and `forward` takes `normalise(encoder(x))`, in which a
    stage 2 may work (optional in RAE, arXiv 2510.11690). Scale-RAE's works on the encoder's latent
    itself: where weights.py loads the decoder for it, the field is false. remat: recompute each
    block's activations in the backward pass.
    """

    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        c = self.config = {"layer_norm_eps": 1e-12, "num_patches": 256, "patch_size": 14,
                           "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, **config}
        C, W, heads = c["hidden_size"], c["decoder_hidden_size"], c["decoder_num_attention_heads"]
        if W % (4 * heads):
            raise ValueError(f"decoder width {W} must be a multiple of 4 x heads = {4 * heads}")
        self.channels, self.tokens, self.patch = C, c["num_patches"], c["patch_size"]
        self.grid = int(self.tokens ** 0.5)
        if self.grid ** 2 != self.tokens:
            raise ValueError(f"{self.tokens} latent tokens are not a square grid")
        self.dtype = dtype
        self.decoder_embed = Linear(C, W)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, W))
        table = torch.cat([torch.zeros(1, W, device="cpu"), sincos_positions(W, self.grid)])[None]
        self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)   # [1,1+N,W]
        self.decoder_layers = nn.ModuleList(
            Block(W, heads, c["decoder_intermediate_size"], c["layer_norm_eps"])
            for _ in range(c["decoder_num_hidden_layers"]))
        self.decoder_norm = LayerNorm(W, eps=c["layer_norm_eps"])
        self.decoder_pred = Linear(W, self.patch ** 2 * 3)
        for name in ("image_mean", "image_std"):        # in no file; on the CPU for meta builds too
            self.register_buffer(name, torch.tensor(c[name], device="cpu").view(1, 3, 1, 1), False)
        if c.get("latent_stats"):
            self.register_buffer("latent_mean", torch.zeros(C, self.grid, self.grid))
            self.register_buffer("latent_var", torch.ones(C, self.grid, self.grid))
        self.remat = False

    def statistics(self):
        """Mean and standard deviation of the latent, each [N,C]."""
        return self.latent_mean.flatten(1).mT, (self.latent_var.flatten(1).mT + 1e-5).sqrt()

    def normalise(self, z):
        """The encoder's latent [B,N,C] -> what `forward` takes: the same without `latent_stats`."""
        if not self.config.get("latent_stats"):
            return z
        mean, std = self.statistics()
        return (z - mean) / std

    def patches(self, z):
        """z [B,N,C] -> normalised pixels of each patch [B,N,p*p*3], channel fastest."""
        x = self.decoder_embed(z.to(self.dtype))                            # [B,N,W]
        x = torch.cat([self.trainable_cls_token.to(x.dtype).expand(len(x), -1, -1), x], 1)
        x = x + self.decoder_pos_embed.to(x.dtype)                          # [B,1+N,W]
        for block in self.decoder_layers:
            x = checkpoint(block, x, use_reentrant=False) if self.remat else block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:].float()

    def unpatchify(self, x):
        """[B,N,p*p*3] -> [B,3,H,W], H = W = p*sqrt(N)."""
        g, p = self.grid, self.patch
        x = x.view(-1, g, g, p, p, 3).permute(0, 5, 1, 3, 2, 4)             # [B,3,row,py,col,px]
        return x.reshape(-1, 3, g * p, g * p)

    def forward(self, z):
        """z [B,N,C] -> image [B,3,H,W], fp32, meant in [0,1] but not clamped (losses want that)."""
        if self.config.get("latent_stats"):
            mean, std = self.statistics()
            z = z * std + mean
        return self.unpatchify(self.patches(z)) * self.image_std + self.image_mean

    def forward_flops(self):
        """FLOPs to decode one image, 2 per multiply-add; training takes three times as many."""
        c, L, W = self.config, self.tokens + 1, self.config["decoder_hidden_size"]
        block = 4 * W * W + 2 * L * W + 2 * W * c["decoder_intermediate_size"]
        return 2 * (L * (c["decoder_num_hidden_layers"] * block + 3 * self.patch ** 2 * W)
                    + self.tokens * self.channels * W)

    def activation_bytes(self):
        """Kept for the backward pass of one image: a token and block the fp32 inputs of two norms
        and, in the compute dtype, their outputs, q, k, v, attention's output and its copy, GELU's
        input and output. With remat a block's input. Checked against autograd in the tests."""
        c, W, e = self.config, self.config["decoder_hidden_size"], self.dtype.itemsize
        block = 8 * W + e * (7 * W + 2 * c["decoder_intermediate_size"])
        layers = c["decoder_num_hidden_layers"] * (e * W if self.remat else block)
        return (self.tokens + 1) * (layers + self.remat * block)


def init_weights(model, seed):
    """Nothing is published, so ours: trunc-normal 0.02 for Linears, zero biases and class token.

    Drawn on the CPU generator: every device starts from the same weights.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = torch.empty(module.weight.shape)
            module.weight.data = nn.init.trunc_normal_(weight, std=0.02, generator=generator)
            module.bias.data.zero_()


def latent_statistics(latents):
    """Latents [B,N,C] by and by -> mean and variance at each position, [C,h,w], summed in fp64."""
    count, total, square = 0, 0.0, 0.0
    for z in latents:
        z = z.cpu().double()
        count, total, square = count + len(z), total + z.sum(0), square + z.square().sum(0)
    mean = total / count                                                    # [N,C]
    var = (square / count - mean.square()).clamp(min=0)
    side = int(len(mean) ** 0.5)
    return tuple(s.mT.unflatten(1, (side, side)).float() for s in (mean, var))


def decoder_config(size, channels, tokens, patch, mean, std):
    """The config of a `SIZES` row for a latent [tokens, channels]."""
    depth, width, heads, hidden = SIZES[size]
    return dict(hidden_size=channels, decoder_hidden_size=width, decoder_num_hidden_layers=depth,
                decoder_num_attention_heads=heads, decoder_intermediate_size=hidden,
                patch_size=patch, num_patches=tokens, image_size=patch * int(tokens ** 0.5),
                image_mean=list(mean), image_std=list(std))
