"""Matrix products with packed weights on Hopper GPUs, written in Pallas Mosaic GPU.

product.py is the function, skeleton.py the kernel, tiles.py its tiles; integers.py, signed_bytes.py and tables.py
decode codes in registers, in the instructions of words.py; machines.py has the two that a kernel runs on. supers/ and
vectors/ are kernels of their own, hadamard.py rotates and rounds x.
"""

from qjax.kernels.mosaic_gpu.product import matmul, no_hopper, twin, unfit
from qjax.kernels.mosaic_gpu.tiles import Plan, plan_for

__all__ = ["Plan", "matmul", "no_hopper", "plan_for", "twin", "unfit"]
