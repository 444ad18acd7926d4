"""What RDKit knows of a SMILES string: whether it is a molecule, its properties, its picture.

RDKit parses a distinct string once; properties are found when they are asked for, and kept with the molecule. RDKit's
own messages about strings that are no molecules are kept quiet: that is what :func:`parse` returns None for.
"""

import importlib.util
import io
from collections.abc import Callable
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from rdkit import Chem, RDConfig, rdBase
from rdkit.Chem import QED, Crippen, Descriptors, rdFingerprintGenerator, rdMolDescriptors
from rdkit.Chem.Draw import rdMolDraw2D
from torch import Tensor

KEPT = 16_384
"""Distinct strings whose molecules are kept."""
RADIUS, BITS = 2, 512
"""Of the Morgan fingerprints."""
SIDE = 128
"""Pixels of the side of a picture."""
TRAINING = Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi"
"""Molecules that the RDKit wheel carries: the first 5000 of the NCI open database."""


class Molecule:
    """A molecule that RDKit accepts.

    Attributes:
        mol: RDKit's own object.
    """

    def __init__(self, mol: Chem.Mol) -> None:
        self.mol = mol

    @cached_property
    def smiles(self) -> str:
        """Canonical, without stereochemistry: equal for equal molecules."""
        return Chem.MolToSmiles(self.mol, isomericSmiles=False)

    @cached_property
    def qed(self) -> float:
        """Quantitative estimate of drug-likeness, 0 to 1 (Bickerton et al. 2012)."""
        return float(QED.qed(self.mol))

    @cached_property
    def log_p(self) -> float:
        """Octanol-water partition coefficient by Crippen's atom contributions, a decimal logarithm."""
        return float(Crippen.MolLogP(self.mol))  # pyright: ignore[reportAttributeAccessIssue]

    @cached_property
    def synthetic_accessibility(self) -> float:
        """1, easy to make, to 10, hard (Ertl and Schuffenhauer 2009)."""
        return float(_sascorer()(self.mol))

    @cached_property
    def weight(self) -> float:
        """Molecular weight, g/mol."""
        return float(Descriptors.MolWt(self.mol))  # pyright: ignore[reportAttributeAccessIssue]

    @cached_property
    def rings(self) -> int:
        """Rings in the smallest set of smallest rings."""
        return int(rdMolDescriptors.CalcNumRings(self.mol))

    @cached_property
    def fingerprint(self) -> Float[Tensor, " bits"]:
        """Morgan fingerprint of radius 2, 0 or 1 (Rogers and Hahn 2010)."""
        bits: Any = _morgan().GetFingerprintAsNumPy(self.mol)
        return torch.from_numpy(np.asarray(bits, dtype=np.float32))


@lru_cache(maxsize=KEPT)
def parse(smiles: str) -> Molecule | None:
    """The molecule that a string stands for; None if it is empty or RDKit refuses it."""
    with rdBase.BlockLogs():
        mol = cast("Chem.Mol | None", Chem.MolFromSmiles(smiles))  # the stubs do not say that it may be none
    return None if mol is None or mol.GetNumAtoms() == 0 else Molecule(mol)


def picture(smiles: str) -> Float[Tensor, "3 side side"]:
    """The molecule drawn on white, in [0, 1]; a red cross for what is none."""
    molecule = parse(smiles)
    if molecule is None:
        image = Image.new("RGB", (SIDE, SIDE), "white")
        pen = ImageDraw.Draw(image)
        near, far = SIDE // 3, SIDE - SIDE // 3
        pen.line((near, near, far, far), "red", 2)
        pen.line((near, far, far, near), "red", 2)
    else:
        canvas = rdMolDraw2D.MolDraw2DCairo(SIDE, SIDE)
        rdMolDraw2D.PrepareAndDrawMolecule(canvas, molecule.mol)
        canvas.FinishDrawing()
        image = Image.open(io.BytesIO(canvas.GetDrawingText())).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@cache
def _morgan() -> Any:
    return rdFingerprintGenerator.GetMorganGenerator(radius=RADIUS, fpSize=BITS)


@cache
def _sascorer() -> Callable[[Chem.Mol], float]:
    """The scorer in the folder of contributions, which is no package; it reads its table of fragments once."""
    file = Path(RDConfig.RDContribDir) / "SA_Score" / "sascorer.py"
    spec = importlib.util.spec_from_file_location("rdkit_sascorer", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.calculateScore
