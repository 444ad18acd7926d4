"""Reference sets: the features of exemplars that set rewards compare with, encoded once and without gradient.

Exemplars need not be of the modality that is generated. With an encoder of texts into the same space, a few captions
are a reference set for images or audio (arXiv 2504.15217).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from difftilt.errors import UserError
from difftilt.models.protocol import GenerativeModel
from difftilt.rewards.pictures import read_images
from difftilt.statistics.moments import FrechetReference, SetMoments, Spread

Encoder = Callable[[Any], Tensor]
"""Media, texts or whatever it was made for -> one vector each, (rows, dim). A sample's own encoder sees its media."""


ROUNDING = 1e-6
"""Share of the largest entry of a covariance by which it may miss symmetry and sign: it may come in float32."""


def flattened(media: Tensor) -> Float[Tensor, "batch dim"]:
    """The encoder that leaves everything as it is: all numbers of a sample in one row."""
    return media.flatten(1).double()


@dataclass(frozen=True)
class ReferenceSet:
    """Features of exemplars, or only the mean and covariance of a known law.

    Attributes:
        features: (rows, dim) float64; None where only the law is known.
        law: (mean, covariance) in place of features.
    """

    features: Float[Tensor, "rows dim"] | None = None
    law: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, features: Float[Tensor, "rows dim"]) -> "ReferenceSet":
        """Of features as they are.

        Raises:
            UserError: for anything but at least one finite vector.
        """
        if features.dim() != 2 or not len(features) or not bool(features.isfinite().all()):
            raise UserError(
                f"a reference set needs finite features of shape (rows, dim), not shape {tuple(features.shape)}"
                f"{'' if features.isfinite().all() else ' with NaN or infinity'}"
            )
        return cls(features.detach().double())

    @classmethod
    def encoded(cls, exemplars: Any, encoder: Encoder) -> "ReferenceSet":
        """Of exemplars (media, texts, ...) through an encoder for them, without gradient."""
        with torch.no_grad():
            return cls.of(encoder(exemplars))

    @classmethod
    def from_folder(
        cls, folder: str | Path, encoder: Encoder, shape: tuple[int, int, int] | None = None, batch: int = 32
    ) -> "ReferenceSet":
        """Of the images of a folder, through the encoder of the samples.

        Args:
            folder: of .png, .jpg, .jpeg, .webp or .bmp files; subfolders are not read.
            encoder: images (batch, channel, height, width) in [0, 1] -> (batch, dim).
            shape: (channels, height, width) that all are brought to, as :func:`~difftilt.rewards.pictures.as_image`
                does; None wants them to be equal.
            batch: images encoded at once.

        Raises:
            UserError: for a folder without images, with all files that cannot be read, or images of different sizes.
        """
        images = read_images(folder, shape)
        sizes = {tuple(image.shape) for image in images}
        if len(sizes) > 1:
            raise UserError(f"the images in {folder} are of {len(sizes)} sizes: bring them to one, or name a shape")
        parts = torch.stack(images).split(batch)
        return cls.encoded(parts, lambda parts: torch.cat([encoder(part).cpu() for part in parts]))

    @classmethod
    def from_file(cls, path: str | Path) -> "ReferenceSet":
        """Of a file of features: ``.npy`` without objects, or ``.safetensors`` with ``features`` or with one tensor.

        Raises:
            UserError: for a file that is missing, damaged or of another kind.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"there is no file {path} of reference features: name a .safetensors or .npy file")
        features = _read(path)
        if features.dim() != 2 or not features.is_floating_point():
            raise UserError(
                f"{path} holds {features.dtype} of shape {tuple(features.shape)}: reference features are floats of "
                "shape (rows, dim)"
            )
        return cls.of(features)

    @classmethod
    def gaussian(cls, mean: Float[Tensor, " dim"], covariance: Float[Tensor, "rows columns"]) -> "ReferenceSet":
        """A known law, for Fréchet distances only; its covariance may be singular.

        Raises:
            UserError: for anything but a finite mean and a symmetric covariance of its dimension without negative
                eigenvalues.
        """
        _refuse_no_law(mean.double(), covariance.double())
        return cls(law=(mean.double(), covariance.double()))

    @cached_property
    def moments(self) -> SetMoments:
        """Count, mean and scatter of the features, found once."""
        return SetMoments.of(self.points("a reference"))

    def points(self, user: str) -> Float[Tensor, "rows dim"]:
        """The features.

        Raises:
            UserError: where only the law is known.
        """
        if self.features is None:
            raise UserError(f"{user} compares with single exemplars: give a reference set of features, not a law")
        return self.features

    def frechet(self, spread: Spread = "full", shrinkage: float = 0.0) -> FrechetReference:
        """What Fréchet distances are taken to.

        Raises:
            UserError: for fewer exemplars than the covariance needs.
        """
        if not 0 <= shrinkage <= 1:
            raise UserError(f"shrinkage must lie in [0, 1], got {shrinkage:g}")
        if self.law is not None:
            return FrechetReference(*self.law, spread, shrinkage)
        rows, dim = self.points("the Fréchet distance").shape
        refuse_singular("reference set", rows, dim, spread, shrinkage)
        covariance = self.moments.scatter / max(rows - 1, 1)
        return FrechetReference(self.moments.mean, covariance, spread, shrinkage)


@runtime_checkable
class _Decodes(Protocol):
    @property
    def model(self) -> GenerativeModel: ...


def reference_of(source: str, task: object, encoder: Encoder) -> ReferenceSet:
    """The reference set that a recipe names.

    Args:
        source: file of features, ``.safetensors`` or ``.npy``, or folder of images.
        task: images are brought to the size of its samples, and go through ``encoder`` as these do.
        encoder: of the samples.

    Raises:
        UserError: for what cannot be read, and for images where the samples are none.
    """
    if not Path(source).expanduser().is_dir():
        return ReferenceSet.from_file(source)
    if not isinstance(task, _Decodes):
        return ReferenceSet.from_folder(source, encoder)
    return ReferenceSet.from_folder(source, encoder, image_shape(task.model, f"{source} is a folder of images"))


def image_shape(model: GenerativeModel, user: str) -> tuple[int, int, int]:
    """(channels, height, width) of what a model decodes to.

    Raises:
        UserError: where that is no image; ``user`` begins the sentence.
    """
    device = next(iter(model.network.parameters())).device if isinstance(model.network, nn.Module) else "cpu"
    with torch.no_grad():
        latents = torch.zeros(1, *model.shape, device=device, dtype=torch.int64 if model.dtype_tokens else None)
        sample = model.decode(latents)[0]
    if sample.dim() != 3:
        raise UserError(f"{user}, and the samples of this task are none")
    channels, height, width = sample.shape
    return channels, height, width


def smallest_set(dim: int, spread: Spread, shrinkage: float) -> int:
    """Fewest rows whose Fréchet statistics are regular."""
    if spread == "none":
        return 1
    return dim + 1 if spread == "full" and shrinkage == 0 else 2


def refuse_singular(what: str, rows: int, dim: int, spread: Spread, shrinkage: float) -> None:
    """Refuse a set whose covariance is singular because it has too few rows.

    Raises:
        UserError: names both numbers and what to do.
    """
    least = smallest_set(dim, spread, shrinkage)
    if rows >= least:
        return
    remedy = f"give at least {least}"
    if spread == "full" and rows >= 2:
        remedy += ", or set shrinkage above 0, or compare less: spread diagonal (variances) or none (means)"
    raise UserError(
        f"a {what} of {rows} has a singular covariance in {dim} feature dimensions: {remedy}"
        if spread == "full"
        else f"a {what} of {rows} has no variance: {remedy}"
    )


def same_space(name: str, features: Float[Tensor, "*batch dim"], dim: int) -> None:
    """Refuse features of another dimension than the reference's."""
    if features.shape[-1] != dim:
        raise UserError(
            f"{name}: samples have {features.shape[-1]} features, the reference has {dim}: use encoders into one space"
        )


def _refuse_no_law(mean: Tensor, covariance: Tensor) -> None:
    dim = len(mean) if mean.dim() == 1 else 0
    if not dim or tuple(covariance.shape) != (dim, dim):
        raise UserError(
            f"a law has a mean of shape (dim,) and a covariance of shape (dim, dim), not {tuple(mean.shape)} and "
            f"{tuple(covariance.shape)}"
        )
    if not bool(mean.isfinite().all()) or not bool(covariance.isfinite().all()):
        raise UserError("a law needs a finite mean and a finite covariance: there is NaN or infinity in it")
    size = float(covariance.abs().max())
    if not torch.allclose(covariance, covariance.T, rtol=0, atol=ROUNDING * size):
        raise UserError("a covariance is symmetric, and this one is not: give (C + C^T)/2 if that is what is meant")
    least = float(torch.linalg.eigvalsh(covariance)[0])
    if least < -ROUNDING * size:
        raise UserError(f"a covariance has no negative eigenvalue, and this one has {least:.3g}: check how it was made")


def _read(path: Path) -> Tensor:
    if path.suffix == ".npy":
        try:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        except (ValueError, TypeError, EOFError) as error:
            raise UserError(f"{path} is no plain .npy array of numbers: {error}") from error
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is of an unknown kind: reference features are read from .safetensors or .npy")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file: {error}") from error
    if "features" in tensors or len(tensors) == 1:
        return tensors.get("features", next(iter(tensors.values())))
    raise UserError(f"{path} holds {', '.join(sorted(tensors)) or 'nothing'}: name the tensor 'features'")
