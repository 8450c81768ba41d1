"""A step of decoding through all layers of a decoder at once."""

from fabric_kernels.decoding.api import Implementation as Implementation
from fabric_kernels.decoding.api import decode_layers as decode_layers
from fabric_kernels.decoding.api import fastest as fastest
from fabric_kernels.decoding.api import picks_itself as picks_itself
from fabric_kernels.decoding.api import why_not as why_not
from fabric_kernels.decoding.stacks import LayerStacks as LayerStacks
