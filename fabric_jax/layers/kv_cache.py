"""Keys and values of the tokens that a generating model has seen; the kernels know the layout."""

from fabric_kernels.attention import KVCache, empty_cache

__all__ = ["KVCache", "empty_cache"]
