"""Fixtures that several test files use."""
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import losses               # noqa: E402
from tiny import train_encoder      # noqa: E402


def init_weights(model, initial, seed=0):
    """Give a network on the CPU the values of its component's initial(name, shape, seed)."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data.copy_(initial(name, p.shape, seed))
    return model


def init_discriminator(model, seed=0):
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if not name.startswith("dino.x_"):              # ImageNet's statistics
            tensor.copy_(losses.initial(name, shapes, seed))
    return model


def init_vgg(model, seed=0):
    for name, tensor in model.state_dict().items():
        tensor.copy_(train_encoder.initial("vgg", f"encoder.{name}", tensor.shape, seed))
    return model


@pytest.fixture(scope="session")
def nets(tmp_path_factory):
    """--vgg and --dino with small random networks, as files."""
    folder = tmp_path_factory.mktemp("nets")
    vgg = init_vgg(losses.Perceptual(losses.TINY_WIDTH))
    disc = init_discriminator(losses.Discriminator(losses.TINY_DISC))
    save_file(vgg.state_dict(), folder / "vgg.safetensors")
    save_file(disc.dino.state_dict(), folder / "dino.safetensors",
              {"config": json.dumps(dataclasses.asdict(losses.TINY_DISC))})
    return ["--vgg", folder / "vgg.safetensors", "--dino", folder / "dino.safetensors"]


@pytest.fixture(scope="module")
def one_thread():
    """The tensors are tiny: on a busy machine several threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
