"""Pallas kernels, the layouts they read, and where each is used."""
