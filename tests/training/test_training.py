"""What a training step computes: packing, accumulation, the loss off the GPU, 4-bit weights on a CPU."""

import gc
import shutil
import weakref
from contextlib import nullcontext

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM, TrainerCallback

from sft.data.collator import DataCollatorForCompletionOnlyLM
from sft.data.packing import best_fit, pack
from sft.data.splits import Data
from sft.errors import UserError
from sft.model.load import load_model
from sft.model.lora import add_lora
from sft.model.tokenizer import load_tokenizer
from sft.recipe import load_recipe
from sft.training import attention
from sft.training import trainer as trainer_module
from sft.training.trainer import CompletionTrainer, make_trainer

RECIPE = """
model_name_or_path: {model}
output_dir: {folder}/out
dataset: {{train: unused.jsonl, max_length: 64, packing: false}}
model_init: {{dtype: float32}}
training_args:
  max_steps: 1
  bf16: false
  gradient_checkpointing: false
  learning_rate: 1e-2
  lr_scheduler_type: constant
  save_strategy: "no"
  disable_tqdm: true
"""
LENGTHS = [5, 17, 9, 30, 12, 7, 21, 3]


def token_rows():
    """Eight rows of unequal length; the second half of each carries loss."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1000, 2000, (n,), generator=generator).tolist() for n in LENGTHS]
    masks = [[0] * (n // 2) + [1] * (n - n // 2) for n in LENGTHS]
    return datasets.Dataset.from_dict({"input_ids": ids, "assistant_mask": masks})


@pytest.fixture
def recipe(small_qwen, tmp_path):
    def make(*overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(model=small_qwen, folder=tmp_path), encoding="utf-8")
        return load_recipe(path, overrides)

    return make


def gradients(model, batch):
    model.zero_grad()
    count = (batch["labels"][:, 1:] != -100).sum()
    loss = CompletionTrainer.compute_loss(_Plain(), model, batch, num_items_in_batch=count)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class _Plain:
    """What compute_loss reads of a trainer."""

    _is_plain_loss = True
    _takes_trls_loss = CompletionTrainer._takes_trls_loss

    _logits_as_computed = nullcontext

    class args:
        average_tokens_across_devices = False


def test_packed_rows_give_the_loss_and_gradients_of_the_same_rows_apart(small_qwen):
    tokenizer = AutoTokenizer.from_pretrained(small_qwen)
    collate = DataCollatorForCompletionOnlyLM(tokenizer=tokenizer)
    model = AutoModelForCausalLM.from_pretrained(small_qwen, dtype=torch.float32).train()
    rows = token_rows()
    apart = collate([rows[i] for i in range(len(rows))])
    packed_rows = pack(rows, 64)
    assert len(packed_rows) == 2
    packed = collate([packed_rows[i] for i in range(len(packed_rows))])
    loss_apart, grads_apart = gradients(model, apart)
    loss_packed, grads_packed = gradients(model, packed)
    assert abs(loss_apart - loss_packed) < 1e-5
    assert max((grads_apart[n] - grads_packed[n]).abs().max().item() for n in grads_apart) < 1e-5
    leaking = dict(packed, attention_mask=torch.ones_like(packed["input_ids"]))
    loss_leaking, _ = gradients(model, leaking)
    assert abs(loss_leaking - loss_apart) > 1e-4, "with a mask of ones the rows leak, and this test would see it"


def test_loss_off_the_gpu_is_the_one_of_trls_fused_head(recipe, small_qwen):
    made = recipe()
    tokenizer, model = load_tokenizer(made), load_model(made)
    trainer = make_trainer(made, model, tokenizer, Data(None, token_rows()))
    batch = trainer.data_collator([token_rows()[i] for i in range(4)])
    count = (batch["labels"][:, 1:] != -100).sum()
    results = []
    for compute in (trainer.compute_loss, super(CompletionTrainer, trainer).compute_loss):
        model.zero_grad()
        loss = compute(model, dict(batch), num_items_in_batch=count)
        loss.backward()
        results.append((loss.item(), model.model.layers[0].mlp.up_proj.weight.grad.clone()))
    assert abs(results[0][0] - results[1][0]) < 1e-5
    assert (results[0][1] - results[1][1]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("why", "device", "trls"), [(None, "cuda", True), ("no gcc", "cuda", False), (None, "cpu", False)]
)
def test_the_loss_is_trls_on_a_gpu_where_triton_runs(monkeypatch, why, device, trls):
    monkeypatch.setattr(trainer_module, "why_triton_fails", lambda: why)
    assert _Plain()._takes_trls_loss(device) == trls


def test_one_by_eight_accumulated_equals_eight_by_one(recipe):
    weights = []
    for size, steps in ((1, 8), (8, 1)):
        made = recipe(
            f"training_args.per_device_train_batch_size={size}",
            f"training_args.gradient_accumulation_steps={steps}",
            "training_args.optim=sgd",
        )
        model = load_model(made)
        trainer = make_trainer(made, model, load_tokenizer(made), Data(None, token_rows()))
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    start = {name: p for name, p in load_model(recipe()).named_parameters()}
    assert max((weights[0][n] - start[n]).abs().max().item() for n in start) > 1e-4, "the step did something"
    assert max((weights[0][n] - weights[1][n]).abs().max().item() for n in start) < 1e-5


@pytest.mark.parametrize("path", ["ours", "trl"])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_a_run_of_packed_rows_makes_the_step_of_the_same_rows_apart(recipe, monkeypatch, path, checkpointing):
    """Eight conversations, in two rows of one batch: weights and validation loss after a step of plain SGD."""
    if path == "trl":  # what runs on a GPU
        monkeypatch.setattr(CompletionTrainer, "_is_plain_loss", False)
    rows, used, weights, losses = token_rows(), [], [], []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            used.append(model.config._attn_implementation)

    for data in (Data(None, rows, rows), Data(None, pack(rows, 64), pack(rows, 64))):
        made = recipe(
            f"training_args.per_device_train_batch_size={len(data.train)}",
            "training_args.optim=sgd",
            f"training_args.gradient_checkpointing={checkpointing}",
            "dataset.validation=unused.jsonl",
        )
        model = load_model(made)
        trainer = make_trainer(made, model, load_tokenizer(made), data, [Look()])
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        assert model.config._attn_implementation == "sdpa"
    start = {name: p for name, p in load_model(recipe()).named_parameters()}
    assert used == [attention.NAME, attention.NAME]
    assert max((weights[0][n] - start[n]).abs().max().item() for n in start) > 1e-4, "the step did something"
    assert max((weights[0][n] - weights[1][n]).abs().max().item() for n in start) < 1e-5
    assert abs(losses[0] - losses[1]) < 1e-4


def test_the_validation_loss_is_of_all_its_tokens_whatever_the_batch(recipe):
    """Rows of 3 to 30 tokens: a mean over batches of three would differ from one over batches of one."""
    rows, losses = token_rows(), []
    for size in (1, 3, 8):
        made = recipe(f"training_args.per_device_eval_batch_size={size}", "dataset.validation=unused.jsonl")
        trainer = make_trainer(made, load_model(made), load_tokenizer(made), Data(None, rows, rows))
        losses.append(trainer.evaluate()["eval_loss"])
    assert abs(losses[0] - losses[1]) < 1e-5 and abs(losses[0] - losses[2]) < 1e-5


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_last_good_checkpoint(recipe):
    made = recipe(
        "training_args.max_steps=5",
        "training_args.learning_rate=1e15",
        "training_args.optim=sgd",
        "training_args.max_grad_norm=0",
    )
    trainer = make_trainer(made, load_model(made), load_tokenizer(made), Data(None, token_rows()))
    good = made.output_dir / "checkpoint-1"
    good.mkdir(parents=True)
    (good / "trainer_state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"the loss is (nan|inf) in step [2-5]; .*checkpoint-1 is from before it"):
        trainer.train()


def test_weights_that_are_no_numbers_are_never_saved_as_a_checkpoint(recipe):
    made = recipe("training_args.max_steps=1", "training_args.save_strategy=steps", "training_args.save_steps=1")
    model = load_model(made)

    class Overflow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            next(model.parameters()).data.view(-1)[0] = float("inf")

    trainer = make_trainer(made, model, load_tokenizer(made), Data(None, token_rows()), [Overflow()])
    with pytest.raises(UserError, match="weights are no numbers any more after step 1; no checkpoint was saved before"):
        trainer.train()
    assert not list(made.output_dir.glob("checkpoint-*"))


def test_the_optimizer_is_let_go_of_after_training_and_the_model_where_it_is_read_again(recipe):
    made = recipe("lora_config={r: 4, target_modules: [q_proj]}")
    trainer = make_trainer(made, add_lora(load_model(made), made), load_tokenizer(made), Data(None, token_rows()))
    trainer.train()
    moments, model = (weakref.ref(each) for each in (trainer.optimizer, trainer.model))
    trainer.free_memory(model=False)
    gc.collect()
    assert moments() is None and model() is not None
    trainer.free_memory(model=True)
    gc.collect()
    assert model() is None


def test_packed_rows_of_a_model_that_would_let_them_see_each_other_are_refused(recipe, small_qwen, tmp_path):
    folder = tmp_path / "bloom"
    BloomForCausalLM(BloomConfig(vocab_size=2048, hidden_size=16, n_head=2, n_layer=1)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(small_qwen).save_pretrained(folder)
    rows = pack(token_rows(), 64)
    made = recipe(f"model_name_or_path={folder}", "dataset.packing=true")
    model, tokenizer = load_model(made), load_tokenizer(made)
    with pytest.raises(UserError, match="BloomForCausalLM lets the conversations of a packed row see each other; set"):
        make_trainer(made, model, tokenizer, Data(None, rows))
    unpacked = make_trainer(recipe(f"model_name_or_path={folder}"), model, tokenizer, Data(None, token_rows()))
    assert "attention_mask" in unpacked.data_collator([token_rows()[i] for i in range(2)]), "it is padded"


@pytest.mark.parametrize("overrides, padded", [([], False), (["training_args.neftune_noise_alpha=5"], True)])
def test_batches_of_unpacked_rows_have_padding_only_where_a_method_goes_by_it(recipe, overrides, padded):
    made = recipe("training_args.per_device_train_batch_size=2", *overrides)
    trainer = make_trainer(made, load_model(made), load_tokenizer(made), Data(None, token_rows()))
    rows = [token_rows()[i] for i in range(2)]
    batch = trainer.data_collator(rows)
    longest, together = max(len(row["input_ids"]) for row in rows), sum(len(row["input_ids"]) for row in rows)
    assert tuple(batch["input_ids"].shape) == ((2, longest) if padded else (1, together))
    assert ("cu_seq_lens_q" in batch) is not padded


def test_every_lora_b_trains_in_4_bits_after_an_evaluation(recipe):
    made = recipe(
        "quantization_config={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_compute_dtype: bfloat16}",
        "lora_config={r: 4, target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]}",
        "training_args.bf16=true",
        "dataset.validation=unused.jsonl",
    )
    model = add_lora(load_model(made), made)
    trainer = make_trainer(made, model, load_tokenizer(made), Data(None, token_rows(), token_rows()))
    trainer.evaluate()
    trainer.train()
    untrained = [n for n, p in model.named_parameters() if "lora_B" in n and not p.detach().abs().max() > 0]
    assert not untrained


def test_under_autocast_the_loss_gets_bfloat16_logits_and_lora_sums_in_one(recipe, monkeypatch):
    made = recipe(
        "training_args.bf16=true",
        "lora_config={r: 4, target_modules: [q_proj, down_proj]}",
        "model_init.dtype=bfloat16",
        "dataset.validation=unused.jsonl",
    )
    model, seen = add_lora(load_model(made), made), []
    summed = trainer_module.summed_cross_entropy

    def seeing(logits, labels):
        variants = sum(len(getattr(module, "lora_variant", ())) for module in model.modules())
        seen.append((model.training, logits.dtype, variants))
        return summed(logits, labels)

    monkeypatch.setattr(trainer_module, "summed_cross_entropy", seeing)
    trainer = make_trainer(made, model, load_tokenizer(made), Data(None, token_rows(), token_rows()))
    trainer.train()
    losses = [trainer.evaluate()["eval_loss"]]
    layers = 2 * model.config.num_hidden_layers
    assert set(seen) == {(True, torch.bfloat16, layers), (False, torch.bfloat16, layers)}
    assert model(**dict(trainer.data_collator([token_rows()[0]])), use_cache=False).logits.dtype is torch.float32, (
        "afterwards accelerate's copy is made as before"
    )
    monkeypatch.setattr(CompletionTrainer, "_takes_trls_loss", lambda *_: True)
    seen.clear()
    losses.append(trainer.evaluate()["eval_loss"])
    assert not seen, "that one is trl's"
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_model_learns_the_same_of_packed_rows(recipe):
    losses = []
    for compiles in ("false", "true"):
        made = recipe(
            "lora_config={r: 4, target_modules: [q_proj]}", f"training_args.torch_compile={compiles}",
            "dataset.packing=true", "dataset.validation=unused.jsonl",
        )  # fmt: skip
        rows = pack(token_rows(), 64)
        trainer = make_trainer(made, add_lora(load_model(made), made), load_tokenizer(made), Data(None, rows, rows))
        trainer.train()
        losses += [trainer.state.log_history[-1]["train_loss"], trainer.evaluate()["eval_loss"]]
    torch.compiler.reset()
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-4) and losses[0] > losses[1]


@pytest.mark.parametrize(("dtype", "lowest", "highest"), [("null", 0.99, 1.0), ("bfloat16", 0.2, 0.4)])
def test_steps_of_a_full_fine_tuning_reach_the_weights_unless_bfloat16_is_named(recipe, dtype, lowest, highest):
    """20 steps at a learning rate of 2e-5; in bfloat16 a weight of 0.02 has no neighbour nearer than 6e-5."""
    made = recipe(
        f"model_init.dtype={dtype}",
        "training_args.bf16=true",
        "training_args.max_steps=20",
        "training_args.learning_rate=2e-5",
    )
    model = load_model(made)
    before = {name: p.detach().clone() for name, p in model.model.layers.named_parameters() if "proj.weight" in name}
    make_trainer(made, model, load_tokenizer(made), Data(None, token_rows())).train()
    now = dict(model.model.layers.named_parameters())
    changed = sum((now[name] != was).sum().item() for name, was in before.items())
    share = changed / sum(was.numel() for was in before.values())
    assert lowest <= share <= highest


FOUR_BITS = "quantization_config={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_compute_dtype: float16}"
LORA = "lora_config={r: 4, target_modules: [q_proj, v_proj], modules_to_save: [norm]}"


@pytest.mark.parametrize("overrides", [[FOUR_BITS], []], ids=["4 bits", "float16"])
def test_what_trains_in_float16_is_float32_which_its_scaler_takes(recipe, monkeypatch, overrides):
    """A step as on a T4: float16 autocast, a scaled loss, gradients scaled back. The Trainer's own wants a GPU."""
    real = trainer_module.training_config

    def on_a_t4(made):
        config = real(made)
        config.fp16 = True
        return config

    monkeypatch.setattr(trainer_module, "training_config", on_a_t4)
    made = recipe("model_init.dtype=float16", LORA, *overrides)
    model = add_lora(load_model(made), made)
    trainer = make_trainer(made, model, load_tokenizer(made), Data(None, token_rows()))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen - {torch.uint8} == {torch.float16}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer, scaler = torch.optim.SGD(trained.values(), lr=1.0), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with torch.autocast("cpu", torch.float16):
        loss = trainer.compute_loss(model, trainer.data_collator([token_rows()[i] for i in range(4)]))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert all((p - before[n]).abs().max() > 0 for n, p in trained.items() if "lora_A" not in n)


def test_best_fit_fills_rows_and_keeps_every_conversation_once():
    bins = best_fit(np.array(LENGTHS), 32).to_pylist()
    assert sorted(row for members in bins for row in members) == list(range(8))
    assert all(sum(LENGTHS[row] for row in members) <= 32 for members in bins)
    assert len(bins) == 4  # 104 tokens cannot fit in fewer than four rows of 32
