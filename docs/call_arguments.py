"""Keras's docstring section "Call arguments" as a list, for mkdocstrings."""

import re

import griffe

SECTION = re.compile(r"^Call arguments:\n((?:    .*\n|\n)+)", re.MULTILINE)
ARGUMENT = re.compile(r"^    (\w+): ", re.MULTILINE)


class CallArguments(griffe.Extension):
    """Makes the arguments items of a Markdown list."""

    def on_object(self, *, obj, **kwargs):
        """Changes the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = SECTION.sub(as_list, obj.docstring.value)


def as_list(section):
    """Replaces `    name: text` by `    - name: text`."""
    return "Call arguments:\n" + ARGUMENT.sub(r"    - `\1`: ", section[1])
