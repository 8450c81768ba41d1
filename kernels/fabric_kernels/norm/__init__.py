"""RMS normalisation of rows, alone or of the gated product of a feed-forward."""

from fabric_kernels.norm.api import Gate as Gate
from fabric_kernels.norm.api import activate as activate
from fabric_kernels.norm.api import gated_product as gated_product
from fabric_kernels.norm.api import on_triton as on_triton
from fabric_kernels.norm.api import rms_norm as rms_norm
from fabric_kernels.norm.api import rms_norm_beside as rms_norm_beside
from fabric_kernels.norm.quantised import MOST_CHANNELS as MOST_CHANNELS
from fabric_kernels.norm.quantised import NormalisedCodes as NormalisedCodes
from fabric_kernels.norm.quantised import normalised_codes as normalised_codes
