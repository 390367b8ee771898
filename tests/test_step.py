"""A whole training step of stage 2 on the meta device, where no value can be read.

    pytest tests/test_step.py

A GPU runs behind the host. A step in which the host reads a value, or copies a tensor to or from
its own memory, makes it wait. On the meta device the read raises an error. OneDevice finds the
copies, and the tensors that are made on the CPU.
"""
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flow
import networks
import parallel
import stage2
import text_model
import train_dit
import training
from dit import SwiGLU

META = torch.device("meta")
SHALLOW = ["--size", "2b", "--depth", "2", "--llm-depth", "2"]


class OneDevice(TorchDispatchMode):
    """Raise AssertionError for an operation that takes or returns a tensor of another device."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if torch.is_tensor(tensor):
                assert tensor.device == META, f"{op}: a tensor is on {tensor.device}"
        return result


@pytest.fixture
def cuda_paths(monkeypatch):
    """Let the meta device take the paths of CUDA: the fused AdamW and the padded SwiGLU."""
    module = sys.modules["torch.optim.optimizer"]       # torch.optim does not export it
    fused = module._get_fused_kernels_supported_devices()
    monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: [*fused, "meta"])
    monkeypatch.setitem(SwiGLU.MULTIPLE, "meta", SwiGLU.MULTIPLE["cuda"])


def record(n, conversations, size):
    return {"image": np.zeros((size, size, 3), np.uint8), "n": n, "key": str(n), "skipped": [],
            "conversations": [{"from": "human", "value": conversations[0]},
                              {"from": "gpt", "value": conversations[1]}]}


def made(monkeypatch, *flags, questions_only=False):
    """Return the arguments of train_dit.train_step, as train_dit.main makes them of flags, with
    every tensor on the meta device."""
    monkeypatch.setattr(sys, "argv", ["train_dit.py", "--dry-run", "--batch", "4",
                                      "--micro-batch", "2", *flags])
    args = train_dit.arguments()
    train_dit.fill_defaults(args, None)
    devices = parallel.Devices("cuda", META, 0, 1, torch.bfloat16, {"fsdp": 1, "tensor": 1})
    encoder, vae, _, tokenizer, files = networks.frozen_networks(args, None, devices)
    del encoder.blocks[2:]                              # all of them are alike
    config = stage2.new_config(args, encoder, vae, tokenizer, files)
    with META:
        model = train_dit.build(config, args, devices.dtype)
    for network in filter(None, (model, encoder, vae)):
        network.to(META)                                # tables of positions are on the CPU

    draw = ("Draw a red circle.", "<image>")
    ask = ("<image>\nWhat is this?", "A red circle.")
    turns = [ask] * 4 if questions_only else [draw, draw, draw, ask]
    collate = train_dit.Collate(tokenizer, config.dit.tokens, config.dit.channels, 0, 0.1,
                                posterior=vae is not None)
    size = encoder.grid * vae.stride if vae else encoder.image_size
    records = [record(n, turn, size) for n, turn in enumerate(turns)]
    totals = {"images_to_draw": 0 if questions_only else 3}
    batches = []
    for rows in (records[:2], records[2:]):
        batch = {k: v.to(META) if torch.is_tensor(v) else v for k, v in collate(rows).items()}
        assert not batch["rejected"]
        batches.append({**batch, "totals": totals, "tokens": 30.0, "images_to_draw": 3.0})

    @torch.no_grad()
    def encode(batch):
        x = batch["images"].float() / 255
        u = encoder(x)
        return (train_dit.pack(vae.posterior(x)[0]) if vae else u), u

    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    optimizers = train_dit.optimizers_for(named, args, devices)
    ema = training.start_ema(named, devices) if args.ema else {}
    return model, encode, batches, (named, optimizers, ema), 0.1, args, devices


def step(arguments):
    """Run the step twice: the first one makes the moments."""
    with OneDevice():
        for _ in range(2):
            result = train_dit.train_step(*arguments)
    return result


@pytest.mark.parametrize("flags", [
    SHALLOW, pytest.param(["--size", "2b"], marks=pytest.mark.slow)], ids=["2 blocks", "whole"])
def test_2b(flags, monkeypatch, cuda_paths):
    """The step of the paper's main model, at its width."""
    values, norm = step(made(monkeypatch, *flags))
    assert set(values) == {"text", "flow", "loss", "cond_spread"}
    assert {t.device for t in (*values.values(), norm)} == {META}


VARIANTS = {
    "webssl, wide head": ["--latent", "webssl", "--head-width", "2688", "--head-depth", "1",
                          "--qk-norm", "--freeze", "llm"],
    "vae, repa": ["--latent", "vae", "--repa", "2", "--predict", "x", "--remat", "none",
                  "--cond-drop", "0", "--ema", "0"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, monkeypatch, cuda_paths):
    step(made(monkeypatch, *SHALLOW, *VARIANTS[variant]))


def test_questions_only(monkeypatch, cuda_paths):
    """A batch without an image to generate leaves the DiT out."""
    arguments = made(monkeypatch, *SHALLOW, questions_only=True)
    values, *_ = step(arguments)
    assert set(values) == {"text", "loss"}


# ------------------------------------------------------------------------------------------------
# The checks find what they are for
# ------------------------------------------------------------------------------------------------

def reads(loss):
    return loss / max(loss.sum().item(), 1)


def copies_to_the_host(loss):
    return loss.cpu().to(META)


def copies_from_the_host(loss):
    return loss * torch.from_numpy(np.ones(1, np.float32)).to(META)


def indexes_by_condition(loss):
    return loss[loss > 0]


def branches(loss):
    return loss if loss.sum() > 0 else -loss


def makes_on_the_cpu(loss):
    return loss + torch.zeros(())


def makes_a_constant(loss):
    return loss * torch.tensor(2.0)


MISTAKES = {reads: "cannot be called on meta tensors", branches: "cannot be called on meta",
            copies_to_the_host: "Cannot copy out of meta tensor", indexes_by_condition: "nonzero",
            copies_from_the_host: "a tensor is on cpu", makes_on_the_cpu: "a tensor is on cpu",
            makes_a_constant: "a tensor is on cpu"}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_mistakes_are_found(mistake, monkeypatch, cuda_paths):
    arguments, right = made(monkeypatch, *SHALLOW), flow.flow_loss
    monkeypatch.setattr(flow, "flow_loss", lambda *a: mistake(right(*a)))
    with pytest.raises((RuntimeError, AssertionError), match=MISTAKES[mistake]):
        step(arguments)


def test_a_constant_in_the_llm_is_found(monkeypatch, cuda_paths):
    """The LLM's layers are recomputed in the backward pass, where the check must hold too."""
    arguments, right = made(monkeypatch, *SHALLOW), text_model.rope
    monkeypatch.setattr(text_model, "rope", lambda x, cos, sin: right(x, cos, sin)
                        * (torch.tensor(1.0) if torch._C._current_graph_task_id() >= 0 else 1))
    with pytest.raises(AssertionError, match="a tensor is on cpu"):
        step(arguments)


def test_muon_waits(monkeypatch, cuda_paths):
    """parallel.guarded_step says so: an optimizer that is not fused reads the gradient's norm."""
    arguments = made(monkeypatch, *SHALLOW, "--optimizer", "muon")
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        step(arguments)
