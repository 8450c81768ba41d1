"""Models and adapters from one format to another, and what merging an adapter costs."""

from fabric_jax.conversion.config import ConvertConfig
from fabric_jax.conversion.convert import Converted, convert
from fabric_jax.conversion.damage import Damage

__all__ = ["ConvertConfig", "Converted", "Damage", "convert"]
