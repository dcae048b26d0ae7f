"""Where a recipe comes from: a model and data (`--new`), or a recipe of another tool (`--from`); out comes one of ours.

In the order of their imports: draft.py (settings and comments -> a file that is never overwritten), tool_files.py (a
recipe of another tool -> its keys, each with its line), tool_keys.py (what its keys are here, by the tables of tools/),
data_sets.py (what its data sets are), tool_labels.py (what it trains on, beside what we do), migrate.py (the verb
--from), measure.py (what is to be known of model and data), new.py (the verb --new). Called by run_sft.py only.
"""
