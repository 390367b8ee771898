"""The sharding table against every parameter of every size; meshes; peaks.

    pytest tests/test_parallel.py
"""
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import decoder as decoders
import discriminator as gans
import dit as dits
import encoder as encoders
import parallel
import perceptual
import text_model as text
import train_dit
import vae as vaes


def networks():
    """Every network of the real sizes on the meta device: no memory."""
    with torch.device("meta"):
        for key, s in dits.SIZES.items():
            if key != "tiny":
                yield f"dit {key}", dits.DiT(1152, 256, s.width, s.depth, s.heads)
        yield "dit 2b + wide head", dits.DiT(1152, 256, 2048, 32, 32, None, 2688, 2)
        yield "qwen 1.5b", text.TextModel(text.QWEN_1_5B, 256, 1152, 2048)
        yield "qwen 7b", text.TextModel(text.QWEN_7B, 256, 1152, 4096)
        for size in ("b", "l", "xl"):
            config = decoders.decoder_config(size, 1152, 256, 14, (0.5,) * 3, (0.5,) * 3)
            yield f"decoder {size}", decoders.Decoder(config)
        yield "siglip2", encoders.SigLIP2(encoders.SO400M)
        yield "webssl", encoders.DINOv2(encoders.WEBSSL_300M)
        small = [dits.DiT(64, 256, 1280, 16, 32), text.TextModel(text.QWEN_1_5B, 256, 1152, 1280)]
        yield "vae latent with repa", train_dit.ScaleRAE(*small[::-1], 1.0, 8, 1152)
        yield "vae", vaes.VAE()
        yield "vgg", perceptual.Perceptual()
        yield "discriminator", gans.Discriminator()


@pytest.mark.parametrize("name, model", list(networks()), ids=lambda v: v if isinstance(v, str) else "")
def test_every_large_parameter_matches_one_row_and_divides(name, model):
    """Each parameter above 1 MB matches exactly one row and divides over 64 devices on the fsdp
    axis; positions, queries and convolutional networks are whole on purpose. (The tensor axis need
    not divide: FFN widths and the vocabulary are odd, and the compiler pads.)"""
    for key, p in model.named_parameters():
        if p.numel() * 4 <= 2 ** 20:
            continue
        rows = [pattern for pattern, _ in parallel.TABLE if re.search(pattern, key)]
        assert len(rows) == 1, (key, rows)
        axes = parallel.spec(key, p.shape)
        if not any(axes):
            assert name in ("vae", "vgg", "discriminator") or re.search("queries|pos", key), key
        else:
            assert p.shape[axes.index("fsdp")] % 64 == 0, (key, tuple(p.shape), axes)


def test_a_stack_is_split_as_its_blocks_and_files_have_it_block_by_block():
    """What scan.py keeps: one more dimension, whole; and the moments of it; there and back."""
    shape = (6144, 2048)
    for name in ("dit.dit_blocks.{}.attn.qkv.weight", "optimizer.dit.dit_blocks.{}.attn.qkv.weight.exp_avg"):
        one = parallel.spec(name.format(3), shape)
        assert one == ("tensor", "fsdp")
        assert parallel.spec(name.format("0-31"), (32, *shape)) == (None, *one)
    assert parallel.spec("dit_blocks.0-31.norm1.weight", (32, 2048)) == (None, None)    # one is small
    assert parallel.spec("optimizer.dit_blocks.0-31.norm1.weight.step", ()) == ()
    devices = parallel.setup("cpu", "float32")
    for stack in (torch.randn(3, 4, 5), torch.randn(3, 4), torch.tensor(7.0)):
        saved = parallel.pieces("m.blocks.2-4.w.x", stack)
        assert [(key, first) for key, _, first in saved] == [(f"m.blocks.{i}.w.x", 0) for i in (2, 3, 4)]
        found = torch.zeros_like(stack)
        parallel.fill("m.blocks.2-4.w.x", found,
                      lambda key, a, b: dict(s[:2] for s in saved)[key][a:b] if stack.dim() else stack,
                      devices)
        assert torch.equal(found, stack)
    assert list(parallel.apart("m.blocks.2.w", torch.ones(2))) == ["m.blocks.2.w"]


def test_an_update_that_is_not_finite_changes_nothing():
    """Neither weights nor moments nor Adam's count; the next finite one does."""
    devices = parallel.setup("cpu", "float32")
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = parallel.adamw([w], devices, lr=0.1)
    for gradient, skipped in ((1.0, 0), (float("nan"), 1), (float("inf"), 1), (1.0, 0)):
        w.grad = torch.full((3,), gradient)
        before = [t.clone() for t in (w, *optimizer.state[w].values())]
        norm = parallel.clip_grad([w], 1.0, devices)
        assert parallel.guarded_step(optimizer, norm, devices).item() == skipped
        after = [w, *optimizer.state[w].values()]
        if skipped:
            assert all(torch.equal(a, b) for a, b in zip(after, before))
        else:
            assert not torch.equal(w, before[0])
    assert optimizer.state[w]["step"].item() == 2


def test_mesh():
    assert parallel.parse_mesh(None, 8) == {"fsdp": 8, "tensor": 1}
    assert parallel.parse_mesh("fsdp=4,tensor=2", 8) == {"fsdp": 4, "tensor": 2}
    for bad in ("fsdp=3", "rows=8", "fsdp", "fsdp=0"):
        with pytest.raises(parallel.UserError, match="--mesh"):
            parallel.parse_mesh(bad, 8)
