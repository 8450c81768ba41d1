"""The first run: a small BitNet trained, packed, fine-tuned and evaluated without any file."""
