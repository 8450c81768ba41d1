"""Kernels for packed ternary weights. Knows jax only; usable without fabric_jax."""

from fabric_kernels.absmax import absmax_quantize as absmax_quantize
from fabric_kernels.attention import attention as attention
from fabric_kernels.block_quantization import BlockTable as BlockTable
from fabric_kernels.block_quantization import dequantize_blocks as dequantize_blocks
from fabric_kernels.block_quantization import quantize_blocks as quantize_blocks
from fabric_kernels.gradients import with_gradient_of as with_gradient_of
from fabric_kernels.low_rank import LowRank as LowRank
from fabric_kernels.low_rank import low_rank_product as low_rank_product
from fabric_kernels.norm import gated_product as gated_product
from fabric_kernels.norm import rms_norm as rms_norm
from fabric_kernels.packing import Packing as Packing
from fabric_kernels.packing import bits_per_weight as bits_per_weight
from fabric_kernels.packing import pack as pack
from fabric_kernels.packing import pack_ternary2 as pack_ternary2
from fabric_kernels.packing import packed_width as packed_width
from fabric_kernels.packing import repack as repack
from fabric_kernels.packing import unpack as unpack
from fabric_kernels.packing import unpack_ternary2 as unpack_ternary2
from fabric_kernels.table_matmul import table_matmul as table_matmul
from fabric_kernels.table_matmul import table_matmul_transposed as table_matmul_transposed
from fabric_kernels.ternary_matmul import TernaryWeight as TernaryWeight
from fabric_kernels.ternary_matmul import select_implementation as select_implementation
from fabric_kernels.ternary_matmul import ternary_linear as ternary_linear
from fabric_kernels.ternary_matmul import ternary_matmul as ternary_matmul
from fabric_kernels.ternary_matmul import ternary_matmul_transposed as ternary_matmul_transposed
