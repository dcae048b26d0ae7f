"""The example recipes of the two projects that this one grew from, as they print them."""

FLAT_SEED = """\
model_name_or_path: "Qwen/Qwen2.5-7B-Instruct"  # 基础模型路径
dataset_path: "dataset/novel_finetuning_dataset.jsonl"  # 数据集路径
output_dir: "output/qwen_qlora_model"  # 输出目录
resume_from_checkpoint: true  # 是否从检查点恢复
quantization_config:
  load_in_4bit: true
  bnb_4bit_quant_type: "nf4"
  bnb_4bit_compute_dtype: "bfloat16"
  bnb_4bit_use_double_quant: true
lora_config:
  r: 32  # LoRA 秩
  lora_alpha: 64  # LoRA 缩放参数
  lora_dropout: 0.1  # Dropout 率
  target_modules: ["q_proj", "k_proj", "v_proj", "o_proj"]  # 目标模块
  bias: "none"
training_args:
  num_train_epochs: 3
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 8
  learning_rate: 2e-4
  logging_steps: 10
  save_steps: 100
  # ... 更多参数
"""

NESTED_SEED = """\
model:
  base_model_path: "THUDM/chatglm3-6b"
  output_dir: "../model"
  use_4bit: true

dataset:
  train_path: "../dataset/moemuu/train.jsonl"
  val_path: "../dataset/moemuu/test.jsonl"
  max_length: 2048

training:
  num_epochs: 3
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 8
  learning_rate: 2.0e-5

lora:
  use_lora: true
  r: 8
  lora_alpha: 32
  target_modules: ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
"""
