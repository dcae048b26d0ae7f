"""The model: a recipe comes in; its tokenizer and its model, full or quantised, with LoRA or without, go out.

Imports sft.recipe only; training, results and run.py may import from here.
"""
