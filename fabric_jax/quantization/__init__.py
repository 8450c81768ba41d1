"""BitNet's arithmetic: quantisers, straight-through estimators, the packed linear."""
