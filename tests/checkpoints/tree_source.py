"""A base tree in memory as a ``ModelSource``."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fabric_jax.checkpoints.source import ALL_ROWS, ModelSource, TernaryMatrix
from fabric_jax.layers.bit_linear import BaseMode
from fabric_jax.models.config import ModelConfig
from fabric_jax.quantization.absmax import ActQuant
from tests.models.hf_mapping import get
from tests.models.tiny_problems import Problem


@dataclass(frozen=True, kw_only=True)
class TreeSource:
    config: ModelConfig
    form: BaseMode
    tree: dict[str, Any]
    act_quant: ActQuant = "per_token"
    tokenizer_source: str = ""
    origin: str = "memory"

    def linear(self, path: str, layer: int) -> TernaryMatrix | np.ndarray:
        node = get(self.tree, ("layers", *path.split(".")))
        weight = np.asarray(node["weight"][layer])
        if self.form != "packed":
            return weight
        k = self.config.linear_shapes[path][1]
        return TernaryMatrix(packed=weight, scale=float(node["scale"][layer]), k=k)

    def tensor(self, name: str, layer: int | None = None, *, rows: slice = ALL_ROWS) -> np.ndarray:
        array = np.asarray(get(self.tree, tuple(name.split("."))))
        return (array if layer is None else array[layer])[rows]


def source_of(problem: Problem, **changes: Any) -> TreeSource:
    """A tiny problem as a source."""
    source = TreeSource(config=problem.config, form=problem.mode, tree=problem.base())
    return replace(source, **changes)


def assert_same_tensors(found: ModelSource, expected: ModelSource) -> None:
    """Both give the same values, scales and codes included, bit for bit."""
    assert replace(found.config, name="") == replace(expected.config, name="")
    assert found.form == expected.form
    config = expected.config
    tables = ["embedding", "final_norm.gain"] + ([] if config.tied_head else ["head"])
    gains = ["attention_norm", "mlp_norm"]
    gains += ["attention.sub_norm", "mlp.sub_norm"] if config.sub_norms else []
    gains += ["attention.q_norm", "attention.k_norm"] if config.qk_norm else []
    gains += ["attention_post_norm", "mlp_post_norm"] if config.post_norms else []
    for name in tables:
        np.testing.assert_array_equal(found.tensor(name), expected.tensor(name), err_msg=name)
    for layer in range(config.num_layers):
        for gain in gains:
            name = f"layers.{gain}.gain"
            np.testing.assert_array_equal(found.tensor(name, layer), expected.tensor(name, layer))
        for path in config.linear_shapes:
            ours, theirs = found.linear(path, layer), expected.linear(path, layer)
            if isinstance(ours, TernaryMatrix) and isinstance(theirs, TernaryMatrix):
                assert (ours.scale, ours.k) == (theirs.scale, theirs.k), (path, layer)
                ours, theirs = ours.packed, theirs.packed
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{path} {layer}")
