"""Answers of a model to the test split: the prompts, the generation, and the answers on disk as they come."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sft.data.chat import ChatEncoder
from sft.data.conversation import Conversation, assistant_turns
from sft.files import json_line, write_json_lines, writing
from sft.model.lora import base_of
from sft.recipe import Recipe
from sft.terminal import bar

CausalLM = PreTrainedModel | PeftModel


# -------------------------------------------------------------------------------------------------------- the prompts


@dataclass
class Turn:
    """One assistant turn of the test split. place: "file:line" of its row; number: of the message, from 0."""

    place: str
    number: int
    conversation: Conversation
    prompt: list[int] = field(repr=False)
    reference: str

    @property
    def key(self) -> str:
        return f"{self.place}#{self.number}"


def list_turns(conversations: Sequence[tuple[str, Conversation]], encoder: ChatEncoder) -> list[Turn]:
    """Every assistant turn that carries loss, with what the model is given: the history as it stands in the data.

    The reference is the content of the message; where it calls tools, the text that the model is trained to write.
    """
    turns = []
    for place, conversation in conversations:
        messages, tools, untrained = conversation
        for number in assistant_turns(messages):
            if number in untrained:
                continue
            reference = messages[number].get("content") or ""
            if messages[number].get("tool_calls"):
                encoded = encoder.encode(messages[: number + 1], tools, last_only=True)
                ((start, stop),) = encoded.turns
                reference = without_thoughts(answer_text(encoder, encoded.input_ids[start : stop - 1]))
            prompt = encoder.encode_prompt(messages[:number], tools)
            turns.append(Turn(place, number, conversation, prompt, reference))
    return turns


def answer_text(encoder: ChatEncoder, ids: Iterable[int]) -> str:
    """The text of an answer's tokens, its stop token left out; of several channels (gpt-oss) the one of the content."""
    ids, opener = list(ids), encoder.content_opener
    ends = (end for end in range(len(ids), len(opener) - 1, -1) if opener and ids[end - len(opener) : end] == opener)
    text = str(encoder.tokenizer.decode(ids[next(ends, 0) :], skip_special_tokens=True))
    if encoder.native:  # a ChatGLM3 answer begins with a line of metadata: empty, or the name of a tool
        metadata, _, content = text.partition("\n")
        return text if metadata.strip() else content.lstrip(" ")
    return text


def without_thoughts(text: str) -> str:
    """What stands after the reasoning, if there is any.

    >>> without_thoughts("<think>\\n\\n</think>\\n\\nAye."), without_thoughts("Aye.")
    ('Aye.', 'Aye.')
    """
    _, end_of_thoughts, answer = text.rpartition("</think>")
    return answer.lstrip("\n") if end_of_thoughts else text


# ------------------------------------------------------------------------------------------------ the answers on disk


class Answer(TypedDict):
    """A line of the file. model: base or tuned; key: of the turn; finished: it ended by itself, with a stop token."""

    model: str
    key: str
    text: str
    finished: bool


class AnswersInMemory:
    """Answers by model and key, of a validation, which is done anew where it was cut off."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], Answer] = {}

    def add(self, model: str, key: str, text: str, finished: bool) -> None:
        self.entries[model, key] = Answer(model=model, key=key, text=text, finished=finished)

    def flush(self) -> None:
        """There is nothing to write."""


class Answers(AnswersInMemory):
    """Answers on disk, line by line as they come, so that a run that is cut off goes on where it was.

    The first line is their provenance; a file of another provenance is begun anew. beside: files of other processes,
    whose answers are taken up as well, since the next time there may be more processes, or fewer.
    """

    def __init__(self, path: Path, provenance: dict[str, Any], beside: Iterable[Path] = ()):
        super().__init__()
        self.path = path
        lines = _answer_lines(path, provenance)
        for entry in (entry for file in (*beside, path) for entry in _answer_lines(file, provenance)):
            self.entries[entry["model"], entry["key"]] = entry
        # Without the broken line, and so that no answer can be lost on the way.
        write_json_lines(path, [provenance, *lines])
        with writing(path):
            self._file = open(path, "a", encoding="utf-8", newline="\n")

    def add(self, model: str, key: str, text: str, finished: bool) -> None:
        super().add(model, key, text, finished)
        with writing(self.path):
            self._file.write(json_line(self.entries[model, key]))

    def flush(self) -> None:
        with writing(self.path):
            self._file.flush()

    def close(self) -> None:
        with writing(self.path):
            self._file.close()


def _answer_lines(path: Path, provenance: dict[str, Any]) -> list[Answer]:
    """The answers of a file of this provenance, up to the line that was being written when a run was cut off."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # never begun, or ended by the process that wrote it
        return []
    values: list[Any] = []
    for line in text.split("\n"):  # not splitlines: an answer may hold U+2028 and its like
        try:
            value = json.loads(line)
        except ValueError:
            break
        if values and value.keys() != Answer.__annotations__.keys():
            break
        values.append(value)
    return values[1:] if values[:1] == [provenance] else []


# ----------------------------------------------------------------------------------------------------- the generation


def generation_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int]) -> GenerationConfig:
    """How answers are generated for scoring: greedy unless the recipe says otherwise."""
    options = {"do_sample": False, "max_new_tokens": 256, "use_cache": True, **recipe.evaluation.generation}
    return GenerationConfig(**options, eos_token_id=sorted(stop_ids), pad_token_id=tokenizer.pad_token_id)


@contextmanager
def generation_mode(model: CausalLM, adapter_on: bool) -> Iterator[None]:
    """The model in eval mode, without its own generation defaults; adapter_on: False switches a LoRA off.

    Gradient checkpointing stays as it is: in eval mode no layer does it. Router logits, which trl asks a mixture of
    experts for, are left out: with a cache the balance of one token is taken by the mask of all, and that fails.
    """
    inner = cast(PreTrainedModel, base_of(model))
    adapter = model.disable_adapter() if isinstance(model, PeftModel) and not adapter_on else nullcontext()
    training, defaults = model.training, inner.generation_config
    text: Any = inner.config.get_text_config()
    router_logits = getattr(text, "output_router_logits", None)
    inner.generation_config = GenerationConfig()  # generate() would fill what ours leaves open with these
    if router_logits:
        text.output_router_logits = False
    try:
        with adapter, torch.no_grad():  # not inference_mode: a model that trains on may keep tensors made here
            model.eval()
            yield
    finally:
        inner.generation_config = defaults
        if router_logits:
            text.output_router_logits = router_logits
        model.train(training)


def stop_ids(model: CausalLM, encoder: ChatEncoder) -> set[int]:
    """What ends an answer: the template's stop tokens, the model's own and its tokenizer's."""
    holders = (encoder.tokenizer, model.config.get_text_config(), model.generation_config)
    eos_ids = [getattr(holder, "eos_token_id", None) for holder in holders]
    return encoder.stop_ids.union(*([ids] if isinstance(ids, int) else ids or [] for ids in eos_ids))


def generate_answers(
    model: CausalLM,
    encoder: ChatEncoder,
    turns: Sequence[Turn],
    answers: AnswersInMemory,
    name: str,
    config: GenerationConfig,
    batch_size: int,
    is_shown: bool = True,
) -> None:
    """Generates what `answers` does not hold yet: batches of like length, left-padded, the longest first.

    Args: is_shown: by a live line, which training has of its own.
    """
    waiting = sorted((t for t in turns if (name, t.key) not in answers.entries), key=lambda t: -len(t.prompt))
    stops = set(config.eos_token_id)
    shown = bar(f"answers of {name}", len(turns), len(turns) - len(waiting)) if is_shown else nullcontext(int)
    with shown as advance:
        while waiting:
            batch = waiting[:batch_size]
            try:
                rows = generate(model, encoder, [turn.prompt for turn in batch], config)
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
                batch_size = (batch_size + 1) // 2
                torch.cuda.empty_cache()
                continue
            for turn, row in zip(batch, rows, strict=True):
                end = next((i for i, token in enumerate(row) if token in stops), None)
                text = answer_text(encoder, row[:end])
                text = text if "</think>" in turn.reference else without_thoughts(text)
                answers.add(name, turn.key, text, finished=end is not None)
            answers.flush()
            del waiting[: len(batch)]
            advance(len(batch))


def generate(
    model: CausalLM, encoder: ChatEncoder, prompts: Sequence[list[int]], config: GenerationConfig
) -> list[list[int]]:
    """What the model writes after each prompt, in one batch; after a stop token come pad tokens."""
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    pad = encoder.tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * n + prompt for n, prompt in zip(padding, prompts, strict=True)], device=model.device)
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding], device=model.device)
    generate_ids = cast(Callable[..., torch.Tensor], model.generate)  # which PreTrainedModel itself does not declare
    options = {"generation_config": config, "tokenizer": encoder.tokenizer}  # the tokenizer for stop_strings
    return generate_ids(input_ids=ids, attention_mask=mask, **options)[:, width:].tolist()
