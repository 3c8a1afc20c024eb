"""Files of madry_compat: whole or not at all, and as readable as any other."""

from madry_compat.files import write_atomically


def test_a_written_file_has_the_content_and_permissions_of_any_other(tmp_path):
    ordinary, written = tmp_path / "ordinary", tmp_path / "written"
    ordinary.write_bytes(b"content")
    written.write_bytes(b"a longer content from before")
    write_atomically(written, lambda file: file.write(b"content"))
    assert written.read_bytes() == b"content"
    assert written.stat().st_mode == ordinary.stat().st_mode
    assert sorted(tmp_path.iterdir()) == [ordinary, written]
