"""The `peg` command. Every subcommand imports what it needs itself, so that `peg --help` answers at once."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="peg",
    help="Progressive contrastive training of Chinese text embeddings: from raw pairs to a registered model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipe_app = typer.Typer(help="Whole parameter files: the sample, own data, the real size.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")


@app.command()
def base() -> None:
    """Stage: make the encoder that training starts from (models/base)."""
    from peg import config
    from peg.stages import base as stage

    _as_stage()
    stage.run(config.load())


@app.command()
def prepare() -> None:
    """Stage: read, clean, deduplicate and split the sources (data/prepared, data/eval)."""
    from peg import config
    from peg.stages import prepare as stage

    _as_stage()
    stage.run(config.load())


@app.command()
def mine() -> None:
    """Stage: find a pool of hard negatives for every query (data/mined)."""
    from peg import config
    from peg.stages import mine as stage

    _as_stage()
    stage.run(config.load())


@app.command()
def train(
    launcher: Annotated[str | None, typer.Option(help="'local' or 'ray' instead of train.launcher.")] = None,
    data: Annotated[str | None, typer.Option(help="A JSONL of {query, pos, neg} instead of train.data.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Model folder or hub id instead of train.encoder.")] = None,
    output: Annotated[Path, typer.Option(help="Where the model trained on own data goes.")] = Path("models/finetuned"),
) -> None:
    """Stage: train on the mined pools (models/trained); or, where train.data is set, on own data as it is."""
    from peg import config
    from peg.errors import InputError

    _as_stage()
    changes = {"data": data, "encoder": encoder, "launcher": launcher}
    params = config.with_train(config.load(), {key: value for key, value in changes.items() if value is not None})
    if params.train.data is not None:
        if launcher == "ray":
            raise InputError("own data is trained on this machine; leave --launcher out, or set train.data to null")
        from peg.own_data import finetune_with

        print(f"the model is in {finetune_with(params, output=output)}")
        return
    from peg.stages import train as stage

    if params.train.launcher == "ray":
        from peg.adapters.ray import launch
    else:
        from peg.train.local import launch
    from peg.adapters.mlflow import live_run

    stage.run(params, launch=launch, watch=live_run(params))


@app.command()
def evaluate(
    model: Annotated[str | None, typer.Option(help="Model folder, hub id or models:/name@alias.")] = None,
    data: Annotated[Path | None, typer.Option(help="A folder in BEIR layout.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the result goes, as JSON.")] = None,
) -> None:
    """Stage: measure BM25, base and trained model, and write the report; or any model on any BEIR folder."""
    from peg import config
    from peg.adapters.mteb import measure
    from peg.errors import InputError
    from peg.stages import evaluate as stage

    _as_stage()
    if model is None and data is None and output is None:
        stage.run(config.load(), measure=measure)
        return
    if model is None or data is None or output is None:
        raise InputError("give --model, --data and --output together, or none of them for the stage of dvc.yaml")
    stage.evaluate_one(_resolve(model), data, output, measure=measure, name=model)


@app.command()
def register() -> None:
    """Register the trained model in MLflow, behind the gate; the same weights are registered once."""
    from peg import config
    from peg.adapters import mlflow

    _as_stage()
    registration = mlflow.register(config.load())
    print(registration.describe())


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    top: Annotated[int, typer.Option(min=1, max=100, help="How many passages to show.")] = 5,
    model: Annotated[
        str | None, typer.Option(help="Model folder or models:/name@alias; default: the champion.")
    ] = None,
    corpus: Annotated[Path | None, typer.Option(help="BEIR folder; default: the test corpus of params.yaml.")] = None,
) -> None:
    """Show the nearest passages of the corpus, by the champion model."""
    from rich.console import Console

    from peg import config
    from peg import search as searching

    params = config.load()
    folder = _resolve(model or f"models:/{params.registry.model_name}@champion")
    hits = searching.search(Path(folder), corpus or Path(params.evaluate.test), query, top)
    Console().print(searching.render(hits))


@app.command()
def estimate(  # noqa: PLR0917 (typer calls it)
    recipe: Annotated[
        str | None, typer.Option(help="A name of `peg recipe list`, or a file; default: params.yaml.")
    ] = None,
    pairs: Annotated[int | None, typer.Option(min=1, help="Examples of an epoch; default: what is known here.")] = None,
    query_tokens: Annotated[
        float | None, typer.Option(min=1, help="Of a query, mean; default: half its limit.")
    ] = None,
    passage_tokens: Annotated[
        float | None, typer.Option(min=1, help="Of a passage, mean; default: half its limit.")
    ] = None,
    utilisation: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the GPU's peak that is reached.")] = 0.5,
    peak_tflops: Annotated[float, typer.Option(min=0.001, help="The GPU's; an H200 measured in bf16: 790.")] = 790,
    layers: Annotated[int | None, typer.Option(min=1, help="Of an encoder whose shape is not known here.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Its width.")] = None,
    feed_forward: Annotated[int | None, typer.Option(min=1, help="Its feed-forward width.")] = None,
    vocabulary: Annotated[int | None, typer.Option(min=1, help="Its pieces.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Estimate what a recipe's training costs: FLOPs, GPU-hours, memory, network, disk."""
    from peg import estimate as estimating
    from peg.model.shape import encoder_shape, given_shape
    from peg.recipes import load_any

    params = load_any(recipe)
    given = given_shape(layers=layers, hidden=hidden, feed_forward=feed_forward, vocabulary=vocabulary)
    num_pairs, pairs_from = (pairs, "--pairs") if pairs else estimating.count_pairs(params)
    found = estimating.estimate(
        params,
        given or encoder_shape(params),
        estimating.Assumptions(
            pairs=num_pairs,
            query_tokens=query_tokens or params.train.query_max_length / 2,
            passage_tokens=passage_tokens or params.train.passage_max_length / 2,
            utilisation=utilisation,
            peak_tflops=peak_tflops,
        ),
        pairs_from=pairs_from,
        tokens_from="as given" if query_tokens and passage_tokens else "half the limits where not given",
    )
    print(estimating.to_json(found)) if as_json else estimating.show(found)


@app.command()
def schema() -> None:
    """Print the parameters' JSON Schema: every key, its type, bounds and meaning."""
    import json

    from peg.config import Config

    print(json.dumps(Config.model_json_schema(), ensure_ascii=False, indent=2))


@app.command()
def doctor() -> None:
    """Show what is installed, which accelerators and stores there are, and what mends what is missing."""
    from peg.doctor import examine, show

    findings = examine(Path.cwd())
    show(findings)
    if any(finding.mend for finding in findings):
        raise typer.Exit(1)


@app.command("round")
def next_round() -> None:
    """Let the next run mine and train from the model that was trained: params.yaml is pointed at it."""
    from peg import rounds

    print(rounds.next_round(Path.cwd()))


@recipe_app.command("list")
def recipe_list() -> None:
    """List the recipes, with a line on each; * marks the one in use."""
    from peg.recipes import list_recipes

    for recipe in list_recipes(Path.cwd()):
        print(f"{'*' if recipe.in_use else ' '} {recipe.name:<12} {recipe.about}")


@recipe_app.command("use")
def recipe_use(
    name: Annotated[str, typer.Argument(help="A name of `peg recipe list`.")],
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite edits of params.yaml that are not committed.")
    ] = False,
) -> None:
    """Copy a recipe over params.yaml."""
    from peg.recipes import use_recipe

    print(use_recipe(name, Path.cwd(), force=force))


def _as_stage() -> None:
    from peg.process import die_with_owner
    from peg.workspace import make_state_private

    make_state_private()
    die_with_owner()


def _resolve(model: str) -> str:
    if model.startswith("models:/"):
        from peg.adapters.mlflow import resolve

        return str(resolve(model))
    return model


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a person's mistake is one line and exit code 2, never a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from peg.errors import PegError

    try:
        app(arguments)
    except PegError as error:
        _complain(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _complain(error: Any) -> None:
    for line in str(error).splitlines():
        print(f"peg: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
