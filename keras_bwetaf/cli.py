"""The command line, `keras-bwetaf`."""

import contextlib
import dataclasses
import enum
import inspect
import io
import itertools
import json
import math
import os
import signal
import sys
import threading
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

import keras_bwetaf
from converters.errors import printable
from converters.files import new_file, new_folder
from keras_bwetaf import preset_files
from keras_bwetaf.run import folder as run_folder
from keras_bwetaf.run.settings import TrainingSettings, read_settings

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


Preset = Annotated[
    str,
    typer.Argument(
        metavar="PRESET", help="A name, hf://owner/repo, or a folder."
    ),
]
Share = Annotated[float | None, typer.Option(min=0, max=1)]


class DType(enum.StrEnum):
    """What `--dtype` may be."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    mixed_bfloat16 = "mixed_bfloat16"
    mixed_float16 = "mixed_float16"


class Truncation(enum.StrEnum):
    """What `--truncation` may be."""

    left = "left"


class Quantization(enum.StrEnum):
    """What `quantize --to` may be."""

    int8 = "int8"
    int4 = "int4"


class Errors(enum.StrEnum):
    """What `--errors` may be."""

    strict = "strict"
    replace = "replace"


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
        str | None,
        typer.Argument(
            metavar="PROMPT", help='The text to continue; "-" reads stdin.'
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="A name, hf://owner/repo, or a folder.")
    ] = "97m",
    input: Annotated[
        Path | None,
        typer.Option(help="Instead of PROMPT: .jsonl, or a prompt a line."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The .jsonl file for --input's texts.")
    ] = None,
    num_samples: Annotated[
        int, typer.Option(min=1, help="Texts of each prompt.")
    ] = 1,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End before this text; may be repeated."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Of --input: texts at once.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    truncation: Annotated[
        Truncation | None,
        typer.Option(help="left: of a long PROMPT, see only the end."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy.")
    ] = None,
    top_p: Share = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="0 keeps all.")
    ] = None,
    min_p: Share = None,
    repetition_penalty: Annotated[float | None, typer.Option(min=0)] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1)] = None,
    dtype: Annotated[DType | None, typer.Option()] = None,
    revision: Revision = None,
):
    """Continue PROMPT and print the text as it is made; or a file's prompts."""
    # Long, since each of its parameters is an option.
    if (prompt is None) == (input is None):
        raise typer.BadParameter("give either PROMPT or --input")
    if (input is None) != (output is None):
        raise typer.BadParameter("--input and --output go together")
    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")
    if prompt == "":
        raise typer.BadParameter("the prompt is empty", param_hint="PROMPT")
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
    records = _checked_prompts(preset, revision, input, settings)
    lm = keras_bwetaf.from_preset(preset, dtype=dtype, revision=revision)
    options = {
        "max_new_tokens": max_new_tokens,
        "truncation": truncation,
        "stop_strings": stop or None,
        **settings,
    }
    if records is None:
        _print_samples(lm, prompt, num_samples, options)
    else:
        options |= {"num_samples": num_samples, "batch_size": batch_size}
        keras_bwetaf.prompts.continue_prompts(lm, records, output, **options)


def _checked_prompts(preset, revision, path, settings):
    """The prompts of a file, or None; what is wrong is said before loading."""
    preset_files.check_preset(preset, revision)
    keras_bwetaf.enable_compilation_cache()
    try:
        keras_bwetaf.BwETAFSampler(**settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return None if path is None else keras_bwetaf.prompts.read_prompts(path)


def _print_samples(lm, prompt, num_samples, options):
    """Prints texts as they are made, with an empty line between them."""
    seed = options.get("seed")
    for sample in range(num_samples):
        if sample:
            print()
        if seed is not None:
            options = {**options, "seed": (seed + sample) % 2**32}
        _print_pieces([prompt], lm.stream(prompt, **options))


def _print_pieces(*parts):
    """Prints pieces of text as they come, and ends the line."""
    with _interrupts() as interrupted:
        for piece in itertools.chain(*parts):
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
    preset: Preset,
    revision: Revision = None,
):
    """Print the configuration, parameters and files of PRESET."""
    folder = preset_files.cached_folder(preset, revision)
    if folder is None and preset in preset_files.PRESETS:
        config = preset_files.PRESETS[preset]["config"]
        parameters = preset_files.PRESETS[preset]["parameters"]
    else:
        if folder is None:
            folder = preset_files.preset_folder(preset, revision, weights=False)
        architecture, config = preset_files.read_config(folder)
        canonical = architecture.config_from_keras(config)
        parameters = sum(
            math.prod(tensor.shape)
            for tensor in architecture.tensors(canonical)
        )
    table = Table("", "", title=printable(preset), show_header=False)
    for name, value in config.items():
        table.add_row(printable(name), printable(str(value)))
    table.add_section()
    table.add_row("parameters", f"{parameters:,}")
    table.add_section()
    if folder is None:
        table.add_row("files", "not downloaded yet")
    else:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                table.add_row(printable(name), decimal(path.stat().st_size))
    # A name is no markup.
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(table)
    if folder is not None:
        console.print(printable(str(folder)), soft_wrap=True)


@app.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Text: a name, files, hf://datasets/... or tfds:NAME.",
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where to write tokens.")
    ],
    preset: Annotated[
        str, typer.Option(help="Whose tokenizer: a name, a folder, hf://...")
    ] = "97m",
    split: Annotated[str, typer.Option(help="The source's split.")] = "train",
    column: Annotated[
        str, typer.Option(help="Where records hold their text.")
    ] = "text",
    errors: Annotated[
        Errors, typer.Option(help="What to do with invalid UTF-8.")
    ] = Errors.strict,
    validation_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share to hold out.")
    ] = 0.0,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many.")
    ] = None,
    num_workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; one for each core.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Remove tokens that are there.")
    ] = False,
):
    """Tokenize SOURCE into shards in FOLDER, for `train` and `load_packed`."""
    keras_bwetaf.data.pack(
        source,
        folder,
        keras_bwetaf.BwETAFTokenizer.from_preset(preset),
        split=split,
        column=column,
        errors=errors.value,
        num_workers=num_workers,
        validation_fraction=validation_fraction,
        max_tokens=max_tokens,
        overwrite=overwrite,
    )


def _takes_settings(command):
    """Gives a command an option for each of a run's settings.

    Tables take any number of `--option key=value`, lists of `--option value`.
    """
    signature = inspect.signature(command)
    parameters = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    for field in dataclasses.fields(TrainingSettings):
        kind = field.type
        option = {"help": field.metadata["help"]}
        if kind is dict:
            kind, option["metavar"] = list[str], "KEY=VALUE"
        elif kind is list:
            kind = list[str]
        elif kind is bool:
            kind = bool | None
        else:
            kind = str | None if field.name == "data" else kind | None
            if field.default not in (None, dataclasses.MISSING):
                option["help"] += f" [default: {field.default}]"
        annotation = Annotated[kind, typer.Option(**option)]
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=annotation,
            )
        )
    command.__signature__ = signature.replace(parameters=parameters)
    command.__annotations__ = {
        each.name: each.annotation for each in parameters
    }
    return command


@app.command()
@_takes_settings
def train(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of the run.")
    ],
    config: Annotated[
        Path | None,
        typer.Option(help="TOML, YAML or JSON file; options come before it."),
    ] = None,
    **settings,
):
    """Train a model from text, or go on with the run in RUN."""
    given = {} if config is None else read_settings(config)
    for field in dataclasses.fields(TrainingSettings):
        name, value = field.name, settings[field.name]
        if field.type is dict and value:
            given[name] = {**given.get(name, {}), **_table(name, value)}
        elif value is not None and value != []:
            given[name] = value
    message = run_folder.finished(run, run_folder.resolve(run, given))
    if message:
        print(message)
        return
    keras_bwetaf.enable_compilation_cache()
    with _second_interrupt_exits():
        keras_bwetaf.train(run, **given)


@contextlib.contextmanager
def _second_interrupt_exits():
    """Has a second Ctrl-C end the process at once, whatever it does.

    What Python itself does at a signal has to wait for the main thread, which
    may be compiling for a minute. Another thread need not.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    previous = signal.set_wakeup_fd(write)

    def watch():
        num_interrupts = 0
        while number := os.read(read, 1):
            num_interrupts += number[0] == signal.SIGINT
            if num_interrupts == 2:
                os._exit(128 + signal.SIGINT)
        os.close(read)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(write)


def _table(name, items):
    """`["a=1", "b=x"]` to `{"a": 1, "b": "x"}`."""
    table = {}
    for item in items:
        key, is_pair, value = item.partition("=")
        if not is_pair:
            raise typer.BadParameter(
                f"expected KEY=VALUE. Received: {item!r}",
                param_hint=f"--{name}",
            )
        try:
            table[key] = json.loads(value)
        except ValueError:
            table[key] = value
    return table


@app.command()
def plot(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Defaults to losses.png in RUN.")
    ] = None,
):
    """Plot the losses of the run in RUN."""
    print(keras_bwetaf.training.plot_losses(run, output))


@app.command()
def quantize(
    preset: Preset,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where to write the model.")
    ],
    to: Annotated[
        Quantization, typer.Option(help="Integers of how many bits.")
    ] = Quantization.int8,
    overwrite: Annotated[
        bool, typer.Option(help="Replace a folder that is there.")
    ] = False,
    revision: Revision = None,
):
    """Write PRESET with smaller weights into FOLDER, for `from_preset`."""
    preset_files.check_preset(preset, revision)
    if folder.exists() and not overwrite:
        raise typer.BadParameter(
            f"{folder} exists; --overwrite replaces it", param_hint="FOLDER"
        )
    lm = keras_bwetaf.from_preset(preset, revision=revision)
    before = _weight_bytes(lm)
    lm.quantize(to.value)
    with new_folder(folder, replace=overwrite) as temporary:
        lm.save_to_preset(temporary)
    print(
        f"{folder}: {decimal(_weight_bytes(lm))} of weights, "
        f"{decimal(before)} before."
    )


def _weight_bytes(lm):
    """As in memory; integers of 4 bits are in pairs there."""
    return sum(weight.value.nbytes for weight in lm.weights)


@app.command("eval")
def evaluate(
    preset: Preset,
    data: Annotated[
        str | None,
        typer.Option(help="Text to predict: files, hf://datasets/..., tfds:"),
    ] = None,
    split: Annotated[str, typer.Option(help="The text's split.")] = "train",
    column: Annotated[
        str, typer.Option(help="Where records hold their text.")
    ] = "text",
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="New tokens of a window of a long text."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Of lm-evaluation-harness: piqa,arc_easy"),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="A folder with tasks of your own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many of each task.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt.")
    ] = None,
    use_cache: Annotated[
        Path | None, typer.Option(help="A file that keeps tasks' answers.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    output: Annotated[
        Path | None, typer.Option(help="A JSON file for the results.")
    ] = None,
    dtype: Annotated[DType | None, typer.Option()] = None,
    revision: Revision = None,
):
    """Measure how well PRESET predicts text, or does tasks."""
    # Long, since each of its parameters is an option.
    if (data is None) == (tasks is None):
        raise typer.BadParameter("give either --data or --tasks")
    if output is not None and not output.parent.is_dir():
        raise typer.BadParameter(
            f"there is no folder {output.parent}", param_hint="--output"
        )
    preset_files.check_preset(preset, revision)
    if tasks is not None:
        # Before what takes long, it says whether it is installed.
        keras_bwetaf.evaluation.evaluate_tasks  # noqa: B018
    keras_bwetaf.enable_compilation_cache()
    lm = keras_bwetaf.from_preset(preset, dtype=dtype, revision=revision)
    if data is not None:
        texts = keras_bwetaf.data.read_documents(
            data, split=split, column=column
        )
        result = keras_bwetaf.evaluation.perplexity(
            lm, texts, batch_size=batch_size, stride=stride
        )
        results, table = result.summary(), str(result)
    else:
        results = keras_bwetaf.evaluation.evaluate_tasks(
            lm,
            tasks.split(","),
            batch_size=batch_size,
            include_path=include_path,
            limit=limit,
            num_fewshot=num_fewshot,
            use_cache=None if use_cache is None else str(use_cache),
        )
        table = keras_bwetaf.evaluation.make_table(results)
    print(table)
    if output is not None:
        with new_file(output) as file:
            file.write(json.dumps(results, indent=2, default=str).encode())


@contextlib.contextmanager
def _short_messages():
    """Has warnings be lines, without the place in a file."""
    previous = sys.unraisablehook
    with warnings.catch_warnings():
        warnings.showwarning = _print_warning
        sys.unraisablehook = _print_unraisable
        try:
            yield
        finally:
            sys.unraisablehook = previous


def _print_warning(message, *_):
    print(f"keras-bwetaf: {message}", file=sys.stderr)


def _print_unraisable(unraisable):
    # What Orbax's threads say after one of them has failed.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def main():
    """Runs the command line; a failure is one line and status 1.

    Bad usage (2), an interrupt (130) and a closed pipe are Typer's part. What
    a terminal can't show is replaced.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with _short_messages():
            app(prog_name="keras-bwetaf")
    except (
        FloatingPointError,  # A loss that is not finite.
        ImportError,
        OSError,
        RuntimeError,
        TypeError,  # An unknown name in a table of settings.
        ValueError,
    ) as error:
        sys.exit("keras-bwetaf: " + printable(str(error), keep="\n"))
