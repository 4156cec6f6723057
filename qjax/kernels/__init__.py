"""Multiply with packed weights: y[*b, *o] = sum_n x[*b, n] w_hat[*o, n], w_hat never whole where a kernel can help it.

    kernel      what a kernel is, and what it is asked for
    dispatch    the table of kernels: which of them runs, by format, platform and rows of x
    product     the one operation: its gradient, its vmap, how it is cut over a mesh
    prepacked   weights in a kernel's own layout, made once
    xla         what plain XLA does best: whole, by strips, in whole numbers
    lanes       by strips of weights that were laid out for a CPU, outputs side by side

A kernel is a line of `TABLE`, first that fits first; `qjax kernels` prints what it says.
"""

from qjax.kernels.dispatch import TABLE, choice
from qjax.kernels.kernel import PLATFORMS, Call, Kernel, Platform
from qjax.kernels.prepacked import Layout, Prepacked
from qjax.kernels.product import matmul

__all__ = ["PLATFORMS", "TABLE", "Call", "Kernel", "Layout", "Platform", "Prepacked", "choice", "matmul"]
