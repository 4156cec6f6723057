"""Tuning after rounding: codes stay, what is continuous beside them moves by gradients."""
