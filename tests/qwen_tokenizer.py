"""The real Qwen2.5 tokenizer, built from the vocabulary that the package dashscope carries; no download.

`resources/qwen.tiktoken` holds each token's bytes and its rank; the merges of a byte-level BPE tokenizer follow from
them. The package is fetched with `pip install --no-deps dashscope==2.0.2` and is never imported.
"""

import base64
import importlib.metadata
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

# Source of pattern, normaliser and added tokens: tokenizer.json of Qwen/Qwen2.5-7B-Instruct.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
NOT_SPECIAL = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
).split()


def vocabulary_path() -> Path:
    """Where the installed package keeps the ranks; skips the test where it is not installed."""
    try:
        path = Path(str(importlib.metadata.distribution("dashscope").locate_file("dashscope/resources/qwen.tiktoken")))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the Qwen2.5 vocabulary is not installed: pip install --no-deps dashscope==2.0.2")
    if not path.is_file():
        pytest.skip(f"the installed dashscope has no {path.name}; version 2.0.2 has it")
    return path


def byte_letters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """For each token the two that merge into it: what byte-pair encoding leaves of it just before that merge."""
    merges = []
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
            lowest = min(pairs)
            i = pairs.index(lowest)
            assert lowest < rank, f"token {rank} cannot be built from two others"
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append((parts[0], parts[1]))
    return merges


def tokenizer_json(ranks: dict[bytes, int]) -> str:
    letters = byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": len(ranks) + i, "content": token, **plain, "special": token in SPECIAL}
                for i, token in enumerate(SPECIAL + NOT_SPECIAL)
            ],
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": byte_level,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": {spelled(token): rank for token, rank in ranks.items()},
                "merges": [[spelled(a), spelled(b)] for a, b in recover_merges(ranks)],
            },
        }
    )


def build_tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
    """Qwen2.5's tokenizer with this chat template; takes about three seconds."""
    lines = vocabulary_path().read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json(ranks)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in SPECIAL if token not in ("<|im_end|>", "<|endoftext|>")],
        chat_template=chat_template,
    )
