"""The configuration of ChatGLM3 under its original field names, and the same network in transformers' own terms."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import GlmConfig, PreTrainedConfig

from sft.errors import ModelError

# The only values of these fields that the released checkpoints use and that this code computes.
IMPLEMENTED: dict[str, Any] = {
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "multi_query_attention": True,
    "original_rope": True,
    "post_layer_norm": True,
    "pre_seq_len": None,
    "prefix_projection": False,
    "quantization_bit": 0,
    "rmsnorm": True,
    "tie_word_embeddings": False,
}


@strict
class ChatGLMConfig(PreTrainedConfig):
    """A released `config.json` (model_type "chatglm"); transformers' common names are aliases of the fields here.

    `apply_query_key_layer_scaling`, `attention_softmax_in_fp32` and `bias_dropout_fusion` are kept but change nothing:
    in the original, too, they are without effect under torch's fused attention.

    Raises: ModelError: a value that this code does not compute, by name.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "vocab_size": "padded_vocab_size",
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "num_key_value_heads": "multi_query_group_num",
        "head_dim": "kv_channels",
        "max_position_embeddings": "seq_length",
        "rms_norm_eps": "layernorm_epsilon",
        "attention_bias": "add_qkv_bias",
    }

    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    num_layers: int = 28
    num_attention_heads: int = 32
    kv_channels: int = 128
    multi_query_attention: bool = True
    multi_query_group_num: int = 2
    seq_length: int = 8192
    original_rope: bool = True
    rope_ratio: float | int = 1
    layernorm_epsilon: float = 1e-5
    rmsnorm: bool = True
    post_layer_norm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    fp32_residual_connection: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = True
    bias_dropout_fusion: bool = True
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    attention_softmax_in_fp32: bool = True
    apply_query_key_layer_scaling: bool = True
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    quantization_bit: int = 0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0
    bos_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for field, implemented in IMPLEMENTED.items():
            if (value := getattr(self, field)) != implemented:
                raise ModelError(f"config.json: {field} is {value!r}; ChatGLM3 is implemented for {implemented!r} only")
        for field in kwargs:
            if field.startswith(("rope_", "rotary_", "partial_rotary")):
                raise ModelError(f"config.json: unknown field {field}; ChatGLM3 scales positions with rope_ratio only")
        if self.rope_ratio != 1 and "chatglm2" in str(kwargs.get("_name_or_path", "")).lower():
            raise ModelError(
                "config.json: rope_ratio of a ChatGLM2, some of which divide positions by it; "
                "ChatGLM3 multiplies the rotary base by it, and only that is implemented"
            )
        super().__post_init__(**kwargs)


def glm_config(config: ChatGLMConfig) -> GlmConfig:
    """The same network as transformers' `GlmForCausalLM` describes it (without token ids)."""
    return GlmConfig(
        vocab_size=config.padded_vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.multi_query_group_num,
        head_dim=config.kv_channels,
        attention_bias=config.add_qkv_bias,
        attention_dropout=config.attention_dropout,
        max_position_embeddings=config.seq_length,
        rms_norm_eps=config.layernorm_epsilon,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0 * config.rope_ratio,
            "partial_rotary_factor": 0.5,
        },
        initializer_range=config.initializer_range,
        tie_word_embeddings=False,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
        dtype=config.dtype,
    )
