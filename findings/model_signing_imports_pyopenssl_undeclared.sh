#!/usr/bin/env bash
# model-signing 1.1.1, from the Python API, as its package index installs it.
#
# Guess: `pip install model-signing` is enough to sign with a key of one's own; a signature that is written into the
# model's folder, where its own documentation keeps model.sig, is left out when the folder is verified; "the model"
# that is signed are all files of the folder.
# Seen: `import model_signing.signing` fails, since a module of certificates imports OpenSSL and no dependency brings
# pyOpenSSL. With it, sign() and verify() on one folder with the signature inside fail: "Extra files found"; ignored
# paths are relative to the model, not to the current folder. And a file named .gitattributes is not signed: it may
# change, and the signature still verifies.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q --disable-pip-version-check model-signing==1.1.1
cd "$dir"
"$dir/env/bin/python" - <<'PY'
from importlib.metadata import requires

print("declared:", sorted(r for r in requires("model-signing") if "extra" not in r))
assert not any("openssl" in r.lower() for r in requires("model-signing"))
try:
    import model_signing.signing
except ModuleNotFoundError as error:
    print("import model_signing.signing:", error)
    assert error.name == "OpenSSL"
else:
    raise SystemExit("it imports without pyOpenSSL now")
PY
"$dir/env/bin/pip" install -q --disable-pip-version-check pyOpenSSL==26.4.0
"$dir/env/bin/python" - <<'PY'
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from model_signing import hashing, signing, verifying

key = ec.generate_private_key(ec.SECP256R1())
Path("key.pem").write_bytes(
    key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
)
Path("key.pub").write_bytes(
    key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
)
model = Path("model")
model.mkdir()
(model / "model.safetensors").write_bytes(b"weights")
(model / ".gitattributes").write_text("* text\n")
inside, outside = model / "model.sig", Path("model.sig")


def verify(signature, config=None):
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=Path("key.pub"))
    if config is not None:
        verifier.set_hashing_config(config)
    try:
        verifier.verify(model, signature)
    except ValueError as error:
        return str(error)
    return "verified"


signing.Config().use_elliptic_key_signer(private_key=Path("key.pem")).sign(model, inside)
seen = verify(inside)
print("signature inside the folder:", seen)
assert "Extra files found" in seen
by_path = verify(inside, hashing.Config().set_ignored_paths(paths=[inside]))
print(f"ignored as {inside}:", by_path)
assert "Extra files found" in by_path
by_name = verify(inside, hashing.Config().set_ignored_paths(paths=[inside.name]))
print(f"ignored as {inside.name}:", by_name)
assert by_name == "verified"
inside.unlink()
signing.Config().use_elliptic_key_signer(private_key=Path("key.pem")).sign(model, outside)
(model / ".gitattributes").write_text("* -text\n")
print("after a change of .gitattributes:", verify(outside))
assert verify(outside) == "verified"
PY
