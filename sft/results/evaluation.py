"""Evaluates models on the test split: their answers and their losses on the references, and the scores of these."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from sft import processes
from sft.data.chat import ChatEncoder
from sft.data.conversation import Conversation, assistant_turns
from sft.data.examples import ExampleMaker
from sft.data.general import encodable
from sft.errors import DataError
from sft.files import write_json, write_json_lines
from sft.model.load import load_model, load_trained
from sft.model.lora import load_adapter
from sft.model.machine import local_device
from sft.recipe import ChatOptions, Recipe
from sft.results.answers import (
    Answers,
    AnswersInMemory,
    CausalLM,
    Turn,
    generate_answers,
    generation_config,
    generation_mode,
    list_turns,
    stop_ids,
)
from sft.results.export import weights_digest
from sft.results.forgetting import general_loss
from sft.results.run_folder import Prediction, read_file
from sft.results.scores import Columns, GeneralLoss, ModelName, Scores, load_metric, score_answers
from sft.terminal import bar

ANSWER_COLUMNS = ("predictions", "finished")
DEFAULT_CHAT = ChatOptions()
GENERAL_BATCH = 8  # bundled rows at once: their logits take 0.4 GB with 152,000 tokens in the vocabulary, in bfloat16
LOGIT_ROWS = 4096  # tokens whose logits are held at once: with 152,000 tokens in the vocabulary 1.2 GB in bfloat16


@dataclass
class EvaluatedModel:
    """adapter_on: False evaluates a LoRA's base; provenance: of the weights, a model's name or a digest."""

    name: ModelName
    model: CausalLM
    adapter_on: bool
    provenance: str


def evaluate_models(
    recipe: Recipe,
    encoder: ChatEncoder,
    conversations: Sequence[tuple[str, Conversation]],
    models: Sequence[EvaluatedModel],
    general: Sequence[tuple[str, Conversation]] = (),
) -> Scores:
    """Writes predictions.jsonl and scores.json.

    Each process answers a share of the conversations, and the first puts them together.

    Args:
        conversations: of the test split, each with its "file:line"; none: only the loss on `general` is measured.
        general: rows whose loss tells what was forgotten.

    Raises: DataError: nothing to score.
    """
    options = recipe.evaluation
    for _, conversation in conversations[:1]:
        encoder.encode(conversation.messages, conversation.tools)  # teaches the encoder its stop tokens
    turns = list_turns(conversations[: options.max_samples], encoder)
    if conversations and not turns:
        raise DataError("the test split has no assistant turn to score")
    stops = sorted(set().union(*(stop_ids(each.model, encoder) for each in models)))
    config = generation_config(recipe, encoder.tokenizer, stops)
    own = own_share(turns)
    own_columns: dict[ModelName, Columns] = {}
    number = f".{processes.rank()}" if processes.rank() else ""
    working_file = recipe.output_dir / f"predictions.partial{number}.jsonl"
    others = [path for path in recipe.output_dir.glob("predictions.partial*.jsonl") if path != working_file]
    with closing(Answers(working_file, _provenance(recipe, stops, turns, models), others)) as answers:
        for each in models:
            with generation_mode(each.model, each.adapter_on):
                generate_answers(each.model, encoder, own, answers, each.name, config, options.batch_size)
                own_columns[each.name] = columns_of(recipe, each.model, encoder, own, answers, each.name)
    columns = gathered(own, own_columns, turns)
    forgotten = _general_loss(recipe, encoder, general, models)
    scores = processes.decide(lambda: _write_scores(recipe, turns, columns, forgotten))
    for path in (working_file, *others):
        path.unlink(missing_ok=True)
    return scores


def columns_of(
    recipe: Recipe,
    model: CausalLM,
    encoder: ChatEncoder,
    own: Sequence[Turn],
    answers: AnswersInMemory,
    name: ModelName,
) -> Columns:
    """What the metrics are given of a model, with one value for each of `own`: its answers, and, if a metric asks for
    more, what it gives the references."""
    options = recipe.evaluation
    asked = {column for metric in options.metrics for column in load_metric(metric).features}
    entries = [answers.entries[name, turn.key] for turn in own]
    columns: Columns = {
        "predictions": [entry["text"] for entry in entries],
        "finished": [entry["finished"] for entry in entries],
    }
    if own and asked - {"references", *ANSWER_COLUMNS}:
        columns = {**columns, **reference_losses(model, encoder, own, options.batch_size, recipe.chat)}
    return columns


def own_share(turns: Sequence[Turn]) -> list[Turn]:
    """The turns that this process answers: whole conversations, shared out by their longest prompts."""
    longest: dict[str, int] = {}  # prompt of each conversation: what its answers cost
    for turn in turns:
        longest[turn.place] = max(longest.get(turn.place, 0), len(turn.prompt))
    places = set(processes.share(sorted(longest, key=lambda place: -longest[place])))
    return [turn for turn in turns if turn.place in places]


def gathered(
    own: Sequence[Turn], own_columns: dict[ModelName, Columns], turns: Sequence[Turn]
) -> dict[ModelName, Columns]:
    """The columns of all processes, in the order of `turns`. own_columns: with one value for each of `own`."""
    values: dict[tuple[ModelName, str], dict[str, Any]] = {}  # by model and column: turn -> value
    for keys, columns in processes.gather(([turn.key for turn in own], own_columns)):
        for name, part in columns.items():
            for column, entries in part.items():
                values.setdefault((name, column), {}).update(zip(keys, entries, strict=True))
    gathered: dict[ModelName, Columns] = {}
    for (name, column), by_key in values.items():
        gathered[name] = {**gathered.get(name, {}), column: [by_key[turn.key] for turn in turns]}
    return gathered


def _general_loss(
    recipe: Recipe,
    encoder: ChatEncoder,
    general: Sequence[tuple[str, Conversation]],
    models: Sequence[EvaluatedModel],
) -> GeneralLoss | None:
    """The loss on general rows; each process takes a share. None: there are no rows."""
    general = general[: recipe.evaluation.max_samples]
    turns = list_turns(encodable(general, encoder), encoder)
    own = own_share(turns)
    own_columns: dict[ModelName, Columns] = {}
    batch_size = min(recipe.evaluation.batch_size, GENERAL_BATCH)
    for each in models if own else ():
        with generation_mode(each.model, each.adapter_on):
            own_columns[each.name] = reference_losses(each.model, encoder, own, batch_size, recipe.chat)
    places, columns = [turn.place for turn in turns], gathered(own, own_columns, turns)
    return general_loss(places, columns, left_out=len(general) - len(set(places))) if general else None


def _write_scores(
    recipe: Recipe, turns: Sequence[Turn], columns: Mapping[ModelName, Columns], forgotten: GeneralLoss | None
) -> Scores:
    scores: Scores = {"rows": 0}
    if turns:
        scores = score_answers(
            [turn.reference for turn in turns],
            columns.get("base"),
            columns.get("tuned"),
            recipe.evaluation.metrics,
            language=recipe.evaluation.language,
            conversations=[turn.place for turn in turns],
        )
        write_json_lines(recipe.output_dir / "predictions.jsonl", _predictions(turns, columns))
    if forgotten is not None:
        scores["general"] = forgotten
    if "tuned" in columns:
        scores["model"] = "final" if recipe.trains_all_weights else recipe.evaluation.model
    write_json(recipe.output_dir / "scores.json", scores)
    return scores


def models_on_disk(recipe: Recipe) -> list[EvaluatedModel]:
    """Base and tuned: of the run in output_dir, or what an override names; the base alone where there is no run.

    Raises: RecipeError: evaluation.model is final, and there is none, or an override names an adapter.
    """
    adapter, final = recipe.output_dir / "lora_adapter", recipe.output_dir / "final_model"
    chosen = recipe.adapter_name_or_path
    is_own = chosen in (None, _begun_from(recipe))
    as_shipped = recipe.evaluation.model == "final"
    if as_shipped and not (is_own and final.is_dir()):
        found = f"there is no {final}" if is_own else f"{final} is not of the adapter {chosen}"
        raise recipe.error("evaluation.model", f"{found}; set evaluation.model: adapter")
    device = local_device(recipe)
    base: Any = load_model(recipe, quantised=not as_shipped, training=False)
    if as_shipped or not recipe.quantization_config:
        base.to(device)
    if adapter.is_dir() and is_own:
        chosen = str(adapter)  # the run's own, also where it went on from another
    if chosen and not as_shipped:
        model = load_adapter(base, chosen, recipe, key="adapter_name_or_path")
        return _pair(recipe, model, model, Path(chosen))
    if as_shipped or (final.is_dir() and recipe.trains_all_weights):
        tuned: Any = load_trained(recipe, final)
        return _pair(recipe, base, tuned.to(device), final)
    return [EvaluatedModel("base", base, True, recipe.model_name_or_path)]


def _pair(recipe: Recipe, base: CausalLM, tuned: CausalLM, folder: Path) -> list[EvaluatedModel]:
    """Base and tuned, whose weights `folder` holds; where they are one model, its adapter makes the difference."""
    digest = processes.decide(lambda: weights_digest(recipe, folder))
    return [
        EvaluatedModel("base", base, base is not tuned, recipe.model_name_or_path),
        EvaluatedModel("tuned", tuned, True, digest),
    ]


def _begun_from(recipe: Recipe) -> str | None:
    """The adapter that the run in output_dir went on from."""
    config = read_file(recipe.output_dir / "training_config.json")
    return config["recipe"]["adapter_name_or_path"] if config else None


def _provenance(
    recipe: Recipe, stops: list[int], turns: Sequence[Turn], models: Sequence[EvaluatedModel]
) -> dict[str, Any]:
    """All that decides what the answers are, as JSON has it: where one of these differs, answers are not taken up."""
    settings = recipe.to_dict()
    prompts = json.dumps([turn.prompt for turn in turns])
    provenance = {
        "generation": recipe.evaluation.generation,
        "stops": stops,
        "model_init": settings["model_init"],
        "quantization_config": settings["quantization_config"],
        "prompts": hashlib.sha256(prompts.encode()).hexdigest()[:16],
        "models": {each.name: each.provenance for each in models},
    }
    return json.loads(json.dumps(provenance, default=str))


def _predictions(turns: Sequence[Turn], columns: Mapping[ModelName, Columns]) -> Iterator[Prediction]:
    """The lines of predictions.jsonl."""
    absent = {"predictions": [None] * len(turns)}
    base, tuned = columns.get("base", absent)["predictions"], columns.get("tuned", absent)["predictions"]
    for turn, base_text, tuned_text in zip(turns, base, tuned, strict=True):
        yield Prediction(
            row=turn.place,
            turn=turn.number,
            messages=turn.conversation.messages[: turn.number],
            reference=turn.reference,
            base=base_text,
            tuned=tuned_text,
        )


class ReferenceLoss(NamedTuple):
    """Of one reference. loss_sum: nats; correct: tokens that the model ranks first; tokens: how many there are."""

    loss_sum: float
    correct: int
    tokens: int


def reference_losses(
    model: CausalLM, encoder: ChatEncoder, turns: Sequence[Turn], batch_size: int, chat: ChatOptions = DEFAULT_CHAT
) -> dict[str, list[float]]:
    """What the model gives the reference answers: each field of ReferenceLoss, with one value a turn.

    In the examples that chat.examples makes of rows, as in training.
    """
    losses: dict[str, ReferenceLoss] = {}
    rows = list(_reference_rows(encoder, {turn.place: turn.conversation for turn in turns}, chat))
    rows.sort(key=lambda row: -len(row[0]))
    pad = encoder.tokenizer.pad_token_id or 0
    with bar("losses of references", len(rows)) as advance:
        while rows:
            size = max(1, min(batch_size, LOGIT_ROWS // len(rows[0][0])))
            batch, rows = rows[:size], rows[size:]
            width = max(len(input_ids) for input_ids, _ in batch)
            padding = [width - len(input_ids) for input_ids, _ in batch]
            padded = [[*input_ids, *[pad] * n] for (input_ids, _), n in zip(batch, padding, strict=True)]
            ids = torch.tensor(padded).to(model.device)
            mask = torch.tensor([[1] * (width - n) + [0] * n for n in padding]).to(model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for row, (_, answers) in enumerate(batch):
                for key, (start, stop) in answers.items():
                    # The logits at a position are for the token after it.
                    predicted, labels = logits[row, start - 1 : stop - 1].float(), ids[row, start:stop]
                    loss = cross_entropy(predicted, labels, reduction="sum").item()
                    correct = int((predicted.argmax(-1) == labels).sum())
                    losses[key] = ReferenceLoss(loss, correct, tokens=stop - start)
            advance(len(batch))
    columns = zip(*(losses[turn.key] for turn in turns), strict=True)
    return dict(zip(ReferenceLoss._fields, map(list, columns), strict=True))


def _reference_rows(
    encoder: ChatEncoder, conversations: Mapping[str, Conversation], chat: ChatOptions
) -> Iterator[tuple[list[int], dict[str, tuple[int, int]]]]:
    """The ids of each example, and where in them the answers stand that it is for, by Turn.key."""
    maker = ExampleMaker(encoder, replace(chat, loss_on="all_turns"))  # every answer is scored
    for place, conversation in conversations.items():
        examples = maker.make(conversation)
        for messages, tools, _ in examples.conversations:
            encoded = encoder.encode(messages, tools, last_only=bool(examples.answers))
            numbers = assistant_turns(messages)[-len(encoded.turns) :]
            keys = [f"{place}#{number}" for number in numbers]
            yield list(encoded.input_ids), dict(zip(keys, encoded.turns, strict=True))
