"""What a server makes of final_model/: parity.py runs this as a script, with plain transformers and nothing of ours.

    python plain_server.py MODEL_FOLDER PROMPTS ANSWER [YYYY-MM-DD]

PROMPTS: JSON lines {"messages", "tools"}. ANSWER: first a line {"stops", "added"}, the ids at which generation stops
and the texts of the tokenizer's added tokens; then for each prompt {"ids"}, or {"error"} where it cannot be rendered.
The day is the one that a template shows which shows the day.
"""

import json
import sys
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import chat_template_utils


def main(folder: str, prompts: str, answer: str, day: str | None = None) -> None:
    if day is not None:  # the clock of templates that show the day  pinned: transformers
        vars(chat_template_utils)["datetime"] = SimpleNamespace(now=lambda: datetime.fromisoformat(day))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    eos = GenerationConfig.from_pretrained(folder).eos_token_id
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    with open(prompts, encoding="utf-8") as lines, open(answer, "w", encoding="utf-8") as results:
        print(json.dumps({"stops": [eos] if isinstance(eos, int) else eos or [], "added": added}), file=results)
        for line in lines:
            print(json.dumps(_rendered(tokenizer, json.loads(line))), file=results)


def _rendered(tokenizer: Any, prompt: dict[str, Any]) -> dict[str, Any]:
    try:
        encoded = tokenizer.apply_chat_template(
            prompt["messages"], tools=prompt["tools"], add_generation_prompt=True, return_dict=True
        )
    except Exception as error:  # whatever a template or tokenizer raises is what a server would answer
        return {"error": f"{type(error).__name__}: {error}"}
    return {"ids": list(encoded["input_ids"])}


if __name__ == "__main__":
    main(*sys.argv[1:])
