"""Weights on a grid: fake quantization, its gradients and scales; trees of weights; inputs and caches."""
