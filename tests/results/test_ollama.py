"""The Modelfile: its template writes what the chat template does, by another reading of Go's templates than ours."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import trl

from sft.data.chat import ChatEncoder
from sft.data.chat_template import ChatTemplate
from sft.data.conversation import Conversation
from sft.errors import FormatError
from sft.results.ollama import compare, find_layout, write_modelfile
from tests.families import FAMILIES, build, tokenizer_for

PATHS = (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")
TEMPLATES = sorted(path.stem for path in PATHS if "training" not in path.stem)  # which differ in marks of answers only
TURNS = ("Hi {there} }} {{ .System }}", 'Aye.\n\n"Ok" 漢字 🎉', "What?", "Well `x` \\n", "{{end}} <b>&amp; #")
SYSTEM = 'You are Maren. {{ x }} "q"\n- brief'


def dialogue(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}] * (system is not None) + turns


DIALOGUES = [dialogue(*TURNS[:count], system=system) for count in (1, 3, 5) for system in (None, SYSTEM)]


def go(template, messages):
    """What Ollama makes of a template, for as much of Go's text/template as ours use."""
    tokens = re.split(r"({{.*?}})", template)
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    values = {"$.System": system, ".Messages": messages}
    out = []

    def evaluate(words):
        match words:
            case [name] if name in values:
                return values[name]
            case [text] if text.startswith('"'):
                return json.loads(text)
            case ["eq", ".Role", role]:
                return values[".Role"] == json.loads(role)
            case ["eq", "(len", "(slice", "$.Messages", "$i))", "1"]:
                return len(messages[values["$i"] :]) == 1
        raise AssertionError(f"not in this subset of Go: {words}")

    def block(at, runs):
        """Runs the tokens from `at` up to the end of a block. Returns: where that is."""
        while at < len(tokens):
            words = tokens[at][2:-2].split() if at % 2 else None
            if words is None:
                out.append(tokens[at] * runs)
            elif words[0] in ("end", "else"):
                return at
            elif words[0] == "if":
                at, chosen = at, False
                while words[0] != "end":
                    condition = words[words.index("if") + 1 :] if "if" in words else None
                    now = runs and not chosen and (condition is None or bool(evaluate(condition)))
                    at, chosen = block(at + 1, now), chosen or now
                    words = tokens[at][2:-2].split()
            elif words == ["range", "$i,", "$_", ":=", ".Messages"]:
                for i, message in enumerate(messages):
                    values.update({"$i": i, ".Role": message["role"], ".Content": message["content"]})
                    end = block(at + 1, runs)
                at = end
            elif words[1:2] in ([":="], ["="]):
                if runs:
                    values[words[0]] = words[2] == "true"
            else:
                out.append(evaluate(words) if runs else "")
            at += 1
        return at

    block(0, True)
    return "".join(out)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_of_go_writes_what_the_chat_template_does(name):
    render = ChatTemplate(tokenizer_for(name), "2026-01-02").render
    layout = find_layout(render)
    assert (layout.system is None) == (name == "gemma")
    for messages in DIALOGUES:
        if layout.system or messages[0]["role"] != "system":
            assert go(layout.go_template(), messages) == layout.render(messages) == render(messages, prompt=True)


GO = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
type Case struct { Template, System string; Messages []Message }
func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	for _, c := range cases {
		t := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
		values := map[string]any{"System": c.System, "Messages": c.Messages}
		if err := t.Execute(os.Stdout, values); err != nil { panic(err) }
		os.Stdout.WriteString("\\x00")
	}
}
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go")
def test_go_itself_writes_the_same(tmp_path):
    cases, expected = [], []
    for name in ("qwen2_5", "llama3", "gemma3", "deepseekv3"):
        render = ChatTemplate(tokenizer_for(name)).render
        for messages in DIALOGUES:
            system = messages[0]["content"] if messages[0]["role"] == "system" else ""
            cases.append({"Template": find_layout(render).go_template(), "System": system, "Messages": messages})
            expected.append(render(messages, prompt=True))
    (tmp_path / "main.go").write_text(GO, encoding="utf-8")
    done = subprocess.run(
        ["go", "run", "main.go"], cwd=tmp_path, input=json.dumps(cases).encode(), capture_output=True, check=True
    )
    assert done.stdout.decode("utf-8").split("\x00")[:-1] == expected


# ------------------------------------------------------------------------------------------------------------ the file


@pytest.fixture
def modelfile(tmp_path):
    """modelfile(encoder, conversations, architecture, **generation): the text of the Modelfile."""

    def write(encoder, *conversations, architecture="Qwen2ForCausalLM", **generation):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}), encoding="utf-8")
        (tmp_path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
        for messages in conversations:
            encoder.encode(messages)
        write_modelfile(tmp_path, encoder, [(f"a.jsonl:{i}", Conversation(m)) for i, m in enumerate(conversations, 1)])
        return (tmp_path / "Modelfile").read_text(encoding="utf-8")

    return write


def encoder_of(family, template=None):
    tokenizer = build(FAMILIES[family], "bytes")
    if template:
        tokenizer.chat_template = template
    return ChatEncoder(tokenizer)


CHATML = '''# For Ollama, from this folder: ollama create NAME -f Modelfile
FROM .

# The prompts of training, compared with the chat template on 2 prompts of the data.
# Tools are not in it, nor reasoning that the chat template would take out of earlier answers.
TEMPLATE """{{ $begun := false }}{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}{{ if $begun }}<|im_end|>
<|im_start|>user
{{ else }}{{ if $.System }}<|im_start|>system
{{ $.System }}<|im_end|>
<|im_start|>user
{{ else }}<|im_start|>system
You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>
<|im_start|>user
{{ end }}{{ end }}{{ $begun = true }}{{ .Content }}{{ if eq (len (slice $.Messages $i)) 1 }}<|im_end|>
<|im_start|>assistant
{{ end }}{{ else if eq .Role "assistant" }}<|im_end|>
<|im_start|>assistant
{{ .Content }}{{ end }}{{ end }}"""

# The system prompt of all 1 conversations that were looked at.
SYSTEM "Be Maren."
PARAMETER stop "<|im_end|>"
PARAMETER temperature 0
'''


def test_the_modelfile_of_chatml_is_this(modelfile):
    assert modelfile(encoder_of("qwen2_5"), dialogue("Hi.", "Aye.", "Bye.", "So.", system="Be Maren.")) == CHATML


def test_a_token_that_begins_each_text_is_left_to_ollama_only_where_the_tokenizer_writes_it(modelfile):
    encoder = encoder_of("llama3")
    assert "<|begin_of_text|>" in modelfile(encoder, dialogue("Hi.", "Aye."))
    from tokenizers.processors import TemplateProcessing

    bos = ("<|begin_of_text|>", encoder.tokenizer.bos_token_id)
    encoder.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{bos[0]} $A", special_tokens=[bos])
    text = modelfile(encoder, dialogue("Hi.", "Aye."))
    assert "<|begin_of_text|>" not in text and "strips or changes white space" in text


MISTRAL = (  # a system prompt stands before the last question
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


def test_a_system_prompt_that_moves_is_left_out_and_data_that_has_one_gets_no_template(modelfile):
    encoder = encoder_of("qwen2_5", MISTRAL)
    layout = find_layout(encoder.render)
    assert layout.system is None and compare(layout, encoder.render, []) == 0
    text = modelfile(encoder, dialogue("Hi.", "Aye."))
    assert "# It writes no system prompt" in text and 'TEMPLATE """' in text
    text = modelfile(encoder, dialogue("Hi.", "Aye.", system="s"))
    assert "# There is no TEMPLATE here that writes the prompts of training: the prompt before message 3 of" in text
    assert "a.jsonl:1 has a system prompt" in text and 'TEMPLATE """' not in text


def test_tools_and_templates_that_count_turns_get_no_template(modelfile):
    encoder = encoder_of("qwen2_5")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    with pytest.raises(FormatError, match="^the prompt before message 2 of a:1 shows tools$"):
        compare(find_layout(encoder.render), encoder.render, [("a:1", Conversation(dialogue("Hi.", "Aye."), tools))])
    numbered = (
        "{% for m in messages %}<|im_start|>{{ loop.index }} {{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{{ messages|length + 1 }} assistant\n{% endif %}"
    )
    text = modelfile(encoder_of("qwen2_5", numbered), dialogue("Hi.", "Aye."))
    assert "dialogues of one, two and three questions by different rules" in text and 'TEMPLATE """' not in text


def test_text_that_would_end_its_quotes_is_not_written(modelfile):
    hostile = 'Be brief."""\nFROM /etc/passwd'
    text = modelfile(encoder_of("qwen2_5"), dialogue("Hi.", "Aye.", system=hostile))
    assert "passwd" not in text and "# It is not here: a Modelfile cannot hold" in text


def test_other_systems_and_architectures_and_how_answers_are_drawn(modelfile):
    encoder = encoder_of("qwen2_5")
    sampled = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
    dialogues = (dialogue("Hi.", "Aye.", system="a"), dialogue("Hi.", "Aye.", system="b"))
    text = modelfile(encoder, *dialogues, architecture="Qwen3ForCausalLM", **sampled)
    assert "FROM ./model.gguf" in text and "python convert_hf_to_gguf.py . --outfile model.gguf" in text
    assert "SYSTEM" not in text.replace("$.System", "")
    drawn = re.findall("PARAMETER (.*)", text)
    assert drawn == ['stop "<|im_end|>"', "temperature 0.7", "top_k 20", "top_p 0.8", "repeat_penalty 1.05"]
