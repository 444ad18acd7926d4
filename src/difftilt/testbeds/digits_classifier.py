"""Two frozen classifiers of 8×8 digits, made unlike each other on purpose.

One is the reward, the other watches. They differ in architecture and were trained on disjoint halves of the training
images, so that an image that fools the first need not fool the second.
"""

from collections.abc import Mapping
from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from difftilt.errors import UserError


class DigitClassifier(nn.Module):
    """Images in [0, 1] to logits of the ten digits.

    Args:
        body: images (batch, 1, 8, 8) -> penultimate features.
        width: of the features.
    """

    def __init__(self, body: nn.Sequential, width: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, 10)

    def features(self, images: Float[Tensor, "batch 1 8 8"]) -> Float[Tensor, "batch width"]:
        """Penultimate features."""
        return self.body(2 * images - 1)

    def forward(self, images: Float[Tensor, "batch 1 8 8"]) -> Float[Tensor, "batch 10"]:
        """Logits."""
        return self.head(self.features(images))


def perceptron() -> DigitClassifier:
    """Pixels to 128 to 64 features: the classifier of the reward."""
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64), nn.SiLU())
    return DigitClassifier(body, 64)


def convolution() -> DigitClassifier:
    """Three convolutions and 64 features: the classifier that is held out."""
    body = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.SiLU(),
    )
    return DigitClassifier(body, 64)


def save_classifiers(path: Path, classifiers: Mapping[str, nn.Module]) -> None:
    """Write the weights of several networks to one safetensors file, keyed ``name/parameter``."""
    tensors = {
        f"{name}/{key}": value for name, network in classifiers.items() for key, value in network.state_dict().items()
    }
    path.write_bytes(save(tensors))


def load_classifiers(path: Path) -> tuple[DigitClassifier, DigitClassifier]:
    """The classifier of the reward and the held-out one, frozen.

    Raises:
        UserError: if the file is missing or damaged.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): install the package again") from error
    networks = {"reward": perceptron(), "heldout": convolution()}
    for name, network in networks.items():
        own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
        network.load_state_dict(own)
        network.eval().requires_grad_(False)
    return networks["reward"], networks["heldout"]
