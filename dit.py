"""The diffusion transformer: the velocity of the latent from x_t, the time and a condition.

    s   = x_embedder(x_t) + pos_embed                                   # [B,N,D]
    c   = SiLU(t_embedder(t) + cond)                                    # [B,N,Z], one per token
    shift, scale, gate, ... = Linear(SiLU(c))                           # the authors' second SiLU
    s  += gate * Attn(modulate(RMSNorm(s)));  s += gate * SwiGLU(modulate(RMSNorm(s)))   # depth x
    v   = linear(modulate(RMSNorm(s)))                                  # [B,N,C]

This is LightningDiT (arXiv 2501.01423) with AdaLN per token: condition token i modulates latent
token i, and there is no cross-attention. With `head_depth` the last blocks form the wide head of
DiT-DH (arXiv 2510.11690): they run on a second embedding of x_t and are modulated by the trunk's
output. Module names are the keys of the released checkpoints under `diff_head.model.`.

B batch, N latent tokens (256), C latent channels (1152), D width, H heads, Z condition channels.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Size:
    width: int       # D
    depth: int
    heads: int       # H
    llm: str         # default language model


# Paper, Table 10. Parameters and training FLOPs are the DiT's alone, with N = 256 and C = 1152
# (tiny: 64 tokens of 96 channels). tests/test_ladder.py recomputes both from 0.5b on.
#                     D depth  H  LLM
SIZES = {
    "tiny": Size(    160,  6,  5, "tiny"),                          # 0.003 B    0.001 TFLOP/image
    "0.5b": Size(   1280, 16, 32, "Qwen/Qwen2.5-1.5B-Instruct"),    # 0.481 B    0.750
    "2b":   Size(   2048, 32, 32, "Qwen/Qwen2.5-1.5B-Instruct"),    # 2.436 B    3.782
    "3b":   Size(   2304, 32, 32, "Qwen/Qwen2.5-1.5B-Instruct"),    # 3.082 B    4.779
    "5b":   Size(   3072, 32, 32, "Qwen/Qwen2.5-1.5B-Instruct"),    # 5.475 B    8.467
    "9b":   Size(   4096, 32, 32, "Qwen/Qwen2.5-7B-Instruct"),      # 9.729 B   15.012
}
PAPER_NAMES = {"0.5B": "0.5b", "2.4B": "2b", "3.3B": "3b", "3.1B": "3b", "5.5B": "5b", "9.8B": "9b"}


@dataclass(frozen=True)
class DiTConfig:
    channels: int            # C
    tokens: int              # N, a square grid
    width: int               # D
    depth: int
    heads: int               # H
    cond_width: int = 0      # Z; 0: D
    head_width: int = 0      # D2, width of the wide head; 0: D (the single-width DDT)
    head_depth: int = 0      # number of its blocks; 0: no wide head
    head_heads: int = 0      # its attention heads; 0: H
    qk_norm: bool = False    # RMSNorm on queries and keys
    null: bool = True        # a learned null condition, for guidance
    predict: str = "v"       # output of the last layer: "v", or "x", the clean latent
    eps: float = 1e-6        # of the norms


class Linear(nn.Linear):
    """Keep fp32 weights and multiply in the dtype of x (bf16 on accelerators), without autocast."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    """Compute statistics in fp32, cast back, then multiply by the weight (the authors' order)."""

    def forward(self, x):
        y = F.rms_norm(x.float(), self.normalized_shape, eps=self.eps).to(x.dtype)
        return y * self.weight.to(x.dtype)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def sincos_positions(D, side):
    """Return the fixed table [N,D] that is added to the tokens (RoPE comes on top of it): the first
    half of the channels encodes the column, the second half the row."""
    omega = 10000.0 ** (-torch.arange(D // 4, dtype=torch.float64, device="cpu") / (D // 4))
    angle = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * omega  # [side, D/4]
    axis = torch.cat([angle.sin(), angle.cos()], 1)                         # [side, D/2]
    col = axis[None, :, :].expand(side, side, -1)                           # [row, col, D/2]
    row = axis[:, None, :].expand(side, side, -1)
    return torch.cat([col, row], 2).flatten(0, 1).float()                   # [N, D]


class RoPE(nn.Module):
    """Rotate one head's channels in 2-D: the first half by the row, the second half by the column
    (the additive table does the opposite). Adjacent channels (a, b) become (a cos - b sin,
    b cos + a sin)."""

    def __init__(self, head_dim, side):
        super().__init__()
        d = head_dim // 2
        f = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64, device="cpu") / d)   # [hd/4]
        angle = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * f  # [side, hd/4]
        angle = angle.repeat_interleave(2, 1)                               # [side, hd/2]
        row = angle[:, None, :].expand(side, side, -1)                      # [row, col, hd/2]
        col = angle[None, :, :].expand(side, side, -1)
        angle = torch.cat([row, col], 2).flatten(0, 1)                      # [N, hd]
        self.register_buffer("freqs_cos", angle.cos().float())
        self.register_buffer("freqs_sin", angle.sin().float())

    def forward(self, x):                                                   # [B,H,N,hd]
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)                          # [B,H,N,hd/2]
        turned = torch.stack([-b, a], -1).flatten(-2)                       # [B,H,N,hd]
        return x * self.freqs_cos.to(x.dtype) + turned * self.freqs_sin.to(x.dtype)


def attention(q, k, v):
    """Softmax attention from all tokens to all tokens, each [B,H,N,hd]."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # torch's fused kernel is two to six times slower here (LOG.md, 2026-11-23)
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, D, heads, qk_norm, eps):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = Linear(D, 3 * D), Linear(D, D)
        self.q_norm = RMSNorm(D // heads, eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D // heads, eps) if qk_norm else nn.Identity()

    def forward(self, x, rope):                                             # [B,N,D]
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))                # [B,N,3,H,hd]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # each [B,H,N,hd]
        q, k = rope(self.q_norm(q)), rope(self.k_norm(k))
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))     # [B,N,D]


class SwiGLU(nn.Module):
    MULTIPLE = {"cuda": 128}        # multiple to pad h to, by device; XLA's compiler pads by itself

    def __init__(self, D):
        super().__init__()
        self.hidden = int(2 / 3 * int(4 * D))           # h, the authors': not rounded to a multiple
        self.w12, self.w3 = Linear(D, 2 * self.hidden), Linear(self.hidden, D)

    def forward(self, x):                                                   # [B,N,D]
        if more := -self.hidden % self.MULTIPLE.get(x.device.type, 1):
            return self.padded(x, more)
        a, b = self.w12(x).chunk(2, -1)                                     # [B,N,h]
        return self.w3(F.silu(a) * b)                                       # [B,N,D]

    def padded(self, x, more):
        """Compute the same with `more` hidden channels of zeros. At D = 2048 h is 5461, which is
        odd, so no row of a bf16 matrix is aligned as tensor cores want it. The zeros join the cast
        weights and add silu(0) * 0 = 0. Parameters, gradients and files keep h."""
        w12, b12 = self.w12.weight.to(x.dtype), self.w12.bias.to(x.dtype)
        w12 = F.pad(w12.unflatten(0, (2, -1)), (0, 0, 0, more)).flatten(0, 1)       # [2(h+more),D]
        b12 = F.pad(b12.unflatten(0, (2, -1)), (0, more)).flatten()                 # [2(h+more)]
        a, b = F.linear(x, w12, b12).chunk(2, -1)                           # [B,N,h+more]
        w3 = F.pad(self.w3.weight.to(x.dtype), (0, more))                   # [D,h+more]
        return F.linear(F.silu(a) * b, w3, self.w3.bias.to(x.dtype))


def adaLN(Z, out):
    """Return SiLU, then Linear. The SiLU is the same in every block, so `DiT.forward` applies it
    once and blocks call only `[1]`. The Sequential keeps the released key `adaLN_modulation.1`."""
    return nn.Sequential(nn.SiLU(), Linear(Z, out))


class Block(nn.Module):
    def __init__(self, D, heads, Z, qk_norm, eps):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(D, eps), RMSNorm(D, eps)
        self.attn, self.mlp = Attention(D, heads, qk_norm, eps), SwiGLU(D)
        self.adaLN_modulation = adaLN(Z, 6 * D)

    def forward(self, x, c, rope):                  # x [B,N,D], c [B or 1, N or 1, Z]
        m = self.adaLN_modulation[1](c)                                     # [B,N,6D]
        shift1, scale1, gate1, shift2, scale2, gate2 = m.chunk(6, -1)       # each [B,N,D]
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, D, C, Z, eps):
        super().__init__()
        self.norm_final = RMSNorm(D, eps)
        self.linear = Linear(D, C)
        self.adaLN_modulation = adaLN(Z, 2 * D)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation[1](c).chunk(2, -1)             # [B,N,D]
        return self.linear(modulate(self.norm_final(x), shift, scale))      # [B,N,C]


class TokenEmbedder(nn.Module):
    """Embed each token with one Linear. The released key and shape [D,C,1,1] are those of a 1x1
    convolution on the latent grid."""

    def __init__(self, C, D):
        super().__init__()
        self.proj = nn.Conv2d(C, D, 1)

    def forward(self, x):                                                   # [B,N,C] -> [B,N,D]
        return F.linear(x, self.proj.weight.flatten(1).to(x.dtype), self.proj.bias.to(x.dtype))


class TimeEmbedder(nn.Module):
    """Turn t in [0,1] into random Fourier features, then an MLP, in fp32. The 256 frequencies are
    in no checkpoint: the authors draw them with torch after the seed 114514."""

    def __init__(self, Z):
        super().__init__()
        self.mlp = nn.Sequential(Linear(512, Z), nn.SiLU(), Linear(Z, Z))
        frequencies = np.load(Path(__file__).parent / "time_frequencies.npy")
        self.register_buffer("frequencies", torch.from_numpy(frequencies), persistent=False)

    def forward(self, t):                                                   # [B] -> [B,Z]
        angle = t.float()[:, None] * self.frequencies * (2 * torch.pi)      # [B,256]
        return self.mlp(torch.cat([angle.sin(), angle.cos()], -1))


class DiT(nn.Module):
    """The network of paper section 3 and Table 10. The reference classes are LightningDiT and, with
    a wide head, LightningDDT.

    dtype: the dtype of tokens, positions, modulation and residuals. The weights (cast where they
    are used), the statistics of the norms, and time + cond with its SiLUs are fp32. Set `remat` to
    recompute each block's activations in the backward pass. Raises ValueError for sizes that do not
    divide.
    """

    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        self.config, self.dtype, self.remat = config, dtype, False
        k = config
        C, D, Z = k.channels, k.width, k.cond_width or k.width
        wide = k.head_depth > 0
        D2, heads2 = (k.head_width or D, k.head_heads or k.heads) if wide else (D, k.heads)
        side = int(k.tokens ** 0.5)
        if side * side != k.tokens:
            raise ValueError(f"{k.tokens} latent tokens are not a square grid")
        for width, heads in ((D, k.heads), (D2, heads2)):
            if width % (4 * heads):
                raise ValueError(f"the DiT's width {width} must be a multiple of 4 x heads = "
                                 f"{4 * heads}")
        if k.predict not in ("v", "x"):
            raise ValueError(f"predict is {k.predict!r}; known are 'v' and 'x'")

        self.pos_embed = nn.Parameter(sincos_positions(D, side)[None], requires_grad=False)
        self.x_embedder = TokenEmbedder(C, D)
        self.t_embedder = TimeEmbedder(Z)
        if k.null:                  # the learned condition for no prompt, the same for all tokens
            self.y_embedder = nn.Module()
            self.y_embedder.dropout_embedding = nn.Parameter(torch.zeros(Z))
        self.dit_blocks = nn.ModuleList(
            [Block(D, k.heads, Z, k.qk_norm, k.eps) for _ in range(k.depth)]
            + [Block(D2, heads2, D2, k.qk_norm, k.eps) for _ in range(k.head_depth)])
        if wide:
            self.s_embedder = TokenEmbedder(C, D2)
            self.s_projector = Linear(D, D2) if D2 != D else nn.Identity()
            self.enc_rope, self.dec_rope = RoPE(D // k.heads, side), RoPE(D2 // heads2, side)
        else:
            self.feat_rope = RoPE(D // k.heads, side)
        self.final_layer = FinalLayer(D2, C, D2 if wide else Z, k.eps)

    def run(self, blocks, x, c, rope):
        """Run a stack of blocks. (On XLA a compiled loop takes the place of this method.)"""
        for block in blocks:
            if self.remat and torch.is_grad_enabled():
                x = checkpoint(block, x, c, rope, use_reentrant=False)
            else:
                x = block(x, c, rope)
        return x

    def forward(self, x_t, t, cond):
        """x_t [B,N,C], t [B] or [1], cond [B or 1, N or 1, Z] -> velocity [B,N,C]."""
        k = self.config
        c = F.silu(self.t_embedder(t)[:, None] + cond.float())              # [B,N,Z], fp32
        c = F.silu(c).to(self.dtype)                # the SiLU of every adaLN, hoisted
        x = x_t.to(self.dtype)
        s = self.x_embedder(x) + self.pos_embed.to(self.dtype)              # [B,N,D]
        if not k.head_depth:
            s = self.run(self.dit_blocks, s, c, self.feat_rope)
            out = self.final_layer(s, c)                                    # [B,N,C]
        else:
            s = self.run(self.dit_blocks[:k.depth], s, c, self.enc_rope)    # trunk
            s = F.silu(self.s_projector(F.silu(s)))     # [B,N,D2]; the outer SiLU is every adaLN's
            h = self.s_embedder(x)                      # [B,N,D2]; RoPE is its only position
            h = self.run(self.dit_blocks[k.depth:], h, s, self.dec_rope)    # wide head
            out = self.final_layer(h, s)                                    # [B,N,C]
        if k.predict == "x":        # the output is z (JiT, arXiv 2511.13720), and x_t - z = t v
            t = t.float().clamp(min=0.05)[:, None, None]                    # [B,1,1]; JiT's clamp
            out = (x_t.float() - out.float()) / t
        return out

    def null_condition(self):
        """Return the condition of the unconditional branch of guidance, [1,1,Z]."""
        return self.y_embedder.dropout_embedding[None, None]

    def train_flops(self):
        """Return the training FLOPs per image: 2 per multiply-add forward, twice as many backward.

        Multiply-adds per token and block: attention 4 D^2 + 2 N D, SwiGLU 3 h D, AdaLN 6 Z D, which
        is a third of the whole. A test compares the sum with torch's counter.
        """
        k = self.config

        def block(D, Z):
            hidden = int(2 / 3 * int(4 * D))
            return 4 * D * D + 2 * k.tokens * D + 3 * hidden * D + 6 * Z * D

        C, D, Z = k.channels, k.width, k.cond_width or k.width
        D2 = (k.head_width or D) if k.head_depth else D
        macs = k.depth * block(D, Z) + C * D
        if k.head_depth:
            macs += k.head_depth * block(D2, D2) + C * D2 + (D * D2 if D2 != D else 0)
        macs += C * D2 + 2 * D2 * (D2 if k.head_depth else Z)               # final layer
        time = 512 * Z + Z * Z
        return 6 * (macs * k.tokens + time)


def initial(name, shape, seed):
    """Return the initial value of one parameter, which any rank or framework can make alone.

    Linears and embedders: Xavier-uniform with zero bias. Time MLP: N(0, 0.02^2). AdaLN and the last
    layer: zero, so that every block starts as the identity and v as 0 (adaLN-zero of DiT). Norms:
    one. Null condition: zero. Raises ValueError for a parameter of another kind, whose value in the
    constructor is lost, because networks are built on the meta device.
    """
    from data import rng
    if not name.endswith(("weight", "bias", "dropout_embedding")):
        raise ValueError(f"{name} has no initial value; give it one in dit.initial")
    generator = rng(seed, f"init dit {name}")
    if len(shape) == 1:
        value = np.full(shape, float(name.endswith("weight")))
    elif "adaLN_modulation" in name or name.startswith("final_layer.linear"):
        value = np.zeros(shape)
    elif "embedder.mlp" in name:
        value = generator.standard_normal(shape, np.float32) * 0.02
    else:
        bound = (6 / (shape[0] + shape[1])) ** 0.5
        value = (2 * generator.random(shape, np.float32) - 1) * bound
    return torch.from_numpy(value).float()
