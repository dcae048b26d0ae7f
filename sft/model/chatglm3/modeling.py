"""ChatGLM3 under its original parameter names, on transformers' GLM parts.

The network is `GlmForCausalLM`'s; what differs is the names, the fused query_key_value, the place of the head (inside
the backbone) and the cast order of the norm. Modules here hold parameters under the names of the released checkpoint
and answer to the names that the GLM forward passes use, which are taken over unchanged: so attention backends, masks,
the cache, packed rows and gradient checkpointing are transformers' own.

Adapters trained on the original code load unchanged, as does a quantised copy of the released checkpoint.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm.modeling_glm import (
    GlmDecoderLayer,
    GlmForCausalLM,
    GlmModel,
    GlmPreTrainedModel,
    GlmRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from sft.model.chatglm3.configuration import ChatGLMConfig, glm_config


class ChatGLMRMSNorm(nn.Module):
    """RMSNorm that casts back after the weight, as the original does, for bit-equal half-precision logits."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.layernorm_epsilon

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        return (self.weight * (hidden_states * torch.rsqrt(variance + self.eps))).to(hidden_states.dtype)


class ChatGLMAttention(nn.Module):
    """Grouped-query attention over one fused projection, whose rows are all queries, then all keys, then all values."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.num_key_value_groups = config.num_attention_heads // config.multi_query_group_num
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        query_size = config.num_attention_heads * self.head_dim
        key_size = config.multi_query_group_num * self.head_dim
        self.projection_sizes = [query_size, key_size, key_size]
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.projection_sizes), bias=config.add_qkv_bias)
        self.dense = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns: (batch, tokens, hidden_size), and the attention weights where the backend computes them."""
        batch, tokens, _ = hidden_states.shape
        query, key, value = (
            states.view(batch, tokens, -1, self.head_dim).transpose(1, 2)
            for states in self.query_key_value(hidden_states).split(self.projection_sizes, dim=-1)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        context, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.dense(context.reshape(batch, tokens, -1)), weights


class ChatGLMMLP(nn.Module):
    """SwiGLU; the rows of `dense_h_to_4h` are [gate; up]."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.dense_h_to_4h(hidden_states).chunk(2, dim=-1)
        return self.dense_4h_to_h(silu(gate) * up)


class ChatGLMLayer(GradientCheckpointingLayer):
    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = ChatGLMRMSNorm(config)
        self.self_attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = ChatGLMRMSNorm(config)
        self.mlp = ChatGLMMLP(config)

    forward = GlmDecoderLayer.forward
    self_attn = property(lambda self: self.self_attention)


class ChatGLMPreTrainedModel(GlmPreTrainedModel):
    config: ChatGLMConfig  # type: ignore[assignment]  # the GLM parts read it by its aliases
    base_model_prefix = "transformer"
    _no_split_modules = ["ChatGLMLayer"]
    _can_record_outputs = {"hidden_states": ChatGLMLayer, "attentions": ChatGLMAttention}
    # Computed, not loaded: the released .bin shards hold it.
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.get_submodule("embedding.word_embeddings")

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.set_submodule("embedding.word_embeddings", value)

    def get_output_embeddings(self) -> nn.Module:
        return self.base_model.get_submodule("output_layer")

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.base_model.set_submodule("output_layer", value)


class ChatGLMModel(ChatGLMPreTrainedModel):
    """The backbone; it holds the head as the original does, and returns the hidden states before it.

    Shapes: input_ids, attention_mask and position_ids (batch, tokens); last_hidden_state (batch, tokens, hidden_size).
    Packed rows stay apart where position_ids restart, with `attention_mask=None` and `use_cache=False`.
    """

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        layers = nn.ModuleList(ChatGLMLayer(config, index) for index in range(config.num_layers))
        self.embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(config.padded_vocab_size, config.hidden_size)})
        self.rotary_pos_emb = GlmRotaryEmbedding(glm_config(config))
        self.encoder = nn.ModuleDict({"layers": layers, "final_layernorm": ChatGLMRMSNorm(config)})
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    forward = GlmModel.forward
    embed_tokens = property(lambda self: self.embedding["word_embeddings"])
    layers = property(lambda self: self.encoder["layers"])
    norm = property(lambda self: self.encoder["final_layernorm"])
    rotary_emb = property(lambda self: self.rotary_pos_emb)


class ChatGLMForCausalLM(ChatGLMPreTrainedModel, GenerationMixin):
    """Shapes: logits (batch, tokens or logits_to_keep, padded_vocab_size); loss: mean over labels that are not -100."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    forward = GlmForCausalLM.forward
    model = property(lambda self: self.transformer)
    lm_head = property(lambda self: self.transformer.output_layer)
