"""The steps of a run, as run_sft.py tells them in order."""

import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sft import processes
from sft.data.conversation import Conversation
from sft.data.ledger import ledger_table
from sft.data.splits import Data, first_conversations, kept_from_recipe, prepare, strange_prompts
from sft.errors import UserError
from sft.faults import memory_advice
from sft.files import write_json, writing
from sft.model.load import check_quantisation, check_targets, checkpoint_dtype, load_model, load_trained, meta_model
from sft.model.lora import add_lora
from sft.model.lora_init import changes_base
from sft.model.machine import check_machine, device_name, peak_memory_bytes, use_cpu
from sft.model.source import find_model
from sft.model.tokenizer import load_tokenizer
from sft.plain_text import PlainFormatter
from sft.processes import say
from sft.recipe import Recipe
from sft.results import export, hub, page, run_folder
from sft.results.during import ScoresDuring, more_is_better
from sft.results.evaluation import EvaluatedModel, evaluate_models, models_on_disk
from sft.results.export import describe_run
from sft.results.merge import refuse_unmergeable
from sft.results.ollama import write_modelfile
from sft.results.parity import prompts_of, prove_parity
from sft.results.sole_writer import sole_writer
from sft.results.summary import run_summary
from sft.results.words import parity_line, short_merge_line
from sft.training import arguments, check, parallel, resume, trainer
from sft.training.duration import time_line
from sft.training.memory import kept_bytes, memory_line, needs
from sft.training.stop import StopAtSignal
from sft.training.trainer import CompletionTrainer
from sft.training.triton_probe import why_triton_fails

__all__ = ["add_lora", "describe_run", "load_tokenizer"]

LOAD_ADVICE = "quantise the model (quantization_config.load_in_4bit: true), or name a smaller one"
SCORE_ADVICE = (
    "lower evaluation.batch_size or evaluation.generation.max_new_tokens; --score takes up the answers so far"
)
MERGE_ADVICE = (
    "what was saved above is kept; set export.merge: false, and merge with --export on a machine that holds the "
    "unquantised model"
)
CERTIFIED_PROMPTS = 8  # on which a merged model is compared with base and adapter


class Clock:
    """Seconds of each part of the run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begun = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._begun = round(now - self._begun, 1), now


def set_up(recipe: Recipe, debug: bool) -> None:
    """How much the libraries say, and the seed."""
    quiet(debug)
    if recipe.dataset.num_proc:
        os.environ["RAYON_NUM_THREADS"] = str(recipe.dataset.num_proc)  # read when the tokenizer first uses threads
    transformers.set_seed(recipe.seed)


def quiet(debug: bool) -> None:
    """The libraries say errors alone, or everything."""
    for library in (transformers.logging, datasets.logging):
        (library.set_verbosity_debug if debug else library.set_verbosity_error)()
        for handler in library.get_logger().handlers:  # the libraries' own write by them to the terminal
            handler.setFormatter(PlainFormatter("%(levelname)s %(name)s: %(message)s"))
    if not debug:
        warnings.filterwarnings("ignore")
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()


def join_processes(recipe: Recipe) -> None:
    """Where a launcher started several: sets up their devices, so that from here on they can talk."""
    if processes.count() > 1:
        arguments.check_training_config(recipe)


def check_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Refuses early what would fail late: a missing GPU, target modules that are not there, arguments that clash.

    Returns: the model without weights, by which disk and memory are estimated.
    """
    check_machine(recipe)
    config = arguments.check_training_config(recipe)
    if line := parallel.gpus_line(recipe):
        say(line)
    quantization = recipe.quantization_config or {}
    if quantization.get("load_in_4bit") and "bnb_4bit_quant_type" not in quantization:
        say("4 bits are fp4, bitsandbytes' default; nf4 is more exact: quantization_config.bnb_4bit_quant_type: nf4")
    more_is_better(recipe)
    check_quantisation(recipe)
    model = meta_model(recipe)
    if model.config.model_type == "chatglm" and not hasattr(tokenizer, "encode_conversation"):
        raise recipe.error("model_name_or_path", "is of ChatGLM's family but not ChatGLM3; use its -hf release")
    check_targets(recipe, model)
    if recipe.adapter_name_or_path:
        find_model(recipe.adapter_name_or_path, recipe, "adapter_name_or_path", "adapter_config.json")
    adapted = check.with_lora(recipe, model)
    arguments.check_optimizer(recipe, config, adapted)
    if isinstance(adapted, PeftModel) and recipe.export.merge:
        refuse_unmergeable(recipe, adapted)
    processes.decide(lambda: hub.check_upload(recipe))
    return model


@memory_advice("lower dataset.num_proc, or hand the machine more memory; rows are tokenised a batch at a time")
def prepare_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, packing_why: str) -> Data:
    """The data of a recipe, and its ledger on the terminal."""
    data = processes.agree(lambda: prepare(recipe, tokenizer))
    check.refuse_unknown_ids(recipe, data)
    if packing_why:
        data.ledger["packing_probe"] = packing_why
    data.ledger["samples"] = check.samples(data, tokenizer)
    data.ledger["stop_tokens"] = data.encoder.stop_tokens()
    say(ledger_table(data.ledger))
    if recipe.dataset.test is None:
        say("no dataset.test: no answers will be scored")
    if kept := kept_from_recipe(recipe):
        say(kept)
    return data


def report_check(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: Data, meta_model: PreTrainedModel) -> int:
    """What --check prints after the ledger: masks, stop token, memory, disk."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    legend = "green" if colour else "between [[ and ]]"
    for sample in data.ledger["samples"]:
        say(f"\n{sample['place']} (trained on: {legend})")
        say(check.render_pieces(sample["pieces"], colour), is_plain=True)
    say("\n" + check.stop_token_line(data, tokenizer))
    if strange := strange_prompts(data, recipe):
        say(strange)
    needed = needs(recipe, meta_model, use_cpu(recipe), data.longest)
    line, fits = memory_line(recipe, meta_model, use_cpu(recipe), needed)
    say(line)
    say(_disk_line(recipe, meta_model, data))
    say(time_line(recipe, data, meta_model, needed))
    say("the recipe can be run" if fits else "the recipe may not fit; see the memory line")
    return 0


def find_checkpoint(recipe: Recipe, description: dict[str, Any], data: Data) -> Path | None:
    """The checkpoint to go on from, by what the first process sees. Raises: UserError: see sft/training/resume.py."""
    return processes.decide(lambda: resume.find_checkpoint(recipe, description, arguments.steps(recipe, data)))


@contextmanager
def output(recipe: Recipe, description: dict[str, Any], data: Data, meta_model: PreTrainedModel) -> Iterator[None]:
    """Makes output_dir, writes what the run is, and keeps every other run out while it is open.

    Raises: UserError: it cannot be written, or another run is writing there.
    """
    processes.decide(lambda: say(_disk_line(recipe, meta_model, data)))
    put_back, is_ours = run_folder.kept(recipe.output_dir), False
    try:
        with sole_writer(recipe):
            is_ours = True
            processes.decide(lambda: _describe(recipe, description, data, meta_model))
            processes.decide(lambda: hub.check_upload(recipe, is_made=True))
            yield
    except UserError:
        if is_ours and processes.is_first():
            put_back()
        raise


def _describe(recipe: Recipe, description: dict[str, Any], data: Data, meta_model: PreTrainedModel) -> None:
    write_json(recipe.output_dir / "training_config.json", description)
    data.ledger["memory"] = kept_bytes(recipe, meta_model)
    write_json(recipe.output_dir / "data_ledger.json", data.ledger)


def _disk_line(recipe: Recipe, meta_model: PreTrainedModel, data: Data) -> str:
    """Raises: RecipeError: the disk is too small for what the run will write."""
    weights = sum(p.numel() for p in meta_model.parameters())
    return check.check_disk(recipe, weights, check.trained_weights(recipe, meta_model), arguments.steps(recipe, data))


@memory_advice(LOAD_ADVICE)
def load_for_training(recipe: Recipe) -> PreTrainedModel:
    """The base model; with FSDP its weights are read once a machine, with ZeRO-3 each process keeps its part."""
    args = arguments.training_config(recipe)  # held while the model is read: by it transformers knows of ZeRO-3
    return load_model(recipe, read_by_first=parallel.is_read_once(args))


@memory_advice(
    "lower training_args.per_device_train_batch_size (and raise gradient_accumulation_steps), set "
    "training_args.activation_checkpointing: true, lower dataset.max_length, or quantise: load_in_4bit: true"
)
def train(
    recipe: Recipe,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    checkpoint: Path | None,
) -> CompletionTrainer:
    """Trains to the end. Raises: Stopped: a signal came, and a checkpoint was saved."""
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)  # of ZeRO-3: all
    say(f"training {weights:,} weights on {'the CPU' if use_cpu(recipe) else device_name(recipe)}")
    if torch.cuda.is_available() and not use_cpu(recipe) and (why := why_triton_fails()):
        say(f"the loss is our own, which takes more memory than trl's: Triton wants a C compiler and Python.h ({why})")
    steps = arguments.steps(recipe, data)
    done = checkpoint and processes.decide(lambda: resume.is_finished(recipe, checkpoint, steps))
    finished = checkpoint if done else None
    if checkpoint is not None:
        say(f"training is finished: taking up {checkpoint}" if finished else f"going on from {checkpoint}")
    processes.decide(lambda: resume.remove_unfinished(recipe.output_dir))
    conversations = data.validation_conversations
    scores = ScoresDuring(recipe, data.encoder, conversations) if recipe.evaluation.every else None
    with StopAtSignal() as stop:
        trained = trainer.make_trainer(recipe, model, tokenizer, data, [stop], scores)
        if scores is not None and scores.more_is_better is not None:
            trained.args.greater_is_better = scores.more_is_better
        if finished:
            trained.take_up(finished)
        else:
            trained.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop.agree():
            processes.decide(lambda: _stop(stop, recipe))
    if not finished or not resume.has_log(recipe.output_dir, trained.state.global_step):
        trained.save_state()
    return trained


def _stop(stop: StopAtSignal, recipe: Recipe) -> None:
    raise stop.stopped(recipe.output_dir)


@memory_advice(MERGE_ADVICE)
def save(
    recipe: Recipe,
    trained: CompletionTrainer,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    description: dict[str, Any],
) -> None:
    """lora_adapter/ and final_model/: every process adds its part of the weights, and the first does the rest.

    Notes in `description` how far the merged model is from base and adapter.
    """
    folder = export.staging(recipe)
    has_lora = hasattr(trained.accelerator.unwrap_model(trained.model), "peft_config")
    trained.refuse_broken_weights()
    processes.decide(lambda: shutil.rmtree(folder, ignore_errors=True))
    try:
        if has_lora or trained.is_sharded:
            processes.agree(lambda: _save_whole(trained, folder))
        processes.decide(lambda: _publish(recipe, trained, tokenizer, data, description, has_lora))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save_whole(trained: CompletionTrainer, folder: Path) -> None:
    with writing(folder.parent):
        trained.save_whole(folder)


def _publish(
    recipe: Recipe,
    trained: CompletionTrainer,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    description: dict[str, Any],
    has_lora: bool,
) -> None:
    if has_lora:
        say(f"saved {export.save_adapter(recipe)}")
        if recipe.export.merge:
            merge(recipe, tokenizer, data, description)
        return
    if trained.is_sharded:
        model: Any = load_trained(recipe, export.staging(recipe))
    else:
        model = trained.accelerator.unwrap_model(trained.model, keep_fp32_wrapper=False)
    model.to(checkpoint_dtype(recipe))
    say(f"saved {export.save_final_model(recipe, tokenizer, data.encoder.stop_ids, model)}")


def merge(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: Data, description: dict[str, Any]) -> None:
    """final_model/ from lora_adapter/, compared on the first prompts; notes in `description` what came of it.

    Raises: ModelError: it is not base and adapter, and is not kept.
    """
    prompts = [prompt.ids for prompt in islice(prompts_of(data.encoder, _shown(recipe, data)), CERTIFIED_PROMPTS)]
    description["merge"] = export.save_merged_model(recipe, tokenizer, data.encoder.stop_ids, prompts)
    say(f"saved {recipe.output_dir / 'final_model'}: {short_merge_line(description['merge'])}")


def _shown(recipe: Recipe, data: Data) -> Sequence[tuple[str, Conversation]]:
    """The conversations on which an export is checked: of the test split, or the first rows that were trained on."""
    return data.test_conversations or first_conversations(data.files, recipe)


def check_parity(recipe: Recipe, description: dict[str, Any], data: Data) -> None:
    """Proves that a server renders final_model/ as it was trained, and notes it in `description` and its files.

    On the prompts of the test split; without one, on those of the first rows that were trained on.
    Raises: ModelError: a difference, and where.
    """
    if recipe.export.merge or recipe.trains_all_weights:
        processes.decide(lambda: _check_parity(recipe, description, data))


def _check_parity(recipe: Recipe, description: dict[str, Any], data: Data) -> None:
    final_model = recipe.output_dir / "final_model"
    description["parity"] = prove_parity(final_model, data.encoder, _shown(recipe, data))
    for folder in (recipe.output_dir, final_model):
        write_json(folder / "training_config.json", description)
    say(parity_line(description["parity"]))
    # Of the training files too, whose system prompt may be another than that of the test split.
    write_modelfile(final_model, data.encoder, [*_shown(recipe, data), *first_conversations(data.files, recipe)])


@memory_advice(SCORE_ADVICE)
def score(recipe: Recipe, data: Data, trained: CompletionTrainer) -> None:
    """Scores base and tuned on the test split and on general rows; each process answers its share.

    Without a test split only LoRA's loss on general rows is measured, and where that takes no second model.
    """
    from_disk = trained.is_sharded or recipe.evaluation.model == "final" or changes_base(recipe.lora_config or {})
    if not data.test_conversations and (not data.general or from_disk or recipe.trains_all_weights):
        return
    if from_disk:
        trained.free_memory(model=True)
        evaluate_models(recipe, data.encoder, data.test_conversations, models_on_disk(recipe), data.general)
        return
    trained.free_memory(model=False)
    # Without the autocast that training put around forward: --score, later, has none.
    model: Any = trained.accelerator.unwrap_model(trained.model, keep_fp32_wrapper=False)
    digest = processes.decide(lambda: export.weights_digest(recipe))
    if hasattr(model, "disable_adapter"):
        base, adapter_on = model, False
    else:
        base, adapter_on = load_model(recipe, training=False), True
        base.to(model.device)
        model.to(base.dtype)
    models = [
        EvaluatedModel("base", base, adapter_on, recipe.model_name_or_path),
        EvaluatedModel("tuned", model, True, digest),
    ]
    evaluate_models(recipe, data.encoder, data.test_conversations, models, data.general)


def finish(recipe: Recipe, description: dict[str, Any], clock: Clock, checkpoint: Path | None) -> None:
    """The page and the model cards, the summary on the terminal, and the upload, if one is wanted.

    Args: checkpoint: the one that this start went on from.
    """
    if not processes.is_first():
        return
    memory = {"peak_memory_bytes": peak_memory_bytes(), "peak_gpu_memory_bytes": None}
    if torch.cuda.is_available():
        memory["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    config = {**description, "resources": {"seconds": clock.seconds, **memory}}
    if checkpoint is not None:
        config["resources"]["since"] = checkpoint.name
    write_json(recipe.output_dir / "training_config.json", config)
    page.write_report(recipe.output_dir)
    say(run_summary(recipe.output_dir))
    hub.upload(recipe)
