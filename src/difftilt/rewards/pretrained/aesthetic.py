"""How much people like an image, whatever its prompt: a linear head on CLIP's embedding of it."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from difftilt.card import Card
from difftilt.rewards.pretrained.base import PretrainedReward
from difftilt.rewards.pretrained.clip import Clip, ClipOptions
from difftilt.rewards.pretrained.heads import head_of
from difftilt.rewards.pretrained.loading import Text, frozen, load_network, load_preparation, load_weights, needs_both
from difftilt.rewards.pretrained.pixels import Preparation
from difftilt.rewards.protocol import Samples

CARD = Card(
    name="aesthetic",
    entry="aesthetic",
    paper="Schuhmann 2022, the aesthetic predictor of LAION-5B (arXiv 2210.08402), its improved version",
    needs=("images", "the extra [rewards]"),
)


class Config(ClipOptions):
    """Settings of the aesthetic predictor."""

    head: Text = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"
    """Weights of the head: a file, or OWNER/NAME/FILE on the hub."""


class Aesthetic(PretrainedReward):
    """head(CLIP's unit embedding of the image), about 1 (bad) to 10 (good).

    Args:
        clip: of images.
        head: embedding -> number; float32.
        options: device and batch.
    """

    def __init__(self, clip: Clip, head: nn.Module, options: Config) -> None:
        super().__init__("aesthetic", nn.ModuleDict({"clip": clip.model, "head": head}), options)
        self.clip, self.head = clip, head

    def score_batch(self, samples: Samples) -> Float[Tensor, " batch"]:
        return self.head(self.clip.images(samples.media))


def aesthetic(config: Config | None = None, *, model: Any = None, head: Any = None) -> Aesthetic:
    """The reward.

    Args:
        config: where to load from, and how.
        model: a ``CLIPModel`` in place of that, with its ``head``.
        head: tensors by name, as the published file holds them.
    """
    config, user = Config() if config is None else config, "aesthetic"
    needs_both(user, model=model, head=head)
    if model is None:
        preparation = load_preparation(config.source, user)
        model, head = load_network("CLIPModel", config.source, config, user), load_weights(config.head, user)
    else:
        preparation = Preparation.square(int(model.config.vision_config.image_size))
    judge = head_of(head, user).eval().requires_grad_(False)
    return Aesthetic(Clip(frozen(model, config), None, preparation), judge, config)
