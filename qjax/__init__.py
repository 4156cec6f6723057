"""qjax: ultra-low-bit quantization of language models in JAX."""

from qjax.formats import format, formats
from qjax.io.checkpoint import load, save
from qjax.pipeline import quantize_params
from qjax.tensor import QTensor, dequantize, dot, from_bytes, is_qtensor, quantize, to_bytes

__all__ = [
    "QTensor",
    "dequantize",
    "dot",
    "format",
    "formats",
    "from_bytes",
    "is_qtensor",
    "load",
    "quantize",
    "quantize_params",
    "save",
    "to_bytes",
]
