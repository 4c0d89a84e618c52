"""Names that are not known, and the known ones that may be meant."""

import difflib


def with_nearest(unknown, known):
    """Names, each with the known one that is most like it.

    Args:
        unknown: Iterable of str.
        known: Iterable of str.

    Returns:
        str, such as `"layers (did you mean num_layers?), x"`.
    """
    known = list(known)
    texts = []
    for name in unknown:
        nearest = difflib.get_close_matches(str(name), known, n=1)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        texts.append(f"{name}{hint}")
    return ", ".join(texts)
