// Verifies our token with jose, and signs some with the same key: first with
// the header exactly as ours, then with others.
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { pathToFileURL } from 'node:url'

const require = createRequire(process.argv[2] + '/')
const jose = await import(pathToFileURL(require.resolve('jose')))

const given = JSON.parse(readFileSync(0, 'utf8'))
const keys = jose.createLocalJWKSet(given.jwks)
const expected = { audience: given.audience, issuer: given.issuer, typ: 'cocalc-connect+jwt' }
const { payload } = await jose.jwtVerify(given.token, keys, expected)
const refused = await jose.jwtVerify(given.tampered, keys, expected).then(() => false, () => true)
if (!refused) throw new Error('jose accepted a tampered token')

const key = await jose.importJWK({ kty: 'OKP', crv: 'Ed25519', d: given.seed, x: given.x }, 'EdDSA')
const typ = 'cocalc-connect+jwt'
const { kid } = given
const headers = [
  { alg: 'EdDSA', typ, kid },
  { alg: 'EdDSA', kid, typ },
  { alg: 'EdDSA', typ, kid, extra: 1 },
  { alg: 'EdDSA', typ: 'JWT', kid },
  { alg: 'EdDSA', kid },
]
const body = new TextEncoder().encode(JSON.stringify(given.claims))
const signed = await Promise.all(
  headers.map((header) => new jose.CompactSign(body).setProtectedHeader(header).sign(key)),
)
process.stdout.write(JSON.stringify({ claims: payload, signed }))
