"""HTML pages that open from disk: the templates beside this file, which escape whatever they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2


def template(name: str, filters: Mapping[str, Callable[..., Any]]) -> jinja2.Template:
    """A page by its file's name; a name that a page asks for and is not given is an error."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    pages.filters.update(filters)
    return pages.get_template(name)
