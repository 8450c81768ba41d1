"""Makes the golden files: what transformers and PEFT compute on the tiny problems.

Run from the root of the repository, with the ``oracles`` extra installed::

    TORCHDYNAMO_DISABLE=1 HF_HUB_OFFLINE=1 python -m tests.golden.make_golden

Weights and tokens are not stored: ``tests/models/tiny_problems.py`` makes the same ones anywhere.
A file ``<problem>.npz`` holds

* ``logits``, ``loss`` and ``grad:<tensor>`` of the base model (gradients where its weights train),
* ``lora:logits``, ``lora:loss``, ``lora:grad:<tensor>`` with the adapter on all linears, where PEFT
  accepts the model,
* ``codes:<module>`` and ``lora:codes:<module>``: the int8 codes that enter each linear,
* ``state``: a checksum of weights, adapter and tokens.

``quantizers.npz`` holds inputs with awkward rows, and the codes and values of the released
quantisers. Everything is float32.
"""

import tempfile
from pathlib import Path

import numpy as np

from tests.models import hf_oracle
from tests.models.tiny_problems import GOLDEN, PROBLEMS, Problem, checksum, make_problem

FOLDER = Path(__file__).parent
# With this one no code lies within an ulp of a rounding boundary.
SEED = 1


def golden(problem: Problem) -> dict[str, np.ndarray]:
    """Everything one file holds."""
    arrays = {"state": np.array(checksum(problem))}
    with tempfile.TemporaryDirectory() as folder:
        model = hf_oracle.load_model(problem, Path(folder))
    trains = problem.storage in ("online", "float")
    arrays |= _results(model, problem, "", trains)
    if problem.storage in ("online", "offline"):
        arrays |= _results(hf_oracle.wrap_with_peft(model, problem), problem, "lora:", True)
    return arrays


def _results(model: object, problem: Problem, prefix: str, trains: bool) -> dict[str, np.ndarray]:
    keep = np.ones(problem.tokens.shape, bool)
    found = hf_oracle.run(model, problem.tokens, keep if trains else None)
    if problem.storage != "float":
        for module, x in hf_oracle.recorded_inputs(model, problem.tokens).items():
            if module.endswith("_proj"):
                found[f"codes:{module}"] = hf_oracle.codes(x)
    return {prefix + name: array for name, array in found.items()}


def quantizers() -> dict[str, np.ndarray]:
    """Awkward rows and matrices through the released quantisers."""
    import torch
    from transformers.integrations.bitnet import ActQuant, WeightQuant

    random = np.random.default_rng(0)
    x = random.standard_normal((12, 96)).astype(np.float32)
    x[0] = 0
    x[1] *= np.float32(1e-7)
    x[2] *= np.float32(1e-30)
    x[3, 5] = 1e9
    # The largest element 127·2^j makes k + 1/2 an exact tie.
    x[4] = (np.arange(96) - 47.5).astype(np.float32)
    x[4, 0] = 127
    x[5] = x[4] * np.float32(2.0**-9)
    w = random.standard_normal((48, 64)).astype(np.float32)
    w[::7] = 0
    ties = np.tile(np.float32([0.25, -0.25, 0.75, -0.75, 0.5, 0.5, 0.5, 0.5]), (8, 2))
    arrays = {"x": x, "x_codes": hf_oracle.codes(x)}
    arrays["x_values"] = ActQuant.apply(torch.from_numpy(x)).numpy()
    for name, weight in {"w": w, "tiny": w * np.float32(1e-7), "ties": ties}.items():
        arrays[name] = weight
        arrays[f"{name}_values"] = WeightQuant.apply(torch.from_numpy(weight)).numpy()
    return arrays


def main() -> None:
    """Writes every file."""
    np.savez_compressed(FOLDER / "quantizers.npz", **quantizers())
    for name in PROBLEMS:
        np.savez_compressed(FOLDER / f"{name}.npz", **golden(make_problem(name, GOLDEN, SEED)))


if __name__ == "__main__":
    main()
