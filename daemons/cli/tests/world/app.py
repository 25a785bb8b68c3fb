"""The app of a project in tests: `app.py PORT FILE [HEADS]`.

Answers `ok`; at a path that ends with `/scheme` over what its user has come; at
`/stream` it never ends; each message of a WebSocket it answers with `ok`. Its
process id is in FILE once it listens; the heads of requests come to be in HEADS.
"""
import asyncio, base64, hashlib, os, sys

async def answer(head, reader, writer):
    lines = head.decode("latin-1").split("\r\n")
    fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    path = lines[0].split(" ")[1]
    key = fields.get("sec-websocket-key")
    if key:
        digest = hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                     b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n")
        while await reader.read(64):
            writer.write(b"\x81\x02ok")
            await writer.drain()
        return False
    if path.endswith("/stream"):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        while True:
            writer.write(b"still here\n")
            await writer.drain()
            await asyncio.sleep(0.1)
    text = fields.get("x-forwarded-proto", "").encode() if path.endswith("/scheme") else b"ok"
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
    await writer.drain()
    return True

async def serve(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if len(sys.argv) > 3:
                with open(sys.argv[3], "ab") as file:
                    file.write(head)
            if not await answer(head, reader, writer):
                break
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]), backlog=1024)
    with open(sys.argv[2], "w") as file:
        file.write(str(os.getpid()))
    await asyncio.sleep(600)

asyncio.run(main())
