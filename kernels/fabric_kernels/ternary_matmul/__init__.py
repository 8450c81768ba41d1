"""Matrix products with packed ternary weights."""

from fabric_kernels.ternary_matmul.adapted_after import adapted_after as adapted_after
from fabric_kernels.ternary_matmul.adapted_after import normalises as normalises
from fabric_kernels.ternary_matmul.api import NARROW_PRODUCT as NARROW_PRODUCT
from fabric_kernels.ternary_matmul.api import GradientBits as GradientBits
from fabric_kernels.ternary_matmul.api import ternary_linear as ternary_linear
from fabric_kernels.ternary_matmul.api import (
    ternary_linear_transposed as ternary_linear_transposed,
)
from fabric_kernels.ternary_matmul.api import ternary_matmul as ternary_matmul
from fabric_kernels.ternary_matmul.api import (
    ternary_matmul_transposed as ternary_matmul_transposed,
)
from fabric_kernels.ternary_matmul.of_codes import (
    ternary_linear_of_codes as ternary_linear_of_codes,
)
from fabric_kernels.ternary_matmul.prologue import Prologue as Prologue
from fabric_kernels.ternary_matmul.prologue import apply_prologue as apply_prologue
from fabric_kernels.ternary_matmul.select import Implementation as Implementation
from fabric_kernels.ternary_matmul.select import SideImplementation as SideImplementation
from fabric_kernels.ternary_matmul.select import resolve as resolve
from fabric_kernels.ternary_matmul.select import select_implementation as select_implementation
from fabric_kernels.ternary_matmul.select import side_implementation as side_implementation
from fabric_kernels.ternary_matmul.weight import TernaryWeight as TernaryWeight
from fabric_kernels.ternary_matmul.weight import no_gradient as no_gradient
