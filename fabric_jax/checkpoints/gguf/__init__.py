"""Models and adapters in GGUF, the format of llama.cpp and its descendants."""
