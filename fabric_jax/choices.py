"""What settings of several commands may be; knows nothing, so that parsing them loads nothing."""

from typing import Literal

Weights = Literal[
    "packed",
    "ternary2",
    "ternary1.6",
    "master",
    "float",
    "float32",
    "bfloat16",
    "float16",
    "int8",
    "int4",
]
"""The form of the linears' weights; ``packed`` is ``ternary2``, and ``float`` is plain linears in
the dtype of the activations."""

WeightsChoice = Literal["auto", Weights]
"""Likewise, or as the checkpoint has them."""

TableDtype = Literal["same", "float32", "bfloat16", "float16", "int8", "int4"]
"""How embedding and head are stored; ``same`` as activations, or as the checkpoint has them."""

ActQuantChoice = Literal["auto", "per_token", "block256", "none"]
"""The quantiser of the inputs; ``auto`` is the model's own."""

ImplementationChoice = Literal["auto", "xla", "cpu", "triton", "mosaic_gpu", "mosaic_tpu", "tuned"]
"""What runs products with packed weights: ``auto``, or one of ``fabric_kernels``."""
