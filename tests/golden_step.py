"""One training step of each stage with the shipped, trained weights: the check of a whole port.

`python tests/golden.py --write DIR` writes step.safetensors and step_decoder.safetensors from here.
A file holds one batch with every random number already drawn, the losses, and of the gradient of
every parameter 32 elements, evenly spaced over the flattened tensor. So a port needs neither data
nor draws to check its forward and backward pass. The first steps of a training check less: there
the velocity and the modulations are zero, so even a DiT without attention agrees.
"""
import numpy as np
import torch

import chat
import data
import flow
import losses
import networks
import parallel
import stage2
import train_decoder
import train_dit
import weights

GUIDANCE, STEPS = 3.0, 10           # of the sample


def thin(gradient):
    """Return 32 evenly spaced elements of a gradient (all of a smaller one)."""
    flat = gradient.detach().flatten()
    return flat[torch.linspace(0, len(flat) - 1, min(32, len(flat))).long()]


def devices_of(device, dtype):
    return parallel.Devices(torch.device(device).type, torch.device(device), 0, 1, dtype,
                            {"fsdp": 1, "tensor": 1})


@torch.enable_grad()
def step(inputs, device, dtype):
    """Stage 2 with the weights of tiny/: the losses of train_dit.ScaleRAE, their gradients, and a
    sample by 10 Euler steps with guidance 3.

    The loss is text / labelled tokens + 2 * sum(flow) / images to generate.
    """
    net = stage2.load_run(weights.TINY, devices_of(device, torch.float32))
    for module in [*net.llm.modules(), *net.dit.modules(), net.llm]:
        if hasattr(module, "dtype"):
            module.dtype = dtype
    model = train_dit.ScaleRAE(net.llm, net.dit, net.config.alpha).requires_grad_(True)
    text, flow_losses, _, cond = model(inputs["z"], inputs["z"], inputs)
    text = text / (inputs["targets"] != chat.IGNORE).sum()
    loss = text + 2 * flow_losses.sum() / inputs["answer"].sum()
    loss.backward()
    with torch.no_grad():
        sample = flow.sample(net.dit, cond[:1].detach(), inputs["eps"][:1], net.config.alpha,
                             STEPS, GUIDANCE)
    gradients = {f"gradient.{weights.stage2_key(k)}": thin(p.grad)
                 for k, p in model.named_parameters() if p.grad is not None}
    t = flow.sample_time(inputs["normal"], net.config.alpha)
    return {"t": t, "cond": cond, "text": text, "flow": flow_losses, "loss": loss,
            "sample": sample, **gradients}


@torch.enable_grad()
def step_decoder(inputs, device, dtype):
    """Stage 1 with the weights of tiny/: L = l1 + 0.1 lpips + 10 gram + 0.1 w gan, the tiny
    preset's, and its gradients at the decoder's parameters.

    The reconstruction is compared with the negative of the image: where the trained decoder is
    right to a millionth, rounding would choose the sign of the L1's gradient.
    """
    devices = devices_of(device, torch.float32)
    encoder = networks.load_encoder(weights.TINY / "encoder.safetensors", devices)
    model = networks.load_decoder(weights.TINY / "decoder.safetensors", devices, encoder)
    vgg = networks.load_perceptual(weights.TINY / "vgg.safetensors", None, devices)
    disc = networks.load_discriminator(weights.TINY / "dino.safetensors", devices, 0).eval()
    disc.heads.load_state_dict({k[6:]: v for k, v in inputs.items() if k.startswith("heads.")})
    for module in [*encoder.modules(), *model.modules()]:
        if hasattr(module, "dtype"):
            module.dtype = dtype
    model.requires_grad_(True)
    x = inputs["images"].float() / 255                                      # [B,3,S,S]
    with torch.no_grad():
        z = encoder(x)                                                      # [B,N,C]
    x_hat = model(z)                                                        # [B,3,S,S]
    target = 1 - x
    l1 = (x_hat - target).abs().mean()
    lpips, gram = (v.mean() for v in vgg(x_hat, target))
    gan = losses.g_loss(disc(losses.augment(x_hat, inputs["augment"])))
    rec = l1 + 0.1 * lpips + 10 * gram
    w = losses.adaptive_weight(rec, gan, model.decoder_pred.weight)
    loss = rec + 0.1 * w * gan
    loss.backward()
    gradients = {f"gradient.{k}": thin(p.grad) for k, p in model.named_parameters()
                 if p.grad is not None}
    return {"z": z, "x_hat": x_hat, "l1": l1, "lpips": lpips, "gram": gram, "gan": gan,
            "gan_weight": w, "loss": loss, **gradients}


def step_inputs():
    """Two images to generate, one of them without its condition, and a question about a third."""
    tokenizer = chat.load_tokenizer(weights.TINY)
    sources = ["builtin:synthetic", "builtin:web", "builtin:qa"]
    records = [{**data.Mixture([source], 64)[0], "n": n} for n, source in enumerate(sources)]
    records[2]["conversations"][-1]["value"] = "seven quiet elephants"      # a loss to learn from
    batch = train_dit.Collate(tokenizer, 64, 96, 0, 0.0)(records)
    encoder = networks.load_encoder(weights.TINY / "encoder.safetensors",
                                    devices_of("cpu", torch.float32))
    names = "ids", "where", "targets", "start", "answer", "normal", "drop", "eps"
    inputs = {name: batch[name] for name in names}
    inputs["drop"] = torch.tensor([False, True, False])
    return {**inputs, "z": encoder(batch["images"].float() / 255)}


def step_decoder_inputs():
    """Two images, chosen so that no LeakyReLU's input and no error of a pixel is so near to 0 that
    the rounding of another framework would turn its sign."""
    numbers = 343, 127
    records = [data.Mixture(["builtin:web"], 64)[n] for n in numbers]
    images = np.stack([record["image"] for record in records]).transpose(0, 3, 1, 2)
    draws = train_decoder.uniform(numbers, 0, "augment the decoder's fake")
    disc = networks.load_discriminator(weights.TINY / "dino.safetensors",
                                       devices_of("cpu", torch.float32), seed=0)
    heads = {f"heads.{k}": v for k, v in disc.heads.state_dict().items()}   # untrained
    return {"images": torch.from_numpy(images.copy()), "augment": draws, **heads}
