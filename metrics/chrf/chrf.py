"""chrF, 0 to 100, by sacrebleu: F2 over character 1- to 6-grams without spaces, so one rule for every language."""

import datasets
import evaluate
import numpy as np
from sacrebleu.metrics import CHRF


class Chrf(evaluate.Metric):
    higher_is_better = True

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="https://aclanthology.org/W15-3049",
            inputs_description="predictions, references: text.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    # sacrebleu (2.6.0) has no public way to a row's n-gram counts; the test against its command line guards these two.
    def _compute(self, predictions, references):
        if not any(text.strip() for text in references):
            return {"chrf": None, "reason": "no reference has any text"}
        chrf = CHRF()
        statistics = np.array(chrf._extract_corpus_statistics(predictions, [references]))
        score = self.score_of(statistics.sum(axis=0))
        return {**score, "signature": str(chrf.get_signature()), "row_statistics": statistics}

    def score_of(self, totals):
        return {"chrf": np.apply_along_axis(CHRF()._compute_f_score, -1, totals)}
