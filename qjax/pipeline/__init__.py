"""A model in, a quantized model out: in memory, or streamed from file to file."""

from qjax.pipeline.calibrated import quantize_model
from qjax.pipeline.memory import contracted_axes, quantize_params
from qjax.pipeline.report import CalibrationReport, Report, TensorReport
from qjax.pipeline.stream import quantize_file
from qjax.pipeline.windows import Calibration, calibration_of, calibration_text

__all__ = [
    "Calibration", "CalibrationReport", "Report", "TensorReport", "calibration_of", "calibration_text",
    "contracted_axes", "quantize_file", "quantize_model", "quantize_params",
]  # fmt: skip
