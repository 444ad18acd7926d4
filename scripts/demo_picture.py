"""Draw the picture of the README: samples of the demo before and after training, at the same prompts and noise.

Usage: python scripts/demo_picture.py [RUN] [PICTURE]

RUN is runs/demo, which `make demo` writes; PICTURE is docs/demo.png. Shows everything that the run kept to look at, and
frames every image that the verifier finds right.
"""

import io
import sys
from pathlib import Path

from jaxtyping import Bool, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from difftilt.evaluation.report.samples import Gallery, Stage, read_gallery
from difftilt.evaluation.report.tolerant import Damage

ROOT = Path(__file__).parent.parent
ROW = 0.72
"""Height of a row of images with its caption, in inches."""
COLOURS = 96
"""Of the file, which is a third as large as one in all colours."""
RIGHT, OTHER = "#1a8f3c", "#cccccc"


def draw(gallery: Gallery) -> Figure:
    """A row for each prompt: its samples before training, a gap, and its samples after."""
    size, rows = gallery.size, len(gallery.prompts)
    height = ROW * rows + 0.3
    figure = Figure(figsize=(7.2, height), dpi=100)
    grid = figure.add_gridspec(
        rows, 2 * size + 1, width_ratios=[*[1] * size, 0.3, *[1] * size], left=0.01, right=0.99, bottom=0.005,
        top=1 - 0.46 / height, hspace=0.3, wspace=0.08,
    )  # fmt: skip
    for stage, first in zip(gallery.stages, (0, size + 1), strict=True):
        right = right_of(stage)
        title = "before" if stage.step == 0 else f"after {stage.step} iterations"
        left = grid[0, first].get_position(figure).x0
        figure.text(left, 1 - 0.18 / height, f"{title}: {int(right.sum())} of {len(right)} right", weight="bold")
        for place, image in enumerate(stage.media):
            axes = figure.add_subplot(grid[place // size, first + place % size])
            _image(axes, image, bool(right[place]))
            if place % size == 0:
                prompt, heldout = gallery.prompts[place // size], gallery.heldout[place // size]
                axes.set_title(prompt if heldout else f"{prompt}  (trained on)", loc="left", fontsize=7, pad=2)
    return figure


def right_of(stage: Stage) -> Bool[Tensor, " samples"]:
    """Which images the verifier finds right."""
    if stage.score is None:
        sys.exit("the run kept no scores of its samples: run `make demo` again")
    return stage.score == 1


def _image(axes: Axes, image: UInt8[Tensor, "3 height width"], right: bool) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=RIGHT if right else OTHER, linewidth=1.6 if right else 0.5)


def main() -> None:
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "demo"
    picture = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "docs" / "demo.png"
    damage = Damage()
    gallery = read_gallery(run, damage)
    if gallery is None or len(gallery.stages) < 2:
        sys.exit("\n".join([f"{run} holds no samples before and after training: run `make demo` first", *damage.lines]))
    buffer = io.BytesIO()
    draw(gallery).savefig(buffer)
    Image.open(buffer).convert("RGB").quantize(COLOURS).save(picture, optimize=True)
    print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
