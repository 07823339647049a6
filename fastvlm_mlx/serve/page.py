"""The page at `/`, which needs nothing from anywhere else."""

from __future__ import annotations

from importlib.resources import files
from secrets import token_urlsafe

from starlette.responses import Response

_POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page() -> Response:
    """Its script and style run by a number that nobody can guess, and nothing else does."""
    nonce = token_urlsafe(16)
    html = files("fastvlm_mlx.serve").joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": _POLICY.format(nonce),
        "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
    text = html.replace('nonce="NONCE"', f'nonce="{nonce}"')
    return Response(text, headers=headers, media_type="text/html")
