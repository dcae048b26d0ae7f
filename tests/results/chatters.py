"""Tiny random models that answer, plain loops to hold them against, and what an evaluation of one needs."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import sft.results.answers
from sft.data.chat import ChatEncoder
from sft.data.conversation import Conversation
from sft.recipe import load_recipe
from sft.results.answers import Answers, Turn, generate_answers, generation_mode, stop_ids
from sft.results.evaluation import EvaluatedModel, evaluate_models
from tests.families import FAMILIES, build

NEW_TOKENS = 16
SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,  # the usual 0.02 leaves a tiny model that writes one token for ever
    "pad_token_id": None,
    "bos_token_id": None,
}
# name: model, configuration, template, kind of tokenizer
RANDOM_MODELS = {
    "smollm2": (LlamaForCausalLM, LlamaConfig, "qwen2_5", "bytes"),  # a Llama that is spoken to in ChatML
    "llama3": (LlamaForCausalLM, LlamaConfig, "llama3", "bytes"),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, "qwen2_5", "bytes"),
    "qwen3": (Qwen2ForCausalLM, Qwen2Config, "qwen3", "bytes"),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, "gemma3", "gemma"),
    "phi3": (Phi3ForCausalLM, Phi3Config, "phi3", "metaspace"),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, "qwen2_5", "bytes"),
}
OWN_SIZES = {
    "gemma3": {"head_dim": 8, "sliding_window": 12, "tie_word_embeddings": False},
    # As trl leaves a model whose router it has balanced.
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "output_router_logits": True,
    },
}


@dataclass
class Chatter:
    model: PreTrainedModel
    encoder: ChatEncoder

    @property
    def stops(self):
        return stop_ids(self.model, self.encoder)


def random_chatter(name: str) -> Chatter:
    model_class, config_class, template, kind = RANDOM_MODELS[name]
    tokenizer = build(FAMILIES[template], kind)
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    sizes = SIZE | OWN_SIZES.get(name, {})
    model = model_class(config_class(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes)).eval()
    return Chatter(model, ChatEncoder(tokenizer))


def chatglm3_chatter(folder: Path) -> Chatter:
    from tests.model.test_chatglm3_model import tiny_model
    from tests.model.test_chatglm3_tokenizer import train

    train(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Chatter(tiny_model(padded_vocab_size=len(tokenizer)), ChatEncoder(tokenizer))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


WORDS = "the crowd on pier counts how are you hello storms what can I do today and one two".split()
CONVERSATIONS = [
    (f"test.jsonl:{i + 1}", Conversation([user(" ".join(WORDS[(i + k) % len(WORDS)] for k in range(length)))]))
    for i, length in enumerate((1, 40, 3, 90, 7, 2, 25, 60, 5, 12))
]
for _place, _conversation in CONVERSATIONS:
    _conversation.messages.append(assistant("Hello, the pier."))
CONVERSATIONS[4][1].messages.extend([user("And you?"), assistant("I count the storms.")])


def greedy(chatter: Chatter, prompt: list[int], stops: set[int], limit: int = NEW_TOKENS) -> tuple[list[int], bool]:
    """One prompt, one forward pass over everything for each token: no batch, no padding, no cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(limit):
            logits = chatter.model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] in stops:
                return ids[len(prompt) : -1], True
    return ids[len(prompt) :], False


def make_it_stop(chatter: Chatter, turns: list[Turn]) -> set[int]:
    """Adds a stop token to the model that ends some of its answers early, and not all."""
    written = [greedy(chatter, turn.prompt, chatter.stops)[0] for turn in turns]
    tokens = sorted({token for row in written for token in row})
    half = min(tokens, key=lambda token: abs(sum(token in row[1:] for row in written) - len(turns) / 2))
    chatter.model.generation_config.eos_token_id = [half]
    return chatter.stops


def answers_of(chatter, turns, path, batch_size, stops, **options):
    config = GenerationConfig(**{"max_new_tokens": NEW_TOKENS, "do_sample": False} | options, eos_token_id=list(stops))
    config.pad_token_id = chatter.encoder.tokenizer.pad_token_id
    answers = Answers(path, {"batch": batch_size})
    with generation_mode(chatter.model, True):
        generate_answers(chatter.model, chatter.encoder, turns, answers, "base", config, batch_size)
    answers.close()
    return [
        (answers.entries["base", turn.key]["text"], answers.entries["base", turn.key]["finished"]) for turn in turns
    ]


def with_lora(model: PreTrainedModel, seed: int = 1):
    torch.manual_seed(seed)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(copy.deepcopy(model), config)


def recipe_in(folder: Path, *overrides: str):
    folder.mkdir(exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text("model_name_or_path: m\ndataset_path: a.jsonl\noutput_dir: o\n", encoding="utf-8")
    plain = ["evaluation.metrics=[chrf]", f"evaluation.generation.max_new_tokens={NEW_TOKENS}"]
    return load_recipe(file, [f"output_dir={folder}", "evaluation.batch_size=3", *plain, *overrides])


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").split("\n") if line]


def score_alone(chatter, folder, *overrides, conversations=CONVERSATIONS, provenance="base weights"):
    recipe = recipe_in(folder, *overrides)
    return evaluate_models(
        recipe, chatter.encoder, conversations, [EvaluatedModel("base", chatter.model, True, provenance)]
    )


def count_generated(monkeypatch) -> list[int]:
    counts, generate = [], sft.results.answers.generate

    def counted(model, encoder, prompts, config):
        counts.append(len(prompts))
        return generate(model, encoder, prompts, config)

    monkeypatch.setattr(sft.results.answers, "generate", counted)
    return counts


class Killed(BaseException):
    pass
