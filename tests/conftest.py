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


@pytest.fixture(scope="session")
def nets(tmp_path_factory):
    """--vgg and --dino with small random networks, as files."""
    folder = tmp_path_factory.mktemp("nets")
    vgg, disc = losses.Perceptual(losses.TINY_WIDTH), losses.Discriminator(losses.TINY_DISC)
    losses.init_perceptual(vgg, 0)
    losses.init_discriminator(disc, 0)
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
