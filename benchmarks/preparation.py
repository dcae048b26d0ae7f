"""Conversations a second from file to saved data set, without a cache, beside trl's own path on the same rows.

    python benchmarks/preparation.py MODEL_FOLDER [--rows 33000] [--large 1000000]

MODEL_FOLDER holds a Qwen2.5 tokenizer. The rows are made here: short Chinese dialogues of the length of chat data, with
a seed. Each measurement is a process of its own; memory is the most that it held, less what it held before the first
row.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
LETTERS = (
    "的一是了我不人在他有这个上们来到时大地为子中你说生国年着就那和要她出也得里后自"
    "以会家可下而过天去能对小多然于心学么之都好看起发当没成只如事把还用第样道想作种开"
)
WORDS = [
    "今天",
    "天气",
    "怎么样",
    "喜欢",
    "我们",
    "知道",
    "什么",
    "可以",
    "时候",
    "觉得",
    "朋友",
    "谢谢",
    "没有",
    "一起",
    "学习",
    "工作",
]


def write_rows(path: Path, count: int) -> None:
    random_ = random.Random(0)

    def sentence(low: int, high: int) -> str:
        pieces = [
            random_.choice(WORDS if random_.random() < 0.6 else LETTERS) for _ in range(random_.randint(low, high))
        ]
        return "".join(pieces) + random_.choice("。！？~")

    with open(path, "w", encoding="utf-8") as stream:
        for _ in range(count):
            turns = [
                {"human": sentence(2, 10), "assistant": sentence(5, 18)} for _ in range(random_.choice([1, 1, 1, 2]))
            ]
            row = {"system": "你是一个名为沐雪的可爱AI女孩子", "conversation": turns}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def ours(folder: str, data: str) -> None:
    import datasets
    from transformers import AutoTokenizer

    from sft.data.chat import ChatEncoder
    from sft.data.token_cache import tokenise_file
    from sft.recipe import Source, load_recipe

    with tempfile.TemporaryDirectory() as scratch:
        datasets.config.HF_DATASETS_CACHE = scratch
        recipe_file = Path(scratch) / "recipe.yaml"
        recipe_file.write_text(
            f"model_name_or_path: {folder}\noutput_dir: {scratch}/out\ndataset: {{train: {data}}}\n", encoding="utf-8"
        )
        recipe = load_recipe(recipe_file)
        encoder = ChatEncoder(AutoTokenizer.from_pretrained(folder))
        before, begun = peak(), time.perf_counter()
        file = tokenise_file(Path(data), Source("x"), encoder, recipe)
        seconds = time.perf_counter() - begun
        report("this repository", len(file.rows), seconds, peak() - before, file.facts["tokens"])


def bare(folder: str, data: str) -> None:
    """The tokenizer's own Rust code alone, on texts that are rendered already: the limit of any path."""
    from transformers import AutoTokenizer

    from formats.conversation import to_messages

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [to_messages(json.loads(line)) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    texts = tokenizer.apply_chat_template(rows, tokenize=False)
    before, begun = peak(), time.perf_counter()
    tokens = 0
    for i in range(0, len(texts), 1000):
        tokens += sum(
            len(e) for e in tokenizer.backend_tokenizer.encode_batch_fast(texts[i : i + 1000], add_special_tokens=False)
        )
    report("bare Rust encoder", len(texts), time.perf_counter() - begun, peak() - before, tokens)


def trls(folder: str, data: str) -> None:
    import datasets
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    from trl import SFTConfig, SFTTrainer

    from formats.conversation import to_messages

    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    with tempfile.TemporaryDirectory() as scratch:
        config = SFTConfig(
            scratch, assistant_only_loss=True, use_cpu=True, bf16=False, dataset_num_proc=2, report_to="none"
        )
        before, begun = peak(), time.perf_counter()
        rows = [
            {"messages": to_messages(json.loads(line))} for line in Path(data).read_text(encoding="utf-8").splitlines()
        ]
        trainer = SFTTrainer(model, config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train_dataset.save_to_disk(f"{scratch}/rows")
        seconds = time.perf_counter() - begun
    report("trl 1.16 (assistant_only_loss)", len(rows), seconds, peak() - before, 0)


def report(name: str, rows: int, seconds: float, memory: int, tokens: int) -> None:
    each = f"{tokens / rows:5.1f} tokens each" if tokens else ""
    print(
        f"{name:32} {rows:>9,} rows {rows / seconds:>9,.0f} a second  {memory / 2**20:>7,.0f} MiB  {each}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_folder")
    parser.add_argument("--rows", type=int, default=33_000)
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--only", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        {"ours": ours, "bare": bare, "trl": trls}[options.only[0]](options.model_folder, options.only[1])
        return
    with tempfile.TemporaryDirectory() as scratch:
        small, large = Path(scratch) / "small.jsonl", Path(scratch) / "large.jsonl"
        write_rows(small, options.rows)
        runs = [("bare", small), ("ours", small), ("ours", small), ("ours", small), ("trl", small)]
        if options.large:
            write_rows(large, options.large)
            runs.append(("ours", large))
        for name, data in runs:
            subprocess.run([sys.executable, __file__, options.model_folder, "--only", name, str(data)], check=True)


if __name__ == "__main__":
    main()
