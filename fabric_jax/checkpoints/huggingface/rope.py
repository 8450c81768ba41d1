"""Rotary positions and local layers in ``config.json``, in both spellings of transformers.

New files have ``rope_parameters``, with theta inside and, for Gemma 3, one object for each type of
layer. Older ones have ``rope_theta``, ``rope_scaling`` and ``rope_local_base_freq``.
"""

from collections.abc import Mapping
from typing import Any, cast

from fabric_jax.errors import FabricError, unknown_name
from fabric_jax.layers.rope import RopeScaling

Json = Mapping[str, Any]

GLOBAL, LOCAL = "full_attention", "sliding_attention"
DEFAULT_THETA = {"bitnet": 500_000.0, "gemma3_text": 1_000_000.0}
LOCAL_THETA = 10_000.0


def read_rope(text: Json, family: str, num_layers: int, name: str) -> dict[str, Any]:
    """The fields of ``ModelConfig`` about positions and about which layers are local.

    Raises:
        FabricError: a kind of scaling or a pattern of layers that the decoder doesn't have.
    """
    every = _global_every(text, family, num_layers, name)
    parameters = _object(text, "rope_parameters", name)
    of_global = _object(parameters, GLOBAL, name) if GLOBAL in parameters else parameters
    of_global = {**of_global, **_object(text, "rope_scaling", name)}
    default = DEFAULT_THETA.get(family, 10_000.0)
    fields: dict[str, Any] = {
        "rope_theta": of_global.get("rope_theta", text.get("rope_theta", default)),
        "rope_scaling": _scaling(of_global, name),
    }
    if every == 1:
        return fields
    if text.get("sliding_window") is None:
        raise FabricError(f"config.json of {name} has local layers but no sliding_window")
    of_local = _object(parameters, LOCAL, name)
    if _scaling(of_local, name) is not None:
        raise FabricError(f"{name} scales the positions of local layers, which is not supported")
    legacy = text.get("rope_local_base_freq", LOCAL_THETA)
    fields |= {"global_every": every, "local_rope_theta": of_local.get("rope_theta", legacy)}
    return {**fields, "sliding_window": text.get("sliding_window")}


def _object(values: Json, key: str, name: str) -> Json:
    found = values.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise FabricError(f"config.json of {name}: {key} is no object", found=repr(found)[:100])
    return cast(Json, found)


def _scaling(parameters: Json, name: str) -> RopeScaling | None:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    match kind:
        case "default":
            return None
        case "linear":
            return RopeScaling(kind="linear", factor=_need(parameters, "factor", name))
        case "llama3":
            return RopeScaling(
                kind="llama3",
                factor=_need(parameters, "factor", name),
                low_freq_factor=_need(parameters, "low_freq_factor", name),
                high_freq_factor=_need(parameters, "high_freq_factor", name),
                original_length=_need(parameters, "original_max_position_embeddings", name),
            )
        case _:
            known = ("default", "linear", "llama3")
            raise unknown_name(f"rope_type in config.json of {name}", str(kind)[:100], known)


def _need(parameters: Json, key: str, name: str) -> Any:
    """A number that ``RopeScaling`` checks."""
    if parameters.get(key) is None:
        raise FabricError(f"config.json of {name}: the scaling of its positions lacks {key}")
    return parameters[key]


def _global_every(text: Json, family: str, num_layers: int, name: str) -> int:
    """Of how many layers the last is global; 1 where all are."""
    types = text.get("layer_types")
    if types is None:
        pattern = text.get("sliding_window_pattern")
        every = (6 if pattern is None else pattern) if family == "gemma3_text" else 1
        if isinstance(every, bool) or not isinstance(every, int) or not 0 < every < 1 << 20:
            raise FabricError(f"config.json of {name}: sliding_window_pattern is out of range")
        return every
    if not isinstance(types, list) or len(cast(list[Any], types)) != num_layers:
        raise FabricError(
            f"config.json of {name}: layer_types doesn't fit",
            expected=f"a list of {num_layers} types",
        )
    listed = cast(list[Any], types)
    every = listed.index(GLOBAL) + 1 if GLOBAL in listed else num_layers + 1
    if listed != [LOCAL if (i + 1) % every else GLOBAL for i in range(num_layers)]:
        raise FabricError(
            f"{name} mixes its layers in a way that is not supported",
            expected=f"every n-th of layer_types {GLOBAL}, the others {LOCAL}",
            found=str(listed)[:200],
        )
    return every
