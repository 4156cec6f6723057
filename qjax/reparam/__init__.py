"""Reparametrize: exact changes of variables of a linear layer, made before its weight is rounded."""

from qjax.reparam.inputs import act
from qjax.reparam.permute import permute
from qjax.reparam.protocol import (
    Applied,
    Reparam,
    Site,
    behind,
    behind_outputs,
    reparametrize,
    restore,
    settle,
    through,
)
from qjax.reparam.rotate import hadamard, kronecker, orthogonal
from qjax.reparam.scale import awq_scale, rescale, smooth
from qjax.reparam.split import columns, low_rank, sparse

__all__ = [
    "Applied",
    "Reparam",
    "Site",
    "act",
    "awq_scale",
    "behind",
    "behind_outputs",
    "columns",
    "hadamard",
    "kronecker",
    "low_rank",
    "orthogonal",
    "permute",
    "reparametrize",
    "rescale",
    "restore",
    "settle",
    "smooth",
    "sparse",
    "through",
]
