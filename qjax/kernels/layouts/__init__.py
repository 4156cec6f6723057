"""How packed weights lie in an accelerator's memory: made once from a tensor's leaves, and turned back bit for bit.

coding.py says which formats a kernel can read at all, planes.py how codes of a few bits become words, planar.py the
layout of the GPU's kernel of planes, supers.py and points.py those of its other two, columns.py that of the TPU kernel,
scales.py what they share; fits.py answers beforehand.
"""
