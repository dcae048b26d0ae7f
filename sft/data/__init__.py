"""Rows -> tokens: the recipe's data files come in; token rows with masks, batches with labels and the ledger go out.

`prepare` is the way in. Imports sft.recipe only; training, results and run.py may import from here.
"""
