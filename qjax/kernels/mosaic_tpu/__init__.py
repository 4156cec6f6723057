"""Matrix products with packed weights on TPUs, written in Pallas.

product.py is the function, kernel.py the kernel, tiles.py its tiles; hadamard.py rotates and rounds x.
"""

from qjax.kernels.mosaic_tpu.product import matmul, twin, unfit
from qjax.kernels.mosaic_tpu.tiles import Plan, plan_for

__all__ = ["Plan", "matmul", "plan_for", "twin", "unfit"]
