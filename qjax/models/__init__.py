"""Plain flax models, with no quantization code in them."""
