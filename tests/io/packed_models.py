"""Small models in the containers of other libraries."""

import dataclasses

import numpy as np
from small_models import LLAMA, random_params

import qjax
from qjax.io.exports import CONTAINERS
from qjax.io.packed_folder import packed_folder
from qjax.models.families import weight_names
from qjax.models.model import Model

SMALL = dataclasses.replace(LLAMA, layers=1, hidden=64)


def packed_model(folder, to, name, bpe, shard_bytes=10**9, config=SMALL, keep="nothing"):
    """A random model whose linear layers, but those called `keep`, are packed, in a container; these as rows,
    {path: QTensor}."""
    params = random_params(config)
    model = Model(config, params, bpe)
    names = {"/".join(w.path): w for w in weight_names(config)}
    whole = CONTAINERS[to].everything
    matrices = {p: w for p, w in names.items() if w.transposed and keep not in p and (whole or w.path[0] != "head")}
    leaves = dict.fromkeys(names, params)
    for p in names:
        for key in p.split("/"):
            leaves[p] = leaves[p][key]
    packed = {p: qjax.quantize(leaves[p].T, name) for p in matrices}
    formats = {p: q.format for p, q in packed.items()}
    with packed_folder(folder, CONTAINERS[to], model, formats, "float32", shard_bytes) as out:
        for p, q in packed.items():
            out.packed(names[p], q)
        rest = [(w, lambda p=p, w=w: w.turned(np.asarray(leaves[p]))) for p, w in names.items() if p not in packed]
        out.floats(rest)
    return packed
