"""Stop rate, 0 to 100: the share of answers that ended by themselves, with a stop token, before the length limit."""

import datasets
import evaluate
import numpy as np


class StopRate(evaluate.Metric):
    higher_is_better = True

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="finished: whether the answer ended by itself.",
            features=datasets.Features({"finished": datasets.Value("bool")}),
        )

    def _compute(self, finished):
        if not finished:
            return {"stop_rate": None, "reason": "there is no row to score"}
        statistics = np.column_stack([finished, np.ones(len(finished))])
        return {**self.score_of(statistics.sum(axis=0)), "signature": "version:1", "row_statistics": statistics}

    def score_of(self, totals):
        return {"stop_rate": 100 * totals[..., 0] / totals[..., 1]}
