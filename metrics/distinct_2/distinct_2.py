"""Distinct-2, 0 to 100: different pairs of neighbouring tokens / all such pairs, in all answers; tokens are BLEU's.

Resampled rows repeat, which would lower this score for no fault of the model. So the occurrences of a pair share its
credit, counted once in the whole file: that makes the score a sum over rows, and the interval surrounds it.
"""

from collections import Counter
from itertools import pairwise

import datasets
import evaluate
import numpy as np
from sacrebleu.metrics import BLEU

TOKENIZE = {"zh": "zh", "ja": "char", "th": "char"}


class Distinct2(evaluate.Metric):
    higher_is_better = True

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="https://aclanthology.org/N16-1014",
            inputs_description="predictions: text; language: zh, ja, th or other.",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, language="other"):
        tokenize = TOKENIZE.get(language, "13a")
        tokenizer = BLEU(tokenize=tokenize).tokenizer
        rows = [list(pairwise(tokenizer(text).split())) for text in predictions]
        occurrences = Counter(pair for row in rows for pair in row)
        if not occurrences:
            return {"distinct_2": None, "reason": "no answer has two tokens"}
        statistics = np.array([[sum(1 / occurrences[pair] for pair in row), len(row)] for row in rows])
        signature = f"n:2|tok:{tokenize}|over:file|version:1"
        return {**self.score_of(statistics.sum(axis=0)), "signature": signature, "row_statistics": statistics}

    def score_of(self, totals):
        return {"distinct_2": 100 * totals[..., 0] / totals[..., 1]}
