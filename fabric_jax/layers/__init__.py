"""Flax modules and the functions they are made of."""
