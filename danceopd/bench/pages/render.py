"""`render`: a template and its values go in, one self-contained HTML page comes out.

Style sheets and the script stand in the page. A content security policy in it forbids every request, and every script
but the page's own. All values are escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from danceopd.bench.report import facts

STYLES = "danceopd.bench.report"
"""The package with the style sheets."""


def _environment(package: str) -> Any:
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=ChoiceLoader([PackageLoader(name, "templates") for name in dict.fromkeys((package, STYLES))]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals |= {"number": facts.number, "clip": clip}
    return made


def clip(text: str, length: int) -> str:
    """The text, cut to a length with an ellipsis."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def script_of(package: str, name: str) -> str:
    """The text of a script among a package's templates."""
    return str(_environment(package).get_template(name).render())


def render(
    package: str, template: str, values: Mapping[str, Any], script: str = "", styles: Sequence[str] = ("style",)
) -> str:
    """The page of a template of `package`; it gets `style`, `script` and `policy` besides `values`."""
    from markupsafe import Markup

    environment = _environment(package)
    style = "\n".join(environment.get_template(f"{name}.css.j2").render() for name in styles)
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    policy += f"; script-src '{f'sha256-{digest}' if script else 'none'}'"
    own = {"script": Markup(script), "style": Markup(style), "policy": Markup(policy)}
    return str(environment.get_template(template).render(**values, **own))
