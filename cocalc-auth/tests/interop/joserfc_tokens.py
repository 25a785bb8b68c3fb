"""Verifies our token with joserfc, and signs some with the same key: first
with the header exactly as ours, then with others.

Reads a JSON object on standard input, writes one on standard output.
"""

import json
import sys

from joserfc import jws, jwt
from joserfc.errors import BadSignatureError
from joserfc.jwk import KeySet, OKPKey

given = json.load(sys.stdin)
keys = KeySet.import_key_set(given["jwks"])
algorithms = ["EdDSA", "Ed25519"]
token = jwt.decode(given["token"], keys, algorithms=algorithms)
registry = jwt.JWTClaimsRegistry(
    aud={"essential": True, "value": given["audience"]},
    iss={"essential": True, "value": given["issuer"]},
)
registry.validate(token.claims)
try:
    jwt.decode(given["tampered"], keys, algorithms=algorithms)
    sys.exit("joserfc accepted a tampered token")
except BadSignatureError:
    pass

key = OKPKey.import_key({"kty": "OKP", "crv": "Ed25519", "d": given["seed"], "x": given["x"]})
typ, kid = "cocalc-connect+jwt", given["kid"]
headers = [
    {"alg": "EdDSA", "typ": typ, "kid": kid},
    {"alg": "EdDSA", "kid": kid, "typ": typ},
    {"alg": "EdDSA", "typ": "JWT", "kid": kid},
    {"alg": "Ed25519", "typ": typ, "kid": kid},
    {"alg": "EdDSA", "kid": kid},
]
body = json.dumps(given["claims"]).encode()
signed = [jws.serialize_compact(header, body, key, algorithms=algorithms) for header in headers]
json.dump({"claims": token.claims, "signed": signed}, sys.stdout)
