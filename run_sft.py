"""Fine-tunes a chat model as one YAML recipe says: python run_sft.py recipes/qwen_qlora.yaml"""

import argparse
import logging
import sys

from sft import processes
from sft.errors import UserError
from sft.model.allocator import keep_freed_memory
from sft.recipe import Recipe, load_recipe


def train(recipe: Recipe, check: bool) -> int:
    """The run, told once: data, model, training, adapter and merged model, parity, scores, report."""
    from sft import run

    clock = run.Clock()
    run.join_processes(recipe)
    tokenizer = run.load_tokenizer(recipe)
    recipe = run.settle_day(recipe, tokenizer)
    meta_model = run.check_model(recipe, tokenizer)
    data = run.prepare_data(recipe, tokenizer)
    if check:
        return run.report_check(recipe, tokenizer, data, meta_model)
    description = run.describe_run(recipe, data.ledger)
    checkpoint = run.find_checkpoint(recipe, description)
    with run.output(recipe, description, data, meta_model):
        model = run.add_lora(run.load_for_training(recipe), recipe)
        clock.lap("load")
        trainer = run.train(recipe, model, tokenizer, data, checkpoint)
        del model  # the trainer's now, which lets go of it where scoring reads it again
        clock.lap("train")
        run.save(recipe, trainer, tokenizer, data, description)
        run.check_parity(recipe, description, data)
        clock.lap("export")
        run.score(recipe, data, trainer)
        clock.lap("score")
        run.finish(recipe, description, clock)
    return 0


def set_up(debug: bool) -> None:
    """What must be set before torch and the libraries are imported."""
    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    keep_freed_memory()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="run_sft.py",
        description="Fine-tune a chat model as a YAML recipe says: train, save, score, report.",
        epilog="example: python run_sft.py recipes/smollm2_cpu.yaml training_args.num_train_epochs=1",
    )
    parser.add_argument("recipe", nargs="?", help="a YAML file, e.g. recipes/qwen_qlora.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="set a key of the recipe for this run")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="everything but the training, in seconds")
    what.add_argument("--score", action="store_true", help="score a run again, or any model or adapter by override")
    what.add_argument("--export", action="store_true", help="write final_model/ of a run again")
    parser.add_argument("--debug", action="store_true", help="log everything")
    options = parser.parse_intermixed_args(arguments)
    if options.recipe is None:
        parser.error("name a recipe, e.g. recipes/smollm2_cpu.yaml (recipes/ holds ready ones)")
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        set_up(options.debug)
        from sft import run  # imports torch and the rest, seconds that a wrong recipe need not wait for

        run.set_up(recipe, options.debug)
        if options.score or options.export:
            from sft import verbs

            code = verbs.score_again(recipe) if options.score else verbs.export_again(recipe)
        else:
            code = train(recipe, options.check)
        processes.part()
        return code
    except UserError as error:
        if processes.tells(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
        processes.part(error)
        return getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
