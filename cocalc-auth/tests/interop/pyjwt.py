"""Verifies our token with PyJWT, and signs one with the same key.

Reads a JSON object on standard input, writes one on standard output.
"""

import base64
import json
import sys

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

given = json.load(sys.stdin)
kid = jwt.get_unverified_header(given["token"])["kid"]
keys = {key.key_id: key.key for key in jwt.PyJWKSet.from_dict(given["jwks"]).keys}
claims = jwt.decode(
    given["token"],
    keys[kid],
    algorithms=["EdDSA"],
    audience=given["audience"],
    issuer=given["issuer"],
)
try:
    jwt.decode(given["tampered"], keys[kid], algorithms=["EdDSA"], audience=given["audience"])
    sys.exit("PyJWT accepted a tampered token")
except jwt.InvalidSignatureError:
    pass
seed = given["seed"]
key = Ed25519PrivateKey.from_private_bytes(base64.urlsafe_b64decode(seed + "=" * (-len(seed) % 4)))
headers = {"typ": "cocalc-connect+jwt", "kid": given["kid"]}
signed = jwt.encode(given["claims"], key, algorithm="EdDSA", headers=headers)
json.dump({"claims": claims, "signed": [signed]}, sys.stdout)
