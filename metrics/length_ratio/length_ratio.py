"""Length ratio: tokens of all answers / tokens of all references, the tokens being BLEU's; 1 is just as long."""

import datasets
import evaluate
import numpy as np
from sacrebleu.metrics import BLEU

TOKENIZE = {"zh": "zh", "ja": "char", "th": "char"}


class LengthRatio(evaluate.Metric):
    higher_is_better = None  # longer is neither better nor worse

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: text; language: zh, ja, th or other.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references, language="other"):
        tokenize = TOKENIZE.get(language, "13a")
        tokenizer = BLEU(tokenize=tokenize).tokenizer
        pairs = zip(predictions, references, strict=True)
        statistics = np.array([[len(tokenizer(text).split()) for text in pair] for pair in pairs]).reshape(-1, 2)
        if not statistics[:, 1].any():
            return {"length_ratio": None, "reason": "no reference has any text"}
        signature = f"nrefs:1|tok:{tokenize}|version:1"
        return {**self.score_of(statistics.sum(axis=0)), "signature": signature, "row_statistics": statistics}

    def score_of(self, totals):
        return {"length_ratio": totals[..., 0] / totals[..., 1]}
