"""A model in, a quantized model out: in memory, or streamed from file to file."""

from qjax.pipeline.memory import quantize_params
from qjax.pipeline.report import Report, TensorReport
from qjax.pipeline.stream import quantize_file

__all__ = ["Report", "TensorReport", "quantize_file", "quantize_params"]
