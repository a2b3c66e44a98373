"""The documents say what the code does: fields, defaults, bounds, metrics, exit codes and example bytes."""

import ast
import importlib.util
import inspect
import re
from pathlib import Path

import jsonschema
import msgspec
import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cloud_hub import config as hub_config
from cloud_hub import errors as hub_errors
from edge_cascade import codec
from edge_cascade.gate import Exit
from edge_cascade.manifest import Wire
from edge_cascade.messages import (
    KIND_OF,
    Acks,
    BaseRequest,
    Case,
    CaseBatch,
    Chunk,
    ClientUpdate,
    DesiredModel,
    DesiredState,
    DifferingPair,
    Reason,
    Receipt,
    Receipts,
    Refusal,
    Rejection,
    Report,
    RoundOffer,
    RoundTerms,
    RunningModel,
    ShadowReport,
    ShadowScene,
    Source,
    Status,
    SwapReport,
    TrainingBase,
    Use,
    Verdict,
    VerdictBatch,
)
from edge_cascade.mqtt import Broker
from edge_cascade.packing import pack_exits, pack_probabilities
from edge_cascade.round_terms import encode_terms
from edge_cascade.tensors import encode_tensor
from edge_cascade.topics import DOWN, UP
from edge_daemon import config as edge_config
from edge_daemon import errors as edge_errors
from edge_daemon.config_file import load_config as load_edge_config
from edge_daemon.core.examples import ExampleCounts, ExampleDrop, LabelOutcome, Origin
from edge_daemon.core.spooling import Dropped, DropReason, Priority, SpoolCounts
from edge_daemon.metrics import Metrics
from edge_daemon.pipeline import Answer
from edge_daemon.results import VerdictMessage

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PROTOCOL = (DOCS / "protocol.md").read_text(encoding="utf-8")
CONFIGURATION = (DOCS / "configuration.md").read_text(encoding="utf-8")

BOOT, DIGEST = bytes.fromhex("8f3a52c6019be47d"), bytes(range(32))
SAMPLE = np.array([[0.0, 0.5, -1.0, 0.25]], dtype=np.float32)
EXITS = pack_exits([Exit(0, 3, 0.55, 0.875), Exit(1, 3, 0.75, 0.5)])
TENSOR = encode_tensor(SAMPLE, Wire("int8"))
CASE = Case(42, "line-3", 1763683200000, 5, EXITS, True, 0, Reason.UNSURE, True, True, TENSOR)
VERDICT = Verdict(
    BOOT, 42, "line-3", 3, pack_probabilities([0.0, 0.25, 0.0, 0.75]), Source.MODEL, Use.TRAIN, 1
)  # fmt: skip
TERMS = RoundTerms("demo", "round-1", DIGEST, DIGEST, 70_000, "int8", 10_000, 1, 32, 10_000, 0, 0, 16, 500)
EXAMPLE = {
    "CaseBatch": CaseBatch("press-3", BOOT, "demo", DIGEST, "p", [CASE]),
    "Acks": Acks(BOOT, committed=[42]),
    "VerdictBatch": VerdictBatch("demo", DIGEST, [VERDICT]),
    "Receipts": Receipts([Receipt(BOOT, 42, 1)]),
    "Status": Status("press-3", False, BOOT, "0.1.0"),
}
# One of every kind, with every nested type in it.
MESSAGES = [
    *EXAMPLE.values(),
    Acks(BOOT, [1], [2], [Rejection(3, "shape")], [Refusal(bytes(8), "no frame")]),
    Status("press-3", True, BOOT, "0.1.0", [RunningModel("demo", DIGEST, "p", 5)]),
    Report("press-3", BOOT, 7, 1763683200000, {"edge_samples{model=demo}": 12}),
    DesiredState("press-3", 1, [DesiredModel("demo", "r1", DIGEST)]),
    RoundOffer(encode_terms(TERMS), bytes(64), 3600),
    BaseRequest("press-3", "demo", DIGEST, bytes(32)),
    TrainingBase("demo", DIGEST, bytes(32), [b"step"]),
    SwapReport("press-3", BOOT, 8, 1763683200000, "demo", "7", DIGEST, DIGEST, "golden", "0.2 off"),
    ShadowReport("press-3", BOOT, 9, "demo", DIGEST, DIGEST, [ShadowScene("s", 5, [DifferingPair(3, 1, 2)])]),
    ClientUpdate("press-3", BOOT, 8, "demo", "round-1", DIGEST, 120, "int8", b"delta"),
    Chunk(DIGEST, 0, 2, 200, b"half"),
]


def section(text, heading):
    """What stands between a heading and the next one of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no heading {heading!r}"
    return found[1]


def rows(text):
    """The cells of every row of every table, heads and rules left out."""
    lines = [line.strip()[1:-1] for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [row for row in cells if row[0] and not set(row[0]) <= set("-|")]


def structs_in(*types):
    found, waiting = [], list(msgspec.inspect.multi_type_info(types))
    while waiting:
        kind = waiting.pop(0)
        if isinstance(kind, msgspec.inspect.StructType) and kind.cls not in found:
            found.append(kind.cls)
            waiting += [field.type for field in kind.fields]
        elif isinstance(kind, msgspec.inspect.ListType | msgspec.inspect.VarTupleType):
            waiting.append(kind.item_type)
    return found


def fields_of(kind):
    """The rows of a message's fields in protocol.md."""
    return [row for row in rows(section(PROTOCOL, kind.__name__)) if row[0].isdecimal()]


class TestProtocol:
    @pytest.mark.parametrize("kind", structs_in(*KIND_OF), ids=lambda kind: kind.__name__)
    def test_every_field_of_every_message_stands_in_wire_order(self, kind):
        table = fields_of(kind)
        assert [row[1].strip("`") for row in table] == list(kind.__struct_fields__)
        assert [int(row[0]) for row in table] == list(range(len(table)))

    @pytest.mark.parametrize("kind", structs_in(*KIND_OF), ids=lambda kind: kind.__name__)
    def test_a_field_with_a_default_says_so_and_no_other_does(self, kind):
        table = {row[1].strip("`"): row[-1] for row in fields_of(kind)}
        defaults = {field.name for field in msgspec.structs.fields(kind) if not field.required}
        assert {name for name, meaning in table.items() if "default " in meaning} == defaults

    def test_every_kind_byte_is_named(self):
        table = section(PROTOCOL, "Frame")
        for message, kind in KIND_OF.items():
            assert f"| {kind.value} | `{message.__name__}` |" in table

    def test_every_topic_is_named(self):
        named = {row[0].strip("`") for row in rows(section(PROTOCOL, "Topics"))}
        tree = {f"{{prefix}}/v1/{{device}}/up/{channel}" for channel in UP}
        assert named >= tree | {f"{{prefix}}/v1/{{device}}/down/{channel}" for channel in DOWN}

    @pytest.mark.parametrize(("name", "message"), EXAMPLE.items())
    def test_the_examples_bytes_are_what_the_code_writes(self, name, message):
        frame = hex_block(name)
        assert codec.encode(message) == frame
        assert codec.decode(frame) == message

    def test_the_examples_parts_are_what_the_code_writes(self):
        assert hex_block("tensor") == TENSOR
        assert hex_block("exits") == EXITS
        assert codec.frame_digest(hex_block("CaseBatch")).hex(" ") in PROTOCOL
        assert f"{len(hex_block('CaseBatch'))} bytes" in PROTOCOL


def hex_block(name):
    found = re.search(rf"^```hex {name}\n(.*?)^```", PROTOCOL, re.MULTILINE | re.DOTALL)
    assert found is not None, name
    # Two spaces end the bytes of a line; what follows explains them.
    return bytes.fromhex("".join(line.split("  ")[0] for line in found[1].splitlines()))


class TestAsyncApi:
    def test_the_document_is_what_the_generator_writes(self):
        generator = load_generator()
        written = generator.PATH.read_text(encoding="utf-8")
        assert written == generator.render(), "run python docs/make_asyncapi.py"

    def test_every_reference_leads_somewhere(self):
        document = yaml.safe_load((DOCS / "asyncapi.yaml").read_text(encoding="utf-8"))
        references = list(references_in(document))
        assert references
        for reference in references:
            place = document
            for step in reference.removeprefix("#/").split("/"):
                place = place[step]

    @pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
    def test_a_real_message_fits_its_schema(self, message):
        check_against_schema(message)

    def test_a_wrong_message_does_not_fit(self):
        with pytest.raises(jsonschema.ValidationError):
            check_against_schema(msgspec.structs.replace(EXAMPLE["CaseBatch"], boot=b"short"))

    def test_there_is_a_message_of_every_type_above(self):
        assert {type(message) for message in MESSAGES} == set(KIND_OF)


def load_generator():
    spec = importlib.util.spec_from_file_location("make_asyncapi", DOCS / "make_asyncapi.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def references_in(value):
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references_in(inner)


def check_against_schema(message):
    document = yaml.safe_load((DOCS / "asyncapi.yaml").read_text(encoding="utf-8"))
    # Bytes as strings of one character a byte: that is what contentEncoding `binary` means here.
    value = msgspec.to_builtins(message, builtin_types=(bytes,), enc_hook=None)
    reference = f"#/components/schemas/{type(message).__name__}/schema"
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$ref": reference, **document}
    jsonschema.Draft202012Validator(schema).validate(with_text_for_bytes(value))


def with_text_for_bytes(value):
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if isinstance(value, list | tuple):
        return [with_text_for_bytes(inner) for inner in value]
    if isinstance(value, dict):
        return {key: with_text_for_bytes(inner) for key, inner in value.items()}
    return value


def keys_of(kind, start=""):
    """(key, field) of everything that a configuration takes; a broker's keys as `broker.*`."""
    for field in msgspec.inspect.type_info(kind).fields:
        key = start + field.encode_name
        if isinstance(field.type, msgspec.inspect.StructType):
            if field.type.cls is not Broker:
                yield from keys_of(field.type.cls, f"{key}.")
            continue
        yield key, field
        if isinstance(field.type, msgspec.inspect.VarTupleType):
            yield from keys_of(field.type.item_type.cls, f"{key}[].")


def documented_default(field):
    if field.required:
        return "required"
    if field.default is None:
        return "-"
    if field.default == ():
        return "`[]`"
    if isinstance(field.default, str):
        return f"`{field.default}`"
    return str(field.default).lower()


def without_text(kind):
    """A type without the description around it."""
    if isinstance(kind, msgspec.inspect.UnionType):
        return msgspec.inspect.UnionType(tuple(without_text(one) for one in kind.types))
    return kind.type if isinstance(kind, msgspec.inspect.Metadata) else kind


def bounds_of(kind):
    kinds = kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)
    for one in kinds:
        for name in ("ge", "gt", "le", "min_length", "max_length"):
            bound = getattr(one, name, None)
            if bound is not None:
                yield f"{int(bound) if float(bound).is_integer() else bound}"
        if getattr(one, "lt", None) is not None:
            yield str(one.lt - 1) if isinstance(one, msgspec.inspect.IntType) else f"{one.lt:g}"
        if isinstance(one, msgspec.inspect.LiteralType):
            yield from map(str, one.values)


def is_named(bound, allowed):
    return re.search(rf"(?<![\d.]){re.escape(bound)}(?!\.?\d)", allowed) is not None


class TestConfiguration:
    @pytest.mark.parametrize(
        ("heading", "keys"),
        [
            ("edge.toml", list(keys_of(edge_config.Config))),
            ("hub.toml", list(keys_of(hub_config.Config))),
            ("Broker tables", list(keys_of(Broker, "broker."))),
        ],
    )
    def test_every_key_stands_with_its_default_and_bounds(self, heading, keys):
        table = {row[0].strip("`"): row for row in rows(section(CONFIGURATION, heading)) if row[0] != "key"}
        assert list(table) == [key for key, _ in keys]
        for key, field in keys:
            _, _, default, allowed, meaning = table[key]
            assert default == documented_default(field), key
            assert meaning, key
            for bound in bounds_of(field.type):
                assert is_named(bound, allowed), f"{key}: {bound} in {allowed!r}"

    def test_every_setting_of_a_series_stands_with_its_default_and_bounds(self):
        from cloud_hub.federation.settings import SeriesSettings

        text = (DOCS / "federation.md").read_text(encoding="utf-8")
        table = {
            row[0].strip("`"): row for row in rows(section(text, "Settings of a series")) if row[0] != "key"
        }
        fields = {field.encode_name: field for field in msgspec.inspect.type_info(SeriesSettings).fields}
        assert list(table) == list(fields)
        for key, field in fields.items():
            assert table[key][1] == documented_default(field), key
            for bound in bounds_of(without_text(field.type)):
                assert is_named(bound, table[key][2]), f"{key}: {bound} in {table[key][2]!r}"

    def test_the_complete_files_load_and_set_every_key_to_its_default(self, tmp_path):
        edge = load_example(tmp_path, "edge.toml", lambda path: load_edge_config(path, {}))
        hub = load_example(tmp_path, "hub.toml", lambda path: hub_config.load_config(path, {}))
        assert msgspec.structs.replace(edge.results, prefix="results") == edge_config.ResultsConfig()
        assert (edge.spool, edge.audit, edge.training, edge.http, edge.log) == (
            edge_config.SpoolConfig(),
            edge_config.AuditConfig(),
            edge_config.TrainingConfig(),
            edge_config.HttpConfig(),
            edge_config.LogConfig(),
        )
        assert msgspec.structs.replace(edge.hub, broker=Broker()) == edge_config.HubConfig()
        assert (hub.hub, hub.http, hub.log) == (
            hub_config.HubSection(),
            hub_config.HttpSection(),
            hub_config.LogSection(),
        )

    @pytest.mark.parametrize(("heading", "kind"), [("Answers", Answer), ("Verdicts", VerdictMessage)])
    def test_every_field_of_the_results_stands_in_order_and_the_example_has_them(self, heading, kind):
        text = section(CONFIGURATION, heading)
        named = [row[0].strip("`") for row in rows(text) if row[0] != "field"]
        assert named == list(kind.__struct_fields__)
        example = re.search(rf"^```json {kind.__name__}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1]
        assert list(msgspec.json.decode(example)) == named
        assert isinstance(msgspec.json.decode(example, type=kind), kind)

    def test_every_exit_code_stands(self):
        for program, errors in (("`edge-daemon`", edge_errors), ("`cloud-hub`", hub_errors)):
            text = section(CONFIGURATION, "Exit codes").split(f"{program}:")[1].split("`:")[0]
            codes = {row[0] for row in rows(text)}
            classes = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
            named = {kind.exit_code for kind in classes if issubclass(kind, Exception)}
            constants = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
            assert {str(code) for code in named | constants} <= codes


def load_example(tmp_path, name, load):
    found = re.search(rf"^```toml {re.escape(name)}\n(.*?)^```", CONFIGURATION, re.MULTILINE | re.DOTALL)
    path = tmp_path / name
    path.write_text(found[1], encoding="utf-8")
    return load(path)


class TestMetrics:
    def test_every_metric_of_the_device_stands_with_its_labels(self):
        metrics = Metrics()
        drops = {(DropReason.LIMIT, Priority.AUDIT): Dropped(1, 2)}
        metrics.watch_spool(lambda: SpoolCounts(drops=drops))
        metrics.watch_examples(
            lambda: ExampleCounts(
                rows={("x", Origin.SELF): 1}, labels={LabelOutcome.USED: 1}, dropped={ExampleDrop.LIMIT: 1}
            )
        )
        for name, help_text, is_total in watched_by_the_daemon():
            metrics.watch(name, help_text, lambda: 0, is_total=is_total)
        for tally in metrics.tallies():
            tally.add(*("x" for _ in tally.labels))
        metrics.latency.observe("x", 0.001)
        assert_documented(metrics.render(), "edge_")

    def test_every_counter_of_the_uplink_stands(self):
        source = (ROOT / "edge_daemon/uplink.py").read_text(encoding="utf-8")
        function = next(
            node for node in ast.walk(ast.parse(source)) if getattr(node, "name", None) == "counters"
        )
        names = {key.value for node in ast.walk(function) if isinstance(node, ast.Dict) for key in node.keys}
        assert names
        assert {f"edge_uplink_{name}" for name in names} == {
            name for name in documented_metrics() if name.startswith("edge_uplink_")
        }

    def test_every_metric_of_the_hub_stands_with_its_labels(self):
        from cloud_hub.admin import documents as doc
        from cloud_hub.admin.metrics import Vitals, render_metrics

        agreement = doc.Agreement(same=1, different=0, share=1.0)
        model = doc.ModelStats(
            cases={"audit": 1},
            verdicts={"model": 1},
            failed=1,
            audits=agreement,
            escalations=agreement,
            rounds={"committed": 1},
        )
        numbers = {
            field.name: 1
            for field in msgspec.structs.fields(doc.Stats)
            if field.type != dict[str, int] and field.name not in {"models", "acks_latency"}
        }
        stats = doc.Stats(
            **numbers,
            models={"x": model},
            rejected={"shape": 1},
            malformed={"frame": 1},
            votes={"counted": 1},
            base_requests={"served": 1},
            round_bytes={"up": 1},
            acks_latency=doc.Latency(p50_ms=1.0, p99_ms=2.0),
        )
        vitals = Vitals(True, 0, 0, (0.001, 0.002), 0, True)
        assert_documented(render_metrics(stats, vitals, {"x"}), "hub_")


def watched_by_the_daemon():
    """The calls of `metrics.watch`: what is read from elsewhere."""
    modules = [ROOT / "edge_daemon/daemon.py", ROOT / "edge_daemon/watched.py"]
    nodes = [node for path in modules for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    for node in nodes:
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "watch":
            name, help_text = (argument.value for argument in node.args[:2])
            is_total = all(keyword.value.value for keyword in node.keywords if keyword.arg == "is_total")
            yield name, help_text, is_total


def documented_metrics():
    table = rows(section(CONFIGURATION, "Metrics"))
    return {row[0].strip("`"): row for row in table if row[0].startswith("`")}


def assert_documented(rendered, prefix):
    documented = documented_metrics()
    families = list(text_string_to_metric_families(rendered.decode()))
    for family in families:
        assert family.name in documented, family.name
        _, kind, labels, _ = documented[family.name]
        assert kind == family.type, family.name
        used = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert {label.strip(" `") for label in labels.split(",") if label.strip()} == used, family.name
    named = {name for name in documented if name.startswith(prefix) and not name.startswith("edge_uplink_")}
    assert named == {family.name for family in families}


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: str(path.relative_to(DOCS)))
def test_links_between_documents_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_the_readme_has_the_quickstart_word_for_word():
    example = (ROOT / "examples/quickstart/README.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```.*?^```$", example, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 5
    assert [block for block in blocks if block not in readme] == []
