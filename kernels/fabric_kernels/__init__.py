"""Kernels for packed ternary weights. Knows jax only; usable without fabric_jax."""

from fabric_kernels.packing import bits_per_weight as bits_per_weight
from fabric_kernels.packing import pack_ternary2 as pack_ternary2
from fabric_kernels.packing import packed_width as packed_width
from fabric_kernels.packing import unpack_ternary2 as unpack_ternary2
from fabric_kernels.ternary_matmul import select_implementation as select_implementation
from fabric_kernels.ternary_matmul import ternary_matmul as ternary_matmul
from fabric_kernels.ternary_matmul import ternary_matmul_transposed as ternary_matmul_transposed
