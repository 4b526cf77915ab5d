"""A film as one HTML file, which needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parents[1] / "assets" / "page"


def page(film: Mapping[str, Any], title: str) -> str:
    """Its own policy lets exactly its own scripts run, and nothing be fetched."""
    styles = [_asset("base.css"), _asset("film.css")]
    scripts = [_asset("common.js"), _asset("film.js"), _asset("film_alone.js")]
    allowed = " ".join(_hash(script) for script in scripts)
    policy = f"default-src 'none'; script-src {allowed}; style-src {' '.join(map(_hash, styles))}"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_escaped(title)}</title>",
            *(f"<style>{style}</style>" for style in styles),
            '</head><body class="alone">',
            f'<header><h1>elastic_ep</h1><span class="what">{_escaped(title)}</span></header>',
            '<main id="film"></main>',
            f'<script type="application/json" id="data">{_data(film)}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>",
            "",
        ]
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _data(film: Mapping[str, Any]) -> str:
    """HAZARD: within a script element: nothing of it may read as markup."""
    text = json.dumps(film, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
