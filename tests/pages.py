"""The project's pages of Markdown, and the blocks of code on them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md"))}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: str
    line: int  # of the page, on which it begins
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    text = PAGES[page].read_text()
    found = [
        Block(page, text.count("\n", 0, match.start(2)) + 1, match[1], match[2]) for match in _FENCE.finditer(text)
    ]
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) == 2 * len(found), (
        f"{page}: a fence is left over"
    )
    return found


def prose(page: str) -> str:
    """All but its blocks of code."""
    return _FENCE.sub("", PAGES[page].read_text())


def changed(source: str, diff: str) -> str:
    """The source with each hunk's old lines, which must occur once, replaced by its new ones."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in " " + sign) for sign in "-+")
        assert source.count(old) == 1
        source = source.replace(old, new)
    return source
