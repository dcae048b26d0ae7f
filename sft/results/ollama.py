"""The Modelfile in final_model/: how Ollama is to prompt the model, and where it stops.

Ollama prompts by a template of Go's text/template, and guesses one where it is given none. Here it is made of what the
chat template itself writes around the contents of a dialogue, and compared with that on the run's own prompts. Where no
template of Go writes them all, the file says so and holds none.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sft.data.answer_spans import Render
from sft.data.chat import ChatEncoder
from sft.data.control_tokens import PRIVATE_USE
from sft.data.conversation import Conversation, Message, assistant_turns
from sft.errors import FormatError
from sft.files import write_text
from sft.plain_text import plain_text

# What Ollama reads of safetensors (its convert/convert.go of August 2026), of transformers' causal language models; of
# any other it takes a GGUF file.
READ_BY_OLLAMA = """
    LlamaForCausalLM Ministral3ForCausalLM MixtralForCausalLM GemmaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM
    Gemma4ForCausalLM Phi3ForCausalLM Qwen2ForCausalLM Qwen3NextForCausalLM Olmo3ForCausalLM CohereForCausalLM
    GptOssForCausalLM DeepseekV3ForCausalLM Glm4MoeLiteForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM
    NemotronHForCausalLM
""".split()
SAMPLING = {  # a key of transformers.GenerationConfig: the parameter of Ollama
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
MARKS = USER, ANSWER, NEXT_USER, SYSTEM = PRIVATE_USE[:4]  # in the place of contents


# ------------------------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Layout:
    """What a chat template writes around the contents of a dialogue in which user and assistant take turns.

    first: before the user's first message where there is no system prompt. system: before and after a system prompt,
    up to that message; None: it cannot be told so. answer: from a message of the user to the answer to it. user: from
    there to the user's next message. prompt: after the last one. is_stripped: contents lose white space at their ends.

    ChatML, with ⏎ for a line break:
        <|im_start|>system⏎Be brief.<|im_end|>⏎<|im_start|>user⏎Hi.<|im_end|>⏎<|im_start|>assistant⏎
        system[0]..........         system[1]..................    prompt...........................
    """

    first: str
    answer: str
    user: str
    prompt: str
    system: tuple[str, str] | None = None
    is_stripped: bool = False

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt after these messages. Raises: FormatError: they are more than text by turns."""
        turns, first = list(messages), self.first
        if turns and turns[0]["role"] == "system":
            if self.system is None:
                raise FormatError("has a system prompt")
            first = self._content(turns.pop(0)).join(self.system)
        if [turn["role"] for turn in turns] != ["user", *["assistant", "user"] * (len(turns) // 2)]:
            raise FormatError("has other turns than user and assistant by turns")
        text = first + self._content(turns[0])
        for answer, user in zip(turns[1::2], turns[2::2], strict=True):
            text += self.answer + self._content(answer) + self.user + self._content(user)
        return text + self.prompt

    def _content(self, message: Message) -> str:
        if message.keys() != {"role", "content"} or not isinstance(message["content"], str):
            raise FormatError("holds more than text")
        return message["content"].strip() if self.is_stripped else message["content"]

    def go_template(self) -> str:
        """The same for Ollama, which gives .Messages, all of them, and .System, the system prompts joined."""
        first, answer, user, prompt = map(_literal, (self.first, self.answer, self.user, self.prompt))
        if self.system is not None:
            before, after = map(_literal, self.system)
            first = "{{ if $.System }}" + before + "{{ $.System }}" + after + "{{ else }}" + first + "{{ end }}"
        return (
            "{{ $begun := false }}{{ range $i, $_ := .Messages }}"
            '{{ if eq .Role "user" }}'
            "{{ if $begun }}" + user + "{{ else }}" + first + "{{ end }}{{ $begun = true }}{{ .Content }}"
            "{{ if eq (len (slice $.Messages $i)) 1 }}" + prompt + "{{ end }}"
            '{{ else if eq .Role "assistant" }}' + answer + "{{ .Content }}{{ end }}{{ end }}"
        )


def _literal(text: str) -> str:
    """Text that a template of Go writes as it stands."""
    return text.replace("{", '{{ "{" }}')


def find_layout(render: Render) -> Layout:
    """Raises: FormatError: the template does not write all dialogues of user and assistant by one layout."""
    first, answer, user, prompt = _around(render, _dialogue(*MARKS[:3]))
    layout = Layout(first, answer, user, prompt)
    if not all(_is_written(layout, render, _dialogue(*"abcde"[:turns])) for turns in (1, 3, 5)):
        raise FormatError("the chat template writes dialogues of one, two and three questions by different rules")
    try:
        before, after, *rest = _around(render, _dialogue(*MARKS[:3], system=SYSTEM))
        with_system = replace(layout, system=(before, after))
        is_one = all(_is_written(with_system, render, _dialogue(*"abcde"[:turns], system="s")) for turns in (1, 3, 5))
        layout = with_system if is_one and rest == [layout.answer, layout.user, layout.prompt] else layout
    except FormatError:
        pass  # a template without system prompts
    padded = _dialogue(" a\n", "\n b ", " c ")
    return layout if _is_written(layout, render, padded) else replace(layout, is_stripped=True)


def _dialogue(*contents: str, system: str | None = None) -> list[Message]:
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


def _around(render: Render, messages: list[Message]) -> list[str]:
    """What stands before, between and after the contents. Raises: FormatError: one does not stand there once."""
    rest, parts = render(messages, prompt=True), []
    for message in messages:
        before, found, rest = rest.partition(message["content"])
        if not found or message["content"] in rest:
            raise FormatError("the chat template does not write each message once, in order")
        parts.append(before)
    return [*parts, rest]


def _is_written(layout: Layout, render: Render, messages: list[Message]) -> bool:
    return layout.render(messages) == render(messages, prompt=True)


def compare(layout: Layout, render: Render, conversations: Sequence[tuple[str, Conversation]]) -> int:
    """How many prompts there are in the conversations, each with its "file:line".

    Raises: FormatError: one is another by the layout than by the chat template.
    """
    compared = 0
    for place, (messages, tools, _) in conversations:
        for k in assistant_turns(messages):
            where = f"the prompt before message {k + 1} of {place}"
            try:
                if tools:
                    raise FormatError("shows tools")
                if not any(
                    _is_written(each, render, messages[:k]) for each in (replace(layout, is_stripped=False), layout)
                ):
                    raise FormatError("is written otherwise by the chat template")
            except FormatError as error:
                raise FormatError(f"{where} {error}") from None
            compared += 1
    return compared


# ---------------------------------------------------------------------------------------------------------------- file


def write_modelfile(
    final_model: Path,
    encoder: ChatEncoder,
    conversations: Sequence[tuple[str, Conversation]],
) -> None:
    """Writes final_model/Modelfile.

    Args: conversations: those whose prompts must come out the same, each with its "file:line".
    """
    lines = ["# For Ollama, from this folder: ollama create NAME -f Modelfile", *_from(final_model), ""]
    try:
        if encoder.native:
            raise FormatError("this model's prompts are made of token ids, not of text")
        layout = find_layout(encoder.render)
        compared = compare(layout, encoder.render, conversations)
        quoted = _quoted(_without_bos(layout, encoder.tokenizer).go_template())
        lines += [*_told(layout, compared, encoder.day), f"TEMPLATE {quoted}"]
    except FormatError as reason:
        lines += [
            f"# There is no TEMPLATE here that writes the prompts of training: {plain_text(reason)}.",
            "# Without one Ollama takes the model's own chat template or one that looks like it, by its version; serve",
            "# the model as README.md says, or see that Ollama's prompts are those of transformers.",
        ]
    lines += ["", *_system(conversations), *_parameters(final_model, encoder)]
    write_text(final_model / "Modelfile", "\n".join(lines) + "\n")


def _from(final_model: Path) -> list[str]:
    architecture = json.loads((final_model / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    if architecture in READ_BY_OLLAMA:
        return ["FROM ."]
    return [
        f"# Ollama reads no safetensors of {plain_text(architecture)}; first, with llama.cpp's script:",
        "# python convert_hf_to_gguf.py . --outfile model.gguf",
        "FROM ./model.gguf",
    ]


def _told(layout: Layout, compared: int, day: str | None) -> Iterator[str]:
    yield f"# The prompts of training, compared with the chat template on {compared:,} prompts of the data."
    if layout.system is None:
        yield "# It writes no system prompt: the chat template takes none, or puts it where this cannot."
    if layout.is_stripped:
        yield "# The chat template strips or changes white space at the ends of messages; Ollama leaves it."
    if day is not None:
        yield f"# The chat template shows the day; this shows that of training, {day}."
    yield "# Tools are not in it, nor reasoning that the chat template would take out of earlier answers."


def _without_bos(layout: Layout, tokenizer: PreTrainedTokenizerBase) -> Layout:
    """Ollama puts the token that begins a text where the tokenizer does, so the template must not.

    Raises: FormatError: it puts one where training had none.
    """
    bos = str(tokenizer.bos_token)
    if tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return layout
    if not layout.first.startswith(bos):
        raise FormatError(f"Ollama begins each prompt with {bos}, which training did not")
    system = layout.system and (layout.system[0].removeprefix(bos), layout.system[1])
    return replace(layout, first=layout.first.removeprefix(bos), system=system)


def _system(conversations: Sequence[tuple[str, Conversation]]) -> Iterator[str]:
    """The system prompt that every conversation begins with, if there is one."""
    firsts = [messages[0] for _, (messages, _, _) in conversations]
    prompt = firsts[0].get("content") if firsts else None
    if (
        isinstance(prompt, str)
        and prompt.strip()
        and all(first == {"role": "system", "content": prompt} for first in firsts)
    ):
        yield f"# The system prompt of all {len(firsts):,} conversations that were looked at."
        try:
            yield f"SYSTEM {_quoted(prompt)}"
        except FormatError as reason:
            yield f"# It is not here: {reason}."


def _parameters(final_model: Path, encoder: ChatEncoder) -> Iterator[str]:
    yield from (f"PARAMETER stop {_quoted(stop)}" for stop in encoder.stop_tokens() if stop.isprintable())
    config = json.loads((final_model / "generation_config.json").read_text(encoding="utf-8"))
    if not config.get("do_sample"):
        yield "PARAMETER temperature 0"
        return
    for key, parameter in SAMPLING.items():
        if (value := config.get(key)) is not None:
            yield f"PARAMETER {parameter} {value:g}"


def _quoted(text: str) -> str:
    """A value of a Modelfile. Raises: FormatError: the file cannot hold it."""
    if '"""' in text or not all(c.isprintable() or c in "\n\t" for c in text):
        raise FormatError('a Modelfile cannot hold """ and characters that cannot be printed')
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
