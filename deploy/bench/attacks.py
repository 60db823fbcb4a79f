"""Requests that are made to stop the others: each asks for as much work as its bytes can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Who = Literal["admin", "train", "inference", "nobody"]

_MOST = 8 * 2**20 - 2**10
_ON_THE_LOOP = 256 * 2**10 - 2**10
_MIB = 2**20 - 2**10
_JSON = 64 * 2**10 - 2**10
_CHAT = "/v1/chat/completions"
_TRAIN = "/v1/fine_tuning/jobs"
_KEYS = "/api/keys"
_PUBLISH = "/api/adapters/x/versions"
_FORM = "multipart/form-data; boundary=B"
_CONFIG = b'{"peft_type":"LORA","r":4,"lora_alpha":8,"target_modules":["q_proj"],"task_type":"CAUSAL_LM"}'


@dataclass(frozen=True)
class Attack:
    """One request, and the key that it comes with."""

    name: str
    path: str
    who: Who
    body: bytes
    content_type: str = "application/json"


def attacks(model: str) -> list[Attack]:
    """All of them. The first are those that were found; the others are the most that passes each cap."""
    return [
        Attack("4m_wrong_scopes", _KEYS, "admin", _filled(b'{"name":"x","scopes":[', b"0", b"]}", _MOST)),
        Attack("400k_metadata_keys", _TRAIN, "train", _numbered(b'{"model":"m","metadata":{', b'"%d":0', b"}}", 400_000)),
        Attack("400k_extra_fields", _TRAIN, "train", _numbered(b'{"model":"m",', b'"%d":"x"', b"}", 400_000)),
        Attack("400k_fields_no_scope", _TRAIN, "inference", _numbered(b'{"model":"m",', b'"%d":"x"', b"}", 400_000)),
        _chat(model, "800k_objects_in_stop", b'"stop":[', b'{"a":1}', b"]", _MOST),
        _chat(model, "2700k_lists_in_stop", b'"stop":[', b"[]", b"]", _MOST),
        Attack("250k_messages", _CHAT, "inference", _messages(model, 250_000)),
        _chat(model, "256kib_lists_in_stop", b'"stop":[', b"[]", b"]", _ON_THE_LOOP),
        _chat(model, "256kib_objects_in_stop", b'"stop":[', b'{"":0}', b"]", _ON_THE_LOOP),
        _chat(model, "256kib_strings_in_stop", b'"stop":[', b'"ab"', b"]", _ON_THE_LOOP),
        _chat(model, "256kib_empty_messages", b'"messages":[', b"{}", b"]", _ON_THE_LOOP),
        _chat(model, "256kib_parts", b'"messages":[{"role":"user","content":[', b'{"type":"text","text":""}', b"]}]", _ON_THE_LOOP),
        _chat(model, "256kib_nested", b'"stop":', b"[" * 500 + b"]" * 500, b"", 0),
        Attack("256kib_null_fields", _CHAT, "inference", _numbered(b'{"model":"m",', b'"%d":null', b"}", 18_000)),
        _chat(model, "256kib_biases", b'"logit_bias":{', b'"1":1', b"}", _ON_THE_LOOP),
        _chat(model, "8mib_of_text", b'"messages":[{"role":"user","content":"', b"a word and ", b'"}]', _MOST, between=b""),
        _chat(model, "8mib_with_an_emoji", b'"messages":[{"role":"user","content":"\xf0\x9f\x98\x80', b"a word and ", b'"}]', _MOST, between=b""),
        _chat(model, "8mib_of_strings", b'"stop":[', b'"a few words of text, thirty on"', b"]", _MOST),
        _chat(model, "8mib_of_escapes", b'"messages":[{"role":"user","content":"', b"\\u00e9", b'"}]', _MOST, between=b""),
        _chat(model, "8mib_of_fewer_objects", b'"stop":[', b'{"":0}' + b" " * 96, b"]", _MOST),
        Attack("8mib_as_model", _CHAT, "inference", b'{"model":"' + b"\\n" * (_MOST // 2) + b'","messages":[{"role":"user","content":"x"}]}'),
        Attack("64kib_wrong_scopes", _KEYS, "admin", _filled(b'{"name":"x","scopes":[', b"0", b"]}", _JSON)),
        Attack("64kib_metadata_keys", _TRAIN, "train", _numbered(b'{"model":"m","metadata":{', b'"%d":0', b"}}", 6_000)),
        Attack("64kib_extra_fields", _TRAIN, "train", _numbered(b'{"model":"m",', b'"%d":0', b"}", 6_000)),
        Attack("upload_of_returns", "/v1/files", "train", _upload(b"\r" * _MOST), _FORM),
        Attack("upload_of_boundaries", "/v1/files", "train", _upload(b"\r\n--" * (_MOST // 4)), _FORM),
        Attack("1mib_config_of_lists", _PUBLISH, "train", _form(adapter_config=_filled(b'{"r":[', b"[]", b"]}", _MIB), adapter_model=b"x"), _FORM),
        Attack("1mib_config_of_fields", _PUBLISH, "train", _form(adapter_config=_numbered(b"{", b'"%d":0', b"}", 95_000), adapter_model=b"x"), _FORM),
        Attack("1mib_manifest_of_fields", _PUBLISH, "train", _form(adapter_config=_CONFIG, manifest=_numbered(b"{", b'"%d":0', b"}", 95_000), adapter_model=b"x"), _FORM),
        Attack("2mib_weights_header", _PUBLISH, "train", _form(adapter_config=_CONFIG, adapter_model=_header(_numbered(b"{", b'"%d":{}', b"}", 150_000))), _FORM),
        Attack("openapi", "/openapi.json", "inference", b""),
        Attack("64kib_query", "/v1/files?" + "a=&" * 20_000, "train", b""),
    ]  # fmt: skip


def _chat(
    model: str, name: str, before: bytes, item: bytes, after: bytes, size: int, *, between: bytes = b","
) -> Attack:
    head = b'{"model":"%s",' % model.encode()
    return Attack(name, _CHAT, "inference", _filled(head + before, item, after + b"}", size, between=between))


def _filled(before: bytes, item: bytes, after: bytes, size: int, *, between: bytes = b",") -> bytes:
    count = max(1, (size - len(before) - len(after)) // len(item + between))
    return before + between.join([item] * count) + after


def _numbered(before: bytes, item: bytes, after: bytes, count: int) -> bytes:
    return before + b",".join([item % number for number in range(count)]) + after


def _messages(model: str, count: int) -> bytes:
    message = b'{"role":"user","content":""}'
    return b'{"model":"%s","messages":[%s]}' % (model.encode(), b",".join([message] * count))


def _upload(content: bytes) -> bytes:
    return _form(purpose=b"fine-tune", file=content)


def _form(**parts: bytes) -> bytes:
    head = '--B\r\ncontent-disposition: form-data; name="%s"%s\r\n\r\n'
    shown = {name: "" if name == "purpose" else '; filename="a"' for name in parts}
    return (
        b"".join((head % (name, shown[name])).encode() + part + b"\r\n" for name, part in parts.items()) + b"--B--\r\n"
    )


def _header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header
