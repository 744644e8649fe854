"""The HTML page of ``visualize.py``: figures as PNGs beside it, and what each of them shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment
from matplotlib.figure import Figure

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { margin: 2rem auto; max-width: 75rem; padding: 0 1.5rem; font: 16px/1.5 system-ui, sans-serif; color: #222; }
h1 { font-size: 1.6rem; margin-bottom: 0.5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.5rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th { text-align: left; font-weight: 600; padding: 0.1rem 1.5rem 0.1rem 0; vertical-align: top; white-space: nowrap; }
td { overflow-wrap: anywhere; }
.note { background: #fff4d6; border-left: 4px solid #e0a800; padding: 0.6rem 1rem; }
figure { margin: 0; }
img { width: 100%; height: auto; }
figcaption { color: #444; max-width: 60rem; }
code { font-size: 0.9em; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for note in notes %}<p class="note">{{ note }}</p>
{% endfor %}<table>
{% for name, value in facts.items() %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</table>
{% for picture in pictures %}<h2>{{ loop.index }}. {{ picture.title }}</h2>
<figure>
<img src="{{ picture.file }}" alt="{{ picture.title }}">
<figcaption>{{ picture.caption }}</figcaption>
</figure>
{% endfor %}<h2>FDConv layers of the model, for <code>--layer</code></h2>
<p>{% for layer in layers %}<code>{{ layer }}</code>{{ ", " if not loop.last }}{% endfor %}</p>
<p>Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, arXiv 2503.18783.
The figures follow the paper's; none is copied from it.</p>
</body>
</html>
"""


@dataclass(frozen=True)
class Picture:
    """A figure and what is said of it.

    Attributes:
        file: Name of its PNG.
        title: A line.
        caption: What it shows, and how to read it.
        figure: The figure.
    """

    file: str
    title: str
    caption: str
    figure: Figure


def write_report(
    folder: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    notes: Sequence[str],
    pictures: Sequence[Picture],
    layers: Sequence[str],
) -> Path:
    """Write the PNGs and the page that shows them; return the page."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        picture.figure.savefig(folder / picture.file, facecolor="white")
    page = folder / "index.html"
    template = Environment(autoescape=True).from_string(PAGE)
    html = template.render(title=title, facts=facts, notes=notes, pictures=pictures, layers=layers)
    page.write_text(html, encoding="utf-8")
    return page
