"""Matrix products with vector codes on Hopper GPUs: points of lattices and paths through trellises.

product.py is the function, kernel.py the kernel, code.py what it knows of a code; lattice.py and trellis.py decode
units in registers.
"""

from qjax.kernels.mosaic_gpu.vectors.product import decoder, matmul, twin, unfit

__all__ = ["decoder", "matmul", "twin", "unfit"]
