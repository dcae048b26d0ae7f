"""Fine-tunes a chat model as one YAML recipe says: python run_sft.py recipes/qwen_qlora.yaml"""

import argparse
import gc
import io
import logging
import signal
import sys
from pathlib import Path

try:
    from sft import faults, processes
    from sft.errors import UserError
    from sft.model.allocator import keep_freed_memory
    from sft.plain_text import PlainFormatter, plain_text
    from sft.recipe import Recipe, load_recipe
except ModuleNotFoundError as error:
    if str(error.name).partition(".")[0] == "sft":
        raise
    print(
        f"error: {error.name} is not installed in this Python ({sys.executable}); use that of the environment which "
        "the README makes: .venv/bin/python run_sft.py ..., on Windows .venv\\Scripts\\python",
        file=sys.stderr,
    )
    sys.exit(2)


def train(recipe: Recipe, check: bool, steps: int = 0) -> int:
    """The run, told once: data, model, training, adapter and merged model, parity, scores, report.

    check: all but the training, of which only so many steps are timed.
    """
    from sft import run, settle

    clock = run.Clock()
    run.join_processes(recipe)
    tokenizer = run.load_tokenizer(recipe)
    recipe = settle.day(recipe, tokenizer)
    meta_model = run.check_model(recipe, tokenizer)
    recipe, packing_why = settle.packing(recipe, tokenizer)
    data = run.prepare_data(recipe, tokenizer, packing_why)
    if check:
        code = run.report_check(recipe, tokenizer, data, meta_model)
        if steps:
            from sft import verbs

            verbs.time_steps(recipe, tokenizer, data, steps)
        return code
    description = run.describe_run(recipe, data.ledger)
    checkpoint = run.find_checkpoint(recipe, description, data)
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
        run.finish(recipe, description, clock, checkpoint)
    return 0


def set_up(debug: bool) -> None:
    """What must be set before torch and the libraries are imported."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR, handlers=[handler])
    keep_freed_memory()


def import_libraries() -> None:
    """torch and the rest, seconds that a wrong recipe need not wait for.

    What they make stays to the end: a fifth of that time went into looking for garbage in it.
    """
    if "sft.run" not in sys.modules:
        gc.disable()
        from sft.model.late_compile import compiled_when_called

        with compiled_when_called():
            import sft.run  # noqa: F401

        gc.freeze()
        gc.enable()


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
    parser.add_argument(
        "--steps", type=int, default=0, metavar="N", help="with --check: time N real steps, keep nothing"
    )
    what.add_argument("--score", action="store_true", help="score a run again, or any model or adapter by override")
    what.add_argument("--export", action="store_true", help="write final_model/ of a run again")
    what.add_argument("--compare", nargs="+", metavar="RUN", help="folders of runs, for a page of them side by side")
    parser.add_argument("--output", metavar="FOLDER", help="where --compare writes; else output/comparison_...")
    what.add_argument("--new", action="store_true", help="write the recipe for a model and data: RECIPE MODEL DATA ...")
    what.add_argument("--from", dest="other", metavar="OTHER", help="write the recipe from one of another tool")
    parser.add_argument("--debug", action="store_true", help="log everything")
    options = parser.parse_intermixed_args(arguments)
    if (options.recipe if options.compare else options.output) is not None:
        parser.error("--compare takes folders of runs and no recipe" if options.compare else "--output needs --compare")
    if options.recipe is None and not options.compare:
        parser.error("name a recipe, e.g. recipes/smollm2_cpu.yaml (recipes/ holds ready ones)")
    if options.steps < 0 or (options.steps and not options.check):
        parser.error("--steps N times N steps with --check, e.g. --check --steps 3")
    for stream in (sys.stdout, sys.stderr):  # a page of code, or ASCII, that lacks a character of the data
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with faults.ended_by_the_machine():
        return run_or_tell(options)


def run_or_tell(options: argparse.Namespace) -> int:
    """Runs what was asked for; what the user, or the machine, is to mend is told in one message. Returns: exit code."""
    recipe = None
    try:
        if options.compare:
            set_up(options.debug)
            from sft.comparing import compare

            return compare(options.compare, options.output)
        if options.new or options.other:
            return start(options)
        recipe = load_recipe(options.recipe, options.overrides)
        set_up(options.debug)
        import_libraries()
        from sft import run

        run.set_up(recipe, options.debug)
        if options.score or options.export:
            from sft import verbs

            code = verbs.score_again(recipe) if options.score else verbs.export_again(recipe)
        else:
            code = train(recipe, options.check, options.steps)
        processes.part()
        return code
    except UserError as error:
        return tell(error)
    except KeyboardInterrupt as stop:
        number = getattr(stop, "number", signal.SIGINT)
        goes_on = ""
        if recipe is not None and recipe.output_dir.is_dir() and not options.check:
            goes_on = f": what {recipe.output_dir} holds is kept, and the same command goes on from it"
        if processes.is_first():
            print(f"stopped by {signal.Signals(number).name}{goes_on}", file=sys.stderr, flush=True)
        return faults.exit_code(number)
    except Exception as error:
        if recipe is None or (known := faults.as_user_error(error, recipe.output_dir)) is None:
            raise
        logging.debug("what was raised", exc_info=error)
        return tell(known)


def start(options: argparse.Namespace) -> int:
    """--new and --from, which write a recipe. Returns: exit code."""
    from sft.starting import migrate

    path, words = Path(options.recipe), options.overrides
    migrated = migrate.write_from(options.other, path, words) if options.other else None
    set_up(options.debug)
    import_libraries()
    from sft import run
    from sft.starting import new

    run.quiet(options.debug)
    if migrated:
        print(migrate.labels(migrated))
    else:
        new.write_recipe(path, words)
    print(f"\nnext: python run_sft.py {path} --check")
    return 0


def tell(error: UserError) -> int:
    """Prints an error, once where several processes have it. Returns: the exit code."""
    if processes.tells(error):
        label = "" if error.exit_code > 128 else "error: "  # a signal is the user's wish
        print(label + plain_text(error), file=sys.stderr, flush=True)
    processes.part(error)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
