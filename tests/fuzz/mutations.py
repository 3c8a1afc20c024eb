"""Mutations that know a format: they damage a field and put its checksums right again."""

import copy
import csv
import gzip
import io
import json
import pickletools
import struct
import warnings
import zipfile
import zlib

import numpy as np

INTEGERS = [0, 1, -1, 2, 7, 127, 128, 255, 256, 32767, 65535, 65536, 2**24, 2**31 - 1, 2**31]
INTEGERS += [2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63)]
TEXTS = ["", "a", "../x", "/etc/passwd", "\0", "\n", "\x1b[2J", "\ud800", "é" * 50, "x" * 5000]
TEXTS += ["__class__", "os.system", "nan", "1e999", "%s%n", "*" * 100]
VALUES = [None, True, False, 1.5, -0.0, 1e308, float("nan"), float("inf"), [], {}, [[]], [None]]
VALUES += [10**400, -(10**30), {"a": 1}, {"class_name": "Lambda", "config": {}}, "9" * 5000]


def mutate_bytes(rng, content):
    """Flips, cuts, repeats, splices and interesting numbers, with no knowledge of the format."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and place < len(data):
            data[place] = rng.randrange(256)
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            del data[place : place + rng.choice([1, 2, 4, 8, 100])]
        elif kind == 4:
            start = rng.randrange(len(data) + 1)
            data[place:place] = data[start : start + rng.choice([1, 4, 16, 200])]
        elif kind == 5:
            form = rng.choice(["<I", ">I", "<Q", ">Q", "<H", "B"])
            size = struct.calcsize(form)
            number = rng.choice(INTEGERS) % (1 << 8 * size)
            data[place : place + size] = struct.pack(form, number)
        else:
            data[place:place] = rng.randbytes(rng.choice([1, 3, 50]))
    return bytes(data)


def mutate_json(rng, content):
    """Another value, key or depth somewhere in a document."""
    value = json.loads(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        value = _mutate_value(rng, value)
    if rng.random() < 0.02:
        depth = rng.choice([50, 500, 200_000])
        return b"[" * depth + json.dumps(value).encode() + b"]" * depth
    text = json.dumps(value)
    if rng.random() < 0.05:
        text = text.replace("{", '{"model_dir": 1, "model_dir": 2,', 1)
    return text.encode("utf-8", "surrogatepass")


def _mutate_value(rng, root):
    places = [(None, None)]
    pending = [root] if isinstance(root, dict | list) else []
    while pending:
        value = pending.pop()
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys:
            places.append((value, key))
            if isinstance(value[key], dict | list):
                pending.append(value[key])
    parent, key = rng.choice(places)
    if parent is None:
        return _other(rng, root) if rng.random() < 0.1 else root
    kind = rng.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice([*TEXTS[:-6], "a b", key + "_"])] = parent.pop(key)
    elif kind == 2:
        depth = rng.choice([1, 3, 30, 90])
        for _ in range(depth):
            parent[key] = [parent[key]] if rng.random() < 0.5 else {"config": parent[key]}
    elif kind == 3:
        other, other_key = rng.choice(places[1:])
        parent[key] = copy.deepcopy(other[other_key])
    elif kind == 4 and isinstance(parent, list):
        parent[key:key] = [copy.deepcopy(parent[key])] * rng.choice([1, 2, 100])
    else:
        parent[key] = _other(rng, parent[key])
    return root


def _other(rng, value):
    if isinstance(value, str) and rng.random() < 0.5:
        return rng.choice(TEXTS)
    if isinstance(value, int | float) and rng.random() < 0.6:
        return rng.choice([*INTEGERS, value + 1, -value, value * 1000, value // 2])
    return copy.deepcopy(rng.choice([*VALUES, *INTEGERS, *TEXTS]))


def mutate_csv(rng, content):
    """Another cell, row or column."""
    rows = list(csv.reader(io.StringIO(content.decode())))
    for _ in range(rng.choice([1, 2, 4])):
        row = rng.choice(rows)
        kind = rng.randrange(6)
        if kind == 0:
            del rows[rng.randrange(len(rows))]
        elif kind == 1:
            rows.insert(rng.randrange(len(rows) + 1), list(row))
        elif kind == 2 and row:
            del row[rng.randrange(len(row))]
        elif kind == 3:
            row.append(rng.choice(TEXTS))
        elif row:
            row[rng.randrange(len(row))] = str(rng.choice([*INTEGERS, *TEXTS, *VALUES, "-1"]))
        if not rows:
            break
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().encode("utf-8", "surrogatepass")


def mutate_npy(rng, content):
    """Another header, of the right length, or other values."""
    start = 10 + struct.unpack_from("<H", content, 8)[0]
    header, body = content[10:start].decode(), content[start:]
    if rng.random() < 0.3:
        return content[:start] + _noise(rng, body)
    shape = header[header.index("(") : header.index(")") + 1]
    descr = header[header.index("'descr': ") + 9 : header.index(", 'fortran")]
    new_shape = [f"({rng.choice(INTEGERS)},)", "()", "(-1, -1)", f"({10**30},)", "[3]", "(0,)"]
    new_shape += [f"({rng.choice(INTEGERS)}, {rng.choice(INTEGERS)})", "(True,)", "(1.5,)"]
    new_shape += ["(" + "1, " * 70 + ")", shape.replace("(", "(1, "), "(2**40,)", "'x'"]
    new_descr = ["'|O'", "'<f8'", "'<f2'", "'|u1'", "'<i8'", "'<U3'", "'|V100'", "'|S1000000000'"]
    new_descr += ["[('a', '<f4')]", "'<c16'", "'>f4'", "'<M8[s]'", "5", "'(3,)f4'", "'<f4,<O'"]
    kind = rng.randrange(5)
    if kind == 0:
        header = header.replace(shape, rng.choice(new_shape), 1)
    elif kind == 1:
        header = header.replace(descr, rng.choice(new_descr), 1)
    elif kind == 2:
        header = header.replace("False", rng.choice(["True", "None", "1", "[]"]), 1)
    elif kind == 3:
        header = rng.choice(["{}", "[]", "(" * 300, "{" + header[1:] * 3, "__import__('os')", ""])
    else:
        return content[:10] + _noise(rng, content[10:start]) + body
    data = header.rstrip().encode() + b"\n"
    data = data.ljust(start - 10)
    return content[:8] + struct.pack("<H", len(data)) + data + body


def mutate_zip(members):
    """An archive with one member or one of its entries changed, checksums and directory right.

    Args:
        members: mutations by the end of a member's name; bytes otherwise.
    """

    def mutate(rng, content):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [[entry, archive.read(entry)] for entry in archive.infolist()]
        for _ in range(rng.choice([1, 1, 1, 2])):
            entry = rng.choice(entries)
            if rng.random() < 0.75:
                known = [m for end, m in members.items() if entry[0].filename.endswith(end)]
                try:
                    entry[1] = (known or [mutate_bytes])[0](rng, entry[1])
                except Exception:  # damaged before, so that it is of its format no more
                    entry[1] = mutate_bytes(rng, entry[1])
            else:
                _mutate_entry(rng, entry, entries)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a name that stands twice is meant
            for info, data in entries:
                method = rng.choice([info.compress_type] * 6 + [zipfile.ZIP_DEFLATED])
                archive.writestr(info, data, compress_type=method)
        data = out.getvalue()
        return _lie(rng, data) if rng.random() < 0.1 else data

    return mutate


def _mutate_entry(rng, entry, entries):
    info = zipfile.ZipInfo(entry[0].filename)
    info.external_attr = entry[0].external_attr
    kind = rng.randrange(6)
    if kind == 0:
        names = ["../x", "/x", "a/../../x", "C:\\x", "a\\..\\x", "x/", ".", "", "é", "x" * 300]
        info.filename = rng.choice([*names, entries[0][0].filename, "config.json", "a\x1b[2J"])
    elif kind == 1:
        info.external_attr = rng.choice([0o120777, 0o010644, 0o060644, 0o040755, 0o4755]) << 16
    elif kind == 2:
        entries.append([info, entry[1]])
        return
    elif kind == 3:
        entries.remove(entry)
        entries.append([info, b"\0" * rng.choice([0, 100, 20_000_000])])
        return
    elif kind == 4:
        info.compress_type = rng.choice([zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    else:
        info.extra = struct.pack("<HH", 1, 16) + rng.randbytes(16)
    entry[0] = info


def _lie(rng, content):
    """Other sizes and flags in the central directory."""
    data = bytearray(content)
    place = content.find(b"PK\1\2")
    if place >= 0:
        at = place + rng.choice([8, 10, 16, 20, 24, 28, 30, 38, 42])
        form = rng.choice(["<H", "<I"])
        number = rng.choice(INTEGERS) % (1 << 8 * struct.calcsize(form))
        data[at : at + struct.calcsize(form)] = struct.pack(form, number)
    return bytes(data)


def mutate_idx(rng, content):
    """Another header or other values; a gzipped file is packed again."""
    if content[:2] == b"\x1f\x8b":
        return gzip.compress(mutate_idx(rng, gzip.decompress(content)), 1)
    num_axes = content[3]
    if rng.random() < 0.5:
        data = bytearray(content)
        number = rng.choice(INTEGERS) % 2**32
        struct.pack_into(">I", data, 4 + 4 * rng.randrange(num_axes), number)
        return bytes(data)
    start = 4 + 4 * num_axes
    return content[:start] + _noise(rng, content[start:])


def mutate_pickle(rng, content):
    """Other operations and arguments, still a stream of operations."""
    ends = [place for _, _, place in pickletools.genops(content)][1:] + [len(content)]
    pieces = [content[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.randrange(len(pieces))
        kind = rng.randrange(6)
        if kind == 0:
            del pieces[place]
        elif kind == 1:
            pieces.insert(place, rng.choice(pieces))
        elif kind == 2:
            pieces.insert(place, rng.choice(_PICKLE_PIECES))
        elif kind == 3:
            pieces[place] = rng.choice(_PICKLE_PIECES)
        elif kind == 4:
            other = rng.randrange(len(pieces))
            pieces[place], pieces[other] = pieces[other], pieces[place]
        elif len(pieces[place]) > 1:
            pieces[place] = pieces[place][:1] + _noise(rng, pieces[place][1:])
        if not pieces:
            break
    return b"".join(pieces)


_PICKLE_PIECES = [
    *(bytes([code]) for code in b"(0.12NQbc}]te)luas\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94\x81"),
    *(b"K" + bytes([n]) for n in (0, 1, 255)),
    *(b"j" + struct.pack("<I", n) for n in (0, 5, 2**16, 2**30, 2**32 - 1)),
    *(b"r" + struct.pack("<I", n) for n in (0, 5, 2**16, 2**30, 2**32 - 1)),
    *(b"J" + struct.pack("<i", n) for n in (-1, 2**31 - 1)),
    b"\x8e" + struct.pack("<Q", 2**40),
    b"\x8e" + struct.pack("<Q", 3) + b"abc",
    b"\x8b" + struct.pack("<I", 2**31 - 1),
    b"\x8a\x09" + b"\xff" * 9,
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"cnumpy.core.multiarray\nscalar\n",
    b"cnumpy\ndtype\n",
    b"X\x04\x00\x00\x00true",
    b"(" * 200,
    b"]" * 200,
    b"\x85" * 500,
]


def mutate_records(rng, content):
    """TFRecords: another record or payload, lengths and checksums right."""
    records, place = [], 0
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        records.append(content[place + 12 : place + 12 + length])
        place += 16 + length
    place = rng.randrange(len(records))
    kind = rng.randrange(6)
    if kind == 0:
        del records[place]
    elif kind == 1:
        records.insert(place, records[rng.randrange(len(records))])
    elif kind == 2:
        records[place] = b""
    else:
        records[place] = _mutate_example(rng, records[place])
    out = io.BytesIO()
    lie = rng.choice([None] * 9 + [rng.randrange(max(1, len(records)))])
    for number, record in enumerate(records):
        size = rng.choice(INTEGERS) % 2**64 if number == lie else len(record)
        length = struct.pack("<Q", size)
        out.write(length + masked_crc32c(length) + record + masked_crc32c(record))
    return out.getvalue()


def _mutate_example(rng, record):
    # Inside a PNG, the checksums of its chunks are put right too.
    start = record.find(b"\x89PNG\r\n\x1a\n")
    if start < 0 or rng.random() < 0.3:
        return mutate_bytes(rng, record)
    data = bytearray(record)
    ihdr = start + 8
    at = ihdr + 8 + rng.randrange(13)
    if rng.random() < 0.5:
        at = ihdr + 8 + 4 * rng.randrange(2)
        struct.pack_into(">I", data, at, rng.choice(INTEGERS) % 2**32)
    else:
        data[at] = rng.randrange(256)
    struct.pack_into(">I", data, ihdr + 21, zlib.crc32(data[ihdr + 4 : ihdr + 21]))
    return bytes(data)


def mutate_table(rng, content):
    """The index of a TF1 bundle: another entry, blocks and checksums right."""
    from tensorflow.core.protobuf import tensor_bundle_pb2

    records = read_table(content)
    names = list(records)
    name = rng.choice(names)
    kind = rng.randrange(8)
    if kind == 0:
        del records[name]
    elif kind == 1:
        records[rng.choice([b"x", b"\xff\xfe", b"a" * 5000, b"\x1b[2J", name + b"_"])] = records[
            name
        ]
    elif kind == 2:
        records[name] = mutate_bytes(rng, records[name])
    elif kind == 3 or not name:
        header = tensor_bundle_pb2.BundleHeaderProto.FromString(records[b""])
        if rng.random() < 0.5:
            header.num_shards = rng.choice(INTEGERS[:14])
        else:
            header.endianness = rng.choice([0, 1])
            header.version.min_consumer = rng.choice([0, 5, 100])
        records[b""] = header.SerializeToString()
    else:
        entry = tensor_bundle_pb2.BundleEntryProto.FromString(records[name])
        number = rng.choice(INTEGERS)
        number = (number + 2**63) % 2**64 - 2**63
        field = rng.randrange(7)
        if field == 0:
            entry.dtype = rng.choice([0, 1, 2, 3, 7, 9, 20, 21, 101, 10])
        elif field == 1 and entry.shape.dim:
            entry.shape.dim[rng.randrange(len(entry.shape.dim))].size = number
        elif field == 2:
            for _ in range(rng.choice([1, 5, 300])):
                entry.shape.dim.add().size = rng.choice([1, 0, -1, 2**31])
        elif field == 3:
            entry.offset = number
        elif field == 4:
            entry.size = number
        elif field == 5:
            entry.shard_id = rng.choice([-1, 1, 2**31 - 1])
        else:
            entry.shape.unknown_rank = True
        records[name] = entry.SerializeToString()
    return write_table(records)


def read_table(content):
    """The records of a table of one data block or several, by key."""
    from madry_compat.bundle_index import _block_records, _varints

    handles = _varints(content[-48:], 0, 4)[0]
    records = {}
    for _, handle in _block_records(content, *handles[2:]):
        records |= dict(_block_records(content, *_varints(handle, 0, 2)[0]))
    return records


def write_table(records):
    """A LevelDB table of one data block."""
    out = io.BytesIO()
    data = _write_block(out, sorted(records.items()))
    meta = _write_block(out, [])
    index = _write_block(out, [(max(records, default=b""), data)])
    out.write((meta + index).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57))
    return out.getvalue()


def _write_block(out, items):
    body, restarts = b"", []
    for key, value in items:
        restarts.append(len(body))
        body += b"\0" + _varint(len(key)) + _varint(len(value)) + key + value
    restarts = restarts or [0]
    block = body + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
    handle = _varint(out.tell()) + _varint(len(block))
    out.write(block + b"\0" + masked_crc32c(block + b"\0"))
    return handle


def _varint(number):
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _crc32c_table():
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC32C = _crc32c_table()


def masked_crc32c(content):
    """As TensorFlow stores it."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _noise(rng, body):
    """Other values of the same length, or another length."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, body)
    data = np.frombuffer(body, np.uint8).copy()
    if len(data):
        places = [rng.randrange(len(data)) for _ in range(rng.choice([1, 4, 40]))]
        data[places] = [rng.choice([0, 127, 128, 255, rng.randrange(256)]) for _ in places]
    return data.tobytes()
