"""Files as Windows editors and other programs write them, and what a terminal is shown of foreign names."""

import json
from pathlib import Path

import pytest

from edt.files.text import printable, read_json, read_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_with_their_mark_read_alike(tmp_path, encoding):
    path = tmp_path / "names.txt"
    path.write_bytes("tänch\nβ\n".encode(encoding))
    assert read_text(path, "labels") == "tänch\nβ\n"


@pytest.mark.parametrize(
    "content", ["tänch".encode("latin-1"), b"\xff\xfea", "tench".encode("utf-16-le"), b"a\0b"]
)
def test_other_bytes_are_refused_by_the_files_name(tmp_path, content):
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^labels .*names\.txt .*UTF-8"):
        read_text(path, "labels")


@pytest.mark.parametrize("content", ["", "{", "[" * 200_000, "1" * 5000, '{"a": }'])
def test_torn_json_is_refused_by_the_files_name(tmp_path, content):
    path = tmp_path / "index.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"^index .*index\.json is no JSON"):
        read_json(path, "index")


def test_json_of_another_type_is_refused(tmp_path):
    path = tmp_path / "index.json"
    path.write_text(json.dumps([1]))
    assert read_json(path, "index", list) == [1]
    with pytest.raises(ValueError, match="is JSON, but list; it must be an object"):
        read_json(path, "index", dict)


def test_names_are_printed_without_escapes():
    assert printable("a\x1b[31m\nb\udce4ä") == r"a\x1b[31m\nb\udce4ä"
    assert printable("β 3×4").encode() == "β 3×4".encode()


def test_what_cannot_be_read_is_named():
    """Also where it can be opened."""
    with pytest.raises(OSError, match="/proc/self/mem"):
        read_text(Path("/proc/self/mem"), "config")
