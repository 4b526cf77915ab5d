"""HTTPS, by the flags that vLLM and SGLang have for it."""

from __future__ import annotations

import ssl


def server_context(key: str, certificate: str, authorities: str | None, clients: int) -> ssl.SSLContext:
    """Files in PEM. `clients`: 0 none needs a certificate, 1 it may show one, 2 it must: one of `authorities`.

    Raises ValueError with one line.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    named = "--ssl-certfile and --ssl-keyfile"
    try:
        # HAZARD: without one of ours, OpenSSL asks the terminal for the key's password.
        context.load_cert_chain(certificate, key, password=lambda: "")
        if authorities is not None:
            named = "--ssl-ca-certs"
            context.load_verify_locations(authorities)
        context.verify_mode = ssl.VerifyMode(clients)
    except OSError as error:  # what is wrong with their content, too
        why = error.strerror or type(error).__name__
        raise ValueError(f"{named}: {why}: give files in PEM, the key without a password") from error
    return context
