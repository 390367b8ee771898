"""The sharding table against every parameter of every size; meshes; peaks.

    pytest tests/test_parallel.py
"""
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import parallel
import training
import weights
from cli import UserError
from decoder import Decoder, size_config
from dit import SIZES, DiT, DiTConfig
from encoder import SO400M, WEBSSL_300M, ViT
from losses import Discriminator, Perceptual
from text_model import QWEN_1_5B, QWEN_7B, TextModel
from train_dit import ScaleRAE
from vae import VAE

CPU = parallel.setup("cpu", "float32")


def networks():
    """Every network of the real sizes on the meta device: no memory."""
    with torch.device("meta"):
        for key, s in SIZES.items():
            if key != "tiny":
                yield f"dit {key}", DiT(DiTConfig(1152, 256, s.width, s.depth, s.heads))
        yield "dit 2b + wide head", DiT(DiTConfig(1152, 256, 2048, 32, 32, 0, 2688, 2))
        yield "qwen 1.5b", TextModel(QWEN_1_5B, 256, 1152, 2048)
        yield "qwen 7b", TextModel(QWEN_7B, 256, 1152, 4096)
        for size in ("b", "l", "xl"):
            yield f"decoder {size}", Decoder(size_config(size, 1152, 256, 14, (0.5,) * 3,
                                                         (0.5,) * 3))
        yield "siglip2", ViT(SO400M)
        yield "webssl", ViT(WEBSSL_300M)
        small = DiT(DiTConfig(64, 256, 1280, 16, 32))
        yield "vae latent with repa", ScaleRAE(TextModel(QWEN_1_5B, 256, 1152, 1280), small, 1.0, 8,
                                               1152)
        yield "vae", VAE()
        yield "vgg", Perceptual()
        yield "discriminator", Discriminator()


@pytest.mark.parametrize("name, model", list(networks()),
                         ids=lambda v: v if isinstance(v, str) else "")
def test_every_large_parameter_matches_one_rule_and_divides(name, model):
    """Each parameter above 1 MB matches at most one row and divides over 64 devices on the fsdp
    axis; positions, queries and convolutional networks are whole on purpose. (The tensor axis need
    not divide: FFN widths and the vocabulary are odd, and the compiler pads.)"""
    for key, p in model.named_parameters():
        if p.numel() * 4 <= 2 ** 20:
            continue
        rows = [pattern for pattern, _ in parallel.TABLE if re.search(pattern, key)]
        assert len(rows) <= 1, (key, rows)
        axes = parallel.spec(key, p.shape)
        if not any(axes):
            assert name in ("vae", "vgg", "discriminator") or re.search("queries|pos", key), key
        else:
            assert p.shape[axes.index("fsdp")] % 64 == 0, (key, tuple(p.shape), axes)


def test_a_stack_is_split_as_its_blocks_and_files_have_it_block_by_block():
    """Stacks of scan.py and their moments have one more dimension, which is whole."""
    shape = (6144, 2048)
    qkv = "dit.dit_blocks.{}.attn.qkv.weight"
    for name in (qkv, f"optimizer.{qkv}.exp_avg"):
        one = parallel.spec(name.format(3), shape)
        assert one == ("tensor", "fsdp")
        assert parallel.spec(name.format("0-31"), (32, *shape)) == (None, *one)
    norms = parallel.spec("dit_blocks.0-31.norm1.weight", (32, 2048))
    assert norms == (None, None)                        # each of them is small
    assert parallel.spec("optimizer.dit_blocks.0-31.norm1.weight.step", ()) == ()
    fork = "dit_blocks.{}.cross.kv.weight"              # in no row: by its rows
    assert parallel.spec(fork.format(3), shape) == ("fsdp", None)
    assert parallel.spec(fork.format("0-31"), (32, *shape)) == (None, "fsdp", None)
    for stack in (torch.randn(3, 4, 5), torch.randn(3, 4), torch.tensor(7.0)):
        saved = parallel.rows_to_save("m.blocks.2-4.w.x", stack)
        assert [(key, first) for key, _, first in saved] == [
            (f"m.blocks.{i}.w.x", 0) for i in (2, 3, 4)]
        found, rows = torch.zeros_like(stack), {key: part for key, part, _ in saved}
        read = lambda key, first, last: parallel.cut(rows[key], first, last)
        parallel.load_rows("m.blocks.2-4.w.x", found, read, CPU)
        assert torch.equal(found, stack)
    assert list(parallel.unstack("m.blocks.2.w", torch.ones(2))) == ["m.blocks.2.w"]


def test_a_process_reads_its_own_piece():
    """Of a checkpoint of three processes; a process without rows reads the last for its shape."""
    whole, seen = torch.arange(20.0).view(10, 2), []

    def reader(first, count):
        def read(a, b):
            seen.append(first)
            return whole[first + a:first + b]
        return first, (count, 2), read, weights.crc32(whole[first:first + count])
    source = weights.Weights("a checkpoint", {}, {"w": [reader(0, 4), reader(4, 4), reader(8, 2)]})
    for first, last, read in ((0, 4, [0]), (4, 8, [4]), (3, 9, [0, 4, 8]), (10, 10, [8])):
        seen.clear()
        assert torch.equal(source.rows("w", first, last), whole[first:last]) and seen == read


def optimizers(w):
    yield parallel.adamw([w], CPU, lr=0.1)
    yield torch.optim.SGD([w], lr=0.1, momentum=0.9)


@pytest.mark.parametrize("kind", [0, 1], ids=["adamw", "sgd"])
def test_an_update_that_is_not_finite_changes_nothing(kind):
    """Neither weights nor the optimizer's state change, whatever the optimizer; the next finite
    update does."""
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = list(optimizers(w))[kind]
    for gradient in (1.0, float("nan"), float("inf"), 1.0):
        w.grad = torch.full((3,), gradient)
        before = [t.clone() for t in (w, *optimizer.state[w].values())]
        norm = parallel.clip_grad([w], 1.0, CPU)
        parallel.guarded_step(optimizer, norm, CPU)
        after = [w, *optimizer.state[w].values()]
        same = len(after) == len(before) and all(map(torch.equal, after, before))
        assert same == (gradient != 1.0)
    assert kind or optimizer.state[w]["step"].item() == 2


def test_build_fills_what_is_on_meta_and_keeps_tables():
    with torch.device("meta"):
        model = DiT(DiTConfig(8, 16, 32, 1, 2))
    own, asked = model.state_dict(), []

    def rows(name, first, last):
        asked.append((name, first, last))
        table = own[name]
        return table[first:last] if not table.is_meta else torch.ones(last - first,
                                                                      *table.shape[1:])
    parallel.build(model, rows, CPU)
    assert ("dit_blocks.0.attn.qkv.weight", 0, 96) in asked
    assert all((p == 1).all() for k, p in model.named_parameters() if k != "pos_embed")
    assert 0.9 < model.pos_embed.abs().max() <= 1 and not model.feat_rope.freqs_cos.is_meta


def test_mesh():
    assert parallel.parse_mesh(None, 8) == {"fsdp": 8, "tensor": 1}
    assert parallel.parse_mesh("fsdp=4,tensor=2", 8) == {"fsdp": 4, "tensor": 2}
    for bad in ("fsdp=3", "rows=8", "fsdp", "fsdp=0"):
        with pytest.raises(UserError, match="--mesh"):
            parallel.parse_mesh(bad, 8)


@pytest.mark.parametrize("name, peak", [("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H200", 989.4),
                                        ("NVIDIA H100 PCIe", 756.5), ("NVIDIA A100-SXM4", 312),
                                        ("Some GPU", None)])
def test_mfu_counts_all_devices(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(training, "memory_gb", lambda devices: 0.0)
    gpus = parallel.Devices("cuda", torch.device("cpu"), 0, 1, torch.bfloat16,
                            {"fsdp": 4, "tensor": 2})
    assert training.peak_tflops(gpus) == peak
    meter = training.Meter()
    meter.add(loss=torch.tensor(1.0))
    meter.step(10, 2e12)
    values = meter.read(gpus)
    assert values["mfu"] == (pytest.approx(values["tflops"] / 8 / peak) if peak else None)
    assert values["tflops"] == pytest.approx(2 * values["images_per_s"])
