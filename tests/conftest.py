"""What several test files use."""
import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import discriminator as gans    # noqa: E402
import perceptual               # noqa: E402


@pytest.fixture(scope="session")
def nets(tmp_path_factory):
    """--vgg and --dino: small random networks, as files."""
    folder = tmp_path_factory.mktemp("nets")
    vgg, disc = perceptual.Perceptual(perceptual.TINY_WIDTH), gans.Discriminator(gans.TINY)
    perceptual.init_weights(vgg, 0)
    gans.init_weights(disc, 0)
    save_file(vgg.state_dict(), folder / "vgg.safetensors")
    save_file(disc.dino.state_dict(), folder / "dino.safetensors",
              {"config": json.dumps(gans.TINY)})
    return ["--vgg", folder / "vgg.safetensors", "--dino", folder / "dino.safetensors"]
