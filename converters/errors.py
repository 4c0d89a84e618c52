"""The one error that this package raises about a checkpoint."""


def printable(text, keep=""):
    """Text that moves no cursor and changes no color of a terminal.

    Names of tensors and files come from strangers, and may hold anything.

    Args:
        text: str.
        keep: str. Characters that stay although they are not printable.

    Returns:
        str, in which all others are escaped, as in `repr`.
    """
    return "".join(
        each
        if each.isprintable() or each in keep
        else each.encode("unicode_escape").decode()
        for each in text
    )


class CheckpointError(ValueError):
    """A checkpoint cannot be read, written or converted.

    The message names the file, what was received, what was expected and
    what to do about it. Where several things are wrong, it lists them all.
    """

    def __init__(self, message):
        super().__init__(printable(message, keep="\n"))


def all_of(*readers):
    """Calls readers, and raises what all of them raised in one error.

    Args:
        *readers: callables without arguments.

    Returns:
        list of what they returned.

    Raises:
        CheckpointError: if one of them did, or several.
    """
    results, errors = [], []
    for read in readers:
        try:
            results.append(read())
        except CheckpointError as error:
            errors.append(error)
    if len(errors) > 1:
        raise CheckpointError("\n".join(map(str, errors))) from errors[0]
    if errors:
        raise errors[0]
    return results


def refuse(source, problems):
    """Raises one error that lists every problem; does nothing for none.

    Args:
        source: str or path. The file or object that the problems are in.
        problems: list of str.

    Raises:
        CheckpointError: if there is a problem.
    """
    if len(problems) == 1:
        raise CheckpointError(f"{source}: {problems[0]}")
    if problems:
        lines = "\n".join(f"- {problem}" for problem in problems)
        raise CheckpointError(f"{source}: {len(problems)} problems:\n{lines}")
