"""Which weight gets which format: path patterns, and llama-quantize's mixes by their names."""

from qjax.plan.mixes import FILE_TYPES, decoder_weights, file_type, file_type_number, mix, mix_of, tensor_types
from qjax.plan.rules import KEEP, Assignment, Plan, Rule, Weight

__all__ = [
    "FILE_TYPES",
    "KEEP",
    "Assignment",
    "Plan",
    "Rule",
    "Weight",
    "decoder_weights",
    "file_type",
    "file_type_number",
    "mix",
    "mix_of",
    "tensor_types",
]
