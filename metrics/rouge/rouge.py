"""ROUGE-1, ROUGE-2 and ROUGE-L, 0 to 100, by rouge-score: the mean of the rows' F1.

rouge-score's tokenizer keeps only a-z and 0-9. For Chinese, Japanese and Thai every letter is a token instead, a run of
a-z and 0-9 stays one token, and punctuation is dropped as in English. Other scripts get a reason, not a number.
"""

import re
from importlib import metadata

import datasets
import evaluate
import numpy as np
from rouge_score import rouge_scorer, tokenizers

NAMES = ("rouge1", "rouge2", "rougeL")
TOKEN = re.compile(r"[a-z0-9]+|[\u0e00-\u0e7f]|[^\W_]")  # the Thai block by itself: its vowel signs are not \w


class Characters(tokenizers.Tokenizer):
    def tokenize(self, text):
        return TOKEN.findall(text.lower())


class Rouge(evaluate.Metric):
    higher_is_better = True

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="https://aclanthology.org/W04-1013",
            inputs_description="predictions, references: text; language: zh, ja, th or other.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references, language="other"):
        by_character = language in ("zh", "ja", "th")
        letters = [letter for text in references for letter in text.lower() if letter.isalnum()]
        if not letters:
            return {**dict.fromkeys(NAMES), "reason": "no reference has a letter or a digit"}
        if not by_character and 2 * sum(letter.isascii() for letter in letters) < len(letters):
            reason = "rouge-score reads only a-z and 0-9, and most letters of the references are others"
            return {**dict.fromkeys(NAMES), "reason": reason}
        scorer = rouge_scorer.RougeScorer(NAMES, tokenizer=Characters() if by_character else None)
        rows = [scorer.score(*pair) for pair in zip(references, predictions, strict=True)]
        statistics = np.array([[1.0, *(row[name].fmeasure for name in NAMES)] for row in rows])
        tokens = "characters" if by_character else "rouge-score"
        signature = f"nrefs:1|case:lower|tok:{tokens}|stem:no|mean:rows|version:{metadata.version('rouge-score')}"
        return {**self.score_of(statistics.sum(axis=0)), "signature": signature, "row_statistics": statistics}

    def score_of(self, totals):
        return {name: 100 * totals[..., 1 + index] / totals[..., 0] for index, name in enumerate(NAMES)}
