"""Files: GGUF, safetensors, Hugging Face folders, tokenizers."""
