"""Names of tensors: those of the base tree, and those in files of transformers."""

from collections.abc import Collection
from dataclasses import dataclass

from fabric_jax.models.config import ModelConfig

LINEARS = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
# With post-norms the old name of the second norm is that of another one.
FOUR_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
QK_NORMS = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
SUB_NORMS = {"attention.sub_norm": "self_attn.attn_sub_norm", "mlp.sub_norm": "mlp.ffn_sub_norm"}
# Of the checkpoints of huggingface.co/1bitLLM, which name them otherwise and are ternary whatever
# their config.json says of itself (model_type llama, no quantisation).
SUB_NORMS_1BITLLM = {
    "attention.sub_norm": "self_attn.inner_attn_ln",
    "mlp.sub_norm": "mlp.ffn_layernorm",
}
SCALE = "weight_scale"
HEAD = "lm_head.weight"
# Where the text model lies: alone, and in multimodal checkpoints of either layout.
BODIES = {
    "model.": HEAD,
    "language_model.model.": f"language_model.{HEAD}",
    "model.language_model.": HEAD,
}
NOT_TEXT = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
# Buffers that some versions saved; their values follow from the configuration.
BUFFERS = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")


@dataclass(frozen=True, kw_only=True)
class Names:
    """Spellings in one checkpoint.

    Attributes:
        config: of the model.
        body: what the names of the text model start with.
        sub_norms: modules of the sub-norms.
    """

    config: ModelConfig
    body: str
    sub_norms: dict[str, str]

    @property
    def norms(self) -> dict[str, str]:
        """The module of each norm of a layer, by its path in the layer."""
        config = self.config
        return {
            **(FOUR_NORMS if config.post_norms else NORMS),
            **(QK_NORMS if config.qk_norm else {}),
            **(self.sub_norms if config.sub_norms else {}),
        }

    def linear(self, path: str, layer: int) -> str:
        """The module of a linear; its tensors are ``.weight`` and maybe ``.weight_scale``."""
        return f"{self.body}layers.{layer}.{LINEARS[path]}"

    def tensor(self, name: str, layer: int | None) -> str:
        """The name of any other tensor, from its name in the base tree."""
        match name:
            case "embedding":
                return f"{self.body}embed_tokens.weight"
            case "final_norm.gain":
                return f"{self.body}norm.weight"
            case "head":
                return self.head
            case _:
                path = name.removeprefix("layers.").removesuffix(".gain")
                return f"{self.body}layers.{layer}.{self.norms[path]}.weight"

    @property
    def head(self) -> str:
        """The head's own matrix, also where there is none or only a copy of the embedding."""
        return BODIES[self.body]

    def ignored(self, name: str) -> bool:
        """Whether a tensor of a checkpoint says nothing that is needed."""
        return (
            name.endswith(BUFFERS)
            or (name == self.head and self.config.tied_head)
            or (self.body != "model." and name.startswith(NOT_TEXT))
        )


def find_body(found: Collection[str]) -> str:
    """Where the text model lies in a checkpoint with these tensors."""
    return next((body for body in BODIES if f"{body}embed_tokens.weight" in found), "model.")


def find_sub_norms(found: Collection[str]) -> dict[str, str] | None:
    """The spelling of the sub-norms that a checkpoint has; None for one without."""
    for spelling in (SUB_NORMS, SUB_NORMS_1BITLLM):
        ends = tuple(f".{module}.weight" for module in spelling.values())
        if any(name.endswith(ends) for name in found):
            return spelling
    return None


def layers_in(found: Collection[str], body: str) -> int:
    """Layers that have tensors."""
    start = f"{body}layers."
    return len({name.removeprefix(start).split(".")[0] for name in found if name.startswith(start)})
