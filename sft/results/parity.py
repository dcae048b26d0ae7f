"""The proof that a server sees what was trained: final_model/ rendered in a fresh process with plain transformers.

Every prompt of the given conversations must have the ids that training used, and generation must stop at the tokens
that ended answers in training. One kind of prompt is set apart and counted: text that spells a control token (or, of
ChatGLM3, "<sop>") was trained as the text it is, while a server, which encodes one string, reads the token.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from sft.data.chat import ChatEncoder
from sft.data.conversation import Conversation, Message, Tools, assistant_turns, strings
from sft.errors import ModelError

SCRIPT = Path(__file__).with_name("plain_server.py")


class Parity(TypedDict, total=False):
    """What training_config.json holds of the proof.

    prompts: compared, all equal. spelled_control_tokens: prompts set apart. not_checked: why there is no proof.
    trained_stops, stops: {token: id} that ended answers in training, and that generation_config.json holds.
    """

    prompts: int
    spelled_control_tokens: int
    trained_stops: dict[str, int]
    stops: dict[str, int]
    not_checked: str


class Prompt(NamedTuple):
    """place: "file:line"; number: of the message that is due, counted from 1; ids: as training has them."""

    place: str
    number: int
    messages: list[Message]
    tools: Tools | None
    ids: list[int]


def prove_parity(final_model: Path, encoder: ChatEncoder, conversations: Sequence[tuple[str, Conversation]]) -> Parity:
    """Compares what a server makes of each prompt with what training made of it.

    Args: conversations: each with its "file:line".
    Raises: ModelError: a prompt or a stop token that differs, and where; or the folder does not load.
    """
    config = json.loads((final_model / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] == "chatglm":
        return {"not_checked": "the layout chatglm is read by the vendor's own code, not by plain transformers"}
    prompts = list(prompts_of(encoder, conversations))
    served, *rendered = _serve(final_model, prompts, encoder.day)
    spelled = 0
    for prompt, result in zip(prompts, rendered, strict=True):
        if result.get("ids") == prompt.ids:
            continue
        if _spells_control_token(encoder, prompt, served["added"]):
            spelled += 1
        else:
            raise ModelError(_difference(final_model, encoder, prompt, result))

    trained, stops = encoder.stop_tokens(), encoder.named(served["stops"])
    if missing := {token: id for token, id in trained.items() if token not in stops}:
        raise ModelError(
            f"{final_model}/generation_config.json: answers ended with {missing} in training, and generation stops at "
            f"{stops} only; add the missing to its eos_token_id"
        )
    return {
        "prompts": len(prompts) - spelled,
        "spelled_control_tokens": spelled,
        "trained_stops": trained,
        "stops": stops,
    }


def prompts_of(encoder: ChatEncoder, conversations: Sequence[tuple[str, Conversation]]) -> Iterator[Prompt]:
    """What a server is asked in these conversations: the messages before each answer."""
    for place, (messages, tools, _) in conversations:
        for k in assistant_turns(messages):
            if k:  # a server is not asked without a message
                history = list(map(_with_objects, messages[:k])) if encoder.native else encoder.served(messages[:k])
                yield Prompt(place, k + 1, history, tools, encoder.encode_prompt(messages[:k], tools))


def _with_objects(message: Message) -> Message:
    """With the arguments of tool calls as objects, as servers give them to ChatGLM3's template, which reads no text."""
    calls = []
    for call in message.get("tool_calls") or []:
        function = dict(call.get("function", call))
        if isinstance(function.get("arguments"), str):
            function["arguments"] = json.loads(function["arguments"] or "{}")
        calls.append({"type": "function", "function": {"arguments": {}, **function}})
    return {**message, "tool_calls": calls} if calls else message


def _serve(final_model: Path, prompts: Sequence[Prompt], day: str | None) -> list[dict[str, Any]]:
    """What plain_server.py answers. Raises: ModelError: it does not come to an end."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer = Path(scratch) / "prompts.jsonl", Path(scratch) / "answer.jsonl"
        lines = (json.dumps({"messages": prompt.messages, "tools": prompt.tools}) + "\n" for prompt in prompts)
        with open(asked, "w", encoding="utf-8") as stream:
            stream.writelines(lines)
        done = subprocess.run(
            [
                sys.executable,
                "-P",
                str(SCRIPT),
                str(final_model.absolute()),
                str(asked),
                str(answer),
                *([day] if day else []),
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"},
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise ModelError(f"{final_model} does not load in plain transformers: {said}")
        return [json.loads(line) for line in answer.read_text(encoding="utf-8").splitlines()]


def _spells_control_token(encoder: ChatEncoder, prompt: Prompt, added: Sequence[str]) -> bool:
    if not encoder.native:
        return bool(encoder.control.find(prompt.messages, prompt.tools))
    return any(token in text for text in strings((prompt.messages, prompt.tools)) for token in added)


def _difference(final_model: Path, encoder: ChatEncoder, prompt: Prompt, result: dict[str, Any]) -> str:
    """Where the prompts part, in words."""
    before = f"{prompt.place}: the prompt before message {prompt.number}"
    if "error" in result:
        return f"{before} is not rendered by {final_model}: {result['error']}"

    def token(ids: Sequence[int], at: int) -> str:
        return f"{encoder.tokenizer.decode([ids[at]])!r} ({ids[at]})" if at < len(ids) else "the end"

    ours, theirs = prompt.ids, result["ids"]
    shorter = min(len(ours), len(theirs))
    at = next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)
    return (
        f"{before} is another one for a server: token {at + 1} was {token(ours, at)} in training and is "
        f"{token(theirs, at)} with {final_model}; its tokenizer or template is not what was trained, so do not serve it"
    )
