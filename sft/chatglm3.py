"""ChatGLM3 by the name that other programs import it by; it lives in sft/model/chatglm3."""

from sft.model.chatglm3 import *  # noqa: F403 - its __all__
