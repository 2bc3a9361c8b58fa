"""One self-contained HTML page of pictures with captions."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; background: #fff }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem }
.warning { background: #fff4d6; border-left: 4px solid #b07800; padding: .6rem 1rem }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.2rem }
figure { margin: 0 } img { width: 100%; border-radius: 4px } figcaption { font-size: .9rem; color: #454c55 }
pre { background: #f2f4f7; padding: .8rem 1rem; overflow-x: auto }
"""


@dataclass(frozen=True)
class Figure:
    """A PNG file with its caption, and the question and answer that it shows, which are its alternative text."""

    path: Path
    caption: str
    question: str
    answer: str

    def html(self) -> str:
        alt = f"{self.caption}. Question: {self.question} Answer: {self.answer}" if self.question else self.caption
        data = base64.b64encode(self.path.read_bytes()).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}">'
        words = f"<br>{html.escape(self.question)}<br><strong>{html.escape(self.answer)}</strong>" if self.question else ""
        return f"<figure>{image}<figcaption>{html.escape(self.caption)}{words}</figcaption></figure>"


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph and figures."""

    title: str
    text: str
    figures: Sequence[Figure]

    def html(self) -> str:
        figures = "\n".join(figure.html() for figure in self.figures)
        return f'<h2>{html.escape(self.title)}</h2>\n<p>{html.escape(self.text)}</p>\n<div class="figures">\n{figures}\n</div>'


def write_page(path: Path, sections: Sequence[Section], commands: Sequence[str]) -> None:
    """Write the page. commands: what to type next."""
    body = "\n".join(section.html() for section in sections)
    typed = html.escape("\n".join(commands))
    path.write_text(
        f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>mimo_jax: demo</title><style>{_STYLE}</style></head>
<body>
<h1>mimo_jax</h1>
<p>Questions about medical images, answered in words and with every structure outlined.</p>
<p class="warning"><strong>Research use only.</strong> This is not a medical device, and nothing that it says or segments is a
diagnosis.</p>
{body}
<h2>What to type next</h2>
<pre>{typed}</pre>
</body>
</html>
""",
        encoding="utf-8",
    )
