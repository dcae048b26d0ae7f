"""Searches for a conversation whose mask or ids are wrong, over all families of tests/families.py, both paths.

python benchmarks/mask_hypothesis.py [seconds, 300 by default]

The oracle and the strategies are those of the tests. Prints one line of counts, or the smallest counter-example found
and exit code 1.
"""

import random
import sys
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sft.data.chat import ChatEncoder
from sft.data.conversation import Conversation
from tests.families import FAMILIES, KINDS, build, difference, expect, hostile_conversations


def search(seconds: float) -> Counter[str]:
    """Draws batches of one to four conversations until the time is over. Raises: AssertionError: a counter-example."""
    cases = [(family, kind) for family in FAMILIES.values() for kind in KINDS]
    tokenizers = {(family.name, kind): build(family, kind) for family, kind in cases}
    encoders = {case: ChatEncoder(tokenizer) for case, tokenizer in tokenizers.items()}
    counts: Counter[str] = Counter()

    @settings(
        max_examples=500,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        family, kind = data.draw(st.sampled_from(cases))
        encoder = encoders[family.name, kind]
        rows = data.draw(st.lists(hostile_conversations(family), min_size=1, max_size=4))
        many = encoder.encode_batch([Conversation(*row) for row in rows])
        for row, want, got in zip(rows, expect(family, kind, tokenizers[family.name, kind], rows), many, strict=True):
            counts["conversations"] += 1
            counts["with a merged header"] += want.merged
            for path, encoded in (("encode", encoder.encode(*row)), ("encode_batch", got)):
                wrong = difference(want, encoded)
                assert not wrong, f"{family.name}, {kind}, {path}: {wrong}"

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        counts["searches of 500"] += 1
        seed(random.randrange(2**32))(check)()
    return counts


if __name__ == "__main__":
    try:
        found = search(float(sys.argv[1]) if len(sys.argv) > 1 else 300)
    except AssertionError as error:
        sys.exit(f"counter-example: {error}")
    print("no counter-example:", ", ".join(f"{count:,} {what}" for what, count in found.items()))
