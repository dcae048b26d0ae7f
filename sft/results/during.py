"""Answers to rows of the validation split while a model trains, and their scores."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sft import processes
from sft.data.chat import ChatEncoder
from sft.data.conversation import Conversation
from sft.errors import UserError
from sft.recipe import Recipe
from sft.results.answers import (
    AnswersInMemory,
    generate_answers,
    generation_config,
    generation_mode,
    list_turns,
    stop_ids,
)
from sft.results.evaluation import columns_of, gathered, own_share
from sft.results.scores import Columns, language_of, load_metric, measure

# An answer of one word, by which a metric tells the names of its scores.
ANSWER: Columns = {"predictions": ["a"], "finished": [True], "loss_sum": [1.0], "correct": [1], "tokens": [1]}


def score_directions(metrics: Sequence[str]) -> dict[str, bool | None]:
    """The names of all scores of some metrics, each with whether more of it is better (None: neither is)."""
    directions: dict[str, bool | None] = {}
    for name in metrics:
        module = load_metric(name)
        scores = measure(name, module, {**ANSWER, "references": ["a"]}, "other", [np.ones(1)]).scores
        directions |= dict.fromkeys(scores, module.higher_is_better)
    return directions


def more_is_better(recipe: Recipe) -> bool | None:
    """Whether more is better of what the best checkpoint is chosen by; None: it is not chosen by a score.

    Raises: RecipeError: there is no such score, or neither more nor less of it is better.
    """
    args, key = recipe.training_args, "training_args.metric_for_best_model"
    best = str(args.get("metric_for_best_model", "loss")).removeprefix("eval_")
    if recipe.evaluation.every is None or best == "loss":
        return None
    directions = score_directions(recipe.evaluation.metrics)
    if best not in directions:
        names = ", ".join(["loss", *directions][:8])
        raise recipe.error(key, f"there is no score {best}; by evaluation.metrics there are {names}")
    better = args.get("greater_is_better", directions[best])
    if better is None:
        raise recipe.error(key, f"neither more nor less of {best} is better; choose another score")
    return better


class ScoresDuring:
    """Called with the model that trains, gives the scores of its answers; every process must call it.

    Answers are shared out as after training, and each process generates as many batches as the others.
    """

    def __init__(self, recipe: Recipe, encoder: ChatEncoder, conversations: Sequence[tuple[str, Conversation]]):
        """conversations: of the validation split. Raises: RecipeError: they have no assistant turn."""
        self.more_is_better = more_is_better(recipe)
        self._recipe, self._encoder = recipe, encoder
        for _, conversation in conversations[:1]:
            encoder.encode(conversation.messages, conversation.tools)  # teaches the encoder its stop tokens
        self._turns = list_turns(conversations, encoder)
        if not self._turns:
            raise recipe.error("dataset.validation", "has no assistant turn to score; set evaluation.every: null")

    def __call__(self, model: Any, after_batch: Callable[[], object]) -> dict[str, float]:
        """Args: after_batch: called after each batch of answers, in all processes as often.

        Raises: UserError: the score that the best checkpoint is chosen by cannot be computed.
        """
        options, encoder = self._recipe.evaluation, self._encoder
        config = generation_config(self._recipe, encoder.tokenizer, stop_ids(model, encoder))
        own = sorted(own_share(self._turns), key=lambda turn: -len(turn.prompt))
        answers = AnswersInMemory()
        with generation_mode(model, adapter_on=True):
            for begin in range(0, processes.highest(len(own)), options.batch_size):
                batch = own[begin : begin + options.batch_size]
                generate_answers(model, encoder, batch, answers, "tuned", config, options.batch_size, is_shown=False)
                after_batch()
            columns = columns_of(self._recipe, model, encoder, own, answers, "tuned")
        whole = gathered(own, {"tuned": columns}, self._turns)["tuned"]
        return processes.decide(lambda: self._scores(whole))

    def _scores(self, columns: Columns) -> dict[str, float]:
        references = [turn.reference for turn in self._turns]
        columns = {**columns, "references": references}
        language = self._recipe.evaluation.language or language_of(references)
        scores: dict[str, float] = {}
        best = str(self._recipe.training_args.get("metric_for_best_model")).removeprefix("eval_")
        for name in self._recipe.evaluation.metrics:
            measured = measure(name, load_metric(name), columns, language, [np.ones(len(references))])
            if measured.scores.get(best, 0) is None:
                raise UserError(f"the best checkpoint cannot be chosen by {best}: {measured.reason}; choose another")
            scores |= {key: score for key, score in measured.scores.items() if score is not None}
        return scores
