// An OpenID provider for the tests: `node provider.mjs PORT [CERT KEY]`, 0 for
// any port. Prints its issuer, takes the clients as one line of JSON, and prints
// `ready`. It lets in whoever names themselves.
import { generateKeyPairSync } from "node:crypto";
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { createServer as createSecureServer } from "node:https";
import { createInterface } from "node:readline";
import Provider from "oidc-provider";

// The library wants it, and Node.js has it since version 22.
URL.parse ??= (url, base) => (URL.canParse(url, base) ? new URL(url, base) : null);

// What it remarks is for nobody: the other end of standard output goes away.
console.info = console.warn = console.error;

const [port, cert, key] = process.argv.slice(2);
const server = cert
  ? createSecureServer({ cert: readFileSync(cert), key: readFileSync(key) })
  : createServer();
server.listen(Number(port), "127.0.0.1", () => {
  const origin = cert ? "https://localhost" : "http://127.0.0.1";
  const issuer = `${origin}:${server.address().port}`;
  console.log(issuer);
  createInterface({ input: process.stdin }).once("line", (line) => {
    const made = (type, options) => generateKeyPairSync(type, options).privateKey.export({ format: "jwk" });
    const provider = new Provider(issuer, {
      clients: JSON.parse(line),
      // New ones in each process.
      jwks: { keys: [made("rsa", { modulusLength: 2048 }), made("ec", { namedCurve: "P-256" })] },
      cookies: { keys: ["a key of the tests"] },
      claims: { openid: ["sub"], profile: ["name"], email: ["email", "email_verified"] },
      findAccount: (_, id) => ({
        accountId: id,
        claims: () => ({
          sub: id,
          name: `${id} by name`,
          email: id.includes("@") ? id : `${id}@example.org`,
          email_verified: !id.startsWith("unverified"),
        }),
      }),
    });
    server.on("request", provider.callback());
    console.log("ready");
  });
});
// It ends with whoever started it.
process.stdin.on("end", () => process.exit());
