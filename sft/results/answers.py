"""Answers for the test split, before and after training, and their scores."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from sft.data.chat import ChatEncoder, Conversation
from sft.errors import DataError, UserError
from sft.files import json_line, write_json, write_json_lines
from sft.recipe import Recipe
from sft.results import scores as metrics
from sft.results.export import generation_config

OWN_COLUMNS = ("predictions", "finished")
LOGIT_ROWS = 4096  # tokens whose logits are held at once: with 152,000 tokens in the vocabulary 1.2 GB in bfloat16


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
    """Every assistant turn with what the model is given to answer it: the history as it stands in the data.

    The reference is the content of the message; where it calls tools, the text that the model is trained to write.
    """
    found = []
    for place, conversation in conversations:
        messages, tools = conversation
        numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for k, number in enumerate(numbers):
            reference = messages[number].get("content") or ""
            if messages[number].get("tool_calls"):
                encoded = encoder.encode(messages, tools)
                start, stop = encoded.turns[k]
                reference = without_thoughts(written_text(encoder, encoded.input_ids[start : stop - 1]))
            prompt = encoder.encode_prompt(messages[:number], tools)
            found.append(Turn(place, number, conversation, prompt, reference))
    return found


def written_text(encoder: ChatEncoder, ids: Iterable[int]) -> str:
    """The text of an answer's tokens, its stop token left out."""
    text = str(encoder.tokenizer.decode(list(ids), skip_special_tokens=True))
    if encoder.native:  # a ChatGLM3 answer begins with a line of metadata: empty, or the name of a tool
        metadata, _, rest = text.partition("\n")
        return text if metadata.strip() else rest.lstrip(" ")
    return text


def without_thoughts(text: str) -> str:
    """What stands after the reasoning, if there is any.

    >>> without_thoughts("<think>\\n\\n</think>\\n\\nAye."), without_thoughts("Aye.")
    ('Aye.', 'Aye.')
    """
    _, end, rest = text.rpartition("</think>")
    return rest.lstrip("\n") if end else text


class Answers:
    """Answers on disk, line by line as they come, so that a run that is cut off goes on where it was.

    A first line says what made them; a file of other making is begun anew.
    """

    def __init__(self, path: Path, making: dict[str, Any]):
        self.path, self.known = path, {}
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        kept = []
        for line in text.split("\n"):  # not splitlines: an answer may hold U+2028 and its like
            try:
                kept.append(json.loads(line))
            except ValueError:
                break  # the line that was being written when the run was cut off
        if kept and kept[0] == making:
            self.known = {(entry["model"], entry["key"]): entry for entry in kept[1:]}
        else:
            kept = [making]
        write_json_lines(path, kept)  # without the broken line, and so that no answer can be lost on the way
        try:
            self._file = open(path, "a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None

    def add(self, model: str, key: str, text: str, finished: bool) -> None:
        entry = {"model": model, "key": key, "text": text, "finished": finished}
        self.known[model, key] = entry
        self._file.write(json_line(entry))

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from None

    def close(self) -> None:
        self._file.close()


@contextmanager
def for_generation(model: Any, adapter: bool) -> Iterator[None]:
    """The model in eval mode, without its own generation defaults; adapter: False switches a LoRA off.

    Gradient checkpointing stays as it is: in eval mode no layer does it.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    training, defaults = model.training, inner.generation_config
    off = nullcontext() if adapter or not hasattr(model, "disable_adapter") else model.disable_adapter()
    inner.generation_config = GenerationConfig()  # generate() would fill what ours leaves open with these
    try:
        with off, torch.inference_mode():
            model.eval()
            yield
    finally:
        inner.generation_config = defaults
        model.train(training)


def stop_ids(model: PreTrainedModel, encoder: ChatEncoder) -> set[int]:
    """What ends an answer: the template's stop tokens, the model's own and its tokenizer's."""
    holders = (encoder.tokenizer, model.config.get_text_config(), model.generation_config)
    own = [getattr(holder, "eos_token_id", None) for holder in holders]
    lists = [[ids] if isinstance(ids, int) else ids or [] for ids in own]
    return encoder.stop_ids.union(*lists)


def answer(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    turns: Sequence[Turn],
    answers: Answers,
    name: str,
    config: GenerationConfig,
    batch_size: int,
) -> None:
    """Generates what `answers` does not hold yet: batches of like length, left-padded, the longest first."""
    waiting = sorted((t for t in turns if (name, t.key) not in answers.known), key=lambda t: -len(t.prompt))
    stops = set(config.eos_token_id)
    bar = tqdm(total=len(turns), initial=len(turns) - len(waiting), desc=f"Answers ({name})", disable=None, leave=False)
    while waiting:
        batch = waiting[:batch_size]
        try:
            made = generate(model, encoder, [turn.prompt for turn in batch], config)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size = (batch_size + 1) // 2
            torch.cuda.empty_cache()
            continue
        for turn, row in zip(batch, made, strict=True):
            end = next((i for i, token in enumerate(row) if token in stops), None)
            text = written_text(encoder, row[:end])
            text = text if "</think>" in turn.reference else without_thoughts(text)
            answers.add(name, turn.key, text, end is not None)
        answers.flush()
        del waiting[: len(batch)]
        bar.update(len(batch))
    bar.close()


def generate(
    model: Any, encoder: ChatEncoder, prompts: Sequence[list[int]], config: GenerationConfig
) -> list[list[int]]:
    """What the model writes after each prompt, in one batch; after a stop token come pad tokens."""
    width = max(map(len, prompts))
    fill = [width - len(prompt) for prompt in prompts]
    pad = encoder.tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * n + prompt for n, prompt in zip(fill, prompts, strict=True)], device=model.device)
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in fill], device=model.device)
    options = {"generation_config": config, "tokenizer": encoder.tokenizer}  # the tokenizer for stop_strings
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, width:].tolist()


def reference_losses(
    model: PreTrainedModel, encoder: ChatEncoder, turns: Sequence[Turn], batch_size: int
) -> dict[str, list[float]]:
    """What the model gives the reference answers: {"loss_sum" (nats), "correct", "tokens"}, each one value a turn."""
    places = {turn.place: turn.conversation for turn in turns}
    found: dict[str, tuple[float, int, int]] = {}
    rows = [(place, c, encoder.encode(c.messages, c.tools)) for place, c in places.items()]
    rows.sort(key=lambda row: -len(row[2].input_ids))
    bar = tqdm(total=len(rows), desc="References", disable=None, leave=False)
    while rows:
        size = max(1, min(batch_size, LOGIT_ROWS // len(rows[0][2].input_ids)))
        batch, rows = rows[:size], rows[size:]
        width = max(len(e.input_ids) for _, _, e in batch)
        pad = encoder.tokenizer.pad_token_id or 0
        ids = torch.tensor([[*e.input_ids, *[pad] * (width - len(e.input_ids))] for _, _, e in batch])
        mask = torch.tensor([[1] * len(e.input_ids) + [0] * (width - len(e.input_ids)) for _, _, e in batch])
        ids, mask = ids.to(model.device), mask.to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, (place, conversation, encoded) in enumerate(batch):
            numbers = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
            for number, (start, stop) in zip(numbers, encoded.turns, strict=True):
                predicted, wanted = logits[row, start - 1 : stop - 1].float(), ids[row, start:stop]
                loss = cross_entropy(predicted, wanted, reduction="sum").item()
                correct = int((predicted.argmax(-1) == wanted).sum())
                found[f"{place}#{number}"] = (loss, correct, stop - start)
        bar.update(len(batch))
    bar.close()
    columns = zip(*(found[turn.key] for turn in turns), strict=True)
    return dict(zip(("loss_sum", "correct", "tokens"), map(list, columns), strict=True))


def score(
    recipe: Recipe,
    encoder: ChatEncoder,
    conversations: Sequence[tuple[str, Conversation]],
    models: Iterable[tuple[str, PreTrainedModel, bool, str]],
) -> dict[str, Any]:
    """Writes predictions.jsonl and scores.json. models: (base or tuned, model, adapter on, what made its weights).

    Raises: DataError: nothing to score.
    """
    options = recipe.evaluation
    for _, conversation in conversations:
        encoder.encode(conversation.messages, conversation.tools)  # teaches the encoder its stop tokens
        break
    turns = list_turns(conversations[: options.max_samples], encoder)
    if not turns:
        raise DataError("the test split has no assistant turn to score")
    references = [turn.reference for turn in turns]
    wanted = {column for name in options.metrics for column in metrics.load_metric(name).features}
    columns: dict[str, dict[str, list]] = {}
    models = list(models)
    stops = sorted(set().union(*(stop_ids(model, encoder) for _, model, _, _ in models)))
    config = generation_config(recipe, encoder.tokenizer, stops)
    made_of = {key: recipe.to_dict()[key] for key in ("model_init", "quantization_config")}
    making = {"generation": options.generation, "stops": stops, **made_of}
    making["prompts"] = _digest([turn.prompt for turn in turns])
    making["models"] = {name: made_by for name, _, _, made_by in models}
    making = json.loads(json.dumps(making, default=str))
    with closing(Answers(recipe.output_dir / "predictions.partial.jsonl", making)) as answers:
        for name, model, adapter, _ in models:
            with for_generation(model, adapter):
                answer(model, encoder, turns, answers, name, config, options.batch_size)
                entries = [answers.known[name, turn.key] for turn in turns]
                columns[name] = {"predictions": [entry["text"] for entry in entries]}
                columns[name]["finished"] = [entry["finished"] for entry in entries]
                if wanted - {"references", *OWN_COLUMNS}:
                    columns[name] |= reference_losses(model, encoder, turns, options.batch_size)
    scores = metrics.score(
        references,
        columns.get("base"),
        columns.get("tuned"),
        options.metrics,
        language=options.language,
        conversations=[turn.place for turn in turns],
    )
    _write_predictions(recipe.output_dir / "predictions.jsonl", turns, columns)
    write_json(recipe.output_dir / "scores.json", scores)
    (recipe.output_dir / "predictions.partial.jsonl").unlink()
    return scores


def _write_predictions(path: Path, turns: Sequence[Turn], columns: dict[str, dict[str, list]]) -> None:
    def entries() -> Iterator[dict[str, Any]]:
        for i, turn in enumerate(turns):
            given = {name: columns[name]["predictions"][i] if name in columns else None for name in ("base", "tuned")}
            messages = turn.conversation.messages[: turn.number]
            entry = {"row": turn.place, "turn": turn.number, "messages": messages, "reference": turn.reference}
            yield entry | given

    write_json_lines(path, entries())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
