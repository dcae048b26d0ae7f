"""Token accuracy, 0 to 100: the share of reference tokens that the model ranks first, given all tokens before them."""

import datasets
import evaluate
import numpy as np


class TokenAccuracy(evaluate.Metric):
    higher_is_better = True

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="correct: tokens of a row's reference ranked first; tokens: how many it has.",
            features=datasets.Features({"correct": datasets.Value("int64"), "tokens": datasets.Value("int64")}),
        )

    def _compute(self, correct, tokens):
        if not any(tokens):
            return {"token_accuracy": None, "reason": "no reference has a token"}
        statistics = np.column_stack([correct, tokens])
        signature = "weight:token|over:references|version:1"
        return {**self.score_of(statistics.sum(axis=0)), "signature": signature, "row_statistics": statistics}

    def score_of(self, totals):
        return {"token_accuracy": 100 * totals[..., 0] / totals[..., 1]}
