"""What is trained: the cases of benchmarks/train.py, their rows and models."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.flops import Weights, linear_layers

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "data" / "demo"

Row = dict[str, list[dict[str, str]]]  # {"messages": [{"role", "content"}, ...]}


@dataclass(frozen=True)
class Case:
    """One comparison. A step is `rows_a_step` rows, packed ones if packed, in one batch or, accumulated, one by one."""

    name: str
    what: str
    rows_a_step: int
    steps: int
    tokens: int = 512  # of a row at most, and of a packed row
    single_turn: bool = False
    tiny: bool = False
    lora: bool = True
    four_bits: bool = False
    packed: bool = False
    accumulated: bool = False


CASES = {
    case.name: case
    for case in (
        Case("chats", "16 two-speaker chats of up to 512 tokens, LoRA", 4, 4),
        Case("accumulated", "the chats, one at a time, gradients accumulated", 4, 4, accumulated=True),
        Case("tiny", "the chats on a random model of 2 layers, width 64", 4, 41, tiny=True),
        Case("full", "the chats, all weights trained", 4, 4, lora=False),
        Case("single", "single-turn rows, LoRA", 16, 5, single_turn=True),
        Case("4bit", "the chats on a base of 4 bits (nf4), LoRA", 4, 4, four_bits=True),
        Case("long", "chats packed into rows of 2,048 tokens, LoRA", 1, 4, tokens=2048, packed=True),
    )
}


def rows_of(case: Case, tokenizer: Any) -> list[Row]:
    """Rows of the demo data: its single turns, or turns joined to chats whose lengths spread from 180 to 512 tokens."""
    turns = _turns()
    if case.single_turn:
        return [{"messages": turns[i % len(turns)]} for i in range(case.rows_a_step * case.steps)]
    # Seven chats fill a packed row of four times their length, with some to choose from.
    count = 7 * case.rows_a_step * case.steps if case.packed else 16
    chats = []
    for number in range(count):
        longest = 512 - 83 * (number % 5)
        chats.append({"messages": _chat(turns, number, longest, tokenizer)})
    return chats


def _chat(turns: list[list[dict[str, str]]], number: int, longest: int, tokenizer: Any) -> list[dict[str, str]]:
    """As many turns, from a place of its own on, as `longest` tokens take; at least one."""
    messages = turns[17 * number % len(turns)]
    for at in range(17 * number + 1, 17 * number + len(turns)):
        longer = [*messages, *turns[at % len(turns)][1:]]
        if tokens_of(longer, tokenizer) > longest:
            break
        messages = longer
    return messages


def _turns() -> list[list[dict[str, str]]]:
    """The demo's training rows as [system, user, assistant]."""
    rows = map(json.loads, (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        [
            {"role": "system", "content": row["system"]},
            {"role": "user", "content": turn["human"]},
            {"role": "assistant", "content": turn["assistant"]},
        ]
        for row in rows
        for turn in row["conversation"]
    ]


def tokens_of(messages: list[dict[str, str]], tokenizer: Any) -> int:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def speaks_chatml(tokenizer: Any) -> bool:
    """Whether it renders as LLaMA-Factory's smollm2, ms-swift's chatml and our template for trl do."""
    messages = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    expected = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return tokenizer.chat_template is not None and (tokenizer.apply_chat_template(messages, tokenize=False) == expected)


def answers_of(rows: list[Row]) -> int:
    return sum(message["role"] == "assistant" for row in rows for message in row["messages"])


def write_rows(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_tiny(model: Path, folder: Path) -> Path:
    """A random Llama with the tokenizer of `model`, made when it is first asked for."""
    if (folder / "model.safetensors").is_file():
        return folder
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def weights_of(model: Path) -> Weights:
    """With LoRA of rank 16 beside all linear layers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    linear = linear_layers(meta)
    return Weights(
        sum(part.weight.numel() for part in linear),
        sum(16 * (part.in_features + part.out_features) for part in linear),
        meta.get_output_embeddings().weight.numel(),
    )
