"""torch.compile with inductor, as the trainers use it on a GPU, for every kind of block on a CPU.

    pytest -m slow tests/test_compile.py
"""
import copy
import sys

import pytest
import torch
from torch._dynamo.utils import counters

import decoder
import dit
import encoder
import parallel
import text_model
import train_dit

CPU = parallel.Devices("cpu", torch.device("cpu"), 0, 1, torch.float32, {"fsdp": 1, "tensor": 1})
GQA = text_model.LLMConfig(64, 3, 4, 2, 96, 32, True)
pytestmark = pytest.mark.slow


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_dit(remat=False, **options):
    """A DiT of three blocks with an odd hidden width, h = 85, as 2b's."""
    model = dit.DiT(dit.DiTConfig(channels=8, tokens=16, width=32, depth=3, heads=2, **options))
    model.remat = remat
    x, t, cond = normal(1, 4, 16, 8), torch.rand(4), normal(2, 4, 16, 32)
    return model, model.dit_blocks, lambda: model(x, t, cond).square().mean()


def of_llm(remat=False):
    model = text_model.TextModel(GQA)
    model.remat = remat
    x = normal(1, 4, 24, 64).requires_grad_()           # as the learned queries' embeddings do
    return model, model.model.layers, lambda: model(x).square().mean()


def of_encoder(kind):
    config = encoder.ViTConfig(kind, 32, 48, 3, 2, image_size=16, patch_size=4)
    model, images = encoder.ViT(config), normal(1, 4, 3, 16, 16)
    return model, model.blocks, lambda: (model(images) - normal(2, 4, 16, 32)).square().mean()


def of_decoder():
    config = decoder.DecoderConfig(
        hidden_size=8, decoder_hidden_size=32, decoder_num_hidden_layers=3, patch_size=4,
        decoder_num_attention_heads=2, decoder_intermediate_size=48, num_patches=16, image_size=16)
    model, z = decoder.Decoder(config), normal(1, 4, 16, 8)
    return model, model.decoder_layers, lambda: model(z).square().mean()


# kind of block -> (how to make it, number of programs: one per shape of block)
KINDS = {"DiT block": (of_dit, 1),
         "wide head": (lambda: of_dit(head_width=48, head_depth=2), 2),
         "qk-norm": (lambda: of_dit(qk_norm=True), 1),
         "DiT block, recomputed": (lambda: of_dit(remat=True), 1),
         "LLM layer": (of_llm, 1),
         "LLM layer, recomputed": (lambda: of_llm(remat=True), 1),
         "SigLIP block": (lambda: of_encoder("siglip_vision_model"), 1),
         "DINOv2 block": (lambda: of_encoder("dinov2"), 1),
         "decoder block": (of_decoder, 1)}


def train(model, loss, steps=3):
    """Make steps -> losses, and the number of programs compiled after each."""
    losses, programs = [], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(value.item())
        programs.append(counters["stats"]["unique_graphs"])
    return losses, programs


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_compile_once(kind, monkeypatch):
    """A whole block is one program, which all blocks of its shape share, and which no later step
    compiles again. The losses are those of eager blocks."""
    monkeypatch.setitem(dit.SwiGLU.MULTIPLE, "cpu", dit.SwiGLU.MULTIPLE["cuda"])
    make, number = KINDS[kind]
    model, blocks, loss = make()
    for i, p in enumerate(model.parameters()):
        p.data = 0.1 * normal(i, *p.shape)
    start = copy.deepcopy(model.state_dict())
    torch._dynamo.reset()
    counters.clear()
    expected, programs = train(model, loss)
    assert programs == [0, 0, 0]

    model.load_state_dict(start)
    parallel.compile_blocks(blocks, True, CPU)
    found, programs = train(model, loss)
    assert programs == [number] * 3
    assert len(set(expected)) == 3
    assert found == pytest.approx(expected, rel=1e-5)


def test_texts_of_any_length_share_a_program():
    """Without --length a batch is as long as its longest text. The second length compiles the
    layers once more, for every length."""
    model, layers, _ = of_llm()
    lengths = iter((64, 128, 128, 192, 256, 64))
    torch._dynamo.reset()
    counters.clear()
    parallel.compile_blocks(layers, True, CPU)
    x = normal(1, 2, 256, 64).requires_grad_()
    cut = lambda: x[:, :next(lengths)].contiguous()
    _, programs = train(model, lambda: model(cut()).square().mean(), 6)
    assert programs == [1, 2, 2, 2, 2, 2]


def test_stage_2_compiles_two_programs(monkeypatch):
    """A run on the tiny data: one program for the LLM's layers and one for the DiT's blocks."""
    monkeypatch.setattr(sys, "argv", [
        "train_dit.py", "--device", "cpu", "--dtype", "float32", "--compile", "--remat", "block",
        "--length", "128", "--batch", "4", "--workers", "0", "--bench", "4"])
    torch._dynamo.reset()
    counters.clear()
    train_dit.main()
    assert counters["stats"]["unique_graphs"] == 2
