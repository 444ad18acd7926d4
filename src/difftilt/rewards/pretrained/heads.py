"""The head of the aesthetic predictor and of ImageReward: five linear maps without anything between them."""

from collections.abc import Mapping

from torch import Tensor, nn

from difftilt.errors import UserError
from difftilt.rewards.pretrained.loading import fill

WIDTHS = (1024, 128, 64, 16, 1)


class LinearHead(nn.Module):
    """An embedding -> one number, by linear maps of the published widths; the published drop-outs are off.

    Args:
        width: of the embedding.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (width, *WIDTHS)
        # the published module holds drop-outs at places 1, 3 and 5, which give the maps their numbers
        self.layers = nn.ModuleDict(
            {str(place): nn.Linear(sizes[rank], sizes[rank + 1]) for rank, place in enumerate((0, 2, 4, 6, 7))}
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x[..., 0]


def head_of(tensors: Mapping[str, Tensor], user: str) -> LinearHead:
    """The head whose maps are named ``layers.0.weight`` to ``layers.7.bias``, with anything before these names.

    Raises:
        UserError: if the tensors hold no such head.
    """
    found = [name for name in tensors if name.endswith("layers.0.weight") and tensors[name].shape[0] == WIDTHS[0]]
    if len(found) != 1:
        raise UserError(f"{user}: these weights hold no head (layers.0.weight of {WIDTHS[0]} rows)")
    prefix = found[0].removesuffix("layers.0.weight")
    head = LinearHead(tensors[found[0]].shape[1])
    fill(
        head, {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(f"{prefix}layers.")}, user
    )
    return head
