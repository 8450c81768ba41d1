"""Where a conversion may write: nowhere that holds something else."""

from pathlib import Path

from fabric_jax.conversion.config import ConvertConfig
from fabric_jax.errors import FabricError
from fabric_jax.gguf_container import read_gguf


def check_output(config: ConvertConfig, output: Path) -> None:
    """Refuses, before anything is read, to write over the input or over another kind of thing.

    Raises:
        FabricError: the output is an input, a file where a folder is to be, or of another kind.
    """
    for name in (config.model, config.adapter, config.text):
        given = Path(name).expanduser()
        if name and given.exists() and _overlap(output.resolve(), given.resolve()):
            raise FabricError(f"{output} is what is read", fix="Choose another --output")
    if config.to.startswith("gguf-"):
        _check_gguf(output, adapter=config.to == "gguf-adapter")
    elif output.suffix == ".gguf":
        raise FabricError(f"{config.to} is a folder", found=f"{output}", fix="Leave out .gguf")


def _overlap(one: Path, other: Path) -> bool:
    return one == other or one in other.parents


def _check_gguf(output: Path, *, adapter: bool) -> None:
    if output.suffix != ".gguf":
        raise FabricError(f"{output} has no ending", expected="a file that ends in .gguf")
    if not output.exists():
        return
    if not output.is_file():
        raise FabricError(f"{output} is a folder", expected="a .gguf file, or nothing yet")
    try:
        kind = read_gguf(output).metadata.get("general.type", "model")
    except FabricError as error:
        raise FabricError(f"{output} exists and is no GGUF file", fix="Remove it first") from error
    if (kind == "adapter") != adapter:
        raise FabricError(
            f"{output} exists and holds something else",
            expected="an adapter" if adapter else "a model",
            found=f"general.type {kind}",
        )
