"""A trained ChatGLM3 for other programs: as transformers' own `GlmForCausalLM`, or under its original names."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, GlmForCausalLM, PreTrainedTokenizerFast
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding
from transformers.utils import cached_file

from sft.errors import ModelError
from sft.model.chatglm3.configuration import ChatGLMConfig, glm_config
from sft.model.chatglm3.modeling import ChatGLMForCausalLM
from sft.model.chatglm3.tokenization import ChatGLMTokenizer

GLM_NAMES = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.layers": "model.layers",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.output_layer": "lm_head",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
# In one string "sop" and "eop" would be read inside words; GLM-4 renamed them so, and only the names change here.
GLM_SPECIAL_TOKENS = {"sop": "<sop>", "eop": "<eop>"}

# Fields of our configuration that a released config.json does not have.
OURS = {"attribute_map", "initializer_range", "bos_token_id"}
VENDOR_REPOSITORY = "THUDM/chatglm3-6b"
VENDOR_CODE = (
    "configuration_chatglm.py", "modeling_chatglm.py", "quantization.py", "tokenization_chatglm.py"
)  # fmt: skip


def to_glm(model: ChatGLMForCausalLM) -> GlmForCausalLM:
    """The same network as a `GlmForCausalLM`: logits equal in fp32; in half precision its norm rounds otherwise.

    The tensors are the model's own, only query_key_value is copied, in three: use one of the two models from here on.

    Raises: ModelError: the model is quantised, or not a plain ChatGLM3 (merge an adapter first).
    """
    _check_plain(model)
    with torch.device("meta"):
        glm = GlmForCausalLM(glm_config(model.config))
    glm.model.rotary_emb = GlmRotaryEmbedding(glm.config).to(model.device)
    state = (tensor for name, ours in model.state_dict().items() for tensor in glm_tensors(model, name, ours))
    glm.load_state_dict(dict(state), assign=True)
    return glm.eval()


def glm_tensors(model: ChatGLMForCausalLM, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What becomes of one of the model's tensors in a `GlmForCausalLM`: (name, tensor), three of a query_key_value."""
    for ours, theirs in GLM_NAMES.items():
        name = name.replace(ours, theirs)
    if "self_attention.query_key_value" not in name:
        yield name, tensor
        return
    sizes = model.transformer.layers[0].self_attention.projection_sizes
    for part, rows in zip("qkv", tensor.split(sizes), strict=True):
        yield name.replace("self_attention.query_key_value", f"self_attn.{part}_proj"), rows.clone()


def save_glm(model: ChatGLMForCausalLM, tokenizer: ChatGLMTokenizer, folder: str | Path, weights: bool = True) -> None:
    """Write a folder that plain transformers loads: weights, config, generation config, tokenizer.json, chat template.

    weights: False leaves them out, for a model that has none.

    Token ids are ChatGLM3's; "sop" and "eop" are called "<sop>" and "<eop>". The template over one string differs from
    `encode_prompt` only where a message spells a control token: there it is the token.

    Raises: ModelError: as `to_glm`.
    """
    glm = to_glm(model)
    stop_ids = tokenizer.stop_token_ids
    glm.config.eos_token_id = stop_ids
    glm.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id)
    glm.save_pretrained(folder, state_dict=None if weights else {})

    backend = tokenizer.backend_tokenizer.to_str()
    template = tokenizer.chat_template
    for ours, theirs in GLM_SPECIAL_TOKENS.items():
        backend = backend.replace(f'"{ours}"', f'"{theirs}"')
        template = template.replace(f"[gMASK]{ours}", f"[gMASK]{theirs}")
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        unk_token=tokenizer.unk_token,
        padding_side="left",
        model_max_length=model.config.seq_length,
        chat_template=template,
    )
    plain.save_pretrained(folder)


def save_chatglm(
    model: ChatGLMForCausalLM, tokenizer_source: str | Path, folder: str | Path, weights: bool = True
) -> None:
    """Write a folder like a released one: original parameter names and fields, for the vendor's code and servers.

    tokenizer_source: the base model's folder or hub id. Its tokenizer.model and tokenizer_config.json are copied, and
        the vendor's code where it is there; otherwise `auto_map` names it in the vendor's repository.
    weights: as in `save_glm`.

    Raises: ModelError: as `to_glm`; or the source has no tokenizer.model.
    """
    _check_plain(model)
    files = {name: _find(tokenizer_source, name) for name in ("tokenizer.model", "tokenizer_config.json", *VENDOR_CODE)}
    if not files["tokenizer.model"]:
        raise ModelError(f"{tokenizer_source} has no tokenizer.model, which the original code needs")

    folder = Path(folder)
    model.save_pretrained(folder, state_dict=None if weights else {})
    for name, source in files.items():
        if source:
            shutil.copyfile(source, folder / name)
    code = "" if all(files[name] for name in VENDOR_CODE) else f"{VENDOR_REPOSITORY}--"
    if not files["tokenizer_config.json"]:
        tokenizer_map = {"AutoTokenizer": [f"{code}tokenization_chatglm.ChatGLMTokenizer", None]}
        _write_json(
            folder / "tokenizer_config.json", {"tokenizer_class": "ChatGLMTokenizer", "auto_map": tokenizer_map}
        )
    model_class = f"{code}modeling_chatglm.ChatGLMForConditionalGeneration"
    config = {
        "model_type": ChatGLMConfig.model_type,
        "architectures": ["ChatGLMModel"],
        "auto_map": {
            "AutoConfig": f"{code}configuration_chatglm.ChatGLMConfig",
            "AutoModel": model_class,
            "AutoModelForCausalLM": model_class,
            "AutoModelForSeq2SeqLM": model_class,
            "AutoModelForSequenceClassification": f"{code}modeling_chatglm.ChatGLMForSequenceClassification",
        },
        "torch_dtype": str(model.dtype).removeprefix("torch."),
    }
    config |= {field: getattr(model.config, field) for field in ChatGLMConfig.__annotations__ if field not in OURS}
    _write_json(folder / "config.json", config)


def _check_plain(model: Any) -> None:
    adapted = any(".base_layer." in name for name, _ in model.named_parameters())
    if adapted or not isinstance(model, ChatGLMForCausalLM):
        raise ModelError(f"{type(model).__name__} is not a plain ChatGLM3; merge its adapter before the export")
    if getattr(model, "is_quantized", False):
        raise ModelError("the model is quantised; load the base model unquantised and merge the adapter into that")


def _find(source: str | Path, name: str) -> str | None:
    """The path of a file of a local folder or a hub repository, if it is there."""
    return cached_file(
        str(Path(source).expanduser()),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
