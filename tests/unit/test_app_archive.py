"""The Flower App's archive: which archives hold the same App."""

from __future__ import annotations

import io
import zipfile

import pytest

from edgelam_fl.federation.app_archive import archive_digest


def archive(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", compression) as out:
        for name, content in files.items():
            out.writestr(name, content)
    return written.getvalue()


def test_the_digest_is_of_names_and_contents() -> None:
    app = {"server/app.py": b"a" * 1000, "clients/app.py": b"b"}
    digest = archive_digest(archive(app))
    assert archive_digest(archive(app, zipfile.ZIP_STORED)) == digest, "other systems compress otherwise"
    assert archive_digest(archive(dict(reversed(app.items())))) == digest
    for other in (
        {**app, "clients/app.py": b"c"},
        {**app, "json.py": b""},
        {"server/app.py": b"a" * 1000},
        {"server/app.py": b"b", "clients/app.py": b"a" * 1000},
    ):
        assert archive_digest(archive(other)) != digest


def test_what_is_no_archive_and_what_is_too_long_are_refused() -> None:
    whole = archive({"server/app.py": b"a" * 1000})
    for broken in (b"", b"PK", whole[:50], whole[:40] + b"\xff\xff" + whole[42:]):
        with pytest.raises(ValueError, match="the App's archive cannot be read"):
            archive_digest(broken)
    with pytest.raises(ValueError, match="are longer than"):
        archive_digest(archive({"bomb": bytes(17 << 20)}))
