"""Matrix products with packed ternary weights."""

from fabric_kernels.ternary_matmul.api import Implementation as Implementation
from fabric_kernels.ternary_matmul.api import select_implementation as select_implementation
from fabric_kernels.ternary_matmul.api import ternary_matmul as ternary_matmul
from fabric_kernels.ternary_matmul.api import (
    ternary_matmul_transposed as ternary_matmul_transposed,
)
