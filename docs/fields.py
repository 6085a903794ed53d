"""For the API page: lines `name: what it is` in the docstring of a dataclass become the list of its fields."""

import re
from typing import Any

import griffe

FIELD = re.compile(r"(\w+): ")


class Fields(griffe.Extension):
    """Puts `Attributes:` over such a paragraph, which is how the generator knows a list of fields."""

    def on_class(self, *, cls: Any, **_others: Any) -> None:
        if cls.docstring is None:
            return
        paragraphs = cls.docstring.value.split("\n\n")
        cls.docstring.value = "\n\n".join(headed(text, set(cls.members)) for text in paragraphs)


def headed(paragraph: str, names: set[str]) -> str:
    """The paragraph under a heading, where each of its lines begins with a field or goes on with the one before."""
    lines = paragraph.split("\n")
    fields = [match[1] for line in lines if not line.startswith(" ") and (match := FIELD.match(line))]
    if not fields or not names.issuperset(fields) or len(fields) != sum(not line.startswith(" ") for line in lines):
        return paragraph
    return "\n".join(["Attributes:", *(f"    {line}" for line in lines)])
