"""A step of decoding through all layers on Hopper GPUs, written thread by thread."""
