"""BLEU, 0 to 100, by sacrebleu: its `zh` tokens for Chinese, characters for Japanese and Thai, else `13a`."""

import datasets
import evaluate
import numpy as np
from sacrebleu.metrics import BLEU

TOKENIZE = {"zh": "zh", "ja": "char", "th": "char"}  # sacrebleu's own choice for Japanese asks for MeCab


class Bleu(evaluate.Metric):
    higher_is_better = True

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="https://aclanthology.org/W18-6319",
            inputs_description="predictions, references: text; language: zh, ja, th or other.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references, language="other"):
        if not any(text.strip() for text in references):
            return {"bleu": None, "reason": "no reference has any text"}
        tokenize = TOKENIZE.get(language, "13a")
        corpus = BLEU(tokenize=tokenize)
        score = corpus.corpus_score(predictions, [references]).score
        sentence = BLEU(tokenize=tokenize, effective_order=True)  # silences a warning; the counts are the same
        rows = [
            sentence.sentence_score(*pair) for pair in zip(predictions, ([text] for text in references), strict=True)
        ]
        statistics = np.array([[row.sys_len, row.ref_len, *row.counts, *row.totals] for row in rows])
        return {"bleu": score, "signature": str(corpus.get_signature()), "row_statistics": statistics}

    def score_of(self, totals):
        return {"bleu": np.apply_along_axis(corpus_bleu, -1, totals)}


def corpus_bleu(total):
    """BLEU of summed statistics: answer length, reference length, matches of 1- to 4-grams, 1- to 4-grams."""
    answer_length, reference_length, *counts = (int(count) for count in total)
    return BLEU.compute_bleu(counts[:4], counts[4:], answer_length, reference_length, smooth_method="exp").score
