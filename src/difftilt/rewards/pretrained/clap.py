"""How well a sound fits its prompt in the eyes of CLAP."""

from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from difftilt.card import Card
from difftilt.errors import UserError
from difftilt.rewards.media import audio_in
from difftilt.rewards.pretrained.base import PretrainedReward
from difftilt.rewards.pretrained.loading import PretrainedOptions, Text, frozen, load_network, load_part, needs_both
from difftilt.rewards.pretrained.sound import Spectrum, resampled
from difftilt.rewards.protocol import Capabilities, Samples

CARD = Card(
    name="clap",
    entry="clap",
    paper="Wu et al. 2023, Large-scale contrastive language-audio pretraining (arXiv 2211.06687)",
    needs=("audio", "the extra [rewards]"),
)


class Config(PretrainedOptions):
    """Settings of CLAP."""

    source: Text = "laion/clap-htsat-unfused"
    """Folder or hub id of a ``ClapModel`` without feature fusion, with its tokenizer and feature extractor."""
    rate: int = Field(default=48_000, ge=1)
    """Of the samples' sound, in samples per second; CLAP hears 48000."""


class Clap(PretrainedReward):
    """cos(sound, prompt), in [-1, 1]; several channels are heard as their mean.

    Args:
        model: ``ClapModel``.
        tokenizer: of prompts.
        spectrum: of sounds.
        options: device, batch and rate.
    """

    capabilities = Capabilities(differentiable=True, cost=1.0)

    def __init__(self, model: Any, tokenizer: Any, spectrum: Spectrum, options: Config) -> None:
        super().__init__("clap", model, options)
        self.model, self.tokenizer, self.spectrum, self.rate = model, tokenizer, spectrum, options.rate

    def accept(self, media: Tensor) -> None:
        """Refuse media of another kind than audio."""
        audio_in(media, self.name)

    def score_batch(self, samples: Samples) -> Float[Tensor, " batch"]:
        waves = resampled(samples.media.float().mean(1), self.rate, self.spectrum.rate)
        spectra = self.spectrum(waves).to(self.model.dtype)
        longer = torch.zeros(len(spectra), 1, dtype=torch.bool, device=spectra.device)
        heard = self.model.audio_model(input_features=spectra, is_longer=longer).pooler_output
        texts = self.tokenizer(list(samples.prompts), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            read = self.model.text_model(
                input_ids=texts["input_ids"].to(spectra.device),
                attention_mask=texts["attention_mask"].to(spectra.device),
            ).pooler_output
            wanted = normalize(self.model.text_projection(read).float(), dim=-1)
        return (normalize(self.model.audio_projection(heard).float(), dim=-1) * wanted).sum(-1)


def clap(config: Config | None = None, *, model: Any = None, tokenizer: Any = None, extractor: Any = None) -> Clap:
    """The reward.

    Args:
        config: where to load from, and how.
        model: a ``ClapModel`` in place of that, with ``tokenizer`` and ``extractor``.
        tokenizer: of prompts.
        extractor: ``ClapFeatureExtractor``.
    """
    config, user = Config() if config is None else config, "clap"
    needs_both(user, model=model, tokenizer=tokenizer, extractor=extractor)
    if model is None:
        tokenizer, extractor = (
            load_part(kind, config.source, user) for kind in ("AutoTokenizer", "ClapFeatureExtractor")
        )
        model = load_network("ClapModel", config.source, config, user)
    if model.config.audio_config.enable_fusion:
        raise UserError("clap: feature fusion draws random cuts of long sounds: take a model without it (unfused)")
    return Clap(frozen(model, config), tokenizer, Spectrum.of(extractor), config)
