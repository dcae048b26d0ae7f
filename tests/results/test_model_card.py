"""The model cards: what a hub reads of them, what a reader sees, and what they keep to themselves."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from sft.results.model_card import write_cards
from sft.results.run_folder import read_run
from tests.results.runs import Page, config, write_hostile_run, write_run


@pytest.fixture
def cards(tmp_path, monkeypatch):
    """cards(write, **files): the texts of both cards of a run, which lies in the working directory."""
    monkeypatch.chdir(tmp_path)

    def made(write, **files):
        for name in ("lora_adapter", "final_model"):
            Path("keeper", name).mkdir(parents=True)
        write_cards(read_run(write(Path("keeper"), **files)))
        return [
            Path("keeper", name, "README.md").read_text(encoding="utf-8") for name in ("lora_adapter", "final_model")
        ]

    return made


def parity():
    return {"prompts": 38, "trained_stops": {"<|im_end|>": 2}, "stops": {"<|im_end|>": 2}}


def test_a_hub_reads_base_scores_and_tags(cards):
    adapter, model = (ModelCard(text, ignore_metadata_errors=False).data for text in cards(write_run))
    assert (adapter.library_name, model.library_name) == ("peft", "transformers")
    assert model.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and model.license is None
    assert model.pipeline_tag == "text-generation" and "lora" in model.tags and model.model_name == "keeper"
    chrf, length, stop_rate = model.eval_results  # perplexity could not be computed
    assert (chrf.metric_type, round(chrf.metric_value, 1)) == ("chrf", 87.5)
    assert (chrf.dataset_name, chrf.dataset_type, chrf.dataset_split) == ("test.jsonl", "test.jsonl", "test")
    assert {key: round(chrf.metric_args[key]) for key in ("rows", "low", "high", "before")} == {
        "rows": 38, "low": 83, "high": 90, "before": 17
    }  # fmt: skip


def test_a_reader_is_told_how_to_serve_each(cards):
    adapter, model = cards(write_run, training_config=config(parity=parity()), data_ledger={"files": []})
    assert "vllm serve keeper/final_model\n" in model and "-f keeper/final_model/Modelfile" in model
    assert "python convert_hf_to_gguf.py keeper/final_model --outfile keeper.gguf" in model
    assert "Answers end with \\<\\|im\\_end\\|\\> (2); `generation_config.json`" in model
    line = "--enable-lora --lora-modules keeper=keeper/lora_adapter --max-lora-rank 16\n"
    assert f"vllm serve HuggingFaceTB/SmolLM2-135M-Instruct {line}" in adapter
    assert '"stop_token_ids": [2]' in adapter and "Nothing was measured" in adapter


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"r": 17}, "--max-lora-rank 32\n"),
        ({"r": 8, "use_dora": True}, "vLLM serves no adapter with use\\_dora; serve the merged model instead."),
    ],
)
def test_what_vllm_takes_of_an_adapter(cards, lora, words):
    recipe = config()["recipe"] | {"lora_config": lora}
    assert words in cards(write_run, training_config=config(recipe=recipe))[0]


def test_what_is_uploaded_is_named_as_it_lies_on_the_hub(cards):
    recipe = config()["recipe"] | {"export": {"merge": True, "push_to_hub": "maren/keeper"}}
    adapter, model = cards(write_run, training_config=config(recipe=recipe))
    assert "vllm serve maren/keeper\n" in model and "keeper=keeper/lora_adapter" in adapter


def test_a_layout_that_no_plain_server_reads_says_so(cards):
    model = cards(write_run, training_config=config(parity={"not_checked": "the layout chatglm is the vendor's"}))[1]
    assert "the layout chatglm is the vendor's" in model and "vllm serve" not in model


def test_hostile_text_is_text_in_the_card_and_in_its_front_matter(cards):
    for text in cards(write_hostile_run):
        data = ModelCard(text, ignore_metadata_errors=False).data
        assert data.base_model is None and len(data.eval_results) == 8
        Path("card.html").write_text(
            MarkdownIt("gfm-like", {"linkify": False}).render(ModelCard(text).text), encoding="utf-8"
        )
        page = Page(Path("card.html"))
        wanted = {
            "h1",
            "h2",
            "p",
            "pre",
            "code",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "ul",
            "li",
            "strong",
            "hr",
        }
        assert set(page.tags) <= wanted and {name for name, _ in page.attributes} <= {"class"}
        assert "<script>document.title='ran'</script>" in page.words and "\x1b" not in text and "\0" not in text


def test_no_absolute_path_is_in_a_card(cards, tmp_path):
    base = tmp_path / "secret_home" / "SmolLM2"
    base.mkdir(parents=True)
    recipe = config()["recipe"] | {
        "model_name_or_path": str(base),
        "output_dir": str(tmp_path / "keeper"),
        "dataset": {"train": [{"path": str(tmp_path / "my_data" / "train.jsonl")}]},
    }
    file = {"split": "train", "path": str(tmp_path / "my_data" / "train.jsonl"), "rows": 2, "used": 1, "tokens": 9}
    file |= {"supervised_share": 0.5, "dropped": {"bad row": [2]}, "trimmed": [], "notes": {}}
    for text in cards(write_run, training_config=config(recipe=recipe), data_ledger={"files": [file]}):
        assert str(tmp_path) not in text and "secret_home" not in text and "my_data" not in text
        assert "| train | train.jsonl | 2 | 1 | 9 | 50% |" in text and "train.jsonl: 1 dropped for bad row" in text
        assert ModelCard(text).data.base_model is None


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (None, "unknown."),
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0."),
        ("---\nlicense: other\nlicense_name: sea-1.0\n---\n", "sea-1.0."),
        ("---\n: [\n---\n", "unknown (its card cannot be read)."),
    ],
)
def test_the_base_models_license_is_that_of_its_card_and_the_own_one_is_left_open(cards, tmp_path, card, words):
    base = tmp_path / "base"
    base.mkdir()
    if card is not None:
        (base / "README.md").write_text(card, encoding="utf-8")
    recipe = config()["recipe"] | {"model_name_or_path": "base"}
    text = cards(write_run, training_config=config(recipe=recipe))[1]
    assert f"The base model's is, by its card: {words} The data" in text and ModelCard(text).data.license is None
