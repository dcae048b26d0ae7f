"""Errors that are the user's to mend; run_sft.py prints them without a traceback and exits with 2."""


class UserError(Exception):
    """Something in the recipe, the data or the machine is not as it must be: where, what was found, what to do."""

    exit_code = 2
    agreed = False  # whether every process of the run raises it, so that one of them tells it


class RecipeError(UserError):
    """A recipe that cannot be run as it stands."""


class FormatError(UserError):
    """A row that its format cannot read; sft/data/dataset.py adds the file and the line."""


class DataError(UserError):
    """Data that cannot be trained or scored on."""


class ModelError(UserError):
    """A model, tokenizer or adapter that is missing, or that does not fit the recipe."""


class ControlTokenError(FormatError):
    """A row whose text spells a control token of the tokenizer."""
