"""One interpreter of jaxprs, four uses: run packed weights, watch their inputs, change them, add to them.

    apply_q = lift(apply)              apply_q(qparams, x): packed weights in a plain model
    report(apply, params, x)           every use of every weight, by its path in the params tree
    roles(apply, params, x)            a table of what every leaf is: matrix, table, bias, unused ...
    watch(apply, collect)              statistics of what flows into each weight
    substitute(apply, transform)       fake quantization of weights
    replace_inputs(apply, transform)   fake quantization of activations
    adapt(apply)                       low-rank adapters
    tap(apply)                         gradients by the outputs of weights
    cut(fn, params, x)                 a function in pieces, between the uses of its weights

A function is traced on the shapes of dense weights and its jaxpr evaluated again, with weights followed by name:
`jax_names` (what is semi-public in JAX), `weight` (a weight on its way), `layout` and `packed` (rearrangements),
`picked` and `joined` (entries of a stack, several weights as one array), `uses` with `contract`, `ragged` and `lookup`,
`interpret` and `control` (the loop, the bodies), `scope` (where we stand), `run`.
"""

from qjax.lifting.apply import lift
from qjax.lifting.change import adapt, replace_inputs, substitute, tap, tap_shapes
from qjax.lifting.cut import Piece, cut
from qjax.lifting.observe import report, watch
from qjax.lifting.roles import Role, Roles, roles
from qjax.lifting.scope import Stats
from qjax.lifting.weight import Use

__all__ = [
    "Piece", "Role", "Roles", "Stats", "Use", "adapt", "cut", "lift", "replace_inputs", "report", "roles", "substitute",
    "tap", "tap_shapes", "watch",
]  # fmt: skip
