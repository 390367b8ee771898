"""VGG16 features for the two perceptual losses of the decoder: LPIPS and Gram (style).

    lpips(x_hat, x) = sum_l mean_hw sum_c w_l,c (u_l(x_hat) - u_l(x))^2,   u = F / |F| over channels
    gram(x_hat, x)  = sum_l mean_cc' (G_l(x_hat) - G_l(x))^2,              G = F F^T / (c h w)

F_l are relu1_2, relu2_2, relu3_3, relu4_3, relu5_3. LPIPS: arXiv 1801.03924. Gram: Gatys et al.,
CVPR 2016; Scale-RAE (arXiv 2601.16208, section 2) weighs it by 100 but names neither its layers nor
its normalisation: these are ours, see `gram`. Keys: `features.*` as in torchvision's VGG16,
`lin{0..4}.model.1.weight` as in LPIPS v0.1.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

CONVS = (2, 2, 3, 3, 3)                     # convolutions a stage; a max pool between the stages
WIDTHS = (64, 128, 256, 512, 512)           # channels of a stage at width 1
TINY_WIDTH = 1 / 8                          # 8, 16, 32, 64, 64 channels: the tiny preset's net


class Perceptual(nn.Module):
    """Frozen VGG16 with the LPIPS weights. `width` scales all channels, for the tiny net.

    LPIPS weights start at 1/C: uncalibrated (no human judgements behind them) until a file is
    loaded; the tiny net keeps them. `dtype` is that of the convolutions, the losses are in fp32.
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
            # index 0 is the dropout of the original, which is never active here
            self.add_module(f"lin{i}", nn.ModuleDict({"model": nn.Sequential(nn.Identity(), lin)}))
        # LPIPS' input statistics, for images in [-1,1]
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188])[:, None, None], False)
        self.register_buffer("scale", torch.tensor([.458, .448, .450])[:, None, None], False)
        self.eval().requires_grad_(False)

    def maps(self, images):
        """images [B,3,H,W] in [0,1], H and W >= 16 -> five maps [B, c_l, H / 2^l, W / 2^l]."""
        x, out = (2 * images - 1 - self.shift) / self.scale, []
        x = x.to(self.features[0].weight.dtype)
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                out.append(x)
        return out

    def lpips(self, fa, fb):
        """Two lists of maps -> LPIPS distance [B], fp32."""
        total = 0.0
        for i, (a, b) in enumerate(zip(fa, fb)):
            # |F| + 1e-10 as in the original; vector_norm because its gradient at a position where
            # every ReLU is off is 0, where that of sqrt(sum of squares) is NaN
            a, b = (f.float() / (torch.linalg.vector_norm(f.float(), dim=1, keepdim=True) + 1e-10)
                    for f in (a, b))
            w = self.get_submodule(f"lin{i}")["model"][1].weight.float()
            total = total + F.conv2d((a - b).square(), w).mean(dim=(1, 2, 3))   # [B]
        return total

    def gram(self, fa, fb, layers=(0, 1, 2, 3, 4)):
        """Two lists of maps -> Gram distance [B], fp32, every layer of weight 1.

        G = F F^T / (c h w) an image; mean squared difference over its c x c entries; sum over
        `layers`. The paper gives only the loss' weight: layers and normalisation are our choice.
        """
        total = 0.0
        for i in layers:
            a, b = (f.float().flatten(2) for f in (fa[i], fb[i]))               # [B, c, hw]
            difference = (a @ a.mT - b @ b.mT) / a[0].numel()                   # [B, c, c]
            total = total + difference.square().mean(dim=(1, 2))                # [B]
        return total

    def forward(self, x_hat, x, gram_layers=(0, 1, 2, 3, 4)):
        """Images [B,3,H,W] in [0,1] -> (lpips [B], gram [B]); gradients reach x_hat only."""
        fa = self.maps(x_hat)
        with torch.no_grad():
            fb = self.maps(x)
        return self.lpips(fa, fb), self.gram(fa, fb, gram_layers)

    def sizes(self, side):
        """The elements of each convolution's output for a square image, stage by stage."""
        return [[round(c * self.width) * (side >> i) ** 2] * n
                for i, (c, n) in enumerate(zip(WIDTHS, CONVS))]

    def forward_flops(self, side):
        """FLOPs of the features of one square image, 2 per multiply-add."""
        total, c_in = 0, 3
        for stage, c in zip(self.sizes(side), (round(c * self.width) for c in WIDTHS)):
            for elements in stage:
                total, c_in = total + 2 * 9 * c_in * elements, c
        return total

    def activation_bytes(self, side):
        """Kept for the backward pass to one square x_hat: every ReLU's output, a pool's output
        and its 8-byte indices, and at the five taps some four fp32 copies for the losses. Checked
        against autograd in the tests."""
        e, stages = self.features[0].weight.element_size(), self.sizes(side)
        pools = sum(stage[0] // 4 for stage in stages[:-1])
        taps = sum(stage[0] for stage in stages)
        return e * sum(map(sum, stages)) + (8 + e) * pools + 16 * taps


def init_weights(model, seed):
    """He-normal convolutions, zero biases (VGG has no norms), on the CPU generator; LPIPS 1/C.

    For training a net of its own; a random one is a stand-in and must be called so.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.features:
        if isinstance(module, nn.Conv2d):
            std = (2 / module.weight[0].numel()) ** 0.5
            module.weight.data = torch.randn(module.weight.shape, generator=generator) * std
            module.bias.data.zero_()
