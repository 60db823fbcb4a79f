"""Odd heads: request lines, header lines, hosts, connection options, expectations, upgrades, paths."""

from __future__ import annotations

from .rows import CHAT, CRLF, Row, Words, cut, kept, new_key

TOKENS = b"!#$%&'*+-.^_`|~"
CONTROLS = [octet for octet in (*range(32), 127) if octet not in (9, 10, 13)]


def request_lines(words: Words) -> list[Row]:
    """Lines that are none, and those that are."""
    good = b"GET /v1/models HTTP/1.1"
    refused = {
        "lower case method": b"get /v1/models HTTP/1.1",
        "mixed case method": b"Get /v1/models HTTP/1.1",
        "no method": b"/v1/models HTTP/1.1",
        "method of other characters": b"G@T /v1/models HTTP/1.1",
        "method with a comma": b"GET, /v1/models HTTP/1.1",
        "method with a colon": b"GET: /v1/models HTTP/1.1",
        "method in quotes": b'"GET" /v1/models HTTP/1.1',
        "method without end": b"G" * 64 + b" /v1/models HTTP/1.1",
        "method in another script": "GÉT /v1/models HTTP/1.1".encode(),
        "no target": b"GET HTTP/1.1",
        "empty target": b"GET  HTTP/1.1",
        "no version": b"GET /v1/models",
        "only a method": b"GET",
        "relative target": b"GET v1/models HTTP/1.1",
        "absolute target": b"GET http://127.0.0.1/v1/models HTTP/1.1",
        "absolute target of another host": b"GET http://evil.example/v1/models HTTP/1.1",
        "absolute target of another scheme": b"GET gopher://x/ HTTP/1.1",
        "asterisk": b"OPTIONS * HTTP/1.1",
        "asterisk of a GET": b"GET * HTTP/1.1",
        "authority": b"GET 127.0.0.1:80 HTTP/1.1",
        "query only": b"GET ?x HTTP/1.1",
        "fragment": b"GET /v1/models#x HTTP/1.1",
        "backslash": b"GET /v1\\models HTTP/1.1",
        "leading backslash": b"GET \\v1\\models HTTP/1.1",
        "space in the target": b"GET /v1/mod els HTTP/1.1",
        "tab in the target": b"GET /v1/mod\tels HTTP/1.1",
        "octets in the target": "GET /v1/mödels HTTP/1.1".encode(),
        "quotes in the target": b'GET /v1/"models" HTTP/1.1',
        "angles in the target": b"GET /v1/<models> HTTP/1.1",
        "a percent that encodes nothing": b"GET /v1/%zz HTTP/1.1",
        "a percent at the end": b"GET /v1/models% HTTP/1.1",
        "two spaces before the target": b"GET  /v1/models HTTP/1.1",
        "two spaces before the version": b"GET /v1/models  HTTP/1.1",
        "tab before the target": b"GET\t/v1/models HTTP/1.1",
        "tab before the version": b"GET /v1/models\tHTTP/1.1",
        "form feed for a space": b"GET\x0c/v1/models HTTP/1.1",
        "space before the method": b" GET /v1/models HTTP/1.1",
        "space behind the version": b"GET /v1/models HTTP/1.1 ",
        "tab behind the version": b"GET /v1/models HTTP/1.1\t",
        "words behind the version": b"GET /v1/models HTTP/1.1 x",
        "lower case version": b"GET /v1/models http/1.1",
        "version of one number": b"GET /v1/models HTTP/1",
        "version of three": b"GET /v1/models HTTP/1.1.1",
        "version with zeros": b"GET /v1/models HTTP/01.1",
        "version with more digits": b"GET /v1/models HTTP/1.10",
        "version with a comma": b"GET /v1/models HTTP/1,1",
        "version with a space": b"GET /v1/models HTTP/ 1.1",
        "version with a sign": b"GET /v1/models HTTP/+1.1",
        "version with a letter": b"GET /v1/models HTTP/1.x",
        "another protocol": b"GET /v1/models HTTPS/1.1",
        "RTSP": b"DESCRIBE /v1/models RTSP/1.0",
        "SIP": b"OPTIONS /v1/models SIP/2.0",
        "ICY": b"GET /v1/models ICY/1.0",
        "ICE with a method": b"SOURCE /v1/models ICE/1.0",
        "a status line": b"HTTP/1.1 200 OK",
        "NUL in the method": b"GE\x00T /v1/models HTTP/1.1",
        "NUL in the target": b"GET /v1/mod\x00els HTTP/1.1",
        "NUL in the version": b"GET /v1/models HTTP/1.1\x00",
        "CR in the target": b"GET /v1/mod\rels HTTP/1.1",
        "LF in the target": b"GET /v1/mod\nels HTTP/1.1",
        "DEL in the target": b"GET /v1/mod\x7fels HTTP/1.1",
    }
    later = {
        version: b"GET /v1/models HTTP/" + version.encode() for version in ("0.9", "1.2", "1.9", "2.0", "3.0", "9.9")
    }
    found = [Row("request line", name, words.head(line) + words.plant, *cut()) for name, line in refused.items()]
    found += [
        Row("request line", f"HTTP/{name}", words.head(line) + words.plant, *cut(505)) for name, line in later.items()
    ]
    found += [
        Row("request line", "a long target", words.get(path=b"/" + b"x" * 9000) + words.plant, *cut(414)),
        Row("request line", "a long line", b"GET /" + b"x" * 70_000, *cut(431)),
        Row("request line", "the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + words.plant, *cut(505)),
        Row("request line", "TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x07" * 200, *cut()),
        Row("request line", "a version alone", b"HTTP/1.1\r\n\r\n" + words.plant, *cut()),
        Row("request line", "SSH", b"SSH-2.0-OpenSSH_9.2\r\n" + words.plant, *cut()),
        Row("request line", "a bare LF ends it", words.head(good).replace(CRLF, b"\n", 1) + words.plant, *cut()),
        Row("request line", "bare LFs end all", words.head(good).replace(CRLF, b"\n") + words.plant, *cut()),
        Row("request line", "bare CRs end all", words.head(good).replace(CRLF, b"\r") + words.plant, *cut()),
        Row("request line", "CR CR LF ends it", words.head(good).replace(CRLF, b"\r\r\n", 1) + words.plant, *cut()),
        Row("request line", "an empty line before it", CRLF + words.head(good), *kept()),
        Row("request line", "two empty lines before it", CRLF * 2 + words.head(good) + words.plant, *cut()),
        Row("request line", "a bare LF before it", b"\n" + words.head(good) + words.plant, *cut()),
        Row("request line", "a bare CR before it", b"\r" + words.head(good) + words.plant, *cut()),
        Row("request line", "a byte order mark before it", b"\xef\xbb\xbf" + words.head(good) + words.plant, *cut()),
        Row("request line", "HTTP/1.0", words.get(version=b"HTTP/1.0") + words.plant, *cut(200)),
        Row("request line", "a method nobody knows", words.head(b"BREW /v1/models HTTP/1.1"), *kept(405)),
        Row("request line", "the WebDAV method M-SEARCH", words.head(b"M-SEARCH /v1/models HTTP/1.1"), *kept(405)),
        Row("request line", "TRACE", words.head(b"TRACE /v1/models HTTP/1.1"), *kept(405)),
        Row("request line", "a query", words.get(path=b"/v1/models?a=b&c=%20?/"), *kept()),
    ]  # fmt: skip
    return found


def header_lines(words: Words) -> list[Row]:
    """Names, values, ends of lines, numbers of them."""
    refused: dict[str, bytes] = {
        "space before the colon": b"X-A : b",
        "tab before the colon": b"X-A\t: b",
        "no name": b": b",
        "no colon": b"X-A b",
        "no colon, one word": b"X-A",
        "folded by a space": b"X-A: b\r\n c",
        "folded by a tab": b"X-A: b\r\n\tc",
        "folded with nothing": b"X-A: b\r\n ",
        "a folded header": b"X-A: b\r\n Transfer-Encoding: chunked",
        "a bare LF ends it": b"X-A: b\nX-C: d",
        "a bare LF ends it, then a space": b"X-A: b\n c",
        "a bare CR in it": b"X-A: b\rX-C: d",
        "CR CR LF ends it": b"X-A: b\r\r\nX-C: d",
        "LF CR ends it": b"X-A: b\n\rX-C: d",
        "a name in another script": "X-Ä: b".encode(),
        "a length behind a bare LF": b"X-A: b\nContent-Length: 9999",
        "an encoding behind a bare CR": b"X-A: b\rTransfer-Encoding: chunked",
    }
    refused |= {f"name with {chr(octet)!r}": b"X" + bytes([octet]) + b"A: b" for octet in b'"(),/;<=>?@[\\]{} '}
    refused |= {
        f"name with octet {octet}": b"X" + bytes([octet]) + b"A: b" for octet in (0, 1, 11, 12, 31, 127, 128, 255)
    }
    refused |= {f"value with octet {octet}": b"X-A: b" + bytes([octet]) + b"c" for octet in CONTROLS}
    found = [Row("header line", name, words.get(line) + words.plant, *cut()) for name, line in refused.items()]
    found += [
        Row("header line", "folded at once", words.head(b"GET /v1/models HTTP/1.1\r\n X: y") + words.plant, *cut()),
        Row(
            "header line",
            "a space before the first",
            words.head(b"GET /v1/models HTTP/1.1\r\n X-A: y") + words.plant,
            *cut(),
        ),
        Row("header line", "LF LF ends the head", words.get()[:-4] + b"\n\n" + words.plant, *cut()),
        Row("header line", "CR LF LF ends the head", words.get()[:-2] + b"\n" + words.plant, *cut()),
        Row("header line", "LF CR LF ends the head", words.get()[:-4] + b"\n\r\n" + words.plant, *cut()),
        Row("header line", "too many", words.get(*[b"X-A: b"] * 101) + words.plant, *cut(431)),
        Row("header line", "one too long", words.get(b"X-A: " + b"b" * 20_000) + words.plant, *cut(431)),
        Row("header line", "too long together", words.get(*[b"X-A: " + b"b" * 8000] * 10) + words.plant, *cut(431)),
        Row("header line", "a name too long", words.get(b"X" * 20_000 + b": b") + words.plant, *cut(431)),
    ]
    fine = {
        "every character of a token": b"X" + TOKENS + b": b",
        "octets above ASCII in a value": "X-A: bäc".encode(),
        "a tab in a value": b"X-A: b\tc",
        "no value": b"X-A:",
        "a value of spaces": b"X-A:  \t ",
        "no space behind the colon": b"X-A:b",
        "colons in a value": b"X-A: b: c:d",
        "ninety more": CRLF.join([b"X-A: b"] * 90),
        "twelve thousand bytes": b"X-A: " + b"b" * 12_000,
        "an odd name": b"Content_Length: 9999",
    }
    found += [Row("header line", name, words.get(line), *kept()) for name, line in fine.items()]
    return found


def hosts(words: Words) -> list[Row]:
    """Who is asked."""
    bad = [
        b"", b" ", b"a b", b"a,b", b"a, b", b"a/b", b"a?b", b"a#b", b"a@b", b"user@a", b"a\\b", b"a\tb", b"http://a", b"a:",
        b"a:b", b"a:80:80", b"a:123456", b":80", b"[::1", b"::1", b"[a", b"[]", b"a[::1]", b"\xc3\xa4", b"a%2fb", b"a;b", b"<a>",
        b"'a'", b'"a"', b"a:-1", b"a:+80", b"a:8 0", b"*",
    ]  # fmt: skip
    good = [
        b"localhost",
        b"127.0.0.1:8000",
        b"[::1]",
        b"[::1]:80",
        b"EXAMPLE.com",
        b"a-b.c_d",
        b"localhost ",
        b"\tlocalhost",
    ]
    found = [Row("host", f"is {host!r}", words.get(host=b"Host: " + host) + words.plant, *cut()) for host in bad]
    found += [Row("host", f"is {host!r}", words.get(host=b"Host: " + host), *kept()) for host in good]
    found += [
        Row("host", "missing", words.get(host=b"X: y") + words.plant, *cut()),
        Row("host", "missing, with a body", words.sized(host=b"X: y") + words.plant, *cut()),
        Row("host", "twice the same", words.get(words.host) + words.plant, *cut()),
        Row("host", "twice, in other case", words.get(b"hOST: 127.0.0.1") + words.plant, *cut()),
        Row("host", "two", words.get(b"Host: localhost") + words.plant, *cut()),
        Row("host", "missing in HTTP/1.0", words.get(host=b"X: y", version=b"HTTP/1.0"), *cut(200)),
        Row("host", "malformed in HTTP/1.0", words.get(host=b"Host: a/b", version=b"HTTP/1.0"), *cut()),
        Row("host", "two in HTTP/1.0", words.get(words.host, version=b"HTTP/1.0"), *cut()),
    ]
    return found


def singletons(words: Words) -> list[Row]:
    """What a request says once."""
    key = words.auth
    return [
        Row("twice", "the same key", words.get(key) + words.plant, *cut()),
        Row("twice", "a wrong key first", words.get(key, auth=b"Authorization: Bearer tn-x") + words.plant, *cut()),
        Row("twice", "a wrong key last", words.get(b"authorization: Bearer tn-x") + words.plant, *cut()),
        Row("twice", "no key first", words.get(key, auth=b"Authorization:") + words.plant, *cut()),
        Row("twice", "content type", words.sized(CHAT, b"Content-Type: text/plain") + words.plant, *cut()),
        Row("twice", "content encoding", words.sized(CHAT, b"Content-Encoding: identity", b"Content-Encoding: gzip") + words.plant, *cut()),
        Row("twice", "expect", words.sized(CHAT, b"Expect: 100-continue", b"Expect: 100-continue") + words.plant, *cut()),
        Row("twice", "origin", words.get(b"Origin: http://a", b"Origin: http://b") + words.plant, *cut()),
        Row("twice", "the sticky key", words.get(b"X-Turnout-Key: a", b"X-Turnout-Key: b") + words.plant, *cut()),
        Row("twice", "upgrade", words.get(b"Upgrade: a", b"Upgrade: b"), *kept()),
        Row("twice", "cookie", words.get(b"Cookie: a", b"Cookie: b"), *kept()),
        Row("twice", "accept", words.get(b"Accept: a", b"Accept: b"), *kept()),
        Row("twice", "connection", words.get(b"Connection: a", b"Connection: b"), *kept()),
    ]  # fmt: skip


def connections(words: Words) -> list[Row]:
    """What closes a connection, and what only looks like it."""
    closing = ["close", "Close", "CLOSE", "close, x", "x, close", "x,close,y", " close ", "keep-alive, close", "close,close",
               "close, keep-alive", "x,\tclose", ",close", "close,"]  # fmt: skip
    keeping = ["keep-alive", "Keep-Alive", "x", "closed", "x-close", "close-x", "", ",", "not close".replace(" ", "-"),
               "te, x", "authorization", "host, content-length", "transfer-encoding"]  # fmt: skip
    found = [
        Row("connection", f"says {said!r}", words.get(b"Connection: " + said.encode()) + words.plant, *cut(200))
        for said in closing
    ]
    found += [
        Row("connection", f"says {said!r}", words.get(b"Connection: " + said.encode()), *kept()) for said in keeping
    ]
    found += [
        Row("connection", "says close in a second line", words.get(b"Connection: x", b"Connection: close") + words.plant, *cut(200)),
        Row("connection", "says close in a first line", words.get(b"Connection: close", b"Connection: x") + words.plant, *cut(200)),
        Row("connection", "says what is no token", words.get(b"Connection: a b") + words.plant, *cut()),
        Row("connection", "says a parameter", words.get(b"Connection: close;q=1") + words.plant, *cut()),
        Row("connection", "says close in quotes", words.get(b'Connection: "close"') + words.plant, *cut()),
        Row("connection", "of a proxy says close", words.get(b"Proxy-Connection: close"), *kept()),
        Row("connection", "is called keep-alive", words.get(b"Keep-Alive: timeout=1, max=1"), *kept()),
        Row("connection", "of HTTP/1.0 says keep-alive", words.get(b"Connection: keep-alive", version=b"HTTP/1.0") + words.plant, *cut(200)),
        Row("connection", "of HTTP/1.0 says close", words.get(b"Connection: close", version=b"HTTP/1.0") + words.plant, *cut(200)),
        Row("connection", "closes after a body", words.sized(CHAT, b"Connection: close") + words.plant, *cut(200)),
        Row("connection", "closes after an error", words.get(b"Connection: close", path=b"/v1/models/x") + words.plant, *cut(404)),
    ]  # fmt: skip
    return found


def expectations(words: Words) -> list[Row]:
    """What the client waits for."""
    bad = [
        "200-ok",
        "100-continue, x",
        "x",
        "",
        "100-continue;q=1",
        "100 continue",
        "100-continue,100-continue",
        '"100-continue"',
    ]
    found = [
        Row("expect", f"{said!r}", words.sized(CHAT, b"Expect: " + said.encode()) + words.plant, *cut(417))
        for said in bad
    ]
    found += [
        Row("expect", "100-continue with the body", words.sized(CHAT, b"Expect: 100-continue"), *kept()),
        Row("expect", "100-CONTINUE with the body", words.sized(CHAT, b"Expect: 100-CONTINUE"), *kept()),
        Row("expect", "100-continue without a body", words.get(b"Expect: 100-continue"), *kept()),
        Row("expect", "something of HTTP/1.0", words.sized(CHAT, b"Expect: x", version=b"HTTP/1.0"), *cut(417)),
        Row("expect", "100-continue of HTTP/1.0", words.sized(CHAT, b"Expect: 100-continue", version=b"HTTP/1.0"), *cut(200)),
        Row("expect", "something without a body", words.get(b"Expect: x") + words.plant, *cut(417)),
    ]  # fmt: skip
    return found


def upgrades(words: Words) -> list[Row]:
    """Nobody speaks another protocol here."""
    found = []
    # `Content-Length: 0` is no body: what follows is the client's next request.
    after = new_key(b"own", words)
    for token in ("websocket", "h2c", "TLS/1.0", "HTTP/2.0", "foo", "", "websocket, h2c", "WebSocket"):
        for said in ("Upgrade", "upgrade, HTTP2-Settings", "keep-alive, Upgrade", "UPGRADE"):
            lines = (f"Connection: {said}".encode(), f"Upgrade: {token}".encode())
            name = f"to {token!r} by {said!r}"
            found += [
                Row("upgrade", f"{name} with a body", words.sized(words.plant, *lines, path=b"/v1/models"), *cut()),
                Row(
                    "upgrade", f"{name}, then another request", words.get(*lines) + words.get(), (200, 200), stays=True
                ),
            ]
        lines = (b"Connection: Upgrade", f"Upgrade: {token}".encode())
        whole = chunk_of(words.plant)
        found += [
            Row("upgrade", f"to {token!r} with a chunked body", words.chunked(*lines) + whole, *cut()),
            Row("upgrade", f"to {token!r} of no bytes", words.sized(b"", *lines, path=b"/v1/models") + after, (405, 201), stays=True, made=1),
            Row("upgrade", f"to {token!r} with a good body", words.sized(CHAT, *lines) + words.plant, *cut()),
            Row("upgrade", f"to {token!r} with a body and no key", words.sized(words.plant, *lines, auth=b"X: y"), *cut()),
            Row("upgrade", f"to {token!r} in HTTP/1.0 with a body", words.sized(words.plant, *lines, version=b"HTTP/1.0"), *cut()),
            Row("upgrade", f"to {token!r}, not asked of this connection", words.get(lines[1]) + words.get(), (200, 200), stays=True),
        ]  # fmt: skip
    found += [
        Row(
            "upgrade",
            "of a connection to nothing with a body",
            words.sized(words.plant, b"Connection: Upgrade"),
            *cut(),
        ),
        Row(
            "upgrade",
            "of a connection to nothing",
            words.get(b"Connection: Upgrade") + words.get(),
            (200, 200),
            stays=True,
        ),
        Row(
            "upgrade",
            "by a key of HTTP/2",
            words.get(b"Connection: HTTP2-Settings", b"HTTP2-Settings: AAMAAABkAAQAAP__"),
            *kept(),
        ),
    ]
    return found


def chunk_of(data: bytes) -> bytes:
    """A body of one chunk."""
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)


def connects(words: Words) -> list[Row]:
    """There is no tunnel."""
    lines = {
        "authority": b"CONNECT 127.0.0.1:80 HTTP/1.1",
        "path": b"CONNECT /v1/models HTTP/1.1",
        "absolute": b"CONNECT http://127.0.0.1/ HTTP/1.1",
        "asterisk": b"CONNECT * HTTP/1.1",
        "HTTP/1.0": b"CONNECT 127.0.0.1:80 HTTP/1.0",
    }
    found = []
    for name, line in lines.items():
        sized = words.head(line, b"Content-Length: %d" % len(words.plant)) + words.plant
        found += [
            Row("connect", name, words.head(line) + words.plant, *cut(501)),
            Row("connect", f"{name}, with a body", sized, *cut(501)),
            Row("connect", f"{name}, without a key", words.head(line, auth=b"X: y") + words.plant, *cut(501)),
            Row(
                "connect",
                f"{name}, with chunks",
                words.head(line, b"Transfer-Encoding: chunked") + chunk_of(words.plant),
                *cut(501),
            ),
        ]
    return found


def paths(words: Words) -> list[Row]:
    """One path is decided on and routed by, and it is the one that was sent."""
    odd = [
        b"/api%2fkeys", b"/api%2Fkeys", b"/%61pi/keys", b"/api/%6beys", b"/api/key%73", b"/api//keys", b"//api/keys", b"/api/keys/",
        b"/api/./keys", b"/api/../api/keys", b"/x/../api/keys", b"/api/%2e/keys", b"/%2e%2e/api/keys", b"/api/keys%00",
        b"/api/keys%20", b"/api/keys%0d%0a", b"/api%5ckeys", b"/API/KEYS", b"/api/keys;x", b"/healthz/", b"//healthz", b"/healthz%2f",
        b"/healthz%2f..%2fapi%2fkeys", b"/healthz/../api/keys", b"/healthz;/../api/keys", b"/%68ealthz", b"/healthz%3f", b"/v1%2fmodels",
        b"/v1/%6dodels", b"/v1/chat%2fcompletions", b"/v1/chat/%63ompletions", b"/v1//chat/completions", b"/api/keys%252f",
    ]  # fmt: skip
    found = []
    for path in odd:
        name = path.decode()
        found += [
            Row("path", name, words.get(path=path), *kept(404)),
            Row("path", f"{name} without a key", words.get(path=path, auth=b"X: y"), *kept(401)),
        ]
    found += [
        Row("path", "/healthz without a key", words.get(path=b"/healthz", auth=b"X: y"), *kept()),
        Row("path", "an encoded at", words.get(path=b"/v1/models/tiny%401"), *kept(404)),
    ]
    return found
