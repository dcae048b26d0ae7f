"""Training: data and a model come in, a trained model and its checkpoints go out; what can be told beforehand, too.

Imports sft.recipe, sft.data and sft.model; run.py may import from here. Only trainer.py and
arguments.py know TRL.
"""
