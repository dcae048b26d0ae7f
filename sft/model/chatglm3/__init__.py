"""ChatGLM3 on today's transformers: importing this package registers it with the Auto classes.

A released checkpoint then loads as it is, with `trust_remote_code` off.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sft.model.chatglm3.configuration import ChatGLMConfig
from sft.model.chatglm3.export import glm_tensors, save_chatglm, save_glm, to_glm
from sft.model.chatglm3.modeling import ChatGLMForCausalLM, ChatGLMModel
from sft.model.chatglm3.tokenization import ChatGLMTokenizer

__all__ = [
    "ChatGLMConfig",
    "ChatGLMForCausalLM",
    "ChatGLMModel",
    "ChatGLMTokenizer",
    "glm_tensors",
    "save_chatglm",
    "save_glm",
    "to_glm",
]

AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForCausalLM)
AutoTokenizer.register(ChatGLMConfig, ChatGLMTokenizer)
