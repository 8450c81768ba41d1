"""Losses of rows of logits with their gradients."""

from fabric_kernels.cross_entropy.api import Implementation as Implementation
from fabric_kernels.cross_entropy.api import logits_gradient as logits_gradient
