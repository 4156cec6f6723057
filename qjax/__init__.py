"""qjax: ultra-low-bit quantization of language models in JAX."""

from qjax import recipes
from qjax.calibrate import observe
from qjax.evaluate.describe import describe
from qjax.evaluate.divergence import divergence
from qjax.evaluate.perplexity import perplexity
from qjax.formats import format, format_names
from qjax.io.checkpoint import load, save
from qjax.lifting import lift
from qjax.models.generate import generate
from qjax.pipeline import calibration_text, contracted_axes, quantize_file, quantize_model, quantize_params
from qjax.plan import Plan, Rule
from qjax.plan.named import plan_named
from qjax.prepacking import prepack
from qjax.recipes import Recipe, recipe
from qjax.stats import Stats
from qjax.tensor import QTensor, dequantize, dot, from_bytes, is_qtensor, quantize, to_bytes
from qjax.training.grid.fake_quant import fake_quant
from qjax.training.grid.qat import qat

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "QTensor",
    "Recipe",
    "Rule",
    "Stats",
    "__version__",
    "calibration_text",
    "contracted_axes",
    "dequantize",
    "describe",
    "divergence",
    "dot",
    "fake_quant",
    "format",
    "format_names",
    "from_bytes",
    "generate",
    "is_qtensor",
    "lift",
    "load",
    "observe",
    "perplexity",
    "plan_named",
    "prepack",
    "qat",
    "quantize",
    "quantize_file",
    "quantize_model",
    "quantize_params",
    "recipe",
    "recipes",
    "save",
    "to_bytes",
]
