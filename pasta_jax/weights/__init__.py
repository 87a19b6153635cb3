"""Model files in and out: Hugging Face folders, GGUF, tokenizers, adapters, export."""
