"""The commands about a release: its privacy statement, and what it is used for.

Part of the front door: they parse, hand over and print. Heavy imports are local.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.commands import Json
from cluster.screen import Screen
from cluster.service import open_desk

if TYPE_CHECKING:
    from training.prompts import Prompts
    from training.released import Released

releases = typer.Typer()

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run or sweep by its name, or a release folder.")]
Base = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The model that an adapter is for, if not where its job had it.")
]
PUBLIC = "These texts must be nobody's secret; all that is checked is that they are no whole source of this ledger."


@releases.command()
def report(
    run: Run,
    verify: Annotated[
        Path | None, typer.Option(metavar="STATEMENT", help="A statement.json to be compared with the ledger.")
    ] = None,
    as_json: Json = False,
) -> None:
    """The privacy statement of a release, as a page; with --verify, whether the ledger says the same."""
    screen = Screen(as_json)
    if verify is not None:
        from training.reporting import verified

        books = open_desk().books
        screen.say(f"Ledger {books.place}")
        result = verified(run, verify, books, screen)
        screen.result(result)
        raise typer.Exit(0 if result["valid"] else 1)
    from training.reporting import report as write

    result = write(run, screen)
    screen.say(f"Next: purser report {shlex.quote(run)} --verify {shlex.quote(result['statement'])}", markup=False)
    screen.result(result)


@releases.command()
def generate(
    run: Run,
    prompts: Annotated[Path, typer.Option(metavar="FILE", help="Public prompts: CSV, TSV, JSON lines or Parquet.")],
    count: Annotated[int, typer.Option(metavar="N", help="Texts for each prompt.")] = 1,
    column: Annotated[str, typer.Option(metavar="COL", help="The column that holds the prompts.")] = "prompt",
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="The length of a text, at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="Below 1 more of the likely, above less; 0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Of the words, only the likeliest of this probability.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(metavar="WORD", help="Ends a text; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draws the same texts again; it reaches nothing private.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="A .jsonl or .parquet file; none is overwritten.")] = Path(
        "generated.jsonl"
    ),
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Synthetic text from a released language model, after public prompts; costs nothing."""
    from training.generate import ENDINGS, Sampling
    from training.generate import generate as write
    from training.released import check_out

    screen = Screen(as_json)
    how = Sampling(count, max_new_tokens, temperature, top_p, tuple(stop or ()), seed)
    check_out(out, ENDINGS)
    source, texts = _given(run, prompts, column, "--prompts", screen)
    _wrote(write(source, texts, how, out, screen, base), screen)


@releases.command()
def embed(
    run: Run,
    texts: Annotated[Path, typer.Option(metavar="FILE", help="Public texts: CSV, TSV, JSON lines or Parquet.")],
    column: Annotated[str, typer.Option(metavar="COL", help="The column that holds the texts.")] = "text",
    max_length: Annotated[int, typer.Option(metavar="N", help="Tokens of a text that are read.")] = 128,
    out: Annotated[Path, typer.Option(metavar="FILE", help="A .parquet file; none is overwritten.")] = Path(
        "embeddings.parquet"
    ),
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Vectors of public texts by a released language model; costs nothing."""
    from training.embed import ENDINGS
    from training.embed import embed as write
    from training.released import check_out

    screen = Screen(as_json)
    check_out(out, ENDINGS)
    source, public = _given(run, texts, column, "--texts", screen)
    _wrote(write(source, public, max_length, out, screen, base), screen)


def _given(run: str, path: Path, column: str, option: str, screen: Screen) -> tuple[Released, Prompts]:
    """The release, and the public texts that it is used on."""
    from training.prompts import read_prompts
    from training.released import released

    source, books = released(run), open_desk().books
    screen.say(f"Ledger {books.place}")
    texts = read_prompts(path, column, source, books, option)
    screen.say(PUBLIC)
    return source, texts


def _wrote(result: dict[str, Any], screen: Screen) -> None:
    screen.say(f"Wrote {result['out']}, and beside it {result['statement']}", markup=False)
    screen.result(result)
