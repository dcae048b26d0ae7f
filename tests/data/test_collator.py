"""DataCollatorForCompletionOnlyLM: what carries loss, in literal tensors.

The expected tensors of the ordinary cases are those of trl 0.19's class, seen by running it on the same rows.
"""

import re
import warnings

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TrlCollator

from sft import DataCollatorForCompletionOnlyLM
from sft.errors import UserError
from tests.families import trained

#         0     1     2   3     4 5         6  7     8 9   10 11  12
WORDS = "[PAD] [EOS] ### Human : Assistant Hi Hello . Why So you Tool".split()
HUMAN, ASSISTANT = "### Human :", "### Assistant :"  # 2 3 4, 2 5 4
ONE = [2, 3, 4, 6, 2, 5, 4, 7, 1]
TWO = [2, 3, 4, 6, 2, 5, 4, 7, 8, 1, 2, 3, 4, 9, 2, 5, 4, 10, 8, 1]
NO = -100
PACKED = set("input_ids labels position_ids cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k seq_idx".split())


@pytest.fixture
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="[EOS]")


def scan(tokenizer, rows, response=ASSISTANT, instruction=HUMAN, **options):
    return DataCollatorForCompletionOnlyLM(response, instruction, tokenizer, **options)(
        [{"input_ids": row} for row in rows]
    )


def masked(tokenizer, rows, **options):
    return DataCollatorForCompletionOnlyLM(tokenizer=tokenizer, **options)(rows)


def same(tensor, values, dtype=torch.int64):
    assert tensor.dtype == dtype
    assert tensor.tolist() == values


# ---------------------------------------------------------------------------------------------------- rows with a mask


def test_rows_with_a_mask_are_labelled_by_it(tokenizer):
    rows = [
        {"input_ids": [2, 3, 4, 6, 7, 1], "assistant_mask": [0, 0, 0, 0, 1, 1]},
        {"input_ids": [2, 10, 1], "assistant_mask": [False, True, True]},
    ]
    batch = masked(tokenizer, rows)
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    same(batch["input_ids"], [[2, 3, 4, 6, 7, 1], [2, 10, 1, 0, 0, 0]])
    same(batch["labels"], [[NO, NO, NO, NO, 7, 1], [NO, 10, 1, NO, NO, NO]])
    same(batch["attention_mask"], [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def test_every_turn_of_a_mask_keeps_its_edges(tokenizer):
    row = {"input_ids": [2, 6, 7, 1, 2, 9, 10, 1, 8], "assistant_mask": [0, 0, 1, 1, 0, 0, 1, 1, 0]}
    same(masked(tokenizer, [row])["labels"], [[NO, NO, 7, 1, NO, NO, 10, 1, NO]])


def test_mask_wins_over_templates(tokenizer):
    row = {"input_ids": ONE, "assistant_mask": [0, 0, 0, 0, 0, 0, 0, 0, 1]}
    collator = DataCollatorForCompletionOnlyLM(ASSISTANT, HUMAN, tokenizer)
    same(collator([row])["labels"], [[NO, NO, NO, NO, NO, NO, NO, NO, 1]])


def test_rows_with_and_without_a_mask_are_each_labelled_their_own_way(tokenizer):
    collator = DataCollatorForCompletionOnlyLM(ASSISTANT, HUMAN, tokenizer)
    batch = collator([{"input_ids": [6, 7], "assistant_mask": [0, 1]}, {"input_ids": ONE}])
    same(batch["labels"], [[NO, 7] + [NO] * 7, [NO] * 7 + [7, 1]])


def test_mask_of_another_length_than_its_row_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="zip"):
        masked(tokenizer, [{"input_ids": [2, 3], "assistant_mask": [1]}])


def test_first_token_of_a_conversation_carries_no_loss(tokenizer):
    same(masked(tokenizer, [{"input_ids": [7, 1], "assistant_mask": [1, 1]}])["labels"], [[NO, 1]])


def test_pad_that_is_eos_leaves_the_stop_token_its_loss(tokenizer):
    tokenizer.pad_token = "[EOS]"
    rows = [{"input_ids": [2, 7, 1], "assistant_mask": [0, 1, 1]}, {"input_ids": [2, 1], "assistant_mask": [0, 1]}]
    batch = masked(tokenizer, rows)
    same(batch["labels"], [[NO, 7, 1], [NO, 1, NO]])
    same(batch["attention_mask"], [[1, 1, 1], [1, 1, 0]])


def test_left_padding_and_a_multiple(tokenizer):
    tokenizer.padding_side = "left"
    rows = [{"input_ids": [2, 7, 1], "assistant_mask": [0, 1, 1]}, {"input_ids": [2, 1], "assistant_mask": [0, 1]}]
    batch = masked(tokenizer, rows, pad_to_multiple_of=4)
    same(batch["input_ids"], [[0, 2, 7, 1], [0, 0, 2, 1]])
    same(batch["labels"], [[NO, NO, 7, 1], [NO, NO, NO, 1]])
    same(batch["attention_mask"], [[0, 1, 1, 1], [0, 0, 1, 1]])


def test_ignore_index_is_everywhere(tokenizer):
    rows = [{"input_ids": [2, 7, 1], "assistant_mask": [0, 1, 1]}, {"input_ids": [2, 1], "assistant_mask": [0, 1]}]
    same(masked(tokenizer, rows, ignore_index=-1)["labels"], [[-1, 7, 1], [-1, 1, -1]])


def test_packed_rows_restart_positions_and_have_no_attention_mask(tokenizer):
    rows = [
        {"input_ids": [2, 7, 1, 6, 10, 1], "assistant_mask": [1, 1, 1, 1, 1, 1], "seq_lengths": [3, 3]},
        {"input_ids": [2, 7, 8, 1], "assistant_mask": [0, 1, 1, 1], "seq_lengths": [4]},
    ]
    batch = masked(tokenizer, rows)
    assert set(batch) == PACKED
    same(batch["input_ids"], [[2, 7, 1, 6, 10, 1, 2, 7, 8, 1]])
    same(batch["labels"], [[NO, 7, 1, NO, 10, 1, NO, 7, 8, 1]])
    same(batch["position_ids"], [[0, 1, 2, 0, 1, 2, 0, 1, 2, 3]])


def test_packed_rows_say_where_each_conversation_begins_as_trls_own_collator_does(tokenizer):
    rows = [
        {"input_ids": [2, 7, 1, 6, 10], "assistant_mask": [0, 1, 1, 0, 1], "seq_lengths": [3, 2]},
        {"input_ids": [2, 7, 8, 1], "assistant_mask": [0, 1, 1, 1], "seq_lengths": [4]},
    ]
    batch = masked(tokenizer, rows)
    for side in "qk":
        same(batch[f"cu_seq_lens_{side}"], [0, 3, 5, 9], torch.int32)
        assert batch[f"max_length_{side}"] == 4 and type(batch[f"max_length_{side}"]) is int
    same(batch["seq_idx"], [[0, 0, 0, 1, 1, 2, 2, 2, 2]], torch.int32)

    labelled = [
        {**rows[0], "labels": [NO, 7, 1, NO, 10]},
        {**rows[1], "labels": [NO, 7, 8, 1]},
    ]
    trls = TrlCollator(pad_token_id=0, padding_free=True)(labelled)
    assert set(trls) == set(batch)
    for key, value in trls.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(batch[key])), key
        assert getattr(value, "dtype", int) == getattr(batch[key], "dtype", int), key


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_of_a_packed_batch_is_a_conversation_of_its_own(tokenizer, side):
    tokenizer.padding_side = side
    rows = [{"input_ids": [2, 7, 1, 6, 10], "assistant_mask": [0, 1, 1, 0, 1], "seq_lengths": [3, 2]}]
    batch = masked(tokenizer, rows, pad_to_multiple_of=4)
    same(batch["input_ids"], [[2, 7, 1, 6, 10, 0, 0, 0]])
    same(batch["labels"], [[NO, 7, 1, NO, 10, NO, NO, NO]])
    same(batch["position_ids"], [[0, 1, 2, 0, 1, 0, 1, 2]])
    same(batch["cu_seq_lens_q"], [0, 3, 5, 8], torch.int32)
    same(batch["seq_idx"], [[0, 0, 0, 1, 1, 2, 2, 2]], torch.int32)


def test_packed_batch_that_is_a_multiple_already_gets_no_padding(tokenizer):
    rows = [{"input_ids": [2, 7, 6, 1], "assistant_mask": [0, 1, 0, 1], "seq_lengths": [2, 2]}]
    batch = masked(tokenizer, rows, pad_to_multiple_of=4)
    same(batch["input_ids"], [[2, 7, 6, 1]])
    same(batch["cu_seq_lens_q"], [0, 2, 4], torch.int32)


def test_packed_batch_padded_to_a_multiple_needs_a_pad_token(tokenizer):
    tokenizer.pad_token = None
    rows = [{"input_ids": [2, 7, 1], "assistant_mask": [0, 1, 1], "seq_lengths": [3]}]
    same(masked(tokenizer, rows)["input_ids"], [[2, 7, 1]])
    with pytest.raises(UserError, match="pad token"):
        masked(tokenizer, rows, pad_to_multiple_of=4)


def test_packed_rows_beside_one_that_is_not(tokenizer):
    rows = [
        {"input_ids": [2, 7, 6, 1], "assistant_mask": [0, 1, 0, 1], "seq_lengths": [2, 2]},
        {"input_ids": [2, 7], "assistant_mask": [0, 1]},
    ]
    batch = masked(tokenizer, rows)
    same(batch["labels"], [[NO, 7, NO, 1, NO, 7]])
    same(batch["position_ids"], [[0, 1, 0, 1, 0, 1]])


def test_packed_rows_lie_the_same_where_padding_is_on_the_left(tokenizer):
    tokenizer.padding_side = "left"
    rows = [
        {"input_ids": [2, 7, 6, 1], "assistant_mask": [0, 1, 0, 1], "seq_lengths": [2, 2]},
        {"input_ids": [2, 7, 1], "assistant_mask": [0, 1, 1], "seq_lengths": [3]},
    ]
    batch = masked(tokenizer, rows)
    same(batch["input_ids"], [[2, 7, 6, 1, 2, 7, 1]])
    same(batch["labels"], [[NO, 7, NO, 1, NO, 7, 1]])
    same(batch["position_ids"], [[0, 1, 0, 1, 0, 1, 2]])


def test_padding_free_packed_rows_keep_every_conversation_apart(tokenizer):
    rows = [
        {"input_ids": [2, 7, 1, 6, 1], "assistant_mask": [0, 1, 1, 1, 1], "seq_lengths": [3, 2]},
        {"input_ids": [2, 10], "assistant_mask": [0, 1], "seq_lengths": [2]},
    ]
    batch = masked(tokenizer, rows, padding_free=True)
    same(batch["labels"], [[NO, 7, 1, NO, 1, NO, 10]])
    same(batch["position_ids"], [[0, 1, 2, 0, 1, 0, 1]])
    same(batch["cu_seq_lens_q"], [0, 3, 5, 7], torch.int32)


def test_padding_that_a_row_brings_is_left_out_of_a_padding_free_batch(tokenizer):
    rows = [
        {"input_ids": [0, 2, 7, 1, 0], "assistant_mask": [0, 1, 1, 1, 0], "attention_mask": [0, 1, 1, 1, 0]},
        {"input_ids": [2, 10], "assistant_mask": [0, 1]},
    ]
    batch = masked(tokenizer, rows, padding_free=True)
    same(batch["input_ids"], [[2, 7, 1, 2, 10]])
    same(batch["labels"], [[NO, 7, 1, NO, 10]])
    same(batch["cu_seq_lens_q"], [0, 3, 5], torch.int32)


# ------------------------------------------------------------------------------------------------ rows that are scanned


@pytest.mark.parametrize("form", ["text", "ids"])
def test_answers_are_found_by_text_or_ids_of_the_templates(tokenizer, form):
    templates = (ASSISTANT, HUMAN) if form == "text" else ([2, 5, 4], [2, 3, 4])
    batch = scan(tokenizer, [TWO, ONE], *templates)
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    same(batch["input_ids"], [TWO, ONE + [0] * 11])
    same(batch["labels"], [[NO] * 7 + [7, 8, 1] + [NO] * 7 + [10, 8, 1], [NO] * 7 + [7, 1] + [NO] * 11])
    same(batch["attention_mask"], [[1] * 20, [1] * 9 + [0] * 11])


def test_without_an_instruction_template_the_last_answer_is_supervised(tokenizer):
    batch = scan(tokenizer, [TWO, ONE], instruction=None)
    same(batch["labels"], [[NO] * 17 + [10, 8, 1], [NO] * 7 + [7, 1] + [NO] * 11])


def test_rows_may_be_bare_lists_or_tensors(tokenizer):
    collator = DataCollatorForCompletionOnlyLM(ASSISTANT, HUMAN, tokenizer)
    for rows in ([ONE], [torch.tensor(ONE)], [{"input_ids": torch.tensor(ONE)}]):
        same(collator(rows)["labels"], [[NO] * 7 + [7, 1]])


def test_padding_free_has_the_keys_and_shapes_of_flash_attention(tokenizer):
    batch = scan(tokenizer, [TWO, ONE], padding_free=True)
    assert set(batch) == PACKED
    same(batch["input_ids"], [TWO + ONE])
    same(batch["labels"], [[NO] * 7 + [7, 8, 1] + [NO] * 7 + [10, 8, 1] + [NO] * 7 + [7, 1]])
    same(batch["position_ids"], [[*range(20), *range(9)]])
    for side in "qk":
        same(batch[f"cu_seq_lens_{side}"], [0, 20, 29], torch.int32)
        assert batch[f"max_length_{side}"] == 20
    same(batch["seq_idx"], [[0] * 20 + [1] * 9], torch.int32)


def test_padding_to_a_multiple(tokenizer):
    batch = scan(tokenizer, [ONE], pad_to_multiple_of=8)
    same(batch["input_ids"], [ONE + [0] * 7])
    same(batch["labels"], [[NO] * 7 + [7, 1] + [NO] * 7])


def test_missing_response_template_warns_and_gives_no_loss(tokenizer):
    with pytest.warns(UserWarning) as caught:
        batch = scan(tokenizer, [[2, 3, 4, 6, 1], ONE], instruction=None)
    assert str(caught[0].message) == (
        "Could not find response key `### Assistant :` in the following instance: ### Human : Hi [EOS]. This instance "
        "will be ignored in loss calculation. Note, if this happens often, consider increasing the `max_length`."
    )
    assert len(caught) == 1
    same(batch["labels"], [[NO] * 9, [NO] * 7 + [7, 1]])


def test_missing_instruction_template_warns_and_gives_no_loss(tokenizer):
    with pytest.warns(UserWarning, match="Could not find instruction key `### Human :` in the following instance"):
        batch = scan(tokenizer, [[2, 5, 4, 7, 1]])
    same(batch["labels"], [[NO] * 5])


def test_found_templates_warn_of_nothing_even_when_pad_is_eos(tokenizer):
    tokenizer.pad_token = "[EOS]"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = scan(tokenizer, [TWO, ONE])
    same(batch["labels"], [[NO] * 7 + [7, 8, 1] + [NO] * 7 + [10, 8, 1], [NO] * 7 + [7, 1] + [NO] * 11])


def test_answer_before_any_question_is_supervised(tokenizer):
    row = [2, 5, 4, 7, 1, 2, 3, 4, 9, 2, 5, 4, 10, 1]
    same(scan(tokenizer, [row])["labels"], [[NO, NO, NO, 7, 1, NO, NO, NO, NO, NO, NO, NO, 10, 1]])


def test_consecutive_answers_leave_the_header_between_them_unsupervised(tokenizer):
    row = [2, 3, 4, 6, 2, 5, 4, 7, 1, 2, 5, 4, 10, 1]
    same(scan(tokenizer, [row])["labels"], [[NO] * 7 + [7, 1, NO, NO, NO, 10, 1]])


def test_consecutive_questions(tokenizer):
    row = [2, 3, 4, 6, 2, 3, 4, 9, 2, 5, 4, 10, 1]
    same(scan(tokenizer, [row])["labels"], [[NO] * 11 + [10, 1]])


def test_tool_turn_ends_an_answer_when_every_turn_opens_with_one_control_token():
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[EOS]", *WORDS[3:]])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("<|im_start|>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="[EOS]")
    human, assistant, tool = (f"<|im_start|> {role}" for role in ("Human", "Assistant", "Tool"))
    row = tokenizer.encode(f"{human} Hi {assistant} Hello [EOS] {tool} you [EOS] {assistant} So [EOS] {human} Why")
    answers = tokenizer.encode("Hello [EOS] So [EOS]")
    (labels,) = scan(tokenizer, [row], assistant, human)["labels"].tolist()
    assert labels == [NO] * 5 + answers[:2] + [NO] * 6 + answers[2:] + [NO] * 3


def test_instruction_template_cut_by_truncation_carries_no_loss(tokenizer):
    for cut in (1, 2):
        row = [2, 3, 4, 6, 2, 5, 4, 7, 1, *[2, 3, 4][:cut]]
        same(scan(tokenizer, [row])["labels"], [[NO] * 7 + [7, 1] + [NO] * cut])


def test_response_template_cut_by_truncation_gives_no_loss_and_warns(tokenizer):
    with pytest.warns(UserWarning, match="response key"):
        batch = scan(tokenizer, [[2, 3, 4, 6, 2, 5]])
    same(batch["labels"], [[NO] * 6])


def test_truncated_answer_is_supervised_to_the_rows_end(tokenizer):
    same(scan(tokenizer, [TWO[:19]])["labels"], [[NO] * 7 + [7, 8, 1] + [NO] * 7 + [10, 8]])


def test_padding_that_a_row_brings_carries_no_loss(tokenizer):
    row = {"input_ids": [*ONE, 0, 0], "attention_mask": [1] * 9 + [0, 0]}
    batch = DataCollatorForCompletionOnlyLM(ASSISTANT, HUMAN, tokenizer)([row])
    same(batch["labels"], [[NO] * 7 + [7, 1, NO, NO]])
    same(batch["attention_mask"], [[1] * 9 + [0, 0]])


def trained_tokenizer(kind):
    backend = Tokenizer.from_str(trained(kind))
    backend.add_special_tokens([AddedToken("</s>", normalized=False), AddedToken("<pad>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


def loss_text(tokenizer, text, *templates):
    """The text that carries loss, with | between its stretches."""
    row = tokenizer(text, add_special_tokens=False)["input_ids"]
    (labels,) = scan(tokenizer, [row], *templates)["labels"].tolist()
    assert [token for token in labels if token != NO] == [
        t for t, label in zip(row, labels, strict=True) if label != NO
    ]
    stretches, before = [], NO
    for label in labels:
        if label != NO:
            stretches.append([]) if before == NO else None
            stretches[-1].append(label)
        before = label
    return "|".join(tokenizer.decode(stretch).strip(" ") for stretch in stretches)


KINDS = ["bytes", "metaspace", "legacy", "gemma"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("human", "assistant"),
    [
        ("### Human:", "### Assistant:"),
        ("\n### Human:", "\n### Assistant:"),
        ("### Human:\n", "### Assistant:\n"),
        ("\n\n### Human:\n", "\n\n### Assistant:\n"),
        ("assistant user:", " assistant model:"),
    ],
)
def test_templates_whose_tokens_change_with_context(kind, human, assistant):
    """Their ids alone differ from those in a row: a dummy prefix, or white space that merges with its neighbour."""
    tokenizer = trained_tokenizer(kind)
    gap = "" if human.startswith("\n") else "\n"
    space = "" if human.endswith("\n") else " "
    text = "The system.\n"
    for question, reply in (("Hello there!", "Hello!"), ("How are you?", "Very quiet.\n- one")):
        text += f"{gap}{human}{space}{question}{gap}{assistant}{space}{reply}</s>"
    # As in trl, the white space before the next instruction template is the answer's, unless it is in the template.
    found = loss_text(tokenizer, text, assistant, human)
    assert re.sub(r"\s*[|]\s*", "|", found).strip() == "Hello!</s>|Very quiet.\n- one</s>"


@pytest.mark.parametrize("kind", KINDS)
def test_answer_that_begins_with_white_space_after_its_template(kind):
    tokenizer = trained_tokenizer(kind)
    text = "### Human:\nHello\n### Assistant:\n\n\nHello!</s>"
    found = loss_text(tokenizer, text, "### Assistant:\n", "### Human:\n")
    assert found.lstrip("\n") == "Hello!</s>"


def test_control_token_of_a_template_is_not_found_in_text_that_spells_it():
    tokenizer = trained_tokenizer("bytes")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|bot|>"]})
    spelled = [token for c in "<|user|>" for token in tokenizer.encode(c, add_special_tokens=False)]
    user, bot, stop = tokenizer.convert_tokens_to_ids(["<|user|>", "<|bot|>", "</s>"])
    row = [user, 70, bot, 71, *spelled, 72, stop]
    (labels,) = scan(tokenizer, [row], "<|bot|>", "<|user|>")["labels"].tolist()
    assert labels == [NO] * 3 + row[3:]


# ------------------------------------------------------------------------------------------------------ what is refused


def test_bare_ids_without_a_response_template_are_refused(tokenizer):
    with pytest.raises(UserError, match="give response_template"):
        DataCollatorForCompletionOnlyLM(tokenizer=tokenizer)([{"input_ids": ONE}])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"response_template": ""}, "response_template is empty"),
        ({"response_template": "a", "instruction_template": []}, "instruction_template is empty"),
        ({"response_template": "a", "mlm": True}, "mlm must be False"),
    ],
)
def test_arguments_that_cannot_work_are_refused(tokenizer, arguments, reason):
    with pytest.raises(UserError, match=reason):
        DataCollatorForCompletionOnlyLM(tokenizer=tokenizer, **arguments)


def test_tokenizer_is_needed():
    with pytest.raises(UserError, match="needs a tokenizer"):
        DataCollatorForCompletionOnlyLM("### Assistant:")


def test_rows_of_unequal_length_without_a_pad_token_are_refused(tokenizer):
    tokenizer.pad_token = None
    rows = [{"input_ids": [2, 7], "assistant_mask": [0, 1]}, {"input_ids": [2], "assistant_mask": [0]}]
    with pytest.raises(UserError, match="pad token"):
        masked(tokenizer, rows)
    same(masked(tokenizer, rows[:1])["labels"], [[NO, 7]])
