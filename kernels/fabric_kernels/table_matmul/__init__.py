"""Products with a table of floats: an embedding used as a head."""

from fabric_kernels.table_matmul.api import table_matmul as table_matmul
from fabric_kernels.table_matmul.api import table_matmul_transposed as table_matmul_transposed
