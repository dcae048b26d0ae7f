"""Exact match, 0 to 100: the share of answers that equal their reference, spaces at both ends aside."""

import datasets
import evaluate
import numpy as np


class ExactMatch(evaluate.Metric):
    higher_is_better = True

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: text.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references):
        if not references:
            return {"exact_match": None, "reason": "there is no row to score"}
        pairs = zip(predictions, references, strict=True)
        statistics = np.array([[answer.strip() == reference.strip(), 1] for answer, reference in pairs], dtype=float)
        signature = "nrefs:1|case:mixed|space:stripped|version:1"
        return {**self.score_of(statistics.sum(axis=0)), "signature": signature, "row_statistics": statistics}

    def score_of(self, totals):
        return {"exact_match": 100 * totals[..., 0] / totals[..., 1]}
