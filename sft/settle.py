"""What a recipe may leave open, settled before the data is read: the day that a template shows, and the packing."""

import dataclasses
from datetime import date

from transformers import PreTrainedTokenizerBase

from sft import processes
from sft.data.chat_template import shows_day
from sft.recipe import Recipe
from sft.results import export
from sft.training import packing_probe


def day(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """The recipe with the day that its chat template shows, if it shows one: today's, or that of the run so far.

    Without it the same recipe would train on other prompts tomorrow.
    Raises: RecipeError: chat.date is given, and the template shows no day.
    """
    if not shows_day(tokenizer):
        if recipe.chat.date is not None:
            raise recipe.error("chat.date", "the chat template does not show the day; take it out")
        return recipe
    settled = recipe.chat.date or processes.decide(lambda: export.day_of_run(recipe) or date.today().isoformat())
    return dataclasses.replace(recipe, chat=dataclasses.replace(recipe.chat, date=settled))


def packing(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Recipe, str]:
    """The recipe with dataset.packing decided, by what the first process finds, and for the ledger how it was.

    Raises: RecipeError: it is true, and packed conversations would not be what they are apart.
    """
    packs, why = processes.decide(lambda: packing_probe.decide(recipe, tokenizer))
    return dataclasses.replace(recipe, dataset=dataclasses.replace(recipe.dataset, packing=packs)), why
