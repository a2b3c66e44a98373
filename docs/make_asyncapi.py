"""Writes docs/asyncapi.yaml from the message types: `python docs/make_asyncapi.py`, by hand after a change.

Needs PyYAML (extra `dev`). tests/test_docs.py makes the document again and compares; docs/protocol.md says
the same in words.
"""

import inspect
from pathlib import Path
from typing import Any

import msgspec
import yaml

from edge_cascade.codec import MAGIC, VERSION
from edge_cascade.messages import (
    KIND_OF,
    Acks,
    BaseRequest,
    CaseBatch,
    Chunk,
    ClientUpdate,
    DesiredState,
    Message,
    Receipts,
    Report,
    RoundOffer,
    ShadowReport,
    Status,
    SwapReport,
    TrainingBase,
    VerdictBatch,
)
from edge_cascade.topics import DEFAULT_PREFIX, DOWN, UP, VERSION_LEVEL
from edge_daemon.pipeline import Answer
from edge_daemon.results import VerdictMessage

PATH = Path(__file__).with_name("asyncapi.yaml")

SCHEMA_FORMAT = "application/schema+json;version=draft-2020-12"
REFERENCE = "#/components/schemas/{name}/schema"

# Which messages travel on which topic, and how. A chunk carries a frame of the others.
CHANNELS: dict[str, tuple[tuple[type[Message], ...], bool]] = {
    "cases": ((CaseBatch, Chunk), False),
    "update": ((ClientUpdate, Chunk), False),
    "status": ((Status,), True),
    "telemetry": ((Report, SwapReport, ShadowReport, Receipts, BaseRequest, Chunk), False),
    "acks": ((Acks,), False),
    "verdicts": ((VerdictBatch,), False),
    "desired": ((DesiredState,), True),
    "round": ((RoundOffer, TrainingBase, Chunk), True),
}
# In the protocol, but this version sends none of them.
NOT_YET: tuple[type[Message], ...] = ()

HEAD = "# Written by docs/make_asyncapi.py from the message types. Do not edit; run it again.\n"


def document() -> dict[str, Any]:
    """The AsyncAPI 3.0 document, seen from a device: it sends on `up`, receives on `down`."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "edge-daemon device",
            "version": str(VERSION),
            "description": (
                "What one device sends and receives. The hub does the reverse. A payload is a frame: "
                f"byte 0x{MAGIC:02X}, protocol version, kind, flags, then one msgpack array, deflated "
                "where bit 0 of the flags is set. The schemas describe that array; bytes (msgpack `bin`) "
                "appear as strings with contentEncoding `binary`, their lengths in bytes. "
                "docs/protocol.md is the reference."
            ),
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": "application/msgpack",
        "servers": {
            "hub": {
                "host": "broker.example:8883",
                "protocol": "secure-mqtt",
                "description": "Shared by device and hub: MQTT 5, or 3.1.1 with the same payloads.",
            },
            "site": {
                "host": "127.0.0.1:1883",
                "protocol": "mqtt",
                "description": "The broker of sensors and of readers of results; may be the same one.",
            },
        },
        "channels": _channels(),
        "operations": _operations(),
        "components": {"messages": _messages(), "schemas": _schemas()},
    }


def render() -> str:
    """The document as YAML."""
    return HEAD + yaml.dump(document(), Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Paragraphs as blocks, nothing by reference to another place of the file."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write what is there twice twice."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _channels() -> dict[str, Any]:
    parameters = {
        "prefix": {"default": DEFAULT_PREFIX, "description": "Levels of letters, digits, '.', '_' or '-'."},
        "device": {"description": "1 to 64 letters, digits, '.', '_' or '-', a letter or digit first."},
    }
    found: dict[str, Any] = {}
    for name, (types, _) in CHANNELS.items():
        direction = "up" if name in UP else "down"
        found[name] = {
            "address": f"{{prefix}}/{VERSION_LEVEL}/{{device}}/{direction}/{name}",
            "servers": [{"$ref": "#/servers/hub"}],
            "parameters": parameters,
            "messages": {kind.__name__: {"$ref": f"#/components/messages/{kind.__name__}"} for kind in types},
        }
    for name, kind, address in (
        ("results", Answer, "{results}/{sensor}"),
        ("resultVerdicts", VerdictMessage, "{results}/{sensor}/verdict"),
    ):
        found[name] = {
            "address": address,
            "servers": [{"$ref": "#/servers/site"}],
            "parameters": {
                "results": {"default": "results", "description": "`results.prefix` of edge.toml."},
                "sensor": {"description": "The sensor's name, from the topic that the sample came on."},
            },
            "messages": {kind.__name__: {"$ref": f"#/components/messages/{kind.__name__}"}},
        }
    return found


def _operations() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (types, retained) in CHANNELS.items():
        sends = name in UP
        found[f"{'send' if sends else 'receive'}{name.capitalize()}"] = {
            "action": "send" if sends else "receive",
            "channel": {"$ref": f"#/channels/{name}"},
            "messages": [{"$ref": f"#/channels/{name}/messages/{kind.__name__}"} for kind in types],
            "bindings": {"mqtt": {"qos": 1, "retain": retained, "bindingVersion": "0.2.0"}},
        }
    for name, kind in (("results", Answer), ("resultVerdicts", VerdictMessage)):
        found[f"send{name[0].upper()}{name[1:]}"] = {
            "action": "send",
            "channel": {"$ref": f"#/channels/{name}"},
            "messages": [{"$ref": f"#/channels/{name}/messages/{kind.__name__}"}],
            "bindings": {"mqtt": {"qos": 1, "retain": False, "bindingVersion": "0.2.0"}},
        }
    return found


def _messages() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for message, kind in KIND_OF.items():
        about = inspect.cleandoc(message.__doc__ or "")
        if message in NOT_YET:
            about += "\n\nThis version sends none: the type is fixed, what uses it comes later."
        found[message.__name__] = {
            "name": message.__name__,
            "title": f"{message.__name__}, kind byte {kind.value}",
            "summary": about.splitlines()[0],
            "description": about,
            "payload": {"$ref": f"#/components/schemas/{message.__name__}"},
        }
    for json_message in (Answer, VerdictMessage):
        about = inspect.cleandoc(json_message.__doc__ or "")
        found[json_message.__name__] = {
            "name": json_message.__name__,
            "summary": about.splitlines()[0],
            "description": about,
            "contentType": "application/json",
            "payload": {"$ref": f"#/components/schemas/{json_message.__name__}"},
        }
    return found


def _schemas() -> dict[str, Any]:
    types = (*KIND_OF, Answer, VerdictMessage)
    _, components = msgspec.json.schema_components(types, ref_template=REFERENCE)
    described = {kind.__name__: kind for kind in map(_struct, _nested(types))}
    return {
        name: {"schemaFormat": SCHEMA_FORMAT, "schema": _named(schema, described.get(name))}
        for name, schema in components.items()
    }


def _struct(kind: msgspec.inspect.StructType) -> type[msgspec.Struct]:
    return kind.cls


def _nested(types: tuple[type, ...]) -> list[msgspec.inspect.StructType]:
    """Every struct that the types are made of."""
    found: dict[type, msgspec.inspect.StructType] = {}
    waiting = list(msgspec.inspect.multi_type_info(types))
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, msgspec.inspect.StructType) and kind.cls not in found:
            found[kind.cls] = kind
            waiting += [field.type for field in kind.fields]
        elif isinstance(kind, msgspec.inspect.ListType):
            waiting.append(kind.item_type)
    return list(found.values())


def _named(schema: dict[str, Any], kind: type[msgspec.Struct] | None) -> dict[str, Any]:
    """The schema with the names of its fields, and with bytes as msgpack has them rather than as base64."""
    schema = dict(schema)
    if "description" in schema:
        schema["description"] = inspect.cleandoc(schema["description"])
    if kind is None or "prefixItems" not in schema:
        return schema
    fields = msgspec.inspect.type_info(kind).fields
    schema["prefixItems"] = [
        {"title": field.name} | (_bytes(field.type) if _is_bytes(field.type) else item)
        for field, item in zip(fields, schema["prefixItems"], strict=True)
    ]
    return schema


def _is_bytes(kind: msgspec.inspect.Type) -> bool:
    return isinstance(kind, msgspec.inspect.BytesType)


def _bytes(kind: Any) -> dict[str, Any]:
    lengths = {"minLength": kind.min_length, "maxLength": kind.max_length}
    return {"type": "string", "contentEncoding": "binary"} | {
        key: value for key, value in lengths.items() if value is not None
    }


assert set(CHANNELS) == {*UP, *DOWN}, "a channel of the topic tree is missing here"
assert {kind for types, _ in CHANNELS.values() for kind in types} == set(KIND_OF), "a message has no channel"

if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
