"""Perplexity of the references, every token weighing the same; comparable only between models of one tokenizer."""

import datasets
import evaluate
import numpy as np


class Perplexity(evaluate.Metric):
    higher_is_better = False

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="loss_sum: nats over the tokens of a row's reference; tokens: how many they are.",
            features=datasets.Features({"loss_sum": datasets.Value("float64"), "tokens": datasets.Value("int64")}),
        )

    def _compute(self, loss_sum, tokens):
        if not any(tokens):
            return {"perplexity": None, "reason": "no reference has a token"}
        statistics = np.column_stack([loss_sum, tokens])
        signature = "weight:token|over:references|version:1"
        return {**self.score_of(statistics.sum(axis=0)), "signature": signature, "row_statistics": statistics}

    def score_of(self, totals):
        return {"perplexity": np.exp(totals[..., 0] / totals[..., 1])}
