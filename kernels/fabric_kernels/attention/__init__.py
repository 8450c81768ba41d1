"""Attention under a mask, with rotary positions."""

from fabric_kernels.attention.api import Angles as Angles
from fabric_kernels.attention.api import attention as attention
from fabric_kernels.attention.cache import KVCache as KVCache
from fabric_kernels.attention.cache import empty_cache as empty_cache
from fabric_kernels.attention.cached import cached_attention as cached_attention
from fabric_kernels.attention.cudnn import cudnn_attention as cudnn_attention
from fabric_kernels.attention.xla import rotate as rotate
