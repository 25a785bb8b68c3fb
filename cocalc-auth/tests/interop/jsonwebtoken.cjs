// Asks npm's jsonwebtoken to verify our token, which it cannot: it knows no
// Ed25519.
const { readFileSync } = require('node:fs')
const { createPublicKey } = require('node:crypto')
const { createRequire } = require('node:module')

const jwt = createRequire(process.argv[2] + '/')('jsonwebtoken')
const given = JSON.parse(readFileSync(0, 'utf8'))
const kid = jwt.decode(given.token, { complete: true }).header.kid
const jwk = given.jwks.keys.find((key) => key.kid === kid)
const key = createPublicKey({ key: jwk, format: 'jwk' })
const said = []
for (const options of [{}, { algorithms: ['EdDSA'] }]) {
  try {
    jwt.verify(given.token, key, options)
    said.push('verified')
  } catch (error) {
    said.push(error.message)
  }
}
process.stdout.write(JSON.stringify(said))
