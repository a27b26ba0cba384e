"""The TLS context of --ssl-keyfile and its siblings."""

import contextlib
import ssl
from pathlib import Path

from octavo.engine.config import ConfigError
from octavo.server.settings import ServerSettings


def tls_context(settings: ServerSettings) -> ssl.SSLContext | None:
    """None without --ssl-certfile. ConfigError names the file that is missing or wrong."""
    if not settings.ssl_certfile:
        for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_keyfile_password"):
            if getattr(settings, name):
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} is given without --ssl-certfile", "give both")
        return None
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        path = getattr(settings, name)
        if path and not Path(path).is_file():
            raise ConfigError(f"`{name}`: there is no file {path}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    password = settings.ssl_keyfile_password
    try:
        # The password is always given: without one OpenSSL would ask at the terminal.
        context.load_cert_chain(
            settings.ssl_certfile, settings.ssl_keyfile or None, lambda: password
        )
    except (ssl.SSLError, ValueError, OSError) as error:
        raise ConfigError(_why(settings, error), _HINT) from None
    if settings.ssl_ca_certs:
        try:
            context.load_verify_locations(settings.ssl_ca_certs)
        except (ssl.SSLError, OSError):
            raise ConfigError(
                f"`ssl_ca_certs`: {settings.ssl_ca_certs} holds no certificate in PEM"
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


_HINT = "openssl x509 -noout -text -in CERTFILE, openssl pkey -noout -in KEYFILE show what they are"


def _why(settings: ServerSettings, error: Exception) -> str:
    key, certificate = settings.ssl_keyfile or settings.ssl_certfile, settings.ssl_certfile
    locked = False
    text = f"{getattr(error, 'reason', None) or error}".upper().replace(" ", "_")
    if "MISMATCH" in text:
        return f"the key in {key} is not the one of the certificate in {certificate}"
    with contextlib.suppress(OSError):
        locked = b"ENCRYPTED" in Path(key).read_bytes()
    if locked:
        return f"`ssl_keyfile_password` does not open {key}"
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
        return f"{certificate} or {key} cannot be read: {(error.strerror or str(error)).lower()}"
    return f"{certificate} and {key} are not a certificate and its private key in PEM"
