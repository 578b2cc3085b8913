#!/usr/bin/env python3
"""A small Felucca client, written from docs/protocol.md and felucca.proto alone, with Python's standard library.

    python3 tests/python/client.py ADDRESS:PORT

It goes through the protocol against the broker at that address, checks every answer, and prints "ok". What it does is
what the documentation says; where the two part, the documentation is to be mended. It is an example of how little a
client needs, not a library: one thread, blocking, no reconnecting.
"""

import re
import socket
import struct
import sys
import time
import uuid
from collections import namedtuple
from pathlib import Path

TIMEOUT_SECONDS = 20
PROTO = Path(__file__).resolve().parents[2] / "protocol" / "proto" / "felucca.proto"

# ---- Protobuf --------------------------------------------------------------------------------------------------------

Field = namedtuple("Field", "number type name label")


def read_proto(text):
    """The messages and enums of a .proto file, as far as felucca.proto uses the language."""
    messages, enums = {}, {}
    text = re.sub(r"//.*", "", text)
    for kind, name, body in re.findall(r"^(message|enum) (\w+) \{(\}$|.*?^\}$)", text, re.M | re.S):
        if kind == "enum":
            enums[name] = {int(number): value for value, number in re.findall(r"(\w+) = (\d+);", body)}
        else:
            found = re.findall(r"(repeated|optional)? *(\w+) (\w+) = (\d+);", body)
            messages[name] = [Field(int(number), kind, field, label) for label, kind, field, number in found]
    return messages, enums


MESSAGES, ENUMS = read_proto(PROTO.read_text(encoding="utf-8"))


def varint(value):
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def encode(name, values):
    """A message from a dictionary of its fields; enums by name."""
    out = bytearray()
    left = dict(values)
    for field in MESSAGES[name]:
        if field.name not in left:
            continue
        value = left.pop(field.name)
        for item in value if field.label == "repeated" else [value]:
            if field.type in MESSAGES:
                item = encode(field.type, item)
            elif field.type == "string":
                item = item.encode()
            elif field.type in ENUMS:
                item = next(number for number, enumerator in ENUMS[field.type].items() if enumerator == item)
            if isinstance(item, bytes):
                out += varint(field.number << 3 | 2) + varint(len(item)) + item
            else:
                out += varint(field.number << 3) + varint(item)
    assert not left, f"{name} has no {list(left)}"
    return bytes(out)


def absent(field):
    """What a field is that was not sent. A message, and a field marked optional, is None then."""
    if field.label == "repeated":
        return []
    if field.label == "optional" or field.type in MESSAGES:
        return None
    if field.type in ENUMS:
        return ENUMS[field.type][0]
    return {"string": "", "bytes": b"", "bool": False}.get(field.type, 0)


def read_item(field, item):
    """A field's value from what is on the wire: a number, or bytes."""
    if field.type in MESSAGES:
        return decode(field.type, item)
    if field.type in ENUMS:
        return ENUMS[field.type].get(item, item)
    if field.type == "string":
        return item.decode()
    if field.type == "bool":
        return bool(item)
    if field.type == "int64" and item >= 1 << 63:
        return item - (1 << 64)
    return item


def decode(name, data):
    """A message as a dictionary of all its fields."""
    fields = {field.number: field for field in MESSAGES[name]}
    out = {field.name: absent(field) for field in fields.values()}
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        if tag & 7 == 0:
            item, at = read_varint(data, at)
        else:
            assert tag & 7 == 2, f"{name}: wire type {tag & 7}"
            length, at = read_varint(data, at)
            item, at = data[at : at + length], at + length
            assert at <= len(data), f"{name} is cut off"
        field = fields.get(tag >> 3)
        if field is None:
            continue  # of a newer broker
        if field.label != "repeated":
            out[field.name] = read_item(field, item)
        elif isinstance(item, bytes) and field.type not in MESSAGES and field.type not in ("string", "bytes"):
            position = 0
            while position < len(item):  # packed
                number, position = read_varint(item, position)
                out[field.name].append(read_item(field, number))
        else:
            out[field.name].append(read_item(field, item))
    return out


# ---- Record batches --------------------------------------------------------------------------------------------------

Record = namedtuple("Record", "offset timestamp key value headers")
HEADER = struct.Struct(">qiibIHiqqqhii")


def crc_table():
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


CRC_TABLE = crc_table()


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def murmur2(data):
    """Kafka's murmur2, unsigned."""
    mix, mask = 0x5BD1E995, 0xFFFFFFFF
    value = (0x9747B28C ^ len(data)) & mask
    whole = len(data) & ~3
    for (word,) in struct.iter_unpack("<I", data[:whole]):
        word = word * mix & mask
        word = (word ^ word >> 24) * mix & mask
        value = value * mix & mask ^ word
    if whole < len(data):
        value = (value ^ int.from_bytes(data[whole:], "little")) * mix & mask
    value = (value ^ value >> 13) * mix & mask
    return value ^ value >> 15


def partition_of(key, partitions):
    return (murmur2(key) & 0x7FFFFFFF) % partitions


def zigzag(value):
    return varint(value << 1 ^ value >> 63)


def read_zigzag(data, at):
    value, at = read_varint(data, at)
    return value >> 1 ^ -(value & 1), at


def sized(data):
    return zigzag(-1) if data is None else zigzag(len(data)) + data


def read_sized(data, at):
    length, at = read_zigzag(data, at)
    return (None, at) if length < 0 else (data[at : at + length], at + length)


def batch(records, producer=(-1, -1), sequence=-1):
    """One record batch of (key, value, headers), headers being a list of (name, value)."""
    now = int(time.time() * 1000)
    body = bytearray()
    for delta, (key, value, headers) in enumerate(records):
        record = b"\0" + zigzag(0) + zigzag(delta) + sized(key) + sized(value) + zigzag(len(headers))
        for name, content in headers:
            record += sized(name.encode()) + sized(content)
        body += zigzag(len(record)) + record
    last = len(records) - 1
    producer_id, epoch = producer
    covered = struct.pack(">HiqqqhiI", 0, last, now, now, producer_id, epoch, sequence, len(records)) + body
    return struct.pack(">qiibI", 0, 9 + len(covered), 0, 2, crc32c(covered)) + covered


def read_batches(data):
    """The records of all batches in a payload."""
    records = []
    while data:
        base, length, _, magic, crc, attributes, _, first, _, _, _, _, count = HEADER.unpack_from(data)
        end = 12 + length
        assert end <= len(data), "a batch is cut off"
        assert magic == 2, f"magic {magic}"
        assert crc == crc32c(data[21:end]), "a batch's checksum does not match"
        assert attributes & 7 == 0, f"compression {attributes & 7}"
        at = HEADER.size
        for _ in range(count):
            size, at = read_zigzag(data, at)
            after = at + size
            time_delta, at = read_zigzag(data, at + 1)
            offset_delta, at = read_zigzag(data, at)
            key, at = read_sized(data, at)
            value, at = read_sized(data, at)
            header_count, at = read_zigzag(data, at)
            headers = []
            for _ in range(header_count):
                name, at = read_sized(data, at)
                content, at = read_sized(data, at)
                headers.append((name.decode(), content))
            assert at == after, "a record's length does not match"
            records.append(Record(base + offset_delta, first + time_delta, key, value, headers))
        assert at == end, "a batch's length does not match"
        data = data[end:]
    return records


# ---- Connection ------------------------------------------------------------------------------------------------------

REQUEST, REPLY, ERROR, PUSH = range(4)

# Name of a request: its number and the message that answers it.
REQUESTS = {
    "Hello": (1, "Welcome"),
    "Ping": (2, "Empty"),
    "Metadata": (3, "MetadataReply"),
    "ListOffsets": (4, "ListOffsetsReply"),
    "CreateTopic": (10, "TopicReply"),
    "InitProducer": (20, "InitProducerReply"),
    "Produce": (21, "ProduceReply"),
    "Fetch": (22, "FetchReply"),
    "Subscribe": (23, "Empty"),
    "Credit": (24, None),
    "Unsubscribe": (25, "Empty"),
    "GroupHeartbeat": (30, "GroupHeartbeatReply"),
    "CommitOffsets": (31, "CommitOffsetsReply"),
    "FetchOffsets": (32, "FetchOffsetsReply"),
    "CreateShareGroup": (40, "Empty"),
    "DescribeGroup": (46, "DescribeGroupReply"),
    "ShareSubscribe": (50, "Empty"),
    "Settle": (52, "SettleReply"),
    "Complete": (53, "CompleteReply"),
    "ListDeadLetters": (60, "ListDeadLettersReply"),
    "Redrive": (61, "RedriveReply"),
    "ListRedrives": (63, "ListRedrivesReply"),
}
PUSHES = {26: "Records", 27: "SubscriptionEnded", 51: "LeasedRecords"}


class BrokerError(Exception):
    """An error of the broker about one request; the connection goes on."""

    def __init__(self, error):
        super().__init__(f"error {error['code']}: {error['message']}")
        self.code = error["code"]


class Ended(Exception):
    """The broker says why it ends the connection."""


class Connection:
    def __init__(self, address):
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_SECONDS)
        self.correlation = 0
        self.answers = {}
        self.pushes = []

    def close(self):
        self.socket.close()

    def send(self, api, message, payload=b""):
        """Sends a request and returns its correlation; they begin at 1."""
        self.correlation += 1
        length = 16 + len(message) + len(payload)
        header = struct.pack(">IBBHQI", length, REQUEST, api, 0, self.correlation, len(message))
        self.socket.sendall(header + message + payload)
        return self.correlation

    def receive(self, count):
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            if not part:
                raise EOFError("the broker closed the connection")
            data += part
        return data

    def read_frame(self):
        (length,) = struct.unpack(">I", self.receive(4))
        body = self.receive(length)
        kind, api, reserved, correlation, message_length = struct.unpack_from(">BBHQI", body)
        message, payload = body[16 : 16 + message_length], body[16 + message_length :]
        assert reserved == 0
        if kind == PUSH:
            push = decode(PUSHES[api], message)
            assert push["subscription"] == correlation
            self.pushes.append((PUSHES[api], push, payload))
        elif kind == ERROR and correlation == 0:
            raise Ended(decode("Error", message)["message"])
        else:
            assert kind in (REPLY, ERROR), f"kind {kind}"
            self.answers[correlation] = (kind, api, message, payload)

    def answer(self, correlation):
        """The answer to one request. What comes before it is kept."""
        while correlation not in self.answers:
            self.read_frame()
        return self.answers.pop(correlation)

    def call(self, request, payload=b"", /, **fields):
        """Sends a request and waits for its answer: a message and a payload."""
        api, reply = REQUESTS[request]
        correlation = self.send(api, encode(request, fields), payload)
        if reply is None:
            return None
        kind, answered, message, payload = self.answer(correlation)
        assert answered == api, f"{request} was answered as request {answered}"
        if kind == ERROR:
            raise BrokerError(decode("Error", message))
        return decode(reply, message), payload

    def ask(self, request, payload=b"", /, **fields):
        """As `call`, where the answer has no payload."""
        message, rest = self.call(request, payload, **fields)
        assert rest == b"", f"{request} was answered with a payload"
        return message

    def push(self, name, subscription):
        """The next push for a subscription, which must be of this kind."""
        while True:
            for index, (kind, message, payload) in enumerate(self.pushes):
                if message["subscription"] == subscription:
                    assert kind == name, f"{kind} instead of {name}: {message}"
                    del self.pushes[index]
                    return message, payload
            self.read_frame()

    def no_push(self):
        """Asserts that nothing is pushed for a while."""
        time.sleep(0.1)
        self.ask("Ping")
        same(self.pushes, [])


def connect(address):
    connection = Connection(address)
    welcome = connection.ask("Hello", min_version=1, max_version=1, client_name="client.py", client_version="1")
    same(welcome["version"], 1)
    return connection, welcome


# ---- What is checked -------------------------------------------------------------------------------------------------


def same(actual, wanted):
    assert actual == wanted, f"{actual!r} instead of {wanted!r}"


def refused(code, request, *arguments, **fields):
    """Asserts that a call gets this error."""
    try:
        answer = request(*arguments, **fields)
    except BrokerError as error:
        assert error.code == code, f"{error} instead of code {code}"
    else:
        raise AssertionError(f"{answer} instead of error {code}")


def fresh(name):
    """A name that no earlier run has used."""
    return f"{name}-{uuid.uuid4().hex[:8]}"


def entry(topic, partition, data):
    return {"topic_id": topic["id"], "partition": partition, "length": len(data)}


def produce(connection, topic, partition, data):
    """Produces one batch and returns its result."""
    reply = connection.ask("Produce", data, level="LEVEL_SYNCED", entries=[entry(topic, partition, data)])
    (result,) = reply["results"]
    return result


def fetch(connection, topic_id, partition, offset, max_wait_ms=0):
    """The records from an offset on."""
    request = {"topic_id": topic_id, "partition": partition, "offset": offset}
    reply, payload = connection.call("Fetch", max_bytes=1 << 20, max_wait_ms=max_wait_ms, **request)
    return reply, [record for record in read_batches(payload) if record.offset >= offset]


def check_arithmetic():
    same(crc32c(b"123456789"), 0xE3069283)
    for key, hashed in ((b"21", -973932308), (b"foobar", -790332482), (b"a-little-bit-long-string", -985981536)):
        same(murmur2(key), hashed & 0xFFFFFFFF)
    for number in (0, 1, -1, 63, -64, 64, 1 << 40, -(1 << 40)):
        same(read_zigzag(zigzag(number), 0)[0], number)


def check_handshake(address):
    stranger = Connection(address)
    refused(2, stranger.ask, "Hello", min_version=2, max_version=3)
    try:
        stranger.read_frame()
    except EOFError:
        stranger.close()
    else:
        raise AssertionError("a connection without a version goes on")
    connection, welcome = connect(address)
    assert welcome["boot_epoch"] > 0 and welcome["session_timeout_ms"] > 0, welcome
    assert welcome["max_record_bytes"] <= welcome["max_batch_bytes"] < welcome["max_frame_bytes"], welcome
    connection.ask("Ping")
    return connection


def check_topics(connection):
    name = fresh("python.orders")
    topic = connection.ask("CreateTopic", name=name, partitions=3)["topic"]
    same((topic["name"], topic["partitions"], topic["kind"]), (name, 3, "TOPIC_KIND_STANDARD"))
    same(len(topic["id"]), 16)
    refused(12, connection.ask, "CreateTopic", name=name, partitions=3)
    refused(13, connection.ask, "CreateTopic", name="no such name", partitions=1)
    metadata = connection.ask("Metadata", topics=[name, "nobody"])
    same(metadata["topics"], [topic])
    (unknown,) = metadata["errors"]
    same((unknown["name"], unknown["error"]["code"]), ("nobody", 10))
    return topic


def check_producing(connection, topic):
    """Leaves six records in two batches in the partition that it returns."""
    init = connection.ask("InitProducer")
    producer = (init["producer_id"], init["producer_epoch"])
    key = b"customer-7"
    partition = partition_of(key, topic["partitions"])
    records = [(key, b"order %d" % number, [("number", b"%d" % number), ("none", None)]) for number in range(3)]
    first = batch(records, producer, 0)
    same(produce(connection, topic, partition, first), {"base_offset": 0, "error": None, "duplicate": False})
    second = batch([(key, None, []), (None, b"", []), (key, "ü".encode(), [])], producer, 3)
    same(produce(connection, topic, partition, second)["base_offset"], 3)
    same(produce(connection, topic, partition, first), {"base_offset": 0, "error": None, "duplicate": True})
    gap = batch(records, producer, 9)
    same(produce(connection, topic, partition, gap)["error"]["code"], 25)

    # A batch that is wrong refuses its request; an entry that cannot be taken only itself.
    wrong = bytearray(batch(records))
    wrong[-1] ^= 1
    refused(20, produce, connection, topic, partition, bytes(wrong))
    other = batch([(key, b"alone", [])])
    nowhere = {"id": bytes(16)}
    entries = [entry(nowhere, 0, other), entry(topic, (partition + 1) % 3, other), entry(topic, 3, other)]
    results = connection.ask("Produce", other * 3, entries=entries)["results"]
    same([result["error"] and result["error"]["code"] for result in results], [10, None, 11])

    # What is wrong with a request disturbs no other: all of these are on their way at the same time.
    unknown = connection.send(200, b"")
    garbage = connection.send(REQUESTS["Fetch"][0], b"\xff")
    ping = connection.send(REQUESTS["Ping"][0], b"")
    same(connection.answer(ping)[0], REPLY)
    for correlation, code in ((garbage, 1), (unknown, 3)):
        kind, _, message, _ = connection.answer(correlation)
        same((kind, decode("Error", message)["code"]), (ERROR, code))
    return partition


def check_reading(connection, topic, partition):
    reply, records = fetch(connection, topic["id"], partition, 0)
    same(reply, {"log_start": 0, "high_watermark": 6})
    same([record.offset for record in records], list(range(6)))
    same(records[1][2:], (b"customer-7", b"order 1", [("number", b"1"), ("none", None)]))
    same([record.value for record in records[3:]], [None, b"", "ü".encode()])
    assert abs(records[0].timestamp - time.time() * 1000) < 3_600_000, records[0]
    same([record.offset for record in fetch(connection, topic["id"], partition, 4)[1]], [4, 5])
    same(fetch(connection, topic["id"], partition, 6, max_wait_ms=50), (reply, []))
    refused(28, fetch, connection, topic["id"], partition, 7)

    offsets = {"topic_id": topic["id"], "partitions": [partition]}
    (listed,) = connection.ask("ListOffsets", timestamp=records[3].timestamp, **offsets)["partitions"]
    same((listed["log_start"], listed["high_watermark"]), (0, 6))
    assert listed["offset_for_timestamp"] <= 3, listed
    (listed,) = connection.ask("ListOffsets", timestamp=records[5].timestamp + 1, **offsets)["partitions"]
    same(listed["offset_for_timestamp"], None)

    # One record of credit lets a whole batch through; then 2 are missing until there is any again.
    position = {"topic_id": topic["id"], "partition": partition, "offset": 1}
    connection.ask("Subscribe", subscription=70, positions=[position], credit_records=1, credit_bytes=1 << 20)
    push, payload = connection.push("Records", 70)
    same((push["topic_id"], push["partition"], push["high_watermark"]), (topic["id"], partition, 6))
    same([record.offset for record in read_batches(payload)], [0, 1, 2])
    connection.call("Credit", subscription=70, records=2, bytes=0)
    connection.no_push()
    connection.call("Credit", subscription=70, records=1, bytes=0)
    _, payload = connection.push("Records", 70)
    same([record.offset for record in read_batches(payload)], [3, 4, 5])
    connection.call("Credit", subscription=70, records=100, bytes=0)
    connection.no_push()
    produced = produce(connection, topic, partition, batch([(b"customer-7", b"late", [])]))
    _, payload = connection.push("Records", 70)
    same([record.offset for record in read_batches(payload)], [produced["base_offset"]])
    refused(1, connection.ask, "Subscribe", subscription=70, positions=[position])
    connection.ask("Unsubscribe", subscription=70)

    beyond = {"topic_id": topic["id"], "partition": partition, "offset": 1000}
    connection.ask("Subscribe", subscription=71, positions=[beyond], credit_records=1, credit_bytes=1)
    ended, _ = connection.push("SubscriptionEnded", 71)
    same((ended["error"]["code"], ended["topic_id"], ended["partition"]), (28, topic["id"], partition))
    connection.call("Credit", subscription=71, records=1, bytes=1)


def check_consumer_group(connection, topic, partition):
    group = fresh("python.readers")

    def heartbeat(member, owned, generation, **more):
        fields = {"group": group, "member_id": member, "topics": [topic["name"]], **more}
        return connection.ask("GroupHeartbeat", owned=owned, generation=generation, **fields)

    def commit(member, generation, offset):
        offsets = [{"topic_id": topic["id"], "partition": partition, "offset": offset, "metadata": "m"}]
        request = {"group": group, "member_id": member, "generation": generation, "offsets": offsets}
        (result,) = connection.ask("CommitOffsets", **request)["results"]
        return result["error"] and result["error"]["code"]

    def by_number(partitions):
        return sorted(item["partition"] for item in partitions)

    first = heartbeat("a", [], 0)
    same(by_number(first["assigned"]), [0, 1, 2])
    assert first["interval_ms"] > 0, first
    same(commit("a", first["generation"], 2), None)
    same(commit("b", first["generation"], 3), 33)
    same(commit("a", first["generation"], 1000), 28)
    committed = connection.ask("FetchOffsets", group=group)["offsets"]
    same([(item["partition"], item["offset"], item["metadata"]) for item in committed], [(partition, 2, "m")])

    # A second member gets partitions once the first has given them up.
    same(heartbeat("b", [], 0)["assigned"], [])
    kept = heartbeat("a", first["assigned"], first["generation"])["assigned"]
    assert len(kept) in (1, 2), kept
    heartbeat("a", kept, first["generation"])
    second = heartbeat("b", [], 0)
    same(by_number(kept + second["assigned"]), [0, 1, 2])
    for member in ("a", "b"):
        heartbeat(member, [], second["generation"], leave=True)


class ShareMember:
    """A member of a share group and its leases."""

    def __init__(self, connection, group, member, subscription, credit, held=()):
        self.connection, self.group, self.member, self.subscription = connection, group, member, subscription
        names = {"subscription": subscription, "group": group, "member_id": member}
        connection.ask("ShareSubscribe", credit_records=credit, credit_bytes=1 << 20, held=held, **names)

    def take(self, count):
        """So many leased records: (lease, record, deliveries, failures)."""
        taken = []
        while len(taken) < count:
            push, payload = self.connection.push("LeasedRecords", self.subscription)
            assert push["lease_ms"] > 0, push
            records = read_batches(payload)
            deliveries = push["delivery_counts"] or [1] * len(records)
            failures = push["failure_counts"] or [0] * len(records)
            same((len(deliveries), len(failures)), (len(records), len(records)))
            for index, record in enumerate(records):
                lease = {key: push[key] for key in ("topic_id", "partition", "boot_epoch")}
                lease |= {"offset": record.offset, "sequence": push["first_sequence"] + index}
                taken.append((lease, record, deliveries[index], failures[index]))
        same(len(taken), count)
        return taken

    def give(self, records):
        self.connection.call("Credit", subscription=self.subscription, records=records, bytes=0)

    def settle(self, *settlements):
        """Settles (lease, outcome, detail) in one request; returns the results as (status, state, remaining_ms)."""
        batches = []
        for lease, outcome, detail in settlements:
            place = {key: lease[key] for key in ("topic_id", "partition", "boot_epoch")}
            settled = {key: lease[key] for key in ("offset", "sequence")}
            settled |= {"outcome": f"OUTCOME_{outcome}", "detail": detail}
            batches.append({**place, "settlements": [settled]})
        reply = self.connection.ask("Settle", group=self.group, member_id=self.member, batches=batches)
        return [settle_result(result) for result in reply["results"]]

    def complete(self, lease, payload, outputs):
        request = {"group": self.group, "member_id": self.member, "lease": lease, "outputs": outputs}
        reply = self.connection.ask("Complete", payload, **request)
        return settle_result(reply["result"])[:2], reply["base_offsets"]


def settle_result(result):
    status, state = result["status"], result["state"]
    return status.removeprefix("SETTLE_STATUS_"), state.removeprefix("RECORD_STATE_"), result["remaining_ms"]


def check_share_group(connection, results):
    """Work shared out, each record settled in another way."""
    source = connection.ask("CreateTopic", name=fresh("python.work"), partitions=3)["topic"]
    key = b"order-21"
    partition = partition_of(key, 3)
    produce(connection, source, partition, batch([(key, b"work %d" % number, [("h", b"1")]) for number in range(6)]))
    group = fresh("python.workers")
    config = [{"key": "jitter", "value": "0"}, {"key": "lease", "value": "30s"}]
    connection.ask("CreateShareGroup", group=group, topics=[source["name"]], config=config)
    refused(31, connection.ask, "CreateShareGroup", group=group, topics=[source["name"]])
    bad = [{"key": "leese", "value": "30s"}]
    refused(14, connection.ask, "CreateShareGroup", group=fresh("g"), topics=[source["name"]], config=bad)
    refused(30, connection.ask, "ShareSubscribe", subscription=80, group="nobody", member_id="m")

    member = ShareMember(connection, group, "worker-1", 80, credit=4)
    taken = member.take(4)
    same([record.offset for _, record, _, _ in taken], [0, 1, 2, 3])
    same([counts for _, _, *counts in taken], [[1, 0]] * 4)
    same(taken[2][1][2:], (key, b"work 2", [("h", b"1")]))
    same((taken[0][0]["topic_id"], taken[0][0]["partition"]), (source["id"], partition))
    connection.no_push()

    acked, delayed, rejected, completed = (lease for lease, *_ in taken)
    delay = 300
    nacked_at = time.monotonic()
    ok = member.settle(
        (acked, "ACK", {}),
        (delayed, "NACK", {"delay_ms": delay, "class": "gateway", "reason": "busy"}),
        (rejected, "REJECT", {"class": "bad-order", "reason": "no address", "detail": "line 7"}),
        (completed, "EXTEND", {"remaining_ms": 60_000}),
    )
    same([result[:2] for result in ok], [("OK", state) for state in ("ACKED", "SCHEDULED", "DEAD_LETTERED", "LEASED")])
    assert 0 < ok[1][2] <= delay and 30_000 < ok[3][2] <= 60_000, ok
    repeated = member.settle((acked, "ACK", {}), (acked, "NACK", {}), (acked, "EXTEND", {}))
    same([status for status, *_ in repeated], ["DUPLICATE", "CONFLICT", "GONE"])

    # Another member's lease, then an acknowledgement together with two records for another topic, then that again.
    outputs = batch([(key, b"done 3", [])]), batch([(key, b"mail 3", []), (None, None, [])])
    entries = [entry(results, 0, output) for output in outputs]
    stranger = ShareMember(connection, group, "worker-2", 81, credit=0)
    same(stranger.complete(completed, b"".join(outputs), entries), (("NOT_OWNER", "UNSPECIFIED"), []))
    same(member.complete(completed, b"".join(outputs), entries), (("OK", "ACKED"), [0, 1]))
    same(member.complete(completed, b"".join(outputs), entries), (("DUPLICATE", "UNSPECIFIED"), []))
    same([record.value for record in fetch(connection, results["id"], 0, 0)[1]], [b"done 3", b"mail 3", None])

    # With credit again: the rest, and what was nacked, once its time has come.
    member.give(4)
    rest = {record.offset: (lease, *counts) for lease, record, *counts in member.take(3)}
    assert time.monotonic() - nacked_at >= delay / 1000 - 0.01
    same({offset: counts for offset, (_, *counts) in rest.items()}, {1: [2, 1], 4: [1, 0], 5: [1, 0]})
    assert rest[1][0]["sequence"] > delayed["sequence"]
    same(member.settle((delayed, "ACK", {})), [("CONFLICT", "UNSPECIFIED", 0)])
    same(member.settle((rest[4][0], "RELEASE", {})), [("OK", "AVAILABLE", 0)])
    ((released, record, *counts),) = member.take(1)
    same((record.offset, counts), (4, [2, 0]))
    acks = member.settle((rest[1][0], "ACK", {}), (released, "ACK", {}), (rest[5][0], "ACK", {}))
    same(acks, [("OK", "ACKED", 0)] * 3)

    letter_topic = check_dead_letter(connection, source, partition, group)
    check_redrive(connection, member, source, partition)
    described = connection.ask("DescribeGroup", group=group)
    same(described["kind"], "GROUP_KIND_SHARE")
    (place,) = (
        place for place in described["partitions"] if place["topic_id"] == source["id"] and place["partition"] == partition
    )
    same((place["position"], place["lag"], place["acked"], place["dead_lettered"]), (6, 0, 5, 1))
    same((place["leased"], place["oldest_unsettled_ms"]), (0, None))
    foreign = batch([(None, b"x", [])])
    same(produce(connection, {"id": letter_topic["topic_id"]}, 0, foreign)["error"]["code"], 23)
    for subscription in (80, 81):
        connection.ask("Unsubscribe", subscription=subscription)


def check_dead_letter(connection, source, partition, group):
    (letters,) = connection.ask("ListDeadLetters", group=group)["topics"]
    same((letters["group"], letters["source_topic"]), (group, source["name"]))
    same((letters["topic"], letters["partitions"]), (f"dlq.{group}.{source['name']}", 3))
    # The answer to a reject may come before the dead letter is there.
    _, (letter,) = fetch(connection, letters["topic_id"], partition, 0, max_wait_ms=10_000)
    same((letter.key, letter.value), (b"order-21", b"work 2"))
    same(letter.headers[0], ("h", b"1"))
    prefix = "__dlq.errors."
    added = {name.removeprefix(prefix): value.decode() for name, value in letter.headers if name.startswith(prefix)}
    same(len(added), len(letter.headers) - 1)
    times = [int(added.pop(name)) for name in ("timestamp", "first.delivery.ms", "last.delivery.ms")]
    assert all(abs(letter.timestamp - moment) < 3_600_000 for moment in times), (letter.timestamp, times)
    wanted = {
        "topic": source["name"],
        "partition": str(partition),
        "offset": "2",
        "group": group,
        "delivery.count": "1",
        "failure.count": "1",
        "message": "no address",
        "class": "bad-order",
        "detail": "line 7",
        "reason": "rejected",
        "id": f"{group}/{source['name']}/{partition}/2",
        "origin": f"{source['name']}/{partition}/2",
        "consumer": "worker-1",
        "redrive.count": "0",
    }
    same(added, wanted)
    return letters


def check_redrive(connection, member, source, partition):
    spec = {"group": member.group, "source_topic": source["name"], "target": "REDRIVE_TARGET_GROUP"}
    redrive = connection.ask("Redrive", id="all", spec=spec)
    while redrive["state"] == "REDRIVE_STATE_RUNNING":
        time.sleep(0.01)
        redrive = connection.ask("Redrive", id="all", spec=spec)
    same([redrive[name] for name in ("state", "examined", "moved", "refused")], ["REDRIVE_STATE_DONE", 1, 1, 0])
    (listed,) = connection.ask("ListRedrives", group=member.group)["redrives"]
    same(listed, redrive)
    member.give(1)
    ((lease, record, *counts),) = member.take(1)
    (redrives,) = connection.ask("Metadata", topics=[f"redrive.{member.group}.{source['name']}"])["topics"]
    same((lease["topic_id"], lease["partition"], counts), (redrives["id"], partition, [1, 0]))
    same((redrives["kind"], record.value), ("TOPIC_KIND_REDRIVE", b"work 2"))
    origin = f"{source['name']}/{partition}/2".encode()
    redriven = [("__dlq.errors.redrive.count", b"1"), ("__dlq.errors.origin", origin)]
    same(record.headers, [("h", b"1"), *redriven])
    same(member.settle((lease, "ACK", {})), [("OK", "ACKED", 0)])
    (letters,) = connection.ask("ListDeadLetters", group=member.group)["topics"]
    same((letters["pending"], letters["redriven"]), (0, 1))


def check_return(address, topic):
    """A member that comes back on a new connection goes on with what it names, and gets the rest again."""
    connection, _ = connect(address)
    produce(connection, topic, 0, batch([(None, b"%d" % number, []) for number in range(2)]))
    group = fresh("python.returning")
    connection.ask("CreateShareGroup", group=group, topics=[topic["name"]])
    (kept, *_), (lost, *_) = ShareMember(connection, group, "m", 1, credit=10).take(2)
    connection.close()
    connection, _ = connect(address)
    member = ShareMember(connection, group, "m", 1, credit=10, held=[kept])
    ((again, record, *counts),) = member.take(1)
    same((record.offset, counts), (lost["offset"], [2, 0]))
    same(member.settle((kept, "ACK", {}), (again, "ACK", {})), [("OK", "ACKED", 0)] * 2)
    connection.close()


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    address = sys.argv[1]
    check_arithmetic()
    connection = check_handshake(address)
    topic = check_topics(connection)
    partition = check_producing(connection, topic)
    check_reading(connection, topic, partition)
    check_consumer_group(connection, topic, partition)
    results = connection.ask("CreateTopic", name=fresh("python.results"), partitions=1)["topic"]
    check_share_group(connection, results)
    returning = connection.ask("CreateTopic", name=fresh("python.returning"), partitions=1)["topic"]
    check_return(address, returning)
    same((connection.answers, connection.pushes), ({}, []))
    connection.close()
    print("ok")


if __name__ == "__main__":
    main()
