"""The command line: `keras-bwetaf generate` and `keras-bwetaf info`."""

import contextlib
import enum
import math
import signal
import sys
import threading
from importlib.metadata import version
from typing import Annotated

import typer

app = typer.Typer(
    help="The BwETAFv3 language model in Keras.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of the repository."),
]


class DType(enum.StrEnum):
    """What `--dtype` may be."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    mixed_bfloat16 = "mixed_bfloat16"
    mixed_float16 = "mixed_float16"


def print_version(wanted: bool):
    """Answers `--version`."""
    if wanted:
        print(version("keras-bwetaf"))
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
):
    pass


@app.command()
def generate(
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT", help='The text to continue; "-" reads stdin.'
        ),
    ],
    preset: Annotated[
        str, typer.Option(help="A name, hf://owner/repo, or a folder.")
    ] = "97m",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="0 keeps all.")
    ] = None,
    min_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    repetition_penalty: Annotated[float | None, typer.Option(min=0)] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1)] = None,
    dtype: Annotated[DType | None, typer.Option()] = None,
    revision: Revision = None,
):
    """Continue PROMPT and print the text as it is made."""
    settings = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    settings = {
        name: value for name, value in settings.items() if value is not None
    }
    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")
    if not prompt:
        raise typer.BadParameter("the prompt is empty", param_hint="PROMPT")

    import keras_bwetaf

    try:
        keras_bwetaf.BwETAFSampler(**settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    lm = keras_bwetaf.from_preset(preset, dtype=dtype, revision=revision)
    pieces = lm.stream(prompt, max_new_tokens=max_new_tokens, **settings)
    with _interrupts() as interrupted:
        print(prompt, end="", flush=True)
        for piece in pieces:
            if interrupted():
                raise KeyboardInterrupt
            print(piece, end="", flush=True)
    print()


@contextlib.contextmanager
def _interrupts():
    """Yields a function that tells whether an interrupt came.

    Raised by the signal itself, KeyboardInterrupt can end up in one of JAX's
    callbacks, where Python prints and forgets it.
    """
    came = threading.Event()
    previous = signal.signal(signal.SIGINT, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


@app.command()
def info(
    preset: Annotated[
        str,
        typer.Argument(
            metavar="PRESET", help="A name, hf://owner/repo, or a folder."
        ),
    ],
    revision: Revision = None,
):
    """Print the configuration, parameters and files of PRESET."""
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    import converters
    from converters.bwetaf_v3 import tensors
    from keras_bwetaf import presets

    folder = presets.cached_folder(preset, revision)
    if folder is None and preset in presets.PRESETS:
        config = presets.PRESETS[preset]["config"]
        parameters = presets.PRESETS[preset]["parameters"]
    else:
        if folder is None:
            folder = presets.preset_folder(preset, revision, weights=False)
        config = presets.backbone_config(folder)
        parameters = sum(
            math.prod(tensor.shape)
            for tensor in tensors(converters.config_from_keras(config))
        )
    table = Table("", "", title=preset, show_header=False)
    for name, value in config.items():
        table.add_row(name, str(value))
    table.add_section()
    table.add_row("parameters", f"{parameters:,}")
    table.add_section()
    if folder is None:
        table.add_row("files", "not downloaded yet")
    else:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                table.add_row(name, decimal(path.stat().st_size))
    console = Console()
    console.print(table)
    if folder is not None:
        console.print(str(folder), soft_wrap=True, highlight=False)


def main():
    """Runs the command line; a failure is one line and status 1.

    Bad usage (2), an interrupt (130) and a closed pipe are Typer's part.
    """
    try:
        app(prog_name="keras-bwetaf")
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"keras-bwetaf: {error}")
