"""HTTPS: who is served, and what is said of files that cannot work."""

import shutil
import ssl
import subprocess

import httpx
import pytest

from octavo.engine.config import ConfigError
from octavo.server.settings import ServerSettings
from octavo.server.tls import tls_context
from tests.server.conftest import PATIENCE, free_port

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the files")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A certificate of 127.0.0.1, its key, the same key under a password, and a foreign key."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words):
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    for name in ("own", "client"):
        openssl(
            *f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 "
            f"-keyout {name}.key -out {name}.pem -subj /CN={name} "
            "-addext subjectAltName=IP:127.0.0.1".split()
        )
    openssl(*"ec -in own.key -aes256 -passout pass:sesame -out locked.key".split())
    return folder


def settings(files, certfile="own.pem", keyfile="own.key", **more):
    certfile, keyfile = (str(files / name) if name else "" for name in (certfile, keyfile))
    return ServerSettings(ssl_certfile=certfile, ssl_keyfile=keyfile, **more)


@pytest.mark.parametrize("count", ["1", "2"])
def test_https_is_served_by_one_and_by_several_processes(files, model, count):
    from tests.server.conftest import Server, start

    port = str(free_port())
    flags = ("--ssl-certfile", files / "own.pem", "--ssl-keyfile", files / "own.key")
    server: Server = start(
        model, *map(str, flags), "--port", port, "--api-server-count", count, wait=False
    )
    url = f"https://127.0.0.1:{port}"
    trust = ssl.create_default_context(cafile=str(files / "own.pem"))

    def ready():
        try:
            return httpx.get(f"{url}/ready", verify=trust).status_code == 200
        except httpx.TransportError:
            return False

    try:
        server.until(ready, "it is not ready")
        body = {"prompt": "ab", "max_tokens": 4, "stream": True}
        answer = httpx.post(f"{url}/v1/completions", json=body, verify=trust, timeout=PATIENCE)
        assert answer.text.endswith("data: [DONE]\n\n")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/ready")
    finally:
        server.process.terminate()
        out, _ = server.process.communicate(timeout=PATIENCE)
    assert f"listening on {url}" in out


def test_only_clients_with_a_certificate_get_in_where_one_is_asked_for(files, launch):
    port = str(free_port())
    flags = ("--ssl-certfile", files / "own.pem", "--ssl-keyfile", files / "own.key")
    authority = ("--ssl-ca-certs", files / "client.pem")
    server = launch(*map(str, (*flags, *authority)), "--port", port, wait=False)
    trust = ssl.create_default_context(cafile=str(files / "own.pem"))
    known = ssl.create_default_context(cafile=str(files / "own.pem"))
    known.load_cert_chain(files / "client.pem", files / "client.key")

    def status(context):
        try:
            return httpx.get(f"https://127.0.0.1:{port}/health", verify=context).status_code
        except httpx.TransportError:
            return 0

    server.until(lambda: status(known) == 200, "it is not up")
    assert status(trust) == 0


def test_a_key_under_its_password_is_opened(files):
    more = {"ssl_keyfile_password": "sesame"}
    assert tls_context(settings(files, keyfile="locked.key", **more)) is not None
    assert tls_context(ServerSettings()) is None


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"certfile": "none.pem"}, "`ssl_certfile`: there is no file .*none.pem"),
        ({"keyfile": "none.key"}, "`ssl_keyfile`: there is no file .*none.key"),
        ({"certfile": ""}, "--ssl-keyfile is given without --ssl-certfile"),
        ({"keyfile": "client.key"}, "is not the one of the certificate"),
        ({"certfile": "own.key"}, "not a certificate and its private key"),
        ({"keyfile": ""}, "not a certificate and its private key"),
        ({"keyfile": "locked.key"}, "`ssl_keyfile_password` does not open"),
        ({"keyfile": "locked.key", "ssl_keyfile_password": "x"}, "does not open"),
    ],
)
def test_files_that_cannot_work_are_named(files, given, why):
    with pytest.raises(ConfigError, match=why):
        tls_context(settings(files, **given))


def test_authorities_that_are_none_are_named(files):
    with pytest.raises(ConfigError, match="holds no certificate"):
        tls_context(settings(files, ssl_ca_certs=str(files / "own.key")))


def test_a_wrong_file_ends_the_start_with_one_sentence(files, launch):
    refused = launch("--ssl-certfile", str(files / "none.pem"), wait=False)
    out, err = refused.process.communicate(timeout=PATIENCE)
    assert (refused.process.returncode, out) == (2, "")
    assert err.startswith("error: `ssl_certfile`: there is no file") and "Traceback" not in err
