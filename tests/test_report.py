"""run.json."""

from __future__ import annotations

from importlib import metadata

from segpipe.report import LIBRARIES, library_versions


def test_versions_are_told_of_what_every_installation_has(monkeypatch):
    asked = [line for line in metadata.requires("segpipe") or [] if "extra ==" not in line]
    for name in LIBRARIES:
        assert any(line.startswith(name) for line in asked), name
    assert library_versions() == {name: metadata.version(name) for name in LIBRARIES}
    there = metadata.version

    def lacking(name):
        if name == "openvino":  # has no build for some platforms
            raise metadata.PackageNotFoundError(name)
        return there(name)

    monkeypatch.setattr(metadata, "version", lacking)
    assert list(library_versions()) == [name for name in LIBRARIES if name != "openvino"]
