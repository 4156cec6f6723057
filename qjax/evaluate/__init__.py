"""Judge: perplexity, divergence from a baseline, sizes, plots, reports."""
