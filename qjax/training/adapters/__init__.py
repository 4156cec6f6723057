"""Low-rank adapters beside packed weights: LoRA, LoftQ, QA-LoRA, and the ways to merge them."""
