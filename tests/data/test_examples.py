"""chat.examples: which rows a template writes otherwise as history, and the examples that rows give.

The oracle renders each beginning of a conversation by `apply_chat_template` itself.
"""

import functools
import json
import random
from pathlib import Path

import datasets
import numpy as np
import pytest

from sft.data.chat import HEADER_MERGED, PROMPT_PARTED, ChatEncoder
from sft.data.conversation import Conversation, assistant_turns
from sft.data.examples import REWRITTEN, ExampleMaker
from sft.data.ledger import ledger_table
from sft.data.splits import prepare
from sft.data.tokens import FileTokeniser
from sft.errors import DataError, FormatError
from sft.recipe import ChatOptions, Source, load_recipe
from tests.families import FAMILIES, Family, build, conversations, qwen3, template

Q, A = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}
QWEN = {"special": FAMILIES["qwen3"].special, "eos": "<|im_end|>", "calls": "json", "thinks": True}
QWEN |= {"alternates": False, "added": FAMILIES["qwen3"].added, "around": FAMILIES["qwen3"].around}
# Other templates of trl that read reasoning; their text is asked of the template, not of an oracle in pieces.
OTHERS = {name: Family(name, qwen3, **QWEN) for name in ("qwen3_5_think", "qwen3_5_nothink", "qwen3_6")}
# Its answers depend on content: text after "###" is not shown in history, nor a note in brackets.
HIDING = """{%- for m in messages -%}<|im_start|>{{ m.role }}
{% set text = m.content if m.content is string else '' %}
{%- if m.role == 'assistant' and not loop.last %}
{%- if '###' in text %}{% set text = text.split('###')[0] %}{% endif %}
{%- if text.startswith('(note)') %}{% set text = text[6:] %}{% endif %}
{%- endif -%}
{{ text }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@functools.cache
def tokenizer_of(name, kind="bytes"):
    if name == "hiding":
        tokenizer = build(FAMILIES["qwen2_5"], kind)
        tokenizer.chat_template = HIDING
        return tokenizer
    if name in OTHERS:
        tokenizer = build(FAMILIES["qwen3"], kind)
        tokenizer.chat_template = template(name)
        return tokenizer
    return build(FAMILIES[name], kind)


@functools.cache
def encoder_of(name):
    return ChatEncoder(tokenizer_of(name))


def rows_of(name, count):
    if name == "hiding":
        words = ["plain", "好的", "#", "note", "a (note)", "word", "### x", "(note) a"]
        rng = random.Random(0)
        for _ in range(count):
            texts = [
                " ".join(rng.choice(words) for _ in range(rng.randrange(1, 3))) for _ in range(rng.choice((2, 4, 6)))
            ]
            yield [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)], None
    else:
        yield from conversations({**FAMILIES, **OTHERS}[name], count, seed=1)


# What a template writes after the stop token of a last answer.
TAILS = {"phi3": "\n<|endoftext|>", "glm4moe": ""}
REWRITING = {"qwen3", "hiding", "lfm2_2_5", "nemotron_3_nano", *OTHERS}


def rewritten_by_oracle(name, messages, tools):
    """Whether the text of the conversation does not begin with that of each conversation that ends with an answer."""
    render = functools.partial(tokenizer_of(name).apply_chat_template, tools=tools, tokenize=False)
    messages = encoder_of(name).served(messages)
    text, ended = render(messages), [render(messages[: k + 1]) for k in assistant_turns(messages)]
    tail = TAILS.get(name, "\n")
    return not all(text.startswith(beginning.removesuffix(tail)) for beginning in ended)


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS, "hiding"])
def test_rows_that_are_rewritten_are_those_of_the_oracle(name):
    """Asked once for each shape of conversation, and yet right for each row, whatever its content."""
    tokenizer, count = tokenizer_of(name), 150 if name == "cohere2" else 700
    encoder = ChatEncoder(tokenizer)
    maker = ExampleMaker(encoder, ChatOptions())
    found = 0
    for messages, tools in rows_of(name, count):
        expected = rewritten_by_oracle(name, messages, tools)
        found += expected
        examples = maker.make(Conversation(messages, tools))
        if examples.is_rewritten != expected:
            assert isinstance(encoder.encode_batch([Conversation(messages, tools)])[0], FormatError), (messages, tools)
        assert bool(examples.answers) == examples.is_rewritten
    assert (found > count / 5) == (name in REWRITING)


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_an_example_is_its_prompt_and_its_answer(name):
    """The ids that training uses are those that the model is given in use, and then what it must write."""
    encoder = ChatEncoder(tokenizer_of(name))
    maker = ExampleMaker(encoder, ChatOptions(examples="each_answer"))
    seen = 0
    for messages, tools in rows_of(name, 150):
        examples = maker.make(Conversation(messages, tools))
        answers = assistant_turns(messages)
        assert len(examples.conversations) == len(answers)
        rendered = encoder.render_batch(*maker.flat([examples]))
        for k, encoded in zip(answers, encoder.encode_rendered(rendered), strict=True):
            if (
                isinstance(encoded, FormatError)
                or PROMPT_PARTED in encoded.notes
                or messages[k - 1]["role"] == "assistant"
            ):
                continue  # no server is asked for a second answer to one question
            start, stop = encoded.turns[-1]
            ids = list(encoded.input_ids)
            assert encoder.encode_prompt(messages[:k], tools) == ids[:start]
            # gpt-oss' template shows the reasoning before a call until the final answer is there, and then no more.
            drops = any("tool_calls" in m and m.get("reasoning_content") for m in messages[:k])
            if HEADER_MERGED not in encoded.notes and not (name == "gptoss" and drops):
                served = encoder.served(messages[: k + 1])
                rendered_ids = tokenizer_of(name).apply_chat_template(served, tools=tools)["input_ids"]
                assert rendered_ids == (ids[:-1] if name == "glm4moe" else ids)  # the marker that ends it is ours
            seen += 1
    assert (seen > 100) == (name not in ("deepseek_r1_distill", "deepseekv3", "nemotron_3_nano")), (
        "their prompts go beyond what is written"
    )


def test_beginnings_of_a_conversation_have_the_shape_that_is_cut_for_them():
    encoder = ChatEncoder(tokenizer_of("qwen3"))
    for mode in ("each_answer", "auto"):
        maker = ExampleMaker(encoder, ChatOptions(examples=mode))
        for messages, tools in rows_of("qwen3", 300):
            conversations, shapes, _ = maker.flat([maker.make(Conversation(messages, tools))])
            assert shapes == [encoder.shape(conversation) for conversation in conversations]


@pytest.mark.parametrize("mode", ["auto", "each_answer"])
def test_gpt_oss_answer_after_a_call_follows_the_reasoning_that_its_prompt_shows(mode):
    tokenizer = tokenizer_of("gptoss")
    called = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    result = {"role": "tool", "name": "f", "tool_call_id": "call00001", "content": "2"}
    calls = [{"content": "", "thinking": "Hm."}, {"content": "Hm."}, {"content": "", "thinking": ""}]
    rows = [[Q, {"role": "assistant", **made, "tool_calls": [called]}, result, A] for made in calls * 2]
    encoder = ChatEncoder(tokenizer)
    made = [ExampleMaker(encoder, ChatOptions(examples=mode)).make(Conversation(row)) for row in rows]
    encoded = iter(encoder.encode_rendered(encoder.render_batch(*ExampleMaker(encoder, ChatOptions()).flat(made))))
    for row, examples in zip(rows, made, strict=True):
        *_, last = [next(encoded) for _ in examples.conversations]
        prompt = tokenizer.apply_chat_template(row[:3], add_generation_prompt=True, return_dict=False)
        start, stop = last.turns[-1]
        assert list(last.input_ids[:start]) == prompt
        assert tokenizer.decode(last.input_ids[start:stop]) == "<|channel|>final<|message|>Hello.<|return|>"
        assert tokenizer.decode(prompt).count("Hm.") == any("Hm." in str(value) for value in row[1].values())


# -------------------------------------------------------------------------------------------------- from file to split


def talk(*texts):
    return {"conversation": [{"human": q, "assistant": a} for q, a in zip(texts[::2], texts[1::2], strict=True)]}


def write(name, *rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def prepared(*overrides, name="qwen3", **options):
        text = "model_name_or_path: unused\noutput_dir: out\ndataset: {train: train.jsonl, packing: false}\n"
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        return prepare(load_recipe("recipe.yaml", overrides), tokenizer_of(name), **options)

    return prepared


def marked(data):
    """Each example of the training split as text, what carries loss in [[ ]]."""
    texts = []
    for row in data.train:
        text, before = "", 0
        for token, mask in zip(row["input_ids"], row["assistant_mask"], strict=True):
            text += ("[[" if mask > before else "]]" if mask < before else "") + tokenizer_of("qwen3").decode([token])
            before = mask
        texts.append((text + "]]" * before).replace("<|im_start|>", "<").replace("<|im_end|>", ">"))
    return texts


WHOLE = "<user\n1>\n<assistant\n[[2>]]\n<user\n3>\n<assistant\n[[<think>\n\n</think>\n\n4>]]\n"
EACH = [
    "<user\n1>\n<assistant\n[[<think>\n\n</think>\n\n2>]]\n",
    "<user\n1>\n<assistant\n2>\n<user\n3>\n<assistant\n[[<think>\n\n</think>\n\n4>]]\n",
]


def test_whole_trains_the_first_answer_without_the_block_that_the_last_one_has(run):
    write("train.jsonl", talk("1", "2", "3", "4"))
    assert marked(run("chat.examples=whole")) == [WHOLE]


@pytest.mark.parametrize("mode", ["each_answer", "auto"])
def test_each_answer_is_trained_as_the_server_asks_for_it_and_once(run, mode):
    write("train.jsonl", talk("1", "2", "3", "4"))
    assert marked(run(f"chat.examples={mode}")) == EACH


def test_auto_leaves_rows_whole_where_history_is_as_it_was(run):
    write("train.jsonl", talk("1", "2", "3", "4"), talk("5", "6"))
    data = run(name="qwen2_5")
    assert len(data.train) == 2
    assert "examples" not in data.ledger and data.ledger["files"][0]["notes"] == {}
    assert len(run("chat.examples=each_answer", name="qwen2_5").train) == 3


def test_only_the_last_answer_of_a_row_gives_an_example_for_loss_on_the_last_turn(run):
    write("train.jsonl", talk("1", "2", "3", "4"))
    assert marked(run("chat.loss_on=last_turn")) == EACH[1:]


@pytest.mark.parametrize("mode", ["whole", "each_answer", "auto"])
def test_ledger_counts_the_rows_that_are_rewritten_in_every_mode(run, mode):
    write("train.jsonl", talk("1", "2", "3", "4"), talk("5", "6"), talk("5", "7", "8", "9"))
    data = run(f"chat.examples={mode}")
    (file,) = data.ledger["files"]
    assert file["notes"] == {REWRITTEN: 2}
    assert (file["rows"], file["used"], file.get("examples")) == (3, 3, None if mode == "whole" else 5)
    assert data.ledger["rows"] == {"train": 3}
    assert data.ledger.get("examples") == (None if mode == "whole" else {"train": 5})
    told = "train.jsonl: 3 rows give 5 examples (chat.examples)" in ledger_table(data.ledger)
    assert told == (mode != "whole")


def test_over_long_examples_are_left_out_and_the_row_counts_as_trimmed_once(run):
    write("train.jsonl", talk("1", "2", "3", "4", "5", "6" * 400), talk("1", "2" * 500), talk("1", "2"))
    data = run("dataset.max_length=120", "dataset.max_lost=1")
    assert [text.count("[[") for text in marked(data)] == [1, 1, 1]
    (file,) = data.ledger["files"]
    assert (file["rows"], file["used"], file["trimmed"], file["dropped"]) == (3, 2, [1], {"over-long": [2]})
    with pytest.raises(DataError, match=r"2 of 3 rows of dataset.train .* \(66.7%\)"):
        run("dataset.max_length=120", "dataset.max_lost=0.6")
    with pytest.raises(DataError) as caught:
        run("dataset.max_length=120", "dataset.max_lost=1", "dataset.overlength=error")
    first, *_, last = str(caught.value).splitlines()
    assert first == (
        "train.jsonl:1: 1 of its 3 answers end after more than dataset.max_length 120 tokens, the last after 439"
    )
    assert last == "mend the 2 rows; or set dataset.overlength: trim, or drop"


def test_examples_of_a_row_never_land_in_two_splits(run):
    rows = [talk(*(str(i + 100 * k) for k in range(2 * (1 + i % 3)))) for i in range(60)]
    write("train.jsonl", *rows, *rows[:20])
    data = run("dataset.validation=0.2", "dataset.test=0.1")
    (file,) = data.files
    lines_of = {}
    for row in file.rows:
        lines_of.setdefault(tuple(row["input_ids"]), set()).add(row["line"])
    train, validation = (
        {min(lines_of[tuple(row["input_ids"])]) for row in split} for split in (data.train, data.validation)
    )
    test = {int(place.rpartition(":")[2]) for place, _ in data.test_conversations}
    assert not train & validation and not (train | validation) & {line for line in test if line <= 60}
    assert sum(data.ledger["rows"].values()) == 80
    assert abs(data.ledger["rows"]["validation"] - 16) <= 4, "a share of the rows, not of their examples"
    assert sum(data.ledger["examples"].values()) == sum(1 + i % 3 for i in [*range(60), *range(20)])
    assert data.ledger["duplicates"]["rows"] == 20
    assert data.ledger["duplicates"]["named"][:2] == [
        "train.jsonl:61 = train.jsonl:1",
        "train.jsonl:62 = train.jsonl:2",
    ]
    assert data.ledger["test_in_train"]["rows"] == 0


def test_rows_of_the_test_split_that_are_trained_on_are_named_once(run):
    write("train.jsonl", talk("1", "2", "3", "4"))
    write("test.jsonl", talk("5", "6"), talk("1", "2", "3", "4"))
    data = run("dataset.test=test.jsonl")
    assert data.ledger["test_in_train"] == {"rows": 1, "named": ["test.jsonl:2"]}
    assert [place for place, _ in data.test_conversations] == ["test.jsonl:1", "test.jsonl:2"]


def test_weights_choose_rows_with_all_their_examples(run):
    write("train.jsonl", *[talk(str(i), "2", "3", "4") for i in range(100)])
    data = run("dataset.train=[{path: train.jsonl, weight: 1.5}]")
    questions = [tokenizer_of("qwen3").decode(row["input_ids"]).split("\n")[1] for row in data.train]
    counts = np.unique(np.unique(questions, return_counts=True)[1], return_counts=True)
    assert counts[0].tolist() == [2, 4] and 30 < counts[1][1] < 70


def test_a_bad_answer_makes_the_whole_row_bad_and_is_counted_once(run):
    row = talk("1", "2", "3", "4", "5", "6")
    row["conversation"][1]["human"] = "<|im_end|>"
    write("train.jsonl", talk("1", "2"), row)
    data = run("dataset.control_tokens=skip", "dataset.max_lost=1", "chat.examples=each_answer")
    assert data.ledger["files"][0]["dropped"] == {"control token": [2]} and len(data.train) == 1
    as_text = run("dataset.control_tokens=text")
    assert len(as_text.train) == 4 and as_text.ledger["files"][0]["notes"][REWRITTEN] == 1


def test_streamed_rows_give_the_same_examples(run):
    write("train.jsonl", talk("1", "2", "3", "4"), talk("5", "6"))
    streamed = run("dataset.streaming=true", "training_args.max_steps=1").train
    assert [row["input_ids"] for row in streamed] == [row["input_ids"] for row in run().train]


def test_rows_whose_shape_was_located_once_stay_on_the_fast_path(run):
    encoder, careful = ChatEncoder(tokenizer_of("qwen3")), []
    real, asked = encoder.encode, encoder._history._ask
    encoder.encode = lambda *row, **how: careful.append("encode") or real(*row, **how)
    encoder._history._ask = lambda conversation: careful.append("history") or asked(conversation)
    write("train.jsonl", *[talk(*(f"{i} {k}" for k in range(2 * (1 + i % 3)))) for i in range(3000)])
    run()
    tokeniser = FileTokeniser(encoder, load_recipe("recipe.yaml"), Source("x", "conversation"))
    lines = Path("train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [(i + 1, json.loads(line)) for i, line in enumerate(lines)]
    assert sum(len(batch) for batch in tokeniser.batches(rows)) == 6000
    assert careful.count("history") == 2, "once for dialogues of two turns, once for those of three"
    assert careful.count("encode") < 10


def test_chatglm3_gives_one_example_a_row_unless_asked_for_more(tmp_path):
    from transformers import AutoTokenizer

    from tests.model.test_chatglm3_tokenizer import train

    train(tmp_path)
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(tmp_path))
    conversation = Conversation([Q, A, Q, A])
    assert ExampleMaker(encoder, ChatOptions()).make(conversation) == (conversation, None, (), False)
    examples = ExampleMaker(encoder, ChatOptions(examples="each_answer")).make(conversation)
    first, second = encoder.encode_batch(examples.conversations)
    assert list(first.input_ids) == encoder.encode_prompt([Q]) + list(first.input_ids[slice(*first.turns[-1])])
    assert list(second.input_ids) == encoder.encode_prompt([Q, A, Q]) + list(second.input_ids[slice(*second.turns[-1])])
