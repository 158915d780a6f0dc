"""An extension of griffe: examples in docstrings (`>>> ...`, no heading) become code, Sphinx roles become names."""

import re

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\n).+)*", re.MULTILINE)
ROLE = re.compile(r":(?:func|meth|class|mod|attr):(`[^`]+`)")


def readable(text: str) -> str:
    return EXAMPLE.sub(lambda example: f"```pycon\n{example[0]}\n```", ROLE.sub(r"\1", text))


class ReadableDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **others: object) -> None:
        if obj.docstring:
            obj.docstring.value = readable(obj.docstring.value)
