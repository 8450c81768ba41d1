"""Configurations, the decoder and its random weights."""
