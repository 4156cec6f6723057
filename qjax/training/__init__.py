"""Training: the loops and what they are made of."""
