"""qjax: ultra-low-bit quantization of language models in JAX."""

from qjax import recipes
from qjax.calibrate import observe
from qjax.formats import format, format_names
from qjax.io.checkpoint import load, save
from qjax.lifting import lift
from qjax.pipeline import calibration_text, contracted_axes, quantize_file, quantize_model, quantize_params
from qjax.plan.named import plan_named
from qjax.recipes import Recipe, recipe
from qjax.stats import Stats
from qjax.tensor import QTensor, dequantize, dot, from_bytes, is_qtensor, quantize, to_bytes
from qjax.training.fake_quant import fake_quant

__all__ = [
    "QTensor",
    "Recipe",
    "Stats",
    "calibration_text",
    "contracted_axes",
    "dequantize",
    "dot",
    "fake_quant",
    "format",
    "format_names",
    "from_bytes",
    "is_qtensor",
    "lift",
    "load",
    "observe",
    "plan_named",
    "quantize",
    "quantize_file",
    "quantize_model",
    "quantize_params",
    "recipe",
    "recipes",
    "save",
    "to_bytes",
]
