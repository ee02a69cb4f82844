"""chemprop: molecules from SMILES, `build_dataloader`, and an `MPNN` of the documentation's three parts.

Targets are the molecules' heavy atoms, computed by RDKit.
"""

from functools import cache
from typing import Any

import lightning.pytorch as pl
import numpy as np
from case import Case
from chemprop import data, models, nn

SMILES = """
    CCO CCN CCC CCCl
    CC(=O)O c1ccccc1 c1ccncc1 CCOC
    C1CCCCC1 CC(C)O CC#N C=CC=C
    CCS CNC CCCCO OCCO
"""


@cache
def molecules() -> Any:
    points = [data.MoleculeDatapoint.from_smi(each, np.array([0.0])) for each in SMILES.split()]
    for point in points:
        point.y = np.array([float(point.mol.GetNumHeavyAtoms())])
    return data.MoleculeDataset(points)


def loader(shuffle: bool = True) -> Any:
    return data.build_dataloader(molecules(), batch_size=4, num_workers=0, shuffle=shuffle)


def mpnn(messages: Any) -> Any:
    def make(seed: int) -> Any:
        predictor = nn.RegressionFFN(input_dim=32, hidden_dim=32)
        return models.MPNN(messages(d_h=32, depth=2), nn.MeanAggregation(), predictor, batch_norm=True)

    return make


def inputs() -> Any:
    batch = next(iter(loader(shuffle=False)))
    return (batch.bmg, batch.V_d, batch.X_d)


def case(messages: Any) -> Case:
    """A step calls the module's parts and not its forward, so both places are named."""
    return Case(mpnn(messages), loader, pl.Trainer, inputs=inputs, logits_from="predictor.ffn")


CASES = {"MPNN of bonds": case(nn.BondMessagePassing), "MPNN of atoms": case(nn.AtomMessagePassing)}
