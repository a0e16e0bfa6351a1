"""A new certificate authority, the server's certificate, and a key pair for each node."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from polyfed.base.errors import ConfigError, StorageError
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


def _write(path: Path, data: bytes, mode: int) -> None:
    """Write a file that has ``mode`` from its first byte on."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(data)
    except OSError as error:
        raise StorageError(f"could not write {path}: {error.strerror or error}; correct the path") from error
