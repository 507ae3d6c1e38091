"""A page as data, and its two forms: Markdown to read in a repository, one HTML file to send to anybody.

A page is a list of blocks. Plots are SVG text: the HTML holds them inside (as data URIs, so that their ids cannot
clash), the Markdown names files beside it. No script, no font, no address: the page looks the same without a network.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    text: str
    note: str = ""  # a few words beside it


@dataclass(frozen=True)
class Facts:
    """Large numbers with their names under them: what a reader wants first."""

    items: tuple[tuple[str, str], ...]  # name, value


@dataclass(frozen=True)
class Table:
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""


@dataclass(frozen=True)
class Plot:
    name: str  # of its file, without .svg
    svg: str
    caption: str


@dataclass(frozen=True)
class Talk:
    """What a model was given and what it said. `verb` stands between them in Markdown."""

    title: str
    exchanges: tuple[tuple[str, str], ...]


Block = Heading | Facts | Table | Plot | Talk


def markdown(title: str, subtitle: str, blocks: Sequence[Block], plots: str) -> str:
    """The page as Markdown, its plots in the folder `plots` beside it."""
    lines = [f"# {title}", "", subtitle, ""]
    for block in blocks:
        lines += [*_markdown(block, plots), ""]
    return "\n".join(lines)


def _markdown(block: Block, plots: str) -> list[str]:
    match block:
        case Heading():
            return [f"## {block.text}", *(["", block.note] if block.note else [])]
        case Facts():
            return [f"- {name}: **{value}**" for name, value in block.items]
        case Table():
            rows = [block.headers, ("---",) * len(block.headers), *block.rows]
            cells = ["| " + " | ".join(_cell(text) for text in row) + " |" for row in rows]
            return [*([f"**{block.title}**", ""] if block.title else []), *cells]
        case Plot():
            return [f"![{block.caption}]({plots}/{block.name}.svg)"]
        case Talk():
            quoted = [f"- **{_line(given)}** {_line(said)}" for given, said in block.exchanges]
            return [f"**{block.title}**", "", *quoted]


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.split())


STYLE = Path(__file__).with_name("style.css")


def html(title: str, subtitle: str, blocks: Sequence[Block]) -> str:
    """The page as one self-contained HTML file."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>\n'
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style></head>\n<body><main>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n{body}\n</main></body></html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h2>{escape(block.text)} <small>{escape(block.note)}</small></h2>"
        case Facts():
            cards = (f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in block.items)
            return f'<div class="facts">{"".join(cards)}</div>'
        case Table():
            head = "".join(f"<th>{escape(text)}</th>" for text in block.headers)
            rows = ("".join(f"<td>{escape(text)}</td>" for text in row) for row in block.rows)
            title = f"<h3>{escape(block.title)}</h3>" if block.title else ""
            body = "".join(f"<tr>{row}</tr>" for row in rows)
            return f'{title}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        case Plot():
            data = base64.b64encode(block.svg.encode()).decode()
            return (
                f'<figure><img alt="{escape(block.caption)}" src="data:image/svg+xml;base64,{data}">'
                f"<figcaption>{escape(block.caption)}</figcaption></figure>"
            )
        case Talk():
            pairs = (
                f'<p class="given">{escape(given)}</p><p class="said">{escape(said)}</p>'
                for given, said in block.exchanges
            )
            return f'<h3>{escape(block.title)}</h3><div class="talk">{"".join(pairs)}</div>'
