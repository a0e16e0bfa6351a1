"""A certificate authority, the server's certificate, a key pair for each node, and the client of each key."""

from __future__ import annotations

import hashlib
import ipaddress
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from polyfed.base import files
from polyfed.base.errors import ConfigError, StorageError
from polyfed.base.types import ClientId
from polyfed.deploy.client.state_dir import private_folder


def authority(folder: Path, hosts: Sequence[str], *, days: int = 825) -> None:
    """Write ca.crt, ca.key, server.crt and server.key; an existing file is kept.

    Args:
        folder: the folder of these files, which only its owner can enter.
        hosts: names and addresses by which clients reach the server.
        days: validity of the certificates, in days.

    Raises:
        ConfigError: the package `cryptography`, which comes with ``polyfed[deploy]``, is missing.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ModuleNotFoundError as error:
        raise ConfigError("certificates need a package that is missing; run: pip install 'polyfed[deploy]'") from error
    private_folder(folder)
    if (folder / "server.crt").exists():
        return
    now = datetime.now(UTC) - timedelta(hours=1)  # clocks differ

    def name(common: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])

    def alternative(host: str) -> x509.GeneralName:
        try:
            return x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            return x509.DNSName(host)

    def secret(key: ec.EllipticCurvePrivateKey) -> bytes:
        return key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def usage(*, ca: bool) -> x509.KeyUsage:
        return x509.KeyUsage(
            digital_signature=not ca,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=ca,
            crl_sign=ca,
            encipher_only=False,
            decipher_only=False,
        )

    ca_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    ca = (
        x509.CertificateBuilder()
        .subject_name(name("polyfed deployment CA"))
        .issuer_name(name("polyfed deployment CA"))
        .public_key(ca_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    server = (
        x509.CertificateBuilder()
        .subject_name(name(hosts[0]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([alternative(host) for host in hosts]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    for issued, certificate, private in (("ca", ca, ca_key), ("server", server, key)):
        _write(folder / f"{issued}.key", secret(private), 0o600)
        _write(folder / f"{issued}.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def node_key(path: Path) -> None:
    """Write a private key to ``path`` and its public key to ``path.pub``, as ssh-keygen would; keep existing files."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ModuleNotFoundError as error:
        raise ConfigError("node keys need a package that is missing; run: pip install 'polyfed[deploy]'") from error
    private_folder(path.parent)
    if path.exists():
        return
    key = ec.generate_private_key(ec.SECP384R1())
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    _write(path, secret, 0o600)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(path.with_name(f"{path.name}.pub"), public + b"\n", 0o644)


def public_keys(folder: Path) -> dict[ClientId, Path]:
    """Return the public key of each client: ``client-K.pub`` in the folder is that of client K.

    Raises:
        ConfigError: a key that names no client, or one key for two clients.
    """
    found: dict[ClientId, Path] = {}
    owner: dict[str, Path] = {}
    faults: list[str] = []
    for path in sorted(folder.glob("*.pub")):
        number = path.stem.removeprefix("client-")
        if not path.stem.startswith("client-") or not number.isdecimal() or str(int(number)) != number:
            faults.append(f"{path}: names no client; a key belongs to one client: rename it to client-K.pub")
            continue
        other = owner.setdefault(fingerprint(path), path)
        if other != path:
            faults.append(f"{path}: is the key of {other.name} too; a key belongs to one client: make another key")
        found[int(number)] = path
    if faults:
        raise ConfigError(*faults)
    return dict(sorted(found.items()))


def fingerprint(path: Path) -> str:
    """Return the SHA-256 (hex) of a public key, without its comment."""
    return hashlib.sha256(b" ".join(path.read_bytes().split()[:2])).hexdigest()


def bind_nodes(folder: Path, path: Path, register: Callable[[Path], str | None]) -> dict[ClientId, str]:
    """Register the public keys of a folder, and write which client each node is.

    A key stays with the client that it was registered for. The node of a key that is no longer in the folder takes no
    part any more.

    Args:
        folder: the folder of the public keys.
        path: the file that `polyfed.deploy.server.registry.bound_nodes` reads.
        register: registers a key with the server and returns the number of its node; None if the server has it already.

    Returns:
        The node of each client.

    Raises:
        ConfigError: a key was registered for another client, or is known to the server but not to the file.
    """
    known: dict[str, dict[str, Any]] = files.read_json(path) if path.exists() else {}
    node_of = {entry["key"]: (node, entry["client"]) for node, entry in known.items()}
    bound: dict[str, dict[str, Any]] = {}
    for client, key in public_keys(folder).items():
        mark = fingerprint(key)
        node, before = node_of.get(mark, (None, client))
        if before != client:
            raise ConfigError(
                f"{key}: this key was registered for client {before}; a key belongs to one client: name it "
                f"client-{before}.pub again, or make another key for client {client}"
            )
        node = register(key) or node
        if node is None:
            raise ConfigError(
                f"{key}: the server has this key, but {path} does not name its node; end the server, remove its "
                "superlink.db, and start it again, so that it registers all keys anew"
            )
        bound[node] = {"client": client, "key": mark}
    files.write_json(path, bound)
    return {entry["client"]: node for node, entry in bound.items()}


def _write(path: Path, data: bytes, mode: int) -> None:
    """Write a file that has ``mode`` from its first byte on."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(data)
    except OSError as error:
        raise StorageError(f"could not write {path}: {error.strerror or error}; correct the path") from error
