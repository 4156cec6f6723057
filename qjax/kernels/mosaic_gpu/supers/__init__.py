"""Matrix products with Q2_K and Q4_K on Hopper GPUs, their integer scales multiplied into the codes.

product.py is the function, kernel.py the kernel, decode.py what it does in registers.
"""

from qjax.kernels.mosaic_gpu.supers.product import matmul, twin, unfit

__all__ = ["matmul", "twin", "unfit"]
