// An OpenID provider for the tests: `node provider.mjs PORT`, 0 for any. Prints
// its issuer, takes the clients as one line of JSON, and prints `ready`. It
// lets in whoever names themselves.
import { generateKeyPairSync } from "node:crypto";
import { createServer } from "node:http";
import { createInterface } from "node:readline";
import Provider from "oidc-provider";

// The library wants it, and Node.js has it since version 22.
URL.parse ??= (url, base) => (URL.canParse(url, base) ? new URL(url, base) : null);

const server = createServer();
server.listen(Number(process.argv[2]), "127.0.0.1", () => {
  const issuer = `http://127.0.0.1:${server.address().port}`;
  console.log(issuer);
  createInterface({ input: process.stdin }).once("line", (line) => {
    const key = (type, options) => generateKeyPairSync(type, options).privateKey.export({ format: "jwk" });
    const provider = new Provider(issuer, {
      clients: JSON.parse(line),
      // New ones in each process.
      jwks: { keys: [key("rsa", { modulusLength: 2048 }), key("ec", { namedCurve: "P-256" })] },
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
