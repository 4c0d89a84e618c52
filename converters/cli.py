"""The command line: `bwetaf-convert`, or `python -m converters`."""

import contextlib
import enum
import json
import re
import signal
import sys
from pathlib import Path
from typing import Annotated

import rich.progress
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

import converters
from converters.checkpoint import FLOATS
from converters.errors import printable
from converters.formats import FORMATS

app = typer.Typer(
    help="Move BwETAF models between frameworks, without loss.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# What typer lists as the choices of an option, and checks it against.
Format = enum.StrEnum("Format", {name: name for name in FORMATS})
DType = enum.StrEnum("DType", {name: name for name in FLOATS})

Source = Annotated[
    str,
    typer.Argument(help="A model folder, or hf://owner/repo[@revision]."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
NoOptimizer = Annotated[
    bool,
    typer.Option("--no-optimizer", help="Leave out the optimizer's state."),
]


def parse_size(text):
    """Bytes of a size such as 5GB, 500MiB or 1000000."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?) ?([kmgt]?)(i?)b?", text.lower())
    size = 0
    if match:
        number, prefix, binary = match.groups()
        power = ["", "k", "m", "g", "t"].index(prefix)
        size = int(float(number) * (1024 if binary else 1000) ** power)
    if not size:
        raise typer.BadParameter(
            f"expected a size such as 5GB, 500MiB or 1000000, got {text!r}"
        )
    return size


@app.command()
def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[Format, typer.Option(help="Its format.")],
    dtype: Annotated[
        DType | None, typer.Option(help="Cast the weights. [as they are]")
    ] = None,
    max_shard_size: Annotated[
        int | None,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="Split safetensors, such as into files of 5GB.",
        ),
    ] = None,
    duplicate_head: Annotated[
        bool,
        typer.Option(
            "--duplicate-head",
            help="Write lm_head.weight, too, which is the embedding.",
        ),
    ] = False,
    no_optimizer: NoOptimizer = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model folder.")
    ] = False,
    as_json: AsJson = False,
):
    """Convert SOURCE to another format. No bit changes without --dtype."""
    with _progress("Converting") as progress:
        report = converters.convert(
            source,
            target,
            to=to,
            dtype=dtype,
            max_shard_size=max_shard_size,
            duplicate_head=duplicate_head,
            optimizer=not no_optimizer,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print(json.dumps(report, indent=2))
        return
    print(
        f"{report['from']} -> {report['to']}: {report['tensors']} tensors, "
        f"{decimal(report['bytes'])}, in {printable(str(target))}"
    )
    for name, count in report["non_finite"].items():
        print(f"warning: {count} values of {name} are NaN or infinite")
    if report["left_behind"]:
        print(f"left behind: {printable(', '.join(report['left_behind']))}")


@app.command()
def inspect(
    path: Annotated[
        str,
        typer.Argument(
            help="A model folder, hf://owner/repo, or a file of weights."
        ),
    ],
    as_json: AsJson = False,
):
    """List the tensors of PATH: name, dtype, shape, size, checksum, NaN."""
    with _progress("Reading") as progress:
        report = converters.inspect(path, progress=progress)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    table = Table(
        *("name", "dtype", "shape", "size", "sha256", "NaN", "Inf"), box=None
    )
    for row in report["tensors"]:
        table.add_row(
            printable(row["name"]),
            row["dtype"],
            " x ".join(map(str, row["shape"])),
            decimal(row["bytes"]),
            row["sha256"][:12],
            *(str(row[key] or "") for key in ("nan", "inf")),
        )
    console = Console(
        # Not folded to 80 columns in a pipe or a file.
        width=None if sys.stdout.isatty() else 200,
        # A name is no markup.
        markup=False,
        emoji=False,
        highlight=False,
    )
    console.print(table)
    print(
        f"{report['format']}: {report['parameters']:,} parameters, "
        f"{len(report['tensors'])} tensors, {decimal(report['bytes'])}"
    )
    if report["problem"]:
        print(f"problem: {report['problem']}")


@app.command()
def verify(
    left: Source,
    right: Source,
    no_optimizer: NoOptimizer = False,
    no_logits: Annotated[
        bool, typer.Option("--no-logits", help="Compare tensors only.")
    ] = False,
):
    """Compare LEFT and RIGHT tensor by tensor, then their logits.

    Prints a report as JSON. The exit status is 1 if they differ, and 2 if
    they cannot be compared.
    """
    with _progress("Comparing") as progress:
        report = converters.verify(
            left,
            right,
            optimizer=not no_optimizer,
            logits=not no_logits,
            progress=progress,
        )
    print(json.dumps(report, indent=2, allow_nan=False))
    if not report["same"]:
        raise typer.Exit(1)


@contextlib.contextmanager
def _progress(what):
    """A bar of bytes on the terminal that goes when it is full."""
    console = Console(stderr=True)
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def main():
    """Runs the command line; a failure is one message and status 1 or 2."""
    # So that a stopped conversion removes what it has begun.
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(
                getattr(signal, name), lambda number, _: sys.exit(128 + number)
            )
    try:
        app(prog_name="bwetaf-convert")
    except (OSError, ValueError) as error:
        message = printable(str(error), keep="\n")
        print(f"bwetaf-convert: {message}", file=sys.stderr)
        # Of `verify`, 1 says that two folders differ.
        sys.exit(2 if "verify" in sys.argv[1:2] else 1)
