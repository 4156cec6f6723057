"""Training through quantization, in rooms; each may import itself and those before it.

grid  ->  optim  ->  losses  ->  adapters  ->  run  ->  decoder
"""
