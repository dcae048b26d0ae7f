"""What a run leaves: a trained model comes in; adapter, merged model, answers, scores and the page go out.

Imports sft.recipe, sft.data and sft.model; run.py may import from here. Inside, imports point to the left:
scores <- run_folder <- words <- curves, replies, comparison, advice <- page, summary;
scores <- forgetting <- evaluation, comparison, advice; curves <- comparison;
scores, run_folder, answers, export <- evaluation; merge <- certificate <- export.
"""
