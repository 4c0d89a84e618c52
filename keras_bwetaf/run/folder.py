"""What the folder of a training run holds: settings, and how it ended."""

import dataclasses
import json
import shlex

import yaml

from converters.files import new_file, read_json
from keras_bwetaf.preset_files import MODEL, RUN_SETTINGS
from keras_bwetaf.run.settings import TrainingSettings, read_settings

CHECKPOINTS = "checkpoints"
PACKED = "packed"
LAST_MODEL = "model-last"
TOKENIZER = "tokenizer.json"
# What the tokenizer and the tokens were made of, until training begins.
PREPARATION = "preparation.json"
RESULT = "result.json"
# A run may go on with others of these: they change nothing of the model.
CHANGEABLE = ("save_every", "keep_last", "on_damage", "sample", "tensorboard")


def resolve(folder, settings):
    """Settings of a run, which are kept in its folder once it has begun.

    Args:
        folder: Path.
        settings: dict. Those that are given.

    Returns:
        `TrainingSettings`.

    Raises:
        ValueError: If some are missing or wrong, or are not those with which
            a checkpoint in the folder was trained.
    """
    saved = kept(folder)
    if saved is None:
        missing = [name for name in ("data", "steps") if name not in settings]
        if missing:
            raise ValueError(
                "A new run needs the settings `data` and `steps`. Received: "
                f"{sorted(settings)}"
            )
        return TrainingSettings(**settings)
    wanted = dataclasses.replace(saved, **settings)
    if not saved_steps(folder):
        return wanted
    differences = [
        f"{name}: {getattr(saved, name)!r} in the run"
        for name in _differences(saved, wanted)
        if name != "steps" or wanted.steps < saved.steps
    ]
    if differences:
        raise ValueError(
            f"{folder}: a run goes on with the settings that it began with, "
            "or with more steps. Leave the others out, or choose another "
            "folder. Received others:\n" + "\n".join(differences)
        )
    if wanted.steps > saved.steps:  # It is evaluated as often as before.
        every = saved.steps // saved.epochs
        wanted = dataclasses.replace(wanted, validate_every=every)
    return wanted


def kept(folder):
    """The settings in the folder of a run, or None."""
    path = folder / RUN_SETTINGS
    return TrainingSettings(**read_settings(path)) if path.is_file() else None


def keep(folder, settings):
    """Writes the settings, once tokens are packed and all can be built."""
    folder.mkdir(parents=True, exist_ok=True)
    with new_file(folder / RUN_SETTINGS) as file:
        content = yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False)
        file.write(content.encode())


def _differences(saved, wanted):
    """Names of settings with which another model would be trained."""
    return [
        field.name
        for field in dataclasses.fields(TrainingSettings)
        if field.name not in CHANGEABLE
        and getattr(saved, field.name) != getattr(wanted, field.name)
    ]


def saved_steps(folder):
    """The steps of which there are checkpoints, in order, a list of int."""
    names = [path.name for path in (folder / CHECKPOINTS).glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def keep_result(folder, steps, models):
    """Writes down that a run is finished.

    Args:
        folder: Path.
        steps: int.
        models: dict of `MODEL` and perhaps `LAST_MODEL` to dicts: `"step"`,
            and `"val_loss"`, or `None`.
    """
    with new_file(folder / RESULT) as file:
        result = {"steps": steps, "models": models}
        file.write(json.dumps(result, indent=2).encode() + b"\n")


def finished(folder, settings):
    """What a finished run has to say, a str, or None if steps are left.

    Args:
        folder: Path.
        settings: `TrainingSettings`.
    """
    path = folder / RESULT
    result = read_json(path) if path.is_file() else {"steps": None}
    has_model = (folder / MODEL).is_dir()
    if result["steps"] != settings.steps or not has_model:
        return None
    lines = [f"Finished: {settings.steps:,} steps."]
    names = {
        MODEL: "the best" if LAST_MODEL in result["models"] else "the last"
    }
    for name, model in result["models"].items():
        kind = names.get(name, "the last")
        loss = model["val_loss"]
        loss = "" if loss is None else f", validation loss {loss:.4f}"
        lines += [
            f"  {folder / name}",
            f"    {kind}: step {model['step']:,}{loss}",
        ]
    prompt = settings.sample[0] if settings.sample else "Once upon a time"
    path = shlex.quote(str(folder))
    return "\n".join(
        [
            *lines,
            "Try it:",
            f"  keras-bwetaf generate --preset {path} {shlex.quote(prompt)}",
            "Train on:",
            f"  keras-bwetaf train {path} --steps {2 * settings.steps}",
        ]
    )


def how_to_go_on(folder):
    """What a run that was stopped has to say, a str."""
    if not (folder / RUN_SETTINGS).is_file():
        return "Stopped before training began. The same command goes on."
    steps = saved_steps(folder)
    done = f"Step {steps[-1]:,} is saved." if steps else "No step is saved yet."
    path = shlex.quote(str(folder))
    return f"Stopped. {done} To go on:\n  keras-bwetaf train {path}"
