"""Answers for the test split, before and after training, and their scores."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from sft import metrics
from sft.chat import ChatEncoder, Conversation
from sft.errors import DataError, UserError
from sft.export import generation_config, write_json
from sft.recipe import Recipe

OWN_COLUMNS = ("predictions", "finished")


@dataclass
class Turn:
    """One assistant turn of the test split. place: "file:line" of its row; number: of the message, from 0."""

    place: str
    number: int
    conversation: Conversation
    prompt: list[int] = field(repr=False)

    @property
    def reference(self) -> str:
        return self.conversation.messages[self.number].get("content") or ""

    @property
    def key(self) -> str:
        return f"{self.place}#{self.number}"


def list_turns(conversations: Sequence[tuple[str, Conversation]], encoder: ChatEncoder) -> list[Turn]:
    """Every assistant turn with what the model is given to answer it: the history as it stands in the data."""
    found = []
    for place, conversation in conversations:
        for number, message in enumerate(conversation.messages):
            if message["role"] == "assistant":
                prompt = encoder.encode_prompt(conversation.messages[:number], conversation.tools)
                found.append(Turn(place, number, conversation, prompt))
    return found


class Answers:
    """Answers on disk, line by line as they come, so that a run that is cut off goes on where it was.

    A first line says what made them; a file of other making is begun anew.
    """

    def __init__(self, path: Path, making: dict[str, Any]):
        self.path, self.known = path, {}
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        kept = []
        for line in lines:
            try:
                kept.append(json.loads(line))
            except ValueError:
                break  # the line that was being written when the run was cut off
        if kept and kept[0] == making:
            self.known = {(entry["model"], entry["key"]): entry for entry in kept[1:]}
        else:
            kept = [making]
        try:
            # Without the broken line; moved into place so that no answer can be lost on the way.
            beside = path.with_name(f".{path.name}.partial")
            beside.write_text("".join(_line(entry) for entry in kept), encoding="utf-8")
            os.replace(beside, path)
            self._file = open(path, "a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None

    def add(self, model: str, key: str, text: str, finished: bool) -> None:
        entry = {"model": model, "key": key, "text": text, "finished": finished}
        self.known[model, key] = entry
        self._file.write(_line(entry))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


@contextmanager
def for_generation(model: PreTrainedModel, adapter: bool) -> Iterator[PreTrainedModel]:
    """The model in eval mode, without its own generation defaults; adapter: False switches a LoRA off."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    training, defaults, checkpointing = model.training, inner.generation_config, inner.is_activation_checkpointing
    off = nullcontext() if adapter or not hasattr(model, "disable_adapter") else model.disable_adapter()
    if checkpointing:
        inner.gradient_checkpointing_disable()
    inner.generation_config = GenerationConfig()  # generate() would fill what ours leaves open with these
    try:
        with off, torch.inference_mode():
            model.eval()
            yield model
    finally:
        inner.generation_config = defaults
        if checkpointing:
            inner.gradient_checkpointing_enable()
        model.train(training)


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
    tokenizer, stops = encoder.tokenizer, set(config.eos_token_id)
    bar = tqdm(total=len(turns), initial=len(turns) - len(waiting), desc=f"Answers ({name})", disable=None, leave=False)
    for begin in range(0, len(waiting), batch_size):
        batch = waiting[begin : begin + batch_size]
        width = max(len(turn.prompt) for turn in batch)
        fill = [width - len(turn.prompt) for turn in batch]
        pad = tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * n + turn.prompt for n, turn in zip(fill, batch, strict=True)], device=model.device)
        mask = torch.tensor([[0] * n + [1] * (width - n) for n in fill], device=model.device)
        made = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        for turn, row in zip(batch, made[:, width:].tolist(), strict=True):
            end = next((i for i, token in enumerate(row) if token in stops), None)
            text = tokenizer.decode(row[:end], skip_special_tokens=True)
            if encoder.native:  # a ChatGLM3 answer begins with a line of metadata, mostly empty
                text = text.partition("\n")[2].lstrip(" ")
            answers.add(name, turn.key, text, end is not None)
        answers.flush()
        bar.update(len(batch))
    bar.close()


def reference_losses(
    model: PreTrainedModel, encoder: ChatEncoder, turns: Sequence[Turn], batch_size: int
) -> dict[str, list[float]]:
    """What the model gives the reference answers: {"loss_sum" (nats), "correct", "tokens"}, each one value a turn."""
    places = {turn.place: turn.conversation for turn in turns}
    found: dict[str, tuple[float, int, int]] = {}
    rows = [(place, c, encoder.encode(c.messages, c.tools)) for place, c in places.items()]
    rows.sort(key=lambda row: len(row[2].input_ids))
    for begin in tqdm(range(0, len(rows), batch_size), desc="References", disable=None, leave=False):
        batch = rows[begin : begin + batch_size]
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
    config, columns = None, {}
    making: dict[str, Any] = {"recipe": {"evaluation": recipe.to_dict()["evaluation"]}, "turns": len(turns)}
    making["prompts"] = _digest([turn.prompt for turn in turns])
    models = list(models)
    making["models"] = {name: made_by for name, _, _, made_by in models}
    answers = Answers(recipe.output_dir / "predictions.partial.jsonl", making)
    for name, model, adapter, _ in models:
        with for_generation(model, adapter):
            own = model.config.get_text_config().eos_token_id
            stops = encoder.stop_ids | set([own] if isinstance(own, int) else own or [])
            config = generation_config(recipe, encoder.tokenizer, stops)
            answer(model, encoder, turns, answers, name, config, options.batch_size)
            entries = [answers.known[name, turn.key] for turn in turns]
            columns[name] = {"predictions": [e["text"] for e in entries], "finished": [e["finished"] for e in entries]}
            if wanted - {"references", *OWN_COLUMNS}:
                columns[name] |= reference_losses(model, encoder, turns, options.batch_size)
    answers.close()
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
    beside = path.with_name(f".{path.name}.partial")
    with open(beside, "w", encoding="utf-8") as stream:
        for i, turn in enumerate(turns):
            given = {name: columns[name]["predictions"][i] if name in columns else None for name in ("base", "tuned")}
            messages = turn.conversation.messages[: turn.number]
            entry = {"row": turn.place, "turn": turn.number, "messages": messages, "reference": turn.reference}
            stream.write(_line(entry | given))
    os.replace(beside, path)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
