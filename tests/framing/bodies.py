"""Odd bodies: lengths, transfer codings, chunks, trailers, bodies that nobody reads, requests behind one another."""

from __future__ import annotations

from .rows import CHAT, CRLF, Row, Words, chunk, cut, kept, new_key

HALF = len(CHAT) // 2
WHOLE = chunk(CHAT) + b"0\r\n"


def lengths(words: Words) -> list[Row]:
    """What `Content-Length` may say."""
    size = str(len(CHAT))
    bad = [
        f"+{size}", f"-{size}", f"0x{int(size):x}", f"{size}.0", f"{size},{size}", f"{size}, {size}", f"{size} {size}", "", " ", f"{size};",
        f'"{size}"', "1e2", f"{size}\x0b", "9" * 20, "9" * 400, f"{size},", f",{size}", "chunked", "0,0", f"{size}\t0", "１２", "1_0", "-0",
        "NaN", "0b1", "0o7", f"{size}\x00", f"{size}a", "a", f"0, {size}", f"{size}\\0", "٤", "1 2",
    ]  # fmt: skip
    found = [
        Row("length", f"is {said[:30]!r}", words.post(b"Content-Length: " + said.encode()) + CHAT + words.plant, *cut())
        for said in bad
    ]
    good = {
        "spaces around": f"  {size}  ",
        "a space behind": f"{size} ",
        "tabs around": f"\t{size}\t",
        "zeros before": f"000{size}",
    }
    found += [
        Row("length", f"has {name}", words.post(b"Content-Length: " + said.encode()) + CHAT, *kept())
        for name, said in good.items()
    ]
    found += [Row("length", "has no space", words.post(b"Content-Length:" + size.encode()) + CHAT, *kept())]
    pairs = {
        "twice the same": (size, size),
        "twice, zero first": ("0", size),
        "twice, zero last": (size, "0"),
        "twice, one longer": (size, "9999"),
        "twice, one empty": (size, ""),
        "twice, one malformed": (size, "x"),
    }
    for name, said in pairs.items():
        lines = [b"Content-Length: " + one.encode() for one in said]
        found += [
            Row("length", name, words.post(*lines) + CHAT + words.plant, *cut()),
            Row(
                "length", f"{name}, in other case", words.post(lines[0], lines[1].lower()) + CHAT + words.plant, *cut()
            ),
            Row("length", f"{name}, apart", words.post(lines[0], b"X: y", lines[1]) + CHAT + words.plant, *cut()),
            Row("length", f"{name}, without a key", words.post(*lines, auth=b"X: y") + CHAT + words.plant, *cut()),
        ]
    sized = b"Content-Length: %d" % len(words.plant)
    found += [
        Row("length", "of a GET", words.get(sized) + words.plant, *kept()),
        Row("length", "of a DELETE", words.head(b"DELETE /v1/models HTTP/1.1", sized) + words.plant, *kept(405)),
        Row("length", "of an OPTIONS", words.head(b"OPTIONS /v1/models HTTP/1.1", sized) + words.plant, *kept(405)),
        Row("length", "of a TRACE", words.head(b"TRACE /v1/models HTTP/1.1", sized) + words.plant, *kept(405)),
        Row("length", "of a HEAD", words.head(b"HEAD /v1/models HTTP/1.1", sized) + words.plant, *kept(405), is_head=True),
        Row("length", "of a HEAD of health", words.head(b"HEAD /healthz HTTP/1.1", sized) + words.plant, *kept(405), is_head=True),
        Row("length", "zero, then a request", words.get(b"Content-Length: 0") + words.get(), (200, 200), stays=True),
        Row("length", "not said: no body", words.post() + words.get(), (400, 200), stays=True),
        Row("length", "by a name with a space", words.post(b"Content-Length : " + size.encode()) + CHAT + words.plant, *cut()),
        Row("length", "by a name with NUL", words.post(b"Content-Length\x00: " + size.encode()) + CHAT + words.plant, *cut()),
        Row("length", "folded", words.post(b"Content-Length:\r\n " + size.encode()) + CHAT + words.plant, *cut()),
        Row("length", "over the cap", words.post(b"Content-Length: %d" % 10**12, b"Connection: close"), *cut(413)),
    ]  # fmt: skip
    return found


def codings(words: Words) -> list[Row]:
    """What `Transfer-Encoding` may say."""
    bad = [
        "chunked, chunked", "gzip, chunked", "chunked, gzip", "identity", "identity, chunked", "xchunked", "chunkedx", "chunked;q=1",
        '"chunked"', "'chunked'", "chunked,", ",chunked", "chu nked", "\x0bchunked", "chunked\x00", "chunk", "", " ", "deflate", "x",
        "chunked chunked", "chunked\x0c", "chunked;", "chunked\x85", "chunĸed", "chunKed", "compress, chunked", "chunked, identity",
        "0", "null", "chunked\\", "chunked\x1f", "[chunked]", "x-chunked", "gzip",
    ]  # fmt: skip
    bad.remove("chunKed")
    found = []
    body = WHOLE + CRLF
    for said in bad:
        line = b"Transfer-Encoding: " + said.encode()
        found += [
            Row("coding", f"is {said!r}", words.post(line) + body + words.plant, *cut()),
            Row("coding", f"is {said!r}, of a GET", words.get(line) + body + words.plant, *cut()),
            Row(
                "coding",
                f"is {said!r}, with a length",
                words.post(line, b"Content-Length: %d" % len(body)) + body + words.plant,
                *cut(),
            ),
        ]
    for said in ("chunked", "Chunked", "CHUNKED", " chunked ", "\tchunked\t", "chunKed"):
        line = b"Transfer-Encoding:" + said.encode()
        length = b"Content-Length: %d" % len(body)
        found += [
            Row("coding", f"is {said!r}", words.post(line) + body, *kept()),
            Row("coding", f"is {said!r}, before a length", words.post(line, length) + body + words.plant, *cut()),
            Row("coding", f"is {said!r}, behind a length", words.post(length, line) + body + words.plant, *cut()),
            Row(
                "coding",
                f"is {said!r}, with no length",
                words.post(line, b"Content-Length: 0") + body + words.plant,
                *cut(),
            ),
            Row(
                "coding",
                f"is {said!r}, in HTTP/1.0",
                words.post(line, version=b"HTTP/1.0") + body + words.plant,
                *cut(),
            ),
            Row("coding", f"is {said!r}, twice", words.post(line, line) + body + words.plant, *cut()),
            Row("coding", f"is {said!r}, of a GET that reads none", words.get(line) + body + words.plant, *cut(200)),
        ]
    found += [
        Row("coding", "by a name with a space", words.post(b"Transfer-Encoding : chunked") + body + words.plant, *cut()),
        Row("coding", "by a name with a tab", words.post(b"Transfer-Encoding\t: chunked") + body + words.plant, *cut()),
        Row("coding", "behind a bare LF", words.post(b"X: y\nTransfer-Encoding: chunked") + body + words.plant, *cut()),
        Row("coding", "folded", words.post(b"Transfer-Encoding:\r\n chunked") + body + words.plant, *cut()),
        Row("coding", "by a name of its own", words.post(b"Content-Length: 0", b"Transfer_Encoding: chunked") + words.get(), (400, 200), stays=True),
        Row("coding", "which it would take", words.get(b"TE: trailers, chunked"), *kept()),
        Row("coding", "without a key", words.post(b"Transfer-Encoding: x", auth=b"X: y") + body + words.plant, *cut()),
    ]  # fmt: skip
    return found


def chunks(words: Words) -> list[Row]:
    """Sizes, extensions and ends of chunks."""
    size = f"{len(CHAT):x}"
    bad_sizes = [
        f"0x{size}", f"+{size}", f"-{size}", f" {size}", f"{size} ", f"{size}\t", "g", "", f"{size}g", f"{size},", f"{size}_0", "_1",
        "1" * 17, "F" * 16, "FFFFFFFFF", "000000000000000" + size, f"{size}\x00", f"\x00{size}", f"{size}\x0b", f"{size} ;x", f'"{size}"',
        f"{size}:", f"{size}.0", "-1", "-0", "１", f"{size};a\x00", f"{size};a\rb", f"{size};a\nb", f"{size};\n0", f"{size};" + "x" * 600,
        f"{size}\r", f"{size}\n", "1h1", "\n" + size, "\r\n" + size,
    ]  # fmt: skip
    found = []
    for said in bad_sizes:
        body = said.encode() + CRLF + CHAT + CRLF + b"0\r\n\r\n"
        found += [
            Row("chunk", f"of size {said[:30]!r}", words.chunked() + body + words.plant, *cut()),
            Row(
                "chunk",
                f"of size {said[:30]!r}, the second",
                words.chunked() + chunk(b"  ") + body + words.plant,
                *cut(),
            ),
            Row(
                "chunk",
                f"of size {said[:30]!r}, without a key",
                words.chunked(auth=b"X: y") + body + words.plant,
                *cut(401),
            ),
        ]
    ends = {
        "nothing": b"",
        "LF": b"\n",
        "CR": b"\r",
        "LF CR": b"\n\r",
        "a byte more": b"x\r\n",
        "two": b"\r\n\r\n",
        "CR CR LF": b"\r\r\n",
    }
    found += [
        Row("chunk", f"ended by {name}", words.chunked() + chunk(CHAT, end=end) + b"0\r\n\r\n" + words.plant, *cut())
        for name, end in ends.items()
    ]
    lasts = [
        "0\n\r\n",
        "0\r\n\n",
        "0 \r\n\r\n",
        "-0\r\n\r\n",
        "0x0\r\n\r\n",
        "\r\n\r\n",
        "\n",
        "0;\n\r\n",
        "0\r\r\n\r\n",
        "00000000000\r\n\r\n",
    ]
    found += [
        Row("chunk", f"at last {said!r}", words.chunked() + chunk(CHAT) + said.encode() + words.plant, *cut())
        for said in lasts
    ]
    good = {
        "in capitals": chunk(CHAT, size=size.upper().encode()),
        "with zeros": chunk(CHAT, size=b"00" + size.encode()),
        "with an extension": chunk(CHAT, size=size.encode() + b";a"),
        "with an extension and a value": chunk(CHAT, size=size.encode() + b';a=b;c="d e"'),
        "halved": chunk(CHAT[:HALF]) + chunk(CHAT[HALF:]),
        "of one byte each": b"".join(chunk(CHAT[at : at + 1]) for at in range(len(CHAT))),
    }
    found += [Row("chunk", name, words.chunked() + body + b"0\r\n\r\n", *kept()) for name, body in good.items()]
    found += [
        Row("chunk", "at last with zeros", words.chunked() + chunk(CHAT) + b"000\r\n\r\n", *kept()),
        Row("chunk", "at last with an extension", words.chunked() + chunk(CHAT) + b"0;a=b\r\n\r\n", *kept()),
        Row("chunk", "longer than its size", words.chunked() + chunk(CHAT + b"xx", size=size.encode()) + words.plant, *cut()),
        Row("chunk", "shorter than its size", words.chunked() + chunk(CHAT, size=b"%x" % (len(CHAT) + 1)) + b"0\r\n\r\n" + words.plant, *cut()),
        Row("chunk", "that holds a request", words.chunked(path=b"/v1/models") + chunk(words.plant) + b"0\r\n\r\n" + words.plant, *cut(405)),
        Row("chunk", "of extensions without end", words.chunked() + chunk(b" ", size=b"1;" + b"x" * 200) * 400 + words.plant, *cut()),
    ]  # fmt: skip
    return found


def trailers(words: Words) -> list[Row]:
    """Headers end where headers end."""
    open_body = words.chunked(auth=b"X: y") + WHOLE
    keyed = words.chunked() + WHOLE
    dropped = [
        b"X-A: b", b"Connection: close", b"Content-Length: 9999", b"Transfer-Encoding: chunked", b"Host: evil", b"Host:", b"Expect: x",
        b"Upgrade: h2c", b"Authorization: Bearer tn-x", b"Content-Encoding: gzip", b"Content-Type: x/y", b"X-A:", b"Trailer: X-A",
        b"Content-Length: 1\r\nContent-Length: 2", b"Connection: Upgrade\r\nUpgrade: websocket", b"Transfer-Encoding: gzip",
    ]  # fmt: skip
    found = []
    for line in dropped:
        name = line.decode()
        found += [
            Row("trailer", name, keyed + line + CRLF * 2, *kept()),
            Row(
                "trailer",
                f"{name}, then a request",
                keyed + line + CRLF * 2 + new_key(b"own", words),
                (200, 201),
                stays=True,
                made=1,
            ),
            Row("trailer", f"{name}, without a key", open_body + line + CRLF * 2 + words.plant, *cut(401)),
        ]
    found += [
        Row("trailer", "the key", open_body + words.auth + CRLF * 2 + words.plant, *cut(401)),
        Row(
            "trailer",
            "the key, where the host is empty",
            words.chunked(auth=b"Authorization:") + WHOLE + words.auth + CRLF * 2 + words.plant,
            *cut(401),
        ),
        Row("trailer", "the key, then a request", open_body + words.auth + CRLF * 2 + words.get(), *cut(401)),
        Row("trailer", "ninety", keyed + b"X-A: b\r\n" * 90 + CRLF, *kept()),
        Row("trailer", "too many", keyed + b"X-A: b\r\n" * 101 + CRLF + words.plant, *cut(431)),
        Row("trailer", "too long", keyed + b"X-A: " + b"b" * 70_000 + CRLF * 2 + words.plant, *cut(431)),
        Row(
            "trailer", "too long together", keyed + (b"X-A: " + b"b" * 8000 + CRLF) * 10 + CRLF + words.plant, *cut(431)
        ),
    ]
    bad = {
        "folded": b"X-A: b\r\n c", "folded at once": b" X-A: b", "no colon": b"X-A", "a space before the colon": b"X-A : b",
        "no name": b": b", "a bare LF": b"X-A: b\nX-C: d", "a bare CR": b"X-A: b\rX-C: d", "NUL": b"X-A: \x00", "a bad name": b"X(A: b",
        "a chunk": b"5\r\nhello", "a request line": b"GET / HTTP/1.1",
    }  # fmt: skip
    for name, line in bad.items():
        found += [
            Row("trailer", f"malformed: {name}", keyed + line + CRLF * 2 + words.plant, *cut()),
            Row("trailer", f"malformed: {name}, without a key", open_body + line + CRLF * 2 + words.plant, *cut(401)),
        ]
    found += [Row("trailer", "ended by LF", keyed + b"X-A: b\r\n\n" + words.plant, *cut())]
    return found


def refused(words: Words) -> list[Row]:
    """A body whose request was answered already is read to its end, and the next request is the next request."""
    found = []
    ways = {
        "no key": (words, b"X: y", b"/v1/chat/completions", 401),
        "a wrong key": (words, b"Authorization: Bearer tn-x", b"/api/keys", 401),
        "no such path": (words, None, b"/v1/responses", 404),
        "a wrong method": (words, None, b"/v1/models", 405),
    }
    for name, (own, auth, path, status) in ways.items():
        kind = {"path": path, **({"auth": auth} if auth is not None else {})}
        for body_name, body in {"a request": words.plant, "a large body": b"x" * 300_000}.items():
            sized = own.sized(body, **kind)
            chunked_ = own.chunked(**kind) + chunk(body) + b"0\r\n"
            closing = own.sized(body, b"Connection: close", **kind)
            found += [
                Row("refused", f"{name}, {body_name}", sized, *kept(status)),
                Row("refused", f"{name}, {body_name}, then a request", sized + words.get(), (status, 200), stays=True),
                Row("refused", f"{name}, {body_name}, chunked", chunked_ + CRLF + words.plant, *cut(status)),
                Row("refused", f"{name}, {body_name}, trailer close", chunked_ + b"X: y\r\nConnection: close\r\n\r\n" + words.plant, *cut(status)),
                Row("refused", f"{name}, {body_name}, closing", closing + words.plant, *cut(status)),
            ]  # fmt: skip
    return found


def pipelines(words: Words) -> list[Row]:
    """Answers keep their order, and an error waits for its turn."""
    own, get, garbage = new_key(b"own", words), words.get(), b"\x00garbage\r\n\r\n"
    chat = words.sized()
    health = words.get(path=b"/healthz")
    return [
        Row("pipeline", "two", get + get, (200, 200), stays=True),
        Row("pipeline", "twenty", get * 20, (200,) * 20, stays=True),
        Row("pipeline", "of different kinds", get + chat + health + chat, (200, 200, 200, 200), stays=True),
        Row("pipeline", "a key is made, then garbage", own + garbage + words.plant, (201, 400), made=1),
        Row("pipeline", "a completion, then garbage", chat + garbage + words.plant, (200, 400)),
        Row("pipeline", "a completion, then a bad length", chat + words.post(b"Content-Length: x") + words.plant, (200, 400)),
        Row("pipeline", "a completion, then HTTP/2.0", chat + words.get(version=b"HTTP/2.0") + words.plant, (200, 505)),
        Row("pipeline", "a completion, then CONNECT", chat + words.head(b"CONNECT a:80 HTTP/1.1") + words.plant, (200, 501)),
        Row("pipeline", "three, then no host", get * 3 + words.get(host=b"X: y") + words.plant, (200, 200, 200, 400)),
        Row("pipeline", "no key, then garbage", words.get(auth=b"X: y") + garbage + words.plant, (401, 400)),
        Row("pipeline", "closing, then a request", words.get(b"Connection: close") + words.plant, (200,)),
        Row("pipeline", "a request, then a closing one, then one more", get + words.get(b"Connection: close") + words.plant, (200, 200)),
        Row("pipeline", "HTTP/1.0, then a request", words.get(version=b"HTTP/1.0") + words.plant, (200,)),
        Row("pipeline", "a key, an encoding nobody knows", own + words.post(b"Transfer-Encoding: x") + words.plant, (201, 400), made=1),
        Row("pipeline", "with an empty line between", get + CRLF + get, (200, 200), stays=True),
        Row("pipeline", "with two empty lines between", get + CRLF * 2 + words.plant, (200, 400)),
        Row("pipeline", "a byte too many in a body", words.sized(CHAT) + b"x" + words.plant, (200, 400)),
        Row("pipeline", "chunks, then garbage", words.chunked() + WHOLE + CRLF + garbage + words.plant, (200, 400)),
        Row("pipeline", "an upgrade, then garbage", words.get(b"Connection: Upgrade", b"Upgrade: h2c") + garbage + words.plant, (200, 400)),
        Row("pipeline", "an upgrade, then the preface of HTTP/2", words.get(b"Connection: Upgrade", b"Upgrade: h2c") + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + words.plant, (200, 505)),
    ]  # fmt: skip


def unfinished(words: Words) -> list[Row]:
    """What never ends is never run; the client gives up."""
    own = new_key(b"never", words)
    head, _, body = own.partition(CRLF * 2)
    return [
        *[
            Row("unfinished", f"after {at} bytes", own[:at], ())
            for at in (1, 3, 17, 40, len(head), len(head) + 2, len(head) + 3)
        ],
        Row("unfinished", "in its body", own[:-1], ()),
        Row("unfinished", "before its body", own[: -len(body)], ()),
        Row("unfinished", "in a chunk", words.chunked(path=b"/api/keys") + chunk(body)[:-5], ()),
        Row("unfinished", "before the last chunk", words.chunked(path=b"/api/keys") + chunk(body), ()),
        Row("unfinished", "in the last chunk", words.chunked(path=b"/api/keys") + chunk(body) + b"0", ()),
        Row(
            "unfinished",
            "before the trailers end",
            words.chunked(path=b"/api/keys") + chunk(body) + b"0\r\nX: y\r\n",
            (),
        ),
        Row("unfinished", "before the last line ends", words.chunked(path=b"/api/keys") + chunk(body) + b"0\r\n\r", ()),
    ]
