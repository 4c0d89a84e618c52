"""What one format says and the others have no place for, kept for it.

A document (a JSON file of a format) is compared with the one that would be
generated from the checkpoint alone. The differences travel through folders
of other formats in a side file and are applied on the way home, each only
where the generated value is still what it was: an edit made in between wins.
"""

import json

from converters.errors import CheckpointError
from converters.files import read_json

FILE_NAME = "conversion_extras.json"


def read_kept(folder):
    """Reads the side file of a folder.

    Args:
        folder: path.

    Returns:
        dict of format to a dict of document to `difference`; empty where
        there is no such file.

    Raises:
        CheckpointError: if it is damaged.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return {}
    kept = read_json(path)
    for name, documents in kept.items():
        if not isinstance(documents, dict):
            raise CheckpointError(
                f"{path}: {name} must hold an object. Received: "
                f"{documents!r:.80}. Remove the file to go on without it."
            )
    return kept


def keep(others, layout, documents, generated):
    """Adds what the documents of a format say beyond the generated ones.

    Args:
        others: dict, what `read_kept` returned: of the other formats.
        layout: str. The format.
        documents: dict of name to dict, as they were read.
        generated: dict of name to dict, from the checkpoint alone.

    Returns:
        dict, `others` with an entry for the format.
    """
    return others | {
        layout: {
            name: difference(documents.get(name), generated.get(name, {}))
            for name in documents | generated
            if not _same(documents.get(name), generated.get(name) or None)
        }
    }


def apply(kept, layout, generated, source):
    """Gives the documents of a format, with what was kept for it.

    Args:
        kept: dict, as `keep` returns it.
        layout: str. The format.
        generated: dict of name to dict, from the checkpoint alone; empty for
            a document that there would not be. The first there must be.
        source: str or path. Of the checkpoint, for messages.

    Returns:
        dict of name to dict, or to None for a file that there should not be.

    Raises:
        CheckpointError: if what was kept is damaged.
    """
    changes = kept.get(layout, {})
    documents = {
        name: restore(document, changes[name], source)
        if name in changes
        else document or None
        for name, document in generated.items()
    }
    first = next(iter(documents))
    if documents[first] is None:
        raise CheckpointError(
            f"{source}: {FILE_NAME} says that there is no {first}. Remove "
            f"{FILE_NAME} to go on without it."
        )
    return documents


def others(kept, layout):
    """What the side file of a folder holds: what its own format does not.

    Args:
        kept: dict, as `keep` returns it.
        layout: str. The folder's format.

    Returns:
        dict, or None where nothing has to be kept.
    """
    rest = {
        name: each for name, each in kept.items() if name != layout and each
    }
    return rest or None


def difference(document, generated):
    """What it takes to make a document of the generated one.

    Args:
        document: dict, or None where the file is not there.
        generated: dict.

    Returns:
        A JSON value for `restore`: None for None, or a dict of the `"order"`
        of keys and the `"changes"` by key: what is `"kept"` instead of what
        is `"generated"`, either of which may be absent, or the difference
        `"inside"` two dicts.
    """
    if document is None:
        return None
    changes = {}
    for key in document | generated:
        old, new = generated.get(key), document.get(key)
        if key not in generated:
            changes[key] = {"kept": new}
        elif key not in document:
            changes[key] = {"generated": old}
        elif _same(old, new):
            continue
        elif isinstance(old, dict) and isinstance(new, dict):
            changes[key] = {"inside": difference(new, old)}
        else:
            changes[key] = {"generated": old, "kept": new}
    return {"order": list(document), "changes": changes}


def restore(generated, change, source):
    """The inverse of `difference`, as far as it still applies.

    Args:
        generated: dict.
        change: What `difference` returned, from a file that is not trusted.
        source: str or path. That file, for messages.

    Returns:
        dict, or None where there was no such file.

    Raises:
        CheckpointError: if `change` has another form.
    """
    if change is None:
        return None
    _check(change, source)
    result = dict(generated)
    for key, sides in change["changes"].items():
        if "inside" in sides:
            if isinstance(result.get(key), dict):
                result[key] = restore(result[key], sides["inside"], source)
        elif _unchanged(key, sides, generated):
            result.pop(key, None)
            if "kept" in sides:
                result[key] = sides["kept"]
    order = dict.fromkeys([*change["order"], *result])
    return {key: result[key] for key in order if key in result}


def _same(left, right):
    # Unlike ==, tells 1 from 1.0 and True, and one order of keys from another.
    return json.dumps(left) == json.dumps(right)


def _unchanged(key, sides, generated):
    """Whether the generated value is the one that a change was made from."""
    if key not in generated or "generated" not in sides:
        return key not in generated and "generated" not in sides
    return _same(generated[key], sides["generated"])


def _check(change, source):
    if (
        not isinstance(change, dict)
        or not isinstance(change.get("order"), list)
        or not all(isinstance(key, str) for key in change["order"])
        or not isinstance(change.get("changes"), dict)
        or not all(
            isinstance(sides, dict)
            and ("inside" not in sides or isinstance(sides["inside"], dict))
            for sides in change["changes"].values()
        )
    ):
        raise CheckpointError(
            f"{source}: a document's differences must hold a list of keys, "
            f"order, and an object, changes. Received: {change!r:.80}. Remove "
            "the file to go on without it."
        )
